"""PopcountReorder: the terms of a dot product are sent in another order, so that fewer bits toggle.

The transfers of both operands of an integer product get the places of a comparison-free counting
sort (arXiv 2601.14087), of the exact key or of a few buckets of it. Where the weights are what is
sorted, and constant, the places are, too::

    s = bitwright.transfer(q, ...)        s = bitwright.transfer(q, R.const(places),
    t = bitwright.transfer(R.const(codes), ...)                  order="popcount", ...)
    c = R.nn.conv2d(R.astype(s, "int32"),  ->  t = bitwright.transfer(R.const(codes),
                    R.astype(t, "int32"))          R.const(places), order="popcount", ...)
                                               c = R.nn.conv2d(...)

Where inputs are sorted, a unit in front of the link does it while the model runs::

    s = bitwright.transfer(q, ...)    ->  o = bitwright.order(q, R.const(table), ...)
                                          s = bitwright.transfer(q, o, ...)

Both transfers of a product take the same places, pairs move together; but for ``on="separated"``,
where each operand has its own and the permutation is sent as well. Sums of integers do not depend
on the order of their terms, so results stay the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx

from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.expressions import (
    LAYER_OPERATORS,
    CallRewriter,
    bindings,
    constant,
    operator,
    rewriting,
    static_shape,
)
from bitwright.passes.materialize_transfers import link_of
from bitwright.targets.link import UNSORTED, Link, Part
from bitwright.targets.orders import Order
from bitwright.targets.places import constant_places
from bitwright.targets.schema import Number

__all__ = ["REASONS", "Measured", "PopcountReorder", "SentProduct", "sent_products", "terms_of"]

REASONS: Final = "bitwright.link.reasons"
"""Attribute of a module: why a layer has an order or none, where ``auto`` decided."""

_LONGEST_WINDOW: Final = 256  # a place is a byte


@dataclass(frozen=True)
class Measured:
    """What a layer sent on samples.

    Attributes
    ----------
    histograms
        How often each word, by its bit pattern, is sent unsorted: int64 [2^word_bits] for
        ``inputs``, and for ``weights`` where they are no constants.
    transitions
        Transitions of all parts, index included, by order (its text); ``none`` among them: unsorted
        in the link's packing.
    words_sorted
        Words that the sorting unit orders, by order; 0 where the order is known at compile time.
    """

    histograms: Mapping[Part, npt.NDArray[np.int64]]
    transitions: Mapping[str, int]
    words_sorted: Mapping[str, int]


@dataclass(frozen=True)
class SentProduct:
    """A product of integers both of whose operands cross the link.

    Attributes
    ----------
    layer
        Name of the layer.
    call
        The convolution or matrix product.
    inputs, weights
        The variables that their transfers are bound to.
    """

    layer: str
    call: Any
    inputs: Any
    weights: Any


def sent_products(function: Any) -> Iterator[SentProduct]:
    """The products of a function whose operands are sent.

    Raises
    ------
    UsageError
        If anything but a product of integers takes what is sent: to it, the order of the terms may
        matter. Or if only one operand of a product is sent.
    """
    bound = bindings(function)
    transfers = {var: value for var, value in bound.items() if operator(value) == ops.TRANSFER}
    if not transfers:
        return
    users: dict[Any, list[Any]] = {}
    for var, value in bound.items():
        for used in relax.analysis.free_vars(value):
            users.setdefault(used, []).append(var)
    outputs = set(relax.analysis.free_vars(function.body.body))
    products: dict[Any, dict[str, Any]] = {}
    for var, transfer in transfers.items():
        operand = str(transfer.attrs["operand"])
        for product in _products(var, transfer, bound, users, outputs):
            products.setdefault(product, {})[operand] = var
    for product, operands in products.items():
        sent = next(iter(operands.values()))
        layer = str(transfers[sent].attrs["layer"])
        if len(operands) != 2:
            raise UsageError(
                f"only the {next(iter(operands))} of {operator(bound[product])} are sent, so its "
                "pairs cannot be ordered",
                where=f"layer {layer!r}",
                fix="transfer both operands, as materialize-transfers does",
            )
        yield SentProduct(layer, bound[product], operands["inputs"], operands["weights"])


def _products(
    var: Any,
    transfer: Any,
    bound: Mapping[Any, Any],
    users: Mapping[Any, list[Any]],
    outputs: set[Any],
) -> list[Any]:
    """The integer products that a transfer feeds, and nothing else."""
    found, pending = [], [var]
    for sent in pending:  # it grows
        if sent in outputs:
            _refuse(transfer, "it is a result", "whoever takes it counts on the order of its terms")
        for user in users.get(sent, []):
            call = bound[user]
            name = operator(call)
            integer = isinstance(call.ty, relax.TensorType) and str(call.ty.dtype).startswith("int")
            if name in LAYER_OPERATORS and integer:
                found.append(user)
            elif name in LAYER_OPERATORS:
                why = f"a product in {call.ty.dtype} rounds, so its sum depends on their order"
                _refuse(transfer, f"R.{name} takes it", why)
            elif integer and (name in ("astype", ops.SOFT_EDGE_DECODE) or _centres(call, sent)):
                pending.append(user)
            else:
                what = f"{f'R.{name}' if name else 'another function'} takes it"
                _refuse(transfer, what, "that is no sum of products of integers")
    return found


def _centres(call: Any, sent: Any) -> bool:
    """Whether a call subtracts a zero point."""
    if operator(call) != "subtract" or not call.args[0].same_as(sent):
        return False
    zero_point = constant(call.args[1])
    return zero_point is not None and zero_point.size == 1


def _refuse(transfer: Any, what: str, why: str) -> None:
    raise UsageError(
        f"the terms of its {transfer.attrs['operand']} cannot be reordered: {what}, and {why}",
        where=f"layer {str(transfer.attrs['layer'])!r}",
        fix="send operands of integer products only, or leave popcount-reorder out",
    )


def _weight_terms(call: Any, codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Constant weights of a product as rows of terms: shape (channels, terms)."""
    if operator(call) == "matmul":
        if codes.ndim != 2:
            raise UsageError(
                f"weights of {codes.ndim} axes cannot be sorted; those of 2 axes can",
                fix="reshape them, or sort on:inputs",
            )
        return codes.T
    return codes.reshape(codes.shape[0], -1)


def terms_of(call: Any) -> int:
    """How many terms each sum of a product has.

    Raises
    ------
    UsageError
        If it depends on a symbolic size.
    """
    shape = static_shape(call.args[1])
    sizes = shape and (shape[-2:-1] if operator(call) == "matmul" else shape[1:])
    if not sizes or None in sizes:
        raise UsageError(
            f"the number of terms of R.{operator(call)} is known only when it runs",
            fix="fix the sizes of the model (compile --input-shape), or leave the transfers out",
        )
    return int(np.prod([size for size in sizes if size is not None]))


def _sizes(call: Any, batch: int | None, *, stored: bool) -> dict[str, int]:
    """Channels, groups and positions of a product for one sample, as ``main_link`` sends them.

    ``batch`` is that of the model, None if symbolic; ``stored`` tells whether the weights are
    constant; 2 stands for any unknown number.
    """
    weights = static_shape(call.args[1])
    assert weights is not None
    shape = None if call.ty.shape is None else list(call.ty.shape)
    if operator(call) != "matmul":
        channels, groups = weights[0] or 2, int(call.attrs.groups)
        positions = _each(shape and [*shape[:1], *shape[2:]], batch)
    elif stored:
        channels, groups = weights[-1] or 2, 1
        positions = _each(shape and shape[:-1], batch)
    else:  # each product of a sample is a group of channels
        groups = 1 if len(weights) == 2 else _each(shape and shape[:-2], batch)
        channels = groups * (weights[-1] or 2)
        positions = 2 if shape is None else getattr(shape[-2], "value", 2)
    return {"channels": channels, "groups": groups, "positions": positions}


def _batch(mod: Any) -> int | None:
    """First size of the first input of a model; None if symbolic."""
    names = [variable.name_hint for variable in mod.get_global_vars()]
    params = mod["main"].params if "main" in names else []
    shape = static_shape(params[0]) if params else None
    return shape[0] if shape else 1


def _each(axes: Sequence[Any] | None, batch: int | None) -> int:
    """How much of what axes count one sample has; the first holds the samples."""
    if axes is None:
        return 2
    sizes = [getattr(dim, "value", None) for dim in axes]
    if isinstance(axes[0], tirx.Var):
        sizes[0] = 1 if batch is None else None  # it is the batch
    elif sizes[0] is not None and batch and sizes[0] % batch == 0:
        sizes[0] //= batch
    return math.prod(2 if size is None else size for size in sizes)


@tvm.transform.module_pass(opt_level=0, name="PopcountReorder")
class PopcountReorder:
    """Send the terms of integer products so that fewer bits toggle; see the module's docstring.

    Requires: transfers (MaterializeTransfers). Ensures: the transfers of integer products have the
    attribute ``order`` and, where terms are sorted, their places as second argument; results are
    the same to the bit. With ``auto`` the module's attribute ``bitwright.link.reasons`` tells why a
    layer has an order or none. Transfers that have an order keep it.

    Parameters
    ----------
    key
        ``popcount``, ``gray-rank``, ``chain`` (each constant weight next to the nearest that is
        left), or ``none``. This and the next five: left out, as the link's own order says.
    on
        Whose words are sorted: ``weights``, ``inputs``, or ``separated``.
    buckets
        Number of buckets; 0 for one a key.
    map
        ``uniform``, ``quantile``, ``calibrated``, or the bucket of every key with dots between.
    direction
        ``descending`` or ``ascending``.
    snake
        Whether every second window is sent backwards.
    window
        Terms that are ordered at once. Left out: what the link's unit holds, or all of a layer that
        has fewer.
    auto
        Whether only layers are reordered where that saves more energy on the link than the sorting
        unit spends.
    measured
        What each layer sent on samples: for maps that depend on the words of activations, and for
        ``auto``.

    Raises
    ------
    UsageError
        If an option is wrong or no order that the link can have; if the window is larger than the
        terms of a layer; if a layer whose operands are sent depends on the order of its terms; or
        if samples or energies are missing. Layers are named.
    """

    def __init__(
        self,
        key: str | None = None,
        on: str | None = None,
        buckets: int | None = None,
        map: str | None = None,  # noqa: A002 - the name of the option
        direction: str | None = None,
        snake: bool | None = None,
        window: int | None = None,
        auto: bool = False,
        *,
        measured: Mapping[str, Measured] | None = None,
    ) -> None:
        options = (key, on, buckets, map, direction, snake)
        names = (entry.name for entry in fields(Order))
        self._options: dict[str, Any] = {
            name: value for name, value in zip(names, options, strict=True) if value is not None
        }
        # Refuse what is wrong in itself at once.
        order = replace(Order("popcount"), **self._options)
        if order.key == "nearest":
            raise UsageError(
                "nearest looks at all that is sent, which no unit does",
                fix="choose popcount, gray-rank or chain; bitwright link --order nearest counts it",
            )
        if window is not None and not 2 <= window <= _LONGEST_WINDOW:
            raise UsageError(f"a window has 2 to {_LONGEST_WINDOW} terms, not {window}")
        self.window = window
        self.auto = auto
        self.measured = measured

    def order(self, link: Link) -> Order:
        """The order that layers get on a link."""
        order = Order.parse(link.order)
        # What the link says of sorting is none of a key that sorts nothing.
        if "key" in self._options:
            if not Order(self._options["key"]).is_sorted:
                order = Order()
        elif order.key in ("none", "nearest") or (
            not order.is_sorted and self._options.keys() & {"on", "buckets", "map", "direction"}
        ):
            order = Order("popcount", snake=order.snake)
        return replace(order, **self._options)

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite every Relax function."""
        return rewriting(self._rewrite)(mod)

    def _rewrite(self, mod: Any) -> Any:
        reasons = dict(mod.get_attr(REASONS) or {})
        batch = _batch(mod)
        for variable, function in mod.functions_items():
            if not isinstance(function, relax.Function):
                continue
            changes: dict[Any, _Change] = {}
            sorts: dict[Any, _Sort] = {}
            bound = bindings(function)
            for product in sent_products(function):
                transfers = bound[product.inputs], bound[product.weights]
                if any(str(entry.attrs["order"]) != UNSORTED for entry in transfers):
                    continue
                try:
                    reason = self._decide(product, *transfers, changes, sorts, batch)
                except UsageError as error:
                    where = f"layer {product.layer!r}"
                    raise UsageError(error.what, where=where, fix=error.fix) from None
                if reason:
                    reasons[product.layer] = reason
            if changes:
                _check_places(function, bound, changes)
                mod[variable] = CallRewriter(None, _reordering(bound, changes, sorts)).visit_expr(
                    function
                )
        return mod.with_attr(REASONS, reasons) if reasons else mod

    def _decide(
        self,
        product: SentProduct,
        inputs: Any,
        weights: Any,
        changes: dict[Any, _Change],
        sorts: dict[Any, _Sort],
        batch: int | None,
    ) -> str:
        """Note the order of a product's operands; say why, unless it was asked for."""
        link = link_of(inputs)
        order = self.order(link)
        terms = terms_of(product.call)
        if self.window is not None:
            if self.window > terms:
                raise UsageError(
                    f"a window of {self.window} is larger than the {terms} terms of a sum",
                    fix=f"give a window of {terms} or fewer, or leave it out: smaller layers then "
                    "fill the unit partly",
                )
            window = Number[int](value=self.window, source=link.window.source)
            link = link.model_copy(update={"window": window})
        codes = constant(weights.args[0])
        sizes = _sizes(product.call, batch, stored=codes is not None)
        sizes["chunks"] = -(-terms // link.window.value)
        insert, reason = True, ""
        refused = _refusal(link, order, sizes)
        if refused is not None and not self.auto:
            raise refused
        if refused is not None:
            insert, reason = False, f"left unsorted: {refused.what}"
        elif order.key == "chain" and codes is None:
            insert = False
            reason = "left unsorted: its weights are computed, and a chain is one of constants"
        elif self.auto:
            unit = order.is_sorted and (order.on != "weights" or codes is None)
            known = (
                codes is not None and _refusal(link, replace(order, on="weights"), sizes) is None
            )
            insert, reason = self._worth(
                product.layer, order, link, unit=unit, at_compile_time=known
            )
        if not insert and self.window is None:
            return reason
        order = order if insert else Order()
        text = link.model_dump_json(exclude_none=True)
        variables: dict[Literal["inputs", "weights"], Any] = {
            "inputs": product.inputs,
            "weights": product.weights,
        }
        # Pairs move together: both are keyed on the same operand.
        shape = static_shape(product.call.args[1])
        windows = f"{operator(product.call)} {product.call.attrs} {shape}"
        for operand, var in variables.items():
            keyed = operand if order.on == "separated" else order.on
            moved = order.is_sorted or order.orders_weights
            key = variables[keyed] if moved else None
            change = _Change(order, text, key, windows)
            if changes.setdefault(var, change) != change:
                raise UsageError(
                    f"several products take the {operand}: who shares a stream shares its order",
                    fix=f"sort on:{operand}, the same windows for all, or transfer them for each "
                    "product, as materialize-transfers does",
                )
            if key is not None and key not in sorts:
                words = None
                if keyed == "weights" and codes is not None:
                    words = link.words(_weight_terms(product.call, codes))
                sorts[key] = self._sort(
                    product.layer, keyed, words, order, link, sizes["positions"]
                )
        return reason

    def _sort(
        self,
        layer: str,
        part: Literal["inputs", "weights"],
        words: npt.NDArray[np.uint16] | None,
        order: Order,
        link: Link,
        positions: int,
    ) -> _Sort:
        """The places of constant words, or the table by which a unit sorts others."""
        if words is not None:
            places = constant_places(words, link, order, positions=positions)
            return _Sort(places=relax.const(places))
        histogram = self._histogram(layer, part) if order.needs_histogram else None
        return _Sort(table=relax.const(order.table(link.word_bits.value, histogram)))

    def _histogram(self, layer: str, part: Part) -> npt.NDArray[np.int64]:
        measured = (self.measured or {}).get(layer)
        if measured is None or part not in measured.histograms:
            raise UsageError(
                f"the bucket map depends on the {part} that are sent, and none were measured",
                fix="compile a float model, whose calibration samples tell it; or give the map "
                "itself (map:0.0.1.1...), map:uniform, or on:weights",
            )
        return measured.histograms[part]

    def _worth(
        self, layer: str, order: Order, link: Link, *, unit: bool, at_compile_time: bool
    ) -> tuple[bool, str]:
        """Whether an order saves more than it spends, and the figures.

        ``unit`` tells whether it needs one, ``at_compile_time`` whether the layer could be sorted
        on its weights without.
        """
        measured = (self.measured or {}).get(layer)
        text = str(order)
        if measured is None or text not in measured.transitions:
            raise UsageError(
                "auto compares transitions, and none were measured",
                fix="compile a float model, whose calibration samples tell them; or leave auto out",
            )
        spent = 0.0
        if unit:
            if link.energy_pj_per_word is None:
                instead = "sort on:weights, which is done at compile time, "
                raise UsageError(
                    f"the link has no energy_pj_per_word, what a sorting unit spends on a word, "
                    f"and {text} needs one",
                    fix="add it to the description of the link, "
                    f"{instead * at_compile_time}or leave auto out",
                )
            spent = link.energy_pj_per_word.value * measured.words_sorted[text]
        fewer = measured.transitions[UNSORTED] - measured.transitions[text]
        saved = link.energy_pj_per_transition.value * fewer
        figures = (
            f"{text} takes {fewer:,} of {measured.transitions[UNSORTED]:,} transitions off, "
            f"{_energy(saved)}"
        )
        figures += f"; the unit spends {_energy(spent)}" if spent else ", and needs no unit"
        return saved > spent, f"{'reordered' if saved > spent else 'left unsorted'}: {figures}"


def _refusal(link: Link, order: Order, sizes: Mapping[str, int]) -> UsageError | None:
    """Why a link cannot have an order for a layer of these sizes; None if it can."""
    try:
        link.check(order, **sizes)
    except UsageError as error:
        return error
    return None


def _energy(pj: float) -> str:
    """An energy as tables write it."""
    for size, unit in ((1e9, "mJ"), (1e6, "uJ"), (1e3, "nJ")):
        if abs(pj) >= size:
            return f"{pj / size:.4g} {unit}"
    return f"{pj:.4g} pJ"


@dataclass(frozen=True)
class _Change:
    """The order that a transfer gets.

    Attributes
    ----------
    order, link
        Its attributes.
    key
        The transfer whose words are sorted; None if none are.
    windows
        What else decides which words a window holds.
    """

    order: Order
    link: str
    key: Any | None
    windows: str


@dataclass(frozen=True)
class _Sort:
    """How the words of a transfer are sorted: where they go, or the table of the unit."""

    places: Any | None = None
    table: Any | None = None


def _check_places(function: Any, bound: Mapping[Any, Any], changes: Mapping[Any, _Change]) -> None:
    """Refuse a transfer in front of what its order depends on."""
    known = set(function.params)
    for var, value in bound.items():
        change = changes.get(var)
        if change is not None and change.key is not None:
            source = bound[change.key].args[0]
            if isinstance(source, relax.Var) and source not in known:
                raise UsageError(
                    f"its {value.attrs['operand']} are sent before the operand that they are "
                    "sorted by is computed",
                    where=f"layer {str(value.attrs['layer'])!r}",
                    fix="let both transfers stand behind what computes the operands",
                )
        known.add(var)


def _reordering(
    bound: Mapping[Any, Any], changes: Mapping[Any, _Change], sorts: Mapping[Any, _Sort]
) -> Any:
    places: dict[Any, Any] = {key: sort.places for key, sort in sorts.items()}

    def reorder(rewriter: CallRewriter, call: Any, var: Any) -> Any:
        if var not in changes:
            return call
        change = changes[var]
        key = change.key
        attributes = {
            "layer": str(call.attrs["layer"]),
            "link": change.link,
            "order": str(change.order),
        }
        if key is not None and places[key] is None:
            keyed = bound[key]
            sorted_ = ops.order(
                rewriter.visit_expr(keyed.args[0]),
                sorts[key].table,
                operand=str(keyed.attrs["operand"]),
                **attributes,
            )
            places[key] = rewriter.emit(sorted_, "places")
        return ops.transfer(
            call.args[0], places.get(key), operand=str(call.attrs["operand"]), **attributes
        )

    return reorder
