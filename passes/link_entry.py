"""The entry point ``main_link``: the model with its transfers, in their order, counted.

``main`` does without transfers and orders: sums of integers are the same. ``main_link`` is a copy
of it in which a kernel computes the sums of each layer whose operands are sent, from words that it
has ordered, packed into flits, counted and taken out again (``targets/kernels/link.py``)::

    w = layout(bitwright.unpack(weight, ...))          x = R.reshape(padded(q), (n, words))
    q1 = cls.conv1_layer(q, w, bias, multiplier)  ->   s = call_tir(link_kernel, (x, weights, ...))
                                                       y = R.add(R.reshape(s[0]), bias)
                                                       q1 = bitwright.requantize(y, multiplier)
                                                       # s[1]: transitions, s[2]: flits

Biases and requantization are the same operators on the same parameters, so the outputs have the
same bits. Every layer is sent three times: unsorted in row-major flits, unsorted in those of the
link, and in its order. Behind the outputs of ``main`` stand, for each layer and each of these, the
transitions (int64 [3, lanes, word bits]: inputs, weights, index) and the flits (int64 [3]).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, sym, te, tirx

from bitwright.passes import ops
from bitwright.passes.expressions import (
    LAYER_OPERATORS,
    CallRewriter,
    as_block,
    bindings,
    constant,
    global_variable,
    is_layer,
    node_name,
    operator,
)
from bitwright.passes.materialize_transfers import SKIPPED, link_of
from bitwright.passes.pack_weights import PARAMETER_NAMES, Parameters
from bitwright.passes.popcount_reorder import REASONS, SentProduct, sent_products, terms_of
from bitwright.targets.codegen import IntegerLayer, read_layer
from bitwright.targets.kernels.link import LayerKernel, kernel, positions_kernel
from bitwright.targets.kernels.spec import ActivationMatmul, Convolution, Matmul, Operand
from bitwright.targets.link import ROW_MAJOR, UNSORTED, Link, Traffic
from bitwright.targets.orders import Order

__all__ = [
    "ENTRY",
    "LinkEntry",
    "SentLayer",
    "Transfers",
    "add_link_entry",
    "read_transfers",
]

Array = npt.NDArray[Any]

ENTRY: Final = "main_link"


@dataclass(frozen=True)
class SentLayer:
    """How a layer's operands are sent.

    Attributes
    ----------
    layer
        The ONNX node.
    link, order
        The link, and the order of the terms.
    terms
        Terms of an output.
    sorted_by_unit
        The operands that a sorting unit orders while the model runs.
    places
        Place of each constant weight in its window, uint8 [channels, terms].
    tables
        Bucket of every word, for what a unit sorts.
    reason
        Why it has its order; empty where it was asked for.
    """

    layer: str
    link: Link
    order: Order
    terms: int
    sorted_by_unit: tuple[Literal["inputs", "weights"], ...]
    places: Array | None
    tables: Mapping[str, Array]
    reason: str

    @property
    def variants(self) -> dict[str, tuple[Link, Order]]:
        """In what ways the operands are sent: name to link and order."""
        row_major = self.link.model_copy(update={"packing": ROW_MAJOR})
        found = {ROW_MAJOR: (row_major, Order()), UNSORTED: (self.link, Order())}
        if self.order != Order():
            found[str(self.order)] = (self.link, self.order)
        return found


@dataclass(frozen=True)
class Transfers:
    """The transfers of a module.

    Attributes
    ----------
    layers
        By the name of the layer.
    skipped
        Layers that send nothing, and why.
    """

    layers: Mapping[str, SentLayer]
    skipped: Mapping[str, str]


def read_transfers(mod: Any) -> Transfers:
    """Read how the operands of all layers are sent."""
    reasons = {str(name): str(text) for name, text in (mod.get_attr(REASONS) or {}).items()}
    skipped = {str(name): str(text) for name, text in (mod.get_attr(SKIPPED) or {}).items()}
    layers: dict[str, SentLayer] = {}
    for _, function in mod.functions_items():
        if not is_layer(function):
            continue
        bound = bindings(function)
        for product in sent_products(function):
            # A layer whose sums are used in several ways has a function for each, and sends once.
            if product.layer not in layers:
                reason = reasons.get(product.layer, "")
                layers[product.layer] = _sent_layer(product, bound, reason)
    return Transfers(layers, skipped)


def _sent_layer(product: SentProduct, bound: Mapping[Any, Any], reason: str) -> SentLayer:
    inputs, weights = bound[product.inputs], bound[product.weights]
    tables: dict[str, Array] = {}
    places = None
    for transfer in (inputs, weights):
        if len(transfer.args) < 2:
            continue
        found: Any = bound.get(transfer.args[1], transfer.args[1])
        if operator(found) == ops.ORDER:
            table = constant(found.args[1])
            assert table is not None
            tables[str(found.attrs["operand"])] = table
        else:
            places = constant(found)
    order = Order.parse(str(inputs.attrs["order"]))
    parts: tuple[Literal["inputs", "weights"], ...] = ("inputs", "weights")
    return SentLayer(
        product.layer,
        link_of(inputs),
        order,
        terms_of(product.call),
        tuple(part for part in parts if part in tables),
        places,
        tables,
        reason,
    )


@dataclass(frozen=True)
class LinkEntry:
    """What :func:`add_link_entry` makes.

    Attributes
    ----------
    module
        The module with ``main_link``, which takes the inputs, the parameters of ``main`` and some
        of its own; their values stand in its attribute ``params``.
    layers
        The layers in the order of their results.
    batched
        Whether several samples can be sent in one call: each is counted on its own then.
    """

    module: Any
    layers: tuple[SentLayer, ...]
    batched: bool


def add_link_entry(mod: Any, transfers: Transfers) -> LinkEntry:
    """Add ``main_link``.

    Parameters
    ----------
    mod
        A module with packed weights (PackWeights).
    transfers
        How the operands of its layers are sent.
    """
    return _Entry(mod, transfers).run()


@dataclass(frozen=True)
class _Operands:
    """The operands of a layer, in the form that the kernel takes.

    Attributes
    ----------
    x, w
        Codes: padded inputs [samples, words], and weights [1 or samples, channels, terms].
    bases, taps
        Where the words of a position and of a term lie, as in
        :class:`bitwright.targets.link.Traffic`.
    unsorted
        The places of terms that are not sorted; of the shape of ``w``.
    samples, channels, positions
        Sizes of the sums.
    shaped
        Brings sums [samples, channels, positions] into the shape of the product.
    """

    x: Any
    w: Any
    bases: Any
    taps: Any
    unsorted: Any
    samples: Any
    channels: Any
    positions: Any
    shaped: Callable[[Any], Any]


class _Entry:
    """Makes the entry point."""

    def __init__(self, mod: Any, transfers: Transfers) -> None:
        self.mod = mod
        self.transfers = transfers
        self.parameters = Parameters()
        self.functions: dict[Any, Any] = {}
        self.kernels: dict[Any, Any] = {}
        self.counted: dict[str, SentLayer] = {}
        self.counts: list[Any] = []
        #: Whether samples lie one after the other in the operands of every layer.
        self.batched = True
        self.batch: Any = tirx.IntImm("int64", 1)

    def run(self) -> LinkEntry:
        copied = relax.utils.copy_with_new_vars(self.mod["main"])
        inputs = int(copied.attrs["num_input"])
        if inputs and copied.params[0].ty.shape is not None and copied.params[0].ty.ndim:
            self.batch = copied.params[0].ty.shape[0]
        # Results leave a dataflow block by other rules.
        alone = tvm.IRModule({tvm.ir.GlobalVar(ENTRY): copied.with_attr("global_symbol", ENTRY)})
        alone = relax.transform.ToNonDataflow()(alone)
        rewriter = CallRewriter(self.mod, self._rewrite)
        changed = rewriter.visit_expr(alone[ENTRY])
        self.mod = rewriter.builder_.get()
        result = changed.body.body
        outputs = bindings(changed).get(result, result)
        several = isinstance(result.ty, relax.TupleType)
        kinds = list(result.ty.fields) if several else [result.ty]
        if isinstance(outputs, relax.Tuple):
            fields = list(outputs.fields)
        elif several:
            fields = [relax.TupleGetItem(result, index) for index in range(len(kinds))]
        else:
            fields = [result]
        own = list(self.parameters.variables.values())
        body = relax.SeqExpr(changed.body.blocks, relax.Tuple([*fields, *self.counts]))
        names = [str(name) for name in copied.attrs[PARAMETER_NAMES]]
        arrays = [tvm.runtime.tensor(array) for array in self.parameters.arrays.values()]
        kind = relax.TupleType([*kinds, *(count.ty for count in self.counts)])
        entry = relax.Function([*changed.params, *own], body, kind, attrs=changed.attrs)
        entry = entry.with_attr("params", [*copied.attrs["params"], *arrays])
        entry = entry.with_attr(PARAMETER_NAMES, [*names, *self.parameters.arrays])
        entry = relax.BlockBuilder().normalize(entry)
        alone = relax.transform.ConvertToDataflow()(tvm.IRModule({tvm.ir.GlobalVar(ENTRY): entry}))
        functions = {**dict(self.mod.functions_items()), **self.functions}
        functions[global_variable(ENTRY, entry)] = alone[ENTRY]
        mod = tvm.IRModule(functions, attrs=self.mod.attrs, global_infos=self.mod.global_infos)
        return LinkEntry(mod, tuple(self.counted.values()), self.batched)

    # -- layers --------------------------------------------------------------------------------

    def _rewrite(self, rewriter: CallRewriter, call: Any, _var: Any) -> Any:
        name = node_name(call)
        if not isinstance(call.op, tvm.ir.GlobalVar) or name not in self.transfers.layers:
            return call
        function = self.mod[call.op]
        layer = read_layer(function) if is_layer(function) else None
        if layer is None or name in self.counted:
            return call
        sent = self.transfers.layers[name]
        self.counted[name] = sent
        given = dict(zip(function.params, call.args, strict=True))
        operands = self._operands(rewriter, layer, sent, given)
        sums = None
        for link, order in sent.variants.values():
            result = self._send(rewriter, sent, layer, link, order, operands)
            sums, counts, flits = (
                rewriter.emit(relax.TupleGetItem(result, index)) for index in range(3)
            )
            self.counts += [counts, flits]
        return _behind_product(rewriter, function, given, operands.shaped(sums))

    def _send(
        self,
        rewriter: CallRewriter,
        sent: SentLayer,
        layer: IntegerLayer,
        link: Link,
        order: Order,
        operands: _Operands,
    ) -> Any:
        """Call the kernel for one order."""
        data, weight = _types(layer)
        spec = LayerKernel.of(
            link,
            order,
            data.dtype,
            weight.dtype,
            layer.spec.accumulator_bits,
            (data.layout, weight.layout),
        )
        arguments = [operands.x, operands.w, operands.bases, operands.taps]
        arguments.append(self._places(rewriter, sent, link, order, operands, weight.dtype))
        if spec.uses_table:
            table = sent.tables["inputs"]
            arguments.append(self.parameters.add(f"{sent.layer}.table", table))
        arguments.append(relax.const(np.array([data.zero_point, weight.zero_point], np.int32)))
        shape = [operands.samples, operands.channels, operands.positions]
        results = [
            relax.TensorType(shape, f"int{spec.accumulator_bits}"),
            relax.TensorType(spec.counts_shape, "int64"),
            relax.TensorType([3], "int64"),
        ]
        function = self._primitive(spec, lambda name: kernel(spec, name), "link")
        return rewriter.emit(relax.call_tir(function, arguments, results))

    def _places(
        self,
        rewriter: CallRewriter,
        sent: SentLayer,
        link: Link,
        order: Order,
        operands: _Operands,
        dtype: Any,
    ) -> Any:
        """Place of each weight in its window."""
        if not order.orders_weights:
            return operands.unsorted
        if sent.places is not None:
            return self.parameters.add(f"{sent.layer}.places", sent.places[None])
        bits, window = link.word_bits.value, link.window.value
        buckets = int(sent.tables["weights"].max()) + 1
        function = self._primitive(
            (dtype, bits, window, buckets),
            lambda name: positions_kernel(dtype, bits, window, buckets, name),
            "positions",
        )
        table = self.parameters.add(f"{sent.layer}.weight_table", sent.tables["weights"])
        kind = relax.TensorType(operands.w.ty.shape, "uint8")
        return rewriter.emit(relax.call_tir(function, [operands.w, table], kind))

    def _primitive(self, key: Any, build: Callable[[str], Any], name: str) -> Any:
        """One function for all layers that need the same."""
        if key not in self.kernels:
            title = f"{name}_{len(self.kernels)}_kernel"
            function = as_block(build(title))
            self.kernels[key] = variable = global_variable(title, function)
            self.functions[variable] = function
        return self.kernels[key]

    # -- operands ------------------------------------------------------------------------------

    def _operands(
        self,
        rewriter: CallRewriter,
        layer: IntegerLayer,
        sent: SentLayer,
        given: Mapping[Any, Any],
    ) -> _Operands:
        data, weights = given[layer.data], given[layer.weights]
        if isinstance(layer.spec, ActivationMatmul):
            return self._activations(rewriter, layer.spec, sent, data, weights)
        # Behind the layout of the kernel stand the weights themselves.
        codes = rewriter.value(rewriter.value(weights).args[1].fields[0])
        if isinstance(layer.spec, Matmul):
            return self._matmul(rewriter, layer.spec, sent, data, codes)
        return self._convolution(rewriter, layer.spec, sent, data, codes)

    def _unsorted(self, rewriter: CallRewriter, sent: SentLayer, w: Any) -> Any:
        window = sent.link.window.value
        return rewriter.builder_.emit_te(_places, w, window, primfunc_name_hint="unsorted_places")

    def _convolution(
        self, rewriter: CallRewriter, spec: Convolution, sent: SentLayer, data: Any, codes: Any
    ) -> _Operands:
        traffic = Traffic.convolution(
            sent.layer,
            in_channels=spec.in_channels,
            size=spec.size,
            out_channels=spec.out_channels,
            kernel=spec.kernel,
            strides=spec.strides,
            dilations=spec.dilations,
            pads=spec.pads,
            groups=spec.groups,
        )
        images = data.ty.shape[0]
        samples, each = self._samples([images])
        padded = [sum((n, *around)) for n, around in zip(traffic.shape, traffic.pads, strict=True)]
        words = math.prod(padded)
        x, flat = data, False
        if any(spec.pads):
            zero_point, flat = spec.data.code_of_zero, _is_one(each)
            x = rewriter.builder_.emit_te(_padded, x, padded, traffic.pads, zero_point)
        if not flat:
            x = rewriter.emit(relax.op.reshape(x, (samples, each * words)))
        channels = spec.out_channels
        w = rewriter.emit(_unpacked(codes, [1, channels, traffic.terms]))
        bases = self._bases(rewriter, sent, traffic.bases, each, words)
        inner = len(traffic.bases)

        def shaped(sums: Any) -> Any:
            if not _is_one(each):
                split = relax.op.reshape(sums, (samples, channels, each, inner))
                sums = rewriter.emit(relax.op.permute_dims(split, [0, 2, 1, 3]))
            return rewriter.emit(relax.op.reshape(sums, (images, channels, *spec.output_size)))

        taps = self.parameters.add(f"{sent.layer}.taps", traffic.taps)
        unsorted = self._unsorted(rewriter, sent, w)
        return _Operands(x, w, bases, taps, unsorted, samples, channels, each * inner, shaped)

    def _matmul(
        self, rewriter: CallRewriter, spec: Matmul, sent: SentLayer, data: Any, codes: Any
    ) -> _Operands:
        leading = list(data.ty.shape)[:-1]
        samples, rows = self._samples(leading)
        x = rewriter.emit(relax.op.reshape(data, (samples, rows * spec.depth)))
        rows_of_terms = rewriter.emit(_unpacked(codes, [1, spec.depth, spec.columns]))
        w = rewriter.emit(relax.op.permute_dims(rows_of_terms, [0, 2, 1]))
        start = np.zeros(1, np.int32)
        bases = self._bases(rewriter, sent, start, rows, spec.depth)

        def shaped(sums: Any) -> Any:
            turned = rewriter.emit(relax.op.permute_dims(sums, [0, 2, 1]))
            return rewriter.emit(relax.op.reshape(turned, (*leading, spec.columns)))

        taps = self.parameters.add(
            f"{sent.layer}.taps", np.arange(spec.depth, dtype=np.int32)[None]
        )
        unsorted = self._unsorted(rewriter, sent, w)
        return _Operands(x, w, bases, taps, unsorted, samples, spec.columns, rows, shaped)

    def _activations(
        self, rewriter: CallRewriter, spec: ActivationMatmul, sent: SentLayer, left: Any, right: Any
    ) -> _Operands:
        """Operands of a product of activations: each product of a sample is a group of channels."""
        depth, columns = spec.depth, spec.columns
        rows = left.ty.shape[-2]
        outer = [
            theirs if _is_one(mine) else mine
            for mine, theirs in zip(
                list(left.ty.shape)[:-2], list(right.ty.shape)[:-2], strict=True
            )
        ]
        samples, products = self._samples(outer)
        left = _broadcast(rewriter, left, [*outer, rows, depth])
        right = _broadcast(rewriter, right, [*outer, depth, columns])
        x = rewriter.emit(relax.op.reshape(left, (samples, products * rows * depth)))
        axes = list(range(len(outer)))
        turned = relax.op.permute_dims(right, [*axes, len(outer) + 1, len(outer)])
        w = relax.op.reshape(rewriter.emit(turned), (samples, products * columns, depth))
        bases = self._bases(rewriter, sent, np.zeros(1, np.int32), rows, depth)
        terms = relax.const(np.arange(depth, dtype=np.int32)[None])
        starts = relax.op.reshape(
            self._bases(rewriter, sent, np.zeros(1, np.int32), products, rows * depth),
            (products, 1),
        )
        taps = rewriter.emit(relax.op.add(rewriter.emit(starts), terms))

        def shaped(sums: Any) -> Any:
            split = rewriter.emit(relax.op.reshape(sums, (*outer, columns, rows)))
            return rewriter.emit(relax.op.permute_dims(split, [*axes, len(outer) + 1, len(outer)]))

        w = rewriter.emit(w)
        unsorted = self._unsorted(rewriter, sent, w)
        channels = products * columns
        return _Operands(x, w, bases, taps, unsorted, samples, channels, rows, shaped)

    def _samples(self, sizes: Sequence[Any]) -> tuple[Any, Any]:
        """How many samples axes are for, of which the first holds them, and how many each has."""
        count, analyzer = _product(sizes), sym.Analyzer()
        if sizes and analyzer.can_prove_equal(tirx.floormod(sizes[0], self.batch), 0):
            return self.batch, analyzer.simplify(tirx.floordiv(count, self.batch))
        self.batched = False
        return tirx.IntImm("int64", 1), count

    def _bases(
        self, rewriter: CallRewriter, sent: SentLayer, inner: Array, count: Any, words: Any
    ) -> Any:
        """Places of the positions of ``count`` images of ``words`` words each."""
        if isinstance(count, tirx.IntImm | int) and isinstance(words, tirx.IntImm | int):
            starts = np.arange(int(count), dtype=np.int32) * np.int32(int(words))
            array = (starts[:, None] + inner[None]).reshape(-1)
            return self.parameters.add(f"{sent.layer}.bases", array)
        starts = rewriter.builder_.emit_te(_steps, count, words)
        column = rewriter.emit(relax.op.reshape(starts, (count, 1)))
        row = relax.const(inner[None])
        both = rewriter.emit(relax.op.add(column, row))
        return rewriter.emit(relax.op.reshape(both, (count * len(inner),)))


def _types(layer: IntegerLayer) -> tuple[Operand, Operand]:
    """Types of what is sent; weights are centred."""
    spec = layer.spec
    if isinstance(spec, ActivationMatmul):
        return spec.left_data, spec.right_data
    return spec.data, Operand(spec.weight)


def _behind_product(
    rewriter: CallRewriter, function: Any, given: Mapping[Any, Any], sums: Any
) -> Any:
    """What a layer does with its sums, on sums from elsewhere."""
    bound = bindings(function)
    made: dict[Any, Any] = {}

    def again(expr: Any) -> Any:
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([again(field) for field in expr.fields])
        if expr in given:
            return given[expr]
        if expr not in bound:
            return expr  # a constant
        if expr not in made:
            value = bound[expr]
            if operator(value) in LAYER_OPERATORS:
                made[expr] = sums
            elif isinstance(value, relax.Call):
                arguments = [again(argument) for argument in value.args]
                call = relax.Call(value.op, arguments, value.attrs, value.ty_args, value.span)
                made[expr] = rewriter.emit(call, expr.name)
            else:
                made[expr] = again(value)
        return made[expr]

    return again(function.body.body)


def _unpacked(codes: Any, shape: Sequence[int]) -> Any:
    """Weights out of their parameter, in another shape than that of the call ``codes``."""
    attrs = codes.attrs
    return ops.unpack(
        codes.args[0],
        shape=shape,
        bits=int(attrs["bits"]),
        low=int(attrs["low"]),
        dtype=str(attrs["dtype"]),
    )


def _places(w: Any, window: int) -> Any:
    """Place of each term in its window, where it stays."""
    return te.compute(
        w.shape, lambda _sample, _channel, term: (term % window).astype("uint8"), name="places"
    )


def _padded(x: Any, sizes: Sequence[int], pads: Sequence[tuple[int, int]], zero_point: int) -> Any:
    """Put the zero point around images, and lay each out flat."""
    padding = tirx.const(zero_point, x.dtype)

    def word(image: Any, place: Any) -> Any:
        indices: list[Any] = []
        for size in reversed(sizes):
            indices.insert(0, place % size)
            place = place // size
        places = [index - before for index, (before, _) in zip(indices, pads, strict=True)]
        inside = [
            test
            for index, size, (before, behind) in zip(places, x.shape[1:], pads, strict=True)
            if before or behind
            for test in (index >= 0, index < size)
        ]
        return tirx.if_then_else(tirx.all(*inside), x[(image, *places)], padding)

    return te.compute((x.shape[0], math.prod(sizes)), word, name="padded")


def _steps(count: Any, words: Any) -> Any:
    """Write 0, words, 2 words, ..."""
    return te.compute((count,), lambda index: (index * words).astype("int32"), name="steps")


def _broadcast(rewriter: CallRewriter, operand: Any, shape: Sequence[Any]) -> Any:
    if all(
        _is_one(mine) == _is_one(size) for mine, size in zip(operand.ty.shape, shape, strict=True)
    ):
        return operand
    return rewriter.emit(relax.op.broadcast_to(operand, shape))


def _is_one(size: Any) -> bool:
    return isinstance(size, int | tirx.IntImm) and int(size) == 1


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = tirx.IntImm("int64", 1)
    for size in sizes:
        total = total * size
    return total
