"""PartitionForTarget: what becomes a layer, with which attributes, and what is refused."""
# mypy: disable-error-code="valid-type, name-defined, no-untyped-def, untyped-decorator"
# ruff: noqa: N805
# The modules are TVMScript: Python's syntax, but neither its types nor its methods.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tvm import relax
from tvm.script import ir as I  # noqa: N812  # TVM's own names in scripts
from tvm.script import relax as R  # noqa: N812

from bitwright.errors import PlanError, UsageError
from bitwright.passes.partition_for_target import PartitionForTarget
from tests.passes.modules import (
    assert_same,
    assert_same_results,
    calls,
    layers,
    named,
    operators,
    transform,
)

GENERATOR = np.random.default_rng(1)
FILTERS = GENERATOR.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8)
MATRIX = GENERATOR.integers(-128, 128, (3, 4)).astype(np.int8)
NARROW = GENERATOR.integers(-2, 2, (3, 4)).astype(np.int8)
BIAS = GENERATOR.normal(0, 5, 4).astype(np.float32)
SCALES = np.array([0.5, 0.25, 0.125, 1.0], np.float32)
ZEROS = np.zeros(4, np.int8)


def quantize(x: Any, scale: float = 0.5, dtype: str = "int8") -> Any:
    return relax.op.quantize(
        x, relax.const(scale, "float32"), relax.const(0, dtype), axis=0, out_dtype=dtype
    )


def dequantize(q: Any, scale: float = 0.5, dtype: str = "int8") -> Any:
    return relax.op.dequantize(q, relax.const(scale, "float32"), relax.const(0, dtype), axis=0)


def codes(*shape: int, dtype: str = "int8") -> Any:
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(limits.min, limits.max + 1, shape).astype(dtype)


def assert_partitioned(before: Any, expected: Any, **options: Any) -> Any:
    """Assert what the pass makes, and that it finds nothing more to do; return it."""
    once = transform(named(before), PartitionForTarget(**options))
    assert_same(once, expected)
    assert_same(transform(once, PartitionForTarget(**options)), once)
    return once


def test_a_layer_is_its_operator_with_bias_clamps_and_quantizer() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3, 6, 6), "uint8")):
            with R.dataflow():
                x = dequantize(q, 0.5, "uint8")
                w = dequantize(relax.const(FILTERS))
                conv = R.nn.conv2d(x, w)
                biased = R.add(conv, relax.const(BIAS.reshape(1, 4, 1, 1)))
                relu = R.nn.relu(biased)
                clipped = R.clip(relu, R.prim_value(0.0), R.prim_value(6.0))
                out = quantize(clipped)
                y = dequantize(out)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function(private=True)
        def conv_layer(q: R.Tensor((2, 3, 6, 6), "uint8")):
            R.func_attr(
                {
                    "Composite": "bitwright.conv2d",
                    "layer": "conv",
                    "target": "",
                    "weight_bits": 8,
                    "activation_bits": 8,
                    "input_bits": [8],
                    "output_bits": 8,
                }
            )
            with R.dataflow():
                x = dequantize(q, 0.5, "uint8")
                w = dequantize(relax.const(FILTERS))
                conv = R.nn.conv2d(x, w)
                biased = R.add(conv, relax.const(BIAS.reshape(1, 4, 1, 1)))
                relu = R.nn.relu(biased)
                clipped = R.clip(relu, R.prim_value(0.0), R.prim_value(6.0))
                out = quantize(clipped)
                R.output(out)
            return out

        @R.function
        def main(q: R.Tensor((2, 3, 6, 6), "uint8")):
            cls = Expected
            with R.dataflow():
                out = cls.conv_layer(q)
                y = dequantize(out)
                R.output(y)
            return y

    after = assert_partitioned(Before, Expected)
    assert_same_results(Before, after, [codes(2, 3, 6, 6, dtype="uint8")])


def test_layers_are_never_merged_and_keep_their_names() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8"), u: R.Tensor((4, 3), "int8")):
            with R.dataflow():
                first = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                middle = quantize(first)
                second = R.matmul(dequantize(middle), dequantize(u))
                out = quantize(second)
                R.output(out)
            return out

    after = transform(named(Before), PartitionForTarget())
    found = layers(after)
    assert list(found) == ["first", "second"]
    assert operators(found["first"]) == ["dequantize", "dequantize", "matmul", "quantize"]
    assert calls(found["second"])[-2:] == [("second", "matmul"), ("out", "quantize")]
    assert calls(after["main"]) == [("first", ""), ("second", "")]
    # Both operands of the second are computed: it has no weights.
    attributes = {name: found["second"].attrs.get(name) for name in ("weight_bits", "input_bits")}
    assert attributes["weight_bits"] is None
    assert list(attributes["input_bits"]) == [8, 8]
    assert_same_results(Before, after, [codes(2, 3), codes(4, 3)])


def test_each_use_of_an_accumulator_gets_a_function() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                fine = quantize(product, 0.25)
                relu = R.nn.relu(product)
                coarse = quantize(relu, 2.0)
                soft = R.nn.softmax(product, axis=-1)
                R.output(fine, coarse, soft)
            return (fine, coarse, soft)

    after = transform(named(Before), PartitionForTarget())
    found = [f for f in after.functions.values() if f.attrs and "Composite" in f.attrs]
    assert {str(function.attrs["layer"]) for function in found} == {"product"}
    assert sorted(operators(function)[-1] for function in found) == [
        "matmul",
        "quantize",
        "quantize",
    ]
    assert operators(after["main"]).count("") == 3
    assert_same_results(Before, after, [codes(2, 3)])


def test_sums_that_leave_the_model_and_codes_that_do() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                out = quantize(product)
                R.output(product, out)
            return (product, out)

    after = transform(named(Before), PartitionForTarget())
    assert operators(after["main"]) == ["", ""]
    assert_same_results(Before, after, [codes(2, 3)])


@pytest.mark.parametrize(
    "codes_left, bits", [((-8, 7), 4), ((-2, 1), 2), ((-100, 100), 8), ((0, 7), 8)]
)
def test_a_clip_of_the_codes_belongs_to_the_layer(codes_left: tuple[int, int], bits: int) -> None:
    low, high = codes_left

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                narrow = R.clip(q, R.prim_value(-8), R.prim_value(7))
                product = R.matmul(dequantize(narrow), dequantize(relax.const(NARROW)))
                wide = quantize(product)
                out = R.clip(wide, R.prim_value(low), R.prim_value(high))
                R.output(out)
            return out

    after = transform(named(Before), PartitionForTarget())
    (layer,) = layers(after).values()
    attributes = {name: int(layer.attrs[name]) for name in ("activation_bits", "output_bits")}
    assert attributes == {"activation_bits": 4, "output_bits": bits}
    assert [int(bits) for bits in layer.attrs["input_bits"]] == [4]
    assert operators(layer)[-1] == "clip"
    assert operators(after["main"]) == ["clip", ""]
    assert_same_results(Before, after, [codes(2, 3)])


def test_a_clip_beside_other_uses_of_the_codes_stays_outside() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                wide = quantize(product)
                narrow = R.clip(wide, R.prim_value(-8), R.prim_value(7))
                R.output(wide, narrow)
            return (wide, narrow)

    after = transform(named(Before), PartitionForTarget())
    assert operators(after["main"]) == ["", "clip"]
    assert int(layers(after)["product"].attrs["output_bits"]) == 8


def test_what_follows_a_bias_behind_a_clamp_is_float() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8"), x: R.Tensor((4,), "float32")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                relu = R.nn.relu(product)
                shifted = R.add(relu, relax.const(BIAS))
                first = quantize(shifted)
                computed = R.add(product, x)
                second = quantize(computed)
                doubled = R.add(product, product)
                bounded = R.maximum(product, x)
                R.output(first, second, doubled, bounded)
            return (first, second, doubled, bounded)

    after = transform(named(Before), PartitionForTarget())
    ends = {operators(f)[-1] for f in after.functions.values() if "Composite" in (f.attrs or {})}
    assert ends == {"matmul", "nn.relu"}
    x = np.random.default_rng(3).normal(0, 9, 4).astype(np.float32)
    assert_same_results(Before, after, [codes(2, 3), x])


def test_floats_and_computed_scales_make_no_layer() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(
            q: R.Tensor((2, 3), "int8"), x: R.Tensor((2, 3), "float32"), s: R.Tensor((), "float32")
        ):
            with R.dataflow():
                w = dequantize(relax.const(MATRIX))
                floats = R.matmul(x, w)
                computed = R.matmul(R.dequantize(q, s, R.const(0, "int8"), axis=0), w)
                R.output(floats, computed)
            return (floats, computed)

    assert_partitioned(Before, Before)


@pytest.mark.parametrize("side", ["activation", "weights"])
def test_scales_along_other_axes_than_output_channels_make_no_layer(side: str) -> None:
    scale, zero = SCALES[:3], ZEROS[:3]
    per_row = side == "weights"

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                wide = R.dequantize(q, relax.const(scale), relax.const(zero), axis=1)
                x = dequantize(q) if per_row else wide
                rows = R.dequantize(
                    relax.const(MATRIX), relax.const(scale), relax.const(zero), axis=0
                )
                w = rows if per_row else dequantize(relax.const(MATRIX))
                product = R.matmul(x, w)
                out = quantize(product)
                R.output(out)
            return out

    assert_partitioned(Before, Before)


def test_weights_of_either_side_and_of_any_rank() -> None:
    left = np.ascontiguousarray(MATRIX.T)
    stacked = GENERATOR.integers(-128, 128, (2, 3, 4)).astype(np.int8)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((3, 5), "int8"), p: R.Tensor((2, 6, 3), "int8")):
            with R.dataflow():
                first = R.matmul(dequantize(relax.const(left)), dequantize(q))
                second = R.matmul(dequantize(p), dequantize(relax.const(stacked)))
                a = quantize(first)
                b = quantize(second)
                R.output(a, b)
            return (a, b)

    after = transform(named(Before), PartitionForTarget())
    assert [int(f.attrs["weight_bits"]) for f in layers(after).values()] == [8, 8]
    assert_same_results(Before, after, [codes(3, 5), codes(2, 6, 3)])


def test_biases_of_any_shape() -> None:
    tall = GENERATOR.normal(0, 5, (5, 1, 4)).astype(np.float32)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                biased = R.add(relax.const(tall), product)
                out = quantize(biased)
                R.output(out)
            return out

    after = transform(named(Before), PartitionForTarget())
    assert operators(layers(after)["product"])[-2:] == ["add", "quantize"]
    assert_same_results(Before, after, [codes(2, 3)])


def test_symbolic_sizes_get_variables_of_their_own() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor(("n", 3), "int8")):
            with R.dataflow():
                doubled = R.concat((q, q), axis=0)
                product = R.matmul(dequantize(doubled), dequantize(relax.const(MATRIX)))
                out = quantize(product)
                R.output(out)
            return out

    after = transform(named(Before), PartitionForTarget())
    (layer,) = layers(after).values()
    assert str(layer.params[0].ty.shape[0]) != str(after["main"].params[0].ty.shape[0] * 2)
    for samples in (1, 5):
        assert_same_results(Before, after, [codes(samples, 3)])


def test_unknown_shapes_stay_unknown() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor(ndim=2, dtype="int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                out = quantize(product)
                R.output(out)
            return out

    (layer,) = layers(transform(named(Before), PartitionForTarget())).values()
    assert layer.params[0].ty.shape is None


def test_aliases_hide_no_layer() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                x = dequantize(q)
                same = x
                product = R.matmul(same, dequantize(relax.const(MATRIX)))
                again = product
                relu = R.nn.relu(again)
                third = relu
                out = quantize(third)
                R.output(out)
            return out

    after = transform(named(Before), PartitionForTarget())
    assert operators(layers(after)["product"])[-2:] == ["nn.relu", "quantize"]
    assert operators(after["main"]) == [""]


def test_layers_inside_a_condition_are_left_to_the_host() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(flag: R.Tensor((), "bool"), q: R.Tensor((2, 3), "int8")) -> R.Tensor(
            (2, 4), "float32"
        ):
            x = dequantize(q)
            if flag:
                w = dequantize(relax.const(MATRIX))
                y = R.matmul(x, w)
            else:
                y = R.full((2, 4), R.const(1.0), dtype="float32")
            return y

    after = transform(named(Before), PartitionForTarget())
    assert layers(after) == {}
    assert_same_results(Before, after, [np.array(True), codes(2, 3)])


def test_every_function_of_a_module_is_partitioned() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                R.output(product)
            return product

        @R.function
        def other(q: R.Tensor((1, 3), "int8")):
            with R.dataflow():
                second = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                R.output(second)
            return second

    after = transform(named(Before), PartitionForTarget())
    assert set(layers(after)) == {"product", "second"}


def test_calls_without_a_node_name_are_named_like_their_variable() -> None:
    # Calls in TVMScript know where they stand in the file, which is no name of a node.
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                out = quantize(product)
                R.output(out)
            return out

    assert set(layers(transform(Before, PartitionForTarget()))) == {"product"}


# -- targets and precisions ------------------------------------------------------------------------


@I.ir_module
class TwoLayers:
    @R.function
    def main(q: R.Tensor((2, 3), "int8")):
        with R.dataflow():
            narrow = R.clip(q, R.prim_value(-8), R.prim_value(7))
            first = R.matmul(dequantize(narrow), dequantize(relax.const(MATRIX)))
            middle = quantize(first)
            bits = R.clip(middle, R.prim_value(-2), R.prim_value(1))
            turned = R.permute_dims(bits)
            second = R.matmul(dequantize(relax.const(MATRIX)), dequantize(turned))
            out = quantize(second)
            R.output(out)
        return out


def accelerator(folder: Path, weight_bits: list[int], activation_bits: list[int]) -> str:
    """Write the description of an accelerator; return its path."""
    document = {
        "schema_version": 1,
        "name": "tests/some",
        "summary": "an accelerator of the tests",
        "sources": {"none": {"text": "made up", "basis": "example"}},
        "precisions": {
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "tied": False,
            "source": "none",
        },
        "tvm_target": {"kind": "llvm", "keys": ["tests", "cpu"], "device": "t", "model": "some"},
    }
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_the_target_is_noted(tmp_path: Path) -> None:
    path = accelerator(tmp_path, [8], [2, 4])
    after = transform(named(TwoLayers), PartitionForTarget(target=path))
    assert {str(f.attrs["target"]) for f in layers(after).values()} == {path}
    bits = {name: int(f.attrs["activation_bits"]) for name, f in layers(after).items()}
    assert bits == {"first": 4, "second": 2}


def test_precisions_that_the_target_cannot_do_are_refused_by_layer(tmp_path: Path) -> None:
    path = accelerator(tmp_path, [8], [4, 8])
    with pytest.raises(PlanError, match=r"second \(w8a2\)") as caught:
        transform(named(TwoLayers), PartitionForTarget(target=path))
    assert "first" not in str(caught.value)
    path = accelerator(tmp_path, [2], [16])
    with pytest.raises(PlanError, match=r"first \(w8a4\), second \(w8a2\)"):
        transform(named(TwoLayers), PartitionForTarget(target=path))


def test_precisions_of_the_module_count_for_weights(tmp_path: Path) -> None:
    # 4-bit weights are stored as int8: only the module knows.
    told = named(TwoLayers).with_attr("bitwright.precisions", {"first": "w4a4", "second": "w2a2"})
    path = accelerator(tmp_path, [2, 4], [2, 4])
    after = transform(told, PartitionForTarget(target=path))
    bits = {name: int(f.attrs["weight_bits"]) for name, f in layers(after).items()}
    assert bits == {"first": 4, "second": 2}
    with pytest.raises(PlanError, match=r"first \(w4a4\)"):
        transform(told, PartitionForTarget(target=accelerator(tmp_path, [2], [2, 4])))


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UsageError, match="no/such"):
        transform(named(TwoLayers), PartitionForTarget(target="no/such"))


def test_a_module_without_layers_is_unchanged() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                R.output(y)
            return y

    assert_partitioned(Before, Before)
