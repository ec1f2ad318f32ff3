from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitwright import Precision, targets
from bitwright.errors import PlanError, UsageError
from bitwright.targets import catalogue
from bitwright.targets.orders import Order
from tests.targets.descriptions import write

# A description with a cost model, and the begin of one.
MODELLED = """schema_version: 1
name: mine/one
summary: An accelerator of a test
sources: {test: {text: made up, basis: example}}
precisions: {weight_bits: [8], activation_bits: [8], tied: false, source: test}
cost: {model: "their_targets.costs:Costs"}
tvm_target: {kind: llvm, keys: [cpu], device: mine, model: one}
"""
BASE = """from bitwright.targets import CostModel
class Costs(CostModel):
    def layer_cost(self, layer, precision):
        return None
"""


def test_available() -> None:
    found = targets.available()
    assert set(found) == {
        "bitfusion/eyeriss",
        "bitfusion/mohaq",
        "bitfusion/stripes",
        "bitfusion/zigzag",
        "generic/systolic",
        "silago/drra",
    }
    assert targets.installed().problems == ()
    assert all(accelerator.name == name for name, accelerator in found.items())
    published = {name for name in found if not name.startswith("generic/")}
    for name in published:
        sources = found[name].sources
        assert "arXiv" in sources[found[name].precisions.source].text


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(UsageError, match=r"no accelerator 'bitfusion'") as raised:
        targets.get("bitfusion")
    assert raised.value.fix is not None
    assert all(name in raised.value.fix for name in targets.available())


def test_a_file_of_the_user(tmp_path: Path) -> None:
    accelerator = targets.get(write(tmp_path / "mine.yaml"))
    assert accelerator.name == "mine/one"
    assert accelerator.allows(Precision(4, 8))
    assert not accelerator.allows(Precision(4, 4))
    assert targets.get(str(tmp_path / "mine.yaml")) == accelerator
    with pytest.raises(PlanError, match="it allows weights of 4, 8 bits with activations of 8"):
        accelerator.check({"a": Precision(2, 8)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schema_version": 2}, "schema_version': is 2"),
        ({"schema_version": None}, "schema_version': is None"),
        ({"name": "no slash"}, "field 'name'"),
        ({"summary": ""}, "field 'summary'"),
        ({"cost": 1}, "field 'cost.model': must be there"),
        ({"cost": {}}, "field 'cost.model': must be there"),
        ({"cost": {"model": 3}}, "field 'cost.model': must be there"),
        ({"sources": {}}, "field 'sources'"),
        ({"precisions.weight_bits": [3]}, "precisions.weight"),
        ({"precisions.weight_bits": []}, "precisions.weight"),
        ({"precisions.source": ""}, "precisions.source"),
        ({"precisions.source": "another"}, "precisions.source': there is no source 'another'"),
        ({"precisions": None}, "field 'precisions'"),
        ({"precisions.weight_bits": [4, 4]}, "precisions': a width stands twice"),
        ({"precisions.tied": True}, "tied widths must be the same"),
        ({"precisions.tied": "no"}, "precisions.tied"),
        ({"sources.test.text": "  "}, "sources.test.text"),
        ({"layer_kinds": ["pool"]}, "layer_kinds.0"),
        ({"layer_kinds": []}, "layer_kinds"),
        ({"weight_memory_bytes": {"value": -1, "source": "test"}}, "weight_memory_bytes.value"),
        ({"tvm_target.kind": "cuda"}, "tvm_target.kind"),
        ({"tvm_target.keys": ["mine"]}, "'cpu' must be among the keys"),
        ({"tvm_target.x": 1}, "tvm_target.x"),
    ],
)
def test_bad_descriptions(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.yaml", **changes)
    with pytest.raises(UsageError, match=message) as raised:
        targets.get(path)
    assert str(raised.value.where).startswith(f"{path}:")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a description"),
        ("[1, 2]", "not a description"),
        ("a: [", "not a YAML document"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("a: !!python/object/apply:os.getcwd []", "not a YAML document"),
        ("? [1, 2]\n: 3", "not a YAML document"),
        ('a: !!int ""', "not a YAML document"),
        ("a: !!timestamp foo", "not a YAML document"),
        ("a: !!bool foo", "not a YAML document"),
        ("[" * 5000, "not a YAML document"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        targets.get(path)


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    with pytest.raises(UsageError, match="there is no such file"):
        targets.get(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        targets.get(path)


def test_merge_keys_are_yaml_too(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml")
    text = path.read_text().replace("tvm_target:", "tvm_target: &tag", 1)
    assert "&tag" in text
    # The keys of the mapping come from the mapping itself: a merge changes nothing.
    path.write_text(text.replace("  model: one", "  <<: {model: other}\n  model: one"))
    assert targets.get(path).tag.model == "one"


def test_a_near_miss_is_guessed() -> None:
    with pytest.raises(UsageError) as raised:
        targets.get("bitfusion/eyeris")
    assert str(raised.value.fix).startswith("did you mean bitfusion/eyeriss?")


# -- links ---------------------------------------------------------------------------------------


def test_the_preset_is_the_simulator_of_the_papers() -> None:
    # arXiv 2509.00500 and its simulator, fixed-8: a flit of 128 bits is half inputs, half weights;
    # windows of 25 + 25; descending by the number of ones of the weights, exact; column-major.
    link = targets.get_link("ordering-simulator")
    assert (link.flit, link.packing, link.flit_bits) == ("paired", "column-major", 128)
    assert (link.word_bits.value, link.lanes.value, link.window.value) == (8, 8, 25)
    assert Order.parse(link.order) == Order("popcount", on="weights", direction="descending")
    assert link.energy_pj_per_transition.value == 0.173
    assert link.frequency_mhz.value == 125


def test_every_accelerator_describes_a_link_and_no_unit() -> None:
    for name, accelerator in targets.available().items():
        assert accelerator.link is not None
        assert targets.get_link(name) == accelerator.link
        assert accelerator.link.energy_pj_per_word is None  # nobody has published it


def test_inputs_shared_along_rows_have_no_order_for_each_channel() -> None:
    # arXiv 1712.01507: inputs are shared along the rows of the array.
    link = targets.get_link("bitfusion/eyeriss")
    with pytest.raises(UsageError, match="the inputs are sent once for every channel"):
        link.check(Order("popcount", on="weights"))
    link.check(Order("popcount", on="separated"))


def test_a_link_of_the_user(tmp_path: Path) -> None:
    preset = targets.available_links()["ordering-simulator"]
    document = preset.model_dump(mode="json", exclude_none=True)
    path = tmp_path / "link.yaml"
    path.write_text(yaml.safe_dump(document))
    assert targets.get_link(path) == preset.link
    of_target = write(
        tmp_path / "mine.yaml", link={**document["link"]}, sources=document["sources"]
    )
    with pytest.raises(UsageError, match="there is no source 'test'"):  # that of its precisions
        targets.get_link(of_target)
    write(
        tmp_path / "mine.yaml",
        link=document["link"],
        sources={**document["sources"], "test": {"text": "made up", "basis": "example"}},
    )
    assert targets.get_link(str(of_target)) == preset.link


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema_version": 2}, "schema_version': is 2"),
        ({"name": ""}, "field 'name'"),
        ({"sources": {}}, "field 'sources'"),
        ({"sources": {"other": {"text": "x", "basis": "example"}}}, "there is no source"),
        ({"link": None}, "field 'link'"),
        ({"flit": "paired"}, "field 'flit': there is no such field"),
    ],
)
def test_bad_link_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    preset = targets.available_links()["ordering-simulator"]
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**preset.model_dump(mode="json", exclude_none=True), **change}))
    with pytest.raises(UsageError, match=message) as raised:
        targets.get_link(path)
    assert str(raised.value.where).startswith(f"{path}:")


def test_links_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no link 'ordering'") as raised:
        targets.get_link("ordering")
    assert "ordering-simulator" in str(raised.value.fix)
    assert "silago/drra" in str(raised.value.fix)
    with pytest.raises(UsageError, match="there is no such file"):
        targets.get_link(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="mine/one describes no link") as raised:
        targets.get_link(write(tmp_path / "mine.yaml"))
    assert "ordering-simulator" in str(raised.value.fix)


def entry_points_giving(*values: str) -> Callable[..., Any]:
    own = "bitwright.targets.descriptions"
    entries = [
        importlib.metadata.EntryPoint("any", value, "bitwright.targets") for value in (own, *values)
    ]

    def entry_points(*, group: str) -> Any:
        assert group == "bitwright.targets"
        return entries

    return entry_points


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "their_targets"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("their_targets")]:
        monkeypatch.delitem(sys.modules, name)  # of the test before
    monkeypatch.setattr(catalogue, "entry_points", entry_points_giving("their_targets"))
    return folder


def test_plug_ins(package: Path) -> None:
    write(package / "one.yaml")
    write(package / "two.yaml", name="mine/two")
    (package / "README.md").write_text("not a description")
    assert set(targets.available()) >= {"mine/one", "mine/two", "silago/drra"}
    assert targets.get("mine/two").name == "mine/two"


def test_a_clash_names_both_owners_and_leaves_the_others_alone(package: Path) -> None:
    write(package / "drra.yaml", name="silago/drra")
    with pytest.raises(UsageError, match="'silago/drra' is described twice") as raised:
        targets.get("silago/drra")
    assert "bitwright.targets.descriptions, silago_drra.yaml" in str(raised.value)
    assert "their_targets, drra.yaml" in str(raised.value)
    assert targets.get("bitfusion/eyeriss").name == "bitfusion/eyeriss"
    assert list(targets.installed().clashes) == ["silago/drra"]


def test_a_package_without_descriptions(package: Path) -> None:
    (package / "README.md").write_text("forgotten: package data")
    (problem,) = targets.installed().problems
    assert "'their_targets' holds no description" in problem.what


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "entry_points", entry_points_giving("no_such_package"))
    (problem,) = targets.installed().problems
    assert "'no_such_package' cannot be loaded" in str(problem)
    assert targets.get("silago/drra").name == "silago/drra"


@pytest.mark.parametrize(
    "broken",
    [
        {"their_targets/bad.yaml": "a: ["},
        {"their_targets/__init__.py": "raise RuntimeError('no licence found')"},
        {"their_targets/__init__.py": "import no_such_library"},
        {"their_targets/__init__.py": "import sys; sys.exit(7)"},
        {"their_targets/x.yaml": 'a: !!int ""'},
        {"their_targets/costs.py": "x = 1", "their_targets/x.yaml": MODELLED},
        {"their_targets/costs.py": "import sys; sys.exit(7)", "their_targets/x.yaml": MODELLED},
        {
            "their_targets/costs.py": "from bitwright.targets import CostModel\n"
            "class Costs(CostModel):\n    pass\n",
            "their_targets/x.yaml": MODELLED,
        },
        {
            "their_targets/costs.py": BASE + "    cells: int = 3\n",
            "their_targets/x.yaml": MODELLED,
        },
        {
            "their_targets/costs.py": BASE + "    frequency_mhz: float = 3.0\n",
            "their_targets/x.yaml": MODELLED,
        },
        {
            "their_targets/costs.py": BASE
            + "    def check_precisions(self, precisions):\n        raise RuntimeError('no')\n",
            "their_targets/x.yaml": MODELLED,
        },
        {
            "their_targets/costs.py": BASE
            + "    def model_post_init(self, context):\n        raise RuntimeError('no')\n",
            "their_targets/x.yaml": MODELLED,
        },
    ],
    ids=[
        *("description", "raises", "imports", "exits", "YAML", "no class", "exits in the model"),
        *("abstract", "no source", "no clock", "raises in a check", "raises when it is made"),
    ],
)
def test_a_broken_plug_in_never_breaks_the_others(package: Path, broken: dict[str, str]) -> None:
    write(package / "good.yaml", name="mine/good")
    working = set(targets.available())
    for name, text in broken.items():
        (package.parent / name).write_text(text)
    for name in [name for name in sys.modules if name.startswith("their_targets")]:
        del sys.modules[name]  # imported a moment ago, when it still worked
    found = targets.installed()
    if "their_targets/__init__.py" in broken:  # then nothing of the package can be had
        working.remove("mine/good")
    assert set(found.accelerators) == working
    assert len(found.problems) == 1
    with pytest.raises(UsageError) as raised:  # whoever looks for it is told
        targets.get("mine/one")
    assert str(found.problems[0].what) in str(raised.value)


def test_a_cost_model_that_raises_on_import(package: Path) -> None:
    (package / "costs.py").write_text("raise RuntimeError('no licence found')")
    write(package / "one.yaml", cost={"model": "their_targets.costs:Costs"})
    write(package / "two.yaml", name="mine/two")
    found = targets.installed()
    assert "mine/two" in found.accelerators
    (problem,) = found.problems
    assert "no licence found" in str(problem)
    assert str(problem.where).startswith("their_targets, one.yaml:")


def test_code_generation_works_beside_a_name_that_tvm_has(tmp_path: Path) -> None:
    # In a process of its own: the names are registered when the module is imported.
    folder = tmp_path / "their_targets"
    folder.mkdir()
    (folder / "__init__.py").touch()
    write(folder / "gpu.yaml", name="nvidia/geforce-rtx-3070")
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[bitwright.targets]\nx = their_targets\n")
    code = "import bitwright.targets.codegen, tvm; print(tvm.target.Target('silago/drra').kind)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "llvm" in done.stdout
