from __future__ import annotations

import itertools
import math
import random
import signal
import subprocess
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import Layer, Precision
from bitwright.errors import OutputError
from bitwright.search import engine as engine_module
from bitwright.search.algorithm import Exhaustive, RandomSearch
from bitwright.search.engine import SearchProgress, Stops, guided_start, narrowest_and_widest
from bitwright.search.space import Genome, Plan, make_space
from bitwright.search.study import Study
from tests.search.fakes import (
    BIT_FUSION,
    EYERISS,
    LAYERS,
    NAMES,
    SILAGO,
    FakePool,
    Setup,
    error_of,
    own_process,
    setup,
)

LIMIT = 0.08  # the fewest bits have an error of 0.12
WHOLE = Stops(generations=8)
ORDERS: list[Callable[[list[int]], Sequence[int]]] = [
    sorted,
    lambda numbers: sorted(numbers, reverse=True),
    lambda numbers: random.Random(7).sample(numbers, len(numbers)),
]


def stop_after(count: int) -> Callable[[int], None]:
    """Ctrl-C when so many evaluations are done."""

    def spoil(done: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return spoil


def found_in(folder: Path, made: Setup) -> dict[str, Any]:
    """All that must not depend on when or how often a search was interrupted."""
    with Study(folder) as study:
        evaluations = study.evaluations()
        generations = study.generations()
    return {
        "evaluations": evaluations,
        "generations": [(g.number, g.evaluations, g.hypervolume) for g in generations],
        "front": [entry.number for entry in made.problem.front(evaluations)],
    }


@pytest.fixture(scope="module")
def made() -> Setup:
    return setup(constraints=["error<=8%", "memory<=60KiB"])


@pytest.fixture(scope="module")
def uninterrupted(made: Setup, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "study"
    assert made.search(folder, FakePool(limit=LIMIT), WHOLE) == "all generations are done"
    return found_in(folder, made)


class Scripted:
    """Asks for given plans, and keeps what it is told."""

    def __init__(self, made: Setup, generations: Sequence[Sequence[Plan]]) -> None:
        self._genomes = [[made.space.genome(plan) for plan in plans] for plans in generations]
        self.asked = 0
        self.told: list[tuple[Any, Any]] = []

    def ask(self) -> list[Genome]:
        self.asked += 1
        genomes = self._genomes[self.asked - 1] if self.asked <= len(self._genomes) else []
        return [genome for genome in genomes if genome is not None]

    def tell(self, values: Sequence[Any], violations: Sequence[Sequence[float]]) -> None:
        self.told.append((np.array(values).tolist(), [list(v) for v in violations]))


def uniform(*widths: int) -> list[Plan]:
    """Uniform plans of these widths."""
    return [(Precision(width, width),) * len(LAYERS) for width in widths]


# -- a whole search ------------------------------------------------------------------------------


def test_a_search_writes_down_what_it_found(made: Setup, tmp_path: Path) -> None:
    pool = FakePool(limit=LIMIT)
    made.search(tmp_path / "study", pool, WHOLE)
    found = found_in(tmp_path / "study", made)
    evaluations = found["evaluations"]
    assert [entry.number for entry in evaluations] == list(range(1, len(evaluations) + 1))
    assert [entry.origin for entry in evaluations[:2]] == ["baseline"] * 2
    assert tuple(entry.plan for entry in evaluations[:2]) == made.ends
    assert {entry.origin for entry in evaluations[2 : 2 + 12]} == {"start"}
    assert {entry.origin for entry in evaluations[2 + 12 :]} == {"search"}
    for entry in evaluations:
        gains = {n: v for n, v in made.costs.of(entry.plan).items() if not math.isnan(v)}
        assert entry.gains == gains
        if entry.result.status in ("ok", "stopped"):
            assert entry.result.error == error_of(entry.plan)
    # Each plan was run once, those that the hardware cannot take never.
    assert len(pool.ran) == len(set(pool.ran))
    skipped = {entry.plan for entry in evaluations if entry.result.status == "skipped"}
    assert skipped == {
        entry.plan
        for entry in evaluations
        if entry.gains["memory"] > 60 * 1024 and entry.origin != "baseline"
    }
    assert skipped
    assert set(pool.ran) == {entry.plan for entry in evaluations} - skipped


def test_the_course_is_the_hypervolume_of_what_was_asked_for(
    made: Setup, uninterrupted: dict[str, Any]
) -> None:
    generations = uninterrupted["generations"]
    assert [number for number, *_ in generations] == list(range(8))
    # Baselines do not count.
    searched = uninterrupted["evaluations"][2:]
    assert generations[-1][1] == len(searched) <= 12 + 7 * 6
    for _, count, volume in generations:
        assert volume == pytest.approx(made.problem.hypervolume(searched[:count]))
    volumes = [volume for *_, volume in generations]
    assert volumes == sorted(volumes)
    assert volumes[-1] > 0


def test_baselines_are_run_whole_and_whatever_the_limits(made: Setup, tmp_path: Path) -> None:
    pool = FakePool(limit=LIMIT)
    with Study.create(tmp_path / "study", {}) as study:
        engine = made.engine(study, pool, Stops(evaluations=1, time_budget=1e-9))
        narrow, wide = engine.baselines(made.ends)
        # The narrowest exceeds the limit of the error, the widest that of the memory.
        assert narrow.result.error is not None
        assert narrow.result.error > LIMIT
        assert wide.gains["memory"] > 60 * 1024
        assert (narrow.result.status, wide.result.status) == ("ok", "ok")
        assert not made.problem.feasible(narrow)
        assert not made.problem.feasible(wide)
        assert engine.baselines(made.ends) == [narrow, wide]
    assert len(pool.ran) == 2


def test_a_search_that_asks_for_a_baseline_does_not_run_it_again(tmp_path: Path) -> None:
    made = setup()
    pool = FakePool()
    script = Scripted(made, [made.ends, uniform(8)])
    ended = made.search(tmp_path / "study", pool, Stops(), script)
    assert ended == "there are no new plans"
    assert pool.ran == [*made.ends, *uniform(8)]
    # It counts, though, once it is asked for.
    assert [g[1] for g in found_in(tmp_path / "study", made)["generations"]] == [2, 3]


def test_the_algorithm_is_told_values_and_violations(tmp_path: Path) -> None:
    made = setup(SILAGO, constraints=["error<=10%", "speedup>=1.5"])
    plans = uniform(4, 8, 16)
    script = Scripted(made, [plans, [plans[1], plans[1], plans[0]]])
    made.search(tmp_path / "study", FakePool(fails=lambda plan: plan == plans[0]), Stops(), script)
    # Plan 0 failed (before, as a baseline), plan 2 was too slow to be run, except as a baseline.
    errors = [100 * error_of(plan) for plan in plans]
    values, violations = script.told[0]
    worst = made.problem.reference[0][0]
    assert np.array(values) == pytest.approx(
        np.array([[worst, -4], [errors[1], -2], [errors[2], -1]])
    )
    assert violations[1:] == [[0, 0, 0], [pytest.approx(0.5 / 1.5), 0, 0]]
    assert violations[0][-1] > 1e3
    # The same plan again, and one that stands twice: the same answers.
    assert script.told[1][0] == [values[1], values[1], values[0]]


def test_failures_are_written_down_and_the_search_goes_on(tmp_path: Path) -> None:
    made = setup()

    def fails(plan: Plan) -> bool:
        return plan[0].weight_bits == 8

    pool = FakePool(fails=fails)
    assert made.search(tmp_path / "study", pool, WHOLE) == "all generations are done"
    evaluations = found_in(tmp_path / "study", made)["evaluations"]
    failed = {entry.plan for entry in evaluations if entry.result.status == "failed"}
    assert failed == {entry.plan for entry in evaluations if fails(entry.plan)}
    assert failed
    assert {e.result.message for e in evaluations if fails(e.plan)} == {"no number"}
    front = made.problem.front(evaluations)
    assert front
    assert not any(fails(entry.plan) for entry in front)
    # They are not tried again.
    again = FakePool(fails=fails)
    made.search(tmp_path / "study", again, WHOLE)
    assert again.ran == []


def test_a_search_in_which_everything_fails_ends(tmp_path: Path) -> None:
    made = setup(constraints=["error<=20%"])
    ended = made.search(tmp_path / "study", FakePool(fails=lambda _: True), WHOLE)
    assert ended == "all generations are done"
    found = found_in(tmp_path / "study", made)
    assert found["front"] == []
    assert {volume for *_, volume in found["generations"]} == {0.0}


def test_infinite_errors_do_not_stop_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup()

    def infinite(plan: Plan) -> float:
        return math.inf if plan[0].weight_bits < 8 else error_of(plan)

    monkeypatch.setattr("tests.search.fakes.error_of", infinite)
    assert made.search(tmp_path / "study", FakePool(), WHOLE) == "all generations are done"
    statuses = {
        e.result.error == math.inf for e in found_in(tmp_path / "study", made)["evaluations"]
    }
    assert statuses == {True, False}


# -- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1], [5], [11], [12], [13], [30], [3, 17, 18, 40]], ids=str)
def test_a_search_that_stopped_goes_on_as_if_it_had_not(
    made: Setup, uninterrupted: dict[str, Any], tmp_path: Path, counts: list[int]
) -> None:
    folder, ran = tmp_path / "study", []
    for count in counts:
        pool = FakePool(limit=LIMIT)
        ended = made.search(folder, pool, Stops(generations=8, evaluations=count))
        assert ended == "all evaluations are done"
        assert len(found_in(folder, made)["evaluations"]) == 2 + count
        ran += pool.ran
    pool = FakePool(limit=LIMIT)
    assert made.search(folder, pool, WHOLE) == "all generations are done"
    assert found_in(folder, made) == uninterrupted
    ran += pool.ran
    assert len(ran) == len(set(ran))


@given(
    st.lists(st.tuples(st.integers(0, 25), st.sampled_from(ORDERS)), min_size=1, max_size=4),
    st.sampled_from(ORDERS),
)
@settings(max_examples=12, deadline=None)
def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not(
    made: Setup,
    uninterrupted: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    interruptions: list[tuple[int, Any]],
    last: Any,
) -> None:
    folder = tmp_path_factory.mktemp("interrupted") / "study"
    ran = []
    for count, order in interruptions:
        pool = FakePool(order=order, limit=LIMIT, spoil=stop_after(count))
        try:
            made.search(folder, pool, WHOLE)
        except KeyboardInterrupt:
            ran += pool.ran
        else:
            ran += pool.ran
    pool = FakePool(order=last, limit=LIMIT)
    assert made.search(folder, pool, WHOLE) == "all generations are done"
    assert found_in(folder, made) == uninterrupted
    ran += pool.ran
    assert len(ran) == len(set(ran))


@pytest.mark.parametrize("order", ORDERS[1:], ids=["reversed", "shuffled"])
def test_numbers_do_not_depend_on_which_worker_is_first(
    made: Setup, uninterrupted: dict[str, Any], tmp_path: Path, order: Any
) -> None:
    made.search(tmp_path / "study", FakePool(order=order, limit=LIMIT), WHOLE)
    assert found_in(tmp_path / "study", made) == uninterrupted


def test_a_search_that_was_killed_goes_on_as_if_it_had_not(
    made: Setup, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    folder, count = tmp_path / "study", 20
    code = """
        import os, signal, sys
        from pathlib import Path
        from bitwright.search.engine import Stops
        from tests.search.fakes import FakePool, setup

        def spoil(done):
            if done == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)

        made = setup(constraints=["error<=8%", "memory<=60KiB"])
        order = lambda numbers: sorted(numbers, reverse=True)
        pool = FakePool(order=order, limit=0.08, spoil=spoil)
        made.search(Path(sys.argv[1]), pool, Stops(generations=8))
    """
    program = own_process(textwrap.dedent(code), folder, count)
    assert subprocess.run(**program, check=False).returncode == -signal.SIGKILL
    with Study(folder) as study:
        assert sum(e.result.status != "skipped" for e in study.evaluations()) == count
    pool = FakePool(limit=LIMIT)
    made.search(folder, pool, WHOLE)
    assert found_in(folder, made) == uninterrupted


def test_a_search_whose_disk_was_full_goes_on_as_if_it_had_not(
    made: Setup,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # tests/search/test_study.py fills a real disk.
    added = 0
    add = Study.add

    def full(study: Study, entry: Any) -> None:
        nonlocal added
        added += 1
        if added == 20:
            raise OutputError("cannot be written (database or disk is full)")
        add(study, entry)

    monkeypatch.setattr(Study, "add", full)
    with pytest.raises(OutputError, match="full"):
        made.search(tmp_path / "study", FakePool(limit=LIMIT), WHOLE)
    made.search(tmp_path / "study", FakePool(limit=LIMIT), WHOLE)
    assert found_in(tmp_path / "study", made) == uninterrupted


@pytest.mark.parametrize(
    "algorithm",
    [
        lambda made: RandomSearch(made.space, population=12, offspring=6, seed=1),
        lambda made: Exhaustive(made.space, population=12),
    ],
    ids=["random", "exhaustive"],
)
def test_other_algorithms_go_on_too(tmp_path: Path, algorithm: Any) -> None:
    made = setup(SILAGO)
    for folder, counts in ((tmp_path / "once", [30]), (tmp_path / "often", [7, 15, 30])):
        for count in counts:
            stops = Stops(evaluations=count)
            made.search(folder, FakePool(order=ORDERS[2]), stops, algorithm(made))
    assert found_in(tmp_path / "once", made) == found_in(tmp_path / "often", made)


# -- when it ends --------------------------------------------------------------------------------


def test_another_seed_is_another_search(
    made: Setup, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    made.search(tmp_path / "study", FakePool(limit=LIMIT), WHOLE, made.algorithm(seed=2))
    assert found_in(tmp_path / "study", made) != uninterrupted


@pytest.mark.parametrize("generations", [1, 2, 5])
def test_generations_end_a_search(made: Setup, tmp_path: Path, generations: int) -> None:
    ended = made.search(tmp_path / "study", FakePool(), Stops(generations=generations))
    assert ended == "all generations are done"
    found = found_in(tmp_path / "study", made)
    assert [number for number, *_ in found["generations"]] == list(range(generations))
    assert len(found["evaluations"]) <= 2 + 12 + 6 * (generations - 1)


def test_evaluations_are_different_plans_those_before_counted(tmp_path: Path) -> None:
    made = setup()
    # Plan 2 of the first generation is a baseline, and one stands twice in the second.
    _, wide = made.ends
    plans = [plan for plan in made.space.uniform() if plan not in made.ends]
    script = [[plans[0], wide, plans[1]], [plans[1], plans[2], plans[2]], [plans[3], plans[4]]]
    for count, new in ((2, plans[:1]), (4, plans[1:3]), (5, plans[3:4])):
        pool = FakePool()
        ended = made.search(
            tmp_path / "study", pool, Stops(evaluations=count), Scripted(made, script)
        )
        assert ended == "all evaluations are done"
        assert [plan for plan in pool.ran if plan not in made.ends] == new
    ended = made.search(tmp_path / "study", pool, Stops(evaluations=7), Scripted(made, script))
    assert ended == "there are no new plans"


def test_patience_ends_a_search_without_progress(tmp_path: Path) -> None:
    made = setup()
    w8, w4, w2 = uniform(8, 4, 2)
    mixed: Plan = (*w4[:3], w2[3])
    # More error than w4, and less speed.
    worse: Plan = (Precision(2, 16),) * 4
    worst: Plan = (Precision(16, 2),) * 4
    # The hypervolume grows in the first, third and sixth generation.
    script: list[list[Plan]] = [[w8], [w8], [w4, w8], [worse], [worst], [mixed], *4 * [[w8]]]
    expected = {1: 2, 2: 5, 3: 9}
    for patience, generations in expected.items():
        algorithm = Scripted(made, script)
        folder = tmp_path / str(patience)
        ended = made.search(folder, FakePool(), Stops(patience=patience), algorithm)
        assert ended == f"no progress in {patience} generations"
        assert len(algorithm.told) == generations
        assert len(found_in(folder, made)["generations"]) == generations


def test_patience_begins_after_the_initial_population(tmp_path: Path) -> None:
    # Nothing is feasible in the first generation: there was nothing to make progress from.
    made = setup(constraints=["error<=5%"])
    script = Scripted(made, [uniform(2), uniform(8), uniform(8), uniform(4)])
    ended = made.search(tmp_path / "study", FakePool(), Stops(patience=1), script)
    assert ended == "no progress in 1 generations"
    assert len(script.told) == 3


class Clock:
    """Time that passes with evaluations alone: one second each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(engine_module, "time", fake)

    def pool(self, **options: Any) -> FakePool:
        def spoil(_: int) -> None:
            self.now += 1

        return FakePool(spoil=spoil, **options)


@pytest.mark.parametrize("budget, ran", [(4.5, 5), (13.5, 14), (14, 14), (14.5, 15), (30, 30)])
def test_the_time_budget_ends_a_search_after_the_evaluation_in_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float, ran: int
) -> None:
    made, clock = setup(), Clock(monkeypatch)
    pool = clock.pool()
    ended = made.search(tmp_path / "study", pool, Stops(time_budget=budget), _started=clock.now)
    assert ended == "the time is over"
    found = found_in(tmp_path / "study", made)
    assert len(pool.ran) == ran == len(found["evaluations"])
    # A generation that is not whole is not part of the course.
    assert len(found["generations"]) == (0 if ran < 14 else 1 + (ran - 14) // 6)


def test_a_search_whose_time_is_over_can_go_on(
    made: Setup,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    for _ in range(2):  # the budget is of each run
        before = clock.now
        pool = clock.pool(limit=LIMIT, order=ORDERS[2])
        stops = Stops(generations=8, time_budget=9.5)
        assert made.search(tmp_path / "study", pool, stops, _started=before) == "the time is over"
        assert clock.now - before == 10
    made.search(tmp_path / "study", clock.pool(limit=LIMIT), WHOLE, _started=clock.now)
    assert found_in(tmp_path / "study", made) == uninterrupted
    with Study(tmp_path / "study") as study:
        seconds = [entry.seconds for entry in study.generations()]
    # Without what lay between, and without the part of a generation that was repeated.
    assert seconds == sorted(seconds)
    assert seconds[-1] <= clock.now - 1000


def test_a_time_budget_that_is_over_at_once_runs_nothing_but_baselines(tmp_path: Path) -> None:
    made, pool = setup(), FakePool()
    ended = made.search(tmp_path / "study", pool, Stops(time_budget=1e-9))
    assert ended == "the time is over"
    assert tuple(pool.ran) == made.ends


def test_a_small_space_ends_when_every_plan_was_looked_at(tmp_path: Path) -> None:
    made = setup(SILAGO, precisions=["w4a4", "w8a8"])
    pool = FakePool()
    ended = made.search(tmp_path / "study", pool, Stops(), Exhaustive(made.space, population=5))
    assert ended == "there are no new plans"
    assert len(pool.ran) == 2**4
    found = found_in(tmp_path / "study", made)
    points = {
        entry.number: (entry.result.error, -entry.gains["speedup"])
        for entry in found["evaluations"]
    }
    best = {
        number
        for number, (error, speed) in points.items()
        if not any(
            e <= error and s <= speed and (e, s) != (error, speed) for e, s in points.values()
        )
    }
    assert set(found["front"]) == best


# -- progress ------------------------------------------------------------------------------------


def test_progress_tells_counts_and_the_best_values_also_after_an_interruption(
    made: Setup, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    told: list[SearchProgress] = []
    for stops in (Stops(evaluations=33), WHOLE):
        made.search(folder, FakePool(limit=LIMIT), stops, progress=told.append)
    assert [entry.done for entry in told] == list(range(1, len(told) + 1))
    assert {(entry.phase, entry.total) for entry in told} == {("searching", 1000)}
    with Study(folder) as study:
        evaluations = study.evaluations()
    assert len(evaluations) == 2 + len(told)
    for count in (33, 34, len(told)):
        good = made.problem.front(evaluations[: 2 + count])
        assert told[count - 1].best == {
            "error": pytest.approx(100 * min(e.result.error or 0 for e in good)),
            "speedup": max(e.gains["speedup"] for e in good),
        }
    assert told[-1].hypervolume > 0


# -- where it starts -----------------------------------------------------------------------------


@given(st.sampled_from([SILAGO, BIT_FUSION]), st.data())
@settings(max_examples=30, deadline=None)
def test_the_ends_of_a_space_have_fewest_and_most_bits(
    accelerator: Any, data: st.DataObject
) -> None:
    allowed = accelerator.allowed_precisions
    chosen = data.draw(st.lists(st.sampled_from(allowed), min_size=2, max_size=3, unique=True))
    space = make_space("ab", accelerator, precisions=chosen)
    values = itertools.product(*(range(len(gene.choices)) for gene in space.genes))

    def bits(plan: Plan) -> int:
        return sum(p.weight_bits + p.activation_bits for p in plan)

    plans = [space.plan(genome) for genome in values]
    narrow, wide = narrowest_and_widest(space)
    assert {narrow, wide} <= set(plans)
    assert bits(narrow) == min(map(bits, plans))
    assert bits(wide) == max(map(bits, plans))
    assert narrow != wide


def noises(seed: int, names: Sequence[str] = NAMES) -> dict[str, dict[Precision, float]]:
    """Some noise for every layer, less of it for more bits."""
    generator = np.random.default_rng(seed)
    found = {}
    for name in names:
        a, b = generator.uniform(0.1, 2, size=2)
        found[name] = {
            p: float(a * 4.0**-p.weight_bits + b * 4.0**-p.activation_bits)
            for p in BIT_FUSION.allowed_precisions
        }
    return found


OPTIONS: list[dict[str, Any]] = [
    {},
    {"tie": ["first,second"], "exclude": ["last"]},
    {"precisions": ["w4a4", "w8a8", "w16a16"], "keep": {"third": "w8a8"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["all", "tied", "pairs"])
@pytest.mark.parametrize("accelerator", [SILAGO, BIT_FUSION, EYERISS], ids=lambda a: str(a.name))
def test_the_guided_way_goes_down_step_by_step(accelerator: Any, options: dict[str, Any]) -> None:
    made = setup(accelerator, "error,speedup,memory", **options)
    way = guided_start(made.space, made.costs, made.problem, noises(0), 10**6)
    highest = made.space.highest
    assert way[0] == tuple(highest)
    assert way[-1] == (0,) * len(highest)
    assert len(way) == highest.sum() + 1
    for before, after in itertools.pairwise(way):
        steps = np.array(before) - np.array(after)
        assert (steps.max(), steps.sum()) == (1, 1)
    assert made.space.plan(way[0]) == made.ends[1]
    assert made.space.plan(way[-1]) == made.ends[0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24, 25, 26, 100])
def test_the_guided_way_is_thinned_evenly(count: int) -> None:
    made = setup()
    every = guided_start(made.space, made.costs, made.problem, noises(0), 10**6)
    found = guided_start(made.space, made.costs, made.problem, noises(0), count)
    assert len(found) == min(max(count, 2), len(every)) == len(set(found))
    places = [every.index(genome) for genome in found]
    assert (places[0], places[-1]) == (0, len(every) - 1)
    steps = np.diff(places)
    assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("accelerator", [SILAGO, BIT_FUSION], ids=lambda a: str(a.name))
def test_no_step_of_the_guided_way_gains_less_for_more_noise(accelerator: Any, seed: int) -> None:
    made = setup(accelerator, "error,memory,mean_speedup")
    noise = noises(seed)
    reference = dict(zip(("error", "memory", "mean_speedup"), made.problem.reference, strict=True))

    def worth(genome: Sequence[int]) -> tuple[float, float]:
        plan = made.space.plan(genome)
        gains = made.costs.of(plan)
        costs = {"memory": gains["memory"], "mean_speedup": -gains["mean_speedup"]}
        gain = sum(
            (reference[name][0] - value) / (reference[name][0] - reference[name][1])
            for name, value in costs.items()
        )
        return gain, sum(noise[name][p] for name, p in zip(NAMES, plan, strict=True))

    way = guided_start(made.space, made.costs, made.problem, noise, 10**6)
    for before, after in itertools.pairwise(way):
        gain0, noise0 = worth(before)
        rates = {}
        for number, value in enumerate(before):
            if value:
                lower = (*before[:number], value - 1, *before[number + 1 :])
                gain, loud = worth(lower)
                rates[lower] = (gain - gain0) / (loud - noise0)
        assert rates[after] == pytest.approx(max(rates.values()), rel=1e-6)


def test_of_equal_gains_the_least_noise_comes_first() -> None:
    layers = [Layer.matmul(rows=1, in_features=8, out_features=8, name=name) for name in "abc"]
    made = setup(SILAGO, "error,memory", layers=layers, precisions=["w4a4", "w8a8"])
    noise = {
        name: {Precision(8, 8): 0.0, Precision(4, 4): value}
        for name, value in (("a", 0.3), ("b", 0.1), ("c", 0.2))
    }
    way = guided_start(made.space, made.costs, made.problem, noise, 10)
    assert way == [(1, 1, 1), (1, 0, 1), (1, 0, 0), (0, 0, 0)]


def test_a_gain_for_nothing_comes_before_any_other_and_a_loss_last() -> None:
    layers = [
        Layer.matmul(rows=1, in_features=8, out_features=8 * size, name=name)
        for name, size in (("a", 4), ("b", 1), ("c", 2))
    ]
    made = setup(
        BIT_FUSION, "error,memory", layers=layers, precisions=["w4a4", "w4a8", "w8a8", "w8a4"]
    )
    noise = {
        name: {
            p: (0.5 if p.weight_bits == 4 else 0) * (name != "b")
            + (0.125 if p.activation_bits == 4 else 0)
            for p in made.space.precisions(name)
        }
        for name in "abc"
    }
    way = guided_start(made.space, made.costs, made.problem, noise, 10)
    # Genes: weights and activations of a, b, c. Memory gains from weights only: those of b cost
    # nothing, those of a gain twice as much as those of c for the same noise.
    changed = [int(np.argmax(np.array(x) - np.array(y))) for x, y in itertools.pairwise(way)]
    assert changed == [2, 0, 4, 1, 3, 5]


def test_a_guided_start_begins_the_search(tmp_path: Path) -> None:
    made = setup()
    start = guided_start(made.space, made.costs, made.problem, noises(0), 6)
    made.search(tmp_path / "study", FakePool(), Stops(generations=1), made.algorithm(start=start))
    with Study(tmp_path / "study") as study:
        plans = {entry.plan for entry in study.evaluations()}
    assert {made.space.plan(genome) for genome in start} <= plans
    assert len(plans) == 12  # the baselines are its ends
