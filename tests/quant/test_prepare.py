"""Preparing a model keeps what it computes: every rewrite against onnxruntime on the original."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.quant.graph import weight_input
from bitwright.quant.load import Model, load
from bitwright.quant.prepare import add_initializer, prepare
from tests.quant.qdq import Array, Builder, profile, run_onnxruntime

Generator = np.random.Generator


def normal(generator: Generator, *shape: int) -> Array:
    return generator.normal(size=shape).astype(np.float32)


def prepared(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[str]:
    """Prepare a model, compare its outputs with the original's; return what operators remain."""
    loaded = load(model)
    layers = [node.name for node in loaded.graph if weight_input(node) is not None]
    prepare(loaded)
    check(loaded, model, feeds)
    assert [node.name for node in loaded.graph if weight_input(node) is not None] == layers
    return [node.op_type for node in loaded.graph]


def check(loaded: Model, model: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    proto = loaded.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.output] == [v.name for v in model.graph.output]
    expected, found = run_onnxruntime(model, feeds), run_onnxruntime(proto, feeds)
    for wanted, got in zip(expected, found, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def conv_node(
    builder: Builder, generator: Generator, tensor: str, shape: tuple[int, ...], **attributes: Any
) -> str:
    """A convolution, with a bias or without."""
    bias = [builder.constant(normal(generator, shape[0]))] if generator.random() < 0.5 else []
    weights = builder.constant(normal(generator, *shape), "weights")
    return builder.node("Conv", tensor, weights, *bias, **attributes)


def norm_node(builder: Builder, generator: Generator, tensor: str, channels: int) -> str:
    gamma, beta, mean = (normal(generator, channels) for _ in range(3))
    variance = generator.uniform(0.01, 4.0, channels).astype(np.float32)
    constants = [builder.constant(array) for array in (gamma, beta, mean, variance)]
    return builder.node("BatchNormalization", tensor, *constants, epsilon=1e-3)


@profile(60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rank=st.integers(1, 3),
    groups=st.integers(1, 3),
    followers=st.lists(st.sampled_from(["norm", "Mul", "Add", "Sub", "rsub", "Div"]), max_size=4),
    relu=st.booleans(),
)
def test_what_is_affine_behind_a_convolution_folds(
    seed: int, rank: int, groups: int, followers: list[str], relu: bool
) -> None:
    generator = np.random.default_rng(seed)
    channels, filters = (
        groups * int(generator.integers(1, 3)),
        groups * int(generator.integers(1, 4)),
    )
    builder = Builder(opset=21)
    x = builder.input("x", [2, channels, *([5] * rank)])
    tensor = conv_node(
        builder, generator, x, (filters, channels // groups, *([3] * rank)), group=groups
    )
    for follower in followers:
        if follower == "norm":
            tensor = norm_node(builder, generator, tensor, filters)
            continue
        ones = [1] * rank
        shape = [(), (1,), (filters, *ones), (1, filters, *ones)][int(generator.integers(4))]
        values = generator.choice([-1, 1], shape) * generator.uniform(0.5, 2.0, shape)
        factor = builder.constant(values.astype(np.float32))
        if follower == "rsub":
            tensor = builder.node("Sub", factor, tensor)
        elif follower in ("Mul", "Add") and generator.random() < 0.5:
            tensor = builder.node(follower, factor, tensor)
        else:
            tensor = builder.node(follower, tensor, factor)
    if relu:
        tensor = builder.node("Relu", tensor)
    feeds = {"x": normal(generator, 2, channels, *([5] * rank))}
    kinds = prepared(builder.model(tensor), feeds)
    assert kinds == ["Conv", "Relu"] if relu else ["Conv"]


def test_a_folded_normalization_has_the_published_weights() -> None:
    # gamma (w x + b - mean) / sqrt(variance + epsilon) + beta, with whole numbers throughout.
    builder = Builder(opset=21)
    conv = builder.node(
        "Conv",
        builder.input("x", [1, 1, 4]),
        builder.constant(np.array([[[3.0]], [[5.0]]], np.float32)),
        builder.constant(np.array([1.0, 2.0], np.float32)),
    )
    statistics = [[4.0, 6.0], [7.0, 8.0], [2.0, 3.0], [3.0, 15.0]]
    output = builder.node(
        "BatchNormalization",
        conv,
        *(builder.constant(np.array(entry, np.float32)) for entry in statistics),
        epsilon=1.0,
    )
    loaded = load(builder.model(output))
    prepare(loaded)
    (node,) = loaded.graph
    weights, bias = (value.const_value for value in node.inputs[1:] if value is not None)
    assert weights is not None
    assert bias is not None
    # 4/2 and 6/4
    np.testing.assert_array_equal(weights.numpy(), [[[6.0]], [[7.5]]])
    np.testing.assert_array_equal(bias.numpy(), [(1 - 2) * 2 + 7, (2 - 3) * 1.5 + 8])


@pytest.mark.parametrize(
    "case",
    [
        "width",
        "batch",
        "rank",
        "wider",
        "reversed Div",
        "Div by zero",
        "overflow",
        "used twice",
        "output",
        "computed",
        "square",
        "training",
        "negative variance",
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_not_affine_stays(case: str) -> None:
    generator = np.random.default_rng(1)
    builder = Builder(opset=21)
    filters = 1 if case == "wider" else 4
    x = builder.input("x", [3, 2, 4, 4])
    conv = conv_node(builder, generator, x, (filters, 2, 1, 1))
    outputs = []
    if case == "width":  # a vector of four belongs to the last axis, not to the four channels
        outputs.append(builder.node("Mul", conv, builder.constant(normal(generator, 4))))
    elif case == "batch":
        outputs.append(builder.node("Add", conv, builder.constant(normal(generator, 3, 1, 1, 1))))
    elif case == "rank":
        wide = builder.constant(normal(generator, 2, 1, 4, 1, 1))
        outputs.append(builder.node("Mul", conv, wide))
    elif case == "wider":  # one channel becomes four
        outputs.append(builder.node("Add", conv, builder.constant(normal(generator, 4, 1, 1))))
    elif case == "reversed Div":
        outputs.append(builder.node("Div", builder.constant(np.float32(2)), conv))
    elif case == "Div by zero":
        zero = np.array([1, 0, 2, 3], np.float32).reshape(4, 1, 1)
        outputs.append(
            builder.node(
                "Clip", builder.node("Div", conv, builder.constant(zero)), *bounds(builder)
            )
        )
    elif case == "overflow":
        huge = builder.node("Mul", conv, builder.constant(np.float32(3e38)))
        outputs.append(builder.node("Clip", huge, *bounds(builder)))
    elif case == "used twice":
        outputs.append(builder.node("Mul", conv, builder.constant(np.float32(2))))
        outputs.append(builder.node("Relu", conv))
    elif case == "output":
        outputs.extend([conv, builder.node("Mul", conv, builder.constant(np.float32(2)))])
    elif case == "computed":
        outputs.append(builder.node("Mul", conv, builder.node("ReduceMax", x)))
    elif case == "square":
        outputs.append(builder.node("Mul", conv, conv))
    else:
        arrays = [normal(generator, 4) for _ in range(3)]
        arrays.append(np.full(4, -1.0 if case == "negative variance" else 0.5, np.float32))
        constants = [builder.constant(array) for array in arrays]
        training = case == "training"
        names = ["norm", "mean", "variance"] if training else ["norm"]
        builder.nodes.append(
            onnx.helper.make_node(
                "BatchNormalization", [conv, *constants], names, "norm", training_mode=int(training)
            )
        )
        outputs.append("norm")
    kinds = [node.op_type for node in builder.nodes]
    model = builder.model(*outputs)
    loaded = load(model)
    prepare(loaded)
    assert [node.op_type for node in loaded.graph] == kinds
    if case != "negative variance":  # which computes NaN
        check(loaded, model, {"x": normal(generator, 3, 2, 4, 4)})


def bounds(builder: Builder) -> list[str]:
    return [builder.constant(np.float32(bound)) for bound in (-1e30, 1e30)]


def test_what_only_a_body_uses_stays() -> None:
    # The only user of the convolution is a Mul inside the branches of an If.
    generator = np.random.default_rng(2)
    builder = Builder(opset=21)
    x = builder.input("x", [1, 2, 4])
    conv = conv_node(builder, generator, x, (3, 2, 1))
    positive = builder.node(
        "Greater", builder.node("ReduceSum", x, keepdims=0), builder.constant(np.float32(0))
    )
    branches = {}
    for name, factor in (("then_branch", 2.0), ("else_branch", 3.0)):
        value = onnx.helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, [1, 3, 4])
        nodes = [onnx.helper.make_node("Mul", [conv, f"{name}_c"], [f"{name}_out"], name)]
        if name == "else_branch":
            nodes = [onnx.helper.make_node("Identity", [f"{name}_c"], [f"{name}_out"], name)]
        constant = np.full((1, 3, 4), factor, np.float32)
        if name == "then_branch":
            constant = np.array(factor, np.float32)
        branches[name] = onnx.helper.make_graph(
            nodes, name, [], [value], [onnx.numpy_helper.from_array(constant, f"{name}_c")]
        )
    output = builder.node("If", positive, **branches)
    model = builder.model(output, shape=[1, 3, 4])
    for sign in (1, -1):
        feeds = {"x": sign * np.abs(normal(generator, 1, 2, 4))}
        assert prepared(model, feeds) == ["Conv", "ReduceSum", "Greater", "If"]


@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6), (5, 1), (5, 6), "computed"])
@pytest.mark.parametrize("trans_a, trans_b", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (2.0, 3.0)])
def test_gemm_becomes_plain(
    bias: Any, trans_a: int, trans_b: int, alpha: float, beta: float
) -> None:
    generator = np.random.default_rng(3)
    builder = Builder(opset=21)
    shape = (4, 5) if trans_a else (5, 4)
    operands = [
        builder.input("x", shape),
        builder.constant(normal(generator, *((6, 4) if trans_b else (4, 6)))),
    ]
    if bias == "computed":
        operands.append(builder.node("ReduceMax", "x", keepdims=0))
    elif bias is not None:
        operands.append(builder.constant(normal(generator, *bias)))
    output = builder.node(
        "Gemm", *operands, name="fc", alpha=alpha, beta=beta, transA=trans_a, transB=trans_b
    )
    model = builder.model(output)
    feeds = {"x": normal(generator, *shape)}
    kinds = prepared(model, feeds)
    separate = bias in ((5, 1), (5, 6), "computed")
    assert kinds.count("Add") == (1 if separate else 0)
    loaded = load(model)
    prepare(loaded)
    (gemm,) = (node for node in loaded.graph if node.op_type == "Gemm")
    assert gemm.name == "fc"
    assert {"alpha", "beta"} & set(gemm.attributes) <= (
        {"alpha", "beta"} if alpha == beta == 1.0 and not separate else set()
    )
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        assert tuple(gemm.inputs[2].shape or ()) == (6,)


def test_shared_weights_are_not_changed_for_others() -> None:
    generator = np.random.default_rng(4)
    builder = Builder(opset=21)
    x = builder.input("x", [1, 2, 5])
    weights = builder.constant(normal(generator, 3, 2, 1), "shared")
    bias = builder.constant(normal(generator, 3), "shared_bias")
    folded = norm_node(builder, generator, builder.node("Conv", x, weights, bias, name="a"), 3)
    scaled = builder.node(
        "Mul",
        builder.node("Conv", x, weights, bias, name="b"),
        builder.constant(np.float32(0.1)),
    )
    plain = builder.node("Conv", x, weights, bias, name="c")
    other = builder.node("Neg", weights)
    model = builder.model(folded, scaled, plain, other)
    assert prepared(model, {"x": normal(generator, 1, 2, 5)}) == ["Conv", "Conv", "Conv", "Neg"]


def test_shared_gemm_weights_are_not_changed_for_others() -> None:
    generator = np.random.default_rng(5)
    builder = Builder(opset=21)
    x = builder.input("x", [3, 4])
    weights = builder.constant(normal(generator, 4, 4), "shared")
    scaled = builder.node("Gemm", x, weights, name="a", alpha=0.5)
    plain = builder.node("Gemm", x, weights, name="b", transB=1)
    product = builder.node("MatMul", x, weights, name="c")
    model = builder.model(scaled, plain, product)
    assert prepared(model, {"x": normal(generator, 3, 4)}) == ["Gemm", "Gemm", "MatMul"]


def test_what_is_folded_may_be_an_output_and_a_value_of_others() -> None:
    generator = np.random.default_rng(6)
    builder = Builder(opset=21)
    conv = conv_node(builder, generator, builder.input("x", [1, 2, 5]), (3, 2, 1))
    norm = norm_node(builder, generator, conv, 3)
    model = builder.model(norm, builder.node("Relu", norm))
    assert prepared(model, {"x": normal(generator, 1, 2, 5)}) == ["Conv", "Relu"]


def test_names_of_initializers_are_free_ones() -> None:
    builder = Builder(opset=21)
    x = builder.input("x", [2, 2])
    output = builder.node("MatMul", x, builder.constant(np.eye(2, dtype=np.float32)), name="fc")
    graph = load(builder.model(output)).graph
    taken = {"x", "fc_out", *(str(name) for name in graph.initializers)}
    for wanted in ("x", "fc_out", "new", "new", "new"):
        value = add_initializer(graph, wanted, np.zeros(3, np.float32))
        assert value.name not in taken
        assert graph.initializers[str(value.name)] is value
        taken.add(str(value.name))
    assert "new" in taken
