"""The choice of form and percentile, on a small Mamba block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bitwright
from bitwright.errors import ModelError, UsageError
from bitwright.quant import forms as module
from bitwright.quant.forms import FormChoices
from bitwright.quant.observers import Observer
from bitwright.quant.soft_edge import choose_activation
from bitwright.vocabulary import Activation, PrecisionPlan
from tests.quant.mamba import mamba, samples
from tests.quant.qdq import Array, Builder, quantize
from tests.quant.test_recipes import error_db, run

PERCENTILES = (99.0, 100.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms") / "float.onnx"
    onnx.save(mamba(both_ways=True), path)
    return path


@pytest.fixture(scope="module")
def found(path: Path) -> FormChoices:
    return bitwright.choose_forms(
        path, calibration=samples(), recipe="quamba", percentiles=PERCENTILES, samples=6
    )


def test_every_tensor_that_is_read_quantized(found: FormChoices) -> None:
    readers = {entry.name: entry.readers for entry in found.tensors}
    assert readers == {
        "z": ("in_proj",),
        "t3": ("conv",),
        "u": ("x_proj", "loop", "back"),
        "r": ("dt_proj",),
        "B": ("loop", "back"),
        "C": ("loop", "back"),
        "dt": ("loop", "back"),
        "db": ("Softplus_dt",),
        "yg": ("out_proj",),
    }
    assert found.samples == 6


def test_each_has_what_is_best_for_some(found: FormChoices) -> None:
    """Together they are no worse than any single choice for all."""
    assert found.sqnr_db >= max(found.uniform_db.values())
    for entry in found.tensors:
        if entry.form is None:  # dt is quantized, or what its softplus reads
            assert entry.name in ("dt", "db")
            continue
        assert (entry.form, entry.percentile) in entry.alone_db
        # All others quantized too, there is more noise.
        assert max(entry.alone_db.values()) > found.sqnr_db


def test_the_plan_is_what_was_chosen(found: FormChoices, path: Path) -> None:
    chosen = {entry.name: entry for entry in found.tensors if entry.form is not None}
    plan = PrecisionPlan.from_json(found.plan.to_json())
    assert plan.percentiles == {name: entry.percentile for name, entry in chosen.items()}
    assert plan.scan_inputs == {name: chosen[name].form for name in ("u", "dt", "B", "C")}
    for entry in found.tensors:
        for layer in entry.readers:
            if layer in plan.layers:
                assert plan.layers[layer].activation == entry.form
                assert plan.layers[layer].weight_bits == 8
    result = bitwright.quantize(path, calibration=samples(), recipe="quamba", plan=plan)
    plain = bitwright.quantize(path, calibration=samples(), recipe="quamba")
    model = mamba(both_ways=True)
    assert error_db(result.model, model, 0) > error_db(plain.model, model, 0)
    assert result.plan == plan
    json.dumps(found.to_dict(), allow_nan=False)


def test_noise_is_that_of_the_quantized_model(path: Path) -> None:
    """With weights of 16 bits, the QDQ model has the noise that was measured."""
    layers = ("in_proj", "conv", "x_proj", "dt_proj", "out_proj")
    data = samples()
    found = bitwright.choose_forms(
        path, calibration=data, recipe="quamba", precision="w16a8", forms="a8", percentiles="100",
        samples=len(data["x"]),
    )  # fmt: skip
    assert {str(found.plan.layers[name]) for name in layers} == {"w16a8"}
    assert list(found.uniform_db) == [(Activation(8), 100.0)]
    assert found.sqnr_db == pytest.approx(found.uniform_db[Activation(8), 100.0])
    result = bitwright.quantize(path, calibration=data, recipe="quamba", plan=found.plan)
    measured = error_db(result.model, mamba(both_ways=True), 0)
    assert measured == pytest.approx(found.sqnr_db, abs=1.0)


@pytest.mark.parametrize("form", ["a8", "a4", "a8se", "a8se8", "a8se6", "a4se4"])
@pytest.mark.parametrize("positive", [False, True])
def test_arrays_are_quantized_as_the_codes_say(form: str, positive: bool) -> None:
    random = np.random.default_rng(7)
    x = random.standard_t(3, 20_000).astype(np.float32)
    x = np.maximum(x, np.float32(-0.27)) if positive else x
    observer = Observer(exact=True)
    observer.update(x)
    quantization = choose_activation(
        observer, Activation.parse(form), method="percentile", percentile=99.0
    )
    found = module._quantizer(quantization)(x)
    layout = quantization.layout
    if layout is None:
        codes = quantize(x, quantization) - quantization.zero_point
    else:
        codes = layout.decode(layout.encode(x, quantization.scale)).astype(np.int64)
    expected = codes.astype(np.float32) * np.float32(quantization.scale)
    assert np.mean(found != expected) < 5e-4  # ties of negative values alone


def test_a_model_without_scans(tmp_path: Path) -> None:
    build = Builder()
    random = np.random.default_rng(1)
    x = build.input("x", ["n", 6])
    first = build.constant(random.normal(size=(6, 16)).astype(np.float32))
    second = build.constant(random.normal(size=(16, 3)).astype(np.float32))
    hidden = build.node("Relu", build.node("MatMul", x, first, name="one"))
    path = tmp_path / "net.onnx"
    onnx.save(build.model(build.node("MatMul", hidden, second, name="two")), path)
    data = {"x": random.standard_t(2, (40, 6)).astype(np.float32)}
    target = tmp_path / "plan.json"
    found = bitwright.choose_forms(path, calibration=data, precision="w8a8", output=target)
    assert [entry.readers for entry in found.tensors] == [("one",), ("two",)]
    result = bitwright.quantize(path, calibration=data, plan=target)
    assert result.plan.layers == found.plan.layers


@pytest.mark.parametrize(
    "options",
    [{"forms": []}, {"percentiles": []}, {"percentiles": "0"}, {"percentiles": "x"},
     {"percentiles": [100.5]}, {"samples": 0}],
)  # fmt: skip
def test_nothing_to_choose_from(path: Path, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        bitwright.choose_forms(path, calibration=samples(), recipe="quamba", **options)  # type: ignore[arg-type]  # some are wrong


def test_a_model_without_a_float_output(tmp_path: Path) -> None:
    build = Builder()
    x = build.input("x", ["n", 6])
    weights = build.constant(np.ones((6, 3), np.float32))
    scores = build.node("MatMul", x, weights, name="one")
    best = build.node("ArgMax", scores, axis=1)
    model = build.model(best)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    data = {"x": np.ones((4, 6), np.float32)}
    with pytest.raises(ModelError, match=f"no output is of floats.*{best}") as caught:
        bitwright.choose_forms(path, calibration=data, precision="w8a8")
    assert "ArgMax" in str(caught.value)


def with_dt_bias(model: onnx.ModelProto, bias: Array) -> onnx.ModelProto:
    (old,) = (entry for entry in model.graph.initializer if entry.name == "b_dt")
    old.CopyFrom(numpy_helper.from_array(bias.astype(np.float32), "b_dt"))
    return model


@pytest.mark.parametrize(
    "bias, better",
    [
        # Time steps from 1e-4 to 1: one step for all is coarser than most of them.
        (np.linspace(-9.0, 0.5, 8), "db"),
        # Far below 0 a softplus is 0, but what it reads there takes the range.
        (np.array([-900.0, 0.3, 0.1, -0.2, -700.0, 0.0, 0.4, -0.1]), "dt"),
    ],
)
def test_one_of_dt_and_what_its_softplus_reads_is_quantized(
    tmp_path: Path, bias: Array, better: str
) -> None:
    path, data = tmp_path / "mamba.onnx", samples()
    model = with_dt_bias(mamba(both_ways=True), bias)
    onnx.save(model, path)
    found = bitwright.choose_forms(
        path, calibration=data, recipe="quamba", forms="a8", percentiles="100",
        samples=len(data["x"]),
    )  # fmt: skip
    other = {"dt": "db", "db": "dt"}[better]
    assert found.plan.scan_inputs == dict.fromkeys(("u", "B", "C", better), Activation(8))
    assert {"dt", "db"} & set(found.plan.percentiles) == {better}
    tensors = {entry.name: entry for entry in found.tensors}
    assert (tensors[other].form, tensors[other].percentile) == (None, None)
    alone = {name: max(tensors[name].alone_db.values()) for name in (better, other)}
    assert alone[better] > alone[other] + 1.0

    def swap(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {other if name == better else name: entry for name, entry in entries.items()}

    swapped = replace(
        found.plan,
        scan_inputs=swap(found.plan.scan_inputs),
        percentiles=swap(found.plan.percentiles),
    )
    results = [
        error_db(
            bitwright.quantize(path, calibration=data, recipe="quamba", plan=plan).model, model, 0
        )
        for plan in (found.plan, swapped)
    ]
    assert results[0] == pytest.approx(found.sqnr_db, abs=2.0)  # weights have 8 bits
    assert results[0] > results[1]


@pytest.mark.parametrize("name", ["db", "dt"])
def test_time_steps_that_are_constant_and_others_that_layers_read(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "mamba.onnx"
    model = mamba()
    steps = np.random.default_rng(0).normal(-1.0, 1.0, (20, 8)).astype(np.float32)
    replaced = {"dm", "db"} if name == "db" else {"dm", "db", "dt"}
    kept = [node for node in model.graph.node if node.output[0] not in replaced]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.append(numpy_helper.from_array(np.logaddexp(0, steps), name))
    onnx.save(model, path)
    found = bitwright.choose_forms(
        path, calibration=samples(), recipe="quamba", forms="a8", percentiles="100", samples=2
    )
    assert {"u", "B", "C"} <= set(found.plan.scan_inputs) <= {"u", "B", "C", "dt"}
    assert name not in {entry.name for entry in found.tensors}

    read = mamba()
    read.graph.initializer.append(numpy_helper.from_array(np.eye(8, dtype=np.float32), "more_w"))
    read.graph.node.append(onnx.helper.make_node("MatMul", [name, "more_w"], ["more"], "more"))
    read.graph.output.append(onnx.ValueInfoProto(name="more"))
    onnx.save(onnx.shape_inference.infer_shapes(read), path)
    found = bitwright.choose_forms(
        path, calibration=samples(), recipe="quamba", forms="a8se8", percentiles="99.9", samples=2
    )
    assert str(found.plan.layers["more"]) == "w8a8se8"
    assert found.plan.percentiles[name] == 99.9
    assert set(found.plan.scan_inputs) == {"u", "B", "C", "dt"}


def test_a_residual_addition_is_not_cut(tmp_path: Path) -> None:
    """What reads a tensor at its elementwise bits sees all of it, as in the search."""
    build = Builder()
    random = np.random.default_rng(3)
    x = build.input("x", ["n", 12])
    shapes = ((12, 12), (12, 12), (12, 12), (12, 4))
    one, two, three, last = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    one[:, 0] *= 20  # a channel far out, which the second layer does not look at
    two[0] = 0.0
    three[:, 0] = -0.95 * one[:, 0]  # and which hardly anything is left of in the sum

    def layer(value: str, weights: Array, name: str) -> str:
        return build.node("MatMul", value, build.constant(weights), name=name)

    hidden = layer(x, one, "one")
    total = build.node("Add", hidden, layer(x, three, "three"), name="first")
    total = build.node("Add", total, layer(hidden, two, "two"), name="second")
    model = build.model(layer(total, last, "last"))
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    data = {"x": random.uniform(-1.0, 1.0, (200, 12)).astype(np.float32)}
    found = bitwright.choose_forms(
        path, calibration=data, precision="w16a8", forms="a8", percentiles="97", samples=200
    )
    result = bitwright.quantize(path, calibration=data, plan=found.plan)
    (expected,), (noisy,) = (run(entry, data["x"]) for entry in (model, result.model))
    noise = float(np.square(noisy - expected).sum())
    measured = 10 * np.log10(float(np.square(expected).sum()) / noise)
    assert measured == pytest.approx(found.sqnr_db, abs=1.0)
