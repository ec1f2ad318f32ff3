"""QDQ models with soft-edge activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx

from benchmarks import recurrent_models
from bitwright.quant.observers import TensorQuantization
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


def selective_scan(
    make: Callable[[Builder, str, str], str], names: Sequence[str] = ("u",)
) -> onnx.ModelProto:
    """A selective scan of 16 channels whose projection reads what the scan reads.

    Parameters
    ----------
    make
        Quantizes a tensor for the scan: builder, tensor and the name of the scan's input.
    names
        What is quantized: ``delta``, ``u``, ``B``, ``C``.
    """
    channels, state = 16, 4
    plain = recurrent_models.selective_scan(channels, state)
    builder = Builder(opset=21)
    builder.initializers.extend(plain.graph.initializer)
    (scan,) = plain.graph.node
    read = []
    for value in plain.graph.input:
        sizes = [entry.dim_value or entry.dim_param for entry in value.type.tensor_type.shape.dim]
        x = builder.input(value.name, sizes)
        if value.name == "u":  # what a convolution leaves
            x = builder.activation(x, TensorQuantization(0.001, 0, 16, signed=True))
            x = builder.node("Mul", x, builder.node("Sigmoid", x))
            codes = builder.activation(x, TensorQuantization(SCALE, 0, 8, signed=True))
            weights = np.random.default_rng(0).integers(-127, 128, (channels, 5))
            stored = builder.weights(weights, np.float32(0.01), bits=8)
            out = builder.node("MatMul", codes, stored, name="x_proj")
            projected = builder.activation(out, TensorQuantization(0.1, 0, 8, signed=True))
        read.append(make(builder, x, value.name) if value.name in names else x)
    scan.input[1:] = read
    builder.nodes.append(scan)
    outputs = {scan.output[1]: ["time", channels], projected: ["time", 5]}
    model = made(builder, *outputs)
    for entry, shape in zip(model.graph.output, outputs.values(), strict=True):
        entry.CopyFrom(
            onnx.helper.make_tensor_value_info(entry.name, onnx.TensorProto.FLOAT, shape)
        )
    return model


SCALE = 1 / 16
"""Of the int8 codes that the projection reads."""
