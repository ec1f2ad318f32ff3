"""Soft-edge codes in kernels: the definition of ``bitwright.soft_edge`` as expressions.

Decoding is shifts, additions and selections of integers: nothing in it is a float.
Encoding divides by the finest step in float32; all behind is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.soft_edge import Piece, Segment, SoftEdge
from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Expr

__all__ = ["decoded", "encoded"]


def decoded(layout: SoftEdge, codes: Expr, lanes: int) -> Expr:
    """Whole finest steps, int32, of codes of ``layout.dtype`` that the layout has."""
    dtype = _width(layout)
    wide = emit.cast(codes, dtype, lanes)
    pieces = layout.pieces()
    mirrored = layout.zero_point == 0 and layout.positive == layout.negative
    index = wide
    if mirrored:  # half of the pieces, of magnitudes
        index = T.max(wide, emit.constant(0, dtype, lanes) - wide)
        while len(pieces) > 1 and pieces[1].first <= 0:
            del pieces[0]
    first, *others = pieces

    def line(piece: Piece) -> Expr:
        shifted = index
        if piece.shift:
            shifted = T.shift_left(index, emit.constant(piece.shift, dtype, lanes))
        return shifted + emit.constant(piece.offset, dtype, lanes) if piece.offset else shifted

    result = line(first)
    for piece in others:
        beyond = index >= emit.constant(piece.first, dtype, lanes)
        result = T.Select(beyond, line(piece), result)
    if mirrored:
        zero = emit.constant(0, dtype, lanes)
        result = T.Select(wide < zero, zero - result, result)
    return emit.cast(result, "int32", lanes)


def _width(layout: SoftEdge) -> str:
    """The narrowest type, twice as many of which a vector holds, that decoding does not leave."""
    bounds = [
        number
        for code in (layout.code_min, layout.code_max)
        for piece in layout.pieces()
        for number in (code << piece.shift, (code << piece.shift) + piece.offset, piece.offset)
    ]
    return "int16" if max(map(abs, bounds)) < 2**15 else "int32"


def encoded(
    layout: SoftEdge,
    values: Expr,
    step: Expr,
    lanes: int,
    bind: Callable[[Expr], Expr] = emit.bind,
) -> Expr:
    """Codes of float32 values; that of NaN is the highest.

    Parameters
    ----------
    layout
        The layout.
    values, step
        Values and the finest step, as vectors of ``lanes`` or, for one lane, scalars.
    lanes
        Length of the vectors.
    bind
        Computes an expression once, where there are statements.
    """
    steps = bind(values / step)
    magnitude = bind(T.abs(steps))

    def number(value: float) -> Expr:
        return emit.constant(value, "float32", lanes)

    def of_side(side: Sequence[Segment]) -> list[Expr]:
        """First value, twice the inverse of the step, last place, and codes before, of segments."""
        found: list[Expr] = []
        start = 0
        limit: float | None = None
        for segment in side:
            mine = [
                number(segment.first),
                number(2 / (1 << segment.shift)),
                number(2 * (segment.codes - 1)),
                emit.constant(2 * start + 1, "int32", lanes),
            ]
            if limit is not None:
                within = magnitude <= number(limit)  # NaN is beyond
                pairs = zip(found, mine, strict=True)
                mine = [T.Select(within, before, entry) for before, entry in pairs]
            found = mine
            start += segment.codes
            limit = segment.limit
        return found

    below = steps < number(0.0)
    chosen = of_side(layout.positive)
    if layout.negative != layout.positive:
        others = of_side(layout.negative)
        chosen = [T.Select(below, b, a) for a, b in zip(chosen, others, strict=True)]
    first, doubled, last, start = chosen
    # Steps are powers of two: the product is the quotient, twice. Half of one more than its whole
    # part rounds halves up, and 0.49999997 down.
    sides = (layout.positive, layout.negative)
    if any(map(_goes_beyond, sides)):
        place = T.min((magnitude - first) * doubled, last)
    else:
        upper, lower = number(layout.value_max), number(-layout.value_min)
        most = upper if sides[0][-1].last == sides[1][-1].last else T.Select(below, lower, upper)
        place = (T.min(magnitude, most) - first) * doubled
    if any(map(_falls_below, sides)):
        place = T.max(place, number(0.0))
    twice = emit.cast(place, "int32", lanes)
    index = bind(T.shift_right(twice + start, emit.constant(1, "int32", lanes)))
    signed = T.Select(below, emit.constant(0, "int32", lanes) - index, index)
    return emit.cast(signed + emit.constant(layout.zero_point, "int32", lanes), layout.dtype, lanes)


def _goes_beyond(side: Sequence[Segment]) -> bool:
    """Whether values of a segment, the last aside, are half a step and more above its last."""
    return any(
        segment.limit is not None and segment.limit >= segment.last + (1 << segment.shift) / 2
        for segment in side
    )


def _falls_below(side: Sequence[Segment]) -> bool:
    """Whether values of a segment are more than half a step below its first."""
    return any(
        b.first - (0.0 if a.limit is None else a.limit) > (1 << b.shift) / 2
        for a, b in pairwise(side)
    )
