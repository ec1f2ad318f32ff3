from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitwright.errors import DataError
from bitwright.quant.load import ValueType
from bitwright.quant.samples import Samples
from bitwright.vocabulary import Dim
from tests.quant.qdq import profile

Array = npt.NDArray[Any]

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)


def value(name: str, shape: Sequence[Dim] | None, dtype: npt.DTypeLike = FLOAT) -> ValueType:
    return ValueType(name, np.dtype(dtype), None if shape is None else tuple(shape))


def collect(samples: Samples, size: int, name: str = "x") -> Array:
    """All batches of an input, joined; their sizes are checked."""
    batches = list(samples.batches(size))
    assert sum(batch.samples for batch in batches) == len(samples)
    assert all(len(batch.inputs[name]) == batch.samples for batch in batches)
    assert all(batch.samples == size for batch in batches[:-1])
    return np.concatenate([batch.inputs[name] for batch in batches])


def save(path: Path, arrays: Mapping[str, Array], *, compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
    return path


# -- values --------------------------------------------------------------------------------------

KINDS = ["<f4", ">f4", "<f8", "<f2", "u1", "i1", "<i2", ">i4", "?"]


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_the_arrays(tmp_path: Path, kind: str, order: str, compressed: bool) -> None:
    random = np.random.default_rng(0)
    array = np.asarray(random.integers(0, 2 if kind == "?" else 100, (11, 3, 4)), kind)
    array = np.asarray(array, order="F" if order == "F" else "C")
    path = save(tmp_path / "a.npz", {"x": array}, compressed=compressed)
    samples = Samples(path, [value("x", ["n", 3, 4])])
    assert len(samples) == 11
    for size in (1, 2, 4, 11, 100):
        streamed = collect(samples, size)
        assert streamed.dtype == np.float32
        np.testing.assert_array_equal(streamed, array.astype(np.float32))


@profile(60)
@given(
    st.sampled_from(KINDS).flatmap(
        lambda kind: hnp.arrays(
            kind,
            hnp.array_shapes(min_dims=1, max_dims=4, max_side=6),
            elements={"min_value": 0, "max_value": 1} if kind != "?" else None,
        )
    ),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
)
def test_any_array_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory, array: Array, size: int, fortran: bool, packed: bool
) -> None:
    array = np.asfortranarray(array) if fortran else array
    path = save(tmp_path_factory.mktemp("a") / "a.npz", {"x": array}, compressed=packed)
    samples = Samples(path, [value("x", ["n", *array.shape[1:]])])
    np.testing.assert_array_equal(collect(samples, size), array.astype(np.float32))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_numpys_format(tmp_path: Path, version: tuple[int, int]) -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        np.lib.format.write_array(stream, array, version=version)
    np.testing.assert_array_equal(
        collect(Samples(tmp_path / "a.npz", [value("x", ["n", 3])]), 3), array
    )


def test_mapping_and_file_give_the_same(tmp_path: Path) -> None:
    arrays = {"x": np.arange(24.0).reshape(6, 4), "labels": np.arange(6)}
    path = save(tmp_path / "a.npz", arrays)
    inputs = [value("x", ["n", 4])]
    for from_file, from_memory in zip(
        Samples(path, inputs).batches(4), Samples(arrays, inputs).batches(4), strict=True
    ):
        np.testing.assert_array_equal(from_file.inputs["x"], from_memory.inputs["x"])
        assert from_file.labels is not None
        assert from_memory.labels is not None
        np.testing.assert_array_equal(from_file.labels, from_memory.labels)


def test_samples_can_be_read_again_and_side_by_side(tmp_path: Path) -> None:
    array = np.arange(10, dtype=np.float32).reshape(5, 2)
    samples = Samples(save(tmp_path / "a.npz", {"x": array}), [value("x", ["n", 2])])
    first, second = samples.batches(1), samples.batches(2)
    pairs = [(next(first).inputs["x"][0, 0], next(second).inputs["x"][0, 0]) for _ in range(3)]
    assert pairs == [(0, 0), (2, 4), (4, 8)]
    np.testing.assert_array_equal(collect(samples, 2), array)


def test_integers_stay_integers() -> None:
    samples = Samples({"x": np.array([[1], [2**40]])}, [value("x", ["n", 1], INT)])
    batch = next(samples.batches(2))
    assert batch.inputs["x"].dtype == np.int64
    assert batch.inputs["x"][1, 0] == 2**40


# -- which array belongs to which input ----------------------------------------------------------


def test_the_only_array_belongs_to_the_only_input() -> None:
    array = np.ones((2, 3), np.float32)
    assert len(Samples({"whatever": array}, [value("x", ["n", 3])])) == 2
    labelled = Samples({"whatever": array, "labels": np.zeros(2)}, [value("x", ["n", 3])])
    assert labelled.has_labels


def test_other_arrays_are_left_alone() -> None:
    arrays = {"x": np.ones((2, 3)), "y": np.ones((7, 7))}
    batch = next(Samples(arrays, [value("x", ["n", 3])]).batches(2))
    assert set(batch.inputs) == {"x"}
    assert batch.labels is None


def test_arrays_go_by_name_with_two_inputs() -> None:
    arrays = {"b": np.full((2, 1), 2.0), "a": np.full((2, 1), 1.0)}
    batch = next(Samples(arrays, [value("a", ["n", 1]), value("b", ["n", 1])]).batches(2))
    assert batch.inputs["a"][0, 0] == 1
    assert batch.inputs["b"][0, 0] == 2
    with pytest.raises(DataError, match="no array for model input 'b'"):
        Samples({"a": arrays["a"]}, [value("a", ["n", 1]), value("b", ["n", 1])])


def test_an_input_may_be_called_labels() -> None:
    """That is how training graphs name the input of the loss."""
    arrays = {"x": np.ones((2, 3)), "labels": np.array([[4], [5]])}
    samples = Samples(arrays, [value("x", ["n", 3]), value("labels", ["n", 1], INT)])
    assert not samples.has_labels
    assert next(samples.batches(2)).inputs["labels"].tolist() == [[4], [5]]


# -- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [1, 3, 4, 100])
def test_a_fixed_batch_wins(asked: int) -> None:
    samples = Samples({"x": np.arange(16.0).reshape(8, 2)}, [value("x", [4, 2])])
    assert samples.fixed_batch == 4
    assert [batch.samples for batch in samples.batches(asked)] == [4, 4]


def test_a_batch_of_one_takes_samples_one_by_one() -> None:
    samples = Samples({"x": np.arange(6.0).reshape(3, 2)}, [value("x", [1, 2])])
    shapes = [batch.inputs["x"].shape for batch in samples.batches(32)]
    assert shapes == [(1, 2)] * 3


def test_one_fixed_and_one_free_batch() -> None:
    arrays = {"a": np.ones((6, 2)), "b": np.ones((6, 2))}
    samples = Samples(arrays, [value("a", [3, 2]), value("b", ["n", 2])])
    assert [batch.inputs["b"].shape for batch in samples.batches(1)] == [(3, 2), (3, 2)]


@pytest.mark.parametrize("free", ["n", "?"])
def test_other_sizes_may_be_free(free: str) -> None:
    samples = Samples({"x": np.ones((4, 7, 5))}, [value("x", ["n", free, 5])])
    assert [batch.samples for batch in samples.batches(3)] == [3, 1]


def test_an_input_of_unknown_rank_takes_batches() -> None:
    samples = Samples({"x": np.ones((4, 7, 5))}, [value("x", None)])
    assert [batch.inputs["x"].shape for batch in samples.batches(3)] == [(3, 7, 5), (1, 7, 5)]


def test_labels_follow_their_samples() -> None:
    arrays = {"x": np.arange(10.0).reshape(5, 2), "labels": np.arange(5)}
    for batch in Samples(arrays, [value("x", ["n", 2])]).batches(2):
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels * 2, batch.inputs["x"][:, 0])


# -- one complete input after the other ----------------------------------------------------------


def test_one_axis_more_means_complete_inputs(tmp_path: Path) -> None:
    arrays = {
        "x": np.arange(24, dtype=np.float32).reshape(3, 2, 4),
        "scale": np.array([1, 2, 3], np.float32),
        "labels": np.array([7, 8, 9]),
    }
    path = save(tmp_path / "a.npz", arrays, compressed=True)
    inputs = [value("x", [2, 4]), value("scale", [])]
    for source in (path, arrays):
        samples = Samples(source, inputs)
        assert not samples.batched
        assert len(samples) == 3
        batches = list(samples.batches(2))
        assert [batch.samples for batch in batches] == [1, 1, 1]
        for index, batch in enumerate(batches):
            np.testing.assert_array_equal(batch.inputs["x"], arrays["x"][index])
            # onnxruntime takes arrays only, and no NumPy numbers.
            assert isinstance(batch.inputs["scale"], np.ndarray)
            assert batch.inputs["scale"].shape == ()
            assert batch.inputs["scale"] == index + 1
            assert batch.labels is not None
            assert batch.labels.tolist() == [7 + index]


def test_complete_inputs_need_the_axis_in_all_arrays() -> None:
    inputs = [value("x", [2, 4]), value("y", [3])]
    arrays = {"x": np.ones((5, 2, 4)), "y": np.ones((5, 3))}
    assert not Samples(arrays, inputs).batched
    with pytest.raises(DataError, match="does not fit model input 'x'"):
        Samples({**arrays, "y": np.ones(3)}, inputs)


def test_shape_of_a_complete_input_must_fit() -> None:
    with pytest.raises(DataError, match=r"shape \[5, 2, 3\] does not fit model input 'x'"):
        Samples({"x": np.ones((5, 2, 3))}, [value("x", [2, 4])])


# -- numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, 6, 9])
@pytest.mark.parametrize("whole", [False, True], ids=["batches", "complete inputs"])
def test_the_bad_sample_is_named(bad: float, index: int, whole: bool) -> None:
    array = np.ones((10, 2, 3), np.float32)
    array[index, 1, 2] = bad
    samples = Samples({"x": array}, [value("x", [2, 3] if whole else ["n", 2, 3])])
    with pytest.raises(DataError, match=rf"array 'x': sample {index} holds NaN or infinite"):
        list(samples.batches(4))


@pytest.mark.parametrize("bad", [128, -129])
def test_numbers_that_would_wrap_around(bad: int) -> None:
    samples = Samples({"x": np.array([[1], [bad]])}, [value("x", ["n", 1], np.int8)])
    with pytest.raises(DataError, match="sample 1 holds numbers beyond int8"):
        list(samples.batches(2))


def test_float64_beyond_float32_is_infinite() -> None:
    samples = Samples({"x": np.array([[1.0], [1e39]])}, [value("x", ["n", 1])])
    with pytest.raises(DataError, match="sample 1 holds"):
        list(samples.batches(2))


def test_more_data_than_the_header_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        np.lib.format.write_array(stream, np.ones((2, 3), np.float32))
        stream.write(b"more")
    samples = Samples(tmp_path / "a.npz", [value("x", ["n", 3])])
    with pytest.raises(DataError, match="damaged"):
        list(samples.batches(2))


def test_one_wrong_bit_late_in_a_large_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", {"x": np.ones((100, 10_000), np.float32)})
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    samples = Samples(path, [value("x", ["n", 10_000])])
    with pytest.raises(DataError, match="array 'x' is damaged"):
        list(samples.batches(10))


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
def test_memory_holds_a_few_batches(tmp_path: Path, compressed: bool) -> None:
    array = np.tile(np.arange(1000, dtype=np.float32), (16_000, 1))  # 64 MB
    path = save(tmp_path / "a.npz", {"x": array}, compressed=compressed)
    total, expected = 0.0, float(array.sum(dtype=np.float64))
    del array
    tracemalloc.start()
    try:
        for batch in Samples(path, [value("x", ["n", 1000])]).batches(100):  # 0.4 MB
            total += float(batch.inputs["x"].sum(dtype=np.float64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == expected
    assert peak < 4e6


# -- different lengths ---------------------------------------------------------------------------


def test_entries_end_where_lengths_say() -> None:
    x = np.arange(24).reshape(3, 8)
    data = {"x": x, "lengths": np.array([8, 1, 5]), "labels": x + 100}
    samples = Samples(data, [value("x", ["T"], INT)])
    batches = list(samples.batches(4, places_from=0))
    assert [batch.samples for batch in batches] == [1, 1, 1]
    for row, length, batch in zip(x, (8, 1, 5), batches, strict=True):
        np.testing.assert_array_equal(batch.inputs["x"], row[:length])
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels, row[None, :length] + 100)


@pytest.mark.parametrize("columns, places_from", [(8, None), (8, 3), (11, 0), (9, 1), (11, 3)])
def test_labels_end_where_they_are_about_places(columns: int, places_from: int | None) -> None:
    """Not where as many columns as there are places are something else: words, say."""
    labels = np.arange(2 * columns).reshape(2, columns)
    data = {"x": np.ones((2, 8)), "lengths": np.array([8, 5]), "labels": labels}
    samples = Samples(data, [value("x", ["T"])])
    _, batch = samples.batches(1, places_from=places_from)
    fits = places_from is not None and columns == 8 + places_from
    expected = labels[1:, : columns - 3] if fits else labels[1:]
    np.testing.assert_array_equal(batch.labels, expected)


def test_only_what_has_a_free_length_is_cut() -> None:
    data = {"x": np.ones((2, 6, 4)), "y": np.ones((2, 6)), "lengths": np.array([2, 3])}
    samples = Samples(data, [value("x", ["T", 4]), value("y", [6])])
    shapes = [(b.inputs["x"].shape, b.inputs["y"].shape) for b in samples.batches(1)]
    assert shapes == [((2, 4), (6,)), ((3, 4), (6,))]


@pytest.mark.parametrize("length", [0, -1, 9])
def test_lengths_beyond_the_entries(length: int) -> None:
    data = {"x": np.ones((2, 8)), "lengths": np.array([8, length])}
    samples = Samples(data, [value("x", ["T"])])
    with pytest.raises(DataError, match=f"sample 1 has length {length}"):
        list(samples.batches(1))


@pytest.mark.parametrize(
    "lengths, shape, message",
    [
        (np.ones((2, 1), np.int64), ["T"], "of shape"),
        (np.ones(2), ["T"], "float64"),
        (np.ones(3, np.int64), ["T"], "different numbers"),
        (np.ones(2, np.int64), [8], "no input of the model has a symbolic first size"),
        (np.ones(2, np.int64), ["n", 8], "in batches"),
    ],
)
def test_lengths_that_do_not_fit(lengths: Array, shape: Sequence[Dim], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Samples({"x": np.ones((2, 8)), "lengths": lengths}, [value("x", shape)])


def test_an_input_may_be_called_lengths() -> None:
    samples = Samples({"lengths": np.ones((2, 3))}, [value("lengths", ["n", 3])])
    assert collect(samples, 2, "lengths").shape == (2, 3)
