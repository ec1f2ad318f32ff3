"""A package of somebody else brings accelerators: installed by pip, without touching bitwright."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitwright import inspect
from tests.packaging.conftest import ROOT, Environment, run

PLUGIN = ROOT / "tests" / "plugin"
LENET = ROOT / "examples" / "lenet_digits"
MODEL = LENET / "lenet.onnx"


@pytest.fixture(scope="module")
def extended(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The clean environment with the plug-in beside bitwright."""
    copy = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("plugin") / "plugin")
    run(
        *(sys.executable, "-m", "pip", "--python", installed.python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"),
        copy,
        cwd=installed.elsewhere,
    )
    return installed


def test_its_accelerators_are_listed_and_described(extended: Environment) -> None:
    found = json.loads(run(extended.command, "targets", "--json", cwd=extended.elsewhere))
    assert {entry["name"] for entry in found} >= {
        "toy/bit-serial",
        "toy/table",
        "bitfusion/eyeriss",
    }
    shown = run(extended.command, "targets", "show", "toy/bit-serial", cwd=extended.elsewhere)
    assert "cell_energy_pj" in shown
    assert "Made up for a test" in shown


def test_its_cost_model_is_asked(extended: Environment) -> None:
    words = ("cost", MODEL, "--target", "toy/bit-serial", "--precision", "w4a8", "--json")
    found = json.loads(run(extended.command, *words, cwd=extended.elsewhere))
    expected = [math.ceil((layer.macs or 0) * 4 / 4096) for layer in inspect(MODEL).layers]
    assert [layer["cycles"] for layer in found["layers"]] == expected
    assert found["total"]["seconds"] == pytest.approx(sum(expected) / 100e6)


@pytest.mark.parametrize("name", ["toy/bit-serial", "toy/table"])
def test_it_passes_the_conformance_kit_in_one_line(extended: Environment, name: str) -> None:
    code = f"from bitwright.targets.testing import check_accelerator; check_accelerator({name!r})"
    run(extended.python, "-c", code, cwd=extended.elsewhere)


def test_models_are_compiled_for_it(extended: Environment) -> None:
    run(
        *(extended.command, "compile", MODEL, "--target", "toy/table", "--precision", "w4a4"),
        *("--calibration", LENET / "calibration.npz", "-o", "lenet"),
        cwd=extended.elsewhere,
    )
    cost = json.loads((extended.elsewhere / "lenet" / "cost.json").read_text())
    assert cost["target"] == "toy/table"
    assert cost["total"]["cycles"] == sum(
        math.ceil((layer.macs or 0) / 220) for layer in inspect(MODEL).layers
    )


@pytest.fixture
def broken(extended: Environment) -> Iterator[Environment]:
    (module,) = extended.folder.glob("lib/python*/site-packages/toy_chips/__init__.py")
    text = module.read_text()
    module.write_text("raise RuntimeError('no licence found')\n")
    yield extended
    module.write_text(text)


def test_once_broken_it_stands_in_nobodys_way(broken: Environment) -> None:
    def bitwright(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [broken.command, *words],
            cwd=broken.elsewhere,
            capture_output=True,
            text=True,
            check=False,
        )

    listed = bitwright("targets")
    assert listed.returncode == 0
    assert "silago/drra" in listed.stdout
    assert "not usable: the accelerators of 'toy_chips' cannot be loaded" in listed.stderr
    other = bitwright("cost", MODEL, "--target", "silago/drra", "--precision", "w4a4")
    assert (other.returncode, other.stderr) == (0, "")
    asked = bitwright("cost", MODEL, "--target", "toy/table", "--precision", "w4a4")
    assert asked.returncode == 2
    assert "there is no accelerator 'toy/table'" in asked.stderr
    assert "no licence found" in asked.stderr
