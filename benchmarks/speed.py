"""Speed of compiled networks beside onnxruntime.

LeNet-5 in batches of 64 images; with ``--all`` also the text-direction network (batches of 8) and
EfficientNet-Lite0 (batches of 8, and of 1). w8a8, two threads: the artefact, onnxruntime with the
float model, and onnxruntime with the QDQ model, its graph optimisations off (as the reference of
arithmetic) and on. The contenders take turns in blocks of 20 runs, so that threads that still spin
after a run disturb nobody; medians. The bound: for LeNet-5 the artefact takes at most 4 times what
onnxruntime takes for the float model.

Run from the repository root::

    python -m benchmarks.speed

The exit code is 1 if the bound is broken.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import bitwright
from benchmarks import quality
from benchmarks.tables import table

BLOCK, WARM_UP = 20, 5  # runs
THREADS = 2
ALLOWED_RATIO = 4.0

Array = NDArray[Any]


def session(path: Path, name: str, *, optimize: bool) -> Callable[[Array], object]:
    """An onnxruntime session that runs a batch of images."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    made = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: made.run(None, {name: images})


def medians(
    contenders: Mapping[str, Callable[[Array], object]], images: Array, blocks: int
) -> dict[str, float]:
    """Median seconds of a run of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(blocks):
        for name, run in contenders.items():
            for number in range(WARM_UP + BLOCK):
                start = time.perf_counter()
                run(images)
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(case: quality.Case, batches: Sequence[int], precision: str, blocks: int) -> float:
    """Print a table for each batch size; give the last ratio of the artefact to float32."""
    model = case.model.path
    name = quality.input_name(model)
    images = np.asarray(case.calibration.inputs, np.float32)
    ratio = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        artifact = bitwright.compile(
            model,
            "bitfusion/eyeriss",
            precision=precision,
            calibration={name: images},
            # The kernels want to know the size of an image; the batch stays free.
            input_shapes={name: [None, *images.shape[1:]]},
            output=path,
        )
        artifact = bitwright.load_artifact(path, threads=THREADS)
        qdq = path / "model.qdq.onnx"
        peer, ours = "onnxruntime, float32", f"artefact, {precision}"
        contenders: dict[str, Callable[[Array], object]] = {
            peer: session(Path(model), name, optimize=True),
            "onnxruntime, QDQ, as it stands": session(qdq, name, optimize=False),
            ours: lambda batch: artifact.run({name: batch}),
        }
        try:
            contenders["onnxruntime, QDQ, optimised"] = session(qdq, name, optimize=True)
        except Exception as error:  # its optimiser breaks some models
            print(f"onnxruntime cannot optimise the QDQ model: {str(error).splitlines()[0][:120]}")
        for batch in batches:
            seconds = medians(contenders, images[:batch], blocks)
            ratio = seconds[ours] / seconds[peer]
            rows = [
                [entry, f"{1e3 * value:.3f}", f"{value / seconds[peer]:.2f}"]
                for entry, value in seconds.items()
            ]
            runs = blocks * BLOCK
            print(f"{case.name}, batch {batch}, {THREADS} threads, median of {runs} runs")
            print(table(["<", "ms a batch", "times float32"], rows))
    return ratio


def main() -> int:
    """Print the tables; give 1 if the bound is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default="w8a8", help="of all layers (default: w8a8)")
    parser.add_argument("--blocks", type=int, default=10, help="of 20 runs of each (default: 10)")
    parser.add_argument("--all", action="store_true", help="larger networks too")
    options = parser.parse_args()
    if options.all:
        for case, batches in (
            (quality.text_direction(64, 1, 0), (8,)),
            (quality.efficientnet(32, 1, 0), (8, 1)),
        ):
            measure(case, batches, options.precision, max(options.blocks // 5, 1))
    ratio = measure(quality.lenet(64, 1, 0), (64,), options.precision, options.blocks)
    print(f"allowed for LeNet-5: {ALLOWED_RATIO:g} times float32; measured: {ratio:.2f}")
    return 0 if ratio <= ALLOWED_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
