"""Tiles of a matrix product, vectorised over columns: what the kernels of products share.

Rows of the left matrix lie in scratch memory as int16 codes, the right one as tiles of columns in
which each int32 holds the codes of two rows. A tile of sums of rows x columns stays in registers
while a part of the depth is added up, so long that the right matrix's part of it stays in the
first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Buffer, Expr, ceil_div, round_up
from bitwright.targets.kernels.host import Isa
from bitwright.targets.kernels.operand import centred
from bitwright.targets.kernels.spec import Operand

__all__ = ["TileProduct", "Tiling", "choose_tiling"]

_TILE_BYTES = 24 * 1024  # of a tile's columns: most of a first-level cache of 32 KiB
_ROW_BYTES = 128 * 1024  # of a task's rows: part of a second-level cache of 512 KiB
_SUM_BYTES = 128 * 1024  # of a task's sums: the same
_MOST_ROWS = 96
_TASK_MACS = 256 * 1024  # least work of a task where rows are many
_ROW_MACS = 48 * 1024  # least work of a task for each of its rows
_COLUMN_TASKS = 8


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    ``rows`` x ``vectors`` accumulators are in registers at once: a tile of ``width`` columns. A
    task has ``block_rows`` rows and ``tiles`` tiles and adds up ``depth`` pairs in a run.
    """

    pairs: int
    rows: int
    vectors: int
    width: int
    block_rows: int
    all_tiles: int
    tiles: int
    depth: int

    @property
    def column_blocks(self) -> int:
        """Tasks for each block of rows."""
        return ceil_div(self.all_tiles, self.tiles)

    @property
    def depth_blocks(self) -> int:
        """Runs for each tile."""
        return ceil_div(self.pairs, self.depth)


@cache
def choose_tiling(
    rows: int | None, depth: int, columns: int, accumulator_bits: int, isa: Isa
) -> Tiling:
    """Choose the register tile with the least padding and cost; the rest follows from caches.

    ``rows`` is None where their number is not known.
    """
    best = min(
        _register_tiles(rows, accumulator_bits, isa),
        # Of equal costs, the larger tile: fewer loops.
        key=lambda tile: (_cost(rows, columns, tile, isa.lanes), -tile[0] * tile[1]),
    )
    tile_rows, vectors = best
    pairs, width = ceil_div(depth, 2), vectors * isa.lanes
    tiles = ceil_div(columns, width)
    least = ceil_div(_ROW_MACS, depth * width)
    task_tiles = min(tiles, max(least, ceil_div(tiles, _COLUMN_TASKS)))
    most_rows = min(_MOST_ROWS, _ROW_BYTES // (4 * pairs))
    if task_tiles == tiles:  # only rows make more than one task
        most_rows = min(most_rows, ceil_div(_TASK_MACS, depth * columns))
    block_rows = round_up(max(most_rows, 1), tile_rows)
    if rows is not None:
        block_rows = min(block_rows, max(rows, 1))
    most_tiles = max(1, _SUM_BYTES // (block_rows * width * accumulator_bits // 8))
    return Tiling(
        pairs=pairs,
        rows=tile_rows,
        vectors=vectors,
        width=width,
        block_rows=block_rows,
        all_tiles=tiles,
        tiles=min(task_tiles, most_tiles),
        depth=ceil_div(pairs, ceil_div(pairs * width * 4, _TILE_BYTES)),
    )


def _register_tiles(rows: int | None, accumulator_bits: int, isa: Isa) -> list[tuple[int, int]]:
    """Rows and vectors of the tiles that fit the registers, and not more rows than there are."""
    size = accumulator_bits // 32
    return [
        (count, vectors)
        for vectors in (1, 2, 3, 4, 6)
        for count in range(1, 9)
        if size * count * vectors + vectors + 2 <= isa.registers and not (rows and count > rows)
    ]


def _cost(rows: int | None, columns: int, tile: tuple[int, int], lanes: int) -> float:
    """Estimate the cycles of a pair of the depth for all rows, or for one of very many."""
    count, vectors = tile
    products, loads = count * vectors, count + vectors
    tiles = ceil_div(columns, vectors * lanes)
    full = tiles * max(products / 2, loads / 2, (2 * products + loads) / 6, 1.5)
    if rows is None:
        return full / count
    return full * (rows // count) + tiles * max(vectors, 1.5) * (rows % count)


class TileProduct:
    """Emits the passes over a block of rows and some tiles of columns."""

    def __init__(
        self,
        tiling: Tiling,
        depth: int,
        columns: int,
        accumulator_bits: Literal[32, 64],
        data: Operand,
        isa: Isa,
    ) -> None:
        self.tiling = tiling
        self.isa = isa
        self.depth = depth
        self.columns = columns
        self.bits = accumulator_bits
        self.data = data
        #: Elements of a row in scratch memory.
        self.row_length = round_up(depth, 2)

    def allocate(self) -> tuple[Buffer, Buffer]:
        """Allocate scratch memory for a task: the codes of its rows, and its sums."""
        tiling = self.tiling
        codes = emit.allocate(tiling.block_rows * self.row_length, "int16")
        size = tiling.tiles * tiling.block_rows * tiling.width
        return codes, emit.allocate(size, f"int{self.bits}")

    def copy_row(self, data: Buffer, source: Expr, codes: Buffer, row: Expr) -> None:
        """Copy a row, centred; the second half of an odd row's last pair becomes 0."""
        source, target = emit.bind(source), emit.bind(row * self.row_length)
        done = self.depth // 16 * 16
        with emit.loop(done // 16) as block:
            values = centred(data, source + block * 16, self.data, 16)
            emit.store(codes, target + block * 16, values, 16)
        with emit.loop(self.depth - done) as rest:
            value = centred(data, source + done + rest, self.data, 1)
            emit.store(codes, target + done + rest, value, 1)
        if self.depth % 2:
            emit.store(codes, target + self.depth, tirx.const(0, "int16"), 1)

    def accumulate(
        self,
        codes: Buffer,
        right: Buffer,
        first: Expr,
        tile_length: int,
        sums: Buffer,
        rows: Expr,
        tiles: Expr,
    ) -> None:
        """Add up all products of a task.

        Parameters
        ----------
        codes
            Codes of the rows.
        right
            Pairs of codes of the columns.
        first, tile_length
            Where the first tile begins in ``right``, and the elements from one to the next.
        sums
            What is written.
        rows, tiles
            How many there are.
        """
        tiling = self.tiling
        with emit.loop(tiling.depth_blocks) as block, emit.loop(tiles) as tile:
            start = emit.bind(block * tiling.depth)
            depth = tiling.depth
            if tiling.pairs % tiling.depth:
                depth = emit.bind(emit.lesser(tiling.pairs - start, tiling.depth))
            pairs = emit.bind(first + tile * tile_length + start * tiling.width)

            def register_tile(row: Expr, count: int) -> None:
                place = emit.bind((tile * tiling.block_rows + row) * tiling.width)
                source = emit.bind(row * self.row_length + start * 2)
                self._register_tile(codes, source, right, pairs, sums, place, depth, block, count)

            if tiling.rows > 1:
                with emit.loop(rows // tiling.rows) as group:
                    register_tile(group * tiling.rows, tiling.rows)
            with emit.loop(rows % tiling.rows if tiling.rows > 1 else rows) as rest:
                register_tile(rows - 1 - rest, 1)

    def _register_tile(
        self,
        codes: Buffer,
        source: Expr,
        right: Buffer,
        pairs: Expr,
        sums: Buffer,
        place: Expr,
        depth: Expr,
        block: Expr,
        rows: int,
    ) -> None:
        """Add the products of a part of the depth to the sums of a tile's rows."""
        tiling, lanes, dtype = self.tiling, self.isa.lanes, f"int{self.bits}"
        numbers = range(0, rows * tiling.vectors * lanes, lanes)
        registers = emit.allocate(rows * tiling.width, dtype, registers=True)

        def begin() -> None:
            for number in numbers:
                emit.store(registers, number, emit.start(self.bits, tiling.pairs, lanes), lanes)

        if tiling.depth_blocks == 1:
            begin()
        else:
            with T.If(emit.index(block) == 0):
                with T.Then():
                    begin()
                with T.Else():
                    for number in numbers:
                        emit.store(registers, number, emit.load(sums, place + number, lanes), lanes)
        with emit.loop(depth) as pair:
            reads = [
                emit.load(right, pairs + pair * tiling.width + vector * lanes, lanes)
                for vector in range(tiling.vectors)
            ]
            vectors = [emit.bind(read) for read in reads]
            for row in range(rows):
                both = emit.load(codes, source + row * self.row_length + pair * 2, 2)
                code = emit.bind(emit.broadcast(emit.reinterpret(both, "int32", 1), lanes))
                for vector, columns in enumerate(vectors):
                    number = (row * tiling.vectors + vector) * lanes
                    total = emit.load(registers, number, lanes)
                    emit.store(
                        registers,
                        number,
                        emit.dot(self.isa, self.bits, total, code, columns),
                        lanes,
                    )
        for number in numbers:
            emit.store(sums, place + number, emit.load(registers, number, lanes), lanes)

    def finish(
        self,
        sums: Buffer,
        row: Expr,
        tile: Expr,
        column: Expr,
        element: Callable[[Expr, Expr, int], None],
    ) -> None:
        """Hand out the sums of a row of a tile.

        Parameters
        ----------
        sums
            What :meth:`accumulate` wrote.
        row, tile
            Which ones, counted in the task.
        column
            The tile's first column, counted in the matrix.
        element
            Takes sums as a vector, the place of the first in the tile, and their number.
        """
        tiling, lanes = self.tiling, self.isa.lanes
        source = emit.bind((tile * tiling.block_rows + row) * tiling.width)

        def hand_out(place: Expr, count: int) -> None:
            element(emit.load(sums, source + place, count), place, count)

        if self.columns % tiling.width == 0:
            with emit.loop(tiling.vectors) as vector:
                hand_out(vector * lanes, lanes)
            return
        present = emit.bind(emit.lesser(self.columns - column, tiling.width))
        with emit.loop(present // lanes) as vector:
            hand_out(vector * lanes, lanes)
        if self.columns % lanes:
            with emit.loop(present % lanes) as rest:
                hand_out(present - 1 - rest, 1)
