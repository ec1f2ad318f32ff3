"""Fake quantization must equal the QDQ models that ``bitwright quantize`` writes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import bitwright
from benchmarks import recurrent_models
from bitwright.quant.fake_quant import FakeQuant, FakeQuantModel, fake_quant_model
from bitwright.quant.float_ops import make_session
from bitwright.quant.layers import layer_nodes
from bitwright.quant.load import load
from bitwright.quant.quantizer import calibrate_model
from bitwright.quant.samples import Samples
from bitwright.vocabulary import Precision, PrecisionPlan
from tests.passes.graphs import _MOST_ELEMENTS, _OPERATORS, Graph, Tensor
from tests.quant.cases import flag, one_of
from tests.quant.qdq import Array, Builder, residual_network

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
ALL = [Precision(w, a) for w in (2, 4, 8, 16) for a in (2, 4, 8, 16)]
FORMATS = [Precision.parse(f"w8{form}") for form in ("a8", "a8se", "a8se8", "a8se6", "a4se4")]
Plan = dict[str, Precision]


class FloatGraph(Graph):
    """The same random graphs in float."""

    def quantized(self, name: str) -> str:
        return name

    def move(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        if flag(self.generator):  # the other one's Reshape fixes the batch
            made = self.builder.node("Transpose", x.name, perm=[0, 1, 3, 2])
            return Tensor(made, (channels, width, height))
        pads = self.builder.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1]))
        return Tensor(self.builder.node("Pad", x.name, pads), (channels, height + 1, width + 1))

    def weights(self, *shape: int, axis: int) -> str:
        del axis
        return self.builder.constant(self.generator.normal(0, 0.5, shape).astype(np.float32))


def draw_float_graph(seed: int) -> tuple[Builder, list[str]]:
    """A float graph with two layers or more, and its outputs: all that nothing reads."""
    generator = np.random.default_rng(seed)
    graph = FloatGraph(generator)
    graph.tensors.append(Tensor(graph.builder.input("x", ["N", 4, 6, 6]), (4, 6, 6)))
    layers = 0
    while layers < 2 or (flag(generator, 0.8) and len(graph.builder.nodes) < 30):
        operator = one_of(generator, _OPERATORS)
        x = one_of(generator, graph.tensors[-3:])
        made = graph.move(x) if operator is Graph.move else operator(graph, x)
        if made is None or np.prod(made.shape) > _MOST_ELEMENTS:
            continue
        layers += operator in (Graph.convolution, Graph.product)
        graph.tensors.append(Tensor(made.name, made.shape))
    nodes = graph.builder.nodes
    read = {name for node in nodes for name in node.input}
    return graph.builder, [name for node in nodes for name in node.output if name not in read]


def save(builder: Builder, path: Path, *names: str) -> Path:
    onnx.save(builder.model(*names), path)
    return path


def sample(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32)


def built(
    path: Path,
    calibration: Mapping[str, Array],
    *,
    blocked: bool,
    segments: int = 8,
    precisions: Sequence[Precision] = ALL,
    **options: Any,
) -> FakeQuantModel:
    model = load(path)
    names = list(layer_nodes(model))
    found = calibrate_model(
        model,
        dict.fromkeys(names, precisions),
        Samples(calibration, model.inputs),
        **options,
    )
    plan = PrecisionPlan(dict.fromkeys(names, precisions[0]))
    return fake_quant_model(found, plan, blocked=blocked, segments=segments)


def draw_plans(
    names: Sequence[str], seed: int, count: int, precisions: Sequence[Precision] = ALL
) -> list[Plan]:
    generator = np.random.default_rng(seed)
    return [{name: one_of(generator, precisions) for name in names} for _ in range(count)]


def fake(model: FakeQuant, plan: Plan, x: Array, name: str, key: object = None) -> dict[str, Array]:
    model.use(plan)
    return model.run({name: ort.OrtValue.ortvalue_from_numpy(x)}, key)


def qdq(
    path: Path, plan: Plan, calibration: Mapping[str, Array], **options: Any
) -> onnx.ModelProto:
    return bitwright.quantize(
        path,
        plan=PrecisionPlan(plan),
        calibration=calibration,
        **options,
    ).model


def outputs(model: onnx.ModelProto, x: Array, name: str) -> dict[str, Array]:
    # One thread here as well: how a convolution is divided among threads moves its last bits.
    session = make_session(model, optimize=False, lean=True)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: x}), strict=True))


def check_equal(
    path: Path,
    name: str,
    calibration: Array,
    x: Array,
    plans: int,
    precisions: Sequence[Precision] = ALL,
) -> None:
    given = {name: calibration}
    model = FakeQuant(built(path, given, blocked=False, precisions=precisions))
    for plan in draw_plans(model.model.layers, 1, plans, precisions):
        expected = outputs(qdq(path, plan, given), x, name)
        found = fake(model, plan, x, name)
        assert found.keys() == expected.keys()
        for output, wanted in expected.items():
            np.testing.assert_array_equal(found[output], wanted, err_msg=str(plan))


def test_lenet_equals_its_qdq_models() -> None:
    with np.load(LENET / "calibration.npz") as archive:
        calibration = archive["image"].astype(np.float32)
    with np.load(LENET / "test.npz") as archive:
        images = archive["image"][:50].astype(np.float32)
    check_equal(LENET / "lenet.onnx", "image", calibration, images, 12)


def test_a_residual_network_equals_its_qdq_models(tmp_path: Path) -> None:
    builder = residual_network(np.random.default_rng(3), batch_norm=True)
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    check_equal(path, "x", sample(1, 12, 3, 16, 16), sample(2, 5, 3, 16, 16), 6)


def test_formats_of_activations_equal_their_qdq_models(tmp_path: Path) -> None:
    builder = residual_network(np.random.default_rng(3), batch_norm=True)
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    calibration, x = sample(1, 12, 3, 16, 16) ** 3, sample(2, 5, 3, 16, 16) ** 3
    check_equal(path, "x", calibration, x, 6, FORMATS)
    recurrent = recurrent_models.gated("LSTM", 23, 8, bidirectional=True)
    onnx.save(recurrent, tmp_path / "lstm.onnx")
    sequences = sample(0, 20, 3, 23), sample(1, 20, 3, 23)
    check_equal(tmp_path / "lstm.onnx", "x", *sequences, 2, FORMATS)


@pytest.mark.parametrize("seed", [1, 4, 7])
def test_formats_in_random_graphs_equal_their_qdq_models(seed: int, tmp_path: Path) -> None:
    builder, names = draw_float_graph(seed)
    path = save(builder, tmp_path / "graph.onnx", *names)
    check_equal(path, "x", sample(1, 12, 4, 6, 6), sample(2, 3, 4, 6, 6), 2, FORMATS)


def test_the_blocked_layout_knows_formats_too(tmp_path: Path) -> None:
    builder = residual_network(np.random.default_rng(6))
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    given, x = {"x": sample(1, 12, 3, 16, 16)}, sample(2, 50, 3, 16, 16)
    runner = FakeQuant(built(path, given, blocked=True, precisions=FORMATS))
    for plan in draw_plans(runner.model.layers, 2, 3, FORMATS):
        expected = outputs(qdq(path, plan, given), x, "x")["fc_out"]
        found = fake(runner, plan, x, "x", key=0)["fc_out"]
        error = np.square(found - expected).sum() / np.square(expected).sum()
        assert error < 1e-4, (plan, error)  # sums in another order move rare codes


def test_recurrent_networks_equal_their_qdq_models(tmp_path: Path) -> None:
    sru = recurrent_models.sru_network(hidden=12, projection=8, outputs=5, layers=2)
    lstm = recurrent_models.gated("LSTM", 23, 8, bidirectional=True)
    for name, model in (("sru", sru), ("lstm", lstm)):
        onnx.save(model, tmp_path / f"{name}.onnx")
        x = sample(1, 20, 3, 23)
        check_equal(tmp_path / f"{name}.onnx", "x", sample(0, 20, 3, 23), x, plans=4)


@pytest.mark.parametrize("seed", [*range(10), 117])
def test_random_graphs_equal_their_qdq_models(seed: int, tmp_path: Path) -> None:
    builder, names = draw_float_graph(seed)
    path = save(builder, tmp_path / "graph.onnx", *names)
    check_equal(path, "x", sample(1, 12, 4, 6, 6), sample(2, 3, 4, 6, 6), 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 250))
def test_many_random_graphs_equal_their_qdq_models(seed: int, tmp_path: Path) -> None:
    builder, names = draw_float_graph(seed)
    path = save(builder, tmp_path / "graph.onnx", *names)
    check_equal(path, "x", sample(1, 12, 4, 6, 6), sample(2, 3, 4, 6, 6), 3)


@pytest.mark.parametrize("options", [{"clip": "minmax"}, {"clip": "percentile"}])
def test_options_of_quantization_are_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    builder = residual_network(np.random.default_rng(4))
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    given = {"x": sample(1, 12, 3, 16, 16)}
    x = sample(2, 5, 3, 16, 16)
    model = FakeQuant(built(path, given, blocked=False, **options))
    for plan in draw_plans(model.model.layers, 5, 4):
        expected = outputs(qdq(path, plan, given, **options), x, "x")
        np.testing.assert_array_equal(fake(model, plan, x, "x")["fc_out"], expected["fc_out"])


def codes_in(model: FakeQuantModel, plan: Plan, x: Array, name: str) -> dict[str, Array]:
    """Layer name to what its quantizer gives, relative to the code of zero."""
    (segment,) = model.segments
    proto = onnx.ModelProto.FromString(segment.model)
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=f"{slot.layer}/codes") for slot in segment.slots
    )
    session = make_session(proto, optimize=False, lean=True)
    runner = FakeQuant(model)  # its values live as long as it does
    fed = {
        key: value.numpy()
        for values in runner.parameters(plan).values()
        for key, value in values.items()
    }
    names = [f"{slot.layer}/codes" for slot in segment.slots]
    found = session.run(names, {name: x, **fed})
    return {
        slot.layer: codes.astype(np.int64) - int(fed[slot.zero_point])
        for slot, codes in zip(segment.slots, found, strict=True)
    }


def codes_of_qdq(model: onnx.ModelProto, x: Array, name: str) -> dict[str, Array]:
    """Layer name to the codes of its data input, relative to the code of zero."""
    proto = onnx.ModelProto.FromString(model.SerializeToString())
    layers = {n.name: n.input[0] for n in proto.graph.node if n.op_type in ("Conv", "Gemm")}
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    producers = {output: node for node in proto.graph.node for output in node.output}
    scales = {}
    for layer, value in layers.items():
        while producers[value].op_type != "DequantizeLinear":
            value = producers[value].input[0]  # noqa: PLW2901 - walking up
        scales[layer] = constants[producers[value].input[1]].astype(np.float64)
    proto.graph.output.extend(onnx.ValueInfoProto(name=v) for v in set(layers.values()))
    session = make_session(proto, optimize=False, lean=True)
    values = list(set(layers.values()))
    found = dict(zip(values, session.run(values, {name: x}), strict=True))
    return {layer: np.rint(found[v] / scales[layer]) for layer, v in layers.items()}


def test_codes_of_every_layer_are_those_of_the_qdq_model(tmp_path: Path) -> None:
    builder = residual_network(np.random.default_rng(5))
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    given, x = {"x": sample(1, 12, 3, 16, 16)}, sample(2, 5, 3, 16, 16)
    model = built(path, given, blocked=False, segments=1)
    for plan in draw_plans(model.layers, 6, 5):
        expected = codes_of_qdq(qdq(path, plan, given), x, "x")
        found = codes_in(model, plan, x, "x")
        assert found.keys() == expected.keys()
        for layer, codes in found.items():
            np.testing.assert_array_equal(codes, expected[layer], err_msg=layer)


def has_blocked_layout(path: Path, optimized: Path) -> bool:
    """Whether onnxruntime itself runs the float model in its blocked layout here."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(optimized)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return any(node.domain == "com.microsoft.nchwc" for node in onnx.load(optimized).graph.node)


def test_the_blocked_layout_differs_in_rare_codes_only(tmp_path: Path) -> None:
    """Sums in another order are off in their last bits, which seldom moves a code by one."""
    builder = residual_network(np.random.default_rng(6))
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    given, x = {"x": sample(1, 12, 3, 16, 16)}, sample(2, 200, 3, 16, 16)
    if not has_blocked_layout(path, tmp_path / "optimized.onnx"):
        pytest.skip("onnxruntime has no blocked layout on this processor")
    model = built(path, given, blocked=True)
    assert model.notes == ()
    convolutions = [slot.layout for segment in model.segments for slot in segment.slots][:-1]
    assert None not in convolutions
    wide = dict.fromkeys(model.layers, Precision(16, 16))
    runner = FakeQuant(model)
    np.testing.assert_allclose(
        fake(runner, wide, x, "x")["fc_out"],
        outputs(qdq(path, wide, given), x, "x")["fc_out"],
        rtol=1e-3,
        atol=1e-4,
    )
    exact = make_session(str(path), optimize=False).run(None, {"x": x})[0]
    for plan in draw_plans(model.layers, 7, 6):
        expected = outputs(qdq(path, plan, given), x, "x")["fc_out"]
        found = fake(runner, plan, x, "x")["fc_out"]
        # At 2 bits sums of few values often end exactly between two codes.
        noise = np.square(expected - exact).mean()
        assert np.square(found - expected).mean() < 0.1 * noise, plan
        if all(min(p.weight_bits, p.activation_bits) > 4 for p in plan.values()):
            assert np.isclose(found, expected, rtol=1e-3, atol=1e-3).mean() > 0.99, plan


def test_what_is_kept_changes_nothing(tmp_path: Path) -> None:
    """Plans that begin alike, in any order, with much and little memory."""
    builder = residual_network(np.random.default_rng(8))
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    model = built(path, {"x": sample(1, 12, 3, 16, 16)}, blocked=True)
    assert len(model.segments) > 2
    plans = draw_plans(model.layers, 9, 6)
    first, *rest = model.layers
    plans += [{**plan, rest[-1]: ALL[5]} for plan in plans] + [{**plans[0], first: ALL[3]}]
    batches = [sample(seed, 4, 3, 16, 16) for seed in (2, 3)]
    fresh = [[fake(FakeQuant(model), p, x, "x")["fc_out"] for x in batches] for p in plans]
    for reuse in (0, 20_000, 1 << 28):
        runner = FakeQuant(model, reuse_bytes=reuse)
        for number in np.random.default_rng(reuse).permutation(2 * len(plans)) % len(plans):
            for index, x in enumerate(batches):
                found = fake(runner, plans[number], x, "x", key=index)["fc_out"]
                np.testing.assert_array_equal(found, fresh[number][index])


def test_the_model_travels_to_another_process(tmp_path: Path) -> None:
    builder = residual_network(np.random.default_rng(8))
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    model = built(path, {"x": sample(1, 12, 3, 16, 16)}, blocked=True)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - made here
    (plan,) = draw_plans(model.layers, 1, 1)
    x = sample(2, 3, 3, 16, 16)
    np.testing.assert_array_equal(
        fake(FakeQuant(again), plan, x, "x")["fc_out"],
        fake(FakeQuant(model), plan, x, "x")["fc_out"],
    )


def test_weights_are_kept_once_a_width(tmp_path: Path) -> None:
    builder = residual_network(np.random.default_rng(8))
    path = save(builder, tmp_path / "net.onnx", "fc_out")
    runner = FakeQuant(built(path, {"x": sample(1, 12, 3, 16, 16)}, blocked=False))
    names = runner.model.layers
    seen: dict[tuple[str, int], set[int]] = {}
    for precision in ALL:
        for name, values in runner.parameters(dict.fromkeys(names, precision)).items():
            weights = next(value for key, value in values.items() if key.endswith("/weights"))
            seen.setdefault((name, precision.weight_bits), set()).add(weights.data_ptr())
    assert all(len(pointers) == 1 for pointers in seen.values())
    assert len(seen) == 4 * len(names)


def test_scales_raised_for_a_bias_do_not_multiply_the_weights(tmp_path: Path) -> None:
    """Three layers with one input, each with a channel that is next to nothing but its bias."""
    builder = Builder(opset=21)
    x = builder.input("x", ["N", 4])
    generator = np.random.default_rng(0)
    names = []
    for _ in range(3):
        weights = generator.normal(0, 1, (4, 5)).astype(np.float32)
        weights[:, 0] *= 1e-12
        bias = builder.constant(np.ones(5, np.float32))
        names.append(builder.node("Gemm", x, builder.constant(weights), bias))
    path = save(builder, tmp_path / "dead.onnx", *names)
    runner = FakeQuant(built(path, {"x": sample(1, 32, 4)}, blocked=False))
    seen = set()
    for plan in draw_plans(runner.model.layers, 3, 60):
        for layer, values in runner.parameters(plan).items():
            pointer = next(v for key, v in values.items() if key.endswith("/weights")).data_ptr()
            seen.add((layer, plan[layer].weight_bits, pointer))
    # One a width, and for raised scales one an activation scale of a layer.
    assert len(seen) <= 3 * 4 * 12
