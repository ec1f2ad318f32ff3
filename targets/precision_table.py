"""Costs by precision alone: a table of what a multiply-accumulate costs at each precision.

The form of the SiLago and Bit Fusion models in Rezk et al., "MOHAQ", Journal of Systems
Architecture 133, 2022, arXiv 2108.01192, and of what one measures on an accelerator of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, model_validator

from bitwright.errors import PlanError
from bitwright.targets.cost_model import CostModel
from bitwright.targets.schema import Number, Positive
from bitwright.vocabulary import Layer, LayerCost, Precision

__all__ = ["ByPrecision", "PrecisionTable", "check_tables"]


def _known(text: object) -> object:
    try:
        return str(Precision.parse(str(text)))
    except PlanError as error:
        raise ValueError(f"{error.what}; {error.fix}") from None


ByPrecision = Mapping[Annotated[str, BeforeValidator(_known)], Positive]
"""A positive number for each precision, ``{w8a8: 1, w4a4: 4}``."""


def check_tables(
    model: CostModel, names: Sequence[str], precisions: frozenset[Precision]
) -> tuple[str, str] | None:
    """Say which table leaves out an allowed precision or has one beyond them, and which."""
    allowed = {str(precision) for precision in precisions}
    for name in names:
        table = getattr(model, name)
        if table is None:
            continue
        if lacking := sorted(allowed - set(table.value)):
            return name, f"has no entry for {', '.join(lacking)}, which the accelerator allows"
        if beyond := sorted(set(table.value) - allowed):
            return (
                name,
                f"has an entry for {', '.join(beyond)}, which the accelerator does not allow",
            )
    return None


class PrecisionTable(CostModel):
    """A table of speeds and energies.

    Attributes
    ----------
    relative_speed
        Speed of multiply-accumulates relative to the slowest precision: gives ``relative_cycles``.
    macs_per_cycle
        Multiply-accumulates in a cycle, instead of ``relative_speed``: gives ``cycles``.
    mac_energy_pj
        Energy of a multiply-accumulate, in picojoules; needs ``memory_energy_pj_per_bit``.
    memory_energy_pj_per_bit
        Energy of loading a weight once, in picojoules per bit.
    """

    relative_speed: Number[ByPrecision] | None = None
    macs_per_cycle: Number[ByPrecision] | None = None
    mac_energy_pj: Number[ByPrecision] | None = None
    memory_energy_pj_per_bit: Number[Positive] | None = None

    @model_validator(mode="after")
    def _one_speed(self) -> PrecisionTable:
        if (self.relative_speed is None) == (self.macs_per_cycle is None):
            raise ValueError("give one of relative_speed and macs_per_cycle")
        if (self.mac_energy_pj is None) != (self.memory_energy_pj_per_bit is None):
            raise ValueError("mac_energy_pj and memory_energy_pj_per_bit go together")
        return self

    def check_precisions(self, precisions: frozenset[Precision]) -> tuple[str, str] | None:
        """Say which table leaves out which of the allowed precisions."""
        return check_tables(self, ("relative_speed", "macs_per_cycle", "mac_energy_pj"), precisions)

    def layer_cost(self, layer: Layer, precision: Precision) -> LayerCost:
        """Cost of the layer's multiply-accumulates, and of loading its weights once."""
        assert layer.macs is not None
        key = str(precision)
        relative = cycles = peak = None
        if self.relative_speed is not None:
            relative = layer.macs / self.relative_speed.value[key]
        elif self.macs_per_cycle is not None:
            peak = self.macs_per_cycle.value[key]
            cycles = math.ceil(layer.macs / peak)
        energy = None
        memory = self.memory_energy_pj(layer.weight_count * precision.weight_bits)
        if self.mac_energy_pj is not None and memory is not None:
            energy = {"memory": memory, "mac": layer.macs * self.mac_energy_pj.value[key]}
        return LayerCost.of(
            layer,
            precision,
            cycles=cycles,
            relative_cycles=relative,
            energy_pj=energy,
            peak_macs_per_cycle=peak,
        )

    def memory_energy_pj(self, bits: int) -> float | None:
        """Energy, in picojoules, of loading values once."""
        energy = self.memory_energy_pj_per_bit
        return None if energy is None else bits * energy.value
