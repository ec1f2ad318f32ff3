from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitwright import Layer, Precision, PrecisionPlan, targets
from bitwright.errors import PlanError, UsageError
from bitwright.targets import accelerators

WIDTHS = (2, 4, 8, 16)

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

DESCRIPTION: dict[str, Any] = {
    "schema_version": 1,
    "name": "mine/one",
    "summary": "An accelerator of a test",
    "sources": {"test": {"text": "made up", "basis": "example"}},
    "precisions": {
        "weight_bits": [4, 8],
        "activation_bits": [8],
        "tied": False,
        "source": "test",
    },
    "tvm_target": {"kind": "llvm", "keys": ["mine", "cpu"], "device": "mine", "model": "one"},
}


def write(path: Path, **changes: Any) -> Path:
    """Write the description; ``a.b`` changes a field inside another."""
    document = copy.deepcopy(DESCRIPTION)
    for field, value in changes.items():
        *outer, name = field.split(".")
        part: dict[str, Any] = document
        for key in outer:
            part = part[key]
        part[name] = value
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def allowed(name: str) -> set[tuple[int, int]]:
    accelerator = targets.get(name)
    return {
        (weights, activations)
        for weights, activations in itertools.product(WIDTHS, WIDTHS)
        if accelerator.allows(Precision(weights, activations))
    }


def test_precisions_are_those_of_the_papers() -> None:
    # Bit Fusion: arXiv 1712.01507; both as searched in MOHAQ, arXiv 2108.01192.
    assert allowed("bitfusion/eyeriss") == set(itertools.product(WIDTHS, WIDTHS))
    assert allowed("silago/drra") == {(4, 4), (8, 8), (16, 16)}


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


def test_check_names_the_refused_layers_and_what_is_allowed() -> None:
    silago = targets.get("silago/drra")
    silago.check({"a": Precision(4, 4), "b": Precision(16, 16)})
    with pytest.raises(PlanError) as raised:
        silago.check(
            {"a": Precision(4, 4), "b": Precision(4, 8), "c": Precision(2, 2)}, where="plan.json"
        )
    assert str(raised.value) == (
        "plan.json: silago/drra cannot do the precision of 2 layers: b (w4a8), c (w2a2)\n"
        "  it allows w4a4, w8a8, w16a16"
    )


def test_check_names_at_most_20_layers() -> None:
    layers = {f"layer{number}": Precision(2, 8) for number in range(25)}
    layers["other"] = Precision(8, 8)
    with pytest.raises(PlanError, match=r"of 25 layers: layer0 .*layer19 \(w2a8\) and 5 more") as e:
        targets.get("silago/drra").check(layers)
    assert "layer20" not in str(e.value)


def test_one_precision_for_all_layers_is_refused_in_a_word() -> None:
    layers = {f"layer{number}": Precision(2, 8) for number in range(25)}
    with pytest.raises(PlanError) as raised:
        targets.get("silago/drra").check(layers)
    assert raised.value.what == "silago/drra cannot do the precision w2a8"


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
    monkeypatch.setattr(accelerators, "entry_points", entry_points_giving("their_targets"))
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
    monkeypatch.setattr(accelerators, "entry_points", entry_points_giving("no_such_package"))
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


def test_tvm_target() -> None:
    accelerator = targets.get("bitfusion/eyeriss")
    for _ in range(2):  # TVM refuses to register a tag twice
        target = accelerator.tvm_target({"kind": "llvm", "mcpu": "x86-64-v3"})
        assert target.kind.name == "llvm"
        exported = target.export()
        assert exported["tag"] == "bitfusion/eyeriss"
        assert exported["mcpu"] == "x86-64-v3"
        assert list(exported["keys"]) == ["bitfusion", "cpu"]
        assert exported["model"] == "eyeriss"


@pytest.mark.parametrize("name", sorted(targets.available()))
def test_every_accelerator_is_a_target_of_tvm(name: str) -> None:
    from tvm.target import Target

    import bitwright.targets.codegen  # noqa: F401 - which makes them known

    target = Target(name)
    family, _, model = name.partition("/")
    assert list(target.keys) == [family if family != "generic" else "systolic", "cpu"]
    assert str(target.export()["model"]) == (model if family != "generic" else "generic")


def test_a_name_that_tvm_has_already(tmp_path: Path) -> None:
    accelerator = targets.get(write(tmp_path / "mine.yaml", name="nvidia/geforce-rtx-3070"))
    with pytest.raises(UsageError, match="TVM has another target"):
        accelerator.tvm_target()


# -- layers and memory ---------------------------------------------------------------------------

CONV = Layer.conv(in_channels=4, out_channels=8, kernel=3, output=5, name="conv")
VECTOR = Layer.matmul(rows=1, in_features=100, out_features=10, name="vector")


def test_kinds_of_layers_that_an_accelerator_lacks(tmp_path: Path) -> None:
    accelerator = targets.get(write(tmp_path / "mine.yaml", layer_kinds=["conv"]))
    plan = {"conv": Precision(8, 8), "vector": Precision(8, 8)}
    accelerator.check_kinds([CONV], plan)
    accelerator.check_kinds([CONV, VECTOR], {"conv": Precision(8, 8)})  # the other one is float
    with pytest.raises(PlanError, match=r"cannot compute 1 layer: vector \(matmul\)") as raised:
        accelerator.check_kinds([CONV, VECTOR], plan)
    assert raised.value.fix == "it computes layers of the kinds conv"


def test_a_plan_beyond_the_memory(tmp_path: Path) -> None:
    memory = {"value": 1000, "source": "test"}  # 1,000 weights of the vector fit with 8 bits
    accelerator = targets.get(write(tmp_path / "mine.yaml", weight_memory_bytes=memory))
    accelerator.check_memory([VECTOR], {"vector": Precision(8, 8)})
    plan = {"vector": Precision(8, 8), "conv": Precision(4, 8)}
    with pytest.raises(PlanError) as raised:
        accelerator.check_memory([VECTOR, CONV], plan, where="plan.json")
    assert str(raised.value) == (
        "plan.json: the weights take 1,144 bytes, and the memory of mine/one holds 1,000 bytes\n"
        "  give large layers fewer bits: vector (w8a8, 1,000 bytes), conv (w4a8, 144 bytes)"
    )


# -- costs ---------------------------------------------------------------------------------------


def test_no_cost_model(tmp_path: Path) -> None:
    accelerator = targets.get(write(tmp_path / "mine.yaml"))
    assert accelerator.frequency_mhz is None
    with pytest.raises(UsageError, match="mine/one has no cost model"):
        accelerator.cost(CONV, Precision(8, 8))


def test_costs_of_what_an_accelerator_cannot_do() -> None:
    with pytest.raises(PlanError, match=r"layer 'conv': silago/drra cannot do the precision"):
        targets.get("silago/drra").cost(CONV, Precision(4, 8))
    with pytest.raises(UsageError, match="no option 'im2col'"):
        targets.get("silago/drra").cost(CONV, Precision(4, 4), im2col=True)
    scan = Layer(name="s", kind="scan", batch=1, in_channels=4, out_channels=4)
    with pytest.raises(UsageError, match="no cost for layers of the kind 'scan'"):
        targets.get("silago/drra").cost(scan, Precision(4, 4))
    unknown = dataclasses.replace(CONV, output=(None, 5))
    with pytest.raises(UsageError, match="its sizes are not known") as raised:
        targets.get("silago/drra").cost(unknown, Precision(4, 4))
    assert "--input-shape" in str(raised.value)


def test_a_model_costs_the_sum_of_its_layers() -> None:
    accelerator = targets.get("bitfusion/eyeriss")
    plan = {"conv": Precision(2, 8), "vector": Precision(16, 4)}
    total = accelerator.model_cost([CONV, VECTOR], plan)
    single = [accelerator.cost(layer, plan[layer.name]) for layer in (CONV, VECTOR)]
    assert total.layers == tuple(single)
    for name in ("macs", "cycles", "stall_cycles", "dram_read_bits", "dram_write_bits", "seconds"):
        assert getattr(total, name) == sum(getattr(cost, name) for cost in single)
    assert total.total_energy_pj == pytest.approx(sum(c.total_energy_pj or 0 for c in single))
    assert total.memory_bits == 288 * 2 + 1000 * 16
    assert total.relative_cycles is None
    assert total.fits
    assert accelerator.model_cost([CONV, VECTOR], PrecisionPlan(layers=plan)) == total


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"conv": Precision(8, 8)}, "has no precision for 1 layer: vector"),
        (
            dict.fromkeys(("conv", "vector", "other"), Precision(8, 8)),
            "names what is not in the model: 1 layer: other",
        ),
    ],
)
def test_plans_of_other_models(plan: dict[str, Precision], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        targets.get("silago/drra").model_cost([CONV, VECTOR], plan)
