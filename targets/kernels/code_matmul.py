"""Products of codes with constant weights, as a part of another kernel.

Two rows of the depth make one step: the processor multiplies pairs of int16 and adds both products
to an int32. Weights of up to 8 bits lie in memory as int8, because few rows need all of them from
the second- or third-level cache once for each product; they get their 16 bits in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Buffer, Expr, ceil_div, round_up
from bitwright.targets.kernels.host import Isa
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

__all__ = ["emit_product", "pack", "packed_shape"]


def pack(weights: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    """Lay out weights as :func:`emit_product` reads them.

    Parameters
    ----------
    weights
        int8 or int16 [*batch, depth, columns], their zero points subtracted.

    Returns
    -------
    numpy.ndarray
        Of the same type, [*batch, ceil(columns / 16), ceil(depth / 2), 16, 2]; what is missing is
        zero.
    """
    *batch, depth, columns = weights.shape
    even = np.zeros((*batch, round_up(depth, 2), columns), weights.dtype)
    even[..., :depth, :] = weights
    tiles = in_tiles(even)
    pairs = tiles.reshape(*tiles.shape[:-2], -1, 2, WIDTH)
    return np.ascontiguousarray(pairs.swapaxes(-1, -2))


def packed_shape(depth: int, columns: int) -> tuple[int, ...]:
    """Shape of packed weights behind the axes of the batch."""
    return ceil_div(columns, WIDTH), ceil_div(depth, 2), WIDTH, 2


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
    isa: Isa,
) -> None:
    """Emit a product of codes, without parallel loops.

    Parameters
    ----------
    data, data_offset, row_stride
        The rows on the left: ``depth`` consecutive int16 each, and one more, of any value, where
        that is odd.
    packed, packed_offset
        What :func:`pack` made of the weights on the right.
    depth, columns
        Shape of these.
    rows
        How many there are: a number, or an int64 expression, which may be 0.
    max_rows
        What ``rows`` cannot exceed.
    out, out_offset, out_stride
        Where the rows of the result go: exactly ``columns`` int32 or int64 each. They wrap around.
    isa
        The instruction set.
    """
    bits: Literal[32, 64] = 64 if out.dtype == "int64" else 32
    pairs = ceil_div(depth, 2)
    product = _Product(
        Rows(data, data_offset, row_stride),
        Rows(packed, packed_offset, 2 * WIDTH),
        pairs,
        columns,
        Rows(out, out_offset, out_stride),
        None,
        isa,
        bits,
    )
    # Two registers hold a vector of weights and its products, and two a pair of codes and a spare.
    most = max(1, (isa.registers - 4) * isa.lanes // (WIDTH * bits // 32))
    parts = split(Numbers(), rows, group_count(rows, most), group_sizes(rows, max_rows, most))
    product.block(0, parts, 0, ceil_div(columns, WIDTH), pairs)


@dataclass(frozen=True)
class _Product(RowProduct):
    """A product of codes; the depth counts pairs."""

    isa: Isa
    bits: Literal[32, 64]

    @property
    def lanes(self) -> int:
        """Length of a vector of sums."""
        return self.isa.lanes

    def sums(self, row: Expr, rows: int, tile: Expr, begin: Expr, depth: Expr) -> Buffer:
        """Add up all of the depth for rows x 16 results."""
        lanes, dtype = self.lanes, f"int{self.bits}"
        places = range(0, rows * WIDTH, lanes)
        sums = emit.allocate(rows * WIDTH, dtype, registers=True)
        for at in places:
            emit.store(sums, at, emit.start(self.bits, self.depth, lanes), lanes)
        left = emit.bind(self.data.offset + row * self.data.stride + begin * 2)
        right = emit.bind(self.packed.offset + (tile * self.depth + begin) * (2 * WIDTH))
        with emit.loop(depth) as pair:
            weights = [
                emit.bind(self._weights(right + pair * (2 * WIDTH) + 2 * column))
                for column in range(0, WIDTH, lanes)
            ]
            for number in range(rows):
                place = left + number * self.data.stride + pair * 2
                codes = emit.reinterpret(emit.load(self.data.buffer, place, 2), "int32", 1)
                codes = emit.bind(emit.broadcast(codes, lanes))
                for vector, weight in enumerate(weights):
                    at = number * WIDTH + vector * lanes
                    total = emit.load(sums, at, lanes)
                    total = emit.dot(self.isa, self.bits, total, codes, weight)
                    emit.store(sums, at, total, lanes)
        for at in places:  # they hold the negative
            total = emit.load(sums, at, lanes)
            zero = emit.constant(0, dtype, lanes)
            emit.store(sums, at, emit.wrapping("sub", zero, total, lanes, self.bits), lanes)
        return sums

    def _weights(self, place: Expr) -> Expr:
        """Pairs of weights of ``lanes`` columns, as int32."""
        pairs = emit.load(self.packed.buffer, place, 2 * self.lanes)
        return emit.reinterpret(emit.cast(pairs, "int16", 2 * self.lanes), "int32", self.lanes)
