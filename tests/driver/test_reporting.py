from __future__ import annotations

import html
import json
import math
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page

from bitwright import PrecisionPlan, searching
from bitwright.cli import main
from bitwright.errors import OutputError, StudyError, UsageError
from bitwright.fronts import front, plan_of_study
from bitwright.plots import sensitivity_page
from bitwright.reporting import Report, report
from bitwright.search.objectives import ErrorScale
from bitwright.search.results import Result
from bitwright.search.study import Evaluation, Study
from bitwright.searching import Sensitivity, search_precisions
from bitwright.vocabulary import Precision
from tests.browser import open_browser, open_page

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small search: three objectives, a limit on the error, test data."""
    base = tmp_path_factory.mktemp("studies")
    with np.load(LENET / "test.npz") as archive:
        for name, part in (("validation", slice(200)), ("test", slice(200, 300))):
            np.savez(base / f"{name}.npz", **{key: archive[key][part] for key in archive.files})
    search_precisions(
        LENET / "lenet.onnx",
        "bitfusion/eyeriss",
        calibration=LENET / "calibration.npz",
        validation=base / "validation.npz",
        test=base / "test.npz",
        output=base / "study",
        objectives="error,speedup,memory",
        constraints=["error<=+1pp"],
        keep={"fc3": "w8a8"},
        subsets=2,
        samples=200,
        generations=3,
        population=12,
    )
    return base / "study"


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[Report, Path]:
    """The report of that study and its page."""
    page = folder.with_name("report.html")
    return report(folder, output=page), page


def changed(folder: Path, to: Path, **meta: Any) -> Path:
    """A copy of a study without its evaluations, in which some of what it says is different."""
    with Study(folder) as study:
        known = {key: study.meta(key) for key in ("settings", "facts", "layer_costs")}
    with Study.create(to, known | meta):
        return to


def embedded(page: str) -> dict[str, Any]:
    """What the script of a page draws."""
    start = page.index(">", page.index('id="data"')) + 1
    data: dict[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return data


# -- what it says ----------------------------------------------------------------------------------


def test_the_twin_is_the_front_and_what_the_page_shows(
    folder: Path, made: tuple[Report, Path]
) -> None:
    found, page = made
    document = found.to_dict()
    assert document["schema_version"] == 1
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert embedded(page.read_text())["report"] == document
    same = front(folder)
    assert document["study"] == json.loads(json.dumps(same.to_dict()))
    assert document["best"] == same.pick().number
    assert document["ended"] == "all generations are done"
    with Study(folder) as study:
        feasible = {e.number for e in study.evaluations() if same.problem.feasible(e)}
        costs = study.meta("layer_costs")
    numbers = [point["number"] for point in document["others"]]
    shown = {point.number for point in (*same.points, *same.baselines)}
    assert len(set(numbers)) == len(numbers)
    assert not set(numbers) & shown
    assert set(numbers) | shown == feasible | shown
    assert document["layer_costs"] == costs
    assert [row["hypervolume"] for row in document["generations"]] == [
        generation.hypervolume for generation in same.generations
    ]
    (limit,) = document["limits"]
    assert limit["value"] == pytest.approx(same.float_error + 1)
    assert document["settings"]["subsets"] == 2
    called = {point.number: str(point.plan[0]) for point in same.baselines}
    assert embedded(page.read_text())["labels"] == {str(n): text for n, text in called.items()}


def test_sqnr_is_the_noise_in_decibels(made: tuple[Report, Path]) -> None:
    document = made[0].to_dict()
    noise = made[0].front.facts.noise["conv1"]["w2a2"]
    assert document["sqnr_db"]["conv1"]["w2a2"] == pytest.approx(-10 * math.log10(noise))
    assert document["sqnr_db"]["conv1"]["w16a16"] is None  # nothing is wider
    assert document["sensitivity"] == {}
    assert "bitwright sensitivity --study" in made[1].read_text()


def test_the_command_repeats_the_search(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Study(folder) as study:
        settings = study.meta("settings")
    settings["model"]["path"] = "/models/it's one.onnx"
    settings |= {"precisions": ["w4a4", "w8a8"], "exclude": ["a*", "b c"], "tie": ["d,e"]}
    settings |= {"input_shapes": {"x y": [1, None, 3]}, "constraints": ["error<=+5pp"]}
    settings["quantization"] |= {"per_channel": False, "asymmetric": True, "clip": "minmax"}
    asked: dict[str, Any] = {}

    def remember(model: Path, target: str, **options: Any) -> None:
        asked.update(options, model=str(model), target=target)
        raise UsageError("enough")

    monkeypatch.setattr(searching, "search_precisions", remember)
    words = shlex.split(report(changed(folder, tmp_path / "study", settings=settings)).command)
    assert words[0] == "bitwright"
    assert main(words[1:]) == 2
    for name in ("model", "calibration", "validation", "test"):
        assert str(asked[name]) == settings[name]["path"]
    for name in "target metric start algorithm population seed subsets samples keep".split():
        assert asked[name] == settings[name], name
    for name in ("constraints", "exclude", "tie"):
        assert list(asked[name]) == settings[name]
    assert asked["precisions"] == "w4a4,w8a8"
    assert asked["objectives"] == "error,speedup,memory"
    assert asked["input_shapes"] == {"x y": [1, None, 3]}
    assert {name: asked[name] for name in settings["quantization"]} == settings["quantization"]
    assert asked["generations"] is None  # as nothing says when it would have ended


def test_the_command_has_the_generations_of_a_search_that_ended(
    made: tuple[Report, Path],
) -> None:
    command = made[0].command
    assert "--generations 3" in command
    assert "--offspring" not in command  # the default


def test_measured_errors_take_the_place_of_noise(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "study")
    with Study(copied, write=True) as study:
        study.set_sensitivity("fc1", Precision(2, 2), Result("ok", 0.25))
        study.set_sensitivity("fc1", Precision(4, 4), Result("failed", None))
    page = tmp_path / "page.html"
    assert report(copied, output=page).to_dict()["sensitivity"] == {
        "fc1": {"w2a2": 25.0, "w4a4": None}
    }
    (drawn,) = embedded(page.read_text())["sensitivity"]["data"]
    assert (drawn["x"], drawn["z"], drawn["text"]) == (
        *(["w2a2", "w4a4"], [[25.0, None]], [["25", "-"]]),
    )


# -- studies that are not finished, or damaged -----------------------------------------------------


def test_a_study_that_has_just_begun(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = report(changed(folder, tmp_path / "study"), output=page)
    assert (found.best, found.ended, found.last_evaluation) == (None, None, None)
    assert "There is no front yet: the search has not got beyond" in page.read_text()
    assert "the search is unfinished" in page.read_text()


def test_a_study_in_which_no_plan_meets_the_limit(folder: Path, tmp_path: Path) -> None:
    with Study(folder) as study:
        settings, reference = study.meta("settings"), study.meta("reference")
        evaluations = study.evaluations()
    copied = changed(
        folder, tmp_path / "study", settings=settings | {"constraints": ["error<=0.0001%"]}
    )
    page = tmp_path / "page.html"
    with Study(copied, write=True) as study:  # and a search is writing it
        study.set_meta("reference", reference)
        for entry in evaluations:
            if entry.result.error:
                study.add(entry)
        found = report(copied, output=page)
    assert found.front.points == ()
    assert "There is no front yet: no plan meets error&lt;=0.0001%; the closest" in page.read_text()


def test_damage_is_told(folder: Path, tmp_path: Path) -> None:
    damaged = changed(folder, tmp_path / "study", layer_costs={"conv1": 7})
    with pytest.raises(StudyError, match="is damaged"):
        report(damaged)
    with pytest.raises(StudyError, match="is no study"):
        report(tmp_path)


def test_the_name_of_the_page_is_checked_first(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a report is a page"):
        report(folder, output=tmp_path / "report.pdf")
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        report(tmp_path, output=page)
    report(folder, output=page, overwrite=True)
    assert page.read_text() != "mine"


# -- the page as text ------------------------------------------------------------------------------


class References(HTMLParser):
    """All that tags of a page refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.found += [
            f"{tag} {name}" for name in ("src", "href", "action", "data") & values.keys()
        ]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""


def test_the_page_refers_to_nothing(made: tuple[Report, Path]) -> None:
    parser = References()
    parser.feed(made[1].read_text())
    assert parser.found == []
    assert parser.policy.startswith("default-src 'none'")
    assert "http" not in parser.policy
    assert "showSendToCloud: false" in made[1].read_text()


NAMES = (
    "<script>alert(1)</script>",
    "%{x}",
    "<b>&amp;",
    "</script><script>alert(2)//",
    "a" * 40 + "層",
)


@pytest.fixture
def hostile(folder: Path, tmp_path: Path) -> Path:
    """The page of a study whose layers and files have the worst of names."""
    with Study(folder) as study:
        text = json.dumps([study.meta(key) for key in ("settings", "facts", "layer_costs")])
        reference, evaluations = study.meta("reference"), study.evaluations()
        names = study.meta("facts")["layers"]
    for name, other in zip(names, NAMES, strict=True):
        text = text.replace(json.dumps(name), json.dumps(other))
    settings, facts, costs = json.loads(text)
    settings["model"]["path"] = "/tmp/<img src=x onerror=alert(3)>'\".onnx"
    settings["keep"] = {NAMES[0]: "w8a8"}
    copied = changed(folder, tmp_path / "<i>'#", settings=settings, facts=facts, layer_costs=costs)
    with Study(copied, write=True) as study:
        study.set_meta("reference", reference)
        study.set_meta("ended", "<u>ended</u>")
        for entry in evaluations:
            study.add(entry)
    page = tmp_path / "page.html"
    report(copied, output=page)
    return page


def test_names_are_text(hostile: Path) -> None:
    page = hostile.read_text()
    for markup in ("<script>alert", "</script><script>", "<img", "<b>&", "<u>ended", "<i>'"):
        assert markup not in page
    data = embedded(page)
    assert data["report"]["study"]["layers"] == list(NAMES)
    assert html.escape("<u>ended</u>") in page


# -- the page of a sensitivity analysis ------------------------------------------------------------


def test_the_heat_map_of_errors() -> None:
    wide, narrow = Precision(16, 16), Precision(2, 4)
    found = Sensitivity(
        layers=("<b>conv", "%{y}"),
        base=(wide, wide),
        base_error=1.5,
        float_error=1.0,
        errors={"<b>conv": {wide: 1.5, narrow: 12.25}, "%{y}": {wide: 1.5, narrow: None}},
        scale=ErrorScale("top1", "fraction", higher_is_better=True),
        target="bitfusion/eyeriss",
        samples=1234,
    )
    page = sensitivity_page(found, "/models/<u>lenet.onnx")
    assert "<title>&lt;u&gt;lenet.onnx on bitfusion/eyeriss: sensitivity</title>" in page
    call = page[page.rindex("Plotly.newPlot(") :]
    (drawn,), end = json.JSONDecoder().raw_decode(call, call.index("["))
    assert drawn["x"] == ["w2a4", "w16a16"]
    assert drawn["z"] == [[12.25, 1.5], [None, 1.5]]
    assert drawn["text"] == [["12.2", "1.5"], ["-", "1.5"]]
    assert not drawn["reversescale"]  # much of an error is dark
    layout, _ = json.JSONDecoder().raw_decode(call, call.index("{", end))
    assert layout["yaxis"]["ticktext"] == ["&lt;b&gt;conv", "%\u200b{y}"]
    assert "all others at w16a16" in layout["title"]["text"]
    assert "1,234 samples" in layout["title"]["text"]


# -- the page in a browser -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


def front_points(page: Page) -> Locator:
    """The points of the front; the traces before it are other plans and baselines."""
    return page.locator("#front .scatterlayer .trace").nth(2).locator("path.point")


def middle(locator: Locator) -> tuple[float, float]:
    box = locator.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_click_on_the_front_shows_a_plan(
    browser: Browser, made: tuple[Report, Path], folder: Path
) -> None:
    found, file = made
    points = found.front.points
    with open_page(browser, file.as_uri()) as page:
        drawn = front_points(page)
        assert drawn.count() == len(points)
        assert drawn.first.is_visible()
        assert page.locator("#number").inner_text() == f"#{found.best}"
        lines = "document.getElementById('front').layout.annotations.map((line) => line.text)"
        assert page.evaluate(lines) == ["float model", "error&lt;=+1pp"]
        # The one that is farthest from all others, so that no other can be meant.
        places = [middle(drawn.nth(index)) for index in range(len(points))]
        chosen = max(
            (index for index, point in enumerate(points) if point.number != found.best),
            key=lambda index: min(
                math.dist(places[index], place) for place in places if place != places[index]
            ),
        )
        page.mouse.move(*places[chosen])
        point = points[chosen]
        page.locator("#front .hoverlayer", has_text=f"#{point.number}").wait_for()
        page.mouse.click(*places[chosen])
        assert page.locator("#number").inner_text() == f"#{point.number}"
        shown = page.locator("#layers tr").evaluate_all(
            "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        expected = zip(found.front.facts.layers, map(str, point.plan), strict=True)
        assert shown == [list(entry) for entry in expected]
        errors = page.locator("#errors tr").first.locator("td").all_inner_texts()
        values = (point.values["error"], point.overall_error, point.test_error)
        assert errors == [f"{value:.2f} %" for value in values]
        # And it can be taken away: as a plan, and as the command that compiles it.
        page.locator("#copy-plan").click()
        page.locator("#copied", has_text="copied").wait_for()
        text = page.evaluate("navigator.clipboard.readText()")
        plan = plan_of_study(f"{folder}#{point.number}")
        assert PrecisionPlan.from_json(text) == plan
        assert text == plan.to_json()
        words = shlex.split(page.locator("#command").inner_text())
        assert words[:3] == ["bitwright", "compile", found.front.settings.model.path]
        assert plan_of_study(words[words.index("--plan") + 1]) == plan


def test_a_plan_is_copied_without_access_to_the_clipboard(
    browser: Browser, made: tuple[Report, Path], folder: Path
) -> None:
    hide = "Object.defineProperty(navigator, 'clipboard', { value: undefined });"
    with open_page(browser, made[1].as_uri(), before=hide) as page:
        page.locator("#copy-plan").click()
        area = page.locator("#copy-text")
        assert area.is_visible()
        plan = plan_of_study(f"{folder}#{made[0].best}")
        assert area.input_value() == plan.to_json()
        assert page.evaluate("document.getSelection().toString()") == plan.to_json()


def test_other_axes_and_other_ways_to_choose(browser: Browser, made: tuple[Report, Path]) -> None:
    found, file = made
    first, last = found.front.points[0], found.front.points[-1]
    with open_page(browser, file.as_uri(), width=800) as page:
        page.locator("#x-axis").select_option(label="memory")
        assert page.locator("#front .xtitle").text_content() == "memory (KiB)"
        assert front_points(page).count() == len(found.front.points)
        page.locator("#choice").select_option(value=str(last.number))
        assert page.locator("#number").inner_text() == f"#{last.number}"
        # The first column of the heat map is the plan with the least error.
        heat = page.locator("#precisions .heatmaplayer image").first
        heat.scroll_into_view_if_needed()
        box = heat.bounding_box()
        assert box is not None
        column = box["width"] / len(found.front.points)
        heat.click(position={"x": column / 2, "y": box["height"] / 2}, force=True)
        assert page.locator("#number").inner_text() == f"#{first.number}"
        assert page.evaluate("document.documentElement.scrollWidth") == 800  # nothing sticks out


def test_names_are_text_in_a_browser(browser: Browser, hostile: Path) -> None:
    with open_page(browser, hostile.as_uri()) as page:
        assert page.locator("#layers th").all_text_contents() == list(NAMES)
        for chart in ("costs", "precisions", "sensitivity"):
            ticks = page.locator(f"#{chart} .ytick").all_text_contents()
            shown = [tick.replace("\u200b", "") for tick in ticks]
            assert shown[:3] == list(NAMES[:3]), chart
        assert page.locator("img").count() == 0


def test_an_unfinished_study_in_a_browser(browser: Browser, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    report(changed(folder, tmp_path / "study"), output=file)
    with open_page(browser, file.as_uri()) as page:
        assert page.locator("#nothing").is_visible()
        assert page.locator("#sensitivity .heatmaplayer image").count() == 1


@pytest.mark.slow
def test_many_layers_and_plans_make_no_large_page(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    layers = [f"encoder/blocks/{number}/attention/projection" for number in range(60)]
    with Study(folder) as study:
        facts, costs = study.meta("facts"), study.meta("layer_costs")
        reference = study.meta("reference")
        gains = study.evaluations()[0].gains
    noise = facts["noise"]["conv1"]
    facts |= {"layers": layers, "layer_macs": [1] * 60, "layer_weights": [1] * 60}
    facts |= {"noise": dict.fromkeys(layers, noise)}
    copied = changed(
        folder,
        tmp_path / "study",
        facts=facts,
        layer_costs=dict.fromkeys(layers, costs["conv1"]),
    )
    generator = np.random.default_rng(1)
    precisions = [Precision.parse(text) for text in costs["conv1"]]
    with Study(copied, write=True) as study:
        study.set_meta("reference", reference)
        for number in range(1, 2001):
            plan = tuple(precisions[index] for index in generator.integers(16, size=60))
            error, speedup, memory = generator.random(3)
            own = {"speedup": 1 + speedup, "memory": 20_000 * memory}
            result = Result("ok", 0.1 * error, 0.1 * error)
            study.add(Evaluation(number, plan, "search", result, {**gains, **own}))
    file = tmp_path / "page.html"
    report(copied, output=file)
    assert file.stat().st_size < 8e6
    with open_page(browser, file.as_uri()) as page:
        milliseconds = page.evaluate(
            "(() => { const start = performance.now(); select(FRONT[1].number);"
            " return performance.now() - start; })()"
        )
        assert milliseconds < 2000  # a fraction of that where nothing else runs
