"""The artefact on a library of this test's own: two inputs, two outputs, two parameters."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bitwright import Artifact, Precision, PrecisionPlan, artifact, load_artifact
from bitwright.artifact import (
    FloatModel,
    Host,
    LayerEntry,
    Manifest,
    ModelEntry,
    TensorEntry,
    check_output_folder,
    needed_features,
    save_artifact,
    sha256,
)
from bitwright.errors import ArtifactError, DataError, OutputError, UsageError

Array = npt.NDArray[Any]

PARAMETERS: dict[str, Array] = {
    "scale": np.array([2, 3, 4], np.uint8),
    "offset": np.array([[10], [20]], np.int16),
}
PLAN = PrecisionPlan(layers={"conv1": Precision(4, 8)}, target="bitfusion/eyeriss")
HOST_TARGET = {"kind": "llvm"}


@pytest.fixture(scope="module")
def export() -> Callable[[str], object]:
    """main(a [n, 3], b [n, 2, 3]) = (a * scale, b + offset); the parameters become float first."""
    import tvm
    from tvm import relax, tirx

    builder = relax.BlockBuilder()
    n = tirx.Var("n", "int64")
    packed = relax.Var(
        "packed",
        relax.TupleType([relax.TensorType(v.shape, str(v.dtype)) for v in PARAMETERS.values()]),
    )
    with builder.function("main_transform_params", [packed]):
        values = [
            builder.emit(relax.op.astype(relax.TupleGetItem(packed, index), "float32"))
            for index in range(2)
        ]
        builder.emit_func_output(relax.Tuple(values))
    names = {"a": [n, 3], "b": [n, 2, 3], "scale": [3], "offset": [2, 1]}
    a, b, scale, offset = (
        relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in names.items()
    )
    with builder.function("main", [a, b, scale, offset]):
        product = builder.emit(relax.op.multiply(a, scale))
        total = builder.emit(relax.op.add(b, offset))
        builder.emit_func_output(relax.Tuple([product, total]))
    executable: Any = tvm.compile(builder.get(), target=tvm.target.Target(HOST_TARGET))
    write: Callable[[str], object] = executable.export_library
    return write


def save(path: Path, export: Callable[[str], object], **options: Any) -> Manifest:
    """Write the artefact; options replace what is written."""
    from tvm.target import Target

    given: dict[str, Any] = {
        "parameters": PARAMETERS,
        "plan": PLAN,
        "cost": "{}\n",
        "qdq_model": None,
        "overwrite": False,
        **options,
    }
    manifest = {
        "target": "bitfusion/eyeriss",
        "model": ModelEntry(
            source="m.onnx",
            structure_hash="sha256:0",
            weights_hash="sha256:1",
            float_model=FloatModel(path="m.onnx", sha256="2"),
        ),
        "inputs": (
            TensorEntry(name="a", dtype="float32", shape=("n", 3)),
            TensorEntry(name="b", dtype="float32", shape=("n", 2, 3)),
        ),
        "outputs": (
            TensorEntry(name="product", dtype="float32", shape=("n", 3)),
            TensorEntry(name="sum", dtype="float32", shape=None),
        ),
        "layers": (),
        "host_operators": (),
        "passes": (),
        "host": Host(
            machine=platform.machine(),
            target=HOST_TARGET,
            features=needed_features(Target(HOST_TARGET)),
        ),
    }
    return save_artifact(path, manifest=manifest, export=export, **given)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, export: Callable[[str], object]) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "original"
    save(path, export)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(scope="module")
def loaded(original: Path) -> Artifact:
    return load_artifact(original)


def inputs(samples: int = 4) -> dict[str, Array]:
    random = np.random.default_rng(samples)
    return {
        "a": random.standard_normal((samples, 3)).astype(np.float32),
        "b": random.standard_normal((samples, 2, 3)).astype(np.float32),
    }


def expected(given: dict[str, Array]) -> dict[str, Array]:
    return {
        "product": given["a"] * PARAMETERS["scale"].astype(np.float32),
        "sum": given["b"] + PARAMETERS["offset"].astype(np.float32),
    }


def check(artifact: Artifact, given: dict[str, Array]) -> None:
    got = artifact.run(given)
    assert list(got) == ["product", "sum"]
    for name, array in expected(given).items():
        np.testing.assert_array_equal(got[name], array)


# -- what is written -----------------------------------------------------------------------------


def test_files_and_manifest(original: Path) -> None:
    assert {path.name for path in original.iterdir()} == {
        "manifest.json",
        "model.params",
        "model.so",
        "plan.json",
        "cost.json",
    }
    document = json.loads((original / "manifest.json").read_text())
    assert document["schema_version"] == 1
    assert set(document["files"]) == {"cost.json", "model.params", "model.so", "plan.json"}
    for name, entry in document["files"].items():
        path = original / name
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    assert document["parameters"] == [
        {"name": "scale", "dtype": "uint8", "shape": [3], "bytes": 3},
        {"name": "offset", "dtype": "int16", "shape": [2, 1], "bytes": 4},
    ]
    assert document["inputs"][0] == {"name": "a", "dtype": "float32", "shape": ["n", 3]}
    assert set(document["versions"]) == {"bitwright", "apache-tvm", "onnx", "onnxruntime"}


def test_files_are_as_readable_as_others(original: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert original.stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert (original / "manifest.json").stat().st_mode == (tmp_path / "file").stat().st_mode


def test_parameters_are_in_tvms_own_format(original: Path) -> None:
    import tvm

    read = tvm.runtime.load_param_dict_from_file(str(original / "model.params"))
    assert list(read) == list(PARAMETERS)  # the order in which the library takes them
    for name, array in PARAMETERS.items():
        np.testing.assert_array_equal(read[name].numpy(), array)


def test_order_of_many_parameters(tmp_path: Path) -> None:
    import tvm

    arrays = {f"p{i * 37 % 101}": np.array([i], np.int8) for i in range(101)}

    def write(path: str) -> None:
        Path(path).touch()

    save(tmp_path / "many", write, parameters=arrays)
    read = tvm.runtime.load_param_dict_from_file(str(tmp_path / "many" / "model.params"))
    assert list(read) == list(arrays)


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    def fails(path: str) -> None:
        Path(path).touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        save(tmp_path / "model", fails)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_interrupted(tmp_path: Path) -> None:
    def interrupted(path: str) -> None:
        Path(path).touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "model", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_the_whole_folder(
    folder: Path, export: Callable[[str], object]
) -> None:
    with pytest.raises(OutputError):  # it appeared while the work was done
        save(folder, export)
    save(folder, export, overwrite=True, qdq_model=b"model")
    assert (folder / "model.qdq.onnx").read_bytes() == b"model"
    assert load_artifact(folder).qdq_model == folder / "model.qdq.onnx"
    save(folder, export, overwrite=True)
    assert load_artifact(folder).qdq_model is None
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_empty_folder_is_taken(tmp_path: Path, export: Callable[[str], object]) -> None:
    (tmp_path / "model").mkdir()
    check_output_folder(tmp_path / "model", overwrite=False)
    save(tmp_path / "model", export)
    check(load_artifact(tmp_path / "model"), inputs())


@pytest.mark.parametrize(
    "make, overwrite, message",
    [
        (lambda path: path.touch(), False, "exists already"),
        (lambda path: path.touch(), True, "is no artefact"),
        (lambda path: (path / "x").mkdir(parents=True), False, "exists already"),
        (lambda path: (path / "x").mkdir(parents=True), True, "is no artefact"),
        (lambda path: path.symlink_to("nowhere"), False, "exists already"),
        (lambda path: path.symlink_to("nowhere"), True, "is no artefact"),
    ],
)
def test_output_folders_that_exist(
    tmp_path: Path, make: Callable[[Path], None], overwrite: bool, message: str
) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match=message):
        check_output_folder(tmp_path / "out", overwrite=overwrite)


def test_output_folders_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        check_output_folder(tmp_path / "missing" / "out", overwrite=False)
    with pytest.raises(OutputError, match="cannot be written"):
        check_output_folder(tmp_path / ("x" * 300), overwrite=False)


# -- what is read --------------------------------------------------------------------------------


def test_loading_in_another_process(original: Path, tmp_path: Path) -> None:
    given = inputs()
    np.savez(tmp_path / "inputs.npz", **given)  # type: ignore[arg-type]  # mypy takes them for options
    code = """
import sys
import numpy as np
import bitwright
folder, inputs, outputs = sys.argv[1:]
np.savez(outputs, **bitwright.load_artifact(folder).run(dict(np.load(inputs))))
"""
    paths = [original, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, cwd=tmp_path)
    with np.load(tmp_path / "outputs.npz") as got:
        for name, array in expected(given).items():
            np.testing.assert_array_equal(got[name], array)


def test_what_an_artifact_says_of_itself(loaded: Artifact) -> None:
    assert loaded.plan == PLAN
    assert [entry.name for entry in loaded.inputs] == ["a", "b"]
    assert [entry.name for entry in loaded.outputs] == ["product", "sum"]
    assert loaded.qdq_model is None
    assert loaded.threads == len(os.sched_getaffinity(0))


def test_an_artifact_that_took_the_place_of_another(
    tmp_path: Path, export: Callable[[str], object]
) -> None:
    # While a library is loaded, the linker gives it again for its path, whatever is there now.
    path = tmp_path / "model"

    def export_other(library: str) -> None:
        import tvm
        from tvm import relax, tirx

        builder = relax.BlockBuilder()
        n = tirx.Var("n", "int64")
        a = relax.Var("a", relax.TensorType([n, 3], "float32"))
        b = relax.Var("b", relax.TensorType([n, 2, 3], "float32"))
        with builder.function("main", [a, b]):
            double = builder.emit(relax.op.add(a, a))
            builder.emit_func_output(relax.Tuple([double, b]))
        executable: Any = tvm.compile(builder.get(), target=tvm.target.Target(HOST_TARGET))
        executable.export_library(library)

    save(path, export)
    first = load_artifact(path)
    save(path, export_other, parameters={}, overwrite=True)  # nor has it parameters
    given = inputs()
    np.testing.assert_array_equal(load_artifact(path).run(given)["product"], 2 * given["a"])
    check(first, given)


@pytest.mark.parametrize("name", ["model.params", "model.so", "plan.json"])
def test_damaged_files(folder: Path, name: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged: its checksum is wrong") as raised:
        load_artifact(folder)
    assert raised.value.where == str(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        load_artifact(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load_artifact(folder)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        load_artifact(tmp_path / "missing")
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        load_artifact(tmp_path)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda d: d.update(schema_version=2), "schema_version is 2"),
        (lambda d: d.update(schema_version=True), "schema_version is True"),
        (lambda d: d.pop("schema_version"), "schema_version is None"),
        (lambda d: d.pop("inputs"), "field 'inputs'"),
        (lambda d: d.update(other=1), "field 'other'"),
        (lambda d: d["parameters"][0].update(bytes="x"), r"field 'parameters\.0\.bytes'"),
        (lambda d: d["files"].pop("model.so"), r"lists no model\.so"),
        (
            lambda d: d["files"].update({"../x": d["files"]["model.so"]}),
            r"lists a file '\.\./x' elsewhere",
        ),
        (lambda d: d["host"].update(machine="vax"), "was compiled for vax"),
        (
            lambda d: d["host"].update(features=["avx2", "avx1024"]),
            "instructions that this machine lacks: .*avx1024",
        ),
        (lambda d: d["parameters"][0].update(name="other"), "cannot be loaded"),
    ],
)
def test_bad_manifests(
    folder: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(folder, edit)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_manifests_that_are_no_json(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json: (cannot be read|schema_version)"):
        load_artifact(folder)


def test_a_library_of_something_else(folder: Path) -> None:
    (folder / "model.so").write_bytes(b"not a library")
    entry = {"bytes": 13, "sha256": sha256(folder / "model.so")}
    change(folder, lambda document: document["files"].update({"model.so": entry}))
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_artifact(folder)


def test_features_are_those_of_the_processor() -> None:
    from tvm.target import Target

    features = needed_features(Target({"kind": "llvm", "mcpu": "x86-64-v3"}))
    # The level x86-64-v3, by the psABI of x86-64, as far as it is listed.
    assert set(features) == {"sse4.1", "sse4.2", "popcnt"} | {
        "avx",
        "avx2",
        "bmi",
        "bmi2",
        "f16c",
        "fma",
    }
    assert "avx512vnni" in needed_features(Target({"kind": "llvm", "mcpu": "sapphirerapids"}))
    assert artifact._host_features() <= set(artifact._INSTRUCTION_SETS)


# -- running -------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 7, 100])
def test_run(loaded: Artifact, samples: int) -> None:
    check(loaded, inputs(samples))


def test_arrays_that_are_not_contiguous(loaded: Artifact) -> None:
    given = inputs(8)
    check(loaded, {"a": given["a"][::2], "b": np.asfortranarray(given["b"][:4])})
    given["a"].setflags(write=False)
    check(loaded, given)


def test_outputs_stay_what_they_are(loaded: Artifact) -> None:
    given = inputs()
    first = loaded.run(given)
    copies = {name: array.copy() for name, array in first.items()}
    loaded.run({name: -array for name, array in given.items()})
    for name, array in first.items():
        np.testing.assert_array_equal(array, copies[name])
        np.negative(array, out=array)  # it is the caller's


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda i: i.pop("b"), "input 'b' is missing"),
        (lambda i: i.update(c=i["a"]), "input 'c' does not exist"),
        (lambda i: i.update(a=[[1.0, 2.0, 3.0]]), "input 'a': is no NumPy array but list"),
        (lambda i: i.update(a=i["a"].astype(np.float64)), "holds float64, the model takes float32"),
        (lambda i: i.update(a=i["a"].astype(">f4")), "holds >f4, the model takes float32"),
        (lambda i: i.update(a=i["a"][0]), r"has shape \[3\], the model takes \['n', 3\]"),
        (lambda i: i.update(a=i["a"][:, :2]), "axis 1 must be 3"),
        (lambda i: i.update(b=i["b"][:3]), "'n' is 4 in input 'a'"),
        (lambda i: i.update(a=i["a"][:0], b=i["b"][:0]), "is empty"),
    ],
)
def test_bad_inputs(
    loaded: Artifact, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    given: dict[str, Any] = dict(inputs())
    edit(given)
    with pytest.raises(DataError, match=message):
        loaded.run(given)
    check(loaded, inputs())  # it still works


def test_threads(original: Path) -> None:
    for threads in (1, 2):
        check(load_artifact(original, threads=threads), inputs(50))
    with pytest.raises(UsageError, match="0 threads"):
        load_artifact(original, threads=0)


def test_no_thread_is_tied_to_a_processor(original: Path) -> None:
    before = os.sched_getaffinity(0)
    for threads in (1, 2):
        load_artifact(original, threads=threads).run(inputs())
    assert os.sched_getaffinity(0) == before


def test_calls_from_several_threads(loaded: Artifact) -> None:
    failures: list[BaseException] = []

    def work(samples: int) -> None:
        try:
            for _ in range(20):
                check(loaded, inputs(samples))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number + 1,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_messages_name_the_folder(folder: Path) -> None:
    (folder / "model.params").unlink()
    with pytest.raises(ArtifactError, match=re.escape(str(folder))):
        load_artifact(folder)


_MANY_CALLERS = """
import os, sys, threading, time
import multiprocessing
import bitwright
from tests.driver.test_artifact import check, inputs

artifact = bitwright.load_artifact(sys.argv[1])
check(artifact, inputs())
before = len(os.listdir("/proc/self/task"))
for _ in range(20):
    thread = threading.Thread(target=check, args=(artifact, inputs()))
    thread.start()
    thread.join()
# Threads are gone a little after they can be joined: theirs of TVM end with them.
for _ in range(100):
    if len(os.listdir("/proc/self/task")) <= before:
        break
    time.sleep(0.1)
else:
    raise AssertionError("threads are left behind")
child = multiprocessing.get_context("fork").Process(target=check, args=(artifact, inputs()))
child.start()
child.join(60)
assert child.exitcode == 0, child.exitcode
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_that_end_and_forks(original: Path) -> None:
    """In a process of its own: a fork of one that has run tests says little."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _MANY_CALLERS, str(original)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_inputs_that_are_no_mapping(loaded: Artifact) -> None:
    for given in (None, np.zeros((1, 2), np.float32)):
        with pytest.raises(DataError, match="no mapping of names"):
            loaded.run(given)  # type: ignore[arg-type]


def test_files_of_others_are_never_removed(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not the artefact's: notes\.txt"):
        check_output_folder(folder, overwrite=True)
    (folder / "notes.txt").unlink()
    check_output_folder(folder, overwrite=True)
    other = tmp_path / "extension"
    other.mkdir()
    (other / "manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(OutputError, match="is no artefact"):
        check_output_folder(other, overwrite=True)


def test_the_working_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="the folder you are in"):
        check_output_folder(".", overwrite=False)


def test_overwriting_where_folders_cannot_be_exchanged(
    folder: Path, export: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(artifact, "_swap", refuse)
    save(folder, export, overwrite=True)
    check(load_artifact(folder), inputs())
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "weights, activations, form, expected",
    [
        (4, 8, "int", "w4a8"),
        (4, 8, "soft-edge8", "w4a8se8"),
        (0, 16, "int", "a16"),  # a product of two activations
        (0, 8, "soft-edge", "a8se"),
        (0, 4, "soft-edge4", "a4se4"),
    ],
)
def test_precision_of_a_layer(weights: int, activations: int, form: Any, expected: str) -> None:
    layer = LayerEntry(
        name="layer",
        operator="matmul",
        weight_bits=weights,
        activation_bits=activations,
        accumulator_bits=32,
        kernel=True,
        weight_count=0,
        weight_bytes=0,
        float_weight_bytes=0,
        activation_format=form,
    )
    assert layer.precision == expected
