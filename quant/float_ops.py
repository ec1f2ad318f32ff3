"""Run single ONNX operators in onnxruntime.

Whatever stays float in a quantized model runs here, in the integer reference and where constants
are folded, so that it equals what onnxruntime computes for the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

__all__ = ["Array", "FloatOperator", "captured_values", "make_session", "wrong_optimizers"]

Array = npt.NDArray[Any]

# Worth threads of their own. A model has hundreds of other operators, and a machine perhaps as many
# processors: each would start as many threads.
_PARALLEL = frozenset(
    "Attention Conv ConvTranspose Einsum GRU Gemm If LSTM Loop MatMul RNN Scan".split()
)


def wrong_optimizers(model: onnx.ModelProto) -> list[str]:
    """Optimisations of onnxruntime that would change what a model computes.

    Its rule Pad_Fusion makes padding with zeros, in front of a MaxPool, the padding of the MaxPool,
    which is with minus infinity (onnxruntime 1.31).
    """
    padded = {name for node in model.graph.node if node.op_type == "Pad" for name in node.output}
    pools = [node for node in model.graph.node if node.op_type == "MaxPool"]
    return ["Pad_Fusion"] if any(node.input[0] in padded for node in pools) else []


def make_session(
    model: onnx.ModelProto | bytes | str, *, optimize: bool, lean: bool = False
) -> ort.InferenceSession:
    """Make a CPU session.

    Parameters
    ----------
    model
        A model in memory, or the path of a file.
    optimize
        Whether onnxruntime may rewrite the graph. For a quantized model it may not: some of its
        fusions quantize activations on their own or change the rounding. Threads that wait sleep
        then: made to spin, those of a small session cost more to end than all of its work.
    lean
        One thread, and no memory kept for the next run: for many small sessions, which would
        otherwise have threads and an arena each.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # After a run its threads would keep a processor from whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if lean:
        options.enable_cpu_mem_arena = False
        options.intra_op_num_threads = 1
    wrong = []
    if isinstance(model, onnx.ModelProto):
        wrong = wrong_optimizers(model) if optimize else []
        model = model.SerializeToString()
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=wrong
    )


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Values of enclosing graphs that the bodies of a node (If, Loop, Scan) read."""
    captured: dict[ir.Value, None] = {}
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            own = set(graph.inputs) | set(graph.initializers.values())
            for inner in graph:
                own.update(inner.outputs)
            for inner in graph:
                outer = [value for value in inner.inputs if value is not None]
                outer.extend(captured_values(inner))
                captured.update((value, None) for value in outer if value not in own)
            captured.update((value, None) for value in graph.outputs if value not in own)
    return list(captured)


class FloatOperator:
    """One ONNX node as a function of arrays.

    Parameters
    ----------
    node
        The node; values that its bodies capture become extra inputs (see ``captured``).
    opset
        Version of the standard operator set.
    """

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.captured = captured_values(node)
        self._node = ir.to_proto(node)
        # Names are replaced: one value may stand twice among the inputs, outputs may be nameless.
        del self._node.input[:], self._node.output[:]
        self._node.input.extend(
            "" if value is None else f"bitwright.input_{i}" for i, value in enumerate(node.inputs)
        )
        self._outputs = [
            f"bitwright.output_{i}" if value.name else "" for i, value in enumerate(node.outputs)
        ]
        self._node.output.extend(self._outputs)
        self._opsets = [
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid("ai.onnx.ml", 3),
        ]
        self._sessions: dict[tuple[Any, ...], ort.InferenceSession] = {}

    def run(self, inputs: Sequence[Array | None], captured: Sequence[Array] = ()) -> list[Array]:
        """Compute the outputs of the node.

        Parameters
        ----------
        inputs
            One array an input, None for an input left out.
        captured
            The values of ``self.captured``.
        """
        feed = {
            name: np.asarray(array)
            for name, array in zip(self._node.input, inputs, strict=True)
            if name and array is not None
        }
        feed.update(
            (str(value.name), np.asarray(array))
            for value, array in zip(self.captured, captured, strict=True)
        )
        key = tuple((name, array.dtype, array.ndim) for name, array in feed.items())
        session = self._sessions.get(key)
        if session is None:
            graph = onnx.helper.make_graph(
                [self._node],
                "operator",
                [
                    onnx.helper.make_tensor_value_info(
                        name,
                        onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
                        [None] * array.ndim,
                    )
                    for name, array in feed.items()
                ],
                [onnx.ValueInfoProto(name=name) for name in self._outputs if name],
            )
            model = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=10)
            lean = self._node.op_type not in _PARALLEL
            session = make_session(model, optimize=False, lean=lean)
            self._sessions[key] = session
        results: list[Array] = session.run(None, feed)
        return results
