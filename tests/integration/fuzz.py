"""Mutate real ONNX files and watch what the program makes of them; ``test_fuzz.py`` runs it.

By hand, with a working folder of your choice::

    python -m tests.integration.fuzz FOLDER --seed 1 --cases 1000
    python -m tests.integration.fuzz FOLDER --seed 1 --only 77   # one case again; its file stays

A case depends on the seed, its number and the corpus only. Nothing runs in parallel, so that a
crash, a hang and the memory belong to the last case announced.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

import bitwright
from benchmarks.memory_probe import peak_bytes
from bitwright.cli import main as bitwright_main

CASE_SECONDS = 20
MEMORY_BYTES = 3 << 30  # above what the program needs to start

ROOT = Path(__file__).resolve().parents[2]
LENET = ROOT / "examples" / "lenet_digits" / "lenet.onnx"
ONNX_DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
LARGEST = 100_000  # bytes of a corpus file, LeNet aside: larger ones only make cases slow

# -- corpus --------------------------------------------------------------------------------------

# Nested control flow, a function in a function, a sequence; the sizes keep Conv and Gemm layers.
CONTROL_FLOW = """
<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
control_flow (float[batch, 4] x, bool flag) => (float[batch, 4] y, float[scan, 4] z)
<float[4, 4] w = {1,2,3,4, 5,6,7,8, 9,10,11,12, 13,14,15,16}, float[4] b = {1,2,3,4},
 int64 trips = {3}, bool on = {1}>
{
  h = Gemm <transB = 1> (x, w, b)
  s = own.twice (h)
  c = If (flag) <
    then_branch = then_graph () => (float[batch, 4] t) {
      t0 = MatMul (s, w)
      t = If (flag) <
        then_branch = inner_then () => (float[batch, 4] t1) { t1 = Relu (t0) },
        else_branch = inner_else () => (float[batch, 4] t2) { t2 = Neg (t0) }
      >
    },
    else_branch = else_graph () => (float[batch, 4] e) { e = Sigmoid (s) }
  >
  l = Loop (trips, on, c) <
    body = loop_body (int64 i, bool on_in, float[batch, 4] carried)
      => (bool on_out, float[batch, 4] next) {
      on_out = Identity (on_in)
      next = MatMul (carried, w)
    }
  >
  last, z = Scan <num_scan_inputs = 1, body = scan_body (float[4] state, float[4] row)
      => (float[4] new_state, float[4] out) {
      new_state = Add (state, row)
      out = Identity (new_state)
    }> (b, l)
  y = Add (l, last)
}
<domain: "own", opset_import: ["" : 21, "own" : 1]>
twice (a) => (d) { o = own.plus (a, a)  d = Tanh (o) }
<domain: "own", opset_import: ["" : 21]>
plus (a, b) => (c) { c = Add (a, b) }
"""

CONVOLUTIONS = """
<ir_version: 8, opset_import: ["" : 14]>
convolutions (float[1, 2, 6, 6] x) => (float[1, 3] y)
<float[4, 2, 3, 3] w1, float[4] b1, float[4] gamma, float[4] beta, float[4] mean, float[4] variance,
 float[4, 1, 3, 3] w2, float[4, 3] w3, int64[2] shape = {-1, 4}, int64[2] half = {1, 1}>
{
  c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
  d = BatchNormalization (c, gamma, beta, mean, variance)
  e = Relu (d)
  f = Conv <kernel_shape = [3, 3], group = 4, strides = [2, 2]> (e, w2)
  g = HardSwish (f)
  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (e)
  q = AveragePool <kernel_shape = [2, 2]> (p)
  r = Add (g, q)
  a = GlobalAveragePool (r)
  v = Reshape (a, shape)
  t = Concat <axis = 0> (v, v)
  u, s = Split <axis = 0> (t, half)
  y = MatMul (u, w3)
}
"""


def corpus(folder: Path, *, everything: bool) -> dict[str, bytes]:
    """Name to content of the files to mutate; ``everything`` adds onnx's 1,900 operator models."""
    files = {"lenet": LENET.read_bytes()}
    quantized = folder / "lenet.w4a8.onnx"
    if not quantized.exists():
        calibration = {"image": np.random.default_rng(0).random((4, 1, 28, 28), np.float32)}
        bitwright.quantize(LENET, calibration=calibration, precision="w4a8", output=quantized)
    files["lenet.w4a8"] = quantized.read_bytes()
    generator = np.random.default_rng(0)
    for name, text in (("control_flow", CONTROL_FLOW), ("convolutions", CONVOLUTIONS)):
        model = onnx.parser.parse_model(text)
        for entry in model.graph.value_info:  # declared without a value: random weights
            dims = [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
            weights = generator.random(dims, np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weights, entry.name))
        del model.graph.value_info[:]
        onnx.checker.check_model(model, full_check=True)
        files[name] = model.SerializeToString()
    for path in sorted(ONNX_DATA.rglob("*.onnx")):
        # The light models make real weights when they run, SqueezeNet 5 MB, others up to 500.
        heavy = path.parent.name == "light" and not (everything and "squeezenet" in path.name)
        if path.stat().st_size <= LARGEST and not heavy:
            files[str(path.relative_to(ONNX_DATA))] = path.read_bytes()
    if everything:
        from onnx.backend.test.case.node import collect_testcases

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own examples divide by zero
            for case in collect_testcases(None):
                if case.model is not None and case.model.ByteSize() <= LARGEST:
                    files[f"node/{case.name}"] = case.model.SerializeToString()
    return files


def samples_for(content: bytes) -> dict[str, npt.NDArray[Any]] | None:
    """Arrays that fit the inputs of an unharmed model; None where there can be none."""
    proto = onnx.ModelProto.FromString(content)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = [entry for entry in proto.graph.input if entry.name not in initializers]
    first = [[d.dim_value for d in entry.type.tensor_type.shape.dim[:1]] for entry in inputs]
    batched = first.count(first[0]) == len(first) if first and first[0] else False
    generator = np.random.default_rng(0)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for entry in inputs:
        if not entry.type.HasField("tensor_type"):
            return None
        dims = [dim.dim_value or 3 for dim in entry.type.tensor_type.shape.dim]
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
        except (KeyError, TypeError):
            return None
        if dtype.kind not in "fiub" or np.prod(dims) > 1e6:
            return None
        # Batches where all inputs have one, else one complete input after the other.
        values = generator.standard_normal([2 * dims[0], *dims[1:]] if batched else [3, *dims])
        arrays[entry.name] = (np.abs(values) if dtype.kind in "ub" else values).astype(dtype)
    return arrays or None


# -- mutations -----------------------------------------------------------------------------------

INTEGERS = (
    -(2**63),
    -(2**31),
    -7,
    -2,
    -1,
    0,
    1,
    2,
    3,
    4,
    17,
    1000,
    2**31 - 1,
    2**31,
    2**40,
    2**63 - 1,
)
FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 1e-3, 3e38, -1.0, 5.0)
OPERATORS = tuple(sorted({schema.name for schema in onnx.defs.get_all_schemas_with_history()}))
UNARY = tuple(
    "Identity Relu Neg Sigmoid HardSwish Abs Sqrt Exp Tanh Cast Transpose Flatten Squeeze Softmax"
    " GlobalAveragePool ReduceMean ReduceMax Shape Not DynamicQuantizeLinear Dropout Floor".split()
)
BINARY = tuple("Add Sub Mul Div Max Min Pow MatMul Gemm Conv PRelu Reshape Expand Tile Mod".split())
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft", "own", "é")
MAX_MESSAGES = 20_000


def messages(message: Any) -> Iterator[Any]:
    """A message and all messages inside."""
    pending, count = [message], 0
    while pending and count < MAX_MESSAGES:
        current = pending.pop()
        count += 1
        yield current
        for field, value in current.ListFields():
            if field.message_type is not None:
                pending.extend(value if field.is_repeated else [value])


def of_type(proto: onnx.ModelProto, kind: Any) -> list[Any]:
    return [message for message in messages(proto) if isinstance(message, kind)]


def a_name(rng: random.Random, proto: onnx.ModelProto) -> str:
    """A name used in the model, mostly; else a strange one."""
    if rng.random() < 0.15:
        return rng.choice(["", "new", "x" * 300, "[red]ü\n\x00'", "../../x", "-1", "{}%s"])
    names: list[str] = [
        name for node in of_type(proto, onnx.NodeProto) for name in (*node.input, *node.output)
    ]
    names += [value.name for value in of_type(proto, onnx.ValueInfoProto)]
    names += [tensor.name for tensor in of_type(proto, onnx.TensorProto)]
    return rng.choice(names or [""])


def a_node(rng: random.Random, proto: onnx.ModelProto) -> tuple[Any, int] | None:
    """Something that holds nodes, and the index of one of them."""
    holders = [
        message
        for message in messages(proto)
        if isinstance(message, onnx.GraphProto | onnx.FunctionProto) and message.node
    ]
    if not holders:
        return None
    holder = rng.choice(holders)
    return holder.node, rng.randrange(len(holder.node))


def damage(rng: random.Random, content: bytes) -> bytes:
    """Change some bytes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        if not data:
            break
        start = rng.randrange(len(data))
        # Names and structure stand around the weights: half of the hits go to the two ends.
        if rng.random() < 0.5:
            start = rng.randrange(min(len(data), 600))
            start = start if rng.random() < 0.5 else len(data) - 1 - start
        length = rng.choice([1, 1, 2, 8, 64])
        match rng.randrange(6):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            case 2:
                data[start:start] = rng.randbytes(length)
            case 3:
                del data[start : start + length]
            case 4:
                data[start:start] = data[start : start + length]
            case 5 if rng.random() < 0.2:
                del data[start:]
            case _:
                data[start : start + length] = rng.choice([b"\0", b"\xff"]) * length
    return bytes(data)


def any_field(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Set, clear, repeat or drop any field of any message."""
    message = rng.choice(list(messages(proto)))
    field = rng.choice(message.DESCRIPTOR.fields)
    if rng.random() < 0.7 and message.ListFields():  # what is there says more than what is not
        field = rng.choice(message.ListFields())[0]
    if field.is_repeated:
        entries = getattr(message, field.name)
        match rng.randrange(5):
            case 0 if entries:
                del entries[rng.randrange(len(entries))]
            case 1 if len(entries) > 1:
                kept = list(entries)
                rng.shuffle(kept)
                kept = [_copy(entry) for entry in kept]
                del entries[:]
                entries.extend(kept)
            case 2 if entries:
                entries.extend([_copy(rng.choice(entries))])
            case 3 if entries and field.message_type is None:
                entries[rng.randrange(len(entries))] = _scalar(rng, field, proto)
            case _:
                if field.message_type is None:
                    entries.extend([_scalar(rng, field, proto)] * rng.choice([1, 1, 2, 9]))
                else:
                    entries.add()
    elif field.message_type is not None:
        if rng.random() < 0.5:
            message.ClearField(field.name)
        else:
            donors = [m for m in messages(proto) if m.DESCRIPTOR is field.message_type]
            donor = _copy(rng.choice(donors)) if donors else None
            getattr(message, field.name).SetInParent()
            if donor is not None and donor.ByteSize() < LARGEST:
                getattr(message, field.name).CopyFrom(donor)
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(rng, field, proto))


def _copy(value: Any) -> Any:
    if not hasattr(value, "CopyFrom"):
        return value
    other = type(value)()
    other.CopyFrom(value)
    return other


def _scalar(rng: random.Random, field: Any, proto: onnx.ModelProto) -> Any:
    if field.enum_type is not None:
        return rng.choice(field.enum_type.values).number
    match field.cpp_type:
        case field.CPPTYPE_INT32:
            return rng.choice([n for n in (*INTEGERS, *range(30)) if -(2**31) <= n < 2**31])
        case field.CPPTYPE_INT64:
            return rng.choice(INTEGERS)
        case field.CPPTYPE_UINT64:
            return abs(rng.choice(INTEGERS))
        case field.CPPTYPE_FLOAT | field.CPPTYPE_DOUBLE:
            return rng.choice(FLOATS)
        case _:
            text = rng.choice([a_name(rng, proto), rng.choice(OPERATORS), rng.choice(DOMAINS)])
            if field.type != field.TYPE_BYTES:
                return text
            return rng.choice([text.encode(), rng.randbytes(rng.choice([1, 4, 16, 100])), b"\xff"])


def shapes(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Change a size, the rank or the element type of a declared value."""
    types = of_type(proto, onnx.TypeProto.Tensor)
    if not types:
        return
    kind = rng.choice(types)
    match rng.randrange(6):
        case 0:
            kind.elem_type = rng.randrange(-1, 30)
        case 1:
            kind.ClearField("shape")
        case 2 if kind.shape.dim:
            del kind.shape.dim[rng.randrange(len(kind.shape.dim))]
        case 3:
            kind.shape.dim.add().dim_value = rng.choice(INTEGERS)
        case 4 if kind.shape.dim:
            rng.choice(kind.shape.dim).dim_param = rng.choice(["n", "", "batch", "1", "\n"])
        case _ if kind.shape.dim:
            rng.choice(kind.shape.dim).dim_value = rng.choice(INTEGERS)


def nodes(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Drop, repeat, move, rename or rewire a node, or give it another operator."""
    found = a_node(rng, proto)
    if found is None:
        return
    entries, index = found
    node = entries[index]
    match rng.randrange(12):
        case 0:
            del entries[index]
        case 1:
            entries.extend([_copy(node)])
        case 2:
            entries.insert(rng.randrange(len(entries)), _copy(node))
            del entries[index]
        case 3 | 4:
            node.op_type = rng.choice(OPERATORS)
        case 5:
            node.op_type = rng.choice(entries).op_type
        case 6:
            node.name = a_name(rng, proto)
        case 7:
            node.domain = rng.choice(DOMAINS)
        case 8 if node.output:  # a later value as input: a cycle
            node.input.append(rng.choice(rng.choice(entries).output or [""]))
        case 9 if node.input:
            del node.input[rng.randrange(len(node.input))]
        case 10 if node.output:
            node.output[rng.randrange(len(node.output))] = a_name(rng, proto)
        case _ if node.input:
            node.input[rng.randrange(len(node.input))] = a_name(rng, proto)


def attributes(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Change an attribute, move it to another node, or nest the graph in itself."""
    found = of_type(proto, onnx.AttributeProto)
    node = a_node(rng, proto)
    if not found or node is None:
        return
    attribute = rng.choice(found)
    match rng.randrange(9):
        case 0:
            attribute.i = rng.choice(INTEGERS)
        case 1 if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
        case 2 if attribute.ints:
            del attribute.ints[rng.randrange(len(attribute.ints))]
        case 3:
            attribute.ints.append(rng.choice(INTEGERS))
        case 4:
            attribute.f = rng.choice(FLOATS)
        case 5:
            attribute.s = rng.choice(
                [b"", b"SAME_UPPER", b"VALID", b"\xff\xfe", b"linear", b"x" * 999]
            )
        case 6:
            attribute.type = rng.choice(onnx.AttributeProto.AttributeType.values())
        case 7:
            node[0][node[1]].attribute.append(_copy(attribute))
        case _:
            if proto.ByteSize() < LARGEST:
                graph = _copy(proto.graph)
                node[0][node[1]].attribute.add(name="body", g=graph, type=onnx.AttributeProto.GRAPH)


def tensors(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Change sizes, type or values of a stored tensor."""
    found = of_type(proto, onnx.TensorProto)
    if not found:
        return
    tensor = rng.choice(found)
    match rng.randrange(9):
        case 0 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
        case 1:
            tensor.dims.append(rng.choice(INTEGERS))
        case 2 if tensor.dims:
            del tensor.dims[rng.randrange(len(tensor.dims))]
        case 3:
            tensor.data_type = rng.randrange(-1, 30)
        case 4:
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        case 5:
            tensor.name = a_name(rng, proto)
        case 6:
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", rng.choice(["x.bin", "../x", "", "/dev/zero", "."])
            tensor.data_location = onnx.TensorProto.EXTERNAL
        case _ if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64):
            if tensor.raw_data and tensor.data_type == onnx.TensorProto.FLOAT:
                values = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 4 * 4], np.float32)
                values = values.copy()
                values[rng.randrange(values.size) :] = rng.choice(FLOATS)
                tensor.raw_data = values.tobytes()
            elif tensor.raw_data:
                values = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 8 * 8], np.int64)
                values = values.copy()
                values[rng.randrange(values.size)] = rng.choice(INTEGERS)
                tensor.raw_data = values.tobytes()
            elif tensor.int64_data:
                tensor.int64_data[0] = rng.choice(INTEGERS)


def versions(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Change the versions of format and operator sets."""
    match rng.randrange(4):
        case 0:
            proto.ir_version = rng.choice([*INTEGERS, *range(1, 16)])
        case 1:
            entry = proto.opset_import.add()
            entry.domain, entry.version = (
                rng.choice(DOMAINS),
                rng.choice([*INTEGERS, *range(1, 30)]),
            )
        case 2 if proto.opset_import:
            del proto.opset_import[rng.randrange(len(proto.opset_import))]
        case _ if proto.opset_import:
            rng.choice(proto.opset_import).version = rng.choice([0, -1, 2**31, *range(1, 30)])


def graph_entries(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Drop, repeat, rename or swap inputs, outputs and initializers, or call a function anew."""
    graph = rng.choice(of_type(proto, onnx.GraphProto) or [proto.graph])
    entries = rng.choice([graph.input, graph.output, graph.initializer, graph.value_info])
    if proto.functions and rng.random() < 0.2:
        caller, callee = rng.choice(proto.functions), rng.choice(proto.functions)
        node = caller.node.add(op_type=callee.name, domain=callee.domain)
        node.input.extend(caller.input[:1] * len(callee.input))
        node.output.extend(f"again_{i}" for i in range(len(callee.output)))
        return
    if not entries:
        graph.output.add(name=a_name(rng, proto))
        return
    index = rng.randrange(len(entries))
    match rng.randrange(4):
        case 0:
            del entries[index]
        case 1:
            entries.extend([_copy(entries[index])])
        case 2:
            entries[index].name = a_name(rng, proto)
        case _:
            other = rng.randrange(len(entries))
            entries[index].name, entries[other].name = entries[other].name, entries[index].name


def edges(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Put an operator on an edge: most models stay valid, and odd ones come about."""
    found = a_node(rng, proto)
    if found is None or not found[0][found[1]].input:
        return
    entries, index = found
    node = _copy(entries[index])
    port = rng.randrange(len(node.input))
    name = f"edge_{rng.randrange(10**6)}"
    inserted = onnx.helper.make_node(rng.choice(UNARY), [node.input[port]], [name])
    if inserted.op_type == "Cast":
        inserted.attribute.add(name="to", type=onnx.AttributeProto.INT, i=rng.randrange(1, 17))
    node.input[port] = name
    if rng.random() < 0.3:
        node.input[0], node.input[-1] = node.input[-1], node.input[0]
    del entries[index]
    entries.insert(index, inserted)
    entries.insert(index + 1, node)


def operators(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Exchange an operator for one of the same inputs, without attributes."""
    found = a_node(rng, proto)
    if found is not None:
        node = found[0][found[1]]
        node.op_type = rng.choice({1: UNARY, 2: BINARY}.get(len(node.input), ("Sum", "Max")))
        del node.attribute[:]


def numbers(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Change weights to values that are legal and unusual, or an attribute by one."""
    chosen = rng.choice(of_type(proto, onnx.TensorProto | onnx.AttributeProto) or [None])
    if isinstance(chosen, onnx.TensorProto) and chosen.data_type in (1, 7) and chosen.raw_data:
        try:
            array = onnx.numpy_helper.to_array(chosen)
        except ValueError:  # the size was changed before
            return
        factor = rng.choice([0, -1, 2, 1e-30, 1e30, 1e-6, 3e38])
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (array * array.dtype.type(min(factor, 2**62))).astype(array.dtype)
        scaled = scaled if rng.random() < 0.5 else np.roll(array, 1)
        if rng.random() < 0.2:
            scaled = np.full_like(array, rng.choice([0, 1, -1, 2**31 - 1]))
        chosen.CopyFrom(onnx.numpy_helper.from_array(scaled, chosen.name))
    elif isinstance(chosen, onnx.AttributeProto) and chosen.ints:
        chosen.ints[rng.randrange(len(chosen.ints))] += rng.choice([-2, -1, 1, 2])
    elif isinstance(chosen, onnx.AttributeProto) and chosen.HasField("i"):
        chosen.i += rng.choice([-1, 1, 2])
    elif isinstance(chosen, onnx.AttributeProto) and chosen.HasField("f"):
        chosen.f = rng.choice(FLOATS)


def borders(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Show an inner value as output, free a size, or move a weight between its three homes."""
    graph = proto.graph
    match rng.randrange(4):
        case 0:
            for kind in [value.type.tensor_type for value in (*graph.input, *graph.output)]:
                if kind.shape.dim:
                    kind.shape.dim[0].dim_param = "batch"
        case 1 if graph.node:
            names = [name for node in graph.node for name in node.output]
            graph.output.add(name=rng.choice(names or [""]))
        case 2 if graph.initializer:
            tensor = rng.choice(graph.initializer)
            shape = list(tensor.dims)
            kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type or 1, shape)
            graph.input.append(kind)
        case _ if graph.initializer:
            tensor = _copy(rng.choice(graph.initializer))
            kept = [_copy(entry) for entry in graph.initializer if entry.name != tensor.name]
            del graph.initializer[:]
            graph.initializer.extend(kept)
            graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))


Mutation = Callable[[random.Random, onnx.ModelProto], None]
GENTLE: tuple[Mutation, ...] = (edges, edges, operators, numbers, numbers, borders)
HARSH: tuple[Mutation, ...] = (
    any_field, any_field, shapes, nodes, nodes, attributes, tensors, versions, graph_entries,
)  # fmt: skip


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Return another model: changed gently or harshly in its structure, or in its bytes."""
    kind = rng.random()
    if kind < 0.1:
        return damage(rng, content)
    proto = onnx.ModelProto.FromString(content)
    for _ in range(rng.choice([1, 1, 2, 3]) if kind < 0.7 else 0):
        rng.choice(GENTLE)(rng, proto)
    for _ in range(rng.choice([1, 1, 1, 2, 4]) if kind > 0.6 else 0):
        rng.choice(HARSH)(rng, proto)
    return bytes(proto.SerializeToString())


# -- campaign ------------------------------------------------------------------------------------


class Hang(BaseException):
    """A case took too long; no ``except Exception`` may hide it."""


def _alarm(*_: object) -> None:
    raise Hang


def call(arguments: Iterable[str | Path]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it wrote to stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = bitwright_main([str(argument) for argument in arguments])
    return code, errors.getvalue()


def complaint(code: int, errors: str) -> str | None:
    """What is wrong with the answer of a command, None if nothing is."""
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in errors or "Warning" in errors or "internal error" in errors:
        return "traceback, warning or internal error"
    if code == 0:
        return "message without an error" if errors else None
    if not errors.startswith("error: "):
        return "no error message"
    if errors.count("\n") > 3 or len(errors) > 3000:
        return "message too long"
    return None


def run_case(
    seed: int, number: int, files: Mapping[str, bytes], folder: Path
) -> tuple[str, list[int], str | None]:
    """Run one case; return the corpus file, the exit codes and what went wrong, if anything."""
    rng = random.Random(f"{seed}/{number}")
    names = list(files)
    # Half of the cases take one of the first four, which have layers; the rest covers operators.
    name = rng.choice(names[:4] if rng.random() < 0.5 else names)
    model, samples, output = folder / "case.onnx", folder / "case.npz", folder / "case.q.onnx"
    for stale in (samples, output):
        stale.unlink(missing_ok=True)
    model.write_bytes(mutate(rng, files[name]))
    before = set(folder.iterdir())
    codes: list[int] = []
    call_errors: list[str] = []

    def step(*arguments: str | Path) -> str | None:
        code, errors = call(arguments)
        codes.append(code)
        call_errors.append(errors)
        trouble = complaint(code, errors)
        if trouble is None and arguments[0] == "quantize" and (code == 0) != output.exists():
            trouble = f"exit code {code}, and the output exists: {output.exists()}"
        return None if trouble is None else f"{arguments[0]}: {trouble}\n{errors}"

    trouble = step("inspect", model)
    arrays = samples_for(files[name])
    if trouble is None and codes[0] == 0 and arrays is not None:
        np.savez(samples, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
        if rng.random() < 0.05:
            samples.write_bytes(damage(rng, samples.read_bytes()))
        precision = rng.choice(["w8a8", "w4a8", "w2a16", "w16a2"])
        clip = rng.choice(["mmse", "minmax", "percentile"])
        options = ("--precision", precision, "--clip", clip)
        trouble = step("quantize", model, "--calibration", samples, "-o", output, *options)
        runnable = output if output.exists() else model
        against = ("--metric", "mse", "--against", model)
        if trouble is None:
            engine = ("--engine", "reference")
            trouble = step("evaluate", runnable, "--data", samples, *engine, *against)
            if trouble is None and output.exists() and codes[-1] and "NaN" not in call_errors[-1]:
                # Then the float model should fail as well: a body that no sample can run, say.
                code, _ = call(["evaluate", model, "--data", samples, *against])
                if code == 0:
                    trouble = f"what quantize wrote cannot be evaluated\n{call_errors[-1]}"
    left = set(folder.iterdir()) - before - {samples, output}
    if trouble is None and left:
        trouble = f"left behind: {sorted(path.name for path in left)}"
    return name, codes, trouble


def main() -> int:
    """Run a campaign; print its totals as JSON, and every failure with the command to replay it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--everything", action="store_true", help="mutate operator models too")
    options = parser.parse_args()
    warnings.simplefilter("always")  # they go to stderr, where the campaign sees them
    options.folder.mkdir(parents=True, exist_ok=True)
    files = corpus(options.folder, everything=options.everything)
    call(["inspect", LENET])  # what loading the libraries takes does not count
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _alarm)
    # Which case it was must be known even if the process dies.
    announcement = options.folder / "running.txt"
    totals: Counter[str] = Counter()
    slowest = (0.0, -1)
    failures = 0
    started = time.perf_counter()
    only = options.only
    for number in range(options.cases) if only is None else [only]:
        replay = f"--seed {options.seed} --only {number}" + " --everything" * options.everything
        announcement.write_text(f"python -m tests.integration.fuzz {options.folder} {replay}\n")
        # Python's alarm cannot stop a library that does not return; this ends the process.
        faulthandler.dump_traceback_later(2 * CASE_SECONDS, exit=True)
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        start = time.perf_counter()
        try:
            name, codes, trouble = run_case(options.seed, number, files, options.folder)
        except Hang:
            name, codes, trouble = "?", [], f"still running after {CASE_SECONDS} s"
        except Exception as error:
            name, codes, trouble = "?", [], f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, (time.perf_counter() - start, number))
        for command, code in zip(("inspect", "quantize", "evaluate"), codes, strict=False):
            totals[f"{command} {code}"] += 1
        if trouble is not None:
            failures += 1
            replay_line = announcement.read_text()
            sys.stdout.write(f"FAILED on {name}: {trouble}\n  replay: {replay_line}\n")
            sys.stdout.flush()
    faulthandler.cancel_dump_traceback_later()
    announcement.unlink()
    summary = {
        "cases": sum(count for key, count in totals.items() if key.startswith("inspect")),
        "failures": failures,
        "codes": dict(sorted(totals.items())),
        "slowest": slowest,
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
    }
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
