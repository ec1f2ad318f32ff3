"""Random cases of quantized models: the same for the reference, the importer and the passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from bitwright.quant.observers import TensorQuantization
from tests.quant.qdq import BITS, Array, Builder, quantize

Generator = np.random.Generator
T = TypeVar("T")

Case = tuple[Builder, str, dict[str, Array]]
"""A model, its output, its input."""


def whole(generator: Generator, low: int, high: int) -> int:
    return int(generator.integers(low, high + 1))


def flag(generator: Generator, probability: float = 0.5) -> bool:
    return bool(generator.random() < probability)


def one_of(generator: Generator, choices: Sequence[T]) -> T:
    return choices[int(generator.integers(len(choices)))]


def draw_scale(generator: Generator) -> float:
    """A scale from 2^-20 to 2^10; every third is a power of two, which makes ties."""
    exponent = generator.uniform(-20, 10)
    return float(np.float32(2.0 ** (round(exponent) if generator.random() < 0.34 else exponent)))


def draw_quantization(generator: Generator, bits: int, scale: float | None = None) -> Any:
    """Signed, unsigned or asymmetric."""
    signed = flag(generator)
    probe = TensorQuantization(1.0, 0, bits, signed)
    zero_point = 0
    if generator.random() < 0.4:
        zero_point = int(generator.integers(probe.code_min, probe.code_max + 1))
    return TensorQuantization(scale or draw_scale(generator), zero_point, bits, signed)


def draw_codes(generator: Generator, low: int, high: int, shape: Sequence[int]) -> Array:
    """Codes from low to high; sometimes only the extremes, or one of them everywhere."""
    kinds = ["any", "middle", "extremes", "low", "high"]
    kind = generator.choice(kinds, p=[0.5, 0.3, 0.1, 0.05, 0.05])
    if kind == "any":
        return generator.integers(low, high + 1, shape)
    if kind == "middle":
        middle, spread = (low + high) / 2, (high - low) / 6
        return np.clip(np.rint(generator.normal(middle, spread, shape)), low, high).astype(int)
    if kind == "extremes":
        return generator.choice([low, high], shape)
    return np.full(shape, low if kind == "low" else high)


def draw_activation(generator: Generator, q: TensorQuantization, shape: Sequence[int]) -> Array:
    """Floats that are exactly the values of codes, or (a few) the codes of 0."""
    codes = draw_codes(generator, q.code_min, q.code_max, shape) - q.zero_point
    if generator.random() < 0.05:
        codes = np.zeros(shape, int)
    return codes.astype(np.float32) * np.float32(q.scale)


def output_like(generator: Generator, bits: int, spread: float) -> TensorQuantization:
    """Quantization of an output whose values spread about so far around 0."""
    q = draw_quantization(generator, bits)
    parts = generator.choice([0.5, 2.0, 4.0, 20.0]) * generator.uniform(0.7, 1.5)
    levels = max(abs(q.code_min - q.zero_point), abs(q.code_max - q.zero_point))
    scale = spread * parts / levels
    if generator.random() < 0.34:
        scale = 2.0 ** round(math.log2(scale))
    return TensorQuantization(float(np.float32(scale)), q.zero_point, bits, q.signed)


def root_mean_square(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array.astype(np.float64))))) or 1.0


@dataclass(frozen=True)
class Weights:
    """Weights of a layer: codes, scale (one, or one a channel along ``axis``)."""

    codes: Array
    scale: Array
    bits: int
    signed: bool
    axis: int | None
    zero_point: int

    @property
    def spread(self) -> float:
        return root_mean_square(self.codes - self.zero_point) * root_mean_square(self.scale)


def draw_weights(
    generator: Generator, bits: int, shape: Sequence[int], axis: int | None, per_channel: bool
) -> Weights:
    signed = flag(generator, 0.8)
    probe = TensorQuantization(1.0, 0, bits, signed)
    codes = draw_codes(generator, probe.code_min, probe.code_max, shape)
    zero_point = 0 if signed else 1 << (bits - 1)
    base = draw_scale(generator)
    if per_channel and axis is not None:
        factors = 2.0 ** generator.uniform(-3, 0, shape[axis])
        scale = (base * factors).astype(np.float32)
    else:
        axis, scale = None, np.array(base, np.float32)
    return Weights(codes, scale, bits, signed, axis, zero_point)


def add_weights(builder: Builder, weights: Weights) -> str:
    return builder.weights(
        weights.codes,
        weights.scale,
        bits=weights.bits,
        signed=weights.signed,
        axis=weights.axis,
        zero_point=weights.zero_point,
    )


def add_clamp(builder: Builder, generator: Generator, tensor: str, kind: str, spread: float) -> str:
    """None, Relu, Clip with two or one bounds, or a chain of them."""
    ends = np.sort(generator.uniform(-spread, 2 * spread, 2)).astype(np.float32)
    if kind == "relu":
        return builder.node("Relu", tensor)
    if kind == "relu6":
        return builder.node(
            "Clip", tensor, builder.constant(np.float32(0)), builder.constant(ends[1])
        )
    if kind == "clip":
        return builder.node("Clip", tensor, *(builder.constant(end) for end in ends))
    if kind == "above":
        return builder.node("Clip", tensor, builder.constant(ends[0]))
    if kind == "below":
        return builder.node("Clip", tensor, "", builder.constant(ends[1]))
    if kind == "chain":
        clipped = builder.node("Clip", tensor, *(builder.constant(end) for end in ends))
        return builder.node("Relu", clipped)
    return tensor


CLAMPS = ("none", "none", "none", "none", "relu", "relu6", "clip", "above", "below", "chain")
BIASES = ("none", "int32", "float")


def bias_tensor(
    builder: Builder,
    generator: Generator,
    kind: str,
    scale: Array,
    shape: Sequence[int],
    spread: float,
) -> str | None:
    """An int32 bias at the accumulator's scale, or a float one."""
    if kind == "none":
        return None
    values = generator.normal(0.0, 0.4 * spread, shape)
    if kind == "float":
        return builder.constant(values.astype(np.float32))
    codes = np.clip(np.rint(values / scale), -(2**31) + 1, 2**31 - 1)
    axis = None if scale.size == 1 else len(shape) - 1
    return builder.weights(codes, scale, bits=32, axis=axis)


def convolutions(
    generator: Generator, weight_bits: int | None = None, x_bits: int | None = None
) -> Case:
    rank = whole(generator, 1, 3)
    kernel, strides, dilations = ([whole(generator, 1, 3) for _ in range(rank)] for _ in range(3))
    groups = whole(generator, 1, 3)
    depthwise = flag(generator)
    in_group = 1 if depthwise else whole(generator, 1, 4)
    filters = groups * whole(generator, 1, 3)
    auto = one_of(generator, ["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
    # onnxruntime knows no dilation together with SAME.
    if auto.startswith("SAME"):
        dilations = [1] * rank
    largest = (24, 8, 4)[rank - 1]
    size = [
        (k - 1) * d + whole(generator, 1, largest) for k, d in zip(kernel, dilations, strict=True)
    ]
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": groups}
    if auto == "NOTSET":
        attributes["pads"] = [whole(generator, 0, 2) for _ in range(2 * rank)]
    else:
        attributes["auto_pad"] = auto
    weight_bits, x_bits = weight_bits or one_of(generator, BITS), x_bits or one_of(generator, BITS)
    y_bits = one_of(generator, [*BITS, 8, 16])
    x_q = draw_quantization(generator, x_bits)
    shape = [whole(generator, 1, 2), groups * in_group, *size]
    x = draw_activation(generator, x_q, shape)
    weights = draw_weights(generator, weight_bits, [filters, in_group, *kernel], 0, flag(generator))
    spread = root_mean_square(x) * weights.spread * math.sqrt(in_group * math.prod(kernel))
    builder = Builder()
    data = builder.activation(builder.input("x", shape), x_q)
    inputs = [data, add_weights(builder, weights)]
    bias = bias_tensor(
        builder,
        generator,
        one_of(generator, BIASES),
        np.float32(x_q.scale) * weights.scale,
        [filters],
        spread,
    )
    layer = builder.node("Conv", *inputs, *([bias] if bias else []), name="layer", **attributes)
    clamped = add_clamp(builder, generator, layer, one_of(generator, CLAMPS), spread)
    output = builder.activation(clamped, output_like(generator, y_bits, spread))
    return builder, output, {"x": x}


def products(generator: Generator) -> Case:
    """Gemm, and MatMul of all ranks with the weights on either side."""
    rows, terms, columns = (whole(generator, 1, 12) for _ in range(3))
    terms *= one_of(generator, [1, 1, 4, 16])
    kind = one_of(generator, ["gemm", "right", "right", "left", "left", "vector"])
    weight_bits, x_bits = one_of(generator, BITS), one_of(generator, BITS)
    y_bits = one_of(generator, [*BITS, 8, 16])
    per_channel = flag(generator)
    x_q = draw_quantization(generator, x_bits)
    builder = Builder()
    attributes: dict[str, Any] = {}
    batch = [whole(generator, 1, 3) for _ in range(whole(generator, 0, 2))]
    weight_batch = one_of(generator, [[], [], batch[-1:], batch])
    if kind == "gemm":
        attributes = {"transA": whole(generator, 0, 1), "transB": whole(generator, 0, 1)}
        shape = [terms, rows] if attributes["transA"] else [rows, terms]
        weight_shape = [columns, terms] if attributes["transB"] else [terms, columns]
        axis = 0 if attributes["transB"] else 1
    elif kind == "right":
        shape, weight_shape = [*batch, rows, terms], [*weight_batch, terms, columns]
        axis = len(weight_shape) - 1
    elif kind == "left":
        shape, weight_shape = [*batch, terms, rows], [*weight_batch, columns, terms]
        axis = len(weight_shape) - 2
    else:  # a vector by a matrix, from either side
        shape = [terms]
        weight_shape, axis = [terms, columns], 1
        kind = "right"
        if flag(generator):
            weight_shape, axis, kind = [columns, terms], 0, "left"
    x = draw_activation(generator, x_q, shape)
    weights = draw_weights(generator, weight_bits, weight_shape, axis, per_channel)
    spread = root_mean_square(x) * weights.spread * math.sqrt(terms)
    data = builder.activation(builder.input("x", shape), x_q)
    operands = [data, add_weights(builder, weights)]
    if kind == "left":
        operands.reverse()
    scale = np.float32(x_q.scale) * weights.scale
    bias_kind = one_of(generator, BIASES)
    if kind == "gemm":
        bias = bias_tensor(builder, generator, bias_kind, scale, [columns], spread)
        layer = builder.node(
            "Gemm", *operands, *([bias] if bias else []), name="layer", **attributes
        )
    else:
        layer = builder.node("MatMul", *operands, name="layer")
        bias = None
        if kind == "right":
            bias = bias_tensor(builder, generator, bias_kind, scale, [columns], spread)
        if bias is not None:
            both = [layer, bias] if flag(generator) else [bias, layer]
            layer = builder.node("Add", *both, name="bias")
    clamped = add_clamp(builder, generator, layer, one_of(generator, CLAMPS), spread)
    output = builder.activation(clamped, output_like(generator, y_bits, spread))
    return builder, output, {"x": x}


def sums(generator: Generator) -> Case:
    """Add, Sub and Mul of two activations, or of one and a stored constant, broadcast."""
    operator = one_of(generator, ["Add", "Add", "Sub", "Mul"])
    shape = [whole(generator, 1, 5) for _ in range(whole(generator, 1, 4))]
    shapes = [list(shape), list(shape)]
    for entry in shapes:
        if flag(generator, 0.4):  # broadcast some axes, leave out some in front
            entry[:] = [1 if flag(generator, 0.4) else size for size in entry]
            entry[:] = entry[whole(generator, 0, len(entry) - 1) :]
    builder = Builder()
    feeds, operands, spreads = {}, [], []
    scale = draw_scale(generator)
    for index, entry in enumerate(shapes):
        # Operands of one sum are mostly of about one size.
        far = 2.0 ** generator.uniform(-3, 3) if flag(generator, 0.8) else 2.0**12
        q = draw_quantization(generator, one_of(generator, BITS), float(np.float32(scale * far)))
        x = draw_activation(generator, q, entry)
        spreads.append(root_mean_square(x))
        if index and flag(generator, 0.3):
            operands.append(
                builder.weights(
                    quantize(x, q), np.float32(q.scale), bits=q.bits, signed=q.signed,
                    zero_point=q.zero_point,
                )
            )  # fmt: skip
        else:
            name = builder.input(f"x{index}", entry)
            feeds[name] = x
            operands.append(builder.activation(name, q))
    if flag(generator):
        operands.reverse()
    spread = math.prod(spreads) if operator == "Mul" else math.hypot(*spreads)
    result = builder.node(operator, *operands, name="arithmetic")
    result = add_clamp(builder, generator, result, one_of(generator, CLAMPS), spread)
    output_bits = one_of(generator, [*BITS, 8, 16])
    return builder, builder.activation(result, output_like(generator, output_bits, spread)), feeds


def averages(generator: Generator) -> Case:
    builder = Builder()
    rank = whole(generator, 1, 3)
    largest = (16, 8, 5)[rank - 1]
    shape = [whole(generator, 1, 2), whole(generator, 1, 3)]
    shape += [whole(generator, 1, largest) for _ in range(rank)]
    q = draw_quantization(generator, one_of(generator, BITS))
    operator = one_of(
        generator, ["AveragePool", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"]
    )
    attributes: dict[str, Any] = {}
    extra = []
    if operator == "AveragePool":
        attributes = draw_pooling(generator, shape[2:])
        attributes["count_include_pad"] = whole(generator, 0, 1)
    elif operator != "GlobalAveragePool":
        attributes["keepdims"] = whole(generator, 0, 1)
        axes = generator.permutation(len(shape))[: whole(generator, 0, len(shape))]
        axes = np.where(generator.random(axes.shape) < 0.5, axes, axes - len(shape))
        if axes.size or flag(generator):
            extra.append(builder.constant(axes.astype(np.int64)))
    x = draw_activation(generator, q, shape)
    data = builder.activation(builder.input("x", shape), q)
    spread = root_mean_square(x) * (4.0 if operator == "ReduceSum" else 1.0)
    result = builder.node(operator, data, *extra, name="arithmetic", **attributes)
    result = add_clamp(builder, generator, result, one_of(generator, CLAMPS), spread)
    output_bits = one_of(generator, [*BITS, 8, 16])
    output = builder.activation(result, output_like(generator, output_bits, spread))
    return builder, output, {"x": x}


def draw_pooling(generator: Generator, size: list[int]) -> dict[str, Any]:
    """Attributes of a pooling whose windows fit and never lie in the padding alone."""
    rank = len(size)
    kernel = [whole(generator, 1, min(3, n)) for n in size]
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": [whole(generator, 1, 3) for _ in range(rank)],
    }
    auto = one_of(generator, ["NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
    if auto != "NOTSET":
        attributes["auto_pad"] = auto
        if auto.startswith("SAME"):
            attributes["strides"] = [whole(generator, 1, min(kernel)) for _ in range(rank)]
        return attributes
    dilations = [
        whole(generator, 1, 2) if (k - 1) * 2 + 1 <= n else 1
        for k, n in zip(kernel, size, strict=True)
    ]
    attributes["dilations"] = dilations
    attributes["pads"] = [whole(generator, 0, k - 1) for k in kernel * 2]
    attributes["ceil_mode"] = whole(generator, 0, 1)
    return attributes


def powers_of_two(generator: Generator) -> Case:
    """A layer whose scales are powers of two: float32 computes it exactly, ties included."""
    weight_bits, x_bits = one_of(generator, BITS[:3]), one_of(generator, BITS[:3])
    exponents = generator.integers(-20, 11, 2)
    q = draw_quantization(generator, x_bits, 2.0 ** exponents[0])
    # At most 64 * 255 * 255 < 2^24: every sum is a whole float32 number.
    terms, columns = whole(generator, 1, 64), whole(generator, 1, 16)
    x = draw_activation(generator, q, [8, terms])
    weights = draw_weights(generator, weight_bits, [terms, columns], 1, per_channel=False)
    scale = 2.0 ** exponents[1]
    builder = Builder()
    stored = builder.weights(
        weights.codes, np.float32(scale), bits=weight_bits, signed=weights.signed,
        zero_point=weights.zero_point,
    )  # fmt: skip
    data = builder.activation(builder.input("x", x.shape), q)
    layer = builder.node("MatMul", data, stored, name="layer")
    y_bits = one_of(generator, BITS)
    # A step of the output is 2^0 to 2^12 steps of the accumulator.
    y_scale = q.scale * scale * 2.0 ** generator.integers(0, 13)
    output = builder.activation(layer, draw_quantization(generator, y_bits, y_scale))
    return builder, output, {"x": x}


def scalar(builder: Builder, value: float) -> str:
    return builder.constant(np.float32(value))


@dataclass(frozen=True)
class Function:
    """An elementwise function as ONNX nodes, and as a formula in float64."""

    build: Callable[[Builder, str], str]
    formula: Callable[[Any], Any]


def sigmoid(x: Any) -> Any:
    return np.exp(np.minimum(x, 0.0)) / (1.0 + np.exp(-np.abs(x)))


erf = np.vectorize(math.erf, otypes=[np.float64])

FUNCTIONS = {
    "Sigmoid": Function(lambda b, x: b.node("Sigmoid", x), sigmoid),
    "Tanh": Function(lambda b, x: b.node("Tanh", x), np.tanh),
    "Erf": Function(lambda b, x: b.node("Erf", x), erf),
    "HardSwish": Function(
        lambda b, x: b.node("HardSwish", x), lambda x: x * np.clip(x / 6 + 0.5, 0, 1)
    ),
    "HardSigmoid": Function(
        lambda b, x: b.node("HardSigmoid", x, alpha=0.25, beta=0.4),
        lambda x: np.clip(0.25 * x + 0.4, 0, 1),
    ),
    "Gelu": Function(
        lambda b, x: b.node("Gelu", x), lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2)))
    ),
    "LeakyRelu": Function(
        lambda b, x: b.node("LeakyRelu", x, alpha=0.1), lambda x: np.where(x < 0, 0.1 * x, x)
    ),
    "Elu": Function(
        lambda b, x: b.node("Elu", x), lambda x: np.where(x < 0, np.expm1(np.minimum(x, 0)), x)
    ),
    "Softplus": Function(lambda b, x: b.node("Softplus", x), lambda x: np.logaddexp(0.0, x)),
    "Abs": Function(lambda b, x: b.node("Abs", x), np.abs),
    "x*sigmoid(x)": Function(
        lambda b, x: b.node("Mul", x, b.node("Sigmoid", x)), lambda x: x * sigmoid(x)
    ),
    "x*clip(x+3)/6": Function(
        lambda b, x: b.node(
            "Div",
            b.node(
                "Mul",
                b.node(
                    "Clip",
                    b.node("Add", x, b.constant(np.full((1, 1), 3, np.float32))),
                    scalar(b, 0),
                    scalar(b, 6),
                ),
                x,
            ),
            scalar(b, 6),
        ),
        lambda x: x * np.clip(x + 3, 0, 6) / 6,
    ),
    "max(x, 0.25x)": Function(
        lambda b, x: b.node("Max", x, b.node("Mul", scalar(b, 0.25), x)),
        lambda x: np.maximum(x, 0.25 * x),
    ),
    "Clip(Relu)": Function(
        lambda b, x: b.node("Clip", b.node("Relu", x), "", scalar(b, 1.3)),
        lambda x: np.clip(x, 0, np.float32(1.3)),
    ),
    "Clip of Clip": Function(
        lambda b, x: b.node(
            "Clip", b.node("Clip", x, scalar(b, -0.7), scalar(b, 1)), scalar(b, -1), scalar(b, 0.4)
        ),
        lambda x: np.clip(x, np.float32(-0.7), np.float32(0.4)),
    ),
}


Q8 = TensorQuantization(0.0625, 11, 8, signed=True)
X8 = (np.arange(96).reshape(2, 4, 3, 4) * 37 % 256 - 128).astype(np.int64)  # codes, all over


def ints(builder: Builder, *values: int) -> str:
    return builder.constant(np.array(values, np.int64))


def slide_max(x: Array, size: int) -> Array:
    """Maximum over size x size windows, padded by one in front: padding never wins."""
    padded = np.pad(x, [(0, 0), (0, 0), (1, 0), (1, 0)], constant_values=-999)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    result: Array = windows.max(axis=(-2, -1))
    return result


MOVES: dict[str, tuple[Callable[[Builder, str], str], Callable[[Array], Array]]] = {
    "Reshape": (lambda b, x: b.node("Reshape", x, ints(b, 4, -1)), lambda x: x.reshape(4, -1)),
    "Flatten": (lambda b, x: b.node("Flatten", x, axis=2), lambda x: x.reshape(8, 12)),
    "Transpose": (
        lambda b, x: b.node("Transpose", x, perm=[0, 2, 3, 1]),
        lambda x: x.transpose(0, 2, 3, 1),
    ),
    "Unsqueeze": (lambda b, x: b.node("Unsqueeze", x, ints(b, 0)), lambda x: x[None]),
    "Pad": (
        lambda b, x: b.node("Pad", x, ints(b, 0, 0, 1, 0, 0, 0, 2, 1)),
        lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2), (0, 1)], constant_values=11),
    ),
    "Pad with axes": (
        lambda b, x: b.node("Pad", x, ints(b, 1, 2), "", ints(b, 3)),
        lambda x: np.pad(x, [(0, 0), (0, 0), (0, 0), (1, 2)], constant_values=11),
    ),
    "Pad by reflection": (
        lambda b, x: b.node("Pad", x, ints(b, 0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
        lambda x: np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect"),
    ),
    "Slice": (
        lambda b, x: b.node("Slice", x, ints(b, 3), ints(b, 0), ints(b, 1), ints(b, -2)),
        lambda x: x[:, 3:0:-2],
    ),
    "Gather": (
        lambda b, x: b.node("Gather", x, ints(b, 2, 0, 2), axis=3),
        lambda x: x[..., [2, 0, 2]],
    ),
    "Tile": (
        lambda b, x: b.node("Tile", x, ints(b, 1, 2, 1, 1)),
        lambda x: np.tile(x, (1, 2, 1, 1)),
    ),
    "Expand": (
        lambda b, x: b.node("Expand", x, ints(b, 3, 1, 1, 1, 1)),
        lambda x: np.broadcast_to(x, (3, 2, 4, 3, 4)),
    ),
    "Concat": (lambda b, x: b.node("Concat", x, x, axis=1), lambda x: np.concatenate([x, x], 1)),
    "MaxPool": (
        lambda b, x: b.node("MaxPool", x, kernel_shape=[2, 2], pads=[1, 1, 0, 0]),
        lambda x: slide_max(x, 2),
    ),
    "GlobalMaxPool": (
        lambda b, x: b.node("GlobalMaxPool", x),
        lambda x: x.max(axis=(2, 3), keepdims=True),
    ),
    "ReduceMax": (
        lambda b, x: b.node("ReduceMax", x, ints(b, 1), keepdims=0),
        lambda x: x.max(axis=1),
    ),
    "ReduceMin": (
        lambda b, x: b.node("ReduceMin", x, ints(b, -1)),
        lambda x: x.min(axis=-1, keepdims=True),
    ),
    "DepthToSpace": (
        lambda b, x: b.node("DepthToSpace", x, blocksize=2),
        lambda x: x.reshape(2, 2, 2, 1, 3, 4).transpose(0, 3, 4, 1, 5, 2).reshape(2, 1, 6, 8),
    ),
    "Resize": (
        lambda b, x: b.node(
            "Resize", x, "", b.constant(np.array([1, 1, 2, 2], np.float32)),
            mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        ),
        lambda x: x.repeat(2, axis=2).repeat(2, axis=3),
    ),
    "Identity": (lambda b, x: b.node("Identity", x), lambda x: x),
    "chain": (
        lambda b, x: b.node("Relu", b.node("Transpose", b.node("Identity", x), perm=[3, 2, 1, 0])),
        lambda x: np.maximum(x.transpose(3, 2, 1, 0), 11),
    ),
}  # fmt: skip
