"""Products of codes with constant weights, as a part of another kernel.

Two rows of the depth make one step: the processor multiplies pairs of int16 and adds both products
to an int32. Weights of up to 8 bits lie in memory as int8, because few rows need all of them from
the second- or third-level cache once for each product; they get their 16 bits in registers.

Sums of 64 bits are made of sums of 32, of as many products of 16 by 8 bits as fit. Weights of 16
bits are cut into halves for them, the upper one signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

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

_WIDE_PAIRS = 127  # 127 * 2 * 2^15 * 255 < 2^31: a half is less than 2^8


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
    pairs = ceil_div(depth, 2)
    product = _Product(
        Rows(data, data_offset, row_stride),
        Rows(packed, packed_offset, 2 * WIDTH),
        pairs,
        columns,
        Rows(out, out_offset, out_stride),
        None,
        isa,
        wide=out.dtype == "int64",
    )
    # What sums leave: weights, their products, a pair of codes.
    registers = (isa.registers - 4) * isa.lanes // WIDTH
    most = max(1, registers // 3 if product.halves == 2 else registers)
    parts = split(Numbers(), rows, group_count(rows, most), group_sizes(rows, max_rows, most))
    product.block(0, parts, 0, ceil_div(columns, WIDTH), _WIDE_PAIRS if product.wide else pairs)


@dataclass(frozen=True)
class _Product(RowProduct):
    """A product of codes; the depth counts pairs."""

    isa: Isa
    wide: bool

    @property
    def lanes(self) -> int:
        """Length of a vector of sums."""
        return self.isa.lanes

    @property
    def halves(self) -> int:
        """Parts that weights are cut into."""
        return 2 if self.wide and self.packed.buffer.dtype == "int16" else 1

    def sums(self, row: Expr, rows: int, tile: Expr, begin: Expr, depth: Expr) -> Buffer:
        """Add up a part of the depth for rows x 16 results."""
        lanes, size = self.lanes, self.halves * rows * WIDTH
        sums = emit.allocate(size, "int32", registers=True)
        for at in range(0, size, lanes):
            emit.store(sums, at, emit.constant(0, "int32", lanes), lanes)
        left = emit.bind(self.data.offset + row * self.data.stride + begin * 2)
        right = emit.bind(self.packed.offset + (tile * self.depth + begin) * (2 * WIDTH))
        with emit.loop(depth) as pair:
            weights = [
                self._weights(right + pair * (2 * WIDTH) + 2 * column)
                for column in range(0, WIDTH, lanes)
            ]
            for number in range(rows):
                place = left + number * self.data.stride + pair * 2
                codes = emit.reinterpret(emit.load(self.data.buffer, place, 2), "int32", 1)
                codes = emit.bind(emit.broadcast(codes, lanes))
                for vector, parts in enumerate(weights):
                    for half, weight in enumerate(parts):
                        at = (number * WIDTH + vector * lanes) * self.halves + half * lanes
                        total = emit.load(sums, at, lanes)
                        emit.store(sums, at, emit.dot(self.isa, 32, total, codes, weight), lanes)
        return sums

    def total(self, sums: Buffer, at: int) -> Expr:
        """A vector of results; accumulators hold the negative, see :func:`emit.dot`."""
        lanes, dtype = self.lanes, "int64" if self.wide else "int32"
        places = (at * self.halves + half * lanes for half in range(self.halves))
        parts = [emit.cast(emit.load(sums, place, lanes), dtype, lanes) for place in places]
        total = parts[0]
        for lower in parts[1:]:
            total = total * emit.constant(2**8, dtype, lanes) + lower
        zero = emit.constant(0, dtype, lanes)
        return emit.wrapping("sub", zero, total, lanes, 64 if self.wide else 32)

    def _weights(self, place: Expr) -> list[Expr]:
        """Pairs of weights of ``lanes`` columns, as int32; or of their upper and lower halves."""
        lanes = 2 * self.lanes
        pairs = emit.bind(emit.cast(emit.load(self.packed.buffer, place, lanes), "int16", lanes))
        parts = [pairs]
        if self.halves == 2:
            upper = T.shift_right(pairs, emit.constant(8, "int16", lanes))
            parts = [upper, T.bitwise_and(pairs, emit.constant(2**8 - 1, "int16", lanes))]
        return [emit.bind(emit.reinterpret(part, "int32", self.lanes)) for part in parts]
