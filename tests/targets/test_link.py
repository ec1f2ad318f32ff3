"""Links: what is sent, in which flits, and what toggles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bitwright.errors import UsageError
from bitwright.targets.link import Link, Part, Traffic, flits, transitions
from bitwright.targets.orders import Order
from tests.quant.qdq import profile


def link(**changes: Any) -> Link:
    """The settings of the ordering papers' simulator, and what is changed."""
    fields = {
        "flit": "paired",
        "word_bits": 8,
        "lanes": 8,
        "packing": "column-major",
        "loops": ["channel", "position", "chunk"],
        "window": 25,
        "order": "none",
        "source": "test",
        "energy_pj_per_transition": 0.173,
        "frequency_mhz": 125.0,
    } | changes
    numbers = ("word_bits", "lanes", "window", "energy_pj_per_transition", "frequency_mhz")
    for name in numbers:
        fields[name] = {"value": fields[name], "source": "test"}
    return Link.model_validate(fields)


def sent(traffic: Traffic, x: Any, w: Any, wires: Link, text: str) -> Any:
    order = Order.parse(text)
    bits = wires.word_bits.value
    both: tuple[Part, ...] = ("inputs", "weights") if order.is_sorted else ()
    tables = {part: order.table(bits) for part in both}
    return flits(traffic, wires.words(x), wires.words(w), wires, order, tables)


@pytest.fixture
def lenet_layer() -> Any:
    """Two channels of 9 x 9, 5 x 5 windows, three output channels; values of real spread."""
    rng = np.random.default_rng(0)
    traffic = Traffic.convolution(
        "conv",
        in_channels=2,
        size=(9, 9),
        out_channels=3,
        kernel=(5, 5),
        strides=(1, 1),
        dilations=(1, 1),
        pads=(0, 0, 0, 0),
        groups=1,
    )
    x = rng.integers(0, 256, 2 * 9 * 9).astype(np.uint8)
    w = rng.normal(0, 40, (3, 50)).clip(-127, 127).astype(np.int8)
    return traffic, x, w


@pytest.mark.parametrize(
    "kernel, strides, dilations, pads, groups",
    [
        ((3, 3), (1, 1), (1, 1), (0, 0, 0, 0), 1),
        ((3, 2), (2, 1), (1, 2), (1, 0, 2, 1), 1),
        ((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), 4),
    ],
)
def test_the_pairs_of_a_window_are_those_of_the_convolution(
    kernel: Any, strides: Any, dilations: Any, pads: Any, groups: Any
) -> None:
    """Sums of the pairs equal PyTorch-style loops written out."""
    rng = np.random.default_rng(1)
    channels, size, out_channels = 4, (6, 7), 8
    traffic = Traffic.convolution(
        "conv",
        in_channels=channels,
        size=size,
        out_channels=out_channels,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        groups=groups,
    )
    x = rng.integers(-9, 9, (channels, *size))
    w = rng.integers(-9, 9, (out_channels, channels // groups, *kernel))
    padded = np.pad(x, traffic.pads)
    rows = range(0, padded.shape[1] - (kernel[0] - 1) * dilations[0], strides[0])
    columns = range(0, padded.shape[2] - (kernel[1] - 1) * dilations[1], strides[1])
    flat = padded.ravel()
    of_group = out_channels // groups
    for o in range(out_channels):
        taps = traffic.taps[o // of_group]
        first = o // of_group * (channels // groups)
        for p, (y, z) in enumerate(itertools.product(rows, columns)):
            expected = 0
            for c, i, j in itertools.product(
                range(channels // groups), range(kernel[0]), range(kernel[1])
            ):
                word = padded[first + c, y + i * dilations[0], z + j * dilations[1]]
                expected += word * w[o, c, i, j]
            assert flat[traffic.bases[p] + taps] @ w[o].ravel() == expected
    assert len(traffic.bases) == len(rows) * len(columns)


def test_the_pairs_of_a_product_are_rows_and_columns() -> None:
    traffic = Traffic.product("fc", rows=3, depth=5, columns=2)
    x, w = np.arange(15), np.arange(10).reshape(2, 5)
    products = [[x[b + traffic.taps[0]] @ column for column in w] for b in traffic.bases]
    assert np.array_equal(products, x.reshape(3, 5) @ w.T)


def test_a_window_column_by_column_keeps_ranks_in_their_lane() -> None:
    traffic = Traffic.product("fc", rows=1, depth=10, columns=1)
    x = np.arange(1, 11, dtype=np.uint8)
    w = np.zeros((1, 10), np.int8)
    by_row = sent(traffic, x, w, link(lanes=4, packing="row-major"), "none")["inputs"]
    assert by_row.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    by_column = sent(traffic, x, w, link(lanes=4), "none")["inputs"]
    assert by_column.tolist() == [[1, 4, 7, 10], [2, 5, 8, 0], [3, 6, 9, 0]]


def test_the_nearest_pair_goes_next_in_its_lane() -> None:
    """Written out by hand: one lane after the other, over the window's flits."""
    traffic = Traffic.product("fc", rows=1, depth=8, columns=1)
    x = np.array([0, 15, 1, 7, 9, 12, 8, 3], np.uint8)
    w = np.zeros((1, 8), np.int8)
    found = sent(traffic, x, w, link(lanes=2, window=4), "nearest")["inputs"]
    # Lane 0 sends 0 and 1, lane 1 what is left; then 9 is nearest to 1, 8 to 9, and 3 to 7.
    assert found.tolist() == [[0, 15], [1, 7], [9, 3], [8, 12]]


@pytest.mark.parametrize(
    "changes, text",
    [({"flit": "separate", "reuse": True}, "nearest"), ({}, "nearest=snake:true")],
)
def test_the_nearest_neighbour_follows_every_window(
    lenet_layer: Any, changes: dict[str, Any], text: str
) -> None:
    traffic, x, w = lenet_layer
    with pytest.raises(UsageError, match="the nearest neighbour goes"):
        sent(traffic, x, w, link(**changes), text)


def test_a_snake_sends_every_second_window_backwards() -> None:
    traffic = Traffic.product("fc", rows=1, depth=8, columns=1)
    x = np.arange(8, dtype=np.uint8)
    w = np.zeros((1, 8), np.int8)
    wires = link(lanes=2, window=4, packing="row-major")
    found = sent(traffic, x, w, wires, "popcount=snake:true:direction:ascending")["inputs"]
    # The weights are equal, so that the sort leaves the terms where they are.
    assert found.tolist() == [[0, 1], [2, 3], [6, 7], [4, 5]]


def test_every_word_is_sent_once_whatever_the_order(lenet_layer: Any) -> None:
    traffic, x, w = lenet_layer
    plain = sent(traffic, x, w, link(), "none")
    for text in ("popcount", "gray-rank=on:inputs:snake:true", "popcount=on:separated:buckets:4"):
        ordered = sent(traffic, x, w, link(), text)
        for part in ("inputs", "weights"):
            before, after = (
                np.sort(words.reshape(-1, 4 * 8), axis=1) for words in (plain[part], ordered[part])
            )
            assert np.array_equal(before, after)


@pytest.mark.parametrize("text", ["popcount", "gray-rank=buckets:8:on:inputs:snake:true"])
def test_pairs_stay_pairs(lenet_layer: Any, text: str) -> None:
    """Affiliated: whatever moves, the products of what stands in equal lanes add up."""
    traffic, x, w = lenet_layer
    found = sent(traffic, x, w, link(), text)
    signed = found["weights"].astype(np.uint8).astype(np.int8).astype(np.int64)
    sums = (found["inputs"] * signed).reshape(3, 25, -1).sum(-1)
    image, kernels = x.reshape(2, 9, 9).astype(np.int64), w.reshape(3, 2, 5, 5)
    patches = np.lib.stride_tricks.sliding_window_view(image, (5, 5), axis=(1, 2))
    assert np.array_equal(sums.reshape(3, 5, 5), np.einsum("cyxij,ocij->oyx", patches, kernels))


def test_the_index_of_a_separated_order_pairs_the_words_again(lenet_layer: Any) -> None:
    traffic, x, w = lenet_layer
    wires = link()
    found = sent(traffic, x, w, wires, "popcount=on:separated")
    windows = 3 * 25 * 2
    # 25 terms at 5 bits are 125 of a flit's 128 bits.
    assert found["index"].shape == (windows, 16)
    bits = (found["index"][..., None] >> np.arange(8)) & 1
    index = bits.reshape(windows, 128)[:, :125].reshape(windows, 25, 5) @ (1 << np.arange(5))
    ranks = np.arange(25)
    inputs, weights = (
        found[part].reshape(windows, 4, 8)[:, ranks % 4, ranks // 4]
        for part in ("inputs", "weights")
    )
    signed = np.take_along_axis(weights, index.astype(np.int64), 1).astype(np.uint8).view(np.int8)
    sums = (inputs.astype(np.int64) * signed).sum(1).reshape(3, 25, 2).sum(-1)
    image, kernels = x.reshape(2, 9, 9).astype(np.int64), w.reshape(3, 2, 5, 5)
    patches = np.lib.stride_tricks.sliding_window_view(image, (5, 5), axis=(1, 2))
    assert np.array_equal(sums.reshape(3, 5, 5), np.einsum("cyxij,ocij->oyx", patches, kernels))


def test_what_is_reused_is_sent_once(lenet_layer: Any) -> None:
    traffic, x, w = lenet_layer
    loops = ["position", "chunk", "channel"]
    wires = link(flit="separate", loops=loops, reuse=True)
    found = sent(traffic, x, w, wires, "popcount=on:inputs")
    windows = 25 * 2  # positions and chunks
    assert len(found["inputs"]) == windows * 4
    assert len(found["weights"]) == windows * 3 * 4
    stationary = link(flit="separate", loops=["channel", "chunk", "position"], reuse=True)
    assert len(sent(traffic, x, w, stationary, "popcount")["weights"]) == 3 * 2 * 4


def test_who_shares_a_stream_shares_its_order() -> None:
    inputs = link(flit="separate", loops=["position", "chunk", "channel"], reuse=True)
    with pytest.raises(UsageError, match="inputs are sent once for every channel"):
        inputs.check(Order.parse("popcount"))
    inputs.check(Order.parse("popcount=on:inputs"))
    inputs.check(Order.parse("popcount=on:separated"))
    weights = link(flit="separate", loops=["channel", "chunk", "position"], reuse=True)
    with pytest.raises(UsageError, match="weights are sent once for every position"):
        weights.check(Order.parse("gray-rank=on:inputs"))
    # With one window an output, the chunk is no loop.
    one = link(flit="separate", loops=["position", "channel", "chunk"], reuse=True)
    one.check(Order.parse("popcount"))
    with pytest.raises(UsageError, match="sent once"):
        one.check(Order.parse("popcount"), chunks=1)


def test_transitions_are_the_bits_that_differ() -> None:
    words = np.array([[0b0000, 0b1111], [0b0001, 0b1111], [0b0010, 0b0000]], np.uint16)
    assert transitions(words, 4).tolist() == [[2, 1, 0, 0], [1, 1, 1, 1]]


def test_random_words_toggle_as_often_as_the_closed_form_says() -> None:
    """Of two random b-bit words with x and y ones, x + y - 2xy/b bits differ on average."""
    rng = np.random.default_rng(2)
    flips = np.arange(8) < np.array([[3], [5]])  # words of 3 and of 5 ones
    words = np.stack([rng.permuted(np.tile(row, (40_000, 1)), axis=1) for row in flips])
    numbers = (words @ (1 << np.arange(8))).astype(np.uint16)
    found = np.mean([transitions(pair[:, None], 8).sum() for pair in numbers.T])
    assert found == pytest.approx(3 + 5 - 2 * 3 * 5 / 8, rel=0.01)


def test_narrow_codes_are_extended_and_wide_ones_refused() -> None:
    assert link().words(np.array([-1, 7, -8], np.int8)).tolist() == [0xFF, 7, 0xF8]
    assert link(word_bits=4).words(np.array([-1, 7, -8], np.int8)).tolist() == [0xF, 7, 8]
    with pytest.raises(UsageError, match="codes from -9 to 8 do not fit 4-bit words"):
        link(word_bits=4).words(np.array([8, -9], np.int8))
    with pytest.raises(UsageError, match="0 to 300 do not fit 8-bit"):
        link().words(np.array([0, 300], np.uint16))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loops": ["channel", "channel", "chunk"]}, "a loop stands twice"),
        ({"reuse": True}, "always sent whole"),
        ({"order": "popcount=buckets:1"}, "does nothing"),
        ({"window": 1}, "greater than 1"),
        ({"word_bits": 17}, "less than or equal to 16"),
        ({"lanes": 0}, "greater than 0"),
        ({"lanes": 1025}, "less than or equal to 1024"),
    ],
)
def test_links_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        link(**changes)


def test_a_flit_has_the_bits_of_its_words() -> None:
    assert link().flit_bits == 128
    assert link(flit="separate").flit_bits == 64


@profile(60)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 3),
    groups=st.integers(1, 2),
    loops=st.permutations(["channel", "position", "chunk"]),
    separate=st.booleans(),
    reuse=st.booleans(),
)
def test_words_sent_are_those_of_the_flits(
    sizes: Any, groups: Any, loops: list[str], separate: Any, reuse: Any
) -> None:
    channels, positions, chunks = sizes
    terms = 4 * chunks - 1
    traffic = Traffic.convolution(
        "layer",
        in_channels=groups,
        size=(positions + terms - 1,),
        out_channels=channels * groups,
        kernel=(terms,),
        strides=(1,),
        dilations=(1,),
        pads=(0, 0),
        groups=groups,
    )
    # With one lane nothing is filled up: a flit is a word.
    shared = {"flit": "separate", "reuse": reuse} if separate else {"flit": "paired"}
    wires = link(**shared, loops=loops, lanes=1, window=4)
    inputs = np.zeros(groups * (positions + terms - 1), np.uint16)
    weights = np.zeros((channels * groups, terms), np.uint16)
    words = flits(traffic, inputs, weights, wires, Order(), {})
    assert traffic.words_sent(wires) == {part: len(found) for part, found in words.items()}
