"""Constant orders: each weight next to the nearest that is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitwright.targets.link import Traffic, flits, transitions
from bitwright.targets.orders import Order, counting_sort
from bitwright.targets.places import chain
from tests.targets.test_link import link


def weights(channels: int, terms: int, seed: int = 0) -> Any:
    """Words of int8 weights as a trained layer has them: near zero, of both signs."""
    values = np.random.default_rng(seed).normal(0, 25, (channels, terms)).round()
    return values.clip(-127, 127).astype(np.int8)


def by_hand(window: Any, before: Any, lanes: int, packing: str) -> Any:
    """Greedy choice, word by word; ``before`` is what each lane sent last."""
    count = -(-len(window) // lanes)
    grid = np.zeros((count, lanes), int)
    left = dict(enumerate(window))
    places = {}
    for rank in range(len(window)):
        flit, lane = (
            divmod(rank, lanes) if packing == "row-major" else (rank % count, rank // count)
        )
        previous = grid[flit - 1, lane] if flit else before[lane]
        term = min(left, key=lambda k: ((int(left[k]) ^ int(previous)).bit_count(), k))
        grid[flit, lane] = left.pop(term)
        places[term] = rank
    return [places[term] for term in range(len(window))], grid[-1]


@pytest.mark.parametrize("packing", ["row-major", "column-major"])
@pytest.mark.parametrize(
    "loops", [["channel", "position", "chunk"], ["position", "chunk", "channel"]]
)
def test_a_lane_goes_on_where_the_window_before_ended(packing: str, loops: list[str]) -> None:
    wires = link(lanes=4, window=10, packing=packing, loops=loops)
    words = wires.words(weights(5, 34))
    found = chain(words, wires, positions=6, snake=False)
    spans = [slice(k, k + 10) for k in range(0, 34, 10)]
    streams = (
        [[(channel, span) for span in spans] for channel in range(5)]
        if loops[-1] == "chunk"
        else [[(channel, span) for channel in range(5)] for span in spans]
    )
    for stream in streams:
        last = [0] * 4
        for channel, span in stream:
            expected, last = by_hand(words[channel, span], last, 4, packing)
            assert found[channel, span].tolist() == expected


@pytest.mark.parametrize("snake", [False, True])
def test_each_window_holds_a_permutation(snake: bool) -> None:
    for loops in (["channel", "chunk", "position"], ["position", "channel", "chunk"]):
        wires = link(loops=loops)
        found = chain(wires.words(weights(6, 60)), wires, positions=9, snake=snake)
        for span in (slice(0, 25), slice(25, 50), slice(50, 60)):
            ranks = np.arange(span.stop - span.start)
            assert (np.sort(found[:, span], 1) == ranks).all()


@pytest.mark.parametrize(
    "loops",
    [
        ["channel", "position", "chunk"],
        ["position", "channel", "chunk"],
        ["channel", "chunk", "position"],
        ["position", "chunk", "channel"],
    ],
)
@pytest.mark.parametrize("packing", ["row-major", "column-major"])
def test_the_weight_stream_toggles_less_than_sorted_by_popcount(
    loops: list[str], packing: str
) -> None:
    wires = link(loops=loops, packing=packing)
    words = wires.words(weights(8, 75))
    traffic = Traffic.product("fc", rows=4, depth=75, columns=8)

    def toggles(places: Any) -> int:
        """Of the weights alone, sent in a given order."""
        ordered = np.empty_like(words)
        for span in (slice(0, 25), slice(25, 50), slice(50, 75)):
            np.put_along_axis(ordered[:, span], places[:, span].astype(int), words[:, span], 1)
        zeros = np.zeros(4 * 75, np.uint16)
        sent = flits(traffic, zeros, ordered, wires, Order(), {})
        return int(transitions(sent["weights"], 8).sum())

    popcount = counting_sort(Order.parse("popcount").table(8)[words.reshape(8, 3, 25)])
    assert toggles(chain(words, wires, positions=4, snake=False)) < toggles(popcount.reshape(8, 75))
