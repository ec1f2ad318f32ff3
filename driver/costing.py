"""``bitwright cost``: what a model costs on an accelerator, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bitwright import targets
from bitwright.errors import ModelError, UsageError
from bitwright.files import check_writable, write_atomically
from bitwright.inspection import one_sample, shape_option
from bitwright.planning import plan_for, plan_of
from bitwright.quant.layers import find_layers
from bitwright.quant.load import Model, load
from bitwright.targets import Accelerator
from bitwright.vocabulary import Layer, ModelCost, Precision, PrecisionPlan

__all__ = ["Cost", "cost", "cost_document"]

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """Result of :func:`cost`.

    Attributes
    ----------
    source
        The model's file.
    where
        The file that the precisions come from, for messages.
    accelerator
        What it would run on.
    plan
        The precision of every layer that has one.
    layers
        Those layers.
    cost
        What they cost, one by one and together.
    baseline_precision, baseline
        The precision of all layers to compare with, and what that costs; None if not asked for.
    float_layers
        Layers of a quantized model that have no precision: they stay on the host.
    assumed
        Symbolic leading dimensions that were taken as 1, by input.
    """

    source: str
    where: str
    accelerator: Accelerator
    plan: PrecisionPlan
    layers: tuple[Layer, ...]
    cost: ModelCost
    baseline_precision: Precision | None
    baseline: ModelCost | None
    float_layers: tuple[str, ...]
    assumed: tuple[str, ...]

    @property
    def speedup(self) -> float | None:
        """End-to-end speedup over the baseline: cycles of the baseline over cycles of the plan."""
        return None if self.baseline is None else self.cost.speedup_over(self.baseline)

    def check_memory(self) -> None:
        """Refuse a plan that the accelerator's memory does not hold.

        Raises
        ------
        PlanError
            If it does not; it names the largest layers.
        """
        self.accelerator.check_memory(self.layers, self.plan.layers, where=self.where)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "source": self.source,
            **self.cost.to_dict(),
            "baseline_precision": self.baseline_precision and str(self.baseline_precision),
            "baseline": None if self.baseline is None else self.baseline.to_dict()["total"],
            "end_to_end_speedup": self.speedup,
            "float_layers": list(self.float_layers),
            "assumed": list(self.assumed),
        }


def cost(
    model: str | Path,
    target: str | Path,
    *,
    precision: str | Precision | None = None,
    plan: PrecisionPlan | str | Path | None = None,
    baseline: str | Precision | None = None,
    input_shapes: Mapping[str, Sequence[int | None]] | None = None,
    plot: str | Path | None = None,
    overwrite: bool = False,
) -> Cost:
    """Compute what a model costs on an accelerator.

    Parameters
    ----------
    model
        An ONNX file: a float model with a precision or a plan, or a quantized model as it is.
    target
        An accelerator: its name, or the path of its description.
    precision
        For a float model: one precision for all layers, for example ``w8a8``; or
    plan
        a precision plan, or the file of one.
    baseline
        A precision of all layers to compare with, for example ``w16a16``.
    input_shapes
        Fixes symbolic sizes of the inputs. A symbolic first dimension that is left open counts as
        1, so that costs are those of one sample.
    plot
        A file for bar charts of the layers: a page (``.html``) that needs no network.
    overwrite
        Whether ``plot`` may exist.

    Raises
    ------
    ModelError, PlanError, UsageError, OutputError
        If the model, the plan, the target, an option or the output has to change.
    RunError
        If a cost model that is not bitwright's fails.
    """
    picture = None if plot is None else check_writable(plot, overwrite=overwrite)
    accelerator = targets.get(target)
    compared = Precision.parse(baseline) if isinstance(baseline, str) else baseline
    loaded = load(model)
    if loaded.is_quantized:
        if precision is not None or plan is not None:
            raise UsageError(
                f"{loaded.source} is quantized already: its precisions are its own",
                fix="leave out the precision or plan, or name the float model",
            )
        complete = plan_of(loaded)
        accelerator.check(complete.layers, where=loaded.source)
    else:
        complete = plan_for(loaded, accelerator, precision=precision, plan=plan)
    found, assumed = sized_layers(loaded, input_shapes)
    layers = tuple(layer for layer in found if layer.name in complete.layers)
    if not layers:
        raise ModelError(
            "has no layer that an accelerator could compute",
            where=loaded.source,
            fix="bitwright inspect says why each operator is none",
        )
    where = str(plan) if isinstance(plan, str | Path) else loaded.source
    accelerator.check_kinds(layers, complete.layers, where=where)
    unsized = [layer.name for layer in layers if layer.macs is None]
    if unsized:
        raise UsageError(
            f"the sizes of layer {unsized[0]!r} are not fixed, so it has no cost",
            where=loaded.source,
            fix=f"fix them: {shape_option(loaded.inputs)}",
        )
    result = Cost(
        source=loaded.source,
        where=where,
        accelerator=accelerator,
        plan=complete,
        layers=layers,
        cost=accelerator.model_cost(layers, complete),
        baseline_precision=compared,
        baseline=None if compared is None else accelerator.model_cost(layers, compared),
        float_layers=tuple(layer.name for layer in found if layer.name not in complete.layers),
        assumed=assumed,
    )
    if picture is not None:
        from bitwright.plots import cost_page

        write_atomically(picture, cost_page(result).encode())
    return result


def sized_layers(
    model: Model, input_shapes: Mapping[str, Sequence[int | None]] | None = None
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The layers of a model, of one sample where it leaves the batch open, and what was assumed."""
    counted, assumed = one_sample(model.with_input_shapes(input_shapes) if input_shapes else model)
    return find_layers(counted)[0], assumed


def cost_document(model: Model, accelerator: Accelerator, plan: PrecisionPlan) -> str:
    """Make ``cost.json`` of an artefact; where there are no costs it says why.

    Raises
    ------
    RunError
        If a cost model that is not bitwright's fails.
    """
    found, assumed = sized_layers(model)
    layers = tuple(layer for layer in found if layer.name in plan.layers)
    reason = _no_cost(layers, accelerator)
    document: dict[str, Any] = {"target": accelerator.name, "total": None, "layers": []}
    if reason is None:
        precisions = {layer.name: plan.layers[layer.name] for layer in layers}
        document = accelerator.model_cost(layers, precisions).to_dict()
    complete = {"schema_version": SCHEMA_VERSION, "reason": reason, "assumed": list(assumed)}
    return json.dumps({**complete, **document}, indent=2) + "\n"


def _no_cost(layers: Sequence[Layer], accelerator: Accelerator) -> str | None:
    """Why there are no costs, None if there are."""
    if accelerator.cost_model is None:
        return f"{accelerator.name} has no cost model"
    for layer in layers:
        if layer.macs is None:
            return f"the sizes of layer {layer.name!r} are not fixed"
        if layer.kind not in accelerator.cost_model.kinds:
            return f"the cost model knows no layers like {layer.name!r}, of kind {layer.kind}"
    return None
