"""Counting the codes that differ, against counts made with NumPy by the formulas of both sides."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from bitwright.errors import ModelError
from bitwright.quant.compare import RegionAgreement, compare_codes
from bitwright.quant.load import Model, load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.samples import Samples
from tests.quant.qdq import Array, Builder

# Found by trying: of all int16 codes, many give quotients on different sides of a tie.
X = TensorQuantization(float(np.float32(0.3)), 0, 16, signed=True)
Y = TensorQuantization(float(np.float32(0.07)), 5, 16, signed=True)
Z = TensorQuantization(float(np.float32(0.0053)), 0, 16, signed=True)
WEIGHT_SCALE = np.float32(0.0371)
CODES = np.arange(-32768, 32768).reshape(-1, 1)


def two_layers() -> Model:
    """Two products by one weight each: x times 3, and the result times 2."""
    builder = Builder()
    tensor = builder.activation(builder.input("x", ["N", 1]), X)
    for name, code, quantization in (("first", 3, Y), ("second", 2, Z)):
        weights = builder.weights(np.full((1, 1), code), WEIGHT_SCALE, bits=4)
        layer = builder.node("MatMul", tensor, weights, name=name)
        tensor = builder.activation(layer, quantization)
    return load(builder.model(tensor))


def saturate(codes: Array, q: TensorQuantization) -> Array:
    return np.clip(codes.astype(np.int64) + q.zero_point, q.code_min, q.code_max)


def in_float(codes: Array, weight: int, x: TensorQuantization, y: TensorQuantization) -> Array:
    """What QDQ says: dequantize both, multiply in float32, divide by the output's scale."""
    values = (codes - x.zero_point).astype(np.float32) * np.float32(x.scale)
    return saturate(np.rint(values * (np.float32(weight) * WEIGHT_SCALE) / np.float32(y.scale)), y)


def in_integers(codes: Array, weight: int, x: TensorQuantization, y: TensorQuantization) -> Array:
    """What QLinear says: multiply codes, then once by the quotient of the scales."""
    multiplier = np.float32(x.scale) * WEIGHT_SCALE / np.float32(y.scale)
    return saturate(np.rint(((codes - x.zero_point) * weight).astype(np.float32) * multiplier), y)


def run(batch_size: int = 16384) -> list[RegionAgreement]:
    feeds = {"x": CODES.astype(np.float32) * np.float32(X.scale)}
    model = two_layers()
    return compare_codes(model, Samples(feeds, model.inputs), batch_size=batch_size)


def test_counts_are_those_of_the_formulas() -> None:
    first, first_alone = in_float(CODES, 3, X, Y), in_integers(CODES, 3, X, Y)
    second, second_alone = in_float(first, 2, Y, Z), in_integers(first_alone, 2, Y, Z)
    same_input = in_integers(first, 2, Y, Z)
    border, one, two = run()
    assert (border.kind, border.differing, border.codes) == ("quantize", 0, 65536)
    assert (one.name, one.kind, one.operand_bits, one.accumulator_bits) == (
        "first",
        "layer",
        16,
        32,
    )
    assert (two.name, two.kind, two.operand_bits, two.accumulator_bits) == (
        "second",
        "layer",
        16,
        32,
    )
    differing = int(np.count_nonzero(first != first_alone))
    assert differing > 0
    assert (one.codes, one.differing, one.largest_difference) == (65536, differing, 1)
    assert one.differing_end_to_end == differing
    assert one.equal_share == 1 - differing / 65536
    assert np.count_nonzero(same_input != second) < np.count_nonzero(second_alone != second)
    assert two.differing == np.count_nonzero(same_input != second)
    assert two.differing_end_to_end == np.count_nonzero(second_alone != second)


def test_counts_do_not_depend_on_the_batch() -> None:
    assert run(batch_size=10_000) == run()


def test_the_largest_difference_is_that_of_all_batches() -> None:
    feeds = {
        "x": np.concatenate([CODES, np.zeros((9, 1))]).astype(np.float32) * np.float32(X.scale)
    }
    model = two_layers()
    _, one, _ = compare_codes(model, Samples(feeds, model.inputs), batch_size=65536)
    assert one.largest_difference == 1  # the second batch has none


def test_progress_counts_samples() -> None:
    seen = []
    feeds = {"x": CODES[:10].astype(np.float32)}
    model = two_layers()
    samples = Samples(feeds, model.inputs)
    compare_codes(
        model, samples, batch_size=4, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_the_fixed_form_is_compared_too() -> None:
    model = two_layers()
    samples = Samples({"x": CODES.astype(np.float32) * np.float32(X.scale)}, model.inputs)
    _, one, _ = compare_codes(model, samples, requantization="fixed", batch_size=65536)
    multiplier = float(np.float32(X.scale) * WEIGHT_SCALE / np.float32(Y.scale))
    exact = saturate(np.rint(CODES * 3 * multiplier), Y)  # float64 holds it exactly
    assert one.differing == np.count_nonzero(exact != in_float(CODES, 3, X, Y))


def test_nothing_to_compare() -> None:
    builder = Builder()
    output = builder.node("Relu", builder.input("x", [1]))
    model = load(builder.model(output))
    samples = Samples({"x": np.zeros((1,), np.float32)}, model.inputs)
    with pytest.raises(ModelError, match="no quantized activations"):
        compare_codes(model, samples)


def test_computed_scales_cannot_be_compared() -> None:
    builder = Builder()
    builder.input("x", ["N", 4])
    names = ["codes", "scale", "zero"]
    builder.nodes.append(onnx.helper.make_node("DynamicQuantizeLinear", ["x"], names, "dynamic"))
    again = builder.node("QuantizeLinear", "x", "scale", "zero")
    output = builder.node("DequantizeLinear", again, "scale", "zero", name="back")
    model = load(builder.model(output))
    samples = Samples({"x": np.ones((2, 4), np.float32)}, model.inputs)
    with pytest.raises(ModelError, match="scale or zero point of 'back'"):
        compare_codes(model, samples)


def test_regions_without_codes_agree() -> None:
    nothing = RegionAgreement("name", "layer", 8, 32, 0, 0, 0, 0)
    assert nothing.equal_share == 1.0
