"""Trained models that nobody here made: they load, quantize well, and run exactly in integers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitwright
from benchmarks import models, quality
from bitwright.cli import main
from bitwright.quant.float_ops import make_session
from bitwright.quant.load import load

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", models.ALL_ONNX)
def test_every_model_loads_and_is_inspected(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.ALL_ONNX[name]().path
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = sum(layer["weight_count"] for layer in found["layers"])
    assert weights == found["weight_count"]
    if not name.startswith("silero") or "sequence" in name:  # those keep their layers in an If
        assert weights > 0
    # What is loaded still runs, in its raised operator set.
    make_session(load(path).to_proto(), optimize=True)


@pytest.mark.parametrize("precision", ["w8a8", "w4a4", "w2a8"])
@pytest.mark.parametrize("case", ["text_direction", "efficientnet"])
def test_integers_agree_with_onnxruntime_layer_by_layer(
    case: str, precision: str, tmp_path: Path
) -> None:
    chosen = {"text_direction": quality.text_direction, "efficientnet": quality.efficientnet}[case](
        16, 8, 0
    )
    name = quality.input_name(chosen.model.path)
    quantized = tmp_path / "quantized.onnx"
    bitwright.quantize(
        chosen.model.path,
        precision=precision,
        calibration={name: chosen.calibration.inputs},
        output=quantized,
    )
    result = bitwright.compare(quantized, {name: chosen.evaluation.inputs})
    assert len(result.regions) > 50
    small = [region for region in result.regions if region.codes < 5_000]
    pooled = 1 - sum(r.differing for r in small) / max(sum(r.codes for r in small), 1)
    assert pooled >= 0.995
    for region in result.regions:
        assert region.largest_difference <= 1
        # A region of a few hundred codes says little about shares: one code is 0.5 %.
        if region.codes >= 5_000:
            assert region.equal_share >= (0.999 if region.operand_bits <= 8 else 0.995), region
    assert result.equal_share >= 0.999


@pytest.mark.parametrize(
    "case,setting",
    [
        ("lenet", quality.DEFAULT),
        ("efficientnet", quality.DEFAULT),
        # Half of the symmetric codes of its HardSwish tensors are unused, so the lead is thin
        # (benchmarks/quality.py: 1 to 2 dB); it is judged on more samples.
        ("text_direction", quality.DEFAULT),
    ],
)
def test_w8a8_is_at_least_as_good_as_the_runtimes_own_quantizer(
    case: str, setting: quality.Setting
) -> None:
    make = {
        "lenet": quality.lenet,
        "efficientnet": quality.efficientnet,
        "text_direction": quality.text_direction,
    }[case]
    counts = (256, 1000) if case == "text_direction" else (64, 128)
    results = quality.evaluate(make(*counts, 0), [setting], batch=8)
    ours = [entry.energy.sqnr for entry in results if entry.tool == "bitwright"]
    peers = [entry.energy.sqnr for entry in results if entry.tool == "onnxruntime"]
    assert len(peers) == 4
    assert min(ours) >= max(peers)
