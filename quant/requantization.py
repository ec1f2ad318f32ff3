"""How an accumulator becomes the next code: one definition for reference and code generation.

``code = saturate(rint(float32(accumulator) * M) + zero_point)`` with
``M = float32(float32(s_x * s_w) / s_y)``, the convention of onnxruntime's QLinear operators, or the
same with a 32-bit integer multiplier and a shift for hardware without floats. ``rint`` rounds ties
to even in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitwright.quant.observers import TensorQuantization

__all__ = [
    "Requantization",
    "RequantizationForm",
    "accumulator_bits",
    "accumulator_bound",
    "bias_steps",
    "quantize_float",
    "sum_multipliers",
]

RequantizationForm = Literal["float", "fixed"]
IntArray = npt.NDArray[np.int64]


def quantize_float(
    values: npt.NDArray[Any], scale: npt.ArrayLike, quantization: TensorQuantization
) -> IntArray:
    """Quantize floats as ONNX QuantizeLinear does: divide, round to even, add, saturate.

    NaN, which ONNX leaves open, becomes the highest code, as in TVM.
    """
    codes = np.rint(np.asarray(values, np.float32) / np.asarray(scale, np.float32))
    codes = codes.astype(np.float64) + quantization.zero_point
    codes = np.maximum(np.fmin(codes, quantization.code_max), quantization.code_min)
    return np.asarray(codes).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Requantization:
    """Constants that turn accumulators into codes.

    Attributes
    ----------
    multiplier
        ``M``, float32, broadcastable to the accumulator (one a channel, or one).
    output
        The quantization of the result.
    low, high
        Bounds of the codes: the type's range, narrowed by a Relu or Clip.
    """

    multiplier: npt.NDArray[np.float32]
    output: TensorQuantization
    low: int
    high: int

    @classmethod
    def between(
        cls,
        accumulator_scale: npt.ArrayLike,
        output: TensorQuantization,
        clamp: tuple[float, float] = (-np.inf, np.inf),
    ) -> Requantization:
        """Derive the constants.

        Parameters
        ----------
        accumulator_scale
            ``float32(s_x * s_w)``: the value of one accumulator step.
        output
            The quantization of the result.
        clamp
            Bounds, in real numbers, of a Relu or Clip between accumulator and code. Rounding is
            monotone, so clamping the codes equals clamping the values.
        """
        scale = np.float32(output.scale)
        with np.errstate(over="ignore"):
            multiplier = np.asarray(accumulator_scale, np.float32) / scale
            bounds = quantize_float(np.array(clamp, np.float32), scale, output)
        # An infinite multiplier would turn the accumulator 0 into NaN.
        multiplier = np.minimum(multiplier, np.finfo(np.float32).max)
        return cls(multiplier, output, int(bounds[0]), int(bounds[1]))

    def apply(self, accumulator: IntArray, form: RequantizationForm = "float") -> IntArray:
        """Turn accumulators (int64 array) into codes (int64 array of the same shape)."""
        if form == "fixed":
            rounded = self._fixed_point(accumulator)
        else:
            with np.errstate(over="ignore"):
                scaled = np.rint(accumulator.astype(np.float32) * self.multiplier)
            # Beyond 2^31 every code saturates; the cut keeps the conversion defined.
            rounded = np.asarray(np.clip(scaled, -(2.0**31), 2.0**31)).astype(np.int64)
        return np.asarray(np.clip(rounded + self.output.zero_point, self.low, self.high))

    def fixed_point(self) -> tuple[IntArray, IntArray]:
        """Return multiplier ``m`` in [2^30, 2^31) and shift ``n`` with ``M = m / 2^n``.

        It is exact: a float32 number has 24 bits. A multiplier of 0 gives ``m = 0``.
        """
        mantissa, exponent = np.frexp(self.multiplier.astype(np.float64))
        multiplier = np.asarray(mantissa * 2.0**31).astype(np.int64)
        return multiplier, 31 - np.asarray(exponent).astype(np.int64)

    def _fixed_point(self, accumulator: IntArray) -> IntArray:
        multiplier, shift = self.fixed_point()
        # The product of a 64-bit accumulator and m has up to 94 bits: Python integers then.
        wide = accumulator.min(initial=0) < -(2**31) or accumulator.max(initial=0) >= 2**31
        number = np.dtype(object if wide else np.int64)
        # One axis at least, as NumPy turns single objects into numbers of its own.
        product = np.atleast_1d(accumulator.astype(number)) * multiplier.astype(number)
        # Past 63 (95) bits of shift every product is less than a half; before 1 it is huge.
        right = np.clip(np.atleast_1d(shift), 1, 95 if wide else 63).astype(number)
        half = np.ones(1, number) << (right - 1)
        floor = product >> right
        rest = product - (floor << right)
        odd = (floor & 1) == 1
        rounded = floor + ((rest > half) | ((rest == half) & odd))
        shape = np.broadcast_shapes(accumulator.shape, multiplier.shape)
        narrow: IntArray = np.clip(rounded, -(2**31), 2**31).astype(np.int64)
        return narrow.reshape(shape)


def accumulator_bound(
    weights: npt.NDArray[Any],
    channel_axis: int | None,
    activation: TensorQuantization,
    bias: npt.NDArray[Any] | None = None,
) -> float:
    """Magnitude that no partial sum of a layer exceeds, whatever the input and the order.

    It is the sum of |w| over an output channel, times the largest |x - zero_point|, plus |bias|,
    the largest over all channels. Where the weights of that channel have one sign, some input
    reaches it.

    Parameters
    ----------
    weights
        Integer codes, their zero point subtracted.
    channel_axis
        Axis of the output channels, None for a single output.
    activation
        Quantization of the layer's input.
    bias
        Codes of the bias, shape [channels] or [], or None.
    """
    axes = tuple(axis for axis in range(weights.ndim) if axis != channel_axis)
    sums = np.abs(weights.astype(np.int64)).sum(axis=axes)
    largest = max(
        activation.code_max - activation.zero_point, activation.zero_point - activation.code_min
    )
    # float64 is exact up to 2^53 and cannot wrap around beyond.
    bound = sums.astype(np.float64) * largest
    if bias is not None:
        bound = bound + np.abs(bias.astype(np.float64))
    return float(np.max(bound, initial=0.0))


def accumulator_bits(bound: float) -> int:
    """Width of the accumulator: 32 bits where the bound proves them to be enough, else 64."""
    return 32 if bound < 2**31 else 64


def bias_steps(
    bias: npt.NDArray[Any], scale: npt.NDArray[np.float32], bound: float
) -> tuple[IntArray, IntArray] | None:
    """Express a float bias in steps of the accumulator, as fine as 32 bits allow.

    A bias in float is seldom a whole number of steps. Where it is not, the steps become finer, in
    each channel by itself: ``docs/integer-semantics.md``, "Biases".

    Parameters
    ----------
    bias
        Float values; broadcasts against ``scale``.
    scale
        Value of one step of the accumulator.
    bound
        Largest magnitude of the accumulator without the bias.

    Returns
    -------
    shift, codes
        The accumulator becomes ``(accumulator << shift) + codes``, its scale ``scale / 2^shift``.
        None where the bias is not finite or has 2^62 steps and more.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        steps = bias.astype(np.float64) / scale.astype(np.float64)
    largest = float(np.abs(steps).max(initial=0.0))
    if not largest < 2.0**62:  # nor where it is infinite or NaN
        return None
    room = 2.0**31 / (bound + np.abs(steps) + 1.0)
    shift = np.maximum(np.frexp(room)[1] - 1, 0).astype(np.int64)
    if np.array_equal(steps, np.rint(steps)):
        shift = np.zeros_like(shift)
    return shift, np.rint(np.ldexp(steps, shift)).astype(np.int64)


# Width of the multipliers that bring two operands to one scale: 2 * 255 * 2^22 is below 2^31.
_SUM_BITS_NARROW = 22  # operands of up to 8 bits, of scales not too far apart
_SUM_BITS_WIDE = 30
_FAR_APART = 2.0**6  # leaves the smaller of two narrow multipliers 16 bits


def sum_multipliers(scales: tuple[float, float], bits: int) -> tuple[tuple[int, int], float]:
    """Integer multipliers that bring two operands of a sum to one scale.

    Parameters
    ----------
    scales
        Scales of the operands.
    bits
        Width of the wider operand's codes.

    Returns
    -------
    multipliers, step
        Each operand's centred codes times its multiplier have the scale ``step``.
    """
    far = max(scales) > _FAR_APART * min(scales)
    width = _SUM_BITS_WIDE if bits > 8 or far else _SUM_BITS_NARROW
    step = max(scales) / 2.0**width
    first, second = (int(np.rint(scale / step)) for scale in scales)
    return (first, second), step
