"""What the commands of a search print for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

from rich.markup import escape

from bitwright import units
from bitwright.fronts import Front, Point
from bitwright.search.objectives import ErrorScale, Objective
from bitwright.search.space import Plan
from bitwright.searching import Search, Sensitivity
from bitwright.tables import new_console, new_table
from bitwright.units import quantity
from bitwright.vocabulary import Precision

__all__ = ["print_front", "print_search", "print_sensitivity", "short_plan"]

_LISTED = 8  # layers whose precisions are listed one by one


def short_plan(plan: Plan) -> str:
    """A plan in short: every layer's precision, or how many layers have which."""
    if len(plan) <= _LISTED:
        return " ".join(map(str, plan))
    counts = Counter(plan)
    ordered = sorted(counts, key=lambda p: (-counts[p], p.weight_bits, p.activation_bits))
    shown = [f"{counts[p]}x {p}" for p in ordered[:_LISTED]]
    return ", ".join(shown) + (", ..." if len(counts) > _LISTED else "")


def print_search(result: Search) -> None:
    """Print what a search found, or what it would do."""
    out = new_console()
    for note in result.notes:
        out.print(f"note: {escape(note)}")
    if result.front is not None:
        seconds = units.time(result.seconds)
        out.print(
            f"{result.new_evaluations:,} plans evaluated in {seconds} ({result.algorithm}); "
            f"{escape(result.ended)}",
        )
        print_front(result.front)
        return
    space = result.space
    listed = new_table("Genes", ["layer", "decides"], ["choices"])
    for gene in space.genes:
        layers = ", ".join(gene.layers)
        part = {"weights": "weight bits", "activations": "activation bits", "both": "precision"}
        listed.add_row(escape(layers), part[gene.part], " ".join(map(str, gene.choices)))
    for name, precision in space.kept.items():
        listed.add_row(escape(name), "kept", str(precision))
    out.print(listed)
    # Not float(): hundreds of layers make more plans than a float can count.
    size = f"{space.size:,}" if space.size < 10**12 else f"{Decimal(space.size):.3g}"
    out.print(f"space: {size} plans")
    out.print(
        f"float model: {result.scale.name} "
        f"{quantity(result.scale.shown(result.float_error), result.scale.shown_unit)}"
    )
    out.print(
        f"one evaluation: {units.time(result.seconds_per_evaluation)}; {result.evaluations:,} of "
        f"them ({result.algorithm}): at most {units.time(result.seconds)}, less with limits "
        "on the error and plans that begin alike"
    )


def print_front(found: Front, *, quiet: bool = False) -> None:
    """Print the points of a front, or the one that was picked; quietly their names alone."""
    out = new_console()
    points = found.points if found.picked is None else (found.picked,)
    if quiet:
        for point in points:
            out.print(f"{found.folder}#{point.number}", soft_wrap=True, markup=False)
        return
    objectives = found.problem.objectives
    scale = found.problem.scale
    tested = any(point.test_error is not None for point in (*points, *found.baselines))
    headings = [objective.name for objective in objectives] + (["test"] if tested else [])
    listed = new_table(f"{found.folder} ({found.facts.target})", ["number", "plan"], headings)
    for point in points:
        listed.add_row(*_row(point, objectives, scale, tested=tested))
    if found.picked is None and found.baselines:
        listed.add_section()
        for point in found.baselines:
            listed.add_row(*_row(point, objectives, scale, tested=tested))
    out.print(listed)
    said = f"float model: {scale.name} {quantity(found.float_error, scale.shown_unit)}"
    if found.float_test_error is not None:
        said += f", on test data {quantity(found.float_test_error, scale.shown_unit)}"
    parts = found.settings.subsets
    divided = f", the largest error of {parts} parts counts" if parts > 1 else ""
    out.print(f"{said} ({found.facts.samples:,} validation samples{divided})")
    counts = ", ".join(f"{count:,} {status}" for status, count in found.evaluations.items())
    size = "1 plan" if len(found.points) == 1 else f"{len(found.points)} plans"
    out.print(f"front: {size}; evaluations: {counts}")
    if len(found.facts.layers) <= _LISTED:
        out.print(f"plans are of the layers {escape(', '.join(found.facts.layers))}")
    if not found.points:
        out.print("no plan meets the constraints yet")
    else:
        chosen = found.picked or found.points[0]
        name = f"{found.folder}#{chosen.number}"
        out.print(
            f"to compile one: bitwright compile {found.settings.model.path} --plan '{name}' "
            "--output DIR",
            soft_wrap=True,
            markup=False,
        )


def _row(
    point: Point, objectives: Sequence[Objective], scale: ErrorScale, *, tested: bool
) -> list[str]:
    values = [quantity(point.values[o.name], o.unit) for o in objectives]
    if tested:
        values.append(quantity(point.test_error, scale.shown_unit))
    return [f"#{point.number}", short_plan(point.plan), *values]


def print_sensitivity(found: Sensitivity) -> None:
    """Print each layer's error at each precision."""
    out = new_console()
    unit = found.scale.shown_unit
    columns: dict[Precision, None] = {}
    for row in found.errors.values():
        columns.update(dict.fromkeys(row))
    ordered = sorted(columns, key=lambda p: (p.weight_bits + p.activation_bits, p.weight_bits))
    title = f"{found.scale.name} [{unit}]" if unit else found.scale.name
    listed = new_table(f"{title} with one layer at", ["layer"], [str(p) for p in ordered])
    for name in found.layers:
        row = found.errors[name]
        listed.add_row(
            escape(name),
            *(
                "" if p not in row else "-" if (value := row[p]) is None else f"{value:.4g}"
                for p in ordered
            ),
        )
    out.print(listed)
    out.print(
        f"all layers at the widest: {quantity(found.base_error, unit)}; float model: "
        f"{quantity(found.float_error, unit)}; {found.samples:,} samples; {found.target}"
    )
