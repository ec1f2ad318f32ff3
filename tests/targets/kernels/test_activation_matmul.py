"""Products of two activations: every bit as exact integers and requantization say."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import UsageError
from bitwright.targets.kernels import activation_matmul, host
from bitwright.targets.kernels.host import Isa
from bitwright.targets.kernels.spec import (
    Accumulators,
    ActivationMatmul,
    Codes,
    Floats,
    Operand,
)
from tests.quant.qdq import profile
from tests.targets.kernels.kernels import ISAS, KINDS, Array, numbers, operands, outputs, result_of

Lengths = tuple[int, ...]


@st.composite
def products(draw: st.DrawFn) -> tuple[ActivationMatmul, Lengths, Lengths]:
    """A product, and the shapes to run it with."""
    rank = draw(st.integers(0, 2))
    batch = [draw(st.integers(1, 4)) for _ in range(rank)]
    broadcast = [draw(st.sampled_from(["", "", "left", "right"])) for _ in range(rank)]
    rows, depth, columns = (draw(st.integers(1, top)) for top in (20, 70, 50))
    left = (*(1 if b == "left" else n for n, b in zip(batch, broadcast, strict=True)), rows, depth)
    right = (
        *(1 if b == "right" else n for n, b in zip(batch, broadcast, strict=True)),
        depth,
        columns,
    )
    symbolic = draw(st.booleans())
    spec = ActivationMatmul(
        tuple(None if symbolic and n > 1 and axis <= rank else n for axis, n in enumerate(left)),
        tuple(None if symbolic and n > 1 and axis < rank else n for axis, n in enumerate(right)),
        draw(operands()),
        draw(operands()),
        draw(outputs()),
        draw(st.sampled_from([32, 64])),
    )
    return spec, left, right


def accumulators(spec: ActivationMatmul, left: Array, right: Array) -> Array:
    centred = [
        data.astype(np.int64) - operand.zero_point
        for data, operand in ((left, spec.left_data), (right, spec.right_data))
    ]
    return np.asarray(centred[0] @ centred[1])


def check(spec: ActivationMatmul, isa: Isa, left: Array, right: Array) -> None:
    function = activation_matmul.kernel(spec, isa, "kernel")
    built = tvm.compile(
        tvm.IRModule({"kernel": function}), target=tvm.target.Target(host.target(isa))
    )
    sums = accumulators(spec, left, right)
    largest = max(int(np.abs(sums).max(initial=0)), 1)
    span = spec.output.high - spec.output.low + 1 if isinstance(spec.output, Codes) else 1
    scale = None
    if not isinstance(spec.output, Accumulators):
        scale = np.array([1.2 * span / largest], np.float32)
    expected = result_of(spec, sums, scale)
    result = tvm.runtime.tensor(np.full(expected.shape, 77, expected.dtype))
    arrays = [array for array in (left, right, scale) if array is not None]
    built["kernel"](*map(tvm.runtime.tensor, arrays), result)
    np.testing.assert_array_equal(result.numpy(), expected, err_msg=f"{isa.name}: {spec}")


@profile(20)
@given(products(), KINDS, st.sampled_from(ISAS), st.integers(0, 2**16))
def test_any_product_is_exact(
    drawn: tuple[ActivationMatmul, Lengths, Lengths], kind: str, isa: Isa, seed: int
) -> None:
    spec, left_shape, right_shape = drawn
    generator = np.random.default_rng(seed)
    left = numbers(generator, spec.left_data.dtype, left_shape, kind)
    right = numbers(generator, spec.right_data.dtype, right_shape, kind)
    if np.abs(accumulators(spec, left, right)).max(initial=0) >= 2**31:
        spec = ActivationMatmul(
            spec.left, spec.right, spec.left_data, spec.right_data, spec.output, 64
        )
    check(spec, isa, left, right)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_attention_of_any_batch(isa: Isa) -> None:
    spec = ActivationMatmul(
        (None, 3, None, 33),
        (None, 3, 33, 70),
        Operand("uint8", 5),
        Operand("int8", -4),
        Floats(),
    )
    for batch, rows in ((0, 4), (2, 0), (1, 1), (3, 110)):
        generator = np.random.default_rng(rows)
        left = numbers(generator, "uint8", (batch, 3, rows, 33), "any")
        right = numbers(generator, "int8", (batch, 3, 33, 70), "any")
        check(spec, isa, left, right)


def test_what_is_no_product_is_refused() -> None:
    data = Operand("int8")
    for left, right, said in (
        ((3,), (3,), "equally many axes"),
        ((2, 3), (4, 5), "the same for both"),
        ((2, None), (None, 5), "must be known"),
        ((2, 2, 3), (3, 3, 5), "do not fit"),
    ):
        with pytest.raises(UsageError, match=said):
            ActivationMatmul(left, right, data, data, Floats())
