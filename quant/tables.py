"""Elementwise functions of codes as tables: one float for every code, computed by onnxruntime.

The integer reference and the compiler share them, so that functions are exact wherever they run.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from bitwright.quant.float_ops import Array, make_session
from bitwright.quant.graph import constant
from bitwright.quant.observers import TensorQuantization

__all__ = ["function_table"]


def function_table(
    root: ir.Value, value: ir.Value, quantization: TensorQuantization, opset: int
) -> Array:
    """Evaluate the elementwise chain from ``root`` to ``value`` for every code of ``root``.

    Parameters
    ----------
    root, value
        As in :func:`bitwright.quant.graph.elementwise_roots`.
    quantization
        The codes that ``root`` holds.
    opset
        Version of the standard operator set.

    Returns
    -------
    Array
        float32, shape [number of codes]: first the value of the lowest code.
    """
    codes = np.arange(quantization.code_min, quantization.code_max + 1)
    centred = (codes - quantization.zero_point).astype(np.float32)
    inputs = centred * np.float32(quantization.scale)
    nodes: dict[ir.Node, None] = {}
    constants: dict[str, Array] = {}
    pending = [value]
    while pending:
        current = pending.pop()
        array = constant(current)
        if array is not None:
            constants[str(current.name)] = array
        elif current is not root:
            node = current.producer()
            assert node is not None
            nodes[node] = None
            pending.extend(entry for entry in node.inputs if entry is not None)
    ordered = [node for node in (value.graph or root.graph or ()) if node in nodes]
    rank = max([1, *(array.ndim for array in constants.values())])
    shaped = inputs.reshape(-1, *(1,) * (rank - 1))
    float_type = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in ordered],
        "table",
        [onnx.helper.make_tensor_value_info(str(root.name), float_type, shaped.shape)],
        [onnx.helper.make_tensor_value_info(str(value.name), float_type, shaped.shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10
    )
    session = make_session(model, optimize=False)
    result: Array = session.run(None, {str(root.name): shaped})[0].reshape(-1)
    return result
