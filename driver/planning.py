"""``bitwright plan``: write a precision plan for a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitwright.errors import ModelError, PlanError, UsageError
from bitwright.files import check_writable, write_atomically
from bitwright.quant.graph import is_move, layers_of, loop_body
from bitwright.quant.layers import layer_nodes, quantized_activation, quantized_precision
from bitwright.quant.load import Model, load
from bitwright.quant.quantizer import fit_plan
from bitwright.quant.recipes import RecipeName, get_recipe
from bitwright.quant.selective_scan import selective_scans
from bitwright.targets import Accelerator
from bitwright.vocabulary import FLOAT_BITS, Activation, Precision, PrecisionPlan

__all__ = ["is_study_plan", "make_plan", "plan_for", "plan_of", "resolve_plan"]


def make_plan(
    model: str | Path,
    *,
    precision: str | Precision = "w8a8",
    layers: Mapping[str, str | Precision] | None = None,
    elementwise_bits: int = 16,
    loop_bits: int = FLOAT_BITS,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> PrecisionPlan:
    """Make a plan: one precision for all layers, others for some.

    Parameters
    ----------
    model
        An ONNX file.
    precision
        The precision of all layers that ``layers`` does not name, for example ``w8a8``.
    layers
        Layer name to precision.
    elementwise_bits
        8 or 16: width of activations between operators that are no layers.
    loop_bits
        The same in the bodies of loops; 32 for float32.
    output
        File to write the plan to, as JSON.
    overwrite
        Whether ``output`` may exist.

    Raises
    ------
    ModelError
        If the model cannot be loaded, or is quantized already.
    PlanError
        If a precision or a layer does not exist.
    """
    path = None if output is None else check_writable(output, overwrite=overwrite, model=model)
    loaded = load(model)
    if loaded.is_quantized:
        raise ModelError(
            "is quantized already",
            where=loaded.source,
            fix="plan for the float model it is made from",
        )
    uniform = fit_plan(loaded, Precision.of(precision))
    chosen = {**uniform.layers, **{n: Precision.of(p) for n, p in (layers or {}).items()}}
    asked = PrecisionPlan(layers=chosen, elementwise_bits=elementwise_bits, loop_bits=loop_bits)
    plan = fit_plan(loaded, asked)
    if path is not None:
        write_atomically(path, plan.to_json().encode())
    return plan


def is_study_plan(plan: object) -> bool:
    """Whether a plan is named by a study and a number, ``DIR#3``, and not by a file."""
    return isinstance(plan, str | Path) and "#" in str(plan) and not Path(plan).exists()


def resolve_plan(
    model: Model,
    precision: str | Precision | None,
    plan: PrecisionPlan | str | Path | None,
    elementwise_bits: int | None = None,
    loop_bits: int | None = None,
    *,
    recipe: RecipeName = "default",
) -> PrecisionPlan:
    """Make the complete plan that the options of a command ask for.

    Without ``precision`` and ``plan`` that of the recipe, where it has one.

    Raises
    ------
    UsageError
        If not exactly one of ``precision`` and ``plan`` is given, or a plan is to be changed.
    PlanError
        If the plan cannot be read or does not fit the model.
    """
    if precision is None and plan is None:
        precision = get_recipe(recipe).precision
    if precision is None and plan is None:
        raise UsageError(
            "there is neither a precision for all layers nor a plan",
            fix="give one: --precision w8a8, say, or --plan FILE",
        )
    if precision is not None and plan is not None:
        raise UsageError(
            "there are both a precision for all layers and a plan", fix="leave out one of them"
        )
    if precision is not None:
        layers = fit_plan(model, Precision.of(precision)).layers
        bits = 16 if elementwise_bits is None else elementwise_bits
        inside = FLOAT_BITS if loop_bits is None else loop_bits
        return fit_plan(model, PrecisionPlan(layers, elementwise_bits=bits, loop_bits=inside))
    for word, given in (("elementwise", elementwise_bits), ("loop", loop_bits)):
        if given is not None:
            raise UsageError(f"{word} bits are part of the plan", fix="set them there")
    if isinstance(plan, PrecisionPlan):
        return fit_plan(model, plan)
    assert plan is not None
    if is_study_plan(plan):
        from bitwright.fronts import plan_of_study

        return fit_plan(model, plan_of_study(str(plan)), where=str(plan))
    try:
        text = Path(plan).read_text(encoding="utf-8-sig")  # some editors begin with a mark
    except FileNotFoundError:
        raise PlanError("there is no such file", where=str(plan)) from None
    except OSError as error:
        raise PlanError(f"cannot be read ({error.strerror})", where=str(plan)) from error
    except UnicodeDecodeError:
        raise PlanError(
            "not a JSON document: it is no UTF-8 text",
            where=str(plan),
            fix="see docs/precision-plans.md",
        ) from None
    return fit_plan(model, PrecisionPlan.from_json(text, where=str(plan)), where=str(plan))


def plan_for(
    model: Model,
    accelerator: Accelerator,
    *,
    precision: str | Precision | None,
    plan: PrecisionPlan | str | Path | None,
    elementwise_bits: int | None = None,
    loop_bits: int | None = None,
    recipe: RecipeName = "default",
) -> PrecisionPlan:
    """The plan that a float model gets on an accelerator.

    Raises
    ------
    UsageError
        If not exactly one of ``precision`` and ``plan`` is given.
    PlanError
        If the plan cannot be read, does not fit the model, was made for another accelerator, or
        asks for what this one cannot do.
    """
    complete = resolve_plan(model, precision, plan, elementwise_bits, loop_bits, recipe=recipe)
    where = "plan" if precision is None else f"precision {precision}"
    if isinstance(plan, str | Path):
        where = str(plan)
    if complete.target not in (None, accelerator.name):
        raise PlanError(
            f"was made for {complete.target}, not for {accelerator.name}",
            where=where,
            fix="make a plan for this target, or remove target from the plan if its precisions "
            "are meant to carry over",
        )
    accelerator.check(complete.layers, scan_inputs=complete.scan_inputs, where=where)
    return complete


def plan_of(model: Model) -> PrecisionPlan:
    """The plan that a quantized model follows; layers that stayed float have no precision.

    Scan inputs are named as in that model. Which percentiles its ranges come from it does not say.
    """
    precisions = {name: quantized_precision(node) for name, node in layer_nodes(model).items()}
    widths = [
        node.outputs[0].dtype.bitwidth
        for node in model.graph
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype is not None
    ]
    return PrecisionPlan(
        layers={name: entry for name, entry in precisions.items() if entry is not None},
        elementwise_bits=16 if max(widths, default=8) > 8 else 8,
        loop_bits=_loop_bits(model),
        scan_inputs=_scan_inputs(model),
        structure_hash=model.structure_hash,
        weights_hash=model.weights_hash,
    )


def _scan_inputs(model: Model) -> dict[str, Activation]:
    """What selective scans of a quantized model read as codes, and its form."""
    found = {}
    for scan in selective_scans(model.graph):
        for name, (node, index) in scan.places.items():
            value = node.inputs[index]
            form = None if value is None else quantized_activation(value)
            if form is not None:
                found[name] = form
    return found


def _loop_bits(model: Model) -> int:
    """Width of what operators other than layers read in the loops of a quantized model."""
    layers = set(layers_of(model.graph))
    widths = [
        codes.dtype.bitwidth
        for node in model.graph
        for inner in loop_body(node) or ()
        if inner.op_type == "QuantizeLinear"
        for codes in inner.outputs
        if codes.dtype is not None
        for use in codes.uses()
        for reader in use.node.outputs[0].uses()
        if reader.node not in layers and not is_move(reader.node)
    ]
    return max(8, *widths) if widths else FLOAT_BITS
