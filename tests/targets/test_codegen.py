"""Code generation: which functions are kernels, what is read of them, and what kernels compute."""
# mypy: disable-error-code="valid-type, name-defined, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="attr-defined, misc"
# ruff: noqa: N805
# The modules are TVMScript: Python's syntax, but neither its types nor its methods.

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I  # noqa: N812  # TVM's own names in scripts
from tvm.script import relax as R  # noqa: N812

from bitwright.passes import ops
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.pack_weights import PARAMETER_NAMES, PackWeights
from bitwright.passes.partition_for_target import PartitionForTarget
from bitwright.targets.codegen import CODEGEN, ISAS, generator, read_layer
from bitwright.targets.kernels import convolution, matmul
from bitwright.targets.kernels.host import AVX2, detect
from bitwright.targets.kernels.spec import Codes, Convolution, Floats, Matmul, Operand
from tests.passes.modules import layers, named, run, transform
from tests.quant.qdq import Array

HOST_ISAS = [isa for isa in ISAS.values() if isa != AVX2 or detect() == AVX2]
GENERATOR = np.random.default_rng(1)
FILTERS = GENERATOR.integers(-128, 128, (4, 3, 3, 2)).astype(np.int8)
MATRIX = GENERATOR.integers(-128, 128, (3, 4)).astype(np.int8)
BIAS = GENERATOR.integers(-1000, 1000, 4).astype(np.int32)
SHIFT = np.array([0, 1, 2, 3], np.int32)
MULTIPLIERS = np.array([0.001, 0.002, 0.01, 0.0005], np.float32)


def constant(values: Any, dtype: str) -> Any:
    return relax.const(np.array(values, dtype), dtype)


def requantize(sums: Any, multiplier: Any = MULTIPLIERS, dtype: str = "int8", **bounds: int) -> Any:
    limits = np.iinfo(dtype)
    options: dict[str, Any] = {
        "zero_point": 0,
        "low": int(limits.min),
        "high": int(limits.max),
    } | bounds
    return ops.requantize(sums, constant(multiplier, "float32"), dtype=dtype, **options)


def only(module: Any) -> Any:
    """The one function of a module."""
    (function,) = module.functions.values()
    return function


# -- reading ---------------------------------------------------------------------------------------


def test_a_convolution_is_read_from_its_body() -> None:
    column = (1, 4, 1, 1)

    @I.ir_module
    class Layer:
        @R.function
        def layer(q: R.Tensor(("n", 6, 9, 8), "uint8")):
            with R.dataflow():
                x = R.subtract(R.astype(q, "int32"), constant(7, "int32"))
                w = R.astype(relax.const(FILTERS), "int32")
                sums = R.nn.conv2d(
                    x,
                    w,
                    strides=[2, 1],
                    padding=[1, 0, 2, 3],
                    dilation=[1, 2],
                    groups=2,
                    out_dtype="int32",
                )
                fine = R.left_shift(sums, relax.const(SHIFT.reshape(column), "int32"))
                biased = R.add(fine, relax.const(BIAS.reshape(column), "int32"))
                out = requantize(
                    biased, MULTIPLIERS.reshape(4, 1, 1), "int16", zero_point=5, low=5, high=99
                )
                R.output(out)
            return out

    function = only(Layer)
    found = read_layer(function)
    assert found is not None
    assert found.spec == Convolution(
        batch=None,
        in_channels=6,
        size=(9, 8),
        out_channels=4,
        kernel=(3, 2),
        data=Operand("uint8", 7),
        output=Codes("int16", 5, 5, 99),
        weight="int8",
        strides=(2, 1),
        dilations=(1, 2),
        pads=(1, 0, 2, 3),
        groups=2,
        accumulator_bits=32,
        bias=True,
        shift=True,
    )
    assert found.bias is not None
    assert found.shift is not None
    assert found.data.same_as(function.params[0])
    np.testing.assert_array_equal(found.weights.value.numpy(), FILTERS)
    np.testing.assert_array_equal(found.bias.value.numpy().reshape(-1), BIAS)
    np.testing.assert_array_equal(found.shift.value.numpy().reshape(-1), SHIFT)
    np.testing.assert_array_equal(found.factors.value.numpy().reshape(-1), MULTIPLIERS)
    assert found.operands == [found.data, found.weights, found.bias, found.shift, found.factors]
    assert generator(found.spec) is convolution


@pytest.mark.parametrize("clamp", [(-math.inf, math.inf), (0.0, math.inf), (-2.0, 6.0)])
def test_a_product_that_leaves_the_integers(clamp: tuple[float, float]) -> None:
    weights = MATRIX.astype(np.int16)

    def ends(value: Any) -> Any:
        low, high = clamp
        if low > -math.inf:
            value = relax.op.maximum(value, constant(low, "float32"))
        return value if high == math.inf else relax.op.minimum(value, constant(high, "float32"))

    @I.ir_module
    class Layer:
        @R.function
        def layer(q: R.Tensor((2, "n", 3), "int16")):
            with R.dataflow():
                w = R.astype(relax.const(weights), "int64")
                sums = R.matmul(R.astype(q, "int64"), w, out_dtype="int64")
                out = ends(R.multiply(R.astype(sums, "float32"), constant(0.25, "float32")))
                R.output(out)
            return out

    found = read_layer(only(Layer))
    assert found is not None
    assert found.spec == Matmul(
        leading=(2, None),
        depth=3,
        columns=4,
        data=Operand("int16"),
        output=Floats(*clamp),
        weight="int16",
        accumulator_bits=64,
        bias=False,
        shift=False,
    )
    assert (found.bias, found.shift) == (None, None)
    assert generator(found.spec) is matmul


WIDE = MATRIX.astype(np.int32)
TALL = np.ones((2, 1), np.int32)  # one a row, not one a column
LAST = GENERATOR.integers(-128, 128, (3, 3, 3, 2)).astype(np.int8)


@I.ir_module
class OtherFunctions:
    @R.function
    def floats(x: R.Tensor((2, 3), "float32")):
        with R.dataflow():
            out = R.matmul(x, R.astype(relax.const(MATRIX), "float32"))
            R.output(out)
        return out

    @R.function
    def sums_alone(q: R.Tensor((2, 3), "int8")):
        with R.dataflow():
            out = R.matmul(R.astype(q, "int32"), R.astype(relax.const(MATRIX), "int32"))
            R.output(out)
        return out

    @R.function
    def wide_weights(q: R.Tensor((2, 3), "int8")):
        with R.dataflow():
            w = R.astype(relax.const(WIDE, "int32"), "int32")
            out = requantize(R.matmul(R.astype(q, "int32"), w))
            R.output(out)
        return out

    @R.function
    def wide_data(q: R.Tensor((2, 3), "int32")):
        with R.dataflow():
            w = R.astype(relax.const(MATRIX), "int32")
            out = requantize(R.matmul(R.astype(q, "int32"), w))
            R.output(out)
        return out

    @R.function
    def bias_a_row(q: R.Tensor((2, 3), "int8")):
        with R.dataflow():
            sums = R.matmul(R.astype(q, "int32"), R.astype(relax.const(MATRIX), "int32"))
            out = requantize(R.add(sums, relax.const(TALL, "int32")))
            R.output(out)
        return out

    @R.function
    def computed_bias(q: R.Tensor((2, 3), "int8"), p: R.Tensor((2, 4), "int32")):
        with R.dataflow():
            sums = R.matmul(R.astype(q, "int32"), R.astype(relax.const(MATRIX), "int32"))
            out = requantize(R.add(sums, p))
            R.output(out)
        return out

    @R.function
    def channels_last(q: R.Tensor((2, 8, 9, 3), "int8")):
        with R.dataflow():
            sums = R.nn.conv2d(
                R.astype(q, "int32"),
                R.astype(relax.const(LAST), "int32"),
                data_layout="NHWC",
                kernel_layout="HWIO",
                out_dtype="int32",
            )
            out = requantize(sums, 0.01)
            R.output(out)
        return out

    @R.function
    def unknown_image(q: R.Tensor((2, 3, "h", 5), "int8")):
        with R.dataflow():
            w = R.astype(relax.const(FILTERS), "int32")
            out = requantize(R.nn.conv2d(R.astype(q, "int32"), w, out_dtype="int32"), 0.01)
            R.output(out)
        return out

    @R.function
    def elementwise(q: R.Tensor((2, 3), "int8")):
        with R.dataflow():
            wide = R.astype(q, "int32")
            out = requantize(R.multiply(wide, wide), 0.01)
            R.output(out)
        return out

    @R.function
    def zero_point_a_channel(q: R.Tensor((2, 3), "int8")):
        with R.dataflow():
            x = R.subtract(R.astype(q, "int32"), constant([1, 2, 3], "int32"))
            out = requantize(R.matmul(x, R.astype(relax.const(MATRIX), "int32")))
            R.output(out)
        return out


@pytest.mark.parametrize("name", [variable.name_hint for variable in OtherFunctions.functions])
def test_other_functions_are_left_to_tvm(name: str) -> None:
    assert read_layer(OtherFunctions[name]) is None


# -- the whole way ---------------------------------------------------------------------------------


def quantize(x: Any, scale: float = 0.5, dtype: str = "int8") -> Any:
    return relax.op.quantize(
        x, relax.const(scale, "float32"), relax.const(0, dtype), axis=0, out_dtype=dtype
    )


def dequantize(q: Any, scale: float = 0.5, zero_point: int = 0, dtype: str = "int8") -> Any:
    return relax.op.dequantize(
        q, relax.const(scale, "float32"), relax.const(zero_point, dtype), axis=0
    )


FLOAT_BIAS = GENERATOR.normal(0, 30, (1, 4, 1, 1)).astype(np.float32)


@I.ir_module
class Network:
    @R.function
    def main(q: R.Tensor(("n", 3, 8, 7), "uint8")):
        with R.dataflow():
            w = dequantize(relax.const(FILTERS))
            conv = R.nn.conv2d(dequantize(q, 0.5, 9, "uint8"), w, padding=[1, 0, 1, 0])
            relu = R.nn.relu(R.add(conv, relax.const(FLOAT_BIAS)))
            middle = quantize(relu, 64.0)
            pooled = R.max(middle, axis=[2, 3])
            cut = R.strided_slice(pooled, [1], [0], [3])
            out = R.matmul(dequantize(cut), dequantize(relax.const(MATRIX), 0.25))
            R.output(out)
        return out


def packed(module: Any, isa: str) -> tuple[Any, list[Array]]:
    """Partition, lower, pack, and detach the parameters."""
    steps = PartitionForTarget(), LowerToInteger(), PackWeights(isa=isa)
    result = transform(named(module), *steps)
    names = list(result["main"].attrs[PARAMETER_NAMES])
    arrays = [tensor.numpy() for tensor in result["main"].attrs["params"]]
    assert len(names) == len(arrays)
    return relax.frontend.detach_params(result)[0], arrays


@pytest.mark.parametrize("isa", HOST_ISAS)
def test_kernels_equal_the_code_that_tvm_makes(isa: Any) -> None:
    module, arrays = packed(Network, isa.name)
    generated = transform(module, relax.transform.RunCodegen({CODEGEN: {"isa": isa.name}}))
    assert len(layers(module)) == 2
    left = [v.name_hint for v, f in generated.functions_items() if isinstance(f, relax.Function)]
    assert left == ["main"]
    plain = transform(named(Network), PartitionForTarget(), LowerToInteger())
    for samples in (1, 6):
        x = GENERATOR.integers(0, 256, (samples, 3, 8, 7)).astype(np.uint8)
        found = run(generated, x, *arrays)[0]
        np.testing.assert_array_equal(found, run(plain, x)[0])


def test_functions_that_no_kernel_computes_are_refused() -> None:
    function = OtherFunctions["floats"].with_attrs(
        {"Codegen": CODEGEN, "global_symbol": "floats_kernel", "Composite": "bitwright.matmul"}
    )
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    variable = builder.add_func(function, "floats")
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.Call(variable, [x])))
    with pytest.raises(ValueError, match="floats_kernel"):
        transform(builder.get(), relax.transform.RunCodegen({CODEGEN: {"isa": "generic"}}))


def test_tvm_finds_the_code_generator_by_its_name() -> None:
    assert tvm.get_global_func(f"relax.ext.{CODEGEN}") is not None
    assert set(ISAS) == {"avx2", "generic"}
