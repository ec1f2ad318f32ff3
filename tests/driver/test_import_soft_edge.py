"""ONNX models with soft-edge codes: what the importer makes, and the integers of what is built."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.errors import ModelError
from bitwright.importer import import_model
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.passes.soft_edge_activations import SoftEdgeActivations
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.reference import Reference
from bitwright.soft_edge import QUAMBA_SE, SoftEdge
from tests.passes.modules import assert_same, transform
from tests.passes.regions import check, compiled, execute, with_codes
from tests.passes.soft_edge_layouts import ASYMMETRIC, LAYOUTS
from tests.passes.soft_edge_models import SCALE, made, selective_scan, soft_edge
from tests.quant.qdq import Array, Builder

INT8 = TensorQuantization(SCALE, 0, 8, signed=True)
ALL = ("delta", "u", "B", "C")


def plain(builder: Builder, x: str, _: str) -> str:
    """Codes of one scale."""
    return builder.activation(x, INT8)


def feeds() -> dict[str, Array]:
    random = np.random.default_rng(4)
    sizes = {"delta": 16, "u": 16, "B": 4, "C": 4}
    made_of = {n: random.normal(0, 1, (12, size)) for n, size in sizes.items()}
    made_of["delta"] = np.abs(made_of["delta"])
    made_of["u"] *= 8
    return {name: array.astype(np.float32) for name, array in made_of.items()}


@pytest.mark.parametrize("names, tensors", [(("u",), "x"), (ALL, "x+dt+B+C")])
def test_nodes_become_what_the_pass_makes(names: tuple[str, ...], tensors: str) -> None:
    def encoded(builder: Builder, x: str, name: str) -> str:
        return soft_edge(builder, x, SCALE / 4, QUAMBA_SE, name)

    before = import_model(load(selective_scan(plain, names)))
    made_by_pass = transform(before, PropagateQuantization(), SoftEdgeActivations(tensors=tensors))
    imported = transform(
        import_model(load(selective_scan(encoded, names))), PropagateQuantization()
    )
    assert_same(made_by_pass, imported)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_codes_equal_the_reference(layout: SoftEdge) -> None:
    def encoded(builder: Builder, x: str, name: str) -> str:
        return soft_edge(builder, x, SCALE / 4, layout, name)

    built = check(selective_scan(encoded, ALL), feeds())
    assert [layer.name for layer in built.layers] == ["x_proj"]


def test_a_pass_among_others_gives_the_integers_of_the_reference() -> None:
    def encoded(builder: Builder, x: str, name: str) -> str:
        return soft_edge(builder, x, SCALE / 4, QUAMBA_SE, name)

    built = compiled(with_codes(selective_scan(plain)), passes="soft-edge=quamba-se")
    expected = with_codes(selective_scan(encoded))
    values, codes = Reference(load(expected)).run(feeds())
    found = execute(built, *(feeds()[name] for name in ALL))
    projected = str(expected.graph.output[1].name)
    assert np.array_equal(found[1], values[projected])
    np.testing.assert_allclose(found[0], values[str(expected.graph.output[0].name)], 1e-4, 1e-5)
    assert codes


@pytest.mark.parametrize("layout", [QUAMBA_SE, ASYMMETRIC])
def test_constants_are_folded(layout: SoftEdge) -> None:
    builder = Builder(opset=21)
    values = np.linspace(-3, 3, 40, dtype=np.float32).reshape(8, 5)
    x = builder.input("x", ["n", 8])
    stored = soft_edge(builder, builder.constant(values), 0.01, layout)
    last = builder.node("MatMul", x, stored)
    model = made(builder, last, shape=["n", 5])
    given = np.random.default_rng(1).normal(0, 1, (3, 8)).astype(np.float32)
    steps = layout.decode(layout.encode(values, 0.01)).astype(np.float32) * np.float32(0.01)
    found = execute(compiled(model), given)[0]
    np.testing.assert_allclose(found, given @ steps, 1e-5, 1e-5)


def test_a_computed_step_is_refused() -> None:
    builder = Builder(opset=21)
    x = builder.input("x", ["n", 8])
    step = builder.input("step", [])
    last = soft_edge(builder, x, 0.01, QUAMBA_SE, "x")
    builder.nodes[0].input[1] = step
    with pytest.raises(ModelError, match=r"SoftEdgeEncode .*its step is computed"):
        import_model(load(made(builder, last, shape=["n", 8])))
