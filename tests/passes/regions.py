"""Build a quantized model and compare it with the integer reference, code by code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax

from bitwright import targets
from bitwright.importer import import_model
from bitwright.passes.build import Built, build
from bitwright.passes.registry import parse
from bitwright.quant.load import load
from bitwright.quant.reference import Reference
from bitwright.soft_edge import SoftEdge
from tests.quant.qdq import Array, Builder


def with_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every tensor of codes an output of its own."""
    types = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    known = {value.name: value for value in types}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    stored = {tensor.name for tensor in model.graph.initializer}
    present = {value.name for value in model.graph.output}
    for node in model.graph.node:
        codes = node.output[0]
        if node.op_type == "SoftEdgeEncode":
            (layout,) = [entry.s.decode() for entry in node.attribute if entry.name == "layout"]
            dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(SoftEdge.parse(layout).dtype))
            known[codes] = onnx.helper.make_tensor_value_info(codes, dtype, None)
        computed = node.op_type in ("QuantizeLinear", "SoftEdgeEncode")
        if computed and node.input[0] not in stored and codes not in present:
            result.graph.output.append(known[codes])
    return result


def together(models: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """Make one model of several; the names of model ``i`` start with ``m<i>_``."""
    result = onnx.ModelProto()
    result.CopyFrom(models[0])
    for part in ("node", "initializer", "input", "output"):
        result.graph.ClearField(part)
    for index, model in enumerate(models):
        assert model.opset_import == models[0].opset_import
        graph = onnx.compose.add_prefix(model, f"m{index}_").graph
        for part in ("node", "initializer", "input", "output"):
            getattr(result.graph, part).extend(getattr(graph, part))
    return result


def compiled(model: onnx.ModelProto, isa: str = "", passes: str = "") -> Built:
    """Import and build; any precision goes."""
    named = ["partition-for-target=target:", f"pack-weights=isa:{isa}" if isa else "", passes]
    pipeline = parse(",".join(filter(None, named)))
    return build(import_model(load(model)), targets.get("silago/drra"), pipeline=pipeline)


def execute(built: Built, *inputs: Array, entry: str = "main") -> list[Array]:
    """Run what was built."""
    machine = relax.VirtualMachine(built.executable, tvm.cpu())
    transformed: Any = []
    parameters = dict(built.parameters)
    if entry == "main_link":
        assert built.link is not None
        parameters |= built.link.parameters
    if parameters:
        arrays = [tvm.runtime.tensor(array) for array in parameters.values()]
        transformed = machine[f"{entry}_transform_params"](arrays)
    tensors = [tvm.runtime.tensor(np.array(array, order="C")) for array in inputs]
    result = machine[entry](*tensors, *transformed)
    return [array.numpy() for array in ([result] if hasattr(result, "numpy") else result)]


def check(
    model: onnx.ModelProto, feeds: Mapping[str, Array], *, isa: str = "", built: Built | None = None
) -> Built:
    """Assert that every code equals the reference's, and floats are as near as they have to be.

    Parameters
    ----------
    model, feeds
        A quantized model and its inputs.
    isa
        Instruction set of the kernels; empty for the best of this machine.
    built
        What an earlier call returned for the same model.
    """
    model = with_codes(model)
    loaded = load(model)
    outputs, codes = Reference(loaded).run(feeds)
    built = compiled(model, isa) if built is None else built
    found = execute(built, *(feeds[str(value.name)] for value in loaded.graph.inputs))
    for value, array in zip(model.graph.output, found, strict=True):
        if value.name in codes:
            np.testing.assert_array_equal(array, codes[value.name], value.name)
            continue
        expected = outputs[value.name]
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        if expected.dtype == np.float32:
            np.testing.assert_allclose(array, expected, 1e-4, 1e-6, err_msg=value.name)
        else:
            np.testing.assert_array_equal(array, expected, value.name)
    return built


def check_cases(
    cases: Sequence[tuple[Builder, str, Mapping[str, Array]]], *, isa: str = ""
) -> Built:
    """Compile independent models as one, which saves most of the time, and compare."""
    models = [builder.model(output) for builder, output, _ in cases]
    feeds = {
        f"m{index}_{name}": array
        for index, (_, _, inputs) in enumerate(cases)
        for name, array in inputs.items()
    }
    return check(together(models), feeds, isa=isa)
