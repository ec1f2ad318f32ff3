"""Import Scan, Loop and If: bodies become functions of the module.

A Scan, and a Loop as a scan of the numbers 0, 1, ..., is a call of ``bitwright.scan``, an If one of
``bitwright.cond``; see ``bitwright.passes.ops``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm_ffi
from tvm import relax, tirx

from bitwright.import_builder import Builder, Expr, all_inputs, const, is_call
from bitwright.passes import ops
from bitwright.passes.expressions import Sizes, global_variable, substituted
from bitwright.quant.float_ops import Array, captured_values
from bitwright.quant.graph import ENDLESS, attribute, constant

__all__ = ["ControlFlow", "renewed"]


class ControlFlow(ABC):
    """The importer's part for operators that hold graphs.

    The abstract methods are what it asks of the importer.

    Attributes
    ----------
    bb
        Builds the function that nodes are converted in.
    analyzer
        Knows the bounds of symbolic sizes.
    bodies
        Functions of bodies, by their global variables.
    """

    bb: Builder
    analyzer: Any
    bodies: dict[Any, Any]

    @abstractmethod
    def outputs(self, graph: ir.Graph) -> list[Expr]:
        """Convert the nodes of a graph that it needs; return the values of its outputs."""

    @abstractmethod
    def scope(
        self, captured: Mapping[ir.Value, Expr], sizes: Sizes
    ) -> AbstractContextManager[None]:
        """Build another function meanwhile, in which captured values are the given ones."""

    @abstractmethod
    def expr(self, value: ir.Value) -> Expr:
        """A value as a variable or a constant."""

    @abstractmethod
    def bind(self, value: ir.Value, expr: Expr) -> None:
        """Give a value another expression."""

    @abstractmethod
    def fold(self, value: ir.Value, array: Array) -> None:
        """Make a value known at compile time."""

    @abstractmethod
    def constant(self, value: ir.Value | None) -> Array | None:
        """Array of a value that is known at compile time; None for others."""

    @abstractmethod
    def stored(self, value: ir.Value | None) -> Any | None:
        """Constant codes behind DequantizeLinear; None for any other value."""

    @abstractmethod
    def integers(self, value: ir.Value | None) -> Array | None:
        """Small integers that are known, as numbers or symbolic expressions; None for others."""

    @abstractmethod
    def size(self, name: str) -> Any:
        """A new symbolic size."""

    @abstractmethod
    def inferred_size(self, value: ir.Value, axis: int) -> Any:
        """A size of a value, as ONNX infers it, or else a new one."""

    @abstractmethod
    def known_shape(self, value: ir.Value) -> list[Any] | None:
        """Sizes of a value, numbers or symbolic expressions; None where they are not known."""

    @abstractmethod
    def simplify(self, entry: Any) -> Any:
        """A number where a symbolic expression is one."""

    @abstractmethod
    def equal(self, a: Any, b: Any) -> bool | None:
        """Whether two numbers or symbolic expressions are equal; None where it is not known."""

    # -- loops -------------------------------------------------------------------------------------

    def scan(self, node: ir.Node) -> list[Expr]:
        """Outputs of a Scan."""
        graph, count = _body(node), attribute(node, "num_scan_inputs")
        values = all_inputs(node)
        states = [self.expr(value) for value in values[:-count]]
        axes = attribute(node, "scan_input_axes") or (0,) * count
        directions = attribute(node, "scan_input_directions") or (0,) * count
        sequences = []
        for value, axis, backward in zip(values[-count:], axes, directions, strict=True):
            expr = self._axis_moved(self.expr(value), axis, 0)
            sequences.append(self.bb.emit(relax.op.flip(expr, 0)) if backward else expr)
        for expr in sequences[1:]:
            first, other = sequences[0].ty.shape[0], expr.ty.shape[0]
            if self.equal(self.simplify(first), self.simplify(other)) is False:
                raise ValueError(f"its sequences are of lengths {first} and {other}")

        def step(old: list[Expr], elements: list[Expr]) -> list[Expr]:
            return self.run_body(graph, [*old, *elements])

        results = self._scan(node, states, sequences, step)
        outputs = results[len(states) :]
        axes = attribute(node, "scan_output_axes") or (0,) * len(outputs)
        directions = attribute(node, "scan_output_directions") or (0,) * len(outputs)
        for number, (axis, backward) in enumerate(zip(axes, directions, strict=True)):
            expr = self.bb.emit(outputs[number])
            expr = self.bb.emit(relax.op.flip(expr, 0)) if backward else expr
            outputs[number] = self._axis_moved(expr, 0, axis)
        return [*results[: len(states)], *outputs]

    def loop(self, node: ir.Node) -> list[Expr]:
        """A scan of the numbers of the iterations; one that ends early leaves the others out."""
        graph = _body(node)
        trips, condition = node.inputs[:2]
        states = [
            self.expr(value)
            for value in all_inputs(node)[(trips is not None) + (condition is not None) :]
        ]
        bound = self.constant(trips)
        if trips is None or (bound is not None and bound.item() >= ENDLESS):
            raise ValueError("it is a loop without a bound: give it a trip count")
        sequences = [self._iterations(trips)]
        # Entries of a tensor outside, at the number of the step, are elements of a sequence.
        numbered = _gathers_at_number(graph)
        for inner in numbered:
            assert inner.inputs[0] is not None
            whole_data = self.expr(inner.inputs[0])
            entries = relax.op.take(whole_data, sequences[0], axis=0, mode="clip")
            sequences.append(self.bb.emit(entries))
        known = None if condition is None else self.constant(condition)
        whole = _stays_true(graph) and (condition is None or (known is not None and known.all()))
        flag = relax.const(True, "bool")
        if not whole:
            if condition is not None:
                flag = self.bb.emit(relax.op.reshape(self.expr(condition), []))
            states = [*states, flag, relax.const(0, "int64")]

        def step(old: list[Expr], elements: list[Expr]) -> list[Expr]:
            for inner, element in zip(numbered, elements[1:], strict=True):
                self.bind(inner.outputs[0], element)
            if whole:
                self.fold(graph.inputs[1], np.array(True))
                given = [elements[0], flag, *old]
                return self.run_body(graph, given)[1:]
            *before, running, done = old
            further, *results = self.run_body(graph, [elements[0], running, *before])
            emit = self.bb.emit
            news = results[: len(before)]
            kept = [emit(relax.op.where(running, *pair)) for pair in zip(news, before, strict=True)]
            for index, entry in enumerate(results[len(before) :], len(before)):
                # An output that is a new state is cut off where the state stays.
                same = [kept[number] for number, new in enumerate(news) if entry.same_as(new)]
                results[index] = same[0] if same else entry
            results[: len(before)] = kept
            further = emit(relax.op.logical_and(running, relax.op.reshape(further, [])))
            done = emit(relax.op.add(done, relax.op.astype(running, "int64")))
            results[len(before) : len(before)] = [further, done]
            return [self.bb.emit(entry) if is_call(entry) else entry for entry in results]

        results = self._scan(node, states, sequences, step)
        if whole:
            return results
        count = len(states) - 2
        done = self.bb.emit(results[count + 1])
        outputs = [self._first(self.bb.emit(entry), done) for entry in results[count + 2 :]]
        return [*results[:count], *outputs]

    def _scan(
        self,
        node: ir.Node,
        states: Sequence[Expr],
        sequences: Sequence[Expr],
        step: Callable[[list[Expr], list[Expr]], list[Expr]],
        *,
        checked: bool = False,
    ) -> list[Expr]:
        """Run a body for each element along axis 0 of sequences.

        Parameters
        ----------
        node
            The operator; what its bodies read of this graph is handed to the body.
        states, sequences
            The initial states, and what is scanned.
        step
            Emits the body: takes states and elements, returns new states and elements of outputs.
        checked
            Whether what the body checks of its parameters was moved in front of it.

        Returns
        -------
        list
            The last states, then the outputs, stacked along axis 0.
        """
        captured = self._captured(node)
        sizes = Sizes()
        outer = [expr.ty for expr in (*captured.values(), *states)]
        outer += [relax.TensorType(list(expr.ty.shape)[1:], expr.ty.dtype) for expr in sequences]
        if any(kind.shape is None for kind in outer):
            raise ValueError("the shape of something that its body reads is not known")
        parameters = [relax.Var(f"p{i}", sizes.renewed(kind)) for i, kind in enumerate(outer)]
        count = len(states)

        def emit(inner: list[Expr]) -> list[Expr]:
            results = step(inner[:count], inner[count:])
            known = self._states(inner[:count], results)
            for number, new in enumerate(results[count:], count):
                # An output that is a state has its type.
                matches = [n for n in range(count) if results[n].same_as(new)]
                results[number] = known[matches[0]] if matches else new
            return [*known, *results[count:]]

        function = self._outlined(captured, parameters, sizes, emit)
        facts = [] if checked else _checked_sizes(function, sizes)
        if facts:
            # What the body checks of sizes is checked once, in front of the loop.
            given = [*captured.values(), *states, *sequences]
            for number, expr in enumerate(given):
                known = list(expr.ty.shape)
                dims = [_replaced(size, facts) for size in known]
                if any(a is not b for a, b in zip(dims, known, strict=True)):
                    given[number] = self.bb.match_cast(expr, relax.TensorType(dims, expr.ty.dtype))
            for value, expr in zip(captured, given, strict=False):
                self.bind(value, expr)
            first, last = len(captured), len(captured) + count
            return self._scan(node, given[first:last], given[last:], step, checked=True)
        body = self._add(f"{node.name}_body", function)

        length = sequences[0].ty.shape[0]
        kinds = [expr.ty for expr in states]
        for number, field in enumerate(function.ret_ty.fields[count:]):
            if field.shape is None:
                raise ValueError(f"the shape of its output {number} is computed in its body")
            kinds.append(relax.TensorType([length, *map(sizes.original, field.shape)], field.dtype))
        self.bb.start(str(node.name))
        call = ops.scan(body, list(captured.values()), states, sequences, relax.TupleType(kinds))
        result = self.bb.emit(call)
        return [relax.TupleGetItem(result, index) for index in range(len(kinds))]

    def _outlined(
        self,
        captured: Mapping[ir.Value, Expr],
        parameters: list[Expr],
        sizes: Sizes,
        emit: Callable[[list[Expr]], list[Expr]],
    ) -> Any:
        """A function of what ``emit`` emits of the parameters behind the captured values."""
        with self.scope(dict(zip(captured, parameters, strict=False)), sizes):
            with self.bb.function("body", parameters, private=True):
                try:
                    with self.bb.dataflow():
                        results = emit(parameters[len(captured) :])
                        result = self.bb.emit_output(relax.Tuple(results))
                except BaseException:
                    self.bb._end_block()  # else TVM complains on stderr
                    raise
                self.bb.emit_func_output(result)
            (function,) = self.bb.get().functions.values()
        return function

    def _states(self, states: Sequence[Expr], results: Sequence[Expr]) -> list[Expr]:
        """New states, which keep the types of the old ones; where unknown, checked at run time."""
        found = []
        for number, (old, new) in enumerate(zip(states, results, strict=False)):
            before, after = old.ty, new.ty
            fits: bool | None = before.dtype == after.dtype and before.ndim in (after.ndim, -1)
            if isinstance(after.shape, relax.ShapeExpr):
                pairs = zip(before.shape, after.shape, strict=False)
                equal = [self.equal(self.simplify(a), self.simplify(b)) for a, b in pairs]
                fits = fits and (False if False in equal else None if None in equal else True)
            elif fits:
                fits = None
            if fits is False:
                raise ValueError(f"its body changes state {number} from {before} to {after}")
            found.append(new if fits else self.bb.match_cast(new, before))
        return found

    def _captured(self, node: ir.Node) -> dict[ir.Value, Expr]:
        """What the bodies of a node read of the graph around it, constants aside."""
        return {
            value: self.expr(value)
            for value in captured_values(node)
            if self.constant(value) is None and self.stored(value) is None
        }

    def _add(self, name: str, function: Any) -> Any:
        """Add a function to the module."""
        name = re.sub(r"\W", "_", name)
        count = sum(bool(re.fullmatch(rf"{name}(_\d+)?", v.name_hint)) for v in self.bodies)
        variable = global_variable(f"{name}_{count}" if count else name, function)
        self.bodies[variable] = function
        return variable

    def run_body(self, graph: ir.Graph, inputs: Sequence[Expr]) -> list[Expr]:
        """Convert a body; return the values of its outputs."""
        for value, expr in zip(graph.inputs, inputs, strict=True):
            self.bind(value, expr)
        return self.outputs(graph)

    def _axis_moved(self, expr: Expr, source: int, target: int) -> Expr:
        rank = expr.ty.ndim
        source, target = source % rank, target % rank
        if source == target:
            return expr
        order = [axis for axis in range(rank) if axis != source]
        order.insert(target, source)
        return self.bb.emit(relax.op.permute_dims(expr, order))

    def _iterations(self, trips: ir.Value) -> Expr:
        """The numbers 0, 1, ... of a loop's iterations."""
        known = self.integers(trips)
        if known is not None:
            count = known.item()
            if isinstance(count, int):
                count = max(count, 0)
            elif self.analyzer.const_int_bound(count).min_value < 0:
                count = tirx.max(count, tirx.const(0, "int64"))
        else:
            vector = relax.op.reshape(self.expr(trips), [1])
            positive = self.bb.emit(relax.op.maximum(vector, relax.const(0, "int64")))
            shape = self.bb.emit(relax.op.tensor_to_shape(positive))
            count = self.size(f"{trips.name}_count")
            self.bb.match_cast(shape, relax.ShapeType([count]))
        return self.bb.emit(relax.op.arange(0, count, 1, "int64"))

    def _first(self, expr: Expr, count: Expr) -> Expr:
        """The first ``count`` elements along axis 0."""
        rank = expr.ty.ndim
        zeros, ones = const(np.zeros(rank, np.int64)), const(np.ones(rank, np.int64))
        sizes = relax.op.shape_to_tensor(relax.op.shape_of(expr))
        rest = relax.op.strided_slice(sizes, [0], [1], [rank]) if rank > 1 else None
        end = relax.op.reshape(count, [1])
        end = end if rest is None else relax.op.concat([self.bb.emit(end), self.bb.emit(rest)])
        return relax.op.dynamic_strided_slice(expr, zeros, self.bb.emit(end), ones)

    # -- branches ----------------------------------------------------------------------------------

    def branches(self, node: ir.Node) -> list[Expr]:
        """Outputs of an If: of one branch where the condition is known, else of a function each."""
        condition = node.inputs[0]
        assert condition is not None
        graphs = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        known = self.constant(condition)
        if known is not None:
            return self.run_body(graphs[0] if known.any() else graphs[1], ())
        if self._removes_axis(condition, *graphs):
            return self.run_body(graphs[0], ())
        flag = self.expr(condition)
        if flag.ty.ndim != 0:
            flag = self.bb.emit(relax.op.reshape(flag, []))
        captured = self._captured(node)
        then, first = self._branch(f"{node.name}_then", graphs[0], captured)
        other, second = self._branch(f"{node.name}_else", graphs[1], captured)
        kinds = [self._either(*entry) for entry in zip(node.outputs, first, second, strict=True)]
        known_kinds = [
            relax.TensorType(dtype=kind.dtype, ndim=kind.ndim) if made else kind
            for kind, made in kinds
        ]
        self.bb.start(str(node.name))
        call = ops.cond(then, other, flag, list(captured.values()), relax.TupleType(known_kinds))
        result = self.bb.emit(call)
        outputs = []
        for index, (kind, made) in enumerate(kinds):
            field = relax.TupleGetItem(result, index)
            outputs.append(self.bb.match_cast(self.bb.emit(field), kind) if made else field)
        return outputs

    def _branch(
        self, name: str, graph: ir.Graph, captured: Mapping[ir.Value, Expr]
    ) -> tuple[Any, list[_Kind]]:
        """A function of a branch, and what it returns."""
        sizes = Sizes()
        parameters = [
            relax.Var(f"p{index}", sizes.renewed(expr.ty))
            for index, expr in enumerate(captured.values())
        ]
        kinds: list[_Kind] = []

        def emit(_: list[Expr]) -> list[Expr]:
            results = self.run_body(graph, ())
            kinds.extend(_Kind.outside(entry.ty, sizes) for entry in results)
            return results

        function = self._outlined(captured, parameters, sizes, emit)
        return self._add(name, function), kinds

    def _either(self, value: ir.Value, first: _Kind, second: _Kind) -> tuple[Any, bool]:
        """Type of what one of two branches returns, and whether it holds a new size."""
        if first.dtype != second.dtype:
            raise ValueError(f"its branches return {first.dtype} and {second.dtype}")
        if first.sizes is None or second.sizes is None or len(first.sizes) != len(second.sizes):
            ranks = ["?" if kind.sizes is None else len(kind.sizes) for kind in (first, second)]
            raise ValueError(
                f"its branches return {ranks[0]} and {ranks[1]} axes, so that its condition must be"
                " known: fix the sizes that it depends on with --input-shape"
            )
        sizes, made = [], False
        for axis, (a, b) in enumerate(zip(first.sizes, second.sizes, strict=True)):
            same = a is not None and b is not None and self.equal(a, b)
            made = made or not same
            sizes.append(a if same else self.inferred_size(value, axis))
        return relax.TensorType(sizes, first.dtype), made

    def _removes_axis(self, condition: ir.Value, then: ir.Graph, other: ir.Graph) -> bool:
        """Whether an If is what exporters write to remove an axis if its size is 1.

        As the number of axes must be known, the axis goes; the Squeeze checks its size at run time.
        """
        squeezed, kept = _only_node(then), _only_node(other)
        test = condition.producer()
        while test is not None and test.op_type in ("Cast", "Identity"):
            source = test.inputs[0]
            test = None if source is None else source.producer()
        if squeezed is None or squeezed.op_type != "Squeeze" or test is None:
            return False
        data, axes = squeezed.inputs[0], squeezed.inputs[1] if len(squeezed.inputs) > 1 else None
        source = kept.inputs[0] if kept is not None else other.outputs[0]
        if data is None or source is not data or (kept and kept.op_type != "Identity"):
            return False
        chosen, shape = self.constant(axes), self.known_shape(data)
        if test.op_type != "Equal" or chosen is None or chosen.size != 1 or shape is None:
            return False
        size = shape[chosen.item()]
        sides = [self.integers(value) for value in test.inputs]
        compared = [side.item() for side in sides if side is not None and side.size == 1]
        return len(compared) == 2 and any(
            self.equal(a, size) is True and self.equal(b, 1) is True
            for a, b in (compared, compared[::-1])
        )


@dataclass(frozen=True)
class _Kind:
    """Type of a result of a branch, in the sizes outside; None where a size is computed inside."""

    dtype: str
    sizes: list[Any] | None

    @classmethod
    def outside(cls, kind: Any, sizes: Sizes) -> _Kind:
        known = isinstance(kind.shape, relax.ShapeExpr)
        dims = map(sizes.outside, kind.shape) if known else [None] * kind.ndim
        return cls(str(kind.dtype), None if kind.ndim == -1 else list(dims))


def _only_node(graph: ir.Graph) -> ir.Node | None:
    """The node of a graph that has one besides constants."""
    nodes = [node for node in graph if node.op_type != "Constant"]
    return nodes[0] if len(nodes) == 1 else None


def _stays_true(graph: ir.Graph) -> bool:
    """Whether the condition that a loop's body returns is the one it gets, or constantly true."""
    value: ir.Value | None = graph.outputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("Identity", "Cast"):
            return False
        value = producer.inputs[0]
    array = constant(value)
    return value is graph.inputs[1] or (array is not None and bool(array.all()))


def _gathers_at_number(graph: ir.Graph) -> list[ir.Node]:
    """Nodes in the body of a Loop that take the entry of a tensor outside that its number names."""
    inside = {*graph.inputs, *(value for node in graph for value in node.outputs)}
    return [
        node
        for node in graph
        if node.op_type == "Gather"
        and node.domain == ""
        and attribute(node, "axis", 0) == 0
        and node.inputs[1] is graph.inputs[0]
        and node.inputs[0] not in inside
    ]


def _body(node: ir.Node) -> ir.Graph:
    return node.attributes["body"].as_graph()


def _checked_sizes(function: Any, sizes: Sizes) -> list[tuple[Any, Any]]:
    """Sizes outside of a body, and what the body checks that they are: pairs of old and new ones.

    No size stands on both sides.
    """
    found: list[tuple[Any, Any]] = []
    variables = {new for _, new in sizes.known}
    for block in function.body.blocks:
        for binding in block.bindings:
            if not isinstance(binding, relax.MatchCast):
                continue
            if not isinstance(binding.ty, relax.TensorType) or binding.value.ty.shape is None:
                continue
            for old, new in zip(binding.value.ty.shape, binding.ty.shape, strict=True):
                fixed = isinstance(new, tirx.IntImm) or new in variables
                if old not in variables or not fixed:
                    continue
                # A body may check one size against another, and later that one against the first.
                one, other = (_replaced(sizes.original(size), found) for size in (old, new))
                if isinstance(one, tirx.IntImm):
                    one, other = other, one
                if not isinstance(one, tirx.IntImm) and not tvm_ffi.structural_equal(one, other):
                    found = [(size, _replaced(known, [(one, other)])) for size, known in found]
                    found.append((one, other))
    return found


def _replaced(size: Any, facts: Sequence[tuple[Any, Any]]) -> Any:
    for old, new in facts:
        if tvm_ffi.structural_equal(old, size):
            return new
    return size


def renewed(integers: Array, sizes: Sizes) -> Array | None:
    """Integers in the size variables of a body; None where it has no such variables."""
    variables = {old: new for old, new in sizes.known if isinstance(old, tirx.Var)}
    result = np.empty(integers.shape, object)
    for index, entry in np.ndenumerate(integers):
        result[index] = entry if isinstance(entry, int) else substituted(entry, variables)
    return None if any(entry is None for entry in result.flat) else result
