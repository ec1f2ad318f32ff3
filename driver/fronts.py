"""``bitwright front``: what a study holds, read without its model and without its data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.artifact import sha256
from bitwright.errors import DataError, StudyError, UsageError
from bitwright.search.objectives import GAINS, ErrorScale, parse_constraint
from bitwright.search.problem import Problem
from bitwright.search.settings import (
    DataFile,
    SearchSettings,
    StudyFacts,
    problem_of,
    settings_of,
)
from bitwright.search.space import Plan
from bitwright.search.study import Evaluation, Generation, Study, plan_text
from bitwright.units import quantity
from bitwright.vocabulary import PrecisionPlan

__all__ = [
    "Front",
    "Point",
    "digest",
    "front",
    "nobody",
    "plan_of_study",
    "point_of",
    "quantization_of_study",
    "refuse_change",
    "shown_error",
]


@dataclass(frozen=True, slots=True)
class Point:
    """One plan of a study, as people read it.

    Attributes
    ----------
    number
        Its number in the study; ``DIR#number`` names the plan.
    plan
        The precision of every layer, in the order of the layers.
    status
        ``ok``, ``stopped``, ``skipped`` or ``failed``.
    values
        Objective name to value, in its unit; NaN where there is none.
    gains
        All gains of the hardware that the target's cost model defines.
    overall_error
        Error over all validation samples that were run, as shown.
    test_error
        Error on the test data, as shown; None without.
    origin
        ``baseline``, ``start`` or ``search``.
    message
        Why it failed.
    """

    number: int
    plan: Plan
    status: str
    values: Mapping[str, float]
    gains: Mapping[str, float]
    overall_error: float | None
    test_error: float | None
    origin: str
    message: str = ""

    def to_dict(self, layers: Sequence[str]) -> dict[str, Any]:
        """Return what ``--json`` prints."""

        def number(value: float | None) -> float | None:
            return None if value is None or math.isnan(value) else value

        return {
            "number": self.number,
            "status": self.status,
            "objectives": {name: number(value) for name, value in self.values.items()},
            "gains": dict(self.gains),
            "overall_error": number(self.overall_error),
            "test_error": number(self.test_error),
            "origin": self.origin,
            "message": self.message,
            "plan": {name: str(p) for name, p in zip(layers, self.plan, strict=True)},
        }


@dataclass(frozen=True, slots=True)
class Front:
    """A study as it stands: its front, and what it is compared with.

    Attributes
    ----------
    folder
        The study.
    settings, facts
        What was asked for, and what was found before the first evaluation.
    problem
        Objectives and constraints.
    points
        The front: plans that meet all constraints and that no other beats, by error.
    baselines
        Uniform plans, and those with fewest and most bits.
    evaluations
        Number of evaluations by status.
    hypervolume
        Of the front, 0 to 1.
    generations
        The course of the search.
    float_test_error
        Of the float model on the test data, as shown; None without.
    picked
        The point that was asked for.
    """

    folder: Path
    settings: SearchSettings
    facts: StudyFacts
    problem: Problem
    points: tuple[Point, ...]
    baselines: tuple[Point, ...]
    evaluations: Mapping[str, int]
    hypervolume: float
    generations: tuple[Generation, ...]
    float_test_error: float | None
    picked: Point | None = None

    @property
    def float_error(self) -> float:
        """Of the float model on the validation data, as shown."""
        return self.problem.scale.shown(self.problem.float_error)

    def pick(self, constraints: Iterable[str] = (), by: str | None = None) -> Point:
        """Pick a point.

        Parameters
        ----------
        constraints
            Limits, as for the search; a point has to meet all.
        by
            The objective that is to be best; by default the first that is not the error. Of
            points that are equal in it, the one with the least error.

        Raises
        ------
        UsageError
            If there is no such objective, or no point meets the limits; the message says how
            close one gets.
        """
        scale, problem = self.problem.scale, self.problem
        parsed = [parse_constraint(text, scale, where="--best") for text in constraints]
        names = [objective.name for objective in problem.objectives]
        wanted = by or next(name for name in names if name != scale.name)
        wanted = scale.name if wanted == "error" else wanted
        if wanted not in names:
            raise UsageError(
                f"the study has no objective {wanted!r}",
                where="--by",
                fix=f"choose one of {', '.join(names)}",
            )
        if not self.points:
            raise nobody(self)

        def value(point: Point, name: str) -> float:
            return point.values[name] if name in point.values else point.gains.get(name, math.nan)

        def worst(point: Point) -> float:
            base = self.float_error
            return max((c.violation(value(point, c.name), base) for c in parsed), default=0.0)

        good = [point for point in self.points if worst(point) <= 1e-12]
        if not good:
            near = min(self.points, key=worst)
            units = {**{n: g.unit for n, g in GAINS.items()}, scale.name: scale.shown_unit}
            shown = ", ".join(
                f"{name} {quantity(value(near, name), units[name])}"
                for name in dict.fromkeys(c.name for c in parsed)
            )
            raise UsageError(
                f"no plan of the front meets {' and '.join(c.text for c in parsed)}",
                where=str(self.folder),
                fix=f"the closest is #{near.number}: {shown}",
            )
        chosen = next(o for o in problem.objectives if o.name == wanted)
        error = next((o for o in problem.objectives if o.name == scale.name), None)

        def rank(point: Point) -> tuple[float, float]:
            second = 0.0 if error is None else error.cost(point.values[error.name])
            return chosen.cost(point.values[wanted]), second

        return min(good, key=rank)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        layers = self.facts.layers
        return {
            "folder": str(self.folder),
            "target": self.facts.target,
            "objectives": [objective.to_dict() for objective in self.problem.objectives],
            "constraints": list(self.settings.constraints),
            "float_error": self.float_error,
            "float_test_error": self.float_test_error,
            "samples": self.facts.samples,
            "layers": list(layers),
            "front": [point.to_dict(layers) for point in self.points],
            "baselines": [point.to_dict(layers) for point in self.baselines],
            "evaluations": dict(self.evaluations),
            "hypervolume": self.hypervolume,
            "picked": None if self.picked is None else self.picked.number,
        }


def front(study: str | Path, *, best: Sequence[str] | None = None, by: str | None = None) -> Front:
    """Read the front of a study, also while a search is writing it.

    Parameters
    ----------
    study
        Its folder.
    best
        Limits like ``error<=+1pp``: picks the plan that is best in ``by`` among those that meet
        all of them.
    by
        The objective that is to be best; by default the first that is not the error.

    Raises
    ------
    StudyError
        If there is no study, or it is damaged or of another version.
    UsageError
        If no plan meets the limits.
    """
    with Study(study) as opened:
        settings, facts = settings_of(opened)
        problem = problem_of(opened)
        evaluations = _evaluations(opened, facts)
        tests = opened.tests()
        generations = tuple(opened.generations())
        float_test = opened.meta("float_test_error")
    counts: dict[str, int] = {}
    for entry in evaluations:
        counts[entry.result.status] = counts.get(entry.result.status, 0) + 1
    # Before the reference point is known there is nothing to compare.
    entries = problem.front(evaluations) if problem.reference else []
    kept = facts.space["kept"]
    baselines = [
        entry
        for entry in evaluations
        if entry.origin == "baseline"
        or len({p for n, p in zip(facts.layers, entry.plan, strict=True) if n not in kept}) == 1
    ]

    def point(entry: Evaluation) -> Point:
        return point_of(entry, problem, tests)

    found = Front(
        folder=Path(study),
        settings=settings,
        facts=facts,
        problem=problem,
        points=tuple(map(point, entries)),
        baselines=tuple(point(e) for e in baselines if e.result.status == "ok"),
        evaluations=counts,
        hypervolume=problem.hypervolume(evaluations) if problem.reference else 0.0,
        generations=generations,
        float_test_error=None if float_test is None else problem.scale.shown(float_test),
    )
    if best is None and by is None:
        return found
    return replace(found, picked=found.pick(best or (), by))


def point_of(entry: Evaluation, problem: Problem, tests: Mapping[str, tuple[float, int]]) -> Point:
    """An evaluation as people read it."""
    scale, result = problem.scale, entry.result
    names = [objective.name for objective in problem.objectives]
    values = problem.values(result.error, entry.gains)
    tested = tests.get(plan_text(entry.plan))
    return Point(
        number=entry.number,
        plan=entry.plan,
        status=result.status,
        values=dict(zip(names, values, strict=True)),
        gains=entry.gains,
        overall_error=None if result.overall is None else scale.shown(result.overall),
        test_error=None if tested is None else scale.shown(tested[0]),
        origin=entry.origin,
        message=result.message,
    )


def _evaluations(study: Study, facts: StudyFacts) -> list[Evaluation]:
    found = study.evaluations()
    for entry in found:
        if len(entry.plan) != len(facts.layers):
            raise StudyError(
                f"is damaged (plan {entry.number} has {len(entry.plan)} precisions for "
                f"{len(facts.layers)} layers)",
                where=str(study.folder),
                fix="restore it from a copy, or search again into another folder",
            )
    return found


def plan_of_study(reference: str) -> PrecisionPlan:
    """The plan that ``DIR#number`` names.

    Raises
    ------
    StudyError
        If there is no such study, or it has no such plan.
    """
    folder, _, text = reference.rpartition("#")
    with Study(folder) as study:
        settings, facts = settings_of(study)
        evaluations = {entry.number: entry for entry in _evaluations(study, facts)}
    entry = evaluations.get(int(text)) if text.isdecimal() else None
    if entry is None:
        raise StudyError(
            f"has no plan number {text!r}",
            where=folder,
            fix=f"it has 1 to {max(evaluations)}; bitwright front {folder} lists the best"
            if evaluations
            else "it has none yet",
        )
    return PrecisionPlan(
        layers=dict(zip(facts.layers, entry.plan, strict=True)),
        structure_hash=facts.structure_hash,
        weights_hash=facts.weights_hash,
        target=facts.target,
        elementwise_bits=settings.quantization.elementwise_bits,
        loop_bits=settings.quantization.loop_bits,
    )


def quantization_of_study(reference: str) -> tuple[str, str, dict[str, Any]]:
    """Target, calibration file and options of quantization with which a study evaluated plans.

    Raises
    ------
    StudyError
        If there is no such study, or its calibration data are not what they were.
    """
    with Study(reference.rpartition("#")[0]) as study:
        settings, _ = settings_of(study)
    refuse_change("calibration data", settings.calibration)
    options = settings.quantization
    return (
        settings.target,
        settings.calibration.path,
        {
            "recipe": options.recipe,
            "clip": options.clip,
            "percentile": options.percentile,
            "per_channel": options.per_channel,
            "asymmetric": options.asymmetric,
            "rotation": options.rotation,
            "batch_size": options.batch_size,
        },
    )


def nobody(found: Front) -> StudyError:
    """The error that tells how close plans get that do not meet all constraints."""
    problem = found.problem
    with Study(found.folder) as study:
        evaluations = study.evaluations()
    tried = [e for e in evaluations if e.result.status != "failed"]
    if not tried:
        reasons = {e.result.message for e in evaluations if e.result.message}
        return StudyError(
            f"all {len(evaluations)} evaluations failed",
            where=str(found.folder),
            fix=f"one says: {min(reasons)}" if reasons else None,
        )
    near = min(tried, key=lambda e: (sum(problem.violations(e.result, e.gains)), e.number))
    found_error = near.result.error
    error = "not run" if found_error is None else shown_error(problem.scale, found_error)
    limits = [
        f"{c.name} {quantity(near.gains.get(c.name, math.nan), GAINS[c.name].unit)}"
        for c in problem.constraints
        if c.name != problem.scale.name
    ]
    return StudyError(
        f"no plan meets {' and '.join(found.settings.constraints) or 'the constraints'}",
        where=str(found.folder),
        fix=f"the closest of {len(tried)} is #{near.number}: "
        + ", ".join([f"{problem.scale.name} {error}", *limits]),
    )


def shown_error(scale: ErrorScale, error: float) -> str:
    """An error as people read it, with its unit."""
    return quantity(scale.shown(error), scale.shown_unit)


def refuse_change(what: str, file: DataFile) -> None:
    """Refuse a file of a study that is not what it was."""
    path = Path(file.path)
    if not path.is_file():
        raise StudyError(
            f"the {what} of the study is not there any more",
            where=file.path,
            fix="put it back where it was",
        )
    if digest(path) != file.sha256:
        raise StudyError(
            f"the {what} of the study has changed since the search began",
            where=file.path,
            fix="bring it back as it was, or search again into another folder",
        )


def digest(path: Path) -> str:
    """SHA-256 of a file of data."""
    if not path.is_file():  # a device may have no end
        what = "is not a regular file" if path.exists() else "there is no such file"
        raise DataError(what, where=str(path))
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from error
