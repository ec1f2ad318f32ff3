"""Decide where quantizers go: which operators of a float graph run in integers.

1. The data input of every layer is quantized at the layer's activation bits, in the body of a loop
   too.
2. Sums, products and averages of activations, and elementwise functions, that lie between layers
   get their inputs quantized at the plan's elementwise bits, so that they run in integers (a
   function becomes a table over its input codes).
3. Operators in the body of a loop stay float. With fixed point, the inputs of those that are sums,
   products, averages or elementwise functions are quantized at the plan's loop bits, and so is what
   leaves the body: new states and outputs.
4. What selective scans read is quantized where a plan says so; the scans stay float.
5. What a rotation reads is quantized like what elementwise operators read: it follows them.
6. Outputs of the model and all other operators stay float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from bitwright.quant.graph import (
    all_nodes,
    attribute,
    constant,
    data_inputs,
    elementwise_roots,
    graph_of,
    is_arithmetic,
    is_clamp,
    is_move,
    is_rotation,
    layers_of,
    loop_body,
    weight_input,
)
from bitwright.vocabulary import Activation, PrecisionPlan

__all__ = ["Placement"]


def _loops(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Graph]]:
    for node in graph:
        body = loop_body(node)
        if body is not None:
            yield node, body


def _states(node: ir.Node, body: ir.Graph) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
    """States at the start of a step of a Scan or Loop, and at its end."""
    if node.op_type == "Loop":  # the number of the step and the condition come first
        return body.inputs[2:], body.outputs[1 : len(body.inputs) - 1]
    count = len(body.inputs) - attribute(node, "num_scan_inputs")
    return body.inputs[:count], body.outputs[:count]


class Placement:
    """Which operators of a float graph run in integers.

    Parameters
    ----------
    graph
        The main graph.
    fixed_point_loops
        Whether elementwise operators in the bodies of loops do.
    scan_inputs
        Selective scan, or softplus in front of one, to the indices of inputs that are quantized,
        and how.
    """

    def __init__(
        self,
        graph: ir.Graph,
        *,
        fixed_point_loops: bool = False,
        scan_inputs: Mapping[ir.Node, Mapping[int, Activation]] | None = None,
    ) -> None:
        self.graph = graph
        self.scan_inputs = scan_inputs or {}
        self.layers = dict.fromkeys(layers_of(graph))  # in order of execution
        self.biases = dict(self._find_biases())
        self.roots = elementwise_roots(graph, excluded=self.biases)
        self._leads_to_layer = self._backward()
        self._from_layer = self._forward()
        # Of bodies in fixed point: states lead from each step to the next, so that all of it lies
        # between layers.
        self._in_bodies: set[ir.Value] = set()
        #: What leaves those bodies, and the state it becomes in the next step.
        self.leaving: dict[ir.Value, ir.Value | None] = {}
        for node, body in _loops(graph) if fixed_point_loops else ():
            states, new = _states(node, body)
            becomes = dict(zip(new, states, strict=True))
            for value in body.outputs:
                known = value.producer() is not None and value.shape is not None
                if known and value.dtype == ir.DataType.FLOAT:
                    self.leaving[value] = becomes.get(value)
            self.roots.update(elementwise_roots(body, excluded=self.biases))
            # onnxruntime collects no values of unknown rank.
            values = [*body.inputs, *(value for inner in body for value in inner.outputs)]
            self._in_bodies.update(value for value in values if value.shape is not None)
        # Found at once: whoever writes quantizers changes the graph while it asks.
        found = {value: self._find_table_root(value) for value in self.roots}
        self._table_roots = {value: root for value, root in found.items() if root is not None}

    def _find_biases(self) -> Iterable[tuple[ir.Node, ir.Node]]:
        """Adds of a constant vector directly behind a MatMul, which are its bias."""
        for node in self.layers:
            uses = node.outputs[0].uses()
            if node.op_type != "MatMul" or weight_input(node) != 1:
                continue
            if len(uses) != 1 or node.outputs[0].is_graph_output():
                continue
            follower, index = next(iter(uses))
            if follower.graph is not node.graph:  # inside a body
                continue
            weights = constant(node.inputs[1])
            if follower.op_type != "Add" or follower.domain != "" or weights is None:
                continue
            bias = constant(follower.inputs[1 - index])
            if (
                weights.ndim >= 2
                and bias is not None
                and bias.size == weights.shape[-1]
                and bias.shape[-1] == bias.size
                and bias.ndim <= len(node.outputs[0].shape or ())
            ):
                yield follower, node

    def _carries(self, node: ir.Node) -> bool:
        if node in self.biases or not node.outputs or node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        return (
            is_move(node)
            or is_clamp(node)
            or is_arithmetic(node)
            or (len(node.outputs) == 1 and node.outputs[0] in self.roots)
        )

    def _backward(self) -> set[ir.Value]:
        found: set[ir.Value] = set()
        for node in reversed(list(self.graph)):
            if node in self.layers:
                found.add(self.layer_input(node))
            elif node in self.scan_inputs:
                found.update(value for value, _ in self.scanned(node))
            elif (value := self.rotated(node)) is not None:
                found.add(value)
            elif self._carries(node) and any(value in found for value in node.outputs):
                found.update(v for v in self.operands(node))
        return found

    def _forward(self) -> set[ir.Value]:
        found: set[ir.Value] = set()
        for node in self.graph:
            computes = node in self.layers or node in self.biases
            if computes or (self._carries(node) and any(v in found for v in self.operands(node))):
                found.update(node.outputs)
        return found

    @staticmethod
    def layer_input(node: ir.Node) -> ir.Value:
        """The data input of a layer."""
        index = weight_input(node)
        assert index is not None
        value = node.inputs[1 - index]
        assert value is not None
        return value

    def scanned(self, node: ir.Node) -> list[tuple[ir.Value, Activation]]:
        """What a selective scan, or a softplus in front of one, reads quantized."""
        pairs = [(node.inputs[i], form) for i, form in self.scan_inputs.get(node, {}).items()]
        return [(value, form) for value, form in pairs if value is not None]

    @staticmethod
    def rotated(node: ir.Node) -> ir.Value | None:
        """What a rotation reads, if the node is the first of one."""
        value = node.inputs[0] if is_rotation(node) else None
        producer = None if value is None else value.producer()
        return None if producer is None or is_rotation(producer) else value

    @staticmethod
    def operands(node: ir.Node) -> list[ir.Value]:
        """Inputs that carry data and are computed."""
        values = [node.inputs[index] for index in data_inputs(node)]
        return [v for v in values if v is not None and constant(v) is None]

    def in_integers(self, value: ir.Value) -> bool:
        """Whether a value lies between layers."""
        return value in self._in_bodies or (
            value in self._leads_to_layer and value in self._from_layer
        )

    def table_root(self, value: ir.Value) -> ir.Value | None:
        """The value that a table computes ``value`` from; None where there is no table.

        A chain of clamps alone needs no table: it narrows the range of the codes.
        """
        return self._table_roots.get(value)

    def _find_table_root(self, value: ir.Value) -> ir.Value | None:
        root = self.roots.get(value)
        if root is None:
            return None
        between = root in self._from_layer and value in self._leads_to_layer
        collected = root in self._in_bodies or graph_of(root) is self.graph
        if not between and not (value in self._in_bodies and collected):
            return None
        pending, seen = [value], set()
        clamps_only = True
        while pending:
            current = pending.pop()
            if current is root or current in seen:
                continue
            seen.add(current)
            node = current.producer()
            assert node is not None
            clamps_only = clamps_only and is_clamp(node)
            pending.extend(self.operands(node))
        return None if clamps_only else root

    def has_bias(self, node: ir.Node) -> bool:
        """Whether a layer has, or can be given, a constant bias that can be shifted."""
        if node.op_type == "MatMul":
            return node in self.biases.values()
        return (
            len(node.inputs) < 3 or node.inputs[2] is None or constant(node.inputs[2]) is not None
        )

    def is_integer_arithmetic(self, node: ir.Node) -> bool:
        """Whether a node adds, multiplies or averages activations between layers."""
        return (
            is_arithmetic(node)
            and node not in self.biases
            and node.outputs[0] not in self.roots
            and node.outputs[0].dtype == ir.DataType.FLOAT
            and self.in_integers(node.outputs[0])
            and (node.graph is self.graph or all(v.shape is not None for v in self.operands(node)))
        )

    def elementwise(self, node: ir.Node, plan: PrecisionPlan) -> Activation:
        """Form of what an operator without weights reads, if it computes in integers."""
        return Activation(plan.elementwise_bits if node.graph is self.graph else plan.loop_bits)

    def wanted(self, plan: PrecisionPlan) -> list[tuple[ir.Value, Activation]]:
        """Tensors to quantize, with the form of their codes."""
        return list({**self.wanted_layers(plan), **self.wanted_elementwise(plan)})

    def wanted_layers(self, plan: PrecisionPlan) -> dict[tuple[ir.Value, Activation], None]:
        """Those that layers read."""
        return {
            (self.layer_input(node), plan.layers[str(node.name)].activation): None
            for node in self.layers
        }

    def wanted_elementwise(self, plan: PrecisionPlan) -> dict[tuple[ir.Value, Activation], None]:
        """Those that operators without weights read, or that leave a loop in fixed point.

        Among them those that selective scans and rotations read.
        """
        found: dict[tuple[ir.Value, Activation], None] = {}
        targets = [self.layer_input(node) for node in self.layers]
        for node in self.scan_inputs:
            for value, form in self.scanned(node):
                found[value, form] = None
                targets.append(value)
        for node in all_nodes(self.graph):
            rotated = self.rotated(node)
            if rotated is not None and self.in_integers(rotated):
                found[rotated, self.elementwise(node, plan)] = None
                targets.append(rotated)
            if node not in self.layers and self.is_integer_arithmetic(node):
                for value in self.operands(node):
                    found[value, self.elementwise(node, plan)] = None
                    targets.append(value)
        for value in self.leaving:
            found[value, Activation(plan.loop_bits)] = None
            targets.append(value)
        # Quantizers move in front of operators that only carry values; tables may lie behind those.
        seen: set[ir.Value] = set()
        while targets:
            value = targets.pop()
            if value in seen:
                continue
            seen.add(value)
            root = self.table_root(value)
            producer = value.producer()
            if root is not None:
                assert producer is not None
                found[root, self.elementwise(producer, plan)] = None
                targets.append(root)
                continue
            if producer is not None and (self.is_hoistable(producer) or is_clamp(producer)):
                targets.extend(self.operands(producer))
        return found

    def is_hoistable(self, node: ir.Node) -> bool:
        """Whether a quantizer behind the node may stand in front of it instead."""
        return (
            is_move(node)
            # In a loop, a sequence from outside would be quantized whole in every step.
            and all(graph_of(value) is node.graph for value in self.operands(node))
            and node.outputs[0].dtype == ir.DataType.FLOAT
            and all(attr.type != ir.AttributeType.GRAPH for attr in node.attributes.values())
        )
