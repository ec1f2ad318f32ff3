"""Bootstrap intervals of measured shares and ratios, by sample.

What is measured on one sample (a file, a document) hangs together, so whole samples are drawn with
replacement (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentile
intervals). Two configurations that were measured on the same samples are compared on the same
draws, which leaves out what the samples have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its interval, 95 % unless told otherwise.

    Parameters
    ----------
    value
        On all samples.
    low, high
        Ends of the interval.
    """

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether 0 is in the interval; for differences."""
        return self.low <= 0.0 <= self.high

    def show(self, decimals: int = 1, *, scale: float = 1.0, signed: bool = False) -> str:
        """Write ``88.5 (85.1 to 91.2)``."""
        sign = "+" if signed else ""
        value, low, high = (
            f"{scale * number:{sign}.{decimals}f}" for number in (self.value, self.low, self.high)
        )
        return f"{value} ({low} to {high})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Bootstrap:
    """Draws of samples, the same for all that is measured on them.

    Parameters
    ----------
    samples
        How many samples there are.
    draws
        How many draws of as many samples.
    level
        Share of the draws that an interval covers.
    seed
        Of the draws.
    """

    def __init__(
        self, samples: int, *, draws: int = 2_000, level: float = 0.95, seed: int = 0
    ) -> None:
        if samples < 1:
            raise ValueError("there are no samples")
        self._tails = 50 * (1 - level), 50 * (1 + level)
        generator = np.random.default_rng(seed)
        # How often each sample is drawn; the first row is all samples, once.
        drawn = generator.multinomial(samples, np.full(samples, 1 / samples), draws)
        self._times = np.concatenate([np.ones((1, samples)), drawn])

    def ratio(
        self,
        parts: NDArray[Any],
        wholes: NDArray[Any],
        function: Callable[[Floats], Floats] = lambda ratio: ratio,
    ) -> Estimate:
        """Sum of parts by sum of wholes, one of each a sample, under a function."""
        return self._estimate(self._ratios(parts, wholes, function))

    def difference(
        self,
        parts: tuple[NDArray[Any], NDArray[Any]],
        wholes: tuple[NDArray[Any], NDArray[Any]],
        function: Callable[[Floats], Floats] = lambda ratio: ratio,
    ) -> Estimate:
        """The first one's ratio less the second one's, on the same draws."""
        first, second = (
            self._ratios(part, whole, function) for part, whole in zip(parts, wholes, strict=True)
        )
        return self._estimate(first - second)

    def _ratios(
        self, parts: NDArray[Any], wholes: NDArray[Any], function: Callable[[Floats], Floats]
    ) -> Floats:
        with np.errstate(divide="ignore"):
            return function(self._times @ parts.astype(float) / (self._times @ wholes))

    def _estimate(self, values: Floats) -> Estimate:
        low, high = np.percentile(values[1:], self._tails, method="inverted_cdf")
        return Estimate(float(values[0]), float(low), float(high))


def decibels(ratio: Floats) -> Floats:
    """10 log10 of a ratio of energies."""
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(ratio)
