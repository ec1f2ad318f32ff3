"""Speed of cost tables, beside the same equations in plain loops and beside ZigZag.

ResNet-50 (54 layers with weights, sizes as in He et al., arXiv 1512.03385, batches of 1 and 16) on
``bitfusion/eyeriss``: every layer at all 16 pairs of 2, 4, 8 and 16 bits, with the whole search
over tilings and loop orders. One thread; medians, and for plans the fastest of 25 rounds, as other
work on the machine only adds to so short a time. ``every layer`` computes equal layers again, a
table does not. The peers compute a few of these costs in the same run, ZigZag only if it is
installed (``pip install '.[zigzag]'``).

Bounds: a table with empty caches in at most 10 s, a plan's costs from it in at most 20 us, given by
indices, as a search asks for them; by names is printed beside it.

Run from the repository root::

    python -m benchmarks.costs

The exit code is 1 if a bound is broken.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.bitfusion_loops import cheapest
from benchmarks.tables import table
from bitwright import Layer, Precision, targets
from bitwright.targets import bitfusion
from bitwright.targets.cost_table import CostTable, cost_table

ALLOWED_TABLE_S, ALLOWED_PLAN_S = 10.0, 20e-6
PLANS, ROUNDS, REPEATS = 100, 20, 3  # few plans: a search prices each when it has just made it
PEER_LAYERS = ("conv1", "conv3_1b", "conv5_1c", "fc")
PEER_PRECISIONS = (Precision(8, 8), Precision(2, 2))
EYERISS = targets.get("bitfusion/eyeriss")


def resnet50(batch: int) -> list[Layer]:
    """The layers of ResNet-50 for 224 x 224 images."""
    layers = [
        Layer.conv(
            in_channels=3,
            out_channels=64,
            kernel=7,
            output=112,
            stride=2,
            batch=batch,
            reads_graph_input=True,
            name="conv1",
        )
    ]
    channels, size = 64, 56
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=2):
        for block in range(1, blocks + 1):
            stride = 2 if block == 1 and stage > 2 else 1
            before, size = size, size // stride
            name = f"conv{stage}_{block}"
            shapes = [
                ("a", channels, width, 1, before, 1),
                ("b", width, width, 3, size, stride),
                ("c", width, 4 * width, 1, size, 1),
                ("d", channels, 4 * width, 1, size, stride),  # beside the others
            ]
            layers += [
                Layer.conv(
                    in_channels=ins,
                    out_channels=outs,
                    kernel=kernel,
                    output=output,
                    stride=step,
                    batch=batch,
                    name=name + part,
                )
                for part, ins, outs, kernel, output, step in shapes[: 4 if block == 1 else 3]
            ]
            channels = 4 * width
    return [*layers, Layer.matmul(rows=batch, in_features=2048, out_features=1000, name="fc")]


def seconds_of(function: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Times of some calls, in order of length."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)


def median_seconds(function: Callable[[], object]) -> float:
    """Median time of a call."""
    return statistics.median(seconds_of(function))


def forget() -> None:
    """Empty the cache in memory."""
    bitfusion._cheapest.cache_clear()


def table_seconds(layers: list[Layer]) -> tuple[list[float], CostTable]:
    """Seconds for every layer by itself, for a table, and for one that is kept; and the table."""

    def each() -> None:
        for layer in layers:
            forget()
            for precision in EYERISS.allowed_precisions:
                EYERISS.cost(layer, precision)

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "costs.sqlite"
        found = cost_table(EYERISS, layers, cache=cache)

        def cold() -> None:
            forget()
            cost_table(EYERISS, layers)

        def kept() -> None:
            forget()
            cost_table(EYERISS, layers, cache=cache)

        return [median_seconds(work) for work in (each, cold, kept)], found


def plan_seconds(found: CostTable) -> list[float]:
    """Seconds for a plan's costs, given by indices and by names."""
    generator = np.random.default_rng(0)
    size = (PLANS, len(found.layers))
    choices = [*generator.integers(0, len(found.precisions), size=size)]
    plans = [
        dict(zip(found.layers, (found.precisions[i] for i in choice), strict=True))
        for choice in choices
    ]

    def by_indices() -> None:
        for choice in choices * ROUNDS:
            found.totals(choice)

    def by_names() -> None:
        for plan in plans * ROUNDS:
            found.totals(found.choice(plan))

    best = [float("inf")] * 2
    for _ in range(25):
        time.sleep(0.1)  # what else runs on the machine comes and goes
        found_now = [seconds_of(work, 1)[0] for work in (by_indices, by_names)]
        best = [min(pair) for pair in zip(best, found_now, strict=True)]
    return [seconds / (PLANS * ROUNDS) for seconds in best]


def peer_table() -> str:
    """Costs of a few layers by other means."""
    chosen = [layer for layer in resnet50(1) if layer.name in PEER_LAYERS]
    jobs = [(layer, precision) for layer in chosen for precision in PEER_PRECISIONS]

    def ours() -> None:
        forget()
        for layer, precision in jobs:
            EYERISS.cost(layer, precision)

    def loops() -> None:
        for layer, precision in jobs:
            cheapest(EYERISS, layer, precision, layer.reads_graph_input)

    def zigzag() -> None:
        other = targets.get("bitfusion/zigzag")
        for layer, precision in jobs:
            other.cost(layer, precision)

    peers = {"bitwright": ours, "the same equations in plain loops": loops}
    if find_spec("zigzag") is not None:
        zigzag()  # its import takes time of its own
        peers["ZigZag, by the adapter"] = zigzag
    measured = {name: median_seconds(work) for name, work in peers.items()}
    return table(
        ["<four of the layers at two precisions", "ms a cost", "times bitwright"],
        [
            [name, f"{1e3 * value / len(jobs):.2f}", f"{value / measured['bitwright']:.1f}"]
            for name, value in measured.items()
        ],
    )


def main() -> int:
    """Measure and print."""
    broken, rows = False, []
    for batch in (1, 16):
        layers = resnet50(batch)
        tables, found = table_seconds(layers)
        plans = plan_seconds(found)
        broken |= max(tables) > ALLOWED_TABLE_S or plans[0] > ALLOWED_PLAN_S
        rows.append(
            [
                f"ResNet-50, batch {batch}",
                str(len(layers) * len(found.precisions)),
                *(f"{seconds:.2f}" for seconds in tables),
                *(f"{1e6 * seconds:.1f}" for seconds in plans),
            ]
        )
    headings = [
        *("<network", "costs", "every layer, s", "table, s", "table kept on disk, s"),
        *("plan by indices, us", "by names, us"),
    ]
    print(table(headings, rows))
    print(f"\nallowed: {ALLOWED_TABLE_S:g} s; {1e6 * ALLOWED_PLAN_S:g} us by indices\n")
    print(peer_table())
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
