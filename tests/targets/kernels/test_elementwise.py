"""Encoders of soft-edge codes: those of the definition, in every bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from bitwright.soft_edge import QUAMBA_SE, SoftEdge
from bitwright.targets.kernels import elementwise, host
from bitwright.targets.kernels.host import Isa
from tests.passes.soft_edge_layouts import LAYOUTS
from tests.targets.kernels.kernels import ISAS

MANY = {**LAYOUTS, "example": SoftEdge.parse("uint8:2:3@0<<0:8@0<<1<=16,2@18<<2<=38,4@54<<5")}


def hard_values(layout: SoftEdge, step: np.float32) -> Any:
    """Values of codes, ties and limits with what lies beside them, and what is no number."""
    top = max(layout.value_max, -layout.value_min) + 40
    steps = np.arange(-2 * top, 2 * top + 1, dtype=np.float32) / np.float32(2)
    found = np.concatenate([steps, *(np.nextafter(steps, np.float32(way)) for way in (-1e9, 1e9))])
    found = found * step
    special = np.array(
        [np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, -1e-45, 3e38, -3e38], np.float32
    )
    return np.concatenate([found, special])


def encode(layout: SoftEdge, step: np.float32, values: Any, isa: Isa, *, known: bool = True) -> Any:
    shape: list[int | None] = [size if known else None for size in values.shape]
    function = elementwise.encoder(layout, float(step), shape, "encoder")
    target = tvm.target.Target(host.target(isa))
    built = tvm.compile(tvm.IRModule({"encoder": function}), target=target)
    result = tvm.runtime.tensor(np.full(values.shape, 77, layout.dtype))
    built["encoder"](tvm.runtime.tensor(values), result)
    return result.numpy()


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("layout", MANY.values(), ids=list(MANY))
@pytest.mark.parametrize("step", [0.25, 0.0123, 3e-39, 1e30])
def test_codes_are_those_of_the_definition(layout: SoftEdge, step: float, isa: Isa) -> None:
    with np.errstate(over="ignore", under="ignore"):
        values = hard_values(layout, np.float32(step))
    found = encode(layout, np.float32(step), values, isa)
    np.testing.assert_array_equal(found, layout.encode(values, step))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (9,), (3, 0), (3, 1367), (4096,), (4103,)])
def test_any_size(shape: tuple[int, ...], known: bool) -> None:
    values = np.random.default_rng(1).normal(0, 30, shape).astype(np.float32)
    values = np.asarray(values)
    found = encode(QUAMBA_SE, np.float32(0.25), values, ISAS[0], known=known)
    np.testing.assert_array_equal(found, QUAMBA_SE.encode(values, 0.25))
