"""Turn a float model into a standard QDQ model at the precision chosen for every layer.

:mod:`~bitwright.quant.placement` says where quantizers go, calibration and refinement choose their
scales, :mod:`~bitwright.quant.emit` writes the graph. The result uses standard operators only: INT4
and INT16 need operator set 21, INT2 needs 25.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from bitwright.errors import ModelError, PlanError, UsageError
from bitwright.quant.calibrate import calibrate
from bitwright.quant.emit import Emitter, LayerSummary, TensorSummary
from bitwright.quant.graph import all_nodes, loop_body
from bitwright.quant.layers import layer_nodes
from bitwright.quant.load import Model, convert_opset
from bitwright.quant.observers import (
    ClipMethod,
    Observer,
    TensorQuantization,
    choose_quantization,
    expected_sqnr_db,
)
from bitwright.quant.placement import Placement
from bitwright.quant.prepare import prepare
from bitwright.quant.recipes import RecipeName, get_recipe
from bitwright.quant.refine import LayerChoice, Refinement, measure_errors
from bitwright.quant.samples import ProgressCallback, Samples
from bitwright.quant.selective_scan import SelectiveScan, selective_scans
from bitwright.quant.soft_edge import choose_activation
from bitwright.vocabulary import FLOAT_BITS, Activation, Precision, PrecisionPlan

__all__ = [
    "Calibration",
    "LayerSummary",
    "Quantized",
    "TensorSummary",
    "calibrate_model",
    "fit_plan",
    "quantize_model",
]

_INT2_OPSET = 25


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized model and what is worth knowing about it.

    Attributes
    ----------
    model
        The QDQ model.
    plan
        The plan it follows, complete with the hashes of the float model.
    layers
        One entry a layer, in order of execution.
    elementwise
        Activation tensors quantized for operators other than layers.
    scan_inputs
        Those quantized for selective scans.
    float_operators
        Operators that stay float: name and operator type.
    notes
        What was changed on the way.
    """

    model: onnx.ModelProto
    plan: PrecisionPlan
    layers: tuple[LayerSummary, ...]
    elementwise: tuple[TensorSummary, ...]
    scan_inputs: tuple[TensorSummary, ...]
    float_operators: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all quantized weights: the sum of ceil(bits * n / 8) over the layers."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def float_weight_bytes(self) -> int:
        """Bytes of the same weights in float32."""
        return sum(4 * layer.weight_count for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""

        def tensor(entry: TensorSummary) -> dict[str, Any]:
            quantization = entry.quantization
            return {
                "name": entry.name,
                "type": str(quantization),
                "layout": None if quantization.layout is None else str(quantization.layout),
                "scale": quantization.scale,
                "zero_point": quantization.zero_point,
                "minimum": entry.minimum,
                "maximum": entry.maximum,
                "clip": list(quantization.clip),
                "sqnr_db": entry.sqnr_db,
            }

        return {
            "plan": json.loads(self.plan.to_json()),
            "weight_bytes": self.weight_bytes,
            "float_weight_bytes": self.float_weight_bytes,
            "layers": [
                {
                    **asdict(layer),
                    "precision": str(layer.precision),
                    "activation": tensor(layer.activation),
                }
                for layer in self.layers
            ],
            "elementwise": [tensor(entry) for entry in self.elementwise],
            "scan_inputs": [tensor(entry) for entry in self.scan_inputs],
            "float_operators": [list(entry) for entry in self.float_operators],
            "notes": list(self.notes),
        }


def fit_plan(
    model: Model, plan: PrecisionPlan | Precision, *, where: str = "plan"
) -> PrecisionPlan:
    """Complete a plan, or make a uniform one, for a model.

    Raises
    ------
    PlanError
        If the plan was made for another model, layers are unknown or missing, it names inputs of
        selective scans that none reads, or percentiles of tensors that do not exist.
    """
    names = list(layer_nodes(model))
    if isinstance(plan, Precision):
        plan = PrecisionPlan(layers=dict.fromkeys(names, plan))
    if plan.structure_hash is not None and plan.structure_hash != model.structure_hash:
        raise PlanError(
            f"was made for another model (structure {plan.structure_hash[:19]}..., this model has "
            f"{model.structure_hash[:19]}...)",
            where=where,
            fix="make a plan for this model, or remove structure_hash from the plan if the layer "
            "names are meant to carry over",
        )
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    if unknown := [name for name in plan.layers if name not in names]:
        raise PlanError(
            f"the model has no layer {unknown[0]!r}"
            + (f" ({len(unknown)} unknown layers in all)" if len(unknown) > 1 else ""),
            where=where,
            fix=f"its layers are: {known}; bitwright inspect prints them",
        )
    if missing := [name for name in names if name not in plan.layers]:
        raise PlanError(
            f"layer {missing[0]!r} has no precision"
            + (f" ({len(missing)} layers are missing in all)" if len(missing) > 1 else ""),
            where=where,
            fix=f"give every layer one; the model's layers are: {known}",
        )
    _check_tensors(model, plan, where)
    return replace(
        plan,
        layers={name: plan.layers[name] for name in names},
        structure_hash=model.structure_hash,
        weights_hash=model.weights_hash,
    )


def _check_tensors(model: Model, plan: PrecisionPlan, where: str) -> None:
    """Refuse names of tensors that a plan says something about, and that are not there."""
    if plan.scan_inputs:
        scans = selective_scans(model.graph)
        read = dict.fromkeys(name for scan in scans for name in scan.places)
        if unknown := [name for name in plan.scan_inputs if name not in read]:
            raise PlanError(
                f"no selective scan reads {', '.join(map(repr, unknown))}",
                where=f"{where}, scan_inputs",
                fix=f"selective scans read: {', '.join(read)}"
                if read
                else "the model has no selective scan: leave scan_inputs out",
            )
        for scan in scans:
            value = scan.value("dt")
            before = next((n for n, (node, _) in scan.places.items() if node is not scan.node), "")
            if value is not None and {value.name, before} <= set(plan.scan_inputs):
                raise PlanError(
                    f"{value.name!r} and {before!r}, which the softplus in front of it reads, are "
                    "both to be quantized",
                    where=f"{where}, scan_inputs",
                    fix="name one of them",
                )
    if plan.percentiles:
        names = {str(value.name) for value in _activations(model.graph)}
        if unknown := [name for name in plan.percentiles if name not in names]:
            raise PlanError(
                f"the model has no activation tensor {unknown[0]!r}",
                where=f"{where}, percentiles",
                fix="name tensors that layers or selective scans read",
            )


def _activations(graph: ir.Graph) -> Iterator[ir.Value]:
    """Float tensors that are computed or fed."""
    values = [*graph.inputs, *(value for node in all_nodes(graph) for value in node.outputs)]
    values += [value for node in graph for value in getattr(loop_body(node), "inputs", ())]
    return (value for value in values if value.dtype == ir.DataType.FLOAT)


@dataclass(frozen=True, slots=True)
class Calibration:
    """A float model with all that is needed to quantize it at some precisions.

    Attributes
    ----------
    model
        The model, prepared.
    placement
        Where its quantizers go.
    observers
        Value name to what was seen.
    quantizations
        For value name and form of codes, what the histogram suggests.
    refinement
        What candidate scales do to the outputs of layers; None for ``minmax``.
    per_channel
        Whether output channels have weight scales of their own.
    scan_inputs, percentiles
        As in a plan, with what the recipe adds.
    """

    model: Model
    placement: Placement
    observers: dict[str, Observer]
    quantizations: dict[tuple[str, Activation], TensorQuantization]
    refinement: Refinement | None
    per_channel: bool
    scan_inputs: Mapping[str, Activation]
    percentiles: Mapping[str, float]

    def choose(
        self, precisions: Mapping[str, Precision]
    ) -> tuple[dict[tuple[str, Activation], TensorQuantization], dict[str, LayerChoice]]:
        """Scales of all activations, and what was chosen for each layer, at some precisions."""
        if self.refinement is None:
            return self.quantizations, {}
        refined, choices = self.refinement.choose(precisions)
        return {**self.quantizations, **refined}, choices


def calibrate_model(
    model: Model,
    precisions: Mapping[str, Sequence[Precision]],
    samples: Samples,
    *,
    elementwise_bits: int = 16,
    loop_bits: int = FLOAT_BITS,
    scan_inputs: Mapping[str, Activation] | None = None,
    percentiles: Mapping[str, float] | None = None,
    recipe: RecipeName = "default",
    clip: ClipMethod | None = None,
    percentile: float | None = None,
    per_channel: bool | None = None,
    asymmetric: bool = False,
    rotation: bool = True,
    batch_size: int | None = None,
    progress: ProgressCallback | None = None,
) -> Calibration:
    """Find out what quantizing a loaded float model needs; the model is consumed.

    Parameters
    ----------
    model
        A float model from :func:`bitwright.quant.load.load`.
    precisions
        Layer name to the precisions that may be asked for.
    samples
        Calibration data.
    elementwise_bits, loop_bits, scan_inputs, percentiles
        As in a plan.
    recipe, clip, percentile, per_channel, asymmetric, rotation, batch_size, progress
        As in :func:`quantize_model`.

    Raises
    ------
    ModelError, PlanError, DataError, RunError, UsageError
        As in :func:`quantize_model`.
    """
    if model.is_quantized:
        raise ModelError(
            "is quantized already", where=model.source, fix="give the float model it was made from"
        )
    if not layer_nodes(model):
        raise ModelError(
            "has no layers to quantize: no Conv, Gemm or MatMul with constant weights",
            where=model.source,
            fix="bitwright inspect says why each operator is none",
        )
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch size {batch_size} is not positive")
    options = get_recipe(recipe).with_options(
        clip=clip, percentile=percentile, per_channel=per_channel, rotation=rotation
    )
    clip, per_channel = options.clip, options.per_channel
    # refuse bad options early
    choose_quantization(Observer(), 8, method=clip, percentile=options.percentile)
    about = options.complete(
        model, PrecisionPlan({}, scan_inputs=scan_inputs or {}, percentiles=percentiles or {})
    )
    scans = selective_scans(model.graph)
    read = _scan_inputs(scans, about.scan_inputs)
    uses = {
        str(value.name): [(use.node, use.idx) for use in value.uses()]
        for value in _activations(model.graph)
        if value.name in about.percentiles
    }
    prepare(model)
    options.rewrite(model, scans)
    placement = Placement(model.graph, fixed_point_loops=loop_bits < FLOAT_BITS, scan_inputs=read)
    wanted: dict[tuple[ir.Value, Activation], None] = {}
    # What percentiles of a plan are about: other operators read the tensor as it is, at their bits.
    named = {entry for node in placement.scan_inputs for entry in placement.scanned(node)}
    elementwise: set[tuple[str, Activation]] = set()
    for number in range(max(len(entry) for entry in precisions.values())):
        layers = {name: entry[number % len(entry)] for name, entry in precisions.items()}
        plan = PrecisionPlan(layers, elementwise_bits=elementwise_bits, loop_bits=loop_bits)
        wanted.update(dict.fromkeys(placement.wanted(plan)))
        named.update(placement.wanted_layers(plan))
        elementwise.update((str(v.name), form) for v, form in placement.wanted_elementwise(plan))
    ranges = _ranges(about.percentiles, uses, {value for value, _ in named}, model.source)
    cut = {(value, form): ranges[value] for value, form in named if value in ranges}
    observers, kept = calibrate(
        model,
        [value for value, _ in wanted],
        samples,
        batch_size=batch_size,
        keep=clip != "minmax",
        exact=ranges,
        progress=progress,
    )
    quantizations = {
        (str(value.name), form): choose_activation(
            observers[str(value.name)],
            form,
            method="percentile" if (value, form) in cut else clip,
            percentile=cut.get((value, form), options.percentile),
            asymmetric=asymmetric,
            symmetric=options.symmetric,
        )
        for value, form in wanted
    }
    elementwise.update((str(v.name), form) for v, form in cut)
    for new, old in placement.leaving.items():  # a state keeps its codes from step to step
        pair = [(str(v.name), Activation(loop_bits)) for v in (new, old) if v is not None]
        if len(pair) == 2 and pair[1] in quantizations:
            both = Observer()
            both.update(np.array([quantizations[key].clip for key in pair], np.float32))
            found = choose_quantization(both, loop_bits, method="minmax", asymmetric=asymmetric)
            quantizations.update(dict.fromkeys(pair, found))
    refinement = None
    if clip != "minmax":
        refinement = measure_errors(
            model,
            {node: placement.has_bias(node) for node in placement.layers},
            quantizations,
            observers,
            precisions,
            kept,
            per_channel=per_channel,
            # Operators without weights read what the histogram suggests, at any plan.
            fixed=set(quantizations) if clip != "mmse" else elementwise,
            progress=progress,
        )
    return Calibration(
        model,
        placement,
        observers,
        quantizations,
        refinement,
        per_channel,
        about.scan_inputs,
        about.percentiles,
    )


def _scan_inputs(
    scans: Sequence[SelectiveScan], wanted: Mapping[str, Activation]
) -> dict[ir.Node, dict[int, Activation]]:
    """For nodes in front of selective scans, and those, the inputs that are quantized, and how."""
    found: dict[ir.Node, dict[int, Activation]] = {}
    for scan in scans:
        for name, (node, index) in scan.places.items():
            if name in wanted:
                found.setdefault(node, {})[index] = wanted[name]
    return found


def _ranges(
    percentiles: Mapping[str, float],
    uses: Mapping[str, Sequence[tuple[ir.Node, int]]],
    quantized: Container[ir.Value],
    source: str,
) -> dict[ir.Value, float]:
    """Percentiles by what stands, in the prepared model, where the tensors of a plan were read."""
    ranges = {}
    for name, percent in percentiles.items():
        values = [node.inputs[index] for node, index in uses[name] if node.graph is not None]
        found = [value for value in values if value is not None and value in quantized]
        if not found:
            raise PlanError(
                f"the plan has a percentile for {name!r}, which neither a layer nor a selective "
                "scan reads quantized",
                where=source,
                fix="leave it out, or name a tensor that one of them reads",
            )
        ranges.update(dict.fromkeys(found, percent))
    return ranges


def quantize_model(
    model: Model,
    plan: PrecisionPlan,
    samples: Samples,
    *,
    recipe: RecipeName = "default",
    clip: ClipMethod | None = None,
    percentile: float | None = None,
    per_channel: bool | None = None,
    asymmetric: bool = False,
    rotation: bool = True,
    batch_size: int | None = None,
    progress: ProgressCallback | None = None,
) -> Quantized:
    """Quantize a loaded float model; the model is consumed.

    Parameters
    ----------
    model
        A float model from :func:`bitwright.quant.load.load`.
    plan
        A plan that :func:`fit_plan` has completed.
    samples
        Calibration data.
    recipe
        One of :mod:`bitwright.quant.recipes`; it decides about the options that are None.
    clip, percentile, asymmetric
        How activations are clipped; see :func:`~bitwright.quant.observers.choose_quantization`
        and, for ``mmse``, :mod:`~bitwright.quant.refine`, which chooses the scales of
        weights and shifts biases as well. ``minmax`` leaves weights and biases as they are.
    per_channel
        Whether every output channel of a layer has a weight scale of its own.
    rotation
        Whether a recipe that rotates does.
    batch_size, progress
        See :func:`~bitwright.quant.calibrate.calibrate`.

    Raises
    ------
    ModelError
        If the model is quantized already or has no layers.
    DataError, RunError
        If calibration fails.
    """
    narrow = any(2 in (p.weight_bits, p.activation_bits) for p in plan.layers.values())
    if narrow and model.opset < _INT2_OPSET and not model.is_quantized:
        model.ir = convert_opset(model.ir, _INT2_OPSET, model.source)
    found = calibrate_model(
        model,
        {name: [precision] for name, precision in plan.layers.items()},
        samples,
        elementwise_bits=plan.elementwise_bits,
        loop_bits=plan.loop_bits,
        scan_inputs=plan.scan_inputs,
        percentiles=plan.percentiles,
        recipe=recipe,
        clip=clip,
        percentile=percentile,
        per_channel=per_channel,
        asymmetric=asymmetric,
        rotation=rotation,
        batch_size=batch_size,
        progress=progress,
    )
    placement = found.placement
    plan = replace(plan, scan_inputs=found.scan_inputs, percentiles=found.percentiles)
    quantizations, choices = found.choose(plan.layers)
    chosen: dict[tuple[ir.Value, Activation], TensorSummary] = {}
    for value, form in placement.wanted(plan):
        observer, quantization = (
            found.observers[str(value.name)],
            quantizations[str(value.name), form],
        )
        chosen[value, form] = TensorSummary(
            str(value.name),
            quantization,
            observer.minimum,
            observer.maximum,
            expected_sqnr_db(observer, quantization),
        )
    emitter = Emitter(model.ir, placement, plan, chosen, choices, found.per_channel)
    emitter.run()
    RemoveUnusedNodesPass()(model.ir)
    NameFixPass()(model.ir)
    model.ir.ir_version = max(model.ir.ir_version, 11 if model.opset >= _INT2_OPSET else 10)
    model.ir.producer_name = "bitwright"
    model.ir.metadata_props["bitwright.plan"] = plan.to_json()
    return Quantized(
        model.to_proto(),
        plan,
        tuple(emitter.layers),
        tuple(emitter.elementwise.values()),
        tuple(emitter.scan_inputs.values()),
        tuple((str(n.name), n.op_type) for n in emitter.float_nodes() if n.graph is not None),
        model.notes,
    )
