"""The words that every part of bitwright speaks: layers, precisions and precision plans.

This module imports the standard library and :mod:`bitwright.errors` only, so that any part of the
package can import it and it loads in milliseconds.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

from bitwright.errors import PlanError

__all__ = [
    "ACTIVATION_FORMATS",
    "BIT_WIDTHS",
    "FLOAT_BITS",
    "Activation",
    "ActivationFormat",
    "Dim",
    "Layer",
    "LayerCost",
    "LayerKind",
    "ModelCost",
    "Precision",
    "PrecisionPlan",
]

BIT_WIDTHS: Final = (2, 4, 8, 16)
"""The widths, in bits, that weights and activations can have."""

PLAN_SCHEMA_VERSION: Final = 1

Dim: TypeAlias = int | str
"""One dimension of a shape: a number, or the name of a symbolic dimension ("?" if nameless)."""

LayerKind = Literal["conv", "matmul", "recurrent", "scan"]

ActivationFormat = Literal["int", "soft-edge", "soft-edge8", "soft-edge6", "soft-edge4"]
"""How codes of activations are laid out: integers of one step, or :mod:`bitwright.soft_edge`."""

ACTIVATION_FORMATS: Final[tuple[ActivationFormat, ...]] = get_args(ActivationFormat)

_SUFFIXES: Final[Mapping[ActivationFormat, str]] = {
    "int": "",
    "soft-edge": "se",
    "soft-edge8": "se8",
    "soft-edge6": "se6",
    "soft-edge4": "se4",
}
_FORMAT_BITS: Final[Mapping[ActivationFormat, int]] = {
    "soft-edge": 8,
    "soft-edge8": 8,
    "soft-edge6": 8,
    "soft-edge4": 4,
}

_ACTIVATION_PATTERN = r"a(0|[1-9][0-9]{0,8})(se[468]?)?"
_ACTIVATION_TEXT = re.compile(_ACTIVATION_PATTERN)
_PRECISION_TEXT = re.compile(r"w(0|[1-9][0-9]{0,8})" + _ACTIVATION_PATTERN)


def _check_width(name: str, bits: object) -> None:
    if type(bits) is not int or bits not in BIT_WIDTHS:  # True and 8.0 are no widths
        raise PlanError(
            f"{name} is {bits!r}, which is not a supported width",
            fix=f"choose one of {', '.join(map(str, BIT_WIDTHS))} bits",
        )


def _format_of(suffix: str | None) -> ActivationFormat:
    return next(name for name, text in _SUFFIXES.items() if text == (suffix or ""))


@dataclass(frozen=True, slots=True)
class Activation:
    """How the codes of a tensor are laid out.

    Parameters
    ----------
    bits
        2, 4, 8 or 16.
    format
        ``int``: integers of one step. ``soft-edge``: the three scales of Quamba-SE, 8 bits of
        magnitude and a sign; of 8 bits. ``soft-edge8``, ``soft-edge6``, ``soft-edge4``: segments
        chosen by calibration, that many bits a value, sign included, in words of 8, 8 and 4 bits.

    Raises
    ------
    PlanError
        If the width does not exist, or not for the format.

    Examples
    --------
    >>> Activation.parse("a8se8")
    Activation(bits=8, format='soft-edge8')
    """

    bits: int
    format: ActivationFormat = "int"

    def __post_init__(self) -> None:
        _check_width("activation_bits", self.bits)
        if self.format not in ACTIVATION_FORMATS:
            raise PlanError(
                f"activation_format is {self.format!r}",
                fix=f"choose one of {', '.join(ACTIVATION_FORMATS)}",
            )
        bits = _FORMAT_BITS.get(self.format, self.bits)
        if bits != self.bits:
            raise PlanError(
                f"there is no {self.format} with {self.bits} bits",
                fix=f"write a{bits}{_SUFFIXES[self.format]}: its words have {bits} bits",
            )

    @classmethod
    def parse(cls, text: str) -> Activation:
        """Read the text form, for example ``a8``, ``a8se`` or ``a4se4``."""
        match = _ACTIVATION_TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise PlanError(
                f"{text!r} is no form of activations",
                fix="write it like a8, or a8se, a8se8, a8se6, a4se4 for soft edge",
            )
        try:
            return cls(int(match[1]), _format_of(match[2]))
        except PlanError as error:
            raise PlanError(error.what, where=f"activation {text!r}", fix=error.fix) from None

    @classmethod
    def of_format(cls, name: ActivationFormat) -> Activation:
        """The form of a soft-edge format, which has one width."""
        return cls(_FORMAT_BITS[name], name)

    @property
    def stored_bits(self) -> int:
        """Bits of a code in memory and on a link of an accelerator: ``soft-edge`` takes 16."""
        return 16 if self.format == "soft-edge" else self.bits

    @property
    def operand_bits(self) -> int:
        """Bits that a multiplier is given: soft-edge codes are decoded to 16."""
        return self.bits if self.format == "int" else 16

    @classmethod
    def of(cls, value: Activation | str) -> Activation:
        """A form as it is, or read from its text form."""
        return value if isinstance(value, Activation) else cls.parse(value)

    def __str__(self) -> str:
        return f"a{self.bits}{_SUFFIXES[self.format]}"


@dataclass(frozen=True, slots=True)
class Precision:
    """The integer precision of one layer.

    Parameters
    ----------
    weight_bits, activation_bits
        Width of the weights and of the layer's input activations, in bits: 2, 4, 8 or 16.
    activation_format
        How the codes of the input activations are laid out; see :class:`Activation`.

    Raises
    ------
    PlanError
        If a width is not one of :data:`BIT_WIDTHS`, or a format does not exist at that width.

    Examples
    --------
    >>> Precision.parse("w4a8")
    Precision(weight_bits=4, activation_bits=8)
    >>> str(Precision(weight_bits=2, activation_bits=16))
    'w2a16'
    >>> Precision.parse("w8a8se").activation_format
    'soft-edge'
    """

    weight_bits: int
    activation_bits: int
    activation_format: ActivationFormat = "int"

    def __post_init__(self) -> None:
        _check_width("weight_bits", self.weight_bits)
        Activation(self.activation_bits, self.activation_format)

    @property
    def activation(self) -> Activation:
        """Width and format of the input activations."""
        return Activation(self.activation_bits, self.activation_format)

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read the text form, for example ``w4a8``: 4-bit weights, 8-bit activations."""
        match = _PRECISION_TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise PlanError(
                f"{text!r} is not a precision",
                fix="write it like w4a8: 4-bit weights and 8-bit activations "
                f"(widths {', '.join(map(str, BIT_WIDTHS))}; se, se8, se6 or se4 behind it for "
                "soft-edge activations)",
            )
        try:
            return cls(int(match[1]), int(match[2]), _format_of(match[3]))
        except PlanError as error:
            raise PlanError(error.what, where=f"precision {text!r}", fix=error.fix) from None

    @classmethod
    def of(cls, value: Precision | str) -> Precision:
        """A precision as it is, or read from its text form."""
        return value if isinstance(value, Precision) else cls.parse(value)

    def __str__(self) -> str:
        return f"w{self.weight_bits}{self.activation}"

    def __repr__(self) -> str:
        # The format shows where it is not the usual one.
        shown = f", activation_format={self.activation_format!r}"
        return (
            f"Precision(weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"
            f"{shown if self.activation_format != 'int' else ''})"
        )


Numbers: TypeAlias = "int | Sequence[int]"
"""One whole number for all axes, or one for each; NumPy's are taken too."""


def _numbers(name: str, value: Numbers, rank: int) -> tuple[int, ...]:
    given = list(value) if isinstance(value, Sequence) else [value] * rank
    try:
        numbers = tuple(operator.index(number) for number in given)
    except TypeError:
        numbers = ()
    boolean = any(isinstance(number, bool) for number in given)
    if len(numbers) != rank or boolean or any(number < 1 for number in numbers):
        raise ValueError(f"{name} must be {rank} positive whole numbers, not {value!r}")
    return numbers


@dataclass(frozen=True, slots=True)
class Layer:
    """One multiply-accumulate operator of a model: what the model asks of hardware.

    Build one with :meth:`conv`, :meth:`matmul` or :meth:`recurrent`; :func:`bitwright.inspect`
    finds those of a model. A number that depends on a symbolic dimension is None.

    Attributes
    ----------
    name
        The name of the ONNX node.
    kind
        ``conv``, ``matmul`` or ``recurrent`` (``scan`` is reserved).
    batch
        Images per run (conv), rows of the input matrix (matmul), sequences (recurrent).
    in_channels, out_channels
        Channels of input and output (conv); features (matmul, recurrent).
    kernel, stride, dilation
        One number a spatial dimension; empty for matmul.
    output
        Spatial size of the output; empty for matmul.
    groups
        Groups of a convolution; directions of a recurrence, whose features are those of all; 1 for
        matmul.
    steps
        Steps of a recurrence, which cannot run at the same time; 1 for the other kinds.
    reads_graph_input
        Whether the layer's input is an input of the model, with no other layer in between.
    input_shape, weight_shape, output_shape
        Shapes as they stand in the ONNX model; empty where the layer was built without a model.
    """

    name: str
    kind: LayerKind
    batch: int | None
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    output: tuple[int | None, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    steps: int | None = 1
    reads_graph_input: bool = False
    input_shape: tuple[Dim, ...] = ()
    weight_shape: tuple[int, ...] = ()
    output_shape: tuple[Dim, ...] = ()

    @classmethod
    def conv(
        cls,
        *,
        in_channels: int,
        out_channels: int,
        kernel: Numbers,
        output: Numbers,
        stride: Numbers = 1,
        dilation: Numbers = 1,
        batch: int = 1,
        groups: int = 1,
        reads_graph_input: bool = False,
        name: str = "conv",
    ) -> Layer:
        """Describe a convolution; a single number stands for both spatial dimensions.

        Raises
        ------
        ValueError
            If a number is not positive or the groups do not divide the channels.
        """
        sizes = (kernel, output, stride, dilation)
        rank = next((len(size) for size in sizes if isinstance(size, Sequence)), 2)
        in_channels, out_channels, batch, groups = _numbers(
            "channels, batch and groups", (in_channels, out_channels, batch, groups), 4
        )
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{groups} groups do not divide {in_channels} and {out_channels}")
        return cls(
            name=name,
            kind="conv",
            batch=batch,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel=_numbers("kernel", kernel, rank),
            output=_numbers("output", output, rank),
            stride=_numbers("stride", stride, rank),
            dilation=_numbers("dilation", dilation, rank),
            groups=groups,
            reads_graph_input=reads_graph_input,
        )

    @classmethod
    def matmul(
        cls, *, rows: int, in_features: int, out_features: int, name: str = "matmul"
    ) -> Layer:
        """Describe a matrix product ``[rows, in_features] x [in_features, out_features]``.

        Raises
        ------
        ValueError
            If a number is not positive.
        """
        rows, in_features, out_features = _numbers(
            "rows and features", (rows, in_features, out_features), 3
        )
        return cls(
            name=name,
            kind="matmul",
            batch=rows,
            in_channels=in_features,
            out_channels=out_features,
        )

    @classmethod
    def recurrent(
        cls,
        *,
        in_features: int,
        out_features: int,
        steps: int,
        batch: int = 1,
        groups: int = 1,
        name: str = "recurrent",
    ) -> Layer:
        """Describe the matrix products of a recurrence, one a step, each waiting for the last.

        The directions of a bidirectional one are groups; features are those of all groups.

        Raises
        ------
        ValueError
            If a number is not positive or the groups do not divide the features.
        """
        in_features, out_features, steps, batch, groups = _numbers(
            "features, steps, batch and groups",
            (in_features, out_features, steps, batch, groups),
            5,
        )
        if in_features % groups or out_features % groups:
            raise ValueError(f"{groups} groups do not divide {in_features} and {out_features}")
        return cls(
            name=name,
            kind="recurrent",
            batch=batch,
            in_channels=in_features,
            out_channels=out_features,
            groups=groups,
            steps=steps,
        )

    @property
    def weight_count(self) -> int:
        """Number of weights, without bias."""
        if self.weight_shape:
            return math.prod(self.weight_shape)
        return self.in_channels // self.groups * math.prod(self.kernel) * self.out_channels

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one run; None while a dimension it needs is symbolic."""
        if self.batch is None or self.steps is None or None in self.output:
            return None
        per_output = self.in_channels // self.groups * math.prod(self.kernel)
        positions = math.prod(size for size in self.output if size is not None)
        return self.steps * self.batch * positions * per_output * self.out_channels


def _total(values: Iterable[float | None]) -> float | None:
    """Sum in the order given; None if one of them is undefined, or there is none."""
    found = list(values)
    defined = [value for value in found if value is not None]
    return sum(defined) if found and len(defined) == len(found) else None


def _speedup(cost: LayerCost | ModelCost, baseline: LayerCost | ModelCost) -> float | None:
    for name in ("cycles", "relative_cycles"):
        before, now = getattr(baseline, name), getattr(cost, name)
        if before is not None and now:
            return float(before / now)
    return None


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer costs on an accelerator at one precision.

    What the cost model of the accelerator does not define is None, shown as "-".

    Attributes
    ----------
    layer
        Name of the layer.
    precision
        Its precision.
    macs
        Multiply-accumulates of one run.
    weight_bits
        Bits that the weights take, without bias.
    cycles
        Clock cycles, stalls included.
    stall_cycles
        Those of them in which the array waits for memory.
    dram_read_bits, dram_write_bits
        Traffic with external memory, in bits.
    relative_cycles
        Where a model knows ratios only: multiply-accumulates divided by the speed of the precision
        relative to the accelerator's slowest (MOHAQ's tables). Never mixed with ``cycles``.
    energy_pj
        Energy by part, in picojoules.
    seconds
        Time at the accelerator's clock.
    peak_macs_per_cycle
        What the array does in a cycle at this precision when all of it works.
    bound
        What limits the layer.
    """

    layer: str
    precision: Precision
    macs: int
    weight_bits: int
    cycles: float | None = None
    stall_cycles: float | None = None
    dram_read_bits: float | None = None
    dram_write_bits: float | None = None
    relative_cycles: float | None = None
    energy_pj: Mapping[str, float] | None = None
    seconds: float | None = None
    peak_macs_per_cycle: float | None = None
    bound: Literal["compute", "memory"] | None = None

    NUMBERS: ClassVar[tuple[str, ...]] = (
        *("macs", "weight_bits", "cycles", "stall_cycles", "dram_read_bits", "dram_write_bits"),
        *("relative_cycles", "seconds", "peak_macs_per_cycle"),
    )

    @classmethod
    def of(
        cls,
        layer: Layer,
        precision: Precision,
        *,
        cycles: float | None = None,
        stall_cycles: float | None = None,
        dram_read_bits: float | None = None,
        dram_write_bits: float | None = None,
        relative_cycles: float | None = None,
        energy_pj: Mapping[str, float] | None = None,
        seconds: float | None = None,
        peak_macs_per_cycle: float | None = None,
        bound: Literal["compute", "memory"] | None = None,
    ) -> LayerCost:
        """Make the cost of a layer whose sizes are all known; see the attributes."""
        assert layer.macs is not None
        return cls(
            layer.name,
            precision,
            layer.macs,
            layer.weight_count * precision.weight_bits,
            cycles,
            stall_cycles,
            dram_read_bits,
            dram_write_bits,
            relative_cycles,
            energy_pj,
            seconds,
            peak_macs_per_cycle,
            bound,
        )

    @property
    def total_energy_pj(self) -> float | None:
        """Energy of all parts, in picojoules."""
        return None if self.energy_pj is None else sum(self.energy_pj.values())

    @property
    def utilization(self) -> float | None:
        """Share, 0 to 1, of the multiply-accumulates that the array could do in all its cycles."""
        if self.cycles is None or self.peak_macs_per_cycle is None:
            return None
        return self.macs / (self.cycles * self.peak_macs_per_cycle)

    def speedup_over(self, baseline: LayerCost) -> float | None:
        """Cycles of the baseline over cycles; relative ones where the model knows no others."""
        return _speedup(self, baseline)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` and ``cost.json`` hold."""
        document = {name: getattr(self, name) for name in self.__slots__}
        return {
            **document,
            "precision": str(self.precision),
            "energy_pj": None if self.energy_pj is None else dict(self.energy_pj),
            "total_energy_pj": self.total_energy_pj,
            "utilization": self.utilization,
        }


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model costs on an accelerator: the sum over its layers, which run one after another.

    Attributes
    ----------
    target
        Name of the accelerator.
    layers
        Cost of every layer, in order of execution.
    vector_bits
        Bits of the values beside the weights that are counted as memory (biases and the like).
    vector_energy_pj
        Energy of loading them, in picojoules, where the cost model defines it.
    capacity_bits
        What the accelerator's memory for weights holds; None where weights are streamed.
    """

    target: str
    layers: tuple[LayerCost, ...]
    vector_bits: int = 0
    vector_energy_pj: float | None = None
    capacity_bits: int | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        return sum(layer.macs for layer in self.layers)

    @property
    def memory_bits(self) -> int:
        """Bits of all weights, and of the values beside them."""
        return self.vector_bits + sum(layer.weight_bits for layer in self.layers)

    @property
    def fits(self) -> bool:
        """Whether the accelerator's memory holds the weights."""
        return self.capacity_bits is None or self.memory_bits <= self.capacity_bits

    @property
    def cycles(self) -> float | None:
        """Clock cycles of all layers, stalls included."""
        return _total(layer.cycles for layer in self.layers)

    @property
    def stall_cycles(self) -> float | None:
        """Cycles in which the array waits for memory."""
        return _total(layer.stall_cycles for layer in self.layers)

    @property
    def dram_read_bits(self) -> float | None:
        """Bits read from external memory."""
        return _total(layer.dram_read_bits for layer in self.layers)

    @property
    def dram_write_bits(self) -> float | None:
        """Bits written to external memory."""
        return _total(layer.dram_write_bits for layer in self.layers)

    @property
    def relative_cycles(self) -> float | None:
        """Sum of multiply-accumulates over relative speeds, see :class:`LayerCost`."""
        return _total(layer.relative_cycles for layer in self.layers)

    @property
    def seconds(self) -> float | None:
        """Time at the accelerator's clock."""
        return _total(layer.seconds for layer in self.layers)

    @property
    def energy_pj(self) -> dict[str, float] | None:
        """Energy by part, in picojoules; that of the values beside the weights is ``vectors``."""
        parts: dict[str, float] = {}
        for layer in self.layers:
            if layer.energy_pj is None:
                return None
            for part, energy in layer.energy_pj.items():
                parts[part] = parts.get(part, 0.0) + energy
        if self.vector_energy_pj is not None and self.vector_bits:
            parts["vectors"] = self.vector_energy_pj
        return parts or None

    @property
    def total_energy_pj(self) -> float | None:
        """Energy of all parts, in picojoules."""
        parts = self.energy_pj
        return None if parts is None else sum(parts.values())

    @property
    def memory_bound_share(self) -> float | None:
        """Share, 0 to 1, of the cycles that are those of layers bound by memory."""
        if not self.cycles or any(layer.bound is None for layer in self.layers):
            return None
        bound = sum(layer.cycles or 0 for layer in self.layers if layer.bound == "memory")
        return bound / self.cycles

    @property
    def utilization(self) -> float | None:
        """Share, 0 to 1, of the multiply-accumulates that the array could do in all its cycles."""
        peaks = [
            None
            if layer.cycles is None or layer.peak_macs_per_cycle is None
            else layer.cycles * layer.peak_macs_per_cycle
            for layer in self.layers
        ]
        peak = _total(peaks)
        return None if not peak else self.macs / peak

    def speedup_over(self, baseline: ModelCost) -> float | None:
        """End-to-end speedup: cycles of the baseline over cycles of this plan.

        Not MOHAQ's speedup, which is a mean over operations: :mod:`bitwright.targets.mohaq`.
        """
        return _speedup(self, baseline)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` and ``cost.json`` hold."""
        names = (
            *("macs", "memory_bits", "cycles", "stall_cycles", "relative_cycles"),
            *("dram_read_bits", "dram_write_bits", "seconds", "energy_pj", "total_energy_pj"),
            *("utilization", "memory_bound_share"),
        )
        return {
            "target": self.target,
            "capacity_bits": self.capacity_bits,
            "fits": self.fits,
            "vector_bits": self.vector_bits,
            "total": {name: getattr(self, name) for name in names},
            "layers": [layer.to_dict() for layer in self.layers],
        }


FLOAT_BITS = 32
"""Where a number of bits may stand: float32."""


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """The precision of every layer of one model.

    Parameters
    ----------
    layers
        Layer name to precision, as such or as a text; all layers of the model, no others.
    structure_hash
        Hash of graph, names and shapes of the model (not of its weights): decides whether the plan
        fits a model. None fits any model with these layer names (a plan written by hand).
    weights_hash
        Hash of the weights the plan was made with; recorded and reported only.
    target
        Tag of the accelerator the plan was made for, or None.
    elementwise_bits
        Width, 8 or 16 bits, of the activations that no layer reads but integer elementwise
        operators do (residual additions, pooling averages, inputs of tables).
    loop_bits
        The same in the bodies of loops (LSTM, GRU, RNN, Scan, Loop): 8 or 16 bits of fixed point,
        or 32 for float32.
    scan_inputs
        What selective scans (Mamba) read, by the names of tensors in the model, to how it is
        quantized, a form or its text. Those that are not named stay float32.
    percentiles
        Names of tensors that layers or selective scans read, to the share of their values, in
        percent, that their range keeps there; for the others an option of the quantizer says so.
        Elementwise operators read codes of their own, unless they have the same form.
    """

    layers: Mapping[str, Precision]
    structure_hash: str | None = None
    weights_hash: str | None = None
    target: str | None = None
    elementwise_bits: int = 16
    loop_bits: int = FLOAT_BITS
    scan_inputs: Mapping[str, Activation] = field(default_factory=dict)
    percentiles: Mapping[str, float] = field(default_factory=dict)
    schema_version: int = field(default=PLAN_SCHEMA_VERSION)

    def __post_init__(self) -> None:
        if type(self.elementwise_bits) is not int or self.elementwise_bits not in (8, 16):
            raise PlanError(
                f"elementwise_bits is {self.elementwise_bits!r}", fix="choose 8 or 16 bits"
            )
        if type(self.loop_bits) is not int or self.loop_bits not in (8, 16, FLOAT_BITS):
            raise PlanError(
                f"loop_bits is {self.loop_bits!r}",
                fix="choose 8 or 16 bits of fixed point, or 32 for float32",
            )
        layers = {name: Precision.of(entry) for name, entry in self.layers.items()}
        object.__setattr__(self, "layers", layers)
        scan_inputs = {name: Activation.of(form) for name, form in self.scan_inputs.items()}
        object.__setattr__(self, "scan_inputs", scan_inputs)
        for name, percent in self.percentiles.items():
            number = isinstance(percent, int | float) and not isinstance(percent, bool)
            if not number or not 0.0 < percent <= 100.0:
                raise PlanError(
                    f"the percentile of {name!r} is {percent!r}",
                    fix="give a number above 0 and at most 100",
                )

    def to_json(self) -> str:
        """Write the plan as JSON text, one layer a line."""
        document: dict[str, Any] = {
            "schema_version": self.schema_version,
            "target": self.target,
            "structure_hash": self.structure_hash,
            "weights_hash": self.weights_hash,
            "elementwise_bits": self.elementwise_bits,
            "loop_bits": self.loop_bits,
            "layers": {name: str(precision) for name, precision in self.layers.items()},
        }
        if self.scan_inputs:
            document["scan_inputs"] = {name: str(form) for name, form in self.scan_inputs.items()}
        if self.percentiles:
            document["percentiles"] = dict(self.percentiles)
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "plan") -> PrecisionPlan:
        """Read a plan from JSON text.

        Parameters
        ----------
        text
            What :meth:`to_json` writes; only ``schema_version`` and ``layers`` are required.
        where
            The file the text comes from, for error messages.

        Raises
        ------
        PlanError
            If the text is no JSON, a field is missing, unknown or of the wrong type, a precision
            does not exist, or the schema is newer than this version of bitwright.
        """

        def duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in pairs:
                if key in found:
                    raise PlanError(f"{key!r} stands twice", where=where, fix="remove one of them")
                found[key] = value
            return found

        try:
            document = json.loads(text, object_pairs_hook=duplicates)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
            raise PlanError(
                f"not a JSON document ({error})", where=where, fix="see docs/precision-plans.md"
            ) from error
        if not isinstance(document, dict):
            raise PlanError("the plan must be a JSON object", where=where)
        version = document.get("schema_version")
        if type(version) is not int or version != PLAN_SCHEMA_VERSION:
            raise PlanError(
                f"schema_version is {version!r}",
                where=where,
                fix=f"this version of bitwright reads schema version {PLAN_SCHEMA_VERSION}",
            )
        known = {
            "schema_version",
            "target",
            "structure_hash",
            "weights_hash",
            "elementwise_bits",
            "loop_bits",
            "scan_inputs",
            "percentiles",
            "layers",
        }
        if unknown := sorted(set(document) - known):
            raise PlanError(
                f"unknown field {unknown[0]!r}",
                where=where,
                fix=f"the fields of a plan are {', '.join(sorted(known))}",
            )
        for name in ("target", "structure_hash", "weights_hash"):
            if not isinstance(document.get(name), str | None):
                raise PlanError(f"{name} must be a text or null", where=where)
        for name in ("scan_inputs", "percentiles"):
            if not isinstance(document.get(name, {}), dict):
                raise PlanError(f"{name} must be an object of tensor names", where=where)
        layers = document.get("layers")
        if not isinstance(layers, dict):
            raise PlanError(
                "layers must be an object of layer names and precisions",
                where=where,
                fix='for example {"conv1": "w8a8"}',
            )
        precisions = {}
        for name, entry in layers.items():
            try:
                precisions[name] = Precision.parse(entry)
            except PlanError as error:
                place = f"{where}, layer {name!r}"
                raise PlanError(error.what, where=place, fix=error.fix) from None
        scan_inputs = {}
        for name, entry in document.get("scan_inputs", {}).items():
            try:
                scan_inputs[name] = Activation.parse(entry)
            except PlanError as error:
                place = f"{where}, scan input {name!r}"
                raise PlanError(error.what, where=place, fix=error.fix) from None
        try:
            return cls(
                layers=precisions,
                structure_hash=document.get("structure_hash"),
                weights_hash=document.get("weights_hash"),
                target=document.get("target"),
                elementwise_bits=document.get("elementwise_bits", 16),
                loop_bits=document.get("loop_bits", FLOAT_BITS),
                scan_inputs=scan_inputs,
                percentiles=document.get("percentiles", {}),
            )
        except PlanError as error:
            raise PlanError(error.what, where=where, fix=error.fix) from None
