"""Recipes, inputs of selective scans and percentiles, on a small Mamba block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import bitwright
from bitwright.errors import BitwrightError, ModelError, PlanError, RunError, UsageError
from bitwright.planning import plan_of
from bitwright.quant.fake_quant import FakeQuant, fake_quant_model
from bitwright.quant.hadamard import hadamard
from bitwright.quant.layers import find_layers
from bitwright.quant.load import load
from bitwright.quant.norms import fold_norms
from bitwright.quant.prepare import prepare
from bitwright.quant.quantizer import Quantized, calibrate_model, fit_plan
from bitwright.quant.recipes import RECIPES, get_recipe
from bitwright.quant.samples import Samples
from bitwright.quant.selective_scan import selective_scans
from bitwright.vocabulary import Activation, Precision, PrecisionPlan
from tests.quant.mamba import constant, mamba, samples
from tests.quant.qdq import Array, Builder, residual_network

LAYERS = ("in_proj", "conv", "x_proj", "dt_proj", "out_proj")


def run(model: onnx.ModelProto, x: Array, *outputs: str) -> list[Array]:
    """Run in onnxruntime, without optimisations; other outputs where they are named."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(copy.SerializeToString(), options)
    return list(session.run(list(outputs) or None, {"x": x}))


def quantize(model: onnx.ModelProto, folder: Path, **options: Any) -> Quantized:
    path = folder / "float.onnx"
    onnx.save(model, path)
    options = {"calibration": samples(), **options}
    return bitwright.quantize(path, **options)


def error_db(result: onnx.ModelProto, model: onnx.ModelProto, seed: int = 1) -> float:
    """Signal to noise at the output, by default on other samples than those of the calibration."""
    noise = power = 0.0
    for x in samples(seed=seed)["x"]:
        expected = run(model, x)[0]
        noise += float(np.square(run(result, x)[0] - expected).sum())
        power += float(np.square(expected).sum())
    return float(10 * np.log10(power / noise))


@pytest.fixture(scope="module")
def quamba(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return quantize(mamba(both_ways=True), tmp_path_factory.mktemp("q"), recipe="quamba")


# -- rotation and folding ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("channels", [8, 12, 16, 20, 24])
def test_the_model_computes_the_same(channels: int, norm: str) -> None:
    float_model = mamba(channels, both_ways=True, norm=norm)
    model = load(float_model)
    scans = selective_scans(model.graph)
    prepare(model)
    RECIPES["quamba"].rewrite(model, scans)
    assert len(model.notes) == 2
    assert "normalisations" in model.notes[0]
    assert "out_proj" in model.notes[1]
    rewritten = model.to_proto()
    for x in samples(count=3)["x"]:
        expected = run(float_model, x)[0]
        np.testing.assert_allclose(run(rewritten, x)[0], expected, rtol=1e-5, atol=1e-5)


def test_what_the_projection_reads_is_rotated() -> None:
    float_model = mamba(12)
    model = load(float_model)
    scans = selective_scans(model.graph)
    RECIPES["quamba"].rewrite(model, scans)
    rewritten = model.to_proto()
    x = samples(count=1)["x"][0]
    (plain,) = run(float_model, x, "yg")
    (rotated,) = run(rewritten, x, "yg_rotated")
    matrix = hadamard(12) / np.sqrt(12.0)
    np.testing.assert_allclose(rotated, plain @ matrix, rtol=1e-4, atol=1e-5)
    (node,) = [node for node in rewritten.graph.node if node.name == "out_proj"]
    np.testing.assert_allclose(
        constant(rewritten, node.input[1]), matrix.T @ constant(float_model, "w_out"), atol=1e-6
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_weights_of_the_norm_are_folded(norm: str) -> None:
    float_model = mamba(norm=norm)
    model = load(float_model)
    RECIPES["quamba"].rewrite(model, selective_scans(model.graph))
    rewritten = model.to_proto()
    (node,) = [node for node in rewritten.graph.node if node.name == "in_proj"]
    gamma, beta = constant(float_model, "gamma"), constant(float_model, "beta")
    weights = constant(float_model, "w_in")
    folded = constant(rewritten, node.input[1])
    np.testing.assert_allclose(folded, gamma[:, None] * weights, rtol=1e-6)
    (add,) = [n for n in rewritten.graph.node if n.op_type == "Add" and n.input[0] == "m"]
    np.testing.assert_allclose(
        constant(rewritten, add.input[1]),
        beta @ weights + constant(float_model, "b_in"),
        rtol=1e-5,
        atol=1e-6,
    )
    (read,) = run(rewritten, samples(count=1)["x"][0], node.input[0])
    assert abs(float(np.square(read).mean(axis=-1).max()) - 1.0) < 1e-3


def test_a_weight_with_more_axes_than_the_norm_stays() -> None:
    """It adds an axis to what the projection reads."""
    float_model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        net (float[5, 4] x) => (float[1, 5, 3] y)
            <float epsilon = {0.000001}, int64[1] last = {-1}> {
            sq = Mul(x, x) mean = ReduceMean(sq, last) shifted = Add(mean, epsilon)
            root = Sqrt(shifted) plain = Div(x, root) scaled = Mul(plain, gamma)
            [layer] y = MatMul(scaled, w) }"""
    )
    random = np.random.default_rng(0)
    for name, shape in (("gamma", (1, 1, 4)), ("w", (4, 3))):
        array = random.normal(size=shape).astype(np.float32)
        float_model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = load(float_model)
    assert fold_norms(model) == []
    x = random.normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_array_equal(run(model.to_proto(), x)[0], run(float_model, x)[0])


def test_a_norm_that_others_read_keeps_its_weights() -> None:
    float_model = mamba()
    for node in float_model.graph.node:
        if list(node.output) == ["y"]:
            node.input[0] = "z"
    model = load(float_model)
    RECIPES["quamba"].rewrite(model, selective_scans(model.graph))
    assert not any("normalisations" in note for note in model.notes)
    x = samples(count=1)["x"][0]
    np.testing.assert_allclose(
        run(model.to_proto(), x)[0], run(float_model, x)[0], rtol=1e-5, atol=1e-5
    )


def test_a_size_without_a_hadamard(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'out_proj'.* has 10 inputs(.|\n)*--no-rotation"):
        quantize(mamba(10), tmp_path, recipe="quamba")
    result = quantize(mamba(10), tmp_path, recipe="quamba", rotation=False)
    assert not any("rotated" in note for note in result.notes)
    assert math.isfinite(error_db(result.model, mamba(10)))


# -- the quantized model -------------------------------------------------------------------------


def test_everything_is_symmetric_int8(quamba: Quantized) -> None:
    assert {str(p) for p in quamba.plan.layers.values()} == {"w8a8"}
    assert tuple(quamba.plan.layers) == LAYERS
    assert quamba.plan.scan_inputs == dict.fromkeys(("u", "dt", "B", "C"), Activation(8))
    assert quamba.plan.percentiles == {"u": 99.999}
    entries = [layer.activation for layer in quamba.layers] + list(quamba.scan_inputs)
    assert {str(entry.quantization) for entry in entries} == {"int8"}
    assert {entry.quantization.zero_point for entry in entries} == {0}
    for entry in entries:
        if entry.name != "u":
            peak = max(-entry.minimum, entry.maximum)
            assert entry.quantization.scale == pytest.approx(peak / 127.0, rel=1e-6)


def test_weights_have_one_scale_a_tensor(quamba: Quantized) -> None:
    for layer in LAYERS:
        assert constant(quamba.model, f"{layer}.weight_codes_scale").shape == ()
    scale = constant(quamba.model, "x_proj.weight_codes_scale")
    peak = np.abs(constant(mamba(both_ways=True), "w_x")).max()
    assert scale == pytest.approx(peak / 127.0, rel=1e-6)


def test_both_scans_read_the_same_codes(quamba: Quantized) -> None:
    graph = quamba.model.graph
    scans = [node for node in graph.node if node.op_type == "Scan"]
    assert len(scans) == 2
    assert list(scans[0].input) == list(scans[1].input)
    made = {name: node for node in graph.node for name in node.output}
    for name in scans[0].input[1:]:
        node = made[name]
        while node.op_type in ("Split", "Transpose", "Squeeze"):
            node = made[node.input[0]]
        assert node.op_type == "DequantizeLinear"
    body = next(entry.g for entry in scans[0].attribute if entry.name == "body")
    assert not any("Linear" in node.op_type for node in body.node)


def test_functions_in_front_of_the_scan_are_tables(quamba: Quantized) -> None:
    floats = {kind for _, kind in quamba.float_operators}
    assert floats == {"LayerNormalization", "Scan", "Add", "MatMul"}  # what is rotated is a MatMul


def test_it_is_near_the_float_model(quamba: Quantized, tmp_path: Path) -> None:
    model = mamba(both_ways=True)
    naive = quantize(model, tmp_path, recipe="naive")
    assert error_db(quamba.model, model) > 25.0
    assert error_db(naive.model, model) > 20.0


def test_the_rotation_is_no_layer_in_the_file_either(quamba: Quantized) -> None:
    again = load(quamba.model)
    layers, others = find_layers(again)
    assert tuple(layer.name for layer in layers) == LAYERS
    assert sum("Hadamard" in other.reason for other in others) >= 2
    assert plan_of(again).layers == quamba.plan.layers


@pytest.mark.parametrize("length", [1, 2, 7])
def test_short_sequences(quamba: Quantized, length: int) -> None:
    x = samples(count=1)["x"][0][:length]
    expected = run(mamba(both_ways=True), x)[0]
    (found,) = run(quamba.model, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=0.1 * float(np.abs(expected).max()))


def test_samples_of_different_lengths(tmp_path: Path) -> None:
    """What stands behind the length of a sample does not count."""
    padded = samples()
    padded["x"][:, 15:] = 1e6
    lengths = np.full(len(padded["x"]), 15)
    cut = {"x": samples()["x"][:, :15]}
    first = quantize(mamba(), tmp_path, recipe="quamba", calibration={**padded, "lengths": lengths})
    second = quantize(mamba(), tmp_path, recipe="quamba", calibration=cut)
    assert first.scan_inputs == second.scan_inputs


def test_the_search_sees_what_the_file_computes(tmp_path: Path) -> None:
    model = load(mamba(both_ways=True))
    plan = fit_plan(model, Precision(8, 8))
    precisions = {name: [precision] for name, precision in plan.layers.items()}
    data = Samples(samples(), model.inputs)
    found = calibrate_model(model, precisions, data, recipe="quamba")
    fake = FakeQuant(fake_quant_model(found, plan, blocked=False))
    quantized = quantize(mamba(both_ways=True), tmp_path, recipe="quamba")
    x = samples(count=1, seed=3)["x"][0]
    (expected,) = run(quantized.model, x)
    fake.use(plan.layers)
    (result,) = fake.run({"x": ort.OrtValue.ortvalue_from_numpy(x)}).values()
    np.testing.assert_array_equal(result, expected)


# -- options and plans ---------------------------------------------------------------------------


def scan_input(result: Quantized, name: str) -> Any:
    (found,) = [entry for entry in result.scan_inputs if entry.name == name]
    return found.quantization


def magnitudes(name: str) -> Array:
    """All values of a tensor of the block over the calibration data."""
    values = [run(mamba(), x, name)[0].reshape(-1) for x in samples()["x"]]
    return np.asarray(np.abs(np.concatenate(values)))


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.999, 100.0])
def test_the_percentile_of_the_scan_input(tmp_path: Path, percent: float) -> None:
    result = quantize(mamba(), tmp_path, recipe="quamba", percentile=percent)
    expected = np.percentile(magnitudes("u"), percent) / 127.0
    assert scan_input(result, "u").scale == pytest.approx(expected, rel=0.03)
    assert scan_input(result, "dt").scale == pytest.approx(magnitudes("dt").max() / 127.0, rel=1e-5)


def test_options_win_over_the_recipe(tmp_path: Path) -> None:
    result = quantize(mamba(), tmp_path, recipe="quamba", per_channel=True, precision="w4a8")
    assert constant(result.model, "x_proj.weight_codes_scale").shape == (10,)
    assert {str(p) for p in result.plan.layers.values()} == {"w4a8"}
    clipped = quantize(mamba(), tmp_path, recipe="quamba", clip="percentile", percentile=95.0)
    expected = np.percentile(magnitudes("dt"), 95.0) / 127.0
    assert scan_input(clipped, "dt").scale == pytest.approx(expected, rel=0.03)


def test_plans_win_over_the_recipe(tmp_path: Path) -> None:
    plan = PrecisionPlan(
        dict.fromkeys(LAYERS, Precision(8, 8)),
        scan_inputs={"B": Activation(16), "u": Activation.parse("a8se")},
        percentiles={"u": 99.0, "z": 90.0},
    )
    result = quantize(mamba(), tmp_path, recipe="quamba", plan=plan)
    assert scan_input(result, "B").bits == 16
    assert scan_input(result, "C").bits == 8
    assert scan_input(result, "u").layout is not None
    assert result.plan.percentiles == {"u": 99.0, "z": 90.0}
    assert error_db(result.model, mamba()) > 15.0
    again = PrecisionPlan.from_json(result.plan.to_json())
    assert quantize(mamba(), tmp_path, recipe="quamba", plan=again).plan == result.plan


def test_scan_inputs_and_percentiles_without_a_recipe(tmp_path: Path) -> None:
    layers = dict.fromkeys(LAYERS, Precision(8, 8))
    plain = quantize(mamba(), tmp_path, plan=PrecisionPlan(layers))
    assert plain.scan_inputs == ()
    plan = PrecisionPlan(layers, scan_inputs={"dt": Activation(8)}, percentiles={"yg": 99.0})
    result = quantize(mamba(), tmp_path, plan=plan)
    assert [entry.name for entry in result.scan_inputs] == ["dt"]
    assert str(scan_input(result, "dt")) == "uint8"  # softplus is never negative
    (out,) = [layer for layer in result.layers if layer.name == "out_proj"]
    expected = np.percentile(magnitudes("yg"), 99.0) / 127.0
    assert out.activation.quantization.scale == pytest.approx(expected, rel=0.03)
    assert result.notes == plain.notes


def test_a_percentile_counts_behind_the_rotation(tmp_path: Path) -> None:
    plan = PrecisionPlan(dict.fromkeys(LAYERS, Precision(8, 8)), percentiles={"yg": 90.0})
    result = quantize(mamba(), tmp_path, recipe="quamba", plan=plan)
    rotated = [run(mamba(), x, "yg")[0] @ (hadamard(8) / np.sqrt(8.0)) for x in samples()["x"]]
    expected = np.percentile(np.abs(np.concatenate(rotated)), 90.0) / 127.0
    (out,) = [layer for layer in result.layers if layer.name == "out_proj"]
    assert out.activation.quantization.scale == pytest.approx(expected, rel=0.03)


# -- what is refused -----------------------------------------------------------------------------


def refused(tmp_path: Path, **options: Any) -> BitwrightError:
    with pytest.raises(BitwrightError) as caught:
        quantize(mamba(), tmp_path, **options)
    return caught.value


def with_plan(**fields: Mapping[str, Any]) -> PrecisionPlan:
    return PrecisionPlan(dict.fromkeys(LAYERS, Precision(8, 8)), **fields)  # type: ignore[arg-type]  # fields of a plan


def test_scan_inputs_that_no_scan_reads(tmp_path: Path) -> None:
    plan = with_plan(scan_inputs={"yg": Activation(8), "nothing": Activation(8)})
    error = refused(tmp_path, plan=plan)
    assert isinstance(error, PlanError)
    assert "'yg', 'nothing'" in str(error)
    assert "dt, u, B, C" in str(error) or "u, dt, B, C" in str(error)


def test_time_steps_and_what_their_softplus_reads_exclude_each_other(tmp_path: Path) -> None:
    plan = with_plan(scan_inputs={"db": Activation(8), "dt": Activation(8)})
    error = refused(tmp_path, plan=plan)
    assert isinstance(error, PlanError)
    assert "'dt' and 'db'" in str(error)


def test_scan_inputs_that_the_target_does_not_decode(tmp_path: Path) -> None:
    """Those of a plan, and those of a quantized model, whose plan is what it holds."""
    forms = {"u": "a8se", "B": "a16", "C": "a8"}
    scan_inputs = {name: Activation.parse(text) for name, text in forms.items()}
    plan = with_plan(scan_inputs=scan_inputs)
    path = tmp_path / "quantized.onnx"
    result = quantize(mamba(both_ways=True), tmp_path, plan=plan, output=path)
    found = plan_of(load(path)).scan_inputs
    assert sorted(map(str, found.values())) == ["a16", "a8", "a8se"]
    (scan, _) = [node for node in result.model.graph.node if node.op_type == "Scan"]
    assert set(found) == {scan.input[2], scan.input[3], scan.input[4]}  # dt stays float
    eyeriss, float_path = "bitfusion/eyeriss", tmp_path / "float.onnx"
    data: dict[str, Any] = {"calibration": samples(), "plan": plan}
    with pytest.raises(PlanError, match=r"cannot decode.*u \(a8se\)"):
        bitwright.compile(float_path, eyeriss, output=tmp_path / "a", **data)
    with pytest.raises(PlanError, match=r"cannot decode.*\(a8se\)"):
        bitwright.compile(path, eyeriss, output=tmp_path / "a")
    with pytest.raises(PlanError, match=r"cannot decode.*\(a8se\)"):
        bitwright.cost(path, target=eyeriss)


def test_plan_of_what_the_softplus_reads(tmp_path: Path) -> None:
    plan = with_plan(scan_inputs={"db": Activation(8)})
    result = quantize(mamba(), tmp_path, plan=plan)
    (softplus,) = [node for node in result.model.graph.node if node.op_type == "Softplus"]
    assert plan_of(load(result.model)).scan_inputs == {softplus.input[0]: Activation(8)}


def test_scan_inputs_of_a_model_without_a_scan() -> None:
    model = load(residual_network(np.random.default_rng(0)).model("fc_out"))
    layers = fit_plan(model, Precision(8, 8)).layers
    with pytest.raises(PlanError, match="no selective scan"):
        fit_plan(model, PrecisionPlan(layers, scan_inputs={"x": Activation(8)}))


def test_percentiles_of_other_tensors(tmp_path: Path) -> None:
    assert isinstance(refused(tmp_path, plan=with_plan(percentiles={"nothing": 99.0})), PlanError)
    error = refused(tmp_path, plan=with_plan(percentiles={"u": 99.0, "h1": 99.0}))
    assert isinstance(error, PlanError)
    assert "'h1', which neither a layer nor a selective scan reads" in str(error)


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.5, float("nan")])
@pytest.mark.parametrize("recipe", ["default", "naive", "quamba"])
def test_percentiles_out_of_range(tmp_path: Path, recipe: str, percent: float) -> None:
    error = refused(tmp_path, recipe=recipe, percentile=percent, precision="w8a8")
    assert isinstance(error, UsageError)
    assert "percentile" in str(error)


@pytest.mark.parametrize("recipe, clip", [("naive", None), ("naive", "mmse"), ("default", None)])
def test_a_percentile_that_nothing_is_cut_at(tmp_path: Path, recipe: str, clip: str | None) -> None:
    error = refused(tmp_path, recipe=recipe, clip=clip, percentile=50.0, precision="w8a8")
    assert isinstance(error, UsageError)
    assert "changes nothing" in str(error)


@pytest.mark.parametrize("recipe, percent", [("quamba", 99.999), ("naive", 99.99)])
def test_the_percentile_of_all_tensors(tmp_path: Path, recipe: str, percent: float) -> None:
    given = quantize(mamba(), tmp_path, recipe=recipe, clip="percentile", percentile=percent)
    assert quantize(mamba(), tmp_path, recipe=recipe, clip="percentile").layers == given.layers


def test_the_default_recipe_needs_a_precision(tmp_path: Path) -> None:
    assert isinstance(refused(tmp_path), UsageError)


def test_recipes_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="default, naive, quamba"):
        get_recipe("quarot")
    assert isinstance(refused(tmp_path, recipe="quarot"), UsageError)


def test_quamba_without_a_selective_scan(tmp_path: Path) -> None:
    build = Builder()
    x = build.input("x", ["n", 4])
    weights = build.constant(np.eye(4, dtype=np.float32))
    path = tmp_path / "plain.onnx"
    onnx.save(build.model(build.node("MatMul", x, weights, name="layer")), path)
    data = {"x": np.ones((3, 4), np.float32)}
    with pytest.raises(ModelError, match="no selective scan"):
        bitwright.quantize(path, calibration=data, recipe="quamba")
    naive = bitwright.quantize(path, calibration=data, recipe="naive")
    assert str(naive.layers[0].activation.quantization) == "int8"


def test_all_zero_and_infinite_activations(tmp_path: Path) -> None:
    model = mamba()
    for tensor in model.graph.initializer:
        if tensor.name in ("w_x", "w_in", "b_in", "b_conv"):
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name)
            )
    result = quantize(model, tmp_path, recipe="quamba")
    assert scan_input(result, "u").scale == 1.0
    x = samples(count=1)["x"][0]
    np.testing.assert_allclose(run(result.model, x)[0], run(model, x)[0], rtol=1e-5, atol=1e-5)
    for tensor in model.graph.initializer:
        if tensor.name == "b_dt":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(8, 3e38, np.float32), "b_dt"))
        if tensor.name == "b_in":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(16, 3e38, np.float32), "b_in"))
    with pytest.raises(RunError, match="NaN or infinite"):
        quantize(model, tmp_path, recipe="quamba")


# -- in front of the softplus --------------------------------------------------------------------


def test_what_the_softplus_of_the_time_steps_reads(tmp_path: Path) -> None:
    """Named in a plan, it is quantized instead of the time steps; the softplus stays float."""
    float_model = mamba(both_ways=True)
    layers = dict.fromkeys(LAYERS, Precision(8, 8))
    plan = PrecisionPlan(layers, scan_inputs={"db": Activation(8)})
    result = quantize(float_model, tmp_path, recipe="quamba", plan=plan)
    assert sorted(result.plan.scan_inputs) == ["B", "C", "db", "u"]
    (softplus,) = [node for node in result.model.graph.node if node.op_type == "Softplus"]
    produced = {name: node for node in result.model.graph.node for name in node.output}
    assert produced[softplus.input[0]].op_type == "DequantizeLinear"
    for scan in (node for node in result.model.graph.node if node.op_type == "Scan"):
        assert scan.input[1] == softplus.output[0]
    assert "Softplus" in {kind for _, kind in result.float_operators}
    assert error_db(result.model, float_model) > 25.0
