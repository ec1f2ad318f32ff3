"""LowerScan where sequences are codes: kernels read and decode them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from bitwright.passes import ops
from bitwright.passes.expressions import calls, operator
from bitwright.passes.lower_scan import LowerScan
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.passes.recognize_scan import SELECTIVE_SCAN
from bitwright.soft_edge import QUAMBA_SE, SoftEdge
from tests.passes.mamba import CHANNELS, STATE, Front, module, pair, soft_edge
from tests.passes.modules import transform
from tests.passes.soft_edge_layouts import ASYMMETRIC, LAYOUTS, UNSIGNED
from tests.quant.qdq import Array

S = 0.0123  # no power of two, so codes times scales are rounded


def inputs(*leading: int) -> dict[str, Array]:
    """Values of each tensor, of 9 steps where nothing is said."""
    leading = leading or (9,)
    random = np.random.default_rng(11)
    sizes = {"dt": CHANNELS, "x": CHANNELS, "B": STATE, "C": STATE}
    made = {
        name: random.normal(0, 0.7, (*leading, size)).astype(np.float32)
        for name, size in sizes.items()
    }
    made["x"][leading[0] // 3] *= 40  # outliers
    return made


def run(built: Any, feeds: Mapping[str, Array]) -> Array:
    executable = tvm.compile(built, target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result: Array = machine["main"](*map(tvm.runtime.tensor, feeds.values())).numpy()
    return result


def kernel(built: Any) -> Any:
    """The function that calls the kernel."""
    functions = [f for f in built.functions.values() if isinstance(f, relax.Function)]
    (found,) = [f for f in functions if f.attrs and f.attrs.get("Composite") == SELECTIVE_SCAN]
    return found


def dequantized(values: Array, scale: float, zero_point: int, dtype: str) -> Array:
    info = np.iinfo(dtype)
    codes = np.clip(np.rint(values / np.float32(scale)) + zero_point, info.min, info.max)
    return np.asarray((codes - zero_point).astype(np.float32) * np.float32(scale))


def decoded(values: Array, step: float, layout: SoftEdge) -> Array:
    steps = layout.decode(layout.encode(values, step))
    return np.asarray(steps.astype(np.float32) * np.float32(step))


FORMS: dict[str, tuple[Front, Any, str]] = {
    "int8": (pair(S), lambda x: dequantized(x, S, 0, "int8"), "int8"),
    "uint8": (pair(S, "uint8", 90), lambda x: dequantized(x, S, 90, "uint8"), "uint8"),
    "int16": (pair(S / 99, "int16", -5), lambda x: dequantized(x, S / 99, -5, "int16"), "int16"),
    **{
        name: (soft_edge(S / 4, layout), lambda x, f=layout: decoded(x, S / 4, f), layout.dtype)
        for name, layout in LAYOUTS.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_kernels_decode_what_they_read(form: str) -> None:
    front, expected, dtype = FORMS[form]
    lengths = inputs(1), inputs(2), inputs(9)
    for names in (["x"], ["dt", "x", "B", "C"]):
        built = transform(module(dict.fromkeys(names, front)), LowerScan())
        kinds = [str(entry.ty.dtype) for entry in kernel(built).params[-4:]]
        assert kinds == [dtype if name in names else "float32" for name in lengths[0]]
        floats = transform(module({}), LowerScan())
        for feeds in lengths:
            rounded = {n: expected(x) if n in names else x for n, x in feeds.items()}
            assert np.array_equal(run(built, feeds), run(floats, rounded))


@pytest.mark.parametrize("form", ["int8", "quamba-se", "asymmetric"])
def test_batches(form: str) -> None:
    front, expected, dtype = FORMS[form]
    names, feeds = ("dt", "x", "B", "C"), inputs(7, 3)
    built = transform(module(dict.fromkeys(names, front), batch=[3]), LowerScan())
    assert [str(entry.ty.dtype) for entry in kernel(built).params[-4:]] == [dtype] * 4
    floats = transform(module({}, batch=[3]), LowerScan())
    rounded = {name: expected(value) for name, value in feeds.items()}
    assert np.array_equal(run(built, feeds), run(floats, rounded))
    alone = run(transform(module({}), LowerScan()), {n: x[:, 1] for n, x in rounded.items()})
    np.testing.assert_allclose(run(built, feeds)[:, 1], alone, rtol=1e-5, atol=1e-6)


def test_roles_are_those_of_floats() -> None:
    built = transform(module({"x": soft_edge(S, ASYMMETRIC), "C": pair(S)}), LowerScan())
    roles = {role: int(kernel(built).attrs[role]) for role in ("x", "dt", "B", "C")}
    assert roles == {"dt": 2, "x": 3, "B": 4, "C": 5}  # behind constants and state


def test_moves_stand_in_front_of_the_kernel() -> None:
    def front(emit: Any, value: Any) -> Any:
        return emit(op.flip(soft_edge(S / 4, QUAMBA_SE)(emit, value), axis=0))

    built = transform(module({"x": front}), PropagateQuantization(), LowerScan())
    assert [str(entry.ty.dtype) for entry in kernel(built).params[-4:-2]] == ["float32", "int16"]
    names = [operator(call) for call in calls(built["main"])]
    assert names.index(ops.SOFT_EDGE_ENCODE) < names.index("flip")
    assert ops.SOFT_EDGE_DECODE not in names
    feeds = inputs()
    turned = {**feeds, "x": decoded(feeds["x"], S / 4, QUAMBA_SE)[::-1].copy()}
    floats = run(transform(module({}), LowerScan()), turned)
    assert np.array_equal(run(built, feeds), floats)


@pytest.mark.parametrize("layout", [ASYMMETRIC, UNSIGNED])
def test_bodies_may_encode_and_decode(layout: SoftEdge) -> None:
    builder = relax.BlockBuilder()
    state, element = (relax.Var(n, relax.TensorType([16], "float32")) for n in "he")
    with builder.function("body", [state, element], private=True):
        with builder.dataflow():
            new = soft_edge(S, layout)(builder.emit, builder.emit(op.add(state, element)))
            result = builder.emit_output(relax.Tuple([new, new]))
        step = builder.emit_func_output(result)
    sequence = relax.Var("x", relax.TensorType([5, 16], "float32"))
    kinds = [relax.TensorType([16], "float32"), relax.TensorType([5, 16], "float32")]
    first = relax.const(np.zeros(16, np.float32))
    with builder.function("main", [sequence]):
        with builder.dataflow():
            scan = builder.emit(ops.scan(step, [], [first], [sequence], relax.TupleType(kinds)))
            result = builder.emit_output(relax.TupleGetItem(scan, 1))
        builder.emit_func_output(result)
    built = transform(builder.get(), LowerScan())
    assert not [call for call in calls(built["main"]) if operator(call) == ops.SCAN]
    values = np.random.default_rng(2).normal(0, 3, (5, 16)).astype(np.float32)
    held, expected = np.zeros(16, np.float32), []
    for row in values:
        held = decoded(held + row, S, layout)
        expected.append(held)
    assert np.array_equal(run(built, {"x": values}), np.stack(expected))
