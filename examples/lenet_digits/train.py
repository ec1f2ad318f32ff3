"""Train LeNet-5 on handwritten digits and write ``lenet.onnx``, ``calibration.npz``, ``test.npz``.

Run as ``python train.py --digits digits.npz``; the README beside this file says where the digits
come from. Needs PyTorch (``pip install bitwright[examples]``) and less than a minute on two cores.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

TEST_IMAGES = 2_000
CALIBRATION_IMAGES = 256
PIXEL_SCALE = 255.0

BATCH = 64
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 5e-2
ROTATION_DEGREES = 15.0
ZOOM = 0.1
SHIFT = 0.14  # of half the image: two pixels

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Weights = dict[str, npt.NDArray[np.float32]]


def load_digits(path: Path) -> tuple[Images, Labels]:
    """Read ``images`` uint8 [n, 28, 28] and ``labels`` [n]; give [n, 1, 28, 28] and int64 [n]."""
    with np.load(path, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise SystemExit(f"{path}: images are {images.dtype} {images.shape}, not uint8 [n, 28, 28]")
    if labels.shape != images.shape[:1]:
        raise SystemExit(f"{path}: {labels.shape} labels for {len(images)} images")
    if len(images) < TEST_IMAGES + CALIBRATION_IMAGES:
        raise SystemExit(f"{path}: {len(images)} images are too few")
    return images[:, None], labels.astype(np.int64)


def lenet5() -> nn.Sequential:
    """LeNet-5 (LeCun et al., 1998) as it is used today: ReLU, max pooling, three dense layers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def distort(images: torch.Tensor) -> torch.Tensor:
    """Rotate, zoom and shift each image a little, at random: 8,000 digits alone are few."""

    def uniform(limit: float) -> torch.Tensor:
        return (2 * torch.rand(len(images)) - 1) * limit

    angle, zoom = uniform(math.radians(ROTATION_DEGREES)), 1 + uniform(ZOOM)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = (
        torch.stack([cos, -sin, uniform(SHIFT)], dim=1),
        torch.stack([sin, cos, uniform(SHIFT)], dim=1),
    )
    grid = functional.affine_grid(torch.stack(rows, dim=1), images.shape, align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(images: Images, labels: Labels, *, epochs: int, seed: int) -> nn.Sequential:
    """Train a network on pixel values divided by 255."""
    torch.manual_seed(seed)
    inputs, targets = torch.from_numpy(images / np.float32(PIXEL_SCALE)), torch.from_numpy(labels)
    model = lenet5()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=PEAK_LEARNING_RATE,
        total_steps=epochs * math.ceil(len(inputs) / BATCH),
    )
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(distort(inputs[chosen])), targets[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1:2d} of {epochs}: loss {total / len(inputs):.4f}", flush=True)
    return model


def export_weights(model: nn.Sequential) -> Weights:
    """Take out the weights, with the factor 1/255 of the input moved into the first layer.

    The network then takes raw pixel values: 8-bit activations of its input are the pixels.
    """
    names = ("conv1", "conv2", "fc1", "fc2", "fc3")
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = {
        f"{name}.{key}": value.detach().numpy()
        for name, layer in zip(names, layers, strict=True)
        for key, value in layer.named_parameters()
    }
    weights["conv1.weight"] = weights["conv1.weight"] / np.float32(PIXEL_SCALE)
    return weights


def build_onnx(weights: Weights) -> onnx.ModelProto:
    """Build the ONNX model: ``image`` float32 [N, 1, 28, 28], 0 to 255, to ``logits`` [N, 10]."""

    def conv(name: str, source: str, padding: int) -> onnx.NodeProto:
        return helper.make_node(
            "Conv",
            [source, f"{name}.weight", f"{name}.bias"],
            [f"{name}.out"],
            name=name,
            kernel_shape=[5, 5],
            pads=[padding] * 4,
        )

    def dense(name: str, source: str, output: str) -> onnx.NodeProto:
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        return helper.make_node("Gemm", inputs, [output], name=name, transB=1)

    def relu(name: str, source: str) -> onnx.NodeProto:
        return helper.make_node("Relu", [source], [f"{name}.out"], name=name)

    def pool(name: str, source: str) -> onnx.NodeProto:
        return helper.make_node(
            "MaxPool", [source], [f"{name}.out"], name=name, kernel_shape=[2, 2], strides=[2, 2]
        )

    graph = helper.make_graph(
        [
            conv("conv1", "image", padding=2),
            relu("relu1", "conv1.out"),
            pool("pool1", "relu1.out"),
            conv("conv2", "pool1.out", padding=0),
            relu("relu2", "conv2.out"),
            pool("pool2", "relu2.out"),
            helper.make_node("Flatten", ["pool2.out"], ["flatten.out"], name="flatten", axis=1),
            dense("fc1", "flatten.out", "fc1.out"),
            relu("relu3", "fc1.out"),
            dense("fc2", "relu3.out", "fc2.out"),
            relu("relu4", "fc2.out"),
            dense("fc3", "relu4.out", "logits"),
        ],
        "lenet5",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,  # the version that came with opset 17: old tools read the file as well
        producer_name="bitwright examples/lenet_digits",
        doc_string="LeNet-5 trained on handwritten digits (MNIST); input: pixel values 0 to 255.",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def accuracy(model: nn.Sequential, images: Images, labels: Labels) -> float:
    """Share of images whose largest logit is the label's."""
    with torch.no_grad():
        logits = model(torch.from_numpy(images / np.float32(PIXEL_SCALE)))
    return float((logits.argmax(dim=1).numpy() == labels).mean())


def main() -> None:
    """Train, write the three files and print the accuracy on the test images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--digits", type=Path, required=True, help="npz with images and labels")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    images, labels = load_digits(arguments.digits)
    started = time.perf_counter()
    model = train(
        images[:-TEST_IMAGES], labels[:-TEST_IMAGES], epochs=arguments.epochs, seed=arguments.seed
    )
    seconds = time.perf_counter() - started

    arguments.output.mkdir(parents=True, exist_ok=True)
    onnx.save(build_onnx(export_weights(model)), arguments.output / "lenet.onnx")
    np.savez_compressed(arguments.output / "calibration.npz", image=images[:CALIBRATION_IMAGES])
    np.savez_compressed(
        arguments.output / "test.npz", image=images[-TEST_IMAGES:], labels=labels[-TEST_IMAGES:]
    )
    share = accuracy(model, images[-TEST_IMAGES:], labels[-TEST_IMAGES:])
    print(
        f"trained on {len(images) - TEST_IMAGES:,} images in {seconds:.0f} s; "
        f"accuracy on {TEST_IMAGES:,} test images: {share:.2%}"
    )


if __name__ == "__main__":
    main()
