"""The example of a pipeline of one's own runs and is exact."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_custom_pipeline(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "custom_pipeline.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["nn.conv2d"] * 2 + ["matmul"] * 3
    assert all(re.search(r'dtype="int(32|64)"', line) for line in lines[:-1])
    assert lines[-1] == "equal to the integer reference: 100.00 %"
    assert list(tmp_path.iterdir()) == []
