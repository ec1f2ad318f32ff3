"""``bitwright compile``: an ONNX model in, an artefact out."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import re
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from bitwright import targets
from bitwright.artifact import (
    Artifact,
    FloatModel,
    Host,
    HostOperator,
    LayerEntry,
    LinkEntry,
    ModelEntry,
    PassEntry,
    SentLayerEntry,
    TensorEntry,
    check_output_folder,
    load_artifact,
    needed_features,
    parameter_entries,
    read_manifest,
    save_artifact,
    sha256,
)
from bitwright.costing import cost_document
from bitwright.errors import (
    BitwrightError,
    ModelError,
    OutputError,
    RunError,
    UsageError,
    first_line,
)
from bitwright.files import write_atomically
from bitwright.planning import is_study_plan, plan_for, plan_of
from bitwright.quant.float_ops import Array
from bitwright.quant.layers import find_layers, layer_nodes
from bitwright.quant.load import Model, ValueType, load
from bitwright.quant.observers import ClipMethod
from bitwright.quant.quantizer import quantize_model
from bitwright.quant.recipes import RecipeName
from bitwright.quant.samples import ProgressCallback, Samples
from bitwright.quant.selective_scan import selective_scans
from bitwright.vocabulary import Activation, Precision, PrecisionPlan

__all__ = [
    "Passes",
    "compile",
    "describe_passes",
    "describe_target",
    "describe_targets",
    "refuse_options",
]


@dataclass(frozen=True, slots=True)
class Passes:
    """Result of :func:`describe_passes`.

    Attributes
    ----------
    available
        The passes that are installed: names, options, what they require and ensure.
    applied
        Those that an artefact was compiled with, in their order, with what they did.
    layers, host_operators
        What they made of the artefact's model: integer layers, and what stays float.
    link
        How the operands of its layers are sent, and why so; None without transfers.
    """

    available: tuple[Any, ...]
    applied: tuple[PassEntry, ...]
    layers: tuple[LayerEntry, ...]
    host_operators: tuple[HostOperator, ...]
    link: LinkEntry | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "available": [asdict(entry) for entry in self.available],
            "applied": [entry.model_dump() for entry in self.applied],
            "layers": [entry.model_dump() for entry in self.layers],
            "host_operators": [entry.model_dump() for entry in self.host_operators],
            "link": None if self.link is None else self.link.model_dump(mode="json"),
        }


def describe_passes(artifact: str | Path | None = None) -> Passes:
    """List the passes, and what they did to a model.

    Parameters
    ----------
    artifact
        A folder that :func:`compile` wrote.

    Raises
    ------
    ArtifactError
        If the folder is no artefact.
    """
    from bitwright.passes.registry import available

    passes = tuple(available().values())
    if artifact is None:
        return Passes(passes, (), (), ())
    manifest = read_manifest(Path(artifact))
    return Passes(passes, manifest.passes, manifest.layers, manifest.host_operators, manifest.link)


def describe_targets() -> targets.Installed:
    """The accelerators that are installed, and why others cannot be used."""
    return targets.installed()


def describe_target(target: str | Path) -> targets.Accelerator:
    """The description of an accelerator.

    Parameters
    ----------
    target
        Its name, or the path of its description.

    Raises
    ------
    UsageError
        If there is no such accelerator, or its description cannot be read.
    """
    return targets.get(target)


def compile(  # noqa: A001 - the command's name
    model: str | Path,
    target: str | Path | None = None,
    *,
    output: str | Path,
    precision: str | Precision | None = None,
    plan: PrecisionPlan | str | Path | None = None,
    calibration: str | Path | Mapping[str, Array] | None = None,
    input_shapes: Mapping[str, Sequence[int | None]] | None = None,
    passes: str = "",
    overwrite: bool = False,
    keep_qdq: bool = True,
    dump_ir: str | Path | None = None,
    recipe: RecipeName = "default",
    clip: ClipMethod | None = None,
    percentile: float | None = None,
    per_channel: bool | None = None,
    asymmetric: bool = False,
    rotation: bool = True,
    elementwise_bits: int | None = None,
    loop_bits: int | None = None,
    batch_size: int | None = None,
    progress: ProgressCallback | None = None,
) -> Artifact:
    """Compile a model into an artefact that computes in the integers of an accelerator.

    Parameters
    ----------
    model
        An ONNX file. A float model is quantized first; a model that is quantized already, by
        bitwright or another tool, is taken as it is, without any option of quantization.
    target
        An accelerator: its name, or the path of its description; by default that of the study
        that the plan is from.
    output
        The folder to write.
    precision
        For a float model: one precision for all layers, for example ``w8a8``; or
    plan
        a precision plan, the file of one, or a plan of a study: ``DIR#3``.
    calibration
        For a float model: a few hundred real samples, as in :func:`bitwright.quantize`. By default,
        with a plan of a study, those of the study, and its options of quantization.
    input_shapes
        Fixes symbolic sizes of the inputs; None leaves one symbolic. Kernels want the sizes of
        images fixed: TVM's own, slow code computes the layers of others. Batches may be symbolic.
    passes
        Passes to add or to set options of, for example ``pack-weights=isa:generic``;
        :func:`bitwright.describe_passes` lists them.
    overwrite
        Whether an artefact at ``output`` is replaced.
    keep_qdq
        Whether the artefact keeps the quantized ONNX model, for :func:`bitwright.run` to compare.
        With the pass ``soft-edge``, which computes otherwise, it does not.
    dump_ir
        A folder for the module after each pass, as text.
    recipe, clip, percentile, per_channel, asymmetric, rotation
        Options of quantization, as in :func:`bitwright.quantize`.
    elementwise_bits, loop_bits, batch_size
        Options of quantization, as in :func:`bitwright.quantize`.
    progress
        Called with steps done and in total.

    Returns
    -------
    Artifact
        The artefact, loaded.

    Raises
    ------
    ModelError, PlanError, DataError, OutputError, UsageError
        If the model, the plan, the samples, the output or an option has to change.
    RunError
        If TVM fails; a file beside the output holds its full message.
    """
    folder = check_output_folder(output, overwrite=overwrite)
    dumps = None if dump_ir is None else _dump_folder(dump_ir)
    options: dict[str, Any] = {
        "recipe": recipe,
        "clip": clip,
        "percentile": percentile,
        "per_channel": per_channel,
        "asymmetric": asymmetric,
        "rotation": rotation,
        "batch_size": batch_size,
    }
    if is_study_plan(plan):
        target, calibration, options = _as_in_study(str(plan), target, calibration, options)
    if target is None:
        raise UsageError(
            "there is no target", fix="name one: --target; bitwright targets lists them"
        )
    accelerator = targets.get(target)
    loaded = load(model)
    _refuse_other_quantization(loaded)
    choice: dict[str, Any] = {
        "precision": precision,
        "plan": plan,
        "elementwise_bits": elementwise_bits,
        "loop_bits": loop_bits,
    }
    if loaded.is_quantized:
        refuse_options({**choice, **options, "calibration": calibration}, loaded.source)
        complete = plan_of(loaded)
        accelerator.check(complete.layers, scan_inputs=complete.scan_inputs, where=loaded.source)
    else:
        complete = plan_for(loaded, accelerator, recipe=recipe, **choice)
        if calibration is None:
            raise UsageError(
                f"{loaded.source} is a float model, and there are no samples to quantize it with",
                fix="name them: --calibration FILE.npz",
            )
    where = str(plan) if isinstance(plan, str | Path) else loaded.source
    layers, _ = find_layers(loaded)
    accelerator.check_kinds(layers, complete.layers, where=where)
    accelerator.check_memory(layers, complete.layers, where=where)
    sized = loaded.with_input_shapes(input_shapes) if input_shapes else loaded
    costs = cost_document(sized, accelerator, complete)
    _check_compiler()
    pipeline = _pipeline(passes, target)
    soft_edges = _soft_edges(loaded, complete, pipeline, accelerator)

    from bitwright.importer import check_operators, import_model
    from bitwright.passes.build import build

    check_operators(loaded)

    quantized, float_model = loaded, None
    samples = None if calibration is None else Samples(calibration, loaded.inputs)
    if samples is not None:
        result = quantize_model(loaded, complete, samples, progress=progress, **options)
        complete = result.plan
        quantized = load(result.model)
        quantized.source = loaded.source  # for messages
        float_model = FloatModel(path=str(Path(model).absolute()), sha256=sha256(Path(model)))
    complete = replace(
        complete,
        target=accelerator.name,
        scan_inputs={**complete.scan_inputs, **soft_edges},
    )
    if input_shapes:
        quantized = quantized.with_input_shapes(input_shapes)

    steps = len(pipeline.options) + 1  # the last one is code generation
    done = itertools.count()

    def step(_name: str) -> None:
        if progress is not None:
            progress(next(done), steps)

    log = folder.with_name(f"{folder.name}.bitwright-error.log")
    with _told_in_one_sentence(log, layer_nodes(quantized)):
        built = build(
            import_model(quantized),
            accelerator,
            pipeline=pipeline,
            measured=_measured(quantized, samples, pipeline, target),
            dump_ir=dumps,
            progress=step,
        )
        built_plan = _with_formats(complete, built.layers)
        if soft_edges or built_plan != complete:  # it computes otherwise than the quantized model
            complete, keep_qdq = built_plan, False
            sized = load(model).with_input_shapes(input_shapes or {})
            costs = cost_document(sized, accelerator, complete)
        manifest: dict[str, Any] = {
            "target": accelerator.name,
            "model": ModelEntry(
                source=loaded.source,
                structure_hash=quantized.structure_hash,
                weights_hash=quantized.weights_hash,
                float_model=float_model,
            ),
            "inputs": tuple(map(_tensor, quantized.inputs)),
            "outputs": tuple(map(_tensor, quantized.outputs)),
            "layers": tuple(map(_layer, built.layers)),
            "host_operators": tuple(HostOperator(**asdict(e)) for e in built.host_operators),
            "passes": tuple(map(_pass, built.passes)),
            "link": _link(built.link),
            "host": Host(
                machine=platform.machine(),
                target=built.target,
                features=needed_features(accelerator.tvm_target(built.target)),
            ),
        }
        save_artifact(
            folder,
            manifest=manifest,
            export=built.executable.export_library,
            parameters=built.parameters,
            link_parameters=None if built.link is None else built.link.parameters,
            plan=complete,
            cost=costs,
            qdq_model=quantized.to_proto().SerializeToString() if keep_qdq else None,
            overwrite=overwrite,
        )
    log.unlink(missing_ok=True)  # of an earlier try
    return load_artifact(folder)


def _as_in_study(
    plan: str, target: Any, calibration: Any, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Fill in from a study what is not given: its figures are those of its own calibration."""
    from bitwright.fronts import quantization_of_study

    study_target, file, study_options = quantization_of_study(plan)
    target = study_target if target is None else target
    if calibration is not None:
        return target, calibration, options
    defaults = signature(compile).parameters
    if given := [name for name, value in options.items() if value != defaults[name].default]:
        raise UsageError(
            f"the study of {plan} says how to quantize, and there is "
            f"--{given[0].replace('_', '-')}",
            fix="leave it out, or name the samples to quantize with, too: --calibration FILE.npz",
        )
    return target, file, study_options


_OTHER_QUANTIZATION = frozenset(
    "ConvInteger DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul".split()
)


def _refuse_other_quantization(model: Model) -> None:
    for node in model.graph:
        if node.op_type in _OTHER_QUANTIZATION:
            raise ModelError(
                f"is quantized in another form than QDQ: {node.op_type} {node.name!r}",
                where=model.source,
                fix="quantize it statically in QDQ form (onnxruntime: QuantFormat.QDQ), or compile "
                "the float model",
            )


def refuse_options(options: Mapping[str, Any], source: str) -> None:
    """Refuse options of quantization for a model that is quantized already."""
    defaults = signature(compile).parameters
    given = [name for name, value in options.items() if value != defaults[name].default]
    if given:
        raise UsageError(
            f"{source} is quantized already, and there is an option of quantization: "
            f"--{given[0].replace('_', '-')}",
            fix="leave it out, or name the float model",
        )


def _pipeline(passes: str, target: str | Path) -> Any:
    from bitwright.passes.registry import Pipeline, parse

    pipeline = parse(passes)
    if "target" in pipeline.options["partition-for-target"]:
        raise UsageError("the target of partition-for-target is that of --target")
    if not targets.is_file(target):
        return pipeline
    # A pass finds an accelerator by its name; that of a file is not known elsewhere.
    name = "partition-for-target"
    option = {"target": str(target), **pipeline.options[name]}
    return Pipeline({**pipeline.options, name: option})


def _soft_edges(
    model: Model, plan: PrecisionPlan, pipeline: Any, accelerator: targets.Accelerator
) -> dict[str, Activation]:
    """What selective scans read in other codes than the plan says, if a pass is to do that."""
    if "soft-edge" not in pipeline.options:
        return {}
    from bitwright.passes.soft_edge_activations import SoftEdgeActivations

    asked = SoftEdgeActivations(**pipeline.options["soft-edge"])
    form = asked.layout.activation
    values = [scan.value(role) for scan in selective_scans(model.graph) for role in asked.tensors]
    names = [str(value.name) for value in values if value is not None]
    # A recipe adds integers to the plan later; what has soft edge already stays as it is.
    integers = [n for n in names if plan.scan_inputs.get(n, Activation(8)).format == "int"]
    if integers and form.format not in accelerator.precisions.activation_formats:
        forms = ", ".join(map(str, accelerator.precisions.soft_edge)) or "no soft-edge activations"
        raise UsageError(
            f"{accelerator.name} decodes {forms}, and the pass makes {form}",
            where="--passes soft-edge",
            fix="leave it out, or choose another target or layout",
        )
    return dict.fromkeys(integers, form)


def _with_formats(plan: PrecisionPlan, layers: Iterable[Any]) -> PrecisionPlan:
    """The plan with the soft-edge codes that layers were built for."""
    found = dict(plan.layers)
    for layer in layers:
        if layer.activation_format != "int" and layer.name in found:
            bits = found[layer.name].weight_bits
            found[layer.name] = Precision(bits, layer.activation_bits, layer.activation_format)
    return replace(plan, layers=found)


class _Lazily(Mapping[str, Any]):
    """A mapping that is made when somebody looks into it."""

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = functools.cache(make)

    def __getitem__(self, key: str) -> Any:
        return self._make()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._make())

    def __len__(self) -> int:
        return len(self._make())


def _measured(
    model: Model, samples: Samples | None, pipeline: Any, target: str | Path
) -> Mapping[str, Any] | None:
    """What layers send on the calibration samples, measured if a pass asks."""
    if samples is None or "popcount-reorder" not in pipeline.options:
        return None
    from bitwright.linking import measure, sized
    from bitwright.passes.popcount_reorder import PopcountReorder

    reorder = PopcountReorder(**pipeline.options["popcount-reorder"])
    named = pipeline.options["materialize-transfers"].get("link") or target
    form = pipeline.options["lower-to-integer"].get("requantization", "float")

    def make() -> Mapping[str, Any]:
        link = targets.get_link(named)
        order = reorder.order(link)
        return measure(model, samples, sized(link, reorder.window), [order], requantization=form)

    return _Lazily(make)


def _check_compiler() -> None:
    """Refuse to start without the compiler that links the library."""
    from tvm.support.cc import get_cc

    compiler = get_cc()
    if compiler is None or shutil.which(compiler) is None:
        raise UsageError(
            f"the C++ compiler {compiler!r} does not exist"
            if compiler
            else "there is no C++ compiler, which links the library",
            fix="install one, g++ or clang++, or name one in the environment variable CXX",
        )


def _dump_folder(path: str | Path) -> Path:
    """A folder that can be written; it is made when there is something to write."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise OutputError("cannot be made (File exists)", where=str(folder))
    there = folder if folder.exists() else folder.absolute().parent
    if not there.is_dir():
        raise OutputError("cannot be made (No such file or directory)", where=str(folder))
    if not os.access(there, os.W_OK):
        raise OutputError("the folder is read-only", where=str(there), fix="choose another")
    return folder


@contextmanager
def _told_in_one_sentence(log: Path, layers: Iterable[str]) -> Iterator[None]:
    """Turn an error of TVM into one of ours; its full text goes into a file."""
    try:
        yield
    except Exception as error:  # TVM raises many kinds
        of_tvm = error.__cause__ if isinstance(error, RunError) else error
        if of_tvm is None or isinstance(of_tvm, BitwrightError):
            raise
        # The compiler's fault, or TVM's.
        ours = isinstance(error, RunError) and "TVM fails" not in error.what
        text = "".join(traceback.format_exception(error))
        write_atomically(log, text.encode("utf-8", "backslashreplace"))
        name = None if ours else _layer_in(str(of_tvm), layers)
        raise RunError(
            error.what if isinstance(error, RunError) else f"TVM fails ({first_line(error)})",
            where="compilation" if name is None else f"layer {name!r}",
            fix=f"the full message is in {log}" + ("" if ours else "; please report it"),
        ) from error


def _layer_in(text: str, layers: Iterable[str]) -> str | None:
    """The layer that an error names; TVM's functions are named after layers, as identifiers."""
    for name in sorted(layers, key=len, reverse=True):
        words = {re.escape(name), re.escape(re.sub(r"\W", "_", name))}
        if re.search(rf"(?<![A-Za-z0-9])({'|'.join(words)})(?![A-Za-z0-9])", text):
            return name
    return None


def _tensor(value: ValueType) -> TensorEntry:
    return TensorEntry(name=value.name, dtype=str(value.dtype), shape=value.shape)


def _layer(layer: Any) -> LayerEntry:
    return LayerEntry(**asdict(layer), float_weight_bytes=4 * layer.weight_count)


def _link(built: Any) -> LinkEntry | None:
    if built is None:
        return None
    return LinkEntry(
        link=built.layers[0].link,  # there is one for all
        layers=tuple(
            SentLayerEntry(
                name=entry.layer,
                order=str(entry.order),
                terms=entry.terms,
                sorted_by_unit=entry.sorted_by_unit,
                reason=entry.reason,
            )
            for entry in built.layers
        ),
        skipped=dict(built.skipped),
        batched=built.batched,
        parameters=parameter_entries(built.parameters),
    )


def _pass(report: Any) -> PassEntry:
    fields = asdict(report)
    del fields["seconds"]  # equal input gives equal files
    return PassEntry(**fields)
