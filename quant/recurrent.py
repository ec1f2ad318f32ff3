"""Write LSTM, GRU and RNN out in operators that everybody knows.

One product with constant weights serves the inputs of all steps at once: a layer like any other.
What is left of each step, the product with the hidden state and a few elementwise operators, is
the body of a Scan, whose size does not depend on the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.quant.float_ops import Array
from bitwright.quant.graph import attribute, constant

__all__ = ["decompose"]

# Operator to gates and activation functions. The gates of an LSTM are stored in the order input,
# output, forget, cell; those of a GRU update, reset, hidden.
_GATES: Final = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DEFAULTS: Final = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
_INPUTS: Final = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_DIRECTIONS: Final = {
    "forward": (False,),
    "reverse": (True,),
    "bidirectional": (False, True),
}

# Function to the parameters it takes, with their defaults: those of the operator of that name.
# There is none for Affine and ScaledTanh (onnxruntime takes 0, which makes them constant), so they
# must be given. For ThresholdedRelu, too, onnxruntime takes 0 where the operator's default is 1.
_FUNCTIONS: Final[dict[str, dict[str, float | None]]] = {
    "Relu": {},
    "Tanh": {},
    "Sigmoid": {},
    "Affine": {"alpha": None, "beta": None},
    "LeakyRelu": {"alpha": 0.01},
    "ThresholdedRelu": {"alpha": 1.0},
    "ScaledTanh": {"alpha": None, "beta": None},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Elu": {"alpha": 1.0},
    "Softsign": {},
    "Softplus": {},
}
_FUNCTION_NAMES: Final = {name.lower(): name for name in _FUNCTIONS}

# What is constant stays an array until an operator reads it, so that NumPy can rearrange it.
_Operand: TypeAlias = ir.Value | Array


@dataclass(frozen=True, slots=True)
class _Function:
    """An activation function with its parameters."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True, slots=True)
class _Cell:
    """A recurrent node, checked. Sizes that are not static are None."""

    node: ir.Node
    inputs: dict[str, ir.Value]
    dtype: np.dtype[Any]
    hidden: int
    steps: int | None
    batch: int | None
    reverse: tuple[bool, ...]  # one entry a direction
    functions: tuple[tuple[_Function, ...], ...]  # f, g, h, each with one entry a direction
    clip: float | None
    batch_first: bool
    input_forget: bool
    linear_before_reset: bool

    @property
    def directions(self) -> int:
        return len(self.reverse)

    @property
    def rows(self) -> int:
        """Rows of W and R in one direction."""
        return _GATES[self.node.op_type] * self.hidden

    def operand(self, name: str) -> _Operand:
        """An input that is there, as an array where it is constant."""
        value = self.inputs[name]
        array = constant(value)
        return value if array is None else array


@dataclass(frozen=True, slots=True)
class _Builder:
    """A list of new nodes, each named after the node that they replace.

    Attributes
    ----------
    main
        The main graph; it holds the weights of all bodies.
    graph
        The graph of the node that is replaced; it holds axes and sizes, whose values shape
        inference does not see from inside a body if they are outside.
    taken
        Names of all nodes and values of the model; grows.
    prefix
        Name of the node that is replaced.
    nodes
        The new nodes, in order.
    constants
        The small constants made so far, by their content.
    """

    main: ir.Graph
    graph: ir.Graph
    taken: set[str]
    prefix: str
    nodes: list[ir.Node] = field(default_factory=list)
    constants: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)

    def body(self) -> _Builder:
        """A second list of nodes, for the body of a node."""
        return replace(self, nodes=[])

    def name(self, word: str) -> str:
        wanted = name = f"{self.prefix}/{word}"
        count = 0
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return name

    def value(self, word: str, operand: _Operand) -> ir.Value:
        """The operand itself, or an initializer of the main graph with its array."""
        if isinstance(operand, ir.Value):
            return operand
        return self._initializer(self.main, word, operand)

    def _initializer(self, graph: ir.Graph, word: str, array: Array) -> ir.Value:
        name = self.name(word)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array.copy(), name=name),
        )
        graph.register_initializer(value)
        return value

    def constant(self, array: Array) -> ir.Value:
        """An initializer for small things like axes and bounds, one for all that are equal."""
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self._initializer(self.graph, "constant", array)
        return self.constants[key]

    def many(
        self,
        op_type: str,
        word: str,
        *inputs: _Operand | Sequence[int],
        outputs: int,
        **options: Any,
    ) -> list[ir.Value]:
        """Append a node; arrays and lists of integers among its inputs become initializers."""
        values = [
            operand if isinstance(operand, ir.Value) else self.constant(np.asarray(operand))
            for operand in inputs
        ]
        name = self.name(word)
        names = [name] if outputs == 1 else [self.name(f"{word}.{i}") for i in range(outputs)]
        made = [ir.Value(name=one) for one in names]
        self.nodes.append(ir.node(op_type, values, options, outputs=made, name=name))
        return made

    def one(
        self, op_type: str, word: str, *inputs: _Operand | Sequence[int], **options: Any
    ) -> ir.Value:
        """Append a node with one output."""
        return self.many(op_type, word, *inputs, outputs=1, **options)[0]

    # What follows computes with NumPy if it can.

    def transpose(self, word: str, operand: _Operand, perm: Sequence[int]) -> _Operand:
        if isinstance(operand, ir.Value):
            return self.one("Transpose", word, operand, perm=perm)
        return operand.transpose(perm)

    def reshape(self, word: str, operand: _Operand, shape: Sequence[int]) -> _Operand:
        if isinstance(operand, ir.Value):
            return self.one("Reshape", word, operand, shape)
        return operand.reshape(shape)

    def split(
        self, word: str, operand: _Operand, sizes: Sequence[int], axis: int
    ) -> Sequence[_Operand]:
        if isinstance(operand, ir.Value):
            return self.many("Split", word, operand, sizes, outputs=len(sizes), axis=axis)
        return np.split(operand, np.cumsum(sizes)[:-1], axis)

    def add(self, word: str, first: _Operand, second: _Operand) -> _Operand:
        if isinstance(first, ir.Value) or isinstance(second, ir.Value):
            return self.one("Add", word, first, second)
        return np.asarray(first + second)


def decompose(model: ir.Model, where: str) -> bool:
    """Replace every LSTM, GRU and RNN by a MatMul for its inputs and a Scan for its steps.

    The nodes of the main graph and of all bodies are replaced. The new nodes are named after the
    old one: ``{node}/input`` is the MatMul of all steps, with constant weights of both directions
    and all gates; ``{node}/scan`` is the Scan; ``{node}/recurrent`` (and
    ``{node}/recurrent_candidate`` of a GRU that resets first) is the MatMul of a step, inside its
    body, with weights that the main graph holds. Shapes of the new values are left to shape
    inference. Equations: documentation of the ONNX operators; where that is silent (lengths of 0),
    as onnxruntime.

    Parameters
    ----------
    model
        The model, with operator set 21 or later, all nodes named; changed in place.
    where
        The file, for messages.

    Returns
    -------
    bool
        Whether anything was replaced.

    Raises
    ------
    ModelError
        If an attribute is unknown, or a weight or state does not fit.
    """
    nodes = [
        node for node in model.graph.all_nodes() if node.domain == "" and node.op_type in _GATES
    ]
    if not nodes:
        return False
    taken: set[str] = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        taken.update(str(value.name) for value in (*graph.inputs, *graph.initializers.values()))
        for node in graph:
            taken.update(str(value.name) for value in node.outputs)
            taken.add(str(node.name))
    for node in nodes:
        assert isinstance(node.graph, ir.Graph)
        build = _Builder(model.graph, node.graph, taken, str(node.name))
        _replace(_check(node, where), build)
    return True


# -- what is read from the node ------------------------------------------------------------------


def _check(node: ir.Node, where: str) -> _Cell:
    title = f"{node.op_type} {node.name!r}"

    def refuse(what: str, fix: str = "export the model again") -> NoReturn:
        raise ModelError(f"{title} {what}", where=where, fix=fix)

    inputs = {
        name: value for name, value in zip(_INPUTS, node.inputs, strict=False) if value is not None
    }
    if missing := [name for name in ("X", "W", "R") if name not in inputs]:
        refuse(f"has no input {missing[0]}")
    direction = str(attribute(node, "direction", "forward"))
    if direction not in _DIRECTIONS:
        refuse(f"has the unknown direction {direction!r}", f"use one of {', '.join(_DIRECTIONS)}")
    layout = attribute(node, "layout", 0)
    if layout not in (0, 1):
        refuse(f"has the unknown layout {layout}", "use 0 (time first) or 1 (batch first)")
    clip = attribute(node, "clip")
    if clip is not None and not clip > 0:
        refuse(f"clips at {clip:g}, which is not positive", "leave clip out or make it positive")
    reverse = _DIRECTIONS[direction]
    functions = _functions(node, len(reverse), refuse)

    dims = {name: _dims(value) for name, value in inputs.items()}
    hidden = attribute(node, "hidden_size", dims["R"][2] if len(dims["R"]) == 3 else None)
    if not isinstance(hidden, int):
        refuse("does not say its hidden size", "export the model with the attribute hidden_size")
    if hidden < 1:
        refuse(f"has a hidden size of {hidden}")
    x = dims["X"] if len(dims["X"]) == 3 else (None, None, None)
    steps, batch = (x[1], x[0]) if layout else (x[0], x[1])
    features = dims["W"][2] if len(dims["W"]) == 3 else None
    features = x[2] if features is None else features
    if 0 in (steps, batch, features):
        refuse(f"has an empty input X ({inputs['X'].name!r}) of shape {_show(dims['X'])}")
    directions, rows = len(reverse), _GATES[node.op_type] * hidden
    state = (batch, directions, hidden) if layout else (directions, batch, hidden)
    expected: dict[str, tuple[int | None, ...]] = {
        "X": (batch, steps, features) if layout else (steps, batch, features),
        "W": (directions, rows, features),
        "R": (directions, rows, hidden),
        "B": (directions, 2 * rows),
        "sequence_lens": (batch,),
        "initial_h": state,
        "initial_c": state,
        "P": (directions, 3 * hidden),
    }
    for name, value in inputs.items():
        if value.shape is not None and not _fits(dims[name], expected[name]):
            refuse(
                f"has {name} ({value.name!r}) of shape {_show(dims[name])}, "
                f"expected {_show(expected[name])} for {direction} and hidden size {hidden}"
            )
    lengths = constant(inputs.get("sequence_lens"))
    if lengths is not None and lengths.size:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0:
            refuse(f"has a sequence length of {low}, which is negative")
        if steps is not None and high > steps:
            refuse(f"has a sequence length of {high}, but its input has {steps} steps")
        if steps is not None and low == steps:
            del inputs["sequence_lens"]  # nothing is cut off: many exporters write it all the same
    known = [inputs[name].dtype for name in ("X", "W", "R")]
    dtype = next((found for found in known if found is not None), ir.DataType.FLOAT)
    return _Cell(
        node=node,
        inputs=inputs,
        dtype=np.dtype(dtype.numpy()),
        hidden=hidden,
        steps=steps,
        batch=batch,
        reverse=reverse,
        functions=functions,
        clip=clip,
        batch_first=layout == 1,
        input_forget=attribute(node, "input_forget", 0) != 0,
        linear_before_reset=node.op_type == "GRU"
        and attribute(node, "linear_before_reset", 0) != 0,
    )


def _functions(
    node: ir.Node, directions: int, refuse: Callable[..., NoReturn]
) -> tuple[tuple[_Function, ...], ...]:
    defaults = _DEFAULTS[node.op_type]
    count = len(defaults) * directions
    names = list(attribute(node, "activations", defaults * directions))
    if node.op_type == "RNN" and len(names) == 2:
        names = names[:count]  # the default in the operator's schema has two, whatever direction
    if len(names) != count:
        refuse(
            f"has {len(names)} activations, expected {count}",
            f"give {len(defaults)} for each direction",
        )
    given = {
        parameter: iter(attribute(node, f"activation_{parameter}", ()))
        for parameter in ("alpha", "beta")
    }
    found = []
    for name in names:
        if name.lower() not in _FUNCTION_NAMES:
            refuse(f"has the unknown activation {name!r}", f"use one of {', '.join(_FUNCTIONS)}")
        function = _FUNCTION_NAMES[name.lower()]
        parameters: dict[str, float] = {}
        for parameter, default in _FUNCTIONS[function].items():
            number = next(given[parameter], default)  # others take none from the list
            if number is None:
                refuse(
                    f"uses {function} without activation_{parameter}, which has no default",
                    f"give activation_{parameter}",
                )
            parameters[parameter] = float(number)
        found.append(_Function(function, **parameters))
    return tuple(tuple(found[i :: len(defaults)]) for i in range(len(defaults)))


def _dims(value: ir.Value) -> tuple[int | None, ...]:
    """Static sizes, None where one is not known; empty where not even the rank is."""
    shape = () if value.shape is None else value.shape
    return tuple(size if isinstance(size, int) else None for size in shape)


def _fits(dims: Sequence[int | None], expected: Sequence[int | None]) -> bool:
    return len(dims) == len(expected) and all(
        size is None or wanted is None or size == wanted
        for size, wanted in zip(dims, expected, strict=True)
    )


def _show(dims: Sequence[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in dims)}]"


# -- around the steps ----------------------------------------------------------------------------


def _replace(cell: _Cell, build: _Builder) -> None:
    """Build the nodes, put them in front of the old node and remove that."""
    node = cell.node
    wanted = {
        index: value
        for index, value in enumerate(node.outputs)
        if value.name and (value.uses() or value.is_graph_output())
    }
    x = cell.inputs["X"]
    if cell.batch_first:
        x = build.one("Transpose", "time_first", x, perm=[1, 0, 2])
    lengths = cell.inputs.get("sequence_lens")
    if lengths is not None:
        lengths = build.one("Cast", "lengths", lengths, to=ir.DataType.INT64)
    states = _initial_states(cell, build, x, lengths)
    scanned = [_products(cell, build, x, lengths)]
    if lengths is not None:
        scanned.append(_mask(cell, build, x, lengths))
    body = _body(cell, build, masked=lengths is not None, keep=0 in wanted)
    last = build.many(
        "Scan",
        "scan",
        *states,
        *scanned,
        outputs=len(body.outputs),
        body=body,
        num_scan_inputs=len(scanned),
    )
    for index, old in wanted.items():
        if index == 0:
            new = _in_time(cell, build, last[-1], lengths)
        else:
            new = last[index - 1]
        if cell.batch_first:
            perm = [1, 0, 2] if index else [2, 0, 1, 3]
            new = build.one("Transpose", f"batch_first_{index}", new, perm=perm)
        new.name, old.name = old.name, None
        if new.shape is None:
            new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    build.graph.insert_before(node, build.nodes)
    inputs = {value for value in node.inputs if value is not None}
    build.graph.remove(node, safe=True)
    for value in inputs:
        used = value.uses() or value.is_graph_output() or value.is_graph_input()
        if value.is_initializer() and not used and isinstance(value.graph, ir.Graph):
            del value.graph.initializers[str(value.name)]


def _products(cell: _Cell, build: _Builder, x: ir.Value, lengths: ir.Value | None) -> ir.Value:
    """Input products of all steps [T, D, B, G * H], in the order in which they are needed."""
    directions, rows, hidden = cell.directions, cell.rows, cell.hidden
    weights = build.transpose("input_transpose", cell.operand("W"), [2, 0, 1])
    weights = build.reshape("input_reshape", weights, [-1, directions * rows])
    product = build.one("MatMul", "input", x, build.value("input_weight", weights))
    if "B" in cell.inputs:
        own, recurrent = build.split("bias_split", cell.operand("B"), [rows, rows], 1)
        if cell.linear_before_reset:  # the last part is added in the body
            inside, _ = build.split("bias_parts", recurrent, [2 * hidden, hidden], 1)
            nothing = np.zeros((directions, hidden), cell.dtype)
            if isinstance(inside, ir.Value):
                recurrent = build.one("Concat", "bias_concat", inside, nothing, axis=1)
            else:
                recurrent = np.concatenate([inside, nothing], 1)
        bias = build.reshape("bias_reshape", build.add("bias_sum", own, recurrent), [-1])
        product = build.one("Add", "bias", product, build.value("input_bias", bias))
    parts = [product]
    if directions == 2:
        parts = build.many("Split", "directions", product, outputs=2, axis=2, num_outputs=2)
    for index, backward in enumerate(cell.reverse):
        if backward:
            parts[index] = _reverse(cell, build, "reverse", parts[index], lengths)
    parts = [build.one("Unsqueeze", "direction", part, [1]) for part in parts]
    return parts[0] if directions == 1 else build.one("Concat", "steps", *parts, axis=1)


def _in_time(cell: _Cell, build: _Builder, y: ir.Value, lengths: ir.Value | None) -> ir.Value:
    """Outputs of all steps [T, D, B, H] in the order of time."""
    if not any(cell.reverse):
        return y
    parts = [y]
    if cell.directions == 2:
        parts = build.many("Split", "output_directions", y, outputs=2, axis=1, num_outputs=2)
    backward = parts[-1]
    if lengths is not None:  # ReverseSequence wants the batch beside the time
        backward = build.one("Squeeze", "output_squeeze", backward, [1])
    backward = _reverse(cell, build, "output_reverse", backward, lengths)
    if lengths is not None:
        backward = build.one("Unsqueeze", "output_unsqueeze", backward, [1])
    if cell.directions == 1:
        return backward
    return build.one("Concat", "output", parts[0], backward, axis=1)


def _reverse(
    cell: _Cell, build: _Builder, word: str, value: ir.Value, lengths: ir.Value | None
) -> ir.Value:
    """Turn axis 0 around; with lengths only so many first steps of each entry of axis 1."""
    if lengths is not None:
        return build.one("ReverseSequence", word, value, lengths, time_axis=0, batch_axis=1)
    value = build.one("Slice", word, value, [-1], [np.iinfo(np.int64).min], [0], [-1])
    shape = cell.inputs["X"].shape
    if shape is not None:
        # Shape inference does not see that the result is as long, and would lose a symbol.
        rank = 4 if word == "output_reverse" else 3
        value.shape = ir.Shape([shape[1 if cell.batch_first else 0], *[None] * (rank - 1)])
        value.type = ir.TensorType(ir.DataType.from_numpy(cell.dtype))
    return value


def _mask(cell: _Cell, build: _Builder, x: ir.Value, lengths: ir.Value) -> ir.Value:
    """Whether a step lies within its sequence, [T, 1, B, 1]."""
    lengths = build.one("Unsqueeze", "lengths_column", lengths, [1])
    if cell.steps is not None:
        times: _Operand = np.arange(cell.steps).reshape(-1, 1, 1, 1)
    else:
        count = build.one("Shape", "time", x, start=0, end=1)
        zero, one = np.array(0), np.array(1)
        times = build.one(
            "Range", "times", zero, build.one("Squeeze", "time_scalar", count, [0]), one
        )
        times = build.one("Unsqueeze", "times_column", times, [1, 2, 3])
    return build.one("Less", "mask", times, lengths)


def _initial_states(
    cell: _Cell, build: _Builder, x: ir.Value, lengths: ir.Value | None
) -> list[ir.Value]:
    """The states [D, B, H] before the first step."""
    names = ["initial_h", "initial_c"] if cell.node.op_type == "LSTM" else ["initial_h"]
    given: dict[str, ir.Value] = {}
    for name in names:
        if name in cell.inputs:
            state = cell.operand(name)
            if cell.batch_first:
                state = build.transpose(f"{name}_time_first", state, [1, 0, 2])
            given[name] = build.value(name, state)
    if lengths is not None and given:
        # onnxruntime: the last state of an empty sequence is 0, whatever its first one is.
        column = build.one("Unsqueeze", "lengths_of_states", lengths, [1])
        some = build.one("Greater", "not_empty", column, np.array(0))
        nothing = np.zeros((), cell.dtype)
        for name, value in given.items():
            given[name] = build.one("Where", f"{name}_kept", some, value, nothing)
    if len(given) == len(names):
        return list(given.values())
    if cell.batch is not None:
        shape = (cell.directions, cell.batch, cell.hidden)
        zeros = build.value("initial_zeros", np.zeros(shape, cell.dtype))
    else:
        batch = build.one("Shape", "batch", x, start=1, end=2)
        sizes = build.one("Concat", "state", [cell.directions], batch, [cell.hidden], axis=0)
        zero = ir.tensor(np.zeros(1, cell.dtype))
        zeros = build.one("ConstantOfShape", "initial_zeros", sizes, value=zero)
    return [given.get(name, zeros) for name in names]


# -- one step ------------------------------------------------------------------------------------


def _body(cell: _Cell, build: _Builder, *, masked: bool, keep: bool) -> ir.Graph:
    """One step: states, products and mask to the next states and, if asked for, the output."""
    inner = build.body()

    def value(word: str, width: int) -> ir.Value:
        shape = ir.Shape([cell.directions, cell.batch, width])
        kind = ir.TensorType(ir.DataType.from_numpy(cell.dtype))
        return ir.Value(name=inner.name(word), shape=shape, type=kind)

    x = value("step", cell.rows)
    states = [value("h", cell.hidden)]
    if cell.node.op_type == "LSTM":
        states.append(value("c", cell.hidden))
    inputs = [*states, x]
    new = _STEPS[cell.node.op_type](cell, build, inner, x, *states)
    if masked:
        mask = ir.Value(
            name=inner.name("inside"),
            shape=ir.Shape([1, cell.batch, 1]),
            type=ir.TensorType(ir.DataType.BOOL),
        )
        inputs.append(mask)
        output = new[0]
        new = [
            inner.one("Where", f"{word}_kept", mask, after, before)
            for word, after, before in zip("hc", new, states, strict=False)
        ]
    outputs = list(new)
    if keep and masked:
        nothing = np.zeros((), cell.dtype)
        outputs.append(inner.one("Where", "output_step", mask, output, nothing))
    elif keep:  # a value can be an output once only
        outputs.append(inner.one("Identity", "output_step", new[0]))
    return ir.Graph(inputs, outputs, nodes=inner.nodes, name=f"{build.prefix}/body")


def _lstm(
    cell: _Cell, build: _Builder, inner: _Builder, x: ir.Value, h: ir.Value, c: ir.Value
) -> list[ir.Value]:
    f, g, last = cell.functions
    weights = build.transpose("recurrent_transpose", cell.operand("R"), [0, 2, 1])
    product = inner.one("MatMul", "recurrent", h, build.value("recurrent_weight", weights))
    gates = inner.one("Add", "gates", x, product)
    i, o, forget, new = inner.many("Split", "gate", gates, outputs=4, axis=2, num_outputs=4)
    if "P" in cell.inputs:
        shape = [cell.directions, 1, 3 * cell.hidden]
        peepholes = build.reshape("peephole_reshape", cell.operand("P"), shape)
        p_i, p_o, p_f = build.split("peephole_split", peepholes, [cell.hidden] * 3, 2)
        p_i, p_o, p_f = (build.value("peephole_weight", part) for part in (p_i, p_o, p_f))
        i = inner.one("Add", "input_sum", i, inner.one("Mul", "input_peephole", c, p_i))
        forget = inner.one("Add", "forget_sum", forget, inner.one("Mul", "forget_peephole", c, p_f))
    i = _activate(cell, inner, "input_gate", i, f)
    if cell.input_forget:
        forget = inner.one("Sub", "forget_gate", np.ones((), cell.dtype), i)
    else:
        forget = _activate(cell, inner, "forget_gate", forget, f)
    new = _activate(cell, inner, "candidate", new, g)
    new = inner.one("Mul", "candidate_part", i, new)
    c = inner.one("Add", "cell", inner.one("Mul", "forget_part", forget, c), new)
    if "P" in cell.inputs:
        o = inner.one("Add", "output_sum", o, inner.one("Mul", "output_peephole", c, p_o))
    o = _activate(cell, inner, "output_gate", o, f)
    # As in onnxruntime, clip is for the gates: the cell's state is not clipped.
    shown = _activate(replace(cell, clip=None), inner, "cell_output", c, last)
    return [inner.one("Mul", "hidden", o, shown), c]


def _gru(cell: _Cell, build: _Builder, inner: _Builder, x: ir.Value, h: ir.Value) -> list[ir.Value]:
    f, g = cell.functions
    hidden = cell.hidden
    weights = build.transpose("recurrent_transpose", cell.operand("R"), [0, 2, 1])
    # Equal parts only: shape inference does not see the value of a constant outside of the body.
    x_z, x_r, x_new = inner.many("Split", "step_gate", x, outputs=3, axis=2, num_outputs=3)
    if not cell.linear_before_reset:
        weights, new_weights = build.split("recurrent_split", weights, [2 * hidden, hidden], 2)
    product = inner.one("MatMul", "recurrent", h, build.value("recurrent_weight", weights))
    parts = 3 if cell.linear_before_reset else 2
    z, r, *new_part = inner.many(
        "Split", "recurrent_gate", product, outputs=parts, axis=2, num_outputs=parts
    )
    z = _activate(cell, inner, "update_gate", inner.one("Add", "update_sum", x_z, z), f)
    r = _activate(cell, inner, "reset_gate", inner.one("Add", "reset_sum", x_r, r), f)
    if cell.linear_before_reset:
        new = new_part[0]
        if "B" in cell.inputs:
            bias = build.reshape("recurrent_bias_reshape", cell.operand("B"), [-1, 1, 6 * hidden])
            _, bias = build.split("recurrent_bias_split", bias, [5 * hidden, hidden], 2)
            new = inner.one("Add", "candidate_bias", new, build.value("recurrent_bias", bias))
        new = inner.one("Mul", "reset", r, new)
    else:
        reset = inner.one("Mul", "reset", r, h)
        new_weights = build.value("recurrent_candidate_weight", new_weights)
        new = inner.one("MatMul", "recurrent_candidate", reset, new_weights)
    new = inner.one("Add", "candidate_sum", x_new, new)
    new = _activate(cell, inner, "candidate", new, g)
    # (1 - z) * new + z * h with one product less
    change = inner.one("Mul", "update", z, inner.one("Sub", "difference", h, new))
    return [inner.one("Add", "hidden", new, change)]


def _rnn(cell: _Cell, build: _Builder, inner: _Builder, x: ir.Value, h: ir.Value) -> list[ir.Value]:
    weights = build.transpose("recurrent_transpose", cell.operand("R"), [0, 2, 1])
    product = inner.one("MatMul", "recurrent", h, build.value("recurrent_weight", weights))
    total = inner.one("Add", "sum", x, product)
    return [_activate(cell, inner, "hidden", total, cell.functions[0])]


_STEPS: Final[dict[str, Callable[..., list[ir.Value]]]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN": _rnn,
}


def _activate(
    cell: _Cell, inner: _Builder, word: str, value: ir.Value, functions: Sequence[_Function]
) -> ir.Value:
    """Clip a value and apply an activation function, or one to each direction."""
    if cell.clip is not None:
        bounds = [np.array(bound, cell.dtype) for bound in (-cell.clip, cell.clip)]
        value = inner.one("Clip", f"{word}_clip", value, *bounds)
    if len(set(functions)) == 1:
        return _apply(cell, inner, word, value, functions[0])
    parts = inner.many("Split", f"{word}_split", value, outputs=2, axis=0, num_outputs=2)
    parts = [
        _apply(cell, inner, f"{word}_{direction}", part, function)
        for direction, part, function in zip(("forward", "backward"), parts, functions, strict=True)
    ]
    return inner.one("Concat", word, *parts, axis=0)


def _apply(
    cell: _Cell, inner: _Builder, word: str, value: ir.Value, function: _Function
) -> ir.Value:
    alpha, beta = (np.array(number, cell.dtype) for number in (function.alpha, function.beta))
    if function.name == "Affine":
        return inner.one("Add", word, inner.one("Mul", f"{word}_scaled", value, alpha), beta)
    if function.name == "ScaledTanh":
        inside = inner.one("Mul", f"{word}_scaled", value, beta)
        return inner.one("Mul", word, inner.one("Tanh", f"{word}_tanh", inside), alpha)
    options = {name: getattr(function, name) for name in _FUNCTIONS[function.name]}
    return inner.one(function.name, word, value, **options)
