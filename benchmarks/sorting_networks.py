"""Sorting networks that do what the sorting unit does: peers for its area.

Same ports, same result, one window a cycle and three cycles as well: keys, the first half of the
network, the second. Bubble sort compares neighbours and is stable by itself. Bitonic sort (Batcher,
"Sorting networks and their applications", 1968; for any number of terms) is not, so it compares the
indices along with the keys. Keys are those of an exact unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from amaranth.back.verilog import convert
from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal

from bitwright.targets.sorting_circuit import Gates, bucket_code, constant
from bitwright.targets.sorting_unit import SortingUnit

Network = Literal["bubble", "bitonic"]
Comparator = tuple[int, int]
"""Two places; the larger number goes to the second."""


def bubble(terms: int) -> list[Comparator]:
    """The comparators of bubble sort."""
    return [(i, i + 1) for end in range(terms - 1, 0, -1) for i in range(end)]


def bitonic(terms: int) -> list[Comparator]:
    """The comparators of bitonic sort."""

    def sort(low: int, count: int, *, up: bool) -> list[Comparator]:
        if count < 2:
            return []
        half = count // 2
        return [
            *sort(low, half, up=not up),
            *sort(low + half, count - half, up=up),
            *merge(low, count, up=up),
        ]

    def merge(low: int, count: int, *, up: bool) -> list[Comparator]:
        if count < 2:
            return []
        step = 1 << (count - 1).bit_length() - 1  # the largest power of two below count
        pairs = [(i, i + step) for i in range(low, low + count - step)]
        return [
            *(pairs if up else [(b, a) for a, b in pairs]),
            *merge(low, step, up=up),
            *merge(low + step, count - step, up=up),
        ]

    return sort(0, terms, up=True)


def in_second_half(terms: int, comparators: Sequence[Comparator]) -> list[bool]:
    """Whether a comparator lies behind the middle of the longest path."""
    depth, found = [0] * terms, []
    for a, b in comparators:
        depth[a] = depth[b] = max(depth[a], depth[b]) + 1
        found.append(depth[a])
    return [2 * level > max(found) for level in found]


class SortingNetwork(Elaboratable):  # type: ignore[misc]  # Amaranth is not typed
    """A network beside a unit: the same ports and parameters."""

    def __init__(self, unit: SortingUnit, network: Network) -> None:
        self.unit, self.network = unit, network
        self.valid = Signal()
        self.words = Signal(unit.window * unit.word_bits)
        self.permutation_valid = Signal()
        self.permutation = Signal(unit.window * unit.index_bits, reset_less=True)
        self.ports = [self.valid, self.words, self.permutation_valid, self.permutation]

    def verilog(self) -> str:
        """The circuit in Verilog."""
        text: str = convert(self, name=self.network, ports=self.ports, emit_src=False)
        return text

    def elaborate(self, platform: object) -> Module:  # noqa: ARG002 - Amaranth's signature
        """Build the circuit."""
        unit, gates = self.unit, Gates()
        early, late = Signal(), Signal()
        gates.module.d.sync += [
            early.eq(self.valid),
            late.eq(early),
            self.permutation_valid.eq(late),
        ]
        stable = self.network == "bubble"
        comparators = (bubble if stable else bitonic)(unit.window)
        terms: list[tuple[Any, Any]] = []
        for i in range(unit.window):
            word = self.words.word_select(i, unit.word_bits)
            key = gates.register("key", bucket_code(gates, word, unit))
            terms.append((~key if unit.descending else key, constant(i, unit.index_bits)))
        behind = False
        for (a, b), second in zip(
            comparators, in_second_half(unit.window, comparators), strict=True
        ):
            if second and not behind:
                behind = True
                terms = [(gates.register("key", k), gates.register("index", i)) for k, i in terms]
            terms[a], terms[b] = self.compare(gates, terms[a], terms[b], stable=stable)
        gates.module.d.sync += self.permutation.eq(Cat(*(Cat(index) for _, index in terms)))
        return gates.module

    @staticmethod
    def compare(
        gates: Gates, first: tuple[Any, Any], second: tuple[Any, Any], *, stable: bool
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Exchange two terms if the first is the larger one."""
        keys, indices = zip(first, second, strict=True)
        small: Any = 0  # whether the second is smaller, from the lowest bit up
        pairs = list(zip(*keys, strict=True))
        for a, b in pairs if stable else [*zip(*indices, strict=True), *pairs]:
            small = gates.wire("small", [(a & ~b) | ((a | ~b) & small)])[0]
        found = []
        for one, other in (keys, indices):
            pair = list(zip(one, other, strict=True))
            found.append(
                (
                    gates.wire("low", [Mux(small, b, a) for a, b in pair]),
                    gates.wire("high", [Mux(small, a, b) for a, b in pair]),
                )
            )
        (key_a, key_b), (index_a, index_b) = found
        return (key_a, index_a), (key_b, index_b)
