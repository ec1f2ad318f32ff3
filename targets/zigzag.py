"""ZigZag's cost model for a Bit Fusion accelerator: a second opinion, and an example of an adapter.

Mei et al., "ZigZag: Enlarging Joint Architecture-Mapping Design Space Exploration for DNN
Accelerators", IEEE Transactions on Computers 70(8), 2021. The package ``zigzag-dse`` is needed.
"""

from __future__ import annotations

import hashlib
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bitwright.errors import UsageError
from bitwright.targets.bitfusion import BitFusion, problem_of
from bitwright.vocabulary import Layer, LayerCost, Precision

__all__ = ["ZigZag"]


class ZigZag(BitFusion):
    """A Bit Fusion accelerator as ZigZag sees it; the parameters are those of ``bitfusion``.

    The array is one of as many rows as it has lanes at a precision; buffers and external memory
    are ZigZag's, and so is the traffic between them. ``docs/targets.md`` names the differences.
    """

    @property
    def digest(self) -> str | None:
        """Hash of code, that of the mapping included, parameters and the version of ZigZag."""
        try:
            installed = version("zigzag-dse")
        except PackageNotFoundError:
            return None
        parameters = super().digest
        if parameters is None:
            return None
        mapping = hashlib.sha256(Path(__file__).with_name("zigzag_mapping.py").read_bytes())
        return f"{parameters}-{mapping.hexdigest()}-{installed}"

    def layer_cost(
        self, layer: Layer, precision: Precision, *, im2col: bool | None = None
    ) -> LayerCost:
        """Cost of the mapping that takes the least energy among those that are about the fastest.

        Parameters
        ----------
        layer, precision, im2col
            As in :meth:`BitFusion.layer_cost`.

        Raises
        ------
        UsageError
            If ZigZag is not installed, or a buffer cannot hold what one step needs.
        """
        try:
            from bitwright.targets.zigzag_mapping import best_mapping
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("zigzag"):
                raise
            raise UsageError(
                "this target asks ZigZag, which is not installed",
                fix="pip install 'bitwright[zigzag]'",
            ) from None
        problem, times = problem_of(layer, im2col)
        steps = self.steps(precision)
        found = best_mapping(self, problem, precision, steps)
        rates = (*self.buffer_energies, (self.dram_energy_pj_per_bit.value,) * 2)
        names = ("weight_buffer", "input_buffer", "output_buffer", "dram")
        energy = {
            name: read * rate[0] + written * rate[1]
            for name, rate, (read, written) in zip(names, rates, found.bits, strict=True)
        }
        energy["core"] = found.compute_cycles * self.core_energy_pj_per_cycle.value
        dram_read, dram_written = found.bits[-1]
        transfer = math.ceil((dram_read + dram_written) / self.dram_bits_per_cycle.value)
        return LayerCost.of(
            layer,
            precision,
            cycles=times * found.cycles,
            stall_cycles=times * (found.cycles - found.compute_cycles),
            dram_read_bits=times * dram_read,
            dram_write_bits=times * dram_written,
            energy_pj={part: times * value for part, value in energy.items()},
            peak_macs_per_cycle=self.peak_macs_per_cycle(precision),
            bound="memory" if transfer > found.compute_cycles else "compute",
        )
