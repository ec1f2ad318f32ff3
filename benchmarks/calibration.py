"""Time and memory of calibrating and quantizing EfficientNet-Lite0.

Time: the whole of ``bitwright.quantize`` (load, calibrate, quantize, write) with calibration
images streamed from an ``.npz`` file, beside onnxruntime's float inference over the same images in
the same process, runs alternated, medians. The allowance is 2x the inference plus 10 s.

Memory: the peak resident memory of a fresh process that quantizes. The bound is what the
interpreter and the same libraries take by themselves, plus the model file, plus its weights in
float32, plus two batches of activations (every tensor the model's nodes write, from its shapes).

Run from the repository root::

    python -m benchmarks.calibration

The exit code is 1 if one of the two bounds is broken.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks import models
from benchmarks.tables import table

BATCHES = (1, 8, 32)
ALLOWED_RATIO = 2.0
ALLOWED_SECONDS = 10.0


@dataclass(frozen=True)
class Bound:
    """What the memory bound is made of, in bytes."""

    baseline: int
    model_file: int
    weights: int
    activations_per_batch: int

    @property
    def total(self) -> int:
        """The bound itself."""
        return self.baseline + self.model_file + self.weights + 2 * self.activations_per_batch


# --------------------------------------------------------------------------- time


def float_session(path: Path, threads: int) -> ort.InferenceSession:
    """Open the peer: the float model in onnxruntime with default options.

    Parameters
    ----------
    path
        The float model.
    threads
        Threads inside an operator.

    Returns
    -------
    InferenceSession
        The session.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def inference_seconds(
    session: ort.InferenceSession, inputs: NDArray[np.float32], batch: int
) -> float:
    """Time one pass over all inputs.

    Parameters
    ----------
    session
        The float model.
    inputs
        ``[count, ...]``.
    batch
        Samples a call.

    Returns
    -------
    float
        Seconds.
    """
    name = session.get_inputs()[0].name
    begin = time.perf_counter()
    for start in range(0, len(inputs), batch):
        session.run(None, {name: inputs[start : start + batch]})
    return time.perf_counter() - begin


def quantize_seconds(path: Path, samples: Path, target: Path, batch: int) -> float:
    """Time ``bitwright.quantize`` as a whole.

    Parameters
    ----------
    path
        The float model.
    samples
        ``.npz`` file with the calibration images.
    target
        The file to write.
    batch
        Calibration samples a call; 0 leaves the number to bitwright.

    Returns
    -------
    float
        Seconds.
    """
    import bitwright

    begin = time.perf_counter()
    bitwright.quantize(
        path,
        precision="w8a8",
        calibration=samples,
        output=target,
        overwrite=True,
        batch_size=batch or None,
    )
    return time.perf_counter() - begin


# --------------------------------------------------------------------------- memory


def activation_bytes(path: Path, batch: int) -> int:
    """Add up the tensors that the model's nodes write for one batch, and its inputs.

    Parameters
    ----------
    path
        The float model; the first dimension of its input is the batch.
    batch
        Samples in the batch.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If a tensor's shape is not known.
    """
    model = onnx.load(path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    with tempfile.TemporaryDirectory(prefix="bitwright-shapes-") as folder:
        fixed, folded = Path(folder) / "fixed.onnx", Path(folder) / "folded.onnx"
        onnx.save(model, fixed)
        # onnxruntime folds the paddings, which the exporter wrote as small computations and which
        # hide the shapes from ONNX shape inference. Basic level: no fused operators.
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        ort.InferenceSession(fixed, options, providers=["CPUExecutionProvider"])
        graph = onnx.shape_inference.infer_shapes(onnx.load(folded), data_prop=True).graph
    known = {
        value.name: value.type.tensor_type
        for value in (*graph.value_info, *graph.output, *graph.input)
    }
    total = 0
    for name in [
        *(value.name for value in graph.input),
        *(output for node in graph.node for output in node.output if output),
    ]:
        dimensions = [d.dim_value for d in known[name].shape.dim] if name in known else [0]
        if 0 in dimensions:
            raise ValueError(f"{path}: the shape of tensor {name} is not known")
        item = onnx.helper.tensor_dtype_to_np_dtype(known[name].elem_type).itemsize
        total += math.prod(dimensions) * item
    return total


def weight_bytes(path: Path) -> int:
    """Add up the initializers of a model.

    Parameters
    ----------
    path
        The model.

    Returns
    -------
    int
        Bytes.
    """
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in onnx.load(path).graph.initializer
    )


def _probe(arguments: Sequence[str], text: str | None = None) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_probe", *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        cwd=models.REPOSITORY,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the memory probe failed ({done.returncode}):\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure_memory(path: Path, samples: Path, target: Path, batch: int) -> tuple[int, Bound, int]:
    """Measure the peak of a fresh process that quantizes, and work out the bound.

    Parameters
    ----------
    path
        The float model.
    samples
        ``.npz`` file with the calibration images.
    target
        The file to write.
    batch
        Calibration samples a call; 0 leaves the number to bitwright.

    Returns
    -------
    tuple
        Peak resident bytes, the bound, and the samples a call that it is made for.
    """
    quantizing = _probe(["quantize", str(path), str(samples), str(target), str(batch)])
    idle = _probe(["import"], json.dumps(quantizing["modules"]))
    bound = Bound(
        baseline=idle["peak_bytes"],
        model_file=path.stat().st_size,
        weights=weight_bytes(path),
        activations_per_batch=activation_bytes(path, quantizing["batch"]),
    )
    return int(quantizing["peak_bytes"]), bound, int(quantizing["batch"])


# --------------------------------------------------------------------------- command line


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print it.

    Parameters
    ----------
    arguments
        Command line; by default the process's own.

    Returns
    -------
    int
        0; 1 if a bound is broken; 2 if something is missing.
    """
    parser = argparse.ArgumentParser(description="time and memory of bitwright.quantize")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument(
        "--batch", type=int, default=0, help="calibration images a call; 0: bitwright's choice"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="onnxruntime's threads (the peer)")
    options = parser.parse_args(arguments)

    try:
        model = models.efficientnet_lite0()
        inputs = models.photographs(options.images, 0, split="calibration").inputs
    except models.FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    with tempfile.TemporaryDirectory(prefix="bitwright-calibration-") as folder:
        samples, target = Path(folder) / "samples.npz", Path(folder) / "quantized.onnx"
        session = float_session(model.path, options.threads)
        arrays: dict[str, Any] = {session.get_inputs()[0].name: inputs}
        np.savez(samples, **arrays)

        print("choosing the peer's batch", file=sys.stderr, flush=True)
        inference_seconds(session, inputs[:32], BATCHES[-1])
        passes = {batch: inference_seconds(session, inputs, batch) for batch in BATCHES}
        best = min(passes, key=lambda batch: passes[batch])
        peer: list[float] = []
        ours: list[float] = []
        for run in range(options.runs):
            print(f"run {run + 1} of {options.runs}", file=sys.stderr, flush=True)
            peer.append(inference_seconds(session, inputs, best))
            ours.append(quantize_seconds(model.path, samples, target, options.batch))
            gc.collect()
        print("memory", file=sys.stderr, flush=True)
        peak, bound, batch = measure_memory(model.path, samples, target, options.batch)

    inference, quantize = statistics.median(peer), statistics.median(ours)
    allowance = ALLOWED_RATIO * inference + ALLOWED_SECONDS
    seconds = [
        [f"onnxruntime {ort.__version__}, float inference, batch {best}", *_spread(peer), "1.00"],
        [
            f"bitwright.quantize, batch {batch}",
            *_spread(ours),
            f"{quantize / inference:.2f}",
        ],
        [],
        [
            f"allowance: {ALLOWED_RATIO:.0f}x + {ALLOWED_SECONDS:.0f} s",
            f"{allowance:.2f}",
            "",
            "",
            f"{allowance / inference:.2f}",
        ],
    ]
    memory = [
        ["interpreter and libraries", _megabytes(bound.baseline)],
        ["model file", _megabytes(bound.model_file)],
        ["weights, float32", _megabytes(bound.weights)],
        [f"activations, 2 x {batch} images", _megabytes(2 * bound.activations_per_batch)],
        [],
        ["bound", _megabytes(bound.total)],
        ["bitwright.quantize, peak", _megabytes(peak)],
    ]
    print(
        f"\nEfficientNet-Lite0, {options.images} images, {options.threads} threads for "
        f"onnxruntime, {options.runs} runs; its float inference by batch: "
        + ", ".join(f"{batch}: {passes[batch]:.2f} s" for batch in BATCHES)
        + "\n"
    )
    print(table(("<time", "median s", "min s", "max s", "ratio"), seconds))
    print("\n" + table(("<resident memory", "MB"), memory) + "\n")
    fast, small = quantize <= allowance, peak <= bound.total
    print(f"time: {quantize:.2f} s of {allowance:.2f} s: {'kept' if fast else 'BROKEN'}")
    print(
        f"memory: {_megabytes(peak)} MB of {_megabytes(bound.total)} MB: "
        f"{'kept' if small else 'BROKEN'}"
    )
    return 0 if fast and small else 1


def _spread(values: Sequence[float]) -> tuple[str, str, str]:
    return f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
