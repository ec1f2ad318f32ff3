"""Functions of float32 as arithmetic: LLVM makes one libm call per lane of its own.

Arguments and results are vectors of ``lanes`` float32, or scalars for one lane. Most functions bind
intermediate results (:func:`emit.bind`): they are called where a kernel's statements are built.

Bounds are on the relative error, over all finite arguments, with and without fused multiplications;
below 2^-126 they are absolute ones, of 2^-126 if the docstring does not say less. What is not a
number stays so, and infinities give the limits, where a docstring does not say otherwise.

The coefficients stand from the lowest degree to the highest. They minimize the largest relative
error of the function: least squares on Chebyshev points, their weights raised where the error is
large until it is level (Lawson's algorithm), rounded to float32. The tests do it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan, sqrt
from math import log as natural_log

from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels.emit import Expr, bind, cast, constant, reinterpret

__all__ = [
    "erf",
    "exp",
    "log",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
]

# log(2) in two parts: the first has so few bits that its product with an exponent is exact.
_LN2_HIGH = round(natural_log(2) * 2**16) / 2**16
_LN2_LOW = natural_log(2) - _LN2_HIGH

# Adding it rounds to a whole number, ties to even, which the lowest bits of the sum then hold.
# (LLVM rounds by a libm call on processors without SSE 4.1.)
_ROUND = 1.5 * 2**23

# The first is the smallest float32 whose exponential is not below 2^-126, the second the largest
# with a finite one.
_EXP_LOW, _EXP_HIGH = -87.33654, 88.72283

_EXP = (0.49999997, 0.166665435, 0.0416672006, 0.00836658012, 0.00138825097)
"""(exp(r) - 1 - r) / r^2 for abs(r) <= 1.001 * log(2) / 2, weighted for expm1."""

_EXP_SHORT = (0.49999228, 0.16667116, 0.04189055, 0.00831248)
"""The same within 1.1e-7 of exp, for what is added to 1."""

_LOG = (
    0.333339095,
    -0.250013381,
    0.199630633,
    -0.165775836,
    0.149147689,
    -0.142674923,
    0.0870043784,
)
"""(log(1 + f) - f + f^2 / 2) / f^3 for sqrt(0.5) <= 1 + f <= sqrt(2)."""

_ERF_HIGH = 4.0  # erf rounds to 1 from 3.92 on
_ERF = (
    1.12837923,
    0.636616468,
    0.102814414,
    -0.0193217136,
    0.000205713179,
    0.00125174865,
    -0.00038100133,
    4.07080151e-05,
)
"""-log(1 - erf(a)) / a for 0 <= a <= 4, weighted for erf."""


def exp(x: Expr, lanes: int) -> Expr:
    """exp(x) within 2e-7; 0 where that is below 2^-126."""
    x = bind(x)
    shifted, rest = _reduce(x, _ROUND, lanes)
    # Rounded once: recurrences add up what the exponentials of thousands of steps are off.
    value = _number(1.0, lanes) + _expm1_of_rest(rest, lanes)
    # To add to the exponent, unlike a multiplication, reaches 2^127 from 2^128 and below 1.
    exponent = T.shift_left(reinterpret(shifted, "int32", lanes), constant(23, "int32", lanes))
    value = reinterpret(reinterpret(value, "int32", lanes) + exponent, "float32", lanes)
    low, high = (_number(bound, lanes) for bound in (_EXP_LOW, _EXP_HIGH))
    value = T.Select(x < low, _number(0.0, lanes), value)
    return bind(T.Select(x <= high, value, x + _number(inf, lanes)))


def log(x: Expr, lanes: int) -> Expr:
    """log(x) within 3e-7; -infinity of zeros, not a number below."""
    x = bind(x)
    denormal = x < _number(2.0**-126, lanes)  # not bound: TVM 0.27 cannot bind bool vectors
    scaled = T.Select(denormal, x * _number(2.0**23, lanes), x)
    # x = 2^exponent * (1 + f), with sqrt(0.5) <= 1 + f < sqrt(2).
    root = constant(0x3F3504F3, "int32", lanes)  # the bits of sqrt(0.5)
    bits = bind(reinterpret(scaled, "int32", lanes) - root)
    mantissa = T.bitwise_and(bits, constant(2**23 - 1, "int32", lanes)) + root
    f = bind(reinterpret(mantissa, "float32", lanes) - _number(1.0, lanes))
    exponent = cast(T.shift_right(bits, constant(23, "int32", lanes)), "float32", lanes)
    scaling = T.Select(denormal, _number(23.0, lanes), _number(0.0, lanes))
    exponent = bind(exponent - scaling)
    low, high = (_number(part, lanes) for part in (_LN2_LOW, _LN2_HIGH))
    tail = _multiply_add(exponent, low, _log1p_tail(f, lanes), lanes)
    value = _multiply_add(exponent, high, f + tail, lanes)
    zero = _number(0.0, lanes)
    outside = T.Select(x.equal(zero), _number(-inf, lanes), _number(nan, lanes))
    largest = _number(inf, lanes)
    return bind(T.Select(x > zero, T.Select(x < largest, value, largest), outside))


def tanh(x: Expr, lanes: int) -> Expr:
    """tanh(x) within 4e-7, of denormal numbers too."""
    x = bind(x)
    half = bind(_half_expm1(_at_most(20.0, _at_least(-20.0, x + x, lanes), lanes), lanes))
    return half / (_number(1.0, lanes) + half)


def sigmoid(x: Expr, lanes: int) -> Expr:
    """1 / (1 + exp(-x)) within 4e-7."""
    return _number(1.0, lanes) / _one_plus_exp_of_negative(x, lanes)


def softplus(x: Expr, lanes: int) -> Expr:
    """log(1 + exp(x)) within 5e-7; 0 where that is below 2^-126."""
    x = bind(x)
    e = exp(_number(-1.0, lanes) * _magnitude(x, lanes), lanes)
    # 1 + e lies between 1 and 2: log(1 + e) = log(1 + (e - 1) / 2) + log(2).
    one, zero = _number(1.0, lanes), _number(0.0, lanes)
    large = e > _number(sqrt(2) - 1, lanes)
    f = bind(T.Select(large, _number(0.5, lanes) * (e - one), e))
    logarithm = f + _log1p_tail(f, lanes)
    logarithm = logarithm + T.Select(large, _number(natural_log(2), lanes), zero)
    return T.Select(x > zero, x, zero) + logarithm


def erf(x: Expr, lanes: int) -> Expr:
    """erf(x) within 5e-7, and 2^-148 below 2^-126."""
    x = bind(x)
    size = _at_most(_ERF_HIGH, _magnitude(x, lanes), lanes)
    # erf(a) = 1 - exp(-a * q(a)), and q is smooth: no cases, and small numbers keep all their bits.
    q = _polynomial(_ERF, size, bind(size * size), lanes)
    power = _number(-1.0, lanes) * size * q
    doubled = _number(2.0, lanes) * _half_expm1(bind(power), lanes)
    return _with_sign_of(doubled, x, lanes)


def silu(x: Expr, lanes: int) -> Expr:
    """Return x * sigmoid(x) within 5e-7, and 2^-119 below; not a number of -infinity."""
    x = bind(x)
    return x / _one_plus_exp_of_negative(x, lanes)


# --------------------------------------------------------------------------- pieces


def _number(value: float, lanes: int) -> Expr:
    return constant(value, "float32", lanes)


def _reduce(x: Expr, rounding: float, lanes: int) -> tuple[Expr, Expr]:
    """Write x as k * log(2) + rest, with the whole number k nearest to x / log(2).

    Returns
    -------
    tuple
        The float32 ``rounding + k``, whose lowest bits are those of k if ``rounding`` is
        ``_ROUND``; and the rest.
    """
    shift = _number(rounding, lanes)
    shifted = bind(_multiply_add(x, _number(1 / natural_log(2), lanes), shift, lanes))
    k = bind(shifted - shift)
    rest = _multiply_add(k, _number(-_LN2_HIGH, lanes), x, lanes)
    return shifted, bind(_multiply_add(k, _number(-_LN2_LOW, lanes), rest, lanes))


def _power_of_two(shifted: Expr, lanes: int) -> Expr:
    """The float32 whose exponent is the lowest bits of what :func:`_reduce` returns."""
    bits = T.shift_left(reinterpret(shifted, "int32", lanes), constant(23, "int32", lanes))
    return bind(reinterpret(bits, "float32", lanes))


def _expm1_of_rest(rest: Expr, lanes: int) -> Expr:
    """exp(r) - 1 of what :func:`_reduce` left."""
    square = bind(rest * rest)
    return _multiply_add(square, _polynomial(_EXP, rest, square, lanes), rest, lanes)


def _one_plus_exp_of_negative(x: Expr, lanes: int) -> Expr:
    """1 + exp(-x) within 3e-7; infinite below -88.4."""
    # The scale is infinite where the exponent is 128; above 80 it does not count beside 1.
    clamped = _at_most(80.0, _at_least(-89.0, x, lanes), lanes)
    shifted, rest = _reduce(_number(-1.0, lanes) * clamped, _ROUND + 127, lanes)
    square = bind(rest * rest)
    tail = _polynomial(_EXP_SHORT, rest, square, lanes)
    value = _multiply_add(square, tail, _number(1.0, lanes) + rest, lanes)
    return _multiply_add(_power_of_two(shifted, lanes), value, _number(1.0, lanes), lanes)


def _half_expm1(x: Expr, lanes: int) -> Expr:
    """(exp(x) - 1) / 2 for -80 <= x <= 88.8; half, as all of float32 then has a scale."""
    # The lowest bits of the sum become the exponent of scale = 2^(k - 1).
    shifted, rest = _reduce(x, _ROUND + 126, lanes)
    scale = _power_of_two(shifted, lanes)
    # Of small x the difference is 0 and all bits are those of the polynomial.
    difference = scale - _number(0.5, lanes)
    return _multiply_add(scale, _expm1_of_rest(rest, lanes), difference, lanes)


def _log1p_tail(f: Expr, lanes: int) -> Expr:
    """log(1 + f) - f for sqrt(0.5) <= 1 + f <= sqrt(2)."""
    square = bind(f * f)
    cubic = square * (f * _polynomial(_LOG, f, square, lanes))
    return _multiply_add(_number(-0.5, lanes), square, cubic, lanes)


def _polynomial(coefficients: Sequence[float], x: Expr, square: Expr, lanes: int) -> Expr:
    """Horner's scheme on pairs, half as long a chain as on single coefficients.

    They stand from the lowest degree to the highest; ``square`` is that of x.
    """
    numbers = [_number(coefficient, lanes) for coefficient in coefficients]
    pairs = [
        _multiply_add(pair[1], x, pair[0], lanes) if len(pair) == 2 else pair[0]
        for pair in (numbers[start : start + 2] for start in range(0, len(numbers), 2))
    ]
    *lower, value = pairs
    for pair in reversed(lower):
        value = _multiply_add(value, square, pair, lanes)
    return value


def _multiply_add(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """Return a * b + c, fused where the processor can (llvm.fma is a libm call where not)."""
    return _intrinsic("llvm.fmuladd", a, b, c, lanes=lanes)


def _magnitude(x: Expr, lanes: int) -> Expr:
    return _intrinsic("llvm.fabs", x, lanes=lanes)


def _with_sign_of(size: Expr, x: Expr, lanes: int) -> Expr:
    return _intrinsic("llvm.copysign", size, x, lanes=lanes)


def _intrinsic(name: str, *arguments: Expr, lanes: int) -> Expr:
    dtype = "float32" if lanes == 1 else f"float32x{lanes}"
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *arguments, dtype=dtype)


def _at_least(bound: float, x: Expr, lanes: int) -> Expr:
    """max(bound, x) that keeps what is not a number."""
    x, limit = bind(x), _number(bound, lanes)
    return bind(T.Select(x < limit, limit, x))


def _at_most(bound: float, x: Expr, lanes: int) -> Expr:
    """min(bound, x) that keeps what is not a number."""
    x, limit = bind(x), _number(bound, lanes)
    return bind(T.Select(x > limit, limit, x))
