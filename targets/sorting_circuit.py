"""The circuit of the sorting unit, in Amaranth.

First stage: the bucket of each word. Second and third stage: the place of each term, that is the
start of its bucket plus its rank there, and the index of the term at each place.

Places are counted by *cursors*, one a bucket: the place of the bucket's next term. A cursor goes
from term to term, two at a time, and from the start of its bucket up. It may as well go from the
last term to the first and from the end of its bucket down, which gives the same places: then two
neighbours share the border between them, and the outermost need none, as the window's ends are
known.

- Starts that are *counted*: the second stage counts the terms in front of every second border. All
  cursors go at once, in the third stage; between the two stages lie only buckets and borders.
- Starts that are *chained*: nothing is counted. Where a cursor ends its neighbour begins, from both
  ends of the window to the middle, in the second stage; the third has the scatter alone.

Sums are written out bit by bit: what synthesis makes of ``+`` is built for speed, and larger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, Any, TypeAlias

from amaranth.hdl import C, Cat, Elaboratable, Module, Signal

if TYPE_CHECKING:
    from bitwright.targets.sorting_unit import SortingUnit

__all__ = ["SortingCircuit"]

Bit: TypeAlias = Any  # a value of Amaranth, one bit wide
Bits: TypeAlias = Sequence[Bit]
"""A number, the lowest bit first."""


class SortingCircuit(Elaboratable):
    """The circuit of a sorting unit.

    Parameters
    ----------
    unit
        What it does.

    Attributes
    ----------
    valid, words
        Input: whether there is a window, and its words, the first one in the lowest bits.
    permutation_valid, permutation
        Output, three cycles later: for each place, the first one in the lowest bits, the index of
        the term that goes there.
    """

    def __init__(self, unit: SortingUnit) -> None:
        self.unit = unit
        self.valid = Signal()
        self.words = Signal(unit.window * unit.word_bits)
        self.permutation_valid = Signal()
        self.permutation = Signal(unit.window * unit.index_bits, reset_less=True)
        self.ports = [self.valid, self.words, self.permutation_valid, self.permutation]

    def elaborate(self, platform: object) -> Module:  # noqa: ARG002 - Amaranth's signature
        """Build the circuit."""
        unit, gates = self.unit, Gates()
        early, late = Signal(name="valid_1"), Signal(name="valid_2")
        gates.module.d.sync += [
            early.eq(self.valid),
            late.eq(early),
            self.permutation_valid.eq(late),
        ]
        words = [self.words.word_select(i, unit.word_bits) for i in range(unit.window)]
        buckets = [gates.register("bucket", bucket_code(gates, word, unit)) for word in words]
        ends = {
            0: constant(0, unit.index_bits),
            unit.buckets: constant(unit.window, unit.index_bits),
        }
        if unit.starts == "counted":
            members = one_hot(gates, buckets, unit)
            for border in range(2, unit.buckets, 2):
                before = [reduce(or_, bits[:border]) for bits in members]
                count = count_ones(gates, before)[: unit.index_bits]
                ends[border] = gates.register("border", count)
            buckets = [gates.register("bucket_again", bits) for bits in buckets]
            places = find_places(gates, one_hot(gates, buckets, unit), ends)
        else:
            places = find_places(gates, one_hot(gates, buckets, unit), ends)
            places = [gates.register("place", bits) for bits in places]
        indices = scatter(gates, places)
        gates.module.d.sync += self.permutation.eq(Cat(indices))
        return gates.module


class Gates:
    """Names what a circuit is made of, and gives it to a module."""

    def __init__(self) -> None:
        self.module = Module()
        self._names: Counter[str] = Counter()

    def _signal(self, name: str, width: int) -> Signal:
        self._names[name] += 1
        return Signal(width, name=f"{name}_{self._names[name] - 1}", reset_less=True)

    def wire(self, name: str, bits: Bits) -> Signal:
        """Give a value a name, so that it is made once."""
        signal = self._signal(name, len(bits))
        self.module.d.comb += signal.eq(Cat(bits))
        return signal

    def register(self, name: str, bits: Bits) -> Signal:
        """The value, one cycle later."""
        signal = self._signal(name, len(bits))
        self.module.d.sync += signal.eq(Cat(bits))
        return signal

    def full_adder(self, a: Bit, b: Bit, c: Bit) -> tuple[Bit, Bit]:
        """Sum and carry of three bits."""
        either = self.wire("either", [a ^ b])
        total = self.wire("sum", [either ^ c, (a & b) | (either & c)])
        return total[0], total[1]

    def half_adder(self, a: Bit, b: Bit) -> tuple[Bit, Bit]:
        """Sum and carry of two bits."""
        total = self.wire("sum", [a ^ b, a & b])
        return total[0], total[1]


def constant(value: int, width: int) -> Bits:
    """The lowest bits of a number."""
    return [C(value >> bit & 1, 1) for bit in range(width)]


# -- first stage: keys and buckets ---------------------------------------------------------------


def codes(unit: SortingUnit) -> list[int]:
    """The code that stands for each bucket, in the order of places.

    Binary if the key is the bucket, the top bits of it, and else reflected Gray code, which takes
    fewer gates to make from thresholds.
    """
    found = [b if takes_top_bits(unit) else b ^ b >> 1 for b in range(unit.buckets)]
    return found[::-1] if unit.descending else found


def takes_top_bits(unit: SortingUnit) -> bool:
    """Whether the bucket is the key, or the key without some of its low bits."""
    step = unit.thresholds[0]
    return not step & (step - 1) and unit.bucket_map == tuple(
        key // step for key in range(len(unit.bucket_map))
    )


def bucket_code(gates: Gates, word: Signal, unit: SortingUnit) -> Bits:
    """The code of a word's bucket."""
    bits: Bits = list(word)
    if unit.key == "gray-rank":
        rank = [bits[-1]]  # the XOR of a bit and all above it, from the highest down
        for bit in bits[-2::-1]:
            rank.insert(0, gates.wire("rank", [rank[0] ^ bit]))
        bits = rank
    if takes_top_bits(unit):
        step = unit.thresholds[0].bit_length() - 1
        return (count_ones(gates, bits) if unit.key == "popcount" else bits)[step:]
    if unit.key == "popcount":
        flags = at_least(gates, bits, unit.thresholds)
    else:
        flags = [not_below(bits, threshold) for threshold in unit.thresholds]
    above: Bits = gates.wire("above", flags)
    width = (unit.buckets - 1).bit_length()
    coded = []
    for bit in range(width):
        # A bit of the Gray code is set from 2^bit up to 3*2^bit, and so on every 4*2^bit.
        parts = []
        for start in range(1 << bit, unit.buckets, 4 << bit):
            end = start + (2 << bit)
            part = above[start - 1]
            parts.append(part & ~above[end - 1] if end < unit.buckets else part)
        coded.append(reduce(or_, parts))
    return coded


def not_below(bits: Bits, threshold: int) -> Bit:
    """Whether a number is at least a constant."""
    reached: Bit = C(1, 1)
    for place, bit in enumerate(bits):
        reached = (bit & reached) if threshold >> place & 1 else (bit | reached)
    return reached


def count_ones(gates: Gates, bits: Bits) -> Bits:
    """The number of ones.

    A tree of full adders: it takes the area of the published form, tables of four bits whose
    entries are added, and does for other widths as well.
    """
    column, total = list(bits), []
    while column:
        carries = []
        while len(column) > 1:
            if len(column) > 2:
                low, carry = gates.full_adder(*column[:3])
            else:
                low, carry = gates.half_adder(*column)
            column = [*column[3:], low]
            carries.append(carry)
        total.append(column[0])
        column = carries
    return total


def at_least(gates: Gates, bits: Bits, thresholds: Sequence[int], ordered: Bits = ()) -> Bits:
    """Whether so many bits are set, for each of some rising thresholds.

    Parameters
    ----------
    gates
        What it is built of.
    bits
        What is counted.
    thresholds
        Numbers of ones.
    ordered
        More bits to be counted, ones in front.
    """
    column = [*bits, *ordered]
    if len(column) <= 4 or len({threshold % 2 for threshold in thresholds}) > 1:
        ones = [C(1, 1), *merged(gates, ordered_bits(gates, bits), ordered)]
        return [ones[threshold] for threshold in thresholds]
    # All odd or all even: nothing depends on the lowest bit of the count, only on the carries to
    # the next (with one more added if the thresholds are odd).
    odd, carries = thresholds[0] % 2, []
    while len(column) > 4:
        low, carry = gates.full_adder(*column[:3])
        column = [*column[3:], low]
        carries.append(carry)
    pairs = ordered_bits(gates, column)[1 - odd :: 2]
    return at_least(gates, carries, [(threshold + odd) // 2 for threshold in thresholds], pairs)


def ordered_bits(gates: Gates, bits: Bits) -> Bits:
    """As many ones, in front: whether one is set, two, three and so on."""
    if len(bits) < 2:
        return bits
    middle = len(bits) // 2
    return merged(gates, *(ordered_bits(gates, half) for half in (bits[:middle], bits[middle:])))


def merged(gates: Gates, left: Bits, right: Bits) -> Bits:
    """As many ones as in both, in front; in both they are in front."""
    left, right, ways = [C(1, 1), *left], [C(1, 1), *right], []
    for ones in range(1, len(left) + len(right) - 1):
        pairs = [(i, ones - i) for i in range(len(left)) if 0 <= ones - i < len(right)]
        ways.append(reduce(or_, (left[i] & right[j] for i, j in pairs)))
    found: Bits = gates.wire("ones", ways)
    return found


# -- second stage: places -------------------------------------------------------------------------


def one_hot(gates: Gates, buckets: Sequence[Signal], unit: SortingUnit) -> list[Bits]:
    """For each term, for each bucket in the order of places: whether the term is in it."""
    patterns = [pattern(code, codes(unit)) for code in codes(unit)]
    found = []
    for bucket in buckets:
        tests = [
            reduce(and_, (bucket[bit] if value else ~bucket[bit] for bit, value in tested.items()))
            for tested in patterns
        ]
        found.append(gates.wire("member", tests))
    return found


def pattern(code: int, all_codes: Sequence[int]) -> dict[int, int]:
    """Bits, and their values, that tell a code from all others that occur."""
    tested = {bit: code >> bit & 1 for bit in range(max(all_codes).bit_length())}
    for bit in list(tested):
        fewer = {b: value for b, value in tested.items() if b != bit}
        if fewer and all(
            other == code or any(other >> b & 1 != value for b, value in fewer.items())
            for other in all_codes
        ):
            tested = fewer
    return tested


def find_places(gates: Gates, members: Sequence[Bits], ends: dict[int, Bits]) -> list[Bits]:
    """The place of each term.

    Parameters
    ----------
    gates
        What it is built of.
    members
        For each term, for each bucket: whether the term is in it.
    ends
        Borders that are known: the number of terms in front of a bucket.
    """
    terms, buckets = len(members), len(members[0])
    groups = [range(max(i, 0), i + 2) for i in range(-(terms % 2), terms, 2)]  # pairs, from the end
    cursors: dict[int, list[Bits]] = {}
    known = dict(ends)
    # From both ends of the window to the middle, a cursor goes on from a border that is known.
    order = sorted(range(buckets), key=lambda bucket: min(bucket, buckets - 1 - bucket))
    for bucket in order:
        up = bucket in known
        cursor = known[bucket] if up else known[bucket + 1]
        found = []
        for group in groups if up else groups[::-1]:
            moved = move(gates, cursor, [members[i][bucket] for i in group], up=up)
            found.append(cursor if up else moved)
            cursor = moved
        known.setdefault(bucket + 1 if up else bucket, cursor)
        cursors[bucket] = found if up else found[::-1]
    places: list[Bits] = []
    for number, group in enumerate(groups):
        for i in group:
            chosen = [
                reduce(or_, (members[i][b] & cursors[b][number][bit] for b in range(buckets)))
                for bit in range(len(ends[0]))
            ]
            place: Bits = gates.wire("first", chosen)
            if i > group.start:
                same = [members[i - 1][b] & members[i][b] for b in range(buckets)]
                place = move(gates, place, [reduce(or_, same)], up=True)
            places.append(place)
    return places


def move(gates: Gates, cursor: Bits, steps: Bits, *, up: bool) -> Bits:
    """Add one or two bits to a cursor, or take them off."""
    # Downwards: the complement of the sum of the complement.
    bits = list(cursor) if up else [~bit for bit in cursor]
    add = gates.full_adder if len(steps) == 2 else gates.half_adder
    low, carry = add(bits[0], *steps)
    moved = [low]
    for bit in bits[1:]:
        low, carry = gates.half_adder(bit, carry)
        moved.append(low)
    found: Bits = gates.wire("cursor", moved if up else [~bit for bit in moved])
    return found


# -- third stage: scatter -------------------------------------------------------------------------


def scatter(gates: Gates, places: Sequence[Bits]) -> list[Bit]:
    """For each place, the index of the term that has it; one number behind the other."""
    terms, width = len(places), len(places[0])
    low = (width + 1) // 2
    decoded = []
    for bits in places:
        halves = bits[:low], bits[low:]
        decoded.append([gates.wire("digit", decoder(Cat(half))) for half in halves])
    indices: list[Bit] = []
    for place in range(terms):
        hit = [digits[0][place % (1 << low)] & digits[1][place >> low] for digits in decoded]
        level: Bits = gates.wire("hit", hit)
        for _ in range(width):
            # A bit of the index is set by every second entry; then neighbours become one.
            indices.append(reduce(or_, level[1::2]))
            level = gates.wire(
                "hit", [reduce(or_, level[i : i + 2]) for i in range(0, len(level), 2)]
            )
    return indices


def decoder(number: Signal) -> Bits:
    """For each value of a number: whether it is that."""
    return [number == value for value in range(1 << len(number))]
