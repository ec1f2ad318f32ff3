"""From an imported module to an executable and the parameters that stand beside it."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx

from bitwright.errors import BitwrightError, RunError, first_line
from bitwright.passes import lower_cond, scan_recursion
from bitwright.passes.expressions import (
    LAYER_OPERATORS,
    bindings,
    bodies,
    calls,
    constant,
    has_branches,
    is_layer,
    is_move,
    node_name,
    operator,
    scans,
    static_shape,
)
from bitwright.passes.link_entry import (
    ENTRY,
    LinkEntry,
    SentLayer,
    Transfers,
    add_link_entry,
    read_transfers,
)
from bitwright.passes.ops import COND, SCAN, SOFT_EDGE_ENCODE
from bitwright.passes.pack_weights import PARAMETER_NAMES
from bitwright.passes.partition_for_target import PRECISIONS
from bitwright.passes.permute_channels import PERMUTED
from bitwright.passes.popcount_reorder import Measured
from bitwright.passes.registry import DEFAULT, Pipeline
from bitwright.targets import Accelerator
from bitwright.targets.codegen import CODEGEN, read_layer
from bitwright.targets.kernels.host import find, target
from bitwright.vocabulary import ActivationFormat, Precision

__all__ = ["Built", "BuiltLink", "CompiledLayer", "HostOperator", "PassReport", "build"]

TRANSFORM = "main_transform_params"

_OF_TRANSFERS = ("materialize-transfers", "popcount-reorder")


@dataclass(frozen=True, slots=True)
class CompiledLayer:
    """A layer of the artefact.

    Attributes
    ----------
    name
        The ONNX node.
    operator
        ``conv1d``, ``conv2d``, ``conv3d`` or ``matmul``.
    weight_bits, activation_bits
        Its precision; ``weight_bits`` is 0 for a product of two activations.
    accumulator_bits
        32 or 64.
    kernel
        Whether a kernel of bitwright computes it, or code that TVM makes.
    weight_count, weight_bytes
        Number of weights and what they take: ``ceil(bits * n / 8)``.
    activation_format
        ``int``, or which soft-edge codes the inputs are.
    """

    name: str
    operator: str
    weight_bits: int
    activation_bits: int
    accumulator_bits: int
    kernel: bool
    weight_count: int
    weight_bytes: int
    activation_format: ActivationFormat = "int"


@dataclass(frozen=True, slots=True)
class HostOperator:
    """An operator that computes in floating point on the host, and why."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class PassReport:
    """What a pass did to the module: how many of each sort of operator there were afterwards.

    Attributes
    ----------
    name, options
        The pass.
    seconds
        Time it took.
    quantizers, float_operators, integer_operators
        Calls afterwards, in all functions; moves of values do not count.
    layers, parameters
        Composite functions, and parameters of ``main`` behind its inputs.
    weight_transitions
        Of a pass that permutes channels: layer to transitions of its weights, unsorted, for one
        sample, before and after.
    """

    name: str
    options: dict[str, Any]
    seconds: float
    quantizers: int
    float_operators: int
    integer_operators: int
    layers: int
    parameters: int
    weight_transitions: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class BuiltLink:
    """The entry point that counts transitions.

    Attributes
    ----------
    layers
        How operands are sent, in the order in which ``main_link`` returns what it counted.
    skipped
        Layers whose operands are not sent, and why.
    batched
        Whether several samples can be sent in one call.
    parameters
        What ``main_link`` takes behind the parameters of ``main``.
    """

    layers: tuple[SentLayer, ...]
    skipped: Mapping[str, str]
    batched: bool
    parameters: dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Built:
    """What :func:`build` makes.

    Attributes
    ----------
    executable
        TVM's; ``main(*inputs, *transformed)`` returns the outputs, where ``transformed`` is what
        the function ``main_transform_params`` returns for the tuple of all parameters. It is called
        once, after loading. A model without parameters has no such function.
    parameters
        Name to array, in order: packed weights (uint8), biases, multipliers, tables.
    layers, host_operators
        What became integer, and what did not.
    passes
        What each pass did.
    target
        Options of the TVM target that the code is for.
    isa
        Name of the kernels' instruction set.
    link
        The entry point that counts transitions, where the pipeline has transfers. Its parameters
        are brought into their form by ``main_link_transform_params``.
    """

    executable: Any
    parameters: dict[str, npt.NDArray[Any]]
    layers: tuple[CompiledLayer, ...]
    host_operators: tuple[HostOperator, ...]
    passes: tuple[PassReport, ...]
    target: dict[str, str]
    isa: str
    link: BuiltLink | None


def build(
    module: Any,
    accelerator: Accelerator,
    *,
    pipeline: Pipeline = DEFAULT,
    measured: Mapping[str, Measured] | None = None,
    dump_ir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Built:
    """Run the passes and compile.

    Parameters
    ----------
    module
        An imported model: Relax with quantizers, entry function ``main``.
    accelerator
        What the layers are partitioned for.
    pipeline
        The passes and their options.
    measured
        What layers sent on samples, for orders that depend on it.
    dump_ir
        A folder that gets the module after each pass, as text.
    progress
        Called with the name of each step.

    Raises
    ------
    PlanError
        If the accelerator cannot do the precision of a layer.
    RunError
        If TVM fails; the cause holds its message.
    """
    if "main" not in [variable.name_hint for variable in module.get_global_vars()]:
        raise RunError(
            "the module has no function main", fix="import a model, or name its entry so"
        )
    isa = find(str(pipeline.options["pack-weights"].get("isa", "")))
    steps = pipeline.create(target=accelerator.name, isa=isa.name, measured=measured)
    reports = []
    if dump_ir is not None:
        dump_ir.mkdir(exist_ok=True)
        _dump(dump_ir / "0-import.txt", module)
    layers: tuple[CompiledLayer, ...] = ()
    host_operators = None
    in_loops: dict[str, list[CompiledLayer]] = {}
    transfers: Transfers | None = None
    unsent = module
    for name, step in steps.items():
        if name == "materialize-transfers":
            unsent = module
        if name == "lower-scan":
            in_loops = _layers_in_loops(module)
            if "materialize-transfers" in steps:
                made = [name for name in _OF_TRANSFERS if name in steps][-1]
                transfers = _run(made, read_transfers, module)
                module = unsent  # main goes on without
        if name in ("lower-scan", "schedule-floats") and host_operators is None:
            host_operators = _host_operators(module)  # from here on, floats become kernels
        if name == "pack-weights":  # which lets equal layers share a function
            layers = _layers(module, in_loops, kernels=step.kernels)
        if progress is not None:
            progress(name)
        start = time.perf_counter()
        module = _run(name, step, module)
        seconds = time.perf_counter() - start
        reports.append(_report(name, dict(pipeline.options[name]), seconds, module))
        if dump_ir is not None:
            _dump(dump_ir / f"{len(reports)}-{name}.txt", module)
    left = dict.fromkeys(node_name(call) for call in scans(module))
    named = {entry.name: entry for entry in host_operators or _host_operators(module)}
    named.update((name, HostOperator(name, "scan", _NO_KERNEL)) for name in left)
    host_operators = tuple(named.values())
    if progress is not None:
        progress("code generation")
    entries = ["main"]
    parameters = _parameters(module["main"])
    link = None
    if transfers is not None and transfers.layers:
        found = _run("code generation", functools.partial(_add_link, transfers), module)
        module = found.module
        entries.append(ENTRY)
        own = _parameters(module[ENTRY])
        own = {name: array for name, array in own.items() if name not in parameters}
        link = BuiltLink(found.layers, transfers.skipped, found.batched, own)
    module, _ = relax.frontend.detach_params(module)
    options = {CODEGEN: {"isa": isa.name}}
    # TVM's memory planning lets the branches of an If share memory that only one of them allocates.
    disabled = ["StaticPlanBlockMemory"] if has_branches(module) else []
    # Functions that are no entries would keep their calls of what the kernels replace.
    generate = relax.transform.RunCodegen(options, [*entries, *bodies(module)])
    module = _run("code generation", generate, module)
    # Behind code generation, which follows calls without end.
    module = _run("code generation", scan_recursion.lower, module)
    module = _run("code generation", lower_cond.lower, module)
    lift = [relax.transform.DeadCodeElimination(), relax.transform.LiftTransformParams()]
    module = _run("code generation", tvm.transform.Sequential(lift), module)
    host = tvm.target.Target(target(isa))
    with tvm.transform.PassContext(disabled_pass=disabled):
        executable = _run("compilation", functools.partial(_compile, target=host), module)
    return Built(
        executable, parameters, layers, host_operators, tuple(reports), target(isa), isa.name, link
    )


def _add_link(transfers: Transfers, module: Any) -> LinkEntry:
    return add_link_entry(module, transfers)


def _parameters(entry: Any) -> dict[str, npt.NDArray[Any]]:
    """What an entry point takes behind its inputs."""
    names = [str(name) for name in entry.attrs.get(PARAMETER_NAMES, [])]
    arrays = entry.attrs.get("params", [])
    return {name: np.asarray(array.numpy()) for name, array in zip(names, arrays, strict=True)}


@tvm.transform.module_pass(opt_level=0, name="PromiseNoAlias")
def _promise_no_alias(module: Any, _context: Any) -> Any:
    """Promise of every primitive function that its buffers do not overlap.

    Those that TVM makes to compute shapes do not, and one such function takes the promise of all
    others away, whose sums then go through memory.
    """
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            module[variable] = function.with_attr("tirx.noalias", True)
    return module


def _compile(module: Any, target: Any) -> Any:
    steps = [relax.get_pipeline("default"), _promise_no_alias]
    return tvm.compile(module, target=target, relax_pipeline=tvm.transform.Sequential(steps))


def _dump(path: Path, module: Any) -> None:
    # Without the constants: TVM cannot print those of operators that it does not know.
    path.write_text(module.script(show_meta=False), encoding="utf-8")


def _run(name: str, step: Callable[[Any], Any], module: Any) -> Any:
    try:
        return step(module)
    except BitwrightError:
        raise
    except Exception as error:  # TVM raises many kinds
        raise RunError(f"TVM fails in {name} ({first_line(error)})") from error


def _relax_functions(module: Any) -> list[tuple[str, Any]]:
    return [
        (variable.name_hint, function)
        for variable, function in module.functions_items()
        if isinstance(function, relax.Function)
    ]


def _is_float(expr: Any) -> bool:
    kinds = expr.ty.fields if isinstance(expr.ty, relax.TupleType) else [expr.ty]
    tensors = [kind for kind in kinds if isinstance(kind, relax.TensorType)]
    return any(str(kind.dtype).startswith("float") for kind in tensors)


# They carry values or change their type.
_CARRIERS = frozenset(
    "astype bitwright.unpack call_tir concat dequantize quantize split take".split()
)


def _computes(call: Any) -> bool:
    return operator(call) not in {"", *_CARRIERS} and not is_move(call)


def _computes_floats(call: Any) -> bool:
    operands = [entry for entry in call.args if isinstance(entry.ty, relax.TensorType)]
    rescaled = operator(call) == "bitwright.requantize"  # integers in, integers out
    if operator(call) == "call_tir":  # a kernel of floats, or weights brought into their layout
        return _is_float(call)
    return _computes(call) and not rescaled and any(map(_is_float, [call, *operands]))


def _report(name: str, options: dict[str, Any], seconds: float, module: Any) -> PassReport:
    count: Counter[str] = Counter()
    for _, function in _relax_functions(module):
        for call in calls(function):
            if operator(call) in ("quantize", "dequantize"):
                count["quantizers"] += 1
            elif _computes_floats(call):
                count["float"] += 1
            elif _computes(call):
                count["integer"] += 1
        count["layers"] += is_layer(function)
    main = module["main"].attrs
    permuted = (module.get_attr(PERMUTED) or {}) if name == "permute-channels" else {}
    return PassReport(
        name,
        options,
        seconds,
        count["quantizers"],
        count["float"],
        count["integer"],
        count["layers"],
        len(main.get(PARAMETER_NAMES, [])) if main else 0,
        {str(layer): (int(counts[0]), int(counts[1])) for layer, counts in permuted.items()},
    )


def _layers_in_loops(module: Any) -> dict[str, list[CompiledLayer]]:
    """Products of codes with constant weights in the bodies of loops, by the loop's ONNX node."""
    precisions = module.get_attr(PRECISIONS) or {}
    found: dict[str, list[CompiledLayer]] = {}
    for loop in scans(module):
        bound = bindings(module[loop.args[0]])
        for call in bound.values():
            if operator(call) != "matmul" or not str(call.ty.dtype).startswith("int"):
                continue
            wide: Any = bound.get(call.args[1])
            weights = constant(wide.args[0]) if operator(wide) == "astype" else None
            text = precisions.get(node_name(call))
            if weights is None or text is None:
                continue
            precision = Precision.parse(str(text))
            layer = CompiledLayer(
                node_name(call),
                "matmul",
                precision.weight_bits,
                precision.activation_bits,
                int(str(call.ty.dtype).removeprefix("int")),
                True,
                weights.size,
                -(-precision.weight_bits * weights.size // 8),
                precision.activation_format,
            )
            found.setdefault(node_name(loop), []).append(layer)
    return found


def _layers(
    module: Any, in_loops: dict[str, list[CompiledLayer]], *, kernels: bool
) -> tuple[CompiledLayer, ...]:
    found: dict[str, list[CompiledLayer]] = {}
    for name, function in _relax_functions(module):
        if not is_layer(function):
            if function.attrs and "node" in function.attrs:  # a kernel with a loop
                found[name] = in_loops.get(str(function.attrs["node"]), [])
            continue
        attrs = function.attrs
        products = [
            value for value in bindings(function).values() if operator(value) in LAYER_OPERATORS
        ]
        sums = products[0]
        bits = int(attrs.get("weight_bits", 0))
        weights = 0
        if bits:
            shapes = [argument.ty.shape for argument in sums.args]
            static = [s for s in shapes if all(hasattr(dim, "value") for dim in s)]
            weights = math.prod(int(dim.value) for dim in static[-1])
        layer = CompiledLayer(
            str(attrs["layer"]),
            str(attrs["Composite"]).removeprefix("bitwright."),
            bits,
            int(
                attrs["activation_bits"] if "activation_bits" in attrs else max(attrs["input_bits"])
            ),
            int(str(sums.ty.dtype).removeprefix("int")),
            kernels and read_layer(function) is not None,
            weights,
            -(-bits * weights // 8),
            cast("ActivationFormat", str(attrs.get("activation_format", "int"))),
        )
        found[name] = [layer]
    # In the order in which main calls them.
    order = []
    for _, call in _called(module):
        if isinstance(call.op, tvm.ir.GlobalVar):
            order += found.get(call.op.name_hint, [])
        elif operator(call) == SCAN:  # it stays one, and TVM makes the code of its body
            order += [replace(layer, kernel=False) for layer in in_loops.get(node_name(call), [])]
    # A layer whose sums are used in several ways has a function for each; it is one layer.
    layers = {layer.name: layer for layer in reversed(order)}
    return tuple(reversed(layers.values()))


def _called(module: Any) -> Iterator[tuple[str, Any]]:
    """Calls of main and of the branches that it calls, and what the variables are called."""
    functions = [module["main"]]
    for function in functions:  # it grows
        names = {value: var.name for var, value in bindings(function).items()}
        for call in calls(function):
            if operator(call) == COND:
                functions += [module[branch] for branch in call.args[:2]]
            else:
                yield names.get(call, ""), call


def _host_operators(module: Any) -> tuple[HostOperator, ...]:
    found: dict[str, HostOperator] = {}
    for variable, call in _called(module):
        name = operator(call)
        if name == SCAN and not any(map(_computes_floats, calls(module[call.args[0]]))):
            continue  # it is in fixed point
        if _computes_floats(call):
            title = node_name(call) or variable or name
            short = name.removeprefix("nn.").removeprefix("bitwright.")
            found.setdefault(title, HostOperator(title, short, _reason(call)))
    return tuple(found.values())


_NO_KERNEL = "recurrent: its body is called for each step, as no kernel computes it"


def _reason(call: Any) -> str:
    """Why an operator stays float."""
    name = operator(call)
    if name == SCAN:
        return "recurrent: a kernel with the loop over time inside"
    if name == SOFT_EDGE_ENCODE:
        return "it makes soft-edge codes of numbers that are no function of codes"
    if name in LAYER_OPERATORS:
        return "its operands are not both quantized"
    if name in ("mean", "sum") or name.startswith("nn.avg_pool"):
        shape = static_shape(call.args[0])
        if shape is None or None in shape[1:]:
            return "the sizes it averages over are symbolic (compile --input-shape fixes them)"
    return "it has no integer form, or no quantizers around it"
