"""Accumulator to code: against exact fractions, a naive formula and onnxruntime's own kernels."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.quant.observers import TensorQuantization
from bitwright.quant.requantization import (
    Requantization,
    accumulator_bits,
    accumulator_bound,
    quantize_float,
)
from tests.quant.qdq import BITS, profile

Array = npt.NDArray[Any]

INT32 = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-300, 300),
    st.sampled_from([-(2**31), -(2**31) + 1, 2**31 - 1, 2**24, 2**24 + 1, -(2**24) - 1]),
)
INT64 = st.one_of(
    st.integers(-(2**62), 2**62),
    st.sampled_from([-(2**63), 2**63 - 1, 2**31, -(2**31) - 1, 2**53 + 1]),
    INT32,
)
SCALES = st.floats(2.0**-60, 2.0**20, width=32)


@st.composite
def outputs(draw: st.DrawFn) -> TensorQuantization:
    bits, signed = draw(st.sampled_from(BITS)), draw(st.booleans())
    probe = TensorQuantization(1.0, 0, bits, signed)
    zero_point = draw(st.integers(probe.code_min, probe.code_max))
    return TensorQuantization(draw(SCALES), zero_point, bits, signed)


def multiplier_of(scale: float, output: TensorQuantization) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(scale) / np.float32(output.scale)


def whole(value: float) -> int:
    """Round half to even; infinite values become large ones."""
    return round(max(-(2.0**70), min(2.0**70, value)))


def saturate(value: int, output: TensorQuantization) -> int:
    return max(output.code_min, min(output.code_max, value))


@profile(400)
@given(st.lists(INT64, min_size=1, max_size=8), SCALES, outputs())
def test_float_form_is_the_formula(
    accumulators: list[int], scale: float, output: TensorQuantization
) -> None:
    found = Requantization.between(np.float32(scale), output).apply(np.array(accumulators))
    for accumulator, code in zip(accumulators, found.tolist(), strict=True):
        # One float32 conversion and one float32 product, then whole numbers of any size.
        with np.errstate(over="ignore"):
            product = float(np.float32(accumulator) * multiplier_of(scale, output))
        assert code == saturate(whole(product) + output.zero_point, output)


def test_float_form_rounds_the_accumulator_first() -> None:
    # Of these accumulators, which have more than 24 bits, some codes tell the two roundings apart.
    output = TensorQuantization(1.0, 0, 16, signed=True)
    accumulators = np.random.default_rng(0).integers(2**24, 2**31, 200_000)
    multiplier = np.float32(1.3e-5)
    converted = np.rint(accumulators.astype(np.float32) * multiplier)
    assert np.count_nonzero(converted != np.rint(accumulators * np.float64(multiplier))) > 100
    found = Requantization.between(multiplier, output).apply(accumulators)
    np.testing.assert_array_equal(found, np.minimum(converted, 32767))


@profile(400)
@given(st.lists(INT64, min_size=1, max_size=8), SCALES, outputs())
def test_fixed_form_is_the_exact_product_rounded_half_to_even(
    accumulators: list[int], scale: float, output: TensorQuantization
) -> None:
    requantization = Requantization.between(np.float32(scale), output)
    multiplier = Fraction(float(multiplier_of(scale, output)))
    found = requantization.apply(np.array(accumulators), "fixed")
    for accumulator, code in zip(accumulators, found.tolist(), strict=True):
        exact = round(accumulator * multiplier)  # a Fraction rounds half to even
        assert code == saturate(exact + output.zero_point, output)


@profile(300)
@given(st.floats(0, 2.0**127, width=32), outputs())
def test_fixed_multiplier_is_exact(scale: float, output: TensorQuantization) -> None:
    requantization = Requantization.between(np.float32(scale), output)
    multiplier, shift = (int(part) for part in requantization.fixed_point())
    wanted = multiplier_of(scale, output)
    if not np.isfinite(wanted):
        wanted = np.finfo(np.float32).max
    assert multiplier == 0 or 2**30 <= multiplier < 2**31
    error = abs(Fraction(multiplier) / Fraction(2) ** shift - Fraction(float(wanted)))
    # What 31 bits allow is a relative error of 2^-31; a float32 number needs only 24 of them.
    assert error <= Fraction(float(wanted)) / 2**31
    assert error == 0


@profile(200)
@given(INT32, SCALES, outputs())
def test_fixed_and_float_form_differ_by_one_at_most(
    accumulator: int, scale: float, output: TensorQuantization
) -> None:
    requantization = Requantization.between(np.float32(scale), output)
    found = [int(requantization.apply(np.array([accumulator]), form)[0]) for form in FORMS]
    assert abs(found[0] - found[1]) <= 1


FORMS: Any = ("float", "fixed")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "accumulator, expected",
    # (accumulator + 0.0) / 2, ties to even
    [(1, 0), (3, 2), (5, 2), (7, 4), (-1, 0), (-3, -2), (-5, -2), (-7, -4), (4, 2), (-4, -2)],
)
def test_ties_go_to_even(form: Any, accumulator: int, expected: int) -> None:
    output = TensorQuantization(2.0, 0, 8, signed=True)
    requantization = Requantization.between(np.float32(1.0), output)
    assert requantization.apply(np.array([accumulator]), form).tolist() == [expected]
    # Ties are broken before the zero point is added: an odd one does not turn them.
    shifted = Requantization.between(np.float32(1.0), TensorQuantization(2.0, 1, 8, signed=True))
    assert shifted.apply(np.array([accumulator]), form).tolist() == [expected + 1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_saturates_at_the_ends_of_the_type(form: Any, bits: int, signed: bool) -> None:
    output = TensorQuantization(1.0, 0, bits, signed)
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    extremes = [-(2**63), -(2**31), least - 1, least, most, most + 1, 2**31 - 1, 2**63 - 1]
    for scale in (1.0, 2.0**100):
        found = Requantization.between(np.float32(scale), output).apply(np.array(extremes), form)
        expected = [least, least, least, least, most, most, most, most]
        # A value of several codes does not end at the last one, but saturates as well.
        if scale > 1.0:
            expected[3] = least if signed else 0
        assert found.tolist() == expected


@pytest.mark.parametrize("form", FORMS)
def test_tiny_and_huge_multipliers(form: Any) -> None:
    output = TensorQuantization(1.0, 3, 16, signed=True)
    extremes = np.array([-(2**31), -1, 0, 1, 2**31 - 1])
    just_below_half = np.float32(2.0**-32) * (np.float32(1) - np.float32(2.0**-24))
    for scale in (0.0, 1e-45, 2.0**-126, 2.0**-64, just_below_half):
        requantization = Requantization.between(np.float32(scale), output)
        assert requantization.apply(extremes, form).tolist() == [3, 3, 3, 3, 3]
    # A quotient beyond float32 saturates, and 0 stays 0.
    huge = Requantization.between(np.float32(3e38), TensorQuantization(1e-3, 3, 16, signed=True))
    assert huge.apply(extremes, form).tolist() == [-32768, -32768, 3, 32767, 32767]
    wide = np.array([-(2**63), 2**63 - 1])
    tiny = Requantization.between(np.float32(2.0**-65), output)
    assert tiny.apply(wide, form).tolist() == [3, 3]


@pytest.mark.parametrize("form", FORMS)
def test_shapes_are_kept(form: Any) -> None:
    output = TensorQuantization(0.5, 0, 8, signed=True)
    requantization = Requantization.between(np.float32(1.0), output)
    for shape in [(), (1,), (0, 3), (2, 1, 3)]:
        for number in (5, 2**40):
            codes = requantization.apply(np.full(shape, number, np.int64), form)
            assert isinstance(codes, np.ndarray)
            assert codes.shape == shape
            assert codes.dtype == np.int64
            assert (codes == (10 if number == 5 else 127)).all()


@pytest.mark.parametrize("form", FORMS)
def test_one_multiplier_a_channel(form: Any) -> None:
    output = TensorQuantization(1.0, 0, 16, signed=True)
    scales = np.array([1.0, 0.5, 0.25], np.float32).reshape(3, 1)
    accumulators = np.arange(24).reshape(2, 3, 4) * 4
    found = Requantization.between(scales, output).apply(accumulators, form)
    np.testing.assert_array_equal(found, accumulators // np.array([[1], [2], [4]]))


@profile(300)
@given(
    INT32,
    st.floats(2.0**-20, 4.0, width=32),
    outputs(),
    st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)).map(sorted),
)
def test_clamped_codes_are_codes_of_clamped_values(
    accumulator: int, scale: float, output: TensorQuantization, bounds: list[float]
) -> None:
    clamped = Requantization.between(np.float32(scale), output, (bounds[0], bounds[1]))
    free = Requantization.between(np.float32(scale), output)
    code = int(free.apply(np.array([accumulator]))[0])
    low, high = (
        saturate(round(float(np.float32(b) / np.float32(output.scale))) + output.zero_point, output)
        for b in bounds
    )
    assert int(clamped.apply(np.array([accumulator]))[0]) == max(low, min(high, code))


def test_relu_starts_at_the_zero_point() -> None:
    output = TensorQuantization(0.1, -20, 8, signed=True)
    requantization = Requantization.between(np.float32(0.01), output, (0.0, np.inf))
    assert (requantization.low, requantization.high) == (-20, 127)
    relu6 = Requantization.between(np.float32(0.01), output, (0.0, 6.0))
    assert (relu6.low, relu6.high) == (-20, 40)
    assert relu6.apply(np.array([-500, 10, 100, 600, 700])).tolist() == [-20, -19, -10, 40, 40]


@profile(200)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8), outputs())
def test_quantize_float_is_quantize_linear(values: list[float], output: TensorQuantization) -> None:
    with np.errstate(over="ignore"):
        steps = np.array(values, np.float32) / np.float32(output.scale)
        found = quantize_float(np.array(values, np.float32), output.scale, output)
    for step, code in zip(steps.tolist(), found.tolist(), strict=True):
        assert code == saturate(whole(step) + output.zero_point, output)


def test_quantizing_rounds_ties_to_even() -> None:
    values = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32) / 8
    odd = TensorQuantization(0.125, 1, 8, signed=True)
    assert quantize_float(values, 0.125, odd).tolist() == [-1, -1, 1, 1, 3, 3]


def test_nan_becomes_the_highest_code() -> None:
    """ONNX leaves it open; an undefined conversion would give codes outside the type."""
    output = TensorQuantization(0.5, 3, 8, signed=True)
    codes = quantize_float(np.array([np.nan, np.inf, -np.inf], np.float32), 0.5, output)
    assert codes.tolist() == [127, 127, -128]


# -- onnxruntime's QLinear operators: another implementation of the same convention ---------------


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, feeds)[0]
    return result


def qlinear(
    operator: str, inputs: dict[str, Any], data: str, output: Array, **attributes: Any
) -> Array:
    """Run one QLinear operator; all inputs but ``data`` are initializers."""
    node = onnx.helper.make_node(operator, list(inputs), ["y"], **attributes)
    type_of = onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info(data, type_of(inputs[data].dtype), inputs[data].shape)],
        [onnx.helper.make_tensor_value_info("y", type_of(output.dtype), None)],
        [
            onnx.numpy_helper.from_array(np.asarray(a), name)
            for name, a in inputs.items()
            if name != data
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return run(model, {data: inputs[data]})


def weight_codes(generator: np.random.Generator, dtype: Any, shape: tuple[int, ...]) -> Array:
    # Kernels for processors without VNNI add pairs of products in 16 bits; 7-bit weights fit.
    low, high = (-64, 64) if dtype == np.int8 else (0, 128)
    return generator.integers(low, high, shape).astype(dtype)


QLINEAR_TYPES = [(np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8)]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("x_type, w_type", QLINEAR_TYPES)
def test_equals_qlinear_matmul(x_type: Any, w_type: Any, per_channel: bool) -> None:
    generator = np.random.default_rng(1)
    for _ in range(12):
        rows, terms, columns = generator.integers(1, 40, 3)
        output = random_output(generator, x_type)
        x = generator.integers(*limits(x_type), (rows, terms)).astype(x_type)
        w = weight_codes(generator, w_type, (terms, columns))
        x_zero = generator.integers(*limits(x_type)).astype(x_type)
        x_scale = np.float32(generator.uniform(0.001, 0.1))
        w_scale = generator.uniform(0.001, 0.1, columns if per_channel else ()).astype(np.float32)
        w_zero = np.zeros_like(w_scale, dtype=w_type)
        found = qlinear(
            "QLinearMatMul",
            {
                "x": x,
                "x_scale": x_scale,
                "x_zero": x_zero,
                "w": w,
                "w_scale": w_scale,
                "w_zero": w_zero,
                "y_scale": np.float32(output.scale),
                "y_zero": np.array(output.zero_point, x_type),
            },
            "x",
            np.zeros((), x_type),
        )
        accumulator = (x.astype(np.int64) - int(x_zero)) @ w.astype(np.int64)
        expected = Requantization.between(x_scale * w_scale, output).apply(accumulator)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("x_type, w_type", QLINEAR_TYPES)
def test_equals_qlinear_conv(x_type: Any, w_type: Any, per_channel: bool) -> None:
    generator = np.random.default_rng(2)
    for _ in range(12):
        batch, channels, filters = generator.integers(1, 6, 3)
        size, kernel = generator.integers(5, 10, 2), generator.integers(1, 4, 2)
        output = random_output(generator, x_type)
        x = generator.integers(*limits(x_type), (batch, channels, *size)).astype(x_type)
        w = weight_codes(generator, w_type, (filters, channels, *kernel))
        x_zero = generator.integers(*limits(x_type)).astype(x_type)
        x_scale = np.float32(generator.uniform(0.001, 0.1))
        w_scale = generator.uniform(0.001, 0.1, filters if per_channel else ()).astype(np.float32)
        bias = generator.integers(-5000, 5000, filters).astype(np.int32)
        found = qlinear(
            "QLinearConv",
            {
                "x": x,
                "x_scale": x_scale,
                "x_zero": x_zero,
                "w": w,
                "w_scale": w_scale,
                "w_zero": np.zeros_like(w_scale, dtype=w_type),
                "y_scale": np.float32(output.scale),
                "y_zero": np.array(output.zero_point, x_type),
                "bias": bias,
            },
            "x",
            np.zeros((), x_type),
        )
        centred = x.astype(np.int64) - int(x_zero)
        accumulator = np.empty(found.shape, np.int64)
        for index in np.ndindex(*found.shape):
            n, m, i, j = index
            window = centred[n, :, i : i + kernel[0], j : j + kernel[1]]
            accumulator[index] = (window * w[m].astype(np.int64)).sum() + bias[m]
        scale = x_scale * (w_scale.reshape(-1, 1, 1) if per_channel else w_scale)
        expected = Requantization.between(scale, output).apply(accumulator)
        np.testing.assert_array_equal(found, expected)


def limits(dtype: Any) -> tuple[int, int]:
    info = np.iinfo(dtype)
    return int(info.min), int(info.max) + 1


def random_output(generator: np.random.Generator, dtype: Any) -> TensorQuantization:
    scale = float(np.float32(generator.uniform(0.01, 2.0)))
    zero_point = int(generator.integers(*limits(dtype)))
    return TensorQuantization(scale, zero_point, 8, signed=dtype == np.int8)


# -- accumulators ---------------------------------------------------------------------------------


def partial_sums(weights: list[int], inputs: tuple[int, ...], bias: int) -> list[int]:
    """Every partial sum of bias and products, in every order: the sums of all subsets."""
    terms = [bias, *(w * x for w, x in zip(weights, inputs, strict=True))]
    return [
        sum(subset)
        for size in range(len(terms) + 1)
        for subset in itertools.combinations(terms, size)
    ]


@profile(60)
@given(
    st.lists(st.lists(st.integers(-2, 1), min_size=3, max_size=3), min_size=1, max_size=2),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)
def test_no_partial_sum_exceeds_the_bound(
    channels: list[list[int]], zero: int, signed: bool, with_bias: bool
) -> None:
    # All inputs of a 2-bit activation, all orders of summation.
    probe = TensorQuantization(1.0, 0, 2, signed)
    activation = TensorQuantization(1.0, zero + probe.code_min, 2, signed)
    bias = [5, -7][: len(channels)] if with_bias else [0] * len(channels)
    codes = range(activation.code_min, activation.code_max + 1)
    centred = [code - activation.zero_point for code in codes]
    largest = max(
        abs(value)
        for weights, offset in zip(channels, bias, strict=True)
        for inputs in itertools.product(centred, repeat=3)
        for value in partial_sums(weights, inputs, offset)
    )
    bound = accumulator_bound(
        np.array(channels), 0, activation, np.array(bias) if with_bias else None
    )
    assert largest <= bound


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_bound_is_reached(bits: int, signed: bool, sign: int) -> None:
    generator = np.random.default_rng(bits)
    weights = sign * generator.integers(0, 8, (3, 5))  # 3 outputs, 5 terms
    probe = TensorQuantization(1.0, 0, bits, signed)
    for zero_point in (probe.code_min, 0, probe.code_max):
        activation = TensorQuantization(1.0, zero_point, bits, signed)
        extremes = [probe.code_min - zero_point, probe.code_max - zero_point]
        sums = [abs(int(w.sum()) * x) for w in weights for x in extremes]
        assert accumulator_bound(weights, 0, activation) == max(sums)
        assert accumulator_bound(weights.T, 1, activation) == max(sums)
        # A bias of the same sign adds to it.
        pushed = [
            abs(int(w.sum()) * x) + abs(b)
            for w, b in zip(weights, (9, 0, 4), strict=True)
            for x in extremes
        ]
        assert accumulator_bound(weights, 0, activation, np.array([9, 0, -4])) == max(pushed)


def test_32_bits_exactly_where_they_are_enough() -> None:
    activation = TensorQuantization(1.0, 0, 16, signed=False)
    # 65,535 * 32,768 = 2^31 - 32,768
    weights = np.full((1, 1), 32768)
    assert accumulator_bound(weights, 0, activation) == 2**31 - 32768
    for bias, bits in ((32767, 32), (32768, 64)):
        bound = accumulator_bound(weights, 0, activation, np.array([bias]))
        assert accumulator_bits(bound) == bits
    # Far beyond float64's whole numbers it neither wraps nor gets smaller.
    vast = accumulator_bound(np.full((1, 1 << 20), 2**15), 0, activation)
    assert vast == 2.0**35 * 65535
    assert accumulator_bits(vast) == 64


def test_bound_without_weights() -> None:
    activation = TensorQuantization(1.0, 0, 8, signed=True)
    assert accumulator_bound(np.zeros((0, 4)), 0, activation) == 0.0
    assert accumulator_bits(0.0) == 32
