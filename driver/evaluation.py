"""``bitwright evaluate`` and ``bitwright compare``: how good a model is, whether it is exact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

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
from bitwright.quant.load import Model, load
from bitwright.quant.metrics import get_metric
from bitwright.quant.reference import Reference
from bitwright.quant.requantization import RequantizationForm
from bitwright.quant.samples import ProgressCallback, Samples

__all__ = ["Comparison", "Engine", "Evaluation", "compare", "evaluate"]

Engine = Literal["onnxruntime", "reference"]
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
        ``top1``, ``top5``, ``mse``, ``sqnr``, an installed plug-in, or ``package.module:Class``.
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
        for kind in ("input", "output"):
            names = {value.name for value in getattr(loaded, f"{kind}s")}
            extra = [v.name for v in getattr(float_model, f"{kind}s") if v.name not in names]
            if extra:
                raise ModelError(
                    f"has an {kind} {extra[0]!r} that {loaded.source} lacks",
                    where=float_model.source,
                    fix="compare a quantized model with the float model it was made from",
                )
        expected_runner = _session_runner(float_model)
    run = (
        _session_runner(loaded)
        if engine == "onnxruntime"
        else _reference_runner(loaded, requantization)
    )
    seconds, done = 0.0, 0
    for batch in samples.batches(batch_size):
        start = time.perf_counter()
        outputs = run(batch.inputs)
        seconds += time.perf_counter() - start
        expected = expected_runner(batch.inputs) if expected_runner is not None else {}
        for source, arrays in ((loaded.source, outputs), (str(against), expected)):
            for name, array in arrays.items():
                if array.dtype.kind == "f" and np.isnan(array).any():
                    raise RunError(
                        f"output {name!r} is NaN on samples {done} to {done + batch.samples - 1}",
                        where=source,
                    )
        try:
            with np.errstate(all="ignore"):  # infinite outputs are found below
                measure.update(outputs, batch.labels, expected)
        except DataError as error:  # a metric does not know the file
            raise DataError(error.what, where=error.where or samples.where, fix=error.fix) from None
        except Exception as error:
            raise _metric_fails(metric, error) from error
        done += batch.samples
        if progress is not None:
            progress(done, len(samples))
    try:
        value = float(measure.value())
    except Exception as error:
        raise _metric_fails(metric, error) from error
    if math.isnan(value):
        raise RunError(
            f"metric {metric} is not a number: outputs are infinite", where=loaded.source
        )
    return Evaluation(
        loaded.source,
        metric,
        value,
        measure.unit,
        measure.higher_is_better,
        len(samples),
        engine,
        seconds,
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
