"""The bounds of the table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.bootstrap import Estimate
from benchmarks.mamba_activations import broken


def row(name: str, reference: str, *, points: float, decibels: float = 0.0) -> dict[str, Any]:
    """A row whose differences have intervals of a point and a dB on either side."""
    return {
        "configuration": name,
        "reference": reference,
        "agreement": Estimate(0.9 + points / 100, 0.8, 1.0),
        "agreement_difference": Estimate(*((points + end) / 100 for end in (0.0, -1.0, 1.0))),
        "sqnr_difference": Estimate(decibels, decibels - 1, decibels + 1),
    }


@pytest.mark.parametrize(
    "name, reference, holds, breaks",
    [
        ("scan/quamba 99 pre-softplus x a8se", "scan/...", (-0.9, 1.1), (9.0, 0.9)),
        ("scan/quamba 99.9 pre-softplus x a8se8", "scan/...", (-0.9, 1.1), (-1.1, 9.0)),
        ("scan/quamba 99 x a8se", "scan/quamba 99", (-0.9, 0.0), (-1.1, 9.0)),
        ("scan/quamba 100 x a8se", "scan/quamba 100", (-0.9, 0.0), (-1.1, 9.0)),
        ("scan/quamba 100 x a4", "scan/quamba 100", (-9.0, -9.0), None),
        ("all/a8se8 mmse asymmetric pre-softplus", "all/a8 99", (4.1, 4.1), (4.1, 3.9)),
        ("all/a8se8 mmse asymmetric pre-softplus", "all/a8 99", (4.1, 4.1), (3.9, 4.1)),
        (
            "all/a8se8 mmse asymmetric pre-softplus",
            "all/a8 mmse asymmetric pre-softplus",
            (-0.9, 0.0),
            (-1.1, 9.0),
        ),
        ("all/chosen", "all/a8 99", (6.0, 0.0), (5.9, 9.0)),
    ],
)
def test_bounds(
    name: str,
    reference: str,
    holds: tuple[float, float],
    breaks: tuple[float, float] | None,
) -> None:
    float_model = {"configuration": "float", "agreement": Estimate(1.0, 1.0, 1.0)}
    assert not broken([float_model, row(name, reference, points=holds[0], decibels=holds[1])])
    if breaks is not None:
        (text,) = broken([row(name, reference, points=breaks[0], decibels=breaks[1])])
        assert text.startswith(name)
