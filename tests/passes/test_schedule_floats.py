"""ScheduleFloats: products and functions in float32 become calls of kernels, with equal results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from bitwright.passes.expressions import calls, operator
from bitwright.passes.schedule_floats import ScheduleFloats
from bitwright.targets.kernels.host import detect, target
from tests.passes.modules import transform


def module(build: Any, *shapes: Any) -> Any:
    """A module whose main returns what ``build`` emits."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(build(builder, *inputs))
        builder.emit_func_output(result)
    return builder.get()


def run(mod: Any, *arrays: Any) -> Any:
    built = tvm.compile(mod, target=tvm.target.Target(target(detect())))
    machine = relax.VirtualMachine(built, tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def names(mod: Any) -> list[str]:
    return [operator(call) for call in calls(mod["main"])]


WEIGHTS, BIAS = normal(7, 33), normal(33)


@pytest.mark.parametrize("vector", [BIAS, BIAS.reshape(1, 33)])
@pytest.mark.parametrize("first", [False, True])
def test_a_product_takes_the_vector_that_is_added(vector: Any, first: bool) -> None:
    def build(builder: Any, x: Any) -> Any:
        product = builder.emit(relax.op.matmul(x, relax.const(WEIGHTS)))
        bias = relax.const(vector)
        return relax.op.add(bias, product) if first else relax.op.add(product, bias)

    after = transform(module(build, [tirx.Var("n", "int64"), 7]), ScheduleFloats())
    assert names(after) == ["call_tir"]
    data = normal(5, 7)
    np.testing.assert_allclose(run(after, data), data @ WEIGHTS + BIAS, rtol=1e-5, atol=1e-5)
    assert run(after, data[:0]).shape == (0, 33)


def test_a_product_that_is_used_twice_stays_whole() -> None:
    def build(builder: Any, x: Any) -> Any:
        product = builder.emit(relax.op.matmul(x, relax.const(WEIGHTS)))
        return relax.op.multiply(builder.emit(relax.op.add(product, relax.const(BIAS))), product)

    after = transform(module(build, [2, 3, 7]), ScheduleFloats())
    assert names(after) == ["call_tir", "call_tir", "multiply"]
    product = (data := normal(2, 3, 7)) @ WEIGHTS
    np.testing.assert_allclose(run(after, data), (product + BIAS) * product, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "build, shapes",
    [
        (lambda _, x, y: relax.op.matmul(x, y), ([3, 7], [7, 33])),  # no constant
        (lambda _, x: relax.op.matmul(x, relax.const(WEIGHTS)), ([7],)),  # a vector
        (lambda _, x: relax.op.matmul(relax.const(WEIGHTS), x), ([33, 2],)),  # on the left
        (lambda _, x: relax.op.matmul(x, relax.const(normal(2, 7, 3))), ([2, 4, 7],)),  # several
        (lambda _, x: relax.op.add(x, relax.const(BIAS)), ([2, 33],)),  # no product
        (lambda _, x: relax.op.exp(relax.op.astype(x, "float64")), ([3],)),
    ],
)
def test_others_stay_as_they_are(build: Any, shapes: Any) -> None:
    before = module(build, *shapes)
    tvm.ir.assert_structural_equal(transform(before, ScheduleFloats())["main"], before["main"])


def test_what_is_added_to_a_product_has_its_columns() -> None:
    def build(builder: Any, x: Any) -> Any:
        product = builder.emit(relax.op.matmul(x, relax.const(WEIGHTS)))
        return relax.op.add(product, relax.const(normal(5, 1)))

    after = transform(module(build, [5, 7]), ScheduleFloats())
    assert names(after) == ["call_tir", "add"]


FUNCTIONS = {
    "erf": relax.op.erf,
    "exp": relax.op.exp,
    "log": relax.op.log,
    "sigmoid": relax.op.sigmoid,
    "silu": relax.op.nn.silu,
    "softplus": relax.op.nn.softplus,
    "tanh": relax.op.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_equal_those_of_tvm(name: str) -> None:
    before = module(lambda _, x: FUNCTIONS[name](x), [tirx.Var("n", "int64"), 3])
    after = transform(before, ScheduleFloats())
    assert names(after) == ["call_tir"]
    for rows in (0, 1, 5, 2000):  # less than a vector, and more than a task
        data = np.abs(normal(rows, 3)) if name == "log" else normal(rows, 3)
        np.testing.assert_allclose(run(after, data), run(before, data), rtol=1e-6, atol=1e-7)


def test_a_function_of_a_tensor_without_axes() -> None:
    after = transform(module(lambda _, x: relax.op.tanh(x), []), ScheduleFloats())
    assert names(after) == ["call_tir"]
    np.testing.assert_allclose(run(after, np.float32(0.5)), np.tanh(0.5), rtol=1e-6)
