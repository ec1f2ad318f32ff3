"""Links: how operands travel to the array, and which bits toggle on the way.

A layer's traffic for one sample is a sequence of windows: pairs of an input word and a weight word
that one output needs, at most as many as the sorting unit orders at once. ``docs/link.md``
describes the sequence, the flits and what is counted. This module is the definition, in NumPy and
slow; ``targets/kernels/link.py`` computes the same fast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from bitwright.errors import UsageError
from bitwright.targets.orders import Order, counting_sort
from bitwright.targets.schema import Clock, Data, Number, Positive, Source

__all__ = [
    "MOST_LANES",
    "ROW_MAJOR",
    "UNSORTED",
    "Link",
    "LinkDescription",
    "Traffic",
    "flits",
    "transitions",
]

Words = npt.NDArray[np.uint16]
IntArray = npt.NDArray[np.int64]

MOST_LANES: Final = 1024
"""Lanes of the widest flit: buffers and kernels grow with it."""

ROW_MAJOR: Final = "row-major"
"""Unsorted, flits filled one after the other: what most figures in print are measured against."""

UNSORTED: Final = "none"
"""Unsorted, in the link's own packing."""

Loop = Literal["channel", "position", "chunk"]
Part = Literal["inputs", "weights", "index"]


class Link(Data):
    """A link over which operands reach the array.

    Attributes
    ----------
    flit
        What shares a flit: ``paired`` sends inputs and weights half and half, ``separate`` has a
        link for each.
    word_bits
        Width of a word; narrower codes are extended.
    lanes
        Words of each operand in a flit, 1 to 1024.
    packing
        ``row-major`` fills flit after flit, ``column-major`` lane after lane over the flits of a
        window.
    loops
        In which order windows are sent, the outermost loop first.
    reuse
        Whether an operand's window that was just sent is kept and not sent again; with ``separate``
        links.
    window
        Terms that are ordered at once; layers with fewer terms fill it partly.
    order
        How they are ordered where nobody says otherwise, as :meth:`Order.parse` reads it.
    source
        Where all this is published: a key of the description's ``sources``.
    energy_pj_per_transition
        Energy of a wire that changes.
    energy_pj_per_word
        What the sorting unit spends on a word; left out where nobody knows.
    frequency_mhz
        Clock.
    """

    flit: Literal["paired", "separate"]
    word_bits: Number[Annotated[int, Field(gt=0, le=16, strict=True)]]
    lanes: Number[Annotated[int, Field(gt=0, le=MOST_LANES, strict=True)]]
    packing: Literal["row-major", "column-major"]
    loops: tuple[Loop, Loop, Loop]
    reuse: Annotated[bool, Field(strict=True)] = False
    window: Number[Annotated[int, Field(gt=1, le=256, strict=True)]]
    order: str = "popcount"
    source: str = Field(min_length=1)
    energy_pj_per_transition: Number[Positive]
    energy_pj_per_word: Number[Positive] | None = None
    frequency_mhz: Number[Clock]

    @field_validator("loops")
    @classmethod
    def _each_loop_once(cls, loops: tuple[Loop, Loop, Loop]) -> tuple[Loop, Loop, Loop]:
        if len(set(loops)) < len(loops):
            raise ValueError("a loop stands twice: channel, position and chunk, in any order")
        return loops

    @field_validator("order")
    @classmethod
    def _an_order(cls, order: str) -> str:
        try:
            Order.parse(order)
        except UsageError as error:
            raise ValueError(f"{error.what}; {error.fix}") from error
        return order

    @model_validator(mode="after")
    def _paired_flits_carry_both(self) -> Link:
        if self.reuse and self.flit == "paired":
            raise ValueError("reuse: flits of both operands are always sent whole")
        return self

    @model_validator(mode="after")
    def _the_order_fits(self) -> Link:
        order = Order.parse(self.order)
        bits = self.word_bits.value
        try:
            self.check(order)
            if order.is_sorted:
                order.bucket_map(bits, np.ones(1 << bits))  # of some words or other
        except UsageError as error:
            raise ValueError(f"order {self.order}: {error.what}; {error.fix}") from error
        return self

    @property
    def flit_bits(self) -> int:
        """Payload of a flit, in bits."""
        return self.word_bits.value * self.lanes.value * (2 if self.flit == "paired" else 1)

    def check(
        self,
        order: Order,
        *,
        channels: int = 2,
        groups: int = 1,
        positions: int = 2,
        chunks: int = 2,
    ) -> None:
        """Refuse an order that the link cannot have: who shares a stream shares its order.

        Parameters
        ----------
        order
            The order.
        channels, groups
            Output channels of the layer, and groups of them.
        positions
            Positions of the layer.
        chunks
            Windows of an output.

        Raises
        ------
        UsageError
            If inputs that serve many channels would need an order for each, or weights that serve
            many positions one for each; if the nearest neighbour does not follow every window.
        """
        if order.key == "nearest" and (self.reuse or order.snake):
            raise UsageError(
                "the nearest neighbour goes from each window to the next, so there is none with "
                "reuse or with flits in reverse order",
                fix="take a link without reuse, and nearest without snake",
            )
        sizes = {"channel": channels, "position": positions, "chunk": chunks}
        changing = [loop for loop in self.loops if sizes[loop] > 1]
        if not (self.reuse and (order.is_sorted or order.orders_weights) and changing):
            return
        inner = changing[-1]
        kept = {"channel": "inputs", "position": "weights"}.get(inner)
        if inner == "channel" and channels == groups:  # each has inputs of its own
            kept = None
        if kept and order.on not in (kept, "separated"):
            raise UsageError(
                f"the {kept} are sent once for every {inner}, so an order of {order.on} of its own "
                f"for each {inner} is not available",
                fix=f"sort on:{kept} or on:separated, or take a link without reuse",
            )

    def words_in(self, flits: int, terms: int) -> int:
        """How many words the flits of an operand carry; slots that a window does not fill are none.

        Parameters
        ----------
        flits
            All flits of an operand of a layer, of whole samples.
        terms
            Terms of an output of that layer.
        """
        window, lanes = self.window.value, self.lanes.value
        whole, rest = divmod(terms, window)
        # Each of an output's windows is sent equally often.
        of_output = whole * -(-window // lanes) + -(-rest // lanes)
        return flits // of_output * terms

    def check_codes(self, codes: npt.NDArray[Any]) -> None:
        """Refuse codes that are wider than words.

        Raises
        ------
        UsageError
            If one is.
        """
        bits = self.word_bits.value
        low, high = (0, (1 << bits) - 1)
        if codes.dtype.kind == "i":
            low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        if codes.size and (int(codes.min()) < low or int(codes.max()) > high):
            raise UsageError(
                f"codes from {codes.min()} to {codes.max()} do not fit {bits}-bit words",
                fix="describe a link with wider words (word_bits)",
            )

    def words(self, codes: npt.NDArray[Any]) -> Words:
        """Codes as they are on the wire: two's complement, ``word_bits`` wide.

        Raises
        ------
        UsageError
            If a code is wider.
        """
        self.check_codes(codes)
        bits = self.word_bits.value
        return (codes.astype(np.int64) & ((1 << bits) - 1)).astype(np.uint16)


class LinkDescription(Data):
    """A link that belongs to no accelerator: a file of its own.

    Attributes
    ----------
    name, summary
        What it is.
    sources
        Where its numbers come from, by the keys that the numbers name.
    link
        The link.
    """

    schema_version: Literal[1]
    name: str = Field(min_length=1)
    summary: str = Field(min_length=1)
    sources: dict[str, Source] = Field(min_length=1)
    link: Link


@dataclass(frozen=True)
class Traffic:
    """Which words a layer's windows are made of, for one sample.

    The input is padded and flat; term k of output (channel, position) is the input word at
    ``bases[position] + taps[group of the channel, k]`` and the weight word ``[channel, k]``.

    Attributes
    ----------
    layer
        The ONNX node.
    channels
        Output channels.
    bases
        int32, shape (positions,).
    taps
        int32, shape (groups, terms).
    shape
        Shape of the input of one sample without padding.
    pads
        Padding before and behind each axis of that shape, with the input's zero point.
    """

    layer: str
    channels: int
    bases: npt.NDArray[np.int32]
    taps: npt.NDArray[np.int32]
    shape: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @classmethod
    def convolution(
        cls,
        layer: str,
        *,
        in_channels: int,
        size: Sequence[int],
        out_channels: int,
        kernel: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
        pads: Sequence[int],
        groups: int,
    ) -> Traffic:
        """Of a convolution over any number of axes; ``pads`` as in ONNX, all begins first."""
        rank = len(size)
        around = tuple(zip(pads[:rank], pads[rank:], strict=True))
        padded = [n + before + behind for n, (before, behind) in zip(size, around, strict=True)]
        places = np.arange(in_channels * math.prod(padded), dtype=np.int32)
        places = places.reshape(in_channels, *padded)
        reach = [(k - 1) * dilation for k, dilation in zip(kernel, dilations, strict=True)]
        corner = tuple(
            slice(0, n - r, stride) for n, r, stride in zip(padded, reach, strides, strict=True)
        )
        taps = places.reshape(groups, in_channels // groups, *padded)[
            (
                slice(None),
                slice(None),
                *(slice(0, r + 1, d) for r, d in zip(reach, dilations, strict=True)),
            )
        ]
        return cls(
            layer,
            out_channels,
            places[0][corner].ravel(),
            taps.reshape(groups, -1),
            (in_channels, *size),
            ((0, 0), *around),
        )

    @classmethod
    def product(cls, layer: str, *, rows: int, depth: int, columns: int) -> Traffic:
        """Of a matrix product of ``rows`` vectors a sample with ``columns`` columns."""
        bases = np.arange(rows, dtype=np.int32) * np.int32(depth)
        taps = np.arange(depth, dtype=np.int32)[None]
        return cls(layer, columns, bases, taps, (rows, depth), ((0, 0), (0, 0)))

    @property
    def terms(self) -> int:
        """Terms of an output."""
        return int(self.taps.shape[1])

    def chunks(self, window: int) -> list[slice]:
        """The terms of each window of an output."""
        return [slice(k, min(k + window, self.terms)) for k in range(0, self.terms, window)]

    def words_sent(self, link: Link) -> dict[Part, int]:
        """Words of each operand that are sent, without those that fill flits up.

        With :attr:`Link.reuse`, a window that repeats counts once: that of the inputs where
        channels are what changes first, that of the weights where positions are.
        """
        sizes = {
            "channel": self.channels,
            "position": len(self.bases),
            "chunk": len(self.chunks(link.window.value)),
        }
        changing = [loop for loop in link.loops if sizes[loop] > 1]
        innermost = changing[-1] if link.reuse and changing else None
        inputs = weights = self.channels * len(self.bases)
        if innermost == "channel":
            inputs = self.taps.shape[0] * len(self.bases)
        elif innermost == "position":
            weights = self.channels
        return {"inputs": inputs * self.terms, "weights": weights * self.terms}

    def check(self, link: Link, order: Order) -> None:
        """Refuse an order that a link cannot have for this layer, as :meth:`Link.check` does."""
        link.check(
            order,
            channels=self.channels,
            groups=len(self.taps),
            positions=len(self.bases),
            chunks=len(self.chunks(link.window.value)),
        )

    def sequence(self, link: Link) -> Iterator[tuple[int, int, int]]:
        """Channel, position and chunk of every window, in the order in which they are sent."""
        sizes = {
            "channel": self.channels,
            "position": len(self.bases),
            "chunk": len(self.chunks(link.window.value)),
        }
        where = [link.loops.index(name) for name in ("channel", "position", "chunk")]
        for indices in itertools.product(*(range(sizes[name]) for name in link.loops)):
            channel, position, chunk = (indices[place] for place in where)
            yield channel, position, chunk


def _pack(words: Words, places: IntArray, link: Link, turned: bool) -> Words:
    """Flits of one operand's window; shape (flits, lanes)."""
    lanes = link.lanes.value
    count = -(-len(words) // lanes)
    found = np.zeros((count, lanes), np.uint16)
    if link.packing == "row-major":
        found[places // lanes, places % lanes] = words
    else:
        found[places % count, places // count] = words
    return found[::-1] if turned else found


def _index_flits(index: IntArray, link: Link) -> Words:
    """A permutation of a window, packed: ceil(log2 terms) bits a term, the lowest first."""
    width = max(1, (len(index) - 1).bit_length())
    bits = (index[:, None] >> np.arange(width)) & 1
    lanes = link.flit_bits // link.word_bits.value
    flat = np.zeros(-(-bits.size // link.flit_bits) * link.flit_bits, np.int64)
    flat[: bits.size] = bits.ravel()
    weights = 1 << np.arange(link.word_bits.value)
    found = flat.reshape(-1, lanes, link.word_bits.value) @ weights
    return np.asarray(found, np.uint16)


def _nearest(x: Words, w: Words, before: dict[int, Words], link: Link) -> IntArray:
    """Places of a window's terms, slot by slot the pair nearest to what its lane sent before.

    ``before`` holds the last pair of each lane, and is changed.
    """
    lanes, terms = link.lanes.value, len(x)
    count = -(-terms // lanes)
    pairs = np.stack([x, w], axis=1)
    left, places = list(range(terms)), np.empty(terms, np.int64)
    for lane in range(lanes):
        for flit in range(count):
            rank = flit * lanes + lane if link.packing == "row-major" else lane * count + flit
            pair = np.zeros(2, np.uint16)
            if rank < terms:
                changed = pairs[left] ^ before.get(lane, pairs[left])
                term = left.pop(int(np.bitwise_count(changed).sum(1).argmin()))
                places[term], pair = rank, pairs[term]
            before[lane] = pair
    return places


def flits(
    traffic: Traffic,
    inputs: Words,
    weights: Words,
    link: Link,
    order: Order,
    tables: Mapping[Part, npt.NDArray[np.uint16]],
    places: npt.NDArray[np.uint8] | None = None,
) -> dict[Part, Words]:
    """All flits of a layer for one sample, each operand's words apart.

    Parameters
    ----------
    traffic
        The layer.
    inputs
        Words of the padded input, flat.
    weights
        Words of the weights; shape (channels, terms).
    link, order
        How they are sent.
    tables
        Bucket of every word (:meth:`Order.table`), for the operands that are sorted by their own.
    places
        Place of each weight in its window, for a chain; shape (channels, terms).

    Returns
    -------
    dict
        Part to words, shape (flits, lanes). The part ``index`` is there for ``separated`` orders.

    Raises
    ------
    UsageError
        If the link cannot have the order for this layer.
    """
    traffic.check(link, order)
    parts: dict[Part, list[Words]] = {"inputs": [], "weights": []}
    if order.is_sorted and order.on == "separated":
        parts["index"] = []
    chunks = traffic.chunks(link.window.value)
    in_group = traffic.channels // traffic.taps.shape[0]
    last: dict[Part, tuple[int, int]] = {}
    before: dict[int, Words] = {}
    for number, (channel, position, chunk) in enumerate(traffic.sequence(link)):
        span = chunks[chunk]
        taps = traffic.taps[channel // in_group, span]
        x = inputs[traffic.bases[position] + taps]
        w = weights[channel, span]
        places_x = places_w = np.arange(len(x))
        if order.key == "chain":
            assert places is not None
            places_x = places_w = places[channel, span].astype(np.int64)
        if order.key == "nearest":
            places_x = places_w = _nearest(x, w, before, link)
        if order.is_sorted:
            if order.on != "weights":
                places_x = counting_sort(tables["inputs"][x])
            if order.on != "inputs":
                places_w = counting_sort(tables["weights"][w])
            if order.on == "weights":
                places_x = places_w
            elif order.on == "inputs":
                places_w = places_x
        turned = order.snake and number % 2 == 1
        group = channel // in_group
        sent: dict[Part, tuple[int, int]] = {
            "inputs": (position, chunk * traffic.taps.shape[0] + group),
            "weights": (channel, chunk),
        }
        operands: tuple[tuple[Part, Words, IntArray], ...] = (
            ("inputs", x, places_x),
            ("weights", w, places_w),
        )
        for part, words, ranks in operands:
            if not (link.reuse and last.get(part) == sent[part]):
                parts[part].append(_pack(words, ranks, link, turned))
        last = sent
        if "index" in parts:
            index = np.empty_like(places_x)
            index[places_x] = places_w  # the weight that belongs to the input of each rank
            parts["index"].append(_index_flits(index, link))
    return {part: np.concatenate(found) for part, found in parts.items()}


def transitions(words: Words, word_bits: int) -> IntArray:
    """How often every bit of every lane changes between consecutive flits.

    Parameters
    ----------
    words
        Shape (flits, lanes).
    word_bits
        Width of the words.

    Returns
    -------
    numpy.ndarray
        int64, shape (lanes, word_bits), the lowest bit first.
    """
    changed = words[1:] ^ words[:-1]
    bits = (changed[..., None] >> np.arange(word_bits, dtype=np.uint16)) & 1
    return np.asarray(bits.sum(0), np.int64)
