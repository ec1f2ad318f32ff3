"""Area and depth of sorting units, exact and by buckets, beside sorting networks.

Words of 8 bits, windows of 9, 25 and 49; keys are mapped to buckets uniformly. Yosys synthesises
every circuit with the cells of ``qflow-tech-osu018``, or counts transistors where that is not
installed; ABC's script is printed above the table and is the same for all. ``levels`` are the cells
on the longest path between registers. The networks sort by exact popcount, with the same ports,
latency and result as the unit: bubble sort and bitonic sort.

Bounds: the exact unit that is the default is the smallest exact unit, and from 25 terms on smaller
than the networks (of 9 terms a bitonic network is smaller); at 25 terms 4 buckets take at least
35.4 % less area than it (arXiv 2601.14087), and 8 buckets by Gray rank no more than it.

Run from the root of the repository (Debian: ``apt-get install yosys qflow-tech-osu018``)::

    python -m benchmarks.sorting_unit_area

``--windows 25`` measures that one alone, ``--script`` takes another script of ABC and
``--transistors`` counts transistors. The exit code is 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from benchmarks.synthesis import LIBERTY, SCRIPT, Netlist, synthesize, yosys
from benchmarks.tables import table
from bitwright.errors import BitwrightError
from bitwright.targets.orders import Key, key_count, uniform_map
from bitwright.targets.sorting_unit import SortingUnit, Starts

LEAST_SAVED = 0.354
WORD_BITS = 8
EXACT, FOUR, GRAY = "popcount, exact", "popcount, 4 buckets", "Gray rank, 8 buckets"
NETWORKS: tuple[Literal["bubble", "bitonic"], ...] = ("bubble", "bitonic")


def unit(window: int, key: Key, buckets: int, starts: Starts = "chained") -> SortingUnit:
    """A unit with a uniform map."""
    bucket_map = uniform_map(buckets, key_count(key, WORD_BITS)) if buckets else ()
    return SortingUnit(window, word_bits=WORD_BITS, key=key, bucket_map=bucket_map, starts=starts)


def circuits(window: int) -> dict[str, tuple[str, Callable[[], str]]]:
    """Module name and text of each circuit."""

    def of(key: Key, buckets: int, starts: Starts = "chained") -> tuple[str, Callable[[], str]]:
        return "sorting_unit", lambda: unit(window, key, buckets, starts).verilog()

    def network(name: Literal["bubble", "bitonic"]) -> tuple[str, Callable[[], str]]:
        def text() -> str:
            from benchmarks.sorting_networks import SortingNetwork

            return SortingNetwork(unit(window, "popcount", 0), name).verilog()

        return name, text

    return {
        EXACT: of("popcount", 0),
        f"{EXACT}, starts counted": of("popcount", 0, "counted"),
        "popcount, 8 buckets": of("popcount", 8),
        FOUR: of("popcount", 4),
        f"{FOUR}, starts counted": of("popcount", 4, "counted"),
        "popcount, 2 buckets": of("popcount", 2),
        GRAY: of("gray-rank", 8),
        "Gray rank, 4 buckets": of("gray-rank", 4),
        **{f"{name} sort": network(name) for name in NETWORKS},
    }


def broken_bounds(window: int, areas: dict[str, float]) -> list[str]:
    """What does not hold."""
    exact = areas[EXACT]
    peers = [f"{EXACT}, starts counted"]
    if window >= 25:
        peers += [f"{name} sort" for name in NETWORKS]
    broken = [
        f"window {window}: {name} is smaller than the exact unit"
        for name in peers
        if areas[name] < exact
    ]
    if window == 25:
        if 1 - areas[FOUR] / exact < LEAST_SAVED:
            broken.append(f"window 25: {FOUR} take less than {LEAST_SAVED:.1%} off")
        if areas[GRAY] > exact:
            broken.append(f"window 25: {GRAY} are larger than the exact unit")
    return broken


def measure(windows: Sequence[int], *, transistors: bool, script: str) -> list[str]:
    """Print the table; give the bounds that are broken."""
    yosys()
    liberty = None if transistors or not LIBERTY.exists() else LIBERTY
    what = "transistors (Yosys' estimate)" if liberty is None else f"cells of {LIBERTY.name}"
    print(f"{what}; abc script {script}\n")
    broken, rows = [], []
    jobs = [(window, *entry) for window in windows for entry in circuits(window).items()]

    def synthesized(job: tuple[int, str, tuple[str, Callable[[], str]]]) -> Netlist:
        _, _, (top, text) = job
        return synthesize(text(), top, liberty=liberty, script=script)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(synthesized, jobs))
    for window in windows:
        netlists = {job[1]: one for job, one in zip(jobs, found, strict=True) if job[0] == window}
        exact = netlists[EXACT].area
        for name, netlist in netlists.items():
            rows.append(
                [
                    str(window),
                    name,
                    f"{netlist.area:,.0f}",
                    f"{netlist.area / exact - 1:+.1%}",
                    str(netlist.levels),
                ]
            )
        rows.append([])
        broken += broken_bounds(window, {name: one.area for name, one in netlists.items()})
    print(table(["window", "<circuit", "area", "to exact", "levels"], rows[:-1]))
    return broken


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Area and depth of sorting units.")
    parser.add_argument("--windows", type=int, nargs="+", default=[9, 25, 49])
    parser.add_argument("--transistors", action="store_true")
    parser.add_argument("--script", default=SCRIPT)
    options = parser.parse_args()
    try:
        broken = measure(options.windows, transistors=options.transistors, script=options.script)
    except BitwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\nallowed: at 25 terms, 4 buckets at least {LEAST_SAVED:.1%} below exact")
    for line in broken:
        print(f"broken: {line}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
