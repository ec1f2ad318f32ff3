"""Codes of an activation as kernels read them: centred, as int16."""

from __future__ import annotations

from bitwright.targets.kernels import emit, soft_edge
from bitwright.targets.kernels.emit import Buffer, Expr
from bitwright.targets.kernels.spec import Operand

__all__ = ["centred", "padding_code"]


def centred(data: Buffer, offset: Expr, operand: Operand, lanes: int) -> Expr:
    """Read codes and subtract the operand's offset, or decode them: int16."""
    if operand.layout is not None:
        codes = emit.load(data, offset, lanes)
        return emit.cast(soft_edge.decoded(operand.layout, codes, lanes), "int16", lanes)
    codes = emit.cast(emit.load(data, offset, lanes), "int16", lanes)
    if operand.offset == 0:
        return codes
    return codes - emit.constant(_wrap(operand.offset), "int16", lanes)


def padding_code(operand: Operand) -> int:
    """What stands for zero among centred codes."""
    return operand.zero_point - operand.offset


def _wrap(value: int) -> int:
    """The int16 that equals a number modulo 2^16."""
    return (value + 2**15) % 2**16 - 2**15
