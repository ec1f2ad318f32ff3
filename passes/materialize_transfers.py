"""MaterializeTransfers: what crosses the link to the array stands in the IR.

Each operand of an integer layer gets a call of ``bitwright.transfer``, which says how it is sent::

    x = R.astype(q, "int32")              s = bitwright.transfer(q, layer="conv1",
    w = R.astype(R.const(codes), "int32")                        operand="inputs", link="{...}")
    c = R.nn.conv2d(x, w)             ->  x = R.astype(s, "int32")
                                          t = bitwright.transfer(R.const(codes), layer="conv1",
                                                                 operand="weights", link="{...}")
                                          w = R.astype(t, "int32")
                                          c = R.nn.conv2d(x, w)

What is sent are codes: of activations as they are stored, of constant weights less their zero
point. The padding of a convolution is sent, too. ``docs/link.md`` says in which sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final

import tvm
from tvm import relax

from bitwright import targets
from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.expressions import (
    LAYER_OPERATORS,
    CallRewriter,
    bindings,
    calls,
    constant,
    is_layer,
    node_name,
    operator,
    rewriting,
)
from bitwright.targets.codegen import IntegerLayer, read_layer
from bitwright.targets.link import Link

__all__ = ["SKIPPED", "MaterializeTransfers", "drop_transfers", "link_of"]

SKIPPED: Final = "bitwright.link.skipped"
"""Attribute of a module: layers without transfers, and why."""

_NO_GEOMETRY = "no kernel computes it, so nobody says in which order its operands are sent"


def link_of(transfer: Any) -> Link:
    """The link of a call of ``bitwright.transfer``."""
    return _link(str(transfer.attrs["link"]))


_link = functools.cache(Link.model_validate_json)  # one text for all layers


def drop_transfers(mod: Any) -> Any:
    """Remove all transfers and orders: values stay, and so do sums of integers."""

    def drop(rewriter: CallRewriter, call: Any, _var: Any) -> Any:
        if operator(call) == ops.TRANSFER:
            # A constant stands in the call that takes it, not behind a variable.
            return call.args[0] if isinstance(call.args[0], relax.Var) else call
        arguments = [_unsent(rewriter, argument) for argument in call.args]
        return relax.Call(call.op, arguments, call.attrs, call.ty_args, call.span)

    def run(mod: Any) -> Any:
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                mod[variable] = CallRewriter(None, drop).visit_expr(function)
        return mod

    return rewriting(run)(mod)


def _unsent(rewriter: CallRewriter, argument: Any) -> Any:
    value = rewriter.value(argument)
    return value.args[0] if operator(value) == ops.TRANSFER else argument


@tvm.transform.module_pass(opt_level=0, name="MaterializeTransfers")
class MaterializeTransfers:
    """Put the transfers of operands in front of integer layers; see the module's docstring.

    Requires: integer layers in functions of their own (PartitionForTarget, LowerToInteger).
    Ensures: both operands of every layer that a kernel can compute are results of
    ``bitwright.transfer``; the module's attribute ``bitwright.link.skipped`` tells of the others.
    Runs in front of PackWeights.

    Parameters
    ----------
    link
        The link: its name, or the path of its description. Empty: that of the accelerator that the
        layers are partitioned for.

    Raises
    ------
    UsageError
        If there is no such link, the accelerator describes none, or codes of a layer, which is
        named, are wider than its words.
    """

    def __init__(self, link: str = "") -> None:
        self.link = link

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite all composite functions."""
        return rewriting(self._rewrite)(mod)

    def _rewrite(self, mod: Any) -> Any:
        skipped = dict(mod.get_attr(SKIPPED) or {})
        links: dict[str, Link] = {}
        for variable, function in mod.functions_items():
            if not is_layer(function):
                if isinstance(function, relax.Function):
                    skipped.update(_others(function))
                continue
            if any(operator(value) == ops.TRANSFER for value in bindings(function).values()):
                continue
            name = str(function.attrs["layer"])
            layer = read_layer(function)
            if layer is None:
                skipped[name] = _NO_GEOMETRY
                continue
            where = self.link or str(function.attrs["target"])
            if not where:
                raise UsageError(
                    "layers are partitioned for no accelerator, so there is no link",
                    fix="name one: link of materialize-transfers, or target of "
                    "partition-for-target",
                )
            if where not in links:
                links[where] = targets.get_link(where)
            _check_words(name, function, layer, links[where])
            insert = _inserting(name, layer, links[where].model_dump_json(exclude_none=True))
            mod[variable] = CallRewriter(None, insert).visit_expr(function)
        return mod.with_attr(SKIPPED, skipped) if skipped else mod


def _others(function: Any) -> Iterator[tuple[str, str]]:
    """Convolutions and products that are no layers of their own, and why they send nothing."""
    for call in calls(function):
        if operator(call) in LAYER_OPERATORS:
            floats = str(call.ty.dtype).startswith("float")
            yield (
                node_name(call) or operator(call),
                "it computes in floating point" if floats else "it is inside a loop or a branch",
            )


def _check_words(name: str, function: Any, layer: IntegerLayer, link: Link) -> None:
    """Refuse codes that are wider than the link's words."""
    widths = [int(bits) for bits in function.attrs["input_bits"]]
    found = dict(zip(function.params, widths, strict=False))
    operands = {"activations": found[layer.data]}
    weights = constant(layer.weights)
    if weights is None:
        operands["the second operand"] = found[layer.weights]
    else:
        operands["weights"] = int(function.attrs["weight_bits"])
    widest = link.word_bits.value
    for what, bits in operands.items():
        if bits > widest:
            raise UsageError(
                f"{what} have {bits} bits, and the link's words {widest}",
                where=f"layer {name!r}",
                fix=f"give the layer {widest} bits or fewer, or name a link with wider words "
                "(materialize-transfers=link:NAME)",
            )
    if weights is not None:
        try:
            link.words(weights)
        except UsageError as error:  # codes less a zero point that is not in the middle
            raise UsageError(
                f"weights less their zero point: {error.what}",
                where=f"layer {name!r}",
                fix="quantize weights symmetrically, or name a link with wider words "
                "(materialize-transfers=link:NAME)",
            ) from None


def _inserting(name: str, layer: IntegerLayer, link: str) -> Any:
    operands = {"inputs": layer.data, "weights": layer.weights}

    def insert(rewriter: CallRewriter, call: Any, _var: Any) -> Any:
        if operator(call) not in ("astype", ops.SOFT_EDGE_DECODE):
            return call
        for operand, expr in operands.items():
            if call.args[0].same_as(expr):
                sent = ops.transfer(expr, layer=name, operand=operand, link=link)
                moved = rewriter.emit(sent, f"sent_{operand}")
                return relax.Call(call.op, [moved], call.attrs, call.ty_args, call.span)
        return call

    return insert
