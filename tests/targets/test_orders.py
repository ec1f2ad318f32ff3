"""Keys, bucket maps and the counting sort that orders the terms of a window."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bitwright.errors import UsageError
from bitwright.targets.orders import (
    Order,
    calibrated_map,
    check_map,
    counting_sort,
    key_count,
    keys,
    quantile_map,
    uniform_map,
)


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_keys_are_what_their_names_say(bits: int) -> None:
    words = range(1 << bits)
    assert keys("popcount", bits).tolist() == [word.bit_count() for word in words]
    # The reflected Gray code of n is n ^ (n >> 1): neighbours in rank differ in one bit.
    assert keys("gray-rank", bits)[[n ^ (n >> 1) for n in words]].tolist() == list(words)


@given(
    npst.arrays(
        np.uint8,
        npst.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=30),
        elements=st.integers(0, 8),
    )
)
def test_the_counting_sort_is_stable(buckets: Any) -> None:
    places = counting_sort(buckets)
    expected = np.argsort(np.argsort(buckets, axis=-1, kind="stable"), axis=-1, kind="stable")
    assert np.array_equal(places, expected)


def test_of_two_terms_with_one_bucket_the_first_comes_first() -> None:
    assert counting_sort(np.array([3, 1, 3, 0, 1])).tolist() == [3, 1, 4, 0, 2]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_as_many_uniform_buckets_as_keys_are_exact(bits: int) -> None:
    exact = Order.parse("popcount").table(bits)
    assert np.array_equal(Order.parse(f"popcount=buckets:{bits + 1}").table(bits), exact)
    given = ".".join(map(str, range(bits + 1)))
    assert np.array_equal(Order.parse(f"popcount=map:{given}").table(bits), exact)


def test_uniform_buckets_are_of_equal_width() -> None:
    assert uniform_map(4, 9) == (0, 0, 0, 1, 1, 2, 2, 3, 3)
    assert uniform_map(8, 256) == tuple(rank >> 5 for rank in range(256))


def test_gray_buckets_are_the_top_bits_of_the_rank() -> None:
    ranks = keys("gray-rank", 8)
    table = Order.parse("gray-rank=buckets:8:direction:ascending").table(8)
    assert np.array_equal(table, ranks >> 5)


@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=40).flatmap(
        lambda mass: st.tuples(st.just(mass), st.integers(2, len(mass)))
    )
)
def test_quantile_maps_are_maps(case: Any) -> None:
    mass, buckets = case
    found = np.array(quantile_map(mass, buckets))
    assert found[0] == 0
    assert found[-1] == buckets - 1
    assert set(np.diff(found)) <= {0, 1}


def test_quantile_buckets_hold_equal_mass() -> None:
    assert quantile_map([1] * 8, 4) == (0, 0, 1, 1, 2, 2, 3, 3)
    # Nearly everything is a zero, which therefore has a bucket of its own.
    assert quantile_map([100, 1, 1, 1, 1], 3)[:2] == (0, 1)
    assert quantile_map([0] * 9, 4) == uniform_map(4, 9)


@given(npst.arrays(np.float64, 16, elements=st.integers(0, 20)), st.integers(2, 5))
def test_calibrated_popcount_buckets_cost_least_of_all(histogram: Any, buckets: Any) -> None:
    """Against every map there is of 4-bit words."""

    def cost(bucket_map: Any) -> float:
        found = 0.0
        of_word = np.array(bucket_map)[keys("popcount", 4)]
        for bucket in range(buckets):
            words = np.flatnonzero(of_word == bucket)
            mass = histogram[words]
            if mass.sum():
                distances = np.bitwise_count(words[:, None] ^ words)
                found += mass @ distances @ mass / mass.sum()
        return found

    maps = [
        tuple(np.cumsum([0, *(i + 1 in borders for i in range(4))]).tolist())
        for borders in itertools.combinations(range(1, 5), buckets - 1)
    ]
    found = calibrated_map(histogram, "popcount", 4, buckets)
    assert found in maps
    if histogram.sum():
        assert cost(found) == pytest.approx(min(map(cost, maps)))


@pytest.mark.parametrize("bits", [8, 16])
def test_calibrated_gray_buckets_part_what_is_apart(bits: int) -> None:
    """Words around two values: the border lies between them."""
    histogram = np.zeros(1 << bits)
    histogram[[0b0011, 0b0010, 0b0110]] = 5
    histogram[[0b1111 << bits - 4, 0b1110 << bits - 4]] = 5
    found = np.array(calibrated_map(histogram, "gray-rank", bits, 2))[keys("gray-rank", bits)]
    assert set(found[[0b0011, 0b0010, 0b0110]]) == {0}
    assert set(found[[0b1111 << bits - 4, 0b1110 << bits - 4]]) == {1}


def test_calibrated_maps_have_no_more_buckets_than_borders() -> None:
    histogram = np.ones(1 << 16)
    assert calibrated_map(histogram, "gray-rank", 16, 256)[-1] == 255
    with pytest.raises(UsageError, match="at most 256 buckets here, not 257"):
        calibrated_map(histogram, "gray-rank", 16, 257)
    assert calibrated_map(np.zeros(256), "popcount", 8, 4) == uniform_map(4, 9)


def test_buckets_are_a_number() -> None:
    with pytest.raises(UsageError, match="buckets of an order is a number, not '4'"):
        Order("popcount", buckets="4")  # type: ignore[arg-type]  # what is refused


def test_descending_sends_most_ones_first_and_stays_stable() -> None:
    words = np.array([0b1, 0b111, 0b10, 0b1110])
    descending = counting_sort(Order.parse("popcount").table(4)[words])
    assert descending.tolist() == [2, 0, 3, 1]
    ascending = counting_sort(Order.parse("popcount=direction:ascending").table(4)[words])
    assert ascending.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "nearest",
        "chain=snake:true",
        "popcount",
        "popcount=buckets:4",
        "popcount=on:inputs:buckets:4:map:quantile:direction:ascending:snake:true",
        "gray-rank=buckets:8",
        "popcount=map:0.0.0.1.1.2.2.3.3",
    ],
)
def test_the_text_of_an_order_reads_back(text: str) -> None:
    order = Order.parse(text)
    assert Order.parse(str(order)) == order


def test_a_map_from_the_words_needs_the_words() -> None:
    order = Order.parse("popcount=buckets:4:map:quantile")
    assert order.needs_histogram
    with pytest.raises(UsageError, match="depends on the words"):
        order.table(8)
    histogram = np.zeros(256)
    histogram[:4] = [10, 10, 10, 10]  # popcounts 0, 1, 1, 2
    assert order.bucket_map(8, histogram)[:3] == (0, 1, 2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("pop", "there is no key 'pop'"),
        ("popcount=bucket:4", "no option 'bucket'"),
        ("popcount=buckets", "no order"),
        ("popcount=buckets:four", "a number, not 'four'"),
        ("popcount=buckets:²", "a number, not '²'"),
        ("popcount=buckets:٤", "a number, not '٤'"),
        ("popcount=buckets:4:buckets:2", "buckets stands twice"),
        ("popcount=buckets:1", "does nothing"),
        ("popcount=map:0.0.0.0.0.0.0.0.0", "one bucket does nothing"),
        ("popcount=map:0.0.0.1.1.2.2.3.³", "no bucket map"),
        ("chain=buckets:4", "'chain' sorts by no key, and there is buckets"),
        ("nearest=on:inputs", "'nearest' sorts by no key, and there is on"),
        ("popcount=on:outputs", "there is no on 'outputs'"),
        ("popcount=snake:yes", "true or false"),
        ("popcount=map:equal", "no bucket map 'equal'"),
        ("popcount=direction:up", "there is no direction 'up'"),
    ],
)
def test_wrong_orders_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Order.parse(text)


@pytest.mark.parametrize(
    "text, bits, message",
    [
        ("popcount=map:0.0.0.1.1.2.2.3.3", 16, "9 entries, and 16-bit words have the keys 0 to 16"),
        ("popcount=map:0.1.2", 8, "3 entries, and 8-bit words"),
        ("popcount=map:0.0.1.1.0.2.2.3.3", 8, "falls, from 1 at key 3 to 0"),
        ("popcount=map:0.0.1.1.3.3.3.3.3", 8, "leaves a bucket out"),
        ("popcount=map:1.1.1.1.2.2.3.3.3", 8, "leaves a bucket out"),
        ("popcount=buckets:10", 8, "more than the 9 keys"),
        ("popcount=buckets:3:map:0.0.0.1.1.2.2.3.3", 8, "the map has 4 buckets, and buckets is 3"),
    ],
)
def test_maps_that_do_not_fit_the_words_are_refused(text: str, bits: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Order.parse(text).table(bits)


def test_a_map_covers_the_ranks() -> None:
    assert key_count("gray-rank", 8) == 256
    with pytest.raises(UsageError, match="256 ranks"):
        check_map([0, 1], "gray-rank", 8)


def test_words_of_17_bits_have_no_table() -> None:
    with pytest.raises(UsageError, match="1 to 16 bits"):
        keys("popcount", 17)
