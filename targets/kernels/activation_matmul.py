"""Products of two activations, as in attention.

A task computes all rows of one matrix of the batch for some tiles of columns: it lays these out as
pairs of codes in scratch memory and goes on as for constant weights.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Buffer, Expr
from bitwright.targets.kernels.host import Isa
from bitwright.targets.kernels.operand import centred
from bitwright.targets.kernels.spec import Accumulators, ActivationMatmul
from bitwright.targets.kernels.tiles import TileProduct, choose_tiling

__all__ = ["kernel"]


def kernel(spec: ActivationMatmul, isa: Isa, name: str = "activation_matmul") -> Any:
    """Build the kernel of a product of two activations.

    Parameters
    ----------
    spec
        The operator.
    isa
        The instruction set.
    name
        Symbol of the function.

    Returns
    -------
    PrimFunc
        ``(left [*batch, rows, depth], right [*batch, depth, columns], scale float32 [1], result
        [*batch, rows, columns])``, without the scale where the output is the accumulators.
    """
    return emit.primitive_function(name, lambda: _Kernel(spec, isa).emit())


class _Kernel:
    """Emits the statements of one product."""

    def __init__(self, spec: ActivationMatmul, isa: Isa) -> None:
        self.spec = spec
        self.isa = isa
        self.lanes = isa.lanes
        self.tiling = choose_tiling(
            spec.left[-2], spec.depth, spec.columns, spec.accumulator_bits, isa
        )
        self.product = TileProduct(
            self.tiling, spec.depth, spec.columns, spec.accumulator_bits, spec.left_data, isa
        )

    def emit(self) -> None:
        """Emit parameters and body."""
        spec, tiling = self.spec, self.tiling
        batch = [
            tirx.Var(f"length_{axis}", "int64") if length is None else emit.index(length)
            for axis, length in enumerate(spec.batch)
        ]
        left_batch = [_own(length, own) for length, own in zip(batch, spec.left, strict=False)]
        right_batch = [_own(length, own) for length, own in zip(batch, spec.right, strict=False)]
        all_rows = spec.left[-2]
        all_rows = tirx.Var("rows", "int64") if all_rows is None else emit.index(all_rows)
        declared: list[tuple[str, tuple[Expr, ...], str]] = [
            ("left", (*left_batch, all_rows, spec.depth), spec.left_data.dtype),
            ("right", (*right_batch, spec.depth, spec.columns), spec.right_data.dtype),
        ]
        if not isinstance(spec.output, Accumulators):
            declared.append(("scale", (1,), "float32"))
        declared.append(("result", (*batch, all_rows, spec.columns), emit.output_dtype(spec)))
        left, right, *scales, result = emit.parameters(declared)

        matrices = prod(batch, start=tirx.IntImm("int64", 1))
        with emit.loop(matrices * tiling.column_blocks, "parallel") as task:
            matrix = emit.bind(task // tiling.column_blocks)
            first_tile = emit.bind(task % tiling.column_blocks * tiling.tiles)
            tiles = emit.bind(emit.lesser(tiling.all_tiles - first_tile, tiling.tiles))
            columns = emit.allocate(tiling.tiles * tiling.pairs * tiling.width, "int32")
            column_sums = emit.allocate(tiling.tiles * tiling.width, "int32")
            source = self._number(matrix, batch, spec.right) * (spec.depth * spec.columns)
            self._copy_columns(right, emit.bind(source), columns, column_sums, first_tile, tiles)

            codes, sums = self.product.allocate()
            row_sums = emit.allocate(tiling.block_rows, "int32")
            source = emit.bind(self._number(matrix, batch, spec.left) * all_rows)
            with emit.loop((all_rows + (tiling.block_rows - 1)) // tiling.block_rows) as block:
                first_row = emit.bind(block * tiling.block_rows)
                rows = emit.bind(emit.lesser(all_rows - first_row, tiling.block_rows))
                with emit.loop(rows) as row:
                    start = (source + first_row + row) * spec.depth
                    self.product.copy_row(left, start, codes, row)
                    if spec.right_data.correction:
                        self._add_row(codes, row, row_sums)
                self.product.accumulate(
                    codes, columns, emit.index(0), tiling.pairs * tiling.width, sums, rows, tiles
                )
                with emit.loop(rows) as row, emit.loop(tiles) as tile:
                    column = emit.bind((first_tile + tile) * tiling.width)
                    target = (matrix * all_rows + first_row + row) * spec.columns + column
                    target = emit.bind(target)

                    def finish(
                        total: Expr,
                        place: Expr,
                        lanes: int,
                        row: Expr = row,
                        tile: Expr = tile,
                        target: Expr = target,
                    ) -> None:
                        correction = self._correction(
                            row_sums, row, column_sums, tile * tiling.width + place, lanes
                        )
                        scale = emit.broadcast(scales[0][0], lanes) if scales else None
                        terms = emit.Terms(correction, None, None, scale)
                        values = emit.finish(spec, self.isa, total, terms, lanes)
                        emit.store(result, target + place, values, lanes)

                    self.product.finish(sums, row, tile, column, finish)

    @staticmethod
    def _number(matrix: Expr, batch: list[Expr], own: tuple[int | None, ...]) -> Expr:
        """Find which matrix of an operand, whose batch may be broadcast, belongs to one of all."""
        number, step = emit.index(0), emit.index(1)
        for axis in reversed(range(len(batch))):
            if own[axis] != 1:
                number = number + matrix % batch[axis] * step
                step = step * batch[axis]
            matrix = matrix // batch[axis]
        return number

    def _copy_columns(
        self,
        right: Buffer,
        source: Expr,
        columns: Buffer,
        column_sums: Buffer,
        first_tile: Expr,
        tiles: Expr,
    ) -> None:
        """Lay out tiles of columns: centred, two rows in an element, zeros past the end."""
        spec, tiling, lanes = self.spec, self.tiling, self.lanes
        operand = spec.right_data
        zero = tirx.const(0, "int32")
        if spec.left_data.correction:
            with emit.loop(tiles * tiling.width) as place:
                emit.store(column_sums, place, zero, 1)

        def copy(pair: Expr, tile: Expr, place: Expr, count: int) -> None:
            column = (first_tile + tile) * tiling.width + place
            # The left operand's half pair behind an odd row is 0: any code may meet it, but only
            # a 0 leaves the sums as they are.
            start = source + pair * 2 * spec.columns + column
            low = emit.cast(centred(right, start, operand, count), "int32", count)
            last = emit.index(pair * 2 + 1) >= spec.depth
            below = T.if_then_else(last, start, start + spec.columns)
            high = emit.cast(centred(right, below, operand, count), "int32", count)
            if spec.depth % 2:
                high = high * emit.broadcast(T.if_then_else(last, zero, zero + 1), count)
            low, high = emit.bind(low), emit.bind(high)
            target = (tile * tiling.pairs + pair) * tiling.width + place
            emit.store(columns, target, emit.join(low, high, count), count)
            if spec.left_data.correction:
                at = tile * tiling.width + place
                emit.store(column_sums, at, emit.load(column_sums, at, count) + low + high, count)

        with emit.loop(tiling.pairs) as pair, emit.loop(tiles) as tile:
            left_over = spec.columns - (first_tile + tile) * tiling.width
            present = emit.bind(emit.lesser(left_over, tiling.width))
            with emit.loop(present // lanes) as vector:
                copy(pair, tile, vector * lanes, lanes)
            if spec.columns % lanes:
                with emit.loop(present % lanes) as rest:
                    copy(pair, tile, present - 1 - rest, 1)

    def _add_row(self, codes: Buffer, row: Expr, row_sums: Buffer) -> None:
        """Add up a row's codes."""
        total = emit.allocate(1, "int32", registers=True)
        emit.store(total, 0, tirx.const(0, "int32"), 1)
        with emit.loop(self.spec.depth) as place:
            code = emit.load(codes, row * self.product.row_length + place, 1)
            emit.store(total, 0, total[0] + emit.cast(code, "int32", 1), 1)
        emit.store(row_sums, row, total[0], 1)

    def _correction(
        self, row_sums: Buffer, row: Expr, column_sums: Buffer, column: Expr, lanes: int
    ) -> Expr | None:
        """What sums lack because codes had their offsets subtracted instead of zero points.

        With x = a + c and y = b + d for the centred codes, the sum of x y is that of a b, plus c
        times that of b, plus d times that of a, plus c d for each term.
        """
        spec = self.spec
        c, d = spec.left_data.correction, spec.right_data.correction
        if not c and not d:
            return None
        total = emit.constant(spec.depth * c * d, "int64", lanes)
        if c:
            sums = emit.cast(emit.load(column_sums, column, lanes), "int64", lanes)
            total = total + sums * emit.constant(c, "int64", lanes)
        if d:
            sums = emit.cast(emit.load(row_sums, row, 1), "int64", 1) * emit.index(d)
            total = total + emit.broadcast(sums, lanes)
        return emit.cast(total, f"int{spec.accumulator_bits}", lanes)


def _own(length: Expr, own: int | None) -> Expr:
    """Length of an operand's axis, of which every matrix of the batch may use the same."""
    return emit.index(1) if own == 1 else length
