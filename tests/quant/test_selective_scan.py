"""Which Scan operators are selective scans, and what enters them as what.

The pass is compared with this, on more bodies, in tests/passes/test_recognize_scan.py.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from benchmarks import models, recurrent_models
from bitwright.quant.load import load
from bitwright.quant.selective_scan import selective_scans
from tests.quant.mamba import mamba

DECAY = "w = Unsqueeze(dt, last) p = Mul(w, A) e = Exp(p)"
INPUT = "du = Mul(dt, u) d2 = Unsqueeze(du, last) i = Mul(d2, b)"
NEW = "o = Mul(e, h) n = Add(o, i)"
OUTPUT = "hc = Mul(n, c) s = ReduceSum <keepdims = 0> (hc, last)"
SKIP = "k = Mul(u, D) y = Add(s, k)"
ALL = {"x": "us", "dt": "dts", "B": "bs", "C": "cs"}


def roles(*parts: str) -> list[dict[str, str]]:
    """Names of the tensors that enter each selective scan of a model with one Scan."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[5, 3] h0, float[T, 5] dts, float[T, 5] us, float[T, 3] bs, float[T, 3] cs,
           float[5, 3] A, float[5] D) => (float[5, 3] h1, float[T, 5] ys) {{
            last = Constant <value_ints = [1]> ()
            h1, ys = Scan <num_scan_inputs = 4, body = step
                (float[5, 3] h, float[5] dt, float[5] u, float[3] b, float[3] c)
                => (float[5, 3] n, float[5] y) {{ {" ".join(parts)} }}> (h0, dts, us, bs, cs)
        }}"""
    )
    return names(model)


def names(model: onnx.ModelProto | str) -> list[dict[str, str]]:
    return [
        {role: str(scan.value(role).name) for role in scan.inputs}  # type: ignore[union-attr]  # it is there
        for scan in selective_scans(load(model).graph)
    ]


@pytest.mark.parametrize(
    "parts",
    [
        (DECAY, INPUT, NEW, OUTPUT, SKIP),
        (DECAY, INPUT, NEW, OUTPUT, "y = Identity(s)"),
        (DECAY, INPUT, "o = Mul(h, e) q = Add(i, o) n = Identity(q)", OUTPUT, SKIP),
        (DECAY, INPUT, "o = Mul(h, e) q = Add(i, o) n = Identity(q)",
         "hc = Mul(q, c) s = ReduceSum <keepdims = 0> (hc, last)", SKIP),
        (DECAY, "i = Einsum <equation = \"c,c,n->cn\"> (dt, u, b)", NEW, OUTPUT, SKIP),
        (DECAY, INPUT, NEW, "s = Einsum <equation = \"cn,n->c\"> (n, c)", SKIP),
        ("p = Einsum <equation = \"c,cn->cn\"> (dt, A) e = Exp(p)", INPUT, NEW,
         "s = MatMul(n, c)", SKIP),
        ("p = Einsum <equation = \"c,cn->cn\"> (dt, A) e = Exp(p)", INPUT, NEW,
         "c2 = Unsqueeze(c, last) m = MatMul(n, c2) s = Squeeze(m, last)", SKIP),
    ],
)  # fmt: skip
def test_selective_scans(parts: tuple[str, ...]) -> None:
    assert roles(*parts) == [ALL]


@pytest.mark.parametrize(
    "parts",
    [
        (DECAY, INPUT, "o = Mul(e, h) q = Add(o, i) n = Tanh(q)", OUTPUT, SKIP),
        (DECAY, INPUT, "o = Mul(e, h) q = Add(o, i) n = Add(q, h)", OUTPUT, SKIP),
        (DECAY, INPUT, "q = Mul(h, h) o = Mul(e, q) n = Add(o, i)", OUTPUT, SKIP),
        (DECAY, INPUT, "r = Identity(h) o = Mul(e, r) q = Add(o, i) n = Add(q, A)", OUTPUT, SKIP),
        ("w = Unsqueeze(dt, last) p = Mul(w, h) e = Exp(p)", INPUT, NEW, OUTPUT, SKIP),
        (DECAY, INPUT, NEW, "hc = Mul(h, c) s = ReduceSum <keepdims = 0> (hc, last)", SKIP),
        (DECAY, INPUT, NEW, OUTPUT, "y = Mul(s, u)"),
        (DECAY, INPUT, NEW, OUTPUT, "y = Tanh(s)"),
    ],
)  # fmt: skip
def test_what_looks_like_one(parts: tuple[str, ...]) -> None:
    assert roles(*parts) == []


def test_two_states_are_none() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[5] h0, float[T, 5] us) => (float[5] h1, float[5] g1, float[T, 5] ys) {
            h1, g1, ys = Scan <num_scan_inputs = 1, body = step
                (float[5] h, float[5] g, float[5] u)
                => (float[5] hn, float[5] gn, float[5] y) {
                    hn = Add(h, u) gn = Add(g, h) y = Add(g, u) }> (h0, h0, us)
        }"""
    )
    assert names(model) == []


def test_one_input_may_feed_two_scans() -> None:
    found = names(mamba(both_ways=True))
    assert found == [{"x": "u", "dt": "dt", "B": "B", "C": "C"}] * 2


def test_the_scans_of_the_benchmarks() -> None:
    assert names(recurrent_models.selective_scan()) == [
        {"x": "u", "dt": "delta", "B": "B", "C": "C"}
    ]
    assert names(recurrent_models.sru_scan()) == []


@pytest.mark.slow
def test_all_scans_of_a_trained_mamba() -> None:
    """Forward and backward scans of a block read the same: SiLU, softplus, and two of a split."""
    found = names(str(models.mamba_segmenter().path))
    assert len(found) == 12
    assert found[::2] == found[1::2]
    prefixes = {role: {name[role].split("_")[0] for name in found} for role in found[0]}
    assert prefixes == {"x": {"silu"}, "dt": {"dtsp"}, "B": {"Bm"}, "C": {"Cm"}}


@pytest.mark.parametrize(
    "between, found",
    [
        ("dt = Softplus(db)", True),
        ("s0 = Softplus(db) s1 = Transpose <perm = [1, 0]> (s0) s2 = Add(s1, h0_shift)"
         " dt = Transpose <perm = [1, 0]> (s2)", True),
        ("s0 = Softplus(db) s1 = Unsqueeze(s0, first) s2 = Mul(s1, scale) dt = Squeeze(s2, first)",
         True),
        ("s0 = Softplus(db) dt = Mul(s0, s0)", False),
        ("s0 = Softplus(db) s1 = Concat <axis = 1> (s0, s0) dt, s2 = Split <axis = 1> (s1, halves)",
         False),
    ],
)  # fmt: skip
def test_the_softplus_in_front_of_the_time_steps(between: str, found: bool) -> None:
    model = mamba()
    (step,) = [node for node in model.graph.node if node.output[0] == "dt"]
    place = list(model.graph.node).index(step)
    part = onnx.parser.parse_graph(f"g (float[T, 8] db) => (float[T, 8] dt) {{ {between} }}")
    nodes = [*model.graph.node[:place], *part.node, *model.graph.node[place + 1 :]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, shape in (("h0_shift", (8, 1)), ("scale", (1, 1, 8))):
        array = np.full(shape, 0.5, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    (scan,) = selective_scans(load(model).graph)
    assert set(scan.places) == {"dt", "u", "B", "C"} | ({"db"} if found else set())
