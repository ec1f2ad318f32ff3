"""Kernels of links beside their definition in NumPy, and beside plain sums and sorts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import UsageError
from bitwright.targets import link as definition
from bitwright.targets.kernels.link import (
    count_transitions,
    layer_transitions,
    positions,
    reorder,
)
from bitwright.targets.kernels.spec import Accumulators, Convolution, Operand
from bitwright.targets.link import Link, Part, Traffic
from bitwright.targets.orders import Order, counting_sort
from bitwright.targets.schema import Number
from tests.targets.kernels.kernels import convolution_sums

Array = npt.NDArray[Any]
Words = npt.NDArray[np.uint16]
IntArray = npt.NDArray[np.int64]


def link_of(**fields: Any) -> Link:
    """The authors' link, with other fields, unsorted."""
    values: dict[str, Any] = {
        "flit": "paired",
        "word_bits": 8,
        "lanes": 8,
        "packing": "column-major",
        "loops": ("channel", "position", "chunk"),
        "window": 25,
        "energy_pj_per_transition": 0.173,
        "frequency_mhz": 125.0,
        "order": "none",
    }
    values.update(fields)
    for name in ("word_bits", "lanes", "window", "energy_pj_per_transition", "frequency_mhz"):
        values[name] = Number(value=values[name], source="here")
    return Link.model_validate({"source": "here", **values})


# --------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layer:
    """A layer with data, and its sums by another way."""

    traffic: Traffic
    x: Array  # padded and flat
    w: Array
    zero_points: tuple[int, int]
    sums: IntArray

    def tables(self, link: Link, order: Order) -> dict[Part, npt.NDArray[np.uint16]]:
        if not order.is_sorted:
            return {}
        return dict.fromkeys(("inputs", "weights"), order.table(link.word_bits.value))

    def check(self, link: Link, order: Order, accumulator_bits: Any = 64) -> None:
        """Compare what the kernel finds with the definition, and the sums with the plain ones."""
        tables = self.tables(link, order)
        places = None
        if order.is_sorted:
            dtype = np.uint8 if link.word_bits.value <= 8 else np.uint16
            words = link.words(self.w).astype(dtype)
            places = positions(words, tables["weights"], link.window.value)
        found = layer_transitions(
            self.traffic,
            link,
            order,
            self.x,
            self.w,
            table=tables.get("inputs"),
            places=places,
            zero_points=self.zero_points,
            accumulator_bits=accumulator_bits,
        )
        counts: dict[Part, Any] = {}
        flits: dict[Part, int] = {}
        for sample, x in enumerate(self.x):
            w = self.w if self.w.ndim == 2 else self.w[sample]
            sent = definition.flits(self.traffic, link.words(x), link.words(w), link, order, tables)
            for part, words in sent.items():
                counts[part] = counts.get(part, 0) + definition.transitions(
                    words, link.word_bits.value
                )
                flits[part] = flits.get(part, 0) + len(words)
        assert found.flits == flits
        assert set(found.counts) == set(counts)
        for part, expected in counts.items():
            np.testing.assert_array_equal(found.counts[part], expected)
        assert found.sums.dtype == f"int{accumulator_bits}"
        np.testing.assert_array_equal(found.sums, self.sums)


def convolution(
    generator: np.random.Generator, data: str, weight: str, bits: int, batch: int
) -> Layer:
    """A random convolution; codes take ``bits`` bits."""
    rank = int(generator.integers(1, 4))
    groups = int(generator.choice([1, 1, 2]))
    spec = Convolution(
        batch,
        groups * int(generator.integers(1, 3)),
        tuple(int(n) for n in generator.integers(4, 6, rank)),
        groups * int(generator.integers(1, 4)),
        tuple(int(n) for n in generator.integers(1, 4, rank)),
        Operand(data, int(zero_point(data, bits))),  # type: ignore[arg-type]  # a type of codes
        Accumulators(),
        strides=tuple(int(n) for n in generator.integers(1, 3, rank)),
        pads=tuple(int(n) for n in generator.integers(0, 2, 2 * rank)),
        groups=groups,
        accumulator_bits=64,
    )
    x = codes(generator, data, bits, (batch, spec.in_channels, *spec.size))
    w = codes(generator, weight, bits, spec.weight_shape)
    zero_w = zero_point(weight, bits)
    traffic = Traffic.convolution(
        "layer",
        in_channels=spec.in_channels,
        size=spec.size,
        out_channels=spec.out_channels,
        kernel=spec.kernel,
        strides=spec.strides,
        dilations=spec.dilations,
        pads=spec.pads,
        groups=groups,
    )
    padded = np.pad(x, [(0, 0), *traffic.pads], constant_values=spec.data.zero_point)
    sums = convolution_sums(x, w.astype(np.int64) - zero_w, spec)
    return Layer(
        traffic,
        padded.reshape(batch, -1),
        w.reshape(spec.out_channels, -1),
        (spec.data.zero_point, zero_w),
        sums.reshape(batch, spec.out_channels, -1),
    )


def product(
    generator: np.random.Generator,
    data: str,
    weight: str,
    bits: int,
    sizes: tuple[int, int, int, int],
    own_weights: bool = False,
) -> Layer:
    """A matrix product of ``sizes`` (batch, rows, depth, columns)."""
    batch, rows, depth, columns = sizes
    x = codes(generator, data, bits, (batch, rows, depth))
    w = codes(generator, weight, bits, (*((batch,) if own_weights else ()), columns, depth))
    zeros = zero_point(data, bits), zero_point(weight, bits)
    centred = x.astype(np.int64) - zeros[0], w.astype(np.int64) - zeros[1]
    sums = centred[0] @ centred[1].swapaxes(-1, -2)
    traffic = Traffic.product("layer", rows=rows, depth=depth, columns=columns)
    return Layer(traffic, x.reshape(batch, -1), w, zeros, sums.swapaxes(1, 2))


def codes(generator: np.random.Generator, dtype: str, bits: int, shape: tuple[int, ...]) -> Array:
    """Codes of ``bits`` bits, the ends of the range among them."""
    low = -(1 << (bits - 1)) if dtype.startswith("int") else 0
    found = generator.integers(low, low + (1 << bits), shape).astype(dtype)
    ends = generator.random(shape)
    found[ends < 0.1] = low
    found[ends > 0.9] = low + (1 << bits) - 1
    return found


def zero_point(dtype: str, bits: int) -> int:
    """Some code that is not in the middle."""
    return -1 if dtype.startswith("int") else (1 << bits) // 3


def draw(generator: np.random.Generator) -> tuple[Link, Order, str, str, int]:
    """A link, an order that it can have, types of codes, and their bits."""

    def one(*choices: Any) -> Any:
        return choices[generator.integers(len(choices))]

    bits = one(8, 8, 8, 16, 4, 1, 11)
    flit = one("paired", "separate")
    loops = tuple(("channel", "position", "chunk")[place] for place in generator.permutation(3))
    link = link_of(
        flit=flit,
        word_bits=bits,
        lanes=int(generator.integers(1, 12)),
        packing=one("row-major", "column-major"),
        loops=loops,
        reuse=flit == "separate" and one(True, False),
        window=int(generator.integers(2, 30)),
    )
    key = one("none", "popcount", "gray-rank")
    fields: dict[str, Any] = {"snake": one(True, False)}
    if key != "none":
        fields["on"] = one("weights", "inputs", "separated")
        fields["buckets"] = one(0, 2)
        fields["direction"] = one("descending", "ascending")
    order = Order(key, **fields)
    code_bits = min(bits, one(8, 16))
    types = ("int16", "uint16") if code_bits > 8 else ("int8", "uint8", "int16", "uint16")
    return link, order, one(*types), one(*types), code_bits


def allowed(link: Link, order: Order, layer: Layer) -> bool:
    """Whether no operand is kept that would need another order."""
    if not (link.reuse and order.is_sorted) or order.on == "separated":
        return True
    last: tuple[int, int, int] | None = None
    in_group = layer.traffic.channels // len(layer.traffic.taps)
    for channel, position, chunk in layer.traffic.sequence(link):
        now = (channel, position, chunk)
        if last is not None and last[2] == chunk:
            same_inputs = last[1] == position and last[0] // in_group == channel // in_group
            if same_inputs and order.on == "weights":
                return False
            if last[0] == channel and order.on == "inputs":
                return False
        last = now
    return True


def check_random(seed: int) -> None:
    """One kernel, several layers."""
    generator = np.random.default_rng(seed)
    link, order, data, weight, bits = draw(generator)
    layers = [convolution(generator, data, weight, bits, batch) for batch in (1, 3)]
    for own_weights in (False, True):
        rows, depth, columns = (int(n) for n in generator.integers(1, [4, 90, 6]))
        sizes = (2, rows, depth, columns)
        layers.append(product(generator, data, weight, bits, sizes, own_weights))
    for layer in layers:
        if allowed(link, order, layer):
            layer.check(link, order)


@pytest.mark.parametrize("seed", range(10))
def test_random_links_and_layers(seed: int) -> None:
    check_random(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 100))
def test_more_random_links_and_layers(seed: int) -> None:
    check_random(seed)


@pytest.mark.parametrize("on", ["inputs", "weights", "separated"])
@pytest.mark.parametrize(
    "fields, depth",
    [
        ({"window": 8}, 8),  # one flit
        ({"window": 200}, 9),  # more than there are terms
        ({"window": 256, "lanes": 16}, 600),
        ({"window": 64, "word_bits": 16, "lanes": 4, "packing": "row-major"}, 130),
    ],
)
def test_windows_of_all_sizes(fields: dict[str, Any], depth: int, on: Any) -> None:
    link = link_of(**fields)
    generator = np.random.default_rng(0)
    layer = product(generator, "int8", "int8", 8, (2, 3, depth, 2))
    layer.check(link, Order("popcount", on, snake=True), accumulator_bits=32)


@pytest.mark.parametrize("on", ["inputs", "separated"])
def test_streams_longer_than_a_buffer_of_more_samples_than_tasks(on: Any) -> None:
    link = link_of(flit="separate", reuse=True, loops=("chunk", "position", "channel"))
    generator = np.random.default_rng(0)
    layer = product(generator, "uint8", "int8", 8, (2, 33, 40, 37))
    layer.check(link, Order("popcount", on, 4), accumulator_bits=32)
    many = product(generator, "uint8", "int8", 8, (19, 1, 27, 2))
    many.check(link, Order("popcount", on, 4), accumulator_bits=32)


def test_sums_that_need_64_bits() -> None:
    layer = product(np.random.default_rng(0), "int16", "uint16", 16, (1, 2, 300, 2))
    x, w = np.full_like(layer.x, -(2**15)), np.full_like(layer.w, 2**16 - 1)
    depth = layer.traffic.terms
    sums = np.full_like(layer.sums, -depth * 2**15 * (2**16 - 1))
    assert sums.max() < -(2**39)
    extreme = Layer(layer.traffic, x, w, (0, 0), sums)
    extreme.check(link_of(word_bits=16, lanes=4), Order("gray-rank", "inputs"))


def test_partial_sums_may_leave_32_bits() -> None:
    """Half of the products are about -2^15, half about 2^15."""
    depth = 140_000
    x = np.full((1, depth), 255, np.uint8)
    w = np.full((1, depth), -128, np.int8)
    w[:, depth // 2 :] = 127
    expected = 255 * (127 - 128) * (depth // 2)
    traffic = Traffic.product("layer", rows=1, depth=depth, columns=1)
    found = layer_transitions(traffic, link_of(), Order(), x, w, accumulator_bits=32)
    assert 255 * 128 * (depth // 2) > 2**31
    assert found.sums.item() == expected


# --------------------------------------------------------------------------- nearest neighbour


@pytest.mark.parametrize(
    "fields",
    [
        {"lanes": 4, "window": 10},
        {"lanes": 3, "packing": "row-major", "loops": ("chunk", "position", "channel")},
        {"word_bits": 16, "lanes": 1, "window": 6, "flit": "separate"},
    ],
)
def test_nearest_neighbour(fields: dict[str, Any]) -> None:
    link = link_of(**fields)
    bits = link.word_bits.value
    dtype = "int8" if bits == 8 else "int16"
    layer = convolution(np.random.default_rng(3), dtype, dtype, bits, 2)
    found = layer_transitions(
        layer.traffic, link, Order("nearest"), layer.x, layer.w, zero_points=layer.zero_points
    )
    sent = [
        definition.flits(
            layer.traffic, link.words(x), link.words(layer.w), link, Order("nearest"), {}
        )
        for x in layer.x
    ]
    for part in found.counts:
        expected = sum(definition.transitions(flits[part], bits) for flits in sent)
        np.testing.assert_array_equal(found.counts[part], expected)
        assert found.flits[part] == sum(len(flits[part]) for flits in sent)
    np.testing.assert_array_equal(found.sums, layer.sums)


def test_nearest_neighbour_is_better_than_sorting() -> None:
    layer = product(np.random.default_rng(0), "int8", "int8", 8, (1, 9, 50, 9))
    totals = []
    for order in (Order("nearest"), Order("popcount")):
        places = positions(layer.w, order.table(8), 25) if order.is_sorted else None
        found = layer_transitions(layer.traffic, link_of(), order, layer.x, layer.w, places=places)
        totals.append(sum(int(counts.sum()) for counts in found.counts.values()))
    assert totals[0] < totals[1]


# --------------------------------------------------------------------------- what is refused


def test_wide_codes_do_not_fit_narrow_words() -> None:
    layer = product(np.random.default_rng(0), "int16", "int8", 8, (1, 1, 9, 1))
    x = layer.x * np.int16(200)
    with pytest.raises(UsageError, match="do not fit 8-bit words"):
        layer_transitions(layer.traffic, link_of(), Order(), x, layer.w)


@pytest.mark.parametrize(
    "rows, columns, on, kept",
    [(1, 3, "weights", "inputs"), (3, 3, "inputs", "weights"), (3, 1, "inputs", "weights")],
)
def test_kept_operands_have_one_order(rows: int, columns: int, on: Any, kept: str) -> None:
    """What changes innermost are the positions, or the channels where there is one position."""
    link = link_of(flit="separate", reuse=True, loops=("chunk", "channel", "position"))
    layer = product(np.random.default_rng(0), "int8", "int8", 8, (1, rows, 30, columns))
    with pytest.raises(UsageError, match=f"the {kept} are sent once"):
        layer.check(link, Order("popcount", on))
    layer.check(link, Order("popcount", "separated"))


# --------------------------------------------------------------------------- orders


@pytest.mark.parametrize("window", [1, 2, 25, 64, 255, 256])
@pytest.mark.parametrize("dtype, bits", [("uint8", 8), ("int8", 3), ("uint16", 16), ("int16", 9)])
def test_positions_are_those_of_a_stable_sort(dtype: str, bits: int, window: int) -> None:
    generator = np.random.default_rng(window)
    for buckets in (1, 3, 1 << bits):
        table = generator.integers(0, buckets, 1 << bits).astype(np.uint16)
        for count in (1, 31, 32, 65):
            given = codes(generator, dtype, bits, (count, window))
            keys = table[given.astype(np.int64) % (1 << bits)]
            order = np.argsort(keys, axis=1, kind="stable")
            found = positions(given, table)
            np.testing.assert_array_equal(
                np.take_along_axis(found, order, 1),
                np.broadcast_to(np.arange(window), found.shape),
            )
            np.testing.assert_array_equal(
                reorder(given, table), np.take_along_axis(given, order, 1)
            )


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=60),
    st.integers(2, 9),
    st.sampled_from(["popcount", "gray-rank"]),
)
def test_positions_of_any_words(words: list[int], buckets: int, key: Any) -> None:
    codes = np.array([words], np.uint8)
    table = Order(key, buckets=buckets).table(8)
    found = positions(codes, table, 25)
    for start in range(0, len(words), 25):
        window = found[0, start : start + 25]
        keys = table[codes[0, start : start + 25]]
        assert sorted(window) == list(range(len(window)))
        sent = sorted(zip(window, keys, range(len(window)), strict=True))
        assert [entry[1:] for entry in sent] == sorted(entry[1:] for entry in sent)
        np.testing.assert_array_equal(window, counting_sort(keys))


def test_no_codes_at_all() -> None:
    table = Order("popcount").table(8)
    assert positions(np.zeros((0, 9), np.uint8), table).shape == (0, 9)
    assert reorder(np.zeros((3, 0), np.uint8), table).shape == (3, 0)


@pytest.mark.parametrize("sort", [positions, reorder])
@pytest.mark.parametrize("terms, window", [(257, None), (9, 257), (9, 0), (9, -1)])
def test_places_are_bytes(sort: Any, terms: int, window: int | None) -> None:
    with pytest.raises(UsageError, match=r"a window of -?[0-9]+ terms"):
        sort(np.zeros((2, terms), np.uint8), Order("popcount").table(8), window)


@pytest.mark.parametrize("dtype", ["int32", "uint64", "float16", "bool"])
def test_codes_of_other_types_are_not_sorted(dtype: str) -> None:
    with pytest.raises(UsageError, match=f"codes of type {dtype}"):
        positions(np.zeros((2, 9), dtype), Order("popcount").table(8))


# --------------------------------------------------------------------------- counts


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("lanes", [1, 3, 8, 25, 32, 40, 300])
def test_transitions_of_flits(lanes: int, dtype: Any) -> None:
    generator = np.random.default_rng(lanes)
    bits = np.dtype(dtype).itemsize * 8
    for flits in (0, 1, 2, 9, 255 * 64 // lanes, 255 * 512 // lanes + 77):
        words = generator.integers(0, 1 << bits, flits * lanes + 1).astype(dtype)[1:]
        words = words.reshape(flits, lanes)  # starts at no multiple of a vector
        words.flags.writeable = False
        found = count_transitions(words)
        np.testing.assert_array_equal(found, definition.transitions(words, bits))


def test_transitions_of_words_that_turn_over() -> None:
    words = np.zeros((100_001, 4), np.uint8)
    words[1::2] = 255
    words[:, 2] &= 0b101
    found = count_transitions(words, 3)
    assert found.shape == (4, 3)
    assert found[:2].tolist() == [[100_000] * 3] * 2
    assert found[2].tolist() == [100_000, 0, 100_000]
