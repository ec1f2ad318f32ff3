from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.backend.test.case.node.gru
import onnx.backend.test.case.node.lstm
import onnx.backend.test.case.node.rnn
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from bitwright.errors import ModelError
from bitwright.quant.recurrent import decompose

Array = npt.NDArray[Any]
Feed = dict[str, Array]

OPERATORS = ("LSTM", "GRU", "RNN")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FUNCTIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}  # activation functions of a direction
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
ACTIVATIONS = (
    "Relu Tanh Sigmoid Affine LeakyRelu ThresholdedRelu ScaledTanh HardSigmoid Elu Softsign"
    " Softplus"
).split()


def run(model: onnx.ModelProto, feed: Feed) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(output) for output in session.run(None, feed)]


def info(name: str, array: Array, shape: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape)


def make_model(
    operator: str,
    values: Feed,
    *,
    inputs: Sequence[str] = ("X",),
    outputs: Sequence[str] = ("Y", "Y_h", "Y_c"),
    symbols: dict[int, str] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """One node named ``cell``; what is not among the inputs is an initializer.

    ``symbols`` are the axes of X whose size the model does not say.
    """
    names = [name if name in values else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    outputs = [*outputs][: 3 if operator == "LSTM" else 2]
    shapes: dict[str, list[Any]] = {name: list(array.shape) for name, array in values.items()}
    for axis, symbol in (symbols or {}).items():
        shapes["X"][axis] = symbol
    graph = helper.make_graph(
        [helper.make_node(operator, names, outputs, name="cell", **attributes)],
        "g",
        [info(name, values[name], shapes[name]) for name in inputs],
        [info(name, values["X"], [None] * (3 + (name == "Y"))) for name in outputs if name],
        [
            numpy_helper.from_array(array, name)
            for name, array in values.items()
            if name not in inputs
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def graphs_of(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    found = [proto.graph]
    for graph in found:
        for node in graph.node:
            found.extend(entry.g for entry in node.attribute if entry.HasField("g"))
    return found


def decomposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after the pass; it is valid, its shapes can be inferred, its names are unique."""
    loaded = ir.from_proto(model)
    assert decompose(loaded, "file.onnx")
    assert not decompose(loaded, "file.onnx")
    proto = ir.to_proto(loaded)
    onnx.checker.check_model(proto)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    graphs = graphs_of(proto)
    nodes = [node for graph in graphs for node in graph.node]
    assert not {node.op_type for node in nodes} & set(OPERATORS)
    names = [value.name for graph in graphs for value in (*graph.initializer, *graph.input)]
    names.extend(name for node in nodes for name in node.output if name)
    assert len(names) == len(set(names))
    assert len({node.name for node in nodes}) == len(nodes)
    used = {name for node in nodes for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= used
    assert [value.name for value in proto.graph.output] == [v.name for v in model.graph.output]
    return proto


def check_equal(got: Sequence[Array], expected: Sequence[Array], atol: float = 1e-6) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=atol)


def draw_values(
    operator: str,
    *,
    names: Sequence[str] = (),
    directions: int = 1,
    steps: int = 3,
    batch: int = 2,
    features: int = 3,
    hidden: int = 4,
    seed: int = 0,
) -> Feed:
    """X, W, R and the named inputs, in layout 0."""
    rows = GATES[operator] * hidden
    shapes = {
        "X": (steps, batch, features),
        "W": (directions, rows, features),
        "R": (directions, rows, hidden),
        "B": (directions, 2 * rows),
        "initial_h": (directions, batch, hidden),
        "initial_c": (directions, batch, hidden),
        "P": (directions, 3 * hidden),
    }
    generator = np.random.default_rng(seed)
    values: Feed = {
        name: (0.7 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
        if name in ("X", "W", "R", *names)
    }
    if "sequence_lens" in names:
        values["sequence_lens"] = generator.integers(0, steps + 1, batch).astype(np.int32)
    return values


# -- the cases of the standard -------------------------------------------------------------------

# The package makes them while these three modules are imported; its public collector would make
# those of all operators, which takes a quarter of a minute and warns.
CASES = {
    case.name: case
    for case in onnx.backend.test.case.node._NodeTestCases
    if case.model.graph.node[0].op_type in OPERATORS
}


def test_the_standard_has_cases_of_all_three() -> None:
    assert len(CASES) == 18


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "computed"])
@pytest.mark.parametrize("name", CASES)
def test_cases_of_the_standard(name: str, constant: bool) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(CASES[name].model)
    model.graph.node[0].name = "cell"
    feed = {}
    ((inputs, expected),) = CASES[name].data_sets
    for value, array in zip(list(model.graph.input), inputs, strict=True):
        if constant and value.name != "X":
            model.graph.initializer.append(numpy_helper.from_array(array, value.name))
            model.graph.input.remove(value)
        else:
            feed[value.name] = array
    for got, wanted in zip(run(decomposed(model), feed), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-7)  # of the standard's runner


# -- random options, against onnxruntime ---------------------------------------------------------


@dataclass(frozen=True)
class Case:
    operator: str
    direction: str
    layout: int
    given: frozenset[str]
    computed: bool  # weights are inputs
    wanted: tuple[bool, ...]
    static: tuple[bool, bool]
    steps: int
    batch: int
    features: int
    hidden: int
    attributes: dict[str, Any]
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    operator = draw(st.sampled_from(OPERATORS))
    direction = draw(st.sampled_from(sorted(DIRECTIONS)))
    optional = {"B", "sequence_lens", "initial_h"}
    attributes: dict[str, Any] = {}
    if operator == "LSTM":
        optional |= {"initial_c", "P"}
        attributes["input_forget"] = draw(st.sampled_from([0, 0, 1]))
    if operator == "GRU":
        attributes["linear_before_reset"] = draw(st.sampled_from([0, 1]))
    if draw(st.booleans()):
        attributes["clip"] = draw(st.sampled_from([0.05, 0.3, 1.0]))
    if draw(st.booleans()):
        count = FUNCTIONS[operator] * DIRECTIONS[direction]
        names = st.lists(st.sampled_from(ACTIVATIONS), min_size=count, max_size=count)
        attributes["activations"] = draw(names)
        # onnxruntime takes 0 for parameters of these that are left out, the standard does not.
        full = bool({"Affine", "ScaledTanh", "ThresholdedRelu"} & set(attributes["activations"]))
        numbers = st.lists(
            st.sampled_from([0.25, 0.5, 0.75, 1.25]), min_size=count if full else 1, max_size=count
        )
        for name in ("activation_alpha", "activation_beta"):
            if full or draw(st.booleans()):
                attributes[name] = draw(numbers)
    outputs = 3 if operator == "LSTM" else 2
    wanted = draw(st.lists(st.booleans(), min_size=outputs, max_size=outputs).filter(any))
    return Case(
        operator=operator,
        direction=direction,
        layout=draw(st.sampled_from([0, 1])),
        given=frozenset(draw(st.sets(st.sampled_from(sorted(optional))))),
        computed=draw(st.booleans()),
        wanted=tuple(wanted),
        static=draw(st.tuples(st.booleans(), st.booleans())),
        steps=draw(st.integers(1, 5)),
        batch=draw(st.integers(1, 3)),
        features=draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 4)),
        attributes=attributes,
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_equals_onnxruntime(case: Case) -> None:
    values = draw_values(
        case.operator,
        names=sorted(case.given),
        directions=DIRECTIONS[case.direction],
        steps=case.steps,
        batch=case.batch,
        features=case.features,
        hidden=case.hidden,
        seed=case.seed,
    )
    options: dict[str, Any] = {
        "inputs": [name for name in values if case.computed or name not in ("W", "R", "B", "P")],
        "outputs": [
            name if used else ""
            for name, used in zip(("Y", "Y_h", "Y_c"), (*case.wanted, False), strict=False)
        ],
        "direction": case.direction,
        **case.attributes,
    }
    original = make_model(case.operator, values, **options, hidden_size=case.hidden)
    expected = run(original, {name: values[name] for name in options["inputs"]})

    # onnxruntime computes Softplus as log(1 + exp(x)), which is coarse for small numbers and
    # infinite for large ones.
    soft = "Softplus" in case.attributes.get("activations", ())
    assume(not soft or all(np.all(np.abs(array) < 20) for array in expected))

    time, batch = (1, 0) if case.layout else (0, 1)
    symbols = {
        axis: symbol
        for axis, symbol, static in zip((time, batch), "tb", case.static, strict=True)
        if not static
    }
    if case.layout:
        turned = {"X", "initial_h", "initial_c"} & set(values)
        values |= {name: values[name].swapaxes(0, 1) for name in turned}
        options["layout"] = 1
    mine = decomposed(make_model(case.operator, values, symbols=symbols, **options))
    got = run(mine, {name: values[name] for name in options["inputs"]})
    if case.layout:
        got = [y.transpose(1, 2, 0, 3) if y.ndim == 4 else y.swapaxes(0, 1) for y in got]
    check_equal(got, expected, 1e-5 if soft else 1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_constant_lengths_and_states(operator: str, direction: str) -> None:
    names = ["B", "sequence_lens", "initial_h"] + ["initial_c"] * (operator == "LSTM")
    values = draw_values(operator, names=names, directions=DIRECTIONS[direction], steps=4, batch=3)
    values["sequence_lens"] = np.array([4, 0, 2], np.int32)
    for symbols in ({}, {0: "t", 1: "b"}):
        model = make_model(operator, values, symbols=symbols, direction=direction, hidden_size=4)
        feed = {"X": values["X"]}
        check_equal(run(decomposed(model), feed), run(model, feed))


def test_the_state_of_an_empty_sequence_is_zero() -> None:
    values = draw_values("LSTM", names=["sequence_lens", "initial_h", "initial_c"])
    values["sequence_lens"] = np.array([0, 3], np.int32)
    y, h, c = run(decomposed(make_model("LSTM", values)), {"X": values["X"]})
    assert not y[:, :, 0].any()
    assert not h[:, 0].any()
    assert not c[:, 0].any()
    assert y[:, :, 1].all()


def test_lengths_that_cut_nothing_off_cost_nothing() -> None:
    values = draw_values("GRU", names=["sequence_lens"])
    values["sequence_lens"] = np.array([3, 3], np.int32)
    model = decomposed(make_model("GRU", values, direction="reverse"))
    operators = {node.op_type for graph in graphs_of(model) for node in graph.node}
    assert not operators & {"Where", "Less", "ReverseSequence"}


def test_thresholded_relu_has_the_threshold_of_the_operator() -> None:
    values = {
        "X": np.array([0.5, 0.99, 1.01, 2.0], np.float32).reshape(4, 1, 1),
        "W": np.ones((1, 1, 1), np.float32),
        "R": np.zeros((1, 1, 1), np.float32),
    }
    model = decomposed(make_model("RNN", values, activations=["ThresholdedRelu"]))
    assert run(model, {"X": values["X"]})[0].ravel().tolist() == [0, 0, np.float32(1.01), 2]


def test_names_of_activations_in_any_case() -> None:
    values = draw_values("GRU")
    feed = {"X": values["X"]}
    model = make_model("GRU", values, activations=["HARDSIGMOID", "softSign"], hidden_size=4)
    check_equal(run(decomposed(model), feed), run(model, feed))


def test_rnn_takes_the_two_activations_of_its_schema_in_one_direction() -> None:
    values = draw_values("RNN")
    feed = {"X": values["X"]}
    model = make_model("RNN", values, activations=["Tanh", "Tanh"], hidden_size=4)
    check_equal(run(decomposed(model), feed), run(model, feed))


@pytest.mark.parametrize("operator", OPERATORS)
def test_double_precision(operator: str) -> None:
    # onnxruntime has no such LSTM, GRU or RNN; the result must be that of float32, but closer.
    single = draw_values(operator, names=["B", "initial_h"])
    double = {name: array.astype(np.float64) for name, array in single.items()}
    attributes: dict[str, Any] = {"clip": 0.8, "direction": "reverse"}
    expected = run(decomposed(make_model(operator, single, **attributes)), {"X": single["X"]})
    got = run(decomposed(make_model(operator, double, **attributes)), {"X": double["X"]})
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# -- form of the result --------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_product_with_constant_weights_outside_of_the_steps(
    operator: str, direction: str
) -> None:
    directions = DIRECTIONS[direction]
    values = draw_values(operator, names=["B"], directions=directions)
    model = decomposed(make_model(operator, values, direction=direction))
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    (product,) = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert product.name == "cell/input"
    assert weights[product.input[1]] == [3, directions * GATES[operator] * 4]

    (scan,) = [node for node in model.graph.node if node.op_type == "Scan"]
    assert scan.name == "cell/scan"
    body = graphs_of(model)[1]
    assert not body.initializer
    inside = {node.name: node for node in body.node if node.op_type == "MatMul"}
    assert set(inside) == {"cell/recurrent"} | (
        {"cell/recurrent_candidate"} if operator == "GRU" else set()
    )
    columns = 0
    for node in inside.values():
        assert weights[node.input[1]][:2] == [directions, 4]
        columns += weights[node.input[1]][2]
    assert columns == GATES[operator] * 4
    assert all(node.name.startswith("cell/") for graph in graphs_of(model) for node in graph.node)


def test_a_gru_that_resets_late_has_one_product_a_step() -> None:
    model = decomposed(make_model("GRU", draw_values("GRU"), linear_before_reset=1))
    body = graphs_of(model)[1]
    assert [node.name for node in body.node if node.op_type == "MatMul"] == ["cell/recurrent"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_size_and_names_do_not_depend_on_the_steps(operator: str) -> None:
    found = []
    for steps in (1, 2, 500):
        values = draw_values(operator, names=["B", "initial_h"], steps=steps)
        model = decomposed(make_model(operator, values, direction="reverse"))
        found.append([(n.op_type, n.name) for graph in graphs_of(model) for n in graph.node])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("lengths", [False, True])
def test_shapes_are_inferred_and_keep_their_symbols(
    operator: str, direction: str, lengths: bool
) -> None:
    directions = DIRECTIONS[direction]
    values = draw_values(operator, names=["sequence_lens"] * lengths, directions=directions)
    inputs = ["X"] + ["sequence_lens"] * lengths
    model = decomposed(
        make_model(operator, values, inputs=inputs, symbols={0: "t", 1: "b"}, direction=direction)
    )
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = [
        [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.output
    ]
    batch = 2 if lengths else "b"  # the lengths say it
    assert shapes[0] == ["t", directions, batch, 4]
    assert all(shape == [directions, batch, 4] for shape in shapes[1:])
    for node in model.graph.node:
        for attribute in node.attribute:
            for value in attribute.g.value_info:
                assert len(value.type.tensor_type.shape.dim) == 3 or "constant" in value.name


NESTED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[t, b, 3] x, bool yes, int64 count) => (float[t, 1, b, 3] y, float[t, b, 3] z) {
    [branch] y = If (yes) <
        then_branch = one () => (float[t, 1, b, 3] y1) {
            [lstm] y1, h1 = LSTM <hidden_size = 3> (x, w4, r4, b4)
        },
        else_branch = two () => (float[t, 1, b, 3] y2) {
            [gru] y2 = GRU <hidden_size = 3, direction = "reverse"> (x, w3, r3)
        }
    >
    [loop] z = Loop (count, yes, x) <
        body = step (int64 i, bool go, float[t, b, 3] s) => (bool next, float[t, b, 3] s2) {
            [next] next = Identity (go)
            [rnn] y3 = RNN <hidden_size = 3> (s, w1, r1)
            [squeeze] s2 = Squeeze (y3, axis)
        }
    >
}
"""


def test_nodes_in_bodies() -> None:
    model = onnx.parser.parse_model(NESTED)
    generator = np.random.default_rng(0)
    weights: Feed = {
        f"{letter}{gates}": generator.standard_normal((1, gates * 3, 3)).astype(np.float32)
        for letter in "wr"
        for gates in (1, 3, 4)
    }
    weights["b4"] = generator.standard_normal((1, 24)).astype(np.float32)
    weights["axis"] = np.array([1])
    own = {"w3": 1}  # this one lies in the body
    for name, array in weights.items():
        holder = graphs_of(model)[1 + own[name]] if name in own else model.graph
        holder.initializer.append(numpy_helper.from_array(array, name))
    result = decomposed(model)
    # Weights are all in the main graph, and what is not used any more is gone.
    for graph in graphs_of(result)[1:]:
        assert all(tensor.data_type == onnx.TensorProto.INT64 for tensor in graph.initializer)
    assert not {"w1", "w3", "w4", "r1", "r3", "r4", "b4"} & {
        tensor.name for graph in graphs_of(result) for tensor in graph.initializer
    }
    x = generator.standard_normal((4, 2, 3)).astype(np.float32)
    for yes in (True, False):
        feed = {"x": x, "yes": np.array(yes), "count": np.array(3)}
        check_equal(run(result, feed), run(model, feed))


def two_cells(*names: str) -> onnx.ModelProto:
    """Two nodes that share their weights, one behind the other."""
    values = draw_values("RNN", features=4)
    model = make_model("RNN", values, outputs=["Y"], hidden_size=4)
    first = model.graph.node[0]
    del model.graph.node[:]
    first.output[:] = ["A"]
    squeeze = helper.make_node("Squeeze", ["A", "axis"], [names[0]], name="squeeze")
    second = helper.make_node(
        "RNN", [names[0], "W", "R"], ["Y", names[1]], name="second", hidden_size=4
    )
    last = helper.make_node("Relu", ["Y"], ["Z"], name=names[2])
    model.graph.node.extend([first, squeeze, second, last])
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.output.append(info("Z", values["X"], [None] * 4))
    return model


def test_names_that_are_taken_and_weights_that_are_shared() -> None:
    model = two_cells("cell/input", "cell/scan", "second/recurrent")
    result = decomposed(model)
    assert not {"W", "R"} & {tensor.name for tensor in result.graph.initializer}
    feed = {"X": draw_values("RNN", features=4)["X"]}
    check_equal(run(result, feed), run(model, feed))


def test_a_weight_that_others_read_stays() -> None:
    model = two_cells("between", "", "relu")
    model.graph.node.append(helper.make_node("Relu", ["W"], ["V"], name="reader"))
    model.graph.output.append(info("V", np.zeros(0, np.float32), [None] * 3))
    assert "W" in {tensor.name for tensor in decomposed(model).graph.initializer}


def test_an_input_of_unknown_shape() -> None:
    values = draw_values("LSTM", directions=2)
    model = make_model("LSTM", values, direction="bidirectional", hidden_size=4)
    node = helper.make_node("Reshape", ["X", "shape"], ["X2"], name="reshape")
    model.graph.node[0].input[0] = "X2"
    model.graph.node.insert(0, node)
    feed = {"X": values["X"], "shape": np.array([3, 2, 3])}
    model.graph.input.append(info("shape", feed["shape"], [3]))
    check_equal(run(decomposed(model), feed), run(model, feed))


def test_a_model_without_recurrent_nodes_is_left_alone() -> None:
    model = two_cells("between", "", "relu")
    del model.graph.node[0], model.graph.node[1]
    loaded = ir.from_proto(model)
    before = ir.to_proto(loaded)
    assert not decompose(loaded, "file.onnx")
    assert ir.to_proto(loaded) == before


# -- refusals ------------------------------------------------------------------------------------


def shaped(operator: str, **shapes: tuple[int, ...]) -> Feed:
    """The usual values, some with another shape."""
    values = draw_values(operator, names=[name for name in shapes if name in INPUTS])
    values |= {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if "sequence_lens" in values:
        values["sequence_lens"] = values["sequence_lens"].astype(np.int32)
    return values


@pytest.mark.parametrize(
    "operator, shapes, attributes, message",
    [
        ("LSTM", {}, {"activations": ["Sigmoid", "Tanx", "Tanh"]}, "unknown activation 'Tanx'"),
        ("LSTM", {}, {"activations": ["Sigmoid", "Tanh"]}, "2 activations, expected 3"),
        ("GRU", {}, {"activations": ["Tanh"] * 4}, "4 activations, expected 2"),
        ("RNN", {}, {"activations": ["Affine"]}, "Affine without activation_alpha"),
        (
            "RNN",
            {},
            {"activations": ["ScaledTanh"], "activation_alpha": [0.5]},
            "ScaledTanh without activation_beta",
        ),
        ("RNN", {}, {"direction": "Forward"}, "unknown direction 'Forward'"),
        ("RNN", {}, {"layout": 2}, "unknown layout 2"),
        ("GRU", {}, {"clip": 0.0}, "clips at 0"),
        ("GRU", {}, {"clip": float("nan")}, "clips at nan"),
        ("RNN", {}, {"hidden_size": 0}, "hidden size of 0"),
        ("LSTM", {"W": (1, 12, 3)}, {}, r"W ('W') of shape [1, 12, 3], expected [1, 16, 3]"),
        ("LSTM", {"W": (1, 16, 5)}, {}, r"X ('X') of shape [3, 2, 3], expected [3, 2, 5]"),
        ("LSTM", {"R": (1, 16, 3)}, {"hidden_size": 4}, "R ('R') of shape [1, 16, 3]"),
        ("LSTM", {"R": (16, 4)}, {"hidden_size": 4}, "[16, 4], expected [1, 16, 4]"),
        ("LSTM", {"R": (16, 4)}, {}, "does not say its hidden size"),
        ("GRU", {}, {"hidden_size": 5}, "W ('W') of shape [1, 12, 3], expected [1, 15, 3]"),
        ("GRU", {}, {"direction": "bidirectional"}, "W ('W') of shape [1, 12, 3], expected [2,"),
        ("GRU", {"B": (1, 12)}, {}, "B ('B') of shape [1, 12], expected [1, 24]"),
        ("LSTM", {"P": (1, 16)}, {}, "P ('P') of shape [1, 16], expected [1, 12]"),
        ("RNN", {"initial_h": (1, 3, 4)}, {}, "initial_h ('initial_h') of shape [1, 3, 4]"),
        ("RNN", {"initial_h": (1, 2, 4)}, {"layout": 1}, "expected [3, 1, 4]"),
        ("LSTM", {"initial_c": (2, 4)}, {}, "[2, 4], expected [1, 2, 4]"),
        ("RNN", {"X": (3, 2)}, {}, "X ('X') of shape [3, 2], expected [?, ?, 3]"),
        ("RNN", {"X": (0, 2, 3)}, {}, "an empty input X ('X') of shape [0, 2, 3]"),
        ("RNN", {"X": (3, 0, 3)}, {}, "an empty input X ('X') of shape [3, 0, 3]"),
        ("RNN", {"sequence_lens": (3,)}, {}, "sequence_lens ('sequence_lens') of shape [3]"),
    ],
)
def test_refused(
    operator: str, shapes: dict[str, tuple[int, ...]], attributes: dict[str, Any], message: str
) -> None:
    model = ir.from_proto(make_model(operator, shaped(operator, **shapes), **attributes))
    with pytest.raises(ModelError) as caught:
        decompose(model, "file.onnx")
    assert f"file.onnx: {operator} 'cell' " in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    "lengths, symbols, message",
    [
        ([-1, 2], {}, "sequence length of -1, which is negative"),
        ([-1, 2], {0: "t"}, "sequence length of -1, which is negative"),
        ([1, 4], {}, "sequence length of 4, but its input has 3 steps"),
    ],
)
def test_lengths_that_cannot_be_are_refused(
    lengths: list[int], symbols: dict[int, str], message: str
) -> None:
    values = {**draw_values("GRU"), "sequence_lens": np.array(lengths, np.int32)}
    model = ir.from_proto(make_model("GRU", values, symbols=symbols))
    with pytest.raises(ModelError, match=message):
        decompose(model, "file.onnx")
