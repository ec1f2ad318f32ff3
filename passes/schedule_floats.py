"""ScheduleFloats: what is slow in float32 without a schedule becomes kernels.

::

    y = R.add(R.matmul(x, R.const(w)), R.const(b))
        ->  y = R.call_tir(cls.float_product, (x, R.const(packed), R.const(b)))
    z = R.sigmoid(y)
        ->  z = R.call_tir(cls.float_sigmoid, (y,))

Products with constant weights run hundreds of times faster than what TVM makes of them by itself,
functions that it takes from the C library, one element after the other, about ten times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from bitwright.passes import ops
from bitwright.passes.expressions import (
    CallRewriter,
    as_block,
    constant,
    global_variable,
    operator,
    rewriting,
    scalar,
    static_shape,
    with_span,
)
from bitwright.targets.kernels import elementwise, float_matmul

__all__ = ["ScheduleFloats"]


class _Scheduling:
    """Rewrites the products of one module."""

    def __init__(self) -> None:
        self.kernels: dict[tuple[Any, ...], Any] = {}
        self.functions: dict[Any, Any] = {}

    def __call__(self, rewriter: CallRewriter, call: Any, _var: Any) -> Any:
        if operator(call) == "matmul":
            data, weights = call.args
            array, shape = constant(weights), static_shape(data)
            if array is None or array.ndim != 2 or array.dtype != np.float32 or not array.size:
                return call
            if shape is None or len(shape) < 2 or shape[-1] is None:
                return call
            kernel = self._kernel(shape[:-1], *array.shape, bias=False)
            packed = relax.const(float_matmul.pack(array), "float32")
            return with_span(relax.call_tir(kernel, [data, packed], call.ty), call)
        if operator(call) in elementwise.FUNCTIONS:
            return self._function(call)
        if operator(call) == ops.SOFT_EDGE_ENCODE:
            return self._encoder(call)
        if operator(call) == "add":
            for data, bias in (call.args, call.args[::-1]):
                found = self._with_bias(rewriter, call, data, bias)
                if found is not None:
                    return found
        return call

    def _with_bias(self, rewriter: CallRewriter, call: Any, data: Any, bias: Any) -> Any | None:
        """The product that is added to, with the addend; None if that is not what it is."""
        product, vector = rewriter.value(data), constant(bias)
        if operator(product) != "call_tir" or product.args[0] not in self.functions:
            return None
        operands = list(product.args[1].fields)
        columns = static_shape(call)[-1]  # type: ignore[index] # it is a product's
        if vector is None or len(operands) != 2 or vector.size != columns:
            return None
        if vector.shape[-1:] != (columns,) or vector.ndim > call.ty.ndim:
            return None
        rows = static_shape(operands[0])
        assert rows is not None
        kernel = self._kernel(rows[:-1], rows[-1], columns, bias=True)
        operands.append(relax.const(vector.reshape(-1), "float32"))
        return with_span(relax.call_tir(kernel, operands, call.ty), call)

    def _function(self, call: Any) -> Any:
        shape = static_shape(call)
        if str(call.ty.dtype) != "float32" or shape is None:
            return call
        name = operator(call)
        key = (name, *shape)
        if key not in self.kernels:
            primitive = elementwise.kernel(name, shape, f"float_{name.removeprefix('nn.')}")
            self._add(key, primitive)
        return with_span(relax.call_tir(self.kernels[key], [call.args[0]], call.ty), call)

    def _encoder(self, call: Any) -> Any:
        shape, step = static_shape(call), scalar(call.args[1])
        if shape is None or step is None:
            return call
        layout = ops.layout_of(call)
        key = (layout, step, *shape)
        if key not in self.kernels:
            self._add(key, elementwise.encoder(layout, step, shape, "soft_edge_encode"))
        return with_span(relax.call_tir(self.kernels[key], [call.args[0]], call.ty), call)

    def _kernel(self, leading: Sequence[Any], depth: Any, columns: Any, *, bias: bool) -> Any:
        key = (*leading, depth, columns, bias)
        if key not in self.kernels:
            name = "float_product"
            self._add(key, float_matmul.kernel(leading, depth, columns, name=name, bias=bias))
        return self.kernels[key]

    def _add(self, key: tuple[Any, ...], primitive: Any) -> None:
        name = str(primitive.attrs["global_symbol"])
        function = as_block(primitive)
        self.kernels[key] = variable = global_variable(f"{name}_{len(self.kernels)}", function)
        self.functions[variable] = function


@tvm.transform.module_pass(opt_level=0, name="ScheduleFloats")
class ScheduleFloats:
    """Make kernels of float products with constant weights; see the module's docstring.

    Requires: integer layers in functions of their own (LowerToInteger). Ensures: no ``R.matmul`` of
    the other functions has constant float32 weights with two axes; a constant vector that is added
    to the result is part of the kernel. ``R.exp``, ``R.sigmoid`` and the like of float32 are calls
    of kernels, and so is ``bitwright.soft_edge_encode``. Sums are taken in another order, and last
    bits of functions differ.
    """

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite every Relax function."""
        return rewriting(self._rewrite)(mod)

    @staticmethod
    def _rewrite(mod: Any) -> Any:
        scheduling = _Scheduling()
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                mod[variable] = CallRewriter(mod, scheduling).visit_expr(function)
        for variable, function in scheduling.functions.items():
            mod[variable] = function
        return mod
