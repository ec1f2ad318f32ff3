"""The passes by name, their options, and pipelines as text."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from bitwright.errors import UsageError
from bitwright.passes.lower_scan import LowerScan
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.materialize_transfers import MaterializeTransfers
from bitwright.passes.pack_weights import PackWeights
from bitwright.passes.partition_for_target import PartitionForTarget
from bitwright.passes.permute_channels import PermuteChannels
from bitwright.passes.popcount_reorder import PopcountReorder
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.passes.registry import DEFAULT, Pipeline, available, parse
from bitwright.passes.schedule_floats import ScheduleFloats
from bitwright.passes.soft_edge_activations import SoftEdgeActivations

CLASSES = {
    "propagate-quantization": PropagateQuantization,
    "soft-edge": SoftEdgeActivations,
    "partition-for-target": PartitionForTarget,
    "lower-to-integer": LowerToInteger,
    "permute-channels": PermuteChannels,
    "materialize-transfers": MaterializeTransfers,
    "popcount-reorder": PopcountReorder,
    "lower-scan": LowerScan,
    "schedule-floats": ScheduleFloats,
    "pack-weights": PackWeights,
}
NAMES = list(CLASSES)
OPTIONAL = ["soft-edge", "permute-channels", "materialize-transfers", "popcount-reorder"]
ALWAYS = [name for name in NAMES if name not in OPTIONAL]


def test_the_passes_stand_in_the_order_of_the_pipeline() -> None:
    assert list(available()) == NAMES
    assert list(DEFAULT.options) == ALWAYS
    assert [type(step) for step in DEFAULT.create().values()] == [CLASSES[n] for n in ALWAYS]
    pipeline = parse("soft-edge,permute-channels,popcount-reorder")
    assert [type(step) for step in pipeline.create().values()] == list(CLASSES.values())


def test_optional_passes_run_where_they_are_named_with_what_they_need() -> None:
    assert [name for name, info in available().items() if info.optional] == OPTIONAL
    reordering = [name for name in NAMES if name not in ("soft-edge", "permute-channels")]
    assert list(parse("popcount-reorder=buckets:4").options) == reordering
    assert parse("popcount-reorder=buckets:4").options["popcount-reorder"] == {"buckets": 4}
    alone = [name for name in reordering if name != "popcount-reorder"]
    assert list(parse("materialize-transfers").options) == alone
    permuting = [name for name in NAMES if name in {"permute-channels", *ALWAYS}]
    assert list(parse("permute-channels").options) == permuting
    assert list(parse("pack-weights=isa:generic").options) == ALWAYS


def test_options_without_a_default_have_the_type_of_their_annotation() -> None:
    options = {option.name: option for option in available()["popcount-reorder"].options}
    assert {name: option.type for name, option in options.items()} == {
        "key": "str",
        "on": "str",
        "buckets": "int",
        "map": "str",
        "direction": "str",
        "snake": "bool",
        "window": "int",
        "auto": "bool",
    }
    assert options["buckets"].default is None
    assert parse("popcount-reorder=snake:true:window:9").options["popcount-reorder"] == {
        "snake": True,
        "window": 9,
    }


@pytest.mark.parametrize("name, kind", CLASSES.items())
def test_descriptions_come_from_the_docstrings(name: str, kind: type) -> None:
    info = available()[name]
    document = " ".join((inspect.getdoc(kind) or "").split())
    assert document.startswith(info.summary.removesuffix("."))
    assert info.requires
    assert info.ensures
    assert f"Requires: {info.requires} Ensures: " in document
    assert info.ensures.split("Parameters")[0].strip() in document


def test_options_have_types_defaults_and_help() -> None:
    (option,) = available()["partition-for-target"].options
    assert (option.name, option.type, option.default) == ("target", "str", "")
    assert option.help.startswith("Name of the accelerator")
    isa, kernels = available()["pack-weights"].options
    assert (isa.name, isa.type, isa.default) == ("isa", "str", "")
    assert "avx2" in isa.help
    assert (kernels.name, kernels.type, kernels.default) == ("kernels", "bool", True)
    (option,) = available()["lower-to-integer"].options
    assert (option.name, option.type, option.default) == ("requantization", "str", "float")
    assert available()["propagate-quantization"].options == ()


def test_options_are_read_and_the_rest_keeps_its_defaults() -> None:
    pipeline = parse("pack-weights=isa:generic, partition-for-target=target:silago/drra")
    assert list(pipeline.options) == ALWAYS
    made = pipeline.create()
    assert made["pack-weights"].isa == "generic"
    assert made["partition-for-target"].target == "silago/drra"
    assert parse("pack-weights=kernels:false").create()["pack-weights"].kernels is False
    assert parse("").options == DEFAULT.options
    assert parse("pack-weights").options == DEFAULT.options


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pack-weights=isa:generic",
        "partition-for-target=target:a/b,pack-weights=isa:x",
        "popcount-reorder=map:0.0.1:snake:false",
        "materialize-transfers",
        "soft-edge=quamba-se,pack-weights=generic",
        "soft-edge=layout:(int8:0:8@0<<0:8@0<<0<=7.5,8@8<<1):finest:0.5:tensors:x+B",
        "soft-edge=edges:15.75/143/395:ratios:0.25/1/4,lower-scan",
    ],
)
def test_what_is_written_is_read_again(text: str) -> None:
    pipeline = parse(text)
    assert parse(str(pipeline)).options == pipeline.options
    assert str(parse(str(pipeline))) == str(pipeline)


def test_a_value_alone_is_that_of_the_first_option() -> None:
    options = parse("soft-edge=quamba-se,pack-weights=isa:generic").options
    assert options["soft-edge"] == {"layout": "quamba-se"}


def test_values_with_colons_and_commas_stand_in_parentheses() -> None:
    options = parse("soft-edge=layout:(int8:0:8@0<<0:8@0<<0<=7.5,8@8<<1):finest:0.5").options
    layout = "int8:0:8@0<<0:8@0<<0<=7.5,8@8<<1"
    assert options["soft-edge"] == {"layout": layout, "finest": 0.5}


def test_common_options_give_way_to_those_of_the_pipeline() -> None:
    common = {"target": "bitfusion/eyeriss", "isa": "avx2", "unknown": 3}
    made = parse("pack-weights=isa:generic").create(**common)
    assert made["pack-weights"].isa == "generic"
    assert made["partition-for-target"].target == "bitfusion/eyeriss"


def test_some_passes_only() -> None:
    assert list(Pipeline({"lower-to-integer": {}}).create(target="x")) == ["lower-to-integer"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("hard-edge", "no pass 'hard-edge'"),
        ("=isa:x", "no pass ''"),
        ("Pack-Weights", "no pass"),
        ("pack-weights=lanes:3", "no option 'lanes'"),
        ("propagate-quantization=isa:x", "it has none"),
        ("pack-weights=kernels:no", "kernels of pack-weights is a bool, not 'no'"),
        ("popcount-reorder=buckets:few", "buckets of popcount-reorder is a int, not 'few'"),
        ("popcount-reorder=measured:x", "no option 'measured'"),
        ("pack-weights=isa", "write pack-weights=option:value"),
        ("pack-weights=isa:generic:isa", "write pack-weights=option:value"),
    ],
)
def test_errors_say_what_there_is(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_unknown_passes_are_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=", ".join(NAMES)):
        parse("nothing")


def test_the_names_of_passes_need_no_tvm() -> None:
    program = (
        "import sys, bitwright.passes.registry as r; r.DEFAULT; sys.exit('tvm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
