"""PackWeights: weights become parameters, packed at their width; layers become kernel calls.

Constants leave the module, so that they can stand in a file of their own. Weights take
``ceil(bits * n / 8)`` bytes there and are unpacked, into the layout that the kernel wants, by
operators of the parameters alone, which ``LiftTransformParams`` moves to the time of loading::

    q1 = cls.conv1_layer(q)      ->   w = layout(bitwright.unpack(conv1_weight, bits=4, ...))
                                      q1 = cls.conv1_layer(q, w, conv1_bias, conv1_multiplier)

The body of a layer starts with the inverse of the layout, so TVM can compile it without a kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from bitwright.passes import ops
from bitwright.passes.expressions import (
    CallRewriter,
    as_block,
    bindings,
    constant,
    global_variable,
    is_layer,
    node_name,
    operator,
)
from bitwright.targets.codegen import CODEGEN, IntegerLayer, generator, read_layer
from bitwright.targets.kernels.host import Isa, find
from bitwright.targets.kernels.spec import Convolution, Matmul

__all__ = ["PARAMETER_NAMES", "PackWeights", "Parameters", "pack"]

Array = npt.NDArray[Any]
PARAMETER_NAMES = "bitwright.parameters"

# Smaller constants are attributes of their operators rather than data.
_LEAST_ELEMENTS = 32


def pack(values: npt.NDArray[np.integer[Any]], bits: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Pack integers densely.

    Parameters
    ----------
    values
        Integers of any shape, all within a range of ``2^bits``.
    bits
        2, 4, 8 or 16.

    Returns
    -------
    words, low
        uint8 [ceil(bits * n / 8)]: value ``i`` less ``low`` stands in bits ``[i * bits, (i + 1) *
        bits)``, lowest bit first. ``low`` is ``-2^(bits - 1)`` unless the values need another.

    Raises
    ------
    ValueError
        If the values span more than ``2^bits``.
    """
    least, largest = (int(values.min()), int(values.max())) if values.size else (0, 0)
    low = -(2 ** (bits - 1))
    if least < low or largest >= low + 2**bits:
        low = least
    if largest - low >= 2**bits:
        raise ValueError(f"values from {least} to {largest} do not fit {bits} bits")
    flat = values.reshape(-1).astype(np.int64) - low
    if bits >= 8:
        return flat.astype(f"<u{bits // 8}").view(np.uint8), low
    per_byte = 8 // bits
    flat = np.concatenate([flat, np.zeros(-len(flat) % per_byte, np.int64)])
    shifted = flat.reshape(-1, per_byte) << (np.arange(per_byte) * bits)
    return shifted.sum(axis=1).astype(np.uint8), low


class Parameters:
    """Parameters of the entry function, in order."""

    def __init__(self) -> None:
        self.variables: dict[str, Any] = {}
        self.arrays: dict[str, Array] = {}

    def add(self, name: str, array: Array) -> Any:
        """Return the variable of a parameter; equal ones of one name are the same."""
        number, unique = 1, name
        while unique in self.arrays:
            known = self.arrays[unique]
            if known.dtype == array.dtype and np.array_equal(known, array):
                return self.variables[unique]
            number += 1
            unique = f"{name}.{number}"
        self.arrays[unique] = np.ascontiguousarray(array)
        variable = relax.Var(unique, relax.TensorType(array.shape, array.dtype.name))
        self.variables[unique] = variable
        return variable


def _open(function: Any, parameters: list[Any], rewrite: Any) -> Any:
    """Give a function more parameters, and rewrite its calls."""
    opened = relax.Function(
        [*function.params, *parameters],
        function.body,
        function.ret_ty,
        function.is_pure,
        function.attrs,
    )
    return CallRewriter(None, rewrite).visit_expr(opened)


class _Packing:
    """Packs one module."""

    def __init__(self, mod: Any, isa: Isa, *, kernels: bool) -> None:
        self._mod = mod
        self._isa = isa
        self._kernels = kernels
        self.parameters = Parameters()
        self._functions: dict[Any, Any] = {}
        self._primitives: dict[str, Any] = {}
        self._shared: dict[str, Any] = {}
        # Composite function to its new variable and what its callers add to the arguments.
        self._opened: dict[Any, tuple[Any, list[Callable[[CallRewriter], Any]]]] = {}

    def run(self) -> Any:
        entry = None
        for variable, function in self._mod.functions_items():
            if is_layer(function):
                self._layer(variable, function)
            elif variable.name_hint == "main":
                entry = function
            else:
                self._functions[variable] = function
        assert entry is not None
        # Calls first: they ask for the parameters that main then takes.
        changed = _open(entry, [], self._in_main)
        changed = relax.Function(
            [*changed.params, *self.parameters.variables.values()],
            changed.body,
            changed.ret_ty,
            changed.is_pure,
            changed.attrs,
        )
        arrays = [tvm.runtime.tensor(array) for array in self.parameters.arrays.values()]
        changed = changed.with_attr("params", arrays)
        changed = changed.with_attr(PARAMETER_NAMES, list(self.parameters.arrays))
        functions = {**self._functions, self._mod.get_global_var("main"): changed}
        return tvm.IRModule(functions, attrs=self._mod.attrs, global_infos=self._mod.global_infos)

    # -- layers --------------------------------------------------------------------------------

    def _layer(self, variable: Any, function: Any) -> None:
        layer = read_layer(function)
        if layer is None:
            changed, arguments = self._plain(function)
            opened = global_variable(variable.name_hint, changed)
            self._functions[opened] = changed
        else:
            opened, arguments = self._kernel(function, layer)
        self._opened[variable] = opened, arguments

    def _kernel(self, function: Any, layer: IntegerLayer) -> Any:
        """A layer that a kernel computes: everything constant becomes a parameter.

        Layers are then equal where their kernels are, and share one function.
        """
        spec = layer.spec
        title = str(function.attrs["layer"])
        channels, behind = 1, 0
        if isinstance(spec, Matmul):
            channels = spec.columns
        elif isinstance(spec, Convolution):
            channels, behind = spec.out_channels, len(spec.size)
        digest = hashlib.sha256(repr(spec).encode()).hexdigest()[:16]
        symbol = str(function.attrs["Composite"]).replace(".", "_") + f"_{digest}"
        replacements: dict[Any, Any] = {}
        added: list[Any] = []
        arguments: list[Callable[[CallRewriter], Any]] = []
        weights = constant(layer.weights)
        if weights is not None:
            build = generator(spec)
            layout = build.layout(spec, self._isa)
            in_layout = relax.Var("weights", relax.TensorType(layout.shape, layout.dtype))
            unpack = self._add_primitive(build.unpack(spec, self._isa), f"{symbol}_unpack")
            replacements[layer.weights] = lambda rewriter: rewriter.emit(
                relax.call_tir(unpack, [in_layout], layer.weights.ty)
            )
            added.append(in_layout)
            bits = int(function.attrs["weight_bits"])
            arguments.append(self._packed_weights(title, weights, bits, layer, symbol))
        roles = {"bias": layer.bias, "shift": layer.shift, "multiplier": layer.factors}
        for role, expr in roles.items():
            array = constant(expr) if expr is not None else None
            if array is None:
                continue
            vector = np.broadcast_to(array.reshape(-1), (channels,))
            vector = vector.astype(np.int32) if role == "shift" else vector
            variable = relax.Var(role, relax.TensorType((channels,), vector.dtype.name))
            added.append(variable)
            replacements[expr] = _shaped(variable, behind, array.dtype.name)
            arguments.append(self._parameter(f"{title}.{role}", vector))
        if symbol not in self._shared:
            changed = _open(function, added, _replacing(replacements)).without_attr("layer")
            if self._kernels:
                changed = changed.with_attrs({"Codegen": CODEGEN, "global_symbol": symbol})
            self._shared[symbol] = opened = global_variable(symbol, changed)
            self._functions[opened] = changed
        return self._shared[symbol], arguments

    def _packed_weights(
        self, title: str, weights: Array, bits: int, layer: IntegerLayer | None, symbol: str
    ) -> Callable[[CallRewriter], Any]:
        """What a caller passes: weights out of their packed parameter, in the kernel's layout."""
        words, low = pack(weights, bits)

        def emit(rewriter: CallRewriter) -> Any:
            unpacked = rewriter.emit(
                ops.unpack(
                    self.parameters.add(f"{title}.weight", words),
                    shape=weights.shape,
                    bits=bits,
                    low=low,
                    dtype=weights.dtype.name,
                )
            )
            if layer is None:
                return unpacked
            build = generator(layer.spec)
            layout = build.layout(layer.spec, self._isa)
            function = self._add_primitive(build.pack(layer.spec, self._isa), f"{symbol}_pack")
            shape = relax.TensorType(layout.shape, layout.dtype)
            return rewriter.emit(relax.call_tir(function, [unpacked], shape))

        return emit

    def _plain(self, function: Any) -> Any:
        """A layer that TVM compiles: its weights are packed all the same."""
        bound = bindings(function)
        title = str(function.attrs["layer"])
        for call in bound.values():
            weights = constant(call.args[0]) if operator(call) == "astype" else None
            if weights is not None and "weight_bits" in function.attrs:
                variable = relax.Var("weights", call.args[0].ty)
                bits = int(function.attrs["weight_bits"])
                argument = self._packed_weights(title, weights, bits, None, "")
                replaced = _replacing({call.args[0]: variable})
                return _open(function, [variable], replaced), [argument]
        return function, []

    def _add_primitive(self, function: Any, name: str) -> Any:
        if name not in self._primitives:
            function = as_block(function)
            self._primitives[name] = variable = global_variable(name, function)
            self._functions[variable] = function
        return self._primitives[name]

    def _parameter(self, name: str, array: Array) -> Callable[[CallRewriter], Any]:
        return lambda _: self.parameters.add(name, array)

    # -- main ----------------------------------------------------------------------------------

    def _in_main(self, rewriter: CallRewriter, call: Any, var: Any) -> Any:
        if call.op in self._opened:
            opened, added = self._opened[call.op]
            arguments = [*call.args, *(argument(rewriter) for argument in added)]
            return relax.Call(opened, arguments, span=call.span)
        title = node_name(call) or var.name

        def as_parameter(argument: Any, role: str) -> Any:
            if isinstance(argument, relax.Tuple):  # what a primitive function takes
                return relax.Tuple([as_parameter(field, role) for field in argument.fields])
            array = constant(argument)
            if array is None or array.size < _LEAST_ELEMENTS:
                return argument
            return self.parameters.add(f"{title}.{role}", array)

        arguments = [
            as_parameter(
                argument, "table" if operator(call) == "take" and index == 0 else "constant"
            )
            for index, argument in enumerate(call.args)
        ]
        return relax.Call(call.op, arguments, call.attrs, call.ty_args, call.span)


def _shaped(variable: Any, behind: int, dtype: str) -> Callable[[CallRewriter], Any]:
    """Emit a vector of channels with axes behind it, in the type that the body computes with."""

    def emit(rewriter: CallRewriter) -> Any:
        vector = variable
        if vector.ty.dtype != dtype:
            vector = rewriter.emit(relax.op.astype(vector, dtype))
        if behind:
            vector = rewriter.emit(relax.op.reshape(vector, (-1, *(1,) * behind)))
        return vector

    return emit


def _replacing(
    replacements: Mapping[Any, Any],
) -> Callable[[CallRewriter, Any, Any], Any]:
    """Replace constants by variables, or by what a function emits where they are used first."""
    emitted: dict[Any, Any] = {}

    def replace(rewriter: CallRewriter, call: Any, _var: Any) -> Any:
        arguments = list(call.args)
        for index, argument in enumerate(arguments):
            if argument in replacements:
                if argument not in emitted:
                    new = replacements[argument]
                    emitted[argument] = new if isinstance(new, relax.Var) else new(rewriter)
                arguments[index] = emitted[argument]
        return relax.Call(call.op, arguments, call.attrs, call.ty_args, call.span)

    return replace


@tvm.transform.module_pass(opt_level=0, name="PackWeights")
class PackWeights:
    """Make parameters of the constants of ``main`` and its layers; see the module's docstring.

    Requires: integer layers (PartitionForTarget, LowerToInteger). Ensures: ``main`` takes the
    constants as parameters behind its inputs; their values stand in its attribute ``params``, as
    ``tvm.relax.frontend.detach_params`` expects, their names in ``bitwright.parameters``. Layers
    that a kernel computes have the attribute ``Codegen``.

    Parameters
    ----------
    isa
        Instruction set of the kernels, which decides their layout: ``avx2`` or ``generic``; empty
        for the best of this machine.
    kernels
        Whether ``RunCodegen`` follows, which makes kernels of the layers. Without it TVM compiles
        their bodies, to the same bits.

    Raises
    ------
    UsageError
        If there is no such instruction set.
    """

    def __init__(self, isa: str = "", kernels: bool = True) -> None:
        find(isa)
        self.isa = isa
        self.kernels = kernels

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Rewrite ``main`` and all composite functions."""
        names = [variable.name_hint for variable in mod.get_global_vars()]
        if "main" not in names:
            raise ValueError("the module has no function main")
        if PARAMETER_NAMES in (mod["main"].attrs or {}):
            return mod  # done before
        return _Packing(mod, find(self.isa), kernels=self.kernels).run()
