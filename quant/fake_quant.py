"""Run a float model as if it were quantized, at any precision plan, without making a model for it.

One graph serves all plans. Every layer reads its weights, its bias and the parameters of the
quantizer in front of it from inputs of the graph; everything else, also the quantizers of
elementwise operators, is the same for all plans. What the inputs are fed is exactly what
:func:`~bitwright.quant.quantizer.quantize_model` would have written into a QDQ model: weights
rounded to codes and dequantized, biases at the scale of the accumulator. Quantizing commutes with
the operators that only carry values, so it does not matter that a QDQ model has its quantizers in
front of those. With standard operators (``blocked=False``) the outputs equal those of the QDQ model
in onnxruntime bit for bit.

The graph is cut into segments where one value alone leads on, and what comes out of a segment can
be kept: plans that begin alike share the work of their first layers.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from bitwright.quant.blocked import BlockedLayout, use_blocked_convolutions, values_read
from bitwright.quant.emit import (
    Emitter,
    LayerConstants,
    TensorSummary,
    bias_input,
    layer_codes,
)
from bitwright.quant.float_ops import Array, wrong_optimizers
from bitwright.quant.graph import attribute, clamp_bounds, data_inputs, is_move, weight_input
from bitwright.quant.observers import TensorQuantization, quantize_weights
from bitwright.quant.prepare import add_initializer
from bitwright.quant.quantizer import Calibration
from bitwright.quant.refine import LayerChoice, Refinement
from bitwright.quant.soft_edge_nodes import decode_attributes, encode_attributes
from bitwright.soft_edge import SoftEdge
from bitwright.vocabulary import Activation, Precision, PrecisionPlan

__all__ = ["FakeQuant", "FakeQuantModel", "Slot", "fake_quant_model"]

_MAX_CODE: Final = 65535
_SEGMENTS: Final = 8

_Key: TypeAlias = tuple[Hashable, int, int]  # batch, segment, number of what came before


@dataclass(frozen=True, slots=True)
class Slot:
    """Names of the graph inputs through which one layer is given a precision.

    Attributes
    ----------
    weights, bias
        float32, dequantized; ``bias`` is None where the layer can have none that is constant.
    scale, zero_point
        Of the quantizer, float32 and uint16.
    low, high
        float32 bounds of what is quantized; None where the codes of uint16 saturate by themselves,
        as no value is negative.
    soft, segments
        Whether the layer reads soft-edge codes, and the numbers of their segments, float32
        [7, segments, 1]; None where no precision of the layer has such a format.
    layout
        How weights and bias lie in memory; None as in the model.
    """

    layer: str
    weights: str
    bias: str | None
    scale: str
    zero_point: str
    low: str | None
    high: str | None
    soft: str | None = None
    segments: str | None = None
    layout: BlockedLayout | None = None


@dataclass(frozen=True, slots=True)
class _Segment:
    """A part of the graph between two cuts.

    ``slots`` are those of its layers; it is ``sized`` if its outputs are float and their sizes
    depend on the number of samples alone.
    """

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    slots: tuple[Slot, ...]
    sized: bool


@dataclass(frozen=True, slots=True)
class FakeQuantModel:
    """All that :class:`FakeQuant` needs; can be sent to another process.

    Attributes
    ----------
    segments
        Parts of the graph, in order of execution.
    outputs
        Names of the model's outputs.
    constants
        Layer name to its float constants.
    data
        Layer name to the name of its data input.
    quantizations, refinement, per_channel
        As in :class:`~bitwright.quant.quantizer.Calibration`.
    notes
        What is different from what was asked for.
    """

    segments: tuple[_Segment, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, LayerConstants]
    data: Mapping[str, str]
    quantizations: Mapping[tuple[str, Activation], TensorQuantization]
    refinement: Refinement | None
    per_channel: bool
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in order of execution."""
        return tuple(slot.layer for segment in self.segments for slot in segment.slots)


def fake_quant_model(
    found: Calibration,
    plan: PrecisionPlan,
    *,
    work: Mapping[str, float] | None = None,
    blocked: bool = True,
    segments: int = _SEGMENTS,
) -> FakeQuantModel:
    """Build the graph that serves all plans; the calibrated model is consumed.

    Parameters
    ----------
    found
        What :func:`~bitwright.quant.quantizer.calibrate_model` found.
    plan
        Any plan, for its elementwise bits.
    work
        Layer name to the work it is, for example its multiply-accumulates, so that segments are
        about equal; by default layers count alike.
    blocked
        Whether convolutions may run in onnxruntime's blocked memory layout, as they do in its
        optimised float models: two to three times faster, with sums in another order, so that a
        code in ten thousand or so comes out next to where it would be.
    segments
        At most so many parts.
    """
    placement = found.placement
    constants = {str(node.name): LayerConstants.of(node, placement) for node in placement.layers}
    data = {str(node.name): str(placement.layer_input(node).name) for node in placement.layers}
    chosen = {
        (value, form): TensorSummary(
            str(value.name), found.quantizations[str(value.name), form], 0.0, 0.0, 0.0
        )
        for value, form in placement.wanted(plan)
    }
    soft = {name for name, form in found.quantizations if form.format != "int"}
    emitter = _SlotEmitter(
        found.model.ir, placement, plan, chosen, {}, found.per_channel, soft=soft
    )
    emitter.run()
    RemoveUnusedNodesPass()(found.model.ir)
    NameFixPass()(found.model.ir)
    # uint16 quantizers need operator set 21, which is the least that models are loaded with.
    found.model.ir.ir_version = max(found.model.ir.ir_version, 10)
    slots = [values.slot() for values in emitter.slots]
    proto = found.model.to_proto()
    notes: list[str] = []
    parts = []
    for part in _split(proto, slots, work or dict.fromkeys(constants, 1.0), segments):
        convolves = any(constants[slot.layer].weights.ndim == 4 for slot in part.slots)
        parts.append(_blocked(part, constants, notes) if blocked and convolves else part)
    return FakeQuantModel(
        tuple(parts),
        tuple(value.name for value in proto.graph.output),
        constants,
        data,
        found.quantizations,
        found.refinement,
        found.per_channel,
        tuple(notes),
    )


@dataclass(slots=True)
class _SlotValues:
    """The graph inputs of a layer, while names may still change."""

    layer: str
    weights: ir.Value
    bias: ir.Value | None
    scale: ir.Value
    zero_point: ir.Value
    low: ir.Value | None
    high: ir.Value | None
    soft: ir.Value | None
    segments: ir.Value | None

    def slot(self) -> Slot:
        def name(value: ir.Value | None) -> str | None:
            return None if value is None else str(value.name)

        return Slot(
            self.layer,
            str(self.weights.name),
            name(self.bias),
            str(self.scale.name),
            str(self.zero_point.name),
            name(self.low),
            name(self.high),
            name(self.soft),
            name(self.segments),
        )


class _SlotEmitter(Emitter):
    """Writes elementwise quantizers as ever, and for layers graph inputs instead of constants.

    ``soft`` names the tensors that some precision reads in soft-edge codes.
    """

    def __init__(self, *args: Any, soft: Collection[str]) -> None:
        super().__init__(*args)
        self.slots: list[_SlotValues] = []
        self._soft = soft

    def _layer(self, node: ir.Node) -> None:
        index = weight_input(node)
        assert index is not None
        name = str(node.name)
        source = LayerConstants.of(node, self._placement)

        def parameter(kind: str, dtype: ir.DataType, shape: tuple[int | str, ...] = ()) -> ir.Value:
            value = ir.Value(
                name=f"bitwright/{name}/{kind}", type=ir.TensorType(dtype), shape=ir.Shape(shape)
            )
            self._graph.inputs.append(value)
            return value

        value = self._placement.layer_input(node)
        signed = not _is_positive(value)
        soft = str(value.name) in self._soft
        values = _SlotValues(
            name,
            parameter("weights", ir.DataType.FLOAT, source.weights.shape),
            None,
            parameter("scale", ir.DataType.FLOAT),
            parameter("zero_point", ir.DataType.UINT16),
            parameter("low", ir.DataType.FLOAT) if signed else None,
            parameter("high", ir.DataType.FLOAT) if signed else None,
            parameter("soft", ir.DataType.BOOL) if soft else None,
            parameter("segments", ir.DataType.FLOAT, (7, f"{name}_segments", 1)) if soft else None,
        )
        # In front of a Pad, as onnxruntime makes one with the convolution behind it.
        user, position = node, 1 - index
        producer = value.producer()
        while producer is not None and producer.op_type == "Pad" and is_move(producer):
            above = producer.inputs[0]
            if len(value.uses()) > 1 or value.is_graph_output() or above is None:
                break
            user, position, value, producer = producer, 0, above, above.producer()
        nodes = self._integers(value, values)
        if values.soft is not None:
            branches = {
                branch: _branch(f"{name}/{branch}", inside)
                for branch, inside in (
                    ("then_branch", self._soft_edge(value, values)),
                    ("else_branch", nodes),
                )
            }
            nodes = [ir.node("If", [values.soft], branches)]
            nodes[0].outputs[0].name = f"{name}/quantized"
        for step in nodes:
            self._current.insert_before(user, step)
        result = nodes[-1].outputs[0]
        result.shape, result.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        user.replace_input_with(position, result)
        node.replace_input_with(index, values.weights)
        if source.bias is not None or source.shiftable:
            user, position = bias_input(node, self._placement)
            values.bias = parameter("bias", ir.DataType.FLOAT, _bias_shape(source))
            if len(user.inputs) <= position:
                user.resize_inputs(position + 1)
            user.replace_input_with(position, values.bias)
        self.slots.append(values)

    @staticmethod
    def _integers(value: ir.Value, values: _SlotValues) -> list[ir.Node]:
        """Quantize and dequantize with one step."""
        nodes: list[ir.Node] = []

        def append(node: ir.Node, name: str, dtype: ir.DataType) -> ir.Value:
            result = node.outputs[0]
            result.name, result.shape, result.type = name, value.shape, ir.TensorType(dtype)
            nodes.append(node)
            return result

        operand, name = value, values.layer
        if values.low is not None:
            clip = ir.node("Clip", [operand, values.low, values.high])
            operand = append(clip, f"{name}/clipped", ir.DataType.FLOAT)
        parameters = [values.scale, values.zero_point]
        quantize = ir.node("QuantizeLinear", [operand, *parameters])
        codes = append(quantize, f"{name}/codes", ir.DataType.UINT16)
        dequantize = ir.node("DequantizeLinear", [codes, *parameters])
        append(dequantize, f"{name}/dequantized", ir.DataType.FLOAT)
        return nodes

    def _soft_edge(self, value: ir.Value, values: _SlotValues) -> list[ir.Node]:
        """Encode, decode and dequantize: :mod:`bitwright.quant.soft_edge_nodes` in one go.

        Whole finest steps are exact in float32, so codes need not be written down.
        """
        nodes: list[ir.Node] = []

        def compute(operator: str, *inputs: ir.Value, count: int = 1, **attributes: Any) -> Any:
            node = ir.node(operator, inputs, attributes, num_outputs=count)
            for result in node.outputs:
                result.name = f"{values.layer}/soft_edge_{len(nodes)}_{result.index()}"
            nodes.append(node)
            return node.outputs if count > 1 else node.outputs[0]

        def number(array: Array) -> ir.Value:
            return add_initializer(self._graph, f"bitwright/{values.layer}/number", array)

        assert values.segments is not None
        flat = compute("Reshape", value, number(np.array([1, 1, -1])))
        rows = compute("Split", values.segments, count=7, axis=0, num_outputs=7)
        sign, first, doubled, last, limit, stride, gap = rows
        distance = compute("Mul", compute("Div", flat, values.scale), sign)
        places = compute("Mul", compute("Sub", distance, first), doubled)
        zero, one, half = (number(np.array(n, np.float32)) for n in (0.0, 1.0, 0.5))
        halves = compute("Floor", compute("Min", compute("Max", places, zero), last))
        rounded = compute("Floor", compute("Mul", compute("Add", halves, one), half))
        beyond = compute("Cast", compute("Greater", distance, limit), to=int(ir.DataType.FLOAT))
        steps = compute("Add", compute("Mul", rounded, stride), compute("Mul", beyond, gap))
        total = compute("ReduceSum", compute("Mul", steps, sign), number(np.array([1])))
        scaled = compute("Mul", total, values.scale)
        compute("Reshape", scaled, compute("Shape", value), allowzero=1)
        return nodes


def _branch(name: str, nodes: Sequence[ir.Node]) -> ir.Graph:
    return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name=name)


def _segment_numbers(layout: SoftEdge) -> npt.NDArray[np.float32]:
    """What a slot is fed for a layout."""
    encode, decode = encode_attributes(layout), decode_attributes(layout)
    rows = [encode[name] for name in ("signs", "firsts", "doubled", "lasts", "limits")]
    rows += [decode[name] for name in ("strides", "gaps")]
    return np.array(rows, np.float32)[:, :, None]


def _bias_shape(source: LayerConstants) -> tuple[int, ...]:
    if source.bias is not None:
        return source.bias.shape
    return (1 if source.axis is None else source.weights.shape[source.axis],)


def _is_positive(value: ir.Value | None) -> bool:
    """Whether the graph itself shows that no element is negative."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    bounds = clamp_bounds(node)
    if bounds is not None:
        return bounds[0] >= 0.0
    if node.op_type == "Pad" and attribute(node, "mode", "constant") != "constant":
        return _is_positive(node.inputs[0])
    return is_move(node) and all(_is_positive(node.inputs[index]) for index in data_inputs(node))


# -- segments ----------------------------------------------------------------------------------


def _split(
    proto: onnx.ModelProto, slots: Sequence[Slot], work: Mapping[str, float], count: int
) -> list[_Segment]:
    """Cut a graph where one value alone leads on, into parts of about equal work."""
    graph = proto.graph
    nodes = list(graph.node)
    reads = [values_read(node) for node in nodes]
    parameters = {name for slot in slots for name in parameters_of(slot)}
    fed = [value.name for value in graph.input if value.name not in parameters]
    constant = {tensor.name for tensor in graph.initializer} | parameters
    last: dict[str, int] = {}
    for number, names in enumerate(reads):
        for name in names - constant:
            last[name] = number
    outputs = [value.name for value in graph.output]
    for name in outputs:
        last[name] = len(nodes)
    layer_at = {slot.weights: slot.layer for slot in slots}
    # Before which nodes a single value leads on. Inputs of the model are always at hand.
    live: set[str] = set()
    cuts: list[tuple[float, int]] = []  # work so far, node
    types = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    done, total = 0.0, sum(work[slot.layer] for slot in slots)
    unread = {slot.layer: set(parameters_of(slot)) for slot in slots}
    whole = {name: set(entry) for name, entry in unread.items()}
    for number, node in enumerate(nodes):
        before = {name for name in live if name not in fed}
        begun = any(entry and entry != whole[name] for name, entry in unread.items())
        if (
            0.0 < done < total
            and len(before) == 1
            and not begun
            and before <= set(types) - set(outputs)
        ):
            if cuts and cuts[-1][0] == done:
                cuts.pop()  # later is better: behind pooling, values are fewer
            cuts.append((done, number))
        for entry in unread.values():
            entry.difference_update(reads[number])
        done += sum(work[layer_at[name]] for name in reads[number] & set(layer_at))
        live |= {name for name in node.output if last.get(name, -1) > number}
        live = {name for name in live if last[name] > number}
    wanted = [total * part / count for part in range(1, count)]
    chosen = sorted({min(cuts, key=lambda c: abs(c[0] - w))[1] for w in wanted}) if cuts else []
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    segments: list[_Segment] = []
    for start, end in itertools.pairwise([0, *chosen, len(nodes)]):
        inside = nodes[start:end]
        read = set().union(*reads[start:end])
        made = {name for node in inside for name in node.output if name}
        entering = sorted(name for name in read - made - constant)
        leaving = [name for name in sorted(made) if last.get(name, -1) >= end or name in outputs]
        own = tuple(slot for slot in slots if slot.weights in read)
        fitting = [name for slot in slots for name in parameters_of(slot) if name in read]
        part = onnx.helper.make_graph(
            inside,
            f"{graph.name}_{len(segments)}",
            [types[name] for name in [*entering, *fitting]],
            [types.get(name) or onnx.ValueInfoProto(name=name) for name in leaving],
            [initializers[name] for name in sorted(read & set(initializers))],
            value_info=[v for v in graph.value_info if v.name in made and v.name not in leaving],
        )
        model = onnx.helper.make_model(
            part,
            opset_imports=proto.opset_import,
            ir_version=proto.ir_version,
            functions=proto.functions,
        )
        sized = all(name in types and _is_sized(types[name]) for name in leaving)
        segments.append(
            _Segment(model.SerializeToString(), tuple(entering), tuple(leaving), own, sized)
        )
    return segments


def _is_sized(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    sizes = list(kind.shape.dim)[1:]
    known = kind.HasField("shape") and all(dim.HasField("dim_value") for dim in sizes)
    return known and kind.elem_type == onnx.TensorProto.FLOAT


def parameters_of(slot: Slot) -> list[str]:
    """Names of all inputs of a slot."""
    names = (slot.weights, slot.bias, slot.scale, slot.zero_point, slot.low, slot.high)
    return [name for name in (*names, slot.soft, slot.segments) if name is not None]


def _blocked(
    segment: _Segment, constants: Mapping[str, LayerConstants], notes: list[str]
) -> _Segment:
    weights = {slot.weights: constants[slot.layer].weights for slot in segment.slots}
    biases = {
        slot.weights: (slot.bias, np.zeros(_bias_shape(constants[slot.layer]), np.float32))
        for slot in segment.slots
        if slot.bias is not None
    }
    changed = use_blocked_convolutions(segment.model, weights, biases)
    if changed is None:
        names = ", ".join(slot.layer for slot in segment.slots)
        notes.append(f"onnxruntime's blocked layout is not used for {names}")
        return segment
    model, layouts = changed
    slots = tuple(replace(slot, layout=layouts.get(slot.weights)) for slot in segment.slots)
    return replace(segment, model=model, slots=slots)


# -- running -----------------------------------------------------------------------------------


def _ort_value(array: npt.ArrayLike, dtype: npt.DTypeLike) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, dtype))


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Memory of ours that onnxruntime writes into."""

    array: npt.NDArray[np.float32]
    value: ort.OrtValue

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> _Buffer:
        array = np.empty(shape, np.float32)
        return cls(array, ort.OrtValue.ortvalue_from_numpy(array))


@dataclass(slots=True)
class _Runner:
    """The session of one segment.

    ``shapes`` holds, for the shapes of its inputs, those of its outputs, once they are known.
    """

    segment: _Segment
    session: ort.InferenceSession
    binding: Any
    shapes: dict[tuple[Any, ...], list[tuple[int, ...]]] = field(default_factory=dict)
    buffers: dict[tuple[Any, ...], list[_Buffer]] = field(default_factory=dict)
    bound: dict[str, ort.OrtValue] = field(default_factory=dict)
    fed: dict[str, dict[str, ort.OrtValue]] = field(default_factory=dict)

    def run(self, values: Mapping[str, ort.OrtValue], *, fresh: bool) -> dict[str, ort.OrtValue]:
        """Compute the outputs; those that are not ``fresh`` last until the next run.

        Where the sizes of outputs are known, they are written into memory of ours: to have
        onnxruntime make it and hand it over takes longer than many an operator.
        """
        names = self.segment.outputs
        for name in self.segment.inputs:
            if self.bound.get(name) is not values[name]:
                self.binding.bind_ortvalue_input(name, values[name])
                self.bound[name] = values[name]
        key = tuple(tuple(values[name].shape()) for name in self.segment.inputs)
        shapes = self.shapes.get(key) if self.segment.sized else None
        if shapes is None:
            for name in names:
                self.binding.bind_output(name)
                self.bound.pop(name, None)
            self.session.run_with_iobinding(self.binding)
            made = self.binding.get_outputs()
            self.shapes[key] = [tuple(value.shape()) for value in made]
            return dict(zip(names, made, strict=True))
        buffers = None if fresh else self.buffers.get(key)
        if buffers is None:
            buffers = [_Buffer.of(shape) for shape in shapes]
            if not fresh:
                self.buffers[key] = buffers
        for name, buffer in zip(names, buffers, strict=True):
            if self.bound.get(name) is not buffer.value:
                self.binding.bind_ortvalue_output(name, buffer.value)
                self.bound[name] = buffer.value
        self.session.run_with_iobinding(self.binding)
        return {name: buffer.value for name, buffer in zip(names, buffers, strict=True)}


class FakeQuant:
    """Runs a model at one plan after another.

    Not safe to use from several threads at once.

    Parameters
    ----------
    model
        What :func:`fake_quant_model` built.
    reuse_bytes
        How much of what comes out of segments is kept, for plans that begin alike.
    """

    def __init__(self, model: FakeQuantModel, *, reuse_bytes: int = 256 << 20) -> None:
        self.model = model
        self._reuse_bytes = reuse_bytes
        self._runners = []
        for segment in model.segments:
            session = _session(segment.model)
            self._runners.append(_Runner(segment, session, session.io_binding()))
        # Layers that share a data input share its scale where their bits are equal.
        self._groups: dict[str, tuple[str, ...]] = {}
        for name in model.layers:
            data = model.data[name]
            self._groups[data] = (*self._groups.get(data, ()), name)
        self._slots = {slot.layer: slot for seg in model.segments for slot in seg.slots}
        self._weights: dict[tuple[str, int, bytes], ort.OrtValue] = {}
        self._codes: dict[tuple[str, int], tuple[Array, npt.NDArray[np.float32]]] = {}
        self._parameters: dict[
            tuple[str, tuple[Precision, ...]], dict[str, dict[str, ort.OrtValue]]
        ] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._prefixes: list[int] = []
        self._kept: OrderedDict[_Key, dict[str, ort.OrtValue]] = OrderedDict()
        self._kept_bytes = 0

    def use(self, plan: Mapping[str, Precision]) -> None:
        """Set the precision of every layer."""
        shared = self.parameters(plan)
        for runner in self._runners:
            for slot in runner.segment.slots:
                feed = shared[slot.layer]
                if runner.fed.get(slot.layer) is not feed:
                    runner.fed[slot.layer] = feed
                    for name, value in feed.items():
                        runner.binding.bind_ortvalue_input(name, value)
        # What a segment gives depends on the layers so far and on those they share scales with.
        prefix: list[tuple[Precision, ...]] = []
        self._prefixes = []
        for runner in self._runners:
            prefix += [
                tuple(plan[name] for name in self._groups[self.model.data[slot.layer]])
                for slot in runner.segment.slots
            ]
            self._prefixes.append(self._numbers.setdefault(tuple(prefix), len(self._numbers)))

    def parameters(self, plan: Mapping[str, Precision]) -> dict[str, dict[str, ort.OrtValue]]:
        """Layer name to what its slot is fed: input name to value."""
        found: dict[str, dict[str, ort.OrtValue]] = {}
        for data, names in self._groups.items():
            found.update(self._parameters_of(data, names, tuple(plan[n] for n in names)))
        return found

    def run(self, inputs: Mapping[str, ort.OrtValue], key: Hashable = None) -> dict[str, Array]:
        """Compute the model's outputs.

        Parameters
        ----------
        inputs
            One value an input of the model.
        key
            Names this batch of data: what segments give is kept under it. None keeps nothing.
        """
        if not self._reuse_bytes:
            key = None
        last = len(self._runners) - 1
        values: dict[str, ort.OrtValue] = dict(inputs)
        start = 0
        if key is not None:
            for number in range(last - 1, -1, -1):
                if (kept := self._kept.get((key, number, self._prefixes[number]))) is not None:
                    self._kept.move_to_end((key, number, self._prefixes[number]))
                    values.update(kept)
                    start = number + 1
                    break
        for number in range(start, last + 1):
            runner = self._runners[number]
            keeps = key is not None and number < last
            made = runner.run(values, fresh=keeps)
            values.update(made)
            if keeps:
                self._keep((key, number, self._prefixes[number]), made)
        # Copied: an array of onnxruntime's does not keep the memory alive that it shows.
        return {name: values[name].numpy().copy() for name in self.model.outputs}

    def forget(self) -> None:
        """Let go of what is kept for plans that begin alike."""
        self._kept.clear()
        self._kept_bytes = 0

    def _keep(self, key: _Key, values: dict[str, ort.OrtValue]) -> None:
        size = sum(_bytes(value) for value in values.values())
        if size > self._reuse_bytes:
            return
        self._kept[key] = values
        self._kept_bytes += size
        while self._kept_bytes > self._reuse_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= sum(_bytes(value) for value in oldest.values())

    def _parameters_of(
        self, data: str, names: tuple[str, ...], precisions: tuple[Precision, ...]
    ) -> dict[str, dict[str, ort.OrtValue]]:
        found = self._parameters.get((data, precisions))
        if found is None:
            found = self._make_parameters(dict(zip(names, precisions, strict=True)))
            self._parameters[data, precisions] = found
        return found

    def _make_parameters(
        self, precisions: Mapping[str, Precision]
    ) -> dict[str, dict[str, ort.OrtValue]]:
        """What the slots of layers that share a data input are fed."""
        model = self.model
        choices: dict[str, LayerChoice] = {}
        refined: dict[tuple[str, Activation], TensorQuantization] = {}
        if model.refinement is not None:
            refined, choices = model.refinement.choose(precisions)
        result = {}
        for name, precision in precisions.items():
            key = (model.data[name], precision.activation)
            quantization = refined.get(key, model.quantizations[key])
            base = self._base_codes(name, precision.weight_bits, choices.get(name))
            choice = replace(choices.get(name, LayerChoice()))
            choice.weight_codes, choice.weight_scales = base
            codes = layer_codes(
                model.constants[name],
                precision,
                quantization.scale,
                choice,
                per_channel=model.per_channel,
            )
            slot = self._slots[name]
            # Scales that were raised for a bias depend on the activations' scale.
            raised = codes.weight_scales is not base[1]
            scales = codes.weight_scales.tobytes() if raised else b""
            weights = self._weights.get((name, precision.weight_bits, scales))
            if weights is None:
                array = codes.dequantized_weights()
                if slot.layout is not None:
                    array = slot.layout.weights(array)
                weights = _ort_value(array, np.float32)
                self._weights[name, precision.weight_bits, scales] = weights
            feed = {slot.weights: weights}
            if slot.bias is not None:
                bias = codes.dequantized_bias()
                if bias is None:
                    bias = np.zeros(_bias_shape(model.constants[name]), np.float32)
                if slot.layout is not None:
                    bias = slot.layout.bias(bias)
                feed[slot.bias] = _ort_value(bias, np.float32)
            low = quantization.code_min - quantization.zero_point
            high = quantization.code_max - quantization.zero_point
            scale = np.float32(quantization.scale)
            feed[slot.scale] = _ort_value(scale, np.float32)
            layout = quantization.layout
            if slot.soft is not None and slot.segments is not None:
                numbers = np.zeros((7, 1, 1)) if layout is None else _segment_numbers(layout)
                feed[slot.soft] = _ort_value(layout is not None, np.bool_)
                feed[slot.segments] = _ort_value(numbers, np.float32)
                if layout is not None:  # what the branch of integers would read
                    low, high = 0, _MAX_CODE
            if slot.low is not None and slot.high is not None:
                feed[slot.low] = _ort_value(np.float32(low) * scale, np.float32)
                feed[slot.high] = _ort_value(np.float32(high) * scale, np.float32)
                feed[slot.zero_point] = _ort_value(-low, np.uint16)
            else:
                feed[slot.zero_point] = _ort_value(_MAX_CODE - high, np.uint16)
            result[name] = feed
        return result

    def _base_codes(
        self, name: str, bits: int, choice: LayerChoice | None
    ) -> tuple[Array, npt.NDArray[np.float32]]:
        """Codes and scales of weights as they are for all activation bits."""
        if choice is not None and choice.weight_codes is not None:
            assert choice.weight_scales is not None
            return choice.weight_codes, choice.weight_scales
        if (name, bits) not in self._codes:
            layer = self.model.constants[name]
            axis = layer.axis if self.model.per_channel else None
            codes, scales = quantize_weights(layer.weights, bits, axis=axis)
            self._codes[name, bits] = codes.astype(np.int16), scales
        return self._codes[name, bits]


def _bytes(value: ort.OrtValue) -> int:
    return 4 * math.prod(map(int, value.shape()))


def _session(model: bytes) -> ort.InferenceSession:
    """A session with one thread, in which quantizers and the layout stay as they are."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(
        model,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=wrong_optimizers(onnx.ModelProto.FromString(model)),
    )
