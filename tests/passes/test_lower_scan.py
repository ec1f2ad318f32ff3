"""LowerScan: the form of what it makes, and which bodies it takes."""

# The functions in TVMScript are parsed by TVM; their annotations are no Python types.
# mypy: disable-error-code="untyped-decorator, valid-type"

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.ir import SourceName, Span
from tvm.relax import op

from bitwright.passes import ops
from bitwright.passes.expressions import calls, operator
from bitwright.passes.lower_scan import LowerScan
from bitwright.passes.recognize_scan import COMPOSITES
from tests.passes.modules import transform
from tests.quant.qdq import Array

TARGETS = [{"kind": "llvm"}, {"kind": "llvm", "mcpu": "x86-64-v3"}]
Spec = tuple[Any, ...]  # dtype, then sizes


def variables(prefix: str, specs: Sequence[Spec]) -> list[Any]:
    return [
        relax.Var(f"{prefix}{i}", relax.TensorType(list(shape), dtype))
        for i, (dtype, *shape) in enumerate(specs)
    ]


def module(
    body: Callable[..., Sequence[Any]],
    captured: Sequence[Spec | Array] = (),
    states: Sequence[Spec] = (),
    sequences: Sequence[Spec] = (),
    *,
    length: Any = None,
    name: str = "",
) -> Any:
    """A module of one scan: ``body`` gets captured values, states and elements, and calls."""
    builder = relax.BlockBuilder()
    specs = [
        (entry.dtype.name, *entry.shape) if isinstance(entry, np.ndarray) else entry
        for entry in captured
    ]
    parameters = variables("p", [*specs, *states, *sequences])
    with builder.function("body", parameters, private=True):
        with builder.dataflow():
            results = [builder.emit(entry) for entry in body(builder.emit, *parameters)]
            result = builder.emit_output(relax.Tuple(results))
        step = builder.emit_func_output(result)
    outputs = builder.get()[step].ret_ty.fields[len(states) :]
    length = tirx.Var("T", "int64") if length is None else length
    given = variables("c", [entry for entry in captured if not isinstance(entry, np.ndarray)])
    rest = iter(given)
    fixed = [
        relax.const(entry, entry.dtype.name) if isinstance(entry, np.ndarray) else next(rest)
        for entry in captured
    ]
    first = variables("s", states)
    stacked = variables("x", [(dtype, length, *shape) for dtype, *shape in sequences])
    kinds = [entry.ty for entry in first]
    kinds += [relax.TensorType([length, *field.shape], field.dtype) for field in outputs]
    with builder.function("main", [*given, *first, *stacked]):
        with builder.dataflow():
            call = ops.scan(step, fixed, first, stacked, relax.TupleType(kinds))
            if name:
                span = Span(SourceName(name), 1, 1, 1, 1)
                call = relax.Call(call.op, call.args, call.attrs, call.ty_args, span)
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    return builder.get()


def lowered(before: Any) -> Any:
    lowering: Any = LowerScan()  # TVM's decorator makes it a pass
    return lowering(before)


def kernels(after: Any) -> list[Any]:
    """The functions that call kernels."""
    return [
        function
        for function in after.functions.values()
        if isinstance(function, relax.Function)
        and function.attrs
        and function.attrs.get("Composite") in COMPOSITES
    ]


def is_lowered(after: Any) -> bool:
    """Whether it is a kernel; else the scan must be as it was."""
    left = [call for call in calls(after["main"]) if operator(call) == ops.SCAN]
    assert len(left) + len(kernels(after)) == 1
    return not left


def run(built: Any, target: dict[str, str], *inputs: Array) -> list[Array]:
    executable = tvm.compile(built, target=tvm.target.Target(target))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    results = machine["main"](*map(tvm.runtime.tensor, inputs))
    return [np.asarray(entry.numpy()) for entry in results]


def running_sum(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
    new = emit(op.add(s, x))
    return [new, emit(op.exp(new))]


ROW = ("float32", 3, 9)


# -- form ----------------------------------------------------------------------------------------


def test_a_call_of_a_private_function_that_calls_the_kernel() -> None:
    before = module(running_sum, (), [ROW], [ROW], name="a/scan")
    after = transform(before, LowerScan())
    names = sorted(variable.name_hint for variable in after.get_global_vars())
    assert names == ["a_scan", "a_scan_kernel", "main"]  # the body is gone

    builder = relax.BlockBuilder()
    kernel = after["a_scan_kernel"]
    assert isinstance(kernel, tirx.PrimFunc)
    builder.update_func(builder.add_func(kernel, "a_scan_kernel"), kernel)
    kernel_variable = builder.get().get_global_var("a_scan_kernel")
    steps, inner = tirx.Var("T", "int64"), tirx.Var("d", "int64")

    def kinds(length: Any) -> list[Any]:
        shapes = ([3, 9], [length, 3, 9])
        return [relax.TensorType(shape, "float32") for shape in shapes]

    parameters = [relax.Var(f"p{i}", kind) for i, kind in enumerate(kinds(inner))]
    attributes = {"Composite": "bitwright.recurrence", "node": "a/scan"}
    with builder.function("a_scan", parameters, attrs=attributes, private=True):
        with builder.dataflow():
            made = builder.emit(relax.call_tir(kernel_variable, parameters, kinds(inner)))
            result = builder.emit_output(made)
        function = builder.emit_func_output(result)
    inputs = [relax.Var(f"v{i}", kind) for i, kind in enumerate(kinds(steps))]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(relax.Call(function, inputs))
        builder.emit_func_output(result)
    expected = builder.get()
    for name in ("a_scan", "main"):
        # Each module has its own variables for its functions.
        tvm.ir.assert_structural_equal(after[name], expected[name], map_free_vars=True)


def test_the_call_keeps_the_name_of_its_node() -> None:
    after = transform(module(running_sum, (), [ROW], [ROW], name="a/scan"), LowerScan())
    (call,) = calls(after["main"])
    assert call.span.source_name.name == "a/scan"


def test_a_module_without_scans_stays_as_it_is() -> None:
    builder = relax.BlockBuilder()
    (x,) = variables("x", [ROW])
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(op.exp(x))
        builder.emit_func_output(result)
    before = builder.get()
    tvm.ir.assert_structural_equal(transform(before, LowerScan()), before)


def test_two_scans_of_one_name_have_two_kernels() -> None:
    builder = relax.BlockBuilder()
    p, e = variables("p", [ROW, ROW])
    with builder.function("body", [p, e], private=True):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple(running_sum(builder.emit, p, e)))
        body = builder.emit_func_output(result)
    s, x = variables("v", [ROW, ("float32", 4, 3, 9)])
    kind = relax.TupleType([s.ty, x.ty])
    with builder.function("main", [s, x]):
        with builder.dataflow():
            first = builder.emit(ops.scan(body, [], [s], [x], kind), "loop")
            output = builder.emit(relax.TupleGetItem(first, 1))
            second = ops.scan(body, [], [s], [output], kind)
            result = builder.emit_output(second, "loop")
        builder.emit_func_output(result)
    after = transform(builder.get(), LowerScan())
    assert len(kernels(after)) == 2
    values = np.zeros((3, 9), np.float32), np.full((4, 3, 9), -1, np.float32)
    state, _ = run(after, TARGETS[0], *values)
    rows = np.exp(-np.arange(1, 5, dtype=np.float32))
    np.testing.assert_allclose(state, np.full((3, 9), rows.sum()), rtol=1e-5)


@pytest.mark.parametrize("length", [None, 5])
def test_one_result_is_a_tuple_all_the_same(length: int | None) -> None:
    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        return [emit(op.add(s, x))]

    after = transform(module(body, (), [ROW], [ROW], length=length), LowerScan())
    x = np.ones((5, 3, 9), np.float32)
    for target in TARGETS:
        (state,) = run(after, target, np.zeros((3, 9), np.float32), x)
        np.testing.assert_array_equal(state, x.sum(0))


def test_the_kernel_does_not_grow_with_the_length() -> None:
    texts, times = [], []
    for length in (2, 50_000):
        start = time.perf_counter()
        after = transform(module(running_sum, (), [ROW], [ROW], length=length), LowerScan())
        tvm.compile(after, target=tvm.target.Target(TARGETS[0]))
        times.append(time.perf_counter() - start)
        texts.append(after.script().count("\n"))
    assert texts[0] == texts[1]
    assert times[1] < 3 * times[0] + 1


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [1, 20])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_recurrent_matrix(hidden: int, constant: bool, batch: int) -> None:
    def body(emit: Callable[[Any], Any], w: Any, s: Any, x: Any) -> list[Any]:
        new = emit(op.tanh(emit(op.add(emit(op.matmul(s, w)), x))))
        return [new, new]

    random = np.random.default_rng(0)
    weights = random.normal(size=(hidden, hidden)).astype(np.float32) / 3
    spec = ("float32", batch, hidden)
    matrix: Any = weights if constant else ("float32", hidden, hidden)
    after = transform(module(body, [matrix], [spec], [spec]), LowerScan())
    assert is_lowered(after)
    # Constant weights are laid out in tiles.
    shapes = [[int(d) for d in entry.ty.shape] for entry in kernels(after)[0].params[:1]]
    assert shapes == [[-(-hidden // 16), hidden, 16] if constant and hidden > 1 else shapes[0]]
    s = random.normal(size=(batch, hidden)).astype(np.float32)
    xs = random.normal(size=(6, batch, hidden)).astype(np.float32)
    rows, new = [], s
    for x in xs:
        new = np.tanh(new @ weights + x)
        rows.append(new)
    for target in TARGETS:
        state, output = run(after, target, *([] if constant else [weights]), s, xs)
        np.testing.assert_allclose(state, new, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(output, rows, rtol=1e-5, atol=1e-6)


# -- which bodies --------------------------------------------------------------------------------

UNARY = """abs ceil cos erf exp floor isfinite isinf isnan log negative round rsqrt sigmoid sign sin
    sqrt square tanh nn.relu nn.silu nn.softplus""".split()


def find(name: str) -> Any:
    return getattr(op.nn, name.removeprefix("nn.")) if name.startswith("nn.") else getattr(op, name)


@pytest.mark.parametrize("name", UNARY)
def test_functions(name: str) -> None:
    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        return [emit(op.add(s, x)), emit(find(name)(x))]

    assert is_lowered(transform(module(body, (), [ROW], [ROW]), LowerScan()))


@pytest.mark.parametrize("name", ["max", "min", "sum", "prod", "mean"])
@pytest.mark.parametrize("axis", [None, 0, [0, 1]])
def test_reductions(name: str, axis: Any) -> None:
    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        return [emit(op.add(s, x)), emit(find(name)(x, axis))]

    assert is_lowered(transform(module(body, (), [ROW], [ROW]), LowerScan()))


OTHERS: dict[str, Callable[..., Any]] = {
    "cumsum": lambda s, _: op.cumsum(s, 1),
    "flip": lambda s, _: op.flip(s, 0),
    "take": lambda s, _: op.take(s, relax.const(np.array([1, 0, 2]), "int64"), 0),
    "computed take": lambda s, x: op.take(s, op.astype(op.sum(x, [0]), "int64"), 1, "clip"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_bodies_stay(name: str) -> None:
    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        return [emit(op.add(s, x)), emit(OTHERS[name](s, x))]

    before = module(body, (), [ROW], [ROW])
    after = transform(before, LowerScan())
    assert not is_lowered(after)
    tvm.ir.assert_structural_equal(after, before)


def test_a_sum_along_a_symbolic_size_stays() -> None:
    size = tirx.Var("n", "int64")

    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        return [emit(op.add(s, x)), emit(op.sum(x, [0]))]

    specs = [("float32", size)]
    assert not is_lowered(transform(module(body, (), specs, specs), LowerScan()))


def test_functions_one_behind_the_other_compile_quickly() -> None:
    # TVM's analysis of variables that hold expressions would take minutes.
    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        value = emit(op.add(s, x))
        for name in ("softplus", "silu", "softplus", "silu"):
            value = emit(find(f"nn.{name}")(value))
        return [emit(op.tanh(value)), value]

    after = transform(module(body, (), [ROW], [ROW]), LowerScan())
    start = time.perf_counter()
    tvm.compile(after, target=tvm.target.Target(TARGETS[1]))
    assert time.perf_counter() - start < 20
