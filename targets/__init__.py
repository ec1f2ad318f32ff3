"""Accelerators: descriptions, cost models and code generation.

``get("bitfusion/eyeriss")`` finds one, ``available()`` lists all.
"""

from __future__ import annotations

from bitwright.targets.accelerators import (
    Accelerator,
    Installed,
    available,
    get,
    installed,
    is_file,
)
from bitwright.targets.cost_model import CostModel
from bitwright.targets.schema import Count, Number, Positive

__all__ = [
    "Accelerator",
    "CostModel",
    "Count",
    "Installed",
    "Number",
    "Positive",
    "available",
    "get",
    "installed",
    "is_file",
]
