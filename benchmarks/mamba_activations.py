"""Activations of a trained Mamba at 8 bits and below: what each form of their codes costs.

The text segmenter of the package typeseg, on pieces of real source files of known type
(:mod:`benchmarks.source_files`); calibration and test files are from different packages. Every
configuration is quantized with static scales and compiled, and what the artefact gives is compared
with the float model: the share of characters that get the same label (agreement), signal to
quantization noise of the logits, and the share of characters whose label is the one of the file's
extension. Behind each stands the 95 % bootstrap interval by file, and the difference from a named
configuration on the same files.

Two scopes: ``scan`` changes only what the selective scans take as x, in the recipe quamba; ``all``
encodes every activation that a layer or a selective scan reads in one form.

The exit code is 1 where, of the configurations that were run, soft edge on x agrees significantly
less than its hard clipping or, at the percentiles 99 and 99.9 with dt quantized in front of its
softplus (where the noise of dt covers nothing), has no significantly better SQNR; where soft-edge8
with dt quantized there is less than 4 points or 4 dB better than the best single step that
quantizes dt itself, as others do, or significantly worse than one in front of the softplus; or
where forms chosen for each tensor agree on less than 96 % of the characters.

A second part, ``--activations``, is about the activations themselves: signal to noise of the
recorded inputs of the scans, and of heavy-tailed random numbers (synthetic), in the best form of a
single step, with the three fixed scales, and with calibrated segments. There the exit code is 1
where soft-edge8 is worse than the best single step, or less than 3 dB better on the random numbers.

Run from the repository root; the whole takes hours, so choose::

    python -m benchmarks.mamba_activations --files 200 --only 'all/*'
    python -m benchmarks.mamba_activations --activations
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.activation_histograms import draw
from benchmarks.bootstrap import Bootstrap, decibels
from benchmarks.mamba_configurations import (
    Arrays,
    Run,
    chosen,
    float_runner,
    largest_difference,
    positive,
    quantized,
    runner,
)
from benchmarks.models import mamba_segmenter
from benchmarks.source_files import SourceFile, digest, source_files, spread
from benchmarks.tables import table
from bitwright.quant.load import load
from bitwright.quant.observers import Observer, TensorQuantization, choose_quantization
from bitwright.quant.selective_scan import selective_scans
from bitwright.quant.soft_edge import choose_soft_edge

# -- running --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Sums over the characters of each file.

    Parameters
    ----------
    agree, right
        Characters with the float model's label, and with the extension's.
    noise
        Energy of the difference of the logits.
    """

    agree: Arrays
    right: Arrays
    noise: Arrays


def measure(run: Run, files: Sequence[SourceFile], expected: Arrays) -> Measured:
    """Run all files and compare."""
    agree, right, noise = [], [], []
    for file, wanted in zip(files, expected, strict=True):
        logits = run(file.ids)
        found = logits.argmax(-1)
        agree.append(np.count_nonzero(found == wanted.argmax(-1)))
        right.append(np.count_nonzero(found == file.label))
        noise.append(np.square(logits.astype(np.float64) - wanted).sum())
    return Measured(np.array(agree), np.array(right), np.array(noise))


# -- the tables -----------------------------------------------------------------------------------


class Report:
    """Estimates of all configurations on the same files.

    Parameters
    ----------
    files
        That were run.
    expected
        Logits of the float model.
    """

    def __init__(self, files: Sequence[SourceFile], expected: Arrays) -> None:
        self._bootstrap = Bootstrap(len(files))
        self._characters = np.array([len(file.content) for file in files], float)
        self._signal = np.square(expected.astype(np.float64)).sum((1, 2))
        labels = np.array([file.label for file in files])
        right = (expected.argmax(-1) == labels[:, None]).sum(-1)
        self.measured = {"float": Measured(self._characters, right, np.zeros(len(files)))}

    def row(self, name: str, reference: str | None) -> dict[str, Any]:
        """Estimates of a configuration, and differences from another one."""
        own = self.measured[name]
        result: dict[str, Any] = {
            "configuration": name,
            "agreement": self._bootstrap.ratio(own.agree, self._characters),
            "sqnr": self._bootstrap.ratio(self._signal, own.noise, decibels),
            "accuracy": self._bootstrap.ratio(own.right, self._characters),
        }
        if reference is not None and reference in self.measured:
            other = self.measured[reference]
            wholes = (self._characters, self._characters)
            result |= {
                "reference": reference,
                "agreement_difference": self._bootstrap.difference(
                    (own.agree, other.agree), wholes
                ),
                "sqnr_difference": self._bootstrap.difference(
                    (self._signal, self._signal), (own.noise, other.noise), decibels
                ),
            }
        return result

    def best_single_step(self) -> str | None:
        """The integers of one step for all activations that agree most with the float model.

        Quantized where layers and scans read them, dt included.
        """
        found = [
            name
            for name in self.measured
            if name.startswith("all/a8 ") and not name.endswith(" pre-softplus")
        ]
        return max(found, key=lambda name: self.measured[name].agree.sum(), default=None)


def broken(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which bounds do not hold; the module's docstring says what they are."""
    found = []
    for row in rows:
        name, reference = row["configuration"], row.get("reference", "")
        scope, _, rest = name.partition("/")
        settings, _, form = rest.partition(" x ")
        if name == "all/chosen" and row["agreement"].value < 0.96:
            found.append(f"{name}: {row['agreement'].show(scale=100)} % agree, not 96")
        if scope == "scan" and form in ("a8se", "a8se8") and reference:
            change, more = row["agreement_difference"], row["sqnr_difference"]
            clipped = settings in ("quamba 99 pre-softplus", "quamba 99.9 pre-softplus")
            if change.high < 0:
                found.append(f"{name}: significantly worse than {reference}")
            if clipped and more.low <= 0:
                found.append(f"{name}: no significantly better SQNR than {reference}")
        if name == "all/a8se8 mmse asymmetric pre-softplus" and reference:
            change, more = row["agreement_difference"], row["sqnr_difference"]
            if reference.endswith(" pre-softplus"):
                if change.high < 0:
                    found.append(f"{name}: significantly worse than {reference}")
            elif change.value < 0.04 or more.value < 4:
                points, decibels = change.show(scale=100, signed=True), more.show(signed=True)
                found.append(f"{name}: {points} points and {decibels} dB from {reference}")
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out rows of a report."""
    cells = []
    for row in rows:
        line = [
            row["configuration"],
            row["agreement"].show(scale=100),
            row["sqnr"].show(),
            row["accuracy"].show(scale=100),
        ]
        if "reference" in row:
            for key, scale in (("agreement_difference", 100), ("sqnr_difference", 1)):
                noise = " noise" if row[key].within_noise else ""
                line.append(row[key].show(scale=scale, signed=True) + noise)
            line.append(row["reference"])
        else:
            line += ["", "", ""]
        cells.append(line)
    return table(
        [
            "<configuration",
            "agreement %",
            "SQNR dB",
            "right %",
            "<agreement less that of",
            "<SQNR less that of",
            "<the configuration",
        ],
        cells,
    )


def to_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without classes."""
    return {
        key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in row.items()
    }


# -- the activations themselves -------------------------------------------------------------------


def recorded(model: Path, files: Sequence[SourceFile]) -> dict[str, Arrays]:
    """What the scans take as x, ``[files, characters, channels]``, by the name of the tensor."""
    names: dict[str, None] = {}
    for scan in selective_scans(load(model).graph):
        value = scan.value("x")
        if value is not None:
            names[source_of_scan_input(value)] = None
    proto = onnx.load(model)
    known = {output.name for output in proto.graph.output}
    for name in names:
        if name not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, list[Arrays]] = {name: [] for name in names}
    for file in files:
        for name, array in zip(names, session.run(list(names), {"ids": file.ids}), strict=True):
            found[name].append(np.asarray(array))
    return {name: np.stack(arrays) for name, arrays in found.items()}


def source_of_scan_input(value: Any) -> str:
    """The tensor behind operators that only move values: two scans read one x forth and back."""
    while (node := value.producer()) is not None and node.op_type in (
        *("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity"),
    ):
        value = node.inputs[0]
    return str(value.name)


def heavy_tailed(seed: int = 0, size: int = 400_000) -> dict[str, Arrays]:
    """Synthetic activations, behind SiLU as x is, whose largest values are far out."""
    generator = np.random.default_rng(seed)

    def silu(values: Arrays) -> Arrays:
        result: Arrays = (values / (1 + np.exp(-values))).astype(np.float32)
        return result

    outliers = np.where(generator.random(size) < 1e-3, 30.0, 1.0)
    return {
        "SiLU of Student's t, 3 degrees": silu(generator.standard_t(3, size)),
        "SiLU of Student's t, 2.5 degrees": silu(generator.standard_t(2.5, size)),
        "SiLU of Laplace": silu(generator.laplace(size=size)),
        "SiLU of normal, 1 of 1,000 times 30": silu(generator.normal(size=size) * outliers),
    }


def fake_quantized(quantization: TensorQuantization, values: Arrays) -> Arrays:
    """Quantize and dequantize."""
    if quantization.layout is not None:
        codes = quantization.layout.encode(values, quantization.scale)
        return quantization.layout.decode(codes) * np.float64(quantization.scale)
    codes = np.rint(values / np.float32(quantization.scale)) + quantization.zero_point
    codes = np.clip(codes, quantization.code_min, quantization.code_max)
    return np.asarray((codes - quantization.zero_point) * np.float64(quantization.scale))


def signal_to_noise(quantization: TensorQuantization, values: Arrays) -> float:
    """Measured on the values, in dB."""
    noise = np.square(fake_quantized(quantization, values) - values).sum()
    signal = np.square(values.astype(np.float64)).sum()
    return float(decibels(signal / noise))


def activation_row(name: str, calibration: Arrays, test: Arrays) -> dict[str, Any]:
    """Calibrate every form on one array and measure it on another."""
    observer = Observer(exact=True)
    observer.update(calibration)
    single = {
        "symmetric": choose_quantization(observer, 8, symmetric=True),
        "unsigned or signed": choose_quantization(observer, 8),
        "asymmetric": choose_quantization(observer, 8, asymmetric=True),
    }
    return {
        "activations": name,
        "max_over_rms": float(np.abs(test).max() / np.sqrt(np.square(test).mean())),
        **{f"a8 {key}": signal_to_noise(found, test) for key, found in single.items()},
        "a8se": signal_to_noise(choose_soft_edge(observer, "soft-edge"), test),
        "a8se8": signal_to_noise(choose_soft_edge(observer, "soft-edge8"), test),
        "a8se6": signal_to_noise(choose_soft_edge(observer, "soft-edge6"), test),
        "a4se4": signal_to_noise(choose_soft_edge(observer, "soft-edge4"), test),
    }


def gain(row: Mapping[str, Any], form: str) -> float:
    """How much better than the best single step a form is, in dB."""
    single = max(value for key, value in row.items() if key.startswith("a8 "))
    return float(row[form] - single)


def broken_activations(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which bounds do not hold for activations themselves."""
    return [
        f"{row['activations']}: soft-edge8 is {gain(row, 'a8se8'):+.1f} dB better"
        for row in rows
        if gain(row, "a8se8") < (3.0 if row["activations"].startswith("synthetic") else 0.0)
    ]


def show_activations(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out SQNR in dB; the last columns are differences from the best single step."""
    forms = [key for key in rows[0] if key not in ("activations", "max_over_rms")]
    cells = []
    for row in rows:
        cells.append(
            [
                row["activations"],
                f"{row['max_over_rms']:.0f}",
                *(f"{row[form]:.1f}" for form in forms),
                f"{gain(row, 'a8se'):+.1f}",
                f"{gain(row, 'a8se8'):+.1f}",
            ]
        )
    headings = ["<activations", "max/rms", *forms, "a8se: more", "a8se8: more"]
    return table(headings, cells)


def main() -> int:
    """Print the tables, write JSON where asked; return whether a bound is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=positive, help="test files, evenly chosen; default: all")
    parser.add_argument(
        "--only", type=chosen, default="*", help="names of configurations, by commas; * is any text"
    )
    parser.add_argument("--engine", choices=["artefact", "onnxruntime"], default="artefact")
    parser.add_argument("--activations", action="store_true", help="the second part")
    parser.add_argument("--list", action="store_true", help="names of the configurations")
    parser.add_argument("--figure", type=Path, help="PNG to draw histograms of activations in")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    arguments = parser.parse_args()
    if arguments.list:
        for configuration in arguments.only:
            print(configuration.name)
        return 0

    model = mamba_segmenter().path
    calibration, test = source_files("calibration"), source_files("test")
    if arguments.files is not None:
        test = [test[index] for index in spread(len(test), arguments.files)]
    print(f"{len(calibration)} calibration files ({digest(calibration)}), {len(test)} test files")
    found: list[str] = []
    written: dict[str, Any] = {"calibration": digest(calibration), "test": digest(test)}

    if arguments.activations:
        few = [test[index] for index in spread(len(test), 60)]
        before, after = recorded(model, calibration), recorded(model, few)
        activations = [activation_row(name, before[name], after[name]) for name in before]
        halves = {name: np.split(values, 2) for name, values in heavy_tailed().items()}
        synthetic = [activation_row(f"synthetic: {n}", *both) for n, both in halves.items()]
        print(f"\nSQNR in dB of what the scans take as x, {len(few)} test files; then synthetic")
        print(show_activations([*activations, *synthetic]), flush=True)
        written["activations"] = [*activations, *synthetic]
        found = broken_activations(written["activations"])

        if arguments.figure is not None:
            draw(before, arguments.figure)
    else:
        run = float_runner(model)
        expected = np.stack([run(file.ids) for file in test])
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        for file, logits in zip(test[:3], expected[:3], strict=True):
            (wanted,) = session.run(["logits"], {"ids": file.ids})
            np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)
        report = Report(test, expected)
        ids = np.stack([file.ids for file in calibration])
        for configuration in arguments.only:
            started = time.perf_counter()
            path = quantized(configuration, model, {"ids": ids})
            run = runner(path, arguments.engine)
            report.measured[configuration.name] = measure(run, test, expected)
            apart = largest_difference(path, run, [file.ids for file in test[:2]])
            seconds = time.perf_counter() - started
            row = report.row(configuration.name, configuration.reference)
            print(
                f"{configuration.name}: {row['agreement'].show(scale=100)} %, "
                f"{row['sqnr'].show()} dB; {seconds:.0f} s; "
                f"the first steps in onnxruntime are {apart:.1e} apart",
                flush=True,
            )
        best = report.best_single_step()
        rows = [report.row("float", None)]
        for configuration in arguments.only:
            references = {configuration.reference}
            if configuration.name.startswith("all/"):
                same = configuration.reference if configuration.before_softplus else None
                references = {same, best} - {None, configuration.name} or {None}
            rows += [
                report.row(configuration.name, reference)
                for reference in sorted(references, key=lambda name: name != best)
            ]
        print()
        print(show(rows))
        found = broken(rows)
        written["configurations"] = [to_json(row) for row in rows]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    for bound in found:
        print(f"bound broken: {bound}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
