"""Relax modules in tests: names of nodes, comparison, execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.ir import Op, SourceName, Span
from tvm.relax.frontend.onnx import from_onnx

from tests.quant.qdq import Array


@relax.expr_functor.mutator
class _Named(relax.PyExprMutator):  # type: ignore[misc]  # TVM ships no types
    def visit_var_binding_(self, binding: Any) -> None:
        value = self.visit_expr(binding.value)
        if isinstance(value, relax.Call):
            span = Span(SourceName(binding.var.name), 1, 1, 1, 1)
            value = relax.Call(value.op, value.args, value.attrs, value.ty_args, span)
        inner = isinstance(binding.var, relax.DataflowVar)
        inner = inner or not self.builder_.current_block_is_dataflow()
        emit = self.builder_.emit if inner else self.builder_.emit_output
        self.set_var_remap(binding.var, emit(value, binding.var.name))


def named(module: Any) -> Any:
    """Give each call the name of its variable, as the importer does with the names of nodes."""
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            module[variable] = _Named(module).visit_expr(function)
    return module


def transform(module: Any, *passes: Any) -> Any:
    """Run passes in a ``Sequential``, which is how TVM's users run them."""
    return tvm.transform.Sequential(list(passes))(module)


def assert_same(found: Any, expected: Any) -> None:
    """Assert that two modules are equal but for names, and for variables that rename others."""
    clean = relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination()
    first, second = transform(found, *clean), transform(expected, *clean)
    tvm.ir.assert_structural_equal(first, second, map_free_vars=True)


def calls(function: Any) -> list[tuple[str, str]]:
    """Node and operator of each call of a function, in order; calls of functions have none."""
    found: list[tuple[str, str]] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call):
            name = expr.op.name.removeprefix("relax.") if isinstance(expr.op, Op) else ""
            found.append(("" if expr.span is None else expr.span.source_name.name, name))

    relax.analysis.post_order_visit(function, visit)
    return found


def operators(function: Any) -> list[str]:
    """Operators of a function's calls, in order."""
    return [name for _, name in calls(function)]


def layers(module: Any) -> dict[str, Any]:
    """Composite functions by the names of their layers; once packed, the calls have the names."""
    found: dict[str, Any] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.GlobalVar):
            function = module[expr.op]
            if function.attrs and "Composite" in function.attrs:
                packed = "layer" not in function.attrs
                name = expr.span.source_name.name if packed else str(function.attrs["layer"])
                assert name not in found
                found[name] = function

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return found


def run(module: Any, *inputs: Array) -> list[Array]:
    """Compile with TVM's own pipeline and run ``main``."""
    # TVM's memory planning lets branches share memory that only one of them allocates.
    with tvm.transform.PassContext(disabled_pass=["StaticPlanBlockMemory"]):
        executable = tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(np.array(x, order="C")) for x in inputs))
    return [entry.numpy() for entry in ([result] if hasattr(result, "numpy") else result)]


def assert_same_results(
    first: Any, second: Any, inputs: Sequence[Array], *, rtol: float = 0.0
) -> None:
    """Run both modules; without a tolerance every bit is equal."""
    for one, other in zip(run(first, *inputs), run(second, *inputs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=rtol, atol=0.0)


def imported_by_tvm(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> Any:
    """Import with TVM's own importer; weights are constants."""
    return from_onnx(model, {name: list(shape) for name, shape in shapes.items()})
