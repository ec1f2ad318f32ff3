"""What toggled on the link: the report of ``run --count-transitions`` and of ``bitwright link``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright.targets.link import ROW_MAJOR, UNSORTED, Link, Part

__all__ = ["LayerTransitions", "PartTransitions", "Sent", "Transitions"]


@dataclass(frozen=True, slots=True)
class PartTransitions:
    """One operand's share of the traffic, or that of the index.

    Attributes
    ----------
    flits
        How many were sent. Of a paired flit both operands' halves count, each as one here.
    transitions
        int64, shape (lanes, word bits): how often each wire changed, the lowest bit first.
    """

    flits: int
    transitions: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        """Transitions of all wires."""
        return int(self.transitions.sum())

    def __add__(self, other: PartTransitions) -> PartTransitions:
        return PartTransitions(self.flits + other.flits, self.transitions + other.transitions)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "flits": self.flits,
            "transitions": self.total,
            "per_lane_and_bit": self.transitions.tolist(),
        }


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent in one order.

    Attributes
    ----------
    parts
        ``inputs``, ``weights``, and ``index`` where the order sends one.
    words_sorted
        Words that went through the sorting unit; 0 where orders are known at compile time.
    bound
        Whether no hardware makes the order: what it saves is a bound.
    """

    parts: Mapping[Part, PartTransitions]
    words_sorted: int = 0
    bound: bool = False

    @property
    def transitions(self) -> int:
        """Transitions of all parts."""
        return sum(part.total for part in self.parts.values())

    @property
    def needs_unit(self) -> bool:
        """Whether hardware makes the order while the model runs."""
        return self.words_sorted > 0

    def __add__(self, other: Sent) -> Sent:
        parts = dict(self.parts)
        for name, part in other.parts.items():
            parts[name] = parts[name] + part if name in parts else part
        words_sorted = self.words_sorted + other.words_sorted
        return Sent(parts, words_sorted, self.bound or other.bound)


@dataclass(frozen=True, slots=True)
class LayerTransitions:
    """The traffic of a layer.

    Attributes
    ----------
    layer
        The ONNX node.
    sent
        What was sent, by order: :data:`~bitwright.targets.link.ROW_MAJOR`,
        :data:`~bitwright.targets.link.UNSORTED`, and orders as
        :meth:`~bitwright.targets.orders.Order.parse` reads them.
    reason
        Why the layer has its order, or none; empty where it was asked for.
    """

    layer: str
    sent: Mapping[str, Sent]
    reason: str = ""

    def __getitem__(self, order: str) -> Sent:
        """What was sent in an order; unsorted where the layer does not have it."""
        return self.sent.get(order, self.sent[UNSORTED])

    def __add__(self, other: LayerTransitions) -> LayerTransitions:
        sent = {order: found + other.sent[order] for order, found in self.sent.items()}
        return LayerTransitions(self.layer, sent, self.reason)


@dataclass(frozen=True, slots=True)
class Transitions:
    """Bit transitions on the link, layer by layer.

    Attributes
    ----------
    source
        The model or the artefact.
    samples
        How many were sent.
    link
        The link.
    orders
        The orders that are compared with sending unsorted.
    layers
        The layers whose operands were sent, in order of execution.
    skipped
        Layers that are left out, and why.
    notes
        What else a reader of the figures has to know.
    """

    source: str
    samples: int
    link: Link
    orders: tuple[str, ...]
    layers: tuple[LayerTransitions, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __getitem__(self, layer: str) -> LayerTransitions:
        return next(entry for entry in self.layers if entry.layer == layer)

    def total(self, order: str) -> Sent:
        """All layers together; those that do not have the order are sent unsorted.

        Raises
        ------
        KeyError
            If the order was not counted: it is named as in :attr:`orders`.
        """
        if order not in (ROW_MAJOR, UNSORTED, *self.orders):
            raise KeyError(order)
        total = Sent({})
        for layer in self.layers:
            total = total + layer[order]
        return total

    def energy_pj(self, sent: Sent) -> float:
        """Energy of the wires, in pJ."""
        return self.link.energy_pj_per_transition.value * sent.transitions

    def unit_energy_pj(self, sent: Sent) -> float | None:
        """Energy of the sorting unit, in pJ; None where the link does not tell it, or none does."""
        if sent.bound:
            return None
        if not sent.needs_unit:
            return 0.0
        number = self.link.energy_pj_per_word
        return None if number is None else number.value * sent.words_sorted

    def saved(self, sent: Sent, baseline: Sent) -> float | None:
        """Share of the transitions of a baseline that an order takes off."""
        return 1 - sent.transitions / baseline.transitions if baseline.transitions else None

    def net_saved_pj(self, sent: Sent, baseline: Sent) -> float | None:
        """Energy that an order saves, less that of the sorting unit; None where that is unknown."""
        unit = self.unit_energy_pj(sent)
        return None if unit is None else self.energy_pj(baseline) - self.energy_pj(sent) - unit

    def break_even_pj_per_word(self, sent: Sent, baseline: Sent) -> float | None:
        """What a unit may spend on a word, in pJ, before an order costs more than it saves."""
        saved = self.energy_pj(baseline) - self.energy_pj(sent)
        return saved / sent.words_sorted if sent.needs_unit else None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        total = {order: self.total(order) for order in (ROW_MAJOR, UNSORTED, *self.orders)}
        return {
            "source": self.source,
            "samples": self.samples,
            "link": self.link.model_dump(mode="json"),
            "orders": list(self.orders),
            "layers": [
                {
                    "layer": layer.layer,
                    "reason": layer.reason,
                    "sent": self._sent(layer.sent),
                }
                for layer in self.layers
            ],
            "total": self._sent(total),
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }

    def _sent(self, sent: Mapping[str, Sent]) -> dict[str, Any]:
        return {
            order: {
                "transitions": entry.transitions,
                "saved_against_row_major": self.saved(entry, sent[ROW_MAJOR]),
                "saved_against_unsorted": self.saved(entry, sent[UNSORTED]),
                "energy_pj": self.energy_pj(entry),
                "words_sorted": entry.words_sorted,
                "unit_energy_pj": self.unit_energy_pj(entry),
                "net_saved_pj": self.net_saved_pj(entry, sent[UNSORTED]),
                "break_even_pj_per_word": self.break_even_pj_per_word(entry, sent[UNSORTED]),
                "parts": {name: part.to_dict() for name, part in entry.parts.items()},
            }
            for order, entry in sent.items()
        }
