"""Products of rows with constant weights, inside of a task: what floats and codes share.

Weights lie as tiles of 16 columns. A part of a tile, as much as the first-level cache holds, meets
the rows of a task in groups, whose sums stay in registers meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Buffer, Expr, ceil_div

__all__ = [
    "WIDTH",
    "Numbers",
    "Part",
    "RowProduct",
    "Rows",
    "group_count",
    "group_sizes",
    "in_tiles",
    "split",
]

WIDTH = 16  # columns of a tile


def in_tiles(weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Cut weights into tiles.

    Parameters
    ----------
    weights
        [*batch, depth, columns].

    Returns
    -------
    numpy.ndarray
        [*batch, ceil(columns / 16), depth, 16]; missing columns are zero.
    """
    *batch, depth, columns = weights.shape
    number = ceil_div(columns, WIDTH)
    padded = np.zeros((*batch, depth, number * WIDTH), weights.dtype)
    padded[..., :columns] = weights
    return np.ascontiguousarray(padded.reshape(*batch, depth, number, WIDTH).swapaxes(-3, -2))


@dataclass(frozen=True)
class Rows:
    """Where rows begin in a flat buffer, and how many elements lie from one to the next."""

    buffer: Buffer
    offset: Expr
    stride: Expr


# --------------------------------------------------------------------------- groups of rows


@dataclass(frozen=True)
class Part:
    """``number`` groups of ``rows`` rows each; ``begin`` rows of the block lie before them."""

    rows: int
    begin: Expr
    number: Expr


def group_count(rows: Expr, most: int) -> Expr:
    """Groups of at most so many rows; one, to divide by, where there are no rows."""
    return emit.bind(emit.greater((rows + (most - 1)) // most, 1))


def group_sizes(rows: Expr, max_rows: int, most: int) -> list[int]:
    """Rows that groups may have if they differ by no more than one."""
    if not isinstance(rows, int):
        return list(range(1, min(max_rows, most) + 1))
    number = group_count(rows, most)
    return sorted({rows // number, ceil_div(rows, number)} - {0})


def split(numbers: Numbers, rows: Expr, number: Expr, sizes: Sequence[int]) -> list[Part]:
    """Cut rows into groups that differ by no more than a row, the larger ones first."""
    small, larger = numbers.keep(rows // number), numbers.keep(rows % number)
    if isinstance(rows, int):
        parts = [Part(small + 1, 0, larger), Part(small, larger * (small + 1), number - larger)]
        return [part for part in parts if part.rows and part.number]
    none = emit.index(0)
    parts = []
    for size in sizes:
        is_small, is_large = small == size, small + 1 == size
        begin = T.Select(is_small, larger * (size + 1), none)
        many = T.Select(is_small, number - larger, T.Select(is_large, larger, none))
        parts.append(Part(size, numbers.keep(begin), numbers.keep(many)))
    return parts


class Numbers:
    """Computes numbers once, in memory: TVM's analysis takes minutes over nested quotients."""

    MOST = 32

    def __init__(self) -> None:
        self._memory = emit.allocate(self.MOST, "int64", registers=True)
        self._places = iter(range(self.MOST))

    def keep(self, value: Expr) -> Expr:
        """Compute a number."""
        if isinstance(value, int):
            return value
        place = next(self._places)
        emit.store(self._memory, place, value, 1)
        return emit.bind(emit.load(self._memory, place, 1))


# --------------------------------------------------------------------------- passes


@dataclass(frozen=True)
class RowProduct(ABC):
    """Emits the passes; ``packed`` has rows of the depth, tile after tile."""

    data: Rows
    packed: Rows
    depth: int
    columns: int
    out: Rows
    start: Rows | None

    @property
    @abstractmethod
    def lanes(self) -> int:
        """Length of a vector of sums; it divides the columns of a tile."""

    @abstractmethod
    def sums(self, row: Expr, rows: int, tile: Expr, begin: Expr, depth: Expr) -> Buffer:
        """Add up a part of the depth for rows x 16 results, in registers."""

    def total(self, sums: Buffer, at: int) -> Expr:
        """A vector of the rows x 16 results, from a place on, of what :meth:`sums` made."""
        return emit.load(sums, at, self.lanes)

    def block(
        self, first_row: Expr, parts: Sequence[Part], first_tile: Expr, tiles: Expr, most: int
    ) -> None:
        """Compute some tiles of some rows, adding up at most so much of the depth at a time."""
        if not parts:
            return
        runs = ceil_div(self.depth, most)
        run = ceil_div(self.depth, runs)
        with emit.loop(runs) as turn, emit.loop(tiles) as tile:
            begin = emit.bind(turn * run)
            depth = run if self.depth == runs * run else emit.lesser(self.depth - begin, run)
            depth = emit.bind(depth)
            for part in parts:
                with emit.loop(part.number) as group:
                    row = emit.bind(first_row + part.begin + group * part.rows)
                    sums = self.sums(row, part.rows, first_tile + tile, begin, depth)
                    if runs == 1:
                        self._finish(sums, row, part.rows, first_tile + tile, self.start)
                        continue
                    with T.If(turn == 0):
                        with T.Then():
                            self._finish(sums, row, part.rows, first_tile + tile, self.start)
                        with T.Else():
                            self._finish(sums, row, part.rows, first_tile + tile, self.out)

    def _finish(self, sums: Buffer, row: Expr, rows: int, tile: Expr, start: Rows | None) -> None:
        """Write the columns that exist."""
        lanes = self.lanes

        def write(value: Expr, number: int, place: Expr, lanes: int) -> None:
            column = tile * WIDTH + place
            if start is not None:
                begin = start.offset + (row + number) * start.stride
                value = value + emit.load(start.buffer, begin + column, lanes)
            target = self.out.offset + (row + number) * self.out.stride
            emit.store(self.out.buffer, target + column, value, lanes)

        def whole() -> None:
            for number in range(rows):
                for place in range(0, WIDTH, lanes):
                    value = self.total(sums, number * WIDTH + place)
                    write(value, number, place, lanes)

        def partial() -> None:
            # Registers have no addresses: what is picked by a loop lies in memory.
            memory = emit.allocate(rows * WIDTH, self.out.buffer.dtype)
            for at in range(0, rows * WIDTH, lanes):
                emit.store(memory, at, self.total(sums, at), lanes)
            for number in range(rows):
                with emit.loop(self.columns % WIDTH) as place:
                    value = emit.load(memory, number * WIDTH + place, 1)
                    write(value, number, place, 1)

        if self.columns % WIDTH == 0:
            whole()
            return
        with T.If(emit.index(tile) < self.columns // WIDTH):
            with T.Then():
                whole()
            with T.Else():
                partial()
