"""What a plan is worth: its place on the front, how it violates limits, the hypervolume of many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitwright.search.objectives import Constraint, Costs, ErrorScale, Objective
from bitwright.search.results import Result
from bitwright.search.space import Space
from bitwright.search.study import Evaluation

__all__ = ["Problem", "references"]

_FAILED = 1e6  # a violation beyond all others
_INFINITE = 1e100  # a value beyond all others
_POINTS = 0.10  # how much error more than the float model's the reference point has

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Objectives and constraints of a search.

    Attributes
    ----------
    scale
        How errors are shown.
    objectives, constraints
        What is wanted.
    float_error
        The float model's error.
    reference
        For each objective, the value of the reference point of the hypervolume, and the best
        conceivable; both to be minimised.
    """

    scale: ErrorScale
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    float_error: float
    reference: tuple[tuple[float, float], ...] = ()

    @property
    def error_limit(self) -> float | None:
        """The largest error that the constraints accept; None without one."""
        limits = [
            self.constraint_limit(constraint)
            for constraint in self.constraints
            if constraint.name == self.scale.name
        ]
        return min(limits, default=None)

    def constraint_limit(self, constraint: Constraint) -> float:
        """The error, less is better, at which a constraint on the error ends."""
        shown = constraint.absolute(self.scale.shown(self.float_error))
        # Back from what people read; a hair more, as 2 % is no exact number.
        if self.scale.unit == "fraction":
            return shown / 100.0 + 1e-9
        value = -shown if self.scale.maximize else shown
        return value + 1e-9 * abs(value)

    def values(self, error: float | None, gains: Mapping[str, float]) -> tuple[float, ...]:
        """The objectives as they are shown; NaN without an error."""
        return tuple(
            (math.nan if error is None else self.scale.shown(error))
            if objective.name == self.scale.name
            else gains.get(objective.name, math.nan)
            for objective in self.objectives
        )

    def hardware_violations(self, gains: Mapping[str, float]) -> list[float]:
        """How far each limit of the hardware is exceeded, relative to it; 0 where it is met."""
        return [
            max(constraint.violation(gains[constraint.name]), 0.0)
            if constraint.name in gains
            else _FAILED
            for constraint in self.constraints
            if constraint.name != self.scale.name
        ]

    def violations(self, result: Result, gains: Mapping[str, float]) -> list[float]:
        """All violations, the error's last; one entry more tells a failure."""
        found = self.hardware_violations(gains)
        failed = _FAILED if result.status == "failed" else 0.0
        if (limit := self.error_limit) is None:
            return [*found, failed]
        beyond = 0.0
        if result.error is not None and result.error > limit:
            # Per point of error rather than relative to a limit that may be next to nothing.
            width = _POINTS if self.scale.unit == "fraction" else max(abs(limit), 1e-12)
            beyond = min((result.error - limit) / width, _FAILED)
        return [*found, beyond, failed]

    def feasible(self, evaluation: Evaluation) -> bool:
        """Whether a plan has an error and meets all limits."""
        result = evaluation.result
        return (
            result.status == "ok"
            and result.error is not None
            and not any(self.violations(result, evaluation.gains))
        )

    def minimized(self, error: float | None, gains: Mapping[str, float]) -> Floats:
        """The objectives to be minimised; the reference point's value where there is none."""
        values = [
            objective.cost(value)
            for objective, value in zip(self.objectives, self.values(error, gains), strict=True)
        ]
        worst = [entry[0] for entry in self.reference]
        # Infinite errors exist (a perplexity); distances between points must stay numbers.
        return np.array(
            [w if math.isnan(v) else _finite(v) for v, w in zip(values, worst, strict=True)]
        )

    def hypervolume(self, evaluations: Iterable[Evaluation]) -> float:
        """Hypervolume of feasible plans, 0 to 1; see :func:`references`."""
        points = [self.minimized(e.result.error, e.gains) for e in evaluations if self.feasible(e)]
        return self.hypervolume_of(points)

    def hypervolume_of(self, points: Sequence[Floats]) -> float:
        """Hypervolume of points to be minimised."""
        from pymoo.indicators.hv import HV

        if not points:
            return 0.0
        worst = np.array([entry[0] for entry in self.reference])
        best = np.array([entry[1] for entry in self.reference])
        width = np.where(worst > best, worst - best, 1.0)
        # Nothing is better than the best; of a metric it is only what the widest plan has.
        scaled = np.maximum((np.array(points) - best) / width, 0.0)
        inside = scaled[(scaled < 1.0).all(axis=1)]
        if not len(inside):
            return 0.0
        volume = HV(ref_point=np.ones(len(worst)))(np.unique(inside, axis=0))
        return float(volume)

    def front(self, evaluations: Iterable[Evaluation]) -> list[Evaluation]:
        """The feasible plans that no other beats, by error and then number.

        Of plans that are equal in every objective the first evaluated stays.
        """
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

        chosen: dict[tuple[float, ...], Evaluation] = {}
        for entry in evaluations:
            if self.feasible(entry):
                point = tuple(self.minimized(entry.result.error, entry.gains).tolist())
                chosen.setdefault(point, entry)
        if not chosen:
            return []
        points = np.array(list(chosen))
        indices = NonDominatedSorting().do(points, only_non_dominated_front=True)
        entries = list(chosen.values())
        found = [entries[int(index)] for index in indices]

        def order(entry: Evaluation) -> tuple[float, int]:
            error = entry.result.error
            return (math.inf if error is None else error, entry.number)

        return sorted(found, key=order)


def _finite(value: float) -> float:
    return min(max(value, -_INFINITE), _INFINITE)


def references(
    problem: Problem,
    space: Space,
    costs: Costs,
    *,
    narrowest_error: float | None,
    widest_error: float | None,
) -> tuple[tuple[float, float], ...]:
    """Reference point and ideal point of the hypervolume, both to be minimised.

    Error: from the float model's plus 10 points to none for shares; for other metrics from that of
    the plan with fewest bits to that of the one with most. Everything else: from what the widest
    precision of the accelerator has to the best of the space; where that is no better, from the
    worst of the space.
    """
    scale = problem.scale
    choices = {name: space.precisions(name) for name in space.layers}
    base = costs.of((costs.baseline,) * len(space.layers))
    found = []
    for objective in problem.objectives:
        if objective.name == scale.name:
            if scale.unit == "fraction":
                ends = (problem.float_error + _POINTS, 0.0)
            else:
                narrow = math.inf if narrowest_error is None else narrowest_error
                wide = _finite(problem.float_error if widest_error is None else widest_error)
                # The plan with fewest bits may give no number, or by chance the smaller error.
                useful = math.isfinite(narrow) and narrow > wide
                ends = (narrow if useful else wide + abs(wide) + 1.0, wide)
            shown = (scale.shown(ends[0]), scale.shown(ends[1]))
        else:
            bounds = costs.bounds(objective.name, choices)
            best, worst = sorted(bounds, key=objective.cost)
            useful = objective.cost(base[objective.name]) > objective.cost(best)
            shown = (base[objective.name] if useful else worst, best)
        found.append((objective.cost(shown[0]), objective.cost(shown[1])))
    return tuple(found)
