"""Recurrent networks as ONNX models, with random weights (drawn from a fixed seed).

Nothing here is trained: these measure speed, memory and compilation. The full-size speech model of
MOHAQ (arXiv 2108.01192) has 4 bidirectional SRU layers of 550 units a direction, projections to 256
between them, and 1,904 outputs. The paper does not say what its highway connection takes where
input and state differ in size; here it is the transformed input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitwright.quant.load import load

_OPSET = 21


class _Graph:
    """Collects nodes and weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        """Add uniform random weights; their scale is that of a linear layer by default."""
        bound = scale or 1.0 / np.sqrt(shape[0])
        values = self._random.uniform(-bound, bound, shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, name: str, values: Any) -> str:
        """Add a constant."""
        self.weights.append(numpy_helper.from_array(np.array(values), name))
        return name

    def node(
        self, op: str, inputs: Sequence[str], name: str, outputs: int = 1, **attrs: Any
    ) -> str:
        """Add a node; the name of its only output, or of the first of several, is its own."""
        names = [name] if outputs == 1 else [f"{name}.{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, **attrs))
        return name

    def model(
        self, inputs: Sequence[Any], outputs: Sequence[Any], name: str = "model"
    ) -> onnx.ModelProto:
        """Make the model."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.weights)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=10)


def _tensor(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _sru_step(hidden: int) -> onnx.GraphProto:
    """One step of an SRU: candidate and two gates come transformed, with their biases."""
    make = helper.make_node
    nodes = [
        make("Mul", ["vf", "c"], ["vfc"]),
        make("Add", ["uf", "vfc"], ["f_sum"]),
        make("Sigmoid", ["f_sum"], ["f"]),
        make("Mul", ["vr", "c"], ["vrc"]),
        make("Add", ["ur", "vrc"], ["r_sum"]),
        make("Sigmoid", ["r_sum"], ["r"]),
        make("Sub", ["c", "ux"], ["c_less"]),
        make("Mul", ["f", "c_less"], ["f_part"]),
        make("Add", ["ux", "f_part"], ["c_new"]),
        make("Tanh", ["c_new"], ["g"]),
        make("Sub", ["g", "ux"], ["g_less"]),
        make("Mul", ["r", "g_less"], ["r_part"]),
        make("Add", ["ux", "r_part"], ["h"]),
    ]
    inputs = [_tensor(name, "batch", hidden) for name in ("c", "ux", "uf", "ur")]
    outputs = [_tensor(name, "batch", hidden) for name in ("c_new", "h")]
    return helper.make_graph(nodes, "sru_step", inputs, outputs)


def _renamed(body: onnx.GraphProto, captured: dict[str, str]) -> onnx.GraphProto:
    """A body that reads values of other names in the graph around it."""
    copy = onnx.GraphProto()
    copy.CopyFrom(body)
    for node in copy.node:
        for place, name in enumerate(node.input):
            node.input[place] = captured.get(name, name)
    return copy


def _sru(graph: _Graph, x: str, name: str, inputs: int, hidden: int) -> str:
    """Add a bidirectional SRU layer; its output has ``2 * hidden`` features."""
    weights = graph.weight(f"{name}.W", inputs, 6 * hidden)
    product = graph.node("MatMul", [x, weights], name)
    bias = graph.weight(f"{name}.b", 6 * hidden, scale=0.1)
    total = graph.node("Add", [product, bias], f"{name}.sum")
    parts = graph.node("Split", [total], f"{name}.part", 6, axis=2, num_outputs=6)
    first = graph.node("Gather", [parts + ".0", graph.constant(f"{name}.zero", 0)], f"{name}.first")
    start = graph.node("Mul", [first, graph.constant(f"{name}.none", np.float32(0))], f"{name}.c0")
    results = []
    for direction in range(2):
        captured = {
            gate: graph.weight(f"{name}.{gate}{direction}", hidden, scale=0.5)
            for gate in ("vf", "vr")
        }
        sequences = [f"{parts}.{3 * direction + number}" for number in range(3)]
        scan = graph.node(
            "Scan",
            [start, *sequences],
            f"{name}.scan{direction}",
            2,
            body=_renamed(_sru_step(hidden), captured),
            num_scan_inputs=3,
            scan_input_directions=[direction] * 3,
            scan_output_directions=[direction],
        )
        results.append(f"{scan}.1")
    return graph.node("Concat", results, f"{name}.out", axis=2)


def sru_network(
    inputs: int = 23, hidden: int = 550, projection: int = 256, outputs: int = 1904, layers: int = 4
) -> onnx.ModelProto:
    """Build MOHAQ's speech model, by default in its full size (5.5 million weights).

    Its input is ``x float32[time, batch, inputs]``, its output ``y float32[time, batch, outputs]``;
    time and batch are symbolic. The layers are called as in the paper: L0, Pr1, L1, ..., FC.
    """
    graph = _Graph()
    x, size = "x", inputs
    for number in range(layers):
        if number:
            weights = graph.weight(f"Pr{number}.W", size, projection)
            x, size = graph.node("MatMul", [x, weights], f"Pr{number}"), projection
        x, size = _sru(graph, x, f"L{number}", size, hidden), 2 * hidden
    x = graph.node("MatMul", [x, graph.weight("FC.W", size, outputs)], "FC")
    graph.node("Add", [x, graph.weight("FC.b", outputs, scale=0.1)], "y")
    return graph.model(
        [_tensor("x", "time", "batch", inputs)], [_tensor("y", "time", "batch", outputs)]
    )


def sru_scan(hidden: int = 550) -> onnx.ModelProto:
    """Build the recurrence of one direction alone: inputs ``ux, uf, ur [time, batch, hidden]``."""
    graph = _Graph()
    captured = {gate: graph.weight(gate + "0", hidden, scale=0.5) for gate in ("vf", "vr")}
    names = ("ux", "uf", "ur")
    graph.node(
        "Scan",
        ["c0", *names],
        "scan",
        2,
        body=_renamed(_sru_step(hidden), captured),
        num_scan_inputs=3,
    )
    return graph.model(
        [_tensor("c0", "batch", hidden), *(_tensor(n, "time", "batch", hidden) for n in names)],
        [_tensor("scan.0", "batch", hidden), _tensor("scan.1", "time", "batch", hidden)],
    )


def selective_scan(channels: int = 1536, state: int = 16) -> onnx.ModelProto:
    """Build Mamba's selective scan: ``delta, u [time, channels]``, ``B, C [time, state]``."""
    graph = _Graph()
    decay = -np.arange(1, state + 1, dtype=np.float32)
    graph.constant("A", np.tile(decay, (channels, 1)))
    graph.weight("D", channels, scale=1.0)
    make = helper.make_node
    body_nodes = [
        make("Unsqueeze", ["delta_t", "last"], ["delta_c"]),
        make("Mul", ["delta_c", "A"], ["delta_a"]),
        make("Exp", ["delta_a"], ["decay"]),
        make("Mul", ["delta_t", "u_t"], ["delta_u"]),
        make("Unsqueeze", ["delta_u", "last"], ["delta_u_c"]),
        make("Mul", ["delta_u_c", "B_t"], ["input"]),
        make("Mul", ["decay", "h"], ["decayed"]),
        make("Add", ["decayed", "input"], ["h_new"]),
        make("Mul", ["h_new", "C_t"], ["weighted"]),
        make("ReduceSum", ["weighted", "last"], ["sum"], keepdims=0),
        make("Mul", ["u_t", "D"], ["skip"]),
        make("Add", ["sum", "skip"], ["y_t"]),
    ]
    graph.constant("last", np.array([1], np.int64))
    graph.constant("h0", np.zeros((channels, state), np.float32))
    body = helper.make_graph(
        body_nodes,
        "selective_scan_step",
        [
            _tensor("h", channels, state),
            _tensor("delta_t", channels),
            _tensor("u_t", channels),
            _tensor("B_t", state),
            _tensor("C_t", state),
        ],
        [_tensor("h_new", channels, state), _tensor("y_t", channels)],
    )
    names = ("delta", "u", "B", "C")
    graph.node("Scan", ["h0", *names], "scan", 2, body=body, num_scan_inputs=4)
    sizes = (channels, channels, state, state)
    return graph.model(
        [_tensor(name, "time", size) for name, size in zip(names, sizes, strict=True)],
        [_tensor("scan.0", channels, state), _tensor("scan.1", "time", channels)],
    )


def gated(
    operator: str, inputs: int, hidden: int, *, bidirectional: bool = False
) -> onnx.ModelProto:
    """Build one LSTM, GRU or RNN layer: input ``x float32[time, batch, inputs]``."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    directions = 2 if bidirectional else 1
    graph = _Graph()
    scale = 1.0 / float(np.sqrt(hidden))
    weights = [
        graph.weight("W", directions, gates * hidden, inputs, scale=scale),
        graph.weight("R", directions, gates * hidden, hidden, scale=scale),
        graph.weight("B", directions, 2 * gates * hidden, scale=scale),
    ]
    graph.node(
        operator,
        ["x", *weights],
        "y",
        hidden_size=hidden,
        direction="bidirectional" if bidirectional else "forward",
    )
    return graph.model(
        [_tensor("x", "time", "batch", inputs)],
        [_tensor("y", "time", directions, "batch", hidden)],
    )


def noise(model: onnx.ModelProto, **sizes: int) -> dict[str, NDArray[np.float32]]:
    """Random inputs for the given symbolic sizes; those called delta are positive."""
    generator = np.random.default_rng(1)
    found = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims]
        values = generator.standard_normal(shape).astype(np.float32)
        found[value.name] = np.log1p(np.exp(values - 2)) if value.name == "delta" else values
    return found


def quantized(
    model: onnx.ModelProto,
    *,
    weight_bits: int = 8,
    state: str = "int8",
    zero_point: int = 0,
    inputs: bool = True,
) -> onnx.ModelProto:
    """Write the recurrences of a model out, and quantize their products.

    Parameters
    ----------
    model
        A float model whose hidden states lie in (-1, 1).
    weight_bits
        2, 4, 8 or 16; one scale a column.
    state
        Type of the codes of the state; they cover (-1, 1).
    zero_point
        Of these.
    inputs
        Whether the products of the inputs are quantized too: 8 bits, from -4 to 4.
    """
    loaded = load(model).ir
    for node in list(loaded.graph.all_nodes()):
        if node.op_type != "MatMul":
            continue
        if "/recurrent" in str(node.name):
            low, high = np.iinfo(state).min, np.iinfo(state).max
            reach = max(high - zero_point, zero_point - low) if zero_point else high
            _quantize_product(loaded.graph, node, weight_bits, state, zero_point, 1.0 / reach)
        elif inputs:
            _quantize_product(loaded.graph, node, 8, "int8", 0, 4.0 / 127)
    return ir.to_proto(loaded)


def _quantize_product(
    main: ir.Graph, node: ir.Node, bits: int, dtype: str, zero_point: int, scale: float
) -> None:
    """Put quantizers in front of a product; its weights become codes of the main graph."""
    graph, (data, weights) = node.graph, node.inputs
    assert isinstance(graph, ir.Graph)
    assert data is not None
    assert weights is not None
    assert weights.const_value is not None
    array = weights.const_value.numpy()

    def constant(word: str, values: NDArray[Any]) -> ir.Value:
        name = f"{node.name}/{word}"
        tensor = ir.tensor(values, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(values.shape)
        value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        main.register_initializer(value)
        return value

    most = 2 ** (bits - 1) - 1
    steps = (np.abs(array).max(axis=tuple(range(array.ndim - 1))) / most).astype(np.float32)
    codes = np.clip(np.rint(array / steps), -most - 1, most)
    storage = ml_dtypes.int4 if bits <= 4 else f"int{bits}"  # this operator set has no int2
    made = []

    def add(op: str, word: str, *inputs: ir.Value, **options: Any) -> ir.Value:
        value = ir.Value(name=f"{node.name}/{word}")
        made.append(ir.node(op, inputs, options, outputs=[value], name=value.name))
        return value

    parameters = (
        constant("data_scale", np.array(scale, np.float32)),
        constant("data_zero_point", np.array(zero_point, dtype)),
    )
    quantized = add("QuantizeLinear", "quantized", data, *parameters)
    node.replace_input_with(0, add("DequantizeLinear", "data", quantized, *parameters))
    stored = constant("codes", codes.astype(storage))
    column = constant("weight_scale", steps)
    axis = array.ndim - 1
    node.replace_input_with(1, add("DequantizeLinear", "weights", stored, column, axis=axis))
    graph.insert_before(node, made)
    if not weights.uses():
        del main.initializers[str(weights.name)]
