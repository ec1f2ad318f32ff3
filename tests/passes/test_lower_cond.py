"""Branches as functions, and what a call of them becomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.relax import op

from bitwright.passes import ops
from bitwright.passes.expressions import bodies, calls, operator
from bitwright.passes.lower_cond import lower
from tests.passes.modules import run, transform

B = 3


def branch(builder: Any, name: str, emit: Any) -> Any:
    """A function of two tensors of one symbolic size."""
    size = tirx.Var("n", "int64")
    parameters = [relax.Var(f"p{i}", relax.TensorType([size, 4], "float32")) for i in range(2)]
    with builder.function(name, parameters, private=True):
        with builder.dataflow():
            results = [builder.emit(entry) for entry in emit(*parameters)]
            result = builder.emit_output(relax.Tuple(results))
        return builder.emit_func_output(result)


def module(*, sizes_differ: bool = False, twice: bool = False) -> Any:
    """Either of two functions, as a flag says."""
    builder = relax.BlockBuilder()
    then = branch(builder, "then", lambda a, b: [op.add(a, b), a])
    other = branch(
        builder,
        "otherwise",
        lambda a, b: [op.concat([a, b]) if sizes_differ else op.multiply(a, b), op.negative(b)],
    )
    batch = tirx.Var("B", "int64")
    kind = relax.TensorType([batch, 4], "float32")
    flag = relax.Var("flag", relax.TensorType([], "bool"))
    x, y = (relax.Var(name, kind) for name in "xy")
    first = relax.TensorType(dtype="float32", ndim=2) if sizes_differ else kind
    with builder.function("main", [flag, x, y]):
        with builder.dataflow():
            turned = builder.emit(op.exp(x))
            call = ops.cond(then, other, flag, [turned, y], relax.TupleType([first, kind]))
            result = builder.emit(call)
            if twice:
                a, b = (builder.emit(relax.TupleGetItem(result, i)) for i in range(2))
                call = ops.cond(then, other, flag, [a, b], relax.TupleType([kind, kind]))
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    return builder.get()


def data() -> list[Any]:
    random = np.random.default_rng(0)
    return [random.normal(size=(B, 4)).astype(np.float32) for _ in range(2)]


def reference(flag: bool, a: Any, b: Any, *, sizes_differ: bool = False) -> list[Any]:
    if flag:
        return [a + b, a]
    return [np.concatenate([a, b]) if sizes_differ else a * b, -b]


@pytest.mark.parametrize("sizes_differ", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_one_branch_runs(flag: bool, sizes_differ: bool) -> None:
    x, y = data()
    found = run(lower(module(sizes_differ=sizes_differ)), np.array(flag), x, y)
    expected = reference(flag, np.exp(x), y, sizes_differ=sizes_differ)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_memory_planning_can_be_trusted() -> None:
    """No branch of an If allocates, unlike those that TVM's importer makes."""
    x, y = data()
    executable = tvm.compile(lower(module()), target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    for flag in (True, False, True):
        found = machine["main"](*map(tvm.runtime.tensor, (np.array(flag), x, y)))
        for ours, theirs in zip(found, reference(flag, np.exp(x), y), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)


def test_two_calls_of_the_same_branches_share_a_function() -> None:
    before = module(twice=True)
    assert bodies(before) == ["otherwise", "then"]
    after = lower(before)
    relax.analysis.well_formed(after)
    names = sorted(variable.name_hint for variable in after.get_global_vars())
    assert names == ["main", "otherwise", "then", "then_or_otherwise"]
    x, y = data()
    found = run(after, np.array(False), x, y)
    expected = reference(False, *reference(False, np.exp(x), y))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_module_without_branches_stays_as_it_is() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([3], "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(op.exp(x)))
    tvm.ir.assert_structural_equal(lower(builder.get()), builder.get())


def test_functions_that_are_branches_are_not_dead() -> None:
    after = transform(module(), relax.transform.DeadCodeElimination())
    assert ops.COND in map(operator, calls(after["main"]))
    assert bodies(after) == ["otherwise", "then"]
    assert len(after.get_global_vars()) == 3
