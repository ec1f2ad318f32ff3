"""Choose scales by the error they cause where it matters: at the output of the layer.

The mean squared error of a tensor by itself misleads: clipping shrinks the largest values all in
one direction, and a layer adds such errors up, while rounding errors cancel. So for a few
calibration samples every layer is run on its float input with candidate scales, and

1. each activation gets the scale, near the one its histogram suggests, and each output channel of
   the weights gets the scale that leave the least squared error at the outputs of the layer,
   the mean error of the channel left aside;
2. that mean error, which any rounding of weights and activations leaves, is taken off the bias.
   A layer without a bias that could be shifted has its mean error counted like the rest.

Soft-edge layouts, whose segments fit the histogram, keep the step that goes with them; what they
leave in the mean is taken off the bias too.

The few samples do not overrule all the others: a scale that the histogram of the whole calibration
finds far worse than its best is no candidate.

Activations, weights and layers are treated one by one, all others float: what is chosen for a
layer depends on the layer and its own precision alone (and, where layers share an input at the same
bits, on those).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from bitwright.errors import DataError, first_line
from bitwright.quant.float_ops import Array, make_session
from bitwright.quant.graph import channel_axis, constant, graph_of, weight_input
from bitwright.quant.load import Model
from bitwright.quant.observers import (
    Observer,
    TensorQuantization,
    quantize_weights,
    squared_error,
)
from bitwright.quant.samples import Batch, ProgressCallback
from bitwright.vocabulary import Activation, Precision

__all__ = ["LayerChoice", "Refinement", "measure_errors"]

# Relative to the scale that the histogram suggests; more than the calibrated range is never kept.
_ACTIVATION_PARTS = (0.65, 0.8, 1.0, 1.2, 1.45, 1.8, 2.4)
_HISTOGRAM_TOLERANCE = 2.0  # in squared error: 3 dB
# Relative to the largest weight of the channel.
_WEIGHT_PARTS = {2: (0.25, 1.0), 4: (0.4, 1.0), 8: (0.6, 1.0)}
_WEIGHT_STEPS = 6


_Key: TypeAlias = tuple[str, Activation]  # name of a value, form of its codes
_Candidate: TypeAlias = tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]


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

    weight_codes: npt.NDArray[np.integer[Any]] | None = None
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

    def __init__(self, node: ir.Node, graph: ir.Graph, opset: int, *, shiftable: bool) -> None:
        self.shiftable = shiftable
        self._in_loop = node.graph is not graph
        index = weight_input(node)
        assert index is not None
        data, weights = node.inputs[1 - index], node.inputs[index]
        assert data is not None
        assert weights is not None
        self.node = node
        self.data = data
        self._recorded_by_step = graph_of(data) is node.graph
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
        if self._in_loop:
            x, y = self._by_step(x, y)
        quantized = "scale" in parameters
        if quantized not in self._sessions:
            self._sessions[quantized] = self._session(x.ndim, y.ndim, quantized=quantized)
        mean, square = self._sessions[quantized].run(None, {"x": x, "y": y, **parameters})
        channels = 1 if self.axis is None else self.weights.shape[self.axis]
        return mean.reshape(-1, channels), square.reshape(-1, channels)

    def _by_step(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Bring what was recorded in a loop, one entry a step, into the form of a plain product."""
        if not self._recorded_by_step:  # it comes from the graph around the loop
            x = np.broadcast_to(x, (len(y), *x.shape))
        if self.node.op_type == "Gemm":
            return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        missing = max(self.weights.ndim - (x.ndim - 1), 0)
        return x.reshape(len(x), *(1,) * missing, *x.shape[1:]), y

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
        quantization.layout,
    )
    limit = _HISTOGRAM_TOLERANCE * errors.min()
    return [scale for scale, error in zip(scales, errors, strict=True) if error <= limit]


def _scale_candidates(
    observer: Observer, quantization: TensorQuantization, *, several: bool
) -> list[float]:
    scale = quantization.scale
    if quantization.layout is not None:
        return [scale]
    limit = max(_largest_scale(observer, quantization), scale)
    parts = _ACTIVATION_PARTS if several else (1.0,)
    scales = sorted({float(np.float32(min(scale * part, limit))) for part in parts})
    return _plausible(scales, observer, quantization)


def _weight_candidates(
    weights: npt.NDArray[np.float32], axis: int | None, bits: int
) -> list[_Candidate]:
    candidates = []
    for part in np.linspace(*_WEIGHT_PARTS[bits], _WEIGHT_STEPS):
        codes, scales = quantize_weights(weights, bits, axis=axis, part=float(part))
        candidates.append((codes.astype(np.int8), scales))  # at most 8 bits; there are many
    return candidates


def _expand(scales: Array, axis: int | None, rank: int) -> Array:
    shape = [1] * rank
    if axis is not None and scales.ndim:
        shape[axis] = -1
    return scales.reshape(shape) if scales.ndim else scales


class Refinement:
    """What :func:`measure_errors` found: enough to choose scales and bias shifts for any plan.

    Parameters
    ----------
    layers
        Layer name to the name of its data input.
    quantizations
        What histograms suggest.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        quantizations: Mapping[_Key, TensorQuantization],
    ) -> None:
        self._layers = dict(layers)
        self._quantizations = quantizations
        self._activations: dict[_Key, dict[float, dict[str, _Error]]] = {}
        self._weights: dict[tuple[str, int], _Weights] = {}
        self._power: dict[str, float] = {}

    def choose(
        self, precisions: Mapping[str, Precision]
    ) -> tuple[dict[tuple[str, Activation], TensorQuantization], dict[str, LayerChoice]]:
        """Choose for some layers, among them all or none of those that share a data input.

        Returns
        -------
        quantizations
            The activations that changed.
        choices
            Layer name to choice.
        """
        sharing: dict[_Key, list[str]] = {}
        for name, precision in precisions.items():
            key = (self._layers[name], precision.activation)
            sharing.setdefault(key, []).append(name)
        chosen: dict[_Key, TensorQuantization] = {}
        for key, names in sharing.items():
            candidates = self._activations.get(key, {})
            sums = [_total([errors[name] for name in names]) for errors in candidates.values()]
            # Infinite, too large for float32: the histogram's choice stays.
            if sums and np.isfinite(min(sums)):
                scale = list(candidates)[int(np.argmin(sums))]
                chosen[key] = replace(self._quantizations[key], scale=scale)
        choices = {
            name: self._choose_layer(
                name, precision, chosen.get((self._layers[name], precision.activation))
            )
            for name, precision in precisions.items()
        }
        return chosen, choices

    def _choose_layer(
        self, name: str, precision: Precision, activation: TensorQuantization | None
    ) -> LayerChoice:
        choice = LayerChoice()
        shift: Array = np.zeros(())
        if activation is not None:
            key = (self._layers[name], precision.activation)
            error = self._activations[key][activation.scale][name]
            if error.samples:
                shift = shift - _reliable(error.mean, error.mean_variance, error.samples)
        weights = self._weights.get((name, precision.weight_bits))
        if weights is not None:
            choice.weight_codes, choice.weight_scales = weights.codes, weights.scales
            shift = shift - weights.mean
        if shift.ndim and np.any(shift):
            choice.bias_shift = shift.astype(np.float32)
        return choice

    def noise(self, name: str, precision: Precision) -> float:
        """Noise that a precision adds to the output of one layer, relative to its power.

        Mean squared error left by rounding weights and activations, each by itself, over the mean
        square of the float output. 16 bits count as exact.
        """
        key = (self._layers[name], precision.activation)
        sums = [_total([errors[name]]) for errors in self._activations.get(key, {}).values()]
        noise = min(sums, default=0.0)
        weights = self._weights.get((name, precision.weight_bits))
        noise += 0.0 if weights is None else weights.variance
        power = self._power.get(name, 0.0)
        return noise / power if power > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class _Weights:
    """The best weights of a layer at some bits, and the error they leave."""

    codes: npt.NDArray[np.integer[Any]]
    scales: npt.NDArray[np.float32]
    mean: Array
    variance: float


def measure_errors(
    model: Model,
    layers: Mapping[ir.Node, bool],
    quantizations: Mapping[tuple[str, Activation], TensorQuantization],
    observers: Mapping[str, Observer],
    precisions: Mapping[str, Sequence[Precision]],
    kept: Sequence[Batch],
    *,
    per_channel: bool,
    fixed: Collection[tuple[str, Activation]],
    progress: ProgressCallback | None = None,
) -> Refinement:
    """Measure on recorded samples what candidate scales do to the output of each layer.

    Parameters
    ----------
    model
        The float model.
    layers
        Its layers, and whether each has a bias that can be shifted.
    quantizations
        For the name of each data input of a layer and its form, what the histogram suggests.
    observers
        Value name to observer.
    precisions
        Layer name to the precisions that will be asked for.
    kept
        Samples to run, in batches that fit memory.
    per_channel
        Whether output channels have weight scales of their own.
    fixed
        Activations, by name and form, whose scales stay as they are.
    progress
        Called with the samples done and in total.
    """
    probes = [_Probe(node, model.graph, model.opset, shiftable=yes) for node, yes in layers.items()]
    names = {probe: str(probe.node.name) for probe in probes}
    found = Refinement({names[probe]: str(probe.data.name) for probe in probes}, quantizations)
    weight_candidates: dict[tuple[str, int], list[_Candidate]] = {}
    weight_errors: dict[tuple[str, int], list[_Error]] = {}
    power: dict[str, list[float]] = {name: [] for name in names.values()}
    for probe in probes:
        name, data = names[probe], str(probe.data.name)
        forms = dict.fromkeys(entry.activation for entry in precisions[name])
        for form in (form for form in forms if form.bits < 16):
            key = (data, form)
            if key not in found._activations:
                scales = _scale_candidates(
                    observers[data], quantizations[key], several=key not in fixed
                )
                found._activations[key] = {scale: {} for scale in scales}
            for errors in found._activations[key].values():
                errors[name] = _Error(removable=probe.shiftable)
        axis = probe.axis if per_channel else None
        for bits in sorted({entry.weight_bits for entry in precisions[name]} - {16}):
            candidates = _weight_candidates(probe.weights, axis, bits)
            weight_candidates[name, bits] = candidates
            weight_errors[name, bits] = [_Error(removable=probe.shiftable) for _ in candidates]

    def measure(probe: _Probe, x: Array, y: Array) -> None:
        name = names[probe]
        power[name].append(float(np.square(y, dtype=np.float64).sum()) / y.size)
        for (value, form), candidates in found._activations.items():
            if value != probe.data.name or name not in next(iter(candidates.values())):
                continue
            quantization = quantizations[value, form]
            layout = quantization.layout
            if layout is not None:
                for scale, errors in candidates.items():
                    rounded = layout.decode(layout.encode(x, scale)) * np.float32(scale)
                    errors[name].add(*probe.run(rounded, y, {"w": probe.weights}))
                continue
            low = np.array(quantization.code_min - quantization.zero_point, np.float32)
            high = np.array(quantization.code_max - quantization.zero_point, np.float32)
            for scale, errors in candidates.items():
                step = np.array(scale, np.float32)
                errors[name].add(*probe.run(x, y, {"scale": step, "low": low, "high": high}))
        axis = probe.axis if per_channel else None
        for key, errors_of in weight_errors.items():
            if key[0] == name:
                for (codes, scales), error in zip(weight_candidates[key], errors_of, strict=True):
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

    axes = {names[probe]: probe.axis if per_channel else None for probe in probes}
    for (name, bits), entries in weight_errors.items():
        if all(e.samples and np.isfinite(e.variance).all() for e in entries):
            best = _best_weights(weight_candidates.pop((name, bits)), entries, axes[name])
            found._weights[name, bits] = best
    # Errors are sums over the channels of mean squares, and so is this.
    for probe in probes:
        channels = 1 if probe.axis is None else probe.weights.shape[probe.axis]
        if power[names[probe]]:
            found._power[names[probe]] = channels * float(np.mean(power[names[probe]]))
    return found


def _total(errors: Sequence[_Error]) -> float:
    return sum(float(error.variance.sum()) for error in errors if error.samples)


def _best_weights(
    candidates: Sequence[_Candidate], errors: Sequence[_Error], axis: int | None
) -> _Weights:
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
    left = float(variances[best, channels].sum())
    if axis is None:
        codes, scales = candidates[best[0]]
        return _Weights(codes, scales, reliable, left)
    scales = np.stack([entry for _, entry in candidates])[best, channels]
    stacked = np.stack([np.moveaxis(codes, axis, 0) for codes, _ in candidates])
    codes = np.moveaxis(stacked[best, channels], 0, axis)
    return _Weights(np.ascontiguousarray(codes), scales, reliable, left)


class _Recorder:
    """Runs the float model and returns inputs and outputs of the layers."""

    def __init__(self, model: Model, probes: Sequence[_Probe]) -> None:
        self._source = model.source
        values = [v for probe in probes for v in (probe.data, probe.node.outputs[0])]
        inputs = set(model.graph.inputs)
        self._computed = [v for v in dict.fromkeys(values) if v not in inputs]
        self._names = [str(value.name) for value in self._computed]
        self._session = make_session(model.to_proto_with_outputs(self._computed), optimize=True)

    def run(self, batch: Batch) -> dict[str, Array]:
        try:
            results = self._session.run(None, batch.inputs) if self._names else []
        except Exception as error:  # onnxruntime raises several kinds
            raise DataError(
                f"the model fails on batches of {batch.samples} samples ({first_line(error)})",
                where=self._source,
                fix="its batch may be fixed; see that it runs with any number of samples",
            ) from error
        return {**batch.inputs, **dict(zip(self._names, results, strict=True))}
