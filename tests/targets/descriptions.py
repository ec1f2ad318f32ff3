"""Descriptions of accelerators with something changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bitwright import targets

DROPPED = object()


def changed(folder: Path, name: str, changes: Mapping[str, Any]) -> Path:
    """Write an installed description with other values; ``a.b`` is a field inside another."""
    document = targets.get(name).model_dump(mode="json", by_alias=True, exclude_none=True)
    for field, value in changes.items():
        *outer, last = field.split(".")
        part = document
        for key in outer:
            part = part[key]
        if value is DROPPED:
            del part[last]
        else:
            part[last] = value
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


DESCRIPTION: dict[str, Any] = {
    "schema_version": 1,
    "name": "mine/one",
    "summary": "An accelerator of a test",
    "sources": {"test": {"text": "made up", "basis": "example"}},
    "precisions": {
        "weight_bits": [4, 8],
        "activation_bits": [8],
        "tied": False,
        "source": "test",
    },
    "tvm_target": {"kind": "llvm", "keys": ["mine", "cpu"], "device": "mine", "model": "one"},
}


def write(path: Path, **changes: Any) -> Path:
    """Write the description; ``a.b`` changes a field inside another."""
    document = copy.deepcopy(DESCRIPTION)
    for field, value in changes.items():
        *outer, name = field.split(".")
        part: dict[str, Any] = document
        for key in outer:
            part = part[key]
        part[name] = value
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path
