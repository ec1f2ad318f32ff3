"""Soft-edge codes: several scales for one tensor, fine for small values, coarse for outliers.

Plain integers have one step for all values: large enough for outliers it is coarse for everything
else, small enough for everything else it clips outliers. Here the codes stand in *segments* with a
step each, a power of two times the finest. So a code stands for a whole number of finest steps,

    ``value = (code << shift) + offset``     with shift and offset of the code's segment,

which one shift and one addition compute in front of a multiplier. No arithmetic of decoding is in
floating point; the tensor's scale (its finest step) goes with the layer's other scales.

The form with three segments, its table (:data:`QUAMBA_SE`) and rounding half away from zero are
those of Quamba-SE (arXiv 2601.09451). Layouts of a whole number of bits, sign included, and
segments of different extent on either side of 0 are ours.

This module imports NumPy and the standard library only. It is the definition that kernels, the
function in ONNX models and the integer reference agree with, bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from bitwright.errors import UsageError
from bitwright.vocabulary import Activation

__all__ = ["QUAMBA_SE", "Piece", "Segment", "SoftEdge"]

_SEGMENT = re.compile(r"(\d{1,5})@(\d{1,5})<<(\d{1,2})(?:<=(\d{1,5}(?:\.5)?))?", re.ASCII)
_TEXT = re.compile(r"([a-z]{1,4}\d{1,2}):(-?\d{1,5}):([^:]*):([^:]*)", re.ASCII)

_DTYPES: Final = ("int8", "uint8", "int16")
_MAX_VALUE: Final = (1 << 15) - 1  # decoded values are int16
_MAX_SHIFT: Final = 14  # of a distance between two of them


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring codes of equal step, on one side of 0.

    Attributes
    ----------
    codes
        How many; the first segment of a side counts the code of 0.
    first
        The magnitude that the first of them stands for, in finest steps.
    shift
        The distance of their values is ``1 << shift`` finest steps.
    limit
        Magnitudes up to this one (included), in finest steps, belong here, unless to a segment
        before; None for the last segment, which takes all that are larger.
    """

    codes: int
    first: int
    shift: int
    limit: float | None = None

    @property
    def last(self) -> int:
        """The magnitude that the last code stands for, in finest steps."""
        return self.first + ((self.codes - 1) << self.shift)

    def __str__(self) -> str:
        limit = "" if self.limit is None else f"<={self.limit:g}"
        return f"{self.codes}@{self.first}<<{self.shift}{limit}"


class Piece(NamedTuple):
    """Codes from ``first`` on, up to the next piece, stand for ``(code << shift) + offset``."""

    first: int
    shift: int
    offset: int


@dataclass(frozen=True, slots=True)
class SoftEdge:
    """A layout of codes.

    ``code = zero_point + i``, where ``i`` counts the codes from that of 0, upwards through
    ``positive`` and downwards through ``negative``. Larger codes never stand for smaller values.

    Attributes
    ----------
    positive, negative
        The segments on either side of 0, from 0 outwards. The first of each starts at 0.
    zero_point
        The code of 0.
    dtype
        How codes are stored: ``int8``, ``uint8`` or ``int16``.

    Raises
    ------
    UsageError
        If segments overlap or go back, a shift is above 14, the type is another one, codes do not
        fit it, or values not 16 bits.
    """

    positive: tuple[Segment, ...]
    negative: tuple[Segment, ...]
    zero_point: int = 0
    dtype: str = "int16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            _refuse(self, f"codes are {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
        for side in (self.positive, self.negative):
            if not side or side[0].first != 0 or side[-1].limit is not None:
                _refuse(self, "a side starts at 0, and its last segment has no limit")
            if any(segment.codes < 1 for segment in side):
                _refuse(self, "a segment has one code at least")
            if not all(0 <= segment.shift <= _MAX_SHIFT for segment in side):
                _refuse(self, f"shifts are 0 to {_MAX_SHIFT}")
            if side[-1].last > _MAX_VALUE:
                _refuse(
                    self, f"values reach {side[-1].last} finest steps, {_MAX_VALUE} are allowed"
                )
            for a, b in pairwise(side):
                if a.limit is None or not a.last <= a.limit <= b.first or b.last <= a.last:
                    _refuse(self, f"segment {b} does not continue {a}")
                if a.limit is not None and a.limit * 2 % 1:
                    _refuse(self, f"the limit of segment {a} is no whole number of half steps")
                if a.limit == b.first != a.last:
                    _refuse(self, f"segment {a} takes the first value of {b}")
        info = np.iinfo(self.dtype)
        if self.code_min < info.min or self.code_max > info.max:
            _refuse(self, f"codes {self.code_min} to {self.code_max} do not fit {self.dtype}")

    @property
    def code_min(self) -> int:
        """Smallest code."""
        return self.zero_point - sum(segment.codes for segment in self.negative) + 1

    @property
    def code_max(self) -> int:
        """Largest code."""
        return self.zero_point + sum(segment.codes for segment in self.positive) - 1

    @property
    def bits(self) -> int:
        """Bits that the codes need, sign included."""
        return (self.code_max - self.code_min).bit_length()

    @property
    def activation(self) -> Activation:
        """The form as plans name it: ``a8se``, or the narrowest that has enough bits."""
        if self.dtype == "int16" or self.bits > 8:
            return Activation(8, "soft-edge")
        if self.bits > 6:
            return Activation(8, "soft-edge8")
        return Activation(8, "soft-edge6") if self.bits > 4 else Activation(4, "soft-edge4")

    @property
    def value_min(self) -> int:
        """What the smallest code stands for, in finest steps."""
        return -self.negative[-1].last

    @property
    def value_max(self) -> int:
        """What the largest code stands for, in finest steps."""
        return self.positive[-1].last

    def pieces(self) -> list[Piece]:
        """How codes are decoded, from the smallest code up.

        Where two neighbouring pieces have the same shift and offset they are one.
        """
        found: list[Piece] = []
        index = 0
        for segment in self.negative:
            # i = -index - j stands for -(first + (j << shift))
            offset = (index << segment.shift) - segment.first
            last = -(index + segment.codes - 1)
            offset -= self.zero_point << segment.shift
            found.append(Piece(self.zero_point + last, segment.shift, offset))
            index += segment.codes
        found.reverse()
        index = 0
        for segment in self.positive:
            offset = segment.first - (index << segment.shift)
            offset -= self.zero_point << segment.shift
            found.append(Piece(self.zero_point + index, segment.shift, offset))
            index += segment.codes
        merged = found[:1]
        for piece in found[1:]:
            if piece[1:] != merged[-1][1:]:
                merged.append(piece)
        return merged

    def decode(self, codes: npt.ArrayLike) -> npt.NDArray[np.int16]:
        """Whole finest steps that codes stand for, in the shape of ``codes``."""
        wide = np.asarray(codes).astype(np.int32)
        pieces = self.pieces()
        result = (wide << pieces[0].shift) + pieces[0].offset
        for first, shift, offset in pieces[1:]:
            result = np.where(wide >= first, (wide << shift) + offset, result)
        return result.astype(np.int16)

    def encode(self, values: npt.ArrayLike, step: float) -> npt.NDArray[Any]:
        """Codes of float32 values.

        Parameters
        ----------
        values
            Any shape.
        step
            The finest step, a float32 number. Values are divided by it in float32; all that
            follows is exact.

        Returns
        -------
        numpy.ndarray
            Codes of type ``dtype``, in the shape of ``values``. That of NaN is the highest, as in
            integers.
        """
        with np.errstate(over="ignore"):  # what is infinite then is cut
            steps = np.asarray(values, np.float32) / np.float32(step)
        magnitude = np.fmin(np.abs(steps), np.float32(np.inf))
        positive = self._index(magnitude, self.positive)
        negative = self._index(magnitude, self.negative)
        codes = np.where(steps < 0, self.zero_point - negative, self.zero_point + positive)
        return np.asarray(codes, self.dtype)

    @staticmethod
    def _index(magnitude: npt.NDArray[np.float32], side: Sequence[Segment]) -> Any:
        index = np.zeros(magnitude.shape, np.int32)
        start = 0
        below: float | None = None
        for segment in side:
            distance = (magnitude - np.float32(segment.first)) / np.float32(1 << segment.shift)
            place = np.clip(distance, np.float32(0), np.float32(segment.codes - 1))
            whole = np.floor(place)  # plus 0.5 first would round 0.49999997 up
            rounded = start + whole.astype(np.int32) + (place - whole >= 0.5)
            index = rounded if below is None else np.where(magnitude > below, rounded, index)
            start += segment.codes
            below = segment.limit
        return index

    def __str__(self) -> str:
        sides = [",".join(map(str, side)) for side in (self.negative, self.positive)]
        return ":".join([self.dtype, str(self.zero_point), *sides])

    @classmethod
    def parse(cls, text: str) -> SoftEdge:
        """Read ``quamba-se``, or what :func:`str` gives.

        Raises
        ------
        UsageError
            If the text is no layout.
        """
        if text == "quamba-se":
            return QUAMBA_SE
        match = _TEXT.fullmatch(text)
        sides: list[tuple[Segment, ...]] = []
        for part in match.groups()[2:] if match else ():
            found = [_SEGMENT.fullmatch(entry) for entry in part.split(",")]
            sides.append(tuple(_segment(entry) for entry in found if entry is not None))
            if None in found:
                match = None
        if match is None:
            shown = text if len(text) <= 80 else f"{text[:77]}..."
            raise UsageError(
                f"{shown!r} is no soft-edge layout", fix="give quamba-se, or what a layout prints"
            )
        return cls(sides[1], sides[0], int(match[2]), match[1])

    @classmethod
    def three_scales(
        cls, edges: tuple[float, float, float], ratios: tuple[float, float, float]
    ) -> SoftEdge:
        """The authors' form, equal on both sides of 0, with sign and magnitude in int16.

        Parameters
        ----------
        edges
            Where fine, standard and outlier segment end, in units of the calibrated scale.
        ratios
            Their steps, in the same unit: powers of two times the first, none smaller than the one
            before.

        Raises
        ------
        UsageError
            If edges are no whole numbers of finest steps that go up, or ratios no powers of two.
        """
        what = f"soft edge with edges {edges} and ratios {ratios}"
        if min(ratios) <= 0:
            raise UsageError(f"{what}: ratios must be above 0")
        relative = [ratio / ratios[0] for ratio in ratios]
        shifts = [math.log2(ratio) if ratio > 0 else -math.inf for ratio in relative]
        steps = [edge / ratios[0] for edge in edges]
        whole = all(math.isfinite(value) and value == int(value) for value in (*shifts, *steps))
        if not whole or shifts != sorted(shifts) or steps != sorted(set(steps)) or steps[0] < 0:
            raise UsageError(
                f"{what}: edges must go up in whole finest steps, ratios be powers of two times "
                "the first",
                fix="the authors' are edges 15.75, 143, 395 and ratios 0.25, 1, 4",
            )
        fine, standard, outlier = (int(value) for value in shifts)
        ends = [int(value) for value in steps]
        first = ((ends[0] >> standard) + 1) << standard
        if (ends[1] - first) % (1 << standard) or (ends[2] - ends[1]) % (1 << outlier):
            raise UsageError(f"{what}: an edge is no value of the segment that it ends")
        side = (
            Segment(ends[0] + 1, 0, fine, float(ends[0])),
            Segment(((ends[1] - first) >> standard) + 1, first, standard, float(ends[1])),
            # The authors' outliers start at the edge itself, whose value has two codes.
            Segment(((ends[2] - ends[1]) >> outlier) + 1, ends[1], outlier),
        )
        return cls(side, side)


def _segment(match: re.Match[str]) -> Segment:
    codes, first, shift = (int(match[group]) for group in (1, 2, 3))
    return Segment(codes, first, shift, None if match[4] is None else float(match[4]))


def _refuse(layout: SoftEdge, why: str) -> None:
    raise UsageError(f"{layout} is no soft-edge layout: {why}")


QUAMBA_SE: Final = SoftEdge.three_scales((15.75, 143.0, 395.0), (0.25, 1.0, 4.0))
"""The table of Quamba-SE: 64 fine, 128 standard and 64 outlier magnitudes and a sign, 9 bits.

The finest step is a quarter of the calibrated scale.
"""
