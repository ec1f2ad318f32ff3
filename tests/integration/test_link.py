"""Artefacts that count transitions, on whole models: main_link has the bits of main."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import bitwright
from benchmarks import recurrent_models
from bitwright import Artifact
from bitwright.quant.observers import TensorQuantization
from bitwright.targets.link import UNSORTED
from tests.passes.test_link_entry import described
from tests.quant.qdq import Array, Builder, residual_network

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"


class Reader(CalibrationDataReader):  # type: ignore[misc]  # ships no types
    def __init__(self, samples: dict[str, Array]) -> None:
        self._batches = iter([samples])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def compiled(
    model: onnx.ModelProto | Path,
    samples: dict[str, Array],
    passes: str,
    folder: Path,
    **options: Any,
) -> Artifact:
    """Compile a float model with transfers, on samples of its own."""
    path = model if isinstance(model, Path) else folder / "model.onnx"
    if not isinstance(model, Path):
        onnx.save(model, path)
    return bitwright.compile(
        path,
        "bitfusion/eyeriss",
        calibration=samples,
        passes=passes,
        output=folder / "out",
        **{"precision": "w8a8", **options},
    )


def assert_same_bits(artifact: Artifact, inputs: dict[str, Array], layers: Sequence[str]) -> None:
    """Assert that both entry points give the same bits, and which layers are sent."""
    expected = artifact.run(inputs)
    # What main_link returns in front of its counts.
    found = artifact._call_link([inputs[entry.name] for entry in artifact.inputs])
    for name, array in zip(expected, found, strict=False):
        np.testing.assert_array_equal(array, expected[name], name)
        assert array.dtype == expected[name].dtype
    assert artifact.manifest.link is not None
    assert [entry.name for entry in artifact.manifest.link.layers] == list(layers)


def test_lenet_in_mixed_precision_and_asymmetric(tmp_path: Path) -> None:
    with np.load(LENET / "calibration.npz") as archive:
        images = archive["image"][:24].astype(np.float32)
    link = described(tmp_path, word_bits=16)
    layers = ["conv1", "conv2", "fc1", "fc2", "fc3"]
    precisions = ["w8a8", "w4a16", "w2a4", "w16a8", "w8a2"]
    plan = bitwright.PrecisionPlan(
        layers={
            name: bitwright.Precision.parse(text)
            for name, text in zip(layers, precisions, strict=True)
        }
    )
    artifact = compiled(
        LENET / "lenet.onnx",
        {"image": images},
        f"materialize-transfers=link:{link},popcount-reorder=on:separated:buckets:6",
        tmp_path,
        precision=None,
        plan=plan,
        asymmetric=True,
    )
    assert_same_bits(artifact, {"image": images}, layers)


def test_depthwise_convolutions_and_gates(tmp_path: Path) -> None:
    builder = residual_network(np.random.default_rng(0))
    x = normal(6, 3, 16, 16)
    artifact = compiled(builder.model("fc_out"), {"x": x}, "popcount-reorder", tmp_path)
    names = ["stem", "depthwise", "reduce", "expand", "project", "head", "fc"]
    assert_same_bits(artifact, {"x": x}, names)


def transformer(length: int = 6, width: int = 8, heads: int = 2) -> onnx.ModelProto:
    """A block of self-attention and a feed-forward one, on [N, length, width]."""
    builder = Builder(opset=21)
    generator = np.random.default_rng(1)

    def product(x: str, name: str, *shape: int) -> str:
        array = generator.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        return builder.node("MatMul", x, builder.constant(array), name=name)

    def split(x: str, *axes: int) -> str:
        shape = builder.constant(np.array([0, length, heads, width // heads]))
        return builder.node("Transpose", builder.node("Reshape", x, shape), perm=list(axes))

    x = builder.input("x", ["N", length, width])
    query = split(product(x, "query", width, width), 0, 2, 1, 3)
    key = split(product(x, "key", width, width), 0, 2, 3, 1)
    value = split(product(x, "value", width, width), 0, 2, 1, 3)
    scores = builder.node("MatMul", query, key, name="scores")
    scaled = builder.node("Mul", scores, builder.constant(np.float32((width / heads) ** -0.5)))
    weights = builder.node("Softmax", scaled, axis=-1)
    mixed = builder.node("MatMul", weights, value, name="mix")
    turned = builder.node("Transpose", mixed, perm=[0, 2, 1, 3])
    flat = builder.node("Reshape", turned, builder.constant(np.array([0, length, width])))
    attended = builder.node("Add", x, product(flat, "out", width, width))
    hidden = builder.node("Relu", product(attended, "up", width, 3 * width))
    last = builder.node("Add", attended, product(hidden, "down", 3 * width, width))
    return builder.model(last, shape=["N", length, width])


@pytest.mark.parametrize("on", ["weights", "inputs"])
def test_a_transformer(on: str, tmp_path: Path) -> None:
    x = normal(5, 6, 8)
    passes = f"materialize-transfers=link:ordering-simulator,popcount-reorder=on:{on}"
    onnx.save(transformer(), tmp_path / "float.onnx")
    quantize_static(  # it quantizes products of activations, too
        tmp_path / "float.onnx",
        tmp_path / "model.onnx",
        Reader({"x": x}),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    artifact = bitwright.compile(
        tmp_path / "model.onnx", "bitfusion/eyeriss", passes=passes, output=tmp_path / "out"
    )
    names = ["query", "key", "value", "scores", "mix", "out", "up", "down"]
    assert_same_bits(artifact, {"x": x}, names)
    link = artifact.manifest.link
    assert link is not None
    units = {entry.name: entry.sorted_by_unit for entry in link.layers}
    # Weights that are computed are sorted while the model runs, constant ones are not.
    assert units["up"] == (() if on == "weights" else ("inputs",))
    assert units["scores"] == (on,)
    whole = artifact.count_transitions({"x": x}, batch_size=5)
    alone = artifact.count_transitions({"x": x}, batch_size=1)
    assert whole.to_dict() == alone.to_dict()
    assert all(layer[UNSORTED].transitions for layer in whole.layers)


def test_layers_in_loops_are_told_and_others_sent(tmp_path: Path) -> None:
    model = recurrent_models.gated("GRU", 7, 9)
    samples = recurrent_models.noise(model, time=5, batch=3)
    (output,) = model.graph.output
    weights = numpy_helper.from_array(normal(9, 4), "behind")
    model.graph.initializer.append(weights)
    model.graph.node.append(helper.make_node("MatMul", [output.name, "behind"], ["z"], "last"))
    model.graph.output.append(onnx.ValueInfoProto(name="z"))
    model = onnx.shape_inference.infer_shapes(model)
    passes = "popcount-reorder"
    artifact = compiled(model, samples, passes, tmp_path, batch_size=5)
    assert_same_bits(artifact, samples, ["y/input", "last"])
    assert artifact.manifest.link is not None
    assert "y/recurrent" in " ".join(artifact.manifest.link.skipped)


def test_models_with_branches(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 8] x) => (float[N, 3] y)
        <float k = {1.0}>
        {
            [first] h = MatMul(x, w)
            r = Relu(h)
            m = ReduceMax <keepdims = 0> (r)
            c = Greater(m, k)
            [choice] b = If (c) <
                then_branch = then () => (p) { p = Sin(r) },
                else_branch = otherwise () => (p) { p = Cos(r) }>
            [last] y = MatMul(b, v)
        }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(normal(8, 6), "w"))
    model.graph.initializer.append(numpy_helper.from_array(normal(6, 3), "v"))
    x = normal(4, 8)
    artifact = compiled(model, {"x": x}, "popcount-reorder", tmp_path)
    assert_same_bits(artifact, {"x": x}, ["first", "last"])
    assert_same_bits(artifact, {"x": x / 100}, ["first", "last"])


def test_a_model_without_integer_layers_counts_nothing(tmp_path: Path) -> None:
    builder = Builder()
    codes = TensorQuantization(0.05, 0, 8, signed=True)
    x = builder.activation(builder.input("x", ["N", 4]), codes)
    model = builder.model(builder.activation(builder.node("Tanh", x), codes))
    onnx.save(model, tmp_path / "model.onnx")
    artifact = bitwright.compile(
        tmp_path / "model.onnx",
        "bitfusion/eyeriss",
        passes="popcount-reorder",
        output=tmp_path / "out",
    )
    assert artifact.manifest.link is None
    with pytest.raises(bitwright.BitwrightError, match="none of its layers computes in integers"):
        artifact.count_transitions({"x": normal(3, 4)})
