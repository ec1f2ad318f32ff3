"""Observers against NumPy on the whole data; scales against brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import UsageError
from bitwright.quant.observers import (
    BINS,
    MAX_VALUES_PER_SAMPLE,
    Observer,
    TensorQuantization,
    choose_quantization,
    expected_sqnr_db,
    quantize_weights,
)

Floats = npt.NDArray[np.float32]


def observe(*arrays: npt.NDArray[np.floating]) -> Observer:
    observer = Observer()
    for array in arrays:
        observer.update(array.astype(np.float32))
    return observer


def quantized(values: Floats, q: TensorQuantization) -> npt.NDArray[np.float64]:
    codes = np.clip(np.rint(values / np.float32(q.scale)) + q.zero_point, q.code_min, q.code_max)
    result: npt.NDArray[np.float64] = (codes.astype(np.float64) - q.zero_point) * q.scale
    return result


def sqnr_db(values: Floats, q: TensorQuantization) -> float:
    noise = np.square(values - quantized(values, q)).sum(dtype=np.float64)
    return float(10 * np.log10(np.square(values, dtype=np.float64).sum() / noise))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), min_size=1, max_size=6
    )
)
def test_one_pass_in_pieces_equals_one_pass_over_everything(pieces: list[list[float]]) -> None:
    arrays = [np.array(piece, np.float32) for piece in pieces]
    streamed, whole = observe(*arrays), observe(np.concatenate(arrays))
    everything = np.concatenate(arrays)
    assert streamed.minimum == everything.min()
    assert streamed.maximum == everything.max()
    assert streamed.counts.sum() == whole.counts.sum() == everything.size
    # Bins double exactly, so widening on the way gives the histogram of the widest range.
    assert streamed.limit == whole.limit
    assert np.array_equal(streamed.counts, whole.counts)


def test_the_histogram_is_numpys() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(10_000).astype(np.float32)
    observer = observe(values)
    expected, _ = np.histogram(values, BINS, (-observer.limit, observer.limit))
    # A value within float32 rounding of an edge may fall on either side of it.
    assert np.abs(np.cumsum(observer.counts) - np.cumsum(expected)).max() <= 1
    assert observer.limit == 2.0 ** math.ceil(math.log2(np.abs(values).max()))


def test_large_tensors_are_sampled_but_extremes_are_exact() -> None:
    values = np.zeros((1, 64, 100, 100), np.float32)
    values[0, 13, 57, 3], values[0, 1, 2, 3] = 7.0, -2.0
    observer = observe(values)
    assert (observer.minimum, observer.maximum) == (-2.0, 7.0)
    assert observer.counts.sum() <= MAX_VALUES_PER_SAMPLE + 2
    assert observer.counts[BINS // 2 :].nonzero()[0][-1] > BINS // 4  # the rare extreme is in it


def test_sampling_visits_every_channel() -> None:
    # 64 channels of 128x128: a step of 64 would see one column only.
    values = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None, None], (64, 128, 128))
    observer = observe(values)
    seen = np.unique(np.round(observer.centers()[observer.counts > 0]))
    assert set(range(64)) <= set(seen.astype(int))


@pytest.mark.parametrize("power", [-3, 0, 10])
def test_values_just_below_the_limit_are_counted(power: int) -> None:
    top = np.nextafter(np.float32(2.0**power), np.float32(0))
    observer = observe(np.array([top, -top, 0.05 * top, top], np.float32))
    assert observer.limit == 2.0**power
    assert observer.counts.sum() == 4


def test_nan_and_infinity_are_refused() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(FloatingPointError):
            observe(np.array([1.0, bad]))


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_numpys_within_a_bin(percent: float) -> None:
    values = np.random.default_rng(1).laplace(size=200_000).astype(np.float32)[: 16_000 * 12]
    observer = Observer()
    observer.update(values, samples=100)
    expected = np.percentile(np.abs(values), percent)
    assert observer.percentile(percent) == pytest.approx(expected, abs=1.1 * observer.bin_width)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace", "relu"])
def test_mmse_is_the_best_of_all_thresholds(bits: int, kind: str) -> None:
    rng = np.random.default_rng(2)
    values = {
        "normal": rng.standard_normal(15_000),
        "laplace": rng.laplace(size=15_000),
        "relu": np.maximum(rng.standard_normal(15_000), 0),
    }[kind].astype(np.float32)
    chosen = choose_quantization(observe(values), bits)
    assert chosen.signed == (kind != "relu")
    assert chosen.zero_point == 0
    peak = float(np.abs(values).max())
    every = [
        sqnr_db(
            values, TensorQuantization(peak * part / 200 / chosen.code_max, 0, bits, chosen.signed)
        )
        for part in range(1, 201)
    ]
    assert sqnr_db(values, chosen) >= max(every) - 0.1


def test_mmse_of_a_gaussian_matches_the_published_clipping_values() -> None:
    # ACIQ (Banner et al., arXiv 1810.05723), optimal clipping of a Gaussian, uniform quantizer:
    # 1.71, 2.55 and 3.92 standard deviations at 2, 4 and 8 bits, for quantizers with 2^b levels
    # over [-c, c]. Levels here stand at multiples of the step, with one more below than above.
    values = np.random.default_rng(3).standard_normal(1_000_000).astype(np.float32)
    observer = Observer()
    observer.update(values, samples=1000)
    for bits, clip in ((4, 2.55), (8, 3.92)):
        q = choose_quantization(observer, bits)
        assert q.scale * 2 ** (bits - 1) == pytest.approx(clip, rel=0.08)


def test_minmax_keeps_everything_and_reaches_both_ends() -> None:
    values = np.array([-3.0, 1.0, 2.0], np.float32)
    q = choose_quantization(observe(values), 8, method="minmax")
    assert q.clip[0] <= -3.0 <= q.clip[0] + q.scale
    q = choose_quantization(observe(np.array([0.0, 10.2], np.float32)), 8, method="minmax")
    assert (q.signed, q.zero_point) == (False, 0)
    assert q.scale == np.float32(10.2 / 255)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("method", ["mmse", "percentile", "minmax"])
def test_asymmetric_ranges_hold_zero_and_use_their_codes(bits: int, method: str) -> None:
    values = np.random.default_rng(4).uniform(-0.4, 8.0, 10_000).astype(np.float32)
    observer = observe(values)
    asymmetric = choose_quantization(observer, bits, method=method, asymmetric=True)  # type: ignore[arg-type]
    symmetric = choose_quantization(observer, bits, method=method)  # type: ignore[arg-type]
    assert not asymmetric.signed
    assert 0 <= asymmetric.zero_point <= asymmetric.code_max
    assert quantized(np.zeros(1, np.float32), asymmetric)[0] == 0.0
    if bits > 2:
        assert sqnr_db(values, asymmetric) > sqnr_db(values, symmetric) + 3.0


def test_the_expected_noise_is_the_measured_noise() -> None:
    values = np.random.default_rng(5).laplace(size=15_000).astype(np.float32)
    observer = observe(values)
    for bits in (2, 4, 8, 16):
        q = choose_quantization(observer, bits)
        assert expected_sqnr_db(observer, q) == pytest.approx(sqnr_db(values, q), abs=0.5)


@pytest.mark.parametrize("values", [[0.0], [0.0, -0.0], [1e-30], [-1e-38, 1e-38], [3e38, -3e38]])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_extreme_ranges_give_usable_scales(values: list[float], bits: int) -> None:
    for method in ("mmse", "percentile", "minmax"):
        for asymmetric in (False, True):
            q = choose_quantization(
                observe(np.array(values, np.float32)),
                bits,
                method=method,
                asymmetric=asymmetric,
            )
            assert math.isfinite(q.scale)
            assert q.scale > 0
            assert q.scale == np.float32(q.scale)
            assert q.code_min <= q.zero_point <= q.code_max


def test_bad_options_are_refused() -> None:
    observer = observe(np.ones(3))
    with pytest.raises(UsageError, match="clip method"):
        choose_quantization(observer, 8, method="entropy")  # type: ignore[arg-type]
    for percentile in (0.0, -1.0, 100.1, math.nan):
        with pytest.raises(UsageError, match="percentile"):
            choose_quantization(observer, 8, method="percentile", percentile=percentile)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([None, 0, 1]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 0.6]),
)
def test_weights_stay_in_range_and_within_half_a_step(
    bits: int, axis: int | None, seed: int, part: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((5, 7, 3)) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
    codes, scales = quantize_weights(weights, bits, axis=axis, part=part)
    assert codes.shape == weights.shape
    assert scales.shape == (() if axis is None else (weights.shape[axis],))
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    shape = [1, 1, 1]
    if axis is not None:
        shape[axis] = -1
    step = scales.reshape(shape).astype(np.float64)
    other = tuple(i for i in range(3) if i != axis)
    peak = np.abs(weights).max(axis=None if axis is None else other)
    assert scales == pytest.approx(part * peak / (2 ** (bits - 1) - 1), rel=1e-6)
    inside = np.abs(weights) <= step * (2 ** (bits - 1) - 1)
    error = np.abs(codes * step - weights)
    # 32767 codes are divided in float32, whose last bit is 1/512 of a code there.
    assert (error <= step * 0.503)[inside].all()


def test_a_channel_of_zeros_takes_the_scale_of_the_others() -> None:
    weights = np.array([[1.0, -2.0], [0.0, 0.0], [4.0, 4.0]], np.float32)
    codes, scales = quantize_weights(weights, 8, axis=0)
    assert scales[1] == np.median(scales[[0, 2]])
    assert not codes[1].any()
