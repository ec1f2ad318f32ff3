"""``bitwright report``: a page about a search study, and the same as JSON."""

from __future__ import annotations

import inspect
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from bitwright import plots
from bitwright.errors import StudyError, UsageError
from bitwright.files import check_writable, write_atomically
from bitwright.fronts import Front, Point, front, point_of
from bitwright.search.objectives import GAINS
from bitwright.search.settings import problem_of, settings_of
from bitwright.search.study import Study
from bitwright.search_tables import short_plan
from bitwright.searching import search_precisions
from bitwright.units import quantity
from bitwright.vocabulary import BIT_WIDTHS, Precision, PrecisionPlan

__all__ = ["Report", "report"]

SCHEMA_VERSION: Final = 1

_LAYER_COSTS: Final = TypeAdapter(dict[str, dict[str, dict[str, float]]])


@dataclass(frozen=True, slots=True)
class Report:
    """A study as its page shows it.

    Attributes
    ----------
    front
        What was found, and what it is compared with.
    others
        All other plans that meet the constraints.
    best
        Number of the plan that the page shows first; None while there is no front.
    nothing
        Why there is no front; empty if there is one.
    ended
        Why the search ended; None if it goes on or was interrupted.
    stops
        The limits of the search that ended.
    last_evaluation
        When the last evaluation was finished; None before the first.
    layer_costs
        Layer name to precision to quantity (as in :class:`~bitwright.vocabulary.LayerCost`) to
        its value; what the cost model does not define is missing.
    sensitivity
        Layer name to precision to the error, as shown, of plans in which that layer alone has that
        precision; None where the metric gave no number, empty if it was not measured.
    """

    front: Front
    others: tuple[Point, ...]
    best: int | None
    nothing: str
    ended: str | None
    stops: Mapping[str, Any]
    last_evaluation: datetime | None
    layer_costs: Mapping[str, Mapping[str, Mapping[str, float]]]
    sensitivity: Mapping[str, Mapping[str, float | None]]

    @property
    def title(self) -> str:
        """What the page is about."""
        return f"{Path(self.front.settings.model.path).name} on {self.front.facts.target}"

    @property
    def sqnr(self) -> dict[str, dict[str, float | None]]:
        """Signal to quantization noise ratio, in dB, of each layer's own output; None for no noise.

        Ten times the decimal logarithm of one over the noise relative to the signal's power.
        """
        return {
            layer: {
                precision: 10.0 * math.log10(1.0 / noise) if 0 < noise < math.inf else None
                for precision, noise in row.items()
            }
            for layer, row in self.front.facts.noise.items()
        }

    @property
    def command(self) -> str:
        """The command line that repeats the search."""
        return _command(self.front, self.stops)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints: all that the page shows."""
        found = self.front
        settings, facts, problem = found.settings, found.facts, found.problem
        points = (*found.points, *found.baselines, *self.others)
        names = [name for name in GAINS if any(name in point.gains for point in points)]
        layers = zip(facts.layers, facts.layer_macs, facts.layer_weights, strict=True)
        document = {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "study": found.to_dict(),
            "others": [_brief(point, facts.layers) for point in self.others],
            "best": self.best,
            "nothing": self.nothing,
            "ended": self.ended,
            "last_evaluation": None
            if self.last_evaluation is None
            else self.last_evaluation.isoformat(timespec="seconds"),
            "error": {
                "name": problem.scale.name,
                "metric": problem.scale.metric,
                "unit": problem.scale.shown_unit,
            },
            "gains": {
                name: {
                    "unit": GAINS[name].unit,
                    "direction": "maximize" if GAINS[name].maximize else "minimize",
                    "summary": GAINS[name].summary,
                }
                for name in names
            },
            "limits": [
                {"text": c.text, "name": c.name, "value": c.absolute(found.float_error)}
                for c in problem.constraints
            ],
            "layers": [
                {"name": name, "macs": macs, "weights": weights} for name, macs, weights in layers
            ],
            "layer_costs": self.layer_costs,
            "sensitivity": self.sensitivity,
            "sqnr_db": self.sqnr,
            "generations": [
                {
                    "number": generation.number,
                    "evaluations": generation.evaluations,
                    "hypervolume": generation.hypervolume,
                    "seconds": generation.seconds,
                }
                for generation in found.generations
            ],
            "settings": settings.model_dump(mode="json"),
            "space": facts.space,
            "structure_hash": facts.structure_hash,
            "weights_hash": facts.weights_hash,
            "versions": facts.versions,
            "notes": facts.notes,
            "command": self.command,
        }
        plain: dict[str, Any] = _finite(document)
        return plain


def report(
    study: str | Path, *, output: str | Path | None = None, overwrite: bool = False
) -> Report:
    """Make a page about a study, also while a search is writing it.

    Parameters
    ----------
    study
        Its folder.
    output
        The page to write, ``.html``; it needs no network. None writes nothing.
    overwrite
        Whether ``output`` may exist.

    Raises
    ------
    StudyError
        If there is no study, or it is damaged or of another version.
    UsageError, OutputError
        If the page cannot have that name, or cannot be written.
    """
    if output is not None and Path(output).suffix != ".html":
        raise UsageError("a report is a page", where=str(output), fix="name it .html")
    page = None if output is None else check_writable(output, overwrite=overwrite)
    found = _read(study)
    if page is not None:
        write_atomically(page, _page(found).encode())
    return found


def _read(folder: str | Path) -> Report:
    with Study(folder) as study:
        _, facts = settings_of(study)
        problem = problem_of(study)
        evaluations = study.evaluations()
        tests = study.tests()
        ended, stops = study.meta("ended"), study.meta("stops")
        finished = study.last_finished()
        costs = study.meta("layer_costs")
        measured = study.sensitivity()
    try:
        layer_costs = _LAYER_COSTS.validate_python(costs)
    except ValidationError as error:
        first = error.errors()[0]
        raise StudyError(
            f"is damaged (layer_costs: {first['msg']})",
            where=str(folder),
            fix="restore it from a copy, or search again into another folder",
        ) from error
    # Read last: a search may have gone on, and then no plan from above beats this front.
    found = front(folder)
    listed = {point.number for point in (*found.points, *found.baselines)}
    best, nothing = None, "the search has not got beyond its first plans"
    if found.problem.reference:
        try:
            best, nothing = found.pick().number, ""
        except StudyError as error:
            nothing = f"{error.what}; {error.fix}"
    return Report(
        front=found,
        others=tuple(
            point_of(entry, problem, tests)
            for entry in evaluations
            if problem.feasible(entry) and entry.number not in listed
        ),
        best=best,
        nothing=nothing,
        ended=ended,
        stops=stops or {},
        last_evaluation=None if finished is None else datetime.fromtimestamp(finished, UTC),
        layer_costs=layer_costs,
        sensitivity={
            layer: {
                str(precision): None if error is None else problem.scale.shown(error)
                for precision, error in measured[layer].items()
            }
            for layer in facts.layers
            if layer in measured
        },
    )


def _brief(point: Point, layers: Sequence[str]) -> dict[str, Any]:
    """A plan that is one of thousands: its precisions in the order of the layers."""
    document = point.to_dict(layers)
    names = ("number", "origin", "objectives", "gains", "overall_error", "test_error")
    return {name: document[name] for name in names} | {
        "precisions": list(document["plan"].values())
    }


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- how to repeat it --------------------------------------------------------------------------


def _command(found: Front, stops: Mapping[str, Any]) -> str:
    settings = found.settings
    options: dict[str, Any] = {
        **settings.model_dump(),
        **settings.model_dump()["quantization"],
        "objectives": ",".join(settings.objectives),
        **stops,
    }
    words = ["bitwright", "search", settings.model.path, "--target", settings.target]
    words += ["--calibration", settings.calibration.path]
    words += ["--validation", settings.validation.path]
    if settings.test is not None:
        words += ["--test", settings.test.path]
    words += ["--output", str(found.folder)]
    parameters = inspect.signature(search_precisions).parameters
    for name in (
        "objectives metric start algorithm population offspring seed subsets samples vector_values "
        "recipe clip percentile elementwise_bits loop_bits batch_size"
    ).split() + [name for name in ("generations", "evaluations", "patience") if name in stops]:
        if options[name] != parameters[name].default:
            words += [f"--{name.replace('_', '-')}", str(options[name])]
    if settings.precisions:
        words += ["--precisions", ",".join(settings.precisions)]
    for option, values in (
        ("constraint", settings.constraints),
        ("keep", [f"{layer}={precision}" for layer, precision in settings.keep.items()]),
        ("exclude", settings.exclude),
        ("tie", settings.tie),
        ("input-shape", [_shape(*entry) for entry in settings.input_shapes.items()]),
    ):
        for value in values:
            words += [f"--{option}", value]
    if settings.quantization.per_channel is not None:
        words.append("--per-channel" if settings.quantization.per_channel else "--no-per-channel")
    if settings.quantization.asymmetric:
        words.append("--asymmetric")
    if not settings.quantization.rotation:
        words.append("--no-rotation")
    return shlex.join(words)


def _shape(name: str, shape: Sequence[int | None]) -> str:
    return f"{name}={','.join('?' if size is None else str(size) for size in shape)}"


# -- the page ----------------------------------------------------------------------------------


def _page(found: Report) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("bitwright"), autoescape=True, undefined=StrictUndefined
    )
    # Short, and in the order of the layers.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("report.html.j2").render(
        found=found,
        front=found.front,
        summary=_summary(found),
        measured=bool(found.sensitivity),
        files=_files(found),
        settings=_settings(found),
        sensitivity_command=shlex.join(
            ["bitwright", "sensitivity", "--study", str(found.front.folder.absolute())]
        ),
        data=_drawn(found),
        plotly=get_plotlyjs(),
    )


def _summary(found: Report) -> list[str]:
    front, scale = found.front, found.front.problem.scale
    total = sum(front.evaluations.values())
    counts = ", ".join(f"{count:,} {status}" for status, count in front.evaluations.items())
    float_error = quantity(front.float_error, scale.shown_unit)
    if found.ended is None:
        state = "the search is unfinished: it is running, or it was interrupted"
    else:
        state = f"the search ended: {found.ended}"
    return [
        f"{total:,} evaluations ({counts})" if total else "no evaluations yet",
        f"{len(front.points):,} plans on the front",
        f"float model: {scale.name} {float_error} ({front.facts.samples:,} samples)",
        f"hypervolume {front.hypervolume:.4f}",
        state,
    ]


def _files(found: Report) -> list[tuple[str, str, str]]:
    settings = found.front.settings
    named = {
        "model": settings.model,
        "calibration data": settings.calibration,
        "validation data": settings.validation,
        "test data": settings.test,
    }
    return [(name, file.path, file.sha256) for name, file in named.items() if file is not None]


def _settings(found: Report) -> list[tuple[str, str]]:
    facts = found.front.facts
    given = found.front.settings.model_dump(
        exclude={"model", "calibration", "validation", "test", "reuse_bytes"}
    )
    quantization = given.pop("quantization")
    size = facts.space["size"]  # beyond the largest float where layers are many
    return [
        *(
            (name.replace("_", " "), _listed(value))
            for name, value in {**given, **quantization}.items()
        ),
        ("plans in the space", f"{size:,}" if size < 10**12 else f"{Decimal(size):.3g}"),
        ("structure hash", facts.structure_hash),
        ("weights hash", facts.weights_hash),
        *facts.versions.items(),
    ]


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name}={entry}" for name, entry in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _drawn(found: Report) -> dict[str, Any]:
    """What the page's script draws: the report, and texts and figures made of it."""
    front, scale = found.front, found.front.problem.scale
    points = (*front.points, *front.baselines, *found.others)
    figure = plots.layer_heat_map(
        found.sensitivity or found.sqnr,
        name=scale.name if found.sensitivity else "SQNR",
        unit=scale.shown_unit if found.sensitivity else "dB",
        higher_is_better=scale.maximize if found.sensitivity else True,
    )
    drawn = json.loads(figure.to_json())
    frame = PrecisionPlan(
        layers={},
        structure_hash=front.facts.structure_hash,
        weights_hash=front.facts.weights_hash,
        target=front.facts.target,
        elementwise_bits=front.settings.quantization.elementwise_bits,
        loop_bits=front.settings.quantization.loop_bits,
    )
    return {
        "report": found.to_dict(),
        "plan": json.loads(frame.to_json()),
        "compile": _compile_command(front),
        "widths": BIT_WIDTHS,
        "labels": _labels(front),
        "float_errors": [
            quantity(error, scale.shown_unit)
            for error in (front.float_error, front.float_error, front.float_test_error)
        ],
        "shown": {point.number: _shown(point, front) for point in points},
        "sensitivity": drawn if found.sensitivity or found.sqnr else None,
        "template": drawn["layout"]["template"],
    }


def _compile_command(front: Front) -> tuple[str, str]:
    """What stands before and behind the number of a plan; the number comes at the end once more."""
    settings = front.settings
    plan = shlex.quote(f"{front.folder.absolute()}#")  # in quotation marks, because of the #
    shapes = [f"--input-shape={_shape(*entry)}" for entry in settings.input_shapes.items()]
    before = shlex.join(["bitwright", "compile", settings.model.path, *shapes])
    return f"{before} --plan {plan[:-1]}", f"{plan[-1]} -o plan-"


def _labels(front: Front) -> dict[int, str]:
    """What baselines are called: the precision of all layers that the search decides about."""
    kept = front.facts.space["kept"]

    def precisions(point: Point) -> set[Precision]:
        return {p for n, p in zip(front.facts.layers, point.plan, strict=True) if n not in kept}

    def bits(point: Point) -> int:
        return sum(p.weight_bits + p.activation_bits for p in point.plan)

    most = max(map(bits, front.baselines), default=0)
    return {
        point.number: str(*precisions(point))
        if len(precisions(point)) == 1
        else ("most bits" if bits(point) == most else "fewest bits")
        for point in front.baselines
    }


def _shown(point: Point, front: Front) -> dict[str, Any]:
    """Numbers of a plan as people read them."""
    scale = front.problem.scale
    units = {name: gain.unit for name, gain in GAINS.items()} | {scale.name: scale.shown_unit}
    errors = (point.overall_error, point.test_error)
    return {
        "plan": short_plan(point.plan),
        "values": {
            name: quantity(value, units[name])
            for name, value in {**point.gains, **point.values}.items()
        },
        "errors": [quantity(error, scale.shown_unit) for error in errors],
    }
