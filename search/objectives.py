"""What a search optimises, and what it may not exceed.

Error comes from an evaluator; everything else from the cost model of the target, summed from a
table of the costs of all layers at all precisions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from bitwright.errors import UsageError
from bitwright.search.space import Plan, widest
from bitwright.targets import Accelerator
from bitwright.targets.cost_table import QUANTITIES, CostTable
from bitwright.vocabulary import Layer, Precision

__all__ = [
    "GAINS",
    "Constraint",
    "Costs",
    "ErrorScale",
    "Gain",
    "Objective",
    "parse_constraint",
    "parse_objectives",
]

_FLOAT_BITS: Final = 32
_VECTOR_BITS: Final = 16
_OPERATIONS_PER_VECTOR_VALUE: Final = 10  # as in bitwright.targets.mohaq


@dataclass(frozen=True, slots=True)
class Gain:
    """A quantity of the hardware that can be an objective.

    Attributes
    ----------
    name, unit, summary
        What it is; the unit of what :class:`Costs` gives, "" for none.
    maximize
        Whether more is better.
    """

    name: str
    unit: str
    maximize: bool
    summary: str


GAINS: Final = {
    gain.name: gain
    for gain in (
        Gain("memory", "bytes", False, "weights at their bits"),
        Gain("compression", "x", True, "weights at 32 bits over memory"),
        Gain("speedup", "x", True, "cycles at the widest precision over cycles, end to end"),
        Gain("mean_speedup", "x", True, "MOHAQ's: each operation's speedup, the mean of all"),
        Gain("cycles", "cycles", False, "clock cycles of one run"),
        Gain("relative_cycles", "cycles", False, "MACs over relative speeds"),
        Gain("time", "ms", False, "time of one run at the target's clock"),
        Gain("energy", "uJ", False, "energy of one run"),
        Gain("traffic", "bytes", False, "read from and written to external memory in one run"),
    )
}

# Units that a constraint may be given in, as multiples of an objective's own.
_UNITS: Final[Mapping[str, Mapping[str, float]]] = {
    "bytes": {
        "b": 1.0, "byte": 1.0, "bytes": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9,
        "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30,
    },
    "uJ": {"pj": 1e-6, "nj": 1e-3, "uj": 1.0, "mj": 1e3, "j": 1e6},
    "ms": {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3},
    "x": {"x": 1.0},
    "cycles": {"cycles": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ErrorScale:
    """How the value of a metric becomes an error, of which less is better.

    Attributes
    ----------
    metric
        The metric's name.
    unit
        The metric's unit; ``fraction`` is shown in percent.
    higher_is_better
        Which way the metric is good.
    """

    metric: str
    unit: str
    higher_is_better: bool

    def error(self, value: float) -> float:
        """The error: 1 - value for shares that should be high, -value for the rest of these."""
        if not self.higher_is_better:
            return value
        # Rounded, as 1 - 0.993 is not quite 0.007.
        return round(1.0 - value, 12) if self.unit == "fraction" else -value

    @property
    def shown_unit(self) -> str:
        """Unit of an error as people read it."""
        return "%" if self.unit == "fraction" else self.unit

    def shown(self, error: float) -> float:
        """An error as people read it: in percent, or as the metric itself."""
        if self.unit == "fraction":
            return round(100.0 * error, 10)
        return -error if self.higher_is_better else error

    @property
    def name(self) -> str:
        """What the shown error is."""
        inverted = self.higher_is_better and self.unit != "fraction"
        return self.metric if inverted else "error"

    @property
    def maximize(self) -> bool:
        """Whether more of what is shown is better."""
        return self.higher_is_better and self.unit != "fraction"


@dataclass(frozen=True, slots=True)
class Objective:
    """One axis of the front; ``maximize`` is about the value as it is shown."""

    name: str
    unit: str
    maximize: bool

    def cost(self, value: float) -> float:
        """The value as something to minimise."""
        return -value if self.maximize else value

    def to_dict(self) -> dict[str, Any]:
        """Return what a study and ``--json`` hold."""
        direction = "maximize" if self.maximize else "minimize"
        return {"name": self.name, "unit": self.unit, "direction": direction}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A limit that plans of the front meet.

    Attributes
    ----------
    name
        The objective it is about; it need not be one of the search.
    sense
        ``<=`` or ``>=``.
    limit
        In the unit of the objective as it is shown.
    relative
        Whether the limit is an increase over the float model's error.
    """

    name: str
    sense: Literal["<=", ">="]
    limit: float
    relative: bool = False
    text: str = ""

    def absolute(self, base: float | None) -> float:
        """The limit itself, ``base`` being the float model's value."""
        return self.limit + (base if self.relative and base is not None else 0.0)

    def violation(self, value: float, base: float | None = None) -> float:
        """How far a value is beyond the limit, relative to the limit; 0 or less if it is met."""
        limit = self.absolute(base)
        beyond = value - limit if self.sense == "<=" else limit - value
        return beyond / max(abs(limit), 1e-12)


_CONSTRAINT = re.compile(
    r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(<=|>=|<|>|=)\s*([+-]?)\s*"
    r"([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z%]*)\s*"
)


def parse_objectives(text: str | Sequence[str], error: ErrorScale) -> tuple[Objective, ...]:
    """Read a list of objectives, ``error,speedup,energy``.

    Raises
    ------
    UsageError
        If one is unknown or stands twice, or there are fewer than two.
    """
    names = [
        name.strip()
        for entry in ([text] if isinstance(text, str) else text)
        for name in entry.split(",")
        if name.strip()
    ]
    found: dict[str, Objective] = {}
    for name in names:
        objective = _objective(name, error, "--objectives")
        if objective.name in found:
            raise UsageError(f"objective {name!r} stands twice", where="--objectives")
        found[objective.name] = objective
    if len(found) < 2:
        raise UsageError(
            "a front needs two objectives or more",
            where="--objectives",
            fix="for example error,speedup",
        )
    return tuple(found.values())


def _objective(name: str, error: ErrorScale, where: str) -> Objective:
    if name in ("error", error.name):
        return Objective(error.name, error.shown_unit, error.maximize)
    if name in GAINS:
        gain = GAINS[name]
        return Objective(gain.name, gain.unit, gain.maximize)
    fix = f"choose from error, {', '.join(GAINS)}"
    if name == error.metric:
        fix = (
            f"the error that {name} gives is called error, of which less is better: error<=5%, say"
        )
    raise UsageError(f"there is no objective {name!r}", where=where, fix=fix)


def parse_constraint(text: str, error: ErrorScale, *, where: str = "--constraint") -> Constraint:
    """Read a constraint: ``memory<=2MiB``, ``error<=5%``, ``error<=+2pp``, ``speedup>=2``.

    Raises
    ------
    UsageError
        If it cannot be understood.
    """
    match = _CONSTRAINT.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text!r} is no constraint",
            where=where,
            fix="write it like memory<=2MiB, error<=5%, error<=+2pp (more than the float model)",
        )
    name, sense, sign, number, unit = match.groups()
    objective = _objective(name, error, where)
    wanted = ">=" if objective.maximize else "<="
    if sense[0] != wanted[0]:
        better = "more" if objective.maximize else "less"
        raise UsageError(
            f"{text!r}: of {objective.name}, {better} is better",
            where=where,
            fix=f"write {objective.name}{wanted}{sign}{number}{unit}",
        )
    is_error = objective.name == error.name
    relative = is_error and sign == "+"
    if not is_error and sign:
        raise UsageError(
            f"{text!r}: only the error can be limited relative to the float model",
            where=where,
            fix=f"write {objective.name}{wanted}{number}{unit}",
        )
    if relative and objective.maximize:
        raise UsageError(
            f"{text!r}: only an error can be limited relative to the float model, and "
            f"{objective.name} is none",
            where=where,
            fix=f"write the value itself, {objective.name}{wanted}{number}{unit}",
        )
    factor = _unit(unit, objective, text, relative=relative, where=where)
    limit = float(number) * factor * (-1.0 if sign == "-" else 1.0)
    if not math.isfinite(limit) or (limit < 0 and objective.unit == "%"):
        raise UsageError(
            f"{text!r}: there is no such limit",
            where=where,
            fix="an error is at least 0%" if math.isfinite(limit) else "give a number that exists",
        )
    return Constraint(
        objective.name, ">=" if objective.maximize else "<=", limit, relative, text.strip()
    )


def _unit(unit: str, objective: Objective, text: str, *, relative: bool, where: str) -> float:
    if objective.unit == "%":
        known = {"%": 1.0} | ({"pp": 1.0} if relative else {})
        if unit not in known:
            other = " (a limit relative to the float model is written +2pp)" if unit == "pp" else ""
            raise UsageError(
                f"{text!r} has {'no unit' if not unit else f'the unit {unit!r}'}{other}",
                where=where,
                fix="write error<=5%, or error<=+2pp for two points more than the float model",
            )
        return 1.0
    units = _UNITS.get(objective.unit, {objective.unit.lower(): 1.0})
    if objective.unit == "bytes" and not unit:
        raise UsageError(f"{text!r} has no unit", where=where, fix="write it like memory<=2MiB")
    if unit and unit.lower() not in units:
        raise UsageError(
            f"{text!r}: {unit!r} is no unit of {objective.name}",
            where=where,
            fix=f"choose one of {', '.join(units)}" if units != {"": 1.0} else "give no unit",
        )
    return units[unit.lower()] if unit else 1.0


class Costs:
    """The gains of plans on one accelerator.

    Parameters
    ----------
    accelerator
        What the plans are to run on.
    layers
        The layers, in order of execution.
    table
        Costs of all layers at all precisions that plans may have.
    vector_values
        Values beside the weights that count as memory, at 16 bits each.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layers: Sequence[Layer],
        table: CostTable,
        *,
        vector_values: int = 0,
    ) -> None:
        self._accelerator = accelerator
        self._layers = list(layers)
        self._table = table
        self._vector_bits = _VECTOR_BITS * vector_values
        self._values = sum(layer.weight_count for layer in layers) + vector_values
        self._operations = (
            sum(layer.macs or 0 for layer in layers) + _OPERATIONS_PER_VECTOR_VALUE * vector_values
        )
        self._index = {precision: n for n, precision in enumerate(table.precisions)}
        base = widest(accelerator.allowed_precisions)
        self.baseline = base
        self._base = self._index[base]

    @property
    def table(self) -> CostTable:
        """Costs of all layers at all precisions."""
        return self._table

    def available(self) -> list[str]:
        """Names of the gains that the cost model defines."""
        found = self.of((self.baseline,) * len(self._layers))
        return [name for name, value in found.items() if not math.isnan(value)]

    def of(self, plan: Plan) -> dict[str, float]:
        """All gains of a plan, by name; NaN where the cost model does not define one."""
        return {name: float(value) for name, value in self.of_many(self.choice(plan)).items()}

    def choice(self, plan: Plan) -> npt.NDArray[np.intp]:
        """Index of each layer's precision in the table, ``[layers]``."""
        return np.array([self._index[precision] for precision in plan], dtype=np.intp)

    def of_many(self, choices: npt.NDArray[np.intp]) -> dict[str, npt.NDArray[np.float64]]:
        """Gains of many plans at once, as in :meth:`of`: of ``[..., layers]`` indices ``[...]``."""
        total = dict(zip(QUANTITIES, np.moveaxis(self._table.totals(choices), -1, 0), strict=True))
        memory_bits = total["weight_bits"] + self._vector_bits
        base = self._totals_of_base
        cycles = "cycles" if not math.isnan(base["cycles"]) else "relative_cycles"
        ratios = self._ratios[np.arange(len(self._layers)), choices]
        return {
            "memory": np.ceil(memory_bits / 8),
            "compression": self._values * _FLOAT_BITS / memory_bits,
            "speedup": base[cycles] / total[cycles],
            "mean_speedup": (self._macs * ratios).sum(axis=-1) / self._operations,
            "cycles": total["cycles"],
            "relative_cycles": total["relative_cycles"],
            "time": 1e3 * total["seconds"],
            "energy": (total["total_energy_pj"] + self._vector_energy_pj) / 1e6,
            "traffic": (total["dram_read_bits"] + total["dram_write_bits"]) / 8,
        }

    @cached_property
    def _vector_energy_pj(self) -> float:
        """Of loading them; like ``ModelCost`` nothing where the cost model does not define it."""
        vector_values = self._vector_bits // _VECTOR_BITS
        model = self._accelerator.model_cost((), {}, vector_values=vector_values)
        return model.vector_energy_pj or 0.0

    @cached_property
    def _macs(self) -> npt.NDArray[np.float64]:
        return np.array([layer.macs or 0 for layer in self._layers], dtype=np.float64)

    @cached_property
    def _totals_of_base(self) -> dict[str, float]:
        choice = np.full(len(self._layers), self._base)
        return dict(zip(QUANTITIES, self._table.totals(choice).tolist(), strict=True))

    @cached_property
    def _ratios(self) -> npt.NDArray[np.float64]:
        """Speed of each layer at each precision, relative to the baseline."""
        values = self._table.values
        column = QUANTITIES.index("cycles")
        if np.isnan(values[:, :, column]).any():
            column = QUANTITIES.index("relative_cycles")
        cycles = values[:, :, column]
        ratios: npt.NDArray[np.float64] = cycles[:, self._base, None] / cycles
        return ratios

    def bounds(self, name: str, choices: Mapping[str, Sequence[Precision]]) -> tuple[float, float]:
        """Least and largest value of a gain over all plans that choose so.

        Sums are least where every part is; memory, cycles and the like are sums.
        """
        low: list[Precision] = []
        high: list[Precision] = []
        for number, layer in enumerate(self._layers):
            options = list(choices[layer.name])
            values = [self._single(name, number, precision) for precision in options]
            low.append(options[int(np.argmin(values))])
            high.append(options[int(np.argmax(values))])
        ends = [self.of(tuple(low))[name], self.of(tuple(high))[name]]
        return min(ends), max(ends)

    def _single(self, name: str, layer: int, precision: Precision) -> float:
        index = self._index[precision]
        row: dict[str, float] = dict(
            zip(QUANTITIES, self._table.values[layer, index].tolist(), strict=True)
        )
        if name in ("memory", "compression"):
            return row["weight_bits"]
        if name == "energy":
            return row["total_energy_pj"]
        if name == "traffic":
            return row["dram_read_bits"] + row["dram_write_bits"]
        if name == "time":
            return row["seconds"]
        if name == "mean_speedup":
            return float(self._ratios[layer, index])
        if name == "relative_cycles":
            return row["relative_cycles"]
        return row["cycles"] if not math.isnan(row["cycles"]) else row["relative_cycles"]
