"""Recurrent networks along the whole path: inspected, quantized, compiled, run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import bitwright
from benchmarks import models, recurrent_models
from benchmarks.recurrent import arrays, compiled
from bitwright.quant.float_ops import make_session
from bitwright.quant.layers import find_layers
from bitwright.quant.load import load
from tests.driver.test_import_loops import Compiled
from tests.targets.test_mohaq import PUBLISHED


def test_the_speech_model_of_mohaq_has_the_layers_of_the_paper() -> None:
    layers, _ = find_layers(load(recurrent_models.sru_network(), input_shapes={"x": [1, 1, 23]}))
    assert {layer.name: layer.weight_count for layer in layers} == PUBLISHED
    assert {layer.name: layer.macs for layer in layers} == PUBLISHED


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_an_operator_compiles_with_its_layers_in_integers(operator: str, tmp_path: Path) -> None:
    model = recurrent_models.gated(operator, 7, 9, bidirectional=True)
    samples = recurrent_models.noise(model, time=40, batch=3)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    # Samples run along the first axis, which is time here.
    artifact = bitwright.compile(
        path,
        "silago/drra",
        output=tmp_path / "artifact",
        precision="w8a8",
        calibration=samples,
        batch_size=40,
    )
    manifest = artifact.manifest
    expected_layers = ["y/input", "y/recurrent"]
    if operator == "GRU":  # which multiplies by the state after its reset
        expected_layers.append("y/recurrent_candidate")
    assert [layer.name for layer in manifest.layers] == expected_layers
    assert ("y/scan", "scan") in [(e.name, e.operator) for e in manifest.host_operators]
    assert artifact.qdq_model is not None
    found = artifact.run(samples)["y"]
    session = make_session(str(artifact.qdq_model), optimize=False)
    (expected,) = session.run(None, samples)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (exact,) = ort.InferenceSession(str(path)).run(None, samples)
    assert 10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()) > 30  # dB


def test_quantizers_inside_a_body() -> None:
    """Models of other tools may have them: they run step by step, to the same result."""
    codes = np.random.default_rng(0).integers(-127, 128, (12, 12)).astype(np.int8)
    make, tensor = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [
            make("QuantizeLinear", ["s", "scale", "zero"], ["codes"]),
            make("DequantizeLinear", ["codes", "scale", "zero"], ["state"]),
            make("DequantizeLinear", ["w", "w_scale", "zero"], ["weights"]),
            make("MatMul", ["state", "weights"], ["product"], name="recurrent"),
            make("Add", ["product", "x_t"], ["sum"]),
            make("Tanh", ["sum"], ["new"]),
            make("Identity", ["new"], ["y_t"]),
        ],
        "body",
        [tensor(name, 1, ["batch", 12]) for name in ("s", "x_t")],
        [tensor(name, 1, ["batch", 12]) for name in ("new", "y_t")],
    )
    graph = helper.make_graph(
        [make("Scan", ["start", "x"], ["end", "y"], name="scan", body=body, num_scan_inputs=1)],
        "graph",
        [tensor("start", 1, ["batch", 12]), tensor("x", 1, ["time", "batch", 12])],
        [tensor("end", 1, ["batch", 12]), tensor("y", 1, ["time", "batch", 12])],
        [
            numpy_helper.from_array(codes, "w"),
            numpy_helper.from_array(np.array(0.01, np.float32), "w_scale"),
            numpy_helper.from_array(np.array(1 / 127, np.float32), "scale"),
            numpy_helper.from_array(np.array(0, np.int8), "zero"),
        ],
    )
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    feeds = recurrent_models.noise(model, time=9, batch=3)
    expected = make_session(model, optimize=False).run(None, feeds)
    for ours, theirs in zip(arrays(compiled(model, feeds)()), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


# -- trained networks of others --------------------------------------------------------------------


def agreement(name: str, feeds: dict[str, Any], **shapes: Any) -> list[tuple[Any, Any]]:
    """Results of the compiled model and of onnxruntime."""
    path = models.ALL_ONNX[name]().path
    model = load(path, input_shapes=shapes).to_proto() if shapes else path
    expected = ort.InferenceSession(str(path)).run(None, feeds)
    return list(zip(arrays(compiled(model, feeds)()), expected, strict=True))


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, feeds, shapes",
    [
        (
            "silero_vad_16k_sequence",
            {"input": normal(50, 576), "h": normal(1, 1, 128), "c": normal(1, 1, 128)},
            {},
        ),
        (
            "silero_vad_16k_op15",
            {"input": normal(1, 576), "state": normal(2, 1, 128), "sr": np.array(16000)},
            {"input": [1, 576], "state": [2, 1, 128]},
        ),
        (
            "plcmos_v2",
            {"degraded_audio": normal(1, 1, 60, 257), "rater_embed": normal(1, 64)},
            {"degraded_audio": [1, 1, 60, 257], "rater_embed": [1, 64]},
        ),
        ("aecmos_16k", {"input": normal(1, 3, 40, 160), "h0": normal(4, 1, 64)}, {}),
        ("seizure_paper", {"x": normal(3, 100, 20)}, {}),
    ],
)
def test_trained_networks_agree(name: str, feeds: Any, shapes: Any) -> None:
    for ours, theirs in agreement(name, feeds, **shapes):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_a_detector_of_voices_whose_branches_are_sampling_rates(batch: int) -> None:
    """Each branch holds an LSTM; the state goes from chunk to chunk."""
    path = models.ALL_ONNX["silero_vad"]().path
    session = ort.InferenceSession(str(path))
    run = Compiled(load(path).to_proto())
    assert (run.kernels, run.recursions) == (2, 0)
    for rate, size in [(16000, 576), (16000, 192), (8000, 288), (8000, 96)]:
        state = expected = np.zeros((2, batch, 128), np.float32)
        for chunk in np.random.default_rng(0).normal(0, 0.1, (20, batch, size)):
            feeds = {"input": chunk.astype(np.float32), "state": state, "sr": np.array(rate)}
            found, state = run(feeds)
            probability, expected = session.run(None, feeds | {"state": expected})
            np.testing.assert_allclose(found, probability, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_voice_detector_in_integers(tmp_path: Path) -> None:
    """Both sample rates stand in one If; with the rate given, its branch is the model."""
    model = onnx.load(models.ALL_ONNX["silero_vad"]().path)
    (rate,) = [value for value in model.graph.input if value.name == "sr"]
    model.graph.input.remove(rate)
    model.graph.initializer.append(numpy_helper.from_array(np.array(16000), "sr"))
    path = tmp_path / "vad.onnx"
    onnx.save(model, path)
    samples = {"input": np.stack([normal(1, 576)] * 4), "state": np.stack([normal(2, 1, 128)] * 4)}
    artifact = bitwright.compile(
        path,
        "silago/drra",
        precision="w8a8",
        calibration=samples,
        output=tmp_path / "artifact",
        input_shapes={"input": [1, 576], "state": [2, 1, 128]},
    )
    assert len(artifact.manifest.layers) == 8
    assert all(layer.kernel for layer in artifact.manifest.layers)
    feeds = {name: array[0] for name, array in samples.items()}
    for exact, near in zip(
        ort.InferenceSession(str(path)).run(None, feeds), artifact.run(feeds).values(), strict=True
    ):
        assert 10 * np.log10((exact**2).sum() / ((exact - near) ** 2).sum()) > 30  # dB


@pytest.mark.slow
def test_the_text_segmenter_agrees() -> None:
    text = Path(__file__).read_bytes()[:2000]
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    path = models.mamba_segmenter().path
    name = onnx.load(path).graph.input[0].name
    ((ours, theirs),) = agreement("mamba_segmenter", {name: ids})
    # Six blocks, one behind the other, add up the last bits.
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
