"""Rewrite a float graph into QDQ form, given where quantizers go and what their scales are.

Quantizers stand as early as possible: directly behind the operator that computes (or its Relu or
Clip), in front of operators that only carry values (max pooling, reshape, concat, ...). Weights are
stored as codes, biases at the scale of the accumulator where int32 holds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bitwright.quant.float_ops import Array
from bitwright.quant.graph import (
    DECODE,
    ENCODE,
    SOFT_EDGE_DOMAIN,
    all_nodes,
    channel_axis,
    constant,
    data_inputs,
    graph_of,
    is_clamp,
    is_move,
    is_quantizer,
    loop_body,
    weight_input,
)
from bitwright.quant.observers import TensorQuantization, quantize_weights
from bitwright.quant.placement import Placement
from bitwright.quant.prepare import add_initializer
from bitwright.quant.refine import LayerChoice
from bitwright.quant.soft_edge_nodes import (
    decode_attributes,
    encode_attributes,
    soft_edge_functions,
)
from bitwright.soft_edge import SoftEdge
from bitwright.vocabulary import Activation, Precision, PrecisionPlan

__all__ = [
    "Emitter",
    "LayerCodes",
    "LayerConstants",
    "LayerSummary",
    "TensorSummary",
    "bias_input",
    "layer_codes",
]

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One quantized activation tensor.

    Attributes
    ----------
    name
        The tensor, named as in the float model.
    quantization
        Its scale, zero point and type.
    minimum, maximum
        Extremes of the calibration data.
    sqnr_db
        Signal to quantization noise ratio over the calibration data, from the histogram.
    """

    name: str
    quantization: TensorQuantization
    minimum: float
    maximum: float
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """What quantization did to one layer.

    Attributes
    ----------
    activation
        The layer's data input.
    weight_sqnr_db
        Signal to quantization noise ratio of the weights.
    weight_clip
        Largest weight that is kept, relative to the largest there is (1.0: nothing is clipped);
        the mean over channels.
    weight_count, weight_bytes
        Number of weights, and the bytes they take: ceil(bits * n / 8).
    bias
        ``int32``, ``float32`` where int32 would overflow, or "" without bias.
    """

    name: str
    operator: str
    precision: Precision
    activation: TensorSummary
    weight_sqnr_db: float
    weight_clip: float
    weight_count: int
    weight_bytes: int
    bias: str


def _code_dtype(quantization: TensorQuantization) -> np.dtype[Any]:
    kind = "int" if quantization.signed else "uint"
    if quantization.bits < 8:
        narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, f"{kind}{quantization.bits}"))
        return narrow
    return np.dtype(f"{kind}{quantization.bits}")


class Emitter:
    """Inserts the quantizers; see the module's docstring for the rules."""

    def __init__(
        self,
        model: ir.Model,
        placement: Placement,
        plan: PrecisionPlan,
        chosen: dict[tuple[ir.Value, Activation], TensorSummary],
        choices: Mapping[str, LayerChoice],
        per_channel: bool,
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._placement = placement
        self._plan = plan
        self._chosen = chosen
        self._choices = choices
        self._per_channel = per_channel
        self._current = model.graph  # or the body of a loop
        self._placed: dict[tuple[ir.Graph, ir.Value, TensorQuantization], ir.Value] = {}
        self._clones: dict[tuple[ir.Node, TensorQuantization], ir.Node] = {}
        self._integer: set[ir.Node] = set()
        self.elementwise: dict[str, TensorSummary] = {}
        self.scan_inputs: dict[str, TensorSummary] = {}
        self.layers: list[LayerSummary] = []

    def run(self) -> None:
        """Rewrite the graph in place."""
        placement = self._placement
        nodes = list(all_nodes(self._graph))
        # Tables first: which nodes belong to one depends on the graph as it was.
        tables = {
            value: root for value, _ in self._chosen for value, root in self._tables_behind(value)
        }
        inside: dict[ir.Node, ir.Value] = {}
        for value, root in tables.items():
            for node in self._chain(value, root):
                inside[node] = root
        for node in nodes:
            assert isinstance(node.graph, ir.Graph)
            self._current = node.graph
            if node in placement.layers:
                self._layer(node)
            elif node in inside:
                self._integer.add(node)
                root = inside[node]
                for index, operand in enumerate(node.inputs):
                    if operand is root:
                        node.replace_input_with(index, self._elementwise(root, node))
            elif placement.is_integer_arithmetic(node):
                self._integer.add(node)
                for index in data_inputs(node):
                    operand = node.inputs[index]
                    assert operand is not None
                    if constant(operand) is not None:
                        node.replace_input_with(index, self._constant(operand, node))
                    else:
                        node.replace_input_with(index, self._elementwise(operand, node))
            elif node in placement.biases:
                self._integer.add(node)
            elif node in placement.scan_inputs:
                self._scan(node)
            elif (data := placement.rotated(node)) is not None and placement.in_integers(data):
                node.replace_input_with(0, self._elementwise(data, node))
            self._leaving(node)

    def _scan(self, node: ir.Node) -> None:
        """Quantize what a selective scan reads, in front of it."""
        for index, form in self._placement.scan_inputs[node].items():
            value = node.inputs[index]
            assert value is not None
            entry = self._chosen[value, form]
            self.scan_inputs[entry.name] = entry
            node.replace_input_with(index, self._place(value, entry.quantization))

    def _leaving(self, node: ir.Node) -> None:
        """Quantize what leaves the body of a loop in fixed point."""
        body = loop_body(node)
        for number, value in enumerate(body.outputs if body is not None else ()):
            if value in self._placement.leaving:
                assert body is not None
                self._current = body
                entry = self._chosen[value, Activation(self._plan.loop_bits)]
                body.outputs[number] = self._place(value, entry.quantization)

    def float_nodes(self) -> list[ir.Node]:
        """Nodes that neither run in integers nor only carry or clamp values between those."""
        fixed = {graph_of(value) for value in self._placement.leaving}
        return [
            node
            for node in all_nodes(self._graph)
            if (node.graph is self._graph or node.graph in fixed)
            and loop_body(node) not in fixed
            and node not in self._placement.layers
            and node not in self._integer
            and not is_quantizer(node)
            and node.op_type != "DequantizeLinear"
            and not self._on_integer_path(node)
            and any(value.dtype == ir.DataType.FLOAT for value in node.outputs)
        ]

    def _on_integer_path(self, node: ir.Node) -> bool:
        """Moves behind a quantizer, and clamps between a computation and its quantizer."""
        if is_move(node):
            value = node.inputs[0]
            producer = None if value is None else value.producer()
            return producer is not None and (
                producer.op_type == "DequantizeLinear" or self._on_integer_path(producer)
            )
        return is_clamp(node) and any(is_quantizer(use.node) for use in node.outputs[0].uses())

    def _tables_behind(self, value: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Tables whose result is quantized for ``value``, in front of the moves before it."""
        root = self._placement.table_root(value)
        if root is not None:
            return [(value, root)]
        node = value.producer()
        if node is None or not (self._placement.is_hoistable(node) or is_clamp(node)):
            return []
        operands = self._placement.operands(node)
        return [entry for operand in operands for entry in self._tables_behind(operand)]

    def _chain(self, value: ir.Value, root: ir.Value) -> list[ir.Node]:
        pending: list[ir.Value] = [value]
        nodes: dict[ir.Node, None] = {}
        while pending:
            current = pending.pop()
            node = current.producer()
            if current is root or node is None or node in nodes:
                continue
            nodes[node] = None
            pending.extend(self._placement.operands(node))
        return list(nodes)

    # -- activations ---------------------------------------------------------------------------

    def _elementwise(self, value: ir.Value, user: ir.Node) -> ir.Value:
        entry = self._chosen[value, self._placement.elementwise(user, self._plan)]
        self.elementwise[f"{entry.name} {entry.quantization}"] = entry
        return self._place(value, entry.quantization)

    def _place(self, value: ir.Value, quantization: TensorQuantization) -> ir.Value:
        """Return ``value`` quantized and dequantized, the quantizer standing as early as it can."""
        key = (self._current, value, quantization)
        if key not in self._placed:
            node = value.producer()
            if node is not None and node.graph is self._current and self._moves_up(node):
                clone = self._clone(node, quantization)
                result = clone.outputs[value.index() or 0]
                if node.op_type == "Clip":  # its bounds need not be values of codes
                    result = self._quantizer(result, quantization)
                self._placed[key] = result
            else:
                self._placed[key] = self._quantizer(value, quantization)
        return self._placed[key]

    def _moves_up(self, node: ir.Node) -> bool:
        """Whether the quantizer goes in front of the node: a move, or clamps with a move above."""
        while is_clamp(node):
            above = node.inputs[0]
            producer = None if above is None else above.producer()
            if producer is None or (above is not None and self._placement.table_root(above)):
                return False
            if producer.graph is not self._current:
                return False
            node = producer
        return self._placement.is_hoistable(node)

    def _clone(self, node: ir.Node, quantization: TensorQuantization) -> ir.Node:
        """Repeat a move behind the quantizer; the original goes when nobody reads it any more."""
        key = (node, quantization)
        if key in self._clones:
            return self._clones[key]
        inputs = list(node.inputs)
        for index in data_inputs(node):
            operand = inputs[index]
            assert operand is not None
            if constant(operand) is not None:
                inputs[index] = self._quantized_constant(operand, quantization)
            else:
                inputs[index] = self._place(operand, quantization)
        clone = ir.node(
            node.op_type,
            inputs,
            attributes={name: attr.value for name, attr in node.attributes.items()},
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for old, new in zip(node.outputs, clone.outputs, strict=True):
            new.name = f"{old.name}_dequantized"
            new.type, new.shape = old.type, old.shape
        self._current.insert_after(node, clone)
        self._clones[key] = clone
        return clone

    def _quantizer(self, value: ir.Value, quantization: TensorQuantization) -> ir.Value:
        if quantization.layout is not None:
            return self._encoder(value, quantization, quantization.layout)
        label = f"{value.name}_{quantization}"
        scale = add_initializer(self._graph, f"{label}_scale", np.float32(quantization.scale))
        zero = np.array(quantization.zero_point, _code_dtype(quantization))
        zero_point = add_initializer(self._graph, f"{label}_zero_point", ir.tensor(zero))
        quantize = ir.node(
            "QuantizeLinear", [value, scale, zero_point], name=f"{value.name}_QuantizeLinear"
        )
        codes = quantize.outputs[0]
        codes.name, codes.shape = f"{value.name}_codes", value.shape
        codes.type = ir.TensorType(ir.DataType.from_numpy(zero.dtype))
        dequantize = self._dequantize(codes, scale, zero_point, f"{value.name}_dequantized")
        self._insert_behind(value, [quantize, dequantize])
        return dequantize.outputs[0]

    def _encoder(
        self, value: ir.Value, quantization: TensorQuantization, layout: SoftEdge
    ) -> ir.Value:
        """Return ``value`` encoded by a layout, decoded and dequantized."""
        self._add_functions()
        label = f"{value.name}_{quantization}"
        step = add_initializer(self._graph, f"{label}_step", np.float32(quantization.scale))
        zero = add_initializer(self._graph, f"{label}_zero_point", np.array(0, np.int16))
        encode = ir.node(
            ENCODE,
            [value, step],
            encode_attributes(layout),
            domain=SOFT_EDGE_DOMAIN,
            name=f"{label}_{ENCODE}",
        )
        codes = encode.outputs[0]
        decode = ir.node(
            DECODE,
            [codes],
            decode_attributes(layout),
            domain=SOFT_EDGE_DOMAIN,
            name=f"{label}_{DECODE}",
        )
        steps = decode.outputs[0]
        codes.name, steps.name = f"{label}_codes", f"{label}_steps"
        codes.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(layout.dtype)))
        steps.type = ir.TensorType(ir.DataType.INT16)
        codes.shape = steps.shape = value.shape
        dequantize = self._dequantize(steps, step, zero, f"{label}_dequantized")
        self._insert_behind(value, [encode, decode, dequantize])
        return dequantize.outputs[0]

    def _insert_behind(self, value: ir.Value, nodes: list[ir.Node]) -> None:
        producer, graph = value.producer(), self._current
        if producer is None or producer.graph is not graph:
            graph.insert_before(graph[0], nodes)
        else:
            graph.insert_after(producer, nodes)

    def _add_functions(self) -> None:
        """Have the model carry the functions that encode and decode."""
        if SOFT_EDGE_DOMAIN in self._model.opset_imports:
            return
        self._model.opset_imports[SOFT_EDGE_DOMAIN] = 1
        for proto in soft_edge_functions(self._model.opset_imports[""]):
            function = ir.serde.deserialize_function(proto)
            self._model.functions[function.identifier()] = function

    @staticmethod
    def _dequantize(
        codes: ir.Value, scale: ir.Value, zero_point: ir.Value, name: str, axis: int | None = None
    ) -> ir.Node:
        node = ir.node(
            "DequantizeLinear",
            [codes, scale, zero_point],
            attributes={} if axis is None else {"axis": axis},
            name=f"{name}_DequantizeLinear",
        )
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = codes.shape
        return node

    # -- constants -----------------------------------------------------------------------------

    def _stored(
        self,
        user: ir.Node,
        name: str,
        codes: Array,
        scale: npt.NDArray[np.float32],
        axis: int | None = None,
    ) -> ir.Value:
        """Store integer codes with scale and zero point 0; return them dequantized."""
        value = add_initializer(self._graph, name, ir.tensor(codes))
        scale_value = add_initializer(self._graph, f"{name}_scale", np.asarray(scale))
        zero = np.zeros(scale.shape, codes.dtype)
        zero_value = add_initializer(self._graph, f"{name}_zero_point", ir.tensor(zero))
        node = self._dequantize(value, scale_value, zero_value, f"{name}_dequantized", axis)
        self._current.insert_before(user, node)
        return node.outputs[0]

    def _constant(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """A constant operand of integer arithmetic, at the elementwise bits, unclipped."""
        array = constant(value)
        assert array is not None
        bits = self._placement.elementwise(user, self._plan).bits
        codes, scale = quantize_weights(array, bits, axis=None)
        return self._stored(user, f"{value.name}_codes", codes.astype(f"int{bits}"), scale)

    def _quantized_constant(self, value: ir.Value, quantization: TensorQuantization) -> ir.Value:
        """A constant that is concatenated to quantized values, in their codes."""
        key = (self._current, value, quantization)
        if key not in self._placed:
            self._placed[key] = self._quantizer(value, quantization)
        return self._placed[key]

    def _layer(self, node: ir.Node) -> None:
        index = weight_input(node)
        assert index is not None
        name = str(node.name)
        precision = self._plan.layers[name]
        data = self._placement.layer_input(node)
        entry = self._chosen[data, precision.activation]
        source = LayerConstants.of(node, self._placement)
        weights = source.weights
        found = layer_codes(
            source,
            precision,
            entry.quantization.scale,
            self._choices.get(name, LayerChoice()),
            per_channel=self._per_channel,
        )
        axis, scales = found.axis, found.weight_scales
        node.replace_input_with(1 - index, self._place(data, entry.quantization))
        dtype = _code_dtype(TensorQuantization(1.0, 0, precision.weight_bits, signed=True))
        stored = self._stored(
            node, f"{name}.weight_codes", found.weight_codes.astype(dtype), scales, axis
        )
        node.replace_input_with(index, stored)
        kept = self._bias(node, found)
        rows = np.moveaxis(weights, axis or 0, 0).reshape(scales.size, -1).astype(np.float64)
        code_rows = np.moveaxis(found.weight_codes, axis or 0, 0).reshape(scales.size, -1)
        limits = scales.reshape(-1).astype(np.float64) * ((1 << (precision.weight_bits - 1)) - 1)
        peaks = np.maximum(np.abs(rows).max(axis=1, initial=0.0), 1e-300)
        self.layers.append(
            LayerSummary(
                name,
                node.op_type,
                precision,
                entry,
                _sqnr_db(rows, code_rows * scales.reshape(-1, 1).astype(np.float64)),
                float(np.minimum(limits / peaks, 1.0).mean()),
                weights.size,
                -(-precision.weight_bits * weights.size // 8),
                kept,
            )
        )

    def _bias(self, node: ir.Node, found: LayerCodes) -> str:
        """Write the bias of a layer; return how it is kept."""
        if found.bias is None:
            return ""
        user, index = bias_input(node, self._placement)
        if len(user.inputs) <= index:
            user.resize_inputs(index + 1)
        if found.bias_codes is None:
            before = constant(user.inputs[index])
            if before is None or not np.array_equal(found.bias, before):
                value = add_initializer(self._graph, f"{node.name}.shifted_bias", found.bias)
                user.replace_input_with(index, value)
            return "float32"
        scale = found.bias_scales
        axis = None if scale.ndim == 0 else found.bias.ndim - 1
        name = f"{node.name}.bias_codes"
        stored = self._stored(user, name, found.bias_codes, scale, axis)
        user.replace_input_with(index, stored)
        return "int32"


@dataclass(frozen=True, slots=True)
class LayerCodes:
    """The constants of a layer, quantized.

    Attributes
    ----------
    weight_codes
        Integers, in the shape of the weights.
    weight_scales
        float32, one an output channel or one for all.
    axis
        Axis of the weights that runs over output channels; None where there is one scale.
    bias
        float32, with its shift; None without bias.
    bias_codes
        int32 in the shape of ``bias``, at the scale of the accumulator (``bias_scales``); None
        where int32 cannot hold them, and the bias stays float.
    bias_scales
        Activation scale times ``weight_scales``.
    """

    weight_codes: npt.NDArray[np.integer[Any]]
    weight_scales: npt.NDArray[np.float32]
    axis: int | None
    bias: npt.NDArray[np.float32] | None
    bias_codes: npt.NDArray[np.int32] | None
    bias_scales: npt.NDArray[np.float32]

    def dequantized_weights(self) -> npt.NDArray[np.float32]:
        """Weights as DequantizeLinear gives them."""
        shape = [1] * self.weight_codes.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        codes = self.weight_codes.astype(np.float32)
        codes *= self.weight_scales.reshape(shape) if self.axis is not None else self.weight_scales
        return codes

    def dequantized_bias(self) -> npt.NDArray[np.float32] | None:
        """Bias as DequantizeLinear gives it; None without bias."""
        if self.bias_codes is None:
            return self.bias
        return self.bias_codes.astype(np.float32) * self.bias_scales


def bias_input(node: ir.Node, placement: Placement) -> tuple[ir.Node, int]:
    """Node and index of the input that holds, or would hold, the bias of a layer."""
    for addition, layer in placement.biases.items():
        if layer is node:
            return addition, 0 if constant(addition.inputs[0]) is not None else 1
    return node, 2


@dataclass(frozen=True, slots=True)
class LayerConstants:
    """The constants of a float layer.

    Attributes
    ----------
    weights
        float32, as they stand in the model.
    axis
        Axis of the weights that runs over output channels; None where there is none.
    bias
        float32; None without one, or where it is computed.
    shiftable
        Whether the layer has, or can be given, a constant bias.
    """

    weights: npt.NDArray[np.float32]
    axis: int | None
    bias: npt.NDArray[np.float32] | None
    shiftable: bool

    @classmethod
    def of(cls, node: ir.Node, placement: Placement) -> LayerConstants:
        """Read the constants of a layer of the float graph."""
        index = weight_input(node)
        assert index is not None
        weights = constant(node.inputs[index])
        assert weights is not None
        user, position = bias_input(node, placement)
        bias = constant(user.inputs[position]) if len(user.inputs) > position else None
        axis = channel_axis(node, weights.ndim)
        return cls(weights, axis, bias, placement.has_bias(node))


def layer_codes(
    layer: LayerConstants,
    precision: Precision,
    activation_scale: float,
    choice: LayerChoice,
    *,
    per_channel: bool,
) -> LayerCodes:
    """Quantize the constants of a layer.

    Parameters
    ----------
    layer
        The constants.
    precision
        Its precision.
    activation_scale
        The scale of its data input.
    choice
        What refinement chose for it.
    per_channel
        Whether output channels have weight scales of their own.
    """
    axis = layer.axis if per_channel else None
    codes, scales = choice.weight_codes, choice.weight_scales
    if codes is None or scales is None:
        codes, scales = quantize_weights(layer.weights, precision.weight_bits, axis=axis)
    bias, shift = layer.bias, choice.bias_shift
    if shift is not None:
        if bias is not None:
            bias = (bias + shift).astype(np.float32)
        elif layer.shiftable:
            bias = shift
    if axis is not None and precision.activation_bits <= 8 and bias is not None:
        codes, scales = _fit_bias(
            layer.weights, codes, scales, axis, precision.weight_bits, activation_scale, bias
        )
    bias_scales = np.asarray(np.float32(activation_scale) * scales)
    bias_codes = None
    if bias is not None:
        exact = np.rint(bias.astype(np.float64) / bias_scales.astype(np.float64))
        if np.abs(exact).max(initial=0.0) <= _INT32_MAX:
            bias_codes = exact.astype(np.int32)
    return LayerCodes(codes, scales, axis, bias, bias_codes, bias_scales)


def _sqnr_db(signal: Array, approximation: Array) -> float:
    error = float(np.square(signal.astype(np.float64) - approximation).sum())
    power = float(np.square(signal.astype(np.float64)).sum())
    if error == 0.0:
        return math.inf
    return 10.0 * math.log10(power / error) if power > 0.0 else -math.inf


def _fit_bias(
    weights: Array,
    codes: Array,
    scales: npt.NDArray[np.float32],
    axis: int,
    bits: int,
    activation_scale: float,
    bias: Array,
) -> tuple[Array, npt.NDArray[np.float32]]:
    """Raise the scales of channels whose weights are nothing beside their bias.

    In steps of such a tiny scale the bias would exceed int32, and one channel would keep the whole
    bias in float. With 2^30 steps to the bias, rounding the weights costs 2^-31 of it for each.
    """
    if bias.size != scales.size:
        return codes, scales
    least = np.abs(bias.reshape(-1).astype(np.float64)) / (activation_scale * 2.0**30)
    raised = np.maximum(scales, least.astype(np.float32))
    if np.array_equal(raised, scales):
        return codes, scales
    shape = [1] * weights.ndim
    shape[axis] = -1
    limit = 1 << (bits - 1)
    coarse = np.clip(np.rint(weights / raised.reshape(shape)), -limit, limit - 1)
    changed = (raised > scales).reshape(shape)
    return np.where(changed, coarse, codes).astype(codes.dtype), raised
