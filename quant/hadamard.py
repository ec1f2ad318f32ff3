"""Hadamard matrices: entries of +1 and -1, orthogonal rows, so that ``H @ H.T = n * I``.

Rotated by one, a vector keeps its length and spreads each of its values over all: outliers vanish
in it. Of the sizes ``m * 2^k`` with ``m`` of 1, 12 and 20, the matrix is the Kronecker product of
one of size ``m`` (Paley's first construction) and of Sylvester's of size ``2^k``.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["factor", "hadamard", "has_hadamard"]

_BASES: Final = (20, 12, 1)  # 20 = 19 + 1 and 12 = 11 + 1, with primes that are 3 modulo 4


def _base(size: int) -> int | None:
    for base in _BASES:
        power = size // base
        if size > 0 and size % base == 0 and power & (power - 1) == 0:
            return base
    return None


def has_hadamard(size: int) -> bool:
    """Whether a size is 2^n, 12 * 2^n or 20 * 2^n."""
    return _base(size) is not None


def hadamard(size: int) -> npt.NDArray[np.int8]:
    """The Hadamard matrix of a size, [size, size], +1 and -1.

    Raises
    ------
    ValueError
        If the size is none of 2^n, 12 * 2^n and 20 * 2^n.
    """
    base = _base(size)
    if base is None:
        raise ValueError(f"there is no Hadamard matrix of size {size} here")
    matrix: npt.NDArray[Any] = np.ones((1, 1), np.int8) if base == 1 else _paley(base - 1)
    for _ in range(int(math.log2(size // base))):
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.int8))
    return matrix


def factor(size: int) -> tuple[int, int]:
    """Sizes ``p`` and ``q`` whose matrices have that of ``size`` as Kronecker product.

    As near each other as can be: a rotation in two steps takes ``p + q`` multiplications a value
    instead of ``p * q``.
    """
    base = _base(size)
    assert base is not None
    candidates = [(size >> k, 1 << k) for k in range(int(math.log2(size // base)) + 1)]
    return min(candidates, key=sum)


def _paley(prime: int) -> npt.NDArray[np.int8]:
    """Paley's first construction, of size ``prime + 1``, for a prime that is 3 modulo 4.

    ``I + S``, with the Jacobsthal matrix (+1 where the difference of row and column is a square
    modulo the prime, -1 where it is none) inside the skew-symmetric ``S``.
    """
    squares = {number * number % prime for number in range(1, prime)}
    sign = np.array([0, *(1 if n in squares else -1 for n in range(1, prime))], np.int8)
    numbers = np.arange(prime)
    skew = np.zeros((prime + 1, prime + 1), np.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = sign[(numbers[:, None] - numbers[None, :]) % prime]
    return (skew + np.eye(prime + 1, dtype=np.int8)).astype(np.int8)
