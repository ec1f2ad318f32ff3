"""Functions of float32: near what 64 bits give, over all of float32, and without libm."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from math import erf, erfc, sqrt
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import tvm
from numpy.polynomial import Chebyshev, Polynomial
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.targets.kernels import emit, functions, host
from bitwright.targets.kernels.host import Isa
from tests.targets.kernels.kernels import ISAS

Numbers: TypeAlias = npt.NDArray[np.float64]
Singles: TypeAlias = npt.NDArray[np.float32]

LANES = (1, 4, 8)
LEAST = 2.0**-126  # the least normal number

_erf = np.vectorize(erf, otypes=[np.float64])
_erfc = np.vectorize(erfc, otypes=[np.float64])

# The function in 64 bits; the bound on its relative error where it is at least `least`; `least`;
# the bound on the absolute error below.
FUNCTIONS: dict[str, tuple[Callable[[Numbers], Numbers], float, float, float]] = {
    "erf": (_erf, 5e-7, LEAST, 2.0**-148),
    "exp": (np.exp, 2e-7, LEAST, LEAST),
    "log": (np.log, 3e-7, 0, 0),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 4e-7, LEAST, LEAST),
    "silu": (lambda x: x / (1 + np.exp(-x)), 5e-7, 2.0**-119, 2.0**-119),
    "softplus": (lambda x: np.logaddexp(0, x), 5e-7, LEAST, LEAST),
    "tanh": (np.tanh, 4e-7, 0, 0),
}


@cache
def sample() -> Singles:
    """All exponents, any bits, where the functions bend, and where their cases meet."""
    generator = np.random.default_rng(0)
    mantissas = np.concatenate([[0, 1, 2**23 - 1], generator.integers(0, 2**23, 125)])
    every_exponent = (np.arange(512)[:, None] << 23 | mantissas).astype(np.uint32).ravel()
    any_bits = generator.integers(0, 2**32, 2**16, dtype=np.uint32)
    ranges = [(-104, 90), (-6, 6), (-1, 1), (0.5, 1.5)]
    drawn = [generator.uniform(low, high, 2**15).astype(np.float32) for low, high in ranges]
    meet = [-126 * np.log(2), 128 * np.log(2), 20, 88.8, 4, sqrt(0.5), 1, sqrt(2), 2.0**-126]
    meet += [np.log(sqrt(2) - 1), *((np.arange(-180, 190) + 0.5) * np.log(2))]
    near = np.array([*meet, *np.negative(meet)], np.float32).view(np.uint32)
    near = (near[:, None] + np.arange(-8, 9)).astype(np.uint32).ravel()
    bits = [part.view(np.float32) for part in (every_exponent, any_bits, near)]
    found = np.concatenate([*bits, *drawn])
    return found[: len(found) // max(LANES) * max(LANES)]


def kernel(function: Callable[[Any, int], Any], name: str, lanes: int) -> Any:
    def body() -> None:
        length = len(sample())
        x, y = emit.parameters([("x", [length], "float32"), ("y", [length], "float32")])
        with emit.loop(length // lanes) as index:
            value = function(emit.load(x, index * lanes, lanes), lanes)
            emit.store(y, index * lanes, value, lanes)

    return emit.primitive_function(name, body)


@cache
def built(isa: Isa) -> Any:
    kernels = {
        f"{name}{lanes}": kernel(getattr(functions, name), f"{name}{lanes}", lanes)
        for name in functions.__all__
        for lanes in LANES
    }
    return compiled(kernels, isa)


def compiled(kernels: dict[str, Any], isa: Isa) -> Any:
    return tvm.compile(tvm.IRModule(kernels), target=tvm.target.Target(host.target(isa)))


def results(name: str, isa: Isa, lanes: int) -> Singles:
    result = tvm.runtime.tensor(np.full(len(sample()), 77, np.float32))
    built(isa)[f"{name}{lanes}"](tvm.runtime.tensor(sample()), result)
    return np.asarray(result.numpy())


def assert_within(found: Singles, expected: Numbers, bound: Numbers) -> None:
    """Compare finite numbers with a bound, and all others by themselves."""
    rounded = expected.astype(np.float32)
    same = (found == rounded) | (np.isnan(found) & np.isnan(rounded))
    finite = np.isfinite(found) & np.isfinite(rounded)
    wrong = ~np.where(finite, np.abs(found - expected) <= bound, same)
    said = [sample()[wrong][:5], found[wrong][:5], expected[wrong][:5]]
    assert not wrong.any(), f"{wrong.sum()} wrong; arguments, results, expected: {said}"


def test_every_function_is_tested() -> None:
    assert sorted(FUNCTIONS) == sorted(functions.__all__)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_within_their_bounds(name: str, isa: Isa) -> None:
    function, relative, least, absolute = FUNCTIONS[name]
    with np.errstate(all="ignore"):
        expected = function(sample().astype(np.float64))
        bound = np.where(np.abs(expected) < least, absolute, relative * np.abs(expected))
        for lanes in LANES:
            assert_within(results(name, isa, lanes), expected, bound)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    "name, cases",
    [
        ("exp", {-np.inf: 0, -104: 0, 0: 1, 88.72284: np.inf, np.inf: np.inf}),
        ("log", {-np.inf: np.nan, -1: np.nan, -0.0: -np.inf, 1: 0, np.inf: np.inf}),
        ("tanh", {-np.inf: -1, -20: -1, 0: 0, 20: 1, np.inf: 1, 2.0**-149: 2.0**-149}),
        ("sigmoid", {-np.inf: 0, 0: 0.5, np.inf: 1}),
        ("softplus", {-np.inf: 0, 1e30: 1e30, np.inf: np.inf}),
        ("erf", {-np.inf: -1, -4: -1, 0: 0, 4: 1, np.inf: 1}),
    ],
)
def test_limits_are_exact(name: str, cases: dict[float, float], isa: Isa) -> None:
    arguments = np.resize(np.array([*cases, np.nan], np.float32), len(sample()))
    expected = np.resize(np.array([*cases.values(), np.nan], np.float32), len(sample()))
    for lanes in LANES:
        result = tvm.runtime.tensor(np.zeros_like(arguments))
        built(isa)[f"{name}{lanes}"](tvm.runtime.tensor(arguments), result)
        np.testing.assert_array_equal(result.numpy(), expected)


def outside_calls(library: Any) -> set[str]:
    """What an assembly calls or jumps to beyond its own labels and TVM's runtime."""
    assembly = library.mod.inspect_source("asm")
    called = re.findall(r"^\s+(?:call|jmp|bl?)\w*\s+([A-Za-z_]\w*)", assembly, re.MULTILINE)
    return {name for name in called if not re.match(r"__tvm|TVMFFI|\w+_compute_$", name)}


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_nothing_is_left_to_libm(isa: Isa) -> None:
    assert not outside_calls(built(isa))
    of_tvm = compiled({"f": kernel(lambda x, _: T.exp(x), "f", 4)}, isa)
    assert outside_calls(of_tvm) == {"expf"}, "the test does not see calls"


def fit(
    function: Callable[[Numbers], Numbers],
    weight: Callable[[Numbers], Numbers],
    low: float,
    high: float,
    degree: int,
) -> tuple[Numbers, float]:
    """Coefficients with the least largest weighted error (Lawson), and that error."""
    nodes = np.cos((np.arange(1000) + 0.5) * np.pi / 1000)
    x = (low + high) / 2 + (high - low) / 2 * nodes
    y, weights, lawson = function(x), weight(x), np.full(len(x), 1 / len(x))
    for _ in range(300):
        root = np.sqrt(lawson)
        fitted = Chebyshev.fit(x, y, degree, domain=[low, high], w=weights * root)
        error = np.abs(fitted(x) - y) * weights
        lawson = lawson * error / np.sum(lawson * error)
    return np.asarray(fitted.convert(kind=Polynomial).coef, np.float64), float(error.max())


def power(a: Numbers) -> Numbers:
    """-log(1 - erf(a))."""
    small = -np.log1p(-_erf(np.minimum(a, 0.5)))
    return np.asarray(np.where(a < 0.5, small, -np.log(_erfc(a))))


@pytest.mark.parametrize(
    "name, function, weight, low, high, bound",
    [
        pytest.param(
            "_EXP",
            lambda r: (np.expm1(r) - r) / r**2,
            lambda r: r**2 / np.abs(np.expm1(r)),
            *(-1.001 * np.log(2) / 2, 1.001 * np.log(2) / 2),
            1.4e-8,
            id="exp",
        ),
        pytest.param(
            "_EXP_SHORT",
            lambda r: (np.expm1(r) - r) / r**2,
            lambda r: r**2 / np.exp(r),
            *(-1.001 * np.log(2) / 2, 1.001 * np.log(2) / 2),
            1.06e-7,
            id="exp-short",
        ),
        pytest.param(
            "_LOG",
            lambda f: (np.log1p(f) - f + f**2 / 2) / f**3,
            lambda f: np.abs(f**3 / np.log1p(f)),
            *(sqrt(0.5) - 1, sqrt(2) - 1),
            3.2e-8,
            id="log",
        ),
        pytest.param(
            "_ERF",
            lambda a: power(a) / a,
            lambda a: a * _erfc(a) / _erf(a),
            *(0, 4),
            3.6e-8,
            id="erf",
        ),
    ],
)
def test_coefficients_are_the_best(
    name: str,
    function: Callable[[Numbers], Numbers],
    weight: Callable[[Numbers], Numbers],
    low: float,
    high: float,
    bound: float,
) -> None:
    coefficients = getattr(functions, name)
    best, error = fit(function, weight, low, high, len(coefficients) - 1)
    assert error < bound
    np.testing.assert_allclose(coefficients, best, rtol=1e-4)
    x = np.linspace(low + 1e-3, high, 1000)
    rounded = Polynomial(np.array(coefficients, np.float32).astype(np.float64))
    assert np.max(np.abs(rounded(x) - function(x)) * weight(x)) < 1.5 * bound + 2.0**-25
