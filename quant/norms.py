"""Fold the weights of normalisations into the projections that follow.

``(z * gamma + beta) @ W + b = z @ (diag(gamma) @ W) + (beta @ W + b)``: exact where nobody but
projections reads the output of the normalisation. What is quantized then is ``z``, whose channels
have like ranges. A normalisation is a LayerNormalization, an RMSNormalization, or a division by a
square root, as exporters spell them, followed by Mul and Add of constants.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.quant.float_ops import Array
from bitwright.quant.graph import attribute, constant, weight_input
from bitwright.quant.load import Model
from bitwright.quant.prepare import add_initializer

__all__ = ["fold_norms"]


def fold_norms(model: Model) -> list[str]:
    """Fold in place; return the names of the normalisations that lost their weights."""
    done = []
    for node in list(model.graph):
        if node.graph is None or node.domain != "":
            continue
        if node.op_type in ("LayerNormalization", "RMSNormalization"):
            folded = _fold_operator(model.graph, node)
        elif node.op_type in ("Mul", "Add"):
            folded = _fold_follower(model.graph, node)
        else:
            continue
        if folded:
            done.append(str(node.name))
    return done


def _fold_operator(graph: ir.Graph, node: ir.Node) -> bool:
    """A normalisation that is one operator, with its weights as inputs."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    gamma, beta = constant(value), constant(bias)
    plain = len(node.outputs) == 1 and attribute(node, "axis", -1) in (-1, _rank(node) - 1)
    if not plain or gamma is None or gamma.ndim != 1 or (bias is not None and beta is None):
        return False
    if not _fold(graph, node.outputs[0], gamma, np.zeros(gamma.size) if beta is None else beta):
        return False
    ones = add_initializer(graph, f"{node.name}.ones", np.ones_like(gamma))
    node.replace_input_with(1, ones)
    if bias is not None:
        node.replace_input_with(2, None)
        node.resize_inputs(2)
    return True


def _rank(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    return 0 if shape is None else len(shape)


def _fold_follower(graph: ir.Graph, node: ir.Node) -> bool:
    """The last Mul or Add by constants behind a division by a square root."""
    affine = _affine(node)
    if affine is None:
        return False
    value, gamma, beta = affine
    if not _fold(graph, node.outputs[0], gamma, beta):
        return False
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    return True


def _affine(node: ir.Node) -> tuple[ir.Value, Array, Array] | None:
    """What is normalised before a Mul, or a Mul and an Add; factors and offsets."""
    found = _vector_operand(node)
    if found is None:
        return None
    value, vector = found
    if node.op_type == "Mul":
        return (value, vector, np.zeros(vector.size)) if _is_normalised(value) else None
    above = value.producer()
    if above is None or above.op_type != "Mul" or len(value.uses()) != 1:
        return None
    inner = _affine(above)
    return None if inner is None else (inner[0], inner[1], vector)


def _vector_operand(node: ir.Node) -> tuple[ir.Value, Array] | None:
    for value, other in zip(node.inputs, reversed(node.inputs), strict=True):
        vector = constant(other)
        if value is None or vector is None or not vector.ndim or vector.dtype != np.float32:
            continue
        # With more axes than the value, the vector would give the result more.
        if value.shape is None or vector.ndim > len(value.shape):
            continue
        if vector.size == vector.shape[-1] == value.shape[-1]:
            return value, vector.reshape(-1)
    return None


def _is_normalised(value: ir.Value) -> bool:
    """Whether a value is divided by a square root."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Div", "Mul"):
        return False
    factors = [entry.producer() for entry in node.inputs if entry is not None]
    if node.op_type == "Div":
        return factors[-1] is not None and factors[-1].op_type == "Sqrt"
    return any(entry is not None and _is_inverse_root(entry) for entry in factors)


def _is_inverse_root(node: ir.Node) -> bool:
    if node.op_type == "Pow":
        exponent = constant(node.inputs[1])
        return exponent is not None and exponent.size == 1 and float(exponent.item()) == -0.5
    operand = node.inputs[-1] if node.inputs else None
    above = None if operand is None else operand.producer()
    return node.op_type in ("Reciprocal", "Div") and above is not None and above.op_type == "Sqrt"


def _fold(graph: ir.Graph, value: ir.Value, gamma: Array, beta: Array) -> bool:
    """Fold factors and offsets into all readers of a value; False where that is not exact."""
    readers = [use.node for use in value.uses()]
    if value.is_graph_output() or not readers or not all(map(_is_projection, readers)):
        return False
    plans = []
    for node in readers:
        weights = constant(node.inputs[1])
        assert weights is not None
        transposed = bool(attribute(node, "transB", 0))
        plain = (weights.T if transposed else weights).astype(np.float64)
        if plain.shape[0] != gamma.size or attribute(node, "alpha", 1.0) != 1.0:
            return False
        folded = (gamma.astype(np.float64)[:, None] * plain).astype(np.float32)
        offset = (beta.astype(np.float64) @ plain).astype(np.float32)
        plans.append((node, folded.T.copy() if transposed else folded, offset))
    if not all(np.isfinite(w).all() and np.isfinite(offset).all() for _, w, offset in plans):
        return False
    for node, folded, offset in plans:
        weights_value = add_initializer(graph, f"{node.name}.folded_weight", folded)
        node.replace_input_with(1, weights_value)
        if np.any(offset):
            _add_bias(graph, node, offset)
    return True


def _is_projection(node: ir.Node) -> bool:
    weights = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return (
        (bias is None or constant(bias) is not None)
        and node.op_type in ("MatMul", "Gemm")
        and weight_input(node) == 1
        and weights is not None
        and weights.ndim == 2
        and not attribute(node, "transA", 0)
    )


def _add_bias(graph: ir.Graph, node: ir.Node, offset: Array) -> None:
    """Add to the bias of a layer, the Add behind a MatMul being one; or give it one."""
    output = node.outputs[0]
    user, index = node, 2
    if node.op_type == "MatMul":
        uses = list(output.uses())
        user, index = (uses[0].node, 1 - uses[0].idx) if len(uses) == 1 else (node, 2)
        known = user.op_type == "Add" and user.domain == "" and not output.is_graph_output()
        bias = constant(user.inputs[index]) if known else None
        if bias is None or bias.size != offset.size or bias.shape[-1] != offset.size:
            addition = ir.node("Add", [None, None], name=f"{node.name}.add")
            sum_ = addition.outputs[0]
            sum_.name, sum_.type, sum_.shape = f"{output.name}.sum", output.type, output.shape
            ir.convenience.replace_all_uses_with(output, sum_, replace_graph_outputs=True)
            if sum_.is_graph_output():
                output.name, sum_.name = sum_.name, output.name
            addition.replace_input_with(0, output)
            addition.replace_input_with(
                1, add_initializer(graph, f"{node.name}.folded_bias", offset)
            )
            graph.insert_after(node, addition)
            return
    bias = constant(user.inputs[index]) if len(user.inputs) > index else None
    if len(user.inputs) <= index:
        user.resize_inputs(index + 1)
    total = offset if bias is None else (bias + offset).astype(np.float32)
    user.replace_input_with(index, add_initializer(graph, f"{node.name}.folded_bias", total))
