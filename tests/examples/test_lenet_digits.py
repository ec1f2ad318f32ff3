"""The LeNet-5 example: its data are what the README says, and the demo and the training run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

import bitwright

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
LAYERS = ["conv1", "conv2", "fc1", "fc2", "fc3"]
PLANS = ["w8a8", "w4a4", "mixed"]
TARGETS = ["bitfusion/eyeriss", "silago/drra"]


def arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def predict(model: Path, images: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.astype(np.float32)})
    classes: npt.NDArray[np.int64] = np.asarray(logits).argmax(axis=1)
    return classes


def script(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_test_images() -> None:
    data = arrays(FOLDER / "test.npz")
    assert set(data) == {"image", "labels"}
    assert data["image"].shape == (2_000, 1, 28, 28)
    assert data["image"].dtype == np.uint8
    assert data["labels"].shape == (2_000,)
    assert data["labels"].dtype == np.int64
    # All ten digits, about as often as one another.
    counts = np.bincount(data["labels"].astype(np.int64))
    assert len(counts) == 10
    assert counts.min() > 150


def test_calibration_images() -> None:
    data = arrays(FOLDER / "calibration.npz")
    assert set(data) == {"image"}
    assert data["image"].shape == (256, 1, 28, 28)
    assert data["image"].dtype == np.uint8


def test_no_image_is_in_both_or_twice() -> None:
    calibration = {image.tobytes() for image in arrays(FOLDER / "calibration.npz")["image"]}
    test = {image.tobytes() for image in arrays(FOLDER / "test.npz")["image"]}
    assert (len(calibration), len(test)) == (256, 2_000)
    assert not calibration & test


def test_model_has_the_five_layers() -> None:
    model = onnx.load(FOLDER / "lenet.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")] == LAYERS
    (image,), (logits,) = model.graph.input, model.graph.output
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (image, logits)
    ]
    assert shapes == [["N", 1, 28, 28], ["N", 10]]


def test_model_is_accurate_on_raw_pixels() -> None:
    data = arrays(FOLDER / "test.npz")
    accuracy = (predict(FOLDER / "lenet.onnx", data["image"]) == data["labels"]).mean()
    # LeNet-5 reached 99.05 % on MNIST with 60,000 training images (LeCun et al., Proc. IEEE 1998).
    assert accuracy >= 0.975


def test_demo_prints_one_table(tmp_path: Path) -> None:
    done = script("demo.py", "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    rows = {}
    for line in done.stdout.splitlines():
        cells = [cell.strip(" %") for cell in line.split("│")[1:-1]]
        if len(cells) == 13 and cells[0] in TARGETS:
            rows[cells[0], cells[1]] = [float(cell.replace(",", "")) for cell in cells[2:]]
    assert list(rows) == [(target, plan) for target in TARGETS for plan in PLANS]
    for (target, plan), row in rows.items():
        float_error, qdq, artifact, equal, weight_bytes, faster, energy, *seconds = row
        assert float_error <= 2.5
        assert abs(qdq - artifact) <= 0.1 + 1e-9
        assert equal == 100
        folder = tmp_path / "out" / f"{target.partition('/')[0]}-{plan}"
        assert weight_bytes == bitwright.load_artifact(folder).manifest.weight_bytes
        assert all(value > 0 for value in seconds)
        assert energy > 0
        # SiLago: 4 bits are four times as fast as 16, 8 bits twice (arXiv 2108.01192).
        if target == "silago/drra":
            assert {"w8a8": faster == 2, "w4a4": faster == 4, "mixed": 2 < faster < 4}[plan]
    # 61,470 weights (150 + 2,400 + 48,000 + 10,080 + 840), no bias.
    for target in TARGETS:
        assert rows[target, "w8a8"][4] == 61_470
        assert rows[target, "w4a4"][4] == 30_735
    assert rows[TARGETS[0], "mixed"][4] == 150 + 1_200 + 12_000 + 5_040 + 840
    assert rows[TARGETS[1], "mixed"][4] == 150 + 2_400 + 24_000 + 5_040 + 840
    assert "2,000 test images" in done.stdout
    assert "float32 weights: 245,880 bytes" in done.stdout


@pytest.mark.slow
def test_training_writes_the_three_files(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    # The committed images stand in for the 10,000; the few training images get the labels that the
    # committed model gives them.
    calibration, test = arrays(FOLDER / "calibration.npz"), arrays(FOLDER / "test.npz")
    guesses = predict(FOLDER / "lenet.onnx", calibration["image"])
    np.savez(
        tmp_path / "digits.npz",
        images=np.concatenate([calibration["image"], test["image"]])[:, 0],
        labels=np.concatenate([guesses, test["labels"]]).astype(np.uint8),
    )
    out = tmp_path / "out"
    result = script(
        *("train.py", "--digits", tmp_path / "digits.npz", "--output", out, "--epochs", "20"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr

    np.testing.assert_array_equal(arrays(out / "calibration.npz")["image"], calibration["image"])
    for name, array in arrays(out / "test.npz").items():
        np.testing.assert_array_equal(array, test[name])
    # What the script measures in PyTorch is what its ONNX file does on raw pixels.
    found = re.search(r"accuracy on 2,000 test images: ([\d.]+)%", result.stdout)
    assert found is not None, result.stdout
    accuracy = (predict(out / "lenet.onnx", test["image"]) == test["labels"]).mean()
    assert float(found[1]) == pytest.approx(100 * accuracy, abs=0.051)
    assert accuracy > 0.5  # 256 images, 20 epochs: far above chance
