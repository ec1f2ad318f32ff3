"""Run ``bitwright.scan`` with any body: a recursion over halves of the time axis.

The body stays a function of the module, called once a step. Around it stand three private functions
for each body, which TVM's virtual machine runs without Python::

    scan(captured, states, sequences):        # allocates the outputs, once
        if T < 1: states, outputs
        else: halve([0, T], captured, states, sequences, outputs)

    halve([i, n], ...):                       # recursion of depth log2 T
        if n - i < 2: step([i, n], ...)
        else: halve([m, n], ... of halve([i, m], ...)) with m = (i + n) // 2

    step([i, n], ...):                        # element i of the sequences, body, row i of outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 - TVM's name for its script language

from bitwright.errors import ModelError
from bitwright.passes.expressions import CallRewriter, calls, operator, with_span
from bitwright.passes.ops import SCAN

__all__ = ["lower"]


def lower(mod: tvm.IRModule) -> tvm.IRModule:
    """Replace all calls of ``bitwright.scan`` by calls of recursive functions.

    The new functions are pure for Relax: a row is written in place, but all that is written is
    handed on as a value. So calls of them may stand where the scan stood, in dataflow blocks too.

    Code generation comes first: TVM's ``RunCodegen`` follows calls of functions and never comes
    back from a recursive one. It has to be told the names of the bodies as entry functions.

    Raises
    ------
    ModelError
        If a scan has no sequence, or if the shape of an element of a sequence or an output is not
        known.
    """
    scans: dict[Any, Any] = {}
    builder = relax.BlockBuilder(mod)

    def rewrite(rewriter: CallRewriter, call: Any, _variable: Any) -> Any:
        if operator(call) != SCAN:
            return call
        body = call.args[0]
        operands = [rewriter.value(operand).fields for operand in call.args[1:]]
        key = body, len(operands[0]), len(operands[1])
        if key not in scans:
            scans[key] = _add(builder, *key)
        flat = [entry for fields in operands for entry in fields]
        result = rewriter.emit(with_span(relax.Call(scans[key], flat), call))
        kind = call.ty_args[0]
        # Where the caller knows less of its operands than of the result.
        same = tvm_ffi.structural_equal(result.ty, kind)
        return result if same else rewriter.builder_.match_cast(result, kind)

    for variable, function in mod.functions_items():
        if isinstance(function, relax.Function) and SCAN in map(operator, calls(function)):
            builder.update_func(variable, CallRewriter(mod, rewrite).visit_expr(function))
    return builder.get()


@dataclass(frozen=True)
class _Parameters:
    """Parameters of one of the functions; each function has symbolic sizes of its own."""

    captured: list[Any]
    states: list[Any]
    elements: list[Any]
    sequences: list[Any]
    outputs: list[Any]
    length: Any


def _parameters(name: str, body: Any, captured: int, states: int) -> _Parameters:
    fresh = relax.utils.copy_with_new_vars(body)
    length = tirx.Var("T", "int64")

    def stacked(prefix: str, elements: Sequence[Any]) -> list[Any]:
        if any(kind.shape is None for kind in elements):
            raise ModelError(
                f"the shape of an element of a scan's {prefix}s is not known",
                where=name,
                fix="fix the shapes of the model's inputs",
            )
        kinds = [relax.TensorType([length, *kind.shape], kind.dtype) for kind in elements]
        return [relax.Var(f"{prefix}{i}", kind) for i, kind in enumerate(kinds)]

    elements = list(fresh.params[captured + states :])
    if not elements:
        raise ModelError(
            "a scan goes over no sequence", where=name, fix="give it an input to go over"
        )
    return _Parameters(
        list(fresh.params[:captured]),
        list(fresh.params[captured : captured + states]),
        elements,
        stacked("sequence", [element.ty for element in elements]),
        stacked("output", list(fresh.ret_ty.fields[states:])),
        length,
    )


def _add(builder: Any, body: Any, captured: int, states: int) -> Any:
    """Add the three functions for a body; return the outermost one."""
    name = str(body.name_hint)
    function = builder.get()[body]

    def parameters() -> _Parameters:
        return _parameters(name, function, captured, states)

    step = _add_step(builder, body, parameters())
    halve = _add_halve(builder, step)
    return _add_scan(builder, halve, parameters())


def _span() -> tuple[Any, Any, Any]:
    """A parameter that holds the steps to do: those from ``i`` up to, not including, ``n``."""
    i, n = tirx.Var("i", "int64"), tirx.Var("n", "int64")
    return relax.Var("span", relax.ShapeType([i, n])), i, n


def _kinds(variables: Sequence[Any]) -> Any:
    return relax.TupleType([variable.ty for variable in variables])


def _add_step(builder: Any, body: Any, given: _Parameters) -> Any:
    span, i, _ = _span()
    fixed, carried = (relax.Var(name, relax.AnyType()) for name in ("fixed", "carried"))
    with builder.function(f"{body.name_hint}_step", [span, fixed, carried], private=True):
        fixed = builder.match_cast(fixed, _kinds([*given.captured, *given.sequences]))
        carried = builder.match_cast(carried, _kinds([*given.states, *given.outputs]))
        captured, sequences = _split(builder, fixed, len(given.captured))
        states, outputs = _split(builder, carried, len(given.states))
        elements = []
        for sequence, element in zip(sequences, given.elements, strict=True):
            take = builder.add_func(_move(sequence.ty, put=False), "take")
            elements.append(builder.emit(relax.op.call_tir(take, [sequence, i], element.ty)))
        result = builder.emit(relax.Call(body, [*captured, *states, *elements]))
        news, rows = _split(builder, result, len(states))
        results = [
            builder.match_cast(new, state.ty) for new, state in zip(news, states, strict=True)
        ]
        for output, row in zip(outputs, rows, strict=True):
            put = builder.add_func(_move(output.ty, put=True), "put")
            call = relax.op.call_tir_inplace(put, [output, i, row], 0, output.ty)
            results.append(builder.emit(call))
        return builder.emit_func_output(relax.Tuple(results))


def _split(builder: Any, fields: Any, number: int) -> tuple[list[Any], list[Any]]:
    """Fields of a tuple: as many as said, and the others."""
    each = [builder.emit(relax.TupleGetItem(fields, i)) for i in range(len(fields.ty.fields))]
    return each[:number], each[number:]


def _add_halve(builder: Any, step: Any) -> Any:
    span, i, n = _span()
    # Without types, for the virtual machine checks each of a function's parameters in each call.
    parameters = [span, relax.Var("fixed", relax.AnyType()), relax.Var("carried", relax.AnyType())]
    _, fixed, carried = parameters
    # Its type has to be known before its body can call it.
    stub = relax.Function.create_empty(parameters, relax.AnyType())
    halve = builder.add_func(stub, step.name_hint.removesuffix("_step") + "_halve")
    middle = tirx.floordiv(i + n, 2)
    # No branch allocates: TVM's memory planning would share what only one of them allocates.
    first = relax.Call(halve, [relax.ShapeExpr([i, middle]), fixed, carried])
    second = relax.Call(halve, [relax.ShapeExpr([middle, n]), fixed, first])
    choice = relax.If(n - i < 2, relax.Call(step, parameters), second)
    function = relax.Function(parameters, choice, relax.AnyType())
    builder.update_func(halve, builder.normalize(function))
    return halve


def _add_scan(builder: Any, halve: Any, given: _Parameters) -> Any:
    name = halve.name_hint.removesuffix("_halve") + "_scan"
    parameters = [*given.captured, *given.states, *given.sequences]
    with builder.function(name, parameters, private=True):
        # Not zeros: FoldConstant would make a constant of them, which the first run overwrites.
        outputs = [
            builder.emit(relax.op.builtin.alloc_tensor(output.ty.shape, str(output.ty.dtype), 0))
            for output in given.outputs
        ]
        fixed = relax.Tuple([*given.captured, *given.sequences])
        carried = relax.Tuple([*given.states, *outputs])
        steps = relax.Call(halve, [relax.ShapeExpr([0, given.length]), fixed, carried])
        result = builder.emit(relax.If(given.length < 1, carried, steps))
        return builder.emit_func_output(builder.match_cast(result, _kinds(carried.fields)))


def _move(stacked: Any, *, put: bool) -> Any:
    """TIR that writes an element into row ``i`` of a tensor, or else takes it from there."""
    # All that the buffers have to say is that their sizes agree.
    sizes = [
        size if isinstance(size, tirx.IntImm) else tirx.Var("size", "int64")
        for size in stacked.shape
    ]
    with IRBuilder() as builder:
        with T.prim_func(private=True):
            handles = [T.arg("stacked", T.handle())]
            row = T.arg("i", T.int64())
            handles.append(T.arg("element", T.handle()))
            shapes = sizes, sizes[1:]
            whole, element = (
                T.match_buffer(handle, shape, stacked.dtype)
                for handle, shape in zip(handles, shapes, strict=True)
            )
            with ExitStack() as loops:
                place = [loops.enter_context(T.serial(size)) for size in sizes[1:]]
                if put:
                    T.buffer_store(whole, element[tuple(place)], [row, *place])
                else:
                    T.buffer_store(element, whole[(row, *place)], place)
        return builder.get()
