from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bitfusion_loops import cheapest
from bitwright import Layer, LayerCost, Precision, targets
from bitwright.errors import UsageError
from tests.targets.descriptions import changed

GOLDEN = json.loads((Path(__file__).parent / "bitfusion_layers.json").read_text())
EYERISS = targets.get("bitfusion/eyeriss")
STRIPES = targets.get("bitfusion/stripes")


def numbers(cost: LayerCost) -> tuple[float | None, ...]:
    return cost.cycles, cost.stall_cycles, cost.dram_read_bits, cost.dram_write_bits


# -- published -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["layers"], ids=lambda row: str(row["name"]))
def test_layers_of_the_public_simulator(row: dict[str, Any]) -> None:
    # Source: in the file.
    precision = Precision(row["weight_bits"], row["activation_bits"])
    layer = Layer.conv(
        in_channels=row["in_channels"],
        out_channels=row["out_channels"],
        kernel=row["kernel"],
        output=row["output"],
        stride=row["stride"],
        batch=GOLDEN["configuration"]["batch"],
    )
    expected = tuple(
        row[name] for name in ("cycles", "stall_cycles", "dram_read_bits", "dram_write_bits")
    )
    cost = EYERISS.cost(layer, precision, im2col=row["im2col"])
    assert numbers(cost) == expected
    assert cost.seconds == row["cycles"] / 500e6
    if row["kernel"] == row["output"] == 1:
        product = Layer.matmul(
            rows=layer.batch or 0, in_features=layer.in_channels, out_features=layer.out_channels
        )
        assert numbers(EYERISS.cost(product, precision)) == expected


def test_configuration_is_that_of_the_published_layers() -> None:
    configuration = GOLDEN["configuration"]
    model: Any = EYERISS.cost_model
    assert model.array_rows.value == configuration["rows"]
    assert model.array_columns.value == configuration["columns"]
    assert model.widest_operand_bits.value == configuration["pmax"]
    assert model.narrowest_operand_bits.value == configuration["pmin"]
    for name in (
        *("frequency_mhz", "dram_bits_per_cycle"),
        *("weight_buffer_kib", "input_buffer_kib", "output_buffer_kib"),
    ):
        assert getattr(model, name).value == configuration[name]


@pytest.mark.parametrize(
    "precision, macs",
    # arXiv 1712.01507: a unit does 1 to 16 multiply-accumulates a cycle, one of 16 bits in four.
    [("w8a8", 1), ("w2a2", 16), ("w2a8", 4), ("w4a4", 4), ("w16a16", 1 / 4), ("w16a8", 1 / 2)],
)
def test_multiply_accumulates_of_a_fusion_unit(precision: str, macs: float) -> None:
    layer = Layer.matmul(rows=1, in_features=1024, out_features=1024)
    cost = EYERISS.cost(layer, Precision.parse(precision))
    assert cost.peak_macs_per_cycle == 16 * 32 * macs


@pytest.mark.parametrize("bits", list(itertools.product((2, 4, 8, 16), repeat=2)))
def test_speed_goes_with_the_product_of_the_widths(bits: tuple[int, int]) -> None:
    # As MOHAQ's table says, arXiv 2108.01192. A layer that fills the array and computes much more
    # than it moves.
    layer = Layer.conv(in_channels=1024, out_channels=512, kernel=3, output=16, batch=4)
    cycles = STRIPES.cost(layer, Precision(*bits)).cycles
    widest = STRIPES.cost(layer, Precision(16, 16)).cycles
    assert cycles is not None
    assert widest is not None
    assert widest / cycles == pytest.approx(256 / math.prod(bits), rel=0.01)


# -- the equations, one case at a time -----------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["layers"][-2:], ids=lambda row: str(row["name"]))
def test_the_plain_loops_give_published_numbers(row: dict[str, Any]) -> None:
    layer = Layer.conv(
        in_channels=row["in_channels"],
        out_channels=row["out_channels"],
        kernel=row["kernel"],
        output=row["output"],
        batch=16,
    )
    found = cheapest(
        EYERISS, layer, Precision(row["weight_bits"], row["activation_bits"]), row["im2col"]
    )
    assert found == (
        *(row["cycles"], row["stall_cycles"]),
        *(row["dram_read_bits"], row["dram_write_bits"]),
    )


widths = st.sampled_from([2, 4, 8, 16])


@given(
    layer=st.builds(
        Layer.conv,
        in_channels=st.integers(1, 600),
        out_channels=st.integers(1, 300),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        output=st.tuples(st.integers(1, 12), st.integers(1, 12)) | st.integers(1, 20),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        batch=st.integers(1, 5),
    ),
    precision=st.builds(Precision, widths, widths),
    im2col=st.booleans(),
    stripes=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_search_finds_what_plain_loops_find(
    layer: Layer, precision: Precision, im2col: bool, stripes: bool
) -> None:
    accelerator = STRIPES if stripes else EYERISS
    cost = accelerator.cost(layer, precision, im2col=im2col)
    assert numbers(cost) == cheapest(accelerator, layer, precision, im2col)


# -- beyond the simulator ------------------------------------------------------------------------


def test_im2col_is_for_layers_that_read_an_input_of_the_model() -> None:
    sizes: dict[str, Any] = {"in_channels": 3, "out_channels": 32, "kernel": 5, "output": 32}
    inner, first = Layer.conv(**sizes), Layer.conv(**sizes, reads_graph_input=True)
    precision = Precision(8, 8)
    assert EYERISS.cost(first, precision) == EYERISS.cost(inner, precision, im2col=True)
    assert EYERISS.cost(first, precision, im2col=False) == EYERISS.cost(inner, precision)
    assert numbers(EYERISS.cost(first, precision)) != numbers(EYERISS.cost(inner, precision))


def test_groups_run_one_after_the_other() -> None:
    one = Layer.conv(in_channels=8, out_channels=16, kernel=3, output=14)
    grouped = Layer.conv(in_channels=40, out_channels=80, kernel=3, output=14, groups=5)
    for precision in EYERISS.allowed_precisions:
        single = numbers(EYERISS.cost(one, precision))
        assert numbers(EYERISS.cost(grouped, precision)) == tuple(5 * (n or 0) for n in single)


def test_steps_run_one_after_the_other() -> None:
    step = Layer.matmul(rows=2, in_features=256, out_features=1024)
    whole = Layer.recurrent(in_features=256, out_features=1024, batch=2, steps=7)
    single = numbers(EYERISS.cost(step, Precision(4, 8)))
    cost = EYERISS.cost(whole, Precision(4, 8))
    assert numbers(cost) == tuple(7 * (n or 0) for n in single)
    assert cost.macs == 7 * 2 * 256 * 1024
    both = Layer.recurrent(in_features=512, out_features=2048, batch=2, steps=7, groups=2)
    assert both.weight_count == 2 * whole.weight_count
    # Two directions, one after the other.
    found = EYERISS.cost(both, Precision(4, 8))
    assert numbers(found) == tuple(2 * (n or 0) for n in numbers(cost))


def test_one_and_three_dimensions() -> None:
    sizes: dict[str, Any] = {"in_channels": 32, "out_channels": 64}
    line = Layer.conv(**sizes, kernel=(3,), output=(20,), stride=(2,))
    flat = Layer.conv(**sizes, kernel=(1, 3), output=(1, 20), stride=(1, 2))
    assert numbers(EYERISS.cost(line, Precision(8, 8))) == numbers(
        EYERISS.cost(flat, Precision(8, 8))
    )
    # A depth of one is a plane; slices with kernels of depth one are images of a batch.
    plane = Layer.conv(**sizes, kernel=3, output=10, batch=4)
    for solid in (
        Layer.conv(**sizes, kernel=(1, 3, 3), output=(1, 10, 10), batch=4),
        Layer.conv(**sizes, kernel=(1, 3, 3), output=(4, 10, 10), batch=1),
    ):
        assert numbers(EYERISS.cost(solid, Precision(8, 8))) == numbers(
            EYERISS.cost(plane, Precision(8, 8))
        )
    deep = Layer.conv(**sizes, kernel=(3, 3, 3), output=(4, 10, 10))
    assert (EYERISS.cost(deep, Precision(8, 8)).cycles or 0) > (
        EYERISS.cost(plane, Precision(8, 8)).cycles or 0
    )


def test_energy_of_core_and_external_memory_are_published_equations() -> None:
    layer = Layer.conv(in_channels=64, out_channels=64, kernel=3, output=28)
    cost = EYERISS.cost(layer, Precision(8, 4))
    cycles, stalls, read, write = (number or 0 for number in numbers(cost))
    assert cost.energy_pj is not None
    assert cost.energy_pj["core"] == pytest.approx((cycles - stalls) * 235.104)
    assert cost.energy_pj["dram"] == pytest.approx((read + write) * 15)


def test_energy_of_buffers_where_a_layer_is_one_tile() -> None:
    # 16 x 32 weights of 8 bits: one step. Each operand is filled in and read once; the outputs
    # come, are added to and go: written by the memory and the array, read by both.
    layer = Layer.matmul(rows=1, in_features=16, out_features=32)
    cost = EYERISS.cost(layer, Precision(8, 8))
    assert cost.energy_pj is not None
    assert cost.energy_pj["weight_buffer"] == pytest.approx(16 * 32 * 8 * (0.021 + 0.029))
    assert cost.energy_pj["input_buffer"] == pytest.approx(16 * 8 * (0.059 + 0.114))
    assert cost.energy_pj["output_buffer"] == pytest.approx(2 * 32 * 32 * (0.033 + 0.073))


def test_fewer_bits_may_take_more_energy() -> None:
    # As docs/targets.md says: the fewest cycles win, whatever they move.
    layer = Layer.conv(in_channels=512, out_channels=512, kernel=3, output=14, batch=4)
    narrow, wide = (STRIPES.cost(layer, Precision(4, bits)) for bits in (4, 8))
    assert (narrow.cycles or 0) < (wide.cycles or 0)
    assert (narrow.total_energy_pj or 0) > 3 * (wide.total_energy_pj or 0)


def test_of_equal_costs_the_least_time_at_work() -> None:
    # Tilings with equal cycles and traffic may stall for more or fewer of these cycles.
    layer = Layer.conv(in_channels=96, out_channels=32, kernel=2, output=7, stride=3, batch=2)
    cost = EYERISS.cost(layer, Precision(4, 4))
    assert numbers(cost) == cheapest(EYERISS, layer, Precision(4, 4), False)
    assert cost.stall_cycles == 1302


def test_few_input_channels_may_take_more_cycles_at_fewer_bits() -> None:
    layer = Layer.matmul(rows=1, in_features=23, out_features=3300)  # MOHAQ's first layer
    narrow, wide = (EYERISS.cost(layer, Precision(4, bits)).cycles or 0 for bits in (2, 8))
    assert narrow > 2 * wide


def test_numbers_beyond_64_bits_are_exact() -> None:
    # Powers of two throughout: a multiply-accumulate of 16 bits takes four cycles, 512 units work.
    small = Layer.matmul(rows=2**20, in_features=2**20, out_features=2**20)
    large = Layer.matmul(rows=2**20, in_features=2**24, out_features=2**22)
    costs = [EYERISS.cost(layer, Precision(16, 16)) for layer in (small, large)]
    computing = [(cost.cycles or 0) - (cost.stall_cycles or 0) for cost in costs]
    assert computing == [4 * 2**60 // 512, 4 * 2**66 // 512]
    assert all(isinstance(cost.cycles, int) for cost in costs)


def test_a_buffer_that_holds_no_tile(tmp_path: Path) -> None:
    path = changed(tmp_path, "bitfusion/eyeriss", {"cost.input_buffer_kib.value": 1})
    layer = Layer.conv(in_channels=1, out_channels=8, kernel=17, output=4, name="wide")
    with pytest.raises(UsageError, match=r"layer 'wide': no tile fits: .* half of the input"):
        targets.get(path).cost(layer, Precision(16, 16))
