"""Calibrated layouts against SQNRs of the values themselves, and whole models in soft edge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitwright
from bitwright.errors import UsageError
from bitwright.quant.compare import compare_codes
from bitwright.quant.layers import layer_nodes, quantized_precision
from bitwright.quant.load import load
from bitwright.quant.observers import (
    Observer,
    TensorQuantization,
    choose_quantization,
    expected_sqnr_db,
)
from bitwright.quant.reference import Reference
from bitwright.quant.samples import Samples
from bitwright.quant.soft_edge import choose_activation, choose_soft_edge, single_step
from bitwright.soft_edge import QUAMBA_SE, SoftEdge
from bitwright.vocabulary import Activation, ActivationFormat, Precision, PrecisionPlan
from tests.quant.qdq import Builder, profile, residual_network, run_onnxruntime

Floats = npt.NDArray[np.float32]
CALIBRATED: dict[ActivationFormat, int] = {"soft-edge8": 8, "soft-edge6": 6, "soft-edge4": 4}


def observe(values: Floats) -> Observer:
    observer = Observer()
    for part in np.array_split(values, 8):
        observer.update(part)
    return observer


def heavy(name: str, size: int = 100_000) -> Floats:
    generator = np.random.default_rng(7)
    if name == "student":
        return np.asarray(generator.standard_t(3, size), np.float32)
    if name == "laplace":
        return np.asarray(generator.laplace(size=size), np.float32)
    x = generator.standard_normal(size)
    x[::997] *= 8  # few, large
    return np.asarray(x / (1 + np.exp(-x)), np.float32)  # SiLU


def rounded(values: Floats, q: TensorQuantization) -> npt.NDArray[np.float64]:
    if q.layout is not None:
        steps = q.layout.decode(q.layout.encode(values, q.scale)).astype(np.float64)
        return steps * q.scale
    codes = np.clip(np.rint(values / np.float32(q.scale)) + q.zero_point, q.code_min, q.code_max)
    result: npt.NDArray[np.float64] = (codes.astype(np.float64) - q.zero_point) * q.scale
    return result


def sqnr_db(values: Floats, q: TensorQuantization) -> float:
    noise = np.square(values - rounded(values, q)).sum()
    if not noise:
        return math.inf
    return float(10 * np.log10(np.square(values, dtype=np.float64).sum() / noise))


def layout_of(q: TensorQuantization) -> SoftEdge:
    assert q.layout is not None
    return q.layout


@pytest.mark.parametrize("data", ["student", "laplace", "silu"])
def test_heavy_tails_gain_3_db_over_every_single_step(data: str) -> None:
    values = heavy(data)
    observer = observe(values)
    single = max(
        sqnr_db(values, choose_quantization(observer, 8, method=method, asymmetric=shifted))
        for method in ("mmse", "minmax", "percentile")
        for shifted in (False, True)
    )
    assert sqnr_db(values, choose_soft_edge(observer, "soft-edge8")) >= single + 3.0
    # Three fixed scales have twice as many codes.
    assert sqnr_db(values, choose_soft_edge(observer, "soft-edge")) >= single + 3.0


@pytest.mark.parametrize("data", ["student", "laplace", "silu"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_every_code_of_a_calibrated_layout_is_a_value_of_its_own(
    name: ActivationFormat, data: str
) -> None:
    layout = layout_of(choose_soft_edge(observe(heavy(data)), name))
    codes = np.arange(2 ** CALIBRATED[name])
    assert (layout.code_min, layout.code_max, layout.dtype) == (0, codes[-1], "uint8")
    assert layout.activation.format == name
    values = layout.decode(codes)
    assert (np.diff(values.astype(int)) > 0).all()
    np.testing.assert_array_equal(layout.encode(values, 1.0), codes)
    assert max(len(layout.positive), len(layout.negative)) <= 3
    # Rounding is to the nearest: brute force over all values, halves of steps included.
    x = np.arange(2 * int(values[0]) - 5, 2 * int(values[-1]) + 6, 1) / 2.0
    distances = np.abs(x[:, None] - values.astype(np.float64)).min(axis=1)
    np.testing.assert_array_equal(np.abs(x - layout.decode(layout.encode(x, 1.0))), distances)


@profile(25)
@given(
    st.sampled_from(sorted(CALIBRATED)),
    st.integers(0, 2**32 - 1),
    st.floats(-3, 3),
    st.sampled_from([0.0, 1.0, 2.5, 6.0]),
    st.sampled_from(["mmse", "minmax"]),
)
def test_never_worse_than_a_single_step(
    name: ActivationFormat, seed: int, middle: float, power: float, method: Any
) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(3000)
    observer = observe((middle + np.sign(x) * np.abs(x) ** power).astype(np.float32))
    found = expected_sqnr_db(observer, choose_soft_edge(observer, name, method=method))
    for shifted in (False, True):
        single = choose_quantization(observer, CALIBRATED[name], method=method, asymmetric=shifted)
        if method == "minmax" and not shifted and CALIBRATED[name] < 8:
            continue  # a signed range of few codes reaches further down than the values
        assert found >= expected_sqnr_db(observer, single) - 1e-9


@pytest.mark.parametrize("name", [*CALIBRATED, "soft-edge"])
@pytest.mark.parametrize("data", ["student", "laplace", "silu"])
def test_expected_sqnr_is_that_of_the_values(name: ActivationFormat, data: str) -> None:
    values = heavy(data, 16384)
    observer = observe(values)
    chosen = choose_soft_edge(observer, name)
    assert expected_sqnr_db(observer, chosen) == pytest.approx(sqnr_db(values, chosen), abs=0.3)


def test_what_a_quantization_says_about_itself() -> None:
    observer = observe(heavy("silu"))
    chosen = choose_soft_edge(observer, "soft-edge6", method="minmax")
    layout = layout_of(chosen)
    assert str(chosen) == "soft-edge6"
    assert (chosen.code_min, chosen.code_max) == (layout.value_min, layout.value_max)
    assert (chosen.bits, chosen.signed, chosen.zero_point) == (16, True, 0)
    assert chosen.clip == (layout.value_min * chosen.scale, layout.value_max * chosen.scale)
    assert chosen.scale == np.float32(chosen.scale)


@pytest.mark.parametrize("data", ["student", "laplace", "silu"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_ranges_that_are_given_are_covered(name: ActivationFormat, data: str) -> None:
    values = heavy(data)
    observer = observe(values)
    peak, kept = float(np.abs(values).max()), float(np.percentile(np.abs(values), 99.0))
    for method, end in (("minmax", peak), ("percentile", kept)):
        chosen = choose_soft_edge(observer, name, method=method, percentile=99.0)  # type: ignore[arg-type]
        layout = layout_of(chosen)
        for reach, outermost, most in (
            (chosen.clip[1], layout.positive[-1], min(end, float(values.max()))),
            (-chosen.clip[0], layout.negative[-1], min(end, -float(values.min()))),
        ):
            step = chosen.scale * 2**outermost.shift
            beyond = 1 if method == "minmax" else 395 / 127  # as far as the three scales
            assert most * 0.99 - step / 2 <= reach <= most * beyond * 1.01 + step


@pytest.mark.parametrize("percent", [99.0, 99.9])
@pytest.mark.parametrize("data", ["student", "laplace", "silu"])
def test_edges_are_soft_at_aggressive_percentiles(data: str, percent: float) -> None:
    values = heavy(data)
    observer = observe(values)
    options: Any = {"method": "percentile", "percentile": percent}
    hard = sqnr_db(values, choose_quantization(observer, 8, **options))
    assert sqnr_db(values, choose_soft_edge(observer, "soft-edge8", **options)) > hard + 3.0
    assert sqnr_db(values, choose_soft_edge(observer, "soft-edge", **options)) > hard + 3.0


def test_the_scale_of_three_scales() -> None:
    values = heavy("student")
    observer = observe(values)
    peak = float(np.abs(values).max())
    chosen = choose_soft_edge(observer, "soft-edge", method="minmax")
    assert chosen.layout == QUAMBA_SE
    assert 4 * chosen.scale == pytest.approx(peak / 127, rel=1e-6)
    chosen = choose_soft_edge(observer, "soft-edge", method="percentile", percentile=99.0)
    kept = float(np.percentile(np.abs(values), 99.0))
    assert 4 * chosen.scale == pytest.approx(kept / 127, rel=1e-2)
    best = expected_sqnr_db(observer, choose_soft_edge(observer, "soft-edge"))
    for part in np.geomspace(1 / 40, 1, 30):  # brute force
        other = TensorQuantization.soft_edge(QUAMBA_SE, float(np.float32(part * peak / 127 / 4)))
        assert best >= expected_sqnr_db(observer, other) - 0.1


@pytest.mark.parametrize("name", [*CALIBRATED, "soft-edge"])
@pytest.mark.parametrize("method", ["mmse", "percentile", "minmax"])
@pytest.mark.parametrize(
    "values",
    [
        np.zeros(10),
        np.full(1000, 5.0),
        np.full(1000, -5.0),
        np.array([0.0, 1.0] * 50),
        np.abs(np.random.default_rng(0).standard_normal(1000)),
        -np.abs(np.random.default_rng(0).standard_normal(1000)),
        np.random.default_rng(0).standard_normal(1000) * 1e-30,
        np.random.default_rng(0).standard_normal(1000) * 1e30,
        np.append(np.zeros(999), 1e6),
    ],
    ids=["zeros", "five", "minus", "two", "positive", "negative", "tiny", "huge", "outlier"],
)
def test_odd_tensors(values: Any, method: Any, name: ActivationFormat) -> None:
    values = values.astype(np.float32)
    chosen = choose_soft_edge(observe(values), name, method=method)
    layout = layout_of(chosen)
    assert chosen.scale > 0
    if name in CALIBRATED:
        assert layout.code_max == 2 ** CALIBRATED[name] - 1
        if values.min() >= 0:
            assert layout.value_min == 0
        if values.max() <= 0 and values.min() < 0 and method != "percentile":
            assert layout.value_max <= -layout.value_min
    if values.any() and np.abs(values).max() > 1e-10 and method != "percentile":
        assert sqnr_db(values, chosen) > 10.0


def test_an_observer_that_saw_nothing() -> None:
    assert layout_of(choose_soft_edge(Observer(), "soft-edge8")) == single_step(8, 0)
    assert layout_of(choose_soft_edge(Observer(), "soft-edge")) == QUAMBA_SE


def test_options_are_checked() -> None:
    observer = observe(heavy("laplace"))
    with pytest.raises(UsageError, match="clip method"):
        choose_soft_edge(observer, "soft-edge8", method="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="percentile 0"):
        choose_activation(observer, Activation(8, "soft-edge"), method="percentile", percentile=0)
    plain = choose_activation(observer, Activation(4), asymmetric=True)
    assert plain == choose_quantization(observer, 4, asymmetric=True)


# -- models --------------------------------------------------------------------------------------


def network(folder: Path) -> tuple[Path, dict[str, Floats]]:
    """Convolutions with a residual sum, and calibration data with outliers."""
    path = folder / "net.onnx"
    onnx.save(residual_network(np.random.default_rng(3), batch_norm=True).model("fc_out"), path)
    x = np.random.default_rng(0).standard_t(3, (12, 3, 16, 16)).astype(np.float32)
    return path, {"x": x}


@pytest.mark.parametrize("clip", ["mmse", "percentile", "minmax"])
@pytest.mark.parametrize("precision", ["w8a8se", "w8a8se8", "w4a8se6", "w8a4se4"])
def test_models_run_in_onnxruntime_and_in_integers(
    precision: str, clip: Any, tmp_path: Path
) -> None:
    path, data = network(tmp_path)
    options = {"clip": clip, "per_channel": clip != "minmax"}
    found = bitwright.quantize(path, calibration=data, precision=precision, **options)
    onnx.checker.check_model(found.model, full_check=True)
    assert sorted(f.name for f in found.model.functions) == ["SoftEdgeDecode", "SoftEdgeEncode"]
    assert found.float_operators == ()
    loaded = load(found.model)
    precisions = [quantized_precision(node) for node in layer_nodes(loaded).values()]
    assert {str(entry) for entry in precisions} == {precision}
    regions = compare_codes(loaded, Samples(data, loaded.inputs))
    assert len(regions) >= len(precisions)
    for region in regions:  # accumulators that float32 rounds at a tie differ by a code
        assert region.differing <= 3 + 1e-3 * region.codes, region
        assert region.largest_difference <= 1
    kinds = {region.kind for region in regions}
    assert kinds >= {"layer", "quantize"}


def test_soft_edge_keeps_more_of_a_network_than_integers(tmp_path: Path) -> None:
    path, data = network(tmp_path)
    expected = run_onnxruntime(onnx.load(path), data)[0]

    def error(precision: str) -> float:
        model = bitwright.quantize(path, calibration=data, precision=precision).model
        found = run_onnxruntime(model, data)[0]
        return float(np.square(found - expected).sum() / np.square(expected).sum())

    plain = error("w8a8")
    assert error("w8a8se8") < plain
    assert error("w8a8se") < plain


def two_readers() -> Builder:
    builder = Builder(opset=21)
    x = builder.input("x", ["N", 8])
    generator = np.random.default_rng(1)
    for name in ("a", "b"):
        weights = builder.constant(generator.standard_normal((8, 4)).astype(np.float32))
        builder.node("MatMul", x, weights, name=name)
    return builder


def test_a_tensor_may_be_read_in_two_formats(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    onnx.save(two_readers().model("a_out", "b_out"), path)
    x = np.random.default_rng(2).standard_t(3, (200, 8)).astype(np.float32)
    plan = PrecisionPlan({"a": Precision.parse("w8a8"), "b": Precision.parse("w8a8se8")})
    found = bitwright.quantize(path, calibration={"x": x}, plan=plan)
    loaded = load(found.model)
    nodes = layer_nodes(loaded)
    assert [str(quantized_precision(nodes[name])) for name in ("a", "b")] == ["w8a8", "w8a8se8"]
    kinds = [node.op_type for node in loaded.graph if node.op_type[:4] in ("Quan", "Soft")]
    assert sorted(kinds) == ["QuantizeLinear", "SoftEdgeDecode", "SoftEdgeEncode"]
    assert [str(layer.activation.quantization) for layer in found.layers] == ["int8", "soft-edge8"]
    document = found.to_dict()["layers"]
    assert document[0]["activation"]["layout"] is None
    assert SoftEdge.parse(document[1]["activation"]["layout"]).bits == 8


def test_layers_compute_on_whole_steps_in_integers(tmp_path: Path) -> None:
    """By hand: codes to steps, steps times weights in int64, one scale behind."""
    path = tmp_path / "two.onnx"
    onnx.save(two_readers().model("a_out", "b_out"), path)
    x = np.random.default_rng(2).standard_t(3, (50, 8)).astype(np.float32)
    found = bitwright.quantize(path, calibration={"x": x}, precision="w8a8se", clip="minmax")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in found.model.graph.initializer}
    chosen = found.layers[0].activation.quantization
    steps = layout_of(chosen).decode(QUAMBA_SE.encode(x, chosen.scale)).astype(np.int64)
    sums = steps @ tensors["a.weight_codes"].astype(np.int64)
    scale = np.float32(chosen.scale) * tensors["a.weight_codes_scale"]
    loaded = load(found.model)
    outputs, codes = Reference(loaded).run({"x": x})
    np.testing.assert_array_equal(outputs["a_out"], sums.astype(np.float32) * scale)
    (name,) = codes
    np.testing.assert_array_equal(codes[name], QUAMBA_SE.encode(x, chosen.scale))


def test_accumulators_have_room_for_decoded_values(tmp_path: Path) -> None:
    """512 products of 127 and 1,580 exceed 2^26; 32,767 of them 2^31."""
    for count, bits in ((512, 32), (32767, 64)):
        builder = Builder(opset=21)
        x = builder.input("x", ["N", count])
        weights = builder.constant(np.ones((count, 1), np.float32))
        y = builder.node("MatMul", x, weights, name="sum")
        z = builder.node("MatMul", y, builder.constant(np.ones((1, 1), np.float32)), name="next")
        path = tmp_path / f"{count}.onnx"
        onnx.save(builder.model(z), path)
        data = {"x": np.random.default_rng(0).standard_normal((4, count)).astype(np.float32)}
        found = bitwright.quantize(path, calibration=data, precision="w8a8se", clip="minmax")
        loaded = load(found.model)
        reference = Reference(loaded)
        reference.run(data)
        (region,) = [r for r in reference.regions.values() if r.name == "sum"]
        assert region.accumulator_bits == bits
        assert math.log2(count * 127 * QUAMBA_SE.value_max) < bits - 1
