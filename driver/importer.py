"""Import a loaded ONNX model into Relax.

Extends TVM's ONNX importer, whose interface is private: this is the only file that touches it. What
matters for quantization has rules here (``_RULES``), operators that hold graphs have theirs in
``import_loops.py``; all other operators go through TVM's converters. Every call carries the name of
the ONNX node that it stems from, as its span, and every type is checked against the one that ONNX
infers.

Sub-byte integers are stored as ``int8`` and ``uint8``. Elementwise functions of codes become
tables, the same that the integer reference uses. Arithmetic on shapes is done here, so that
symbolic sizes stay symbolic expressions.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from tvm import relax, sym, tirx
from tvm.relax.frontend.onnx import onnx_frontend

from bitwright.errors import BitwrightError, ModelError, first_line
from bitwright.import_builder import Builder, Expr, all_inputs, const, is_call
from bitwright.import_loops import ControlFlow, renewed
from bitwright.passes import ops
from bitwright.passes.expressions import Sizes
from bitwright.quant.float_ops import Array, FloatOperator, captured_values, make_session
from bitwright.quant.graph import (
    DECODE,
    ENCODE,
    SOFT_EDGE_DOMAIN,
    attribute,
    clamp_bounds,
    constant,
    data_inputs,
    elementwise_roots,
    is_move,
    layout_of,
    loop_body,
)
from bitwright.quant.layers import layer_nodes, quantized_precision
from bitwright.quant.load import Model
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.tables import function_table

__all__ = ["PRECISIONS", "check_operators", "import_model"]

PRECISIONS: Final = "bitwright.precisions"
"""Attribute of the module: layer name to precision, as text."""

_TYPES = frozenset(
    ir.DataType[name]
    for name in "FLOAT DOUBLE BOOL INT2 INT4 INT8 INT16 INT32 INT64"
    " UINT2 UINT4 UINT8 UINT16 UINT32 UINT64".split()
)

# Operators of TVM's converters that are others than ONNX's, or keep to another standard.
_NOT_ONNX = frozenset(
    "AffineGrid Attention BitShift ConcatFromSequence MaxUnpool NonMaxSuppression Optional"
    " OptionalGetElement OptionalHasElement SequenceAt SequenceConstruct SequenceEmpty"
    " SequenceErase SequenceInsert SequenceLength SplitToSequence".split()
)

_MAX_LISTED = 20
_LARGEST_SIZE = 2**40  # of a symbolic dimension
_LAST = 2**31 - 1  # what exporters write for the end of an axis, or more
_MAX_NEIGHBOURS = 64  # of one output of Resize, along one axis
_MAX_FILLED = 1 << 20  # elements of a constant made of one number
_MAX_SYMBOLIC = 1024  # elements of an integer tensor that is followed through shape arithmetic

_Rule: TypeAlias = "Callable[[_Importer, ir.Node], Expr | list[Expr]]"
_Symbolic: TypeAlias = "Callable[[_Importer, ir.Node], Array | None]"


def import_model(model: Model) -> Any:
    """Import a model.

    Parameters
    ----------
    model
        A loaded model, quantized or not.

    Returns
    -------
    tvm.IRModule
        One function, ``main``: one parameter for each input of the model, named like it, and the
        outputs as its result (a tuple where there are several). A symbolic dimension is one
        variable everywhere. The module attribute :data:`PRECISIONS` holds the precisions of the
        quantized layers.

    Raises
    ------
    ModelError
        If operators are not supported (all are named), or one cannot be imported as it is used.
    """
    check_operators(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TVM's remarks on the model
        module = _Importer(model).run()
    precisions = {
        name: str(precision)
        for name, node in layer_nodes(model).items()
        if (precision := quantized_precision(node)) is not None
    }
    return module.with_attr(PRECISIONS, precisions)


def check_operators(model: Model) -> None:
    """Refuse all operators that there is no way to import, at once."""
    known = {*_RULES, *_SYMBOLIC, *onnx_frontend._get_convert_map()} - _NOT_ONNX
    missing = [
        f"{node.op_type} {node.name!r}"
        for node in _all_nodes(model.graph)
        if (node.domain != "" or node.op_type not in known)
        and (node.domain != SOFT_EDGE_DOMAIN or node.op_type not in (ENCODE, DECODE))
    ]
    if missing:
        more = len(missing) - _MAX_LISTED
        shown = ", ".join(missing[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
        advice = "replace them (`bitwright inspect` lists all operators)"
        raise ModelError(
            f"uses operators that cannot be compiled: {shown}", where=model.source, fix=advice
        )


def _all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of the bodies inside."""
    for node in graph:
        yield node
        for entry in node.attributes.values():
            if entry.type == ir.AttributeType.GRAPH:
                yield from _all_nodes(entry.as_graph())
            elif entry.type == ir.AttributeType.GRAPHS:
                for body in entry.as_graphs():
                    yield from _all_nodes(body)


# -- what is codes, and what a function of codes ---------------------------------------------------


def _is_integer(dtype: ir.DataType | None) -> bool:
    return dtype is not None and dtype.name.startswith(("INT", "UINT"))


def _quantization(node: ir.Node, dtype: ir.DataType | None) -> TensorQuantization | None:
    """How DequantizeLinear reads its codes, where one constant scale serves up to 16 bits."""
    scale = constant(node.inputs[1])
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    zero = np.zeros(1, np.int64) if zero_value is None else constant(zero_value)
    if dtype is None or not _is_integer(dtype) or dtype.bitwidth > 16:
        return None
    if scale is None or zero is None or scale.size != 1 or attribute(node, "block_size", 0):
        return None
    source = node.inputs[0]
    layout = None if source is None else layout_of(source.producer(), DECODE)
    if layout is not None and not zero.item():
        return TensorQuantization.soft_edge(layout, scale.item())
    signed = dtype.name.startswith("INT")
    return TensorQuantization(scale.item(), int(zero.item()), dtype.bitwidth, signed)


def _functions_of_codes(
    graph: ir.Graph,
) -> tuple[dict[ir.Value, ir.Value], dict[ir.Value, TensorQuantization]]:
    """Values that are elementwise functions of codes, with their roots; codes of every value.

    The kinds of values are those of the integer reference: codes behind DequantizeLinear stay codes
    through moves and Relu; any other elementwise function of them is a table.
    """
    roots = elementwise_roots(graph)
    functions: dict[ir.Value, ir.Value] = {}
    codes: dict[ir.Value, TensorQuantization] = {}
    for node in graph:
        if node.domain != "" or node.op_type == "QuantizeLinear":
            continue
        output = node.outputs[0]
        root = roots.get(output)
        found: set[TensorQuantization | None] = set()
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0]
            found = {_quantization(node, None if source is None else source.dtype)}
        elif root is not None and root in codes:
            operand = node.inputs[0]
            if node.op_type == "Relu" and operand in codes:
                found = {codes[operand]}
            else:
                functions[output] = root
        elif is_move(node):
            operands = [node.inputs[index] for index in data_inputs(node)]
            found = {None if value is None else codes.get(value) for value in operands}
        quantization = found.pop() if len(found) == 1 else None
        if quantization is not None:
            codes.update((value, quantization) for value in node.outputs)
    return functions, codes


def _live_nodes(graph: ir.Graph, functions: dict[ir.Value, ir.Value]) -> set[ir.Node]:
    """Nodes that the outputs need, when functions are tables over their roots."""
    needed = set(graph.outputs)
    live: set[ir.Node] = set()
    for node in reversed(graph):
        if needed.isdisjoint(node.outputs):
            continue
        live.add(node)
        if node.outputs[0] in functions:
            needed.add(functions[node.outputs[0]])
        else:
            needed.update(value for value in node.inputs if value is not None)
            needed.update(captured_values(node))
    return live


# -- expressions -----------------------------------------------------------------------------------


def _storage(array: Array) -> Array:
    """An array in a type that TVM computes with: whole bytes."""
    if array.dtype.kind in "iufb":
        return array
    name = array.dtype.name  # ml_dtypes
    if name in ("int2", "int4", "uint2", "uint4"):
        return array.astype(np.uint8 if name.startswith("u") else np.int8)
    return array


def _storage_name(dtype: ir.DataType) -> str:
    if dtype not in _TYPES:
        raise ValueError(f"the type {dtype} is not supported")
    if dtype in (ir.DataType.INT4, ir.DataType.INT2):
        return "int8"
    if dtype in (ir.DataType.UINT4, ir.DataType.UINT2):
        return "uint8"
    return dtype.numpy().name


def _along(axis: int, rank: int) -> tuple[int, ...]:
    shape = [1] * rank
    shape[axis] = -1
    return tuple(shape)


@dataclass(frozen=True)
class _Stored:
    """Constant codes behind DequantizeLinear.

    Attributes
    ----------
    node
        The DequantizeLinear.
    codes
        Whole bytes.
    scale, zero_point
        Both of shape [] or both of shape [channels].
    axis
        The axis of the channels, not negative.
    """

    node: ir.Node
    codes: Array
    scale: Array
    zero_point: Array
    axis: int


class _Importer(ControlFlow, onnx_frontend.ONNXGraphImporter):
    """Converts the nodes of one model in order."""

    def __init__(self, model: Model) -> None:
        super().__init__({}, {})
        self.bb = Builder()
        self.opset = model.opset
        self.analyzer = sym.Analyzer()
        self._model = model
        self._sizes: dict[str | None, Any] = {}  # symbolic dimensions of the inputs
        self._exprs: dict[ir.Value, Expr] = {}
        self._integers: dict[ir.Value, Array] = {}  # of Python integers and symbolic expressions
        self._folded: dict[ir.Value, Array] = {}
        self._stored: dict[ir.Value, _Stored] = {}
        self._indices: dict[ir.Value, Expr] = {}
        self._functions: dict[ir.Value, ir.Value] = {}
        self._codes: dict[ir.Value, TensorQuantization] = {}
        for graph in (model.graph, *filter(None, map(loop_body, model.graph))):
            functions, codes = _functions_of_codes(graph)
            self._functions.update(functions)
            self._codes.update(codes)
        self.bodies = {}

    def run(self) -> Any:
        """Build the module."""
        graph = self._model.graph
        parameters = self._parameters()
        with self.bb.function("main", parameters, attrs={"num_input": len(parameters)}):
            try:
                with self.bb.dataflow():
                    results = self.outputs(graph)
                    whole = results[0] if len(results) == 1 else relax.Tuple(results)
                    result = self.bb.emit_output(whole)
            except BaseException:
                self.bb._end_block()  # else TVM complains on stderr
                raise
            self.bb.emit_func_output(result)
        module = self.bb.get()
        for variable, function in self.bodies.items():
            module[variable] = function
        return module

    def outputs(self, graph: ir.Graph) -> list[Expr]:
        """Convert the nodes of a graph that it needs; return the values of its outputs."""
        live = _live_nodes(graph, self._functions)
        for node in graph:
            if node in live and node.outputs[0] not in self._exprs:  # else it is given
                self.convert(node)
        self.bb.start("")
        return [self.expr(value) for value in graph.outputs]

    def _parameters(self) -> list[Any]:
        parameters = []
        for value in self._model.graph.inputs:
            if value.dtype not in _TYPES or not isinstance(value.type, ir.TensorType):
                raise ModelError(
                    f"input {value.name!r} is no tensor of numbers",
                    where=self._model.source,
                    fix="export the model with tensors of numbers as inputs",
                )
            shape: list[Any] | None = None if value.shape is None else []
            for axis, dim in enumerate(value.shape or ()):
                name = dim if isinstance(dim, int) else dim.value
                if name in (None, "?"):  # a size without a name
                    name = f"{value.name}_{axis}"
                if isinstance(name, str) and name not in self._sizes:
                    self._sizes[name] = self.size(name)
                assert shape is not None
                shape.append(self._sizes[name] if isinstance(name, str) else name)
            dtype = _storage_name(value.dtype)
            parameter = relax.Var(str(value.name), relax.TensorType(shape, dtype))
            parameters.append(parameter)
            self._exprs[value] = parameter
        return parameters

    # -- values ------------------------------------------------------------------------------------

    def constant(self, value: ir.Value | None) -> Array | None:
        """Array of a value that is known at compile time, in whole bytes; None for others."""
        if value is None:
            return None
        if value in self._folded:
            return self._folded[value]
        known = self._integers.get(value)
        if known is not None and all(isinstance(entry, int | bool) for entry in known.flat):
            assert value.dtype is not None
            return known.astype(value.dtype.numpy())
        array = constant(value)
        return None if array is None else _storage(array)

    def integers(self, value: ir.Value | None) -> Array | None:
        """Small integers that are known, as numbers or symbolic expressions; None for others."""
        if value is None:
            return None
        if value in self._integers:
            return self._integers[value]
        array = self.constant(value)
        if array is None or array.dtype.kind not in "iub" or array.size > _MAX_SYMBOLIC:
            return None
        return array.astype(object)

    def expr(self, value: ir.Value) -> Expr:
        """A value as a variable or a constant."""
        if value not in self._exprs:
            stored = self._stored.get(value)
            array = self.constant(value)
            if stored is not None:
                self._exprs[value] = self.emit_stored(stored)
            elif array is not None:
                self._exprs[value] = const(array)
            elif value in self._integers:
                self._exprs[value] = self._materialize(value)
            else:
                raise ValueError(f"there is no value {value.name!r}")
        return self._exprs[value]

    def _materialize(self, value: ir.Value) -> Expr:
        """Integers with symbolic expressions among them, as a tensor."""
        known = self._integers[value]
        result = relax.op.shape_to_tensor(relax.ShapeExpr(list(known.flat)))
        if known.ndim != 1:
            result = relax.op.reshape(result, known.shape)
        assert value.dtype is not None
        if value.dtype != ir.DataType.INT64:
            result = relax.op.astype(result, _storage_name(value.dtype))
        return self.bb.emit(result)

    def emit_stored(self, stored: _Stored) -> Expr:
        """Dequantize constant codes, under the name of their DequantizeLinear."""
        name = self.bb.node_name
        self.bb.start(str(stored.node.name))
        codes, scale, zero_point = map(const, (stored.codes, stored.scale, stored.zero_point))
        result = self.bb.emit(relax.op.dequantize(codes, scale, zero_point, stored.axis, "float32"))
        self.bb.start(name)
        return result

    def bind(self, value: ir.Value, expr: Expr) -> None:
        """Give a value another expression."""
        self._exprs[value] = expr

    @contextlib.contextmanager
    def scope(self, captured: Mapping[ir.Value, Expr], sizes: Sizes) -> Iterator[None]:
        """Build another function meanwhile, in which captured values are the given ones."""
        names = ("bb", "_exprs", "_integers", "_folded", "_stored", "_indices", "_sizes")
        kept = {name: getattr(self, name) for name in names}
        for _, size in sizes.known:
            self.analyzer.update(size, sym.ConstIntBound(0, _LARGEST_SIZE))
        inside = {value: renewed(known, sizes) for value, known in self._integers.items()}
        self.bb, self._exprs, self._indices = Builder(), dict(captured), {}
        self._integers = {value: known for value, known in inside.items() if known is not None}
        self._folded, self._stored = dict(self._folded), dict(self._stored)
        self._sizes = {
            name: sizes.variable(size)
            for name, size in self._sizes.items()
            if sizes.variable(size) is not None
        }
        try:
            yield
        finally:
            for name, entry in kept.items():
                setattr(self, name, entry)

    def fold(self, value: ir.Value, array: Array) -> None:
        """Make a value known at compile time."""
        self._folded[value] = array

    def store(self, value: ir.Value, stored: _Stored) -> None:
        """Make a value constant codes, dequantized where it is used."""
        self._stored[value] = stored

    def stored(self, value: ir.Value | None) -> _Stored | None:
        """Constant codes behind DequantizeLinear; None for any other value."""
        return None if value is None else self._stored.get(value)

    def known_shape(self, value: ir.Value) -> list[Any] | None:
        """Sizes of a value, numbers or symbolic expressions; None where they are not known."""
        known = self._integers.get(value)
        array = self.constant(value) if known is None else known
        if array is not None:
            return list(array.shape)
        shape = self.expr(value).ty.shape
        if not isinstance(shape, relax.ShapeExpr):
            return None
        return [int(dim) if isinstance(dim, tirx.IntImm) else dim for dim in shape.values]

    def shape(self, value: ir.Value) -> list[Any]:
        """Sizes of a value: numbers, or symbolic expressions."""
        shape = self.known_shape(value)
        if shape is None:
            raise ValueError(f"the shape of {value.name!r} is not known")
        return shape

    def broadcast(self, first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
        """Sizes of two shapes broadcast against each other."""
        rank = max(len(first), len(second))
        result = []
        for a, b in zip(
            [1] * (rank - len(first)) + list(first),
            [1] * (rank - len(second)) + list(second),
            strict=True,
        ):
            if _is_number(b, 1) or self.equal(a, b):
                result.append(a)
            elif _is_number(a, 1):
                result.append(b)
            else:
                raise ValueError(f"it is not known whether the sizes {a} and {b} fit")
        return result

    # -- nodes -------------------------------------------------------------------------------------

    def convert(self, node: ir.Node) -> None:
        """Convert one node; its outputs then have values."""
        try:
            self._convert(node)
        except BitwrightError:
            raise
        except Exception as error:  # the converters raise many kinds
            raise ModelError(
                f"{node.op_type} {node.name!r} cannot be compiled ({first_line(error)})",
                where=self._model.source,
                fix="replace the operator, or export the model with other attributes or with "
                "static shapes",
            ) from error

    def _convert(self, node: ir.Node) -> None:
        self.bb.start(str(node.name))
        if node.outputs[0] in self._functions:
            self._exprs[node.outputs[0]] = self._table(node.outputs[0])
            return
        if self._shape_arithmetic(node) or self._fold(node):
            return
        if node.op_type == "Constant":  # outputs of a graph stay nodes when a model is loaded
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is not None:
                self.fold(node.outputs[0], _storage(tensor.numpy()))
                return
        if node.op_type in _ALIGNED:
            self._align(node)
        result = _RULES.get(node.op_type, _Importer.by_tvm)(self, node)
        results = list(result) if isinstance(result, list | tuple) else [result]
        for value, entry in zip(node.outputs, results, strict=False):
            if value.name:
                bound = self.bb.emit(entry) if is_call(entry) else entry
                _check_type(value, bound)
                self._exprs[value] = self._with_shape(value, bound)

    def _with_shape(self, value: ir.Value, expr: Expr) -> Expr:
        """Name the sizes that TVM cannot infer, those that ONNX infers included."""
        ty = expr.ty
        rank = ty.ndim if value.shape is None else len(value.shape)
        if isinstance(ty.shape, relax.ShapeExpr) or rank == -1:
            return expr
        sizes = [self.inferred_size(value, axis) for axis in range(rank)]
        return self.bb.match_cast(expr, relax.TensorType(sizes, ty.dtype))

    def _align(self, node: ir.Node) -> None:
        """Make the sizes of operands equal that TVM cannot prove to be; checked at run time."""
        values = [value for value in all_inputs(node) if self.known_shape(value) is not None]
        shapes = {value: self.shape(value) for value in values}
        rank = max((len(shape) for shape in shapes.values()), default=0)
        joined = attribute(node, "axis", 0) % rank - rank if node.op_type == "Concat" else 0
        changed: dict[ir.Value, None] = {}
        for axis in range(-rank, 0):
            sizes = [shape[axis] for shape in shapes.values() if -axis <= len(shape)]
            if node.op_type != "Concat":  # a size of 1 is repeated
                sizes = [size for size in sizes if not _is_number(size, 1)]
            if axis == joined or len(sizes) < 2 or all(isinstance(size, int) for size in sizes):
                continue
            # Numbers first, then expressions: TVM crashes on a variable that becomes what holds it.
            wanted = min(
                sizes, key=lambda size: (not isinstance(size, int), isinstance(size, tirx.Var))
            )
            for value, shape in shapes.items():
                if -axis > len(shape) or isinstance(shape[axis], int):
                    continue
                if self.equal(shape[axis], wanted) is None:
                    shape[axis] = wanted
                    changed[value] = None
        for value in changed:
            expr = self.expr(value)
            ty = relax.TensorType(shapes[value], expr.ty.dtype)
            self._exprs[value] = self.bb.match_cast(expr, ty)

    def inferred_size(self, value: ir.Value, axis: int) -> Any:
        """A size of a value, as ONNX infers it, or else a new one."""
        dim = None if value.shape is None else value.shape[axis]
        known = dim if isinstance(dim, int) else self._sizes.get(getattr(dim, "value", None))
        return self.size(f"{value.name}_{axis}") if known is None else known

    def size(self, name: str) -> Any:
        """A new symbolic size."""
        size = tirx.Var(name, "int64")
        self.analyzer.update(size, sym.ConstIntBound(0, _LARGEST_SIZE))
        return size

    def _table(self, value: ir.Value) -> Expr:
        """A function of codes: a table, indexed by the codes of the function's root."""
        root = self._functions[value]
        quantization = self._codes[root]
        if root not in self._indices:
            kind = "int" if quantization.signed else "uint"
            codes = _quantize(
                self.expr(root),
                np.array(quantization.scale, np.float32),
                np.array(quantization.zero_point, f"{kind}{max(quantization.bits, 8)}"),
                quantization.bits,
                axis=0,
            )
            indices = relax.op.astype(codes, "int32")
            if quantization.code_min != 0:
                lowest = relax.const(quantization.code_min, "int32")
                indices = relax.op.subtract(indices, lowest)
            self._indices[root] = self.bb.emit(indices)
        table = function_table(root, value, quantization, self._model.opset)
        return self.bb.emit(relax.op.take(const(table), self._indices[root], axis=0, mode="clip"))

    def by_tvm(self, node: ir.Node) -> list[Expr]:
        """Outputs of a node as TVM's own importer converts it."""
        proto = ir.to_proto(node)
        attributes = self._parse_attr(proto.attribute)
        attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.outputs)}
        inputs = onnx_frontend.onnx_input()
        for index, value in enumerate(node.inputs):
            known = None if value is None else self._integers.get(value)
            if known is not None and known.ndim == 1 and index in _SHAPES.get(node.op_type, ()):
                inputs.append(relax.ShapeExpr(list(known)))
            else:
                inputs.append(None if value is None else self.expr(value))
        result = self._convert_operator(node.op_type, inputs, attributes, self.opset)
        if isinstance(result, relax.Tuple):
            return [self._tensor(field) for field in result.fields]
        if isinstance(result.ty, relax.TupleType):
            return [relax.TupleGetItem(result, i) for i in range(len(result.ty.fields))]
        return [self._tensor(result)]

    def _tensor(self, expr: Expr) -> Expr:
        """A shape that TVM made, as a tensor."""
        if isinstance(expr.ty, relax.ShapeType):
            return self.bb.emit(relax.op.shape_to_tensor(expr))
        return expr

    # -- shapes ------------------------------------------------------------------------------------

    def _shape_arithmetic(self, node: ir.Node) -> bool:
        """Compute integers that come from shapes; say whether the node was such arithmetic."""
        evaluate = _SYMBOLIC.get(node.op_type)
        if evaluate is None or len(node.outputs) != 1 or not _holds_integers(node.outputs[0]):
            return False
        inputs = all_inputs(node)
        if node.op_type not in _FROM_SHAPES and self._integers.keys().isdisjoint(inputs):
            return False
        result = evaluate(self, node)
        if result is None:
            return False
        simple = np.empty(result.shape, object)
        for index, entry in np.ndenumerate(result):
            simple[index] = self.simplify(entry)
        self._integers[node.outputs[0]] = simple
        return True

    def _fold(self, node: ir.Node) -> bool:
        """Compute an operator on values that are known; say whether it was one."""
        arrays = [self.constant(value) for value in node.inputs]
        unknown = [
            value
            for value, array in zip(node.inputs, arrays, strict=True)
            if value is not None and array is None
        ]
        shapes = [value.shape for value in node.outputs if value.name]
        if not arrays or unknown or node.op_type in _NOT_FOLDED or captured_values(node):
            return False
        if any(
            s is None or not s.is_static() or math.prod(s.numpy()) > _MAX_FILLED for s in shapes
        ):
            return False
        results = iter(FloatOperator(node, self.opset).run(arrays))
        for value in node.outputs:
            if value.name:
                self._folded[value] = next(results)
        return True

    def simplify(self, entry: Any) -> Any:
        """A number where a symbolic expression is one."""
        simple = entry if isinstance(entry, int) else self.analyzer.simplify(entry)
        return int(simple) if isinstance(simple, tirx.IntImm) else simple

    def equal(self, a: Any, b: Any) -> bool | None:
        """Whether two numbers or symbolic expressions are equal; None where it is not known."""
        difference = self.simplify(a - b)
        if isinstance(difference, int):
            return difference == 0
        bound = self.analyzer.const_int_bound(difference)
        return False if bound.min_value > 0 or bound.max_value < 0 else None

    def divide(self, a: Any, b: Any) -> Any:
        """Divide as integers, where neither is negative; None where that is not known."""
        positive = isinstance(b, int) and b > 0
        if isinstance(a, int):
            return a // b if positive and a >= 0 else None
        return a // b if positive and self.analyzer.const_int_bound(a).min_value >= 0 else None


def _is_number(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


# -- types -----------------------------------------------------------------------------------------


def _check_type(value: ir.Value, expr: Expr) -> None:
    """Compare a result with the type that ONNX infers: a converter may be wrong."""
    if not isinstance(expr.ty, relax.TensorType):
        raise ValueError(f"{value.name!r} becomes {type(expr.ty).__name__}, not a tensor")
    found = expr.ty.dtype
    if value.dtype is not None and found is not None and str(found) != _storage_name(value.dtype):
        raise ValueError(f"{value.name!r} becomes {found} instead of {value.dtype}")
    if value.shape is None or expr.ty.ndim == -1:
        return
    sizes = expr.ty.shape.values if isinstance(expr.ty.shape, relax.ShapeExpr) else None
    differs = expr.ty.ndim != len(value.shape) or (
        sizes is not None
        and any(
            isinstance(a, int) and isinstance(b, tirx.IntImm) and a != int(b)
            for a, b in zip(value.shape, sizes, strict=True)
        )
    )
    if differs:
        raise ValueError(f"{value.name!r} becomes {expr.ty} instead of shape {value.shape}")


def _holds_integers(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


# -- quantizers ------------------------------------------------------------------------------------


def _limits(bits: int, signed: bool) -> tuple[int, int]:
    limits = TensorQuantization(1.0, 0, bits, signed)
    return limits.code_min, limits.code_max


def _quantize(data: Expr, scale: Array, zero_point: Array, bits: int, axis: int) -> Expr:
    """Quantize to whole bytes, cut to the range of the true type."""
    codes = relax.op.quantize(data, const(scale), const(zero_point), axis, zero_point.dtype.name)
    if bits >= 8:
        return codes
    return relax.op.clip(codes, *_limits(bits, zero_point.dtype.kind == "i"))


def _parameters(
    importer: _Importer, node: ir.Node, dtype: ir.DataType | None
) -> tuple[Array, Array, int] | None:
    """Scale and zero point, numbers or vectors, and their axis; None where TVM may know better."""
    block = attribute(node, "block_size", 0)
    if dtype is None or not _is_integer(dtype) or dtype.bitwidth > 32 or block:
        return None
    scale = importer.constant(node.inputs[1])
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    storage = np.dtype(_storage_name(dtype))
    if scale is None or (zero_value is not None and importer.constant(zero_value) is None):
        return None
    zero = importer.constant(zero_value)
    zero = np.zeros(scale.shape, storage) if zero is None else zero.astype(storage)
    if scale.size == 1:
        return scale.reshape(()), zero.reshape(()), 0
    data = node.inputs[0]
    assert data is not None
    array = importer.constant(data)
    rank = importer.expr(data).ty.ndim if array is None else array.ndim
    return scale, zero, attribute(node, "axis", 1) % rank


def _quantize_linear(importer: _Importer, node: ir.Node) -> Any:
    source, output = node.inputs[0], node.outputs[0]
    dtype = output.dtype
    found = _parameters(importer, node, dtype)
    if found is None or dtype is None or dtype.bitwidth > 16:
        if dtype is not None and dtype.bitwidth < 8:
            raise ValueError("its scale or zero point is computed, or of blocks")
        return importer.by_tvm(node)
    assert source is not None
    scale, zero_point, axis = found
    array = importer.constant(source)
    if array is None:
        return _quantize(importer.expr(source), scale, zero_point, dtype.bitwidth, axis)
    # Some tools leave the weights in float, in front of a quantizer.
    if scale.ndim:
        scale, zero_point = (e.reshape(_along(axis, array.ndim)) for e in (scale, zero_point))
    with np.errstate(over="ignore"):
        codes = np.rint(array / scale).astype(np.float64) + zero_point
    low, high = _limits(dtype.bitwidth, zero_point.dtype.kind == "i")
    importer.fold(output, np.clip(codes, low, high).astype(zero_point.dtype))
    return []


def _dequantize_linear(importer: _Importer, node: ir.Node) -> Any:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    found = _parameters(importer, node, source.dtype)
    if found is None or output.dtype != ir.DataType.FLOAT:
        if attribute(node, "block_size", 0):
            importer.fold(output, _dequantized_blocks(importer, node))
            return []
        if source.dtype is not None and source.dtype.bitwidth < 8:
            raise ValueError("its scale or zero point is computed")
        return importer.by_tvm(node)
    scale, zero_point, axis = found
    codes = importer.constant(source)
    if codes is not None:
        importer.store(output, _Stored(node, codes, scale, zero_point, axis))
        return []
    return relax.op.dequantize(
        importer.expr(source), const(scale), const(zero_point), axis, "float32"
    )


def _soft_edge_encode(importer: _Importer, node: ir.Node) -> Any:
    source, step = node.inputs[0], importer.constant(node.inputs[1])
    layout = layout_of(node, ENCODE)
    assert source is not None
    assert layout is not None
    if step is None or step.size != 1:
        raise ValueError("its step is computed, or more than one number")
    array = importer.constant(source)
    if array is not None:
        importer.fold(node.outputs[0], layout.encode(array, step.item()))
        return []
    return ops.soft_edge_encode(importer.expr(source), const(step.reshape(())), layout=layout)


def _soft_edge_decode(importer: _Importer, node: ir.Node) -> Any:
    source, layout = node.inputs[0], layout_of(node, DECODE)
    assert source is not None
    assert layout is not None
    array = importer.constant(source)
    if array is not None:
        importer.fold(node.outputs[0], layout.decode(array))
        return []
    return ops.soft_edge_decode(importer.expr(source), layout=layout)


def _dequantized_blocks(importer: _Importer, node: ir.Node) -> Array:
    """Constant codes with a scale for each block along an axis, as floats."""
    arrays = [importer.constant(value) for value in all_inputs(node)]
    known = [array for array in arrays if array is not None]
    if len(known) < len(arrays) or node.outputs[0].dtype != ir.DataType.FLOAT:
        raise ValueError("blocks are supported for constants only")
    codes, *parameters = known
    axis = attribute(node, "axis", 1)
    block = np.arange(codes.shape[axis]) // attribute(node, "block_size")
    scale, *zero_point = (np.take(array, block, axis) for array in parameters)
    centred = codes.astype(np.int64) - (zero_point[0].astype(np.int64) if zero_point else 0)
    return np.asarray(centred.astype(np.float32) * scale)


# -- layers ----------------------------------------------------------------------------------------

_DATA_LAYOUTS = {1: "NCW", 2: "NCHW", 3: "NCDHW"}
_KERNEL_LAYOUTS = {1: "OIW", 2: "OIHW", 3: "OIDHW"}


def _spatial_rank(importer: _Importer, node: ir.Node) -> int:
    data = node.inputs[0]
    assert data is not None
    rank: int = importer.expr(data).ty.ndim - 2
    if rank not in _DATA_LAYOUTS:
        raise ValueError(f"it has {rank} spatial axes; 1 to 3 are supported")
    return rank


def _padding(
    importer: _Importer, node: ir.Node, kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Padding (all befores, then all afters), strides and dilations of a sliding window."""
    rank = len(kernel)
    strides = list(attribute(node, "strides") or (1,) * rank)
    dilations = list(attribute(node, "dilations") or (1,) * rank)
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        given = attribute(node, "pads") if auto == "NOTSET" else None
        return list(given or (0,) * (2 * rank)), strides, dilations
    data = node.inputs[0]
    assert data is not None
    before, after = [], []
    sizes = importer.shape(data)[2:]
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        extent = (k - 1) * dilation + 1
        if stride == 1:
            total = extent - 1
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        else:
            raise ValueError(f"auto_pad {auto} with strides needs static sizes")
        small, large = total // 2, total - total // 2
        before.append(small if auto == "SAME_UPPER" else large)
        after.append(large if auto == "SAME_UPPER" else small)
    return before + after, strides, dilations


def _conv(importer: _Importer, node: ir.Node) -> Expr:
    rank = _spatial_rank(importer, node)
    data, weights = node.inputs[0], node.inputs[1]
    assert data is not None
    assert weights is not None
    kernel = importer.shape(weights)[2:]
    padding, strides, dilations = _padding(importer, node, kernel)
    if min(padding) < 0:
        raise ValueError("it has negative padding")
    result = getattr(relax.op.nn, f"conv{rank}d")(
        importer.expr(data),
        importer.expr(weights),
        strides=strides,
        padding=padding,
        dilation=dilations,
        groups=attribute(node, "group", 1),
        data_layout=_DATA_LAYOUTS[rank],
        kernel_layout=_KERNEL_LAYOUTS[rank],
    )
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return result
    result = importer.bb.emit(result)
    return relax.op.add(result, _channel_bias(importer, bias, rank))


def _channel_bias(importer: _Importer, value: ir.Value, rank: int) -> Expr:
    """A bias of shape [C] as [1, C, 1, ...]."""
    shape = (1, -1, *(1,) * rank)
    stored, array = importer.stored(value), importer.constant(value)
    if stored is not None:
        return importer.emit_stored(replace(stored, codes=stored.codes.reshape(shape), axis=1))
    if array is not None:
        return const(array.reshape(shape))
    return relax.op.reshape(importer.expr(value), shape)


def _transposed(importer: _Importer, value: ir.Value | None) -> Expr:
    """A matrix, transposed; of a constant its values are."""
    assert value is not None
    stored, array = importer.stored(value), importer.constant(value)
    if stored is not None:
        codes = np.ascontiguousarray(stored.codes.T)
        axis = 1 - stored.axis if stored.scale.ndim else 0
        return importer.emit_stored(replace(stored, codes=codes, axis=axis))
    if array is not None:
        return const(np.ascontiguousarray(array.T))
    return relax.op.permute_dims(importer.expr(value))


def _gemm(importer: _Importer, node: ir.Node) -> Expr:
    operands = []
    for value, name in zip(node.inputs, ("transA", "transB"), strict=False):
        assert value is not None
        transposed = attribute(node, name, 0)
        operands.append(_transposed(importer, value) if transposed else importer.expr(value))
    result = importer.bb.emit(relax.op.matmul(*operands))
    dtype = result.ty.dtype
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    if alpha != 1.0:
        result = relax.op.multiply(result, relax.const(alpha, dtype))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return result
    addend = importer.expr(bias)
    if beta != 1.0:
        addend = relax.op.multiply(addend, relax.const(beta, dtype))
    return relax.op.add(result, addend)


def _matmul(importer: _Importer, node: ir.Node) -> Expr:
    return relax.op.matmul(*(importer.expr(value) for value in all_inputs(node)))


# -- functions -------------------------------------------------------------------------------------


def _clamp(importer: _Importer, node: ir.Node) -> Any:
    data, bounds = node.inputs[0], clamp_bounds(node)
    assert data is not None
    if bounds is None or data.dtype != ir.DataType.FLOAT:
        return importer.by_tvm(node)
    low, high = min(bounds), bounds[1]
    expr = importer.expr(data)
    if (low, high) == (0.0, np.inf):
        return relax.op.nn.relu(expr)
    if high == np.inf:
        return expr if low == -np.inf else relax.op.maximum(expr, relax.const(low, "float32"))
    if low == -np.inf:
        return relax.op.minimum(expr, relax.const(high, "float32"))
    return relax.op.clip(expr, low, high)


def _binary(operator: Callable[[Expr, Expr], Expr]) -> _Rule:
    def rule(importer: _Importer, node: ir.Node) -> Expr:
        return operator(*(importer.expr(value) for value in all_inputs(node)))

    return rule


def _pow(importer: _Importer, node: ir.Node) -> Expr:
    base, exponent = (importer.expr(value) for value in all_inputs(node))
    dtype, power = str(base.ty.dtype), importer.constant(node.inputs[1])
    if power is not None and power.ndim == 0 and power in (2.0, 3.0):  # exact for integers too
        square = importer.bb.emit(relax.op.multiply(base, base))
        return square if power == 2.0 else relax.op.multiply(square, base)
    if dtype.startswith("float"):
        return relax.op.power(base, _cast(exponent, dtype))
    # Exact as long as the result has no more than 53 bits.
    wide = relax.op.power(_cast(base, "float64"), _cast(exponent, "float64"))
    return relax.op.astype(relax.op.trunc(wide), dtype)


def _cast(expr: Expr, dtype: str) -> Expr:
    return expr if str(expr.ty.dtype) == dtype else relax.op.astype(expr, dtype)


def _celu(importer: _Importer, node: ir.Node) -> Expr:
    (data,) = all_inputs(node)
    expr, alpha = importer.expr(data), attribute(node, "alpha", 1.0)
    zero = relax.const(0.0, "float32")
    scaled = relax.op.divide(relax.op.minimum(expr, zero), relax.const(alpha, "float32"))
    below = relax.op.subtract(relax.op.exp(scaled), relax.const(1.0, "float32"))
    return relax.op.add(
        relax.op.maximum(expr, zero), relax.op.multiply(relax.const(alpha, "float32"), below)
    )


def _swish(importer: _Importer, node: ir.Node) -> Expr:
    (data,) = all_inputs(node)
    expr, alpha = importer.expr(data), attribute(node, "alpha", 1.0)
    scaled = relax.op.multiply(expr, relax.const(alpha, "float32"))
    return relax.op.multiply(expr, relax.op.sigmoid(scaled))


def _is_infinite(importer: _Importer, node: ir.Node) -> Expr:
    (data,) = all_inputs(node)
    expr = importer.expr(data)
    bounds = [
        relax.const(bound, expr.ty.dtype)
        for name, bound in (("detect_negative", -np.inf), ("detect_positive", np.inf))
        if attribute(node, name, 1)
    ]
    if not bounds:
        raise ValueError("it detects nothing")
    found = [relax.op.equal(expr, bound) for bound in bounds]
    return found[0] if len(found) == 1 else relax.op.logical_or(*found)


def _mod(importer: _Importer, node: ir.Node) -> Any:
    data = node.inputs[0]
    assert data is not None
    if not _is_integer(data.dtype) and not attribute(node, "fmod", 0):
        raise ValueError("floats need fmod=1")
    return importer.by_tvm(node)


def _layer_normalization(importer: _Importer, node: ir.Node) -> list[Expr]:
    result = importer.by_tvm(node)[0]
    if not any(value.name for value in node.outputs[1:]):
        return [result]
    data = importer.expr(all_inputs(node)[0])
    dtype, rank = data.ty.dtype, data.ty.ndim
    axes = list(range(attribute(node, "axis", -1) % rank, rank))
    mean = importer.bb.emit(relax.op.mean(data, axes, keepdims=True))
    centred = importer.bb.emit(relax.op.subtract(data, mean))
    variance = relax.op.mean(relax.op.multiply(centred, centred), axes, keepdims=True)
    epsilon = relax.const(attribute(node, "epsilon", 1e-5), dtype)
    return [result, mean, relax.op.rsqrt(relax.op.add(variance, epsilon))]


def _rms_normalization(importer: _Importer, node: ir.Node) -> Expr:
    data, scale = (importer.expr(value) for value in all_inputs(node))
    dtype, rank = data.ty.dtype, data.ty.ndim
    axes = list(range(attribute(node, "axis", -1) % rank, rank))
    power = relax.op.mean(relax.op.multiply(data, data), axes, keepdims=True)
    epsilon = relax.const(attribute(node, "epsilon", 1e-5), dtype)
    root = relax.op.sqrt(relax.op.add(power, epsilon))
    return relax.op.multiply(relax.op.divide(data, root), scale)


def _roi_align(importer: _Importer, node: ir.Node) -> Any:
    if attribute(node, "mode", "avg") != "avg":
        raise ValueError("only the mode avg is supported")
    return importer.by_tvm(node)


def _batch_normalization(importer: _Importer, node: ir.Node) -> Any:
    if attribute(node, "training_mode", 0):
        raise ValueError("only its form for inference is supported")
    return importer.by_tvm(node)


# -- pooling and reductions ------------------------------------------------------------------------


def _pool(importer: _Importer, node: ir.Node) -> Expr:
    rank = _spatial_rank(importer, node)
    data = node.inputs[0]
    assert data is not None
    kernel = list(attribute(node, "kernel_shape"))
    padding, strides, dilations = _padding(importer, node, kernel)
    before, after = padding[:rank], padding[rank:]
    same = attribute(node, "auto_pad", "NOTSET").startswith("SAME")
    if same and (max(dilations) > 1 or any(s > k for s, k in zip(strides, kernel, strict=True))):
        raise ValueError(
            "auto_pad with dilations or gaps means different things to different tools"
        )
    if any(value.name for value in node.outputs[1:]):
        raise ValueError("its output of indices is not supported")
    if min(padding) < 0:
        raise ValueError("it has negative padding")
    expr = importer.expr(data)
    average = node.op_type == "AveragePool"
    counted = average and bool(attribute(node, "count_include_pad", 0))
    extra = [0] * rank
    if attribute(node, "ceil_mode", 0):
        # Padding behind the data that makes the last window whole. A window that would start there
        # is left out.
        for axis, size in enumerate(importer.shape(data)[2:]):
            stride, extent = strides[axis], (kernel[axis] - 1) * dilations[axis] + 1
            if stride == 1:
                continue
            if not isinstance(size, int):
                raise ValueError("ceil_mode with strides needs static sizes")
            steps = -(-(size + before[axis] + after[axis] - extent) // stride)
            if steps * stride < size + before[axis]:
                extra[axis] = max(steps * stride + extent - size - before[axis] - after[axis], 0)
    if counted and any(extra):
        # Padding counts, what makes the last window whole does not.
        pads = [0] * 4 + [p for pair in zip(before, after, strict=True) for p in pair]
        expr = relax.op.nn.pad(expr, pads)
        before, after, counted = [0] * rank, [0] * rank, False
    options = {"count_include_pad": counted} if average else {}
    return getattr(relax.op.nn, f"{'avg' if average else 'max'}_pool{rank}d")(
        expr,
        pool_size=kernel,
        strides=strides,
        padding=[*before, *(a + b for a, b in zip(after, extra, strict=True))],
        dilation=dilations,
        layout=_DATA_LAYOUTS[rank],
        **options,
    )


def _global_pool(operator: Callable[..., Expr]) -> _Rule:
    def rule(importer: _Importer, node: ir.Node) -> Expr:
        data = node.inputs[0]
        assert data is not None
        expr = importer.expr(data)
        return operator(expr, list(range(2, expr.ty.ndim)), keepdims=True)

    return rule


def _reduce(operator: Callable[..., Expr]) -> _Rule:
    def rule(importer: _Importer, node: ir.Node) -> Any:
        data = node.inputs[0]
        assert data is not None
        expr = importer.expr(data)
        if data.dtype == ir.DataType.BOOL:
            raise ValueError("it reduces truth values")
        axes: list[int] = []
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            given = importer.constant(node.inputs[1])
            if given is None:
                raise ValueError("its axes are computed")
            axes = [int(axis) for axis in given.reshape(-1)]
        if not axes and attribute(node, "noop_with_empty_axes", 0):
            return expr
        axes = axes or list(range(expr.ty.ndim))
        empty = any(_is_number(importer.shape(data)[axis], 0) for axis in axes)
        if empty and node.op_type != "ReduceSum":
            raise ValueError("it reduces an empty axis")
        keepdims = bool(attribute(node, "keepdims", 1))
        return operator(expr, axes, keepdims=keepdims)

    return rule


# -- moves -----------------------------------------------------------------------------------------


def _identity(importer: _Importer, node: ir.Node) -> Expr:
    data = node.inputs[0]
    assert data is not None
    return importer.expr(data)


def _concat(importer: _Importer, node: ir.Node) -> Expr:
    return relax.op.concat(
        [importer.expr(value) for value in all_inputs(node)], attribute(node, "axis")
    )


def _flatten(importer: _Importer, node: ir.Node) -> Expr:
    data = node.inputs[0]
    assert data is not None
    sizes = importer.shape(data)
    axis = attribute(node, "axis", 1)
    axis += len(sizes) if axis < 0 else 0
    return relax.op.reshape(importer.expr(data), (_product(sizes[:axis]), _product(sizes[axis:])))


def _product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _inferred(node: ir.Node) -> list[Any]:
    """Sizes of a result as ONNX infers them, for a shape that is computed."""
    shape = node.outputs[0].shape
    if shape is None or not shape.is_static():
        raise ValueError("its shape is computed from values")
    return list(shape.numpy())


def _reshape(importer: _Importer, node: ir.Node) -> Any:
    data, target = node.inputs[0], node.inputs[1]
    assert data is not None
    assert target is not None
    expr, sizes = importer.expr(data), importer.integers(target)
    shape = _inferred(node) if sizes is None else list(sizes)
    if not attribute(node, "allowzero", 0):
        for axis, size in enumerate(shape):
            if isinstance(size, int) and size == 0:
                shape[axis] = importer.shape(data)[axis]
    return relax.op.reshape(expr, shape)


def _expand(importer: _Importer, node: ir.Node) -> Any:
    data, target = node.inputs[0], node.inputs[1]
    assert data is not None
    sizes = importer.integers(target)
    if sizes is None:
        shape = _inferred(node)
    else:
        shape = importer.broadcast(importer.shape(data), list(sizes))
    return relax.op.broadcast_to(importer.expr(data), shape)


def _constant_of_shape(importer: _Importer, node: ir.Node) -> Any:
    known = importer.integers(node.inputs[0])
    sizes = _inferred(node) if known is None else list(known)
    value = attribute(node, "value")
    fill = np.zeros((), np.float32) if value is None else value.numpy().reshape(())
    if _numbers(*sizes) and math.prod(sizes) <= _MAX_FILLED:
        importer.fold(node.outputs[0], np.full(tuple(sizes), fill))
        return []
    return relax.op.broadcast_to(const(fill), sizes)


def _shape(importer: _Importer, node: ir.Node) -> Expr:
    """The shape of a tensor whose sizes are known at run time only."""
    data = node.inputs[0]
    assert data is not None
    expr = importer.expr(data)
    sizes = relax.op.shape_to_tensor(relax.op.shape_of(expr))
    start, end = attribute(node, "start", 0), attribute(node, "end", expr.ty.ndim)
    if (start, end) == (0, expr.ty.ndim):
        return sizes
    start, end, _ = slice(start, end).indices(expr.ty.ndim)
    return relax.op.strided_slice(sizes, [0], [start], [end])


def _dropout(importer: _Importer, node: ir.Node) -> Expr:
    training = importer.constant(node.inputs[2]) if len(node.inputs) > 2 else np.False_
    if training is None or training.any() or any(value.name for value in node.outputs[1:]):
        raise ValueError("only its form for inference is supported")
    return _identity(importer, node)


def _space_to_depth(importer: _Importer, node: ir.Node) -> Expr:
    (data,) = all_inputs(node)
    block = attribute(node, "blocksize")
    batch, channels, height, width = importer.shape(data)
    blocks = relax.op.reshape(
        importer.expr(data), (batch, channels, height // block, block, width // block, block)
    )
    # DCR: the place in the block runs before the channel; CRD: behind.
    columns_first = attribute(node, "mode", "DCR") == "DCR"
    moved = relax.op.permute_dims(
        blocks, (0, 3, 5, 1, 2, 4) if columns_first else (0, 1, 3, 5, 2, 4)
    )
    return relax.op.reshape(
        moved, (batch, channels * block * block, height // block, width // block)
    )


def _depth_to_space(importer: _Importer, node: ir.Node) -> Expr:
    (data,) = all_inputs(node)
    block = attribute(node, "blocksize")
    batch, channels, height, width = importer.shape(data)
    depth = channels // (block * block)
    columns_first = attribute(node, "mode", "DCR") == "DCR"
    split = (block, block, depth) if columns_first else (depth, block, block)
    blocks = relax.op.reshape(importer.expr(data), (batch, *split, height, width))
    moved = relax.op.permute_dims(
        blocks, (0, 3, 4, 1, 5, 2) if columns_first else (0, 1, 4, 2, 5, 3)
    )
    return relax.op.reshape(moved, (batch, depth, height * block, width * block))


def _gather(importer: _Importer, node: ir.Node) -> Any:
    data, places = node.inputs[0], importer.constant(node.inputs[1])
    assert data is not None
    axis = attribute(node, "axis", 0)
    size = importer.shape(data)[axis]
    if not isinstance(size, int):  # negative indices count from the end, as remainders do
        value = node.inputs[1]
        assert value is not None
        return relax.op.take(importer.expr(data), importer.expr(value), axis, mode="wrap")
    if places is None:
        # ONNX leaves indices beyond the data open; TVM's default would read outside of them.
        value = node.inputs[1]
        assert value is not None
        computed = importer.expr(value)
        dtype = str(computed.ty.dtype)
        zero, length = relax.const(0, dtype), relax.const(size, dtype)
        wrapped = relax.op.where(
            relax.op.less(computed, zero), relax.op.add(computed, length), computed
        )
        return relax.op.take(importer.expr(data), wrapped, axis, mode="clip")
    places = np.where(places < 0, places + size, places).astype(np.int64)
    if places.size and not 0 <= places.min() <= places.max() < size:
        raise ValueError("an index is out of range")
    return relax.op.take(importer.expr(data), const(places), axis, mode="clip")


_PAD_MODES = {
    "constant": "constant",
    "edge": "replicate",
    "reflect": "reflect",
    "wrap": "circular",
}


def _pad(importer: _Importer, node: ir.Node) -> Any:
    """Padding as an operator, which may then carry codes; what is computed goes TVM's way."""
    inputs = [*node.inputs, None, None, None][:4]
    data = inputs[0]
    assert data is not None
    widths, value, axes = (importer.constant(entry) for entry in inputs[1:])
    rank: int = importer.expr(data).ty.ndim
    if widths is None or any(
        entry is not None and found is None
        for entry, found in zip(inputs[2:], (value, axes), strict=True)
    ):
        return importer.by_tvm(node)
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    begins, ends = np.split(widths.astype(np.int64), 2)
    if widths.min(initial=0) < 0:
        return importer.by_tvm(node)
    pairs = np.zeros((rank, 2), np.int64)
    pairs[list(chosen)] = np.stack([begins, ends], axis=1)
    fill = 0.0 if value is None else float(value.item())
    mode = _PAD_MODES[attribute(node, "mode", "constant")]
    return relax.op.nn.pad(importer.expr(data), pairs.reshape(-1).tolist(), mode, fill)


def _resize(importer: _Importer, node: ir.Node) -> Expr:
    """Weighted sums of neighbours, one axis after the other."""
    data = node.inputs[0]
    assert data is not None
    sizes = importer.shape(data)
    rank = len(sizes)
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        raise ValueError("tf_crop_and_resize is not supported")
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("only the policy stretch is supported")
    axes = [axis % rank for axis in attribute(node, "axes") or range(rank)]
    by_size = len(node.inputs) > 3 and node.inputs[3] is not None
    targets = importer.integers(node.inputs[3]) if by_size else importer.constant(node.inputs[2])
    if targets is None:
        raise ValueError("its scales or sizes are computed from values")
    expr = importer.expr(data)
    for axis, target in zip(axes, targets, strict=True):
        size = sizes[axis]
        if importer.equal(target, size) if by_size else target == 1.0:
            continue
        if isinstance(size, int) and isinstance(target, int | np.floating):
            weights = _neighbours(importer, node, rank, axis, size, target)
            expr = _weighted(importer, expr, weights, axis)
            continue
        factor = _whole_factor(importer, size, target)
        sample = 4 * factor if by_size else float(factor)
        weights = _neighbours(importer, node, rank, axis, 4, sample)
        if not np.array_equal(weights, np.repeat(np.eye(4), factor, 0)):
            raise ValueError("it interpolates along an axis of symbolic size")
        expr = importer.bb.emit(relax.op.repeat(expr, factor, axis))
    return expr


def _whole_factor(importer: _Importer, size: Any, target: Any) -> int:
    """How many times larger a symbolic size becomes."""
    for factor in range(2, 17):
        by_size = not isinstance(target, np.floating)
        if importer.equal(target, size * factor) if by_size else target == factor:
            return factor
    raise ValueError("it does not enlarge an axis of symbolic size by a whole number")


def _neighbours(
    importer: _Importer, node: ir.Node, rank: int, axis: int, size: int, target: Any
) -> Array:
    """What each output takes from each input, [output, input], as onnxruntime has it."""
    if axis == 0:
        raise ValueError("it resizes the first axis")
    by_size = isinstance(target, int)
    parameter = np.ones(rank, np.int64 if by_size else np.float32)
    parameter[0], parameter[axis] = (size if by_size else 1.0), target
    probe = ir.to_proto(node)
    del probe.input[:], probe.output[:]
    probe.input.extend(["basis", "", "", "parameter"] if by_size else ["basis", "", "parameter"])
    probe.output.append("result")
    kept = [entry for entry in probe.attribute if entry.name != "axes"]
    probe.ClearField("attribute")
    probe.attribute.extend(kept)
    basis = np.eye(size, dtype=np.float32).reshape(
        [size if entry in (0, axis) else 1 for entry in range(rank)]
    )
    graph = onnx.helper.make_graph(
        [probe],
        "resize",
        [onnx.helper.make_tensor_value_info("basis", onnx.TensorProto.FLOAT, basis.shape)],
        [onnx.ValueInfoProto(name="result")],
        [onnx.numpy_helper.from_array(parameter, "parameter")],
    )
    opset = onnx.helper.make_opsetid("", importer.opset)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    (result,) = make_session(model, optimize=False).run(None, {"basis": basis})
    return np.asarray(result.reshape(size, -1).T)


def _weighted(importer: _Importer, expr: Expr, weights: Array, axis: int) -> Expr:
    """Sum, along an axis, of the neighbours of each output."""
    terms = int(np.count_nonzero(weights, axis=1).max(initial=1))
    if terms > _MAX_NEIGHBOURS:
        raise ValueError(f"each of its outputs depends on {terms} inputs")
    order = np.argsort(weights == 0, axis=1, kind="stable")[:, :terms]
    result = None
    for places in order.T:
        term = relax.op.take(expr, const(places.astype(np.int64)), axis, mode="clip")
        factors = weights[np.arange(len(weights)), places]
        if not np.all(factors == 1.0):
            shape = _along(axis, expr.ty.ndim)
            term = relax.op.multiply(term, const(factors.reshape(shape).astype(np.float32)))
        result = term if result is None else relax.op.add(result, term)
        result = importer.bb.emit(result)
    return result


def _tile(importer: _Importer, node: ir.Node) -> Any:
    data, repeats = node.inputs[0], importer.constant(node.inputs[1])
    assert data is not None
    if repeats is None:
        return importer.by_tvm(node)
    return relax.op.tile(importer.expr(data), [int(count) for count in repeats])


def _transpose(importer: _Importer, node: ir.Node) -> Expr:
    data = node.inputs[0]
    assert data is not None
    return relax.op.permute_dims(importer.expr(data), attribute(node, "perm") or None)


def _slice(importer: _Importer, node: ir.Node) -> Any:
    """Whole axes, as they are or turned round; all else is TVM's."""
    data, starts, ends, axes, steps = [*node.inputs, None, None][:5]
    assert data is not None
    start, end = importer.constant(starts), importer.constant(ends)
    step = np.array(1) if steps is None else importer.constant(steps)
    if (
        start is not None
        and end is not None
        and step is not None
        and all(array.all() for array in (start == 0, end >= _LAST, step == 1))
    ):
        return importer.expr(data)  # TVM would write the sizes as formulas
    arrays = [importer.constant(value) for value in (starts, ends, axes, steps)]
    known = [array for array in arrays if array is not None]
    if len(known) < 4 or not all(
        start in (-1, _LAST) and end <= -_LAST and step == -1
        for start, end, _, step in zip(*known, strict=True)
    ):
        return importer.by_tvm(node)
    expr = importer.expr(data)
    for axis in known[2]:
        expr = importer.bb.emit(relax.op.flip(expr, int(axis) % expr.ty.ndim))
    return expr


def _reverse_sequence(importer: _Importer, node: ir.Node) -> Any:
    """Each sequence of a batch turned round as far as it is long."""
    data, lengths = all_inputs(node)
    expr, shape = importer.expr(data), importer.shape(data)
    time, batch = attribute(node, "time_axis", 0), attribute(node, "batch_axis", 1)
    emit = importer.bb.emit
    places = emit(relax.op.arange(0, shape[time], 1, "int64"))
    places = emit(relax.op.reshape(places, _along(time, len(shape))))
    ends = emit(relax.op.reshape(importer.expr(lengths), _along(batch, len(shape))))
    turned = emit(
        relax.op.subtract(emit(relax.op.subtract(ends, places)), const(np.array(1, np.int64)))
    )
    chosen = emit(relax.op.where(relax.op.less(places, ends), turned, places))
    indices = emit(relax.op.broadcast_to(chosen, shape))
    return relax.op.gather_elements(expr, indices, time)


def _squeeze(importer: _Importer, node: ir.Node) -> Any:
    """Sizes that are not known to be 1 are checked at run time."""
    data, given = [*node.inputs, None][:2]
    assert data is not None
    axes, sizes = importer.constant(given), importer.known_shape(data)
    if sizes is None or (given is not None and axes is None):
        return importer.by_tvm(node)
    expr = importer.expr(data)
    if axes is not None:
        chosen = sorted({int(axis) % len(sizes) for axis in axes.reshape(-1)})
    else:
        chosen = [axis for axis, size in enumerate(sizes) if _is_number(size, 1)]
        free = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
        shape = node.outputs[0].shape
        left = len(sizes) - len(chosen) - (0 if shape is None else len(shape))
        if free and (shape is None or left not in (0, len(free))):
            raise ValueError(
                "it removes all axes of size 1, and has symbolic sizes: fix them with --input-shape"
            )
        chosen = sorted(chosen + free) if free and left else chosen
    if any(not isinstance(sizes[axis], int) for axis in chosen):
        sizes = [1 if axis in chosen else size for axis, size in enumerate(sizes)]
        expr = importer.bb.match_cast(expr, relax.TensorType(sizes, expr.ty.dtype))
    return relax.op.squeeze(expr, chosen)


def _split(importer: _Importer, node: ir.Node) -> list[Expr]:
    data = node.inputs[0]
    assert data is not None
    axis = attribute(node, "axis", 0)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    size = importer.shape(data)[axis]
    if given is not None:
        found = importer.constant(given)
        if found is None:
            raise ValueError("the sizes of its parts are computed")
        sizes = [int(part) for part in found]
    elif isinstance(size, int):
        parts = attribute(node, "num_outputs") or len(node.outputs)
        largest = -(-size // parts)
        sizes = [largest] * (parts - 1) + [size - largest * (parts - 1)]
    else:
        raise ValueError("it splits an axis of symbolic size")
    if min(sizes) < 1:
        raise ValueError("one of its parts is empty")
    places = np.cumsum(sizes)[:-1].tolist()
    parts = importer.bb.emit(relax.op.split(importer.expr(data), places, axis))
    return [relax.TupleGetItem(parts, index) for index in range(len(sizes))]


def _one_hot(importer: _Importer, node: ir.Node) -> Expr:
    indices, depth, values = all_inputs(node)
    size, pair = importer.constant(depth), importer.expr(values)
    if size is None:
        raise ValueError("its depth is computed")
    expr = importer.bb.emit(relax.op.astype(importer.expr(indices), "int64"))
    count = int(size.item())
    # Negative indices count from the end; others beyond it are nowhere.
    wrapped = relax.op.where(
        relax.op.less(expr, relax.const(0, "int64")),
        relax.op.add(expr, relax.const(count, "int64")),
        expr,
    )
    axis = attribute(node, "axis", -1)
    rank = expr.ty.ndim + 1
    places = const(np.arange(count, dtype=np.int64).reshape(_along(axis, rank)))
    found = relax.op.equal(relax.op.expand_dims(wrapped, axis % rank), places)
    off, on = (relax.op.take(pair, relax.const(index, "int64"), axis=0) for index in (0, 1))
    return relax.op.where(found, on, off)


def _top_k(importer: _Importer, node: ir.Node) -> list[Expr]:
    data = node.inputs[0]
    assert data is not None
    if str(data.dtype).startswith("UINT"):
        raise ValueError(f"its type {data.dtype} is not supported")
    return importer.by_tvm(node)


def _cast_rule(importer: _Importer, node: ir.Node) -> list[Expr]:
    dtype = node.outputs[0].dtype
    if dtype not in _TYPES or (dtype.bitwidth < 8 and dtype != ir.DataType.BOOL):
        raise ValueError(f"conversion to {dtype} is not supported")
    return importer.by_tvm(node)


# -- shape arithmetic ------------------------------------------------------------------------------


def _objects(entry: Any) -> Array:
    """One number or symbolic expression as an array."""
    result = np.empty((), object)
    result[()] = entry
    return result


def _sizes(importer: _Importer, node: ir.Node) -> Array | None:
    data = node.inputs[0]
    assert data is not None
    known = importer.known_shape(data)
    if known is None:
        return None
    if node.op_type == "Size":
        return _objects(_product(known))
    result = np.empty(len(known), object)
    result[:] = known
    return result[attribute(node, "start", 0) : attribute(node, "end", len(known))]


def _with_integers(evaluate: Callable[..., Array | None]) -> _Symbolic:
    """Evaluate on the inputs as arrays, where all of them are known."""

    def rule(importer: _Importer, node: ir.Node) -> Array | None:
        arrays = [importer.integers(value) for value in node.inputs]
        unknown = [value for value, a in zip(node.inputs, arrays, strict=True) if a is None]
        if any(value is not None for value in unknown):
            return None
        return evaluate(node, *arrays)

    return rule


def _elementwise(function: Callable[..., Any]) -> _Symbolic:
    def rule(importer: _Importer, node: ir.Node) -> Array | None:
        arrays = [importer.integers(value) for value in all_inputs(node)]
        known = [array for array in arrays if array is not None]
        if len(known) < len(arrays):
            return None
        broadcast = np.broadcast_arrays(*known)
        result = np.empty(broadcast[0].shape, object)
        for index in np.ndindex(result.shape):
            result[index] = function(importer, *(array[index] for array in broadcast))
        return None if any(entry is None for entry in result.flat) else result

    return rule


def _numbers(*entries: Any) -> bool:
    return all(isinstance(entry, int) for entry in entries)


def _symbolic_gather(node: ir.Node, data: Array, indices: Array) -> Array:
    result = np.take(data, indices.astype(np.int64), attribute(node, "axis", 0))
    return result if isinstance(result, np.ndarray) else _objects(result)


def _symbolic_slice(
    _: ir.Node,
    data: Array,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array | None:
    parts = [slice(None)] * data.ndim
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), object) if steps is None else steps
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not _numbers(start, end, step):
            return None
        # An end before the first entry means all of them, backwards.
        whole = step < 0 and end < -data.shape[axis]
        parts[axis] = slice(start, None if whole else end, step)
    return data[tuple(parts)]


def _symbolic_reshape(node: ir.Node, data: Array, *_: Array | None) -> Array | None:
    """Any operator that keeps the entries in order: ONNX infers the shape of its result."""
    shape = node.outputs[0].shape
    if shape is None or not shape.is_static():
        return None
    return data.reshape(shape.numpy())


def _symbolic_range(_: ir.Node, start: Array, limit: Array, delta: Array) -> Array | None:
    bounds = (start.item(), limit.item(), delta.item())
    if not _numbers(*bounds) or bounds[2] == 0 or len(range(*bounds)) > _MAX_SYMBOLIC:
        return None
    return np.array(range(*bounds), object)


def _symbolic_cast(node: ir.Node, data: Array) -> Array | None:
    are_bools = all(isinstance(entry, bool) for entry in data.flat)
    if node.outputs[0].dtype == ir.DataType.BOOL:
        return data if are_bools else None
    return np.vectorize(int, otypes=[object])(data) if are_bools else data


def _symbolic_product(node: ir.Node, data: Array, axes: Array | None = None) -> Array | None:
    if data.ndim != 1 or (axes is None and attribute(node, "noop_with_empty_axes", 0)):
        return None
    result = _objects(_product(list(data)))
    return result.reshape(1) if attribute(node, "keepdims", 1) else result


def _symbolic_fill(node: ir.Node, sizes: Array) -> Array | None:
    value = attribute(node, "value")
    if value is None or not _numbers(*sizes) or math.prod(sizes) > _MAX_SYMBOLIC:
        return None
    return np.full(tuple(sizes), value.numpy().item(), object)


_SYMBOLIC: Final[dict[str, _Symbolic]] = {
    "Add": _elementwise(lambda _, a, b: a + b),
    "Cast": _with_integers(_symbolic_cast),
    "Concat": _with_integers(lambda node, *arrays: np.concatenate(arrays, attribute(node, "axis"))),
    "ConstantOfShape": _with_integers(_symbolic_fill),
    "Div": _elementwise(_Importer.divide),
    "Equal": _elementwise(_Importer.equal),
    "Gather": _with_integers(_symbolic_gather),
    "Identity": _with_integers(lambda _, data: data),
    "Max": _elementwise(lambda _, a, b: max(a, b) if _numbers(a, b) else tirx.max(a, b)),
    "Min": _elementwise(lambda _, a, b: min(a, b) if _numbers(a, b) else tirx.min(a, b)),
    "Mul": _elementwise(lambda _, a, b: a * b),
    "Not": _elementwise(lambda _, a: not a if isinstance(a, bool) else None),
    "Range": _with_integers(_symbolic_range),
    "ReduceProd": _with_integers(_symbolic_product),
    "Reshape": _with_integers(_symbolic_reshape),
    "Shape": _sizes,
    "Size": _sizes,
    "Slice": _with_integers(_symbolic_slice),
    "Squeeze": _with_integers(_symbolic_reshape),
    "Sub": _elementwise(lambda _, a, b: a - b),
    "Unsqueeze": _with_integers(_symbolic_reshape),
    "Where": _elementwise(lambda _, condition, a, b: a if condition else b),
}
"""Operators that compute on sizes of tensors."""

_FROM_SHAPES = ("ConstantOfShape", "Shape", "Size")  # these make such values of others

_RULES: Final[dict[str, _Rule]] = {
    "Add": _binary(relax.op.add),
    "AveragePool": _pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast_rule,
    "CastLike": _cast_rule,
    "Celu": _celu,
    "Clip": _clamp,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "DepthToSpace": _depth_to_space,
    "DequantizeLinear": _dequantize_linear,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(relax.op.mean),
    "GlobalMaxPool": _global_pool(relax.op.max),
    "Identity": _identity,
    "If": ControlFlow.branches,
    "IsInf": _is_infinite,
    "LayerNormalization": _layer_normalization,
    "Loop": ControlFlow.loop,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Mod": _mod,
    "Mul": _binary(relax.op.multiply),
    "OneHot": _one_hot,
    "Pow": _pow,
    "QuantizeLinear": _quantize_linear,
    DECODE: _soft_edge_decode,
    ENCODE: _soft_edge_encode,
    "ReduceMax": _reduce(relax.op.max),
    "ReduceMean": _reduce(relax.op.mean),
    "ReduceMin": _reduce(relax.op.min),
    "ReduceSum": _reduce(relax.op.sum),
    "RMSNormalization": _rms_normalization,
    "Relu": _clamp,
    "Reshape": _reshape,
    "Pad": _pad,
    "Resize": _resize,
    "ReverseSequence": _reverse_sequence,
    "RoiAlign": _roi_align,
    "Scan": ControlFlow.scan,
    "Shape": _shape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _binary(relax.op.subtract),
    "Swish": _swish,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
}
"""How an operator is converted where TVM's converter does not serve."""

# Operators whose operands have equal sizes, or sizes of 1.
_ALIGNED = frozenset(
    "Add And BitwiseAnd BitwiseOr BitwiseXor Concat Div Equal Greater GreaterOrEqual Less"
    " LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor".split()
)

# Operators on constants that have rules of their own, or do not give the same twice.
_NOT_FOLDED = frozenset(
    "Bernoulli DequantizeLinear If Loop Multinomial QuantizeLinear RandomNormalLike"
    f" RandomUniformLike Scan {ENCODE} {DECODE}".split()
)

# Inputs of TVM's converters that may be shapes with symbolic sizes.
_SHAPES: Final[dict[str, tuple[int, ...]]] = {"Slice": (1, 2)}
