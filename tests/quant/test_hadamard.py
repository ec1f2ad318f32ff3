"""Hadamard matrices against their definition."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.quant.hadamard import factor, hadamard, has_hadamard

SIZES = [1, 2, 4, 8, 256, 12, 24, 48, 1536, 20, 40, 80, 640, 2560]


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_orthogonal(size: int) -> None:
    matrix = hadamard(size).astype(np.int64)
    assert has_hadamard(size)
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size, dtype=np.int64))


@pytest.mark.parametrize("size", SIZES)
def test_the_factors_make_the_matrix(size: int) -> None:
    p, q = factor(size)
    np.testing.assert_array_equal(np.kron(hadamard(p), hadamard(q)), hadamard(size))


def test_the_two_steps_are_small() -> None:
    assert factor(256) == (16, 16)
    assert sum(factor(1536)) == 24 + 64 or sum(factor(1536)) == 48 + 32


@pytest.mark.parametrize("size", [-4, 0, 3, 6, 10, 28, 36, 60, 100, 144])
def test_other_sizes(size: int) -> None:
    assert not has_hadamard(size)
    with pytest.raises(ValueError, match=str(size)):
        hadamard(size)
