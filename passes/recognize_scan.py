"""Name the recurrence that the body of a scan computes.

A body is read as polynomials: sums of products of parameters, of functions of other polynomials and
of sums along axes. So it does not matter in which order operands stand, nor which products are
computed inside or outside.

=============================  ====================================================================
``bitwright.selective_scan``   ``h' = a * h + b``, ``y = sum(C * h')`` along one axis of the state,
                               plus perhaps terms without the state (``D * x``). ``a`` is a product
                               of inputs and of exponentials without the state (``exp(dt * A)``),
                               ``b`` a product without the state (``dt * B * x``): Mamba,
                               arXiv 2312.00752, section 3.2
``bitwright.sru``              ``c' = f * c + (1 - f) * x`` with ``f = sigmoid(u + v * c)``, perhaps
                               without ``v * c``; every output is ``c'`` or ``h = r * g(c')``,
                               perhaps with ``+ (1 - r) * z``: arXiv 1709.02755, section 2
``bitwright.recurrence``       any other
=============================  ====================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import tvm_ffi
from tvm import relax, tirx

from bitwright.passes.expressions import constant, operator
from bitwright.quant.polynomials import (
    NEW,
    ONE,
    Atom,
    OtherForm,
    Polynomial,
    add,
    atom_of,
    frozen,
    is_parameter,
    matrix_product,
    moved,
    multiply,
    sources_of,
    without,
)
from bitwright.quant.selective_scan import selective_scan_roles

__all__ = ["COMPOSITES", "RECURRENCE", "SELECTIVE_SCAN", "SRU", "Recognized", "recognize"]

RECURRENCE: Final = "bitwright.recurrence"
SELECTIVE_SCAN: Final = "bitwright.selective_scan"
SRU: Final = "bitwright.sru"
COMPOSITES: Final = (RECURRENCE, SELECTIVE_SCAN, SRU)
"""Attribute ``Composite`` of functions that call a kernel with a time loop."""


@dataclass(frozen=True)
class Recognized:
    """What a body computes.

    Attributes
    ----------
    composite
        One of the names in the module's docstring.
    roles
        Of a selective scan: ``x``, ``dt``, ``B`` and ``C``, to the index of the body's parameter
        that holds it, or that it is a function of; -1 where it is a constant, part of a product
        that is computed outside, or cannot be told from others.
    """

    composite: str
    roles: Mapping[str, int] = field(default_factory=dict)


def recognize(body: Any, captured: Sequence[Any], states: int) -> Recognized:
    """Recognize the recurrence of a body.

    Parameters
    ----------
    body
        Relax function; see ``bitwright.scan``.
    captured
        Arguments for its first parameters; constants where they are known.
    states
        Number of its states.
    """
    if states != 1:
        return Recognized(RECURRENCE)
    try:
        reading = _Reading(body, captured)
    except OtherForm:
        return Recognized(RECURRENCE)
    roles = selective_scan_roles(reading)
    if roles is not None:
        return Recognized(SELECTIVE_SCAN, roles)
    return Recognized(SRU if _is_sru(reading) else RECURRENCE)


def _atom(name: str, key: Sequence[Any], shape: Any, sources: frozenset[int]) -> Polynomial:
    return atom_of(name, key, _long_axes(shape), sources)


def _long_axes(shape: Any) -> list[int]:
    """Axes whose size is not known to be 1, from the last one."""
    sizes = list(shape)
    is_one = [isinstance(size, tirx.IntImm) and int(size.value) == 1 for size in sizes]
    return [axis - len(sizes) for axis, one in enumerate(is_one) if not one]


# -- reading a body --------------------------------------------------------------------------------

# They only insert, remove or repeat axes of size 1; of a reshape that is to be seen.
_RESHAPES = frozenset("broadcast_to expand_dims flatten reshape squeeze".split())


class _Reading:
    """The new state and the outputs of a body as polynomials.

    Attributes
    ----------
    state
        Index of the state among the parameters.
    new
        The new state.
    outputs
        The outputs; the new state in them is the atom ``parameter`` with the index ``NEW``.
    held
        Indices of parameters that are not constant, the state aside.
    """

    def __init__(self, body: Any, captured: Sequence[Any]) -> None:
        self._values: dict[Any, Any] = {}  # a list of polynomials for a tuple
        self.state = len(captured)
        self.held = set()
        for index, parameter in enumerate(body.params):
            known = captured[index] if index < len(captured) else parameter
            if constant(known) is not None:
                self._values[parameter] = self._constant(known)
            else:
                self._values[parameter] = self._parameter(index, parameter)
                self.held.add(index)
        self.held.remove(self.state)
        bindings = [binding for block in body.body.blocks for binding in block.bindings]
        if not all(isinstance(binding, relax.VarBinding) for binding in bindings):
            raise OtherForm  # it checks sizes
        bound = {binding.var: binding.value for binding in bindings}
        result = body.body.body
        result = bound.get(result, result)
        if not isinstance(result, relax.Tuple):
            raise OtherForm
        new, *outputs = result.fields
        self.new: Polynomial = {}
        for variable, value in bound.items():
            if not isinstance(value, relax.Tuple):
                self._values[variable] = self._bound(value)
            if variable.same_as(new):
                self.new = self._values[variable]
                self._values[variable] = self._parameter(NEW, variable)
        self.outputs = [self._value(output) for output in outputs]

    @staticmethod
    def _parameter(index: int, variable: Any) -> Polynomial:
        if variable.ty.shape is None:
            raise OtherForm
        return _atom("parameter", [index], variable.ty.shape, frozenset({index}))

    @staticmethod
    def _constant(expr: Any) -> Polynomial:
        array = constant(expr)
        assert array is not None
        if array.size == 1 and array.dtype.kind == "f":
            return {ONE: float(array.item())}
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        key = [array.shape, array.dtype.name, digest]
        return _atom("constant", key, expr.ty.shape, frozenset())

    def _value(self, expr: Any) -> Polynomial:
        if constant(expr) is not None:
            return self._constant(expr)
        found = self._values.get(expr)
        if not isinstance(found, dict):
            raise OtherForm
        return found

    def _bound(self, expr: Any) -> Any:
        if isinstance(expr, relax.TupleGetItem):
            return self._values[expr.tuple_value][expr.index]
        return self._call(expr) if isinstance(expr, relax.Call) else self._value(expr)

    def _call(self, call: Any) -> Any:
        name = operator(call)
        if name in ("add", "subtract"):
            first, second = map(self._value, call.args)
            return add(first, second, 1.0 if name == "add" else -1.0)
        if name == "multiply":
            return multiply(*map(self._value, call.args))
        if name == "negative":
            return add({}, self._value(call.args[0]), -1.0)
        if name == "square":
            return multiply(*[self._value(call.args[0])] * 2)
        if name == "permute_dims":
            return self._permuted(call)
        if name == "sum":
            rank = call.args[0].ty.ndim
            chosen = range(rank) if call.attrs.axis is None else map(int, call.attrs.axis)
            axes = tuple(sorted(axis % rank - rank for axis in chosen))
            return self._summed(self._value(call.args[0]), axes, call)
        if name == "matmul":
            return self._matmul(call)
        if name in _RESHAPES and (place := _places(call)) is not None:
            return moved(self._value(call.args[0]), place.__getitem__)
        return self._other(call, name)

    def _permuted(self, call: Any) -> Polynomial:
        rank = call.ty.ndim
        axes = call.attrs.axes
        order = range(rank)[::-1] if axes is None else [int(axis) % rank for axis in axes]
        place = {old - rank: new - rank for new, old in enumerate(order)}
        return moved(self._value(call.args[0]), place.__getitem__)

    @staticmethod
    def _summed(operand: Polynomial, axes: tuple[int, ...], call: Any) -> Polynomial:
        if call.ty.shape is None:
            raise OtherForm
        return _atom("sum", [frozen(operand), axes], call.ty.shape, sources_of(operand))

    def _matmul(self, call: Any) -> Polynomial:
        left, right = map(self._value, call.args)
        products = matrix_product(left, right, call.args[1].ty.ndim)
        return self._summed(products, (-1,), call)

    def _other(self, call: Any, name: str) -> Any:
        """A function that the polynomials do not look into."""
        key: list[Any] = [str(call.attrs)]
        operands = [
            entry
            for argument in call.args
            for entry in (argument.fields if isinstance(argument, relax.Tuple) else [argument])
        ]
        sources: frozenset[int] = frozenset()
        for operand in operands:
            if isinstance(operand.ty, relax.TensorType):
                value = self._value(operand)
                key.append(frozen(value))
                sources |= sources_of(value)
            else:
                key.append(str(operand))
        kinds = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
        if not name or any(getattr(kind, "shape", None) is None for kind in kinds):
            raise OtherForm
        made = [_atom(name, [*key, i], kind.shape, sources) for i, kind in enumerate(kinds)]
        return made if isinstance(call.ty, relax.TupleType) else made[0]


def _places(call: Any) -> dict[int, int] | None:
    """Where a reshape moves the axes whose size is not 1; None if it does more than that."""
    before, after = call.args[0].ty.shape, call.ty.shape
    if before is None or after is None:
        return None
    if operator(call) == "broadcast_to":
        return {axis: axis for axis in range(-len(before), 0)}
    old, new = _long_axes(before), _long_axes(after)
    same = len(old) == len(new) and all(
        tvm_ffi.structural_equal(before[a], after[b]) for a, b in zip(old, new, strict=True)
    )
    return dict(zip(old, new, strict=True)) if same else None


_ACTIVATIONS = frozenset("nn.gelu nn.relu nn.silu sigmoid tanh".split())


# -- recurrences -----------------------------------------------------------------------------------


def _is_sru(reading: _Reading) -> bool:
    stateful = {reading.state, NEW}
    gated = [p for p in reading.new if without(p, reading.state) is not None]
    if len(reading.new) != 3 or len(gated) != 1 or reading.new[gated[0]] != 1.0:
        return False
    gate = without(gated[0], reading.state)
    if gate is None or len(gate) != 1 or not _is_gate(gate[0], reading.state):
        return False
    rest = {product: number for product, number in reading.new.items() if product != gated[0]}
    if not _complements(gate[0], rest, stateful):
        return False
    return all(_is_hidden(output, reading, stateful) for output in reading.outputs)


def _is_gate(atom: Atom, state: int) -> bool:
    """Whether a factor is the sigmoid of an input, perhaps plus the state times something."""
    if atom.name != "sigmoid" or atom.axes != atom.made:
        return False
    terms = [product for product, _ in atom.key[1]]
    free = [product for product in terms if not sources_of({product: 1.0}) & {state, NEW}]
    others = [without(product, state) for product in terms if product not in free]
    if not any(sources_of({product: 1.0}) for product in free) or len(others) > 1:
        return False
    return all(
        factors is not None and not any(factor.sources & {state, NEW} for factor in factors)
        for factors in others
    )


def _complements(gate: Atom, terms: Polynomial, stateful: set[int]) -> bool:
    """Whether terms are ``(1 - gate) * x`` with a product ``x`` that has no state in it."""
    plain = [p for p, number in terms.items() if number == 1.0 and (gate, 1) not in p]
    if len(terms) != 2 or len(plain) != 1 or sources_of({plain[0]: 1.0}) & stateful:
        return False
    return bool(sources_of({plain[0]: 1.0})) and terms.get(plain[0] | {(gate, 1)}) == -1.0


def _is_activation_of_new(atom: Atom) -> bool:
    """Whether a factor is a function of the new state alone, channel by channel."""
    if atom.name not in _ACTIVATIONS or atom.axes != atom.made or len(atom.key[1]) != 1:
        return False
    ((product, _),) = atom.key[1]
    return without(product, NEW) == []


def _is_hidden(output: Polynomial, reading: _Reading, stateful: set[int]) -> bool:
    """Whether an output is the new state, or a function of it behind a gate."""
    from_new = [product for product in output if NEW in sources_of({product: 1.0})]
    if len(from_new) != 1 or output[from_new[0]] != 1.0:
        return False
    states = [
        atom
        for atom, power in from_new[0]
        if power == 1 and (is_parameter(atom, NEW) or _is_activation_of_new(atom))
    ]
    gates = [atom for atom, _ in from_new[0] if atom not in states]
    if len(states) != 1 or len(gates) > 1:
        return False
    rest = {product: number for product, number in output.items() if product != from_new[0]}
    if not gates:
        return not rest and is_parameter(states[0], NEW)
    if not _is_gate(gates[0], reading.state):
        return False
    return not rest or _complements(gates[0], rest, stateful)
