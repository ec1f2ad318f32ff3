"""Bit Fusion layers by three models: the public simulator, bitwright, and ZigZag.

The six layers whose costs the simulator's authors publish (``tests/targets/bitfusion_layers.json``
names the source), batch 16. bitwright computes the simulator's equations and must give its numbers
exactly; ZigZag is an independent model of the same array, buffers and bandwidth, asked through the
target ``bitfusion/zigzag`` (``pip install '.[zigzag]'``). ``docs/targets.md`` says where the two
differ.

Run from the repository root::

    python -m benchmarks.second_opinion

The exit code is 1 if bitwright's numbers are not the published ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.tables import table
from bitwright import Layer, Precision, targets

PUBLISHED = Path(__file__).parents[1] / "tests" / "targets" / "bitfusion_layers.json"


def main() -> int:
    """Compute and print."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    eyeriss, zigzag = targets.get("bitfusion/eyeriss"), targets.get("bitfusion/zigzag")
    rows, equal = [], True
    for entry in published["layers"]:
        layer = Layer.conv(
            in_channels=entry["in_channels"],
            out_channels=entry["out_channels"],
            kernel=entry["kernel"],
            output=entry["output"],
            stride=entry["stride"],
            batch=published["configuration"]["batch"],
            reads_graph_input=entry["im2col"],
            name=entry["name"],
        )
        precision = Precision(entry["weight_bits"], entry["activation_bits"])
        ours, theirs = eyeriss.cost(layer, precision), zigzag.cost(layer, precision)
        names = ("cycles", "stall_cycles", "dram_read_bits", "dram_write_bits")
        equal &= all(getattr(ours, name) == entry[name] for name in names)
        assert theirs.cycles is not None
        assert theirs.dram_read_bits is not None
        rows.append(
            [
                entry["name"],
                str(precision),
                f"{entry['cycles']:,}",
                f"{ours.cycles:,}",
                f"{theirs.cycles:,}",
                f"{theirs.cycles / entry['cycles']:.2f}",
                f"{entry['dram_read_bits'] / 2**23:.2f}",
                f"{theirs.dram_read_bits / 2**23:.2f}",
                f"{theirs.dram_read_bits / entry['dram_read_bits']:.2f}",
            ]
        )
    headings = [
        *("<layer", "<precision", "cycles, published", "bitwright", "ZigZag", "ratio"),
        *("MiB read, published", "ZigZag", "ratio"),
    ]
    print(table(headings, rows))
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
