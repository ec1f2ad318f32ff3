"""Convolution: direct, vectorised over output positions, tiled in registers.

A task computes a block of output rows for some output channels of one group. First it copies the
part of the image that it needs into scratch memory, as int32 elements that each hold *two* int16
codes: those of two neighbouring channels, or of two neighbouring kernel columns where channels are
few. Columns are sorted by their remainder modulo the stride. Then every kernel element reads a
vector of neighbouring positions with one unaligned load, whatever stride, dilation and padding are,
and multiplies it with a broadcast pair of weights. Depthwise convolution is the case of one channel
a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Literal

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels import emit, matmul
from bitwright.targets.kernels.emit import Arguments, Buffer, Expr, ceil_div, in_three, round_up
from bitwright.targets.kernels.host import Isa
from bitwright.targets.kernels.operand import centred, padding_code
from bitwright.targets.kernels.spec import Convolution, Matmul, WeightLayout

__all__ = ["kernel", "layout", "pack", "unpack"]

_SCRATCH_BYTES = 192 * 1024  # of a task; leaves room for weights in a second-level cache of 512 KiB
_ASSUMED_THREADS = 4  # how many tasks an image should make at least, if it is worth while
_MANY_COLUMNS = 8  # kernel columns beyond this are looped over, not unrolled


# --------------------------------------------------------------------------- shape


@dataclass(frozen=True)
class _Shape:
    """A convolution as one of three spatial axes, [depth, rows, columns].

    A kernel of one element without stride and padding sees its image as one row.
    """

    group_in: int
    group_out: int
    groups: int
    size: tuple[int, int, int]
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]
    dilations: tuple[int, int, int]
    pads: tuple[int, int, int]
    out: tuple[int, int, int]
    padded: bool
    pairing: Literal["channels", "columns"]

    @classmethod
    def of(cls, spec: Convolution) -> _Shape:
        rank = len(spec.size)
        size, out = in_three(spec.size), in_three(spec.output_size)
        kernel, strides = in_three(spec.kernel), in_three(spec.strides)
        if not any(spec.pads) and prod(kernel) == prod(strides) == 1:
            size = out = (1, 1, prod(size))
        group_in = spec.in_channels // spec.groups
        by_channels = ceil_div(group_in, 2) * kernel[2]
        by_columns = group_in * ceil_div(kernel[2], 2)
        dilations = in_three(spec.dilations)
        if strides[2] == 2 and dilations[2] == 1:
            by_columns -= 1  # of equals, this: such pairs are neighbours in the image already
        return cls(
            group_in=group_in,
            group_out=spec.out_channels // spec.groups,
            groups=spec.groups,
            size=size,
            kernel=kernel,
            strides=strides,
            dilations=dilations,
            pads=in_three(spec.pads[:rank], missing=0),
            out=out,
            padded=any(spec.pads),
            pairing="channels" if by_channels <= by_columns else "columns",
        )

    @property
    def planes(self) -> int:
        """Images of pairs in scratch memory."""
        return ceil_div(self.group_in, 2) if self.pairing == "channels" else self.group_in

    @property
    def steps(self) -> int:
        """Pairs of weights in a kernel row."""
        return self.kernel[2] if self.pairing == "channels" else ceil_div(self.kernel[2], 2)

    @property
    def pairs(self) -> int:
        """Pairs of products in a sum."""
        return self.planes * self.kernel[0] * self.kernel[1] * self.steps

    @property
    def step_columns(self) -> int:
        """Input columns from one step to the next."""
        return self.dilations[2] * (1 if self.pairing == "channels" else 2)

    @property
    def phases(self) -> list[int]:
        """Remainders of input columns, modulo the stride, that scratch memory keeps."""
        stride = self.strides[2]
        if self.steps > _MANY_COLUMNS:
            return list(range(stride))
        return sorted({step * self.step_columns % stride for step in range(self.steps)})


# --------------------------------------------------------------------------- tiling


@dataclass(frozen=True)
class _Tiling:
    """How the work is cut.

    ``rows`` x ``columns`` output positions and ``channel_tiles`` tiles of output channels are a
    task; ``channels`` x ``vectors`` accumulators are in registers at once. Blocks and tiles at the
    ends are moved inwards and computed twice where lengths do not divide.
    """

    lanes: int
    rows: int
    columns: int
    channels: int
    vectors: int
    channel_tiles: int
    shape: _Shape

    @property
    def row_vectors(self) -> int:
        return ceil_div(self.columns, self.lanes)

    @property
    def block_vectors(self) -> int:
        return self.rows * self.row_vectors

    @property
    def position_tiles(self) -> int:
        return ceil_div(self.block_vectors, self.vectors)

    @property
    def all_channel_tiles(self) -> int:
        return ceil_div(self.shape.group_out, self.channels)

    @property
    def channel_blocks(self) -> int:
        return ceil_div(self.all_channel_tiles, self.channel_tiles)

    @property
    def row_blocks(self) -> int:
        return ceil_div(self.shape.out[1], self.rows)

    @property
    def column_blocks(self) -> int:
        return ceil_div(self.shape.out[2], self.columns)

    @property
    def tasks(self) -> int:
        """Tasks an image."""
        blocks = self.row_blocks * self.column_blocks * self.channel_blocks
        return self.shape.out[0] * self.shape.groups * blocks

    # Scratch memory, in elements.

    @property
    def row_stride(self) -> int:
        """Scratch rows from one output row to the next; a single kernel row needs no others."""
        return 1 if self.shape.kernel[1] == 1 else self.shape.strides[1]

    @property
    def scratch_rows(self) -> int:
        reach = (self.shape.kernel[1] - 1) * self.shape.dilations[1]
        return (self.rows - 1) * self.row_stride + reach + 1

    @property
    def phase_columns(self) -> int:
        """Columns of one phase in a scratch row, a multiple of the lanes."""
        shape = self.shape
        reach = (shape.steps - 1) * shape.step_columns // shape.strides[2]
        return round_up(max(self.columns, self.lanes) + reach, self.lanes)

    @property
    def row_length(self) -> int:
        return len(self.shape.phases) * self.phase_columns

    @property
    def plane_length(self) -> int:
        # An odd number of cache lines spreads equal places of all planes over the cache's sets.
        lines = ceil_div(self.shape.kernel[0] * self.scratch_rows * self.row_length, 16)
        return 16 * (lines | 1)

    @property
    def scratch_length(self) -> int:
        return self.shape.planes * self.plane_length

    def cycles(self) -> float:
        """Estimate the time of one image on ``_ASSUMED_THREADS`` threads."""
        shape = self.shape
        loads = self.channels + self.vectors
        products = self.channels * self.vectors
        step = max(products / 2, loads / 2, (2 * products + loads) / 6)
        tile = shape.pairs * step + 8 * products + 20
        compute = self.position_tiles * self.channel_tiles * tile
        rows = shape.planes * shape.kernel[0] * self.scratch_rows
        packing = rows * (30 + self.row_length / self.lanes * 4)
        task = compute + packing + 200
        waves = ceil_div(self.tasks, _ASSUMED_THREADS) * _ASSUMED_THREADS
        # Waiting for a last task matters only where there is much to wait for.
        count = waves if self.tasks * task > 50_000 else self.tasks
        return count * task


@cache
def _tiling(shape: _Shape, isa: Isa, accumulator_bits: int) -> _Tiling:
    """Choose the cheapest of all sensible tilings."""
    width = 2 if accumulator_bits == 64 else 1
    micro_tiles = [
        (channels, vectors)
        for vectors in (1, 2, 3, 4, 6)
        for channels in range(1, 9)
        if channels <= shape.group_out and width * channels * vectors + vectors + 2 <= isa.registers
    ]
    columns = {shape.out[2]}
    for block in (512, 256, 128):
        if shape.out[2] > 2 * block:
            columns.add(round_up(ceil_div(shape.out[2], ceil_div(shape.out[2], block)), isa.lanes))
    candidates = []
    for channels, vectors in micro_tiles:
        tiles = ceil_div(shape.group_out, channels)
        for column_count in sorted(columns):
            for row_count in _block_sizes(shape.out[1]):
                for tile_count in sorted({ceil_div(tiles, parts) for parts in (1, 2, 4, 8)}):
                    tiling = _Tiling(
                        isa.lanes, row_count, column_count, channels, vectors, tile_count, shape
                    )
                    if vectors <= tiling.block_vectors:
                        candidates.append(tiling)
    small = [tiling for tiling in candidates if tiling.scratch_length * 4 <= _SCRATCH_BYTES]
    if not small:
        least = min(tiling.scratch_length for tiling in candidates)
        small = [tiling for tiling in candidates if tiling.scratch_length == least]
    return min(small, key=lambda tiling: tiling.cycles())


def _block_sizes(length: int) -> list[int]:
    """Sizes of blocks that cut a length into equal parts, or nearly."""
    counts = {ceil_div(length, size) for size in range(1, min(length, 64) + 1)} | {1}
    return sorted({ceil_div(length, count) for count in counts})


def _product(spec: Convolution) -> Matmul | None:
    """Return the product that a convolution is if its kernel covers the image; None otherwise.

    There is one position then, and vectors go over output channels instead.
    """
    if spec.groups != 1 or any(spec.pads) or spec.kernel != spec.size:
        return None
    return Matmul(
        (spec.batch,),
        prod(spec.weight_shape[1:]),
        spec.out_channels,
        spec.data,
        spec.output,
        spec.weight,
        spec.accumulator_bits,
        spec.bias,
        spec.shift,
    )


# --------------------------------------------------------------------------- weights


def layout(spec: Convolution, isa: Isa) -> WeightLayout:
    """Shape of the weights as the kernel reads them.

    [groups, channel tiles, pairs, channels of a tile]; a row more of sums where zero points are
    corrected afterwards. That of a product where the kernel covers the image.
    """
    product = _product(spec)
    if product is not None:
        return matmul.layout(product, isa)
    shape = _Shape.of(spec)
    tiling = _tiling(shape, isa, spec.accumulator_bits)
    rows = shape.pairs + (1 if spec.data.correction else 0)
    return WeightLayout((shape.groups, tiling.all_channel_tiles, rows, tiling.channels))


def pack(spec: Convolution, isa: Isa, name: str = "pack_convolution") -> Any:
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
        ``(weights: spec.weight [*spec.weight_shape], packed: int32 [*layout.shape])``
    """
    product = _product(spec)
    if product is not None:
        return matmul.pack_as(product, isa, name, spec.weight_shape, (1, product.depth))
    shape = _Shape.of(spec)
    packed_shape = layout(spec, isa).shape
    _, tiles, rows, channels = packed_shape

    def body() -> None:
        weights, packed = emit.parameters(
            [("weights", spec.weight_shape, spec.weight), ("packed", packed_shape, "int32")]
        )
        with emit.loop(shape.groups * tiles, "parallel") as block, emit.loop(channels) as place:
            total = emit.allocate(1, "int32", registers=True)
            group = emit.bind(block // tiles)
            channel = emit.bind(block % tiles * channels + place)
            first = emit.bind(block * (rows * channels) + place)
            emit.store(total, 0, tirx.const(0, "int32"), 1)
            with _taps(shape) as (plane, depth, row, step):
                halves = []
                for half in range(2):
                    entry, column, inside = _tap(shape, plane, step, half)
                    inside = T.And(channel < shape.group_out, inside)
                    source = (group * shape.group_out + channel) * shape.group_in + entry
                    for index, length in zip((depth, row, column), shape.kernel, strict=True):
                        source = source * length + index
                    code = tirx.Cast("int32", emit.load(weights, source, 1))
                    halves.append(emit.bind(T.if_then_else(inside, code, tirx.const(0, "int32"))))
                emit.store(total, 0, total[0] + halves[0] + halves[1], 1)
                pair = _pair_index(shape, plane, depth, row, step)
                both = emit.join(halves[0], halves[1], 1)
                emit.store(packed, first + pair * channels, both, 1)
            if spec.data.correction:
                emit.store(packed, first + shape.pairs * channels, total[0], 1)

    return emit.primitive_function(name, body)


def unpack(spec: Convolution, isa: Isa, name: str = "unpack_convolution") -> Any:
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
        ``(packed: int32 [*layout.shape], weights: spec.weight [*spec.weight_shape])``
    """
    product = _product(spec)
    if product is not None:
        return matmul.unpack_as(product, isa, name, spec.weight_shape, (1, product.depth))
    shape = _Shape.of(spec)
    packed_shape = layout(spec, isa).shape
    _, tiles, rows, channels = packed_shape

    def body() -> None:
        packed, weights = emit.parameters(
            [("packed", packed_shape, "int32"), ("weights", spec.weight_shape, spec.weight)]
        )
        with (
            emit.loop(shape.groups) as group,
            emit.loop(shape.group_out) as channel,
            emit.loop(shape.group_in) as entry,
            emit.loop(shape.kernel[0]) as depth,
            emit.loop(shape.kernel[1]) as row,
            emit.loop(shape.kernel[2]) as column,
        ):
            target = (group * shape.group_out + channel) * shape.group_in + entry
            for index, length in zip((depth, row, column), shape.kernel, strict=True):
                target = target * length + index
            if shape.pairing == "channels":
                plane, step, half = entry // 2, column, entry % 2
            else:
                plane, step, half = entry, column // 2, column % 2
            pair = _pair_index(shape, plane, depth, row, step)
            first = (group * tiles + channel // channels) * rows
            both = emit.load(packed, (first + pair) * channels + channel % channels, 1)
            code = emit.half(both, half)
            emit.store(weights, target, tirx.Cast(spec.weight, code), 1)

    return emit.primitive_function(name, body)


@contextmanager
def _taps(shape: _Shape) -> Iterator[tuple[Expr, Expr, Expr, Expr]]:
    """Loop over the pairs of a kernel: plane, depth, row, step in a row."""
    with (
        emit.loop(shape.planes) as plane,
        emit.loop(shape.kernel[0]) as depth,
        emit.loop(shape.kernel[1]) as row,
        emit.loop(shape.steps) as step,
    ):
        yield plane, depth, row, step


def _tap(shape: _Shape, plane: Expr, step: Expr, half: int) -> tuple[Expr, Expr, Expr]:
    """Input channel and kernel column of a half of a pair, and whether they exist."""
    if shape.pairing == "channels":
        return plane * 2 + half, step, emit.index(plane * 2 + half) < shape.group_in
    return plane, step * 2 + half, emit.index(step * 2 + half) < shape.kernel[2]


def _pair_index(shape: _Shape, plane: Expr, depth: Expr, row: Expr, step: Expr) -> Expr:
    return ((plane * shape.kernel[0] + depth) * shape.kernel[1] + row) * shape.steps + step


# --------------------------------------------------------------------------- kernel


def kernel(spec: Convolution, isa: Isa, name: str = "convolution") -> Any:
    """Build the kernel of a convolution.

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
        ``(data [batch, in_channels, *size], weight int32 [*layout.shape], bias int32 or int64
        [out_channels], shift int32 [out_channels], scale float32 [out_channels], result [batch,
        out_channels, *output_size])``, without those of bias, shift and scale that ``spec`` does
        not have.
    """
    product = _product(spec)
    if product is not None:
        result_row = (spec.out_channels, *spec.output_size)
        return matmul.kernel_as(product, isa, name, (spec.in_channels, *spec.size), result_row)
    return emit.primitive_function(name, lambda: _Kernel(spec, isa).emit())


class _Kernel:
    """Emits the statements of one convolution."""

    def __init__(self, spec: Convolution, isa: Isa) -> None:
        self.spec = spec
        self.isa = isa
        self.lanes = isa.lanes
        self.shape = _Shape.of(spec)
        self.tiling = _tiling(self.shape, isa, spec.accumulator_bits)
        self.packed_shape = layout(spec, isa).shape

    def emit(self) -> None:
        """Emit parameters and body."""
        spec, shape, tiling = self.spec, self.shape, self.tiling
        batch = tirx.Var("batch", "int64") if spec.batch is None else emit.index(spec.batch)
        args = emit.arguments(
            spec,
            spec.out_channels,
            (batch, spec.in_channels, *spec.size),
            self.packed_shape,
            (batch, spec.out_channels, *spec.output_size),
        )
        with emit.loop(batch * tiling.tasks, "parallel") as task:
            parts = []
            for count in (
                tiling.channel_blocks,
                tiling.column_blocks,
                tiling.row_blocks,
                shape.out[0],
                shape.groups,
            ):
                parts.append(0 if count == 1 else emit.bind(task % count))
                task = task if count == 1 else emit.bind(task // count)  # noqa: PLW2901
            channel_block, column_block, row_block, depth, group = parts
            origin = _Origin(
                task,
                group,
                depth,
                _start(row_block, tiling.rows, shape.out[1]),
                _start(column_block, tiling.columns, shape.out[2]),
            )
            scratch = emit.allocate(tiling.scratch_length, "int32")
            self._copy_image(args.data, scratch, origin)
            self._compute(args, scratch, origin, channel_block)

    # -- the image as pairs

    def _copy_image(self, data: Buffer, scratch: Buffer, origin: _Origin) -> None:
        shape, tiling = self.shape, self.tiling
        pair_column = self.shape.dilations[2] if shape.pairing == "columns" else 0
        # Input columns of a scratch row, first to last; vectors may reach past the end.
        columns = (tiling.phase_columns - 1) * shape.strides[2] + shape.phases[-1] + pair_column + 1
        halves = 2 if shape.pairing == "channels" and shape.group_in > 1 else 1
        slack = 32 + shape.strides[2]
        lines = [emit.allocate(round_up(columns, 16) + slack, "int16") for _ in range(halves)]
        with (
            emit.loop(shape.planes) as plane,
            emit.loop(shape.kernel[0]) as depth_tap,
            emit.loop(tiling.scratch_rows) as row,
        ):
            row_step = shape.strides[1] if shape.kernel[1] == 1 else 1
            depth = origin.depth * shape.strides[0] + depth_tap * shape.dilations[0] - shape.pads[0]
            source_row = origin.row * shape.strides[1] + row * row_step - shape.pads[1]
            depth, source_row = emit.bind(depth), emit.bind(source_row)
            for half, line in enumerate(lines):
                channel = origin.group * shape.group_in
                channel = channel + (plane * 2 + half if shape.pairing == "channels" else plane)
                if half == 1 and shape.group_in % 2:
                    # The missing last channel meets weights of 0: any other one does.
                    channel = emit.lesser(channel, (origin.group + 1) * shape.group_in - 1)
                first = origin.image * self.spec.in_channels + channel
                for index, length in zip((depth, source_row), shape.size[:2], strict=True):
                    first = first * length + index
                self._copy_line(
                    data, line, columns, depth, source_row, first * shape.size[2], origin.column
                )
            base = emit.bind(
                plane * tiling.plane_length
                + (depth_tap * tiling.scratch_rows + row) * tiling.row_length
            )
            with emit.loop(tiling.phase_columns // self.lanes) as block:
                for place, phase in self._phases():
                    target = base + place * tiling.phase_columns + block * self.lanes
                    pairs = self._pairs(lines, block * self.lanes, phase)
                    emit.store(scratch, target, pairs, self.lanes)

    def _phases(self) -> Iterator[tuple[Expr, Expr]]:
        """Go over the phases that scratch memory keeps: place and remainder."""
        phases = self.shape.phases
        if len(phases) > _MANY_COLUMNS and len(phases) == self.shape.strides[2]:
            with emit.loop(len(phases)) as phase:
                yield phase, phase
        else:
            yield from enumerate(phases)

    def _copy_line(
        self,
        data: Buffer,
        line: Buffer,
        columns: int,
        depth: Expr,
        row: Expr,
        first: Expr,
        column: Expr,
    ) -> None:
        """Copy an input row, centred and padded, from the first column that a block needs."""
        shape = self.shape
        operand = self.spec.data
        start = emit.bind(column * shape.strides[2] - shape.pads[2])
        left = emit.bind(emit.lesser(emit.greater(0 - start, 0), columns))
        right = emit.bind(emit.greater(emit.lesser(shape.size[2] - start, columns), left))
        fill = emit.constant(padding_code(operand), "int16", 16)

        def copy() -> None:
            count = right - left
            source = first + start + left
            wide = next(
                (lanes for lanes in (16, 8, 4) if not isinstance(count, int) or count >= lanes), 1
            )
            with emit.loop(emit.bind(count // wide)) as block:
                codes = centred(data, source + block * wide, operand, wide)
                emit.store(line, left + block * wide, codes, wide)
            with emit.loop(emit.bind(count % wide)) as rest:
                place = count - count % wide + rest
                emit.store(line, left + place, centred(data, source + place, operand, 1), 1)

        if not shape.padded:
            # What lies right of the image is read by lanes alone that nobody uses.
            copy()
            return
        with emit.loop(emit.bind((columns - right + 15) // 16)) as block:
            emit.store(line, right + block * 16, fill, 16)
        with emit.loop(emit.bind((left + 15) // 16)) as block:
            emit.store(line, block * 16, fill, 16)
        inside = emit.within(depth, shape.size[0], row, shape.size[1])
        if inside is True:
            copy()
            return
        with T.If(inside):
            with T.Then():
                copy()
            with T.Else(), emit.loop(ceil_div(columns, 16)) as block:
                emit.store(line, block * 16, fill, 16)

    def _pairs(self, lines: list[Buffer], first: Expr, phase: Expr) -> Expr:
        """Pair the codes of ``lanes`` columns from a position of a phase on."""
        stride, dilation, lanes = self.shape.strides[2], self.shape.dilations[2], self.lanes
        if self.shape.pairing == "columns" and stride == 2 and dilation == 1:
            both = emit.load(lines[0], first * stride + phase, 2 * lanes)
            return emit.reinterpret(both, "int32", lanes)

        def codes(line: Buffer, shift: int) -> Expr:
            read = emit.load(line, first * stride + phase + shift, lanes, stride)
            return emit.cast(emit.reinterpret(read, "uint16", lanes), "int32", lanes)

        low = codes(lines[0], 0)
        if self.shape.pairing == "columns":
            high = codes(lines[0], dilation)
        elif len(lines) == 2:
            high = codes(lines[1], 0)
        else:
            return low
        return T.bitwise_or(low, T.shift_left(high, emit.constant(16, "int32", lanes)))

    # -- sums of products

    def _compute(
        self, args: Arguments, scratch: Buffer, origin: _Origin, channel_block: Expr
    ) -> None:
        tiling = self.tiling
        first = _start(channel_block, tiling.channel_tiles, tiling.all_channel_tiles)
        # The inner loop goes over what is smaller, so that it stays in the cache.
        data = tiling.scratch_length
        weights = tiling.channel_tiles * tiling.channels * self.shape.pairs
        if tiling.position_tiles * weights < tiling.channel_tiles * data:
            with emit.loop(tiling.position_tiles) as position:
                places = self._places(position)
                with emit.loop(tiling.channel_tiles) as tile:
                    self._tile(args, scratch, origin, places, first + tile)
        else:
            with (
                emit.loop(tiling.channel_tiles) as tile,
                emit.loop(tiling.position_tiles) as position,
            ):
                self._tile(args, scratch, origin, self._places(position), first + tile)

    def _places(self, tile: Expr) -> list[_Place]:
        """Find where the vectors of a tile of positions lie."""
        tiling = self.tiling
        first = _start(tile, tiling.vectors, tiling.block_vectors)
        places = []
        for vector in range(tiling.vectors):
            number = first + vector
            if tiling.row_vectors == 1:
                row, column = number, 0
            else:
                row = number // tiling.row_vectors
                column = number % tiling.row_vectors * self.lanes
                if tiling.columns % self.lanes:
                    column = emit.lesser(column, tiling.columns - self.lanes)
            row, column = emit.bind(row), emit.bind(column)
            scratch = emit.bind(row * (tiling.row_stride * tiling.row_length) + column)
            places.append(_Place(row, column, scratch))
        return places

    def _tile(
        self,
        args: Arguments,
        scratch: Buffer,
        origin: _Origin,
        places: list[_Place],
        tile: Expr,
    ) -> None:
        spec, shape, tiling, lanes = self.spec, self.shape, self.tiling, self.lanes
        bits = spec.accumulator_bits
        accumulator = f"int{bits}"
        tile = emit.bind(tile)
        rows = self.packed_shape[2]
        weights = emit.bind(
            (origin.group * tiling.all_channel_tiles + tile) * rows * tiling.channels
        )
        sums = emit.allocate(tiling.channels * tiling.vectors * lanes, accumulator, registers=True)
        start = emit.start(bits, shape.pairs, lanes)
        for number in range(tiling.channels * tiling.vectors):
            emit.store(sums, number * lanes, start, lanes)

        def multiply(plane: Expr, depth: Expr, row: Expr, step: Expr) -> None:
            column = step * shape.step_columns
            stride = shape.strides[2]
            phase = column % stride
            if isinstance(phase, int):
                phase = shape.phases.index(phase)
            tap = emit.bind(
                plane * tiling.plane_length
                + (depth * tiling.scratch_rows + row * shape.dilations[1]) * tiling.row_length
                + phase * tiling.phase_columns
                + column // stride
            )
            pair = weights + _pair_index(shape, plane, depth, row, step) * tiling.channels
            vectors = [
                emit.bind(emit.load(scratch, place.scratch + tap, lanes)) for place in places
            ]
            for channel in range(tiling.channels):
                weight = emit.bind(emit.broadcast(emit.load(args.weight, pair + channel, 1), lanes))
                for number, vector in enumerate(vectors):
                    place = (channel * tiling.vectors + number) * lanes
                    total = emit.dot(self.isa, bits, emit.load(sums, place, lanes), weight, vector)
                    emit.store(sums, place, total, lanes)

        with (
            emit.loop(shape.planes) as plane,
            emit.loop(shape.kernel[0]) as depth,
            emit.loop(shape.kernel[1]) as row,
        ):
            if shape.steps > _MANY_COLUMNS:
                with emit.loop(shape.steps) as step:
                    multiply(plane, depth, row, step)
            else:
                for step in range(shape.steps):
                    multiply(plane, depth, row, step)

        weight_sums = weights + shape.pairs * tiling.channels if spec.data.correction else None
        for channel in range(tiling.channels):
            inside = shape.group_out % tiling.channels == 0 or (
                tile * tiling.channels + channel < shape.group_out
            )
            with emit.when(inside):
                self._finish(args, sums, origin, places, tile, channel, weight_sums)

    def _finish(
        self,
        args: Arguments,
        sums: Buffer,
        origin: _Origin,
        places: list[_Place],
        tile: Expr,
        channel: int,
        weight_sums: Expr | None,
    ) -> None:
        """Turn the sums of one channel into results."""
        spec, shape, tiling, lanes = self.spec, self.shape, self.tiling, self.lanes
        number = emit.bind(origin.group * shape.group_out + tile * tiling.channels + channel)
        correction = None
        if weight_sums is not None:
            weight_sum = emit.load(args.weight, weight_sums + channel, 1)
            correction = emit.correction(spec, weight_sum, 1)
            correction = emit.bind(emit.broadcast(correction, lanes))
        terms = emit.read_terms(
            args,
            correction,
            lambda buffer: emit.bind(emit.broadcast(emit.load(buffer, number, 1), lanes)),
        )
        plane = (origin.image * spec.out_channels + number) * shape.out[0] + origin.depth
        base = emit.bind((plane * shape.out[1] + origin.row) * shape.out[2] + origin.column)
        for index, place in enumerate(places):
            total = emit.load(sums, (channel * tiling.vectors + index) * lanes, lanes)
            values = emit.finish(spec, self.isa, total, terms, lanes)
            target = base + place.row * shape.out[2] + place.column
            self._store(args.result, target, place.row, values)

    def _store(self, result: Buffer, target: Expr, row: Expr, values: Expr) -> None:
        """Write a vector of results; in images narrower than that, no further than the block."""
        tiling, lanes = self.tiling, self.lanes
        if tiling.columns >= lanes:
            emit.store(result, target, values, lanes)
            return
        values = emit.bind(values)
        # Rows are written in their order: what a vector writes into the next ones, they overwrite.
        fits = emit.index(row * tiling.columns) <= tiling.rows * tiling.columns - lanes
        with T.If(fits):
            with T.Then():
                emit.store(result, target, values, lanes)
            with T.Else():
                part = emit.allocate(lanes, emit.output_dtype(self.spec), registers=True)
                emit.store(part, 0, values, lanes)
                for lane in range(tiling.columns):
                    emit.store(result, target + lane, part[lane], 1)


def _start(block: Expr, size: int, length: int) -> Expr:
    """First element of a block; the last block is moved inwards."""
    return emit.bind(emit.lesser(block * size, length - size))


@dataclass(frozen=True)
class _Origin:
    """Where a task's block begins: image, group, and the first output position."""

    image: Expr
    group: Expr
    depth: Expr
    row: Expr
    column: Expr


@dataclass(frozen=True)
class _Place:
    """A vector of output positions: row and column in the block, and offset in scratch memory."""

    row: Expr
    column: Expr
    scratch: Expr
