from __future__ import annotations

import math
from pathlib import Path

import pytest

from bitwright import Layer, Precision, targets
from bitwright.errors import UsageError
from tests.targets.descriptions import DROPPED, changed

ARRAY = targets.get("generic/systolic")  # 32 x 32 cells, 128 DRAM bits a cycle, 128 KiB buffers
W8A8, W4A4 = Precision(8, 8), Precision(4, 4)


def with_bandwidth(folder: Path, bits_per_cycle: int, **changes: object) -> targets.Accelerator:
    values = {"cost.dram_bits_per_cycle.value": bits_per_cycle, **changes}
    return targets.get(changed(folder, "generic/systolic", values))


def test_cycles_of_blocks_of_weights(tmp_path: Path) -> None:
    # 128 terms and 64 channels are 4 x 2 blocks of the array; 1,000 rows stream through each, and
    # 62 cycles pass until the last sum has left.
    layer = Layer.matmul(rows=1000, in_features=128, out_features=64)
    fast = with_bandwidth(tmp_path, 10**6)
    cost = fast.cost(layer, W8A8)
    assert cost.cycles == 4 * 2 * (1000 + 62)
    assert cost.stall_cycles == 0
    assert cost.bound == "compute"
    assert cost.utilization == pytest.approx(1000 / 1062)
    assert cost.seconds == pytest.approx(cost.cycles / 800e6)
    # At four bits a cell does four products: a quarter of the blocks.
    assert fast.cost(layer, W4A4).cycles == 2 * (1000 + 62)


def test_a_block_takes_as_long_as_its_weights_need_to_enter() -> None:
    layer = Layer.matmul(rows=1, in_features=32, out_features=32)
    cost = ARRAY.cost(layer, W8A8)
    assert cost.cycles == 32 + 62
    assert cost.dram_read_bits == (32 * 32 + 32) * 8
    assert cost.dram_write_bits == 32 * 8


def test_a_layer_bound_by_memory(tmp_path: Path) -> None:
    layer = Layer.matmul(rows=1, in_features=4096, out_features=4096)
    cost = with_bandwidth(tmp_path, 32).cost(layer, W8A8)
    bits = (4096 * 4096 + 4096 + 4096) * 8
    assert cost.bound == "memory"
    assert cost.cycles == math.ceil(bits / 32)
    assert cost.cycles - (cost.stall_cycles or 0) == 128 * 128 * (32 + 62)


def test_the_better_of_two_orders() -> None:
    # Weights of 8 buffers and inputs of 4 (or of 16): read the smaller excess again.
    weights = 8 * 131072
    for rows, reads in ((512, 4 * weights + 512 * 1024), (2048, weights + 8 * 2048 * 1024)):
        layer = Layer.matmul(rows=rows, in_features=1024, out_features=1024)
        both = min(
            weights + 8 * rows * 1024,  # every block of weights meets all inputs
            weights * math.ceil(rows * 1024 / 131072) + rows * 1024,  # or the other way round
        )
        assert both == reads
        assert ARRAY.cost(layer, W8A8).dram_read_bits == 8 * reads


def test_convolutions_read_their_input_once_where_it_fits() -> None:
    layer = Layer.conv(in_channels=16, out_channels=32, kernel=3, output=(10, 20), stride=2)
    cost = ARRAY.cost(layer, W8A8)
    assert cost.dram_read_bits == 8 * (16 * 21 * 41 + 16 * 32 * 9)
    assert cost.dram_write_bits == 8 * 32 * 200


def test_groups_and_steps_run_one_after_the_other() -> None:
    one = Layer.conv(in_channels=8, out_channels=16, kernel=3, output=14)
    grouped = Layer.conv(in_channels=40, out_channels=80, kernel=3, output=14, groups=5)
    computing = [
        (cost.cycles or 0) - (cost.stall_cycles or 0)
        for cost in (ARRAY.cost(one, W8A8), ARRAY.cost(grouped, W8A8))
    ]
    assert computing[1] == 5 * computing[0]
    fits = Layer.recurrent(in_features=256, out_features=256, steps=10)
    cost = ARRAY.cost(fits, W8A8)
    assert cost.dram_read_bits == 8 * (256 * 256 + 10 * 256)  # the weights stay
    large = Layer.recurrent(in_features=1024, out_features=1024, steps=10)
    assert ARRAY.cost(large, W8A8).dram_read_bits == 8 * 10 * (1024 * 1024 + 1024)


def test_energy_of_a_block() -> None:
    # 32 x 32 weights enter once, 10 rows of 32 inputs are read once, 10 x 32 sums written once.
    cost = ARRAY.cost(Layer.matmul(rows=10, in_features=32, out_features=32), W8A8)
    assert cost.energy_pj == pytest.approx(
        {
            "mac": 10 * 32 * 32 * 0.3,
            "sram": (32 * 32 * 8 + 10 * 32 * 8 + 10 * 32 * 32) * 0.3125,
            "dram": (32 * 32 * 8 + 10 * 32 * 8 + 10 * 32 * 8) * 20.3125,
        }
    )


def test_a_cell_that_takes_several_cycles(tmp_path: Path) -> None:
    speeds = {"w8a8": 0.25, "w8a4": 0.5, "w4a8": 0.5, "w4a4": 1}
    speeds |= {"w8a8se": 0.125, "w8a8se8": 0.125, "w4a8se": 0.25, "w4a8se8": 0.25}
    slow = with_bandwidth(tmp_path, 10**6, **{"cost.macs_per_cell.value": speeds})
    layer = Layer.matmul(rows=1000, in_features=32, out_features=32)
    assert slow.cost(layer, W8A8).cycles == 4 * 1000 + 62


def test_tables_must_have_all_precisions(tmp_path: Path) -> None:
    path = changed(tmp_path, "generic/systolic", {"cost.macs_per_cell.value.w4a8": DROPPED})
    with pytest.raises(UsageError, match=r"cost.macs_per_cell': has no entry for w4a8"):
        targets.get(path)


def test_soft_edge_codes_move_as_they_are_stored_and_multiply_as_16_bits() -> None:
    layer = Layer.matmul(rows=1000, in_features=64, out_features=96)
    plain, soft, wide = (ARRAY.cost(layer, f"w8{form}") for form in ("a8", "a8se8", "a8se"))
    weights, inputs, outputs = 8 * 64 * 96, 8 * 1000 * 64, 8 * 1000 * 96
    assert plain.dram_read_bits == soft.dram_read_bits == weights + inputs
    assert plain.dram_write_bits == soft.dram_write_bits == outputs
    # The 9 bits of three scales are stored as 16.
    assert (wide.dram_read_bits, wide.dram_write_bits) == (weights + 2 * inputs, 2 * outputs)
    assert (plain.peak_macs_per_cycle, soft.peak_macs_per_cycle) == (32 * 32, 32 * 32 / 2)
    assert soft.energy_pj is not None
    assert plain.energy_pj is not None
    assert soft.energy_pj["mac"] / plain.energy_pj["mac"] == pytest.approx(
        (0.4 + 0.1) / (0.2 + 0.1)
    )
