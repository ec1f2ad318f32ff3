"""The integer reference: runs a QDQ model with the integer arithmetic of an accelerator.

It defines every bit. Any QDQ model may enter, bitwright's own or another tool's. Between
quantizers everything is integer: layers accumulate products of codes, sums and averages of
activations accumulate codes, elementwise functions are tables over codes, and a
:class:`~bitwright.quant.requantization.Requantization` turns accumulators into the next codes.
What lies outside stays float and runs in onnxruntime, operator by operator. The rules stand in
``docs/integer-semantics.md``; the code favours being obviously right over being fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bitwright.errors import BitwrightError, RunError
from bitwright.quant.float_ops import Array, FloatOperator, captured_values
from bitwright.quant.graph import (
    DECODE,
    ENCODE,
    attribute,
    clamp_bounds,
    constant,
    data_inputs,
    elementwise_roots,
    is_move,
    is_quantizer,
    layout_of,
    loop_body,
)
from bitwright.quant.load import Model
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.requantization import (
    Requantization,
    RequantizationForm,
    accumulator_bits,
    accumulator_bound,
    bias_steps,
    quantize_float,
    sum_multipliers,
)
from bitwright.quant.tables import function_table
from bitwright.soft_edge import SoftEdge

__all__ = ["Operand", "Operands", "Reference", "Region", "padding_of"]

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]

_EXACT_FLOAT64 = 2.0**53


@dataclass(frozen=True)
class _Codes:
    """A quantized tensor behind DequantizeLinear.

    ``scale`` and ``zero_point`` broadcast against ``codes``, which have ``bits`` bits and are
    ``signed`` or not. ``quantization`` describes them where the scale is one number; it is None for
    per-channel scales and for 32-bit biases. ``stored`` says whether the codes are constants of the
    model.
    """

    codes: IntArray
    scale: FloatArray
    zero_point: IntArray
    bits: int
    signed: bool
    quantization: TensorQuantization | None
    stored: bool

    @property
    def centred(self) -> IntArray:
        return self.codes - self.zero_point

    @property
    def magnitude(self) -> int:
        """Largest |code - zero point| that the type allows."""
        assert self.quantization is not None
        low, high = self.quantization.code_min, self.quantization.code_max
        return max(high - self.quantization.zero_point, self.quantization.zero_point - low)

    def to_float(self) -> Array:
        return self.centred.astype(np.float32) * self.scale


@dataclass(frozen=True)
class _Accumulator:
    """Integer sums before requantization.

    ``scale`` (float32, broadcastable) is the value of one step, ``clamp`` the bounds of a Relu or
    Clip behind, ``bound`` the proven largest magnitude of any partial sum.
    """

    values: IntArray
    scale: FloatArray
    bound: float
    origin: str
    kind: str
    operand_bits: int
    clamp: tuple[float, float] = (-np.inf, np.inf)

    def to_float(self) -> Array:
        values = self.values.astype(np.float32) * self.scale
        low, high = np.float32(self.clamp[0]), np.float32(self.clamp[1])
        return np.asarray(np.clip(values, low, high))


@dataclass(frozen=True)
class _Function:
    """An elementwise function of codes, not yet evaluated."""

    root: _Codes
    root_value: ir.Value
    value: ir.Value


@dataclass(frozen=True)
class _Moved:
    """Integer sums that moves carry on: a quantizer behind them counts as if it stood before."""

    source: _Accumulator
    moves: tuple[tuple[ir.Node, tuple[Array | None, ...]], ...]  # with their operands but the first


_Value: TypeAlias = "Array | _Codes | _Accumulator | _Moved | _Function"


@dataclass(frozen=True, slots=True)
class Region:
    """One integer region: what produces a tensor of codes.

    Attributes
    ----------
    name
        The node that computes: a layer, an arithmetic operator or the last node of a function.
    kind
        ``layer``, ``arithmetic``, ``table``, or ``quantize`` (float to codes at the border).
    codes
        The tensor of codes it produces.
    accumulator_bits
        32 or 64; 0 where nothing accumulates.
    operand_bits
        Width of the widest codes that enter or leave.
    """

    name: str
    kind: str
    codes: str
    accumulator_bits: int
    operand_bits: int


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a product.

    Attributes
    ----------
    codes
        int64, of the shape that the node reads.
    zero_point
        The code of 0; broadcasts against ``codes``.
    bits, signed
        Their type.
    """

    codes: IntArray
    zero_point: IntArray
    bits: int
    signed: bool


@dataclass(frozen=True, slots=True)
class Operands:
    """What a layer, or another product of two tensors of codes, multiplies in one run.

    Attributes
    ----------
    node
        A Conv, Gemm or MatMul.
    data, weights
        Both operands. Of two activations ``weights`` is the right one.
    weights_left
        Whether the weights are the left operand.
    stored
        Whether the weights are constants of the model.
    batch
        Size of the first axis of the model's first input: samples of the run.
    """

    node: ir.Node
    data: Operand
    weights: Operand
    weights_left: bool
    stored: bool
    batch: int


class Reference:
    """Executes one QDQ model in integers.

    Parameters
    ----------
    model
        A loaded model.
    requantization
        ``float`` (the rule everywhere else) or ``fixed``: the multiplier as a 32-bit integer.
    observe
        Called with the operands of every product that is computed in integers, once a run, in
        loops once a step.

    Attributes
    ----------
    regions
        The integer regions by the tensor of codes they produce; filled by the first run.
    """

    def __init__(
        self,
        model: Model,
        requantization: RequantizationForm = "float",
        *,
        observe: Callable[[Operands], None] | None = None,
    ) -> None:
        self._model = model
        self._observe = observe
        self._form: RequantizationForm = requantization
        self._roots = elementwise_roots(model.graph)
        for node in model.graph:
            body = loop_body(node)
            if body is not None:
                self._roots.update(elementwise_roots(body))
        self._weights: dict[ir.Node, _Codes] = {}
        self._tables: dict[tuple[ir.Value, TensorQuantization], Array] = {}
        self._operators: dict[ir.Node, FloatOperator] = {}
        self._last_uses = _last_uses(model.graph, self._roots)
        self._batch = 1
        self.regions: dict[str, Region] = {}

    def run(
        self, inputs: Mapping[str, Array], given: Mapping[str, IntArray] | None = None
    ) -> tuple[dict[str, Array], dict[str, IntArray]]:
        """Run one batch.

        Parameters
        ----------
        inputs
            Model input to array.
        given
            Codes, by the name of their tensor, that replace the computed ones for all that
            follows. With the codes of another implementation every region is compared on equal
            input codes.

        Returns
        -------
        outputs
            Model output to array.
        codes
            Quantized activation to the codes that this reference computed, int64. Those of a loop
            have a first axis more, one entry a step.

        Raises
        ------
        RunError
            If an operator fails; it names the node.
        """
        graph = self._model.graph
        values: dict[ir.Value, _Value] = {
            value: np.asarray(inputs[str(value.name)]) for value in graph.inputs
        }
        first = next(iter(values.values()), None)
        self._batch = first.shape[0] if isinstance(first, np.ndarray) and first.ndim else 1
        computed = self._run_graph(graph, values, given or {}, self._last_uses)
        return {str(v.name): self._array(v, values) for v in graph.outputs}, computed

    def _run_graph(
        self,
        graph: ir.Graph,
        values: dict[ir.Value, _Value],
        given: Mapping[str, IntArray],
        last_uses: Mapping[int, Sequence[ir.Value]],
    ) -> dict[str, IntArray]:
        """Add the values of a graph to those it reads; return the codes that were computed."""
        computed: dict[str, IntArray] = {}
        for position, node in enumerate(graph):
            try:
                if _has_quantizers(node):
                    results: Sequence[_Value] = self._loop(node, values, given, computed)
                else:
                    results = self._execute(node, values)
            except BitwrightError:
                raise
            except Exception as error:
                raise RunError(
                    f"the integer reference fails in {node.op_type} {node.name!r} "
                    f"({type(error).__name__}: {str(error)[:300]})",
                    where=self._model.source,
                ) from error
            for value, result in zip(node.outputs, results, strict=False):
                values[value] = result
                if is_quantizer(node) and isinstance(result, np.ndarray):
                    computed[str(value.name)] = result
                    values[value] = np.asarray(given.get(str(value.name), result))
            for value in last_uses.get(position, ()):
                values.pop(value, None)
        return computed

    # -- loops ---------------------------------------------------------------------------------

    def _loop(
        self,
        node: ir.Node,
        values: Mapping[ir.Value, _Value],
        given: Mapping[str, IntArray],
        computed: dict[str, IntArray],
    ) -> list[Array]:
        """Run the body of a Scan or Loop once a step; between steps its values are float.

        So are values of the graph around it that it reads, if they are no constants.
        """
        body = loop_body(node)
        assert body is not None
        outer: dict[ir.Value, _Value] = {}
        for value in captured_values(node):
            found = self._operand(value, values)
            kept = isinstance(found, _Codes) and found.stored
            outer[value] = found if kept and found is not None else self._array(value, values)
        arrays = [None if v is None else self._array(v, values) for v in node.inputs]
        loop = _ScanSteps(node, arrays) if node.op_type == "Scan" else _LoopSteps(arrays)
        # Those of loops further inside may be of different numbers from step to step.
        codes: dict[str, list[IntArray]] = {
            str(inner.outputs[0].name): [] for inner in body if is_quantizer(inner)
        }
        while (entering := loop.next()) is not None:
            inner = {**outer, **dict(zip(body.inputs, entering, strict=True))}
            step = len(loop.outputs)
            mine = {name: array[step] for name, array in given.items() if step < len(array)}
            made = self._run_graph(body, inner, mine, {})
            for name, entries in codes.items():
                entries.append(made[name])
            loop.done([self._array(value, inner) for value in body.outputs])
        computed.update((name, np.stack(entries)) for name, entries in codes.items() if entries)
        return loop.results(body)

    def _execute(self, node: ir.Node, values: dict[ir.Value, _Value]) -> Sequence[_Value]:
        if node.domain == "" and node.op_type == "QuantizeLinear":
            return [self._quantize(node, values)]
        if node.domain == "" and node.op_type == "DequantizeLinear":
            return [self._dequantize(node, values)]
        if (layout := layout_of(node, ENCODE)) is not None:
            return [self._encode(node, layout, values)]
        operands = [self._operand(value, values) for value in node.inputs]
        if (layout := layout_of(node, DECODE)) is not None:
            assert isinstance(operands[0], np.ndarray)
            return [layout.decode(operands[0])]
        if node.domain == "":
            root = self._roots.get(node.outputs[0])
            source = None if root is None else values.get(root)
            if root is not None and isinstance(source, _Codes) and source.quantization is not None:
                first = operands[0]
                if node.op_type == "Relu" and isinstance(first, _Codes):
                    return [replace(first, codes=np.maximum(first.codes, first.zero_point))]
                return [_Function(source, root, node.outputs[0])]
            if is_move(node):
                moved = self._carry(node, operands) or self._move(node, operands)
                if moved is not None:
                    return moved
            result = self._compute(node, operands)
            if result is not None:
                return [result]
        return self._run_float(node, values)

    def _compute(self, node: ir.Node, operands: Sequence[_Value | None]) -> _Value | None:
        """Result of an operator that computes in integers; None where it does not."""
        first = operands[0] if operands else None
        clamp = clamp_bounds(node)
        if clamp is not None and isinstance(first, _Accumulator):
            low, high = (float(np.clip(bound, *clamp)) for bound in first.clamp)
            return replace(first, clamp=(low, high))
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            return self._layer(node, operands)
        if node.op_type == "Add" and len(operands) == 2:
            for index in (0, 1):
                accumulator, other = operands[index], operands[1 - index]
                if isinstance(accumulator, _Accumulator):
                    # Directly behind a layer, a constant is its bias.
                    clamped = accumulator.clamp != (-np.inf, np.inf)
                    if other is None or clamped or not _is_stored(node.inputs[1 - index], other):
                        return None
                    return _with_bias(accumulator, other)
        codes = [e for e in operands if isinstance(e, _Codes) and e.quantization is not None]
        if len(codes) == 2 and node.op_type in ("Add", "Sub"):
            return _sum(node, codes[0], codes[1], -1 if node.op_type == "Sub" else 1)
        if len(codes) == 2 and node.op_type == "Mul":
            return _Accumulator(
                codes[0].centred * codes[1].centred,
                np.asarray(codes[0].scale * codes[1].scale, np.float32),
                float(codes[0].magnitude * codes[1].magnitude),
                str(node.name),
                "arithmetic",
                max(entry.bits for entry in codes),
            )
        if isinstance(first, _Codes) and first.quantization is not None:
            return _average(node, first)
        return None

    # -- values --------------------------------------------------------------------------------

    @staticmethod
    def _operand(value: ir.Value | None, values: Mapping[ir.Value, _Value]) -> _Value | None:
        if value is None:
            return None
        return values[value] if value in values else constant(value)

    def _array(self, value: ir.Value, values: Mapping[ir.Value, _Value]) -> Array:
        """A value as an array of its ONNX element type."""
        found = self._operand(value, values)
        if isinstance(found, _Function):
            return self._look_up(found, self._table(found))
        if isinstance(found, _Codes | _Accumulator):
            return found.to_float()
        if isinstance(found, _Moved):
            return self._replay(found, found.source.to_float())
        if found is None:
            raise ValueError(f"there is no value {value.name!r}")
        if value.dtype is not None and found.dtype == np.int64 != value.dtype.numpy():
            return found.astype(value.dtype.numpy())
        return found

    def _run_float(self, node: ir.Node, values: Mapping[ir.Value, _Value]) -> list[Array]:
        if node not in self._operators:
            self._operators[node] = FloatOperator(node, self._model.opset)
        operator = self._operators[node]
        inputs = [None if value is None else self._array(value, values) for value in node.inputs]
        captured = [self._array(value, values) for value in operator.captured]
        results = iter(operator.run(inputs, captured))
        return [next(results) if value.name else np.empty(0) for value in node.outputs]

    # -- quantizers and tables -----------------------------------------------------------------

    def _parameters(
        self, node: ir.Node, values: Mapping[ir.Value, _Value], dtype: ir.DataType | None
    ) -> tuple[FloatArray, IntArray, TensorQuantization | None]:
        """Scale, zero point, and their description where the scale is one number."""
        scale_value = node.inputs[1]
        assert scale_value is not None
        scale = np.asarray(self._array(scale_value, values), np.float32)
        zero_value = node.inputs[2] if len(node.inputs) > 2 else None
        zero = np.zeros(scale.shape, np.int64)
        if zero_value is not None:
            zero = np.asarray(self._array(zero_value, values)).astype(np.int64)
        if scale.size != 1 or dtype is None or not _holds_codes(dtype) or dtype.bitwidth > 16:
            return scale, zero, None
        signed = str(dtype).startswith("INT")
        quantization = TensorQuantization(scale.item(), int(zero.item()), dtype.bitwidth, signed)
        return scale.reshape(()), zero.reshape(()), quantization

    def _quantize(self, node: ir.Node, values: Mapping[ir.Value, _Value]) -> IntArray:
        source_value, output = node.inputs[0], node.outputs[0]
        assert source_value is not None
        dtype = output.dtype
        scale, zero_point, quantization = self._parameters(node, values, dtype)
        carried = self._operand(source_value, values)
        source = carried.source if isinstance(carried, _Moved) else carried
        name, kind, accumulator, bits = str(node.name), "quantize", 0, 0
        if quantization is None:
            if attribute(node, "block_size", 0):
                raise ValueError("activations quantized in blocks are not supported")
            if dtype is None or not _holds_codes(dtype) or dtype.bitwidth > 16:
                raise ValueError(f"codes of type {dtype} are not supported")
            axis = attribute(node, "axis", 1)
            array = self._array(source_value, values)
            shape = _along(axis, array.ndim)
            signed = str(dtype).startswith("INT")
            limits = TensorQuantization(1.0, 0, dtype.bitwidth, signed)
            codes = np.rint(array / scale.reshape(shape)) + zero_point.reshape(shape)
            result = np.clip(codes, limits.code_min, limits.code_max).astype(np.int64)
        elif isinstance(source, _Accumulator):
            name, kind = source.origin, source.kind
            accumulator, bits = accumulator_bits(source.bound), source.operand_bits
            requantization = Requantization.between(source.scale, quantization, source.clamp)
            result = requantization.apply(source.values, self._form)
            if isinstance(carried, _Moved):
                centred = (result - quantization.zero_point).astype(np.float32)
                moved = self._replay(carried, centred)
                result = moved.astype(np.int64) + quantization.zero_point
        elif isinstance(source, _Function):
            producer = source.value.producer()
            name, kind, bits = str(producer.name if producer else name), "table", source.root.bits
            result = self._look_up(source, quantize_float(self._table(source), scale, quantization))
        elif isinstance(source, _Codes) and source.quantization == quantization:
            result = source.codes
        else:
            result = quantize_float(self._array(source_value, values), scale, quantization)
        width = 0 if dtype is None else dtype.bitwidth
        self.regions[str(output.name)] = Region(
            name, kind, str(output.name), accumulator, max(bits, width)
        )
        return result

    def _encode(
        self, node: ir.Node, layout: SoftEdge, values: Mapping[ir.Value, _Value]
    ) -> IntArray:
        """Encode values; accumulators become floats first, functions their tables."""
        source_value, step_value = node.inputs
        assert source_value is not None
        assert step_value is not None
        carried = self._operand(source_value, values)
        source = carried.source if isinstance(carried, _Moved) else carried
        name, kind, accumulator, bits = str(node.name), "quantize", 0, 0
        step = np.asarray(self._array(step_value, values), np.float32)
        if isinstance(source, _Accumulator):
            name, kind = source.origin, source.kind
            accumulator, bits = accumulator_bits(source.bound), source.operand_bits
        elif isinstance(source, _Function):
            producer = source.value.producer()
            name, kind, bits = str(producer.name if producer else name), "table", source.root.bits
        codes = layout.encode(self._array(source_value, values), step.item()).astype(np.int64)
        output = str(node.outputs[0].name)
        width = np.dtype(layout.dtype).itemsize * 8
        self.regions[output] = Region(name, kind, output, accumulator, max(bits, width))
        return codes

    def _dequantize(self, node: ir.Node, values: Mapping[ir.Value, _Value]) -> _Value:
        if node in self._weights:
            return self._weights[node]
        value = node.inputs[0]
        assert value is not None
        found = self._operand(value, values)
        if (
            not isinstance(found, np.ndarray)
            or value.dtype is None
            or not _holds_codes(value.dtype)
        ):
            return self._run_float(node, values)[0]
        scale, zero_point, quantization = self._parameters(node, values, value.dtype)
        codes = found.astype(np.int64)
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        if block:  # a scale for each block of codes along the axis
            shape = codes.shape
            scale = np.take(scale, np.arange(shape[axis]) // block, axis)
            zero_point = np.take(zero_point, np.arange(shape[axis]) // block, axis)
            quantization = None
        elif scale.size != 1:
            shape = _along(axis, codes.ndim)
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        # Some tools leave the weights in float, in front of a quantizer.
        producer = value.producer()
        layout = layout_of(producer, DECODE)
        if layout is not None and quantization is not None and quantization.zero_point == 0:
            quantization = TensorQuantization.soft_edge(layout, scale.item())
        sources = [value] if producer is None else producer.inputs
        stored = all(constant(entry) is not None for entry in sources if entry is not None)
        signed = str(value.dtype).startswith("INT")
        result = _Codes(
            codes, scale, zero_point, value.dtype.bitwidth, signed, quantization, stored
        )
        if stored:
            self._weights[node] = result
        return result

    def _table(self, function: _Function) -> Array:
        """Float values of a function for every code of its root, computed once."""
        quantization = function.root.quantization
        assert quantization is not None
        key = function.value, quantization
        if key not in self._tables:
            self._tables[key] = function_table(
                function.root_value, function.value, quantization, self._model.opset
            )
        return self._tables[key]

    @staticmethod
    def _look_up(function: _Function, table: Array) -> Array:
        assert function.root.quantization is not None
        return np.asarray(table[function.root.codes - function.root.quantization.code_min])

    # -- operators -----------------------------------------------------------------------------

    @staticmethod
    def _carry(node: ir.Node, operands: Sequence[_Value | None]) -> list[_Value] | None:
        """Note a move of sums that have not been requantized; None for several data operands."""
        first = operands[0]
        others = tuple(e for e in operands[1:] if e is None or isinstance(e, np.ndarray))
        if node.op_type == "Concat" or len(node.outputs) != 1:
            return None
        if not isinstance(first, _Accumulator | _Moved) or len(others) != len(operands) - 1:
            return None
        before = first.moves if isinstance(first, _Moved) else ()
        source = first.source if isinstance(first, _Moved) else first
        return [_Moved(source, (*before, (node, others)))]

    def _replay(self, moved: _Moved, array: Array) -> Array:
        """Carry an array as the sums would have been."""
        for node, others in moved.moves:
            if node not in self._operators:
                self._operators[node] = FloatOperator(node, self._model.opset)
            array = self._operators[node].run([array, *others])[0]
        return array

    def _move(self, node: ir.Node, operands: Sequence[_Value | None]) -> list[_Value] | None:
        """Carry codes. The operator runs on centred codes (0 is 0.0) in float32, which is exact."""
        data = [operands[index] for index in data_inputs(node)]
        first = data[0]
        if not isinstance(first, _Codes) or first.quantization is None:
            return None
        arrays: list[Array | None] = []
        for operand in operands:
            if isinstance(operand, _Codes):
                if operand.quantization != first.quantization:
                    return None
                arrays.append(operand.centred.astype(np.float32))
            elif operand is None or isinstance(operand, np.ndarray):
                arrays.append(operand)
            else:
                return None
        if any(not isinstance(entry, _Codes) for entry in data):
            return None
        if node not in self._operators:
            self._operators[node] = FloatOperator(node, self._model.opset)
        results = self._operators[node].run(arrays)
        stored = all(entry.stored for entry in operands if isinstance(entry, _Codes))
        return [
            replace(first, codes=result.astype(np.int64) + first.zero_point, stored=stored)
            for result in results
        ]

    def _layer(self, node: ir.Node, operands: Sequence[_Value | None]) -> _Accumulator | None:
        left, right = operands[0], operands[1]
        if not isinstance(left, _Codes) or not isinstance(right, _Codes):
            return None
        if node.op_type == "Gemm" and (
            attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0
        ):
            return None
        # The weights may have a scale for each channel, the data may not.
        weights_left = node.op_type != "Conv" and left.stored and not right.stored
        data, weights = (right, left) if weights_left else (left, right)
        axis = _channel_axis(node, weights.codes.ndim, left=weights_left)
        per_channel = weights.scale.size > 1
        if data.quantization is None or (weights.quantization is None and not weights.stored):
            return None
        if per_channel and (axis is None or weights.scale.shape[axis] != weights.scale.size):
            return None
        a, b = left.centred, right.centred
        if node.op_type == "Gemm":
            a = a.T if attribute(node, "transA", 0) else a
            b = b.T if attribute(node, "transB", 0) else b
        if weights.stored:
            bound = accumulator_bound(weights.centred, axis, data.quantization)
        else:  # the largest codes of both types bound the products
            terms = np.prod(b.shape[1:]) if node.op_type == "Conv" else a.shape[-1]
            bound = float(data.magnitude * weights.magnitude * terms)
        if node.op_type == "Conv":
            values = _convolve(a, b, node, exact=bound < _EXACT_FLOAT64)
            behind = a.ndim - 2
        else:
            values = _matmul(a, b, bound)
            behind = 1 if weights_left and b.ndim > 1 else 0
        scale = np.asarray(data.scale * weights.scale, np.float32)
        scale = scale.reshape((-1, *(1,) * behind) if per_channel else ())
        bits = max(data.bits, weights.bits)
        result: _Accumulator | None
        result = _Accumulator(values, scale, bound, str(node.name), "layer", bits)
        bias = operands[2] if len(operands) > 2 else None
        if bias is not None:
            if not _is_stored(node.inputs[2], bias):
                return None
            result = _with_bias(result, bias, behind if node.op_type == "Conv" else 0)
        if result is not None and self._observe is not None:
            first, second = (_operand_of(entry) for entry in (data, weights))
            self._observe(Operands(node, first, second, weights_left, weights.stored, self._batch))
        return result


def _operand_of(entry: _Codes) -> Operand:
    """Codes as they are stored: soft-edge ones are decoded in front of the multiplier only."""
    layout = None if entry.quantization is None else entry.quantization.layout
    if layout is None:
        return Operand(entry.codes, entry.zero_point, entry.bits, entry.signed)
    dtype = np.dtype(layout.dtype)
    codes = layout.encode(entry.codes, 1.0).astype(np.int64)  # steps stand for themselves
    zero_point = np.asarray(layout.zero_point, np.int64)
    # Of 4 bits in memory and on a link, as integers of 4 bits are, bytes though they are in ONNX.
    bits, signed = layout.activation.stored_bits, dtype.kind == "i"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if layout.code_min < low or layout.code_max > high:
        bits = 8 * dtype.itemsize
    return Operand(codes, zero_point, bits, signed)


def _has_quantizers(node: ir.Node) -> bool:
    """Whether a node is a loop with quantizers in its body; others run in onnxruntime."""
    return any(
        is_quantizer(inner) or inner.op_type == "DequantizeLinear" or _has_quantizers(inner)
        for inner in loop_body(node) or ()
    )


class _ScanSteps:
    """What enters and leaves the body of a Scan at each step."""

    def __init__(self, node: ir.Node, inputs: Sequence[Array | None]) -> None:
        arrays = [array for array in inputs if array is not None]
        scanned = attribute(node, "num_scan_inputs")
        self._states = arrays[: len(arrays) - scanned]
        axes = attribute(node, "scan_input_axes") or (0,) * scanned
        backward = attribute(node, "scan_input_directions") or (0,) * scanned
        self._sequences = [
            np.moveaxis(array, axis, 0)[:: -1 if turned else 1]
            for array, axis, turned in zip(arrays[len(self._states) :], axes, backward, strict=True)
        ]
        self._node = node
        self.outputs: list[list[Array]] = []

    def next(self) -> list[Array] | None:
        """Inputs of the next step; None behind the last."""
        step = len(self.outputs)
        if step == len(self._sequences[0]):
            return None
        return [*self._states, *(sequence[step] for sequence in self._sequences)]

    def done(self, results: list[Array]) -> None:
        """Take what a step computed."""
        count = len(self._states)
        self._states = results[:count]
        self.outputs.append(results[count:])

    def results(self, body: ir.Graph) -> list[Array]:
        """Last states and stacked outputs."""
        values = body.outputs[len(self._states) :]
        axes = attribute(self._node, "scan_output_axes") or (0,) * len(values)
        backward = attribute(self._node, "scan_output_directions") or (0,) * len(values)
        stacked = [
            np.moveaxis(_stacked(value, entries)[:: -1 if turned else 1], 0, axis)
            for value, entries, axis, turned in zip(
                values, self._by_output(len(values)), axes, backward, strict=True
            )
        ]
        return [*self._states, *stacked]

    def _by_output(self, count: int) -> list[list[Array]]:
        return [[outputs[number] for outputs in self.outputs] for number in range(count)]


class _LoopSteps:
    """What enters and leaves the body of a Loop at each step."""

    def __init__(self, inputs: Sequence[Array | None]) -> None:
        trips, condition, *states = inputs
        self._trips = math.inf if trips is None else int(trips.item())
        self._goes_on = condition is None or bool(condition.item())
        self._states = [array for array in states if array is not None]
        self.outputs: list[list[Array]] = []

    def next(self) -> list[Array] | None:
        """Inputs of the next step; None behind the last."""
        step = len(self.outputs)
        if step >= self._trips or not self._goes_on:
            return None
        return [np.array(step, np.int64), np.array(True), *self._states]

    def done(self, results: list[Array]) -> None:
        """Take what a step computed."""
        self._goes_on = bool(results[0].item())
        count = len(self._states)
        self._states = results[1 : 1 + count]
        self.outputs.append(results[1 + count :])

    def results(self, body: ir.Graph) -> list[Array]:
        """Last states and stacked outputs."""
        values = body.outputs[1 + len(self._states) :]
        stacked = [
            _stacked(value, [outputs[number] for outputs in self.outputs])
            for number, value in enumerate(values)
        ]
        return [*self._states, *stacked]


def _stacked(value: ir.Value, entries: Sequence[Array]) -> Array:
    if entries:
        return np.stack(entries)
    shape = [size if isinstance(size, int) else 0 for size in value.shape or ()]
    return np.zeros((0, *shape), None if value.dtype is None else value.dtype.numpy())


def _along(axis: int, rank: int) -> tuple[int, ...]:
    shape = [1] * rank
    shape[axis] = -1
    return tuple(shape)


def _is_stored(value: ir.Value | None, operand: _Value) -> bool:
    """Whether an operand is a constant of the model, as floats or as codes."""
    return operand.stored if isinstance(operand, _Codes) else constant(value) is not None


def _holds_codes(dtype: ir.DataType) -> bool:
    return str(dtype).startswith(("INT", "UINT"))


def _channel_axis(node: ir.Node, rank: int, *, left: bool) -> int | None:
    """Axis of an operand that runs over output channels; None for a vector."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        transposed = bool(attribute(node, "transA" if left else "transB", 0))
        return 1 if transposed == left else 0
    return None if rank < 2 else rank - 2 if left else rank - 1


def _with_bias(accumulator: _Accumulator, bias: _Value, behind: int = 0) -> _Accumulator | None:
    """Add a constant; None where it does not fit.

    Parameters
    ----------
    accumulator, bias
        The bias broadcasts against the accumulator, with ``behind`` axes added behind its own.
    """
    if isinstance(bias, _Codes):
        codes, scale = bias.centred, bias.scale
        if bias.scale.size > 1:
            scale = scale.reshape(scale.shape + (1,) * behind)
        codes = codes.reshape(codes.shape + (1,) * behind)
        if np.all(scale == accumulator.scale):
            bound = accumulator.bound + float(np.abs(codes).max(initial=0))
            return replace(accumulator, values=accumulator.values + codes, bound=bound)
        bias = bias.to_float()
    if not isinstance(bias, np.ndarray):
        return None
    steps = bias_steps(
        bias.reshape(bias.shape + (1,) * behind), accumulator.scale, accumulator.bound
    )
    if steps is None:
        return None
    fine, codes = steps
    bounds = np.ldexp(accumulator.bound, fine) + np.abs(codes.astype(np.float64))
    return replace(
        accumulator,
        values=(accumulator.values << fine) + codes,
        scale=np.ldexp(accumulator.scale, -fine),
        bound=float(np.max(bounds, initial=0.0)),
    )


def _matmul(a: IntArray, b: IntArray, bound: float) -> IntArray:
    """Integer matrix product; float64 is exact, and fast, where no sum ever reaches 2^53."""
    if bound < _EXACT_FLOAT64:
        product = np.matmul(a.astype(np.float64), b.astype(np.float64))
        return np.asarray(product.astype(np.int64))
    return np.asarray(np.matmul(a, b), np.int64)


def padding_of(
    node: ir.Node, sizes: Sequence[int], kernel: Sequence[int]
) -> tuple[list[tuple[int, int]], tuple[int, ...], tuple[int, ...]]:
    """Padding of each spatial axis, strides and dilations of a convolution or pooling."""
    rank = len(sizes)
    strides = tuple(attribute(node, "strides") or (1,) * rank)
    dilations = tuple(attribute(node, "dilations") or (1,) * rank)
    auto = attribute(node, "auto_pad", "NOTSET")
    pads = list(attribute(node, "pads") or (0,) * (2 * rank))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        padding = []
        for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
            small, large = total // 2, total - total // 2
            padding.append((small, large) if auto == "SAME_UPPER" else (large, small))
        return padding, strides, dilations
    if auto == "VALID":
        pads = [0] * (2 * rank)
    return list(zip(pads[:rank], pads[rank:], strict=True)), strides, dilations


def _windows(
    x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Array:
    """Views of all windows: [N, C, *spatial] to [N, C, *output, *kernel]."""
    rank = len(kernel)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(x, extent, axis=axes)
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    return windows[(slice(None), slice(None), *steps)]


def _convolve(x: IntArray, w: IntArray, node: ir.Node, *, exact: bool) -> IntArray:
    """Integer convolution of centred codes: [N, C, *spatial] by [M, C/groups, *kernel]."""
    kernel = w.shape[2:]
    groups = attribute(node, "group", 1)
    padding, strides, dilations = padding_of(node, x.shape[2:], kernel)
    dtype = np.float64 if exact else np.int64  # see _matmul
    matrix = w.astype(dtype).reshape(groups, w.shape[0] // groups, -1)
    padded = np.pad(x, [(0, 0), (0, 0), *padding])
    windows = _windows(padded, kernel, strides, dilations)
    output = windows.shape[2 : 2 + len(kernel)]
    positions, taps = int(np.prod(output)), int(np.prod(kernel))
    result = np.empty((x.shape[0], w.shape[0], *output), np.int64)
    for image, window in zip(result, windows, strict=True):  # one at a time: bounded memory
        # [C, *output, *kernel] to [groups, C/groups * kernel, output]
        columns = window.astype(dtype).reshape(groups, -1, positions, taps)
        columns = columns.swapaxes(2, 3).reshape(groups, -1, positions)
        image[...] = np.matmul(matrix, columns).reshape(image.shape)
    return result


def _sum(node: ir.Node, a: _Codes, b: _Codes, sign: int) -> _Accumulator:
    """Sum of two activations: both brought to one scale by integer multipliers."""
    bits = max(a.bits, b.bits)
    factors, step = sum_multipliers((float(a.scale), float(b.scale)), bits)
    bound = float(factors[0] * a.magnitude + factors[1] * b.magnitude)
    values = factors[0] * a.centred + sign * factors[1] * b.centred
    return _Accumulator(
        values, np.array(step, np.float32), bound, str(node.name), "arithmetic", bits
    )


def _average(node: ir.Node, x: _Codes) -> _Accumulator | None:
    """Averages and sums over windows or axes: sums of codes, the divisor in the scale."""
    centred = x.centred
    divisor: Array
    if node.op_type == "AveragePool":
        kernel, strides = attribute(node, "kernel_shape"), attribute(node, "strides") or (1,)
        same = attribute(node, "auto_pad", "NOTSET").startswith("SAME")
        if same and max(strides) > min(kernel):
            return None  # the padding may become negative, which ONNX leaves open
        values, divisor = _average_pool(node, centred)
        terms = math.prod(kernel)
    elif node.op_type == "GlobalAveragePool":
        values = centred.sum(axis=tuple(range(2, centred.ndim)), keepdims=True)
        terms = math.prod(centred.shape[2:])
        divisor = np.asarray(float(terms))
    elif node.op_type in ("ReduceMean", "ReduceSum"):
        value = node.inputs[1] if len(node.inputs) > 1 else None
        given = np.zeros(0, np.int64) if value is None else constant(value)
        if given is None:
            return None
        axes = tuple(int(axis) for axis in given.reshape(-1))
        if not axes:
            if attribute(node, "noop_with_empty_axes", 0):
                return None
            axes = tuple(range(centred.ndim))
        values = centred.sum(axis=axes, keepdims=bool(attribute(node, "keepdims", 1)))
        terms = math.prod(centred.shape[axis] for axis in axes)
        divisor = np.asarray(float(terms) if node.op_type == "ReduceMean" else 1.0)
    else:
        return None
    scale = (np.float64(x.scale) / divisor).astype(np.float32)
    bound = float(x.magnitude * terms)
    return _Accumulator(np.asarray(values), scale, bound, str(node.name), "arithmetic", x.bits)


def _average_pool(node: ir.Node, x: IntArray) -> tuple[IntArray, Array]:
    """Window sums, and how many terms the average of each window divides by."""
    kernel = attribute(node, "kernel_shape")
    padding, strides, dilations = padding_of(node, x.shape[2:], kernel)
    ones = np.ones((1, 1, *x.shape[2:]), np.int64)
    inside = [(0, 0), (0, 0), *padding]
    include = bool(attribute(node, "count_include_pad", 0))
    ones = np.pad(ones, inside, constant_values=1 if include else 0)
    x = np.pad(x, inside)
    if attribute(node, "ceil_mode", 0):
        extra = [(0, 0), (0, 0)]
        for axis, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
            size, extent = x.shape[2 + axis], (k - 1) * dilation + 1
            count = -(-(size - extent) // stride) + 1
            # A window that would start in the padding behind the data is left out.
            if (count - 1) * stride >= size - padding[axis][1]:
                count -= 1
            extra.append((0, max((count - 1) * stride + extent - size, 0)))
        x, ones = np.pad(x, extra), np.pad(ones, extra)
    axes = tuple(range(-len(kernel), 0))
    sums = _windows(x, kernel, strides, dilations).sum(axis=axes)
    counts = _windows(ones, kernel, strides, dilations).sum(axis=axes)
    return sums, np.maximum(counts, 1).astype(np.float64)


def _last_uses(graph: ir.Graph, roots: Mapping[ir.Value, ir.Value]) -> dict[int, list[ir.Value]]:
    """Position of a node to the values nobody needs after it; a function needs its root."""
    last: dict[ir.Value, int] = {}
    for position, node in enumerate(graph):
        for value in (*node.inputs, *captured_values(node)):
            if value is not None:
                last[value] = position
                if value in roots:
                    last[roots[value]] = position
    kept = set(graph.outputs)
    kept.update(roots[value] for value in graph.outputs if value in roots)
    frees: dict[int, list[ir.Value]] = {}
    for value, position in last.items():
        if value not in kept:
            frees.setdefault(position, []).append(value)
    return frees
