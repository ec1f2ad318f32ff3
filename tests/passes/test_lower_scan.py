"""LowerScan: the form of what it makes, and which bodies it takes."""

# The functions in TVMScript are parsed by TVM; their annotations are no Python types.
# mypy: disable-error-code="untyped-decorator, valid-type"

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.ir import SourceName, Span
from tvm.relax import op

from bitwright.errors import UsageError
from bitwright.passes import ops, scan_recursion
from bitwright.passes.expressions import calls, operator
from bitwright.passes.lower_scan import LowerScan
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.passes.recognize_scan import COMPOSITES
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.requantization import Requantization, quantize_float
from bitwright.targets.kernels import host
from bitwright.targets.kernels.host import AVX2, ISAS, detect
from tests.passes.modules import transform
from tests.quant.qdq import Array, profile

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


# -- values that all channels read ---------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 33, 600])
@pytest.mark.parametrize("batch", [None, 3])
def test_shared_values_of_what_is_constant_in_time(channels: int, batch: int | None) -> None:
    def body(emit: Callable[[Any], Any], w: Any, v: Any, s: Any, x: Any, b: Any) -> list[Any]:
        shares = emit(op.divide(w, emit(op.sum(w))))
        both = emit(op.concat([shares, v], axis=0))
        weighted = emit(op.multiply(b, both))
        new = emit(op.add(s, emit(op.multiply(emit(op.expand_dims(x, -1)), weighted))))
        return [new, emit(op.sum(emit(op.multiply(new, weighted)), [-1]))]

    leading = () if batch is None else (batch,)
    state, row = ("float32", *leading, channels, 5), ("float32", *leading, channels)
    vectors = [("float32", 3), ("float32", 2)]
    after = transform(module(body, vectors, [state], [row, ("float32", 5)]), LowerScan())
    assert is_lowered(after)
    random = np.random.default_rng(channels)
    w, v = random.uniform(0.5, 2, 3), random.normal(size=2)
    s, xs = random.normal(size=state[1:]), random.normal(size=(4, *row[1:]))
    bs = random.normal(size=(4, 5))
    given = [entry.astype(np.float32) for entry in (w, v, s, xs, bs)]
    rows = []
    for x, b in zip(xs, bs, strict=True):
        weighted = b * np.concatenate([w / w.sum(), v])
        s = s + x[..., None] * weighted
        rows.append((s * weighted).sum(-1))
    for target in TARGETS:
        last, output = run(after, target, *given)
        np.testing.assert_allclose(last, s, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(output, rows, rtol=1e-4, atol=1e-5)


# -- codes ---------------------------------------------------------------------------------------

HOSTS = [isa for isa in ISAS.values() if isa != AVX2 or detect() == AVX2]
DTYPES = ["int8", "uint8", "int16", "uint16"]


def number(value: float, dtype: str) -> Any:
    return relax.const(np.array(value, dtype), dtype)


def run_both(before: Any, *inputs: Array) -> list[Array]:
    """Results of the kernels, which are the same for every instruction set."""
    found = []
    for isa in HOSTS:
        after = transform(before, LowerScan(isa.name))
        assert is_lowered(after)
        found.append(run(after, host.target(isa), *inputs))
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    return found[0]


@dataclass(frozen=True)
class Codes:
    """``s = requantize((s - zero_point) @ w + x)`` with a multiplier for each column."""

    dtype: str
    zero_point: int
    weights: Array
    multiplier: Array
    form: Literal["float", "fixed"] = "float"
    wide: bool = False

    @property
    def spec(self) -> TensorQuantization:
        return TensorQuantization(
            1.0, self.zero_point, np.iinfo(self.dtype).bits, not self.dtype.startswith("u")
        )

    def body(self, emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        sums = "int64" if self.wide else "int32"
        centred = emit(op.subtract(emit(op.astype(s, sums)), number(self.zero_point, sums)))
        weights = emit(op.astype(relax.const(self.weights, self.weights.dtype.name), sums))
        product = emit(op.matmul(centred, weights, out_dtype=sums))
        total = emit(op.add(product, emit(op.astype(x, sums))))
        new = emit(
            ops.requantize(
                total,
                relax.const(self.multiplier, "float32"),
                zero_point=self.zero_point,
                low=self.spec.code_min,
                high=self.spec.code_max - 1,
                dtype=self.dtype,
                form=self.form,
            )
        )
        return [new, emit(op.add(new, number(0, self.dtype)))]

    def reference(self, s: Array, x: Array) -> Array:
        total = (s.astype(np.int64) - self.zero_point) @ self.weights.astype(np.int64) + x
        low, high = self.spec.code_min, self.spec.code_max - 1
        rule = Requantization(self.multiplier, self.spec, low, high)
        return np.asarray(rule.apply(total, self.form).astype(self.dtype))

    def check(self, leading: tuple[int, ...], symbolic: bool = False) -> None:
        hidden = self.weights.shape[-1]
        random = np.random.default_rng(hidden)
        limits = np.iinfo(self.dtype)
        s = random.integers(limits.min, limits.max + 1, (*leading, hidden)).astype(self.dtype)
        xs = random.integers(-1000, 1000, (4, *leading, hidden)).astype(np.int32)
        shape = (*leading[:-1], tirx.Var("batch", "int64") if symbolic else leading[-1], hidden)
        before = module(self.body, (), [(self.dtype, *shape)], [("int32", *shape)])
        rows, new = [], s
        for x in xs:
            new = self.reference(new, x)
            rows.append(new)
        state, output = run_both(before, s, xs)
        np.testing.assert_array_equal(state, new)
        np.testing.assert_array_equal(output, rows)


def codes(
    dtype: str,
    bits: int,
    hidden: int,
    *batch: int,
    zero_point: int | None = None,
    **options: Any,
) -> Codes:
    """Random weights, and multipliers that spread sums over the codes and beyond."""
    random = np.random.default_rng(bits)
    limits, most = np.iinfo(dtype), 2 ** (bits - 1)
    if zero_point is None:
        zero_point = int(random.integers(limits.min, limits.max + 1))
    weights = random.integers(-most, most, (*batch, hidden, hidden))
    span = (limits.max - limits.min) / 3
    sums = most * span * np.sqrt(hidden)
    multiplier = (random.uniform(0.5, 2, hidden) * span / sums).astype(np.float32)
    storage = np.int16 if bits > 8 else np.int8
    return Codes(dtype, zero_point, weights.astype(storage), multiplier, **options)


@pytest.mark.parametrize("batch", [1, 3, 13])
@pytest.mark.parametrize("hidden", [7, 33])
def test_products_of_codes(hidden: int, batch: int) -> None:
    codes("int8", 8, hidden).check((batch,))
    codes("int8", 4, hidden, 2).check((2, batch), symbolic=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["float", "fixed"])
@pytest.mark.parametrize("end", ["min", "max"])
def test_types_of_codes(end: str, form: str, dtype: str) -> None:
    zero_point = int(getattr(np.iinfo(dtype), end))
    codes(dtype, 2, 9, zero_point=zero_point, form=form).check((2,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 16])
def test_wide_sums_of_codes(bits: int, dtype: str) -> None:
    codes(dtype, bits, 19, 2, wide=True).check((2, 3))


@profile(6)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 40),
    st.integers(1, 14),
    st.booleans(),
)
def test_any_products_of_codes(
    dtype: str, bits: int, hidden: int, batch: int, symbolic: bool
) -> None:
    # 16 bits by 8: at most 2^16 * 2^7 * 40, less than 2^31.
    codes(dtype, bits, hidden).check((batch,), symbolic)


def test_weights_that_are_too_wide_for_tiles() -> None:
    random = np.random.default_rng(0)
    weights = random.integers(-70_000, 70_000, (5, 5)).astype(np.int32)
    multiplier = np.full(5, 1e-5, np.float32)
    Codes("int8", 3, weights, multiplier).check((3,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers(dtype: str) -> None:
    limits = np.iinfo(dtype)
    # Not the reciprocal of a number: its multiples, ties among them, must not be off by a bit.
    scale, zero_point = np.float32(0.0123), int(limits.max) // 3

    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        parameters = number(float(scale), "float32"), number(zero_point, dtype)
        code = emit(op.quantize(x, *parameters, axis=0, out_dtype=dtype))
        return [s, code, emit(op.dequantize(code, *parameters, axis=0))]

    random = np.random.default_rng(0)
    ties = np.arange(-3000, 3001, dtype=np.float32) / 2 * scale
    x: Array = np.concatenate(
        [ties, random.normal(size=993) * 300, [np.nan, np.inf, -np.inf, 1e30, -1e30]]
    )
    x = x.astype(np.float32)[None]
    before = module(body, (), [("float32", 1)], [("float32", x.size)])
    _, code, value = run_both(before, np.zeros(1, np.float32), x)
    spec = TensorQuantization(float(scale), zero_point, limits.bits, not dtype.startswith("u"))
    expected = quantize_float(x, scale, spec)
    np.testing.assert_array_equal(code, expected)
    centred = (expected - zero_point).astype(np.float32)
    np.testing.assert_array_equal(value, centred * scale)


@pytest.mark.parametrize("axis", [0, 1])
def test_dequantizers_with_channels(axis: int) -> None:
    random = np.random.default_rng(0)
    scale = random.uniform(0.1, 1, (3, 9)[axis]).astype(np.float32)
    zero = random.integers(-5, 5, scale.size).astype(np.int8)
    stored = random.integers(-128, 128, (3, 9)).astype(np.int8)

    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        parameters = relax.const(scale, "float32"), relax.const(zero, "int8")
        weights = emit(op.dequantize(relax.const(stored, "int8"), *parameters, axis=axis))
        return [s, emit(op.dequantize(x, *parameters, axis=axis)), emit(op.add(weights, s))]

    x = random.integers(-128, 128, (2, 3, 9)).astype(np.int8)
    before = module(body, (), [ROW], [("int8", 3, 9)])
    _, value, weights = run_both(before, np.zeros((3, 9), np.float32), x)
    steps, zeros = (
        entry.reshape((-1, 1) if axis == 0 else (1, -1)) for entry in (scale, zero.astype(int))
    )
    np.testing.assert_array_equal(value, (x - zeros).astype(np.float32) * steps)
    np.testing.assert_array_equal(weights[0], (stored - zeros).astype(np.float32) * steps)


@pytest.mark.parametrize("size", [256, 40])
@pytest.mark.parametrize("channels", [1, 9])
def test_tables(channels: int, size: int) -> None:
    random = np.random.default_rng(0)
    table = random.integers(-(2**15), 2**15, size).astype(np.int16)

    def body(emit: Callable[[Any], Any], s: Any, x: Any) -> list[Any]:
        index = emit(op.subtract(emit(op.astype(x, "int32")), number(-128, "int32")))
        found = emit(op.take(relax.const(table, "int16"), index, axis=0, mode="clip"))
        return [emit(op.maximum(s, found)), found]

    x = random.integers(-128, 128, (30, 3, channels)).astype(np.int8)
    before = module(body, (), [("int16", 3, channels)], [("int8", 3, channels)])
    s = np.full((3, channels), -(2**15), np.int16)
    state, found = run_both(before, s, x)
    expected = table[np.minimum(x.astype(int) + 128, size - 1)]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(state, expected.max(0))


def lstm_of_codes(weights: Array, scale: Array) -> Callable[..., Sequence[Any]]:
    """An LSTM in which a quantizer stands behind every operator: 16 bits, the state 8."""

    def body(emit: Callable[[Any], Any], h: Any, c: Any, x: Any) -> list[Any]:
        def again(value: Any, step: float, dtype: str = "int16") -> Any:
            parameters = number(step, "float32"), number(0, dtype)
            code = emit(op.quantize(value, *parameters, axis=0, out_dtype=dtype))
            return emit(op.dequantize(code, *parameters, axis=0))

        axis = weights.ndim - 1
        zeros = relax.const(np.zeros(scale.size, np.int8), "int8")
        stored = relax.const(weights, "int8"), relax.const(scale, "float32"), zeros
        matrix = emit(op.dequantize(*stored, axis=axis))
        product = again(emit(op.matmul(again(h, 1 / 127, "int8"), matrix)), 2.0**-12)
        gates = again(emit(op.add(again(x, 2.0**-12), product)), 1 / 4000)
        parts = emit(op.split(gates, 4, axis))
        i, o, f, n = (emit(relax.TupleGetItem(parts, k)) for k in range(4))
        i, o, f = (again(emit(op.sigmoid(gate)), 2.0**-15) for gate in (i, o, f))
        n = again(emit(op.tanh(n)), 2.0**-15)
        kept = again(emit(op.multiply(f, again(c, 2.0**-13))), 2.0**-13)
        added = again(emit(op.multiply(i, n)), 2.0**-15)
        c = again(emit(op.add(kept, added)), 2.0**-13)
        shown = again(emit(op.tanh(c)), 2.0**-15)
        h = again(emit(op.multiply(o, shown)), 1 / 127, "int8")
        return [h, c, emit(op.add(h, number(0, "float32")))]

    return body


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("directions", [1, 2])
def test_all_operators_of_codes(directions: int, batch: int) -> None:
    hidden = 11
    random = np.random.default_rng(directions)
    weights = random.integers(-127, 128, (directions, hidden, 4 * hidden)).astype(np.int8)
    scale = random.uniform(0.002, 0.004, 4 * hidden).astype(np.float32)
    shape = ("float32", directions, batch, hidden)
    states, sequences = [shape, shape], [(*shape[:-1], 4 * hidden)]
    before = module(lstm_of_codes(weights, scale), (), states, sequences)
    before = transform(before, PropagateQuantization(), LowerToInteger())
    h, c = (random.uniform(-1, 1, shape[1:]).astype(np.float32) for _ in range(2))
    x = random.normal(size=(20, *shape[1:-1], 4 * hidden)).astype(np.float32)
    found = run_both(before, h, c, x)
    # The same steps, operator by operator as TVM lowers them.
    expected = run(scan_recursion.lower(before), host.target(HOSTS[0]), h, c, x)
    assert len({*found[2].ravel()}) > 50
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_an_instruction_set_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="no instruction set 'mmx'"):
        LowerScan("mmx")


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
    "take that may fail": lambda _, x: op.take(
        relax.const(np.arange(5.0, dtype=np.float32)), op.astype(x, "int32"), 0, "fast"
    ),
    "a quantizer for each channel": lambda _, x: op.quantize(
        x, relax.const(np.ones(9, np.float32)), relax.const(np.zeros(9, np.int8)), 1, "int8"
    ),
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
