from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitwright import Layer, LayerCost, Precision, targets
from bitwright.targets import precision_table
from bitwright.targets.accelerators import Accelerator
from bitwright.targets.testing import check_accelerator
from tests.targets.descriptions import changed

ZIGZAG = "bitfusion/zigzag"  # slow, and an extra: tests/targets/test_zigzag.py


@pytest.mark.parametrize("name", sorted(set(targets.available()) - {ZIGZAG}))
def test_the_accelerators_that_ship_conform(name: str) -> None:
    check_accelerator(name)


def test_paths_are_taken_too(tmp_path: Path) -> None:
    check_accelerator(changed(tmp_path, "generic/systolic", {}))


Cost = Callable[[LayerCost, Layer, Precision], LayerCost]
calls = itertools.count()

WRONG: dict[str, tuple[Cost, str]] = {
    "negative": (lambda cost, _, __: replace(cost, relative_cycles=-1.0), "relative_cycles is -1"),
    "infinite": (
        lambda cost, _, __: replace(cost, energy_pj={"mac": float("inf")}),
        r"energy_pj\[mac\] is inf",
    ),
    "operations": (
        lambda cost, _, __: replace(cost, macs=1),
        "macs or weight_bits are not the layer's",
    ),
    "weights": (
        lambda cost, _, __: replace(cost, weight_bits=cost.weight_bits // 8),
        "macs or weight_bits are not the layer's",
    ),
    "nothing": (
        lambda cost, _, __: replace(cost, relative_cycles=None, energy_pj=None),
        "neither cycles nor energy",
    ),
    "stalls": (
        lambda cost, _, __: replace(cost, cycles=5.0, stall_cycles=6.0),
        "there are more stall_cycles than cycles",
    ),
    "utilization": (
        lambda cost, _, __: replace(cost, cycles=5.0, peak_macs_per_cycle=1.0),
        "of what the array can",
    ),
    "falls with bits": (
        lambda cost, _, precision: replace(cost, relative_cycles=1.0 / precision.weight_bits),
        "relative_cycles is 0.25 at w4a4 and only 0.125 at w8a8",
    ),
    "another precision": (
        lambda cost, _, __: replace(cost, precision=Precision(16, 16)),
        "gives the cost of 'conv' at w16a16, not at w4a4",
    ),
    "another layer": (lambda cost, _, __: replace(cost, layer="x"), "gives the cost of 'x'"),
    "by name": (
        lambda cost, layer, _: replace(cost, relative_cycles=float(len(layer.name))),
        "two equal calls, two costs",
    ),
    "another every time": (
        lambda cost, _, __: replace(cost, relative_cycles=1.0 + 1e-6 * next(calls)),
        "two equal calls, two costs",
    ),
    "at some precisions": (
        lambda cost, _, precision: (
            replace(cost, energy_pj=None) if precision.weight_bits == 8 else cost
        ),
        "energy_pj is defined at some precisions only",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_conform_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = WRONG[wrong]
    original = precision_table.PrecisionTable.layer_cost

    def layer_cost(self: Any, layer: Layer, precision: Precision) -> LayerCost:
        return change(original(self, layer, precision), layer, precision)

    monkeypatch.setattr(precision_table.PrecisionTable, "layer_cost", layer_cost)
    with pytest.raises(AssertionError, match=message):
        check_accelerator("silago/drra")


def test_precisions_that_are_not_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = changed(tmp_path, "bitfusion/eyeriss", {"precisions.weight_bits": [4, 8]})
    check_accelerator(few)
    monkeypatch.setattr(Accelerator, "check", lambda *_args, **_options: None)
    with pytest.raises(AssertionError, match="has a cost at w2a2, which is not allowed"):
        check_accelerator(few)


def test_an_accelerator_without_a_cost_model(tmp_path: Path) -> None:
    path = changed(tmp_path, "silago/drra", {"cost": None})
    with pytest.raises(AssertionError, match="silago/drra has no cost model"):
        check_accelerator(path)


def test_a_link_whose_words_hold_no_codes(tmp_path: Path) -> None:
    path = changed(tmp_path, "silago/drra", {"link.word_bits.value": 2})
    with pytest.raises(AssertionError, match="words of 2 bits, and no precision has so few"):
        check_accelerator(path)
