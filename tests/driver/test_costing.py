from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import bitwright
from bitwright import Layer, Precision, PrecisionPlan, tables, targets
from bitwright.cli import main
from bitwright.errors import ModelError, OutputError, PlanError, RunError, UsageError
from tests.targets.descriptions import DROPPED, changed

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
MODEL = LENET / "lenet.onnx"
# LeNet-5 written down by hand: LeCun et al., 1998, with 5 x 5 kernels, the first one padded.
LAYERS = [
    Layer.conv(
        in_channels=1, out_channels=6, kernel=5, output=28, reads_graph_input=True, name="conv1"
    ),
    Layer.conv(in_channels=6, out_channels=16, kernel=5, output=10, name="conv2"),
    Layer.matmul(rows=1, in_features=400, out_features=120, name="fc1"),
    Layer.matmul(rows=1, in_features=120, out_features=84, name="fc2"),
    Layer.matmul(rows=1, in_features=84, out_features=10, name="fc3"),
]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(LENET / "calibration.npz") as archive:
        np.savez(path, image=archive["image"][:32])
    return path


@pytest.fixture(scope="module")
def quantized(few: Path) -> Path:
    path = few.with_name("lenet.onnx")
    bitwright.quantize(MODEL, calibration=few, precision="w4a8", output=path)
    return path


@pytest.mark.parametrize("target", sorted(set(targets.available()) - {"bitfusion/zigzag"}))
def test_costs_of_a_file_are_those_of_its_layers(target: str) -> None:
    found = bitwright.cost(MODEL, target, precision="w4a4")
    assert found.cost == targets.get(target).model_cost(LAYERS, Precision(4, 4))
    assert found.assumed == ("N = 1 (image)",)
    assert found.baseline is None


def test_a_plan_and_a_baseline(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    bitwright.make_plan(MODEL, precision="w2a8", layers={"conv1": "w8a8"}, output=plan)
    found = bitwright.cost(MODEL, "bitfusion/eyeriss", plan=plan, baseline="w16a16")
    eyeriss = targets.get("bitfusion/eyeriss")
    wide = eyeriss.model_cost(LAYERS, Precision(16, 16))
    assert found.baseline == wide
    assert [str(cost.precision) for cost in found.cost.layers] == ["w8a8", *["w2a8"] * 4]
    assert wide.cycles is not None
    assert found.cost.cycles is not None
    assert found.speedup == wide.cycles / found.cost.cycles
    assert found.where == str(plan)
    loaded = bitwright.cost(
        MODEL,
        "bitfusion/eyeriss",
        plan=PrecisionPlan.from_json(plan.read_text()),
        baseline=Precision(16, 16),
    )
    assert (loaded.cost, loaded.baseline) == (found.cost, found.baseline)


def test_batches() -> None:
    found = bitwright.cost(
        MODEL,
        "bitfusion/eyeriss",
        precision="w8a8",
        input_shapes={"image": [16, 1, 28, 28]},
    )
    assert [layer.batch for layer in found.layers] == [16] * 5
    assert found.assumed == ()
    single = bitwright.cost(MODEL, "bitfusion/eyeriss", precision="w8a8").cost
    assert found.cost.macs == 16 * single.macs
    assert (found.cost.cycles or 0) < 16 * (single.cycles or 0)  # weights are loaded once


def test_a_quantized_model_has_its_own_precisions(quantized: Path) -> None:
    found = bitwright.cost(quantized, "bitfusion/eyeriss")
    same = bitwright.cost(MODEL, "bitfusion/eyeriss", precision="w4a8")
    assert found.cost == same.cost
    with pytest.raises(UsageError, match="quantized already: its precisions are its own"):
        bitwright.cost(quantized, "bitfusion/eyeriss", precision="w4a8")
    with pytest.raises(PlanError, match="silago/drra cannot do the precision w4a8"):
        bitwright.cost(quantized, "silago/drra")


def test_json_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cost", str(MODEL), "--target", "silago/drra", "--precision", "w4a4", "--json"]
    assert main([*words, "--baseline", "w16a16"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = bitwright.cost(MODEL, "silago/drra", precision="w4a4", baseline="w16a16")
    assert printed == json.loads(json.dumps(found.to_dict()))
    assert printed["total"]["cycles"] is None
    assert printed["total"]["relative_cycles"] == 416_520 / 4
    assert printed["end_to_end_speedup"] == 4
    assert printed["capacity_bits"] == 6 * 2**23


def test_text_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cost", str(MODEL), "--target", "bitfusion/eyeriss", "--precision", "w8a8"]
    assert main([*words, "--baseline", "w16a16"]) == 0
    out = capsys.readouterr().out
    found = bitwright.cost(MODEL, "bitfusion/eyeriss", precision="w8a8")
    for cost in found.cost.layers:
        (line,) = (line for line in out.splitlines() if f"│ {cost.layer} " in line)
        assert f"{cost.cycles:,.0f}" in line
        assert cost.bound is not None
        assert cost.bound in line
    assert f"{found.cost.cycles:,.0f}" in out
    assert "against w16a16: " in out
    assert "x as fast end to end" in out
    assert f"{1e6 * (found.cost.seconds or 0):.2f} us at 500 MHz" in out
    assert main([*words[:3], "silago/drra", *words[4:]]) == 0
    out = capsys.readouterr().out
    assert "relative cycles" in out  # and nothing that could be taken for cycles
    assert " at " not in out


@pytest.mark.parametrize("columns", [40, 80, 100, 120, 160, 200])
def test_no_number_is_cut_where_the_terminal_is_narrow(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(
        tables,
        "new_console",
        lambda width=columns: Console(
            file=output, width=width, force_terminal=True, color_system=None, emoji=False
        ),
    )
    found = bitwright.cost(MODEL, "bitfusion/eyeriss", precision="w8a8", baseline="w16a16")
    tables.print_cost(found)
    lines = output.getvalue().splitlines()
    (line,) = [line for line in lines if "│" in line and "conv1" in line]
    assert f"{found.cost.layers[0].cycles:,}" in line
    assert "…" not in output.getvalue()
    assert all(len(line) <= columns for line in lines)


def test_columns_that_say_nothing_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_cost(bitwright.cost(MODEL, "silago/drra", precision="w8a8"))
    out = capsys.readouterr().out
    assert "DRAM" not in out
    assert "utilization" not in out


def test_work_that_is_not_counted_is_said(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="m"),
            helper.make_node("Relu", ["m"], ["r"]),  # a bound of the codes: no work
            helper.make_node("Add", ["r", "x"], ["a"]),
            helper.make_node("Sigmoid", ["a"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.ones((4, 4), np.float32), "w")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    found = bitwright.cost(path, "silago/drra", precision="w8a8")
    assert found.not_counted == {"Add": 1, "Sigmoid": 1}


# -- the plot ------------------------------------------------------------------------------------


def traces(page: str) -> list[dict[str, Any]]:
    """What a page draws, read from the call that draws it."""
    call = page[page.rindex("Plotly.newPlot(") :]
    data, _ = json.JSONDecoder().raw_decode(call[call.index("[") :])
    return list(data)


def numbers(values: Any) -> list[float]:
    """Numbers of a trace; plotly packs some as bytes."""
    if isinstance(values, dict):
        return list(np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]))
    return list(values)


def test_bars_are_the_costs(tmp_path: Path) -> None:
    path = tmp_path / "cost.html"
    found = bitwright.cost(
        MODEL, "bitfusion/eyeriss", precision="w4a4", baseline="w16a16", plot=path
    ).cost
    drawn = {trace["name"]: trace for trace in traces(path.read_text())}
    assert set(drawn) >= {"compute", "stalls", "core", "dram", "read", "written", "weights"}
    assert drawn["stalls"]["x"] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert "all w16a16" in drawn
    assert numbers(drawn["stalls"]["y"]) == [cost.stall_cycles for cost in found.layers]
    assert numbers(drawn["read"]["y"]) == [(c.dram_read_bits or 0) / 2**13 for c in found.layers]


def test_the_page_needs_no_network_and_sends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cost.html"
    bitwright.cost(MODEL, "silago/drra", precision="w4a4", plot=path)
    page = path.read_text()
    call = page[page.rindex("Plotly.newPlot(") :]
    assert '"showSendToCloud": false' in call
    assert not re.search(r"<(script|link|img)[^>]*\s(src|href)=", page)
    assert {trace["name"] for trace in traces(page)} == {
        *("multiply-accumulates", "memory", "mac", "weights"),
    }


def test_a_page_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cost.html"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        bitwright.cost(MODEL, "silago/drra", precision="w4a4", plot=path)
    assert path.read_text() == "mine"
    bitwright.cost(MODEL, "silago/drra", precision="w4a4", plot=path, overwrite=True)
    assert path.read_text() != "mine"


@pytest.mark.parametrize(
    "name",
    ["model:x:0", "[bold]a[/bold]", "層" * 30, "a" * 80, "<b>&\"'%{y}", "</script><script>x"],
)
def test_names_are_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = tmp_path / "model.onnx"
    weights = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name=name)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), model)
    path = tmp_path / "cost.html"
    tables.print_cost(bitwright.cost(model, "silago/drra", precision="w4a4", plot=path))
    out = capsys.readouterr().out
    assert (name if len(name) < 30 else f"{name[:8]}") in out
    page = path.read_text()
    assert "<script>x" not in page
    (drawn,) = [trace for trace in traces(page) if trace["name"] == "weights"]
    shown = html.unescape(drawn["x"][0]).replace("\u200b", "")
    assert shown == name
    assert "<b>" not in drawn["x"][0]
    assert "%{" not in drawn["x"][0]


# -- bad input -----------------------------------------------------------------------------------


def test_a_plan_beyond_the_memory_is_shown_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = {"value": 20_000, "source": "mohaq"}
    small = str(changed(tmp_path, "silago/drra", {"weight_memory_bytes": memory}))
    words = ["cost", str(MODEL), "--precision", "w8a8", "--target", small]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "weights 60.03 KiB of 19.53 KiB memory, 307.4 %" in captured.out
    assert "the weights take 61,470 bytes, and the memory of silago/drra holds 20,000 bytes" in (
        captured.err
    )
    assert "fc1 (w8a8, 48,000 bytes)" in captured.err
    with pytest.raises(PlanError, match="the weights take 61,470 bytes"):
        bitwright.compile(
            MODEL,
            small,
            precision="w8a8",
            calibration=LENET / "calibration.npz",
            output=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_a_kind_of_layer_that_the_target_cannot_do(tmp_path: Path) -> None:
    path = changed(tmp_path, "silago/drra", {"layer_kinds": ["matmul"]})
    message = r"silago/drra cannot compute 2 layers: conv1 \(conv\), conv2 \(conv\)"
    with pytest.raises(PlanError, match=message):
        bitwright.cost(MODEL, path, precision="w8a8")
    with pytest.raises(PlanError, match=message):
        bitwright.compile(
            MODEL,
            path,
            precision="w8a8",
            calibration=LENET / "calibration.npz",
            output=tmp_path / "out",
        )


def test_no_cost_model(tmp_path: Path, few: Path) -> None:
    path = changed(tmp_path, "silago/drra", {"cost": DROPPED})
    with pytest.raises(UsageError, match="silago/drra has no cost model"):
        bitwright.cost(MODEL, path, precision="w8a8")
    got = bitwright.compile(
        MODEL, path, precision="w8a8", calibration=few, output=tmp_path / "lenet"
    )
    assert got.cost is not None
    assert got.cost["total"] is None
    assert got.cost["reason"] == "silago/drra has no cost model"


def test_a_cost_model_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "failing_costs.py").write_text(
        "from bitwright.targets import CostModel\n"
        "class Failing(CostModel):\n"
        "    def layer_cost(self, layer, precision):\n"
        "        raise ZeroDivisionError('division by zero')\n"
    )
    path = changed(tmp_path, "silago/drra", {"cost": {"model": "failing_costs:Failing"}})
    words = ["cost", str(MODEL), "--precision", "w8a8", "--target", str(path)]
    assert main(words) == 1
    assert capsys.readouterr().err == (
        "error: layer 'conv1': the cost model of silago/drra fails (ZeroDivisionError: division "
        f"by zero)\n  it is the class Failing; see {tmp_path / 'failing_costs.py'}, line 4\n"
    )


@pytest.mark.parametrize(
    "returned, message",
    [
        ("None", "TypeError: layer_cost gives NoneType, not a LayerCost"),
        ("LayerCost", "TypeError: layer_cost gives type, not a LayerCost"),
        ("LayerCost.of(layer, precision, cycles=-1)", "ValueError: cycles is -1"),
        ("LayerCost.of(layer, precision, cycles=float('nan'))", "ValueError: cycles is nan"),
        ("LayerCost.of(layer, precision, cycles='7')", "TypeError: cycles is '7', no number"),
        ("LayerCost.of(layer, precision, cycles=0)", "ValueError: cycles is 0"),
        (
            "LayerCost.of(layer, precision, cycles=1, peak_macs_per_cycle=0)",
            "ValueError: peak_macs_per_cycle is 0",
        ),
        (
            "LayerCost.of(layer, precision, cycles=1, stall_cycles=2)",
            "ValueError: there are more stall_cycles than cycles",
        ),
        ("LayerCost.of(layer, precision, energy_pj=5.0)", "TypeError: energy_pj is no mapping"),
        (
            "LayerCost.of(layer, precision, energy_pj={'a': float('inf')})",
            "ValueError: energy_pj[a] is inf",
        ),
        ("LayerCost.of(layer, precision, bound='both')", "ValueError: bound is 'both'"),
    ],
)
def test_what_a_cost_model_must_not_return(tmp_path: Path, returned: str, message: str) -> None:
    (tmp_path / "wrong_costs.py").write_text(
        "from bitwright.targets import CostModel\n"
        "from bitwright.vocabulary import LayerCost\n"
        "class Wrong(CostModel):\n"
        "    def layer_cost(self, layer, precision):\n"
        f"        return {returned}\n"
    )
    path = changed(tmp_path, "silago/drra", {"cost": {"model": "wrong_costs:Wrong"}})
    with pytest.raises(RunError) as raised:
        bitwright.cost(MODEL, path, precision="w8a8")
    assert message in str(raised.value)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "array_costs.py").write_text(
        "import numpy as np\n"
        "from bitwright.targets import CostModel\n"
        "from bitwright.vocabulary import LayerCost\n"
        "class Arrays(CostModel):\n"
        "    def layer_cost(self, layer, precision):\n"
        "        return LayerCost.of(layer, precision, cycles=np.int64(7),\n"
        "                            energy_pj={'a': np.float32(0.5)})\n"
    )
    path = changed(tmp_path, "silago/drra", {"cost": {"model": "array_costs:Arrays"}})
    found = bitwright.cost(MODEL, path, precision="w8a8")
    assert json.loads(json.dumps(found.to_dict()))["total"]["cycles"] == 35
    assert found.cost.total_energy_pj == 2.5


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, UsageError, "neither a precision for all layers nor a plan"),
        ({"precision": "w4a8"}, PlanError, "cannot do the precision w4a8"),
        (
            {"precision": "w8a8", "baseline": "w2a2"},
            PlanError,
            "baseline w2a2: silago/drra cannot do the precision w2a2",
        ),
        ({"precision": "w8a8", "plot": "chart.png"}, UsageError, "the bar charts are a page"),
        ({"precision": "w8a8", "baseline": "fp32"}, PlanError, "'fp32' is not a precision"),
        ({"precision": "w8a8", "plot": "no/such/folder.html"}, OutputError, "does not exist"),
        ({"precision": "w8a8", "input_shapes": {"x": [1]}}, ModelError, "'x'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bitwright.cost(MODEL, "silago/drra", **options)


def test_sizes_that_are_not_known(tmp_path: Path) -> None:
    model = onnx.load(MODEL)
    shape = model.graph.input[0].type.tensor_type.shape
    for axis in (2, 3):
        shape.dim[axis].dim_param = f"size{axis}"
    del model.graph.value_info[:]
    path = tmp_path / "any.onnx"
    onnx.save(model, path)
    with pytest.raises(UsageError, match="the sizes of layer 'conv1' are not fixed") as raised:
        bitwright.cost(path, "silago/drra", precision="w8a8")
    assert raised.value.fix == "fix them: --input-shape image=<size>,1,<size>,<size>"
    sizes = {"image": [1, 1, 28, 28]}
    found = bitwright.cost(path, "silago/drra", precision="w8a8", input_shapes=sizes)
    assert found.cost.macs == 416_520


def test_nothing_to_compute(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    path = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    with pytest.raises(ModelError, match="no layer that an accelerator could compute"):
        bitwright.cost(path, "silago/drra", precision="w8a8")


# -- artefacts -----------------------------------------------------------------------------------


def test_an_artefact_needs_no_costs(tmp_path: Path, few: Path) -> None:
    changes = {"cost.weight_buffer_kib.value": 1}
    small = changed(tmp_path, "bitfusion/eyeriss", changes)
    with pytest.raises(UsageError, match="no tile fits"):
        bitwright.cost(MODEL, small, precision="w16a16")
    got = bitwright.compile(
        MODEL, small, precision="w16a16", calibration=few, output=tmp_path / "lenet"
    )
    assert got.cost is not None
    assert "no tile fits" in got.cost["reason"]


def test_an_artefact_carries_its_cost(tmp_path: Path, few: Path) -> None:
    got = bitwright.compile(
        MODEL, "bitfusion/eyeriss", precision="w4a8", calibration=few, output=tmp_path / "lenet"
    )
    document = json.loads((tmp_path / "lenet" / "cost.json").read_text())
    assert got.cost == document
    expected = bitwright.cost(MODEL, "bitfusion/eyeriss", precision="w4a8")
    assert document["total"] == json.loads(json.dumps(expected.cost.to_dict()["total"]))
    assert document["schema_version"] == 1
    assert document["assumed"] == ["N = 1 (image)"]
    assert document["reason"] is None
    assert [layer["layer"] for layer in document["layers"]] == [layer.name for layer in LAYERS]
    assert "cost.json" in got.manifest.files
