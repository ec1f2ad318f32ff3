"""Branches, from a model to numbers: every result is onnxruntime's."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.backend.test.case.node.if_
import pytest
from onnx import helper
from tvm import relax, tirx

from bitwright.errors import ModelError
from bitwright.importer import import_model
from bitwright.passes.expressions import bodies
from bitwright.quant.load import load
from tests.driver.test_import_loops import Compiled, assert_same, check, normal, parsed
from tests.quant.qdq import Array

CASES = {
    case.name: case
    for case in onnx.backend.test.case.node._NodeTestCases
    if case.model.graph.node[0].op_type == "If"
}


def branches(
    then: str,
    otherwise: str,
    *,
    inputs: str = "float[B, 9] x",
    output: str = "float[R, C] y",
    before: str = "",
    behind: str = "y = Identity(r)",
    declared: str = "float[R, C]",
) -> onnx.ModelProto:
    """A model with one If, named ``choice``; each branch computes ``p``."""
    bodies = (f"() => ({declared} p) {{ {text} }}" for text in (then, otherwise))
    first, second = (f"{name} {body}" for name, body in zip(("a", "b"), bodies, strict=True))
    return parsed(
        f"g (bool c, {inputs}) => ({output}) <float k = {{0.5}}> {{ {before}"
        f" [choice] r = If (c) <then_branch = {first}, else_branch = {second}> {behind} }}"
    )


def feeds(model: onnx.ModelProto, **sizes: int) -> list[dict[str, Array]]:
    """Both conditions, with the same numbers."""
    given: dict[str, Array] = {}
    for number, value in enumerate(model.graph.input[1:]):
        kind = value.type.tensor_type
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        given[value.name] = np.asarray(normal(*shape, seed=number) * 3, dtype)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return [{"c": np.full(shape, flag), **given} for flag in (True, False)]


def check_both(model: onnx.ModelProto) -> Compiled:
    """Compare both branches, for some sizes."""
    return check(model, *feeds(model, B=4), *feeds(model, B=1))


# -- the case of the standard --------------------------------------------------------------------


def test_the_case_of_the_standard() -> None:
    case = CASES.pop("test_if")
    compiled = Compiled(case.model)
    for inputs, outputs in case.data_sets:
        assert_same(compiled({"cond": np.asarray(inputs[0])}), outputs)


@pytest.mark.parametrize("name", ["test_if_seq", "test_if_opt"])
def test_sequences_and_optionals_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="cannot be compiled"):
        import_model(load(CASES[name].model))


# -- one If --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "then, otherwise",
    [
        ("p = Mul(x, k)", "p = Sub(k, x)"),
        ("p = Identity(x)", "p = Exp(x)"),
        ("p = Mul(outer, x)", "p = Neg(outer)"),
        ("p = Softmax(outer)", "q = Tanh(x) p = Sigmoid(q)"),
        ("p = Concat <axis = 0> (x, x)", "p = Neg(x)"),
        ("p = Concat <axis = 1> (x, x)", "p = Concat <axis = 0> (x, outer)"),
        ("p = Transpose(x)", "p = Identity(x)"),
        ("p = Expand(k, sizes)", "p = Expand(x, sizes)"),
        ("n = NonZero(x) p = Cast <to = 1> (n)", "p = Neg(x)"),
        ("p = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()", "p = Relu(x)"),
        (
            "p = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()",
            "p = Constant <value = float[1, 2] {7, 8}> ()",
        ),
    ],
)
def test_one_output(then: str, otherwise: str) -> None:
    check_both(
        branches(then, otherwise, before="outer = Sin(x) sizes = Shape(x)", behind="y = Abs(r)")
    )


def test_what_is_known_of_sizes_stays_known() -> None:
    """Of those that both branches return; the other one is new."""
    model = branches("p = Concat <axis = 0> (x, x)", "p = Neg(x)")
    (block,) = import_model(load(model))["main"].body.blocks
    ((first, second),) = [b.ty.shape for b in block.bindings if isinstance(b, relax.MatchCast)]
    assert isinstance(first, tirx.Var)
    assert int(second) == 9


def test_results_of_different_sizes_are_computed_with() -> None:
    check_both(
        branches(
            "p = Concat <axis = 0> (x, x)",
            "p = Neg(x)",
            inputs="float[B, 9] x, float[9, 5] w",
            behind="m = MatMul(r, w) e = Exp(r) s = ReduceSum <keepdims = 1> (e) y = Add(m, s)",
        )
    )


@pytest.mark.parametrize("shape", ["", "[1]"])
def test_several_outputs_and_types(shape: str) -> None:
    model = parsed(
        f"""g (bool{shape} c, float[B, 9] x) => (float[B, 9] y, int64[K] n, bool[Q, 9] f) {{
        t = Tanh(x)
        r, n, f = If (c) <
            then_branch = a () => (float[B, 9] p, int64[1] q, bool[B, 9] b) {{
                p = Exp(t) q = Constant <value_ints = [7]> () b = Less(x, t)
            }},
            else_branch = o () => (float[B, 9] p2, int64[2] q2, bool[B, 9] b2) {{
                p2 = Identity(t) q2 = Shape(x) b2 = Greater(x, t)
            }}>
        y = Mul(r, t) }}"""
    )
    check_both(model)


def test_a_captured_value_that_is_returned_is_not_overwritten() -> None:
    """What a branch returns may be what it was given: its memory is still needed."""
    model = branches(
        "p = Identity(outer)",
        "p = Neg(outer)",
        before="outer = Sin(x)",
        behind="a = Exp(x) b = Cos(a) d = Mul(a, b) e = Mul(d, a) g = Softmax(e) y = Sub(r, g)",
        inputs="float[4, 9] x",
        declared="float[4, 9]",
    )
    check(model, *feeds(model))


def test_weights_and_layers_in_branches() -> None:
    def numbers(*shape: int) -> str:
        return "{" + ", ".join(map(str, normal(*shape).reshape(-1))) + "}"

    model = parsed(
        f"""g (bool c, float[B, 2, 9] x) => (float[B, 3, L] y)
        <float[3, 2, 3] w = {numbers(3, 2, 3)}, float[3] bias = {numbers(3)}> {{
        y = If (c) <
            then_branch = a () => (float[B, 3, 9] p) {{ p = Conv <pads = [1, 1]> (x, w, bias) }},
            else_branch = b () => (float[B, 3, 4] q) {{
                m = Constant <value = float[9, 4] {numbers(9, 4)}> ()
                n = Constant <value = float[3, 2] {numbers(3, 2)}> ()
                v = MatMul(n, x) q = MatMul(v, m)
            }}> }}"""
    )
    check(model, *feeds(model, B=3), atol=1e-5)


def test_a_size_that_a_branch_checks_is_checked_in_that_branch_only() -> None:
    model = branches("p = Add(x, z)", "p = Neg(x)", inputs="float[4, 9] x, float[Q, 9] z")
    compiled = check(model, *feeds(model, Q=4), feeds(model, Q=3)[1])
    with pytest.raises(RuntimeError, match="mismatch"):
        compiled(feeds(model, Q=3)[0])


# -- in each other -------------------------------------------------------------------------------


def test_branches_in_branches() -> None:
    model = parsed(
        """g (bool c, bool d, float[B, 9] x) => (float[R, 9] y) {
        t = Tanh(x)
        y = If (c) <
            then_branch = a () => (float[R, 9] p) {
                e = Exp(t)
                p = If (d) <
                    then_branch = a2 () => (float[R, 9] p2) { p2 = Mul(e, x) },
                    else_branch = b2 () => (float[R, 9] q2) { q2 = Concat <axis = 0> (e, t) }>
            },
            else_branch = b () => (float[R, 9] q) {
                q = If (d) <
                    then_branch = a3 () => (float[R, 9] p3) { p3 = Identity(t) },
                    else_branch = b3 () => (float[R, 9] q3) { q3 = Neg(x) }>
            }> }"""
    )
    module = import_model(load(model))
    assert len(bodies(module)) == 6
    flags = [(a, b) for a in (True, False) for b in (True, False)]
    x = normal(3, 9)
    check(model, *({"c": np.array(a), "d": np.array(b), "x": x} for a, b in flags))


@pytest.mark.parametrize("stop", ["more = Identity(go)", "more = Less(i, two)"])
def test_a_loop_in_a_branch_in_a_loop(stop: str) -> None:
    model = parsed(
        f"""g (int64 n, float[3] x) => (float[3] y) <float g = {{0.5}}> {{
        y = Loop <body = b (int64 i, bool go, float[3] s) => (bool more, float[3] t) {{
            two = Constant <value_int = 2> () odd = Mod(i, two) f = Cast <to = 9> (odd) {stop}
            t = If (f) <
                then_branch = a () => (float[3] p) {{
                    p = Loop <body = inner (int64 j, bool h, float[3] q)
                        => (bool k, float[3] r) {{ k = Identity(h) r = Add(q, x) }}> (i, , s)
                }},
                else_branch = o () => (float[3] q) {{ q = Mul(s, g) }}>
        }}> (n, , x) }}"""
    )
    for count in (0, 1, 5):
        check(model, {"n": np.array(count), "x": normal(3)})


@pytest.mark.parametrize("operator, gates", [("LSTM", 4), ("GRU", 3)])
def test_a_recurrent_operator_in_a_branch_is_a_kernel(operator: str, gates: int) -> None:
    make, tensor = helper.make_node, helper.make_tensor_value_info
    then = helper.make_graph(
        [make(operator, ["x", "w", "r"], ["", "h"], name="cell", hidden_size=7)],
        "then", [], [tensor("h", 1, [1, "B", 7])],
        [
            onnx.numpy_helper.from_array(normal(1, gates * 7, 5) / 3, "w"),
            onnx.numpy_helper.from_array(normal(1, gates * 7, 7, seed=1) / 3, "r"),
        ],
    )  # fmt: skip
    other = helper.make_graph(
        [make("Neg", ["start"], ["n"], name="neg")], "other", [], [tensor("n", 1, [1, "Q", 7])]
    )
    graph = helper.make_graph(
        [make("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=other)],
        "g",
        [tensor("c", 9, []), tensor("x", 1, ["T", "B", 5]), tensor("start", 1, [1, "Q", 7])],
        [tensor("y", 1, [1, "R", 7])],
    )
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    compiled = check(model, *feeds(model, T=6, B=3, Q=3), *feeds(model, T=1, B=1, Q=2))
    assert (compiled.kernels, compiled.recursions) == (1, 0)


# -- numbers of axes -----------------------------------------------------------------------------

REMOVE = "p = Squeeze(x, last)", "p = Identity(x)"
BEFORE = """last = Constant <value_ints = [1]> () axis = Constant <value_int = 1> ()
    one = Constant <value_int = 1> () sizes = Shape(x) size = Gather(sizes, axis)
    is_one = Equal(size, one)"""


def remove(condition: str, then: str = REMOVE[0], **options: str) -> onnx.ModelProto:
    """A model that removes an axis on a condition."""
    model = branches(
        then, REMOVE[1], inputs="float[B, L] x", declared="float[R]", output="float[B] y",
        before=BEFORE, **options,
    )  # fmt: skip
    for node in model.graph.node:
        if node.op_type == "If":
            node.input[0] = condition
            for entry in node.attribute:
                entry.g.output[0].type.tensor_type.ClearField("shape")
    return model


def test_an_axis_is_removed_that_has_size_1() -> None:
    """As exporters write it. Beyond 1 onnxruntime keeps it; here that is an error."""
    model = remove("is_one")
    feed = {"c": np.array(True), "x": normal(4, 1)}
    compiled = check(model, feed)
    assert not bodies(import_model(load(model)))
    with pytest.raises(RuntimeError, match="shape"):
        compiled({"c": np.array(True), "x": normal(4, 2)})


@pytest.mark.parametrize(
    "condition, then", [("c", REMOVE[0]), ("is_one", "p = ReduceSum <keepdims = 0> (x, last)")]
)
def test_branches_of_different_numbers_of_axes_are_refused(condition: str, then: str) -> None:
    with pytest.raises(ModelError, match=r"(?s)'choice'.*1 and 2 axes.*with --input-shape"):
        import_model(load(remove(condition, then)))


def test_a_size_that_is_given_decides_the_number_of_axes() -> None:
    model = remove("is_one", "p = ReduceSum <keepdims = 0> (x, last)")
    fixed = load(model, input_shapes={"x": [4, 1]}).to_proto()
    check(fixed, {"c": np.array(True), "x": normal(4, 1)})
