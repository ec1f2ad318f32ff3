"""Random graphs of quantized operators, joined in any way that shapes allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from tests.quant.cases import Generator, draw_quantization, flag, one_of, whole
from tests.quant.qdq import BITS, Array, Builder

_MOST_ELEMENTS = 2_000


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph, [3, *shape]."""

    name: str
    shape: tuple[int, int, int]


@dataclass
class Graph:
    """A graph in the making; every method adds an operator, or gives None where none fits."""

    generator: Generator
    builder: Builder = field(default_factory=Builder)
    tensors: list[Tensor] = field(default_factory=list)

    def quantized(self, name: str) -> str:
        """Quantize at any width."""
        scale = float(np.float32(2.0 ** self.generator.uniform(-5, -2)))
        bits = one_of(self.generator, [*BITS, 8, 8])
        return self.builder.activation(name, draw_quantization(self.generator, bits, scale))

    def other(self, wanted: Callable[[Tensor], bool]) -> Tensor:
        """Any tensor of the sort."""
        return one_of(self.generator, [entry for entry in self.tensors if wanted(entry)])

    def weights(self, *shape: int, axis: int) -> str:
        """Weights of any width, with one scale or one a channel."""
        bits = one_of(self.generator, BITS)
        codes = self.generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
        per_channel = flag(self.generator)
        scale = self.generator.uniform(0.5, 1, shape[axis] if per_channel else ()) / 2.0**bits
        return self.builder.weights(codes, scale, bits=bits, axis=axis if per_channel else None)

    def bias(self, *shape: int) -> str:
        """A bias in float."""
        return self.builder.constant(self.generator.normal(0, 1, shape).astype(np.float32))

    # -- operators ---------------------------------------------------------------------------------

    def convolution(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        groups, filters = (
            (channels, channels) if flag(self.generator) else (1, whole(self.generator, 1, 5))
        )
        size = 3 if min(height, width) >= 3 and flag(self.generator) else 1
        weights = self.weights(filters, channels // groups, size, size, axis=0)
        bias = [self.bias(filters)] if flag(self.generator) else []
        options: dict[str, Any] = {"group": groups, "pads": [size // 2] * 4}
        made = self.builder.node("Conv", x.name, weights, *bias, **options)
        return Tensor(made, (filters, height, width))

    def product(self, x: Tensor) -> Tensor:
        columns = whole(self.generator, 1, 5)
        made = self.builder.node("MatMul", x.name, self.weights(x.shape[2], columns, axis=1))
        if flag(self.generator):
            made = self.builder.node("Add", made, self.bias(columns))
        return Tensor(made, (*x.shape[:2], columns))

    def arithmetic(self, x: Tensor) -> Tensor:
        y = self.other(lambda entry: entry.shape == x.shape)
        operator = one_of(self.generator, ["Add", "Sub", "Mul"])
        return Tensor(self.builder.node(operator, x.name, y.name), x.shape)

    def function(self, x: Tensor) -> Tensor:
        operator = one_of(self.generator, ["Sigmoid", "HardSwish", "Tanh", "Relu"])
        return Tensor(self.builder.node(operator, x.name), x.shape)

    def clamp(self, x: Tensor) -> Tensor:
        bounds = (self.builder.constant(np.float32(end)) for end in (-0.7, 1.1))
        return Tensor(self.builder.node("Clip", x.name, *bounds), x.shape)

    def concat(self, x: Tensor) -> Tensor:
        y = self.other(lambda entry: entry.shape[1:] == x.shape[1:])
        made = self.builder.node("Concat", x.name, y.name, axis=1)
        return Tensor(made, (x.shape[0] + y.shape[0], *x.shape[1:]))

    def split(self, x: Tensor) -> Tensor | None:
        channels = x.shape[0]
        if channels < 2:
            return None
        sizes = self.builder.constant(np.array([1, channels - 1]))
        name = f"split_{len(self.builder.nodes)}"
        node = onnx.helper.make_node(
            "Split", [x.name, sizes], [f"{name}_a", f"{name}_b"], name, axis=1
        )
        self.builder.nodes.append(node)
        return Tensor(f"{name}_b", (channels - 1, *x.shape[1:]))

    def pool(self, x: Tensor) -> Tensor | None:
        channels, height, width = x.shape
        if min(height, width) < 2:
            return None
        if flag(self.generator):
            made = self.builder.node("MaxPool", x.name, kernel_shape=[2, 2], strides=[2, 2])
            return Tensor(made, (channels, height // 2, width // 2))
        made = self.builder.node("AveragePool", x.name, kernel_shape=[2, 2], pads=[0, 1, 0, 0])
        return Tensor(made, (channels, height - 1, width))

    def average(self, x: Tensor) -> Tensor:
        return Tensor(self.builder.node("GlobalAveragePool", x.name), (x.shape[0], 1, 1))

    def move(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        kind = whole(self.generator, 0, 2)
        if kind == 0:
            made = self.builder.node("Transpose", x.name, perm=[0, 1, 3, 2])
            return Tensor(made, (channels, width, height))
        if kind == 1:
            shape = self.builder.constant(np.array([3, -1, 1, width]))
            made = self.builder.node("Reshape", x.name, shape)
            return Tensor(made, (channels * height, 1, width))
        pads = self.builder.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1]))
        return Tensor(self.builder.node("Pad", x.name, pads), (channels, height + 1, width + 1))


_OPERATORS = (
    [Graph.convolution] * 3
    + [Graph.product, Graph.arithmetic, Graph.arithmetic, Graph.function, Graph.clamp]
    + [Graph.concat, Graph.split, Graph.pool, Graph.pool, Graph.average, Graph.move, Graph.move]
)


def draw_graph(seed: int) -> tuple[Builder, list[str], dict[str, Array]]:
    """A graph of three to ten quantized operators, its outputs, and its input.

    Every result is quantized, so that no float arithmetic stands between codes, but it may be used
    both before and behind its quantizer.
    """
    generator = np.random.default_rng(seed)
    graph = Graph(generator)
    x = generator.normal(0, 2, (3, 4, 6, 6)).astype(np.float32)
    graph.tensors.append(Tensor(graph.quantized(graph.builder.input("x", x.shape)), (4, 6, 6)))
    outputs = []
    for _ in range(whole(generator, 3, 10)):
        made = one_of(generator, _OPERATORS)(graph, one_of(generator, graph.tensors))
        if made is None or np.prod(made.shape) > _MOST_ELEMENTS:
            continue
        if flag(generator, 0.2):
            outputs.append(made.name)
        graph.tensors.append(Tensor(graph.quantized(made.name), made.shape))
        if flag(generator, 0.2):  # again, at another scale
            graph.tensors.append(Tensor(graph.quantized(made.name), made.shape))
    return graph.builder, [*outputs, graph.tensors[-1].name], {"x": x}
