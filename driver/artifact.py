"""The artefact: a folder that runs a compiled model without the model it was made from.

``docs/artefact.md`` describes its files. Whatever is loaded is checked first: a damaged file, a
newer schema or a machine that lacks instructions ends with a message, not with a crash.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from bitwright.errors import (
    ArtifactError,
    DataError,
    OutputError,
    RunError,
    UsageError,
    first_line,
)
from bitwright.quant.requantization import RequantizationForm
from bitwright.targets.link import ROW_MAJOR, UNSORTED, Link, Part
from bitwright.transitions import LayerTransitions, PartTransitions, Sent, Transitions
from bitwright.vocabulary import Activation, ActivationFormat, Dim, Precision, PrecisionPlan

__all__ = [
    "Artifact",
    "FileEntry",
    "FloatModel",
    "Host",
    "HostOperator",
    "LayerEntry",
    "LinkEntry",
    "Manifest",
    "ModelEntry",
    "ParameterEntry",
    "PassEntry",
    "SentLayerEntry",
    "TensorEntry",
    "check_output_folder",
    "load_artifact",
    "needed_features",
    "parameter_entries",
    "read_manifest",
    "save_artifact",
    "sha256",
]

Array = npt.NDArray[Any]

SCHEMA_VERSION: Final = 1

MANIFEST, LIBRARY, PARAMETERS, LINK_PARAMETERS, PLAN, COST, QDQ_MODEL = (
    "manifest.json",
    "model.so",
    "model.params",
    "link.params",
    "plan.json",
    "cost.json",
    "model.qdq.onnx",
)
_REQUIRED = (LIBRARY, PARAMETERS, PLAN)

# Instruction sets that compiled code may use, as LLVM names them and as Linux does.
_INSTRUCTION_SETS: Final = {
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512vbmi": "avx512vbmi",
    "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Data):
    """An input or output: a number or the name of a symbolic size an axis; None if unknown."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None


class ParameterEntry(_Data):
    """One array of ``model.params``, in the order in which the library takes them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class LayerEntry(_Data):
    """One layer that computes in integers.

    Attributes
    ----------
    name
        The ONNX node.
    operator
        ``conv1d``, ``conv2d``, ``conv3d`` or ``matmul``.
    weight_bits, activation_bits, accumulator_bits
        Widths, in bits; ``weight_bits`` is 0 for a product of two activations.
    kernel
        Whether a kernel of bitwright computes it, or code that TVM makes.
    weight_count
        Weights, bias left out.
    weight_bytes, float_weight_bytes
        Bytes of the weights as they are packed, and as float32.
    activation_format
        ``int``, or which soft-edge codes the layer's inputs are.
    """

    name: str
    operator: str
    weight_bits: int
    activation_bits: int
    accumulator_bits: int
    kernel: bool
    weight_count: int
    weight_bytes: int
    float_weight_bytes: int
    activation_format: ActivationFormat = "int"

    @property
    def precision(self) -> str:
        """Text form of widths and format: ``w4a8se8``, or ``a8se8`` without weights."""
        if not self.weight_bits:
            return str(Activation(self.activation_bits, self.activation_format))
        bits = self.weight_bits, self.activation_bits
        return str(Precision(*bits, self.activation_format))


class HostOperator(_Data):
    """An operator that stays float and runs on the host, and why."""

    name: str
    operator: str
    reason: str


class PassEntry(_Data):
    """A pass, and how many operators of each sort there were after it.

    Attributes
    ----------
    name, options
        The pass, and its options that were not left at their defaults.
    quantizers, float_operators, integer_operators
        Operators that quantize or dequantize, and others by what they compute in.
    layers, parameters
        Layers that were made functions of their own, and arrays in ``model.params``.
    weight_transitions
        Of permute-channels: layer to transitions of its weights, unsorted, for one sample, before
        and after.
    """

    name: str
    options: dict[str, Any]
    quantizers: int
    float_operators: int
    integer_operators: int
    layers: int
    parameters: int
    weight_transitions: dict[str, tuple[int, int]] = {}


class FloatModel(_Data):
    """The float model that was quantized: the path as it was given, and its SHA-256."""

    path: str
    sha256: str


class ModelEntry(_Data):
    """The ONNX model that was compiled; ``float_model`` is None if it came in quantized."""

    source: str
    structure_hash: str
    weights_hash: str
    float_model: FloatModel | None


class Host(_Data):
    """What the library needs to run.

    Attributes
    ----------
    machine
        Processor architecture, as ``uname -m`` says.
    target
        The TVM target that it was compiled for.
    features
        Instruction sets that it uses, as LLVM names them.
    """

    machine: str
    target: dict[str, Any]
    features: tuple[str, ...]


class FileEntry(_Data):
    """Size and SHA-256 of a file of the artefact."""

    bytes: int
    sha256: str


class SentLayerEntry(_Data):
    """How the operands of a layer are sent.

    Attributes
    ----------
    name
        The ONNX node.
    order
        The order of its terms, as :meth:`~bitwright.targets.orders.Order.parse` reads it.
    terms
        Terms of an output.
    sorted_by_unit
        What a sorting unit orders while the model runs; nothing where the order is known at compile
        time.
    reason
        Why it has its order; empty where it was asked for.
    """

    name: str
    order: str
    terms: int
    sorted_by_unit: tuple[Literal["inputs", "weights"], ...]
    reason: str


class LinkEntry(_Data):
    """The link, and what crosses it.

    Attributes
    ----------
    link
        Its description.
    layers
        The layers whose operands are sent, in the order of the results of ``main_link``.
    skipped
        Other layers, and why they are left out.
    batched
        Whether several samples can be sent in one run; each is counted on its own then.
    parameters
        The arrays of ``link.params``, in order.
    """

    link: Link
    layers: tuple[SentLayerEntry, ...]
    skipped: dict[str, str]
    batched: bool
    parameters: tuple[ParameterEntry, ...]


class Manifest(_Data):
    """What ``manifest.json`` holds; ``link`` is None without transfers."""

    schema_version: Literal[1]
    target: str
    model: ModelEntry
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    layers: tuple[LayerEntry, ...]
    host_operators: tuple[HostOperator, ...]
    passes: tuple[PassEntry, ...]
    parameters: tuple[ParameterEntry, ...]
    link: LinkEntry | None = None
    host: Host
    versions: dict[str, str]
    files: dict[str, FileEntry]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights: the sum of ceil(bits * n / 8) over the layers."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def requantization(self) -> RequantizationForm:
        """The form of its multipliers, an option of the pass LowerToInteger."""
        options = {entry.name: entry.options for entry in self.passes}.get("lower-to-integer", {})
        return "fixed" if options.get("requantization") == "fixed" else "float"

    @property
    def float_weight_bytes(self) -> int:
        """Bytes of the same weights in float32."""
        return sum(layer.float_weight_bytes for layer in self.layers)


# -- writing -------------------------------------------------------------------------------------


def check_output_folder(path: str | Path, *, overwrite: bool) -> Path:
    """Refuse an output folder before the work starts rather than after it.

    Raises
    ------
    OutputError
        If it exists and is not empty (with ``overwrite``: and is no artefact), or its parent is
        missing or read-only.
    """
    path = Path(path)
    try:
        exists = path.exists() or path.is_symlink()
        taken = exists and (path.is_symlink() or not path.is_dir() or any(path.iterdir()))
    except OSError as error:  # a name that is too long, say
        raise OutputError(f"cannot be written ({error.strerror})", where=str(path)) from error
    if taken and not overwrite:
        raise OutputError(
            "exists already",
            where=str(path),
            fix="choose another folder, or replace the artefact there (--overwrite)",
        )
    if path.resolve() == Path.cwd():
        raise OutputError(
            "is the folder you are in", where=str(path), fix="name a folder to be made in it"
        )
    if taken:
        _refuse_what_is_not_ours(path)
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(
            f"the folder {str(parent)!r} does not exist", where=str(path), fix="make it first"
        )
    if not os.access(parent, os.W_OK):
        raise OutputError(
            f"the folder {str(parent)!r} is read-only", where=str(path), fix="choose another"
        )
    return path


def _refuse_what_is_not_ours(path: Path) -> None:
    """Refuse to replace what is no artefact, or an artefact that somebody added files to."""
    files: list[str] = []
    if not path.is_symlink() and (path / MANIFEST).is_file():
        try:
            document = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if isinstance(document["schema_version"], int):
                files = [MANIFEST, *document["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            files = []
    if not files:
        raise OutputError(
            "exists and is no artefact; only an artefact is replaced",
            where=str(path),
            fix="choose another folder",
        )
    others = sorted({entry.name for entry in path.iterdir()} - set(files))
    if others:
        raise OutputError(
            f"holds files that are not the artefact's: {', '.join(others[:5])}",
            where=str(path),
            fix="move them, or choose another folder",
        )


def save_artifact(
    path: Path,
    *,
    manifest: Mapping[str, Any],
    export: Callable[[str], object],
    parameters: Mapping[str, Array],
    link_parameters: Mapping[str, Array] | None = None,
    plan: PrecisionPlan,
    cost: str,
    qdq_model: bytes | None,
    overwrite: bool,
) -> Manifest:
    """Write an artefact into a folder of another name, then rename it.

    Parameters
    ----------
    path
        The folder, checked by :func:`check_output_folder`.
    manifest
        The fields of :class:`Manifest`, without those that describe the files.
    export
        Writes the library to the path it is given.
    parameters
        Name to array, in the order in which the library takes them.
    link_parameters
        Those that only ``main_link`` takes, behind the others; None where there is none.
    plan, cost, qdq_model
        What else is kept; ``cost`` is the text of ``cost.json``.
    overwrite
        Whether an artefact that is there is replaced.

    Raises
    ------
    OutputError
        If the disk is full or refuses; nothing is left behind.
    RunError
        If the compiler cannot link the library.
    """
    import tvm

    temporary: Path | None = None
    workspace = tempfile.TemporaryDirectory(prefix="bitwright-")
    try:
        # Elsewhere first: LLVM ends the process where it cannot write.
        library = Path(workspace.name) / LIBRARY
        _link(export, library)
        temporary = path.absolute().parent / f".bitwright-{secrets.token_hex(8)}"
        temporary.mkdir()
        shutil.copy(library, temporary / LIBRARY)
        for name, arrays in ((PARAMETERS, parameters), (LINK_PARAMETERS, link_parameters)):
            if arrays is not None:
                tensors = {key: tvm.runtime.tensor(array) for key, array in arrays.items()}
                (temporary / name).write_bytes(tvm.runtime.save_param_dict(tensors))
        (temporary / PLAN).write_text(plan.to_json(), encoding="utf-8")
        (temporary / COST).write_text(cost, encoding="utf-8")
        if qdq_model is not None:
            (temporary / QDQ_MODEL).write_bytes(qdq_model)
        complete = Manifest(
            **manifest,
            schema_version=SCHEMA_VERSION,
            parameters=parameter_entries(parameters),
            versions={
                name: version(name) for name in ("bitwright", "apache-tvm", "onnx", "onnxruntime")
            },
            files={
                entry.name: FileEntry(bytes=entry.stat().st_size, sha256=sha256(entry))
                for entry in sorted(temporary.iterdir())
            },
        )
        text = json.dumps(complete.model_dump(mode="json"), indent=2) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        for entry in temporary.iterdir():
            _sync(entry)
        _put_in_place(temporary, path, overwrite)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot be written ({error.strerror or error})",
                where=str(path),
                fix="nothing was left behind; free some space or choose another folder",
            ) from error
        raise
    finally:
        workspace.cleanup()
    return complete


def parameter_entries(parameters: Mapping[str, Array]) -> tuple[ParameterEntry, ...]:
    """What the manifest says of arrays."""
    return tuple(
        ParameterEntry(name=name, dtype=str(a.dtype), shape=a.shape, bytes=a.nbytes)
        for name, a in parameters.items()
    )


def _link(export: Callable[[str], object], path: Path) -> None:
    try:
        export(str(path))
    except OSError:
        raise
    except Exception as error:  # TVM's text: a heading, what the compiler printed, its command
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        reason = lines[0][:300] if lines else first_line(error)
        raise RunError(f"the C++ compiler cannot link the library ({reason})") from error


def _put_in_place(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename a finished folder; what stood there is swapped with it in one step, then removed."""
    try:
        temporary.rename(path)  # works where there is nothing, or an empty folder
    except OSError as error:
        if not overwrite and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(
                "exists already: it was made meanwhile",
                where=str(path),
                fix="choose another folder, or replace it (--overwrite)",
            ) from error
        if not overwrite:
            raise
        _refuse_what_is_not_ours(path)  # it may have changed since the work began
        try:
            _swap(temporary, path)
        except (AttributeError, OSError):  # not on every C library and file system
            aside = temporary.with_name(f"{temporary.name}-old")
            path.rename(aside)
            try:
                temporary.rename(path)
            except OSError:
                aside.rename(path)
                raise
            temporary = aside
        shutil.rmtree(temporary)


def _swap(first: Path, second: Path) -> None:
    """Exchange two paths: no reader finds one of them missing."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def needed_features(target: Any) -> tuple[str, ...]:
    """Instruction sets that code for a TVM target may use, as LLVM names them."""
    from tvm.target.codegen import llvm_get_cpu_features

    known = {str(name) for name in llvm_get_cpu_features(target)}
    return tuple(name for name in _INSTRUCTION_SETS if name in known)


# -- reading -------------------------------------------------------------------------------------


def load_artifact(path: str | Path, *, threads: int | None = None) -> Artifact:
    """Load an artefact, ready to run.

    Parameters
    ----------
    path
        The folder that :func:`bitwright.compile` wrote.
    threads
        How many threads compute a run; by default one a processor.

    Raises
    ------
    ArtifactError
        If the folder is no artefact, a file is missing or damaged, the schema is newer, or this
        machine lacks instructions that the library uses.
    UsageError
        If the number of threads is not positive.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot compute", fix="give a positive number")
    folder = Path(path)
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    _check_host(folder, manifest.host)
    return Artifact(folder, manifest, threads or len(_processors()))


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; the other files are not touched.

    Raises
    ------
    ArtifactError
        If it is missing, damaged, or of a newer schema.
    """
    where = str(folder / MANIFEST)
    fix = "compile the model again"
    if not folder.is_dir():
        raise ArtifactError("there is no such folder", where=str(folder))
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"is no artefact: it holds no {MANIFEST}",
            where=str(folder),
            fix="give a folder that bitwright compile wrote",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"cannot be read ({first_line(error)})", where=where, fix=fix
        ) from error
    schema = document.get("schema_version") if isinstance(document, dict) else None
    if type(schema) is not int or schema != SCHEMA_VERSION:
        raise ArtifactError(
            f"schema_version is {schema!r}",
            where=where,
            fix=f"this version of bitwright reads schema version {SCHEMA_VERSION}; a newer one "
            "wrote the artefact, or it is damaged",
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"field {field!r}: {first['msg']}", where=where, fix=fix) from error


def _check_files(folder: Path, manifest: Manifest) -> None:
    fix = "copy the whole folder again, or compile the model again"
    required = _REQUIRED if manifest.link is None else (*_REQUIRED, LINK_PARAMETERS)
    for name in required:
        if name not in manifest.files:
            raise ArtifactError(f"lists no {name}", where=str(folder / MANIFEST), fix=fix)
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise ArtifactError(f"lists a file {name!r} elsewhere", where=str(folder / MANIFEST))
        try:
            intact = path.stat().st_size == entry.bytes and sha256(path) == entry.sha256
        except FileNotFoundError:
            if name in required:
                raise ArtifactError("is missing", where=str(path), fix=fix) from None
            continue
        except OSError as error:
            raise ArtifactError(f"cannot be read ({error.strerror})", where=str(path)) from error
        if not intact:
            raise ArtifactError("is damaged: its checksum is wrong", where=str(path), fix=fix)


def _check_host(folder: Path, host: Host) -> None:
    fix = f"compile the model on this machine; the artefact is for {host.target.get('mcpu', '?')}"
    if host.machine != platform.machine():
        raise ArtifactError(
            f"was compiled for {host.machine}, this machine is {platform.machine()}",
            where=str(folder),
            fix=fix,
        )
    if lacking := [name for name in host.features if name not in _host_features()]:
        raise ArtifactError(
            f"uses instructions that this machine lacks: {', '.join(lacking)}",
            where=str(folder),
            fix=fix,
        )


@functools.cache
def _host_features() -> frozenset[str]:
    """Instruction sets of this machine, as LLVM names them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(name for name, flag in _INSTRUCTION_SETS.items() if flag in flags)


def _processors() -> list[int]:
    return sorted(os.sched_getaffinity(0))


_Result = TypeVar("_Result")

# TVM makes a pool of threads for each thread that calls it, and leaves them behind when that one
# ends. So one thread makes all calls; after a fork, whose child has none of them, another one.
_callers: dict[int, ThreadPoolExecutor] = {}
_caller_lock = threading.Lock()
os.register_at_fork(before=_caller_lock.acquire, after_in_parent=_caller_lock.release)
os.register_at_fork(after_in_child=_caller_lock.release)
_pool = threading.local()


def _in_caller(function: Callable[[], _Result]) -> _Result:
    """Call a function in the thread that makes all calls of TVM."""
    with _caller_lock:
        process = os.getpid()
        if process not in _callers:
            _callers[process] = ThreadPoolExecutor(1, thread_name_prefix="bitwright")
    return _callers[process].submit(function).result()


def _use_threads(count: int) -> None:
    if getattr(_pool, "threads", None) == count:
        return
    import tvm

    # Threads that share all processors: TVM's other ways tie the calling thread to one of them.
    share = -3
    processors = [str(processor) for processor in _processors()]
    tvm.get_global_func("runtime.config_threadpool")(share, count, processors)
    _pool.threads = count


_libraries: dict[Path, str] = {}  # path to checksum of what was first loaded from there


def _load_library(path: Path, checksum: str) -> Any:
    """Load a library; from a copy if another one was loaded from its path before.

    The linker gives what it has loaded from a path again, whatever has taken its place since.
    """
    import tvm

    path = path.resolve()
    if _libraries.setdefault(path, checksum) == checksum:
        return tvm.runtime.load_module(str(path))
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        return tvm.runtime.load_module(str(shutil.copy(path, folder)))


class Artifact:
    """A compiled model; :func:`load_artifact` makes one.

    Parameters
    ----------
    folder
        Where its files lie.
    manifest
        What ``manifest.json`` says, checked.
    threads
        How many threads compute a run.

    Raises
    ------
    ArtifactError
        If the library or its parameters cannot be loaded.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        path = folder / PLAN
        #: The precision of every layer.
        self.plan = PrecisionPlan.from_json(path.read_text(encoding="utf-8"), where=str(path))
        try:
            _in_caller(self._load)
        except Exception as error:  # TVM raises several kinds
            raise ArtifactError(
                f"cannot be loaded ({first_line(error)})",
                where=str(folder),
                fix=f"it was made with apache-tvm {manifest.versions.get('apache-tvm')}, here is "
                f"{version('apache-tvm')}; compile the model again",
            ) from error

    def _load(self) -> None:
        import tvm
        from tvm import relax

        _use_threads(self.threads)
        names = [entry.name for entry in self.manifest.parameters]
        packed = tvm.runtime.load_param_dict_from_file(str(self.folder / PARAMETERS))
        library = _load_library(self.folder / LIBRARY, self.manifest.files[LIBRARY].sha256)
        self._machine = relax.VirtualMachine(library, tvm.cpu())
        # A model without parameters has no function that brings them into their layout.
        transform = self._machine["main_transform_params"] if names else list
        self._weights = transform([packed[name] for name in names])
        self._main = self._machine["main"]

    @functools.cached_property
    def _link_weights(self) -> list[Any]:
        """What ``main_link`` takes behind the inputs; made when it is asked for."""
        import tvm

        assert self.manifest.link is not None
        arrays = []
        for name, entries in (
            (PARAMETERS, self.manifest.parameters),
            (LINK_PARAMETERS, self.manifest.link.parameters),
        ):
            stored = tvm.runtime.load_param_dict_from_file(str(self.folder / name))
            arrays += [stored[entry.name] for entry in entries]
        return list(self._machine["main_link_transform_params"](arrays))

    def _call_link(self, arrays: Sequence[Array]) -> list[Array]:
        import tvm

        _use_threads(self.threads)
        result = self._machine["main_link"](*map(tvm.runtime.tensor, arrays), *self._link_weights)
        return [tensor.numpy() for tensor in result]

    def _call(self, arrays: Sequence[Array]) -> list[Array]:
        import tvm

        _use_threads(self.threads)
        result = self._main(*map(tvm.runtime.tensor, arrays), *self._weights)
        tensors = [result] if len(self.outputs) == 1 else list(result)
        return [tensor.numpy() for tensor in tensors]

    @property
    def inputs(self) -> tuple[TensorEntry, ...]:
        """Names, element types and shapes of the inputs."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorEntry, ...]:
        """Names, element types and shapes of the outputs."""
        return self.manifest.outputs

    @property
    def qdq_model(self) -> Path | None:
        """The quantized ONNX model, where it was kept."""
        path = self.folder / QDQ_MODEL
        return path if path.is_file() else None

    @property
    def cost(self) -> dict[str, Any] | None:
        """What ``cost.json`` says the model costs; None where there is no such file."""
        try:
            text = (self.folder / COST).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        document: dict[str, Any] = json.loads(text)
        return document

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model.

        Parameters
        ----------
        inputs
            Input name to array, with the element types and shapes of :attr:`inputs`.

        Returns
        -------
        dict
            Output name to array, in the order of :attr:`outputs`.

        Raises
        ------
        DataError
            If a name, an element type or a shape does not fit.
        RunError
            If the library fails.
        """
        arrays = check_inputs(inputs, self.inputs)
        try:
            values = _in_caller(lambda: self._call(arrays))
        except Exception as error:  # TVM raises several kinds
            raise RunError(f"fails ({first_line(error)})", where=str(self.folder)) from error
        return {entry.name: value for entry, value in zip(self.outputs, values, strict=True)}

    def count_transitions(
        self,
        data: str | Path | Mapping[str, Array],
        *,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> Transitions:
        """Send samples over the link, and count how often its wires change.

        Parameters
        ----------
        data
            An .npz file or a mapping: one array a model input.
        batch_size
            Samples of one run, where the model leaves it free. The result does not depend on it.
        progress
            Called with samples done and in total.

        Raises
        ------
        ArtifactError
            If the artefact was compiled without transfers.
        DataError, UsageError
            If the data or the batch size has to change.
        RunError
            If the library fails.
        """
        from bitwright.quant.load import ValueType
        from bitwright.quant.samples import Samples

        if batch_size < 1:
            raise UsageError(f"batch size {batch_size} is not positive")
        link = self.manifest.link
        if link is None:
            raise ArtifactError(
                "counts no transitions: it was compiled without transfers, or none of its layers "
                "computes in integers",
                where=str(self.folder),
                fix="compile it with --passes popcount-reorder, or materialize-transfers alone",
            )
        samples = Samples(
            data, [ValueType(e.name, np.dtype(e.dtype), e.shape) for e in self.inputs]
        )
        layers: list[LayerTransitions] = []
        done = 0
        for batch in samples.batches(batch_size if link.batched else 1):
            arrays = check_inputs(batch.inputs, self.inputs)
            try:
                found = _in_caller(functools.partial(self._call_link, arrays))
            except Exception as error:  # TVM raises several kinds
                raise RunError(f"fails ({first_line(error)})", where=str(self.folder)) from error
            counted = _layer_transitions(link, found[len(self.outputs) :])
            layers = [a + b for a, b in zip(layers, counted, strict=True)] if layers else counted
            done += batch.samples
            if progress is not None:
                progress(done, len(samples))
        orders = dict.fromkeys(entry.order for entry in link.layers if entry.order != UNSORTED)
        return Transitions(
            str(self.folder), done, link.link, tuple(orders), tuple(layers), link.skipped
        )


def _layer_transitions(link: LinkEntry, results: Sequence[Array]) -> list[LayerTransitions]:
    """What ``main_link`` counted, as a report; ``results`` are those behind the outputs."""
    pairs = iter(zip(results[::2], results[1::2], strict=True))
    lanes = link.link.lanes.value
    found = []
    for layer in link.layers:
        sent = {}
        for order in dict.fromkeys((ROW_MAJOR, UNSORTED, layer.order)):
            counts, flits = next(pairs)
            parts: dict[Part, PartTransitions] = {
                "inputs": PartTransitions(int(flits[0]), counts[0, :lanes]),
                "weights": PartTransitions(int(flits[1]), counts[1, :lanes]),
            }
            if flits[2]:
                parts["index"] = PartTransitions(int(flits[2]), counts[2])
            words = 0
            if order == layer.order:
                words = sum(
                    link.link.words_in(parts[part].flits, layer.terms)
                    for part in layer.sorted_by_unit
                )
            sent[order] = Sent(parts, words)
        found.append(LayerTransitions(layer.name, sent, layer.reason))
    return found


def check_inputs(inputs: Mapping[str, Array], expected: Sequence[TensorEntry]) -> list[Array]:
    """Arrays in the order of the inputs, contiguous, once they are known to fit.

    Raises
    ------
    DataError
        If a name, an element type or a shape does not fit.
    """
    names = [entry.name for entry in expected]
    if not isinstance(inputs, Mapping):
        raise DataError(
            f"inputs are no mapping of names to arrays but {type(inputs).__name__}",
            fix=f"give {{{names[0]!r}: array}}" if names else "give {}",
        )
    for wrong, text in (
        ([name for name in names if name not in inputs], "is missing"),
        ([name for name in inputs if name not in names], "does not exist"),
    ):
        if wrong:
            raise DataError(
                f"input {wrong[0]!r} {text}", fix=f"the inputs are {', '.join(map(repr, names))}"
            )
    sizes: dict[str, tuple[int, str]] = {}
    arrays = []
    for entry in expected:
        array = inputs[entry.name]
        where = f"input {entry.name!r}"
        if not isinstance(array, np.ndarray):
            raise DataError(
                f"is no NumPy array but {type(array).__name__}",
                where=where,
                fix=f"give an array of {entry.dtype}",
            )
        if array.dtype != np.dtype(entry.dtype):
            raise DataError(
                f"holds {array.dtype}, the model takes {entry.dtype}",
                where=where,
                fix=f"convert it: array.astype(numpy.{entry.dtype})",
            )
        if entry.shape is not None:
            _check_shape(array.shape, entry.shape, where, sizes)
        arrays.append(np.asarray(array, order="C"))
    return arrays


def _check_shape(
    shape: tuple[int, ...],
    expected: tuple[Dim, ...],
    where: str,
    sizes: dict[str, tuple[int, str]],
) -> None:
    """Check one shape; ``sizes`` gathers the symbolic sizes and which input fixed them."""
    wanted = f"the model takes {list(expected)}"
    if len(shape) != len(expected):
        raise DataError(f"has shape {list(shape)}, {wanted}", where=where)
    for axis, (got, dim) in enumerate(zip(shape, expected, strict=True)):
        if got == 0:
            raise DataError(f"is empty: shape {list(shape)}", where=where)
        if isinstance(dim, int) and got != dim:
            raise DataError(
                f"has shape {list(shape)}, {wanted}: axis {axis} must be {dim}", where=where
            )
        if isinstance(dim, str) and dim != "?":
            size, owner = sizes.setdefault(dim, (got, where))
            if size != got:
                raise DataError(
                    f"has shape {list(shape)}, {wanted}: {dim!r} is {size} in {owner}", where=where
                )
