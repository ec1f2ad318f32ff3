"""Relax modules with a selective scan, as in a Mamba."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.ir import SourceName, Span
from tvm.relax import op

from bitwright.passes import ops

CHANNELS, STATE = 8, 4

Front = Callable[[Callable[..., Any], Any], Any]
"""Makes of a function that binds and of a tensor what the scan reads."""


def body(builder: Any, *, gated: bool = False, batch: Sequence[int] = ()) -> Any:
    """Add the step of a selective scan, or of another recurrence of the same inputs."""
    sizes = ([CHANNELS, STATE], [CHANNELS], [CHANNELS], [STATE], [STATE])
    state, dt, x, b, c = (
        relax.Var(name, relax.TensorType([*batch, *shape], "float32"))
        for name, shape in zip(("h", "dt", "x", "B", "C"), sizes, strict=True)
    )
    decay = relax.const(-np.arange(1, STATE + 1, dtype=np.float32))
    with builder.function("body", [state, dt, x, b, c], private=True):
        with builder.dataflow():
            emit = builder.emit
            if batch:
                b, c = (emit(op.expand_dims(entry, -2)) for entry in (b, c))
            wide = emit(op.expand_dims(dt, -1))
            kept = emit(op.multiply(emit(op.exp(emit(op.multiply(wide, decay)))), state))
            if gated:
                kept = emit(op.tanh(kept))
            scaled = emit(op.expand_dims(emit(op.multiply(dt, x)), -1))
            new = emit(op.add(kept, emit(op.multiply(scaled, b))))
            output = emit(op.sum(emit(op.multiply(new, c)), axis=[-1]))
            result = builder.emit_output(relax.Tuple([new, output]))
        return builder.emit_func_output(result)


def module(
    fronts: Mapping[str, Front],
    behind: Callable[[Callable[..., Any], Any, Mapping[str, Any]], Any] | None = None,
    *,
    gated: bool = False,
    batch: Sequence[int] = (),
    names: Mapping[str, str] | None = None,
) -> Any:
    """A module of one scan.

    Parameters
    ----------
    fronts
        What stands between a parameter (``dt``, ``x``, ``B``, ``C``) and the scan.
    behind
        Makes the result of what binds, of the scan's output and of what the scan reads.
    gated
        Whether the scan is no selective one.
    batch
        Axes in front of those of a step.
    names
        Attribute of the module: precision of each layer.
    """
    builder = relax.BlockBuilder()
    step = body(builder, gated=gated, batch=batch)
    time = tirx.Var("T", "int64")
    sizes = {"dt": CHANNELS, "x": CHANNELS, "B": STATE, "C": STATE}
    inputs = {
        name: relax.Var(name, relax.TensorType([time, *batch, size], "float32"))
        for name, size in sizes.items()
    }
    kinds = [
        relax.TensorType([*batch, CHANNELS, STATE], "float32"),
        relax.TensorType([time, *batch, CHANNELS], "float32"),
    ]
    first = relax.const(np.zeros((*batch, CHANNELS, STATE), np.float32))
    with builder.function("main", list(inputs.values())):
        with builder.dataflow():
            read = {
                name: fronts[name](builder.emit, value) if name in fronts else value
                for name, value in inputs.items()
            }
            call = ops.scan(step, [], [first], list(read.values()), relax.TupleType(kinds))
            call = relax.Call(
                call.op, call.args, call.attrs, call.ty_args, Span(SourceName("ssm"), 1, 1, 1, 1)
            )
            scan = builder.emit(call)
            result = builder.emit(relax.TupleGetItem(scan, 1))
            if behind is not None:
                result = behind(builder.emit, result, read)
            result = builder.emit_output(result)
        builder.emit_func_output(result)
    made = builder.get()
    return made if names is None else made.with_attr("bitwright.precisions", dict(names))


def pair(scale: float, dtype: str = "int8", zero_point: int = 0) -> Front:
    """Quantize and dequantize."""

    def front(emit: Callable[..., Any], value: Any) -> Any:
        step = relax.const(np.float32(scale))
        zero = relax.const(np.array(zero_point, dtype), dtype)
        codes = emit(op.quantize(value, step, zero, axis=0, out_dtype=dtype))
        return emit(op.dequantize(codes, step, zero, axis=0))

    return front


def soft_edge(step: float, layout: Any) -> Front:
    """Encode, decode and dequantize."""

    def front(emit: Callable[..., Any], value: Any) -> Any:
        finest = relax.const(np.float32(step))
        codes = emit(ops.soft_edge_encode(value, finest, layout=layout))
        steps = emit(ops.soft_edge_decode(codes, layout=layout))
        zero = relax.const(np.int16(0), "int16")
        return emit(op.dequantize(steps, finest, zero, axis=0))

    return front
