from __future__ import annotations

import importlib.metadata
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitwright import Precision, targets
from bitwright.errors import PlanError, UsageError
from bitwright.targets import accelerators

WIDTHS = (2, 4, 8, 16)

DESCRIPTION = {
    "schema_version": 1,
    "name": "mine/one",
    "summary": "An accelerator of a test",
    "precisions": {
        "weight_bits": [4, 8],
        "activation_bits": [8],
        "tied": False,
        "source": "made up",
    },
    "tvm_target": {"kind": "llvm", "keys": ["mine", "cpu"], "device": "mine", "model": "one"},
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**DESCRIPTION, **changes}))
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
    assert set(found) >= {"bitfusion/eyeriss", "silago/drra"}
    assert all(accelerator.name == name for name, accelerator in found.items())
    assert all("arXiv" in accelerator.precisions.source for accelerator in found.values())


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(UsageError, match=r"no accelerator 'bitfusion'") as raised:
        targets.get("bitfusion")
    assert raised.value.fix is not None
    assert "bitfusion/eyeriss, silago/drra" in raised.value.fix


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
    with pytest.raises(PlanError, match=r"of 25 layers: layer0 .*layer19 \(w2a8\) and 5 more") as e:
        targets.get("silago/drra").check(layers)
    assert "layer20" not in str(e.value)


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
        ({"schema_version": 2}, "schema_version is 2"),
        ({"schema_version": None}, "schema_version is None"),
        ({"name": "no slash"}, "field 'name'"),
        ({"summary": ""}, "field 'summary'"),
        ({"cost": 1}, "field 'cost'"),
        ({"precisions": {**DESCRIPTION["precisions"], "weight_bits": [3]}}, "precisions.weight"),  # type: ignore[dict-item]
        ({"precisions": {**DESCRIPTION["precisions"], "weight_bits": []}}, "precisions.weight"),  # type: ignore[dict-item]
        ({"precisions": {**DESCRIPTION["precisions"], "source": ""}}, "precisions.source"),  # type: ignore[dict-item]
        ({"precisions": None}, "field 'precisions'"),
        ({"tvm_target": {**DESCRIPTION["tvm_target"], "kind": "cuda"}}, "tvm_target.kind"),  # type: ignore[dict-item]
        ({"tvm_target": {**DESCRIPTION["tvm_target"], "x": 1}}, "tvm_target.x"),  # type: ignore[dict-item]
    ],
)
def test_bad_descriptions(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.yaml", **changes)
    with pytest.raises(UsageError, match=message) as raised:
        targets.get(path)
    assert raised.value.where == str(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a description"),
        ("[1, 2]", "not a description"),
        ("a: [", "not a YAML document"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("a: !!python/object/apply:os.getcwd []", "not a YAML document"),
        ("? [1, 2]\n: 3", "not a YAML document"),
        ("[" * 5000, "not a YAML document"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        targets.get(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "no text"])
def test_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.yml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        targets.get(path)


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
    monkeypatch.delitem(sys.modules, "their_targets", raising=False)  # of the test before
    monkeypatch.setattr(accelerators, "entry_points", entry_points_giving("their_targets"))
    return folder


def test_plug_ins(package: Path) -> None:
    write(package / "one.yaml")
    write(package / "two.yaml", name="mine/two")
    (package / "README.md").write_text("not a description")
    assert set(targets.available()) >= {"mine/one", "mine/two", "silago/drra"}
    assert targets.get("mine/two").name == "mine/two"


def test_a_clash_names_both_owners(package: Path) -> None:
    write(package / "drra.yaml", name="silago/drra")
    with pytest.raises(UsageError, match="'silago/drra' is described twice") as raised:
        targets.get("silago/drra")
    assert "bitwright.targets.descriptions, silago_drra.yaml" in str(raised.value)
    assert "their_targets, drra.yaml" in str(raised.value)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "entry_points", entry_points_giving("no_such_package"))
    with pytest.raises(UsageError, match="'no_such_package' cannot be loaded"):
        targets.available()


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


def test_a_name_that_tvm_has_already(tmp_path: Path) -> None:
    accelerator = targets.get(write(tmp_path / "mine.yaml", name="nvidia/geforce-rtx-3070"))
    with pytest.raises(UsageError, match="TVM has another target"):
        accelerator.tvm_target()
