"""What an evaluation measures.

A metric is a class without constructor arguments that follows :class:`Metric`, or a function of
all outputs and labels. bitwright's own come in by the entry-point group ``bitwright.metrics``, and
so do those of others; ``module:name`` names one without an entry point.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from bitwright.errors import DataError, UsageError
from bitwright.quant.float_ops import Array

__all__ = [
    "Agreement",
    "Bounded",
    "CharacterAccuracy",
    "Choice",
    "Cloze4",
    "LastWord",
    "MeanSquaredError",
    "Metric",
    "NormalizedChoice",
    "Perplexity",
    "PhoneErrorRate",
    "Sqnr",
    "Top1",
    "Top5",
    "TopK",
    "WordErrorRate",
    "get_metric",
    "metric_names",
]

_GROUP = "bitwright.metrics"
_BLOCK = 1 << 15  # elements, 256 KiB of float64


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


@runtime_checkable
class Bounded(Protocol):
    """What a metric may have besides: a bound by which an evaluation can stop early."""

    def bound(self, remaining: int) -> float:
        """Best value that can still be reached when ``remaining`` more samples come."""


@runtime_checkable
class Grouped(Protocol):
    """What a metric has besides if samples belong together: it is to see all of them."""

    grouped: ClassVar[bool]


@runtime_checkable
class Placed(Protocol):
    """What a metric has besides if its labels are about places (steps of time) of a sample.

    Attributes
    ----------
    places_from
        The column of the labels [samples, columns] that is about the first place; those from there
        on end where a padded sample does.
    """

    places_from: ClassVar[int]


def first_place(metric: Metric) -> int | None:
    """The column of labels that is about the first place; None where they are not about places."""
    return metric.places_from if isinstance(metric, Placed) else None


def _refuse_labels(labels: Array, low: int | None, classes: int, fix: str) -> None:
    """Refuse what is no class number; without ``low`` every negative number is allowed."""
    whole = labels.dtype.kind in "iu"
    small = whole and low is not None and (labels < low).any()
    if not whole or small or (labels >= classes).any():
        span = f"up to {classes - 1}" if low is None else f"from {low} to {classes - 1}"
        raise DataError(f"labels must be whole numbers {span}", fix=fix)


def _labels_of_vectors(scores: Array, labels: Array) -> Array:
    """Give the labels the shape of the vectors (last axis) that they belong to."""
    if scores.ndim < 1 or labels.size != math.prod(scores.shape[:-1]):
        raise DataError(
            f"labels of shape {list(labels.shape)} do not fit outputs of shape "
            f"{list(scores.shape)}",
            fix="give one label for every vector of class scores",
        )
    return labels.reshape(scores.shape[:-1])


class TopK:
    """Share of labels among the ``k`` highest scores of the first output (last axis: classes)."""

    unit: ClassVar[str] = "fraction"
    higher_is_better: ClassVar[bool] = True
    needs: ClassVar[Literal["labels", "outputs"]] = "labels"
    places_from: ClassVar[int] = 0

    def __init__(self, k: int) -> None:
        self.k = k
        self._right = self._total = self._samples = 0

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,
        expected: Mapping[str, Array],  # noqa: ARG002 - part of the protocol
    ) -> None:
        """Add the labels of a batch."""
        scores = next(iter(outputs.values()))
        assert labels is not None
        samples = labels.shape[0] if labels.ndim else 1
        labels = _labels_of_vectors(scores, labels)
        classes = scores.shape[-1]
        _refuse_labels(labels, 0, classes, "store the index of the right class of every sample")
        if self.k > classes:
            raise DataError(
                f"the {self.k} highest scores are asked for, and there are {classes} classes",
                fix="choose a smaller K for topK",
            )
        self._total += labels.size
        self._samples += samples
        if self.k == 1:  # the same, at once
            self._right += int(np.count_nonzero(scores.argmax(axis=-1) == labels))
            return
        # Of equal scores the first class wins, as with argmax: it counts those in front as better.
        right = np.take_along_axis(scores, labels[..., None].astype(np.int64), -1)
        index = np.arange(classes)
        better = (scores > right) | ((scores == right) & (index < labels[..., None]))
        self._right += int((better.sum(axis=-1) < self.k).sum())

    def value(self) -> float:
        """Share of labels."""
        return self._right / self._total if self._total else math.nan

    def bound(self, remaining: int) -> float:
        """Value when all labels of ``remaining`` more samples are right."""
        # All samples have the same number of labels, which is not known before the first batch.
        coming = remaining * (self._total // self._samples if self._samples else 1)
        total = self._total + coming
        return (self._right + coming) / total if total else math.nan


class Top1(TopK):
    """Share of labels that have the highest score of the first output (last axis: classes)."""

    def __init__(self) -> None:
        super().__init__(1)


class Top5(TopK):
    """Share of labels among the five highest scores of the first output."""

    def __init__(self) -> None:
        super().__init__(5)


class _ErrorRate:
    """Substitutions, deletions and insertions of tokens a token of the reference.

    Errors and lengths are summed over all utterances before they are divided. As there may be any
    number of insertions, the rate may exceed 1.
    """

    unit: ClassVar[str] = "fraction"
    higher_is_better: ClassVar[bool] = False
    needs: ClassVar[Literal["labels", "outputs"]] = "labels"

    def __init__(self) -> None:
        self._errors = self._length = 0

    def _add(self, references: Sequence[Array], hypotheses: Sequence[Array]) -> None:
        import jiwer

        counts = jiwer.process_words(
            [" ".join(map(str, tokens)) for tokens in references],
            [" ".join(map(str, tokens)) for tokens in hypotheses],
        )
        self._errors += counts.substitutions + counts.deletions + counts.insertions
        self._length += counts.substitutions + counts.deletions + counts.hits

    def value(self) -> float:
        """Errors a token."""
        if self._length == 0:
            return math.inf if self._errors else math.nan
        return self._errors / self._length


def _without_repeats(tokens: Array) -> Array:
    """Keep the first of every run of equal tokens."""
    kept: Array = tokens[np.diff(tokens.astype(np.int64), prepend=-1) != 0]
    return kept


class PhoneErrorRate(_ErrorRate):
    """Phone error rate of a classifier of frames.

    The first output holds scores [batch, frames, classes], the labels [batch, frames] the class of
    every frame, or -1 where there is padding: such frames do not count. A run of frames of one
    class is one phone, in the outputs as in the labels.
    """

    places_from: ClassVar[int] = 0

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,
        expected: Mapping[str, Array],  # noqa: ARG002 - part of the protocol
    ) -> None:
        """Add the utterances of a batch."""
        scores = next(iter(outputs.values()))
        assert labels is not None
        if scores.ndim != 3 or labels.shape != scores.shape[:2]:
            raise DataError(
                f"labels of shape {list(labels.shape)} do not fit outputs of shape "
                f"{list(scores.shape)}",
                fix="give labels [batch, frames] for outputs [batch, frames, classes]",
            )
        _refuse_labels(labels, -1, scores.shape[-1], "store the class of every frame, or -1")
        spoken = labels >= 0
        self._add(
            [_without_repeats(row[here]) for row, here in zip(labels, spoken, strict=True)],
            [
                _without_repeats(row[here])
                for row, here in zip(scores.argmax(axis=-1), spoken, strict=True)
            ],
        )


class WordErrorRate(_ErrorRate):
    """Word error rate of a CTC model, decoded greedily.

    The first output holds scores [batch, frames, classes]; class 0 is the blank, every other one a
    word (or a piece of one, which then counts as a word). The labels [batch, words] hold the
    classes of the words, padded with -1.

    Decoding takes the best class of every frame, one of every run of equal classes, and drops the
    blanks: best path decoding of Graves et al., "Connectionist Temporal Classification", 2006.
    """

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,
        expected: Mapping[str, Array],  # noqa: ARG002 - part of the protocol
    ) -> None:
        """Add the utterances of a batch."""
        scores = next(iter(outputs.values()))
        assert labels is not None
        if scores.ndim != 3 or labels.ndim != 2 or labels.shape[0] != scores.shape[0]:
            raise DataError(
                f"labels of shape {list(labels.shape)} do not fit outputs of shape "
                f"{list(scores.shape)}",
                fix="give labels [batch, words] for outputs [batch, frames, classes]",
            )
        fix = "store the classes of the words, padded with -1"
        _refuse_labels(labels, -1, scores.shape[-1], fix)
        if (labels == 0).any():
            raise DataError("labels hold the class 0, which is the blank", fix=fix)
        paths = [_without_repeats(row) for row in scores.argmax(axis=-1)]
        self._add([row[row > 0] for row in labels], [path[path > 0] for path in paths])


def _losses(logits: Array, tokens: Array) -> Array:
    """Negative log-likelihood [places] of tokens [places] under logits [places, vocabulary]."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    right = np.take_along_axis(logits, tokens.astype(np.int64)[:, None], -1)[:, 0]
    # In place: logits are the largest array around.
    losses: Array = np.log(np.exp(logits, out=logits).sum(axis=-1)) - right
    return losses


_TOKENS_FIX = "store the token to predict at every place, and a negative number where there is none"


class Perplexity:
    """Exponential of the mean negative log-likelihood of the labels.

    The first output holds logits [..., vocabulary], the labels [...] the token to predict at every
    place (nothing is shifted), or a negative number where none is.
    """

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    needs: ClassVar[Literal["labels", "outputs"]] = "labels"
    places_from: ClassVar[int] = 0

    def __init__(self) -> None:
        self._loss = 0.0
        self._count = 0

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,
        expected: Mapping[str, Array],  # noqa: ARG002 - part of the protocol
    ) -> None:
        """Add the tokens of a batch."""
        scores = next(iter(outputs.values()))
        assert labels is not None
        labels = _labels_of_vectors(scores, labels)
        _refuse_labels(labels, None, scores.shape[-1], _TOKENS_FIX)
        counted = labels >= 0
        losses = _losses(scores[counted], labels[counted])
        self._loss += float(losses.sum())
        self._count += losses.size

    def value(self) -> float:
        """Perplexity; infinite if it is larger than any float."""
        if self._count == 0:
            return math.nan
        try:
            return math.exp(self._loss / self._count)
        except OverflowError:
            return math.inf


class _Share:
    """Share of what is right."""

    unit: ClassVar[str] = "fraction"
    higher_is_better: ClassVar[bool] = True
    needs: ClassVar[Literal["labels", "outputs"]] = "labels"

    def __init__(self) -> None:
        self._right = self._total = 0

    def value(self) -> float:
        """Share."""
        return self._right / self._total if self._total else math.nan


class CharacterAccuracy(_Share):
    """Share of places whose highest score is the label's.

    The first output holds scores [..., classes], the labels [...] the class at every place, or a
    negative number where the place does not count.
    """

    places_from: ClassVar[int] = 0

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,
        expected: Mapping[str, Array],  # noqa: ARG002 - part of the protocol
    ) -> None:
        """Add the places of a batch."""
        scores = next(iter(outputs.values()))
        assert labels is not None
        labels = _labels_of_vectors(scores, labels)
        fix = "store the class at every place, and a negative number where it does not count"
        _refuse_labels(labels, None, scores.shape[-1], fix)
        counted = labels >= 0
        self._right += int(np.count_nonzero(scores.argmax(axis=-1)[counted] == labels[counted]))
        self._total += int(np.count_nonzero(counted))


class Agreement(_Share):
    """Share of places whose highest score is that of the float model; first output [..., classes].

    Of equal scores the first class counts, in both.
    """

    needs: ClassVar[Literal["labels", "outputs"]] = "outputs"

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,  # noqa: ARG002 - part of the protocol
        expected: Mapping[str, Array],
    ) -> None:
        """Add the places of a batch."""
        name, wanted = next(iter(expected.items()))
        scores = outputs[name]
        if scores.shape != wanted.shape or scores.ndim < 1:
            raise DataError(
                f"output {name!r} has shape {list(scores.shape)}, that of the float model "
                f"{list(wanted.shape)}; agreement compares vectors of scores"
            )
        same = scores.argmax(axis=-1) == wanted.argmax(axis=-1)
        self._right += int(np.count_nonzero(same))
        self._total += int(same.size)


class LastWord(_Share):
    """Share of samples whose last word is predicted, all its tokens greedily.

    The first output holds logits [..., time, vocabulary], the labels [..., time] the token to
    predict at the places of the last word (nothing is shifted), and a negative number elsewhere. A
    sample, a row of the labels, is right if the highest logit at each of its places is the label's:
    the accuracy of LAMBADA (Paperno et al., 2016) as lm-eval measures it.
    """

    places_from: ClassVar[int] = 0

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,
        expected: Mapping[str, Array],  # noqa: ARG002 - part of the protocol
    ) -> None:
        """Add the samples of a batch."""
        scores = next(iter(outputs.values()))
        assert labels is not None
        labels = _labels_of_vectors(scores, labels)
        _refuse_labels(labels, None, scores.shape[-1], _TOKENS_FIX)
        if labels.ndim < 1:
            raise DataError(
                f"outputs of shape {list(scores.shape)} have no axis of time",
                fix="the last word is measured on logits [..., time, vocabulary]",
            )
        rows = labels.reshape(-1, labels.shape[-1])
        counted = rows >= 0
        if not counted.any(axis=-1).all():
            raise DataError(
                "a sample has no last word: all its labels are negative", fix=_TOKENS_FIX
            )
        found = scores.argmax(axis=-1).reshape(rows.shape)
        self._right += int(((found == rows) | ~counted).all(axis=-1).sum())
        self._total += len(rows)


_CHOICE_FIX = (
    "a row of the labels is [item, 1 for the right option or 0, length of the option in "
    "characters, then the tokens to predict, negative where the place is not of the option]"
)


class Choice:
    """Multiple choice by log-likelihood: share of items whose right option is the likeliest.

    Every sample is one option behind its context. The first output holds logits [samples, time,
    vocabulary]; the labels [samples, 3 + time] hold the number of the item, 1 for the right option
    (otherwise 0), the length of the option in characters, and from there on, as for the perplexity,
    the token to predict at the places of the option, and a negative number elsewhere. Samples of
    one number are one item; any item may have any number of options from two on.

    The likelihoods of an option's tokens are multiplied; of equal options the first wins. That is
    ``acc`` of lm-eval.
    """

    unit: ClassVar[str] = "fraction"
    higher_is_better: ClassVar[bool] = True
    needs: ClassVar[Literal["labels", "outputs"]] = "labels"
    places_from: ClassVar[int] = 3
    grouped: ClassVar[bool] = True

    options: ClassVar[int | None] = None
    by_length: ClassVar[bool] = False

    def __init__(self) -> None:
        # Of every item its options: log-likelihood, and whether it is the right one.
        self._items: dict[int, list[tuple[float, bool]]] = {}

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,
        expected: Mapping[str, Array],  # noqa: ARG002 - part of the protocol
    ) -> None:
        """Add the options of a batch."""
        scores = next(iter(outputs.values()))
        assert labels is not None
        if scores.ndim == 2:  # a model without a batch
            scores = scores[None]
        if scores.ndim != 3 or labels.shape != (scores.shape[0], scores.shape[1] + 3):
            raise DataError(
                f"labels of shape {list(labels.shape)} do not fit outputs of shape "
                f"{list(scores.shape)}",
                fix=_CHOICE_FIX,
            )
        _refuse_labels(labels[:, 3:], None, scores.shape[-1], _CHOICE_FIX)
        for row, logits in zip(labels, scores, strict=True):
            item, right, length, tokens = int(row[0]), int(row[1]), int(row[2]), row[3:]
            counted = tokens >= 0
            if right not in (0, 1) or length < 1 or not counted.any():
                raise DataError(
                    f"an option of item {item} begins {[right, length]} and has "
                    f"{int(counted.sum())} tokens",
                    fix=_CHOICE_FIX,
                )
            likelihood = -float(_losses(logits[counted], tokens[counted]).sum())
            if self.by_length:
                likelihood /= length
            self._items.setdefault(item, []).append((likelihood, right == 1))

    def value(self) -> float:
        """Share of items."""
        chosen = 0
        for item, options in self._items.items():
            if self.options is not None and len(options) != self.options:
                raise DataError(
                    f"item {item} has {len(options)} options, not {self.options}",
                    fix="the metric `choice` takes any number of them",
                )
            rights = [right for _, right in options]
            if len(options) < 2 or sum(rights) != 1:
                raise DataError(
                    f"item {item} has {len(options)} options, {sum(rights)} of them right",
                    fix=f"an item has at least two options, one of them right; {_CHOICE_FIX}",
                )
            chosen += rights[int(np.argmax([likelihood for likelihood, _ in options]))]
        return chosen / len(self._items) if self._items else math.nan


class NormalizedChoice(Choice):
    """:class:`Choice` by log-likelihood a character of the option: ``acc_norm`` of lm-eval."""

    by_length = True


class Cloze4(Choice):
    """:class:`Choice` among exactly four options."""

    options = 4


def _sum_of_squares(a: Array, b: Array | None = None) -> float:
    """Sum of a^2 or (a - b)^2 in float64, in blocks that stay in the cache."""
    total = 0.0
    for start in range(0, a.size, _BLOCK):
        part = a.reshape(-1)[start : start + _BLOCK].astype(np.float64)
        if b is not None:
            part -= b.reshape(-1)[start : start + _BLOCK]
        total += float(np.square(part, out=part).sum())
    return total


class MeanSquaredError:
    """Mean squared difference from the float model's outputs, over all outputs."""

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    needs: ClassVar[Literal["labels", "outputs"]] = "outputs"

    def __init__(self) -> None:
        self._noise = 0.0
        self._count = 0

    def update(
        self,
        outputs: Mapping[str, Array],
        labels: Array | None,  # noqa: ARG002 - part of the protocol
        expected: Mapping[str, Array],
    ) -> None:
        """Add the squared differences of a batch."""
        for name, wanted in expected.items():
            if outputs[name].shape != wanted.shape:
                raise DataError(
                    f"output {name!r} has shape {list(outputs[name].shape)}, that of the float "
                    f"model {list(wanted.shape)}"
                )
            self._noise += _sum_of_squares(outputs[name], wanted)
            self._count += wanted.size

    def value(self) -> float:
        """Mean squared error."""
        return self._noise / self._count if self._count else math.nan


class Sqnr(MeanSquaredError):
    """Signal to quantization noise ratio of all outputs against the float model's, in dB."""

    unit = "dB"
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self._signal = 0.0

    def update(
        self, outputs: Mapping[str, Array], labels: Array | None, expected: Mapping[str, Array]
    ) -> None:
        """Add noise and signal of a batch."""
        super().update(outputs, labels, expected)
        self._signal += sum(map(_sum_of_squares, expected.values()))

    def value(self) -> float:
        """10 log10(signal / noise)."""
        if self._noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self._signal / self._noise) if self._signal else -math.inf


class _FunctionMetric:
    """A function of all outputs and labels as a metric; attributes of it replace those below."""

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    needs: ClassVar[Literal["labels", "outputs"]] = "labels"

    def __init__(self, function: Callable[[dict[str, Array], Any], float]) -> None:
        self._function = function
        self._outputs: list[Mapping[str, Array]] = []
        self._labels: list[Array | None] = []
        self._expected: list[Mapping[str, Array]] = []
        for name in ("unit", "higher_is_better", "needs", "places_from", "grouped"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def update(
        self, outputs: Mapping[str, Array], labels: Array | None, expected: Mapping[str, Array]
    ) -> None:
        self._outputs.append(outputs)
        self._labels.append(labels)
        if self.needs == "outputs":
            self._expected.append(expected)

    def value(self) -> float:
        if not self._outputs:
            return math.nan
        outputs = _joined_by_name(self._outputs)
        if self.needs == "outputs":
            return float(self._function(outputs, _joined_by_name(self._expected)))
        labels = [part for part in self._labels if part is not None]
        return float(self._function(outputs, _joined(labels) if labels else None))


def _joined(parts: Sequence[Array]) -> Array:
    # A model without a batch dimension may give single numbers.
    return np.concatenate([np.atleast_1d(part) for part in parts])


def _joined_by_name(batches: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {name: _joined([batch[name] for batch in batches]) for name in batches[0]}


def metric_names() -> list[str]:
    """Names of the metrics that are installed; besides, every ``top<K>`` is one."""
    return sorted({entry.name for entry in entry_points(group=_GROUP)})


def get_metric(name: str) -> Metric:
    """Make a metric; see :func:`metric_factory`."""
    return metric_factory(name)()


def metric_factory(name: str) -> Callable[[], Metric]:
    """Find a metric; what is returned makes one, again and again.

    Parameters
    ----------
    name
        A name from :func:`metric_names`, ``top<K>``, or ``package.module:name`` of a class that
        follows :class:`Metric` or of a function. A function is called once, with all outputs (by
        name) and all labels (None where there are none), and returns the value. It may have the
        attributes ``unit`` (otherwise ""), ``higher_is_better`` (otherwise False) and ``needs``
        (otherwise ``labels``; with ``outputs`` it gets those of the float model in place of the
        labels).

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
            # No model has a billion classes, and int() refuses very long numbers.
            if top := re.fullmatch("top([1-9][0-9]{0,8})", name):
                return partial(TopK, int(top[1]))
            raise UsageError(
                f"there is no metric {name!r}",
                fix=f"choose one of {', '.join(metric_names())}, top<K> or package.module:name",
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
    make: Callable[[], Metric] = factory
    if callable(factory) and not isinstance(factory, type):
        make = partial(_FunctionMetric, factory)
    try:
        metric = make()
    except Exception as error:
        raise UsageError(
            f"metric {name!r} cannot be made ({type(error).__name__}: {error})",
            fix="a metric is a class without constructor arguments, or a function",
        ) from error
    members = ("unit", "higher_is_better", "needs", "update", "value")
    if missing := [member for member in members if not hasattr(metric, member)]:
        raise UsageError(
            f"metric {name!r} has no {missing[0]!r}",
            fix="bitwright.quant.metrics.Metric says what a metric has",
        )
    if metric.needs not in ("labels", "outputs"):
        raise UsageError(f"metric {name!r} needs {metric.needs!r}", fix="needs labels or outputs")
    return make
