"""Every command and program that the documents show runs, and what it needs exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitwright import PrecisionPlan, targets
from bitwright.search.objectives import GAINS
from bitwright.targets.schema import entries
from bitwright.units import plain

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]


RUN = [
    "README.md",
    "docs/artefact.md",
    "docs/link.md",
    "docs/mamba.md",
    "docs/search.md",
    "docs/soft-edge.md",
    "docs/targets.md",
    "docs/write-a-metric.md",
    "docs/write-a-pass.md",
    "docs/write-a-target.md",
]
# Blocks that the reader is told to save: document to language to names, the first blocks of it.
SAVED = {
    "docs/write-a-metric.md": {"python": ["my_metrics.py"]},
    "docs/write-a-target.md": {
        "yaml": ["my_chip.yaml", "my_serial_chip.yaml", "my_link.yaml"],
        "python": ["my_costs.py"],
    },
}


def blocks(document: str, language: str) -> Iterator[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield match[1]


def commands(document: str) -> list[str]:
    joined = "\n".join(blocks(document, "sh")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder in which the documents' relative paths work and nothing of the tree is changed."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(command: list[str] | str, folder: Path) -> None:
    environment = dict(
        os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert done.stdout or "mkdir" in command or ">" in command


@pytest.mark.parametrize("document", RUN)
def test_the_commands_and_programs_of_a_document_run(document: str, workshop: Path) -> None:
    programs = list(blocks(document, "python"))
    for language, names in SAVED.get(document, {}).items():
        for name, text in zip(names, blocks(document, language), strict=False):
            assert f"`{name}`" in (ROOT / document).read_text(encoding="utf-8")
            (workshop / name).write_text(text)
            if language == "python":
                programs.remove(text)
    shown = [line for line in commands(document) if not line.startswith("make ")]
    assert shown or programs
    for line in shown:
        run(line, workshop)
    for program in programs:
        run([sys.executable, "-c", program], workshop)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_other_document_shows_commands_that_nothing_runs(document: str) -> None:
    if document in RUN:
        return
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(document):
        words = line.split()
        assert words[0] == "make", f"{document}: {line!r} is run by no test"
        assert words[1] in targets


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = [line.split()[1] for line in commands("README.md") if line.startswith("make ")]
    assert shown == ["demo", "test"]
    assert set(shown) <= targets


def test_the_plan_that_is_shown_is_a_plan() -> None:
    (shown,) = blocks("docs/precision-plans.md", "json")
    plan = PrecisionPlan.from_json(shown)
    assert list(plan.layers) == ["conv1", "conv2", "fc1"]
    assert set(json.loads(shown)) == set(json.loads(plan.to_json()))


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (ROOT / document).parent.joinpath(target).exists(), (document, target)


@pytest.mark.parametrize("name", sorted([*targets.available(), *targets.available_links()]))
def test_the_tables_of_targets_are_their_descriptions(name: str) -> None:
    text = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    section = text.partition(f"### {name}\n")[2].partition("\n#")[0]
    found = targets.available().get(name) or targets.available_links()[name]
    rows = ["| number | value | unit | basis | source |", "|---|---|---|---|---|"]
    for entry in entries(found):
        value = plain(entry.value)
        basis = found.sources[entry.source].basis
        cells = (f"`{entry.field}`", value, entry.unit or "-", basis, entry.source)
        rows.append(f"| {' | '.join(cells)} |")
    sources = [f"*{k}* ({s.basis}): {s.text}." for k, s in found.sources.items()]
    assert section.strip() == "\n".join([*rows, "", *sources]), "paste what is expected"


def test_the_table_of_objectives_is_that_of_the_search() -> None:
    text = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    section = text.partition("## Objectives\n")[2].partition("\n## ")[0]
    rows = ["| objective | unit | better | meaning |", "|---|---|---|---|"]
    for gain in GAINS.values():
        better = "more" if gain.maximize else "less"
        rows.append(f"| `{gain.name}` | {gain.unit or '-'} | {better} | {gain.summary} |")
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert shown == rows, "paste what is expected"


@pytest.mark.parametrize("document", ["docs/write-a-metric.md", "docs/write-a-target.md"])
def test_the_entry_point_that_is_shown_is_the_one_bitwright_uses(document: str) -> None:
    (shown,) = blocks(document, "toml")
    group = tomllib.loads(shown)["project"]["entry-points"]
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(group) <= set(own)
