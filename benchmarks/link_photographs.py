"""Bit transitions of EfficientNet-Lite0 on photographs, in every order.

The whole traffic of all 50 layers at 8 bits, on the link of the authors' simulator: 8 inputs and 8
weights a flit, windows of 25 terms, column-major. ``nearest`` is the greedy nearest neighbour on
whole pairs of words, each lane going on where the window before ended.

Bound: the chain of the weights, which needs no hardware, closes at least 25 % of the gap between
popcount and the nearest neighbour.

Run from the repository root::

    python -m benchmarks.link_photographs

The exit code is 1 if the bound is broken.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import bitwright
from benchmarks import models
from benchmarks.tables import table
from bitwright.targets.link import ROW_MAJOR, UNSORTED

LEAST_OF_GAP = 0.25
EXACT, NEAREST = "popcount", "nearest"
ORDERS = (EXACT, "popcount=buckets:4", "gray-rank", "gray-rank=snake:true", "chain", NEAREST)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; give 1 if the bound does not hold, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photographs", type=int, default=1)
    options = parser.parse_args(arguments)
    model = models.efficientnet_lite0()
    calibration = models.photographs(16, seed=0, split="calibration")
    photographs = models.photographs(options.photographs, seed=0, split="evaluation")
    start = time.perf_counter()
    found = bitwright.link(
        model.path,
        {"input": photographs.inputs},
        link="ordering-simulator",
        orders=ORDERS,
        precision="w8a8",
        calibration={"input": calibration.inputs},
    )
    seconds = time.perf_counter() - start
    popcount, nearest = (found.total(order).transitions for order in (EXACT, NEAREST))
    shares, rows = {}, []
    for order in (ROW_MAJOR, UNSORTED, *ORDERS):
        sent = found.total(order)
        shares[order] = (popcount - sent.transitions) / (popcount - nearest)
        against = (found.saved(sent, found.total(base)) for base in (ROW_MAJOR, UNSORTED))
        taken = (f"{100 * (share or 0):.1f} %" for share in against)
        rows.append(
            [
                order,
                f"{sent.transitions / found.samples / 1e6:,.0f}",
                *taken,
                f"{100 * shares[order]:.0f} %",
            ]
        )
    headings = ["order", "million a photograph", "of row-major", "of column-major", "of the gap"]
    print(f"EfficientNet-Lite0, {found.samples} photographs, {seconds:.0f} s\n")
    print(table(headings, rows))
    return 0 if shares["chain"] >= LEAST_OF_GAP else 1


if __name__ == "__main__":
    sys.exit(main())
