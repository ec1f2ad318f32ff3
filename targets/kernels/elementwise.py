"""Functions of float32, element by element."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Final

from tvm import tirx

from bitwright.targets.kernels import emit, functions
from bitwright.targets.kernels.emit import Expr

__all__ = ["FUNCTIONS", "kernel"]

FUNCTIONS: Final[Mapping[str, Callable[[Expr, int], Expr]]] = MappingProxyType(
    {
        "erf": functions.erf,
        "exp": functions.exp,
        "log": functions.log,
        "nn.silu": functions.silu,
        "nn.softplus": functions.softplus,
        "sigmoid": functions.sigmoid,
        "tanh": functions.tanh,
    }
)
"""Functions by the names that Relax has for them."""

_LANES = 8
_BLOCK = 4096  # elements of a task, a multiple of the lanes


def kernel(function: str, shape: Sequence[int | None], name: str) -> Any:
    """Build the kernel of a function.

    Parameters
    ----------
    function
        One of :data:`FUNCTIONS`.
    shape
        Of operand and result; None: a size known only when it runs.
    name
        Symbol of the kernel.

    Returns
    -------
    PrimFunc
        ``(data [*shape], result [*shape])``, both float32.
    """

    def body() -> None:
        sizes = [
            tirx.Var(f"size_{axis}", "int64") if size is None else emit.index(size)
            for axis, size in enumerate(shape)
        ]
        data, result = emit.parameters([(word, sizes, "float32") for word in ("data", "result")])
        count = emit.bind(prod(sizes, start=tirx.IntImm("int64", 1)))

        def compute(place: Expr, lanes: int) -> None:
            value = FUNCTIONS[function](emit.bind(emit.load(data, place, lanes)), lanes)
            emit.store(result, place, value, lanes)

        with emit.loop((count + (_BLOCK - 1)) // _BLOCK, "parallel") as block:
            first = emit.bind(block * _BLOCK)
            present = emit.bind(emit.lesser(count - first, _BLOCK))
            with emit.loop(present // _LANES) as vector:
                compute(first + vector * _LANES, _LANES)
            with emit.loop(present % _LANES) as rest:
                compute(first + present - 1 - rest, 1)

    return emit.primitive_function(name, body)
