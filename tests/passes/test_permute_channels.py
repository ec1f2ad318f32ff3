"""PermuteChannels: the same bits, and weights in an order in which they toggle less."""
# mypy: disable-error-code="valid-type, name-defined, no-untyped-def, untyped-decorator"
# ruff: noqa: N805
# The modules are TVMScript: Python's syntax, but neither its types nor its methods.

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I  # noqa: N812  # TVM's own names in scripts
from tvm.script import relax as R  # noqa: N812

import bitwright
from bitwright.errors import UsageError
from bitwright.importer import import_model
from bitwright.passes.expressions import constant
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.partition_for_target import PartitionForTarget
from bitwright.passes.permute_channels import PERMUTED, PermuteChannels
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.targets.codegen import read_layer
from bitwright.targets.kernels.spec import Convolution, Matmul
from bitwright.targets.link import Link, Traffic, flits, transitions
from bitwright.targets.orders import Order
from tests.passes.modules import assert_same, assert_same_results, layers, named, transform
from tests.quant.qdq import Builder
from tests.targets.test_weight_stream import link

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
WIRES = {
    "one wire": link(lanes=1, window=4, loops=["position", "channel", "chunk"]),
    "rows": link(lanes=4, window=16, loops=["position", "chunk", "channel"], reuse=True),
    "columns": link(lanes=8, window=25, packing="column-major", flit="paired"),
}


def counts(module: Any) -> dict[str, tuple[int, int]]:
    """What the pass says of each layer."""
    found = module.get_attr(PERMUTED)
    return {str(name): (int(before), int(after)) for name, (before, after) in found.items()}


def counted(module: Any, wires: Link, samples: int = 1) -> dict[str, int]:
    """Transitions of the weights of each layer for one sample, by the link's definition."""
    found = {}
    for name, function in layers(module).items():
        layer = read_layer(function)
        weights = None if layer is None else constant(layer.weights)
        if layer is None or weights is None:
            continue
        spec = layer.spec
        if isinstance(spec, Matmul):
            rows = math.prod(size or 1 for size in spec.leading) // samples
            traffic = Traffic.product(name, rows=rows, depth=spec.depth, columns=spec.columns)
            weights = weights.T
        else:
            assert isinstance(spec, Convolution)
            traffic = Traffic.convolution(
                name,
                in_channels=spec.in_channels,
                size=spec.size,
                out_channels=spec.out_channels,
                kernel=spec.kernel,
                strides=spec.strides,
                dilations=spec.dilations,
                pads=spec.pads,
                groups=spec.groups,
            )
        inputs = np.zeros(traffic.taps.max() + traffic.bases.max() + 1, np.uint16)
        words = wires.words(weights.reshape(traffic.channels, traffic.terms))
        sent = flits(traffic, inputs, words, wires, Order(), {})["weights"]
        found[name] = int(transitions(sent, wires.word_bits.value).sum())
    return found


# -- two layers ------------------------------------------------------------------------------------

# Along one wire, 0, -1, 0, -1 toggles every bit each time; 0, 0, -1, -1 once.
ORDER = [0, 2, 1, 3]
FIRST = np.full((4, 2, 1, 1), 1, np.int8)
SECOND = np.array([0, -1, 0, -1], np.int8).reshape(1, 4, 1, 1)
BIAS = np.array([1.0, 2.0, 3.0, 4.0], np.float32).reshape(1, 4, 1, 1)
SCALES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)


def quantize(x: Any, scale: float) -> Any:
    return relax.op.quantize(
        x, relax.const(scale, "float32"), relax.const(0, "int8"), axis=0, out_dtype="int8"
    )


def dequantize(q: Any, scale: Any) -> Any:
    scales = np.array(scale, np.float32)
    zeros = relax.const(np.zeros(scales.shape, np.int8))
    return relax.op.dequantize(q, relax.const(scales), zeros, axis=0)


def chain(order: list[int]) -> Any:
    """Two convolutions with a pool between, their channels in this order; lowered."""
    first, second = FIRST[order], SECOND[:, order]
    bias, scales = BIAS[:, order], SCALES[order]

    @I.ir_module
    class Chain:
        @R.function
        def main(q: R.Tensor((2, 2, 4, 4), "int8")):
            with R.dataflow():
                conv = R.nn.conv2d(dequantize(q, 1.0), dequantize(relax.const(first), scales))
                middle = quantize(R.nn.relu(R.add(conv, relax.const(bias))), 0.5)
                pool = R.nn.max_pool2d(middle, pool_size=[2, 2], strides=[2, 2])
                last = R.nn.conv2d(dequantize(pool, 0.5), dequantize(relax.const(second), 1.0))
                out = quantize(last, 1.0)
                R.output(out)
            return out

    return transform(named(Chain), PartitionForTarget(), LowerToInteger())


def test_producer_and_consumer_are_permuted_together() -> None:
    found = transform(chain([0, 1, 2, 3]), PermuteChannels(WIRES["one wire"]))
    # By hand: 3 changes of 8 bits in each of 4 positions, and 8 back to the first of the next.
    assert counts(found) == {"conv": (0, 0), "last": (4 * 24 + 3 * 8, 4 * 8 + 3 * 8)}
    assert_same(found.without_attr(PERMUTED), chain(ORDER))


def test_a_second_time_changes_nothing() -> None:
    step = PermuteChannels(WIRES["one wire"])
    once = transform(chain([0, 1, 2, 3]), step)
    tvm.ir.assert_structural_equal(transform(once, step), once)


def test_a_good_order_stays() -> None:
    before = chain(ORDER)
    assert_same(
        transform(before, PermuteChannels(WIRES["one wire"])).without_attr(PERMUTED), before
    )


def test_without_layers_nothing_happens() -> None:
    @I.ir_module
    class Floats:
        @R.function
        def main(x: R.Tensor((2, 3), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                R.output(y)
            return y

    tvm.ir.assert_structural_equal(transform(Floats, PermuteChannels()), Floats)


# -- whole models ----------------------------------------------------------------------------------


class Network:
    """A network of random quantized layers."""

    def __init__(self) -> None:
        self.builder = Builder()
        self._generator = np.random.default_rng(11)

    def quantized(self, name: str, scale: float = 0.1) -> str:
        return self.builder.activation(name, TensorQuantization(scale, 3, 8, True))

    def input(self, *shape: int | str) -> str:
        return self.quantized(self.builder.input("x", shape))

    def weights(self, *shape: int, axis: int = 0, bits: int = 8) -> str:
        half = 2 ** (bits - 1)
        spread = self._generator.normal(0, half / 3, shape)
        codes = np.clip(np.rint(spread), -half, half - 1).astype(np.int64)
        scale = self._generator.uniform(0.5, 1, shape[axis]) / 2.0**bits
        return self.builder.weights(codes, scale, bits=bits, axis=axis)

    def bias(self, channels: int) -> str:
        return self.builder.constant(self._generator.normal(0, 1, channels).astype(np.float32))

    def conv(self, x: str, filters: int, channels: int, size: int = 1, **options: Any) -> str:
        weights = self.weights(filters, channels // options.get("group", 1), size, size)
        x = self.builder.node("Conv", x, weights, self.bias(filters), **options)
        return self.quantized(self.builder.node("Relu", x))

    def depthwise(self, x: str, filters: int, channels: int) -> str:
        return self.conv(x, filters, channels, 3, group=channels, pads=[1] * 4)

    def product(self, x: str, depth: int, columns: int) -> str:
        x = self.builder.node("MatMul", x, self.weights(depth, columns, axis=1))
        return self.quantized(self.builder.node("Add", x, self.bias(columns)))

    def node(self, operator: str, *inputs: str, **options: Any) -> str:
        return self.quantized(self.builder.node(operator, *inputs, **options))

    def lowered(self, *outputs: str) -> Any:
        module = import_model(load(self.builder.model(*outputs)))
        return transform(module, PropagateQuantization(), PartitionForTarget(), LowerToInteger())


def plain(net: Network) -> str:
    x = net.conv(net.input(2, 3, 6, 6), 8, 3, 3)
    x = net.builder.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.conv(x, 12, 8)
    x = net.product(net.builder.node("Flatten", x), 12 * 4, 10)
    return net.product(x, 10, 3)


def mobile(net: Network) -> str:
    x = net.conv(net.input(2, 3, 5, 5), 6, 3)
    x = net.depthwise(x, 6, 6)
    x = net.conv(x, 10, 6)
    x = net.depthwise(net.node("HardSwish", x), 20, 10)  # two filters a channel
    x = net.node("AveragePool", net.conv(x, 8, 20), kernel_shape=[2, 2])
    x = net.node("GlobalAveragePool", net.conv(x, 12, 8))
    return net.product(net.builder.node("Flatten", x), 12, 4)


def residual(net: Network) -> str:
    x = net.conv(net.input(2, 3, 5, 5), 8, 3)
    y = net.conv(net.conv(x, 6, 8), 8, 6)
    x = net.node("Add", x, y)
    gate = net.node("Sigmoid", net.conv(net.node("GlobalAveragePool", x), 8, 8))
    x = net.node("Mul", x, gate)  # squeeze and excitation
    return net.conv(x, 3, 8)


def rows(net: Network) -> str:
    x = net.product(net.input(2, 5, 6), 6, 12)
    x = net.product(net.node("Tanh", x), 12, 8)
    x = net.builder.node("Transpose", x, perm=[0, 2, 1])
    x = net.builder.node("Reshape", x, net.builder.constant(np.array([2, 8, 5, 1])))
    x = net.conv(x, 6, 8)
    x = net.builder.node("Transpose", x, perm=[0, 2, 3, 1])
    x = net.builder.node("Reshape", x, net.builder.constant(np.array([2, 30])))
    return net.product(x, 30, 3)


MODELS: dict[str, tuple[Callable[[Network], str], tuple[int, ...]]] = {
    "plain": (plain, (2, 3, 6, 6)),
    "mobile": (mobile, (2, 3, 5, 5)),
    "residual": (residual, (2, 3, 5, 5)),
    "rows": (rows, (2, 5, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_bits_stay_and_weights_toggle_less(name: str) -> None:
    make, shape = MODELS[name]
    net = Network()
    before = net.lowered(make(net))
    for wires in (WIRES["rows"], WIRES["columns"]):
        after = transform(before, PermuteChannels(wires))
        found = counts(after)
        assert set(found) == set(layers(before))  # all of them take part
        first, second = counted(before, wires, 2), counted(after, wires, 2)
        assert found == {layer: (first[layer], second[layer]) for layer in found}
        assert sum(second.values()) < sum(first.values())
    x = np.random.default_rng(5).normal(0, 2, shape).astype(np.float32)
    assert_same_results(before, after, [x])


def drawn(net: Network, seed: int) -> list[str]:
    """Layers and what carries channels between them, joined in any way."""
    generator = np.random.default_rng(seed)
    tensors = [(net.input(2, 3, 6, 6), 3, 6)]
    for _ in range(9):
        x, channels, size = tensors[int(generator.integers(max(0, len(tensors) - 2), len(tensors)))]
        alike = [name for name, *shape in tensors[1:] if shape == [channels, size]]
        kind = int(generator.integers(10))
        filters = int(generator.integers(2, 7))
        if kind <= 2:
            x, channels = net.conv(x, filters, channels, 3, pads=[1] * 4), filters
        elif kind == 3:
            x, channels = net.depthwise(x, 2 * channels, channels), 2 * channels
        elif kind == 4:
            x = net.depthwise(x, channels, channels)
        elif kind == 5 and size > 2:
            pool = "MaxPool" if generator.random() < 0.5 else "AveragePool"
            x, size = net.node(pool, x, kernel_shape=[2, 2]), size - 1
        elif kind == 6:
            pads = net.builder.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1]))
            x, size = net.builder.node("Pad", x, pads), size + 1
        elif kind == 7:
            x = net.node(str(generator.choice(["Sigmoid", "HardSwish", "Relu"])), x)
        elif alike:
            operator = str(generator.choice(["Add", "Sub", "Mul"]))
            x = net.node(operator, x, str(generator.choice(alike)))
        tensors.append((x, channels, size))
    x, channels, size = tensors[-1]
    if generator.random() < 0.5:
        return [net.conv(x, 2, channels)]
    if generator.random() < 0.5:
        x = net.builder.node("Transpose", x, perm=[0, 2, 3, 1])
    shape = net.builder.constant(np.array([2, channels * size * size]))
    return [net.product(net.builder.node("Reshape", x, shape), channels * size * size, 2)]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])
def test_bits_of_any_network_stay(seed: int) -> None:
    net = Network()
    before = net.lowered(*drawn(net, seed))
    after = transform(before, PermuteChannels(WIRES["rows"]))
    found = counts(after).values()
    assert sum(second for _, second in found) < sum(first for first, _ in found)
    x = np.random.default_rng(seed).normal(0, 2, (2, 3, 6, 6)).astype(np.float32)
    assert_same_results(before, after, [x])


def used_again(net: Network) -> list[str]:
    x = net.conv(net.input(2, 3, 4, 4), 6, 3)
    return [net.conv(x, 4, 6), x]


def joined(net: Network) -> list[str]:
    x = net.input(2, 3, 4, 4)
    x = net.builder.node("Concat", net.conv(x, 4, 3), net.conv(x, 4, 3), axis=1)
    return [net.conv(x, 4, 8)]


def grouped(net: Network) -> list[str]:
    x = net.conv(net.input(2, 3, 4, 4), 8, 3)
    return [net.conv(x, 6, 8, group=2)]


def shuffled(net: Network) -> list[str]:
    x = net.conv(net.input(2, 3, 4, 4), 8, 3)
    x = net.builder.node("Reshape", x, net.builder.constant(np.array([2, 2, 4, 4, 4])))
    x = net.builder.node("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = net.builder.node("Reshape", x, net.builder.constant(np.array([2, 8, 4, 4])))
    return [net.conv(x, 4, 8)]


def across(net: Network) -> list[str]:
    x = net.conv(net.input(2, 3, 4, 4), 8, 3)
    return [net.node("ReduceMean", x, net.builder.constant(np.array([1])), keepdims=0)]


def of_a_channel(net: Network) -> list[str]:
    x = net.conv(net.input(2, 3, 4, 4), 8, 3)
    scales = net.builder.constant(np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1))
    return [net.conv(net.node("Mul", x, scales), 4, 8)]


@pytest.mark.parametrize("make", [used_again, joined, grouped, shuffled, across, of_a_channel])
def test_channels_that_others_see_stay(make: Callable[[Network], list[str]]) -> None:
    net = Network()
    before = net.lowered(*make(net))
    after = transform(before, PermuteChannels(WIRES["columns"]))
    assert counts(after) == {}
    assert_same(after.without_attr(PERMUTED), before)


def test_symbolic_batches_are_samples_and_symbolic_rows_stay() -> None:
    def made(*shape: int | str) -> Any:
        net = Network()
        return net.lowered(net.product(net.product(net.input(*shape), 6, 8), 8, 4))

    found = counts(transform(made("N", 5, 6), PermuteChannels(WIRES["rows"])))
    assert found == counts(transform(made(2, 5, 6), PermuteChannels(WIRES["rows"])))
    assert len(found) == 2
    assert transform(made("N", "L", 6), PermuteChannels(WIRES["rows"])).get_attr(PERMUTED) is None


# -- LeNet, options, bad input ---------------------------------------------------------------------


@pytest.mark.parametrize("wires", ["ordering-simulator", "bitfusion/eyeriss"])
def test_weights_of_lenet_toggle_less(wires: str) -> None:
    quantized = bitwright.quantize(
        LENET / "lenet.onnx", precision="w8a8", calibration=LENET / "calibration.npz"
    )
    module = import_model(load(quantized.model))
    steps = PropagateQuantization(), PartitionForTarget("bitfusion/eyeriss"), LowerToInteger()
    before = transform(module, *steps)
    after = transform(before, PermuteChannels(wires))
    named_link = bitwright.targets.get_link(wires)
    found = counts(after)
    assert {name: one for name, (one, _) in found.items()} == counted(before, named_link)
    assert {name: other for name, (_, other) in found.items()} == counted(after, named_link)
    saved = {name: 1 - other / one for name, (one, other) in found.items()}
    assert min(saved["fc2"], saved["fc3"]) > 0.05
    assert min(saved["conv2"], saved["fc1"]) > 0.005
    if wires == "bitfusion/eyeriss":  # the link of the target is what is meant without a name
        tvm.ir.assert_structural_equal(transform(before, PermuteChannels()), after)


def test_an_artefact_has_the_same_outputs_and_tells_what_was_saved(tmp_path: Path) -> None:
    artifacts = [
        bitwright.compile(
            LENET / "lenet.onnx",
            "bitfusion/eyeriss",
            output=tmp_path / str(number),
            precision="w4a8",
            calibration=LENET / "calibration.npz",
            passes=passes,
        )
        for number, passes in enumerate(["", "permute-channels"])
    ]
    with np.load(LENET / "test.npz") as archive:
        images = archive["image"][:50].astype(np.float32)
    first, second = (artifact.run({"image": images})["logits"] for artifact in artifacts)
    assert np.array_equal(first, second)
    told = {entry.name: entry.weight_transitions for entry in artifacts[1].manifest.passes}
    assert list(told["permute-channels"]) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert all(after <= before for before, after in told["permute-channels"].values())
    assert not any(counts for name, counts in told.items() if name != "permute-channels")


def test_a_link_has_to_be_named_or_that_of_a_target() -> None:
    with pytest.raises(UsageError, match="no link") as caught:
        transform(chain(ORDER), PermuteChannels())
    assert "permute-channels" in str(caught.value.fix)
    with pytest.raises(UsageError, match="there is no link 'nothing'"):
        transform(chain(ORDER), PermuteChannels("nothing"))


def test_weights_that_are_wider_than_words_are_refused() -> None:
    net = Network()
    x = net.conv(net.input(2, 3, 4, 4), 6, 3)
    weights = net.weights(4, 6, 1, 1, bits=16)
    module = net.lowered(net.quantized(net.builder.node("Conv", x, weights, name="wide")))
    with pytest.raises(UsageError, match="do not fit 8-bit words") as caught:
        transform(module, PermuteChannels(WIRES["columns"]))
    assert "layer 'wide'" in str(caught.value)
    assert counts(transform(module, PermuteChannels(link(word_bits=16))))
