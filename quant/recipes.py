"""Recipes: named sets of options of the quantizer, with what they do to the model before.

===========  =======================================================================================
``default``  what the options say; by themselves ``mmse`` and a weight scale an output channel
``naive``    w8a8 where no precision is given, and 8 bits for what selective scans read (other
             elementwise operators read what the plan says, by itself 16 bits); one symmetric scale
             a tensor, of its absolute maximum
``quamba``   the same, as in Quamba (arXiv 2410.13229), for models with selective scans (Mamba):
             what a scan takes as ``x`` is cut at a percentile, what the projection behind it reads
             is rotated by a Hadamard matrix, and weights of normalisations are folded
===========  =======================================================================================

Symmetric means signed codes with zero point 0, also where no value is negative (``dt``), and
``scale = range / 127``, as in the paper. Plans and options that are given win over those of a
recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from bitwright.errors import ModelError, UsageError
from bitwright.quant.load import Model
from bitwright.quant.norms import fold_norms
from bitwright.quant.observers import ClipMethod
from bitwright.quant.rotation import rotate_scan_outputs
from bitwright.quant.selective_scan import ROLES, SelectiveScan, selective_scans
from bitwright.vocabulary import Activation, Precision, PrecisionPlan

__all__ = ["RECIPES", "Recipe", "RecipeName", "get_recipe"]

RecipeName: TypeAlias = Literal["default", "naive", "quamba"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Options of the quantizer, and what is done to the model before.

    Attributes
    ----------
    clip, percentile, per_channel
        As in :func:`~bitwright.quant.quantizer.quantize_model`.
    symmetric
        Whether codes are signed also where no value is negative.
    precision
        The precision of all layers where neither it nor a plan is given; None where it has to be.
    scan_inputs
        How what selective scans read is quantized; None for not at all.
    clips_scans
        Whether ``percentile`` is about what selective scans take as ``x``, whatever ``clip`` says
        about the other tensors.
    folds_norms, rotates
        Whether weights of normalisations are folded, and scan outputs rotated.
    """

    name: RecipeName
    clip: ClipMethod
    percentile: float
    per_channel: bool
    symmetric: bool = False
    precision: Precision | None = None
    scan_inputs: Activation | None = None
    clips_scans: bool = False
    folds_norms: bool = False
    rotates: bool = False

    def with_options(
        self,
        *,
        clip: ClipMethod | None = None,
        percentile: float | None = None,
        per_channel: bool | None = None,
        rotation: bool = True,
    ) -> Recipe:
        """The recipe with options that were given; None for its own.

        Raises
        ------
        UsageError
            If the percentile is none, or nothing would be cut at it.
        """
        if percentile is not None and not 0.0 < percentile <= 100.0:
            raise UsageError(f"percentile {percentile} is not above 0 and at most 100")
        clip = self.clip if clip is None else clip
        if percentile is not None and clip != "percentile" and not self.clips_scans:
            raise UsageError(
                f"percentile {percentile:g} changes nothing: ranges are cut by {clip}",
                fix="leave it out, or cut ranges at it (--clip percentile)",
            )
        return replace(
            self,
            clip=clip,
            percentile=self.percentile if percentile is None else percentile,
            per_channel=self.per_channel if per_channel is None else per_channel,
            rotates=self.rotates and rotation,
        )

    def complete(self, model: Model, plan: PrecisionPlan) -> PrecisionPlan:
        """Add to a plan what the recipe says about the inputs of selective scans.

        Raises
        ------
        ModelError
            If the recipe is about selective scans, and the model has none.
        """
        scans = selective_scans(model.graph)
        if self.clips_scans and not scans:
            raise ModelError(
                f"has no selective scan, which recipe {self.name} is about",
                where=model.source,
                fix="use --recipe naive or default; docs/mamba.md says what a selective scan is",
            )
        scan_inputs = dict(plan.scan_inputs)
        percentiles = dict(plan.percentiles)
        for scan in scans:
            softened = any(
                name in plan.scan_inputs
                for name, (node, _) in scan.places.items()
                if node is not scan.node
            )
            for role in ROLES:
                value = scan.value(role)
                if value is None or (role == "dt" and softened):
                    continue
                if self.scan_inputs is not None:
                    scan_inputs.setdefault(str(value.name), self.scan_inputs)
                if self.clips_scans and role == "x":
                    percentiles.setdefault(str(value.name), self.percentile)
        return replace(plan, scan_inputs=scan_inputs, percentiles=percentiles)

    def rewrite(self, model: Model, scans: list[SelectiveScan]) -> None:
        """Fold and rotate, in a model that is prepared; notes say what was done."""
        notes = list(model.notes)
        if self.folds_norms and (folded := fold_norms(model)):
            notes.append(
                f"folded the weights of {len(folded)} normalisations into the projections behind "
                f"them: {_some(folded)}"
            )
        if self.rotates and (rotated := rotate_scan_outputs(model, scans)):
            notes.append(
                f"rotated the inputs of {len(rotated)} layers behind selective scans by Hadamard "
                f"matrices, and their weights back: {_some(rotated)}"
            )
        model.notes = tuple(notes)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


_EIGHT = Precision(8, 8)

RECIPES: Final[Mapping[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe("default", "mmse", 99.99, per_channel=True),
        Recipe(
            "naive",
            "minmax",
            99.99,
            per_channel=False,
            symmetric=True,
            precision=_EIGHT,
            scan_inputs=_EIGHT.activation,
        ),
        Recipe(
            "quamba",
            "minmax",
            99.999,
            per_channel=False,
            symmetric=True,
            precision=_EIGHT,
            scan_inputs=_EIGHT.activation,
            clips_scans=True,
            folds_norms=True,
            rotates=True,
        ),
    )
}
"""Every recipe by its name."""


def get_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises
    ------
    UsageError
        If there is none.
    """
    if name not in RECIPES:
        raise UsageError(f"{name!r} is no recipe", fix=f"choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
