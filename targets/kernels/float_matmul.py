"""Products of float32 activations with constant float32 weights.

Weights lie as tiles of 16 columns. A part of a tile, as much as the first-level cache holds, meets
the rows of a task in groups of up to six. The sums of a group stay in registers meanwhile: twelve
accumulators of eight lanes, two vectors of weights and one of data are what AVX2 has room for.
With fewer rows there are several accumulators for each sum, because a multiply-add takes four
cycles and two can begin in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Buffer, Expr, ceil_div
from bitwright.targets.kernels.row_product import (
    WIDTH,
    Numbers,
    RowProduct,
    Rows,
    group_count,
    group_sizes,
    in_tiles,
    split,
)

__all__ = ["WIDTH", "Rows", "emit_product", "kernel", "pack", "packed_shape"]

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
    return in_tiles(np.asarray(weights, np.float32))


def packed_shape(depth: int, columns: int) -> tuple[int, ...]:
    """Shape of packed weights behind the axes of the batch."""
    return ceil_div(columns, WIDTH), depth, WIDTH


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
    groups = group_count(rows, _MOST_ROWS)
    row_blocks = emit.greater(ceil_div(groups, _BLOCK_GROUPS), emit.lesser(groups, _ROW_TASKS))
    most_tiles = max(1, min(_BLOCK_TILES, max(_LEAST_TILES, ceil_div(tiles, _COLUMN_TASKS))))
    column_blocks = ceil_div(tiles, most_tiles)
    most_tiles = ceil_div(tiles, column_blocks)
    counts = group_sizes(rows, _MOST_ROWS, _MOST_ROWS)
    with emit.loop(row_blocks * column_blocks, kind) as task:
        block = emit.bind(task // column_blocks)
        first, end = (emit.bind(number * groups // row_blocks) for number in (block, block + 1))
        # The groups of all tasks differ by no more than a row.
        numbers = Numbers()
        row = numbers.keep(first * rows // groups)
        row_count = numbers.keep(end * rows // groups - row)
        parts = split(numbers, row_count, numbers.keep(end - first), counts)
        tile = emit.bind(task % column_blocks * most_tiles)
        product.block(row, parts, tile, emit.lesser(tiles - tile, most_tiles), _BLOCK_DEPTH)


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
    groups = group_count(rows, _MOST_ROWS)
    parts = split(Numbers(), rows, groups, group_sizes(rows, max_rows, _MOST_ROWS))
    # A single group would not come back to the weights in the first-level cache.
    most_depth = depth if max_rows <= _MOST_ROWS else _BLOCK_DEPTH
    product.block(0, parts, 0, ceil_div(columns, WIDTH), most_depth)


# --------------------------------------------------------------------------- arithmetic


class _Product(RowProduct):
    """A product of float32."""

    @property
    def lanes(self) -> int:
        """Length of a vector of sums."""
        return _LANES

    def sums(self, row: Expr, rows: int, tile: Expr, begin: Expr, depth: Expr) -> Buffer:
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


def _multiply_add(left: Expr, right: Expr, total: Expr) -> Expr:
    """``left * right + total``, as one instruction where the processor has it."""
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.fmuladd"),
        left,
        right,
        total,
        dtype=f"float32x{_LANES}",
    )
