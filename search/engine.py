"""Run a search: ask the algorithm, answer from the study or the workers, write everything down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitwright.search.algorithm import Algorithm
from bitwright.search.objectives import Costs
from bitwright.search.problem import Problem
from bitwright.search.results import Result
from bitwright.search.settings import Stops
from bitwright.search.space import Genome, Plan, Space, widest
from bitwright.search.study import Evaluation, Generation, Study
from bitwright.search.workers import Pool
from bitwright.vocabulary import Precision

__all__ = ["Engine", "SearchProgress", "Stops", "guided_start", "narrowest_and_widest"]


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """How far a search is.

    Attributes
    ----------
    phase
        ``calibrating`` (samples), ``searching`` (different plans) or ``testing`` (plans).
    done, total
        How much of the phase is done, and how much it may become.
    best
        Best value of each objective among the plans of the front, by name, as shown.
    hypervolume
        Of the last generation.
    """

    phase: Literal["calibrating", "searching", "testing"]
    done: int
    total: int
    best: Mapping[str, float] = field(default_factory=dict)
    hypervolume: float = 0.0


@dataclass
class Engine:
    """One run of a search.

    Attributes
    ----------
    study, space, costs, problem, pool
        What it works on and with.
    stops
        When it ends.
    progress
        Called after each evaluation.
    """

    study: Study
    space: Space
    costs: Costs
    problem: Problem
    pool: Pool
    stops: Stops
    total: int
    progress: Callable[[SearchProgress], None] | None = None
    _known: dict[Plan, Evaluation] = field(default_factory=dict)
    _next: int = 1
    _asked: set[Plan] = field(default_factory=set)
    _started: float = field(default_factory=time.monotonic)
    _hypervolume: float = 0.0
    _best: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = {entry.plan: entry for entry in self.study.evaluations()}
        self._before = max((g.seconds for g in self.study.generations()), default=0.0)

    def baselines(self, plans: Sequence[Plan]) -> list[Evaluation]:
        """Evaluate plans whole, whatever the limit on the error; they do not count."""
        found = self._evaluate(plans, "baseline", limit=math.inf)
        self._asked.clear()
        return [found[plan] for plan in plans]

    def run(self, algorithm: Algorithm) -> str:
        """Search; return why it ended."""
        generation = 0
        best, stale = -1.0, 0  # the initial population has nothing to be better than
        while True:
            genomes = algorithm.ask()
            if not genomes:
                return "there are no new plans"
            plans = [self.space.plan(genome) for genome in genomes]
            found = self._evaluate(plans, "start" if generation == 0 else "search")
            if len(found) < len(set(plans)):
                # A generation that is not whole tells the algorithm nothing.
                return "the time is over" if self._late() else "all evaluations are done"
            entries = [found[plan] for plan in plans]
            algorithm.tell(
                [self.problem.minimized(e.result.error, e.gains) for e in entries],
                [self.problem.violations(e.result, e.gains) for e in entries],
            )
            self._write_generation(generation)
            generation += 1
            stale = 0 if self._hypervolume > best else stale + 1
            best = max(best, self._hypervolume)
            if self.stops.generations is not None and generation >= self.stops.generations:
                return "all generations are done"
            if self.stops.patience is not None and stale >= self.stops.patience:
                return f"no progress in {stale} generations"
            if self._spent():
                return "all evaluations are done"
            if self._late():
                return "the time is over"

    def _late(self) -> bool:
        budget = self.stops.time_budget
        return budget is not None and time.monotonic() - self._started >= budget

    def _spent(self) -> bool:
        limit = self.stops.evaluations
        return limit is not None and len(self._asked) >= limit

    def _evaluate(
        self, plans: Sequence[Plan], origin: str, limit: float | None = None
    ) -> dict[Plan, Evaluation]:
        """Answers for plans, in part if the search has to end."""
        found: dict[Plan, Evaluation] = {}
        new: dict[int, Plan] = {}
        taken = {entry.number for entry in self._known.values()}
        for plan in dict.fromkeys(plans):
            if plan not in self._asked and self._spent() and origin != "baseline":
                break
            self._asked.add(plan)
            known = self._known.get(plan)
            if known is not None:
                found[plan] = known
                self._note(known)
                self._next = max(self._next, known.number + 1)
                continue
            while self._next in taken:
                self._next += 1
            new[self._next] = plan
            self._next += 1
        gains = {number: self._gains(plan) for number, plan in new.items()}
        waiting: dict[int, Plan] = {}
        for number, plan in new.items():
            # What the hardware cannot take needs no run; baselines are shown anyway.
            if limit is None and any(self.problem.hardware_violations(gains[number])):
                skipped = Result("skipped", None)
                found[plan] = self._add(number, plan, origin, skipped, gains[number])
            else:
                waiting[number] = plan
        if waiting and not (self._late() and origin != "baseline"):

            def stop() -> bool:
                return self._late() and origin != "baseline"

            for number, result in self.pool.evaluate(waiting, limit, stop):
                plan = waiting[number]
                found[plan] = self._add(number, plan, origin, result, gains[number])
        return found

    def _gains(self, plan: Plan) -> dict[str, float]:
        return {name: v for name, v in self.costs.of(plan).items() if not math.isnan(v)}

    def _add(
        self, number: int, plan: Plan, origin: str, result: Result, gains: Mapping[str, float]
    ) -> Evaluation:
        entry = Evaluation(number, plan, origin, result, gains)
        self.study.add(entry)
        self._known[plan] = entry
        self._note(entry)
        if self.progress is not None and origin != "baseline":
            self.progress(
                SearchProgress(
                    "searching",
                    len(self._asked & self._known.keys()),
                    self.total,
                    dict(self._best),
                    self._hypervolume,
                )
            )
        return entry

    def _note(self, entry: Evaluation) -> None:
        """Keep the best values, for progress."""
        if not self.problem.feasible(entry):
            return
        values = self.problem.values(entry.result.error, entry.gains)
        for objective, value in zip(self.problem.objectives, values, strict=True):
            before = self._best.get(objective.name, value)
            better = max if objective.maximize else min
            self._best[objective.name] = better(before, value)

    def _write_generation(self, number: int) -> None:
        entries = [self._known[plan] for plan in self._asked if plan in self._known]
        self._hypervolume = self.problem.hypervolume(entries)
        seconds = self._before + time.monotonic() - self._started
        self.study.set_generation(Generation(number, len(entries), self._hypervolume, seconds))


def narrowest_and_widest(space: Space) -> tuple[Plan, Plan]:
    """The plans with fewest and with most bits."""
    options = [space.precisions(name) for name in space.layers]
    return tuple(entry[0] for entry in options), tuple(widest(entry) for entry in options)


def guided_start(
    space: Space,
    costs: Costs,
    problem: Problem,
    noise: Mapping[str, Mapping[Precision, float]],
    count: int,
) -> list[Genome]:
    """Genomes on the way from most bits to fewest that costs least noise for what it gains.

    At each step the gene goes one down whose gain in the objectives of the hardware, relative to
    what the space offers, is largest for the noise that it adds to the outputs of its layers.

    Parameters
    ----------
    space, costs, problem
        Of the search.
    noise
        Layer and precision to relative noise at the layer's own output.
    count
        How many genomes, evenly spread over the way, both ends among them.
    """
    places = {name: place for place, name in enumerate(space.layers)}
    genome = [int(g) for g in space.highest]

    def values(choices: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        gains = costs.of_many(choices)
        total = np.zeros(len(choices))
        for objective, (worst, best) in zip(problem.objectives, problem.reference, strict=True):
            if objective.name == problem.scale.name or worst == best:
                continue
            found = gains[objective.name] * (-1.0 if objective.maximize else 1.0)
            total += np.where(np.isnan(found), 0.0, (worst - found) / (worst - best))
        return total

    def noise_of(place: int, precision: Precision) -> float:
        return noise.get(space.layers[place], {}).get(precision, 0.0)

    def step_down(number: int) -> tuple[list[int], npt.NDArray[np.intp], float]:
        """Where a plan changes if a gene goes one down, to what, and the noise that this adds."""
        changed = [places[name] for name in space.genes[number].layers]
        before = space.plan(genome)
        after = space.plan([value - (n == number) for n, value in enumerate(genome)])
        added = sum(noise_of(p, after[p]) - noise_of(p, before[p]) for p in changed)
        return changed, costs.choice(after)[changed], added

    way: list[Genome] = [tuple(genome)]
    steps = {number: step_down(number) for number, gene in enumerate(genome) if gene}
    while steps:
        current = costs.choice(space.plan(genome))
        # A model may have hundreds of genes, so all of them at once.
        choices = np.tile(current, (len(steps) + 1, 1))
        for row, (changed, indices, _) in enumerate(steps.values(), start=1):
            choices[row, changed] = indices
        now, *after = values(choices).tolist()
        rates: list[tuple[bool, float, int]] = []
        for (number, (_, _, added)), then in zip(steps.items(), after, strict=True):
            gain = then - now
            # A gain for nothing is best, a loss worst.
            rate = gain / max(added, 1e-12) if gain > 0 else -added
            rates.append((gain > 0, rate, -number))
        chosen = -max(rates)[2]
        genome[chosen] -= 1
        way.append(tuple(genome))
        for number, gene in enumerate(space.genes):  # those of the same layers
            if gene.layers == space.genes[chosen].layers and number in steps:
                if genome[number]:
                    steps[number] = step_down(number)
                else:
                    del steps[number]
    picked = np.unique(np.linspace(0, len(way) - 1, max(count, 2)).round().astype(int))
    return [way[index] for index in picked]
