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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np
import tvm_ffi
from tvm import relax, tirx

from bitwright.passes.expressions import constant, operator

__all__ = ["COMPOSITES", "RECURRENCE", "SELECTIVE_SCAN", "SRU", "Recognized", "recognize"]

RECURRENCE: Final = "bitwright.recurrence"
SELECTIVE_SCAN: Final = "bitwright.selective_scan"
SRU: Final = "bitwright.sru"
COMPOSITES: Final = (RECURRENCE, SELECTIVE_SCAN, SRU)
"""Attribute ``Composite`` of functions that call a kernel with a time loop."""

_MAX_TERMS = 64  # of one polynomial
_NEW = -1  # stands for the new state, where a parameter has its index


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
    except _OtherForm:
        return Recognized(RECURRENCE)
    roles = _selective_scan(reading)
    if roles is not None:
        return Recognized(SELECTIVE_SCAN, roles)
    return Recognized(SRU if _is_sru(reading) else RECURRENCE)


class _OtherForm(Exception):
    """The body holds what is no expression of tensors, or too many products."""


# -- polynomials -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Atom:
    """A factor of a product.

    Attributes
    ----------
    name
        ``parameter``, ``constant``, ``sum`` or the name of an operator.
    key
        What it is made of: operands (polynomials), attributes.
    made
        Axes that its size is not 1 along, from the last one (-1), where it was made.
    axes
        Where these axes are now.
    sources
        Indices of the parameters that it depends on.
    """

    name: str
    key: tuple[Any, ...]
    made: tuple[int, ...]
    axes: tuple[int, ...]
    sources: frozenset[int] = field(compare=False)


@lru_cache(maxsize=1 << 12)
def _only(atom: _Atom) -> _Atom:
    """The one object of equal atoms: to compare what they are made of may take exponential time."""
    return atom


_Product = frozenset[tuple[_Atom, int]]  # atoms and their powers
_Polynomial = dict[_Product, float]  # products and their coefficients

_ONE: _Product = frozenset()


def _sum(first: _Polynomial, second: _Polynomial, sign: float = 1.0) -> _Polynomial:
    result = dict(first)
    for product, number in second.items():
        result[product] = result.get(product, 0.0) + sign * number
    return {product: number for product, number in result.items() if number}


def _product(first: _Polynomial, second: _Polynomial) -> _Polynomial:
    if len(first) * len(second) > _MAX_TERMS:
        raise _OtherForm
    result: _Polynomial = {}
    for one, number in first.items():
        for other, factor in second.items():
            powers = dict(one)
            for atom, power in other:
                powers[atom] = powers.get(atom, 0) + power
            result = _sum(result, {frozenset(powers.items()): number * factor})
    return result


def _moved(polynomial: _Polynomial, place: Callable[[int], int]) -> _Polynomial:
    """The polynomial with its axes at other places."""
    result: _Polynomial = {}
    for product, number in polynomial.items():
        atoms = [
            (_only(_Atom(a.name, a.key, a.made, tuple(map(place, a.axes)), a.sources)), power)
            for a, power in product
        ]
        result = _sum(result, {frozenset(atoms): number})
    return result


def _frozen(polynomial: _Polynomial) -> frozenset[tuple[_Product, float]]:
    return frozenset(polynomial.items())


def _sources(polynomial: _Polynomial) -> frozenset[int]:
    return frozenset(i for product in polynomial for atom, _ in product for i in atom.sources)


def _atom(name: str, key: Sequence[Any], shape: Any, sources: frozenset[int]) -> _Polynomial:
    axes = tuple(_long_axes(shape))
    return {frozenset({(_only(_Atom(name, tuple(key), axes, axes, sources)), 1)}): 1.0}


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
        The outputs; the new state in them is the atom ``parameter`` with the index ``_NEW``.
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
            raise _OtherForm  # it checks sizes
        bound = {binding.var: binding.value for binding in bindings}
        result = body.body.body
        result = bound.get(result, result)
        if not isinstance(result, relax.Tuple):
            raise _OtherForm
        new, *outputs = result.fields
        self.new: _Polynomial = {}
        for variable, value in bound.items():
            if not isinstance(value, relax.Tuple):
                self._values[variable] = self._bound(value)
            if variable.same_as(new):
                self.new = self._values[variable]
                self._values[variable] = self._parameter(_NEW, variable)
        self.outputs = [self._value(output) for output in outputs]

    @staticmethod
    def _parameter(index: int, variable: Any) -> _Polynomial:
        if variable.ty.shape is None:
            raise _OtherForm
        return _atom("parameter", [index], variable.ty.shape, frozenset({index}))

    @staticmethod
    def _constant(expr: Any) -> _Polynomial:
        array = constant(expr)
        assert array is not None
        if array.size == 1 and array.dtype.kind == "f":
            return {_ONE: float(array.item())}
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        key = [array.shape, array.dtype.name, digest]
        return _atom("constant", key, expr.ty.shape, frozenset())

    def _value(self, expr: Any) -> _Polynomial:
        if constant(expr) is not None:
            return self._constant(expr)
        found = self._values.get(expr)
        if not isinstance(found, dict):
            raise _OtherForm
        return found

    def _bound(self, expr: Any) -> Any:
        if isinstance(expr, relax.TupleGetItem):
            return self._values[expr.tuple_value][expr.index]
        return self._call(expr) if isinstance(expr, relax.Call) else self._value(expr)

    def _call(self, call: Any) -> Any:
        name = operator(call)
        if name in ("add", "subtract"):
            first, second = map(self._value, call.args)
            return _sum(first, second, 1.0 if name == "add" else -1.0)
        if name == "multiply":
            return _product(*map(self._value, call.args))
        if name == "negative":
            return _sum({}, self._value(call.args[0]), -1.0)
        if name == "square":
            return _product(*[self._value(call.args[0])] * 2)
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
            return _moved(self._value(call.args[0]), place.__getitem__)
        return self._other(call, name)

    def _permuted(self, call: Any) -> _Polynomial:
        rank = call.ty.ndim
        axes = call.attrs.axes
        order = range(rank)[::-1] if axes is None else [int(axis) % rank for axis in axes]
        place = {old - rank: new - rank for new, old in enumerate(order)}
        return _moved(self._value(call.args[0]), place.__getitem__)

    @staticmethod
    def _summed(operand: _Polynomial, axes: tuple[int, ...], call: Any) -> _Polynomial:
        if call.ty.shape is None:
            raise _OtherForm
        return _atom("sum", [_frozen(operand), axes], call.ty.shape, _sources(operand))

    def _matmul(self, call: Any) -> _Polynomial:
        """Sums along a last axis of products, behind the axes of rows and of columns."""
        left, right = map(self._value, call.args)
        rows = {-1: -1, -2: -3}
        columns = {-1: -2, -2: -1} if call.args[1].ty.ndim > 1 else {-1: -1}
        left = _moved(left, lambda axis: rows.get(axis, axis - 1))
        right = _moved(right, lambda axis: columns.get(axis, axis - 1))
        return self._summed(_product(left, right), (-1,), call)

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
                key.append(_frozen(value))
                sources |= _sources(value)
            else:
                key.append(str(operand))
        kinds = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
        if not name or any(getattr(kind, "shape", None) is None for kind in kinds):
            raise _OtherForm
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


def _is_parameter(atom: _Atom, index: int) -> bool:
    return atom.name == "parameter" and atom.key == (index,)


def _without(product: _Product, index: int) -> list[_Atom] | None:
    """The other factors, where a parameter is one, once; None if there is no such factor."""
    found = [(atom, power) for atom, power in product if _is_parameter(atom, index)]
    if len(found) != 1 or found[0][1] != 1 or found[0][0].axes != found[0][0].made:
        return None
    return [atom for atom, _ in product if atom != found[0][0]]


def _selective_scan(reading: _Reading) -> dict[str, int] | None:
    """The roles of its parameters if a body is a selective scan."""
    stateful = {reading.state, _NEW}
    kept = [p for p in reading.new if _without(p, reading.state) is not None]
    if len(kept) != 1 or reading.new[kept[0]] != 1.0 or len(reading.outputs) != 1:
        return None
    decay = _without(kept[0], reading.state)
    added = {product: number for product, number in reading.new.items() if product != kept[0]}
    # A factor that is a sum, as a softplus of dt, makes several products; the others are in all.
    common = frozenset[tuple[_Atom, int]].intersection(*added) if added else _ONE
    if not _sources(added) & reading.held or _sources(added) & stateful or not common:
        return None
    if len(added) == 1 and set(added.values()) != {1.0}:
        return None
    if not decay or not all(
        atom.name in ("constant", "exp", "parameter") and atom.sources.isdisjoint(stateful)
        for atom in decay
    ):
        return None
    output = _weighted_sum(reading.outputs[0], stateful)
    if output is None:
        return None
    weights, axis = output
    return _roles(reading, decay, [atom for product in added for atom, _ in product], weights, axis)


def _weighted_sum(output: _Polynomial, stateful: set[int]) -> tuple[list[_Atom], int] | None:
    """Weights of the new state in the sum that an output is, and the axis of the state."""
    with_state = [product for product in output if _sources({product: 1.0}) & stateful]
    if len(with_state) != 1 or output[with_state[0]] != 1.0:
        return None
    (total, power), *others = with_state[0]
    if others or power != 1 or total.name != "sum":
        return None
    terms, axes = total.key
    ((product, number), *more) = terms
    states = [atom for atom, power in product if _is_parameter(atom, _NEW) and power == 1]
    weights = [atom for atom, _ in product if not _is_parameter(atom, _NEW)]
    if more or number != 1.0 or len(states) != 1 or len(axes) != 1 or not weights:
        return None
    (state,) = states
    summed = axes[0]
    if summed not in state.axes or not any(summed in atom.axes for atom in weights):
        return None
    if any(atom.sources & stateful for atom in weights):
        return None
    return weights, state.made[state.axes.index(summed)]


def _roles(
    reading: _Reading, decay: list[_Atom], added: list[_Atom], weights: list[_Atom], axis: int
) -> dict[str, int]:
    """Which parameter is what; ``axis`` of the state is the one that is summed along."""
    (state,) = {a for p in reading.new for a, _ in p if _is_parameter(a, reading.state)}
    channels = [other for other in state.made if other != axis][-1:]

    def only(atoms: Sequence[_Atom], taken: Sequence[int] = ()) -> int:
        found = {index for atom in atoms for index in atom.sources & reading.held} - set(taken)
        found = {index for index in found if index > reading.state} or found  # sequences first
        return found.pop() if len(found) == 1 else -1

    steps = [
        factor
        for atom in decay
        if atom.name == "exp"
        for product, _ in atom.key[1]
        for factor, _ in product
        # Where the exponential was made, the axis may have stood elsewhere.
        if axis not in atom.axes or atom.made[atom.axes.index(axis)] not in factor.axes
    ]
    dt = only([atom for atom in steps if atom.sources])
    inputs = [a for a in added if axis not in a.axes and set(channels) <= set(a.axes)]
    mixed = [a for a in added if axis in a.axes and set(channels) & set(a.axes)]
    return {
        "x": only(inputs, [dt]),
        "dt": dt,
        "B": -1 if mixed else only([a for a in added if axis in a.axes]),
        "C": only(weights),
    }


def _is_sru(reading: _Reading) -> bool:
    stateful = {reading.state, _NEW}
    gated = [p for p in reading.new if _without(p, reading.state) is not None]
    if len(reading.new) != 3 or len(gated) != 1 or reading.new[gated[0]] != 1.0:
        return False
    gate = _without(gated[0], reading.state)
    if gate is None or len(gate) != 1 or not _is_gate(gate[0], reading.state):
        return False
    rest = {product: number for product, number in reading.new.items() if product != gated[0]}
    if not _complements(gate[0], rest, stateful):
        return False
    return all(_is_hidden(output, reading, stateful) for output in reading.outputs)


def _is_gate(atom: _Atom, state: int) -> bool:
    """Whether a factor is the sigmoid of an input, perhaps plus the state times something."""
    if atom.name != "sigmoid" or atom.axes != atom.made:
        return False
    terms = [product for product, _ in atom.key[1]]
    free = [product for product in terms if not _sources({product: 1.0}) & {state, _NEW}]
    others = [_without(product, state) for product in terms if product not in free]
    if not any(_sources({product: 1.0}) for product in free) or len(others) > 1:
        return False
    return all(
        factors is not None and not any(factor.sources & {state, _NEW} for factor in factors)
        for factors in others
    )


def _complements(gate: _Atom, terms: _Polynomial, stateful: set[int]) -> bool:
    """Whether terms are ``(1 - gate) * x`` with a product ``x`` that has no state in it."""
    plain = [p for p, number in terms.items() if number == 1.0 and (gate, 1) not in p]
    if len(terms) != 2 or len(plain) != 1 or _sources({plain[0]: 1.0}) & stateful:
        return False
    return bool(_sources({plain[0]: 1.0})) and terms.get(plain[0] | {(gate, 1)}) == -1.0


def _is_activation_of_new(atom: _Atom) -> bool:
    """Whether a factor is a function of the new state alone, channel by channel."""
    if atom.name not in _ACTIVATIONS or atom.axes != atom.made or len(atom.key[1]) != 1:
        return False
    ((product, _),) = atom.key[1]
    return _without(product, _NEW) == []


def _is_hidden(output: _Polynomial, reading: _Reading, stateful: set[int]) -> bool:
    """Whether an output is the new state, or a function of it behind a gate."""
    from_new = [product for product in output if _NEW in _sources({product: 1.0})]
    if len(from_new) != 1 or output[from_new[0]] != 1.0:
        return False
    states = [
        atom
        for atom, power in from_new[0]
        if power == 1 and (_is_parameter(atom, _NEW) or _is_activation_of_new(atom))
    ]
    gates = [atom for atom, _ in from_new[0] if atom not in states]
    if len(states) != 1 or len(gates) > 1:
        return False
    rest = {product: number for product, number in output.items() if product != from_new[0]}
    if not gates:
        return not rest and _is_parameter(states[0], _NEW)
    if not _is_gate(gates[0], reading.state):
        return False
    return not rest or _complements(gates[0], rest, stateful)
