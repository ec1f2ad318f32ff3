"""What operators mean: hand-made graphs whose answers can be read off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bitwright.quant.graph import (
    attribute,
    channel_axis,
    clamp_bounds,
    constant,
    data_inputs,
    elementwise_roots,
    is_arithmetic,
    is_clamp,
    is_move,
    weight_input,
)
from bitwright.quant.load import load
from tests.quant.qdq import Array, Builder


def floats(*shape: int) -> Array:
    return np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def last_node(build: Callable[[Builder], str]) -> ir.Node:
    """The node that computes the output; the model has inputs x [2, 4, 6, 6] and m [6, 4]."""
    builder = Builder(opset=21)
    builder.input("x", [2, 4, 6, 6])
    builder.input("m", [6, 4])
    output = build(builder)
    graph = load(builder.model(output)).graph
    (node,) = (n for n in graph if n.outputs[0].name == output)
    return node


def small(builder: Builder, value: float) -> str:
    return builder.constant(np.float32(value))


def ints(builder: Builder, *values: int) -> str:
    return builder.constant(np.array(values, np.int64))


DEQUANTIZED = np.arange(8, dtype=np.int8).reshape(4, 2)

WEIGHTS: dict[str, tuple[Callable[[Builder], str], int | None]] = {
    "Conv": (lambda b: b.node("Conv", "x", b.constant(floats(3, 4, 1, 1))), 1),
    "Conv of computed weights": (lambda b: b.node("Conv", "x", b.node("Neg", "x")), None),
    "Gemm": (lambda b: b.node("Gemm", "m", b.constant(floats(4, 2))), 1),
    "Gemm of a constant and a product": (
        lambda b: b.node("Gemm", b.constant(floats(2, 6)), "m"),
        None,
    ),
    "MatMul right": (lambda b: b.node("MatMul", "m", b.constant(floats(4, 2))), 1),
    "MatMul left": (lambda b: b.node("MatMul", b.constant(floats(2, 6)), "m"), 0),
    "MatMul of two activations": (
        lambda b: b.node("MatMul", "m", b.node("Transpose", "m", perm=[1, 0])),
        None,
    ),
    "dequantized weights": (
        lambda b: b.node("MatMul", "m", b.weights(DEQUANTIZED, np.float32(0.1), bits=8)),
        1,
    ),
    "no layer": (lambda b: b.node("Add", "m", b.constant(floats(6, 4))), None),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_layers_and_where_their_weights_are(case: str) -> None:
    build, index = WEIGHTS[case]
    assert weight_input(last_node(build)) == index


@pytest.mark.parametrize(
    "build, rank, axis",
    [
        (lambda b: b.node("Conv", "x", b.constant(floats(3, 4, 1, 1))), 4, 0),
        (lambda b: b.node("Gemm", "m", b.constant(floats(4, 2))), 2, 1),
        (lambda b: b.node("Gemm", "m", b.constant(floats(2, 4)), transB=1), 2, 0),
        (lambda b: b.node("MatMul", "m", b.constant(floats(4, 2))), 2, 1),
        (lambda b: b.node("MatMul", "m", b.constant(floats(3, 4, 2))), 3, 2),
        (lambda b: b.node("MatMul", b.constant(floats(2, 6)), "m"), 2, 0),
        (lambda b: b.node("MatMul", b.constant(floats(3, 2, 6)), "m"), 3, 1),
        (lambda b: b.node("MatMul", "m", b.constant(floats(4))), 1, None),
        (lambda b: b.node("MatMul", b.constant(floats(6)), "m"), 1, None),
    ],
)
def test_channel_axis(build: Callable[[Builder], str], rank: int, axis: int | None) -> None:
    assert channel_axis(last_node(build), rank) == axis


MOVES: dict[str, tuple[Callable[[Builder], str], bool]] = {
    "Reshape": (lambda b: b.node("Reshape", "x", ints(b, 2, -1)), True),
    "MaxPool": (lambda b: b.node("MaxPool", "x", kernel_shape=[2, 2]), True),
    "AveragePool": (lambda b: b.node("AveragePool", "x", kernel_shape=[2, 2]), False),
    "Concat": (lambda b: b.node("Concat", "x", "x", axis=1), True),
    "Pad": (lambda b: b.node("Pad", "m", ints(b, 0, 1, 0, 1)), True),
    "Pad with 0": (lambda b: b.node("Pad", "m", ints(b, 0, 1, 0, 1), small(b, 0)), True),
    "Pad with 1": (lambda b: b.node("Pad", "m", ints(b, 0, 1, 0, 1), small(b, 1)), False),
    "Pad with axes": (lambda b: b.node("Pad", "m", ints(b, 1, 1), "", ints(b, 0)), True),
    "Pad with something computed": (
        lambda b: b.node("Pad", "m", ints(b, 0, 1, 0, 1), b.node("ReduceMax", "m", keepdims=0)),
        False,
    ),
    "Pad by reflection": (
        lambda b: b.node("Pad", "m", ints(b, 0, 1, 0, 1), small(b, 1), mode="reflect"),
        True,
    ),
    "Resize nearest": (
        lambda b: b.node("Resize", "m", "", b.constant(np.array([2, 2], np.float32))),
        True,
    ),
    "Resize linear": (
        lambda b: b.node(
            "Resize", "m", "", b.constant(np.array([2, 2], np.float32)), mode="linear"
        ),
        False,
    ),
    "Resize that crops": (
        lambda b: b.node(
            "Resize",
            "m",
            b.constant(np.array([0, 0, 2, 2], np.float32)),
            b.constant(np.array([2, 2], np.float32)),
            coordinate_transformation_mode="tf_crop_and_resize",
        ),
        False,
    ),
    "Dropout": (lambda b: b.node("Dropout", "m"), True),
    "Dropout in training": (
        lambda b: b.node("Dropout", "m", small(b, 0.5), b.constant(np.array(True))),
        False,
    ),
    "Gather of an activation": (lambda b: b.node("Gather", "m", ints(b, 1)), True),
    "Relu": (lambda b: b.node("Relu", "m"), False),
    "Softmax": (lambda b: b.node("Softmax", "m"), False),
}


@pytest.mark.parametrize("case", MOVES)
def test_moves(case: str) -> None:
    build, expected = MOVES[case]
    assert is_move(last_node(build)) is expected


def test_no_move_with_indices_or_of_a_table() -> None:
    builder = Builder(opset=21)
    builder.input("x", [1, 1, 4, 4])
    builder.inputs.append(onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [3]))
    builder.nodes.append(
        onnx.helper.make_node("MaxPool", ["x"], ["pooled", "where"], "pool", kernel_shape=[2, 2])
    )
    embedded = builder.node("Gather", builder.constant(floats(7, 2)), "i", name="embedding")
    model = builder.model("pooled", embedded)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("where", onnx.TensorProto.INT64, [1, 1, 3, 3])
    )
    graph = load(model).graph
    assert [is_move(node) for node in graph] == [False, False]


CLAMPS: dict[str, tuple[Callable[[Builder], str], tuple[float, float] | None]] = {
    "Relu": (lambda b: b.node("Relu", "x"), (0.0, np.inf)),
    "Clip": (lambda b: b.node("Clip", "x", small(b, -1.5), small(b, 6)), (-1.5, 6.0)),
    "from below": (lambda b: b.node("Clip", "x", small(b, 2)), (2.0, np.inf)),
    "from above": (lambda b: b.node("Clip", "x", "", small(b, 2)), (-np.inf, 2.0)),
    "nothing": (lambda b: b.node("Clip", "x"), (-np.inf, np.inf)),
    "computed": (
        lambda b: b.node("Clip", "x", b.node("ReduceMax", "x", keepdims=0)),
        None,
    ),
    "LeakyRelu": (lambda b: b.node("LeakyRelu", "x"), None),
}


@pytest.mark.parametrize("case", CLAMPS)
def test_clamps(case: str) -> None:
    build, bounds = CLAMPS[case]
    node = last_node(build)
    assert clamp_bounds(node) == bounds
    assert is_clamp(node) is (bounds is not None)


ARITHMETIC: dict[str, tuple[Callable[[Builder], str], bool]] = {
    "Add": (lambda b: b.node("Add", "x", "x"), True),
    "Sub": (lambda b: b.node("Sub", "x", b.constant(floats(6))), True),
    "Mul": (lambda b: b.node("Mul", "x", "x"), True),
    "Div": (lambda b: b.node("Div", "x", "x"), False),
    "GlobalAveragePool": (lambda b: b.node("GlobalAveragePool", "x"), True),
    "AveragePool": (lambda b: b.node("AveragePool", "x", kernel_shape=[2, 2]), True),
    "ReduceMean": (lambda b: b.node("ReduceMean", "x", ints(b, 2, 3)), True),
    "ReduceSum": (lambda b: b.node("ReduceSum", "x"), True),
    "ReduceMax": (lambda b: b.node("ReduceMax", "x"), False),
}


@pytest.mark.parametrize("case", ARITHMETIC)
def test_arithmetic(case: str) -> None:
    build, expected = ARITHMETIC[case]
    assert is_arithmetic(last_node(build)) is expected


def test_no_arithmetic_over_axes_that_are_computed() -> None:
    builder = Builder(opset=21)
    builder.input("x", [2, 4])
    builder.inputs.append(onnx.helper.make_tensor_value_info("axes", onnx.TensorProto.INT64, [1]))
    output = builder.node("ReduceMean", "x", "axes")
    (node,) = load(builder.model(output, shape=[None, None])).graph
    assert not is_arithmetic(node)


def test_data_inputs() -> None:
    def of(build: Callable[[Builder], str]) -> list[int]:
        return data_inputs(last_node(build))

    assert of(lambda b: b.node("Concat", "x", "x", "x", axis=0)) == [0, 1, 2]
    assert of(lambda b: b.node("Add", "x", "x")) == [0, 1]
    assert of(lambda b: b.node("Reshape", "x", ints(b, -1))) == [0]
    assert of(lambda b: b.node("Clip", "x", small(b, 0), small(b, 1))) == [0]


def test_constants_and_attributes() -> None:
    node = last_node(
        lambda b: b.node("LeakyRelu", b.node("Add", "m", b.constant(floats(4))), alpha=0.5)
    )
    assert attribute(node, "alpha", 0.01) == 0.5
    assert attribute(node, "beta", 7) == 7
    addition = node.inputs[0].producer()  # type: ignore[union-attr]
    assert addition is not None
    np.testing.assert_array_equal(constant(addition.inputs[1]), floats(4))
    assert constant(addition.inputs[0]) is None
    assert constant(None) is None


# -- functions of one value, element by element ---------------------------------------------------

ROOTS: dict[str, tuple[Callable[[Builder], str], str | None]] = {
    "one function": (lambda b: b.node("Sigmoid", "x"), "x"),
    "a chain": (lambda b: b.node("Tanh", b.node("Mul", small(b, 2), b.node("Exp", "x"))), "x"),
    "x times sigmoid(x)": (lambda b: b.node("Mul", "x", b.node("Sigmoid", "x")), "x"),
    "hard-swish by hand": (
        lambda b: b.node(
            "Mul",
            "x",
            b.node(
                "Div",
                b.node("Clip", b.node("Add", "x", small(b, 3)), small(b, 0), small(b, 6)),
                small(b, 6),
            ),
        ),
        "x",
    ),
    "the same value twice": (lambda b: b.node("Add", "x", "x"), "x"),
    "one number of full rank": (
        lambda b: b.node("Mul", "x", b.constant(np.full((1, 1, 1, 1), 2, np.float32))),
        "x",
    ),
    "a clamp": (lambda b: b.node("Relu", "x"), "x"),
    "power": (lambda b: b.node("Pow", "x", small(b, 2)), "x"),
    "two roots": (
        lambda b: b.node("Add", b.node("Exp", "x"), b.node("Transpose", "x", perm=[0, 1, 3, 2])),
        None,
    ),
    "behind a move": (lambda b: b.node("Exp", b.node("Transpose", "x")), "Transpose_0_out"),
    "one number a channel": (
        lambda b: b.node("Mul", "x", b.constant(floats(4, 1, 1))),
        None,
    ),
    "one number of a higher rank": (
        lambda b: b.node("Mul", "m", b.constant(np.full((1, 1, 1), 2, np.float32))),
        None,
    ),
    "no function of one value": (lambda b: b.node("Softmax", "x"), None),
    "an average": (lambda b: b.node("ReduceMean", "x"), None),
    "a bound that is computed": (
        lambda b: b.node("Clip", "x", b.node("ReduceMax", "x", keepdims=0)),
        None,
    ),
    "whole numbers": (
        lambda b: b.node("Cast", b.node("Abs", b.node("Cast", "x", to=7)), to=1),
        None,
    ),
}


@pytest.mark.parametrize("case", ROOTS)
def test_elementwise_roots(case: str) -> None:
    build, expected = ROOTS[case]
    node = last_node(build)
    assert node.graph is not None
    graph: Any = node.graph
    root = elementwise_roots(graph).get(node.outputs[0])
    assert (None if root is None else root.name) == expected


def test_unknown_ranks_take_plain_numbers_only() -> None:
    # The rank of the reshaped x is unknown, so [[2]] may raise it.
    builder = Builder(opset=21)
    builder.input("x", [4])
    builder.inputs.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.INT64, ["K"]))
    reshaped = builder.node("Reshape", "x", "s", name="reshaped")
    plain = builder.node("Mul", reshaped, builder.constant(np.float32(2)))
    matrix = builder.node("Mul", reshaped, builder.constant(np.full((1, 1), 2, np.float32)))
    model = builder.model(plain, matrix, shape=[None, None])
    graph = load(model).graph
    roots = {value.name: root.name for value, root in elementwise_roots(graph).items()}
    assert roots == {plain: "reshaped_out"}


def test_excluded_nodes_end_a_chain() -> None:
    node = last_node(lambda b: b.node("Tanh", b.node("Exp", "x", name="middle")))
    graph: Any = node.graph
    (middle,) = (n for n in graph if n.name == "middle")
    roots = {v.name: root.name for v, root in elementwise_roots(graph, excluded={middle}).items()}
    assert roots == {"Tanh_1_out": "middle_out"}
