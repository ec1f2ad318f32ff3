"""``bitwright cost``: what a model costs on an accelerator, layer by layer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bitwright import targets, units
from bitwright.errors import BitwrightError, ModelError, UsageError
from bitwright.files import check_writable, write_atomically
from bitwright.inspection import one_sample, shape_option
from bitwright.planning import plan_for, plan_of
from bitwright.quant.layers import NotLayer, find_layers
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
    not_counted
        Operators that compute and are no layers (sums, averages, tables, ...), and how many: cost
        models know layers only.
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
    not_counted: Mapping[str, int]
    assumed: tuple[str, ...]

    @property
    def speedup(self) -> float | None:
        """End-to-end speedup over the baseline: cycles of the baseline over cycles of the plan."""
        return None if self.baseline is None else self.cost.speedup_over(self.baseline)

    @property
    def layer_speedups(self) -> tuple[float | None, ...]:
        """Speedup of every layer over the baseline."""
        if self.baseline is None:
            return (None,) * len(self.layers)
        pairs = zip(self.cost.layers, self.baseline.layers, strict=True)
        return tuple(now.speedup_over(before) for now, before in pairs)

    def check_memory(self) -> None:
        """Refuse a plan that the accelerator's memory does not hold.

        Raises
        ------
        PlanError
            If it does not; it names the largest layers.
        """
        self.accelerator.check_memory(self.layers, self.plan.layers, where=self.where)

    def summary(self) -> list[str]:
        """What is to be said of the whole, in a few lines."""
        total, lines = self.cost, []
        run = "one run" + (f" with {', '.join(self.assumed)}" if self.assumed else "")
        if total.seconds is not None and self.accelerator.frequency_mhz is not None:
            rates = [
                f"{units.number(1 / total.seconds)} runs a second",
                f"{2e-12 * total.macs / total.seconds:.3g} TOPS",
            ]
            if total.total_energy_pj:
                rates.append(f"{2 * total.macs / total.total_energy_pj:.3g} TOPS/W")
            if total.dram_read_bits is not None and total.dram_write_bits is not None:
                moved = (total.dram_read_bits + total.dram_write_bits) / 8 / total.seconds
                rates.append(f"{moved / 1e9:.3g} GB/s of DRAM")
            clock = f"{self.accelerator.frequency_mhz:g} MHz"
            lines.append(f"{run}: {units.time(total.seconds)} at {clock}; {', '.join(rates)}")
        elif self.assumed:
            lines.append(f"costs are those of {run}")
        if (parts := total.energy_pj) is not None:
            named = (f"{n.replace('_', ' ')} {units.energy(pj)}" for n, pj in parts.items())
            lines.append(f"energy {units.energy(total.total_energy_pj)}: {', '.join(named)}")
        weights = f"weights {units.data(total.memory_bits)}"
        if total.capacity_bits is not None:
            share = units.percent(total.memory_bits, total.capacity_bits)
            weights += f" of {units.data(total.capacity_bits)} memory, {share}"
        lines.append(weights)
        if self.baseline is not None:
            before, after = self.baseline.total_energy_pj, total.total_energy_pj
            gains = [] if self.speedup is None else [f"{self.speedup:.3g}x as fast end to end"]
            if before and after is not None:
                gains.append(f"{after / before:.3g}x the energy")
            gains.append(f"{total.memory_bits / self.baseline.memory_bits:.3g}x the weights")
            lines.append(f"against {self.baseline_precision}: {', '.join(gains)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        document = self.cost.to_dict()
        for layer, entry, speedup in zip(
            self.layers, document["layers"], self.layer_speedups, strict=True
        ):
            entry |= {"kind": layer.kind, "speedup": speedup}
        return {
            "source": self.source,
            **document,
            "baseline_precision": self.baseline_precision and str(self.baseline_precision),
            "baseline": None if self.baseline is None else self.baseline.to_dict()["total"],
            "end_to_end_speedup": self.speedup,
            "float_layers": list(self.float_layers),
            "not_counted": dict(self.not_counted),
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
    if plot is not None and Path(plot).suffix != ".html":
        raise UsageError("the bar charts are a page", where=str(plot), fix="name it .html")
    picture = None if plot is None else check_writable(plot, overwrite=overwrite)
    accelerator = targets.get(target)
    compared = None if baseline is None else Precision.of(baseline)
    loaded = load(model)
    if loaded.is_quantized:
        if precision is not None or plan is not None:
            raise UsageError(
                f"{loaded.source} is quantized already: its precisions are its own",
                fix="leave out the precision or plan, or name the float model",
            )
        complete = plan_of(loaded)
        accelerator.check(complete.layers, scan_inputs=complete.scan_inputs, where=loaded.source)
    else:
        complete = plan_for(loaded, accelerator, precision=precision, plan=plan)
    found, others, assumed = sized_layers(loaded, input_shapes)
    layers = tuple(layer for layer in found if layer.name in complete.layers)
    if compared is not None:
        names = (layer.name for layer in layers)
        accelerator.check(dict.fromkeys(names, compared), where=f"baseline {compared}")
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
        not_counted=dict(Counter(node.operator for node in others if node.computes).most_common()),
        assumed=assumed,
    )
    if picture is not None:
        from bitwright.plots import cost_page

        write_atomically(picture, cost_page(result).encode())
    return result


def sized_layers(
    model: Model, input_shapes: Mapping[str, Sequence[int | None]] | None = None
) -> tuple[tuple[Layer, ...], tuple[NotLayer, ...], tuple[str, ...]]:
    """Layers and other operators, of one sample where the batch is open, and what was assumed."""
    counted, assumed = one_sample(model.with_input_shapes(input_shapes) if input_shapes else model)
    return *find_layers(counted), assumed


def cost_document(model: Model, accelerator: Accelerator, plan: PrecisionPlan) -> str:
    """Make ``cost.json`` of an artefact; where there are no costs it says why."""
    found, _, assumed = sized_layers(model)
    layers = tuple(layer for layer in found if layer.name in plan.layers)
    precisions = {layer.name: plan.layers[layer.name] for layer in layers}
    reason = None
    document: dict[str, Any] = {"target": accelerator.name, "total": None, "layers": []}
    try:
        document = accelerator.model_cost(layers, precisions).to_dict()
    except BitwrightError as error:  # the artefact needs no costs
        reason = error.what if error.where is None else f"{error.where}: {error.what}"
    complete = {"schema_version": SCHEMA_VERSION, "reason": reason, "assumed": list(assumed)}
    return json.dumps({**complete, **document}, indent=2) + "\n"
