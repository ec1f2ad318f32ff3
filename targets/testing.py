"""A conformance kit for accelerators: what the search and the compiler rely on.

In the tests of a package that brings accelerators::

    from bitwright.targets.testing import check_accelerator

    def test_my_chip():
        check_accelerator("my_company/my_chip")

It needs no test framework; what is wrong comes as an ``AssertionError``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from bitwright.errors import PlanError, RunError, UsageError
from bitwright.targets.accelerators import Accelerator
from bitwright.targets.catalogue import get
from bitwright.targets.schema import entries
from bitwright.vocabulary import BIT_WIDTHS, Layer, LayerCost, Precision

__all__ = ["LAYERS", "check_accelerator"]

LAYERS: Final[tuple[Layer, ...]] = (
    Layer.conv(in_channels=256, out_channels=128, kernel=3, output=28, name="conv"),
    Layer.conv(in_channels=256, out_channels=256, kernel=1, output=14, batch=4, name="pointwise"),
    Layer.conv(in_channels=64, out_channels=64, kernel=3, output=28, groups=64, name="depthwise"),
    Layer.conv(in_channels=256, out_channels=64, kernel=(1, 7), output=(16, 8), name="flat"),
    Layer.matmul(rows=1, in_features=1024, out_features=512, name="vector"),
    Layer.matmul(rows=64, in_features=512, out_features=512, name="matrix"),
    Layer.recurrent(in_features=256, out_features=1024, steps=16, batch=2, name="recurrent"),
)
"""Layers that accelerators are checked with; channels fill arrays of usual sizes."""

_ROUNDING: Final = 1e-9
# Filling a buffer or the array's pipeline may cost a little more with narrower operands.
_TOLERANCE: Final = 0.01


def check_accelerator(
    accelerator: Accelerator | str | Path, layers: Sequence[Layer] = LAYERS
) -> None:
    """Check that an accelerator with a cost model keeps what bitwright relies on.

    - *Units*: every number of the description has a unit in its name, or is a count or a table;
      quantities are finite and not negative; time is cycles over the clock; parts do not exceed
      their whole, nor utilization 1.
    - *Determinism*: equal calls give equal costs, whatever was asked in between, whatever the
      layer is called, and after the description was read again.
    - *Monotone in bits*: with more bits for weights, activations or both, none of the quantities
      falls by more than 1 % that the model says are monotone (:attr:`CostModel.monotone`).
    - *Additive*: a model costs the sum of its layers.
    - *Precisions honoured*: each allowed precision has a cost that says so, each other is refused;
      so are kinds of layers that the model does not know.
    - *Link*, where there is one: its words hold the codes of a precision at least.

    Parameters
    ----------
    accelerator
        An accelerator, its name, or the path of its description.
    layers
        Layers to check with; those of kinds that the accelerator does not compute are refused by
        it, and that is checked.

    Raises
    ------
    AssertionError
        If one of these does not hold: which, and for what.
    """
    found = accelerator if isinstance(accelerator, Accelerator) else get(accelerator)
    assert found.cost_model is not None, f"{found.name} has no cost model"
    for name in found.cost_model.monotone:
        assert hasattr(LayerCost, name), f"monotone names {name!r}, which no cost has"
    _check_names(found)
    _check_link(found)
    known = [
        layer
        for layer in layers
        if layer.kind in found.cost_model.kinds and layer.kind in found.layer_kinds
    ]
    assert known, "none of the layers is of a kind that the cost model knows"
    for layer in layers:
        if layer not in known:
            _check_refused(found, layer)
    costs = {layer.name: _costs(found, layer) for layer in known}
    for layer in known:
        _check_precisions(found, layer)
        for cost in costs[layer.name].values():
            _check_units(found, cost)
        _check_same_quantities(costs[layer.name].values())
        _check_monotone(costs[layer.name], found.cost_model.monotone)
    document = found.model_dump(by_alias=True)
    document["cost"] = type(found.cost_model).model_validate(document["cost"])
    again = type(found).model_validate(document)
    for layer in reversed(known):
        renamed = {
            precision: replace(cost, layer="other") for precision, cost in costs[layer.name].items()
        }
        assert _costs(again, replace(layer, name="other")) == renamed, (
            f"{layer.name}: two equal calls, two costs"
        )
    _check_additive(found, known, costs)


def _costs(accelerator: Accelerator, layer: Layer) -> dict[Precision, LayerCost]:
    try:
        return {p: accelerator.cost(layer, p) for p in accelerator.allowed_precisions}
    except RunError as error:
        raise AssertionError(str(error)) from error


def _check_names(accelerator: Accelerator) -> None:
    for entry in entries(accelerator):
        assert entry.unit or "[" in entry.field or isinstance(entry.value, int), (
            f"{entry.field} is {entry.value}: its name says no unit, such as _mhz or _pj_per_bit"
        )


def _check_link(accelerator: Accelerator) -> None:
    link = accelerator.link
    if link is None:
        return
    bits = link.word_bits.value
    narrowest = min(
        max(precision.weight_bits, precision.activation_bits)
        for precision in accelerator.allowed_precisions
    )
    assert narrowest <= bits, f"link: words of {bits} bits, and no precision has so few"


def _check_refused(accelerator: Accelerator, layer: Layer) -> None:
    try:
        accelerator.cost(layer, accelerator.allowed_precisions[0])
    except UsageError:
        return
    raise AssertionError(f"{layer.name}: has a cost, though {layer.kind} is not among the kinds")


def _check_precisions(accelerator: Accelerator, layer: Layer) -> None:
    for weights, activations in itertools.product(BIT_WIDTHS, BIT_WIDTHS):
        precision = Precision(weights, activations)
        if accelerator.allows(precision):
            continue
        try:
            accelerator.cost(layer, precision)
        except PlanError:
            continue
        raise AssertionError(f"{layer.name}: has a cost at {precision}, which is not allowed")


def _check_units(accelerator: Accelerator, cost: LayerCost) -> None:
    where = f"{cost.layer} at {cost.precision}"
    assert (cost.cycles, cost.relative_cycles, cost.energy_pj) != (None, None, None), (
        f"{where}: neither cycles nor energy"
    )
    if cost.cycles is not None and accelerator.frequency_mhz is not None:
        seconds = cost.cycles / (1e6 * accelerator.frequency_mhz)
        assert cost.seconds is not None, f"{where}: no seconds"
        assert math.isclose(cost.seconds, seconds), (
            f"{where}: {cost.seconds} s, but {cost.cycles} cycles take {seconds} s"
        )
    utilization = cost.utilization
    assert utilization is None or utilization <= 1 + _ROUNDING, (
        f"{where}: does {utilization:.3f} of what the array can"
    )


def _check_same_quantities(costs: Iterable[LayerCost]) -> None:
    for name in (*LayerCost.NUMBERS, "energy_pj"):
        defined = {getattr(cost, name) is not None for cost in costs}
        assert len(defined) < 2, f"{name} is defined at some precisions only"


def _check_monotone(costs: Mapping[Precision, LayerCost], quantities: Sequence[str]) -> None:
    for narrow, wide in itertools.permutations(costs, 2):
        if narrow.weight_bits > wide.weight_bits or narrow.activation_bits > wide.activation_bits:
            continue
        for name in quantities:
            less, more = getattr(costs[narrow], name), getattr(costs[wide], name)
            assert less is None or more is None or less <= more * (1 + _TOLERANCE), (
                f"{costs[narrow].layer}: {name} is {less} at {narrow} and only {more} at {wide}"
            )


def _check_additive(
    accelerator: Accelerator,
    layers: Sequence[Layer],
    costs: Mapping[str, Mapping[Precision, LayerCost]],
) -> None:
    allowed = accelerator.allowed_precisions
    plan = {layer.name: allowed[i % len(allowed)] for i, layer in enumerate(layers)}
    total = accelerator.model_cost(layers, plan)
    for name in ("cycles", "relative_cycles", "dram_read_bits", "total_energy_pj"):
        values = [getattr(costs[layer.name][plan[layer.name]], name) for layer in layers]
        whole = getattr(total, name)
        if whole is not None:
            assert math.isclose(whole, sum(values)), (
                f"{name} of a model is {whole}, that of its layers {sum(values)}"
            )
