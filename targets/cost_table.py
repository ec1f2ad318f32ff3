"""The costs of all layers of a model at all precisions: computed once, then summed for any plan."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bitwright.errors import PlanError, UsageError, first_line
from bitwright.targets.accelerators import Accelerator, checked_cost
from bitwright.vocabulary import Layer, LayerCost, Precision, PrecisionPlan

__all__ = ["QUANTITIES", "CostTable", "cache_file", "cost_table"]

logger = logging.getLogger(__name__)

QUANTITIES: Final = (
    "cycles",
    "stall_cycles",
    "relative_cycles",
    "dram_read_bits",
    "dram_write_bits",
    "weight_bits",
    "total_energy_pj",
    "seconds",
)
"""Columns of a table: attributes of :class:`bitwright.LayerCost`, each a sum over layers."""

_SCHEMA_VERSION: Final = 1
_STORED: Final = (*LayerCost.NUMBERS, "energy_pj", "bound")


@dataclass(frozen=True)
class CostTable:
    """Costs of every layer at every precision.

    Attributes
    ----------
    target
        Name of the accelerator.
    layers
        Names of the layers.
    precisions
        The precisions.
    values
        Array ``[layers, precisions, quantities]`` of float64; NaN where the cost model does not
        define a quantity. Counts below 2^53 are exact.
    costs
        The same, whole: ``costs[layer][precision]``.
    """

    target: str
    layers: tuple[str, ...]
    precisions: tuple[Precision, ...]
    values: npt.NDArray[np.float64]
    costs: tuple[tuple[LayerCost, ...], ...]

    def choice(self, plan: PrecisionPlan | Mapping[str, Precision]) -> npt.NDArray[np.intp]:
        """Index of each layer's precision, ``[layers]``.

        Raises
        ------
        PlanError
            If the plan leaves a layer out, or has a precision that is not in the table.
        """
        chosen = plan.layers if isinstance(plan, PrecisionPlan) else plan
        # A search asks this for every plan, with the table's own precisions: those are known by
        # identity, which is several times faster than by value.
        try:
            own = map(self._by_identity.__getitem__, map(id, self._precisions_in(chosen)))
            return np.fromiter(own, np.intp, len(self.layers))
        except KeyError:
            pass
        chosen = {name: Precision.of(precision) for name, precision in chosen.items()}
        index = {precision: number for number, precision in enumerate(self.precisions)}
        missing = [name for name in self.layers if chosen.get(name) not in index]
        if missing:
            raise PlanError(
                f"layer {missing[0]!r} has no precision that is in the table of costs: "
                f"{chosen.get(missing[0], 'none at all')}",
                where="plan",
                fix=f"the table has {', '.join(map(str, self.precisions))}",
            )
        return np.array([index[chosen[name]] for name in self.layers], dtype=np.intp)

    def totals(self, choice: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
        """Costs of whole plans.

        Parameters
        ----------
        choice
            Array ``[..., layers]``, indices of precisions.

        Returns
        -------
        array
            ``[..., quantities]``, in the order of :data:`QUANTITIES`.
        """
        total: npt.NDArray[np.float64] = np.add.reduce(self.values[self._rows, choice], axis=-2)
        return total

    @cached_property
    def _precisions_in(self) -> Callable[[Mapping[str, Precision]], tuple[Precision, ...]]:
        """Takes a plan's precisions in the order of the layers."""
        # The first one twice, as one item alone would not come as a tuple.
        taken = itemgetter(self.layers[0], *self.layers)
        return lambda chosen: taken(chosen)[1:]

    @cached_property
    def _by_identity(self) -> dict[int, int]:
        return {id(precision): number for number, precision in enumerate(self.precisions)}

    @cached_property
    def _rows(self) -> npt.NDArray[np.intp]:
        return np.arange(len(self.layers))


def cache_file() -> Path:
    """Where costs are kept between runs: in the user's folder for caches (``XDG_CACHE_HOME``)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bitwright" / "costs.sqlite"


def cost_table(
    accelerator: Accelerator,
    layers: Sequence[Layer],
    *,
    precisions: Sequence[Precision] | None = None,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CostTable:
    """Compute the costs of all layers at all precisions.

    Equal layers are computed once.

    Parameters
    ----------
    accelerator
        What they are to run on.
    layers
        The layers of a model.
    precisions
        By default all that the accelerator allows.
    cache
        A file of costs to use and add to, for example :func:`cache_file`. Entries are found by
        content: the cost model with its parameters, the layer's sizes, the precision. Each is
        written when its layer is done. A file that cannot be used is reported as a warning.
    progress
        Called with layers done and in total.

    Raises
    ------
    PlanError, UsageError, RunError
        As in :meth:`Accelerator.cost`.
    """
    if not layers:
        raise UsageError("there are no layers whose cost could be computed")
    chosen = tuple(accelerator.allowed_precisions if precisions is None else precisions)
    if not chosen:
        raise UsageError("there are no precisions whose cost could be computed")
    for layer in layers:  # what is refused is refused, whether its cost is known or not
        accelerator.check_costed(layer, chosen)
    known: dict[str, tuple[LayerCost, ...]] = {}
    costs: list[tuple[LayerCost, ...]] = []
    model = accelerator.cost_model
    digest = None if cache is None or model is None else model.digest
    if cache is not None and digest is None:
        logger.warning("costs are not kept in %s: the cost model's code is in no file", cache)
        cache = None
    with _Store(None if cache is None else Path(cache), digest) as store:
        for number, layer in enumerate(layers):
            key = _sizes(layer)
            if key not in known:
                found = store.load(key, layer)
                known[key] = tuple(
                    found.get(precision) or accelerator.cost(layer, precision)
                    for precision in chosen
                )
                store.save(key, [cost for cost in known[key] if cost.precision not in found])
            costs.append(tuple(replace(cost, layer=layer.name) for cost in known[key]))
            if progress is not None:
                progress(number + 1, len(layers))
    values = np.array(
        [
            [[np.nan if getattr(c, q) is None else getattr(c, q) for q in QUANTITIES] for c in row]
            for row in costs
        ],
        dtype=np.float64,
    )
    names = tuple(layer.name for layer in layers)
    return CostTable(accelerator.name, names, chosen, values, tuple(costs))


def _sizes(layer: Layer) -> str:
    """All of a layer that its costs depend on."""
    sizes = asdict(layer)
    for name in ("name", "input_shape", "weight_shape", "output_shape"):
        del sizes[name]
    sizes["weight_count"] = layer.weight_count
    return json.dumps(sizes, sort_keys=True)


class _Store:
    """Costs in an SQLite file; without a file, or with one that cannot be used, an empty one."""

    def __init__(self, path: Path | None, digest: str | None) -> None:
        self._path = path
        self._digest = digest
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> _Store:
        if self._path is not None:
            with self._told():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._database = sqlite3.connect(self._path, timeout=10)
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS costs"
                    " (layer TEXT, precision TEXT, cost TEXT, PRIMARY KEY (layer, precision))"
                )
        return self

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Go on without the file, and say so, where it cannot be used."""
        try:
            yield
        except Exception as error:  # a damaged file may hold anything
            logger.warning(
                "costs are not kept in %s (%s); if it is damaged, delete it",
                self._path,
                first_line(error),
            )
            if self._database is not None:
                self._database.close()
            self._database = None

    def _key(self, sizes: str) -> str:
        content = [_SCHEMA_VERSION, version("bitwright"), self._digest, sizes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def load(self, sizes: str, layer: Layer) -> dict[Precision, LayerCost]:
        found: dict[Precision, LayerCost] = {}
        if self._database is not None:
            with self._told():
                for text, cost in self._database.execute(
                    "SELECT precision, cost FROM costs WHERE layer = ?", (self._key(sizes),)
                ):
                    precision = Precision.parse(text)
                    read = LayerCost(layer=layer.name, precision=precision, **json.loads(cost))
                    found[precision] = checked_cost(read, layer, precision)
        return found

    def save(self, sizes: str, costs: Sequence[LayerCost]) -> None:
        if self._database is None or not costs:
            return
        rows = [
            (
                self._key(sizes),
                str(cost.precision),
                json.dumps({n: getattr(cost, n) for n in _STORED}),
            )
            for cost in costs
        ]
        with self._told(), self._database:
            self._database.executemany("INSERT OR IGNORE INTO costs VALUES (?, ?, ?)", rows)
