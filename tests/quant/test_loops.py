"""Quantization inside loops: which products are layers, and that all ways to run them agree.

onnxruntime runs the QDQ model; the reference gets its codes, and every region must then come to the
same ones. Closed forms say how many products there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import bitwright
from benchmarks import recurrent_models
from bitwright.errors import PlanError
from bitwright.planning import plan_of
from bitwright.quant.compare import compare_codes
from bitwright.quant.fake_quant import FakeQuant, fake_quant_model
from bitwright.quant.float_ops import make_session
from bitwright.quant.layers import find_layers, layer_nodes
from bitwright.quant.load import load
from bitwright.quant.quantizer import calibrate_model
from bitwright.quant.reference import Reference
from bitwright.quant.samples import Samples
from bitwright.vocabulary import FLOAT_BITS, Precision, PrecisionPlan
from tests.quant.qdq import Array

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
OPERATORS = tuple(GATES)


def parsed(text: str, **weights: Array) -> onnx.ModelProto:
    """A model of a text, which begins with the graph, and its constants."""
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + text)
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    onnx.checker.check_model(model)
    return model


def normal(*shape: int, seed: int = 0, scale: float = 0.5) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def of_steps(text: str) -> str:
    """A Scan of a body over ``x float[T, B, 6]`` with one state ``h float[B, 8]``."""
    return (
        "net (float[T, B, 6] x, float[B, 8] start) => (float[B, 8] end, float[T, B, 8] y) {"
        "end, y = Scan <num_scan_inputs = 1, body = step (float[B, 8] h, float[B, 6] e) =>"
        f" (float[B, 8] new, float[B, 8] out) {{ {text} out = Identity(new) }}> (start, x) }}"
    )


SCAN = parsed(
    of_steps("p = MatMul(e, w) q = MatMul(h, u) s = Add(q, b) t = Add(p, s) new = Tanh(t)"),
    w=normal(6, 8),
    u=normal(8, 8, seed=1),
    b=normal(8, seed=2),
)
BACKWARD = parsed(
    "net (float[B, T, 6] x, float[B, 8] start) => (float[B, 8] end, float[B, T, 8] y) {"
    "end, y = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1],"
    " scan_output_axes = [1], scan_output_directions = [1],"
    " body = step (float[B, 8] h, float[B, 6] e) => (float[B, 8] new, float[B, 8] out) {"
    " p = MatMul(e, w) q = MatMul(h, u) t = Add(p, q) new = Tanh(t) out = Mul(new, h) }"
    "> (start, x) }",
    w=normal(6, 8),
    u=normal(8, 8, seed=1),
)
LOOP = parsed(
    "net (float[T, B, 6] x, float[B, 8] start) => (float[B, 8] end, float[N, B, 8] y) {"
    "end, y = Loop <body = step (int64 i, bool more, float[B, 8] h) =>"
    " (bool on, float[B, 8] new, float[B, 8] out) {"
    " e = Gather <axis = 0> (x, i) p = Gemm <transB = 1> (e, w, b) q = MatMul(h, u) t = Add(p, q)"
    " new = Tanh(t) out = Relu(new) top = ReduceMax <keepdims = 0> (new) on = Less(top, bound) }"
    "> (trips, yes, start) }",
    w=normal(8, 6),
    u=normal(8, 8, seed=1),
    b=normal(8, seed=2),
    bound=np.array(2, np.float32),
    trips=np.array(5),
    yes=np.array(True),
)


def gated(operator: str, *, bidirectional: bool = True) -> onnx.ModelProto:
    return recurrent_models.gated(operator, 6, 8, bidirectional=bidirectional)


def feeds(model: onnx.ModelProto, count: int = 2) -> dict[str, Array]:
    """Complete inputs, one behind the other."""
    one = [recurrent_models.noise(model, T=9, B=3, time=9, batch=3) for _ in range(count)]
    return {name: np.stack([entry[name] * (1 - 0.1 * i) for i, entry in enumerate(one)])
            for name in one[0]}  # fmt: skip


MODELS = {
    **{operator: gated(operator) for operator in OPERATORS},
    "Scan": SCAN,
    "Scan backward": BACKWARD,
    "Loop": LOOP,
}


def quantized(model: onnx.ModelProto, tmp_path: Path, precision: str, **options: Any) -> Any:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return bitwright.quantize(path, calibration=feeds(model), precision=precision, **options)


# -- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("directions", [1, 2])
def test_products_of_the_standard_operators(operator: str, directions: int) -> None:
    model = gated(operator, bidirectional=directions == 2)
    layers, _ = find_layers(load(model, input_shapes={"x": [9, 3, 6]}))
    weights = directions * GATES[operator] * 8
    first, *steps = layers
    assert (first.kind, first.weight_count, first.macs) == ("matmul", weights * 6, 27 * weights * 6)
    assert {layer.kind for layer in steps} == {"recurrent"}
    assert {layer.steps for layer in steps} == {9}
    assert {layer.groups for layer in steps} == {directions}
    assert sum(layer.weight_count for layer in steps) == weights * 8
    assert sum(layer.macs or 0 for layer in steps) == 27 * weights * 8


def test_steps_of_a_loop_and_products_that_are_no_layers() -> None:
    layers, _ = find_layers(load(SCAN, input_shapes={"x": [5, 3, 6], "start": [3, 8]}))
    assert [(e.kind, e.steps, e.macs) for e in layers] == [
        ("recurrent", 5, 5 * 3 * 6 * 8),
        ("recurrent", 5, 5 * 3 * 8 * 8),
    ]
    layers, _ = find_layers(load(LOOP, input_shapes={"x": [9, 3, 6], "start": [3, 8]}))
    assert {layer.steps for layer in layers} == {5}
    left = parsed(
        of_steps("t = Transpose <perm = [1, 0]> (h) p = MatMul(u, t) new = Transpose(p)"),
        u=normal(8, 8),
    )
    layers, others = find_layers(load(left))
    assert not layers
    assert [e.reason for e in others if e.operator == "MatMul"] == [
        "a layer in a loop is a plain matrix product with its weights on the right"
    ]


def test_nodes_and_values_of_two_bodies_get_names_of_their_own() -> None:
    text = of_steps("q = MatMul(h, u) new = Tanh(q)").rpartition("}")[0]
    scan = text[text.index("end, y") :]
    both = text + scan.replace("end, y", "end2, y2").replace("(start, x)", "(end, x)") + "}"
    model = parsed(both.replace("float[T, B, 8] y)", "float[T, B, 8] y2)"), u=normal(8, 8))
    for index, node in enumerate(model.graph.node):
        node.name = f"scan{index}"
        node.attribute[1 if node.attribute[0].name != "body" else 0].g.node[0].name = "product"
    loaded = load(model)
    assert list(layer_nodes(loaded)) == ["product", "scan1/product"]
    names = [
        str(v.name) for node in loaded.graph for v in node.attributes["body"].as_graph().inputs
    ]
    assert len(set(names)) == len(names) == 4


# -- agreement -------------------------------------------------------------------------------------


def outputs(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    session = make_session(model, optimize=False)
    names = {entry.name for entry in session.get_inputs()}
    feed = {name: array for name, array in inputs.items() if name in names}
    return [np.asarray(array) for array in session.run(None, feed)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision, loop_bits", [("w8a8", 32), ("w4a4", 32), ("w8a8", 8)])
def test_the_reference_comes_to_the_codes_of_onnxruntime(
    name: str, precision: str, loop_bits: int, tmp_path: Path
) -> None:
    model = MODELS[name]
    made = quantized(model, tmp_path, precision, loop_bits=loop_bits)
    loaded = load(made.model)
    regions = compare_codes(loaded, Samples(feeds(model), loaded.inputs))
    assert [(r.name, r.differing) for r in regions] == [(r.name, 0) for r in regions]
    assert plan_of(loaded).loop_bits == loop_bits


@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_differ_by_one_code_at_most(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    made = quantized(model, tmp_path, "w8a8", loop_bits=16)
    loaded = load(made.model)
    regions = compare_codes(loaded, Samples(feeds(model), loaded.inputs))
    assert max(region.largest_difference for region in regions) <= 1
    assert sum(r.differing for r in regions) < 0.002 * sum(r.codes for r in regions)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_gives_what_onnxruntime_gives(name: str, tmp_path: Path) -> None:
    """Final states and outputs, in float between the quantizers."""
    model = MODELS[name]
    made = quantized(model, tmp_path, "w8a8")
    one = {key: array[0] for key, array in feeds(model).items()}
    found, _ = Reference(load(made.model)).run(one)
    for ours, theirs in zip(found.values(), outputs(made.model, one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop_bits", [16, 32])
def test_quantized_networks_are_near_the_float_ones(
    name: str, loop_bits: int, tmp_path: Path
) -> None:
    model = MODELS[name]
    made = quantized(model, tmp_path, "w8a8", loop_bits=loop_bits)
    one = {key: array[0] for key, array in feeds(model).items()}
    for exact, near in zip(outputs(model, one), outputs(made.model, one), strict=True):
        assert 10 * np.log10(np.square(exact).sum() / np.square(exact - near).sum()) > 25  # dB


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop_bits", [16, 32])
def test_fake_quantization_equals_the_qdq_model(name: str, loop_bits: int, tmp_path: Path) -> None:
    model = MODELS[name]
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    loaded = load(path)
    layers = list(layer_nodes(loaded))
    options = [Precision(8, 8), Precision(4, 8), Precision(2, 4)]
    found = calibrate_model(
        loaded,
        dict.fromkeys(layers, options),
        Samples(feeds(model), loaded.inputs),
        loop_bits=loop_bits,
    )
    plan = PrecisionPlan(dict.fromkeys(layers, options[0]), loop_bits=loop_bits)
    fake = FakeQuant(fake_quant_model(found, plan))
    one = {key: array[0] for key, array in feeds(model).items()}
    values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in one.items()}
    for shift in range(3):
        chosen = {n: options[(i + shift) % 3] for i, n in enumerate(layers)}
        fake.use(chosen)
        made = bitwright.quantize(
            path, calibration=feeds(model), plan=PrecisionPlan(chosen, loop_bits=loop_bits)
        )
        for ours, theirs in zip(fake.run(values).values(), outputs(made.model, one), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop_bits", [8, pytest.param(16, marks=pytest.mark.slow), 32])
def test_an_artefact_equals_the_reference(name: str, loop_bits: int, tmp_path: Path) -> None:
    model = MODELS[name]
    made = quantized(
        model, tmp_path, "w8a8", loop_bits=loop_bits, output=tmp_path / "quantized.onnx"
    )
    artifact = bitwright.compile(
        tmp_path / "quantized.onnx", "silago/drra", output=tmp_path / "artifact"
    )
    assert {layer.name for layer in artifact.manifest.layers} == {e.name for e in made.layers}
    # The one that reads a sequence at the number of its step runs step by step.
    assert {layer.kernel for layer in artifact.manifest.layers} == {name != "Loop"}
    loops = [e.name for e in artifact.manifest.host_operators if e.operator == "scan"]
    assert bool(loops) == (loop_bits == FLOAT_BITS or name == "Loop")
    one = {key: array[0] for key, array in feeds(model).items()}
    found = artifact.run(one)
    expected, _ = Reference(load(made.model)).run(one)
    for key, wanted in expected.items():
        if loop_bits < FLOAT_BITS:
            np.testing.assert_array_equal(found[key], wanted)
        else:  # functions of floats come from two libraries; their last bits may move single codes
            assert np.abs(found[key] - wanted).mean() < 1e-4


# -- other forms -----------------------------------------------------------------------------------


def sqnr(model: onnx.ModelProto, made: onnx.ModelProto, inputs: Mapping[str, Array]) -> float:
    """Signal to quantization noise ratio of all outputs, in dB; the least."""
    pairs = zip(outputs(model, inputs), outputs(made, inputs), strict=True)
    return min(10 * float(np.log10(np.square(a).sum() / np.square(a - b).sum())) for a, b in pairs)


BODIES = {
    "a value of the graph around": "p = MatMul(c, w) q = MatMul(h, u) t = Add(p, q) new = Tanh(t)",
    "the same in a Gemm": "p = Gemm(c, w) q = MatMul(h, u) t = Add(p, q) new = Tanh(t)",
    "a bias that is computed": "p = MatMul(e, w) q = Gemm(h, u, p) new = Tanh(q)",
    "a bias for each row": "p = MatMul(e, w) q = Gemm(h, u, rows) t = Add(p, q) new = Tanh(t)",
    "a factor": "p = MatMul(e, w) q = Gemm <alpha = 0.5> (h, u) t = Add(p, q) new = Tanh(t)",
    "weights of more axes": "p = MatMul(e, d) m = ReduceSum <keepdims = 0> (p, zero)"
    " q = MatMul(h, u) t = Add(m, q) new = Tanh(t)",
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("loop_bits", [8, 32])
def test_products_of_other_forms(name: str, loop_bits: int, tmp_path: Path) -> None:
    text = of_steps(BODIES[name]).replace("{end, y", "{ f = Tanh(given) c = Relu(f) end, y")
    model = parsed(
        text,
        given=normal(3, 6),
        w=normal(6, 8),
        u=normal(8, 8, seed=1),
        rows=normal(3, 8),
        d=normal(2, 6, 8),
        zero=np.array([0]),
    )
    made = quantized(model, tmp_path, "w8a8", loop_bits=loop_bits).model
    loaded = load(made)
    regions = compare_codes(loaded, Samples(feeds(model), loaded.inputs))
    assert not any(region.differing for region in regions)
    one = {key: array[0] for key, array in feeds(model).items()}
    assert sqnr(model, made, one) > (15 if loop_bits == 8 else 20)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("text", ["s = Sigmoid(h) new = Mul(s, four)", "new = Sub(k, h)"])
def test_a_state_keeps_its_range(text: str, asymmetric: bool, tmp_path: Path) -> None:
    """It starts near zero and below, and is larger after the only step."""
    model = parsed(of_steps(text), four=np.array(4, np.float32), k=np.array(3, np.float32))
    one = {"x": normal(1, 3, 6), "start": -np.abs(normal(3, 8, scale=0.05))}
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    made = bitwright.quantize(
        with_a_layer(path),
        calibration={name: array[None] for name, array in one.items()},
        precision="w8a8",
        loop_bits=8,
        asymmetric=asymmetric,
    )
    assert sqnr(onnx.load(path), made.model, one) > 25


def with_a_layer(path: Path) -> Path:
    """Add a product of the outputs: a model without any cannot be quantized."""
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node("MatMul", ["y", "last"], ["z"], name="last"))
    model.graph.initializer.append(numpy_helper.from_array(normal(8, 2), "last"))
    model.graph.output.append(onnx.ValueInfoProto(name="z"))
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def test_a_loop_without_a_step(tmp_path: Path) -> None:
    made = quantized(LOOP, tmp_path, "w8a8").model
    (trips,) = [entry for entry in made.graph.initializer if entry.name == "trips"]
    trips.CopyFrom(numpy_helper.from_array(np.array(0), "trips"))
    loaded = load(made)
    regions = compare_codes(loaded, Samples(feeds(LOOP), loaded.inputs))
    assert all(region.codes == 0 for region in regions if region.name != "x_QuantizeLinear")


@pytest.mark.parametrize("theirs, ours", [(0.01, 2.0), (2.0, 0.01)])
def test_a_loop_that_ends_at_another_step(
    theirs: float, ours: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One side ends behind its first step, the other one runs all five."""
    made = quantized(LOOP, tmp_path, "w8a8").model
    other = onnx.ModelProto.FromString(made.SerializeToString())
    for model, number in ((made, theirs), (other, ours)):
        (limit,) = [entry for entry in model.graph.initializer if entry.name == "bound"]
        limit.CopyFrom(numpy_helper.from_array(np.array(number, np.float32), "bound"))
    loaded = load(made)
    monkeypatch.setattr(
        "bitwright.quant.compare.Reference", lambda _, form: Reference(load(other), form)
    )
    samples = Samples({k: v[:1] for k, v in feeds(LOOP).items()}, loaded.inputs)
    for region in compare_codes(loaded, samples):
        steps = 1 if theirs < ours else 5
        assert region.codes % steps == 0
        # Codes of steps that ours leaves out differ; those of steps that only ours runs count not.
        assert region.differing == region.codes - region.codes // steps


def test_a_loop_in_a_loop_stays_float(tmp_path: Path) -> None:
    inner = (
        "n = Loop <body = inner (int64 i, bool more, float[B, 8] a) => (bool on, float[B, 8] b)"
        " { on = Identity(more) b = Mul(a, half) }> (two, yes, t)"
    )
    model = parsed(
        of_steps(f"q = MatMul(h, u) t = Tanh(q) {inner} new = Tanh(n)"),
        u=normal(8, 8, scale=1.0),
        half=np.array(0.5, np.float32),
        two=np.array(2),
        yes=np.array(True),
    )
    made = quantized(model, tmp_path, "w8a8", loop_bits=8).model
    loaded = load(made)
    regions = compare_codes(loaded, Samples(feeds(model), loaded.inputs))
    assert not any(region.differing for region in regions)
    (x, start) = (feeds(model)[name][0] for name in ("x", "start"))
    found, _ = Reference(loaded).run({"x": x, "start": start})
    expected = outputs(made, {"x": x, "start": start})
    np.testing.assert_allclose(found["end"], expected[0], atol=1e-6)


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4, 12, 64, True, None, "16"])
def test_loop_bits_that_do_not_exist(bits: Any) -> None:
    with pytest.raises(PlanError, match="loop_bits"):
        PrecisionPlan({}, loop_bits=bits)
    with pytest.raises(PlanError, match="loop_bits"):
        PrecisionPlan.from_json(json.dumps({"schema_version": 1, "layers": {}, "loop_bits": bits}))


def test_a_plan_keeps_its_loop_bits() -> None:
    plan = PrecisionPlan({}, loop_bits=16)
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    assert PrecisionPlan.from_json('{"schema_version": 1, "layers": {}}').loop_bits == FLOAT_BITS
