"""Accelerators: descriptions, cost models and code generation.

``get("bitfusion/eyeriss")`` finds one, ``available()`` lists all; ``get_link`` finds a link.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitwright.targets.accelerators import Accelerator
from bitwright.targets.catalogue import (
    Installed,
    available,
    available_links,
    get,
    get_link,
    installed,
    is_file,
)
from bitwright.targets.cost_model import CostModel
from bitwright.targets.link import Link
from bitwright.targets.schema import Clock, Count, Number, Positive

if TYPE_CHECKING:
    from bitwright.targets import cost_table, mohaq, testing

__all__ = [
    "Accelerator",
    "Clock",
    "CostModel",
    "Count",
    "Installed",
    "Link",
    "Number",
    "Positive",
    "available",
    "available_links",
    "cost_table",
    "get",
    "get_link",
    "installed",
    "is_file",
    "mohaq",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in ("cost_table", "mohaq", "testing"):  # modules, loaded when they are asked for
        return import_module(f"bitwright.targets.{name}")
    raise AttributeError(f"module 'bitwright.targets' has no attribute {name!r}")
