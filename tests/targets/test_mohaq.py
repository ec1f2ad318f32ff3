from __future__ import annotations

import pytest

from bitwright import Layer, Precision, PrecisionPlan, targets
from bitwright.errors import PlanError, UsageError
from bitwright.targets.mohaq import Objectives, objectives

# The speech model of arXiv 2108.01192: multiply-accumulates of a step, by layer.
PUBLISHED = {
    "L0": 75_900,
    **dict.fromkeys(("L1", "L2", "L3"), 844_800),
    **dict.fromkeys(("Pr1", "Pr2", "Pr3"), 281_600),
    "FC": 2_094_400,
}
SIZES = {
    "L0": (23, 3 * 1100),
    **dict.fromkeys(("L1", "L2", "L3"), (256, 3 * 1100)),
    **dict.fromkeys(("Pr1", "Pr2", "Pr3"), (1100, 256)),
    "FC": (1100, 1904),
}
VECTOR_VALUES = 8_800
LAYERS = [
    Layer.matmul(rows=1, in_features=ins, out_features=outs, name=name)
    for name, (ins, outs) in SIZES.items()
]
SILAGO, BIT_FUSION = targets.get("silago/drra"), targets.get("bitfusion/mohaq")


def uniform(accelerator: targets.Accelerator, precision: str) -> Objectives:
    plan = Precision.parse(precision)
    return objectives(accelerator, LAYERS, plan, vector_values=VECTOR_VALUES)


def test_layers_are_those_of_the_paper() -> None:
    assert {layer.name: layer.macs for layer in LAYERS} == PUBLISHED
    assert sum(layer.weight_count for layer in LAYERS) == 5_549_500


@pytest.mark.parametrize(
    "precision, memory, speedup, energy",
    [("w16a16", "10.60", "0.984", "16.36"), ("w8a8", "5.31", "1.969", "6.571")],
)
def test_check_values_of_silago(precision: str, memory: str, speedup: str, energy: str) -> None:
    found = uniform(SILAGO, precision)
    assert found.energy_uj is not None
    assert f"{found.memory_mib:.2f}" == memory
    assert f"{found.speedup:.3f}" == speedup
    assert f"{found.energy_uj:.{len(energy.partition('.')[2])}f}" == energy


def test_largest_speedups() -> None:
    assert f"{uniform(SILAGO, 'w4a4').speedup:.3f}" == "3.938"
    assert f"{uniform(BIT_FUSION, 'w2a2').speedup:.1f}" == "63.0"
    assert uniform(SILAGO, "w4a4").speedup_share == 1


def test_memory_of_the_float_model_is_21_mib() -> None:
    found = uniform(SILAGO, "w8a8")
    assert f"{found.compression * found.memory_mib:.1f}" == "21.2"


def test_shares_of_the_maximum() -> None:
    # (E(16) - E) / (E(16) - E(4)) and S / S_max, arXiv 2108.01192.
    energies = {bits: uniform(SILAGO, f"w{bits}a{bits}").energy_uj or 0 for bits in (16, 8, 4)}
    share = (energies[16] - energies[8]) / (energies[16] - energies[4])
    assert uniform(SILAGO, "w8a8").energy_saving_share == pytest.approx(share)
    assert uniform(SILAGO, "w8a8").speedup_share == pytest.approx(2 / 4)
    assert uniform(SILAGO, "w4a4").energy_saving_share == pytest.approx(1)
    assert uniform(BIT_FUSION, "w4a4").energy_saving_share is None
    assert uniform(BIT_FUSION, "w4a4").energy_uj is None


def test_a_mixed_plan_by_the_published_formulas() -> None:
    bits = {name: (2, 4, 8, 16)[i % 4] for i, name in enumerate(PUBLISHED)}
    plan = PrecisionPlan(layers={name: Precision(bits[name], 8) for name in PUBLISHED})
    found = objectives(BIT_FUSION, LAYERS, plan, vector_values=VECTOR_VALUES)
    memory = sum(PUBLISHED[name] * bits[name] for name in PUBLISHED) + VECTOR_VALUES * 16
    assert found.memory_mib == pytest.approx(memory / 8 / 2**20)
    speeds = {name: 256 / (8 * bits[name]) for name in PUBLISHED}
    mean = sum(PUBLISHED[name] * speeds[name] for name in PUBLISHED) / 5_637_500
    assert found.speedup == pytest.approx(mean)
    # The honest one: the time of all layers, one after another.
    time = sum(PUBLISHED[name] / speeds[name] for name in PUBLISHED)
    assert found.end_to_end_speedup == pytest.approx(5_549_500 / time)
    assert found.end_to_end_speedup is not None
    assert found.speedup is not None
    assert found.end_to_end_speedup < 0.7 * found.speedup


def test_other_accelerators_by_their_cycles() -> None:
    accelerator = targets.get("bitfusion/eyeriss")
    found = objectives(accelerator, LAYERS, Precision(8, 8), baseline=Precision(16, 16))
    ratios = []
    for layer in LAYERS:
        wide, narrow = (accelerator.cost(layer, Precision(b, b)).cycles or 0 for b in (16, 8))
        ratios.append((layer.macs or 0) * wide / narrow)
    assert found.speedup == pytest.approx(sum(ratios) / 5_549_500)


def test_operations_that_are_no_multiply_accumulates_can_be_given() -> None:
    given = objectives(
        SILAGO,
        LAYERS,
        Precision(16, 16),
        vector_values=VECTOR_VALUES,
        elementwise_operations=5_549_500,
    )
    assert given.speedup == pytest.approx(0.5)


def test_what_cannot_be_answered() -> None:
    with pytest.raises(UsageError, match="there must be layers"):
        objectives(SILAGO, [], Precision(8, 8))
    with pytest.raises(UsageError, match="not negative"):
        objectives(SILAGO, LAYERS, Precision(8, 8), vector_values=-1)
    with pytest.raises(PlanError, match="cannot do the precision"):
        objectives(SILAGO, LAYERS, Precision(2, 2))
