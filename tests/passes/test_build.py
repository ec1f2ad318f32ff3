"""Passes and compilation together: reports, dumps, what is refused, and what TVM fails at."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm

from bitwright import targets
from bitwright.errors import PlanError, RunError, UsageError
from bitwright.importer import import_model
from bitwright.passes.build import Built, build
from bitwright.passes.registry import DEFAULT, Pipeline, parse
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from tests.passes.regions import execute
from tests.quant.qdq import Builder

INPUT = TensorQuantization(0.05, 3, 8, signed=True)
NARROW = TensorQuantization(0.4, 0, 4, signed=True)
DRRA = targets.get("silago/drra")


def network(q: TensorQuantization = INPUT) -> onnx.ModelProto:
    """Convolution and Relu, float Softmax, product; 8-bit weights of 4-bit ones in the second."""
    generator = np.random.default_rng(0)
    builder = Builder()
    data = builder.activation(builder.input("x", ["N", 3, 6, 6]), q)
    weights = builder.weights(generator.integers(-8, 8, (4, 3, 3, 3)), np.float32(0.1), bits=q.bits)
    layer = builder.node("Relu", builder.node("Conv", data, weights, name="conv"))
    flat = builder.node("Flatten", builder.activation(layer, INPUT))
    soft = builder.node("Softmax", flat, axis=-1, name="soft")
    matrix = builder.weights(generator.integers(-128, 128, (64, 5)), np.float32(0.1), bits=8)
    product = builder.node("MatMul", builder.activation(soft, INPUT), matrix, name="fc")
    return builder.model(builder.activation(product, INPUT))


def module(q: TensorQuantization = INPUT) -> Any:
    return import_model(load(network(q)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, Path, list[str]]:
    folder = tmp_path_factory.mktemp("ir")
    steps: list[str] = []
    result = build(module(), DRRA, dump_ir=folder, progress=steps.append)
    return result, folder, steps


def test_layers_are_described_in_order(built: tuple[Built, Path, list[str]]) -> None:
    first, second = built[0].layers
    assert asdict(first) == {
        "name": "conv",
        "operator": "conv2d",
        "weight_bits": 8,
        "activation_bits": 8,
        "accumulator_bits": 32,
        "kernel": True,
        "weight_count": 108,
        "weight_bytes": 108,
        "activation_format": "int",
    }
    assert (second.name, second.operator, second.weight_count) == ("fc", "matmul", 320)


def test_weights_below_a_byte_are_stored_densely() -> None:
    model = network(NARROW)
    result = build(import_model(load(model)), targets.get("bitfusion/eyeriss"))
    conv = result.layers[0]
    assert (conv.weight_bits, conv.activation_bits, conv.weight_bytes) == (4, 4, 54)
    assert result.parameters["conv.weight"].nbytes == 54


def test_host_operators_are_named(built: tuple[Built, Path, list[str]]) -> None:
    (operator,) = built[0].host_operators
    assert (operator.name, operator.operator) == ("soft", "softmax")
    assert operator.reason


def test_every_pass_reports(built: tuple[Built, Path, list[str]]) -> None:
    result, _, steps = built
    reports = {report.name: report for report in result.passes}
    assert list(reports) == list(DEFAULT.options)
    assert steps[: len(reports)] == list(reports)
    assert reports["propagate-quantization"].layers == 0
    assert reports["partition-for-target"].layers == 2
    assert reports["partition-for-target"].quantizers > reports["lower-to-integer"].quantizers > 0
    assert reports["lower-to-integer"].integer_operators > 0
    before = reports["partition-for-target"].float_operators
    assert reports["lower-to-integer"].float_operators < before
    assert reports["lower-to-integer"].parameters == 0
    assert reports["pack-weights"].parameters == len(result.parameters)
    assert all(report.seconds > 0 for report in result.passes)


def test_modules_are_dumped_after_each_pass(built: tuple[Built, Path, list[str]]) -> None:
    folder = built[1]
    names = [f"{index}-{name}.txt" for index, name in enumerate(["import", *DEFAULT.options])]
    assert sorted(path.name for path in folder.iterdir()) == names
    texts = [(folder / name).read_text() for name in names]
    assert "R.quantize" in texts[0]
    assert "R.quantize" in texts[1]
    assert "conv_layer" in texts[2]
    assert "bitwright.requantize" in texts[3]
    assert "bitwright.unpack" in texts[-1]


def test_parameters_are_what_main_takes(built: tuple[Built, Path, list[str]]) -> None:
    result = built[0]
    assert {"conv.weight", "conv.multiplier", "fc.weight", "fc.multiplier"} <= set(
        result.parameters
    )
    assert result.parameters["conv.weight"].dtype == np.uint8
    x = np.random.default_rng(1).normal(0, 2, (3, 3, 6, 6)).astype(np.float32)
    assert execute(result, x)[0].shape == (3, 5)


def test_kernels_of_a_chosen_instruction_set() -> None:
    result = build(module(), DRRA, pipeline=parse("pack-weights=isa:generic"))
    assert result.isa == "generic"
    assert result.target == {"kind": "llvm"}
    assert result.passes[-1].options == {"isa": "generic"}


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match="quantum"):
        build(module(), DRRA, pipeline=parse("pack-weights=isa:quantum"))


def test_precisions_that_the_target_cannot_do_are_refused_by_layer() -> None:
    # The DRRA computes with weights and activations of one width; fc has both.
    mixed = TensorQuantization(0.4, 0, 2, signed=True)
    with pytest.raises(PlanError, match=r"conv \(w2a2\)") as caught:
        build(module(mixed), DRRA)
    assert "fc" not in str(caught.value)
    assert "w8a8" in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_target_of_the_pipeline_is_refused() -> None:
    with pytest.raises(UsageError, match="no/such"):
        build(module(), DRRA, pipeline=parse("partition-for-target=target:no/such"))


def test_some_passes_only() -> None:
    """Without partitioning TVM makes all the code; the integers are the same."""
    plain = build(
        module(),
        DRRA,
        pipeline=Pipeline({name: {} for name in DEFAULT.options if name != "partition-for-target"}),
    )
    assert plain.layers == ()
    x = np.random.default_rng(1).normal(0, 2, (3, 3, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(execute(plain, x)[0], execute(build(module(), DRRA), x)[0])


def test_without_lowering_everything_is_float_and_said_to_be() -> None:
    pipeline = Pipeline({"propagate-quantization": {}, "pack-weights": {}})
    result = build(module(), DRRA, pipeline=pipeline)
    names = {operator.name: operator.reason for operator in result.host_operators}
    assert {"conv", "soft", "fc"} <= set(names)


def test_a_failure_of_tvm_names_the_step() -> None:
    mod = module()
    function = mod["main"]
    broken = tvm.IRModule({"main": function, "other": function.with_attr("Codegen", "nobody")})
    with pytest.raises(RunError, match="code generation") as caught:
        build(broken, DRRA)
    assert caught.value.__cause__ is not None
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["materialize-transfers", "popcount-reorder"])
def test_a_failure_with_transfers_names_a_pass_that_ran(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_module: Any) -> Any:
        raise ValueError("no transfers")

    monkeypatch.setattr("bitwright.passes.build.read_transfers", fails)
    with pytest.raises(RunError, match=f"TVM fails in {name} .*no transfers"):
        build(module(), targets.get("bitfusion/eyeriss"), pipeline=parse(name))


def test_a_module_without_main_is_refused() -> None:
    with pytest.raises(RunError, match="no function main"):
        build(tvm.IRModule(), DRRA)
