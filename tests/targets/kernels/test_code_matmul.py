"""Products of codes inside another kernel: NumPy's 64-bit integers, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import tirx

from bitwright.targets.kernels import code_matmul, emit, host
from bitwright.targets.kernels.host import Isa
from tests.quant.qdq import profile
from tests.targets.kernels.kernels import ISAS, KINDS, Array, numbers

GUARD = 777
BOTH = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)


def build(
    rows: int | None, max_rows: int, depth: int, columns: int, weight: str, result: str, isa: Isa
) -> Any:
    """A kernel that calls the emitter in a loop over batches, between strides with gaps."""

    def body() -> None:
        length = tirx.Var("rows", "int64") if rows is None else rows
        data, packed, out = emit.parameters(
            [
                ("data", (2, length, depth + 3), "int16"),
                ("packed", (2, *code_matmul.packed_shape(depth, columns)), weight),
                ("out", (2, length, columns + 5), result),
            ]
        )
        with emit.loop(2) as batch:
            code_matmul.emit_product(
                data,
                batch * length * (depth + 3) + 1,
                depth + 3,
                packed,
                batch * int(np.prod(code_matmul.packed_shape(depth, columns))),
                depth,
                columns,
                length,
                max_rows,
                out,
                batch * length * (columns + 5) + 2,
                columns + 5,
                isa,
            )

    function = emit.primitive_function("product", body)
    return tvm.compile(
        tvm.IRModule({"product": function}), target=tvm.target.Target(host.target(isa))
    )


def check(built: Any, data: Array, weights: Array, result: str) -> None:
    """The product of all columns but one at the left and two at the right of the data."""
    (_, rows, width), columns = data.shape, weights.shape[-1]
    out = np.full((2, rows, columns + 5), GUARD, result)
    tensors = [tvm.runtime.tensor(array) for array in (data, code_matmul.pack(weights), out)]
    built["product"](*tensors)
    got = tensors[2].numpy()
    inner = data[..., 1 : width - 2].astype(np.int64)
    expected = (inner @ weights.astype(np.int64)).astype(result)  # 32 bits wrap around
    np.testing.assert_array_equal(got[..., 2 : columns + 2], expected)
    assert np.all(got[..., :2] == GUARD)
    assert np.all(got[..., columns + 2 :] == GUARD)


@profile(25)
@given(
    st.integers(0, 13),
    st.booleans(),
    st.one_of(st.integers(1, 40), st.sampled_from([255, 510, 511, 1023])),
    st.integers(1, 50),
    st.sampled_from(["int8", "int16"]),
    st.sampled_from(["int32", "int64"]),
    KINDS,
    st.sampled_from(ISAS),
)
def test_any_product(
    rows: int,
    known: bool,
    depth: int,
    columns: int,
    weight: str,
    result: str,
    kind: str,
    isa: Isa,
) -> None:
    built = build(rows if known else None, 13, depth, columns, weight, result, isa)
    random = np.random.default_rng(depth)
    data = numbers(random, "int16", (2, rows, depth + 3), kind)
    check(built, data, numbers(random, weight, (2, depth, columns), kind), result)


@BOTH
@pytest.mark.parametrize("weight", ["int8", "int16"])
@pytest.mark.parametrize("left, right", [("min", "min"), ("min", "max"), ("max", "min")])
def test_largest_wide_sums(weight: str, left: str, right: str, isa: Isa) -> None:
    depth, columns = 1100, 17
    built = build(None, 3, depth, columns, weight, "int64", isa)
    data = np.full((2, 3, depth + 3), getattr(np.iinfo("int16"), left), np.int16)
    weights = np.full((2, depth, columns), getattr(np.iinfo(weight), right), weight)
    check(built, data, weights, "int64")


@BOTH
def test_one_kernel_serves_any_number_of_rows(isa: Isa) -> None:
    built = build(None, 13, 21, 37, "int8", "int32", isa)
    random = np.random.default_rng(0)
    for rows in range(14):
        data = numbers(random, "int16", (2, rows, 24), "any")
        check(built, data, numbers(random, "int8", (2, 21, 37), "any"), "int32")


@pytest.mark.skipif(host.AVX2 not in ISAS, reason="needs AVX2")
@pytest.mark.parametrize("result", ["int32", "int64"])
def test_pairs_are_multiplied_at_once(result: str) -> None:
    built = build(None, 3, 16, 16, "int8", result, host.AVX2)
    assembly = "".join(module.inspect_source("asm") for module in (built.mod, *built.mod.imports))
    assert "vpmaddwd" in assembly
    assert "vpmovsxbw" in assembly


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_batches_of_weights_are_packed_one_by_one(dtype: str) -> None:
    weights = numbers(np.random.default_rng(0), dtype, (2, 3, 5, 21), "any")
    packed = code_matmul.pack(weights)
    assert packed.dtype == dtype
    assert packed.shape == (2, 3, *code_matmul.packed_shape(5, 21)) == (2, 3, 2, 3, 16, 2)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(packed[1, 2], code_matmul.pack(weights[1, 2]))
    np.testing.assert_array_equal(packed[1, 2, 0, 1], weights[1, 2, 2:4, :16].T)
    np.testing.assert_array_equal(packed[1, 2, 1, 2, :5, 0], weights[1, 2, 4, 16:])
    assert not packed[1, 2, :, 2, :, 1].any()  # behind an odd depth
    assert not packed[1, 2, 1, :, 5:].any()
