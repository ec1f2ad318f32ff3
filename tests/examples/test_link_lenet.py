"""The example of the link counts, and its README says what it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "link_lenet"


def measured(folder: Path, *arguments: str) -> list[list[str]]:
    """Rows of the printed tables."""
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLE / "measure.py"),
            "--output",
            str(folder),
            "--without-area",
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if "│" in line]
    return [[cell.strip() for cell in row] for row in rows]


def test_two_networks_on_two_digits(tmp_path: Path) -> None:
    rows = measured(tmp_path, "--networks", "2", "--images", "2")
    by_name = {row[0]: row for row in rows}
    assert by_name["popcount of the inputs, exact"][-1] != "-"
    assert {"conv1", "conv2", "fc1", "fc2", "fc3"} <= by_name.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orders.png", "wires.png"]


@pytest.mark.slow
def test_the_readme_says_what_is_printed(tmp_path: Path) -> None:
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    printed: dict[str, str] = {}
    for row in measured(tmp_path):
        printed[row[0]] = " ".join([printed.get(row[0], ""), *row[1:]])
    for name in ("conv1", "chain of the weights", "popcount, exact"):
        said = re.search(rf"^\| {re.escape(name)} \|(.*)$", readme, re.MULTILINE)
        assert said is not None
        numbers = re.findall(r"-?\d+\.\d+", said[1])
        assert len(numbers) >= 6
        for number in numbers:
            assert number in printed[name], (name, number)
