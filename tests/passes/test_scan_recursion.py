"""Scans by recursion: every result is that of a plain loop in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te, tirx
from tvm.relax import op
from tvm.relax.dpl import is_op, wildcard

from bitwright.errors import ModelError
from bitwright.passes import ops
from bitwright.passes.scan_recursion import lower
from tests.quant.qdq import Array

HOST = tvm.target.Target({"kind": "llvm"})
LENGTHS = [0, 1, 2, 3, 7, 64, 1000]
SIZES = {"B": 3, "N": 2}

Spec = tuple[Any, ...]  # dtype, then sizes: numbers, or names of symbolic ones


@dataclass(frozen=True)
class Scan:
    """A body twice: for a builder of Relax and for NumPy, with the types of all that it handles.

    Both get the captured values, states and elements as one list, and return one of the new states
    and the outputs.
    """

    body: Callable[..., Sequence[Any]]
    reference: Callable[..., Sequence[Any]]
    captured: tuple[Spec, ...] = ()
    states: tuple[Spec, ...] = ()
    sequences: tuple[Spec, ...] = ()  # without the time axis
    outputs: tuple[Spec, ...] = ()

    def add(self, builder: Any, name: str = "body") -> Any:
        specs = [*self.captured, *self.states, *self.sequences]
        parameters = _variables(specs, "p", _Sizes())
        with builder.function(name, parameters, private=True):
            results = [builder.emit(entry) for entry in self.body(builder, *parameters)]
            return builder.emit_func_output(relax.Tuple(results))

    def call(self, body: Any, operands: Sequence[Any], sizes: _Sizes) -> Any:
        kinds = [_type(spec, sizes) for spec in self.states]
        kinds += [_type(stacked(spec), sizes) for spec in self.outputs]
        captured, states = len(self.captured), len(self.states)
        return ops.scan(
            body,
            operands[:captured],
            operands[captured : captured + states],
            operands[captured + states :],
            relax.TupleType(kinds),
        )

    def module(self) -> Any:
        builder, sizes = relax.BlockBuilder(), _Sizes()
        body = self.add(builder)
        sequences = map(stacked, self.sequences)
        operands = _variables([*self.captured, *self.states, *sequences], "v", sizes)
        with builder.function("main", operands):
            with builder.dataflow():
                result = builder.emit_output(self.call(body, operands, sizes))
            builder.emit_func_output(result)
        return builder.get()

    def data(self, length: int) -> list[Array]:
        random = np.random.default_rng(length)
        specs = [*self.captured, *self.states]
        return [
            *(_values(random, spec) for spec in specs),
            *(_values(random, stacked(spec, length)) for spec in self.sequences),
        ]

    def loop(self, operands: Sequence[Array]) -> list[Array]:
        captured, states = len(self.captured), len(self.states)
        constants, values = operands[:captured], operands[captured : captured + states]
        rows: list[list[Array]] = [[] for _ in self.outputs]
        for elements in zip(*operands[captured + states :], strict=True):
            results = self.reference(*constants, *values, *elements)
            values = [np.asarray(entry) for entry in results[:states]]
            for row, output in zip(rows, results[states:], strict=True):
                row.append(np.asarray(output))
        shapes = [stacked(spec, len(row)) for spec, row in zip(self.outputs, rows, strict=True)]
        return [
            *values,
            *(
                np.array(row, shape[0]).reshape(_numbers(shape[1:]))
                for shape, row in zip(shapes, rows, strict=True)
            ),
        ]


class _Sizes(dict[str, Any]):
    """The symbolic sizes of one function."""

    def __missing__(self, name: str) -> Any:
        return self.setdefault(name, tirx.Var(name, "int64"))


def _type(spec: Spec, sizes: _Sizes) -> Any:
    dtype, *shape = spec
    return relax.TensorType(
        [sizes[size] if isinstance(size, str) else size for size in shape], dtype
    )


def _variables(specs: Sequence[Spec], prefix: str, sizes: _Sizes) -> list[Any]:
    return [relax.Var(f"{prefix}{i}", _type(spec, sizes)) for i, spec in enumerate(specs)]


def _numbers(sizes: Sequence[Any]) -> list[int]:
    return [SIZES[size] if isinstance(size, str) else size for size in sizes]


def _values(random: np.random.Generator, spec: Spec) -> Array:
    dtype, *sizes = spec
    shape = _numbers(sizes)
    if dtype == "bool":
        return np.asarray(random.integers(0, 2, shape), bool)
    if dtype.startswith("int"):
        return np.asarray(random.integers(0, 3, shape), dtype)
    return np.asarray(random.normal(size=shape) / 2, dtype)


def stacked(spec: Spec, length: Any = "T") -> Spec:
    return (spec[0], length, *spec[1:])


def executable(module: Any, *, planned: bool = True) -> Any:
    with tvm.transform.PassContext(disabled_pass=[] if planned else ["StaticPlanBlockMemory"]):
        return tvm.compile(module, target=HOST)


def runner(compiled: Any) -> Callable[..., list[Array]]:
    machine = relax.VirtualMachine(compiled, tvm.cpu())

    def flat(result: Any) -> list[Array]:
        if isinstance(result, tvm.runtime.Tensor):
            return [result.numpy()]
        return [array for entry in result for array in flat(entry)]

    def run(*inputs: Array) -> list[Array]:
        return flat(machine["main"](*map(tvm.runtime.tensor, inputs)))

    return run


def assert_equal(found: Sequence[Array], expected: Sequence[Array]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def _tanh_cell(builder: Any, w: Any, h: Any, x: Any) -> list[Any]:
    h = builder.emit(op.tanh(op.add(x, op.matmul(h, w))))
    return [h, h]


def _tanh_reference(w: Array, h: Array, x: Array) -> list[Array]:
    h = np.tanh(x + h @ w)
    return [h, h]


CELL = Scan(
    _tanh_cell,
    _tanh_reference,
    captured=(("float32", 4, 4),),
    states=(("float32", "B", 4),),
    sequences=(("float32", "B", 4),),
    outputs=(("float32", "B", 4),),
)


def _dtypes(_b: Any, n: Any, f: Any, d: Any, i: Any, x: Any, flag: Any, k: Any) -> list[Any]:
    one = relax.const(1, "int64")
    states = [
        op.add(n, one),
        op.logical_xor(f, flag),
        op.add(d, op.astype(x, "float64")),
        op.maximum(i, op.astype(x, "int32")),
    ]
    return [*states, op.multiply(n, k), op.logical_not(f), d, op.astype(x, "float16")]


def _dtypes_reference(
    n: Array, f: Array, d: Array, i: Array, x: Array, flag: Array, k: Array
) -> list[Array]:
    states = [n + 1, f ^ flag, d + x, np.maximum(i, x.astype("int32"))]
    return [*states, n * k, ~f, d, x.astype("float16")]


def _operators(builder: Any, w: Any, table: Any, h: Any, x: Any, k: Any) -> list[Any]:
    h = builder.emit(op.nn.softmax(op.add(op.nn.conv2d(h, w, padding=1), x), axis=-1))
    return [h, op.take(table, k, axis=0), op.sum(h, axis=[2, 3])]


def _operators_reference(w: Array, table: Array, h: Array, x: Array, k: Array) -> list[Array]:
    padded = np.pad(h, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    h = np.exp(np.einsum("bchwij,ocij->bohw", windows, w) + x)
    h = h / h.sum(-1, keepdims=True)
    return [h, table[k], h.sum((2, 3))]


def _branches(builder: Any, h: Any, x: Any, flag: Any) -> list[Any]:
    h = builder.emit(relax.If(flag, op.add(h, x), op.multiply(h, op.negative(x))))
    return [h, h]


def _branches_reference(h: Array, x: Array, flag: Array) -> list[Array]:
    h = h + x if flag else h * -x
    return [h, h]


def _shapes(_builder: Any, h: Any, x: Any) -> list[Any]:
    batch = h.ty.shape[0]
    return [h, op.concat([h, x], axis=0), op.reshape(x, [batch * 2])]


VECTOR = ("float32", 4)
SCANS = {
    "cell": CELL,
    "dtypes": Scan(
        _dtypes,
        _dtypes_reference,
        states=(("int64",), ("bool", 2), ("float64", "B"), ("int32", "B")),
        sequences=(("float32", "B"), ("bool", 2), ("int64",)),
        outputs=(("int64",), ("bool", 2), ("float64", "B"), ("float16", "B")),
    ),
    "operators": Scan(
        _operators,
        _operators_reference,
        captured=(("float32", 2, 2, 3, 3), ("float32", 3, 4)),
        states=(("float32", "B", 2, 5, 5),),
        sequences=(("float32", "B", 2, 5, 5), ("int64", "N")),
        outputs=(("float32", "N", 4), ("float32", "B", 2)),
    ),
    "branches in the body": Scan(
        _branches,
        _branches_reference,
        states=(VECTOR,),
        sequences=(VECTOR, ("bool",)),
        outputs=(VECTOR,),
    ),
    "nothing computed": Scan(  # w; a, b, kept, last; x
        lambda _, w, a, b, kept, _last, x: [b, a, kept, x, w, a, kept, x, x],
        lambda w, a, b, kept, _last, x: [b, a, kept, x, w, a, kept, x, x],
        captured=(VECTOR,),
        states=(VECTOR, VECTOR, VECTOR, VECTOR),
        sequences=(VECTOR,),
        outputs=(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR),
    ),
    "no outputs": Scan(
        lambda _, h, x: [op.add(h, x)],
        lambda h, x: [h + x],
        states=(VECTOR,),
        sequences=(VECTOR,),
    ),
    "no states": Scan(
        lambda _, x, y: [op.add(x, y)],
        lambda x, y: [x + y],
        sequences=(VECTOR, VECTOR),
        outputs=(VECTOR,),
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_is_a_loop(name: str) -> None:
    scan = SCANS[name]
    module = lower(scan.module())
    relax.analysis.well_formed(module)
    # TVM's memory planning cannot be trusted with branches that allocate.
    for planned in [False] if "branches" in name else [True, False]:
        run = runner(executable(module, planned=planned))
        for length in LENGTHS:
            data = scan.data(length)
            assert_equal(run(*data), scan.loop(data))


@pytest.mark.parametrize("name", ["cell", "nothing computed"])
def test_nothing_that_was_handed_over_is_overwritten(name: str) -> None:
    scan = SCANS[name]
    run = runner(executable(lower(scan.module())))
    data = scan.data(5)
    inputs = [tvm.runtime.tensor(array) for array in data]
    first = run(*data)
    kept = [array.copy() for array in first]
    machine = relax.VirtualMachine(executable(lower(scan.module())), tvm.cpu())
    machine["main"](*inputs)
    assert_equal([entry.numpy() for entry in inputs], data)
    run(*scan.data(5)[:-1], data[-1] + 1)
    assert_equal(first, kept)


def test_constants_are_not_overwritten_and_runs_do_not_share_outputs() -> None:
    builder = relax.BlockBuilder()
    body = CELL.add(builder)
    x = relax.Var("x", relax.TensorType([5, 3, 4], "float32"))
    w, h, _ = CELL.data(5)
    with builder.function("main", [x]):
        with builder.dataflow():
            sizes = _Sizes(T=5, B=3)
            call = CELL.call(body, [relax.const(w), relax.const(h), x], sizes)
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    # This pipeline folds constants and fuses.
    pipeline = relax.get_default_pipeline(HOST)
    run = runner(tvm.compile(lower(builder.get()), target=HOST, relax_pipeline=pipeline))
    sequences = [np.random.default_rng(i).normal(size=(5, 3, 4)).astype("float32") for i in (1, 2)]
    results = [run(entry) for entry in sequences]
    for entry, result in zip(sequences, results, strict=True):
        assert_equal(result, CELL.loop([w, h, entry]))


def _inner_scan(builder: Any, w: Any, h: Any, x: Any) -> list[Any]:
    inner = relax.BlockBuilder()
    cell = CELL.add(inner)
    body = builder.add_func(inner.get()[cell], "inner")
    steps, batch, _ = x.ty.shape
    result = builder.emit(CELL.call(body, [w, h, x], _Sizes(T=steps, B=batch)))
    return [relax.TupleGetItem(result, 0), relax.TupleGetItem(result, 1)]


def test_a_scan_in_a_scan() -> None:
    scan = Scan(
        _inner_scan,
        lambda *operands: CELL.loop(operands),
        captured=CELL.captured,
        states=CELL.states,
        sequences=(("float32", "N", "B", 4),),
        outputs=(("float32", "N", "B", 4),),
    )
    run = runner(executable(lower(scan.module())))
    for length in (0, 1, 6):
        data = scan.data(length)
        assert_equal(run(*data), scan.loop(data))
        if length:
            data[-1] = data[-1][:, :0]
            empty = data[1], data[-1]
            assert_equal(run(*data), empty)


def test_a_scan_in_a_branch_and_two_of_one_body() -> None:
    builder, sizes = relax.BlockBuilder(), _Sizes()
    body = CELL.add(builder)
    specs = [*CELL.captured, *CELL.states, *map(stacked, CELL.sequences)]
    w, h, x = _variables(specs, "v", sizes)
    flag = relax.Var("flag", relax.TensorType([], "bool"))
    with builder.function("main", [flag, w, h, x]):
        first = CELL.call(body, [w, h, x], sizes)
        chosen = builder.emit(relax.If(flag, first, relax.Tuple([h, x])))
        h, x = (builder.emit(relax.TupleGetItem(chosen, i)) for i in range(2))
        builder.emit_func_output(builder.emit(CELL.call(body, [w, h, x], sizes)))
    module = lower(builder.get())
    assert len([name for name in module.get_global_vars() if "scan" in name.name_hint]) == 1
    run = runner(executable(module, planned=False))
    data = CELL.data(7)
    once = CELL.loop(data)
    assert_equal(run(np.array(False), *data), once)
    assert_equal(run(np.array(True), *data), CELL.loop([data[0], *once]))


def test_sizes_of_outputs_follow_from_those_of_the_operands() -> None:
    scan = Scan(
        _shapes,
        lambda h, x: [h, np.concatenate([h, x]), x.reshape(-1)],
        states=(("float32", "B", 2),),
        sequences=(("float32", "B", 2),),
        outputs=(("float32", "C", 2), ("float32", "C")),
    )
    builder, sizes = relax.BlockBuilder(), _Sizes()
    sizes["C"] = sizes["B"] * 2
    body = scan.add(builder)
    operands = _variables([*scan.states, *map(stacked, scan.sequences)], "v", sizes)
    with builder.function("main", operands):
        builder.emit_func_output(builder.emit(scan.call(body, operands, sizes)))
    run = runner(executable(lower(builder.get())))
    for length in (0, 5):
        data = scan.data(length)
        h, both, flat = run(*data)
        np.testing.assert_array_equal(h, data[0])
        assert both.shape == (length, 6, 2)
        assert flat.shape == (length, 6)
        np.testing.assert_array_equal(both[:, :3], np.broadcast_to(data[0], (length, 3, 2)))
        np.testing.assert_array_equal(both[:, 3:], data[1])
        np.testing.assert_array_equal(flat, data[1].reshape(length, 6))


def test_a_library_runs_long_sequences_and_weights_can_be_lifted(tmp_path: Path) -> None:
    builder, sizes = relax.BlockBuilder(), _Sizes()
    body = CELL.add(builder)
    specs = [stacked(CELL.sequences[0]), CELL.states[0], CELL.captured[0]]
    x, h, w = _variables(specs, "v", sizes)
    with builder.function("main", [x, h, w], attrs={"num_input": 2}):
        with builder.dataflow():
            turned = builder.emit(op.permute_dims(w))
            result = builder.emit_output(CELL.call(body, [turned, h, x], sizes))
        builder.emit_func_output(result)
    lift = [relax.transform.DeadCodeElimination(), relax.transform.LiftTransformParams()]
    module = tvm.transform.Sequential(lift)(lower(builder.get()))
    path = tmp_path / "scan.so"
    executable(module).export_library(str(path))
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    arrays = CELL.data(20_000)  # a recursion from step to step overflows the stack
    weights, *data = map(tvm.runtime.tensor, [arrays[0].T.copy(), *arrays[1:]])
    lifted = machine["main_transform_params"]([weights])
    found = machine["main"](data[1], data[0], *lifted)
    expected = CELL.loop(arrays)
    np.testing.assert_allclose(found[0].numpy(), expected[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[1].numpy()[:50], expected[1][:50], rtol=1e-4, atol=1e-5)


def test_a_body_calls_code_that_a_generator_made() -> None:
    def generate(functions: Any, _options: Any, _constants: Any) -> list[Any]:
        [name] = [str(function.attrs["global_symbol"]) for function in functions]
        shape = (3, 4)
        left, right = te.placeholder(shape), te.placeholder(shape)
        total = te.compute(shape, lambda i, j: left[i, j] + right[i, j] * 2.0)
        kernel = te.create_prim_func([left, right, total]).with_attr("global_symbol", name)
        return [tvm.compile(tvm.IRModule({name: kernel}), target=HOST).mod]

    kind = ("float32", 3, 4)
    doubling = Scan(
        lambda _, h, x: [op.tanh(op.add(h, x))],
        lambda h, x: [np.tanh(h + 2 * x)],
        states=(kind,),
        sequences=(kind,),
    )
    pattern = ("doubling.add", is_op("relax.add")(wildcard(), wildcard()))
    tvm_ffi.register_global_func("relax.ext.doubling", generate)
    try:
        steps = [
            relax.transform.ConvertToDataflow(1),
            relax.transform.FuseOpsByPattern([pattern], annotate_codegen=True),
            # Without its name, TVM does not replace the calls in a private function.
            relax.transform.RunCodegen({}, ["main", "body"]),
        ]
        module = tvm.transform.Sequential(steps)(doubling.module())
    finally:
        tvm_ffi.registry.remove_global_func("relax.ext.doubling")
    run = runner(executable(lower(module)))
    data = doubling.data(7)
    assert_equal(run(*data), doubling.loop(data))


def test_what_cannot_be_lowered_says_why() -> None:
    unknown = relax.TensorType(dtype="float32", ndim=1)
    builder = relax.BlockBuilder()
    element, x = relax.Var("e", unknown), relax.Var("x", relax.TensorType(dtype="float32", ndim=2))
    with builder.function("body", [element], private=True):
        body = builder.emit_func_output(relax.Tuple([element]))
    with builder.function("main", [x]):
        kind = relax.TupleType([x.ty])
        builder.emit_func_output(builder.emit(ops.scan(body, [], [], [x], kind)))
    with pytest.raises(ModelError, match="shape of an element of a scan's sequences is not known"):
        lower(builder.get())


BINARY: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (op.add, np.add),
    (op.subtract, np.subtract),
    (op.multiply, np.multiply),
    (op.maximum, np.maximum),
]


@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.data())
def test_any_elementwise_body(data: st.DataObject) -> None:
    states, sequences = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    captured, outputs = data.draw(st.integers(0, 2)), data.draw(st.integers(not states, 3))
    known = captured + states + sequences
    steps = []
    for number in range(data.draw(st.integers(0, 4))):
        operand = st.integers(0, known + number - 1)
        steps.append((data.draw(st.sampled_from(BINARY)), data.draw(operand), data.draw(operand)))
    result = st.integers(0, known + len(steps) - 1)
    results = [data.draw(result) for _ in range(states + outputs)]

    def body(builder: Any, *operands: Any) -> list[Any]:
        values = list(operands)
        for (make, _), left, right in steps:
            value = make(values[left], values[right])
            values.append(builder.emit(op.clip(value, relax.prim_value(-2), relax.prim_value(2))))
        return [values[i] for i in results]

    def reference(*operands: Array) -> list[Array]:
        values = list(operands)
        for (_, compute), left, right in steps:
            values.append(np.clip(compute(values[left], values[right]), -2, 2))
        return [values[i] for i in results]

    kind = (data.draw(st.sampled_from(["float32", "int32", "float64"])), "B")
    specs = [(kind,) * number for number in (captured, states, sequences, outputs)]
    scan = Scan(body, reference, *specs)
    run = runner(executable(lower(scan.module())))
    for length in (0, 1, 5):
        arrays = scan.data(length)
        assert_equal(run(*arrays), scan.loop(arrays))
