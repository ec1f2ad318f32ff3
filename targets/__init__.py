"""Accelerators: descriptions, cost models and code generation.

``get("bitfusion/eyeriss")`` finds one, ``available()`` lists all.
"""

from __future__ import annotations

from bitwright.targets.accelerators import Accelerator, available, get, is_file

__all__ = ["Accelerator", "available", "get", "is_file"]
