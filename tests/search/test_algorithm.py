from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize

from bitwright.search.algorithm import Algorithm, Exhaustive, Nsga2, RandomSearch
from bitwright.search.space import Genome, Space, make_space
from tests.search.fakes import BIT_FUSION, PAPER, SILAGO

LARGE = make_space([layer.name for layer in PAPER], BIT_FUSION)  # 4^16 plans
SMALL = make_space("abc", SILAGO)  # 27 plans
TINY = make_space("abc", SILAGO, tie=["*"], precisions=["w4a4", "w8a8"])  # 2 plans

Floats = npt.NDArray[np.float64]
Values = Callable[[Genome], tuple[list[float], list[float]]]


def two_ways(genome: Genome) -> tuple[list[float], list[float]]:
    """Two objectives that contradict each other, and a limit that some genomes exceed."""
    weights = np.linspace(1, 2, len(genome))
    value = float(weights @ np.array(genome))
    other = float(sum((3 - g) ** 2 * (1 + n % 3) for n, g in enumerate(genome)))
    return [value, other], [max(0.0, other / 40 - 1), 0.0]


def nsga2(space: Space = LARGE, seed: int = 1, **options: Any) -> Nsga2:
    given = {"objectives": 2, "constraints": 2, "population": 40, "offspring": 10, **options}
    return Nsga2(space, seed=seed, **given)


def conversation(
    algorithm: Algorithm, generations: int, values: Values = two_ways
) -> Iterator[list[Genome]]:
    """What an algorithm asks for, generation by generation."""
    for _ in range(generations):
        asked = algorithm.ask()
        yield asked
        if not asked:
            return
        told = [values(genome) for genome in asked]
        algorithm.tell([np.array(f) for f, _ in told], [g for _, g in told])


def genes_fit(space: Space, genomes: Sequence[Genome]) -> bool:
    rows = np.array(genomes)
    return bool((rows >= 0).all() and (rows <= space.highest).all())


# -- NSGA-II -------------------------------------------------------------------------------------


class Recorded(Problem):  # type: ignore[misc]  # pymoo ships no types
    """What pymoo itself is asked for."""

    def __init__(self, space: Space) -> None:
        count = len(space.genes)
        super().__init__(
            n_var=count, n_obj=2, n_ieq_constr=2, xl=np.zeros(count), xu=space.highest, vtype=int
        )
        self.asked: list[list[Genome]] = []

    def _evaluate(self, x: Any, out: Any, *_: Any, **__: Any) -> None:
        genomes = [tuple(int(g) for g in row) for row in x]
        self.asked.append(genomes)
        out["F"] = np.array([two_ways(genome)[0] for genome in genomes])
        out["G"] = np.array([two_ways(genome)[1] for genome in genomes])


@pytest.mark.parametrize("space", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("seed", [1, 7])
def test_it_looks_at_what_pymoos_own_minimize_looks_at(space: Space, seed: int) -> None:
    problem = Recorded(space)
    peer = minimize(
        problem,
        NSGA2(
            pop_size=12,
            n_offsprings=6,
            sampling=IntegerRandomSampling(),
            # The operators of MOHAQ, arXiv 2108.01192 and the authors' code.
            crossover=SBX(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
            mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
            eliminate_duplicates=True,
        ),
        ("n_gen", 15),
        seed=seed,
    )
    ours = nsga2(space, seed, population=12, offspring=6)
    assert list(conversation(ours, 15)) == problem.asked
    found = ours._algorithm.opt
    assert found.get("X").tolist() == peer.X.tolist()
    assert found.get("F").tolist() == peer.F.tolist()


def test_mohaqs_settings_make_630_evaluations() -> None:
    asked = list(conversation(nsga2(), 60))
    assert [len(genomes) for genomes in asked] == [40] + 59 * [10]
    assert sum(map(len, asked)) == 630
    for genomes in asked:
        assert len(set(genomes)) == len(genomes)
        assert genes_fit(LARGE, genomes)


def test_it_finds_better_plans_than_chance() -> None:
    def best(algorithm: Algorithm) -> float:
        asked = [genome for genomes in conversation(algorithm, 40) for genome in genomes]
        return min(sum(two_ways(genome)[0]) for genome in asked)

    chance = RandomSearch(LARGE, population=40, offspring=10, seed=1)
    assert best(nsga2()) < best(chance)


def test_it_prefers_plans_that_meet_the_limits() -> None:
    asked = list(conversation(nsga2(), 40))
    met = [np.mean([max(two_ways(g)[1]) == 0 for g in genomes]) for genomes in asked]
    assert np.mean(met[-10:]) > 2 * met[0]


def test_the_same_seed_asks_the_same_whatever_else_uses_chance() -> None:
    first = list(conversation(nsga2(seed=3), 8))
    second = []
    for genomes in conversation(nsga2(seed=3), 8):
        second.append(genomes)
        # What an evaluation in this process may do.
        np.random.seed(5)  # noqa: NPY002
        np.random.random(100)  # noqa: NPY002
    assert first == second
    assert first != list(conversation(nsga2(seed=4), 8))


def test_two_at_the_same_time_do_not_disturb_each_other() -> None:
    alone = list(conversation(nsga2(seed=3), 5))
    one, other = conversation(nsga2(seed=3), 5), conversation(nsga2(seed=9), 5)
    together = [genomes for genomes, _ in zip(one, other, strict=True)]
    assert together == alone


@given(
    st.lists(st.tuples(*3 * [st.integers(0, 2)]), max_size=12),
    st.integers(2, 30),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_the_initial_population_begins_with_what_was_given(
    start: list[Genome], population: int, seed: int
) -> None:
    algorithm = nsga2(SMALL, seed, population=population, start=start)
    asked = algorithm.ask()
    given = list(dict.fromkeys(start[:population]))
    assert asked[: len(given)] == given
    assert len(set(asked)) == len(asked)
    assert genes_fit(SMALL, asked)
    if start:  # chance alone may draw a plan twice, and does not draw again (pymoo)
        assert len(asked) == min(population, 27)
    again = nsga2(SMALL, seed, population=population, start=start)
    assert again.ask() == asked


def test_offspring_are_new_to_the_population() -> None:
    algorithm = nsga2(SMALL, population=8, offspring=4, start=[(0, 0, 0)])
    for generation, genomes in enumerate(conversation(algorithm, 20)):
        assert len(set(genomes)) == len(genomes) == (4 if generation else 8)
        if generation:
            population = {tuple(map(int, row)) for row in algorithm._algorithm.pop.get("X")}
            assert len(population) == 8
            assert not population & set(genomes)


@pytest.mark.parametrize("start", [(), [(0,), (1,)]], ids=["plain", "guided"])
def test_it_ends_where_the_space_is_used_up(start: Sequence[Genome]) -> None:
    asked = list(conversation(nsga2(TINY, start=start), 10))
    assert asked[-1] == []
    assert {genome for genomes in asked for genome in genomes} == {(0,), (1,)}


@pytest.mark.parametrize("population, offspring", [(1, 1), (1, 5), (2, 1), (3, 7)])
def test_populations_of_any_size_go_on(population: int, offspring: int) -> None:
    algorithm = nsga2(population=population, offspring=offspring)
    sizes = [len(genomes) for genomes in conversation(algorithm, 6)]
    assert sizes == [population] + 5 * [offspring]


def test_many_objectives_and_no_feasible_plan() -> None:
    def hopeless(genome: Genome) -> tuple[list[float], list[float]]:
        return [float(sum(genome)), 1.0, -1.0, float(genome[0])], [1.0 + sum(genome), 1e6, 0.0]

    algorithm = nsga2(SMALL, objectives=4, constraints=3, population=6, offspring=3)
    asked = list(conversation(algorithm, 6, hopeless))
    assert sum(map(len, asked)) > 6
    assert all(genes_fit(SMALL, genomes) for genomes in asked if genomes)


# -- all, and chance -----------------------------------------------------------------------------


@pytest.mark.parametrize("population", [1, 4, 27, 100])
def test_exhaustive_is_every_plan_once(population: int) -> None:
    asked = list(conversation(Exhaustive(SMALL, population=population), 100))
    assert asked.pop() == []
    sizes = [len(genomes) for genomes in asked]
    assert sizes == [min(population, 27 - n) for n in range(0, 27, population)]
    every = [genome for genomes in asked for genome in genomes]
    assert sorted(every) == sorted(np.ndindex(3, 3, 3))


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_chance_draws_every_plan_at_most_once(population: int, offspring: int, seed: int) -> None:
    algorithm = RandomSearch(SMALL, population=population, offspring=offspring, seed=seed)
    asked = list(conversation(algorithm, 100))
    assert asked.pop() == []
    every = [genome for genomes in asked for genome in genomes]
    assert sorted(every) == sorted(np.ndindex(3, 3, 3))
    assert len(asked[0]) == min(population, 27)
    assert all(len(genomes) == offspring for genomes in asked[1:-1])
    again = RandomSearch(SMALL, population=population, offspring=offspring, seed=seed)
    assert list(conversation(again, 100))[:-1] == asked


def test_chance_with_another_seed_is_another() -> None:
    one, other = (RandomSearch(LARGE, population=40, offspring=10, seed=n).ask() for n in (1, 2))
    assert one != other
    assert len(one) == len(set(one)) == 40
    assert genes_fit(LARGE, one)
