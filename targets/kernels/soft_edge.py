"""Soft-edge codes in kernels: the definition of ``bitwright.soft_edge`` as expressions.

Decoding is shifts, additions and selections of integers: nothing in it is a float.
Encoding divides by the finest step in float32; all behind is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.soft_edge import Piece, Segment, SoftEdge
from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Expr

__all__ = ["decoded", "encoded"]


def decoded(layout: SoftEdge, codes: Expr, lanes: int) -> Expr:
    """Whole finest steps, int32, of codes of ``layout.dtype`` that the layout has."""
    dtype = _width(layout)
    wide = emit.cast(codes, dtype, lanes)

    def line(piece: Piece) -> Expr:
        shifted = wide
        if piece.shift:
            shifted = T.shift_left(wide, emit.constant(piece.shift, dtype, lanes))
        return shifted + emit.constant(piece.offset, dtype, lanes) if piece.offset else shifted

    first, *others = layout.pieces()
    result = line(first)
    for piece in others:
        beyond = wide >= emit.constant(piece.first, dtype, lanes)
        result = T.Select(beyond, line(piece), result)
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
        """First value, inverse of the step, last place and number of codes before, of segments."""
        found: list[Expr] = []
        start = 0
        limit: float | None = None
        for segment in side:
            mine = [segment.first, 1 / (1 << segment.shift), segment.codes - 1, start]
            if limit is None:
                found = [number(entry) for entry in mine]
            else:
                within = magnitude <= number(limit)  # NaN is beyond
                found = [
                    T.Select(within, before, number(entry))
                    for before, entry in zip(found, mine, strict=True)
                ]
            start += segment.codes
            limit = segment.limit
        return found

    below = steps < number(0.0)
    chosen = of_side(layout.positive)
    if layout.negative != layout.positive:
        others = of_side(layout.negative)
        chosen = [T.Select(below, b, a) for a, b in zip(chosen, others, strict=True)]
    first, inverse, last, start = chosen
    # Steps are powers of two: the product is the quotient.
    place = T.max(T.min((magnitude - first) * inverse, last), number(0.0))
    place = bind(place)
    whole = bind(T.floor(place))  # plus 0.5 first would round 0.49999997 up
    up = T.Select(place - whole >= number(0.5), number(1.0), number(0.0))
    index = emit.cast(whole + up + start, "int32", lanes)
    signed = T.Select(below, emit.constant(0, "int32", lanes) - index, index)
    return emit.cast(signed + emit.constant(layout.zero_point, "int32", lanes), layout.dtype, lanes)
