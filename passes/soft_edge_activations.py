"""SoftEdgeActivations: inputs of selective scans in several scales instead of one.

Eight bits of one scale clip the outliers of a Mamba's activations, or are coarse for all else.
Quamba-SE (arXiv 2601.09451) gives the SSM input three scales, derived from the calibrated one::

    q = R.quantize(u, s, 0)                  e = bitwright.soft_edge_encode(u, s / 4)
    x = R.dequantize(q, s, 0)                d = bitwright.soft_edge_decode(e)
    h = bitwright.scan(cls.body,        ->   x = R.dequantize(d, s / 4, 0)
        (A,), (h0,), (dt, x, B, C))          h = bitwright.scan(cls.body,
                                                 (A,), (h0,), (dt, x, B, C))

The encoder stands where the tensor is produced; moves between quantizer and scan carry codes as
before. Only what the scan reads changes: a projection that reads the same int8 codes goes on
reading them, as in the paper, and both kinds of codes are made of the same values. ``LowerScan``
makes a kernel that reads codes and decodes them inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import tvm
from tvm import relax

from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.expressions import (
    LAYER_OPERATORS,
    Array,
    CallRewriter,
    bindings,
    constant,
    is_integer_layer,
    is_move,
    node_name,
    operator,
    quantizer,
    rewriting,
    same_move,
    with_span,
)
from bitwright.passes.partition_for_target import PRECISIONS
from bitwright.passes.recognize_scan import SELECTIVE_SCAN, recognize
from bitwright.soft_edge import SoftEdge
from bitwright.vocabulary import Precision

__all__ = ["SoftEdgeActivations"]

_TENSORS: Final = ("x", "dt", "B", "C", "y")
_NORMALISATIONS: Final = (
    "nn.batch_norm nn.group_norm nn.instance_norm nn.layer_norm nn.rms_norm".split()
)
_FINEST: Final = 0.25  # of quamba-se, in units of the calibrated scale


class _OtherForm(Exception):
    """A tensor is not quantized in the form that is rewritten; says how it is."""


@dataclass(frozen=True)
class _Path:
    """How a quantized tensor comes to its reader.

    Attributes
    ----------
    quantized, dequantized
        The variables of ``R.quantize`` and ``R.dequantize``.
    codes, values
        Moves of codes, and of what they are dequantized to, in the order of execution; parts of a
        split among them.
    scale
        Of the quantizer.
    """

    quantized: Any
    dequantized: Any
    codes: tuple[Any, ...]
    values: tuple[Any, ...]
    scale: np.float32


@dataclass
class _Found:
    """What is rewritten in one function.

    Attributes
    ----------
    scans
        Variable of a scan, to the paths of its sequences, by their index.
    layers
        Variable of a layer behind a scan, to the paths of its arguments, by their index.
    names
        Nodes of these layers.
    others
        Tensors that were asked for and cannot have it, and why.
    done
        How many tensors have the wanted form already.
    """

    scans: dict[Any, dict[int, _Path]] = field(default_factory=dict)
    layers: dict[Any, dict[int, _Path]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)
    done: int = 0

    @property
    def paths(self) -> list[_Path]:
        """All that is rewritten."""
        readers = [*self.scans.values(), *self.layers.values()]
        return [path for found in readers for path in found.values()]


class _Search:
    """Finds the quantized tensors of one function."""

    def __init__(self, mod: Any, function: Any, tensors: Sequence[str]) -> None:
        self._mod = mod
        self._bound = bindings(function)
        self._tensors = tensors
        self._users: dict[Any, list[Any]] = {}
        for var, value in self._bound.items():
            for used in relax.analysis.free_vars(value):
                self._users.setdefault(used, []).append(var)
        self.found = _Found()
        for var, value in self._bound.items():
            if operator(value) == ops.SCAN:
                self._scan(var, value)

    def _value(self, expr: Any) -> Any:
        while isinstance(expr, relax.Var) and expr in self._bound:
            expr = self._bound[expr]
        return expr

    def _scan(self, var: Any, call: Any) -> None:
        body, captured, states, sequences = call.args
        known = [self._value(entry) for entry in captured.fields]
        arguments = [
            value if constant(value) is not None else given
            for value, given in zip(known, captured.fields, strict=True)
        ]
        recognized = recognize(self._mod[body], arguments, len(states.fields))
        if recognized.composite != SELECTIVE_SCAN:
            return
        name = node_name(call) or var.name
        first = len(captured.fields) + len(states.fields)
        for tensor in self._tensors:
            what = f"{tensor} of {name!r}"
            try:
                if tensor == "y":
                    self._output(var, len(states.fields))
                    continue
                index = recognized.roles[tensor] - first
                if index < 0:
                    raise _OtherForm("is no sequence that enters it by itself")
                path = self._path(sequences.fields[index])
                if path is not None:
                    self.found.scans.setdefault(var, {})[index] = path
            except _OtherForm as other:
                self.found.others.append(f"{what} {other}")

    def _path(self, expr: Any) -> _Path | None:
        """The way from a quantizer to ``expr``; None if it is in soft-edge form already."""
        moves: list[Any] = []

        def back(expr: Any) -> tuple[Any, Any]:
            var, value = self._source(expr)
            while is_move(value) or self._split(value) is not None:
                moves.insert(0, value)
                split = self._split(value)
                var, value = self._source((value if split is None else split).args[0])
            return var, value

        reader, value = back(expr)
        read = quantizer(value, "dequantize")
        if read is None:
            raise _OtherForm("is not quantized")
        values, moves = moves, []
        var, value = back(read.operand)
        if operator(value) == ops.SOFT_EDGE_DECODE:
            self.found.done += 1
            return None
        written = quantizer(value, "quantize")
        if written is None or not written.same_parameters(read):
            raise _OtherForm("has codes that no quantizer in front of it makes")
        if written.dtype != "int8" or not written.per_tensor or int(written.zero_point):
            form = f"is quantized as {written.dtype}"
            form += (
                f" with zero point {int(written.zero_point)}"
                if written.per_tensor
                else (" with a scale for each channel")
            )
            raise _OtherForm(f"{form}, not symmetrically as int8 with one scale")
        return _Path(var, reader, tuple(moves), tuple(values), np.float32(written.scale))

    def _split(self, value: Any) -> Any | None:
        """The split that a value is a part of."""
        if not isinstance(value, relax.TupleGetItem):
            return None
        whole = self._value(value.tuple_value)
        return whole if operator(whole) == "split" else None

    def _source(self, expr: Any) -> tuple[Any, Any]:
        """The last variable that renames an expression, and its value."""
        while isinstance(self._bound.get(expr), relax.Var):
            expr = self._bound[expr]
        return expr, self._value(expr)

    def _output(self, scan: Any, states: int) -> None:
        """The quantizers that the output of a scan enters, and the layers behind them."""
        pending = [
            var
            for var in self._users.get(scan, [])
            if isinstance(self._bound[var], relax.TupleGetItem) and self._bound[var].index == states
        ]
        seen = set(pending)
        layers: list[tuple[Any, Any]] = []  # variables of what is dequantized, and of its reader
        for var in pending:  # it grows
            for user in self._users.get(var, []):
                value = self._bound[user]
                name = operator(value)
                if is_integer_layer(value, self._value):
                    layers.append((var, user))
                elif name not in (ops.SCAN, ops.COND) and user not in seen:
                    seen.add(user)
                    if not self._makes_another_tensor(value):
                        pending.append(user)
        if not layers:
            raise _OtherForm(
                "reaches no layer through a quantizer, before a float layer or a normalisation"
            )
        for var, layer in layers:
            path = self._path(var)
            if path is None:
                continue
            self.found.names.add(node_name(self._bound[layer]))
            for index, argument in enumerate(self._bound[layer].args):
                if var.same_as(argument):
                    self.found.layers.setdefault(layer, {})[index] = path

    def _makes_another_tensor(self, value: Any) -> bool:
        """Whether it is a layer that stays float, or a normalisation; a rotation is neither."""
        name = operator(value)
        if name in LAYER_OPERATORS:
            return not any(_is_rotation(constant(entry)) for entry in map(self._value, value.args))
        if name in ("multiply", "divide"):  # by the root of the mean square
            factors = [self._value(entry) for entry in value.args]
            return any(map(self._is_inverse_root, factors)) or self._is_inverse_root(value)
        return name in _NORMALISATIONS

    def _is_inverse_root(self, value: Any) -> bool:
        by = self._value(value.args[1]) if operator(value) == "divide" else None
        return operator(value) == "rsqrt" or operator(by) == "sqrt"


def _is_rotation(matrix: Array | None) -> bool:
    """Whether it is a square matrix whose rows are orthogonal and of one length."""
    if matrix is None or matrix.ndim != 2 or len(matrix) != matrix.shape[1]:
        return False
    # If and only if W @ W.T is a multiple of the identity it multiplies any vector; two tell.
    vectors = np.random.default_rng(0).normal(size=(len(matrix), 2))
    wide = matrix.astype(np.float64)
    length = (wide[0] ** 2).sum()
    return bool(np.allclose(wide @ (wide.T @ vectors), length * vectors, 1e-3, 1e-3 * length))


def _rebuilt(rewriter: CallRewriter, moves: Sequence[Any], data: Any, zero_point: int) -> Any:
    """The same moves of other data, whose element for 0 is ``zero_point``."""
    for move in moves:
        if isinstance(move, relax.TupleGetItem):
            split = rewriter.value(rewriter.visit_expr(move.tuple_value))
            parts = rewriter.emit(same_move(split, data, zero_point))
            data = rewriter.emit(relax.TupleGetItem(parts, move.index))
            continue
        arguments = [rewriter.visit_expr(entry) for entry in move.args[1:]]
        call = relax.Call(move.op, [move.args[0], *arguments], move.attrs, move.ty_args, move.span)
        data = rewriter.emit(same_move(call, data, zero_point))
    return data


@tvm.transform.module_pass(opt_level=0, name="SoftEdgeActivations")
class SoftEdgeActivations:
    """Give inputs of selective scans soft-edge codes of several scales; see the module's docstring.

    Requires: ``R.quantize`` / ``R.dequantize`` of int8, symmetric and with one scale, on tensors
    that enter selective scans (``bitwright quantize --recipe quamba``). Ensures: such a tensor is
    dequantized from ``bitwright.soft_edge_decode``, its codes are made by
    ``bitwright.soft_edge_encode`` where the quantizer stands; what else reads the int8 codes goes
    on reading them. Loops that are no selective scans are left alone.

    Parameters
    ----------
    layout
        ``quamba-se``, or the text of a layout, in parentheses.
    edges
        Where fine, standard and outlier segment end, in units of the calibrated scale, with slashes
        between: ``15.75/143/395``. With ``ratios`` instead of a layout.
    ratios
        Steps of these segments, in the same unit: ``0.25/1/4``.
    finest
        The finest step in units of the calibrated scale; 0 for what ``ratios`` or ``quamba-se``
        say. Any other layout needs it.
    tensors
        Which inputs: ``x``, ``dt``, ``B``, ``C``, and ``y`` for what the layer behind the scan
        (out_proj) reads, with a plus between: ``x+B+C``. Every selective scan has to have them
        quantized.

    Raises
    ------
    UsageError
        If an option is wrong, the module has no selective scan, or one of the tensors has another
        form in some of them; which and why is said.
    """

    def __init__(
        self,
        layout: str = "quamba-se",
        edges: str | Sequence[float] = "",
        ratios: str | Sequence[float] = "",
        finest: float = 0.0,
        tensors: str | Sequence[str] = "x",
    ) -> None:
        self.tensors = tensors.split("+") if isinstance(tensors, str) else list(tensors)
        unknown = [tensor for tensor in self.tensors if tensor not in _TENSORS]
        if unknown or not self.tensors:
            raise UsageError(
                f"a selective scan has no {' and no '.join(map(repr, unknown)) or 'such input'}",
                fix="tensors are of " + ", ".join(_TENSORS) + ", with a plus between",
            )
        if (edges or ratios) and layout != "quamba-se":
            raise UsageError(
                f"edges and ratios are a layout, and {layout} is another one",
                fix="give either",
            )
        if (not edges) != (not ratios):
            raise UsageError("edges and ratios are given together", fix="add the other")
        if edges:
            three = _numbers("edges", edges), _numbers("ratios", ratios)
            self.layout = SoftEdge.three_scales(*three)
            usual = three[1][0]
        else:
            self.layout = SoftEdge.parse(layout)
            usual = _FINEST if layout == "quamba-se" else 0.0
        self.finest = finest or usual
        if not 0 < self.finest < np.inf:
            raise UsageError(
                f"the finest step of the layout {layout} is {self.finest:g} calibrated scales",
                fix="give finest, a positive number",
            )

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite every Relax function."""
        return rewriting(self._rewrite)(mod)

    def _rewrite(self, mod: Any) -> Any:
        found = {
            variable: _Search(mod, function, self.tensors).found
            for variable, function in mod.functions_items()
            if isinstance(function, relax.Function)
        }
        others = [text for entry in found.values() for text in entry.others]
        if others or not any(entry.paths or entry.done for entry in found.values()):
            raise UsageError(
                "not all that is asked for can have soft-edge codes: "
                + ("; ".join(others) or "the model has no selective scan"),
                fix="quantize what selective scans read (bitwright quantize --recipe quamba), or "
                "leave soft-edge, or these of its tensors, out",
            )
        for variable, entry in found.items():
            if entry.paths:
                rewriter = CallRewriter(mod, self._replace(entry))
                mod[variable] = rewriter.visit_expr(mod[variable])
        return self._with_precisions(mod, {n for entry in found.values() for n in entry.names})

    def _replace(self, found: _Found) -> Callable[[CallRewriter, Any, Any], Any]:
        scales = {path.quantized: path.scale for path in found.paths}
        readers = {path.dequantized: path for path in found.paths}
        encoded: dict[Any, Any] = {}
        decoded: dict[Any, Any] = {}

        def read(rewriter: CallRewriter, given: Any, paths: Mapping[int, _Path]) -> list[Any]:
            """The arguments of a scan or layer, those with a path decoded."""
            arguments = list(given)
            for index, path in paths.items():
                value = decoded[path.dequantized]
                arguments[index] = _rebuilt(rewriter, path.values, value, 0)
            return arguments

        def replace(rewriter: CallRewriter, call: Any, var: Any) -> Any:
            if var in scales:
                step = relax.const(self._step(scales[var]))
                encode = ops.soft_edge_encode(call.args[0], step, layout=self.layout)
                encoded[var] = rewriter.emit(with_span(encode, call))
            elif var in readers:
                path = readers[var]
                codes = encoded[path.quantized]
                codes = _rebuilt(rewriter, path.codes, codes, self.layout.zero_point)
                steps = rewriter.emit(ops.soft_edge_decode(codes, layout=self.layout))
                step, zero = relax.const(self._step(path.scale)), relax.const(np.int16(0), "int16")
                value = with_span(relax.op.dequantize(steps, step, zero, axis=0), call)
                decoded[var] = rewriter.emit(value)
            elif var in found.scans:
                sequences = read(rewriter, call.args[3].fields, found.scans[var])
                arguments = [*call.args[:3], relax.Tuple(sequences)]
                return relax.Call(call.op, arguments, call.attrs, call.ty_args, call.span)
            elif var in found.layers:
                arguments = read(rewriter, call.args, found.layers[var])
                return relax.Call(call.op, arguments, call.attrs, call.ty_args, call.span)
            return call

        return replace

    def _step(self, scale: np.float32) -> np.float32:
        return np.float32(float(scale) * self.finest)

    def _with_precisions(self, mod: Any, layers: set[str]) -> Any:
        """Note the form of what layers now read."""
        precisions: Mapping[str, str] = mod.get_attr(PRECISIONS) or {}
        form = self.layout.activation
        changed = {name: str(text) for name, text in precisions.items()}
        for name in layers & changed.keys():
            bits = Precision.parse(changed[name]).weight_bits
            changed[name] = str(Precision(bits, form.bits, form.format))
        return mod.with_attr(PRECISIONS, changed) if layers and precisions else mod


def _numbers(name: str, given: str | Sequence[float]) -> tuple[float, float, float]:
    try:
        entries = given.split("/") if isinstance(given, str) else given
        first, second, third = map(float, entries)
    except (TypeError, ValueError):
        raise UsageError(
            f"{name} are three numbers, not {given!r}", fix="write 15.75/143/395, say"
        ) from None
    return first, second, third
