"""Run calibration samples through the float model and watch the tensors to be quantized."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import onnx_ir as ir

from bitwright.errors import DataError, ModelError, RunError
from bitwright.quant.float_ops import Array, make_session
from bitwright.quant.load import Model
from bitwright.quant.observers import Observer
from bitwright.quant.samples import Batch, ProgressCallback, Samples

__all__ = ["calibrate"]

_BATCH_BYTES = 192 << 20  # watched activations of one batch, about
_MAX_BATCH = 32
_KEPT = (8, 64)  # fewest and most samples to hand back


def calibrate(
    model: Model,
    values: Sequence[ir.Value],
    samples: Samples,
    *,
    batch_size: int | None = None,
    keep: bool = False,
    exact: Container[ir.Value] = (),
    progress: ProgressCallback | None = None,
) -> tuple[dict[str, Observer], list[Batch]]:
    """Observe tensors over all samples, once, one batch of activations in memory.

    Parameters
    ----------
    model
        The float model; it is not changed.
    values
        Float tensors of its main graph and of the bodies of its loops.
    samples
        The calibration data.
    batch_size
        Samples a run; by default as many as keep the watched tensors below 192 MiB, 1 to 32.
    keep
        Whether to hand samples back: spread evenly over all, 8 to 64, as many as their watched
        tensors stay below 192 MiB.
    exact
        Values whose observers count every element.
    progress
        Called after every batch.

    Returns
    -------
    observers
        Value name to what was observed.
    kept
        The samples kept, in batches of a quarter of the size used.

    Raises
    ------
    DataError
        If the data do not fit.
    RunError
        If a tensor becomes NaN or infinite; it is named.
    """
    watched = list(dict.fromkeys(values))
    observers = {str(value.name): Observer(exact=value in exact) for value in watched}
    inputs = set(model.graph.inputs)
    session_outputs = [value for value in watched if value not in inputs]
    fed = {str(value.name) for value in watched if value in inputs}
    proto = model.to_proto_with_outputs(session_outputs)  # in this order
    try:
        session = make_session(proto, optimize=True)
    except Exception as error:  # onnxruntime raises several kinds
        raise ModelError(
            f"onnxruntime cannot run the model ({str(error).splitlines()[0][:300]})",
            where=model.source,
        ) from error
    del proto
    names = [str(value.name) for value in session_outputs]

    def run(batch: Batch, first: int) -> list[Array]:
        try:
            return list(session.run(None, batch.inputs)) if names else []
        except Exception as error:
            raise DataError(
                f"the model fails on samples {first} to {first + batch.samples - 1} "
                f"({str(error).splitlines()[0][:300]})",
                where=samples.where,
            ) from error

    # Shapes are often symbolic all the way, so what a sample takes is measured on the first.
    probe = next(samples.batches(1))
    sample_bytes = max(sum(array.nbytes for array in run(probe, 0)) // probe.samples, 1)
    affordable = _BATCH_BYTES // sample_bytes
    if batch_size is None:
        batch_size = min(max(affordable, 1), _MAX_BATCH)
    wanted = min(max(affordable, _KEPT[0]), _KEPT[1]) if keep else 0
    picked = {int(index) for index in np.linspace(0, len(samples) - 1, wanted)}
    kept: list[Batch] = []
    done = 0
    for batch in samples.batches(batch_size):
        rows = [index - done for index in sorted(picked) if done <= index < done + batch.samples]
        if rows and sum(entry.samples for entry in kept) < wanted:
            kept.append(batch if samples.fixed_batch else _rows(batch, rows))
        results = run(batch, done)
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
        del results, pairs, array  # or the next run holds two batches of activations
        done += batch.samples
        if progress is not None:
            progress(done, len(samples))
    if kept and not samples.fixed_batch:
        # Small ones: whoever runs them records inputs and outputs of layers, and works on them.
        kept = _regroup(kept, max(batch_size // 4, 1))
    return observers, kept


def _rows(batch: Batch, rows: list[int]) -> Batch:
    return Batch({name: array[rows] for name, array in batch.inputs.items()}, None, len(rows))


def _regroup(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Join batches and cut them into batches of ``size`` samples."""
    joined = {
        name: np.concatenate([batch.inputs[name] for batch in batches])
        for name in batches[0].inputs
    }
    count = sum(batch.samples for batch in batches)
    whole = Batch(joined, None, count)
    return [
        _rows(whole, list(range(start, min(start + size, count))))
        for start in range(0, count, size)
    ]
