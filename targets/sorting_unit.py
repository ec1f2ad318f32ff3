"""The sorting unit: a counting sort of the words of a window, as hardware.

It takes one window a cycle and tells, three cycles later, which term goes to which place: terms are
sorted by a key of their words, or by buckets of keys, exactly as
:func:`bitwright.targets.orders.counting_sort` does (arXiv 2601.14087). The circuit is in
``sorting_circuit.py`` and needs Amaranth; this file says what can be asked for.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from bitwright.errors import RunError, UsageError
from bitwright.targets.orders import BucketMap, Key, check_map, key_count

if TYPE_CHECKING:
    from bitwright.targets.sorting_circuit import SortingCircuit

__all__ = ["LATENCY", "SortingUnit", "Starts"]

LATENCY: Final = 3
"""Cycles from a window to its permutation."""

Starts = Literal["counted", "chained"]
"""How a sorting unit knows where its buckets begin: see :class:`SortingUnit`."""

_WIDEST_WINDOW: Final = 256
_MOST_BUCKETS: Final = 64
_WIDEST_WORD: Final = 16

# Of Verilog-2001 (IEEE 1364-2001, annex B).
_KEYWORDS: Final = frozenset(
    """always and assign automatic begin buf bufif0 bufif1 case casex casez cell cmos config
    deassign default defparam design disable edge else end endcase endconfig endfunction
    endgenerate endmodule endprimitive endspecify endtable endtask event for force forever fork
    function generate genvar highz0 highz1 if ifnone incdir include initial inout input instance
    integer join large liblist library localparam macromodule medium module nand negedge nmos
    nor noshowcancelled not notif0 notif1 or output parameter pmos posedge primitive pull0
    pull1 pulldown pullup pulsestyle_ondetect pulsestyle_onevent rcmos real realtime reg
    release repeat rnmos rpmos rtran rtranif0 rtranif1 scalared showcancelled signed small
    specify specparam strong0 strong1 supply0 supply1 table task time tran tranif0 tranif1 tri
    tri0 tri1 triand trior trireg unsigned use vectored wait wand weak0 weak1 while wire wor
    xnor xor""".split()
)


@dataclass(frozen=True, slots=True)
class SortingUnit:
    """What a sorting unit is asked to do.

    Attributes
    ----------
    window
        Terms that are ordered at once, 2 to 256.
    word_bits
        Width of the words, 1 to 16.
    key
        What words are sorted by.
    bucket_map
        The bucket of every key, 64 buckets at most. Empty stands for one bucket a key (*exact*).
    descending
        Whether the words with the largest keys go first. Ties keep their order in any case.
    starts
        ``chained``: a bucket begins where its neighbour's ranks end, all in the second stage; the
        smaller circuit. ``counted``: the second stage counts the terms in front of every second
        bucket, and the third finds all ranks at once; the faster one.

    Raises
    ------
    UsageError
        If a parameter is out of range, or the map is no map of such words.
    """

    window: int
    word_bits: int = 8
    key: Key = "popcount"
    bucket_map: BucketMap = ()
    descending: bool = True
    starts: Starts = "chained"

    def __post_init__(self) -> None:
        if not 2 <= self.window <= _WIDEST_WINDOW:
            raise UsageError(
                f"a sorting unit orders 2 to {_WIDEST_WINDOW} terms, not {self.window}",
                fix="choose another window",
            )
        if not 1 <= self.word_bits <= _WIDEST_WORD:
            raise UsageError(f"words have 1 to {_WIDEST_WORD} bits, not {self.word_bits}")
        for name, choices in (("key", get_args(Key)), ("starts", get_args(Starts))):
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"there is no {name} {getattr(self, name)!r} of a sorting unit",
                    fix="choose one of " + ", ".join(choices),
                )
        keys = key_count(self.key, self.word_bits)
        found = check_map(self.bucket_map or range(keys), self.key, self.word_bits)
        if not 2 <= found[-1] + 1 <= _MOST_BUCKETS:
            raise UsageError(
                f"a sorting unit has 2 to {_MOST_BUCKETS} buckets, not {found[-1] + 1}",
                fix=f"take {_MOST_BUCKETS} buckets or fewer; one a key only goes up to "
                f"{_MOST_BUCKETS} keys"
                if found[-1]
                else "take 2 buckets or more",
            )
        object.__setattr__(self, "bucket_map", found)

    def __str__(self) -> str:
        buckets = "exact" if self.is_exact else f"{self.buckets} buckets"
        direction = "descending" if self.descending else "ascending"
        return f"{self.window} words of {self.word_bits} bits by {self.key}, {buckets}, {direction}"

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        return self.bucket_map[-1] + 1

    @property
    def is_exact(self) -> bool:
        """Whether every key has a bucket of its own."""
        return self.buckets == len(self.bucket_map)

    @property
    def index_bits(self) -> int:
        """Width of the index of a term, in bits."""
        return (self.window - 1).bit_length()

    @property
    def thresholds(self) -> Sequence[int]:
        """The smallest key of every bucket but the first."""
        return [self.bucket_map.index(bucket) for bucket in range(1, self.buckets)]

    def circuit(self) -> SortingCircuit:
        """The circuit, for Amaranth.

        Raises
        ------
        UsageError
            If Amaranth is not installed.
        """
        try:
            from bitwright.targets.sorting_circuit import SortingCircuit
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("amaranth"):
                raise
            raise UsageError(
                "sorting units are written by Amaranth, which is not installed",
                fix="pip install 'bitwright[hardware]'",
            ) from None
        return SortingCircuit(self)

    def verilog(self, name: str = "sorting_unit") -> str:
        """The circuit in Verilog-2001.

        Parameters
        ----------
        name
            Name of the module.

        Raises
        ------
        UsageError
            If ``name`` is no name of a module, or Amaranth is not installed.
        RunError
            If Amaranth finds no Yosys to write Verilog with.
        """
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UsageError(
                f"{name!r} is no name of a Verilog module",
                fix="take letters, digits and underscores, no digit in front",
            )
        if name in _KEYWORDS:
            raise UsageError(
                f"{name!r} is a keyword, so it is no name of a Verilog module",
                fix="take another name",
            )
        circuit = self.circuit()
        from amaranth._toolchain import ToolNotFound
        from amaranth._toolchain.yosys import YosysError
        from amaranth.back.verilog import convert

        try:
            text: str = convert(
                circuit, name=name, ports=circuit.ports, emit_src=False, strip_internal_attrs=True
            )
        except (ToolNotFound, YosysError) as error:
            raise RunError(
                f"Amaranth finds no Yosys that writes Verilog ({str(error).splitlines()[0]})",
                fix="pip install 'bitwright[hardware]'",
            ) from None
        return self._header(name) + text.partition("\n")[2].lstrip("\n")

    def _header(self, name: str) -> str:
        width, word = self.index_bits, self.word_bits
        lines = [
            f"{name}: a stable counting sort of the words of a window, made by bitwright",
            "",
            f"{self}.",
            "Buckets begin at the keys " + ", ".join(map(str, (0, *self.thresholds))) + ".",
            f"One window a cycle; its permutation comes {LATENCY} cycles later.",
            "",
            "valid              whether a window is there",
            f"words              term i in bits {word}*i to {word}*i + {word - 1}",
            "permutation_valid  whether a permutation is there",
            f"permutation        the index of the term at place r in bits {width}*r to {width}*r"
            f" + {width - 1}",
            "clk, rst           rising edge; rst, synchronous, empties the pipeline",
        ]
        wrapped = [part for line in lines for part in textwrap.wrap(line, 95) or [""]]
        return "".join(f"// {line}".rstrip() + "\n" for line in wrapped) + "\n"
