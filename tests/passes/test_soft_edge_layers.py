"""Layers, tables and links with soft-edge activations: codes equal the integer reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from tvm import relax

from bitwright.errors import PlanError, UsageError
from bitwright.importer import import_model
from bitwright.passes import ops
from bitwright.passes.expressions import calls, is_layer, operator
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.partition_for_target import PartitionForTarget
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.reference import Reference
from bitwright.soft_edge import QUAMBA_SE, SoftEdge
from bitwright.targets.kernels.host import AVX2, detect
from tests.passes.modules import transform
from tests.passes.regions import check, compiled, execute
from tests.passes.soft_edge_layouts import ASYMMETRIC, LAYOUTS, UNSIGNED
from tests.passes.soft_edge_models import made, soft_edge
from tests.quant.qdq import Array, Builder

ISAS = ["avx2", "generic"] if detect() == AVX2 else ["generic"]
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
Q8 = TensorQuantization(0.05, 0, 8, signed=True)


def weights(builder: Builder, *shape: int, seed: int = 0) -> str:
    codes = np.random.default_rng(seed).normal(0, 40, shape).round().clip(-127, 127)
    return builder.weights(codes.astype(np.int64), np.float32(0.01), bits=8)


def heavy(*shape: int, seed: int = 7) -> Array:
    random = np.random.default_rng(seed)
    return np.asarray(random.standard_t(2, shape) * 0.4, np.float32)


def network(layout: SoftEdge) -> onnx.ModelProto:
    """A padded convolution, a product with weights, and a product of two activations."""
    builder = Builder(opset=21)
    x = builder.input("x", ["n", 6, 9])
    x = soft_edge(builder, x, 0.011, layout, "first")
    x = builder.node(
        "Conv", x, weights(builder, 6, 1, 4), name="conv", group=6, pads=[3, 0]
    )  # as in a Mamba
    x = builder.activation(x, Q8)
    x = builder.node("Mul", x, builder.node("Sigmoid", x))
    x = soft_edge(builder, x, 0.013, layout, "second")
    x = builder.node("Transpose", x, perm=[0, 2, 1])
    y = builder.node("MatMul", x, weights(builder, 6, 5, seed=1), name="proj")
    left = builder.activation(y, Q8)
    product = builder.node("MatMul", x, builder.node("Transpose", x, perm=[0, 2, 1]), name="xx")
    last = builder.activation(product, TensorQuantization(0.5, 0, 8, signed=True))
    return made(builder, left, last, shape=["n", None, None])


@LAYOUT
@pytest.mark.parametrize("isa", ISAS)
def test_layers_equal_the_reference(layout: SoftEdge, isa: str) -> None:
    built = check(network(layout), {"x": heavy(3, 6, 9)}, isa=isa)
    assert [layer.name for layer in built.layers] == ["conv", "proj", "xx"]
    assert all(layer.kernel for layer in built.layers)
    conv = built.layers[0]
    form = layout.activation
    assert (conv.activation_bits, conv.activation_format) == (form.bits, form.format)
    product = built.layers[2]
    assert product.weight_bits == 0
    assert (product.activation_bits, product.activation_format) == (form.bits, form.format)
    # Codes of the model's input are made of floats.
    assert [entry.operator for entry in built.host_operators] == ["soft_edge_encode"]


@pytest.mark.parametrize("form", ["int8", "soft-edge"])
@pytest.mark.parametrize("swapped", [False, True])
def test_targets_decode_both_operands_or_none(form: str, swapped: bool) -> None:
    """A product without weights."""
    builder = Builder(opset=21)
    x, y = builder.input("x", ["n", 6]), builder.input("y", [6, 4])
    left = builder.activation(x, Q8) if form == "int8" else soft_edge(builder, x, 0.01, UNSIGNED)
    operands = [left, soft_edge(builder, y, 0.01, QUAMBA_SE)]
    if swapped:
        operands = [builder.node("Transpose", entry) for entry in reversed(operands)]
    last = builder.activation(builder.node("MatMul", *operands, name="xy"), Q8)
    model = made(builder, last, shape=[None, None])
    layer = compiled(model).layers[0]
    assert (layer.weight_bits, layer.activation_bits) == (0, 8)
    assert layer.activation_format == "soft-edge"
    module = transform(import_model(load(model)), PropagateQuantization())
    with pytest.raises(PlanError, match="decodes no soft-edge activations"):
        transform(module, PartitionForTarget("bitfusion/eyeriss"))
    systolic = PartitionForTarget("generic/systolic")  # it decodes two formats of 8 bits
    if form == "int8":
        transform(module, systolic)
    else:
        with pytest.raises(PlanError, match=r"cannot do the precision of .*xy.*w8a4se4"):
            transform(module, systolic)


@LAYOUT
def test_bodies_compile_without_kernels(layout: SoftEdge) -> None:
    model = network(layout)
    feeds = {"x": heavy(2, 6, 9, seed=1)}
    steps = [PropagateQuantization(), PartitionForTarget(), LowerToInteger()]
    module = transform(import_model(load(model)), *steps)
    plain = transform(module, relax.transform.LegalizeOps())
    layers = [function for function in module.functions.values() if is_layer(function)]
    assert len(layers) == 3
    for layer in layers:  # integers from the codes to the codes
        found = [call for call in calls(layer) if operator(call) == ops.SOFT_EDGE_DECODE]
        assert found
        for call in calls(layer)[:-1]:
            assert str(call.ty.dtype).startswith("int")
    executable = tvm.compile(plain, target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    results = [entry.numpy() for entry in machine["main"](tvm.runtime.tensor(feeds["x"]))]
    expected, _ = Reference(load(model)).run(feeds)
    for mine, theirs in zip(results, expected.values(), strict=True):
        assert np.array_equal(mine, theirs)


def test_sums_are_as_wide_as_the_values_of_the_layout() -> None:
    # 600 products of int16 and 127 exceed 31 bits, those of up to 1,580 steps do not.
    for values, bits in ((None, 64), (QUAMBA_SE, 32)):
        builder = Builder(opset=21)
        x: Any = builder.input("x", ["n", 600])
        if values is None:
            x = builder.activation(x, TensorQuantization(0.001, 0, 16, signed=True))
        else:
            x = soft_edge(builder, x, 0.001, values)
        codes = np.full((600, 2), 127)
        y = builder.node("MatMul", x, builder.weights(codes, np.float32(0.01), bits=8), name="wide")
        last = builder.activation(y, Q8)
        built = check(made(builder, last, shape=["n", 2]), {"x": heavy(2, 600)})
        assert [layer.accumulator_bits for layer in built.layers] == [bits]


@LAYOUT
def test_codes_of_functions_of_codes_are_tables(layout: SoftEdge) -> None:
    builder = Builder(opset=21)
    x = builder.activation(builder.input("x", ["n", 64]), Q8)
    x = builder.node("Mul", x, builder.node("Sigmoid", x))
    x = soft_edge(builder, x, 0.013, layout)  # a function of codes of 8 bits
    x = soft_edge(builder, builder.node("Tanh", x), 0.002, layout)  # of soft-edge codes
    x = soft_edge(builder, x, 0.005, layout)  # with another step
    x = builder.activation(builder.node("Relu", x), TensorQuantization(0.01, 0, 8, signed=False))
    model = made(builder, x, shape=["n", 64])
    built = check(model, {"x": heavy(40, 64)})
    assert built.host_operators == ()
    steps = [PropagateQuantization(), PartitionForTarget(), LowerToInteger()]
    module = transform(import_model(load(model)), *steps)
    assert ops.SOFT_EDGE_ENCODE not in [operator(call) for call in calls(module["main"])]


@LAYOUT
def test_codes_of_sums(layout: SoftEdge) -> None:
    builder = Builder(opset=21)
    x = builder.activation(builder.input("x", ["n", 8]), Q8)
    y = builder.node("MatMul", x, weights(builder, 8, 8), name="first")
    y = soft_edge(builder, builder.node("Relu", y), 0.01, layout)
    total = builder.node("Add", x, y)
    last = soft_edge(builder, total, 0.02, layout)
    built = check(made(builder, last, shape=["n", 8]), {"x": heavy(30, 8)})
    assert [layer.name for layer in built.layers] == ["first"]


def test_a_link_sends_the_codes() -> None:
    model = network(ASYMMETRIC)
    passes = "materialize-transfers=link:ordering-simulator,popcount-reorder=key:popcount:on:inputs"
    built = compiled(model, passes=passes)
    assert built.link is not None
    assert [layer.layer for layer in built.link.layers] == ["conv", "proj", "xx"]
    x = heavy(3, 6, 9)
    outputs = execute(built, x)
    found = execute(built, x, entry="main_link")
    for mine, expected in zip(found, outputs, strict=False):
        assert np.array_equal(mine, expected)


def test_codes_of_nine_bits_do_not_fit_bytes() -> None:
    with pytest.raises(UsageError, match="activations have 9 bits, and the link's words 8"):
        compiled(network(QUAMBA_SE), passes="materialize-transfers=link:ordering-simulator")
