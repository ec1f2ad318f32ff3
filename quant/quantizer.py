"""Turn a float model into a standard QDQ model at the precision chosen for every layer.

Where quantizers go:

1. The data input of every layer is quantized at the layer's activation bits, its weights at its
   weight bits, its bias at the scale of the accumulator.
2. Sums, products and averages of activations, and elementwise functions, that lie between layers
   get their inputs quantized at the plan's elementwise bits, so that they run in integers (a
   function becomes a table over its input codes).
3. Quantizers stand as early as possible: directly behind the operator that computes (or its Relu
   or Clip), in front of operators that only carry values (max pooling, reshape, concat, ...).
4. Outputs of the model and all other operators stay float.

The result uses standard operators only: INT4 and INT16 need operator set 21, INT2 needs 25.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from bitwright.errors import ModelError, PlanError, UsageError
from bitwright.quant.calibrate import calibrate
from bitwright.quant.float_ops import Array
from bitwright.quant.graph import (
    channel_axis,
    constant,
    data_inputs,
    elementwise_roots,
    is_arithmetic,
    is_clamp,
    is_move,
    weight_input,
)
from bitwright.quant.layers import layer_nodes
from bitwright.quant.load import Model, convert_opset
from bitwright.quant.observers import (
    ClipMethod,
    Observer,
    TensorQuantization,
    choose_quantization,
    expected_sqnr_db,
    quantize_weights,
)
from bitwright.quant.prepare import add_initializer, prepare
from bitwright.quant.samples import ProgressCallback, Samples
from bitwright.vocabulary import Precision, PrecisionPlan

__all__ = ["LayerSummary", "Quantized", "TensorSummary", "fit_plan", "quantize_model"]

_INT2_OPSET = 25
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


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized model and what is worth knowing about it.

    Attributes
    ----------
    model
        The QDQ model.
    plan
        The plan it follows, complete with the hashes of the float model.
    layers
        One entry a layer, in order of execution.
    elementwise
        Activation tensors quantized for operators other than layers.
    float_operators
        Operators that stay float: name and operator type.
    notes
        What was changed on the way.
    """

    model: onnx.ModelProto
    plan: PrecisionPlan
    layers: tuple[LayerSummary, ...]
    elementwise: tuple[TensorSummary, ...]
    float_operators: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all quantized weights: the sum of ceil(bits * n / 8) over the layers."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def float_weight_bytes(self) -> int:
        """Bytes of the same weights in float32."""
        return sum(4 * layer.weight_count for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""

        def tensor(entry: TensorSummary) -> dict[str, Any]:
            quantization = entry.quantization
            return {
                "name": entry.name,
                "type": str(quantization),
                "scale": quantization.scale,
                "zero_point": quantization.zero_point,
                "minimum": entry.minimum,
                "maximum": entry.maximum,
                "clip": list(quantization.clip),
                "sqnr_db": entry.sqnr_db,
            }

        return {
            "plan": json.loads(self.plan.to_json()),
            "weight_bytes": self.weight_bytes,
            "float_weight_bytes": self.float_weight_bytes,
            "layers": [
                {
                    **asdict(layer),
                    "precision": str(layer.precision),
                    "activation": tensor(layer.activation),
                }
                for layer in self.layers
            ],
            "elementwise": [tensor(entry) for entry in self.elementwise],
            "float_operators": [list(entry) for entry in self.float_operators],
            "notes": list(self.notes),
        }


def fit_plan(model: Model, plan: PrecisionPlan | Precision, *, where: str = "plan") -> PrecisionPlan:
    """Complete a plan, or make a uniform one, for a model.

    Raises
    ------
    PlanError
        If the plan was made for another model, or layers are unknown or missing.
    """
    names = list(layer_nodes(model))
    if isinstance(plan, Precision):
        plan = PrecisionPlan(layers={name: plan for name in names})
    if plan.structure_hash is not None and plan.structure_hash != model.structure_hash:
        raise PlanError(
            f"was made for another model (structure {plan.structure_hash[:19]}..., this model has "
            f"{model.structure_hash[:19]}...)",
            where=where,
            fix="make a plan for this model, or remove structure_hash from the plan if the layer "
            "names are meant to carry over",
        )
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    if unknown := [name for name in plan.layers if name not in names]:
        raise PlanError(
            f"the model has no layer {unknown[0]!r}"
            + (f" ({len(unknown)} unknown layers in all)" if len(unknown) > 1 else ""),
            where=where,
            fix=f"its layers are: {known}; bitwright inspect prints them",
        )
    if missing := [name for name in names if name not in plan.layers]:
        raise PlanError(
            f"layer {missing[0]!r} has no precision"
            + (f" ({len(missing)} layers are missing in all)" if len(missing) > 1 else ""),
            where=where,
            fix=f"give every layer one; the model's layers are: {known}",
        )
    return PrecisionPlan(
        layers={name: plan.layers[name] for name in names},
        structure_hash=model.structure_hash,
        weights_hash=model.weights_hash,
        target=plan.target,
        elementwise_bits=plan.elementwise_bits,
    )


def quantize_model(
    model: Model,
    plan: PrecisionPlan,
    samples: Samples,
    *,
    clip: ClipMethod = "mmse",
    percentile: float = 99.99,
    per_channel: bool = True,
    asymmetric: bool = False,
    batch_size: int | None = None,
    progress: ProgressCallback | None = None,
) -> Quantized:
    """Quantize a loaded float model; the model is consumed.

    Parameters
    ----------
    model
        A float model from :func:`bitwright.quant.load.load`.
    plan
        A plan that :func:`fit_plan` has completed.
    samples
        Calibration data.
    clip, percentile, asymmetric
        How activations are clipped; see :func:`~bitwright.quant.observers.choose_quantization`.
        ``minmax`` leaves the weights unclipped too.
    per_channel
        Whether every output channel of a layer has a weight scale of its own.
    batch_size, progress
        See :func:`~bitwright.quant.calibrate.calibrate`.

    Raises
    ------
    ModelError
        If the model is quantized already or has no layers.
    DataError, RunError
        If calibration fails.
    """
    if model.is_quantized:
        raise ModelError(
            "is quantized already", where=model.source, fix="give the float model it was made from"
        )
    if not layer_nodes(model):
        raise ModelError(
            "has no layers to quantize: no Conv, Gemm or MatMul with constant weights",
            where=model.source,
            fix="bitwright inspect says why each operator is none",
        )
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch size {batch_size} is not positive")
    probe = Observer()
    choose_quantization(probe, 8, method=clip, percentile=percentile)  # refuse bad options early
    narrow = any(2 in (p.weight_bits, p.activation_bits) for p in plan.layers.values())
    if narrow and model.opset < _INT2_OPSET:
        model.ir = convert_opset(model.ir, _INT2_OPSET, model.source)
    prepare(model)
    analysis = _Analysis(model.graph)
    wanted = analysis.wanted(plan)
    observers = calibrate(
        model, [value for value, _ in wanted], samples, batch_size=batch_size, progress=progress
    )
    chosen: dict[tuple[ir.Value, int], TensorSummary] = {}
    for value, bits in wanted:
        observer = observers[str(value.name)]
        quantization = choose_quantization(
            observer, bits, method=clip, percentile=percentile, asymmetric=asymmetric
        )
        chosen[value, bits] = TensorSummary(
            str(value.name),
            quantization,
            observer.minimum,
            observer.maximum,
            expected_sqnr_db(observer, quantization),
        )
    method: ClipMethod = "minmax" if clip == "minmax" else "mmse"
    emitter = _Emitter(model.graph, analysis, plan, chosen, method, per_channel)
    layers = emitter.run()
    RemoveUnusedNodesPass()(model.ir)
    NameFixPass()(model.ir)
    model.ir.ir_version = max(model.ir.ir_version, 11 if model.opset >= _INT2_OPSET else 10)
    model.ir.producer_name = "bitwright"
    model.ir.metadata_props["bitwright.plan"] = plan.to_json()
    elementwise = {
        entry.name + str(bits): entry
        for (value, bits), entry in chosen.items()
        if value in emitter.elementwise_values
    }
    return Quantized(
        model.to_proto(),
        plan,
        tuple(layers),
        tuple(elementwise.values()),
        tuple((str(n.name), n.op_type) for n in emitter.float_nodes() if n.graph is not None),
        model.notes,
    )


class _Analysis:
    """Which operators of a float graph run in integers."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.layers = {node for node in graph if weight_input(node) is not None}
        self.biases = dict(self._find_biases())
        self.roots = elementwise_roots(graph, excluded=self.biases)
        self._leads_to_layer = self._backward()
        self._from_layer = self._forward()

    def _find_biases(self) -> Iterable[tuple[ir.Node, ir.Node]]:
        """Adds of a constant vector directly behind a MatMul, which are its bias."""
        for node in self.layers:
            uses = node.outputs[0].uses()
            if node.op_type != "MatMul" or weight_input(node) != 1:
                continue
            if len(uses) != 1 or node.outputs[0].is_graph_output():
                continue
            follower, index = next(iter(uses))
            weights = constant(node.inputs[1])
            if follower.op_type != "Add" or follower.domain != "" or weights is None:
                continue
            bias = constant(follower.inputs[1 - index])
            if (
                weights.ndim >= 2
                and bias is not None
                and bias.size == weights.shape[-1]
                and bias.shape[-1] == bias.size
                and bias.ndim <= len(node.outputs[0].shape or ())
            ):
                yield follower, node

    def _carries(self, node: ir.Node) -> bool:
        if node in self.biases or not node.outputs or node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        return (
            is_move(node)
            or is_clamp(node)
            or is_arithmetic(node)
            or (len(node.outputs) == 1 and node.outputs[0] in self.roots)
        )

    def _backward(self) -> set[ir.Value]:
        found: set[ir.Value] = set()
        for node in reversed(list(self.graph)):
            if node in self.layers:
                found.add(self.layer_input(node))
            elif self._carries(node) and any(value in found for value in node.outputs):
                found.update(v for v in self.operands(node))
        return found

    def _forward(self) -> set[ir.Value]:
        found: set[ir.Value] = set()
        for node in self.graph:
            computes = node in self.layers or node in self.biases
            if computes or (self._carries(node) and any(v in found for v in self.operands(node))):
                found.update(node.outputs)
        return found

    @staticmethod
    def layer_input(node: ir.Node) -> ir.Value:
        """The data input of a layer."""
        index = weight_input(node)
        assert index is not None
        value = node.inputs[1 - index]
        assert value is not None
        return value

    @staticmethod
    def operands(node: ir.Node) -> list[ir.Value]:
        """Inputs that carry data and are computed."""
        values = [node.inputs[index] for index in data_inputs(node)]
        return [v for v in values if v is not None and constant(v) is None]

    def in_integers(self, value: ir.Value) -> bool:
        """Whether a value lies between layers."""
        return value in self._leads_to_layer and value in self._from_layer

    def table_root(self, value: ir.Value) -> ir.Value | None:
        """The value that a table computes ``value`` from; None where there is no table.

        A chain of clamps alone needs no table: it narrows the range of the codes.
        """
        root = self.roots.get(value)
        if root is None or root not in self._from_layer or value not in self._leads_to_layer:
            return None
        pending, seen = [value], set()
        clamps_only = True
        while pending:
            current = pending.pop()
            if current is root or current in seen:
                continue
            seen.add(current)
            node = current.producer()
            assert node is not None
            clamps_only = clamps_only and is_clamp(node)
            pending.extend(self.operands(node))
        return None if clamps_only else root

    def is_integer_arithmetic(self, node: ir.Node) -> bool:
        """Whether a node adds, multiplies or averages activations between layers."""
        return (
            is_arithmetic(node)
            and node not in self.biases
            and node.outputs[0] not in self.roots
            and node.outputs[0].dtype == ir.DataType.FLOAT
            and self.in_integers(node.outputs[0])
        )

    def wanted(self, plan: PrecisionPlan) -> list[tuple[ir.Value, int]]:
        """Tensors to quantize, with their bits, in order of execution."""
        found: dict[tuple[ir.Value, int], None] = {}
        targets: list[ir.Value] = []
        for node in self.graph:
            if node in self.layers:
                value = self.layer_input(node)
                found[value, plan.layers[str(node.name)].activation_bits] = None
                targets.append(value)
            elif self.is_integer_arithmetic(node):
                for value in self.operands(node):
                    found[value, plan.elementwise_bits] = None
                    targets.append(value)
        # Quantizers move in front of operators that only carry values; tables may lie behind those.
        seen: set[ir.Value] = set()
        while targets:
            value = targets.pop()
            if value in seen:
                continue
            seen.add(value)
            root = self.table_root(value)
            if root is not None:
                found[root, plan.elementwise_bits] = None
                targets.append(root)
                continue
            node = value.producer()
            if node is not None and (self.is_hoistable(node) or is_clamp(node)):
                targets.extend(self.operands(node))
        return list(found)

    def is_hoistable(self, node: ir.Node) -> bool:
        """Whether a quantizer behind the node may stand in front of it instead."""
        return (
            is_move(node)
            and node.outputs[0].dtype == ir.DataType.FLOAT
            and all(attr.type != ir.AttributeType.GRAPH for attr in node.attributes.values())
        )


def _code_dtype(quantization: TensorQuantization) -> np.dtype[Any]:
    kind = "int" if quantization.signed else "uint"
    if quantization.bits < 8:
        return np.dtype(getattr(ml_dtypes, f"{kind}{quantization.bits}"))
    return np.dtype(f"{kind}{quantization.bits}")


class _Emitter:
    """Inserts the quantizers; see the module's docstring for the rules."""

    def __init__(
        self,
        graph: ir.Graph,
        analysis: _Analysis,
        plan: PrecisionPlan,
        chosen: dict[tuple[ir.Value, int], TensorSummary],
        weight_method: ClipMethod,
        per_channel: bool,
    ) -> None:
        self._graph = graph
        self._analysis = analysis
        self._plan = plan
        self._chosen = chosen
        self._method: ClipMethod = weight_method
        self._per_channel = per_channel
        self._placed: dict[tuple[ir.Value, TensorQuantization], ir.Value] = {}
        self._clones: dict[tuple[ir.Node, TensorQuantization], ir.Node] = {}
        self._integer: set[ir.Node] = set()
        self.elementwise_values: set[ir.Value] = set()

    def run(self) -> list[LayerSummary]:
        """Rewrite the graph in place."""
        analysis = self._analysis
        nodes = list(self._graph)
        # Tables first: which nodes belong to one depends on the graph as it was.
        tables = {
            value: root
            for value, _ in self._chosen
            for value, root in self._tables_behind(value)
        }
        inside: dict[ir.Node, ir.Value] = {}
        for value, root in tables.items():
            for node in self._chain(value, root):
                inside[node] = root
        summaries = []
        for node in nodes:
            if node in analysis.layers:
                summaries.append(self._layer(node))
            elif node in inside:
                self._integer.add(node)
                root = inside[node]
                for index, value in enumerate(node.inputs):
                    if value is root:
                        node.replace_input_with(index, self._elementwise(root))
            elif analysis.is_integer_arithmetic(node):
                self._integer.add(node)
                for index in data_inputs(node):
                    value = node.inputs[index]
                    assert value is not None
                    if constant(value) is not None:
                        node.replace_input_with(index, self._constant(value, node))
                    else:
                        node.replace_input_with(index, self._elementwise(value))
            elif node in analysis.biases:
                self._integer.add(node)
        return summaries

    def float_nodes(self) -> list[ir.Node]:
        """Nodes that neither run in integers nor only carry or clamp values between those."""
        quantizers = ("QuantizeLinear", "DequantizeLinear")
        return [
            node
            for node in self._graph
            if node not in self._analysis.layers
            and node not in self._integer
            and node.op_type not in quantizers
            and not (self._on_integer_path(node))
        ]

    def _on_integer_path(self, node: ir.Node) -> bool:
        """Moves behind a quantizer, and clamps between a computation and its quantizer."""
        if is_move(node):
            value = node.inputs[0]
            producer = None if value is None else value.producer()
            return producer is not None and (
                producer.op_type == "DequantizeLinear" or self._on_integer_path(producer)
            )
        return is_clamp(node) and any(
            use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()
        )

    def _tables_behind(self, value: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Tables whose result is quantized for ``value``, in front of the moves before it."""
        root = self._analysis.table_root(value)
        if root is not None:
            return [(value, root)]
        node = value.producer()
        if node is None or not (self._analysis.is_hoistable(node) or is_clamp(node)):
            return []
        operands = self._analysis.operands(node)
        return [entry for operand in operands for entry in self._tables_behind(operand)]

    def _chain(self, value: ir.Value, root: ir.Value) -> list[ir.Node]:
        pending, nodes = [value], dict.fromkeys(())  # type: ignore[var-annotated]
        while pending:
            current = pending.pop()
            node = current.producer()
            if current is root or node is None or node in nodes:
                continue
            nodes[node] = None
            pending.extend(self._analysis.operands(node))
        return list(nodes)

    # -- activations ---------------------------------------------------------------------------

    def _elementwise(self, value: ir.Value) -> ir.Value:
        self.elementwise_values.add(value)
        entry = self._chosen[value, self._plan.elementwise_bits]
        return self._place(value, entry.quantization)

    def _place(self, value: ir.Value, quantization: TensorQuantization) -> ir.Value:
        """Return ``value`` quantized and dequantized, the quantizer standing as early as it can."""
        key = (value, quantization)
        if key not in self._placed:
            node = value.producer()
            if node is not None and self._moves_up(node):
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
            if producer is None or (above is not None and self._analysis.table_root(above)):
                return False
            node = producer
        return self._analysis.is_hoistable(node)

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
        self._graph.insert_after(node, clone)
        self._clones[key] = clone
        return clone

    def _quantizer(self, value: ir.Value, quantization: TensorQuantization) -> ir.Value:
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
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], [quantize, dequantize])
        else:
            self._graph.insert_after(producer, [quantize, dequantize])
        return dequantize.outputs[0]

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
        self._graph.insert_before(user, node)
        return node.outputs[0]

    def _constant(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """A constant operand of integer arithmetic, at the elementwise bits, unclipped."""
        array = constant(value)
        assert array is not None
        bits = self._plan.elementwise_bits
        codes, scale = quantize_weights(array, bits, axis=None, method="minmax")
        return self._stored(user, f"{value.name}_codes", codes.astype(f"int{bits}"), scale)

    def _quantized_constant(self, value: ir.Value, quantization: TensorQuantization) -> ir.Value:
        """A constant that is concatenated to quantized values, in their codes."""
        key = (value, quantization)
        if key not in self._placed:
            self._placed[key] = self._quantizer(value, quantization)
        return self._placed[key]

    def _layer(self, node: ir.Node) -> LayerSummary:
        index = weight_input(node)
        assert index is not None
        name = str(node.name)
        precision = self._plan.layers[name]
        data = self._analysis.layer_input(node)
        entry = self._chosen[data, precision.activation_bits]
        weights = constant(node.inputs[index])
        assert weights is not None
        axis = channel_axis(node, weights.ndim) if self._per_channel else None
        codes, scales = quantize_weights(
            weights, precision.weight_bits, axis=axis, method=self._method
        )
        node.replace_input_with(1 - index, self._place(data, entry.quantization))
        dtype = _code_dtype(TensorQuantization(1.0, 0, precision.weight_bits, signed=True))
        stored = self._stored(node, f"{name}.weight_codes", codes.astype(dtype), scales, axis)
        node.replace_input_with(index, stored)
        product = np.float32(entry.quantization.scale) * scales
        bias = self._bias(node, product)
        rows = np.moveaxis(weights, axis or 0, 0).reshape(scales.size, -1).astype(np.float64)
        code_rows = np.moveaxis(codes, axis or 0, 0).reshape(scales.size, -1)
        limits = scales.reshape(-1).astype(np.float64) * ((1 << (precision.weight_bits - 1)) - 1)
        peaks = np.maximum(np.abs(rows).max(axis=1, initial=0.0), 1e-300)
        return LayerSummary(
            name,
            node.op_type,
            precision,
            entry,
            _sqnr_db(rows, code_rows * scales.reshape(-1, 1).astype(np.float64)),
            float(np.minimum(limits / peaks, 1.0).mean()),
            weights.size,
            -(-precision.weight_bits * weights.size // 8),
            bias,
        )

    def _bias(self, node: ir.Node, scale: npt.NDArray[np.float32]) -> str:
        """Quantize the bias of a layer at the accumulator's scale where int32 can hold it."""
        user, index = node, 2
        for addition, layer in self._analysis.biases.items():
            if layer is node:
                user, index = addition, 0 if constant(addition.inputs[0]) is not None else 1
        if len(user.inputs) <= index or user.inputs[index] is None:
            return ""
        bias = constant(user.inputs[index])
        if bias is None:
            return "float32"
        codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
        if np.abs(codes).max(initial=0.0) > _INT32_MAX:
            return "float32"
        axis = None if scale.ndim == 0 else bias.ndim - 1
        name = f"{node.name}.bias_codes"
        stored = self._stored(user, name, codes.astype(np.int32), scale, axis)
        user.replace_input_with(index, stored)
        return "int32"


def _sqnr_db(signal: Array, approximation: Array) -> float:
    error = float(np.square(signal.astype(np.float64) - approximation).sum())
    power = float(np.square(signal.astype(np.float64)).sum())
    if error == 0.0:
        return math.inf
    return 10.0 * math.log10(power / error) if power > 0.0 else -math.inf
