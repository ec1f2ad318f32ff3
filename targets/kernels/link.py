"""Kernels of links: what a layer sends, ordered, counted, and added up from what arrives.

``targets/link.py`` and ``targets/orders.py`` say in NumPy what is computed here, of these parts:

Ranks. The stable counting sort gives a term the number of terms with a smaller key, plus that of
earlier terms with the same. Both are counted by comparing all pairs of a window's keys, with a
window in every lane of a vector: no histogram, so any number of buckets takes the same time. Where
words are ordered and nothing else, counters of few buckets are fields of one 64-bit number.

Streams. The flits of a part are appended to a buffer of fixed size. When it is full they are
counted, and what the next flits are compared with goes to its front.

Counts. Carry-save adders add up bits of eight rows of flits at a time, so a bit costs about one
instruction in a vector of 32 bytes; then the sums of eights are added up bit by bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.errors import UsageError
from bitwright.soft_edge import SoftEdge
from bitwright.targets.kernels import emit, host, soft_edge
from bitwright.targets.kernels.emit import Buffer, Expr, ceil_div, round_up
from bitwright.targets.kernels.spec import ActivationType
from bitwright.targets.link import Link, Loop, Part, Traffic
from bitwright.targets.orders import Order

__all__ = [
    "LayerKernel",
    "LayerTransitions",
    "count_transitions",
    "kernel",
    "layer_transitions",
    "positions",
    "positions_kernel",
    "reorder",
]

_LANES: Final = 32  # windows that are ranked at once, one a lane
_VECTOR: Final = 32  # bytes of a vector of flits
_ROWS: Final = 8  # rows of flits that are added up at once
_MOST_GROUPS: Final = 255  # sums of eights are bytes
_CHUNK: Final = 16 * 1024  # bytes of flits before they are counted: half of a first-level cache
_TASKS: Final = 8  # parts of a batch
_LONGEST_WINDOW: Final = 256  # places are bytes
_PARTS: Final[tuple[Part, ...]] = ("inputs", "weights", "index")

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerKernel:
    """What the kernel of a layer's traffic is built for; sizes are known when it runs.

    Attributes
    ----------
    flit, word_bits, lanes, packing, loops, reuse, window
        As in :class:`Link`.
    on
        Whose words say how a window is ordered. ``weights``: the places that the kernel takes
        (those of an unordered window are 0, 1, 2, ...). ``inputs``: the table that it takes, and
        weights move along. ``separated``: weights by the places, inputs by the table. ``nearest``:
        the greedy nearest neighbour, which needs neither.
    snake
        As in :class:`Order`.
    data, weight
        Types of the codes of both operands.
    accumulator_bits
        Width of the sums.
    data_layout, weight_layout
        Of operands that are soft-edge codes.
    """

    flit: Literal["paired", "separate"]
    word_bits: int
    lanes: int
    packing: Literal["row-major", "column-major"]
    loops: tuple[Loop, Loop, Loop]
    reuse: bool
    window: int
    on: Literal["weights", "inputs", "separated", "nearest"]
    snake: bool
    data: ActivationType
    weight: ActivationType
    accumulator_bits: Literal[32, 64]
    data_layout: SoftEdge | None = None
    weight_layout: SoftEdge | None = None

    @classmethod
    def of(
        cls,
        link: Link,
        order: Order,
        data: ActivationType,
        weight: ActivationType,
        accumulator_bits: Literal[32, 64],
        layouts: tuple[SoftEdge | None, SoftEdge | None] = (None, None),
    ) -> LayerKernel:
        """For an order on a link.

        Raises
        ------
        UsageError
            If the link cannot have the order for any layer.
        """
        link.check(order, channels=1, positions=1, chunks=1)
        on: Literal["weights", "inputs", "separated", "nearest"] = "weights"
        if order.key == "nearest":
            on = "nearest"
        elif order.is_sorted:
            on = order.on
        return cls(
            link.flit,
            link.word_bits.value,
            link.lanes.value,
            link.packing,
            link.loops,
            link.reuse,
            link.window.value,
            on,
            order.snake,
            data,
            weight,
            accumulator_bits,
            *layouts,
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is counted."""
        return _PARTS if self.on == "separated" else _PARTS[:2]

    @property
    def counts_shape(self) -> tuple[int, int, int]:
        """Shape of the counts: parts, lanes, bits.

        A flit of indices has twice as many lanes where operands share theirs.
        """
        both = self.on == "separated" and self.flit == "paired"
        return len(_PARTS), self.lanes * (2 if both else 1), self.word_bits

    @property
    def uses_places(self) -> bool:
        """Whether the places are read."""
        return self.on in ("weights", "separated")

    @property
    def uses_table(self) -> bool:
        """Whether the kernel takes a table."""
        return self.on in ("inputs", "separated")


# --------------------------------------------------------------------------- small things


def _word_dtype(word_bits: int) -> Literal["uint8", "uint16"]:
    return "uint8" if word_bits <= 8 else "uint16"


def _int(value: int) -> Expr:
    return tirx.IntImm("int64", value)


def _at(buffer: Buffer, offset: Expr) -> Expr:
    """Read a number as an index."""
    return emit.cast(buffer[emit.index(offset)], "int64", 1)


def _put(buffer: Buffer, offset: Expr, value: Expr) -> None:
    """Write a number."""
    T.buffer_store(buffer, emit.cast(emit.index(value), buffer.dtype, 1), [emit.index(offset)])


class _Counter:
    """An index that changes."""

    def __init__(self, value: Expr = 0) -> None:
        self._buffer = emit.allocate(1, "int64", registers=True)
        self.set(value)

    def set(self, value: Expr) -> None:
        _put(self._buffer, 0, value)

    def add(self, value: Expr) -> None:
        self.set(self.get() + value)

    def get(self) -> Expr:
        """Its value, as it is now."""
        return emit.bind(self._buffer[_int(0)])


def _word(code: Expr, word_bits: int) -> Expr:
    """A code as it is on the wire."""
    dtype = _word_dtype(word_bits)
    word = emit.cast(code, dtype, 1)
    if word_bits in (8, 16):
        return word
    return T.bitwise_and(word, tirx.const((1 << word_bits) - 1, dtype))


def _code(word: Expr, word_bits: int, signed: bool) -> Expr:
    """The code that a word stands for; int32."""
    wide = emit.cast(word, "int32", 1)
    if not signed:
        return wide
    # TVM takes for granted that shifts to the left do not overflow, and simplifies comparisons.
    half = tirx.const(1 << (word_bits - 1), "int32")
    kept = T.bitwise_and(wide, tirx.const((1 << word_bits) - 1, "int32"))
    return T.bitwise_xor(kept, half) - half


# --------------------------------------------------------------------------- ranks


class _Keys:
    """Keys of up to ``_LANES`` windows, and the positions of their terms."""

    def __init__(self, word_bits: int, window: int, table: Buffer) -> None:
        self.dtype = "int8" if word_bits <= 8 else "int16"
        self.bias = 1 << (7 if word_bits <= 8 else 15)
        rows = round_up(window, 4) * _LANES
        self.keys = emit.allocate(rows, self.dtype)
        self.places = emit.allocate(rows, self.dtype)
        # Numbers without signs are compared as numbers with: that takes one instruction.
        self.table = emit.allocate(1 << word_bits, self.dtype)
        with emit.loop(1 << word_bits) as word:
            _put(self.table, word, _at(table, word) - self.bias)

    def set(self, lane: Expr, term: Expr, word: Expr) -> None:
        """Say which word a term is."""
        key = self.table[emit.cast(word, "int64", 1)]
        T.buffer_store(self.keys, key, [emit.index(term * _LANES + lane)])

    def fill(self, lane: Expr, terms: Expr, rows: Expr) -> None:
        """Let terms that a window lacks come last."""
        with emit.loop(rows - terms) as missing:
            _put(self.keys, (terms + missing) * _LANES + lane, self.bias - 1)

    def place(self, lane: Expr, term: Expr) -> Expr:
        """The position of a term, as an index."""
        place = self.places[emit.index(term * _LANES + lane)]
        return emit.cast(emit.cast(place, "uint" + self.dtype[3:], 1), "int64", 1)

    def rank(self, rows: Expr) -> None:
        """Find the positions; ``rows`` is a multiple of four."""

        def vector(buffer: Buffer, term: Expr) -> Expr:
            return emit.bind(emit.load(buffer, term * _LANES, _LANES))

        def larger(a: Expr, b: Expr) -> Expr:
            """-1 where an earlier key is larger than a later one."""
            yes, no = (emit.constant(value, self.dtype, _LANES) for value in (-1, 0))
            return emit.bind(T.Select(a > b, yes, no))

        with emit.loop(rows) as term:
            start = emit.broadcast(emit.cast(term, self.dtype, 1), _LANES)
            emit.store(self.places, term * _LANES, start, _LANES)
        with emit.loop(rows // 4) as group:
            first = emit.bind(group * 4)
            keys = [vector(self.keys, first + row) for row in range(4)]
            sums = emit.allocate(4 * _LANES, self.dtype, registers=True)
            for row in range(4):
                emit.store(sums, row * _LANES, vector(self.places, first + row), _LANES)

            def swap(row: int, before: Expr, total: Expr) -> Expr:
                here = emit.load(sums, row * _LANES, _LANES)
                emit.store(sums, row * _LANES, here - before, _LANES)
                return total + before

            for later in range(1, 4):
                total = emit.load(sums, later * _LANES, _LANES)
                for row in range(later):
                    total = swap(row, larger(keys[row], keys[later]), total)
                emit.store(sums, later * _LANES, total, _LANES)
            with emit.loop(rows - first - 4) as behind:
                term = emit.bind(first + 4 + behind)
                key, total = vector(self.keys, term), vector(self.places, term)
                for row in range(4):
                    total = swap(row, larger(keys[row], key), total)
                emit.store(self.places, term * _LANES, total, _LANES)
            for row in range(4):
                place = (first + row) * _LANES
                emit.store(self.places, place, emit.load(sums, row * _LANES, _LANES), _LANES)


# --------------------------------------------------------------------------- counts


class _Counts:
    """Counts of transitions, bit by bit, in rows of flits.

    A row is as many flits as fill vectors best; what a row's last vector holds of the next one is
    counted and not used.
    """

    def __init__(self, lanes: int, dtype: str) -> None:
        self.bytes = 1 if dtype == "uint8" else 2
        size = lanes * self.bytes
        most = max(1, 256 // size)
        flits = min(
            range(1, most + 1),
            key=lambda flits: (ceil_div(flits * size, _VECTOR) * _VECTOR / (flits * size), flits),
        )
        self.lanes = lanes
        self.row = flits * lanes  # words
        self.group = _ROWS * self.row
        self.vectors = ceil_div(flits * size, _VECTOR)
        self.overreach = self.vectors * _VECTOR // self.bytes
        self.totals = emit.allocate(self.vectors * 8 * _VECTOR, "int64")
        self.eights = emit.allocate(8 * _VECTOR, "uint8")
        with emit.loop(self.vectors * 8 * _VECTOR) as place:
            _put(self.totals, place, 0)

    def add(self, words: Buffer, first: Expr, groups: Expr) -> None:
        """Count the changes of ``groups`` groups of rows, at most 255.

        The words are compared with those a flit later, and up to ``overreach`` behind the last row
        are read.
        """
        with emit.loop(self.vectors) as vector:
            self._add_vector(words, first + vector * (_VECTOR // self.bytes), groups, vector)

    def _add_vector(self, words: Buffer, first: Expr, groups: Expr, vector: Expr) -> None:
        zero = emit.constant(0, "uint8", _VECTOR)
        one = emit.constant(1, "uint8", _VECTOR)
        planes = emit.allocate(3 * _VECTOR, "uint8", registers=True)  # ones, twos, fours
        sums = emit.allocate(8 * _VECTOR, "uint8", registers=True)  # eights, of each bit
        for place in range(3):
            emit.store(planes, place * _VECTOR, zero, _VECTOR)
        for bit in range(8):
            emit.store(sums, bit * _VECTOR, zero, _VECTOR)

        def read(offset: Expr) -> Expr:
            loaded = emit.load(words, offset, _VECTOR // self.bytes)
            return loaded if self.bytes == 1 else emit.reinterpret(loaded, "uint8", _VECTOR)

        def add(a: Expr, b: Expr, c: Expr) -> tuple[Expr, Expr]:
            """Sum and carry of three bits, in every bit."""
            odd = emit.bind(T.bitwise_xor(a, b))
            carry = T.bitwise_or(T.bitwise_and(a, b), T.bitwise_and(odd, c))
            return emit.bind(T.bitwise_xor(odd, c)), emit.bind(carry)

        def bits(plane: Expr, bit: Expr) -> Expr:
            by = emit.broadcast(emit.cast(emit.index(bit), "uint8", 1), _VECTOR)
            return T.bitwise_and(T.shift_right(plane, by), one)

        with emit.loop(groups) as group:
            start = emit.bind(first + group * self.group)
            terms = []
            for row in range(_ROWS):
                here = start + row * self.row
                changed = T.bitwise_xor(read(here), read(here + self.lanes))
                terms.append(emit.bind(changed))
            for place in range(3):
                total = emit.load(planes, place * _VECTOR, _VECTOR)
                carries = []
                for a, b in zip(terms[::2], terms[1::2], strict=True):
                    total, carry = add(total, a, b)
                    carries.append(carry)
                emit.store(planes, place * _VECTOR, total, _VECTOR)
                terms = carries
            (eights,) = terms
            for bit in range(8):
                total = emit.load(sums, bit * _VECTOR, _VECTOR) + bits(eights, bit)
                emit.store(sums, bit * _VECTOR, total, _VECTOR)
        for bit in range(8):
            here = emit.load(sums, bit * _VECTOR, _VECTOR)
            emit.store(self.eights, bit * _VECTOR, here, _VECTOR)
        left = [emit.bind(emit.load(planes, place * _VECTOR, _VECTOR)) for place in range(3)]
        with emit.loop(8) as bit:
            terms = [emit.load(self.eights, bit * _VECTOR, _VECTOR)]
            terms += [bits(plane, bit) for plane in reversed(left)]
            total = emit.constant(0, "uint16", _VECTOR)
            for term in terms:  # eights, fours, twos, ones
                total = total + total + emit.cast(term, "uint16", _VECTOR)
            place = emit.bind((vector * 8 + bit) * _VECTOR)
            before = emit.load(self.totals, place, _VECTOR)
            emit.store(self.totals, place, before + emit.cast(total, "int64", _VECTOR), _VECTOR)

    def collect(self, counts: Buffer, first: Expr, word_bits: int) -> None:
        """Add the counts to int64 ``[lanes, word_bits]`` from ``first`` on."""
        with emit.loop(self.row) as word:
            for bit in range(word_bits):  # LLVM takes longer for a loop
                at = emit.bind(word * self.bytes + bit // 8)
                total = self.totals[
                    emit.index((at // _VECTOR * 8 + bit % 8) * _VECTOR + at % _VECTOR)
                ]
                place = emit.bind(first + word % self.lanes * word_bits + bit)
                _put(counts, place, counts[emit.index(place)] + total)


class _Stream:
    """Flits of a part, in a buffer; those before ``front`` are counted."""

    def __init__(self, lanes: int, slots: int, dtype: str) -> None:
        self.counts = _Counts(lanes, dtype)
        self.lanes = lanes
        self.front = slots + lanes  # a window that is kept, and the flit before
        self.full = self.front + _CHUNK // self.counts.bytes
        most = self.full + _LANES * slots
        assert most // self.counts.group < _MOST_GROUPS
        slack = self.counts.group + self.counts.overreach + lanes
        self.buffer = emit.allocate(most + slack, dtype)
        self.end = _Counter()
        self.flits = _Counter()
        self.turned = _Counter()  # where the slots of the last window are told

    def start(self) -> None:
        """Begin with a flit that is compared with none."""
        self.end.set(self.front - self.lanes)

    def flush(self, last: Expr) -> None:
        """Count if there is no space for more, or if it was the last."""
        group = self.counts.group
        with emit.when(T.Or(self.end.get() > self.full, last)):
            end = self.end.get()
            with emit.loop(group) as place:  # flits that change nothing
                before = self.buffer[emit.index(end + place - self.lanes)]
                T.buffer_store(self.buffer, before, [emit.index(end + place)])
            changes = emit.bind(T.max(end - self.front, _int(0)))
            groups = emit.bind((changes + T.if_then_else(last, _int(group - 1), _int(0))) // group)
            self.counts.add(self.buffer, _int(self.front - self.lanes), groups)
            counted = emit.bind(groups * group)
            with emit.loop(T.max(end - counted, _int(0))) as place:
                kept = self.buffer[emit.index(place + counted)]
                T.buffer_store(self.buffer, kept, [emit.index(place)])
            self.end.set(end - counted)


# --------------------------------------------------------------------------- a layer


def kernel(spec: LayerKernel, name: str = "link_layer") -> Any:
    """Build the kernel of a layer's traffic: it orders, sends, counts and adds up.

    Parameters
    ----------
    spec
        What it is built for.
    name
        Symbol of the function.

    Returns
    -------
    PrimFunc
        ``(x [B, E], w [BW, O, K], bases int32 [P], taps int32 [G, K], places uint8 [BW, O, K],
        table uint16 [2**word_bits], zero_points int32 [2], sums int32 or int64 [B, O, P], counts
        int64 [3, lanes, word_bits], flits int64 [3])``; the table only where ``spec.uses_table``.
        The last three are results, their shapes ``spec.counts_shape``.

    Notes
    -----
    ``x`` holds the codes of padded inputs, flat; ``bases`` and ``taps`` are those of
    :class:`Traffic`. BW is B, or 1 where all samples have the same weights. ``places`` are the
    positions of weights in their windows. Codes have to fit the words (:meth:`Link.words`), and the
    order the link (:meth:`Link.check`): neither is checked here. Samples run in parallel.
    """
    return emit.primitive_function(name, lambda: _Layer(spec).emit())


class _Layer:
    """Emits the kernel of a layer."""

    def __init__(self, spec: LayerKernel) -> None:
        self.spec = spec
        self.dtype = _word_dtype(spec.word_bits)
        self.slots = round_up(spec.window, spec.lanes)
        self.by_rank = spec.on == "separated" or (spec.reuse and spec.snake)

    def emit(self) -> None:
        spec = self.spec
        names = ("batch", "extent", "weight_batch", "channels", "terms", "groups", "positions")
        (
            self.batch,
            self.extent,
            self.weight_batch,
            self.channels,
            self.terms,
            self.groups,
            self.positions,
        ) = sizes = [tirx.Var(name, "int64") for name in names]
        batch, extent, weight_batch, channels, terms, groups, places = sizes
        declared: dict[str, tuple[Sequence[Expr], str]] = {
            "x": ((batch, extent), spec.data),
            "w": ((weight_batch, channels, terms), spec.weight),
            "bases": ((places,), "int32"),
            "taps": ((groups, terms), "int32"),
            "places": ((weight_batch, channels, terms), "uint8"),
        }
        if spec.uses_table:
            declared["table"] = ((_int(1 << spec.word_bits),), "uint16")
        declared["zero_points"] = ((_int(2),), "int32")
        declared["sums"] = ((batch, channels, places), f"int{spec.accumulator_bits}")
        declared["counts"] = ([_int(size) for size in spec.counts_shape], "int64")
        declared["flits"] = ((_int(len(_PARTS)),), "int64")
        buffers = emit.parameters([(name, *what) for name, what in declared.items()], align=1)
        self.args = dict(zip(declared, buffers, strict=True))
        size = math.prod(spec.counts_shape)
        counts = emit.allocate(_TASKS * size, "int64")
        flits = emit.allocate(_TASKS * len(_PARTS), "int64")
        with emit.loop(_TASKS, "parallel") as task:
            self._task(task, counts, flits)
        for name, parts, extent in (("counts", counts, size), ("flits", flits, len(_PARTS))):
            with emit.loop(extent) as place:
                total = parts[emit.index(place)]
                for task in range(1, _TASKS):
                    total = total + parts[emit.index(task * extent + place)]
                _put(self.args[name], place, total)

    def _task(self, task: Expr, counts: Buffer, flits: Buffer) -> None:
        """A part of the batch."""
        spec = self.spec
        _, lanes, bits = spec.counts_shape
        self._lengths()
        self.keys = None
        if spec.uses_table:
            self.keys = _Keys(spec.word_bits, spec.window, self.args["table"])
        self.words = emit.allocate(_LANES * spec.window, self.dtype)
        # Of each window of a block: where its words are, and what it is.
        self.about = {
            name: emit.allocate(_LANES, "int64")
            for name in ("x", "taps", "w", "kind", "sum", "keep_x", "keep_w")
        } | {name: emit.allocate(_LANES, "int64") for name in ("at_x", "at_w", "by_x", "by_w")}
        self.streams = {part: _Stream(spec.lanes, self.slots, self.dtype) for part in _PARTS[:2]}
        if "index" in spec.parts:
            most = spec.window * max(1, (spec.window - 1).bit_length())
            slots = ceil_div(most, lanes * bits) * lanes
            self.streams["index"] = _Stream(lanes, slots + 8, self.dtype)
            self.index = emit.allocate(spec.window, "int32")
        if spec.on == "nearest":
            self.pairs = emit.allocate(spec.window, "uint32")
            self.used = emit.allocate(spec.window, "int32")
            self.near = emit.allocate(spec.window, "int32")
            self.last = emit.allocate(spec.lanes, "uint32")
            self.sent = emit.allocate(spec.lanes, "uint32")
        first = emit.bind(task * self.batch // _TASKS)
        last = emit.bind((task + 1) * self.batch // _TASKS)
        with emit.loop(last - first) as number:
            self._sample(emit.bind(first + number))
        start = emit.bind(task * len(_PARTS))
        with emit.loop(len(_PARTS) * lanes * bits) as place:
            _put(counts, start * (lanes * bits) + place, 0)
        for number, part in enumerate(_PARTS):
            if part in self.streams:
                stream = self.streams[part]
                stream.counts.collect(counts, (start + number) * (lanes * bits), bits)
                _put(flits, start + number, stream.flits.get())
            else:
                _put(flits, start + number, 0)

    def _lengths(self) -> None:
        """Lengths of windows, whole and last, and the slots of their ranks, also in reverse."""
        spec = self.spec
        self.chunks = emit.bind((self.terms + (spec.window - 1)) // spec.window)
        self.length = emit.allocate(2, "int64")
        self.count = emit.allocate(2, "int64")  # flits
        self.width = emit.allocate(2, "int64")  # bits of an index
        self.slot = emit.allocate(4 * self.slots, "int32")
        _put(self.length, 0, emit.lesser(spec.window, self.terms))
        _put(self.length, 1, self.terms - (self.chunks - 1) * spec.window)
        for kind in range(2):
            length = emit.bind(self.length[_int(kind)])
            count = emit.bind((length + (spec.lanes - 1)) // spec.lanes)
            _put(self.count, kind, count)
            width = _int(0)
            for bit in range(8):
                width = width + emit.cast(T.shift_right(length - 1, _int(bit)) > 0, "int64", 1)
            _put(self.width, kind, emit.greater(width, 1))
            with emit.loop(count * spec.lanes) as rank:
                if spec.packing == "row-major":
                    flit, lane = rank // spec.lanes, rank % spec.lanes
                else:
                    flit, lane = rank % count, rank // count
                flit = emit.bind(flit)
                _put(self.slot, 2 * kind * self.slots + rank, flit * spec.lanes + lane)
                turned = (count - 1 - flit) * spec.lanes + lane
                _put(self.slot, (2 * kind + 1) * self.slots + rank, turned)

    def _sample(self, sample: Expr) -> None:
        spec = self.spec
        sums = emit.bind(self.channels * self.positions)
        with emit.loop(sums) as place:
            _put(self.args["sums"], sample * sums + place, 0)
        for stream in self.streams.values():
            stream.start()
        if spec.on == "nearest":
            with emit.loop(spec.lanes) as lane:
                _put(self.sent, lane, 0)
        sizes: dict[Loop, Expr] = {
            "channel": self.channels,
            "position": self.positions,
            "chunk": self.chunks,
        }
        self.loop = {name: _Counter() for name in spec.loops}
        self.before = {name: _Counter(-1) for name in spec.loops}
        total = emit.bind(self.channels * self.positions * self.chunks)
        blocks = emit.bind((total + (_LANES - 1)) // _LANES)
        with emit.loop(blocks) as block:
            first = emit.bind(block * _LANES)
            count = emit.bind(emit.lesser(total - first, _LANES))
            with emit.loop(count) as lane:
                self._describe(sample, lane)
                self._advance(sizes)
            rows = emit.bind((self.length[_int(0)] + 3) // 4 * 4)
            if spec.on != "weights":
                with emit.loop(count) as lane:
                    self._gather(lane, rows)
            if self.keys is not None:
                self.keys.rank(rows)
            with emit.loop(count) as lane:
                self._send(lane, first + lane)
            with emit.loop(count) as lane:
                self._receive(lane)
            last = block == blocks - 1
            for stream in self.streams.values():
                stream.flush(last)

    def _advance(self, sizes: dict[Loop, Expr]) -> None:
        """Go to the next window."""
        outer, middle, inner = self.spec.loops
        self.loop[inner].add(1)
        with emit.when(self.loop[inner].get() == sizes[inner]):
            self.loop[inner].set(0)
            self.loop[middle].add(1)
            with emit.when(self.loop[middle].get() == sizes[middle]):
                self.loop[middle].set(0)
                self.loop[outer].add(1)

    def _describe(self, sample: Expr, lane: Expr) -> None:
        """Note where the words of a window are."""
        spec, about = self.spec, self.about
        channel, position, chunk = (
            self.loop[name].get() for name in ("channel", "position", "chunk")
        )
        group = emit.bind(channel * self.groups // self.channels)
        start = emit.bind(chunk * spec.window)
        weights = emit.bind(emit.lesser(sample, self.weight_batch - 1) * self.channels + channel)
        _put(about["x"], lane, sample * self.extent + _at(self.args["bases"], position))
        _put(about["taps"], lane, group * self.terms + start)
        _put(about["w"], lane, weights * self.terms + start)
        _put(about["kind"], lane, emit.cast(chunk == self.chunks - 1, "int64", 1))
        output = (sample * self.channels + channel) * self.positions + position
        _put(about["sum"], lane, output)
        if spec.reuse:
            before = {name: counter.get() for name, counter in self.before.items()}
            chunk_kept = chunk == before["chunk"]
            group_kept = group == T.floordiv(before["channel"] * self.groups, self.channels)
            keep_x = T.And(T.And(position == before["position"], chunk_kept), group_kept)
            _put(about["keep_x"], lane, emit.cast(keep_x, "int64", 1))
            keep_w = T.And(channel == before["channel"], chunk_kept)
            _put(about["keep_w"], lane, emit.cast(keep_w, "int64", 1))
            for name in spec.loops:
                self.before[name].set(self.loop[name].get())

    def _input(self, base: Expr, tap: Expr) -> Expr:
        """Read an input word."""
        code = self.args["x"][base + _at(self.args["taps"], tap)]
        return _word(code, self.spec.word_bits)

    def _gather(self, lane: Expr, rows: Expr) -> None:
        """Read the inputs of a window, and their keys."""
        spec, about = self.spec, self.about
        length = emit.bind(self.length[about["kind"][lane]])
        base, taps = emit.bind(about["x"][lane]), emit.bind(about["taps"][lane])
        with emit.loop(length) as term:
            word = emit.bind(self._input(base, taps + term))
            T.buffer_store(self.words, word, [emit.index(lane * spec.window + term)])
            if self.keys is not None:
                self.keys.set(lane, term, word)
        if self.keys is not None:
            self.keys.fill(lane, length, rows)

    def _send(self, lane: Expr, number: Expr) -> None:
        """Append the flits of a window to the streams."""
        spec, about = self.spec, self.about
        kind = emit.bind(about["kind"][lane])
        length, count = emit.bind(self.length[kind]), emit.bind(self.count[kind])
        slots = emit.bind(count * spec.lanes)
        turned = number % 2 if spec.snake else 0
        by = emit.bind((kind * 2 + turned) * self.slots)
        base, taps, weights = (emit.bind(about[name][lane]) for name in ("x", "taps", "w"))

        def x(term: Expr) -> Expr:
            if spec.on == "weights":
                return self._input(base, taps + term)
            return self.words[emit.index(lane * spec.window + term)]

        def w(term: Expr) -> Expr:
            return _word(self.args["w"][emit.index(weights + term)], spec.word_bits)

        def given(term: Expr) -> Expr:
            return _at(self.args["places"], weights + term)

        def found(term: Expr) -> Expr:
            if self.keys is None:
                return _at(self.near, term)
            return self.keys.place(lane, term)

        if spec.on == "nearest":
            self._nearest(x, w, length, count)
        both = [("x", self.streams["inputs"], x), ("w", self.streams["weights"], w)]
        if spec.on == "separated":
            shared = [(both[:1], found), (both[1:], given)]
        else:
            place = given if spec.on == "weights" else found
            # One of two operands may be kept, but both go to the same places.
            shared = [([one], place) for one in both] if spec.reuse else [(both, place)]
        for operands, place in shared:
            kept = about[f"keep_{operands[0][0]}"][lane] if spec.reuse else None
            with emit.when(True if kept is None else kept == 0):
                ends = [stream.end.get() for _, stream, _ in operands]
                with emit.loop(slots - length) as rank:
                    slot = emit.bind(_at(self.slot, by + length + rank))
                    for (_, stream, _), end in zip(operands, ends, strict=True):
                        _put(stream.buffer, end + slot, 0)
                with emit.loop(length) as term:
                    slot = emit.bind(_at(self.slot, by + place(term)))
                    for (_, stream, read), end in zip(operands, ends, strict=True):
                        T.buffer_store(stream.buffer, read(term), [emit.index(end + slot)])
                for _, stream, _ in operands:
                    stream.end.add(slots)
                    stream.flits.add(count)
                    stream.turned.set(by)
            for name, stream, _ in operands:
                _put(about[f"at_{name}"], lane, stream.end.get() - slots)
                _put(about[f"by_{name}"], lane, stream.turned.get())

    def _nearest(self, x: Any, w: Any, length: Expr, count: Expr) -> None:
        """Find the greedy order of a window: the places of its terms."""
        spec = self.spec
        taken = tirx.const(1 << 20, "int32")
        with emit.loop(length) as term:
            low, high = emit.cast(x(term), "uint32", 1), emit.cast(w(term), "uint32", 1)
            pair = T.bitwise_or(low, T.shift_left(high, tirx.const(16, "uint32")))
            T.buffer_store(self.pairs, pair, [emit.index(term)])
            _put(self.used, term, term)
        best = emit.allocate(1, "int32", registers=True)
        with emit.loop(spec.lanes) as lane, emit.loop(count) as flit:
            row_major = spec.packing == "row-major"
            rank = emit.bind(flit * spec.lanes + lane if row_major else lane * count + flit)
            last = emit.bind(self.last[emit.index(lane)])
            sent = emit.bind(self.sent[emit.index(lane)])
            with T.If(rank < length):
                with T.Then():
                    emit.store(best, 0, tirx.const(2**30, "int32"), 1)
                    with emit.loop(length) as term:
                        changed = T.bitwise_xor(self.pairs[term], last)
                        changed = T.popcount(T.bitwise_and(changed, sent))
                        distance = emit.cast(changed, "int32", 1)
                        cost = distance * tirx.const(256, "int32") + self.used[term]
                        least = T.min(emit.load(best, 0, 1), cost)
                        emit.store(best, 0, least, 1)
                    which = emit.bind(T.bitwise_and(_at(best, 0), _int(255)))
                    _put(self.near, which, rank)
                    T.buffer_store(self.used, taken, [which])
                    T.buffer_store(self.last, self.pairs[which], [emit.index(lane)])
                with T.Else():
                    _put(self.last, lane, 0)
            T.buffer_store(self.sent, tirx.const(2**32 - 1, "uint32"), [emit.index(lane)])

    def _receive(self, lane: Expr) -> None:
        """Add up the products of a window as it has arrived; send its indices."""
        spec, about = self.spec, self.about
        kind = emit.bind(about["kind"][lane])
        length, count = emit.bind(self.length[kind]), emit.bind(self.count[kind])
        at_x, at_w = emit.bind(about["at_x"][lane]), emit.bind(about["at_w"][lane])
        by_x, by_w = emit.bind(about["by_x"][lane]), emit.bind(about["by_w"][lane])
        if "index" in spec.parts:
            self._send_index(lane, kind, length)
        layouts = spec.data_layout, spec.weight_layout
        wide = "int32" if spec.word_bits <= 8 and layouts == (None, None) else "int64"
        zero_x, zero_w = (emit.bind(self.args["zero_points"][_int(place)]) for place in range(2))
        total = emit.allocate(1, wide, registers=True)
        _put(total, 0, 0)

        def value(code: Expr, zero: Expr, layout: SoftEdge | None) -> Expr:
            return code - zero if layout is None else soft_edge.decoded(layout, code, 1)

        def add(place_x: Expr, place_w: Expr) -> None:
            x = self.streams["inputs"].buffer[emit.index(place_x)]
            w = self.streams["weights"].buffer[emit.index(place_w)]
            x = value(_code(x, spec.word_bits, spec.data.startswith("int")), zero_x, layouts[0])
            w = value(_code(w, spec.word_bits, spec.weight.startswith("int")), zero_w, layouts[1])
            product = emit.cast(x, wide, 1) * emit.cast(w, wide, 1)
            emit.store(total, 0, emit.load(total, 0, 1) + product, 1)

        if self.by_rank:
            with emit.loop(length) as rank:
                partner = _at(self.index, rank) if "index" in spec.parts else rank
                add(at_x + _at(self.slot, by_x + rank), at_w + _at(self.slot, by_w + partner))
            window = emit.cast(emit.load(total, 0, 1), "int64", 1)
        else:
            slots = emit.bind(count * spec.lanes)
            with emit.loop(slots) as slot:
                add(at_x + slot, at_w + slot)
            none = tirx.const(0, "int32")
            blank_x, blank_w = value(none, zero_x, layouts[0]), value(none, zero_w, layouts[1])
            empty = emit.cast(blank_x, "int64", 1) * emit.cast(blank_w, "int64", 1)
            window = emit.cast(emit.load(total, 0, 1), "int64", 1) - (slots - length) * empty
        output = emit.bind(about["sum"][lane])
        # 64 bits: only the last of these sums is known to fit 32.
        _put(self.args["sums"], output, _at(self.args["sums"], output) + window)

    def _send_index(self, lane: Expr, kind: Expr, length: Expr) -> None:
        """Tell which weight belongs to each input, ``width`` bits for each."""
        spec, stream = self.spec, self.streams["index"]
        assert self.keys is not None
        _, lanes, bits = spec.counts_shape
        weights = emit.bind(self.about["w"][lane])
        with emit.loop(length) as term:
            place = _at(self.args["places"], weights + term)
            _put(self.index, self.keys.place(lane, term), place)
        width = emit.bind(self.width[kind])
        count = emit.bind((length * width + (lanes * bits - 1)) // (lanes * bits))
        end = stream.end.get()
        with emit.loop(count * lanes) as slot:
            _put(stream.buffer, end + slot, 0)
        mask = _int((1 << bits) - 1)
        with emit.loop(length) as rank:
            bit = emit.bind(rank * width)
            first = emit.bind(end + bit // bits)
            value = emit.bind(T.shift_left(_at(self.index, rank), bit % bits))
            for word in range(ceil_div(bits + 7, bits)):
                part = T.bitwise_and(T.shift_right(value, _int(word * bits)), mask)
                _put(
                    stream.buffer,
                    first + word,
                    T.bitwise_or(_at(stream.buffer, first + word), part),
                )
        stream.end.set(end + count * lanes)
        stream.flits.add(count)


# --------------------------------------------------------------------------- orders alone


def positions_kernel(
    dtype: ActivationType, word_bits: int, window: int, buckets: int, name: str = "positions"
) -> Any:
    """Build the kernel that finds the places of words in their windows.

    Parameters
    ----------
    dtype
        Type of the codes.
    word_bits
        Width of the words.
    window
        Terms of a window; the last one of a row may have fewer.
    buckets
        How many buckets the table has at most.
    name
        Symbol of the function.

    Returns
    -------
    PrimFunc
        ``(codes [B, O, K], table uint16 [2**word_bits], places uint8 [B, O, K])``: what
        :func:`kernel` takes.
    """
    return _order_kernel(dtype, word_bits, window, buckets, name, moved=False)


def _order_kernel(
    dtype: str, word_bits: int, window: int, buckets: int, name: str, *, moved: bool
) -> Any:
    """Build :func:`positions_kernel`, or the kernel that moves codes to their places."""

    def body() -> None:
        shape = [tirx.Var(size, "int64") for size in ("batch", "channels", "terms")]
        codes, table, result = emit.parameters(
            [
                ("codes", shape, dtype),
                ("table", (_int(1 << word_bits),), "uint16"),
                ("result", shape, dtype if moved else "uint8"),
            ],
            align=1,
        )
        batch, channels, terms = shape
        chunks = emit.bind((terms + (window - 1)) // window)
        windows = emit.bind(batch * channels * chunks)

        first, term = _Counter(), _Counter()

        def advance() -> tuple[Expr, Expr]:
            """First term and length of the next window."""
            start = first.get()
            length = emit.bind(emit.lesser(terms - term.get(), window))
            first.add(length)
            term.add(length)
            with emit.when(term.get() == terms):
                term.set(0)
            return start, length

        def put(start: Expr, term: Expr, place: Expr, code: Expr) -> None:
            if moved:
                T.buffer_store(result, code, [emit.index(start + place)])
            else:
                _put(result, start + term, place)

        few = buckets * window.bit_length() <= 64
        order = _order_by_counters if few else _order_by_ranks
        order(codes, table, word_bits, window, windows, advance, put)

    return emit.primitive_function(name, body)


def _order_by_counters(
    codes: Buffer,
    table: Buffer,
    word_bits: int,
    window: int,
    windows: Expr,
    advance: Callable[[], tuple[Expr, Expr]],
    put: Callable[[Expr, Expr, Expr, Expr], None],
) -> None:
    """Order by few buckets: the counters of all of them are bits of one number."""
    bits = window.bit_length()
    fields = 64 // bits

    def number(value: int) -> Expr:
        return tirx.const(value, "uint64")

    kept = number((1 << fields * bits) - 1)
    shifts = emit.allocate(1 << word_bits, "uint8")
    with emit.loop(1 << word_bits) as word:
        _put(shifts, word, _at(table, word) * bits)

    def shift(code: Expr) -> Expr:
        """Where the counter of a word's bucket begins."""
        found = shifts[emit.cast(_word(code, word_bits), "int64", 1)]
        return emit.bind(emit.cast(found, "uint64", 1))

    counters = emit.allocate(1, "uint64", registers=True)
    with emit.loop(windows):
        start, length = advance()
        emit.store(counters, 0, number(0), 1)
        for _, code in _each(codes, start, length, together=False):
            one = T.shift_left(number(1), shift(code))
            emit.store(counters, 0, emit.load(counters, 0, 1) + one, 1)
        # Exclusive prefix sums: each counter becomes the sum of those below it.
        sums = T.bitwise_and(T.shift_left(emit.load(counters, 0, 1), number(bits)), kept)
        step = bits
        while step < 64:
            sums = emit.bind(sums)
            sums = sums + T.bitwise_and(T.shift_left(sums, number(step)), kept)
            step *= 2
        emit.store(counters, 0, sums, 1)
        for term, code in _each(codes, start, length):
            by = shift(code)
            now = emit.bind(emit.load(counters, 0, 1))
            emit.store(counters, 0, now + T.shift_left(number(1), by), 1)
            first = T.bitwise_and(T.shift_right(now, by), number((1 << bits) - 1))
            put(start, term, emit.cast(first, "int64", 1), code)


def _order_by_ranks(
    codes: Buffer,
    table: Buffer,
    word_bits: int,
    window: int,
    windows: Expr,
    advance: Callable[[], tuple[Expr, Expr]],
    put: Callable[[Expr, Expr, Expr, Expr], None],
) -> None:
    """Order by any number of buckets."""
    keys = _Keys(word_bits, window, table)
    rows = round_up(window, 4)
    starts, lengths = (emit.allocate(_LANES, "int64") for _ in range(2))
    with emit.loop((windows + (_LANES - 1)) // _LANES) as block:
        count = emit.bind(emit.lesser(windows - block * _LANES, _LANES))
        with emit.loop(count) as lane:
            start, length = advance()
            _put(starts, lane, start)
            _put(lengths, lane, length)
            for term, code in _each(codes, start, length):
                keys.set(lane, term, _word(code, word_bits))
            keys.fill(lane, length, _int(rows))
        keys.rank(_int(rows))
        with emit.loop(count) as lane:
            start, length = emit.bind(starts[lane]), emit.bind(lengths[lane])
            for term, code in _each(codes, start, length):
                put(start, term, keys.place(lane, term), code)


def _each(
    codes: Buffer, start: Expr, length: Expr, *, together: bool = True
) -> Iterator[tuple[Expr, Expr]]:
    """Emit what the caller does with each of some codes: its number and the code.

    ``together``: 64 bits are read at once, for callers that read and write much else.
    """
    bits = int(codes.dtype.removeprefix("u")[3:])
    count = 64 // bits
    groups = emit.bind(length // count)
    with emit.loop(groups) as group:
        first = emit.bind(group * count)
        if together:
            many = emit.bind(emit.reinterpret(emit.load(codes, start + first, count), "uint64", 1))
        for place in range(count):
            if together:
                code = emit.cast(many >> tirx.const(bits * place, "uint64"), codes.dtype, 1)
            else:
                code = codes[emit.index(start + first + place)]
            yield emit.bind(first + place), emit.bind(code)
    with emit.loop(length - groups * count) as place:
        term = emit.bind(groups * count + place)
        yield term, codes[emit.index(start + term)]


# --------------------------------------------------------------------------- from Python


def _tensor(array: Array) -> Any:
    """The same memory, wherever it starts, as kernels here are compiled for; not written to."""
    return tvm_ffi.from_dlpack(np.require(array, requirements=("C", "W")))


def _compile(function: Any) -> Any:
    target = tvm.target.Target(host.target(host.detect()))
    name = str(function.attrs["global_symbol"])
    return tvm.compile(tvm.IRModule({name: function}), target=target)[name]


@functools.cache
def _compiled_layer(spec: LayerKernel) -> Any:
    return _compile(kernel(spec))


@functools.cache
def _compiled_order(dtype: str, word_bits: int, window: int, buckets: int, moved: bool) -> Any:
    return _compile(_order_kernel(dtype, word_bits, window, buckets, "order", moved=moved))


@functools.cache
def _compiled_count(lanes: int, dtype: str) -> Any:
    return _compile(emit.primitive_function("count", lambda: _emit_count(lanes, dtype)))


@dataclass(frozen=True)
class LayerTransitions:
    """What a layer sends.

    Attributes
    ----------
    sums
        int32 or int64, shape (samples, channels, positions): made of the terms as they arrive.
    counts
        Part to transitions: int64, shape (lanes, word_bits), the lowest bit first, of all samples.
    flits
        Part to the number of flits.
    """

    sums: Array
    counts: dict[Part, IntArray]
    flits: dict[Part, int]


def layer_transitions(
    traffic: Traffic,
    link: Link,
    order: Order,
    x: Array,
    w: Array,
    *,
    table: npt.NDArray[np.uint16] | None = None,
    places: npt.NDArray[np.uint8] | None = None,
    zero_points: tuple[int, int] = (0, 0),
    accumulator_bits: Literal[32, 64] = 64,
) -> LayerTransitions:
    """Send a layer's operands over a link, and count.

    Parameters
    ----------
    traffic
        The layer.
    link, order
        How operands are sent.
    x
        Codes of the padded inputs; shape (samples, words).
    w
        Codes of the weights; shape (channels, terms), or (samples, channels, terms) where each
        sample has its own.
    table
        Bucket of each input word, for orders that depend on the inputs.
    places
        Places of the weights in their windows, of the shape of ``w`` (:func:`positions`), for
        orders that depend on the weights.
    zero_points
        Codes of 0 of both operands.
    accumulator_bits
        Width of the sums.

    Raises
    ------
    UsageError
        If codes do not fit the words, or the link cannot have the order.
    """
    traffic.check(link, order)
    spec = LayerKernel.of(link, order, x.dtype.name, w.dtype.name, accumulator_bits)  # type: ignore[arg-type]  # refused by TVM
    for codes in (x, w):
        link.check_codes(codes)
    weights = np.ascontiguousarray(w.reshape(-1, traffic.channels, traffic.terms))
    if order.orders_weights:
        assert places is not None
        given = np.ascontiguousarray(places.reshape(weights.shape), np.uint8)
    else:
        terms = np.arange(traffic.terms) % link.window.value
        given = np.array(np.broadcast_to(terms, weights.shape), np.uint8)
    sums = np.empty((len(x), traffic.channels, len(traffic.bases)), f"int{accumulator_bits}")
    counts = np.empty(spec.counts_shape, np.int64)
    flits = np.empty(len(_PARTS), np.int64)
    arguments: list[Array] = [x, weights, traffic.bases, traffic.taps, given]
    if spec.uses_table:
        assert table is not None
        arguments.append(table)
    arguments += [np.array(zero_points, np.int32), sums, counts, flits]
    _compiled_layer(spec)(*map(_tensor, arguments))
    lanes = {"inputs": spec.lanes, "weights": spec.lanes, "index": spec.counts_shape[1]}
    return LayerTransitions(
        sums,
        {part: counts[place, : lanes[part]] for place, part in enumerate(spec.parts)},
        {part: int(flits[place]) for place, part in enumerate(spec.parts)},
    )


def positions(
    codes: Array, table: npt.NDArray[np.uint16], window: int | None = None
) -> npt.NDArray[np.uint8]:
    """Positions of words in the stable counting sort of their windows.

    Parameters
    ----------
    codes
        8- or 16-bit codes; shape (..., terms).
    table
        Bucket of each word (:meth:`Order.table`); its length tells how wide words are.
    window
        Terms of a window, at most 256; the last axis is cut into windows. None: one window.

    Returns
    -------
    numpy.ndarray
        uint8, of the same shape; a permutation of 0, 1, ... in each window.

    Raises
    ------
    UsageError
        If a window has no term or more than 256, or codes are of another type.
    """
    return _ordered(codes, table, window, moved=False)


def reorder(codes: Array, table: npt.NDArray[np.uint16], window: int | None = None) -> Array:
    """Codes in the order of the stable counting sort of their windows.

    The parameters and errors are those of :func:`positions`.
    """
    return _ordered(codes, table, window, moved=True)


def _ordered(
    codes: Array, table: npt.NDArray[np.uint16], window: int | None, *, moved: bool
) -> Array:
    if codes.dtype.kind not in "iu" or codes.dtype.itemsize > 2:
        raise UsageError(
            f"codes of type {codes.dtype.name} cannot be sorted",
            fix="give 8- or 16-bit integers",
        )
    terms = codes.shape[-1]
    if window is None:
        window = terms
    result = np.empty(codes.shape, codes.dtype if moved else np.uint8)
    if not codes.size:
        return result
    if not 1 <= window <= _LONGEST_WINDOW:
        raise UsageError(
            f"a window of {window} terms cannot be sorted", fix=f"take 1 to {_LONGEST_WINDOW}"
        )
    word_bits = len(table).bit_length() - 1
    few = 64 // window.bit_length()
    buckets = few if table.max() < few else 1 << word_bits  # two kernels at most
    run = _compiled_order(codes.dtype.name, word_bits, window, buckets, moved)
    shape = (1, -1, terms)
    run(*map(_tensor, (codes.reshape(shape), table, result.reshape(shape))))
    return result


def count_transitions(words: Array, word_bits: int | None = None) -> IntArray:
    """How often every bit of every lane changes between consecutive flits.

    Parameters
    ----------
    words
        uint8 or uint16; shape (flits, lanes).
    word_bits
        Width of the words; None: all bits of the type.

    Returns
    -------
    numpy.ndarray
        int64, shape (lanes, word_bits), the lowest bit first.
    """
    flits, lanes = words.shape
    bits = 8 * words.dtype.itemsize
    counts = np.zeros((lanes, bits), np.int64)
    if flits > 1:
        _compiled_count(lanes, words.dtype.name)(_tensor(words), _tensor(counts))
    return counts[:, : word_bits or bits]


def _emit_count(lanes: int, dtype: str) -> None:
    """Emit ``(words [flits, lanes], counts int64 [lanes, bits])``."""
    flits = tirx.Var("flits", "int64")
    bits = int(dtype[4:])
    words, counts = emit.parameters(
        [("words", (flits, lanes), dtype), ("counts", (_int(lanes), _int(bits)), "int64")],
        align=1,
    )
    sums = _Counts(lanes, dtype)
    changes = emit.bind((flits - 1) * lanes)
    # Whole groups, without reading behind the last flit; and what is left, in a copy.
    groups = emit.bind(T.max(changes - sums.overreach, _int(0)) // sums.group)
    with emit.loop((groups + (_MOST_GROUPS - 1)) // _MOST_GROUPS) as part:
        first = emit.bind(part * _MOST_GROUPS)
        sums.add(words, first * sums.group, emit.lesser(groups - first, _MOST_GROUPS))
    room = sums.group + round_up(sums.overreach, sums.group)
    left = emit.allocate(room + sums.overreach + lanes, dtype)
    start = emit.bind(groups * sums.group)
    count = emit.bind(flits * lanes - start)
    with emit.loop(room + lanes) as place, T.If(place < count):
        with T.Then():
            T.buffer_store(left, words[emit.index(start + place)], [emit.index(place)])
        with T.Else():  # flits that change nothing
            T.buffer_store(left, left[emit.index(place - lanes)], [emit.index(place)])
    sums.add(left, _int(0), _int(room // sums.group))
    with emit.loop(lanes * bits) as place:
        _put(counts, place, 0)
    sums.collect(counts, _int(0), bits)
