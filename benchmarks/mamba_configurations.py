"""The ways to quantize a Mamba that are compared: `mamba_activations` and `examples/mamba_text`.

Two scopes: ``scan`` changes only what the selective scans take as x, in the recipe quamba; ``all``
encodes every activation that a layer or a selective scan reads in one form, and gives elementwise
operators 8 bits: no activation has more than 8, but for two rows with 16 there (``+16``).
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import bitwright
import bitwright.quant
from benchmarks.models import cache_folder
from bitwright import choosing, planning, quantization, soft_edge, vocabulary
from bitwright.quant.layers import layer_nodes
from bitwright.quant.load import load
from bitwright.quant.selective_scan import ROLES, selective_scans
from bitwright.vocabulary import Activation, Precision, PrecisionPlan

PERCENTILES = (99.0, 99.9, 99.99, 99.999, 100.0)
WINDOW = 16  # steps that artefact and onnxruntime are compared on
TARGET = Path(__file__).with_name("every_form.yaml")
Arrays = NDArray[Any]
Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Configuration:
    """One way to quantize.

    Parameters
    ----------
    name
        Begins with its scope.
    options
        Of :func:`bitwright.quantize`, without the plan.
    everywhere
        How activations that layers and scans read are encoded; None leaves that to the recipe.
    x
        How what scans take as x is encoded, if otherwise.
    reference
        The configuration that this one is compared with.
    weight_bits
        Width of the weights.
    elementwise_bits
        Width of what elementwise operators read, where ``everywhere`` is given; 16 otherwise.
    before_softplus
        Whether what the softplus in front of dt reads is quantized instead of dt.
    choose
        What :func:`bitwright.choose_forms` chooses from, in place of ``everywhere`` for all.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    everywhere: Activation | None = None
    x: Activation | None = None
    reference: str | None = None
    weight_bits: int = 8
    elementwise_bits: int = 8
    before_softplus: bool = False
    choose: Mapping[str, Any] | None = None


def configurations() -> list[Configuration]:
    """Give all rows of the tables, those first that others are compared with."""
    integer = Activation(8)
    found = [Configuration("scan/naive w8a8", {"recipe": "naive"})]
    for percent in PERCENTILES:
        options = {"recipe": "quamba", "percentile": percent}
        name = f"scan/quamba {percent:g}"
        found.append(Configuration(name, options))
        for form in ("a8se", "a8se8"):
            x = Activation.parse(form)
            found.append(Configuration(f"{name} x {form}", options, x=x, reference=name))
    for percent in (99.0, 99.9, 100.0):
        options = {"recipe": "quamba", "percentile": percent}
        name = f"scan/quamba {percent:g} pre-softplus"
        found.append(Configuration(name, options, before_softplus=True))
        for form in ("a8se", "a8se8"):
            found.append(
                Configuration(
                    f"{name} x {form}",
                    options,
                    x=Activation.parse(form),
                    reference=name,
                    before_softplus=True,
                )
            )
    for form in ("a4", "a8se6", "a4se4"):
        found.append(
            Configuration(
                f"scan/quamba 100 x {form}",
                {"recipe": "quamba", "percentile": 100.0},
                x=Activation.parse(form),
                reference="scan/quamba 100",
            )
        )
    for percent in PERCENTILES:
        ranges = {"clip": "minmax"} if percent == 100 else _percentile(percent)
        name = f"all/a8 {percent:g}"
        found.append(Configuration(name, ranges, everywhere=integer))
        shifted = {**ranges, "asymmetric": True}
        found.append(Configuration(f"{name} asymmetric", shifted, everywhere=integer))
        for form in ("a8se", "a8se8"):
            found.append(
                Configuration(
                    f"all/{form} {percent:g}",
                    ranges,
                    everywhere=Activation.parse(form),
                    reference=name,
                )
            )
    for form in ("a8", "a8se", "a8se8", "a8se6", "a4", "a4se4"):
        reference = "all/a4 mmse" if form == "a4se4" else "all/a8 mmse"
        found.append(
            Configuration(
                f"all/{form} mmse",
                everywhere=Activation.parse(form),
                reference=None if form in ("a8", "a4") else reference,
            )
        )
    found.append(
        Configuration(
            "all/a8+16 mmse", everywhere=integer, reference="all/a8 mmse", elementwise_bits=16
        )
    )
    # What elementwise operators read is asymmetric as well.
    for placement in ("", " pre-softplus"):
        single = f"all/a8 mmse asymmetric{placement}"
        lower = ("a8se6", "a4", "a4se4") if placement else ()
        for form in ("a8", "a8se", "a8se8", *lower):
            name = f"all/{form} mmse asymmetric{placement}"
            found.append(
                Configuration(
                    name,
                    {"asymmetric": True},
                    everywhere=Activation.parse(form),
                    reference=None if name == single else single,
                    before_softplus=placement != "",
                )
            )
    for name, bits in (("all/chosen", 8), ("all/chosen+16", 16)):
        found.append(
            Configuration(
                name,
                {"asymmetric": True},
                everywhere=integer,
                reference="all/a8 mmse asymmetric",
                choose={"forms": "a8,a8se8", "percentiles": "99.9,99.99,100", "samples": 8},
                elementwise_bits=bits,
            )
        )
    return sorted(found, key=lambda entry: (entry.name.split("/")[0], entry.reference or ""))


def chosen(names: str) -> list[Configuration]:
    """Configurations whose names fit one of some patterns, with commas between; as an option.

    Raises
    ------
    argparse.ArgumentTypeError
        If a pattern fits none.
    """
    patterns, found = names.split(","), configurations()
    for pattern in patterns:
        if not any(fnmatchcase(entry.name, pattern) for entry in found):
            raise argparse.ArgumentTypeError(f"no configuration is called {pattern!r}")
    return [entry for entry in found if any(fnmatchcase(entry.name, part) for part in patterns)]


def positive(text: str) -> int:
    """Read a number above 0, as an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _percentile(percent: float) -> dict[str, Any]:
    return {"clip": "percentile", "percentile": percent}


def plan_of(configuration: Configuration, model: Path) -> PrecisionPlan | None:
    """Write the precision plan of a configuration; None where the recipe says all."""
    everywhere, x = configuration.everywhere, configuration.x
    if everywhere is None and x is None and not configuration.before_softplus:
        return None
    loaded = load(model)
    form = everywhere or Activation(8)
    precision = Precision(configuration.weight_bits, form.bits, form.format)
    scan_inputs = {}
    for scan in selective_scans(loaded.graph):
        for role in ROLES:
            value = scan.value(role)
            if value is not None and role == "x" and x is not None:
                scan_inputs[str(value.name)] = x
            elif value is not None and everywhere is not None:
                scan_inputs[str(value.name)] = everywhere
        if configuration.before_softplus:
            (before,) = (name for name, place in scan.places.items() if place[0] is not scan.node)
            steps = scan.value("dt")
            assert steps is not None
            scan_inputs.pop(str(steps.name), None)
            scan_inputs[before] = form
    layers = dict.fromkeys(layer_nodes(loaded), precision)
    bits = 16 if everywhere is None else configuration.elementwise_bits
    return PrecisionPlan(layers, scan_inputs=scan_inputs, elementwise_bits=bits)


def quantized(configuration: Configuration, model: Path, calibration: Mapping[str, Arrays]) -> Path:
    """Quantize, once: until model, data, configuration or quantizer change, it is in the cache."""
    plan = plan_of(configuration, model)
    code = hashlib.sha256(model.read_bytes())
    code.update(repr((configuration, None if plan is None else plan.to_json())).encode())
    for array in calibration.values():
        code.update(array.tobytes())
    quantizer = sorted(Path(bitwright.quant.__file__).parent.glob("*.py"))
    modules = (choosing, planning, quantization, soft_edge, vocabulary)
    for source in (*quantizer, *(Path(str(module.__file__)) for module in modules)):
        code.update(source.read_bytes())
    folder = cache_folder() / "mamba_activations" / code.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{configuration.name.replace('/', '_').replace(' ', '_')}.onnx"
    if not path.is_file():
        if configuration.choose is not None:
            plan = bitwright.choose_forms(
                model,
                calibration=calibration,
                plan=plan,
                output=path.with_suffix(".json"),
                overwrite=True,
                **configuration.choose,
            ).plan
        bitwright.quantize(
            model,
            calibration=calibration,
            plan=plan,
            output=path,
            **configuration.options,
        )
    return path


def runner(path: Path, engine: str) -> Run:
    """Make a function from the input of a quantized model, which has one, to its first output."""
    if engine == "onnxruntime":
        options = ort.SessionOptions()
        # As bitwright evaluates QDQ models: the optimizer would compute otherwise.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,) = (entry.name for entry in session.get_inputs())
        return lambda array: np.asarray(session.run(None, {given: array})[0])
    artifact = bitwright.compile(
        path, TARGET, output=path.with_suffix(".artefact"), overwrite=True, keep_qdq=False
    )
    (name,) = (entry.name for entry in artifact.inputs)
    result = artifact.outputs[0].name
    return lambda array: artifact.run({name: array})[result]


def float_runner(model: Path) -> Run:
    """Compile a float model with one input; make a function from that to its first output."""
    import tvm
    from tvm import relax

    from bitwright import targets
    from bitwright.importer import import_model
    from bitwright.passes.build import TRANSFORM, build

    built = build(import_model(load(model)), targets.get("generic/systolic"))
    machine = relax.VirtualMachine(built.executable, tvm.cpu())
    parameters = tuple(map(tvm.runtime.tensor, built.parameters.values()))
    transformed = list(machine[TRANSFORM](parameters)) if parameters else []

    def run(array: Arrays) -> Arrays:
        result = machine["main"](tvm.runtime.tensor(array), *transformed)
        first: Arrays = (result if hasattr(result, "numpy") else result[0]).numpy()
        return first

    return run


def largest_difference(path: Path, run: Run, arrays: list[Arrays]) -> float:
    """How far an artefact's outputs are from onnxruntime's, on the first steps of some inputs.

    A code on the edge of rounding changes the state of a scan, and that other codes: over long
    inputs the difference says how chaotic the model is, not how exact the artefact.
    """
    other = runner(path, "onnxruntime")
    windows = [array[:WINDOW] for array in arrays]
    return max(float(np.abs(run(array) - other(array)).max()) for array in windows)
