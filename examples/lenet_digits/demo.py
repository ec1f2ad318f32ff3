"""Quantize LeNet-5 at four precisions and print errors and sizes in one table.

Run as ``make demo`` from the root of the repository, or as ``python demo.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import bitwright
from bitwright import Precision, PrecisionPlan

HERE = Path(__file__).resolve().parent
MODEL = HERE / "lenet.onnx"
CALIBRATION = HERE / "calibration.npz"
TEST = HERE / "test.npz"

# The first and the last layer hold 2 % of the weights and are usually the most sensitive: they stay
# at 8 bits. fc1 holds 78 % of the weights: it goes down to 2 bits.
MIXED = {"conv1": "w8a8", "conv2": "w4a8", "fc1": "w2a8", "fc2": "w4a8", "fc3": "w8a8"}

MAX_DIFFERENCE = 0.1
"""How far, in points of error, onnxruntime and the integer reference may lie apart."""


def plans() -> dict[str, PrecisionPlan]:
    """Name and precision plan of every row: three uniform plans and a mixed one."""
    uniform = {
        text: PrecisionPlan(layers=dict.fromkeys(MIXED, Precision.parse(text)))
        for text in ("w8a8", "w4a4", "w2a8")
    }
    mixed = PrecisionPlan(layers={name: Precision.parse(text) for name, text in MIXED.items()})
    return uniform | {"mixed": mixed}


def main() -> int:
    """Print the table; give 1 if onnxruntime and the integer reference disagree, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE.parents[1] / "out" / "lenet_digits",
        help="folder for the quantized models (default: out/lenet_digits in the repository)",
    )
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    with np.load(CALIBRATION, allow_pickle=False) as archive:
        calibration_images = len(archive["image"])

    original = bitwright.evaluate(MODEL, TEST)
    float_error = 100 * (1 - original.value)

    table = Table(title="LeNet-5 on handwritten digits: error and size", title_justify="left")
    table.add_column("plan")
    for heading in ("float", "QDQ, onnxruntime", "integer reference"):
        table.add_column(f"error %\n{heading}", justify="right")
    for heading in ("weights", "file"):
        table.add_column(f"bytes\n{heading}", justify="right")

    failures = []
    float_bytes = 0
    for name, plan in plans().items():
        path = output / f"lenet-{name}.onnx"
        quantized = bitwright.quantize(
            MODEL, plan=plan, calibration=CALIBRATION, output=path, overwrite=True
        )
        qdq = bitwright.evaluate(path, TEST)
        reference = bitwright.evaluate(path, TEST, engine="reference")
        qdq_error, reference_error = 100 * (1 - qdq.value), 100 * (1 - reference.value)
        # 1e-9: shares of the images are not exact in binary.
        if abs(qdq_error - reference_error) > MAX_DIFFERENCE + 1e-9:
            failures.append(f"{name}: {qdq_error:.2f} % and {reference_error:.2f} %")
        table.add_row(
            name,
            f"{float_error:.2f}",
            f"{qdq_error:.2f}",
            f"{reference_error:.2f}",
            f"{quantized.weight_bytes:,}",
            f"{path.stat().st_size:,}",
        )
        float_bytes = quantized.float_weight_bytes

    console = Console(width=100)  # the same table on a terminal and in a file
    console.print(table)
    console.print(
        f"{original.samples:,} test images (MNIST digits, not used in training or calibration); "
        f"calibrated on {calibration_images} training images.",
        highlight=False,
    )
    console.print(
        f"float32 model: {float_bytes:,} bytes of weights, file {MODEL.stat().st_size:,} bytes.",
        highlight=False,
    )
    mixed = " ".join(f"{layer}={text}" for layer, text in MIXED.items())
    console.print(f"mixed: {mixed}", highlight=False)
    console.print(f"quantized models: {output}", highlight=False, soft_wrap=True)
    for failure in failures:
        print(
            f"onnxruntime and the integer reference differ by more than {MAX_DIFFERENCE} points: "
            f"{failure}",
            file=sys.stderr,
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
