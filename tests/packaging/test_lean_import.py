"""``import bitwright`` and ``bitwright --help`` answer at once: they load no heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "dask",
    "distributed",
    "jinja2",
    "jiwer",
    "ml_dtypes",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "plotly",
    "pydantic",
    "pymoo",
    "scipy",
    "torch",
    "tvm",
    "tvm_ffi",
    "yaml",
}

# The command line ends with SystemExit, so what was loaded is written in a `finally`.
REPORT = """
import json, pathlib, sys
try:
    {code}
finally:
    names = sorted({{name.partition(".")[0] for name in sys.modules}})
    pathlib.Path("modules.json").write_text(json.dumps(names))
"""

HELP = 'import bitwright.cli; sys.argv = ["bitwright", "--help"]; bitwright.cli.main()'


def loaded_by(code: str, folder: Path) -> tuple[set[str], str]:
    """Run ``code`` in a fresh interpreter; give the top-level modules it loaded and its output."""
    run = subprocess.run(
        [sys.executable, "-c", REPORT.format(code=code)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads((folder / "modules.json").read_text())), run.stdout


@pytest.mark.parametrize("code", ["import bitwright", HELP], ids=["import", "help"])
def test_loads_nothing_heavy(code: str, tmp_path: Path) -> None:
    modules, _ = loaded_by(code, tmp_path)
    assert "bitwright" in modules
    assert not modules & HEAVY, f"loaded: {', '.join(sorted(modules & HEAVY))}"


@pytest.mark.parametrize(
    "code",
    [
        "import bitwright.tables",
        "import bitwright; bitwright.describe_targets()",
        "import bitwright.search_tables, bitwright.search.workers",
    ],
)
def test_tvm_is_loaded_only_where_it_compiles_or_runs(code: str, tmp_path: Path) -> None:
    modules, _ = loaded_by(code, tmp_path)
    assert not modules & {"torch", "tvm", "tvm_ffi"}


def test_the_check_sees_a_heavy_module(tmp_path: Path) -> None:
    modules, _ = loaded_by("import bitwright, numpy", tmp_path)
    assert modules & HEAVY == {"numpy"}


def test_help_names_the_commands(tmp_path: Path) -> None:
    _, output = loaded_by(HELP, tmp_path)
    for command in ("inspect", "quantize", "evaluate", "compile", "run"):
        assert command in output
