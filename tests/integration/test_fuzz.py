"""Thousands of damaged ONNX files: an answer or an error, never a traceback, a hang or a crash.

``fuzz.py`` holds the mutations and the campaign. It runs in a process of its own, so that a crash
in a library of C++ ends the campaign and not the tests, and with a limit to its memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def campaign(folder: Path, *options: str, seconds: int) -> dict[str, Any]:
    """Run a campaign that must find nothing; return its totals."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.fuzz", str(folder), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    running = folder / "running.txt"
    if running.exists():  # it did not come to its end
        replay = running.read_text()
        pytest.fail(f"the process ended with {done.returncode} in {replay}{done.stderr[-3000:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    totals: dict[str, Any] = json.loads(done.stdout)
    return totals


def check(totals: dict[str, Any], cases: int) -> None:
    assert totals["cases"] == cases
    assert totals["failures"] == 0
    codes = totals["codes"]
    # The campaign reaches every part: many models are refused, and many are not.
    assert codes["inspect 2"] > 0.2 * cases
    assert codes["inspect 0"] > 0.2 * cases
    assert codes["quantize 0"] > 0.05 * cases
    assert codes["evaluate 0"] > 0.05 * cases
    assert totals["peak_bytes"] < 1 << 30


def test_mutated_models(tmp_path: Path) -> None:
    check(campaign(tmp_path, "--seed", "1", "--cases", "200", seconds=300), 200)


@pytest.mark.slow
def test_thousands_of_mutated_models(tmp_path: Path) -> None:
    options = ("--seed", "2", "--cases", "2500", "--everything")
    check(campaign(tmp_path, *options, seconds=1500), 2500)


def test_a_crash_is_reported_with_the_case(tmp_path: Path) -> None:
    """The campaign itself: what ends the process leaves a command that replays the case."""
    code = (
        "import os, signal, sys\n"
        "import tests.integration.fuzz as fuzz\n"
        "fuzz.run_case = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "sys.argv[1:] = [sys.argv[1], '--cases', '3', '--seed', '5']\n"
        "fuzz.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode < 0
    assert "--seed 5 --only 0" in (tmp_path / "running.txt").read_text()


@pytest.mark.parametrize("number", [0, 7])
def test_a_case_is_the_same_every_time(number: int) -> None:
    import random

    from tests.integration.fuzz import LENET, mutate

    content = LENET.read_bytes()
    first, again = (mutate(random.Random(f"1/{number}"), content) for _ in range(2))
    assert first == again
    assert first != content
