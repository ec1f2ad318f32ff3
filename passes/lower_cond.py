"""Run ``bitwright.cond``: a function that holds a Relax If for each pair of branches.

::

    r = bitwright.cond(cls.then, cls.otherwise, c, (a, b))
                                                   ->  r = cls.then_or_otherwise(c, a, b)

    then_or_otherwise(c, a, b):
        if c: then(a, b)
        else: otherwise(a, b)

A call may stand in a dataflow block, where an If may not. And no branch allocates: TVM's memory
planning would share what only one of them allocates.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from bitwright.passes.expressions import CallRewriter, calls, operator, with_span
from bitwright.passes.ops import COND

__all__ = ["lower"]


def lower(mod: tvm.IRModule) -> tvm.IRModule:
    """Replace all calls of ``bitwright.cond`` by calls of functions.

    Code generation comes first: it has to be told the names of the branches as entry functions.
    """
    choices: dict[tuple[Any, Any], Any] = {}
    builder = relax.BlockBuilder(mod)

    def rewrite(rewriter: CallRewriter, call: Any, _variable: Any) -> Any:
        if operator(call) != COND:
            return call
        then, otherwise, condition, captured = call.args
        if (then, otherwise) not in choices:
            choices[then, otherwise] = _add_choice(builder, then, otherwise)
        arguments = [condition, *rewriter.value(captured).fields]
        choice = relax.Call(choices[then, otherwise], arguments)
        result = rewriter.emit(with_span(choice, call))
        kind = call.ty_args[0]
        # Where the caller knows less of its operands than of the result.
        same = tvm_ffi.structural_equal(result.ty, kind)
        return result if same else rewriter.builder_.match_cast(result, kind)

    for variable, function in mod.functions_items():
        if isinstance(function, relax.Function) and COND in map(operator, calls(function)):
            builder.update_func(variable, CallRewriter(mod, rewrite).visit_expr(function))
    return builder.get()


def _add_choice(builder: Any, then: Any, otherwise: Any) -> Any:
    captured = list(relax.utils.copy_with_new_vars(builder.get()[then]).params)
    condition = relax.Var("condition", relax.TensorType([], "bool"))
    name = f"{then.name_hint}_or_{otherwise.name_hint}"
    with builder.function(name, [condition, *captured], private=True):
        branches = [relax.Call(branch, captured) for branch in (then, otherwise)]
        return builder.emit_func_output(builder.emit(relax.If(condition, *branches)))
