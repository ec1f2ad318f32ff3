"""``bitwright evaluate``, ``compare`` and ``run``: how good a model is, whether it is exact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np

from bitwright.artifact import Artifact, load_artifact, sha256
from bitwright.errors import (
    BitwrightError,
    DataError,
    ModelError,
    RunError,
    UsageError,
    first_line,
)
from bitwright.quant.compare import RegionAgreement, compare_codes
from bitwright.quant.float_ops import Array, make_session
from bitwright.quant.load import Model, ValueType, load
from bitwright.quant.metrics import Metric, first_place, get_metric
from bitwright.quant.reference import Reference
from bitwright.quant.requantization import RequantizationForm
from bitwright.quant.samples import Batch, ProgressCallback, Samples
from bitwright.transitions import Transitions

__all__ = [
    "Comparison",
    "Engine",
    "Evaluation",
    "Form",
    "FormResult",
    "SideBySide",
    "compare",
    "evaluate",
    "run",
]

Engine = Literal["onnxruntime", "reference"]
Form = Literal["float", "qdq", "reference", "artifact"]
_BLOCK = 32  # batches
_COMPARED = 64  # samples whose codes are compared, all of them inside the model
_BLOCK_BYTES = 64 * 2**20
_Runner: TypeAlias = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes
    ----------
    metric, unit, higher_is_better
        What was measured.
    value
        The value in ``unit``.
    samples
        Number of samples.
    engine
        What ran the model.
    seconds
        Time spent in the model.
    """

    source: str
    metric: str
    value: float
    unit: str
    higher_is_better: bool
    samples: int
    engine: Engine
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of :func:`compare`.

    Attributes
    ----------
    regions
        Agreement of every integer region, in order of execution.
    samples
        Number of samples.
    """

    source: str
    samples: int
    regions: tuple[RegionAgreement, ...]

    @property
    def equal_share(self) -> float:
        """Share of equal codes on equal input codes, over all regions."""
        codes = sum(region.codes for region in self.regions)
        return 1.0 - sum(region.differing for region in self.regions) / max(codes, 1)

    @property
    def equal_share_end_to_end(self) -> float:
        """Share of equal codes where each side runs on its own codes."""
        codes = sum(region.codes for region in self.regions)
        return 1.0 - sum(region.differing_end_to_end for region in self.regions) / max(codes, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "source": self.source,
            "samples": self.samples,
            "equal_share": self.equal_share,
            "equal_share_end_to_end": self.equal_share_end_to_end,
            "regions": [{**asdict(r), "equal_share": r.equal_share} for r in self.regions],
        }


@dataclass(frozen=True, slots=True)
class FormResult:
    """What one form of a model reaches.

    Attributes
    ----------
    form
        ``float``: the ONNX model that was quantized, in onnxruntime; ``qdq``: the quantized ONNX
        model, in onnxruntime; ``reference``: the same in the integer reference; ``artifact``.
    source
        The file or folder.
    value
        The value of the metric.
    seconds
        Time spent in the model.
    equal_share
        Share of this form's output values that the artefact equals to the last bit.
    close_share
        The same within the rounding of float32 (relative 1e-4, absolute 1e-6): where the outputs
        are sums of products of codes, the sums are equal.
    """

    form: Form
    source: str
    value: float
    seconds: float
    equal_share: float
    close_share: float


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Result of :func:`run`.

    Attributes
    ----------
    metric, unit, higher_is_better
        What was measured.
    samples
        Number of samples.
    forms
        The forms of the model that could be run; the artefact is the last.
    notes
        Why others could not.
    equal_codes_share
        Share of the codes inside the model that onnxruntime, running the QDQ model, has in common
        with the integers, each on codes of its own; over the first ``compared_samples``. None
        without the QDQ model or the reference.
    """

    source: str
    metric: str
    unit: str
    higher_is_better: bool
    samples: int
    forms: tuple[FormResult, ...]
    notes: tuple[str, ...]
    equal_codes_share: float | None = None
    compared_samples: int = 0

    def __getitem__(self, form: Form) -> FormResult:
        return next(entry for entry in self.forms if entry.form == form)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return asdict(self)


def evaluate(
    model: str | Path,
    data: str | Path | Mapping[str, Array],
    *,
    metric: str = "top1",
    engine: Engine = "onnxruntime",
    requantization: RequantizationForm = "float",
    against: str | Path | None = None,
    batch_size: int = 32,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Measure a float or quantized model on data.

    Parameters
    ----------
    model
        An ONNX file.
    data
        An .npz file or a mapping: one array a model input, and ``labels`` for metrics that compare
        with labels.
    metric
        One of `bitwright.quant.metrics.metric_names` (``top1``, ``mse``, ``sqnr``, ``perplexity``
        and others), ``top<K>``, an installed plug-in, or ``package.module:Class``.
    engine
        ``onnxruntime`` (graph optimisations off for quantized models), or ``reference``: the
        integer arithmetic of the accelerator, for quantized models.
    requantization
        For the reference: ``float`` multipliers, or ``fixed`` for 32-bit integers.
    against
        The float model that ``mse`` and ``sqnr`` compare with.
    batch_size
        Samples a run, where the model leaves it free.
    progress
        Called with samples done and in total.

    Raises
    ------
    ModelError, DataError, UsageError
        If the model, the data or an option has to change.
    RunError
        If the model fails while running.
    """
    if engine not in ("onnxruntime", "reference"):
        raise UsageError(f"{engine!r} is no engine", fix="choose onnxruntime or reference")
    if requantization not in ("float", "fixed"):
        raise UsageError(f"{requantization!r} is no requantization", fix="choose float or fixed")
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is not positive")
    measure = get_metric(metric)
    loaded = load(model)
    if engine == "reference" and not loaded.is_quantized:
        raise ModelError(
            "is not quantized; the integer reference runs quantized models",
            where=loaded.source,
            fix="quantize it first, or use the engine onnxruntime",
        )
    if odd := [value.name for value in loaded.outputs if value.dtype.kind not in "fiub"]:
        raise ModelError(
            f"output {odd[0]!r} is no array of numbers; nothing else can be measured",
            where=loaded.source,
        )
    samples = Samples(data, loaded.inputs)
    if measure.needs == "labels" and not samples.has_labels:
        raise DataError(
            f"metric {metric} needs labels, and there is no array 'labels'", where=samples.where
        )
    expected_runner: _Runner | None = None
    if measure.needs == "outputs":
        if against is None:
            raise UsageError(
                f"metric {metric} compares with the float model, and none is given",
                fix="name it (--against FLOAT.onnx)",
            )
        float_model = load(against)
        _refuse_other_interface(float_model, loaded, loaded.source)
        expected_runner = _session_runner(float_model)
    run = (
        _session_runner(loaded)
        if engine == "onnxruntime"
        else _reference_runner(loaded, requantization)
    )
    contender = _Contender(loaded.source, run, metric, measure)
    done = 0
    for batch in samples.batches(batch_size, places_from=first_place(measure)):
        expected = expected_runner(batch.inputs) if expected_runner is not None else {}
        _refuse_nan(expected, str(against), batch, done)
        contender.measure(contender.run(batch), batch, expected, samples.where)
        done += batch.samples
        if progress is not None:
            progress(done, len(samples))
    return Evaluation(
        loaded.source,
        metric,
        contender.value(),
        measure.unit,
        measure.higher_is_better,
        len(samples),
        engine,
        contender.seconds,
    )


def _refuse_other_interface(float_model: Model, other: Model | Artifact, source: str) -> None:
    for kind in ("input", "output"):
        names = {value.name for value in getattr(other, f"{kind}s")}
        extra = [v.name for v in getattr(float_model, f"{kind}s") if v.name not in names]
        if extra:
            raise ModelError(
                f"has an {kind} {extra[0]!r} that {source} lacks",
                where=float_model.source,
                fix="compare a quantized model with the float model it was made from",
            )


class _Contender:
    """One way to run a model, measured batch by batch."""

    def __init__(self, source: str, run: _Runner, metric: str, measure: Metric) -> None:
        self.source = source
        self.seconds = 0.0
        self._run, self._metric, self._measure = run, metric, measure
        self._done = 0
        self._where = ""

    def run(self, batch: Batch) -> dict[str, Array]:
        """Run a batch; only this is timed."""
        start = time.perf_counter()
        outputs = self._run(batch.inputs)
        self.seconds += time.perf_counter() - start
        _refuse_nan(outputs, self.source, batch, self._done)
        self._done += batch.samples
        return outputs

    def measure(
        self,
        outputs: Mapping[str, Array],
        batch: Batch,
        expected: Mapping[str, Array],
        where: str,
    ) -> None:
        """Measure the outputs of a batch; ``where`` is what the labels come from."""
        self._where = where
        try:
            with np.errstate(all="ignore"):  # infinite outputs are found below
                self._measure.update(outputs, batch.labels, expected)
        except DataError as error:  # a metric does not know the file
            raise DataError(error.what, where=error.where or where, fix=error.fix) from None
        except Exception as error:
            raise _metric_fails(self._metric, error) from error

    def value(self) -> float:
        """Value over all batches."""
        try:
            value = float(self._measure.value())
        except DataError as error:  # what shows only when all labels are there
            raise DataError(error.what, where=error.where or self._where, fix=error.fix) from None
        except Exception as error:
            raise _metric_fails(self._metric, error) from error
        if math.isnan(value):
            raise RunError(
                f"metric {self._metric} is not a number: outputs are infinite", where=self.source
            )
        return value


def _refuse_nan(arrays: Mapping[str, Array], source: str, batch: Batch, done: int) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise RunError(
                f"output {name!r} is NaN on samples {done} to {done + batch.samples - 1}",
                where=source,
            )


def _metric_fails(metric: str, error: Exception) -> RunError:
    return RunError(
        f"metric {metric} fails ({first_line(error)})", fix="bitwright --debug shows the traceback"
    )


def _session_runner(model: Model) -> _Runner:
    names = [value.name for value in model.outputs]
    try:
        session = make_session(model.to_proto(), optimize=not model.is_quantized)
    except Exception as error:  # onnxruntime raises several kinds
        raise ModelError(
            f"onnxruntime cannot run the model ({first_line(error)})",
            where=model.source,
        ) from error

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise RunError(
                f"onnxruntime fails ({first_line(error)})", where=model.source
            ) from error

    return run


def _reference_runner(model: Model, requantization: RequantizationForm) -> _Runner:
    reference = Reference(model, requantization)
    return lambda inputs: reference.run(inputs)[0]


def compare(
    model: str | Path,
    data: str | Path | Mapping[str, Array],
    *,
    requantization: RequantizationForm = "float",
    batch_size: int = 16,
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Compare the integer reference with onnxruntime on a quantized model, region by region.

    Parameters
    ----------
    model
        A quantized ONNX file, of bitwright or another tool.
    data
        An .npz file or a mapping: one array a model input.
    requantization
        ``float`` or ``fixed``, in the reference.
    batch_size
        Samples a run.
    progress
        Called with samples done and in total.

    Raises
    ------
    ModelError, DataError, UsageError
        If the model, the data or an option has to change.
    """
    if requantization not in ("float", "fixed"):
        raise UsageError(f"{requantization!r} is no requantization", fix="choose float or fixed")
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is not positive")
    loaded = load(model)
    samples = Samples(data, loaded.inputs)
    try:
        regions = compare_codes(
            loaded,
            samples,
            requantization=requantization,
            batch_size=batch_size,
            progress=progress,
        )
    except BitwrightError:
        raise
    except Exception as error:
        raise RunError(f"cannot be compared ({first_line(error)})", where=loaded.source) from error
    return Comparison(loaded.source, len(samples), tuple(regions))


@overload
def run(
    artifact: str | Path,
    data: str | Path | Mapping[str, Array],
    *,
    metric: str | None = None,
    float_model: str | Path | None = None,
    reference: bool | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    count_transitions: Literal[False] = False,
    progress: ProgressCallback | None = None,
) -> SideBySide: ...


@overload
def run(
    artifact: str | Path,
    data: str | Path | Mapping[str, Array],
    *,
    metric: str | None = None,
    float_model: str | Path | None = None,
    reference: bool | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    count_transitions: bool,
    progress: ProgressCallback | None = None,
) -> SideBySide | Transitions: ...


def run(
    artifact: str | Path,
    data: str | Path | Mapping[str, Array],
    *,
    metric: str | None = None,
    float_model: str | Path | None = None,
    reference: bool | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    count_transitions: bool = False,
    progress: ProgressCallback | None = None,
) -> SideBySide | Transitions:
    """Run an artefact on data, side by side with the models it was made from.

    Parameters
    ----------
    artifact
        A folder that :func:`bitwright.compile` wrote.
    data
        An .npz file or a mapping: one array a model input, and ``labels`` for metrics that compare
        with labels.
    metric
        As in :func:`evaluate`, ``top1`` by default; ``mse`` and ``sqnr`` compare with the float
        model.
    float_model
        The float model; by default the file that was compiled, if it is still what it was.
    reference
        Whether the integer reference, which is slow, runs too; by default it does.
    batch_size
        Samples a run, where the model leaves it free.
    threads
        How many threads the artefact computes with; by default one a processor.
    count_transitions
        Send the samples over the link instead, and count what toggles: see
        :meth:`~bitwright.Artifact.count_transitions`. Nothing is compared, so there is no metric,
        float model or reference.
    progress
        Called with samples done and in total.

    Returns
    -------
    SideBySide
        The forms of the model, compared; or
    Transitions
        what toggled, with ``count_transitions``.

    Raises
    ------
    ArtifactError, ModelError, DataError, UsageError
        If the artefact, a model, the data or an option has to change.
    RunError
        If a form fails while running.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is not positive")
    if count_transitions:
        if (metric, float_model, reference) != (None, None, None):
            raise UsageError(
                "--count-transitions compares nothing with other models",
                fix="leave out --metric, --float, --reference and --no-reference, or run twice",
            )
        sent = load_artifact(artifact, threads=threads)
        return sent.count_transitions(data, batch_size=batch_size, progress=progress)
    metric = metric or "top1"
    measure = get_metric(metric)
    loaded = load_artifact(artifact, threads=threads)
    where = str(artifact)
    inputs = [ValueType(e.name, np.dtype(e.dtype), e.shape) for e in loaded.inputs]
    samples = Samples(data, inputs)
    if measure.needs == "labels" and not samples.has_labels:
        raise DataError(
            f"metric {metric} needs labels, and there is no array 'labels'", where=samples.where
        )
    notes: list[str] = []
    original = _float_model(loaded, float_model, notes)
    if measure.needs == "outputs" and original is None:
        raise UsageError(
            f"metric {metric} compares with the float model, and there is none: {notes[0]}",
            fix="name it: --float MODEL.onnx",
        )

    contenders: dict[Form, _Contender] = {}
    if original is not None:
        _refuse_other_interface(original, loaded, where)
        runner = _session_runner(original)
        contenders["float"] = _Contender(original.source, runner, metric, get_metric(metric))
    if loaded.qdq_model is None:
        notes.append("the artefact keeps no quantized ONNX model to compare with")
    else:
        qdq = load(loaded.qdq_model)
        runner = _session_runner(qdq)
        contenders["qdq"] = _Contender(qdq.source, runner, metric, get_metric(metric))
        if reference is not False:
            runner = _reference_runner(qdq, loaded.manifest.requantization)
            contenders["reference"] = _Contender(qdq.source, runner, metric, get_metric(metric))
    contenders["artifact"] = _Contender(where, loaded.run, metric, measure)

    codes_share, compared = None, 0
    equal, close = dict.fromkeys(contenders, 0), dict.fromkeys(contenders, 0)
    values = done = 0
    # Taking turns batch by batch, each would wait for the idle threads of the one before.
    for block in _blocks(samples.batches(batch_size, places_from=first_place(measure))):
        outputs = {form: [entry.run(b) for b in block] for form, entry in contenders.items()}
        if "reference" in contenders and not compared:
            first = {name: array[:_COMPARED] for name, array in block[0].inputs.items()}
            found = compare(qdq.source, first, requantization=loaded.manifest.requantization)
            codes_share, compared = found.equal_share_end_to_end, found.samples
        for index, batch in enumerate(block):
            expected = outputs["float"][index] if "float" in outputs else {}
            artifact_outputs = outputs["artifact"][index]
            for form, contender in contenders.items():
                contender.measure(outputs[form][index], batch, expected, samples.where)
                for name, array in artifact_outputs.items():
                    theirs = outputs[form][index][name]
                    equal[form] += int((theirs == array).sum())
                    close[form] += int(np.isclose(array, theirs, rtol=1e-4, atol=1e-6).sum())
            values += sum(array.size for array in artifact_outputs.values())
            done += batch.samples
            if progress is not None:
                progress(done, len(samples))
    return SideBySide(
        where,
        metric,
        measure.unit,
        measure.higher_is_better,
        len(samples),
        tuple(
            FormResult(
                form,
                entry.source,
                entry.value(),
                entry.seconds,
                equal[form] / max(values, 1),
                close[form] / max(values, 1),
            )
            for form, entry in contenders.items()
        ),
        tuple(notes),
        codes_share,
        compared,
    )


def _blocks(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Gather batches, as long as they are few and small."""
    block: list[Batch] = []
    for batch in batches:
        block.append(batch)
        size = sum(array.nbytes for entry in block for array in entry.inputs.values())
        if len(block) == _BLOCK or size >= _BLOCK_BYTES:
            yield block
            block = []
    if block:
        yield block


def _float_model(artifact: Artifact, path: str | Path | None, notes: list[str]) -> Model | None:
    """The float model to compare with; if there is none, a note says why."""
    if path is not None:
        return load(path)
    known = artifact.manifest.model.float_model
    if known is None:
        notes.append("the artefact was compiled from a quantized model")
    elif not Path(known.path).is_file():
        notes.append(f"the float model {known.path} is not there")
    elif sha256(Path(known.path)) != known.sha256:
        notes.append(f"the float model {known.path} has changed since")
    else:
        return load(known.path)
    return None
