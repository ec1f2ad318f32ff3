"""The C++ example builds, and prints the classes that Python computes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bitwright

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LENET = EXAMPLES / "lenet_digits"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    for name in ("classify.cc", "Makefile"):
        shutil.copy(EXAMPLES / "cpp_runtime" / name, folder)
    subprocess.run(
        ["make", f"PYTHON={sys.executable}", "CXXFLAGS=-O0 -Wall -Wextra -Werror"],
        cwd=folder,
        check=True,
        timeout=120,
    )
    return folder / "classify"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> bitwright.Artifact:
    return bitwright.compile(
        LENET / "lenet.onnx",
        "bitfusion/eyeriss",
        precision="w4a8",
        calibration=LENET / "calibration.npz",
        output=tmp_path_factory.mktemp("artifacts") / "lenet",
    )


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("samples", [1, 500])
def test_classes_are_those_of_python(
    program: Path, artifact: bitwright.Artifact, tmp_path: Path, samples: int
) -> None:
    with np.load(LENET / "test.npz") as archive:
        images = archive["image"][:samples].astype(np.float32)
    images.tofile(tmp_path / "images.raw")
    done = run(program, artifact.folder, tmp_path / "images.raw")
    assert done.returncode == 0, done.stderr
    classes = artifact.run({"image": images})["logits"].argmax(axis=1)
    assert [int(line) for line in done.stdout.split()] == classes.tolist()


def test_errors_are_told(program: Path, artifact: bitwright.Artifact, tmp_path: Path) -> None:
    (tmp_path / "images.raw").write_bytes(b"abc")
    for words, message in (
        ([], "usage: classify FOLDER INPUTS.raw"),
        ([tmp_path, "x"], "manifest.json: cannot be read"),
        ([artifact.folder, "x"], "x: cannot be read"),
        ([artifact.folder, tmp_path / "images.raw"], "its size is no multiple of 3136"),
    ):
        done = run(program, *words)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
