"""PropagateQuantization: let codes travel where values only travel.

A move (reshape, transpose, slice, pooling by maximum, ...) carries values without computing any,
so it may carry codes just as well::

    y = R.reshape(R.dequantize(q, s, z), shape)         y = R.dequantize(R.reshape(q, shape), s, z)
    q = R.quantize(R.nn.max_pool2d(x), s, z)       ->   q = R.nn.max_pool2d(R.quantize(x, s, z))
    q2 = R.quantize(R.dequantize(q1, s, z), s, z)       q2 = q1
    y = R.nn.relu(R.dequantize(q, s, z))                y = R.dequantize(R.maximum(q, z), s, z)

Afterwards quantizers stand directly behind what computes, dequantizers directly in front of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

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
    with_span,
)

__all__ = ["PropagateQuantization"]


def _moved(call: Any, data: Any, zero_point: int) -> Any:
    """Return the same move of other data; what is padded is the code of 0."""
    if operator(call) == "nn.pad" and str(call.attrs.pad_mode) == "constant":
        widths = [int(width) for width in call.attrs.pad_width]
        return with_span(relax.op.nn.pad(data, widths, "constant", float(zero_point)), call)
    return relax.Call(call.op, [data, *call.args[1:]], call.attrs, call.ty_args, call.span)


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
        if name == "clip" and str(var.ty.dtype) in ("int8", "uint8"):
            return self._narrow(rewriter, call)
        if name in ("concat", "split"):
            return self._several(rewriter, call)
        source = rewriter.value(call.args[0]) if call.args else None
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
            zero = relax.const(np.array(zero_point, found.dtype))
            moved = relax.op.maximum(found.operand, zero)
        else:
            moved = _moved(call, found.operand, zero_point)
        return with_span(_dequantize(rewriter.emit(moved, var.name), found), call)

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
        return _moved(source, codes, int(wanted.zero_point))

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
        return _moved(source, clipped, 0)

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
        data = relax.Tuple(codes) if operator(call) == "concat" else codes[0]
        moved = rewriter.emit(_moved(call, data, 0))
        if operator(call) == "concat":
            return with_span(_dequantize(moved, first), call)
        count = len(moved.ty.fields)
        parts = [rewriter.emit(relax.TupleGetItem(moved, index)) for index in range(count)]
        return relax.Tuple([rewriter.emit(_dequantize(part, first)) for part in parts])


@tvm.transform.module_pass(opt_level=0, name="PropagateQuantization")
class PropagateQuantization:
    """Move quantization through operators that only carry values; see the module's docstring.

    Requires: quantizers as ``R.quantize`` / ``R.dequantize``, with a following ``R.clip`` of the
    codes for types below 8 bits. Ensures: the function computes the same values; no move stands
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
