from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import Layer, Precision, targets
from bitwright.errors import UsageError
from bitwright.search.objectives import (
    GAINS,
    Constraint,
    Costs,
    ErrorScale,
    Objective,
    parse_constraint,
    parse_objectives,
)
from bitwright.targets import mohaq
from bitwright.targets.cost_table import cost_table
from tests.search.fakes import (
    BIT_FUSION,
    EYERISS,
    LAYERS,
    NAMES,
    PAPER,
    PAPER_VECTOR_VALUES,
    SILAGO,
)
from tests.targets.descriptions import changed

SHARE = ErrorScale("top1", "fraction", higher_is_better=True)
RATE = ErrorScale("wer", "fraction", higher_is_better=False)
SQNR = ErrorScale("sqnr", "dB", higher_is_better=True)
PERPLEXITY = ErrorScale("perplexity", "", higher_is_better=False)


def costs_of(
    accelerator: targets.Accelerator, layers: Any = LAYERS, vector_values: int = 0
) -> Costs:
    return Costs(accelerator, layers, cost_table(accelerator, layers), vector_values=vector_values)


@pytest.fixture(scope="module", params=[SILAGO, BIT_FUSION, EYERISS], ids=lambda a: str(a.name))
def accelerator(request: pytest.FixtureRequest) -> Any:
    return request.param


# -- gains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector_values", [0, 37])
def test_gains_are_those_of_the_cost_model(
    accelerator: targets.Accelerator, vector_values: int
) -> None:
    costs = costs_of(accelerator, vector_values=vector_values)
    wide = accelerator.model_cost(LAYERS, "w16a16", vector_values=vector_values)
    generator = np.random.default_rng(0)
    allowed = accelerator.allowed_precisions
    for _ in range(10):
        plan = tuple(allowed[n] for n in generator.integers(len(allowed), size=len(LAYERS)))
        named = dict(zip(NAMES, plan, strict=True))
        model = accelerator.model_cost(LAYERS, named, vector_values=vector_values)
        paper = mohaq.objectives(accelerator, LAYERS, named, vector_values=vector_values)
        found = costs.of(plan)
        assert set(found) == set(GAINS)
        traffic = None
        if model.dram_read_bits is not None and model.dram_write_bits is not None:
            traffic = (model.dram_read_bits + model.dram_write_bits) / 8
        expected = {
            "memory": math.ceil(model.memory_bits / 8),
            "compression": paper.compression,
            "speedup": model.speedup_over(wide),
            "mean_speedup": paper.speedup,
            "cycles": model.cycles,
            "relative_cycles": model.relative_cycles,
            "time": None if model.seconds is None else 1e3 * model.seconds,
            "energy": None if model.total_energy_pj is None else model.total_energy_pj / 1e6,
            "traffic": traffic,
        }
        for name, value in expected.items():
            if value is None:
                assert math.isnan(found[name]), name
                assert name not in costs.available()
            else:
                assert found[name] == pytest.approx(value, rel=1e-12), name
                assert name in costs.available()


@pytest.mark.parametrize(
    "precision, memory, speedup, energy",
    [("w16a16", "10.60", "0.984", "16.36"), ("w8a8", "5.31", "1.969", "6.571")],
)
def test_published_values_of_silago(precision: str, memory: str, speedup: str, energy: str) -> None:
    # Rezk et al., arXiv 2108.01192; as in tests/targets/test_mohaq.py.
    costs = costs_of(SILAGO, PAPER, PAPER_VECTOR_VALUES)
    found = costs.of((Precision.parse(precision),) * len(PAPER))
    assert f"{found['memory'] / 2**20:.2f}" == memory
    assert f"{found['mean_speedup']:.3f}" == speedup
    assert f"{found['energy']:.{len(energy.partition('.')[2])}f}" == energy


def test_published_limits_of_speedup_and_memory() -> None:
    # The same source: SiLago at 4 bits, Bit Fusion at 2, and 21.2 MiB of the float model.
    fastest = costs_of(SILAGO, PAPER, PAPER_VECTOR_VALUES).of((Precision(4, 4),) * len(PAPER))
    assert f"{fastest['mean_speedup']:.3f}" == "3.938"
    costs = costs_of(BIT_FUSION, PAPER, PAPER_VECTOR_VALUES)
    found = costs.of((Precision(2, 2),) * len(PAPER))
    assert f"{found['mean_speedup']:.1f}" == "63.0"
    assert f"{found['compression'] * found['memory'] / 2**20:.1f}" == "21.2"


def test_available_gains_are_those_that_the_cost_model_defines() -> None:
    both = {"memory", "compression", "speedup", "mean_speedup"}
    assert set(costs_of(SILAGO).available()) == both | {"relative_cycles", "energy"}
    assert set(costs_of(BIT_FUSION).available()) == both | {"relative_cycles"}
    assert set(costs_of(EYERISS).available()) == set(GAINS) - {"relative_cycles"}


def test_values_beside_the_weights_take_away_no_gain() -> None:
    # The energy of loading them is not defined by every cost model that has energies.
    for values in (0, 5):
        assert "energy" in costs_of(EYERISS, vector_values=values).available()


def test_bounds_are_the_ends_of_all_plans(accelerator: targets.Accelerator) -> None:
    costs = costs_of(accelerator, vector_values=11)
    allowed = accelerator.allowed_precisions
    generator = np.random.default_rng(0)
    for size in (1, 2, 3):
        choices = {
            layer: [allowed[n] for n in generator.permutation(len(allowed))[:size]]
            for layer in NAMES
        }
        gains = [costs.of(plan) for plan in itertools.product(*choices.values())]
        for name in costs.available():
            values = [entry[name] for entry in gains]
            low, high = costs.bounds(name, choices)
            assert low == pytest.approx(min(values), rel=1e-12), name
            assert high == pytest.approx(max(values), rel=1e-12), name


def test_many_plans_at_once_have_the_gains_of_each(accelerator: targets.Accelerator) -> None:
    costs = costs_of(accelerator, vector_values=11)
    allowed = accelerator.allowed_precisions
    drawn = np.random.default_rng(0).integers(len(allowed), size=(7, len(LAYERS)))
    plans = [tuple(allowed[n] for n in row) for row in drawn]
    many = costs.of_many(np.array([costs.choice(plan) for plan in plans]))
    for number, plan in enumerate(plans):
        found = {name: values[number] for name, values in many.items()}
        assert found == pytest.approx(costs.of(plan), rel=1e-12, nan_ok=True)


def test_costs_of_a_model_of_ones_own(tmp_path: Path) -> None:
    # 16 multiply-accumulates of 2 layers at 2 and 1 in a cycle, at 1 MHz: 8 and 16 cycles each.
    macs: dict[str, Any] = {
        "model": "precision-table",
        "macs_per_cycle": {"value": {"w16a16": 1, "w8a8": 2, "w4a4": 4}, "source": "mohaq"},
        "frequency_mhz": {"value": 1, "source": "mohaq"},
    }
    own = targets.get(changed(tmp_path, "silago/drra", {"cost": macs}))
    layers = [Layer.matmul(rows=1, in_features=4, out_features=4, name=n) for n in "ab"]
    found = costs_of(own, layers).of((Precision(16, 16), Precision(8, 8)))
    assert found["cycles"] == 16 + 8
    assert found["time"] == pytest.approx(24e-3)  # 24 us
    assert found["speedup"] == pytest.approx(32 / 24)
    assert found["mean_speedup"] == pytest.approx((1 + 2) / 2)
    assert found["memory"] == 16 * 2 + 16
    assert found["compression"] == pytest.approx(2 * 16 * 4 / 48)


# -- errors --------------------------------------------------------------------------------------


def test_shares_that_should_be_high_become_errors() -> None:
    assert SHARE.error(0.993) == 0.007
    assert SHARE.shown(0.007) == 0.7
    assert (SHARE.name, SHARE.shown_unit, SHARE.maximize) == ("error", "%", False)


def test_rates_are_errors() -> None:
    assert RATE.error(0.25) == 0.25
    assert RATE.shown(0.25) == 25
    assert (RATE.name, RATE.shown_unit, RATE.maximize) == ("error", "%", False)


def test_other_metrics_that_should_be_high_are_shown_as_themselves() -> None:
    assert SQNR.error(31.5) == -31.5
    assert SQNR.shown(-31.5) == 31.5
    assert (SQNR.name, SQNR.shown_unit, SQNR.maximize) == ("sqnr", "dB", True)


def test_other_metrics_that_should_be_low_are_errors() -> None:
    assert PERPLEXITY.error(12.5) == PERPLEXITY.shown(12.5) == 12.5
    assert (PERPLEXITY.name, PERPLEXITY.maximize) == ("error", False)


@given(st.sampled_from([SHARE, RATE, SQNR, PERPLEXITY]), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_less_error_is_a_better_metric(scale: ErrorScale, one: float, two: float) -> None:
    better = scale.error(one) < scale.error(two)
    if abs(one - two) > 1e-9:
        assert better == ((one > two) == scale.higher_is_better)
    shown = scale.shown(scale.error(one))
    plain = one if scale in (SQNR, PERPLEXITY) else 100 * (one if scale is RATE else 1 - one)
    assert shown == pytest.approx(plain, abs=1e-9)


# -- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(GAINS))
def test_every_gain_can_be_an_objective(name: str) -> None:
    found = parse_objectives(f"error,{name}", SHARE)
    assert found == (
        Objective("error", "%", maximize=False),
        Objective(name, GAINS[name].unit, GAINS[name].maximize),
    )
    assert found[1].cost(3.0) == (-3.0 if name.endswith(("speedup", "compression")) else 3.0)


def test_objectives_are_a_text_or_several() -> None:
    once = parse_objectives(" error , speedup,energy,", SHARE)
    assert once == parse_objectives(["error", "speedup,energy"], SHARE)
    assert [objective.name for objective in once] == ["error", "speedup", "energy"]
    assert [objective.to_dict()["direction"] for objective in once] == [
        "minimize",
        "maximize",
        "minimize",
    ]


def test_the_error_has_the_name_of_a_metric_that_is_none() -> None:
    expected = Objective("sqnr", "dB", maximize=True)
    assert parse_objectives("error,memory", SQNR)[0] == expected
    assert parse_objectives("sqnr,memory", SQNR)[0] == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "two objectives"),
        ("error", "two objectives"),
        ("error,,", "two objectives"),
        ("error,speed", "no objective 'speed'"),
        ("error,Speedup", "no objective 'Speedup'"),
        ("error,speedup,error", "'error' stands twice"),
    ],
)
def test_objectives_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_objectives(text, SHARE)
    assert caught.value.where == "--objectives"


def test_an_objective_under_two_names_stands_twice() -> None:
    with pytest.raises(UsageError, match="stands twice"):
        parse_objectives("error,sqnr,memory", SQNR)


# -- constraints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, limit",
    [
        ("memory<=2MiB", 2_097_152),
        ("memory<=2MB", 2_000_000),
        ("memory <= 1.5 kB", 1_500),
        ("memory<=512KiB", 524_288),
        ("memory<=1GiB", 1_073_741_824),
        ("memory<=.5GB", 500_000_000),
        ("memory<=100B", 100),
        ("memory<=1byte", 1),
        ("traffic<=1e3bytes", 1_000),
        ("traffic<=1.5E+3bytes", 1_500),
        ("energy<=5", 5),
        ("energy<=5uJ", 5),
        ("energy<=5pJ", 5e-6),
        ("energy<=5nJ", 5e-3),
        ("energy<=5mJ", 5e3),
        ("energy<=5J", 5e6),
        ("time<=2", 2),
        ("time<=2ms", 2),
        ("time<=2s", 2e3),
        ("time<=2us", 2e-3),
        ("time<=2ns", 2e-6),
        ("cycles<=10k", 10_000),
        ("cycles<=3M", 3_000_000),
        ("cycles<=1G", 1e9),
        ("cycles<=42cycles", 42),
        ("relative_cycles<=42", 42),
    ],
)
def test_limits_from_above_in_every_unit(text: str, limit: float) -> None:
    found = parse_constraint(text, SHARE)
    assert (found.name, found.sense, found.relative) == (
        text.partition("<")[0].strip(),
        "<=",
        False,
    )
    assert found.limit == pytest.approx(limit, rel=1e-15)


@pytest.mark.parametrize(
    "text, limit",
    [("speedup>=2", 2), ("mean_speedup>=2.5x", 2.5), ("compression >= 8 X", 8), ("speedup>3", 3)],
)
def test_limits_from_below(text: str, limit: float) -> None:
    found = parse_constraint(text, SHARE)
    assert (found.sense, found.limit, found.relative) == (">=", limit, False)


@pytest.mark.parametrize(
    "scale, text, sense, limit, relative",
    [
        (SHARE, "error<=5%", "<=", 5, False),
        (SHARE, "error<=0.5 %", "<=", 0.5, False),
        (SHARE, "error<=+2pp", "<=", 2, True),
        (SHARE, "error<= +2 %", "<=", 2, True),
        (RATE, "error<=18.3%", "<=", 18.3, False),
        (PERPLEXITY, "error<=30", "<=", 30, False),
        (PERPLEXITY, "error<=+0.5", "<=", 0.5, True),
        (PERPLEXITY, "error<=-0.5", "<=", -0.5, False),
        (SQNR, "sqnr>=20dB", ">=", 20, False),
        (SQNR, "sqnr>=20", ">=", 20, False),
        (SQNR, "error>=-3db", ">=", -3, False),
    ],
)
def test_limits_of_the_error(
    scale: ErrorScale, text: str, sense: str, limit: float, relative: bool
) -> None:
    found = parse_constraint(text, scale)
    assert (found.name, found.sense, found.limit, found.relative) == (
        scale.name,
        sense,
        limit,
        relative,
    )


def test_relative_limits_are_above_the_float_model() -> None:
    found = parse_constraint("error<=+2pp", SHARE)
    assert found.absolute(3.5) == 5.5
    assert found.violation(5.5, 3.5) == 0
    assert found.violation(5.6, 3.5) > 0
    assert parse_constraint("error<=2%", SHARE).absolute(3.5) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "memory",
        "memory<=",
        "<=2MiB",
        "memory<=2",  # 2 of what?
        "memory<=2MiBs",
        "memory<=2uJ",
        "memory<=-2MiB",
        "memory<=+2MiB",
        "memory<=nanB",
        "memory<=infB",
        "memory<=1e999B",
        "memory<==2MiB",
        "memory!=2MiB",
        "memory=2MiB",
        "memory<=2MiB,speedup>=2",
        "memory<=2 Mi B",
        "memory<=2,5MiB",
        "memory<=0x10B",
        "energy<=5W",
        "time<=5J",
        "cycles<=5ms",
        "speedup>=2%",
        "speed>=2",
        "top1>=90%",
        "error<=5",
        "error<=5pp",
        "error<=-5%",
        "error<=-2pp",
        "error<=+-2pp",
        "error<=5%%",
        "error<=5MiB",
    ],
)
def test_nonsense_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_constraint(text, SHARE)
    assert caught.value.where == "--constraint"
    assert caught.value.fix


@pytest.mark.parametrize("text", ["sqnr>=20%", "sqnr>=+3dB", "error<=20dB", "sqnr>=1e999dB"])
def test_nonsense_about_a_metric_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_constraint(text, SQNR)


@pytest.mark.parametrize("name", [*GAINS, "error"])
def test_limits_in_the_wrong_direction_are_refused_and_the_hint_is_right(name: str) -> None:
    units = {"memory": "MiB", "traffic": "MiB", "error": "%"}
    right = ">=" if name in ("speedup", "mean_speedup", "compression") else "<="
    wrong = "<=" if right == ">=" else ">="
    with pytest.raises(UsageError, match="is better") as caught:
        parse_constraint(f"{name}{wrong}2{units.get(name, '')}", SHARE)
    assert caught.value.fix is not None
    hint = caught.value.fix.removeprefix("write ")
    found = parse_constraint(hint, SHARE)
    assert (found.name, found.sense) == (name, right)


@given(
    st.sampled_from([*GAINS, "error"]),
    st.floats(0, 1e6).map(lambda value: f"{value:.6g}"),
    st.booleans(),
    st.text(" ", max_size=2),
)
@settings(deadline=None)
def test_texts_of_constraints_read_the_same_again(
    name: str, number: str, relative: bool, space: str
) -> None:
    gain = GAINS.get(name)
    unit = "%" if gain is None else {"bytes": "B"}.get(gain.unit, gain.unit)
    sense = ">=" if gain is not None and gain.maximize else "<="
    sign = "+" if relative and gain is None else ""
    found = parse_constraint(f"{space}{name}{space}{sense}{space}{sign}{number} {unit}", SHARE)
    assert found.limit == pytest.approx(float(number))
    assert found.relative == bool(sign)
    assert parse_constraint(found.text, SHARE) == found


@given(
    st.sampled_from(["<=", ">="]),
    st.floats(-1e6, 1e6),
    st.floats(-1e6, 1e6),
)
@settings(deadline=None)
def test_a_violation_is_positive_where_a_limit_is_exceeded(
    sense: Any, limit: float, value: float
) -> None:
    violation = Constraint("memory", sense, limit).violation(value)
    met = value <= limit if sense == "<=" else value >= limit
    assert (violation <= 0) == met
    if abs(limit) > 1e-3:
        sign = 1 if sense == "<=" else -1
        assert violation == pytest.approx(sign * (value - limit) / abs(limit))
