"""From ONNX to an artefact: what is compiled, and what is refused before anything is written."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
import yaml
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

import bitwright
from bitwright import Artifact, Precision, PrecisionPlan, compilation, make_plan, targets
from bitwright.errors import (
    BitwrightError,
    ModelError,
    OutputError,
    PlanError,
    RunError,
    UsageError,
)
from bitwright.quant.load import load
from bitwright.quant.reference import Reference
from bitwright.vocabulary import Activation
from tests.quant.mamba import mamba
from tests.quant.mamba import samples as mamba_samples

Array = npt.NDArray[Any]

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
MODEL, CALIBRATION, TEST = (LENET / name for name in ("lenet.onnx", "calibration.npz", "test.npz"))
LAYERS = {"conv1": 150, "conv2": 2400, "fc1": 48000, "fc2": 10080, "fc3": 840}
MIXED = {"conv1": "w8a8", "conv2": "w4a8", "fc1": "w2a8", "fc2": "w4a16", "fc3": "w16a8"}


@pytest.fixture(scope="module")
def images() -> Array:
    with np.load(TEST) as archive:
        return np.asarray(archive["image"][:200], np.float32)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(CALIBRATION) as archive:
        np.savez(path, image=archive["image"][:32])
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Artifact:
    return bitwright.compile(
        MODEL,
        "bitfusion/eyeriss",
        plan=make_plan(MODEL, layers=MIXED),
        calibration=few,
        output=tmp_path_factory.mktemp("mixed") / "lenet",
    )


def reference(model: Path, images: Array) -> Array:
    return Reference(load(model)).run({"image": images})[0]["logits"]


# -- what is compiled ----------------------------------------------------------------------------


def test_every_bit_is_the_references(mixed: Artifact, images: Array) -> None:
    assert mixed.qdq_model is not None
    for samples in (1, 3, len(images)):  # the batch is symbolic
        batch = images[:samples]
        got = mixed.run({"image": batch})["logits"]
        np.testing.assert_array_equal(got, reference(mixed.qdq_model, batch))


@pytest.mark.parametrize("target", ["bitfusion/eyeriss", "silago/drra"])
@pytest.mark.parametrize("precision", ["w4a4", "w16a16"])
def test_both_targets(
    tmp_path: Path, few: Path, images: Array, target: str, precision: str
) -> None:
    got = bitwright.compile(
        MODEL, target, precision=precision, calibration=few, output=tmp_path / "out"
    )
    assert got.manifest.target == got.plan.target == target
    assert got.qdq_model is not None
    logits = got.run({"image": images})["logits"]
    np.testing.assert_array_equal(logits, reference(got.qdq_model, images))


def test_manifest(mixed: Artifact) -> None:
    manifest = mixed.manifest
    assert manifest.model.source == str(MODEL)
    assert manifest.model.float_model is not None
    assert manifest.model.float_model.path == str(MODEL)
    assert [(e.name, e.dtype, e.shape) for e in manifest.inputs] == [
        ("image", "float32", ("N", 1, 28, 28))
    ]
    assert [(e.name, e.dtype, e.shape) for e in manifest.outputs] == [
        ("logits", "float32", ("N", 10))
    ]
    assert {layer.name: layer.precision for layer in manifest.layers} == MIXED
    assert {layer.name: layer.weight_count for layer in manifest.layers} == LAYERS
    assert manifest.passes
    assert {entry.name for entry in manifest.host_operators} <= {"flatten"}


def test_sizes_follow_the_plan(mixed: Artifact) -> None:
    bits = {name: Precision.parse(text).weight_bits for name, text in MIXED.items()}
    wanted = {name: math.ceil(bits[name] * count / 8) for name, count in LAYERS.items()}
    assert {layer.name: layer.weight_bytes for layer in mixed.manifest.layers} == wanted
    weights = {
        entry.name.removesuffix(".weight"): entry.bytes
        for entry in mixed.manifest.parameters
        if entry.name.endswith(".weight")
    }
    assert weights == wanted
    assert mixed.manifest.float_weight_bytes == 4 * sum(LAYERS.values())
    # What else is in the file: biases, multipliers, and TVM's header of each array.
    file = mixed.manifest.files["model.params"].bytes
    assert file < mixed.manifest.weight_bytes + 16_000


def test_the_plan_is_kept(mixed: Artifact) -> None:
    assert {name: str(precision) for name, precision in mixed.plan.layers.items()} == MIXED
    assert mixed.plan.target == "bitfusion/eyeriss"
    assert mixed.plan.structure_hash == load(MODEL).structure_hash


def test_equal_input_gives_equal_files(tmp_path: Path, few: Path, mixed: Artifact) -> None:
    again = bitwright.compile(
        MODEL,
        "bitfusion/eyeriss",
        plan=make_plan(MODEL, layers=MIXED),
        calibration=few,
        output=tmp_path / "again",
    )
    for name in ("model.params", "plan.json", "model.qdq.onnx"):
        assert again.manifest.files[name] == mixed.manifest.files[name], name


def test_it_runs_elsewhere_without_the_models(
    mixed: Artifact, images: Array, tmp_path: Path
) -> None:
    moved = shutil.copytree(mixed.folder, tmp_path / "moved")
    (moved / "model.qdq.onnx").unlink()
    np.save(tmp_path / "images.npy", images)
    code = """
import numpy as np
import bitwright
got = bitwright.load_artifact("moved").run({"image": np.load("images.npy")})
np.save("logits.npy", got["logits"])
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    logits = mixed.run({"image": images})["logits"]
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), logits)


def test_a_quantized_model(tmp_path: Path, few: Path, mixed: Artifact, images: Array) -> None:
    path = tmp_path / "qdq.onnx"
    bitwright.quantize(MODEL, plan=make_plan(MODEL, layers=MIXED), calibration=few, output=path)
    got = bitwright.compile(path, "bitfusion/eyeriss", output=tmp_path / "out", keep_qdq=False)
    assert got.plan.layers == mixed.plan.layers
    assert got.plan.structure_hash == load(path).structure_hash
    assert got.manifest.model.float_model is None
    assert got.qdq_model is None
    np.testing.assert_array_equal(
        got.run({"image": images})["logits"], mixed.run({"image": images})["logits"]
    )


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, images: Array) -> None:
        self._batches = iter([{"image": images[start : start + 8]} for start in range(0, 32, 8)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxruntime")
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_model_that_another_tool_quantized(
    tmp_path: Path, images: Array, per_channel: bool
) -> None:
    path = tmp_path / "qdq.onnx"
    quantize_static(
        str(MODEL),
        str(path),
        Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
    )
    got = bitwright.compile(path, "bitfusion/eyeriss", output=tmp_path / "out")
    assert set(got.plan.layers.values()) == {Precision(8, 8)}
    np.testing.assert_array_equal(got.run({"image": images})["logits"], reference(path, images))


def test_modules_after_each_pass(tmp_path: Path, few: Path) -> None:
    got = bitwright.compile(
        MODEL,
        "silago/drra",
        precision="w8a8",
        calibration=few,
        dump_ir=tmp_path / "ir",
        output=tmp_path / "out",
    )
    assert len(list((tmp_path / "ir").iterdir())) >= len(got.manifest.passes)


def test_passes_of_an_artifact(mixed: Artifact) -> None:
    result = bitwright.describe_passes(mixed.folder)
    assert result.applied == mixed.manifest.passes
    assert result.layers == mixed.manifest.layers
    assert {entry.name for entry in result.available} >= {entry.name for entry in result.applied}
    assert bitwright.describe_passes().applied == ()
    assert json.loads(json.dumps(result.to_dict(), default=str))["layers"]


# -- what is refused -----------------------------------------------------------------------------


def refuse(error: type[BitwrightError], message: str, folder: Path, **options: Any) -> str:
    given: dict[str, Any] = {
        "model": MODEL,
        "target": "bitfusion/eyeriss",
        "precision": "w8a8",
        "calibration": CALIBRATION,
        "output": folder / "out",
        **options,
    }
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=message) as raised:
        bitwright.compile(**given)
    assert sorted(folder.rglob("*")) == before, "something was written"
    return str(raised.value)


def test_a_plan_that_the_target_cannot_do(tmp_path: Path) -> None:
    # It is refused before the samples are looked at.
    message = refuse(
        PlanError,
        "precision w4a8: silago/drra cannot do the precision w4a8",
        tmp_path,
        target="silago/drra",
        precision="w4a8",
        calibration=tmp_path / "missing.npz",
    )
    assert "it allows w4a4, w8a8, w16a16" in message
    plan = make_plan(MODEL, layers={"fc2": "w2a8"})
    message = refuse(
        PlanError, r"of 1 layer: fc2 \(w2a8\)", tmp_path, target="silago/drra",
        precision=None, plan=plan,
    )  # fmt: skip
    assert "conv1" not in message


def test_a_quantized_model_that_the_target_cannot_do(tmp_path: Path, few: Path) -> None:
    path = tmp_path / "qdq.onnx"
    bitwright.quantize(MODEL, precision="w2a8", calibration=few, output=path)
    message = refuse(
        PlanError, "cannot do the precision w2a8", tmp_path, model=path, target="silago/drra",
        precision=None, calibration=None,
    )  # fmt: skip
    assert message.startswith(str(path))


def test_a_plan_for_another_target(tmp_path: Path) -> None:
    plan = replace(make_plan(MODEL), target="silago/drra")
    refuse(PlanError, "was made for silago/drra, not", tmp_path, precision=None, plan=plan)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "w8a8"}, "an option of quantization: --precision"),
        ({"calibration": CALIBRATION}, "--calibration"),
        ({"clip": "minmax"}, "--clip"),
        ({"per_channel": False}, "--per-channel"),
        ({"elementwise_bits": 8}, "--elementwise-bits"),
        ({"loop_bits": 16}, "--loop-bits"),
    ],
)
def test_options_of_quantization_for_a_quantized_model(
    tmp_path: Path, mixed: Artifact, options: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"precision": None, "calibration": None, **options}
    refuse(UsageError, message, tmp_path, model=mixed.qdq_model, **given)


def test_other_options(tmp_path: Path) -> None:
    refuse(UsageError, "no samples to quantize it with", tmp_path, calibration=None)
    refuse(UsageError, "neither a precision", tmp_path, precision=None)
    refuse(UsageError, "no accelerator 'tpu'", tmp_path, target="tpu")
    refuse(UsageError, "frobnicate", tmp_path, passes="frobnicate")
    refuse(OutputError, "does not exist", tmp_path, output=tmp_path / "missing" / "out")
    (tmp_path / "file").touch()
    refuse(OutputError, "exists already", tmp_path, output=tmp_path / "file")
    refuse(OutputError, "cannot be made", tmp_path, dump_ir=tmp_path / "file")


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = tmp_path / "missing.npz"  # nothing heavy starts before
    message = refuse(UsageError, r"there is no C\+\+ compiler", tmp_path, calibration=missing)
    assert "install one" in message
    monkeypatch.setenv("CXX", "no-such-compiler")
    refuse(UsageError, "'no-such-compiler' does not exist", tmp_path, calibration=missing)


def test_unsupported_operators_are_named_all_at_once(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[4, 3, 3] x) => (float[4] y, float[4, 3, 4] z, float[4] p) {
            [first] y = Det (x)
            a = MatMul (x, v)
            z = Mish (a)
            [last] p = Det (x)
        }
    """)
    random = np.random.default_rng(0)
    weights = random.standard_normal((3, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "v"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    samples = random.standard_normal((4, 4, 3, 3)).astype(np.float32)
    message = refuse(
        ModelError, "cannot be compiled", tmp_path, model=path, calibration={"x": samples}
    )
    assert "Det 'first', Det 'last'" in message


def test_failures_of_tvm_are_told_in_one_sentence(tmp_path: Path) -> None:
    log = tmp_path / "out.bitwright-error.log"
    with (
        pytest.raises(
            RunError, match=r"^layer 'block/conv.1': TVM fails \(ValueError: bad\)"
        ) as raised,
        compilation._told_in_one_sentence(log, ["conv", "block/conv.1"]),
    ):
        raise ValueError("bad\nin function fused_block_conv_1_int8")
    assert raised.value.exit_code == 1
    assert str(log) in str(raised.value)
    assert "in function fused_block_conv_1_int8" in log.read_text()
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    "text, layer",
    [
        ("conv1 fails", "conv1"),
        ("conv10 fails", None),
        ("fused_conv1_relu", "conv1"),
        ("no layer", None),
        ("a_b", "a/b"),
    ],
)
def test_the_layer_that_an_error_names(text: str, layer: str | None) -> None:
    assert compilation._layer_in(text, ["conv1", "a/b"]) == layer


def test_an_artifact_is_replaced_only_when_asked(
    tmp_path: Path, few: Path, mixed: Artifact
) -> None:
    target = shutil.copytree(mixed.folder, tmp_path / "out")
    refuse(OutputError, "exists already", tmp_path, output=target)
    got = bitwright.compile(
        MODEL,
        "silago/drra",
        precision="w8a8",
        calibration=few,
        output=target,
        overwrite=True,
    )
    assert got.manifest.target == "silago/drra"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_target_is_no_option_of_a_pass(tmp_path: Path) -> None:
    passes = "partition-for-target=target:silago/drra"
    refuse(UsageError, "is that of --target", tmp_path, precision="w8a8", passes=passes)


def test_sizes_can_be_fixed(tmp_path: Path, few: Path) -> None:
    shape = [None, 1, 28, 28]
    artifact = bitwright.compile(
        MODEL,
        "silago/drra",
        precision="w4a4",
        calibration=few,
        input_shapes={"image": shape},
        output=tmp_path / "lenet",
    )
    assert artifact.inputs[0].shape == ("N", 1, 28, 28)
    wrong = {"image": [None, 1, 28, 29]}
    refuse(ModelError, "does not fit input", tmp_path, precision="w8a8", input_shapes=wrong)


def test_an_interrupt_inside_a_pass_is_an_interrupt(
    tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TVM, which calls the pass, would tell it as an error of its own."""
    from bitwright.passes import lower_to_integer

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lower_to_integer._Lowering, "_compute", interrupt)
    output = tmp_path / "lenet"
    with pytest.raises(KeyboardInterrupt):
        bitwright.compile(MODEL, "silago/drra", precision="w4a4", calibration=few, output=output)
    assert list(tmp_path.iterdir()) == []


def test_an_accelerator_of_the_user(tmp_path: Path, few: Path, images: Array) -> None:
    path = tmp_path / "mine.yaml"
    description = targets.get("silago/drra").model_dump(mode="json", by_alias=True)
    path.write_text(yaml.safe_dump({**description, "name": "mine/drra"}))
    got = bitwright.compile(MODEL, path, precision="w4a4", calibration=few, output=tmp_path / "out")
    assert got.manifest.target == "mine/drra"
    assert got.qdq_model is not None
    logits = got.run({"image": images})["logits"]
    np.testing.assert_array_equal(logits, reference(got.qdq_model, images))


def test_plans_by_hand(tmp_path: Path, few: Path) -> None:
    plan = PrecisionPlan(layers=dict.fromkeys(LAYERS, Precision(4, 4)), target="silago/drra")
    (tmp_path / "plan.json").write_text(plan.to_json())
    got = bitwright.compile(
        MODEL, "silago/drra", plan=tmp_path / "plan.json", calibration=few, output=tmp_path / "out"
    )
    assert got.manifest.weight_bytes == sum(math.ceil(count / 2) for count in LAYERS.values())


def test_what_the_soft_edge_pass_changes_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mamba.onnx"
    onnx.save(mamba(), path)
    options: dict[str, Any] = {
        "calibration": mamba_samples(),
        "recipe": "quamba",
        "target": "generic/systolic",
        "input_shapes": {"x": [16, None]},
    }
    given = bitwright.compile(path, output=tmp_path / "int8", **options)
    found = bitwright.compile(
        path, output=tmp_path / "se", passes="soft-edge=tensors:x+y", **options
    )
    assert found.plan.scan_inputs == {**given.plan.scan_inputs, "u": Activation.parse("a8se")}
    changed = {
        name: str(precision)
        for name, precision in found.plan.layers.items()
        if precision != given.plan.layers[name]
    }
    assert changed == {"out_proj": "w8a8se"}
    assert (given.qdq_model is not None, found.qdq_model) == (True, None)
    costs = [json.loads((tmp_path / name / "cost.json").read_text()) for name in ("int8", "se")]
    layers = [{entry["layer"]: entry for entry in cost["layers"]} for cost in costs]
    assert {name for name in layers[0] if layers[0][name] != layers[1][name]} == {"out_proj"}
    with pytest.raises(UsageError, match=r"silago/drra decodes no soft-edge .* makes a8se"):
        bitwright.compile(
            path,
            output=tmp_path / "other",
            passes="soft-edge",
            **{**options, "target": "silago/drra"},
        )
    assert not (tmp_path / "other").exists()
    # What has soft edge already stays as it is, and so do plan and QDQ model.
    plan = replace(
        given.plan, scan_inputs={**given.plan.scan_inputs, "u": Activation.parse("a8se8")}
    )
    same = bitwright.compile(
        path, output=tmp_path / "same", passes="soft-edge", plan=plan, **options
    )
    assert same.plan.scan_inputs["u"] == Activation.parse("a8se8")
    assert same.qdq_model is not None
