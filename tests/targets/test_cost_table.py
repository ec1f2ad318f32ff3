from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright import Layer, LayerCost, Precision, PrecisionPlan, targets
from bitwright.errors import PlanError, UsageError
from bitwright.targets import Accelerator, bitfusion
from bitwright.targets.cost_table import QUANTITIES, CostTable, cache_file, cost_table
from tests.targets.descriptions import changed

EYERISS, SILAGO = targets.get("bitfusion/eyeriss"), targets.get("silago/drra")
LAYERS = [
    Layer.conv(in_channels=3, out_channels=16, kernel=3, output=16, name="first"),
    Layer.conv(in_channels=16, out_channels=16, kernel=3, output=16, name="second"),
    Layer.conv(in_channels=16, out_channels=16, kernel=3, output=16, name="third"),
    Layer.matmul(rows=1, in_features=64, out_features=10, name="last"),
]


def test_totals_are_the_costs_of_plans() -> None:
    table = cost_table(EYERISS, LAYERS)
    assert table.values.shape == (4, 16, len(QUANTITIES))
    generator = np.random.default_rng(0)
    for _ in range(20):
        draws = generator.choice([2, 4, 8, 16], size=(len(LAYERS), 2))
        plan = {
            layer.name: Precision(int(weights), int(activations))
            for layer, (weights, activations) in zip(LAYERS, draws, strict=True)
        }
        cost = EYERISS.model_cost(LAYERS, plan)
        totals = dict(zip(QUANTITIES, table.totals(table.choice(plan)), strict=True))
        assert totals["cycles"] == cost.cycles
        assert totals["stall_cycles"] == cost.stall_cycles
        assert totals["dram_read_bits"] == cost.dram_read_bits
        assert totals["dram_write_bits"] == cost.dram_write_bits
        assert totals["weight_bits"] == cost.memory_bits
        assert totals["total_energy_pj"] == pytest.approx(cost.total_energy_pj)
        assert totals["seconds"] == pytest.approx(cost.seconds)
        assert np.isnan(totals["relative_cycles"])  # not defined by this model
        assert (table.choice(PrecisionPlan(layers=plan)) == table.choice(plan)).all()


def test_many_plans_at_once() -> None:
    table = cost_table(SILAGO, LAYERS)
    choices = np.random.default_rng(0).integers(0, 3, size=(5, 7, 4))
    totals = table.totals(choices)
    assert totals.shape == (5, 7, len(QUANTITIES))
    np.testing.assert_array_equal(totals[2, 3], table.totals(choices[2, 3]))


def test_costs_carry_the_names_of_their_layers() -> None:
    table = cost_table(EYERISS, LAYERS, precisions=[Precision(8, 8), Precision(2, 4)])
    assert [[cost.layer for cost in row] for row in table.costs] == [
        [layer.name] * 2 for layer in LAYERS
    ]
    for layer, row in zip(LAYERS, table.costs, strict=True):
        assert list(row) == [EYERISS.cost(layer, p) for p in table.precisions]


def test_plans_that_are_not_in_the_table() -> None:
    table = cost_table(EYERISS, LAYERS, precisions=[Precision(8, 8)])
    plan = {layer.name: Precision(8, 8) for layer in LAYERS}
    with pytest.raises(PlanError, match=r"layer 'third' has no precision .*: w4a4"):
        table.choice({**plan, "third": Precision(4, 4)})
    del plan["second"]
    with pytest.raises(PlanError, match=r"layer 'second' .*: none at all"):
        table.choice(plan)


def test_what_has_no_table() -> None:
    with pytest.raises(UsageError, match="there are no layers"):
        cost_table(EYERISS, [])
    with pytest.raises(PlanError, match="cannot do the precision"):
        cost_table(SILAGO, LAYERS, precisions=[Precision(2, 2)])


# -- the file of costs ---------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the Bit Fusion model."""
    calls: list[Any] = []
    original = bitfusion.BitFusion.layer_cost

    def layer_cost(self: Any, layer: Layer, precision: Precision, **options: Any) -> LayerCost:
        calls.append((layer.name, precision))
        return original(self, layer, precision, **options)

    monkeypatch.setattr(bitfusion.BitFusion, "layer_cost", layer_cost)
    return calls


def same(first: CostTable, second: CostTable) -> bool:
    return first.costs == second.costs and np.array_equal(
        first.values, second.values, equal_nan=True
    )


def test_equal_layers_are_computed_once(counted: list[Any]) -> None:
    cost_table(EYERISS, LAYERS)
    assert len(counted) == 3 * 16


def test_costs_are_kept_by_content(tmp_path: Path, counted: list[Any]) -> None:
    cache = tmp_path / "folder" / "costs.sqlite"
    few = cost_table(EYERISS, LAYERS[:2], precisions=[Precision(8, 8)], cache=cache)
    assert len(counted) == 2
    whole = cost_table(EYERISS, LAYERS, cache=cache)  # what is there is used, the rest is added
    assert len(counted) == 3 * 16
    again = cost_table(EYERISS, LAYERS, cache=cache)
    assert len(counted) == 3 * 16
    assert same(whole, again)
    assert same(whole, cost_table(EYERISS, LAYERS))
    assert few.costs[0][0] == again.costs[0][-6]  # w8a8


def test_what_is_refused_is_refused_from_the_file_too(tmp_path: Path) -> None:
    cache = tmp_path / "costs.sqlite"
    cost_table(SILAGO, LAYERS, cache=cache)
    no_conv = targets.get(changed(tmp_path, "silago/drra", {"layer_kinds": ["matmul"]}))
    with pytest.raises(UsageError, match="no cost for layers of the kind 'conv'"):
        cost_table(no_conv, LAYERS, cache=cache)


def test_an_index_that_is_not_there_is_an_error() -> None:
    table = cost_table(SILAGO, LAYERS)
    with pytest.raises(IndexError):
        table.totals(np.array([3, 0, 0, 0]))


def test_another_accelerator_has_costs_of_its_own(tmp_path: Path, counted: list[Any]) -> None:
    cache = tmp_path / "costs.sqlite"
    slow = targets.get(
        changed(tmp_path, "bitfusion/eyeriss", {"cost.dram_bits_per_cycle.value": 2})
    )
    first = cost_table(EYERISS, LAYERS, cache=cache)
    before = len(counted)
    assert not same(first, cost_table(slow, LAYERS, cache=cache))
    assert len(counted) == 2 * before
    # The name of an accelerator, and where a number comes from, change no cost.
    renamed = targets.get(changed(tmp_path, "bitfusion/eyeriss", {"name": "mine/one"}))
    assert same(first, cost_table(renamed, LAYERS, cache=cache))
    assert len(counted) == 2 * before


DAMAGED = {
    "no JSON": "damaged",
    "no mapping": "[1]",
    "deep": "[" * 100_000,
    "a text": '{"macs": 1, "weight_bits": 1, "cycles": "x"}',
    "negative": '{"macs": 1, "weight_bits": 1, "cycles": -5}',
    "no number": '{"macs": 1, "weight_bits": 1, "cycles": NaN}',
    "energy": '{"macs": 1, "weight_bits": 1, "energy_pj": {"a": "b"}}',
    "bound": '{"macs": 1, "weight_bits": 1, "bound": "zzz"}',
    "missing": "{}",
}


@pytest.mark.parametrize(
    "damage", ["no database", "another table", "precision", "folder", *DAMAGED]
)
def test_a_file_that_cannot_be_used_is_reported(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "costs.sqlite"
    if damage == "no database":
        cache.write_text("not a database, and long enough to be looked at" * 100)
    elif damage == "another table":
        with sqlite3.connect(cache) as database:
            database.execute("CREATE TABLE costs (other TEXT)")
        database.close()
    elif damage == "precision":
        cost_table(EYERISS, LAYERS, cache=cache)
        with sqlite3.connect(cache) as database:
            database.execute("UPDATE costs SET precision = 'w3a3' WHERE precision = 'w8a8'")
        database.close()
    elif damage in DAMAGED:
        cost_table(EYERISS, LAYERS, cache=cache)
        with sqlite3.connect(cache) as database:
            database.execute("UPDATE costs SET cost = ?", (DAMAGED[damage],))
        database.close()
    else:
        cache.mkdir()
    with caplog.at_level(logging.WARNING):
        found = cost_table(EYERISS, LAYERS, cache=cache)
    assert same(found, cost_table(EYERISS, LAYERS))
    assert f"costs are not kept in {cache}" in caplog.text
    assert len(caplog.records) == 1


def test_what_was_computed_before_a_crash_is_kept(tmp_path: Path, counted: list[Any]) -> None:
    cache = tmp_path / "costs.sqlite"

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cost_table(EYERISS, LAYERS, cache=cache, progress=stop)
    assert len(counted) == 2 * 16
    cost_table(EYERISS, LAYERS, cache=cache)
    assert len(counted) == 3 * 16


def test_the_file_lies_in_the_users_folder_for_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "bitwright" / "costs.sqlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", os.fspath(tmp_path / "home"))
    assert cache_file() == tmp_path / "home" / ".cache" / "bitwright" / "costs.sqlite"


def own_model(folder: Path, cycles: int) -> Accelerator:
    (folder / "own_costs.py").write_text(
        "from bitwright import LayerCost\n"
        "from bitwright.targets import CostModel\n"
        "class Own(CostModel):\n"
        "    def layer_cost(self, layer, precision):\n"
        f"        return LayerCost.of(layer, precision, cycles={cycles})\n"
    )
    return targets.get(changed(folder, "silago/drra", {"cost": {"model": "own_costs:Own"}}))


def test_costs_are_those_of_the_code_that_computed_them(tmp_path: Path) -> None:
    cache = tmp_path / "costs.sqlite"
    old = own_model(tmp_path, 19)
    new = own_model(tmp_path, 21)  # of equal length, in the same second
    for accelerator, cycles in ((old, 19), (new, 21), (old, 19)):
        for file in (None, cache):
            table = cost_table(accelerator, LAYERS, cache=file)
            assert table.costs[0][0].cycles == cycles


def test_code_that_is_in_no_file_keeps_no_costs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = own_model(tmp_path, 5)
    monkeypatch.setattr(type(accelerator.cost_model), "_code", None)
    cache = tmp_path / "costs.sqlite"
    with caplog.at_level(logging.WARNING):
        assert cost_table(accelerator, LAYERS, cache=cache).costs[0][0].cycles == 5
    assert "in no file" in caplog.text
    assert not cache.exists()


def test_no_precisions() -> None:
    with pytest.raises(UsageError, match="there are no precisions"):
        cost_table(SILAGO, LAYERS, precisions=[])


def test_plans_may_be_texts() -> None:
    table = cost_table(SILAGO, LAYERS)
    texts: Any = {layer.name: "w8a8" for layer in LAYERS}
    plan = dict.fromkeys(texts, Precision(8, 8))
    assert (table.choice(texts) == table.choice(plan)).all()
