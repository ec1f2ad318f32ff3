"""Area and depth of Verilog, by Yosys and ABC."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import RunError, UsageError

LIBERTY = Path("/usr/share/qflow/tech/osu018/osu018_stdcells.lib")
"""Cells of Oklahoma State University for 0.18 um, as Debian's ``qflow-tech-osu018`` has them."""

# The default script of `abc -liberty` does not end on these circuits in any reasonable time.
SCRIPT = "+strash;dch,-f;map;topo"


@dataclass(frozen=True)
class Netlist:
    """A circuit after mapping to cells.

    Attributes
    ----------
    area
        In the units of the library (square micrometres in most), or in transistors.
    levels
        Cells on the longest path between registers.
    """

    area: float
    levels: int


def yosys() -> str:
    """Path of Yosys: the variable ``YOSYS``, or the program of that name.

    Raises
    ------
    UsageError
        If there is none.
    """
    name = os.environ.get("YOSYS", "yosys")
    found = shutil.which(name)
    if found is None:
        raise UsageError(
            f"areas are measured by Yosys, and there is no program {name!r}",
            fix="install it (Debian: apt-get install yosys qflow-tech-osu018), or set YOSYS",
        )
    return found


def synthesize(
    verilog: str, top: str, *, liberty: Path | None = LIBERTY, script: str = SCRIPT
) -> Netlist:
    """Map a circuit to cells.

    Parameters
    ----------
    verilog
        Its text.
    top
        Its module.
    liberty
        The library of cells; None counts transistors of static CMOS gates, Yosys' estimate.
    script
        The script of ABC, which decides about a tenth of an area.

    Raises
    ------
    UsageError
        If Yosys is not installed.
    RunError
        If it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "circuit.v"
        source.write_text(verilog)
        if liberty is None:
            mapped = f'dfflegalize -cell $_DFF_P_ 01; abc -g cmos -script "{script};print_stats"'
            stat = "stat -tech cmos"
        else:
            mapped = (
                f'dfflibmap -liberty {liberty}; abc -script "{script};print_stats" '
                f"-liberty {liberty}"
            )
            stat = f"stat -liberty {liberty}"
        commands = [
            f"read_verilog {source}",
            f"synth -flatten -noabc -noshare -top {top}",
            mapped,
            "opt_clean",
            stat,
        ]
        done = subprocess.run(
            [yosys(), "-p", "; ".join(commands)], capture_output=True, text=True, check=False
        )
    area = re.findall(r"(?:Chip area .*|number of transistors): +([\d.]+)\n", done.stdout)
    levels = re.findall(r"lev = *(\d+)", re.sub(r"\x1b\[[\d;]*m", "", done.stdout))
    if done.returncode or not area or not levels:
        what = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RunError(f"Yosys failed: {' '.join(what) or 'it said nothing'}", where=top)
    return Netlist(float(area[-1]), int(levels[-1]))
