"""The best mapping of a matrix product or convolution, by ZigZag's classes.

Everything is built in memory: nothing is read, written or printed. Instead of ZigZag's search over
all loop orders, the largest tiles that fit the buffers are tried in every order of the outer loops,
which takes a hundredth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, Final, TypeAlias

from zigzag.cost_model.cost_model import CostModelEvaluation
from zigzag.datatypes import LayerDim, LayerOperand, MemoryOperand, OADimension
from zigzag.hardware.architecture.accelerator import Accelerator
from zigzag.hardware.architecture.memory_hierarchy import MemoryHierarchy
from zigzag.hardware.architecture.memory_instance import MemoryInstance
from zigzag.hardware.architecture.memory_level import ServedMemDimensions
from zigzag.hardware.architecture.memory_port import (
    DataDirection,
    MemoryPort,
    MemoryPortType,
    PortAllocation,
)
from zigzag.hardware.architecture.operational_array import MultiplierArray
from zigzag.hardware.architecture.operational_unit import Multiplier
from zigzag.mapping.data_movement import DataMoveAttr
from zigzag.mapping.spatial_mapping import MappingSingleOADim, SpatialMapping, SpatialMappingHint
from zigzag.mapping.temporal_mapping import TemporalMappingType
from zigzag.opt.loma.memory_allocator import MemoryAllocator
from zigzag.stages.evaluation.cost_model_evaluation import CostModelStage
from zigzag.stages.mapping.spatial_mapping_conversion import SpatialMappingConversionStage
from zigzag.workload.layer_attributes import (
    LayerDimRelation,
    LayerDimSizes,
    LayerEquation,
    LayerOperandPrecision,
    LayerPadding,
    LayerTemporalOrdering,
    MemoryOperandLinks,
)
from zigzag.workload.layer_node import LayerNode, LayerNodeAttributes, MappingAttributes

from bitwright.errors import UsageError
from bitwright.targets.bitfusion import BitFusion, Problem
from bitwright.vocabulary import Precision

__all__ = ["Mapped", "best_mapping"]

Tile: TypeAlias = dict[Any, int]

B, K, C, OY, OX, FY, FX, IY, IX = map(LayerDim, ("B", "K", "C", "OY", "OX", "FY", "FX", "IY", "IX"))
_KERNEL_LOOPS: Final = (FX, FY)
_TILED_LOOPS: Final = ((C,), (K,), (OX, OY, B))
_EQUATION: Final = "O[b][k][oy][ox] = W[k][c][fy][fx] * I[b][c][iy][ix]"

_ROWS, _COLUMNS = OADimension("D1"), OADimension("D2")
_WEIGHTS, _INPUTS, _OUTPUTS = _OPERANDS = tuple(map(LayerOperand, "WIO"))
_MEMORY_OPERAND: Final = {
    _WEIGHTS: MemoryOperand("I2"),
    _INPUTS: MemoryOperand("I1"),
    _OUTPUTS: MemoryOperand("O"),
}
_BUFFER, _DRAM = 0, 1  # levels of memory, the same for every operand
_DRAM_BITS: Final = 10**15  # never full

_READS: Final = (DataDirection.RD_OUT_TO_LOW, DataDirection.RD_OUT_TO_HIGH)
_WRITES: Final = (DataDirection.WR_IN_BY_LOW, DataDirection.WR_IN_BY_HIGH)
_DIRECTIONS: Final = {
    _WEIGHTS: (DataDirection.WR_IN_BY_HIGH, DataDirection.RD_OUT_TO_LOW),
    _INPUTS: (DataDirection.WR_IN_BY_HIGH, DataDirection.RD_OUT_TO_LOW),
    _OUTPUTS: (*_READS, *_WRITES),
}
# Mappings within this share of the fastest count as equally fast; the least energy decides.
_TOLERANCE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Mapped:
    """Costs of a mapping.

    ``bits`` are those read from and written to the buffers of weights, inputs and outputs, and to
    external memory.
    """

    cycles: int
    compute_cycles: int
    bits: tuple[tuple[int, int], ...]


class _Convolution(LayerNode):
    @staticmethod
    def calc_pr_dimension_size(sa: int, a: int, sb: int, b: int) -> int:
        """Distinct input positions; LayerNode counts too many where outputs are few and dilated."""
        common = math.gcd(sa, sb)
        return a * b - max(0, a - sb // common) * max(0, b - sa // common)


def best_mapping(
    model: BitFusion, problem: Problem, precision: Precision, cycles_per_step: int
) -> Mapped:
    """Find the mapping with the least energy among those that are about the fastest.

    Parameters
    ----------
    model
        The accelerator.
    problem
        What it computes.
    precision
        Widths of weights and activations.
    cycles_per_step
        Cycles that the array takes for one product in every lane.

    Raises
    ------
    UsageError
        If a buffer cannot hold what one step needs.
    """
    taps, height, width = problem.kernel, problem.height, problem.width
    channels, batch = problem.in_channels * problem.depth, problem.batch
    if problem.im2col:  # a matrix product: windows times terms
        channels, batch = channels * math.prod(taps), batch * height * width
        taps, height, width = (1, 1), 1, 1
    sizes = {B: batch, K: problem.out_channels, C: channels, OY: height, OX: width}
    sizes |= {FY: taps[0], FX: taps[1]}
    lanes, columns = model.array_rows.value * model.lanes(precision), model.array_columns.value
    spatial = SpatialMapping(
        {
            _ROWS: MappingSingleOADim({C: min(channels, lanes)}),
            _COLUMNS: MappingSingleOADim({K: min(problem.out_channels, columns)}),
        }
    )
    spatial.initialize_oa_dims({_ROWS: lanes, _COLUMNS: columns})
    layer = _layer(sizes, problem, model, precision, spatial)
    accelerator = _accelerator(model, precision, lanes, columns)
    bandwidth = model.dram_bits_per_cycle.value
    try:
        found = [
            (_cycles(e, bandwidth), e) for e in _evaluations(accelerator, layer, cycles_per_step)
        ]
    except Exception as error:
        if type(error).__name__ != "MemoryTooSmallException":
            raise
        raise UsageError(
            "a buffer cannot hold what one step of the array needs",
            fix="give the accelerator a larger one",
        ) from None
    limit = min(cycles for cycles, _ in found) * (1 + _TOLERANCE)
    cycles, best = min(
        ((cycles, e) for cycles, e in found if cycles <= limit),
        key=lambda entry: (entry[1].energy_total, entry[0]),
    )
    dram = [_traffic(best, operand, _DRAM) for operand in _OPERANDS]
    return Mapped(
        cycles=cycles,
        compute_cycles=math.ceil(best.ideal_temporal_cycle),
        bits=(
            *(_traffic(best, operand, _BUFFER) for operand in _OPERANDS),
            (sum(read for read, _ in dram), sum(written for _, written in dram)),
        ),
    )


def _cycles(evaluation: Any, bandwidth: int) -> int:
    """ZigZag's latency, or the time of the traffic where that is more.

    ZigZag loads the first weights and the first inputs at the same time, each at the full width of
    the one port that they share.
    """
    moved = sum(sum(_traffic(evaluation, operand, _DRAM)) for operand in _OPERANDS)
    latency: int = math.ceil(evaluation.latency_total2)
    return max(latency, math.ceil(moved / bandwidth))


def _traffic(evaluation: Any, operand: Any, level: int) -> tuple[int, int]:
    """Bits read from and written to a level of memory for an operand."""
    movement = evaluation.mapping.unit_mem_data_movement[operand][level]
    elements = movement.get_attribute(DataMoveAttr.DATA_ELEM_MOVE_COUNT)
    bits = movement.get_attribute(DataMoveAttr.DATA_PRECISION)
    read, written = (
        sum(int(elements.get(way) * bits.get(way)) for way in ways) for ways in (_READS, _WRITES)
    )
    return read, written


def _accelerator(model: BitFusion, precision: Precision, lanes: int, columns: int) -> Any:
    """An array, a buffer for each operand that always keeps up with it, and external memory."""
    bandwidth = model.dram_bits_per_cycle.value
    # What a step takes; all that ZigZag needs to know of the array's energy is that it is constant.
    words = (
        lanes * columns * precision.weight_bits,
        lanes * precision.activation.stored_bits,
        columns * model.partial_sum_bits.value,
    )
    hierarchy = MemoryHierarchy(
        MultiplierArray(Multiplier(0.0, 0.0), {_ROWS: lanes, _COLUMNS: columns})
    )
    for operand, half, word, energy in zip(
        _OPERANDS, model.half_buffer_bits, words, model.buffer_energies, strict=True
    ):
        _add_memory(hierarchy, (operand,), 2 * half, max(word, bandwidth), energy)
    energy = (model.dram_energy_pj_per_bit.value,) * 2
    _add_memory(hierarchy, _OPERANDS, _DRAM_BITS, bandwidth, energy)
    return Accelerator(0, "array", hierarchy.operational_array, hierarchy)


def _add_memory(
    hierarchy: Any,
    operands: tuple[Any, ...],
    size_bits: int,
    bits_per_cycle: int,
    energy: tuple[float, float],
) -> None:
    """Add a buffer with a port for each direction, or a memory that all share through one port."""
    shared = len(operands) > 1
    ports = []
    if shared:
        ports.append(MemoryPort("rw_port_1", MemoryPortType.READ_WRITE, 1, bits_per_cycle))
    allocation: dict[Any, dict[Any, str]] = {}
    for operand in operands:
        directions = allocation.setdefault(_MEMORY_OPERAND[operand], {})
        for direction in _DIRECTIONS[operand]:
            if not shared:
                reads = direction in _READS
                kind = MemoryPortType.READ if reads else MemoryPortType.WRITE
                name = f"{'r' if reads else 'w'}_port_{len(ports) + 1}"
                ports.append(MemoryPort(name, kind, 1, bits_per_cycle))
            directions[direction] = ports[-1].name
    memory = MemoryInstance(
        "dram" if shared else f"buffer_{operands[0].name}",
        size_bits,
        r_cost=energy[0] * bits_per_cycle,
        w_cost=energy[1] * bits_per_cycle,
        ports=tuple(ports),
        force_double_buffering=not shared,
    )
    served = ServedMemDimensions({_ROWS, _COLUMNS})
    hierarchy.add_memory(memory, list(allocation), PortAllocation(allocation), served)


def _layer(
    sizes: Mapping[Any, int],
    problem: Problem,
    model: BitFusion,
    precision: Precision,
    spatial: Any,
) -> Any:
    windows = zip((IY, IX), (OY, OX), (FY, FX), problem.stride, problem.dilation, strict=True)
    outputs = model.partial_sum_bits.value
    widths = {
        _WEIGHTS: precision.weight_bits,
        _INPUTS: precision.activation.stored_bits,
        _OUTPUTS: outputs,
        LayerOperand("O_final"): outputs,
    }
    return _Convolution(
        0,
        "layer",
        LayerNodeAttributes(
            layer_type="Conv",
            equation=LayerEquation(_EQUATION),
            layer_dim_sizes=LayerDimSizes(dict(sizes)),
            operand_precision=LayerOperandPrecision(widths),
            dimension_relations=[LayerDimRelation(*window) for window in windows],
            padding=LayerPadding({}),
            constant_operands=[_WEIGHTS],
            input_operand_source={},
            pr_layer_dim_sizes=None,
        ),
        MappingAttributes(
            spatial_mapping=spatial,
            spatial_mapping_hint=SpatialMappingHint.empty(),
            memory_operand_links=MemoryOperandLinks(dict(_MEMORY_OPERAND)),
            temporal_ordering=LayerTemporalOrdering([]),
        ),
    )


def _evaluations(accelerator: Any, layer: Any, cycles_per_step: int) -> Iterator[Any]:
    """Costs of mappings that differ in what the buffers hold."""
    stage = SpatialMappingConversionStage([CostModelStage], accelerator=accelerator, layer=layer)
    spatial, spatial_integer = stage.convert_user_spatial_mapping(layer.spatial_mapping)
    unrolling = dict(spatial.spatial_loop_dim_size)
    seen = set()
    for order in _loop_orders(accelerator, layer, unrolling):
        allocator = MemoryAllocator(
            accelerator, layer, spatial, list(order), TemporalMappingType.UNEVEN
        )
        temporal = allocator.run()
        contents = tuple(
            tuple(sorted((dim.name, size) for dim, size in levels[_BUFFER]))
            for levels in temporal.mapping_dic_stationary.values()
        )
        if contents in seen:
            continue
        seen.add(contents)
        yield CostModelEvaluation(
            accelerator=accelerator,
            layer=layer,
            spatial_mapping=spatial,
            spatial_mapping_int=spatial_integer,
            temporal_mapping=temporal,
            # Else the energy of the buffers depends on the order of loops inside a tile.
            access_same_data_considered_as_no_access=False,
            cycles_per_op=cycles_per_step,
        )


def _loop_orders(
    accelerator: Any, layer: Any, unrolling: Mapping[Any, float]
) -> Iterator[list[tuple[Any, int]]]:
    """Loops from the innermost out: those of a tile, and those over the tiles in every order.

    The kernel's loops are inside the tile, or over the tiles where no tile fits that has them all.
    """
    loops = {
        dim: math.ceil(size / unrolling.get(dim, 1))
        for dim, size in layer.layer_dim_sizes.data.items()
    }
    kernel = {dim: loops[dim] for dim in _KERNEL_LOOPS}
    nests: tuple[tuple[Any, ...], ...] = _TILED_LOOPS
    tiles = _largest_tiles(accelerator, layer, unrolling, loops, kernel)
    if not tiles:
        kernel, nests = dict.fromkeys(_KERNEL_LOOPS, 1), (*_TILED_LOOPS, _KERNEL_LOOPS)
        step = dict.fromkeys((dim for nest in _TILED_LOOPS for dim in nest), 1)
        tiles = _largest_tiles(accelerator, layer, unrolling, loops, kernel) or [step]
    for tile in tiles:
        inside = {**kernel, **tile}
        for order in permutations(nests):
            outer = [(dim, loops[dim] // inside[dim]) for nest in order for dim in nest]
            found = [loop for loop in (*inside.items(), *outer) if loop[1] > 1]
            yield found or [(FX, 1)]


def _largest_tiles(
    accelerator: Any,
    layer: Any,
    unrolling: Mapping[Any, float],
    loops: Mapping[Any, int],
    kernel: Tile,
) -> list[Tile]:
    """Tiles that fit half of each buffer together with loops of the kernel, and lie in no other."""
    axes = [_nested_tiles({dim: loops[dim] for dim in nest}) for nest in _TILED_LOOPS]
    tiles = {
        place: {
            dim: size
            for axis, position in zip(axes, place, strict=True)
            for dim, size in axis[position].items()
        }
        for place in product(*(range(len(axis)) for axis in axes))
    }
    capacity = {
        operand: accelerator.get_memory_level(
            _MEMORY_OPERAND[operand], _BUFFER
        ).memory_instance.size
        for operand in _OPERANDS
    }

    def fits(tile: Tile) -> bool:
        steps = {**kernel, **tile}
        covered = LayerDimSizes({dim: n * unrolling.get(dim, 1) for dim, n in steps.items()})
        return all(
            2 * layer.calc_tensor_size(operand, covered) * layer.operand_precision[operand] <= bits
            for operand, bits in capacity.items()
        )

    fitting = {place for place, tile in tiles.items() if fits(tile)}

    def grows(place: tuple[int, ...]) -> bool:
        return any((*place[:i], n + 1, *place[i + 1 :]) in fitting for i, n in enumerate(place))

    return [tiles[place] for place in sorted(fitting) if not grows(place)]


def _nested_tiles(loops: Tile) -> list[Tile]:
    """Growing tiles over nested loops: an outer one is split once those inside it are whole."""
    tiles: list[Tile] = [dict.fromkeys(loops, 1)]
    for dim, size in loops.items():
        tiles += [{**tiles[-1], dim: divisor} for divisor in _divisors(size)]
    return tiles


def _divisors(number: int) -> Iterable[int]:
    return (divisor for divisor in range(2, number + 1) if number % divisor == 0)
