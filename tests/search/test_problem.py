from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import Precision
from bitwright.search.objectives import ErrorScale, parse_constraint, parse_objectives
from bitwright.search.problem import Problem, references
from bitwright.search.results import Result
from bitwright.search.study import Evaluation
from tests.search.fakes import BIT_FUSION, EYERISS, SILAGO, evaluation, setup

SHARE = ErrorScale("top1", "fraction", higher_is_better=True)
SQNR = ErrorScale("sqnr", "dB", higher_is_better=True)
PERPLEXITY = ErrorScale("perplexity", "", higher_is_better=False)


def make(
    objectives: str = "error,speedup",
    constraints: Sequence[str] = (),
    *,
    scale: ErrorScale = SHARE,
    float_error: float = 0.02,
    reference: Sequence[tuple[float, float]] = ((10.0, 0.0), (-1.0, -5.0)),
) -> Problem:
    """By default: error from 10 % to 0, speedup from 1 to 5."""
    return Problem(
        scale,
        parse_objectives(objectives, scale),
        tuple(parse_constraint(text, scale) for text in constraints),
        float_error,
        tuple(reference),
    )


def evaluations(points: Sequence[tuple[float, float]]) -> list[Evaluation]:
    """Evaluations of these errors (in percent) and speedups."""
    return [
        evaluation(number, error / 100, {"speedup": speedup})
        for number, (error, speedup) in enumerate(points, start=1)
    ]


# -- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, constraints, float_error, limit",
    [
        (SHARE, [], 0.02, None),
        (SHARE, ["memory<=2MiB"], 0.02, None),
        (SHARE, ["error<=5%"], 0.02, 0.05),
        (SHARE, ["error<=+2pp"], 0.03, 0.05),
        (SHARE, ["error<=+2pp", "error<=4%", "speedup>=2"], 0.03, 0.04),
        (PERPLEXITY, ["error<=30"], 20, 30),
        (PERPLEXITY, ["error<=+0.5"], 20, 20.5),
        (PERPLEXITY, ["error<=1e-7"], 0, 1e-7),
        (SQNR, ["sqnr>=25dB"], -math.inf, -25),
        (SQNR, ["sqnr>=25dB", "sqnr>=30dB"], -math.inf, -30),
    ],
)
def test_the_error_limit_is_the_strictest(
    scale: ErrorScale, constraints: list[str], float_error: float, limit: float | None
) -> None:
    problem = make("error,memory", constraints, scale=scale, float_error=float_error)
    assert problem.error_limit == (None if limit is None else pytest.approx(limit, rel=1e-6))


@given(st.integers(1, 5000), st.data())
@settings(deadline=None)
def test_errors_that_are_exactly_the_limit_meet_it(samples: int, data: st.DataObject) -> None:
    # 9 wrong of 300 is 3 %, whatever floating point makes of it.
    wrong = data.draw(st.integers(0, samples))
    text = f"error<={100 * wrong / samples!r}%"
    error = SHARE.error((samples - wrong) / samples)
    problem = make(constraints=[text])
    assert problem.violations(Result("ok", error), {"speedup": 2.0}) == [0, 0]
    more = SHARE.error((samples - wrong - 1) / samples)
    assert problem.violations(Result("ok", more), {"speedup": 2.0})[0] > 0


def test_violations_are_those_of_hardware_then_error_then_failure() -> None:
    problem = make("error,memory", ["error<=5%", "memory<=1000B", "speedup>=2"])
    gains = {"memory": 1500.0, "speedup": 1.5}
    assert problem.hardware_violations(gains) == pytest.approx([0.5, 0.25])
    found = problem.violations(Result("ok", 0.06), gains)
    # Of the error: per 10 points.
    assert found == pytest.approx([0.5, 0.25, 0.1, 0.0], abs=1e-6)
    good = {"memory": 1000.0, "speedup": 2.0}
    assert problem.hardware_violations(good) == [0, 0]
    assert problem.violations(Result("ok", 0.05), good) == [0, 0, 0, 0]


def test_a_failure_is_worse_than_any_error() -> None:
    problem = make("error,memory", ["error<=5%"])
    failed = problem.violations(Result("failed", None), {"memory": 1.0})
    for error in (0.06, 1.0, 1e4):
        assert sum(failed) > sum(problem.violations(Result("ok", error), {"memory": 1.0})) > 0
    assert sum(make().violations(Result("failed", None), {"speedup": 9.0})) > 0


def test_the_number_of_violations_is_always_the_same() -> None:
    results = [Result("ok", 0.5), Result("failed", None), Result("skipped", None)]
    for constraints in ([], ["error<=5%"], ["memory<=1B", "error<=5%"], ["speedup>=2"]):
        problem = make(constraints=constraints)
        lengths = {
            len(problem.violations(result, gains))
            for result in results
            for gains in ({}, {"memory": 1.0, "speedup": 1.0})
        }
        assert len(lengths) == 1


def test_violations_are_numbers_where_values_are_missing_or_infinite() -> None:
    # A NaN among violations would make a search compare with it.
    problem = make("error,memory", ["error<=30", "energy<=5uJ"], scale=PERPLEXITY)
    for result in (Result("ok", math.inf), Result("skipped", None)):
        assert np.isfinite(problem.violations(result, {})).all()
        assert max(problem.violations(result, {})) > 0


@pytest.mark.parametrize(
    "status, error, gains, expected",
    [
        ("ok", 0.04, {"memory": 900.0}, True),
        ("ok", 0.06, {"memory": 900.0}, False),
        ("ok", 0.04, {"memory": 1100.0}, False),
        ("ok", 0.04, {}, False),
        ("stopped", 0.06, {"memory": 900.0}, False),
        ("failed", None, {"memory": 900.0}, False),
        ("skipped", None, {"memory": 900.0}, False),
    ],
)
def test_what_is_feasible(
    status: str, error: float | None, gains: Mapping[str, float], expected: bool
) -> None:
    problem = make("error,memory", ["error<=5%", "memory<=1000B"])
    assert problem.feasible(evaluation(1, error, gains, status=status)) is expected


# -- values --------------------------------------------------------------------------------------


def test_values_are_shown_and_minimized() -> None:
    problem = make("error,speedup,memory", reference=[(12, 0), (-1, -4), (900, 100)])
    gains = {"speedup": 3.0, "memory": 500.0, "energy": 1.0}
    assert problem.values(0.07, gains) == (7.0, 3.0, 500.0)
    assert problem.minimized(0.07, gains).tolist() == [7.0, -3.0, 500.0]
    sqnr = make("memory,error", scale=SQNR)
    assert sqnr.values(-31.0, gains) == (500.0, 31.0)
    assert sqnr.minimized(-31.0, gains).tolist() == [500.0, -31.0]


def test_what_is_missing_is_as_bad_as_the_reference_point() -> None:
    problem = make("error,speedup")
    assert np.isnan(problem.values(None, {})).all()
    assert problem.minimized(None, {}).tolist() == [10.0, -1.0]
    assert problem.minimized(None, {"speedup": 3.0}).tolist() == [10.0, -3.0]


def test_infinite_errors_are_numbers_to_a_search() -> None:
    # A perplexity overflows; the signal-to-noise ratio of an exact plan is infinite.
    for error in (math.inf, -math.inf):
        found = make("error,memory", scale=PERPLEXITY).minimized(error, {"memory": 1.0})
        assert np.isfinite(found).all()
        assert np.sign(found[0]) == np.sign(error)


# -- hypervolume ---------------------------------------------------------------------------------


def staircase(points: Sequence[tuple[float, float]]) -> float:
    """Area that points below (1, 1) cover of the unit square."""
    area, height = 0.0, 1.0
    for x, y in sorted(points):
        if y < height:
            area += (1 - x) * (height - y)
            height = y
    return area


def slices(points: Sequence[tuple[float, float, float]]) -> float:
    """Volume: between neighbouring heights it is the area of the points below."""
    heights = sorted({z for *_, z in points} | {1.0})
    return sum(
        (above - below) * staircase([(x, y) for x, y, z in points if z <= below])
        for below, above in itertools.pairwise(heights)
    )


TENTHS = st.integers(0, 10).map(lambda tenths: tenths / 10)


@given(st.lists(st.tuples(TENTHS, TENTHS), max_size=12))
@settings(deadline=None)
def test_the_hypervolume_of_two_objectives_is_the_area_of_a_staircase(
    points: list[tuple[float, float]],
) -> None:
    problem = make(reference=[(10, 0), (-1, -5)])
    entries = evaluations([(10 * x, 5 - 4 * y) for x, y in points])
    expected = staircase([(x, y) for x, y in points if x < 1 and y < 1])
    assert problem.hypervolume(entries) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(TENTHS, TENTHS, TENTHS), max_size=10))
@settings(deadline=None)
def test_the_hypervolume_of_three_objectives_is_the_sum_of_slices(
    points: list[tuple[float, float, float]],
) -> None:
    problem = make("error,speedup,memory", reference=[(10, 0), (-1, -5), (900, 100)])
    entries = [
        evaluation(n, x / 10, {"speedup": 5 - 4 * y, "memory": 100 + 800 * z})
        for n, (x, y, z) in enumerate(points)
    ]
    expected = slices([point for point in points if max(point) < 1])
    assert problem.hypervolume(entries) == pytest.approx(expected, abs=1e-9)


def test_a_plan_with_the_best_of_everything_has_the_whole_hypervolume() -> None:
    assert make().hypervolume(evaluations([(0, 5)])) == pytest.approx(1)
    assert make().hypervolume(evaluations([(5, 3)])) == pytest.approx(1 / 4)
    assert make().hypervolume([]) == 0


def test_a_metric_better_than_the_widest_plans_makes_no_more_than_the_whole() -> None:
    problem = make(
        "error,speedup", scale=PERPLEXITY, reference=[(30.0, 20.0), (-1.0, -5.0)], float_error=20
    )
    assert problem.hypervolume([evaluation(1, 19.5, {"speedup": 5.0})]) == pytest.approx(1)


def test_only_feasible_plans_within_the_reference_point_count() -> None:
    problem = make(constraints=["error<=6%", "speedup>=1.5"])
    good = evaluations([(5, 3)])
    bad = [
        evaluation(2, 0.07, {"speedup": 5.0}),
        evaluation(3, 0.01, {"speedup": 1.2}),
        evaluation(4, None, {"speedup": 5.0}, status="skipped"),
        evaluation(5, None, {"speedup": 5.0}, status="failed"),
        evaluation(6, 0.11, {"speedup": 5.0}, status="stopped"),
    ]
    assert problem.hypervolume(good + bad) == problem.hypervolume(good) == pytest.approx(1 / 4)
    assert make().hypervolume(evaluations([(10, 5), (1, 1), (12, 3), (1, 0.5)])) == 0


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.5, 5)), max_size=12))
@settings(deadline=None)
def test_the_hypervolume_never_falls_with_more_plans(points: list[tuple[float, float]]) -> None:
    entries = evaluations(points)
    found = [make().hypervolume(entries[:count]) for count in range(len(entries) + 1)]
    assert all(0 <= value <= 1 + 1e-12 for value in found)
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(found))


def test_an_objective_that_offers_nothing_does_not_matter() -> None:
    problem = make("error,speedup,memory", reference=[(10, 0), (-1, -5), (100, 100)])
    entry = evaluation(1, 0.05, {"speedup": 3.0, "memory": 100.0})
    assert problem.hypervolume([entry]) == pytest.approx(1 / 4)


def test_small_numbers_have_a_hypervolume_too() -> None:
    # A mean squared error of 1e-9 is a usual one.
    scale = ErrorScale("mse", "", higher_is_better=False)
    problem = make(scale=scale, float_error=0, reference=[(5e-9, 1e-9), (-1.0, -5.0)])
    entry = evaluation(1, 3e-9, {"speedup": 3.0})
    assert problem.hypervolume([entry]) == pytest.approx(1 / 4)


# -- references ----------------------------------------------------------------------------------


def test_references_on_silago_are_those_of_its_tables() -> None:
    made = setup(SILAGO, "error,speedup,memory,compression,energy")
    weights = [3 * 16 * 9, 16 * 32 * 9, 512 * 64, 64 * 10]
    macs = [weights[0] * 256, weights[1] * 64, *weights[2:]]
    energies = [
        (sum(weights) * bits * 0.08 + sum(macs) * pj) / 1e6
        for bits, pj in ((16, 1.666), (4, 0.15325))
    ]
    expected = [
        (12.0, 0.0),  # two percent of the float model and ten points
        (-1.0, -4.0),
        (sum(weights) * 2, sum(weights) / 2),
        (-2.0, -8.0),
        tuple(energies),
    ]
    assert np.array(made.problem.reference) == pytest.approx(np.array(expected))


def test_the_best_is_the_best_of_the_space_and_the_worst_that_of_the_target() -> None:
    made = setup(SILAGO, "error,speedup", precisions=["w4a4", "w8a8"])
    assert made.problem.reference[1] == pytest.approx((-1.0, -4.0))
    made = setup(SILAGO, "error,speedup", precisions=["w16a16", "w8a8"])
    assert made.problem.reference[1] == pytest.approx((-1.0, -2.0))


@pytest.mark.parametrize(
    "narrowest, widest, expected",
    [
        (80.0, 21.0, (80.0, 21.0)),
        (None, 21.0, (43.0, 21.0)),
        (math.inf, 21.0, (43.0, 21.0)),
        # The plan with fewest bits may have the smaller error by chance.
        (20.5, 21.0, (43.0, 21.0)),
        (21.0, 21.0, (43.0, 21.0)),
        (80.0, None, (80.0, 20.0)),
    ],
)
def test_references_of_other_errors_lie_between_the_ends(
    narrowest: float | None, widest: float | None, expected: tuple[float, float]
) -> None:
    made = setup(SILAGO)
    problem = replace(
        made.problem,
        scale=PERPLEXITY,
        objectives=parse_objectives("error,speedup", PERPLEXITY),
        float_error=20.0,
    )
    found = references(
        problem, made.space, made.costs, narrowest_error=narrowest, widest_error=widest
    )
    assert found[0] == pytest.approx(expected)


def test_references_of_a_metric_that_should_be_high() -> None:
    made = setup(SILAGO)
    objectives = parse_objectives("sqnr,speedup", SQNR)
    problem = replace(made.problem, scale=SQNR, objectives=objectives, float_error=-math.inf)
    found = references(problem, made.space, made.costs, narrowest_error=-5.0, widest_error=-60.0)
    assert found[0] == (-5.0, -60.0)
    # An exact plan has no noise at all.
    exact = references(
        problem, made.space, made.costs, narrowest_error=-5.0, widest_error=-math.inf
    )
    assert np.isfinite(exact).all()


@pytest.mark.parametrize("accelerator", [SILAGO, BIT_FUSION, EYERISS], ids=lambda a: str(a.name))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precisions": ["w4a4", "w16a16"]},
        # The best of the space is the widest, except in the layer that is left.
        {"keep": {"first": "w16a16", "second": "w16a16", "third": "w16a16"}},
    ],
    ids=str,
)
def test_the_reference_point_is_never_better_than_the_best(
    accelerator: Any, options: dict[str, Any]
) -> None:
    base = setup(accelerator)
    gains = [name for name in base.costs.available() if name != "mean_speedup"]
    made = setup(accelerator, ",".join(["error", *gains]), **options)
    for worst, best in made.problem.reference:
        assert worst >= best
    narrow, wide = (made.problem.minimized(0.05, made.costs.of(plan)) for plan in made.ends)
    for point in (narrow, wide):
        assert (point >= np.array([best for _, best in made.problem.reference]) - 1e-9).all()


def test_a_space_that_only_makes_an_objective_worse_has_its_worst_as_reference() -> None:
    made = setup(SILAGO, "error,speedup")
    costs: Any = made.costs

    class Odd:
        """More traffic at fewer bits, as some tilings have."""

        baseline = Precision(16, 16)

        def of(self, plan: Any) -> dict[str, float]:
            return {**costs.of(plan), "traffic": float(sum(32 - p.weight_bits for p in plan))}

        def bounds(self, name: str, choices: Any) -> tuple[float, float]:
            return (64.0, 112.0) if name == "traffic" else costs.bounds(name, choices)

    problem = replace(made.problem, objectives=parse_objectives("error,traffic", SHARE))
    odd: Any = Odd()
    found = references(problem, made.space, odd, narrowest_error=0.5, widest_error=0.03)
    assert found[1] == (112.0, 64.0)


# -- the front -----------------------------------------------------------------------------------


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


# Few values, so that many are equal in one objective or in all.
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4)), max_size=25)


@given(POINTS)
@settings(deadline=None)
def test_the_front_is_what_no_other_beats(points: list[tuple[int, int, int]]) -> None:
    problem = make("error,speedup,memory", reference=[(12, 0), (-1, -5), (900, 100)])
    entries = [
        evaluation(n, error / 100, {"speedup": float(speedup), "memory": float(memory)})
        for n, (error, speedup, memory) in enumerate(points, start=1)
    ]
    minimized = [(error, -speedup, memory) for error, speedup, memory in points]
    expected = [
        n
        for n, point in enumerate(minimized)
        if not any(beats(other, point) for other in minimized) and point not in minimized[:n]
    ]
    front = problem.front(entries)
    assert sorted(e.number for e in front) == [n + 1 for n in expected]
    order = [(e.result.error, e.number) for e in front]
    assert order == sorted(order, key=lambda pair: (pair[0] or 0.0, pair[1]))


def test_only_feasible_plans_are_on_the_front() -> None:
    problem = make("error,speedup", ["error<=6%", "memory<=100B"])
    entries = [
        evaluation(1, 0.05, {"speedup": 3.0, "memory": 100.0}),
        evaluation(2, 0.01, {"speedup": 4.0, "memory": 101.0}),
        evaluation(3, 0.07, {"speedup": 5.0, "memory": 50.0}),
        evaluation(4, 0.02, {"speedup": 2.0, "memory": 50.0}),
        evaluation(5, None, {"speedup": 5.0, "memory": 50.0}, status="failed"),
        evaluation(6, None, {"speedup": 5.0, "memory": 500.0}, status="skipped"),
        evaluation(7, 0.001, {"speedup": 5.0, "memory": 50.0}, status="stopped"),
    ]
    assert [entry.number for entry in problem.front(entries)] == [4, 1]
    assert problem.front(entries[1:3]) == []
    assert problem.front([]) == []


@given(POINTS)
@settings(deadline=None)
def test_the_front_alone_has_the_hypervolume_of_all(points: list[tuple[int, int, int]]) -> None:
    entries = evaluations([(error, speedup) for error, speedup, _ in points])
    problem = make()
    assert problem.hypervolume(problem.front(entries)) == pytest.approx(
        problem.hypervolume(entries), abs=1e-12
    )
