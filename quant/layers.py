"""Find the layers of a model: the operators that multiply by constant weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from bitwright.quant.graph import (
    DECODE,
    ENDLESS,
    SOFT_EDGE_DOMAIN,
    all_nodes,
    attribute,
    channel_axis,
    constant,
    is_arithmetic,
    is_clamp,
    is_elementwise,
    is_move,
    is_rotation,
    layers_of,
    layout_of,
    loop_body,
    weight_input,
)
from bitwright.quant.load import Model
from bitwright.vocabulary import BIT_WIDTHS, Activation, Dim, Layer, Precision

__all__ = [
    "NotLayer",
    "find_layers",
    "layer_nodes",
    "quantized_activation",
    "quantized_precision",
]

_RECURRENT = ("GRU", "LSTM", "RNN", "Scan", "Loop")
_OTHER_PRODUCTS = ("ConvTranspose", "DeformConv", "Einsum", "Attention")
_COMPUTING = ("Conv", "Gemm", "MatMul", *_RECURRENT, *_OTHER_PRODUCTS)


@dataclass(frozen=True, slots=True)
class NotLayer:
    """An operator that gets no precision of its own, and why.

    ``computes`` says whether it is work of its own: it is not where it carries values, cuts a range
    or quantizes.
    """

    name: str
    operator: str
    reason: str
    computes: bool = True


def layer_nodes(model: Model) -> dict[str, ir.Node]:
    """Nodes that are layers, by name, in order of execution; those of a loop stand before it."""
    return {str(node.name): node for node in layers_of(model.graph)}


def find_layers(model: Model) -> tuple[tuple[Layer, ...], tuple[NotLayer, ...]]:
    """Describe the layers of a model and say why every other operator is none.

    Returns
    -------
    layers
        One entry a layer, in order of execution. Numbers that depend on a symbolic dimension are
        None.
    others
        One entry for every other operator of the main graph, and for every other product in the
        body of a loop.
    """
    layers: list[Layer] = []
    others: list[NotLayer] = []
    found = set(layers_of(model.graph))
    loops = {inner: node for node in model.graph for inner in loop_body(node) or ()}
    for node in all_nodes(model.graph):
        if node in found:
            layers.append(_describe_step(node, loops[node]) if node in loops else _describe(node))
        elif node not in loops or node.op_type in _COMPUTING:
            reason = _reason(node)
            others.append(NotLayer(str(node.name), node.op_type, reason, reason not in _NO_WORK))
    return tuple(layers), tuple(others)


def quantized_precision(node: ir.Node) -> Precision | None:
    """Precision of a layer of a quantized model, None where weights or activations are float."""
    index = weight_input(node)
    if index is None:
        return None
    forms: list[Activation] = []
    for value in (node.inputs[index], node.inputs[1 - index]):
        producer = None if value is None else value.producer()
        # Moves between the quantizer and the layer leave the width as it is.
        while producer is not None and producer.op_type != "DequantizeLinear":
            before = producer.inputs[0] if producer.inputs else None
            producer = None if before is None else before.producer()
        form = None if producer is None else _dequantized(producer)
        if form is None:
            return None
        forms.append(form)
    return Precision(forms[0].bits, forms[1].bits, forms[1].format)


def quantized_activation(value: ir.Value) -> Activation | None:
    """Form of the codes that a value of a quantized model holds; None where it is float."""
    producer = value.producer()
    # Moves and clamps may stand between the quantizer and who reads.
    while producer is not None and (is_move(producer) or is_clamp(producer)):
        before = producer.inputs[0]
        producer = None if before is None else before.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return _dequantized(producer)


def _dequantized(node: ir.Node) -> Activation | None:
    """Form of the codes that a DequantizeLinear reads; None for widths that are none."""
    codes = node.inputs[0]
    layout = None if codes is None else layout_of(codes.producer(), DECODE)
    if layout is not None:
        return layout.activation
    if codes is None or codes.dtype is None or codes.dtype.bitwidth not in BIT_WIDTHS:
        return None
    return Activation(codes.dtype.bitwidth)


def _shape(value: ir.Value | None) -> tuple[Dim, ...]:
    if value is None or value.shape is None:
        return ()
    # Shape inference numbers the sizes it does not know; that says nothing to a reader.
    names = [str(dim if isinstance(dim, int) else dim.value or "?") for dim in value.shape]
    return tuple(
        dim if isinstance(dim, int) else ("?" if name.startswith("unk__") else name)
        for dim, name in zip(value.shape, names, strict=True)
    )


def _reads_graph_input(value: ir.Value | None) -> bool:
    """Whether a value comes from inputs of the model, past operators without weights alone."""
    open_values, seen = [value], {value}
    while open_values:
        current = open_values.pop()
        if current is None or (producer := current.producer()) is None:
            continue  # an input, or a constant
        if producer.op_type in _COMPUTING:
            return False
        for entry in producer.inputs:
            if entry not in seen:
                seen.add(entry)
                open_values.append(entry)
    return any(entry is not None and entry.is_graph_input() for entry in seen)


def _number(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) else None


def _describe(node: ir.Node) -> Layer:
    index = weight_input(node)
    assert index is not None
    weights, data = node.inputs[index], node.inputs[1 - index]
    weight_shape = tuple(dim for dim in _shape(weights) if isinstance(dim, int))
    input_shape, output_shape = _shape(data), _shape(node.outputs[0])
    if node.op_type == "Conv":
        rank = len(weight_shape) - 2
        groups = attribute(node, "group", 1)
        spatial = output_shape[2:] if output_shape else ("?",) * rank
        return Layer(
            name=str(node.name),
            kind="conv",
            batch=_number(output_shape[0]) if output_shape else None,
            in_channels=weight_shape[1] * groups,
            out_channels=weight_shape[0],
            kernel=weight_shape[2:],
            output=tuple(map(_number, spatial)),
            stride=tuple(attribute(node, "strides", (1,) * rank)),
            dilation=tuple(attribute(node, "dilations", (1,) * rank)),
            groups=groups,
            reads_graph_input=_reads_graph_input(data),
            input_shape=input_shape,
            weight_shape=weight_shape,
            output_shape=output_shape,
        )
    axis = channel_axis(node, len(weight_shape))
    out_features = 1 if axis is None else weight_shape[axis]
    # Of the weights' two last axes one is the output's, the other is summed over.
    in_features = math.prod(weight_shape[-2:]) // max(out_features, 1)
    rows = 1 if output_shape or (data is not None and data.shape is not None) else None
    for dim in output_shape:
        number = _number(dim)
        rows = None if rows is None or number is None else rows * number
    return Layer(
        name=str(node.name),
        kind="matmul",
        batch=None if rows is None else rows // max(out_features, 1),
        in_channels=in_features,
        out_channels=out_features,
        reads_graph_input=_reads_graph_input(data),
        input_shape=input_shape,
        weight_shape=weight_shape,
        output_shape=output_shape,
    )


def _describe_step(node: ir.Node, loop: ir.Node) -> Layer:
    """A product of each step of a loop; matrices of several directions are groups."""
    index = weight_input(node)
    assert index is not None
    data, weights = node.inputs[1 - index], node.inputs[index]
    weight_shape = tuple(dim for dim in _shape(weights) if isinstance(dim, int))
    output_shape = _shape(node.outputs[0])
    axis = channel_axis(node, len(weight_shape))
    out_features = 1 if axis is None else weight_shape[axis]
    groups = math.prod(weight_shape[:-2])
    rows = [_number(dim) for dim in output_shape[:-1]] if axis is not None else []
    batch = None
    if output_shape and None not in rows:
        batch = math.prod(dim for dim in rows if dim is not None) // max(groups, 1)
    return Layer(
        name=str(node.name),
        kind="recurrent",
        batch=batch,
        in_channels=groups * (math.prod(weight_shape[-2:]) // max(out_features, 1)),
        out_channels=groups * out_features,
        groups=groups,
        steps=_steps(loop),
        input_shape=_shape(data),
        weight_shape=weight_shape,
        output_shape=output_shape,
    )


def _steps(loop: ir.Node) -> int | None:
    """How often the body of a Scan or Loop runs; None where that is known at run time only."""
    if loop.op_type == "Loop":
        trips = constant(loop.inputs[0])
        count = ENDLESS if trips is None else int(trips.item())
        return None if count >= ENDLESS else max(count, 0)
    scanned = attribute(loop, "num_scan_inputs")
    axes = attribute(loop, "scan_input_axes") or (0,) * scanned
    shape = _shape(loop.inputs[len(loop.inputs) - scanned])
    return _number(shape[axes[0]]) if shape else None


def _reason(node: ir.Node) -> str:
    if is_rotation(node):
        return "rotates activations by a Hadamard matrix: stays float"
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        if weight_input(node) is not None:
            return "a layer in a loop is a plain matrix product with its weights on the right"
        if constant(node.inputs[0]) is not None:
            return "its left operand is constant, its weights are computed"
        return "its weights are computed, not constant"
    if node.op_type in _RECURRENT:
        return "recurrent: what is no product in its steps stays float"
    if node.op_type in _OTHER_PRODUCTS:
        return f"{node.op_type} is not lowered to integers: its weights stay float"
    if any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values()):
        return "control flow: layers inside its bodies stay float"
    return _role(node)


_QUANTIZER = "quantizer"
_NO_FLOATS = "computes no floats: shapes, indices or masks"
_CARRIES = "carries values: works on codes as they are"
_CUTS = "cuts a range: bounds of the codes before it"
_NO_WORK = (_QUANTIZER, _NO_FLOATS, _CARRIES, _CUTS)


def _role(node: ir.Node) -> str:
    """What an operator without weights becomes where it stands between layers."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.domain == SOFT_EDGE_DOMAIN:
        return _QUANTIZER
    if not node.outputs or node.outputs[0].dtype not in (ir.DataType.FLOAT, None):
        return _NO_FLOATS
    if is_move(node):
        return _CARRIES
    if is_clamp(node):
        return _CUTS
    if is_arithmetic(node):
        return "no weights: integer arithmetic between layers"
    if is_elementwise(node):
        return "no weights: a table over codes between layers"
    return "no weights: stays float"
