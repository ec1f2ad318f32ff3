"""Soft-edge codes in ONNX: nodes of two functions that the model carries along.

Tensors go through

    ``codes = bitwright.SoftEdgeEncode(x, step)``        codes of the layout's type
    ``steps = bitwright.SoftEdgeDecode(codes)``          int16, whole finest steps
    ``y = DequantizeLinear(steps, step, 0)``             standard

with the layout as a text (attribute ``layout``), and as the numbers that the bodies compute with.
Those hold one entry a segment; a segment takes part with its sign, so that segments of one side
give 0 for values of the other:

    ``code = zero_point + sum(sign * (round(clip((sign * v - first) / stride, 0, last)) + jump))``

where ``v = x / step`` and ``jump`` is 1 for what lies beyond the limit in front of the segment.
Segments that a value has passed give all their codes, those it has not reached give none.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import onnx

from bitwright.quant.graph import DECODE, ENCODE
from bitwright.soft_edge import SoftEdge

__all__ = ["decode_attributes", "encode_attributes", "soft_edge_functions"]


def encode_attributes(layout: SoftEdge) -> dict[str, Any]:
    """Attributes of a node that encodes."""
    segments = _segments(layout)
    return {
        "layout": str(layout),
        "signs": [float(sign) for sign, *_ in segments],
        "firsts": [float(first) for _, first, *_ in segments],
        # Twice the inverse of the stride: the sum of halves that the rounding needs is exact.
        "doubled": [2.0 / stride for _, _, stride, *_ in segments],
        "lasts": [2.0 * (count - 1) for _, _, _, count, *_ in segments],
        "limits": [limit for *_, limit in segments],
        "zero_point": float(layout.zero_point),
        "dtype": int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(layout.dtype))),
    }


def decode_attributes(layout: SoftEdge) -> dict[str, Any]:
    """Attributes of a node that decodes."""
    segments = _segments(layout)
    starts: list[int] = []
    gaps: list[int] = []
    for sign, first, _, _, _ in segments:
        before = [entry for entry in segments[: len(starts)] if entry[0] == sign]
        starts.append(sum(entry[3] for entry in before))
        reached = before[-1][1] + (before[-1][3] - 1) * before[-1][2] if before else 0
        gaps.append(first - reached)
    return {
        "layout": str(layout),
        "signs": [sign for sign, *_ in segments],
        "strides": [stride for _, _, stride, *_ in segments],
        "starts": starts,
        "lasts": [count - 1 for _, _, _, count, _ in segments],
        "gaps": gaps,
        "zero_point": layout.zero_point,
    }


def _segments(layout: SoftEdge) -> list[tuple[int, int, int, int, float]]:
    """Sign, first value, stride, number of codes, and the limit in front, of every segment."""
    found = []
    for sign, side in ((1, layout.positive), (-1, layout.negative)):
        below = math.inf  # nothing lies beyond: the first segment starts at the code of 0
        for segment in side:
            found.append((sign, segment.first, 1 << segment.shift, segment.codes, below))
            below = math.inf if segment.limit is None else segment.limit
    return found


def soft_edge_functions(opset: int) -> tuple[onnx.FunctionProto, onnx.FunctionProto]:
    """The two functions, encode first, for a model of some version of the standard operators."""
    functions = []
    for function in _written():
        proto = onnx.FunctionProto()
        proto.CopyFrom(function)
        for entry in proto.opset_import:
            entry.version = opset
        functions.append(proto)
    return functions[0], functions[1]


@cache
def _written() -> tuple[onnx.FunctionProto, onnx.FunctionProto]:
    from bitwright.quant import soft_edge_function  # onnxscript takes a second to load

    encode = soft_edge_function.SoftEdgeEncode.to_function_proto()
    decode = soft_edge_function.SoftEdgeDecode.to_function_proto()
    assert (encode.name, decode.name) == (ENCODE, DECODE)
    return encode, decode
