from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from bitwright import Layer, Precision, targets
from bitwright.errors import UsageError
from bitwright.targets.cost_table import cost_table
from bitwright.targets.schema import Document, entries, unit_of
from tests.targets.descriptions import DROPPED, changed

NAMES = sorted(targets.available())


def fields(value: Any, path: str = "") -> list[str]:
    """Paths of all numbers with a source in a description."""
    if not isinstance(value, dict):
        return []
    if set(value) == {"value", "source"}:
        return [path]
    found = (fields(part, f"{path}.{name}".lstrip(".")) for name, part in value.items())
    return [name for part in found for name in part]


NUMBERS = [
    (name, field)
    for name in NAMES
    for field in fields(targets.get(name).model_dump(mode="json", by_alias=True))
]


# -- what ships ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source_and_a_basis(name: str) -> None:
    accelerator = targets.get(name)
    numbers = list(entries(accelerator))
    assert numbers
    for entry in numbers:
        assert accelerator.sources[entry.source].text


@pytest.mark.parametrize("name", NAMES)
def test_a_description_survives_writing_and_reading(tmp_path: Path, name: str) -> None:
    assert targets.get(changed(tmp_path, name, {})) == targets.get(name)


@pytest.mark.parametrize(
    "field, unit",
    [
        ("frequency_mhz", "MHz"),
        ("weight_buffer_kib", "KiB"),
        ("dram_bits_per_cycle", "bit/cycle"),
        ("dram_energy_pj_per_bit", "pJ/bit"),
        ("core_energy_pj_per_cycle", "pJ/cycle"),
        ("mac_energy_pj", "pJ"),
        ("weight_memory_bytes", "byte"),
        ("partial_sum_bits", "bit"),
        ("macs_per_cycle", "MAC/cycle"),
        ("array_rows", ""),
        ("relative_speed", ""),
    ],
)
def test_units_stand_in_the_names(field: str, unit: str) -> None:
    assert unit_of(field) == unit


def test_tables_are_listed_row_by_row() -> None:
    rows = {entry.field: entry.value for entry in entries(targets.get("silago/drra"))}
    assert rows["cost.mac_energy_pj[w8a8]"] == 0.542  # arXiv 2108.01192
    assert rows["weight_memory_bytes"] == 6 * 2**20


# -- bad input -----------------------------------------------------------------------------------


def refused(path: Path) -> UsageError:
    with pytest.raises(UsageError) as raised:
        targets.get(path)
    return raised.value


def line_of(path: Path, error: UsageError) -> str:
    """The line that an error names."""
    place, _, number = str(error.where).rpartition(":")
    assert place == str(path)
    return path.read_text().splitlines()[int(number) - 1].strip()


@pytest.mark.parametrize("name, field", NUMBERS)
def test_a_number_without_a_source(tmp_path: Path, name: str, field: str) -> None:
    path = changed(tmp_path, name, {f"{field}.source": DROPPED})
    error = refused(path)
    assert f"field '{field}.source': is missing" in error.what
    assert line_of(path, error) == f"{field.rpartition('.')[2]}:"


@pytest.mark.parametrize("name, field", NUMBERS)
def test_a_negative_number(tmp_path: Path, name: str, field: str) -> None:
    value = targets.get(name).model_dump(mode="json", by_alias=True)
    for part in field.split("."):
        value = value[part]
    number = value["value"]
    negative = dict.fromkeys(number, -1) if isinstance(number, dict) else -1
    error = refused(changed(tmp_path, name, {f"{field}.value": negative}))
    assert f"field '{field}.value" in error.what
    least = 1 if field == "link.window" else 0  # a single term has no order
    assert f"greater than {least}, not -1" in error.what


@pytest.mark.parametrize(
    "changes, what, fix, line",
    [
        (
            {"cost.frequency_mhz": DROPPED, "cost.frequency_ghz": {"value": 1, "source": "paper"}},
            "field 'cost.frequency_ghz': there is no such field",
            "did you mean 'frequency_mhz'?",
            "frequency_ghz:",
        ),
        (
            {"cost.frequency_mhz.value": "500 MHz"},
            "field 'cost.frequency_mhz.value': '500 MHz' is no number",
            "write the number alone: its unit is MHz",
            "value: 500 MHz",
        ),
        (
            {"cost.frequency_mhz.value": "5e2"},  # a text in YAML 1.1
            "field 'cost.frequency_mhz.value': '5e2' is no number",
            "write 500: its unit is MHz",
            "value: 5e2",
        ),
        (
            {"cost.frequency_mhz.value": 500_000_000},
            "field 'cost.frequency_mhz.value': Input should be less than or equal to 100000, not "
            "500000000",
            "write the number alone: its unit is MHz",
            "value: 500000000",
        ),
        (
            {"sources": DROPPED, "source": {}},
            "field 'source': there is no such field",
            "did you mean 'sources'?",
            "source: {}",
        ),
        (
            {"cost.frequency_mhz": None},
            "field 'cost.frequency_mhz': has no source",
            "write {value: ..., source: KEY}, KEY one of 'sources'",
            "frequency_mhz: null",
        ),
        (
            {"cost.frequency_mhz.value": "1.5e2"},
            "field 'cost.frequency_mhz.value': '1.5e2' is no number",
            "write 150: its unit is MHz",
            "value: 1.5e2",
        ),
        (
            {"cost.model": "own:"},
            "field 'cost.model': there is no cost model 'own:'",
            None,
            "model: 'own:'",
        ),
        (
            {"cost.frequency_mhz": 500},
            "field 'cost.frequency_mhz': has no source",
            "write {value: 500, source: KEY}, KEY one of 'sources'",
            "frequency_mhz: 500",
        ),
        (
            {"cost.frequency_mhz.source": "hearsay"},
            "field 'cost.frequency_mhz.source': there is no source 'hearsay'",
            "name one of paper, simulator, link, transition, or add it to 'sources'",
            "source: hearsay",
        ),
        (
            {"cost.array_rows.value": 16.5},
            "field 'cost.array_rows.value': Input should be a valid integer, not 16.5",
            None,
            "value: 16.5",
        ),
        (
            {"cost.array_rows.value": True},
            "field 'cost.array_rows.value': Input should be a valid integer, not True",
            None,
            "value: true",
        ),
        (
            {"cost.frequency_mhz.value": float("inf")},
            "field 'cost.frequency_mhz.value': Input should be a finite number, not inf",
            None,
            "value: .inf",
        ),
        (
            {"weight_memory_mib": {"value": 2, "source": "paper"}},
            "field 'weight_memory_mib': there is no such field",
            "did you mean 'weight_memory_bytes'?",
            "weight_memory_mib:",
        ),
        (
            {"sources.paper.basis": "rumour"},
            "field 'sources.paper.basis': Input should be 'published', 'measured', "
            "'inferred' or 'example', not 'rumour'",
            None,
            "basis: rumour",
        ),
        (
            {"cost.array_rows": DROPPED},
            "field 'cost.array_rows': is missing",
            None,
            "cost:",
        ),
        (
            {"cost.model": "bit-fusion"},
            "field 'cost.model': there is no cost model 'bit-fusion'",
            "choose one of bitfusion, precision-table, systolic, zigzag, or write "
            "package.module:Class",
            "model: bit-fusion",
        ),
        (
            {"cost.model": "no_such_package.costs:Model"},
            "field 'cost.model': cost model 'no_such_package.costs:Model' cannot be loaded "
            "(ModuleNotFoundError: No module named 'no_such_package')",
            None,
            "model: no_such_package.costs:Model",
        ),
        (
            {"cost.model": "pathlib:Path"},
            "field 'cost.model': 'pathlib:Path' is no cost model",
            "a cost model is a subclass of bitwright.targets.CostModel",
            "model: pathlib:Path",
        ),
        (
            {"cost": DROPPED, "costs": {}},
            "field 'costs': there is no such field",
            None,
            "costs: {}",
        ),
    ],
)
def test_what_is_wrong_where_and_the_way_out(
    tmp_path: Path, changes: dict[str, Any], what: str, fix: str | None, line: str
) -> None:
    path = changed(tmp_path, "bitfusion/eyeriss", changes)
    error = refused(path)
    assert error.what == what
    assert fix is None or error.fix == fix
    assert error.fix
    assert line_of(path, error) == line


LINK = {
    "flit": "paired",
    "word_bits": {"value": 8, "source": "paper"},
    "lanes": {"value": 8, "source": "paper"},
    "packing": "column-major",
    "loops": ["channel", "position", "chunk"],
    "window": {"value": 25, "source": "paper"},
    "order": "popcount=buckets:4",
    "source": "paper",
    "energy_pj_per_transition": {"value": 0.173, "source": "paper"},
    "frequency_mhz": {"value": 125, "source": "paper"},
}


@pytest.mark.parametrize(
    "changes, what, line",
    [
        ({"flit": "shared"}, "field 'link.flit': Input should be 'paired'", "flit: shared"),
        ({"flit": DROPPED}, "field 'link.flit': is missing", "link:"),
        (
            {"word_bits.value": 17},
            "field 'link.word_bits.value': Input should be less",
            "value: 17",
        ),
        ({"word_bits": 8}, "field 'link.word_bits': has no source", "word_bits: 8"),
        ({"lanes.value": 0}, "field 'link.lanes.value': Input should be greater", "value: 0"),
        ({"lanes.value": 2.5}, "field 'link.lanes.value': Input should be a valid", "value: 2.5"),
        ({"packing": "diagonal"}, "field 'link.packing': Input should be", "packing: diagonal"),
        (
            {"loops": ["channel", "channel", "chunk"]},
            "field 'link.loops': a loop stands twice",
            "loops:",
        ),
        ({"loops": ["channel", "position"]}, "field 'link.loops.2': is missing", "loops:"),
        ({"reuse": "yes"}, "field 'link.reuse': Input should be a valid boolean", "reuse: 'yes'"),
        ({"reuse": True}, "field 'link': reuse: flits of both operands", "link:"),
        ({"window.value": 1}, "field 'link.window.value': Input should be greater", "value: 1"),
        ({"window.value": 257}, "field 'link.window.value': Input should be less", "value: 257"),
        ({"order": "bubble"}, "field 'link.order': there is no key 'bubble'", "order: bubble"),
        ({"order": "popcount=buckets:1"}, "by 1 buckets does nothing", "order: popcount=buckets:1"),
        (
            {"order": "popcount=map:0.1.1"},  # of 2-bit words
            "field 'link': order popcount=map:0.1.1: the bucket map of popcount has 3 entries, "
            "and 8-bit words have the keys 0 to 8",
            "link:",
        ),
        ({"order": "popcount=map:0.0.0.1.1.2.2.1.3"}, "falls, from 2 at key 6 to 1", "link:"),
        ({"order": "popcount=map:0.0.0.1.1.3.3.3.3"}, "leaves a bucket out", "link:"),
        ({"order": "popcount=buckets:10"}, "more than the 9 keys of 8-bit words", "link:"),
        (
            {"flit": "separate", "reuse": True, "loops": ["position", "chunk", "channel"]},
            "the inputs are sent once for every channel",
            "link:",
        ),
        ({"source": "hearsay"}, "field 'link.source': there is no source", "source: hearsay"),
        (
            {"lanes.source": "hearsay"},
            "field 'link.lanes.source': there is no source",
            "source: hearsay",
        ),
        (
            {"energy_pj_per_transition.value": "0.173 pJ"},
            "field 'link.energy_pj_per_transition.value': '0.173 pJ' is no number",
            "value: 0.173 pJ",
        ),
        (
            {"energy_pj_per_bit": {"value": 0.173, "source": "paper"}},
            "field 'link.energy_pj_per_bit': there is no such field",
            "energy_pj_per_bit:",
        ),
        (
            {"frequency_mhz.value": 125_000_000},
            "field 'link.frequency_mhz.value': Input should be less than or equal to 100000",
            "value: 125000000",
        ),
    ],
)
def test_links_that_are_wrong(
    tmp_path: Path, changes: dict[str, Any], what: str, line: str
) -> None:
    link = {"link": copy.deepcopy(LINK)}
    assert targets.get(changed(tmp_path, "bitfusion/eyeriss", link)).link is not None
    inside = {f"link.{field}": value for field, value in changes.items()}
    path = changed(tmp_path, "bitfusion/eyeriss", {**link, **inside})
    error = refused(path)
    assert what in error.what
    assert error.fix
    assert line_of(path, error) == line


def test_yaml_errors_name_their_line() -> None:
    with pytest.raises(UsageError) as raised:
        Document("a: 1\nb: [\n", "chip.yaml")
    assert raised.value.where == "chip.yaml:3"
    with pytest.raises(UsageError, match="'a' stands twice") as raised:
        Document("a: 1\nb: 2\na: 3\n", "chip.yaml")
    assert raised.value.where == "chip.yaml:3"


def test_the_code_of_a_users_model_lies_beside_the_description(tmp_path: Path) -> None:
    (tmp_path / "own_costs.py").write_text(
        "from bitwright.targets import CostModel\n"
        "from bitwright.vocabulary import LayerCost\n"
        "class Own(CostModel):\n"
        "    def layer_cost(self, layer, precision):\n"
        "        return LayerCost.of(layer, precision, cycles=layer.macs)\n"
    )
    path = changed(tmp_path, "silago/drra", {"cost": {"model": "own_costs:Own"}})
    accelerator = targets.get(path)
    layer = Layer.matmul(rows=2, in_features=3, out_features=4)
    assert accelerator.cost(layer, Precision(8, 8)).cycles == 24


def test_two_folders_may_have_modules_of_one_name(tmp_path: Path) -> None:
    layer = Layer.matmul(rows=2, in_features=3, out_features=4)
    cache = tmp_path / "costs.sqlite"
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "own_costs.py").write_text(
            "from bitwright.targets import CostModel\n"
            "from bitwright.vocabulary import LayerCost\n"
            "class Own(CostModel):\n"
            "    def layer_cost(self, layer, precision):\n"
            f"        return LayerCost.of(layer, precision, cycles={number})\n"
        )
        accelerator = targets.get(
            changed(folder, "silago/drra", {"cost": {"model": "own_costs:Own"}})
        )
        assert accelerator.cost(layer, Precision(8, 8)).cycles == number
        table = cost_table(accelerator, [layer], cache=cache)  # the code is part of the key
        assert table.costs[0][0].cycles == number
