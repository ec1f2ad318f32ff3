from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright.errors import ModelError
from bitwright.quant.load import MIN_OPSET, Model, load

Array = npt.NDArray[Any]

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits" / "lenet.onnx"
# The oldest format that each operator set was released with, as old exporters wrote it.
IR_VERSIONS = {7: 3, 9: 4, 10: 5, 11: 6, 13: 7, 17: 8, 18: 8, 21: 10}


def parse(
    body: str,
    *,
    inputs: str = "float[n, 4, 6, 6] x",
    outputs: str = "float[] y",
    opset: int = 21,
    functions: str = "",
    **weights: Any,
) -> onnx.ModelProto:
    """A model in onnx's text form; ``float[]`` is a tensor of unknown rank."""
    domains = f'"" : {opset}' + ', "own" : 1' * bool(functions)
    model = onnx.parser.parse_model(
        f"<ir_version: {IR_VERSIONS[opset]}, opset_import: [{domains}]>\n"
        f"g ({inputs}) => ({outputs}) {{ {body} }}\n{functions}"
    )
    for name, weight in weights.items():
        tensor = numpy_helper.from_array(np.asarray(weight), name)
        model.graph.initializer.append(tensor)
        if model.ir_version < 4:  # then weights had to be inputs too
            model.graph.input.append(
                helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            )
    return model


def run(model: onnx.ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    content = model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, dict(feed))]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check_same(model: onnx.ModelProto, feed: Mapping[str, Array]) -> Model:
    """The loaded model computes what the original does, in onnxruntime."""
    wanted = run(model, feed)
    loaded = load(model)
    for got, expected in zip(run(loaded.to_proto(), feed), wanted, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    return loaded


def names(loaded: Model) -> list[str]:
    return [str(node.name) for node in loaded.graph]


def operators(loaded: Model) -> list[str]:
    return [node.op_type for node in loaded.graph]


# -- structure hash ------------------------------------------------------------------------------


def network() -> onnx.ModelProto:
    """Has what a hash can overlook: a body, an integer that steers a shape, a constant node."""
    return parse(
        """
        [conv] c = Conv <kernel_shape = [3, 3]> (x, w, b)
        [reshape] f = Reshape (c, s)
        [if] i = If (flag) <
          then_branch = t () => (float[n, m] a) { [left] a = Mul (f, k) },
          else_branch = e () => (float[n, m] z) { [right] z = Neg (f) }
        >
        [constant] q = Constant <value = float[1] {0.5}> ()
        [add] y = Add (i, q)
        """,
        inputs="float[n, 4, 6, 6] x, bool flag",
        w=random(2, 4, 3, 3),
        b=random(2),
        s=np.array([-1, 32]),
        k=np.float32(2),
    )


def structure(model: onnx.ModelProto) -> str:
    return load(model).structure_hash


def weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    assert isinstance(found, TensorProto)
    return found


def other_weights(model: onnx.ModelProto) -> None:
    for name in ("w", "b", "k"):
        array = numpy_helper.to_array(weight(model, name)) + 1
        weight(model, name).CopyFrom(numpy_helper.from_array(array, name))
    model.graph.node[3].attribute[0].t.CopyFrom(numpy_helper.from_array(random(1)))


def descriptions(model: onnx.ModelProto) -> None:
    model.doc_string = model.graph.doc_string = "about the model"
    model.producer_name, model.producer_version, model.model_version = "somebody", "2.0", 5
    model.domain = "org.example"
    model.metadata_props.add(key="author", value="somebody")
    model.graph.name = "another"
    for entry in (*model.graph.node, *model.graph.input, *model.graph.initializer):
        entry.doc_string = "about it"
    model.graph.node[0].attribute[0].doc_string = "about it"


def other_order(model: onnx.ModelProto) -> None:
    """What stands in no order: weights, attributes."""
    kept = list(model.graph.initializer)[::-1]
    copies = []
    for tensor in kept:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copies.append(copy)
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
    model.graph.node[0].attribute.append(helper.make_attribute("group", 1))


def other_storage(model: onnx.ModelProto) -> None:
    """Numbers as a list instead of bytes."""
    for name in ("w", "s"):
        tensor = weight(model, name)
        array = numpy_helper.to_array(tensor)
        values = array.reshape(-1).tolist()
        tensor.CopyFrom(helper.make_tensor(name, tensor.data_type, array.shape, values))
        assert not tensor.raw_data


def inferred_shapes(model: onnx.ModelProto) -> None:
    model.graph.value_info.extend(onnx.shape_inference.infer_shapes(model).graph.value_info)
    assert model.graph.value_info


@pytest.mark.parametrize(
    "change",
    [other_weights, descriptions, other_storage, inferred_shapes],
    ids=lambda f: f.__name__,
)
def test_structure_stays(change: Callable[[onnx.ModelProto], None]) -> None:
    model = network()
    change(model)
    assert model != network()
    assert structure(model) == structure(network())


def test_structure_stays_whatever_the_order_of_weights_and_attributes() -> None:
    first, second = network(), network()
    other_order(first)
    second.graph.node[0].attribute.insert(0, helper.make_attribute("group", 1))
    assert first.SerializeToString() != second.SerializeToString()
    assert structure(first) == structure(second)


def test_structure_stays_whatever_the_order_of_the_bytes(tmp_path: Path) -> None:
    """Protobuf allows any order of fields, and that one message is the join of several."""
    model = network()
    parts = []
    for field, value in reversed(model.ListFields()):
        part = onnx.ModelProto()
        if field.is_repeated:
            getattr(part, field.name).extend(value)
        elif field.message_type is not None:
            getattr(part, field.name).CopyFrom(value)
        else:
            setattr(part, field.name, value)
        parts.append(part.SerializeToString())
    path = tmp_path / "model.onnx"
    path.write_bytes(b"".join(parts))
    assert path.read_bytes() != model.SerializeToString()
    assert load(path).structure_hash == structure(model)
    assert load(path).weights_hash == load(model).weights_hash


def test_structure_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(network().SerializeToString())
    code = f"from bitwright.quant.load import load; print(load({str(path)!r}).structure_hash)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == structure(network())


def rename_node(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "first"


def rename_value(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "feature"


def rename_weight(model: onnx.ModelProto) -> None:
    weight(model, "w").name = model.graph.node[0].input[1] = "weights"


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "image"


def rename_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def fix_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def change_steering_integer(model: onnx.ModelProto) -> None:
    weight(model, "s").CopyFrom(numpy_helper.from_array(np.array([-1, 16]), "s"))


def change_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("strides", [2, 2]))


def change_operator(model: onnx.ModelProto) -> None:
    model.graph.node[4].op_type = "Sub"


def swap_operands(model: onnx.ModelProto) -> None:
    node = model.graph.node[4]
    node.input[0], node.input[1] = node.input[1], node.input[0]


def change_body(model: onnx.ModelProto) -> None:
    bodies = {attribute.name: attribute.g for attribute in model.graph.node[2].attribute}
    bodies["else_branch"].node[0].op_type = "Abs"


def change_weight_shape(model: onnx.ModelProto) -> None:
    weight(model, "w").CopyFrom(numpy_helper.from_array(random(4, 4, 3, 3), "w"))
    weight(model, "b").CopyFrom(numpy_helper.from_array(random(4), "b"))


def show_another_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))


def change_operator_set(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 22


@pytest.mark.parametrize(
    "change",
    [
        rename_node,
        rename_value,
        rename_weight,
        rename_input,
        rename_size,
        fix_size,
        change_steering_integer,
        change_attribute,
        change_operator,
        swap_operands,
        change_body,
        change_weight_shape,
        show_another_output,
        change_operator_set,
    ],
    ids=lambda function: function.__name__,
)
def test_structure_differs(change: Callable[[onnx.ModelProto], None]) -> None:
    model = network()
    change(model)
    assert structure(model) != structure(network())


# -- weights hash --------------------------------------------------------------------------------


def one_weight(model: onnx.ModelProto) -> None:
    array = numpy_helper.to_array(weight(model, "w")).copy()
    array.flat[-1] = np.nextafter(array.flat[-1], np.float32(10))
    weight(model, "w").CopyFrom(numpy_helper.from_array(array, "w"))


def constant_node(model: onnx.ModelProto) -> None:
    value = numpy_helper.from_array(np.array([0.25], np.float32))
    model.graph.node[3].attribute[0].t.CopyFrom(value)


def body_weight(model: onnx.ModelProto) -> None:
    graph = model.graph.node[2].attribute[0].g
    graph.initializer.append(numpy_helper.from_array(np.array(7.0), "seven"))


@pytest.mark.parametrize(
    "change", [one_weight, constant_node, body_weight], ids=lambda function: function.__name__
)
def test_weights_hash_differs(change: Callable[[onnx.ModelProto], None]) -> None:
    model = network()
    change(model)
    assert load(model).weights_hash != load(network()).weights_hash


@pytest.mark.parametrize(
    "change", [descriptions, other_storage, rename_input], ids=lambda function: function.__name__
)
def test_weights_hash_stays(change: Callable[[onnx.ModelProto], None]) -> None:
    model = network()
    change(model)
    assert load(model).weights_hash == load(network()).weights_hash


def test_texts_are_hashed_by_value(tmp_path: Path) -> None:
    """An array of texts holds addresses, which are others in every process."""
    path = tmp_path / "model.onnx"
    model = parse(
        "k = Identity (t)  y = Relu (x)", outputs="float[] y, string[] k", t=np.array(["a", "bc"])
    )
    path.write_bytes(model.SerializeToString())
    code = f"from bitwright.quant.load import load; print(load({str(path)!r}).weights_hash)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == load(path).weights_hash
    weight(model, "t").string_data[1] = b"bd"
    assert load(model).weights_hash != load(path).weights_hash


# -- operator sets -------------------------------------------------------------------------------

X = random(2, 4, 6, 6)
CONV: dict[str, Any] = {"w": random(5, 4, 3, 3), "b": random(5, seed=1)}
NORM: dict[str, Any] = {
    "g": random(5, seed=2),
    "h": random(5, seed=3),
    "m": random(5, seed=4),
    "v": np.abs(random(5, seed=5)),
}
NETWORK = (
    "c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w, b)"
    " d = BatchNormalization (c, g, h, m, v)  e = Relu (d)"
    " p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (e)  a = GlobalAveragePool (p)"
    " f = Flatten (a)  l = Gemm <transB = 1> (f, u, t)  y = Softmax (l)"
)
HEAD: dict[str, Any] = {"u": random(3, 5, seed=6), "t": random(3, seed=7)}
TWICE = np.array([1, 1, 2, 2], np.float32)
ODD = np.array([1, 1, 1.5, 2.4], np.float32)
AXES = {"i": np.array([0]), "j": np.array([2])}
RECURRENT: dict[str, Any] = {"w": random(1, 12, 4), "r": random(1, 12, 3)}

# What changed its meaning or its form between operator sets, besides a whole network.
CONVERSIONS: list[tuple[int, str, dict[str, Any]]] = [
    *((opset, NETWORK, {**CONV, **NORM, **HEAD}) for opset in (7, 9, 11, 13, 17)),
    *((opset, "y = Softmax (x)", {}) for opset in (7, 9, 11, 13, 17)),
    *((opset, "y = LogSoftmax <axis = 2> (x)", {}) for opset in (7, 9, 11, 13, 17)),
    *((opset, "y = Dropout (x)", {}) for opset in (7, 9, 11, 13, 17)),
    *((opset, "y = ReduceMean <axes = [2, 3], keepdims = 0> (x)", {}) for opset in (7, 11, 13, 17)),
    *((opset, "y = ReduceMax <axes = [-1]> (x)", {}) for opset in (11, 13, 17)),
    *((opset, "s = Shape (x)  y = Expand (o, s)", {"o": random(4, 1, 1)}) for opset in (9, 13)),
    *(
        (opset, "a, b = Split <axis = 1> (x)  y = Concat <axis = 1> (b, a)", {})
        for opset in (7, 9, 11, 13, 17)
    ),
    *(
        (opset, "a = Unsqueeze <axes = [0]> (x)  b = ReduceSum <axes = [2]> (a)"
         " y = Squeeze <axes = [0]> (b)", {})
        for opset in (7, 9, 11)
    ),
    *(
        (opset, "a = Unsqueeze (x, i)  b = ReduceSum (a, j)  y = Squeeze (b, j)", AXES)
        for opset in (13, 17)
    ),
    *((opset, "y = Clip <min = -0.5, max = 0.5> (x)", {}) for opset in (7, 9, 10)),
    *((opset, "y = Pad <pads = [0, 0, 1, 1, 0, 0, 2, 2]> (x)", {}) for opset in (7, 9)),
    *(
        (opset, "y = Slice <axes = [1, 2], starts = [1, 0], ends = [3, -1]> (x)", {})
        for opset in (7, 9)
    ),
    *((opset, "y, i = TopK <k = 2, axis = 1> (x)", {}) for opset in (7, 9)),
    (7, "y = Upsample <scales = [1.0, 1.0, 2.0, 2.0], mode = \"nearest\"> (x)", {}),
    (7, "y = Upsample <scales = [1.0, 1.0, 2.0, 2.0], mode = \"linear\"> (x)", {}),
    *(
        (opset, f'y = {operator} <mode = "{mode}"> (x, s)', {"s": scales})
        for opset, operator in ((9, "Upsample"), (10, "Resize"))
        for mode in ("nearest", "linear")
        for scales in (TWICE, ODD)
    ),
    (11, 'y = Resize <mode = "linear"> (x, r, s)', {"r": np.zeros(0, np.float32), "s": ODD}),
    (9, "y = Hardmax <axis = -1> (x)", {}),
    (13, "y = Hardmax (x)", {}),
    (10, "s = QuantizeLinear (x, c, z)  y = DequantizeLinear (s, c, z)",
     {"c": np.float32(0.1), "z": np.int8(3)}),
    (7, "y = PRelu (x, s)", {"s": random(4, 1, 1)}),
    (11, "l = Loop (t, c, x) <body = b (int64 i, bool p, float[2, 4, 6, 6] s)"
         " => (bool q, float[2, 4, 6, 6] o) { q = Identity (p)  u = Unsqueeze <axes = [0]> (s)"
         " r = ReduceSum <axes = [0], keepdims = 0> (u)  o = Softmax (r) }> y = Identity (l)",
     {"t": np.array(2), "c": np.array(True)}),
]  # fmt: skip


@pytest.mark.parametrize(
    "opset, body, weights", CONVERSIONS, ids=[f"{c[0]}-{c[1][:30]}" for c in CONVERSIONS]
)
def test_raising_the_operator_set_keeps_the_outputs(
    opset: int, body: str, weights: dict[str, Any]
) -> None:
    loaded = check_same(parse(body, opset=opset, **weights), {"x": X})
    assert loaded.opset == MIN_OPSET == 21


@pytest.mark.parametrize("flag", [False, True])
def test_bodies_are_raised_too(flag: bool) -> None:
    model = parse(
        "h = Identity (x)  y = If (f) <"
        "then_branch = a () => (float[] t) { t = Squeeze <axes = [0]> (h) },"
        "else_branch = b () => (float[] e) { s = ReduceSum <axes = [0], keepdims = 0> (h)"
        " e = Softmax (s) }>",
        inputs="float[1, 4, 6, 6] x, bool f",
        opset=11,
    )
    check_same(model, {"x": X[:1], "f": np.array(flag)})


@pytest.mark.parametrize("opset", [7, 13])
def test_recurrent_layers_are_raised(opset: int) -> None:
    model = parse(
        "y, h = LSTM <hidden_size = 3> (x, w, r)",
        inputs="float[5, n, 4] x",
        opset=opset,
        **RECURRENT,
    )
    check_same(model, {"x": random(5, 2, 4)})


@pytest.mark.parametrize(
    "opset, body",
    [
        (9, "y = Hardmax (x)"),
        (8, "y = Scan <num_scan_inputs = 1, body = b (float[4] s) => (float[4] o)"
            " { o = Relu (s) }> (, x)"),
    ],
)  # fmt: skip
def test_what_the_converter_would_change_is_refused(opset: int, body: str) -> None:
    model = parse(body.replace("(, x)", '("", x)'), opset=9)
    model.opset_import[0].version = opset
    with pytest.raises(ModelError, match="cannot be raised from operator set") as caught:
        load(model)
    assert "operator set 21" in str(caught.value)


def test_a_newer_operator_set_stays() -> None:
    model = parse("y = Relu (x)", opset=21)
    model.opset_import[0].version = 22
    assert load(model).opset == 22


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_both_names_of_the_standard_domain(domain: str) -> None:
    model = parse("y = Relu (x)", opset=13)
    model.opset_import[0].domain = model.graph.node[0].domain = domain
    loaded = load(model)
    assert loaded.opset == 21
    assert loaded.graph[0].domain == ""


# -- functions -----------------------------------------------------------------------------------

FUNCTIONS = """
<domain: "own", opset_import: ["" : 21, "own" : 1]>
twice <factor: float = 2.0> (a) => (d) {
  f = Constant <value_float: float = @factor> ()
  m = Mul (a, f)
  d = own.activated (m)
}
<domain: "own", opset_import: ["" : 21]>
activated (a) => (c) { c = Sigmoid (a) }
"""


def test_functions_are_inlined() -> None:
    model = parse(
        "a = own.twice (x)  b = own.twice <factor = 3.0> (a)  y = own.activated (b)",
        functions=FUNCTIONS,
    )
    loaded = check_same(model, {"x": X})
    assert not loaded.ir.functions
    assert operators(loaded).count("Sigmoid") == 3
    assert {node.domain for node in loaded.graph} == {""}
    assert len(set(names(loaded))) == len(names(loaded))


def test_functions_in_bodies_are_inlined() -> None:
    model = parse(
        "y = If (f) <then_branch = a () => (float[] t) { t = own.twice (x) },"
        " else_branch = b () => (float[] e) { e = own.activated (x) }>",
        inputs="float[n, 4, 6, 6] x, bool f",
        functions=FUNCTIONS,
    )
    for flag in (True, False):
        loaded = check_same(model, {"x": X, "f": np.array(flag)})
        assert not loaded.ir.functions


def test_operators_in_functions_are_named_after_what_they_compute() -> None:
    """Not node_2, node_3, ...: those would change with every other call."""
    loaded = load(parse("a = own.activated (x)  y = own.activated (a)", functions=FUNCTIONS))
    assert all(name.startswith("Sigmoid_c") for name in names(loaded))


def test_function_of_another_operator_set() -> None:
    model = parse("y = own.activated (x)", functions=FUNCTIONS)
    model.functions[1].opset_import[0].version = 13
    with pytest.raises(ModelError):
        load(model)


# -- names ---------------------------------------------------------------------------------------


def test_nameless_operators_are_named_after_what_they_compute() -> None:
    model = parse("c = Conv (x, w)  r = Relu (c)  y = Neg (r)", w=random(2, 4, 3, 3))
    assert names(load(model)) == ["Conv_c", "Relu_r", "Neg_y"]


def test_names_that_are_there_stay() -> None:
    model = parse("c = Conv (x, w)  [r] y = Relu (c)", w=random(2, 4, 3, 3))
    model.graph.node[0].name = "/features/my layer.0"
    assert names(load(model)) == ["/features/my layer.0", "r"]


def test_edits_elsewhere_keep_the_names() -> None:
    before = load(parse("c = Conv (x, w)  y = Relu (c)", w=random(2, 4, 3, 3)))
    after = load(parse("n = Neg (x)  c = Conv (n, w)  y = Relu (c)", w=random(2, 4, 3, 3)))
    assert set(names(before)) < set(names(after))


def test_names_that_stand_twice_become_different() -> None:
    model = parse("[n] a = Relu (x)  [n] b = Neg (a)  [n] y = Abs (b)")
    found = names(load(model))
    assert found[0] == "n"
    assert len(set(found)) == 3
    assert found == names(load(model))


def test_a_name_may_already_be_taken() -> None:
    model = parse("[Neg_y] a = Relu (x)  y = Neg (a)")
    found = names(load(model))
    assert found[0] == "Neg_y"
    assert len(set(found)) == 2


# -- inputs, constants, sizes --------------------------------------------------------------------


def test_weights_that_are_inputs_too_are_constants() -> None:
    model = parse("y = Conv (x, w)", opset=7, w=random(2, 4, 3, 3))
    assert [value.name for value in model.graph.input] == ["x", "w"]
    loaded = check_same(model, {"x": X})
    assert [entry.name for entry in loaded.inputs] == ["x"]
    assert loaded.notes == ()  # before IR version 4 there was no other way
    model = parse("y = Conv (x, w)", opset=17, w=random(2, 4, 3, 3))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 4, 3, 3]))
    loaded = load(model)
    assert [entry.name for entry in loaded.inputs] == ["x"]
    assert loaded.notes == ("1 inputs with default values are taken as constants",)


def test_expressions_of_constants_are_worked_out() -> None:
    model = parse(
        "t = Transpose <perm = [1, 0]> (w)  c = Constant <value = float {2.0}> ()"
        " h = Mul (t, c)  s = Shape (w)  f = Flatten (x)  m = MatMul (f, h)  z = Cast <to = 1> (s)"
        " r = ReduceSum (z)  y = Add (m, r)",
        w=random(3, 144),
    )
    loaded = check_same(model, {"x": X})
    assert operators(loaded) == ["Flatten", "MatMul", "ReduceSum", "Add"]
    product = loaded.graph[1]
    assert product.inputs[1] is not None
    assert product.inputs[1].const_value is not None
    np.testing.assert_array_equal(
        product.inputs[1].const_value.numpy(),
        2 * numpy_helper.to_array(model.graph.initializer[0]).T,
    )


BRANCHES = {
    "computes": ("m = MatMul(x, v) t = Relu(m)", "m = Neg(x) t = Abs(m)"),
    "hands out a value of the graph around": ("t = Identity(x)", "t = Neg(x)"),
    "hands out a constant": ("t = Constant <value = float[1, 4] {1, 2, 3, 4}> ()", "t = Neg(x)"),
    "holds a branch": (
        "c = Constant <value = bool {0}> () t = If (c) <then_branch = a () => (float[] p)"
        " { p = Exp(x) }, else_branch = b () => (float[] q) { m = MatMul(x, v) q = Tanh(m) }>",
        "t = Neg(x)",
    ),
}


def branches(then: str, otherwise: str, condition: str) -> onnx.ModelProto:
    return parse(
        f"r = Sigmoid(x) {condition} y = If (flag) <then_branch = first () => (float[] t)"
        f" {{ {then} }}, else_branch = second () => (float[] e) {{ {otherwise} }}> z = Add(r, y)",
        inputs="float[n, 4] x, float[2, k] state",
        outputs="float[n, 4] y, float[n, 4] z",
        v=random(4, 4),
        given=np.array(True),
        axis=np.array(0),
        two=np.array(2),
    )


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("known", [True, False])
def test_a_branch_that_is_known_stands_in_the_graph(name: str, known: bool) -> None:
    then, otherwise = BRANCHES[name]
    flag = "flag = Identity(given)" if known else "flag = Not(given)"
    model = branches(then, otherwise.replace("t =", "e ="), flag)
    loaded = load(model)
    assert not any(node.op_type == "If" for node in loaded.graph)
    feed = {"x": random(3, 4, seed=1), "state": random(2, 5)}
    for ours, theirs in zip(run(loaded.to_proto(), feed), run(model, feed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert [value.name for value in loaded.outputs] == ["y", "z"]


@pytest.mark.parametrize(
    "condition, known",
    [
        ("s = Shape(state) d = Gather(s, axis) flag = Equal(d, two)", True),
        ("s = Shape(state) d = Size(s) flag = Less(two, d)", True),
        ("s = Shape(x) d = Gather(s, axis) flag = Equal(d, two)", False),  # n is symbolic
    ],
)
def test_conditions_of_sizes(condition: str, known: bool) -> None:
    model = branches("t = Relu(x)", "e = Neg(x)", f"{condition} other = Not(given)")
    loaded = load(model)
    feed = {"x": random(2, 4, seed=1), "state": random(2, 5)}
    for ours, theirs in zip(run(loaded.to_proto(), feed), run(model, feed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert any(node.op_type == "If" for node in loaded.graph) is not known


def test_constant_outputs_stay_outputs() -> None:
    model = parse("k = Neg (c)  y = Relu (x)", outputs="float[] y, float[] k", c=random(3))
    loaded = check_same(model, {"x": X})
    assert [value.name for value in loaded.outputs] == ["y", "k"]


def test_quantized_weights_stay_quantized() -> None:
    model = parse(
        "d = DequantizeLinear (q, s)  y = Conv (x, d)",
        q=np.ones((2, 4, 3, 3), np.int8),
        s=np.float32(0.1),
    )
    assert operators(check_same(model, {"x": X})) == ["DequantizeLinear", "Conv"]


def test_symbolic_sizes_stay_and_reach_the_outputs() -> None:
    model = parse(
        "y = Conv <pads = [1, 1, 1, 1]> (x, w)",
        inputs="float[batch, 4, height, width] x",
        w=random(2, 4, 3, 3),
    )
    loaded = load(model)
    assert loaded.inputs[0].shape == ("batch", 4, "height", "width")
    output = loaded.outputs[0].shape
    assert output is not None
    assert output[:2] == ("batch", 2)
    shaped = loaded.with_input_shapes({"x": [3, 4, 8, 9]})
    assert shaped.outputs[0].shape == (3, 2, 8, 9)
    assert loaded.inputs[0].shape == ("batch", 4, "height", "width")
    assert loaded.outputs[0].shape == output
    assert load(model, input_shapes={"x": [3, 4, 8, 9]}).outputs[0].shape == (3, 2, 8, 9)


def test_minus_one_is_a_free_size() -> None:
    model = parse("y = Relu (x)", inputs="float[2, 4, 6, 6] x")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    shape = load(model).inputs[0].shape
    assert shape is not None
    assert isinstance(shape[0], str)
    assert shape[1:] == (4, 6, 6)


@pytest.mark.parametrize("known", [True, False])
def test_inputs_and_outputs_of_unknown_rank(known: bool) -> None:
    """Many exporters leave them out; onnx's checker wants them."""
    model = parse("y = Relu (x)", inputs="float[n, 4] x" if known else "float[] x")
    loaded = load(model)
    assert loaded.inputs[0].shape == (("n", 4) if known else None)
    assert loaded.outputs[0].shape == (("n", 4) if known else None)
    assert not model.graph.output[0].type.tensor_type.HasField("shape")


def test_a_model_in_memory_is_not_changed() -> None:
    for model in (network(), parse(NETWORK, opset=7, **CONV, **NORM, **HEAD)):
        before = model.SerializeToString(deterministic=True)
        load(model)
        assert model.SerializeToString(deterministic=True) == before


def test_real_file() -> None:
    loaded = load(LENET)
    assert loaded.source == str(LENET)
    assert loaded.notes == ()
    assert not loaded.is_quantized
    x = {"image": random(3, 1, 28, 28)}
    np.testing.assert_array_equal(run(loaded.to_proto(), x)[0], run(onnx.load(LENET), x)[0])


# -- onnx's own models ---------------------------------------------------------------------------

ONNX_DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
CONVERTED = sorted(path.parent for path in ONNX_DATA.glob("pytorch-*/*/model.onnx"))


def tensors(folder: Path, kind: str) -> list[Array]:
    found = []
    for index in range(len(list(folder.glob(f"{kind}_*.pb")))):
        content = (folder / f"{kind}_{index}.pb").read_bytes()
        found.append(numpy_helper.to_array(TensorProto.FromString(content)))
    return found


def compare_with_expected(folders: Sequence[Path]) -> int:
    """Run onnx's test models after loading; return how many onnxruntime could run."""
    compared = 0
    for folder in folders:
        model = onnx.load(folder / "model.onnx")
        data = folder / "test_data_set_0"
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = [value.name for value in model.graph.input if value.name not in weights]
        feed = dict(zip(inputs, tensors(data, "input"), strict=True))
        try:
            run(model, feed)
        except Exception:  # some of these models are older than onnxruntime supports
            continue
        got = run(load(model).to_proto(), feed)
        for output, expected in zip(got, tensors(data, "output"), strict=True):
            np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-5, err_msg=str(folder))
        compared += 1
    return compared


def test_models_of_onnx_give_the_outputs_stored_beside_them() -> None:
    assert len(CONVERTED) > 80
    assert compare_with_expected(CONVERTED) > 80
