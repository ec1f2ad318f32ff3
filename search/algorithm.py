"""Which plans to look at next: NSGA-II by pymoo, all of a small space, or chance.

Each is a conversation: ``ask`` gives genomes, ``tell`` takes their values. The same seed and the
same answers give the same questions, which is how an interrupted search goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitwright.search.space import Genome, Space

__all__ = ["Algorithm", "Exhaustive", "Nsga2", "RandomSearch"]

Floats = npt.NDArray[np.float64]


class Algorithm(Protocol):
    """Asks for plans, learns from what they are worth."""

    def ask(self) -> list[Genome]:
        """Genomes to evaluate next; none when the search is over."""

    def tell(self, values: Sequence[Floats], violations: Sequence[Sequence[float]]) -> None:
        """Take objectives (to be minimised) and violations of what was asked for last."""


class Nsga2:
    """NSGA-II with the operators and settings of MOHAQ.

    Integer sampling, simulated binary crossover and polynomial mutation with rounding, both with
    probability 1 and distribution index 3; duplicates are eliminated.

    Parameters
    ----------
    space
        What to choose from.
    objectives, constraints
        How many values and violations there are.
    population, offspring
        Plans of a population, and new plans of a generation.
    seed
        Of all randomness.
    start
        Genomes of the initial population; chance adds what is missing.
    """

    def __init__(
        self,
        space: Space,
        *,
        objectives: int,
        constraints: int,
        population: int,
        offspring: int,
        seed: int,
        start: Sequence[Genome] = (),
    ) -> None:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.operators.sampling.rnd import IntegerRandomSampling
        from pymoo.termination import get_termination

        self._problem = Problem(
            n_var=len(space.genes),
            n_obj=objectives,
            n_ieq_constr=constraints,
            xl=np.zeros(len(space.genes), dtype=np.int64),
            xu=space.highest,
            vtype=int,
        )
        sampling: Any = IntegerRandomSampling()
        if start:
            sampling = _first_population(space, start, population, seed)
        self._algorithm = NSGA2(
            pop_size=population,
            n_offsprings=offspring,
            sampling=sampling,
            crossover=SBX(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
            mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
            eliminate_duplicates=True,
        )
        self._algorithm.setup(
            self._problem, termination=get_termination("n_gen", 2**31), seed=seed, verbose=False
        )
        self._asked: Any = None

    def ask(self) -> list[Genome]:
        """Genomes of the next generation."""
        self._asked = self._algorithm.ask()
        if self._asked is None or not len(self._asked):
            return []
        return [tuple(int(g) for g in row) for row in self._asked.get("X")]

    def tell(self, values: Sequence[Floats], violations: Sequence[Sequence[float]]) -> None:
        """Take the values of the generation."""
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        known = StaticProblem(self._problem, F=np.array(values), G=np.array(violations))
        Evaluator().eval(known, self._asked)
        self._algorithm.tell(infills=self._asked)


def _first_population(
    space: Space, start: Sequence[Genome], population: int, seed: int
) -> npt.NDArray[np.int64]:
    rows = dict.fromkeys(start[:population])
    generator = np.random.default_rng(seed)
    while len(rows) < min(population, space.size):
        rows[tuple(int(g) for g in generator.integers(0, space.highest + 1))] = None
    return np.array(list(rows), dtype=np.int64)


class Exhaustive:
    """All plans of the space, some at a time."""

    def __init__(self, space: Space, *, population: int) -> None:
        self._rows: Iterator[Genome] = itertools.product(
            *(range(len(gene.choices)) for gene in space.genes)
        )
        self._population = population

    def ask(self) -> list[Genome]:
        """The next plans."""
        return list(itertools.islice(self._rows, self._population))

    def tell(self, values: Sequence[Floats], violations: Sequence[Sequence[float]]) -> None:
        """Learn nothing."""


class RandomSearch:
    """Plans drawn from the space, each at most once."""

    def __init__(self, space: Space, *, population: int, offspring: int, seed: int) -> None:
        self._space = space
        self._generator = np.random.default_rng(seed)
        self._next, self._offspring = population, offspring
        self._seen: set[Genome] = set()

    def ask(self) -> list[Genome]:
        """The next plans."""
        rows: list[Genome] = []
        while len(rows) < self._next and len(self._seen) < self._space.size:
            drawn = self._generator.integers(0, self._space.highest + 1)
            genome = tuple(int(g) for g in drawn)
            if genome not in self._seen:
                self._seen.add(genome)
                rows.append(genome)
        self._next = self._offspring
        return rows

    def tell(self, values: Sequence[Floats], violations: Sequence[Sequence[float]]) -> None:
        """Learn nothing."""
