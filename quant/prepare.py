"""Bring a float model into the form that quantizes well, without changing what it computes.

1. BatchNormalization, Mul, Add, Sub and Div by constants, one a channel, directly after a Conv or
   Gemm move into its weights and bias. Any other BatchNormalization becomes a Mul and an Add.
2. ``alpha`` and ``beta`` of a Gemm move into its weights and bias; a bias that differs from row to
   row becomes an Add of its own.

Layers keep their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.quant.float_ops import Array
from bitwright.quant.graph import attribute, channel_axis, constant, weight_input
from bitwright.quant.load import Model

__all__ = ["add_initializer", "prepare"]


_TAKEN = "bitwright.names"


def add_initializer(
    graph: ir.Graph, name: str, array: Array | np.floating[Any] | ir.TensorProtocol
) -> ir.Value:
    """Register an initializer under a name not yet taken, ``name`` itself where that is free."""
    taken = graph.meta.get(_TAKEN)
    if taken is None:  # collected once: graphs have thousands of values
        taken = {value.name for node in graph for value in node.outputs}
        taken.update(value.name for value in graph.inputs)
        graph.meta[_TAKEN] = taken
    unique, count = name, 1
    while unique in graph.initializers or unique in taken:
        count += 1
        unique = f"{name}_{count}"
    tensor = ir.tensor(array, name=unique)
    value = ir.Value(
        name=unique,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def prepare(model: Model) -> None:
    """Rewrite the model in place; see the module's docstring for the rules."""
    for node in list(model.graph):
        if weight_input(node) != 1 or node.graph is None:
            continue
        if node.op_type == "Gemm":
            _plain_gemm(model.graph, node)
        if node.op_type in ("Conv", "Gemm"):
            while _fold_follower(model.graph, node):
                pass
    for node in list(model.graph):
        if node.op_type == "BatchNormalization":
            _spell_out(model.graph, node)


def _set_weights(graph: ir.Graph, node: ir.Node, weights: Array, bias: Array | None) -> None:
    node.replace_input_with(1, add_initializer(graph, f"{node.name}.weight", weights))
    if bias is not None:
        value = add_initializer(graph, f"{node.name}.bias", bias)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)


def _plain_gemm(graph: ir.Graph, node: ir.Node) -> None:
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    weights = constant(node.inputs[1])
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant(bias_value)
    if weights is None or weights.dtype != np.float32:
        return
    channels = weights.shape[0 if attribute(node, "transB", 0) else 1]
    if alpha == 1.0 and beta == 1.0 and (bias_value is None or _has_shape(bias, (channels,))):
        return
    vector = None
    if bias is not None and (bias.size == 1 or _has_shape(bias.reshape(-1), bias.shape[-1:])):
        vector = np.broadcast_to(bias.reshape(-1) * np.float32(beta), (channels,))
    elif bias_value is not None:
        # A bias that is computed or differs from row to row is added, not accumulated.
        output = node.outputs[0]
        if beta != 1.0:
            factor = add_initializer(graph, f"{node.name}.beta", np.float32(beta))
            scaled = ir.node("Mul", [bias_value, factor], name=f"{node.name}.scaled_bias")
            graph.insert_before(node, scaled)
            bias_value = scaled.outputs[0]
            bias_value.name = f"{node.name}.scaled_bias"
            bias_value.type, bias_value.shape = output.type, None
        addition = ir.node("Add", [None, None], name=f"{node.name}.add")
        sum_ = addition.outputs[0]
        sum_.name, sum_.type, sum_.shape = f"{output.name}.sum", output.type, output.shape
        _replace_everywhere(output, sum_)
        addition.replace_input_with(0, output)
        addition.replace_input_with(1, bias_value)
        graph.insert_after(node, addition)
        node.resize_inputs(2)
    _set_weights(
        graph, node, weights * np.float32(alpha), None if vector is None else vector.copy()
    )
    node.attributes.pop("alpha", None)
    node.attributes.pop("beta", None)


def _has_shape(array: Array | None, shape: tuple[int, ...]) -> bool:
    return array is not None and array.shape == shape


def _replace_everywhere(old: ir.Value, new: ir.Value) -> None:
    """Make all users, graph outputs included, read the new value; outputs keep their name."""
    if old.is_graph_output():
        old.name, new.name = new.name, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _fold_follower(graph: ir.Graph, node: ir.Node) -> bool:
    """Fold the operator after a layer into it; return whether there was one to fold."""
    output = node.outputs[0]
    uses = output.uses()
    if output.is_graph_output() or len(uses) != 1:
        return False
    follower, index = next(iter(uses))
    if follower.graph is not graph:  # it stands in the body of an If or Loop
        return False
    weights = constant(node.inputs[1])
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    bias = constant(node.inputs[2]) if has_bias else None
    if weights is None or weights.dtype != np.float32 or (has_bias and bias is None):
        return False
    axis = channel_axis(node, weights.ndim)
    assert axis is not None
    channels = weights.shape[axis]
    affine = _affine(follower, index, channels, weights.ndim)
    if affine is None:
        return False
    along = [-1 if i == axis else 1 for i in range(weights.ndim)]
    # In float64, so that folding rounds once.
    factor, offset = affine
    with np.errstate(over="ignore", invalid="ignore"):
        folded = (weights * factor.reshape(along)).astype(np.float32)
        moved = ((0.0 if bias is None else bias.astype(np.float64)) * factor + offset).astype(
            np.float32
        )
    if not (np.isfinite(folded).all() and np.isfinite(moved).all()):
        return False
    _set_weights(graph, node, folded, moved)
    last = follower.outputs[0]
    _replace_everywhere(last, output)
    output.shape = last.shape
    graph.remove(follower, safe=True)
    return True


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a BatchNormalization that no layer took by a Mul and an Add, which can be integer."""
    output = node.outputs[0]
    gamma = constant(node.inputs[1])
    rank = 0 if output.shape is None else len(output.shape)
    affine = None if gamma is None else _affine(node, 0, gamma.size, rank)
    if affine is None or rank < 2 or output.dtype != ir.DataType.FLOAT:
        return
    shape = [-1 if axis == 1 else 1 for axis in range(rank)]
    arrays = [entry.reshape(shape).astype(np.float32) for entry in affine]
    if not all(np.isfinite(array).all() for array in arrays):
        return
    factor, offset = (
        add_initializer(graph, f"{node.name}.{word}", array)
        for word, array in zip(("factor", "offset"), arrays, strict=True)
    )
    product = ir.node("Mul", [node.inputs[0], factor], name=f"{node.name}.mul")
    product.outputs[0].name = f"{output.name}.product"
    addition = ir.node("Add", [product.outputs[0], offset], name=f"{node.name}.add")
    addition.outputs[0].name = f"{output.name}.sum"
    for value in (product.outputs[0], addition.outputs[0]):
        value.type, value.shape = output.type, output.shape
    graph.insert_after(node, [product, addition])
    _replace_everywhere(output, addition.outputs[0])
    graph.remove(node, safe=True)


def _affine(node: ir.Node, index: int, channels: int, rank: int) -> tuple[Array, Array] | None:
    """Factor and offset, float64 [channels], of an operator that is affine in each channel."""
    if node.domain != "":
        return None
    if node.op_type == "BatchNormalization":
        parameters = [constant(value) for value in node.inputs[1:5]]
        if index != 0 or attribute(node, "training_mode", 0) or any(p is None for p in parameters):
            return None
        gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
            return factor, beta - mean * factor
    rules: dict[str, Callable[[Array], tuple[Array, Array]]] = {
        "Mul": lambda c: (c, np.zeros(channels)),
        "Add": lambda c: (np.ones(channels), c),
        "Sub": lambda c: (np.ones(channels), -c) if index == 0 else (-np.ones(channels), c),
        "Div": lambda c: (1.0 / c, np.zeros(channels)),
    }
    if node.op_type not in rules or len(node.inputs) != 2 or (node.op_type == "Div" and index):
        return None
    other = constant(node.inputs[1 - index])
    if other is None or other.dtype != np.float32 or other.ndim > rank:
        return None
    # Broadcast against [batch, channels, spatial...]: only the channel axis may vary.
    shape = (1,) * (rank - other.ndim) + other.shape
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    if shape[1] not in (1, channels) or (node.op_type == "Div" and not other.all()):
        return None
    return rules[node.op_type](np.broadcast_to(other.reshape(-1), (channels,)).astype(np.float64))
