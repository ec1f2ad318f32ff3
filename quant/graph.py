"""What the operators of an ONNX graph mean for quantization.

Five sorts: *layers* multiply by constant weights; *moves* carry values without computing;
*clamps* cut a range; *elementwise functions* map each value by itself (with scalar constants) and
become tables; *arithmetic* (sums, products and averages of activations) is exact in integers. All
else stays float.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from bitwright.quant.float_ops import Array
from bitwright.soft_edge import SoftEdge

__all__ = [
    "DECODE",
    "ENCODE",
    "ENDLESS",
    "ROTATION",
    "SOFT_EDGE_DOMAIN",
    "all_nodes",
    "attribute",
    "channel_axis",
    "clamp_bounds",
    "constant",
    "data_inputs",
    "elementwise_roots",
    "graph_of",
    "is_arithmetic",
    "is_clamp",
    "is_elementwise",
    "is_move",
    "is_quantizer",
    "is_rotation",
    "layers_of",
    "layout_of",
    "loop_body",
    "weight_input",
]

# Values are carried, none is computed; the named inputs hold data, the others shapes and indices.
_MOVES = frozenset(
    "DepthToSpace Dropout Expand Flatten Gather GlobalMaxPool Identity MaxPool Pad ReduceMax"
    " ReduceMin Reshape Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze".split()
)
_UNARY = frozenset(
    "Abs Celu Ceil Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu Log Mish Neg"
    " Reciprocal Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tanh"
    " ThresholdedRelu".split()
)
_BINARY = frozenset("Add Div Max Min Mul Pow PRelu Sub".split())
ENDLESS = 2**31 - 1
"""What exporters write for the trip count of a loop without a bound, or more."""

ROTATION: Final = "bitwright.rotation"
"""Mark, in the metadata of operators, of those that rotate activations in float32."""

SOFT_EDGE_DOMAIN: Final = "bitwright"
ENCODE: Final = "SoftEdgeEncode"
DECODE: Final = "SoftEdgeDecode"
"""The functions of :mod:`bitwright.quant.soft_edge_function`, which stay as they are."""

_AVERAGES = frozenset("AveragePool GlobalAveragePool ReduceMean ReduceSum".split())


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Value of an attribute, or the default where the node leaves it out."""
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def constant(value: ir.Value | None) -> Array | None:
    """Value of an initializer as an array, None for anything computed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def layout_of(node: ir.Node | None, operator: str) -> SoftEdge | None:
    """The layout of a node that is ``ENCODE`` or ``DECODE``; None for any other node."""
    if node is None or node.domain != SOFT_EDGE_DOMAIN or node.op_type != operator:
        return None
    return SoftEdge.parse(str(attribute(node, "layout", "")))


def is_quantizer(node: ir.Node) -> bool:
    """Whether a node makes codes of float values."""
    if node.domain == SOFT_EDGE_DOMAIN:
        return node.op_type == ENCODE
    return node.domain == "" and node.op_type == "QuantizeLinear"


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.is_graph_input()


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, or an initializer behind DequantizeLinear."""
    if value is None:
        return False
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return all(_is_constant(entry) for entry in producer.inputs)
    return _is_constant(value) and value.dtype == ir.DataType.FLOAT


def is_rotation(node: ir.Node) -> bool:
    """Whether the node is part of a rotation that :mod:`bitwright.quant.rotation` has written."""
    return ROTATION in node.metadata_props


def weight_input(node: ir.Node) -> int | None:
    """Index of the input that holds a layer's constant weights; None if the node is no layer."""
    if node.domain != "" or len(node.inputs) < 2 or node.inputs[0] is None or is_rotation(node):
        return None
    if node.op_type in ("Conv", "Gemm", "MatMul") and _is_weight(node.inputs[1]):
        return None if _is_weight(node.inputs[0]) else 1
    if node.op_type == "MatMul" and _is_weight(node.inputs[0]):
        return 0
    return None


def loop_body(node: ir.Node) -> ir.Graph | None:
    """The body of a Scan or Loop; None for any other node."""
    if node.domain != "" or node.op_type not in ("Scan", "Loop"):
        return None
    body: ir.Graph = node.attributes["body"].as_graph()
    return body


def graph_of(value: ir.Value) -> ir.Graph | ir.Function | None:
    """The graph that a value is computed in or enters."""
    node = value.producer()
    return value.graph if node is None else node.graph


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes in order of execution; in front of each Scan or Loop those of its body.

    Bodies of loops in loops, and those of If, are left out.
    """
    for node in graph:
        body = loop_body(node)
        if body is not None:
            yield from body
        yield node


def _is_plain_gemm(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or attribute(node, "transA", 0):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    factors = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    return factors == (1.0, 1.0) and (bias is None or (_is_weight(bias) and _rank(bias) == 1))


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)


def layers_of(graph: ir.Graph) -> list[ir.Node]:
    """Nodes that multiply by constant weights, in order of execution.

    In the body of a loop only matrix products with their weights on the right are layers, among
    them a Gemm that adds one constant a column, or nothing.
    """

    def is_layer(node: ir.Node) -> bool:
        index = weight_input(node)
        if index is None or node.graph is graph:
            return index is not None
        data = node.inputs[0]
        known = data is not None and data.shape is not None  # else its values cannot be collected
        return index == 1 and known and (node.op_type == "MatMul" or _is_plain_gemm(node))

    return [node for node in all_nodes(graph) if is_layer(node)]


def channel_axis(node: ir.Node, weight_rank: int) -> int | None:
    """Axis of the weights that runs over output channels; None where there is none (a vector)."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    if weight_rank < 2:
        return None
    return weight_rank - 1 if weight_input(node) == 1 else weight_rank - 2


def data_inputs(node: ir.Node) -> list[int]:
    """Indices of the inputs that carry data through a move, clamp, function or arithmetic node."""
    if node.op_type == "Concat" or node.op_type in _BINARY:
        return list(range(len(node.inputs)))
    return [0]


def is_move(node: ir.Node) -> bool:
    """Whether the node only carries values: quantization before and after it is the same."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Concat":
        return True
    if node.op_type == "Pad":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        fill = np.zeros(1) if value is None else constant(value)
        mode = attribute(node, "mode", "constant")
        return mode != "constant" or (fill is not None and not np.any(fill))
    if node.op_type == "MaxPool":
        return len([value for value in node.outputs if value.name]) == 1
    if node.op_type == "Resize":
        nearest = attribute(node, "mode", "nearest") == "nearest"
        crop = attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize"
        return nearest and not crop
    if node.op_type == "Dropout":
        training = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        return len(node.outputs) == 1 and (training is None or not np.any(training))
    return node.op_type in _MOVES and not _is_constant(node.inputs[0])


def clamp_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Bounds of a Relu or Clip; None for any other node or bounds that are computed."""
    if node.domain != "":
        return None
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    bounds = [-np.inf, np.inf]
    for index in (1, 2):
        if len(node.inputs) > index and node.inputs[index] is not None:
            bound = constant(node.inputs[index])
            if bound is None or bound.size != 1:
                return None
            bounds[index - 1] = float(bound.item())
    return bounds[0], bounds[1]


def is_clamp(node: ir.Node) -> bool:
    """Whether the node is a Relu or a Clip with constant bounds."""
    return clamp_bounds(node) is not None


def is_arithmetic(node: ir.Node) -> bool:
    """Whether the node adds, multiplies or averages activations (not one value by itself)."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type in ("Add", "Sub", "Mul"):
        return all(value is not None for value in node.inputs)
    if node.op_type in ("ReduceMean", "ReduceSum"):
        return len(node.inputs) < 2 or node.inputs[1] is None or _is_constant(node.inputs[1])
    return node.op_type in _AVERAGES


def is_elementwise(node: ir.Node) -> bool:
    """Whether the operator maps values one by one (with scalars where it takes two)."""
    return node.domain == "" and node.op_type in _UNARY | _BINARY


def _is_scalar(value: ir.Value | None, rank: int) -> bool:
    """Whether a value is one constant number that leaves the shape of a partner of ``rank``."""
    array = constant(value)
    return array is not None and array.size == 1 and array.ndim <= rank


def elementwise_roots(
    graph: ir.Graph, *, excluded: Container[ir.Node] = ()
) -> dict[ir.Value, ir.Value]:
    """For each value that is a function of one other value, element by element, that value.

    ``x * sigmoid(x + 3)`` has the root ``x``; so has anything built from ``x``, scalar constants
    and elementwise operators (clamps included). A value that is no such function is missing.
    Shapes are the same along the way: only scalars are broadcast. Nodes in ``excluded`` end a
    chain.
    """
    roots: dict[ir.Value, ir.Value] = {}
    for node in graph:
        if node.domain != "" or len(node.outputs) != 1 or node in excluded:
            continue
        if is_clamp(node) or (node.op_type in _UNARY and len(node.inputs) == 1):
            operands = [node.inputs[0]]
        elif node.op_type in _BINARY:
            ranks = [
                0 if value is None or value.shape is None else len(value.shape)
                for value in node.inputs
                if constant(value) is None
            ]
            rank = max(ranks, default=0)
            operands = [value for value in node.inputs if not _is_scalar(value, rank)]
        else:
            continue
        if any(
            value is None or value.dtype != ir.DataType.FLOAT or _is_constant(value)
            for value in operands
        ):
            continue
        found = {roots.get(value, value) for value in operands if value is not None}
        if len(found) == 1:
            roots[node.outputs[0]] = found.pop()
    return roots
