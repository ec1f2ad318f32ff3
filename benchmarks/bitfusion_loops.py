"""The equations of the public Bit Fusion simulator in plain loops, one tiling and order at a time.

Slow, and plain enough to be checked by eye: the peer of ``bitwright.targets.bitfusion`` in the
benchmark of costs and in its tests. For convolutions of two dimensions without groups, and matrix
products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from bitwright import Layer, Precision
from bitwright.targets import Accelerator


def powers(size: float) -> Iterator[int]:
    """1, 2, 4, ... up to the first that is not below the size."""
    yield from itertools.takewhile(
        lambda power: power < 2 * max(size, 1), (2**e for e in itertools.count())
    )


def cheapest(
    accelerator: Accelerator, layer: Layer, precision: Precision, im2col: bool
) -> tuple[int, int, int, int]:
    """Cycles, stall cycles and DRAM bits read and written of the best tiling and loop order."""
    model: Any = accelerator.cost_model
    rows, columns = model.array_rows.value, model.array_columns.value
    bandwidth = model.dram_bits_per_cycle.value
    halves = [
        1024 * 8 * getattr(model, f"{name}_buffer_kib").value // 2
        for name in ("weight", "input", "output")
    ]
    ib, wb = precision.activation_bits, precision.weight_bits
    lanes = rows * max(1, 8 // max(ib, 2)) * max(1, 8 // max(wb, 2))
    steps = math.ceil(ib / 8) * math.ceil(wb / 8)
    batch, ic, oc = layer.batch or 0, layer.in_channels, layer.out_channels
    kh, kw = layer.kernel or (1, 1)
    oh, ow = (size or 0 for size in layer.output or (1, 1))
    stride, dilation = layer.stride or (1, 1), layer.dilation or (1, 1)
    sizes = {"b": batch, "h": oh, "w": ow, "i": ic, "o": oc}
    step = 1 if im2col else columns
    best: Any = None
    for images, side, channels, power in itertools.product(
        powers(batch), powers(max(oh, ow)), powers(ic), powers(oc / step)
    ):
        to, tb, ti = step * power, min(images, batch), min(channels, ic)
        th, tw = min(side, oh), min(side, ow)
        if im2col:
            compute = tb * th * tw * math.ceil(to / columns) * math.ceil(kh * kw * ti / lanes)
            inputs = th * tw * kh * kw * ti * tb * ib
        else:
            compute = tb * th * tw * math.ceil(to / columns) * kh * kw * math.ceil(ti / lanes)
            ih = dilation[0] * (kh - 1) + 1 + (th - 1) * stride[0]
            iw = dilation[1] * (kw - 1) + 1 + (tw - 1) * stride[1]
            inputs = ih * iw * ti * tb * ib
        weights = math.ceil(kh * kw * ti / lanes) * lanes * to * wb
        outputs = tb * th * tw * math.ceil(to / columns) * columns * 32
        tiles = {"b": tb, "h": th, "w": tw, "i": ti, "o": to}
        if any(t > half for t, half in zip((weights, inputs, outputs), halves, strict=True)):
            continue
        counts = {name: math.ceil(sizes[name] / tiles[name]) for name in sizes}
        compute *= steps * math.prod(counts.values())
        for order in itertools.permutations(sizes):
            found = []
            for tile, half, depends in zip(
                (weights, inputs, outputs), halves, ("io", "bhwi", "bhwo"), strict=True
            ):
                kept = moved = tile
                promoted = True
                for loop in order:
                    if promoted and loop in depends:
                        moved *= counts[loop]
                        promoted = moved <= half
                        kept = moved if promoted else kept
                    elif not promoted:
                        moved *= counts[loop]
                found.append((moved, kept))
            read, write = sum(moved for moved, _ in found), found[2][0]
            first, last = sum(kept for _, kept in found), found[2][1]
            latency = math.ceil(first / bandwidth) + math.ceil(last / bandwidth)
            middle = math.ceil((read + write - first - last) / bandwidth)
            stalls = max(0, middle - compute) + latency
            key = (compute + stalls, read + write, read, compute)
            if best is None or key < best[0]:
                best = key, (compute + stalls, stalls, read, write)
    numbers: tuple[int, int, int, int] = best[1]
    return numbers
