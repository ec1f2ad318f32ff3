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
output of the model, a concatenation or slice of channels, an operator with a constant for each
channel, a grouped convolution, a loop or a branch) keeps its order. So do the channels of layers
whose weights are sent a number of times that is not known (a product with symbolic rows).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator as operators
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, sym, tirx

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
from bitwright.passes.lower_to_integer import CHANNELWISE
from bitwright.targets import get_link
from bitwright.targets.codegen import read_layer
from bitwright.targets.kernels.spec import Convolution, Matmul
from bitwright.targets.link import Link, Words
from bitwright.targets.weight_stream import Axis, Neighbours, WeightStream, arranged

__all__ = ["PERMUTED", "PermuteChannels"]

#: Attribute of the module: transitions of the weights of each layer and sample, before and after.
PERMUTED = "bitwright.permuted_channels"

Array: TypeAlias = npt.NDArray[Any]
IntArray: TypeAlias = npt.NDArray[np.int64]

# Words times pairs of channels up to which orders are compared by their exact counts.
_EXACT_WORK: Final = 1 << 24


@dataclass(frozen=True)
class _Channels:
    """The channels of a value: which group, along which axis of it, in blocks of how many."""

    group: int
    axis: int
    inner: int


@dataclass(frozen=True)
class _Layer:
    """A layer with constant weights; several functions where its sums are used in several ways.

    Attributes
    ----------
    title, functions
        The ONNX node, and the variables of its functions.
    data
        The variable of its input.
    weights, positions
        Weights, shape (output channels, terms), and how often they are used for a sample.
    outputs, inputs
        Group of its output channels, and where they are among all of them; of its input channels,
        and where they are among the terms.
    result
        The channels of what it returns.
    """

    title: str
    functions: list[Any]
    data: Any
    weights: Array
    positions: int
    outputs: tuple[int, Axis]
    inputs: tuple[int, Axis] | None
    result: _Channels

    @property
    def ends(self) -> list[tuple[int, Axis]]:
        """Outputs and inputs; those of a depthwise convolution are one."""
        return [self.outputs] if self.inputs is None else [self.outputs, self.inputs]


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
        self._batch = tirx.IntImm("int64", 1)
        first: Any = main.params[0].ty if main.params else None
        if isinstance(first, relax.TensorType) and first.shape is not None and first.ndim:
            self._batch = first.shape[0]
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
        if name == "call_tir":
            function, fields = self._mod[call.args[0]], call.args[1].fields
            found = self._channels.get(fields[0])
            apart = CHANNELWISE in (function.attrs or {}) and len(fields) == 1
            return found if apart and found is not None and found.axis == 1 else None
        found = self._channels.get(call.args[0]) if call.args else None
        if found is None or not isinstance(call.ty, relax.TensorType):
            return None
        shape, before = static_shape(call), static_shape(call.args[0])
        if shape is None or before is None:
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
        operands = [entry for entry in call.args if isinstance(entry.ty, relax.TensorType)]
        channels = [self._channels[entry] for entry in operands if entry in self._channels]
        if shape is None or not channels:
            return None
        first, size = channels[0], self.groups.sizes[channels[0].group]
        for entry in operands:
            sizes = static_shape(entry)
            if sizes is None:
                return None
            place = first.axis - len(shape) + len(sizes)  # shapes are aligned at their ends
            along = sizes[place] if place >= 0 else 1
            other = self._channels.get(entry)
            if other is not None:
                same = len(sizes) == len(shape) and along == shape[first.axis]
                alike = (other.axis, other.inner) == (first.axis, first.inner)
                if not same or not alike or self.groups.sizes[other.group] != size:
                    return None
            elif name in ("quantize", "dequantize"):  # their vectors have an axis of their own
                if math.prod(n or 0 for n in sizes) != 1:
                    return None
            elif along != 1:
                return None
        for entry in channels[1:]:
            self.groups.join(first.group, entry.group)
        return first

    # -- layers ------------------------------------------------------------------------------------

    def _layer(self, call: Any, function: Any) -> _Channels | None:
        read = read_layer(function)
        stored = None if read is None else constant(read.weights)
        if read is None or stored is None or call.op not in self._once:
            return None
        spec = read.spec
        filters = 0  # of each channel of a depthwise convolution
        if isinstance(spec, Convolution):
            taps, axis, inner = math.prod(spec.kernel), 1, math.prod(spec.output_size)
            if 1 < spec.groups == spec.in_channels:
                filters = spec.out_channels // spec.in_channels
            elif spec.groups > 1:
                return None
        elif isinstance(spec, Matmul):
            taps, axis, inner = 1, len(spec.leading), 1
        else:
            return None
        each = self._each_sample(list(call.args[0].ty.shape)[:axis])
        if each is None:
            return None
        weights = _rows(stored, convolution=isinstance(spec, Convolution))
        data = self._channels.get(call.args[0])
        if (data is None and filters) or (data is not None and data.axis != axis):
            return None
        title = str(function.attrs["layer"])
        for layer in self.layers:
            if layer.title == title and layer.data.same_as(call.args[0]):
                if not np.array_equal(layer.weights, weights):
                    return None
                layer.functions.append(call.op)
                return layer.result
        count, outputs = weights.shape[1] // taps, len(weights)
        inputs = None
        if data is not None and filters:
            result = _Channels(data.group, axis, data.inner * filters)
        else:
            result = _Channels(self.groups.new(outputs), axis, 1)
            if data is not None:
                inputs = data.group, self._axis(data, count, taps)
        self.layers.append(
            _Layer(
                title,
                [call.op],
                call.args[0],
                weights,
                each * inner,
                (result.group, self._axis(result, outputs)),
                inputs,
                result,
            )
        )
        return result

    def _each_sample(self, sizes: Sequence[Any]) -> int | None:
        """How many images or rows each sample has; None if that is not known."""
        count = functools.reduce(operators.mul, sizes)
        analyzer = sym.Analyzer()
        each = analyzer.simplify(tirx.floordiv(count, self._batch))
        if not analyzer.can_prove_equal(each * self._batch, count):
            each = count  # all that is sent at once
        return int(each) if isinstance(each, tirx.IntImm | int) else None

    def _axis(self, channels: _Channels, entries: int, taps: int = 1) -> Axis:
        size = self.groups.sizes[channels.group]
        return Axis(size, entries // (size * channels.inner), channels.inner * taps)


class _Search:
    """Orders of the channels of all groups, one group after the other."""

    def __init__(self, analysis: _Analysis, link: Link) -> None:
        self._groups = analysis.groups
        self._orders: dict[int, IntArray] = {}
        free = self._groups.free()
        self._layers = [
            layer
            for layer in analysis.layers
            if any(self._groups.find(group) in free for group, _ in layer.ends)
        ]
        self._words = [_words(layer, link) for layer in self._layers]
        self._streams = [
            WeightStream(len(words), words.shape[1], layer.positions, link)
            for layer, words in zip(self._layers, self._words, strict=True)
        ]
        before = self._counts()
        for group in free:
            self._arrange(group)
        titles = [layer.title for layer in self._layers]
        #: Layer to transitions of its weights for one sample, before and after.
        self.transitions = dict(zip(titles, zip(before, self._counts(), strict=True), strict=True))

    def _counts(self) -> list[int]:
        return [
            stream.count(words) for stream, words in zip(self._streams, self._words, strict=True)
        ]

    def entries(self, layer: _Layer) -> list[IntArray | None]:
        """Which output channel and which term stands at each place; None where nothing moved."""
        return [
            axis.entries(self._orders[self._groups.find(group)])
            if self._groups.find(group) in self._orders
            else None
            for group, axis in layer.ends
        ]

    def _arrange(self, group: int) -> None:
        """Give a group an order in which the weights of its layers toggle less, if there is one."""
        ends = [
            (number, along, axis)
            for number, layer in enumerate(self._layers)
            for along, (found, axis) in enumerate(layer.ends)
            if self._groups.find(found) == group
        ]
        members = dict.fromkeys(number for number, _, _ in ends)

        def reordered(order: IntArray) -> dict[int, Words]:
            found = {number: self._words[number] for number in members}
            for number, along, axis in ends:
                found[number] = found[number].take(axis.entries(order), along)
            return found

        def total(order: IntArray) -> int:
            return sum(
                self._streams[number].count(words) for number, words in reordered(order).items()
            )

        neighbours: list[Neighbours] = []
        for number, along, axis in ends:
            stream = self._streams[number]
            between = stream.between_inputs if along else stream.between_outputs
            neighbours += between(self._words[number], axis)
        size = self._groups.sizes[group]
        best = np.arange(size)
        order = arranged(neighbours, size) if neighbours else best
        if total(order) < total(best):
            best = order
        if size * size * sum(self._words[number].size for number in members) <= _EXACT_WORK:
            best = _exchanged(total, best)
        if not np.array_equal(best, np.arange(size)):
            self._orders[group] = best
            for number, words in reordered(best).items():
                self._words[number] = words


def _words(layer: _Layer, link: Link) -> Words:
    try:
        return link.words(layer.weights)
    except UsageError as error:
        raise UsageError(
            f"weights less their zero point: {error.what}",
            where=f"layer {layer.title!r}",
            fix="give the layer fewer bits or quantize weights symmetrically, or name a link with "
            "wider words (permute-channels=link:NAME)",
        ) from None


def _exchanged(total: Callable[[IntArray], int], order: IntArray) -> IntArray:
    """Exchange pairs of channels as long as that lowers the exact count."""
    least, improved = total(order), True
    while improved:
        improved = False
        for one, other in itertools.combinations(range(len(order)), 2):
            changed = order.copy()
            changed[[one, other]] = order[[other, one]]
            found = total(changed)
            if found < least:
                order, least, improved = changed, found, True
    return order


def _rewritten(function: Any, entries: Sequence[IntArray | None]) -> Any:
    """The function of a layer with its constants in another order."""
    read = read_layer(function)
    assert read is not None
    weights = constant(read.weights)
    assert weights is not None
    convolution = isinstance(read.spec, Convolution)
    rows = _rows(weights, convolution=convolution)
    for along, places in enumerate(entries):
        if places is not None:
            rows = rows.take(places, along)
    replaced = {read.weights: rows.reshape(weights.shape) if convolution else rows.T}
    if entries[0] is not None:
        for expr in (read.bias, read.shift, read.factors):
            vector = None if expr is None else constant(expr)
            if vector is not None and vector.size > 1:
                along = vector.shape.index(vector.size)
                replaced[expr] = vector.take(entries[0], along)
    constants = {
        old: relax.const(np.array(new, order="C"), new.dtype.name) for old, new in replaced.items()
    }

    def replace(_rewriter: CallRewriter, call: Any, _var: Any) -> Any:
        arguments = [constants.get(argument, argument) for argument in call.args]
        return relax.Call(call.op, arguments, call.attrs, call.ty_args, call.span)

    return CallRewriter(None, replace).visit_expr(function)


def _rows(weights: Array, *, convolution: bool) -> Array:
    """Weights as the link's windows have them, shape (output channels, terms)."""
    return weights.reshape(len(weights), -1) if convolution else weights.T


@tvm.transform.module_pass(opt_level=0, name="PermuteChannels")
class PermuteChannels:
    """Permute channels so that the stream of weights toggles less; see the module's docstring.

    Requires: integer layers with constant weights (PartitionForTarget, LowerToInteger), before
    MaterializeTransfers and PackWeights. Ensures: the function computes the same values; unsorted,
    all weights together cause fewer transitions on the link than before, or nothing has changed.
    The module's attribute ``bitwright.permuted_channels`` tells how many in each layer that takes
    part, for one sample, before and after; a module that has it is left alone.

    Parameters
    ----------
    link
        The link: its name, or the path of its description. Empty: that of the accelerator that the
        layers are partitioned for.

    Raises
    ------
    UsageError
        If there is no such link, the accelerator describes none, or weights of a layer, which is
        named, are wider than its words.
    """

    def __init__(self, link: str | Link = "") -> None:
        self.link = link

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite the layers that ``main`` calls."""
        names = [variable.name_hint for variable in mod.get_global_vars()]
        if "main" not in names or mod.get_attr(PERMUTED) is not None:
            return mod
        return rewriting(self._rewrite)(mod)

    def _rewrite(self, mod: Any) -> Any:
        analysis = _Analysis(mod)
        if not analysis.layers:
            return mod
        search = _Search(analysis, self._link(mod[analysis.layers[0].functions[0]]))
        for layer in analysis.layers:
            entries = search.entries(layer)
            if any(places is not None for places in entries):
                for variable in layer.functions:
                    mod[variable] = _rewritten(mod[variable], entries)
        return mod.with_attr(PERMUTED, search.transitions)

    def _link(self, layer: Any) -> Link:
        if isinstance(self.link, Link):
            return self.link
        where = self.link or str(layer.attrs["target"])
        if not where:
            raise UsageError(
                "layers are partitioned for no accelerator, so there is no link",
                fix="name one: link of permute-channels, or target of partition-for-target",
            )
        return get_link(where)
