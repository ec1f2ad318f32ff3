"""A systolic array for matrix products: utilisation of the array, and a roofline.

Weight-stationary: a block of weights lies in the array while inputs stream through it. Cycles are
those of the array, or those of external memory, whichever is more (Williams, Waterman and
Patterson, "Roofline", CACM 52(4), 2009). ``docs/targets.md`` says what this leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitwright.targets.cost_model import CostModel
from bitwright.targets.precision_table import ByPrecision, check_tables
from bitwright.targets.schema import Clock, Count, Number, Positive
from bitwright.vocabulary import Layer, LayerCost, Precision

__all__ = ["SystolicArray"]


class SystolicArray(CostModel):
    """A systolic array.

    Attributes
    ----------
    array_rows, array_columns
        Cells: the products of a column are summed, a row shares an input.
    macs_per_cell
        Multiply-accumulates of a cell in a cycle, by precision; below 1 where one takes longer.
    dram_bits_per_cycle
        Bandwidth of external memory.
    weight_buffer_kib, input_buffer_kib
        Buffers on the chip.
    accumulator_bits
        Width of partial sums.
    mac_energy_pj
        Energy of a multiply-accumulate, by precision.
    sram_energy_pj_per_bit, dram_energy_pj_per_bit
        Energy of an access to a buffer and to external memory.
    """

    frequency_mhz: Number[Clock]
    array_rows: Number[Count]
    array_columns: Number[Count]
    macs_per_cell: Number[ByPrecision]
    dram_bits_per_cycle: Number[Positive]
    weight_buffer_kib: Number[Count]
    input_buffer_kib: Number[Count]
    accumulator_bits: Number[Count]
    mac_energy_pj: Number[ByPrecision]
    sram_energy_pj_per_bit: Number[Positive]
    dram_energy_pj_per_bit: Number[Positive]

    def check_precisions(self, precisions: frozenset[Precision]) -> tuple[str, str] | None:
        """Say which table leaves out which of the allowed precisions."""
        return check_tables(self, ("macs_per_cell", "mac_energy_pj"), precisions)

    def layer_cost(self, layer: Layer, precision: Precision) -> LayerCost:
        """Cost of the layer, with the better of two orders of blocks."""
        assert layer.macs is not None
        work = _Work.of(layer)
        rows, columns = self.array_rows.value, self.array_columns.value
        per_cell = self.macs_per_cell.value[str(precision)]
        row_blocks = math.ceil(work.terms / (rows * max(1.0, per_cell)))
        column_blocks = math.ceil(work.channels / columns)
        # The next block's weights enter while this block works; then the array has to drain.
        block = max(work.positions / min(1.0, per_cell), rows) + rows + columns - 2
        compute = work.times * row_blocks * column_blocks * math.ceil(block)
        weights, inputs = self._reads(layer, precision, work)
        outputs = work.times * work.positions * work.channels * precision.activation.stored_bits
        cycles = max(compute, math.ceil((weights + inputs + outputs) / self._bandwidth))
        sums = work.times * work.positions * work.channels * (2 * row_blocks - 1)
        buffer_bits = (
            work.times
            * work.positions
            * work.terms
            * column_blocks
            * precision.activation.stored_bits
            + work.times * work.terms * work.channels * precision.weight_bits
            + sums * self.accumulator_bits.value
        )
        moved = weights + inputs + outputs
        return LayerCost.of(
            layer,
            precision,
            cycles=cycles,
            stall_cycles=cycles - compute,
            dram_read_bits=weights + inputs,
            dram_write_bits=outputs,
            energy_pj={
                "mac": layer.macs * self.mac_energy_pj.value[str(precision)],
                "sram": buffer_bits * self.sram_energy_pj_per_bit.value,
                "dram": moved * self.dram_energy_pj_per_bit.value,
            },
            peak_macs_per_cycle=rows * columns * per_cell,
            bound="memory" if cycles > compute else "compute",
        )

    @property
    def _bandwidth(self) -> float:
        return self.dram_bits_per_cycle.value

    def _reads(self, layer: Layer, precision: Precision, work: _Work) -> tuple[int, int]:
        """Bits of weights and inputs that are read from external memory."""
        weights = layer.weight_count * precision.weight_bits
        inputs = work.inputs * precision.activation.stored_bits
        weight_blocks = math.ceil(weights / (self.weight_buffer_kib.value * 1024 * 8))
        input_blocks = math.ceil(inputs / (self.input_buffer_kib.value * 1024 * 8))
        if layer.kind == "recurrent":  # a step needs the one before it: no block can stay
            return weights * (work.times if weight_blocks > 1 else 1), inputs * work.times
        # Either every block of weights meets all inputs, or every block of inputs all weights.
        inputs_again = weights, inputs * (weight_blocks if input_blocks > 1 else 1)
        weights_again = weights * (input_blocks if weight_blocks > 1 else 1), inputs
        return min(inputs_again, weights_again, key=sum)


@dataclass(frozen=True, slots=True)
class _Work:
    """A matrix product, and how many times it runs, one after the other.

    ``positions`` rows times ``terms`` that are summed times ``channels``; ``inputs`` are the values
    that a run reads, of all groups together.
    """

    positions: int
    terms: int
    channels: int
    inputs: int
    times: int

    @classmethod
    def of(cls, layer: Layer) -> _Work:
        assert layer.batch is not None
        assert layer.steps is not None
        output = [size for size in layer.output if size is not None]
        spans = (
            dilation * (kernel - 1) + 1 + (size - 1) * stride
            for size, kernel, stride, dilation in zip(
                output, layer.kernel, layer.stride, layer.dilation, strict=True
            )
        )
        return cls(
            positions=layer.batch * math.prod(output),
            terms=layer.in_channels // layer.groups * math.prod(layer.kernel),
            channels=layer.out_channels // layer.groups,
            inputs=layer.batch * layer.in_channels * math.prod(spans),
            times=layer.groups * layer.steps,
        )
