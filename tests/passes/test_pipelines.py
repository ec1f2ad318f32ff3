"""The passes among TVM's own, on modules of bitwright's importer and of TVM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from tvm import relax

from bitwright.importer import import_model
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.pack_weights import PARAMETER_NAMES, PackWeights
from bitwright.passes.partition_for_target import PartitionForTarget
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.quant.load import load
from bitwright.quant.reference import Reference
from tests.passes.modules import (
    assert_same,
    calls,
    imported_by_tvm,
    layers,
    operators,
    run,
    transform,
)
from tests.quant.qdq import Array, Builder

CANONICAL = relax.transform.CanonicalizeBindings
DEAD = relax.transform.DeadCodeElimination
COMMON = relax.transform.EliminateCommonSubexpr
FOLD = relax.transform.FoldConstant
LEGAL = relax.transform.LegalizeOps


class Reader(CalibrationDataReader):  # type: ignore[misc]  # ships no types
    def __init__(self, x: Array) -> None:
        self._batches = iter([{"x": x}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def normal(samples: int, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 1, (samples, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A small network that onnxruntime quantizes: int8, one scale a channel."""
    generator = np.random.default_rng(3)
    builder = Builder(opset=21)

    def weights(*shape: int) -> str:
        return builder.constant(generator.normal(0, 0.3, shape).astype(np.float32))

    x = builder.input("x", [4, 3, 8, 8])
    x = builder.node("Relu", builder.node("Conv", x, weights(6, 3, 3, 3), weights(6), name="conv"))
    x = builder.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    branch = builder.node("Conv", x, weights(6, 6, 1, 1), weights(6), name="point")
    x = builder.node("Flatten", builder.node("Add", x, branch, name="sum"))
    builder.node("Gemm", x, weights(54, 5), weights(5), name="fc")
    folder = tmp_path_factory.mktemp("model")
    onnx.save(builder.model("fc_out"), folder / "model.onnx")
    quantize_static(
        folder / "model.onnx",
        folder / "quantized.onnx",
        Reader(normal(4)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    return onnx.load(folder / "quantized.onnx")


def by_bitwright(model: onnx.ModelProto) -> Any:
    return import_model(load(model))


def by_tvm(model: onnx.ModelProto) -> Any:
    return imported_by_tvm(model, {"x": (4, 3, 8, 8)})


IMPORTERS = {"bitwright": by_bitwright, "tvm": by_tvm}


def reference(model: onnx.ModelProto, x: Array) -> Array:
    return Reference(load(model)).run({"x": x})[0][model.graph.output[0].name]


PIPELINES: dict[str, list[Any]] = {
    "alone": [PropagateQuantization(), LowerToInteger()],
    "partitioned": [PropagateQuantization(), PartitionForTarget(), LowerToInteger()],
    "legalized at once": [
        PropagateQuantization(),
        PartitionForTarget(),
        LowerToInteger(),
        LEGAL(),
    ],
    "cleaned between": [
        CANONICAL(),
        DEAD(),
        PropagateQuantization(),
        CANONICAL(),
        COMMON(),
        PartitionForTarget(),
        DEAD(),
        LowerToInteger(),
        CANONICAL(),
        COMMON(),
        DEAD(),
    ],
    "folded behind": [PropagateQuantization(), LowerToInteger(), FOLD(), CANONICAL(), LEGAL()],
    "folded behind partitions": [
        PropagateQuantization(),
        PartitionForTarget(),
        LowerToInteger(),
        FOLD(),
    ],
    "each twice": [
        PropagateQuantization(),
        PropagateQuantization(),
        PartitionForTarget(),
        PartitionForTarget(),
        LowerToInteger(),
        LowerToInteger(),
    ],
}


@pytest.mark.parametrize("importer", IMPORTERS)
@pytest.mark.parametrize("name", PIPELINES)
def test_bits_are_the_same_in_any_pipeline(
    model: onnx.ModelProto, importer: str, name: str
) -> None:
    module = transform(IMPORTERS[importer](model), *PIPELINES[name])
    x = normal(4, seed=1)
    np.testing.assert_array_equal(run(module, x)[0], reference(model, x))


@pytest.mark.parametrize("importer", IMPORTERS)
def test_packed_modules_need_no_code_generation(model: onnx.ModelProto, importer: str) -> None:
    steps = PropagateQuantization(), PartitionForTarget(), LowerToInteger()
    module = transform(IMPORTERS[importer](model), *steps, PackWeights(kernels=False))
    attrs = module["main"].attrs
    packed = [tensor.numpy() for tensor in attrs["params"]]
    assert len(packed) == len(attrs[PARAMETER_NAMES])
    x = normal(4, seed=1)
    np.testing.assert_array_equal(run(module, x, *packed)[0], reference(model, x))


@pytest.mark.parametrize("importer", IMPORTERS)
def test_every_pass_alone_keeps_the_results(model: onnx.ModelProto, importer: str) -> None:
    module = IMPORTERS[importer](model)
    x = normal(4, seed=1)
    expected = run(module, x)[0]
    for step in (PropagateQuantization(), PartitionForTarget()):
        np.testing.assert_array_equal(run(transform(module, step), x)[0], expected)
    # Integers round once where floats round several times: the last code may differ.
    found = run(transform(module, LowerToInteger()), x)[0]
    np.testing.assert_allclose(found, expected, atol=0.3)


@pytest.mark.parametrize("importer", IMPORTERS)
@pytest.mark.parametrize(
    "step", [PropagateQuantization, PartitionForTarget, LowerToInteger, PackWeights]
)
def test_a_second_time_changes_nothing(model: onnx.ModelProto, importer: str, step: Any) -> None:
    module = transform(IMPORTERS[importer](model), PropagateQuantization())
    if step in (LowerToInteger, PackWeights):
        module = transform(module, PartitionForTarget(), LowerToInteger())
    once = transform(module, step())
    assert_same(transform(once, step()), once)


def test_the_given_module_stays_as_it_was(model: onnx.ModelProto) -> None:
    module = by_bitwright(model)
    kept = by_bitwright(model)
    transform(module, *PIPELINES["partitioned"], PackWeights())
    tvm.ir.assert_structural_equal(module, kept)


def test_layers_keep_the_names_of_their_nodes(model: onnx.ModelProto) -> None:
    module = transform(by_bitwright(model), *PIPELINES["cleaned between"], PackWeights())
    assert set(layers(module)) == {"conv", "point", "fc"}
    for name, layer in layers(module).items():
        (product,) = [
            node for node, operator in calls(layer) if operator in ("nn.conv2d", "matmul")
        ]
        assert product == name
    assert {"conv", "point", "fc"} <= {node for node, operator in calls(module["main"])}


def test_nothing_but_the_border_is_quantized(model: onnx.ModelProto) -> None:
    """What stays of the quantizers: the input's, and the output's dequantizer."""
    for importer in IMPORTERS.values():
        module = transform(importer(model), *PIPELINES["partitioned"])
        found = operators(module["main"])
        assert (found.count("quantize"), found.count("dequantize")) == (1, 1)
        inside = [name for layer in layers(module).values() for name in operators(layer)]
        assert {"quantize", "dequantize", "nn.relu"}.isdisjoint(inside)


def test_a_text_of_a_module_is_for_reading_only(model: onnx.ModelProto, tmp_path: Path) -> None:
    module = transform(by_bitwright(model), *PIPELINES["partitioned"])
    path = tmp_path / "module.txt"
    path.write_text(module.script(show_meta=False))
    assert path.read_text().count("bitwright.requantize") >= 4
