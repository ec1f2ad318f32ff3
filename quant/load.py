"""Read an ONNX model and bring it into the one form that the rest of bitwright works on.

:func:`load` checks the file, inlines functions, converts half precision to float32, names what is
nameless, raises the operator set to 21 (the first with 4- and 16-bit quantizers), turns constants
into initializers, folds constant expressions and infers shapes. Symbolic dimensions stay symbolic.
"""

from __future__ import annotations

import graphlib
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import google.protobuf.message
import numpy as np
import onnx
import onnx.external_data_helper
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
)

from bitwright.errors import BitwrightError, ModelError, UsageError, first_line
from bitwright.quant.float_ops import Array, FloatOperator
from bitwright.quant.graph import (
    DECODE,
    ENCODE,
    SOFT_EDGE_DOMAIN,
    all_nodes,
    constant,
    is_quantizer,
    layout_of,
    loop_body,
)
from bitwright.quant.recurrent import decompose
from bitwright.quant.soft_edge_nodes import decode_attributes, encode_attributes
from bitwright.vocabulary import Dim

__all__ = ["MIN_OPSET", "Model", "ValueType", "convert_opset", "load"]

logger = logging.getLogger(__name__)

MIN_OPSET: Final = 21
"""Operator set of a loaded model: the first whose quantizers know 4- and 16-bit integers."""

MAX_OPSET: Final = onnx.defs.onnx_opset_version()

_STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")

# Folding evaluates an operator once per constant; these are the ones exporters leave on weights.
_FOLDABLE = frozenset(
    "Abs Add And Cast Ceil Concat ConstantOfShape Div Equal Exp Expand Flatten Floor Gather Greater"
    " Identity Less Mul Neg Not Or Pow Reciprocal Reshape Shape Slice Split Sqrt Squeeze Sub Tile"
    " Transpose Unsqueeze Where".split()
)
_FOLD_LIMIT = 1 << 28  # bytes that all expressions together may add to the weights

_SMALL = 1024  # bytes of a tensor whose values may steer shapes

# Operators with inputs, behind the first, of one entry an axis; ConstantOfShape has only that one.
_LISTS_AXES = frozenset(
    "CenterCropPad Col2Im ConstantOfShape Expand MaxUnpool Reshape Tile Unsqueeze".split()
)
_MAX_RANK = 1024

# Data propagation keeps every element of every vector, about 75 bytes each.
_MAX_VECTOR_ELEMENTS = 1 << 20

# Those of soft-edge codes; everything else is inlined.
_KEPT_FUNCTIONS = ((SOFT_EDGE_DOMAIN, ENCODE), (SOFT_EDGE_DOMAIN, DECODE))

# Inlining compares the names of all copies of a function; functions that call functions multiply.
_MAX_CALLS = 2000

_LARGEST = 2.0**100  # magnitude of weights whose products stay in float32 for all usual inputs
_MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")

# Attributes that name an element type.
_TYPE_ATTRIBUTES = frozenset(
    "to dtype output_dtype output_datatype precision softmax_precision stash_type".split()
)

_HALF: dict[int, str] = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


# Inside Model, "ir" is the field.
_Graph: TypeAlias = ir.Graph
_Value: TypeAlias = ir.Value
_Node: TypeAlias = ir.Node


@dataclass(frozen=True, slots=True)
class ValueType:
    """Name, element type and shape of one input or output of a model."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...] | None


@dataclass(slots=True)
class Model:
    """A loaded ONNX model.

    Attributes
    ----------
    ir
        The model in ONNX IR: one main graph, no functions but those of soft-edge codes, every node
        named, operator set 21 or later, shapes inferred.
    source
        The file it came from, or a word for a model given in memory; for messages.
    structure_hash
        SHA-256 of graph, names and shapes as they stand in the file, weights left out.
    weights_hash
        SHA-256 of the values of all weights.
    notes
        What was changed on the way in and the user should know.
    """

    ir: ir.Model
    source: str
    structure_hash: str
    weights_hash: str
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> _Graph:
        """The main graph."""
        return self.ir.graph

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return self.ir.opset_imports[""]

    @property
    def inputs(self) -> tuple[ValueType, ...]:
        """Inputs of the main graph, initializers left out."""
        return tuple(_value_type(value) for value in self.graph.inputs)

    @property
    def outputs(self) -> tuple[ValueType, ...]:
        """Outputs of the main graph."""
        return tuple(_value_type(value) for value in self.graph.outputs)

    @property
    def is_quantized(self) -> bool:
        """Whether the model holds quantizers or dequantizers."""
        nodes = list(all_nodes(self.graph))
        return any(is_quantizer(n) or n.op_type == "DequantizeLinear" for n in nodes)

    def to_proto(self) -> onnx.ModelProto:
        """Serialize to an ONNX protobuf, all tensors inside."""
        return ir.to_proto(ir.external_data.load_to_model(self.ir))

    def to_proto_with_outputs(self, values: Sequence[_Value]) -> onnx.ModelProto:
        """Serialize the model with other values as its outputs; the model itself stays.

        A value of a loop's body has a first axis more, one entry a step. Outputs come in the order
        of the values; those of bodies have names of their own.
        """
        proto = self.to_proto()
        if not values:
            return proto
        loops = {value: str(node.name) for node in self.graph for value in _body_values(node)}
        nodes = {node.name: node for node in proto.graph.node}
        del proto.graph.output[:]
        for value in values:
            name = str(value.name)
            if value in loops:
                name = _collect_steps(nodes[loops[value]], value)
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
        return proto

    def with_input_shapes(self, input_shapes: Mapping[str, Sequence[int | None]]) -> Model:
        """Return a copy whose inputs have the given shapes, all other shapes inferred anew.

        A size of None stays what it is.

        Raises
        ------
        ModelError
            If there is no such input, or a shape contradicts the model.
        """
        try:
            model = self.ir.clone()
            _fix_input_shapes(model, input_shapes, self.source)
        except BitwrightError:
            raise
        except Exception as error:  # as in load
            raise ModelError(
                f"cannot take the input shapes {dict(input_shapes)} ({first_line(error)})",
                where=self.source,
            ) from error
        return Model(model, self.source, self.structure_hash, self.weights_hash, self.notes)


def _body_values(node: _Node) -> list[_Value]:
    body = loop_body(node)
    if body is None:
        return []
    return [*body.inputs, *(value for inner in body for value in inner.outputs)]


def _collect_steps(node: onnx.NodeProto, value: ir.Value) -> str:
    """Make a value of a loop's body an output, one entry a step; return the output's name."""
    name, shape = str(value.name), value.shape
    body = next(entry.g for entry in node.attribute if entry.name == "body")
    inner, outer = f"{name}/step", f"{name}/steps"
    body.node.append(onnx.helper.make_node("Identity", [name], [inner], name=inner))
    sizes = None if shape is None else [d if isinstance(d, int) else None for d in shape]
    dtype = ir.DataType.FLOAT if value.dtype is None else value.dtype
    body.output.append(onnx.helper.make_tensor_value_info(inner, int(dtype), sizes))
    node.output.append(outer)
    for entry in node.attribute:
        if entry.name in ("scan_output_axes", "scan_output_directions"):
            entry.ints.append(0)
    return outer


def load(
    source: str | Path | onnx.ModelProto,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Model:
    """Load an ONNX model.

    Parameters
    ----------
    source
        An ONNX file (weights inside or as external data beside it), or a model in memory.
    input_shapes
        Input name to shape; fixes symbolic dimensions.

    Returns
    -------
    Model
        The model, ready for :func:`bitwright.quant.layers.find_layers`.

    Raises
    ------
    ModelError
        If the file is missing, truncated or no ONNX model, external data are missing, the model is
        not valid, or it uses operators that are not standard.
    """
    where = "model" if isinstance(source, onnx.ModelProto) else str(source)
    try:
        if isinstance(source, onnx.ModelProto):
            proto = onnx.ModelProto()
            proto.CopyFrom(source)
            base = None
        else:
            path = Path(source)
            proto = _read(path)
            base = path.parent
        _check(proto, where, base)
        return _normalize(proto, where, base, input_shapes or {})
    except BitwrightError:
        raise
    except MemoryError as error:
        raise ModelError("the model does not fit into memory", where=where) from error
    except Exception as error:  # the libraries below raise many kinds for a malformed model
        logger.debug("loading %s failed", where, exc_info=True)
        raise ModelError(
            f"not a valid ONNX model ({first_line(error)})",
            where=where,
            fix="check that the file was written completely by an ONNX exporter",
        ) from error


def _read(path: Path) -> onnx.ModelProto:
    where = str(path)
    try:
        if path.is_dir():
            raise ModelError("is a folder, not an ONNX file", where=where)
        if path.exists() and not path.is_file():  # a device may have no end
            raise ModelError("is not a regular file", where=where)
        if path.stat().st_size >= onnx.checker.MAXIMUM_PROTOBUF:
            raise ModelError(
                "is larger than 2 GiB, which no ONNX file can be",
                where=where,
                fix="export the model with its weights as external data",
            )
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelError("there is no such file", where=where) from None
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=where) from error
    if not content:
        raise ModelError("the file is empty", where=where)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except google.protobuf.message.DecodeError:
        raise ModelError(
            "not an ONNX file, or a truncated one",
            where=where,
            fix="export the model again, or copy the whole file",
        ) from None
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError("not an ONNX model: it holds no graph", where=where)
    return proto


def _holders(proto: onnx.ModelProto) -> Iterator[Any]:
    """All that holds nodes: the main graph, functions, and the bodies inside, level by level."""
    found: list[Any] = [proto.graph, *proto.functions]
    for holder in found:  # grows on the way
        yield holder
        for node in holder.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    found.append(attribute.g)
                found.extend(attribute.graphs)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a model, those of subgraphs and functions too."""
    for holder in _holders(proto):
        yield from getattr(holder, "initializer", ())
        attributes = [attribute for node in holder.node for attribute in node.attribute]
        for attribute in (*attributes, *getattr(holder, "attribute_proto", ())):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check(proto: onnx.ModelProto, where: str, base: Path | None) -> None:
    """Raise ModelError unless the model is valid and its external data are all there."""
    nodes = [node for holder in _holders(proto) for node in holder.node]
    imports = [proto, *proto.functions]
    for entry in (*nodes, *(entry for holder in imports for entry in holder.opset_import)):
        if (
            entry.domain == "ai.onnx"
        ):  # the long name of the standard domain, unknown to the checker
            entry.domain = ""
    opset = max((entry.version for entry in proto.opset_import if entry.domain == ""), default=0)
    if opset > MAX_OPSET:
        raise ModelError(
            f"uses operator set {opset}, newer than the installed onnx package knows ({MAX_OPSET})",
            where=where,
            fix="update onnx, or export the model with an older operator set",
        )
    _check_operators(proto, where)
    _check_calls(proto, where)
    _check_ranks(proto, where)
    in_graph = {id(tensor) for tensor in proto.graph.initializer}
    for tensor in _tensors(proto):
        if onnx.external_data_helper.uses_external_data(tensor):
            size = _check_external(tensor, where, base)
            # The checker would look for tensors of nodes elsewhere; shapes depend on small ones.
            if id(tensor) not in in_graph or size <= _SMALL:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(base))
    # The checker wants shapes of unknown rank to be written down, which many exporters do not.
    unknown = [
        value.type.tensor_type
        for value in (*proto.graph.input, *proto.graph.output)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]
    for tensor_type in unknown:
        tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(_external_as_inputs(proto))
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"not a valid ONNX model ({first_line(error)})",
            where=where,
            fix="export it again; onnx.checker.check_model tells more",
        ) from error
    finally:
        for tensor_type in unknown:
            tensor_type.ClearField("shape")


def _check_operators(proto: onnx.ModelProto, where: str) -> None:
    """Refuse operators that are not standard, all at once, and sparse tensors."""
    own = {(function.domain, function.name) for function in proto.functions}
    foreign = [
        node
        for holder in _holders(proto)
        for node in holder.node
        if node.domain not in _STANDARD_DOMAINS and (node.domain, node.op_type) not in own
    ]
    if foreign:
        shown = ", ".join(
            f"{node.domain}.{node.op_type} ({node.name or next(iter(node.output), 'nameless')})"
            for node in foreign[:8]
        )
        more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
        raise ModelError(
            f"uses operators that are not part of the ONNX standard: {shown}{more}",
            where=where,
            fix="export the model without optimizations of one runtime, with standard operators",
        )
    for holder in _holders(proto):
        sparse = [tensor.values.name for tensor in getattr(holder, "sparse_initializer", ())]
        for node in holder.node:
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    sparse.append(node.name or next(iter(node.output), ""))
        if sparse:
            raise ModelError(
                f"holds sparse tensors, which are not supported ({', '.join(sparse[:8])})",
                where=where,
                fix="export the model with dense weights",
            )


def _check_calls(proto: onnx.ModelProto, where: str) -> None:
    """Refuse functions that call each other in a circle or multiply without end."""
    names = {(function.domain, function.name) for function in proto.functions}
    if not names:
        return

    def calls(holder: Any) -> Counter[tuple[str, str]]:
        found: Counter[tuple[str, str]] = Counter()
        pending = [holder]
        while pending:
            for node in pending.pop().node:
                found.update({(node.domain, node.op_type)} & names)
                for attribute in node.attribute:
                    pending.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
        return found

    inside = {(function.domain, function.name): calls(function) for function in proto.functions}
    try:
        order = list(graphlib.TopologicalSorter(inside).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(name for _, name in error.args[1])
        raise ModelError(f"has functions that call themselves: {circle}", where=where) from None
    total = calls(proto.graph)
    for caller in reversed(order):
        if total[caller] > _MAX_CALLS:
            raise ModelError(
                f"calls function {caller[1]!r} {total[caller]} times, more than {_MAX_CALLS}",
                where=where,
                fix="inline the functions first (onnx.inliner.inline_local_functions)",
            )
        for callee, count in inside[caller].items():
            total[callee] += count * total[caller]


def _check_ranks(proto: onnx.ModelProto, where: str) -> None:
    """Refuse inputs that ask for thousands of axes: shape inference would write them all."""
    lengths: dict[str, int] = {}
    for holder in _holders(proto):
        if isinstance(holder, onnx.GraphProto):
            for info in (*holder.input, *holder.value_info):
                dims = info.type.tensor_type.shape.dim
                lengths[info.name] = dims[0].dim_value if len(dims) == 1 else 0
            lengths.update((t.name, t.dims[0]) for t in holder.initializer if len(t.dims) == 1)
    for holder in _holders(proto):
        for node in holder.node:
            first = 0 if node.op_type == "ConstantOfShape" else 1
            for name in node.input[first:] if node.op_type in _LISTS_AXES else ():
                if lengths.get(name, 0) > _MAX_RANK:
                    raise ModelError(
                        f"input {name!r} of {node.op_type} {node.name!r} has {lengths[name]} "
                        "entries, one for every axis",
                        where=where,
                        fix="export the model again",
                    )


def _check_external(tensor: onnx.TensorProto, where: str, base: Path | None) -> int:
    """Refuse external data that are missing, too short or elsewhere; return how many bytes."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    if base is None:
        raise ModelError(
            f"tensor {tensor.name!r} lies in the external file {location!r}",
            where=where,
            fix="give the path of the model, or load its external data first",
        )
    file = base / location
    if not file.resolve().is_relative_to(base.resolve()):
        raise ModelError(
            f"tensor {tensor.name!r} points outside the model's folder ({location!r})",
            where=where,
            fix="put the model and its data file into one folder, without links",
        )
    if not file.is_file():
        raise ModelError(
            f"external data of tensor {tensor.name!r} are missing: no file {str(file)!r}",
            where=where,
            fix="copy the data file beside the model",
        )
    # Offset and length are the file's claims; a short file would crash readers that map it.
    wanted: int = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8
    try:
        offset = int(info.get("offset", 0))
        length = int(info.get("length", wanted))
    except ValueError:
        offset = -1
    if offset < 0 or any(size < 0 for size in tensor.dims) or length < wanted:
        raise ModelError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} does not fit its external data "
            f"(offset {info.get('offset', 0)}, length {info.get('length', 'not given')})",
            where=where,
            fix="export the model again",
        )
    if file.stat().st_size < offset + length:
        raise ModelError(
            f"external data of tensor {tensor.name!r} are truncated: {str(file)!r} is shorter "
            f"than {offset + length} bytes",
            where=where,
            fix="copy the whole data file",
        )
    # The length may be left out, or count what lies between two tensors; readers want it exact.
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", wanted)):
        tensor.external_data.add(key=key, value=str(value))
    return wanted


def _external_as_inputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with external tensors as inputs: the checker would look for them elsewhere."""
    uses_external_data = onnx.external_data_helper.uses_external_data
    external = [tensor for tensor in proto.graph.initializer if uses_external_data(tensor)]
    if not external:
        return proto
    slim = onnx.ModelProto()
    slim.CopyFrom(proto)
    kept = [tensor for tensor in slim.graph.initializer if not uses_external_data(tensor)]
    slim.graph.ClearField("initializer")
    slim.graph.initializer.extend(kept)
    declared = {value.name for value in slim.graph.input}
    slim.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in external
        if tensor.name not in declared
    )
    return slim


def _normalize(
    proto: onnx.ModelProto,
    where: str,
    base: Path | None,
    input_shapes: Mapping[str, Sequence[int]],
) -> Model:
    notes: list[str] = []
    if half := _widen_half(proto, base):
        notes.append(f"{half} converted to float32")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:  # some exporters write -1 for a free dimension
                dim.ClearField("dim_value")
    model = ir.from_proto(proto)
    if base is not None:
        ir.external_data.set_base_dir(model.graph, base)
    model.opset_imports.setdefault("", 1)
    for function in model.functions.values():
        for node in function.all_nodes():  # else all copies would be called node_2, node_3, ...
            node.name = _Names().generate_node_name(node)
    InlinePass(lambda function: function.identifier()[:2] not in _KEPT_FUNCTIONS)(model)
    _check_layouts(model, where)
    _drop_initializer_inputs(model, notes)
    _name(model)
    structure_hash = _structure_hash(model)
    weights_hash = _weights_hash(model)
    if model.opset_imports[""] < MIN_OPSET:
        model = convert_opset(model, MIN_OPSET, where)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _fix_input_shapes(model, input_shapes, where)
    changed = _fold_constants(model)  # amounts of a Pad, say, that were computed
    changed = _take_branches(model, where) or changed
    if decompose(model, where) or changed:
        _infer_shapes(model, where)
    RemoveUnusedNodesPass()(model)
    _check_convolutions(model, where)
    _check_decoded(model, where)
    _check_finite(model, where)
    return Model(model, where, structure_hash, weights_hash, tuple(notes))


def _widen_half(proto: onnx.ModelProto, base: Path | None) -> str:
    """Turn float16 and bfloat16 into float32 everywhere; return what was found, or ""."""
    found: set[str] = set()

    def widen(kind: onnx.TypeProto) -> None:
        if kind.tensor_type.elem_type in _HALF:
            found.add(_HALF[kind.tensor_type.elem_type])
            kind.tensor_type.elem_type = onnx.TensorProto.FLOAT
        for name in ("sequence_type", "optional_type"):  # of tensors, or of one another
            if kind.HasField(name):
                widen(getattr(kind, name).elem_type)

    for tensor in _tensors(proto):
        if tensor.data_type in _HALF:
            found.add(_HALF[tensor.data_type])
            if onnx.external_data_helper.uses_external_data(tensor):
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(base))
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    for holder in _holders(proto):
        if isinstance(holder, onnx.GraphProto):
            for info in (*holder.input, *holder.output):
                widen(info.type)
        for info in holder.value_info:
            widen(info.type)
        for node in holder.node:
            for attribute in node.attribute:
                if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _HALF:
                    found.add(_HALF[attribute.i])
                    attribute.i = onnx.TensorProto.FLOAT
                if attribute.HasField("tp"):
                    widen(attribute.tp)
    return " and ".join(sorted(found))


def _drop_initializer_inputs(model: ir.Model, notes: list[str]) -> None:
    """Take initializers out of the graph inputs: bitwright treats weights as constants."""
    graph = model.graph
    doubled = [value for value in graph.inputs if value.name in graph.initializers]
    for value in doubled:
        graph.inputs.remove(value)
    if doubled and model.ir_version >= 4:  # before, all initializers had to be inputs
        notes.append(f"{len(doubled)} inputs with default values are taken as constants")


class _Names:
    """Names for nameless nodes and values, after what they compute: edits elsewhere keep them."""

    def generate_node_name(self, node: ir.Node) -> str:
        if node.name:
            return node.name
        first = next((value.name for value in node.outputs if value.name), "")
        return f"{node.op_type}_{first}" if first else node.op_type

    def generate_value_name(self, value: ir.Value) -> str:
        return value.name or "value"


def _name(model: ir.Model) -> None:
    NameFixPass(name_generator=_Names())(model)
    # Plans, calibration and reference know nodes and values by name, those of loops included.
    taken: dict[str, set[str]] = {"node": set(), "value": set()}

    def distinct(entry: ir.Node | ir.Value, kind: str, prefix: str) -> None:
        name, number = str(entry.name), 1
        while name in taken[kind]:
            name = f"{prefix}/{entry.name}" + (f"_{number}" if number > 1 else "")
            number += 1
        taken[kind].add(name)
        if name != entry.name:
            entry.name = name

    for node in model.graph:
        taken["node"].add(str(node.name))
        taken["value"].update(str(value.name) for value in node.outputs)
    taken["value"].update(str(value.name) for value in model.graph.inputs)
    taken["value"].update(model.graph.initializers)
    for node in model.graph:
        for inner in loop_body(node) or ():
            distinct(inner, "node", str(node.name))
        for value in _body_values(node):
            if value.name:
                distinct(value, "value", str(node.name))


def _dims(shape: ir.Shape | None) -> list[Dim] | None:
    if shape is None:
        return None
    return [dim if isinstance(dim, int) else (dim.value or "?") for dim in shape]


def _structure_hash(model: ir.Model) -> str:
    """Hash graph, names, shapes and 64-bit integer tensors (they steer shapes), not weights."""

    def tensor(value: ir.TensorProtocol) -> list[Any]:
        steers = value.dtype == ir.DataType.INT64
        values = hashlib.sha256(value.tobytes()).hexdigest() if steers else None
        return [str(value.dtype), list(value.shape.numpy()), values]

    def attribute(value: ir.Attr) -> Any:
        if value.type == ir.AttributeType.GRAPH:
            return graph(value.as_graph())
        if value.type == ir.AttributeType.GRAPHS:
            return [graph(entry) for entry in value.as_graphs()]
        if value.type == ir.AttributeType.TENSOR:
            return tensor(value.as_tensor())
        if value.type == ir.AttributeType.TENSORS:
            return [tensor(entry) for entry in value.as_tensors()]
        return repr(value.value)

    def graph(holder: ir.Graph) -> dict[str, Any]:
        return {
            "inputs": [[v.name, str(v.dtype), _dims(v.shape)] for v in holder.inputs],
            "outputs": [[v.name, str(v.dtype), _dims(v.shape)] for v in holder.outputs],
            "initializers": {
                str(name): tensor(value.const_value)
                for name, value in sorted(holder.initializers.items())
                if value.const_value is not None
            },
            "nodes": [
                {
                    "op": [node.domain, node.op_type],
                    "name": node.name,
                    "inputs": [value.name if value is not None else None for value in node.inputs],
                    "outputs": [value.name for value in node.outputs],
                    "attributes": {
                        name: attribute(value) for name, value in sorted(node.attributes.items())
                    },
                }
                for node in holder
            ],
        }

    content = {"opsets": sorted(model.opset_imports.items()), "graph": graph(model.graph)}
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _weights_hash(model: ir.Model) -> str:
    """Hash the values of all tensors: initializers and constants, those of bodies too."""
    tensors: list[tuple[str, ir.TensorProtocol]] = []
    for graph in model.graphs():
        tensors += [
            (str(name), value.const_value)
            for name, value in sorted(graph.initializers.items())
            if value.const_value is not None
        ]
        tensors += [
            (f"{node.name} {attribute.name}", attribute.as_tensor())
            for node in graph
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.TENSOR
        ]
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} ".encode())
        if tensor.dtype == ir.DataType.STRING:  # its array holds Python objects
            digest.update(repr(tensor.numpy().tolist()).encode())
        else:
            digest.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    return "sha256:" + digest.hexdigest()


def convert_opset(model: ir.Model, version: int, where: str) -> ir.Model:
    """Raise the standard operator set with onnx's converter; weights are not copied.

    Raises
    ------
    ModelError
        If the converter cannot raise one of the operators.
    """
    before = model.opset_imports[""]
    for node in model.graph.all_nodes():
        if node.domain == "" and _converted_wrongly(node, before):
            raise ModelError(
                f"{node.op_type} {node.name!r} cannot be raised from operator set {before}: it had "
                "another meaning",
                where=where,
                fix=f"export the model with operator set {version}",
            )
    large = _large_initializers(model)
    model.ir_version = max(model.ir_version, 10)  # before 4, initializers had to be inputs too
    try:
        proto = onnx.version_converter.convert_version(_slim_proto(model, large), version)
    except Exception as error:
        raise ModelError(
            f"cannot be raised from operator set {model.opset_imports['']} to {version} "
            f"({first_line(error)})",
            where=where,
            fix=f"export the model with operator set {version}",
        ) from error
    names = {value.name for value in model.graph.inputs}
    converted = ir.from_proto(proto)
    for node in converted.graph.all_nodes():
        if node.op_type == "Resize" and before < 11:  # what the converter leaves out
            node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
            node.attributes.add(ir.AttrString("nearest_mode", "floor"))
    for value in list(converted.graph.inputs):
        if value.name in large:
            converted.graph.inputs.remove(value)
            value.const_value = large[value.name]
            converted.graph.initializers[value.name] = value
        elif value.name not in names:  # a small initializer that the converter also made an input
            converted.graph.inputs.remove(value)
    _name(converted)
    _infer_shapes(converted, where)
    return converted


def _converted_wrongly(node: ir.Node, opset: int) -> bool:
    """Whether onnx's converter would silently change what a node computes."""
    if node.op_type == "Scan":
        return opset < 9  # it had a batch axis
    if node.op_type == "Hardmax" and opset < 13:  # it took all axes from this one on
        axis = node.attributes.get_int("axis", 1)
        rank = None if node.inputs[0] is None else len(node.inputs[0].shape or ())
        return axis not in (-1, (rank or 0) - 1)
    return False


def _large_initializers(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > _SMALL
    }


def _slim_proto(model: ir.Model, large: Mapping[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """Serialize a model with its large weights turned into inputs.

    onnx's converter and shape inference copy the whole protobuf, which may not exceed 2 GiB.
    """
    graph = model.graph
    values = [graph.initializers.pop(name) for name in large]
    try:
        for value in values:
            value.shape = ir.Shape(large[str(value.name)].shape.numpy())
            value.dtype = large[str(value.name)].dtype
            value.const_value = None
        graph.inputs.extend(values)
        return ir.to_proto(model)
    finally:
        for value in values:
            if value in graph.inputs:
                graph.inputs.remove(value)
            value.const_value = large[str(value.name)]
            graph.initializers[str(value.name)] = value


def _fix_input_shapes(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int | None]], where: str
) -> None:
    """Give inputs the shapes asked for and infer all other shapes."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    for name, shape in input_shapes.items():
        if name not in inputs:
            raise ModelError(
                f"there is no input {name!r}", where=where, fix=f"its inputs: {', '.join(inputs)}"
            )
        known = _dims(inputs[name].shape)
        fits = known is None or (
            len(known) == len(shape)
            and all(
                not isinstance(old, int) or new is None or old == new
                for old, new in zip(known, shape, strict=True)
            )
        )
        if not fits or any(size is not None and not 0 < size < 1 << 63 for size in shape):
            asked = ["?" if size is None else size for size in shape]
            raise ModelError(
                f"shape {asked} does not fit input {name!r}, which is {known}", where=where
            )
        before = inputs[name].shape or [None] * len(shape)
        inputs[name].shape = ir.Shape(
            [old if new is None else new for old, new in zip(before, shape, strict=True)]
        )
    if input_shapes:  # what was inferred with symbolic dimensions must not win
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
        # An output's declared shape would win over the inferred one.
        for value in model.graph.outputs:
            if value.producer() is not None:
                value.shape = None
    _infer_shapes(model, where)


def _check_layouts(model: ir.Model, where: str) -> None:
    """Refuse soft-edge codes whose layout is none, or says something else than their numbers."""
    for graph in model.graphs():
        for node in graph:
            if (node.domain, node.op_type) not in _KEPT_FUNCTIONS:
                continue
            place = f"{where}, {node.op_type} {node.name!r}"
            try:
                layout = layout_of(node, node.op_type)
            except UsageError as error:
                raise ModelError(
                    error.what, where=place, fix="quantize the float model again"
                ) from None
            assert layout is not None
            numbers = encode_attributes if node.op_type == ENCODE else decode_attributes
            for name, value in numbers(layout).items():
                found = node.attributes.get(name)
                given = None if found is None else found.value
                given = list(given) if isinstance(given, Sequence) and name != "layout" else given
                if given != value and not (name == "layout" and given == "quamba-se"):
                    raise ModelError(
                        f"its attribute {name} is {given!r}, and its layout means {value!r}",
                        where=place,
                        fix="quantize the float model again",
                    )


def _check_decoded(model: ir.Model, where: str) -> None:
    """Refuse decoded soft-edge codes that are read as anything but whole steps of a tensor.

    The range of the layout is that of the tensor where, and only where, DequantizeLinear reads what
    SoftEdgeDecode leaves; and 0 is the value of a code only if it is the zero point.
    """
    for graph in model.graphs():
        for node in graph:
            if (node.domain, node.op_type) != (SOFT_EDGE_DOMAIN, DECODE):
                continue
            why = ""
            for reader, index in node.outputs[0].uses():
                what = f"{reader.op_type} {reader.name!r}"
                if (reader.domain, reader.op_type, index) != ("", "DequantizeLinear", 0):
                    why = f"{what} reads its steps, not DequantizeLinear"
                    continue
                inputs = [entry for entry in reader.inputs[1:] if entry is not None]
                scale, *zero = map(constant, inputs)
                if scale is None or scale.size != 1:
                    why = f"{what} has no constant scale, one for the tensor"
                elif any(entry is None or entry.any() for entry in zero):
                    why = f"{what} has a zero point other than 0"
            if why:
                raise ModelError(
                    why,
                    where=f"{where}, {DECODE} {node.name!r}",
                    fix="let DequantizeLinear with one scale and zero point 0 read the steps, and "
                    "move the codes or the floats instead",
                )


def _stand_ins(functions: Iterable[onnx.FunctionProto]) -> Iterator[onnx.FunctionProto]:
    """Functions of soft-edge codes as shape inference understands them: as casts."""
    for function in functions:
        cast = onnx.helper.make_node("Cast", function.input[:1], function.output)
        if function.name == ENCODE:
            cast.attribute.add(
                name="to", ref_attr_name="dtype", type=onnx.AttributeProto.AttributeType.INT
            )
        else:
            cast.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.INT16))
        copy = onnx.FunctionProto()
        copy.CopyFrom(function)
        del copy.node[:], copy.value_info[:]
        copy.node.append(cast)
        yield copy


def _infer_shapes(model: ir.Model, where: str) -> None:
    proto = _slim_proto(model, _large_initializers(model))
    functions = list(_stand_ins(proto.functions))
    proto.ClearField("functions")
    proto.functions.extend(functions)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except Exception as error:
        raise ModelError(
            f"its shapes contradict each other ({first_line(error)})",
            where=where,
            fix="export the model again; onnx.shape_inference.infer_shapes tells more",
        ) from error
    # Data propagation finds the most, but is not strict: it trips over Scan bodies that are valid.
    if _vector_elements(inferred) <= _MAX_VECTOR_ELEMENTS:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    _take_types(model.graph, ir.from_proto(inferred).graph)


def _take_types(graph: ir.Graph, inferred: ir.Graph) -> None:
    """Take over what was inferred, in bodies too."""
    for node, typed in zip(graph, inferred, strict=True):
        for value, found in zip(node.outputs, typed.outputs, strict=True):
            value.shape = found.shape
            value.type = found.type
        for name, entry in node.attributes.items():
            if entry.type == ir.AttributeType.GRAPH:
                body = entry.as_graph()
                other = typed.attributes[name].as_graph()
                for value, found in zip(body.inputs, other.inputs, strict=True):
                    value.shape = found.shape
                    value.type = found.type
                _take_types(body, other)


def _vector_elements(proto: onnx.ModelProto) -> int:
    """Sum of the sizes of all one-dimensional values."""
    total = 0
    for holder in _holders(proto):
        for info in (*getattr(holder, "input", ()), *holder.value_info, *holder.output):
            if not isinstance(info, str) and len(info.type.tensor_type.shape.dim) == 1:
                total += int(info.type.tensor_type.shape.dim[0].dim_value)
    return total


def _fold_constants(model: ir.Model) -> bool:
    """Replace expressions of constants (a transposed weight, say); say whether there were any."""
    graph = model.graph
    grown, folded = 0, False
    for node in list(graph):
        if node.op_type not in _FOLDABLE or node.domain != "":
            continue
        if any(value.is_graph_output() for value in node.outputs) or not node.inputs:
            continue
        tensors = [None if value is None else value.const_value for value in node.inputs]
        if any(
            value is not None and tensor is None
            for value, tensor in zip(node.inputs, tensors, strict=True)
        ):
            continue
        sizes = [_bytes(value) for value in node.outputs]
        before = sum(tensor.nbytes for tensor in set(tensors) if tensor is not None)
        growth = max(sum(_FOLD_LIMIT + 1 if size is None else size for size in sizes) - before, 0)
        if grown + growth > _FOLD_LIMIT:
            continue
        grown += growth
        arrays = [None if tensor is None else tensor.numpy() for tensor in tensors]
        if any(array is not None and array.dtype.kind not in "fiub" for array in arrays):
            continue
        _make_constant(graph, node, FloatOperator(node, model.opset_imports[""]).run(arrays))
        folded = True
    return folded


def _fold_sizes(model: ir.Model) -> None:
    """Replace what is known of shapes: numbers of elements, and sizes that Gather picks."""
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs and node.domain == "" else None
        if source is None or node.outputs[0].is_graph_output():
            continue
        if node.op_type == "Size" and source.shape is not None and source.shape.is_static():
            _make_constant(model.graph, node, [np.array(math.prod(source.shape.numpy()))])
        shaped = source.producer()
        if node.op_type != "Gather" or shaped is None or shaped.op_type != "Shape":
            continue
        places, whole = constant(node.inputs[1]), shaped.inputs[0]
        if places is None or whole is None or whole.shape is None or shaped.attributes:
            continue
        picked = [whole.shape[int(place)] for place in places.reshape(-1)]
        if all(isinstance(size, int) for size in picked):
            array = np.array(picked, np.int64).reshape(places.shape)
            _make_constant(model.graph, node, [array])


def _make_constant(graph: ir.Graph, node: ir.Node, results: Sequence[Array]) -> None:
    """Replace a node by its outputs."""
    for value, array in zip(node.outputs, results, strict=True):
        value_name = str(value.name)
        constant = ir.Value(
            name=value_name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=value_name),
        )
        value.name = None
        graph.register_initializer(constant)
        ir.convenience.replace_all_uses_with(value, constant)
    graph.remove(node, safe=True)


def _take_branches(model: ir.Model, where: str) -> bool:
    """Put the branch of each If whose condition is known in its place; say whether any was.

    Conditions often depend on sizes, and branches hold branches.
    """
    taken = False
    while any(node.op_type == "If" for node in model.graph):
        _fold_sizes(model)
        _fold_constants(model)
        if not _take_known_branches(model.graph):
            break
        _name(model)
        _infer_shapes(model, where)
        taken = True
    return taken


def _take_known_branches(graph: ir.Graph) -> bool:
    taken = False
    for node in list(graph):
        condition = constant(node.inputs[0]) if node.op_type == "If" and node.domain == "" else None
        if condition is None:
            continue
        name = "then_branch" if condition.any() else "else_branch"
        branch = node.attributes[name].as_graph()
        results = list(branch.outputs)
        branch.outputs.clear()
        for value in list(branch.initializers.values()):
            branch.initializers.pop(str(value.name))
            value.name = f"{node.name}/{value.name}"
            graph.register_initializer(value)
        nodes = list(branch)
        branch.remove(nodes)
        graph.insert_before(node, nodes)
        for old, result in zip(node.outputs, results, strict=True):
            new = result
            if result.producer() not in nodes:  # a value of the graph around, or a constant
                copy = ir.node("Identity", [result], name=f"{node.name}/{old.name}")
                graph.insert_before(node, copy)
                new = copy.outputs[0]
            new.name, old.name = old.name, None
            new.type, new.shape = old.type, new.shape or old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        taken = True
    return taken


def _bytes(value: ir.Value) -> int | None:
    """Size of a value's array, None where it is not known."""
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)


def _check_convolutions(model: ir.Model, where: str) -> None:
    """Refuse weights that do not fit a convolution: onnx infers an output shape all the same."""
    for node in model.graph:
        if node.op_type != "Conv" or node.domain != "":
            continue
        data, weights, bias = [None if v is None else _dims(v.shape) for v in (*node.inputs, None)][
            :3
        ]
        groups = node.attributes.get_int("group", 1)
        if weights is None or any(not isinstance(size, int) for size in weights):
            continue
        fits = len(weights) > 2 and groups > 0 and weights[0] % groups == 0
        if fits and data is not None:
            channels = data[1] if len(data) == len(weights) else None
            fits = not isinstance(channels, int | None) or channels == weights[1] * groups
        if fits and bias is not None:
            fits = len(bias) == 1 and (isinstance(bias[0], str) or bias[0] == weights[0])
        if not fits:
            raise ModelError(
                f"weights of shape {weights}, bias {bias} and {groups} groups do not fit the "
                f"input {data} of Conv {node.name!r}",
                where=where,
                fix="export the model again",
            )


def _check_finite(model: ir.Model, where: str) -> None:
    """Refuse NaN anywhere and infinities in what multiplies (an attention mask may hold them)."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            continue
        array = tensor.numpy()
        low, high = float(array.min(initial=0.0)), float(array.max(initial=0.0))
        users = ", ".join(str(use.node.name) for use in value.uses()) or "nothing"
        factors = [_factor(*use) for use in value.uses() if use.node.op_type in _MULTIPLY]
        largest = max(-low, high)
        if math.isnan(largest) or (factors and largest == math.inf):
            raise ModelError(
                f"weight {name!r} (used by {users}) holds NaN or infinite values",
                where=where,
                fix="the training diverged or the file is damaged; export a healthy checkpoint",
            )
        for factor in factors:
            if not largest * factor <= _LARGEST:  # a factor may be NaN
                raise ModelError(
                    f"weight {name!r} (used by {users}) holds {largest:g}, is multiplied by "
                    f"{factor:g} and then has products that overflow",
                    where=where,
                    fix="the training diverged or the file is damaged; export a healthy checkpoint",
                )
        for node, index in value.uses():
            if index == 1 and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                # A scale of 0 divides by zero; behind codes it only makes a channel of zeros.
                empty = node.op_type == "QuantizeLinear" and not array.all()
                if low < 0 or empty or largest == math.inf:
                    raise ModelError(
                        f"scale {name!r} of {node.op_type} {node.name!r} is not a positive number",
                        where=where,
                        fix="quantize the float model again",
                    )


def _factor(node: ir.Node, index: int) -> float:
    """What a Gemm multiplies one of its inputs by; 1 for other operators."""
    if node.op_type != "Gemm":
        return 1.0
    return abs(node.attributes.get_float("beta" if index == 2 else "alpha", 1.0))


def _value_type(value: ir.Value) -> ValueType:
    shape = _dims(value.shape)
    dtype = np.dtype(np.float32) if value.dtype is None else value.dtype.numpy()
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        dtype, shape = np.dtype(object), None  # a sequence or an optional
    return ValueType(str(value.name), np.dtype(dtype), None if shape is None else tuple(shape))
