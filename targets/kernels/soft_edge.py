"""Soft-edge codes in kernels: the definition of ``bitwright.soft_edge`` as expressions.

Decoding is shifts, additions and selections of int32: nothing in it is a float.
Encoding divides by the finest step in float32; all behind is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.soft_edge import Piece, Segment, SoftEdge
from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Expr

__all__ = ["decoded", "encoded"]


def decoded(layout: SoftEdge, codes: Expr, lanes: int) -> Expr:
    """Whole finest steps, int32, of codes of ``layout.dtype``."""
    wide = emit.cast(codes, "int32", lanes)

    def line(piece: Piece) -> Expr:
        shifted = wide
        if piece.shift:
            shifted = T.shift_left(wide, emit.constant(piece.shift, "int32", lanes))
        return shifted + emit.constant(piece.offset, "int32", lanes) if piece.offset else shifted

    first, *others = layout.pieces()
    result = line(first)
    for piece in others:
        beyond = wide >= emit.constant(piece.first, "int32", lanes)
        result = T.Select(beyond, line(piece), result)
    return result


def encoded(layout: SoftEdge, values: Expr, step: Expr, lanes: int) -> Expr:
    """Codes of float32 values; that of NaN is the highest.

    Parameters
    ----------
    layout
        The layout.
    values, step
        Values and the finest step, as vectors of ``lanes`` or, for one lane, scalars.
    lanes
        Length of the vectors.
    """
    steps = values / step
    magnitude = T.abs(steps)
    zero_point = emit.constant(layout.zero_point, "int32", lanes)
    positive = zero_point + _index(magnitude, layout.positive, lanes)
    negative = zero_point - _index(magnitude, layout.negative, lanes)
    below = steps < emit.constant(0.0, "float32", lanes)
    return emit.cast(T.Select(below, negative, positive), layout.dtype, lanes)


def _index(magnitude: Expr, side: Sequence[Segment], lanes: int) -> Expr:
    """Place among the codes of a side, the code of 0 being the first."""

    def number(value: float) -> Expr:
        return emit.constant(value, "float32", lanes)

    index: Expr = None
    start = 0
    limit: float | None = None
    for segment in side:
        distance = magnitude - number(segment.first) if segment.first else magnitude
        # A power of two: the product is the quotient.
        place = distance * number(1 / (1 << segment.shift)) if segment.shift else distance
        place = T.max(T.min(place, number(segment.codes - 1)), number(0.0))
        whole = T.floor(place)  # plus 0.5 first would round 0.49999997 up
        up = place - whole >= number(0.5)
        rounded = emit.cast(whole, "int32", lanes) + emit.constant(start, "int32", lanes)
        more = rounded + emit.constant(1, "int32", lanes)
        rounded = T.Select(up, more, rounded)
        if limit is None:
            index = rounded
        else:
            index = T.Select(magnitude <= number(limit), index, rounded)  # NaN is beyond
        start += segment.codes
        limit = segment.limit
    return index
