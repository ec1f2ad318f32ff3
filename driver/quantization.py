"""``bitwright quantize``: a float ONNX model in, a standard QDQ model out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitwright.errors import OutputError
from bitwright.files import check_writable, write_atomically
from bitwright.planning import resolve_plan
from bitwright.quant.float_ops import Array
from bitwright.quant.load import load
from bitwright.quant.observers import ClipMethod
from bitwright.quant.quantizer import Quantized, quantize_model
from bitwright.quant.recipes import RecipeName
from bitwright.quant.samples import ProgressCallback, Samples
from bitwright.vocabulary import Precision, PrecisionPlan

__all__ = ["quantize"]


def quantize(
    model: str | Path,
    *,
    calibration: str | Path | Mapping[str, Array],
    precision: str | Precision | None = None,
    plan: PrecisionPlan | str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    recipe: RecipeName = "default",
    clip: ClipMethod | None = None,
    percentile: float | None = None,
    per_channel: bool | None = None,
    asymmetric: bool = False,
    rotation: bool = True,
    elementwise_bits: int | None = None,
    loop_bits: int | None = None,
    batch_size: int | None = None,
    progress: ProgressCallback | None = None,
) -> Quantized:
    """Quantize an ONNX model after training, every layer at a precision of its own.

    Parameters
    ----------
    model
        A float ONNX file.
    calibration
        A few hundred real samples: an .npz file with one array a model input, or a mapping of
        input names to arrays. They are streamed once.
    precision
        One precision for all layers, for example ``w4a8``; or
    plan
        a precision plan, or the file of one.
    output
        File to write the QDQ model to.
    overwrite
        Whether ``output`` may exist.
    recipe
        ``default``, ``naive`` or ``quamba``: see :mod:`bitwright.quant.recipes`. Options that are
        given win over those of the recipe; the last two need neither ``precision`` nor ``plan``.
    clip
        How the range of activations (and, unless it is ``minmax``, of weights) is cut: ``mmse``
        (default) minimises the squared error, ``percentile`` leaves out outliers, ``minmax``
        (``naive``, ``quamba``) keeps all.
    percentile
        The share of values, in percent, that is kept: with ``percentile``, and in the recipe
        ``quamba`` of what selective scans take as ``x``. By default 99.99, in that recipe 99.999;
        refused where nothing is cut at it.
    per_channel
        Whether every output channel has a weight scale of its own: by default yes, in the recipes
        ``naive`` and ``quamba`` no.
    asymmetric
        Whether activations with negative values get a zero point other than 0.
    rotation
        Whether the recipe ``quamba`` rotates the outputs of selective scans.
    elementwise_bits
        8 or 16 (default): width of activations that only elementwise operators read.
    loop_bits
        The same in the bodies of loops (LSTM, GRU, RNN, Scan, Loop); 32 (default) for float32.
    batch_size
        Samples of one calibration run; by default what keeps memory low.
    progress
        Called with samples done and in total; first for calibration, then, over the few samples
        kept for it, for the choice of scales.

    Returns
    -------
    Quantized
        The QDQ model and a summary of every layer.

    Raises
    ------
    ModelError, PlanError, DataError, OutputError, UsageError
        If the model, the plan, the samples, the output or an option has to change.
    RunError
        If calibration runs into NaN or infinite values.
    """
    path = None if output is None else check_writable(output, overwrite=overwrite, model=model)
    loaded = load(model)
    complete = resolve_plan(loaded, precision, plan, elementwise_bits, loop_bits, recipe=recipe)
    result = quantize_model(
        loaded,
        complete,
        Samples(calibration, loaded.inputs),
        recipe=recipe,
        clip=clip,
        percentile=percentile,
        per_channel=per_channel,
        asymmetric=asymmetric,
        rotation=rotation,
        batch_size=batch_size,
        progress=progress,
    )
    if path is not None:
        try:
            content = result.model.SerializeToString()
        except ValueError as error:  # protobuf's limit
            raise OutputError(
                "the quantized model is larger than 2 GiB", where=str(path)
            ) from error
        write_atomically(path, content)
    return result
