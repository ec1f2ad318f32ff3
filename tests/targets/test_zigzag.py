"""The adapter for ZigZag; needs the package, which `make test-slow` installs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bitwright import Layer, Precision, targets
from bitwright.errors import UsageError
from bitwright.targets.testing import check_accelerator

ZIGZAG = targets.get("bitfusion/zigzag")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [n for n in sys.modules if n.split(".")[0] == "zigzag" or n.endswith("_mapping")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zigzag", None)  # as if it were not there
    layer = Layer.matmul(rows=1, in_features=8, out_features=8)
    with pytest.raises(UsageError, match="ZigZag, which is not installed") as raised:
        ZIGZAG.cost(layer, Precision(8, 8))
    assert raised.value.fix == "pip install 'bitwright[zigzag]'"


def test_parameters_are_those_of_bit_fusion() -> None:
    def numbers(name: str) -> dict[str, Any]:
        model = targets.get(name).cost_model
        assert model is not None
        return model.model_dump(exclude={"model"})

    assert numbers("bitfusion/zigzag") == numbers("bitfusion/eyeriss")


@pytest.mark.slow
def test_it_conforms() -> None:
    check_accelerator(ZIGZAG)


@pytest.mark.slow
def test_a_layer_that_fits_the_buffers_moves_once() -> None:
    # 16 x 9 x 32 weights and 2 x 16 x 6 x 6 inputs in, 2 x 32 x 4 x 4 sums out; 16 lanes, 9 taps.
    layer = Layer.conv(in_channels=16, out_channels=32, kernel=3, output=4, batch=2)
    cost = ZIGZAG.cost(layer, Precision(8, 8))
    assert cost.dram_read_bits == 16 * 9 * 32 * 8 + 2 * 16 * 36 * 8
    assert cost.dram_write_bits == 2 * 32 * 16 * 32
    computing = 2 * 16 * 9
    loading, unloading = math.ceil(16 * 9 * 32 * 8 / 192), math.ceil(2 * 32 * 16 * 32 / 192)
    assert cost.cycles == computing + loading + unloading
    assert cost.stall_cycles == loading + unloading


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        Layer.matmul(rows=16, in_features=4096, out_features=4096, name="rnn"),
        Layer.matmul(rows=16, in_features=8192, out_features=1000, name="alexnet.fc3"),
        Layer.matmul(rows=16, in_features=4096, out_features=512, name="lenet5.fc1"),
    ],
    ids=lambda layer: layer.name,
)
def test_both_models_agree_on_matrix_products(layer: Layer) -> None:
    # Two independent models of one machine: weights dominate, and each is read once by both.
    for precision in (Precision(8, 8), Precision(4, 4), Precision(2, 2)):
        ours = targets.get("bitfusion/eyeriss").cost(layer, precision)
        theirs = ZIGZAG.cost(layer, precision)
        assert theirs.cycles == pytest.approx(ours.cycles, rel=0.2)
        assert theirs.dram_read_bits == pytest.approx(ours.dram_read_bits, rel=0.2)


@pytest.mark.slow
def test_a_kernel_that_no_tile_holds_is_split() -> None:
    # 9 x 64 x 32 weights of 16 bits exceed half of the buffer; at half the lanes they do not.
    layer = Layer.conv(in_channels=64, out_channels=128, kernel=3, output=28)
    split, whole = (ZIGZAG.cost(layer, Precision(16, bits)).cycles for bits in (2, 4))
    assert split is not None
    assert whole is not None
    assert split <= 1.03 * whole


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("precision", ["w8a8", "w16a16", "w2a2"])
def test_awkward_sizes(batch: int, precision: str) -> None:
    for layer in (
        Layer.conv(in_channels=3, out_channels=7, kernel=(5, 2), output=(13, 11), stride=(3, 2)),
        Layer.conv(in_channels=6, out_channels=9, kernel=3, output=17, groups=3, dilation=2),
        Layer.conv(in_channels=5, out_channels=3, kernel=(2, 3, 3), output=(3, 4, 5)),
        Layer.conv(in_channels=3, out_channels=64, kernel=7, output=31, reads_graph_input=True),
        Layer.matmul(rows=batch, in_features=1, out_features=1),
        Layer.recurrent(in_features=31, out_features=62, steps=5, batch=batch),
    ):
        cost = ZIGZAG.cost(layer, Precision.parse(precision))
        bits = Precision.parse(precision).weight_bits
        assert cost.dram_read_bits is not None
        assert cost.dram_read_bits >= layer.weight_count * bits
        assert cost.utilization is not None
        assert 0 < cost.utilization <= 1
