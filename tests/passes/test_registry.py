"""The passes by name, their options, and pipelines as text."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from bitwright.errors import UsageError
from bitwright.passes.lower_scan import LowerScan
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.pack_weights import PackWeights
from bitwright.passes.partition_for_target import PartitionForTarget
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.passes.registry import DEFAULT, Pipeline, available, parse
from bitwright.passes.schedule_floats import ScheduleFloats

CLASSES = {
    "propagate-quantization": PropagateQuantization,
    "partition-for-target": PartitionForTarget,
    "lower-to-integer": LowerToInteger,
    "lower-scan": LowerScan,
    "schedule-floats": ScheduleFloats,
    "pack-weights": PackWeights,
}
NAMES = list(CLASSES)


def test_the_passes_stand_in_the_order_of_the_pipeline() -> None:
    assert list(available()) == NAMES
    assert list(DEFAULT.options) == NAMES
    assert [type(step) for step in DEFAULT.create().values()] == list(CLASSES.values())


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
    assert list(pipeline.options) == NAMES
    made = pipeline.create()
    assert made["pack-weights"].isa == "generic"
    assert made["partition-for-target"].target == "silago/drra"
    assert parse("pack-weights=kernels:false").create()["pack-weights"].kernels is False
    assert parse("").options == DEFAULT.options
    assert parse("pack-weights").options == DEFAULT.options


@pytest.mark.parametrize(
    "text", ["", "pack-weights=isa:generic", "partition-for-target=target:a/b,pack-weights=isa:x"]
)
def test_what_is_written_is_read_again(text: str) -> None:
    pipeline = parse(text)
    assert parse(str(pipeline)).options == pipeline.options
    assert str(parse(str(pipeline))) == str(pipeline)


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
        ("soft-edge", "no pass 'soft-edge'"),
        ("=isa:x", "no pass ''"),
        ("Pack-Weights", "no pass"),
        ("pack-weights=lanes:3", "no option 'lanes'"),
        ("propagate-quantization=isa:x", "it has none"),
        ("pack-weights=kernels:no", "kernels of pack-weights is a bool, not 'no'"),
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
