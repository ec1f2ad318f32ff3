"""Helpers of the tests of quant: build small QDQ models, run them in onnxruntime, count codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from hypothesis import HealthCheck, settings

from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.reference import Reference, Region
from bitwright.quant.requantization import RequantizationForm

Array = npt.NDArray[Any]

BITS = (2, 4, 8, 16)


def profile(examples: int) -> settings:
    """Settings of a property test: the same cases on every machine, however slow it is."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def code_type(bits: int, signed: bool) -> Any:
    """NumPy type of codes: ml_dtypes' below 8 bits."""
    name = f"{'int' if signed else 'uint'}{bits}"
    return getattr(ml_dtypes, name) if bits < 8 else np.dtype(name)


def quantize(values: Array, quantization: TensorQuantization) -> Array:
    """Quantize as the ONNX standard says, in NumPy."""
    codes = np.rint(values.astype(np.float32) / np.float32(quantization.scale)).astype(np.float64)
    codes += quantization.zero_point
    clipped: Array = np.clip(codes, quantization.code_min, quantization.code_max)
    return clipped.astype(np.int64)


@dataclass
class Builder:
    """Collects the nodes of an ONNX model; every method returns the name of a tensor."""

    opset: int = 25
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    quantized: dict[str, tuple[str, TensorQuantization]] = field(default_factory=dict)
    """Tensor of codes to the tensor behind DequantizeLinear, and how it is quantized."""

    def input(self, name: str, shape: Sequence[int | str | None]) -> str:
        """Add a float input of the model."""
        self.inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        return name

    def constant(self, array: npt.ArrayLike, name: str = "constant") -> str:
        """Add an initializer."""
        unique = f"{name}_{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array), unique))
        return unique

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        label = name or f"{operator}_{len(self.nodes)}"
        self.nodes.append(
            onnx.helper.make_node(operator, list(inputs), [f"{label}_out"], label, **attributes)
        )
        return f"{label}_out"

    def activation(self, tensor: str, quantization: TensorQuantization) -> str:
        """Quantize and dequantize a tensor."""
        dtype = code_type(quantization.bits, quantization.signed)
        scale = self.constant(np.float32(quantization.scale), "scale")
        zero_point = self.constant(np.array(quantization.zero_point).astype(dtype), "zero_point")
        codes = self.node("QuantizeLinear", tensor, scale, zero_point)
        result = self.node("DequantizeLinear", codes, scale, zero_point)
        self.quantized[codes] = result, quantization
        return result

    def weights(
        self,
        codes: Array,
        scale: npt.ArrayLike,
        *,
        bits: int,
        signed: bool = True,
        axis: int | None = None,
        zero_point: npt.ArrayLike = 0,
    ) -> str:
        """Dequantize stored codes."""
        dtype = np.dtype(np.int32) if bits == 32 else code_type(bits, signed)
        zero = np.broadcast_to(np.asarray(zero_point), np.shape(scale)).astype(dtype)
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        return self.node(
            "DequantizeLinear",
            self.constant(codes.astype(dtype), "codes"),
            self.constant(np.asarray(scale, np.float32), "scale"),
            self.constant(zero, "zero_point"),
            **attributes,
        )

    def model(
        self, *outputs: str, shape: Sequence[int | str | None] | None = None
    ) -> onnx.ModelProto:
        """Make the model; ``shape`` is that of its outputs, where it cannot be inferred."""
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        declared = [
            onnx.ValueInfoProto(name=name)
            if shape is None
            else onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name in outputs
        ]
        graph = onnx.helper.make_graph(
            self.nodes, "graph", self.inputs, declared, self.initializers
        )
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
        if shape is None:
            model = onnx.shape_inference.infer_shapes(model)
            model.graph.ClearField("value_info")  # bitwright infers them itself
        return model


def run_onnxruntime(
    model: onnx.ModelProto, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> list[Array]:
    """Run a model with all graph optimisations off; ``outputs`` may name inner tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {value.name for value in copy.graph.output}
    for name in outputs or ():
        if name not in present:
            copy.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[Array] = session.run(None if outputs is None else list(outputs), dict(feeds))
    return results


def codes_of(values: Array, quantization: TensorQuantization) -> Array:
    """Codes of dequantized values: onnxruntime hands out no codes below 8 bits."""
    steps: Array = np.rint(values.astype(np.float64) / np.float32(quantization.scale))
    return np.asarray(steps.astype(np.int64) + quantization.zero_point)


@dataclass
class Tally:
    """Counts equal codes over many cases, up to 8 bits (False) and with 16-bit operands (True).

    Codes at the ends of their type do not count: where they saturate, anything is equal.
    """

    codes: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    differing: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    regions: dict[str, Region] = field(default_factory=dict)

    def add(
        self,
        builder: Builder,
        outputs: Sequence[str],
        feeds: Mapping[str, Array],
        *,
        requantization: RequantizationForm = "float",
    ) -> dict[str, Region]:
        """Run a model in onnxruntime and, on equal input codes, in the reference."""
        model = builder.model(*outputs)
        names = [*(name for name, _ in builder.quantized.values()), *outputs]
        values = dict(zip(names, run_onnxruntime(model, feeds, names), strict=True))
        theirs = {
            codes: codes_of(values[name], q) for codes, (name, q) in builder.quantized.items()
        }
        reference = Reference(load(model), requantization)
        results, ours = reference.run(feeds, given=theirs)
        assert list(ours) == list(theirs)
        for name, codes in ours.items():
            assert codes.shape == theirs[name].shape
            difference = np.abs(codes - theirs[name])
            assert difference.max(initial=0) <= 1, (reference.regions[name], difference.max())
            wide = reference.regions[name].operand_bits > 8
            q = builder.quantized[name][1]
            inside = (theirs[name] > q.code_min) & (theirs[name] < q.code_max) | (difference > 0)
            if reference.regions[name].kind != "quantize":
                self.codes[wide] += int(np.count_nonzero(inside))
                self.differing[wide] += int(np.count_nonzero(difference))
        for name in outputs:
            assert results[name].shape == values[name].shape
            assert results[name].dtype == values[name].dtype
        return reference.regions

    def share(self, wide: bool) -> float:
        """Share of equal codes."""
        return 1.0 - self.differing[wide] / max(self.codes[wide], 1)

    def check(self, *, narrow: int, wide: int) -> None:
        """Compare with the shares that the project promises, and the codes with a least number."""
        assert self.codes[False] >= narrow
        assert self.codes[True] >= wide
        assert self.share(wide=False) >= 0.999, self
        assert self.share(wide=True) >= 0.995, self


def residual_network(generator: np.random.Generator, *, batch_norm: bool = False) -> Builder:
    """A float network on [N, 3, 16, 16]: hard-swish, squeeze and excite, residual addition.

    Its output is ``fc_out``, [N, 10]; the weights are random.
    """
    builder = Builder(opset=21)

    def conv(tensor: str, name: str, shape: tuple[int, ...], **attributes: Any) -> str:
        fan_in = int(np.prod(shape[1:]))
        weights = generator.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)
        bias = generator.normal(0, 0.1, shape[0]).astype(np.float32)
        made = builder.node(
            "Conv",
            tensor,
            builder.constant(weights, f"{name}_w"),
            builder.constant(bias, f"{name}_b"),
            name=name,
            **attributes,
        )
        if not batch_norm:
            return made
        statistics = [generator.uniform(0.5, 1.5, shape[0]).astype(np.float32) for _ in range(4)]
        return builder.node(
            "BatchNormalization",
            made,
            *(builder.constant(array, f"{name}_bn") for array in statistics),
            name=f"{name}_bn",
        )

    x = builder.input("x", ["N", 3, 16, 16])
    x = builder.node("HardSwish", conv(x, "stem", (8, 3, 3, 3), strides=[2, 2], pads=[1] * 4))
    branch = conv(x, "depthwise", (8, 1, 3, 3), pads=[1] * 4, group=8)
    branch = builder.node("Relu", branch)
    squeezed = builder.node("GlobalAveragePool", branch, name="squeeze")
    squeezed = builder.node("Relu", conv(squeezed, "reduce", (4, 8, 1, 1)))
    gate = builder.node("HardSigmoid", conv(squeezed, "expand", (8, 4, 1, 1)))
    branch = builder.node("Mul", branch, gate, name="excite")
    branch = conv(branch, "project", (8, 8, 1, 1))
    x = builder.node("Add", x, branch, name="residual")
    x = builder.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = builder.node("Relu", conv(x, "head", (12, 8, 3, 3)))
    x = builder.node("Flatten", builder.node("GlobalAveragePool", x, name="pool"))
    weights = generator.normal(0, 0.4, (10, 12)).astype(np.float32)
    bias = generator.normal(0, 0.1, 10).astype(np.float32)
    builder.node("Gemm", x, builder.constant(weights), builder.constant(bias), name="fc", transB=1)
    return builder
