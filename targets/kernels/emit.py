"""Pieces of TIR that all kernels are made of.

Kernels are written with TVM's IR builder: Python loops unroll, ``loop`` makes loops that stay. All
buffers are flat and all indices int64, so that nothing depends on how TVM lowers shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from typing import Any, TypeAlias

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels.host import Isa
from bitwright.targets.kernels.spec import (
    Accumulators,
    ActivationMatmul,
    Codes,
    Convolution,
    Matmul,
)

_LONGEST_SHUFFLE = 4  # strides beyond this read element by element

Layer: TypeAlias = Convolution | Matmul | ActivationMatmul
Expr: TypeAlias = Any  # TVM ships no types
Buffer: TypeAlias = Any


def in_three(numbers: tuple[int, ...], missing: int = 1) -> tuple[int, int, int]:
    """Numbers for depth, rows and columns, of one to three spatial axes."""
    depth, rows, columns = (missing,) * (3 - len(numbers)) + numbers
    return depth, rows, columns


def ceil_div(number: int, divisor: int) -> int:
    """Quotient of positive integers, rounded up."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """Round up to the next multiple."""
    return ceil_div(number, multiple) * multiple


@contextmanager
def loop(extent: Expr, kind: str = "serial") -> Iterator[Expr]:
    """Open a ``serial`` or ``parallel`` loop from 0; a loop of one turn leaves no trace."""
    if isinstance(extent, int):
        if extent == 1 and kind == "serial":
            yield 0
            return
        extent = tirx.IntImm("int64", extent)
    frames = {"serial": T.serial, "parallel": T.parallel}
    with frames[kind](tirx.IntImm("int64", 0), extent) as index:
        yield index


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Guard statements; a condition known to hold (True) leaves no trace."""
    if condition is True:
        yield
        return
    with T.If(condition), T.Then():
        yield


def bind(value: Expr) -> Expr:
    """Compute an expression once."""
    return value if isinstance(value, int) else T.Bind(value)


def lesser(a: Expr, b: Expr) -> Expr:
    """Minimum of numbers or index expressions."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return T.min(index(a), index(b))


def greater(a: Expr, b: Expr) -> Expr:
    """Maximum of numbers or index expressions."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return T.max(index(a), index(b))


def index(value: Expr) -> Expr:
    """Return a number or an index expression as an index expression."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def within(depth: Expr, depths: int, row: Expr, rows: int) -> Expr:
    """Say whether a row of an image exists; True where that is known."""
    conditions = [
        T.And(index(place) >= 0, index(place) < length)
        for place, length in ((depth, depths), (row, rows))
        if not (isinstance(place, int) and 0 <= place < length)
    ]
    if not conditions:
        return True
    return conditions[0] if len(conditions) == 1 else T.And(*conditions)


def allocate(size: int, dtype: str, *, registers: bool = False) -> Buffer:
    """Allocate scratch memory; ``registers`` where LLVM shall keep all of it in registers."""
    return T.alloc_buffer((size,), dtype, scope="local" if registers else "global")


def load(buffer: Buffer, offset: Expr, lanes: int, stride: int = 1) -> Expr:
    """Read a vector of consecutive elements, or of every ``stride``-th; a scalar for one lane.

    With a stride, elements before ``offset + lanes * stride`` are touched.
    """
    if lanes == 1:
        return buffer[index(offset)]
    if stride > _LONGEST_SHUFFLE:
        return buffer[T.ramp(index(offset), tirx.IntImm("int64", stride), lanes)]
    both = buffer[T.ramp(index(offset), tirx.IntImm("int64", 1), lanes * stride)]
    if stride == 1:
        return both
    return tirx.Shuffle([both], [tirx.IntImm("int32", stride * lane) for lane in range(lanes)])


def store(buffer: Buffer, offset: Expr, value: Expr, lanes: int) -> None:
    """Write consecutive elements; a scalar for one lane."""
    if lanes == 1:
        T.buffer_store(buffer, value, [index(offset)])
    else:
        T.buffer_store(buffer, value, [T.ramp(index(offset), tirx.IntImm("int64", 1), lanes)])


def constant(value: float, dtype: str, lanes: int) -> Expr:
    """Return a vector (or a scalar, for one lane) of equal numbers."""
    return broadcast(tirx.const(value, dtype), lanes)


def broadcast(value: Expr, lanes: int) -> Expr:
    """Return a vector of equal values; the scalar itself for one lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    """Convert a vector to another element type."""
    return value.astype(dtype if lanes == 1 else f"{dtype}x{lanes}")


def reinterpret(value: Expr, dtype: str, lanes: int) -> Expr:
    """Read the bits of a value as ``lanes`` elements of another type."""
    return T.reinterpret(value, dtype=dtype if lanes == 1 else f"{dtype}x{lanes}")


# --------------------------------------------------------------------------- functions


@dataclass(frozen=True)
class Arguments:
    """Flat buffers of a kernel; what the layer does not have is None."""

    data: Buffer
    weight: Buffer
    bias: Buffer | None
    shift: Buffer | None
    scale: Buffer | None
    result: Buffer


def output_dtype(spec: Layer) -> str:
    """Element type of a kernel's result."""
    if isinstance(spec.output, Accumulators):
        return f"int{spec.accumulator_bits}"
    return spec.output.dtype


def parameters(
    declared: Sequence[tuple[str, Sequence[Expr], str]], *, align: int = -1
) -> list[Buffer]:
    """Declare the tensor arguments (name, shape, type) and return them as flat buffers.

    They start at multiples of ``align`` bytes; -1: where TVM puts tensors.
    """
    matched = [
        T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype, align=align)
        for name, shape, dtype in declared
    ]
    return [
        T.decl_buffer(
            (prod(shape, start=tirx.IntImm("int64", 1)),), dtype, data=buffer.data, align=align
        )
        for buffer, (_, shape, dtype) in zip(matched, declared, strict=True)
    ]


def primitive_function(name: str, body: Callable[[], None]) -> Any:
    """Build a PrimFunc: ``body`` declares the parameters and emits the statements."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        body()
    return builder.get()


def arguments(
    spec: Convolution | Matmul,
    channels: int,
    data_shape: Sequence[Expr],
    weight_shape: Sequence[int],
    result_shape: Sequence[Expr],
) -> Arguments:
    """Declare the arguments of a layer's kernel, in the order that all kernels share."""
    declared: dict[str, tuple[Sequence[Expr], str]] = {
        "data": (data_shape, spec.data.dtype),
        "weight": (weight_shape, "int32"),
    }
    if spec.bias:
        declared["bias"] = ([channels], f"int{spec.accumulator_bits}")
    if spec.shift:
        declared["shift"] = ([channels], "int32")
    if not isinstance(spec.output, Accumulators):
        declared["scale"] = ([channels], "float32")
    declared["result"] = (result_shape, output_dtype(spec))
    buffers = parameters([(name, *what) for name, what in declared.items()])
    found = dict(zip(declared, buffers, strict=True))
    return Arguments(
        found["data"],
        found["weight"],
        found.get("bias"),
        found.get("shift"),
        found.get("scale"),
        found["result"],
    )


# --------------------------------------------------------------------------- arithmetic


def join(low: Expr, high: Expr, lanes: int) -> Expr:
    """Put two int32 vectors of int16 numbers into one, as pairs."""
    low = T.bitwise_and(low, constant(0xFFFF, "int32", lanes))
    return T.bitwise_or(low, T.shift_left(high, constant(16, "int32", lanes)))


def half(pair: Expr, which: Expr) -> Expr:
    """Take the lower (0) or upper (1) int16 number out of an int32 scalar, as int32."""
    up = tirx.Cast("int32", index(16 - 16 * which))
    return T.shift_right(T.shift_left(pair, up), tirx.const(16, "int32"))


def dot(isa: Isa, accumulator_bits: int, total: Expr, left: Expr, right: Expr) -> Expr:
    """Subtract the products of pairs of int16 from accumulators.

    Accumulators hold the negative of a sum: LLVM reorders the additions of an unrolled loop to
    shorten their chain until it runs out of registers, and leaves subtractions alone.

    Parameters
    ----------
    isa
        The instruction set.
    accumulator_bits
        32 or 64.
    total
        Accumulators, one a lane.
    left, right
        int32 vectors that hold pairs of int16.

    Notes
    -----
    The sum of two products lies in [-2^31 + 2^16, 2^31]. Wide accumulators take it less one, which
    fits 32 bits; :func:`start` makes up for the ones.
    """
    lanes = isa.lanes
    if isa.multiply_add is not None:
        pairs = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id(isa.multiply_add),
            reinterpret(left, "int16", 2 * lanes),
            reinterpret(right, "int16", 2 * lanes),
            dtype=f"int32x{lanes}",
        )
    else:
        half = constant(16, "int32", lanes)
        low = T.shift_right(T.shift_left(left, half), half) * T.shift_right(
            T.shift_left(right, half), half
        )
        high = T.shift_right(left, half) * T.shift_right(right, half)
        pairs = wrapping("add", low, high, lanes)
    if accumulator_bits == 32:
        return wrapping("sub", total, pairs, lanes)
    less = wrapping("sub", pairs, constant(1, "int32", lanes), lanes)
    return wrapping("sub", total, cast(less, "int64", lanes), lanes, bits=64)


def start(accumulator_bits: int, pairs: int, lanes: int) -> Expr:
    """Accumulators before ``pairs`` pairs of products; see :func:`dot`."""
    return constant(0 if accumulator_bits == 32 else -pairs, f"int{accumulator_bits}", lanes)


def wrapping(operation: str, left: Expr, right: Expr, lanes: int, bits: int = 32) -> Expr:
    """Apply ``add`` or ``sub`` to integer vectors modulo 2^32 or 2^64.

    TVM's own operations promise LLVM that nothing overflows. These do not: they are operations
    under a mask in which every lane is set.
    """
    if lanes == 1:
        wide = [cast(operand, "int64", 1) for operand in (left, right)]
        total = wide[0] + wide[1] if operation == "add" else wide[0] - wide[1]
        return cast(total, f"int{bits}", 1)
    mask = broadcast(tirx.const(True, "bool"), lanes)
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id(f"llvm.vp.{operation}"),
        left,
        right,
        mask,
        tirx.const(lanes, "int32"),
        dtype=f"int{bits}x{lanes}",
    )


def finish(spec: Layer, isa: Isa, total: Expr, terms: Terms, lanes: int) -> Expr:
    """Turn accumulators into elements of the result.

    Parameters
    ----------
    spec, isa
        The layer and the instruction set.
    total
        Accumulators as :func:`dot` leaves them, one a lane.
    terms
        The constants of the channels, as vectors of the same length.
    lanes
        Length of the vectors.
    """
    bits = spec.accumulator_bits
    accumulator = f"int{bits}"
    base = terms.correction
    if base is None:
        base = constant(0, accumulator, lanes)
    # The caller's bound holds for the corrected sum alone: 32 bits may wrap around before.
    total = wrapping("sub", base, total, lanes, bits)
    if terms.shift is not None:
        total = T.shift_left(total, cast(terms.shift, accumulator, lanes))
    if terms.bias is not None:
        total = total + terms.bias
    output = spec.output
    if isinstance(output, Accumulators):
        return total
    assert terms.scale is not None
    if isinstance(output, Codes):
        return requantize(output, isa, total, terms.scale, lanes)
    scaled = cast(total, "float32", lanes) * terms.scale
    if output.low != -inf:
        scaled = T.max(scaled, constant(output.low, "float32", lanes))
    if output.high != inf:
        scaled = T.min(scaled, constant(output.high, "float32", lanes))
    return scaled


def requantize(output: Codes, isa: Isa, total: Expr, scale: Expr, lanes: int) -> Expr:
    """Turn sums into codes, with ``scale`` as the multipliers."""
    if output.form == "fixed":
        return _finish_fixed(output, total, scale, lanes)
    return to_codes(output, isa, cast(total, "float32", lanes) * scale, lanes)


def to_codes(output: Codes, isa: Isa, values: Expr, lanes: int) -> Expr:
    """Round float32 numbers of steps to codes; what is no number becomes the highest code."""
    # Clamping to whole numbers before rounding to them is the same as clamping behind, and keeps
    # the conversion to integers within their range. Minima take their second operand for NaN.
    values = T.min(values, constant(output.high - output.zero_point, "float32", lanes))
    values = T.max(values, constant(output.low - output.zero_point, "float32", lanes))
    codes = _round(isa, values, lanes)
    if output.zero_point:
        codes = codes + constant(output.zero_point, "int32", lanes)
    return cast(codes, output.dtype, lanes)


def _finish_fixed(output: Codes, total: Expr, scale: Expr, lanes: int) -> Expr:
    """Requantize in integers alone: a float32 multiplier is a number of 24 bits and a shift."""

    def wide(value: int) -> Expr:
        return constant(value, "int64", lanes)

    def narrow(value: int) -> Expr:
        return constant(value, "int32", lanes)

    bits = reinterpret(scale, "int32", lanes)
    exponent = bits >> narrow(23)  # multipliers are not negative: there is no sign
    mantissa = (bits & narrow(2**23 - 1)) | narrow(2**23)
    # Those below 2^-126 make no code but 0 of any sum.
    mantissa = T.Select(exponent > narrow(0), mantissa, narrow(0))
    product = cast(total, "int64", lanes) * cast(mantissa, "int64", lanes)
    # A shift below 1 means at least 2^22 codes, beyond 63 less than half of one.
    right = cast(T.max(T.min(narrow(150) - exponent, narrow(63)), narrow(1)), "int64", lanes)
    half = T.shift_left(wide(1), right - wide(1))
    odd = T.shift_right(product, right) & wide(1)
    codes = T.shift_right(product + half - wide(1) + odd, right)
    codes = T.max(codes, wide(output.low - output.zero_point))
    codes = T.min(codes, wide(output.high - output.zero_point))
    return cast(codes + wide(output.zero_point), output.dtype, lanes)


def _round(isa: Isa, values: Expr, lanes: int) -> Expr:
    """Round float32 to int32, ties to even."""
    if isa.round_to_int is None or lanes != isa.lanes:
        return cast(T.nearbyint(values), "int32", lanes)
    intrinsic = T.llvm_lookup_intrinsic_id(isa.round_to_int)
    return T.call_llvm_pure_intrin(intrinsic, values, dtype=f"int32x{lanes}")


@dataclass(frozen=True)
class Terms:
    """Constants of the epilogue as vectors; what the layer does not have is None."""

    correction: Expr | None
    shift: Expr | None
    bias: Expr | None
    scale: Expr | None


def read_terms(args: Arguments, correction: Expr | None, read: Callable[[Buffer], Expr]) -> Terms:
    """Collect the constants of the epilogue with ``read``, which makes a vector of a buffer."""
    return Terms(
        correction,
        None if args.shift is None else read(args.shift),
        None if args.bias is None else read(args.bias),
        None if args.scale is None else read(args.scale),
    )


def correction(spec: Convolution | Matmul, weight_sum: Expr, lanes: int) -> Expr:
    """What sums lack because codes had their offset subtracted instead of their zero point."""
    wide = cast(weight_sum, "int64", lanes) * constant(spec.data.correction, "int64", lanes)
    return cast(wide, f"int{spec.accumulator_bits}", lanes)
