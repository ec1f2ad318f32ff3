"""Estimate the error of a plan by post-training quantization alone.

:class:`PostTraining` is what a search asks for errors; anything with the same ``evaluate`` can take
its place (an estimate that retrains, say). What it needs is an :class:`EvaluationJob`, made once
and sent to every worker.

As in MOHAQ (Rezk et al., arXiv 2108.01192), the validation data may be divided into subsets: a plan
whose error on the first exceeds the limit is not run on the others, and the error of a plan is the
largest over the subsets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import onnxruntime as ort

from bitwright.errors import DataError, ModelError, RunError, UsageError, first_line
from bitwright.quant.fake_quant import FakeQuant, FakeQuantModel, fake_quant_model
from bitwright.quant.float_ops import Array, wrong_optimizers
from bitwright.quant.load import Model
from bitwright.quant.metrics import Grouped, Metric, first_place, get_metric, metric_factory
from bitwright.quant.quantizer import calibrate_model
from bitwright.quant.samples import Batch, ProgressCallback, Samples
from bitwright.search.objectives import ErrorScale
from bitwright.search.results import QuantizationOptions, Result, Status
from bitwright.search.space import Plan
from bitwright.vocabulary import Precision, PrecisionPlan

__all__ = [
    "EvaluationJob",
    "Evaluator",
    "PostTraining",
    "check_labels",
    "job_for",
    "job_on",
]

_BATCH_BYTES = 2 << 20  # of the largest activation of a batch: what caches hold
_LARGEST_BATCH = 64
_BLOCK = (32, 256)  # runs and samples, at most, between two looks at the metric


class Evaluator(Protocol):
    """Estimates errors."""

    def evaluate(self, plan: Plan, *, limit: float | None = None) -> Result:
        """Estimate the error of a plan; stop where it exceeds the limit."""


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """All that evaluating plans needs; can be sent to another process.

    Attributes
    ----------
    layers
        Names of the layers, in the order of a plan.
    model
        The model whose layers can be given any precision.
    subsets
        For each subset its batches, after each of which the metric is asked.
    run_samples
        How many samples of a batch are run at once.
    expected
        For each batch the float model's outputs, where the metric compares with those.
    metric, scale
        What is measured, and how it becomes an error.
    limit
        The largest error that is acceptable; None for any.
    reuse_bytes
        As in :class:`~bitwright.quant.fake_quant.FakeQuant`.
    """

    layers: tuple[str, ...]
    model: FakeQuantModel
    subsets: tuple[tuple[Batch, ...], ...]
    run_samples: int
    expected: tuple[tuple[dict[str, Array], ...], ...]
    metric: str
    scale: ErrorScale
    limit: float | None
    reuse_bytes: int

    @property
    def samples(self) -> int:
        """Samples of all subsets."""
        return sum(batch.samples for subset in self.subsets for batch in subset)


class _Measure:
    """A metric as an error, whatever it raises."""

    def __init__(self, metric: Metric, scale: ErrorScale) -> None:
        self._metric = metric
        self._scale = scale
        bound: Callable[[int], float] | None = getattr(self._metric, "bound", None)
        self._bound = bound

    def add(self, outputs: dict[str, Array], batch: Batch, expected: Mapping[str, Array]) -> None:
        for name, array in outputs.items():
            # One sum tells, nearly always: it is NaN where an element is.
            if array.dtype.kind == "f" and math.isnan(array.sum()) and np.isnan(array).any():
                raise _NoNumberError(f"output {name!r} is NaN")
        try:
            self._metric.update(outputs, batch.labels, expected)
        except DataError as error:
            raise _NoNumberError(error.what, error) from error
        except Exception as error:  # a metric of others may raise anything
            raise _NoNumberError(f"the metric fails ({first_line(error)})") from error

    def least(self, remaining: int) -> float:
        """The least error that is still possible."""
        return -math.inf if self._bound is None else self._scale.error(self._bound(remaining))

    def error(self) -> float:
        try:
            value = float(self._metric.value())
        except DataError as error:
            raise _NoNumberError(error.what, error) from error
        except Exception as error:
            raise _NoNumberError(f"the metric fails ({first_line(error)})") from error
        if math.isnan(value):
            raise _NoNumberError("the metric is not a number")
        return self._scale.error(value)


class _NoNumberError(Exception):
    """There is no error to report, and why."""

    def __init__(self, what: str, cause: DataError | None = None) -> None:
        super().__init__(what)
        self.cause = cause


class PostTraining:
    """Evaluates plans by post-training quantization.

    Parameters
    ----------
    job
        What is to be evaluated.
    """

    def __init__(self, job: EvaluationJob) -> None:
        self.job = job
        self._model = FakeQuant(job.model, reuse_bytes=job.reuse_bytes)
        self._metric = metric_factory(job.metric)
        self._inputs = [
            [_pieces(batch, job.run_samples) for batch in subset] for subset in job.subsets
        ]

    def evaluate(self, plan: Plan, *, limit: float | None = None) -> Result:
        """Estimate the error of a plan.

        Parameters
        ----------
        plan
            The precision of every layer.
        limit
            Stop where the error exceeds this; by default the limit of the job.
        """
        with np.errstate(all="ignore"):  # infinite outputs are told from the value
            return self._evaluate(plan, self.job.limit if limit is None else limit)

    def _evaluate(self, plan: Plan, limit: float | None) -> Result:
        start = time.perf_counter()
        samples = 0
        worst: float | None = None
        overall = self._measure()
        status: Status = "ok"
        self._model.use(dict(zip(self.job.layers, plan, strict=True)))
        try:
            for number, subset in enumerate(self.job.subsets):
                single = len(self.job.subsets) == 1
                measure = overall if single else self._measure()
                total = sum(batch.samples for batch in subset)
                done = 0
                for index, batch in enumerate(subset):
                    outputs = self._run(number, index)
                    expected = self.job.expected[number][index] if self.job.expected else {}
                    measure.add(outputs, batch, expected)
                    if not single:
                        overall.add(outputs, batch, expected)
                    done += batch.samples
                    least = measure.least(total - done)
                    if limit is not None and done < total and least > limit:
                        status = "stopped"
                        break
                samples += done
                error = measure.error() if status == "ok" else max(measure.error(), least)
                worst = error if worst is None else max(worst, error)
                if limit is not None and worst > limit:
                    if number < len(self.job.subsets) - 1:
                        status = "stopped"
                    break
            seconds = time.perf_counter() - start
            return Result(status, worst, overall.error(), samples, seconds)
        except _NoNumberError as error:
            seconds = time.perf_counter() - start
            return Result("failed", None, None, samples, seconds, str(error))

    def _measure(self) -> _Measure:
        return _Measure(self._metric(), self.job.scale)

    def forget(self) -> None:
        """Let go of intermediate values that are kept for plans that begin alike."""
        self._model.forget()

    def _run(self, subset: int, batch: int) -> dict[str, Array]:
        pieces = self._inputs[subset][batch]
        try:
            results = [
                self._model.run(piece, key=(subset, batch, number))
                for number, piece in enumerate(pieces)
            ]
            if len(results) == 1:
                return results[0]
            return {name: np.concatenate([r[name] for r in results]) for name in results[0]}
        except Exception as error:  # onnxruntime raises several kinds
            raise _NoNumberError(f"onnxruntime fails ({first_line(error)})") from error


def _pieces(batch: Batch, size: int) -> list[dict[str, ort.OrtValue]]:
    """The samples of a batch that are run at once; its memory is shared."""
    if batch.samples <= size:
        parts = [batch.inputs]
    else:
        parts = [
            {name: array[start : start + size] for name, array in batch.inputs.items()}
            for start in range(0, batch.samples, size)
        ]
    return [
        {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in part.items()
        }
        for part in parts
    ]


def job_for(
    model: Model,
    calibration: Samples,
    validation: Samples,
    *,
    precisions: Mapping[str, Sequence[Precision]],
    metric: str,
    options: QuantizationOptions,
    subsets: int = 1,
    samples: int | None = None,
    limit: Callable[[float], float | None] = lambda _: None,
    work: Mapping[str, float] | None = None,
    reuse_bytes: int = 256 << 20,
    blocked: bool = True,
    progress: ProgressCallback | None = None,
) -> tuple[EvaluationJob, float]:
    """Prepare everything, and measure the float model.

    Parameters
    ----------
    model
        The float model; it is consumed.
    calibration, validation
        Data to choose scales with, and data to measure errors on.
    precisions
        Layer name to the precisions that plans may give it.
    metric
        Name of a metric.
    options
        How to quantize.
    subsets
        Parts of the validation data; sample ``i`` belongs to part ``i % subsets``.
    samples
        How many validation samples to use; by default all.
    limit
        The largest acceptable error, given the float model's.
    work
        Layer name to multiply-accumulates.
    reuse_bytes, blocked
        As in :mod:`~bitwright.quant.fake_quant`.
    progress
        Called with calibration samples done and in total.

    Returns
    -------
    job
        For :class:`PostTraining`.
    error
        The float model's error: as that of plans, the largest over the subsets.

    Raises
    ------
    DataError, ModelError, UsageError, RunError
        If the data do not fit the model or the metric, or the float model has no error.
    """
    measure = get_metric(metric)
    scale = ErrorScale(metric, measure.unit, measure.higher_is_better)
    check_labels(metric, validation)
    if subsets < 1:
        raise UsageError(f"{subsets} subsets are not possible", fix="use 1 or more")
    fewer = samples is not None and samples < len(validation)
    if isinstance(measure, Grouped) and measure.grouped and (subsets > 1 or fewer):
        raise UsageError(
            f"metric {metric} needs samples that belong together, which subsets, or a part of the "
            "samples, would tear apart",
            fix="use one subset and all samples (--subsets 1, without --samples)",
        )
    if odd := [value.name for value in model.outputs if value.dtype.kind not in "fiub"]:
        raise ModelError(
            f"output {odd[0]!r} is no array of numbers; nothing else can be measured",
            where=model.source,
        )
    run_samples = _run_samples(model, validation)
    batches, outputs = _run_float(model, validation, subsets, samples, first_place(measure))
    expected = outputs if measure.needs == "outputs" else ()
    first = {name: entry[0] for name, entry in precisions.items()}
    found = calibrate_model(
        model,
        precisions,
        calibration,
        elementwise_bits=options.elementwise_bits,
        loop_bits=options.loop_bits,
        recipe=options.recipe,
        clip=options.clip,
        percentile=options.percentile,
        per_channel=options.per_channel,
        asymmetric=options.asymmetric,
        rotation=options.rotation,
        batch_size=options.batch_size,
        progress=progress,
    )
    plan = PrecisionPlan(
        first, elementwise_bits=options.elementwise_bits, loop_bits=options.loop_bits
    )
    fake = fake_quant_model(found, plan, work=work, blocked=blocked)
    layers = tuple(precisions)
    job = EvaluationJob(
        layers, fake, batches, run_samples, expected, metric, scale, None, reuse_bytes
    )
    error = _float_error(job, outputs, validation.where)
    return replace(job, limit=limit(error)), error


def check_labels(metric: str, data: Samples) -> None:
    """Refuse data without labels for a metric that needs them."""
    if get_metric(metric).needs == "labels" and not data.has_labels:
        raise DataError(
            f"metric {metric} needs labels, and there is no array 'labels'", where=data.where
        )


def job_on(job: EvaluationJob, model: Model, data: Samples) -> tuple[EvaluationJob, float]:
    """The same job on other data, all of it and without a limit; and the float model's error.

    Parameters
    ----------
    job
        A job.
    model
        The float model, as it was loaded.
    data
        The other data.

    Raises
    ------
    DataError, RunError
        As :func:`job_for`.
    """
    measure = get_metric(job.metric)
    check_labels(job.metric, data)
    batches, outputs = _run_float(model, data, 1, None, first_place(measure))
    expected = outputs if measure.needs == "outputs" else ()
    other = replace(job, subsets=batches, expected=expected, limit=None)
    return other, _float_error(other, outputs, data.where)


_Outputs: TypeAlias = tuple[tuple[dict[str, Array], ...], ...]


def _run_float(
    model: Model, data: Samples, subsets: int, samples: int | None, places_from: int | None
) -> tuple[tuple[tuple[Batch, ...], ...], _Outputs]:
    """The data in batches, and what the float model makes of each."""
    batches = _divide(data, subsets, samples, _run_samples(model, data), places_from)
    session = _float_session(model)
    names = [value.name for value in model.outputs]
    outputs = []
    for subset in batches:
        results = []
        for batch in subset:
            try:
                results.append(dict(zip(names, session.run(names, batch.inputs), strict=True)))
            except Exception as error:  # onnxruntime raises several kinds
                raise RunError(
                    f"onnxruntime fails ({first_line(error)})", where=model.source
                ) from error
        outputs.append(tuple(results))
    return batches, tuple(outputs)


def _float_error(job: EvaluationJob, outputs: _Outputs, where: str) -> float:
    """Error of the float model, given what it computed: the largest over the subsets."""
    worst = -math.inf
    try:
        with np.errstate(all="ignore"):
            for subset, results in zip(job.subsets, outputs, strict=True):
                measure = _Measure(get_metric(job.metric), job.scale)
                for batch, result in zip(subset, results, strict=True):
                    measure.add(result, batch, result)
                worst = max(worst, measure.error())
    except _NoNumberError as error:
        if error.cause is not None:
            cause = error.cause
            raise DataError(cause.what, where=cause.where or where, fix=cause.fix) from None
        raise RunError(
            f"the float model cannot be measured: {error}",
            where=where,
            fix="see that bitwright evaluate runs on the same model, data and metric",
        ) from error
    return worst


def _float_session(model: Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    proto = model.to_proto()
    try:
        return ort.InferenceSession(
            proto.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=wrong_optimizers(proto),
        )
    except Exception as error:  # onnxruntime raises several kinds
        raise ModelError(
            f"onnxruntime cannot run the model ({first_line(error)})", where=model.source
        ) from error


def _run_samples(model: Model, data: Samples) -> int:
    """Samples of a run whose largest activation stays in a processor's cache."""
    if data.fixed_batch is not None:
        return data.fixed_batch
    largest = 1
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                sizes = [dim for dim in list(value.shape)[1:] if isinstance(dim, int)]
                largest = max(largest, 4 * math.prod(sizes))
    return max(1, min(_LARGEST_BATCH, _BATCH_BYTES // largest))


def _divide(
    samples: Samples, subsets: int, count: int | None, run_samples: int, places_from: int | None
) -> tuple[tuple[Batch, ...], ...]:
    """All samples in memory, dealt out to subsets, in batches."""
    size = samples.fixed_batch or 1
    units: list[Batch] = []
    for batch in samples.batches(size, places_from=places_from):
        if count is not None and len(units) * size >= count:
            break
        units.append(batch)
    if subsets > len(units):
        raise UsageError(
            f"{len(units)} batches of validation data cannot be divided into {subsets} subsets",
            fix="use fewer (--subsets 1)",
        )
    together = 1
    if samples.fixed_batch is None:
        together = max(run_samples, min(_BLOCK[0] * run_samples, _BLOCK[1]))
    return tuple(
        tuple(
            _join(units[first::subsets][start : start + together])
            for start in range(0, len(units[first::subsets]), together)
        )
        for first in range(subsets)
    )


def _join(units: Sequence[Batch]) -> Batch:
    if len(units) == 1:
        return units[0]
    inputs = {
        name: np.concatenate([unit.inputs[name] for unit in units]) for name in units[0].inputs
    }
    labels = [unit.labels for unit in units if unit.labels is not None]
    return Batch(
        inputs,
        np.concatenate(labels) if labels else None,
        sum(unit.samples for unit in units),
    )
