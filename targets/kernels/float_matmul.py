"""Products of float32 activations with constant float32 weights.

Weights lie as tiles of 16 columns. A part of a tile, as much as the first-level cache holds, meets
the rows of a task in groups of up to six. The sums of a group stay in registers meanwhile: twelve
accumulators of eight lanes, two vectors of weights and one of data are what AVX2 has room for.
With fewer rows there are several accumulators for each sum, because a multiply-add takes four
cycles and two can begin in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Buffer, Expr, ceil_div

__all__ = ["WIDTH", "Rows", "emit_product", "kernel", "pack"]

WIDTH = 16  # columns of a tile

_LANES = 8
_VECTORS = WIDTH // _LANES
_MOST_ROWS = 6  # of a group
_CHAINS = 8  # accumulators that keep the multipliers busy: latency times throughput
_BLOCK_DEPTH = 384  # 24 KiB of a tile: most of a first-level cache of 32 KiB
_BLOCK_GROUPS = 8  # of a task, whose rows and results the second-level cache shall hold
_BLOCK_TILES = 16  # the same
_ROW_TASKS = 8
_COLUMN_TASKS = 8
_LEAST_TILES = 4  # of a task: fewer would read the data too often
_SERIAL_MACS = 32 * 1024  # a product too small for threads


def pack(weights: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Lay out weights as the kernels read them.

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
    tiles = ceil_div(columns, WIDTH)
    padded = np.zeros((*batch, depth, tiles * WIDTH), np.float32)
    padded[..., :columns] = weights
    return np.ascontiguousarray(padded.reshape(*batch, depth, tiles, WIDTH).swapaxes(-3, -2))


def kernel(
    leading: Sequence[int | None], depth: int, columns: int, *, name: str, bias: bool = False
) -> Any:
    """Build the kernel of a product with packed weights.

    Parameters
    ----------
    leading
        The lengths that make the rows; None: known only when it runs.
    depth, columns
        Shape of the weights.
    name
        Symbol of the function.
    bias
        Whether a vector is added to every row.

    Returns
    -------
    PrimFunc
        ``(data [*leading, depth], packed [ceil(columns / 16), depth, 16], bias [columns], result
        [*leading, columns])``, all float32, without a bias where there is none.
    """
    return emit.primitive_function(name, lambda: _emit(leading, depth, columns, bias))


def _emit(leading: Sequence[int | None], depth: int, columns: int, bias: bool) -> None:
    lengths = [
        tirx.Var(f"length_{axis}", "int64") if length is None else emit.index(length)
        for axis, length in enumerate(leading)
    ]
    tiles = ceil_div(columns, WIDTH)
    declared: list[tuple[str, Sequence[Expr], str]] = [
        ("data", (*lengths, depth), "float32"),
        ("packed", (tiles, depth, WIDTH), "float32"),
        ("result", (*lengths, columns), "float32"),
    ]
    if bias:
        declared.insert(2, ("bias", (columns,), "float32"))
    data, packed, *start, result = emit.parameters(declared)
    product = _Product(
        Rows(data, 0, depth),
        Rows(packed, 0, WIDTH),
        depth,
        columns,
        Rows(result, 0, columns),
        Rows(start[0], 0, 0) if start else None,
    )
    rows: Expr = prod(lengths, start=tirx.IntImm("int64", 1))
    kind = "parallel"
    if None not in leading:
        rows = prod(length or 0 for length in leading)
        if rows * depth * columns < _SERIAL_MACS:
            kind = "serial"
    groups = _groups(rows)
    row_blocks = emit.greater(ceil_div(groups, _BLOCK_GROUPS), emit.lesser(groups, _ROW_TASKS))
    most_tiles = max(1, min(_BLOCK_TILES, max(_LEAST_TILES, ceil_div(tiles, _COLUMN_TASKS))))
    column_blocks = ceil_div(tiles, most_tiles)
    most_tiles = ceil_div(tiles, column_blocks)
    counts = _counts(rows, _MOST_ROWS)
    with emit.loop(row_blocks * column_blocks, kind) as task:
        block = emit.bind(task // column_blocks)
        first, end = (emit.bind(number * groups // row_blocks) for number in (block, block + 1))
        # The groups of all tasks differ by no more than a row.
        numbers = _Numbers()
        row = numbers.keep(first * rows // groups)
        row_count = numbers.keep(end * rows // groups - row)
        parts = _split(numbers, row_count, numbers.keep(end - first), counts)
        tile = emit.bind(task % column_blocks * most_tiles)
        product.block(row, parts, tile, emit.lesser(tiles - tile, most_tiles), _BLOCK_DEPTH)


@dataclass(frozen=True)
class Rows:
    """Where rows begin in a flat buffer, and how many elements lie from one to the next."""

    buffer: Buffer
    offset: Expr
    stride: Expr


def emit_product(
    data: Buffer,
    data_offset: Expr,
    row_stride: Expr,
    packed: Buffer,
    packed_offset: Expr,
    depth: int,
    columns: int,
    rows: Expr,
    max_rows: int,
    out: Buffer,
    out_offset: Expr,
    out_stride: Expr,
    start: Rows | None = None,
) -> None:
    """Emit a product as a part of another kernel, without parallel loops.

    Parameters
    ----------
    data, data_offset, row_stride
        The rows on the left: ``depth`` consecutive elements each.
    packed, packed_offset
        What :func:`pack` made of the weights on the right.
    depth, columns
        Shape of these.
    rows
        How many there are: a number, or an int64 expression, which may be 0.
    max_rows
        What ``rows`` cannot exceed.
    out, out_offset, out_stride
        Where the rows of the result go: exactly ``columns`` elements each. Not over the data.
    start
        Rows that are added to the result. They may be those of the result itself; with a stride
        of 0 they are a bias.
    """
    product = _Product(
        Rows(data, data_offset, row_stride),
        Rows(packed, packed_offset, WIDTH),
        depth,
        columns,
        Rows(out, out_offset, out_stride),
        start,
    )
    parts = _split(_Numbers(), rows, _groups(rows), _counts(rows, max_rows))
    # A single group would not come back to the weights in the first-level cache.
    most_depth = depth if max_rows <= _MOST_ROWS else _BLOCK_DEPTH
    product.block(0, parts, 0, ceil_div(columns, WIDTH), most_depth)


# --------------------------------------------------------------------------- groups of rows


@dataclass(frozen=True)
class _Part:
    """``number`` groups of ``rows`` rows each; ``begin`` rows of the block lie before them."""

    rows: int
    begin: Expr
    number: Expr


def _groups(rows: Expr) -> Expr:
    """Groups of at most six rows; one, to divide by, where there are no rows."""
    return emit.bind(emit.greater((rows + (_MOST_ROWS - 1)) // _MOST_ROWS, 1))


def _counts(rows: Expr, max_rows: int) -> list[int]:
    """Rows that groups may have if they differ by no more than one."""
    if not isinstance(rows, int):
        return list(range(1, min(max_rows, _MOST_ROWS) + 1))
    groups = _groups(rows)
    return sorted({rows // groups, ceil_div(rows, groups)} - {0})


def _split(numbers: _Numbers, rows: Expr, groups: Expr, counts: Sequence[int]) -> list[_Part]:
    """Cut rows into groups that differ by no more than a row, the larger ones first."""
    small, larger = numbers.keep(rows // groups), numbers.keep(rows % groups)
    if isinstance(rows, int):
        parts = [_Part(small + 1, 0, larger), _Part(small, larger * (small + 1), groups - larger)]
        return [part for part in parts if part.rows and part.number]
    none = emit.index(0)
    parts = []
    for size in counts:
        is_small, is_large = small == size, small + 1 == size
        begin = T.Select(is_small, larger * (size + 1), none)
        number = T.Select(is_small, groups - larger, T.Select(is_large, larger, none))
        parts.append(_Part(size, numbers.keep(begin), numbers.keep(number)))
    return parts


class _Numbers:
    """Computes numbers once, in memory: TVM's analysis takes minutes over nested quotients."""

    def __init__(self) -> None:
        self._memory = emit.allocate(16, "int64", registers=True)
        self._places = count()

    def keep(self, value: Expr) -> Expr:
        """Compute a number."""
        if isinstance(value, int):
            return value
        place = next(self._places)
        emit.store(self._memory, place, value, 1)
        return emit.bind(emit.load(self._memory, place, 1))


# --------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class _Product:
    """Emits the passes; ``packed`` has rows of the depth, tile after tile."""

    data: Rows
    packed: Rows
    depth: int
    columns: int
    out: Rows
    start: Rows | None

    def block(
        self, first_row: Expr, parts: Sequence[_Part], first_tile: Expr, tiles: Expr, most: int
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
                    sums = self._sum(row, part.rows, first_tile + tile, begin, depth)
                    if runs == 1:
                        self._finish(sums, row, part.rows, first_tile + tile, self.start)
                        continue
                    with T.If(turn == 0):
                        with T.Then():
                            self._finish(sums, row, part.rows, first_tile + tile, self.start)
                        with T.Else():
                            self._finish(sums, row, part.rows, first_tile + tile, self.out)

    def _sum(self, row: Expr, rows: int, tile: Expr, begin: Expr, depth: Expr) -> Buffer:
        """Add up a part of the depth for rows x 16 results."""
        chains = ceil_div(_CHAINS, rows * _VECTORS)
        size = rows * WIDTH
        sums = emit.allocate(chains * size, "float32", registers=True)
        for at in range(0, chains * size, _LANES):
            emit.store(sums, at, emit.constant(0, "float32", _LANES), _LANES)
        left = emit.bind(self.data.offset + row * self.data.stride + begin)
        right = emit.bind(self.packed.offset + (tile * self.depth + begin) * WIDTH)

        def step(place: Expr, chain: int) -> None:
            weights = [
                emit.bind(emit.load(self.packed.buffer, right + place * WIDTH + lane, _LANES))
                for lane in range(0, WIDTH, _LANES)
            ]
            for number in range(rows):
                value = emit.load(self.data.buffer, left + number * self.data.stride + place, 1)
                value = emit.bind(emit.broadcast(value, _LANES))
                for vector, weight in enumerate(weights):
                    at = chain * size + number * WIDTH + vector * _LANES
                    total = _multiply_add(value, weight, emit.load(sums, at, _LANES))
                    emit.store(sums, at, total, _LANES)

        turns = emit.bind(depth // chains)
        with emit.loop(turns) as turn:
            for chain in range(chains):
                step(turn * chains + chain, chain)
        if chains > 1:
            with emit.loop(depth - turns * chains) as rest:
                step(turns * chains + rest, 0)
        for at in range(0, size, _LANES):
            total = emit.load(sums, at, _LANES)
            for chain in range(1, chains):
                total = total + emit.load(sums, chain * size + at, _LANES)
            emit.store(sums, at, total, _LANES)
        return sums

    def _finish(self, sums: Buffer, row: Expr, rows: int, tile: Expr, start: Rows | None) -> None:
        """Write the columns that exist."""

        def write(source: Buffer, number: int, place: Expr, lanes: int) -> None:
            value = emit.load(source, number * WIDTH + place, lanes)
            column = tile * WIDTH + place
            if start is not None:
                begin = start.offset + (row + number) * start.stride
                value = value + emit.load(start.buffer, begin + column, lanes)
            target = self.out.offset + (row + number) * self.out.stride
            emit.store(self.out.buffer, target + column, value, lanes)

        def whole() -> None:
            for number in range(rows):
                for place in range(0, WIDTH, _LANES):
                    write(sums, number, place, _LANES)

        def partial() -> None:
            # Registers have no addresses: what is picked by a loop lies in memory.
            memory = emit.allocate(rows * WIDTH, "float32")
            for at in range(0, rows * WIDTH, _LANES):
                emit.store(memory, at, emit.load(sums, at, _LANES), _LANES)
            for number in range(rows):
                with emit.loop(self.columns % WIDTH) as place:
                    write(memory, number, place, 1)

        if self.columns % WIDTH == 0:
            whole()
            return
        with T.If(emit.index(tile) < self.columns // WIDTH):
            with T.Then():
                whole()
            with T.Else():
                partial()


def _multiply_add(left: Expr, right: Expr, total: Expr) -> Expr:
    """``left * right + total``, as one instruction where the processor has it."""
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.fmuladd"),
        left,
        right,
        total,
        dtype=f"float32x{_LANES}",
    )
