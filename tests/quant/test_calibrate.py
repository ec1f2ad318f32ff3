"""Calibration against onnxruntime run over all samples at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright.errors import DataError, RunError
from bitwright.quant.calibrate import calibrate
from bitwright.quant.float_ops import make_session
from bitwright.quant.load import Model, load
from bitwright.quant.samples import Samples

Floats = npt.NDArray[np.float32]


def small_model(batch: int | str = "N", factor: float = 1.0) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((4, 3, 3, 3)) * factor).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Exp", ["r"], ["y"], name="exp"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4, 8, 8])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def data(count: int = 21) -> Floats:
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


def watched(model: Model, names: list[str]) -> list[object]:
    values = {v.name: v for node in model.graph for v in node.outputs}
    values.update((v.name, v) for v in model.graph.inputs)
    return [values[name] for name in names]


@pytest.mark.parametrize("batch_size", [None, 1, 4, 21, 100])
def test_extremes_are_those_of_one_big_run(batch_size: int | None) -> None:
    proto, x = small_model(), data()
    model = load(proto)
    observers, kept = calibrate(
        model,
        watched(model, ["x", "c", "r"]),  # type: ignore[arg-type]
        Samples({"x": x}, model.inputs),
        batch_size=batch_size,
        keep=True,
    )
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("c", "r"))
    c, r = make_session(proto, optimize=False).run(["c", "r"], {"x": x})
    for name, expected in (("x", x), ("c", c), ("r", r)):
        assert observers[name].minimum == pytest.approx(expected.min(), rel=1e-5)
        assert observers[name].maximum == pytest.approx(expected.max(), rel=1e-5)
        assert observers[name].counts.sum() == expected.size
    assert all(batch.samples <= max((batch_size or 32) // 4, 1) for batch in kept)
    rows = np.concatenate([batch.inputs["x"] for batch in kept])
    assert np.array_equal(rows, x)  # a small model: all 21 samples are kept, each once
    assert [value.name for value in model.graph.outputs] == ["y"]  # the model is as it was


def test_every_sample_is_seen_once_and_progress_is_told() -> None:
    model = load(small_model())
    told: list[tuple[int, int]] = []
    calibrate(
        model,
        watched(model, ["r"]),  # type: ignore[arg-type]
        Samples({"x": data()}, model.inputs),
        batch_size=8,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(8, 21), (16, 21), (21, 21)]


def test_models_with_a_fixed_batch_run_in_that_batch() -> None:
    model = load(small_model(batch=7))
    observers, kept = calibrate(
        model,
        watched(model, ["r"]),  # type: ignore[arg-type]
        Samples({"x": data()}, model.inputs),
        keep=True,
    )
    assert observers["r"].counts.sum() == 21 * 4 * 64
    assert [batch.samples for batch in kept] == [7, 7, 7]


def test_samples_are_kept_from_the_whole_range() -> None:
    model = load(small_model())
    x = data(1000)
    _, kept = calibrate(
        model,
        watched(model, ["c", "r"]),  # type: ignore[arg-type]
        Samples({"x": x}, model.inputs),
        keep=True,
    )
    rows = np.concatenate([batch.inputs["x"] for batch in kept])
    assert np.array_equal(rows, x[np.linspace(0, 999, 64).astype(int)])


def test_a_tensor_that_overflows_is_named() -> None:
    model = load(small_model(factor=1e3))
    with pytest.raises(RunError, match="'y'"):
        calibrate(model, watched(model, ["r", "y"]), Samples({"x": data()}, model.inputs))  # type: ignore[arg-type]


def test_a_model_that_cannot_run_on_the_samples_says_which() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "K"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(np.array([-1, 5], np.int64), "shape")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = load(proto)
    samples = Samples({"x": np.zeros((3, 7), np.float32)}, model.inputs)
    with pytest.raises(DataError, match="samples 0 to"):
        calibrate(model, watched(model, ["y"]), samples, batch_size=1)  # type: ignore[arg-type]


def test_memory_does_not_grow_with_the_samples() -> None:
    model = load(small_model())

    def peak(count: int) -> int:
        samples = Samples({"x": data(count)}, model.inputs)
        tracemalloc.start()
        calibrate(model, watched(model, ["c", "r"]), samples, batch_size=4)  # type: ignore[arg-type]
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(8)  # what is imported and cached once
    assert peak(2000) < peak(20) + 200_000  # 2000 samples make 4 MB of activations a tensor
