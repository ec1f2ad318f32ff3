"""Choose how activations are encoded: integers of one step, or soft edge.

The layout of ``soft-edge`` is fixed (:data:`bitwright.soft_edge.QUAMBA_SE`), its step calibrated.
Those of ``soft-edge8``, ``soft-edge6`` and ``soft-edge4`` have 2^bits codes, shared out between up
to three segments on either side of 0, so that the histogram has the least expected squared error:

1. Where values lie densely compared with a step, the error of a segment is its share of the values
   times step^2 / 12 (W. R. Bennett, Spectra of quantized signals, 1948). For edges of segments on a
   grid, that is a few sums a side. A finest step ``h`` gives a segment of width ``w`` and step
   ``2^k h`` just ``w / (2^k h)`` codes, so the number of all codes decides ``h``.
2. The best of those become whole numbers of codes, whose error on the histogram is exact, and codes
   move between segments as long as that helps.

Single steps, zero point anywhere, are layouts too: the choice is never worse than those.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from bitwright.quant.observers import (
    MIN_SCALE,
    ClipMethod,
    Observer,
    TensorQuantization,
    choose_quantization,
    squared_error,
)
from bitwright.soft_edge import QUAMBA_SE, Segment, SoftEdge
from bitwright.vocabulary import Activation, ActivationFormat

__all__ = ["choose_activation", "choose_soft_edge", "single_step"]

Floats: TypeAlias = npt.NDArray[np.float64]
_Side: TypeAlias = tuple[tuple[int, int], ...]  # codes and shift of each segment, 0 left out
_Judged: TypeAlias = tuple[float, tuple[_Side, _Side], float]  # error, layout, finest step

_BITS: Final[dict[ActivationFormat, int]] = {"soft-edge8": 8, "soft-edge6": 6, "soft-edge4": 4}
_SCALE_CODES: Final = 127  # of a calibrated range: that of Quamba's int8
_BEYOND: Final = (1.0, 1.4, 2.0, 395 / 127)  # ends of layouts, relative to a given range
_STEPS: Final = 128  # candidates for the step of a fixed layout

_SHIFTS: Final = 7  # steps up to 64 times the finest: values stay below 2^14
_EDGES: Final = 18  # of segments, on a grid over the magnitudes of a side
_SPAN: Final = 512.0  # largest edge over the smallest
_ENDS: Final = 14  # candidates for the magnitude at which a side is clipped
_LENGTH_CLASSES: Final = 3.0  # an octave of codes, of which the best stays
_STARTS: Final = 32  # turned into whole numbers of codes
_CLIMBS: Final = 2  # of those, how many have codes moved between their segments,
_ROUNDS: Final = 10  # this often,
_FAVOURITES: Final = 6  # and for how many other steps are tried
_WIDER = np.array([0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12])
_NEARBY = np.array([0.97, 1.0, 1.03])


def choose_activation(
    observer: Observer,
    form: Activation,
    *,
    method: ClipMethod = "mmse",
    percentile: float = 99.99,
    asymmetric: bool = False,
    symmetric: bool = False,
) -> TensorQuantization:
    """Choose how to quantize a tensor at a form of its codes.

    Parameters
    ----------
    observer
        The calibrated tensor.
    form
        Bits and format.
    method, percentile, asymmetric, symmetric
        As in :func:`~bitwright.quant.observers.choose_quantization`; the last two concern integers
        alone.

    Raises
    ------
    UsageError
        If the method does not exist or the percentile is out of range.
    """
    if form.format != "int":
        return choose_soft_edge(observer, form.format, method=method, percentile=percentile)
    return choose_quantization(
        observer,
        form.bits,
        method=method,
        percentile=percentile,
        asymmetric=asymmetric,
        symmetric=symmetric,
    )


def choose_soft_edge(
    observer: Observer,
    format: ActivationFormat,  # noqa: A002  # the vocabulary's word
    *,
    method: ClipMethod = "mmse",
    percentile: float = 99.99,
) -> TensorQuantization:
    """Choose layout and finest step for the values an observer has seen.

    Parameters
    ----------
    observer
        The calibrated tensor.
    format
        ``soft-edge``, ``soft-edge8``, ``soft-edge6`` or ``soft-edge4``.
    method
        ``minmax``, ``percentile``: the magnitude that is kept, as for integers. With ``soft-edge``
        the scale is that over 127, as in Quamba, and outliers reach 395/127 = 3.1 times as far.
        Calibrated layouts keep this range too, and may reach as far beyond it, but not beyond the
        extremes, where that leaves the less error. ``mmse``: whatever leaves the least expected
        squared error.
    percentile
        In percent, above 0 and at most 100.

    Returns
    -------
    TensorQuantization
        With a layout.

    Raises
    ------
    UsageError
        If the method does not exist or the percentile is out of range.
    """
    # Checks the options, too.
    symmetric = choose_quantization(observer, 8, method=method, percentile=percentile)
    low, high = min(observer.minimum, 0.0), max(observer.maximum, 0.0)
    empty = not observer.counts.any() or (low == 0.0 and high == 0.0)
    if method == "percentile" and not empty:
        threshold = observer.percentile(percentile)
        low, high = max(low, -threshold), min(high, threshold)
    if format == "soft-edge":
        step = 1.0 if empty else _fixed_step(observer, QUAMBA_SE, max(high, -low), method)
        return TensorQuantization.soft_edge(QUAMBA_SE, step)
    bits = _BITS[format]
    if empty:
        return TensorQuantization.soft_edge(single_step(bits, 0), 1.0)
    extremes = min(observer.minimum, 0.0), max(observer.maximum, 0.0)
    ranges = {(max(low * part, extremes[0]), min(high * part, extremes[1])) for part in _BEYOND}
    candidates = [_search(observer, bits, *ends, free=False) for ends in sorted(ranges)]
    step = _step((high - low) / ((1 << bits) - 1))
    below = round(-low / step)
    candidates.append(TensorQuantization.soft_edge(single_step(bits, below), step))
    if bits == 8:
        candidates.append(_as_layout(symmetric))
    if method == "mmse":
        candidates.append(_search(observer, bits, low, high, free=True))
        candidates += [
            _as_layout(choose_quantization(observer, bits, asymmetric=shifted))
            for shifted in (False, True)
        ]
    errors = [_error(observer, candidate) for candidate in candidates]
    return candidates[int(np.argmin(errors))]


def single_step(bits: int, zero_point: int) -> SoftEdge:
    """The layout that is plain unsigned integers, in uint8."""
    positive = Segment((1 << bits) - zero_point, 0, 0)
    return SoftEdge((positive,), (Segment(zero_point + 1, 0, 0),), zero_point, "uint8")


def _step(value: float) -> float:
    return float(np.float32(max(value, MIN_SCALE)))


def _covering(bits: int, below: int, low: float, high: float) -> TensorQuantization:
    """A single step that reaches both ends of a range, with so many codes below 0."""
    below = min(max(below, 1 if low < 0.0 else 0), (1 << bits) - (2 if high > 0.0 else 1))
    above = (1 << bits) - 1 - below
    step = max(high / max(above, 1), -low / max(below, 1))
    return TensorQuantization.soft_edge(single_step(bits, below), _step(step))


def _as_layout(quantization: TensorQuantization) -> TensorQuantization:
    """An integer quantization as a layout of the same values."""
    below = quantization.zero_point - quantization.code_min
    return TensorQuantization.soft_edge(single_step(quantization.bits, below), quantization.scale)


def _error(observer: Observer, quantization: TensorQuantization) -> float:
    scale, zero = np.array([quantization.scale]), np.zeros(1)
    return float(squared_error(observer, scale, zero, 0, 0, quantization.layout)[0])


def _fixed_step(observer: Observer, layout: SoftEdge, peak: float, method: ClipMethod) -> float:
    """Finest step of the three scales: a quarter of the calibrated scale."""
    scale = peak / _SCALE_CODES
    if method != "mmse":
        return _step(scale / 4.0)
    # At the narrowest the largest magnitude is clipped to a quarter.
    narrowest = np.log2(layout.value_max / _SCALE_CODES)
    steps = np.exp2(-np.linspace(0.0, narrowest, _STEPS)) * (scale / 4.0)
    steps = np.array([_step(float(step)) for step in steps])
    errors = squared_error(observer, steps, np.zeros(_STEPS), 0, 0, layout)
    return float(steps[int(np.argmin(errors))])  # of equal candidates the widest


# -- the search for a layout -------------------------------------------------------------------


class _Histogram:
    """Sums over the values of an observer, by which errors are found without visiting the values.

    Attributes
    ----------
    centers
        Values, ascending.
    sums
        For the powers 0, 1 and 2 of the values, sums of counts times powers, shape
        [3, number of values + 1]; the first of each is 0.
    """

    def __init__(self, observer: Observer) -> None:
        used = np.flatnonzero(observer.counts)
        self.centers: Floats = observer.centers()[used]
        counts = observer.counts[used].astype(np.float64)
        powers = counts * self.centers ** np.arange(3)[:, None]
        self.sums: Floats = np.zeros((3, len(used) + 1))
        np.cumsum(powers, axis=1, out=self.sums[:, 1:])
        self.bin_width = observer.bin_width

    def errors(self, shapes: Sequence[tuple[_Side, _Side]], steps: Floats) -> Floats:
        """Exact squared errors.

        Parameters
        ----------
        shapes
            Layouts, all of the same number of codes: segments below and above 0.
        steps
            Finest steps, shape [layouts, steps].

        Returns
        -------
        numpy.ndarray
            Shape [layouts, steps].
        """
        levels, strides = zip(*(_levels(*shape) for shape in shapes), strict=True)
        values = np.stack(levels)[:, None, :] * steps[:, :, None]
        widths = np.stack(strides)[:, None, :] * steps[:, :, None]
        middles = (values[..., 1:] + values[..., :-1]) / 2.0
        first = values[..., :1] - widths[..., :1] / 2.0
        last = values[..., -1:] + widths[..., -1:] / 2.0
        # What is clipped has cells of its own, at either end.
        bounds = np.concatenate([first, middles, last], axis=-1)
        values = np.concatenate([values[..., :1], values, values[..., -1:]], axis=-1)
        places = np.searchsorted(self.centers, bounds.reshape(-1)).reshape(bounds.shape)
        found = self.sums[:, places]
        ends = np.broadcast_to(self.sums[:, -1:, None, None], (3, *places.shape[:2], 1))
        starts = np.zeros_like(ends)
        count, mean, square = np.diff(np.concatenate([starts, found, ends], axis=-1), axis=-1)
        squares = np.maximum(square - values * (2.0 * mean - values * count), 0.0)
        # As in squared_error: steps finer than bins.
        fine = widths < self.bin_width
        inner = squares[..., 1:-1]
        inner[fine] = (count[..., 1:-1] * widths * widths / 12.0)[fine]
        return np.asarray(squares.sum(axis=-1))


def _levels(below: _Side, above: _Side) -> tuple[Floats, Floats]:
    """Values of all codes in finest steps, ascending, and the stride at each."""
    sides: list[Floats] = [
        np.repeat([float(1 << shift) for _, shift in side], [codes for codes, _ in side])
        for side in (below, above)
    ]
    zero = np.array([min([side[0] for side in sides if len(side)], default=1.0)])
    values = np.concatenate([-np.cumsum(sides[0])[::-1], np.zeros(1), np.cumsum(sides[1])])
    return values, np.concatenate([sides[0][::-1], zero, sides[1]])


@dataclass(frozen=True)
class _Side3:
    """Candidates for one side of 0: up to three segments each.

    Attributes
    ----------
    edges
        Where segments end, shape [candidates, 3]; the last is where values are clipped.
    shifts
        The same for their steps.
    length
        Sum of widths over ``2^shift``: finest steps' worth of codes.
    mass
        Sum of counts times ``4^shift``.
    clipped
        Squared error of what lies beyond.
    """

    edges: Floats
    shifts: npt.NDArray[np.int64]
    length: Floats
    mass: Floats
    clipped: Floats


def _candidates(histogram: _Histogram, end: float, *, negative: bool, free: bool) -> _Side3:
    """Candidates for a side that reaches the magnitude ``end``."""
    if end == 0.0:
        nothing, none = np.zeros((1, 3)), np.zeros((1, 3), np.int64)
        clipped = _beyond(histogram, np.zeros(1), negative=negative)
        return _Side3(nothing, none, np.zeros(1), np.zeros(1), clipped)
    grid = np.concatenate([[0.0], end * _SPAN ** np.linspace(-1.0, 0.0, _EDGES)])
    ends = np.unique(np.append(0.0, grid[-_ENDS:])) if free else np.array([end])
    count = _below(histogram, grid, negative=negative)
    i, j, k = np.meshgrid(*(np.arange(len(grid)),) * 2, np.searchsorted(grid, ends), indexing="ij")
    kept = (i <= j) & (j <= k)
    places = np.stack([i[kept], j[kept], k[kept]], axis=1)
    edges, inside = grid[places], count[places]
    widths = np.diff(edges, axis=1, prepend=0.0)
    shares = np.diff(inside, axis=1, prepend=0.0)
    shifts = np.array(list(itertools.combinations(range(_SHIFTS), 3)))
    length = (widths @ (0.5**shifts.T)).reshape(-1)
    mass = (shares @ (4.0**shifts.T)).reshape(-1)
    # Of those that end alike and take about as many codes, the one with the least error.
    with np.errstate(divide="ignore"):
        classes = np.where(length > 0.0, np.log2(length / end), -99.0) * _LENGTH_CLASSES
    groups = np.repeat(places[:, 2], len(shifts)) * 4096 + np.rint(classes).astype(np.int64)
    order = np.lexsort((mass, groups))
    heads = order[np.flatnonzero(np.diff(groups[order], prepend=-(1 << 40)))]
    chosen, kinds = heads // len(shifts), heads % len(shifts)
    return _Side3(
        edges[chosen],
        shifts[kinds],
        length[heads],
        mass[heads],
        _beyond(histogram, edges[chosen, 2], negative=negative),
    )


def _below(histogram: _Histogram, magnitudes: Floats, *, negative: bool) -> Floats:
    """How many values of a side have at most these magnitudes."""
    zero = int(np.searchsorted(histogram.centers, 0.0))
    count = histogram.sums[0]
    if negative:
        return np.asarray(count[zero] - count[np.searchsorted(histogram.centers, -magnitudes)])
    places = np.searchsorted(histogram.centers, magnitudes, side="right")
    return np.asarray(count[np.maximum(places, zero)] - count[zero])


def _beyond(histogram: _Histogram, magnitudes: Floats, *, negative: bool) -> Floats:
    """Squared error of values of a side that are clipped to these magnitudes."""
    zero = int(np.searchsorted(histogram.centers, 0.0))
    if negative:
        places, sign = np.searchsorted(histogram.centers, -magnitudes), -1.0
        sums = histogram.sums[:, np.minimum(places, zero)]
    else:
        places, sign = np.searchsorted(histogram.centers, magnitudes, side="right"), 1.0
        sums = histogram.sums[:, -1:] - histogram.sums[:, np.maximum(places, zero)]
    limits = sign * magnitudes
    squares = sums[2] - limits * (2.0 * sums[1] - limits * sums[0])
    return np.asarray(np.maximum(squares, 0.0))


def _search(
    observer: Observer, bits: int, low: float, high: float, *, free: bool
) -> TensorQuantization:
    """The layout of 2^bits codes with the least error: ``free``, or reaching both ends."""
    codes = (1 << bits) - 1  # besides that of 0
    histogram = _Histogram(observer)
    below = _candidates(histogram, -low, negative=True, free=free)
    above = _candidates(histogram, high, negative=False, free=free)
    lengths = below.length[:, None] + above.length[None, :]
    masses = below.mass[:, None] + above.mass[None, :]
    errors = (lengths / codes) ** 2 * masses / 12.0
    errors += below.clipped[:, None] + above.clipped[None, :]
    errors[lengths == 0.0] = np.inf

    def fits(shape: tuple[_Side, _Side]) -> bool:
        return free or math.isfinite(_least_step(shape, low, high))

    shapes: dict[tuple[_Side, _Side], float] = {}
    for i, j in _best_pairs(errors, below.edges[:, 2], above.edges[:, 2]):
        step = float(lengths[i, j]) / codes
        shape = _whole(
            below.edges[i], below.shifts[i], above.edges[j], above.shifts[j], step, codes
        )
        if shape is not None and fits(shape):
            shapes.setdefault(shape, step)

    def judge(entries: dict[tuple[_Side, _Side], float], around: Floats) -> list[_Judged]:
        """The layouts with their best steps, best first."""
        if free:
            steps = np.array(list(entries.values()))[:, None] * around
        else:
            steps = np.array([[_least_step(shape, low, high)] for shape in entries])
        found = histogram.errors(list(entries), np.maximum(steps, MIN_SCALE))
        best = np.argmin(found, axis=1)
        rows = np.arange(len(best))
        order = np.argsort(found[rows, best], kind="stable")
        names = list(entries)
        return [
            (float(found[i, best[i]]), names[i], float(steps[i, best[i]])) for i in map(int, order)
        ]

    if not shapes:
        return _covering(bits, round(-low / ((high - low) / codes)), low, high)
    results = judge(shapes, _WIDER)[:_CLIMBS]
    for number, start in enumerate(results):
        best = start
        for _ in range(_ROUNDS):
            nearby = {shape: best[2] for shape in _neighbours(best[1]) if fits(shape)}
            if free and nearby:
                ranked = judge(nearby, _NEARBY[1:2])[:_FAVOURITES]
                nearby = {shape: step for _, shape, step in ranked}
            found = judge(nearby, _NEARBY)[:1] if nearby else []
            if not found or not found[0][0] < best[0] * 0.9999:
                break
            best = found[0]
        results[number] = best
    _, shape, step = min(results, key=lambda entry: entry[0])
    return TensorQuantization.soft_edge(_layout(*shape), _step(step))


def _best_pairs(errors: Floats, below: Floats, above: Floats) -> list[tuple[int, int]]:
    """Pairs of candidates with little error, of each pair of ends one."""
    flat = errors.reshape(-1)
    count = min(64 * _STARTS, int(np.isfinite(flat).sum()))
    order = np.argpartition(flat, count - 1)[:count] if 0 < count < flat.size else np.arange(count)
    order = order[np.argsort(flat[order])]
    i, j = np.unravel_index(order, errors.shape)
    _, first = np.unique(np.stack([below[i], above[j]]), axis=1, return_index=True)
    # One pair of ends alone (a range that is given) leaves all to the grid of edges.
    chosen = np.sort(first)[:_STARTS] if len(first) > 1 else np.arange(min(_STARTS, count))
    return [(int(i[n]), int(j[n])) for n in chosen]


def _whole(
    below: Floats,
    below_shifts: npt.NDArray[np.int64],
    above: Floats,
    above_shifts: npt.NDArray[np.int64],
    step: float,
    codes: int,
) -> tuple[_Side, _Side] | None:
    """Whole numbers of codes for segments; None where nothing is left."""
    widths = np.concatenate([np.diff(below, prepend=0.0), np.diff(above, prepend=0.0)])
    shifts = np.concatenate([below_shifts, above_shifts])
    exact = widths / (step * 2.0**shifts)
    counts = np.rint(exact).astype(np.int64)
    if not counts.any():
        return None
    counts[int(np.argmax(counts))] += codes - int(counts.sum())
    if counts.min() < 0:
        return None
    entries = [(int(c), int(s)) for c, s in zip(counts, shifts, strict=True)]
    return _tidy(entries[:3], entries[3:])


def _tidy(
    below: Sequence[tuple[int, int]], above: Sequence[tuple[int, int]]
) -> tuple[_Side, _Side]:
    """Leave out segments without codes, and make the finest step 1."""
    sides = [[entry for entry in side if entry[0]] for side in (below, above)]
    least = min(shift for side in sides for _, shift in side)
    tidied = [tuple((codes, shift - least) for codes, shift in side) for side in sides]
    return tidied[0], tidied[1]


def _least_step(shape: tuple[_Side, _Side], low: float, high: float) -> float:
    """The finest step with which a layout reaches both ends of a range.

    Infinite where a side then reaches beyond its end by a step of its last segment, or more.
    """
    reach = [sum(codes << shift for codes, shift in side) for side in shape]
    ends = (-low, high)
    if any(bool(codes) != (end > 0.0) for codes, end in zip(reach, ends, strict=True)):
        return math.inf
    pairs = [
        (side, codes, end) for side, codes, end in zip(shape, reach, ends, strict=True) if codes
    ]
    step = max(end / codes for _, codes, end in pairs)
    if any((codes - (1 << side[-1][1])) * step >= end for side, codes, end in pairs):
        return math.inf
    return step


def _neighbours(shape: tuple[_Side, _Side]) -> Iterator[tuple[_Side, _Side]]:
    """Layouts with codes moved from one segment to another, or another step of one segment."""
    below, above = shape
    total = sum(codes for side in shape for codes, _ in side)
    entries = [*below, *above]
    for i, j in itertools.permutations(range(len(entries)), 2):
        for part in sorted({total // 8, total // 32, total // 128, 1} - {0}):
            moved = list(entries)
            if part <= moved[i][0]:
                moved[i] = (moved[i][0] - part, moved[i][1])
                moved[j] = (moved[j][0] + part, moved[j][1])
                yield _tidy(moved[: len(below)], moved[len(below) :])
    for i, (codes, shift) in enumerate(entries):
        for other in (shift - 1, shift + 1):
            changed = [*entries[:i], (codes, other), *entries[i + 1 :]]
            sides = changed[: len(below)], changed[len(below) :]
            ordered = all(a[1] < b[1] for side in sides for a, b in itertools.pairwise(side))
            if ordered and 0 <= other < _SHIFTS:
                yield _tidy(*sides)


def _layout(below: _Side, above: _Side) -> SoftEdge:
    """The layout of a shape, codes from 0 up in uint8."""
    return SoftEdge(_segments(above), _segments(below), sum(codes for codes, _ in below), "uint8")


def _segments(side: _Side) -> tuple[Segment, ...]:
    if not side:
        return (Segment(1, 0, 0),)
    found: list[Segment] = []
    for number, (codes, shift) in enumerate(side):
        following = side[number + 1][1] if number + 1 < len(side) else None
        first = 0 if not found else found[-1].last + (1 << shift)
        count = codes + 1 if not found else codes
        last = first + ((count - 1) << shift)
        limit = None if following is None else last + (1 << following) / 2.0
        found.append(Segment(count, first, shift, limit))
    return tuple(found)
