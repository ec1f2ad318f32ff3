"""Loops over time, from a model to numbers: every result is onnxruntime's.

The bodies of most models are texts (``onnx.parser``); ``kernels`` and ``recursions`` count what
became of the loops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node.gru
import onnx.backend.test.case.node.loop
import onnx.backend.test.case.node.lstm
import onnx.backend.test.case.node.rnn
import onnx.backend.test.case.node.scan
import onnx.parser
import onnxruntime as ort
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from tvm import relax

from benchmarks import recurrent_models
from bitwright import targets
from bitwright.errors import ModelError
from bitwright.importer import import_model
from bitwright.passes.build import build
from bitwright.passes.expressions import calls, operator
from bitwright.passes.lower_scan import LowerScan
from bitwright.passes.ops import SCAN
from bitwright.passes.recognize_scan import COMPOSITES
from bitwright.quant.load import load
from tests.passes.modules import transform
from tests.quant.qdq import Array, profile
from tests.quant.test_recurrent import DIRECTIONS, OPERATORS, draw_values, make_model

Feed = Mapping[str, Array]

ACCELERATOR = targets.get("silago/drra")


class Compiled:
    """A model on the whole path."""

    def __init__(self, model: onnx.ModelProto) -> None:
        module = import_model(load(model))
        lowered = transform(module, LowerScan())
        functions = [f for f in lowered.functions.values() if isinstance(f, relax.Function)]
        attributes = [function.attrs or {} for function in functions]
        self.kernels = sum(attrs.get("Composite") in COMPOSITES for attrs in attributes)
        self.recursions = sum(
            operator(call) == SCAN for function in functions for call in calls(function)
        )
        built = build(module, ACCELERATOR)
        machine = relax.VirtualMachine(built.executable, tvm.cpu())
        parameters = [tvm.runtime.tensor(array) for array in built.parameters.values()]
        self._rest = list(machine["main_transform_params"](parameters)) if parameters else []
        self._main = machine["main"]

    def __call__(self, feed: Feed) -> list[Array]:
        """The outputs."""
        inputs = [tvm.runtime.tensor(np.array(array, order="C")) for array in feed.values()]
        result = self._main(*inputs, *self._rest)
        entries = [result] if hasattr(result, "numpy") else result
        return [np.asarray(entry.numpy()) for entry in entries]


def by_onnxruntime(model: onnx.ModelProto, feed: Feed, *, optimized: bool = True) -> list[Array]:
    options = ort.SessionOptions()
    if not optimized:  # it rounds codes in other ways
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(output) for output in session.run(None, dict(feed))]


def assert_same(got: Sequence[Array], expected: Sequence[Array], atol: float = 1e-6) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=atol)


def check(model: onnx.ModelProto, *feeds: Feed, atol: float = 1e-6) -> Compiled:
    compiled = Compiled(model)
    for feed in feeds:
        assert_same(compiled(feed), by_onnxruntime(model, feed), atol)
    return compiled


def parsed(text: str) -> onnx.ModelProto:
    """A model of a text, which begins with the graph."""
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + text)
    onnx.checker.check_model(model)
    return model


def normal(*shape: int, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return np.asarray(values, np.float32)


# -- codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "bits, state, zero_point, bidirectional",
    [
        (8, "int8", 0, False),
        (4, "uint8", 100, True),
        (2, "int16", -70, False),
        (16, "int16", 0, True),
        (8, "uint16", 40_000, True),
    ],
)
def test_quantized_cells_are_kernels(
    operator: str, bits: int, state: str, zero_point: int, bidirectional: bool
) -> None:
    model = recurrent_models.gated(operator, 5, 19, bidirectional=bidirectional)
    model = recurrent_models.quantized(model, weight_bits=bits, state=state, zero_point=zero_point)
    compiled = Compiled(model)
    assert (compiled.kernels, compiled.recursions) == (1, 0)
    step = 2 / (np.iinfo(state).max - np.iinfo(state).min)
    for batch in (1, 3, 13):
        feed = recurrent_models.noise(model, time=7, batch=batch)
        (ours,) = compiled(feed)
        (theirs,) = by_onnxruntime(model, feed, optimized=False)
        # Float gates differ in their last bits, and thus few codes of the state by one.
        difference = np.abs(ours - theirs)
        assert difference.max() < 8 * step
        assert np.median(difference) < 1e-6 + step / 50


# -- the cases of the standard -------------------------------------------------------------------

CASES = {
    case.name: case
    for case in onnx.backend.test.case.node._NodeTestCases
    if case.model.graph.node[0].op_type in (*OPERATORS, "Loop", "Scan")
}
REFUSED = {
    "test_loop13_seq": "SequenceInsert",
    "test_loop16_seq_none": "optional",
    "test_scan_sum": "Scan",
}


def test_the_standard_has_cases_of_all() -> None:
    assert len(CASES) == 18 + 7
    assert CASES.keys() >= REFUSED.keys()


@pytest.mark.parametrize("name", sorted(CASES.keys() - REFUSED.keys()))
def test_cases_of_the_standard(name: str) -> None:
    compiled = Compiled(CASES[name].model)
    for inputs, outputs in CASES[name].data_sets:
        names = [value.name for value in CASES[name].model.graph.input]
        results = compiled(dict(zip(names, inputs, strict=True)))
        # The standard's own runner allows a relative error of 1e-3.
        for ours, theirs in zip(results, outputs, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, np.shape(theirs))
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_tensor_and_old_scans_are_refused_by_name(name: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(CASES[name].model)
    for node in model.graph.node:
        node.name = "cell"
    with pytest.raises(ModelError) as caught:
        import_model(load(model))
    assert REFUSED[name] in str(caught.value)


# -- scans ---------------------------------------------------------------------------------------


def scan(
    body: str,
    *,
    inputs: str = "float[3, 9] s0, float[T, 3, 9] x",
    outputs: str = "float[3, 9] s1, float[T, 3, 9] y",
    given: str = "s0, x",
    sequences: int = 1,
    constants: str = "",
    before: str = "",
    attributes: str = "",
) -> onnx.ModelProto:
    """A model with one scan, named ``loop``; of one state and sequence if not told otherwise."""
    if not body.startswith("("):
        body = f"(float[3, 9] s, float[3, 9] e) => (float[3, 9] t, float[3, 9] o) {{ {body} }}"
    names = re.findall(r"(\w+)(?:,|$)", re.sub(r"\[[^]]*\]", "", outputs))
    return parsed(
        f"g ({inputs}) => ({outputs}) <{constants}> {{ {before} [loop] {', '.join(names)} = Scan"
        f" <num_scan_inputs = {sequences}{attributes}, body = step {body}> ({given}) }}"
    )


def random(model: onnx.ModelProto, **sizes: int) -> dict[str, Array]:
    """Inputs of a model."""
    found: dict[str, Array] = {}
    generator = np.random.default_rng(len(sizes))
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype.kind == "b":
            found[value.name] = np.asarray(generator.random(shape) > 0.5)
        elif dtype.kind == "i":
            found[value.name] = np.asarray(generator.integers(-3, 4, shape), dtype)
        else:
            found[value.name] = np.asarray(generator.normal(size=shape), dtype)
    return found


def check_scan(model: onnx.ModelProto, *, kernel: bool = True) -> None:
    """Compare some lengths, where they are symbolic; the sizes of batches too."""
    symbols = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim} - {""}
    lengths = (1, 5) if "T" in symbols else (0,)
    feeds = [
        random(model, **{name: length if name == "T" else 4 for name in symbols})
        for length in lengths
    ]
    compiled = check(model, *feeds)
    assert bool(compiled.kernels) == kernel
    assert bool(compiled.recursions) != kernel


PLAIN = [
    "t = Add(s, e) o = Mul(t, e)",
    "t = Identity(s) o = Mul(s, e)",
    "t = Add(s, e) o = Identity(s)",
    "t = Add(s, e) o = Identity(e)",
    "t = Add(s, e) o = Identity(t)",
    "t = Identity(e) o = Add(s, e)",
    "t = Tanh(e) o = Identity(s)",
    "c = Less(s, e) t = Where(c, s, e) d = Cast <to = 1> (c) o = Mul(d, e)",
    "c = Cast <to = 9> (e) d = Cast <to = 9> (s) q = Xor(c, d) o = Cast <to = 1> (q) t = Neg(e)",
    "c = Cast <to = 6> (e) d = Cast <to = 1> (c) t = Add(s, d) o = Cast <to = 1> (t)",
    "m = Max(s, e) t = Min(m, e, s) o = Max(t, e, m)",
    "t = Add(s, e) o = Softplus(t)",
    "t = Mish(e) o = Mish(t)",  # several functions one behind the other
    "a = Tanh(e) b = Tanh(a) c = Tanh(b) t = Tanh(c) o = Sigmoid(c)",
    "a = Relu(s) b = Sign(e) t = Mul(a, b) q = Abs(e) o = Pow(q, t)",
    "a = Transpose(s) b = MatMul(e, a) t = MatMul(b, e) o = Tanh(t)",
]


@pytest.mark.parametrize("body", PLAIN)
def test_one_state_and_one_sequence(body: str) -> None:
    check_scan(scan(body))


TWO = (
    "(float[3, 9] a, float[3, 9] b, float[3, 9] e) => (float[3, 9] c, float[3, 9] d, float[3, 9] o)"
)


@pytest.mark.parametrize(
    "body",
    [
        "c = Identity(b) d = Identity(a) o = Add(a, e)",
        "c = Identity(e) d = Identity(a) o = Add(a, b)",
        "c = Add(e, e) d = Identity(a) o = Add(a, b)",
        "c = Add(a, e) d = Mul(b, a) o = Add(c, a)",
        "c = Add(a, e) d = Mul(b, c) o = Identity(d)",
        "c = Add(a, e) d = Identity(c) o = Identity(c)",
        "c = Identity(b) d = Add(a, e) o = Add(c, d)",
    ],
)
def test_states_that_become_one_another(body: str) -> None:
    model = scan(
        f"{TWO} {{ {body} }}",
        inputs="float[3, 9] a0, float[3, 9] b0, float[T, 3, 9] x",
        outputs="float[3, 9] a1, float[3, 9] b1, float[T, 3, 9] y",
        given="a0, b0, x",
    )
    check_scan(model)


@pytest.mark.parametrize("count", [3, 4])
def test_states_that_go_round(count: int) -> None:
    names = [f"s{i}" for i in range(count)]
    states = ", ".join(f"float[5] {name}" for name in names)
    news = ", ".join(f"float[5] {name}n" for name in names)
    moves = " ".join(f"{names[i]}n = Identity({names[i - 1]})" for i in range(count))
    model = scan(
        f"({states}, float[5] e) => ({news}, float[5] o) {{ {moves} o = Add(s0, e) }}",
        inputs=states.replace(" s", " i") + ", float[T, 5] x",
        outputs=states.replace(" s", " f") + ", float[T, 5] y",
        given=", ".join(names).replace("s", "i") + ", x",
    )
    check_scan(model)


@pytest.mark.parametrize("length, axis", [("T", 0), ("T", 1), ("T", -1), ("1", 2), ("6", 1)])
@pytest.mark.parametrize("reverse", ["", ", scan_input_directions = [1]"])
def test_axes_and_directions(axis: int, reverse: str, length: str) -> None:
    def with_time(axis: int) -> str:
        sizes = ["3", "9"]
        sizes.insert(axis % 3, length)
        return ", ".join(sizes)

    out = axis - 1
    attributes = f", scan_input_axes = [{axis}], scan_output_axes = [{out}]{reverse}"
    model = scan(
        "t = Add(s, e) o = Mul(t, e)",
        inputs=f"float[3, 9] s0, float[{with_time(axis)}] x",
        outputs=f"float[3, 9] s1, float[{with_time(out)}] y",
        attributes=attributes + ", scan_output_directions = [1]" * (axis != 0),
    )
    check_scan(model)


def test_several_of_all() -> None:
    body = """(float[3, 9] s, float[2] n, float[9] e, float[3] f)
        => (float[3, 9] t, float[2] m, float[3, 9] o, float[9] p, float[3] q) {
            one = Constant <value_ints = [1]> ()
            g = Unsqueeze(f, one)
            o = Mul(s, g)
            t = Add(o, e)
            p = Exp(e)
            q = ReduceSum <keepdims = 0> (t, one)
            m = Cos(n)
        }"""
    model = scan(
        body,
        inputs="float[3, 9] s0, float[2] n0, float[9, T] e0, float[T, 3] f0",
        outputs="float[3, 9] s1, float[2] n1, float[T, 3, 9] y, float[9, T] z, float[T, 3] w",
        given="s0, n0, e0, f0",
        sequences=2,
        attributes=", scan_input_axes = [1, 0], scan_input_directions = [0, 1],"
        " scan_output_axes = [0, -1, 0], scan_output_directions = [1, 0, 1]",
    )
    check_scan(model)


@pytest.mark.parametrize(
    "body",
    [
        "q = Mul(s, w) t = Add(q, e) o = Add(t, k)",
        "t = Mul(s, computed) o = Sub(e, computed)",
        "t = Add(s, e) o = Add(w, zeros)",
        "t = Mul(s, e) o = Mul(s0, s)",
        "f = Cast <to = 1> (b) t = Mul(s, f) o = Sub(e, f)",
        "f = Cast <to = 1> (length) t = Div(s, f) o = Sub(e, f)",
        "t = Identity(zeros) o = Add(s, e)",
    ],
)
def test_captured_values(body: str) -> None:
    model = scan(
        body,
        inputs="float[3, 9] s0, float[T, 3, 9] x, float[9] w, float[B, 2] u",
        constants="float k = {2}, int64[2] shape = {3, 9}",
        before="""computed = Exp(w) zero = Constant <value_int = 0> ()
            sizes = Shape(u) b = Gather(sizes, zero)
            steps = Shape(x) length = Gather(steps, zero) zeros = ConstantOfShape(shape)""",
    )
    check_scan(model)


def test_an_output_that_is_a_captured_value_or_a_constant() -> None:
    body = """(float[3, 9] s, float[3, 9] e)
        => (float[3, 9] t, float[9] o, float[2] p, int64[2] q) {
        t = Add(s, e) o = Identity(w)
        p = Constant <value_floats = [1.0, 2.0]> () q = Constant <value_ints = [1, 2]> ()
    }"""
    model = scan(
        body,
        inputs="float[3, 9] s0, float[T, 3, 9] x, float[9] w",
        outputs="float[3, 9] s1, float[T, 9] y, float[T, 2] z, int64[T, 2] i",
    )
    check_scan(model)


def test_a_shape_that_is_computed_outside() -> None:
    model = scan(
        "(float[B, 9] s, float[B, 9] e) => (float[B, 9] t, float[9, B] o)"
        " { t = Add(s, e) o = Reshape(t, shape) }",
        inputs="float[B, 9] s0, float[T, B, 9] x",
        outputs="float[B, 9] s1, float[T, 9, B] y",
        constants="int64[1] one = {1}, int64[1] nine = {9}",
        before="""zero = Constant <value_int = 0> () sizes = Shape(s0) b = Gather(sizes, zero)
            width = Reshape(b, one) shape = Concat <axis = 0> (nine, width)""",
    )
    check_scan(model, kernel=False)


@pytest.mark.parametrize(
    "kind, body",
    [
        ("int64", "t = Add(s, e) o = Div(t, two)"),
        ("int32", "a = Abs(s) t = Sub(a, e) o = Sign(t)"),
        ("bool", "a = Not(s) t = Or(a, e) o = And(t, s)"),
        ("double", "a = Tanh(e) t = Mul(s, a) b = Sigmoid(t) o = Exp(b)"),
    ],
)
@pytest.mark.parametrize("width", [1, 3, 19, 64])
def test_types(kind: str, body: str, width: int) -> None:
    shape = f"{kind}[2, {width}]"
    two = f", {kind} two = {{2}}" if kind == "int64" else ""
    model = scan(
        f"({shape} s, {shape} e) => ({shape} t, {shape} o) {{ {body} }}",
        inputs=f"{shape} s0, {kind}[T, 2, {width}] x",
        outputs=f"{shape} s1, {kind}[T, 2, {width}] y",
        constants=two[2:],
    )
    check_scan(model)


@pytest.mark.parametrize("shape", ["", "1", "7", "2, 9", "B", "B, 9", "2, 1, 3, 5"])
def test_ranks(shape: str) -> None:
    kind, stacked = f"float[{shape}]" if shape else "float", ", ".join(["T", *shape.split(", ")])
    model = scan(
        f"({kind} s, {kind} e) => ({kind} t, {kind} o) {{ t = Add(s, e) o = Tanh(t) }}",
        inputs=f"{kind} s0, float[{stacked.rstrip(', ')}] x",
        outputs=f"{kind} s1, float[{stacked.rstrip(', ')}] y",
    )
    check_scan(model)


@pytest.mark.parametrize("operator", "ReduceL2 ReduceMax ReduceMean ReduceProd".split())
@pytest.mark.parametrize("axes, kept", [("0", "9"), ("1", "3"), ("0, 1", "")])
def test_reductions(operator: str, axes: str, kept: str) -> None:
    kind = f"float[{kept}]" if kept else "float"
    model = scan(
        f"(float[3, 9] s, float[3, 9] e) => (float[3, 9] t, {kind} o) {{"
        f" axes = Constant <value_ints = [{axes}]> () t = Add(s, e)"
        f" o = {operator} <keepdims = 0> (s, axes) }}",
        outputs=f"float[3, 9] s1, float[{'T, ' + kept if kept else 'T'}] y",
    )
    check_scan(model)


@pytest.mark.parametrize(
    "numbers",
    [(1, 3, 0, 1), (0, 3, 0, 1), (2, -4, 0, -1), (8, -10, 1, -1), (1, 9, 1, 3), (7, 1, 1, -2)],
)
def test_parts(numbers: tuple[int, ...]) -> None:
    begin, end, axis, step = numbers
    shape = [3, 9]
    shape[axis] = len(range(shape[axis])[slice(begin, None if end < -shape[axis] else end, step)])
    part = ", ".join(map(str, shape))
    constants = [f"int64[1] n{i} = {{{number}}}" for i, number in enumerate(numbers)]
    model = scan(
        f"(float[3, 9] s, float[3, 9] e) => (float[3, 9] t, float[{part}] o)"
        " { t = Add(s, e) o = Slice(t, n0, n1, n2, n3) }",
        outputs=f"float[3, 9] s1, float[T, {part}] y",
        constants=", ".join(constants),
    )
    check_scan(model)


def test_a_state_that_is_turned_round() -> None:
    constants = "int64[1] a = {2}, int64[1] b = {-4}, int64[1] c = {0}, int64[1] d = {-1}"
    check_scan(scan("r = Slice(s, a, b, c, d) t = Add(r, e) o = Mul(r, e)", constants=constants))


RECURSIONS = {
    "If": """least = Constant <value_float = 0.5> () m = ReduceMax <keepdims = 0> (e)
        c = Less(m, least)
        t = If (c) <then_branch = yes () => (float[3, 9] p) { p = Mul(s, e) },
            else_branch = no () => (float[3, 9] q) { q = Sub(s, e) }> o = Identity(t)""",
    "layer norm": "t = Add(s, e) o = LayerNormalization (t, w)",
    "cumulative sum": "axis = Constant <value_int = 1> () t = CumSum(e, axis) o = Add(t, s)",
    "gather": "i = Constant <value_ints = [0, 2, 1]> () t = Gather(s, i) o = Add(t, e)",
    "computed index": """f = ReduceMax <keepdims = 0> (e) i = Cast <to = 7> (f)
        r = Gather(s, i) t = Add(e, r) o = Tanh(t)""",
}


@pytest.mark.parametrize("name", RECURSIONS)
def test_bodies_that_no_kernel_computes(name: str) -> None:
    inputs = "float[3, 9] s0, float[T, 3, 9] x, float[9] w"
    check_scan(scan(RECURSIONS[name], inputs=inputs), kernel=False)


def test_a_convolution() -> None:
    kind = "float[1, 3, 9]"
    model = scan(
        f"({kind} s, {kind} e) => ({kind} t, {kind} o)"
        " { q = Conv <pads = [1, 1]> (s, w) p = Add(q, e) t = Tanh(p) o = Relu(t) }",
        inputs=f"{kind} s0, float[T, 1, 3, 9] x, float[3, 3, 3] w",
        outputs=f"{kind} s1, float[T, 1, 3, 9] y",
    )
    check_scan(model, kernel=False)


def test_indices_that_are_elements() -> None:
    model = scan(
        "(float[9] s, int64 e) => (float[9] t, float[9] o) { o = Gather(w, e) t = Add(s, o) }",
        inputs="float[9] s0, int64[T] x, float[4, 9] w",
        outputs="float[9] s1, float[T, 9] y",
    )
    check_scan(model, kernel=False)


def test_a_scan_in_a_scan() -> None:
    inner = """[inner] u, v = Scan <num_scan_inputs = 2, body = row
        (float[9] a, float[9] b, float[9] c) => (float[9] d, float[9] f) {
            m = Mul(b, c) n = Add(m, w) d = Add(a, n) f = Tanh(d)
        }> (w, s, e)"""
    model = scan(
        f"{inner} t = Add(v, e) o = Mul(t, u)",
        inputs="float[3, 9] s0, float[T, 3, 9] x, float[9] w",
    )
    feeds = [random(model, T=length) for length in (1, 5)]
    compiled = check(model, *feeds)
    assert (compiled.kernels, compiled.recursions) == (1, 1)


@pytest.mark.parametrize("body", ["t = Add(s, e) o = Mul(t, k)", "t = Add(s, e) o = CumSum(t, a)"])
def test_a_scan_in_a_branch(body: str) -> None:
    model = parsed(
        f"""g (bool c, float[3, 9] s0, float[T, 3, 9] x) => (float[3, 9] r) {{
        k = Tanh(s0) a = Constant <value_int = 1> ()
        r = If (c) <
            then_branch = yes () => (float[3, 9] p) {{
                [loop] s1, y = Scan <num_scan_inputs = 1, body = step
                    (float[3, 9] s, float[3, 9] e) => (float[3, 9] t, float[3, 9] o) {{ {body} }}
                > (s0, x)
                axis = Constant <value_ints = [0]> () z = ReduceSum <keepdims = 0> (y, axis)
                p = Add(s1, z)
            }},
            else_branch = no () => (float[3, 9] q) {{ q = Neg(s0) }}> }}"""
    )
    feeds = [{**random(model, T=4), "c": np.array(flag)} for flag in (True, False)]
    check(model, *feeds)


def test_a_scan_in_a_function() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[3] s0, float[T, 3] x) => (float[3] s1, float[T, 3] y) {
            s1, y = local.cell(s0, x)
        }
        <domain: "local", opset_import: ["" : 21]>
        cell (a, b) => (c, d) {
            c, d = Scan <num_scan_inputs = 1, body = step
                (float[3] s, float[3] e) => (float[3] t, float[3] o) { t = Add(s, e) o = Tanh(t) }
            > (a, b)
        }"""
    check_scan(onnx.parser.parse_model(text))


def test_no_steps() -> None:
    # onnxruntime refuses an empty sequence: the states stay, and the outputs are empty.
    for body in (PLAIN[0], RECURSIONS["cumulative sum"]):
        model = scan(body)
        compiled = Compiled(model)
        feed = random(model, T=0)
        state, output = compiled(feed)
        np.testing.assert_array_equal(state, feed["s0"])
        assert output.shape == (0, 3, 9)


def test_an_empty_batch() -> None:
    kind = "float[B, 9]"
    model = scan(
        f"({kind} s, {kind} e) => ({kind} t, {kind} o) {{ t = Add(s, e) o = Tanh(t) }}",
        inputs=f"{kind} s0, float[T, B, 9] x",
        outputs=f"{kind} s1, float[T, B, 9] y",
    )
    check(model, random(model, T=3, B=0))


def test_sequences_of_different_lengths_are_no_result() -> None:
    inputs = "float[3, 9] s0, float[T, 3, 9] x, float[U, 3, 9] z"
    body = """(float[3, 9] s, float[3, 9] e, float[3, 9] f) => (float[3, 9] t, float[3, 9] o)
        { t = Add(s, e) o = Mul(t, f) }"""
    model = scan(body, inputs=inputs, given="s0, x, z", sequences=2)
    compiled = check(model, random(model, T=4, U=4))
    with pytest.raises(ValueError, match="Mismatched"):
        compiled(random(model, T=4, U=3))
    other = scan(
        body, inputs=inputs.replace("T", "4").replace("U", "5"), given="s0, x, z", sequences=2,
        outputs="float[3, 9] s1, float[4, 3, 9] y",
    )  # fmt: skip
    with pytest.raises(ModelError, match="loop"):
        import_model(load(other))


# -- which bodies are kernels --------------------------------------------------------------------


def test_an_sru_cell_is_a_kernel() -> None:
    kind = "float[B, 33]"
    body = f"""({kind} c, {kind} x, {kind} f, {kind} r) => ({kind} d, {kind} h) {{
        f1 = Mul(c, vf) f2 = Add(f, f1) f3 = Add(f2, bf) fs = Sigmoid(f3)
        r1 = Mul(c, vr) r2 = Add(r, r1) r3 = Add(r2, br) rs = Sigmoid(r3)
        cx = Sub(c, x) g = Mul(fs, cx) d = Add(g, x)
        dx = Sub(d, x) k = Mul(rs, dx) h = Add(k, x)
    }}"""
    model = scan(
        body,
        inputs=f"{kind} c0, float[T, B, 33] x, float[T, B, 33] f, float[T, B, 33] r,"
        " float[33] vf, float[33] vr, float[33] bf, float[33] br",
        outputs=f"{kind} c1, float[T, B, 33] y",
        given="c0, x, f, r",
        sequences=3,
    )
    check_scan(model)


def test_a_selective_scan_is_a_kernel() -> None:
    body = """(float[B, 20, 5] h, float[B, 20] u, float[B, 20] dt, float[B, 5] b, float[B, 5] c)
        => (float[B, 20, 5] h2, float[B, 20] y) {
            last = Constant <value_ints = [2]> () one = Constant <value_ints = [1]> ()
            step = Softplus(dt) wide = Unsqueeze(step, last) power = Mul(wide, a) da = Exp(power)
            du = Mul(step, u) du2 = Unsqueeze(du, last) b2 = Unsqueeze(b, one) dbu = Mul(du2, b2)
            old = Mul(da, h) h2 = Add(old, dbu)
            c2 = Unsqueeze(c, one) hc = Mul(h2, c2) y0 = ReduceSum <keepdims = 0> (hc, last)
            skip = Mul(u, d) y = Add(y0, skip)
        }"""
    model = scan(
        body,
        inputs="float[B, 20, 5] h0, float[T, B, 20] u, float[T, B, 20] dt, float[T, B, 5] b,"
        " float[T, B, 5] c, float[20, 5] a, float[20] d",
        outputs="float[B, 20, 5] h1, float[T, B, 20] y",
        given="h0, u, dt, b, c",
        sequences=4,
    )
    feeds = [random(model, T=length, B=2) for length in (1, 6)]
    for feed in feeds:
        feed["a"] = -np.exp(feed["a"])  # a state that does not grow
    compiled = check(model, *feeds)
    assert (compiled.kernels, compiled.recursions) == (1, 0)


@dataclass(frozen=True)
class Cell:
    operator: str
    direction: str
    names: frozenset[str]
    steps: int
    batch: int
    features: int
    hidden: int
    static: tuple[bool, bool]
    attributes: dict[str, Any]


@st.composite
def cells(draw: st.DrawFn) -> Cell:
    operator = draw(st.sampled_from(OPERATORS))
    optional = {"B", "sequence_lens", "initial_h"}
    attributes: dict[str, Any] = {"layout": draw(st.sampled_from([0, 0, 0, 1]))}
    if operator == "GRU":
        attributes["linear_before_reset"] = draw(st.sampled_from([0, 1]))
    if operator == "LSTM":
        optional |= {"initial_c", "P"}
        attributes["input_forget"] = draw(st.sampled_from([0, 0, 1]))
    if draw(st.booleans()):
        attributes["clip"] = draw(st.sampled_from([0.3, 1.0]))
    names = frozenset(draw(st.sets(st.sampled_from(sorted(optional)))))
    return Cell(
        operator,
        draw(st.sampled_from(sorted(DIRECTIONS))),
        names,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 7)),
        draw(st.sampled_from([1, 5, 16])),
        draw(st.sampled_from([1, 4, 7, 16, 40])),
        (draw(st.booleans()), draw(st.booleans())),
        attributes,
    )


def cell_model(cell: Cell) -> tuple[onnx.ModelProto, dict[str, Array]]:
    values = draw_values(
        cell.operator,
        names=sorted(cell.names),
        directions=DIRECTIONS[cell.direction],
        steps=cell.steps,
        batch=cell.batch,
        features=cell.features,
        hidden=cell.hidden,
    )
    values = {
        name: array / np.float32(np.sqrt(array.shape[-1])) if name in "WR" else array
        for name, array in values.items()
    }
    if cell.attributes.get("layout", 0) == 1:
        for name in {"X", "initial_h", "initial_c"} & values.keys():
            values[name] = values[name].swapaxes(0, 1)
    inputs = [name for name in values if name not in ("W", "R", "B", "P")]
    axes = {"t": 0, "b": 1} if not cell.attributes.get("layout", 0) else {"t": 1, "b": 0}
    symbols = {
        axis: name for (name, axis), fixed in zip(axes.items(), cell.static, strict=True)
        if not fixed
    }  # fmt: skip
    model = make_model(
        cell.operator,
        values,
        inputs=inputs,
        symbols=symbols,
        direction=cell.direction,
        hidden_size=cell.hidden,
        **cell.attributes,
    )
    return model, {name: values[name] for name in inputs}


@profile(10)
@given(cells())
def test_recurrent_cells(cell: Cell) -> None:
    layout = cell.attributes["layout"]
    model, feed = cell_model(cell)
    plain, other = cell_model(replace(cell, attributes={**cell.attributes, "layout": 0}))
    compiled = Compiled(model)
    assert (compiled.kernels, compiled.recursions) == (1, 0)
    expected = by_onnxruntime(plain, other)
    if layout:  # onnxruntime knows the other one alone
        expected = [y.transpose(2, 0, 1, 3) if y.ndim == 4 else y.swapaxes(0, 1) for y in expected]
    assert_same(compiled(feed), expected)


# -- loops ---------------------------------------------------------------------------------------

CONSTANTS = (
    "float[3] g = {1.1, 0.9, -0.7}, int64 five = {5}, int64 negative = {-2}, int64 zero = {0},"
    " bool yes = {1}, bool no = {0}, int64 longest = {9223372036854775807},"
    " int64 long = {2147483647}"
)
KEEPS = "more = Identity(go)"
STOPS = (
    "least = Constant <value_float = 2.0> () axis = Constant <value_ints = [0]> ()"
    " m = ReduceMax <keepdims = 0> (s, axis) more = Less(m, least)"
)


def loop(
    body: str,
    given: str,
    *,
    inputs: str = "float[3] x",
    outputs: str = "float[3] y, float[K, 3] z",
    before: str = "",
) -> onnx.ModelProto:
    if not body.startswith("("):
        body = f"(int64 i, bool go, float[3] s) => (bool more, float[3] t, float[3] o) {{ {body} }}"
    names = re.findall(r"(\w+)(?:,|$)", re.sub(r"\[[^]]*\]", "", outputs))
    return parsed(
        f"g ({inputs}) => ({outputs}) <{CONSTANTS}> {{ {before} [loop] {', '.join(names)} = Loop"
        f" <body = step {body}> ({given}) }}"
    )


X = [np.array([1.5, 1, 1], np.float32), np.array([5, 1, 1], np.float32)]


@pytest.mark.parametrize("head", [KEEPS, STOPS], ids=["all", "early"])
@pytest.mark.parametrize(
    "count, condition",
    [("five", ""), ("five", "yes"), ("five", "no"), ("negative", "yes"), ("zero", "")],
)
def test_constant_counts_and_conditions(head: str, count: str, condition: str) -> None:
    model = loop(f"{head} t = Mul(s, g) o = Add(t, s)", f"{count}, {condition}, x")
    compiled = check(model, *({"x": x} for x in X))
    assert (compiled.kernels, compiled.recursions) == (1, 0)


@pytest.mark.parametrize("head", [KEEPS, STOPS], ids=["all", "early"])
def test_counts_and_conditions_that_are_inputs(head: str) -> None:
    model = loop(
        f"{head} t = Mul(s, g) o = Add(t, s)", "n, c, x", inputs="float[3] x, int64 n, bool c"
    )
    feeds = [
        {"x": X[0], "n": np.array(count), "c": np.array(flag)}
        for count in (-3, 0, 1, 9)
        for flag in (True, False)
    ]
    check(model, *feeds)


def test_a_count_of_shape_arithmetic() -> None:
    model = loop(
        f"{KEEPS} t = Mul(s, g) o = Add(t, s)",
        "n, , x",
        inputs="float[3] x, float[T, 2] u",
        before="sizes = Shape(u) two = Constant <value_int = 2> () t0 = Gather(sizes, zero)"
        " n = Sub(t0, two)",
    )
    check(model, *({"x": X[0], "u": normal(length, 2)} for length in (1, 2, 6)))


@pytest.mark.parametrize("given", [", yes, x", "longest, yes, x", "long, , x"])
def test_loops_without_a_bound_are_refused_by_name(given: str) -> None:
    model = loop(f"{STOPS} t = Mul(s, g) o = Add(t, s)", given)
    with pytest.raises(ModelError, match=r"'loop'.*without a bound"):
        import_model(load(model))


@pytest.mark.parametrize(
    "new, shape",
    [
        ("t = Concat <axis = 0> (s, g)", "M"),
        ("axes = Constant <value_ints = [0]> () t = Unsqueeze(s, axes)", "1, M"),
    ],
)
def test_states_that_change_their_shape_are_refused_by_name(
    new: str, shape: str, capfd: pytest.CaptureFixture[str]
) -> None:
    body = f"(int64 i, bool go, float[N] s) => (bool more, float[{shape}] t) {{ {KEEPS} {new} }}"
    model = loop(body, "five, , x", outputs="float[Q] y" if shape == "M" else "float[Q, R] y")
    with pytest.raises(ModelError, match=r"'loop'.*changes state 0"):
        import_model(load(model))
    assert not capfd.readouterr().err


def test_an_early_end_without_outputs() -> None:
    body = f"(int64 i, bool go, float[3] s) => (bool more, float[3] t) {{ {STOPS} t = Mul(s, g) }}"
    model = loop(body, "five, , x", outputs="float[3] y")
    check(model, *({"x": x} for x in X))


@pytest.mark.parametrize(
    "rest",
    [
        "n = Mul(a, g) c = Identity(n) d = Identity(n) o = Identity(n)",
        "c = Identity(b) d = Identity(b) o = Identity(b)",
        "c = Identity(b) d = Identity(a) o = Identity(a)",
        "c = Identity(b) d = Add(a, b) o = Identity(d)",
        "c = Identity(a) d = Add(a, b) o = Identity(b)",
    ],
)
def test_an_early_end_with_two_states(rest: str) -> None:
    body = f"""(int64 i, bool go, float[3] a, float[3] b)
        => (bool more, float[3] c, float[3] d, float[3] o) {{
            two = Constant <value_int = 2> () more = Less(i, two) {rest}
        }}"""
    model = loop(
        body,
        "five, , x, w",
        inputs="float[3] x, float[3] w",
        outputs="float[3] y, float[3] v, float[K, 3] z",
    )
    check(model, {"x": normal(3), "w": normal(3, seed=1)})


def test_the_number_of_the_iteration() -> None:
    model = loop(f"{KEEPS} f = Cast <to = 1> (i) t = Add(s, f) o = Mul(t, f)", "five, , x")
    assert check(model, {"x": X[0]}).kernels == 1


@pytest.mark.parametrize("head", [KEEPS, STOPS], ids=["all", "early"])
@pytest.mark.parametrize("count", ["five", "n"])
def test_entries_at_the_number_of_the_iteration(head: str, count: str) -> None:
    """As exporters write recurrent networks that are loops in Python."""
    model = loop(
        f"{head} r = Gather(u, i) t = Add(s, r) k = Gather(weights, i) o = Mul(r, k)",
        f"{count}, , x",
        inputs="float[3] x, float[T, 3] u",
        before="sizes = Shape(u) n = Gather(sizes, zero)"
        " weights = Constant <value = float[7, 1] {1, 2, 3, 4, 5, 6, 7}> ()",
    )
    feeds = [{"x": X[0], "u": normal(length, 3)} for length in (5, 7)]
    compiled = check(model, *feeds)
    assert (compiled.kernels, compiled.recursions) == (1, 0)


@pytest.mark.parametrize("count", ["five", "i"])
def test_loops_in_loops(count: str) -> None:
    inner = f"""[inner] t, w = Loop <body = in (int64 j, bool h, float[3] q)
        => (bool k, float[3] r, float[3] v) {{
            k = Identity(h) p = Add(i, j) f = Cast <to = 1> (p) e = Mul(f, g) v = Mul(x, e)
            r = Add(q, v)
        }}> ({count}, , s)
        axes = Constant <value_ints = [0]> () o = ReduceSum <keepdims = 0> (w, axes)"""
    check(loop(f"{KEEPS} {inner}", "five, , x"), {"x": X[0]})


def test_a_branch_in_a_loop() -> None:
    body = f"""{KEEPS} two = Constant <value_int = 2> () c = Less(i, two)
        t = If (c) <then_branch = yes () => (float[3] p) {{ p = Mul(s, g) }},
            else_branch = no () => (float[3] q) {{ q = Sub(s, g) }}> o = Identity(t)"""
    check(loop(body, "five, , x"), {"x": X[0]})


# -- random bodies -------------------------------------------------------------------------------

Shape = tuple[int | str, ...]
UNARY = "Abs Neg Relu Sigmoid Sin Tanh".split()
BINARY = "Add Max Min Mul Sub".split()
REDUCTIONS = "ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum".split()
SIZES = [1, 3, 8, 17, 33]


@dataclass(frozen=True)
class Body:
    """A scan, and what it is given."""

    model: onnx.ModelProto
    feeds: list[dict[str, Array]]


class Writer:
    """Writes the body of a scan, node by node."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw: Any = draw  # it draws of several types
        self.values: dict[str, Shape] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(draw(st.integers(0, 2**16)))

    def emit(self, operator: str, inputs: Sequence[str], shape: Shape, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        self.values[name] = shape
        return name

    def constant(self, array: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def pick(self, rank: int = 0) -> str:
        """A value of at least this rank."""
        found: str = self.draw(
            st.sampled_from([n for n, s in self.values.items() if len(s) >= rank])
        )
        return found

    def fixed_axis(self, name: str) -> int | None:
        axes = [axis for axis, size in enumerate(self.values[name]) if size != "B"]
        return self.draw(st.sampled_from(axes)) if axes else None

    def node(self) -> None:
        """One node, or two."""
        kinds = "unary binary where unsqueeze"
        if any(self.values.values()):  # not all have rank 0
            kinds += " reduce reshape transpose slice concat matmul gather"
        getattr(self, "_" + self.draw(st.sampled_from(kinds.split())))()

    def _unary(self) -> None:
        name = self.pick()
        self.emit(self.draw(st.sampled_from(UNARY)), [name], self.values[name])

    def _pair(self) -> tuple[str, str, Shape] | None:
        first = self.pick()
        found = [
            (name, shape)
            for name in self.values
            if (shape := broadcast(self.values[first], self.values[name])) is not None
        ]
        second, shape = self.draw(st.sampled_from(found))
        return first, second, shape

    def _binary(self) -> None:
        if (pair := self._pair()) is not None:
            self.emit(self.draw(st.sampled_from(BINARY)), pair[:2], pair[2])

    def _where(self) -> None:
        # The lesser one: continuous, so roundings do not decide.
        if (pair := self._pair()) is not None:
            less = self.emit("Less", pair[:2], pair[2])
            del self.values[less]
            self.emit("Where", [less, *pair[:2]], pair[2])

    def _reduce(self) -> None:
        name = self.pick(1)
        shape = self.values[name]
        axis = self.draw(st.integers(0, len(shape) - 1))
        keep = self.draw(st.integers(0, 1))
        kept = (*shape[:axis], *([1] * keep), *shape[axis + 1 :])
        operator = self.draw(st.sampled_from(REDUCTIONS))
        self.emit(operator, [name, self.integers(axis)], kept, keepdims=keep)

    def _reshape(self) -> None:
        name = self.pick(1)
        shape = self.values[name]
        free = [int(size) for size in shape if size != "B"]
        if "B" in shape[1:] or not free:
            return
        choices = [free[::-1], [int(np.prod(free))], [1, *free], [*free, 1]]
        new = self.draw(st.sampled_from(choices))
        head = shape[:1] if "B" in shape else ()
        target = self.integers(*([0] * len(head)), *new)
        self.emit("Reshape", [name, target], (*head, *new))

    def _unsqueeze(self) -> None:
        name = self.pick()
        shape = self.values[name]
        axis = self.draw(st.integers(0, len(shape)))
        if len(shape) < 4:
            new = (*shape[:axis], 1, *shape[axis:])
            self.emit("Unsqueeze", [name, self.integers(axis)], new)

    def _transpose(self) -> None:
        name = self.pick(1)
        shape = self.values[name]
        order = self.draw(st.permutations(range(len(shape))))
        self.emit("Transpose", [name], tuple(shape[axis] for axis in order), perm=order)

    def _slice(self) -> None:
        name = self.pick(1)
        axis = self.fixed_axis(name)
        if axis is None:
            return
        shape = list(self.values[name])
        size = int(shape[axis])
        step = self.draw(st.sampled_from([1, 1, 2, -1, -2]))
        start, end = sorted((self.draw(st.integers(0, size - 1)), self.draw(st.integers(1, size))))
        start = min(start, end - 1)
        shape[axis] = len(range(start, end, abs(step)))
        bounds = (start, end) if step > 0 else (end - 1, start - 1 - (size if start == 0 else 0))
        numbers = [self.integers(number) for number in (*bounds, axis, step)]
        self.emit("Slice", [name, *numbers], tuple(shape))

    def _gather(self) -> None:
        name = self.pick(1)
        axis = self.fixed_axis(name)
        if axis is None:
            return
        shape = self.values[name]
        index = self.draw(st.integers(0, int(shape[axis]) - 1))
        place = self.constant(np.array(index, np.int64))
        self.emit("Gather", [name, place], (*shape[:axis], *shape[axis + 1 :]), axis=axis)

    def _concat(self) -> None:
        name = self.pick(1)
        axis = self.fixed_axis(name)
        if axis is None:
            return
        shape = list(self.values[name])
        others = [
            other
            for other, size in self.values.items()
            if len(size) == len(shape)
            and size[axis] != "B"
            and all(a == b for i, (a, b) in enumerate(zip(size, shape, strict=True)) if i != axis)
        ]
        second = self.draw(st.sampled_from(others))
        shape[axis] = int(shape[axis]) + int(self.values[second][axis])
        self.emit("Concat", [name, second], tuple(shape), axis=axis)

    def _matmul(self) -> None:
        name = self.pick(1)
        shape = self.values[name]
        if shape[-1] == "B":
            return
        depth = int(shape[-1])
        matching = [n for n, s in self.values.items() if len(s) == 2 and s[0] == depth]
        if matching and self.draw(st.booleans()):
            second = self.draw(st.sampled_from(matching))
            columns = self.values[second][1]
        else:
            columns = self.draw(st.sampled_from(SIZES))
            weights = self.random.normal(size=(depth, int(columns))) / np.sqrt(depth)
            second = self.constant(weights.astype(np.float32))
        self.emit("MatMul", [name, second], (*shape[:-1], columns))


def broadcast(first: Shape, second: Shape) -> Shape | None:
    rank = max(len(first), len(second))
    result: list[int | str] = []
    for a, b in zip(
        (1,) * (rank - len(first)) + first, (1,) * (rank - len(second)) + second, strict=True
    ):
        if a != b and 1 not in (a, b):
            return None
        result.append(b if a == 1 else a)
    return tuple(result)


def value_info(name: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    batch, (depth, width) = "B", (draw(st.sampled_from(SIZES)) for _ in range(2))
    shapes: list[Shape] = [
        (batch, depth), (depth, width), (width,), (depth,), (batch, depth, width), (), (1, width)
    ]  # fmt: skip
    shapes = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=3))
    kinds = [st.lists(st.sampled_from(shapes), min_size=low, max_size=2) for low in (1, 1, 0, 0)]
    states, elements, captured, weights = map(draw, kinds)
    writer = Writer(draw)
    named: list[dict[str, Shape]] = []
    for prefix, entries in zip("sexw", (states, elements, captured, weights), strict=True):
        named.append({f"{prefix}{i}": shape for i, shape in enumerate(entries)})
        # An initializer has no symbolic size.
        named[-1] = {n: s for n, s in named[-1].items() if prefix != "w" or "B" not in s}
        writer.values |= named[-1]
    inputs, (constant,) = named[:3], named[3:]
    for _ in range(draw(st.integers(2, 8))):
        writer.node()
    results: list[tuple[str, Shape]] = []
    for shape in inputs[0].values():
        fitting = [name for name, size in writer.values.items() if size == shape]
        name = draw(st.sampled_from(fitting))
        if name[0] == "v":
            name = writer.emit("Tanh", [name], shape)  # or a state could grow without bounds
        results.append((writer.emit("Identity", [name], shape), shape))
    for _ in range(draw(st.integers(0, 2))):
        name = writer.pick()
        results.append((writer.emit("Identity", [name], writer.values[name]), writer.values[name]))
    body = helper.make_graph(
        writer.nodes,
        "step",
        [value_info(n, s) for n, s in (*inputs[0].items(), *inputs[1].items())],
        [value_info(n, s) for n, s in results],
        writer.constants,
    )
    outputs = [
        (f"y{i}", shape if i < len(states) else ("T", *shape))
        for i, (_, shape) in enumerate(results)
    ]
    first = {f"initial_{n}": s for n, s in inputs[0].items()}
    stacked = {f"all_{n}": ("T", *s) for n, s in inputs[1].items()}
    given = {**first, **stacked, **inputs[2]}
    scan = helper.make_node(
        "Scan",
        [*first, *stacked],
        [name for name, _ in outputs],
        name="loop",
        body=body,
        num_scan_inputs=len(elements),
    )
    values = {
        n: writer.random.normal(size=[int(size) for size in s]).astype(np.float32)
        for n, s in constant.items()
    }
    graph = helper.make_graph(
        [scan],
        "g",
        [value_info(n, s) for n, s in given.items()],
        [value_info(n, s) for n, s in outputs],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = []
    for size in draw(st.sampled_from([[1], [2, 5], [4], [9, 3]])):
        sizes = {"B": size, "T": draw(st.integers(1, 5))}
        feed: dict[str, Array] = {}
        for name, shape in given.items():
            numbers = [sizes[entry] if isinstance(entry, str) else entry for entry in shape]
            feed[name] = np.asarray(writer.random.normal(size=numbers), np.float32)
        feeds.append(feed)
    return Body(model, feeds)


@profile(40)
@given(bodies())
def test_any_body(body: Body) -> None:
    check(body.model, *body.feeds, atol=1e-5)


@pytest.mark.slow
@profile(600)
@given(bodies())
def test_many_bodies(body: Body) -> None:
    check(body.model, *body.feeds, atol=1e-5)


def test_an_output_of_the_graph_that_is_a_constant() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[2] x) => (float[2] y, float[3] c) {
            y = Neg(x) c = Constant <value_floats = [1.0, 2.0, 3.0]> ()
        }"""
    )
    feed = {"x": np.ones(2, np.float32)}
    assert_same(Compiled(model)(feed), by_onnxruntime(model, feed))


@pytest.mark.parametrize("length", [1, 6])
def test_softmax_inside_a_body_is_part_of_the_kernel(length: int) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[B, 11] start, float[T, B, 11] x) => (float[B, 11] y, float[T, B, 11] z) {
            y, z = Scan <num_scan_inputs = 1, body = step
                (float[B, 11] s, float[B, 11] e) => (float[B, 11] t, float[B, 11] o) {
                    p = Softmax <axis = -1> (s)
                    q = LogSoftmax <axis = -1> (e)
                    t = Add(p, q)
                    o = Identity(t)
                }> (start, x)
        }"""
    )
    random = np.random.default_rng(0)
    feed = {
        "start": random.normal(size=(3, 11)).astype(np.float32),
        "x": random.normal(size=(length, 3, 11)).astype(np.float32),
    }
    compiled = Compiled(model)
    assert (compiled.kernels, compiled.recursions) == (1, 0)
    assert_same(compiled(feed), by_onnxruntime(model, feed))


# -- other forms -----------------------------------------------------------------------------------


def test_steps_behind_the_end_do_not_divide_by_zero() -> None:
    model = parsed(
        "net (int64 n, int64 trips) => (int64[t] y) {"
        " yes = Constant <value = bool {1}> () one = Constant <value = int64 {1}> ()"
        " zero = Constant <value = int64 {0}> () k = Constant <value = int64 {60}> ()"
        " y = Loop <body = step (int64 i, bool more) => (bool on, int64 q) {"
        " d = Sub(n, i) q = Div(k, d) c = Sub(d, one) on = Greater(c, zero) }> (trips, yes) }"
    )
    check(model, {"n": np.array(5), "trips": np.array(10)})


@pytest.mark.parametrize("name", ["main", "main_transform_params", "step_body"])
def test_loops_of_any_name(name: str) -> None:
    model = scan("t = Add(s, e) o = Identity(t)")
    model.graph.node[-1].name = name
    check_scan(model)


@pytest.mark.parametrize("body", ["q = Relu(e)", "q = Clip(e, low, high)"])
def test_what_is_no_number_stays_none(body: str) -> None:
    low, high = (f"Constant <value = float {{{bound}}}> ()" for bound in (-1, 1))
    model = scan(f"{body} t = Add(s, q) o = Identity(t)", before=f"low = {low} high = {high}")
    feed = random(model, T=3)
    feed["x"][1, 0, 0] = np.nan
    check(model, feed)


@pytest.mark.parametrize("sizes", ["0, 9", "3, 0"])
def test_nothing_to_compute(sizes: str) -> None:
    model = scan(
        f"(float[{sizes}] s, float[{sizes}] e) => (float[{sizes}] t, float[{sizes}] o)"
        " { t = Add(s, e) o = Tanh(t) }",
        inputs=f"float[{sizes}] s0, float[T, {sizes}] x",
        outputs=f"float[{sizes}] s1, float[T, {sizes}] y",
    )
    sizes_of = [int(size) for size in sizes.split(",")]
    check(model, {"s0": normal(*sizes_of), "x": normal(3, *sizes_of)})


def test_a_very_long_body() -> None:
    steps = " ".join(f"a{n + 1} = Add(a{n}, e)" for n in range(700))
    check(scan(f"a0 = Identity(s) {steps} t = Tanh(a700) o = Identity(t)"), {
        "s0": normal(3, 9), "x": normal(2, 3, 9, seed=1)
    })  # fmt: skip
