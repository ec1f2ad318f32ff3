"""Structure and quality of quantized models, read off the ONNX files that bitwright writes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitwright
from bitwright.errors import ModelError, PlanError, UsageError
from bitwright.quant.load import load
from bitwright.quant.quantizer import Quantized, fit_plan
from bitwright.vocabulary import Precision, PrecisionPlan
from tests.quant.qdq import BITS, Array, Builder, profile, residual_network, run_onnxruntime

Generator = np.random.Generator


def normal(generator: Generator, *shape: int, spread: float = 1.0) -> Array:
    return generator.normal(0.0, spread, shape).astype(np.float32)


@dataclass(frozen=True)
class Emitted:
    """A quantized model, taken apart."""

    result: Quantized
    path: Path

    @property
    def model(self) -> onnx.ModelProto:
        return self.result.model

    @property
    def constants(self) -> dict[str, Array]:
        return {t.name: onnx.numpy_helper.to_array(t) for t in self.model.graph.initializer}

    def node(self, name: str) -> onnx.NodeProto:
        found: list[onnx.NodeProto] = [n for n in self.model.graph.node if n.name == name]
        (node,) = found
        return node

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        return next((node for node in self.model.graph.node if tensor in node.output), None)

    def source(self, tensor: str) -> onnx.NodeProto:
        """The DequantizeLinear that a tensor comes from, behind moves and clamps."""
        node = self.producer(tensor)
        while node is not None and node.op_type != "DequantizeLinear":
            node = self.producer(node.input[0])
        assert node is not None, f"{tensor} is not quantized"
        return node

    def type_of(self, tensor: str) -> str:
        """Element type of the codes behind a tensor, for example INT4."""
        zero_point = self.source(tensor).input[2]
        (found,) = (t for t in self.model.graph.initializer if t.name == zero_point)
        return str(onnx.TensorProto.DataType.Name(found.data_type))

    def scale(self, tensor: str) -> Array:
        return self.constants[self.source(tensor).input[1]]

    def count(self, operator: str) -> int:
        return sum(node.op_type == operator for node in self.model.graph.node)

    def regions(self, data: Mapping[str, Array]) -> dict[str, str]:
        """Name to kind of the integer regions, codes compared with onnxruntime's on the way."""
        comparison = bitwright.compare(self.path, data)
        for region in comparison.regions:
            assert region.largest_difference <= 1, region
        return {region.name: region.kind for region in comparison.regions}


def emit(
    folder: Path,
    builder: Builder,
    outputs: Sequence[str],
    data: Mapping[str, Array],
    **options: Any,
) -> Emitted:
    """Quantize a model (by default at w8a8) and make the checks that hold for all."""
    source = builder.model(*outputs)
    path = folder / "float.onnx"
    onnx.save(source, path)
    if "plan" not in options:
        options.setdefault("precision", "w8a8")
    output = folder / "quantized.onnx"
    result = bitwright.quantize(path, calibration=data, output=output, overwrite=True, **options)
    assert output.read_bytes() == result.model.SerializeToString()
    model = result.model
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    narrow = any(2 in (p.weight_bits, p.activation_bits) for p in result.plan.layers.values())
    (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
    assert opset == (25 if narrow else 21)
    assert [v.name for v in model.graph.input] == [v.name for v in source.graph.input]
    assert [v.name for v in model.graph.output] == [v.name for v in source.graph.output]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert [layer.name for layer in result.layers] == list(result.plan.layers)
    for array in run_onnxruntime(model, data):
        assert np.isfinite(array).all()
    return Emitted(result, output)


def sqnr_db(wanted: Array, found: Array) -> float:
    noise = np.square(wanted.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise))


# -- types and scales -----------------------------------------------------------------------------


def conv_relu_gemm(generator: Generator) -> tuple[Builder, dict[str, Array]]:
    builder = Builder(opset=21)
    x = builder.input("x", ["N", 3, 6, 6])
    conv = builder.node(
        "Conv",
        x,
        builder.constant(normal(generator, 4, 3, 3, 3)),
        builder.constant(normal(generator, 4)),
        name="conv",
    )
    relu = builder.node("Relu", conv)
    flat = builder.node("Flatten", relu)
    builder.node("Gemm", flat, builder.constant(normal(generator, 64, 5)), name="fc")
    return builder, {"x": normal(generator, 16, 3, 6, 6)}


@pytest.mark.parametrize("weight_bits", BITS)
@pytest.mark.parametrize("activation_bits", BITS)
def test_types_are_those_of_the_plan(
    tmp_path: Path, weight_bits: int, activation_bits: int
) -> None:
    builder, data = conv_relu_gemm(np.random.default_rng(0))
    emitted = emit(
        tmp_path, builder, ["fc_out"], data, precision=f"w{weight_bits}a{activation_bits}"
    )
    conv, fc = emitted.node("conv"), emitted.node("fc")
    for layer in (conv, fc):
        assert emitted.type_of(layer.input[1]) == f"INT{weight_bits}"
        codes = emitted.constants[emitted.source(layer.input[1]).input[0]]
        assert np.ptp(codes.astype(int)) >= 2 ** (weight_bits - 1)
    assert emitted.type_of(conv.input[0]) == f"INT{activation_bits}"  # x is negative too
    assert emitted.type_of(fc.input[0]) == f"UINT{activation_bits}"  # behind a Relu
    assert emitted.result.weight_bytes == sum(
        math.ceil(count * weight_bits / 8) for count in (4 * 27, 64 * 5)
    )
    assert emitted.result.float_weight_bytes == 4 * (4 * 27 + 64 * 5)
    assert emitted.result.float_operators == ()
    # Moved in front of the Flatten, behind the Relu.
    assert emitted.producer(fc.input[0]).op_type == "Flatten"  # type: ignore[union-attr]
    assert emitted.regions(data) == {"x_QuantizeLinear": "quantize", "conv": "layer"}


@pytest.mark.parametrize("asymmetric", [False, True])
def test_zero_points(tmp_path: Path, asymmetric: bool) -> None:
    # Values from -1 to 3: symmetric codes take the sign, asymmetric ones the range.
    builder = Builder(opset=21)
    x = builder.input("x", ["N", 8])
    weights = builder.constant(np.eye(8, dtype=np.float32))
    output = builder.node("MatMul", x, weights, name="fc")
    data = {"x": np.linspace(-1, 3, 8 * 64, dtype=np.float32).reshape(64, 8)}
    emitted = emit(tmp_path, builder, [output], data, asymmetric=asymmetric, clip="minmax")
    layer = emitted.node("fc")
    zero_point = emitted.constants[emitted.source(layer.input[0]).input[2]]
    if asymmetric:
        assert emitted.type_of(layer.input[0]) == "UINT8"
        assert emitted.scale(layer.input[0]) == pytest.approx(4 / 255)
        assert int(zero_point) == 64  # 1 / (4 / 255) = 63.75
    else:
        assert emitted.type_of(layer.input[0]) == "INT8"
        assert emitted.scale(layer.input[0]) == pytest.approx(3 / 127)
        assert int(zero_point) == 0


CHANNEL_CASES: dict[str, tuple[str, tuple[int, ...], int, bool, dict[str, Any]]] = {
    # operator, shape of the weights, their channel axis, weights on the left, attributes
    "Conv": ("Conv", (6, 4, 3, 3), 0, False, {"pads": [1, 1, 1, 1]}),
    "Conv in groups": ("Conv", (6, 2, 3, 3), 0, False, {"group": 2}),
    "Gemm": ("Gemm", (4, 6), 1, False, {}),
    "Gemm, transposed": ("Gemm", (6, 4), 0, False, {"transB": 1}),
    "MatMul": ("MatMul", (4, 6), 1, False, {}),
    "MatMul, weights left": ("MatMul", (6, 5), 0, True, {}),
    "MatMul, a stack": ("MatMul", (3, 4, 6), 2, False, {}),
    "MatMul, a stack left": ("MatMul", (3, 6, 5), 1, True, {}),
    "MatMul, square": ("MatMul", (4, 4), 1, False, {}),
    "MatMul, square left": ("MatMul", (5, 5), 0, True, {}),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CHANNEL_CASES)
def test_scales_of_weights(tmp_path: Path, case: str, bits: int, per_channel: bool) -> None:
    operator, shape, axis, left, attributes = CHANNEL_CASES[case]
    generator = np.random.default_rng(1)
    spread = generator.uniform(0.1, 5.0, [n if i == axis else 1 for i, n in enumerate(shape)])
    weights = (normal(generator, *shape) * spread).astype(np.float32)
    data_shape: tuple[int, ...] = (
        (8, 4, 5, 5) if operator == "Conv" else (8, 5, 4) if len(shape) == 2 else (8, 1, 5, 4)
    )
    if operator == "Gemm":
        data_shape = (8, 4)
    builder = Builder(opset=21)
    x = builder.input("x", ["N", *data_shape[1:]])
    operands = [x, builder.constant(weights)]
    if left:
        operands.reverse()
    output = builder.node(operator, *operands, name="layer", **attributes)
    emitted = emit(
        tmp_path,
        builder,
        [output],
        {"x": normal(generator, *data_shape)},
        precision=f"w{bits}a8",
        clip="minmax",
        per_channel=per_channel,
    )
    source = emitted.source(emitted.node("layer").input[0 if left else 1])
    codes, scale, zero_point = (emitted.constants[name] for name in source.input)
    others = tuple(i for i in range(len(shape)) if i != axis)
    largest = np.abs(weights).max(axis=others if per_channel else None)
    np.testing.assert_allclose(scale, largest / (2 ** (bits - 1) - 1), rtol=1e-6)
    assert not zero_point.astype(int).any()
    assert [a.i for a in source.attribute] == ([axis] if per_channel else [])
    wide = np.expand_dims(scale, others) if per_channel else scale
    error = np.abs(codes.astype(np.float32) * wide - weights)
    assert (error <= 0.5001 * wide).all()


def with_bias(
    kind: str, bias: Array, generator: Generator
) -> tuple[Builder, dict[str, Array], str]:
    builder = Builder(opset=21)
    if kind == "Conv":
        x = builder.input("x", ["N", 4, 5, 5])
        weights = builder.constant(normal(generator, 6, 4, 1, 1))
        builder.node("Conv", x, weights, builder.constant(bias), name="layer")
        return builder, {"x": normal(generator, 8, 4, 5, 5)}, "layer_out"
    x = builder.input("x", ["N", 4])
    weights = builder.constant(normal(generator, 4, 6))
    data = {"x": normal(generator, 8, 4)}
    if kind == "Gemm":
        builder.node("Gemm", x, weights, builder.constant(bias), name="layer")
        return builder, data, "layer_out"
    product = builder.node("MatMul", x, weights, name="layer")
    operands = [product, builder.constant(bias)]
    if kind == "bias + MatMul":
        operands.reverse()
    return builder, data, builder.node("Add", *operands, name="addition")


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul + bias", "bias + MatMul"])
def test_biases_take_the_scale_of_the_accumulator(
    tmp_path: Path, kind: str, per_channel: bool
) -> None:
    generator = np.random.default_rng(2)
    bias = normal(generator, 6)
    builder, data, output = with_bias(kind, bias, generator)
    emitted = emit(tmp_path, builder, [output], data, clip="minmax", per_channel=per_channel)
    layer = emitted.node("layer")
    user, index = layer, 2
    if "MatMul" in kind:
        user = emitted.node("addition")
        index = 0 if kind == "bias + MatMul" else 1
    source = emitted.source(user.input[index])
    codes, scale, _ = (emitted.constants[name] for name in source.input)
    assert emitted.type_of(user.input[index]) == "INT32"
    # The product of both scales, to the last bit.
    np.testing.assert_array_equal(
        scale, emitted.scale(layer.input[0]) * emitted.scale(layer.input[1])
    )
    np.testing.assert_array_equal(
        codes, np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    )
    assert emitted.result.layers[0].bias == "int32"
    assert emitted.result.float_operators == ()


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul + bias"])
def test_biases_that_int32_cannot_hold_stay_float(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(3)
    bias = np.array([1, 2, 3, 4, 5, 3e9], np.float32)  # at w16a16 a step is about 1e-8
    builder, data, output = with_bias(kind, bias, generator)
    emitted = emit(tmp_path, builder, [output], data, precision="w16a16")
    user, index = (emitted.node("layer"), 2)
    if "MatMul" in kind:
        user, index = emitted.node("addition"), 1
    assert user.input[index] in emitted.constants
    assert emitted.constants[user.input[index]].dtype == np.float32
    assert emitted.result.layers[0].bias == "float32"


def test_summary_of_layers(tmp_path: Path) -> None:
    builder, data = conv_relu_gemm(np.random.default_rng(4))
    emitted = emit(tmp_path, builder, ["fc_out"], data, precision="w4a8", clip="minmax")
    conv, fc = emitted.result.layers
    assert (conv.operator, fc.operator) == ("Conv", "Gemm")
    assert (conv.precision, fc.precision) == (Precision(4, 8), Precision(4, 8))
    assert (conv.weight_count, conv.weight_bytes) == (108, 54)
    assert (conv.bias, fc.bias) == ("int32", "")
    assert (conv.weight_clip, fc.weight_clip) == pytest.approx((1.0, 1.0))
    assert (conv.activation.minimum, conv.activation.maximum) == (data["x"].min(), data["x"].max())
    layer = emitted.node("conv")
    codes, scale, _ = (emitted.constants[n] for n in emitted.source(layer.input[1]).input)
    weights = onnx.numpy_helper.to_array(builder.initializers[0])
    assert conv.weight_sqnr_db == pytest.approx(
        sqnr_db(weights, codes.astype(np.float64) * scale.reshape(-1, 1, 1, 1)), abs=1e-6
    )
    document = emitted.result.to_dict()
    assert [entry["name"] for entry in document["layers"]] == ["conv", "fc"]
    assert document["layers"][0]["precision"] == "w4a8"
    assert document["layers"][0]["activation"]["scale"] == float(emitted.scale(layer.input[0]))


# -- where quantizers stand -----------------------------------------------------------------------


def conv(
    builder: Builder, generator: Generator, tensor: str, channels: tuple[int, int], name: str
) -> str:
    weights = builder.constant(normal(generator, channels[1], channels[0], 1, 1), f"{name}_w")
    return builder.node("Conv", tensor, weights, name=name)


def test_quantizers_stand_in_front_of_moves(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    builder = Builder(opset=21)
    x = builder.input("x", ["N", 3, 8, 8])
    pooled = builder.node("MaxPool", builder.node("Relu", conv(builder, generator, x, (3, 4), "a")),
                          kernel_shape=[2, 2], strides=[2, 2], name="pool")  # fmt: skip
    second = conv(builder, generator, pooled, (4, 4), "b")
    other = conv(builder, generator, pooled, (4, 2), "c")
    joined = builder.node("Concat", second, other, pooled, axis=1, name="concat")
    turned = builder.node("Transpose", joined, perm=[0, 2, 3, 1], name="transpose")
    shape = builder.constant(np.array([0, 16, 10], np.int64))
    flat = builder.node("Reshape", turned, shape, name="reshape")
    output = builder.node("MatMul", flat, builder.constant(normal(generator, 10, 3)), name="d")
    data = {"x": normal(generator, 16, 3, 8, 8)}
    emitted = emit(tmp_path, builder, [output], data)
    # Not one quantizer behind a move: each stands behind a computation or an input.
    for node in emitted.model.graph.node:
        if node.op_type == "QuantizeLinear":
            producer = emitted.producer(node.input[0])
            assert producer is None or producer.op_type in ("Conv", "Relu"), node.name
    for name in ("pool", "transpose", "reshape"):
        producer = emitted.producer(emitted.node(name).input[0])
        assert producer is not None
        assert producer.op_type in ("DequantizeLinear", "Concat", "Transpose")
    # All that is concatenated has one scale and one type.
    inputs = emitted.node("concat").input
    assert len({float(emitted.scale(name)) for name in inputs}) == 1
    assert len({emitted.type_of(name) for name in inputs}) == 1
    assert emitted.result.float_operators == ()
    regions = emitted.regions(data)
    assert [regions[name] for name in "abc"] == ["layer"] * 3


def test_clips_in_front_of_moves_keep_their_bounds(tmp_path: Path) -> None:
    # Relu behind a max pooling: the clamp stays between accumulator and codes.
    generator = np.random.default_rng(6)
    builder = Builder(opset=21)
    first = conv(builder, generator, builder.input("x", ["N", 3, 8, 8]), (3, 4), "a")
    pooled = builder.node("MaxPool", first, kernel_shape=[2, 2])
    for bounds in ((-0.53, 0.41), (0.0, 0.27)):
        ends = [builder.constant(np.float32(bound)) for bound in bounds]
        pooled = builder.node("Clip", pooled, *ends)
    output = conv(builder, generator, pooled, (4, 2), "b")
    data = {"x": normal(generator, 16, 3, 8, 8)}
    emitted = emit(tmp_path, builder, [output], data, precision="w16a16")
    (wanted,) = run_onnxruntime(builder.model(output), data)
    (found,) = run_onnxruntime(emitted.model, data)
    assert sqnr_db(wanted, found) > 60
    emitted.regions(data)


def test_residual_network_runs_in_integers(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    builder = residual_network(generator, batch_norm=True)
    data = {"x": normal(generator, 32, 3, 16, 16)}
    for bits in (16, 8):
        emitted = emit(tmp_path, builder, ["fc_out"], data, elementwise_bits=bits)
        assert emitted.count("BatchNormalization") == 0
        assert emitted.result.float_operators == ()
        regions = emitted.regions(data)
        for name in ("squeeze", "excite", "residual", "pool"):
            assert regions[name] == "arithmetic"
        tables = [node.name for node in emitted.model.graph.node if node.op_type.startswith("Hard")]
        assert len(tables) == 2
        assert {regions[name] for name in tables} == {"table"}
        for name in ("excite", "residual"):
            for tensor in emitted.node(name).input:
                assert emitted.type_of(tensor).endswith(str(bits))
        assert emitted.type_of(emitted.node("project").input[0]) in ("INT8", "UINT8")
        names = [entry.name for entry in emitted.result.elementwise]
        assert set(emitted.node("residual").input) <= {f"{n}_dequantized" for n in names}


def test_functions_before_the_first_and_behind_the_last_layer_stay_float(tmp_path: Path) -> None:
    generator = np.random.default_rng(18)
    builder = Builder(opset=21)
    before = builder.node("Tanh", builder.input("x", ["N", 3, 4, 4]), name="before")
    first = conv(builder, generator, before, (3, 4), "a")
    between = builder.node("Tanh", first, name="between")
    output = builder.node("Tanh", conv(builder, generator, between, (4, 2), "b"), name="behind")
    data = {"x": normal(generator, 16, 3, 4, 4)}
    emitted = emit(tmp_path, builder, [output], data)
    assert emitted.result.float_operators == (("before", "Tanh"), ("behind", "Tanh"))
    assert emitted.node("before").input[0] == "x"
    assert emitted.regions(data)["between"] == "table"


def test_one_tensor_with_two_precisions(tmp_path: Path) -> None:
    generator = np.random.default_rng(8)
    builder = Builder(opset=21)
    relu = builder.node(
        "Relu", conv(builder, generator, builder.input("x", ["N", 3, 4, 4]), (3, 4), "a")
    )
    pooled = builder.node("MaxPool", relu, kernel_shape=[2, 2])
    narrow = conv(builder, generator, pooled, (4, 2), "narrow")
    wide = conv(builder, generator, pooled, (4, 2), "wide")
    again = conv(builder, generator, pooled, (4, 2), "again")
    precisions = {"a": "w8a16", "narrow": "w2a2", "wide": "w16a16", "again": "w4a2"}
    plan = PrecisionPlan({name: Precision.parse(text) for name, text in precisions.items()})
    data = {"x": normal(generator, 16, 3, 4, 4)}
    emitted = emit(tmp_path, builder, [narrow, wide, again], data, plan=plan)
    types = {name: emitted.type_of(emitted.node(name).input[0]) for name in plan.layers}
    assert types == {"a": "INT16", "narrow": "UINT2", "wide": "UINT16", "again": "UINT2"}
    weights = {name: emitted.type_of(emitted.node(name).input[1]) for name in plan.layers}
    assert weights == {"a": "INT8", "narrow": "INT2", "wide": "INT16", "again": "INT4"}
    # Equal needs share one quantizer.
    assert emitted.count("QuantizeLinear") == 3
    assert emitted.node("narrow").input[0] == emitted.node("again").input[0]
    emitted.regions(data)


def test_shared_weights_with_two_precisions(tmp_path: Path) -> None:
    generator = np.random.default_rng(9)
    builder = Builder(opset=21)
    x = builder.input("x", ["N", 4])
    weights = builder.constant(normal(generator, 4, 4), "shared")
    first = builder.node("MatMul", x, weights, name="first")
    second = builder.node("Gemm", first, weights, name="second", transB=1)
    third = builder.node("Add", second, weights, name="float")
    plan = PrecisionPlan({"first": Precision(8, 8), "second": Precision(2, 8)})
    data = {"x": normal(generator, 4, 4)}
    emitted = emit(tmp_path, builder, [third], data, plan=plan)
    assert emitted.type_of(emitted.node("first").input[1]) == "INT8"
    assert emitted.type_of(emitted.node("second").input[1]) == "INT2"
    # Other users keep the float weights.
    float_weights = emitted.constants[emitted.node("float").input[1]]
    np.testing.assert_array_equal(
        float_weights, onnx.numpy_helper.to_array(builder.initializers[0])
    )
    assert emitted.result.float_operators == (("float", "Add"),)


def test_inputs_and_outputs_feed_layers(tmp_path: Path) -> None:
    # One input for two layers, a layer on another layer's output, which is an output too.
    generator = np.random.default_rng(10)
    builder = Builder(opset=21)
    x, y = builder.input("x", ["N", 4]), builder.input("y", ["N", 4])
    first = builder.node("MatMul", x, builder.constant(normal(generator, 4, 4)), name="first")
    second = builder.node("MatMul", first, builder.constant(normal(generator, 4, 4)), name="second")
    third = builder.node("MatMul", x, builder.constant(normal(generator, 4, 2)), name="third")
    both = builder.node("Mul", builder.node("Relu", second), y, name="both")
    data = {"x": normal(generator, 16, 4), "y": normal(generator, 16, 4)}
    emitted = emit(tmp_path, builder, [first, both, second, third], data)
    for name in ("first", "second", "third"):
        assert emitted.type_of(emitted.node(name).input[0]) == "INT8"
    assert emitted.node("first").input[0] == emitted.node("third").input[0]
    # Outputs stay float: they come from the accumulator, not from codes.
    for name in ("first", "second", "third"):
        producer = emitted.producer(f"{name}_out")
        assert producer is not None
        assert producer.name == name
    wanted = run_onnxruntime(builder.model(first, both, second, third), data)
    for expected, found in zip(wanted, run_onnxruntime(emitted.model, data), strict=True):
        assert sqnr_db(expected, found) > 25
    emitted.regions(data)


@pytest.mark.parametrize("alpha, beta", [(0.5, 1.0), (1.0, 2.0), (3.0, 0.25)])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (), (16, 5)])
def test_gemm_with_factors(
    tmp_path: Path, alpha: float, beta: float, bias: tuple[int, ...] | None
) -> None:
    generator = np.random.default_rng(11)
    builder = Builder(opset=21)
    x = builder.input("x", [16, 4])
    operands = [x, builder.constant(normal(generator, 5, 4))]
    if bias is not None:
        operands.append(builder.constant(normal(generator, *bias)))
    output = builder.node("Gemm", *operands, name="fc", transB=1, alpha=alpha, beta=beta)
    data = {"x": normal(generator, 16, 4)}
    emitted = emit(tmp_path, builder, [output], data, precision="w16a16")
    assert not {a.name for a in emitted.node("fc").attribute} & {"alpha", "beta"}
    assert emitted.type_of(emitted.node("fc").input[1]) == "INT16"
    (wanted,) = run_onnxruntime(builder.model(output), data)
    assert sqnr_db(wanted, run_onnxruntime(emitted.model, data)[0]) > 60


def test_layers_inside_bodies_stay_as_they_are(tmp_path: Path) -> None:
    generator = np.random.default_rng(12)
    builder = Builder(opset=21)
    x = builder.input("x", [4, 4])
    weights = builder.constant(normal(generator, 4, 4), "w")
    shift = builder.constant(normal(generator, 4), "b")
    first = builder.node("MatMul", x, weights, name="first")
    condition = builder.node(
        "Greater", builder.node("ReduceSum", x, keepdims=0), builder.constant(np.float32(0))
    )
    bodies = {}
    for name, operator, other in (
        ("then_branch", "MatMul", weights),
        ("else_branch", "Add", shift),
    ):
        value = onnx.helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, [4, 4])
        node = onnx.helper.make_node(operator, [first, other], [f"{name}_out"], f"{name}_node")
        bodies[name] = onnx.helper.make_graph([node], name, [], [value])
    chosen = builder.node("If", condition, name="choice", **bodies)
    relu = builder.node("Relu", chosen)
    output = builder.node("MatMul", relu, weights, name="last")
    data = {"x": normal(generator, 4, 4)}
    emitted = emit(tmp_path, builder, [output], data)
    assert list(emitted.result.plan.layers) == ["first", "last"]
    choice = emitted.node("choice")
    for attribute in choice.attribute:
        assert [node.op_type for node in attribute.g.node] in (["MatMul"], ["Add"])
        assert attribute.g.node[0].input[0] == first
    assert ("choice", "If") in emitted.result.float_operators
    emitted.regions(data)


def test_an_addition_inside_a_body_is_no_bias(tmp_path: Path) -> None:
    # The only user of the product is an Add in the branches of an If.
    generator = np.random.default_rng(13)
    builder = Builder(opset=21)
    x = builder.input("x", [4, 4])
    first = builder.node("MatMul", x, builder.constant(normal(generator, 4, 4)), name="first")
    builder.constant(normal(generator, 4), "b")
    condition = builder.node(
        "Greater", builder.node("ReduceSum", x, keepdims=0), builder.constant(np.float32(0))
    )
    value = onnx.helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, [4, 4])
    addition = onnx.helper.make_node("Add", [first, "b_1"], ["t"], "addition")
    other = onnx.helper.make_node("Identity", ["x"], ["e"], "other")
    else_value = onnx.helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, [4, 4])
    output = builder.node(
        "If",
        condition,
        then_branch=onnx.helper.make_graph([addition], "then", [], [value]),
        else_branch=onnx.helper.make_graph([other], "else", [], [else_value]),
    )
    emit(tmp_path, builder, [output], {"x": np.abs(normal(generator, 4, 4))})


# -- quality --------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
def test_sixteen_bits_are_close_to_float(tmp_path: Path, per_channel: bool) -> None:
    generator = np.random.default_rng(14)
    builder = residual_network(generator, batch_norm=True)
    data = {"x": normal(generator, 32, 3, 16, 16)}
    emitted = emit(tmp_path, builder, ["fc_out"], data, precision="w16a16", per_channel=per_channel)
    (wanted,) = run_onnxruntime(builder.model("fc_out"), data)
    assert sqnr_db(wanted, run_onnxruntime(emitted.model, data)[0]) > 60


def test_more_bits_are_better(tmp_path: Path) -> None:
    generator = np.random.default_rng(15)
    builder = residual_network(generator)
    data = {"x": normal(generator, 32, 3, 16, 16)}
    unseen = {"x": normal(generator, 32, 3, 16, 16)}
    (wanted,) = run_onnxruntime(builder.model("fc_out"), unseen)
    quality = {}
    for weight_bits, activation_bits in itertools.product(BITS, BITS):
        plan = f"w{weight_bits}a{activation_bits}"
        emitted = emit(tmp_path, builder, ["fc_out"], data, precision=plan)
        found = run_onnxruntime(emitted.model, unseen)[0]
        quality[weight_bits, activation_bits] = sqnr_db(wanted, found)
    for (weight_bits, activation_bits), value in quality.items():
        for more in ((weight_bits * 2, activation_bits), (weight_bits, activation_bits * 2)):
            # Where the other operand is the narrow one, more bits change little.
            assert quality.get(more, math.inf) > value - 2.0, (
                weight_bits,
                activation_bits,
                quality,
            )
    for bits in (2, 4, 8):
        gain = quality[bits * 2, bits * 2] - quality[bits, bits]
        assert gain > 5.0, quality


# -- random networks at random plans --------------------------------------------------------------


def random_network(generator: Generator) -> tuple[Builder, dict[str, Array]]:
    """A small network of everything the quantizer knows, on [N, C, size, size]."""
    channels, size = int(generator.integers(1, 5)), 8
    builder = Builder(opset=21)
    tensor = builder.input("x", ["N", channels, size, size])
    data = {
        "x": normal(generator, 8, channels, size, size, spread=float(generator.uniform(0.1, 10)))
    }
    for index in range(int(generator.integers(1, 7))):
        choice = generator.choice(
            [
                "conv",
                "conv",
                "conv",
                "pool",
                "average",
                "add",
                "gate",
                "concat",
                "function",
                "scale",
            ]
        )
        before = tensor
        if choice == "conv":
            groups = int(generator.choice([1, 1, channels]))
            filters = groups * int(generator.integers(1, 4))
            kernel = int(generator.choice([1, 3]))
            weights = normal(generator, filters, channels // groups, kernel, kernel, spread=0.4)
            bias = (
                [builder.constant(normal(generator, filters))] if generator.random() < 0.7 else []
            )
            tensor = builder.node(
                "Conv", tensor, builder.constant(weights), *bias,
                name=f"conv{index}", group=groups, auto_pad="SAME_UPPER",
            )  # fmt: skip
            channels = filters
            if generator.random() < 0.4:
                arrays = [
                    generator.uniform(0.5, 1.5, channels).astype(np.float32) for _ in range(4)
                ]
                constants = [builder.constant(array) for array in arrays]
                tensor = builder.node("BatchNormalization", tensor, *constants)
            tensor = activation(builder, generator, tensor)
        elif choice == "pool":
            tensor = builder.node("MaxPool", tensor, kernel_shape=[3, 3], pads=[1] * 4)
        elif choice == "average":
            tensor = builder.node("AveragePool", tensor, kernel_shape=[3, 3], pads=[1] * 4)
        elif choice == "function":
            tensor = activation(builder, generator, tensor)
        elif choice == "scale":
            factor = builder.constant(
                generator.uniform(0.5, 2, (channels, 1, 1)).astype(np.float32)
            )
            tensor = builder.node("Mul", tensor, factor)
        else:
            weights = normal(generator, channels, channels, 1, 1, spread=0.5)
            side = builder.node("Conv", before, builder.constant(weights), name=f"side{index}")
            if choice == "add":
                tensor = builder.node("Add", before, side)
            elif choice == "gate":
                pooled = builder.node("GlobalAveragePool", side)
                tensor = builder.node("Mul", before, builder.node("Sigmoid", pooled))
            else:
                tensor = builder.node("Concat", before, side, axis=1)
                channels *= 2
    flat = builder.node(
        "Flatten", builder.node("ReduceMean", tensor, two_axes(builder), keepdims=0)
    )
    head = builder.constant(normal(generator, channels, 3))
    if generator.random() < 0.5:
        builder.node("Gemm", flat, head, builder.constant(normal(generator, 3)), name="head")
    else:
        builder.node("MatMul", flat, head, name="head")
    return builder, data


def two_axes(builder: Builder) -> str:
    return builder.constant(np.array([2, 3], np.int64))


def activation(builder: Builder, generator: Generator, tensor: str) -> str:
    kind = generator.choice(["none", "Relu", "relu6", "HardSwish", "Sigmoid", "silu", "LeakyRelu"])
    if kind == "relu6":
        ends = [builder.constant(np.float32(bound)) for bound in (0, 6)]
        return builder.node("Clip", tensor, *ends)
    if kind == "silu":
        return builder.node("Mul", tensor, builder.node("Sigmoid", tensor))
    return tensor if kind == "none" else builder.node(str(kind), tensor)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random")


def random_precision(generator: np.random.Generator) -> Precision:
    weights, activations = generator.choice(BITS, 2)
    return Precision(int(weights), int(activations))


def check_random_network(scratch: Path, seed: int) -> tuple[int, int]:
    """Quantize a random network at a random plan; return codes compared and codes that differ."""
    generator = np.random.default_rng(seed)
    builder, data = random_network(generator)
    source = builder.model("head_out")
    layers = list(fit_plan(load(source), Precision(8, 8)).layers)
    operators = ("Conv", "Gemm", "MatMul")
    assert layers == [node.name for node in source.graph.node if node.op_type in operators]
    plan = PrecisionPlan(
        {name: random_precision(generator) for name in layers},
        elementwise_bits=int(generator.choice([8, 16])),
    )
    emitted = emit(
        scratch,
        builder,
        ["head_out"],
        data,
        plan=plan,
        clip=str(generator.choice(["mmse", "minmax", "percentile"])),
        asymmetric=bool(generator.random() < 0.3),
        per_channel=bool(generator.random() < 0.7),
    )
    assert {layer.name: layer.precision for layer in emitted.result.layers} == plan.layers
    for name, precision in plan.layers.items():
        layer = emitted.node(name)
        assert emitted.type_of(layer.input[1]) == f"INT{precision.weight_bits}"
        code_type = emitted.type_of(layer.input[0]).removeprefix("U")
        assert code_type == f"INT{precision.activation_bits}"
    comparison = bitwright.compare(emitted.path, data)
    for region in comparison.regions:
        assert region.largest_difference <= 1, region
    layer_regions = {region.name for region in comparison.regions if region.kind == "layer"}
    assert layer_regions <= set(layers)
    return (
        sum(region.codes for region in comparison.regions),
        sum(region.differing for region in comparison.regions),
    )


def test_random_networks(scratch: Path) -> None:
    counts = []

    @profile(25)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        counts.append(check_random_network(scratch, seed))

    check()
    codes, differing = np.sum(counts, axis=0)
    assert codes > 25_000
    assert differing <= 0.001 * codes


@pytest.mark.slow
def test_many_random_networks(scratch: Path) -> None:
    counts = [check_random_network(scratch, seed) for seed in range(600)]
    codes, differing = np.sum(counts, axis=0)
    assert differing <= 0.001 * codes


# -- what is refused ------------------------------------------------------------------------------


def test_quantized_models_are_refused(tmp_path: Path) -> None:
    builder, data = conv_relu_gemm(np.random.default_rng(16))
    emitted = emit(tmp_path, builder, ["fc_out"], data)
    with pytest.raises(ModelError, match="quantized already"):
        bitwright.quantize(emitted.path, calibration=data, precision="w8a8")


def test_models_without_layers_are_refused(tmp_path: Path) -> None:
    builder = Builder(opset=21)
    output = builder.node("Relu", builder.input("x", ["N", 4]))
    onnx.save(builder.model(output), tmp_path / "relu.onnx")
    with pytest.raises(ModelError, match="no layers"):
        bitwright.quantize(
            tmp_path / "relu.onnx", calibration={"x": np.ones((2, 4), np.float32)}, precision="w8a8"
        )


def test_plans_must_fit(tmp_path: Path) -> None:
    builder, data = conv_relu_gemm(np.random.default_rng(17))
    model = load(builder.model("fc_out"))
    whole = fit_plan(model, Precision(4, 8))
    assert whole.layers == {"conv": Precision(4, 8), "fc": Precision(4, 8)}
    assert (whole.structure_hash, whole.weights_hash) == (model.structure_hash, model.weights_hash)
    with pytest.raises(PlanError, match="no layer 'nothing'"):
        fit_plan(model, PrecisionPlan({**whole.layers, "nothing": Precision(8, 8)}))
    with pytest.raises(PlanError, match="'fc' has no precision"):
        fit_plan(model, PrecisionPlan({"conv": Precision(8, 8)}))
    with pytest.raises(PlanError, match="another model"):
        fit_plan(model, PrecisionPlan(whole.layers, structure_hash="sha256:0"))
    onnx.save(builder.model("fc_out"), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="batch size 0"):
        bitwright.quantize(
            tmp_path / "model.onnx", calibration=data, precision="w8a8", batch_size=0
        )


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul + bias"])
def test_channels_with_next_to_no_weights_do_not_make_the_bias_float(
    tmp_path: Path, kind: str
) -> None:
    # Folded normalizations leave such channels: in steps of their scale int32 is too small.
    generator = np.random.default_rng(19)
    builder, data, output = with_bias(kind, np.full(6, 1.5, np.float32), generator)
    weights = onnx.numpy_helper.to_array(builder.initializers[0]).copy()
    weights[(slice(None), 2) if kind != "Conv" else 2] *= 1e-9
    builder.initializers[0].CopyFrom(
        onnx.numpy_helper.from_array(weights, builder.initializers[0].name)
    )
    emitted = emit(tmp_path, builder, [output], data)
    assert emitted.result.layers[0].bias == "int32"
    (wanted,) = run_onnxruntime(builder.model(output), data)
    (found,) = run_onnxruntime(emitted.model, data)
    np.testing.assert_allclose(found[:, 2], wanted[:, 2], rtol=1e-6)


def test_tables_are_those_of_the_float_graph(tmp_path: Path) -> None:
    """A sum of a value with itself is a table whose first operator has its quantizers already."""
    builder = Builder(opset=21)
    x = builder.input("x", ["N", 3, 4, 4])
    made = builder.node("Conv", x, builder.constant(normal(np.random.default_rng(0), 5, 3, 1, 1)))
    parts = builder.constant(np.array([1, 4]))
    builder.nodes.append(onnx.helper.make_node("Split", [made, parts], ["one", "first"], axis=1))
    first = "first"
    twice = builder.node("Add", first, first)
    thrice = builder.node("Add", first, twice)
    clipped = builder.node(
        "Clip", thrice, builder.constant(np.float32(-0.7)), builder.constant(np.float32(1.1))
    )
    pooled = builder.node("GlobalAveragePool", clipped)
    weights = builder.constant(normal(np.random.default_rng(1), 2, 4, 1, 1))
    result = builder.node("Conv", pooled, weights)
    other = builder.node("Transpose", clipped, perm=[0, 1, 3, 2])
    path = tmp_path / "table.onnx"
    onnx.save(builder.model(result, other), path)
    data = normal(np.random.default_rng(2), 16, 3, 4, 4)
    quantized = bitwright.quantize(path, precision="w16a16", calibration={"x": data})
    expected = run_onnxruntime(onnx.load(path), {"x": data})
    found = run_onnxruntime(quantized.model, {"x": data})
    for wanted, got in zip(expected, found, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-3)
