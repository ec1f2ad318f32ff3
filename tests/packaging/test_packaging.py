"""What users install: the wheel holds the whole package, nothing else, and works on its own."""

from __future__ import annotations

import json
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bitwright
from tests.packaging.conftest import ROOT, Environment, run

MODEL = ROOT / "examples" / "lenet_digits" / "lenet.onnx"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]


def mapped_folders() -> dict[str, Path]:
    """Import name to folder, for the five folders that pyproject.toml maps."""
    return {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def source_files() -> Iterator[tuple[str, Path]]:
    """Every file of the package: its name in the wheel and its path in the tree."""
    for name, folder in mapped_folders().items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(folder).as_posix()
                yield f"{name.replace('.', '/')}/{inside}", path


def test_every_folder_with_python_files_is_listed() -> None:
    folders = {
        name.rpartition("/")[0].replace("/", ".")
        for name, path in source_files()
        if path.suffix == ".py"
    }
    assert set(SETUPTOOLS["packages"]) == folders, "pyproject.toml: packages"


def test_every_package_has_an_init_file() -> None:
    names = {name for name, _ in source_files()}
    for package in SETUPTOOLS["packages"]:
        assert f"{package.replace('.', '/')}/__init__.py" in names


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    sources = dict(source_files())
    with zipfile.ZipFile(wheel) as archive:
        content = {
            name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name
        }
    assert set(sources) - set(content) == set(), "not in the wheel; see packages and package-data"
    assert set(content) - set(sources) == set(), "in the wheel, not in the tree"
    for name, path in sources.items():
        assert content[name] == path.read_bytes(), name
    assert "bitwright/py.typed" in content


def test_wheel_brings_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    version = PROJECT["project"]["version"]
    assert tops == {"bitwright", f"bitwright-{version}.dist-info"}


def test_wheel_carries_licence_and_metadata(wheel: Path) -> None:
    info = f"bitwright-{PROJECT['project']['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        licence = archive.read(f"{info}/licenses/LICENSE")
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0" in metadata
    assert "bitwright = bitwright.cli:main" in entry_points


def test_installed_command_shows_help(installed: Environment) -> None:
    output = run(installed.command, "--help", cwd=installed.elsewhere)
    for command in ("inspect", "quantize", "evaluate"):
        assert command in output


def test_installed_command_inspects_a_model(installed: Environment) -> None:
    output = run(installed.command, "inspect", MODEL, cwd=installed.elsewhere)
    for layer in ("conv1", "conv2", "fc1", "fc2", "fc3"):
        assert layer in output


def test_installed_command_runs_its_own_modules(installed: Environment) -> None:
    # Runs the console script itself, then tells which files it has loaded.
    code = """
import json, runpy, sys
script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
modules = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
print()
print(json.dumps({n: f for n, f in modules.items() if n.partition(".")[0] == "bitwright"}))
"""
    output = run(
        *(installed.python, "-c", code, installed.command, "inspect", MODEL),
        cwd=installed.elsewhere,
    )
    loaded: dict[str, str] = json.loads(output.splitlines()[-1])
    assert {"bitwright", "bitwright.cli", "bitwright.quant"} <= set(loaded)
    for name, file in loaded.items():
        assert Path(file).is_relative_to(installed.folder), f"{name}: {file}"


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_installed_packages_can_be_imported(installed: Environment, package: str) -> None:
    code = f"import {package} as package; print(package.__file__)"
    file = run(installed.python, "-c", code, cwd=installed.elsewhere).strip()
    assert Path(file).is_relative_to(installed.folder)


def test_editable_install_uses_the_tree() -> None:
    # These tests run from an editable installation; see CONTRIBUTING.md.
    assert Path(bitwright.__file__).resolve() == ROOT / "driver" / "__init__.py"
