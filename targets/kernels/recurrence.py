"""Recurrences: one kernel with the loop over time inside.

One step is a graph of :class:`Value`. Axes along which no operator mixes elements are *parallel*:
every channel or row of a batch runs through time by itself, its state in cache. Where such an axis
is long enough, vectors run along it ("across"): each lane is a channel. Otherwise, as with a
recurrent matrix, vectors run along the last axis of each value ("along").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.errors import UsageError
from bitwright.targets.kernels import code_matmul, emit, float_matmul
from bitwright.targets.kernels.emit import Buffer, Expr, ceil_div
from bitwright.targets.kernels.host import GENERIC, Isa

__all__ = ["Recurrence", "Value", "kernel"]

Size: TypeAlias = Any
"""An int, or a TVM expression of sizes known at run time."""

Kind: TypeAlias = Literal[
    "captured",
    "state",
    "element",
    "constant",
    "map",
    "permute",
    "reshape",
    "broadcast",
    "slice",
    "concat",
    "reduce",
    "product",
    "lookup",
]

_LANES = 8
_NEAR = 1 << 14  # bytes of its channels' states that a task keeps in the first cache, about
_ROWS = 12  # of a batch, that share the reading of a recurrent matrix
_FEWER_ROWS = 8  # where there are more of them than two tasks can take
_MAX_LOCAL = 1 << 22  # bytes of state and intermediate results of a task


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of one step.

    Attributes
    ----------
    kind
        ``captured``, ``state`` and ``element`` are inputs of the step, ``constant`` is one number.
        ``map`` computes element by element on operands broadcast against each other, ``product``
        multiplies by captured weights, floats or codes (data as int16, an even number in each row);
        ``lookup`` takes elements of a captured table [n] at places within it; the others speak for
        themselves.
    shape, dtype
        Of the tensor.
    operands
        What it is computed from.
    detail
        Number of the input; the constant; the function (of expressions, and lanes last) of a map;
        axes of a permutation or reduction; begins and strides of a slice; the axis of a
        concatenation.
    cost
        Of a map or lookup, about: 0 for what is no work (a conversion), 1 for arithmetic, 10 for
        functions. Of a reduction, its name: ``sum``, ``max``, ``min`` or ``prod``.
    """

    kind: Kind
    shape: tuple[Size, ...]
    dtype: str
    operands: tuple[Value, ...] = ()
    detail: Any = None
    cost: Any = 0


@dataclass(frozen=True)
class Recurrence:
    """One step of a recurrence.

    Attributes
    ----------
    captured, states, elements
        The inputs of a step: values that stay, states, and the elements of the sequences.
    new_states, outputs
        What a step computes. New states have the shapes and types of the states.
    weights
        Those of ``captured`` that are only weights of products; the kernel takes them in the form
        of :func:`bitwright.targets.kernels.float_matmul.pack`, int8 and int16 in that of
        :func:`bitwright.targets.kernels.code_matmul.pack`.
    """

    captured: tuple[Value, ...]
    states: tuple[Value, ...]
    elements: tuple[Value, ...]
    new_states: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: frozenset[Value] = frozenset()


def is_one(size: Size) -> bool:
    """Whether a size is known to be 1."""
    return isinstance(size, int) and size == 1


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.same_as(b))


def _numbers(sizes: Sequence[Size]) -> list[int]:
    if not all(isinstance(size, int) for size in sizes):
        raise UsageError("an axis that it computes along has a size known at run time only")
    return list(sizes)


def aligned(before: Sequence[Size], after: Sequence[Size]) -> tuple[list[tuple[int, int]], bool]:
    """Axes that a reshape leaves alone, and whether these are all but those of size 1."""
    old = [axis for axis, size in enumerate(before) if not is_one(size)]
    new = [axis for axis, size in enumerate(after) if not is_one(size)]
    pairs: list[tuple[int, int]] = []
    while old and new and same(before[old[0]], after[new[0]]):
        pairs.append((old.pop(0), new.pop(0)))
    while old and new and same(before[old[-1]], after[new[-1]]):
        pairs.append((old.pop(), new.pop()))
    return pairs, not old and not new


# --------------------------------------------------------------------------- parallel axes


class _Axes:
    """Classes of axes that run together, and those along which elements mix."""

    def __init__(self, step: Recurrence) -> None:
        self._parents: dict[tuple[int, int], tuple[int, int]] = {}
        self._mixed: set[tuple[int, int]] = set()
        self.values = ordered((*step.new_states, *step.outputs))
        for value in self.values:
            self._visit(value)
        for before, after in zip(step.states, step.new_states, strict=True):
            for axis in range(len(before.shape)):
                self._join((before, axis), (after, axis))
        for value in (*self.values, *step.states):
            roots = [self.of(value, axis) for axis in range(len(value.shape))]
            self._mixed.update(root for root in roots if roots.count(root) > 1)

    def of(self, value: Value, axis: int) -> tuple[int, int]:
        """The class of an axis."""
        return self._root((id(value), axis))

    def _root(self, node: tuple[int, int]) -> tuple[int, int]:
        while node in self._parents:
            node = self._parents[node]
        return node

    def axis(self, value: Value, label: tuple[int, int] | None) -> int | None:
        """The axis of a value that belongs to a class."""
        for axis in range(len(value.shape)):
            if label is not None and self.of(value, axis) == label:
                return axis
        return None

    def parallel(self, step: Recurrence) -> dict[tuple[int, int], Size]:
        """Classes that every state and output has and along which nothing mixes, with sizes."""
        results = (*step.states, *step.outputs)
        mixed = set(map(self._root, self._mixed))
        found: dict[tuple[int, int], Size] = {}
        for axis, size in enumerate(results[0].shape if results else ()):
            label = self.of(results[0], axis)
            everywhere = all(self.axis(value, label) is not None for value in results)
            if not is_one(size) and label not in mixed and everywhere:
                found[label] = size
        return found

    def _join(self, a: tuple[Value, int], b: tuple[Value, int]) -> None:
        first, second = self.of(*a), self.of(*b)
        if first != second:
            self._parents[first] = second

    def _mix(self, value: Value, axis: int) -> None:
        self._mixed.add((id(value), axis))

    def _visit(self, value: Value) -> None:
        rank = len(value.shape)
        if value.kind in ("map", "broadcast"):
            for operand in value.operands:
                behind = rank - len(operand.shape)
                for axis, size in enumerate(operand.shape):
                    if not is_one(size) or is_one(value.shape[axis + behind]):
                        self._join((operand, axis), (value, axis + behind))
        elif value.kind == "permute":
            for axis, source in enumerate(value.detail):
                self._join((value.operands[0], source), (value, axis))
        elif value.kind == "reshape":
            (operand,) = value.operands
            pairs, _ = aligned(operand.shape, value.shape)
            for source, axis in pairs:
                self._join((operand, source), (value, axis))
            for axis in set(range(len(operand.shape))) - {source for source, _ in pairs}:
                self._mix(operand, axis)
            for axis in set(range(rank)) - {axis for _, axis in pairs}:
                self._mix(value, axis)
        elif value.kind in ("slice", "concat"):
            for operand in value.operands:
                for axis in range(rank):
                    whole = (
                        value.detail[1][axis] == 1  # a stride of -1 turns the axis round
                        if value.kind == "slice"
                        else axis != value.detail
                    )
                    if whole and same(operand.shape[axis], value.shape[axis]):
                        self._join((operand, axis), (value, axis))
                    else:
                        self._mix(operand, axis)
                        self._mix(value, axis)
        elif value.kind == "reduce":
            (operand,) = value.operands
            kept = [axis for axis in range(len(operand.shape)) if axis not in value.detail]
            for axis in value.detail:
                self._mix(operand, axis)
            for axis, source in enumerate(kept):
                self._join((operand, source), (value, axis))
        elif value.kind == "product":
            data, weights = value.operands
            for operand in (data, weights):
                behind = rank - len(operand.shape)
                for axis, size in enumerate(operand.shape[:-2]):
                    if not is_one(size):
                        self._join((operand, axis), (value, axis + behind))
            self._join((data, len(data.shape) - 2), (value, rank - 2))
            self._mix(data, len(data.shape) - 1)
            self._mix(value, rank - 1)
        elif value.kind == "lookup":
            table, places = value.operands
            self._mix(table, 0)
            for axis in range(rank):
                self._join((places, axis), (value, axis))


def ordered(results: Sequence[Value]) -> list[Value]:
    """All values that results are computed from, operands first."""
    found: dict[Value, None] = {}
    pending = [(value, False) for value in reversed(results)]
    while pending:
        value, done = pending.pop()
        if done:
            found[value] = None
        elif value not in found:
            pending.append((value, True))
            pending.extend((operand, False) for operand in reversed(value.operands))
    return list(found)


# --------------------------------------------------------------------------- what is stored


def _work(value: Value, stored: set[Value]) -> int:
    """About what it costs to compute an element of a value that is not stored."""
    if value in stored:
        return 0
    own = value.cost if value.kind in ("map", "lookup") else 0
    return int(own) + sum(_work(operand, stored) for operand in value.operands)


def _stored(step: Recurrence, values: Sequence[Value]) -> set[Value]:
    """Values that get memory; all others are computed where they are used."""
    uses: dict[Value, int] = dict.fromkeys(values, 0)
    wanted: set[Value] = set()  # by how they are used
    for value in values:
        for operand in value.operands:
            uses[operand] += 1
        if value.kind == "product":
            wanted.add(value.operands[0])
        if value.kind == "reshape" and not aligned(value.operands[0].shape, value.shape)[1]:
            wanted.add(value.operands[0])
    for output in step.outputs:
        uses[output] += 1
    stored: set[Value] = set()
    for value in values:  # operands come first
        if value.kind in ("captured", "state", "element", "constant"):
            continue
        work = _work(value, stored)
        repeated = any(
            math.prod(s for s in user.shape if isinstance(s, int))
            > math.prod(s for s in value.shape if isinstance(s, int))
            for user in values
            if value in user.operands and user.kind in ("map", "broadcast")
        )
        if (
            value.kind in ("reduce", "product", "concat")
            or value in step.new_states
            or value in wanted
            or (work > 0 and repeated)
            or (work > 1 and uses[value] > 1)
        ):
            stored.add(value)
    # What a product reads has to lie in memory in rows.
    stored.update(value for value in wanted if value.kind in ("element", "captured"))
    return stored


def _reads(value: Value, stored: set[Value]) -> Iterator[tuple[Value, bool]]:
    """Values that computing an element reads, and whether at the place of the element alone."""
    pending = [(operand, value.kind == "map") for operand in value.operands]
    while pending:
        operand, alone = pending.pop()
        same_shape = len(operand.shape) == len(value.shape) and all(
            map(same, operand.shape, value.shape)
        )
        alone = alone and same_shape
        if operand in stored or not operand.operands:
            yield operand, alone
        else:
            pending += [(entry, alone and operand.kind == "map") for entry in operand.operands]


# --------------------------------------------------------------------------- the kernel


@dataclass
class _Place:
    """Where a value lies.

    Attributes
    ----------
    buffer, base
        Its memory, and where it starts there.
    strides
        Elements from one index of an axis to the next; 0 along an axis that a task has one of.
    absolute
        Whether indices along parallel axes count from the whole tensor's first element. If not, it
        is memory of a task, where truth values are int8.
    """

    buffer: Buffer
    base: Expr
    strides: list[Expr]
    absolute: bool


@dataclass
class _Task:
    """What one task computes: where its parallel axes start."""

    starts: dict[tuple[int, int], Expr] = field(default_factory=dict)
    rows: Expr = 1


def _row_major(shape: Sequence[Size]) -> list[Expr]:
    strides: list[Expr] = []
    stride: Any = 1
    for size in reversed(shape):
        strides.insert(0, stride)
        stride = stride * size
    return strides


class _Emitter:
    """Emits one kernel."""

    def __init__(self, step: Recurrence, isa: Isa) -> None:
        self.step = step
        self.isa = isa
        self.axes = _Axes(step)
        self.values = self.axes.values
        self.stored = _stored(step, self.values)
        self.parallel = self.axes.parallel(step)
        self.products = [value for value in self.values if value.kind == "product"]
        self.across = self._across()
        self.lanes = 1 if self.across is None else self._lanes(self.across)
        self.rows = self._rows()
        self.places: dict[Value, _Place] = {}
        self.task = _Task()
        self.captured_by = self._constant_in_time()
        self.shared = self._shared()

    # -- what runs where ---------------------------------------------------------------------------

    def _across(self) -> tuple[int, int] | None:
        """The parallel class that vectors run along, if they do."""
        if self.products:
            return None
        tensors = [*self.step.outputs, *self.step.elements, *self.step.states]
        best, score = None, 0
        for label, size in self.parallel.items():
            if not isinstance(size, int) or size < 4:
                continue
            last = sum(
                bool(value.shape) and self.axes.of(value, len(value.shape) - 1) == label
                for value in tensors
            )
            if 1 + last > score:
                best, score = label, 1 + last
        return best

    def _rows(self) -> tuple[int, int] | None:
        """The parallel class of the rows that share the reading of weights."""
        for value in self.products:
            label = self.axes.of(value, len(value.shape) - 2)
            if label in self.parallel:
                return label
        return None

    def _constant_in_time(self) -> set[Value]:
        """Computed values that depend on captured ones alone."""
        found: set[Value] = set()
        for value in self.values:
            if value.operands and all(
                operand in found or operand.kind in ("captured", "constant")
                for operand in value.operands
            ):
                found.add(value)
        return found

    def _shared(self) -> set[Value]:
        """Values that all channels and rows read, and that are computed once a step for them.

        They depend on no state, as a state has all parallel axes.
        """
        if self.across is None:
            return set()
        return {
            value
            for value in self.stored
            if value not in self.captured_by
            and value not in self.step.captured
            and not any(
                self.axes.of(value, axis) in self.parallel for axis in range(len(value.shape))
            )
        }

    def _lanes(self, across: tuple[int, int]) -> int:
        """Vector length where vectors run across channels.

        Long vectors are several chains of arithmetic at once, for processors that start it faster
        than they finish it. Channels have to fill them, twice for two cores, and their states the
        cache no more than once.
        """
        size = int(self.parallel[across])
        lasting = [
            value
            for value in (*self.step.states, *self.step.captured)
            if self.axes.axis(value, across) is not None
        ]
        numbers = sum(
            math.prod(_numbers([value.shape[axis] for axis in self._rest(value)]))
            for value in lasting
        )
        for lanes in (4 * _LANES, 2 * _LANES):
            filled = 2 * lanes <= size and 8 * emit.round_up(size, lanes) <= 9 * size
            if filled and 4 * lanes * numbers <= _NEAR:
                return lanes
        return min(_LANES, 1 << (size.bit_length() - 1))

    # -- memory ------------------------------------------------------------------------------------

    def _rest(self, value: Value) -> list[int]:
        """Axes that a task has all of."""
        return [
            axis
            for axis in range(len(value.shape))
            if self.axes.of(value, axis) not in self.parallel
        ]

    def _local_size(self, value: Value) -> int:
        rest = math.prod(_numbers([value.shape[axis] for axis in self._rest(value)]))
        if self.axes.axis(value, self.across) is not None:
            return rest * self.lanes
        if self.axes.axis(value, self.rows) is not None:
            return rest * _ROWS
        return rest

    def local(self, value: Value, groups: int = 1, group: Expr = 0) -> _Place:
        """Allocate memory of a task for a value, once for each group of channels."""
        size = self._local_size(value)
        rest = self._rest(value)
        strides: list[Expr] = [0] * len(value.shape)
        inner = 1
        vector = self.axes.axis(value, self.across)
        if vector is not None:
            strides[vector] = 1
            inner = self.lanes
        for axis in reversed(rest):
            strides[axis] = inner
            inner *= value.shape[axis]
        rows = self.axes.axis(value, self.rows)
        if rows is not None:
            strides[rows] = inner
        # TVM 0.27 makes a buffer that is read in whole vectors one of vectors, and then confuses
        # truth values with int8.
        dtype = "int8" if value.dtype == "bool" else value.dtype
        buffer = emit.allocate(max(size * groups, 1), dtype)
        return _Place(buffer, group * size, strides, absolute=False)

    def _offset(self, value: Value, place: _Place, indices: Sequence[Expr]) -> Expr:
        offset: Any = place.base
        for axis, (number, stride) in enumerate(zip(indices, place.strides, strict=True)):
            start = self.task.starts.get(self.axes.of(value, axis)) if place.absolute else None
            whole = number if start is None else start + number
            if not (isinstance(stride, int) and stride == 0):
                offset = offset + whole * stride
        return offset

    def load(self, value: Value, indices: Sequence[Expr], vector: int | None, lanes: int) -> Expr:
        """Read elements of a value that lies in memory."""
        place = self.places[value]
        offset = self._offset(value, place, indices)
        stride = 1 if vector is None else place.strides[vector]
        if vector is None or lanes == 1:
            found = emit.load(place.buffer, offset, 1)
        elif isinstance(stride, int) and stride == 1:
            found = emit.load(place.buffer, offset, lanes)
        else:
            found = place.buffer[T.ramp(emit.index(offset), emit.index(stride), lanes)]
        return self._truth(value, place, found, 1 if vector is None else lanes)

    @staticmethod
    def _truth(value: Value, place: _Place, found: Expr, lanes: int) -> Expr:
        if value.dtype != "bool" or place.absolute:
            return found
        return found != emit.constant(0, "int8", lanes)

    def store(
        self,
        value: Value,
        place: _Place,
        indices: Sequence[Expr],
        vector: int | None,
        lanes: int,
        new: Expr,
    ) -> None:
        """Write elements of a value."""
        if value.dtype == "bool" and not place.absolute:
            new = T.Select(new, *(emit.constant(truth, "int8", lanes) for truth in (1, 0)))
        offset = self._offset(value, place, indices)
        stride = 1 if vector is None else place.strides[vector]
        if lanes == 1 or (isinstance(stride, int) and stride == 1):
            emit.store(place.buffer, offset, new, lanes)
        else:
            ramp = T.ramp(emit.index(offset), emit.index(stride), lanes)
            T.buffer_store(place.buffer, new, [ramp])

    # -- elements ----------------------------------------------------------------------------------

    def element(
        self, value: Value, indices: Sequence[Expr], vector: int | None, lanes: int
    ) -> Expr:
        """An element, or ``lanes`` of them along an axis, as an expression."""
        if vector is not None and is_one(value.shape[vector]):
            vector = None
        if vector is None and lanes > 1:
            return emit.broadcast(emit.bind(self.element(value, indices, None, 1)), lanes)
        if value in self.places:
            return self.load(value, indices, vector, lanes)
        return self.computed(value, indices, vector, lanes)

    def computed(
        self, value: Value, indices: Sequence[Expr], vector: int | None, lanes: int
    ) -> Expr:
        """An element, computed of its operands'."""
        if value.kind == "constant":
            return emit.constant(value.detail, value.dtype, lanes)
        if value.kind in ("map", "broadcast"):
            terms = []
            for operand in value.operands:
                behind = len(value.shape) - len(operand.shape)
                places = [
                    0 if is_one(size) else indices[axis + behind]
                    for axis, size in enumerate(operand.shape)
                ]
                inside = vector is not None and vector >= behind
                terms.append(
                    self.element(operand, places, vector - behind if inside else None, lanes)  # type: ignore[operator]
                )
            if value.kind == "broadcast":
                return terms[0]
            result = value.detail(*terms, lanes)
            # TVM cannot bind vectors of truth values.
            return result if value.dtype == "bool" else _computed(result, value.dtype, lanes)
        if value.kind == "lookup":
            table, places_of = value.operands
            found = self.element(places_of, indices, vector, lanes)
            return self.places[table].buffer[emit.cast(found, "int64", lanes)]
        (operand,) = value.operands
        if value.kind == "permute":
            places = [indices[list(value.detail).index(axis)] for axis in range(len(indices))]
            along = None if vector is None else value.detail[vector]
            return self.element(operand, places, along, lanes)
        if value.kind == "slice":
            begins, strides = value.detail
            places = [
                number * stride + begin if (begin, stride) != (0, 1) else number
                for number, begin, stride in zip(indices, begins, strides, strict=True)
            ]
            if vector is not None and strides[vector] != 1:
                return self._gathered(operand, places, vector, lanes, strides[vector])
            return self.element(operand, places, vector, lanes)
        assert value.kind == "reshape", value.kind
        pairs, whole = aligned(operand.shape, value.shape)
        places = [0] * len(operand.shape)
        along = None
        for source, axis in pairs:
            places[source] = indices[axis]
            along = source if axis == vector else along
        if whole:
            return self.element(operand, places, along, lanes)
        # The other axes lie in memory one behind the other, so their last one counts for all.
        mine = [axis for axis in range(len(value.shape)) if axis not in {a for _, a in pairs}]
        theirs = [a for a in range(len(operand.shape)) if a not in {s for s, _ in pairs}]
        last = max(axis for axis in theirs if not is_one(operand.shape[axis]))
        strides = _row_major([value.shape[axis] for axis in mine])
        flat: Any = 0
        for axis, stride in zip(mine, strides, strict=True):
            flat = flat + indices[axis] * stride
            if axis == vector:
                if not is_one(stride):
                    raise UsageError("it takes elements apart in an order that no vector has")
                along = last
        places[last] = flat
        return self.load(operand, places, along, lanes)

    def _gathered(
        self, operand: Value, places: Sequence[Expr], vector: int, lanes: int, stride: int
    ) -> Expr:
        """Every ``stride``-th element along an axis."""
        if operand not in self.places:
            raise UsageError("it takes elements with gaps between them of what it computes")
        place = self.places[operand]
        offset = self._offset(operand, place, places)
        ramp = T.ramp(emit.index(offset), emit.index(place.strides[vector] * stride), lanes)
        return self._truth(operand, place, place.buffer[ramp], lanes)

    # -- statements --------------------------------------------------------------------------------

    def each(self, value: Value, body: Callable[[list[Expr], int | None, int], None]) -> None:
        """Loop over the elements of a value that the task has."""
        vector = self.axes.axis(value, self.across)
        rest = self._rest(value)
        rows = self.axes.axis(value, self.rows)
        with ExitStack() as stack:
            indices: list[Expr] = [0] * len(value.shape)
            if rows is not None:
                indices[rows] = stack.enter_context(emit.loop(self.task.rows))
            along = self.across is None or value in self.shared
            if vector is None and along and rest and rest[-1] == len(indices) - 1:
                (size,) = _numbers([value.shape[rest[-1]]])
                vector = rest.pop() if size > 1 else None
            for axis in rest:
                indices[axis] = stack.enter_context(emit.loop(value.shape[axis]))
            if vector is None:
                body(indices, None, 1)
            elif self.across is not None and not along:
                body(indices, vector, self.lanes)
            else:
                self._chunks(value, indices, vector, body)

    @staticmethod
    def _chunks(
        value: Value,
        indices: list[Expr],
        vector: int,
        body: Callable[[list[Expr], int | None, int], None],
    ) -> None:
        size = int(value.shape[vector])
        lanes = min(_LANES, 1 << (size.bit_length() - 1))
        with emit.loop(size // lanes) as chunk:
            body([*indices[:vector], chunk * lanes, *indices[vector + 1 :]], vector, lanes)
        if size % lanes:  # the last ones once more, with those before
            body([*indices[:vector], size - lanes, *indices[vector + 1 :]], vector, lanes)

    def statement(self, value: Value, place: _Place) -> None:
        """Compute a value into memory."""
        if value.kind == "product":
            self._product(value, place)
        elif value.kind == "reduce":
            self._reduce(value, place)
        elif value.kind == "concat":
            self._concat(value, place)
        else:
            inputs = ("captured", "element", "state")

            def one(indices: list[Expr], vector: int | None, lanes: int) -> None:
                read = self.element if value.kind in inputs else self.computed
                new = read(value, indices, vector, lanes)
                self.store(value, place, indices, vector, lanes, new)

            self.each(value, one)

    def copy(self, value: Value, source: _Place, target: _Place) -> None:
        """Copy a value from one place to another."""
        self.places[value] = source

        def one(indices: list[Expr], vector: int | None, lanes: int) -> None:
            new = self.load(value, indices, vector, lanes)
            self.store(value, target, indices, vector, lanes, new)

        self.each(value, one)

    def _concat(self, value: Value, place: _Place) -> None:
        start = 0
        for operand in value.operands:
            first = start

            def one(
                indices: list[Expr], vector: int | None, lanes: int, operand: Value = operand
            ) -> None:
                moved = list(indices)
                moved[value.detail] = moved[value.detail] + first  # noqa: B023
                new = self.element(operand, indices, vector, lanes)
                self.store(value, place, moved, vector, lanes, new)

            self.each(operand, one)
            (size,) = _numbers([operand.shape[value.detail]])
            start += size

    def _reduce(self, value: Value, place: _Place) -> None:
        (operand,) = value.operands
        kept = [axis for axis in range(len(operand.shape)) if axis not in value.detail]
        first, function = _REDUCTIONS[value.cost]
        initial = first(value.dtype)

        def one(indices: list[Expr], vector: int | None, lanes: int) -> None:
            total = emit.allocate(lanes, value.dtype)
            emit.store(total, 0, emit.constant(initial, value.dtype, lanes), lanes)
            places: list[Expr] = [0] * len(operand.shape)
            for axis, number in zip(kept, indices, strict=True):
                places[axis] = number
            with ExitStack() as stack:
                for axis in value.detail:
                    (size,) = _numbers([operand.shape[axis]])
                    places[axis] = stack.enter_context(emit.loop(size))
                along = None if vector is None else kept[vector]
                term = self.element(operand, places, along, lanes)
                emit.store(total, 0, function(emit.load(total, 0, lanes), term), lanes)
            self.store(value, place, indices, vector, lanes, emit.load(total, 0, lanes))

        self.each(value, one)

    def _product(self, value: Value, place: _Place) -> None:
        data, weights = value.operands
        depth, columns = _numbers(weights.shape[-2:])
        source, packed = self.places[data], self.places[weights]
        rank = len(value.shape)
        row_axis = rank - 2
        label = self.axes.of(value, row_axis)
        rows: Expr = 1
        most = 1
        if label == self.rows:
            rows, most = self.task.rows, _ROWS
        elif label not in self.parallel:
            (most,) = _numbers([value.shape[row_axis]])
            rows = most
        tiles = math.prod(_packed(weights)[len(weights.shape) - 2 :])
        batch = _row_major(weights.shape[:-2])
        with ExitStack() as stack:
            indices: list[Expr] = [0] * rank
            for axis in range(rank - 2):
                if self.axes.of(value, axis) not in self.parallel:
                    indices[axis] = stack.enter_context(emit.loop(value.shape[axis]))
            behind = rank - len(data.shape)
            places = [
                0 if is_one(size) else indices[axis + behind]
                for axis, size in enumerate(data.shape[:-2])
            ]
            behind = rank - len(weights.shape)
            matrix: Any = 0
            for axis, stride in enumerate(batch):
                if not is_one(weights.shape[axis]):
                    start = self.task.starts.get(self.axes.of(weights, axis), 0)
                    matrix = matrix + (start + indices[axis + behind]) * stride
            operands = (
                source.buffer,
                emit.bind(emit.index(self._offset(data, source, [*places, 0, 0]))),
                source.strides[len(data.shape) - 2],
                packed.buffer,
                emit.bind(emit.index(matrix * tiles)),
                depth,
                columns,
                rows,
                most,
                place.buffer,
                emit.bind(emit.index(self._offset(value, place, indices))),
                place.strides[row_axis],
            )
            if weights.dtype == "float32":
                float_matmul.emit_product(*operands)
            else:
                code_matmul.emit_product(*operands, self.isa)

    # -- the function ------------------------------------------------------------------------------

    def emit(self, length: Expr) -> None:
        """Emit parameters and statements."""
        step = self.step
        buffers = self._parameters(length)
        captured = [self._whole(v, buffers[f"captured_{i}"]) for i, v in enumerate(step.captured)]
        initial = [self._whole(v, buffers[f"state_{i}"]) for i, v in enumerate(step.states)]
        final = [self._whole(v, buffers[f"final_{i}"]) for i, v in enumerate(step.states)]
        fixed = {
            label: size
            for label, size in self.parallel.items()
            if label not in (self.across, self.rows)
        }
        divide = self._blocks if self.across is None else self._parts
        tasks, task_of = divide(fixed)
        with emit.loop(tasks, "serial" if is_one(tasks) else "parallel") as number:
            self.task = _Task()
            self._check_memory()
            task_of(number)
            self._run(length, buffers, captured, initial, final)

    def _parameters(self, length: Expr) -> dict[str, Buffer]:
        step = self.step
        declared: dict[str, tuple[Sequence[Any], str]] = {}
        for number, value in enumerate(step.captured):
            shape = _packed(value) if value in step.weights else value.shape
            declared[f"captured_{number}"] = (shape, value.dtype)
        for number, value in enumerate(step.states):
            declared[f"state_{number}"] = (value.shape, value.dtype)
        for number, value in enumerate(step.elements):
            declared[f"sequence_{number}"] = ((length, *value.shape), value.dtype)
        for number, value in enumerate(step.states):
            declared[f"final_{number}"] = (value.shape, value.dtype)
        for number, value in enumerate(step.outputs):
            declared[f"output_{number}"] = ((length, *value.shape), value.dtype)
        made = emit.parameters(
            [
                (name, list(map(emit.index, shape)), dtype)
                for name, (shape, dtype) in declared.items()
            ]
        )
        return dict(zip(declared, made, strict=True))

    @staticmethod
    def _whole(value: Value, buffer: Buffer, base: Expr = 0) -> _Place:
        return _Place(buffer, base, _row_major(value.shape), absolute=True)

    def _check_memory(self) -> None:
        values = [*self.stored, *self.step.states]
        if sum(8 * self._local_size(value) for value in values) > _MAX_LOCAL:
            raise UsageError("its state takes too much memory for a kernel")

    def _parts(self, fixed: dict[tuple[int, int], Size]) -> tuple[Expr, Callable[[Expr], None]]:
        """Number of tasks with vectors across channels, and what sets the task to one.

        A group is a vector of channels at one place of the other parallel axes. Those of a task lie
        side by side, so that a step reads and writes long parts of memory.
        """
        across = self.across
        assert across is not None
        size, lanes = int(self.parallel[across]), self.lanes
        vectors = ceil_div(size, lanes)
        groups: Any = vectors
        for entry in fixed.values():
            groups = groups * entry
        kept = [*self.step.states, *self._laid_out()]
        near = max(1, _NEAR // max(4 * sum(map(self._local_size, kept)), 1))
        # Equal tasks for two cores: two, or four, ...
        if isinstance(groups, int):
            tasks = 2 * max(1, ceil_div(groups, 2 * near))
            most = self._groups = max(1, ceil_div(groups, tasks))
        else:
            tasks = 2 * T.max((groups + (2 * near - 1)) // (2 * near), emit.index(1))
            most = emit.bind(T.max((groups + tasks - 1) // tasks, emit.index(1)))
            self._groups = near

        def task_of(number: Expr) -> None:
            first = emit.bind(number * most)
            self._present = emit.bind(emit.lesser(groups - first, most))
            # Memory, not divisions at each step.
            starts = {label: emit.allocate(self._groups, "int64") for label in (across, *fixed)}
            with emit.loop(self._present) as group:
                # The last vector overlaps the one before.
                vector = (first + group) % vectors
                channel = emit.lesser(vector * lanes, max(size - lanes, 0))
                emit.store(starts[across], group, channel, 1)
                rest = (first + group) // vectors
                for label, entry in reversed(fixed.items()):
                    places = emit.greater(entry, 1)  # TVM divides where nothing runs, too
                    emit.store(starts[label], group, rest % places, 1)
                    rest = rest // places
            self._starts = starts

        return (groups + most - 1) // most, task_of

    def _blocks(self, fixed: dict[tuple[int, int], Size]) -> tuple[Expr, Callable[[Expr], None]]:
        """Number of tasks without them, and what sets the task to one."""
        most: Any = 1
        blocks: Any = 1
        size = None if self.rows is None else self.parallel[self.rows]
        # Two blocks of rows for two cores, or many.
        if isinstance(size, int):
            most = ceil_div(size, 2) if size <= 2 * _ROWS else _FEWER_ROWS
            blocks = ceil_div(size, most)
        elif size is not None:
            half = T.max((size + 1) // 2, emit.index(1))
            most = emit.bind(T.Select(size <= 2 * _ROWS, half, emit.index(_FEWER_ROWS)))
            blocks = (size + most - 1) // most

        def task_of(number: Expr) -> None:
            rest: Any = number
            for label, entry in fixed.items():
                self.task.starts[label] = emit.bind(rest % entry)
                rest = rest // entry
            if self.rows is not None:
                self.task.starts[self.rows] = emit.bind(rest * most)
                self.task.rows = emit.bind(emit.lesser(size - self.task.starts[self.rows], most))

        tasks = blocks
        for entry in fixed.values():
            tasks = tasks * entry
        return tasks, task_of

    def _group(self, number: Expr) -> None:
        """Set the task to a group of channels."""
        if self.across is None:
            return
        for label, starts in self._starts.items():
            self.task.starts[label] = emit.bind(emit.load(starts, number, 1))

    def _run(
        self,
        length: Expr,
        buffers: dict[str, Buffer],
        captured: Sequence[_Place],
        initial: Sequence[_Place],
        final: Sequence[_Place],
    ) -> None:
        """Emit what a task does."""
        step = self.step
        groups = 1 if self.across is None else self._groups
        present: Expr = 1 if self.across is None else self._present
        states = [self.local(value, groups) for value in step.states]
        aliases = self._aliases()
        renewals, saved = self._renewals(aliases)
        spare = {value: self.local(value) for value in saved}
        kept = self._laid_out()
        kept += [v for v in self.values if v in self.stored and v in self.captured_by]
        constants = {value: self.local(value, groups) for value in kept}
        locals_ = {
            value: self.local(value)
            for value in self.values
            if value in self.stored and value not in constants and value not in aliases
        }

        def of_group(place: _Place, value: Value, group: Expr) -> _Place:
            base = group * self._local_size(value)
            return _Place(place.buffer, base, place.strides, absolute=False)

        def begin(group: Expr) -> None:
            self.places = dict(zip(step.captured, captured, strict=True))
            for value in kept:
                place = of_group(constants[value], value, group)
                self.statement(value, place)
                self.places[value] = place

        with emit.loop(present) as group:
            self._group(group)
            begin(group)
            for value, source, target in zip(step.states, initial, states, strict=True):
                self.copy(value, source, of_group(target, value, group))
        with ExitStack() as stack:
            time = stack.enter_context(emit.loop(length))
            self.places = dict(zip(step.captured, captured, strict=True))
            for number, value in enumerate(step.elements):
                size: Any = 1
                for entry in value.shape:
                    size = size * entry
                base = emit.bind(emit.index(time * size))
                self.places[value] = self._whole(value, buffers[f"sequence_{number}"], base)
            # Shared values may read what is constant in time; it has a copy for each group, and
            # without parallel axes they are equal.
            for value in kept:
                if len(self._rest(value)) == len(value.shape):
                    self.places[value] = constants[value]
            for value in self.values:
                if value in self.shared:
                    self.statement(value, locals_[value])
                    self.places[value] = locals_[value]
            group = stack.enter_context(emit.loop(present))
            self._group(group)
            for value in kept:
                self.places[value] = of_group(constants[value], value, group)
            for value, place in zip(step.states, states, strict=True):
                self.places[value] = of_group(place, value, group)
            for value in self.values:
                if value not in self.stored or value in constants or value in self.shared:
                    continue
                state = aliases.get(value)
                place = locals_[value] if state is None else self.places[state]
                self.statement(value, place)
                self.places[value] = place
            for number, value in enumerate(step.outputs):
                self._output(value, buffers[f"output_{number}"], time)
            targets = {old: self.places[old] for old, _ in renewals}
            for value, place in spare.items():
                self.copy(value, self.places[value], place)
                self.places[value] = place
            for old, new in renewals:
                self._renew(old, new, targets[old])
        with emit.loop(present) as group:
            self._group(group)
            for value, source, target in zip(step.states, states, final, strict=True):
                self.copy(value, of_group(source, value, group), target)

    def _laid_out(self) -> list[Value]:
        """Captured tensors that are read across channels that do not lie side by side."""
        found = []
        for value in self.step.captured:
            axis = self.axes.axis(value, self.across) if value in self.values else None
            behind = axis is not None and axis != len(value.shape) - 1
            if behind and 4 * self._local_size(value) <= _NEAR:
                found.append(value)
        return found

    def _output(self, value: Value, buffer: Buffer, time: Expr) -> None:
        size: Any = 1
        for entry in value.shape:
            size = size * entry
        place = self._whole(value, buffer, emit.bind(emit.index(time * size)))

        def one(indices: list[Expr], vector: int | None, lanes: int) -> None:
            new = self.element(value, indices, vector, lanes)
            self.store(value, place, indices, vector, lanes, new)

        self.each(value, one)

    def _renewals(
        self, aliases: dict[Value, Value]
    ) -> tuple[list[tuple[Value, Value]], list[Value]]:
        """Old and new states to copy, in this order, and old states to save before.

        A state that becomes another one has to be read before it is renewed; where states go
        round, one of them is saved.
        """
        pending = [
            (old, new)
            for old, new in zip(self.step.states, self.step.new_states, strict=True)
            if new is not old and aliases.get(new) is not old
        ]
        order: list[tuple[Value, Value]] = []
        saved: list[Value] = []
        while pending:
            read = {new for _, new in pending if new not in saved}
            free = [pair for pair in pending if pair[0] not in read]
            if not free:
                saved.append(pending[0][0])
            order += free
            pending = [pair for pair in pending if pair not in free]
        return order, saved

    def _renew(self, old: Value, new: Value, target: _Place) -> None:
        """Make the new state the old one."""

        def one(indices: list[Expr], vector: int | None, lanes: int) -> None:
            renewed = self.element(new, indices, vector, lanes)
            self.store(old, target, indices, vector, lanes, renewed)

        self.each(old, one)

    def _aliases(self) -> dict[Value, Value]:
        """New states that may be computed in the place of the old ones.

        Nothing else reads the old state, and each new element only the old one at its place.
        """
        step = self.step
        found: dict[Value, Value] = {}
        readers: dict[Value, list[tuple[Value, bool]]] = {}
        for value in self.values:
            if value in self.stored:
                for source, alone in _reads(value, self.stored):
                    readers.setdefault(source, []).append((value, alone))
        for value in step.outputs:
            if value not in self.stored:
                for source, _ in [(value, False), *_reads(value, self.stored)]:
                    readers.setdefault(source, []).append((value, False))
        for old, new in zip(step.states, step.new_states, strict=True):
            alone = all(user is new and same_place for user, same_place in readers.get(old, []))
            renewed = old in step.new_states  # a state that becomes another one
            twice = list(step.new_states).count(new) > 1
            whole = self.across is not None or all(
                isinstance(size, int) and size % min(_LANES, 1 << (size.bit_length() - 1)) == 0
                for size in new.shape[-1:]
            )
            plain = new.kind == "map" and new not in self.captured_by
            if plain and alone and not renewed and not twice and whole:
                found[new] = old
        return found


def _computed(result: Expr, dtype: str, lanes: int) -> Expr:
    """Compute an expression once, in a register, hidden from TVM.

    Its analysis puts the expression in the place of each use of a variable that is bound to it:
    two functions one behind the other take it half a minute. The memory is on the stack, which
    LLVM turns into registers; it would keep what TVM allocates for ``registers`` up to date.
    """
    memory = emit.allocate(lanes, dtype)
    emit.store(memory, 0, result, lanes)
    return emit.bind(emit.load(memory, 0, lanes))


def _least(dtype: str) -> Any:
    return -math.inf if dtype.startswith("float") else int(np.iinfo(dtype).min)


def _largest(dtype: str) -> Any:
    return math.inf if dtype.startswith("float") else int(np.iinfo(dtype).max)


_REDUCTIONS: dict[str, tuple[Callable[[str], Any], Callable[[Expr, Expr], Expr]]] = {
    "sum": (lambda _: 0, lambda a, b: a + b),
    "prod": (lambda _: 1, lambda a, b: a * b),
    "max": (_least, T.max),
    "min": (_largest, T.min),
}


def _packed(weights: Value) -> list[Size]:
    """Shape of the weights of a product as the kernel takes them."""
    module = float_matmul if weights.dtype == "float32" else code_matmul
    return [*weights.shape[:-2], *module.packed_shape(*_numbers(weights.shape[-2:]))]


def kernel(step: Recurrence, name: str, length: Size, isa: Isa = GENERIC) -> Any:
    """Build the kernel of a recurrence.

    Parameters
    ----------
    step
        One step.
    name
        Symbol of the function.
    length
        Number of steps; an expression (a ``tirx.Var``) where it is known at run time.
    isa
        The instruction set of products of codes.

    Returns
    -------
    PrimFunc
        ``(captured..., states..., sequences [length, *element]..., final states..., outputs
        [length, *element]...)``. Size variables of the shapes are those of the step.

    Raises
    ------
    UsageError
        If no kernel computes such a step.
    """
    emitter = _Emitter(step, isa)
    return emit.primitive_function(name, lambda: emitter.emit(emit.index(length)))
