"""What the files of the importer share: expressions, and the builder that names them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy.typing as npt
import onnx_ir as ir
from tvm import relax
from tvm.ir import SourceName, Span

__all__ = ["Builder", "Expr", "all_inputs", "const", "is_call"]

#: A value of the graph in Relax.
Expr: TypeAlias = Any


def is_call(expr: Expr) -> bool:
    """Whether an expression has to be bound to a variable before it is used."""
    return isinstance(expr, relax.Call | relax.TupleGetItem)


def const(array: npt.NDArray[Any]) -> Expr:
    """A constant of the array's own type; TVM would narrow 64 bits."""
    return relax.const(array, array.dtype.name)


def all_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs that a node is given."""
    return [value for value in node.inputs if value is not None]


class Builder(relax.BlockBuilder):
    """Gives every call, and its variable, the name of the ONNX node in conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.node_name = ""
        self._emitted: dict[Expr, Expr] = {}

    def start(self, node_name: str) -> None:
        """Name what follows."""
        self.node_name = node_name
        self._emitted.clear()

    def emit(self, expr: Expr, name_hint: str = "") -> Expr:
        """Bind an expression; calls inside it are bound one by one."""
        name = self.node_name or name_hint
        # The function has this name, and would be given another.
        return super().emit(self._named(expr), "main_" if name == "main" else name)

    def normalize(self, expr: Expr) -> Expr:
        """Infer the type of an expression; calls inside it are bound one by one."""
        return super().normalize(self._named(expr))

    def _named(self, expr: Expr) -> Expr:
        if isinstance(expr, relax.Call):
            arguments = [self._atom(argument) for argument in expr.args]
            span = Span(SourceName(self.node_name), 1, 1, 1, 1) if self.node_name else expr.span
            return relax.Call(expr.op, arguments, expr.attrs, expr.ty_args, span)
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._atom(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._atom(field) for field in expr.fields])
        return expr

    def _atom(self, expr: Expr) -> Expr:
        if isinstance(expr, relax.Tuple):
            return self._named(expr)
        if not is_call(expr):
            return expr
        if expr not in self._emitted:  # an expression may stand twice in one
            self._emitted[expr] = self.emit(expr)
        return self._emitted[expr]
