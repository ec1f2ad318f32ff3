"""MaterializeTransfers: what is sent stands in front of integer layers, and codes fit the link."""
# mypy: disable-error-code="valid-type, name-defined, no-untyped-def, untyped-decorator"
# ruff: noqa: N805
# The modules are TVMScript: Python's syntax, but neither its types nor its methods.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I  # noqa: N812  # TVM's own names in scripts
from tvm.script import relax as R  # noqa: N812

from bitwright import targets
from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.materialize_transfers import (
    SKIPPED,
    MaterializeTransfers,
    drop_transfers,
    link_of,
)
from bitwright.passes.partition_for_target import PartitionForTarget
from tests.passes.modules import assert_same, assert_same_results, named, operators, transform

GENERATOR = np.random.default_rng(1)
FILTERS = GENERATOR.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8)
MATRIX = GENERATOR.integers(-128, 128, (3, 4)).astype(np.int8)
STACK = GENERATOR.integers(-128, 128, (2, 4, 3)).astype(np.int8)
OFFSET = np.array([0, 255, 1, 2], np.uint8).reshape(4, 1)
MULTIPLIER = relax.const(np.float32(0.01))
NAME = "ordering-simulator"
LINK = targets.get_link(NAME).model_dump_json(exclude_none=True)


def send(x: Any, layer: str, operand: str) -> Any:
    return ops.transfer(x, layer=layer, operand=operand, link=LINK)


def requantize(sums: Any) -> Any:
    return ops.requantize(sums, MULTIPLIER, zero_point=0, low=-128, high=127, dtype="int8")


def quantize(x: Any, scale: float = 0.5, dtype: str = "int8") -> Any:
    return relax.op.quantize(
        x, relax.const(scale, "float32"), relax.const(0, dtype), axis=0, out_dtype=dtype
    )


def dequantize(q: Any, scale: float = 0.5, dtype: str = "int8", zero_point: int = 0) -> Any:
    zero = relax.const(np.array(zero_point, dtype), dtype)
    return relax.op.dequantize(q, relax.const(scale, "float32"), zero, axis=0)


@I.ir_module
class Layer:
    @R.function(private=True)
    def conv_layer(q: R.Tensor(("d0", 3, 6, 6), "uint8")):
        R.func_attr(
            {
                "Composite": "bitwright.conv2d",
                "layer": "conv",
                "target": "silago/drra",
                "weight_bits": 8,
                "activation_bits": 8,
                "input_bits": [8],
                "output_bits": 8,
            }
        )
        with R.dataflow():
            x = R.astype(q, "int32")
            centred = R.subtract(x, R.const(7, "int32"))
            w = R.astype(relax.const(FILTERS), "int32")
            sums = R.nn.conv2d(centred, w, padding=[1, 1, 1, 1], out_dtype="int32")
            out = requantize(sums)
            R.output(out)
        return out

    @R.function
    def main(q: R.Tensor(("n", 3, 6, 6), "uint8")):
        cls = Layer
        with R.dataflow():
            out = cls.conv_layer(q)
            R.output(out)
        return out


def test_both_operands_of_a_layer_are_sent() -> None:
    @I.ir_module
    class Expected:
        @R.function(private=True)
        def conv_layer(q: R.Tensor(("d0", 3, 6, 6), "uint8")):
            R.func_attr(
                {
                    "Composite": "bitwright.conv2d",
                    "layer": "conv",
                    "target": "silago/drra",
                    "weight_bits": 8,
                    "activation_bits": 8,
                    "input_bits": [8],
                    "output_bits": 8,
                }
            )
            with R.dataflow():
                inputs = send(q, "conv", "inputs")
                x = R.astype(inputs, "int32")
                centred = R.subtract(x, R.const(7, "int32"))
                weights = send(relax.const(FILTERS), "conv", "weights")
                w = R.astype(weights, "int32")
                sums = R.nn.conv2d(centred, w, padding=[1, 1, 1, 1], out_dtype="int32")
                out = requantize(sums)
                R.output(out)
            return out

        @R.function
        def main(q: R.Tensor(("n", 3, 6, 6), "uint8")):
            cls = Expected
            with R.dataflow():
                out = cls.conv_layer(q)
                R.output(out)
            return out

    once = transform(Layer, MaterializeTransfers(NAME))
    assert_same(once, Expected)
    assert_same(transform(once, MaterializeTransfers(NAME)), once)
    assert_same(drop_transfers(once), Layer)
    codes = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 6)).astype(np.uint8)
    assert_same_results(Layer, once, [codes])  # TVM's own pipeline compiles it


def test_both_operands_of_a_product_of_activations_are_sent() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(a: R.Tensor(("n", 5, 6), "int8"), b: R.Tensor(("n", 6, 4), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(a), dequantize(b))
                out = quantize(product, 16.0)
                R.output(out)
            return out

    lowered = transform(named(Before), PartitionForTarget(), LowerToInteger())
    after = transform(lowered, MaterializeTransfers(NAME))
    sent = [
        (str(call.attrs["operand"]), call.args[0].name)
        for call in transfers(after["product_layer"])
    ]
    assert sent == [("inputs", "a"), ("weights", "b")]


def transfers(function: Any) -> list[Any]:
    found = [b.value for block in function.body.blocks for b in block.bindings]
    return [call for call in found if operators_of(call) == ops.TRANSFER]


def operators_of(expr: Any) -> str:
    return str(expr.op.name) if isinstance(expr, relax.Call) and hasattr(expr.op, "name") else ""


def test_the_link_is_that_of_the_target_or_the_one_that_is_named() -> None:
    def found(link: str) -> Any:
        after = transform(Layer, MaterializeTransfers(link))
        return link_of(transfers(after["conv_layer"])[0])

    assert found("bitfusion/eyeriss") == targets.get_link("bitfusion/eyeriss")
    assert found("") == targets.get_link("silago/drra")


def test_layers_that_send_nothing_are_told() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 5, 4), "int8"), x: R.Tensor((2, 3), "float32")):
            with R.dataflow():
                stack = R.matmul(dequantize(q), dequantize(relax.const(STACK)))
                out = quantize(stack, 16.0)
                floats = R.matmul(x, relax.const(MATRIX.astype(np.float32)))
                both = (out, floats)
                R.output(both)
            return both

    lowered = transform(named(Before), PartitionForTarget(), LowerToInteger())
    after = transform(lowered, MaterializeTransfers(NAME))
    assert {name: text.split(",")[0] for name, text in after.get_attr(SKIPPED).items()} == {
        "stack": "no kernel computes it",
        "floats": "it computes in floating point",
    }
    assert ops.TRANSFER not in operators(after["stack_layer"])


@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_activations_that_are_wider_than_words_are_refused(dtype: str) -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 3), dtype)):
            with R.dataflow():
                product = R.matmul(dequantize(q, 0.5, dtype), dequantize(relax.const(MATRIX)))
                out = quantize(product, 16.0)
                R.output(out)
            return out

    lowered = transform(named(Before), PartitionForTarget(), LowerToInteger())
    with pytest.raises(UsageError, match=r"layer 'product'.*activations have 16 bits") as raised:
        transform(lowered, MaterializeTransfers(NAME))
    assert "wider words" in str(raised.value)


def test_weights_whose_zero_point_makes_them_wider_are_refused() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((2, 4), "int8")):
            with R.dataflow():
                w = dequantize(relax.const(OFFSET), 0.5, "uint8", 3)
                product = R.matmul(dequantize(q), w)
                out = quantize(product, 16.0)
                R.output(out)
            return out

    lowered = transform(named(Before), PartitionForTarget(), LowerToInteger())
    with pytest.raises(UsageError, match=r"layer 'product'.*less their zero point.*-3 to 252"):
        transform(lowered, MaterializeTransfers(NAME))


def test_there_has_to_be_a_link() -> None:
    module: Any = Layer
    module = module.clone()
    (variable,) = (v for v in module.get_global_vars() if v.name_hint == "conv_layer")
    module[variable] = module[variable].with_attr("target", "")
    with pytest.raises(UsageError, match="no link"):
        transform(module, MaterializeTransfers())
    with pytest.raises(UsageError, match="there is no link 'nowhere'"):
        transform(module, MaterializeTransfers("nowhere"))


def test_it_stands_among_tvms_own_passes() -> None:
    passes = [
        relax.transform.CanonicalizeBindings(),
        relax.transform.EliminateCommonSubexpr(),
        relax.transform.FoldConstant(),
        relax.transform.DeadCodeElimination(),
    ]
    sent = transform(Layer, MaterializeTransfers(NAME), *passes)
    assert operators(sent["conv_layer"]).count(ops.TRANSFER) == 2
    assert ops.TRANSFER not in operators(
        transform(sent, relax.transform.LegalizeOps())["conv_layer"]
    )
    tvm.compile(sent, target=tvm.target.Target("llvm"))
