"""Which recurrences are recognized: whatever the order of operands, and no near misses.

The bodies are texts of ONNX, imported.
"""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from tvm import relax

from benchmarks import models, recurrent_models
from bitwright.importer import import_model
from bitwright.passes.lower_scan import LowerScan
from bitwright.passes.recognize_scan import COMPOSITES, RECURRENCE, SELECTIVE_SCAN, SRU
from bitwright.quant.load import load
from bitwright.quant.selective_scan import selective_scans
from tests.driver.test_import_loops import scan
from tests.passes.modules import transform

ROLES = ("x", "dt", "B", "C")


def kernels(model: Any) -> list[Any]:
    """Attributes of the functions that call kernels, and their parameters."""
    module = transform(import_model(load(model)), LowerScan())
    functions = [f for f in module.functions.values() if isinstance(f, relax.Function)]
    return [f for f in functions if (f.attrs or {}).get("Composite") in COMPOSITES]


# -- selective scans -----------------------------------------------------------------------------

# State [2, 5, 3]: batch, channels, states of each.
STATE = "one = Constant <value_ints = [1]> () last = Constant <value_ints = [2]> ()"
DECAY = "w = Unsqueeze(dt, last) p = Mul(w, a) e = Exp(p)"
INPUT = "du = Mul(dt, u) d2 = Unsqueeze(du, last) b2 = Unsqueeze(b, one) i = Mul(d2, b2)"
NEW = "o = Mul(e, h) n = Add(o, i)"
OUTPUT = "c2 = Unsqueeze(c, one) hc = Mul(n, c2) s = ReduceSum <keepdims = 0> (hc, last)"
SKIP = "k = Mul(u, d) y = Add(s, k)"


def selective(*parts: str, before: str = "", a: str = "5, 3") -> onnx.ModelProto:
    body = f"""(float[2, 5, 3] h, float[2, 5] u, float[2, 5] dt, float[2, 3] b, float[2, 3] c)
        => (float[2, 5, 3] n, float[2, 5] y) {{ {STATE} {" ".join(parts)} }}"""
    return scan(
        body,
        inputs="float[2, 5, 3] h0, float[T, 2, 5] u, float[T, 2, 5] dt, float[T, 2, 3] b,"
        f" float[T, 2, 3] c, float[{a}] a, float[5] d",
        outputs="float[2, 5, 3] h1, float[T, 2, 5] y",
        given="h0, u, dt, b, c",
        sequences=4,
        before=before,
    )


def attributes(model: Any) -> tuple[str, list[int] | None]:
    """What the only kernel is, and the widths of the parameters that have roles."""
    (function,) = kernels(model)
    attrs = function.attrs
    roles = [int(attrs[role]) for role in ROLES] if "x" in attrs else None
    check_in_onnx(model, function, roles)
    return str(attrs["Composite"]), roles


def check_in_onnx(model: Any, function: Any, roles: list[int] | None) -> None:
    """The same is found in the ONNX graph, without TVM."""
    graph = load(model).graph
    (scan_node,) = [node for node in graph if node.op_type == "Scan"]
    state = len(function.params) - len(scan_node.inputs)
    expected = dict(zip(ROLES, roles or [], strict=False))
    inputs = {role: index - state for role, index in expected.items() if index > state}
    found = [dict(entry.inputs) for entry in selective_scans(graph)]
    assert found == ([] if roles is None else [inputs])


# Captured values first, in the order of their use, then the state and the sequences.
@pytest.mark.parametrize(
    "parts",
    [
        (DECAY, INPUT, NEW, OUTPUT, SKIP),
        (DECAY, INPUT, "o = Mul(h, e) n = Add(i, o)", OUTPUT, "k = Mul(d, u) y = Add(k, s)"),
        (DECAY, INPUT, NEW, OUTPUT, "y = Identity(s)"),
        (DECAY, INPUT, NEW, OUTPUT, "y = Add(s, u)"),
        (
            DECAY,
            "b2 = Unsqueeze(b, one) db = Mul(w, b2) u2 = Unsqueeze(u, last) i = Mul(db, u2)",
            NEW,
            OUTPUT,
            SKIP,
        ),
        (
            "st = Softplus(dt) w = Unsqueeze(st, last) la = Exp(a) na = Neg(la) p = Mul(na, w)"
            " e = Exp(p)",
            "g = Sigmoid(u) v = Mul(g, u) du = Mul(v, st) d2 = Unsqueeze(du, last)"
            " b2 = Unsqueeze(b, one) i = Mul(b2, d2)",
            NEW,
            OUTPUT,
            SKIP,
        ),
        (
            DECAY,
            INPUT,
            NEW,
            "c2 = Unsqueeze(c, last) m = MatMul(n, c2) s = Squeeze(m, last)",
            SKIP,
        ),
        (
            DECAY,
            INPUT,
            NEW,
            "c2 = Unsqueeze(c, one) tr = Transpose <perm = [0, 2, 1]> (n) m = MatMul(c2, tr)"
            " s = Squeeze(m, one)",
            SKIP,
        ),
    ],
)
def test_selective_scans(parts: tuple[str, ...]) -> None:
    model = selective(*parts)
    composite, roles = attributes(model)
    assert composite == SELECTIVE_SCAN
    (function,) = kernels(model)
    state = len(function.params) - 5
    assert roles == [state + 1, state + 2, state + 3, state + 4]


def test_products_that_are_computed_outside() -> None:
    """The decay and the input of the state as sequences: only C is left to name."""
    wide = "float[2, 5, 3]"
    model = scan(
        f"({wide} h, {wide} e, {wide} i, float[2, 3] c) => ({wide} n, float[2, 5] y) {{"
        f" {STATE} {NEW} {OUTPUT} y = Identity(s) }}",
        inputs=f"{wide} h0, float[T, 2, 5, 3] e, float[T, 2, 5, 3] i, float[T, 2, 3] c",
        outputs=f"{wide} h1, float[T, 2, 5] y",
        given="h0, e, i, c",
        sequences=3,
    )
    assert attributes(model) == (SELECTIVE_SCAN, [-1, -1, -1, 3])


def test_a_decay_of_each_head() -> None:
    """Mamba-2: one number for all channels and states of a head."""
    model = scan(
        """(float[4, 5, 3] h, float[4, 5] u, float[4] dt, float[3] b, float[3] c)
        => (float[4, 5, 3] n, float[4, 5] y) {
            ends = Constant <value_ints = [1, 2]> () last = Constant <value_ints = [2]> ()
            p = Mul(dt, a) e0 = Exp(p) e = Unsqueeze(e0, ends)
            one = Constant <value_ints = [1]> () w = Unsqueeze(dt, one) du = Mul(u, w)
            d2 = Unsqueeze(du, last) i = Mul(d2, b)
            o = Mul(h, e) n = Add(o, i) hc = Mul(n, c) y = ReduceSum <keepdims = 0> (hc, last)
        }""",
        inputs="float[4, 5, 3] h0, float[T, 4, 5] u, float[T, 4] dt, float[T, 3] b, float[T, 3] c,"
        " float[4] a",
        outputs="float[4, 5, 3] h1, float[T, 4, 5] y",
        given="h0, u, dt, b, c",
        sequences=4,
    )
    assert attributes(model) == (SELECTIVE_SCAN, [2, 3, 4, 5])


@pytest.mark.parametrize(
    "parts",
    [
        (DECAY, INPUT, "o = Add(h, h) n = Add(o, i)", OUTPUT, SKIP),
        (DECAY, INPUT, "n = Add(h, i)", OUTPUT, SKIP),
        (DECAY, INPUT, "x = Exp(h) o = Mul(e, x) n = Add(o, i)", OUTPUT, SKIP),
        (DECAY, INPUT, "q = Mul(h, h) o = Mul(e, q) n = Add(o, i)", OUTPUT, SKIP),
        ("p = Mul(h, a) e = Exp(p)", INPUT, NEW, OUTPUT, SKIP),
        ("w = Unsqueeze(dt, last) p = Mul(w, a) e = Tanh(p)", INPUT, NEW, OUTPUT, SKIP),
        (DECAY, INPUT, "o = Mul(e, h) n = Sub(o, i)", OUTPUT, SKIP),
        (DECAY, INPUT, "o = Mul(e, h) q = Add(o, i) n = Tanh(q)", OUTPUT, SKIP),
        (DECAY, INPUT, "o = Mul(e, h) q = Add(o, i) n = Add(q, a)", OUTPUT, SKIP),
        (DECAY, f"{INPUT} ", NEW, OUTPUT.replace("ReduceSum", "ReduceMax"), SKIP),
        (DECAY, INPUT, NEW, OUTPUT.replace("ReduceSum", "ReduceMean"), SKIP),
        (DECAY, INPUT, NEW, "s = ReduceSum <keepdims = 0> (n, last)", SKIP),
        (DECAY, INPUT, NEW, OUTPUT.replace("Mul(n, c2)", "Add(n, c2)"), SKIP),
        (DECAY, INPUT, NEW, OUTPUT.replace("Mul(n, c2)", "Mul(h, c2)"), SKIP),
        (DECAY, INPUT, NEW, OUTPUT, "y = Mul(s, u)"),
        (DECAY, INPUT, NEW, OUTPUT, "y = Tanh(s)"),
        (DECAY, INPUT, NEW, OUTPUT, "y = Add(s, s)"),
    ],
)
def test_near_misses_of_selective_scans(parts: tuple[str, ...]) -> None:
    assert attributes(selective(*parts)) == (RECURRENCE, None)


def test_a_state_that_is_turned_is_another_recurrence() -> None:
    model = scan(
        """(float[4, 4] h, float[4] u, float[4] dt, float[4] b, float[4] c)
        => (float[4, 4] n, float[4] y) {
            last = Constant <value_ints = [1]> ()
            w = Unsqueeze(dt, last) p = Mul(w, a) e = Exp(p) t = Transpose(h) o = Mul(e, t)
            u2 = Unsqueeze(u, last) i = Mul(u2, b) n = Add(o, i)
            hc = Mul(n, c) y = ReduceSum <keepdims = 0> (hc, last)
        }""",
        inputs="float[4, 4] h0, float[T, 4] u, float[T, 4] dt, float[T, 4] b, float[T, 4] c,"
        " float[4, 4] a",
        outputs="float[4, 4] h1, float[T, 4] y",
        given="h0, u, dt, b, c",
        sequences=4,
    )
    assert all(function.attrs["Composite"] == RECURRENCE for function in kernels(model))


# -- SRUs ----------------------------------------------------------------------------------------

GATE = "v = Mul(c, vf) q = Add(f, v) fs = Sigmoid(q)"
CELL = "cx = Sub(c, x) g = Mul(fs, cx) d = Add(g, x)"
HIDDEN = "v2 = Mul(vr, c) q2 = Add(v2, r) rs = Sigmoid(q2) t = Tanh(d)"
HIGHWAY = "k = Sub(t, x) m = Mul(rs, k) h = Add(m, x)"


def sru(*parts: str) -> onnx.ModelProto:
    kind = "float[B, 33]"
    return scan(
        f"({kind} c, {kind} x, {kind} f, {kind} r) => ({kind} d, {kind} h)"
        f" {{ one = Constant <value_float = 1.0> () {' '.join(parts)} }}",
        inputs=f"{kind} c0, float[T, B, 33] x, float[T, B, 33] f, float[T, B, 33] r,"
        " float[33] vf, float[33] vr, float[33] bf",
        outputs=f"{kind} c1, float[T, B, 33] y",
        given="c0, x, f, r",
        sequences=3,
    )


@pytest.mark.parametrize(
    "parts",
    [
        (GATE, CELL, HIDDEN, HIGHWAY),
        ("q = Add(f, bf) fs = Sigmoid(q)", CELL, "h = Identity(d)"),
        ("fs = Sigmoid(f)", CELL, HIDDEN, "h = Mul(t, rs)"),
        (
            "v = Mul(vf, c) q0 = Add(bf, v) q = Add(q0, f) fs = Sigmoid(q)",
            "a = Mul(c, fs) b = Sub(one, fs) e = Mul(b, x) d = Add(e, a)",
            HIDDEN,
            "a2 = Mul(rs, t) b2 = Sub(one, rs) e2 = Mul(x, b2) h = Add(a2, e2)",
        ),
        (
            GATE,
            "xb = Mul(x, bf) cx = Sub(c, xb) g = Mul(fs, cx) d = Add(g, xb)",
            "rs = Sigmoid(r) h = Mul(rs, d)",
        ),
    ],
)
def test_srus(parts: tuple[str, ...]) -> None:
    assert attributes(sru(*parts)) == (SRU, None)


@pytest.mark.parametrize(
    "parts",
    [
        ("v = Mul(c, vf) q = Add(f, v) fs = Tanh(q)", CELL, HIDDEN, HIGHWAY),
        ("v = Tanh(c) q = Add(f, v) fs = Sigmoid(q)", CELL, HIDDEN, HIGHWAY),
        ("v = Mul(c, c) q = Add(f, v) fs = Sigmoid(q)", CELL, HIDDEN, HIGHWAY),
        ("fs = Sigmoid(c)", CELL, HIDDEN, HIGHWAY),
        (GATE, "a = Mul(c, fs) d = Add(a, x)", HIDDEN, HIGHWAY),
        (GATE, "rs0 = Sigmoid(r) a = Mul(c, fs) b = Mul(x, rs0) d = Add(a, b)", HIDDEN, HIGHWAY),
        (GATE, "cx = Add(c, x) g = Mul(fs, cx) d = Add(g, x)", HIDDEN, HIGHWAY),
        (GATE, "n = Tanh(c) cx = Sub(c, n) g = Mul(fs, cx) d = Add(g, n)", HIDDEN, HIGHWAY),
        (GATE, CELL, HIDDEN, "h = Max(t, rs)"),
        (GATE, CELL, HIDDEN, "h = Mul(c, rs)"),
        (GATE, CELL, HIDDEN, "k = Add(t, x) m = Mul(rs, k) h = Add(m, x)"),
        (GATE, CELL, "h = Exp(d)"),
        (GATE, CELL, "rs = Sigmoid(r) dd = Mul(d, d) t = Tanh(dd) h = Mul(rs, t)"),
    ],
)
def test_near_misses_of_srus(parts: tuple[str, ...]) -> None:
    assert attributes(sru(*parts)) == (RECURRENCE, None)


# -- networks ------------------------------------------------------------------------------------


def test_the_scans_of_the_benchmarks() -> None:
    assert attributes(recurrent_models.selective_scan()) == (SELECTIVE_SCAN, [4, 3, 5, 6])
    assert attributes(recurrent_models.sru_scan()) == (SRU, None)
    network = recurrent_models.sru_network(hidden=12, projection=8, outputs=5)
    assert [function.attrs["Composite"] for function in kernels(network)] == [SRU] * 8


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_gated_operators_are_other_recurrences(operator: str) -> None:
    model = recurrent_models.gated(operator, 7, 9, bidirectional=True)
    assert {str(function.attrs["Composite"]) for function in kernels(model)} == {RECURRENCE}


@pytest.mark.slow
def test_all_scans_of_a_trained_mamba() -> None:
    functions = kernels(models.mamba_segmenter().path)
    assert [str(function.attrs["Composite"]) for function in functions] == [SELECTIVE_SCAN] * 12
    for function in functions:
        shapes = {
            role: [
                int(size) for size in list(function.params[int(function.attrs[role])].ty.shape)[1:]
            ]
            for role in ROLES
        }
        assert shapes == {"x": [256], "dt": [256], "B": [16], "C": [16]}


def test_equal_parts_that_are_built_apart() -> None:
    """Compared without end, two chains of 40 levels would take years."""
    chains = " ".join(
        f"{c}a{n} = Tanh({c}{n}) {c}b{n} = Sigmoid({c}{n}) {c}{n + 1} = Add({c}a{n}, {c}b{n})"
        for c in ("left", "right")
        for n in range(40)
    )
    parts = (
        f"left0 = Identity(f) right0 = Identity(f) {chains} fs = Mul(left40, right40)",
        CELL,
        HIDDEN,
        HIGHWAY,
    )
    assert attributes(sru(*parts)) == (RECURRENCE, None)
