"""Loops of models that are written in Python, by onnxscript."""

# onnxscript reads the functions; their annotations and arguments are no types of Python.
# mypy: ignore-errors
# ruff: noqa: F821

import numpy as np
from onnxscript import FLOAT, INT64, graph, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

from bitwright.importer import import_model
from bitwright.passes.lower_scan import LowerScan
from bitwright.passes.recognize_scan import SRU
from bitwright.quant.load import load
from tests.driver.test_import_loops import check, normal
from tests.passes.modules import transform

cells = Opset("cells", 1)


@script()
def repeated(x: FLOAT["B", 4], n: INT64) -> FLOAT["B", 4]:
    """A Loop."""
    s = op.Identity(x)
    for i in range(n):
        f = op.Cast(i, to=1)
        s = op.Tanh(op.Add(op.Mul(s, f), x))
    return s


@script(cells)
def sru(c0, x, f, v):
    """A Scan, in a function of the model."""

    @graph()
    def step(c, x_t, f_t):
        gate = op.Sigmoid(op.Add(f_t, op.Mul(v, c)))
        new = op.Add(x_t, op.Mul(gate, op.Sub(c, x_t)))
        out = op.Identity(new)
        return new, out

    last, outputs = op.Scan(c0, x, f, body=step, num_scan_inputs=2)
    return last, outputs


@script()
def network(
    c0: FLOAT["B", 9], x: FLOAT["T", "B", 9], f: FLOAT["T", "B", 9], v: FLOAT[9]
) -> FLOAT["T", "B", 9]:
    """Two layers of one function."""
    _, hidden = sru(c0, x, f, v)
    _, outputs = sru(c0, hidden, f, v)
    return outputs


def test_a_for_loop_is_one_kernel() -> None:
    model = repeated.to_model_proto()
    assert [node.op_type for node in model.graph.node] == ["Identity", "Loop"]
    feeds = [{"x": normal(3, 4), "n": np.array(count)} for count in (0, 1, 6)]
    compiled = check(model, *feeds)
    assert (compiled.kernels, compiled.recursions) == (1, 0)


def test_each_call_of_a_function_with_a_scan_is_one_kernel() -> None:
    model = network.to_model_proto()
    assert [function.name for function in model.functions] == ["sru"]
    feeds = [
        {
            "c0": normal(batch, 9),
            "x": normal(time, batch, 9, seed=1),
            "f": normal(time, batch, 9, seed=2),
            "v": normal(9, seed=3),
        }
        for time, batch in ((1, 1), (7, 3))
    ]
    compiled = check(model, *feeds)
    assert (compiled.kernels, compiled.recursions) == (2, 0)
    module = transform(import_model(load(model)), LowerScan())
    attributes = [function.attrs or {} for function in module.functions.values()]
    assert [str(a["Composite"]) for a in attributes if "Composite" in a] == [SRU] * 2
