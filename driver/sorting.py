"""``bitwright sorting-unit``: write a circuit that sorts the words of a window."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bitwright.errors import UsageError
from bitwright.files import check_writable, write_atomically
from bitwright.targets.orders import Key, Order
from bitwright.targets.sorting_unit import SortingUnit, Starts

__all__ = ["sorting_unit"]


def sorting_unit(
    window: int,
    *,
    output: str | Path,
    buckets: int = 0,
    word_bits: int = 8,
    key: Key = "popcount",
    map_: str = "uniform",
    direction: Literal["descending", "ascending"] = "descending",
    starts: Starts = "chained",
    name: str = "sorting_unit",
    overwrite: bool = False,
) -> SortingUnit:
    """Write a sorting unit in Verilog.

    Parameters
    ----------
    window
        Terms that are ordered at once, 2 to 256.
    output
        The file to write.
    buckets
        Number of buckets, 2 to 64; 0 for one a key (*exact*), which Gray rank needs words below 7
        bits for.
    word_bits
        Width of the words, 1 to 16.
    key
        What words are sorted by: ``popcount`` or ``gray-rank``.
    map_
        How keys are mapped to buckets: ``uniform``, or the bucket of every key with dots between,
        ``0.0.0.1.1.2.2.3.3``.
    direction
        ``descending`` sends the words with the largest keys first.
    starts
        ``chained`` gives the smaller unit, ``counted`` the faster one.
    name
        Name of the Verilog module.
    overwrite
        Whether ``output`` may exist.

    Returns
    -------
    SortingUnit
        What was written.

    Raises
    ------
    UsageError
        If a parameter is out of range, the map is no map of such words, or Amaranth is missing.
    OutputError
        If the file cannot be written.
    """
    path = check_writable(output, overwrite=overwrite)
    order = Order(key=key, buckets=buckets, map=map_, direction=direction)
    if map_ in ("quantile", "calibrated"):
        raise UsageError(
            f"a {map_} map depends on data, and a circuit needs the map itself",
            fix="give the bucket of every key: --map 0.0.0.1.1.2.2.3.3",
        )
    unit = SortingUnit(
        window,
        word_bits=word_bits,
        key=key,
        bucket_map=order.bucket_map(word_bits),
        descending=direction == "descending",
        starts=starts,
    )
    write_atomically(path, unit.verilog(name).encode())
    return unit
