"""Quality of w8a8 models: bitwright beside onnxruntime's own quantizer.

For every case, both tools get the same float model and the same calibration samples, both
quantize weights to 8 bits per output channel and activations to 8 bits, and both write a QDQ
model. The QDQ models run in onnxruntime with graph optimisations off, on samples that were not
used for calibration, and are compared with the float model's outputs::

    SQNR = 10 log10(sum(float^2) / sum((float - quantized)^2))    in dB

The peer is ``onnxruntime.quantization.quantize_static(per_channel=True)`` after
``quant_pre_process``, as its documentation asks: with its MinMax and its Percentile calibrator,
each with unsigned asymmetric and with signed symmetric activations. The best of the four counts.

The peer writes 8-bit activations everywhere. bitwright's default keeps tensors between elementwise
operators at 16 bits; its settings with ``elementwise 8`` compare at equal widths everywhere.

Run from the repository root::

    python -m benchmarks.quality                      # bitwright's default against the peers
    python -m benchmarks.quality --settings all       # every setting of bitwright
    python -m benchmarks.quality --cifar FILE.npz     # also zero-shot accuracy on CIFAR-10

The exit code is 1 if bitwright's default has a lower SQNR than the best peer in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import version_converter

from benchmarks import models
from benchmarks.tables import table

Classify = Callable[[NDArray[Any]], NDArray[np.int64]]


@dataclass(frozen=True)
class Case:
    """One model with its samples.

    Parameters
    ----------
    name
        Name in the table.
    model
        The float model.
    calibration, evaluation
        Samples; no sample is in both.
    classify
        From outputs ``[count, classes]`` to class numbers.
    """

    name: str
    model: models.Model
    calibration: models.Samples
    evaluation: models.Samples
    classify: Classify


@dataclass(frozen=True)
class Peer:
    """One way to call onnxruntime's quantizer."""

    name: str
    method: Literal["MinMax", "Percentile"]
    activation: Literal["QUInt8", "QInt8"]
    symmetric: bool


@dataclass(frozen=True)
class Setting:
    """One way to call bitwright's quantizer: a name and keyword arguments."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Energy:
    """Energy of the float outputs and of the difference to them, sample by sample.

    Parameters
    ----------
    signal, noise
        float64 ``[count]``: sums of squares over a sample's outputs.
    """

    signal: NDArray[np.float64]
    noise: NDArray[np.float64]

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio in dB; infinite for equal outputs."""
        noise = float(self.noise.sum())
        return math.inf if noise == 0 else 10 * math.log10(float(self.signal.sum()) / noise)


@dataclass(frozen=True)
class Result:
    """What one quantized model scores."""

    tool: str
    setting: str
    energy: Energy
    accuracy: float | None
    agreement: float
    seconds: float


PEERS = (
    Peer("MinMax, uint8", "MinMax", "QUInt8", symmetric=False),
    Peer("MinMax, int8 symmetric", "MinMax", "QInt8", symmetric=True),
    Peer("Percentile, uint8", "Percentile", "QUInt8", symmetric=False),
    Peer("Percentile, int8 symmetric", "Percentile", "QInt8", symmetric=True),
)
#: Nothing is passed, so that the verdict is about the defaults whatever they are.
DEFAULT = Setting("default", {})
SETTINGS = (
    DEFAULT,
    *(
        Setting(
            f"{clip}, elementwise {bits}{', asymmetric' if asymmetric else ''}",
            {"clip": clip, "elementwise_bits": bits, "asymmetric": asymmetric},
        )
        for clip in ("mmse", "percentile", "minmax")
        for asymmetric in (False, True)
        for bits in (16, 8)
    ),
)


# --------------------------------------------------------------------------- measuring


def energies(reference: NDArray[Any], other: NDArray[Any]) -> Energy:
    """Compare two sets of outputs.

    Parameters
    ----------
    reference, other
        Arrays of one shape; the first axis counts samples.

    Returns
    -------
    Energy
        Sums of squares per sample.
    """
    exact = reference.astype(np.float64).reshape(len(reference), -1)
    difference = exact - other.astype(np.float64).reshape(exact.shape)
    return Energy(np.square(exact).sum(axis=1), np.square(difference).sum(axis=1))


def gain_error(ours: Energy, theirs: Energy) -> float:
    """Standard error of the difference of two SQNRs on the same samples, by bootstrap.

    Parameters
    ----------
    ours, theirs
        Energies over the same samples.

    Returns
    -------
    float
        In dB. Samples count as independent, which crops of one photograph are not quite.
    """
    count = len(ours.noise)
    chosen = np.random.default_rng(0).integers(count, size=(500, count))
    ratio = theirs.noise[chosen].sum(axis=1) / ours.noise[chosen].sum(axis=1)
    return float(np.std(10 * np.log10(ratio)))


def run_model(
    path: Path, inputs: NDArray[Any], *, optimised: bool, batch: int
) -> NDArray[np.float32]:
    """Run the first output of an ONNX model over samples.

    Parameters
    ----------
    path
        The model; it has one input.
    inputs
        ``[count, ...]``.
    optimised
        Whether onnxruntime may optimise the graph. Off for QDQ models, so that what runs is what
        is written in the file.
    batch
        Samples a call.

    Returns
    -------
    ndarray
        ``[count, ...]``.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [
        np.asarray(session.run(None, {name: inputs[start : start + batch]})[0], np.float32)
        for start in range(0, len(inputs), batch)
    ]
    return np.concatenate(parts)


def input_name(path: Path) -> str:
    """Return the name of a model's first input that is not an initializer.

    Parameters
    ----------
    path
        The ONNX file.

    Returns
    -------
    str
        The name.
    """
    graph = onnx.load(path, load_external_data=False).graph
    constants = {constant.name for constant in graph.initializer}
    return str(next(value.name for value in graph.input if value.name not in constants))


class Reader:
    """Feeds calibration samples to onnxruntime's calibrators, batch by batch.

    ``len`` and ``set_range`` count batches; onnxruntime uses them to work in chunks, without
    which its calibrators keep every activation of every sample in memory.
    """

    def __init__(self, name: str, inputs: NDArray[Any], batch: int) -> None:
        # The calibrators stack batches, so a smaller last one cannot be used.
        self._batches = [
            {name: inputs[start : start + batch]} for start in range(0, len(inputs), batch)
        ]
        self._next = 0
        self._end = len(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Restrict what follows to the batches from start up to, not including, end."""
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next batch, or None after the last one of the range."""
        if self._next >= self._end:
            return None
        self._next += 1
        return self._batches[self._next - 1]


def quantize_with_peer(case: Case, peer: Peer, target: Path, *, batch: int) -> None:
    """Quantize a case's model with onnxruntime's quantizer.

    Parameters
    ----------
    case, peer
        What to quantize and how.
    target
        The file to write; another one is written beside it.
    batch
        Calibration samples a call.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = case.model.path
    prepared = target.with_suffix(".prepared.onnx")
    model = onnx.load(source)
    if min(entry.version for entry in model.opset_import if not entry.domain) < 13:
        # Per-channel DequantizeLinear came with opset 13; the peer writes it into older models
        # too, and onnxruntime then refuses to load them.
        source = target.with_suffix(".upgraded.onnx")
        onnx.save(version_converter.convert_version(model, 17), source)
    reader = Reader(input_name(case.model.path), case.calibration.inputs, batch)
    # Both print their progress.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            quant_pre_process(source, prepared)
        except Exception:
            # Its symbolic shape inference fails on some models (an assertion in Concat for the
            # text-direction classifier); what matters, folding and fusion, works without it.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            target,
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType[peer.activation],
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[peer.method],
            extra_options={"ActivationSymmetric": peer.symmetric, "CalibStridedMinMax": 1},
        )


def quantize_with_bitwright(case: Case, setting: Setting, target: Path, *, batch: int) -> None:
    """Quantize a case's model with bitwright.

    Parameters
    ----------
    case, setting
        What to quantize and how.
    target
        The file to write.
    batch
        Calibration samples a call.
    """
    import bitwright

    bitwright.quantize(
        case.model.path,
        precision="w8a8",
        calibration={input_name(case.model.path): case.calibration.inputs},
        output=target,
        batch_size=batch,
        **setting.options,
    )


def evaluate(case: Case, settings: Sequence[Setting], *, batch: int) -> list[Result]:
    """Score the peers and bitwright on one case.

    Parameters
    ----------
    case
        The model and its samples.
    settings
        The settings of bitwright.
    batch
        Samples a call.

    Returns
    -------
    list of Result
        The float model first, then the peers, then bitwright.
    """
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="bitwright-quality-") as folder:
        exact = run_model(case.model.path, case.evaluation.inputs, optimised=True, batch=batch)
        results.append(_score(case, "float", "", exact, exact, 0.0))
        jobs = [
            *(("onnxruntime", p.name, partial(quantize_with_peer, case, p)) for p in PEERS),
            *(("bitwright", s.name, partial(quantize_with_bitwright, case, s)) for s in settings),
        ]
        for number, (tool, name, quantize) in enumerate(jobs):
            print(f"  {case.name}: {tool}, {name}", file=sys.stderr, flush=True)
            target = Path(folder) / f"{number}.onnx"
            begin = time.perf_counter()
            quantize(target, batch=batch)
            seconds = time.perf_counter() - begin
            outputs = run_model(target, case.evaluation.inputs, optimised=False, batch=batch)
            results.append(_score(case, tool, name, exact, outputs, seconds))
    return results


def _score(
    case: Case,
    tool: str,
    setting: str,
    exact: NDArray[np.float32],
    outputs: NDArray[np.float32],
    seconds: float,
) -> Result:
    predicted = case.classify(outputs)
    labels = case.evaluation.labels
    return Result(
        tool,
        setting,
        energies(exact, outputs),
        None if labels is None else float(np.mean(predicted == labels)),
        float(np.mean(predicted == case.classify(exact))),
        seconds,
    )


# --------------------------------------------------------------------------- cases


def _largest(outputs: NDArray[Any]) -> NDArray[np.int64]:
    return np.asarray(np.argmax(outputs, axis=1), np.int64)


def lenet(calibration: int, evaluation: int, seed: int) -> Case:
    """LeNet-5 on handwritten digits; the samples are always the same."""
    del seed
    model, first, second = models.lenet_digits()
    return Case("lenet", model, _take(first, calibration), _take(second, evaluation), _largest)


def text_direction(calibration: int, evaluation: int, seed: int) -> Case:
    """MobileNetV3 that tells upright from upside-down lines, on rendered text (synthetic)."""
    return Case(
        "text direction",
        models.text_direction(),
        models.text_direction_samples(calibration, seed=2 * seed),
        models.text_direction_samples(evaluation, seed=2 * seed + 1),
        _largest,
    )


def efficientnet(calibration: int, evaluation: int, seed: int) -> Case:
    """EfficientNet-Lite0 on photographs; other photographs for calibration."""
    return Case(
        "EfficientNet-Lite0",
        models.efficientnet_lite0(),
        models.photographs(calibration, seed, split="calibration"),
        models.photographs(evaluation, seed, split="evaluation"),
        _largest,
    )


def efficientnet_cifar10(path: Path, calibration: int, evaluation: int) -> Case:
    """EfficientNet-Lite0 on CIFAR-10 images, zero-shot through a class map."""
    return Case(
        "EfficientNet-Lite0, CIFAR-10",
        models.efficientnet_lite0(),
        models.cifar10(path, 0, calibration),
        models.cifar10(path, calibration, evaluation),
        models.imagenet_to_cifar10,
    )


def _take(samples: models.Samples, count: int) -> models.Samples:
    labels = None if samples.labels is None else samples.labels[:count]
    return models.Samples(samples.inputs[:count], labels, samples.description)


CASES: dict[str, tuple[Callable[[int, int, int], Case], int, int]] = {
    "lenet": (lenet, 256, 1000),
    "text_direction": (text_direction, 256, 1000),
    "efficientnet_lite0": (efficientnet, 128, 192),
}


# --------------------------------------------------------------------------- command line


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _rows(case: Case, results: Sequence[Result]) -> list[list[str]]:
    rows = []
    for result in results:
        rows.append(
            [
                case.name,
                result.tool,
                result.setting,
                "-" if math.isinf(result.energy.sqnr) else f"{result.energy.sqnr:.2f}",
                _percent(result.accuracy),
                _percent(result.agreement),
                f"{result.seconds:.1f}" if result.seconds else "-",
            ]
        )
    return [*rows, []]


def _verdict(case: Case, results: Sequence[Result]) -> tuple[str, bool]:
    peers = [result for result in results if result.tool == "onnxruntime"]
    best = max(peers, key=lambda result: result.energy.sqnr)
    theirs = f"best peer {best.energy.sqnr:.2f} dB ({best.setting})"
    ours = [r for r in results if r.tool == "bitwright" and r.setting == DEFAULT.name]
    if not ours:
        return f"{case.name}: {theirs}", True
    gain = ours[0].energy.sqnr - best.energy.sqnr
    error = gain_error(ours[0].energy, best.energy)
    text = (
        f"{case.name}: bitwright's default {ours[0].energy.sqnr:.2f} dB, {theirs}: "
        f"{gain:+.2f} dB (standard error {error:.2f}), "
        f"noise power {10 ** (-gain / 10):.2f}x of the peer's"
    )
    return text + ("" if gain >= 0 else "  BELOW THE PEER"), gain >= 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and print it.

    Parameters
    ----------
    arguments
        Command line; by default the process's own.

    Returns
    -------
    int
        0; 1 if bitwright's default is below the best peer; 2 if something is missing.
    """
    parser = argparse.ArgumentParser(description="w8a8 quality: bitwright and onnxruntime")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument(
        "--settings",
        choices=("default", "all", "none"),
        default="default",
        help="settings of bitwright; none measures the peers only",
    )
    parser.add_argument("--calibration", type=int, help="calibration samples, a multiple of 8")
    parser.add_argument("--evaluation", type=int, help="evaluation samples")
    parser.add_argument("--seed", type=int, default=0, help="another draw of samples")
    parser.add_argument("--cifar", type=Path, help=".npz file with CIFAR-10 images and labels")
    parser.add_argument("--cifar-evaluation", type=int, default=500)
    options = parser.parse_args(arguments)
    if options.calibration is not None and (options.calibration < 8 or options.calibration % 8):
        parser.error("--calibration must be a multiple of 8")
    batch = 8
    settings = {"default": (DEFAULT,), "all": SETTINGS, "none": ()}[options.settings]

    rows: list[list[str]] = []
    verdicts: list[str] = []
    good = True
    try:
        builders: list[Callable[[], Case]] = []
        for name in options.cases:
            build, calibration, evaluation = CASES[name]
            counts = (options.calibration or calibration, options.evaluation or evaluation)
            builders.append(partial(build, *counts, options.seed))
        if options.cifar is not None:
            counts = (options.calibration or 128, options.cifar_evaluation)
            builders.append(partial(efficientnet_cifar10, options.cifar, *counts))
        for builder in builders:
            case = builder()
            results = evaluate(case, settings, batch=batch)
            verdict, fine = _verdict(case, results)
            rows += _rows(case, results)
            verdicts.append(
                f"{verdict}\n    calibration {len(case.calibration)}, "
                f"evaluation {len(case.evaluation)} samples: {case.evaluation.description}"
            )
            good = good and fine
    except models.FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    headings = ("<model", "<tool", "<setting", "SQNR dB", "top-1 %", "agree %", "quantize s")
    print(f"\nw8a8, per channel; onnxruntime {ort.__version__}, {os.cpu_count()} CPUs\n")
    print(table(headings, rows[:-1]))
    print("\ntop-1: against labels; agree: same class as the float model\n")
    print("\n".join(verdicts))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
