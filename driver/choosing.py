"""``bitwright choose-forms``: form and range of every activation, by the noise at the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.errors import UsageError
from bitwright.files import check_writable, write_atomically
from bitwright.planning import resolve_plan
from bitwright.quant.float_ops import Array
from bitwright.quant.forms import FORMS, PERCENTILES, FormChoices, choose_tensor_forms
from bitwright.quant.load import load
from bitwright.quant.recipes import RecipeName
from bitwright.quant.samples import ProgressCallback, Samples
from bitwright.vocabulary import Activation, Precision, PrecisionPlan

__all__ = ["choose_forms"]


def choose_forms(
    model: str | Path,
    *,
    calibration: str | Path | Mapping[str, Array],
    precision: str | Precision | None = None,
    plan: PrecisionPlan | str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    forms: str | Sequence[str | Activation] | None = None,
    percentiles: str | Sequence[float] | None = None,
    recipe: RecipeName = "default",
    rotation: bool = True,
    samples: int = 16,
    progress: ProgressCallback | None = None,
) -> FormChoices:
    """Choose form and percentile of every activation that a layer or a selective scan reads.

    What counts is the signal-to-noise ratio at the outputs, against the float model: each tensor by
    itself first, then all together; see :mod:`bitwright.quant.forms`. Of ``dt`` of a selective scan
    and what the softplus in front of it reads the better one is quantized. Layers in the bodies of
    loops are not tried.

    Parameters
    ----------
    model
        A float ONNX file.
    calibration
        Real samples, as in :func:`bitwright.quantize`.
    precision, plan
        As in :func:`bitwright.quantize`; the widths of weights are kept.
    output
        File to write the plan to, as JSON, for ``quantize --plan``.
    overwrite
        Whether ``output`` may exist.
    forms
        What is tried for every tensor: ``a8``, ``a8se`` and ``a8se8``, if not told otherwise.
    percentiles
        Shares of the values, in percent, that ranges keep: 99, 99.9, 99.99, 99.999 and 100.
    recipe, rotation
        As in :func:`bitwright.quantize`; quantize with the same recipe later.
    samples
        How many samples, spread over all, the candidates are run on.
    progress
        Called with samples of the calibration, then with runs, done and in total.

    Raises
    ------
    ModelError, PlanError, DataError, OutputError, UsageError
        If the model, the plan, the samples, the output or an option has to change.
    RunError
        If calibration runs into NaN or infinite values.
    """
    path = None if output is None else check_writable(output, overwrite=overwrite, model=model)
    if samples < 1:
        raise UsageError(f"{samples} samples are not possible", where="--samples")
    loaded = load(model)
    complete = resolve_plan(loaded, precision, plan, recipe=recipe)
    found = choose_tensor_forms(
        loaded,
        complete,
        Samples(calibration, loaded.inputs),
        forms=[Activation.of(form) for form in _split(forms, FORMS)],
        percentiles=[_percent(percent) for percent in _split(percentiles, PERCENTILES)],
        recipe=recipe,
        rotation=rotation,
        count=samples,
        progress=progress,
    )
    if path is not None:
        write_atomically(path, found.plan.to_json().encode())
    return found


def _split(given: str | Sequence[Any] | None, default: Sequence[Any]) -> Sequence[Any]:
    """Entries of a list, or of a text with commas."""
    if given is None:
        return default
    return [word.strip() for word in given.split(",")] if isinstance(given, str) else given


def _percent(text: str | float) -> float:
    try:
        percent = float(text)
    except (TypeError, ValueError):
        percent = 0.0
    if not 0.0 < percent <= 100.0:
        raise UsageError(f"percentile {text} is not above 0 and at most 100", where="--percentiles")
    return percent
