"""What passes ask of Relax expressions: operators, constants, quantizers, names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import relax, s_tir, sym, tirx
from tvm.ir import GenericConst, Op, SourceName, Span

from bitwright import errors
from bitwright.passes.ops import COND, SCAN, SOFT_EDGE_DECODE, layout_of
from bitwright.quant.observers import TensorQuantization
from bitwright.soft_edge import SoftEdge

__all__ = [
    "LAYER_OPERATORS",
    "CallRewriter",
    "Quantizer",
    "Sizes",
    "along",
    "as_block",
    "bindings",
    "bodies",
    "calls",
    "clip_bits",
    "code_bits",
    "constant",
    "global_variable",
    "has_branches",
    "has_onnx_layout",
    "is_integer_layer",
    "is_layer",
    "is_move",
    "node_name",
    "operator",
    "quantizer",
    "rewriting",
    "same_move",
    "scalar",
    "scans",
    "soft_edge",
    "static_shape",
    "substituted",
    "with_span",
]

Array = npt.NDArray[Any]

# An error of ours that is raised inside a pass comes out of TVM as what it is; so does Ctrl-C.
for _error in (
    errors.ModelError,
    errors.PlanError,
    errors.RunError,
    errors.UsageError,
    KeyboardInterrupt,
):
    tvm_ffi.register_error(_error)


def operator(expr: Any) -> str:
    """Name of the operator that a call calls, without ``relax.``; empty for anything else."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, Op):
        return str(expr.op.name).removeprefix("relax.")
    return ""


def constant(expr: Any) -> Array | None:
    """Value of a tensor constant, None for any other expression."""
    if isinstance(expr, GenericConst) and isinstance(expr.ty, relax.TensorType):
        return np.asarray(expr.value.numpy())
    return None


def scalar(expr: Any) -> float | int | None:
    """Value of a tensor constant of one element, or of a number in the IR."""
    array = constant(expr)
    if array is not None:
        return array.item() if array.size == 1 else None
    value = getattr(expr, "value", None)
    return value if isinstance(value, int | float) else None


# Their first argument holds the data, the others shapes and indices.
_MOVES = frozenset(
    "broadcast_to dynamic_strided_slice expand_dims flatten flip gather_elements gather_nd max min"
    " nn.max_pool1d nn.max_pool2d nn.max_pool3d nn.pixel_shuffle permute_dims repeat reshape"
    " squeeze strided_slice take tile".split()
)


def is_move(call: Any) -> bool:
    """Whether a call carries values of its first argument without computing any."""
    name = operator(call)
    if name == "nn.pad":
        mode = str(call.attrs.pad_mode)
        return mode != "constant" or float(call.attrs.pad_value) == 0.0
    if name == "image.resize2d":
        mode = str(call.attrs.coordinate_transformation_mode)
        return str(call.attrs.method) == "nearest_neighbor" and mode != "tf_crop_and_resize"
    # Looking up constant data by computed indices is no move of an activation.
    return name in _MOVES and constant(call.args[0]) is None


def same_move(call: Any, data: Any, zero_point: int) -> Any:
    """Return the same move of other data; what is padded is the code of 0."""
    if operator(call) == "nn.pad" and str(call.attrs.pad_mode) == "constant":
        widths = [int(width) for width in call.attrs.pad_width]
        return with_span(relax.op.nn.pad(data, widths, "constant", float(zero_point)), call)
    return relax.Call(call.op, [data, *call.args[1:]], call.attrs, call.ty_args, call.span)


def soft_edge(expr: Any) -> SoftEdge | None:
    """Layout of codes where an expression decodes them; None for any other expression."""
    return layout_of(expr) if operator(expr) == SOFT_EDGE_DECODE else None


_NARROW = {
    "int8": {(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1): bits for bits in (2, 4)},
    "uint8": {(0, 2**bits - 1): bits for bits in (2, 4)},
}


def _width(dtype: str) -> int:
    return int(dtype.removeprefix("u").removeprefix("int"))


def clip_bits(call: Any) -> int | None:
    """Width of the codes that ``R.clip`` leaves; None where its bounds are not those of a type."""
    dtype = str(call.args[0].ty.dtype)
    bounds = scalar(call.args[1]), scalar(call.args[2])
    if dtype not in _NARROW or None in bounds:
        return None
    return _NARROW[dtype].get(bounds)


def code_bits(
    codes: Any, value: Callable[[Any], Any], known: Mapping[Any, int] | None = None
) -> int:
    """Width of codes: what ``R.clip`` left of the storage type, or a soft-edge layout needs.

    Parameters
    ----------
    codes
        Expression of an integer tensor.
    value
        Gives the expression that a variable is bound to.
    known
        Widths that no ``R.clip`` tells, by the expression that a variable is bound to.
    """
    while True:
        expr = value(codes)
        if known is not None and expr in known:
            return known[expr]
        if (layout := soft_edge(expr)) is not None:
            return layout.bits
        if operator(expr) == "clip":
            bits = clip_bits(expr)
            if bits is not None:
                return bits
        elif isinstance(expr, relax.TupleGetItem):
            expr = value(expr.tuple_value)
            if operator(expr) != "split":
                break
        elif operator(expr) == "concat":
            return max(code_bits(field, value, known) for field in value(expr.args[0]).fields)
        # R.maximum with the zero point is Relu on codes.
        elif not is_move(expr) and operator(expr) not in ("maximum", "nn.pad"):
            break
        codes = expr.args[0]
    return _width(str(codes.ty.dtype))


@dataclass(frozen=True)
class Quantizer:
    """Arguments of ``R.quantize`` or ``R.dequantize``.

    Attributes
    ----------
    operand
        What is quantized, or the codes.
    scale, zero_point
        Arrays of shape [] (per tensor) or [channels].
    axis
        Axis of the channels.
    dtype
        Type that stores the codes.
    """

    operand: Any
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64]
    axis: int
    dtype: str

    @property
    def per_tensor(self) -> bool:
        """Whether one scale and one zero point serve the whole tensor."""
        return self.scale.size == 1 and self.zero_point.size == 1

    def type(self, bits: int | None = None, layout: SoftEdge | None = None) -> TensorQuantization:
        """Return the quantization, of ``bits`` bits where they are fewer than the storage has.

        With a layout it is that of decoded soft-edge codes.
        """
        if layout is not None and not int(self.zero_point.item()):
            return TensorQuantization.soft_edge(layout, float(self.scale.item()))
        signed = not self.dtype.startswith("u")
        return TensorQuantization(
            float(self.scale.item()),
            int(self.zero_point.item()),
            bits or _width(self.dtype),
            signed,
        )

    @property
    def holds_activations(self) -> bool:
        """Whether these are codes of one scale and of up to 16 bits."""
        return self.per_tensor and _width(self.dtype) <= 16

    def same_parameters(self, other: Quantizer) -> bool:
        """Whether both map the same number to the same code."""
        return (
            self.dtype == other.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
            and (self.per_tensor or self.axis == other.axis)
        )


def quantizer(expr: Any, kind: str) -> Quantizer | None:
    """Read a call of ``R.quantize`` or ``R.dequantize`` (``kind``) with constant parameters."""
    if operator(expr) != kind:
        return None
    scale, zero_point = constant(expr.args[1]), constant(expr.args[2])
    if scale is None or zero_point is None or scale.dtype != np.float32:
        return None
    holder = expr if kind == "quantize" else expr.args[0]
    dtype = str(expr.attrs.out_dtype) if kind == "quantize" else str(holder.ty.dtype)
    if not dtype.startswith(("int", "uint")):
        return None
    if scale.size == 1 and zero_point.size == 1:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    codes = zero_point.astype(np.int64)
    return Quantizer(expr.args[0], scale, codes, int(expr.attrs.axis), dtype)


def along(array: Array, axis: int, rank: int) -> Array:
    """Shape a vector so that it broadcasts along one axis."""
    if array.size == 1:
        return array.reshape(())
    shape = [1] * rank
    shape[axis % rank] = -1
    return array.reshape(shape)


def static_shape(expr: Any) -> list[int | None] | None:
    """Sizes of a tensor, None where one is symbolic; None if even their number is unknown."""
    shape = expr.ty.shape
    return None if shape is None else [getattr(dim, "value", None) for dim in shape]


def node_name(expr: Any) -> str:
    """Name of the ONNX node that a call stems from, carried in its span; empty if unknown."""
    span = getattr(expr, "span", None)
    if not isinstance(span, Span) or not isinstance(span.source_name, SourceName):
        return ""
    # The importer's spans have no extent; others are places in a Python file.
    named = (span.line, span.column, span.end_line, span.end_column) == (1, 1, 1, 1)
    return str(span.source_name.name) if named else ""


LAYER_OPERATORS = ("nn.conv1d", "nn.conv2d", "nn.conv3d", "matmul")


def has_onnx_layout(call: Any) -> bool:
    """Whether the channels of a convolution are where ONNX has them; True for other operators."""
    attrs = call.attrs
    if not operator(call).startswith("nn.conv"):
        return True
    layouts = str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout)
    return layouts[0] == layouts[2] and layouts[0][:2] == "NC" and layouts[1][:2] == "OI"


def is_integer_layer(call: Any, value: Callable[[Any], Any]) -> bool:
    """Whether a convolution or matrix product multiplies codes, so that integers compute it.

    Data have one scale; weights have one, or one for each output channel. Where both operands are
    computed, the number of terms of a sum is known.

    Parameters
    ----------
    call
        Any call.
    value
        Gives the expression that a variable is bound to.
    """
    name = operator(call)
    if name not in LAYER_OPERATORS or not has_onnx_layout(call):
        return False
    found = [quantizer(value(argument), "dequantize") for argument in call.args]
    left, right = found
    if left is None or right is None:
        return False
    stored = [constant(entry.operand) is not None for entry in (left, right)]
    weights_left = name == "matmul" and stored == [True, False]
    data, weights = (right, left) if weights_left else (left, right)
    if not data.holds_activations:
        return False
    if not any(stored):
        shape = static_shape(call.args[1 if name != "matmul" else 0]) or [None]
        terms = shape[1:] if name != "matmul" else shape[-1:]
        return weights.holds_activations and None not in terms
    if weights.per_tensor:
        return True
    rank = weights.operand.ty.ndim
    if name != "matmul":
        return bool(weights.axis % rank == 0)
    return bool(rank > 1 and weights.axis % rank == (rank - 2 if weights_left else rank - 1))


def with_span(call: Any, source: Any) -> Any:
    """Return the call with the span of another expression."""
    if source.span is None or not isinstance(call, relax.Call):
        return call
    return relax.Call(call.op, call.args, call.attrs, call.ty_args, source.span)


def is_layer(function: Any) -> bool:
    """Whether a function is an integer layer, as PartitionForTarget makes them."""
    return isinstance(function, relax.Function) and "input_bits" in (function.attrs or {})


class Sizes:
    """Variables of a function's own for the symbolic sizes of its parameters.

    Sizes of a result could not be told from parameters whose sizes are formulas.
    """

    def __init__(self) -> None:
        #: Pairs of a size outside, and its variable.
        self.known: list[tuple[Any, Any]] = []

    def renewed(self, kind: Any) -> Any:
        """A type with one variable for each different size that is not a number."""
        if kind.shape is None:
            return kind
        shape = []
        for dim in kind.shape:
            if isinstance(dim, tirx.IntImm):
                shape.append(dim)
                continue
            if self.variable(dim) is None:
                self.known.append((dim, tirx.Var(f"d{len(self.known)}", "int64")))
            shape.append(self.variable(dim))
        return relax.TensorType(shape, kind.dtype)

    def variable(self, size: Any) -> Any | None:
        """The variable of a size outside; None if it has none."""
        found = [new for old, new in self.known if tvm_ffi.structural_equal(old, size)]
        return found[0] if found else None

    def original(self, size: Any) -> Any:
        """The size outside that a size inside stands for."""
        if isinstance(size, tirx.IntImm):
            return size
        found = [old for old, new in self.known if new.same_as(size)]
        if not found:
            raise ValueError(f"a size of a result, {size}, is computed inside")
        return found[0]

    def outside(self, size: Any) -> Any | None:
        """The size outside that a formula inside stands for; None if it holds another variable."""
        return substituted(size, {new: old for old, new in self.known})


def substituted(size: Any, variables: Mapping[Any, Any]) -> Any | None:
    """A formula with others in the place of its variables; None if it has more variables."""
    if not set(tirx.analysis.undefined_vars(size)) <= variables.keys():
        return None
    analyzer = sym.Analyzer()
    for old, new in variables.items():
        analyzer.bind(old, new)
    return analyzer.simplify(size)


def global_variable(name: str, function: Any) -> Any:
    """Global variable of a function; the builder's own would get another name."""
    variable = tvm.ir.GlobalVar(name)
    relax.expr._update_type(variable, function.ty)
    return variable


def as_block(function: Any) -> Any:
    """A primitive function in the form of TVM's own, for the functions that call it.

    TVM's pipeline looks into functions for reshapes, and expects a block.
    """
    block = s_tir.SBlock([], [], [], "root", function.body)
    function = function.with_body(s_tir.SBlockRealize([], True, block))
    return function.without_attr("global_symbol")


def bindings(function: Any) -> dict[Any, Any]:
    """Variable to bound expression, in order, for a function whose body is a list of bindings."""
    if not isinstance(function.body, relax.SeqExpr):
        return {}
    return {
        binding.var: binding.value
        for block in function.body.blocks
        for binding in block.bindings
        if isinstance(binding, relax.VarBinding)
    }


def calls(function: Any) -> list[Any]:
    """All calls of a function, those in branches too, in order."""
    found: list[Any] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call):
            found.append(expr)

    relax.analysis.post_order_visit(function, visit)
    return found


def scans(mod: Any) -> list[Any]:
    """All loops over time of a module, those of bodies too."""
    functions = [f for f in mod.functions.values() if isinstance(f, relax.Function)]
    return [call for function in functions for call in calls(function) if operator(call) == SCAN]


def bodies(mod: Any) -> list[str]:
    """Names of the functions that are bodies of loops or branches, in order."""
    functions = [f for f in mod.functions.values() if isinstance(f, relax.Function)]
    found = {
        body.name_hint
        for function in functions
        for call in calls(function)
        for body in call.args[: _BODIES.get(operator(call), 0)]
    }
    return sorted(found)


# Operators whose first arguments are functions.
_BODIES = {SCAN: 1, COND: 2}


def has_branches(mod: Any) -> bool:
    """Whether a function of the module has an If."""
    found = []

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.If):
            found.append(expr)

    for function in mod.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return bool(found)


def rewriting(transform: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make a rewriting of modules safe for branches, and remove what it left without use.

    A variable of a dataflow block must not be used outside of the block, and a rewriting moves
    uses. Where a function has branches, its blocks are dissolved meanwhile.
    """

    def run(mod: Any) -> Any:
        branches = has_branches(mod)
        # Aliases would hide what a variable is.
        mod = relax.transform.CanonicalizeBindings()(mod)
        if branches:
            mod = relax.transform.ToNonDataflow()(mod)
        mod = relax.transform.DeadCodeElimination()(transform(mod))
        return relax.transform.ConvertToDataflow()(mod) if branches else mod

    return run


@relax.expr_functor.mutator
class CallRewriter(relax.PyExprMutator):
    """Hands each call, its arguments rewritten already, to one function.

    The function gets the rewriter, the call, and the variable that the call is bound to in the
    original function; it returns the expression to bind instead. A returned variable replaces the
    original one.
    """

    def __init__(self, mod: Any, rewrite: Callable[[CallRewriter, Any, Any], Any]) -> None:
        super().__init__(mod)
        self._rewrite = rewrite

    def visit_var_binding_(self, binding: Any) -> None:
        """Rewrite one binding; a method that TVM's visitor calls."""
        if isinstance(binding.value, relax.Call):
            call = relax.PyExprMutator.visit_call_(self, binding.value)
            result = self._rewrite(self, call, binding.var)
        elif isinstance(binding.value, relax.TupleGetItem):
            result = relax.PyExprMutator.visit_tuple_getitem_(self, binding.value)
            fields = self.value(result.tuple_value)
            if isinstance(fields, relax.Tuple):
                result = fields.fields[result.index]
        else:
            relax.PyExprMutator.visit_var_binding_(self, binding)
            return
        # Only outputs of a dataflow block have to be bound as such.
        in_dataflow = self.builder_.current_block_is_dataflow()
        inner = isinstance(binding.var, relax.DataflowVar) or not in_dataflow
        if isinstance(result, relax.Var) and inner:
            self.set_var_remap(binding.var, result)
            return
        emit = self.builder_.emit if inner else self.builder_.emit_output
        self.set_var_remap(binding.var, emit(result, binding.var.name))

    def emit(self, expr: Any, name: str = "") -> Any:
        """Bind an expression to a new variable in front of the current one."""
        return self.builder_.emit(expr, name)

    def value(self, expr: Any) -> Any:
        """Expression that a variable is bound to; other expressions are their own value."""
        while isinstance(expr, relax.Var):
            found = self.lookup_binding(expr)
            if found is None:
                return expr
            expr = found
        return expr
