"""PropagateQuantization: let codes travel where values only travel.

A move (reshape, transpose, slice, pooling by maximum, ...) carries values without computing any,
so it may carry codes just as well::

    y = R.reshape(R.dequantize(q, s, z), shape)         y = R.dequantize(R.reshape(q, shape), s, z)
    q = R.quantize(R.nn.max_pool2d(x), s, z)       ->   q = R.nn.max_pool2d(R.quantize(x, s, z))
    q2 = R.quantize(R.dequantize(q1, s, z), s, z)       q2 = q1
    y = R.nn.relu(R.dequantize(q, s, z))                y = R.dequantize(R.maximum(q, z), s, z)

Soft-edge codes travel just so, in front of ``bitwright.soft_edge_decode`` and behind
``bitwright.soft_edge_encode``. Afterwards quantizers stand directly behind what computes,
dequantizers directly in front of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from bitwright.passes import ops
from bitwright.passes.expressions import (
    Array,
    CallRewriter,
    Quantizer,
    clip_bits,
    code_bits,
    constant,
    is_move,
    operator,
    quantizer,
    rewriting,
    same_move,
    soft_edge,
    with_span,
)

__all__ = ["PropagateQuantization"]


def _dequantize(codes: Any, parameters: Quantizer, axis: int | None = None) -> Any:
    zero_points = parameters.zero_point.astype(parameters.dtype)
    return relax.op.dequantize(
        codes,
        relax.const(parameters.scale, "float32"),
        relax.const(zero_points, parameters.dtype),
        # Per tensor the axis says nothing, but it has to exist.
        axis=0 if parameters.per_tensor else (parameters.axis if axis is None else axis),
    )


def _fold(call: Any, array: Array) -> Array | None:
    """Result of a reordering of constant codes."""
    if operator(call) == "permute_dims":
        axes = call.attrs.axes
        return np.transpose(array, None if axes is None else [int(axis) for axis in axes])
    shape = getattr(call.ty, "shape", None)
    sizes = [getattr(dim, "value", None) for dim in shape.values] if shape is not None else [None]
    if operator(call) in ("reshape", "expand_dims", "squeeze", "flatten") and None not in sizes:
        return array.reshape([int(size) for size in sizes if size is not None])
    return None


class _Propagation:
    """The rules; one object a function."""

    def __call__(self, rewriter: CallRewriter, call: Any, var: Any) -> Any:
        name = operator(call)
        if name == "quantize":
            return self._quantize(rewriter, call)
        if name == ops.SOFT_EDGE_ENCODE:
            return self._encode(rewriter, call)
        if name == "clip" and str(var.ty.dtype) in ("int8", "uint8"):
            return self._narrow(rewriter, call)
        if name in ("concat", "split"):
            return self._several(rewriter, call)
        source = rewriter.value(call.args[0]) if call.args else None
        if soft_edge(source) is not None and is_move(call):
            return self._carried(rewriter, call, call.args[0], 0)
        found = quantizer(source, "dequantize")
        if found is None or not (name == "nn.relu" or is_move(call)):
            return call
        codes = constant(found.operand)
        if codes is not None:
            return self._constant(call, found, codes)
        if not found.per_tensor:
            return call
        zero_point = int(found.zero_point)
        if name == "nn.relu":
            moved = self._at_least_zero(rewriter, found)
        else:
            moved = self._carried(rewriter, call, found.operand, zero_point)
        return with_span(_dequantize(rewriter.emit(moved, var.name), found), call)

    @staticmethod
    def _carried(rewriter: CallRewriter, call: Any, codes: Any, zero_point: int) -> Any:
        """The move of codes; of soft-edge codes in front of their decoder."""
        decode = rewriter.value(codes)
        layout = soft_edge(decode)
        if layout is None:
            return same_move(call, codes, zero_point)
        inner = rewriter.emit(same_move(call, decode.args[0], layout.zero_point))
        return ops.soft_edge_decode(inner, layout=layout)

    @staticmethod
    def _at_least_zero(rewriter: CallRewriter, found: Quantizer) -> Any:
        """Relu of codes."""
        decode = rewriter.value(found.operand)
        layout = soft_edge(decode)
        if layout is None:
            zero = relax.const(np.array(found.zero_point, found.dtype))
            return relax.op.maximum(found.operand, zero)
        zero = relax.const(np.array(layout.zero_point, layout.dtype))
        inner = rewriter.emit(relax.op.maximum(decode.args[0], zero))
        return ops.soft_edge_decode(inner, layout=layout)

    def _encode(self, rewriter: CallRewriter, call: Any) -> Any:
        source = rewriter.value(call.args[0])
        if not is_move(source) or constant(call.args[1]) is None:
            return call
        inner = relax.Call(call.op, [source.args[0], call.args[1]], call.attrs, None, call.span)
        codes = self._encode(rewriter, inner)
        codes = codes if isinstance(codes, relax.Var) else rewriter.emit(codes)
        return same_move(source, codes, ops.layout_of(call).zero_point)

    @staticmethod
    def _constant(call: Any, found: Quantizer, codes: Array) -> Any:
        folded = _fold(call, codes)
        axis = found.axis
        if folded is None:
            return call
        if not found.per_tensor and operator(call) == "permute_dims":
            axes = call.attrs.axes
            order = [int(a) for a in axes] if axes is not None else range(codes.ndim)[::-1]
            axis = list(order).index(axis % codes.ndim)
        elif not found.per_tensor:
            # A vector of channels, whose axis stays the only one that is not 1.
            places = [place for place, size in enumerate(folded.shape) if size != 1]
            if codes.shape[axis] != codes.size or len(places) != 1:
                return call
            axis = places[0]
        return _dequantize(relax.const(np.ascontiguousarray(folded)), found, axis)

    def _quantize(self, rewriter: CallRewriter, call: Any) -> Any:
        wanted = quantizer(call, "quantize")
        if wanted is None or not wanted.per_tensor:
            return call
        source = rewriter.value(wanted.operand)
        before = quantizer(source, "dequantize")
        if before is not None:
            return before.operand if before.same_parameters(wanted) else call
        if not is_move(source):
            return call
        inner = relax.op.quantize(
            source.args[0], *call.args[1:], axis=0, out_dtype=call.attrs.out_dtype
        )
        codes = self._quantize(rewriter, with_span(inner, call))
        codes = codes if isinstance(codes, relax.Var) else rewriter.emit(codes)
        return same_move(source, codes, int(wanted.zero_point))

    def _narrow(self, rewriter: CallRewriter, call: Any) -> Any:
        """Clip of codes to fewer bits: follows its quantizer, and cuts nothing twice."""
        bits = clip_bits(call)
        if bits is None:
            return call
        if bits >= code_bits(call.args[0], rewriter.value):
            return call.args[0]
        source = rewriter.value(call.args[0])
        if not is_move(source):
            return call
        data = source.args[0]
        clipped = self._narrow(
            rewriter, relax.Call(call.op, [data, *call.args[1:]], call.attrs, None, call.span)
        )
        clipped = clipped if isinstance(clipped, relax.Var) else rewriter.emit(clipped)
        return same_move(source, clipped, 0)

    @staticmethod
    def _several(rewriter: CallRewriter, call: Any) -> Any:
        """Concat of equally quantized codes; split."""
        fields = [call.args[0]]
        if operator(call) == "concat":
            operands = rewriter.value(call.args[0])
            if not isinstance(operands, relax.Tuple):
                return call
            fields = list(operands.fields)
        found = [quantizer(rewriter.value(field), "dequantize") for field in fields]
        first = found[0] if found else None
        if first is None or not first.per_tensor:
            return call
        codes = []
        for entry in found:
            if entry is None or not entry.same_parameters(first):
                return call
            codes.append(entry.operand)
        decoders = [rewriter.value(entry) for entry in codes]
        layouts = {soft_edge(entry) for entry in decoders}
        layout = layouts.pop() if len(layouts) == 1 else None
        if layout is not None:
            codes = [entry.args[0] for entry in decoders]

        def decoded(codes: Any) -> Any:
            if layout is None:
                return codes
            return rewriter.emit(ops.soft_edge_decode(codes, layout=layout))

        data = relax.Tuple(codes) if operator(call) == "concat" else codes[0]
        moved = rewriter.emit(same_move(call, data, 0))
        if operator(call) == "concat":
            return with_span(_dequantize(decoded(moved), first), call)
        count = len(moved.ty.fields)
        parts = [rewriter.emit(relax.TupleGetItem(moved, index)) for index in range(count)]
        parts = [decoded(part) for part in parts]
        return relax.Tuple([rewriter.emit(_dequantize(part, first)) for part in parts])


@tvm.transform.module_pass(opt_level=0, name="PropagateQuantization")
class PropagateQuantization:
    """Move quantization through operators that only carry values; see the module's docstring.

    Requires: quantizers as ``R.quantize`` / ``R.dequantize``, with a following ``R.clip`` of the
    codes for types below 8 bits; behind ``bitwright.soft_edge_decode`` a dequantizer has zero point
    0. Ensures: the function computes the same values; no move stands
    between codes and what computes on them, where scale and zero point are one number.
    """

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite every Relax function."""
        return rewriting(self._rewrite)(mod)

    @staticmethod
    def _rewrite(mod: Any) -> Any:
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                rewriter = CallRewriter(mod, _Propagation())
                mod[variable] = rewriter.visit_expr(function)
        return mod
