"""LowerScan: a loop over time becomes one kernel that holds the loop.

::

    r = bitwright.scan(cls.body, captured, states, sequences)
                                                   ->  r = R.call_tir(cls.recurrence, ...)

The body becomes loops inside the kernel; see ``bitwright.targets.kernels.recurrence``. Sequences
that are codes in front of ``R.dequantize``, and of ``bitwright.soft_edge_decode``, enter the kernel
as codes, which are decoded inside: what moves through memory are the codes. A loop whose
body no kernel computes stays as it is; behind code generation it becomes a recursion over halves of
the sequences that calls the body: right for any body, and slower (``passes/scan_recursion.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.expressions import (
    Array,
    CallRewriter,
    Quantizer,
    Sizes,
    along,
    as_block,
    constant,
    global_variable,
    node_name,
    operator,
    quantizer,
    scalar,
    soft_edge,
)
from bitwright.passes.recognize_scan import recognize
from bitwright.soft_edge import SoftEdge
from bitwright.targets.kernels import code_matmul, emit, float_matmul, functions
from bitwright.targets.kernels import soft_edge as kernels_soft_edge
from bitwright.targets.kernels.host import Isa, find
from bitwright.targets.kernels.recurrence import Recurrence, Value, kernel, ordered
from bitwright.targets.kernels.spec import Codes

__all__ = ["LowerScan"]

Expr = Any

# --------------------------------------------------------------------------- functions of elements


def _function(name: str, of_libm: Callable[[Expr], Expr]) -> Callable[[Expr, int], Expr]:
    """A vector function for float32, LLVM's for other types."""

    def function(x: Expr, lanes: int) -> Expr:
        single = str(x.ty.dtype).startswith("float32")
        return getattr(functions, name)(x, lanes) if single else of_libm(x)

    return function


def _relu(x: Expr, lanes: int) -> Expr:
    zero = emit.constant(0, _element(x), lanes)
    return T.Select(x < zero, zero, x)  # keeps what is not a number


def _element(x: Expr) -> str:
    return str(x.ty.dtype).partition("x")[0]


def _one(x: Expr, lanes: int) -> Expr:
    return emit.constant(1, _element(x), lanes)


def _sign(x: Expr, lanes: int) -> Expr:
    zero, one = emit.constant(0, _element(x), lanes), _one(x, lanes)
    return T.Select(x > zero, one, T.Select(x < zero, zero - one, x))


_sigmoid = _function("sigmoid", T.sigmoid)

_UNARY: dict[str, tuple[Callable[..., Expr], int]] = {
    "abs": (lambda x, _: T.abs(x), 1),
    "ceil": (lambda x, _: T.ceil(x), 1),
    "cos": (lambda x, _: T.cos(x), 20),
    "erf": (_function("erf", T.erf), 20),
    "exp": (_function("exp", T.exp), 10),
    "floor": (lambda x, _: T.floor(x), 1),
    "isfinite": (lambda x, lanes: T.abs(x) < emit.constant(math.inf, _element(x), lanes), 1),
    "isinf": (lambda x, lanes: T.abs(x) >= emit.constant(math.inf, _element(x), lanes), 1),
    "isnan": (lambda x, _: x != x, 1),
    "log": (_function("log", T.log), 10),
    "logical_not": (lambda x, _: T.Not(x), 1),
    "negative": (lambda x, lanes: emit.constant(0, _element(x), lanes) - x, 1),
    "nn.relu": (_relu, 1),
    "nn.silu": (lambda x, lanes: x * _sigmoid(x, lanes), 12),
    "nn.softplus": (_function("softplus", lambda x: T.log(T.exp(x) + 1)), 20),
    "round": (lambda x, _: T.nearbyint(x), 1),
    "rsqrt": (lambda x, lanes: _one(x, lanes) / T.sqrt(x), 5),
    "sigmoid": (_sigmoid, 10),
    "sign": (_sign, 1),
    "sin": (lambda x, _: T.sin(x), 20),
    "sqrt": (lambda x, _: T.sqrt(x), 5),
    "square": (lambda x, _: x * x, 1),
    "tanh": (_function("tanh", T.tanh), 10),
}


def _divide(a: Expr, b: Expr, lanes: int) -> Expr:
    return a / b if _is_float(a) else T.truncdiv(a, _not_zero(b, lanes))


def _floor_mod(a: Expr, b: Expr, lanes: int) -> Expr:
    return a - T.floor(a / b) * b if _is_float(a) else T.floormod(a, _not_zero(b, lanes))


def _is_float(x: Expr) -> bool:
    return str(x.ty.dtype).startswith("float")


def _not_zero(b: Expr, lanes: int) -> Expr:
    """A divisor: the steps behind the end of a Loop compute as well, and must not trap."""
    return T.Select(b == emit.constant(0, _element(b), lanes), _one(b, lanes), b)


_BINARY: dict[str, tuple[Callable[..., Expr], int]] = {
    "add": (lambda a, b, _: a + b, 1),
    "divide": (_divide, 2),
    "equal": (lambda a, b, _: a == b, 1),
    "floor_mod": (_floor_mod, 3),
    "greater": (lambda a, b, _: a > b, 1),
    "greater_equal": (lambda a, b, _: a >= b, 1),
    "left_shift": (lambda a, b, _: T.shift_left(a, b), 1),
    "less": (lambda a, b, _: a < b, 1),
    "less_equal": (lambda a, b, _: a <= b, 1),
    "logical_and": (lambda a, b, lanes: T.Select(a, b, _false(lanes)), 1),
    "logical_or": (lambda a, b, lanes: T.Select(a, _true(lanes), b), 1),
    "logical_xor": (lambda a, b, _: T.Select(a, T.Not(b), b), 1),
    "maximum": (lambda a, b, _: T.max(a, b), 1),
    "minimum": (lambda a, b, _: T.min(a, b), 1),
    "multiply": (lambda a, b, _: a * b, 1),
    "not_equal": (lambda a, b, _: a != b, 1),
    "power": (lambda a, b, _: T.pow(a, b), 20),
    "subtract": (lambda a, b, _: a - b, 1),
}


def _false(lanes: int) -> Expr:
    return emit.broadcast(tirx.const(False, "bool"), lanes)


def _true(lanes: int) -> Expr:
    return emit.broadcast(tirx.const(True, "bool"), lanes)


def _cast(before: str, after: str) -> Callable[..., Expr]:
    def function(x: Expr, lanes: int) -> Expr:
        if before == "bool":  # TVM cannot analyse conversions of vectors of truth values
            return T.Select(x, *(emit.constant(value, after, lanes) for value in (1, 0)))
        if after == "bool":
            return x != emit.constant(0, before, lanes)
        return emit.cast(x, after, lanes)

    return function


# --------------------------------------------------------------------------- reading a body


class _OtherForm(Exception):
    """The body is not of the form that a kernel computes."""


@dataclass(frozen=True)
class _Coded:
    """A sequence in codes.

    Attributes
    ----------
    codes
        The sequence.
    layout
        Of soft-edge codes; None for others.
    parameters
        How they are dequantized, decoded where they are soft-edge codes.
    """

    codes: Any
    layout: SoftEdge | None
    parameters: Quantizer

    @classmethod
    def of(cls, rewriter: CallRewriter, expr: Any) -> _Coded | None:
        """The codes behind a sequence; None if it is none of codes of one scale."""
        found = quantizer(rewriter.value(expr), "dequantize")
        if found is None or not found.holds_activations:
            return None
        decode = rewriter.value(found.operand)
        layout = soft_edge(decode)
        codes = found.operand if layout is None else decode.args[0]
        return None if constant(codes) is not None else cls(codes, layout, found)


class _Reader:
    """Reads the body of a scan.

    Parameters
    ----------
    body
        The body.
    captured
        Arguments for its first parameters; constants where they are known.
    states
        Number of its states.
    sequences
        For each sequence, its codes if it has some.
    isa
        Instruction set of the kernel.
    """

    def __init__(
        self,
        body: Any,
        captured: Sequence[Any],
        states: int,
        sequences: Sequence[_Coded | None],
        isa: Isa,
    ) -> None:
        self._body = body
        self._isa = isa
        self._sizes: dict[Any, Any] = {}
        self._values: dict[Any, Any] = {}  # a list of values for a tuple
        self._known: dict[Value, Array] = {}
        self._ranges: dict[Value, tuple[int, int]] = {}  # of integers, narrower than their type
        self.arguments: dict[Value, Any] = {}
        self._weights: dict[Value, Value] = {}
        self._wide: dict[Value, Value] = {}  # int16 of soft-edge codes, as int32
        self._stacks: dict[Value, tuple[int, list[Value]]] = {}  # axis, and what is stacked
        parameters = list(body.params)
        for parameter, argument in zip(parameters, captured, strict=False):
            array = constant(argument)
            if array is not None:
                self._values[parameter] = self._constant(array)
            else:
                value = Value("captured", self._shape(parameter), self._dtype(parameter))
                self._values[parameter] = value
                self.arguments[value] = argument
        del parameters[: len(captured)]
        self._states = [
            Value("state", self._shape(entry), self._dtype(entry)) for entry in parameters[:states]
        ]
        self._values.update(zip(parameters, self._states, strict=False))
        self._elements = []
        for parameter, coded in zip(parameters[states:], sequences, strict=True):
            dtype = self._dtype(parameter if coded is None else coded.codes)
            element = Value("element", self._shape(parameter), dtype)
            self._elements.append(element)
            self._values[parameter] = element if coded is None else self._read(element, coded)

    def read(self) -> Recurrence:
        """What a step computes."""
        for block in self._body.body.blocks:
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding):
                    raise _OtherForm("it checks shapes")
                self._values[binding.var] = self._bound(binding.value)
        result = self._bound(self._body.body.body)
        count = len(self._states)
        used = ordered(result)
        return Recurrence(
            tuple(value for value in used if value.kind == "captured"),
            tuple(self._states),
            tuple(self._elements),
            tuple(result[:count]),
            tuple(result[count:]),
            frozenset(self._weights.values()),
        )

    def _bound(self, expr: Any) -> Any:
        if isinstance(expr, relax.Tuple):
            return [self._value(entry) for entry in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self._values[expr.tuple_value][expr.index]
        if isinstance(expr, relax.Call):
            return self._call(expr)
        if isinstance(expr, relax.Var):
            return self._values[expr]
        return self._value(expr)

    def _value(self, expr: Any) -> Value:
        if isinstance(expr, relax.Var):
            value: Value = self._values[expr]
            return value
        array = constant(expr)
        if array is None:
            raise _OtherForm(f"it holds {type(expr).__name__}")
        return self._constant(array)

    def _constant(self, array: Array) -> Value:
        if array.size == 1:
            value = Value("constant", (), array.dtype.name, (), array.item())
            return value if array.ndim == 0 else _reshaped(value, array.shape)
        value = Value("captured", array.shape, array.dtype.name)
        self._known[value] = array
        self.arguments[value] = relax.const(array, array.dtype.name)
        return value

    def _as_weights(self, value: Value) -> Value | None:
        """The weights of a product, in the kernel's layout; None if it cannot take them."""
        array = self._known.get(value)
        if array is None or array.dtype == np.float64:
            return None
        if array.dtype != np.float32:
            dtypes = [t for t in ("int8", "int16") if _fits((array.min(), array.max()), t)]
            if not dtypes:
                return None
            array = array.astype(dtypes[0])
        if value not in self._weights:
            dtype = array.dtype.name
            self._weights[value] = weights = Value("captured", value.shape, dtype)
            pack = float_matmul.pack if dtype == "float32" else code_matmul.pack
            self.arguments[weights] = relax.const(pack(array), dtype)
        return self._weights[value]

    def _shape(self, expr: Any) -> tuple[Any, ...]:
        shape = expr.ty.shape
        if shape is None:
            raise _OtherForm("a shape is not known")
        sizes = tuple(self._size(dim) for dim in shape)
        if any(isinstance(size, int) and size == 0 for size in sizes):
            raise _OtherForm("it is empty")
        return sizes

    def _size(self, dim: Any) -> Any:
        if isinstance(dim, int):
            return dim
        if isinstance(dim, tirx.IntImm):
            return int(dim.value)
        if not isinstance(dim, tirx.Var):
            raise _OtherForm("a size is computed")
        if dim not in self._sizes:
            self._sizes[dim] = tirx.Var(dim.name, "int64")
        return self._sizes[dim]

    @staticmethod
    def _dtype(expr: Any) -> str:
        return str(expr.ty.dtype)

    def _map(
        self, call: Any, function: Callable[..., Expr], cost: int, operands: list[Value]
    ) -> Value:
        return Value("map", self._shape(call), self._dtype(call), tuple(operands), function, cost)

    def _call(self, call: Any) -> Any:
        name = operator(call)
        if name == "split":
            return self._parts(call)
        if name in ("concat", "stack"):
            return self._joined(call) if name == "concat" else self._stacked(call)
        if name == "tuple":
            raise _OtherForm("it holds a tuple")
        operands = [
            self._value(entry) for entry in call.args if isinstance(entry.ty, relax.TensorType)
        ]
        if name in _UNARY or name in _BINARY:
            function, cost = (_UNARY if len(operands) == 1 else _BINARY)[name]
            result = self._map(call, function, cost, operands)
            if name == "subtract" and operands[1].kind == "constant":
                self._shift_range(result, operands[0], -operands[1].detail)
            return result
        rule = getattr(self, "_" + name.replace(".", "_"), None)
        if rule is None:
            raise _OtherForm(f"it holds {name or 'a call of a function'}")
        found: Value = rule(call, *operands)
        return found

    # -- elements ----------------------------------------------------------------------------------

    def _where(self, call: Any, *operands: Value) -> Value:
        return self._map(call, lambda c, a, b, _: T.Select(c, a, b), 1, list(operands))

    def _astype(self, call: Any, data: Value) -> Value:
        array, dtype = self._known.get(data), self._dtype(call)
        if array is not None and array.dtype.kind in "iu":
            return self._constant(array.astype(dtype))
        result = self._map(call, _cast(data.dtype, dtype), 0, [data])
        self._shift_range(result, data, 0)
        return result

    def _clip(self, call: Any, data: Value) -> Value:
        low, high = (scalar(entry) for entry in call.args[1:])
        if low is None or high is None:
            raise _OtherForm("the bounds of a clip are computed")
        number = float if data.dtype.startswith("float") else int
        bounds = number(low), number(high)

        def function(x: Expr, lanes: int) -> Expr:
            least, most = (emit.constant(bound, data.dtype, lanes) for bound in bounds)
            # Unlike minima and maxima, comparisons keep what is not a number.
            above = T.Select(x < least, least, x)
            return T.Select(above > most, most, above)

        return self._map(call, function, 1, [data])

    def _nn_leakyrelu(self, call: Any, data: Value) -> Value:
        slope = float(call.attrs.alpha)

        def function(x: Expr, lanes: int) -> Expr:
            zero = emit.constant(0, data.dtype, lanes)
            return T.Select(x < zero, x * emit.constant(slope, data.dtype, lanes), x)

        return self._map(call, function, 1, [data])

    # -- codes -------------------------------------------------------------------------------------

    def _range(self, value: Value) -> tuple[int, int]:
        """Bounds of integers."""
        limits = np.iinfo(value.dtype)
        return self._ranges.get(value, (int(limits.min), int(limits.max)))

    def _shift_range(self, result: Value, data: Value, step: float) -> None:
        """Note the bounds of integers that have become others, if nothing wraps around."""
        if not result.dtype.startswith(("int", "uint")) or not data.dtype.startswith(
            ("int", "uint")
        ):
            return
        low, high = (bound + int(step) for bound in self._range(data))
        if _fits((low, high), result.dtype):
            self._ranges[result] = low, high

    def _quantize(self, call: Any, data: Value, *_: Value) -> Value:
        found = quantizer(call, "quantize")
        if found is None or not found.per_tensor or found.dtype not in _CODES:
            raise _OtherForm("a quantizer has parameters for each channel, or computed ones")
        low, high = np.iinfo(found.dtype).min, np.iinfo(found.dtype).max
        output = _codes(found.dtype, int(found.zero_point), int(low), int(high))
        scale = float(found.scale)

        def function(x: Expr, lanes: int) -> Expr:
            steps = x / emit.constant(scale, "float32", lanes)
            return emit.to_codes(output, self._isa, steps, lanes)

        return self._map(call, function, 8, [data])

    def _dequantize(self, call: Any, data: Value, *_: Value) -> Value:
        found = quantizer(call, "dequantize")
        if found is None:
            raise _OtherForm("a quantizer has computed parameters")
        return self._numbers(self._wide.get(data, data), found)

    def _read(self, data: Value, coded: _Coded) -> Value:
        """What codes stand for."""
        steps = data if coded.layout is None else _steps(data, coded.layout)
        return self._numbers(steps, coded.parameters)

    def _bitwright_soft_edge_decode(self, call: Any, data: Value) -> Value:
        wide = _steps(data, ops.layout_of(call))
        result = self._map(call, _cast("int32", "int16"), 0, [wide])
        self._wide[result] = wide
        return result

    def _bitwright_soft_edge_encode(self, call: Any, data: Value, step: Value) -> Value:
        layout = ops.layout_of(call)

        def function(x: Expr, finest: Expr, lanes: int) -> Expr:
            return kernels_soft_edge.encoded(layout, x, finest, lanes)

        return self._map(call, function, 10, [data, step])

    def _numbers(self, data: Value, found: Quantizer) -> Value:
        rank = len(data.shape)
        scale, zero_point = (
            along(array, found.axis, rank) for array in (found.scale, found.zero_point)
        )
        codes = self._known.get(data)
        if codes is not None:
            return self._constant((codes - zero_point).astype(np.float32) * scale)

        def function(x: Expr, zero: Expr, step: Expr, lanes: int) -> Expr:
            centred = emit.cast(x, "int32", lanes) - zero
            return emit.cast(centred, "float32", lanes) * step

        operands = (data, self._constant(zero_point.astype(np.int32)), self._constant(scale))
        return Value("map", data.shape, "float32", operands, function, 1)

    def _bitwright_requantize(self, call: Any, sums: Value, multiplier: Value) -> Value:
        attrs = call.attrs
        low, high, zero_point = (int(attrs[name]) for name in ("low", "high", "zero_point"))
        output = _codes(str(attrs["dtype"]), zero_point, low, high, str(attrs["form"]))
        result = self._map(
            call,
            lambda x, factor, lanes: emit.requantize(output, self._isa, x, factor, lanes),
            6,
            [sums, multiplier],
        )
        self._ranges[result] = low, high
        return result

    def _looked_up(self, call: Any, table: Value, places: Value) -> Value:
        """Elements of a constant vector at computed places."""
        last = int(table.shape[0]) - 1
        low, high = self._range(places)
        if low < 0 or high > last:
            if str(call.attrs.mode) != "clip":
                raise _OtherForm("it takes elements at places that may not exist")

            def function(x: Expr, lanes: int) -> Expr:
                ends = (emit.constant(end, places.dtype, lanes) for end in (0, last))
                return T.min(T.max(x, next(ends)), next(ends))

            places = Value("map", places.shape, places.dtype, (places,), function, 1)
        return Value("lookup", self._shape(call), table.dtype, (table, places), None, 8)

    # -- moves -------------------------------------------------------------------------------------

    def _reshape(self, call: Any, data: Value) -> Value:
        return _reshaped(data, self._shape(call))

    _expand_dims = _squeeze = _flatten = _reshape

    def _permute_dims(self, call: Any, data: Value) -> Value:
        axes = call.attrs.axes
        rank = len(data.shape)
        order = [int(axis) % rank for axis in axes] if axes is not None else range(rank)[::-1]
        return Value("permute", self._shape(call), data.dtype, (data,), tuple(order))

    def _broadcast_to(self, call: Any, data: Value) -> Value:
        return Value("broadcast", self._shape(call), data.dtype, (data,))

    def _strided_slice(self, call: Any, data: Value) -> Value:
        shape = self._shape(call)
        axes, begins, _, strides = (_integers(entry) for entry in (*call.args[1:], None)[:4])
        strides = strides or [1] * len(axes)
        starts, steps = [0] * len(shape), [1] * len(shape)
        for axis, begin, stride in zip(axes, begins, strides, strict=True):
            size = data.shape[axis]
            if not isinstance(size, int):
                raise _OtherForm("it takes a part of an axis of symbolic size")
            last = size - 1 if stride < 0 else size
            starts[axis] = min(max(begin + size if begin < 0 else begin, 0), last)
            steps[axis] = stride
        return Value("slice", shape, data.dtype, (data,), (starts, steps))

    def _take(self, call: Any, data: Value, indices: Value) -> Value:
        array = constant(call.args[1])
        axis = call.attrs.axis
        if array is None and data in self._known and len(data.shape) == 1:
            return self._looked_up(call, data, indices)
        if array is None or axis is None or array.ndim > 1:
            raise _OtherForm("it takes elements at computed places")
        axis = int(axis) % len(data.shape)
        places = array.reshape(-1).tolist()
        step = places[1] - places[0] if len(places) > 1 else 1
        size = data.shape[axis]
        ranged = [places[0] + step * n for n in range(len(places))] == places and step > 0
        if not ranged or not isinstance(size, int) or not 0 <= places[0] <= places[-1] < size:
            raise _OtherForm("it takes elements in another order")
        starts, steps = [0] * len(data.shape), [1] * len(data.shape)
        starts[axis], steps[axis] = places[0], step
        shape = list(data.shape)
        shape[axis] = len(places)
        part = Value("slice", tuple(shape), data.dtype, (data,), (starts, steps))
        return part if array.ndim else _reshaped(part, self._shape(call))

    def _parts(self, call: Any) -> list[Value]:
        data = self._value(call.args[0])
        axis = int(call.attrs.axis) % len(data.shape)
        begin = 0
        parts = []
        for field in call.ty.fields:
            shape = tuple(self._size(dim) for dim in field.shape)
            starts = [begin if place == axis else 0 for place in range(len(shape))]
            detail = (starts, [1] * len(shape))
            parts.append(Value("slice", shape, data.dtype, (data,), detail))
            begin += shape[axis]
        return parts

    def _fields(self, expr: Any) -> list[Value]:
        if isinstance(expr, relax.Tuple):
            return [self._value(field) for field in expr.fields]
        fields: list[Value] = self._values[expr]
        return fields

    def _stacked(self, call: Any) -> Value:
        shape = self._shape(call)
        axis = int(call.attrs.axis or 0) % len(shape)
        entry = (*shape[:axis], 1, *shape[axis + 1 :])
        fields = self._fields(call.args[0])
        operands = tuple(_reshaped(field, entry) for field in fields)
        result = Value("concat", shape, self._dtype(call), operands, axis)
        self._stacks[result] = axis, fields
        return result

    def _joined(self, call: Any) -> Value:
        operands = self._fields(call.args[0])
        shape = self._shape(call)
        axis = int(call.attrs.axis) % len(shape)
        return Value("concat", shape, self._dtype(call), tuple(operands), axis)

    # -- sums --------------------------------------------------------------------------------------

    def _reduced(self, call: Any, data: Value, name: str) -> Value:
        rank = len(data.shape)
        axes = call.attrs.axis
        chosen = list(range(rank)) if axes is None else sorted(int(a) % rank for a in axes)
        kept = tuple(size for axis, size in enumerate(data.shape) if axis not in chosen)
        axis, fields = self._stacks.get(data, (None, []))
        if name in ("max", "min") and chosen == [axis]:  # ONNX's Max and Min, as TVM imports them
            result = fields[0]
            for entry in fields[1:]:
                function, cost = _BINARY[name + "imum"]
                result = Value("map", kept, data.dtype, (result, entry), function, cost)
        else:
            result = Value("reduce", kept, data.dtype, (data,), tuple(chosen), name)
        return _reshaped(result, self._shape(call))

    def _sum(self, call: Any, data: Value) -> Value:
        return self._reduced(call, data, "sum")

    def _max(self, call: Any, data: Value) -> Value:
        return self._reduced(call, data, "max")

    def _min(self, call: Any, data: Value) -> Value:
        return self._reduced(call, data, "min")

    def _prod(self, call: Any, data: Value) -> Value:
        return self._reduced(call, data, "prod")

    def _mean(self, call: Any, data: Value) -> Value:
        total = self._reduced(call, data, "sum")
        sizes = [
            size
            for axis, size in enumerate(data.shape)
            if call.attrs.axis is None
            or axis in [int(a) % len(data.shape) for a in call.attrs.axis]
        ]
        if not all(isinstance(size, int) for size in sizes):
            raise _OtherForm("it averages over a symbolic size")
        count = math.prod(sizes)

        def function(x: Expr, lanes: int) -> Expr:
            return _divide(x, emit.constant(count, data.dtype, lanes), lanes)

        return self._map(call, function, 2, [total])

    def _nn_softmax(self, call: Any, data: Value) -> Value:
        scaled, total = self._exponentials(call, data)
        operands = (self._like(data, "exp", scaled), total)
        return Value("map", data.shape, data.dtype, operands, lambda a, b, _: a / b, 2)

    def _nn_log_softmax(self, call: Any, data: Value) -> Value:
        scaled, total = self._exponentials(call, data)
        operands = (scaled, self._like(total, "log", total))
        return Value("map", data.shape, data.dtype, operands, lambda a, b, _: a - b, 1)

    def _exponentials(self, call: Any, data: Value) -> tuple[Value, Value]:
        """The data less the largest along an axis, and the sum of its exponentials."""
        axis = int(call.attrs.axis) % len(data.shape)
        kept = tuple(size for place, size in enumerate(data.shape) if place != axis)
        ones = tuple(1 if place == axis else size for place, size in enumerate(data.shape))

        def along(value: Value, name: str) -> Value:
            return _reshaped(Value("reduce", kept, data.dtype, (value,), (axis,), name), ones)

        operands = (data, along(data, "max"))
        less = Value("map", data.shape, data.dtype, operands, lambda a, b, _: a - b, 1)
        return less, along(self._like(data, "exp", less), "sum")

    @staticmethod
    def _like(shape: Value, name: str, operand: Value) -> Value:
        function, cost = _UNARY[name]
        return Value("map", shape.shape, shape.dtype, (operand,), function, cost)

    def _matmul(self, call: Any, left: Value, right: Value) -> Value:
        shape = self._shape(call)
        vector = len(left.shape) == 1, len(right.shape) == 1
        left = _reshaped(left, (1, *left.shape)) if vector[0] else left
        right = _reshaped(right, (*right.shape, 1)) if vector[1] else right
        rows, columns = left.shape[-2], right.shape[-1]
        leading = shape[: len(shape) - (not vector[0]) - (not vector[1])]
        whole = (*leading, rows, columns)
        result = self._product(left, right, whole)
        if result is None:
            # Columns and what is summed over are the last two axes.
            order = [*range(len(right.shape) - 2), len(right.shape) - 1, len(right.shape) - 2]
            turned = Value(
                "permute", tuple(right.shape[axis] for axis in order), right.dtype, (right,),
                tuple(order),
            )  # fmt: skip
            one = _reshaped(left, (*left.shape[:-1], 1, left.shape[-1]))
            other = _reshaped(turned, (*turned.shape[:-2], 1, *turned.shape[-2:]))
            terms = Value(
                "map", (*whole, left.shape[-1]), left.dtype, (one, other), lambda a, b, _: a * b, 1
            )
            result = Value("reduce", whole, left.dtype, (terms,), (len(whole),), "sum")
        return _reshaped(result, shape)

    def _product(self, left: Value, right: Value, shape: tuple[Any, ...]) -> Value | None:
        """A product with constant weights; None where no kernel takes such operands."""
        weights = self._as_weights(right)
        if weights is None or weights.dtype == "float32":
            return weights and Value("product", shape, left.dtype, (left, weights))
        # Codes become int16. Where their zero point does not allow for it, another number is
        # subtracted, and the sums are corrected.
        low, high = self._range(left)
        if high - low >= 2**16:
            return None
        offset = 0 if _fits((low, high), "int16") else low + 2**15

        def centred(x: Expr, lanes: int) -> Expr:
            return emit.cast(x - emit.constant(offset, left.dtype, lanes), "int16", lanes)

        codes = Value("map", left.shape, "int16", (left,), centred, 1)
        depth = int(weights.shape[-2])
        if depth % 2:  # codes are read in pairs
            column = (*left.shape[:-1], 1)
            zero = Value("broadcast", column, "int16", (Value("constant", (), "int16", (), 0),))
            even = (*left.shape[:-1], depth + 1)
            codes = Value("concat", even, "int16", (codes, zero), len(even) - 1)
        product = Value("product", shape, left.dtype, (codes, weights))
        if not offset:
            return product
        bits = 64 if left.dtype == "int64" else 32
        sums = self._known[right].astype(np.int64).sum(axis=-2, keepdims=True) * offset
        correction = self._constant(sums.astype(left.dtype))

        def corrected(x: Expr, more: Expr, lanes: int) -> Expr:
            return emit.wrapping("add", x, more, lanes, bits)

        return Value("map", shape, left.dtype, (product, correction), corrected, 1)


def _steps(data: Value, layout: SoftEdge) -> Value:
    """Whole finest steps of soft-edge codes, int32."""

    def function(x: Expr, lanes: int) -> Expr:
        return kernels_soft_edge.decoded(layout, x, lanes)

    return Value("map", data.shape, "int32", (data,), function, 3 * len(layout.pieces()))


_CODES = ("int8", "uint8", "int16", "uint16")


def _codes(dtype: str, zero_point: int, low: int, high: int, form: str = "float") -> Codes:
    return Codes(dtype, zero_point, low, high, form)  # type: ignore[arg-type]  # names out of the IR


def _fits(bounds: tuple[int, int], dtype: str) -> bool:
    """Whether numbers between bounds are of a type."""
    limits = np.iinfo(dtype)
    return bool(limits.min <= bounds[0] and bounds[1] <= limits.max)


def _reshaped(value: Value, shape: tuple[Any, ...]) -> Value:
    same = len(shape) == len(value.shape) and all(
        a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
        for a, b in zip(shape, value.shape, strict=True)
    )
    return value if same else Value("reshape", shape, value.dtype, (value,))


def _integers(expr: Any) -> list[int]:
    """Numbers of a tuple or shape in the IR."""
    if expr is None:
        return []
    entries = getattr(expr, "fields", None) or getattr(expr, "values", None) or []
    found = [scalar(entry) for entry in entries]
    if any(entry is None for entry in found):
        raise _OtherForm("a part of a tensor has computed bounds")
    return [int(entry) for entry in found if entry is not None]


# --------------------------------------------------------------------------- the pass


class _Lowering:
    """Lowers the scans of one module."""

    def __init__(self, mod: Any, isa: Isa) -> None:
        self._mod = mod
        self._isa = isa
        self.functions: dict[Any, Any] = {}

    def __call__(self, rewriter: CallRewriter, call: Any, var: Any) -> Any:
        if operator(call) != ops.SCAN:
            return call
        body, captured, states, sequences = call.args
        arguments = [rewriter.value(entry) for entry in captured.fields]
        arguments = [
            value if constant(value) is not None else given
            for value, given in zip(arguments, captured.fields, strict=True)
        ]
        coded = [_Coded.of(rewriter, entry) for entry in sequences.fields]
        read = [
            entry if codes is None else codes.codes
            for entry, codes in zip(sequences.fields, coded, strict=True)
        ]
        try:
            reader = _Reader(self._mod[body], arguments, len(states.fields), coded, self._isa)
            step = reader.read()
            length = tirx.Var("steps", "int64")
            primitive = kernel(step, "recurrence", length, self._isa)
        except (_OtherForm, UsageError, RecursionError):  # the last of very long bodies
            return call
        given = [*(reader.arguments[value] for value in step.captured)]
        given += [*states.fields, *read]
        recognized = recognize(self._mod[body], arguments, len(states.fields))
        attributes = {"Composite": recognized.composite, "node": node_name(call) or var.name}
        for role, index in recognized.roles.items():
            # Captured values that no step needs are no parameters of the kernel.
            source = [*arguments, *states.fields, *read][index]
            places = [place for place, entry in enumerate(given) if entry.same_as(source)]
            attributes[role] = places[0] if index >= 0 and places else -1
        function = self._function(attributes, primitive, given, call)
        return relax.Call(function, given, span=call.span)

    def _function(
        self, attributes: dict[str, Any], primitive: Any, given: Sequence[Any], call: Any
    ) -> Any:
        """A private function that calls the kernel."""
        name = re.sub(r"\W", "_", attributes["node"])
        kernel_variable = self._add(f"{name}_kernel", as_block(primitive))
        sizes = Sizes()
        parameters = [
            relax.Var(f"p{index}", sizes.renewed(entry.ty)) for index, entry in enumerate(given)
        ]
        results = [sizes.renewed(field) for field in call.ty.fields]
        builder = relax.BlockBuilder()
        with builder.function(name, parameters, attrs=attributes, private=True):
            with builder.dataflow():
                made = builder.emit(relax.call_tir(kernel_variable, parameters, results))
                # One result is a tuple all the same.
                whole = made if len(results) > 1 else relax.Tuple([made])
                result = builder.emit_output(whole)
            builder.emit_func_output(result)
        (function,) = builder.get().functions.values()
        return self._add(name, function)

    def _add(self, name: str, function: Any) -> Any:
        taken = {v.name_hint for v in (*self._mod.get_global_vars(), *self.functions)}
        # TVM adds some later, and so does the second entry.
        taken |= {"main_transform_params", "main_link", "main_link_transform_params"}
        unique, number = name, 1
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        variable = global_variable(unique, function)
        self.functions[variable] = function
        return variable


@tvm.transform.module_pass(opt_level=0, name="LowerScan")
class LowerScan:
    """Make kernels of loops over time; see the module's docstring.

    Requires: loops as calls of ``bitwright.scan``. Ensures: a loop that a kernel computes is a call
    of a private function with the attributes ``node`` (the ONNX node) and ``Composite`` (a name of
    ``passes/recognize_scan.py``), whose body calls the kernel; it takes the codes of sequences that
    are dequantized. Where it is a selective scan, the attributes ``x``, ``dt``, ``B`` and
    ``C`` are indices of its parameters, -1 where none holds it.

    Parameters
    ----------
    isa
        Instruction set of the kernels: ``avx2`` or ``generic``; empty for the best of this machine.

    Raises
    ------
    UsageError
        If there is no such instruction set.
    """

    def __init__(self, isa: str = "") -> None:
        self.isa = isa
        find(isa)

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite every Relax function."""
        mod = mod.clone()  # the caller's stays what it is
        lowering = _Lowering(mod, find(self.isa))
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                mod[variable] = CallRewriter(mod, lowering).visit_expr(function)
        for variable, function in lowering.functions.items():
            mod[variable] = function
        return relax.transform.DeadCodeElimination()(mod)
