"""Kernels with a time loop inside: every result is that of a loop in NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.errors import UsageError
from bitwright.targets.kernels import code_matmul, emit, float_matmul
from bitwright.targets.kernels.recurrence import Recurrence, Value, aligned, kernel, ordered
from tests.quant.qdq import Array

TARGETS = [{"kind": "llvm"}, {"kind": "llvm", "mcpu": "x86-64-v3"}]
CHANNELS = [1, 3, 5, 8, 9, 17, 32, 77, 94]

PACK = {"float32": float_matmul.pack, "int8": code_matmul.pack, "int16": code_matmul.pack}

Step = Callable[..., Sequence[Array]]
"""Takes captured values, states and elements; returns new states and outputs."""


def captured(*shape: Any, dtype: str = "float32") -> Value:
    return Value("captured", shape, dtype)


def state(*shape: Any, dtype: str = "float32") -> Value:
    return Value("state", shape, dtype)


def element(*shape: Any, dtype: str = "float32") -> Value:
    return Value("element", shape, dtype)


def number(value: float) -> Value:
    return Value("constant", (), "float32", (), value)


def mapped(function: Callable[..., Any], *operands: Value, cost: int = 1) -> Value:
    rank = max(len(operand.shape) for operand in operands)
    shape = [1] * rank
    for operand in operands:
        for axis, size in enumerate(operand.shape, rank - len(operand.shape)):
            shape[axis] = size if size != 1 else shape[axis]
    return Value("map", tuple(shape), operands[0].dtype, operands, function, cost)


def add(a: Value, b: Value) -> Value:
    return mapped(lambda x, y, _: x + y, a, b)


def multiply(a: Value, b: Value) -> Value:
    return mapped(lambda x, y, _: x * y, a, b)


def reduced(data: Value, name: str, *axes: int) -> Value:
    kept = tuple(size for axis, size in enumerate(data.shape) if axis not in axes)
    return Value("reduce", kept, data.dtype, (data,), axes, name)


@dataclass(frozen=True)
class Test:
    """A step, twice."""

    __test__ = False

    step: Recurrence
    reference: Step
    sizes: dict[Any, int] = field(default_factory=dict)  # of symbolic sizes

    def run(self, target: dict[str, str], steps: int, *, fixed: bool = False) -> None:
        """Compile, run for some steps, and compare."""
        length = steps if fixed else tirx.Var("steps", "int64")
        built = tvm.compile(
            tvm.IRModule({"loop": kernel(self.step, "loop", length)}),
            target=tvm.target.Target(target),
        )
        for given in [steps] if fixed else [steps, 0, 1]:
            self._compare(built, given)

    def _values(self, random: np.random.Generator, value: Value, *leading: int) -> Array:
        shape = [*leading, *(s if isinstance(s, int) else self.sizes[s] for s in value.shape)]
        if value.dtype.startswith("int"):
            return random.integers(-3, 4, shape).astype(value.dtype)
        return np.asarray(random.normal(size=shape) / 2, value.dtype)

    def _compare(self, built: Any, steps: int) -> None:
        random = np.random.default_rng(steps)
        step = self.step
        constants = [self._values(random, value) for value in step.captured]
        first = [self._values(random, value) for value in step.states]
        sequences = [self._values(random, value, steps) for value in step.elements]
        states, rows = list(first), []
        for elements in zip(*sequences, strict=True):
            results = self.reference(*constants, *states, *elements)
            states = list(results[: len(states)])
            rows.append(results[len(states) :])
        given = [
            array if value not in step.weights else PACK[value.dtype](array)
            for value, array in zip(step.captured, constants, strict=True)
        ]
        results = [
            np.full_like(self._values(random, value, *leading), 77)
            for values, leading in ((step.states, ()), (step.outputs, (steps,)))
            for value in values
        ]
        tensors = list(map(tvm.runtime.tensor, [*given, *first, *sequences, *results]))
        built["loop"](*tensors)
        found = [tensor.numpy() for tensor in tensors[-len(results) :]]
        expected = [*states, *map(np.array, zip(*rows, strict=True))] if rows else states
        for ours, theirs in zip(found, expected, strict=False):
            assert ours.shape == np.shape(theirs)
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def leaky(*shape: Any) -> Test:
    """``s = a * s + x; y = s * x`` with a captured ``a`` for each channel."""
    a, s, x = captured(shape[-1]), state(*shape), element(*shape)
    new = add(multiply(s, a), x)

    def reference(a: Array, s: Array, x: Array) -> Sequence[Array]:
        return a * s + x, (a * s + x) * x

    return Test(Recurrence((a,), (s,), (x,), (new,), (multiply(new, x),)), reference)


def total(*shape: Any) -> Test:
    """``s = s + x; y = sum of s along the last axis``: vectors run along it."""
    s, x = state(*shape), element(*shape)
    new = add(s, x)

    def reference(s: Array, x: Array) -> Sequence[Array]:
        return s + x, (s + x).sum(-1)

    return Test(
        Recurrence((), (s,), (x,), (new,), (reduced(new, "sum", len(shape) - 1),)), reference
    )


@pytest.mark.parametrize("target", TARGETS, ids=["plain", "v3"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_side_by_side(channels: int, target: dict[str, str]) -> None:
    leaky(3, channels).run(target, 5)


@pytest.mark.parametrize("target", TARGETS, ids=["plain", "v3"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_vectors_along_the_last_axis(channels: int, target: dict[str, str]) -> None:
    total(channels).run(target, 5)
    total(3, channels).run(target, 5)


@pytest.mark.parametrize("steps", [1, 7, 300])
def test_a_number_of_steps_that_is_known(steps: int) -> None:
    leaky(2, 9).run(TARGETS[0], steps, fixed=True)


@pytest.mark.parametrize("batch", [0, 1, 2, 9])
def test_symbolic_batch(batch: int) -> None:
    size = tirx.Var("batch", "int64")
    for test in (leaky(size, 5), total(size, 5)):
        Test(test.step, test.reference, {size: batch}).run(TARGETS[1], 4)


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 8, 101])
@pytest.mark.parametrize("places", [1, 3])
def test_tasks_of_channels_and_batch(places: int, batch: int) -> None:
    """Of 101 rows a cache holds a part only."""
    size = tirx.Var("batch", "int64")
    test = leaky(size, places, 94)
    Test(test.step, test.reference, {size: batch}).run(TARGETS[1], 3)
    leaky(batch, places, 94).run(TARGETS[1], 3)


@pytest.mark.parametrize(
    "channels, depth, lanes",
    [
        *[(550, 1, 32), (64, 1, 32), (63, 1, 16), (48, 1, 16), (40, 1, 8), (9, 1, 8), (5, 1, 4)],
        *[(512, 64, 32), (512, 200, 16), (512, 2000, 8)],
    ],
)
def test_vectors_are_full_and_their_states_in_the_cache(
    channels: int, depth: int, lanes: int
) -> None:
    s, x = state(channels, depth), element(channels, depth)
    new = add(s, x)
    step = Recurrence((), (s,), (x,), (new,), (reduced(new, "sum", 1),))
    text = kernel(step, "loop", 4).script()
    assert re.search(rf"\[T.Ramp\(.*, {lanes}\)\]", text)
    assert not re.search(rf"\[T.Ramp\(.*, {2 * lanes}\)\]", text)


@pytest.mark.parametrize("target", TARGETS, ids=["plain", "v3"])
@pytest.mark.parametrize("width", [1, 19])
@pytest.mark.parametrize(
    "name, function", [("sum", np.sum), ("prod", np.prod), ("max", np.max), ("min", np.min)]
)
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_reductions(
    name: str, function: Any, width: int, dtype: str, target: dict[str, str]
) -> None:
    s, x = state(width, dtype=dtype), element(2, width, dtype=dtype)
    row, column = reduced(x, name, 0), reduced(x, name, 1)
    new = Value("map", (width,), dtype, (row, s), lambda a, b, _: a + b, 1)

    def reference(s: Array, x: Array) -> Sequence[Array]:
        return s + function(x, 0), function(x, 1)

    Test(Recurrence((), (s,), (x,), (new,), (column,)), reference).run(target, 3)


@pytest.mark.parametrize("target", TARGETS, ids=["plain", "v3"])
@pytest.mark.parametrize("rows, hidden", [(1, 1), (2, 7), (1, 16), (5, 21), ("batch", 21)])
def test_a_recurrent_matrix(hidden: int, rows: Any, target: dict[str, str]) -> None:
    sizes = {}
    if rows == "batch":
        rows = tirx.Var("batch", "int64")
        sizes = {rows: 7}
    w, s, x = captured(hidden, hidden), state(rows, hidden), element(rows, hidden)
    product = Value("product", (rows, hidden), "float32", (s, w))
    new = mapped(lambda a, _: T.max(a, T.min(a, a)), add(product, x))

    def reference(w: Array, s: Array, x: Array) -> Sequence[Array]:
        new = s @ w + x
        return new, new * s

    step = Recurrence((w,), (s,), (x,), (new,), (multiply(new, s),), frozenset([w]))
    Test(step, reference, sizes).run(target, 3)


def test_an_element_times_a_matrix() -> None:
    w, s, x = captured(2, 9, 5), state(2, 3, 5), element(3, 9)
    product = Value("product", (2, 3, 5), "float32", (x, w))

    def reference(w: Array, s: Array, x: Array) -> Sequence[Array]:
        return s + x @ w, s

    step = Recurrence((w,), (s,), (x,), (add(s, product),), (s,), frozenset([w]))
    Test(step, reference).run(TARGETS[1], 3)


@pytest.mark.parametrize("target", TARGETS, ids=["plain", "v3"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("weight", ["int8", "int16"])
@pytest.mark.parametrize("sums", ["int32", "int64"])
def test_a_recurrent_matrix_of_codes(
    sums: str, weight: str, rows: int, target: dict[str, str]
) -> None:
    w, x = captured(6, 6, dtype=weight), element(rows, 6, dtype=sums)
    s = state(rows, 6, dtype="int16")
    product = Value("product", (rows, 6), sums, (s, w))
    low = Value("map", (rows, 6), sums, (product,), lambda a, _: T.bitwise_and(a, a % 8), 1)
    new = Value("map", (rows, 6), "int16", (low,), lambda a, n: emit.cast(a, "int16", n), 1)

    def reference(w: Array, s: Array, x: Array) -> Sequence[Array]:
        product = s.astype(np.int64) @ w
        return (product & (product % 8)).astype(np.int16), product + x

    step = Recurrence((w,), (s,), (x,), (new,), (add(x, product),), frozenset([w]))
    Test(step, reference).run(target, 5)


@pytest.mark.parametrize("target", TARGETS, ids=["plain", "v3"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_elements_of_a_table(channels: int, target: dict[str, str]) -> None:
    table, s, x = captured(11), state(2, channels), element(2, channels, dtype="int32")
    place = Value("map", x.shape, "int32", (x,), lambda a, n: a + emit.constant(5, "int32", n), 1)
    found = Value("lookup", x.shape, "float32", (table, place), None, 8)

    def reference(table: Array, s: Array, x: Array) -> Sequence[Array]:
        return s + table[x + 5], table[x + 5]

    Test(Recurrence((table,), (s,), (x,), (add(s, found),), (found,)), reference).run(target, 4)


A, B, C, X = state(9), state(9), state(9), element(9)
MOVES: dict[str, tuple[tuple[Value, ...], tuple[Value, ...], tuple[Value, ...], Step]] = {
    "swap": ((A, B), (B, A), (add(A, X),), lambda a, b, x: (b, a, a + x)),
    "round": ((A, B, C), (C, A, B), (), lambda a, b, c, _: (c, a, b)),
    "two rounds and one": (
        (A, B, C), (B, A, add(C, A)), (C,), lambda a, b, c, _: (b, a, c + a, c)
    ),
    "shift": ((A, B, C), (X, A, B), (C,), lambda a, b, c, x: (x, a, b, c)),
    "shift back": ((A, B, C), (B, C, X), (A,), lambda a, b, c, x: (b, c, x, a)),
    "copy": ((A, B), (A, A), (B,), lambda a, b, _: (a, a, b)),
    "reads the old one": (
        (A, B), (add(A, X), multiply(B, A)), (), lambda a, b, x: (a + x, b * a)
    ),
    "stays": ((A,), (A,), (add(A, X),), lambda a, x: (a, a + x)),
    "becomes the element": ((A,), (X,), (A,), lambda a, x: (x, a)),
}  # fmt: skip


@pytest.mark.parametrize("width", [1, 9])
@pytest.mark.parametrize("name", MOVES)
def test_states_that_become_one_another(name: str, width: int) -> None:
    states, news, outputs, reference = MOVES[name]
    if width == 9:
        Test(Recurrence((), states, (X,), news, outputs), reference).run(TARGETS[1], 5)
        return
    # A sum makes vectors run along the axis.
    both = (*outputs, reduced(X, "sum", 0))

    def with_sum(*values: Array) -> Sequence[Array]:
        return (*reference(*values), np.sum(values[-1]))

    Test(Recurrence((), states, (X,), news, both), with_sum).run(TARGETS[1], 5)


@pytest.mark.parametrize("width", [8, 13])
def test_a_state_is_read_before_and_behind_its_renewal(width: int) -> None:
    s, x = state(width), element(width)
    new = mapped(lambda a, b, _: a * b + a, s, x, cost=5)
    mixed = reduced(multiply(new, s), "sum", 0)

    def reference(s: Array, x: Array) -> Sequence[Array]:
        new = s * x + s
        return new, s, new, new + s, np.sum(new * s)

    step = Recurrence((), (s,), (x,), (new,), (s, new, add(new, s), mixed))
    Test(step, reference).run(TARGETS[1], 4)


@pytest.mark.parametrize("width", [3, 8, 13])
def test_two_states_of_the_same_new_value(width: int) -> None:
    a, b, x = state(width), state(width), element(width)
    new = add(a, x)

    def reference(a: Array, b: Array, x: Array) -> Sequence[Array]:
        return a + x, a + x, b

    Test(Recurrence((), (a, b), (x,), (new, new), (b,)), reference).run(TARGETS[1], 4)


@pytest.mark.parametrize("sizes", [(3, 8), (5, 9), (1, 4), (4, 1)])
def test_moves(sizes: tuple[int, int]) -> None:
    rows, columns = sizes
    s, x = state(rows, columns), element(columns, rows)
    turned = Value("permute", (rows, columns), "float32", (x,), (1, 0))
    new = add(s, turned)
    flat = Value("reshape", (rows * columns,), "float32", (new,))
    round_ = Value("slice", (rows, columns), "float32", (s,), ([rows - 1, 0], [-1, 1]))
    both = Value("concat", (2 * rows, columns), "float32", (s, turned), 0)
    wide = Value("broadcast", (2, rows, columns), "float32", (s,))

    def reference(s: Array, x: Array) -> Sequence[Array]:
        new = s + x.T
        return new, new.ravel(), s[::-1], np.concatenate([s, x.T]), np.stack([s, s])

    step = Recurrence((), (s,), (x,), (new,), (flat, round_, both, wide))
    Test(step, reference).run(TARGETS[1], 3)


def test_what_depends_on_captured_values_alone() -> None:
    a, s, x = captured(4, 9), state(9), element(9)
    sums = reduced(multiply(a, a), "sum", 0)

    def reference(a: Array, s: Array, x: Array) -> Sequence[Array]:
        return s + x * (a * a).sum(0), (a * a).sum(0)

    step = Recurrence((a,), (s,), (x,), (add(s, multiply(x, sums)),), (sums,))
    Test(step, reference).run(TARGETS[1], 3)


def test_captured_matrices_across_channels() -> None:
    a, s, x, b = captured(20, 5), state(20, 5), element(20), element(5)
    wide = Value("reshape", (20, 1), "float32", (x,))
    new = add(multiply(s, a), multiply(wide, b))

    def reference(a: Array, s: Array, x: Array, b: Array) -> Sequence[Array]:
        new = s * a + x[:, None] * b
        return new, new.sum(1) + x

    y = add(reduced(new, "sum", 1), x)
    Test(Recurrence((a,), (s,), (x, b), (new,), (y,)), reference).run(TARGETS[1], 6)


def test_a_size_that_is_not_known_inside_a_task() -> None:
    size = tirx.Var("size", "int64")
    with pytest.raises(UsageError, match="known at run time only"):
        kernel(total(size).step, "loop", tirx.Var("steps", "int64"))


def test_a_state_that_is_too_large() -> None:
    with pytest.raises(UsageError, match="too much memory"):
        kernel(total(1 << 20).step, "loop", 3)


def test_the_text_does_not_grow_with_the_steps() -> None:
    texts = [kernel(leaky(3, 17).step, "loop", steps).script() for steps in (2, 9999)]
    assert texts[0].count("\n") == texts[1].count("\n")


@pytest.mark.parametrize(
    "before, after, pairs, whole",
    [
        ((2, 3), (2, 3), [(0, 0), (1, 1)], True),
        ((2, 3), (2, 1, 3), [(0, 0), (1, 2)], True),
        ((2, 3, 4), (2, 12), [(0, 0)], False),
        ((2, 3, 4), (6, 4), [(2, 1)], False),
        ((2, 3, 4, 5), (2, 4, 3, 5), [(0, 0), (3, 3)], False),
        ((6,), (2, 3), [], False),
        ((1, 6), (6, 1), [(1, 0)], True),
        ((), (1, 1), [], True),
    ],
)
def test_axes_that_a_reshape_leaves_alone(
    before: tuple[int, ...], after: tuple[int, ...], pairs: list[tuple[int, int]], whole: bool
) -> None:
    assert aligned(before, after) == (pairs, whole)


def test_operands_come_first() -> None:
    one, two = number(1), number(2)
    both = add(one, two)
    again = multiply(both, one)
    assert ordered([again, two]) == [one, two, both, again]
