"""Speed of recurrent networks beside onnxruntime, with two threads.

Scans that onnxruntime runs operator by operator, its own LSTM and GRU, and a trained text segmenter
with 12 scans (typeseg); the full-size speech model of MOHAQ is also compiled in a process of its
own, whose time and peak memory are printed. All weights but the segmenter's are random. Results are
compared before anything is timed. LSTM and GRU in 8 bits are compared with themselves in float32.

Run from the repository root::

    python -m benchmarks.recurrent
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks import models, recurrent_models
from benchmarks.kernels import alternate
from benchmarks.memory_probe import peak_bytes
from benchmarks.tables import table

_SCANS, _OWN = 0.25, 1.5  # bounds of the ratio: of scans, of onnxruntime's own operators
_CODES = 1.0  # of 8 bits to float32
_MOST_SECONDS, _MOST_BYTES = 60.0, 2 << 30  # of compiling the full-size speech model

Feeds = Mapping[str, NDArray[Any]]


def compiled(model: str | Path | onnx.ModelProto, feeds: Feeds) -> Callable[[], Any]:
    """Compile a float model; return a call of it on inputs that lie in memory already."""
    import tvm
    from tvm import relax

    from bitwright import targets
    from bitwright.importer import import_model
    from bitwright.passes.build import TRANSFORM, build
    from bitwright.quant.load import load

    loaded = load(model)
    built = build(import_model(loaded), targets.get("silago/drra"))
    machine = relax.VirtualMachine(built.executable, tvm.cpu())
    parameters = tuple(map(tvm.runtime.tensor, built.parameters.values()))
    transformed = list(machine[TRANSFORM](parameters)) if parameters else []
    inputs = [tvm.runtime.tensor(feeds[value.name]) for value in loaded.inputs]
    main = machine["main"]
    return lambda: main(*inputs, *transformed)


def arrays(found: Any) -> list[NDArray[Any]]:
    """Results of a call of ours as arrays."""
    return [entry.numpy() for entry in ([found] if hasattr(found, "numpy") else found)]


def cases() -> list[tuple[str, str | Path | onnx.ModelProto, Feeds, float | None]]:
    """Name, model, inputs and bound of the ratio."""
    make, noise = recurrent_models, recurrent_models.noise
    found: list[tuple[str, str | Path | onnx.ModelProto, Feeds, float | None]] = []

    def add(name: str, model: onnx.ModelProto, bound: float | None, **sizes: int) -> None:
        found.append((name, model, noise(model, **sizes), bound))

    add("selective scan, 512 x 1536 x 16", make.selective_scan(), _SCANS, time=512)
    add("SRU scan, 300 x 8 x 550", make.sru_scan(), _SCANS, time=300, batch=8)
    segmenter = models.mamba_segmenter().path
    text = Path(recurrent_models.__file__).read_text(encoding="ascii")
    ids = np.frombuffer((text * 4)[:16_000].encode(), np.uint8).astype(np.int64)
    name = onnx.load(segmenter).graph.input[0].name
    found.append(("text segmenter, 16,000 characters", segmenter, {name: ids}, _SCANS))
    for operator in ("LSTM", "GRU"):
        for batch in (1, 8):
            model = make.gated(operator, 256, 256)
            add(f"{operator} 256 -> 256, 300 x {batch}", model, _OWN, time=300, batch=batch)
    both = make.gated("LSTM", 23, 550, bidirectional=True)
    add("LSTM 23 -> 2 x 550, 100 x 8", both, _OWN, time=100, batch=8)
    add("full-size SRU network, 300 x 1", make.sru_network(), None, time=300, batch=1)
    return found


def codes_beside_floats(rounds: int, seconds: float) -> tuple[list[list[str]], list[str]]:
    """Time LSTM and GRU with products of 8 bits and in float32: rows, and broken bounds."""
    make, rows, broken = recurrent_models, [], []
    for operator in ("LSTM", "GRU"):
        for hidden in (256, 550):
            model = make.gated(operator, hidden, hidden)
            for batch in (1, 8):
                feeds = make.noise(model, time=100, batch=batch)
                both = compiled(make.quantized(model), feeds), compiled(model, feeds)
                narrow, wide = (arrays(call())[0] for call in both)
                codes, floats = alternate(both, rounds, seconds)
                name = f"{operator} {hidden} -> {hidden}, 100 x {batch}, w8a8"
                if codes > _CODES * floats:
                    broken.append(name)
                times = f"{codes * 1e3:.2f}", f"{floats * 1e3:.2f}", f"{codes / floats:.2f}"
                worst = float(np.abs(narrow - wide).max())
                rows.append([name, *times, f"{_CODES:.2f}", f"{worst:.3f}"])
    return rows, broken


def compile_network() -> dict[str, float]:
    """Compile the full-size speech model in a process of its own: seconds and peak bytes."""
    command = [sys.executable, "-m", "benchmarks.recurrent", "--compile"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print it, and say by the exit code whether all bounds hold."""
    parser = argparse.ArgumentParser(description="recurrent networks beside onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile:
        begin = time.perf_counter()
        network = recurrent_models.sru_network()
        compiled(network, recurrent_models.noise(network, time=1, batch=1))
        print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": peak_bytes()}))
        return 0
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read when TVM starts its threads
    rows, broken = [], []
    for name, model, feeds, bound in cases():
        session_options = ort.SessionOptions()
        session_options.intra_op_num_threads = options.threads
        content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
        session = ort.InferenceSession(content, session_options)
        ours = compiled(model, feeds)
        worst = max(
            float((np.abs(mine - other) / (1e-6 + 1e-4 * np.abs(other))).max())
            for mine, other in zip(arrays(ours()), session.run(None, dict(feeds)), strict=True)
        )

        def peer(session: Any = session, feeds: Feeds = feeds) -> Any:
            return session.run(None, dict(feeds))

        mine, others = alternate((ours, peer), options.rounds, options.seconds)
        ratio = mine / others
        if bound is not None and ratio > bound:
            broken.append(name)
        shown = "-" if bound is None else f"{bound:.2f}"
        cells = [f"{mine * 1e3:.2f}", f"{others * 1e3:.2f}", f"{ratio:.2f}", shown, f"{worst:.2f}"]
        rows.append([name, *cells])
    in_codes, slow = codes_beside_floats(options.rounds, options.seconds)
    broken += slow
    made = compile_network()
    print(f"\n{options.threads} threads, onnxruntime {ort.__version__}\n")
    header = ("<model", "ms", "onnxruntime ms", "ratio", "bound", "difference")
    print(table(header, rows))
    print("\ndifference: the largest, in units of 1e-6 + 1e-4 |b|\n")
    print(table(("<model", "ms", "float32 ms", "ratio", "bound", "difference"), in_codes))
    print("\ndifference: the largest of the states, which lie in (-1, 1)")
    seconds, peak = made["seconds"], made["bytes"]
    print(f"full-size SRU network compiled in {seconds:.1f} s, peak {peak / 2**20:.0f} MiB")
    if seconds > _MOST_SECONDS or peak > _MOST_BYTES:
        broken.append("compiling the full-size SRU network")
    for name in broken:
        print(f"bound broken: {name}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
