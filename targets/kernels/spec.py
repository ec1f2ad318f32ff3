"""What a kernel computes: shapes, types and constants of one integer layer.

The numbers mean what ``docs/integer-semantics.md`` says. Everything here is known when a kernel is
built; weights, biases, multipliers and shifts are its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod
from typing import Literal, TypeAlias

from bitwright.errors import UsageError
from bitwright.soft_edge import SoftEdge

__all__ = [
    "Accumulators",
    "ActivationMatmul",
    "ActivationType",
    "Codes",
    "Convolution",
    "Dimension",
    "Floats",
    "Matmul",
    "Operand",
    "Output",
    "WeightLayout",
    "WeightType",
]

ActivationType: TypeAlias = Literal["int8", "uint8", "int16", "uint16"]
WeightType: TypeAlias = Literal["int8", "int16"]

#: A length; None where it is known only when the kernel runs.
Dimension: TypeAlias = int | None

_RANGES = {
    "int8": (-(2**7), 2**7 - 1),
    "uint8": (0, 2**8 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
}


@dataclass(frozen=True, slots=True)
class Operand:
    """Codes of an activation.

    Attributes
    ----------
    dtype
        Type of the codes; 2- and 4-bit codes are stored as int8 or uint8.
    zero_point
        What a code less the code of 0 is computed with: the code of 0, within the type. 0 with a
        layout.
    layout
        Of soft-edge codes, which a kernel decodes where it reads them; its values are centred.

    Raises
    ------
    UsageError
        If the zero point is out of the type's range, or the type not the layout's.
    """

    dtype: ActivationType
    zero_point: int = 0
    layout: SoftEdge | None = None

    def __post_init__(self) -> None:
        if self.layout is not None and (self.zero_point or self.layout.dtype != self.dtype):
            raise UsageError(
                f"{self.dtype} with zero point {self.zero_point} are no codes of {self.layout}"
            )
        low, high = _RANGES[self.dtype]
        if not low <= self.zero_point <= high:
            raise UsageError(
                f"zero point {self.zero_point} is not a code of {self.dtype}",
                fix=f"give one from {low} to {high}",
            )

    @property
    def code_of_zero(self) -> int:
        """What padding consists of, where codes are padded."""
        return self.zero_point if self.layout is None else self.layout.zero_point

    @property
    def offset(self) -> int:
        """What a kernel subtracts from codes so that they fit 16 bits.

        It is the zero point where centred codes fit; elsewhere sums are corrected by
        ``correction`` times the sum of the weights.
        """
        low, high = _RANGES[self.dtype]
        if low - self.zero_point >= -(2**15) and high - self.zero_point < 2**15:
            return self.zero_point
        return 2**15 if self.dtype == "uint16" else 0

    @property
    def correction(self) -> int:
        """``offset - zero_point``."""
        return self.offset - self.zero_point


@dataclass(frozen=True, slots=True)
class Codes:
    """Requantized codes: ``clamp(rint(float32(acc) * multiplier) + zero_point, low, high)``.

    The kernel takes the multipliers as float32 [channels]. The bounds are codes of ``dtype``. In
    the form ``fixed`` the product is exact: the multiplier is a whole number of 24 bits and a
    shift, and nothing but integers computes. It takes sums of 32 bits.

    Raises
    ------
    UsageError
        If a bound is no code of the type or low exceeds high.
    """

    dtype: ActivationType
    zero_point: int
    low: int
    high: int
    form: Literal["float", "fixed"] = "float"

    def __post_init__(self) -> None:
        low, high = _RANGES[self.dtype]
        if not low <= self.low <= self.high <= high:
            raise UsageError(
                f"codes of {self.dtype} cannot be clamped to [{self.low}, {self.high}]",
                fix=f"give bounds from {low} to {high}, the lower one first",
            )


@dataclass(frozen=True, slots=True)
class Floats:
    """Real numbers: ``float32(acc) * scale``, clipped; the kernel takes float32 [channels]."""

    low: float = -inf
    high: float = inf
    dtype: Literal["float32"] = "float32"


@dataclass(frozen=True, slots=True)
class Accumulators:
    """The integer sums themselves, int32 or int64 as ``accumulator_bits`` says."""


Output: TypeAlias = Codes | Floats | Accumulators


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Weights as a kernel reads them: an int32 tensor; each element holds two int16 weights."""

    shape: tuple[int, ...]
    dtype: Literal["int32"] = "int32"


def _check_weight_sums(data: Operand, weight: WeightType, depth: int) -> None:
    """Sums of weights, which correct for a zero point, are kept in 32 bits."""
    if data.correction and depth * -_RANGES[weight][0] >= 2**31:
        raise UsageError(
            f"{depth} weights of {weight} are too many for activations of {data.dtype} with the "
            f"zero point {data.zero_point}",
            fix=f"use the zero point {data.offset}",
        )


def _output_size(window: Convolution) -> tuple[int, ...]:
    """Places of a window along each spatial axis."""
    rank = len(window.size)
    lengths = (
        window.size[axis] + window.pads[axis] + window.pads[rank + axis] for axis in range(rank)
    )
    extents = (
        (taps - 1) * dilation + 1
        for taps, dilation in zip(window.kernel, window.dilations, strict=True)
    )
    return tuple(
        (length - extent) // stride + 1
        for length, extent, stride in zip(lengths, extents, window.strides, strict=True)
    )


def _complete_window(window: Convolution) -> None:
    """Fill in the strides, dilations and padding that were left out, and check them all.

    Raises
    ------
    UsageError
        If the axes do not fit each other or no window fits into the image.
    """
    rank = len(window.size)
    object.__setattr__(window, "strides", window.strides or (1,) * rank)
    object.__setattr__(window, "dilations", window.dilations or (1,) * rank)
    object.__setattr__(window, "pads", window.pads or (0,) * (2 * rank))
    lengths = (
        len(window.kernel),
        len(window.strides),
        len(window.dilations),
        len(window.pads) / 2,
    )
    if not 1 <= rank <= 3 or any(length != rank for length in lengths):
        raise UsageError(f"a kernel has 1 to 3 spatial axes, all attributes alike, not {window}")
    positive = (*window.size, *window.kernel, *window.strides, *window.dilations)
    if min(positive) < 1 or min(window.pads) < 0:
        raise UsageError(f"sizes must be positive and padding not negative: {window}")
    if min(_output_size(window)) < 1:
        raise UsageError(
            f"a kernel of {window.kernel} does not fit into an image of {window.size} with padding "
            f"{window.pads} and dilations {window.dilations}"
        )


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution of [batch, in_channels, *size] to [batch, out_channels, *output_size].

    Attributes
    ----------
    batch
        Number of images; None where it is symbolic.
    in_channels, size
        Shape of an image; 1 to 3 spatial axes.
    out_channels, kernel
        Number of filters and their size; weights are [out_channels, in_channels / groups, *kernel].
    data, weight
        Types of activations and weights (whose zero point is already subtracted).
    output
        What becomes of the accumulators.
    strides, dilations
        One number a spatial axis; empty for all 1.
    pads
        Padding at the beginnings of the axes, then at their ends (as ONNX writes it); empty for 0.
        Its value is the zero point.
    groups
        Number of groups of channels.
    accumulator_bits
        32 where the final sums fit, else 64.
    bias, shift
        Whether the kernel takes biases, and shifts of the sums to the left before them.
    """

    batch: Dimension
    in_channels: int
    size: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    data: Operand
    output: Output
    weight: WeightType = "int8"
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    groups: int = 1
    accumulator_bits: Literal[32, 64] = 32
    bias: bool = True
    shift: bool = False

    def __post_init__(self) -> None:
        _complete_window(self)
        if min(self.groups, self.in_channels, self.out_channels) < 1:
            raise UsageError(f"sizes must be positive: {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise UsageError(
                f"{self.groups} groups do not divide {self.in_channels} input and "
                f"{self.out_channels} output channels"
            )
        _check_weight_sums(self.data, self.weight, prod(self.weight_shape[1:]))

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial shape of the result."""
        return _output_size(self)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weights outside the kernel."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def macs_per_image(self) -> int:
        """Multiply-accumulate operations for one image."""
        return prod(self.weight_shape) * prod(self.output_size)


@dataclass(frozen=True, slots=True)
class Matmul:
    """A product of activations [*leading, depth] with weights [depth, columns].

    Attributes
    ----------
    leading
        The other axes of the data, at least one; None where a length is symbolic.
    depth, columns
        Shape of the weights.
    data, weight, output, accumulator_bits, bias, shift
        As in :class:`Convolution`; the vectors have one entry a column.
    """

    leading: tuple[Dimension, ...]
    depth: int
    columns: int
    data: Operand
    output: Output
    weight: WeightType = "int8"
    accumulator_bits: Literal[32, 64] = 32
    bias: bool = True
    shift: bool = False

    def __post_init__(self) -> None:
        if not self.leading or self.depth < 1 or self.columns < 1:
            raise UsageError(f"a product needs rows, and a depth and columns of 1 or more: {self}")
        _check_weight_sums(self.data, self.weight, self.depth)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weights outside the kernel."""
        return (self.depth, self.columns)


@dataclass(frozen=True, slots=True)
class ActivationMatmul:
    """A product of two activations, [*batch, rows, depth] by [*batch, depth, columns].

    Attributes
    ----------
    left, right
        Shapes of the operands. Equally many axes; those of the batch are equal or 1 on one side,
        and None where they are symbolic (on both sides then the same length). The number of rows
        may be None too.
    left_data, right_data
        Types of the operands.
    output
        What becomes of the accumulators; the kernel takes one scale, float32 [1].
    accumulator_bits
        32 where the final sums fit, else 64.
    """

    left: tuple[Dimension, ...]
    right: tuple[Dimension, ...]
    left_data: Operand
    right_data: Operand
    output: Output
    accumulator_bits: Literal[32, 64] = 32

    def __post_init__(self) -> None:
        if len(self.left) < 2 or len(self.left) != len(self.right):
            raise UsageError(f"the operands need equally many axes, 2 or more: {self}")
        depth, columns = self.right[-2:]
        if depth is None or columns is None or depth < 1 or columns < 1 or self.left[-1] != depth:
            raise UsageError(
                f"depth and columns of a product must be known, positive and the same for both "
                f"operands: {self}"
            )
        for mine, other in zip(self.left[:-2], self.right[:-2], strict=True):
            if mine != other and 1 not in (mine, other):
                raise UsageError(f"the batches of {self} do not fit each other")
        for operand in (self.left_data, self.right_data):
            _check_weight_sums(operand, "int16", depth)

    @property
    def depth(self) -> int:
        """Length of the sums."""
        assert self.right[-2] is not None
        return self.right[-2]

    @property
    def columns(self) -> int:
        """Columns of the right operand."""
        assert self.right[-1] is not None
        return self.right[-1]

    @property
    def batch(self) -> tuple[Dimension, ...]:
        """Axes of the result before the last two."""
        pairs = zip(self.left[:-2], self.right[:-2], strict=True)
        return tuple(other if mine == 1 else mine for mine, other in pairs)
