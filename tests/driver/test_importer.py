"""The importer: the form of what it emits, and that it computes what onnxruntime computes."""

# The functions in TVMScript are parsed by TVM; their annotations are no Python types.
# mypy: disable-error-code="untyped-decorator, valid-type"

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from tvm import relax
from tvm.script import relax as R  # noqa: N812  # TVM's own name in scripts

import bitwright
from benchmarks import models
from bitwright.errors import ModelError
from bitwright.importer import PRECISIONS, import_model
from bitwright.passes import lower_cond, scan_recursion
from bitwright.passes.lower_scan import LowerScan
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.reference import Reference
from tests.passes.modules import transform
from tests.quant.qdq import (
    Array,
    Builder,
    profile,
    residual_network,
    run_onnxruntime,
)


def imported(model: onnx.ModelProto) -> Any:
    return import_model(load(model))


def run(module: Any, *inputs: Array) -> list[Array]:
    """Compile with TVM's own schedules, but for loops and branches, and run."""
    lowered = lower_cond.lower(scan_recursion.lower(transform(module, LowerScan())))
    executable = tvm.compile(lowered, target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(np.array(x, order="C")) for x in inputs))
    return [result.numpy()] if hasattr(result, "numpy") else [entry.numpy() for entry in result]


def check(
    model: onnx.ModelProto, feeds: Mapping[str, Array], *, rtol: float = 1e-4, atol: float = 1e-6
) -> Any:
    """Compare with onnxruntime; return the module."""
    module = imported(model)
    expected = run_onnxruntime(model, feeds)
    found = run(module, *feeds.values())
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)
    return module


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def calls(module: Any) -> list[tuple[str, str]]:
    """Node and operator of every call of ``main``, in order."""
    found = []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call):
                found.append((value.span.source_name.name, value.op.name.removeprefix("relax.")))
    return found


def single(
    operator: str, *inputs: Array, opset: int = 21, outputs: int = 1, **attributes: Any
) -> onnx.ModelProto:
    """A model of one operator: its first input is the model's, the others are constants."""
    builder = Builder(opset=opset)
    data, *others = inputs
    kind = onnx.helper.np_dtype_to_tensor_dtype(data.dtype)
    builder.inputs.append(onnx.helper.make_tensor_value_info("x", kind, data.shape))
    names = ["x", *(builder.constant(array) for array in others)]
    found = [f"y{index}" for index in range(outputs)]
    builder.nodes.append(onnx.helper.make_node(operator, names, found, "node", **attributes))
    return builder.model(*found)


# -- structure ---------------------------------------------------------------------------------


def same(module: Any, main: Any) -> None:
    tvm.ir.assert_structural_equal(module["main"], main)


def test_a_quantized_convolution_with_a_bias_of_codes() -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", ["N", 2, 5, 5]), TensorQuantization(0.5, 3, 8, False))
    weights = np.arange(-27, 27).reshape(3, 2, 3, 3)
    scales = np.array([0.1, 0.2, 0.3], np.float32)
    w = builder.weights(weights, scales, bits=8, axis=0)
    b = builder.weights(np.array([7, -8, 9]), scales * np.float32(0.5), bits=32, axis=0)
    y = builder.node("Conv", x, w, b, name="conv", pads=[1, 0, 2, 1], strides=[2, 1])
    relu = builder.node("Relu", y, name="relu")
    out = builder.activation(relu, TensorQuantization(0.25, 0, 8, False))

    codes, zeros = weights.astype(np.int8), np.zeros(3, np.int8)
    bias, bias_scales = np.array([7, -8, 9], np.int32).reshape(1, 3, 1, 1), scales * np.float32(0.5)
    no_bias = np.zeros(3, np.int32)

    @R.function
    def main(x: R.Tensor(("N", 2, 5, 5), "float32")) -> R.Tensor(("N", 3, 3, 4), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            q = R.quantize(
                x, R.const(0.5, "float32"), R.const(3, "uint8"), axis=0, out_dtype="uint8"
            )
            dq = R.dequantize(
                q, R.const(0.5, "float32"), R.const(3, "uint8"), axis=0, out_dtype="float32"
            )
            w = R.dequantize(
                R.const(codes), R.const(scales), R.const(zeros), axis=0, out_dtype="float32"
            )
            conv = R.nn.conv2d(dq, w, strides=[2, 1], padding=[1, 0, 2, 1])
            b = R.dequantize(
                R.const(bias),
                R.const(bias_scales),
                R.const(no_bias),
                axis=1,
                out_dtype="float32",
            )
            y = R.add(conv, b)
            relu = R.nn.relu(y)
            q2 = R.quantize(
                relu, R.const(0.25, "float32"), R.const(0, "uint8"), axis=0, out_dtype="uint8"
            )
            dq2 = R.dequantize(
                q2, R.const(0.25, "float32"), R.const(0, "uint8"), axis=0, out_dtype="float32"
            )
            gv = dq2
            R.output(gv)
        return gv

    model = builder.model(out)
    same(imported(model), main)
    check(model, {"x": normal(2, 2, 5, 5)}, atol=0.25)


def test_narrow_codes_are_bytes_cut_to_their_range() -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", ["N", 4]), TensorQuantization(0.5, -2, 4, True))
    weights = builder.weights(np.array([[1, -2, 1], [0, 1, -1]] * 2), 0.25, bits=2)
    y = builder.node("MatMul", x, weights, name="fc")
    codes = np.array([[1, -2, 1], [0, 1, -1]] * 2, np.int8)

    @R.function
    def main(x: R.Tensor(("N", 4), "float32")) -> R.Tensor(("N", 3), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            q = R.quantize(
                x, R.const(0.5, "float32"), R.const(-2, "int8"), axis=0, out_dtype="int8"
            )
            cut = R.clip(q, -8, 7)
            dq = R.dequantize(
                cut, R.const(0.5, "float32"), R.const(-2, "int8"), axis=0, out_dtype="float32"
            )
            w = R.dequantize(
                R.const(codes),
                R.const(0.25, "float32"),
                R.const(0, "int8"),
                axis=0,
                out_dtype="float32",
            )
            y = R.matmul(dq, w)
            gv = y
            R.output(gv)
        return gv

    model = builder.model(y)
    module = imported(model)
    same(module, main)
    assert dict(module.attrs[PRECISIONS].items()) == {"fc": "w2a4"}
    check(model, {"x": 10 * normal(5, 4)})


def test_gemm_folds_the_transposition_of_its_codes() -> None:
    builder = Builder()
    x = builder.input("x", [2, 4])
    codes, scales = np.arange(12).reshape(3, 4) - 5, np.array([0.1, 0.2, 0.3], np.float32)
    w = builder.weights(codes, scales, bits=8, axis=0)
    y = builder.node(
        "Gemm", x, w, builder.constant(normal(3)), name="fc", transB=1, alpha=0.5, beta=2.0
    )
    turned = np.ascontiguousarray(codes.T).astype(np.int8)
    zeros, bias = np.zeros(3, np.int8), normal(3)

    @R.function
    def main(x: R.Tensor((2, 4), "float32")) -> R.Tensor((2, 3), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = R.dequantize(
                R.const(turned), R.const(scales), R.const(zeros), axis=1, out_dtype="float32"
            )
            product = R.matmul(x, w)
            scaled = R.multiply(product, R.const(0.5, "float32"))
            addend = R.multiply(R.const(bias), R.const(2.0, "float32"))
            y = R.add(scaled, addend)
            gv = y
            R.output(gv)
        return gv

    model = builder.model(y)
    same(imported(model), main)
    check(model, {"x": normal(2, 4)})


def test_a_chain_of_functions_of_codes_is_one_table() -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", [3, 5]), TensorQuantization(0.25, 5, 4, False))
    y = builder.node("Mul", x, builder.node("Sigmoid", x), name="silu")
    grid = (np.arange(16, dtype=np.float32) - 5) * np.float32(0.25)
    plain = Builder()
    z = plain.input("x", [16])
    plain_model = plain.model(plain.node("Mul", z, plain.node("Sigmoid", z)))
    (values,) = run_onnxruntime(plain_model, {"x": grid})

    @R.function
    def main(x: R.Tensor((3, 5), "float32")) -> R.Tensor((3, 5), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            q = R.quantize(
                x, R.const(0.25, "float32"), R.const(5, "uint8"), axis=0, out_dtype="uint8"
            )
            cut = R.clip(q, 0, 15)
            dq = R.dequantize(
                cut, R.const(0.25, "float32"), R.const(5, "uint8"), axis=0, out_dtype="float32"
            )
            again = R.quantize(
                dq, R.const(0.25, "float32"), R.const(5, "uint8"), axis=0, out_dtype="uint8"
            )
            index = R.clip(again, 0, 15)
            wide = R.astype(index, "int32")
            y = R.take(R.const(values), wide, axis=0, mode="clip")
            gv = y
            R.output(gv)
        return gv

    model = builder.model(y)
    same(imported(model), main)
    check(model, {"x": normal(3, 5)}, rtol=0.0, atol=0.0)


def test_a_relu_of_codes_stays_and_moves_keep_codes() -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", [2, 3]), TensorQuantization(0.5, 0, 8, True))
    turned = builder.node("Transpose", builder.node("Relu", x, name="relu"), name="turn")
    module = imported(builder.model(builder.node("Tanh", turned, name="tanh")))
    assert [entry for entry in calls(module) if not entry[0].startswith(("Quant", "Dequant"))] == [
        ("relu", "nn.relu"),
        ("turn", "permute_dims"),
        ("tanh", "quantize"),
        ("tanh", "astype"),
        ("tanh", "subtract"),
        ("tanh", "take"),
    ]


def test_tables_are_those_of_the_integer_reference() -> None:
    quantization = TensorQuantization(0.03, 11, 8, False)
    builder = Builder()
    x = builder.activation(builder.input("x", [256]), quantization)
    y = builder.node("Gelu", builder.node("Clip", x, builder.constant(np.float32(-0.1))))
    model = builder.model(y)
    data = ((np.arange(256) - 11) * np.float32(0.03)).astype(np.float32)
    outputs, _ = Reference(load(model)).run({"x": data})
    (found,) = run(imported(model), data)
    np.testing.assert_array_equal(found, next(iter(outputs.values())))


@pytest.mark.parametrize(
    "bounds,operator",
    [
        ((0.0, None), "nn.relu"),
        ((-1.0, 6.0), "clip"),
        ((-0.5, None), "maximum"),
        ((None, 0.5), "minimum"),
        ((2.0, 1.0), "clip"),
    ],
)
def test_clamps(bounds: tuple[float | None, float | None], operator: str) -> None:
    builder = Builder()
    names = ["" if bound is None else builder.constant(np.float32(bound)) for bound in bounds]
    model = builder.model(builder.node("Clip", builder.input("x", ["N", 7]), *names))
    module = check(model, {"x": 3 * normal(4, 7)})
    assert [name for _, name in calls(module)] == [operator]


def test_weights_in_float_in_front_of_a_quantizer_become_codes() -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", [2, 3, 4, 4]), TensorQuantization(0.1, 0, 8, True))
    scales = builder.constant(np.array([0.1, 0.01], np.float32))
    zeros = builder.constant(np.array([0, 3], np.int8))
    codes = builder.node(
        "QuantizeLinear", builder.constant(normal(2, 3, 3, 3)), scales, zeros, axis=0
    )
    w = builder.node("DequantizeLinear", codes, scales, zeros, axis=0, name="weights")
    model = builder.model(builder.node("Conv", x, w, name="conv"))
    module = check(model, {"x": normal(2, 3, 4, 4)})
    assert calls(module)[2:] == [("weights", "dequantize"), ("conv", "nn.conv2d")]


def test_a_scale_for_each_block_of_weights() -> None:
    builder = Builder()
    codes = builder.constant(np.arange(-8, 8).reshape(4, 4).astype(ml_dtypes.int4))
    scales = builder.constant(np.abs(normal(2, 4)))
    w = builder.node("DequantizeLinear", codes, scales, axis=0, block_size=2)
    model = builder.model(builder.node("MatMul", builder.input("x", ["N", 4]), w))
    check(model, {"x": normal(3, 4)})


# -- names and shapes ----------------------------------------------------------------------------


def test_every_call_carries_the_exact_name_of_its_node() -> None:
    model = load(residual_network(np.random.default_rng(0)).model("fc_out"))
    for node in model.graph:
        node.name = f"/net.1/{node.name} [x]"
    names = {name for name, _ in calls(import_model(model))}
    assert names == {str(node.name) for node in model.graph}


def test_inputs_keep_names_and_order_and_share_symbolic_sizes() -> None:
    builder = Builder()
    a = builder.input("b.in/1", ["N", None, 3])
    b = builder.input("a", ["N", 1, "M"])
    module = imported(
        builder.model(builder.node("MatMul", a, builder.node("Concat", b, b, b, axis=1)))
    )
    first, second = module["main"].params
    assert (first.name, second.name) == ("b.in/1", "a")
    assert first.ty.shape[0].same_as(second.ty.shape[0])
    assert not first.ty.shape[1].same_as(second.ty.shape[2])
    assert int(module["main"].attrs["num_input"]) == 2


def test_several_outputs_one_of_them_an_input_and_one_a_constant() -> None:
    builder = Builder()
    x = builder.input("x", ["N", 4])
    builder.nodes.append(onnx.helper.make_node("Identity", [x], ["same"], "same"))
    y = builder.node("Exp", x)
    c = builder.node("Identity", builder.constant(normal(3)))
    check(builder.model(y, "same", c), {"x": normal(2, 4)})


def test_arithmetic_on_shapes_stays_symbolic() -> None:
    builder = Builder()
    x = builder.input("x", ["N", 4, "H", 6])

    def ints(*values: int) -> str:
        return builder.constant(np.array(values, np.int64))

    shape = builder.node("Shape", x)
    batch = builder.node("Gather", shape, builder.constant(np.int64(0)))
    half = builder.node("Div", builder.node("Slice", shape, ints(1), ints(2)), ints(2))
    target = builder.node(
        "Concat", builder.node("Unsqueeze", batch, ints(0)), ints(2), half, ints(-1), axis=0
    )
    folded = builder.node("Reshape", x, target)
    # What PyTorch exports for expand(-1, ...).
    sizes = builder.node("Concat", builder.node("Unsqueeze", batch, ints(0)), ints(-1, 2), axis=0)
    ones = builder.node(
        "ConstantOfShape", ints(3), value=onnx.numpy_helper.from_array(np.array([1]))
    )
    mask = builder.node("Equal", sizes, ints(-1))
    wide = builder.node("Where", mask, ones, sizes)
    expanded = builder.node("Expand", builder.constant(normal(1, 5, 1)), wide)
    total = builder.node("Mul", builder.node("Size", x), builder.constant(np.int64(2)))
    model = builder.model(folded, expanded, total)
    module = check(model, {"x": normal(3, 4, 5, 6)})
    n = module["main"].params[0].ty.shape[0]
    assert module["main"].ret_ty.fields[0].shape[0].same_as(n)


def test_symbolic_sizes_that_must_be_equal_are_checked_when_it_runs() -> None:
    builder = Builder()
    x = builder.input("x", ["N", 2, "H", "W"])
    w = builder.constant(normal(2, 2, 3, 3))
    small = builder.node("Conv", x, w, pads=[1] * 4, strides=[2, 2])
    scales = builder.constant(np.array([1, 1, 2, 2], np.float32))
    large = builder.node(
        "Resize",
        small,
        "",
        scales,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    model = builder.model(builder.node("Relu", builder.node("Add", x, large)))
    check(model, {"x": normal(1, 2, 8, 6)})
    with pytest.raises(Exception, match="match_cast error"):
        run(imported(model), normal(1, 2, 7, 6))


# -- operators against onnxruntime ---------------------------------------------------------------


@pytest.mark.parametrize("precision", ["w8a8", "w4a4", "w2a8", "mixed"])
def test_quantized_networks(precision: str, tmp_path: Path) -> None:
    model = residual_network(np.random.default_rng(3)).model("fc_out")
    data = normal(16, 3, 16, 16)
    options: dict[str, Any] = {"precision": precision}
    if precision == "mixed":
        options = {"precision": "w4a8", "layers": {"stem": "w8a16", "head": "w2a4"}}
        plan = bitwright.make_plan(model, **options)
        options = {"plan": plan}
    path = tmp_path / "q.onnx"
    bitwright.quantize(model, calibration={"x": data}, output=path, **options)
    quantized = onnx.load(path)
    expected = run_onnxruntime(quantized, {"x": data[:2]})[0]
    (found,) = run(imported(quantized), data[:2])
    # A sum of floats on the border between two codes may fall on either side.
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert np.mean(np.isclose(found, expected, rtol=1e-4, atol=1e-5)) > 0.9


def test_float_networks() -> None:
    for batch_norm in (False, True):
        model = residual_network(np.random.default_rng(1), batch_norm=batch_norm).model("fc_out")
        check(model, {"x": normal(1, 3, 16, 16)}, atol=1e-5)


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, data: Array) -> None:
        self.batches = iter([{"x": data}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_models_of_the_runtimes_own_quantizer(kind: QuantType, tmp_path: Path) -> None:
    model = residual_network(np.random.default_rng(5)).model("fc_out")
    data = normal(8, 3, 16, 16)
    onnx.save(model, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "q.onnx",
        Reader(data),
        quant_format=QuantFormat.QDQ,
        activation_type=kind,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    quantized = onnx.load(tmp_path / "q.onnx")
    expected = run_onnxruntime(quantized, {"x": data[:2]})[0]
    module = imported(quantized)
    (found,) = run(module, data[:2])
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert np.mean(np.isclose(found, expected, rtol=1e-4, atol=1e-5)) > 0.9
    assert {"relax.nn.max_pool2d", "relax.mean"} <= {
        f"relax.{operator}" for _, operator in calls(module)
    }


@profile(30)
@given(st.data())
def test_pooling(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    average = data.draw(st.booleans())
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)),
        "dilations": data.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank)),
        "ceil_mode": data.draw(st.integers(0, 1)),
    }
    padding = data.draw(st.sampled_from(["given", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding == "given":
        attributes["pads"] = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    else:
        attributes["auto_pad"] = padding
        attributes["ceil_mode"] = 0
        attributes["dilations"] = [1] * rank
        attributes["strides"] = [
            min(s, k) for s, k in zip(attributes["strides"], kernel, strict=True)
        ]
    if average:
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    x = normal(1, 2, *data.draw(st.lists(st.integers(6, 9), min_size=rank, max_size=rank)))
    check(single("AveragePool" if average else "MaxPool", x, opset=22, **attributes), {"x": x})


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
def test_convolutions(rank: int, auto_pad: str) -> None:
    x, w, b = normal(2, 4, *(7, 6, 5)[:rank]), normal(6, 2, *(3, 2, 3)[:rank], seed=1), normal(6)
    padding: dict[str, Any] = (
        {"pads": [1, 0, 2, 1, 2, 0][: 2 * rank]} if auto_pad == "NOTSET" else {}
    )
    strides = [2, 1, 1][:rank]
    model = single("Conv", x, w, b, group=2, auto_pad=auto_pad, strides=strides, **padding)
    check(model, {"x": x}, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    "transformation",
    ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric"],
)
@pytest.mark.parametrize("sizes", [(9, 4), (3, 11)])
def test_resize(mode: str, transformation: str, sizes: tuple[int, int]) -> None:
    x = normal(2, 3, 5, 6)
    none = np.zeros(0, np.float32)
    target = np.array([2, 3, *sizes], np.int64)
    options: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": transformation}
    check(single("Resize", x, none, none, target, **options), {"x": x}, atol=1e-5)


def test_resize_with_scales_enlarges_symbolic_axes() -> None:
    builder = Builder()
    x = builder.input("x", ["N", 2, "H", "W"])
    scales = builder.constant(np.array([1, 1, 3, 2], np.float32))
    model = builder.model(builder.node("Resize", x, "", scales, mode="nearest"))
    check(model, {"x": normal(1, 2, 3, 4)})


# First the input, then constants; see `single`.
OPERATORS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "slice backwards": ("Slice", [normal(5, 6), [-1, 4], [-9, 0], [0, 1], [-1, -2]], {}),
    "slice beyond": ("Slice", [normal(5, 6), [1, -99], [99, -1], [1, 0]], {}),
    "gather negative": ("Gather", [normal(5, 6), [[-1, 0], [3, -5]]], {"axis": 1}),
    "pad constant": ("Pad", [normal(3, 4), [1, 0, 2, 3], np.float32(0.5)], {}),
    "pad negative": ("Pad", [normal(5, 6), [-1, 2, 0, -2]], {}),
    "pad edge": ("Pad", [normal(1, 2, 4, 5), [0, 0, 2, 1, 0, 0, 1, 3]], {"mode": "edge"}),
    "pad reflect": ("Pad", [normal(1, 2, 4, 5), [0, 0, 2, 1, 0, 0, 1, 3]], {"mode": "reflect"}),
    "pad axes": ("Pad", [normal(3, 4), [1, 2], np.float32(2.0), [-1]], {}),
    "softmax": ("Softmax", [normal(2, 3, 4)], {"axis": 1}),
    "log softmax": ("LogSoftmax", [normal(2, 3, 4)], {"axis": -2}),
    "batch normalization": (
        "BatchNormalization",
        [normal(2, 3, 4), normal(3), normal(3, seed=1), normal(3, seed=2), abs(normal(3))],
        {"epsilon": 0.01},
    ),
    "layer normalization": (
        "LayerNormalization",
        [normal(2, 3, 4), normal(3, 4), normal(3, 4, seed=1)],
        {"axis": 1},
    ),
    "instance normalization": (
        "InstanceNormalization",
        [normal(2, 3, 4, 5), normal(3), normal(3, seed=1)],
        {},
    ),
    "gelu": ("Gelu", [normal(20)], {}),
    "gelu tanh": ("Gelu", [normal(20)], {"approximate": "tanh"}),
    "hard swish": ("HardSwish", [5 * normal(20)], {}),
    "hard sigmoid": ("HardSigmoid", [5 * normal(20)], {"alpha": 0.3}),
    "celu": ("Celu", [normal(20)], {"alpha": 2.0}),
    "mish": ("Mish", [normal(20)], {}),
    "einsum": ("Einsum", [normal(2, 3, 4), normal(4, 5)], {"equation": "bij,jk->bik"}),
    "split evenly": ("Split", [normal(3, 7)], {"axis": 1, "num_outputs": 3, "outputs": 3}),
    "where": ("Where", [normal(3, 1) > 0, normal(3, 4), normal(4)], {}),
    "cast down": ("Cast", [3 * normal(9)], {"to": onnx.TensorProto.INT32}),
    "cast to bool": (
        "Cast",
        [np.array([0.0, -1.5, 2.0], np.float32)],
        {"to": onnx.TensorProto.BOOL},
    ),
    "integer division": ("Div", [np.array([7, -7, 8, -8]), [2, 2, -3, -3]], {}),
    "integer power": ("Pow", [np.array([3, -4, 0]), [4]], {}),
    "power of numbers": ("Pow", [abs(normal(3)), [1.5]], {}),
    "cumulative sum": ("CumSum", [normal(3, 4), np.int64(1)], {"exclusive": 1, "reverse": 1}),
    "top k": ("TopK", [normal(3, 7), [3]], {"axis": -1, "outputs": 2}),
    "transposed convolution": (
        "ConvTranspose",
        [normal(1, 4, 5, 5), normal(4, 3, 3, 3, seed=1), normal(6)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1], "group": 2},
    ),
    "depth to space": ("DepthToSpace", [normal(2, 8, 3, 2)], {"blocksize": 2}),
    "depth to space, columns": (
        "DepthToSpace",
        [normal(2, 8, 3, 2)],
        {"blocksize": 2, "mode": "CRD"},
    ),
    "space to depth": ("SpaceToDepth", [normal(2, 2, 6, 4)], {"blocksize": 2}),
    "reduce mean": ("ReduceMean", [normal(2, 3, 4), [-1, 0]], {"keepdims": 0}),
    "reduce nothing": ("ReduceSum", [normal(2, 3)], {"noop_with_empty_axes": 1}),
    "reduce l2": ("ReduceL2", [normal(2, 3, 4), [1]], {}),
    "expand": ("Expand", [normal(3, 1), [2, 1, 4]], {}),
    "tile": ("Tile", [normal(2, 3), [2, 2]], {}),
    "reshape": ("Reshape", [normal(2, 3, 4), [0, -1]], {}),
    "matmul of a vector": ("MatMul", [normal(2, 3, 4), normal(4)], {}),
    "matmul of batches": ("MatMul", [normal(2, 1, 3, 4), normal(5, 4, 2)], {}),
    "one hot": ("OneHot", [np.array([1, -1, 7]), [4], [0.5, 2.0]], {"axis": 0}),
    "scatter": ("ScatterND", [normal(4, 3), [[1], [3]], normal(2, 3, seed=1)], {}),
    "trilu": ("Trilu", [normal(4, 5), np.int64(1)], {"upper": 0}),
    "infinities": ("IsInf", [np.array([np.inf, -np.inf, 1], np.float32)], {"detect_negative": 0}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    operator, arrays, attributes = OPERATORS[name]
    data, *others = (
        np.asarray(array, np.float32)
        if np.asarray(array).dtype == np.float64
        else np.asarray(array)
        for array in arrays
    )
    opset = 22 if operator in ("HardSwish", "Mish") else 21
    model = single(operator, data, *others, opset=opset, **attributes)
    check(model, {"x": data}, atol=1e-5)


def test_both_branches_of_an_if() -> None:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        node = onnx.helper.make_node(operator, ["x"], [f"{name}_out"], name)
        output = onnx.helper.make_tensor_value_info(f"{name}_out", 1, [2, 3])
        return onnx.helper.make_graph([node], name, [], [output])

    builder = Builder()
    builder.inputs.append(onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    builder.input("x", [2, 3])
    y = builder.node("If", "flag", then_branch=branch("a", "Exp"), else_branch=branch("b", "Neg"))
    model = builder.model(builder.node("Abs", y))
    for flag in (True, False):
        check(model, {"flag": np.array(flag), "x": normal(2, 3)})


# -- refusals ------------------------------------------------------------------------------------


def unsupported(count: int) -> onnx.ModelProto:
    builder = Builder()
    x = builder.input("x", [1, 1, 3, 3])
    places = builder.constant(np.arange(9, dtype=np.int64).reshape(1, 1, 3, 3))
    for index in range(count):
        builder.node("MaxUnpool", x, places, name=f"pool{index}", kernel_shape=[1, 1])
    names = [f"pool{index}_out" for index in range(count)]
    return builder.model(builder.node("Det", x, name="det"), *names)


def test_all_unsupported_operators_are_named_at_once() -> None:
    with pytest.raises(
        ModelError, match="cannot be compiled: MaxUnpool 'pool0', MaxUnpool 'pool1', Det 'det'"
    ) as caught:
        imported(unsupported(2))
    assert "bitwright inspect" in str(caught.value)
    with pytest.raises(ModelError, match="MaxUnpool 'pool19' and 6 more"):
        imported(unsupported(25))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_converter_that_fails_names_the_node_and_prints_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    builder = Builder()
    x, k = builder.input("x", [3, 7]), builder.input("k", [1])
    count = builder.node("Cast", k, to=onnx.TensorProto.INT64)
    builder.nodes.append(onnx.helper.make_node("TopK", [x, count], ["v", "i"], "top/k"))
    model = builder.model("v")
    capfd.readouterr()
    with pytest.raises(ModelError, match=r"TopK 'top/k' cannot be compiled.*constant"):
        imported(model)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "model,message",
    [
        (single("Cast", normal(4), to=onnx.TensorProto.INT4), "conversion to INT4"),
        (
            single(
                "Resize",
                normal(1, 1, 4, 4),
                np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32),
                np.array([1, 1, 2, 2], np.float32),
                coordinate_transformation_mode="tf_crop_and_resize",
            ),
            "tf_crop_and_resize is not supported",
        ),
        (single("Cast", normal(4), to=onnx.TensorProto.STRING), "conversion to STRING"),
    ],
)
def test_what_would_be_wrong_is_refused(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ModelError, match=f"'node' cannot be compiled.*{message}"):
        imported(model)


# -- size ----------------------------------------------------------------------------------------


def deep(layers: int) -> onnx.ModelProto:
    builder = Builder()
    x = builder.input("x", ["N", 8, 16, 16])
    for index in range(layers):
        x = builder.activation(x, TensorQuantization(0.1, 0, 8, False))
        codes = np.random.default_rng(index).integers(-128, 128, (8, 8, 3, 3))
        w = builder.weights(codes, np.full(8, 0.01), bits=8, axis=0)
        b = builder.weights(np.arange(8), np.full(8, 0.001), bits=32, axis=0)
        x = builder.node("Relu", builder.node("Conv", x, w, b, pads=[1] * 4, name=f"conv{index}"))
    return builder.model(x)


def test_time_is_linear_in_the_number_of_layers() -> None:
    seconds = {}
    for layers in (10, 50, 200):
        model = load(deep(layers))
        start = time.process_time()
        module = import_model(model)
        seconds[layers] = time.process_time() - start
        assert len(module.attrs[PRECISIONS]) == layers
    assert seconds[200] < 8 * max(seconds[50], 0.02)
    assert seconds[200] < 2.0  # 0.6 s on an idle machine


# -- the test cases of the ONNX standard ---------------------------------------------------------

# Element types of whole bytes that bitwright does not convert on the way in.
WHOLE = frozenset(
    onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name))
    for name in "float32 float64 bool int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
)

# Operators of which some case must be right; all cases that import must be.
PASSING = frozenset(
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization"
    " BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Compress Concat"
    " ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div"
    " Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU"
    " Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater"
    " GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity If"
    " InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual"
    " Log LogSoftmax Loop LpPool MatMul MatMulInteger Max MaxPool Mean Min Mish Mod Mul Neg"
    " NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RMSNormalization RNN Range Reciprocal"
    " ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd"
    " ReduceSum ReduceSumSquare Relu Reshape Resize Round Scan ScatterElements ScatterND Selu"
    " Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split"
    " Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze"
    " Where Xor".split()
)


def frozen(model: onnx.ModelProto, inputs: Sequence[Any]) -> onnx.ModelProto:
    """Turn all inputs but the first into constants, as they are in most models."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value, array in zip(model.graph.input[1:], inputs[1:], strict=True):
        copy.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del copy.graph.input[1:]
    return copy


def as_array(data: Any) -> Array:
    is_proto = isinstance(data, onnx.TensorProto)
    return np.asarray(onnx.numpy_helper.to_array(data) if is_proto else data)


def outcome(model: onnx.ModelProto, inputs: Sequence[Array], expected: Sequence[Array]) -> str:
    """ "right", "refused", or what is wrong."""
    try:
        module = imported(model)
    except ModelError:
        return "refused"
    try:
        names = [value.name for value in model.graph.input]
        expected = run_onnxruntime(model, dict(zip(names, inputs, strict=True)))
        rtol, atol = 1e-4, 1e-5
    except Exception:  # onnxruntime lacks some operators
        rtol, atol = 1e-3, 1e-4  # the cases of RoiAlign have four digits
    try:
        found = run(module, *inputs)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    for ours, theirs in zip(found, expected, strict=True):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return f"{ours.dtype} {ours.shape} instead of {theirs.dtype} {theirs.shape}"
        if not np.allclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True):
            return f"differs by {np.abs(ours - theirs).max()}"
    return "right"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the cases themselves: infinities and NaN
def test_the_cases_of_the_standard_are_right_or_refused() -> None:
    from onnx.backend.test.case.node import collect_testcases  # takes seconds

    right: set[str] = set()
    wrong: dict[str, str] = {}
    for case in collect_testcases(None):
        model = case.model
        if model is None or case.data_sets is None or case.name.endswith("_expanded"):
            continue
        values = (*model.graph.input, *model.graph.output)
        if not {value.type.tensor_type.elem_type for value in values} <= WHOLE:
            continue
        inputs, expected = (list(map(as_array, arrays)) for arrays in case.data_sets[0])
        found = outcome(model, inputs, expected)
        if found == "refused" and len(inputs) > 1:
            found = outcome(frozen(model, inputs), inputs[:1], expected)
        if found == "right":
            right.update(node.op_type for node in model.graph.node)
        elif found != "refused":
            wrong[case.name] = found
    assert wrong == {}
    assert not PASSING - right
    assert len(right) > 130


# -- trained models ------------------------------------------------------------------------------


# How many axes some tensor has is known there when sizes are fixed.
NEED_SIZES = {"plcmos_v2"}


@pytest.mark.slow
@pytest.mark.parametrize("name", models.ALL_ONNX)
def test_real_models_are_imported(name: str) -> None:
    model = load(models.ALL_ONNX[name]().path)
    if name not in NEED_SIZES:
        import_model(model)
        return
    with pytest.raises(ModelError, match=r"queeze '.*' cannot be compiled") as caught:
        import_model(model)
    assert "static shapes" in str(caught.value)


@pytest.mark.slow
def test_a_detector_of_text_with_symbolic_sizes() -> None:
    model = load(models.ALL_ONNX["text_detection"]().path)
    check(model.to_proto(), {"x": normal(1, 3, 32, 64)})


def test_computed_indices_never_read_beyond_the_data() -> None:
    """ONNX leaves such indices open; TVM's own way is to read whatever lies there."""
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    node = onnx.helper.make_node("Gather", ["table", "i"], ["y"], axis=0)
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, ["N"])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    model = load(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    executable = tvm.compile(import_model(model), target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    indices = np.array([0, 3, -1, -4, 10**9])
    found = machine["main"](tvm.runtime.tensor(indices)).numpy()
    assert np.array_equal(found, table[[0, 3, 3, 0, 3]])


def test_a_node_may_be_called_main() -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="main")
    shape: list[str | int | None] = ["N", 3]
    graph = onnx.helper.make_graph(
        [node],
        "main",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    module = import_model(load(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)))
    assert [variable.name_hint for variable in module.get_global_vars()] == ["main"]
