"""PackWeights: dense parameters, kernel calls, and modules that still run without kernels."""
# mypy: disable-error-code="valid-type, name-defined, no-untyped-def, untyped-decorator"
# ruff: noqa: N805
# The modules are TVMScript: Python's syntax, but neither its types nor its methods.

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax
from tvm.script import ir as I  # noqa: N812  # TVM's own names in scripts
from tvm.script import relax as R  # noqa: N812

from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.pack_weights import PARAMETER_NAMES, PackWeights, pack
from bitwright.passes.partition_for_target import PartitionForTarget
from tests.passes.modules import assert_same, layers, named, operators, run, transform
from tests.quant.qdq import BITS, Array, profile

GENERATOR = np.random.default_rng(1)
FILTERS = GENERATOR.integers(-8, 8, (4, 3, 2, 2)).astype(np.int8)
MATRIX = GENERATOR.integers(-128, 128, (3, 4)).astype(np.int8)
TABLE = np.arange(256, dtype=np.int8)


def quantize(x: Any, scale: float = 0.5, dtype: str = "int8") -> Any:
    return relax.op.quantize(
        x, relax.const(scale, "float32"), relax.const(0, dtype), axis=0, out_dtype=dtype
    )


def dequantize(q: Any, scale: float = 0.5, dtype: str = "int8") -> Any:
    return relax.op.dequantize(q, relax.const(scale, "float32"), relax.const(0, dtype), axis=0)


def parameters(module: Any) -> dict[str, Array]:
    """The packed parameters of ``main`` by name."""
    attrs = module["main"].attrs
    return {
        str(name): tensor.numpy()
        for name, tensor in zip(attrs[PARAMETER_NAMES], attrs["params"], strict=True)
    }


def bits_of(words: Array, bits: int, count: int) -> list[int]:
    """Numbers out of a string of bits, lowest bit first, by the definition."""
    stream = [(int(byte) >> place) & 1 for byte in words for place in range(8)]
    return [
        sum(stream[index * bits + place] << place for place in range(bits))
        for index in range(count)
    ]


# -- packing ---------------------------------------------------------------------------------------


@profile(80)
@given(st.data())
def test_packed_values_are_a_dense_string_of_bits(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    lowest = data.draw(st.integers(1 - 2**bits, 0))  # centred codes: 0 is among them
    values = data.draw(st.lists(st.integers(lowest, lowest + 2**bits - 1), max_size=40))
    array = np.array(values, np.int32).reshape(-1, 1)
    words, low = pack(array, bits)
    assert words.dtype == np.uint8
    assert words.shape == (math.ceil(bits * len(values) / 8),)
    assert [value + low for value in bits_of(words, bits, len(values))] == values


@pytest.mark.parametrize("bits", BITS)
def test_signed_codes_keep_the_same_offset_whatever_they_are(bits: int) -> None:
    half = 2 ** (bits - 1)
    for values in ([-half, half - 1], [0], [half - 1], []):
        assert pack(np.array(values, np.int16), bits)[1] == -half
    assert pack(np.array([0, 2**bits - 1], np.int32), bits)[1] == 0  # unsigned codes


@pytest.mark.parametrize("bits", BITS)
def test_values_that_do_not_fit_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.array([0, 2**bits]), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 3, 4, 17])
def test_unpacking_inverts_packing(bits: int, count: int) -> None:
    half = 2 ** (bits - 1)
    values = GENERATOR.integers(-half, half, (count, 1, 1)).astype(np.int16)
    words, low = pack(values, bits)
    builder = relax.BlockBuilder()
    parameter = relax.Var("words", relax.TensorType(words.shape, "uint8"))
    with builder.function("main", [parameter]):
        unpacked = ops.unpack(parameter, shape=values.shape, bits=bits, low=low, dtype="int16")
        builder.emit_func_output(builder.emit(unpacked))
    np.testing.assert_array_equal(run(builder.get(), words)[0], values)


# -- modules ---------------------------------------------------------------------------------------


@I.ir_module
class TwoLayers:
    @R.function
    def main(q: R.Tensor((2, 3, 4, 4), "int8")):
        with R.dataflow():
            conv = R.nn.conv2d(dequantize(q), dequantize(relax.const(FILTERS)))
            middle = quantize(conv, 4.0)
            turned = R.permute_dims(middle, axes=[0, 2, 3, 1])
            cut = R.strided_slice(turned, [3], [0], [3])
            product = R.matmul(dequantize(cut), dequantize(relax.const(MATRIX)))
            out = quantize(product, 64.0)
            y = R.take(relax.const(TABLE), R.astype(out, "uint8"), axis=0, mode="clip")
            R.output(y)
        return y


def lowered(module: Any, precisions: dict[str, str] | None = None) -> Any:
    """Name the layers, partition and lower."""
    module = named(module)
    if precisions:
        module = module.with_attr("bitwright.precisions", precisions)
    return transform(module, PartitionForTarget(), LowerToInteger())


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_constants_become_parameters_of_main(isa: str) -> None:
    before = lowered(TwoLayers, {"conv": "w4a8", "product": "w8a8"})
    after = transform(before, PackWeights(isa=isa, kernels=False))
    found = parameters(after)
    assert {name: array.dtype.name for name, array in found.items()} == {
        "conv.weight": "uint8",
        "conv.multiplier": "float32",
        "product.weight": "uint8",
        "product.multiplier": "float32",
        "y.table": "int8",
    }
    # 4 bits a weight, 8 bits a weight; nothing else of the weights remains in the module.
    assert len(found["conv.weight"]) == FILTERS.size / 2
    assert len(found["product.weight"]) == MATRIX.size
    values = [value - 8 for value in bits_of(found["conv.weight"], 4, FILTERS.size)]
    assert values == FILTERS.reshape(-1).tolist()
    np.testing.assert_array_equal(found["conv.multiplier"], np.full(4, 0.25 / 4, np.float32))
    for function in after.functions.values():
        for array in constants(function):
            assert array.size < 32
    # The inputs come first; the parameters in the order of their names.
    names = [parameter.name for parameter in after["main"].params]
    assert names == ["q", *found]
    # It is executable as it is: the bodies of the layers invert the layout.
    x = GENERATOR.integers(-128, 128, (2, 3, 4, 4)).astype(np.int8)
    np.testing.assert_array_equal(run(after, x, *found.values())[0], run(before, x)[0])


def constants(function: Any) -> list[Array]:
    """Tensors that stand in a function."""
    found: list[Array] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, tvm.ir.GenericConst) and isinstance(expr.ty, relax.TensorType):
            found.append(expr.value.numpy())

    if isinstance(function, relax.Function):
        relax.analysis.post_order_visit(function, visit)
    return found


def test_layers_of_kernels_are_marked_for_code_generation() -> None:
    after = transform(lowered(TwoLayers), PackWeights())
    for layer in layers(after).values():
        assert str(layer.attrs["Codegen"]) == "bitwright"
        assert operators(layer)[-1] == "bitwright.requantize"
        names = [parameter.name for parameter in layer.params[1:]]
        assert names == ["weights", "multiplier"]


def test_without_kernels_no_layer_is_marked() -> None:
    after = transform(lowered(TwoLayers), PackWeights(kernels=False))
    for layer in layers(after).values():
        assert {"Codegen", "global_symbol"}.isdisjoint(layer.attrs.keys())


def test_different_layers_have_kernels_of_their_own() -> None:
    after = transform(lowered(TwoLayers), PackWeights())
    symbols = [str(layer.attrs["global_symbol"]) for layer in layers(after).values()]
    assert len(set(symbols)) == 2


def test_layers_without_a_kernel_have_packed_weights_too() -> None:
    left = np.ascontiguousarray(MATRIX.T)  # no kernel takes weights on the left

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((3, 5), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(relax.const(left)), dequantize(q))
                out = quantize(product, 64.0)
                R.output(out)
            return out

    before = lowered(Before)
    after = transform(before, PackWeights())
    found = parameters(after)
    (layer,) = layers(after).values()
    if "Codegen" not in layer.attrs:
        assert list(found) == ["product.weight"]
    assert len(found["product.weight"]) == 12
    x = GENERATOR.integers(-128, 128, (3, 5)).astype(np.int8)
    np.testing.assert_array_equal(run(after, x, *found.values())[0], run(before, x)[0])


def test_uses_of_one_accumulator_share_its_weights() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor((5, 3), "int8")):
            with R.dataflow():
                product = R.matmul(dequantize(q), dequantize(relax.const(MATRIX)))
                fine = quantize(product, 32.0)
                coarse = quantize(product, 64.0)
                R.output(fine, coarse)
            return (fine, coarse)

    before = lowered(Before)
    after = transform(before, PackWeights(kernels=False))
    found = parameters(after)
    assert [name for name in found if "weight" in name] == ["product.weight"]
    assert [name for name in found if "multiplier" in name] == [
        "product.multiplier",
        "product.multiplier.2",
    ]
    x = GENERATOR.integers(-128, 128, (5, 3)).astype(np.int8)
    for ours, plain in zip(run(after, x, *found.values()), run(before, x), strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_equal_values_of_two_types_are_two_parameters() -> None:
    narrow, wide = np.arange(40, dtype=np.int32), np.arange(40, dtype=np.int64)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((40,), "int32"), y: R.Tensor((40,), "int64")):
            with R.dataflow():
                total = R.add(x, relax.const(narrow, "int32"))
                both = R.add(y, relax.const(wide, "int64"))
                R.output(total, both)
            return (total, both)

    after = transform(same_name(Before), PackWeights())
    assert [array.dtype.name for array in parameters(after).values()] == ["int32", "int64"]


def same_name(module: Any) -> Any:
    """Make all calls stem from one node."""
    text = named(module)
    for binding in text["main"].body.blocks[0].bindings:
        assert binding.value.span is not None
    span = text["main"].body.blocks[0].bindings[0].value.span

    @relax.expr_functor.mutator
    class Renamed(relax.PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            return relax.Call(call.op, call.args, call.attrs, call.ty_args, span)

    text["main"] = Renamed(text).visit_expr(text["main"])
    return text


def test_small_constants_stay() -> None:
    small, large = np.arange(31, dtype=np.float32), np.arange(32, dtype=np.float32)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((31,), "float32"), y: R.Tensor((32,), "float32")):
            with R.dataflow():
                a = R.add(x, relax.const(small))
                b = R.add(y, relax.const(large))
                R.output(a, b)
            return (a, b)

    after = transform(named(Before), PackWeights())
    assert list(parameters(after)) == ["b.constant"]


def test_a_module_without_constants_has_no_parameters() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((31,), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                R.output(y)
            return y

    after = transform(named(Before), PackWeights())
    assert parameters(after) == {}
    assert [parameter.name for parameter in after["main"].params] == ["x"]


def test_packing_twice_changes_nothing() -> None:
    once = transform(lowered(TwoLayers), PackWeights())
    assert_same(transform(once, PackWeights()), once)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match="quantum"):
        transform(lowered(TwoLayers), PackWeights(isa="quantum"))


def test_a_module_needs_main() -> None:
    with pytest.raises(Exception, match="main"):
        transform(tvm.IRModule(), PackWeights())


def test_tvm_detaches_the_parameters() -> None:
    after = transform(lowered(TwoLayers), PackWeights())
    expected = parameters(after)
    detached, arrays = relax.frontend.detach_params(after)
    assert "params" not in (detached["main"].attrs or {})
    for array, packed in zip(arrays["main"], expected.values(), strict=True):
        np.testing.assert_array_equal(array.numpy(), packed)
