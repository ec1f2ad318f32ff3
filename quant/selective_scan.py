"""Find the selective scans of a graph by what the bodies of its Scan operators compute.

A selective scan (Mamba, arXiv 2312.00752, section 3.2) has one state: ``h' = a * h + b``,
``y = sum(C * h')`` along one axis of the state, plus perhaps terms without the state (``D * x``).
``a`` is a product of inputs and of exponentials without the state (``exp(dt * A)``), ``b`` a
product without the state (``dt * B * x``). In which order operands stand does not matter, nor which
products are computed inside or outside; see :mod:`~bitwright.quant.polynomials`. The pass
``LowerScan`` decides by the same rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from bitwright.quant.float_ops import captured_values
from bitwright.quant.graph import (
    attribute,
    constant,
    data_inputs,
    is_elementwise,
    is_move,
    loop_body,
)
from bitwright.quant.polynomials import (
    NEW,
    ONE,
    Atom,
    OtherForm,
    Polynomial,
    Reading,
    add,
    atom_of,
    frozen,
    is_parameter,
    matrix_product,
    moved,
    multiply,
    sources_of,
    without,
)

__all__ = ["ROLES", "SelectiveScan", "selective_scan_roles", "selective_scans"]

ROLES: Final = ("x", "dt", "B", "C")
"""What a selective scan reads; ``x`` is the input that is scanned, ``u`` in other texts."""


@dataclass(frozen=True, slots=True)
class SelectiveScan:
    """A Scan that computes a selective scan.

    Attributes
    ----------
    node
        The Scan.
    inputs
        Role to the index of the Scan's input that holds it; roles that are constant, captured or
        part of a product computed outside are left out.
    """

    node: ir.Node
    inputs: Mapping[str, int]

    @property
    def tensors(self) -> dict[int, ir.Value]:
        """What enters the Scan in a role, by the index of the input."""
        values = ((index, self.node.inputs[index]) for index in self.inputs.values())
        return {index: value for index, value in values if value is not None}

    @property
    def places(self) -> dict[str, tuple[ir.Node, int]]:
        """Names of tensors that can be quantized for it, to the node and input that read them.

        Those that enter it, and what the softplus in front of ``dt`` reads: one step before a
        softplus is one step of ``dt`` where it is large, and a constant factor where it is small.
        Between the two may stand sums and products with constants, and moves.
        """
        found = {str(value.name): (self.node, index) for index, value in self.tensors.items()}
        value = self.value("dt")
        node = None if value is None else value.producer()
        while node is not None and (node.op_type in ("Add", "Mul") or is_move(node)):
            data = [node.inputs[index] for index in data_inputs(node)]
            computed = [value for value in data if constant(value) is None]
            value = computed[0] if len(computed) == 1 else None
            node = None if value is None else value.producer()
        if node is not None and node.op_type == "Softplus" and node.inputs[0] is not None:
            found[str(node.inputs[0].name)] = (node, 0)
        return found

    def value(self, role: str) -> ir.Value | None:
        """The tensor of a role, as it enters the Scan."""
        return self.node.inputs[self.inputs[role]] if role in self.inputs else None


def selective_scans(graph: ir.Graph) -> list[SelectiveScan]:
    """Find the selective scans of a graph with known shapes, in order of execution.

    Bodies of loops are not searched.
    """
    found = []
    for node in graph:
        body = loop_body(node)
        if body is None or node.op_type != "Scan":
            continue
        if len(node.inputs) - attribute(node, "num_scan_inputs") != 1:
            continue
        try:
            reading = _Body(node, body)
        except OtherForm:
            continue
        roles = selective_scan_roles(reading)
        if roles is not None:
            state = reading.state
            inputs = {role: roles[role] - state for role in ROLES if roles[role] > state}
            found.append(SelectiveScan(node, inputs))
    return found


# -- rules -----------------------------------------------------------------------------------------


def selective_scan_roles(reading: Reading) -> dict[str, int] | None:
    """The roles of its parameters if a body is a selective scan; None if it is none.

    Returns
    -------
    dict
        ``x``, ``dt``, ``B`` and ``C`` to the index of the parameter that holds it, or that it is a
        function of; -1 where it is a constant, part of a product that is computed outside, or
        cannot be told from others.
    """
    stateful = {reading.state, NEW}
    kept = [p for p in reading.new if without(p, reading.state) is not None]
    if len(kept) != 1 or reading.new[kept[0]] != 1.0 or len(reading.outputs) != 1:
        return None
    decay = without(kept[0], reading.state)
    added = {product: number for product, number in reading.new.items() if product != kept[0]}
    # A factor that is a sum, as a softplus of dt, makes several products; the others are in all.
    common = frozenset[tuple[Atom, int]].intersection(*added) if added else ONE
    if not sources_of(added) & reading.held or sources_of(added) & stateful or not common:
        return None
    if len(added) == 1 and set(added.values()) != {1.0}:
        return None
    if not decay or not all(
        atom.name in ("constant", "exp", "parameter") and atom.sources.isdisjoint(stateful)
        for atom in decay
    ):
        return None
    output = _weighted_sum(reading.outputs[0], stateful)
    if output is None:
        return None
    weights, axis = output
    return _roles(reading, decay, [atom for product in added for atom, _ in product], weights, axis)


def _weighted_sum(output: Polynomial, stateful: set[int]) -> tuple[list[Atom], int] | None:
    """Weights of the new state in the sum that an output is, and the axis of the state."""
    with_state = [product for product in output if sources_of({product: 1.0}) & stateful]
    if len(with_state) != 1 or output[with_state[0]] != 1.0:
        return None
    (total, power), *others = with_state[0]
    if others or power != 1 or total.name != "sum":
        return None
    terms, axes = total.key
    ((product, number), *more) = terms
    states = [atom for atom, power in product if is_parameter(atom, NEW) and power == 1]
    weights = [atom for atom, _ in product if not is_parameter(atom, NEW)]
    if more or number != 1.0 or len(states) != 1 or len(axes) != 1 or not weights:
        return None
    (state,) = states
    summed = axes[0]
    if summed not in state.axes or not any(summed in atom.axes for atom in weights):
        return None
    if any(atom.sources & stateful for atom in weights):
        return None
    return weights, state.made[state.axes.index(summed)]


def _roles(
    reading: Reading, decay: list[Atom], added: list[Atom], weights: list[Atom], axis: int
) -> dict[str, int]:
    """Which parameter is what; ``axis`` of the state is the one that is summed along."""
    (state,) = {a for p in reading.new for a, _ in p if is_parameter(a, reading.state)}
    channels = [other for other in state.made if other != axis][-1:]

    def only(atoms: Sequence[Atom], taken: Sequence[int] = ()) -> int:
        found = {index for atom in atoms for index in atom.sources & reading.held} - set(taken)
        found = {index for index in found if index > reading.state} or found  # sequences first
        return found.pop() if len(found) == 1 else -1

    steps = [
        factor
        for atom in decay
        if atom.name == "exp"
        for product, _ in atom.key[1]
        for factor, _ in product
        # Where the exponential was made, the axis may have stood elsewhere.
        if axis not in atom.axes or atom.made[atom.axes.index(axis)] not in factor.axes
    ]
    dt = only([atom for atom in steps if atom.sources])
    inputs = [a for a in added if axis not in a.axes and set(channels) <= set(a.axes)]
    mixed = [a for a in added if axis in a.axes and set(channels) & set(a.axes)]
    return {
        "x": only(inputs, [dt]),
        "dt": dt,
        "B": -1 if mixed else only([a for a in added if axis in a.axes]),
        "C": only(weights),
    }


# -- reading a body --------------------------------------------------------------------------------

# They only insert, remove or repeat axes of size 1; of a reshape that is to be seen.
_RESHAPES = frozenset("Expand Flatten Reshape Squeeze Unsqueeze".split())


class _Body:
    """The new state and the output of a Scan's body; see :class:`~polynomials.Reading`."""

    def __init__(self, node: ir.Node, body: ir.Graph) -> None:
        self._values: dict[ir.Value, Polynomial] = {}
        self._shapes: dict[ir.Value, list[Any]] = {}  # those that shape inference leaves open
        captured = [value for value in captured_values(node) if constant(value) is None]
        self.state = len(captured)
        parameters = [*captured, *body.inputs]
        for index, value in enumerate(parameters):
            self._values[value] = self._parameter(index, value)
        self.held = set(range(len(parameters))) - {self.state}
        new = _unnamed(body.outputs[0])
        self.new: Polynomial = {}
        for inner in body:
            if inner.domain != "" or len(inner.outputs) != 1:
                raise OtherForm
            (result,) = inner.outputs
            self._values[result] = self._computed(inner)
            if result is new:
                self.new = self._values[result]
                self._values[result] = self._parameter(NEW, result)
        self.outputs = [self._value(value) for value in body.outputs[1:]]

    def _parameter(self, index: int, value: ir.Value) -> Polynomial:
        return atom_of("parameter", [index], self._long_axes(value), frozenset({index}))

    def _value(self, value: ir.Value | None) -> Polynomial:
        array = constant(value)
        if value is None or (array is None and value not in self._values):
            raise OtherForm
        if array is None:
            return self._values[value]
        if array.size == 1 and array.dtype.kind == "f":
            return {ONE: float(array.item())}
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        key = [array.shape, array.dtype.name, digest]
        return atom_of("constant", key, self._long_axes(value), frozenset())

    def _computed(self, node: ir.Node) -> Polynomial:
        kind = node.op_type
        if kind == "Identity":
            return self._value(node.inputs[0])
        if kind in ("Add", "Sub", "Mul"):
            first, second = map(self._value, node.inputs)
            if kind == "Mul":
                return multiply(first, second)
            return add(first, second, 1.0 if kind == "Add" else -1.0)
        if kind == "Neg":
            return add({}, self._value(node.inputs[0]), -1.0)
        if kind == "Transpose":
            rank = len(self._shape(node.outputs[0]))
            order = attribute(node, "perm") or range(rank)[::-1]
            place = {old - rank: new - rank for new, old in enumerate(order)}
            return moved(self._value(node.inputs[0]), place.__getitem__)
        if kind == "ReduceSum":
            return self._reduced(node)
        if kind == "MatMul":
            left, right = map(self._value, node.inputs)
            right_rank = len(self._shape(node.inputs[1]))
            return self._summed(matrix_product(left, right, right_rank), (-1,), node)
        if kind == "Einsum":
            return self._einsum(node)
        if kind in _RESHAPES and (moves := self._places(node)) is not None:
            return moved(self._value(node.inputs[0]), moves.__getitem__)
        return self._other(node)

    def _summed(self, operand: Polynomial, axes: tuple[int, ...], node: ir.Node) -> Polynomial:
        made = self._long_axes(node.outputs[0])
        return atom_of("sum", [frozen(operand), axes], made, sources_of(operand))

    def _reduced(self, node: ir.Node) -> Polynomial:
        rank = len(self._shape(node.inputs[0]))
        given = node.inputs[1] if len(node.inputs) > 1 else None
        chosen = constant(given)
        if given is not None and chosen is None:
            raise OtherForm
        if chosen is None or chosen.size == 0:
            if attribute(node, "noop_with_empty_axes", 0):
                return self._value(node.inputs[0])
            chosen = np.arange(rank)
        axes = tuple(sorted(int(axis) % rank - rank for axis in chosen.reshape(-1)))
        return self._summed(self._value(node.inputs[0]), axes, node)

    def _einsum(self, node: ir.Node) -> Polynomial:
        """Products along the axes of the result, and behind those the ones that are summed."""
        equation = str(attribute(node, "equation")).replace(" ", "")
        terms, arrow, result = equation.partition("->")
        operands = terms.split(",")
        if not arrow or "." in equation or any(len(set(t)) < len(t) for t in (*operands, result)):
            raise OtherForm
        summed = sorted(set(terms) - set(result) - {","})
        order = [*result, *summed]
        product: Polynomial = {ONE: 1.0}
        for labels, value in zip(operands, node.inputs, strict=True):
            place = {
                axis - len(labels): order.index(label) - len(order)
                for axis, label in enumerate(labels)
            }
            product = multiply(product, moved(self._value(value), place.__getitem__))
        if not summed:
            return product
        return self._summed(product, tuple(range(-len(summed), 0)), node)

    def _other(self, node: ir.Node) -> Polynomial:
        """A function that the polynomials do not look into."""
        if any(entry.type == ir.AttributeType.GRAPH for entry in node.attributes.values()):
            raise OtherForm
        attributes = sorted((name, str(entry.value)) for name, entry in node.attributes.items())
        operands = [None if value is None else self._value(value) for value in node.inputs]
        key = [str(attributes), *(None if entry is None else frozen(entry) for entry in operands)]
        sources = [sources_of(entry) for entry in operands if entry is not None]
        name = node.op_type.lower()
        return atom_of(
            name, key, self._long_axes(node.outputs[0]), frozenset[int]().union(*sources)
        )

    def _shape(self, value: ir.Value | None) -> list[Any]:
        """Sizes of a value: numbers, or what ONNX IR has for others."""
        if value is None:
            raise OtherForm
        if value.shape is not None:
            return list(value.shape)
        if value not in self._shapes:
            self._shapes[value] = self._infer(value)
        return self._shapes[value]

    def _infer(self, value: ir.Value) -> list[Any]:
        """The sizes where those of a body depend on constants outside, as ONNX does not infer."""
        node = value.producer()
        if node is None:
            raise OtherForm
        shapes = [self._shape(entry) for entry in node.inputs if entry is not None]
        kind = node.op_type
        if kind in ("Unsqueeze", "Squeeze", "ReduceSum"):
            axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
            if axes is None:
                raise OtherForm
            rank = len(shapes[0]) + (axes.size if kind == "Unsqueeze" else 0)
            chosen = {int(axis) % rank for axis in axes.reshape(-1)}
            if kind == "Unsqueeze":
                left = iter(shapes[0])
                return [1 if axis in chosen else next(left) for axis in range(rank)]
            if kind == "ReduceSum" and attribute(node, "keepdims", 1):
                return [1 if axis in chosen else size for axis, size in enumerate(shapes[0])]
            return [size for axis, size in enumerate(shapes[0]) if axis not in chosen]
        if kind == "Transpose":
            order = attribute(node, "perm") or range(len(shapes[0]))[::-1]
            return [shapes[0][axis] for axis in order]
        if kind == "MatMul" and min(map(len, shapes)) > 1:
            left_shape, right_shape = shapes
            batch = _broadcast([left_shape[:-2], right_shape[:-2]])
            return [*batch, left_shape[-2], right_shape[-1]]
        if kind == "Identity" or is_elementwise(node):
            return _broadcast(shapes)
        raise OtherForm

    def _long_axes(self, value: ir.Value | None) -> list[int]:
        """Axes whose size is not known to be 1, from the last one."""
        sizes = self._shape(value)
        return [axis - len(sizes) for axis, size in enumerate(sizes) if size != 1]

    def _places(self, node: ir.Node) -> dict[int, int] | None:
        """Where a reshape moves the axes whose size is not 1; None if it does more than that."""
        if node.op_type == "Expand":
            return {axis: axis for axis in range(-len(self._shape(node.inputs[0])), 0)}
        before, after = self._shape(node.inputs[0]), self._shape(node.outputs[0])
        old, new = self._long_axes(node.inputs[0]), self._long_axes(node.outputs[0])
        sizes = [(before[a], after[b]) for a, b in zip(old, new, strict=False)]
        same = len(old) == len(new) and all(_is_known(a) and a == b for a, b in sizes)
        return dict(zip(old, new, strict=True)) if same else None


def _broadcast(shapes: Sequence[Sequence[Any]]) -> list[Any]:
    rank = max(map(len, shapes))
    padded = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True)]


def _unnamed(value: ir.Value) -> ir.Value:
    """What a value is another name of."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_known(size: Any) -> bool:
    return isinstance(size, int) or size.value is not None
