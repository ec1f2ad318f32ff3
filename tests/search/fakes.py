"""Small networks, and searches that need no model: the error of a plan is a closed form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitwright import Layer, Precision, targets
from bitwright.search.algorithm import Algorithm, Nsga2
from bitwright.search.engine import Engine, Stops, narrowest_and_widest
from bitwright.search.objectives import Costs, ErrorScale, parse_constraint, parse_objectives
from bitwright.search.problem import Problem, references
from bitwright.search.results import Result
from bitwright.search.space import Genome, Plan, Space, make_space
from bitwright.search.study import Evaluation, Study
from bitwright.targets.cost_table import cost_table

SILAGO = targets.get("silago/drra")
BIT_FUSION = targets.get("bitfusion/mohaq")
EYERISS = targets.get("bitfusion/eyeriss")

LAYERS = (
    Layer.conv(in_channels=3, out_channels=16, kernel=3, output=16, name="first"),
    Layer.conv(in_channels=16, out_channels=32, kernel=3, output=8, name="second"),
    Layer.matmul(rows=1, in_features=512, out_features=64, name="third"),
    Layer.matmul(rows=1, in_features=64, out_features=10, name="last"),
)
NAMES = tuple(layer.name for layer in LAYERS)

# The speech model of MOHAQ, arXiv 2108.01192.
PAPER = tuple(
    Layer.matmul(rows=1, in_features=ins, out_features=outs, name=name)
    for name, ins, outs in (
        ("L0", 23, 3300),
        *((f"L{number}", 256, 3300) for number in (1, 2, 3)),
        *((f"Pr{number}", 1100, 256) for number in (1, 2, 3)),
        ("FC", 1100, 1904),
    )
)
PAPER_VECTOR_VALUES = 8_800

SHARE = ErrorScale("top1", "fraction", higher_is_better=True)
FLOAT_ERROR = 0.02


def error_of(plan: Plan) -> float:
    """Less for more bits, different for every layer: an error between 0.02 and 0.4."""
    noise = sum(
        (1 + 0.3 * number) * (0.5 * 2.0**-p.weight_bits + 0.4 * 2.0**-p.activation_bits)
        for number, p in enumerate(plan)
    )
    return FLOAT_ERROR + 0.3 * noise / len(plan)


@dataclass
class FakePool:
    """Gives the closed form.

    Attributes
    ----------
    order
        In which order numbers come back.
    fails
        Which plans have no error.
    limit
        Largest acceptable error, as in the job of a real one.
    spoil
        Called with the count of results so far, before each; may raise, or end the process.
    ran
        Plans that were run, in order.
    """

    order: Callable[[list[int]], Sequence[int]] = sorted
    fails: Callable[[Plan], bool] = lambda _: False
    limit: float | None = None
    spoil: Callable[[int], None] = lambda _: None
    workers: int = 1
    ran: list[Plan] = field(default_factory=list)

    def evaluate(
        self,
        plans: Mapping[int, Plan],
        limit: float | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Result]]:
        limit = self.limit if limit is None else limit
        for number in self.order(list(plans)):
            if stop():
                return
            plan = plans[number]
            self.spoil(len(self.ran))
            self.ran.append(plan)
            if self.fails(plan):
                yield number, Result("failed", None, message="no number")
                continue
            error = error_of(plan)
            over = limit is not None and error > limit
            yield number, Result("stopped" if over else "ok", error, error, 10, 0.25)


@dataclass(frozen=True)
class Setup:
    """What a search is about."""

    space: Space
    costs: Costs
    problem: Problem
    population: int = 12
    offspring: int = 6

    @property
    def ends(self) -> tuple[Plan, Plan]:
        return narrowest_and_widest(self.space)

    def algorithm(self, seed: int = 1, start: Sequence[Genome] = ()) -> Algorithm:
        return Nsga2(
            self.space,
            objectives=len(self.problem.objectives),
            constraints=len(self.problem.violations(Result("skipped", None), {})),
            population=self.population,
            offspring=self.offspring,
            seed=seed,
            start=start,
        )

    def engine(self, study: Study, pool: Any, stops: Stops, **more: Any) -> Engine:
        return Engine(study, self.space, self.costs, self.problem, pool, stops, 1000, **more)

    def search(
        self,
        folder: Path,
        pool: FakePool,
        stops: Stops,
        algorithm: Algorithm | None = None,
        **more: Any,
    ) -> str:
        """Begin or go on, as :func:`bitwright.search_precisions` does."""
        known = folder.is_dir()
        with Study(folder, write=True) if known else Study.create(folder, {}) as study:
            engine = self.engine(study, pool, stops, **more)
            engine.baselines(self.ends)
            return engine.run(algorithm or self.algorithm())


def setup(
    accelerator: targets.Accelerator = BIT_FUSION,
    objectives: str = "error,speedup",
    constraints: Sequence[str] = (),
    layers: Sequence[Layer] = LAYERS,
    **options: Any,
) -> Setup:
    """Make a search over the layers; options are those of the space."""
    space = make_space([layer.name for layer in layers], accelerator, **options)
    costs = Costs(accelerator, layers, cost_table(accelerator, layers))
    problem = Problem(
        SHARE,
        parse_objectives(objectives, SHARE),
        tuple(parse_constraint(text, SHARE) for text in constraints),
        FLOAT_ERROR,
    )
    narrow, wide = narrowest_and_widest(space)
    reference = references(
        problem, space, costs, narrowest_error=error_of(narrow), widest_error=error_of(wide)
    )
    return Setup(space, costs, replace(problem, reference=reference))


def evaluation(
    number: int,
    error: float | None,
    gains: Mapping[str, float],
    *,
    status: Any = "ok",
    origin: str = "search",
) -> Evaluation:
    """An evaluation whose plan does not matter, but is its own."""
    bits = (2, 4, 8, 16)
    digits = [number // 4**place % 4 for place in range(8)]
    plan = tuple(
        Precision(bits[a], bits[b]) for a, b in zip(digits[::2], digits[1::2], strict=True)
    )
    return Evaluation(number, plan, origin, Result(status, error, error, 10, 0.25), gains)


def own_process(code: str, *arguments: object) -> dict[str, Any]:
    """Arguments of :mod:`subprocess` for a process of its own, which imports what tests import."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return {"args": command, "cwd": Path(__file__).parents[2]}
