"""Speed of the integer kernels beside onnxruntime's float32 operators.

Each layer runs alone: the integer kernel on uint8 activations and int8 weights with requantization
to int8, and onnxruntime on the same layer in float32: same process, rounds alternated, the median
over the rounds of the fastest call in each. The fastest, because a call of a few microseconds tells
little where it waits for a thread that the machine gave to somebody else.

Run from the repository root::

    python -m benchmarks.kernels

The exit code is 1 if a kernel takes more than three times as long as onnxruntime.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from benchmarks.tables import table
from bitwright.targets.kernels import host
from bitwright.targets.kernels.spec import (
    Accumulators,
    Codes,
    Convolution,
    Floats,
    Matmul,
    Operand,
)

ALLOWED_RATIO = 3.0

Spec: TypeAlias = Convolution | Matmul

_DATA = Operand("uint8", 0)
_CODES = Codes("int8", 3, -128, 127)


def _conv(
    channels: int,
    side: int,
    filters: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Convolution:
    return Convolution(
        None,
        channels,
        (side, side),
        filters,
        (kernel, kernel),
        _DATA,
        _CODES,
        strides=(stride, stride),
        pads=(padding,) * 4,
        groups=groups,
    )


def _product(depth: int, columns: int) -> Matmul:
    return Matmul((None,), depth, columns, _DATA, _CODES)


#: Name, layer, and images or rows of a call.
LAYERS: tuple[tuple[str, Spec, int], ...] = (
    ("LeNet conv1, 5x5, 1 to 6 at 28", _conv(1, 28, 6, 5), 64),
    ("LeNet conv2, 5x5, 6 to 16 at 12", _conv(6, 12, 16, 5), 64),
    ("LeNet fc1, 256 to 120", _product(256, 120), 64),
    ("LeNet fc2, 120 to 84", _product(120, 84), 64),
    ("LeNet fc3, 84 to 10, float out", Matmul((None,), 84, 10, _DATA, Floats()), 64),
    ("1x1, 16 to 96 at 112", _conv(16, 112, 96, 1), 1),
    ("1x1, 192 to 32 at 28", _conv(192, 28, 32, 1), 1),
    ("1x1, 320 to 1280 at 7", _conv(320, 7, 1280, 1), 1),
    ("3x3, 64 to 64 at 56", _conv(64, 56, 64, 3, padding=1), 1),
    ("3x3, 512 to 512 at 7", _conv(512, 7, 512, 3, padding=1), 1),
    ("3x3 stride 2, 3 to 32 at 224", _conv(3, 224, 32, 3, 2, 1), 1),
    ("depthwise 3x3 stride 2, 96 at 112", _conv(96, 112, 96, 3, 2, 1, 96), 1),
    ("depthwise 5x5, 240 at 28", _conv(240, 28, 240, 5, 1, 2, 240), 1),
    ("matrix 1024 x 1024", _product(1024, 1024), 256),
    ("matrix 1024 x 1024", _product(1024, 1024), 1),
)


def multiplications(spec: Spec, count: int) -> int:
    """Count the multiply-accumulate operations of a call.

    Parameters
    ----------
    spec
        The layer.
    count
        Images or rows.

    Returns
    -------
    int
        Operations.
    """
    if isinstance(spec, Convolution):
        return spec.macs_per_image * count
    return spec.depth * spec.columns * count


def input_shape(spec: Spec, count: int) -> tuple[int, ...]:
    """Shape of the activations of a call."""
    if isinstance(spec, Convolution):
        return (count, spec.in_channels, *spec.size)
    return (count, spec.depth)


def integer_kernel(spec: Spec, count: int) -> Callable[[], Any]:
    """Compile a layer's kernel and return a call of it on random numbers."""
    import tvm

    from bitwright.targets.kernels import convolution, matmul

    isa = host.detect()
    module: Any = convolution if isinstance(spec, Convolution) else matmul
    functions = {
        "kernel": module.kernel(spec, isa, "kernel"),
        "pack": module.pack(spec, isa, "pack"),
    }
    built = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(host.target(isa)))
    generator = np.random.default_rng(0)
    channels = spec.out_channels if isinstance(spec, Convolution) else spec.columns
    weights = generator.integers(-128, 128, spec.weight_shape).astype(np.int8)
    packed = tvm.runtime.tensor(np.zeros(module.layout(spec, isa).shape, np.int32))
    built["pack"](tvm.runtime.tensor(weights), packed)
    shape = input_shape(spec, count)
    out_shape: tuple[int, ...] = (count, channels)
    if isinstance(spec, Convolution):
        out_shape += spec.output_size
    assert not isinstance(spec.output, Accumulators)
    arguments = [
        tvm.runtime.tensor(generator.integers(0, 256, shape).astype(np.uint8)),
        packed,
        tvm.runtime.tensor(np.zeros(channels, np.int32)),
        tvm.runtime.tensor(np.full(channels, 1e-3, np.float32)),
        tvm.runtime.tensor(np.zeros(out_shape, spec.output.dtype)),
    ]
    kernel = built["kernel"]
    return lambda: kernel(*arguments)


def float_operator(spec: Spec, count: int, threads: int) -> Callable[[], Any]:
    """Return a call of onnxruntime on the same layer in float32."""
    generator = np.random.default_rng(0)
    channels = spec.out_channels if isinstance(spec, Convolution) else spec.columns
    shape = input_shape(spec, count)
    attributes: dict[str, Any] = {}
    if isinstance(spec, Convolution):
        attributes = {
            "strides": spec.strides,
            "dilations": spec.dilations,
            "pads": spec.pads,
            "group": spec.groups,
        }
    operator = "Conv" if isinstance(spec, Convolution) else "Gemm"
    weights = generator.standard_normal(spec.weight_shape, np.float32)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w", "b"], ["y"], **attributes)],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(weights, "w"),
            numpy_helper.from_array(np.zeros(channels, np.float32), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    data = generator.standard_normal(shape, np.float32)
    return lambda: session.run(None, {"x": data})


def alternate(calls: Sequence[Callable[[], Any]], rounds: int, seconds: float) -> list[float]:
    """Time calls in turns.

    Parameters
    ----------
    calls
        What to time.
    rounds
        Turns of each.
    seconds
        Length of a turn.

    Returns
    -------
    list of float
        Seconds of one call of each: the fastest of a turn, the median of these over the turns.
    """
    fastest: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, bests in zip(calls, fastest, strict=True):
            best = math.inf
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                begin = time.perf_counter()
                call()
                best = min(best, time.perf_counter() - begin)
            bests.append(best)
    return [statistics.median(bests) for bests in fastest]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print it.

    Parameters
    ----------
    arguments
        Command line; by default the process's own.

    Returns
    -------
    int
        0; 1 if a bound is broken.
    """
    parser = argparse.ArgumentParser(description="integer kernels beside onnxruntime's float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a round")
    parser.add_argument("--only", default="", help="layers whose name contains this text")
    options = parser.parse_args(arguments)
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read when TVM starts its threads

    rows, ratios = [], []
    for name, spec, count in LAYERS:
        if options.only not in name:
            continue
        calls = (integer_kernel(spec, count), float_operator(spec, count, options.threads))
        ours, peer = alternate(calls, options.rounds, options.seconds)
        operations = multiplications(spec, count)
        ratios.append(ours / peer)
        rows.append(
            [
                name,
                str(count),
                f"{ours * 1e6:.0f}",
                f"{operations / ours / 1e9:.1f}",
                f"{peer * 1e6:.0f}",
                f"{operations / peer / 1e9:.1f}",
                f"{ours / peer:.2f}",
            ]
        )
    if not rows:
        parser.error(f"no layer has {options.only!r} in its name")
    print(f"\n{host.detect().name}, {options.threads} threads, onnxruntime {ort.__version__}\n")
    headings = ("<layer", "batch", "kernel us", "GMAC/s", "float32 us", "GMAC/s", "ratio")
    print(table(headings, rows))
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
    worst = max(ratios)
    kept = worst <= ALLOWED_RATIO
    print(f"\ngeometric mean of the ratios: {mean:.2f}")
    print(f"worst: {worst:.2f} of {ALLOWED_RATIO:.0f} allowed: {'kept' if kept else 'BROKEN'}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
