"""Soft-edge codes against the published table, walked segments and brute force."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import UsageError
from bitwright.soft_edge import QUAMBA_SE, Segment, SoftEdge
from tests.quant.qdq import profile

EXAMPLE = SoftEdge.parse("uint8:3:2@0<<0<=1,2@2<<1:4@0<<0<=3.5,2@4<<0<=5,247@7<<2")


def half_away(value: float) -> int:
    return math.floor(abs(value) + 0.5) * (1 if value >= 0 else -1)


def published(x: float, s: float) -> float:
    """Value of x by the table of Quamba-SE, arXiv 2601.09451, in exact arithmetic."""
    magnitude, sign = abs(x), math.copysign(1.0, x)
    if magnitude <= 15.75 * s:
        return min(max(half_away(4 * x / s), -63), 63) * s / 4
    if magnitude <= 143 * s:
        return sign * min(max(half_away(magnitude / s), 16), 143) * s
    if math.isinf(magnitude):
        return sign * 395 * s
    return sign * (143 * s + 4 * s * min(max(half_away((magnitude - 143 * s) / (4 * s)), 0), 63))


def value_of(layout: SoftEdge, x: float, s: float) -> float:
    """What x is after encoding and decoding, with the finest step s/4."""
    return float(layout.decode(layout.encode(x, s / 4))) * s / 4


@pytest.mark.parametrize("s", [1.0, 0.5, 8.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    "x, expected",
    [
        (0.0, 0.0),
        (0.124, 0.0),
        (0.125, 0.25),  # a tie goes away from 0
        (0.375, 0.5),
        (15.625, 15.75),
        (15.75, 15.75),
        (15.75001, 16.0),  # the standard segment starts at 16
        (16.0, 16.0),
        (16.499, 16.0),
        (16.5, 17.0),
        (142.5, 143.0),
        (143.0, 143.0),
        (143.5, 143.0),  # an outlier
        (144.999, 143.0),
        (145.0, 147.0),
        (147.0, 147.0),
        (149.0, 151.0),
        (392.999, 391.0),
        (393.0, 395.0),
        (395.0, 395.0),
        (397.0, 395.0),
        (1e30, 395.0),
        (math.inf, 395.0),
    ],
)
def test_boundaries_of_the_published_table(
    x: float, expected: float, sign: float, s: float
) -> None:
    assert published(sign * x * s, s) == sign * expected * s
    assert value_of(QUAMBA_SE, sign * x * s, s) == sign * expected * s


def test_the_published_table_everywhere() -> None:
    values = np.arange(-420 * 16, 420 * 16 + 1) / 16.0  # ties of all segments are among them
    found = QUAMBA_SE.decode(QUAMBA_SE.encode(values, 0.25)) * 0.25
    np.testing.assert_array_equal(found, [published(float(x), 1.0) for x in values])


def test_codes_of_the_published_table_are_8_bits_of_magnitude_and_a_sign() -> None:
    assert (QUAMBA_SE.code_min, QUAMBA_SE.code_max, QUAMBA_SE.bits) == (-255, 255, 9)
    assert [segment.codes for segment in QUAMBA_SE.positive] == [64, 128, 64]
    assert (QUAMBA_SE.value_max, QUAMBA_SE.value_min) == (4 * 395, -4 * 395)
    assert str(QUAMBA_SE.activation) == "a8se"


def test_halves_round_away_from_zero_and_what_lies_below_does_not() -> None:
    below = np.nextafter(np.float32(0.5), np.float32(0))  # plus 0.5 it would be 1.0 in float32
    assert EXAMPLE.encode([below, 0.5, -below, -0.5], 1.0).tolist() == [3, 4, 3, 2]


def test_what_is_no_number_or_beyond_all() -> None:
    codes = EXAMPLE.encode([np.inf, -np.inf, np.nan, -0.0, 3e38], 1e-30)
    assert codes.tolist() == [EXAMPLE.code_max, EXAMPLE.code_min, EXAMPLE.code_max, 3, 255]
    assert QUAMBA_SE.encode(np.nan, 1.0) == 255  # the highest, as in integers


def test_shapes_and_types() -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (2, 0, 3), (2, 3)]
    for shape in shapes:
        codes = EXAMPLE.encode(np.zeros(shape, np.float32), 0.1)
        assert codes.shape == EXAMPLE.decode(codes).shape == shape
        assert codes.dtype == np.uint8
        assert EXAMPLE.decode(codes).dtype == np.int16


# -- any layout ----------------------------------------------------------------------------------


@st.composite
def sides(draw: st.DrawFn, most: int) -> tuple[Segment, ...]:
    """Segments of one side; gaps of any width, limits anywhere in them."""
    found: list[Segment] = []
    for number in range(draw(st.integers(1, 4))):
        codes = draw(st.integers(1, most))
        shift = draw(st.integers(0, 5))
        first = 0
        if number:
            before = found[-1]
            first = before.last + draw(st.integers(0 if shift or codes > 1 else 1, 40))
            # The value of the first code belongs to it, unless the segment before has it too.
            highest = 2 * first - (first > before.last)
            limit = draw(st.integers(2 * before.last, highest)) / 2.0
            found[-1] = Segment(before.codes, before.first, before.shift, limit)
        segment = Segment(codes, first, shift)
        if number and segment.last <= found[-1].last:
            found[-1] = Segment(found[-1].codes, found[-1].first, found[-1].shift)
            break
        found.append(segment)
    return tuple(found)


@st.composite
def layouts(draw: st.DrawFn) -> SoftEdge:
    dtype = draw(st.sampled_from(["int8", "uint8", "int16"]))
    positive, negative = draw(sides(25)), draw(sides(25))
    below = sum(segment.codes for segment in negative) - 1
    zero_point = below if dtype == "uint8" else draw(st.integers(-4, 4))
    return SoftEdge(positive, negative, zero_point, dtype)


def walked(layout: SoftEdge) -> dict[int, int]:
    """Value of every code, segment by segment."""
    found = {}
    for side, sign in ((layout.positive, 1), (layout.negative, -1)):
        code = layout.zero_point
        for segment in side:
            for number in range(segment.codes):
                found[code] = sign * (segment.first + number * 2**segment.shift)
                code += sign
    return found


@profile(200)
@given(layouts())
def test_text_form_and_decoding(layout: SoftEdge) -> None:
    assert SoftEdge.parse(str(layout)) == layout
    values = walked(layout)
    codes = sorted(values)
    assert (codes[0], codes[-1]) == (layout.code_min, layout.code_max)
    assert layout.decode(codes).tolist() == [values[code] for code in codes]
    assert all(a <= b for a, b in pairwise(layout.decode(codes).tolist()))
    # One shift and one addition, as in front of a multiplier.
    for code in codes:
        piece = [entry for entry in layout.pieces() if entry.first <= code][-1]
        assert (code << piece.shift) + piece.offset == values[code]


@profile(200)
@given(layouts(), st.integers(-40, 40), st.integers(1, 511))
def test_values_of_codes_stay_what_they_are(layout: SoftEdge, exponent: int, few: int) -> None:
    """Exactly: a value of 15 bits times a step of at most 9, divided by it."""
    step = np.float32(few * 2.0**exponent)
    values = layout.decode(np.arange(layout.code_min, layout.code_max + 1))
    codes = layout.encode(values * step, float(step))
    np.testing.assert_array_equal(layout.decode(codes), values)


@profile(200)
@given(layouts(), st.floats(2.0**-40, 2.0**40, width=32))
def test_values_of_codes_are_lost_at_limits_only(layout: SoftEdge, step: float) -> None:
    """Values at the limit of their segment may become the first ones of the next."""
    codes = np.arange(layout.code_min, layout.code_max + 1)
    values = layout.decode(codes)
    found = layout.decode(layout.encode(values * np.float32(step), step))
    quotients = values * np.float32(step) / np.float32(step)
    for value, quotient, other in zip(
        values.tolist(), quotients.tolist(), found.tolist(), strict=True
    ):
        if other == value:
            continue
        side = layout.negative if value < 0 else layout.positive
        assert quotient != value
        after = [b.first for a, b in pairwise(side) if a.limit == abs(value)]
        assert abs(other) in after


def test_values_at_limits_are_lost_for_some_steps() -> None:
    steps = np.random.default_rng(3).uniform(0.01, 1, 2000).astype(np.float32)
    edges = {float(step): np.float32(63) * step / step for step in steps}
    lost = {step for step, quotient in edges.items() if quotient > 63}
    assert 0 < len(lost) < len(steps) / 4
    for step in edges:
        code = QUAMBA_SE.encode(np.float32(63) * np.float32(step), step)
        assert QUAMBA_SE.decode(code) == (64 if step in lost else 63)


@profile(100)
@given(layouts(), st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=60))
def test_encoding_is_monotone(layout: SoftEdge, values: list[float]) -> None:
    codes = layout.encode(sorted(values), 1.0).astype(int)
    assert (np.diff(codes) >= 0).all()


@profile(100)
@given(layouts(), st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=60))
def test_encoding_rounds_within_the_segment_of_a_value(
    layout: SoftEdge, values: list[float]
) -> None:
    for x in values:
        side = layout.negative if x < 0 else layout.positive
        fits = [s for s in side if s.limit is None or abs(x) <= s.limit]
        segment = fits[0]
        own = [segment.first + n * 2**segment.shift for n in range(segment.codes)]
        least = min(abs(abs(x) - value) for value in own)
        found = abs(int(layout.decode(layout.encode(x, 1.0))))
        assert found in own
        assert abs(abs(x) - found) == least


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "quamba",
        "uint8:0:1@0<<0",
        "uint8:0:1@0<<0:1@0<<0,",
        "uint8:0:1@0<<0:4@0<<0<=3.25,1@4<<0",
        "uint8:0:1@0<<0:4@0<0",
        "uint8:0:1@0<<0:4@0<<99999999999999",
        "uint8:0:1@0<<0:4@0<<" + "9" * 5000,
        "int16:0:1@0<<0:" + "9" * 5000 + "@0<<0",
        "int16:" + "9" * 5000 + ":1@0<<0:1@0<<0",
        "int16:0:1@0<<0:\N{ARABIC-INDIC DIGIT FOUR}@0<<0",
    ],
)
def test_texts_that_are_no_layout(text: str) -> None:
    with pytest.raises(UsageError, match="no soft-edge layout") as caught:
        SoftEdge.parse(text)
    assert "quamba-se" in str(caught.value)


@pytest.mark.parametrize(
    "text, why",
    [
        ("uint8:0:1@0<<0:257@0<<0", "codes 0 to 256 do not fit uint8"),
        ("uint8:0:2@0<<0:2@0<<0", "codes -1 to 1 do not fit uint8"),
        ("int16:0:1@0<<0:9@1<<0", "a side starts at 0"),
        ("int16:0:1@0<<0:9@0<<0<=8", "its last segment has no limit"),
        ("int16:0:1@0<<0:0@0<<0", "one code at least"),
        ("int16:0:1@0<<0:3@0<<0,3@3<<0", "does not continue"),
        ("int16:0:1@0<<0:3@0<<0<=1,3@3<<0", "does not continue"),
        ("int16:0:1@0<<0:3@0<<0<=4,3@3<<0", "does not continue"),
        ("int16:0:1@0<<0:3@0<<0<=2,1@2<<0", "does not continue"),
        ("int16:0:1@0<<0:3@0<<0<=3,3@3<<0", "takes the first value of 3@3<<0"),
        ("uint16:0:1@0<<0:1@0<<0", "codes are int8, uint8 or int16"),
        ("uint32:0:1@0<<0:1@0<<0", "codes are int8, uint8 or int16"),
        ("uint8:3:4@0<<0:1@0<<40", "shifts are 0 to 14"),  # even of one code
        ("uint8:3:2@0<<15,2@99<<0:1@0<<0", "shifts are 0 to 14"),
        ("int16:0:1@0<<0:256@0<<8", "values reach 65280 finest steps, 32767 are allowed"),
    ],
)
def test_layouts_that_cannot_be(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        SoftEdge.parse(text)


@pytest.mark.parametrize(
    "edges, ratios",
    [
        ((15.75, 143, 395), (0.25, 1, 3)),
        ((15.75, 143, 395), (1, 0.25, 4)),
        ((15.75, 143, 395), (0, 1, 4)),
        ((15.8, 143, 395), (0.25, 1, 4)),
        ((143, 15.75, 395), (0.25, 1, 4)),
        ((15.75, 142.5, 395), (0.25, 1, 4)),
        ((15.75, 143, 396), (0.25, 1, 4)),
        ((-1, 143, 395), (0.25, 1, 4)),
        ((15.75, 143, math.inf), (0.25, 1, 4)),
        ((15.75, math.nan, 395), (0.25, 1, 4)),
        ((15.75, 143, 395), (0.25, 1, math.inf)),
        ((15.75, 143, 395), (0.25, 1, math.nan)),
        ((15.75, 143, 395), (math.nan, 1, 4)),
        ((15.75, 143, 395), (math.inf, math.inf, math.inf)),
        ((15.75, 143, 1e300), (1e-300, 1, 4)),
        ((15.75, 143, 395), (1e300, 1e-300, 4)),
    ],
)
def test_edges_and_ratios_that_make_no_layout(edges: Any, ratios: Any) -> None:
    with pytest.raises(UsageError, match="edges"):
        SoftEdge.three_scales(edges, ratios)


def test_other_edges_and_ratios() -> None:
    layout = SoftEdge.three_scales((7.5, 63.0, 127.0), (0.5, 1.0, 2.0))
    assert [segment.codes for segment in layout.positive] == [16, 56, 33]
    values = np.arange(-200, 200.5, 0.25)
    found = layout.decode(layout.encode(values, 0.5)) * 0.5

    def expected(x: float) -> float:
        a, sign = abs(x), math.copysign(1.0, x)
        if a <= 7.5:
            return half_away(2 * x) / 2
        if a <= 63:
            return sign * max(half_away(a), 8)
        return sign * (63 + 2 * min(half_away((a - 63) / 2), 32))

    np.testing.assert_array_equal(found, [expected(float(x)) for x in values])
