"""The weights of a layer as a link carries them: exact counts, and what neighbours cost.

Weights are the same for every sample, so their transitions are known when a model is compiled.
``targets/link.py`` defines them; here they are counted without sending every window of every
position, and split into what two channels that follow each other cost. :func:`arranged` puts
channels into an order in which that is little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from bitwright.targets.link import Link, Words

__all__ = ["Axis", "Neighbours", "WeightStream", "arranged"]

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]

# Words compared for a matrix of distances; of more, some are taken at even steps.
_MOST_COMPARISONS: Final = 1 << 31
# Offsets of less than this share of all are left out.
_LEAST_SHARE: Final = 0.05
_SWEEPS: Final = 8


@dataclass(frozen=True, slots=True)
class Axis:
    """Where channels stand along an axis of ``outer * channels * inner`` entries.

    Entry ``(x * channels + c) * inner + y`` belongs to channel ``c``: behind a reshape, a channel
    is many entries.
    """

    channels: int
    outer: int = 1
    inner: int = 1

    @property
    def size(self) -> int:
        """Entries of the axis."""
        return self.outer * self.channels * self.inner

    def entries(self, permutation: IntArray) -> IntArray:
        """Which entry stands at each place, if ``permutation`` names the channel at each place."""
        places = np.arange(self.size).reshape(self.outer, self.channels, self.inner)
        return np.asarray(places[:, permutation].ravel(), np.int64)

    def channel(self, entries: IntArray) -> tuple[IntArray, IntArray]:
        """The channel of entries, and which of the channel's entries they are."""
        outside, channels = np.divmod(entries // self.inner, self.channels)
        return channels, outside * self.inner + entries % self.inner


@dataclass(frozen=True)
class Neighbours:
    """What it costs that channels stand ``offset`` places apart.

    Attributes
    ----------
    offset
        Place of the second channel less that of the first.
    shares
        float32, shape (channels,): how much of ``distances`` counts where the first channel is at
        this place; 0 where there is no second.
    distances
        float32, shape (channels, channels): transitions between a first and a second channel.
    """

    offset: int
    shares: FloatArray
    distances: FloatArray


@dataclass(frozen=True, slots=True)
class _Step:
    """Windows that follow each other: ``times`` for each pair of a channel and of a chunk."""

    times: int
    channels: tuple[IntArray, IntArray]
    chunks: tuple[IntArray, IntArray]


class WeightStream:
    """The stream of a layer's weights for one sample, in the order that they have.

    Parameters
    ----------
    channels, terms
        Shape of the weights, as :class:`bitwright.targets.link.Traffic` has them.
    positions
        Positions of an output.
    link
        The link.
    """

    def __init__(self, channels: int, terms: int, positions: int, link: Link) -> None:
        self._channels, self._terms, self._link = channels, terms, link
        window, lanes = link.window.value, link.lanes.value
        #: Terms in the flits of each chunk, shape (flits, lanes); ``terms`` stands for a zero.
        self._chunks: list[IntArray] = []
        for start in range(0, terms, window):
            span = np.arange(start, min(start + window, terms))
            flits = -(-len(span) // lanes)
            filled = np.concatenate([span, np.full(flits * lanes - len(span), terms)])
            column = link.packing == "column-major"
            self._chunks.append(
                filled.reshape(lanes, flits).T if column else filled.reshape(flits, lanes)
            )
        self._first = np.stack([chunk[0] for chunk in self._chunks])
        self._last = np.stack([chunk[-1] for chunk in self._chunks])
        self._steps = list(self._following(positions))
        # How often each window is sent, shape (channels, chunks).
        self._sent = np.full((channels, len(self._chunks)), positions, np.int64)
        if link.reuse:
            for step in self._steps:
                same = self._unchanged(step)
                self._sent[np.ix_(step.channels[1], step.chunks[1])] -= step.times * same

    def _following(self, positions: int) -> Iterator[_Step]:
        sizes = {"channel": self._channels, "position": positions, "chunk": len(self._chunks)}
        loops = self._link.loops
        for depth, moving in enumerate(loops):
            if sizes[moving] < 2:
                continue
            pairs = {}
            for level, name in enumerate(loops):
                every = np.arange(sizes[name])
                if level == depth:
                    pairs[name] = every[:-1], every[1:]
                else:  # loops inside begin anew
                    pairs[name] = (every, every) if level < depth else (every[-1:], every[:1])
            yield _Step(len(pairs["position"][0]), pairs["channel"], pairs["chunk"])

    @staticmethod
    def _unchanged(step: _Step) -> npt.NDArray[np.bool_]:
        """Where a window is followed by itself; shape (channels, chunks) of the step."""
        channels, chunks = (before == after for before, after in (step.channels, step.chunks))
        return channels[:, None] & chunks

    def count(self, words: Words) -> int:
        """Count all transitions.

        Parameters
        ----------
        words
            Shape (channels, terms).
        """
        narrow = np.uint8 if self._link.word_bits.value <= 8 else np.uint16
        padded = np.concatenate([words, np.zeros((len(words), 1), words.dtype)], 1).astype(narrow)
        total = 0
        for number, chunk in enumerate(self._chunks):
            sent = padded[:, chunk]
            changed = np.bitwise_count(sent[:, 1:] ^ sent[:, :-1]).sum((1, 2), np.int64)
            total += int(changed @ self._sent[:, number])
        first, last = padded[:, self._first], padded[:, self._last]
        for step in self._steps:
            before = last[np.ix_(step.channels[0], step.chunks[0])]
            after = first[np.ix_(step.channels[1], step.chunks[1])]
            changed = np.bitwise_count(before ^ after).sum(-1, np.int64)
            if self._link.reuse:
                changed[self._unchanged(step)] = 0
            total += step.times * int(changed.sum())
        return total

    # -- what neighbours cost ----------------------------------------------------------------------

    def between_inputs(self, words: Words, axis: Axis) -> list[Neighbours]:
        """What neighbours along the terms cost, where ``axis`` says which channel a term is of.

        Zeros behind the last term and where the windows of different output channels meet at the
        ends of a loop are left out.
        """
        pairs: dict[int, list[tuple[IntArray, IntArray, npt.NDArray[Any]]]] = {0: [], 1: []}

        def add(ahead: int, first: IntArray, second: IntArray, times: npt.NDArray[Any]) -> None:
            pairs[ahead].append((first.ravel(), second.ravel(), np.ravel(times)))

        for number, chunk in enumerate(self._chunks):
            often = np.full(chunk[1:].shape, self._sent[:, number].mean())
            add(0, chunk[:-1], chunk[1:], often)
        for step in self._steps:
            ahead = int(step.channels[1][0] - step.channels[0][0])
            if ahead not in pairs:
                continue  # once for all channels
            first, second = self._last[step.chunks[0]], self._first[step.chunks[1]]
            kept = np.full(first.shape, float(step.times))
            if self._link.reuse and ahead == 0:
                kept[step.chunks[0] == step.chunks[1]] = 0
            add(ahead, first, second, kept)
        rows = _sample(len(words), axis)
        found = []
        for ahead, entries in pairs.items():
            if not entries or (ahead and len(words) < 2):
                continue
            first, second, times = (np.concatenate(parts) for parts in zip(*entries, strict=True))
            real = (first < self._terms) & (second < self._terms) & (times > 0)
            sampled = rows[rows + ahead < len(words)]
            scale = (len(words) - ahead) / max(1, len(sampled))
            found += _neighbours(
                axis,
                (words[sampled].T, words[sampled + ahead].T),
                (first[real], second[real], times[real] * scale),
                self._link.word_bits.value,
            )
        return _largest(found)

    def between_outputs(self, words: Words, axis: Axis) -> list[Neighbours]:
        """What neighbours along the output channels cost."""
        found = []
        for step in self._steps:
            first, second = step.channels
            if first[0] == second[0]:
                continue
            ends, starts = self._last[step.chunks[0]].ravel(), self._first[step.chunks[1]].ravel()
            padded = np.concatenate([words, np.zeros((len(words), 1), words.dtype)], 1)
            chosen = _sample(len(ends), axis)
            times = np.full(len(first), step.times * len(ends) / len(chosen))
            found += _neighbours(
                axis,
                (padded[:, ends[chosen]], padded[:, starts[chosen]]),
                (first, second, times),
                self._link.word_bits.value,
            )
        return _largest(found)


def _sample(count: int, axis: Axis) -> IntArray:
    """Evenly spread indices of the words of an entry, so many that all can be compared."""
    kept = min(count, max(16, _MOST_COMPARISONS // (axis.channels * axis.size)))
    return np.arange(kept) * count // kept


def _largest(found: list[Neighbours]) -> list[Neighbours]:
    if not found:
        return []
    weights = [float(entry.shares.sum()) * float(entry.distances.mean()) for entry in found]
    return [
        entry
        for entry, weight in zip(found, weights, strict=True)
        if weight > _LEAST_SHARE * max(weights)
    ]


def _neighbours(
    axis: Axis,
    words: tuple[Words, Words],
    pairs: tuple[IntArray, IntArray, npt.NDArray[np.float64]],
    word_bits: int,
) -> list[Neighbours]:
    """Group pairs of entries by the offset of their channels.

    Parameters
    ----------
    axis
        The axis of the entries.
    words
        Words of each entry as the first and as the second of a pair; shape (entries, words).
    pairs
        First entries, second entries, and how often they meet.
    """
    first, second, times = pairs
    (place, tap), (other, other_tap) = axis.channel(first), axis.channel(second)
    taps = axis.size // axis.channels
    offsets = other - place
    total = times[offsets != 0].sum()
    found = []
    for offset in np.unique(offsets[offsets != 0]):
        here = offsets == offset
        if times[here].sum() < _LEAST_SHARE * total:
            continue
        shares = np.bincount(place[here], times[here], axis.channels)
        meeting, where = np.unique(tap[here] * taps + other_tap[here], return_inverse=True)
        weights = np.bincount(where, times[here]) / times[here].sum()
        distances = np.zeros((axis.channels, axis.channels), np.float32)
        every = np.arange(axis.channels)
        for code, weight in zip(meeting, weights, strict=True):
            one, two = divmod(int(code), taps)
            sides = words[0][_entries(axis, every, one)], words[1][_entries(axis, every, two)]
            distances += np.float32(weight) * _distances(*sides, word_bits)
        found.append(Neighbours(int(offset), shares.astype(np.float32), distances))
    return found


def _entries(axis: Axis, channels: IntArray, tap: int) -> IntArray:
    outside, inside = divmod(tap, axis.inner)
    return np.asarray((outside * axis.channels + channels) * axis.inner + inside)


def _distances(first: Words, second: Words, word_bits: int) -> FloatArray:
    """Hamming distances of all rows of one array to all rows of another."""
    bits = np.arange(word_bits, dtype=np.uint16)
    ones = [
        ((side[..., None] >> bits) & 1).reshape(len(side), -1).astype(np.float32)
        for side in (first, second)
    ]
    # Different bits: those that are set on either side, less twice those on both.
    both = ones[0] @ ones[1].T
    return np.asarray(ones[0].sum(1)[:, None] + ones[1].sum(1) - 2 * both, np.float32)


# -- a good order ----------------------------------------------------------------------------------


def arranged(neighbours: Sequence[Neighbours], channels: int) -> IntArray:
    """Put channels into an order in which neighbours cost little.

    Place after place takes the channel that costs least next to those before it (greedy nearest
    neighbour); then pairs of channels are exchanged as long as that helps (2-opt of the quadratic
    assignment problem, which this is).

    Parameters
    ----------
    neighbours
        What neighbours cost.
    channels
        How many channels.

    Returns
    -------
    numpy.ndarray
        int64, shape (channels,): the channel at each place.
    """
    sides = [side for entry in neighbours for side in _sides(entry, channels)]
    order = np.full(channels, -1)
    free = np.ones(channels, bool)
    for place in range(channels):
        cost = _costs(sides, order, place, channels)
        cost[~free] = np.inf
        order[place] = int(np.argmin(cost))
        free[order[place]] = False
    return _exchanged(sides, order)


@dataclass(frozen=True, slots=True)
class _Side:
    """What a channel costs next to the one ``offset`` places on (or back).

    ``distances[other, channel]``; ``shares[place]`` is 0 where there is no other.
    """

    offset: int
    shares: FloatArray
    distances: FloatArray


def _sides(entry: Neighbours, channels: int) -> list[_Side]:
    behind = np.zeros(channels, np.float32)
    places = np.flatnonzero(entry.shares)
    behind[places + entry.offset] = entry.shares[places]
    return [
        _Side(entry.offset, entry.shares, np.ascontiguousarray(entry.distances.T)),
        _Side(-entry.offset, behind, entry.distances),
    ]


def _costs(sides: Sequence[_Side], order: IntArray, place: int, channels: int) -> FloatArray:
    """What every channel would cost at a place next to those that are placed."""
    cost = np.zeros(channels, np.float32)
    for side in sides:
        share = side.shares[place]
        if share > 0 and order[place + side.offset] >= 0:
            cost += share * side.distances[order[place + side.offset]]
    return cost


def _exchanged(sides: Sequence[_Side], order: IntArray) -> IntArray:
    channels = len(order)
    others = []  # for every place, the place of the other and how much it counts
    for side in sides:
        there = np.clip(np.arange(channels) + side.offset, 0, channels - 1)
        others.append(there)
    order = order.copy()

    def own() -> FloatArray:
        return sum(
            side.shares * side.distances[order[there], order]
            for side, there in zip(sides, others, strict=True)
        )

    current = own()
    for _ in range(_SWEEPS):
        changed = False
        for place in range(channels):
            here = _costs(sides, order, place, channels)[order]
            channel = order[place]
            there = np.zeros(channels, np.float32)
            for side, other in zip(sides, others, strict=True):
                there += side.shares * side.distances[order[other], channel]
            gain = current + current[place] - here - there
            gain[place] = 0
            for side in sides:  # their distance to each other would be counted twice
                if side.shares[place] > 0:
                    gain[place + side.offset] = 0
            best = int(np.argmax(gain))
            if gain[best] > 1e-5 * current[place]:
                order[[place, best]] = order[[best, place]]
                current = own()
                changed = True
        if not changed:
            break
    return order
