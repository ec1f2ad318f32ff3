from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.expressions import operator  # errors of ours pass through TVM
from bitwright.soft_edge import SoftEdge
from tests.passes.soft_edge_layouts import LAYOUTS
from tests.quant.qdq import Array

LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


def module_of(function: Callable[..., Any], *operands: Array) -> Any:
    builder = relax.BlockBuilder()
    types = [relax.TensorType(operand.shape, operand.dtype.name) for operand in operands]
    parameters = [relax.Var(f"p{index}", kind) for index, kind in enumerate(types)]
    with builder.function("main", parameters):
        builder.emit_func_output(builder.emit(function(*parameters)))
    return builder.get()


def run(function: Callable[..., Any], *operands: Array) -> Array:
    """Compile a call with TVM's own pipeline and run it."""
    executable = tvm.compile(module_of(function, *operands), target="llvm")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result: Array = machine["main"](*map(tvm.runtime.tensor, operands)).numpy()
    return result


@LAYOUT
def test_all_codes_are_decoded(layout: SoftEdge) -> None:
    codes = np.arange(layout.code_min, layout.code_max + 1).astype(layout.dtype)
    found = run(lambda x: ops.soft_edge_decode(x, layout=layout), codes.reshape(1, -1))
    assert found.dtype == np.int16
    assert np.array_equal(found, layout.decode(codes)[None])


@LAYOUT
def test_decoding_has_no_float(layout: SoftEdge) -> None:
    codes = np.zeros(3, layout.dtype)
    module = module_of(lambda x: ops.soft_edge_decode(x, layout=layout), codes)
    assert "float" not in str(relax.transform.LegalizeOps()(module).script())


@LAYOUT
def test_values_are_encoded(layout: SoftEdge) -> None:
    step = np.float32(0.0123)
    random = np.random.default_rng(5)
    heavy = random.standard_cauchy(50_000) * 30 * step
    ties = np.arange(-4000, 4000) * np.float64(step) / 2
    near = [np.nextafter(np.float32(value), np.float32(side)) for value in ties for side in (-9, 9)]
    rest = [np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e36]
    values = np.concatenate([heavy, ties, near, rest]).astype(np.float32)
    found = run(lambda x, s: ops.soft_edge_encode(x, s, layout=layout), values, np.array(step))
    assert found.dtype == np.dtype(layout.dtype)
    assert np.array_equal(found, layout.encode(values, float(step)))


@LAYOUT
def test_step_may_be_constant(layout: SoftEdge) -> None:
    # TVM makes a product with the reciprocal of a division by a number.
    step = np.float32(1 / 3)
    values = (np.arange(-30_000, 30_000) * np.float32(0.013)).astype(np.float32)
    constant = relax.const(step)
    found = run(lambda x: ops.soft_edge_encode(x, constant, layout=layout), values)
    assert np.array_equal(found, layout.encode(values, float(step)))


@LAYOUT
def test_symbolic_shapes_stay(layout: SoftEdge) -> None:
    size = tvm.tirx.Var("n", "int64")
    values = relax.Var("x", relax.TensorType([size, 3], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [values]):
        codes = builder.emit(ops.soft_edge_encode(values, relax.const(1.0), layout=layout))
        steps = builder.emit(ops.soft_edge_decode(codes, layout=str(layout)))
        builder.emit_func_output(steps)
    assert tvm_ffi.structural_equal(codes.ty, relax.TensorType([size, 3], layout.dtype))
    assert tvm_ffi.structural_equal(steps.ty, relax.TensorType([size, 3], "int16"))


def test_wrong_layouts_are_refused() -> None:
    values = relax.Var("x", relax.TensorType([2], "float32"))
    with pytest.raises(UsageError, match=re.escape("'two scales' is no soft-edge layout")):
        ops.soft_edge_encode(values, relax.const(1.0), layout="two scales")


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float64")])
def test_values_of_another_type_are_refused(dtypes: tuple[str, str]) -> None:
    values = relax.Var("x", relax.TensorType([2], dtypes[0]))
    call = ops.soft_edge_encode(values, relax.const(1.0, dtypes[1]), layout="quamba-se")
    with pytest.raises(UsageError, match=r"made of float32 values and steps, not float(16|64)"):
        relax.BlockBuilder().normalize(call)


def test_codes_of_another_type_are_refused() -> None:
    codes = relax.Var("q", relax.TensorType([2], "int8"))
    call = ops.soft_edge_decode(codes, layout="quamba-se")
    assert operator(call) == ops.SOFT_EDGE_DECODE
    with pytest.raises(UsageError, match="are int16, not int8"):
        relax.BlockBuilder().normalize(call)
