"""bitwright compiles ONNX models for mixed-precision accelerators.

The public functions are here; each is a command of the ``bitwright`` program too. They load what
they need when they are first used, so that importing bitwright stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.errors import BitwrightError
    from bitwright.evaluation import Comparison, Evaluation, compare, evaluate
    from bitwright.inspection import Inspection, inspect
    from bitwright.planning import make_plan
    from bitwright.quantization import quantize
    from bitwright.vocabulary import Layer, Precision, PrecisionPlan

__all__ = [
    "BitwrightError",
    "Comparison",
    "Evaluation",
    "Inspection",
    "Layer",
    "Precision",
    "PrecisionPlan",
    "compare",
    "evaluate",
    "inspect",
    "make_plan",
    "quantize",
]

_HOMES = {
    "BitwrightError": "errors",
    "Comparison": "evaluation",
    "Evaluation": "evaluation",
    "Inspection": "inspection",
    "Layer": "vocabulary",
    "Precision": "vocabulary",
    "PrecisionPlan": "vocabulary",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "make_plan": "planning",
    "quantize": "quantization",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    value = getattr(import_module(f"bitwright.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
