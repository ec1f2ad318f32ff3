"""Speed of evaluating candidates in a search, beside float32 inference and beside the obvious way.

LeNet-5 on 256 real digits, EfficientNet-Lite0 on 256 crops of photographs and MOHAQ's speech model
in full size (random weights) on 8 sequences of 300 frames of noise (both without labels: their
metric is the mean squared error of the logits). One thread everywhere. In one run and in turns:

float32         onnxruntime on the float model, graph optimisations on, at whichever batch size of
                1, 8, 32, 128 is fastest.
candidate       a random plan of ``bitfusion/eyeriss``, no two alike, run whole: nothing is kept
                from plan to plan but weights, once a width.
overhead        what a candidate takes beside onnxruntime's runs: setting the plan, the metric.
the obvious way quantize the model at the plan, a new onnxruntime session (graph optimisations off,
                as some would quantize activations on their own), run it.

Then a whole search of 630 evaluations on LeNet with 2,000 digits, and what its parts add: values
kept for plans that begin alike, stopping early at a limit of the error (``error<=+2pp``), both.

Bounds: overhead at most 5 % of float32; a candidate at most 1.3 (LeNet) and 1.6
(EfficientNet-Lite0, speech model) times float32; 15 (LeNet) and 4 times as many candidates a
second as the obvious way; a search of 630 evaluations in at most 180 s.

Run from the repository root (EfficientNet-Lite0 is exported with PyTorch once)::

    python -m benchmarks.search_throughput
    python -m benchmarks.search_throughput --only lenet

The exit code is 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import bitwright
from benchmarks import models, recurrent_models
from benchmarks.tables import table
from bitwright import Precision, PrecisionPlan
from bitwright.quant.float_ops import make_session
from bitwright.quant.layers import layer_nodes
from bitwright.quant.load import load
from bitwright.quant.samples import Samples
from bitwright.search.evaluator import EvaluationJob, PostTraining, job_for
from bitwright.search.results import QuantizationOptions
from bitwright.search.space import Plan

ALL = [Precision(w, a) for w in (2, 4, 8, 16) for a in (2, 4, 8, 16)]
SAMPLES, SEED = 256, 1
MAX_OVERHEAD, MAX_SEARCH_S = 0.05, 180.0
BATCHES = (1, 8, 32, 128)
SPEECH = (300, 8)  # frames and sequences

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Case:
    """A model with data, and what is promised for it."""

    name: str
    path: Path
    calibration: dict[str, Any]
    data: dict[str, Any]
    metric: str
    candidates: int
    obvious: int
    most_float32: float
    least_obvious: float


def lenet() -> Case:
    model, calibration, test = models.lenet_digits()
    return Case(
        "LeNet-5",
        model.path,
        {"image": calibration.inputs},
        {"image": test.inputs[:SAMPLES], "labels": test.labels[:SAMPLES]}
        if test.labels is not None
        else {},
        "top1",
        40,
        5,
        1.3,
        15.0,
    )


def efficientnet() -> Case:
    model = models.efficientnet_lite0()
    calibration = models.photographs(32, SEED, split="calibration")
    test = models.photographs(SAMPLES, SEED, split="evaluation")
    return Case(
        "EfficientNet-Lite0",
        model.path,
        {"input": calibration.inputs},
        {"input": test.inputs},
        "mse",
        5,
        1,
        1.6,
        4.0,
    )


def speech(folder: Path) -> Case:
    """All eight sequences are one complete input: time runs along its first axis."""
    network = recurrent_models.sru_network()
    for dim, size in zip(network.graph.input[0].type.tensor_type.shape.dim, SPEECH, strict=False):
        dim.dim_value = size
    path = folder / "speech.onnx"
    onnx.save(network, path)
    frames = np.random.default_rng(SEED).standard_normal((2, *SPEECH, 23)).astype(np.float32)
    return Case(
        "MOHAQ's speech model",
        path,
        {"x": frames[:1]},
        {"x": frames[1:]},
        "mse",
        5,
        1,
        1.6,
        4.0,
    )


def job_of(case: Case, **options: Any) -> EvaluationJob:
    model = load(case.path)
    job, _ = job_for(
        model,
        Samples(case.calibration, model.inputs),
        Samples(case.data, model.inputs),
        precisions=dict.fromkeys(layer_nodes(model), ALL),
        metric=case.metric,
        options=QuantizationOptions(),
        work={layer.name: float(layer.macs or 0) for layer in bitwright.inspect(case.path).layers},
        **options,
    )
    return job


def plans(layers: int, count: int) -> list[Plan]:
    generator = np.random.default_rng(SEED)
    return [
        tuple(ALL[int(g)] for g in generator.integers(0, len(ALL), layers)) for _ in range(count)
    ]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def float_runner(case: Case) -> Callable[[], object]:
    """The float model over all samples, at the batch size that is fastest."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(case.path), options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    inputs = np.ascontiguousarray(case.data[entry.name], np.float32)
    if inputs.ndim > len(entry.shape):  # complete inputs
        return lambda: [session.run(None, {entry.name: one}) for one in inputs]

    def run(size: int) -> None:
        for start in range(0, len(inputs), size):
            session.run(None, {entry.name: inputs[start : start + size]})

    for size in BATCHES:
        run(size)
    times = {
        size: min(seconds(lambda size=size: run(size)) for _ in range(3))  # type: ignore[misc]
        for size in BATCHES
    }
    best = min(times, key=lambda size: times[size])
    return lambda: run(best)


class TimedSession:
    """A session that knows how long it has run."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds = 0.0

    def run_with_iobinding(self, binding: Any) -> None:
        """Run, and count the time."""
        start = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - start


def obvious_way(case: Case, plan: Plan, layers: Sequence[str]) -> None:
    """Quantize, make a session, run it."""
    result = bitwright.quantize(
        case.path,
        plan=PrecisionPlan(dict(zip(layers, plan, strict=True))),
        calibration=case.calibration,
    )
    session = make_session(result.model, optimize=False, lean=True)
    (entry,) = session.get_inputs()
    name = entry.name
    inputs = np.ascontiguousarray(case.data[name], np.float32)
    if inputs.ndim > len(entry.shape):
        for one in inputs:
            session.run(None, {name: one})
        return
    size = 32 if case.candidates > 10 else 4
    for start in range(0, len(inputs), size):
        session.run(None, {name: inputs[start : start + size]})


def measure(case: Case) -> tuple[list[str], bool]:
    """A row of the table, and whether all bounds hold."""
    job = job_of(case, reuse_bytes=0)
    evaluator = PostTraining(job)
    runners = evaluator._model._runners
    timers = []
    for runner in runners:
        timer = TimedSession(runner.session)
        runner.session = timer
        timers.append(timer)
    run_float = float_runner(case)
    tried = plans(len(job.layers), case.candidates)
    for precision in ALL:  # weights at every width, as after the first plans of a search
        evaluator._model.use(dict.fromkeys(job.layers, precision))
    evaluator.evaluate(tried[0])
    ratios, overheads, floats, totals = [], [], [], []
    for plan in tried:
        before = seconds(run_float)
        inside = sum(timer.seconds for timer in timers)
        total = seconds(lambda plan=plan: evaluator.evaluate(plan))  # type: ignore[misc]
        inside = sum(timer.seconds for timer in timers) - inside
        after = seconds(run_float)
        base = (before + after) / 2  # the machine's clock wanders
        ratios.append(total / base)
        overheads.append((total - inside) / base)
        floats.append(base)
        totals.append(total)
    obvious = statistics.median(
        seconds(lambda plan=plan: obvious_way(case, plan, job.layers))  # type: ignore[misc]
        for plan in tried[: case.obvious]
    )
    ratio, overhead = statistics.median(ratios), statistics.median(overheads)
    total = statistics.median(totals)
    good = (
        ratio <= case.most_float32
        and overhead <= MAX_OVERHEAD
        and obvious / total >= case.least_obvious
    )
    return [
        case.name,
        f"{1e3 * statistics.median(floats):.1f}",
        f"{1e3 * total:.1f}",
        f"{ratio:.2f} (<= {case.most_float32})",
        f"{100 * overhead:.1f} % (<= {100 * MAX_OVERHEAD:.0f} %)",
        f"{1e3 * obvious:.0f}",
        f"{obvious / total:.0f} (>= {case.least_obvious:.0f})",
    ], good


def whole_search() -> tuple[list[list[str]], bool]:
    """A search of MOHAQ's budget on LeNet, with and without what saves work."""
    model, calibration, test = models.lenet_digits()
    rows, good = [], True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "calibration.npz", image=calibration.inputs)
        np.savez(folder / "validation.npz", image=test.inputs, labels=np.asarray(test.labels))
        took: dict[str, float] = {}
        for label, reuse, constraints, workers in (
            ("nothing saved", 0, [], 1),
            ("values kept", 256, [], 1),
            ("stopping early", 0, ["error<=+2pp"], 1),
            ("both", 256, ["error<=+2pp"], 1),
            ("both, two workers", 256, ["error<=+2pp"], 2),
        ):
            study = folder / label.replace(" ", "-")
            start = time.perf_counter()
            result = bitwright.search_precisions(
                model.path,
                "bitfusion/eyeriss",
                calibration=folder / "calibration.npz",
                validation=folder / "validation.npz",
                output=study,
                constraints=constraints,
                start="plain",
                algorithm="nsga2",
                reuse_mib=reuse,
                workers=workers,
            )
            took[label] = time.perf_counter() - start
            base = took["nothing saved"]
            good = good and took[label] <= MAX_SEARCH_S
            rows.append(
                [
                    label,
                    f"{result.evaluations}",
                    f"{took[label]:.1f}",
                    f"{base / took[label]:.2f}",
                    f"{1e3 * took[label] / result.evaluations:.0f}",
                ]
            )
    return rows, good


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("lenet", "efficientnet", "speech", "search"))
    only = parser.parse_args(arguments).only
    good = True
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Callable[[], Case]] = {
            "lenet": lenet,
            "efficientnet": efficientnet,
            "speech": lambda: speech(Path(folder)),
        }
        for name, make in cases.items():
            if only in (None, name):
                row, fine = measure(make())
                rows.append(row)
                good = good and fine
    if rows:
        headings = ["model", "float32 ms", "candidate ms", "ratio", "overhead", "obvious ms"]
        print(table([*headings, "times faster"], rows))
    if only in (None, "search"):
        rows, fine = whole_search()
        good = good and fine
        print(f"\n630 questions of NSGA-II on LeNet-5, 2,000 digits (<= {MAX_SEARCH_S:.0f} s)")
        print(table(["", "plans", "seconds", "times faster", "ms a plan"], rows))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"\nlargest memory of this process: {peak:,.0f} MiB")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
