"""What an evaluation measures.

A metric is a class without constructor arguments that follows :class:`Metric`. bitwright's own come
in by the entry-point group ``bitwright.metrics``, and so do those of others; ``module:Class`` names
one without an entry point.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import ClassVar, Literal, Protocol

import numpy as np

from bitwright.errors import DataError, UsageError
from bitwright.quant.float_ops import Array

__all__ = ["MeanSquaredError", "Metric", "Sqnr", "Top1", "Top5", "get_metric", "metric_names"]

_GROUP = "bitwright.metrics"


class Metric(Protocol):
    """Measures the outputs of a model, batch by batch.

    Attributes
    ----------
    unit
        Unit of the value, "" for none; ``fraction`` is shown in percent.
    higher_is_better
        Which way is good.
    needs
        What outputs are measured against: ``labels`` from the data, or the ``outputs`` of the
        float model.
    """

    unit: ClassVar[str]
    higher_is_better: ClassVar[bool]
    needs: ClassVar[Literal["labels", "outputs"]]

    def update(
        self, outputs: Mapping[str, Array], labels: Array | None, expected: Mapping[str, Array]
    ) -> None:
        """Add a batch; ``labels`` or ``expected`` (by output name) is there as ``needs`` says."""

    def value(self) -> float:
        """Value over all batches."""


class _TopK:
    unit: ClassVar[str] = "fraction"
    higher_is_better: ClassVar[bool] = True
    needs: ClassVar[Literal["labels", "outputs"]] = "labels"
    k: ClassVar[int]

    def __init__(self) -> None:
        self._right = self._total = 0

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,
        expected: Mapping[str, Array],  # noqa: ARG002 - part of the protocol
    ) -> None:
        scores = next(iter(outputs.values()))
        assert labels is not None
        if scores.shape[:-1] != labels.shape or scores.ndim < 1:
            if scores.ndim < 1 or labels.size != math.prod(scores.shape[:-1]):
                raise DataError(
                    f"labels of shape {list(labels.shape)} do not fit outputs of shape "
                    f"{list(scores.shape)}",
                    fix="give one label for every vector of class scores",
                )
            labels = labels.reshape(scores.shape[:-1])
        classes = scores.shape[-1]
        whole = labels.dtype.kind in "iu"
        if not whole or labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
            raise DataError(
                f"labels must be whole numbers from 0 to {classes - 1}",
                fix="store the index of the right class of every sample",
            )
        # Of equal scores the first class wins, as with argmax: it counts those in front as better.
        right = np.take_along_axis(scores, labels[..., None].astype(np.int64), -1)
        index = np.arange(classes)
        better = (scores > right) | ((scores == right) & (index < labels[..., None]))
        self._right += int((better.sum(axis=-1) < self.k).sum())
        self._total += labels.size

    def value(self) -> float:
        return self._right / self._total if self._total else math.nan


class Top1(_TopK):
    """Share of labels that have the highest score of the first output (last axis: classes)."""

    k = 1


class Top5(_TopK):
    """Share of labels among the five highest scores of the first output."""

    k = 5


class MeanSquaredError:
    """Mean squared difference from the float model's outputs, over all outputs."""

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    needs: ClassVar[Literal["labels", "outputs"]] = "outputs"

    def __init__(self) -> None:
        self._noise = self._signal = 0.0
        self._count = 0

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,  # noqa: ARG002 - part of the protocol
        expected: Mapping[str, Array],
    ) -> None:
        """Add the squared differences of a batch."""
        for name, wanted in expected.items():
            signal = wanted.astype(np.float64)
            if outputs[name].shape != signal.shape:
                raise DataError(
                    f"output {name!r} has shape {list(outputs[name].shape)}, that of the float "
                    f"model {list(signal.shape)}"
                )
            self._noise += float(np.square(outputs[name] - signal).sum())
            self._signal += float(np.square(signal).sum())
            self._count += signal.size

    def value(self) -> float:
        """Mean squared error."""
        return self._noise / self._count if self._count else math.nan


class Sqnr(MeanSquaredError):
    """Signal to quantization noise ratio of all outputs against the float model's, in dB."""

    unit = "dB"
    higher_is_better = True

    def value(self) -> float:
        """10 log10(signal / noise)."""
        if self._noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self._signal / self._noise) if self._signal else -math.inf


def metric_names() -> list[str]:
    """Names of the metrics that are installed."""
    return sorted({entry.name for entry in entry_points(group=_GROUP)})


def get_metric(name: str) -> Metric:
    """Make a metric.

    Parameters
    ----------
    name
        A name from :func:`metric_names`, or ``package.module:Class``.

    Raises
    ------
    UsageError
        If there is no such metric, two packages claim the name, or it cannot be loaded.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        # A metric lies in the user's folder more often than among the installed packages.
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - sys.path holds texts
        try:
            factory = getattr(import_module(module), attribute)
        except Exception as error:  # a module of the user may raise anything
            raise UsageError(
                f"metric {name!r} cannot be loaded ({type(error).__name__}: {error})"
            ) from error
        finally:
            sys.path.pop(0)
    else:
        found = list(entry_points(group=_GROUP, name=name))
        if not found:
            raise UsageError(
                f"there is no metric {name!r}",
                fix=f"choose one of {', '.join(metric_names())}, or package.module:Class",
            )
        if len({entry.value for entry in found}) > 1:
            owners = ", ".join(entry.value for entry in found)
            raise UsageError(f"metric {name!r} is claimed twice: {owners}", fix="remove one")
        try:
            factory = found[0].load()
        except Exception as error:
            raise UsageError(
                f"metric {name!r} ({found[0].value}) cannot be loaded "
                f"({type(error).__name__}: {error})"
            ) from error
    try:
        metric: Metric = factory()
    except Exception as error:
        raise UsageError(
            f"metric {name!r} cannot be made ({type(error).__name__}: {error})",
            fix="a metric is a class without constructor arguments",
        ) from error
    members = ("unit", "higher_is_better", "needs", "update", "value")
    if missing := [member for member in members if not hasattr(metric, member)]:
        raise UsageError(
            f"metric {name!r} has no {missing[0]!r}",
            fix="bitwright.quant.metrics.Metric says what a metric has",
        )
    return metric
