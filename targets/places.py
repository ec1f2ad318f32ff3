"""Places of constant weights: orders that are known at compile time and need no sorting unit.

The inputs are fetched in the order of the weights that they meet.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitwright.targets.link import Link, Words
from bitwright.targets.orders import Order

__all__ = ["chain", "constant_places"]

_TAKEN = 64  # more than the bits of a word


def constant_places(
    words: Words, link: Link, order: Order, *, positions: int
) -> npt.NDArray[np.uint8]:
    """Place of every weight in its window.

    Parameters
    ----------
    words
        Words of the weights; shape (channels, terms).
    link, order
        How they are sent; an order of the weights.
    positions
        Positions of the layer's output; 2 stands for any number that is not known.

    Returns
    -------
    numpy.ndarray
        uint8, of the same shape: a permutation of 0, 1, ... in each window.
    """
    if order.key == "chain":
        return chain(words, link, positions=positions, snake=order.snake)
    bits, window = link.word_bits.value, link.window.value
    buckets = order.table(bits, np.bincount(words.ravel(), minlength=1 << bits))[words]
    places = np.empty(words.shape, np.uint8)
    for start in range(0, words.shape[1], window):
        # The same as the counting sort, which needs room for each bucket.
        ranked = np.argsort(buckets[:, start : start + window], axis=1, kind="stable")
        places[:, start : start + window] = np.argsort(ranked, axis=1)
    return places


def chain(words: Words, link: Link, *, positions: int, snake: bool) -> npt.NDArray[np.uint8]:
    """Places of weights in their windows, each next to the nearest that is left.

    The greedy nearest neighbour on the weights alone.

    A place's word follows the one in front of it in its lane; the first of a lane follows the
    last one of the window before, among windows that follow one another in the innermost loop over
    weights. Where the same window comes again and again, or every second one backwards, a window
    stands alone, and a lane follows the lane in front of it.

    Parameters
    ----------
    words
        Words of the weights; shape (channels, terms).
    link
        How they are sent.
    positions
        Positions of the layer's output.
    snake
        Whether every second window sends its flits in reverse order.

    Returns
    -------
    numpy.ndarray
        uint8, of the same shape: a permutation of 0, 1, ... in each window.
    """
    channels, terms = words.shape
    window = min(link.window.value, terms)
    chunks = -(-terms // window)
    padded = np.zeros((channels, chunks * window), np.uint16)
    padded[:, :terms] = words
    windows = padded.reshape(channels, chunks, window)
    lengths = np.minimum(window, terms - window * np.arange(chunks))
    sizes = {"channel": channels, "position": positions, "chunk": chunks}
    inner = next((loop for loop in reversed(link.loops) if sizes[loop] > 1), "chunk")
    places = np.zeros(windows.shape, np.uint8)
    if snake or inner == "position":
        for length in np.unique(lengths):
            alike = windows[:, lengths == length, :length]
            found, _ = _follow(alike.reshape(-1, length), link, None)
            places[:, lengths == length, :length] = found.reshape(alike.shape)
    elif inner == "chunk":
        last = np.zeros((channels, link.lanes.value), np.uint16)
        for chunk, length in enumerate(lengths):
            found, last = _follow(windows[:, chunk, :length], link, last)
            places[:, chunk, :length] = found
    else:
        for length in np.unique(lengths):
            alike = windows[:, lengths == length, :length]
            last = np.zeros((alike.shape[1], link.lanes.value), np.uint16)
            for channel in range(channels):
                found, last = _follow(alike[channel], link, last)
                places[channel, lengths == length, :length] = found
    return places.reshape(channels, -1)[:, :terms]


def _follow(windows: Words, link: Link, last: Words | None) -> tuple[npt.NDArray[np.uint8], Words]:
    """Order windows side by side; ``last`` holds the words that the lanes sent last.

    Returns
    -------
    places
        Shape (windows, terms).
    last
        Shape (windows, lanes).
    """
    count, terms = windows.shape
    lanes = link.lanes.value
    flits = -(-terms // lanes)
    rows = np.arange(count)
    sent = np.zeros((count, flits * lanes), np.uint16)
    places = np.empty((count, terms), np.uint8)
    taken = np.zeros((count, terms), np.uint8)
    column_major = link.packing == "column-major"
    step = 1 if column_major else lanes
    for rank in range(terms):
        lane, flit = (
            (rank // flits, rank % flits) if column_major else (rank % lanes, rank // lanes)
        )
        if flit:
            before = sent[:, rank - step]
        elif last is not None:
            before = last[:, lane]
        else:  # the lane in front ends as this one begins
            before = sent[:, rank - 1] if rank else np.zeros(count, np.uint16)
        distance = np.bitwise_count(windows ^ before[:, None]) + taken
        nearest = distance.argmin(1)
        places[rows, nearest] = rank
        taken[rows, nearest] = _TAKEN
        sent[:, rank] = windows[rows, nearest]
    ends = sent.reshape(count, lanes, flits)[:, :, -1]
    if not column_major:
        ends = sent.reshape(count, flits, lanes)[:, -1]
    return places, ends
