"""Metrics against NumPy, closed forms, published examples and their definitions; plug-ins."""

from __future__ import annotations

import importlib.metadata
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitwright
from bitwright.errors import DataError, UsageError
from bitwright.quant import metrics
from bitwright.quant.metrics import (
    Agreement,
    Bounded,
    CharacterAccuracy,
    Choice,
    Cloze4,
    LastWord,
    MeanSquaredError,
    Metric,
    NormalizedChoice,
    Perplexity,
    PhoneErrorRate,
    Sqnr,
    Top1,
    Top5,
    TopK,
    WordErrorRate,
    get_metric,
    metric_names,
)
from tests.quant.qdq import Array, Builder, profile


@profile(100)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(1, 9),
    levels=st.integers(1, 4),
    splits=st.integers(1, 3),
)
def test_topk_is_a_stable_sort(seed: int, classes: int, levels: int, splits: int) -> None:
    generator = np.random.default_rng(seed)
    # Few levels make many ties, of which the first class wins.
    scores = generator.integers(0, levels, (12, classes)).astype(np.float32)
    labels = generator.integers(0, classes, 12)
    for k in range(1, classes + 1):
        metric = get_metric(f"top{k}")
        for part, wanted in zip(
            np.array_split(scores, splits), np.array_split(labels, splits), strict=True
        ):
            metric.update({"scores": part}, wanted, {})
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        assert metric.value() == np.mean([y in row for y, row in zip(labels, best, strict=True)])


def test_topk_of_more_than_all_classes() -> None:
    scores, labels = {"scores": np.zeros((2, 12), np.float32)}, np.array([0, 11])
    all_of_them = get_metric("top12")
    all_of_them.update(scores, labels, {})
    assert all_of_them.value() == 1.0
    with pytest.raises(DataError, match="13 highest scores are asked for, and there are 12"):
        get_metric("top13").update(scores, labels, {})


@profile(100)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 3),
    samples=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    places=st.sampled_from([(), (1,), (2,), (2, 3)]),
)
def test_no_continuation_exceeds_the_bound(
    seed: int, k: int, samples: list[int], places: tuple[int, ...]
) -> None:
    generator = np.random.default_rng(seed)
    metric = TopK(k)
    assert isinstance(metric, Bounded)
    remaining, bounds = sum(samples), []
    for size in samples:
        scores = generator.normal(size=(size, *places, 3)).astype(np.float32)
        metric.update({"scores": scores}, generator.integers(0, 3, (size, *places)), {})
        remaining -= size
        bounds.append(metric.bound(remaining))
    # Every batch can only take from what was possible, down to what is reached.
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == metric.value()


@pytest.mark.parametrize("places", [(), (1,), (5,)])
def test_the_bound_is_reached_if_all_that_comes_is_right(places: tuple[int, ...]) -> None:
    metric = Top1()
    assert metric.bound(7) == 1.0
    assert math.isnan(metric.bound(0))
    scores = np.random.default_rng(0).normal(size=(20, *places, 4))
    right = scores.argmax(axis=-1)
    metric.update({"scores": scores[:8]}, (right[:8] + 1) % 4, {})
    assert metric.bound(12) == 12 / 20
    metric.update({"scores": scores[8:]}, right[8:], {})
    assert metric.value() == 12 / 20


def test_only_topk_has_a_bound() -> None:
    bounded = {name for name in metric_names() if isinstance(get_metric(name), Bounded)}
    assert bounded == {"top1", "top5"}


def test_top1_of_other_shapes() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(3, 4, 5, 7)).astype(np.float32)
    expected = scores.argmax(axis=-1)
    for labels in (expected, expected.reshape(3, 20), expected.astype(np.uint8)):
        metric = Top1()
        metric.update({"pixels": scores, "other": np.zeros(1)}, labels, {})
        assert metric.value() == 1.0
    one = Top1()
    one.update(
        {"scores": scores[0, 0]}, expected[0, 0][:, None], {}
    )  # one label a row, as a column
    assert one.value() == 1.0
    assert math.isnan(Top1().value())


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.array([0, 3]), "0 to 2"),
        (np.array([-1, 0]), "0 to 2"),
        (np.array([0.0, 1.0]), "whole numbers"),
        (np.array([0, 1, 2]), "do not fit"),
    ],
)
def test_labels_that_do_not_fit(labels: Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Top1().update({"scores": np.zeros((2, 3), np.float32)}, labels, {})


@profile(60)
@given(seed=st.integers(0, 2**32 - 1), splits=st.integers(1, 4))
def test_mse_and_sqnr_are_their_formulas(seed: int, splits: int) -> None:
    generator = np.random.default_rng(seed)
    wanted = {"a": generator.normal(size=(8, 3)), "b": generator.normal(size=(8, 2, 2))}
    found = {name: array + generator.normal(0, 0.1, array.shape) for name, array in wanted.items()}
    mse, sqnr = MeanSquaredError(), Sqnr()
    for rows in np.array_split(np.arange(8), splits):
        for metric in (mse, sqnr):
            metric.update(
                {name: array[rows].astype(np.float32) for name, array in found.items()},
                None,
                {name: array[rows].astype(np.float32) for name, array in wanted.items()},
            )
    truth, guess = (
        np.concatenate([entry[name].astype(np.float32).ravel() for name in "ab"]).astype(float)
        for entry in (wanted, found)
    )
    assert mse.value() == pytest.approx(np.mean((guess - truth) ** 2))
    assert sqnr.value() == pytest.approx(
        10 * np.log10(np.sum(truth**2) / np.sum((guess - truth) ** 2))
    )


def test_closed_forms() -> None:
    # A ramp from -1 to 1 rounded to steps d has 1/3 of signal and d^2/12 of noise: with 2^b steps
    # the textbooks' 6.02 dB a bit.
    bits = 10
    ramp = np.linspace(-1.0, 1.0, 400_001)
    step = 2.0 / 2**bits
    rounded = np.rint(ramp / step) * step
    sqnr, mse = Sqnr(), MeanSquaredError()
    for metric in (sqnr, mse):
        metric.update({"y": rounded}, None, {"y": ramp})
    assert sqnr.value() == pytest.approx(20 * math.log10(2) * bits, abs=0.001)
    assert mse.value() == pytest.approx(step**2 / 12, rel=0.001)


def test_nothing_wrong_is_infinite() -> None:
    sqnr = Sqnr()
    sqnr.update({"y": np.ones(3)}, None, {"y": np.ones(3)})
    assert sqnr.value() == math.inf
    silent = Sqnr()
    silent.update({"y": np.ones(3)}, None, {"y": np.zeros(3)})
    assert silent.value() == -math.inf
    assert math.isnan(MeanSquaredError().value())


def test_outputs_of_other_shapes() -> None:
    with pytest.raises(DataError, match="shape"):
        Sqnr().update({"y": np.ones((2, 1))}, None, {"y": np.ones(2)})


# -- error rates -----------------------------------------------------------------------------------


def edit_distance(reference: Sequence[int], hypothesis: Sequence[int]) -> int:
    """Wagner and Fischer's table, a row at a time."""
    row = list(range(len(hypothesis) + 1))
    for i, token in enumerate(reference, 1):
        before, row = row, [i]
        for j, other in enumerate(hypothesis, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (token != other)))
    return row[-1]


def one_hot(classes: Sequence[Sequence[int]], count: int) -> dict[str, Array]:
    return {"scores": np.eye(count, dtype=np.float32)[np.array(classes)]}


def letters(*words: str) -> list[list[int]]:
    """Letters as classes, a from 1 on; "-" is 0 and "." is -1."""
    return [["-abcdefghijklmnopqrstuvwxyz".find(letter) for letter in word] for word in words]


@pytest.mark.parametrize(
    "reference, hypothesis, errors, length",
    [
        # Textbook pairs of the edit distance; "tt" is one run.
        ("saturday", "sunday--", 4, 8),  # the two blanks are one phone here
        ("kiiittenn", "siitttinn", 2, 5),
        ("aabbcc", "aabbcc", 0, 3),
        ("aaaa", "abab", 3, 1),  # more errors than phones
        ("ab..", "abcd", 0, 2),  # padding
        ("..ab", "ddab", 0, 2),
        ("a.ab", "acab", 0, 2),  # a frame that is left out does not end a phone
    ],
)
def test_phone_error_rate_by_hand(
    reference: str, hypothesis: str, errors: int, length: int
) -> None:
    metric = PhoneErrorRate()
    metric.update(one_hot(letters(hypothesis), 27), np.array(letters(reference)), {})
    assert metric.value() == errors / length


@pytest.mark.parametrize(
    "path, words, errors",
    [
        # Graves et al., 2006: "B(a-ab-) = B(-aa--abb) = aab".
        ("a-ab-", "aab", 0),
        ("-aa--abb", "aab", 0),
        # Levenshtein's textbook pairs, spelt so that repeats stay.
        ("sit-ting", "kitten", 3),
        ("sunday", "saturday", 3),
        ("-----", "cat", 3),
        ("abcde", "a", 4),
        ("aabb-", "ab...", 0),
    ],
)
def test_word_error_rate_by_hand(path: str, words: str, errors: int) -> None:
    metric = WordErrorRate()
    metric.update(one_hot(letters(path), 27), np.array(letters(words)), {})
    assert metric.value() == errors / len(words.rstrip("."))


@profile(100)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 12), splits=st.integers(1, 3))
def test_error_rates_are_edit_distances(seed: int, classes: int, splits: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(6, 9, classes)).astype(np.float32)
    best = scores.argmax(axis=-1)
    # Often right, so that alignments matter; lengths from 0 on.
    frames = np.where(generator.random((6, 9)) < 0.6, best, generator.integers(0, classes, (6, 9)))
    words = generator.integers(1, classes, (6, 9))
    padded = np.arange(9) >= generator.integers(0, 10, (6, 1))
    padded[0] = False
    frames[padded] = words[padded] = -1

    def value(metric: Metric, labels: Array) -> float:
        for part, wanted in zip(
            np.array_split(scores, splits), np.array_split(labels, splits), strict=True
        ):
            metric.update({"scores": part}, wanted, {})
        return metric.value()

    def runs(tokens: Array) -> list[int]:
        return [token for token, _ in groupby(tokens.tolist())]

    phones = [runs(row[row >= 0]) for row in frames]
    heard = [runs(row[: (wanted >= 0).sum()]) for row, wanted in zip(best, frames, strict=True)]
    errors = sum(map(edit_distance, phones, heard))
    assert value(PhoneErrorRate(), frames) == errors / sum(map(len, phones))

    said = [[word for word in row.tolist() if word >= 0] for row in words]
    heard = [[word for word in runs(row) if word != 0] for row in best]
    errors = sum(map(edit_distance, said, heard))
    assert value(WordErrorRate(), words) == errors / sum(map(len, said))


def test_error_rates_are_of_the_corpus() -> None:
    # One error in one word and none in three are one in four, not one half.
    metric = WordErrorRate()
    outputs = one_hot(letters("d--", "abc"), 27)
    metric.update(outputs, np.array(letters("a..", "abc"), np.int16), {})
    assert metric.value() == 1 / 4
    # What is heard where nothing was said, is inserted.
    metric.update(one_hot(letters("xyz"), 27), np.array(letters("...")), {})
    assert metric.value() == 4 / 4
    assert metric.unit == "fraction"
    assert not metric.higher_is_better


@pytest.mark.parametrize("name", ["per", "wer"])
def test_error_rates_without_a_reference(name: str) -> None:
    nothing = get_metric(name)
    assert math.isnan(nothing.value())
    nothing.update(one_hot(letters("--"), 27), np.array([[-1, -1]]), {})
    assert math.isnan(nothing.value())


def test_words_where_none_were_said_are_infinitely_many() -> None:
    metric = WordErrorRate()
    metric.update(one_hot(letters("ab"), 27), np.array([[-1]]), {})
    assert metric.value() == math.inf


@pytest.mark.parametrize(
    "kind, labels, message",
    [
        (PhoneErrorRate, np.array([[0, 1, 3]]), "from -1 to 2"),
        (PhoneErrorRate, np.array([[0, 1, -2]]), "from -1 to 2"),
        (PhoneErrorRate, np.array([[0.0, 1.0, 2.0]]), "whole numbers"),
        (PhoneErrorRate, np.array([[0, 1]]), "do not fit"),
        (PhoneErrorRate, np.array([0, 1, 2]), "do not fit"),
        (WordErrorRate, np.array([[1, 3]]), "from -1 to 2"),
        (WordErrorRate, np.array([[1, -100]]), "from -1 to 2"),
        (WordErrorRate, np.array([["one", "two"]]), "whole numbers"),
        (WordErrorRate, np.array([[1, 0]]), "blank"),
        (WordErrorRate, np.array([1, 2]), "do not fit"),
        (WordErrorRate, np.array([[1], [2]]), "do not fit"),
        (Perplexity, np.array([[0, 1, 3]]), "up to 2"),
        (Perplexity, np.array([[0.0, 1.0, -1.0]]), "whole numbers"),
        (Perplexity, np.array([[0, 1]]), "do not fit"),
    ],
)
def test_sequences_that_do_not_fit(kind: type[Metric], labels: Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        kind().update({"scores": np.zeros((1, 3, 3), np.float32)}, labels, {})


@pytest.mark.parametrize("kind", [PhoneErrorRate, WordErrorRate])
def test_error_rates_of_outputs_without_frames(kind: type[Metric]) -> None:
    with pytest.raises(DataError, match=r"\[4, 3\]"):
        kind().update({"scores": np.zeros((4, 3), np.float32)}, np.array([0, 1, 1, 0]), {})


def test_jiwer_is_loaded_where_it_is_used() -> None:
    program = (
        "import sys, bitwright, bitwright.cli; from bitwright.quant.metrics import get_metric; "
        "get_metric('per'); get_metric('wer'); sys.exit('jiwer' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# -- perplexity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 1e4, -1e30])
@pytest.mark.parametrize("vocabulary", [1, 7, 50_000])
def test_perplexity_of_a_guess_is_the_size_of_the_vocabulary(vocabulary: int, level: float) -> None:
    metric = Perplexity()
    logits = np.full((2, 3, vocabulary), level, np.float32)
    metric.update({"logits": logits}, np.zeros((2, 3), np.int32), {})
    assert metric.value() == pytest.approx(vocabulary, rel=1e-12)


def test_perplexity_in_closed_form() -> None:
    # Odds of 3 to 1: probabilities of 3/4 and 1/4, whose geometric mean is sqrt(3)/4.
    logits = np.log([[1.0, 3.0], [1.0, 3.0]])
    metric = Perplexity()
    metric.update({"logits": logits[:1], "other": np.zeros(1)}, np.array([1]), {})
    assert metric.value() == pytest.approx(4 / 3)
    metric.update({"logits": logits[1:]}, np.array([0]), {})
    assert metric.value() == pytest.approx(4 / math.sqrt(3))
    assert (metric.unit, metric.higher_is_better, metric.needs) == ("", False, "labels")


@profile(60)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    splits=st.integers(1, 3),
)
def test_perplexity_is_its_formula(seed: int, scale: float, splits: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, scale, (5, 4, 11)).astype(np.float32)
    labels = generator.integers(-3, 11, (5, 4))
    labels[0, 0] = 3
    metric = Perplexity()
    for part, wanted in zip(
        np.array_split(logits, splits), np.array_split(labels, splits), strict=True
    ):
        metric.update({"logits": part}, wanted, {})
    wide = logits.astype(np.float64)
    losses = [
        np.logaddexp.reduce(wide[place]) - wide[place][token]
        for place, token in np.ndenumerate(labels)
        if token >= 0
    ]
    with np.errstate(over="ignore"):
        assert metric.value() == pytest.approx(np.exp(np.mean(losses)))


def test_perplexity_at_its_ends() -> None:
    nothing = Perplexity()
    assert math.isnan(nothing.value())
    nothing.update({"logits": np.zeros((1, 2, 3))}, np.array([[-1, -100]]), {})
    assert math.isnan(nothing.value())
    logits = np.array([[0.0, 1e4], [0.0, -np.inf]])
    sure, wrong, impossible = Perplexity(), Perplexity(), Perplexity()
    sure.update({"logits": logits}, np.array([1, 0]), {})
    assert sure.value() == 1.0
    wrong.update({"logits": logits}, np.array([0, 0]), {})
    assert wrong.value() == math.inf  # e to the 5000th
    impossible.update({"logits": logits}, np.array([1, 1]), {})
    assert impossible.value() == math.inf


# -- places, words and choices --------------------------------------------------------------------


def measured(kind: type[Metric], scores: Array, labels: Array) -> float:
    metric = kind()
    metric.update({"scores": scores}, labels, {})
    return metric.value()


@profile(60)
@given(seed=st.integers(0, 2**32 - 1), splits=st.integers(1, 3))
def test_accuracy_of_characters_and_words_are_their_definitions(seed: int, splits: int) -> None:
    generator = np.random.default_rng(seed)
    # Few levels make ties, of which the first class is the greedy choice.
    scores = generator.integers(0, 3, (7, 5, 3)).astype(np.float32)
    labels = generator.integers(-2, 3, (7, 5))
    labels[:, generator.integers(5)] = generator.integers(0, 3, 7)
    greedy = [[list(place).index(max(place)) for place in row] for row in scores]
    places = [
        (found, label)
        for row, wanted in zip(greedy, labels, strict=True)
        for found, label in zip(row, wanted, strict=True)
        if label >= 0
    ]
    words = [
        all(found == label for found, label in zip(row, wanted, strict=True) if label >= 0)
        for row, wanted in zip(greedy, labels, strict=True)
    ]
    characters, last = CharacterAccuracy(), LastWord()
    for part, wanted in zip(
        np.array_split(scores, splits), np.array_split(labels, splits), strict=True
    ):
        characters.update({"scores": part}, wanted, {})
        last.update({"scores": part}, wanted, {})
    assert characters.value() == np.mean([found == label for found, label in places])
    assert last.value() == np.mean(words)


def test_last_word_of_a_model_without_a_batch() -> None:
    logits = np.eye(3, dtype=np.float32)  # predicts 0, 1, 2
    metric = LastWord()
    for labels in ([-1, 1, 2], [0, -1, -1], [-1, 0, 2]):
        metric.update({"logits": logits}, np.array([labels]), {})
    assert metric.value() == pytest.approx(2 / 3)


def test_agreement_is_with_the_float_model() -> None:
    metric = Agreement()
    wanted = np.array([[[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [2.0, 3.0]]])
    found = np.array([[[0.0, 0.1], [0.0, 1.0], [1.0, 0.0], [3.0, 3.0]]])
    metric.update({"a": found, "b": -found}, None, {"a": wanted})
    assert metric.value() == 0.5  # the last one is a tie, which is class 0
    with pytest.raises(DataError, match=r"\[1, 4, 2\]"):
        metric.update({"a": found}, None, {"a": wanted[:, :2]})


def options(
    generator: np.random.Generator, count: int, *, vocabulary: int = 6, time: int = 5
) -> tuple[Array, Array, list[tuple[float, float]]]:
    """Scores and labels of `count` items, and of each lm-eval's acc and acc_norm."""
    scores, labels, expected = [], [], []
    for item in range(count):
        amount = int(generator.integers(2, 5))
        gold = int(generator.integers(amount))
        lls, lengths = [], []
        for option in range(amount):
            logits = generator.normal(0, 3, (time, vocabulary))
            first = int(generator.integers(time))
            tokens = np.full(time, -1)
            tokens[first:] = generator.integers(0, vocabulary, time - first)
            length = int(generator.integers(1, 20))
            # As lm_eval/models/huggingface.py: log_softmax, gather, sum.
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            lls.append(sum(logprobs[t, tokens[t]] for t in range(first, time)))
            lengths.append(length)
            scores.append(logits)
            labels.append([item, int(option == gold), length, *tokens])
        # As lm_eval/api/task.py, ConfigurableTask.process_results, output_type multiple_choice.
        acc = 1.0 if np.argmax(lls) == gold else 0.0
        acc_norm = 1.0 if np.argmax(np.array(lls) / np.array(lengths, float)) == gold else 0.0
        expected.append((acc, acc_norm))
    return np.array(scores), np.array(labels), expected


@profile(40)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 9))
def test_choices_are_acc_and_acc_norm_of_lm_eval(seed: int, size: int) -> None:
    scores, labels, expected = options(np.random.default_rng(seed), 6)
    plain, normalized = Choice(), NormalizedChoice()
    for start in range(0, len(scores), size):  # items are cut anywhere
        part = slice(start, start + size)
        for metric in (plain, normalized):
            metric.update({"scores": scores[part]}, labels[part], {})
    acc, acc_norm = np.mean(expected, axis=0)
    assert plain.value() == pytest.approx(acc)
    assert normalized.value() == pytest.approx(acc_norm)


def test_choices_as_the_document_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = (Path(__file__).parents[2] / "docs" / "write-a-metric.md").read_text("utf-8")
    (program,) = re.findall(r"```python\n((?:(?!```).)*choice\.npz.*?)```", document, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", program], check=True)
    with np.load("choice.npz") as data:
        tokens, labels = data["tokens"], data["labels"]
    assert tokens.shape == (4, 5)
    # Whoever predicts the token that comes next finds every option sure; the first one wins.
    logits = 50.0 * np.eye(10)[np.roll(tokens, -1, axis=1)]
    assert measured(Choice, logits, labels) == 0.5
    # Likelihood 1/10 a token: the shorter option is likelier.
    assert measured(Choice, np.zeros((4, 5, 10)), labels) == 1.0
    # A character: "day" has 1 token for 3 of them, "morning" 2 for 7; "night" 1 for 5.
    assert measured(NormalizedChoice, np.zeros((4, 5, 10)), labels) == 0.5


def test_cloze_has_four_options() -> None:
    logits = np.log(np.array([[[0.1, 0.9]], [[0.4, 0.6]], [[0.7, 0.3]], [[0.5, 0.5]]]))
    labels = np.array([[7, 0, 1, 0], [7, 0, 1, 0], [7, 1, 1, 0], [7, 0, 1, 0]])
    assert measured(Cloze4, logits, labels) == 1.0
    with pytest.raises(DataError, match="item 7 has 3 options, not 4"):
        measured(Cloze4, logits[1:], labels[1:])


def test_choice_of_a_model_without_a_batch() -> None:
    metric = Choice()
    logits = np.log(np.array([[0.1, 0.9]]))
    metric.update({"logits": logits}, np.array([[0, 1, 1, 1]]), {})
    metric.update({"logits": logits}, np.array([[0, 0, 1, 0]]), {})
    assert metric.value() == 1.0


def test_choice_of_padded_samples(tmp_path: Path) -> None:
    """What stands behind the length of a sample does not count, in its labels neither."""
    build = Builder()
    x = build.input("x", ["T", 3])
    weights = build.constant(np.eye(3, dtype=np.float32))
    path = tmp_path / "net.onnx"
    onnx.save(build.model(build.node("MatMul", x, weights, name="layer")), path)
    data = {
        "x": np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32),
        "lengths": np.array([6, 2, 4, 3]),
        "labels": np.array([[n // 2, n % 2, 1, -1, 1 + n % 2, -1, -1, -1, -1] for n in range(4)]),
    }
    whole = {name: array for name, array in data.items() if name != "lengths"}
    padded = bitwright.evaluate(path, data, metric="choice")
    assert padded.value == bitwright.evaluate(path, whole, metric="choice").value


@pytest.mark.parametrize(
    "labels, message",
    [
        ([[0, 1, 1, 0], [0, 0, 1, 0]], "do not fit"),
        ([[0, 1, 1, 0, 9], [0, 0, 1, 0, 1]], "up to 2"),
        ([[0, 2, 1, 0, 1], [0, 0, 1, 0, 1]], r"begins \[2, 1\]"),
        ([[0, 1, 0, 0, 1], [0, 0, 1, 0, 1]], r"begins \[1, 0\]"),
        ([[0, 1, 1, -1, -1], [0, 0, 1, 0, 1]], "0 tokens"),
        ([[0, 1, 1, 0, 1], [0, 1, 1, 0, 1]], "2 options, 2 of them right"),
        ([[0, 0, 1, 0, 1], [0, 0, 1, 0, 1]], "2 options, 0 of them right"),
        ([[0, 1, 1, 0, 1], [1, 1, 1, 0, 1]], "1 options"),
        ([[0.0, 1, 1, 0, 1], [0.5, 0, 1, 0, 1]], "whole numbers"),
    ],
)
def test_choices_that_do_not_fit(labels: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        measured(Choice, np.zeros((2, 2, 3)), np.array(labels))


@pytest.mark.parametrize("kind", [CharacterAccuracy, LastWord])
@pytest.mark.parametrize(
    "labels, message",
    [
        (np.array([[0, 3]]), "up to 2"),
        (np.array([[0.0, 1.0]]), "whole numbers"),
        (np.array([[0, 1, 2]]), "do not fit"),
    ],
)
def test_labels_of_places_that_do_not_fit(kind: type[Metric], labels: Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        measured(kind, np.zeros((1, 2, 3)), labels)


def test_a_sample_without_a_last_word() -> None:
    with pytest.raises(DataError, match="no last word"):
        measured(LastWord, np.zeros((2, 2, 3)), np.array([[0, 1], [-1, -1]]))
    with pytest.raises(DataError, match="no axis of time"):
        measured(LastWord, np.zeros(3), np.array(1))


@pytest.mark.parametrize("kind", [CharacterAccuracy, LastWord, Agreement, Choice])
def test_nothing_measured_is_no_number(kind: type[Metric]) -> None:
    assert math.isnan(kind().value())
    assert (kind.unit, kind.higher_is_better) == ("fraction", True)


# -- finding metrics ------------------------------------------------------------------------------


def test_a_single_number_is_no_vector_of_scores() -> None:
    with pytest.raises(DataError, match="do not fit"):
        Top1().update({"loss": np.float32(1) * np.ones(())}, np.array([0]), {})


def test_own_metrics_come_by_entry_points() -> None:
    kinds = {
        "agreement": Agreement,
        "char-accuracy": CharacterAccuracy,
        "choice": Choice,
        "choice-norm": NormalizedChoice,
        "cloze4": Cloze4,
        "last-word": LastWord,
        "mse": MeanSquaredError,
        "per": PhoneErrorRate,
        "perplexity": Perplexity,
        "sqnr": Sqnr,
        "top1": Top1,
        "top5": Top5,
        "wer": WordErrorRate,
    }
    assert set(kinds) <= set(metric_names())
    for name, kind in kinds.items():
        assert type(get_metric(name)) is kind
    assert (Top1.unit, Sqnr.unit, Top1.needs, Sqnr.needs) == ("fraction", "dB", "labels", "outputs")
    assert not MeanSquaredError.higher_is_better


def test_metric_by_module_and_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metric.py").write_text(
        "class Largest:\n"
        "    unit = 'V'\n"
        "    higher_is_better = False\n"
        "    needs = 'outputs'\n"
        "    largest = 0.0\n"
        "    def update(self, outputs, labels, expected):\n"
        "        self.largest = max(self.largest, *(a.max() for a in outputs.values()))\n"
        "    def value(self):\n"
        "        return self.largest\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    metric = get_metric("my_metric:Largest")
    metric.update({"a": np.array([1.0, 3.0]), "b": np.array([2.0])}, None, {})
    assert (metric.value(), metric.unit) == (3.0, "V")


FUNCTIONS = """
import numpy as np
import onnx

def worst(outputs, labels):
    return np.abs(outputs["a"] - labels).max()

def shapes(outputs, labels):
    assert labels is None
    return outputs["a"].size + 100 * outputs["b"].shape[0]

def agreement(outputs, expected):
    assert outputs.keys() == expected.keys() == {"a", "b"}
    return np.mean(outputs["a"] == expected["a"])

agreement.unit, agreement.higher_is_better, agreement.needs = "fraction", True, "outputs"

class Callable:
    unit = "V"
    def __call__(self, outputs, labels):
        return 7

instance = Callable()
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "metric_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "metric_functions"


def test_function_of_all_outputs_and_labels(functions: str) -> None:
    metric = get_metric(f"{functions}:worst")
    assert (metric.unit, metric.higher_is_better, metric.needs) == ("", False, "labels")
    assert math.isnan(metric.value())
    metric.update({"a": np.array([1.0, 3.0])}, np.array([1, 1]), {})
    metric.update({"a": np.array([9.0])}, np.array([4]), {})
    assert metric.value() == 5.0
    assert type(metric.value()) is float
    assert not isinstance(metric, Bounded)


def test_function_of_a_model_without_batches(functions: str) -> None:
    metric = get_metric(f"{functions}:shapes")
    for _ in range(3):
        metric.update({"a": np.float32(2) * np.ones(()), "b": np.zeros((2, 5))}, None, {})
    assert metric.value() == 3 + 100 * 6


def test_function_that_compares_with_the_float_model(functions: str) -> None:
    metric = get_metric(f"{functions}:agreement")
    assert (metric.unit, metric.higher_is_better, metric.needs) == ("fraction", True, "outputs")
    for a in (1.0, 2.0, 1.0, 1.0):
        ones = np.ones(1)
        metric.update({"a": a * ones, "b": ones}, np.zeros(1), {"a": ones, "b": ones})
    assert metric.value() == 0.75


def test_whatever_can_be_called_is_a_function(functions: str) -> None:
    metric = get_metric(f"{functions}:instance")
    metric.update({"a": np.ones(1)}, np.ones(1), {})
    assert (metric.value(), metric.unit) == (7.0, "V")


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_metric", "no metric"),
        ("top0", r"no metric 'top0'[^$]*top<K>"),
        ("top03", "no metric"),
        ("top-1", "no metric"),
        ("top3.0", "no metric"),
        ("top٣", "no metric"),  # a digit, and int() reads it
        ("top" + 5000 * "9", "no metric"),
        ("no_such_module:Class", "cannot be loaded"),
        ("math:NoSuchClass", "cannot be loaded"),
        (":Class", "cannot be loaded"),
        (".relative:Class", "cannot be loaded"),
        ("math:", "cannot be loaded"),
        ("math:pi", "cannot be made"),
        ("fractions:Decimal", "has no 'unit'"),
        ("broken_metric:Class", "cannot be loaded"),
        ("broken_metric_class:Class", "cannot be made"),
        ("broken_metric_class:function", "needs 'label'"),
    ],
)
def test_metrics_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "broken_metric.py").write_text("1 / 0\n")
    (tmp_path / "broken_metric_class.py").write_text(
        "class Class:\n    def __init__(self, size):\n        pass\n"
        "def function(outputs, labels): return 1.0\n"
        "function.needs = 'label'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=message):
        get_metric(name)


def entry_points_giving(*values: str) -> Callable[..., Any]:
    entries = [
        importlib.metadata.EntryPoint("mine", value, "bitwright.metrics") for value in values
    ]

    def entry_points(*, group: str, name: str | None = None) -> Any:
        assert group == "bitwright.metrics"
        return [entry for entry in entries if name in (None, entry.name)]

    return entry_points


def test_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    own = "bitwright.quant.metrics:Top5"
    monkeypatch.setattr(metrics, "entry_points", entry_points_giving(own))
    assert type(get_metric("mine")) is Top5
    # The same package, found twice on the path, is no clash.
    monkeypatch.setattr(metrics, "entry_points", entry_points_giving(own, own))
    assert type(get_metric("mine")) is Top5
    both = entry_points_giving(own, "somebody.else:Metric")
    monkeypatch.setattr(metrics, "entry_points", both)
    with pytest.raises(UsageError, match=r"claimed twice.*Top5.*somebody\.else:Metric"):
        get_metric("mine")
    monkeypatch.setattr(metrics, "entry_points", entry_points_giving("no_such_module:Class"))
    with pytest.raises(UsageError, match="cannot be loaded"):
        get_metric("mine")
