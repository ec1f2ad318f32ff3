"""The integer reference against onnxruntime on equal codes, and against naive integer loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime import quantization

import bitwright
from bitwright.errors import RunError
from bitwright.evaluation import Comparison, Engine
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.reference import Operands, Reference
from bitwright.quant.requantization import Requantization, RequantizationForm
from bitwright.vocabulary import Precision
from tests.quant.cases import (
    FUNCTIONS,
    MOVES,
    Q8,
    X8,
    Case,
    Generator,
    averages,
    convolutions,
    draw_quantization,
    ints,
    powers_of_two,
    products,
    scalar,
    sums,
)
from tests.quant.qdq import (
    BITS,
    Array,
    Builder,
    Tally,
    code_type,
    profile,
    quantize,
    residual_network,
    run_onnxruntime,
)

# -- random cases ---------------------------------------------------------------------------------


def run_all(make: Callable[[Generator], Case], examples: int, kinds: set[str]) -> Tally:
    """Compare many cases; every region computes in one of ``kinds``."""
    tally = Tally()

    # A seed makes the whole case: searching for small cases would make many that are alike.
    @profile(examples)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        builder, output, feeds = make(np.random.default_rng(seed))
        regions = tally.add(builder, [output], feeds)
        assert {region.kind for region in regions.values()} - {"quantize"} <= kinds
        assert list(regions.values())[-1].kind in kinds

    check()
    return tally


def test_convolutions() -> None:
    run_all(convolutions, 300, {"layer"}).check(narrow=4_000, wide=8_000)


def test_matrix_products() -> None:
    run_all(products, 300, {"layer"}).check(narrow=4_000, wide=6_000)


def test_all_pairs_of_bits() -> None:
    tally = Tally()
    for (weight_bits, x_bits), seed in itertools.product(itertools.product(BITS, BITS), range(10)):
        generator = np.random.default_rng([weight_bits, x_bits, seed])
        builder, output, feeds = convolutions(generator, weight_bits, x_bits)
        regions = tally.add(builder, [output], feeds)
        (last,) = (region for region in regions.values() if region.kind == "layer")
        y_bits = list(builder.quantized.values())[-1][1].bits
        assert last.operand_bits == max(weight_bits, x_bits, y_bits)
        assert last.name == "layer"
    tally.check(narrow=3_000, wide=4_000)


def test_sums_and_products_of_activations() -> None:
    run_all(sums, 300, {"arithmetic"}).check(narrow=1_500, wide=2_500)


def test_averages() -> None:
    run_all(averages, 300, {"arithmetic"}).check(narrow=1_000, wide=1_000)


def test_powers_of_two_are_equal_in_every_code() -> None:
    tally = run_all(powers_of_two, 200, {"layer"})
    assert tally.differing == {False: 0, True: 0}
    assert min(tally.codes.values()) > 1_000


# -- elementwise functions ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bits", BITS)
def test_functions_are_exact_for_every_code(name: str, bits: int) -> None:
    generator = np.random.default_rng(len(name) + bits)
    tally = Tally()
    for y_bits, signed in itertools.product(BITS, (False, True)):
        # Values up to about 5, where these functions bend.
        x_q = draw_quantization(generator, bits, float(np.float32(10.0 / 2**bits)))
        y_q = TensorQuantization(
            float(np.float32(4.0 / 2**y_bits)), 1 if y_bits > 2 else 0, y_bits, signed
        )
        builder = Builder()
        codes = np.arange(x_q.code_min, x_q.code_max + 1)
        x = (codes - x_q.zero_point).astype(np.float32) * np.float32(x_q.scale)
        data = builder.activation(builder.input("x", [x.size // 4, 4]), x_q)
        output = builder.activation(FUNCTIONS[name].build(builder, data), y_q)
        feeds = {"x": x.reshape(-1, 4)}
        regions = tally.add(builder, [output], feeds)
        (last,) = list(regions.values())[1:]
        assert (last.kind, last.accumulator_bits) == ("table", 0)
        assert last.operand_bits == max(bits, y_bits)
        _, found = Reference(load(builder.model(output))).run(feeds)
        values = FUNCTIONS[name].formula(x.astype(np.float64))
        expected = np.clip(
            np.rint(values / np.float64(np.float32(y_q.scale))) + y_q.zero_point,
            y_q.code_min,
            y_q.code_max,
        )
        difference = np.abs(list(found.values())[-1].reshape(-1) - expected)
        assert difference.max() <= 1
        # Where float32 rounds across a tie; 16-bit codes of values near 5 lie close to it.
        assert np.count_nonzero(difference) <= max(1, difference.size // 200)
    assert tally.share(wide=False) == 1.0
    assert tally.share(wide=True) >= 0.999


def test_relu_on_codes_needs_no_table() -> None:
    q = TensorQuantization(0.1, 3, 8, signed=True)
    builder = Builder()
    data = builder.activation(builder.input("x", [256]), q)
    relu = builder.node("Relu", data)
    output = builder.activation(relu, q)
    x = (np.arange(-128, 128) - 3).astype(np.float32) * np.float32(0.1)
    _, codes = Reference(load(builder.model(output))).run({"x": x})
    np.testing.assert_array_equal(list(codes.values())[-1], np.maximum(np.arange(-128, 128), 3))


def test_one_table_for_each_quantization_of_its_input() -> None:
    # The scale is an input of the model: a table of the first run is wrong in the second.
    builder = Builder()
    builder.input("x", [4])
    builder.inputs.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, []))
    zero = builder.constant(np.int8(0))
    codes = builder.node("QuantizeLinear", "x", "s", zero)
    data = builder.node("DequantizeLinear", codes, "s", zero)
    q = TensorQuantization(1 / 64, 0, 8, signed=True)
    output = builder.activation(builder.node("Sigmoid", data), q)
    model = builder.model(output)
    reference = Reference(load(model))
    for scale in (0.01, 0.05):
        feeds = {
            "x": np.array([-1.0, 0.1, 0.5, 1.0], np.float32),
            "s": np.array(scale, np.float32),
        }
        (expected,) = run_onnxruntime(model, feeds)
        np.testing.assert_array_equal(reference.run(feeds)[0][output], expected)


def test_constants_that_change_the_shape_make_no_table() -> None:
    q = TensorQuantization(0.1, 0, 8, signed=True)
    builder = Builder()
    data = builder.activation(builder.input("x", [3]), q)
    raised = builder.node("Mul", data, builder.constant(np.full((1, 1), 2, np.float32)))
    output = builder.activation(raised, q)
    feeds = {"x": np.array([0.1, -0.2, 0.3], np.float32)}
    result = Reference(load(builder.model(output))).run(feeds)[0][output]
    assert result.shape == (1, 3)
    np.testing.assert_allclose(result, [[0.2, -0.4, 0.6]], rtol=1e-6)


# -- moves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOVES)
def test_moves_carry_codes(name: str) -> None:
    build, expected = MOVES[name]
    builder = Builder()
    data = builder.activation(builder.input("x", X8.shape), Q8)
    moved = build(builder, data)
    output = builder.activation(moved, Q8)
    # What follows computes in integers, so it got codes.
    factor = builder.weights(np.array([4]), np.float32(0.125), bits=8)
    product = builder.activation(
        builder.node("Mul", moved, factor), TensorQuantization(0.0625, 0, 16, signed=True)
    )
    reference = Reference(load(builder.model(output, product)))
    feeds = {"x": (X8 - 11).astype(np.float32) * np.float32(0.0625)}
    results, codes = reference.run(feeds)
    found, halved = list(codes.values())[1:]
    np.testing.assert_array_equal(found, expected(X8))
    np.testing.assert_array_equal(halved, np.rint((expected(X8) - 11) / 2))
    assert [region.kind for region in reference.regions.values()][-1] == "arithmetic"
    theirs = run_onnxruntime(builder.model(output, product), feeds)
    np.testing.assert_array_equal(results[output], theirs[0])


@pytest.mark.parametrize("move", ["MaxPool", "Transpose", "Reshape"])
def test_a_quantizer_behind_a_move_counts_as_in_front_of_it(move: str) -> None:
    generator = np.random.default_rng(5)
    x = generator.normal(0, 1, (2, 3, 6, 6)).astype(np.float32)
    weights = generator.integers(-128, 128, (4, 3, 3, 3))
    output = TensorQuantization(0.03, 1, 8, signed=True)
    codes = []
    for early in (True, False):
        builder = Builder()
        data = builder.activation(
            builder.input("x", x.shape), TensorQuantization(0.02, 0, 8, signed=True)
        )
        scale = np.linspace(0.001, 0.004, 4)
        stored = builder.weights(weights, scale, bits=8, axis=0)
        result = builder.node("Conv", data, stored)
        result = builder.activation(result, output) if early else result
        if move == "Reshape":
            result = builder.node(move, result, builder.constant(np.array([2, -1])))
        else:
            attributes: dict[str, Any] = {"perm": [2, 0, 3, 1]}
            if move == "MaxPool":
                attributes = {"kernel_shape": [2, 2]}
            result = builder.node(move, result, **attributes)
        builder.activation(result, output)
        model = load(builder.model(list(builder.quantized.values())[-1][0]))
        codes.append(list(Reference(model).run({"x": x})[1].values())[-1])
    assert np.array_equal(codes[0], codes[1])


def test_split_carries_codes() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", X8.shape), Q8)
    builder.nodes.append(
        onnx.helper.make_node("Split", [data, ints(builder, 1, 3)], ["a", "b"], "split", axis=1)
    )
    outputs = [builder.activation(name, Q8) for name in ("a", "b")]
    feeds = {"x": (X8 - 11).astype(np.float32) * np.float32(0.0625)}
    _, codes = Reference(load(builder.model(*outputs))).run(feeds)
    np.testing.assert_array_equal(list(codes.values())[1], X8[:, :1])
    np.testing.assert_array_equal(list(codes.values())[2], X8[:, 1:])


def test_concat_of_different_scales_is_requantized_as_onnxruntime_does() -> None:
    builder = Builder()
    wide = TensorQuantization(0.11, 0, 16, signed=True)
    first = builder.activation(builder.input("x", [6]), Q8)
    second = builder.activation(builder.input("y", [6]), wide)
    joined = builder.node("Concat", first, second, axis=0)
    output = builder.activation(joined, TensorQuantization(0.07, 100, 8, signed=False))
    generator = np.random.default_rng(0)
    feeds = {name: generator.normal(0, 3, 6).astype(np.float32) for name in "xy"}
    model = builder.model(output)
    results, _ = Reference(load(model)).run(feeds)
    np.testing.assert_array_equal(results[output], run_onnxruntime(model, feeds)[0])


def test_concat_of_a_constant_and_an_activation_is_no_constant() -> None:
    # The bound of a product of two activations comes from their types, not from one run's codes.
    builder = Builder()
    q = TensorQuantization(0.5, 0, 16, signed=False)
    stored = builder.weights(np.zeros((1, 4)), np.float32(0.5), bits=16, signed=False)
    computed = builder.activation(builder.input("x", [1, 4]), q)
    joined = builder.node("Concat", stored, computed, axis=0)
    other = builder.activation(builder.input("y", [3, 2]), q)
    product = builder.node("MatMul", other, joined)
    output = builder.activation(product, TensorQuantization(8.0, 0, 16, signed=False))
    reference = Reference(load(builder.model(output)))
    reference.run({"x": np.zeros((1, 4), np.float32), "y": np.zeros((3, 2), np.float32)})
    assert list(reference.regions.values())[-1].accumulator_bits == 64  # 2 * 65535^2


# -- float leftovers ------------------------------------------------------------------------------


def test_one_by_one_average_pools_that_skip_are_left_to_onnxruntime() -> None:
    # With SAME and a stride beyond the kernel the formula of ONNX gives negative padding.
    builder = Builder()
    data = builder.activation(builder.input("x", [1, 1, 3, 3]), Q8)
    pool = builder.node(
        "AveragePool", data, kernel_shape=[1, 1], strides=[3, 3], auto_pad="SAME_UPPER"
    )
    output = builder.activation(pool, Q8)
    feeds = {"x": np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3) * np.float32(0.5)}
    model = builder.model(output)
    results, _ = Reference(load(model)).run(feeds)
    np.testing.assert_array_equal(results[output], run_onnxruntime(model, feeds)[0])


def layer_after(builder: Builder, tensor: str, columns: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    q = TensorQuantization(0.02, 0, 8, signed=True)
    weights = builder.weights(
        generator.integers(-128, 128, (columns, columns)),
        generator.uniform(0.001, 0.01, columns).astype(np.float32),
        bits=8,
        axis=1,
    )
    return builder.node("MatMul", builder.activation(tensor, q), weights, name=f"layer{seed}")


@pytest.mark.parametrize("operator", ["LayerNormalization", "Softmax", "If", "Loop", "TopK"])
def test_float_operators_between_layers(operator: str) -> None:
    generator = np.random.default_rng(3)
    builder = Builder()
    first = layer_after(builder, builder.input("x", [5, 8]), 8, 1)
    if operator == "LayerNormalization":
        scale = builder.constant(generator.uniform(0.5, 2, 8).astype(np.float32))
        shift = builder.constant(generator.normal(size=8).astype(np.float32))
        between = builder.node("LayerNormalization", first, scale, shift)
    elif operator == "Softmax":
        between = builder.node("Softmax", first, axis=-1)
    elif operator == "TopK":
        builder.nodes.append(
            onnx.helper.make_node("TopK", [first, ints(builder, 8)], ["between", "indices"], "topk")
        )
        between = "between"
    elif operator == "If":
        between = add_if(builder, first)
    else:
        between = add_loop(builder, first)
    output = layer_after(builder, between, 8, 2)
    feeds = {"x": generator.normal(0, 1, (5, 8)).astype(np.float32)}
    model = builder.model(output, between, shape=[5, 8])
    results, codes = Reference(load(model)).run(feeds)
    expected = dict(zip([output, between], run_onnxruntime(model, feeds), strict=True))
    np.testing.assert_allclose(results[between], expected[between], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results[output], expected[output], rtol=1e-5, atol=1e-6)
    assert len(codes) == 2


def add_if(builder: Builder, tensor: str) -> str:
    """``tensor`` plus 1 where its sum is positive, else twice ``tensor``; bodies capture it."""
    one, two = scalar(builder, 1.0), scalar(builder, 2.0)
    total = builder.node("ReduceSum", tensor, keepdims=0)
    positive = builder.node("Greater", total, scalar(builder, 0.0))

    def body(operator: str, factor: str) -> onnx.GraphProto:
        node = onnx.helper.make_node(operator, [tensor, factor], [f"{operator}_inner"], operator)
        value = onnx.helper.make_tensor_value_info(
            f"{operator}_inner", onnx.TensorProto.FLOAT, [5, 8]
        )
        return onnx.helper.make_graph([node], operator, [], [value])

    return builder.node("If", positive, then_branch=body("Add", one), else_branch=body("Mul", two))


def add_loop(builder: Builder, tensor: str) -> str:
    """Three times ``state = tanh(state + tensor)``; the body captures ``tensor``."""
    info = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["going_in"], ["going_out"], "going"),
            onnx.helper.make_node("Add", ["state_in", tensor], ["added"], "added"),
            onnx.helper.make_node("Tanh", ["added"], ["state_out"], "state"),
        ],
        "body",
        [
            info("count", onnx.TensorProto.INT64, []),
            info("going_in", onnx.TensorProto.BOOL, []),
            info("state_in", onnx.TensorProto.FLOAT, [5, 8]),
        ],
        [
            info("going_out", onnx.TensorProto.BOOL, []),
            info("state_out", onnx.TensorProto.FLOAT, [5, 8]),
        ],
    )
    trips = builder.constant(np.array(3, np.int64))
    start = builder.node("Softmax", tensor, axis=0)
    return builder.node("Loop", trips, "", start, body=body)


def test_errors_name_the_node() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", [4]), Q8)
    output = builder.node("Reshape", data, ints(builder, 3), name="impossible")
    model = builder.model(output, shape=[None])
    with pytest.raises(RunError, match="Reshape 'impossible'"):
        Reference(load(model)).run({"x": np.zeros(4, np.float32)})


# -- accumulators, against loops over Python integers ---------------------------------------------


@pytest.fixture
def accumulators(monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """What the reference requantizes, in order."""
    seen: list[Array] = []
    original = Requantization.apply

    def apply(self: Requantization, accumulator: Array, form: Any = "float") -> Array:
        seen.append(accumulator)
        return original(self, accumulator, form)

    monkeypatch.setattr(Requantization, "apply", apply)
    return seen


def naive_convolution(x: Any, w: Any, node: onnx.NodeProto) -> dict[tuple[int, ...], int]:
    """Convolution as the ONNX standard defines it, over nested lists of Python integers."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    size, kernel = x.shape[2:], w.shape[2:]
    rank = len(size)
    strides, dilations = attributes["strides"], attributes["dilations"]
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    begin = attributes.get("pads", [0] * 2 * rank)[:rank]
    end = attributes.get("pads", [0] * 2 * rank)[rank:]
    if auto.startswith("SAME"):
        output = [-(-n // s) for n, s in zip(size, strides, strict=True)]
        total = [
            max(0, (o - 1) * s + e - n)
            for o, s, e, n in zip(output, strides, extent, size, strict=True)
        ]
        begin = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]
    else:
        output = [
            (n + b + f - e) // s + 1
            for n, b, f, e, s in zip(size, begin, end, extent, strides, strict=True)
        ]
    per_group = w.shape[0] // attributes["group"]
    sums = {}
    for n, m, *place in np.ndindex(x.shape[0], w.shape[0], *output):
        first = m // per_group * w.shape[1]
        total_sum = 0
        for c, *tap in np.ndindex(*w.shape[1:]):
            at = [
                p * s - b + t * d
                for p, s, b, t, d in zip(place, strides, begin, tap, dilations, strict=True)
            ]
            if all(0 <= i < extent_ for i, extent_ in zip(at, size, strict=True)):
                total_sum += int(x[(n, first + c, *at)]) * int(w[(m, c, *tap)])
        sums[n, m, *place] = total_sum
    return sums


def stored(builder: Builder, tensor: str) -> tuple[Array, Array, Array]:
    """Codes, scale and zero point of a stored tensor, by its dequantized name."""
    (node,) = (node for node in builder.nodes if tensor in node.output)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in builder.initializers}
    codes, scale, zero = (arrays[name] for name in node.input)
    return codes.astype(np.int64), scale, zero.astype(np.int64)


def test_convolutions_add_up_as_loops_do(accumulators: list[Array]) -> None:
    compared = 0
    for seed in range(150):
        builder, output, feeds = convolutions(np.random.default_rng([7, seed]))
        (layer,) = (node for node in builder.nodes if node.op_type == "Conv")
        x_q = next(iter(builder.quantized.values()))[1]
        w, _, zero = stored(builder, layer.input[1])
        if w.size * feeds["x"].size > 20_000 or len(layer.input) > 2:
            continue
        accumulators.clear()
        reference = Reference(load(builder.model(output)))
        reference.run(feeds)
        centred = w - zero.reshape((-1, *(1,) * (w.ndim - 1)) if zero.ndim else ())
        sums = naive_convolution(quantize(feeds["x"], x_q) - x_q.zero_point, centred, layer)
        (found,) = accumulators
        assert found.shape == tuple(np.max(list(sums), axis=0) + 1)
        for index, value in sums.items():
            assert int(found[index]) == value
        largest = max(x_q.code_max - x_q.zero_point, x_q.zero_point - x_q.code_min)
        bound = max(sum(abs(int(v)) for v in row.reshape(-1)) for row in centred) * largest
        (region,) = (r for r in reference.regions.values() if r.kind == "layer")
        assert region.accumulator_bits == (32 if bound < 2**31 else 64)
        compared += 1
    assert compared > 30


def test_products_add_up_as_loops_do(accumulators: list[Array]) -> None:
    compared = 0
    for seed in range(120):
        builder, output, feeds = products(np.random.default_rng([8, seed]))
        (layer,) = (node for node in builder.nodes if node.name == "layer")
        if any(node.name == "bias" for node in builder.nodes) or len(layer.input) > 2:
            continue
        accumulators.clear()
        Reference(load(builder.model(output))).run(feeds)
        sides = []
        for name in layer.input[:2]:
            if name in [data for data, _ in builder.quantized.values()]:
                x_q = next(iter(builder.quantized.values()))[1]
                sides.append(quantize(feeds["x"], x_q) - x_q.zero_point)
            else:
                codes, _, zero = stored(builder, name)
                axis = [a.i for n in builder.nodes if name in n.output for a in n.attribute]
                shape = [-1 if i in axis else 1 for i in range(codes.ndim)] if zero.ndim else ()
                sides.append(codes - zero.reshape(shape))
        for index, attribute in enumerate(layer.attribute):
            sides[index] = sides[index].T if attribute.i else sides[index]
        # Python integers, and the definition of matmul by einsum over the last axes.
        left, right = (side.astype(object) for side in sides)
        (found,) = accumulators
        np.testing.assert_array_equal(found, naive_product(left, right))
        compared += 1
    assert compared > 30


def naive_product(left: Array, right: Array) -> Array:
    """Matrix product by loops, as numpy.matmul defines it for vectors and stacks."""
    a = left[None] if left.ndim == 1 else left
    b = right[:, None] if right.ndim == 1 else right
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = np.broadcast_to(a, (*stack, *a.shape[-2:])), np.broadcast_to(b, (*stack, *b.shape[-2:]))
    result = np.zeros((*stack, a.shape[-2], b.shape[-1]), object)
    for *n, i, j in np.ndindex(*result.shape):
        terms = [a[(*n, i, k)] * b[(*n, k, j)] for k in range(a.shape[-1])]
        result[(*n, i, j)] = sum(terms)
    if left.ndim == 1:
        result = result[..., 0, :]
    return result[..., 0] if right.ndim == 1 else result


@pytest.mark.parametrize("kind", ["right", "left", "conv"])
def test_sums_beyond_float64_are_exact(kind: str, accumulators: list[Array]) -> None:
    # 300 products of 16 and 31 bits do not fit the 53 bits of a float64.
    generator = np.random.default_rng(5)
    w = generator.integers(2**30, 2**31 - 1, (300, 2)) * np.array([1, -1])
    x = generator.integers(2**15, 2**16, (3, 300))
    expected = x.astype(object) @ w.astype(object)
    if kind == "left":
        w, x, expected = w.T, x.T, expected.T
    elif kind == "conv":
        w, x, expected = w.T[:, None], x[:, None], expected[..., None]
    q = TensorQuantization(1.0, 0, 16, signed=False)
    builder = Builder()
    data = builder.activation(builder.input("x", x.shape), q)
    operands = [data, builder.weights(w, np.float32(1.0), bits=32)]
    if kind == "left":
        operands.reverse()
    layer = builder.node("Conv" if kind == "conv" else "MatMul", *operands)
    output = builder.activation(layer, TensorQuantization(2.0**40, 0, 16, signed=True))
    reference = Reference(load(builder.model(output)), "fixed")
    _, codes = reference.run({"x": x.astype(np.float32)})
    np.testing.assert_array_equal(accumulators[0], expected)
    assert list(reference.regions.values())[-1].accumulator_bits == 64
    rounded = [round(Fraction(int(value), 2**40)) for value in expected.reshape(-1)]
    assert list(codes.values())[-1].reshape(-1).tolist() == rounded


def test_sums_of_8_bit_codes_take_32_bits() -> None:
    q = TensorQuantization(0.7, 0, 8, signed=False)
    builder = Builder()
    operands = [builder.activation(builder.input(name, [1]), q) for name in "ab"]
    output = builder.activation(
        builder.node("Add", *operands), TensorQuantization(1.4, 0, 8, signed=False)
    )
    reference = Reference(load(builder.model(output)))
    largest = np.array([255 * 0.7], np.float32)
    _, codes = reference.run({"a": largest, "b": largest})
    assert list(codes.values())[-1].tolist() == [255]
    assert list(reference.regions.values())[-1].accumulator_bits == 32


def test_sums_of_scales_far_apart_keep_the_small_operand() -> None:
    """A multiplier of few bits would be off by 0.05 %: two codes here."""
    tally = Tally()
    builder, output, feeds = sums(np.random.default_rng(440))
    tally.add(builder, [output], feeds)
    assert tally.differing == {False: 0, True: 0}


def test_order_of_summation_does_not_matter() -> None:
    # A float sum of these depends on it: the terms differ by up to 2^30.
    generator = np.random.default_rng(6)
    q = TensorQuantization(0.003, 0, 16, signed=True)
    x = generator.integers(-(2**15), 2**15, (4, 200))
    w = generator.integers(-(2**15), 2**15, (200, 5))
    results = []
    for order in (np.arange(200), generator.permutation(200), np.argsort(w[:, 0])):
        builder = Builder()
        data = builder.activation(builder.input("x", x.shape), q)
        weights = builder.weights(w[order], np.float32(0.01), bits=16)
        layer = builder.node("MatMul", data, weights)
        output = builder.activation(layer, TensorQuantization(20.0, 0, 16, signed=True))
        feeds = {"x": x[:, order].astype(np.float32) * np.float32(0.003)}
        results.append(list(Reference(load(builder.model(output))).run(feeds)[1].values())[-1])
    assert len(np.unique(results[0])) > 15
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


# -- where QDQ in float32 is the less exact side -------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
def test_ties_go_to_even_where_scales_make_them_frequent(bits: int) -> None:
    # Averages of four codes at unchanged scale: float32 noise decides what QDQ makes of a tie.
    q = TensorQuantization(float(np.float32(0.0371)), 0, bits, signed=False)
    builder = Builder()
    data = builder.activation(builder.input("x", [1, 1, 64, 64]), q)
    pool = builder.node("AveragePool", data, kernel_shape=[2, 2], strides=[2, 2])
    output = builder.activation(pool, q)
    x = np.random.default_rng(9).integers(0, 2**bits, (1, 1, 64, 64))
    feeds = {"x": x.astype(np.float32) * np.float32(q.scale)}
    model = builder.model(output)
    results, codes = Reference(load(model)).run(feeds)
    sums = x.reshape(32, 2, 32, 2).sum(axis=(1, 3))
    assert np.mean(sums % 4 == 2) > 0.2
    expected = [round(Fraction(int(total), 4)) for total in sums.reshape(-1)]
    assert list(codes.values())[-1].reshape(-1).tolist() == expected
    steps = (results[output] - run_onnxruntime(model, feeds)[0]) / q.scale
    assert np.abs(steps).max() < 1.5


def test_where_large_products_cancel_the_integers_are_exact() -> None:
    # w * x - w * (x - 0 or 1): the sum is below 2^18, its terms are near 2^30.
    generator = np.random.default_rng(10)
    x_q = TensorQuantization(float(np.float32(0.0123)), 0, 16, signed=True)
    half = generator.integers(2**14, 2**15, (64, 8))
    x = np.concatenate([half, half - generator.integers(0, 2, half.shape)], axis=1)
    w = generator.integers(2**14, 2**15, (8, 3))
    w = np.concatenate([w, -w])
    scale = np.float32(0.0456)
    y_q = TensorQuantization(float(np.float32(x_q.scale) * scale * np.float32(8)), 0, 16, True)
    builder = Builder()
    data = builder.activation(builder.input("x", [64, 16]), x_q)
    layer = builder.node("MatMul", data, builder.weights(w, scale, bits=16))
    output = builder.activation(layer, y_q)
    feeds = {"x": x.astype(np.float32) * np.float32(x_q.scale)}
    model = builder.model(output)
    _, codes = Reference(load(model)).run(feeds)
    exact = [round(Fraction(int(total), 8)) for total in (x @ w).reshape(-1)]
    assert max(exact) < 2**15
    assert list(codes.values())[-1].reshape(-1).tolist() == exact
    theirs = np.rint(run_onnxruntime(model, feeds)[0].astype(np.float64) / y_q.scale)
    assert np.abs(theirs.reshape(-1) - exact).max() > 1


# -- what other tools write -----------------------------------------------------------------------


def one_layer(builder: Builder, layer: str, x: Array, q: TensorQuantization) -> tuple[Any, Any]:
    """Run a layer behind an 8-bit quantizer in both; return its region and the largest error."""
    output = builder.activation(layer, TensorQuantization(0.5, 0, 8, signed=True))
    feeds = {"x": (x - q.zero_point).astype(np.float32) * np.float32(q.scale)}
    model = builder.model(output)
    reference = Reference(load(model))
    results, _ = reference.run(feeds)
    (expected,) = run_onnxruntime(model, feeds)
    assert np.ptp(expected) > 10.0
    np.testing.assert_allclose(results[output], expected, atol=0.5 + 1e-6)
    assert np.mean(results[output] == expected) >= 0.99
    return list(reference.regions.values())[-1], results[output]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_scales_along_the_wrong_axis_are_not_taken_for_channels(axis: int, transposed: int) -> None:
    # A square matrix: its shape does not tell rows from columns.
    generator = np.random.default_rng(1)
    q = TensorQuantization(0.05, 3, 8, signed=False)
    builder = Builder()
    data = builder.activation(builder.input("x", [6, 16]), q)
    weights = builder.weights(
        generator.integers(-128, 128, (16, 16)),
        generator.uniform(0.01, 0.1, 16).astype(np.float32),
        bits=8,
        axis=axis,
    )
    layer = builder.node("Gemm", data, weights, transB=transposed)
    region, _ = one_layer(builder, layer, generator.integers(0, 256, (6, 16)), q)
    assert region.kind == ("layer" if axis == 1 - transposed else "quantize")


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_with_weights_on_the_left(trans_a: int, trans_b: int) -> None:
    generator = np.random.default_rng(2)
    q = TensorQuantization(0.05, 0, 8, signed=True)
    builder = Builder()
    shape = (7, 4) if trans_b else (4, 7)
    data = builder.activation(builder.input("x", shape), q)
    weights = builder.weights(
        generator.integers(-128, 128, (4, 9) if trans_a else (9, 4)),
        generator.uniform(0.01, 0.1, 9).astype(np.float32),
        bits=8,
        axis=1 if trans_a else 0,
    )
    layer = builder.node("Gemm", weights, data, transA=trans_a, transB=trans_b)
    region, result = one_layer(builder, layer, generator.integers(-128, 128, shape), q)
    assert (region.kind, region.accumulator_bits) == ("layer", 32)
    assert result.shape == (9, 7)


@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Conv"])
def test_both_operands_computed(operator: str) -> None:
    generator = np.random.default_rng(3)
    q = TensorQuantization(0.05, 0, 16, signed=True)
    shapes = {
        "MatMul": ((2, 3, 5), (5, 4)),
        "Gemm": ((5, 3), (4, 5)),
        "Conv": ((6, 2, 1), (3, 2, 1)),
    }
    attributes: dict[str, Any] = {"transA": 1, "transB": 1} if operator == "Gemm" else {}
    builder = Builder()
    names = [builder.input(f"x{i}", shape) for i, shape in enumerate(shapes[operator])]
    operands = [builder.activation(name, q) for name in names]
    layer = builder.node(operator, *operands, **attributes)
    output = builder.activation(layer, TensorQuantization(0.01, 0, 16, signed=True))
    feeds = {
        name: generator.normal(0, 3, shape).astype(np.float32)
        for name, shape in zip(names, shapes[operator], strict=True)
    }
    model = builder.model(output)
    reference = Reference(load(model))
    results, _ = reference.run(feeds)
    (expected,) = run_onnxruntime(model, feeds)
    np.testing.assert_allclose(results[output], expected, atol=0.01 + 1e-6)
    region = list(reference.regions.values())[-1]
    assert (region.kind, region.accumulator_bits) == ("layer", 64)  # 2 or more times 2^30


def test_narrow_products_of_activations_take_32_bits_up_to_the_bound() -> None:
    # 8-bit codes reach 128 * 128 = 2^14, so 2^17 terms reach 2^31.
    for terms, bits in ((2**17 - 1, 32), (2**17, 64)):
        builder = Builder()
        q = TensorQuantization(1.0, 0, 8, signed=True)
        a = builder.activation(builder.input("a", [1, terms]), q)
        b = builder.activation(builder.input("b", [terms, 1]), q)
        output = builder.activation(
            builder.node("MatMul", a, b), TensorQuantization(2.0**24, 0, 8, signed=True)
        )
        reference = Reference(load(builder.model(output)))
        ones = {"a": np.full((1, terms), -128.0), "b": np.full((terms, 1), -128.0)}
        _, codes = reference.run({k: v.astype(np.float32) for k, v in ones.items()})
        assert list(reference.regions.values())[-1].accumulator_bits == bits
        assert list(codes.values())[-1].item() == 127  # 2^31 / 2^24 = 128


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "Add"])
def test_float_biases_do_not_round_to_whole_steps(kind: str) -> None:
    # Steps of the accumulator as coarse as codes of the output: half a step would show.
    generator = np.random.default_rng(4)
    q = TensorQuantization(1.0, 0, 4, signed=True)
    builder = Builder()
    shape = [50, 3, 1] if kind == "Conv" else [50, 3]
    x = generator.integers(-8, 8, shape)
    data = builder.activation(builder.input("x", shape), q)
    codes = generator.integers(-2, 2, (8, 3))
    bias = builder.constant(generator.normal(0, 3, 8).astype(np.float32))
    scale = np.float32(1.0)
    if kind == "Conv":
        weights = builder.weights(codes[..., None], scale, bits=2)
        layer = builder.node("Conv", data, weights, bias)
    elif kind == "Gemm":
        layer = builder.node("Gemm", data, builder.weights(codes, scale, bits=2), bias, transB=1)
    else:
        layer = builder.node("MatMul", data, builder.weights(codes.T, scale, bits=2))
        layer = builder.node("Add", bias, layer)
    tally = Tally()
    output = builder.activation(layer, TensorQuantization(0.002, 0, 16, signed=True))
    regions = tally.add(builder, [output], {"x": x.astype(np.float32)})
    assert tally.codes[True] == x.shape[0] * 8
    assert tally.differing[True] == 0
    assert list(regions.values())[-1].accumulator_bits == 32


def test_one_channel_that_is_nearly_dead_does_not_make_the_others_coarse() -> None:
    # In steps of its tiny scale its bias exceeds 32 bits, so the whole bias is float.
    generator = np.random.default_rng(40)
    q = TensorQuantization(1.0, 0, 4, signed=True)
    builder = Builder()
    x = generator.integers(-8, 8, (50, 3))
    data = builder.activation(builder.input("x", [50, 3]), q)
    scale = np.array([1.0, 1e-12, 0.3, 2.0], np.float32)
    weights = builder.weights(generator.integers(-8, 8, (3, 4)), scale, bits=4, axis=1)
    bias = builder.constant(np.array([0.37, 1.23, -5.1, 2.72], np.float32))
    layer = builder.node("Gemm", data, weights, bias)
    tally = Tally()
    output = builder.activation(layer, TensorQuantization(0.01, 0, 16, signed=True))
    regions = tally.add(builder, [output], {"x": x.astype(np.float32)})
    assert (tally.codes[True], tally.differing[True]) == (200, 0)
    assert list(regions.values())[-1].accumulator_bits == 64


def test_an_addition_behind_a_relu_is_no_bias() -> None:
    generator = np.random.default_rng(41)
    q = TensorQuantization(0.05, 0, 8, signed=True)
    builder = Builder()
    data = builder.activation(builder.input("x", [30, 4]), q)
    weights = builder.weights(generator.integers(-128, 128, (4, 6)), np.float32(0.1), bits=8)
    relu = builder.node("Relu", builder.node("MatMul", data, weights))
    shift = builder.constant(np.array([-3, -20, 5, 0, 1, 9], np.float32))
    shifted = builder.node("Add", relu, shift)
    region, _ = one_layer(builder, shifted, generator.integers(-128, 128, (30, 4)), q)
    assert region.kind == "quantize"


@pytest.mark.parametrize("factor", [1.0, 0.37, 64.0])
def test_stored_biases_may_have_a_scale_of_their_own(factor: float) -> None:
    generator = np.random.default_rng(42)
    q = TensorQuantization(0.05, 0, 8, signed=True)
    builder = Builder()
    data = builder.activation(builder.input("x", [30, 4, 1]), q)
    scale = generator.uniform(0.05, 0.1, 6).astype(np.float32)
    weights = builder.weights(generator.integers(-128, 128, (6, 4, 1)), scale, bits=8, axis=0)
    own = (np.float32(0.05) * scale * np.float32(factor)).astype(np.float32)
    bias = builder.weights(generator.integers(-3000, 3000, 6), own, bits=32, axis=0)
    layer = builder.node("Conv", data, weights, bias)
    region, _ = one_layer(builder, layer, generator.integers(-128, 128, (30, 4, 1)), q)
    assert (region.kind, region.accumulator_bits) == ("layer", 32)


def test_computed_biases_stay_float() -> None:
    generator = np.random.default_rng(5)
    q = TensorQuantization(0.05, 0, 8, signed=True)
    builder = Builder()
    data = builder.activation(builder.input("x", [4, 3]), q)
    weights = builder.weights(generator.integers(-128, 128, (3, 6)), np.float32(0.1), bits=8)
    bias = builder.node("ReduceMax", builder.node("Exp", "x"), ints(builder, 1))
    layer = builder.node("Gemm", data, weights, bias)
    region, _ = one_layer(builder, layer, generator.integers(-128, 128, (4, 3)), q)
    assert region.kind == "quantize"


def test_weights_left_in_float_before_their_quantizer() -> None:
    generator = np.random.default_rng(6)
    q = TensorQuantization(0.05, 0, 8, signed=True)
    builder = Builder()
    data = builder.activation(builder.input("x", [4, 3, 5]), q)
    scale = builder.constant(generator.uniform(0.01, 0.05, 6).astype(np.float32))
    zero = builder.constant(np.zeros(6, np.int8))
    floats = builder.constant(generator.normal(size=(6, 3, 2)).astype(np.float32))
    codes = builder.node("QuantizeLinear", floats, scale, zero, axis=0)
    weights = builder.node("DequantizeLinear", codes, scale, zero, axis=0)
    layer = builder.node("Conv", data, weights)
    region, _ = one_layer(builder, layer, generator.integers(-128, 128, (4, 3, 5)), q)
    assert (region.kind, region.accumulator_bits) == ("layer", 32)


def test_weights_quantized_in_blocks_stay_float() -> None:
    generator = np.random.default_rng(7)
    q = TensorQuantization(0.05, 0, 8, signed=True)
    builder = Builder()
    data = builder.activation(builder.input("x", [5, 16]), q)
    codes = builder.constant(generator.integers(-8, 8, (16, 6)).astype(code_type(4, signed=True)))
    scale = builder.constant(generator.uniform(0.05, 0.3, (4, 6)).astype(np.float32))
    zero = builder.constant(generator.integers(-3, 3, (4, 6)).astype(code_type(4, signed=True)))
    weights = builder.node("DequantizeLinear", codes, scale, zero, axis=0, block_size=4)
    layer = builder.node("MatMul", data, weights)
    region, _ = one_layer(builder, layer, generator.integers(-128, 128, (5, 16)), q)
    assert region.kind == "quantize"


def test_codes_may_leave_the_model() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", [4]), Q8)
    codes = builder.node(
        "QuantizeLinear",
        builder.node("Relu", data),
        builder.constant(np.float32(0.25)),
        builder.constant(np.uint8(7)),
    )
    model = builder.model(codes)
    feeds = {"x": np.array([-1.0, 0.3, 0.5, 9.0], np.float32)}
    results, _ = Reference(load(model)).run(feeds)
    (expected,) = run_onnxruntime(model, feeds)
    assert results[codes].dtype == np.uint8
    np.testing.assert_array_equal(results[codes], expected)


def test_vectors_make_one_code_without_axes() -> None:
    builder = Builder()
    q = TensorQuantization(1.0, 0, 8, signed=True)
    a, b = (builder.activation(builder.input(name, [3]), q) for name in "ab")
    first = builder.activation(builder.node("MatMul", a, b), q)
    output = builder.activation(builder.node("Mul", first, first), q)
    feeds = {name: np.array([1.0, 2.0, 3.0], np.float32) for name in "ab"}
    results, codes = Reference(load(builder.model(output))).run(feeds)
    assert results[output].shape == ()
    assert [array.tolist() for array in codes.values()] == [[1, 2, 3], [1, 2, 3], 14, 127]


# -- whole models ---------------------------------------------------------------------------------

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"


@pytest.fixture(scope="module")
def digits() -> dict[str, Array]:
    with np.load(LENET / "test.npz", allow_pickle=False) as archive:
        return dict(archive)


def agree(comparison: Comparison) -> None:
    """Assert what the project promises of whole models, layer by layer on equal input codes."""
    for region in comparison.regions:
        assert region.largest_difference <= 1, region
        assert region.equal_share >= (0.999 if region.operand_bits <= 8 else 0.995), region


@pytest.mark.parametrize("requantization", ["float", "fixed"])
def test_lenet_at_all_pairs_of_bits(
    tmp_path: Path, digits: dict[str, Array], requantization: RequantizationForm
) -> None:
    counts = {False: [0, 0], True: [0, 0]}
    # The fixed form computes 16-bit layers in Python integers, which takes its time.
    pairs = itertools.product(BITS, BITS) if requantization == "float" else [(8, 8), (2, 16)]
    for weight_bits, activation_bits in pairs:
        path = tmp_path / "quantized.onnx"
        bitwright.quantize(
            LENET / "lenet.onnx",
            calibration=LENET / "calibration.npz",
            precision=f"w{weight_bits}a{activation_bits}",
            output=path,
            overwrite=True,
        )
        images = {"image": digits["image"][:32]}
        comparison = bitwright.compare(path, images, requantization=requantization)
        agree(comparison)
        layers = [region for region in comparison.regions if region.kind == "layer"]
        assert [region.name for region in layers] == ["conv1", "conv2", "fc1", "fc2"]
        for region in layers:
            assert region.operand_bits == max(weight_bits, activation_bits)
            count = counts[region.operand_bits > 8]
            count[0] += region.codes
            count[1] += region.differing_end_to_end
    # Where each side goes on with its own codes, few more differ.
    assert counts[False][1] <= 0.001 * counts[False][0]
    assert counts[True][1] <= 0.005 * counts[True][0]


@pytest.mark.parametrize("precision", ["w8a8", "w4a4", "w2a8", "w16a16"])
def test_lenet_is_as_accurate_in_both_engines(
    tmp_path: Path, digits: dict[str, Array], precision: str
) -> None:
    path = tmp_path / "quantized.onnx"
    bitwright.quantize(
        LENET / "lenet.onnx",
        calibration=LENET / "calibration.npz",
        precision=precision,
        output=path,
    )
    assert len(digits["labels"]) == 2_000
    engines: list[Engine] = ["onnxruntime", "reference"]
    values = [
        bitwright.evaluate(path, digits, engine=engine, batch_size=100).value for engine in engines
    ]
    assert abs(values[0] - values[1]) <= 0.001 + 1e-9
    assert min(values) > 0.97


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "network.onnx"
    onnx.save(residual_network(np.random.default_rng(1)).model("fc_out"), path)
    return path


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("activation", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("name", ["lenet", "residual"])
def test_models_quantized_by_onnxruntime(
    tmp_path: Path,
    digits: dict[str, Array],
    network: Path,
    name: str,
    activation: str,
    per_channel: bool,
) -> None:
    generator = np.random.default_rng(2)
    if name == "lenet":
        source, data = LENET / "lenet.onnx", {"image": digits["image"][:48].astype(np.float32)}
    else:
        x = generator.normal(0, 1, (48, 3, 16, 16)).astype(np.float32)
        source, data = network, {"x": x}

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter([data])

        def get_next(self) -> dict[str, Array] | None:
            return next(self._batches, None)

    path = tmp_path / "quantized.onnx"
    quantization.quantize_static(
        source,
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=quantization.QuantType[activation],
        weight_type=quantization.QuantType.QInt8,
    )
    comparison = bitwright.compare(path, data)
    agree(comparison)
    kinds = {region.name: region.kind for region in comparison.regions}
    layers = [node.name for node in onnx.load(path).graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) >= 5
    assert {kinds[layer] for layer in layers} == {"layer"}
    if name == "residual":
        assert (kinds["excite"], kinds["residual"], kinds["squeeze"]) == ("arithmetic",) * 3
        assert "table" in kinds.values()
    assert comparison.equal_share_end_to_end >= 0.995


def test_captured_values_may_have_any_name() -> None:
    # Single operators run under names of their own, which those of the model must not meet.
    builder = Builder()
    data = builder.activation(builder.input("input_0", [4]), Q8)
    total = builder.node("ReduceSum", data, keepdims=0)
    positive = builder.node("Greater", total, scalar(builder, 0.0))
    branches = {}
    for name, operator, result in (("then", "Neg", "then_out"), ("else", "Abs", "output_0")):
        value = onnx.helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, [4])
        node = onnx.helper.make_node(operator, ["input_0"], [result], operator)
        branches[f"{name}_branch"] = onnx.helper.make_graph([node], name, [], [value])
    output = builder.node("If", positive, **branches)
    model = builder.model(output)
    for sign in (1, -1):
        feeds = {"input_0": sign * np.array([1.0, 2.0, -0.5, 4.0], np.float32)}
        results, _ = Reference(load(model)).run(feeds)
        np.testing.assert_array_equal(results[output], run_onnxruntime(model, feeds)[0])


@pytest.mark.parametrize("precision", ["w8a4", "w4a4se4", "w8a8se6", "w8a8se8", "w8a8se"])
def test_operands_are_as_wide_as_they_are_stored(precision: str, tmp_path: Path) -> None:
    build = Builder()
    x = build.input("x", ["n", 6])
    random = np.random.default_rng(0)
    weights = build.constant(random.normal(size=(6, 3)).astype(np.float32))
    path = tmp_path / "net.onnx"
    onnx.save(build.model(build.node("MatMul", x, weights, name="layer")), path)
    data = {"x": random.standard_t(3, (40, 6)).astype(np.float32)}
    quantized = bitwright.quantize(path, calibration=data, precision=precision)
    seen: list[Operands] = []
    Reference(load(quantized.model), observe=seen.append).run(data)
    operand = seen[0].data
    assert operand.bits == Precision.parse(precision).activation.stored_bits
    low = -(1 << operand.bits - 1) if operand.signed else 0
    assert low <= operand.codes.min()
    assert operand.codes.max() < low + (1 << operand.bits)
