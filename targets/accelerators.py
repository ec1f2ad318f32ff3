"""Accelerators: what a target can do and what it costs, described by data."""

from __future__ import annotations

import math
import numbers
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from bitwright.errors import BitwrightError, PlanError, RunError, UsageError, first_line
from bitwright.targets.cost_model import CostModel
from bitwright.targets.link import Link
from bitwright.targets.schema import Count, Data, Number, Source
from bitwright.vocabulary import (
    Activation,
    ActivationFormat,
    Layer,
    LayerCost,
    LayerKind,
    ModelCost,
    Precision,
    PrecisionPlan,
)

__all__ = [
    "Accelerator",
    "Precisions",
    "TargetTag",
]

_SHOWN = 20  # layers that one message names
_VECTOR_BITS: Final = 16  # of the values beside the weights, as in MOHAQ

Bits = Literal[2, 4, 8, 16]


class Precisions(Data):
    """The precisions that an accelerator can compute a layer in.

    Attributes
    ----------
    weight_bits, activation_bits
        Widths, in bits.
    activation_formats
        How codes of activations may be laid out: ``int``, one step for all values, or soft-edge
        formats, which a decoder turns into 16 bits in front of the multipliers. A format can be
        had where ``activation_bits`` has its width, 8 or 4 bits.
    tied
        Whether the weights and the activations of a layer must have the same width.
    source
        Where the widths are published: a key of the description's ``sources``.
    """

    weight_bits: tuple[Bits, ...] = Field(min_length=1)
    activation_bits: tuple[Bits, ...] = Field(min_length=1)
    activation_formats: tuple[ActivationFormat, ...] = Field(default=("int",), min_length=1)
    tied: Annotated[bool, Field(strict=True)]
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _tied_widths_are_the_same(self) -> Precisions:
        for widths in (self.weight_bits, self.activation_bits):
            if len(set(widths)) < len(widths):
                raise ValueError("a width stands twice")
        if len(set(self.activation_formats)) < len(self.activation_formats):
            raise ValueError("a format stands twice")
        if "int" not in self.activation_formats:
            raise ValueError("int must be among activation_formats")
        for form in self.soft_edge:
            if form.bits not in self.activation_bits:
                raise ValueError(f"{form.format} needs activation_bits of {form.bits}")
        if self.tied and set(self.weight_bits) != set(self.activation_bits):
            raise ValueError("tied widths must be the same for weights and activations")
        return self

    @property
    def soft_edge(self) -> tuple[Activation, ...]:
        """Forms of activations other than integers of one step."""
        formats = (name for name in self.activation_formats if name != "int")
        return tuple(Activation.of_format(name) for name in formats)

    def __str__(self) -> str:
        formats = ", ".join(map(str, self.soft_edge))
        more = f", and activations {formats}" if formats else ""
        if self.tied:
            return ", ".join(f"w{bits}a{bits}" for bits in self.weight_bits) + more
        weights, activations = (
            ", ".join(map(str, bits)) for bits in (self.weight_bits, self.activation_bits)
        )
        return f"weights of {weights} bits with activations of {activations} bits{more}"


class TargetTag(Data):
    """The TVM target that stands behind an accelerator's name: a CPU that emulates it.

    Attributes
    ----------
    kind
        Kind of the TVM target.
    keys
        By which TVM chooses code; ``cpu`` among them.
    device, model
        The accelerator, for those who ask the target.
    """

    kind: Literal["llvm"]
    keys: tuple[str, ...] = Field(min_length=1)
    device: str
    model: str

    @field_validator("keys")
    @classmethod
    def _for_a_cpu(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if "cpu" not in keys:
            raise ValueError("'cpu' must be among the keys: TVM's code for the host depends on it")
        return keys


class Accelerator(Data):
    """An accelerator.

    Attributes
    ----------
    name
        Its tag, family and model: ``bitfusion/eyeriss``.
    summary
        What it is, in one line.
    sources
        Where its numbers come from, by the keys that the numbers name.
    precisions
        What it can compute a layer in.
    layer_kinds
        Kinds of layers that it can compute.
    weight_memory_bytes
        What its memory for weights holds; left out where weights are streamed from outside.
    cost_model
        What a layer costs (``cost`` in the file); None where nobody knows.
    link
        How operands reach its array; None where nobody knows.
    tag
        Its TVM target (``tvm_target`` in the file).
    """

    schema_version: Literal[1]
    name: str
    summary: str = Field(min_length=1)
    sources: dict[str, Source] = Field(min_length=1)
    precisions: Precisions
    layer_kinds: tuple[LayerKind, ...] = Field(
        default=("conv", "matmul", "recurrent", "scan"), min_length=1
    )
    weight_memory_bytes: Number[Count] | None = None
    cost_model: SerializeAsAny[CostModel] | None = Field(alias="cost", default=None)
    link: Link | None = None
    tag: TargetTag = Field(alias="tvm_target")

    @field_validator("name")
    @classmethod
    def _family_and_model(cls, name: str) -> str:
        part = r"[a-z0-9][a-z0-9_.+-]*"
        if re.fullmatch(f"{part}/{part}", name) is None:
            raise ValueError(f"{name!r} is no family/model of lower-case letters, digits and _.+-")
        return name

    def allows(self, precision: Precision) -> bool:
        """Whether a layer can have a precision."""
        weights, activations = precision.weight_bits, precision.activation_bits
        return (
            weights in self.precisions.weight_bits
            and activations in self.precisions.activation_bits
            and (weights == activations or not self.precisions.tied)
            and precision.activation_format in self.precisions.activation_formats
        )

    @property
    def allowed_precisions(self) -> tuple[Precision, ...]:
        """Every precision of one step that a layer can have, in the order of the description."""
        both = (
            Precision(weights, activations)
            for weights in self.precisions.weight_bits
            for activations in self.precisions.activation_bits
        )
        return tuple(precision for precision in both if self.allows(precision))

    @property
    def soft_edge_precisions(self) -> tuple[Precision, ...]:
        """Those with soft-edge activations, which are used only where they are asked for."""
        both = (
            Precision(weights, form.bits, form.format)
            for weights in self.precisions.weight_bits
            for form in self.precisions.soft_edge
        )
        return tuple(precision for precision in both if self.allows(precision))

    @property
    def frequency_mhz(self) -> float | None:
        """Clock, where the cost model has one."""
        clock = None if self.cost_model is None else self.cost_model.frequency_mhz
        return None if clock is None else clock.value

    def check(
        self,
        layers: Mapping[str, Precision],
        *,
        scan_inputs: Mapping[str, Activation] | None = None,
        where: str = "plan",
    ) -> None:
        """Refuse precisions that the accelerator cannot do.

        Parameters
        ----------
        layers
            Layer name to precision.
        scan_inputs
            Names of what selective scans read to its form. Scans run in float32, so that integers
            of any width will do; other formats need a decoder.
        where
            What they come from, for the message.

        Raises
        ------
        PlanError
            If there are such; it names the layers or tensors and what is allowed.
        """
        coded = [
            f"{name} ({form})"
            for name, form in (scan_inputs or {}).items()
            if form.format not in ("int", *self.precisions.activation_formats)
        ]
        if coded:
            forms = ", ".join(map(str, self.precisions.soft_edge))
            raise PlanError(
                f"{self.name} cannot decode what selective scans read: {_shown(coded)}",
                where=f"{where}, scan_inputs",
                fix=f"choose integers (a8), or {forms}"
                if forms
                else "choose integers (a8): it decodes no soft-edge activations",
            )
        refused = [
            f"{name} ({precision})"
            for name, precision in layers.items()
            if not self.allows(precision)
        ]
        fix = f"it allows {self.precisions}"
        formats = {entry.activation_format for entry in layers.values()} - {"int"}
        if refused and formats and not self.precisions.soft_edge:
            fix += "; it decodes no soft-edge activations"
        if len(refused) == len(layers) and len(set(layers.values())) == 1:
            (precision,) = set(layers.values())
            raise PlanError(
                f"{self.name} cannot do the precision {precision}", where=where, fix=fix
            )
        if refused:
            raise PlanError(
                f"{self.name} cannot do the precision of {_some(refused)}", where=where, fix=fix
            )

    def check_kinds(
        self, layers: Sequence[Layer], plan: Mapping[str, Precision], *, where: str = "plan"
    ) -> None:
        """Refuse layers of a plan whose kinds the accelerator cannot compute.

        Raises
        ------
        PlanError
            If there are such; it names the layers.
        """
        refused = [
            f"{layer.name} ({layer.kind})"
            for layer in layers
            if layer.name in plan and layer.kind not in self.layer_kinds
        ]
        if refused:
            raise PlanError(
                f"{self.name} cannot compute {_some(refused)}",
                where=where,
                fix=f"it computes layers of the kinds {', '.join(self.layer_kinds)}",
            )

    def check_memory(
        self, layers: Sequence[Layer], plan: Mapping[str, Precision], *, where: str = "plan"
    ) -> None:
        """Refuse a plan whose weights the accelerator's memory does not hold.

        Raises
        ------
        PlanError
            If it does not; it names the largest layers.
        """
        if self.weight_memory_bytes is None:
            return
        bits = [
            (layer.weight_count * plan[layer.name].weight_bits, layer.name)
            for layer in layers
            if layer.name in plan
        ]
        capacity, total = self.weight_memory_bytes.value, sum(count for count, _ in bits)
        if total > 8 * capacity:
            largest = sorted(bits, reverse=True)[:3]
            raise PlanError(
                f"the weights take {_bytes(total)}, and the memory of {self.name} "
                f"holds {_bytes(8 * capacity)}",
                where=where,
                fix="give large layers fewer bits: "
                + ", ".join(f"{name} ({plan[name]}, {_bytes(count)})" for count, name in largest),
            )

    def cost(self, layer: Layer, precision: Precision | str, **options: Any) -> LayerCost:
        """What a layer costs.

        Parameters
        ----------
        layer
            A layer of a model, or one built with :meth:`bitwright.Layer.conv` and the like.
        precision
            Its precision, ``w4a8`` as text.
        options
            Choices of the cost model: ``im2col=True`` for those of kind ``bitfusion``.

        Raises
        ------
        PlanError
            If the accelerator cannot do the precision.
        UsageError
            If it has no cost model, or the model does not know layers of this kind; if a size of
            the layer is not known, or the model has no such option.
        RunError
            If a cost model that is not bitwright's fails.
        """
        model = self._model()
        where = f"layer {layer.name!r}"
        precision = Precision.of(precision)
        self.check_costed(layer, [precision])
        parameters = signature(model.layer_cost).parameters
        known = list(parameters)[2:]
        free = any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
        if unknown := [name for name in options if name not in known and not free]:
            raise UsageError(
                f"the cost model of {self.name} has no option {unknown[0]!r}",
                fix=f"it has {', '.join(known)}" if known else "it has none",
            )
        try:
            cost = checked_cost(model.layer_cost(layer, precision, **options), layer, precision)
            if cost.seconds is None and cost.cycles is not None and self.frequency_mhz is not None:
                cost = replace(cost, seconds=cost.cycles / (1e6 * self.frequency_mhz))
        except BitwrightError as error:
            raise type(error)(error.what, where=error.where or where, fix=error.fix) from None
        except (Exception, SystemExit) as error:  # a model of others may raise anything
            raise self._failure(error, where) from error
        return cost

    def _failure(self, error: BaseException, where: str | None = None) -> RunError:
        """Make the error that tells what the code of a cost model raised, and where."""
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f"{f.filename}, line {f.lineno}" for f in frames if f.filename != __file__]
        return RunError(
            f"the cost model of {self.name} fails ({first_line(error)})",
            where=where or f"accelerator {self.name}",
            fix=f"it is the class {type(self.cost_model).__qualname__}; see "
            + (theirs[-1] if theirs else "what it gives"),
        )

    def __reduce__(self) -> tuple[object, ...]:
        # The classes of generic fields have no name to be found by.
        document = self.model_dump(mode="json", by_alias=True)
        return type(self).model_validate, ({**document, "cost": self.cost_model},)

    def check_costed(self, layer: Layer, precisions: Iterable[Precision]) -> None:
        """Refuse a layer that has no cost at some precision, whatever its sizes would give.

        Raises
        ------
        PlanError, UsageError
            As in :meth:`cost`.
        """
        where = f"layer {layer.name!r}"
        for precision in precisions:
            self.check({layer.name: precision}, where=where)
        kinds = [kind for kind in self._model().kinds if kind in self.layer_kinds]
        if layer.kind not in kinds:
            raise UsageError(
                f"{self.name} has no cost for layers of the kind {layer.kind!r}",
                where=where,
                fix=f"it has for {', '.join(kinds) or 'none'}",
            )
        if layer.macs is None:
            raise UsageError(
                "its sizes are not known, so it has no cost",
                where=where,
                fix="fix the symbolic sizes of the model's inputs (--input-shape)",
            )
        if layer.macs < 1:
            raise UsageError("computes nothing, so it has no cost", where=where)

    def model_cost(
        self,
        layers: Sequence[Layer],
        plan: PrecisionPlan | Mapping[str, Precision] | Precision | str,
        *,
        vector_values: int = 0,
    ) -> ModelCost:
        """What a model costs: its layers one after another.

        Parameters
        ----------
        layers
            Its layers, in order of execution.
        plan
            The precision of each; or one for all.
        vector_values
            Values beside the weights that count as memory, at 16 bits each.

        Raises
        ------
        PlanError, UsageError, RunError
            As in :meth:`cost`, or if the plan names other layers.
        """
        chosen = precisions_of(layers, plan)
        vector_bits = _VECTOR_BITS * vector_values
        model, capacity = self._model(), self.weight_memory_bytes
        try:
            vector_energy = model.memory_energy_pj(vector_bits)
        except (Exception, SystemExit) as error:  # a model of others may raise anything
            raise self._failure(error) from error
        return ModelCost(
            target=self.name,
            layers=tuple(self.cost(layer, chosen[layer.name]) for layer in layers),
            vector_bits=vector_bits,
            vector_energy_pj=vector_energy,
            capacity_bits=None if capacity is None else 8 * capacity.value,
        )

    def _model(self) -> CostModel:
        if self.cost_model is None:
            raise UsageError(
                f"{self.name} has no cost model",
                fix="add 'cost' to its description: see docs/write-a-target.md",
            )
        return self.cost_model

    def tvm_target(self, host: Mapping[str, Any] | None = None) -> Any:
        """Make the TVM target, and register its tag if TVM does not know it yet.

        Parameters
        ----------
        host
            Options of TVM's llvm target, for example ``{"mcpu": "x86-64-v3"}``.

        Returns
        -------
        tvm.target.Target

        Raises
        ------
        UsageError
            If TVM has another target of that name.
        """
        from tvm.target import Target

        self._register_tag()
        # A kind beside a tag would replace the tag's keys.
        options = {name: value for name, value in (host or {}).items() if name != "kind"}
        return Target({"tag": self.name, **options})

    def _register_tag(self) -> None:
        from tvm.target import list_tags, register_tag

        config = self.tag.model_dump()
        config["keys"] = list(config["keys"])
        known = list_tags().get(self.name)  # TVM refuses to register a tag twice
        if known is None:
            register_tag(self.name, config)
            return
        exported = known.export()
        exported = {**exported, "keys": [str(key) for key in exported["keys"]]}
        if any(exported.get(name) != value for name, value in config.items()):
            raise UsageError(
                f"TVM has another target {self.name!r}",
                where=f"accelerator {self.name}",
                fix="give the accelerator another name",
            )


def checked_cost(cost: object, layer: Layer, precision: Precision) -> LayerCost:
    """What a cost model returned, with Python's own numbers.

    Raises
    ------
    TypeError, ValueError
        If it is no cost of this layer at this precision, or has a number that is negative or not
        finite.
    """
    if not isinstance(cost, LayerCost):
        raise TypeError(f"layer_cost gives {type(cost).__name__}, not a LayerCost")
    if (cost.layer, cost.precision) != (layer.name, precision):
        raise ValueError(
            f"layer_cost gives the cost of {cost.layer!r} at {cost.precision}, not at {precision}"
        )
    if (cost.macs, cost.weight_bits) != (
        layer.macs,
        layer.weight_count * precision.weight_bits,
    ):
        raise ValueError("macs or weight_bits are not the layer's: make it with LayerCost.of")
    if cost.bound not in (None, "compute", "memory"):
        raise ValueError(f"bound is {cost.bound!r}, neither 'compute' nor 'memory'")
    if not isinstance(cost.energy_pj, Mapping | None):
        raise TypeError("energy_pj is no mapping of parts to picojoules")

    def own(name: str, value: object) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} is {value!r}, no number")
        found = int(value) if isinstance(value, numbers.Integral) else float(value)
        if not (math.isfinite(found) and found >= 0):
            raise ValueError(f"{name} is {found}")
        return found

    changed: dict[str, Any] = {name: own(name, getattr(cost, name)) for name in LayerCost.NUMBERS}
    for name in ("cycles", "relative_cycles", "peak_macs_per_cycle"):
        if changed[name] == 0:
            raise ValueError(f"{name} is 0")
    if (changed["stall_cycles"] or 0) > (changed["cycles"] or 0):
        raise ValueError("there are more stall_cycles than cycles")
    if cost.energy_pj is not None:
        changed["energy_pj"] = {
            str(part): own(f"energy_pj[{part}]", value) for part, value in cost.energy_pj.items()
        }
        if None in changed["energy_pj"].values():
            raise TypeError("a part of energy_pj is None: leave it out")
    return replace(cost, **changed)


def precisions_of(
    layers: Iterable[Layer], plan: PrecisionPlan | Mapping[str, Precision] | Precision | str
) -> Mapping[str, Precision]:
    """The precision of every layer.

    Raises
    ------
    PlanError
        If two layers have one name, or a plan leaves layers out or names others.
    """
    names = [layer.name for layer in layers]
    known = set(names)
    if len(known) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"two layers have the name {twice!r}", fix="give each one of its own")
    if isinstance(plan, Precision | str):
        return dict.fromkeys(names, Precision.of(plan))
    chosen = plan.layers if isinstance(plan, PrecisionPlan) else plan
    for what, wrong in (
        ("has no precision for", [name for name in names if name not in chosen]),
        ("names what is not in the model:", [name for name in chosen if name not in known]),
    ):
        if wrong:
            raise PlanError(f"{what} {_some(wrong)}", where="plan")
    return {name: Precision.of(precision) for name, precision in chosen.items()}


def _some(names: Sequence[str]) -> str:
    """How many layers, and the first of them."""
    count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return f"{count}: {_shown(names)}"


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _bytes(bits: int) -> str:
    return f"{math.ceil(bits / 8):,} bytes"
