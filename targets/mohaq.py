"""The objectives of MOHAQ: memory, compression, speedup and energy of a precision plan.

Rezk et al., "MOHAQ: Multi-Objective Hardware-Aware Quantization", Journal of Systems Architecture
133, 2022, arXiv 2108.01192.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bitwright.errors import UsageError
from bitwright.targets.accelerators import Accelerator
from bitwright.vocabulary import Layer, ModelCost, Precision, PrecisionPlan

__all__ = ["Objectives", "objectives"]

_FLOAT_BITS: Final = 32
_OPERATIONS_PER_VECTOR_VALUE: Final = 10  # 88,000 and 8,800 in the paper's model


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a plan gains; None where the accelerator's cost model does not define it.

    Attributes
    ----------
    memory_mib
        Weights at their bits and vector values at 16 bits, in MiB (the paper writes MB).
    compression
        Memory of all of them at 32 bits, over ``memory_mib``.
    speedup
        The paper's: the mean over all operations of each operation's speed relative to the
        baseline. Operations that are no multiply-accumulates count in the mean and add nothing.
    speedup_share
        ``speedup`` over that of the fastest allowed precision.
    end_to_end_speedup
        Cycles of the baseline over cycles of the plan, layers one after another: what a machine
        gains.
    energy_uj
        Energy in microjoules, loading the vector values included.
    energy_saving_share
        Energy saved from the baseline, over what the most frugal allowed precision saves.
    """

    memory_mib: float
    compression: float
    speedup: float | None
    speedup_share: float | None
    end_to_end_speedup: float | None
    energy_uj: float | None
    energy_saving_share: float | None


def objectives(
    accelerator: Accelerator,
    layers: Sequence[Layer],
    plan: PrecisionPlan | Mapping[str, Precision] | Precision,
    *,
    vector_values: int = 0,
    elementwise_operations: int | None = None,
    baseline: Precision | None = None,
) -> Objectives:
    """Compute MOHAQ's objectives of a plan.

    Parameters
    ----------
    accelerator
        For the paper's figures ``silago/drra`` or ``bitfusion/mohaq``; any other with cycles works.
    layers
        The layers of the model.
    plan
        The precision of each.
    vector_values
        Values beside the weights that stay at 16 bits (8,800 in the paper's model).
    elementwise_operations
        Operations of one run that are no multiply-accumulates; by default ten for each vector
        value, as many as in the paper's model.
    baseline
        What speed is relative to; by default the widest precision that the accelerator allows.

    Raises
    ------
    PlanError
        If the plan does not fit the layers or the accelerator.
    UsageError
        If there are no layers, a number is negative, or the accelerator has no cost model.
    """
    if not layers or vector_values < 0 or (elementwise_operations or 0) < 0:
        raise UsageError("there must be layers, and numbers of values that are not negative")
    if elementwise_operations is None:
        elementwise_operations = _OPERATIONS_PER_VECTOR_VALUE * vector_values
    allowed = accelerator.allowed_precisions
    widest = baseline or max(allowed, key=lambda p: p.weight_bits + p.activation_bits)

    def cost(choice: PrecisionPlan | Mapping[str, Precision] | Precision) -> ModelCost:
        return accelerator.model_cost(layers, choice, vector_values=vector_values)

    chosen, base = cost(plan), cost(widest)
    uniform = [cost(precision) for precision in allowed]
    operations = base.macs + elementwise_operations
    speedup = _speedup(base, chosen, operations)
    fastest = max(
        (found for other in uniform if (found := _speedup(base, other, operations)) is not None),
        default=None,
    )
    energy, before = chosen.total_energy_pj, base.total_energy_pj
    least = min((e for other in uniform if (e := other.total_energy_pj) is not None), default=None)
    saved = None
    if energy is not None and before is not None and least is not None and least < before:
        saved = (before - energy) / (before - least)
    values = sum(layer.weight_count for layer in layers) + vector_values
    return Objectives(
        memory_mib=chosen.memory_bits / 8 / 2**20,
        compression=values * _FLOAT_BITS / chosen.memory_bits,
        speedup=speedup,
        speedup_share=None if speedup is None or not fastest else speedup / fastest,
        end_to_end_speedup=chosen.speedup_over(base),
        energy_uj=None if energy is None else energy / 1e6,
        energy_saving_share=saved,
    )


def _speedup(base: ModelCost, plan: ModelCost, operations: int) -> float | None:
    """Mean over all operations of the speed relative to the baseline."""
    total = 0.0
    for before, now in zip(base.layers, plan.layers, strict=True):
        ratio = now.speedup_over(before)
        if ratio is None:
            return None
        total += now.macs * ratio
    return total / operations
