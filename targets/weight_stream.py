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
_MOST_COMPARISONS: Final = 1 << 28
# Offsets of less than this share of all are left out.
_LEAST_SHARE: Final = 0.05


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

    def of(self, tap: int) -> IntArray:
        """The entry of this number of every channel."""
        outside, inside = divmod(tap, self.inner)
        channels = np.arange(self.channels)
        return np.asarray((outside * self.channels + channels) * self.inner + inside, np.int64)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Channels that stand ``offset`` places apart, and what of them meets on the link.

    Attributes
    ----------
    offset
        Place of the second channel less that of the first.
    often
        float64, shape (channels,): how many words meet where the first channel is at this place; 0
        where there is no second.
    meetings
        How much of that falls on which entry of a first and which entry of a second channel.
    words
        Words of each entry of the axis, as the first and as the second; shape (entries, words).
    axis
        Which entries are a channel's.
    """

    offset: int
    often: npt.NDArray[np.float64]
    meetings: tuple[tuple[int, int, float], ...]
    words: tuple[Words, Words]
    axis: Axis

    @property
    def weight(self) -> float:
        """Words that meet, all in all."""
        return float(self.often.sum())

    def distances(self) -> FloatArray:
        """Transitions a word between a first and a second channel; shape (channels, channels)."""
        channels = self.axis.channels
        found = np.zeros((channels, channels), np.float32)
        for one, two, share in self.meetings:
            sides = self.words[0][self.axis.of(one)], self.words[1][self.axis.of(two)]
            found += np.float32(share / sides[0].shape[1]) * _distances(*sides)
        return found


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
            rows = rows[rows + ahead < len(words)]
            if not entries or not len(rows):
                continue
            first, second, times = (np.concatenate(parts) for parts in zip(*entries, strict=True))
            real = (first < self._terms) & (second < self._terms) & (times > 0)
            found += _neighbours(
                axis,
                (words[rows].T, words[rows + ahead].T),
                (first[real], second[real], times[real] * (len(words) - ahead)),
            )
        return found

    def between_outputs(self, words: Words, axis: Axis) -> list[Neighbours]:
        """What neighbours along the output channels cost."""
        padded = np.concatenate([words, np.zeros((len(words), 1), words.dtype)], 1)
        found = []
        for step in self._steps:
            first, second = step.channels
            if first[0] == second[0]:
                continue
            ends, starts = self._last[step.chunks[0]].ravel(), self._first[step.chunks[1]].ravel()
            chosen = _sample(len(ends), axis)
            found += _neighbours(
                axis,
                (padded[:, ends[chosen]], padded[:, starts[chosen]]),
                (first, second, np.full(len(first), step.times * len(ends))),
            )
        return found


def _sample(count: int, axis: Axis) -> IntArray:
    """Evenly spread indices of the words of an entry, so many that all can be compared."""
    kept = min(count, max(16, _MOST_COMPARISONS // (axis.channels * axis.size)))
    return np.arange(kept) * count // kept


def _neighbours(
    axis: Axis,
    words: tuple[Words, Words],
    pairs: tuple[IntArray, IntArray, npt.NDArray[Any]],
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
    found = []
    for offset in np.unique(offsets[offsets != 0]):
        here = offsets == offset
        often = np.bincount(place[here], times[here], axis.channels)
        codes, where = np.unique(tap[here] * taps + other_tap[here], return_inverse=True)
        shares = np.bincount(where, times[here]) / times[here].sum()
        meetings = tuple(
            (*divmod(int(code), taps), float(share))
            for code, share in zip(codes, shares, strict=True)
        )
        found.append(Neighbours(int(offset), often, meetings, words, axis))
    return found


def _distances(first: Words, second: Words) -> FloatArray:
    """Hamming distances of all rows of one array to all rows of another."""
    filled = -first.shape[1] % 4  # four words of 16 bits at once
    one, other = (np.pad(side, ((0, 0), (0, filled))).view(np.uint64) for side in (first, second))
    found = np.empty((len(one), len(other)), np.float32)
    for row, words in zip(found, one, strict=True):
        row[:] = np.bitwise_count(other ^ words).sum(1, np.uint32)
    return found


# -- a good order ----------------------------------------------------------------------------------


def arranged(neighbours: Sequence[Neighbours], channels: int) -> IntArray:
    """Put channels into an order in which neighbours cost little (greedy nearest neighbour).

    Place after place takes the channel that costs least next to those before it.

    Parameters
    ----------
    neighbours
        Who stands next to whom; those that hardly count are left out.
    channels
        How many channels.

    Returns
    -------
    numpy.ndarray
        int64, shape (channels,): the channel at each place.
    """
    most = max((entry.weight for entry in neighbours), default=0.0)
    sides = [
        side for entry in neighbours if entry.weight > _LEAST_SHARE * most for side in _sides(entry)
    ]
    order = np.full(channels, -1)
    taken = np.zeros(channels, bool)
    for place in range(channels):
        cost = np.where(taken, np.float32(np.inf), np.float32(0))
        for other, often, distances in sides:
            if often[place] > 0 and order[other[place]] >= 0:
                cost += often[place] * distances[order[other[place]]]
        order[place] = int(np.argmin(cost))
        taken[order[place]] = True
    return order


def _sides(entry: Neighbours) -> list[tuple[IntArray, FloatArray, FloatArray]]:
    """For every place the place of its neighbour and how often they meet, on and back.

    The third are distances, shape (channels of the neighbour, channels here).
    """
    distances = entry.distances()
    channels = len(distances)
    every = np.arange(channels)
    places = np.flatnonzero(entry.often)
    on, back = np.zeros((2, channels), np.float32)
    on[places] = back[places + entry.offset] = entry.often[places]
    return [
        (np.clip(every + entry.offset, 0, channels - 1), on, np.ascontiguousarray(distances.T)),
        (np.clip(every - entry.offset, 0, channels - 1), back, distances),
    ]
