"""main_link: the bits of main, and the counts of the definition in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
import yaml

from bitwright import targets
from bitwright.importer import import_model
from bitwright.linking import LayerStream, streams
from bitwright.passes.build import Built
from bitwright.passes.link_entry import ENTRY, add_link_entry, read_transfers
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.materialize_transfers import MaterializeTransfers, drop_transfers
from bitwright.passes.pack_weights import PackWeights
from bitwright.passes.partition_for_target import PartitionForTarget
from bitwright.passes.popcount_reorder import PopcountReorder
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.targets.link import Link, Part, flits, transitions
from bitwright.targets.orders import Order
from bitwright.targets.places import constant_places
from tests.passes.graphs import draw_graph
from tests.passes.modules import assert_same, transform
from tests.passes.regions import compiled, execute, together
from tests.quant.cases import convolutions, products
from tests.quant.qdq import Array, Builder

SIGNED = TensorQuantization(0.05, 3, 8, signed=True)
UNSIGNED = TensorQuantization(0.04, 17, 8, signed=False)
WIDE = TensorQuantization(0.0002, 0, 16, signed=True)
NARROW = TensorQuantization(0.3, 5, 4, signed=False)


def described(folder: Path, **changes: Any) -> str:
    """A file that describes the link of the ordering simulator, with changes."""
    link = targets.get_link("ordering-simulator").model_dump(mode="json", exclude_none=True)
    for name, value in changes.items():
        link[name] = {**link[name], "value": value} if isinstance(link[name], dict) else value
    named = {entry["source"] for entry in link.values() if isinstance(entry, dict)}
    document = {
        "schema_version": 1,
        "name": "test",
        "summary": "a link",
        "sources": {
            name: {"text": "this test", "basis": "example"} for name in {*named, link["source"]}
        },
        "link": link,
    }
    path = folder / "link.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return str(path)


def assert_same_bits(model: onnx.ModelProto, feeds: Mapping[str, Array], passes: str) -> Built:
    """Assert that main and main_link agree; return what was built."""
    built = compiled(model, passes=passes)
    inputs = [feeds[value.name] for value in model.graph.input]
    outputs = execute(built, *inputs)
    found = execute(built, *inputs, entry=ENTRY)
    for mine, expected in zip(found, outputs, strict=False):
        assert mine.dtype == expected.dtype
        np.testing.assert_array_equal(mine, expected)
    return built


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def weights(builder: Builder, *shape: int, bits: int = 8, seed: int = 0) -> str:
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(seed).normal(0, half / 3, shape).round().clip(-half, half - 1)
    return builder.weights(codes.astype(np.int64), np.float32(0.01), bits=bits)


def network(batch: int | str) -> onnx.ModelProto:
    """Padded and strided, grouped and dense layers, and a product of two activations."""
    builder = Builder()
    x = builder.activation(builder.input("x", [batch, 4, 6, 5]), SIGNED)
    x = builder.node(
        "Conv", x, weights(builder, 6, 4, 3, 3), name="conv", pads=[1, 0, 0, 2], strides=[2, 1]
    )
    x = builder.activation(builder.node("Relu", x), SIGNED)
    x = builder.node("Conv", x, weights(builder, 6, 2, 1, 3, seed=1), name="grouped", group=3)
    x = builder.activation(x, SIGNED)  # [batch, 6, 3, 3]
    rows = builder.node("MatMul", x, weights(builder, 3, 7, seed=2), name="rows")
    left = builder.activation(rows, SIGNED)  # [batch, 6, 3, 7]
    turned = builder.node("Transpose", left, perm=[0, 1, 3, 2])
    product = builder.node("MatMul", left, turned, name="attention")  # [batch, 6, 3, 3]
    last = builder.activation(product, UNSIGNED)  # one pair of types is sent: few kernels
    return builder.model(last, shape=[batch, 6, 3, 3])


ORDERS = {
    "none": ("ordering-simulator", "materialize-transfers"),
    "popcount": ("ordering-simulator", "popcount-reorder"),
    "popcount=on:inputs:buckets:4:direction:ascending:snake:true": ("ordering-simulator", ""),
    "gray-rank=on:separated:buckets:8": ("generic/systolic", ""),
    "popcount=on:separated:snake:true": ("bitfusion/eyeriss", ""),
    "chain": ("ordering-simulator", ""),
}


def options(order: str) -> str:
    """The options of the pass that make an order."""
    key, _, rest = order.partition("=")
    return f"popcount-reorder=key:{key}" + (f":{rest}" if rest else "")


@pytest.mark.parametrize("order", ORDERS)
def test_counts_are_those_of_the_definition(order: str) -> None:
    name, passes = ORDERS[order]
    passes = f"materialize-transfers=link:{name},{passes or options(order)}"
    model = network("n")
    x = normal(3, 4, 6, 5)
    built = assert_same_bits(model, {"x": x}, passes)
    assert built.link is not None
    assert [layer.layer for layer in built.link.layers] == ["conv", "grouped", "rows", "attention"]
    assert built.link.batched
    assert built.link.skipped == {}
    link, parsed = targets.get_link(name), Order.parse(order)
    row_major = link.model_copy(update={"packing": "row-major"})
    ways = {"row-major": (row_major, Order()), "none": (link, Order()), order: (link, parsed)}
    expected: dict[tuple[str, str], dict[Part, Array]] = {}
    words: dict[str, dict[Part, int]] = {}

    def take(stream: LayerStream) -> None:
        for way, (wire, sorting) in ways.items():
            for part, sent in send(stream, wire, sorting).items():
                known = expected.setdefault((stream.traffic.layer, way), {})
                count = np.array([*transitions(sent, 8).ravel(), len(sent)])
                known[part] = known.get(part, 0) + count
        for part, number in stream.traffic.words_sent(link).items():
            known_words = words.setdefault(stream.traffic.layer, {})
            known_words[part] = known_words.get(part, 0) + number

    reference = streams(load(model), take)
    for sample in x:
        reference.run({"x": sample[None]})
    found = iter(execute(built, x, entry=ENTRY)[1:])
    for layer in built.link.layers:
        known_ways = dict.fromkeys(ways)
        if order == "chain" and layer.layer == "attention":  # a chain is one of constants
            del known_ways[order]
            assert layer.reason.startswith("left unsorted")
        assert list(layer.variants) == list(known_ways)
        for way in layer.variants:
            counts, sent_flits = next(found), next(found)
            for place, part in enumerate(("inputs", "weights", "index")):
                wanted = expected[layer.layer, way].get(part)  # type: ignore[call-overload]
                if wanted is None:
                    assert not counts[place].any()
                    assert sent_flits[place] == 0
                    continue
                lanes = (len(wanted) - 1) // 8
                assert counts[place, :lanes].ravel().tolist() == wanted[:-1].tolist()
                assert not counts[place, lanes:].any()
                assert sent_flits[place] == wanted[-1]
            for place, part in enumerate(("inputs", "weights")):
                number = link.words_in(int(sent_flits[place]), layer.terms)
                assert number == words[layer.layer][part]  # type: ignore[index]
    assert next(found, None) is None


def send(stream: LayerStream, link: Link, order: Order) -> dict[Part, Array]:
    """A layer's flits for one sample, by the definition in NumPy."""
    (inputs,) = stream.inputs
    tables: dict[Part, Any] = {}
    if order.is_sorted:
        table = order.table(link.word_bits.value)
        tables = {"inputs": table, "weights": table}
    words, places = link.words(stream.weights), None
    if order.key == "chain":
        positions = len(stream.traffic.bases)
        places = constant_places(words, link, order, positions=positions)
    return flits(stream.traffic, link.words(inputs), words, link, order, tables, places)


def assert_random_layers(on: str, count: int, folder: Path) -> None:
    """All ranks, groups, strides, dilations, paddings, widths and zero points."""
    kinds = (convolutions, products)
    cases = [kinds[index % 2](np.random.default_rng([len(on), index])) for index in range(count)]
    model = together([builder.model(output) for builder, output, _ in cases])
    feeds = {
        f"m{index}_{name}": array
        for index, (_, _, inputs) in enumerate(cases)
        for name, array in inputs.items()
    }
    link = described(folder, word_bits=16, lanes=4)
    passes = f"materialize-transfers=link:{link},popcount-reorder=on:{on}:buckets:5"
    built = assert_same_bits(model, feeds, passes)
    assert built.link is not None
    sent = {layer.layer for layer in built.link.layers}
    assert len(sent) >= count // 2
    assert sent.isdisjoint(built.link.skipped)
    assert {layer.name for layer in built.layers} == {*sent, *built.link.skipped}


def test_random_layers_have_the_bits_of_main(tmp_path: Path) -> None:
    assert_random_layers("separated", 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["weights", "inputs", "separated"])
def test_many_random_layers_have_the_bits_of_main(on: str, tmp_path: Path) -> None:
    assert_random_layers(on, 16, tmp_path)


def assert_random_graph(seed: int, folder: Path) -> None:
    builder, outputs, feeds = draw_graph(seed)
    link = described(folder, word_bits=16, window=20)
    passes = f"materialize-transfers=link:{link},popcount-reorder=key:gray-rank:buckets:3"
    built = assert_same_bits(builder.model(*outputs), feeds, passes)
    assert built.link is not None
    assert built.link.layers


def test_a_random_graph_has_the_bits_of_main(tmp_path: Path) -> None:
    assert_random_graph(2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 5, 6])
def test_many_random_graphs_have_the_bits_of_main(seed: int, tmp_path: Path) -> None:
    assert_random_graph(seed, tmp_path)


def test_a_batch_that_is_no_leading_axis_is_sent_one_sample_at_a_time() -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", ["n", 5, 4]), SIGNED)
    first = builder.node("Transpose", x, perm=[1, 0, 2])
    made = builder.node("MatMul", first, weights(builder, 4, 3), name="layer")
    model = builder.model(builder.activation(made, SIGNED), shape=[5, "n", 3])
    built = assert_same_bits(
        model, {"x": normal(2, 5, 4)}, "materialize-transfers=link:ordering-simulator"
    )
    assert built.link is not None
    assert not built.link.batched


def test_several_rows_and_images_of_a_sample() -> None:
    """A sample's rows and images are sent one after the other, whatever axes they are."""
    builder = Builder()
    x = builder.activation(builder.input("x", ["n", 2, 3, 4, 4]), SIGNED)
    images = builder.node("Reshape", x, builder.constant(np.array([-1, 3, 4, 4])))
    made = builder.node("Conv", images, weights(builder, 5, 3, 3, 3), name="frames")
    frames = builder.activation(made, SIGNED)  # [2 n, 5, 2, 2]
    rows = builder.node("Reshape", frames, builder.constant(np.array([-1, 4])))
    model = builder.model(
        builder.activation(
            builder.node("MatMul", rows, weights(builder, 4, 3), name="rows"), SIGNED
        )
    )
    samples = normal(3, 2, 3, 4, 4)
    built = assert_same_bits(
        model, {"x": samples}, "popcount-reorder,materialize-transfers=link:ordering-simulator"
    )
    assert built.link is not None
    assert built.link.batched
    # All samples at once, and each alone.
    together_, alone = (
        [execute(built, *[part], entry=ENTRY)[1:] for part in np.split(samples, parts)]
        for parts in (1, 3)
    )
    for index, whole in enumerate(together_[0]):
        np.testing.assert_array_equal(whole, sum(entry[index] for entry in alone))
    assert_counts_of_the_reference(built, model, {"x": samples}, together_[0])


def assert_counts_of_the_reference(
    built: Built, model: onnx.ModelProto, feeds: Mapping[str, Array], found: Any
) -> None:
    """Assert that main_link counts unsorted what the streams of ``bitwright link`` count."""
    assert built.link is not None
    expected: dict[str, Any] = {}

    def take(stream: LayerStream) -> None:
        link = targets.get_link("ordering-simulator")
        for inputs in stream.inputs:
            sent = send(replace(stream, inputs=inputs[None]), link, Order())
            count = np.array([transitions(sent[part], 8) for part in ("inputs", "weights")])
            expected[stream.traffic.layer] = expected.get(stream.traffic.layer, 0) + count

    streams(load(model), take).run(feeds)
    results = iter(found)
    for layer in built.link.layers:
        for way in layer.variants:
            counts, _ = next(results), next(results)
            if way == "none":
                lanes = expected[layer.layer].shape[1]
                np.testing.assert_array_equal(counts[:2, :lanes], expected[layer.layer])


@pytest.mark.parametrize("batch", [3, 2])
def test_samples_of_a_fixed_batch_are_sent_as_the_reference_does(batch: int) -> None:
    model, x = network(batch), normal(batch, 4, 6, 5)
    built = assert_same_bits(model, {"x": x}, "materialize-transfers=link:ordering-simulator")
    found = execute(built, x, entry=ENTRY)[1:]
    assert_counts_of_the_reference(built, model, {"x": x}, found)


def test_widths_and_asymmetric_activations(tmp_path: Path) -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", ["n", 40]), WIDE)
    x = builder.node("MatMul", x, weights(builder, 40, 12, bits=16), name="wide")
    x = builder.activation(x, NARROW)
    x = builder.node("MatMul", x, weights(builder, 12, 9, bits=4), name="narrow")
    model = builder.model(builder.activation(x, UNSIGNED), shape=["n", 9])
    link = described(tmp_path, word_bits=16)
    passes = f"materialize-transfers=link:{link},popcount-reorder=on:inputs"
    built = assert_same_bits(model, {"x": normal(5, 40)}, passes)
    assert built.link is not None
    assert [layer.layer for layer in built.link.layers] == ["wide", "narrow"]


def test_a_layer_that_is_used_in_several_ways_is_sent_once() -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", ["n", 8]), SIGNED)
    sums = builder.node("MatMul", x, weights(builder, 8, 4), name="layer")
    first = builder.activation(sums, SIGNED)
    second = builder.activation(builder.node("Relu", sums), UNSIGNED)
    model = builder.model(first, second)
    built = assert_same_bits(
        model, {"x": normal(2, 8)}, "materialize-transfers=link:ordering-simulator"
    )
    assert built.link is not None
    assert [layer.layer for layer in built.link.layers] == ["layer"]


def test_main_is_what_it_is_without_transfers() -> None:
    before = [PropagateQuantization(), PartitionForTarget(), LowerToInteger()]
    unsent = transform(import_model(load(network("n"))), *before)
    sent = transform(unsent, MaterializeTransfers("ordering-simulator"), PopcountReorder())
    assert_same(drop_transfers(sent), unsent)
    packed = transform(unsent, PackWeights())
    entry = add_link_entry(packed, read_transfers(sent))
    for variable, function in packed.functions_items():
        tvm.ir.assert_structural_equal(entry.module[variable.name_hint], function)


def test_kernels_are_shared_by_all_layers() -> None:
    imported = import_model(load(network("n")))
    before = [PropagateQuantization(), PartitionForTarget(), LowerToInteger()]
    unsent = transform(imported, *before)
    passes = [MaterializeTransfers("ordering-simulator"), PopcountReorder(on="inputs")]
    transfers = read_transfers(transform(unsent, *passes))
    found = add_link_entry(transform(unsent, PackWeights()), transfers).module
    kernels = [v.name_hint for v in found.get_global_vars() if v.name_hint.startswith("link_")]
    assert len(kernels) == 3  # row-major, column-major, sorted
