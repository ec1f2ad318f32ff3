"""Whatever is wrong with the input: one or two lines that help, exit code 2, nothing written."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright.cli import main
from bitwright.quant.load import load

Array = npt.NDArray[Any]

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
COMMANDS = [
    *("inspect", "plan", "cost", "quantize", "evaluate", "compare", "compile", "link", "search")
]


@dataclass
class Bench:
    """A folder with a float model, its quantized form and data, and the program to try on them."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def data(self) -> Path:
        return self.folder / "data.npz"

    @property
    def output(self) -> Path:
        return self.folder / "out.onnx"

    def words(self, command: str, model: Path | None = None, **options: Any) -> list[str]:
        """Arguments of a command; options with the value None are left out."""
        given: dict[str, Any] = {}
        if command == "plan":
            given = {"output": self.folder / "plan.json"}
        if command == "cost":
            given = {"target": "bitfusion/eyeriss", "precision": "w8a8"}
        if command in ("quantize", "choose-forms"):
            given = {"precision": "w8a8", "calibration": self.data, "output": self.output}
        if command in ("evaluate", "compare"):
            given = {"data": self.data}
        if command == "link":
            given = {"data": self.data, "precision": "w8a8", "calibration": self.data}
        if command == "search":
            given = {
                "target": "bitfusion/eyeriss",
                "calibration": self.data,
                "validation": self.data,
                "metric": "mse",
                "generations": 1,
                "output": self.folder / "study",
            }
        if command == "compile":
            given = {
                "target": "bitfusion/eyeriss",
                "precision": "w8a8",
                "calibration": self.data,
                "output": self.folder / "artifact",
            }
        words = [command, str(model or self.model)]
        for name, value in {**given, **options}.items():
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                words += [option] if value is True else [option, str(value)]
        return words

    def run(self, *words: str | Path) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def state(self) -> dict[Path, str]:
        return {
            path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in self.folder.rglob("*")
        }

    def refuse(self, words: list[str], code: int = 2) -> str:
        """Run a command that must be refused; return its message."""
        before = self.state()
        got, out, err = self.run(*words)
        assert got == code, out + err
        assert out == ""
        assert self.state() == before, "something was written"
        return checked(err)


def checked(err: str) -> str:
    """A message as all are: what and where on one line, the way out on a second."""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert err.rstrip("\n").count("\n") <= 1, err
    assert len(err) < 1000, err
    return err


def small_model(batch: int | str = "n", opset: int = 21) -> onnx.ModelProto:
    """Conv, Relu, global pooling, Gemm: [n, 2, 6, 6] -> [n, 3]; 4 channels in between."""
    random = np.random.default_rng(1)
    weights = {
        "w1": random.standard_normal((4, 2, 3, 3)),
        "b1": random.standard_normal(4),
        "w2": random.standard_normal((4, 3)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu1"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool1"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten1"),
        helper.make_node("Gemm", ["f", "w2"], ["y"], "fc1"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 21 else 10
    )


def small_samples(count: int = 6) -> Array:
    return np.random.default_rng(2).standard_normal((count, 2, 6, 6)).astype(np.float32)


def text_model(text: str, opset: int = 21, **weights: Array) -> onnx.ModelProto:
    """A model from onnx's text form: nodes only, weights as arrays."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    return model


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    bench = Bench(tmp_path, capsys)
    onnx.save(small_model(), bench.model)
    np.savez(bench.data, x=small_samples(), labels=np.array([0, 1, 2, 0, 1, 2]))
    return bench


def weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    assert isinstance(found, TensorProto)
    return found


def set_weight(model: onnx.ModelProto, name: str, array: Array) -> None:
    weight(model, name).CopyFrom(numpy_helper.from_array(array, name))


def test_the_bench_itself_works(bench: Bench) -> None:
    for command in ("inspect", "plan", "cost", "quantize", "evaluate", "compile"):
        code, _, err = bench.run(*bench.words(command))
        assert (code, err) == (0, "")
    code, _, err = bench.run(*bench.words("compare", bench.output))
    assert (code, err) == (0, "")


# -- files that are no ONNX models ---------------------------------------------------------------


def png() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    image = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + image


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "the file is empty"),
        (b"The quick brown fox jumps over the lazy dog.\n", "not an ONNX"),
        (png(), "not an ONNX"),
        (b'{"layers": {}}', "not an ONNX"),
        (bytes(1000), "not an ONNX"),
        (b"\xff" * 1000, "not an ONNX"),
        (np.random.default_rng(0).bytes(1000), "not an ONNX"),
    ],
    ids=["empty", "text", "png", "json", "zeros", "ones", "noise"],
)
def test_not_an_onnx_file(bench: Bench, command: str, content: bytes, expected: str) -> None:
    bench.model.write_bytes(content)
    message = bench.refuse(bench.words(command))
    assert expected in message
    assert str(bench.model) in message


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_file_folder_and_device(bench: Bench, command: str) -> None:
    missing = bench.folder / "missing.onnx"
    assert f"{missing}: there is no such file" in bench.refuse(bench.words(command, missing))
    what = "is no artefact" if command == "link" else "is a folder"  # it takes artefacts, too
    assert what in bench.refuse(bench.words(command, bench.folder))
    # It has no end, so reading it would fill the memory.
    assert "not a regular file" in bench.refuse(bench.words(command, Path("/dev/zero")))
    beneath = bench.data / "model.onnx"
    assert str(beneath) in bench.refuse(bench.words(command, beneath))


def test_data_given_as_the_model(bench: Bench) -> None:
    assert "not an ONNX" in bench.refuse(bench.words("inspect", bench.data))


def test_file_that_may_not_be_read(bench: Bench) -> None:
    bench.model.chmod(0)
    message = checked(refused_without_privileges(bench.words("inspect"), bench.folder))
    assert f"{bench.model}: cannot be read (Permission denied)" in message


def test_file_beyond_the_limit_of_protobuf(bench: Bench) -> None:
    with bench.model.open("r+b") as stream:
        stream.truncate(3 << 30)  # a hole: takes no space on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, _, err = bench.run(*bench.words("inspect"))
    assert code == 2
    assert "larger than 2 GiB" in checked(err)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_truncated_at_any_length(bench: Bench) -> None:
    content = bench.model.read_bytes()
    lengths = {*range(0, len(content), 13), *range(len(content) - 30, len(content))}
    assert len(lengths) > 70
    for length in sorted(lengths):
        bench.model.write_bytes(content[:length])
        assert str(bench.model) in bench.refuse(bench.words("inspect")), length


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_lenet(bench: Bench, tenth: int) -> None:
    content = (LENET / "lenet.onnx").read_bytes()
    bench.model.write_bytes(content[: len(content) * tenth // 10])
    message = bench.refuse(bench.words("quantize"))
    assert "truncated" in message or "empty" in message


# -- external data -------------------------------------------------------------------------------


@pytest.fixture
def external(bench: Bench) -> Path:
    """The bench's model with its weights in model.data; returns the data file."""
    model = small_model()
    onnx.save(
        model, bench.model, save_as_external_data=True, location="model.data", size_threshold=0
    )
    assert all(tensor.external_data for tensor in model.graph.initializer)
    return bench.folder / "model.data"


def entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    """Set one entry of the description of external data."""
    kept = {item.key: item.value for item in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for name, text in kept.items():
        tensor.external_data.add(key=name, value=text)


@pytest.mark.parametrize("inside", [True, False], ids=["from its folder", "from another folder"])
def test_external_data_work(bench: Bench, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.folder if inside else bench.folder.parent)
    path = Path("model.onnx") if inside else bench.model
    model = onnx.load(LENET / "lenet.onnx")
    onnx.save(model, bench.model, save_as_external_data=True, location="lenet.data")
    assert bench.model.stat().st_size < 10_000
    options = {"calibration": LENET / "calibration.npz"}
    code, out, err = bench.run(*bench.words("quantize", path, **options))
    assert code == 0, out + err
    beside = bench.output.read_bytes()
    options["output"] = bench.folder / "inside.onnx"
    assert bench.run(*bench.words("quantize", LENET / "lenet.onnx", **options))[0] == 0
    assert options["output"].read_bytes() == beside


def test_external_data_of_a_body_and_of_a_constant_work(bench: Bench) -> None:
    model = text_model(
        """g (float[n, 4] x, bool c) => (float[n, 4] y, float[4, 4] k) {
          y = If (c) <then_branch = t () => (float[n, 4] a) <float[4, 4] w> { a = MatMul (x, w) },
                      else_branch = e () => (float[n, 4] b) { b = Relu (x) }>
          k = Constant <value = float[4, 4] {1,2,3,4, 5,6,7,8, 9,1,2,3, 4,5,6,7}> ()
        }"""
    )
    body = model.graph.node[0].attribute[0].g
    del body.value_info[:]
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    body.initializer.append(numpy_helper.from_array(values, "w"))
    constant = model.graph.node[1].attribute[0].t
    constant.CopyFrom(numpy_helper.from_array(values, "k"))
    inside = load(model)
    for tensor, name in ((body.initializer[0], "w.bin"), (constant, "k.bin")):
        (bench.folder / name).write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry(tensor, "location", name)
    bench.model.write_bytes(model.SerializeToString())
    loaded = load(bench.model)
    assert loaded.weights_hash == inside.weights_hash
    x = np.ones((2, 4), np.float32)
    content = loaded.to_proto().SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    y, k = session.run(None, {"x": x, "c": np.array(True)})
    np.testing.assert_array_equal(y, x @ values)
    np.testing.assert_array_equal(k, values)
    (bench.folder / "w.bin").unlink()
    assert "'w'" in bench.refuse(bench.words("inspect"))


def test_external_shapes_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.folder.parent)
    model = text_model(
        "g (float[n, 2, 2] x) => (float[n, 3] y) { f = Reshape (x, s)  y = MatMul (f, w) }",
        s=np.array([-1, 4]),
        w=np.ones((4, 3), np.float32),
    )
    onnx.save(
        model, bench.model, save_as_external_data=True, location="model.data", size_threshold=0
    )
    np.savez(bench.data, x=np.ones((4, 2, 2), np.float32))
    code, out, err = bench.run(*bench.words("inspect", input_shape="x=5,2,2"), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["macs"] == 5 * 4 * 3
    assert bench.run(*bench.words("quantize"))[0] == 0


def test_missing_external_data(bench: Bench, external: Path) -> None:
    external.unlink()
    for command in COMMANDS:
        message = bench.refuse(bench.words(command))
        assert "external data of tensor 'w1' are missing" in message
        assert str(external) in message
        assert "copy the data file" in message


def test_truncated_external_data(bench: Bench, external: Path) -> None:
    whole = external.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        external.write_bytes(whole[:length])
        message = bench.refuse(bench.words("quantize"))
        assert "are truncated" in message
        assert str(external) in message


@pytest.mark.parametrize(
    "location", ["../outside.data", "sub/../../outside.data", "{absolute}", "link.data"]
)
def test_external_data_outside_the_folder(bench: Bench, external: Path, location: str) -> None:
    """A model from a stranger may not read other files of the user."""
    inner = bench.folder / "inner"
    inner.mkdir()
    outside = bench.folder / "outside.data"
    outside.write_bytes(external.read_bytes())
    (inner / "link.data").symlink_to(outside)
    model = onnx.load(bench.model, load_external_data=False)
    entry(model.graph.initializer[0], "location", location.format(absolute=outside))
    path = inner / "model.onnx"
    path.write_bytes(model.SerializeToString())
    message = bench.refuse(bench.words("inspect", path))
    assert "tensor 'w1' points outside the model's folder" in message


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize(
    "key, value",
    [
        ("offset", "-4"),
        ("offset", "four"),
        ("length", "4"),
        ("length", "-1"),
        ("length", ""),
        ("length", str(2**70)),
        ("offset", str(2**70)),
    ],
)
def test_nonsense_about_external_data(bench: Bench, key: str, value: str) -> None:
    model = onnx.load(bench.model, load_external_data=False)
    entry(model.graph.initializer[0], key, value)
    entry(model.graph.initializer[0], "surprise", "x")
    bench.model.write_bytes(model.SerializeToString())
    assert "'w1'" in bench.refuse(bench.words("inspect"))


@pytest.mark.usefixtures("external")
def test_external_data_without_a_length_are_read_to_the_size_of_the_tensor(bench: Bench) -> None:
    model = onnx.load(bench.model, load_external_data=False)
    for tensor in model.graph.initializer:
        index = [item.key for item in tensor.external_data].index("length")
        del tensor.external_data[index]
    bench.model.write_bytes(model.SerializeToString())
    assert load(bench.model).weights_hash == load(small_model()).weights_hash


def test_model_in_memory_with_external_data_left_out() -> None:
    from bitwright.errors import ModelError

    model = small_model()
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    entry(tensor, "location", "model.data")
    with pytest.raises(ModelError, match=r"lies in the external file 'model\.data'"):
        load(model)


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name, node", [("w1", "conv1"), ("b1", "conv1"), ("w2", "fc1")])
def test_nan_and_infinite_weights(
    bench: Bench, command: str, value: float, name: str, node: str
) -> None:
    model = small_model()
    array = numpy_helper.to_array(weight(model, name)).copy()
    array.flat[-1] = value
    set_weight(model, name, array)
    onnx.save(model, bench.model)
    message = bench.refuse(bench.words(command))
    assert f"weight {name!r} (used by {node}) holds NaN or infinite values" in message
    assert "healthy checkpoint" in message


@pytest.mark.parametrize("value", [1e31, -3e38])
def test_weights_whose_products_overflow(bench: Bench, value: float) -> None:
    model = small_model()
    set_weight(model, "w2", np.full((4, 3), value, np.float32))
    onnx.save(model, bench.model)
    message = bench.refuse(bench.words("quantize"))
    assert "weight 'w2' (used by fc1) holds" in message
    assert "overflow" in message


@pytest.mark.parametrize("attribute", ["alpha", "beta"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_factors_that_make_weights_overflow(bench: Bench, attribute: str, value: float) -> None:
    model = small_model()
    node = model.graph.node[-1]
    node.attribute.append(helper.make_attribute(attribute, value))
    node.input.append("b2")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "b2"))
    onnx.save(model, bench.model)
    message = bench.refuse(bench.words("quantize"))
    assert "(used by fc1)" in message
    assert "overflow" in message


def test_both_infinities(bench: Bench) -> None:
    model = small_model()  # their sum is NaN, which NumPy warns about
    set_weight(model, "b1", np.array([np.inf, -np.inf, 0, 0], np.float32))
    onnx.save(model, bench.model)
    assert "weight 'b1'" in bench.refuse(bench.words("inspect"))


def test_nan_weights_in_a_constant_node(bench: Bench) -> None:
    model = small_model()
    tensor = model.graph.initializer.pop()
    array = np.full((4, 3), np.nan, np.float32)
    value = numpy_helper.from_array(array, tensor.name)
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], "c", value=value))
    onnx.save(model, bench.model)
    assert "(used by fc1)" in bench.refuse(bench.words("inspect"))


def test_an_attention_mask_may_be_infinite(bench: Bench) -> None:
    model = text_model(
        "g (float[n, 4] x) => (float[n, 4] y) { m = MatMul (x, w)  a = Add (m, mask) "
        " y = Softmax (a) }",
        w=np.eye(4, dtype=np.float32),
        mask=np.array([0, 0, 0, -np.inf], np.float32),
    )
    onnx.save(model, bench.model)
    assert bench.run(*bench.words("inspect"))[0] == 0


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_cannot_be(bench: Bench, scale: float) -> None:
    assert bench.run(*bench.words("quantize"))[0] == 0
    model = onnx.load(bench.output)
    name = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
    set_weight(model, name, np.array(scale, np.float32))
    onnx.save(model, bench.model)
    message = bench.refuse(bench.words("evaluate", engine="reference"))
    assert f"scale {name!r} of" in message or f"weight {name!r}" in message


def to_half(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The model in float16 or bfloat16: weights, inputs and outputs."""
    dtype: Any = np.float16 if kind == TensorProto.FLOAT16 else ml_dtypes.bfloat16
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(dtype)
        tensor.CopyFrom(
            helper.make_tensor(tensor.name, kind, array.shape, array.tobytes(), raw=True)
        )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


def run_onnx(model: onnx.ModelProto | Path, x: Array) -> Array:
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


@pytest.mark.parametrize(
    "kind, name, precision",
    [(TensorProto.FLOAT16, "float16", 2.0**-11), (TensorProto.BFLOAT16, "bfloat16", 2.0**-8)],
    ids=["float16", "bfloat16"],
)
def test_half_precision_is_converted_with_a_note(
    bench: Bench, kind: int, name: str, precision: float
) -> None:
    onnx.save(to_half(small_model(), kind), bench.model)
    code, out, err = bench.run(*bench.words("inspect"))
    assert (code, err) == (0, "")
    assert f"note: {name} converted to float32" in out
    # It computes what the float32 model does, up to the rounding of a dozen sums of weights.
    x = small_samples()
    ours = run_onnx(load(bench.model).to_proto(), x)
    wanted = run_onnx(small_model(), x)
    assert ours.dtype == np.float32
    tolerance = 10 * precision * np.abs(wanted).max()
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance)
    if kind == TensorProto.FLOAT16:  # onnxruntime has no bfloat16 convolution on the CPU
        half = run_onnx(to_half(small_model(), kind), x.astype(np.float16))
        np.testing.assert_allclose(ours, half.astype(np.float32), rtol=0, atol=tolerance)
    code, out, err = bench.run(*bench.words("quantize"))
    assert (code, err) == (0, "")
    assert f"note: {name} converted to float32" in out
    assert run_onnx(bench.output, x).dtype == np.float32


def test_half_precision_inside(bench: Bench) -> None:
    """Casts, constants, bodies, sequences and functions in float16 turn to float32 together."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[n, 4] x, bool c) => (float[n, 4] y) {
          h = Cast <to = 10> (x)
          k = Constant <value_floats = [2.0]> ()
          l = Cast <to = 10> (k)
          p = own.scaled (h, l)
          q = If (c) <then_branch = t () => (float16[n, 4] a) { a = Mul (p, l) },
                      else_branch = e () => (float16[n, 4] b) { b = Neg (p) }>
          s = SequenceEmpty <dtype = 10> ()
          i = SequenceInsert (s, q)
          j = ConcatFromSequence <axis = 0> (i)
          y = Cast <to = 1> (j)
        }
        <domain: "own", opset_import: ["" : 21]> scaled (a, b) => (d) { d = Mul (a, b) }"""
    )
    bench.model.write_bytes(model.SerializeToString())
    loaded = load(bench.model)
    assert loaded.notes == ("float16 converted to float32",)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    content = loaded.to_proto().SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    for flag in (True, False):
        (y,) = session.run(None, {"x": x, "c": np.array(flag)})
        np.testing.assert_array_equal(y, 4 * x if flag else -2 * x)


# -- data ----------------------------------------------------------------------------------------


def write_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def write_text(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    return write


def write_npy(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, small_samples())


def write_truncated(path: Path) -> None:
    np.savez(path, x=small_samples())
    path.write_bytes(path.read_bytes()[:-200])


def write_damaged(path: Path) -> None:
    np.savez(path, x=small_samples())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # in the midst of the numbers: only the checksum knows
    path.write_bytes(content)


def write_damaged_zlib(path: Path) -> None:
    np.savez_compressed(path, x=small_samples())
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    path.write_bytes(content)


def write_header(header: bytes) -> Callable[[Path], None]:
    """A member whose header is the given text."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header))
            archive.writestr("x.npy", start + header + bytes(288))

    return write


def write_pickle(path: Path) -> None:
    np.savez(path, x=np.array([{"a": 1}, {"b": 2}], dtype=object))


def nan_at(index: int, value: float = np.nan) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        x = small_samples()
        x[index, 1, 2, 3] = value
        np.savez(path, x=x)

    return write


def arrays(**named: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **named)


BAD_DATA: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (lambda path: path.unlink(), ["there is no such file"]),
    "folder": (write_folder, ["not an .npz file"]),
    "empty file": (write_text(""), ["not an .npz file"]),
    "text": (write_text("1,2,3"), ["not an .npz file", "numpy.savez"]),
    "one .npy": (write_npy, ["not an .npz file", "numpy.savez"]),
    "truncated": (write_truncated, ["not an .npz file"]),
    "damaged": (write_damaged, ["damaged", "x"]),
    "damaged and compressed": (write_damaged_zlib, ["damaged"]),
    "no arrays": (arrays(), ["holds no arrays"]),
    "pickled objects": (write_pickle, ["array 'x'", "holds object", "never loaded"]),
    "texts": (arrays(x=np.array(["a", "b"])), ["array 'x'", "not numbers"]),
    "complex numbers": (arrays(x=small_samples() * 1j), ["array 'x'", "not numbers"]),
    "dates": (arrays(x=np.zeros(3, "datetime64[s]")), ["array 'x'", "not numbers"]),
    "too few axes": (
        arrays(x=np.zeros((2, 6, 6), np.float32)),
        ["shape [2, 6, 6] does not fit model input 'x' of shape ['n', 2, 6, 6]"],
    ),
    "too many axes": (arrays(x=np.zeros((2, 1, 1, 2, 6, 6))), ["does not fit model input 'x'"]),
    "channels last": (
        arrays(x=np.zeros((8, 6, 6, 2), np.float32)),
        ["shape [8, 6, 6, 2] does not fit", "all other sizes must be the model's"],
    ),
    "a number": (arrays(x=np.float32(1)), ["shape [] does not fit"]),
    "no samples": (arrays(x=np.zeros((0, 2, 6, 6), np.float32)), ["there are no samples"]),
    "NaN": (nan_at(0), ["array 'x'", "sample 0 holds NaN", "remove or repair"]),
    "NaN in the last sample": (nan_at(5), ["sample 5 holds NaN"]),
    "infinite": (nan_at(3, -np.inf), ["sample 3 holds NaN or infinite"]),
    "beyond float32": (arrays(x=small_samples().astype(np.float64) * 1e300), ["sample 0 holds"]),
    "other names": (
        arrays(image=small_samples(), mask=small_samples()),
        ["no array for model input 'x'", "arrays found: image, mask", "after the model inputs: x"],
    ),
    "labels only": (arrays(labels=np.arange(3)), ["no array for model input 'x'", "found: none"]),
    "more labels": (
        arrays(x=small_samples(), labels=np.zeros(5, np.int64)),
        ["different numbers of samples: x 6, labels 5"],
    ),
    "one label": (arrays(x=small_samples(), labels=np.int64(1)), ["x 6, labels 0"]),
    "not a header": (write_header(b"not a header"), ["not an .npz file"]),
    "header of a list": (write_header(b"[1, 2]"), ["not an .npz file"]),
    "header without end": (write_header(b"{'descr': ("), ["not an .npz file"]),
    "unhashable header": (write_header(b"{{}: 1}"), ["not an .npz file"]),
    "negative shape": (
        write_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2, 6, 6)}"),
        ["not an .npz file"],
    ),
    "shape of a terabyte": (
        write_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 2, 6, 6)}"),
        ["array 'x' is damaged or truncated"],
    ),
    "more than the header says": (
        write_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 2, 6, 6)}"),
        ["there are no samples"],
    ),
}


@pytest.mark.parametrize("command", ["quantize", "evaluate", "compare"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(bench: Bench, command: str, case: str) -> None:
    if command == "compare":
        assert bench.run(*bench.words("quantize", output=bench.folder / "q.onnx"))[0] == 0
    write, expected = BAD_DATA[case]
    write(bench.data)
    # mse needs no labels, so that the same data go wrong in all three commands
    more = {"metric": "mse", "against": bench.model} if command == "evaluate" else {}
    model = bench.folder / "q.onnx" if command == "compare" else bench.model
    message = bench.refuse(bench.words(command, model, **more))
    for part in (str(bench.data), *expected):
        assert part in message


def test_numbers_of_another_type(bench: Bench) -> None:
    model = text_model(
        "g (int32[n, 2] x) => (float[n, 3] y) { e = Gather (w, x)  s = ReduceMean (e, one) "
        " z = Squeeze (s, one)  y = MatMul (z, v) }",
        w=np.ones((5, 4), np.float32),
        v=np.ones((4, 3), np.float32),
        one=np.array([1]),
    )
    onnx.save(model, bench.model)
    np.savez(bench.data, x=np.ones((4, 2)))
    message = bench.refuse(bench.words("quantize"))
    assert "array 'x': holds float64, model input 'x' takes int32" in message
    assert "store the array as int32" in message
    np.savez(bench.data, x=np.array([[1, 2], [3, 4], [1, 2**32]]))  # 2^32 would turn into 0
    message = bench.refuse(bench.words("quantize"))
    assert "sample 2 holds numbers beyond int32" in message
    np.savez(bench.data, x=np.array([[1, 2], [3, 4], [1, 99]]))
    message = bench.refuse(bench.words("quantize"))
    assert "the model fails on samples 0 to 2" in message
    np.savez(bench.data, x=np.array([[1, 2], [3, 4], [1, 0]]))
    assert bench.run(*bench.words("quantize"))[0] == 0


def test_fixed_batch_that_does_not_divide_the_samples(bench: Bench) -> None:
    onnx.save(small_model(batch=4), bench.model)
    message = bench.refuse(bench.words("quantize"))
    assert "batches of exactly 4, which does not divide the 6 samples" in message
    assert "add or remove samples" in message


def test_inputs_whose_first_sizes_are_no_batch(bench: Bench) -> None:
    model = text_model(
        "g (float[2, 4] x, float[4, 4] z) => (float[2, 4] y) { a = MatMul (x, w) "
        " y = MatMul (a, z) }",
        w=np.eye(4, dtype=np.float32),
    )
    onnx.save(model, bench.model)
    np.savez(bench.data, x=np.ones((8, 4), np.float32), z=np.ones((8, 4), np.float32))
    message = bench.refuse(bench.words("quantize"))
    assert "differ in their first size [2, 4]" in message
    assert "give every array one axis more" in message
    np.savez(bench.data, x=np.ones((8, 2, 4), np.float32), z=np.ones((8, 4, 4), np.float32))
    assert bench.run(*bench.words("quantize"))[0] == 0


@pytest.mark.parametrize(
    "kind", ["string[n]", "seq(float[n])", "optional(float[n])", "float16[0, 4]", "bool[0]"]
)
def test_inputs_that_take_no_arrays_of_numbers(bench: Bench, kind: str) -> None:
    model = text_model(
        f"g (float[n, 4] x, {kind} other) => (float[n, 4] y) {{ y = MatMul (x, w) }}",
        w=np.eye(4, dtype=np.float32),
    )
    bench.model.write_bytes(model.SerializeToString())
    np.savez(bench.data, x=np.ones((3, 4)), other=np.ones((3, 4)))
    assert "model input 'other' takes no numbers" in bench.refuse(bench.words("quantize"))


# -- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1, 2, 0, 1, 3]),
        np.array([0, 1, 2, 0, 1, -1]),
        np.array([0, 1, 2, 0, 1, 2], np.float32),
        np.array([0, 1, 2, 0, 1, np.nan]),
    ],
    ids=["too large", "negative", "float", "NaN"],
)
def test_labels_out_of_range(bench: Bench, labels: Array) -> None:
    np.savez(bench.data, x=small_samples(), labels=labels)
    message = bench.refuse(bench.words("evaluate"))
    assert "labels must be whole numbers from 0 to 2" in message
    assert str(bench.data) in message


def test_labels_of_another_shape(bench: Bench) -> None:
    np.savez(bench.data, x=small_samples(), labels=np.zeros((6, 3), np.int64))
    message = bench.refuse(bench.words("evaluate"))
    assert "labels of shape [6, 3] do not fit outputs of shape [6, 3]" in message
    assert str(bench.data) in message


def test_an_item_without_a_right_option(bench: Bench) -> None:
    model = text_model(
        "g (float[n, 2, 4] x) => (float[n, 2, 4] y) { y = MatMul (x, w) }",
        w=np.eye(4, dtype=np.float32),
    )
    onnx.save(model, bench.model)
    labels = np.array([[0, 1, 3, -1, 2], [0, 0, 3, -1, 1], [1, 0, 3, -1, 2], [1, 0, 3, -1, 1]])
    np.savez(bench.data, x=np.ones((4, 2, 4), np.float32), labels=labels)
    message = bench.refuse(bench.words("evaluate", metric="choice"))
    # Known only when all samples are measured, and still a matter of the data.
    assert f"{bench.data}: item 1 has 2 options, 0 of them right" in message


def test_no_labels(bench: Bench) -> None:
    np.savez(bench.data, x=small_samples())
    message = bench.refuse(bench.words("evaluate"))
    assert f"{bench.data}: metric top1 needs labels" in message


@pytest.mark.parametrize(
    "metric, expected",
    [
        ("f1", "cloze4, last-word, mse, per, perplexity, sqnr, top1, top5, wer, top<K>"),
        ("", "choose one of"),
        ("no.such.module:Metric", "cannot be loaded"),
        ("math:no_such_thing", "cannot be loaded"),
    ],
)
def test_unknown_metric(bench: Bench, metric: str, expected: str) -> None:
    message = bench.refuse(bench.words("evaluate", metric=metric))
    assert repr(metric) in message
    assert expected in message


def test_metric_that_compares_with_nothing(bench: Bench) -> None:
    message = bench.refuse(bench.words("evaluate", metric="sqnr"))
    assert "none is given" in message
    assert "--against" in message


def test_float_model_of_other_outputs(bench: Bench) -> None:
    other = bench.folder / "other.onnx"
    model = small_model()
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    onnx.save(model, other)
    message = bench.refuse(bench.words("evaluate", metric="mse", against=other))
    assert f"{other}: has an output 'scores' that {bench.model} lacks" in message


def test_float_model_of_other_inputs(bench: Bench) -> None:
    other = bench.folder / "other.onnx"
    model = text_model(
        "g (float[n, 4] z) => (float[n, 3] y) { y = MatMul (z, w) }", w=np.ones((4, 3), np.float32)
    )
    onnx.save(model, other)
    message = bench.refuse(bench.words("evaluate", metric="mse", against=other))
    assert f"{other}: has an input 'z' that {bench.model} lacks" in message


def test_output_that_is_a_sequence(bench: Bench) -> None:
    model = text_model(
        "g (float[n, 4] x) => (seq(float[n, 4]) y) { m = MatMul (x, w) "
        " y = SequenceConstruct (m) }",
        w=np.eye(4, dtype=np.float32),
    )
    bench.model.write_bytes(model.SerializeToString())
    np.savez(bench.data, x=np.ones((3, 4), np.float32), labels=np.zeros(3, np.int64))
    for engine in ("onnxruntime", "reference"):
        bench.refuse(bench.words("evaluate", engine=engine))
    message = bench.refuse(bench.words("evaluate"))
    assert "output 'y' is no array of numbers" in message


@pytest.mark.parametrize("metric", ["mse", "sqnr"])
def test_infinite_outputs_are_no_number(bench: Bench, metric: str) -> None:
    model = text_model(
        "g (float[n, 4] x) => (float[n, 4] y) { y = Reciprocal (x) }",
    )
    bench.model.write_bytes(model.SerializeToString())
    np.savez(bench.data, x=np.zeros((3, 4), np.float32))
    message = bench.refuse(bench.words("evaluate", metric=metric, against=bench.model), code=1)
    assert "is not a number: outputs are infinite" in message


def test_nan_outputs(bench: Bench) -> None:
    model = text_model("g (float[n, 4] x) => (float[n, 4] y) { y = Sqrt (x) }")
    bench.model.write_bytes(model.SerializeToString())
    x = np.ones((40, 4), np.float32)
    x[38] = -1
    np.savez(bench.data, x=x, labels=np.zeros(40, np.int64))
    message = bench.refuse(bench.words("evaluate"), code=1)
    assert f"{bench.model}: output 'y' is NaN on samples 32 to 39" in message


def test_reference_of_a_float_model(bench: Bench) -> None:
    message = bench.refuse(bench.words("evaluate", engine="reference"))
    assert "is not quantized" in message
    assert "quantize it first" in message
    message = bench.refuse(bench.words("compare"))
    assert "quantize it first" in message


@pytest.mark.parametrize("command", ["quantize", "evaluate", "compare"])
@pytest.mark.parametrize("size", [0, -3])
def test_batch_size_that_is_not_positive(bench: Bench, command: str, size: int) -> None:
    message = bench.refuse(bench.words(command, batch_size=size))
    assert f"batch size {size} is not positive" in message


@pytest.mark.parametrize(
    "option, value",
    [("engine", "gpu"), ("requantization", "double"), ("batch-size", "many"), ("colour", "red")],
)
def test_options_that_do_not_exist(bench: Bench, option: str, value: str) -> None:
    before = bench.state()
    code, out, err = bench.run(*bench.words("evaluate"), f"--{option}", value)
    assert code == 2
    assert out == ""
    assert f"--{option}" in err
    assert "Traceback" not in err
    assert bench.state() == before


# -- plans ---------------------------------------------------------------------------------------


@pytest.fixture
def plan(bench: Bench) -> dict[str, Any]:
    """A plan that fits the bench's model."""
    path = bench.folder / "plan.json"
    assert bench.run(*bench.words("plan"))[0] == 0
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["layers"] == {"conv1": "w8a8", "fc1": "w8a8"}
    return document


def refuse_plan(bench: Bench, document: Any) -> str:
    path = bench.folder / "plan.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    message = bench.refuse(bench.words("quantize", precision=None, plan=path))
    assert str(path) in message
    return message


def test_plan_with_unknown_layers(bench: Bench, plan: dict[str, Any]) -> None:
    plan["layers"]["conv9"] = "w8a8"
    message = refuse_plan(bench, plan)
    assert "the model has no layer 'conv9'" in message
    assert "its layers are: conv1, fc1" in message
    plan["layers"] = {"a": "w8a8", "b": "w8a8", "c": "w8a8"}
    assert "no layer 'a' (3 unknown layers in all)" in refuse_plan(bench, plan)


def test_plan_with_missing_layers(bench: Bench, plan: dict[str, Any]) -> None:
    del plan["layers"]["conv1"]
    message = refuse_plan(bench, plan)
    assert "layer 'conv1' has no precision" in message
    plan["layers"] = {}
    assert "layer 'conv1' has no precision (2 layers are missing in all)" in refuse_plan(
        bench, plan
    )


@pytest.mark.parametrize(
    "precision, expected",
    [
        ("w3a8", "weight_bits is 3"),
        ("w8a32", "activation_bits is 32"),
        ("w0a8", "weight_bits is 0"),
        ("w1a1", "weight_bits is 1"),
        ("w99999999999a8", "not a precision"),
        (f"w{'9' * 5000}a8", "'w999"),
        ("int8", "'int8' is not a precision"),
        ("", "'' is not a precision"),
        ("w8a8sf", "not a precision"),
    ],
)
def test_bits_that_do_not_exist(
    bench: Bench, plan: dict[str, Any], precision: str, expected: str
) -> None:
    plan["layers"]["conv1"] = precision
    message = refuse_plan(bench, plan)
    assert "layer 'conv1'" in message
    assert expected in message
    assert "2, 4, 8, 16" in message
    (bench.folder / "plan.json").unlink()
    for words in (
        bench.words("quantize", precision=precision),
        bench.words("plan", precision=precision),
        bench.words("plan", layer=f"conv1={precision}"),
    ):
        assert expected in bench.refuse(words)


@pytest.mark.parametrize("precision, way_out", [("w8a16se", "a8se"), ("w8a8se4", "a4se4")])
def test_formats_of_another_width(
    bench: Bench, plan: dict[str, Any], precision: str, way_out: str
) -> None:
    plan["layers"]["conv1"] = precision
    message = refuse_plan(bench, plan)
    assert "layer 'conv1': there is no soft-edge" in message
    assert f"write {way_out}:" in message


@pytest.mark.parametrize("value", [8, None, 8.0, ["w8a8"], {"weight_bits": 8}, True])
def test_precision_of_another_type(bench: Bench, plan: dict[str, Any], value: Any) -> None:
    plan["layers"]["conv1"] = value
    message = refuse_plan(bench, plan)
    assert "layer 'conv1'" in message
    assert "is not a precision" in message


@pytest.mark.parametrize("bits", [0, 4, 32, 8.0, "8", True, None, [8]])
def test_elementwise_bits_that_do_not_exist(bench: Bench, plan: dict[str, Any], bits: Any) -> None:
    message = refuse_plan(bench, {**plan, "elementwise_bits": bits})
    assert "elementwise_bits" in message
    assert "choose 8 or 16" in message


@pytest.mark.parametrize("bits", [0, 4, 64, 16.0, "16", True, None, [16]])
def test_loop_bits_that_do_not_exist(bench: Bench, plan: dict[str, Any], bits: Any) -> None:
    message = refuse_plan(bench, {**plan, "loop_bits": bits})
    assert "loop_bits" in message
    assert "choose 8 or 16 bits of fixed point, or 32 for float32" in message


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_loop_bits_on_the_command_line(bench: Bench, command: str) -> None:
    assert "loop_bits is 12" in bench.refuse(bench.words(command, loop_bits=12))


@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.parametrize("bits", [0, 4, 32])
def test_elementwise_bits_on_the_command_line(bench: Bench, command: str, bits: int) -> None:
    message = bench.refuse(bench.words(command, elementwise_bits=bits))
    assert f"elementwise_bits is {bits}" in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "not a JSON document"),
        ("layers: {conv1: w8a8}", "not a JSON document"),
        ('{"schema_version": 1, "layers": {"conv1": "w8a8"', "not a JSON document"),
        ("[" * 100_000, "not a JSON document"),
        (f'{{"schema_version": {"1" * 5000}}}', "not a JSON document"),
        ("[]", "must be a JSON object"),
        ('"plan"', "must be a JSON object"),
        ("null", "must be a JSON object"),
        ("{}", "schema_version is None"),
        ('{"schema_version": 1}', "layers must be an object"),
        ('{"schema_version": 1, "layers": ["conv1"]}', "layers must be an object"),
        (
            '{"schema_version": 1, "layers": {"conv1": "w8a8", "conv1": "w4a4"}}',
            "'conv1' stands twice",
        ),
        (
            '{"schema_version": 1, "schema_version": 1, "layers": {}}',
            "'schema_version' stands twice",
        ),
    ],
)
def test_plan_that_is_none(bench: Bench, text: str, expected: str) -> None:
    assert expected in refuse_plan(bench, text)


def test_plan_that_is_no_text(bench: Bench) -> None:
    path = bench.folder / "plan.json"
    for content in (png(), "ungültig".encode("latin-1"), bytes(100)):
        path.write_bytes(content)
        message = bench.refuse(bench.words("quantize", precision=None, plan=path))
        assert f"{path}: not a JSON document" in message
    path.unlink()
    message = bench.refuse(bench.words("quantize", precision=None, plan=path))
    assert f"{path}: there is no such file" in message
    message = bench.refuse(bench.words("quantize", precision=None, plan=bench.folder))
    assert f"{bench.folder}: cannot be read (Is a directory)" in message


def test_plan_that_an_editor_began_with_a_byte_order_mark(
    bench: Bench, plan: dict[str, Any]
) -> None:
    path = bench.folder / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8-sig")
    assert bench.run(*bench.words("quantize", precision=None, plan=path))[0] == 0


@pytest.mark.parametrize("version", [0, 2, 999, -1, "1", 1.0, True, None, [1]])
def test_plan_of_another_schema(bench: Bench, plan: dict[str, Any], version: Any) -> None:
    message = refuse_plan(bench, {**plan, "schema_version": version})
    assert "schema_version is" in message
    assert "reads schema version 1" in message


def test_plan_with_an_unknown_field(bench: Bench, plan: dict[str, Any]) -> None:
    message = refuse_plan(bench, {**plan, "layer": {}})
    assert "unknown field 'layer'" in message
    assert "layers" in message


@pytest.mark.parametrize("field", ["target", "structure_hash", "weights_hash"])
def test_field_of_another_type(bench: Bench, plan: dict[str, Any], field: str) -> None:
    assert f"{field} must be a text or null" in refuse_plan(bench, {**plan, field: 5})


def test_plan_of_another_model(bench: Bench, plan: dict[str, Any]) -> None:
    model = small_model()
    model.graph.node.insert(2, helper.make_node("Sigmoid", ["r"], ["s"], "sigmoid1"))
    model.graph.node[3].input[0] = "s"
    onnx.save(model, bench.model)
    message = refuse_plan(bench, plan)
    assert "was made for another model (structure sha256:" in message
    assert "remove structure_hash" in message
    plan["structure_hash"] = None  # the way out that the message names
    path = bench.folder / "plan.json"
    path.write_text(json.dumps(plan))
    assert bench.run(*bench.words("quantize", precision=None, plan=path))[0] == 0


def test_plan_of_the_same_model_with_other_weights_fits(bench: Bench, plan: dict[str, Any]) -> None:
    model = small_model()
    set_weight(model, "w2", np.ones((4, 3), np.float32))
    onnx.save(model, bench.model)
    path = bench.folder / "plan.json"
    path.write_text(json.dumps(plan))
    assert bench.run(*bench.words("quantize", precision=None, plan=path))[0] == 0


def test_both_and_neither_of_precision_and_plan(bench: Bench, plan: dict[str, Any]) -> None:
    assert plan
    path = bench.folder / "plan.json"
    message = bench.refuse(bench.words("quantize", precision="w8a8", plan=path))
    assert "both a precision for all layers and a plan" in message
    message = bench.refuse(bench.words("quantize", precision=None))
    assert "neither a precision for all layers nor a plan" in message
    assert "--precision w8a8" in message
    given: Any
    for given in ({"elementwise_bits": 8}, {"loop_bits": 16}):
        message = bench.refuse(bench.words("quantize", precision=None, plan=path, **given))
        assert "part of the plan" in message


def test_layers_of_the_command_line(bench: Bench) -> None:
    message = bench.refuse(bench.words("plan", layer="conv9=w8a8"))
    assert "no layer 'conv9'" in message
    message = bench.refuse(bench.words("plan", layer="conv1"))
    assert "'conv1' is no layer precision" in message
    assert "conv1=w4a8" in message
    twice = [*bench.words("plan", layer="conv1=w4a8"), "--layer", "conv1=w8a8"]
    assert "layer 'conv1' is given twice" in bench.refuse(twice)


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", ["0", "-1", "100.001", "nan", "inf", "-inf"])
def test_percentile_out_of_range(bench: Bench, percentile: str) -> None:
    message = bench.refuse(bench.words("quantize", clip="percentile", percentile=percentile))
    assert "percentile" in message
    assert "above 0 and at most 100" in message


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("x", "'x' is no input shape"),
        ("1,2,6,6", "'1,2,6,6' is no input shape"),
        ("x=", "does not fit input 'x'"),
        ("x=1,2,6", "shape [1, 2, 6] does not fit input 'x', which is ['n', 2, 6, 6]"),
        ("x=1,2,6,7", "does not fit input 'x'"),
        ("x=1,2,6,six", "'x=1,2,6,six' is no input shape"),
        ("x=1,2,6,6,", "is no input shape"),
        ("x=0,2,6,6", "does not fit input 'x'"),
        ("x=-1,2,6,6", "does not fit input 'x'"),
        (f"x={2**63},2,6,6", "does not fit input 'x'"),
        (f"x={'9' * 5000},2,6,6", "'x=999"),
        ("z=1,2,6,6", "there is no input 'z'"),
        ("=1,2,6,6", "there is no input ''"),
    ],
)
def test_bad_input_shape(bench: Bench, shape: str, expected: str) -> None:
    assert expected in bench.refuse(bench.words("inspect", input_shape=shape))


def test_input_shape_given_twice(bench: Bench) -> None:
    words = [*bench.words("inspect", input_shape="x=1,2,6,6"), "--input-shape", "x=2,2,6,6"]
    assert "'x' is given twice" in bench.refuse(words)


def test_input_shape_that_an_operator_cannot_take(bench: Bench) -> None:
    model = text_model(
        "g (float[n, k] x) => (float[n, 3] y) { y = MatMul (x, w) }", w=np.ones((4, 3), np.float32)
    )
    onnx.save(model, bench.model)
    assert "contradict" in bench.refuse(bench.words("inspect", input_shape="x=1,5"))


# -- models that bitwright does not take ---------------------------------------------------------


def test_model_that_is_quantized_already(bench: Bench) -> None:
    quantized = bench.folder / "q.onnx"
    assert bench.run(*bench.words("quantize", output=quantized))[0] == 0
    message = bench.refuse(bench.words("quantize", quantized))
    assert f"{quantized}: is quantized already" in message
    assert "give the float model" in message


def test_model_without_layers(bench: Bench) -> None:
    model = text_model("g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }")
    onnx.save(model, bench.model)
    np.savez(bench.data, x=np.ones((3, 4), np.float32))
    message = bench.refuse(bench.words("quantize"))
    assert "has no layers to quantize" in message
    assert "inspect" in message
    assert bench.run(*bench.words("inspect"))[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_operators_of_one_runtime_are_named_all_at_once(bench: Bench, command: str) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "own" : 1]>
        g (float[n, 4] x, bool c) => (float[n, 4] y) {
          [first] a = com.microsoft.FusedGemm (x, x)
          b = com.microsoft.BiasGelu (a, a)
          d = own.f (b)
          y = If (c) <then_branch = t () => (float[n, 4] e) { e = com.microsoft.QuickGelu (d) },
                      else_branch = u () => (float[n, 4] h) { h = Relu (d) }>
        }
        <domain: "own", opset_import: ["" : 21, "com.microsoft" : 1]>
        f (i) => (j) { j = com.microsoft.FastGelu (i) }"""
    )
    bench.model.write_bytes(model.SerializeToString())
    message = bench.refuse(bench.words(command))
    assert "com.microsoft.FusedGemm (first)" in message
    assert "com.microsoft.BiasGelu (b)" in message
    assert "com.microsoft.QuickGelu (e)" in message
    assert "com.microsoft.FastGelu (j)" in message
    assert "standard operators" in message


def test_very_many_operators_of_one_runtime(bench: Bench) -> None:
    nodes = "\n".join(f"y{i} = com.microsoft.Gelu (x)" for i in range(100))
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> '
        f"g (float[n, 4] x) => (float[n, 4] y0) {{ {nodes} }}"
    )
    bench.model.write_bytes(model.SerializeToString())
    assert "and 92 more" in bench.refuse(bench.words("inspect"))


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_operator_set_newer_than_known(bench: Bench, domain: str) -> None:
    model = small_model()
    model.opset_import[0].domain, model.opset_import[0].version = domain, 99
    bench.model.write_bytes(model.SerializeToString())
    message = bench.refuse(bench.words("inspect"))
    assert "uses operator set 99, newer than the installed onnx package knows" in message
    assert "update onnx" in message


@pytest.mark.parametrize("version", [0, -1, -(2**63)])
def test_operator_set_that_cannot_be(bench: Bench, version: int) -> None:
    model = small_model()
    model.opset_import[0].version = version
    bench.model.write_bytes(model.SerializeToString())
    assert str(bench.model) in bench.refuse(bench.words("inspect"))


@pytest.mark.parametrize("version", [0, 99, -1])
def test_format_version_that_is_not_known(bench: Bench, version: int) -> None:
    model = small_model()
    model.ir_version = version
    bench.model.write_bytes(model.SerializeToString())
    assert str(bench.model) in bench.refuse(bench.words("inspect"))


def test_sparse_weights(bench: Bench) -> None:
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = numpy_helper.from_array(np.array([1, 5]), "i")
    sparse = helper.make_sparse_tensor(values, indices, [4, 4])
    model = text_model("g (float[n, 4] x) => (float[n, 4] y) { y = MatMul (x, w) }")
    model.graph.sparse_initializer.append(sparse)
    bench.model.write_bytes(model.SerializeToString())
    message = bench.refuse(bench.words("inspect"))
    assert "holds sparse tensors, which are not supported (w)" in message
    assert "dense" in message
    del model.graph.sparse_initializer[:]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], "c", sparse_value=sparse))
    bench.model.write_bytes(model.SerializeToString())
    assert "(c)" in bench.refuse(bench.words("inspect"))


# -- malformed models, most of them found by the fuzz test ---------------------------------------


def function_model(*functions: str) -> onnx.ModelProto:
    text = '<ir_version: 10, opset_import: ["" : 21, "own" : 1]> '
    text += "g (float[n, 4] x) => (float[n, 4] y) { y = own.f0 (x) }\n"
    for index, body in enumerate(functions):
        text += (
            f'<domain: "own", opset_import: ["" : 21, "own" : 1]> f{index} (a) => (b) {{{body}}}\n'
        )
    return onnx.parser.parse_model(text)


def test_functions_that_call_themselves(bench: Bench) -> None:
    bench.model.write_bytes(function_model("b = own.f0 (a)").SerializeToString())
    assert "call themselves: f0 -> f0" in bench.refuse(bench.words("inspect"))
    circle = function_model("b = own.f1 (a)", "b = own.f2 (a)", "b = own.f0 (a)")
    bench.model.write_bytes(circle.SerializeToString())
    assert "call themselves: f" in bench.refuse(bench.words("inspect"))


def test_functions_that_multiply(bench: Bench) -> None:
    """Each calls the next one twice: 41 short functions would become 2^40 operators."""
    bodies = [f"c = own.f{i} (a)  b = own.f{i} (c)" for i in range(1, 41)]
    bench.model.write_bytes(function_model(*bodies, "b = Relu (a)").SerializeToString())
    message = bench.refuse(bench.words("inspect"))
    assert "calls function 'f" in message
    assert "inline the functions first" in message
    bench.model.write_bytes(function_model(*bodies[:5], "b = Relu (a)").SerializeToString())
    code, out, _ = bench.run(*bench.words("inspect"), "--json")
    assert code == 0
    assert len(json.loads(out)["not_layers"]) == 32


def test_constants_that_grow(bench: Bench) -> None:
    """40 expressions of 40 MB each, of one constant of 400 kB; they are not worked out."""
    sums = "\n".join(
        f"o{i} = Concat <axis = 0> ({', '.join(['c'] * 100)})  s{i} = Neg (o{i})" for i in range(40)
    )
    uses = "\n".join(f"m{i} = ReduceMax <keepdims = 0> (s{i})" for i in range(40))
    model = text_model(
        f"g (float[n, 4] x) => (float[n, 4] y) {{ {sums}\n{uses}\n"
        f"t = Sum ({', '.join(f'm{i}' for i in range(40))})  y = Add (x, t) }}",
        c=np.zeros(100_000, np.float32),
    )
    bench.model.write_bytes(model.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert bench.run(*bench.words("inspect"))[0] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800 << 10  # KiB


def test_very_long_vectors(bench: Bench) -> None:
    """onnx's data propagation would write down every element: 75 bytes each, 160 terabytes."""
    model = text_model(
        f"g (float[{2**41}] v, float[n, 4] x) => (float[n, 4] y) {{ a = Add (v, v) "
        " b = Cast <to = 7> (a)  c = Concat <axis = 0> (b, b)  s = Size (c)  t = Cast <to = 1> (s) "
        " m = MatMul (x, w)  y = Add (m, t) }",
        w=np.eye(4, dtype=np.float32),
    )
    bench.model.write_bytes(model.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert bench.run(*bench.words("inspect"))[0] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("opset", [9, 21])
@pytest.mark.parametrize(
    "node", ["Expand (x, s)", "Reshape (x, s)", "ConstantOfShape (s)", "Tile (x, s)"]
)
def test_shapes_of_very_many_axes(bench: Bench, node: str, opset: int) -> None:
    model = text_model(
        f"g (float[n, 4] x, int64[{2**31}] s) => (float[n, 4] y) {{ y = {node} }}", opset
    )
    bench.model.write_bytes(model.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = bench.refuse(bench.words("inspect"))
    assert "input 's' of" in message
    assert f"has {2**31} entries" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("groups", [0, -1, 3])
def test_groups_that_do_not_divide_the_channels(bench: Bench, groups: int) -> None:
    model = small_model()
    model.graph.node[0].attribute.append(helper.make_attribute("group", groups))
    onnx.save(model, bench.model)
    message = bench.refuse(bench.words("inspect"))
    assert f"{groups} groups do not fit" in message
    assert "Conv 'conv1'" in message


@pytest.mark.parametrize(
    "name, shape",
    [("w1", (4, 2)), ("w1", (4,)), ("w1", (4, 3, 3, 3)), ("b1", (3,)), ("b1", (1, 4))],
)
def test_weights_that_do_not_fit_their_convolution(
    bench: Bench, name: str, shape: tuple[int, ...]
) -> None:
    model = small_model()
    set_weight(model, name, np.ones(shape, np.float32))
    onnx.save(model, bench.model)
    for command in ("inspect", "quantize"):
        assert "conv1" in bench.refuse(bench.words(command))


def test_batch_of_zero(bench: Bench) -> None:
    onnx.save(small_model(batch=0), bench.model)
    bench.refuse(bench.words("quantize"))
    np.savez(bench.data, x=np.zeros((0, 2, 6, 6), np.float32))
    bench.refuse(bench.words("quantize"))


def test_scalar_inputs_sample_by_sample(bench: Bench) -> None:
    """Each entry of an array is then a NumPy number, which onnxruntime does not take."""
    model = text_model(
        "g (float[4] x, float s, bool f) => (float[4] y) { a = Mul (x, s)  m = MatMul (a, w) "
        " y = Where (f, m, a) }",
        w=np.eye(4, dtype=np.float32),
    )
    bench.model.write_bytes(model.SerializeToString())
    flags = np.array([True, False, True])
    np.savez(bench.data, x=np.ones((3, 4), np.float32), s=np.ones(3, np.float32), f=flags)
    assert bench.run(*bench.words("quantize"))[0] == 0


def rewire(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def repeat_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(model.graph.node[0])


def repeat_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def claim_size(sizes: list[int]) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = sizes

    return change


def drop(field: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.ClearField(field)


def call_unknown(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Frobnicate"


def no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.node[1].output[:]
    model.graph.node[1].domain = "com.microsoft"


def broken_text(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[0].type = onnx.AttributeProto.STRING
    model.graph.node[0].attribute[0].s = b"\xff\xfe"


@pytest.mark.parametrize(
    "change",
    [
        rewire,
        repeat_node,
        repeat_weight,
        claim_size([4, 2, 3, 4]),
        claim_size([-4, 2, 3, 3]),
        claim_size([2**62, 2, 3, 3]),
        claim_size([2**32, 2**32]),
        claim_size([]),
        drop("node"),
        drop("initializer"),
        drop("input"),
        drop("name"),
        call_unknown,
        no_outputs,
        broken_text,
    ],
    ids=[
        "cycle",
        "node twice",
        "weight twice",
        "size beyond the data",
        "negative size",
        "size of exabytes",
        "size beyond 64 bits",
        "no size",
        "no nodes",
        "no weights",
        "no inputs",
        "no name",
        "unknown operator",
        "operator without outputs",
        "text that is none",
    ],
)
def test_malformed_models(bench: Bench, change: Callable[[onnx.ModelProto], None]) -> None:
    model = small_model()
    change(model)
    bench.model.write_bytes(model.SerializeToString())
    assert str(bench.model) in bench.refuse(bench.words("quantize"))


def test_odd_names_do_not_break_the_message(bench: Bench) -> None:
    model = small_model()
    set_weight(model, "w2", np.full((4, 3), np.nan, np.float32))
    odd = "a\nb\x1b[31m[red]\x00é"
    weight(model, "w2").name = model.graph.node[-1].input[1] = odd
    model.graph.node[-1].name = odd
    bench.model.write_bytes(model.SerializeToString())
    message = bench.refuse(bench.words("inspect"))
    assert "\x1b" not in message
    assert "\x00" not in message


def test_libraries_do_not_talk_in_between(bench: Bench) -> None:
    """onnx-ir logs what it drops; on the command line that would look like an error."""
    model = small_model()
    model.ir_version = 10
    model.configuration.add(name="device", num_devices=1)
    bench.model.write_bytes(model.SerializeToString())
    done = subprocess.run(
        [sys.executable, "-m", "bitwright", *bench.words("inspect")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_output_that_exists(bench: Bench, command: str) -> None:
    output = bench.folder / "existing"
    output.write_text("precious")
    message = bench.refuse(bench.words(command, output=output))
    assert f"{output}: exists already" in message
    assert "--overwrite" in message
    assert bench.run(*bench.words(command, output=output, overwrite=True))[0] == 0
    assert output.read_bytes() != b"precious"
    assert sorted(path.name for path in bench.folder.iterdir()) == [
        "data.npz",
        "existing",
        "model.onnx",
    ]


@pytest.mark.parametrize("command", ["plan", "quantize"])
@pytest.mark.parametrize("overwrite", [None, True])
def test_output_that_cannot_be(bench: Bench, command: str, overwrite: bool | None) -> None:
    def refuse(output: Path) -> str:
        return bench.refuse(bench.words(command, output=output, overwrite=overwrite))

    missing = bench.folder / "missing" / "out"
    assert f"the folder {str(missing.parent)!r} does not exist" in refuse(missing)
    assert "is a folder" in refuse(bench.folder)
    assert str(bench.data / "out") in refuse(bench.data / "out")
    assert "cannot be written (File name too long)" in refuse(bench.folder / ("x" * 300))
    if overwrite:  # it would take the place of the device
        assert "is not a regular file" in refuse(Path(os.devnull))
        assert Path(os.devnull).is_char_device()


def test_output_with_the_longest_name_there_is(bench: Bench) -> None:
    output = bench.folder / ("x" * 255)
    assert bench.run(*bench.words("quantize", output=output))[0] == 0
    assert output.exists()


@pytest.mark.parametrize("command", ["plan", "quantize", "choose-forms"])
def test_output_that_is_the_model(bench: Bench, command: str) -> None:
    message = bench.refuse(bench.words(command, output=bench.model, overwrite=True))
    assert "is the float model itself" in message


def test_bad_output_is_refused_before_the_work(bench: Bench) -> None:
    bench.output.write_text("precious")
    bench.model.write_text("not even a model")
    assert "exists already" in bench.refuse(bench.words("quantize"))


def drop_privileges() -> None:
    """Make file permissions count even for root, in the child process that calls this."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; other users have none to drop


def refused_without_privileges(words: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bitwright", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=drop_privileges,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_output_folder_that_is_read_only(bench: Bench, command: str) -> None:
    folder = bench.folder / "sealed"
    folder.mkdir()
    folder.chmod(0o555)
    try:
        words = bench.words(command, output=folder / "out")
        message = checked(refused_without_privileges(words, bench.folder))
        assert f"the folder {str(folder)!r} is read-only" in message
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwritten"])
def test_full_disk(bench: Bench, existing: bool) -> None:
    """A file may not grow beyond 20 kB: write() fails in the midst, as on a full disk."""
    if existing:
        bench.output.write_text("precious")
    before = bench.state()
    options = {"calibration": LENET / "calibration.npz", "overwrite": existing or None}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bitwright",
            *bench.words("quantize", LENET / "lenet.onnx", **options),
        ],
        cwd=bench.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2, done.stderr
    message = checked(done.stderr)
    assert f"{bench.output}: cannot be written (File too large)" in message
    assert "nothing was left behind" in message
    assert bench.state() == before


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_full_standard_output(bench: Bench, options: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bitwright", *bench.words("inspect"), *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert "standard output: cannot be written (No space left on device)" in checked(done.stderr)


def test_reader_of_the_output_that_goes_away(bench: Bench) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "bitwright", *bench.words("inspect")],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


# -- artefacts -----------------------------------------------------------------------------------


@pytest.fixture
def artifact(bench: Bench) -> Path:
    assert bench.run(*bench.words("compile"))[0] == 0
    return bench.folder / "artifact"


def run_words(artifact: Path, data: Path) -> list[str]:
    return ["run", str(artifact), "--data", str(data)]


def test_the_artifact_itself_works(bench: Bench, artifact: Path) -> None:
    code, out, err = bench.run(*run_words(artifact, bench.data))
    assert (code, err) == (0, "")
    assert "artefact" in out


def test_plan_that_the_target_cannot_do(bench: Bench) -> None:
    message = bench.refuse(bench.words("compile", target="silago/drra", precision="w4a8"))
    assert "precision w4a8: silago/drra cannot do the precision w4a8" in message
    assert "it allows w4a4, w8a8, w16a16" in message


def test_target_that_does_not_exist(bench: Bench) -> None:
    message = bench.refuse(bench.words("compile", target="bitfusion"))
    assert "choose one of bitfusion/eyeriss, bitfusion/mohaq, bitfusion/stripes" in message
    missing = bench.folder / "missing.yaml"
    assert "there is no such file" in bench.refuse(bench.words("compile", target=missing))


def test_passes_that_do_not_exist(bench: Bench) -> None:
    assert "'frob'" in bench.refuse(bench.words("compile", passes="frob"))
    assert "'frob'" in bench.refuse(bench.words("compile", passes="pack-weights=frob:1"))


def test_operators_that_cannot_be_compiled(bench: Bench) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    model = text_model(
        """
        g (float[2, 4, 4] x) => (float[2] y, float[2, 4, 5] m, float[2] z) {
            [one] y = Det (x)
            [two] m = MatMul (x, w)
            [three] z = Det (x)
        }
        """,
        w=weights,
    )
    onnx.save(model, bench.model)
    np.savez(bench.data, x=np.ones((3, 2, 4, 4), np.float32))
    message = bench.refuse(bench.words("compile"))
    assert "cannot be compiled: Det 'one', Det 'three'" in message


@pytest.mark.parametrize("kind", ["file", "folder", "artifact", "link"])
def test_output_folder_that_exists(bench: Bench, kind: str) -> None:
    path = bench.folder / "artifact"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
        (path / "precious").touch()
    elif kind == "link":
        path.symlink_to(bench.folder)
    else:
        assert bench.run(*bench.words("compile"))[0] == 0
    assert "exists already" in bench.refuse(bench.words("compile"))
    if kind != "artifact":
        assert "is no artefact" in bench.refuse(bench.words("compile", overwrite=True))


def test_missing_compiler(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(bench.folder))
    assert "there is no C++ compiler" in bench.refuse(bench.words("compile"))


def test_compiler_that_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = bench.folder / "compiler"
    compiler.write_text("#!/bin/sh\necho 'ld: no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    before = bench.state()
    code, out, err = bench.run(*bench.words("compile"))
    assert (code, out) == (1, "")
    assert "the C++ compiler cannot link the library (ld: no space left)" in checked(err)
    log = bench.folder / "artifact.bitwright-error.log"
    assert str(log) in err
    assert "Traceback" in log.read_text()
    log.unlink()
    assert bench.state() == before


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.params", "model.so", "plan.json", "model.qdq.onnx"])
def test_damaged_artifact(bench: Bench, artifact: Path, name: str) -> None:
    damaged(artifact / name)
    message = bench.refuse(run_words(artifact, bench.data))
    assert f"{artifact / name}: is damaged: its checksum is wrong" in message


@pytest.mark.parametrize("command", ["run", "passes"])
def test_artifact_of_a_newer_schema(bench: Bench, artifact: Path, command: str) -> None:
    path = artifact / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    words = run_words(artifact, bench.data) if command == "run" else ["passes", str(artifact)]
    message = bench.refuse(words)
    assert f"{path}: schema_version is 2" in message
    assert "reads schema version 1" in message


@pytest.mark.parametrize("command", ["run", "passes"])
def test_no_artifact(bench: Bench, command: str) -> None:
    options = ["--data", str(bench.data)] if command == "run" else []
    assert "there is no such folder" in bench.refuse([command, str(bench.output), *options])
    assert "is no artefact" in bench.refuse([command, str(bench.folder), *options])
    assert "there is no such folder" in bench.refuse([command, str(bench.model), *options])


@pytest.mark.parametrize(
    "arrays, expected",
    [
        ({"x": small_samples()[:, 0]}, "does not fit model input 'x'"),
        ({"x": small_samples()[:, :, :5]}, "does not fit model input 'x'"),
        ({"x": small_samples().astype(np.complex64)}, "not numbers"),
        ({"a": small_samples(), "b": small_samples()}, "no array for model input 'x'"),
        ({"x": small_samples()[:0]}, "no samples"),
        ({"x": np.full((6, 2, 6, 6), np.nan, np.float32)}, "sample 0 holds NaN"),
    ],
    ids=["rank", "size", "type", "name", "empty", "nan"],
)
def test_data_that_do_not_fit_the_artifact(
    bench: Bench, artifact: Path, arrays: dict[str, Array], expected: str
) -> None:
    labels = {"labels": np.zeros(len(next(iter(arrays.values()))), np.int64)}
    np.savez(bench.data, **arrays, **labels)  # type: ignore[arg-type]  # mypy: the options of savez
    assert expected in bench.refuse(run_words(artifact, bench.data))


def test_full_disk_while_compiling(bench: Bench) -> None:
    before = bench.state()
    done = subprocess.run(
        [sys.executable, "-m", "bitwright", *bench.words("compile")],
        cwd=bench.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    # LLVM ends the process itself, with a message of its own.
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert bench.state() == before


def test_full_disk_while_an_artifact_is_written(bench: Bench) -> None:
    """The library is linked; its copy does not fit any more."""
    code = f"""
import resource, shutil
import bitwright.artifact
from bitwright.cli import main
copy = shutil.copy
def full(*paths):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return copy(*paths)
shutil.copy = full
raise SystemExit(main({bench.words("compile")!r}))
"""
    before = bench.state()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "cannot be written (File too large)" in checked(done.stderr)
    assert bench.state() == before


@pytest.mark.parametrize("module", ["tvm", "pydantic"])
def test_interrupted_while_a_compiler_is_loaded(bench: Bench, module: str) -> None:
    before = bench.state()
    code = INTERRUPT_AT_IMPORT.format(module=module, words=bench.words("compile"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert checked(done.stderr).startswith("error: interrupted\n")
    assert bench.state() == before


# -- Ctrl-C --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than can be calibrated before somebody presses Ctrl-C."""
    path = tmp_path_factory.mktemp("many") / "images.npz"
    images = np.zeros((150_000, 1, 28, 28), np.uint8)
    images[:, :, 5:9] = 1
    np.savez_compressed(path, image=images)
    return path


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwritten"])
def test_interrupted_calibration(bench: Bench, many_images: Path, existing: bool) -> None:
    if existing:
        bench.output.write_text("precious")
    before = bench.state()
    options = {"calibration": many_images, "overwrite": existing or None, "batch_size": 16}
    words = bench.words("quantize", LENET / "lenet.onnx", **options)
    # With this the progress bar is drawn into a pipe too, and tells how far the work is.
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-m", "bitwright", *words],
        cwd=bench.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        shown = b""
        while not re.search(rb"[1-9]\d*/150000", shown):
            piece = os.read(process.stderr.fileno(), 4096)
            assert piece, f"ended before it could be interrupted: {shown!r}"
            shown += piece
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == b""
    message = rest.decode()[rest.decode().index("error: ") :]
    assert message == "error: interrupted\n  nothing half-written was left behind\n"
    assert "Traceback" not in rest.decode()
    assert bench.state() == before


INTERRUPT_AT_IMPORT = """
import importlib.abc, os, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends
        return None

sys.meta_path.insert(0, Interrupt())
from bitwright.cli import main
sys.exit(main({words!r}))
"""


@pytest.mark.parametrize("module", ["typer", "numpy", "onnx", "onnx_ir", "onnxruntime"])
def test_interrupted_while_libraries_are_loaded(bench: Bench, module: str) -> None:
    before = bench.state()
    code = INTERRUPT_AT_IMPORT.format(module=module, words=bench.words("quantize"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert checked(done.stderr).startswith("error: interrupted\n")
    assert done.stdout == ""
    assert bench.state() == before


# -- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected, fix",
    [
        (
            {"window": 25},
            "layer 'conv1': a window of 25 terms is larger than the 18",
            "--window 18",
        ),
        ({"window": 1}, "a window of 1 terms cannot be ordered", "take 2 to 256"),
        ({"flit_bits": 100}, "no whole number of lanes", "take a multiple of 16"),
        ({"order": "popcount=map:0.1.2.1.2.3.3.3.3"}, "falls, from 2 at key 2 to 1", "monotone"),
        ({"order": "popcount=map:0.0.1.1"}, "8-bit words have the keys 0 to 8", "give 9 entries"),
        (
            {"order": "popcount=map:0.0.0.1.1.2.2.3.3", "link": "silago/drra"},
            "16-bit words have the keys 0 to 16",
            "give 17 entries",
        ),
        ({"order": "shuffle"}, "there is no key 'shuffle'", "popcount"),
        ({"link": "ordering"}, "there is no link 'ordering'", "ordering-simulator"),
        ({"target": "bitfusion/mohaq", "order": "popcount"}, "sent once for every", "on:inputs"),
        ({"calibration": None}, "no samples to quantize it with", "--calibration"),
        ({"plot": "link.png"}, "the charts are a page", "name it .html"),
    ],
)
def test_links(bench: Bench, options: dict[str, Any], expected: str, fix: str) -> None:
    message = bench.refuse(bench.words("link", **options))
    assert expected in message
    assert fix in message


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"window": 1}, "2 to 256 terms, not 1"),
        ({"buckets": 1}, "by 1 buckets does nothing"),
        ({"buckets": 10}, "10 buckets are more than the 9 keys"),
        ({"word_bits": 17}, "words have 1 to 16 bits, not 17"),
        ({"map": "0.1.2.1.2.3.3.3.3"}, "falls, from 2 at key 2 to 1"),
        ({"map": "0.0.0.2.2.3.3.3.3"}, "leaves a bucket out"),
        ({"map": "0.0.0.1.1.2.2.3.3", "word_bits": 16}, "16-bit words have the keys 0 to 16"),
        ({"map": "steps"}, "no bucket map 'steps'"),
        ({"map": "quantile", "buckets": 4}, "depends on data"),
        ({"key": "gray-rank"}, "2 to 64 buckets, not 256"),
        ({"name": "9"}, "no name of a Verilog module"),
        ({"output": "missing/psu.v"}, "does not exist"),
    ],
)
def test_sorting_units(bench: Bench, options: dict[str, Any], expected: str) -> None:
    given = {"window": 25, "output": bench.folder / "psu.v", **options}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert expected in bench.refuse(
        ["sorting-unit", *(word.replace("word_bits", "word-bits") for word in words)]
    )


def test_a_sorting_unit_that_exists(bench: Bench) -> None:
    output = bench.folder / "psu.v"
    output.write_text("mine")
    words = ["sorting-unit", "--window", "4", "--word-bits", "2", "--output", str(output)]
    assert "exists already" in bench.refuse(words)
    code, _, _ = bench.run(*words, "--overwrite")
    assert code == 0
    assert output.read_text().startswith("// sorting_unit")
