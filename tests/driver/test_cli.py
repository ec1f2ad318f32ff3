from __future__ import annotations

import inspect
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import bitwright
from bitwright.cli import app, main
from bitwright.errors import ModelError

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
MODEL, CALIBRATION, TEST = (LENET / name for name in ("lenet.onnx", "calibration.npz", "test.npz"))

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "inspect": bitwright.inspect,
    "plan": bitwright.make_plan,
    "quantize": bitwright.quantize,
    "choose-forms": bitwright.choose_forms,
    "evaluate": bitwright.evaluate,
    "compare": bitwright.compare,
    "compile": bitwright.compile,
    "run": bitwright.run,
    "passes": bitwright.describe_passes,
    "cost": bitwright.cost,
    "link": bitwright.link,
    "front": bitwright.front,
    "report": bitwright.report,
    "search": bitwright.search_precisions,
    "sensitivity": bitwright.sensitivity,
    "sorting-unit": bitwright.sorting_unit,
    "targets": bitwright.describe_targets,
    "targets show": bitwright.describe_target,
}
Words: TypeAlias = list[str | Path]

# Repeated options of the command line are one mapping of the function.
NAMES = {
    "constraint": "constraints",
    "input_shape": "input_shapes",
    "layer": "layers",
    "order": "orders",
}

# Parameters that are no option of the same name.
SHOWN = {
    "model": "MODEL",
    "artifact": "DIR",
    "as_json": "--json",
    "float_model": "--float",
    "map_": "--map",
    "study": "DIR",
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 of LeNet's images with labels."""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(TEST) as archive:
        np.savez(path, **{name: archive[name][:64] for name in archive})
    return path


@pytest.fixture(scope="module")
def quantized(few: Path) -> Path:
    path = few.with_name("lenet.w4a8.onnx")
    bitwright.quantize(MODEL, calibration=few, precision="w4a8", output=path)
    return path


@pytest.fixture(scope="module")
def compiled(few: Path) -> Path:
    path = few.with_name("lenet.w4a8")
    bitwright.compile(MODEL, "bitfusion/eyeriss", calibration=few, precision="w4a8", output=path)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Standard output of a command that succeeds."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.err == ""
    return captured.out


def program(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bitwright", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


# -- commands and functions ----------------------------------------------------------------------


def commands() -> Iterator[tuple[str, Callable[..., Any] | None]]:
    """Words and function of every command; a group is a command too."""
    for entry in app.registered_commands:
        yield str(entry.name), entry.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        assert group.typer_instance.registered_callback is not None
        yield str(group.name), group.typer_instance.registered_callback.callback
        for entry in group.typer_instance.registered_commands:
            callback = entry.callback
            assert callback is not None
            yield f"{group.name} {entry.name or callback.__name__}", callback


def command(name: str) -> Callable[..., Any]:
    """The function behind a command."""
    found = [callback for words, callback in commands() if words == name]
    assert len(found) == 1
    assert found[0] is not None
    return found[0]


def test_every_command_is_a_public_function() -> None:
    assert {name for name, _ in commands()} == set(FUNCTIONS)
    assert all(function.__name__ in bitwright.__all__ for function in FUNCTIONS.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_and_defaults_are_those_of_the_function(name: str) -> None:
    options = dict(inspect.signature(command(name)).parameters)
    parameters = dict(inspect.signature(FUNCTIONS[name]).parameters)
    options.pop("as_json", None)  # how to print
    options.pop("context", None)  # typer's
    options.pop("quiet", None)
    parameters.pop("progress", None)  # the progress bar
    assert {NAMES.get(option, option) for option in options} == set(parameters)
    for option, described in options.items():
        default = parameters[NAMES.get(option, option)].default
        if option == "output" and name == "quantize":  # else the program would do nothing
            assert described.default is inspect.Parameter.empty
            assert default is None
        else:
            assert described.default == default, option


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_of_the_function_is_described(name: str) -> None:
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    described = text.partition("Parameters")[2].partition("Returns")[0]
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        assert re.search(rf"^(\w+, )*{parameter}(, \w+)*$", described, re.MULTILINE), parameter


# -- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_the_commands(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    out = run(capsys, *words)
    for name in (name for name in FUNCTIONS if " " not in name):
        summary = (inspect.getdoc(command(name)) or "").splitlines()[0]
        assert re.search(rf"\b{name}\b", out)
        assert summary[:30] in out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert all(name.split()[0] in captured.out + captured.err for name in FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_of_a_command_names_its_options(
    capsys: pytest.CaptureFixture[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = run(capsys, *name.split(), "--help")
    for option in inspect.signature(command(name)).parameters:
        if option == "context":  # typer's
            continue
        shown = SHOWN.get(option, f"--{option.replace('_', '-')}")
        if (name, option) == ("targets show", "target"):
            shown = "TAG"
        assert shown in out, option


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == f"bitwright {version('bitwright')}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate"]) == 2
    assert "frobnicate" in capsys.readouterr().err


# -- results -------------------------------------------------------------------------------------


def strict(text: str) -> Any:
    """JSON as every program reads it: without NaN and infinities."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def as_json(document: Any) -> Any:
    """What a document is after a way through JSON; infinities are texts there."""
    if isinstance(document, dict):
        return {key: as_json(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [as_json(value) for value in document]
    if isinstance(document, float) and abs(document) == float("inf"):
        return str(document)
    return document


def test_json_of_inspect(capsys: pytest.CaptureFixture[str], quantized: Path) -> None:
    for path in (MODEL, quantized):
        printed = strict(run(capsys, "inspect", path, "--json"))
        assert printed == as_json(bitwright.inspect(path).to_dict())
    shaped = strict(run(capsys, "inspect", MODEL, "--json", "--input-shape", "image=5,1,28,28"))
    assert shaped == as_json(
        bitwright.inspect(MODEL, input_shapes={"image": [5, 1, 28, 28]}).to_dict()
    )
    assert shaped["macs"] == 5 * strict(run(capsys, "inspect", MODEL, "--json"))["macs"]


def test_json_of_quantize(capsys: pytest.CaptureFixture[str], few: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.onnx"
    words: Words = [
        "--calibration",
        few,
        "--precision",
        "w2a8",
        "--clip",
        "minmax",
        "--asymmetric",
    ]
    words += ["--no-per-channel", "--elementwise-bits", "8", "--batch-size", "7"]
    printed = strict(run(capsys, "quantize", MODEL, *words, "-o", output, "--json"))
    result = bitwright.quantize(
        MODEL,
        calibration=few,
        precision="w2a8",
        clip="minmax",
        asymmetric=True,
        per_channel=False,
        elementwise_bits=8,
        batch_size=7,
    )
    assert printed == as_json(result.to_dict())
    assert output.read_bytes() == result.model.SerializeToString()


@pytest.mark.parametrize("engine", ["onnxruntime", "reference"])
@pytest.mark.parametrize("metric", ["top1", "top5", "mse", "sqnr"])
def test_json_of_evaluate(
    capsys: pytest.CaptureFixture[str], few: Path, quantized: Path, metric: str, engine: str
) -> None:
    words: Words = [
        "--data",
        few,
        "--metric",
        metric,
        "--engine",
        engine,
        "--against",
        MODEL,
    ]
    words += ["--requantization", "fixed", "--batch-size", "10", "--json"]
    printed = strict(run(capsys, "evaluate", quantized, *words))
    result = bitwright.evaluate(
        quantized,
        few,
        metric=metric,
        engine="reference" if engine == "reference" else "onnxruntime",
        against=MODEL,
        requantization="fixed",
        batch_size=10,
    ).to_dict()
    assert printed.pop("seconds") > 0
    assert result.pop("seconds") > 0
    assert printed == as_json(result)


def test_json_of_compare(capsys: pytest.CaptureFixture[str], few: Path, quantized: Path) -> None:
    printed = strict(run(capsys, "compare", quantized, "--data", few, "--json"))
    assert printed == as_json(bitwright.compare(quantized, few).to_dict())
    assert printed["regions"]


def test_json_of_link(capsys: pytest.CaptureFixture[str], few: Path, tmp_path: Path) -> None:
    data = tmp_path / "two.npz"
    with np.load(few) as archive:
        np.savez(data, image=archive["image"][:2])
    words: Words = ["--precision", "w8a8", "--calibration", few, "--clip", "minmax"]
    words += ["--no-per-channel", "--order", "popcount=buckets:4", "--order", "gray-rank"]
    words += ["--window", "20", "--flit-bits", "64", "--plot", tmp_path / "page.html"]
    printed = strict(run(capsys, "link", MODEL, "--data", data, *words, "--json"))
    result = bitwright.link(
        MODEL,
        data,
        precision="w8a8",
        calibration=few,
        clip="minmax",
        per_channel=False,
        orders=["popcount=buckets:4", "gray-rank"],
        window=20,
        flit_bits=64,
    )
    assert printed == as_json(result.to_dict())
    assert (tmp_path / "page.html").exists()
    assert (result.link.window.value, result.link.lanes.value) == (20, 4)


def test_json_of_compile(capsys: pytest.CaptureFixture[str], few: Path, tmp_path: Path) -> None:
    words: Words = ["--target", "silago/drra", "--precision", "w8a8", "--calibration", few]
    words += ["--clip", "minmax", "--asymmetric", "--no-per-channel", "--elementwise-bits", "8"]
    words += ["--batch-size", "7", "--no-keep-qdq", "--passes", "pack-weights=isa:generic"]
    words += ["--dump-ir", tmp_path / "ir"]
    printed = strict(run(capsys, "compile", MODEL, *words, "-o", tmp_path / "a", "--json"))
    assert printed == json.loads((tmp_path / "a" / "manifest.json").read_text())
    bitwright.compile(
        MODEL,
        "silago/drra",
        precision="w8a8",
        calibration=few,
        clip="minmax",
        asymmetric=True,
        per_channel=False,
        elementwise_bits=8,
        batch_size=7,
        keep_qdq=False,
        passes="pack-weights=isa:generic",
        output=tmp_path / "b",
    )
    other = json.loads((tmp_path / "b" / "manifest.json").read_text())
    del printed["files"]["model.so"], other["files"]["model.so"]  # names of temporary files
    assert printed == other
    assert len(list((tmp_path / "ir").iterdir())) >= len(printed["passes"])


def test_json_of_run(capsys: pytest.CaptureFixture[str], few: Path, compiled: Path) -> None:
    words: Words = ["--data", few, "--metric", "sqnr", "--batch-size", "10", "--threads", "1"]
    printed = strict(run(capsys, "run", compiled, *words, "--float", MODEL, "--json"))
    result = bitwright.run(
        compiled, few, metric="sqnr", batch_size=10, threads=1, float_model=MODEL
    ).to_dict()
    for entry in (*printed["forms"], *result["forms"]):
        assert entry.pop("seconds") > 0
    assert printed == as_json(result)
    assert [entry["form"] for entry in printed["forms"]] == [
        "float",
        "qdq",
        "reference",
        "artifact",
    ]


def test_json_of_passes(capsys: pytest.CaptureFixture[str], compiled: Path) -> None:
    printed = strict(run(capsys, "passes", compiled, "--json"))
    assert printed == as_json(bitwright.describe_passes(compiled).to_dict())
    assert [layer["name"] for layer in printed["layers"]] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert strict(run(capsys, "passes", "--json"))["applied"] == []


def test_json_of_targets(capsys: pytest.CaptureFixture[str]) -> None:
    printed = strict(run(capsys, "targets", "--json"))
    assert [entry["name"] for entry in printed] == list(bitwright.describe_targets().accelerators)


def test_text_of_passes_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "passes")
    assert all(entry.name in out for entry in bitwright.describe_passes().available)
    out = run(capsys, "targets")
    assert "bitfusion/eyeriss" in out
    assert "w4a4, w8a8, w16a16" in out


def test_sorting_unit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words: Words = ["--window", "5", "--word-bits", "4", "--key", "gray-rank", "--buckets", "4"]
    words += ["--direction", "ascending", "--starts", "counted", "--name", "psu"]
    out = run(capsys, "sorting-unit", *words, "-o", tmp_path / "a.v")
    what = "5 words of 4 bits by gray-rank, 4 buckets, ascending"
    assert out == f"{tmp_path / 'a.v'}: module psu, {what}\n"
    unit = bitwright.sorting_unit(
        5,
        word_bits=4,
        key="gray-rank",
        map_=".".join(str(rank // 4) for rank in range(16)),
        direction="ascending",
        starts="counted",
        name="psu",
        output=tmp_path / "b.v",
    )
    assert (tmp_path / "a.v").read_text() == (tmp_path / "b.v").read_text() == unit.verilog("psu")


def test_infinities_are_texts_in_json(capsys: pytest.CaptureFixture[str], few: Path) -> None:
    words: Words = ["--data", few, "--metric", "sqnr", "--against", MODEL, "--json"]
    assert strict(run(capsys, "evaluate", MODEL, *words))["value"] == "inf"


def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    words: Words = [
        "--precision",
        "w4a8",
        "--layer",
        "conv1=w8a8",
        "--layer",
        "fc3=w16a16",
    ]
    out = run(capsys, "plan", MODEL, *words, "--elementwise-bits", "8", "-o", output)
    assert out == f"{output}: 5 layers\n"
    plan = bitwright.PrecisionPlan.from_json(output.read_text())
    layers = {"conv1": "w8a8", "fc3": "w16a16"}
    assert plan == bitwright.make_plan(MODEL, precision="w4a8", layers=layers, elementwise_bits=8)
    assert [str(precision) for precision in plan.layers.values()] == [
        "w8a8",
        "w4a8",
        "w4a8",
        "w4a8",
        "w16a16",
    ]


def test_layer_names_may_hold_the_sign_that_ends_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(MODEL)
    for node in model.graph.node:
        if node.name == "conv1":
            node.name = "a=b"
    onnx.save(model, tmp_path / "m.onnx")
    output = tmp_path / "plan.json"
    run(capsys, "plan", tmp_path / "m.onnx", "--layer", "a=b=w2a4", "-o", output)
    assert json.loads(output.read_text())["layers"]["a=b"] == "w2a4"


def test_text_of_evaluate(capsys: pytest.CaptureFixture[str], few: Path) -> None:
    out = run(capsys, "evaluate", MODEL, "--data", few)
    value = bitwright.evaluate(MODEL, few).value
    assert re.fullmatch(
        rf"top1 {100 * value:.2f} %  \(64 samples, onnxruntime, \d+\.\d\d s\)\n", out
    )


def test_text_of_run(
    capsys: pytest.CaptureFixture[str], few: Path, compiled: Path, tmp_path: Path
) -> None:
    out = run(capsys, "run", compiled, "--data", few)
    forms = ("float ONNX", "QDQ ONNX, onnxruntime", "integer reference", "artefact")
    assert all(form in out for form in forms)
    assert "note:" not in out
    moved = shutil.copytree(compiled, tmp_path / "moved")
    (moved / "model.qdq.onnx").unlink()
    out = run(capsys, "run", moved, "--data", few)
    assert "keeps no quantized ONNX model" in out
    assert "QDQ ONNX" not in out


def test_tables_name_every_layer(
    capsys: pytest.CaptureFixture[str], few: Path, quantized: Path, compiled: Path, tmp_path: Path
) -> None:
    words: Words = [
        "--calibration",
        few,
        "--precision",
        "w4a8",
        "-o",
        tmp_path / "q.onnx",
    ]
    for out in (
        run(capsys, "inspect", MODEL),
        run(capsys, "inspect", quantized),
        run(capsys, "quantize", MODEL, *words),
        run(capsys, "compare", quantized, "--data", few),
        run(
            *(capsys, "compile", quantized, "--target", "bitfusion/eyeriss"),
            *("-o", tmp_path / "artifact"),
        ),
        run(capsys, "passes", compiled),
    ):
        assert all(layer in out for layer in ("conv1", "conv2", "fc1", "fc2"))


def test_markup_in_names_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(MODEL)
    for node in model.graph.node:
        if node.name == "conv1":
            node.name = "[red]x[/red]"
    onnx.save(model, tmp_path / "m.onnx")
    assert "[red]x[/red]" in run(capsys, "inspect", tmp_path / "m.onnx")


# -- the process ---------------------------------------------------------------------------------


def test_no_progress_bar_in_a_pipe(few: Path, quantized: Path) -> None:
    done = program("evaluate", quantized, "--data", few)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def test_progress_bar_on_a_terminal(quantized: Path) -> None:
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "bitwright", "evaluate", str(quantized), "--data", str(TEST)],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                piece = os.read(controller, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            shown += piece
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(controller)
    assert process.returncode == 0
    assert b"evaluating" in shown
    assert b"/2000" in shown
    assert out.startswith(b"top1 ")  # the result alone, for whoever reads it


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    missing = tmp_path / "missing.onnx"
    done = program("inspect", missing)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {missing}: there is no such file\n"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match="there is no such file"):
        main(["--debug", "inspect", missing])
    assert main(["inspect", missing]) == 2  # it holds for one call only
    done = program("--debug", "inspect", missing)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "ModelError" in done.stderr


def test_metric_that_fails(
    capsys: pytest.CaptureFixture[str],
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "failing_metrics.py").write_text(
        "class Update:\n"
        "    unit, higher_is_better, needs = '', True, 'labels'\n"
        "    def update(self, outputs, labels, expected): outputs['no such output']\n"
        "    def value(self): return 1.0\n"
        "class Value(Update):\n"
        "    def update(self, outputs, labels, expected): pass\n"
        "    def value(self): return 'seven'\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("Update", "Value"):
        metric = f"failing_metrics:{name}"
        assert main(["evaluate", str(MODEL), "--data", str(few), "--metric", metric]) == 1
        err = capsys.readouterr().err
        assert err.startswith(
            f"error: metric {metric} fails ({'Key' if name == 'Update' else 'Value'}Error"
        )
