"""The space of a search: which precisions each layer may have, as the genes of a genome.

Where a target allows every pair of its weight and activation widths, a layer has two genes, one for
the bits of its weights and one for those of its activations (MOHAQ on Bit Fusion); where it does
not, for example because both must be equal (SiLago), a layer has one gene for the pair. Layers that
are tied share their genes; layers that are kept have none. Every gene runs from few bits to many,
so that neighbouring values are neighbouring precisions. Soft-edge formats of activations, which are
asked for by name, are choices beside the widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from bitwright.errors import PlanError, UsageError
from bitwright.targets import Accelerator
from bitwright.vocabulary import Activation, ActivationFormat, Precision

__all__ = ["Gene", "Genome", "Plan", "Space", "make_space", "widest"]

Genome: TypeAlias = tuple[int, ...]
Plan: TypeAlias = tuple[Precision, ...]
"""The precision of every layer, in the order of the layers."""


# Formats of one width, from coarse to fine.
_RANKS: Final[Mapping[ActivationFormat, int]] = {
    "soft-edge6": 0,
    "int": 1,
    "soft-edge4": 2,
    "soft-edge8": 2,
    "soft-edge": 3,
}


def widest(precisions: Iterable[Precision]) -> Precision:
    """The precision with most bits."""
    return max(precisions, key=lambda p: (p.weight_bits + p.activation_bits, p.weight_bits))


@dataclass(frozen=True, slots=True)
class Gene:
    """One choice of a search.

    Attributes
    ----------
    layers
        The layers it decides about.
    part
        Whether it decides about bits of weights, of activations, or a pair of both.
    choices
        What can be chosen, from few bits to many. Activations are numbers of bits unless one of
        them has a format other than ``int``.
    """

    layers: tuple[str, ...]
    part: Literal["weights", "activations", "both"]
    choices: tuple[int, ...] | tuple[Activation, ...] | tuple[Precision, ...]

    @property
    def name(self) -> str:
        """Short name, for tables."""
        more = f" +{len(self.layers) - 1}" if len(self.layers) > 1 else ""
        return f"{self.layers[0]}{more}" + ("" if self.part == "both" else f" {self.part}")

    def value(self, precision: Precision) -> int | Activation | Precision:
        """What a precision is in the terms of this gene; it need not be a choice."""
        if self.part == "both":
            return precision
        if self.part == "weights":
            return precision.weight_bits
        form = precision.activation
        plain = form.format == "int" and isinstance(self.choices[0], int)
        return form.bits if plain else form

    def to_dict(self) -> dict[str, Any]:
        """Return what a study and ``--json`` hold."""
        choices = [c if isinstance(c, int) else str(c) for c in self.choices]
        return {"layers": list(self.layers), "part": self.part, "choices": choices}


@dataclass(frozen=True)
class Space:
    """All plans that a search may choose from.

    Attributes
    ----------
    layers
        Names of all layers, in order of execution.
    genes
        What is to be chosen.
    kept
        Precisions of the layers that no gene decides about.
    """

    layers: tuple[str, ...]
    genes: tuple[Gene, ...]
    kept: Mapping[str, Precision]

    @property
    def size(self) -> int:
        """Number of plans."""
        return math.prod(len(gene.choices) for gene in self.genes)

    @property
    def highest(self) -> npt.NDArray[np.int64]:
        """Largest value of each gene; the smallest is 0."""
        return np.array([len(gene.choices) - 1 for gene in self.genes], dtype=np.int64)

    def plan(self, genome: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Plan:
        """The plan that a genome stands for."""
        values = [gene.choices[int(g)] for gene, g in zip(self.genes, genome, strict=True)]
        found: list[Precision] = []
        for layer in self.layers:
            kept = self.kept.get(layer)
            if kept is not None:
                found.append(kept)
                continue
            chosen = [values[number] for number in self._genes_of[layer]]
            if isinstance(chosen[0], Precision):
                found.append(chosen[0])
            else:
                found.append(_pair(chosen[0], chosen[1]))
        return tuple(found)

    def genome(self, plan: Plan) -> Genome | None:
        """The genome of a plan; None if the plan is not in the space."""
        precisions = dict(zip(self.layers, plan, strict=True))
        if any(precisions[name] != kept for name, kept in self.kept.items()):
            return None
        genome = []
        for gene in self.genes:
            wanted = {gene.value(precisions[name]) for name in gene.layers}
            if len(wanted) > 1:
                return None
            value = wanted.pop()
            if value not in gene.choices:
                return None
            genome.append(list(gene.choices).index(value))
        return tuple(genome)

    def uniform(self) -> list[Plan]:
        """Plans in which all layers that are chosen about have one precision."""
        found: dict[Plan, None] = {}
        precisions = {p for name in self.layers for p in self.precisions(name)}
        for precision in sorted(precisions, key=_order):
            plan = tuple(self.kept.get(name, precision) for name in self.layers)
            if self.genome(plan) is not None:
                found[plan] = None
        return list(found)

    def precisions(self, layer: str) -> tuple[Precision, ...]:
        """Precisions that a layer may have, from few bits to many."""
        if layer in self.kept:
            return (self.kept[layer],)
        choices = [self.genes[number].choices for number in self._genes_of[layer]]
        pairs = [
            entry if isinstance(entry, Precision) else _pair(entry, other)
            for entry in choices[0]
            for other in (choices[1] if len(choices) > 1 else (entry,))
        ]
        return tuple(sorted(pairs, key=_order))

    @cached_property
    def _genes_of(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, gene in enumerate(self.genes):
            for layer in gene.layers:
                found.setdefault(layer, []).append(number)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return what a study and ``--json`` hold."""
        return {
            "size": self.size,
            "layers": list(self.layers),
            "genes": [gene.to_dict() for gene in self.genes],
            "kept": {name: str(precision) for name, precision in self.kept.items()},
        }


_PAIRS: dict[tuple[Any, Any], Precision] = {}


def _pair(weights: Any, activations: Any) -> Precision:
    # One object for each pair: costs are looked up by identity, which is faster.
    form = activations if isinstance(activations, Activation) else Activation(activations)
    return _PAIRS.setdefault((weights, form), Precision(weights, form.bits, form.format))


def _order(precision: Precision) -> tuple[int, int, int]:
    bits = precision.weight_bits + precision.activation_bits
    return bits, precision.weight_bits, _RANKS[precision.activation_format]


def _matching(pattern: str, layers: Sequence[str], option: str) -> list[str]:
    """Layers that a name or a pattern with * and ? stands for."""
    if pattern in layers:
        return [pattern]
    # Brackets stand for themselves: names may hold them.
    found = [name for name in layers if fnmatchcase(name, pattern.replace("[", "[[]"))]
    if not found:
        shown = ", ".join(layers[:12]) + (", ..." if len(layers) > 12 else "")
        raise UsageError(
            f"no layer is called {pattern!r}",
            where=option,
            fix=f"the model's layers are: {shown}; bitwright inspect prints them",
        )
    return found


def make_space(
    layers: Sequence[str],
    accelerator: Accelerator,
    *,
    precisions: Sequence[str | Precision] = (),
    keep: Mapping[str, str | Precision] | None = None,
    exclude: Sequence[str] = (),
    tie: Sequence[str] = (),
) -> Space:
    """Make the space of a search.

    Parameters
    ----------
    layers
        Names of the model's layers, in order of execution.
    accelerator
        What it may do.
    precisions
        What layers may have, of what the accelerator allows; by default all widths, activations
        of one step.
    keep
        Layer, or a pattern like ``conv*``, to the precision it has in all plans.
    exclude
        Layers or patterns that the search leaves alone, at the widest precision allowed.
    tie
        Layers or patterns, several separated by commas, that always have the same precision.

    Raises
    ------
    UsageError
        If options contradict each other, name no layer, or leave nothing to search.
    PlanError
        If the accelerator cannot do a precision.
    """
    allowed = accelerator.allowed_precisions
    chosen = [Precision.of(entry) for entry in precisions] or list(allowed)
    for entry in chosen:
        accelerator.check({"all layers": entry}, where="--precisions")
    kept: dict[str, Precision] = {}
    for pattern, text in (keep or {}).items():
        precision = Precision.of(text)
        for name in _matching(pattern, layers, "--keep"):
            if kept.setdefault(name, precision) != precision:
                raise UsageError(
                    f"layer {name!r} is kept at both {kept[name]} and {precision}",
                    where="--keep",
                    fix="leave out one",
                )
    try:
        accelerator.check(kept, where="--keep")
    except PlanError as error:
        raise PlanError(error.what, where="--keep", fix=error.fix) from None
    for pattern in exclude:
        for name in _matching(pattern, layers, "--exclude"):
            if name in kept:
                raise UsageError(
                    f"layer {name!r} is kept and excluded", where="--exclude", fix="leave out one"
                )
    excluded = {name for pattern in exclude for name in _matching(pattern, layers, "--exclude")}
    kept |= dict.fromkeys(sorted(excluded), widest(allowed))
    groups: dict[str, tuple[str, ...]] = {}
    for text in tie:
        names = [
            name
            for pattern in text.split(",")
            for name in _matching(pattern.strip(), layers, "--tie")
        ]
        group = tuple(name for name in layers if name in names)
        for name in group:
            if name in groups:
                raise UsageError(
                    f"layer {name!r} is tied twice", where="--tie", fix="tie all in one go"
                )
            if name in kept:
                raise UsageError(
                    f"layer {name!r} is tied, and kept or excluded", where="--tie", fix="choose one"
                )
            groups[name] = group
    genes: list[Gene] = []
    for name in layers:
        group = groups.get(name, (name,))
        if name not in kept and group[0] == name:
            genes.extend(_genes(group, chosen))
    space = Space(tuple(layers), tuple(genes), kept)
    if space.size < 2:
        raise UsageError(
            "there is nothing to search: "
            + ("every layer is kept" if not genes else "each layer has one precision left"),
            fix="keep or exclude fewer layers, or give more --precisions",
        )
    return space


def _genes(layers: tuple[str, ...], precisions: Sequence[Precision]) -> list[Gene]:
    pairs = sorted(set(precisions), key=_order)
    weights = tuple(sorted({p.weight_bits for p in pairs}))
    forms = tuple(
        sorted({p.activation for p in pairs}, key=lambda form: (form.bits, _RANKS[form.format]))
    )
    if len(pairs) == len(weights) * len(forms):
        plain = all(form.format == "int" for form in forms)
        activations = tuple(form.bits for form in forms) if plain else forms
        parts = [Gene(layers, "weights", weights), Gene(layers, "activations", activations)]
        several = [gene for gene in parts if len(gene.choices) > 1]
        if len(several) == 2:
            return parts
    own = tuple(_pair(p.weight_bits, p.activation) for p in pairs)
    return [Gene(layers, "both", own)]
