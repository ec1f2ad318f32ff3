"""The refinement must lower the error at the outputs of layers, measured by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bitwright
from bitwright.quant.float_ops import make_session
from bitwright.quant.observers import ClipMethod

Floats = npt.NDArray[np.float32]


def conv_model(path: Path, *, bias: bool) -> None:
    """One convolution whose inputs are all positive: its rounding errors add up."""
    rng = np.random.default_rng(0)
    weights = rng.laplace(size=(8, 16, 3, 3)).astype(np.float32)
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    initializers = [numpy_helper.from_array(weights, "w")]
    if bias:
        initializers.append(numpy_helper.from_array(rng.standard_normal(8).astype(np.float32), "b"))
    graph = helper.make_graph(
        [helper.make_node("Conv", inputs, ["y"], name="conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 6, 6])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)


def positive(seed: int, count: int = 64) -> Floats:
    rng = np.random.default_rng(seed)
    return (np.abs(rng.standard_normal((count, 16, 8, 8))) + 0.5).astype(np.float32)


def errors(path: Path, clip: ClipMethod, precision: str, *, per_channel: bool = True) -> Floats:
    quantized = bitwright.quantize(
        path,
        precision=precision,
        calibration={"x": positive(1)},
        clip=clip,
        per_channel=per_channel,
    )
    x = positive(2)
    expected = make_session(str(path), optimize=False).run(None, {"x": x})[0]
    result = make_session(quantized.model, optimize=False).run(None, {"x": x})[0]
    difference: Floats = result - expected
    return difference


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", ["w4a16", "w2a16", "w4a4"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_no_mean_error_is_left_and_the_noise_is_lower(
    bias: bool, precision: str, per_channel: bool, tmp_path: Path
) -> None:
    path = tmp_path / "conv.onnx"
    conv_model(path, bias=bias)
    plain = errors(path, "minmax", precision, per_channel=per_channel)
    refined = errors(path, "mmse", precision, per_channel=per_channel)
    # What the mean may differ by on other samples of the same distribution: it is a mean of a
    # handful of independent images, each with errors of the size of the spread.
    spread = refined.std(axis=(0, 2, 3))
    assert (np.abs(refined.mean(axis=(0, 2, 3))) < 0.5 * spread + 1e-6).all()
    assert np.square(refined).mean() < np.square(plain).mean()


def test_minmax_changes_no_bias(tmp_path: Path) -> None:
    path = tmp_path / "conv.onnx"
    conv_model(path, bias=True)
    model = bitwright.quantize(
        path, precision="w8a8", calibration={"x": positive(1)}, clip="minmax"
    ).model
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    bias = numpy_helper.to_array(onnx.load(path).graph.initializer[1])
    stored = tensors["conv.bias_codes"] * tensors["conv.bias_codes_scale"].astype(np.float64)
    assert np.abs(stored - bias).max() <= tensors["conv.bias_codes_scale"].max() / 2


def test_a_layers_choice_does_not_depend_on_other_layers() -> None:
    lenet = Path(__file__).parents[2] / "examples" / "lenet_digits"

    def conv2_codes(fc1: str) -> npt.NDArray[np.int64]:
        plan = bitwright.make_plan(lenet / "lenet.onnx", precision="w4a4", layers={"fc1": fc1})
        result = bitwright.quantize(
            lenet / "lenet.onnx", plan=plan, calibration=lenet / "calibration.npz"
        )
        tensors = {t.name: t for t in result.model.graph.initializer}
        return numpy_helper.to_array(tensors["conv2.weight_codes"]).astype(np.int64)

    assert np.array_equal(conv2_codes("w8a8"), conv2_codes("w16a16"))


def test_rare_values_outside_the_kept_samples_are_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "conv.onnx"
    conv_model(path, bias=True)
    x = positive(1, count=256)
    x[77] *= 6  # 64 of the 256 samples are kept, not this one
    expected = make_session(str(path), optimize=False).run(None, {"x": x})[0]
    noise = {}
    clips: tuple[ClipMethod, ...] = ("mmse", "minmax")
    for clip in clips:
        model = bitwright.quantize(path, precision="w16a8", calibration={"x": x}, clip=clip).model
        result = make_session(model, optimize=False).run(None, {"x": x})[0]
        noise[clip] = float(np.square(result - expected).sum())
    assert noise["mmse"] <= noise["minmax"] * 2.1  # the 3 dB that the histogram allows


@pytest.mark.parametrize("precision", ["w4a16", "w4a4", "w8a8"])
def test_a_matmul_without_bias_is_no_worse_than_unclipped(precision: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.laplace(size=(64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])],
        [numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path / "matmul.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    x = (np.abs(rng.standard_normal((256, 64))) + 1).astype(np.float32)
    expected = x @ weights
    noise = {}
    clips: tuple[ClipMethod, ...] = ("mmse", "minmax")
    for clip in clips:
        quantized = bitwright.quantize(
            path, precision=precision, calibration={"x": x}, clip=clip
        ).model
        result = make_session(quantized, optimize=False).run(None, {"x": x})[0]
        noise[clip] = float(np.square(result - expected).sum())
    assert noise["mmse"] <= noise["minmax"] * 1.05


def test_inputs_too_large_to_square_still_work(tmp_path: Path) -> None:
    path = tmp_path / "conv.onnx"
    conv_model(path, bias=False)
    x = positive(1) * np.float32(1e30)
    expected = make_session(str(path), optimize=False).run(None, {"x": x})[0].astype(np.float64)
    model = bitwright.quantize(path, precision="w8a8", calibration={"x": x}).model
    result = make_session(model, optimize=False).run(None, {"x": x})[0]
    noise = np.square((result - expected) / 1e30).mean() / np.square(expected / 1e30).mean()
    assert noise < 1e-3
