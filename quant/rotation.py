"""Rotate what a projection reads by a Hadamard matrix, and its weights back.

``y @ W = (y @ R) @ (R.T @ W)`` for an orthogonal ``R``: the output stays. What is quantized is
``y @ R``, in which the outliers of few channels are spread over all (Quamba, arXiv 2410.13229). The
rotation runs in float32 as two small products, ``R`` being a Kronecker product; its operators carry
a mark, by which they are told from layers, in the QDQ file too.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.quant.float_ops import Array
from bitwright.quant.graph import ROTATION, attribute, constant, loop_body, weight_input
from bitwright.quant.hadamard import factor, hadamard, has_hadamard
from bitwright.quant.load import Model
from bitwright.quant.prepare import add_initializer
from bitwright.quant.selective_scan import SelectiveScan

__all__ = ["rotate_scan_outputs"]


def rotate_scan_outputs(model: Model, scans: list[SelectiveScan]) -> list[str]:
    """Rotate the inputs of the projections behind selective scans; return the names of those.

    Raises
    ------
    ModelError
        If a projection has a size that there is no Hadamard matrix of, or is no matrix product.
    """
    projections = _projections(scans)
    sizes = {}
    for node in projections:
        size = _inputs(node)
        if size is None or not has_hadamard(size):
            what = "is no product with a matrix" if size is None else f"has {size} inputs"
            raise ModelError(
                f"layer {node.name!r} behind a selective scan {what}, and cannot be rotated",
                where=model.source,
                fix="a Hadamard matrix is there for 2^n, 12*2^n and 20*2^n inputs; leave the "
                "rotation out: --no-rotation",
            )
        sizes[node] = size
    rotated: dict[ir.Value, ir.Value] = {}
    for node, size in sizes.items():
        data, weights = node.inputs[0], constant(node.inputs[1])
        assert data is not None
        assert weights is not None
        if data not in rotated:
            rotated[data] = _rotate(model.graph, data, node, size)
        node.replace_input_with(0, rotated[data])
        folded = _fold(weights, size, transposed=bool(attribute(node, "transB", 0)))
        value = add_initializer(model.graph, f"{node.name}.rotated_weight", folded)
        node.replace_input_with(1, value)
    return [str(node.name) for node in sizes]


def _projections(scans: list[SelectiveScan]) -> list[ir.Node]:
    """The first layers behind the outputs of scans."""
    graphs = {scan.node.graph for scan in scans}
    pending = [value for scan in scans for value in scan.node.outputs[1:]]
    seen: set[ir.Value] = set()
    found: dict[ir.Node, None] = {}
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for use in value.uses():
            node = use.node
            if weight_input(node) is not None:
                found[node] = None
            elif node.graph in graphs and loop_body(node) is None:
                pending.extend(node.outputs)
    return [node for graph in graphs if graph is not None for node in graph if node in found]


def _inputs(node: ir.Node) -> int | None:
    """How many inputs a product has; None if it is none with a matrix on its right."""
    weights = constant(node.inputs[1])
    if node.op_type not in ("MatMul", "Gemm") or weight_input(node) != 1 or weights is None:
        return None
    if weights.ndim != 2 or attribute(node, "transA", 0):
        return None
    return int(weights.shape[1 if attribute(node, "transB", 0) else 0])


def _fold(weights: Array, size: int, *, transposed: bool) -> Array:
    """``R.T @ W``, in float64, so that it rounds once."""
    rotation = hadamard(size).astype(np.float64) / math.sqrt(size)
    plain = weights.T if transposed else weights
    folded = (rotation.T @ plain.astype(np.float64)).astype(np.float32)
    return np.ascontiguousarray(folded.T if transposed else folded)


def _rotate(graph: ir.Graph, data: ir.Value, user: ir.Node, size: int) -> ir.Value:
    """Write ``data @ R`` in front of a node: with data as a matrix, ``P.T @ data @ Q``."""
    p, q = factor(size) if data.shape is not None else (1, size)
    name = f"{data.name}_rotated"

    def matrix(n: int, label: str) -> ir.Value:
        array = (hadamard(n) / math.sqrt(n)).astype(np.float32)
        return add_initializer(
            graph, f"{name}.{label}", array.T.copy() if label == "left" else array
        )

    def node(kind: str, inputs: list[ir.Value], label: str, sizes: list[int] | None) -> ir.Value:
        made = ir.node(kind, inputs, name=f"{name}_{label}", metadata_props={ROTATION: "hadamard"})
        result = made.outputs[0]
        result.name, result.type = f"{name}_{label}", data.type
        if data.shape is not None and sizes is not None:
            result.shape = ir.Shape([*data.shape[:-1], *sizes])
        graph.insert_before(user, made)
        return result

    if p == 1:
        result = node("MatMul", [data, matrix(size, "right")], "product", [size])
    else:
        assert data.shape is not None
        kept = [0] * (len(data.shape) - 1)  # sizes that stay what they are
        apart = add_initializer(graph, f"{name}.split", np.array([*kept, p, q], np.int64))
        whole = add_initializer(graph, f"{name}.join", np.array([*kept, size], np.int64))
        split = node("Reshape", [data, apart], "split", [p, q])
        right = node("MatMul", [split, matrix(q, "right")], "right", [p, q])
        left = node("MatMul", [matrix(p, "left"), right], "left", [p, q])
        result = node("Reshape", [left, whole], "join", [size])
    result.name = name
    return result
