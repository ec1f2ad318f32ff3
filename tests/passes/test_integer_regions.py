"""What is compiled equals the integer reference, code by code and bit by bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import bitwright
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.reference import Reference
from bitwright.targets.kernels.host import AVX2, detect
from tests.passes.graphs import draw_graph
from tests.passes.regions import check, check_cases, compiled, execute, with_codes
from tests.quant.cases import (
    FUNCTIONS,
    MOVES,
    Q8,
    X8,
    Case,
    Generator,
    averages,
    convolutions,
    draw_codes,
    draw_quantization,
    output_like,
    powers_of_two,
    products,
    sums,
    whole,
)
from tests.quant.qdq import BITS, Array, Builder, profile, residual_network

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
ISAS = ["avx2", "generic"] if detect() == AVX2 else ["generic"]
KINDS: dict[str, Callable[[Generator], Case]] = {
    "convolutions": convolutions,
    "products": products,
    "sums": sums,
    "averages": averages,
    "powers of two": powers_of_two,
}


def assert_equal(make: Callable[[Generator], Case], seed: int, count: int, isa: str = "") -> Any:
    """Compare several random cases, compiled as one model."""
    cases = [make(np.random.default_rng([seed, index])) for index in range(count)]
    built = check_cases(cases, isa=isa)
    assert built.host_operators == ()
    return built


# -- random cases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_random_cases(name: str) -> None:
    @profile(1)
    @given(st.integers(0, 2**32 - 1))
    def cases(seed: int) -> None:
        assert_equal(KINDS[name], seed, 5)

    cases()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", KINDS)
def test_many_random_cases(name: str, isa: str) -> None:
    @profile(3)
    @given(st.integers(0, 2**32 - 1))
    def cases(seed: int) -> None:
        assert_equal(KINDS[name], seed, 8, isa)

    cases()


@pytest.mark.parametrize("isa", ISAS)
def test_all_pairs_of_bits(isa: str) -> None:
    cases = [
        convolutions(np.random.default_rng([weight_bits, x_bits]), weight_bits, x_bits)
        for weight_bits, x_bits in itertools.product(BITS, BITS)
    ]
    built = check_cases(cases, isa=isa)
    found = [(layer.weight_bits, layer.activation_bits) for layer in built.layers]
    assert sorted(found) == sorted(itertools.product(BITS, BITS))
    assert all(layer.kernel for layer in built.layers)


def extremes(generator: Generator) -> Case:
    """A layer at the ends of its types: data and weights lie at the bounds, or all at one."""
    weight_bits, x_bits = int(generator.choice(BITS)), int(generator.choice(BITS))
    signed = bool(generator.integers(2))
    probe = TensorQuantization(1.0, 0, x_bits, signed)
    zero_point = int(generator.choice([probe.code_min, 0, probe.code_max]))
    q = TensorQuantization(1.0, zero_point, x_bits, signed)
    terms, columns = whole(generator, 1, 40), whole(generator, 1, 9)
    ends = [[q.code_min, q.code_max], [q.code_min], [q.code_max]][int(generator.integers(3))]
    x = generator.choice(ends, (5, terms))
    half = 2 ** (weight_bits - 1)
    w = generator.choice([[-half, half - 1], [-half], [half - 1]][int(generator.integers(3))],
                         (terms, columns))  # fmt: skip
    builder = Builder()
    data = builder.activation(builder.input("x", x.shape), q)
    weights = builder.weights(w, np.float32(1.0), bits=weight_bits)
    layer = builder.node("MatMul", data, weights, name="layer")
    spread = max(float(np.abs((x - zero_point) @ w).max()), 1.0)
    y_q = output_like(generator, int(generator.choice(BITS)), spread)
    return builder, builder.activation(layer, y_q), {"x": (x - zero_point).astype(np.float32)}


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_codes(isa: str) -> None:
    assert_equal(extremes, 0, 12, isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_many_extreme_codes(isa: str) -> None:
    for seed in range(1, 4):
        assert_equal(extremes, seed, 16, isa)


def function_case(name: str, bits: int, y_bits: int, signed: bool) -> Case:
    """An elementwise function of every code."""
    generator = np.random.default_rng([len(name), bits, y_bits])
    q = draw_quantization(generator, bits, float(np.float32(10.0 / 2**bits)))
    y_q = TensorQuantization(float(np.float32(4.0 / 2**y_bits)), int(y_bits > 2), y_bits, signed)
    builder = Builder()
    codes = np.arange(q.code_min, q.code_max + 1)
    x = ((codes - q.zero_point).astype(np.float32) * np.float32(q.scale)).reshape(-1, 4)
    data = builder.activation(builder.input("x", x.shape), q)
    return builder, builder.activation(FUNCTIONS[name].build(builder, data), y_q), {"x": x}


def test_elementwise_functions() -> None:
    widths = itertools.cycle(itertools.product(BITS, BITS))
    cases = [
        function_case(name, bits, y_bits, signed=len(name) % 2 == 0)
        for name, (bits, y_bits) in zip(FUNCTIONS, widths, strict=False)
    ]
    assert check_cases(cases).host_operators == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise_functions_at_all_widths(name: str) -> None:
    cases = [
        function_case(name, bits, y_bits, signed)
        for bits, y_bits, signed in itertools.product(BITS, BITS, (False, True))
    ]
    assert check_cases(cases).host_operators == ()


def move_case(name: str) -> Case:
    """A move of codes, and a product that shows that codes came out of it."""
    builder = Builder()
    data = builder.activation(builder.input("x", X8.shape), Q8)
    moved = MOVES[name][0](builder, data)
    factor = builder.weights(np.array([4]), np.float32(0.125), bits=8)
    product = builder.node("Mul", moved, factor)
    output = builder.activation(product, TensorQuantization(0.0625, 0, 16, signed=True))
    return builder, output, {"x": (X8 - 11).astype(np.float32) * np.float32(0.0625)}


def test_moves() -> None:
    assert check_cases([move_case(name) for name in MOVES]).host_operators == ()


def assert_graph_equal(seed: int) -> None:
    builder, outputs, feeds = draw_graph(seed)
    model = builder.model(*outputs)
    check(model, feeds)
    # Codes that are no outputs may be fused with what reads them.
    expected = Reference(load(model)).run(feeds)[0]
    for name, array in zip(outputs, execute(compiled(model), feeds["x"]), strict=True):
        np.testing.assert_array_equal(array, expected[name])


def test_random_graphs() -> None:
    profile(3)(given(st.integers(0, 2**32 - 1))(assert_graph_equal))()


@pytest.mark.slow
def test_many_random_graphs() -> None:
    profile(30)(given(st.integers(0, 2**32 - 1))(assert_graph_equal))()


# -- single cases ----------------------------------------------------------------------------------

INPUT = TensorQuantization(0.05, 3, 8, signed=True)
OUTPUT = TensorQuantization(0.11, -2, 8, signed=True)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def dense(builder: Builder, tensor: str, columns: int, *, name: str = "layer", **kw: Any) -> str:
    """A MatMul of 8-bit weights, one scale a column."""
    generator = np.random.default_rng(columns)
    options = {"bits": 8, "axis": 1} | kw
    codes = generator.integers(-128, 128, (columns, columns))
    scale = generator.uniform(0.001, 0.01, columns).astype(np.float32)
    return builder.node("MatMul", tensor, builder.weights(codes, scale, **options), name=name)


def conv(builder: Builder, tensor: str, out: int, into: int, *, name: str, **kw: Any) -> str:
    """A convolution of 8-bit weights, 3 x 3, one scale a filter."""
    generator = np.random.default_rng(out)
    codes = generator.integers(-128, 128, (out, into, 3, 3))
    scale = generator.uniform(0.001, 0.01, out).astype(np.float32)
    weights = builder.weights(codes, scale, bits=8, axis=0)
    return builder.node("Conv", tensor, weights, name=name, **kw)


@pytest.mark.parametrize("isa", ISAS)
def test_every_use_of_sums(isa: str) -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", [7, 12]), INPUT)
    layer = dense(builder, data, 12)
    relu = builder.node("Relu", layer)
    outputs = [
        builder.activation(layer, OUTPUT),
        builder.activation(relu, TensorQuantization(0.3, 0, 4, signed=False)),
        builder.node("Softmax", layer, axis=-1, name="softmax"),
        layer,
        relu,
    ]
    built = check(builder.model(*outputs), {"x": normal(7, 12)}, isa=isa)
    assert [layer.name for layer in built.layers] == ["layer"]
    assert [operator.name for operator in built.host_operators] == ["softmax"]


def test_sums_of_activations_that_leave_the_model_too() -> None:
    builder = Builder()
    left, right = (
        builder.activation(builder.input(name, [40, 50]), q)
        for name, q in (("a", INPUT), ("b", OUTPUT))
    )
    total = builder.node("Add", left, right, name="sum")
    output = builder.activation(total, TensorQuantization(0.13, 0, 8, signed=True))
    check(builder.model(output, total), {"a": normal(40, 50), "b": normal(40, 50, seed=1)})


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "Add"])
def test_biases_in_float_are_as_fine_as_32_bits_allow(kind: str) -> None:
    generator = np.random.default_rng(4)
    q = TensorQuantization(1.0, 0, 4, signed=True)
    builder = Builder()
    shape = [50, 3, 1] if kind == "Conv" else [50, 3]
    data = builder.activation(builder.input("x", shape), q)
    codes = generator.integers(-2, 2, (8, 3))
    bias = builder.constant(generator.normal(0, 3, 8).astype(np.float32))
    scale = generator.uniform(0.5, 1, 8).astype(np.float32)
    if kind == "Conv":
        weights = builder.weights(codes[..., None], scale, bits=2, axis=0)
        layer = builder.node("Conv", data, weights, bias)
    elif kind == "Gemm":
        weights = builder.weights(codes, scale, bits=2, axis=0)
        layer = builder.node("Gemm", data, weights, bias, transB=1)
    else:
        weights = builder.weights(codes.T, scale, bits=2, axis=1)
        layer = builder.node("Add", bias, builder.node("MatMul", data, weights))
    output = builder.activation(layer, TensorQuantization(0.002, 0, 16, signed=True))
    x = generator.integers(-8, 8, shape).astype(np.float32)
    built = check(builder.model(output), {"x": x})
    assert [layer.kernel for layer in built.layers] == [True]


def test_scales_along_other_axes_stay_float() -> None:
    generator = np.random.default_rng(7)
    builder = Builder()
    data = builder.activation(builder.input("x", [4, 3]), INPUT)
    scale = generator.uniform(0.01, 0.05, 3).astype(np.float32)
    weights = builder.weights(generator.integers(-128, 128, (3, 6)), scale, bits=8, axis=0)
    layer = builder.node("MatMul", data, weights, name="rows")
    built = check(builder.model(builder.activation(layer, OUTPUT)), {"x": normal(4, 3)})
    assert built.layers == ()
    assert [operator.name for operator in built.host_operators] == ["rows"]


def test_activations_with_a_scale_for_each_channel_stay_float() -> None:
    builder = Builder()
    scale = builder.constant(np.array([0.1, 0.2, 0.3], np.float32))
    zero = builder.constant(np.array([1, 0, -3], np.int8))
    codes = builder.node("QuantizeLinear", builder.input("x", [4, 3]), scale, zero, axis=1)
    data = builder.node("DequantizeLinear", codes, scale, zero, axis=1)
    weights = builder.weights(np.arange(-9, 9).reshape(3, 6), np.float32(0.1), bits=8)
    layer = builder.node("MatMul", data, weights, name="rows")
    built = check(builder.model(builder.activation(layer, OUTPUT)), {"x": normal(4, 3)})
    assert built.layers == ()
    assert [operator.name for operator in built.host_operators] == ["rows"]


def test_a_quantizer_behind_moves_of_sums() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", [2, 3, 8, 8]), INPUT)
    layer = conv(builder, data, 4, 3, name="layer")
    pooled = builder.node("MaxPool", builder.node("Relu", layer), kernel_shape=[2, 2])
    turned = builder.node("Transpose", pooled, perm=[0, 2, 3, 1])
    built = check(builder.model(builder.activation(turned, OUTPUT)), {"x": normal(2, 3, 8, 8)})
    assert built.host_operators == ()


def test_products_of_two_activations() -> None:
    builder = Builder()
    left = builder.activation(builder.input("a", [2, 3, 5, 6]), INPUT)
    right = builder.activation(builder.input("b", [2, 1, 6, 4]), OUTPUT)
    product = builder.node("MatMul", left, right, name="attention")
    output = builder.activation(product, TensorQuantization(0.9, 7, 8, signed=False))
    built = check(builder.model(output), {"a": normal(2, 3, 5, 6), "b": normal(2, 1, 6, 4, seed=1)})
    assert [(layer.name, layer.weight_bits) for layer in built.layers] == [("attention", 0)]


def test_concat_and_split() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", [2, 6, 4]), INPUT)
    joined = builder.node("Concat", data, data, axis=1)
    sizes = builder.constant(np.array([5, 7], np.int64))
    builder.nodes.append(
        onnx.helper.make_node("Split", [joined, sizes], ["a", "b"], "split", axis=1)
    )
    outputs = [
        builder.activation(builder.node("ReduceMean", part, keepdims=0), OUTPUT)
        for part in ("a", "b")
    ]
    assert check(builder.model(*outputs), {"x": normal(2, 6, 4)}).host_operators == ()


def test_concat_of_other_scales_gets_new_codes() -> None:
    builder = Builder()
    first = builder.activation(builder.input("a", [6, 9]), INPUT)
    second = builder.activation(builder.input("b", [6, 9]), OUTPUT)
    joined = builder.node("Concat", first, second, axis=0)
    output = builder.activation(joined, TensorQuantization(0.07, 100, 8, signed=False))
    check(builder.model(output), {"a": normal(6, 9), "b": normal(6, 9, seed=1)})


def test_a_condition_between_layers() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", [5, 8]), INPUT)
    layer = dense(builder, data, 8)
    total = builder.node("ReduceSum", layer, keepdims=0)
    positive = builder.node("Greater", total, builder.constant(np.float32(0)))

    def body(operator: str) -> onnx.GraphProto:
        value = onnx.helper.make_tensor_value_info(operator, onnx.TensorProto.FLOAT, [5, 8])
        node = onnx.helper.make_node(operator, [layer], [operator], operator)
        return onnx.helper.make_graph([node], operator, [], [value])

    chosen = builder.node("If", positive, then_branch=body("Neg"), else_branch=body("Abs"))
    again = dense(builder, builder.activation(chosen, OUTPUT), 8, name="second")
    model = builder.model(builder.activation(again, OUTPUT))
    x = normal(5, 8)
    built = check(model, {"x": x})
    check(model, {"x": -x}, built=built)
    assert [layer.name for layer in built.layers] == ["layer", "second"]


# -- inputs, outputs, shapes -----------------------------------------------------------------------


def test_symbolic_batches() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", ["N", 3, 6, 6]), INPUT)
    relu = builder.node("Relu", conv(builder, data, 4, 3, name="conv", pads=[1] * 4))
    inner = builder.activation(relu, OUTPUT)
    pooled = builder.activation(builder.node("GlobalAveragePool", inner), INPUT)
    flat = dense(builder, builder.node("Flatten", pooled), 4, name="fc")
    model = builder.model(builder.activation(flat, OUTPUT))
    built = None
    for samples in (1, 0, 5, 64):
        built = check(model, {"x": normal(samples, 3, 6, 6)}, built=built)
    assert built is not None
    assert [layer.kernel for layer in built.layers] == [True, True]


def test_symbolic_images() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", [2, 3, "height", "width"]), INPUT)
    layer = conv(builder, data, 4, 3, name="conv", strides=[2, 2], pads=[1] * 4)
    pooled = builder.node("MaxPool", builder.activation(layer, OUTPUT), kernel_shape=[2, 2])
    total = builder.node("Add", pooled, pooled, name="twice")
    model = builder.model(builder.activation(total, INPUT))
    built = None
    for height, width in ((6, 6), (9, 5), (16, 31)):
        built = check(model, {"x": normal(2, 3, height, width)}, built=built)
    assert built is not None
    assert built.host_operators == ()


def test_equal_kernels_for_sizes_that_are_equal_and_that_are_not() -> None:
    builder = Builder()
    square = builder.activation(builder.input("a", ["N", "N", 6]), INPUT)
    oblong = builder.activation(builder.input("b", ["N", "M", 6]), INPUT)
    outputs = [
        builder.activation(dense(builder, data, 6, name=name), OUTPUT)
        for name, data in (("square", square), ("oblong", oblong))
    ]
    model = builder.model(*outputs)
    feeds = {"a": normal(3, 3, 6), "b": normal(3, 5, 6, seed=1)}
    built = check(model, feeds)
    check(model, {"a": normal(2, 2, 6), "b": normal(2, 2, 6)}, built=built)


def test_equal_layers_share_a_kernel_but_not_their_weights() -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", ["N", 6]), INPUT)
    generator = np.random.default_rng(0)
    for index in range(3):
        codes = generator.integers(-128, 128, (6, 6))
        weights = builder.weights(codes, np.float32(0.01 * (index + 1)), bits=8)
        layer = builder.node("MatMul", x, weights, name=f"layer{index}")
        x = builder.activation(layer, INPUT)
    built = check(builder.model(x), {"x": normal(4, 6)})
    assert [layer.name for layer in built.layers] == ["layer0", "layer1", "layer2"]
    assert len([name for name in built.parameters if "weight" in name]) == 3


def test_several_inputs_and_outputs_codes_and_floats() -> None:
    builder = Builder()
    first = dense(builder, builder.activation(builder.input("a", ["N", 6]), INPUT), 6, name="one")
    narrow = TensorQuantization(0.4, 0, 4, signed=False)
    second = dense(builder, builder.activation(builder.input("b", ["N", 6]), narrow), 6, name="two")
    left, right = builder.activation(first, OUTPUT), builder.activation(second, narrow)
    total = builder.activation(builder.node("Add", left, right), INPUT)
    model = builder.model(total, first, *list(builder.quantized)[-2:])
    feeds = {"a": normal(3, 6), "b": normal(3, 6, seed=1)}
    built = check(model, feeds)
    assert [layer.name for layer in built.layers] == ["one", "two"]


@pytest.mark.parametrize("quantized", [False, True])
def test_models_without_layers(quantized: bool) -> None:
    builder = Builder()
    x = builder.input("x", [4, 5])
    if quantized:
        x = builder.activation(builder.node("Relu", builder.activation(x, INPUT)), INPUT)
    built = check(
        builder.model(builder.node("Softmax", x, axis=-1, name="last")), {"x": normal(4, 5)}
    )
    assert (built.layers, built.parameters) == ((), {})
    assert [operator.name for operator in built.host_operators] == ["last"]


def test_an_empty_tensor_of_codes() -> None:
    builder = Builder()
    data = builder.activation(builder.input("x", ["N", 12]), INPUT)
    model = builder.model(builder.activation(dense(builder, data, 12), OUTPUT))
    check(model, {"x": normal(0, 12)})


# -- whole models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> dict[str, Array]:
    with np.load(LENET / "test.npz", allow_pickle=False) as archive:
        return {"image": archive["image"][:100].astype(np.float32)}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "few.npz"
    with np.load(LENET / "calibration.npz", allow_pickle=False) as archive:
        np.savez(path, image=archive["image"][:32])
    return path


PAIRS = list(itertools.product(BITS, BITS))


@pytest.mark.parametrize(
    "weight_bits, activation_bits",
    [
        pytest.param(*pair, marks=[] if pair in ((8, 8), (2, 16), (4, 4)) else pytest.mark.slow)
        for pair in PAIRS
    ],
)
def test_lenet_at_all_pairs_of_bits(
    digits: dict[str, Array], calibration: Path, weight_bits: int, activation_bits: int
) -> None:
    precision = f"w{weight_bits}a{activation_bits}"
    quantized = bitwright.quantize(
        LENET / "lenet.onnx", precision=precision, calibration=calibration
    )
    built = check(quantized.model, digits)
    assert built.host_operators == ()
    assert len(built.layers) == 5
    for layer in built.layers:
        assert layer.kernel
        assert (layer.weight_bits, layer.activation_bits) == (weight_bits, activation_bits)
    stored = sum(math.ceil(layer.weight_count * weight_bits / 8) for layer in built.layers)
    packed = sum(array.size for name, array in built.parameters.items() if "weight" in name)
    assert packed == stored == sum(layer.weight_bytes for layer in built.layers)


MIXED = {"stem": "w8a8", "depthwise": "w4a16", "head": "w2a4", "fc": "w16a8"}


@pytest.mark.parametrize(
    "precision, layers, elementwise_bits, options",
    [
        ("w8a8", {}, 16, {}),
        pytest.param("w4a4", MIXED, 16, {"asymmetric": True}, marks=pytest.mark.slow),
        pytest.param("w16a16", {}, 16, {"per_channel": False}, marks=pytest.mark.slow),
        pytest.param("w2a2", {}, 8, {}, marks=pytest.mark.slow),
    ],
)
def test_a_residual_network(
    tmp_path: Path,
    precision: str,
    layers: Mapping[str, str],
    elementwise_bits: int,
    options: Mapping[str, Any],
) -> None:
    model = residual_network(np.random.default_rng(1)).model("fc_out")
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "x.npz", x=normal(32, 3, 16, 16))
    plan = bitwright.make_plan(
        tmp_path / "model.onnx",
        precision=precision,
        layers=layers,
        elementwise_bits=elementwise_bits,
    )
    quantized = bitwright.quantize(
        tmp_path / "model.onnx", plan=plan, calibration=tmp_path / "x.npz", **options
    )
    feeds = {"x": normal(9, 3, 16, 16, seed=2)}
    built = check(quantized.model, feeds)
    assert built.host_operators == ()
    assert len(built.layers) == 7
    empty = {"x": normal(0, 3, 16, 16)}
    execute(built, empty["x"])


def other_network(generator: Generator) -> onnx.ModelProto:
    """Convolution, depthwise, both poolings, Concat, Sigmoid, MatMul with Add, Gemm."""
    builder = Builder(opset=21)

    def weights(*shape: int) -> str:
        return builder.constant(generator.normal(0, 0.3, shape).astype(np.float32))

    x = builder.input("x", ["N", 3, 12, 12])
    x = builder.node("Conv", x, weights(8, 3, 3, 3), weights(8), name="conv", strides=[2, 2])
    x = builder.node("Relu", x)
    deep = builder.node("Conv", x, weights(8, 1, 3, 3), weights(8), group=8, pads=[1] * 4)
    x = builder.node("Concat", builder.node("Sigmoid", deep), x, axis=1)
    x = builder.node("MaxPool", x, kernel_shape=[2, 2])
    x = builder.node("AveragePool", x, kernel_shape=[2, 2], pads=[0, 0, 1, 1], strides=[2, 2])
    x = builder.node("Flatten", x)
    x = builder.node("Add", builder.node("MatMul", x, weights(64, 10), name="matmul"), weights(10))
    x = builder.node("Relu", x)
    builder.node("Gemm", x, weights(10, 6), weights(6), name="fc", alpha=1.0)
    return builder.model("fc_out")


class Reader(CalibrationDataReader):  # type: ignore[misc]  # ships no types
    def __init__(self, feeds: Mapping[str, Array]) -> None:
        self._batches = iter([dict(feeds)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


PEER = list(
    itertools.product(["other", "residual"], ["QInt8", "QUInt8"], [False, True], [False, True])
)


@pytest.mark.parametrize(
    "name, activation, per_channel, symmetric",
    [
        pytest.param(*case, marks=[] if case[1:] == ("QUInt8", True, False) else pytest.mark.slow)
        for case in PEER
    ],
)
def test_models_quantized_by_onnxruntime(
    tmp_path: Path, name: str, activation: str, per_channel: bool, symmetric: bool
) -> None:
    generator = np.random.default_rng(3)
    if name == "residual":
        model = residual_network(generator).model("fc_out")
    else:
        model = other_network(generator)
    size = 16 if name == "residual" else 12
    onnx.save(model, tmp_path / "model.onnx")
    quantize_static(
        tmp_path / "model.onnx",
        tmp_path / "quantized.onnx",
        Reader({"x": normal(32, 3, size, size)}),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType[activation],
        weight_type=QuantType.QInt8 if per_channel else QuantType[activation],
        extra_options={"ActivationSymmetric": symmetric},
    )
    quantized = onnx.load(tmp_path / "quantized.onnx")
    built = check(quantized, {"x": normal(9, 3, size, size, seed=2)})
    layers = [n.name for n in quantized.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert {layer.name for layer in built.layers} == set(layers)


def test_codes_are_compared_at_all() -> None:
    """The comparison of this file sees every tensor of codes of a model."""
    builder, output, _ = convolutions(np.random.default_rng(0))
    model = with_codes(builder.model(output))
    found = {value.name for value in model.graph.output}
    assert found == {output, *builder.quantized}
    assert compiled(model).layers[0].name == "layer"
    assert draw_codes(np.random.default_rng(0), 0, 1, [2]).shape == (2,)
