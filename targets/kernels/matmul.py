"""Products of activations with constant weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels import emit
from bitwright.targets.kernels.emit import Expr, ceil_div
from bitwright.targets.kernels.host import Isa
from bitwright.targets.kernels.spec import Matmul, WeightLayout
from bitwright.targets.kernels.tiles import TileProduct, Tiling, choose_tiling

__all__ = ["kernel", "kernel_as", "layout", "pack", "pack_as", "unpack", "unpack_as"]


def _tiling(spec: Matmul, isa: Isa) -> Tiling:
    rows = None
    if None not in spec.leading:
        rows = prod(length or 0 for length in spec.leading)
    return choose_tiling(rows, spec.depth, spec.columns, spec.accumulator_bits, isa)


# --------------------------------------------------------------------------- weights


def layout(spec: Matmul, isa: Isa) -> WeightLayout:
    """Shape of the weights as the kernel reads them.

    [column tiles, pairs, columns of a tile]; a row more of sums where zero points are corrected
    afterwards.
    """
    tiling = _tiling(spec, isa)
    rows = tiling.pairs + (1 if spec.data.correction else 0)
    return WeightLayout((tiling.all_tiles, rows, tiling.width))


def pack(spec: Matmul, isa: Isa, name: str = "pack_matmul") -> Any:
    """Build the function that lays out weights.

    Parameters
    ----------
    spec, isa
        The kernel's.
    name
        Symbol of the function.

    Returns
    -------
    PrimFunc
        ``(weights: spec.weight [depth, columns], packed: int32 [*layout.shape])``
    """
    return pack_as(spec, isa, name, spec.weight_shape, (spec.columns, 1))


def pack_as(
    spec: Matmul, isa: Isa, name: str, shape: Sequence[int], strides: tuple[int, int]
) -> Any:
    """Build :func:`pack` for weights of another shape.

    Parameters
    ----------
    spec, isa
        The kernel's.
    name
        Symbol of the function.
    shape
        Shape of the weights.
    strides
        Elements from a row of the product's weights to the next, and from a column.

    Returns
    -------
    PrimFunc
        ``(weights: spec.weight [*shape], packed: int32 [*layout.shape])``
    """
    pairs = ceil_div(spec.depth, 2)
    tiles, rows, width = packed_shape = layout(spec, isa).shape
    zero = tirx.const(0, "int32")

    def body() -> None:
        weights, packed = emit.parameters(
            [("weights", shape, spec.weight), ("packed", packed_shape, "int32")]
        )
        with emit.loop(tiles, "parallel") as tile:
            first = emit.bind(tile * (rows * width))
            sums = emit.bind(first + pairs * width)
            if spec.data.correction:
                with emit.loop(width) as place:
                    emit.store(packed, sums + place, zero, 1)
            with emit.loop(pairs) as pair, emit.loop(width) as place:
                column = emit.bind(tile * width + place)
                halves = []
                for half in range(2):
                    row = emit.index(pair * 2 + half)
                    inside = T.And(column < spec.columns, row < spec.depth)
                    code = emit.load(weights, row * strides[0] + column * strides[1], 1)
                    value = T.if_then_else(inside, tirx.Cast("int32", code), zero)
                    halves.append(emit.bind(value))
                low, high = halves
                emit.store(packed, first + pair * width + place, emit.join(low, high, 1), 1)
                if spec.data.correction:
                    total = emit.load(packed, sums + place, 1) + low + high
                    emit.store(packed, sums + place, total, 1)

    return emit.primitive_function(name, body)


def unpack(spec: Matmul, isa: Isa, name: str = "unpack_matmul") -> Any:
    """Build the inverse of :func:`pack`.

    Parameters
    ----------
    spec, isa
        The kernel's.
    name
        Symbol of the function.

    Returns
    -------
    PrimFunc
        ``(packed: int32 [*layout.shape], weights: spec.weight [depth, columns])``
    """
    return unpack_as(spec, isa, name, spec.weight_shape, (spec.columns, 1))


def unpack_as(
    spec: Matmul, isa: Isa, name: str, shape: Sequence[int], strides: tuple[int, int]
) -> Any:
    """Build the inverse of :func:`pack_as`, with the same parameters.

    Returns
    -------
    PrimFunc
        ``(packed: int32 [*layout.shape], weights: spec.weight [*shape])``
    """
    _, rows, width = packed_shape = layout(spec, isa).shape

    def body() -> None:
        packed, weights = emit.parameters(
            [("packed", packed_shape, "int32"), ("weights", shape, spec.weight)]
        )
        with emit.loop(spec.depth) as row, emit.loop(spec.columns) as column:
            source = (column // width * rows + row // 2) * width + column % width
            code = tirx.Cast(spec.weight, emit.half(emit.load(packed, source, 1), row % 2))
            emit.store(weights, row * strides[0] + column * strides[1], code, 1)

    return emit.primitive_function(name, body)


# --------------------------------------------------------------------------- kernel


def kernel(spec: Matmul, isa: Isa, name: str = "matmul") -> Any:
    """Build the kernel of a product with weights.

    Parameters
    ----------
    spec
        The layer.
    isa
        The instruction set; that of the weights' layout.
    name
        Symbol of the function.

    Returns
    -------
    PrimFunc
        ``(data [*leading, depth], weight int32 [*layout.shape], bias int32 or int64 [columns],
        shift int32 [columns], scale float32 [columns], result [*leading, columns])``, without
        those of bias, shift and scale that ``spec`` does not have.
    """
    return kernel_as(spec, isa, name, (spec.depth,), (spec.columns,))


def kernel_as(
    spec: Matmul, isa: Isa, name: str, row: tuple[int, ...], result_row: tuple[int, ...]
) -> Any:
    """Build :func:`kernel` for rows that have more than one axis.

    Parameters
    ----------
    spec, isa, name
        As there.
    row, result_row
        Shapes of a row of the data and of the result: ``depth`` and ``columns`` elements.

    Returns
    -------
    PrimFunc
        As there, with data [*leading, *row] and result [*leading, *result_row].
    """
    return emit.primitive_function(name, lambda: _emit(spec, isa, row, result_row))


def _emit(spec: Matmul, isa: Isa, row: tuple[int, ...], result_row: tuple[int, ...]) -> None:
    tiling = _tiling(spec, isa)
    product = TileProduct(tiling, spec.depth, spec.columns, spec.accumulator_bits, spec.data, isa)
    packed_shape = layout(spec, isa).shape
    tile_length = packed_shape[1] * packed_shape[2]
    leading = [
        tirx.Var(f"length_{axis}", "int64") if length is None else emit.index(length)
        for axis, length in enumerate(spec.leading)
    ]
    args = emit.arguments(
        spec, spec.columns, (*leading, *row), packed_shape, (*leading, *result_row)
    )
    all_rows = prod(leading, start=tirx.IntImm("int64", 1))
    blocks = (all_rows + (tiling.block_rows - 1)) // tiling.block_rows
    with emit.loop(blocks * tiling.column_blocks, "parallel") as task:
        first_row = emit.bind(task // tiling.column_blocks * tiling.block_rows)
        rows = emit.bind(emit.lesser(all_rows - first_row, tiling.block_rows))
        first_tile = emit.bind(task % tiling.column_blocks * tiling.tiles)
        tiles = emit.bind(emit.lesser(tiling.all_tiles - first_tile, tiling.tiles))
        codes, sums = product.allocate()
        with emit.loop(rows) as number:
            product.copy_row(args.data, (first_row + number) * spec.depth, codes, number)
        first = emit.bind(first_tile * tile_length)
        product.accumulate(codes, args.weight, first, tile_length, sums, rows, tiles)
        with emit.loop(rows) as number, emit.loop(tiles) as tile:
            column = emit.bind((first_tile + tile) * tiling.width)
            target = emit.bind((first_row + number) * spec.columns + column)
            weight_sums = first + tile * tile_length + tiling.pairs * tiling.width

            def finish(total: Expr, place: Expr, lanes: int) -> None:
                correction = None
                if spec.data.correction:
                    weight_sum = emit.load(args.weight, weight_sums + place, lanes)
                    correction = emit.correction(spec, weight_sum, lanes)
                terms = emit.read_terms(
                    args,
                    correction,
                    lambda buffer: emit.load(buffer, column + place, lanes),
                )
                values = emit.finish(spec, isa, total, terms, lanes)
                emit.store(args.result, target + place, values, lanes)

            product.finish(sums, number, tile, column, finish)
