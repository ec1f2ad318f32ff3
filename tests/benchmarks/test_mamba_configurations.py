"""The configurations that are compared, on the language model of examples/mamba_text."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import bitwright
from benchmarks import mamba_configurations as module
from benchmarks.mamba_activations import activation_row, broken_activations, gain, heavy_tailed
from benchmarks.mamba_configurations import (
    Configuration,
    chosen,
    configurations,
    float_runner,
    largest_difference,
    plan_of,
    positive,
    quantized,
    runner,
)
from bitwright.vocabulary import Activation
from examples.mamba_text import network

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mamba_text"
FOUND = {configuration.name: configuration for configuration in configurations()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "mamba.onnx"
    onnx.save(network.build_onnx(network.load(EXAMPLE / "mamba.npz")), path)
    return path


def test_every_configuration_has_a_name_and_a_reference_before_it() -> None:
    names = [configuration.name for configuration in configurations()]
    assert len(set(names)) == len(names)
    for number, configuration in enumerate(configurations()):
        if configuration.reference is not None:
            assert configuration.reference in names[:number]


def test_forms_reach_the_tensors_they_are_for(model: Path) -> None:
    assert plan_of(FOUND["scan/quamba 99.9"], model) is None
    plan = plan_of(FOUND["scan/quamba 99.9 x a8se8"], model)
    assert plan is not None
    assert plan.scan_inputs == {f"layer{n}.u": Activation.parse("a8se8") for n in range(4)}
    assert {str(precision) for precision in plan.layers.values()} == {"w8a8"}
    assert len(plan.layers) == 4 * 5 + 1  # and the projection to the vocabulary
    plan = plan_of(FOUND["scan/quamba 99.9 pre-softplus"], model)
    assert plan is not None
    # What the softplus reads, behind the bias, instead of the time steps.
    assert plan.scan_inputs == {f"layer{n}.dt_biased": Activation(8) for n in range(4)}
    plan = plan_of(FOUND["all/a4se4 mmse"], model)
    assert plan is not None
    # dt, x, B and C of four scans.
    assert len(plan.scan_inputs) == 16
    assert set(plan.scan_inputs.values()) == {Activation.parse("a4se4")}
    assert {str(precision) for precision in plan.layers.values()} == {"w8a4se4"}
    other = plan_of(FOUND["all/a4se4 mmse asymmetric pre-softplus"], model)
    assert other is not None
    moved = set(plan.scan_inputs) ^ set(other.scan_inputs)
    assert len(moved) == 8
    assert len(other.scan_inputs) == 16
    # All activations have at most 8 bits, in all rows but two.
    wide = [
        name
        for name, entry in FOUND.items()
        if name.startswith("all/") and plan_of(entry, model).elementwise_bits == 16  # type: ignore[union-attr]  # they have plans
    ]
    assert wide == ["all/a8+16 mmse", "all/chosen+16"]


def test_the_cache_knows_what_was_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    made = []

    def quantize(*_: Any, output: Path, **options: Any) -> None:
        made.append(options)
        output.write_bytes(b"")

    monkeypatch.setattr(bitwright, "quantize", quantize)
    data = {"tokens": np.zeros((1, 8), np.int64)}
    first = Configuration("all/a8", everywhere=Activation(8))
    others = [replace(first, options={"clip": "minmax"}), replace(first, elementwise_bits=16)]
    paths = {quantized(entry, model, data) for entry in (first, *others, first)}
    assert (len(paths), len(made)) == (3, 3)


def test_options_of_the_scripts() -> None:
    assert [entry.name for entry in chosen("scan/naive*,all/a4 mmse")] == [
        "all/a4 mmse",
        "scan/naive w8a8",
    ]
    assert positive("3") == 3
    for wrong in ("0", "-1", "x"):
        with pytest.raises(argparse.ArgumentTypeError):
            positive(wrong)
    with pytest.raises(argparse.ArgumentTypeError, match="no configuration is called 'al'"):
        chosen("al,all/*")


def test_engines_are_compared_on_short_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def double(array: Any) -> Any:
        return 2.0 * array

    monkeypatch.setattr(module, "runner", lambda *_: double)
    array = np.arange(40.0)
    assert largest_difference(tmp_path, lambda x: double(x) + (x > 15), [array]) == 0.0
    assert largest_difference(tmp_path, lambda x: double(x) + (x > 14), [array]) == 1.0


def test_calibrated_segments_are_better_on_heavy_tails() -> None:
    for name, values in heavy_tailed().items():
        row = activation_row(name, *np.split(values, 2))
        assert gain(row, "a8se8") > 3, name
        assert not broken_activations([row])
        (found,) = broken_activations(
            [{**row, "activations": "synthetic", "a8se8": row["a8se"] - 12}]
        )
        assert found.startswith("synthetic")


@pytest.mark.slow
def test_artefacts_do_what_onnxruntime_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    tokens = np.random.default_rng(0).integers(0, 2_048, (4, 64))
    (expected,) = ort.InferenceSession(model).run(None, {"tokens": tokens[0]})
    np.testing.assert_allclose(float_runner(model)(tokens[0]), expected, rtol=1e-3, atol=1e-3)
    for name in ("scan/quamba 99.9 x a8se", "all/a8se8 100"):
        path = quantized(FOUND[name], model, {"tokens": tokens})
        assert quantized(FOUND[name], model, {"tokens": tokens}) == path
        run = runner(path, "artefact")
        standard = runner(path, "onnxruntime")(tokens[0])
        # Codes on the edge of rounding differ, as the scans between them are float32, and a scan
        # carries on what it read: what remains is little beside the noise of quantization.
        noise = float(np.square(standard - expected).mean())
        assert float(np.square(run(tokens[0]) - standard).mean()) < 0.25 * noise
