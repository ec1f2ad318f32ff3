"""Watch the values of a tensor pass by once, then choose how to quantize it.

An :class:`Observer` keeps exact extremes and a histogram that widens as larger values arrive, so
one pass over the calibration data is enough and memory does not grow with their number.
:func:`choose_quantization` turns it into a scale and a zero point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from bitwright.errors import UsageError
from bitwright.soft_edge import SoftEdge

__all__ = [
    "ClipMethod",
    "Observer",
    "TensorQuantization",
    "choose_quantization",
    "expected_sqnr_db",
    "quantize_weights",
    "squared_error",
]

ClipMethod = Literal["mmse", "percentile", "minmax"]

BINS: Final = 8192
"""Bins of a histogram, over the symmetric range [-limit, limit)."""

MAX_VALUES_PER_SAMPLE: Final = 16384
"""Values of one sample that enter the histogram; larger tensors are strided, extremes are not."""

MIN_SCALE: Final = 2.0**-60
"""Smallest scale: products of two scales stay normal float32 numbers."""

_CANDIDATES = np.arange(1, 101) / 100.0  # clip thresholds relative to the largest value


@dataclass(frozen=True, slots=True)
class TensorQuantization:
    """How a tensor is quantized: ``code = saturate(rint(value / scale) + zero_point)``.

    With a soft-edge layout the codes meant here are those behind its decoder: whole finest steps in
    int16, with zero point 0, which is what layers compute with.

    Attributes
    ----------
    scale
        Step between neighbouring codes, a float32 number; of a layout its finest step.
    zero_point
        The code of 0.0.
    bits
        2, 4, 8 or 16; 16 with a layout.
    signed
        Whether codes are two's complement.
    layout
        How values are encoded, if not with one step for all.
    """

    scale: float
    zero_point: int
    bits: int
    signed: bool
    layout: SoftEdge | None = None

    @classmethod
    def soft_edge(cls, layout: SoftEdge, step: float) -> TensorQuantization:
        """Describe values encoded by a layout with a finest step."""
        return cls(step, 0, 16, signed=True, layout=layout)

    @property
    def code_min(self) -> int:
        """Smallest code."""
        if self.layout is not None:
            return self.layout.value_min
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def code_max(self) -> int:
        """Largest code."""
        if self.layout is not None:
            return self.layout.value_max
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def clip(self) -> tuple[float, float]:
        """Values of the smallest and the largest code."""
        return (
            (self.code_min - self.zero_point) * self.scale,
            (self.code_max - self.zero_point) * self.scale,
        )

    def __str__(self) -> str:
        if self.layout is not None:
            return self.layout.activation.format
        return f"{'int' if self.signed else 'uint'}{self.bits}"


class Observer:
    """Extremes and histogram of a stream of arrays.

    Attributes
    ----------
    minimum, maximum
        Exact extremes of everything seen.
    counts
        Histogram of (for large tensors, a regular sample of) the values, ``BINS`` equal bins over
        [-limit, limit).
    limit
        A power of two above every magnitude seen.

    Parameters
    ----------
    exact
        Whether all values of large tensors enter the histogram: percentiles near 100 % depend on
        a few of them.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self._exact = exact
        self.minimum = math.inf
        self.maximum = -math.inf
        self.limit = 0.0
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)

    def update(self, array: npt.NDArray[Any], samples: int = 1) -> None:
        """Add the values of an array of any shape.

        Parameters
        ----------
        array
            Float32 values.
        samples
            How many calibration samples the array holds; bounds what enters the histogram.

        Raises
        ------
        FloatingPointError
            If a value is NaN or infinite.
        """
        if array.size == 0:
            return
        flat = array.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FloatingPointError("NaN or infinite value")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        magnitude = max(-self.minimum, self.maximum, MIN_SCALE)
        if magnitude >= self.limit:
            self._widen(magnitude)
        if not self._exact:
            flat = flat[:: _stride(flat.size, MAX_VALUES_PER_SAMPLE * samples)]
        if flat.size < array.size:  # the rare extremes decide where to clip
            flat = np.append(flat, np.array([low, high], flat.dtype))
        # One pass in float32; the bin of a value is exact up to its own rounding.
        bins = flat * np.float32(BINS / 2 / self.limit)
        bins += np.float32(BINS / 2)
        # Just below the limit the sum rounds up to the first bin beyond.
        indices = np.minimum(bins.astype(np.int32), BINS - 1)
        self.counts += np.bincount(indices, minlength=BINS)

    def _widen(self, magnitude: float) -> None:
        limit = 2.0 ** (math.floor(math.log2(magnitude)) + 1)
        if self.limit == 0.0:
            self.limit = limit
        while self.limit < limit:  # two bins become one: exact, for the limits are powers of two
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[BINS // 4 : 3 * BINS // 4] = merged
            self.limit *= 2.0

    @property
    def bin_width(self) -> float:
        """Width of one bin of the histogram."""
        return 2.0 * self.limit / BINS

    def centers(self) -> npt.NDArray[np.float64]:
        """Centre of every bin, never beyond the extremes."""
        centers = (np.arange(BINS) + 0.5) * self.bin_width - self.limit
        return np.clip(centers, min(self.minimum, 0.0), max(self.maximum, 0.0))

    def percentile(self, percent: float) -> float:
        """Magnitude below which ``percent`` % of the values lie, interpolated inside its bin."""
        half = BINS // 2
        magnitudes = self.counts[half:] + self.counts[:half][::-1]
        cumulated = np.cumsum(magnitudes)
        wanted = cumulated[-1] * (percent / 100.0)
        index = int(np.searchsorted(cumulated, wanted))
        below = cumulated[index - 1] if index else 0
        inside = (wanted - below) / max(int(magnitudes[index]), 1)
        return float(min((index + inside) * self.bin_width, max(-self.minimum, self.maximum)))

    def tails(self, percent: float) -> tuple[float, float]:
        """Values that leave out (100 - percent)/2 % of the values on either side."""
        cumulated = np.cumsum(self.counts)
        edges = np.arange(BINS + 1) * self.bin_width - self.limit
        outside = (100.0 - percent) / 200.0 * cumulated[-1]
        low = edges[int(np.searchsorted(cumulated, outside, side="right"))]
        high = edges[int(np.searchsorted(cumulated, cumulated[-1] - outside)) + 1]
        return max(float(low), self.minimum), min(float(high), self.maximum)


def _stride(size: int, limit: int) -> int:
    """Smallest step that leaves at most ``limit`` of ``size`` values and visits all channels."""
    step = -(-size // limit)
    while step > 1 and math.gcd(step, size) != 1:
        step += 1
    return step


def squared_error(
    observer: Observer,
    scales: npt.NDArray[np.float64],
    zero_points: npt.NDArray[np.float64],
    code_min: int,
    code_max: int,
    layout: SoftEdge | None = None,
) -> npt.NDArray[np.float64]:
    """Expected sum of squared quantization errors of the histogram, one a candidate."""
    if layout is not None:
        return np.array([_layout_error(observer, layout, float(scale)) for scale in scales])
    used = np.flatnonzero(observer.counts)
    centers, counts = observer.centers()[used], observer.counts[used].astype(np.float64)
    errors = np.empty(len(scales))
    for i, (scale, zero_point) in enumerate(zip(scales, zero_points, strict=True)):
        codes = np.rint(centers / scale) + zero_point
        inside = (codes >= code_min) & (codes <= code_max)
        np.clip(codes, code_min, code_max, out=codes)
        error = (codes - zero_point) * scale - centers
        squares = error * error
        if scale < observer.bin_width:
            # Steps finer than the bins: the centre of a bin says nothing about its values, which
            # are spread evenly over many steps.
            squares[inside] = scale * scale / 12.0
        errors[i] = squares @ counts
    return errors


def _layout_error(observer: Observer, layout: SoftEdge, step: float) -> float:
    """As :func:`squared_error` of one candidate."""
    used = np.flatnonzero(observer.counts)
    centers, counts = observer.centers()[used], observer.counts[used].astype(np.float64)
    codes = layout.encode(centers.astype(np.float32), step).astype(np.int64)
    error = layout.decode(codes) * step - centers
    squares = error * error
    strides = np.zeros(len(codes))
    for first, shift, _ in layout.pieces():
        strides[codes >= first] = step * (1 << shift)
    inside = (centers >= layout.value_min * step - strides / 2.0) & (
        centers <= layout.value_max * step + strides / 2.0
    )
    fine = inside & (strides < observer.bin_width)
    squares[fine] = strides[fine] * strides[fine] / 12.0
    return float(squares @ counts)


def expected_sqnr_db(observer: Observer, quantization: TensorQuantization) -> float:
    """Signal to quantization noise ratio of the calibrated values in dB, from the histogram."""
    error = squared_error(
        observer,
        np.array([quantization.scale]),
        np.array([float(quantization.zero_point)]),
        quantization.code_min,
        quantization.code_max,
        quantization.layout,
    )[0]
    signal = float((observer.centers() ** 2) @ observer.counts)
    if error <= 0.0:
        return math.inf
    return 10.0 * math.log10(signal / error) if signal > 0.0 else -math.inf


def choose_quantization(
    observer: Observer,
    bits: int,
    *,
    method: ClipMethod = "mmse",
    percentile: float = 99.99,
    asymmetric: bool = False,
    symmetric: bool = False,
) -> TensorQuantization:
    """Choose scale and zero point for the values an observer has seen.

    Codes are unsigned with zero point 0 where no value is negative, otherwise signed with zero
    point 0; with ``asymmetric``, unsigned with the zero point where 0.0 falls; with ``symmetric``,
    always signed, and the largest code stands for the range on either side.

    Parameters
    ----------
    observer
        The calibrated tensor.
    bits
        2, 4, 8 or 16.
    method
        ``mmse``: of 100 thresholds between 1 % and 100 % of the largest magnitude, the one with
        the least mean squared error; ``percentile``: the magnitude that ``percentile`` % of the
        values do not exceed; ``minmax``: the largest magnitude.
    percentile
        In percent, above 0 and at most 100.
    asymmetric
        Whether the zero point may be anywhere in the range; wins over ``symmetric``.
    symmetric
        Whether codes are signed also where no value is negative.

    Returns
    -------
    TensorQuantization
        A scale that is exactly a float32 number.

    Raises
    ------
    UsageError
        If the method does not exist or the percentile is out of range.
    """
    if method not in ("mmse", "percentile", "minmax"):
        raise UsageError(f"{method!r} is no clip method", fix="choose mmse, percentile or minmax")
    if not 0.0 < percentile <= 100.0:
        raise UsageError(f"percentile {percentile} is not above 0 and at most 100")
    low, high = min(observer.minimum, 0.0), max(observer.maximum, 0.0)
    if not observer.counts.any() or (low == 0.0 and high == 0.0):
        return TensorQuantization(1.0, 0, bits, signed=symmetric)
    if asymmetric and low < 0.0:
        return _choose_asymmetric(observer, bits, method, percentile)
    signed = symmetric or low < 0.0
    probe = TensorQuantization(1.0, 0, bits, signed)
    # A signed range reaches one step further down than up.
    below = 1.0 if symmetric or not signed else probe.code_max / -probe.code_min
    peak = max(high, -low * below)
    if method == "minmax":
        threshold = peak
    elif method == "percentile":
        threshold = min(observer.percentile(percentile), max(high, -low))
    else:
        candidates = peak * _CANDIDATES
        errors = squared_error(
            observer,
            candidates / probe.code_max,
            np.zeros(len(candidates)),
            probe.code_min,
            probe.code_max,
        )
        # Of equal candidates the widest: it leaves room for values calibration has not seen.
        best = len(errors) - 1 - int(np.argmin(errors[::-1]))
        threshold = float(candidates[best])
    return TensorQuantization(_scale(threshold, probe.code_max), 0, bits, signed)


def _scale(span: float, codes: int) -> float:
    return float(np.float32(max(span / codes, MIN_SCALE)))


def _choose_asymmetric(
    observer: Observer, bits: int, method: ClipMethod, percentile: float
) -> TensorQuantization:
    codes = (1 << bits) - 1
    low, high = min(observer.minimum, 0.0), max(observer.maximum, 0.0)
    if method == "percentile":
        low, high = observer.tails(percentile)
        low, high = min(low, 0.0), max(high, 0.0)

    def pack(low: float, high: float) -> TensorQuantization:
        scale = _scale(high - low, codes)
        return TensorQuantization(scale, int(np.rint(-low / scale)), bits, signed=False)

    if method != "mmse":
        return pack(low, high)
    best, best_error = pack(low, high), math.inf
    # First both ends together, then each end by itself around the best.
    ends = [(low * part, high * part) for part in _CANDIDATES]
    for _ in range(3):
        candidates = [pack(*end) for end in ends]
        errors = squared_error(
            observer,
            np.array([entry.scale for entry in candidates]),
            np.array([float(entry.zero_point) for entry in candidates]),
            0,
            codes,
        )
        index = len(errors) - 1 - int(np.argmin(errors[::-1]))
        if errors[index] < best_error:
            best, best_error = candidates[index], float(errors[index])
            bottom, top = ends[index]
        parts = _CANDIDATES[::4] * 1.25
        ends = [(max(bottom * part, low), top) for part in parts]
        ends += [(bottom, min(top * part, high)) for part in parts]
    return best


def quantize_weights(
    weights: npt.NDArray[np.float32], bits: int, *, axis: int | None, part: float = 1.0
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Quantize weights symmetrically: ``codes = clip(rint(weights / scale))``.

    The codes span [-2^(bits-1), 2^(bits-1) - 1] and the scale is threshold / (2^(bits-1) - 1), as
    in MOHAQ (arXiv 2108.01192).

    Parameters
    ----------
    weights
        Any shape, float32, finite.
    bits
        2, 4, 8 or 16.
    axis
        Axis of the output channels, each with a scale of its own; None for one scale.
    part
        The threshold, relative to the largest magnitude (of the channel).

    Returns
    -------
    codes
        The shape of ``weights``.
    scales
        Shape [channels], or [] for one scale.
    """
    moved = weights if axis is None else np.moveaxis(weights, axis, 0)
    rows = moved.reshape(1 if axis is None else len(moved), -1).astype(np.float32, copy=False)
    code_max = (1 << (bits - 1)) - 1
    peaks = np.abs(rows).max(axis=1, initial=0.0).astype(np.float64)
    scales = np.maximum(peaks * part / code_max, MIN_SCALE).astype(np.float32)
    # A channel of zeros has no scale of its own; it takes the others' so that its bias fits.
    dead = peaks == 0.0
    if dead.any():
        scales[dead] = np.median(scales[~dead]) if (~dead).any() else 1.0
    codes = np.clip(np.rint(rows / scales[:, None]), -code_max - 1, code_max).astype(np.int32)
    codes = codes.reshape(moved.shape)
    return (codes, scales[0]) if axis is None else (np.moveaxis(codes, 0, axis), scales)
