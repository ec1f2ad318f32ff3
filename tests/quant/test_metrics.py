"""Metrics against NumPy, closed forms and their definitions; plug-ins."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import DataError, UsageError
from bitwright.quant import metrics
from bitwright.quant.metrics import MeanSquaredError, Sqnr, Top1, Top5, get_metric, metric_names
from tests.quant.qdq import Array, profile


@profile(100)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(1, 9),
    levels=st.integers(1, 4),
    splits=st.integers(1, 3),
)
def test_top1_is_argmax_and_top5_a_stable_sort(
    seed: int, classes: int, levels: int, splits: int
) -> None:
    generator = np.random.default_rng(seed)
    # Few levels make many ties, of which the first class wins.
    scores = generator.integers(0, levels, (12, classes)).astype(np.float32)
    labels = generator.integers(0, classes, 12)
    top1, top5 = Top1(), Top5()
    for part, wanted in zip(
        np.array_split(scores, splits), np.array_split(labels, splits), strict=True
    ):
        top1.update({"scores": part}, wanted, {})
        top5.update({"scores": part}, wanted, {})
    assert top1.value() == pytest.approx(np.mean(scores.argmax(axis=1) == labels))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    assert top5.value() == pytest.approx(
        np.mean([y in row for y, row in zip(labels, best, strict=True)])
    )


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


# -- finding metrics ------------------------------------------------------------------------------


def test_a_single_number_is_no_vector_of_scores() -> None:
    with pytest.raises(DataError, match="do not fit"):
        Top1().update({"loss": np.float32(1) * np.ones(())}, np.array([0]), {})


def test_own_metrics_come_by_entry_points() -> None:
    assert {"mse", "sqnr", "top1", "top5"} <= set(metric_names())
    kinds = {"mse": MeanSquaredError, "sqnr": Sqnr, "top1": Top1, "top5": Top5}
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


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_metric", "no metric"),
        ("no_such_module:Class", "cannot be loaded"),
        ("math:NoSuchClass", "cannot be loaded"),
        (":Class", "cannot be loaded"),
        (".relative:Class", "cannot be loaded"),
        ("math:", "cannot be loaded"),
        ("math:pi", "cannot be made"),
        ("fractions:Decimal", "has no 'unit'"),
        ("broken_metric:Class", "cannot be loaded"),
        ("broken_metric_class:Class", "cannot be made"),
    ],
)
def test_metrics_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "broken_metric.py").write_text("1 / 0\n")
    (tmp_path / "broken_metric_class.py").write_text(
        "class Class:\n    def __init__(self, size):\n        pass\n"
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
