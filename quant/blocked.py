"""Let convolutions whose weights are graph inputs run in onnxruntime's blocked memory layout.

Where the weights of a convolution are constants, onnxruntime reorders them once and computes in a
layout in which blocks of channels lie together (its operators of the domain
``com.microsoft.nchwc``), two to three times faster than in the standard layout. It does not do so
for weights that are inputs. So the model is given constants, optimised and written by onnxruntime
itself, and in what it wrote the constants become inputs again, now in the blocked layout. In
between, element-by-element operators are moved into the blocked layout as well, which saves
reordering before and after each.

Nothing here knows which processors have which layout: where onnxruntime's choice is not understood,
the caller is told, and keeps the standard one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from bitwright.quant.float_ops import wrong_optimizers

__all__ = ["BlockedLayout", "use_blocked_convolutions", "values_read"]

_DOMAIN: Final = "com.microsoft.nchwc"
_BLOCKS: Final = (8, 16, 4, 32)
# Operators that map values one by one, 0 to 0, and the inputs that hold data: the layout does not
# matter to them, and the zeros that fill up blocks of channels stay zeros.
_ELEMENTWISE: Final = {
    "Add": (0, 1),
    "Clip": (0,),
    "DequantizeLinear": (0,),
    "QuantizeLinear": (0,),
    "Relu": (0,),
}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockedLayout:
    """How weights and bias of a convolution lie in memory.

    Attributes
    ----------
    block
        Channels of one block.
    inner
        Whether input channels are blocked, too.
    shape
        Shape that the operator's input has; its elements are ordered in blocks.
    bias_size
        Number of elements of the bias, filled up with zeros; None without bias.
    """

    block: int
    inner: bool
    shape: tuple[int, ...]
    bias_size: int | None

    def weights(self, array: Floats) -> Floats:
        """Reorder weights ``[out, in, height, width]``."""
        return _reorder(array, self.block, inner=self.inner).reshape(self.shape)

    def bias(self, array: Floats) -> Floats:
        """Fill up a bias ``[out]``."""
        size = array.size if self.bias_size is None else self.bias_size
        return np.pad(array.reshape(-1), (0, size - array.size))


def _reorder(array: Floats, block: int, *, inner: bool) -> Floats:
    out, into, height, width = array.shape
    padded = np.pad(array, ((0, -out % block), (0, -into % block if inner else 0), (0, 0), (0, 0)))
    if not inner:
        blocks = padded.reshape(-1, block, into, height, width)
        return np.ascontiguousarray(blocks.transpose(0, 2, 3, 4, 1))
    blocks = padded.reshape(-1, block, padded.shape[1] // block, block, height, width)
    return np.ascontiguousarray(blocks.transpose(0, 2, 4, 5, 3, 1))


def use_blocked_convolutions(
    model: bytes,
    weights: Mapping[str, Floats],
    biases: Mapping[str, tuple[str, Floats]],
) -> tuple[bytes, dict[str, BlockedLayout]] | None:
    """Rewrite a model for the blocked layout.

    Parameters
    ----------
    model
        A serialized model.
    weights
        Input name to float values for each layer's weights.
    biases
        Name of a layer's weights to the name and a value of its bias.

    Returns
    -------
    tuple or None
        The rewritten model, which only the same onnxruntime on a like processor can load, and for
        each convolution in the blocked layout the name of its weights with their layout. None
        where onnxruntime uses no blocked layout, or one that is not known here.
    """
    # Values by which each tensor is known again, whatever it is renamed to.
    generator = np.random.default_rng(0)
    marks = {
        name: generator.standard_normal(array.shape, np.float32) for name, array in weights.items()
    }
    bias_marks = {
        bias: generator.standard_normal(array.shape, np.float32) for bias, array in biases.values()
    }
    proto = onnx.ModelProto.FromString(model)
    originals = {value.name: value for value in proto.graph.input}
    given = {**marks, **bias_marks}
    kept = [value for value in proto.graph.input if value.name not in given]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in given.items()
    )
    optimized = _optimize(proto)
    if not any(node.domain == _DOMAIN for node in optimized.graph.node):
        return None
    graph = optimized.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    sources = {_content(onnx.numpy_helper.to_array(tensors[name])): name for name in tensors}
    layouts: dict[str, BlockedLayout] = {}
    renamed: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, mark in marks.items():
        bias, bias_mark = biases[weight][0] if weight in biases else None, None
        if bias is not None:
            bias_mark = bias_marks[bias]
        name = sources.get(_content(mark))
        layout: BlockedLayout | None = None
        if name is None:
            for block, inner in ((b, i) for b in _BLOCKS for i in (True, False)):
                if mark.ndim != 4:
                    break
                name = sources.get(_content(_reorder(mark, block, inner=inner)))
                if name is not None:
                    shape = tuple(tensors[name].dims)
                    layout = BlockedLayout(block, inner, shape, None)
                    break
        if name is None:
            return None
        renamed[name], shapes[weight] = weight, tuple(tensors[name].dims)
        if bias is None or bias_mark is None:
            if layout is not None:
                layouts[weight] = layout
            continue
        sizes = [0] if layout is None else [-bias_mark.size % layout.block, 0]
        for extra in sizes:
            padded = bias_mark if layout is None else np.pad(bias_mark.reshape(-1), (0, extra))
            bias_name = sources.get(_content(padded))
            if bias_name is not None:
                break
        else:
            return None
        renamed[bias_name], shapes[bias] = bias, tuple(tensors[bias_name].dims)
        if layout is not None:
            layouts[weight] = BlockedLayout(
                layout.block, layout.inner, layout.shape, bias_mark.size + extra
            )
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    left = [tensor for tensor in graph.initializer if tensor.name not in renamed]
    del graph.initializer[:]
    graph.initializer.extend(left)
    for name in given:
        value = onnx.ValueInfoProto()
        value.CopyFrom(originals[name])
        del value.type.tensor_type.shape.dim[:]
        for size in shapes[name]:
            value.type.tensor_type.shape.dim.add().dim_value = size
        graph.input.append(value)
    _move_reorders(graph)
    del graph.value_info[:]  # shapes of the standard layout
    return optimized.SerializeToString(), layouts


def _content(array: npt.NDArray[np.float32]) -> bytes:
    return array.astype(np.float32).tobytes()


def _optimize(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxruntime makes of a model before it runs it."""
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        path = Path(folder) / "optimized.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        ort.InferenceSession(
            proto.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=wrong_optimizers(proto),
        )
        return onnx.load(path)


def _move_reorders(graph: onnx.GraphProto) -> None:
    """Run elementwise operators in the blocked layout where their data come from there.

    A value goes back to the standard layout only where an operator needs it so.
    """
    blocked: dict[str, str] = {}  # value to the same in the blocked layout
    reorders: dict[str, onnx.NodeProto] = {}  # value to how it comes back
    alias: dict[str, str] = {}
    done: list[onnx.NodeProto] = []
    present: set[str] = set()

    def standard(name: str) -> None:
        if name in reorders and name not in present:
            node = onnx.NodeProto()
            node.CopyFrom(reorders[name])
            node.input[0], node.output[0] = blocked[name], name
            node.name = f"{name}_reordered"
            done.append(node)
            present.add(name)

    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = alias.get(name, name)
        if node.domain == _DOMAIN and node.op_type == "ReorderOutput":
            blocked[node.output[0]], reorders[node.output[0]] = node.input[0], node
            continue
        if node.domain == _DOMAIN and node.op_type == "ReorderInput" and node.input[0] in blocked:
            alias[node.output[0]] = blocked[node.input[0]]
            continue
        data = _ELEMENTWISE.get(node.op_type, ()) if node.domain == "" else ()
        if data and all(node.input[index] in blocked for index in data):
            like = reorders[node.input[data[0]]]
            for index in data:
                node.input[index] = blocked[node.input[index]]
            name = node.output[0]
            node.output[0] = f"{name}_blocked"
            blocked[name], reorders[name] = node.output[0], like
            done.append(node)
            continue
        for name in sorted(values_read(node)):
            standard(name)
        done.append(node)
    for value in graph.output:
        standard(value.name)
    del graph.node[:]
    graph.node.extend(done)


def values_read(node: onnx.NodeProto) -> set[str]:
    """Values that a node reads, those of its bodies included."""
    names = {name for name in node.input if name}
    for entry in node.attribute:
        for graph in (*((entry.g,) if entry.HasField("g") else ()), *entry.graphs):
            inner = {name for value in graph.node for name in values_read(value)}
            own = {value.name for value in (*graph.input, *graph.initializer)}
            own |= {name for value in graph.node for name in value.output}
            names |= (inner | {value.name for value in graph.output}) - own
    return names
