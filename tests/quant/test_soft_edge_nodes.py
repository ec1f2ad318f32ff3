"""The functions that ONNX models carry, in onnxruntime, against the definition in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import ModelError
from bitwright.quant.layers import layer_nodes, quantized_precision
from bitwright.quant.load import load
from bitwright.quant.soft_edge_nodes import (
    decode_attributes,
    encode_attributes,
    soft_edge_functions,
)
from bitwright.soft_edge import QUAMBA_SE, SoftEdge
from tests.driver.test_soft_edge import EXAMPLE, layouts
from tests.quant.qdq import Array, profile

STEP = np.float32(0.3)


def model_of(layout: SoftEdge, opset: int = 21, shape: Any = ("N", 3)) -> onnx.ModelProto:
    """Codes, whole steps and values of an input."""
    helper = onnx.helper
    nodes = [
        helper.make_node(
            "SoftEdgeEncode",
            ["x", "step"],
            ["codes"],
            "encode",
            domain="bitwright",
            **encode_attributes(layout),
        ),
        helper.make_node(
            "SoftEdgeDecode",
            ["codes"],
            ["steps"],
            "decode",
            domain="bitwright",
            **decode_attributes(layout),
        ),
        helper.make_node("DequantizeLinear", ["steps", "step"], ["y"], "dequantize"),
        helper.make_node("MatMul", ["y", "w"], ["z"], "product"),
    ]
    outputs = [
        helper.make_tensor_value_info("codes", _kind(layout.dtype), shape),
        helper.make_tensor_value_info("steps", onnx.TensorProto.INT16, shape),
        helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, (shape[0], 2)),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        outputs,
        [
            onnx.numpy_helper.from_array(np.array(STEP), "step"),
            onnx.numpy_helper.from_array(np.ones((3, 2), np.float32), "w"),
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("bitwright", 1)]
    functions = soft_edge_functions(opset)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def _kind(dtype: str) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def run(model: onnx.ModelProto, x: Array, *, optimize: bool = False) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(["codes", "steps", "y"], {"x": x})
    return found


def check(layout: SoftEdge, x: Array, **options: Any) -> None:
    codes, steps, y = run(model_of(layout), x, **options)
    expected = layout.encode(x, float(STEP))
    assert codes.dtype == expected.dtype
    np.testing.assert_array_equal(codes, expected)
    assert steps.dtype == np.int16
    np.testing.assert_array_equal(steps, layout.decode(expected))
    np.testing.assert_array_equal(y, layout.decode(expected) * STEP)


def hard_values(layout: SoftEdge) -> Array:
    """Ties, limits, and what lies next to them, in values of many steps and in special ones."""
    halves = np.arange(2 * layout.value_min - 9, 2 * layout.value_max + 10) / 2.0
    exact = (halves * np.float64(STEP)).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-40], np.float32)
    values = [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))]
    flat = np.concatenate([*values, special])
    return np.resize(flat, (-(-flat.size // 3), 3))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("layout", [QUAMBA_SE, EXAMPLE], ids=["quamba-se", "example"])
def test_hard_values_are_equal_in_onnxruntime(layout: SoftEdge, optimize: bool) -> None:
    check(layout, hard_values(layout), optimize=optimize)


@profile(40)
@given(layouts(), st.integers(0, 2**32 - 1))
def test_any_layout_is_equal_in_onnxruntime(layout: SoftEdge, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_t(2, (40, 3)).astype(np.float32) * 20
    check(layout, np.concatenate([x, hard_values(layout)]))


@pytest.mark.parametrize("opset", [21, 23, 25])
def test_models_are_valid_at_every_operator_set(opset: int) -> None:
    model = model_of(QUAMBA_SE, opset)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.version for f in model.functions for entry in f.opset_import} == {opset}
    for shape in ((0, 3), (4, 3)):
        x = np.full(shape, 5, np.float32)
        codes, steps, y = run(model, x)
        assert codes.shape == steps.shape == y.shape == shape


def test_one_pair_of_functions_serves_all_layouts() -> None:
    first, second = soft_edge_functions(21), soft_edge_functions(21)
    assert first == second
    assert [f.name for f in first] == ["SoftEdgeEncode", "SoftEdgeDecode"]
    operators = {node.domain for function in first for node in function.node}
    assert operators == {""}  # standard ones alone


# -- loading -------------------------------------------------------------------------------------


def test_functions_stay_nodes_and_shapes_go_through_them() -> None:
    loaded = load(model_of(EXAMPLE))
    assert [node.op_type for node in loaded.graph] == [
        *("SoftEdgeEncode", "SoftEdgeDecode", "DequantizeLinear", "MatMul")
    ]
    encode, decode, dequantize, product = loaded.graph
    assert str(encode.outputs[0].dtype) == "UINT8"
    assert str(decode.outputs[0].dtype) == "INT16"
    for node in (encode, decode, dequantize):
        assert node.outputs[0].shape is not None
        assert str(node.outputs[0].shape) == "[N,3]"
    assert product.outputs[0].shape is not None
    assert product.outputs[0].shape[1] == 2
    assert loaded.is_quantized
    assert quantized_precision(layer_nodes(loaded)["product"]) is None  # float weights
    again = load(loaded.to_proto())
    assert again.structure_hash == loaded.structure_hash
    x = hard_values(EXAMPLE)
    for ours, theirs in zip(run(loaded.to_proto(), x), run(model_of(EXAMPLE), x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_shapes_that_are_fixed_go_through_them() -> None:
    loaded = load(model_of(QUAMBA_SE)).with_input_shapes({"x": [5, 3]})
    assert all(node.outputs[0].shape == [5, 3] for node in list(loaded.graph)[:3])


def test_other_functions_of_the_domain_are_inlined() -> None:
    model = model_of(QUAMBA_SE)
    twice = onnx.helper.make_function(
        "bitwright",
        "Twice",
        ["a"],
        ["b"],
        [onnx.helper.make_node("Add", ["a", "a"], ["b"])],
        [onnx.helper.make_opsetid("", 21)],
    )
    model.functions.append(twice)
    model.graph.node.append(onnx.helper.make_node("Twice", ["z"], ["t"], domain="bitwright"))
    float_kind = onnx.TensorProto.FLOAT
    model.graph.output.append(onnx.helper.make_tensor_value_info("t", float_kind, ["N", 2]))
    operators = [node.op_type for node in load(model).graph]
    assert operators[-1] == "Add"
    assert operators[0] == "SoftEdgeEncode"


def changed(name: str, value: Any, node: int = 0) -> onnx.ModelProto:
    model = model_of(EXAMPLE)
    entry = next(a for a in model.graph.node[node].attribute if a.name == name)
    model.graph.node[node].attribute.remove(entry)
    if value is not None:
        model.graph.node[node].attribute.append(onnx.helper.make_attribute(name, value))
    return model


@pytest.mark.parametrize(
    "model, what",
    [
        (changed("layout", "uint8:0:nothing"), r"'encode': 'uint8:0:nothing' is no soft-edge"),
        (changed("layout", None), r"'encode': '' is no soft-edge"),
        (changed("layout", "uint8:3:2@0<<0<=1,2@2<<1:4@0<<0", 1), "'decode': its attribute signs"),
        (changed("limits", [1.0] * 5), "'encode': its attribute limits is"),
        (changed("dtype", onnx.TensorProto.INT16), "'encode': its attribute dtype is 5"),
        (changed("strides", [1, 1, 4, 1, 4], 1), "'decode': its attribute strides is"),
        (changed("gaps", None, 1), "'decode': its attribute gaps is None"),
    ],
)
def test_layouts_that_say_something_else(model: onnx.ModelProto, what: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        load(model)
    assert "quantize the float model again" in str(caught.value)


def read_as(**nodes: Any) -> onnx.ModelProto:
    """Steps of an input, and what reads them: names with operator and inputs, ``y`` the last."""
    helper = onnx.helper
    model = model_of(EXAMPLE)
    del model.graph.node[2:], model.graph.output[:]
    for name, (kind, *inputs) in nodes.items():
        model.graph.node.append(helper.make_node(kind, inputs, [name], f"the_{name}"))
    arrays = {"zero": np.int16(0), "other": np.int16(300), "two": np.full(3, STEP)}
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(array), name))
    model.graph.input.append(helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, ()))
    model.graph.output.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None))
    return model


def test_steps_are_dequantized_with_one_scale_and_zero_point_0() -> None:
    load(read_as(y=("DequantizeLinear", "steps", "step")))
    load(read_as(y=("DequantizeLinear", "steps", "step", "zero")))


@pytest.mark.parametrize(
    "nodes, why",
    [
        # The codes stand around 0, so Relu of them would not be Relu of these values.
        (
            {"z": ("DequantizeLinear", "steps", "step", "other"), "y": ("Relu", "z")},
            "DequantizeLinear 'the_z' has a zero point other than 0",
        ),
        (
            {"y": ("DequantizeLinear", "steps", "given")},
            "DequantizeLinear 'the_y' has no constant scale",
        ),
        (
            {"y": ("DequantizeLinear", "steps", "two")},
            "DequantizeLinear 'the_y' has no constant scale, one for the tensor",
        ),
        (
            {"z": ("Transpose", "steps"), "y": ("DequantizeLinear", "z", "step")},
            "Transpose 'the_z' reads its steps, not DequantizeLinear",
        ),
    ],
)
def test_steps_that_are_read_otherwise(nodes: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=f"{why}.*") as caught:
        load(read_as(**nodes))
    assert "SoftEdgeDecode 'decode'" in str(caught.value)
    assert "zero point 0" in str(caught.value)
