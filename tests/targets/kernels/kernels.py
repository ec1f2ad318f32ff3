"""Runs kernels, and computes what they must give with NumPy's 64-bit integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tvm
from hypothesis import strategies as st

from bitwright.quant.observers import TensorQuantization
from bitwright.quant.requantization import Requantization
from bitwright.targets.kernels import convolution, host, matmul
from bitwright.targets.kernels.host import Isa
from bitwright.targets.kernels.spec import (
    Accumulators,
    ActivationMatmul,
    ActivationType,
    Codes,
    Convolution,
    Floats,
    Matmul,
    Operand,
    Output,
)

Array: TypeAlias = npt.NDArray[Any]
IntArray: TypeAlias = npt.NDArray[np.int64]
Spec: TypeAlias = Convolution | Matmul

ISAS = [host.AVX2, host.GENERIC] if host.detect() == host.AVX2 else [host.GENERIC]
ACTIVATION_TYPES: list[ActivationType] = ["int8", "uint8", "int16", "uint16"]


# --------------------------------------------------------------------------- what must come out


def convolution_sums(data: Array, weights: Array, spec: Convolution) -> IntArray:
    """Sums of products of centred codes, one kernel element at a time."""
    rank = len(spec.size)
    centred = data.astype(np.int64) - spec.data.zero_point
    borders = [(spec.pads[axis], spec.pads[rank + axis]) for axis in range(rank)]
    padded = np.pad(centred, [(0, 0), (0, 0), *borders])
    entries, channels = spec.weight_shape[1], spec.out_channels // spec.groups
    sums = np.zeros((len(data), spec.out_channels, *spec.output_size), np.int64)
    for tap in np.ndindex(*spec.kernel):
        window = tuple(
            slice(place * dilation, place * dilation + (length - 1) * stride + 1, stride)
            for place, dilation, length, stride in zip(
                tap, spec.dilations, spec.output_size, spec.strides, strict=True
            )
        )
        seen = padded[(slice(None), slice(None), *window)]
        factors = weights[(slice(None), slice(None), *tap)].astype(np.int64)
        for group in range(spec.groups):
            filters = slice(group * channels, (group + 1) * channels)
            inputs = seen[:, group * entries : (group + 1) * entries]
            sums[:, filters] += np.einsum("oi,ni...->no...", factors[filters], inputs)
    return sums


def matmul_sums(data: Array, weights: Array, spec: Matmul) -> IntArray:
    """Sums of products of centred codes."""
    return (data.astype(np.int64) - spec.data.zero_point) @ weights.astype(np.int64)


def along(vector: Array, spec: object, rank: int) -> Array:
    """A vector over output channels, shaped to broadcast over the result."""
    return vector.reshape([-1, *[1] * (rank - 2)]) if isinstance(spec, Convolution) else vector


def result_of(spec: Spec | ActivationMatmul, accumulators: IntArray, scale: Array | None) -> Array:
    """What the project's own definition of requantization makes of accumulators."""
    output = spec.output
    if isinstance(output, Accumulators):
        return accumulators.astype(f"int{spec.accumulator_bits}")
    assert scale is not None
    factors = along(scale, spec, accumulators.ndim)
    if isinstance(output, Floats):
        bounds = np.float32(output.low), np.float32(output.high)
        return np.asarray(np.clip(accumulators.astype(np.float32) * factors, *bounds))
    bits = np.dtype(output.dtype).itemsize * 8
    quantization = TensorQuantization(
        1.0, output.zero_point, bits, not output.dtype.startswith("u")
    )
    rule = Requantization(factors, quantization, output.low, output.high)
    return rule.apply(accumulators).astype(output.dtype)


# --------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A layer with everything it computes with; ``spec`` has the accumulators that it needs."""

    spec: Spec
    data: Array
    weights: Array
    bias: Array | None
    shift: Array | None
    scale: Array | None

    @property
    def accumulators(self) -> IntArray:
        """The exact sums, shifted and with their biases."""
        if isinstance(self.spec, Convolution):
            sums = convolution_sums(self.data, self.weights, self.spec)
        else:
            sums = matmul_sums(self.data, self.weights, self.spec)
        if self.shift is not None:
            sums = sums << along(self.shift.astype(np.int64), self.spec, sums.ndim)
        if self.bias is not None:
            sums = sums + along(self.bias.astype(np.int64), self.spec, sums.ndim)
        return sums

    @property
    def expected(self) -> Array:
        return result_of(self.spec, self.accumulators, self.scale)


def channels_of(spec: Spec) -> int:
    return spec.out_channels if isinstance(spec, Convolution) else spec.columns


def numbers(generator: np.random.Generator, dtype: str, shape: Sequence[int], kind: str) -> Array:
    """Codes: anything of the type, its smallest or largest alone, or only these two mixed."""
    limits = np.iinfo(dtype)
    if kind == "any":
        return generator.integers(limits.min, limits.max + 1, shape).astype(dtype)
    choices = {"smallest": [limits.min], "largest": [limits.max], "both": [limits.min, limits.max]}
    return generator.choice(np.array(choices[kind], dtype), shape)


def make_case(spec: Spec, shape: Sequence[int], seed: int = 0, kind: str = "any") -> Case:
    """Draw numbers for a layer; shape is that of the data.

    Accumulators become wide where the sums do not fit, as the callers of kernels do it, and scales
    spread the sums over the codes and a little beyond.
    """
    generator = np.random.default_rng(seed)
    channels = channels_of(spec)
    data = numbers(generator, spec.data.dtype, shape, kind)
    weights = numbers(generator, spec.weight, spec.weight_shape, kind)
    bias = generator.integers(-(2**15), 2**15, channels) if spec.bias else None
    shift = generator.integers(0, 4, channels).astype(np.int32) if spec.shift else None
    case = Case(spec, data, weights, bias, shift, None)
    sums = case.accumulators
    largest = max(int(np.abs(sums).max(initial=0)), 1)
    if largest >= 2**31:
        spec = replace(spec, accumulator_bits=64)
    if bias is not None:
        bias = bias.astype(f"int{spec.accumulator_bits}")
    scale = None
    if isinstance(spec.output, Codes):
        span = spec.output.high - spec.output.low + 1
        scale = (generator.uniform(0.2, 1.5, channels) * span / largest).astype(np.float32)
    elif isinstance(spec.output, Floats):
        scale = generator.uniform(1e-6, 1e-3, channels).astype(np.float32)
    return Case(spec, data, weights, bias, shift, scale)


class Compiled:
    """A kernel with the functions that lay out its weights."""

    def __init__(self, spec: Spec, isa: Isa) -> None:
        self.spec = spec
        module: Any = convolution if isinstance(spec, Convolution) else matmul
        self._layout = module.layout(spec, isa)
        functions = {
            "kernel": module.kernel(spec, isa, "kernel"),
            "pack": module.pack(spec, isa, "pack"),
            "unpack": module.unpack(spec, isa, "unpack"),
        }
        target = tvm.target.Target(host.target(isa))
        self._functions = tvm.compile(tvm.IRModule(functions), target=target)

    def run(self, case: Case) -> Array:
        """Pack the weights, check that unpacking gives them back, and run the kernel."""
        packed = tvm.runtime.tensor(np.full(self._layout.shape, 77, self._layout.dtype))
        unpacked = tvm.runtime.tensor(np.zeros_like(case.weights))
        self._functions["pack"](tvm.runtime.tensor(case.weights), packed)
        self._functions["unpack"](packed, unpacked)
        np.testing.assert_array_equal(unpacked.numpy(), case.weights)
        expected = case.expected
        result = tvm.runtime.tensor(np.full(expected.shape, 77, expected.dtype))
        vectors = [v for v in (case.bias, case.shift, case.scale) if v is not None]
        self._functions["kernel"](
            tvm.runtime.tensor(case.data), packed, *map(tvm.runtime.tensor, vectors), result
        )
        return np.asarray(result.numpy())


def check(case: Case, isa: Isa) -> None:
    """A kernel's result is the expected one, bit for bit."""
    got = Compiled(case.spec, isa).run(case)
    np.testing.assert_array_equal(got, case.expected, err_msg=f"{isa.name}: {case.spec}")


# --------------------------------------------------------------------------- strategies


@st.composite
def operands(draw: st.DrawFn) -> Operand:
    dtype = draw(st.sampled_from(ACTIVATION_TYPES))
    limits = np.iinfo(dtype)
    zero_points = st.one_of(
        st.sampled_from([0, int(limits.min), int(limits.max), (limits.min + limits.max + 1) // 2]),
        st.integers(int(limits.min), int(limits.max)),
    )
    return Operand(dtype, draw(zero_points))


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    kind = draw(st.sampled_from(["codes", "codes", "floats", "accumulators"]))
    if kind == "accumulators":
        return Accumulators()
    if kind == "floats":
        return draw(st.sampled_from([Floats(), Floats(0.0), Floats(-0.5, 6.0)]))
    operand = draw(operands())
    limits = np.iinfo(operand.dtype)
    bounds = st.integers(int(limits.min), int(limits.max))
    low, high = draw(
        st.one_of(
            st.just((int(limits.min), int(limits.max))),
            st.tuples(bounds, bounds).map(lambda pair: (min(pair), max(pair))),
        )
    )
    return Codes(operand.dtype, operand.zero_point, low, high)


KINDS = st.sampled_from(["any", "any", "any", "both", "smallest", "largest"])


def every_output(dtype: ActivationType = "int8") -> Iterator[Output]:
    limits = np.iinfo(dtype)
    yield Codes(dtype, 3, int(limits.min), int(limits.max))
    yield Floats(-1.0, 1.0)
    yield Accumulators()
