"""``bitwright search`` and ``sensitivity``: precisions found, not chosen by hand."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from bitwright import targets
from bitwright.costing import sized_layers
from bitwright.errors import (
    Interrupted,
    ModelError,
    PlanError,
    StudyError,
    UsageError,
)
from bitwright.files import check_writable, write_atomically
from bitwright.fronts import Front, digest, front, nobody, refuse_change, shown_error
from bitwright.inspection import shape_option
from bitwright.quant.load import Model, load
from bitwright.quant.metrics import get_metric
from bitwright.quant.observers import ClipMethod
from bitwright.quant.recipes import RecipeName
from bitwright.quant.samples import Samples
from bitwright.search.algorithm import Algorithm, Exhaustive, Nsga2, RandomSearch
from bitwright.search.engine import (
    Engine,
    SearchProgress,
    guided_start,
    narrowest_and_widest,
)
from bitwright.search.evaluator import (
    EvaluationJob,
    PostTraining,
    check_labels,
    job_for,
    job_on,
)
from bitwright.search.objectives import GAINS, Costs, ErrorScale
from bitwright.search.problem import Problem, references
from bitwright.search.results import QuantizationOptions, Result
from bitwright.search.settings import (
    DataFile,
    SearchSettings,
    Stops,
    StudyFacts,
    make_problem,
    settings_of,
    stops_of,
)
from bitwright.search.space import Plan, Space, make_space
from bitwright.search.study import (
    Evaluation,
    Study,
    check_new,
    discard_empty,
    plan_text,
)
from bitwright.search.workers import open_pool
from bitwright.targets import Accelerator
from bitwright.targets.cost_table import cache_file, cost_table
from bitwright.vocabulary import FLOAT_BITS, Precision

__all__ = ["Search", "Sensitivity", "search_precisions", "sensitivity"]

Algorithms: TypeAlias = Literal["auto", "nsga2", "exhaustive", "random"]

logger = logging.getLogger(__name__)

_VERSIONS: Final = ("bitwright", "numpy", "onnx", "onnxruntime", "pymoo")
_GENERATIONS: Final = 60
_REUSE_BYTES: Final = 256 << 20
_NOTHING: Final = Result("skipped", None)


# -- results -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Search:
    """What a search did, or (dry run) would do.

    Attributes
    ----------
    space
        What it chooses from.
    algorithm
        ``nsga2``, ``exhaustive`` or ``random``.
    evaluations
        How many plans the study holds; for a dry run how many it evaluates at most.
    new_evaluations
        How many of them are of this run.
    seconds_per_evaluation
        Measured on the widest plan, with one worker; no other takes longer.
    seconds
        What the search took; for a dry run what it takes if no evaluation stops early.
    front
        What was found; None for a dry run.
    ended
        Why it ended.
    notes
        What is different from what was asked for.
    """

    space: Space
    algorithm: str
    evaluations: int
    new_evaluations: int
    seconds_per_evaluation: float
    seconds: float
    float_error: float
    scale: ErrorScale
    front: Front | None
    ended: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "space": self.space.to_dict(),
            "algorithm": self.algorithm,
            "evaluations": self.evaluations,
            "new_evaluations": self.new_evaluations,
            "seconds_per_evaluation": self.seconds_per_evaluation,
            "seconds": self.seconds,
            "float_error": self.scale.shown(self.float_error),
            "ended": self.ended,
            "notes": list(self.notes),
            "front": None if self.front is None else self.front.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Errors of plans in which one layer alone has fewer bits.

    Attributes
    ----------
    layers
        Names.
    base
        The precision of all other layers, as they have it in the widest plan.
    base_error, float_error
        Of the widest plan, and of the float model, as shown.
    errors
        Layer and precision to error, as shown; None where the metric gave no number.
    scale
        How errors are shown.
    """

    layers: tuple[str, ...]
    base: Plan
    base_error: float | None
    float_error: float
    errors: Mapping[str, Mapping[Precision, float | None]]
    scale: ErrorScale
    target: str
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "target": self.target,
            "metric": self.scale.metric,
            "unit": self.scale.shown_unit,
            "samples": self.samples,
            "float_error": self.float_error,
            "base": {n: str(p) for n, p in zip(self.layers, self.base, strict=True)},
            "base_error": self.base_error,
            "errors": {
                name: {str(precision): value for precision, value in row.items()}
                for name, row in self.errors.items()
            },
        }


# -- preparing ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A model, its data and a target, ready for evaluations."""

    accelerator: Accelerator
    space: Space
    costs: Costs
    problem: Problem
    job: EvaluationJob
    facts: StudyFacts


def _prepare(
    settings: SearchSettings, loaded: Model, progress: Callable[[int, int], None] | None = None
) -> _Prepared:
    if loaded.is_quantized:
        raise ModelError(
            "is quantized already",
            where=loaded.source,
            fix="search for the float model it was made from",
        )
    accelerator = targets.get(settings.target)
    layers, _, _ = sized_layers(loaded, settings.input_shapes or None)
    if not layers:
        raise ModelError(
            "has no layers to quantize: no Conv, Gemm or MatMul with constant weights",
            where=loaded.source,
            fix="bitwright inspect says why each operator is none",
        )
    if unsized := [layer.name for layer in layers if layer.macs is None]:
        raise UsageError(
            f"the sizes of layer {unsized[0]!r} are not fixed, so it has no cost",
            where=loaded.source,
            fix=f"fix them: {shape_option(loaded.inputs)}",
        )
    names = [layer.name for layer in layers]
    space = make_space(
        names,
        accelerator,
        precisions=settings.precisions,
        keep=settings.keep,
        exclude=settings.exclude,
        tie=settings.tie,
    )
    accelerator.check_kinds(layers, dict.fromkeys(names, accelerator.allowed_precisions[0]))
    measure = get_metric(settings.metric)
    scale = ErrorScale(settings.metric, measure.unit, measure.higher_is_better)
    asked = make_problem(settings, scale, 0.0)  # refuses what it does not understand
    asked_for = {p for name in names for p in space.precisions(name)}
    formats = [p for p in accelerator.soft_edge_precisions if p in asked_for]
    every = (*accelerator.allowed_precisions, *formats)
    table = cost_table(accelerator, layers, precisions=every, cache=cache_file())
    costs = Costs(accelerator, layers, table, vector_values=settings.vector_values)
    _check_gains(asked, space, costs)

    def limit(float_error: float) -> float | None:
        return make_problem(settings, scale, float_error).error_limit

    shaped = loaded.with_input_shapes(settings.input_shapes) if settings.input_shapes else loaded
    calibration = Samples(settings.calibration.path, shaped.inputs)
    validation = Samples(settings.validation.path, shaped.inputs)
    if settings.test is not None:
        check_labels(settings.metric, Samples(settings.test.path, shaped.inputs))
    structure, weights = loaded.structure_hash, loaded.weights_hash
    precisions = {name: space.precisions(name) for name in names}
    job, float_error = job_for(
        shaped,
        calibration,
        validation,
        precisions=precisions,
        metric=settings.metric,
        options=settings.quantization,
        subsets=settings.subsets,
        samples=settings.samples,
        limit=limit,
        work={layer.name: float(layer.macs or 0) for layer in layers},
        reuse_bytes=settings.reuse_bytes,
        progress=progress,
    )
    refinement = job.model.refinement
    noise = {
        name: {str(p): refinement.noise(name, p) for p in options}
        for name, options in precisions.items()
        if refinement is not None
    }
    facts = StudyFacts(
        target=accelerator.name,
        structure_hash=structure,
        weights_hash=weights,
        layers=tuple(names),
        layer_macs=tuple(layer.macs for layer in layers),
        layer_weights=tuple(layer.weight_count for layer in layers),
        metric_unit=scale.unit,
        higher_is_better=scale.higher_is_better,
        float_error=float_error,
        samples=job.samples,
        noise=noise,
        space=space.to_dict(),
        versions={name: version(name) for name in _VERSIONS},
        notes=job.model.notes,
    )
    problem = make_problem(settings, scale, float_error)
    return _Prepared(accelerator, space, costs, problem, job, facts)


def _check_gains(problem: Problem, space: Space, costs: Costs) -> None:
    """Refuse objectives that the target does not define, and limits that no plan can meet."""
    available = costs.available()
    wanted = [o.name for o in problem.objectives] + [c.name for c in problem.constraints]
    for name in wanted:
        if name != problem.scale.name and name not in available:
            raise UsageError(
                f"the cost model of {costs.table.target} does not define {name}",
                where="--objectives"
                if name in wanted[: len(problem.objectives)]
                else "--constraint",
                fix=f"it defines {', '.join(available)}",
            )
    choices = {name: space.precisions(name) for name in space.layers}
    for constraint in problem.constraints:
        if constraint.name == problem.scale.name:
            continue
        low, high = costs.bounds(constraint.name, choices)
        best = low if constraint.sense == "<=" else high
        if constraint.violation(best) > 0:
            raise UsageError(
                f"no plan of the space meets {constraint.text}",
                where="--constraint",
                fix=f"the best {constraint.name} there is, is {best:,.6g} "
                + GAINS[constraint.name].unit,
            )


def _settings(
    model: str | Path | None,
    target: str | Path | None,
    calibration: str | Path | None,
    validation: str | Path | None,
    *,
    metric: str,
    quantization: QuantizationOptions,
    precisions: str | Sequence[str | Precision] | None = None,
    keep: Mapping[str, str | Precision] | None = None,
    test: str | Path | None = None,
    input_shapes: Mapping[str, Sequence[int | None]] | None = None,
    **rest: Any,
) -> tuple[Model, SearchSettings]:
    """Model and settings from the options of a command; what is missing is refused."""
    _check_given(model, target, calibration, validation)
    assert model is not None
    assert target is not None
    assert calibration is not None
    assert validation is not None
    allowed = precisions.split(",") if isinstance(precisions, str) else precisions
    loaded = load(model)
    accelerator = targets.get(target)
    memory = accelerator.weight_memory_bytes
    return loaded, SearchSettings(
        model=DataFile(path=str(Path(model).absolute()), sha256=digest(Path(model))),
        target=str(Path(target).absolute()) if targets.is_file(target) else str(target),
        calibration=_data_file(calibration),
        validation=_data_file(validation),
        test=None if test is None else _data_file(test),
        metric=metric,
        precisions=tuple(_precision(entry, "--precisions") for entry in allowed or ()),
        keep={name: _precision(entry, "--keep") for name, entry in (keep or {}).items()},
        input_shapes={name: list(shape) for name, shape in (input_shapes or {}).items()},
        weight_memory_bytes=None if memory is None else memory.value,
        quantization=quantization,
        **rest,
    )


def _texts(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _precision(value: str | Precision, where: str) -> str:
    try:
        return str(Precision.of(value))
    except PlanError as error:
        raise PlanError(error.what, where=where, fix=error.fix) from None


def _check_given(model: Any, target: Any, calibration: Any, validation: Any) -> None:
    needed = {
        "model": model,
        "target": target,
        "calibration data": calibration,
        "validation data": validation,
    }
    if missing := [name for name, value in needed.items() if value is None]:
        raise UsageError(
            f"there is no {missing[0]}",
            fix="needed are a model, a target (--target), calibration data (--calibration) and "
            "validation data (--validation); or a study",
        )


def _refuse_other_options(
    function: Callable[..., object], asked: Mapping[str, Any], free: Container[str], folder: Path
) -> None:
    """Refuse options that a study has settled."""
    for name, parameter in signature(function).parameters.items():
        value = asked[name]
        if name not in free and value != parameter.default and (value or parameter.default):
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise UsageError(
                f"a study is gone on with as it was, and there is {option}",
                where=str(folder),
                fix="leave it out; limits of the search and workers can change",
            )


def _data_file(data: str | Path) -> DataFile:
    path = Path(data)
    return DataFile(path=str(path.absolute()), sha256=digest(path))


# -- search ------------------------------------------------------------------------------------


def search_precisions(
    model: str | Path | None = None,
    target: str | Path | None = None,
    *,
    calibration: str | Path | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    objectives: str | Sequence[str] = "error,speedup",
    constraints: str | Sequence[str] | None = None,
    metric: str = "top1",
    precisions: str | Sequence[str | Precision] | None = None,
    keep: Mapping[str, str | Precision] | None = None,
    exclude: str | Sequence[str] | None = None,
    tie: str | Sequence[str] | None = None,
    start: Literal["guided", "plain"] = "guided",
    algorithm: Algorithms = "auto",
    population: int = 40,
    offspring: int = 10,
    generations: int | None = None,
    evaluations: int | None = None,
    time_budget: float | None = None,
    patience: int | None = None,
    seed: int = 1,
    subsets: int = 1,
    samples: int | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    vector_values: int = 0,
    input_shapes: Mapping[str, Sequence[int | None]] | None = None,
    recipe: RecipeName = "default",
    clip: ClipMethod | None = None,
    percentile: float | None = None,
    per_channel: bool | None = None,
    asymmetric: bool = False,
    rotation: bool = True,
    elementwise_bits: int = 16,
    loop_bits: int = FLOAT_BITS,
    batch_size: int | None = None,
    reuse_mib: int = _REUSE_BYTES >> 20,
    dry_run: bool = False,
    progress: Callable[[SearchProgress], None] | None = None,
) -> Search:
    """Search for the precision of every layer: the front between error and what hardware gains.

    Every evaluation is on disk when it is finished. A search that was interrupted goes on with
    ``resume``; the front is the same as without the interruption.

    Parameters
    ----------
    model
        A float ONNX file.
    target
        An accelerator: its name, or the path of its description.
    calibration, validation, test
        Data to choose scales with, to measure errors on while searching, and (optional) to
        measure the plans of the front on at the end: .npz files, to which a study can come back.
    output
        The folder of the new study.
    resume
        The folder of a study to go on with, instead of all the above; everything but the limits
        of the search (``generations`` to ``patience``), ``workers`` and ``scheduler`` is as it was.
    objectives
        Two or more of ``error`` and the gains of :data:`bitwright.search.objectives.GAINS`.
    constraints
        Limits, ``memory<=2MiB``, ``error<=5%``, ``error<=+2pp`` (more than the float model).
    metric
        What the error is: a name, ``package.module:Class`` or ``package.module:function``.
    precisions
        What layers may have, of what the target allows; by default all.
    keep, exclude, tie
        Layers (or patterns) with a fixed precision, left alone at the widest, and tied together;
        see :func:`bitwright.search.space.make_space`.
    start
        ``guided``: the initial population holds the uniform plans and plans that lower bits where
        that adds least noise; ``plain``: chance alone, as in MOHAQ.
    algorithm
        ``nsga2``, ``exhaustive``, ``random``, or ``auto``: everything if the space is no larger
        than the evaluations of the search, NSGA-II otherwise.
    population, offspring, generations
        MOHAQ's 40, 10 and (the first population counted, by default) 60 make 630 evaluations.
    evaluations, time_budget, patience
        Further limits: different plans, seconds, generations without progress. With ``resume``,
        limits that are not given are those of the study.
    seed
        Of all randomness: the same seed gives the same front, with any number of workers.
    subsets
        Parts of the validation data, 4 in MOHAQ: plans that fail on the first are not run on the
        others, and the largest error counts.
    samples
        How many validation samples to use; by default all.
    workers, scheduler
        Local processes, or the address of a Dask scheduler. With more than one worker a script
        needs Python's ``if __name__ == "__main__":``.
    vector_values
        Values beside the weights that count as memory, at 16 bits each.
    input_shapes
        Fixes symbolic sizes of the inputs.
    recipe, clip, percentile, per_channel, asymmetric, rotation
        Options of quantization, as in :func:`bitwright.quantize`.
    elementwise_bits, loop_bits, batch_size
        Options of quantization, as in :func:`bitwright.quantize`.
    reuse_mib
        Memory in which intermediate values are kept for plans that begin alike, in MiB a worker.
    dry_run
        Prepare and time one evaluation, write nothing.
    progress
        Called after each evaluation.

    Raises
    ------
    ModelError, PlanError, DataError, UsageError, OutputError, StudyError
        If the model, the data, an option or the study has to change.
    RunError
        If the float model or a cost model fails.
    Interrupted
        By Ctrl-C; nothing finished is lost.
    """
    asked = locals()

    def preparing(done: int, total: int) -> None:
        if progress is not None:
            progress(SearchProgress("calibrating", done, total))

    stops = Stops(generations, evaluations, time_budget, patience)
    _check_numbers(
        {"generations": generations, "evaluations": evaluations, "patience": patience,
         "population": population, "offspring": offspring, "subsets": subsets,
         "samples": samples, "workers": workers}
    )  # fmt: skip
    if time_budget is not None and not time_budget > 0:
        raise UsageError(f"a time budget of {time_budget} s is not possible")
    if not 0 <= seed < 2**32:
        raise UsageError(f"{seed} is no seed", where="--seed", fix="use 0 to 4294967295")
    for name, number in (("vector-values", vector_values), ("reuse-mib", reuse_mib)):
        if number < 0:
            raise UsageError(f"{number} is less than nothing", where=f"--{name}")
    if resume is not None:
        free = {"resume", "generations", "evaluations", "time_budget", "patience"}
        free |= {"workers", "scheduler", "reuse_mib", "progress"}
        _refuse_other_options(search_precisions, asked, free, Path(resume))
        with Study(resume, write=True) as study:
            settings, facts = settings_of(study)
            if reuse_mib != _REUSE_BYTES >> 20:  # decides about nothing but memory
                settings = settings.model_copy(update={"reuse_bytes": reuse_mib << 20})
            _refuse_changes(settings)
            prepared = _prepare(settings, load(settings.model.path), preparing)
            _refuse_other_study(prepared, facts, study)
            stops = _stops_of(study, stops)
            with _resumable(study.folder):
                return _run(study, settings, prepared, stops, workers, scheduler, progress)
    if generations is None:
        stops = replace(stops, generations=_GENERATIONS)
    _check_given(model, target, calibration, validation)
    folder = None if output is None else Path(output)
    if folder is None and not dry_run:
        raise UsageError(
            "a search needs a folder for its study", fix="name one that is not there: --output DIR"
        )
    if folder is not None and not dry_run:
        check_new(folder)
    if algorithm not in ("auto", "nsga2", "exhaustive", "random"):
        raise UsageError(
            f"{algorithm!r} is no algorithm", fix="choose auto, nsga2, exhaustive or random"
        )
    if start not in ("guided", "plain"):
        raise UsageError(f"{start!r} is no start", fix="choose guided or plain")
    loaded, settings = _settings(
        model,
        target,
        calibration,
        validation,
        test=test,
        objectives=_texts(objectives),
        constraints=_texts(constraints),
        metric=metric,
        precisions=precisions,
        keep=keep,
        exclude=_texts(exclude),
        tie=_texts(tie),
        start=start,
        algorithm="nsga2" if algorithm == "auto" else algorithm,
        population=population,
        offspring=offspring,
        seed=seed,
        subsets=subsets,
        samples=samples,
        vector_values=vector_values,
        input_shapes=input_shapes,
        quantization=QuantizationOptions(
            clip,
            percentile,
            per_channel,
            asymmetric,
            elementwise_bits,
            loop_bits,
            batch_size,
            recipe,
            rotation,
        ),
        reuse_bytes=reuse_mib << 20,
    )
    prepared = _prepare(settings, loaded, preparing)
    if algorithm == "auto" and prepared.space.size <= _nsga2_evaluations(settings, stops):
        settings = settings.model_copy(update={"algorithm": "exhaustive"})
    if dry_run:
        return _rehearse(settings, prepared, stops, workers)
    assert folder is not None
    meta = {
        "settings": settings.model_dump(mode="json"),
        "facts": prepared.facts.model_dump(),
        "layer_costs": _layer_costs(prepared),
        "stops": asdict(stops),
    }
    with _resumable(folder):
        try:
            with Study.create(folder, meta) as study:
                return _run(study, settings, prepared, stops, workers, scheduler, progress)
        except UsageError:  # before the search began; the next try may have the folder
            discard_empty(folder)
            raise


def _stops_of(study: Study, given: Stops) -> Stops:
    """When a study that goes on ends: as it was begun, where nothing else is given."""
    changed = {name: value for name, value in asdict(given).items() if value is not None}
    stops = replace(stops_of(study), **changed)
    study.set_meta("stops", asdict(stops))
    return stops


def _check_numbers(numbers: Mapping[str, int | None]) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            option = name.replace("_", "-")
            raise UsageError(f"{value} {name} are not possible", where=f"--{option}")


def _nsga2_evaluations(settings: SearchSettings, stops: Stops) -> int:
    generations = stops.generations or 1
    total = settings.population + (generations - 1) * settings.offspring
    return total if stops.evaluations is None else min(total, stops.evaluations)


def _most_evaluations(settings: SearchSettings, stops: Stops, space: Space) -> int:
    """How many different plans a search looks at, at most."""
    if settings.algorithm == "exhaustive":
        limit = space.size if stops.evaluations is None else stops.evaluations
        return min(space.size, limit)
    return min(space.size, _nsga2_evaluations(settings, stops))


def _rehearse(settings: SearchSettings, prepared: _Prepared, stops: Stops, workers: int) -> Search:
    evaluator = PostTraining(prepared.job)
    _, wide = narrowest_and_widest(prepared.space)
    seconds = []
    for _ in range(2):  # the first run also makes weights and allocates memory
        start = time.perf_counter()
        evaluator.evaluate(wide, limit=math.inf)
        evaluator.forget()
        seconds.append(time.perf_counter() - start)
    count = _most_evaluations(settings, stops, prepared.space)
    return Search(
        space=prepared.space,
        algorithm=settings.algorithm,
        evaluations=count,
        new_evaluations=0,
        seconds_per_evaluation=seconds[-1],
        seconds=count * seconds[-1] / workers,
        float_error=prepared.problem.float_error,
        scale=prepared.problem.scale,
        front=None,
        ended="dry run",
        notes=prepared.facts.notes,
    )


def _refuse_changes(settings: SearchSettings) -> None:
    """Refuse to go on with other files than the study was begun with."""
    for what, file in (
        ("model", settings.model),
        ("calibration data", settings.calibration),
        ("validation data", settings.validation),
        ("test data", settings.test),
    ):
        if file is not None:
            refuse_change(what, file)


def _refuse_other_study(prepared: _Prepared, facts: StudyFacts, study: Study) -> None:
    now = prepared.facts
    if now.versions != facts.versions:
        changed = [
            f"{name} {facts.versions.get(name)}, now {number}"
            for name, number in now.versions.items()
            if number != facts.versions.get(name)
        ]
        logger.warning("the study was begun with %s: it may go on otherwise", "; ".join(changed))
    same = (now.layers, now.space, now.target) == (facts.layers, facts.space, facts.target)
    if not same or _layer_costs(prepared) != study.meta("layer_costs"):
        raise StudyError(
            "was begun for other layers, another space, or a target with other costs",
            where=str(study.folder),
            fix="search again into another folder",
        )
    if not math.isclose(now.float_error, facts.float_error, rel_tol=1e-6, abs_tol=1e-9):
        raise StudyError(
            f"was begun with a float model of error {facts.float_error:.6g}; it is "
            f"{now.float_error:.6g} now",
            where=str(study.folder),
            fix="use the onnxruntime it was begun with "
            f"({facts.versions.get('onnxruntime')}), or search again into another folder",
        )


def _run(
    study: Study,
    settings: SearchSettings,
    prepared: _Prepared,
    stops: Stops,
    workers: int,
    scheduler: str | None,
    progress: Callable[[SearchProgress], None] | None,
) -> Search:
    space, costs = prepared.space, prepared.costs
    if settings.algorithm == "exhaustive":
        stops = replace(stops, generations=None)  # all means all
    study.set_meta("ended", None)
    before = len(study.evaluations())
    count = _most_evaluations(settings, stops, space)
    began = time.monotonic()
    with open_pool(prepared.job, workers=workers, scheduler=scheduler) as pool:
        engine = Engine(study, space, costs, prepared.problem, pool, stops, count, progress)
        narrow, wide = narrowest_and_widest(space)
        ends = engine.baselines([narrow, wide])
        errors = [entry.result.error for entry in ends]
        _refuse_hopeless(prepared, ends[1], study.folder)
        reference = references(
            prepared.problem,
            space,
            costs,
            narrowest_error=errors[0],
            widest_error=errors[1],
        )
        if study.meta("reference") is None:
            study.set_meta("reference", reference)
        engine.problem = problem = replace(prepared.problem, reference=reference)
        ended = engine.run(_algorithm(settings, prepared, problem))
        study.set_meta("ended", ended)
    del engine, pool  # their memory is needed no more
    _test(study, settings, prepared, problem, workers, scheduler, progress)
    found = front(study.folder)
    evaluated = study.evaluations()
    seconds = [e.result.seconds for e in evaluated if e.result.status == "ok"]
    if not found.points:
        raise nobody(found)
    return Search(
        space=space,
        algorithm=settings.algorithm,
        evaluations=len(evaluated),
        new_evaluations=len(evaluated) - before,
        seconds_per_evaluation=sum(seconds) / max(len(seconds), 1),
        seconds=time.monotonic() - began,
        float_error=prepared.problem.float_error,
        scale=prepared.problem.scale,
        front=found,
        ended=ended,
        notes=prepared.facts.notes,
    )


@contextmanager
def _resumable(folder: Path) -> Any:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; everything finished is in the study",
            where=str(folder),
            fix=f"go on with bitwright search --resume {folder}",
        ) from None


def _algorithm(settings: SearchSettings, prepared: _Prepared, problem: Problem) -> Algorithm:
    space = prepared.space
    if settings.algorithm == "exhaustive":
        return Exhaustive(space, population=settings.population)
    if settings.algorithm == "random":
        return RandomSearch(
            space,
            population=settings.population,
            offspring=settings.offspring,
            seed=settings.seed,
        )
    start = []
    if settings.start == "guided":
        uniform = [space.genome(plan) for plan in space.uniform()][: settings.population // 2]
        start = [genome for genome in uniform if genome is not None]
        noise = {
            name: {Precision.parse(text): value for text, value in row.items()}
            for name, row in prepared.facts.noise.items()
        }
        if noise:
            # Three quarters of the population at most: the rest stays chance.
            room = max(settings.population * 3 // 4 - len(start), 2)
            start += guided_start(space, prepared.costs, problem, noise, room)
    return Nsga2(
        space,
        objectives=len(problem.objectives),
        constraints=len(problem.violations(_NOTHING, {})),
        population=settings.population,
        offspring=settings.offspring,
        seed=settings.seed,
        start=start,
    )


def _refuse_hopeless(prepared: _Prepared, wide: Evaluation, folder: Path) -> None:
    """Say early that no plan will meet the limit on the error."""
    limit, error = prepared.problem.error_limit, wide.result.error
    scale = prepared.problem.scale
    if wide.result.status == "failed":
        return
    if limit is not None and error is not None and error > limit:
        texts = [c.text for c in prepared.problem.constraints if c.name == scale.name]
        raise UsageError(
            f"even the plan with most bits does not meet {' and '.join(texts)}: its {scale.name} "
            f"is {shown_error(scale, error)}, the float model's "
            f"{shown_error(scale, prepared.problem.float_error)}",
            where=str(folder),
            fix="allow more error, or more bits",
        )


def _test(
    study: Study,
    settings: SearchSettings,
    prepared: _Prepared,
    problem: Problem,
    workers: int,
    scheduler: str | None,
    progress: Callable[[SearchProgress], None] | None,
) -> None:
    """Measure the plans of the front, and the float model, on the test data."""
    if settings.test is None:
        return
    known = study.tests()
    plans = [e.plan for e in problem.front(study.evaluations()) if plan_text(e.plan) not in known]
    if not plans:
        return
    shaped = load(settings.model.path)
    if settings.input_shapes:
        shaped = shaped.with_input_shapes(settings.input_shapes)
    data = Samples(settings.test.path, shaped.inputs)
    job, float_error = job_on(prepared.job, shaped, data)
    study.set_meta("float_test_error", float_error)
    with open_pool(job, workers=workers, scheduler=scheduler) as pool:
        numbered = dict(enumerate(plans))
        for done, (number, result) in enumerate(pool.evaluate(numbered), start=1):
            if result.error is not None:
                study.set_test(numbered[number], result.error, result.samples)
            if progress is not None:
                progress(SearchProgress("testing", done, len(plans)))


def _layer_costs(prepared: _Prepared) -> dict[str, dict[str, dict[str, float]]]:
    """Costs of layers at all precisions, so that a study can be read without its model."""
    table = prepared.costs.table
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, row in zip(table.layers, table.costs, strict=True):
        found[name] = {}
        for cost in row:
            values = {
                "cycles": cost.cycles,
                "stall_cycles": cost.stall_cycles,
                "relative_cycles": cost.relative_cycles,
                "energy_pj": cost.total_energy_pj,
                "weight_bits": cost.weight_bits,
                "dram_read_bits": cost.dram_read_bits,
                "dram_write_bits": cost.dram_write_bits,
            }
            found[name][str(cost.precision)] = {
                quantity: value for quantity, value in values.items() if value is not None
            }
    return found


# -- sensitivity -------------------------------------------------------------------------------


def sensitivity(
    model: str | Path | None = None,
    target: str | Path | None = None,
    *,
    calibration: str | Path | None = None,
    validation: str | Path | None = None,
    study: str | Path | None = None,
    metric: str = "top1",
    precisions: str | Sequence[str | Precision] | None = None,
    samples: int | None = None,
    vector_values: int = 0,
    input_shapes: Mapping[str, Sequence[int | None]] | None = None,
    recipe: RecipeName = "default",
    clip: ClipMethod | None = None,
    percentile: float | None = None,
    per_channel: bool | None = None,
    asymmetric: bool = False,
    rotation: bool = True,
    elementwise_bits: int = 16,
    loop_bits: int = FLOAT_BITS,
    batch_size: int | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    plot: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure the error of each layer's precisions, all other layers at the widest.

    Parameters
    ----------
    model, target, calibration, validation, metric, precisions, samples
        As in :func:`search_precisions`; or
    study
        the folder of a study, which says all that, and keeps what is found for its report.
    vector_values, input_shapes
        As in :func:`search_precisions`.
    recipe, clip, percentile, per_channel, asymmetric, rotation
        Options of quantization, as in :func:`bitwright.quantize`.
    elementwise_bits, loop_bits, batch_size
        Options of quantization, as in :func:`bitwright.quantize`.
    workers, scheduler
        As in :func:`search_precisions`.
    plot
        A file for the errors as a heat map: a page (``.html``) that needs no network.
    overwrite
        Whether ``plot`` may exist.
    progress
        Called with calibration samples done and in total, then with evaluations.

    Raises
    ------
    ModelError, PlanError, DataError, UsageError, OutputError, StudyError
        If the model, the data, an option or the study has to change.
    RunError
        If the float model or a cost model fails.
    """
    asked = locals()
    _check_numbers({"samples": samples, "workers": workers})
    if vector_values < 0:
        raise UsageError(f"{vector_values} is less than nothing", where="--vector-values")
    if plot is not None and Path(plot).suffix != ".html":
        raise UsageError("the heat map is a page", where=str(plot), fix="name it .html")
    picture = None if plot is None else check_writable(plot, overwrite=overwrite)
    if study is not None:
        free = {"study", "workers", "scheduler", "plot", "overwrite", "progress"}
        _refuse_other_options(sensitivity, asked, free, Path(study))
        with Study(study, write=True) as opened:
            settings, facts = settings_of(opened)
            _refuse_changes(settings)
            prepared = _prepare(settings, load(settings.model.path), progress)
            _refuse_other_study(prepared, facts, opened)
            with _resumable(opened.folder):
                found = _sensitivity(prepared, opened, workers, scheduler, progress)
    else:
        loaded, settings = _settings(
            model,
            target,
            calibration,
            validation,
            metric=metric,
            precisions=precisions,
            samples=samples,
            vector_values=vector_values,
            input_shapes=input_shapes,
            subsets=1,
            quantization=QuantizationOptions(
                clip,
                percentile,
                per_channel,
                asymmetric,
                elementwise_bits,
                loop_bits,
                batch_size,
                recipe,
                rotation,
            ),
        )
        prepared = _prepare(settings, loaded, progress)
        found = _sensitivity(prepared, None, workers, scheduler, progress)
    if picture is not None:
        from bitwright.plots import sensitivity_page

        write_atomically(picture, sensitivity_page(found, settings.model.path).encode())
    return found


def _sensitivity(
    prepared: _Prepared,
    study: Study | None,
    workers: int,
    scheduler: str | None,
    progress: Callable[[int, int], None] | None,
) -> Sensitivity:
    space, scale = prepared.space, prepared.problem.scale
    names = space.layers
    _, wide = narrowest_and_widest(space)
    errors: dict[str, dict[Precision, float | None]] = {} if study is None else study.sensitivity()
    plans: dict[int, Plan] = {}
    about: dict[int, list[tuple[str, Precision]]] = {}
    numbers: dict[Plan, int] = {}
    total = 0
    for index, name in enumerate(names):
        for precision in space.precisions(name):
            total += 1
            if precision in errors.get(name, {}):
                continue
            plan = (*wide[:index], precision, *wide[index + 1 :])
            number = numbers.setdefault(plan, len(numbers))
            plans[number] = plan
            about.setdefault(number, []).append((name, precision))
    done = total - sum(map(len, about.values()))
    job = replace(prepared.job, limit=None)
    with open_pool(job, workers=workers, scheduler=scheduler) as pool:
        for number, result in pool.evaluate(plans):
            for name, precision in about[number]:
                errors.setdefault(name, {})[precision] = result.error
                if study is not None:
                    study.set_sensitivity(name, precision, result)
                done += 1
            if progress is not None:
                progress(done, total)

    def shown(error: float | None) -> float | None:
        return None if error is None else scale.shown(error)

    return Sensitivity(
        layers=names,
        base=wide,
        base_error=shown(errors[names[0]][wide[0]]),
        float_error=scale.shown(prepared.problem.float_error),
        errors={
            name: {p: shown(errors[name][p]) for p in space.precisions(name)} for name in names
        },
        scale=scale,
        target=prepared.accelerator.name,
        samples=prepared.job.samples,
    )
