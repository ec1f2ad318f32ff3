"""Errors of plans must be those that the quantized models have."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

import bitwright
from bitwright.errors import BitwrightError, DataError, RunError, UsageError
from bitwright.quant.layers import layer_nodes
from bitwright.quant.load import load
from bitwright.quant.samples import Samples
from bitwright.search.evaluator import (
    EvaluationJob,
    PostTraining,
    job_for,
    job_on,
)
from bitwright.search.results import QuantizationOptions
from bitwright.search.space import Plan
from bitwright.vocabulary import Precision, PrecisionPlan

Array = np.ndarray[Any, np.dtype[Any]]

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
MODEL, CALIBRATION = LENET / "lenet.onnx", LENET / "calibration.npz"
ALL = [Precision(w, a) for w in (2, 4, 8, 16) for a in (2, 4, 8, 16)]
LAYERS = 5


def digits(count: int) -> dict[str, Array]:
    with np.load(LENET / "test.npz") as archive:
        return {name: archive[name][:count] for name in archive}


def job(
    data: Mapping[str, Array], *, metric: str = "top1", limit: float | None = None, **options: Any
) -> tuple[EvaluationJob, float]:
    model = load(MODEL)
    return job_for(
        model,
        Samples(CALIBRATION, model.inputs),
        Samples(data, model.inputs),
        precisions=dict.fromkeys(layer_nodes(model), ALL),
        metric=metric,
        options=QuantizationOptions(),
        limit=lambda _: limit,
        **options,
    )


@functools.cache
def lenet_job(count: int, metric: str = "top1", subsets: int = 1) -> tuple[EvaluationJob, float]:
    """The same, made once: calibrating takes a second."""
    return job(digits(count), metric=metric, subsets=subsets)


def plans(seed: int, count: int) -> list[Plan]:
    generator = np.random.default_rng(seed)
    return [
        tuple(ALL[int(g)] for g in generator.integers(0, len(ALL), LAYERS)) for _ in range(count)
    ]


def quantized(plan: Plan, path: Path) -> Path:
    names = layer_nodes(load(MODEL))
    bitwright.quantize(
        MODEL,
        plan=PrecisionPlan(dict(zip(names, plan, strict=True))),
        calibration=CALIBRATION,
        output=path,
    )
    return path


NARROW = (Precision(2, 2),) * LAYERS


@pytest.mark.parametrize("metric", ["top1", "top3", "mse", "sqnr"])
def test_errors_are_those_of_the_quantized_models(metric: str, tmp_path: Path) -> None:
    data = digits(300)
    made, _ = lenet_job(300, metric)
    evaluator = PostTraining(made)
    for number, plan in enumerate([NARROW, *plans(1, 3)]):
        path = quantized(plan, tmp_path / f"{number}.onnx")
        value = bitwright.evaluate(path, data, metric=metric, against=MODEL).value
        expected = 1 - value if metric.startswith("top") else value
        expected = -value if metric == "sqnr" else expected
        result = evaluator.evaluate(plan)
        assert result.status == "ok"
        assert result.samples == 300
        # A code that the blocked layout moves can change one image, or noise a little.
        tolerance = 1 / 300 if metric.startswith("top") else 0.02 * abs(expected)
        assert result.error == pytest.approx(expected, abs=tolerance)
        assert result.overall == result.error


def test_the_float_error_is_that_of_the_float_model() -> None:
    _, error = lenet_job(300)
    assert error == pytest.approx(1 - bitwright.evaluate(MODEL, digits(300)).value, abs=1e-9)


def test_the_error_is_the_largest_over_the_subsets() -> None:
    data = digits(403)
    made, float_error = lenet_job(403, subsets=4)
    assert [sum(b.samples for b in subset) for subset in made.subsets] == [101, 101, 101, 100]
    # Sample i belongs to part i % 4: each part by itself, with the same scales.
    parts = [{name: array[n::4] for name, array in data.items()} for n in range(4)]
    model = load(MODEL)
    singles = [job_on(made, model, Samples(part, model.inputs)) for part in parts]
    assert float_error == max(error for _, error in singles)
    evaluator, whole = PostTraining(made), PostTraining(lenet_job(403)[0])
    for plan in [NARROW, *plans(2, 4)]:
        result = evaluator.evaluate(plan)
        errors = [PostTraining(single).evaluate(plan).error for single, _ in singles]
        assert result.error == max(e for e in errors if e is not None)
        assert result.overall == whole.evaluate(plan).error


def test_a_plan_that_fails_on_the_first_subset_is_not_run_on_the_others() -> None:
    made, _ = lenet_job(403, subsets=4)
    free = PostTraining(made).evaluate(NARROW)
    assert free.error is not None
    limited = PostTraining(replace(made, limit=-1.0)).evaluate(NARROW)  # nothing meets that
    assert limited.status == "stopped"
    assert limited.samples <= 101
    just = PostTraining(replace(made, limit=free.error)).evaluate(NARROW)
    assert replace(just, seconds=free.seconds) == free


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.02, 0.03, 0.05, 0.2])
@pytest.mark.parametrize("subsets", [1, 3])
def test_stopping_early_never_changes_what_meets_the_limit(limit: float, subsets: int) -> None:
    made, _ = lenet_job(512, subsets=subsets)
    whole, limited = PostTraining(made), PostTraining(replace(made, limit=limit))
    for plan in [NARROW, *plans(3, 8)]:
        full, early = whole.evaluate(plan), limited.evaluate(plan)
        assert full.error is not None
        assert early.error is not None
        assert (early.error > limit) == (full.error > limit)
        if full.error <= limit:
            assert (early.error, early.status, early.samples) == (full.error, "ok", 512)
        else:
            assert early.samples <= 512


def test_the_order_of_plans_does_not_matter() -> None:
    made, _ = lenet_job(300)
    tried = plans(4, 10)
    forwards = PostTraining(made)
    first = [forwards.evaluate(plan).error for plan in tried]
    backwards = PostTraining(pickle.loads(pickle.dumps(made)))  # noqa: S301 - made here
    assert [backwards.evaluate(plan).error for plan in tried[::-1]] == first[::-1]


# -- metrics that give no number -----------------------------------------------------------------


class Sometimes:
    """Fails on what 2-bit plans give."""

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    needs: ClassVar[Literal["labels", "outputs"]] = "outputs"
    how: ClassVar[str] = "raises"

    def __init__(self) -> None:
        self.error = 0.0

    def update(
        self, outputs: Mapping[str, Array], labels: Array | None, expected: Mapping[str, Array]
    ) -> None:
        del labels
        name = next(iter(outputs))
        self.error = max(self.error, float(np.abs(outputs[name] - expected[name]).max()))
        if self.error > 3.0 and self.how == "raises":
            raise ZeroDivisionError("too far off")

    def value(self) -> float:
        return math.nan if self.error > 3.0 else self.error


class SometimesNan(Sometimes):
    how = "nan"


@pytest.mark.parametrize(
    "name, message",
    [
        ("Sometimes", "the metric fails (ZeroDivisionError: too far off)"),
        ("SometimesNan", "the metric is not a number"),
    ],
)
def test_a_metric_that_gives_no_number_fails_that_plan_alone(name: str, message: str) -> None:
    made, _ = job(digits(100), metric=f"tests.search.test_evaluator:{name}")
    evaluator = PostTraining(made)
    result = evaluator.evaluate(NARROW)
    assert (result.status, result.error, result.message) == ("failed", None, message)
    good = evaluator.evaluate((Precision(16, 16),) * LAYERS)
    assert good.status == "ok"
    assert good.error == pytest.approx(0.0, abs=0.05)


def whole_set_error(outputs: Mapping[str, Array], labels: Array) -> float:
    return float((outputs["logits"].argmax(axis=1) != labels).mean())


def test_a_function_is_a_metric() -> None:
    data = digits(200)
    made, error = job(data, metric="tests.search.test_evaluator:whole_set_error")
    same, float_error = lenet_job(200)
    expected = PostTraining(same).evaluate(NARROW)
    assert error == pytest.approx(float_error)
    assert PostTraining(made).evaluate(NARROW).error == pytest.approx(expected.error)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (lambda d: {"image": d["image"]}, DataError, "no array 'labels'"),
        (lambda d: {**d, "labels": d["labels"] + 7}, DataError, "whole numbers from 0 to 9"),
        (lambda d: {k: v[:0] for k, v in d.items()}, DataError, "no samples"),
        (lambda d: {**d, "labels": d["labels"][:5]}, DataError, "different numbers"),
    ],
)
def test_bad_data_are_refused_before_any_plan_is_run(
    change: Any, kind: type[BitwrightError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        job(change(digits(20)))


def test_a_metric_that_fails_on_the_float_model_is_refused() -> None:
    with pytest.raises(RunError, match="the float model cannot be measured"):
        job(digits(20), metric="tests.search.test_evaluator:broken")


def broken(outputs: Mapping[str, Array], labels: Array) -> float:
    raise ValueError(f"{len(outputs)} {len(labels)}")


@pytest.mark.parametrize("subsets", [0, 21])
def test_impossible_subsets_are_refused(subsets: int) -> None:
    with pytest.raises(UsageError, match="subsets"):
        job(digits(20), subsets=subsets)


@pytest.mark.parametrize("metric", ["choice", "choice-norm", "cloze4"])
@pytest.mark.parametrize("options", [{"subsets": 2}, {"samples": 5}])
def test_items_are_not_torn_apart(metric: str, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="belong together") as caught:
        job(digits(20), metric=metric, **options)
    assert "--subsets 1" in str(caught.value)


class Refuses:
    """Sees only at the end that the data will not do."""

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    needs: ClassVar[Literal["labels", "outputs"]] = "labels"

    def update(
        self, outputs: Mapping[str, Array], labels: Array | None, expected: Mapping[str, Array]
    ) -> None:
        del outputs, labels, expected

    def value(self) -> float:
        raise DataError("an item is not whole", fix="add the other half")


def test_what_a_metric_says_at_the_end_is_passed_on() -> None:
    with pytest.raises(DataError, match="an item is not whole") as caught:
        job(digits(20), metric="tests.search.test_evaluator:Refuses")
    assert caught.value.fix == "add the other half"
