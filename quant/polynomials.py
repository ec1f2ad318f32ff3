"""Polynomials of tensors: what the body of a scan computes, whatever the order of its operands.

A polynomial is a sum of products of atoms: parameters of the body, constants, sums along axes, and
functions of other polynomials. Axes are counted from the last one, as they are broadcast, and an
atom knows where those of its axes are that are longer than 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Protocol

__all__ = [
    "NEW",
    "ONE",
    "Atom",
    "OtherForm",
    "Polynomial",
    "Product",
    "Reading",
    "add",
    "atom_of",
    "frozen",
    "is_parameter",
    "matrix_product",
    "moved",
    "multiply",
    "sources_of",
    "without",
]

_MAX_TERMS = 64  # of one polynomial

NEW: Final = -1
"""Stands for the new state, where a parameter has its index."""


class OtherForm(Exception):
    """The body holds what is no expression of tensors, or too many products."""


@dataclass(frozen=True)
class Atom:
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
def _only(atom: Atom) -> Atom:
    """The one object of equal atoms: to compare what they are made of may take exponential time."""
    return atom


Product = frozenset[tuple[Atom, int]]
"""Atoms and their powers."""

Polynomial = dict[Product, float]
"""Products and their coefficients."""

ONE: Final[Product] = frozenset()
"""The product of nothing."""


class Reading(Protocol):
    """A body, read.

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

    state: int
    new: Polynomial
    outputs: list[Polynomial]
    held: set[int]


def atom_of(
    name: str, key: Sequence[Any], axes: Sequence[int], sources: frozenset[int]
) -> Polynomial:
    """One atom as a polynomial; ``axes`` are those that its size is not 1 along."""
    made = tuple(axes)
    return {frozenset({(_only(Atom(name, tuple(key), made, made, sources)), 1)}): 1.0}


def add(first: Polynomial, second: Polynomial, sign: float = 1.0) -> Polynomial:
    """``first + sign * second``."""
    result = dict(first)
    for product, number in second.items():
        result[product] = result.get(product, 0.0) + sign * number
    return {product: number for product, number in result.items() if number}


def multiply(first: Polynomial, second: Polynomial) -> Polynomial:
    """The product; :class:`OtherForm` where it has too many terms."""
    if len(first) * len(second) > _MAX_TERMS:
        raise OtherForm
    result: Polynomial = {}
    for one, number in first.items():
        for other, factor in second.items():
            powers = dict(one)
            for atom, power in other:
                powers[atom] = powers.get(atom, 0) + power
            result = add(result, {frozenset(powers.items()): number * factor})
    return result


def moved(polynomial: Polynomial, place: Callable[[int], int]) -> Polynomial:
    """The polynomial with its axes at other places."""
    result: Polynomial = {}
    for product, number in polynomial.items():
        atoms = [
            (_only(Atom(a.name, a.key, a.made, tuple(map(place, a.axes)), a.sources)), power)
            for a, power in product
        ]
        result = add(result, {frozenset(atoms): number})
    return result


def frozen(polynomial: Polynomial) -> frozenset[tuple[Product, float]]:
    """A polynomial that can be part of a key."""
    return frozenset(polynomial.items())


def matrix_product(left: Polynomial, right: Polynomial, right_rank: int) -> Polynomial:
    """Products that a matrix product sums along the last axis; rows and columns stand before it."""
    rows = {-1: -1, -2: -3}
    columns = {-1: -2, -2: -1} if right_rank > 1 else {-1: -1}
    return multiply(
        moved(left, lambda axis: rows.get(axis, axis - 1)),
        moved(right, lambda axis: columns.get(axis, axis - 1)),
    )


def sources_of(polynomial: Polynomial) -> frozenset[int]:
    """Parameters that it depends on."""
    return frozenset(i for product in polynomial for atom, _ in product for i in atom.sources)


def is_parameter(atom: Atom, index: int) -> bool:
    """Whether an atom is a parameter of the body, or the new state."""
    return atom.name == "parameter" and atom.key == (index,)


def without(product: Product, index: int) -> list[Atom] | None:
    """The other factors, where a parameter is one, once; None if there is no such factor."""
    found = [(atom, power) for atom, power in product if is_parameter(atom, index)]
    if len(found) != 1 or found[0][1] != 1 or found[0][0].axes != found[0][0].made:
        return None
    return [atom for atom, _ in product if atom != found[0][0]]
