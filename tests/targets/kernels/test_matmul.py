"""Matrix product kernels: every bit as exact integers and the definition of requantization say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import UsageError
from bitwright.targets.kernels.host import Isa
from bitwright.targets.kernels.spec import (
    Accumulators,
    ActivationType,
    Codes,
    Floats,
    Matmul,
    Operand,
)
from tests.quant.qdq import profile
from tests.targets.kernels.kernels import (
    ACTIVATION_TYPES,
    ISAS,
    KINDS,
    Case,
    Compiled,
    check,
    every_output,
    make_case,
    operands,
    outputs,
)

CODES = Codes("int8", 3, -128, 127)


@st.composite
def products(draw: st.DrawFn) -> tuple[Matmul, tuple[int, ...]]:
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    leading = tuple(draw(st.sampled_from([None, length])) for length in lengths)
    depth = draw(st.one_of(st.integers(1, 70), st.sampled_from([511, 700, 1025])))
    spec = Matmul(
        leading,
        depth,
        draw(st.one_of(st.integers(1, 70), st.sampled_from([100, 300]))),
        draw(operands()),
        draw(outputs()),
        draw(st.sampled_from(["int8", "int8", "int16"])),
        draw(st.sampled_from([32, 32, 32, 64])),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    return spec, (*lengths, depth)


@profile(25)
@given(products(), KINDS, st.sampled_from(ISAS), st.integers(0, 2**16))
def test_any_product_is_exact(
    drawn: tuple[Matmul, tuple[int, ...]], kind: str, isa: Isa, seed: int
) -> None:
    check(make_case(*drawn, seed, kind), isa)


@pytest.mark.slow
@profile(120)
@given(products(), KINDS, st.sampled_from(ISAS), st.integers(0, 2**16))
def test_hundreds_of_products_are_exact(
    drawn: tuple[Matmul, tuple[int, ...]], kind: str, isa: Isa, seed: int
) -> None:
    check(make_case(*drawn, seed, kind), isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
def test_extreme_codes_are_exact_in_wide_accumulators(dtype: ActivationType, isa: Isa) -> None:
    spec = Matmul((3,), 1001, 11, Operand(dtype), Accumulators(), "int16", accumulator_bits=64)
    kernel = Compiled(spec, isa)
    for kind in ("smallest", "largest", "both"):
        case = make_case(spec, (3, 1001), kind=kind)
        np.testing.assert_array_equal(kernel.run(case), case.expected)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_narrow_accumulators_may_overflow_on_the_way(isa: Isa) -> None:
    spec = Matmul((2,), 8, 11, Operand("uint16", 65534), Accumulators(), "int16", bias=False)
    data = np.full((2, 8), 65535, np.uint16)
    data[:, ::4] = 1
    weights = np.full((8, 11), 32767, np.int16)
    weights[4:] = -32767
    check(Case(spec, data, weights, None, None, None), isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_one_kernel_serves_any_number_of_rows(isa: Isa) -> None:
    spec = Matmul((None, None), 900, 50, Operand("uint8", 7), CODES)
    kernel = Compiled(spec, isa)
    for lengths in ((0, 3), (1, 1), (1, 3), (5, 1), (2, 0), (11, 13)):
        case = make_case(spec, (*lengths, 900), seed=sum(lengths))
        np.testing.assert_array_equal(kernel.run(case), case.expected)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(Matmul((64,), 256, 120, Operand("uint8"), CODES), id="lenet fc1"),
        pytest.param(Matmul((1,), 84, 10, Operand("uint8"), Floats()), id="lenet fc3, one image"),
        pytest.param(Matmul((130,), 1500, 200, Operand("uint8", 9), CODES), id="blocks everywhere"),
        pytest.param(Matmul((1,), 1024, 1000, Operand("int8"), CODES), id="one row"),
        pytest.param(Matmul((7,), 1, 1, Operand("int8", 3), Floats(0.0, 5.0)), id="one by one"),
    ],
)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_shapes_that_are_cut_in_many_ways(spec: Matmul, isa: Isa) -> None:
    rows = spec.leading[0]
    assert rows is not None
    check(make_case(spec, (rows, spec.depth)), isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_every_output_for_full_and_partial_vectors(isa: Isa) -> None:
    for output in every_output("uint8"):
        spec = Matmul((None,), 5, 21, Operand("uint16", 4), output, shift=True)
        check(make_case(spec, (3, 5)), isa)


def test_what_is_no_product_is_refused() -> None:
    with pytest.raises(UsageError, match="needs rows"):
        Matmul((), 3, 3, Operand("int8"), CODES)
    with pytest.raises(UsageError, match="too many"):
        Matmul((1,), 70_000, 3, Operand("int16", 1), CODES, "int16")
