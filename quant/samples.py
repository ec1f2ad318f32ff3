"""Samples for calibration and evaluation, read from .npz files without loading them whole."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from bitwright.errors import DataError
from bitwright.quant.float_ops import Array
from bitwright.quant.load import ValueType

__all__ = ["Batch", "ProgressCallback", "Samples"]

ProgressCallback = Callable[[int, int], None]
"""Called with the number of samples done and their total."""

LABELS = "labels"
LENGTHS = "lengths"


@dataclass(frozen=True, slots=True)
class Batch:
    """Some consecutive samples.

    Attributes
    ----------
    inputs
        Model input to array, in the model's element type.
    labels
        What belongs to the samples in the array ``labels`` of the data, or None.
    samples
        How many samples the batch holds.
    """

    inputs: dict[str, Array]
    labels: Array | None
    samples: int


@dataclass(frozen=True, slots=True)
class _Column:
    """One array of the data: an array in memory, or a member of a zip file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    array: Array | None
    file: Path | None = None

    def chunks(self, rows: int) -> Iterator[Array]:
        """Yield ``rows`` rows at a time."""
        if self.array is not None:
            for start in range(0, self.shape[0], rows):
                yield self.array[start : start + rows]
            return
        assert self.file is not None
        row_shape = self.shape[1:]
        row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.file) as archive, archive.open(f"{self.name}.npy") as stream:
                _read_header(stream)
                for start in range(0, self.shape[0], rows):
                    count = min(rows, self.shape[0] - start)
                    content = stream.read(count * row_bytes)
                    if len(content) < count * row_bytes:
                        raise EOFError
                    # Only at its very end is the checksum of a member compared.
                    if start + count == self.shape[0] and stream.read(1):
                        raise ValueError("there is more than the header says")
                    yield np.frombuffer(content, self.dtype).reshape(count, *row_shape)
        except Exception as error:  # zipfile raises many kinds for a damaged file
            raise DataError(
                f"array {self.name!r} is damaged or truncated",
                where=str(self.file),
                fix="copy the whole file, or write it again with numpy.savez",
            ) from error


class Samples:
    """Samples that fit the inputs of one model.

    An array whose rank is that of the model input holds its samples along the first axis and is
    fed in batches. If all arrays have one axis more, each entry is one complete input; entries of
    different length are padded, and an array ``lengths`` says where along their first axis each
    ends (and labels, where :meth:`batches` is told that they are about places).

    Parameters
    ----------
    source
        An .npz file, or a mapping of names to arrays. An array belongs to the model input of the
        same name; a model with one input also takes the only array there is besides ``labels`` and
        ``lengths``.
    inputs
        The inputs of the model.

    Raises
    ------
    DataError
        If the file cannot be read, an array is missing, empty, or of a type or shape that does not
        fit. NaN and infinite values are found while the samples are read.
    """

    def __init__(
        self, source: str | Path | Mapping[str, Array], inputs: Sequence[ValueType]
    ) -> None:
        self.where = "data" if isinstance(source, Mapping) else str(source)
        columns = (
            _columns_of_mapping(source) if isinstance(source, Mapping) else _columns_of_file(source)
        )
        names = {entry.name for entry in inputs}
        self._labels = None if LABELS in names else columns.pop(LABELS, None)
        self._lengths = None if LENGTHS in names else columns.pop(LENGTHS, None)
        if len(inputs) == 1 and not names & set(columns) and len(columns) == 1:
            columns = {inputs[0].name: next(iter(columns.values()))}
        if missing := [entry.name for entry in inputs if entry.name not in columns]:
            raise DataError(
                f"there is no array for model input {missing[0]!r}",
                where=self.where,
                fix=f"arrays found: {', '.join(sorted(columns)) or 'none'}; name them after the "
                f"model inputs: {', '.join(sorted(names))}",
            )
        self._inputs = {entry.name: (entry, columns[entry.name]) for entry in inputs}
        whole = {
            entry.name: column.shape
            for entry, column in self._inputs.values()
            if entry.shape is not None and len(column.shape) == len(entry.shape) + 1
        }
        self.batched = len(whole) < len(self._inputs)
        for entry, column in self._inputs.values():
            self._check(entry, column)
        lengths = {name: column.shape[0] for name, (_, column) in self._inputs.items()}
        if self._lengths is not None:
            lengths[LENGTHS] = self._check_lengths(self._lengths)
        if self._labels is not None:
            lengths[LABELS] = self._labels.shape[0] if self._labels.shape else 0
        if len(set(lengths.values())) != 1:
            raise DataError(
                "the arrays hold different numbers of samples: "
                + ", ".join(f"{name} {length}" for name, length in lengths.items()),
                where=self.where,
                fix="every array must hold the same samples along its first axis",
            )
        self.count = next(iter(lengths.values()))
        if self.count == 0:
            raise DataError("there are no samples: the arrays are empty", where=self.where)
        self.fixed_batch = self._fixed_batch()

    def __len__(self) -> int:
        return self.count

    @property
    def has_labels(self) -> bool:
        """Whether the data hold an array called ``labels``."""
        return self._labels is not None

    def _fixed_batch(self) -> int | None:
        if not self.batched:
            return 1
        fixed = {
            entry.shape[0]
            for entry, _ in self._inputs.values()
            if entry.shape and isinstance(entry.shape[0], int)
        }
        if not fixed:
            return None
        if len(fixed) > 1:
            raise DataError(
                f"the model's inputs differ in their first size {sorted(fixed)}: it is no batch",
                where=self.where,
                fix="give every array one axis more: each entry is then one complete input",
            )
        batch = fixed.pop()
        if self.count % batch:
            raise DataError(
                f"the model takes batches of exactly {batch}, which does not divide the "
                f"{self.count} samples",
                where=self.where,
                fix="add or remove samples, or export the model with a symbolic batch",
            )
        return batch

    def _check_lengths(self, column: _Column) -> int:
        """Number of lengths; refuse them where there is nothing that they could be about."""
        where = f"{self.where}, array {LENGTHS!r}"
        if self.batched:
            raise DataError(
                "there are lengths, and the samples stand in batches",
                where=where,
                fix="give every array one axis more: each entry is then one complete input",
            )
        if len(column.shape) != 1 or column.dtype.kind not in "iu":
            raise DataError(
                f"holds {column.dtype} of shape {list(column.shape)}",
                where=where,
                fix="store one whole number a sample",
            )
        if not self._padded():
            raise DataError(
                "there are lengths, and no input of the model has a symbolic first size",
                where=where,
                fix="leave them out, or export the model with a symbolic length",
            )
        return column.shape[0]

    def _padded(self) -> dict[str, int]:
        """Inputs whose first size is free, and how long their padded entries are."""
        return {
            name: column.shape[1]
            for name, (entry, column) in self._inputs.items()
            if entry.shape and not isinstance(entry.shape[0], int) and len(column.shape) > 1
        }

    def _check(self, entry: ValueType, column: _Column) -> None:
        where = f"{self.where}, array {column.name!r}"
        if entry.dtype.kind not in "fiub" or 0 in (entry.shape or ()):
            raise DataError(
                f"model input {entry.name!r} takes no numbers: its type is {entry.dtype}, its "
                f"shape {entry.shape}",
                where=where,
                fix="bitwright quantizes and evaluates models whose inputs are arrays of numbers",
            )
        expected = None if entry.shape is None else list(entry.shape)
        shape = column.shape if self.batched else column.shape[1:]
        fits = expected is None or (
            len(shape) == len(expected)
            and all(
                not isinstance(wanted, int) or wanted == got or (self.batched and axis == 0)
                for axis, (wanted, got) in enumerate(zip(expected, shape, strict=True))
            )
        )
        if not column.shape or not fits:
            raise DataError(
                f"shape {list(column.shape)} does not fit model input {entry.name!r} of shape "
                f"{expected}",
                where=where,
                fix="samples lie along the first axis; all other sizes must be the model's",
            )
        if not np.can_cast(column.dtype, entry.dtype, "same_kind"):
            raise DataError(
                f"holds {column.dtype}, model input {entry.name!r} takes {entry.dtype}",
                where=where,
                fix=f"store the array as {entry.dtype}",
            )
        if 0 in column.shape[1:]:
            raise DataError(f"is empty: shape {list(column.shape)}", where=where)

    def batches(self, size: int, *, places_from: int | None = None) -> Iterator[Batch]:
        """Yield the samples in order, once, ``size`` at a time where the model's batch is free.

        Parameters
        ----------
        size
            Samples of a batch.
        places_from
            The column of the labels that is about the first place of a sample: the labels end
            where the sample does. None for labels that are not about places.

        Raises
        ------
        DataError
            If a sample holds NaN or infinite values, or the file is damaged.
        """
        size = self.fixed_batch or size
        streams = {
            name: column.chunks(size if self.batched else 1)
            for name, (_, column) in self._inputs.items()
        }
        labels = None if self._labels is None else self._labels.chunks(size)
        lengths = None if self._lengths is None else self._lengths.chunks(1)
        done = 0
        while done < self.count:
            batch = {}
            for name, stream in streams.items():
                array = self._cast(next(stream), name, done)
                # Not array[0], which for a scalar input would be no array.
                batch[name] = array if self.batched else array.reshape(array.shape[1:])
            count = min(size, self.count - done)
            rows = None if labels is None else next(labels)
            if lengths is not None:
                batch, rows = self._cut(batch, rows, int(next(lengths)[0]), done, places_from)
            yield Batch(batch, rows, count)
            done += count

    def _cut(
        self,
        batch: dict[str, Array],
        labels: Array | None,
        length: int,
        number: int,
        places_from: int | None,
    ) -> tuple[dict[str, Array], Array | None]:
        """Leave out the padding of one entry."""
        padded = self._padded()
        if not 1 <= length <= min(padded.values()):
            raise DataError(
                f"sample {number} has length {length}, of at most {min(padded.values())}",
                where=f"{self.where}, array {LENGTHS!r}",
                fix="give lengths from 1 to the size of the padded samples",
            )
        cut = {name: array[:length] if name in padded else array for name, array in batch.items()}
        if places_from is not None and labels is not None and labels.ndim > 1:
            fits = labels.shape[1] - places_from in padded.values()
            labels = labels[:, : places_from + length] if fits else labels
        return cut, labels

    def _cast(self, array: Array, name: str, first: int) -> Array:
        """The samples from number ``first`` on, in the element type of the model input."""
        dtype = self._inputs[name][0].dtype
        with np.errstate(over="ignore"):  # float64 to float32: found below
            cast = array.astype(dtype, copy=False)
        good = np.isfinite(cast) if dtype.kind == "f" else cast == array
        if not good.all():
            bad = next(index for index, row in enumerate(good) if not row.all())
            raise DataError(
                f"sample {first + bad} holds NaN or infinite values"
                if dtype.kind == "f"
                else f"sample {first + bad} holds numbers beyond {dtype}",
                where=f"{self.where}, array {self._inputs[name][1].name!r}",
                fix="remove or repair the sample",
            )
        return cast


def _columns_of_mapping(source: Mapping[str, Array]) -> dict[str, _Column]:
    columns = {}
    for name, value in source.items():
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise DataError(f"holds {array.dtype}, not numbers", where=f"array {name!r}")
        columns[name] = _Column(name, array.shape, array.dtype, array)
    return columns


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _columns_of_file(path: str | Path) -> dict[str, _Column]:
    path = Path(path)
    columns = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if member.endswith(".npy")]
            for member in members:
                name = member.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, fortran, dtype = _read_header(stream)
                    if dtype.kind not in "fiub":
                        raise DataError(
                            f"holds {dtype}, not numbers",
                            where=f"{path}, array {name!r}",
                            fix="store numeric arrays; Python objects are never loaded",
                        )
                    if min(shape, default=0) < 0:
                        raise ValueError(f"shape {shape} is negative")
                    array = None
                    if fortran or not shape:  # its rows are not contiguous
                        array = np.frombuffer(stream.read(), dtype).reshape(shape, order="F")
                columns[name] = _Column(name, shape, dtype, array, path)
    except FileNotFoundError:
        raise DataError("there is no such file", where=str(path)) from None
    except DataError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise DataError(
            f"not an .npz file, or a damaged one ({str(error)[:200]})",
            where=str(path),
            fix="write it with numpy.savez(file, input_name=array)",
        ) from error
    if not columns:
        raise DataError("holds no arrays", where=str(path))
    return columns
