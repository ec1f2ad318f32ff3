"""QDQ models with soft-edge activations."""

from __future__ import annotations

import numpy as np
import onnx

from bitwright.quant.soft_edge_nodes import (
    decode_attributes,
    encode_attributes,
    soft_edge_functions,
)
from bitwright.soft_edge import SoftEdge
from tests.quant.qdq import Builder

DOMAIN = "bitwright"


def soft_edge(builder: Builder, x: str, step: float, layout: SoftEdge, name: str = "") -> str:
    """Encode, decode and dequantize a tensor; return its name behind."""
    finest = builder.constant(np.float32(step))
    encode = encode_attributes(layout)
    label = name or f"SoftEdge_{len(builder.nodes)}"
    codes = builder.node(
        "SoftEdgeEncode", x, finest, name=f"{label}_encode", domain=DOMAIN, **encode
    )
    decode = decode_attributes(layout)
    steps = builder.node("SoftEdgeDecode", codes, name=f"{label}_decode", domain=DOMAIN, **decode)
    zero = builder.constant(np.int16(0))
    return builder.node("DequantizeLinear", steps, finest, zero, name=f"{label}_dequantize")


def made(
    builder: Builder, *outputs: str, shape: list[int | str | None] | None = None
) -> onnx.ModelProto:
    """The model, with the functions that its nodes call."""
    declared = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in outputs
    ]
    graph = onnx.helper.make_graph(
        builder.nodes, "graph", builder.inputs, declared, builder.initializers
    )
    opsets = [onnx.helper.make_opsetid("", builder.opset), onnx.helper.make_opsetid(DOMAIN, 1)]
    functions = list(soft_edge_functions(builder.opset))
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=functions)
