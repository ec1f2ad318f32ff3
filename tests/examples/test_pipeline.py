"""The build step of the example builds, fails where it should, and goes on after a kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import bitwright
from bitwright.errors import BitwrightError
from bitwright.search.study import Study

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "pipeline"
SCRIPT = FOLDER / "build.sh"
VARIABLES = re.findall(r"^([A-Z]+)=\$\{", SCRIPT.read_text(), re.MULTILINE)
STUDY = Path("out", "pipeline", "study-bitfusion-eyeriss")
# Time enough, so that the same plans are found everywhere.
SMALL = {"GENERATIONS": "2", "BUDGET": "600"}


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "PATH": path, **variables}


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def first_words(lines: str) -> list[str]:
    return [line.split(":")[0].strip() for line in lines.splitlines()]


def shown(start: str) -> str:
    """The output that the README shows, from a line on."""
    readme = (FOLDER / "README.md").read_text()
    (found,) = re.findall(rf"((?:^    .+\n)+)\n{start}", readme, re.MULTILINE)
    return str(found)


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("somewhere else")
    return folder, build(folder, **SMALL)


def test_it_leaves_an_artefact_and_a_report(
    built: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = built
    assert (done.returncode, done.stderr) == (0, "")
    assert first_words(done.stdout) == first_words(shown("Plan 47"))
    out = folder / "out" / "pipeline"
    artifact = bitwright.load_artifact(out / "artefact")
    (number,) = re.findall(r"^plan: .*#(\d+)$", done.stdout, re.MULTILINE)
    picked = bitwright.front(folder / STUDY, best=["error<=+0.5pp"], by="compression").picked
    assert picked is not None
    assert picked.number == int(number)
    precisions = [(e.weight_bits, e.activation_bits) for e in artifact.manifest.layers]
    assert precisions == [(p.weight_bits, p.activation_bits) for p in picked.plan]
    assert "<html" in (out / "report.html").read_text()[:1000]
    assert not (out / "candidate").exists()


def test_the_search_does_not_see_the_test_data(
    built: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = built
    parts = []
    for name in ("validation", "test"):
        with np.load(folder / "out" / "pipeline" / f"{name}.npz") as archive:
            parts.append({image.tobytes() for image in archive["image"]})
    assert [len(part) for part in parts] == [1_000, 1_000]
    assert not parts[0] & parts[1]
    settings = bitwright.front(folder / STUDY).settings
    assert Path(settings.validation.path).name == "validation.npz"
    assert settings.test is None


@pytest.mark.slow
def test_a_gate_that_nothing_passes_fails_the_build(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, before = built
    # With the study of the other build, which knows the folder of its data.
    shutil.copytree(folder / "out", tmp_path / "out")
    done = build(tmp_path, **SMALL, GATE="-100")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: the artefact has -?[\d.]+ points of error more; the gate is -100\n", done.stderr
    )
    assert done.stdout.splitlines() == before.stdout.splitlines()[:2]
    printed = done.stdout + done.stderr
    assert first_words(printed) == first_words(shown("## In a CI system"))
    assert not (tmp_path / "out" / "pipeline" / "artefact").exists()
    assert (tmp_path / "out" / "pipeline" / "report.html").exists()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"GATE": "some"}, "GATE=some is no number of points"),
        ({"LIMIT": "-1"}, "LIMIT=-1 or"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = build(tmp_path, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_exit_code_of_a_command_comes_through(tmp_path: Path) -> None:
    variables = {"TARGET": "nowhere"}
    if (ROOT / ".venv" / "bin" / "bitwright").exists():  # which the script finds by itself
        variables["PATH"] = "/usr/bin:/bin"
    done = build(tmp_path, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no accelerator 'nowhere'" in done.stderr


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on(tmp_path: Path) -> None:
    variables = {"GENERATIONS": "4", "BUDGET": "600"}
    process = subprocess.Popen(
        [SCRIPT],
        cwd=tmp_path,
        env=environment(**variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(evaluations(tmp_path / STUDY)) < 5:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the script and the command that it runs
        process.wait()
    before = evaluations(tmp_path / STUDY)
    assert not (tmp_path / "out" / "pipeline" / "report.html").exists()

    done = build(tmp_path, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    after = evaluations(tmp_path / STUDY)
    assert len(after) > len(before)
    assert {number: after[number] for number in before} == before
    assert len(bitwright.front(tmp_path / STUDY).generations) == 4
    bitwright.load_artifact(tmp_path / "out" / "pipeline" / "artefact")


def evaluations(study: Path) -> dict[int, float | None]:
    """Numbers and errors; none while there is no study."""
    try:
        with Study(study) as opened:
            return {entry.number: entry.result.error for entry in opened.evaluations()}
    except BitwrightError:
        return {}


def test_the_readme_is_about_this_script() -> None:
    readme = (FOLDER / "README.md").read_text()
    table = re.findall(r"^\| `([A-Z]+)` \| `?([^ `]+)`? \|", readme, re.MULTILINE)
    defaults = re.findall(r"^[A-Z]+=\$\{([A-Z]+):-(.*)\}$", SCRIPT.read_text(), re.MULTILINE)
    assert table == defaults
    assert [name for name, _ in table] == VARIABLES
    assert os.access(SCRIPT, os.X_OK)


def test_the_sketch_for_a_ci_system_runs_the_script() -> None:
    readme = (FOLDER / "README.md").read_text()
    (sketch,) = re.findall(r"^```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (job,) = yaml.safe_load(sketch)["jobs"].values()
    (step,) = [s for s in job["steps"] if s.get("run", "").endswith("build.sh")]
    assert ROOT / step["run"] == SCRIPT
    assert set(step["env"]) <= set(VARIABLES)
    default = re.findall(r"OUT:-([^}]*)", SCRIPT.read_text())[0]
    (kept,) = [s for s in job["steps"] if "cache" in s.get("uses", "")]
    assert kept["with"]["path"] == default
