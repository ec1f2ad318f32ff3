"""Relax operators that standard Relax lacks, registered from Python.

``bitwright.requantize(accumulator, multiplier)``
    Codes of an accumulator: ``clamp(rint(float32(accumulator) * multiplier) + zero_point, low,
    high)`` as ``dtype``; see ``docs/integer-semantics.md``. ``multiplier`` (float32) broadcasts.
    With ``form="fixed"`` the product is exact and computed in integers, of accumulators of 32 bits.

``bitwright.unpack(words)``
    Integers out of a dense string of bits: value ``i`` is the unsigned number in bits
    ``[i * bits, (i + 1) * bits)`` of the bytes, lowest bit first, plus ``low``.

``bitwright.scan(body, captured, states, sequences)``
    A loop over time. ``body`` is a function of the module (a GlobalVar); its parameters are the
    captured values, the states and one element of each sequence (a slice along axis 0), in this
    order; it returns one tuple, the new states and then the elements of the outputs. The result is
    a tuple: the states behind the last step, and the outputs, stacked along a new axis 0. States
    keep their shapes. All sequences have the same length, which may be 0.

``bitwright.cond(then, otherwise, condition, captured)``
    One of two results, as ``condition`` (a bool without axes) says. ``then`` and ``otherwise`` are
    functions of the module; both take the captured values and return a tuple. Only one runs.

``bitwright.transfer(x)``, ``bitwright.transfer(x, places)``
    The value of ``x``, which crosses the link to the array. The attributes say how: ``layer`` (the
    ONNX node), ``operand`` (``inputs`` or ``weights``), ``link`` (a
    :class:`~bitwright.targets.link.Link` as JSON) and ``order`` (as ``Order.parse`` reads it).
    Values stay where they are: ``places`` says at which place of its window each term is sent, and
    the consumer adds up the products in that order. It is what ``bitwright.order`` returns, or a
    constant, uint8 [channels, terms], where it depends on constants alone.

``bitwright.order(x, table)``
    The places of the stable counting sort of ``x`` by the buckets ``table`` (uint16
    [2^word_bits], one a word), in each window; uint8 [samples, channels or groups, positions or 1,
    terms]. The attributes are those of the transfer of ``x``. A sorting unit computes it.

``bitwright.soft_edge_encode(x, step)``
    Codes of ``x`` (float32) in a soft-edge layout whose finest step is ``step`` (float32, shape
    []). The attribute ``layout`` is the text of a :class:`bitwright.soft_edge.SoftEdge`, which
    says which type the codes have, and is the definition of both operators.

``bitwright.soft_edge_decode(codes)``
    Whole finest steps (int16) that codes of the attribute ``layout`` stand for: shifts, additions
    and selections of integers. ``R.dequantize(steps, step, 0)`` makes numbers of them.

The first two and the last two have a legalization, so a module that holds them compiles with TVM's
own pipeline; transfers and orders leave nothing behind there. ``LowerScan`` replaces loops; what it
leaves, and ``bitwright.cond``, are replaced behind code generation (``scan_recursion.lower``,
``lower_cond.lower``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Op
from tvm.ir.op import register_op_attr
from tvm.relax.transform.legalize_ops.common import register_legalize

from bitwright.errors import UsageError
from bitwright.soft_edge import SoftEdge
from bitwright.targets.kernels import soft_edge

__all__ = [
    "COND",
    "ORDER",
    "REQUANTIZE",
    "SCAN",
    "SOFT_EDGE_DECODE",
    "SOFT_EDGE_ENCODE",
    "TRANSFER",
    "UNPACK",
    "cond",
    "layout_of",
    "order",
    "requantize",
    "scan",
    "soft_edge_decode",
    "soft_edge_encode",
    "transfer",
    "unpack",
]

COND = "bitwright.cond"
ORDER = "bitwright.order"
REQUANTIZE = "bitwright.requantize"
SCAN = "bitwright.scan"
SOFT_EDGE_DECODE = "bitwright.soft_edge_decode"
SOFT_EDGE_ENCODE = "bitwright.soft_edge_encode"
TRANSFER = "bitwright.transfer"
UNPACK = "bitwright.unpack"

_ORDER_AXES = 4


def requantize(
    accumulator: Any,
    multiplier: Any,
    *,
    zero_point: int,
    low: int,
    high: int,
    dtype: str,
    form: str = "float",
) -> Any:
    """Call ``bitwright.requantize``; see the module's docstring."""
    attributes = tvm.ir.make_node(
        "ir.DictAttrs", zero_point=zero_point, low=low, high=high, dtype=dtype, form=form
    )
    return relax.Call(Op.get(REQUANTIZE), [accumulator, multiplier], attrs=attributes)


def unpack(words: Any, *, shape: Sequence[int], bits: int, low: int, dtype: str) -> Any:
    """Call ``bitwright.unpack``; see the module's docstring."""
    attributes = tvm.ir.make_node(
        "ir.DictAttrs", shape=list(shape), bits=bits, low=low, dtype=dtype
    )
    return relax.Call(Op.get(UNPACK), [words], attrs=attributes)


def scan(
    body: Any, captured: Sequence[Any], states: Sequence[Any], sequences: Sequence[Any], kind: Any
) -> Any:
    """Call ``bitwright.scan``; see the module's docstring.

    Parameters
    ----------
    body
        GlobalVar of the body.
    captured, states, sequences
        Tensors, variables or constants.
    kind
        Type of the result, a tuple of tensor types.
    """
    operands = [relax.Tuple(list(entries)) for entries in (captured, states, sequences)]
    return relax.Call(Op.get(SCAN), [body, *operands], ty_args=[kind])


def cond(then: Any, otherwise: Any, condition: Any, captured: Sequence[Any], kind: Any) -> Any:
    """Call ``bitwright.cond``; see the module's docstring.

    Parameters
    ----------
    then, otherwise
        GlobalVars of the branches.
    condition
        Tensor of shape [], bool.
    captured
        Tensors, variables or constants.
    kind
        Type of the result, a tuple of tensor types; sizes are left out that the branches do not
        share.
    """
    operands = [then, otherwise, condition, relax.Tuple(list(captured))]
    return relax.Call(Op.get(COND), operands, ty_args=[kind])


def transfer(
    x: Any,
    places: Any | None = None,
    *,
    layer: str,
    operand: str,
    link: str,
    order: str = "none",
) -> Any:
    """Call ``bitwright.transfer``; see the module's docstring."""
    attributes = tvm.ir.make_node(
        "ir.DictAttrs", layer=layer, operand=operand, link=link, order=order
    )
    arguments = [x] if places is None else [x, places]
    return relax.Call(Op.get(TRANSFER), arguments, attrs=attributes)


def order(x: Any, table: Any, *, layer: str, operand: str, link: str, order: str) -> Any:
    """Call ``bitwright.order``; see the module's docstring."""
    attributes = tvm.ir.make_node(
        "ir.DictAttrs", layer=layer, operand=operand, link=link, order=order
    )
    return relax.Call(Op.get(ORDER), [x, table], attrs=attributes)


def soft_edge_encode(x: Any, step: Any, *, layout: SoftEdge | str) -> Any:
    """Call ``bitwright.soft_edge_encode``; see the module's docstring.

    Raises
    ------
    UsageError
        If the text is no layout.
    """
    text = str(SoftEdge.parse(str(layout)))
    attributes = tvm.ir.make_node("ir.DictAttrs", layout=text)
    return relax.Call(Op.get(SOFT_EDGE_ENCODE), [x, step], attrs=attributes)


def soft_edge_decode(codes: Any, *, layout: SoftEdge | str) -> Any:
    """Call ``bitwright.soft_edge_decode``; see the module's docstring.

    Raises
    ------
    UsageError
        If the text is no layout.
    """
    text = str(SoftEdge.parse(str(layout)))
    attributes = tvm.ir.make_node("ir.DictAttrs", layout=text)
    return relax.Call(Op.get(SOFT_EDGE_DECODE), [codes], attrs=attributes)


def layout_of(call: Any) -> SoftEdge:
    """The layout of a call of either operator."""
    return SoftEdge.parse(str(call.attrs["layout"]))


def _like(call: Any, dtype: str) -> Any:
    """The type of a call whose result has the shape of its first operand."""
    operand = call.args[0].ty
    if operand.shape is None:
        return relax.TensorType(dtype=dtype, ndim=operand.ndim)
    return relax.TensorType(operand.shape, dtype)


def _soft_edge_encode_type(call: Any, _context: Any) -> Any:
    for argument in call.args:
        dtype = str(argument.ty.dtype)
        if dtype != "float32":
            raise UsageError(
                f"soft-edge codes are made of float32 values and steps, not {dtype}",
                fix="cast them, or quantize where they are float32",
            )
    return _like(call, layout_of(call).dtype)


def _soft_edge_decode_type(call: Any, _context: Any) -> Any:
    layout = layout_of(call)
    dtype = str(call.args[0].ty.dtype)
    if dtype != layout.dtype:
        raise UsageError(
            f"codes of the soft-edge layout {layout} are {layout.dtype}, not {dtype}",
            fix="decode what soft_edge_encode returns",
        )
    return _like(call, "int16")


def _requantize_type(call: Any, _context: Any) -> Any:
    return _like(call, str(call.attrs["dtype"]))


def _unpack_type(call: Any, _context: Any) -> Any:
    return relax.TensorType([int(dim) for dim in call.attrs["shape"]], str(call.attrs["dtype"]))


def _legalize_requantize(builder: Any, call: Any) -> Any:
    attrs = call.attrs
    zero_point, low, high = (int(attrs[name]) for name in ("zero_point", "low", "high"))
    dtype = str(attrs["dtype"])

    def compute(accumulator: Any, multiplier: Any) -> Any:
        ahead = len(accumulator.shape) - len(multiplier.shape)

        def element(*indices: Any) -> Any:
            place = [
                0 if isinstance(size, tirx.IntImm) and size.value == 1 else index
                for size, index in zip(multiplier.shape, indices[ahead:], strict=True)
            ]
            factor = multiplier[tuple(place)]
            if str(attrs["form"]) == "fixed":
                codes = _fixed_product(accumulator[indices], factor)
                codes = te.max(codes, tirx.const(low - zero_point, "int64"))
                codes = te.min(codes, tirx.const(high - zero_point, "int64"))
                return (codes + tirx.const(zero_point, "int64")).astype(dtype)
            scaled = accumulator[indices].astype("float32") * factor
            # Bounds before rounding: rint is monotone, and the result fits an int32.
            bounded = te.max(
                te.min(scaled, tirx.const(high - zero_point, "float32")),
                tirx.const(low - zero_point, "float32"),
            )
            rounded = tirx.nearbyint(bounded).astype("int32")
            return (rounded + tirx.const(zero_point, "int32")).astype(dtype)

        return te.compute(accumulator.shape, element, name="requantize")

    return builder.call_te(compute, *call.args, primfunc_name_hint="requantize")


def _fixed_product(accumulator: Any, multiplier: Any) -> Any:
    """Round the exact product: a float32 multiplier is a number of 24 bits and a shift."""
    bits = tirx.reinterpret("int32", multiplier)
    exponent = bits >> 23  # multipliers are not negative: there is no sign
    mantissa = tirx.Select(exponent > 0, (bits & (2**23 - 1)) | 2**23, tirx.const(0, "int32"))
    product = accumulator.astype("int64") * mantissa.astype("int64")
    # A shift below 1 means at least 2^22 codes, beyond 63 less than half of one.
    right = te.max(te.min(150 - exponent, tirx.const(63, "int32")), tirx.const(1, "int32"))
    right = right.astype("int64")
    one = tirx.const(1, "int64")
    half, odd = one << (right - one), (product >> right) & one
    return (product + half - one + odd) >> right


def _legalize_unpack(builder: Any, call: Any) -> Any:
    attrs = call.attrs
    bits, low = int(attrs["bits"]), int(attrs["low"])
    shape, dtype = [int(dim) for dim in attrs["shape"]], str(attrs["dtype"])

    def compute(words: Any) -> Any:
        def element(*indices: Any) -> Any:
            position = tirx.const(0, "int64")
            for size, index in zip(shape, indices, strict=True):
                position = position * size + index
            value: Any = tirx.const(0, "int32")
            if bits < 8:  # 2 and 4 divide 8: no value crosses a byte
                per_byte = 8 // bits
                byte = words[tirx.floordiv(position, per_byte)].astype("int32")
                shift = (tirx.floormod(position, per_byte) * bits).astype("int32")
                value = (byte >> shift) & tirx.const(2**bits - 1, "int32")
            else:
                for offset in range(bits // 8):
                    byte = words[position * (bits // 8) + offset].astype("int32")
                    value = value | (byte << tirx.const(8 * offset, "int32"))
            return (value + tirx.const(low, "int32")).astype(dtype)

        return te.compute(shape, element, name="unpack")

    return builder.call_te(compute, *call.args, primfunc_name_hint="unpack")


def _legalize_soft_edge_encode(builder: Any, call: Any) -> Any:
    layout = layout_of(call)

    def compute(x: Any, step: Any) -> Any:
        def element(*indices: Any) -> Any:
            finest = step[(0,) * len(step.shape)]
            return soft_edge.encoded(layout, x[indices], finest, 1, lambda value: value)

        return te.compute(x.shape, element, name="soft_edge_encode")

    return builder.call_te(compute, *call.args, primfunc_name_hint="soft_edge_encode")


def _legalize_soft_edge_decode(builder: Any, call: Any) -> Any:
    layout = layout_of(call)

    def compute(codes: Any) -> Any:
        def element(*indices: Any) -> Any:
            return soft_edge.decoded(layout, codes[indices], 1).astype("int16")

        return te.compute(codes.shape, element, name="soft_edge_decode")

    return builder.call_te(compute, *call.args, primfunc_name_hint="soft_edge_decode")


def _legalize_order(_builder: Any, _call: Any) -> Any:
    # Nobody reads it: the transfers, which alone take it, are gone.
    return relax.const(np.zeros((0,) * _ORDER_AXES, np.uint8))


def _register(
    name: str,
    arguments: Sequence[str],
    infer: Callable[[Any, Any], Any],
    legalize: Callable[[Any, Any], Any] | None = None,
) -> None:
    try:
        Op.get(name)
        return  # another import of this file, under another name, has been here
    except Exception:
        pass
    tvm.get_global_func("ir.RegisterOp")(name, "")
    op = Op.get(name)
    op.set_num_inputs(len(arguments))
    for argument in arguments:
        op.add_argument(argument, "Tensor", "")
    register_op_attr(name, "FPurity", True)
    register_op_attr(name, "FInferType", infer)
    if legalize is not None:
        # Results of unknown shape are else left alone.
        register_op_attr(name, "FDataDependent", name == ORDER)
        register_legalize(name)(legalize)


@functools.cache
def register() -> None:
    """Register the operators, once a process."""
    _register(REQUANTIZE, ["accumulator", "multiplier"], _requantize_type, _legalize_requantize)
    _register(UNPACK, ["words"], _unpack_type, _legalize_unpack)
    _register(SOFT_EDGE_ENCODE, ["x", "step"], _soft_edge_encode_type, _legalize_soft_edge_encode)
    _register(SOFT_EDGE_DECODE, ["codes"], _soft_edge_decode_type, _legalize_soft_edge_decode)
    names = ["body", "captured", "states", "sequences"]
    _register(SCAN, names, lambda call, _context: call.ty_args[0])
    names = ["then", "otherwise", "condition", "captured"]
    _register(COND, names, lambda call, _context: call.ty_args[0])
    _register(
        TRANSFER,
        ["x", "places"],
        lambda call, _context: call.args[0].ty,
        lambda _builder, call: call.args[0],
    )
    _register(
        ORDER,
        ["x", "table"],
        lambda _call, _context: relax.TensorType(dtype="uint8", ndim=_ORDER_AXES),
        _legalize_order,
    )


register()
