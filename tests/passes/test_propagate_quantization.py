"""PropagateQuantization: every rule as modules before and after, and what is left alone."""
# mypy: disable-error-code="valid-type, name-defined, no-untyped-def, untyped-decorator"
# ruff: noqa: N805
# The modules are TVMScript: Python's syntax, but neither its types nor its methods.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax
from tvm.script import ir as I  # noqa: N812  # TVM's own names in scripts
from tvm.script import relax as R  # noqa: N812
from tvm.script import tirx as T  # noqa: N812

from bitwright.passes import ops
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.soft_edge import QUAMBA_SE
from tests.passes.modules import (
    assert_same,
    assert_same_results,
    calls,
    named,
    operators,
    transform,
)
from tests.passes.soft_edge_layouts import ASYMMETRIC

WEIGHTS = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)


def quantize(x: Any, scale: float = 0.5, zero_point: int = 3, dtype: str = "int8") -> Any:
    return relax.op.quantize(
        x, relax.const(scale, "float32"), relax.const(zero_point, dtype), axis=0, out_dtype=dtype
    )


def dequantize(q: Any, scale: float = 0.5, zero_point: int = 3, dtype: str = "int8") -> Any:
    return relax.op.dequantize(
        q, relax.const(scale, "float32"), relax.const(zero_point, dtype), axis=0
    )


def assert_rewrites(before: Any, expected: Any) -> None:
    """Assert what the pass makes, and that it finds nothing more to do."""
    once = transform(before, PropagateQuantization())
    assert_same(once, expected)
    assert_same(transform(once, PropagateQuantization()), once)


def codes(*shape: int, dtype: str = "int8") -> Any:
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(limits.min, limits.max + 1, shape).astype(dtype)


def test_dequantizers_go_behind_moves() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3, 4, 4), "int8")):
            with R.dataflow():
                x = dequantize(q)
                pooled = R.nn.max_pool2d(x, pool_size=[2, 2], strides=[2, 2])
                order = R.permute_dims(pooled, axes=[0, 2, 3, 1])
                flat = R.reshape(order, R.shape([2, 12]))
                y = R.sigmoid(flat)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((2, 3, 4, 4), "int8")):
            with R.dataflow():
                pooled = R.nn.max_pool2d(q, pool_size=[2, 2], strides=[2, 2])
                order = R.permute_dims(pooled, axes=[0, 2, 3, 1])
                flat = R.reshape(order, R.shape([2, 12]))
                x = dequantize(flat)
                y = R.sigmoid(x)
                R.output(y)
            return y

    assert_rewrites(Before, Expected)
    assert_same_results(Before, transform(Before, PropagateQuantization()), [codes(2, 3, 4, 4)])


def test_quantizers_go_in_front_of_moves() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3, 4, 4), "float32")):
            with R.dataflow():
                pooled = R.nn.max_pool2d(x, pool_size=[2, 2], strides=[2, 2])
                flat = R.reshape(pooled, R.shape([2, 12]))
                q = quantize(flat)
                R.output(q)
            return q

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 3, 4, 4), "float32")):
            with R.dataflow():
                q = quantize(x)
                pooled = R.nn.max_pool2d(q, pool_size=[2, 2], strides=[2, 2])
                flat = R.reshape(pooled, R.shape([2, 12]))
                R.output(flat)
            return flat

    assert_rewrites(Before, Expected)
    x = np.random.default_rng(0).normal(0, 40, (2, 3, 4, 4)).astype(np.float32)
    assert_same_results(Before, transform(Before, PropagateQuantization()), [x])


def test_equal_pairs_vanish_through_moves() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                x = dequantize(q)
                flat = R.reshape(x, R.shape([6]))
                again = quantize(flat)
                R.output(again)
            return again

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                flat = R.reshape(q, R.shape([6]))
                R.output(flat)
            return flat

    assert_rewrites(Before, Expected)


@pytest.mark.parametrize(
    "scale, zero_point, dtype", [(0.25, 3, "int8"), (0.5, 4, "int8"), (0.5, 3, "uint8")]
)
def test_pairs_that_differ_stay(scale: float, zero_point: int, dtype: str) -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                x = dequantize(q)
                again = quantize(x, scale, zero_point, dtype)
                R.output(again)
            return again

    assert_rewrites(Before, Before)


def test_relu_of_codes_is_a_maximum_with_the_zero_point() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                y = R.nn.relu(dequantize(q))
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                positive = R.maximum(q, R.const(3, "int8"))
                y = dequantize(positive)
                R.output(y)
            return y

    assert_rewrites(Before, Expected)
    assert_same_results(Before, Expected, [codes(2, 3)])


def test_padding_with_0_pads_codes_with_the_zero_point() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8"), x: R.Tensor((2, 3), "float32")):
            with R.dataflow():
                y = R.nn.pad(dequantize(q), [0, 0, 1, 2])
                padded = R.nn.pad(x, [1, 0, 0, 0])
                r = quantize(padded)
                mirrored = R.nn.pad(dequantize(q), [0, 0, 1, 1], pad_mode="reflect")
                R.output(y, r, mirrored)
            return (y, r, mirrored)

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((2, 3), "int8"), x: R.Tensor((2, 3), "float32")):
            with R.dataflow():
                y = dequantize(R.nn.pad(q, [0, 0, 1, 2], pad_value=3.0))
                inner = quantize(x)
                r = R.nn.pad(inner, [1, 0, 0, 0], pad_value=3.0)
                mirrored = dequantize(R.nn.pad(q, [0, 0, 1, 1], pad_mode="reflect"))
                R.output(y, r, mirrored)
            return (y, r, mirrored)

    assert_rewrites(Before, Expected)
    x = np.random.default_rng(0).normal(0, 40, (2, 3)).astype(np.float32)
    assert_same_results(Before, transform(Before, PropagateQuantization()), [codes(2, 3), x])


def test_padding_with_another_number_is_no_move() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8"), x: R.Tensor((2, 3), "float32")):
            with R.dataflow():
                y = R.nn.pad(dequantize(q), [0, 0, 1, 2], pad_value=1.0)
                r = quantize(R.nn.pad(x, [0, 0, 1, 2], pad_value=1.0))
                R.output(y, r)
            return (y, r)

    assert_rewrites(Before, Before)


def test_concat_and_split_of_equally_quantized_codes() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(p: R.Tensor((2, 3), "int8"), q: R.Tensor((2, 5), "int8")):
            with R.dataflow():
                both = R.concat((dequantize(p), dequantize(q)), axis=1)
                parts = R.split(both, 2, axis=1)
                first = parts[0]
                second = parts[1]
                y = R.sigmoid(first)
                again = quantize(second)
                R.output(y, again)
            return (y, again)

    @I.ir_module
    class Expected:
        @R.function
        def main(p: R.Tensor((2, 3), "int8"), q: R.Tensor((2, 5), "int8")):
            with R.dataflow():
                both = R.concat((p, q), axis=1)
                parts = R.split(both, 2, axis=1)
                first = parts[0]
                second = parts[1]
                y = R.sigmoid(dequantize(first))
                R.output(y, second)
            return (y, second)

    assert_rewrites(Before, Expected)


def test_concat_of_other_scales_or_of_floats_stays() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(
            p: R.Tensor((2, 3), "int8"), q: R.Tensor((2, 5), "int8"), x: R.Tensor((2, 1), "float32")
        ):
            with R.dataflow():
                scales = R.concat((dequantize(p), dequantize(q, 0.25)), axis=1)
                points = R.concat((dequantize(p), dequantize(q, 0.5, 4)), axis=1)
                floats = R.concat((dequantize(p), x), axis=1)
                R.output(scales, points, floats)
            return (scales, points, floats)

    assert_rewrites(Before, Before)


def test_a_tuple_that_is_an_operand_as_a_whole_is_left_alone() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(pair: R.Tuple(R.Tensor((2, 3), "float32"), R.Tensor((2, 5), "float32"))):
            with R.dataflow():
                both = R.concat(pair, axis=1)
                q = quantize(both)
                R.output(q)
            return q

    assert_rewrites(Before, Before)


def test_sub_byte_clips_follow_their_quantizers() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 8), "float32")):
            with R.dataflow():
                flat = R.reshape(x, R.shape([16]))
                q = quantize(flat, 0.5, 0)
                narrow = R.clip(q, R.prim_value(-8), R.prim_value(7))
                y = dequantize(narrow, 0.5, 0)
                moved = R.reshape(y, R.shape([4, 4]))
                again = quantize(moved, 0.5, 0)
                twice = R.clip(again, R.prim_value(-8), R.prim_value(7))
                R.output(twice)
            return twice

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 8), "float32")):
            with R.dataflow():
                q = quantize(x, 0.5, 0)
                narrow = R.clip(q, R.prim_value(-8), R.prim_value(7))
                flat = R.reshape(narrow, R.shape([16]))
                moved = R.reshape(flat, R.shape([4, 4]))
                R.output(moved)
            return moved

    assert_rewrites(Before, Expected)


def test_clips_that_cut_stay() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 8), "int8"), p: R.Tensor((2, 8), "uint8")):
            with R.dataflow():
                narrower = R.clip(
                    R.clip(q, R.prim_value(-8), R.prim_value(7)), R.prim_value(-2), R.prim_value(1)
                )
                unsigned = R.clip(p, R.prim_value(0), R.prim_value(15))
                other = R.clip(q, R.prim_value(0), R.prim_value(100))
                R.output(narrower, unsigned, other)
            return (narrower, unsigned, other)

    assert_rewrites(Before, Before)
    inputs = [codes(2, 8), codes(2, 8, dtype="uint8")]
    assert_same_results(Before, transform(Before, PropagateQuantization()), inputs)


def test_constant_codes_are_moved_at_once() -> None:
    scale = np.array([0.5, 0.25, 1.0, 2.0], np.float32)
    zeros = np.zeros(4, np.int8)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 4), "float32")):
            with R.dataflow():
                w = R.dequantize(
                    relax.const(WEIGHTS), relax.const(scale), relax.const(zeros), axis=1
                )
                turned = R.permute_dims(w)
                y = R.matmul(x, turned)
                one = R.dequantize(relax.const(WEIGHTS), R.const(0.5), R.const(0, "int8"), axis=0)
                flat = R.reshape(one, R.shape([12]))
                R.output(y, flat)
            return (y, flat)

    turned_weights = np.ascontiguousarray(WEIGHTS.T)
    flat_weights = WEIGHTS.reshape(-1)

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 4), "float32")):
            with R.dataflow():
                w = R.dequantize(
                    relax.const(turned_weights), relax.const(scale), relax.const(zeros), axis=0
                )
                y = R.matmul(x, w)
                flat = R.dequantize(
                    relax.const(flat_weights), R.const(0.5), R.const(0, "int8"), axis=0
                )
                R.output(y, flat)
            return (y, flat)

    assert_rewrites(Before, Expected)


def test_scales_for_each_channel_stay_where_they_are() -> None:
    scale = np.array([0.5, 0.25, 1.0], np.float32)
    zeros = np.zeros(3, np.int8)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8"), x: R.Tensor((2, 3), "float32")):
            with R.dataflow():
                w = R.dequantize(q, relax.const(scale), relax.const(zeros), axis=1)
                flat = R.reshape(w, R.shape([6]))
                positive = R.nn.relu(w)
                moved = R.reshape(x, R.shape([2, 3, 1]))
                r = R.quantize(
                    moved, relax.const(scale), relax.const(zeros), axis=1, out_dtype="int8"
                )
                stored = R.dequantize(
                    relax.const(WEIGHTS), relax.const(scale), relax.const(zeros), axis=0
                )
                shaped = R.reshape(stored, R.shape([12]))
                R.output(flat, positive, r, shaped)
            return (flat, positive, r, shaped)

    assert_rewrites(Before, Before)


def test_computed_scales_and_zero_points_stay_where_they_are() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8"), s: R.Tensor((), "float32"), z: R.Tensor((), "int8")):
            with R.dataflow():
                x = R.dequantize(q, s, R.const(0, "int8"), axis=0)
                y = R.reshape(R.dequantize(q, R.const(0.5), z, axis=0), R.shape([6]))
                flat = R.reshape(x, R.shape([6]))
                again = R.quantize(flat, s, R.const(0, "int8"), axis=0, out_dtype="int8")
                R.output(y, again)
            return (y, again)

    assert_rewrites(Before, Before)


def test_floats_that_others_read_stay_and_codes_go_on() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                x = dequantize(q)
                flat = R.reshape(x, R.shape([6]))
                again = quantize(flat)
                R.output(x, flat, again)
            return (x, flat, again)

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                x = dequantize(q)
                moved = R.reshape(q, R.shape([6]))
                flat = dequantize(moved)
                R.output(x, flat, moved)
            return (x, flat, moved)

    assert_rewrites(Before, Expected)


def test_symbolic_and_unknown_shapes() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor(("n", 4), "int8"), p: R.Tensor(ndim=2, dtype="int8")):
            n = T.int64()
            with R.dataflow():
                x = R.reshape(dequantize(q), R.shape([n * 4]))
                y = R.permute_dims(dequantize(p), axes=[1, 0])
                again = quantize(x)
                R.output(again, y)
            return (again, y)

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor(("n", 4), "int8"), p: R.Tensor(ndim=2, dtype="int8")):
            n = T.int64()
            with R.dataflow():
                x = R.reshape(q, R.shape([n * 4]))
                y = dequantize(R.permute_dims(p, axes=[1, 0]))
                R.output(x, y)
            return (x, y)

    assert_rewrites(Before, Expected)


def test_aliases_hide_nothing() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                x = dequantize(q)
                alias = x
                flat = R.reshape(alias, R.shape([6]))
                other = flat
                again = quantize(other)
                R.output(again)
            return again

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                flat = R.reshape(q, R.shape([6]))
                R.output(flat)
            return flat

    assert_rewrites(Before, Expected)


def test_codes_in_both_branches_of_a_condition() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(flag: R.Tensor((), "bool"), q: R.Tensor((2, 3), "int8")) -> R.Tensor(
            (6,), "float32"
        ):
            x = dequantize(q)
            if flag:
                a = R.reshape(x, R.shape([6]))
                y = R.nn.relu(a)
            else:
                y = R.reshape(x, R.shape([6]))
            return y

    after = transform(Before, PropagateQuantization())
    found = operators(after["main"])
    assert "nn.relu" not in found
    assert found.count("reshape") == 2
    for flag in (False, True):
        assert_same_results(Before, after, [np.array(flag), codes(2, 3)])
    assert_same(transform(after, PropagateQuantization()), after)


def test_wide_codes_move_too() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3, 6), "uint16")):
            with R.dataflow():
                x = R.nn.pad(dequantize(q, 0.5, 40000, "uint16"), [0, 0, 0, 0, 2, 0])
                pooled = R.nn.max_pool1d(x, pool_size=[3], padding=[1, 1])
                again = quantize(pooled, 0.5, 40000, "uint16")
                R.output(again)
            return again

    after = transform(Before, PropagateQuantization())
    assert operators(after["main"]) == ["nn.pad", "nn.max_pool1d"]
    assert_same_results(Before, after, [codes(2, 3, 6, dtype="uint16")])


def test_names_of_nodes_survive() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                input_dequantized = dequantize(q)
                flat = R.reshape(input_dequantized, R.shape([6]))
                positive = R.nn.relu(flat)
                y = R.sigmoid(positive)
                R.output(y)
            return y

    after = transform(named(Before), PropagateQuantization())
    found = {operator: node for node, operator in calls(after["main"])}
    assert found["reshape"] == "flat"
    assert found["sigmoid"] == "y"
    assert found["dequantize"] == "positive"  # what it now stands behind


def steps(codes: Any) -> Any:
    return ops.soft_edge_decode(codes, layout=ASYMMETRIC)


def fine(x: Any) -> Any:
    return dequantize(x, 0.25, 0, "int16")


def test_soft_edge_codes_travel_in_front_of_their_decoder() -> None:
    zero = relax.const(np.int8(ASYMMETRIC.zero_point))
    padding = float(ASYMMETRIC.zero_point)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((1, 4, 6), "int8"), p: R.Tensor((1, 4, 6), "int8")):
            with R.dataflow():
                both = R.concat((fine(steps(q)), fine(steps(p))), axis=1)
                turned = R.permute_dims(R.nn.relu(both), axes=[0, 2, 1])
                y = R.nn.pad(turned, pad_width=[0, 0, 1, 1, 0, 0])
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor((1, 4, 6), "int8"), p: R.Tensor((1, 4, 6), "int8")):
            with R.dataflow():
                both = R.maximum(R.concat((q, p), axis=1), zero)
                turned = R.permute_dims(both, axes=[0, 2, 1])
                y = fine(steps(R.nn.pad(turned, pad_width=[0, 0, 1, 1, 0, 0], pad_value=padding)))
                R.output(y)
            return y

    assert_rewrites(Before, Expected)


def test_soft_edge_encoders_go_in_front_of_moves() -> None:
    step = relax.const(np.float32(0.25))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3, 4, 4), "float32")):
            with R.dataflow():
                pooled = R.nn.max_pool2d(R.exp(x), pool_size=[2, 2], strides=[2, 2])
                flat = R.reshape(pooled, R.shape([2, 12]))
                y = ops.soft_edge_encode(flat, step, layout=QUAMBA_SE)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 3, 4, 4), "float32")):
            with R.dataflow():
                codes = ops.soft_edge_encode(R.exp(x), step, layout=QUAMBA_SE)
                pooled = R.nn.max_pool2d(codes, pool_size=[2, 2], strides=[2, 2])
                y = R.reshape(pooled, R.shape([2, 12]))
                R.output(y)
            return y

    assert_rewrites(Before, Expected)
