"""Run calibration samples through the float model and watch the tensors to be quantized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitwright.errors import DataError, ModelError, RunError
from bitwright.quant.float_ops import make_session
from bitwright.quant.load import Model
from bitwright.quant.observers import Observer
from bitwright.quant.samples import ProgressCallback, Samples

__all__ = ["calibrate", "default_batch_size"]

_BATCH_BYTES = 1 << 26  # activations of one batch, about


def default_batch_size(values: Sequence[ir.Value]) -> int:
    """Batch whose watched activations take about 64 MiB: 1 to 32 samples."""
    per_sample = 0
    for value in values:
        size = 4
        for dim in value.shape or ():
            size *= dim if isinstance(dim, int) else 1
        per_sample += size
    return int(np.clip(_BATCH_BYTES // max(per_sample, 1), 1, 32))


def calibrate(
    model: Model,
    values: Sequence[ir.Value],
    samples: Samples,
    *,
    batch_size: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Observer]:
    """Observe tensors over all samples, once, one batch of activations in memory.

    Parameters
    ----------
    model
        The float model; it is not changed.
    values
        Float tensors of its main graph.
    samples
        The calibration data.
    batch_size
        Samples a run; by default what keeps the watched tensors near 64 MiB.
    progress
        Called after every batch.

    Returns
    -------
    dict
        Value name to what was observed.

    Raises
    ------
    DataError
        If the data do not fit, or a tensor becomes NaN or infinite (named with its producer).
    """
    watched = list(dict.fromkeys(values))
    observers = {str(value.name): Observer() for value in watched}
    session_outputs = [value for value in watched if not value.is_graph_input()]
    fed = {str(value.name) for value in watched if value.is_graph_input()}
    outputs = model.graph.outputs
    original = list(outputs)
    outputs.clear()
    outputs.extend(session_outputs)
    if not session_outputs:  # a session needs an output
        outputs.extend(original)
    try:
        proto = model.to_proto()
    finally:
        outputs.clear()
        outputs.extend(original)
    try:
        session = make_session(proto, optimize=True)
    except Exception as error:  # onnxruntime raises several kinds
        raise ModelError(
            f"onnxruntime cannot run the model ({str(error).splitlines()[0][:300]})",
            where=model.source,
        ) from error
    del proto
    names = [str(value.name) for value in session_outputs]
    size = batch_size or default_batch_size(watched)
    done = 0
    for batch in samples.batches(size):
        try:
            results = session.run(names, batch.inputs) if names else []
        except Exception as error:
            raise DataError(
                f"the model fails on samples {done} to {done + batch.samples - 1} "
                f"({str(error).splitlines()[0][:300]})",
                where=samples.where,
            ) from error
        pairs = [*zip(names, results, strict=True), *((n, batch.inputs[n]) for n in sorted(fed))]
        for name, array in pairs:
            try:
                observers[name].update(array, batch.samples)
            except FloatingPointError:
                raise RunError(
                    f"becomes NaN or infinite on samples {done} to {done + batch.samples - 1}",
                    where=f"{model.source}, tensor {name!r}",
                    fix="check that the samples are scaled as in training",
                ) from None
        done += batch.samples
        if progress is not None:
            progress(done, len(samples))
    return observers


