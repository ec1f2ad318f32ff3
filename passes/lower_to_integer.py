"""LowerToInteger: integer arithmetic instead of floats between quantizers.

The rules are those of ``docs/integer-semantics.md``, operator by operator, and the results equal
``quant/reference.py`` bit for bit::

    x = R.dequantize(q, s_x, 0)                    x = R.astype(q, "int32")
    w = R.dequantize(R.const(codes), s_w, 0)       w = R.astype(R.const(codes), "int32")
    c = R.nn.conv2d(x, w)                      ->  c = R.nn.conv2d(x, w)
    b = R.add(c, bias)                             b = R.add(c, R.const(bias_codes))
    r = R.nn.relu(b)                               q1 = bitwright.requantize(b, M, low=0, ...)
    q1 = R.quantize(r, s_y, 0)

Sums, products and averages of activations likewise; elementwise functions of codes become tables,
in front of ``bitwright.soft_edge_encode`` too. Soft-edge codes are decoded to integers.
Where a result leaves the integers it is ``float32(accumulator) * scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, te, tirx

from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.expressions import (
    Array,
    CallRewriter,
    along,
    bindings,
    clip_bits,
    code_bits,
    constant,
    is_integer_layer,
    node_name,
    operator,
    quantizer,
    rewriting,
    scalar,
    soft_edge,
    static_shape,
    with_span,
)
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

__all__ = ["CHANNELWISE", "LowerToInteger"]

#: Attribute of a primitive function of one operand that keeps its axis 1, index by index.
CHANNELWISE = "bitwright.channelwise"

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Codes:
    """A dequantized tensor; fields as in the integer reference."""

    expr: Any
    scale: npt.NDArray[np.float32]
    zero_point: IntArray
    axis: int
    type: TensorQuantization | None  # None for per-channel scales and 32-bit biases
    stored: IntArray | None  # centred codes of a constant

    @property
    def magnitude(self) -> int:
        assert self.type is not None
        low, high = self.type.code_min, self.type.code_max
        return max(high - self.type.zero_point, self.type.zero_point - low)


@dataclass(frozen=True)
class _Accumulator:
    """Integer sums before requantization; ``emit`` builds them with ``int32`` or ``int64``."""

    emit: Callable[[str], Any]
    scale: npt.NDArray[np.float32]
    bound: float
    clamp: tuple[float, float] = (-np.inf, np.inf)

    @property
    def dtype(self) -> str:
        return f"int{accumulator_bits(self.bound)}"


@dataclass(frozen=True)
class _Function:
    """A function of codes, element by element: its float value at every index, and the index.

    ``root`` is the dequantized tensor that the function is built from; None if it is a table
    already.
    """

    index: Callable[[], Any]
    values: Callable[[], Array]
    root: Any = None


# One value of the result depends on one of the operand. Constants of one element may join in.
_ELEMENTWISE = frozenset(
    "abs add ceil clip cos divide erf exp floor log maximum minimum multiply negative nn.gelu"
    " nn.gelu_tanh nn.leakyrelu nn.relu nn.silu nn.softplus power round rsqrt sigmoid sign sin sqrt"
    " square subtract tanh".split()
)


def _storage(values: IntArray) -> Any:
    """Constant of the narrowest type that holds the values."""
    for dtype in (np.int8, np.int16, np.int32):
        limits = np.iinfo(dtype)
        if values.min(initial=0) >= limits.min and values.max(initial=0) <= limits.max:
            return _tensor(values, np.dtype(dtype).name)
    return _tensor(values, "int64")


def _tensor(values: npt.ArrayLike, dtype: str) -> Any:
    """Constant of exactly this type; by itself TVM makes int64 arrays int32."""
    return relax.const(np.array(values, dtype, order="C"), dtype)


class _Lowering:
    """The rules; one object a function."""

    def __init__(self, function: Any, requantization: RequantizationForm) -> None:
        self._form = requantization
        # By the expression that a variable is bound to: outputs of a block are aliases.
        self._values: dict[Any, _Accumulator | _Function] = {}
        self._bits: dict[Any, int] = {}
        attrs = function.attrs
        widths = list(attrs["input_bits"]) if attrs and "input_bits" in attrs else []
        self._parameter_bits = [int(width) for width in widths]
        self._parameters = list(function.params)
        self._clips = self._narrow_types(function)

    @staticmethod
    def _narrow_types(function: Any) -> dict[Any, int]:
        """Width of the codes of a quantizer whose only use is a clip to fewer bits."""
        bound = bindings(function)
        users: dict[Any, list[Any]] = {}
        for var, value in bound.items():
            if isinstance(value, relax.Call):
                for used in relax.analysis.free_vars(value):
                    users.setdefault(used, []).append(var)
        outputs = set(relax.analysis.free_vars(function.body.body))
        found = {}
        for var, value in bound.items():
            uses = users.get(var, [])
            if operator(value) != "quantize" or len(uses) != 1 or var in outputs:
                continue
            bits = clip_bits(bound[uses[0]]) if operator(bound[uses[0]]) == "clip" else None
            if bits is not None:
                found[var] = bits
        return found

    def __call__(self, rewriter: CallRewriter, call: Any, var: Any) -> Any:
        for old, width in zip(self._parameters, self._parameter_bits, strict=False):
            self._bits[rewriter.value(rewriter.visit_expr(old))] = width
        self._parameter_bits = []
        name = operator(call)
        if not name:
            return self._called(rewriter, call, var)
        if name == "quantize":
            return self._quantize(rewriter, call, var)
        if name == ops.SOFT_EDGE_ENCODE:
            return self._encode(rewriter, call)
        if name == "clip":
            bits = self._bits.get(rewriter.value(call.args[0]))
            if bits is not None and bits <= (clip_bits(call) or 0):
                return call.args[0]
        value = self._compute(rewriter, call, name)
        if value is None:
            return call
        if isinstance(value, _Function):  # as it is, until a quantizer asks for its table
            bound = rewriter.emit(call, var.name)
        else:
            bound = rewriter.emit(with_span(self._to_float(rewriter, value), call), var.name)
        self._values[rewriter.value(bound)] = value
        return bound

    def _called(self, rewriter: CallRewriter, call: Any, var: Any) -> Any:
        """Note the width of the codes that a composite function returns."""
        if not isinstance(call.op, tvm.ir.GlobalVar):
            return call
        attrs = rewriter.builder_.get()[call.op].attrs
        if not attrs or "output_bits" not in attrs:
            return call
        bound = rewriter.emit(call, var.name)
        self._bits[rewriter.value(bound)] = int(attrs["output_bits"])
        return bound

    # -- operands ------------------------------------------------------------------------------

    def _codes(self, rewriter: CallRewriter, expr: Any) -> _Codes | None:
        found = quantizer(rewriter.value(expr), "dequantize")
        if found is None:
            return None
        stored = constant(found.operand)
        described = None
        if found.per_tensor and found.dtype in ("int8", "uint8", "int16", "uint16"):
            bits = (
                None if stored is not None else code_bits(found.operand, rewriter.value, self._bits)
            )
            described = found.type(bits, soft_edge(rewriter.value(found.operand)))
        if stored is not None:
            rank = stored.ndim
            zero_points = along(found.zero_point, found.axis, rank)
            stored = stored.astype(np.int64) - zero_points
        return _Codes(found.operand, found.scale, found.zero_point, found.axis, described, stored)

    @staticmethod
    def _centred(rewriter: CallRewriter, codes: _Codes, dtype: str) -> Any:
        """Codes less their zero point, as integers that products and sums fit."""
        if codes.stored is not None:
            return rewriter.emit(relax.op.astype(_storage(codes.stored), dtype))
        wide = rewriter.emit(relax.op.astype(codes.expr, dtype))
        zero_point = int(codes.zero_point)
        if zero_point:
            wide = rewriter.emit(relax.op.subtract(wide, _tensor(zero_point, dtype)))
        return wide

    def _accumulator(self, rewriter: CallRewriter, expr: Any) -> _Accumulator | None:
        value = self._values.get(rewriter.value(expr))
        return value if isinstance(value, _Accumulator) else None

    # -- operators -----------------------------------------------------------------------------

    def _compute(
        self, rewriter: CallRewriter, call: Any, name: str
    ) -> _Accumulator | _Function | None:
        if is_integer_layer(call, rewriter.value):
            return self._layer(rewriter, call, name)
        if name == "take":
            return self._table(call)
        if name == "add":
            for index in (0, 1):
                accumulator = self._accumulator(rewriter, call.args[index])
                if accumulator is not None:
                    return self._biased(rewriter, accumulator, call.args[1 - index])
        if name in ("nn.relu", "clip", "maximum", "minimum"):
            clamped = self._clamped(rewriter, call, name)
            if clamped is not None:
                return clamped
        if name in _ELEMENTWISE:
            function = self._elementwise(rewriter, call)
            if function is not None:
                return function
        if name in ("add", "subtract", "multiply"):
            left, right = (self._codes(rewriter, argument) for argument in call.args)
            if left is None or right is None or left.type is None or right.type is None:
                return None
            return self._arithmetic(rewriter, name, left, right)
        if name in ("mean", "sum") or name.startswith("nn.avg_pool"):
            codes = self._codes(rewriter, call.args[0])
            if codes is None or codes.type is None:
                return None
            if name in ("mean", "sum"):
                return self._reduced(rewriter, call, name, codes)
            return self._pooled(rewriter, call, codes)
        return None

    def _layer(self, rewriter: CallRewriter, call: Any, name: str) -> _Accumulator:
        left, right = (self._codes(rewriter, argument) for argument in call.args)
        assert left is not None
        assert right is not None
        convolution = name != "matmul"
        weights_left = not convolution and left.stored is not None and right.stored is None
        data, weights = (right, left) if weights_left else (left, right)
        assert data.type is not None
        rank = call.args[0 if weights_left else 1].ty.ndim
        axis: int | None = 0
        if not convolution:
            axis = None if rank < 2 else rank - 2 if weights_left else rank - 1
        if weights.stored is not None:
            bound = accumulator_bound(weights.stored, axis, data.type)
        else:
            shape = static_shape(call.args[1 if convolution else 0]) or []
            terms = math.prod(n for n in (shape[1:] if convolution else shape[-1:]) if n)
            bound = float(data.magnitude * weights.magnitude * terms)
        behind = 0
        if convolution:
            behind = rank - 2
        elif weights_left:
            behind = 1 if call.args[1].ty.ndim > 1 else 0
        scale = np.asarray(data.scale * weights.scale, np.float32)
        scale = scale.reshape((-1, *(1,) * behind) if weights.scale.size > 1 else ())

        def emit(dtype: str) -> Any:
            operands = [self._centred(rewriter, codes, dtype) for codes in (left, right)]
            if convolution:
                attrs = call.attrs
                function = getattr(relax.op.nn, name.removeprefix("nn."))
                product = function(
                    *operands,
                    strides=list(attrs.strides),
                    padding=list(attrs.padding),
                    dilation=list(attrs.dilation),
                    groups=int(attrs.groups),
                    data_layout=attrs.data_layout,
                    kernel_layout=attrs.kernel_layout,
                    out_dtype=dtype,
                )
            else:
                product = relax.op.matmul(*operands, out_dtype=dtype)
            return rewriter.emit(with_span(product, call))

        return _Accumulator(emit, scale, bound)

    def _biased(
        self, rewriter: CallRewriter, accumulator: _Accumulator, operand: Any
    ) -> _Accumulator | None:
        """Add a constant; None where it does not fit."""
        if accumulator.clamp != (-np.inf, np.inf):
            return None
        codes = self._codes(rewriter, operand)
        bias = constant(rewriter.value(operand))
        if codes is not None and codes.stored is not None:
            scale = along(codes.scale, codes.axis, codes.stored.ndim)
            if np.all(scale == accumulator.scale):
                bound = accumulator.bound + float(np.abs(codes.stored).max(initial=0))
                added = codes.stored
                return replace(accumulator, emit=_add(rewriter, accumulator, added), bound=bound)
            bias = codes.stored.astype(np.float32) * scale
        if bias is None:
            return None
        steps = bias_steps(bias, accumulator.scale, accumulator.bound)
        if steps is None:
            return None
        shift, added = steps
        bounds = np.ldexp(accumulator.bound, shift) + np.abs(added.astype(np.float64))
        return replace(
            accumulator,
            emit=_add(rewriter, accumulator, added, shift),
            scale=np.ldexp(accumulator.scale, -shift),
            bound=float(np.max(bounds, initial=0.0)),
        )

    def _arithmetic(
        self, rewriter: CallRewriter, name: str, left: _Codes, right: _Codes
    ) -> _Accumulator:
        assert left.type is not None
        assert right.type is not None
        if name == "multiply":

            def product(dtype: str) -> Any:
                operands = [self._centred(rewriter, codes, dtype) for codes in (left, right)]
                return rewriter.emit(relax.op.multiply(*operands))

            scale = np.asarray(left.scale * right.scale, np.float32)
            return _Accumulator(product, scale, float(left.magnitude * right.magnitude))
        bits = max(left.type.bits, right.type.bits)
        factors, step = sum_multipliers((float(left.scale), float(right.scale)), bits)
        combine = relax.op.add if name == "add" else relax.op.subtract

        def total(dtype: str) -> Any:
            terms = []
            for codes, factor in zip((left, right), factors, strict=True):
                wide = self._centred(rewriter, codes, dtype)
                terms.append(rewriter.emit(relax.op.multiply(wide, _tensor(factor, dtype))))
            return rewriter.emit(combine(*terms))

        bound = float(factors[0] * left.magnitude + factors[1] * right.magnitude)
        return _Accumulator(total, np.array(step, np.float32), bound)

    def _clamped(self, rewriter: CallRewriter, call: Any, name: str) -> _Accumulator | None:
        accumulator = self._accumulator(rewriter, call.args[0])
        bounds: list[Any] = [scalar(argument) for argument in call.args[1:]]
        if accumulator is None or None in bounds:
            return None
        limits = {
            "nn.relu": (0.0, np.inf),
            "clip": tuple(bounds),
            "maximum": (*bounds, np.inf),
            "minimum": (-np.inf, *bounds),
        }[name]
        low, high = (float(np.clip(bound, *limits)) for bound in accumulator.clamp)
        return replace(accumulator, clamp=(low, high))

    def _reduced(
        self, rewriter: CallRewriter, call: Any, name: str, codes: _Codes
    ) -> _Accumulator | None:
        assert codes.type is not None
        shape = static_shape(call.args[0])
        if shape is None:
            return None
        axes = call.attrs.axis
        axes = range(len(shape)) if axes is None else [int(axis) for axis in axes]
        sizes = [shape[axis] for axis in axes]
        if None in sizes:
            return None  # the divisor is known when the model runs
        terms = math.prod(size for size in sizes if size is not None)

        def total(dtype: str) -> Any:
            wide = self._centred(rewriter, codes, dtype)
            return rewriter.emit(relax.op.sum(wide, list(axes), bool(call.attrs.keepdims)))

        divisor = terms if name == "mean" else 1
        scale = np.asarray(np.float64(codes.scale) / divisor, np.float32)
        return _Accumulator(total, scale, float(codes.magnitude * terms))

    def _pooled(self, rewriter: CallRewriter, call: Any, codes: _Codes) -> _Accumulator | None:
        assert codes.type is not None
        attrs = call.attrs
        kernel = [int(size) for size in attrs.pool_size]
        rank = len(kernel)
        strides, dilations = ([int(n) for n in e] for e in (attrs.strides, attrs.dilation))
        padding = [int(n) for n in attrs.padding]
        shapes = static_shape(call.args[0]), static_shape(call)
        sizes, outputs = ([n for n in (shape or [])[2:] if n is not None] for shape in shapes)
        if len(sizes) != rank or len(outputs) != rank:
            return None
        counts = np.ones(())
        for axis in range(rank):
            # Terms along one axis: how many positions of each window ONNX divides by.
            before, size = padding[axis], sizes[axis]
            start = np.arange(outputs[axis])[:, None] * strides[axis] - before
            place = start + np.arange(kernel[axis])[None] * dilations[axis]
            if attrs.count_include_pad:
                inside = (place >= -before) & (place < size + padding[rank + axis])
            else:
                inside = (place >= 0) & (place < size)
            counts = np.multiply.outer(counts, inside.sum(axis=1))
        divisor = np.maximum(counts, 1).astype(np.float64)
        if np.all(divisor == divisor.flat[0]):
            divisor = divisor.reshape(-1)[0:1].reshape(())

        def total(dtype: str) -> Any:
            wide = self._centred(rewriter, codes, dtype)
            return rewriter.builder_.emit_te(
                _window_sums,
                wide,
                kernel,
                strides,
                dilations,
                padding,
                outputs,
                primfunc_attrs={CHANNELWISE: True},
            )

        scale = np.asarray(np.float64(codes.scale) / divisor).astype(np.float32)
        return _Accumulator(total, scale, float(codes.magnitude * math.prod(kernel)))

    @staticmethod
    def _table(call: Any) -> _Function | None:
        values = constant(call.args[0])
        if values is None or values.ndim != 1 or values.dtype != np.float32:
            return None
        return _Function(lambda: call.args[1], lambda: values)

    def _elementwise(self, rewriter: CallRewriter, call: Any) -> _Function | None:
        roots = []
        for argument in call.args:
            value = self._values.get(rewriter.value(argument))
            if isinstance(value, _Function):
                roots.append(value.root)
            elif isinstance(argument, relax.Var):
                roots.append(rewriter.value(argument))
            elif scalar(argument) is None:
                return None
        found = quantizer(roots[0], "dequantize") if roots and roots[0] is not None else None
        if found is None or not all(root is not None and root.same_as(roots[0]) for root in roots):
            return None
        codes = self._codes(rewriter, roots[0])
        if codes is None or codes.type is None or codes.stored is not None:
            return None
        if call.ty.ndim != roots[0].ty.ndim:
            return None
        kind, root = codes.type, roots[0]
        return _Function(
            lambda: self._index(rewriter, codes),
            lambda: _tabulate(rewriter, call, root, _values(kind)),
            root,
        )

    # -- ends ----------------------------------------------------------------------------------

    @staticmethod
    def _to_float(rewriter: CallRewriter, accumulator: _Accumulator) -> Any:
        sums = accumulator.emit(accumulator.dtype)
        wide = rewriter.emit(relax.op.astype(sums, "float32"))
        result = relax.op.multiply(wide, _tensor(accumulator.scale, "float32"))
        low, high = accumulator.clamp
        if low > -np.inf:
            result = relax.op.maximum(rewriter.emit(result), _tensor(low, "float32"))
        if high < np.inf:
            result = relax.op.minimum(rewriter.emit(result), _tensor(high, "float32"))
        return result

    def _quantize(self, rewriter: CallRewriter, call: Any, var: Any) -> Any:
        wanted = quantizer(call, "quantize")
        if wanted is None or not wanted.per_tensor:
            return call
        output = wanted.type(self._clips.get(var))
        value = self._values.get(rewriter.value(wanted.operand))
        if isinstance(value, _Accumulator):
            constants = Requantization.between(value.scale, output, value.clamp)
            if self._form == "fixed" and value.dtype == "int64":
                origin = node_name(rewriter.value(wanted.operand)) or var.name
                raise UsageError(
                    f"{origin} makes sums of 64 bits; the fixed form of requantization takes 32",
                    fix="give it fewer bits (operators between layers: --elementwise-bits 8), or "
                    "leave requantization at float",
                )
            codes = ops.requantize(
                value.emit(value.dtype),
                _tensor(constants.multiplier, "float32"),
                zero_point=output.zero_point,
                low=constants.low,
                high=constants.high,
                dtype=wanted.dtype,
                form=self._form,
            )
        else:
            if value is None:
                value = self._rescaled(rewriter, wanted.operand)
            if value is None:
                return call
            table = quantize_float(value.values(), output.scale, output)
            # Indices are codes and thus in range; the mode "fast" would warn that it does not look.
            codes = relax.op.take(_tensor(table, wanted.dtype), value.index(), axis=0, mode="clip")
        bound = rewriter.emit(with_span(codes, call), var.name)
        self._bits[rewriter.value(bound)] = output.bits
        return bound

    def _encode(self, rewriter: CallRewriter, call: Any) -> Any:
        """Soft-edge codes of a function of codes: a table; of sums as they leave the integers."""
        step = scalar(call.args[1])
        value = self._values.get(rewriter.value(call.args[0]))
        if step is None or isinstance(value, _Accumulator):
            return call
        if value is None:
            value = self._rescaled(rewriter, call.args[0])
        if value is None:
            return call
        layout = ops.layout_of(call)
        table = _tensor(layout.encode(value.values(), step), layout.dtype)
        return with_span(relax.op.take(table, value.index(), axis=0, mode="clip"), call)

    def _rescaled(self, rewriter: CallRewriter, operand: Any) -> _Function | None:
        """Codes that get another scale: a function of codes like any other."""
        codes = self._codes(rewriter, operand)
        if codes is None or codes.type is None or codes.stored is not None:
            return None
        kind = codes.type
        return _Function(lambda: self._index(rewriter, codes), lambda: _values(kind))

    @staticmethod
    def _index(rewriter: CallRewriter, codes: _Codes) -> Any:
        """Place of codes in a table that starts with the smallest code of their type."""
        assert codes.type is not None
        index = rewriter.emit(relax.op.astype(codes.expr, "int32"))
        low = codes.type.code_min
        return rewriter.emit(relax.op.subtract(index, _tensor(low, "int32"))) if low else index


def _values(kind: TensorQuantization) -> npt.NDArray[np.float32]:
    """Value of every code of a type, as ``R.dequantize`` computes it."""
    centred = np.arange(kind.code_min, kind.code_max + 1) - kind.zero_point
    return np.asarray(centred.astype(np.float32) * np.float32(kind.scale))


def _tabulate(rewriter: CallRewriter, call: Any, root: Any, values: Array) -> Array:
    """Evaluate a chain of elementwise operators that starts at ``root`` on a vector."""
    start = relax.Var("x", relax.TensorType(values.shape, "float32"))
    builder = relax.BlockBuilder()
    made: dict[Any, Any] = {}

    def rebuilt(expr: Any) -> Any:
        value = rewriter.value(expr)
        if value.same_as(root):
            return start
        if value not in made:
            made[value] = again(value)
        return made[value]

    def again(value: Any) -> Any:
        if not isinstance(value, relax.Call):
            array = constant(value)
            return value if array is None else _tensor(array.reshape(()), array.dtype.name)
        arguments = [rebuilt(argument) for argument in value.args]
        return builder.emit(relax.Call(value.op, arguments, value.attrs, value.ty_args))

    with builder.function("main", [start]):
        result = rebuilt(call)
        builder.emit_func_output(result)
    executable = tvm.compile(builder.get(), target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return np.asarray(machine["main"](tvm.runtime.tensor(values)).numpy())


def _add(
    rewriter: CallRewriter,
    accumulator: _Accumulator,
    added: IntArray,
    shift: IntArray | None = None,
) -> Callable[[str], Any]:
    def emit(dtype: str) -> Any:
        sums = accumulator.emit(dtype)
        if shift is not None and np.any(shift):
            sums = rewriter.emit(relax.op.left_shift(sums, _tensor(shift, dtype)))
        return rewriter.emit(relax.op.add(sums, _tensor(added, dtype)))

    return emit


def _window_sums(
    x: Any,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    padding: list[int],
    outputs: list[int],
) -> Any:
    """Sums over windows of [N, C, *spatial]; what lies outside counts as 0."""
    axes = [te.reduce_axis((0, size), f"k{index}") for index, size in enumerate(kernel)]

    def element(batch: Any, channel: Any, *position: Any) -> Any:
        places = [
            where * stride + axis * dilation - before
            for where, stride, axis, dilation, before in zip(
                position, strides, axes, dilations, padding, strict=False
            )
        ]
        inside = [
            test
            for place, size in zip(places, x.shape[2:], strict=True)
            for test in (place >= 0, place < size)
        ]
        value = tirx.if_then_else(tirx.all(*inside), x[(batch, channel, *places)], 0)
        return te.sum(value.astype(x.dtype), axis=axes)

    return te.compute([*x.shape[:2], *outputs], element, name="window_sums")


@tvm.transform.module_pass(opt_level=0, name="LowerToInteger")
class LowerToInteger:
    """Replace float arithmetic between quantizers by integers; see the module's docstring.

    Requires: dequantizers directly in front of what computes and quantizers directly behind
    (PropagateQuantization). Ensures: no float operator stands between codes and codes where the
    arithmetic is exact in integers; every integer result equals the integer reference bit for bit.

    Parameters
    ----------
    requantization
        ``float`` multipliers, or ``fixed``: integers and a shift, for hardware without floats.

    Raises
    ------
    UsageError
        If there is no such form, or sums of 64 bits meet the fixed one.
    """

    def __init__(self, requantization: RequantizationForm = "float") -> None:
        if requantization not in ("float", "fixed"):
            raise UsageError(
                f"{requantization!r} is no requantization", fix="choose float or fixed"
            )
        self.requantization = requantization

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite every Relax function, composites first, since others call them."""
        return rewriting(self._rewrite)(mod)

    def _rewrite(self, mod: Any) -> Any:
        functions = [
            (variable, function)
            for variable, function in mod.functions_items()
            if isinstance(function, relax.Function)
        ]
        functions.sort(key=lambda entry: "Composite" not in (entry[1].attrs or {}))
        for variable, function in functions:
            rewriter = CallRewriter(mod, _Lowering(function, self.requantization))
            changed = rewriter.visit_expr(function)
            mod = rewriter.builder_.get()
            mod[variable] = changed
        return mod
