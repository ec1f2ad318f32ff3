"""The entry point ``main_link``: the model with its transfers, in their order, counted.

``main`` drops transfers and orders: sums of integers are the same without. ``main_link`` is a copy
of it in which a kernel computes the sums of each layer whose operands are sent, from words that it
has ordered, packed into flits, counted and taken out again (``targets/kernels/link.py``)::

    w = layout(bitwright.unpack(conv1_weight, ...))      x = reshape(pad(q), (n, words))
    q1 = cls.conv1_layer(q, w, bias, multiplier)    ->   s = call_tir(link_kernel, (x, weights, ...))
                                                         y = R.add(reshape(s[0]), bias)
                                                         q1 = bitwright.requantize(y, multiplier)
                                                         # s[1]: transitions, s[2]: flits

Biases and requantization are the same operators on the same parameters, so the outputs have the same
bits. Every layer is sent three times: unsorted in row-major flits, unsorted in those of the link,
and in its order. Behind the outputs of ``main`` stand, for each layer and each of these, the
transitions (int64 [3, lanes, word bits]: inputs, weights, index) and the flits (int64 [3]).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, sym, tirx

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
from bitwright.passes.materialize_transfers import SKIPPED, drop_transfers, link_of
from bitwright.passes.pack_weights import PARAMETER_NAMES, Parameters
from bitwright.passes.popcount_reorder import REASONS, sent_products
from bitwright.targets.codegen import IntegerLayer, read_layer
from bitwright.targets.kernels.link import LayerKernel, kernel, positions_kernel
from bitwright.targets.kernels.spec import ActivationMatmul, Convolution, Matmul
from bitwright.targets.link import Link
from bitwright.targets.orders import Order

__all__ = ["ENTRY", "ROW_MAJOR", "SentLayer", "Transfers", "add_link_entry", "take_transfers"]

Array = npt.NDArray[Any]

ENTRY: Final = "main_link"

ROW_MAJOR: Final = "row-major"
_UNSORTED: Final = "none"


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
        found = {ROW_MAJOR: (row_major, Order()), _UNSORTED: (self.link, Order())}
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


def take_transfers(mod: Any) -> tuple[Any, Transfers]:
    """Read the transfers of all layers, and drop them.

    Returns
    -------
    tuple
        The module as it was without them, and how the operands of its layers are sent.
    """
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
    mod = drop_transfers(mod)
    for attribute in (REASONS, SKIPPED):
        mod = mod.without_attr(attribute)
    return mod, Transfers(layers, skipped)


def _sent_layer(product: Any, bound: Mapping[Any, Any], reason: str) -> SentLayer:
    inputs, weights = bound[product.inputs], bound[product.weights]
    tables: dict[str, Array] = {}
    places = None
    for transfer in (inputs, weights):
        found = bound.get(transfer.args[1], transfer.args[1]) if len(transfer.args) > 1 else None
        if operator(found) == ops.ORDER:
            table = constant(found.args[1])
            assert table is not None
            tables[str(found.attrs["operand"])] = table
        elif found is not None:
            places = constant(found)
    shape = [int(dim) for dim in product.call.args[1].ty.shape]
    terms = shape[-2] if operator(product.call) == "matmul" else math.prod(shape[1:])
    order = Order.parse(str(inputs.attrs["order"]))
    by_unit: list[Literal["inputs", "weights"]] = []
    if "inputs" in tables:
        by_unit.append("inputs")
    if "weights" in tables:
        by_unit.append("weights")
    return SentLayer(
        product.layer, link_of(inputs), order, terms, tuple(by_unit), places, tables, reason
    )


def add_link_entry(mod: Any, transfers: Transfers) -> tuple[Any, tuple[SentLayer, ...]]:
    """Add ``main_link``.

    Parameters
    ----------
    mod
        A module with packed weights (PackWeights).
    transfers
        How the operands of its layers are sent.

    Returns
    -------
    tuple
        The module, and the layers in the order of their results. ``main_link`` takes the inputs, the
        parameters of ``main`` and some of its own; their values stand in its attribute ``params``.
    """
    return _Entry(mod, transfers).run()


class _Entry:
    """Makes the entry point."""

    def __init__(self, mod: Any, transfers: Transfers) -> None:
        self.mod = mod
        self.transfers = transfers
        self.parameters = Parameters()
        self.functions: dict[Any, Any] = {}
        self.kernels: dict[Any, Any] = {}
        self.done: dict[str, SentLayer] = {}
        self.counts: list[Any] = []
        self.batch: Any = None

    def run(self) -> tuple[Any, tuple[SentLayer, ...]]:
        main = self.mod["main"]
        copied = relax.utils.copy_with_new_vars(main)
        shape = getattr(copied.params[0].ty, "shape", None) if copied.params else None
        self.batch = shape[0] if shape else tirx.IntImm("int64", 1)
        # Results leave a dataflow block under other rules.
        variable = tvm.ir.GlobalVar(ENTRY)
        alone = relax.transform.ToNonDataflow()(tvm.IRModule({variable: copied}))
        changed = CallRewriter(None, self._rewrite).visit_expr(alone[ENTRY])
        result = changed.body.body
        values = bindings(changed)
        outputs = values.get(result, result)
        fields = list(outputs.fields) if isinstance(outputs, relax.Tuple) else [result]
        ...
