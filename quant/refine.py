"""Choose scales by the error they cause where it matters: at the output of the layer.

The mean squared error of a tensor by itself misleads: clipping shrinks the largest values all in
one direction, and a layer adds such errors up, while rounding errors cancel. So for a few
calibration samples every layer is run on its float input with candidate scales, and

1. each activation gets the scale, near the one its histogram suggests, and each output channel of
   the weights gets the scale that leave the least squared error at the outputs of the layer,
   the mean error of the channel left aside;
2. that mean error, which any rounding of weights and activations leaves, is taken off the bias.
   A layer without a bias that could be shifted has its mean error counted like the rest.

The few samples do not overrule all the others: a scale that the histogram of the whole calibration
finds far worse than its best is no candidate.

Activations, weights and layers are treated one by one, all others float: what is chosen for a
layer depends on the layer and its own precision alone (and, where layers share an input at the same
bits, on those).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from bitwright.errors import DataError, first_line
from bitwright.quant.float_ops import Array, make_session
from bitwright.quant.graph import channel_axis, constant, weight_input
from bitwright.quant.load import Model
from bitwright.quant.observers import (
    Observer,
    TensorQuantization,
    quantize_weights,
    squared_error,
)
from bitwright.quant.samples import Batch, ProgressCallback

__all__ = ["LayerChoice", "refine"]

# Relative to the scale that the histogram suggests; more than the calibrated range is never kept.
_ACTIVATION_PARTS = (0.65, 0.8, 1.0, 1.2, 1.45, 1.8, 2.4)
_HISTOGRAM_TOLERANCE = 2.0  # in squared error: 3 dB
# Relative to the largest weight of the channel.
_WEIGHT_PARTS = {2: (0.25, 1.0), 4: (0.4, 1.0), 8: (0.6, 1.0)}
_WEIGHT_STEPS = 6


@dataclass(slots=True)
class LayerChoice:
    """What was chosen for one layer.

    Attributes
    ----------
    weight_codes, weight_scales
        As :func:`~bitwright.quant.observers.quantize_weights` gives them; None to use that.
    bias_shift
        What to add to the bias, one value an output channel; None for nothing.
    """

    weight_codes: npt.NDArray[np.int32] | None = None
    weight_scales: npt.NDArray[np.float32] | None = None
    bias_shift: npt.NDArray[np.float32] | None = None


class _Error:
    """Output errors of one candidate, accumulated over samples, one entry a channel."""

    def __init__(self, *, removable: bool) -> None:
        self.samples = 0
        self._removable = removable
        self._means: Array = np.zeros(())
        self._squared_means: Array = np.zeros(())
        self._squares: Array = np.zeros(())

    def add(self, means: Array, squares: Array) -> None:
        """Add samples: mean error and mean squared error, each [samples, channels]."""
        self.samples += len(means)
        self._means = self._means + means.sum(axis=0, dtype=np.float64)
        self._squared_means = self._squared_means + np.square(means, dtype=np.float64).sum(axis=0)
        self._squares = self._squares + squares.sum(axis=0, dtype=np.float64)

    @property
    def mean(self) -> Array:
        """Mean error, as far as it can be taken off."""
        if not self._removable:
            return np.zeros_like(self._means)
        return np.asarray(self._means / self.samples)

    @property
    def mean_variance(self) -> Array:
        """Variance of the mean, from its scatter over the samples."""
        scatter = np.maximum(self._squared_means / self.samples - np.square(self.mean), 0.0)
        return scatter / max(self.samples - 1, 1)

    @property
    def variance(self) -> Array:
        """Mean squared error that is left without the mean error; inf if it overflowed."""
        left = np.maximum(self._squares / self.samples - np.square(self.mean), 0.0)
        return np.where(np.isfinite(left), left, np.inf)


def _reliable(mean: Array, variance: Array, samples: int) -> Array:
    """Shrink the means of a layer's channels towards 0 as far as chance explains them.

    The positive-part James-Stein estimator: means that scatter as much as their own uncertainty
    says nothing about other samples.
    """
    power = float(np.square(mean).sum())
    if samples < 2 or power == 0.0:
        return np.zeros_like(mean)
    return mean * max(1.0 - float(variance.sum()) / power, 0.0)


class _Probe:
    """One layer, run by itself on recorded inputs, its output compared with the recorded one."""

    def __init__(self, node: ir.Node, opset: int, *, shiftable: bool) -> None:
        self.shiftable = shiftable
        index = weight_input(node)
        assert index is not None
        data, weights = node.inputs[1 - index], node.inputs[index]
        assert data is not None
        assert weights is not None
        self.node = node
        self.data = data
        array = constant(weights)
        assert array is not None
        self.weights: npt.NDArray[np.float32] = array
        self.axis = channel_axis(node, array.ndim)
        self._opset = opset
        self._index = index
        self._sessions: dict[bool, ort.InferenceSession] = {}

    def run(self, x: Array, y: Array, parameters: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return mean error and mean squared error, each [samples, channels].

        ``parameters`` holds ``scale``, ``low`` and ``high`` for a quantized input, or ``w`` for
        other weights.
        """
        quantized = "scale" in parameters
        if quantized not in self._sessions:
            self._sessions[quantized] = self._session(x.ndim, y.ndim, quantized=quantized)
        mean, square = self._sessions[quantized].run(None, {"x": x, "y": y, **parameters})
        channels = 1 if self.axis is None else self.weights.shape[self.axis]
        return mean.reshape(-1, channels), square.reshape(-1, channels)

    def close(self) -> None:
        """Let go of the sessions: each has threads and memory of its own."""
        self._sessions.clear()

    def _session(self, x_rank: int, y_rank: int, *, quantized: bool) -> ort.InferenceSession:
        helper, kind = onnx.helper, onnx.TensorProto.FLOAT
        layer = ir.to_proto(self.node)
        names = ["", ""]
        names[self._index], names[1 - self._index] = "w", "codes" if quantized else "x"
        if self.node.op_type == "Conv":
            channels = 1
        else:
            channels = y_rank - (1 if self._index == 1 else 2)
        # Without a channel axis (a vector of weights) all errors count as one channel.
        kept = (0,) if self.axis is None else (0, channels)
        reduced = [axis for axis in range(y_rank) if axis not in kept]
        stored: dict[str, Array] = {"w": self.weights, "axes": np.array(reduced, np.int64)}
        bias = constant(self.node.inputs[2]) if len(self.node.inputs) > 2 else None
        if bias is not None:
            names.append("b")
            stored["b"] = bias
        del layer.input[:], layer.output[:]
        layer.input.extend(names)
        layer.output.append("result")
        # QuantizeLinear and DequantizeLinear spelled out: any width, scale as an input.
        nodes = [
            helper.make_node("Div", ["x", "scale"], ["divided"]),
            helper.make_node("Round", ["divided"], ["rounded"]),
            helper.make_node("Clip", ["rounded", "low", "high"], ["clipped"]),
            helper.make_node("Mul", ["clipped", "scale"], ["codes"]),
        ]
        nodes = [*(nodes if quantized else []), layer]
        nodes += [
            helper.make_node("Sub", ["result", "y"], ["error"]),
            helper.make_node("Mul", ["error", "error"], ["squared"]),
            helper.make_node(
                "ReduceMean", ["error", "axes"], ["mean"], keepdims=0, noop_with_empty_axes=1
            ),
            helper.make_node(
                "ReduceMean", ["squared", "axes"], ["square"], keepdims=0, noop_with_empty_axes=1
            ),
        ]
        ranks = {"x": x_rank, "y": y_rank}
        if quantized:
            ranks |= {"scale": 0, "low": 0, "high": 0}
        else:
            del stored["w"]
            ranks["w"] = self.weights.ndim
        graph = helper.make_graph(
            nodes,
            "probe",
            [helper.make_tensor_value_info(n, kind, [None] * r) for n, r in ranks.items()],
            [onnx.ValueInfoProto(name="mean"), onnx.ValueInfoProto(name="square")],
            [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
        )
        opsets = [helper.make_opsetid("", self._opset)]
        return make_session(
            helper.make_model(graph, opset_imports=opsets, ir_version=10),
            optimize=True,
            lean=True,
        )


def _largest_scale(observer: Observer, quantization: TensorQuantization) -> float:
    """The scale that keeps the whole calibrated range."""
    above = quantization.code_max - quantization.zero_point
    below = quantization.zero_point - quantization.code_min
    return max(observer.maximum / max(above, 1), -observer.minimum / max(below, 1))


def _plausible(
    scales: list[float], observer: Observer, quantization: TensorQuantization
) -> list[float]:
    """Scales whose error over the whole calibration is not far above the least."""
    errors = squared_error(
        observer,
        np.array(scales),
        np.full(len(scales), float(quantization.zero_point)),
        quantization.code_min,
        quantization.code_max,
    )
    limit = _HISTOGRAM_TOLERANCE * errors.min()
    return [scale for scale, error in zip(scales, errors, strict=True) if error <= limit]


def _weight_candidates(
    weights: npt.NDArray[np.float32], axis: int | None, bits: int
) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    low, high = _WEIGHT_PARTS[bits]
    parts = np.linspace(low, high, _WEIGHT_STEPS)
    return [quantize_weights(weights, bits, axis=axis, part=float(part)) for part in parts]


def _expand(scales: Array, axis: int | None, rank: int) -> Array:
    shape = [1] * rank
    if axis is not None and scales.ndim:
        shape[axis] = -1
    return scales.reshape(shape) if scales.ndim else scales


def refine(
    model: Model,
    layers: Mapping[ir.Node, bool],
    quantizations: Mapping[tuple[ir.Value, int], TensorQuantization],
    observers: Mapping[str, Observer],
    precisions: Mapping[str, Any],
    kept: Sequence[Batch],
    *,
    per_channel: bool,
    activations: bool,
    progress: ProgressCallback | None = None,
) -> tuple[dict[tuple[ir.Value, int], TensorQuantization], dict[str, LayerChoice]]:
    """Choose scales and bias shifts on recorded samples.

    Parameters
    ----------
    model
        The float model.
    layers
        Its layers, and whether each has a bias that can be shifted.
    quantizations
        For each data input of a layer and its bits, what the histogram suggests.
    observers
        Value name to observer.
    precisions
        Layer name to precision.
    kept
        Samples to run, in batches that fit memory.
    per_channel
        Whether output channels have weight scales of their own.
    activations
        Whether the scales of activations are chosen here too; otherwise they stay.
    progress
        Called with the samples done and in total.

    Returns
    -------
    quantizations
        The activations that changed.
    choices
        Layer name to choice.
    """
    probes = [_Probe(node, model.opset, shiftable=yes) for node, yes in layers.items()]
    activation_errors: dict[tuple[_Key, float], dict[str, _Error]] = {}
    candidates: dict[_Key, list[float]] = {}
    for probe in probes:
        key = (probe.data, precisions[str(probe.node.name)].activation_bits)
        scale = quantizations[key].scale
        limit = max(_largest_scale(observers[str(probe.data.name)], quantizations[key]), scale)
        parts = _ACTIVATION_PARTS if activations and key[1] < 16 else (1.0,)
        scales = sorted({float(np.float32(min(scale * p, limit))) for p in parts})
        candidates[key] = _plausible(scales, observers[str(probe.data.name)], quantizations[key])
        for scale in candidates[key]:
            activation_errors.setdefault((key, scale), {})[str(probe.node.name)] = _Error(
                removable=probe.shiftable
            )
    weight_candidates = {}
    weight_errors: dict[str, list[_Error]] = {}
    for probe in probes:
        name, bits = str(probe.node.name), precisions[str(probe.node.name)].weight_bits
        if bits < 16:
            axis = probe.axis if per_channel else None
            weight_candidates[name] = _weight_candidates(probe.weights, axis, bits)
            weight_errors[name] = [
                _Error(removable=probe.shiftable) for _ in weight_candidates[name]
            ]

    def measure(probe: _Probe, x: Array, y: Array) -> None:
        name = str(probe.node.name)
        key = (probe.data, precisions[name].activation_bits)
        quantization = quantizations[key]
        low = np.array(quantization.code_min - quantization.zero_point, np.float32)
        high = np.array(quantization.code_max - quantization.zero_point, np.float32)
        for scale in candidates[key] if key[1] < 16 else ():
            step = np.array(scale, np.float32)
            error = activation_errors[key, scale][name]
            error.add(*probe.run(x, y, {"scale": step, "low": low, "high": high}))
        axis = probe.axis if per_channel else None
        for (codes, scales), error in zip(
            weight_candidates.get(name, ()), weight_errors.get(name, ()), strict=True
        ):
            w = codes.astype(np.float32) * _expand(scales, axis, codes.ndim)
            error.add(*probe.run(x, y, {"w": w.astype(np.float32)}))
        probe.close()

    recorder = _Recorder(model, probes)
    done = 0
    # Layers are independent, and onnxruntime works outside Python's lock: one layer a core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in kept:
            values = recorder.run(batch)
            jobs = []
            for probe in probes:
                x, y = values[str(probe.data.name)], values[str(probe.node.outputs[0].name)]
                if y.size:
                    jobs.append(pool.submit(measure, probe, x, y))
            for job in jobs:
                job.result()
            done += batch.samples
            if progress is not None:
                progress(done, sum(entry.samples for entry in kept))
            del values, x, y, jobs  # or the next run holds two batches of activations

    chosen: dict[_Key, TensorQuantization] = {}
    for key, steps in candidates.items():
        if key[1] < 16 and kept:
            sums = [_total(activation_errors.get((key, step), {})) for step in steps]
            if not np.isfinite(min(sums)):  # too large for float32: the histogram's choice stays
                continue
            chosen[key] = replace(quantizations[key], scale=steps[int(np.argmin(sums))])
    choices = {}
    for probe in probes:
        name = str(probe.node.name)
        choice = choices[name] = LayerChoice()
        key = (probe.data, precisions[name].activation_bits)
        shift: Array = np.zeros(())
        if key in chosen:
            found = activation_errors.get((key, chosen[key].scale), {}).get(name)
            if found is not None and found.samples:
                shift = shift - _reliable(found.mean, found.mean_variance, found.samples)
        errors = weight_errors.get(name, [])
        if errors and all(e.samples and np.isfinite(e.variance).all() for e in errors):
            axis = probe.axis if per_channel else None
            best = _best_weights(weight_candidates[name], errors, axis)
            choice.weight_codes, choice.weight_scales, mean = best
            shift = shift - mean
        if shift.ndim and np.any(shift):
            choice.bias_shift = shift.astype(np.float32)
    return chosen, choices


_Key = tuple[ir.Value, int]


def _total(errors: Mapping[str, _Error]) -> float:
    return sum(float(error.variance.sum()) for error in errors.values() if error.samples)


def _best_weights(
    candidates: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]],
    errors: Sequence[_Error],
    axis: int | None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], Array]:
    """Codes and scales with the least output variance, and the mean error they leave.

    Each channel gets the best of its own, or all get one where there is one scale.
    """
    variances = np.stack([error.variance for error in errors])
    best = np.argmin(
        variances if axis is not None else variances.sum(axis=1, keepdims=True), axis=0
    )
    best = np.broadcast_to(best, variances.shape[1:])
    channels = np.arange(best.size)
    mean = np.stack([error.mean for error in errors])[best, channels]
    variance = np.stack([error.mean_variance for error in errors])[best, channels]
    reliable = _reliable(mean, variance, errors[0].samples)
    if axis is None:
        return *candidates[best[0]], reliable
    scales = np.stack([entry for _, entry in candidates])[best, channels]
    stacked = np.stack([np.moveaxis(codes, axis, 0) for codes, _ in candidates])
    codes = np.moveaxis(stacked[best, channels], 0, axis)
    return np.ascontiguousarray(codes), scales, reliable


class _Recorder:
    """Runs the float model and returns inputs and outputs of the layers."""

    def __init__(self, model: Model, probes: Sequence[_Probe]) -> None:
        self._source = model.source
        values = [v for probe in probes for v in (probe.data, probe.node.outputs[0])]
        self._computed = [v for v in dict.fromkeys(values) if not v.is_graph_input()]
        self._names = [str(value.name) for value in self._computed]
        self._session = make_session(model.to_proto_with_outputs(self._computed), optimize=True)

    def run(self, batch: Batch) -> dict[str, Array]:
        try:
            results = self._session.run(self._names, batch.inputs)
        except Exception as error:  # onnxruntime raises several kinds
            raise DataError(
                f"the model fails on batches of {batch.samples} samples ({first_line(error)})",
                where=self._source,
                fix="its batch may be fixed; see that it runs with any number of samples",
            ) from error
        return {**batch.inputs, **dict(zip(self._names, results, strict=True))}
