"""What evaluations are asked and what they find. A leaf, so that studies are read at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["QuantizationOptions", "Result", "Status"]

Status: TypeAlias = Literal["ok", "stopped", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Result:
    """What an evaluation found.

    Attributes
    ----------
    status
        ``ok``; ``stopped`` where the limit was exceeded before all samples were run; ``failed``
        where the metric or the model gave no number; ``skipped`` where a limit of the hardware is
        exceeded, and the plan was not run.
    error
        Largest error over the subsets that were run, less is better; None where there is none.
    overall
        Error over all samples that were run.
    samples
        How many were run.
    seconds
        How long it took.
    message
        Why it failed.
    """

    status: Status
    error: float | None
    overall: float | None = None
    samples: int = 0
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class QuantizationOptions:
    """Options of ``bitwright quantize`` that a search fixes for all plans."""

    clip: Literal["mmse", "percentile", "minmax"] | None = None
    percentile: float | None = None
    per_channel: bool | None = None
    asymmetric: bool = False
    elementwise_bits: int = 16
    loop_bits: int = 32
    batch_size: int | None = None
    recipe: Literal["default", "naive", "quamba"] = "default"
    rotation: bool = True
