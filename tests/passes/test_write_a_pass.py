"""The pass and the test of docs/write-a-pass.md, as files of somebody else's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright
from bitwright.importer import import_model
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.quant.load import load
from bitwright.quant.reference import Reference
from tests.passes.modules import operators, run, transform

ROOT = Path(__file__).parents[2]
LENET = ROOT / "examples" / "lenet_digits"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = (ROOT / "docs" / "write-a-pass.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for name, block in zip(("my_passes.py", "test_my_passes.py"), blocks, strict=True):
        (tmp_path / name).write_text(block)
    return tmp_path


def test_the_test_of_the_document_passes(folder: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "test_my_passes.py"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_pass_of_the_document_keeps_the_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    from my_passes import PoolFirst  # type: ignore[import-not-found]

    with np.load(LENET / "calibration.npz", allow_pickle=False) as archive:
        images: Any = archive["image"][:16].astype(np.float32)
    quantized = bitwright.quantize(
        LENET / "lenet.onnx", precision="w8a8", calibration={"image": images}
    )
    model = load(quantized.model)
    lowered = transform(import_model(model), PropagateQuantization(), LowerToInteger())
    changed = transform(lowered, PoolFirst())
    order = [
        n for n in operators(changed["main"]) if n in ("nn.max_pool2d", "bitwright.requantize")
    ]
    assert order[:4] == ["nn.max_pool2d", "bitwright.requantize"] * 2
    expected = Reference(model).run({"image": images})[0]["logits"]
    np.testing.assert_array_equal(run(changed, images)[0], expected)
