"""The fixed form of requantization: whole numbers and a shift instead of float multipliers."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from bitwright import targets
from bitwright.errors import UsageError
from bitwright.importer import import_model
from bitwright.passes import ops
from bitwright.passes.build import build
from bitwright.passes.registry import parse
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.reference import Reference
from bitwright.quant.requantization import Requantization
from tests.quant.qdq import Array, Builder

FIXED = "lower-to-integer=requantization:fixed"
OUTPUT = TensorQuantization(1.0, 3, 16, signed=True)


@pytest.mark.parametrize(
    "multiplier",
    [1e-45, 1e-38, 1.2e-38, 2.0**-31, 2.0**-20, 0.5, 0.25, 0.75, 1.0, 3.3, 2.0**22, 2.0**24, 3e38],
)
def test_the_operator_rounds_the_exact_product(multiplier: float) -> None:
    generator = np.random.default_rng(0)
    sums = generator.integers(-(2**31), 2**31, 2000)
    sums = np.append(sums, [0, 1, -1, 2, -2, 3, -3, 5, 2**31 - 1, -(2**31)])
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(sums.shape, "int32"))
    with builder.function("main", [x]):
        codes = ops.requantize(
            x,
            relax.const(np.float32(multiplier)),
            zero_point=OUTPUT.zero_point,
            low=OUTPUT.code_min,
            high=OUTPUT.code_max,
            dtype="int16",
            form="fixed",
        )
        builder.emit_func_output(builder.emit(codes))
    executable = tvm.compile(builder.get(), target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    found = machine["main"](tvm.runtime.tensor(sums.astype(np.int32))).numpy()
    constants = Requantization(
        np.array(multiplier, np.float32), OUTPUT, OUTPUT.code_min, OUTPUT.code_max
    )
    assert np.array_equal(found, constants.apply(sums, "fixed"))


def network(weight_bits: int, generator: np.random.Generator) -> tuple[Builder, Array]:
    """A convolution with a scale a channel, ties included, and a product."""
    builder = Builder()
    shape = (5, 3, 9, 7)
    wide = TensorQuantization(0.02, 0, 8, signed=True)
    x = builder.activation(builder.input("x", ["N", *shape[1:]]), wide)
    limit = 2 ** (weight_bits - 1)
    weights = generator.integers(-limit, limit, (6, 3, 3, 3))
    scales = np.append(generator.uniform(1e-4, 0.1, 5), 0.25)
    stored = builder.weights(weights, scales, bits=weight_bits, axis=0)
    x = builder.node("Relu", builder.node("Conv", x, stored, strides=[2, 1]))
    x = builder.activation(x, TensorQuantization(0.04, 0, 8, signed=False))
    x = builder.node("Flatten", x)
    matrix = generator.integers(-limit, limit, (6 * 4 * 5, 11))
    x = builder.node("MatMul", x, builder.weights(matrix, 0.01, bits=weight_bits))
    builder.activation(x, TensorQuantization(0.5, -7, 8, signed=True))
    return builder, generator.normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize("kernels", ["true", "false"])
@pytest.mark.parametrize("weight_bits", [2, 8])
def test_kernels_and_tvm_equal_the_reference(weight_bits: int, kernels: str) -> None:
    builder, x = network(weight_bits, np.random.default_rng(7))
    model = load(builder.model(list(builder.quantized.values())[-1][0]))
    pipeline = parse(f"{FIXED},pack-weights=kernels:{kernels}")
    built = build(import_model(model), targets.get("bitfusion/eyeriss"), pipeline=pipeline)
    assert [layer.kernel for layer in built.layers] == [kernels == "true"] * 2
    machine = relax.VirtualMachine(built.executable, tvm.cpu())
    parameters = [tvm.runtime.tensor(array) for array in built.parameters.values()]
    transformed = machine["main_transform_params"](parameters)
    found = machine["main"](tvm.runtime.tensor(x), *transformed).numpy()
    expected = next(iter(Reference(model, "fixed").run({"x": x})[0].values()))
    assert np.array_equal(found, expected)


def test_sums_of_64_bits_are_refused() -> None:
    builder = Builder()
    wide = TensorQuantization(0.001, 0, 16, signed=True)
    x = builder.activation(builder.input("x", ["N", 8]), wide)
    matrix = builder.weights(np.full((8, 2), 32767), 0.01, bits=16)
    builder.activation(builder.node("MatMul", x, matrix), wide)
    model = load(builder.model(list(builder.quantized.values())[-1][0]))
    with pytest.raises(UsageError, match="sums of 64 bits"):
        build(import_model(model), targets.get("bitfusion/eyeriss"), pipeline=parse(FIXED))


def test_other_forms_are_refused() -> None:
    with pytest.raises(UsageError, match="no requantization"):
        parse("lower-to-integer=requantization:exact").create()
