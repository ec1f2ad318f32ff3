"""Code generation: composite functions of integer layers to kernels, as ``relax.ext.bitwright``.

TVM's ``RunCodegen`` hands over every function with the attribute ``Codegen="bitwright"``. What the
function computes is read from its body: integer operators, in the form that ``LowerToInteger``
writes; no float operator is matched but the last multiplication of a layer that leaves the
integers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import GenericConst, Op

from bitwright.errors import UsageError
from bitwright.soft_edge import SoftEdge
from bitwright.targets.catalogue import available
from bitwright.targets.kernels import activation_matmul, convolution, matmul
from bitwright.targets.kernels.host import ISAS, Isa, target
from bitwright.targets.kernels.spec import (
    ActivationMatmul,
    Codes,
    Convolution,
    Floats,
    Matmul,
    Operand,
    Output,
)

__all__ = ["CODEGEN", "ISAS", "IntegerLayer", "generator", "read_layer"]

CODEGEN = "bitwright"

# Their names are TVM targets from here on: tvm.target.Target("bitfusion/eyeriss").
for _accelerator in available().values():
    with contextlib.suppress(UsageError):  # a name that TVM has: told when it is asked for
        _accelerator.tvm_target()


Spec: TypeAlias = ActivationMatmul | Convolution | Matmul


@dataclass(frozen=True)
class IntegerLayer:
    """An integer layer, read from the body of its function.

    Attributes
    ----------
    spec
        What a kernel has to compute.
    data, weights, bias, shift, factors
        The expressions of its operands, parameters or constants; ``factors`` are the multipliers
        of the requantization, or the scales where the result is float. ``bias`` and ``shift`` are
        None where there are none. In a product of two activations, ``weights`` is the right one.
    """

    spec: Spec
    data: Any
    weights: Any
    bias: Any | None
    shift: Any | None
    factors: Any

    @property
    def operands(self) -> list[Any]:
        """What the kernel takes, in its order."""
        found = [self.data, self.weights, self.bias, self.shift, self.factors]
        return [entry for entry in found if entry is not None]


def _name(expr: Any) -> str:
    if isinstance(expr, relax.Call) and isinstance(expr.op, Op):
        return str(expr.op.name).removeprefix("relax.")
    return ""


def _width(bits: int) -> Literal[32, 64]:
    return 64 if bits == 64 else 32


def _static(shape: Any) -> list[int | None]:
    return [getattr(dim, "value", None) for dim in shape]


class _Reader:
    """Reads one function from its result backwards; any surprise raises ``_OtherError``."""

    def __init__(self, function: Any) -> None:
        self._parameters = set(function.params)
        self._bound = {
            binding.var: binding.value
            for block in function.body.blocks
            for binding in block.bindings
        }
        self._result = function.body.body

    def value(self, expr: Any) -> Any:
        while expr in self._bound:
            expr = self._bound[expr]
        return expr

    def read(self) -> IntegerLayer:
        output, sums, factors = self._end(self.value(self._result))
        bits = int(str(sums.ty.dtype).removeprefix("int"))
        bias = shift = None
        call = self.value(sums)
        if _name(call) == "add":
            bias, call = call.args[1], self.value(call.args[0])
        if _name(call) == "left_shift":
            shift, call = call.args[1], self.value(call.args[0])
        name = _name(call)
        if name not in ("nn.conv1d", "nn.conv2d", "nn.conv3d", "matmul"):
            raise _OtherError
        data, operand = self._activation(call.args[0])
        if self._is_activation(call.args[1]):
            right, right_operand = self._activation(call.args[1])
            left_shape, right_shape = (tuple(_static(operand.ty.shape)) for operand in call.args)
            if name != "matmul" or bias is not None or shift is not None or right.same_as(data):
                raise _OtherError
            product = ActivationMatmul(
                left_shape, right_shape, operand, right_operand, output, _width(bits)
            )
            if not _is_vector(factors.ty.shape, 1, 0):
                raise _OtherError
            return IntegerLayer(product, data, right, None, None, self._source(factors))
        weights = self._weights(call.args[1])
        # Weights wider than int16 come from zero points of 16-bit weights.
        weight_type = str(self.value(call.args[1]).args[0].ty.dtype)
        if weight_type not in ("int8", "int16"):
            raise _OtherError
        options: dict[str, Any] = {
            "data": operand,
            "weight": weight_type,
            "output": output,
            "accumulator_bits": bits,
            "bias": bias is not None,
            "shift": shift is not None,
        }
        spec = self._matmul(call, options) if name == "matmul" else self._convolution(call, options)
        channels = spec.columns if isinstance(spec, Matmul) else spec.out_channels
        behind = 0 if isinstance(spec, Matmul) else len(spec.size)
        for vector in (bias, shift, factors):
            if vector is not None and not _is_vector(vector.ty.shape, channels, behind):
                raise _OtherError
        sources = (None if v is None else self._source(v) for v in (bias, shift, factors))
        return IntegerLayer(spec, data, weights, *sources)

    def _source(self, vector: Any) -> Any:
        """The constant or parameter behind a vector that was shaped and widened."""
        call = self.value(vector)
        while _name(call) in ("reshape", "astype"):
            vector = call.args[0]
            call = self.value(vector)
        return vector

    def _end(self, call: Any) -> tuple[Output, Any, Any]:
        """What becomes of the sums, their expression, and the factors they are multiplied by."""
        if _name(call) == "bitwright.requantize":
            names = ("zero_point", "low", "high")
            numbers = [int(call.attrs[name]) for name in names]
            form: Any = str(call.attrs["form"])
            dtype: Any = str(call.attrs["dtype"])
            output = Codes(dtype, numbers[0], numbers[1], numbers[2], form)
            return output, call.args[0], call.args[1]
        high, low = math.inf, -math.inf
        if _name(call) == "minimum":
            high, call = _scalar(call.args[1]), self.value(call.args[0])
        if _name(call) == "maximum":
            low, call = _scalar(call.args[1]), self.value(call.args[0])
        if _name(call) != "multiply":
            raise _OtherError
        wide = self.value(call.args[0])
        if _name(wide) != "astype" or not str(wide.args[0].ty.dtype).startswith("int"):
            raise _OtherError
        return Floats(low, high), wide.args[0], call.args[1]

    def _activation(self, expr: Any) -> tuple[Any, Operand]:
        call = self.value(expr)
        zero_point = 0
        if _name(call) == "subtract":
            zero_point, call = int(_scalar(call.args[1])), self.value(call.args[0])
        if _name(call) != "astype":
            raise _OtherError
        data, layout = call.args[0], None
        if _name(self.value(data)) == "bitwright.soft_edge_decode":
            decode = self.value(data)
            data, layout = decode.args[0], SoftEdge.parse(str(decode.attrs["layout"]))
        dtype = str(data.ty.dtype)
        if data not in self._parameters or dtype not in ("int8", "uint8", "int16", "uint16"):
            raise _OtherError
        return data, Operand(dtype, zero_point, layout)  # type: ignore[arg-type]

    def _is_activation(self, expr: Any) -> bool:
        try:
            self._activation(expr)
        except _OtherError:
            return False
        return True

    def _weights(self, expr: Any) -> Any:
        """Constant weights, or the parameter that holds them in the kernel's layout."""
        call = self.value(expr)
        if _name(call) != "astype":
            raise _OtherError
        weights = self.value(call.args[0])
        if _name(weights) == "call_tir" and len(weights.args[1].fields) == 1:
            weights = weights.args[1].fields[0]
        if not isinstance(weights, GenericConst) and weights not in self._parameters:
            raise _OtherError
        return weights

    @staticmethod
    def _convolution(call: Any, options: Mapping[str, Any]) -> Convolution:
        batch, channels, *size = _static(call.args[0].ty.shape)
        out_channels, _, *kernel = _static(call.args[1].ty.shape)
        if channels is None or None in size or None in kernel or out_channels is None:
            raise _OtherError
        attrs = call.attrs
        if str(attrs.data_layout)[:2] != "NC" or str(attrs.kernel_layout)[:2] != "OI":
            raise _OtherError
        return Convolution(
            batch,
            channels,
            tuple(dim for dim in size if dim is not None),
            out_channels,
            tuple(dim for dim in kernel if dim is not None),
            strides=tuple(int(n) for n in attrs.strides),
            dilations=tuple(int(n) for n in attrs.dilation),
            pads=tuple(int(n) for n in attrs.padding),
            groups=int(attrs.groups),
            **options,
        )

    @staticmethod
    def _matmul(call: Any, options: Mapping[str, Any]) -> Matmul:
        *leading, depth = _static(call.args[0].ty.shape)
        weight_shape = _static(call.args[1].ty.shape)
        if len(weight_shape) != 2 or not leading or depth is None or weight_shape[1] is None:
            raise _OtherError
        return Matmul(tuple(leading), depth, weight_shape[1], **options)


class _OtherError(Exception):
    """The function is not of the form that a kernel computes."""


def _scalar(expr: Any) -> float:
    if not isinstance(expr, GenericConst) or math.prod(expr.value.shape) != 1:
        raise _OtherError
    return float(np.asarray(expr.value.numpy()).item())


def _is_vector(shape: Any, channels: int, behind: int) -> bool:
    """Whether a shape broadcasts one number, or one a channel, with ``behind`` axes behind."""
    sizes = _static(shape)
    if all(size == 1 for size in sizes):
        return True
    axis = len(sizes) - 1 - behind
    return axis >= 0 and all(
        size == (channels if index == axis else 1) for index, size in enumerate(sizes)
    )


def read_layer(function: Any) -> IntegerLayer | None:
    """Read an integer layer from its composite function; None if no kernel computes such a one."""
    try:
        return _Reader(function).read()
    except (_OtherError, UsageError):
        return None


def generator(spec: Spec) -> Any:
    """Module that builds the kernel and its weight layout: ``kernel``, ``layout``, ``pack``, ..."""
    if isinstance(spec, ActivationMatmul):
        return activation_matmul
    return matmul if isinstance(spec, Matmul) else convolution


@tvm_ffi.register_global_func(f"relax.ext.{CODEGEN}", override=True)
def _generate(
    functions: Sequence[Any], options: Mapping[str, Any], _constant_names: Mapping[Any, str]
) -> list[Any]:
    """Build one library with a kernel for each function."""
    isa: Isa = ISAS[str(options["isa"])]
    built = {}
    for function in functions:
        name = str(function.attrs["global_symbol"])
        if name in built:
            continue
        layer = read_layer(function)
        if layer is None or layer.operands != list(function.params):
            raise ValueError(f"{name} is not of the form that PackWeights writes")
        built[name] = generator(layer.spec).kernel(layer.spec, isa, name)
    module = tvm.IRModule({tvm.ir.GlobalVar(name): body for name, body in built.items()})
    return [tvm.compile(module, target=tvm.target.Target(target(isa))).mod]
