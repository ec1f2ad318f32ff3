"""Float products beside NumPy's in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import tirx

from bitwright.targets.kernels import emit, float_matmul, host
from bitwright.targets.kernels.float_matmul import Rows
from bitwright.targets.kernels.host import Isa
from tests.quant.qdq import profile
from tests.targets.kernels.kernels import ISAS

FloatArray = npt.NDArray[np.float32]
BOTH = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
GUARD = np.float32(777)


def normal(seed: int, *shape: int) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def build(function: Any, isa: Isa) -> Any:
    module = tvm.IRModule({"product": function})
    return tvm.compile(module, target=tvm.target.Target(host.target(isa)))


def run(built: Any, shape: Sequence[int], *arguments: FloatArray) -> FloatArray:
    result = tvm.runtime.tensor(np.full(shape, GUARD, np.float32))
    built["product"](*map(tvm.runtime.tensor, arguments), result)
    values: FloatArray = result.numpy()
    return values


def assert_product(
    actual: FloatArray, data: FloatArray, weights: FloatArray, added: FloatArray | float = 0
) -> None:
    depth = data.shape[-1]
    expected = data.astype(np.float64) @ weights.astype(np.float64) + added
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * depth)


def check(built: Any, lengths: Sequence[int], depth: int, columns: int, bias: bool) -> None:
    data, weights = normal(1, *lengths, depth), normal(2, depth, columns)
    added = [normal(3, columns)] if bias else []
    actual = run(built, (*lengths, columns), data, float_matmul.pack(weights), *added)
    assert_product(actual, data, weights, added[0] if bias else 0)


@profile(18)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.one_of(st.integers(1, 9), st.sampled_from([384, 385, 1001])),
    st.one_of(st.integers(1, 70), st.sampled_from([161, 336])),
    st.booleans(),
    st.sampled_from(ISAS),
    st.data(),
)
def test_any_product(
    lengths: list[int], depth: int, columns: int, bias: bool, isa: Isa, data: st.DataObject
) -> None:
    leading = [data.draw(st.sampled_from([None, length])) for length in lengths]
    function = float_matmul.kernel(leading, depth, columns, name="product", bias=bias)
    check(build(function, isa), lengths, depth, columns, bias)


@BOTH
@pytest.mark.parametrize("depth, columns", [(1, 21), (7, 16), (770, 50)])
def test_one_kernel_serves_any_number_of_rows(depth: int, columns: int, isa: Isa) -> None:
    function = float_matmul.kernel([None, 1], depth, columns, name="product", bias=True)
    built = build(function, isa)
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 13, 48, 50, 121, 500):
        check(built, (rows, 1), depth, columns, bias=True)


@BOTH
def test_static_rows_are_cut_into_tasks(isa: Isa) -> None:
    for rows, depth, columns in ((1, 300, 500), (601, 40, 70), (0, 5, 5), (97, 512, 16)):
        built = build(float_matmul.kernel([rows], depth, columns, name="product"), isa)
        check(built, (rows,), depth, columns, bias=False)


def test_fused_multiply_add_where_the_processor_has_it_and_never_a_call() -> None:
    for isa in (host.AVX2, host.GENERIC):
        built = build(float_matmul.kernel([None], 16, 16, name="product"), isa)
        assembly = "".join(
            module.inspect_source("asm") for module in (built.mod, *built.mod.imports)
        )
        assert ("vfmadd" in assembly) == (isa is host.AVX2)
        assert "fmaf" not in assembly


def test_batches_of_weights_are_packed_one_by_one() -> None:
    weights = normal(0, 2, 3, 5, 21)
    packed = float_matmul.pack(weights.astype(np.float64))
    assert packed.shape == (2, 3, 2, 5, 16)
    assert packed.dtype == np.float32
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(packed[1, 2], float_matmul.pack(weights[1, 2]))
    np.testing.assert_array_equal(packed[1, 2, 0, 4], weights[1, 2, 4, :16])
    np.testing.assert_array_equal(packed[1, 2, 1, 4], [*weights[1, 2, 4, 16:], *[0.0] * 11])


def inner_product(
    rows: int | None, max_rows: int, depth: int, columns: int, *, accumulate: bool
) -> Any:
    """A kernel that calls the emitter in a loop over batches, between strides with gaps."""

    def body() -> None:
        length = tirx.Var("rows", "int64") if rows is None else rows
        data, packed, out = emit.parameters(
            [
                ("data", (2, length, depth + 3), "float32"),
                ("packed", (2, emit.ceil_div(columns, 16), depth, 16), "float32"),
                ("out", (2, length, columns + 5), "float32"),
            ]
        )
        with emit.loop(2) as batch:
            begin = emit.bind(batch * length * (columns + 5) + 2)
            float_matmul.emit_product(
                data,
                batch * length * (depth + 3) + 1,
                depth + 3,
                packed,
                batch * (emit.ceil_div(columns, 16) * depth * 16),
                depth,
                columns,
                length,
                max_rows,
                out,
                begin,
                columns + 5,
                Rows(out, begin, columns + 5) if accumulate else None,
            )

    return emit.primitive_function("product", body)


@BOTH
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    "known, max_rows, depth, columns",
    [(1, 1, 130, 35), (4, 4, 9, 32), (17, 17, 500, 20), (None, 5, 31, 48), (None, 40, 401, 9)],
)
def test_a_product_inside_another_kernel_writes_its_columns_alone(
    known: int | None, max_rows: int, depth: int, columns: int, accumulate: bool, isa: Isa
) -> None:
    function = inner_product(known, max_rows, depth, columns, accumulate=accumulate)
    built = build(function, isa)
    for rows in {0, 1, 2, max_rows} if known is None else {known}:
        data, weights = normal(1, 2, rows, depth + 3), normal(2, 2, depth, columns)
        out = run(built, (2, rows, columns + 5), data, float_matmul.pack(weights))
        inner = out[..., 2 : columns + 2]
        added = float(GUARD) if accumulate else 0.0
        assert_product(inner, data[..., 1 : depth + 1], weights, added)
        assert np.all(out[..., :2] == GUARD)
        assert np.all(out[..., columns + 2 :] == GUARD)
