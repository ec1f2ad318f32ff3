"""Choose form and range of every activation tensor by what they do to the outputs of the model.

The float model is cut behind every tensor that a layer or a selective scan reads. From cut to cut
the values are at hand, so that a candidate for one tensor costs a run of the rest of the model
alone. First each tensor is tried by itself, all others float; then all together take their best,
and, in order of execution, each takes what is best with all others as they are at that time. Where
time steps of a selective scan come out of a softplus, and no layer reads either, what that softplus
reads is tried as well; of the two, that is quantized which alone leaves less noise.

Weights stay float, and so do operators between layers: both add the same to all candidates. Layers
in the bodies of loops keep the form that the plan gives them.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from bitwright.errors import ModelError, UsageError, first_line
from bitwright.quant.blocked import values_read
from bitwright.quant.float_ops import Array, make_session
from bitwright.quant.graph import constant, weight_input
from bitwright.quant.layers import layer_nodes
from bitwright.quant.load import Model
from bitwright.quant.observers import Observer, TensorQuantization, expected_sqnr_db
from bitwright.quant.placement import Placement
from bitwright.quant.quantizer import calibrate_model
from bitwright.quant.recipes import RecipeName, get_recipe
from bitwright.quant.samples import Batch, ProgressCallback, Samples
from bitwright.quant.selective_scan import selective_scans
from bitwright.quant.soft_edge import choose_activation
from bitwright.vocabulary import Activation, Precision, PrecisionPlan

__all__ = ["FORMS", "PERCENTILES", "FormChoices", "TensorForms", "choose_tensor_forms"]

FORMS: Final = ("a8", "a8se", "a8se8")
"""Forms that are tried, if not told otherwise."""

PERCENTILES: Final = (99.0, 99.9, 99.99, 99.999, 100.0)
"""Percentiles that are tried, if not told otherwise."""

_HOPELESS_DB = 10.0  # below the best of a tensor, on its histogram
_FINALISTS = 4  # candidates of a tensor that are tried together with the other tensors

Candidate: TypeAlias = tuple[Activation, float]
"""A form and a percentile."""

_Values: TypeAlias = dict[str, Array]
_Quantizer: TypeAlias = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class TensorForms:
    """What was found about one tensor.

    Attributes
    ----------
    name
        The tensor, named as in the float model.
    readers
        Layers and selective scans that read it.
    form, percentile
        What was chosen; None where another tensor is quantized in place of this one.
    alone_db
        Candidates that were tried, to the signal-to-noise ratio at the outputs, in dB, with this
        tensor alone quantized.
    """

    name: str
    readers: tuple[str, ...]
    form: Activation | None
    percentile: float | None
    alone_db: Mapping[Candidate, float]


@dataclass(frozen=True, slots=True)
class FormChoices:
    """The forms that were chosen.

    Attributes
    ----------
    plan
        A plan with them: formats of layers, scan inputs and percentiles.
    tensors
        One entry a tensor, in order of execution.
    sqnr_db
        Signal-to-noise ratio at the outputs, in dB, with all tensors as chosen.
    uniform_db
        The same with one form and one percentile for all tensors.
    samples
        How many samples were run.
    """

    plan: PrecisionPlan
    tensors: tuple[TensorForms, ...]
    sqnr_db: float
    uniform_db: Mapping[Candidate, float]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""

        def table(entries: Mapping[Candidate, float]) -> list[dict[str, Any]]:
            return [
                {"form": str(form), "percentile": percent, "sqnr_db": decibels}
                for (form, percent), decibels in entries.items()
            ]

        return {
            "samples": self.samples,
            "sqnr_db": self.sqnr_db,
            "uniform": table(self.uniform_db),
            "tensors": [
                {
                    "name": entry.name,
                    "readers": list(entry.readers),
                    "form": None if entry.form is None else str(entry.form),
                    "percentile": entry.percentile,
                    "alone": table(entry.alone_db),
                }
                for entry in self.tensors
            ],
        }


def choose_tensor_forms(
    model: Model,
    plan: PrecisionPlan,
    samples: Samples,
    *,
    forms: Sequence[Activation],
    percentiles: Sequence[float] = PERCENTILES,
    recipe: RecipeName = "default",
    rotation: bool = True,
    count: int = 16,
    progress: ProgressCallback | None = None,
) -> FormChoices:
    """Choose for every tensor that layers and selective scans read; the model is consumed.

    Parameters
    ----------
    model
        A float model.
    plan
        A plan that fits it: weight bits, and all else that is not chosen here. Its ``scan_inputs``
        are chosen anew.
    samples
        Calibration data.
    forms, percentiles
        What is tried for every tensor.
    recipe, rotation
        As in :func:`~bitwright.quant.quantizer.quantize_model`.
    count
        How many samples, spread over all, candidates are run on.
    progress
        Called with runs done and in total; first with samples of calibration.

    Raises
    ------
    ModelError, DataError, RunError, UsageError
        If the model or the samples do not fit, or there is nothing to choose from.
    """
    if not forms or not percentiles or count < 1:
        raise UsageError(
            "there is nothing to choose from",
            fix="give one form, one percentile and one sample at least",
        )
    if not any(value.dtype.kind == "f" for value in model.outputs):
        names = ", ".join(repr(value.name) for value in model.outputs)
        raise ModelError(
            f"no output is of floats ({names}), so that no noise can be measured there",
            where=model.source,
            fix="give a model that ends in front of its ArgMax, TopK or Cast",
        )
    options = get_recipe(recipe).with_options(rotation=rotation)
    read_by_layers, read_by_scans, behind = _reads(model)
    reads = {
        name: [*read_by_layers.get(name, ()), *read_by_scans.get(name, ())]
        for name in {**read_by_layers, **read_by_scans}
    }
    scan_inputs = dict.fromkeys(read_by_scans, Activation(8))
    found = calibrate_model(
        model,
        {name: [Precision(entry.weight_bits, 8)] for name, entry in plan.layers.items()},
        samples,
        elementwise_bits=plan.elementwise_bits,
        loop_bits=plan.loop_bits,
        scan_inputs=scan_inputs,
        percentiles=dict.fromkeys(reads, 100.0),  # every value counts in the histograms
        recipe=recipe,
        clip="minmax",
        rotation=rotation,
        progress=progress,
    )
    keys = list(itertools.product(forms, percentiles))
    tensors = [
        _tensor(name, value, uses, behind.get(name, ()), keys, found.observers, options.symmetric)
        for name, value, uses in _standing(reads)
    ]
    search = _Search(_CutModel(found.model, tensors), _spread(samples, count), progress)
    chosen = search.run()
    return FormChoices(
        _plan_of(plan, search.tensors, chosen, scan_inputs),
        tuple(
            TensorForms(
                tensor.name,
                tensor.readers,
                None if key is None else key[0],
                None if key is None else key[1],
                alone,
            )
            for tensor, key, alone in zip(search.tensors, chosen, search.alone, strict=True)
        ),
        search.together(chosen),
        {key: search.together([key if own else None for own in chosen]) for key in keys},
        search.samples,
    )


def _plan_of(
    plan: PrecisionPlan,
    tensors: Sequence[_Tensor],
    chosen: Sequence[Candidate | None],
    scanned: Container[str],
) -> PrecisionPlan:
    layers, scan_inputs = dict(plan.layers), {}
    known = {tensor.name for tensor in tensors}
    percentiles = {name: share for name, share in plan.percentiles.items() if name not in known}
    for tensor, key in zip(tensors, chosen, strict=True):
        if key is None:
            continue
        form, percent = key
        percentiles[tensor.name] = percent
        if tensor.name in scanned:
            scan_inputs[tensor.name] = form
        for name in tensor.readers:
            if name in layers:
                bits = layers[name].weight_bits
                layers[name] = Precision(bits, form.bits, form.format)
    return replace(plan, layers=layers, scan_inputs=scan_inputs, percentiles=percentiles)


# -- tensors and their candidates ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that is quantized where some nodes read it.

    Attributes
    ----------
    instead_of
        Names of tensors that are quantized otherwise.
    candidates, tried
        All, and those worth a run.
    """

    name: str
    value: ir.Value
    uses: Sequence[tuple[ir.Node, int]]
    instead_of: Sequence[str]
    candidates: Mapping[Candidate, _Quantizer]
    tried: Sequence[Candidate]

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the nodes that read it quantized."""
        return tuple(dict.fromkeys(str(node.name) for node, _ in self.uses))


_Uses: TypeAlias = dict[str, list[tuple[ir.Node, int]]]


def _reads(model: Model) -> tuple[_Uses, _Uses, dict[str, list[str]]]:
    """Tensors of the main graph that layers read, and selective scans.

    The last of the three is, for what a softplus in front of time steps reads, the names of these.
    """
    layers: _Uses = {}
    for node in layer_nodes(model).values():
        weights = weight_input(node)
        if weights is not None and node.graph is model.graph:
            layers.setdefault(str(Placement.layer_input(node).name), []).append((node, 1 - weights))
    scans: _Uses = {}
    behind: dict[str, list[str]] = {}
    softplus: dict[str, tuple[ir.Node, int]] = {}
    for scan in selective_scans(model.graph):
        for index, value in scan.tensors.items():
            if constant(value) is None:
                scans.setdefault(str(value.name), []).append((scan.node, index))
        steps = scan.value("dt")
        for name, (node, index) in scan.places.items():
            if node is not scan.node and steps is not None:
                softplus[name] = (node, index)
                behind.setdefault(name, []).append(str(steps.name))
    for name, (node, index) in softplus.items():
        # A layer that reads one of them quantizes it anyhow.
        if constant(node.inputs[index]) is not None or not layers.keys().isdisjoint(
            {name, *behind[name]}
        ):
            del behind[name]
        else:
            scans.setdefault(name, []).append((node, index))
    return layers, scans, behind


def _standing(
    reads: Mapping[str, Sequence[tuple[ir.Node, int]]],
) -> Iterator[tuple[str, ir.Value, list[tuple[ir.Node, int]]]]:
    """What stands at those places in the prepared model, in order of execution."""
    for name, uses in reads.items():
        places: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
        for node, index in uses:
            value = node.inputs[index]
            if node.graph is not None and value is not None:
                places.setdefault(value, []).append((node, index))
        for value, own in places.items():
            yield name, value, own


def _tensor(
    name: str,
    value: ir.Value,
    uses: Sequence[tuple[ir.Node, int]],
    instead_of: Sequence[str],
    keys: Sequence[Candidate],
    observers: Mapping[str, Observer],
    symmetric: bool,
) -> _Tensor:
    observer = observers[str(value.name)]
    quantizations = {
        (form, percent): choose_activation(
            observer, form, method="percentile", percentile=percent, symmetric=symmetric
        )
        for form, percent in keys
    }
    expected = {key: expected_sqnr_db(observer, entry) for key, entry in quantizations.items()}
    best = max(expected.values())
    different = {  # of equal ones, the widest percentile
        quantization: key
        for key, quantization in quantizations.items()
        if expected[key] >= best - _HOPELESS_DB
    }
    made = {key: _quantizer(entry) for key, entry in quantizations.items()}
    return _Tensor(name, value, uses, instead_of, made, list(different.values()))


def _quantizer(quantization: TensorQuantization) -> _Quantizer:
    """Quantize and dequantize arrays."""
    scale, zero_point = np.float32(quantization.scale), np.float32(quantization.zero_point)
    low = np.float32(quantization.code_min) - zero_point
    high = np.float32(quantization.code_max) - zero_point
    layout = quantization.layout
    if layout is None:
        return lambda x: np.clip(np.rint(x / scale), low, high) * scale
    # Codes change at multiples of half a step, so what lies between two of those is one entry.
    first, last = 2 * layout.value_min - 2, 2 * layout.value_max + 2
    middles = (np.arange(first, last + 1) + 0.5) / 2.0
    values = layout.decode(layout.encode(middles.astype(np.float32), 1.0)) * scale
    table = values.astype(np.float32)

    def through_table(x: Array) -> Array:
        halves = np.floor(x / (scale * np.float32(0.5)))
        found: Array = table[np.clip(halves, first, last).astype(np.int32) - first]
        return found

    return through_table


# -- runs ------------------------------------------------------------------------------------------


class _CutModel:
    """A float model in parts: behind each but the last, one tensor is at hand to be quantized."""

    def __init__(self, model: Model, tensors: Sequence[_Tensor]) -> None:
        order = {value: n for n, node in enumerate(model.graph) for value in node.outputs}
        self.tensors = sorted(tensors, key=lambda entry: order.get(entry.value, -1))
        places = [order.get(entry.value, -1) + 1 for entry in self.tensors]
        self.outputs = [str(value.name) for value in model.graph.outputs]
        self.read = [str(entry.value.name) for entry in self.tensors]
        self.given = [f"{entry.value.name}/read" for entry in self.tensors]
        for entry, name in zip(self.tensors, self.given, strict=True):
            value = ir.Value(name=name, type=entry.value.type, shape=entry.value.shape)
            model.graph.inputs.append(value)
            for node, index in entry.uses:
                node.replace_input_with(index, value)
        proto = model.to_proto()
        proto.ir_version = max(proto.ir_version, 10)
        self._parts = list(self._split(proto, places, model.source))

    def _split(
        self, proto: onnx.ModelProto, places: Sequence[int], source: str
    ) -> Iterator[tuple[ort.InferenceSession | None, list[str], list[str], set[str]]]:
        """Session of each part, what it reads and makes, and what is read after it."""
        graph = proto.graph
        nodes = list(graph.node)
        reads = [values_read(node) for node in nodes]
        stored = {tensor.name: tensor for tensor in graph.initializer}
        types = {v.name: v for v in (*graph.input, *graph.output, *graph.value_info)}
        for start, end in itertools.pairwise([0, *places, len(nodes)]):
            inside = nodes[start:end]
            made = {name for node in inside for name in node.output if name}
            read = set[str]().union(*reads[start:end])
            later = {*self.outputs, *self.read}.union(*reads[end:]) - set(stored)
            entering = sorted(read - made - set(stored))
            leaving = sorted(made & later)
            session = None
            if leaving:
                part = onnx.helper.make_graph(
                    inside,
                    "part",
                    [types[name] for name in entering],
                    [types.get(name) or onnx.ValueInfoProto(name=name) for name in leaving],
                    [stored[name] for name in sorted(read & set(stored))],
                )
                whole = onnx.helper.make_model(
                    part, opset_imports=proto.opset_import, ir_version=proto.ir_version
                )
                try:
                    session = make_session(whole, optimize=True, lean=True)
                except Exception as error:  # onnxruntime raises several kinds
                    raise ModelError(
                        f"onnxruntime cannot run a part of the model ({first_line(error)})",
                        where=source,
                    ) from error
            yield session, entering, leaving, later

    def advance(self, number: int, values: _Values) -> _Values:
        """Run a part; return what is still of use."""
        session, entering, leaving, later = self._parts[number]
        found = values
        if session is not None:
            results = session.run(leaving, {name: values[name] for name in entering})
            found = {**values, **dict(zip(leaving, results, strict=True))}
        return {name: array for name, array in found.items() if name in later}

    def quantized(self, number: int, values: _Values, quantizer: _Quantizer | None) -> _Values:
        """Give the readers of a tensor what it is quantized; None for what it is."""
        array = values[self.read[number]]
        return {**values, self.given[number]: array if quantizer is None else quantizer(array)}

    def finish(
        self, number: int, values: _Values, quantizers: Sequence[_Quantizer | None]
    ) -> list[Array]:
        """Outputs, from before the quantizer with a number on."""
        for place in range(number, len(self.tensors)):
            values = self.advance(place + 1, self.quantized(place, values, quantizers[place]))
        return [values[name] for name in self.outputs]


class _Search:
    """Candidates for the tensors of a model, run on some samples.

    Attributes
    ----------
    tensors
        In order of execution.
    alone
        For each tensor, its candidates by themselves: dB at the outputs.
    """

    def __init__(
        self, model: _CutModel, batches: Sequence[Batch], progress: ProgressCallback | None
    ) -> None:
        self._model = model
        self.tensors = model.tensors
        self.samples = sum(batch.samples for batch in batches)
        self._start = [model.advance(0, dict(batch.inputs)) for batch in batches]
        self._float: list[_Quantizer | None] = [None] * len(self.tensors)
        self._expected = [model.finish(0, values, self._float) for values in self._start]
        self._power = sum(
            float(np.square(array, dtype=np.float64).sum())
            for arrays in self._expected
            for array in arrays
            if array.dtype.kind == "f"
        )
        self._progress = progress
        tried = sum(len(tensor.tried) for tensor in self.tensors)
        finalists = sum(min(len(tensor.tried), _FINALISTS) for tensor in self.tensors)
        self._done, self._total = 0, tried + finalists
        self.alone: list[dict[Candidate, float]] = []

    def run(self) -> list[Candidate | None]:
        """Choose for all tensors; None for those that others are quantized in place of."""
        keys = [tensor.tried for tensor in self.tensors]
        self.alone = self._sweep(keys, list(self._float))
        ranked = [sorted(entry, key=lambda key: -entry[key]) for entry in self.alone]
        for number in self._dropped([max(entry.values()) for entry in self.alone]):
            self._total -= min(len(ranked[number]), _FINALISTS)
            ranked[number] = []
        chosen = [next(iter(entry), None) for entry in ranked]
        self._sweep([entry[:_FINALISTS] for entry in ranked], self._quantizers(chosen), chosen)
        return chosen

    def _dropped(self, best: Sequence[float]) -> set[int]:
        """Of tensors that are alternatives, those with more noise; ``best`` is dB alone."""
        found: set[int] = set()
        for number, tensor in enumerate(self.tensors):
            others = [n for n, other in enumerate(self.tensors) if other.name in tensor.instead_of]
            noise = sum(10 ** (-best[other] / 10) for other in others)
            if others:
                found |= set(others) if 10 ** (-best[number] / 10) < noise else {number}
        return found

    def together(self, chosen: Sequence[Candidate | None]) -> float:
        """Signal-to-noise ratio, in dB, with all tensors quantized that are to be."""
        return self._sqnr_db(0, self._start, self._quantizers(chosen))

    def _quantizers(self, chosen: Sequence[Candidate | None]) -> list[_Quantizer | None]:
        pairs = zip(self.tensors, chosen, strict=True)
        return [None if key is None else tensor.candidates[key] for tensor, key in pairs]

    def _sweep(
        self,
        keys: Sequence[Sequence[Candidate]],
        current: list[_Quantizer | None],
        chosen: list[Candidate | None] | None = None,
    ) -> list[dict[Candidate, float]]:
        """Try candidates of each tensor, the others as they are; ``chosen`` takes the best."""
        results = []
        states = self._start
        for number, tensor in enumerate(self.tensors):
            found = {}
            for key in keys[number]:
                trial = [*current]
                trial[number] = tensor.candidates[key]
                found[key] = self._sqnr_db(number, states, trial)
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, self._total)
            results.append(found)
            if chosen is not None and found:
                best = max(found, key=lambda key: found[key])
                chosen[number], current[number] = best, tensor.candidates[best]
            states = [
                self._model.advance(
                    number + 1, self._model.quantized(number, values, current[number])
                )
                for values in states
            ]
        return results

    def _sqnr_db(
        self, number: int, states: Sequence[_Values], quantizers: Sequence[_Quantizer | None]
    ) -> float:
        def noise(pair: tuple[_Values, list[Array]]) -> float:
            values, expected = pair
            outputs = self._model.finish(number, values, quantizers)
            return sum(
                float(np.square(array - wanted, dtype=np.float64).sum())
                for array, wanted in zip(outputs, expected, strict=True)
                if wanted.dtype.kind == "f"
            )

        # onnxruntime works outside Python's lock: one sample a core.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            total = sum(pool.map(noise, zip(states, self._expected, strict=True)))
        if not math.isfinite(total):
            return -math.inf
        if total == 0.0:
            return math.inf
        return 10.0 * math.log10(self._power / total) if self._power else -math.inf


def _spread(samples: Samples, count: int) -> list[Batch]:
    """Some samples, spread evenly over all."""
    size = samples.fixed_batch or 1
    wanted = {int(n) for n in np.linspace(0, len(samples) - 1, min(count, len(samples)))}
    kept, done = [], 0
    for batch in samples.batches(size):
        if any(done <= number < done + batch.samples for number in wanted):
            kept.append(batch)
        done += batch.samples
    return kept
