from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bitwright import Layer, Precision, targets
from bitwright.errors import UsageError
from tests.targets.descriptions import changed

CONV = Layer.conv(in_channels=16, out_channels=32, kernel=3, output=8)  # 294,912 MACs


@pytest.mark.parametrize("weight_bits", [2, 4, 8, 16])
@pytest.mark.parametrize("activation_bits", [2, 4, 8, 16])
def test_speed_of_bit_fusion_in_mohaq(weight_bits: int, activation_bits: int) -> None:
    # arXiv 2108.01192: by the product of the two widths.
    published = {256: 1, 128: 2, 64: 4, 32: 8, 16: 16, 8: 32, 4: 64}
    cost = targets.get("bitfusion/mohaq").cost(CONV, Precision(weight_bits, activation_bits))
    assert cost.relative_cycles == CONV.macs / published[weight_bits * activation_bits]  # type: ignore[operator]
    undefined = (cost.cycles, cost.seconds, cost.energy_pj, cost.dram_read_bits)
    assert undefined == (None,) * 4


@pytest.mark.parametrize(
    "bits, speed, energy", [(16, 1, 1.666), (8, 2, 0.542), (4, 4, 0.15325)]
)  # arXiv 2108.01192
def test_silago(bits: int, speed: int, energy: float) -> None:
    cost = targets.get("silago/drra").cost(CONV, Precision(bits, bits))
    assert CONV.macs is not None
    assert cost.relative_cycles == CONV.macs / speed
    assert cost.energy_pj is not None
    assert cost.energy_pj["mac"] == pytest.approx(CONV.macs * energy)
    assert cost.energy_pj["memory"] == pytest.approx(0.08 * bits * 16 * 32 * 9)


def table(tmp_path: Path, **cost: Any) -> Path:
    document = {"model": "precision-table", **cost}
    allowed = {"weight_bits": [4, 8], "activation_bits": [8], "tied": False, "source": "mohaq"}
    return changed(tmp_path, "silago/drra", {"cost": document, "precisions": allowed})


def number(value: Any) -> dict[str, Any]:
    return {"value": value, "source": "mohaq"}


def test_a_table_of_measured_throughput(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        macs_per_cycle=number({"w8a8": 256, "w4a8": 500.5}),
        frequency_mhz=number(200),
    )
    cost = targets.get(path).cost(CONV, Precision(4, 8))
    assert cost.cycles == math.ceil(294912 / 500.5)
    assert cost.seconds == pytest.approx(cost.cycles / 200e6)
    assert cost.peak_macs_per_cycle == 500.5
    assert cost.relative_cycles is None


@pytest.mark.parametrize(
    "cost, message",
    [
        ({}, "give one of relative_speed and macs_per_cycle"),
        (
            {"relative_speed": number({"w8a8": 1})},
            "has no entry for w4a8, which the accelerator allows",
        ),
        (
            {"relative_speed": number({"w8a8": 1, "w4a8": 2, "w2a2": 3})},
            "has an entry for w2a2, which the accelerator does not allow",
        ),
        ({"relative_speed": number({"w8a8": 1, "w4a9": 2})}, "activation_bits is 9"),
        ({"relative_speed": number({"w8a8": 1, "w4a8": 0})}, "greater than 0"),
        (
            {"relative_speed": number({"w8a8": 1, "w4a8": 1}), "mac_energy_pj": number({})},
            "go together",
        ),
    ],
)
def test_bad_tables(tmp_path: Path, cost: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        targets.get(table(tmp_path, **cost))
    assert "changed.yaml:" in str(raised.value)
