"""Time of compiling: LeNet-5, and chains of 10 to 200 layers.

LeNet-5 is quantized and compiled from the float model at w8a8; the bound is 10 seconds. The chains
alternate 3x3 and 1x1 convolutions of 16 channels, each with its own weights, with ReLU between
them. They are quantized beforehand; what is timed is ``bitwright.compile`` of the QDQ model, all of
it: load, import, passes, code, linking, writing and loading. TVM's own compilation of the float
chain (import, legalize, code; nothing scheduled, nothing written) stands beside it as the peer. The
bound: a layer of the longest chain takes at most 1.5 times the processor time that a layer takes on
average over the chains of 50 layers and more.

The passes that order transfers (``materialize-transfers``, ``popcount-reorder``) are timed alone,
on LeNet-5 and on a chain of 100 layers. The bound: they take at most 20 % of the processor time of
compiling without them, from the QDQ model on. What ``main_link`` adds beside them, its kernels and
its code, is printed; kernels are a cost of every model once, whatever its size.

Run from the repository root::

    python -m benchmarks.compile

The exit code is 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import bitwright
from benchmarks.tables import table

LENET = Path(__file__).resolve().parents[1] / "examples" / "lenet_digits"

LAYERS = (10, 20, 50, 100, 200)
ALLOWED_SECONDS = 10.0
ALLOWED_GROWTH = 1.5
ALLOWED_SHARE = 0.2
ORDERED_LAYERS = 100
LINK = "ordering-simulator"
CHANNELS = 16


def chain(layers: int) -> onnx.ModelProto:
    """A chain of convolutions [n, 16, 16, 16] -> [n, 16, 16, 16] with ReLU between them."""
    random = np.random.default_rng(layers)
    nodes, weights = [], []
    value = "x"
    for number in range(layers):
        size = 3 if number % 2 == 0 else 1
        deviation = (2 / (CHANNELS * size * size)) ** 0.5  # keeps the variance behind ReLU
        array = random.normal(0, deviation, (CHANNELS, CHANNELS, size, size)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{number}"))
        inputs, name = [value, f"w{number}"], f"conv{number}"
        pads = [size // 2] * 4
        nodes.append(helper.make_node("Conv", inputs, [f"c{number}"], name, pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], f"relu{number}"))
        value = f"r{number}"
    shape: list[str | int | None] = ["n", CHANNELS, 16, 16]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        weights,
    )
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def seconds(work: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median time of some runs: by the clock, and of the processor."""
    taken = []
    for _ in range(runs):
        start, start_processor = time.perf_counter(), time.process_time()
        work()
        taken.append((time.perf_counter() - start, time.process_time() - start_processor))
    clock, processor = zip(*taken, strict=True)
    return statistics.median(clock), statistics.median(processor)


def order_seconds(path: Path, target: str, runs: int) -> float:
    """Processor time of the passes that order transfers, and of reading what they made."""
    import tvm

    from bitwright.importer import import_model
    from bitwright.passes.link_entry import read_transfers
    from bitwright.passes.lower_to_integer import LowerToInteger
    from bitwright.passes.materialize_transfers import MaterializeTransfers
    from bitwright.passes.partition_for_target import PartitionForTarget
    from bitwright.passes.popcount_reorder import PopcountReorder
    from bitwright.passes.propagate_quantization import PropagateQuantization
    from bitwright.quant.load import load

    before = [PropagateQuantization(), PartitionForTarget(target), LowerToInteger()]
    module = tvm.transform.Sequential(before)(import_model(load(path)))
    orders = tvm.transform.Sequential([MaterializeTransfers(LINK), PopcountReorder()])
    return seconds(lambda: read_transfers(orders(module)), runs)[1]


def orders(models: dict[str, Path], target: str, folder: Path, runs: int) -> float:
    """Print what orders add to the time of compiling; give the largest share of the passes."""
    rows, shares = [], []
    for name, path in models.items():

        def plain(model: Path = path) -> None:
            bitwright.compile(model, target, output=folder / "plain", overwrite=True)

        def ordered(model: Path = path) -> None:
            passes = f"materialize-transfers=link:{LINK},popcount-reorder"
            bitwright.compile(
                model, target, output=folder / "ordered", passes=passes, overwrite=True
            )

        _, base = seconds(plain, runs)
        _, whole = seconds(ordered, runs)
        alone = order_seconds(path, target, runs)
        shares.append(alone / base)
        rows.append(
            [
                name,
                *(f"{base:.2f}", f"{alone:.2f}", f"{100 * alone / base:.0f} %"),
                *(f"{whole - base:.2f}", f"{100 * (whole - base) / base:.0f} %"),
            ]
        )
    heads = ["model", "processor s", "passes, s", "share", "all of main_link, s", "share"]
    print(table(heads, rows))
    print(f"allowed for the passes: {100 * ALLOWED_SHARE:g} %\n")
    return max(shares)


def compile_float(path: Path) -> None:
    """What TVM does with a model by itself."""
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    tvm.compile(from_onnx(onnx.load(path)), target=tvm.target.Target("llvm"))


def main() -> int:
    """Print the tables; give 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs, of which medians (default: 3)")
    runs: int = parser.parse_args().runs
    target = "bitfusion/eyeriss"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def lenet() -> None:
            bitwright.compile(
                LENET / "lenet.onnx",
                target,
                precision="w8a8",
                calibration=LENET / "calibration.npz",
                output=folder / "lenet",
                overwrite=True,
            )

        first, _ = seconds(lenet, 1)  # libraries are loaded in it
        whole, _ = seconds(lenet, runs)
        print(f"LeNet-5 from the float model: {whole:.2f} s (first time {first:.2f} s)")
        print(f"allowed: {ALLOWED_SECONDS:g} s\n")

        each: dict[int, float] = {}
        rows = []
        for layers in LAYERS:
            path, quantized = folder / "chain.onnx", folder / "chain.qdq.onnx"
            onnx.save(chain(layers), path)
            samples = np.random.default_rng(0).standard_normal((8, CHANNELS, 16, 16))
            bitwright.quantize(
                path,
                precision="w8a8",
                calibration={"x": samples.astype(np.float32)},
                clip="minmax",
                output=quantized,
                overwrite=True,
            )

            def ours(model: Path = quantized) -> None:
                bitwright.compile(model, target, output=folder / "chain", overwrite=True)

            def peer(model: Path = path) -> None:
                compile_float(model)

            ours_seconds, processor = seconds(ours, runs)
            peer_seconds, _ = seconds(peer, runs)
            each[layers] = processor / layers
            rows.append(
                [
                    str(layers),
                    f"{ours_seconds:.2f}",
                    f"{processor:.2f}",
                    f"{1e3 * each[layers]:.1f}",
                    f"{peer_seconds:.2f}",
                    f"{ours_seconds / peer_seconds:.2f}",
                ]
            )
            if layers == ORDERED_LAYERS:
                quantized.rename(folder / "ordered.qdq.onnx")
        bitwright.quantize(
            LENET / "lenet.onnx",
            precision="w8a8",
            calibration=LENET / "calibration.npz",
            output=folder / "lenet.qdq.onnx",
        )
        ordered = {
            "LeNet-5": folder / "lenet.qdq.onnx",
            f"chain of {ORDERED_LAYERS}": folder / "ordered.qdq.onnx",
        }
        share = orders(ordered, target, folder, runs)
    print(table(["layers", "s", "processor s", "ms a layer", "TVM alone, s", "ratio"], rows))
    long = [value for layers, value in each.items() if layers >= 50]
    growth = each[max(LAYERS)] / statistics.mean(long)
    print(f"a layer of the longest chain takes {growth:.2f} times the average from 50 layers on")
    print(f"allowed: {ALLOWED_GROWTH:g}")
    kept = whole <= ALLOWED_SECONDS and growth <= ALLOWED_GROWTH and share <= ALLOWED_SHARE
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
