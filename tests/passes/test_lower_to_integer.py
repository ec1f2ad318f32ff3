"""LowerToInteger: the integers that it writes, operator by operator, and what it leaves float."""
# mypy: disable-error-code="valid-type, name-defined, no-untyped-def, untyped-decorator"
# ruff: noqa: N805
# The modules are TVMScript: Python's syntax, but neither its types nor its methods.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax
from tvm.script import ir as I  # noqa: N812  # TVM's own names in scripts
from tvm.script import relax as R  # noqa: N812

from bitwright.passes import ops
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.partition_for_target import PartitionForTarget
from tests.passes.modules import (
    assert_same,
    calls,
    layers,
    named,
    operators,
    run,
    transform,
)
from tests.quant.qdq import Array

GENERATOR = np.random.default_rng(1)
FILTERS = GENERATOR.integers(-128, 128, (4, 3, 2, 2)).astype(np.int8)
MATRIX = GENERATOR.integers(-128, 128, (3, 4)).astype(np.int8)
SCALES = np.array([0.5, 0.25, 0.125, 1.0], np.float32)
ZEROS = np.zeros(4, np.int8)


def quantize(x: Any, scale: float = 0.5, zero_point: int = 0, dtype: str = "int8") -> Any:
    return relax.op.quantize(
        x, relax.const(scale, "float32"), relax.const(zero_point, dtype), axis=0, out_dtype=dtype
    )


def dequantize(q: Any, scale: float = 0.5, zero_point: int = 0, dtype: str = "int8") -> Any:
    return relax.op.dequantize(
        q, relax.const(scale, "float32"), relax.const(zero_point, dtype), axis=0
    )


def constant(values: Any, dtype: str) -> Any:
    return relax.const(np.array(values, dtype), dtype)


def codes(*shape: int, dtype: str = "int8") -> Array:
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(limits.min, limits.max + 1, shape).astype(dtype)


def requantized(sums: Array, multiplier: Any, low: int = -128, high: int = 127) -> Array:
    """Codes of accumulators as docs/integer-semantics.md defines them, zero point 0."""
    scaled = np.rint(sums.astype(np.float32) * np.asarray(multiplier, np.float32))
    return np.asarray(np.clip(scaled, low, high).astype(np.int64))


def assert_lowered(before: Any, expected: Any) -> Any:
    """Assert what the pass makes, and that it finds nothing more to do; return it."""
    once = transform(named(before), LowerToInteger())
    assert_same(once, expected)
    assert_same(transform(once, LowerToInteger()), once)
    return once


# -- layers ----------------------------------------------------------------------------------------


def test_a_convolution_with_bias_and_relu() -> None:
    bias = np.array([3, -70, 5, 100], np.int32).reshape(1, 4, 1, 1)  # steps of 0.25 * 0.5

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3, 5, 5), "uint8")):
            with R.dataflow():
                x = dequantize(q, 0.25, 7, "uint8")
                w = dequantize(relax.const(FILTERS), 0.5)
                conv = R.nn.conv2d(x, w, strides=[2, 1], padding=[1, 0, 0, 2])
                b = dequantize(relax.const(bias), 0.125, 0, "int32")
                biased = R.add(conv, b)
                relu = R.nn.relu(biased)
                out = quantize(relu, 4.0)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((2, 3, 5, 5), "uint8")):
            with R.dataflow():
                x = R.subtract(R.astype(q, "int32"), constant(7, "int32"))
                w = R.astype(relax.const(FILTERS), "int32")
                conv = R.nn.conv2d(x, w, strides=[2, 1], padding=[1, 0, 0, 2], out_dtype="int32")
                biased = R.add(conv, relax.const(bias, "int32"))
                out = ops.requantize(
                    biased,
                    constant(0.125 / 4, "float32"),
                    zero_point=0,
                    low=0,
                    high=127,
                    dtype="int8",
                )
                R.output(out)
            return out

    after = assert_lowered(Before, Expected)
    x = codes(2, 3, 5, 5, dtype="uint8")
    padded = np.pad(x.astype(int) - 7, [(0, 0), (0, 0), (1, 0), (0, 2)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 2), axis=(2, 3))[:, :, ::2]
    sums = np.einsum("nchwij,ocij->nohw", windows, FILTERS.astype(int)) + bias
    np.testing.assert_array_equal(run(after, x)[0], requantized(sums, 0.125 / 4, low=0))


def test_scales_for_each_channel_make_a_vector_of_multipliers() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                x = dequantize(q, 0.25)
                w = R.dequantize(
                    relax.const(MATRIX), relax.const(SCALES), relax.const(ZEROS), axis=1
                )
                product = R.matmul(x, w)
                out = quantize(product, 8.0, 0, "int16")
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                x = R.astype(q, "int32")
                w = R.astype(relax.const(MATRIX), "int32")
                product = R.matmul(x, w, out_dtype="int32")
                out = ops.requantize(
                    product,
                    constant(0.25 * SCALES / 8, "float32"),
                    zero_point=0,
                    low=-32768,
                    high=32767,
                    dtype="int16",
                )
                R.output(out)
            return out

    after = assert_lowered(Before, Expected)
    x = codes(5, 3)
    sums = x.astype(int) @ MATRIX.astype(int)
    expected = requantized(sums, 0.25 * SCALES / 8, -(2**15), 2**15 - 1)
    np.testing.assert_array_equal(run(after, x)[0], expected)


def test_what_leaves_the_integers_is_accumulator_times_scale() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q, 0.3), dequantize(relax.const(MATRIX), 0.7))
                clipped = R.clip(product, R.prim_value(-9.0), R.prim_value(50.0))
                R.output(clipped)
            return clipped

    scale = np.float32(0.3) * np.float32(0.7)

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                product = R.matmul(
                    R.astype(q, "int32"), R.astype(relax.const(MATRIX), "int32"), out_dtype="int32"
                )
                floats = R.multiply(R.astype(product, "float32"), constant(scale, "float32"))
                above = R.maximum(floats, constant(-9.0, "float32"))
                clipped = R.minimum(above, constant(50.0, "float32"))
                R.output(clipped)
            return clipped

    after = assert_lowered(Before, Expected)
    x = codes(5, 3)
    sums = (x.astype(int) @ MATRIX.astype(int)).astype(np.float32)
    np.testing.assert_array_equal(run(after, x)[0], np.clip(sums * scale, -9, 50))


def test_biases_in_float_become_steps_as_fine_as_32_bits_allow() -> None:
    matrix = np.ones((3, 2), np.int8)
    bias = np.array([0.3, -1.1], np.float32)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q, 1.0), dequantize(relax.const(matrix), 1.0))
                biased = R.add(relax.const(bias), product)
                out = quantize(biased, 1.0)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    assert operators(after["main"]).count("left_shift") == 1
    # f = floor(log2(2^31 / (bound + |b / s| + 1))), the bound 3 * 128 (docs, "Biases").
    shift = np.floor(np.log2(2**31 / (3 * 128 + np.abs(bias.astype(float)) + 1))).astype(int)
    x = codes(5, 3)
    sums = (x.astype(int) @ matrix.astype(int)) << shift
    sums += np.rint(np.ldexp(bias.astype(float), shift)).astype(int)
    np.testing.assert_array_equal(run(after, x)[0], requantized(sums, np.ldexp(1.0, -shift)))


@pytest.mark.parametrize("shape", [(5, 1, 4), (1, 1), (5, 1), (5, 4), (1,)])
def test_biases_of_any_shape(shape: tuple[int, ...]) -> None:
    bias = np.random.default_rng(3).integers(-500, 500, shape).astype(np.float32)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q, 1.0), dequantize(relax.const(MATRIX), 1.0))
                biased = R.add(product, relax.const(bias))
                out = quantize(biased, 64.0)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    x = codes(5, 3)
    sums = x.astype(int) @ MATRIX.astype(int) + bias.astype(int)
    np.testing.assert_array_equal(run(after, x)[0], requantized(sums, 1 / 64))


@pytest.mark.parametrize("bias", [np.inf, np.nan, 3e38])
def test_biases_beyond_integers_stay_float(bias: float) -> None:
    values = np.full(4, bias, np.float32)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q, 1.0), dequantize(relax.const(MATRIX), 1.0))
                biased = R.add(product, relax.const(values))
                R.output(biased)
            return biased

    after = transform(named(Before), LowerToInteger())
    assert operators(after["main"])[-2:] == ["multiply", "add"]


# 16-bit codes by 16-bit weights: 2 * 2^30 reaches 2^31, a little less does not.
@pytest.mark.parametrize("largest, dtype", [(-32768, "int64"), (-32767, "int32")])
def test_accumulators_have_as_many_bits_as_they_need(largest: int, dtype: str) -> None:
    weights = np.array([[-32768], [largest]], np.int16)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 2), "int16")):
            with R.dataflow():
                product = R.matmul(
                    dequantize(q, 1.0, 0, "int16"),
                    dequantize(relax.const(weights), 1.0, 0, "int16"),
                )
                out = quantize(product, 65536.0, 0, "int16")
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    products = [
        binding.value
        for binding in after["main"].body.blocks[0].bindings
        if "matmul" in operators(binding.value)
    ]
    assert [str(product.ty.dtype) for product in products] == [dtype]
    x = np.full((5, 2), -32768, np.int16)
    sums = x.astype(int) @ weights.astype(int)
    expected = requantized(sums, 1 / 65536, -(2**15), 2**15 - 1)
    np.testing.assert_array_equal(run(after, x)[0], expected)


def test_products_of_two_activations() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 5, 3), "int8"), p: R.Tensor((2, 3, 4), "uint8")):
            with R.dataflow():
                product = R.matmul(dequantize(q, 0.5, 1), dequantize(p, 0.25, 9, "uint8"))
                out = quantize(product, 40.0)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    assert "matmul" in operators(after["main"])
    assert "dequantize" not in operators(after["main"])
    x, y = codes(2, 5, 3), codes(2, 3, 4, dtype="uint8")
    sums = (x.astype(int) - 1) @ (y.astype(int) - 9)
    np.testing.assert_array_equal(run(after, x, y)[0], requantized(sums, np.float32(0.125) / 40))


def test_each_use_of_an_accumulator_becomes_integer() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q, 1.0), dequantize(relax.const(MATRIX), 1.0))
                fine = quantize(product, 32.0)
                positive = quantize(R.nn.relu(product), 64.0, 0, "uint8")
                R.output(product, fine, positive)
            return (product, fine, positive)

    after = transform(named(Before), LowerToInteger())
    assert operators(after["main"]).count("bitwright.requantize") == 2
    x = codes(5, 3)
    sums = x.astype(int) @ MATRIX.astype(int)
    product, fine, positive = run(after, x)
    np.testing.assert_array_equal(product, sums.astype(np.float32))
    np.testing.assert_array_equal(fine, requantized(sums, 1 / 32))
    np.testing.assert_array_equal(positive, requantized(sums, 1 / 64, 0, 255))


def test_composite_functions_are_lowered_where_they_stand() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                narrow = R.clip(q, R.prim_value(-8), R.prim_value(7))
                first = R.matmul(dequantize(narrow, 1.0), dequantize(relax.const(MATRIX), 1.0))
                codes_4 = R.clip(quantize(first, 64.0), R.prim_value(-8), R.prim_value(7))
                square = R.multiply(dequantize(codes_4, 1.0), dequantize(codes_4, 1.0))
                out = quantize(square, 1.0)
                R.output(out)
            return out

    after = transform(named(Before), PartitionForTarget(), LowerToInteger())
    (layer,) = layers(after).values()
    # The clip is part of the requantization now.
    assert operators(layer) == ["astype", "astype", "matmul", "bitwright.requantize"]
    assert {name for _, name in calls(after["main"])}.isdisjoint({"quantize", "dequantize"})
    x = codes(5, 3)
    sums = np.clip(x, -8, 7).astype(int) @ MATRIX.astype(int)
    inner = requantized(sums, 1 / 64, -8, 7)
    np.testing.assert_array_equal(run(after, x)[0], np.clip(inner**2, -128, 127))
    assert_same(transform(after, LowerToInteger()), after)


# -- sums, products, averages ----------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["add", "subtract"])
@pytest.mark.parametrize(
    "case",
    [
        ("int8", (0.5, 0.25), 22, "int32"),
        ("int8", (0.5, 64.5), 30, "int64"),  # too far apart for 22 bits
        ("int16", (0.5, 0.25), 30, "int64"),
    ],
)
def test_sums_have_integer_multipliers(operator: str, case: tuple[Any, ...]) -> None:
    dtype, scales, bits, wide = case
    combine = getattr(relax.op, operator)
    left, right = scales

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), dtype), p: R.Tensor((3,), dtype)):
            with R.dataflow():
                total = combine(dequantize(q, left, 5, dtype), dequantize(p, right, 0, dtype))
                out = quantize(total, 2.0, 0, dtype)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    assert operators(after["main"]).count("multiply") == 2
    types = {str(b.var.ty.dtype) for b in after["main"].body.blocks[0].bindings}
    assert wide in types
    step = max(scales) / 2.0**bits
    factors = [int(np.rint(scale / step)) for scale in scales]
    x, y = codes(5, 3, dtype=dtype), codes(3, dtype=dtype)
    second = factors[1] * y.astype(int)
    sums = factors[0] * (x.astype(int) - 5) + (second if operator == "add" else -second)
    limits = np.iinfo(dtype)
    expected = requantized(sums, np.float32(step) / 2, limits.min, limits.max)
    np.testing.assert_array_equal(run(after, x, y)[0], expected)


def test_constants_are_operands_like_activations() -> None:
    stored = np.array([1, -2, 3], np.int8)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                product = R.multiply(dequantize(q, 0.5, 2), dequantize(relax.const(stored), 0.25))
                out = quantize(product, 1.0)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    x = codes(5, 3)
    expected = requantized((x.astype(int) - 2) * stored, 0.125)
    np.testing.assert_array_equal(run(after, x)[0], expected)
    assert "quantize" not in operators(after["main"])


def test_products_of_16_bit_codes_take_64_bits() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "uint16")):
            with R.dataflow():
                x = dequantize(q, 1.0, 0, "uint16")
                square = R.multiply(x, x)
                out = quantize(square, 65536.0, 0, "uint16")
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    x = np.array([[0, 1, 255], [256, 65535, 65534], *[[40000, 300, 65535]] * 3], np.uint16)
    sums = x.astype(int) ** 2
    np.testing.assert_array_equal(run(after, x)[0], requantized(sums, 1 / 65536, 0, 65535))


@pytest.mark.parametrize("operator", ["mean", "sum"])
@pytest.mark.parametrize("axes", [[1], [-1, 1], None])
def test_averages_over_axes(operator: str, axes: list[int] | None) -> None:
    reduce = getattr(relax.op, operator)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3, 5), "uint8")):
            with R.dataflow():
                reduced = reduce(dequantize(q, 0.5, 9, "uint8"), axes, True)
                out = quantize(reduced, 2.0)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    assert operators(after["main"]) == ["astype", "subtract", "sum", "bitwright.requantize"]
    x = codes(2, 3, 5, dtype="uint8")
    sums = (x.astype(int) - 9).sum(axis=None if axes is None else tuple(axes), keepdims=True)
    terms = x.size // sums.size if operator == "mean" else 1
    multiplier = np.float32(0.5 / terms) / np.float32(2)
    np.testing.assert_array_equal(run(after, x)[0], requantized(sums, multiplier))


@pytest.mark.parametrize("counted", [False, True])
def test_averages_over_windows_divide_by_what_onnx_divides_by(counted: bool) -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((1, 2, 5, 4), "int8")):
            with R.dataflow():
                pooled = R.nn.avg_pool2d(
                    dequantize(q, 1.0, 3),
                    pool_size=[3, 2],
                    strides=[2, 1],
                    padding=[1, 0, 1, 1],
                    count_include_pad=counted,
                )
                out = quantize(pooled, 1.0)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    assert "nn.avg_pool2d" not in operators(after["main"])
    x = codes(1, 2, 5, 4)
    pads = [(0, 0), (0, 0), (1, 1), (0, 1)]
    ones = np.pad(np.ones(x.shape, int), pads, constant_values=int(counted))
    sums, counts = (
        np.lib.stride_tricks.sliding_window_view(e, (3, 2), axis=(2, 3))[:, :, ::2].sum((-2, -1))
        for e in (np.pad(x.astype(int) - 3, pads), ones)
    )
    multiplier = (1 / counts).astype(np.float32)
    np.testing.assert_array_equal(run(after, x)[0], requantized(sums, multiplier))


def test_averages_over_sizes_that_are_not_known_stay_float() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, "n"), "int8"), p: R.Tensor(ndim=2, dtype="int8")):
            with R.dataflow():
                known = quantize(R.mean(dequantize(q), axis=[0]), 1.0)
                sizes = quantize(R.mean(dequantize(q), axis=[1]), 1.0)
                ranks = quantize(R.mean(dequantize(p), axis=[1]), 1.0)
                R.output(known, sizes, ranks)
            return (known, sizes, ranks)

    after = transform(named(Before), LowerToInteger())
    found = operators(after["main"])
    assert (found.count("mean"), found.count("bitwright.requantize")) == (2, 1)


# -- tables ----------------------------------------------------------------------------------------


def test_values_looked_up_by_codes_become_codes_looked_up() -> None:
    values = np.linspace(-3, 3, 16, dtype=np.float32)
    table = np.rint(values / np.float32(0.5)).astype(np.int8)

    @I.ir_module
    class Before:
        @R.function
        def main(index: R.Tensor((5, 3), "int32")):
            with R.dataflow():
                looked_up = R.take(relax.const(values), index, axis=0)
                out = quantize(looked_up, 0.5)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(index: R.Tensor((5, 3), "int32")):
            with R.dataflow():
                out = R.take(relax.const(table, "int8"), index, axis=0, mode="clip")
                R.output(out)
            return out

    assert_lowered(Before, Expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_another_scale_for_codes_is_a_table_of_their_width(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((256,), "int8")):
            with R.dataflow():
                narrow = R.clip(q, R.prim_value(low), R.prim_value(high))
                out = quantize(dequantize(narrow, 0.3, 1), 0.7, 2)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    tables = [c.args[0] for c in _calls_of(after, "take")]
    assert [table.value.shape[0] for table in tables] == [2**bits]
    x = np.arange(-128, 128).astype(np.int8)
    values = (np.clip(x, low, high).astype(np.float32) - 1) * np.float32(0.3)
    expected = np.clip(np.rint(values / np.float32(0.7)) + 2, -128, 127)
    np.testing.assert_array_equal(run(after, x)[0], expected)


def _calls_of(module: Any, operator: str) -> list[Any]:
    values = [b.value for block in module["main"].body.blocks for b in block.bindings]
    return [value for value in values if operators(value) == [operator]]


# -- what stays float, or codes --------------------------------------------------------------------


def test_clips_of_codes_that_cut_more_than_their_width_stay() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((256, 1), "int8")):
            with R.dataflow():
                x = dequantize(q, 0.5)
                square = R.multiply(x, x)
                wide = quantize(square, 1.0)
                out = R.clip(wide, R.prim_value(5), R.prim_value(100))
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    x = np.arange(-128, 128).astype(np.int8)[:, None]
    expected = requantized(x.astype(int) ** 2, 0.25, 5, 100)
    np.testing.assert_array_equal(run(after, x)[0], expected)


def test_scales_for_each_channel_of_activations_stay_float() -> None:
    scale, zero = SCALES[:3], ZEROS[:3]

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                x = R.dequantize(q, relax.const(scale), relax.const(zero), axis=1)
                product = R.matmul(x, dequantize(relax.const(MATRIX)))
                y = R.quantize(
                    product, relax.const(SCALES), relax.const(ZEROS), axis=1, out_dtype="int8"
                )
                total = R.add(x, x)
                R.output(y, total)
            return (y, total)

    assert_lowered(Before, Before)


def test_scales_along_the_terms_of_a_product_stay_float() -> None:
    scale, zero = SCALES[:3], ZEROS[:3]

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                w = R.dequantize(relax.const(MATRIX), relax.const(scale), relax.const(zero), axis=0)
                product = R.matmul(dequantize(q), w)
                out = quantize(product)
                R.output(out)
            return out

    assert_lowered(Before, Before)


def test_scales_along_the_axes_of_other_layouts_are_no_channels() -> None:
    scale, zero = SCALES[:3], ZEROS[:3]
    last = np.random.default_rng(5).integers(-128, 128, (3, 2, 3, 4)).astype(np.int8)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((1, 6, 5, 3), "int8")):
            with R.dataflow():
                w = R.dequantize(relax.const(last), relax.const(scale), relax.const(zero), axis=0)
                conv = R.nn.conv2d(dequantize(q), w, data_layout="NHWC", kernel_layout="HWIO")
                R.output(conv)
            return conv

    x = codes(1, 6, 5, 3)
    found = run(transform(named(Before), LowerToInteger()), x)[0]
    np.testing.assert_allclose(found, run(Before, x)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("steps", [[], [PartitionForTarget()]])
def test_other_layouts_keep_their_results(steps: list[Any]) -> None:
    last = np.random.default_rng(5).integers(-128, 128, (3, 3, 3, 2)).astype(np.int8)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 8, 9, 3), "int8")):
            with R.dataflow():
                w = dequantize(relax.const(last))
                conv = R.nn.conv2d(dequantize(q), w, data_layout="NHWC", kernel_layout="HWIO")
                out = quantize(conv, 64.0)
                R.output(out)
            return out

    x = codes(2, 8, 9, 3)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(int), (3, 3), axis=(1, 2))
    sums = np.einsum("nhwcij,ijco->nhwo", windows, last.astype(int))
    found = run(transform(named(Before), *steps, LowerToInteger()), x)[0]
    difference = np.abs(found.astype(int) - requantized(sums, 0.25 / 64))
    assert difference.max() == 0


def test_sums_of_codes_and_floats_stay_float() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8"), x: R.Tensor((5, 3), "float32")):
            with R.dataflow():
                total = quantize(R.add(dequantize(q), x))
                quotient = quantize(R.divide(dequantize(q), dequantize(q)))
                R.output(total, quotient)
            return (total, quotient)

    assert_lowered(Before, Before)


def test_an_addition_behind_a_clamp_is_no_bias() -> None:
    bias = np.array([1, 2, 3, 4], np.float32)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                relu = R.nn.relu(R.matmul(dequantize(q), dequantize(relax.const(MATRIX))))
                out = quantize(R.add(relu, relax.const(bias)), 64.0)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    assert operators(after["main"])[-2:] == ["add", "quantize"]
    x = codes(5, 3)
    sums = np.maximum((x.astype(int) @ MATRIX.astype(int)).astype(np.float32) * 0.25, 0) + bias
    np.testing.assert_array_equal(run(after, x)[0], requantized(sums, 1 / 64))


def test_aliases_hide_nothing() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                x = dequantize(q)
                same = x
                product = R.matmul(same, dequantize(relax.const(MATRIX)))
                again = product
                relu = R.nn.relu(again)
                third = relu
                out = quantize(third, 64.0)
                R.output(out)
            return out

    after = transform(named(Before), LowerToInteger())
    assert operators(after["main"]) == ["astype", "astype", "matmul", "bitwright.requantize"]


def test_codes_in_both_branches_of_a_condition() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(flag: R.Tensor((), "bool"), q: R.Tensor((5, 3), "int8")) -> R.Tensor(
            (5, 4), "int8"
        ):
            x = dequantize(q)
            if flag:
                w = dequantize(relax.const(MATRIX))
                product = R.matmul(x, w)
                out = quantize(product, 64.0)
            else:
                v = dequantize(relax.const(MATRIX), 2.0)
                other = R.matmul(x, v)
                out = quantize(other, 64.0)
            return out

    after = transform(named(Before), LowerToInteger())
    assert "quantize" not in operators(after["main"])
    x = codes(5, 3)
    sums = x.astype(int) @ MATRIX.astype(int)
    for flag, scale in ((True, 0.25), (False, 1.0)):
        expected = requantized(sums, np.float32(scale) / 64)
        np.testing.assert_array_equal(run(after, np.array(flag), x)[0], expected)


def test_symbolic_and_unknown_shapes() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor(("n", 3), "int8"), p: R.Tensor(ndim=2, dtype="int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                out = quantize(product, 64.0)
                x = dequantize(p)
                total = quantize(R.add(x, x), 1.0)
                R.output(out, total)
            return (out, total)

    after = transform(named(Before), LowerToInteger())
    assert "quantize" not in operators(after["main"])
    # Product of computed operands of unknown depth: its bound is not known, so it stays float.

    @I.ir_module
    class Deep:
        @R.function
        def main(q: R.Tensor((5, "k"), "int8"), p: R.Tensor(("k", 4), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(p))
                out = quantize(product)
                R.output(out)
            return out

    assert_lowered(Deep, Deep)


def test_names_of_nodes_survive() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                x = dequantize(q)
                product = R.matmul(x, dequantize(relax.const(MATRIX)))
                codes_out = quantize(product, 64.0)
                square = R.multiply(dequantize(codes_out), dequantize(codes_out))
                squared = quantize(square)
                y = dequantize(squared)
                R.output(y)
            return y

    found = calls(transform(named(Before), LowerToInteger())["main"])
    assert ("product", "matmul") in found
    assert ("codes_out", "bitwright.requantize") in found
    assert ("squared", "bitwright.requantize") in found
    assert ("y", "dequantize") in found
