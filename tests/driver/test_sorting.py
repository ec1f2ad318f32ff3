"""``bitwright sorting-unit``: a file with the circuit, or a reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest

import bitwright
from bitwright.errors import OutputError, UsageError


def test_the_file_holds_the_circuit(tmp_path: Path) -> None:
    path = tmp_path / "unit.v"
    unit = bitwright.sorting_unit(9, output=path, buckets=4, name="psu")
    assert unit.bucket_map == (0, 0, 0, 1, 1, 2, 2, 3, 3)
    assert path.read_text(encoding="utf-8") == unit.verilog("psu")
    with pytest.raises(OutputError):
        bitwright.sorting_unit(9, output=path)


@pytest.mark.parametrize("map_", ["quantile", "calibrated"])
def test_a_circuit_needs_the_map_itself(tmp_path: Path, map_: str) -> None:
    with pytest.raises(UsageError, match="a circuit needs the map itself"):
        bitwright.sorting_unit(9, output=tmp_path / "unit.v", buckets=4, map_=map_)
    assert not list(tmp_path.iterdir())
