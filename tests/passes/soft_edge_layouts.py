"""Layouts in tests: the published one, and others with gaps, of unequal sides and unsigned."""

from __future__ import annotations

from bitwright.soft_edge import QUAMBA_SE, Segment, SoftEdge

ASYMMETRIC = SoftEdge(
    (Segment(128, 0, 0, 130.0), Segment(60, 132, 1, 250.0), Segment(30, 256, 4)),
    (Segment(20, 0, 0, 20.5), Segment(12, 22, 2)),
    zero_point=31 - 128,
    dtype="int8",
)
"""One byte a value, gaps between segments, few values below 0."""

UNSIGNED = SoftEdge(
    (Segment(5, 0, 2, 17.5), Segment(3, 24, 3)),
    (Segment(4, 0, 0, 5.5), Segment(4, 6, 3)),
    zero_point=8,
    dtype="uint8",
)
"""Four bits a value; a first segment that is coarse."""

UNEQUAL = SoftEdge.parse("int16:0:10@0<<0<=9,5@10<<2:10@0<<0<=9,5@10<<3")
"""Nothing beyond the last values of segments, and another end on either side."""

MIRRORED = SoftEdge.parse(
    "int8:0:10@0<<0<=9,5@10<<0<=14,3@16<<2<=24.5,3@30<<4"
    ":10@0<<0<=9,5@10<<0<=14,3@16<<2<=24.5,3@30<<4"
)
"""Equal on both sides, with a segment that goes on as the one before, and a gap."""

LAYOUTS = {
    "quamba-se": QUAMBA_SE,
    "asymmetric": ASYMMETRIC,
    "unsigned": UNSIGNED,
    "unequal": UNEQUAL,
    "mirrored": MIRRORED,
}
