"""What a search was asked for, as its study keeps it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from bitwright.errors import StudyError
from bitwright.search.objectives import Constraint, ErrorScale, Objective
from bitwright.search.problem import Problem
from bitwright.search.results import QuantizationOptions
from bitwright.search.study import Study

__all__ = [
    "DataFile",
    "SearchSettings",
    "Stops",
    "StudyFacts",
    "make_problem",
    "problem_of",
    "settings_of",
    "stops_of",
]


_RESTORE: Final = "restore it from a copy, or search again into another folder"


@dataclass(frozen=True, slots=True)
class Stops:
    """When a search ends; None never.

    Attributes
    ----------
    generations
        Generations, the initial population counted.
    evaluations
        Different plans, those of an interrupted search counted.
    time_budget
        Seconds from now.
    patience
        Generations without a larger hypervolume.
    """

    generations: int | None = None
    evaluations: int | None = None
    time_budget: float | None = None
    patience: int | None = None


_REFERENCE: Final = TypeAdapter(tuple[tuple[float, float], ...])
_STOPS: Final = TypeAdapter(Stops)


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataFile(_Data):
    """A file that a search reads, and what it held."""

    path: str
    sha256: str


class SearchSettings(_Data):
    """All that decides which plans a search looks at, and what it finds about them.

    The attributes are the parameters of :func:`bitwright.search_precisions`.
    """

    model: DataFile
    target: str
    calibration: DataFile
    validation: DataFile
    test: DataFile | None
    objectives: tuple[str, ...] = ("error", "memory")
    constraints: tuple[str, ...] = ()
    metric: str
    precisions: tuple[str, ...]
    keep: dict[str, str]
    exclude: tuple[str, ...] = ()
    tie: tuple[str, ...] = ()
    start: Literal["guided", "plain"] = "guided"
    algorithm: Literal["nsga2", "exhaustive", "random"] = "nsga2"
    population: int = 40
    offspring: int = 10
    seed: int = 1
    subsets: int = 1
    samples: int | None = None
    vector_values: int = 0
    input_shapes: dict[str, list[int | None]]
    weight_memory_bytes: int | None = None
    quantization: QuantizationOptions
    reuse_bytes: int = 256 << 20


class StudyFacts(_Data):
    """What a study found out before its first evaluation.

    Attributes
    ----------
    target
        Name of the accelerator.
    structure_hash, weights_hash
        Of the model.
    layers
        Names of the layers, in the order of a plan.
    layer_macs, layer_weights
        Multiply-accumulates and weights of each.
    metric_unit, higher_is_better
        Of the metric.
    float_error
        Of the float model, less is better.
    samples
        Validation samples.
    objectives
        Names.
    noise
        Layer name to precision to the noise that it adds to the layer's own output, relative to
        its power; empty without a measurement (``clip=minmax``).
    space
        The genes, as :meth:`~bitwright.search.space.Space.to_dict` gives them.
    versions
        Of the libraries that results depend on.
    notes
        What is different from what was asked for.
    """

    target: str
    structure_hash: str
    weights_hash: str
    layers: tuple[str, ...]
    layer_macs: tuple[int | None, ...]
    layer_weights: tuple[int, ...]
    metric_unit: str
    higher_is_better: bool
    float_error: float
    samples: int
    noise: dict[str, dict[str, float]]
    space: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]


def settings_of(study: Study) -> tuple[SearchSettings, StudyFacts]:
    """Read what a study is about.

    Raises
    ------
    StudyError
        If it is damaged.
    """
    try:
        settings = SearchSettings.model_validate(study.meta("settings"))
        facts = StudyFacts.model_validate(study.meta("facts"))
    except ValidationError as error:
        raise _damaged(study, error) from error
    return settings, facts


def _damaged(study: Study, error: ValidationError) -> StudyError:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "settings"
    return StudyError(
        f"is damaged ({place}: {first['msg']})", where=str(study.folder), fix=_RESTORE
    )


def stops_of(study: Study) -> Stops:
    """When the search of a study ends.

    Raises
    ------
    StudyError
        If it is damaged.
    """
    try:
        return _STOPS.validate_python(study.meta("stops") or {})
    except ValidationError as error:
        raise _damaged(study, error) from error


def problem_of(study: Study) -> Problem:
    """Objectives and constraints of a study, with which its evaluations can be judged."""
    settings, facts = settings_of(study)
    scale = ErrorScale(settings.metric, facts.metric_unit, facts.higher_is_better)
    reference = study.meta("reference")
    problem = make_problem(settings, scale, facts.float_error)
    if reference is None:
        return problem
    try:
        ends = _REFERENCE.validate_python(reference)
    except ValidationError as error:
        raise _damaged(study, error) from error
    if len(ends) != len(problem.objectives):
        raise StudyError(
            f"is damaged (reference: {len(ends)} values for {len(problem.objectives)} objectives)",
            where=str(study.folder),
            fix=_RESTORE,
        )
    return replace(problem, reference=ends)


def make_problem(settings: SearchSettings, scale: ErrorScale, float_error: float) -> Problem:
    """Objectives and constraints that settings ask for."""
    from bitwright.search.objectives import parse_constraint, parse_objectives

    objectives: tuple[Objective, ...] = parse_objectives(settings.objectives, scale)
    constraints: list[Constraint] = [parse_constraint(text, scale) for text in settings.constraints]
    capacity = settings.weight_memory_bytes
    if capacity is not None:  # what does not fit cannot be compiled
        text = f"the weight memory of the target, {capacity:,} bytes"
        constraints.append(Constraint("memory", "<=", capacity, text=text))
    return Problem(scale, objectives, tuple(constraints), float_error)
