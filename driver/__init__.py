"""bitwright compiles ONNX models for mixed-precision accelerators.

The public functions are here; each is a command of the ``bitwright`` program too. They load what
they need when they are first used, so that importing bitwright stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright import targets
    from bitwright.artifact import Artifact, load_artifact
    from bitwright.choosing import choose_forms
    from bitwright.compilation import (
        Passes,
        compile,  # noqa: A004 - the command's name
        describe_passes,
        describe_target,
        describe_targets,
    )
    from bitwright.costing import Cost, cost
    from bitwright.errors import BitwrightError
    from bitwright.evaluation import Comparison, Evaluation, SideBySide, compare, evaluate, run
    from bitwright.fronts import Front, front
    from bitwright.inspection import Inspection, inspect
    from bitwright.linking import link
    from bitwright.planning import make_plan
    from bitwright.quant.forms import FormChoices
    from bitwright.quantization import quantize
    from bitwright.reporting import Report, report
    from bitwright.searching import Search, Sensitivity, search_precisions, sensitivity
    from bitwright.sorting import sorting_unit
    from bitwright.targets.sorting_unit import SortingUnit
    from bitwright.transitions import Transitions
    from bitwright.vocabulary import Layer, LayerCost, ModelCost, Precision, PrecisionPlan

__all__ = [
    "Artifact",
    "BitwrightError",
    "Comparison",
    "Cost",
    "Evaluation",
    "FormChoices",
    "Front",
    "Inspection",
    "Layer",
    "LayerCost",
    "ModelCost",
    "Passes",
    "Precision",
    "PrecisionPlan",
    "Report",
    "Search",
    "Sensitivity",
    "SideBySide",
    "SortingUnit",
    "Transitions",
    "choose_forms",
    "compare",
    "compile",
    "cost",
    "describe_passes",
    "describe_target",
    "describe_targets",
    "evaluate",
    "front",
    "inspect",
    "link",
    "load_artifact",
    "make_plan",
    "quantize",
    "report",
    "run",
    "search_precisions",
    "sensitivity",
    "sorting_unit",
    "targets",
]

_HOMES = {
    "Artifact": "artifact",
    "BitwrightError": "errors",
    "Comparison": "evaluation",
    "Cost": "costing",
    "Evaluation": "evaluation",
    "FormChoices": "quant.forms",
    "Front": "fronts",
    "Inspection": "inspection",
    "Layer": "vocabulary",
    "LayerCost": "vocabulary",
    "ModelCost": "vocabulary",
    "Passes": "compilation",
    "Precision": "vocabulary",
    "PrecisionPlan": "vocabulary",
    "Report": "reporting",
    "Search": "searching",
    "Sensitivity": "searching",
    "SideBySide": "evaluation",
    "SortingUnit": "targets.sorting_unit",
    "Transitions": "transitions",
    "choose_forms": "choosing",
    "compare": "evaluation",
    "compile": "compilation",
    "cost": "costing",
    "describe_passes": "compilation",
    "describe_target": "compilation",
    "describe_targets": "compilation",
    "evaluate": "evaluation",
    "front": "fronts",
    "inspect": "inspection",
    "link": "linking",
    "load_artifact": "artifact",
    "make_plan": "planning",
    "quantize": "quantization",
    "report": "reporting",
    "run": "evaluation",
    "search_precisions": "searching",
    "sensitivity": "searching",
    "sorting_unit": "sorting",
}


def __getattr__(name: str) -> Any:
    if name == "targets":  # a package of its own: bitwright.targets.get("bitfusion/eyeriss")
        return import_module("bitwright.targets")
    if name not in _HOMES:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    value = getattr(import_module(f"bitwright.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
