"""PartitionForTarget: one composite function for each layer.

A layer is a convolution or matrix product of codes, with the bias, the clamps and the quantizer
that follow::

    x = R.dequantize(q, ...)                           q1 = cls.conv1(q)
    w = R.dequantize(R.const(...), ...)
    c = R.nn.conv2d(x, w)                     ->   @R.function(private=True)
    r = R.nn.relu(R.add(c, b))                     def conv1(q):
    q1 = R.quantize(r, ...)                            R.func_attr({"layer": "conv1", ...})
                                                       ... the same operators ...

Layers are never merged. An accumulator that is used in several ways gets a function for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import tvm
from tvm import relax

from bitwright import targets
from bitwright.passes.expressions import (
    CallRewriter,
    Sizes,
    bindings,
    bodies,
    code_bits,
    constant,
    is_integer_layer,
    node_name,
    operator,
    quantizer,
    rewriting,
    scalar,
    soft_edge,
)
from bitwright.vocabulary import Precision

__all__ = ["PartitionForTarget"]

PRECISIONS = "bitwright.precisions"


class _Graph:
    """What a function binds, and who uses it."""

    def __init__(self, function: Any) -> None:
        self.bound = bindings(function)
        self.users: dict[Any, list[Any]] = {}
        for var, value in self.bound.items():
            for used in relax.analysis.free_vars(value):
                self.users.setdefault(used, []).append(var)
        self.outputs = set(relax.analysis.free_vars(function.body.body))

    def value(self, expr: Any) -> Any:
        """Expression that a variable stands for."""
        while isinstance(expr, relax.Var) and expr in self.bound:
            expr = self.bound[expr]
        return expr

    def codes(self, expr: Any) -> Any | None:
        """The dequantized operand behind an expression; None if it is not dequantized."""
        found = quantizer(self.value(expr), "dequantize")
        return None if found is None else found.operand

    def is_stored(self, expr: Any) -> bool:
        """Whether an expression is constant, as floats or as codes."""
        value = self.value(expr)
        codes = self.codes(value)
        return constant(value if codes is None else codes) is not None

    def ends(self, var: Any, *, clamped: bool = False) -> Iterator[Any]:
        """Variables at which the accumulator ``var`` leaves the layer."""
        needs_float = var in self.outputs
        for user in self.users.get(var, []):
            call = self.bound[user]
            name = operator(call)
            parameters = quantizer(call, "quantize")
            if parameters is not None and parameters.per_tensor:
                yield self._narrowed(user)
            elif name == "nn.relu" or (
                name in ("clip", "maximum", "minimum")
                and call.args[0].same_as(var)
                and all(scalar(bound) is not None for bound in call.args[1:])
            ):
                yield from self.ends(user, clamped=True)
            elif name == "add" and not clamped and self._other_is_stored(call, var):
                yield from self.ends(user)
            else:
                needs_float = True
        if needs_float:
            yield var

    def _other_is_stored(self, call: Any, var: Any) -> bool:
        left, right = call.args
        return self.is_stored(right if left.same_as(var) else left)

    def _narrowed(self, var: Any) -> Any:
        """The clip to fewer bits behind a quantizer, if that is its only use."""
        users = self.users.get(var, [])
        if len(users) == 1 and var not in self.outputs and operator(self.bound[users[0]]) == "clip":
            return users[0]
        return var


def _outline(graph: _Graph, end: Any, name: str, attrs: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Make a function of what computes ``end`` from codes; also return the codes it takes."""
    inputs: dict[Any, Any] = {}
    emitted: dict[Any, Any] = {}  # also the parameters
    pending: list[tuple[Any, Any]] = []

    sizes = Sizes()

    def collect(expr: Any) -> None:
        if not isinstance(expr, relax.Var) or expr in emitted:
            return
        value = graph.bound[expr]
        if operator(value) == "dequantize" and constant(value.args[0]) is None:
            codes = value.args[0]
            decode = graph.value(codes)
            if soft_edge(decode) is not None:  # it becomes part of the layer
                pending.append((codes, decode))
                codes = decode.args[0]
            if codes not in inputs:
                inputs[codes] = emitted[codes] = relax.Var(codes.name, sizes.renewed(codes.ty))
        else:
            for argument in value.args if isinstance(value, relax.Call) else [value]:
                collect(argument)
        emitted[expr] = expr  # once is enough
        pending.append((expr, value))

    collect(end)
    builder = relax.BlockBuilder()
    with builder.function(name, list(inputs.values()), attrs=dict(attrs), private=True):
        with builder.dataflow():
            for var, value in pending:
                if isinstance(value, relax.Call):
                    arguments = [emitted.get(entry, entry) for entry in value.args]
                    emitted[var] = builder.emit(
                        relax.Call(value.op, arguments, value.attrs, value.ty_args, value.span),
                        var.name,
                    )
                else:
                    emitted[var] = emitted.get(value, value)
            result = builder.emit_output(emitted[end])
        builder.emit_func_output(result)
    function = next(f for f in builder.get().functions.values())
    return function, list(inputs)


@tvm.transform.module_pass(opt_level=0, name="PartitionForTarget")
class PartitionForTarget:
    """Make one composite function of each layer; see the module's docstring.

    Requires: dequantizers directly in front of layers (PropagateQuantization). Ensures: every
    convolution or matrix product of codes is the body of a private function with the attributes
    ``Composite`` (``bitwright.conv2d``, ...), ``layer`` (the ONNX node), ``target``,
    ``weight_bits``, ``activation_bits``, ``input_bits`` and ``output_bits``; where its inputs are
    soft-edge codes, which it decodes itself, also ``activation_format``. A product of two
    activations has no ``weight_bits``, and with soft-edge codes the form of the wider ones.

    Parameters
    ----------
    target
        Name of the accelerator, or a file that describes one (``compile`` sets it from
        ``--target``). Empty: none, any precision goes.

    Raises
    ------
    PlanError
        If the accelerator cannot do the precision of a layer; such layers are named.
    UsageError
        If there is no such accelerator.
    """

    def __init__(self, target: str = "") -> None:
        self.target = target

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Outline the layers of every Relax function but composites, loops' bodies and branches."""
        return rewriting(self._rewrite)(mod)

    def _rewrite(self, mod: Any) -> Any:
        precisions = mod.get_attr(PRECISIONS) or {}
        found: dict[str, Precision] = {}
        inner = bodies(mod)  # the loop around it becomes a kernel; weights are packed in main only
        for variable, function in mod.functions_items():
            if variable.name_hint in inner:
                continue
            if isinstance(function, relax.Function) and "Composite" not in (function.attrs or {}):
                graph = _Graph(function)
                ends: dict[Any, Any] = {}
                for var, value in graph.bound.items():
                    if is_integer_layer(value, graph.value):
                        ends.update(dict.fromkeys(graph.ends(var), var))
                if not ends:
                    continue
                rewriter = CallRewriter(mod, self._replace(graph, ends, precisions, found))
                changed = rewriter.visit_expr(function)
                mod = rewriter.builder_.get()
                mod[variable] = changed
        if self.target:
            targets.get(self.target).check(found, where=f"target {self.target}")
        return mod

    def _replace(
        self,
        graph: _Graph,
        ends: Mapping[Any, Any],
        precisions: Mapping[str, str],
        found: dict[str, Precision],
    ) -> Any:
        def replace(rewriter: CallRewriter, call: Any, var: Any) -> Any:
            if var not in ends:
                return call
            layer = ends[var]
            operation = graph.bound[layer]
            name = node_name(operation) or layer.name
            attributes, checked = self._attributes(graph, operation, name, var, precisions)
            for number, precision in enumerate(checked, 1):
                found[name if number == 1 else f"{name}, operand {number}"] = precision
            title = re.sub(r"\W", "_", layer.name) + "_layer"
            function, inputs = _outline(graph, var, title, attributes)
            target = rewriter.builder_.add_func(function, title)
            arguments = [rewriter.visit_expr(entry) for entry in inputs]
            return relax.Call(target, arguments, span=operation.span)

        return replace

    def _attributes(
        self, graph: _Graph, operation: Any, name: str, end: Any, precisions: Mapping[str, str]
    ) -> tuple[dict[str, Any], list[Precision]]:
        """Attributes of a layer, and the precisions that its target has to allow."""
        codes = [graph.codes(argument) for argument in operation.args]
        widths = [code_bits(entry, graph.value) for entry in codes]
        stored = [constant(entry) is not None for entry in codes]
        layouts = [soft_edge(graph.value(entry)) for entry in codes]
        forms = [None if layout is None else layout.activation for layout in layouts]
        attributes: dict[str, Any] = {
            "Composite": "bitwright." + operator(operation).removeprefix("nn."),
            "layer": name,
            "target": self.target,
            "input_bits": [w for w, known in zip(widths, stored, strict=True) if not known],
        }
        if str(end.ty.dtype).startswith(("int", "uint")):
            attributes["output_bits"] = code_bits(end, graph.value)
        decoded = [form for form in forms if form is not None]
        if decoded:
            widest = max(decoded, key=lambda form: form.stored_bits)
            attributes["activation_bits"] = widest.bits
            attributes["activation_format"] = widest.format
        if not any(stored):
            # What decodes one operand has the other in the place of weights.
            bits = [
                width if form is None else form.bits
                for width, form in zip(widths, forms, strict=True)
            ]
            return attributes, [
                Precision(other, form.bits, form.format)
                for form, other in zip(forms, reversed(bits), strict=True)
                if form is not None
            ]
        weights = stored.index(True)
        text = precisions.get(name)
        precision = Precision.parse(str(text)) if text is not None else None
        attributes["weight_bits"] = precision.weight_bits if precision else widths[weights]
        form = forms[1 - weights]
        if form is not None:
            return attributes, [Precision(attributes["weight_bits"], form.bits, form.format)]
        attributes["activation_bits"] = widths[1 - weights]
        if precision is None and all(width in (2, 4, 8, 16) for width in widths):
            precision = Precision(weight_bits=widths[weights], activation_bits=widths[1 - weights])
        return attributes, [] if precision is None else [precision]
