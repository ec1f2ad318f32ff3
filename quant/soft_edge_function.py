"""The bodies of :mod:`bitwright.quant.soft_edge_nodes`, written with onnxscript.

They are generic in their attributes: one pair of functions serves all layouts of a model. Rounding
half away from zero is exact in float32 at half steps: ``round(p) = floor((floor(2 p) + 1) / 2)``,
while ``floor(p + 0.5)`` would round 0.49999997 up. NaN becomes the highest code, as in integers.
"""

# onnxscript reads the functions; their annotations and arguments are no types of Python.
# mypy: ignore-errors

import math

from onnxscript import FLOAT, INT16, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

__all__ = ["SoftEdgeDecode", "SoftEdgeEncode"]

bitwright = Opset("bitwright", 1)


@script(bitwright)
def SoftEdgeEncode(  # noqa: N802
    x: FLOAT,
    step: FLOAT,
    layout: str,  # noqa: ARG001
    signs: list[float],
    firsts: list[float],
    doubled: list[float],
    lasts: list[float],
    limits: list[float],
    zero_point: float,
    dtype: int,
):
    """Soft-edge codes of float values; see docs/soft-edge.md of bitwright."""
    column = op.Constant(value_ints=[-1, 1])
    row = op.Constant(value_ints=[1, -1])
    one = op.Constant(value_float=1.0)
    half = op.Constant(value_float=0.5)
    zero = op.Constant(value_float=0.0)
    infinity = op.Constant(value_float=math.inf)
    steps = op.Reshape(op.Div(x, step), row)
    steps = op.Where(op.IsNaN(steps), infinity, steps)
    sign = op.Reshape(op.Constant(value_floats=signs), column)
    distance = op.Mul(steps, sign)
    inside = op.Sub(distance, op.Reshape(op.Constant(value_floats=firsts), column))
    places = op.Mul(inside, op.Reshape(op.Constant(value_floats=doubled), column))
    last = op.Reshape(op.Constant(value_floats=lasts), column)
    halves = op.Floor(op.Min(op.Max(places, zero), last))
    rounded = op.Floor(op.Mul(op.Add(halves, one), half))
    limit = op.Reshape(op.Constant(value_floats=limits), column)
    beyond = op.Cast(op.Greater(distance, limit), to=1)
    parts = op.Mul(op.Add(rounded, beyond), sign)
    total = op.ReduceSum(parts, op.Constant(value_ints=[0]), keepdims=1)
    codes = op.Cast(op.Add(total, op.Constant(value_float=zero_point)), to=dtype)
    return op.Reshape(codes, op.Shape(x), allowzero=1)


@script(bitwright)
def SoftEdgeDecode(  # noqa: N802
    codes,
    layout: str,  # noqa: ARG001
    signs: list[int],
    strides: list[int],
    starts: list[int],
    lasts: list[int],
    gaps: list[int],
    zero_point: int,
) -> INT16:
    """Whole finest steps of soft-edge codes; see docs/soft-edge.md of bitwright."""
    column = op.Constant(value_ints=[-1, 1])
    row = op.Constant(value_ints=[1, -1])
    zero = op.Constant(value_int=0)
    centred = op.Sub(op.Cast(codes, to=7), op.Constant(value_int=zero_point))
    sign = op.Reshape(op.Constant(value_ints=signs), column)
    start = op.Reshape(op.Constant(value_ints=starts), column)
    places = op.Sub(op.Mul(op.Reshape(centred, row), sign), start)
    last = op.Reshape(op.Constant(value_ints=lasts), column)
    inside = op.Min(op.Max(places, zero), last)
    stride = op.Reshape(op.Constant(value_ints=strides), column)
    gap = op.Reshape(op.Constant(value_ints=gaps), column)
    beyond = op.Cast(op.GreaterOrEqual(places, zero), to=7)
    parts = op.Mul(op.Add(op.Mul(inside, stride), op.Mul(gap, beyond)), sign)
    total = op.ReduceSum(parts, op.Constant(value_ints=[0]), keepdims=1)
    return op.Reshape(op.Cast(total, to=5), op.Shape(codes), allowzero=1)
