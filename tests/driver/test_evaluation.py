"""``bitwright run``: an artefact side by side with the models it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import bitwright
from bitwright.errors import ArtifactError, BitwrightError, DataError, ModelError, UsageError

Array = npt.NDArray[Any]

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
CALIBRATION, TEST = LENET / "calibration.npz", LENET / "test.npz"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(LENET / "lenet.onnx", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    path = model.with_name("artifact")
    bitwright.compile(model, "silago/drra", precision="w4a4", calibration=CALIBRATION, output=path)
    return path


@pytest.fixture(scope="module")
def data() -> dict[str, Array]:
    with np.load(TEST) as archive:
        return {name: archive[name][:100] for name in archive}


def test_values_are_those_of_evaluate(model: Path, artifact: Path, data: dict[str, Array]) -> None:
    result = bitwright.run(artifact, data, batch_size=30)
    assert [entry.form for entry in result.forms] == ["float", "qdq", "reference", "artifact"]
    assert (result.metric, result.unit, result.samples) == ("top1", "fraction", 100)
    assert result.notes == ()
    qdq = artifact / "model.qdq.onnx"
    assert result["float"].value == bitwright.evaluate(model, data).value
    assert result["qdq"].value == bitwright.evaluate(qdq, data).value
    reference = bitwright.evaluate(qdq, data, engine="reference")
    assert result["reference"].value == result["artifact"].value == reference.value
    assert all(entry.seconds > 0 for entry in result.forms)


def test_shares_of_equal_outputs(artifact: Path, data: dict[str, Array]) -> None:
    result = bitwright.run(artifact, data)
    # All of LeNet computes in integers, so it is the reference to the last bit.
    assert result["artifact"].equal_share == result["reference"].equal_share == 1.0
    got = bitwright.load_artifact(artifact).run({"image": data["image"].astype(np.float32)})
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(artifact / "model.qdq.onnx", options)
    (logits,) = session.run(["logits"], {"image": data["image"].astype(np.float32)})
    assert result["qdq"].equal_share == np.mean(logits == got["logits"])
    close = np.isclose(got["logits"], logits, rtol=1e-4, atol=1e-6)
    assert result["qdq"].close_share == close.mean() > 0.95


def test_noise_against_the_float_model(model: Path, artifact: Path, data: dict[str, Array]) -> None:
    result = bitwright.run(artifact, data, metric="mse", reference=False)
    assert [entry.form for entry in result.forms] == ["float", "qdq", "artifact"]
    assert result["float"].value == 0.0
    wanted = bitwright.evaluate(artifact / "model.qdq.onnx", data, metric="mse", against=model)
    assert result["qdq"].value == pytest.approx(wanted.value, rel=1e-6)
    assert result["artifact"].value == pytest.approx(wanted.value, rel=0.05)


def test_forms_that_are_not_there(
    model: Path, artifact: Path, data: dict[str, Array], tmp_path: Path
) -> None:
    moved = shutil.copytree(artifact, tmp_path / "moved")
    (moved / "model.qdq.onnx").unlink()
    content = model.read_bytes()
    try:
        model.write_bytes(content + b"\0")
        changed = bitwright.run(moved, data)
        model.unlink()
        missing = bitwright.run(moved, data)
        with pytest.raises(UsageError, match=r"mse compares with the float model.* not there"):
            bitwright.run(moved, data, metric="mse")
    finally:
        model.write_bytes(content)
    for result, words in ((changed, "has changed since"), (missing, "is not there")):
        assert [entry.form for entry in result.forms] == ["artifact"]
        assert words in result.notes[0]
        assert "keeps no quantized ONNX model" in result.notes[1]
    result = bitwright.run(moved, data, metric="mse", float_model=LENET / "lenet.onnx")
    assert [entry.form for entry in result.forms] == ["float", "artifact"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"metric": "f1"}, UsageError, "no metric 'f1'"),
        ({"batch_size": 0}, UsageError, "batch size 0"),
        ({"threads": 0}, UsageError, "0 threads"),
        ({"artifact": LENET}, ArtifactError, "is no artefact"),
        ({"data": CALIBRATION}, DataError, "needs labels"),
        ({"float_model": LENET / "missing.onnx"}, ModelError, "no such file"),
        ({"data": {"x": np.zeros((3, 5), np.float32)}}, DataError, "does not fit model input"),
    ],
)
def test_bad_requests(
    artifact: Path, options: dict[str, Any], error: type[BitwrightError], message: str
) -> None:
    given: dict[str, Any] = {"artifact": artifact, "data": TEST, **options}
    with pytest.raises(error, match=message):
        bitwright.run(**given)
