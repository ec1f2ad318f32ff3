"""Compile LeNet-5 at three precisions for two accelerators, run it, and print one table.

Run as ``make demo`` from the root of the repository, or as ``python demo.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import bitwright

HERE = Path(__file__).resolve().parent
MODEL = HERE / "lenet.onnx"
CALIBRATION = HERE / "calibration.npz"
TEST = HERE / "test.npz"

# The first and the last layer hold 2 % of the weights and are usually the most sensitive: they stay
# at 8 bits. fc1 holds 78 % of the weights: on Bit Fusion, where the bits of weights and activations
# are independent, its weights go down to 2 bits. On SiLago both have the same width, at least 4.
MIXED = {
    "bitfusion/eyeriss": {
        "conv1": "w8a8",
        "conv2": "w4a8",
        "fc1": "w2a8",
        "fc2": "w4a8",
        "fc3": "w8a8",
    },
    "silago/drra": {
        "conv1": "w8a8",
        "conv2": "w8a8",
        "fc1": "w4a4",
        "fc2": "w4a4",
        "fc3": "w8a8",
    },
}


def main() -> int:
    """Print the table; give 1 if an artefact differs from the integer reference, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE.parents[1] / "out" / "lenet_digits",
        help="folder for the artefacts (default: out/lenet_digits in the repository)",
    )
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    with np.load(CALIBRATION, allow_pickle=False) as archive:
        calibration_images = len(archive["image"])

    table = Table(title="LeNet-5 on handwritten digits", title_justify="left")
    table.add_column("target", no_wrap=True)
    table.add_column("plan")
    for form in ("float", "QDQ", "artefact"):
        table.add_column(f"error %\n{form}", justify="right")
    table.add_column("equal\n%", justify="right")
    table.add_column("weight\nbytes", justify="right")
    table.add_column("faster\nx", justify="right")
    table.add_column("energy\nuJ", justify="right")
    table.add_column("compile\ns", justify="right")
    for form in ("float", "QDQ", "artefact"):
        table.add_column(f"ms\n{form}", justify="right")

    failures = []
    for target, mixed in MIXED.items():
        for name in ("w8a8", "w4a4", "mixed"):
            folder = output / f"{target.partition('/')[0]}-{name}"
            plan = bitwright.make_plan(
                MODEL,
                precision="w8a8" if name == "mixed" else name,
                layers=mixed if name == "mixed" else {},
            )
            start = time.perf_counter()
            artifact = bitwright.compile(
                MODEL, target, plan=plan, calibration=CALIBRATION, output=folder, overwrite=True
            )
            seconds = time.perf_counter() - start
            result = bitwright.run(folder, TEST)
            cost = bitwright.cost(MODEL, target, plan=plan, baseline="w16a16")
            reference = result["reference"].equal_share
            if reference < 1:
                failures.append(f"{folder.name}: {100 * reference:.4f} % of the outputs are equal")
            forms = [entry for entry in result.forms if entry.form != "reference"]
            table.add_row(
                target,
                name,
                *(f"{100 * (1 - entry.value):.2f}" for entry in forms),
                f"{100 * reference:.2f}",
                f"{artifact.manifest.weight_bytes:,}",
                f"{cost.speedup:.2f}",
                f"{(cost.cost.total_energy_pj or 0) / 1e6:.3g}",
                f"{seconds:.1f}",
                *(f"{1e6 * entry.seconds / result.samples:.0f}" for entry in forms),
            )
        table.add_section()

    console = Console(width=140)  # the same table on a terminal and in a file
    console.print(table)
    console.print(
        f"{result.samples:,} test images (MNIST digits, not used in training or calibration); "
        f"calibrated on {calibration_images} training images.\n"
        "equal: outputs of the artefact that equal the integer reference to the last bit; "
        "ms: for 1,000 images, on this machine.\n"
        "faster than at 16 bits, and energy: on the accelerator, by its cost model, one image.\n"
        f"float32 weights: {artifact.manifest.float_weight_bytes:,} bytes.",
        highlight=False,
    )
    for target, mixed in MIXED.items():
        text = " ".join(f"{layer}={precision}" for layer, precision in mixed.items())
        console.print(f"mixed for {target}: {text}", highlight=False)
    console.print(f"artefacts: {output}", highlight=False, soft_wrap=True)
    for failure in failures:
        print(f"the artefact is not the integer reference: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
