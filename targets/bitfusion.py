"""Bit Fusion: a systolic array of fusion units that split into more multipliers for fewer bits.

Sharma et al., "Bit Fusion", ISCA 2018, arXiv 1712.01507. Cycles, stall cycles and traffic follow
the equations of the authors' public simulator, for every tiling into powers of two and every order
of the five loops over tiles. ``docs/targets.md`` says what goes beyond it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from bitwright.errors import UsageError
from bitwright.targets.cost_model import CostModel
from bitwright.targets.schema import Clock, Count, Number, Positive
from bitwright.vocabulary import Layer, LayerCost, Precision

__all__ = ["BitFusion", "Problem", "problem_of"]

Array: TypeAlias = npt.NDArray[Any]  # whole numbers: int64, or Python's own where they are larger

_HEIGHT, _WIDTH = 1, 2  # of the five loops over batch, height, width, inputs and outputs
_OPERANDS: Final = ("weight", "input", "output")
# Which of the five loops over tiles change what the buffer of an operand holds.
_DEPENDS: Final = (
    (False, False, False, True, True),
    (True, True, True, True, False),
    (True, True, True, False, True),
)


class BitFusion(CostModel):
    """A Bit Fusion accelerator.

    Attributes
    ----------
    array_rows, array_columns
        Fusion units: those of a row share an input, a column adds up one output channel.
    dram_bits_per_cycle
        Bandwidth of external memory.
    weight_buffer_kib, input_buffer_kib, output_buffer_kib
        Buffers, each in two halves: one is filled while the other is used.
    widest_operand_bits, narrowest_operand_bits
        Widths between which a fusion unit splits; wider operands take several cycles.
    partial_sum_bits
        Width in which outputs are kept and moved.
    core_energy_pj_per_cycle
        Energy of the whole array in a cycle in which it works.
    dram_energy_pj_per_bit
        Energy of external memory.
    weight_buffer_read_energy_pj_per_bit, ...
        Energy of an access to a buffer.
    """

    # The tiling with the fewest cycles may move more bits at a narrower precision.
    monotone: ClassVar[tuple[str, ...]] = ("cycles",)

    frequency_mhz: Number[Clock]
    array_rows: Number[Count]
    array_columns: Number[Count]
    dram_bits_per_cycle: Number[Count]
    weight_buffer_kib: Number[Count]
    input_buffer_kib: Number[Count]
    output_buffer_kib: Number[Count]
    widest_operand_bits: Number[Count]
    narrowest_operand_bits: Number[Count]
    partial_sum_bits: Number[Count]
    core_energy_pj_per_cycle: Number[Positive]
    dram_energy_pj_per_bit: Number[Positive]
    weight_buffer_read_energy_pj_per_bit: Number[Positive]
    weight_buffer_write_energy_pj_per_bit: Number[Positive]
    input_buffer_read_energy_pj_per_bit: Number[Positive]
    input_buffer_write_energy_pj_per_bit: Number[Positive]
    output_buffer_read_energy_pj_per_bit: Number[Positive]
    output_buffer_write_energy_pj_per_bit: Number[Positive]

    def layer_cost(
        self, layer: Layer, precision: Precision, *, im2col: bool | None = None
    ) -> LayerCost:
        """Cost of the cheapest tiling and loop order.

        Parameters
        ----------
        layer
            A convolution, a matrix product or a recurrence.
        precision
            Its precision.
        im2col
            Whether the input windows of a convolution are laid out as a matrix. By default those
            are that read an input of the model, as in the simulator.

        Raises
        ------
        UsageError
            If a buffer is too small for the smallest tile.
        """
        problem, times = problem_of(layer, im2col)
        best = _cheapest(self, problem, precision)
        moved = best.dram_read_bits + best.dram_write_bits
        energy = {
            "core": (best.cycles - best.stall_cycles) * self.core_energy_pj_per_cycle.value,
            "dram": moved * self.dram_energy_pj_per_bit.value,
        }
        for operand, pj in zip(_OPERANDS, best.buffer_energies_pj, strict=True):
            energy[f"{operand}_buffer"] = pj
        return LayerCost.of(
            layer,
            precision,
            cycles=times * best.cycles,
            stall_cycles=times * best.stall_cycles,
            dram_read_bits=times * best.dram_read_bits,
            dram_write_bits=times * best.dram_write_bits,
            energy_pj={part: times * value for part, value in energy.items()},
            peak_macs_per_cycle=self.peak_macs_per_cycle(precision),
            bound="memory"
            if moved > (best.cycles - best.stall_cycles) * self.dram_bits_per_cycle.value
            else "compute",
        )

    def lanes(self, precision: Precision) -> int:
        """Products that a fusion unit computes side by side."""
        return math.prod(
            max(1, self.widest_operand_bits.value // max(bits, self.narrowest_operand_bits.value))
            for bits in (precision.activation.operand_bits, precision.weight_bits)
        )

    def steps(self, precision: Precision) -> int:
        """Cycles that these products take."""
        return math.prod(
            math.ceil(bits / self.widest_operand_bits.value)
            for bits in (precision.activation.operand_bits, precision.weight_bits)
        )

    def peak_macs_per_cycle(self, precision: Precision) -> float:
        """Multiply-accumulates of the whole array in a cycle."""
        units = self.array_rows.value * self.array_columns.value
        return units * self.lanes(precision) / self.steps(precision)

    @property
    def half_buffer_bits(self) -> tuple[int, int, int]:
        """Bits that a tile of the weights, inputs and outputs may take: half a buffer."""
        sizes = (self.weight_buffer_kib, self.input_buffer_kib, self.output_buffer_kib)
        weights, inputs, outputs = (size.value * 1024 * 8 // 2 for size in sizes)
        return weights, inputs, outputs

    @property
    def buffer_energies(self) -> tuple[tuple[float, float], ...]:
        """Energy of reading and writing the buffers of weights, inputs, outputs, in pJ per bit."""
        return (
            (
                self.weight_buffer_read_energy_pj_per_bit.value,
                self.weight_buffer_write_energy_pj_per_bit.value,
            ),
            (
                self.input_buffer_read_energy_pj_per_bit.value,
                self.input_buffer_write_energy_pj_per_bit.value,
            ),
            (
                self.output_buffer_read_energy_pj_per_bit.value,
                self.output_buffer_write_energy_pj_per_bit.value,
            ),
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """A convolution without groups: what the array computes in one go.

    ``depth`` is the kernel's size along a third spatial axis; pairs are height and width.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    depth: int = 1
    im2col: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Sizes of the five loops."""
        return self.batch, self.height, self.width, self.in_channels, self.out_channels

    @property
    def taps(self) -> int:
        """Weights between an input and an output channel."""
        return self.depth * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True, slots=True)
class _Best:
    """Cost of the chosen tiling and order; energy of the buffers of weights, inputs, outputs."""

    cycles: int
    stall_cycles: int
    dram_read_bits: int
    dram_write_bits: int
    buffer_energies_pj: tuple[float, ...]


def problem_of(layer: Layer, im2col: bool | None) -> tuple[Problem, int]:
    """What the array computes, and how many times, one after the other.

    Beyond the simulator: the groups of a convolution one by one, the steps of a recurrence one by
    one, one-dimensional convolutions as rows, and those of three dimensions slice by slice.
    """
    assert layer.batch is not None
    assert layer.steps is not None
    if layer.kind != "conv":
        features = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        return Problem(layer.batch, 1, 1, *features), layer.groups * layer.steps
    *slices, height, width = (1, *(size for size in layer.output if size is not None))
    depth, *kernel = _last_two(layer.kernel)
    problem = Problem(
        batch=layer.batch * math.prod(slices),
        height=height,
        width=width,
        in_channels=layer.in_channels // layer.groups,
        out_channels=layer.out_channels // layer.groups,
        kernel=(kernel[0], kernel[1]),
        stride=_last_two(layer.stride)[1:],
        dilation=_last_two(layer.dilation)[1:],
        depth=depth,
        im2col=layer.reads_graph_input if im2col is None else im2col,
    )
    return problem, layer.groups


def _last_two(numbers: tuple[int, ...]) -> tuple[int, int, int]:
    """Product of all but the last two numbers, and those; 1 for one that is missing."""
    *others, height, width = (1, *numbers) if len(numbers) < 2 else numbers
    return math.prod(others), height, width


@functools.lru_cache(maxsize=100_000)
def _cheapest(model: BitFusion, problem: Problem, precision: Precision) -> _Best:
    """Try all tilings and loop orders; arrays have the shape [loop orders, tilings]."""
    tiles = _Tiles.all_of(model, problem, precision)
    bandwidth = model.dram_bits_per_cycle.value
    orders = _orders(problem)
    moved = [
        _traffic(tiles.counts, bits, half, depends, orders)
        for bits, half, depends in zip(tiles.bits, tiles.halves, _DEPENDS, strict=True)
    ]
    trips = np.prod(tiles.counts, axis=0)
    compute = trips * tiles.compute
    written, last = moved[2]  # outputs are read and written, all else is read
    read = moved[0][0] + moved[1][0] + written
    first = moved[0][1] + moved[1][1] + last
    latency = _ceil_div(first, bandwidth) + _ceil_div(last, bandwidth)
    middle = read + written - first - last
    stalls = np.maximum(0, _ceil_div(middle, bandwidth) - compute) + latency
    cycles = compute + stalls
    # Fewest cycles; among equals fewest bits moved, fewest bits read, least time at work.
    order, tile = np.nonzero(cycles == cycles.min())
    for key in (read + written, read, np.broadcast_to(compute, cycles.shape)):
        values = key[order, tile]
        best = values == values.min()
        order, tile = order[best], tile[best]
    # Among those that still are equal, the least energy of the buffers; it is all that differs.
    energies = _buffer_energies(
        model, precision, tiles, tile, trips[tile], [bits[order, tile] for bits, _ in moved]
    )
    chosen = int(np.argmin(energies.sum(axis=0)))
    at = order[chosen], tile[chosen]
    return _Best(
        cycles=int(cycles[at]),
        stall_cycles=int(stalls[at]),
        dram_read_bits=int(read[at]),
        dram_write_bits=int(written[at]),
        buffer_energies_pj=tuple(map(float, energies[:, chosen])),
    )


def _ceil_div(numbers: Any, by: Any) -> Array:
    quotient: Array = -(-numbers // by)
    return quotient


def _traffic(
    counts: Array, tile_bits: Array, half: int, depends: Sequence[bool], orders: Array
) -> tuple[Array, Array]:
    """Bits that an operand moves, and bits of its first or last tile.

    From the innermost loop outwards, a tile is promoted: it stays in the buffer while a loop runs
    that it does not depend on, and grows with one that it depends on, up to half the buffer. Every
    loop beyond that moves it again.

    Parameters
    ----------
    counts
        ``[loops, tilings]``, trips of every loop.
    tile_bits
        ``[tilings]``, bits of a tile.
    half
        Bits of half the buffer.
    depends
        Which loops the operand depends on.
    orders
        ``[orders, loops]``, the loops from the innermost to the outermost.

    Returns
    -------
    bits, tile
        Each ``[orders, tilings]``.
    """
    shape = (len(orders), counts.shape[1])
    bits = tile = np.broadcast_to(tile_bits, shape)
    promoted = np.ones(shape, dtype=bool)
    for position in range(orders.shape[1]):
        loops = orders[:, position]
        needed = np.asarray(depends)[loops, None]
        bits = np.where(promoted & ~needed, bits, bits * counts[loops])
        promoted &= ~needed | (bits <= half)
        tile = np.where(promoted, bits, tile)
    return bits, tile


def _orders(problem: Problem) -> Array:
    """Loop orders that can differ, ``[orders, loops]``: all, or fewer for loops of one trip."""
    loops = [loop for loop, size in enumerate(problem.sizes) if size > 1]
    square = problem.height == problem.width > 1  # then the two loops can change places
    return np.array(
        [
            order
            for order in itertools.permutations(loops)
            if not square or order.index(_HEIGHT) < order.index(_WIDTH)
        ],
        dtype=np.int64,
    )


@dataclass(frozen=True, slots=True)
class _Tiles:
    """All tilings whose tiles fit into half of their buffers.

    ``counts`` is [5, tilings], trips of the five loops; the others have one entry a
    tiling: ``compute``, cycles of one tile; ``bits`` of the weights', inputs' and outputs' tile;
    ``positions``, ``columns`` and ``terms``, the steps of a tile: outputs of a channel, groups of
    channels that fill the columns, and groups of products that fill the rows.
    """

    counts: Array
    compute: Array
    bits: tuple[Array, Array, Array]
    halves: tuple[int, int, int]
    positions: Array
    columns: Array
    terms: Array

    @classmethod
    def all_of(cls, model: BitFusion, problem: Problem, precision: Precision) -> _Tiles:
        array_columns = model.array_columns.value
        activation_bits = precision.activation.stored_bits
        weight_bits = precision.weight_bits
        depth_lanes = model.array_rows.value * model.lanes(precision)
        out_step = 1 if problem.im2col else array_columns
        grid = np.meshgrid(
            _powers(problem.batch),
            _powers(max(problem.height, problem.width)),
            _powers(problem.in_channels),
            [out_step * power for power in _powers_over(problem.out_channels / out_step)],
            indexing="ij",
        )
        # Numbers that 64 bits cannot hold are counted in Python's own.
        extents = (
            max(_span(1, *axis), axis[1])
            for axis in zip(problem.kernel, problem.stride, problem.dilation, strict=True)
        )
        per_position = max(
            (problem.taps + depth_lanes) * array_columns * weight_bits,
            max(problem.taps, problem.depth * math.prod(extents)) * activation_bits,
            array_columns * model.partial_sum_bits.value,
        )
        largest = math.prod(problem.sizes) * per_position * 2**5  # a trip may be half empty
        dtype: type = np.int64 if largest < 2**62 else object
        axes: list[Array] = [axis.ravel().astype(dtype) for axis in grid]
        batch, side, ins, outs = axes
        height, width = np.minimum(side, problem.height), np.minimum(side, problem.width)
        counts = np.stack(
            [
                _ceil_div(size, tile)
                for size, tile in zip(problem.sizes, (batch, height, width, ins, outs), strict=True)
            ]
        )
        weights = _ceil_div(problem.taps * ins, depth_lanes) * depth_lanes * outs * weight_bits
        if problem.im2col:
            terms = _ceil_div(problem.taps * ins, depth_lanes)
            window = height * width * problem.taps
        else:
            terms = problem.taps * _ceil_div(ins, depth_lanes)
            window = (
                problem.depth
                * _span(height, problem.kernel[0], problem.stride[0], problem.dilation[0])
                * _span(width, problem.kernel[1], problem.stride[1], problem.dilation[1])
            )
        inputs = window * ins * batch * activation_bits
        columns = _ceil_div(outs, array_columns)
        positions = batch * height * width
        outputs = positions * columns * array_columns * model.partial_sum_bits.value
        halves = model.half_buffer_bits
        fits = np.ones(len(batch), dtype=bool)
        for operand, bits, half in zip(_OPERANDS, (weights, inputs, outputs), halves, strict=True):
            fits &= (bits <= half).astype(bool)
            if not fits.any():
                raise UsageError(
                    f"no tile fits: the smallest needs more than half of the {operand} buffer",
                    fix="give the accelerator a larger one",
                )
        return cls(
            counts=counts[:, fits],
            compute=(positions * columns * terms * model.steps(precision))[fits],
            bits=(weights[fits], inputs[fits], outputs[fits]),
            halves=halves,
            positions=positions[fits],
            columns=columns[fits],
            terms=terms[fits],
        )


def _span(outputs: Any, kernel: int, stride: int, dilation: int) -> Any:
    """Inputs along one axis that a row of outputs reads."""
    return dilation * (kernel - 1) + 1 + (outputs - 1) * stride


def _powers_over(size: float) -> Iterator[int]:
    """Powers of two up to the first that is not below a size."""
    power = 1
    while power < size:
        yield power
        power *= 2
    yield power


def _powers(size: int) -> list[int]:
    """Powers of two below a size, and the size."""
    return [min(power, size) for power in _powers_over(size)]


def _buffer_energies(
    model: BitFusion,
    precision: Precision,
    tiles: _Tiles,
    chosen: Array,
    trips: Array,
    moved: Sequence[Array],
) -> npt.NDArray[np.float64]:
    """Energy of the buffers of weights, inputs and outputs, in pJ: ``[3, len(chosen)]``.

    Inferred: the authors publish the energy of an access, not how many there are. In a step the
    array takes one word of each operand. One operand stays in registers while the steps that share
    its word pass; which one is that is chosen for the least energy. What comes from external
    memory is written to a buffer, and what goes there is read from one.
    """
    lanes = model.lanes(precision)
    rows, columns = model.array_rows.value, model.array_columns.value
    words = (
        rows * columns * lanes * precision.weight_bits,
        rows * lanes * precision.activation.stored_bits,
        columns * model.partial_sum_bits.value,
    )
    weights, inputs, outputs = (bits.astype(np.float64) for bits in moved)
    (weight_read, weight_write), (input_read, input_write), output_pj = model.buffer_energies
    shared = [
        entry[chosen].astype(np.float64) for entry in (tiles.positions, tiles.columns, tiles.terms)
    ]
    steps = trips.astype(np.float64) * shared[0] * shared[1] * shared[2]
    ways = []
    for stationary in range(len(words)):
        used = [
            (steps / shared[operand] if operand == stationary else steps) * word
            for operand, word in enumerate(words)
        ]
        ways.append(
            np.stack(
                [
                    used[0] * weight_read + weights * weight_write,
                    used[1] * input_read + inputs * input_write,
                    # Partial sums are read and written in a step, and again as they come and go.
                    (used[2] + outputs) * sum(output_pj),
                ]
            )
        )
    best = np.argmin([way.sum(axis=0) for way in ways], axis=0)
    found: npt.NDArray[np.float64] = np.stack(ways)[best, :, np.arange(len(chosen))].T
    return found
