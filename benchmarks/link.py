"""Speed of link kernels beside NumPy: counting transitions, ordering windows, whole layers.

Counting is measured against the speed at which ``np.copyto`` copies an array of the same bytes,
ordering against the stable sort of NumPy that gives the same words: ``table[words]``, ``argsort``,
``take_along_axis``. Both take turns in one run, on one thread; times are those of the processor, so
that waiting for it does not count, and ratios are medians of those of each turn. Words are random.

Bounds: transitions at half the speed of copying or more; 64-byte windows at least 7 times as fast
as NumPy; a byte of a stream 16 times as long takes at most 1.5 times as long.

Run from the repository root::

    python -m benchmarks.link

The exit code is 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.tables import table

Words = npt.NDArray[np.uint8]
Turns = list[tuple[float, ...]]

LEAST_OF_COPY, LEAST_OF_SORT, MOST_OF_LENGTH = 0.5, 7.0, 1.5
MIB = 1 << 20
WINDOW = 64


def turns(works: Sequence[Callable[[], object]], count: int) -> Turns:
    """Processor's seconds of each of some works, in turns; the first turn does not count."""
    found: Turns = []
    for _ in range(count + 1):
        seconds = []
        for work in works:
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        found.append(tuple(seconds))
    return found[1:]


def gigabytes(size: int, seconds: Sequence[float]) -> str:
    return f"{size / statistics.median(seconds) / 1e9:.2f}"


def counting(words: Words, count: int) -> tuple[list[list[str]], bool]:
    """Transitions of flits of several widths, beside copying."""
    from bitwright.targets.kernels.link import count_transitions

    rows, good = [], True
    target = np.empty_like(words)
    for lanes in (8, 16, 25, 64):
        flits = words[: len(words) // lanes * lanes].reshape(-1, lanes)

        def copy() -> None:
            np.copyto(target, words)

        found = turns([lambda flits=flits: count_transitions(flits), copy], count)  # type: ignore[misc]
        ratio = statistics.median(copied / counted for counted, copied in found)
        good = good and ratio >= LEAST_OF_COPY
        ours, copies = zip(*found, strict=True)
        rows.append(
            [
                f"transitions, {lanes} lanes",
                gigabytes(flits.size, ours),
                f"copyto {gigabytes(words.size, copies)}",
                f"{ratio:.2f} (>= {LEAST_OF_COPY})",
            ]
        )
    return rows, good


def ordering(words: Words, count: int) -> tuple[list[list[str]], bool]:
    """64-byte windows in order, beside NumPy's stable sort."""
    from bitwright.targets.kernels.link import reorder
    from bitwright.targets.orders import Order

    rows, good = [], True
    windows = words[: 2 * MIB].reshape(-1, WINDOW)
    for text in ("popcount", "popcount=buckets:4", "gray-rank=buckets:8", "gray-rank"):
        buckets = Order.parse(text).table(8)
        small = buckets.astype(np.uint8)  # what NumPy sorts fastest

        def peer(small: Words = small) -> npt.NDArray[np.uint8]:
            order = np.argsort(small[windows], axis=1, kind="stable")
            return np.take_along_axis(windows, order, 1)

        np.testing.assert_array_equal(reorder(windows, buckets), peer())
        found = turns([lambda buckets=buckets: reorder(windows, buckets), peer], count)  # type: ignore[misc]
        ratio = statistics.median(theirs / ours for ours, theirs in found)
        good = good and ratio >= LEAST_OF_SORT
        ours, theirs = zip(*found, strict=True)
        rows.append(
            [
                f"order, {text}",
                gigabytes(windows.size, ours),
                f"argsort {gigabytes(windows.size, theirs)}",
                f"{ratio:.1f} (>= {LEAST_OF_SORT:.0f})",
            ]
        )
    return rows, good


def lengths(words: Words, count: int) -> tuple[list[list[str]], bool]:
    """Time for a byte of a long stream, beside one of a sixteenth."""
    from bitwright.targets.kernels.link import count_transitions, reorder
    from bitwright.targets.orders import Order

    buckets = Order("popcount").table(8)
    rows, good = [], True
    works: dict[str, tuple[int, Callable[[Words], object]]] = {
        "transitions": (len(words), lambda part: count_transitions(part.reshape(-1, 16))),
        "order": (16 * MIB, lambda part: reorder(part.reshape(-1, WINDOW), buckets)),
    }
    for name, (size, work) in works.items():
        long, short = words[:size], words[: size // 16]
        calls = [lambda work=work, part=part: work(part) for part in (long, short)]
        found = turns(calls, count)
        ratio = statistics.median(whole / (16 * part) for whole, part in found)
        good = good and ratio <= MOST_OF_LENGTH
        wholes, parts = zip(*found, strict=True)
        rows.append(
            [
                f"{name}, {size // MIB} MiB",
                gigabytes(size, wholes),
                f"{size // 16 // MIB} MiB {gigabytes(size // 16, parts)}",
                f"{ratio:.2f} (<= {MOST_OF_LENGTH})",
            ]
        )
    return rows, good


def layers(count: int) -> list[list[str]]:
    """Windows a second of LeNet-5's second convolution, sums included, and of compiling."""
    from bitwright.targets.kernels import link as kernels
    from bitwright.targets.link import Link, Traffic
    from bitwright.targets.orders import Order
    from bitwright.targets.schema import Number

    link = Link(
        flit="paired",
        word_bits=Number(value=8, source="authors"),
        lanes=Number(value=8, source="authors"),
        packing="column-major",
        loops=("channel", "position", "chunk"),
        window=Number(value=25, source="authors"),
        source="authors",
        energy_pj_per_transition=Number(value=0.173, source="authors"),
        frequency_mhz=Number(value=125.0, source="authors"),
    )
    traffic = Traffic.convolution(
        "conv2",
        in_channels=6,
        size=(14, 14),
        out_channels=16,
        kernel=(5, 5),
        strides=(1, 1),
        dilations=(1, 1),
        pads=(0, 0, 0, 0),
        groups=1,
    )
    generator = np.random.default_rng(0)
    x = generator.integers(-128, 128, (32, 6 * 14 * 14)).astype(np.int8)
    w = generator.integers(-128, 128, (16, 150)).astype(np.int8)
    windows = len(x) * 16 * 100 * 6
    rows = []
    for text in ("none", "popcount", "popcount=on:inputs", "popcount=on:separated", "nearest"):
        order = Order.parse(text)
        buckets = order.table(8) if order.is_sorted else None
        places = None if buckets is None else kernels.positions(w, buckets, 25)

        def send(
            order: Order = order,
            buckets: npt.NDArray[np.uint16] | None = buckets,
            places: Words | None = places,
        ) -> None:
            kernels.layer_transitions(
                traffic, link, order, x, w, table=buckets, places=places, accumulator_bits=32
            )

        start = time.process_time()
        send()
        first = time.process_time() - start
        seconds = statistics.median(seconds for (seconds,) in turns([send], count))
        rows.append([text, f"{windows / seconds / 1e6:.2f}", f"{max(first - seconds, 0):.2f}"])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=9)
    count = parser.parse_args(arguments).turns
    os.environ["TVM_NUM_THREADS"] = "1"  # read when TVM starts its threads
    words = np.random.default_rng(0).integers(0, 256, 64 * MIB, np.uint8)
    parts = [measure(words, count) for measure in (counting, ordering, lengths)]
    rows = [row for part, _ in parts for row in (*part, [])][:-1]
    print(table(["<", "GB/s", "peer GB/s", "ratio"], rows))
    print("\nconv2 of LeNet-5, windows of 25 pairs, one thread")
    print(table(["<order", "million windows/s", "compiling s"], layers(count)))
    return 0 if all(good for _, good in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
