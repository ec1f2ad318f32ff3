"""A cost model that no description alone could give: weights enter bit by bit."""

from __future__ import annotations

import math

from bitwright import Layer, LayerCost, Precision
from bitwright.targets import Clock, CostModel, Count, Number, Positive


class BitSerial(CostModel):
    """An array whose cells take one bit of a weight in a cycle."""

    kinds = ("conv", "matmul")

    frequency_mhz: Number[Clock]
    cells: Number[Count]
    cell_energy_pj: Number[Positive]

    def layer_cost(self, layer: Layer, precision: Precision) -> LayerCost:
        assert layer.macs is not None
        steps = layer.macs * precision.weight_bits
        return LayerCost.of(
            layer,
            precision,
            cycles=math.ceil(steps / self.cells.value),
            stall_cycles=0,
            energy_pj={"cells": steps * self.cell_energy_pj.value},
            peak_macs_per_cycle=self.cells.value / precision.weight_bits,
            bound="compute",
        )
