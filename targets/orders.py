"""Orders in which the terms of a dot product are sent, and the counting sort that makes them.

A *key* maps a word, the bit pattern on the wire, to a number; a *bucket map* maps keys to a few
buckets. Both are static, so an order is a table over all words: kernels, NumPy and hardware read
the same table. The positions are those of the stable counting sort of arXiv 2601.14087.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from bitwright.errors import UsageError

__all__ = [
    "BucketMap",
    "Key",
    "Order",
    "calibrated_map",
    "check_map",
    "counting_sort",
    "key_count",
    "keys",
    "quantile_map",
    "uniform_map",
]

Key = Literal["popcount", "gray-rank"]
"""``popcount`` is the number of ones; ``gray-rank`` the place in the reflected Gray code."""

BucketMap = tuple[int, ...]
"""The bucket of every key: from 0 on, never falling, none left out."""

WORD_BITS: Final = 16
"""The widest word that there is a table for."""

_BORDERS: Final = 256  # places where a bucket of a calibrated map may begin


def key_count(key: Key, word_bits: int) -> int:
    """How many values a key has: ``word_bits + 1`` for popcount, ``2**word_bits`` for Gray rank."""
    return word_bits + 1 if key == "popcount" else 1 << word_bits


def keys(key: Key, word_bits: int) -> npt.NDArray[np.uint16]:
    """The key of every word.

    Parameters
    ----------
    key
        Which key.
    word_bits
        Width of the words, 1 to 16.

    Returns
    -------
    numpy.ndarray
        uint16, one entry for each of the ``2**word_bits`` bit patterns.
    """
    if not 1 <= word_bits <= WORD_BITS:
        raise UsageError(f"words have 1 to {WORD_BITS} bits, not {word_bits}")
    words = np.arange(1 << word_bits, dtype=np.uint16)
    if key == "popcount":
        return np.bitwise_count(words).astype(np.uint16)
    ranks = words.copy()
    for shift in (1, 2, 4, 8):  # the XOR of all bits from the highest down
        ranks ^= ranks >> shift
    return ranks


def uniform_map(buckets: int, count: int) -> BucketMap:
    """Buckets of equal width: ``M[v] = v * buckets // count``."""
    return tuple(value * buckets // count for value in range(count))


def quantile_map(histogram: Sequence[float] | npt.NDArray[Any], buckets: int) -> BucketMap:
    """Buckets of equal mass, as nearly as keys allow; each holds a key at least.

    Parameters
    ----------
    histogram
        How often each key occurs.
    buckets
        How many buckets.
    """
    mass = np.asarray(histogram, np.float64)
    count = len(mass)
    total = mass.sum()
    if total <= 0:
        return uniform_map(buckets, count)
    below = np.cumsum(mass) / total  # mass up to and with a key
    starts = [0]
    for bucket in range(1, buckets):
        # The key at which this bucket begins: the border that is nearest to its share.
        lowest, highest = starts[-1] + 1, count - (buckets - bucket)
        borders = below[lowest - 1 : highest]
        starts.append(lowest + int(np.argmin(np.abs(borders - bucket / buckets))))
    found = np.zeros(count, np.int64)
    found[starts[1:]] = 1
    return tuple(int(bucket) for bucket in np.cumsum(found))


def calibrated_map(
    histogram: Sequence[float] | npt.NDArray[Any], key: Key, word_bits: int, buckets: int
) -> BucketMap:
    """Buckets within which words differ least on average; each holds a key at least.

    Minimises the expected Hamming distance of two words of one bucket, ``2 q (1 - q)`` summed over
    the bits with ``q`` the share of ones in the bucket, weighted by the bucket's mass: by dynamic
    programming over its borders, which are multiples of 1/256 of the keys where there are more.

    Parameters
    ----------
    histogram
        How often each word occurs, by its bit pattern.
    key
        What words are sorted by.
    word_bits
        Width of the words.
    buckets
        How many buckets.

    Raises
    ------
    UsageError
        If there are more buckets than borders.
    """
    mass = np.asarray(histogram, np.float64)
    count = key_count(key, word_bits)
    step = max(1, count // _BORDERS)
    if buckets > count // step:
        raise UsageError(
            f"a calibrated map has at most {count // step} buckets here, not {buckets}",
            fix=f"take at most {count // step}, or map:uniform",
        )
    if mass.sum() <= 0:
        return uniform_map(buckets, count)
    of_word = keys(key, word_bits) // step
    entries = -(-count // step)
    ones = (np.arange(1 << word_bits)[:, None] >> np.arange(word_bits)) & 1
    # Sums below each border: of the mass, and of the mass with each bit set.
    columns = [mass, *(mass * ones.T)]
    below = np.zeros((entries + 1, word_bits + 1))
    for number, column in enumerate(columns):
        below[1:, number] = np.cumsum(np.bincount(of_word, column, entries))
    inside = below[None] - below[:, None]
    weight, set_bits = inside[..., 0], inside[..., 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(weight > 0, 2 * (set_bits.sum(-1) - (set_bits**2).sum(-1) / weight), 0)
    cost[np.tril_indices(entries + 1)] = np.inf  # a bucket begins below where it ends
    best, begins = cost[0], []
    for _ in range(buckets - 1):
        total = best[:, None] + cost
        begins.append(np.argmin(total, 0))
        best = total.min(0)
    border, found = entries, np.zeros(count, np.int64)
    for begin in reversed(begins):
        border = int(begin[border])
        found[border * step] = 1
    return tuple(int(bucket) for bucket in np.cumsum(found))


def check_map(bucket_map: Sequence[int], key: Key, word_bits: int) -> BucketMap:
    """Refuse what is no bucket map.

    Raises
    ------
    UsageError
        If it does not cover the keys of words of that width, falls, or leaves a bucket out.
    """
    count = key_count(key, word_bits)
    what = f"the bucket map of {key}"
    if len(bucket_map) != count:
        names = f"0 to {count - 1}" if key == "popcount" else f"{count} ranks"
        raise UsageError(
            f"{what} has {len(bucket_map)} entries, and {word_bits}-bit words have the keys "
            f"{names}",
            fix=f"give {count} entries, one a key, or let it be made: map:uniform",
        )
    steps = np.diff(np.asarray(bucket_map))
    if np.any(steps < 0):
        at = int(np.argmax(steps < 0))
        raise UsageError(
            f"{what} falls, from {bucket_map[at]} at key {at} to {bucket_map[at + 1]}",
            fix="a map is monotone: larger keys have larger buckets or the same",
        )
    if bucket_map[0] != 0 or np.any(steps > 1):
        raise UsageError(
            f"{what} leaves a bucket out",
            fix="number the buckets from 0 on without a gap",
        )
    return tuple(int(bucket) for bucket in bucket_map)


def counting_sort(buckets: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Position of every term in the stable counting sort by buckets.

    ``position[i] = S[k_i] + r_i`` with the histogram's exclusive prefix sum ``S`` and the rank
    ``r_i`` among earlier terms of the same bucket (arXiv 2601.14087).

    Parameters
    ----------
    buckets
        Bucket of each term; shape (..., terms), whole numbers.

    Returns
    -------
    numpy.ndarray
        int64, of the same shape; along the last axis a permutation.
    """
    largest = int(buckets.max(initial=0))
    one_hot = buckets[..., None] == np.arange(largest + 1)
    counts = one_hot.sum(-2)
    starts = np.cumsum(counts, -1) - counts
    earlier = np.cumsum(one_hot, -2) - one_hot
    return np.asarray(np.where(one_hot, starts[..., None, :] + earlier, 0).sum(-1), np.int64)


@dataclass(frozen=True, slots=True)
class Order:
    """An order of the terms of each window.

    Attributes
    ----------
    key
        What words are sorted by; or ``none``, which leaves them as they are; ``chain``, where each
        constant weight is next to the nearest that is left (:mod:`bitwright.targets.places`); or
        ``nearest``, the greedy nearest neighbour of pairs, which no unit computes: how far one can
        get by looking at all that is sent.
    on
        Whose words: ``weights`` or ``inputs``, and the other operand moves along (*affiliated*);
        or ``separated``, each operand by its own, with the index traffic that this costs.
    buckets
        Number of buckets; 0 for one a key (*exact*).
    map
        How keys are mapped to buckets: ``uniform`` (equal width), ``quantile`` (equal mass),
        ``calibrated`` (least expected transitions), the last two on the words of a layer; or the
        bucket of every key, dots between: ``0.0.0.1.1.2.2.3.3``.
    direction
        ``descending`` sends the words with the largest keys first.
    snake
        Whether every second window sends its flits in reverse order.
    """

    key: Literal["none", "popcount", "gray-rank", "chain", "nearest"] = "none"
    on: Literal["weights", "inputs", "separated"] = "weights"
    buckets: int = 0
    map: str = "uniform"
    direction: Literal["descending", "ascending"] = "descending"
    snake: bool = False

    def __post_init__(self) -> None:
        for name, choices in _choices().items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"there is no {name} {getattr(self, name)!r} of an order",
                    fix="choose one of " + ", ".join(map(str, choices)),
                )
        for field in fields(self):
            only_sorted = field.name in ("on", "buckets", "map", "direction")
            if only_sorted and not self.is_sorted and getattr(self, field.name) != field.default:
                raise UsageError(
                    f"an order {self.key!r} sorts by no key, and there is {field.name}",
                    fix="leave it out, or sort by popcount or gray-rank",
                )
        if not isinstance(self.buckets, int):
            raise UsageError(
                f"buckets of an order is a number, not {self.buckets!r}",
                fix="take 2 or more, or 0 for one a key",
            )
        if self.buckets < 0 or self.buckets == 1:
            raise UsageError(
                f"an order by {self.buckets} buckets does nothing",
                fix="take 2 or more, or 0 for one a key",
            )
        if self.map not in ("uniform", "quantile", "calibrated") and not any(self._explicit_map()):
            raise UsageError(
                f"an order by one bucket does nothing, and the map {self.map!r} has no other",
                fix="number the buckets from 0 on: 0.0.0.1.1.2.2.3.3",
            )

    def _explicit_map(self) -> tuple[int, ...]:
        if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,5})*", self.map):
            raise UsageError(
                f"there is no bucket map {self.map!r}",
                fix="choose uniform, quantile, calibrated, or the bucket of every key with dots "
                "between: 0.0.0.1.1.2.2.3.3",
            )
        return tuple(map(int, self.map.split(".")))

    @classmethod
    def parse(cls, text: str) -> Order:
        """Read ``KEY`` or ``KEY=option:value:option:value``, as ``--order`` takes it.

        Raises
        ------
        UsageError
            If there is no such key or option, one stands twice, or a value is of the wrong type.
        """
        key, _, rest = text.strip().partition("=")
        words = rest.split(":") if rest else []
        known = {field.name: field.type for field in fields(cls) if field.name != "key"}
        if len(words) % 2:
            raise UsageError(f"{text!r} is no order", fix=f"write {key}=option:value")
        options: dict[str, Any] = {}
        for name, value in zip(words[::2], words[1::2], strict=True):
            if name not in known:
                raise UsageError(
                    f"an order has no option {name!r}", fix="it has " + ", ".join(known)
                )
            if name in options:
                raise UsageError(f"{name} stands twice in the order {text!r}", fix="leave one out")
            options[name] = value
        if "buckets" in options:
            if not re.fullmatch("[0-9]{1,9}", options["buckets"]):
                raise UsageError(f"buckets of an order is a number, not {options['buckets']!r}")
            options["buckets"] = int(options["buckets"])
        if "snake" in options:
            if options["snake"] not in ("true", "false"):
                raise UsageError(f"snake of an order is true or false, not {options['snake']!r}")
            options["snake"] = options["snake"] == "true"
        return cls(key=key, **options)  # type: ignore[arg-type]  # checked behind

    def __str__(self) -> str:
        options = [
            f"{field.name}:{str(getattr(self, field.name)).lower()}"
            for field in fields(self)
            if field.name != "key" and getattr(self, field.name) != field.default
        ]
        return self.key + ("=" if options else "") + ":".join(options)

    @property
    def is_sorted(self) -> bool:
        """Whether words are sorted by a table."""
        return self.key in ("popcount", "gray-rank")

    @property
    def orders_weights(self) -> bool:
        """Whether weights have places that depend on them alone."""
        return self.key == "chain" or (self.is_sorted and self.on != "inputs")

    @property
    def needs_histogram(self) -> bool:
        """Whether the map depends on the words that are sent."""
        return self.is_sorted and self.buckets > 0 and self.map in ("quantile", "calibrated")

    def bucket_map(self, word_bits: int, histogram: npt.NDArray[Any] | None = None) -> BucketMap:
        """The bucket of every key, before the direction.

        Parameters
        ----------
        word_bits
            Width of the words.
        histogram
            How often each word occurs, by its bit pattern, for maps that depend on it.

        Raises
        ------
        UsageError
            If there are more buckets than keys, or the map is no map of such words.
        """
        assert self.key == "popcount" or self.key == "gray-rank"
        count = key_count(self.key, word_bits)
        if self.map not in ("uniform", "quantile", "calibrated"):
            given = check_map(self._explicit_map(), self.key, word_bits)
            if self.buckets not in (0, given[-1] + 1):
                raise UsageError(
                    f"the map has {given[-1] + 1} buckets, and buckets is {self.buckets}",
                    fix="leave buckets out",
                )
            return given
        if self.buckets > count:
            raise UsageError(
                f"{self.buckets} buckets are more than the {count} keys of {word_bits}-bit words",
                fix=f"take at most {count}",
            )
        if self.buckets in (0, count):
            return tuple(range(count))
        if self.map == "uniform":
            return uniform_map(self.buckets, count)
        if histogram is None:
            raise UsageError(
                f"a {self.map} map depends on the words, and there are none to look at",
                fix="give samples, or the map itself",
            )
        if self.map == "calibrated":
            return calibrated_map(histogram, self.key, word_bits, self.buckets)
        of_keys = np.bincount(keys(self.key, word_bits), histogram, count)
        return quantile_map(of_keys, self.buckets)

    def table(
        self, word_bits: int, histogram: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[np.uint16]:
        """The bucket of every word, direction applied: terms are sent by rising bucket.

        Returns
        -------
        numpy.ndarray
            uint16, one entry for each of the ``2**word_bits`` bit patterns.
        """
        assert self.key == "popcount" or self.key == "gray-rank"
        found = np.asarray(self.bucket_map(word_bits, histogram), np.uint16)
        if self.direction == "descending":
            found = found[-1] - found
        return found[keys(self.key, word_bits)]


@functools.cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """What the fields of an order may be, for those that are a choice."""
    hints = get_type_hints(Order)
    return {name: get_args(hint) for name, hint in hints.items() if get_args(hint)}
