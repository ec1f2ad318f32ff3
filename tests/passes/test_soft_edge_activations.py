"""SoftEdgeActivations: modules before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tvm import relax
from tvm.ir import SourceName, Span
from tvm.relax import op

from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.expressions import operator, quantizer
from bitwright.passes.soft_edge_activations import SoftEdgeActivations
from bitwright.soft_edge import QUAMBA_SE, SoftEdge
from tests.passes.mamba import CHANNELS, STATE, Front, module, pair, soft_edge
from tests.passes.modules import assert_same, transform
from tests.passes.soft_edge_layouts import ASYMMETRIC

S = 0.0625  # a scale whose fractions are exact


def assert_becomes(before: Any, expected: Any, **options: Any) -> None:
    after = transform(before, SoftEdgeActivations(**options))
    assert_same(after, expected)
    assert_same(transform(after, SoftEdgeActivations(**options)), expected)  # once is enough


def test_the_ssm_input_gets_three_scales() -> None:
    assert_becomes(module({"x": pair(S)}), module({"x": soft_edge(S / 4, QUAMBA_SE)}))


def test_other_inputs_stay_unless_asked_for() -> None:
    before = {"x": pair(S), "dt": pair(2 * S), "B": pair(3 * S), "C": pair(4 * S)}
    fine = {"x": soft_edge(S / 4, QUAMBA_SE), "B": soft_edge(3 * S / 4, QUAMBA_SE)}
    assert_becomes(module(before), module({**before, "x": fine["x"]}))
    assert_becomes(module(before), module({**before, **fine}), tensors="x+B")
    whole = {name: soft_edge(k * S / 4, QUAMBA_SE) for k, name in enumerate("x dt B C".split(), 1)}
    assert_becomes(module(before), module({**before, **whole}), tensors=["x", "dt", "B", "C"])


def test_edges_and_ratios_are_a_layout() -> None:
    layout = SoftEdge.three_scales((7.5, 63.0, 127.0), (0.5, 1.0, 2.0))
    expected = module({"x": soft_edge(S / 2, layout)})
    assert_becomes(module({"x": pair(S)}), expected, edges="7.5/63/127", ratios=(0.5, 1.0, 2.0))


def test_any_layout_with_its_finest_step() -> None:
    expected = module({"x": soft_edge(S / 8, ASYMMETRIC)})
    assert_becomes(module({"x": pair(S)}), expected, layout=str(ASYMMETRIC), finest=0.125)


def test_moves_carry_the_codes() -> None:
    def front(make: Callable[[Callable[..., Any], Any], Any]) -> Front:
        def moved(emit: Callable[..., Any], value: Any) -> Any:
            turned = emit(op.permute_dims(value))
            read = make(emit, turned)
            return emit(op.flip(read, axis=0))

        return moved

    def quantized(emit: Callable[..., Any], value: Any) -> Any:
        step, zero = relax.const(np.float32(S)), relax.const(np.int8(0), "int8")
        codes = emit(op.permute_dims(emit(op.quantize(value, step, zero, axis=0))))
        return emit(op.dequantize(codes, step, zero, axis=0))

    def encoded(emit: Callable[..., Any], value: Any) -> Any:
        step, zero = relax.const(np.float32(S / 4)), relax.const(np.int16(0), "int16")
        codes = emit(ops.soft_edge_encode(value, step, layout=QUAMBA_SE))
        steps = emit(ops.soft_edge_decode(emit(op.permute_dims(codes)), layout=QUAMBA_SE))
        return emit(op.dequantize(steps, step, zero, axis=0))

    assert_becomes(module({"x": front(quantized)}), module({"x": front(encoded)}))


def _projection(emit: Callable[..., Any], data: Any) -> Any:
    weights = np.arange(CHANNELS * STATE, dtype=np.int8).reshape(CHANNELS, STATE)
    zero = relax.const(np.int8(0), "int8")
    stored = emit(op.dequantize(relax.const(weights), relax.const(np.float32(S)), zero, axis=0))
    return emit(op.matmul(data, stored))


def test_parts_of_a_split() -> None:
    def front(make: Front) -> Front:
        def part(emit: Callable[..., Any], value: Any) -> Any:
            both = emit(op.concat([value, value], axis=1))
            whole = emit(op.split(make(emit, both), 2, axis=1))
            return emit(relax.TupleGetItem(whole, 1))

        return part

    def quantized(emit: Callable[..., Any], value: Any) -> Any:
        step, zero = relax.const(np.float32(S)), relax.const(np.int8(0), "int8")
        both = emit(op.concat([value, value], axis=1))
        whole = emit(op.split(emit(op.quantize(both, step, zero, axis=0)), 2, axis=1))
        return emit(op.dequantize(emit(relax.TupleGetItem(whole, 1)), step, zero, axis=0))

    def encoded(emit: Callable[..., Any], value: Any) -> Any:
        step, zero = relax.const(np.float32(S / 4)), relax.const(np.int16(0), "int16")
        both = emit(op.concat([value, value], axis=1))
        codes = emit(ops.soft_edge_encode(both, step, layout=QUAMBA_SE))
        part = emit(relax.TupleGetItem(emit(op.split(codes, 2, axis=1)), 1))
        steps = emit(ops.soft_edge_decode(part, layout=QUAMBA_SE))
        return emit(op.dequantize(steps, step, zero, axis=0))

    assert_becomes(module({"x": quantized}), module({"x": encoded}))
    before, expected = (
        module({"x": front(make)}) for make in (pair(S), soft_edge(S / 4, QUAMBA_SE))
    )
    assert_becomes(before, expected)


def test_a_projection_of_the_same_codes_keeps_them() -> None:
    def behind(emit: Callable[..., Any], output: Any, read: Any) -> Any:
        return relax.Tuple([output, emit(op.matmul(read["x"], _weights(emit)))])

    after = transform(module({"x": pair(S)}, behind), SoftEdgeActivations())
    main = after["main"]
    bound = {b.var: b.value for block in main.body.blocks for b in block.bindings}
    (product,) = [value for value in bound.values() if operator(value) == "matmul"]
    (scan,) = [value for value in bound.values() if operator(value) == ops.SCAN]
    found = quantizer(bound[product.args[0]], "dequantize")
    assert found is not None
    assert found.dtype == "int8"
    codes = bound[found.operand]
    found = quantizer(bound[scan.args[3].fields[1]], "dequantize")
    assert found is not None
    encode = bound[bound[found.operand].args[0]]
    assert operator(encode) == ops.SOFT_EDGE_ENCODE
    assert encode.args[0].same_as(codes.args[0])  # the encoder reads what the quantizer reads


def _behind(make: Front) -> Callable[..., Any]:
    def behind(emit: Callable[..., Any], output: Any, _: Any) -> Any:
        gated = emit(op.multiply(output, emit(op.nn.silu(output))))
        rotation = (np.eye(CHANNELS) - 2 / CHANNELS).astype(np.float32)  # a reflection
        gated = emit(op.matmul(gated, relax.const(rotation)))
        out = op.matmul(make(emit, gated), _weights(emit))
        return emit(out)

    return behind


def _weights(emit: Callable[..., Any]) -> Any:
    weights = np.ones((CHANNELS, STATE), np.int8)
    zero = relax.const(np.int8(0), "int8")
    return emit(op.dequantize(relax.const(weights), relax.const(np.float32(S)), zero, axis=0))


def test_the_gated_output_on_request() -> None:
    before = module({"x": pair(S)}, _behind(pair(2 * S)))
    expected = module({"x": pair(S)}, _behind(soft_edge(S / 2, QUAMBA_SE)))
    assert_becomes(before, expected, tensors="y")


def test_what_else_reads_the_gated_output_keeps_its_codes() -> None:
    def behind(fine: Front | None) -> Callable[..., Any]:
        def made(emit: Callable[..., Any], output: Any, _: Any) -> Any:
            coarse = pair(2 * S)(emit, output)
            read = coarse if fine is None else fine(emit, output)
            product = emit(op.matmul(read, _weights(emit)))
            return relax.Tuple([product, emit(op.nn.relu(coarse))])

        return made

    expected = module({}, behind(soft_edge(S / 2, QUAMBA_SE)))
    after = transform(module({}, behind(None)), SoftEdgeActivations(tensors="y"))
    bound = _bound(after)
    (relu,) = [value for value in bound.values() if operator(value) == "nn.relu"]
    found = quantizer(bound[relu.args[0]], "dequantize")
    assert found is not None
    assert found.dtype == "int8"
    (product,) = [value for value in bound.values() if operator(value) == "matmul"]
    found = quantizer(bound[product.args[0]], "dequantize")
    assert found is not None
    assert operator(bound[found.operand]) == ops.SOFT_EDGE_DECODE
    names = [sorted(operator(v) or "" for v in _bound(m).values()) for m in (after, expected)]
    assert names[0] == names[1]


def _bound(made: Any) -> dict[Any, Any]:
    return {b.var: b.value for block in made["main"].body.blocks for b in block.bindings}


def _float_layer(emit: Callable[..., Any], value: Any) -> Any:
    weights = np.random.default_rng(0).normal(size=(CHANNELS, CHANNELS)).astype(np.float32)
    return emit(op.matmul(value, relax.const(weights)))


def _weight_only_layer(emit: Callable[..., Any], value: Any) -> Any:
    weights = relax.const(np.eye(CHANNELS, dtype=np.int8))
    zero = relax.const(np.int8(0), "int8")
    return emit(op.matmul(value, emit(op.dequantize(weights, relax.const(np.float32(1)), zero))))


def _root_of_mean_square(emit: Callable[..., Any], value: Any) -> Any:
    power = emit(op.mean(emit(op.multiply(value, value)), [-1], keepdims=True))
    return emit(op.sqrt(emit(op.add(power, relax.const(np.float32(1e-5))))))


def _divided(emit: Callable[..., Any], value: Any) -> Any:
    return emit(op.divide(value, _root_of_mean_square(emit, value)))


def _multiplied(emit: Callable[..., Any], value: Any) -> Any:
    root = _root_of_mean_square(emit, value)
    return emit(op.multiply(value, emit(op.divide(relax.const(np.float32(1)), root))))


def _layer_norm(emit: Callable[..., Any], value: Any) -> Any:
    weight = relax.const(np.ones(CHANNELS, np.float32))
    return emit(op.nn.layer_norm(value, weight, weight, axes=[-1]))


@pytest.mark.parametrize(
    "between", [_float_layer, _weight_only_layer, _divided, _multiplied, _layer_norm]
)
def test_the_layer_behind_another_one_reads_no_output_of_the_scan(between: Front) -> None:
    def behind(emit: Callable[..., Any], output: Any, _: Any) -> Any:
        read = pair(S)(emit, between(emit, output))
        return emit(op.matmul(read, _weights(emit)))

    with pytest.raises(UsageError, match="y of 'ssm' reaches no layer through a quantizer"):
        transform(module({}, behind), SoftEdgeActivations(tensors="y"))


def test_the_layer_behind_is_noted() -> None:
    def named(make: Front) -> Callable[..., Any]:
        def behind(emit: Callable[..., Any], output: Any, _: Any) -> Any:
            call = op.matmul(make(emit, output), _weights(emit))
            span = Span(SourceName("out_proj"), 1, 1, 1, 1)
            return emit(relax.Call(call.op, call.args, call.attrs, call.ty_args, span))

        return behind

    names = {"out_proj": "w4a8", "in_proj": "w8a8"}
    before = module({}, named(pair(S)), names=names)
    after = transform(before, SoftEdgeActivations(tensors="y"))
    assert dict(after.get_attr("bitwright.precisions")) == {**names, "out_proj": "w4a8se"}


def test_other_loops_are_left_alone() -> None:
    with pytest.raises(UsageError, match="the model has no selective scan"):
        transform(module({"x": pair(S)}, gated=True), SoftEdgeActivations())


@pytest.mark.parametrize(
    "front, why",
    [
        (lambda _, value: value, "x of 'ssm' is not quantized"),
        (pair(S, "uint8"), "as uint8 with zero point 0, not symmetrically as int8"),
        (pair(S, "int8", 3), "as int8 with zero point 3, not symmetrically as int8"),
        (pair(S, "int16"), "as int16 with zero point 0, not symmetrically as int8"),
    ],
)
def test_what_has_no_such_quantizer_is_named(front: Front, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        transform(module({"x": front}), SoftEdgeActivations())
    assert "--recipe quamba" in str(caught.value)


def test_a_tensor_that_is_asked_for_is_not_left_out() -> None:
    before = module({"x": pair(S), "B": pair(S, "uint8", 3)})
    with pytest.raises(UsageError) as caught:
        transform(before, SoftEdgeActivations(tensors="x+dt+B"))
    assert "dt of 'ssm' is not quantized; B of 'ssm' is quantized as uint8" in str(caught.value)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"tensors": "z"}, "a selective scan has no 'z'"),
        ({"edges": "1/2/3"}, "edges and ratios are given together"),
        (
            {"layout": str(ASYMMETRIC), "edges": "15.75/143/395", "ratios": "0.25/1/4"},
            "edges and ratios are a layout, and int8:.* is another one",
        ),
        ({"edges": "1/2", "ratios": "1/2/4"}, "edges are three numbers, not '1/2'"),
        ({"edges": "1/2/3", "ratios": "1/2/3"}, "ratios be powers of two"),
        ({"layout": "two"}, "'two' is no soft-edge layout"),
        ({"layout": str(ASYMMETRIC)}, "give finest, a positive number"),
        ({"finest": -1.0}, "give finest, a positive number"),
    ],
)
def test_wrong_options(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        SoftEdgeActivations(**options)
