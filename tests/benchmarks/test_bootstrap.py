"""Bootstrap intervals against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.bootstrap import Bootstrap, Estimate, decibels


def test_interval_of_a_share_is_that_of_the_binomial() -> None:
    # 400 samples of one thing each, 30 % right: standard error sqrt(0.3 * 0.7 / 400).
    right = np.repeat([1, 0], [120, 280])
    found = Bootstrap(400, draws=20_000).ratio(right, np.ones(400))
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - half, abs=0.004)
    assert found.high == pytest.approx(0.3 + half, abs=0.004)


def test_samples_are_drawn_whole() -> None:
    # All places of a file are right or wrong together: as uncertain as the files are few.
    places = np.full(50, 1_000.0)
    right = places * np.repeat([1, 0], 25)
    found = Bootstrap(50, draws=20_000).ratio(right, places)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 50), abs=0.03)


def test_differences_leave_out_what_samples_share() -> None:
    generator = np.random.default_rng(0)
    easy = generator.random(200)
    bootstrap = Bootstrap(200)
    whole = np.ones(200)
    found = bootstrap.difference((easy + 0.01, easy), (whole, whole))
    assert found.value == pytest.approx(0.01)
    assert found.high - found.low < 1e-9
    assert not found.within_noise
    noisy = bootstrap.difference((easy + generator.normal(0, 1, 200), easy), (whole, whole))
    assert noisy.within_noise


def test_ratios_are_of_sums_and_go_through_a_function() -> None:
    signal, noise = np.array([100.0, 900.0]), np.array([1.0, 9.0])
    found = Bootstrap(2).ratio(signal, noise, decibels)
    assert (found.value, found.low, found.high) == pytest.approx((20.0, 20.0, 20.0))


def test_nothing_wrong_is_infinitely_good() -> None:
    found = Bootstrap(3).ratio(np.ones(3), np.zeros(3), decibels)
    assert found.value == np.inf
    with pytest.raises(ValueError, match="no samples"):
        Bootstrap(0)


def test_how_estimates_are_written() -> None:
    found = Estimate(0.9444, 0.9, 0.95)
    assert found.show(scale=100) == "94.4 (90.0 to 95.0)"
    assert Estimate(0.5, -1, 2).show(signed=True) == "+0.5 (-1.0 to +2.0)"
    assert found.to_dict() == {"value": 0.9444, "low": 0.9, "high": 0.95}
