"""Functions of float32, element by element; soft-edge codes of float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.soft_edge import SoftEdge
from bitwright.targets.kernels import emit, functions, soft_edge
from bitwright.targets.kernels.emit import Expr

__all__ = ["FUNCTIONS", "encoder", "kernel"]

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
    return _elementwise(FUNCTIONS[function], shape, "float32", name)


def encoder(layout: SoftEdge, step: float, shape: Sequence[int | None], name: str) -> Any:
    """Build the kernel that makes soft-edge codes.

    Parameters
    ----------
    layout, step
        The layout and its finest step, a float32 number.
    shape, name
        As for :func:`kernel`.

    Returns
    -------
    PrimFunc
        ``(data [*shape], result [*shape])``, float32 and the layout's type.
    """
    bits = int(np.float32(step).view(np.int32))

    def encode(values: Expr, lanes: int) -> Expr:
        # TVM makes a product with the reciprocal, which rounds, of a division by a number.
        finest = T.reinterpret(emit.bind(tirx.const(bits, "int32")), dtype="float32")
        return soft_edge.encoded(layout, values, emit.broadcast(finest, lanes), lanes)

    return _elementwise(encode, shape, layout.dtype, name)


def _elementwise(
    function: Callable[[Expr, int], Expr], shape: Sequence[int | None], dtype: str, name: str
) -> Any:
    """Build a kernel of float32 elements that runs in vectors and in parallel."""

    def body() -> None:
        sizes = [
            tirx.Var(f"size_{axis}", "int64") if size is None else emit.index(size)
            for axis, size in enumerate(shape)
        ]
        data, result = emit.parameters([("data", sizes, "float32"), ("result", sizes, dtype)])
        count = emit.bind(prod(sizes, start=tirx.IntImm("int64", 1)))

        def compute(place: Expr, lanes: int) -> None:
            value = function(emit.bind(emit.load(data, place, lanes)), lanes)
            emit.store(result, place, value, lanes)

        with emit.loop((count + (_BLOCK - 1)) // _BLOCK, "parallel") as block:
            first = emit.bind(block * _BLOCK)
            present = emit.bind(emit.lesser(count - first, _BLOCK))
            with emit.loop(present // _LANES) as vector:
                compute(first + vector * _LANES, _LANES)
            with emit.loop(present % _LANES) as rest:
                compute(first + present - 1 - rest, 1)

    return emit.primitive_function(name, body)
