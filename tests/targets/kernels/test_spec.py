"""What kernels are told about codes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from bitwright.errors import UsageError
from bitwright.soft_edge import SoftEdge
from bitwright.targets.kernels.spec import Operand
from tests.passes.soft_edge_layouts import ASYMMETRIC, LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_the_code_of_zero_of_a_layout(layout: SoftEdge) -> None:
    operand = Operand(cast("Any", layout.dtype), layout=layout)
    assert layout.decode(operand.code_of_zero) == 0
    assert operand.code_of_zero == layout.encode(0.0, 0.1)
    assert operand.zero_point == 0  # decoded values are centred


def test_the_code_of_zero_of_integers() -> None:
    assert Operand("uint8", 7).code_of_zero == 7


@pytest.mark.parametrize("dtype, zero_point", [("int16", 0), ("int8", ASYMMETRIC.zero_point)])
def test_operands_that_are_no_codes_of_the_layout(dtype: Any, zero_point: int) -> None:
    with pytest.raises(UsageError, match="are no codes of int8:-97"):
        Operand(dtype, zero_point, ASYMMETRIC)
