"""PermuteChannels: channels in an order in which the stream of weights toggles less.

Between two layers, the order of the channels is free: if the output channels of one and the input
channels of the next are permuted together, nothing else changes. Weights are constant, so this is
done when the model is compiled and needs no hardware::

    q1 = cls.conv1_layer(q)      # weights[o], bias[o], multiplier[o]
    q2 = R.nn.max_pool2d(q1)
    q3 = cls.conv2_layer(q2)     # weights[:, c]
    ->
    q1 = cls.conv1_layer(q)      # weights[order], bias[order], multiplier[order]
    q2 = R.nn.max_pool2d(q1)
    q3 = cls.conv2_layer(q2)     # weights[:, order]

A *group* is a set of channel axes that share one order: those of a value and of all that carries
its channels on. Operators that work channel by channel join the groups of their operands (a
residual sum makes one of two), a depthwise convolution passes its group on and is permuted itself;
through a reshape a channel becomes several entries. A group whose channels reach anything else (an
output of the model, a concatenation, a constant of a value a channel, a grouped convolution) keeps
its order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from bitwright.errors import UsageError
from bitwright.passes.expressions import (
    CallRewriter,
    calls,
    constant,
    is_layer,
    is_move,
    operator,
    rewriting,
    static_shape,
)
from bitwright.targets.codegen import IntegerLayer, read_layer
from bitwright.targets.kernels.spec import Convolution, Matmul
from bitwright.targets.link import Link, Words
from bitwright.targets.weight_stream import Axis, Neighbours, WeightStream, arranged

__all__ = ["PERMUTED", "PermuteChannels"]

#: Attribute of the module: transitions of the weights of each layer and sample, before and after.
PERMUTED = "bitwright.permuted_channels"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Channels:
    """The channels of a value: which group, along which axis of it, in blocks of how many."""

    group: int
    axis: int
    inner: int


@dataclass
class _Layer:
    """A layer with constant weights; several functions where its sums are used in several ways."""

    title: str
    functions: list[Any]
    weights: Array  # [output channels, terms]
    positions: int
    taps: int  # terms that belong to an entry of the input's channel axis
    inputs: tuple[int, Axis] | None = None  # group, and the channels among the terms
    outputs: tuple[int, Axis] | None = None


class _Groups:
    """Groups of channel axes that share one order (union-find)."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self.sizes: list[int] = []
        self._fixed: set[int] = set()

    def new(self, channels: int) -> int:
        self._parents.append(len(self._parents))
        self.sizes.append(channels)
        return len(self._parents) - 1

    def find(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        self._parents[second] = first
        if second in self._fixed:
            self._fixed.add(first)

    def fix(self, group: int) -> None:
        self._fixed.add(self.find(group))

    def free(self) -> list[int]:
        """Groups that may be permuted."""
        roots = dict.fromkeys(map(self.find, range(len(self._parents))))
        return [root for root in roots if root not in self._fixed and self.sizes[root] > 1]


# One value of the result depends on one of each operand, with the same bits wherever it stands.
_ELEMENTWISE = frozenset(
    "add astype bitwright.requantize clip dequantize maximum minimum multiply nn.relu quantize"
    " subtract".split()
)


class _Analysis:
    """Which layers share the order of which channels."""

    def __init__(self, mod: Any) -> None:
        self._mod = mod
        self.groups = _Groups()
        self.layers: list[_Layer] = []
        self._channels: dict[Any, _Channels] = {}
        used = Counter(
            call.op
            for function in mod.functions.values()
            if isinstance(function, relax.Function)
            for call in calls(function)
            if isinstance(call.op, tvm.ir.GlobalVar)
        )
        self._once = {variable for variable, count in used.items() if count == 1}
        main = mod["main"]
        if not isinstance(main.body, relax.SeqExpr):
            return
        for block in main.body.blocks:
            for binding in block.bindings:
                self._visit(binding)
        self._fix(main.body.body)

    def _fix(self, expr: Any) -> None:
        for used in relax.analysis.free_vars(expr):
            if used in self._channels:
                self.groups.fix(self._channels[used].group)

    def _visit(self, binding: Any) -> None:
        expr = binding.value
        if isinstance(binding, relax.VarBinding):
            if isinstance(expr, relax.Var):
                found = self._channels.get(expr)
            elif isinstance(expr, relax.Call):
                found = self._call(expr)
            else:
                found = None
            if found is not None:
                self._channels[binding.var] = found
                return
        self._fix(expr)

    def _call(self, call: Any) -> _Channels | None:
        """The channels of a result; None if they are not known, and those of operands are fixed."""
        if isinstance(call.op, tvm.ir.GlobalVar):
            function = self._mod[call.op]
            return self._layer(call, function) if is_layer(function) else None
        name = operator(call)
        if name in _ELEMENTWISE:
            return self._elementwise(call, name)
        if name == "take":
            table = constant(call.args[0])
            found = self._channels.get(call.args[1])
            return found if table is not None and table.ndim == 1 else None
        found = self._channels.get(call.args[0]) if call.args else None
        shape = static_shape(call)
        before = static_shape(call.args[0]) if found is not None else None
        if found is None or shape is None or before is None:
            return None
        if name == "call_tir":
            return None
        if name == "nn.pad":
            widths = [int(width) for width in call.attrs.pad_width]
            kept = not any(widths[2 * found.axis : 2 * found.axis + 2])
            return found if kept else None
        if name.startswith("nn.max_pool") or name == "image.resize2d":
            layout = str(call.attrs.layout)
            return found if is_move(call) and layout[:2] == "NC" and found.axis == 1 else None
        if name in ("sum", "max", "min"):
            return self._reduced(call, found, len(before))
        if name == "permute_dims":
            axes = call.attrs.axes
            order = range(len(before))[::-1] if axes is None else [int(axis) for axis in axes]
            axis = [axis % len(before) for axis in order].index(found.axis)
            return _Channels(found.group, axis, found.inner)
        if name in ("reshape", "flatten", "expand_dims", "squeeze"):
            return self._reshaped(found, before, shape)
        return None

    def _reduced(self, call: Any, found: _Channels, rank: int) -> _Channels | None:
        axes = call.attrs.axis
        removed = range(rank) if axes is None else [int(axis) % rank for axis in axes]
        if found.axis in removed:
            return None
        # Sums of floats may be added up in another order elsewhere.
        if operator(call) == "sum" and not str(call.ty.dtype).startswith("int"):
            return None
        ahead = 0 if call.attrs.keepdims else sum(axis < found.axis for axis in removed)
        return _Channels(found.group, found.axis - ahead, found.inner)

    def _reshaped(
        self, found: _Channels, before: Sequence[int | None], shape: Sequence[int | None]
    ) -> _Channels | None:
        behind = before[found.axis + 1 :]
        if None in behind:
            return None
        inner = found.inner * math.prod(size for size in behind if size is not None)
        step = 1  # elements from one entry of an axis to the next
        for axis in reversed(range(len(shape))):
            size = shape[axis]
            if size is None or inner % step:
                return None
            block = self.groups.sizes[found.group] * (inner // step)
            if size % block == 0 and size > 1:
                return _Channels(found.group, axis, inner // step)
            step *= size
        return None

    def _elementwise(self, call: Any, name: str) -> _Channels | None:
        shape = static_shape(call)
        found: _Channels | None = None
        if shape is None:
            return None
        operands = [entry for entry in call.args if isinstance(entry.ty, relax.TensorType)]
        for entry in operands:
            channels = self._channels.get(entry)
            if channels is None:
                continue
            if entry.ty.ndim != len(shape) or static_shape(entry)[channels.axis] is None:
                return None
            if found is None:
                found = channels
            elif (channels.axis, channels.inner) != (found.axis, found.inner):
                return None
        if found is None:
            return None
        for entry in operands:
            sizes = static_shape(entry)
            place = None if sizes is None else found.axis - len(shape) + len(sizes)
            same = sizes is not None and place >= 0 and sizes[place] == shape[found.axis]
            if entry in self._channels:
                if not same:
                    return None
            # The vectors of quantizers have an axis of their own.
            elif name in ("quantize", "dequantize"):
                if constant(entry) is None or constant(entry).size != 1:
                    return None
            elif sizes is None or (place >= 0 and sizes[place] != 1):
                return None
        for entry in operands:
            if entry in self._channels:
                self.groups.join(found.group, self._channels[entry].group)
        return found

    # -- layers ------------------------------------------------------------------------------------

    def _layer(self, call: Any, function: Any) -> _Channels | None:
        read = read_layer(function)
        stored = None if read is None else constant(read.weights)
        if read is None or stored is None or call.op not in self._once:
            return None
        spec, data = read.spec, self._channels.get(call.args[0])
        if isinstance(spec, Convolution):
            weights, taps = stored.reshape(len(stored), -1), math.prod(spec.kernel)
            positions, axis = math.prod(spec.output_size), 1
            depthwise = spec.groups > 1 and spec.groups == spec.in_channels
            if spec.groups > 1 and not depthwise:
                return None
        elif isinstance(spec, Matmul):
            weights, taps, depthwise = stored.T, 1, False
            axis = len(spec.leading)
            if None in spec.leading[1:]:
                return None  # how often weights are sent is not known
            positions = math.prod(size for size in spec.leading[1:] if size is not None)
        else:
            return None
        if data is not None and data.axis != axis:
            return None
        layer = self._known(str(function.attrs["layer"]), call.op, weights, positions, taps)
        outputs = len(weights)
        if depthwise:
            if data is None:
                return None
            inner = data.inner * (outputs // spec.in_channels)
            return self._ends(layer, data.group, axis, inner)
        if data is not None:
            size = self.groups.sizes[data.group]
            entries = weights.shape[1] // taps
            among = Axis(size, entries // (size * data.inner), data.inner * taps)
            if layer.inputs is not None:
                if layer.inputs[1] != among:
                    return None
                self.groups.join(layer.inputs[0], data.group)
            layer.inputs = data.group, among
        return self._ends(layer, None, axis, 1)

    def _known(
        self, title: str, variable: Any, weights: Array, positions: int, taps: int
    ) -> _Layer:
        for layer in self.layers:
            if layer.title == title and np.array_equal(layer.weights, weights):
                layer.functions.append(variable)
                return layer
        self.layers.append(_Layer(title, [variable], weights, positions, taps))
        return self.layers[-1]

    def _ends(self, layer: _Layer, group: int | None, axis: int, inner: int) -> _Channels:
        """The channels of a layer's result: of its input's group, or of one of its own."""
        size = len(layer.weights)
        if layer.outputs is not None and group is None:
            group = layer.outputs[0]
        elif layer.outputs is not None and group is not None:
            self.groups.join(layer.outputs[0], group)
        elif group is None:
            group = self.groups.new(size)
        channels = self.groups.sizes[group]
        layer.outputs = group, Axis(channels, size // (channels * inner), inner)
        return _Channels(group, axis, inner)
