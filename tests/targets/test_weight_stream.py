"""Streams of weights: the exact count is that of the link's definition, and costs explain it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.targets.link import Link, Traffic, Words, flits, transitions
from bitwright.targets.orders import Order
from bitwright.targets.weight_stream import Axis, Neighbours, WeightStream, arranged
from tests.quant.qdq import profile

LOOPS = list(itertools.permutations(["channel", "position", "chunk"]))


def link(**changes: Any) -> Link:
    fields: dict[str, Any] = {
        "flit": "separate",
        "word_bits": 8,
        "lanes": 4,
        "packing": "row-major",
        "loops": ["channel", "position", "chunk"],
        "window": 8,
        "order": "none",
        "source": "test",
        "energy_pj_per_transition": 0.173,
        "frequency_mhz": 125.0,
    } | changes
    for name in ("word_bits", "lanes", "window", "energy_pj_per_transition", "frequency_mhz"):
        fields[name] = {"value": fields[name], "source": "test"}
    return Link.model_validate(fields)


@st.composite
def links(draw: st.DrawFn, /, **fixed: Any) -> Link:
    return link(
        **{
            "word_bits": draw(st.sampled_from([3, 8, 16])),
            "lanes": draw(st.integers(1, 5)),
            "packing": draw(st.sampled_from(["row-major", "column-major"])),
            "loops": list(draw(st.sampled_from(LOOPS))),
            "window": draw(st.integers(2, 12)),
            "reuse": draw(st.booleans()),
        }
        | fixed
    )


def drawn(seed: int, bits: int, *shape: int) -> Words:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint16)


def defined(words: Words, positions: int, wires: Link) -> int:
    """Count all windows, one after the other, as ``targets/link.py`` sends them."""
    channels, terms = words.shape
    traffic = Traffic.product("layer", rows=positions, depth=terms, columns=channels)
    inputs = np.zeros(positions * terms, np.uint16)
    sent = flits(traffic, inputs, words, wires, Order(), {})["weights"]
    return int(transitions(sent, wires.word_bits.value).sum())


@profile(300)
@given(links(), st.integers(1, 4), st.integers(1, 27), st.integers(1, 4), st.integers(0, 99))
def test_the_count_is_that_of_the_definition(
    wires: Link, channels: int, terms: int, positions: int, seed: int
) -> None:
    words = drawn(seed, wires.word_bits.value, channels, terms)
    stream = WeightStream(channels, terms, positions, wires)
    assert stream.count(words) == defined(words, positions, wires)


def cost(neighbours: list[Neighbours], order: Any) -> float:
    """What an order costs, pair by pair."""
    total = 0.0
    for entry in neighbours:
        distances = entry.distances()
        for place in np.flatnonzero(entry.often):
            pair = order[place], order[place + entry.offset]
            total += float(entry.often[place]) * float(distances[pair])
    return total


@profile(100)
@given(links(), st.integers(2, 6), st.integers(1, 20), st.integers(1, 3), st.integers(0, 99))
def test_what_output_channels_cost_is_what_permuting_them_changes(
    wires: Link, channels: int, terms: int, positions: int, seed: int
) -> None:
    words = drawn(seed, wires.word_bits.value, channels, terms)
    stream = WeightStream(channels, terms, positions, wires)
    found = stream.between_outputs(words, Axis(channels))
    order = np.random.default_rng(seed).permutation(channels)
    changed = stream.count(words[order]) - stream.count(words)
    expected = cost(found, order) - cost(found, np.arange(channels))
    assert changed == pytest.approx(expected, abs=1e-2)


@profile(100)
@given(links(window=8, lanes=4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_what_input_channels_cost_is_what_permuting_them_changes(
    wires: Link, windows: int, positions: int, seed: int
) -> None:
    # One output channel, and windows that are full: nothing is left out.
    channels = 8 * windows
    words = drawn(seed, wires.word_bits.value, 1, channels)
    stream = WeightStream(1, channels, positions, wires)
    found = stream.between_inputs(words, Axis(channels))
    order = np.random.default_rng(seed).permutation(channels)
    changed = stream.count(words[:, order]) - stream.count(words)
    expected = cost(found, order) - cost(found, np.arange(channels))
    assert changed == pytest.approx(expected, abs=1e-2)


@profile(60)
@given(links(), st.integers(1, 12), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
def test_orders_are_permutations(
    wires: Link, channels: int, outer: int, inner: int, seed: int
) -> None:
    axis = Axis(channels, outer, inner)
    words = drawn(seed, wires.word_bits.value, 3, axis.size)
    stream = WeightStream(3, axis.size, 2, wires)
    order = arranged(stream.between_inputs(words, axis), channels)
    assert sorted(order) == list(range(channels))
    assert sorted(axis.entries(order)) == list(range(axis.size))


def test_entries_of_a_channel_move_together() -> None:
    axis = Axis(2, outer=2, inner=3)
    assert axis.entries(np.array([1, 0])).tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]
    channels, taps = axis.channel(np.arange(12))
    assert channels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert taps.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert [axis.of(tap).tolist() for tap in (0, 4)] == [[0, 3], [7, 10]]


def test_alike_channels_come_together() -> None:
    # Along one wire: 00, FF, 00, FF toggles 24 times a position, 00, 00, FF, FF only 8 times.
    wires = link(lanes=1, window=4)
    words = np.array([[0, 255, 0, 255]], np.uint16)
    stream = WeightStream(1, 4, 1, wires)
    order = arranged(stream.between_inputs(words, Axis(4)), 4)
    assert order.tolist() == [0, 2, 1, 3]
    assert (stream.count(words), stream.count(words[:, order])) == (24, 8)
