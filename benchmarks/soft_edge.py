"""Run time of soft-edge activations beside plain int8, on one core.

A selective scan by itself and a trained Mamba (typeseg's text segmenter, 12 scans), whose scan
inputs are int8 of one scale, are compiled as they are and with the pass ``soft-edge``: on the SSM
input alone, as in Quamba-SE (arXiv 2601.09451), on all inputs, and with a layout of 8 bits a value.
Of the segmenter, all that the scans read is quantized and nothing else, so that scans take the
largest share of the time. What is timed holds encoding and decoding. Turns of all variants are
interleaved, and what is timed is the processor's time, on which other programs of the machine have
less influence.

Run from the repository root::

    python -m benchmarks.soft_edge
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks import models, recurrent_models
from benchmarks.tables import table

_MOST = 1.05  # time with soft edge on the SSM input to that of plain int8

# One byte, sign included: fine up to 95.75 of the scales that it is given below, then 4 and 32
# times as coarse; SiLU leaves no value below -0.28.
_BYTES: Final = (
    "int8:-112:17@0<<0:96@0<<0<=95.5,96@96<<2<=478,48@480<<5",
    0.25,
)
_VARIANTS: Final[Mapping[str, str]] = {
    "int8": "",
    "quamba-se on x": "soft-edge=quamba-se",
    "soft-edge8 on x": f"soft-edge=layout:({_BYTES[0]}):finest:{_BYTES[1]}",
    "quamba-se on x, dt, B and C": "soft-edge=tensors:x+dt+B+C",
}
_BOUND: Final = ("quamba-se on x", "soft-edge8 on x")

Feeds = Mapping[str, NDArray[Any]]


def quantized_scans(model: onnx.ModelProto, feeds: Feeds) -> onnx.ModelProto:
    """Quantize what the scans of a model read as int8, with the ranges of one run."""
    loaded = ir.from_proto(model)
    graph = loaded.graph
    loops = [node for node in graph if node.op_type == "Scan"]
    read = {
        value: None
        for node in loops
        for value in list(node.inputs)[-int(node.attributes["num_scan_inputs"].value) :]
        if value is not None
    }
    inputs = {value.name for value in graph.inputs}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    wanted = [str(value.name) for value in read if value.name not in inputs]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = ort.InferenceSession(watched.SerializeToString())
    results = session.run(wanted, dict(feeds)) if wanted else []
    seen = {**feeds, **dict(zip(wanted, results, strict=True))}
    loaded.opset_imports[""] = max(loaded.opset_imports[""], 21)
    for value in read:
        name = str(value.name)
        scale = np.float32(np.abs(seen[name]).max() / 127)
        constants = {f"{name}_scale": scale, f"{name}_zero": np.int8(0)}
        values = [
            ir.Value(name=key, const_value=ir.tensor(np.asarray(array), name=key))
            for key, array in constants.items()
        ]
        for entry in values:
            graph.register_initializer(entry)
        quantize = ir.node("QuantizeLinear", [value, *values], name=f"{name}_quantize")
        codes = quantize.outputs[0]
        dequantize = ir.node("DequantizeLinear", [codes, *values], name=f"{name}_dequantize")
        codes.name, dequantize.outputs[0].name = f"{name}_codes", f"{name}_dequantized"
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], [quantize, dequantize])
        else:
            graph.insert_after(producer, [quantize, dequantize])
        for node in loops:
            for index, given in enumerate(node.inputs):
                if given is value:
                    node.replace_input_with(index, dequantize.outputs[0])
    return ir.to_proto(loaded)


def compiled(model: onnx.ModelProto, feeds: Feeds, passes: str) -> Callable[[], Any]:
    """Compile; return a call on inputs that lie in memory already."""
    import tvm
    from tvm import relax

    from bitwright import targets
    from bitwright.importer import import_model
    from bitwright.passes.build import TRANSFORM, build
    from bitwright.passes.registry import parse
    from bitwright.quant.load import load

    loaded = load(model)
    built = build(import_model(loaded), targets.get("silago/drra"), pipeline=parse(passes))
    machine = relax.VirtualMachine(built.executable, tvm.cpu())
    parameters = tuple(map(tvm.runtime.tensor, built.parameters.values()))
    transformed = list(machine[TRANSFORM](parameters)) if parameters else []
    inputs = [tvm.runtime.tensor(feeds[value.name]) for value in loaded.inputs]
    main = machine["main"]
    return lambda: main(*inputs, *transformed)


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of single calls, one of each in turn, in another order each time."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for index in order.permutation(len(calls)):
            begin = time.process_time()
            calls[index]()
            seconds[index].append(time.process_time() - begin)
    return seconds


def cases() -> list[tuple[str, onnx.ModelProto, Feeds]]:
    """Name, float model and inputs."""
    scan = recurrent_models.selective_scan()
    segmenter = onnx.load(models.mamba_segmenter().path)
    text = Path(recurrent_models.__file__).read_text(encoding="ascii")
    ids = np.frombuffer(text[:4_000].encode(), np.uint8).astype(np.int64)
    return [
        ("selective scan, 512 x 1536 x 16", scan, recurrent_models.noise(scan, time=512)),
        ("text segmenter, 4,000 characters", segmenter, {segmenter.graph.input[0].name: ids}),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print it, and say by the exit code whether the bound holds."""
    parser = argparse.ArgumentParser(description="soft-edge activations beside int8")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args(arguments)
    os.environ["TVM_NUM_THREADS"] = "1"  # read when TVM starts its threads
    rows, broken = [], []
    for name, model, feeds in cases():
        quantized = quantized_scans(model, feeds)
        calls = [compiled(quantized, feeds, passes) for passes in _VARIANTS.values()]
        seconds = interleaved(calls, options.rounds)
        for variant, mine in zip(_VARIANTS, seconds, strict=True):
            # Of pairs of the same round, which share what else the machine does.
            ratios = [a / b for a, b in zip(mine, seconds[0], strict=True)]
            ratio = statistics.median(ratios)
            bounded = variant in _BOUND
            if bounded and ratio > _MOST:
                broken.append(f"{name}, {variant}")
            bound = f"{_MOST:.2f}" if bounded else "-"
            median = statistics.median(mine)
            rows.append([name, variant, f"{median * 1e3:.2f}", f"{ratio:.3f}", bound])
    print(f"\none thread, medians of {options.rounds} runs\n")
    print(table(("<model", "<scan inputs", "ms", "to int8", "bound"), rows))
    for case in broken:
        print(f"bound broken: {case}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
