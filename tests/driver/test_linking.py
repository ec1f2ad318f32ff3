from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import yaml

import bitwright
from bitwright import Transitions, linking, tables, targets
from bitwright.errors import ArtifactError, BitwrightError, ModelError, UsageError
from bitwright.linking import measure
from bitwright.quant.load import load
from bitwright.quant.observers import TensorQuantization
from bitwright.quant.reference import Reference
from bitwright.quant.samples import Samples
from bitwright.targets.link import ROW_MAJOR, UNSORTED, flits, transitions
from bitwright.targets.orders import Order, quantile_map
from bitwright.targets.places import constant_places
from tests.quant.qdq import Builder, quantize

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
MODEL, CALIBRATION, TEST = (LENET / name for name in ("lenet.onnx", "calibration.npz", "test.npz"))

Array = npt.NDArray[Any]
Terms = list[tuple[int, int]]

# -- another implementation: plain loops over Python integers ------------------------------------


def convolution(x: Array, w: Array, zero: int, **attributes: Any) -> Iterator[Terms]:
    """Pairs of every output of a convolution, as the ONNX standard defines it: x is [C, ...]."""
    size, kernel = x.shape[1:], w.shape[2:]
    rank = len(size)
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    pads = attributes.get("pads", [0] * 2 * rank)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if attributes.get("auto_pad") == "SAME_UPPER":
        out = [-(-n // s) for n, s in zip(size, strides, strict=True)]
        total = [
            max(0, (o - 1) * s + e - n)
            for o, s, e, n in zip(out, strides, extent, size, strict=True)
        ]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    out = [(n + pads[a] + pads[a + rank] - extent[a]) // strides[a] + 1 for a, n in enumerate(size)]
    in_group = w.shape[0] // attributes.get("group", 1)
    for channel, *place in np.ndindex(w.shape[0], *out):
        terms: Terms = []
        for c, *tap in np.ndindex(*w.shape[1:]):
            at = [place[a] * strides[a] - pads[a] + tap[a] * dilations[a] for a in range(rank)]
            inside = all(0 <= i < n for i, n in zip(at, size, strict=True))
            first = channel // in_group * w.shape[1]
            value = int(x[(first + c, *at)]) if inside else zero
            terms.append((value, int(w[(channel, c, *tap)])))
        yield terms


def product(x: Array, w: Array) -> Iterator[Terms]:
    """Pairs of every output of a matrix product, column by column."""
    for column, row in np.ndindex(w.shape[1], x.shape[0]):
        yield [(int(x[row, k]), int(w[k, column])) for k in range(w.shape[0])]


def naive(
    outputs: Sequence[Terms], *, column_major: bool, ordered: bool, window: int = 25, lanes: int = 8
) -> tuple[int, int]:
    """Transitions of inputs and weights, 8-bit words, the largest number of ones first."""
    counts = [0, 0]
    last: list[list[int] | None] = [None, None]
    for terms in outputs:
        for start in range(0, len(terms), window):
            chunk = terms[start : start + window]
            if ordered:  # Python's sort is stable
                chunk = sorted(chunk, key=lambda pair: -(pair[1] & 255).bit_count())
            count = -(-len(chunk) // lanes)
            for operand in (0, 1):
                for flit in range(count):
                    words = [0] * lanes
                    for rank, pair in enumerate(chunk):
                        if (rank % count if column_major else rank // lanes) == flit:
                            lane = rank // count if column_major else rank % lanes
                            words[lane] = pair[operand] & 255
                    before = last[operand]
                    if before is not None:
                        pairs = zip(words, before, strict=True)
                        counts[operand] += sum((a ^ b).bit_count() for a, b in pairs)
                    last[operand] = words
    return counts[0], counts[1]


Q = TensorQuantization(0.05, 7, 8, signed=False)
SIGNED = TensorQuantization(0.05, 0, 8, signed=True)


def conv_case(x: tuple[int, ...], w: tuple[int, ...], **attributes: Any) -> Callable[..., Any]:
    def make(builder: Builder, random: np.random.Generator) -> tuple[str, Array, Any]:
        codes = random.integers(-128, 128, w)
        operand = builder.activation(builder.input("x", (1, *x)), Q)
        weights = builder.weights(codes, 0.01, bits=8)
        values = random.normal(4, 3, (1, *x)).astype(np.float32)
        found = [list(convolution(quantize(values, Q)[0], codes, 7, **attributes))]
        return builder.node("Conv", operand, weights, **attributes), values, found

    return make


def product_case(
    x: tuple[int, ...], w: tuple[int, ...], *, operator: str = "MatMul", left: bool = False,
    computed: bool = False, **attributes: Any,
) -> Callable[..., Any]:  # fmt: skip
    def make(builder: Builder, random: np.random.Generator) -> tuple[str, Array, Any]:
        data = builder.activation(builder.input("x", x), Q)
        values = random.normal(4, 3, x).astype(np.float32)
        codes = quantize(values, Q)
        if computed:  # the data with itself, transposed
            node = builder.node("MatMul", data, builder.node("Transpose", data, perm=[0, 2, 1]))
            stacks = [product(stack, stack.T) for stack in codes]
            return node, values, list(map(list, stacks))  # samples
        stored = random.integers(-128, 128, w)
        weights = builder.weights(stored, 0.01, bits=8)
        names = (weights, data) if left else (data, weights)
        node = builder.node(operator, *names, **attributes)
        if attributes.get("transB"):
            stored = stored.T
        if attributes.get("transA"):
            codes = codes.T
        if left:  # data along its columns, weights along their rows
            codes, stored = codes.T, stored.T
        if left or attributes.get("transA"):  # the batch is no axis of the rows
            codes = codes[None]
        return (
            node,
            values,
            [list(product(np.atleast_2d(sample), stored)) for sample in codes],
        )  # samples

    return make


CASES: Mapping[str, Callable[..., Any]] = {
    "conv": conv_case((2, 7, 6), (3, 2, 3, 3)),
    "padded": conv_case((2, 7, 6), (3, 2, 3, 3), pads=[1, 2, 0, 1], strides=[2, 1]),
    "dilated": conv_case((3, 9, 9), (2, 3, 3, 2), dilations=[2, 3], pads=[2, 2, 2, 2]),
    "groups": conv_case((4, 5, 5), (6, 2, 3, 3), group=2, pads=[1, 1, 1, 1]),
    "depthwise": conv_case((4, 5, 5), (4, 1, 3, 3), group=4),
    "same": conv_case((2, 8, 7), (2, 2, 4, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    "one axis": conv_case((3, 12), (4, 3, 5), strides=[2]),
    "three axes": conv_case((2, 4, 4, 4), (2, 2, 2, 3, 2), pads=[1, 0, 0, 0, 1, 0]),
    "matmul": product_case((3, 40), (40, 5)),
    "stack": product_case((2, 3, 30), (30, 4)),
    "gemm": product_case((3, 20), (5, 20), operator="Gemm", transB=1),
    "gemm, transposed data": product_case((30, 3), (30, 4), operator="Gemm", transA=1),
    "weights on the left": product_case((30, 3), (4, 30), left=True),
    "two activations": product_case((3, 4, 30), (), computed=True),
}


def write(builder: Builder, output: str, path: Path) -> Path:
    onnx.save(builder.model(builder.activation(output, SIGNED)), path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_plain_loops(case: str, tmp_path: Path) -> None:
    builder = Builder()
    node, values, samples = CASES[case](builder, np.random.default_rng(5))
    path = write(builder, node, tmp_path / "model.onnx")
    found = bitwright.link(path, {"x": values[None]}, orders=["popcount"])
    (layer,) = found.layers
    for order, column_major in ((ROW_MAJOR, False), (UNSORTED, True), ("popcount", True)):
        counts = [
            naive(outputs, column_major=column_major, ordered=order == "popcount")
            for outputs in samples
        ]
        parts = layer.sent[order].parts
        expected = tuple(np.sum(counts, axis=0))
        assert (parts["inputs"].total, parts["weights"].total) == expected, order
    terms, outputs = len(samples[0][0]), sum(map(len, samples))
    sizes = [min(25, terms - start) for start in range(0, terms, 25)]
    assert layer[UNSORTED].parts["inputs"].flits == outputs * sum(-(-s // 8) for s in sizes)
    assert layer["popcount"].needs_unit == (case == "two activations")


# -- LeNet ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> dict[str, Array]:
    with np.load(TEST) as archive:
        return {"image": archive["image"][:6]}


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lenet") / "lenet.w8a8.onnx"
    bitwright.quantize(MODEL, calibration=CALIBRATION, precision="w8a8", output=path)
    return path


@pytest.fixture(scope="module")
def counted(lenet: Path, images: Mapping[str, Array]) -> Transitions:
    return bitwright.link(lenet, images)


def same(first: Transitions, second: Transitions) -> bool:
    return first.to_dict() == second.to_dict()


def test_the_convolutions_of_lenet(lenet: Path, images: Mapping[str, Array]) -> None:
    one = {"image": images["image"][:1]}
    found = bitwright.link(lenet, one, orders=["popcount"])
    model = onnx.load(lenet)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    loaded = load(lenet)
    _, codes = Reference(loaded).run(one)
    for node in (node for node in model.graph.node if node.op_type == "Conv"):
        weights = arrays[made[node.input[1]].input[0]].astype(np.int64)
        data = made[node.input[0]]
        while data.op_type != "DequantizeLinear":  # moves between
            data = made[data.input[0]]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        x = codes[data.input[0]][0]
        zero = int(arrays[data.input[2]])
        if node.name == "conv2" and x.shape[-1] != 14:  # a pooling between
            x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
        outputs = list(convolution(x, weights, zero, **attributes))
        for order, column_major in ((ROW_MAJOR, False), (UNSORTED, True), ("popcount", True)):
            expected = naive(outputs, column_major=column_major, ordered=order == "popcount")
            parts = found[node.name].sent[order].parts
            assert (parts["inputs"].total, parts["weights"].total) == expected, (node.name, order)


def test_samples_are_independent(
    lenet: Path, images: Mapping[str, Array], counted: Transitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = [bitwright.link(lenet, {"image": images["image"][s]}) for s in (slice(4), slice(4, 6))]
    for layer in counted.layers:
        for order, sent in layer.sent.items():
            parts = [half[layer.layer].sent[order].parts for half in halves]
            for part, all_of_it in sent.parts.items():
                both = parts[0][part].transitions + parts[1][part].transitions
                np.testing.assert_array_equal(all_of_it.transitions, both)
    monkeypatch.setattr(linking, "_GATHERED", 1)
    assert same(bitwright.link(lenet, images), counted)


def test_a_model_with_a_fixed_batch_sends_the_same(
    lenet: Path, images: Mapping[str, Array], counted: Transitions, tmp_path: Path
) -> None:
    model = onnx.load(lenet)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    path = tmp_path / "batch.onnx"
    onnx.save(model, path)
    found = bitwright.link(path, images)
    for layer in counted.layers:
        for order, sent in layer.sent.items():
            assert found[layer.layer].sent[order].transitions == sent.transitions


def test_the_defaults(counted: Transitions) -> None:
    assert counted.link == targets.get_link("ordering-simulator")
    assert counted.orders == ("popcount", "popcount=buckets:4")
    assert [layer.layer for layer in counted.layers] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert counted.skipped == {}
    assert counted.notes == ()


def test_every_order_of_the_definition(lenet: Path, images: Mapping[str, Array]) -> None:
    """The NumPy definition counts the same, from the words that the layers send."""
    one = {"image": images["image"][:1]}
    texts = [
        "gray-rank",
        "gray-rank=buckets:8:snake:true",
        "popcount=on:inputs:direction:ascending",
        "popcount=on:separated:buckets:4",
        "popcount=buckets:5:map:quantile:on:inputs",
        "gray-rank=buckets:6:map:calibrated:on:inputs",
        "chain",
    ]
    found = bitwright.link(lenet, one, orders=texts)
    sent: dict[str, linking.LayerStream] = {}
    reference = linking.streams(load(lenet), lambda s: sent.__setitem__(s.traffic.layer, s))
    reference.run(one)
    for name in ("fc2", "fc3"):
        stream, link = sent[name], found.link
        x, w = link.words(stream.inputs[0]), link.words(stream.weights)
        for text in texts:
            order = Order.parse(text)
            histogram = np.bincount(x, minlength=256)  # each is in one window
            places = None
            of_inputs: dict[Any, Array] = {}
            if order.is_sorted:
                of_inputs = dict.fromkeys(("inputs", "weights"), order.table(8, histogram))
            else:
                places = constant_places(w, link, order, positions=1)
            parts = flits(stream.traffic, x, w, link, order, of_inputs, places)
            mine = found[name].sent[str(order)].parts
            assert set(parts) == set(mine)
            for part, words in parts.items():
                assert mine[part].flits == len(words)
                np.testing.assert_array_equal(mine[part].transitions, transitions(words, 8))


def test_bucket_maps_of_inputs_come_from_the_calibration(
    lenet: Path, images: Mapping[str, Array]
) -> None:
    order = "popcount=on:inputs:buckets:3:map:quantile"
    own = bitwright.link(lenet, images, orders=[order])
    assert own.notes == ("bucket maps of inputs are made from the data that is counted",)
    again = bitwright.link(lenet, images, orders=[order], calibration=images)
    assert again.notes == ("bucket maps of inputs are made from the calibration samples",)
    assert again.to_dict()["total"] == own.to_dict()["total"]
    blank = {"image": np.zeros_like(images["image"])}
    other = bitwright.link(lenet, images, orders=[order], calibration=blank)
    assert other.total(order).transitions != own.total(order).transitions
    constant = bitwright.link(lenet, images, orders=["popcount=buckets:3:map:quantile"])
    assert constant.notes == ()  # weights are known


def test_histograms_count_every_window(tmp_path: Path) -> None:
    """Of a 1x1x3 input, all ones but the middle: the middle is in all windows of a padded row."""
    builder = Builder()
    data = builder.activation(builder.input("x", (1, 1, 3)), SIGNED)
    node = builder.node("Conv", data, builder.weights(np.ones((2, 1, 3)), 1.0, bits=8),
                        pads=[1, 1])  # fmt: skip
    path = write(builder, node, tmp_path / "model.onnx")
    values = np.array([[[0.05, 0.10, 0.15]]], np.float32)  # codes 1, 2, 3
    link = targets.get_link("ordering-simulator")
    order = Order.parse("popcount=buckets:2:map:quantile:on:inputs")
    loaded = load(path)
    samples = Samples({"x": values[None]}, loaded.inputs)
    (found,) = measure(loaded, samples, link, [order]).values()
    expected = {0: 2, 1: 2, 2: 3, 3: 2}  # padding twice, the ends in two windows each
    assert {w: int(n) for w, n in enumerate(found.histograms["inputs"]) if n} == expected
    assert order.bucket_map(8, found.histograms["inputs"]) == quantile_map([2, 5, 2, *[0] * 6], 2)


def test_measure_is_what_the_command_counts(
    lenet: Path, images: Mapping[str, Array], counted: Transitions
) -> None:
    loaded = load(lenet)
    orders = [Order.parse(text) for text in counted.orders]
    found = measure(loaded, Samples(images, loaded.inputs), counted.link, orders)
    assert list(found) == [layer.layer for layer in counted.layers]
    for layer in counted.layers:
        measured = found[layer.layer]
        for order in (UNSORTED, *counted.orders):
            assert measured.transitions[order] == layer.sent[order].transitions
            assert measured.words_sorted[order] == 0  # by constants
        assert measured.histograms["inputs"].sum() > 0
        assert "weights" not in measured.histograms


# -- links and artefacts -------------------------------------------------------------------------


def test_the_artefact_has_the_link_of_its_target(
    images: Mapping[str, Array], tmp_path: Path
) -> None:
    folder = tmp_path / "artefact"
    bitwright.compile(
        MODEL, "bitfusion/eyeriss", calibration=CALIBRATION, precision="w8a8", output=folder
    )
    found = bitwright.link(folder, images)
    assert found.link == targets.get_link("bitfusion/eyeriss")
    assert found.orders == ("popcount=on:inputs", "popcount=on:inputs:buckets:4")
    assert found.source == str(folder)
    other = bitwright.link(folder, images, link="ordering-simulator")
    assert other.link == targets.get_link("ordering-simulator")
    named = bitwright.link(folder / "model.qdq.onnx", images, target="bitfusion/eyeriss")
    assert named.to_dict()["layers"] == found.to_dict()["layers"]
    (folder / "model.qdq.onnx").unlink()
    with pytest.raises(ArtifactError, match="keeps no quantized ONNX model") as raised:
        bitwright.link(folder, images)
    assert "--keep-qdq" in str(raised.value.fix)


def test_a_float_model_is_quantized_as_the_command_does(
    images: Mapping[str, Array], counted: Transitions
) -> None:
    found = bitwright.link(MODEL, images, precision="w8a8", calibration=CALIBRATION)
    assert found.to_dict()["layers"] == counted.to_dict()["layers"]


def test_words_sorted_on_a_link_that_keeps_inputs(lenet: Path, images: Mapping[str, Array]) -> None:
    one = {"image": images["image"][:1]}
    found = bitwright.link(lenet, one, target="bitfusion/eyeriss", orders=["popcount=on:inputs"])
    # Each window once for all channels: positions x terms.
    assert found["conv1"]["popcount=on:inputs"].words_sorted == 28 * 28 * 25
    assert found["fc1"]["popcount=on:inputs"].words_sorted == 400
    paired = bitwright.link(lenet, one, orders=["popcount=on:inputs"])
    assert paired["conv1"]["popcount=on:inputs"].words_sorted == 6 * 28 * 28 * 25


def test_orders_that_a_layer_cannot_have(tmp_path: Path) -> None:
    """With one chunk, channels change first and inputs are kept; with two, chunks do."""
    preset = targets.available_links()["ordering-simulator"].model_dump(
        mode="json", exclude_none=True
    )
    preset["link"].update(flit="separate", reuse=True, loops=["position", "channel", "chunk"])
    (tmp_path / "link.yaml").write_text(yaml.safe_dump(preset))
    builder = Builder()
    x = builder.activation(builder.input("x", (1, 30)), SIGNED)
    random = np.random.default_rng(1)
    for depth, columns in ((30, 20), (20, 3)):
        weights = builder.weights(random.integers(-9, 9, (depth, columns)), 0.1, bits=8)
        x = builder.activation(builder.node("MatMul", x, weights, name=f"depth{depth}"), SIGNED)
    onnx.save(builder.model(x), tmp_path / "model.onnx")
    data = {"x": random.normal(0, 1, (1, 1, 30)).astype(np.float32)}
    found = bitwright.link(
        tmp_path / "model.onnx", data, link=tmp_path / "link.yaml", orders=["popcount"]
    )
    assert "popcount" in found["depth30"].sent
    assert found["depth30"].reason == ""
    assert "popcount" not in found["depth20"].sent
    assert found["depth20"]["popcount"] == found["depth20"][UNSORTED]  # sent unsorted
    assert "the inputs are sent once for every channel" in found["depth20"].reason


# -- the report ----------------------------------------------------------------------------------


def test_energies(counted: Transitions) -> None:
    total, unsorted = counted.total("popcount"), counted.total(UNSORTED)
    assert counted.energy_pj(total) == pytest.approx(0.173 * total.transitions)
    assert counted.unit_energy_pj(total) == 0  # constants are ordered before
    saved = 0.173 * (unsorted.transitions - total.transitions)
    assert counted.net_saved_pj(total, unsorted) == pytest.approx(saved)
    assert counted.break_even_pj_per_word(total, unsorted) is None
    document = counted.to_dict()["total"]["popcount"]
    row_major = counted.total(ROW_MAJOR).transitions
    assert document["saved_against_row_major"] == 1 - total.transitions / row_major
    assert document["saved_against_unsorted"] == 1 - total.transitions / unsorted.transitions
    parts = document["parts"]
    assert sum(part["transitions"] for part in parts.values()) == document["transitions"]
    for part in parts.values():
        assert np.shape(part["per_lane_and_bit"]) == (8, 8)
        assert np.sum(part["per_lane_and_bit"]) == part["transitions"]


def test_the_unit_spends_what_the_link_says(
    lenet: Path, images: Mapping[str, Array], tmp_path: Path
) -> None:
    order = "popcount=on:inputs"
    unknown = bitwright.link(lenet, images, orders=[order])
    total, unsorted = unknown.total(order), unknown.total(UNSORTED)
    assert unknown.unit_energy_pj(total) is None
    assert unknown.net_saved_pj(total, unsorted) is None
    even = unknown.break_even_pj_per_word(total, unsorted)
    assert even is not None
    preset = targets.available_links()["ordering-simulator"].model_dump(
        mode="json", exclude_none=True
    )
    preset["link"]["energy_pj_per_word"] = {"value": even, "source": "energy"}
    (tmp_path / "link.yaml").write_text(yaml.safe_dump(preset))
    known = bitwright.link(lenet, images, orders=[order], link=tmp_path / "link.yaml")
    assert known.unit_energy_pj(known.total(order)) == pytest.approx(even * total.words_sorted)
    # At the break-even nothing is left.
    net = known.net_saved_pj(known.total(order), known.total(UNSORTED))
    assert net == pytest.approx(0, abs=1e-3)


def test_an_order_that_was_not_counted(counted: Transitions) -> None:
    with pytest.raises(KeyError, match="gray-rank"):
        counted.total("gray-rank")


def test_the_table(counted: Transitions, capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_transitions(counted)
    out = capsys.readouterr().out
    for layer in counted.layers:
        assert layer.layer in out
    for order in (ROW_MAJOR, UNSORTED, *counted.orders):
        assert f"{counted.total(order).transitions:,}" in out
    assert "known at compile time" in out
    saved = 100 * (counted.saved(counted.total("popcount"), counted.total(UNSORTED)) or 0)
    assert f"{saved:.1f} %" in out


def test_the_page(lenet: Path, images: Mapping[str, Array], tmp_path: Path) -> None:
    path = tmp_path / "link.html"
    found = bitwright.link(lenet, images, plot=path)
    page = path.read_text()
    assert not re.search(r"<(script|link|img)[^>]*\s(src|href)=", page)  # needs no network
    call = page[page.rindex("Plotly.newPlot(") :]
    decoder = json.JSONDecoder()
    traces, _ = decoder.raw_decode(call[call.index("[") :])
    bars = [trace for trace in traces if trace["type"] == "bar"]
    maps = [trace for trace in traces if trace["type"] == "heatmap"]
    orders = 2 + len(found.orders)
    assert (len(bars), len(maps)) == (2 * orders, orders)
    assert bars[0]["x"] == [layer.layer for layer in found.layers]
    assert all(trace["y"][0] == "inputs 0" and len(trace["y"]) == 16 for trace in maps)
    with pytest.raises(BitwrightError, match="exists"):
        bitwright.link(lenet, images, plot=path)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message, fix",
    [
        ({"window": 26}, r"'conv1': a window of 26 terms is larger than the 25 of an", "25 or les"),
        ({"window": 1}, "a window of 1 terms", "2 to 256"),
        ({"window": 300}, "a window of 300 terms", "2 to 256"),
        ({"flit_bits": 100}, "100 bits are no whole number of lanes", "multiple of 16"),
        ({"flit_bits": 16400}, "1025 lanes, and a link has 1024 at most", "take 16384 bits"),
        ({"flit_bits": 0}, "0 bits are no whole number of lanes", "multiple of 16"),
        ({"orders": ["bubble"]}, "there is no key 'bubble'", "popcount"),
        ({"orders": []}, "there is no order", "--order"),
        ({"orders": ["popcount=buckets:12"]}, "more than the 9 keys", "at most 9"),
        ({"orders": ["popcount=map:0.0.1.2.2.1.3.3.3"]}, "falls, from 2 at key 4 to 1", "monotone"),
        ({"orders": ["popcount=map:0.0.1"]}, "has 3 entries", "9 entries"),
        (
            {"link": "silago/drra", "orders": ["popcount=map:0.0.0.1.1.2.2.3.3"]},
            "has 9 entries, and 16-bit words have the keys 0 to 16",
            "17 entries",
        ),
        (
            {"target": "bitfusion/eyeriss", "orders": ["popcount"]},
            "the inputs are sent once for every channel",
            "on:inputs",
        ),
        ({"link": "no such"}, "there is no link 'no such'", "ordering-simulator"),
        ({"precision": "w8a8"}, "is quantized already", "--precision|leave it out"),
        ({"plot": "chart.png"}, "the charts are a page", "html"),
    ],
)
def test_what_is_refused(
    lenet: Path, images: Mapping[str, Array], options: dict[str, Any], message: str, fix: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        bitwright.link(lenet, {"image": images["image"][:1]}, **options)
    assert re.search(fix, str(raised.value.fix))


def test_codes_wider_than_words(images: Mapping[str, Array]) -> None:
    with pytest.raises(UsageError, match=r"'conv1': its inputs have 16 bits, and the link") as e:
        bitwright.link(
            MODEL, images, precision="w8a16", calibration=CALIBRATION, link="bitfusion/eyeriss"
        )
    assert "--link" in str(e.value.fix)
    wide = bitwright.link(
        MODEL, images, precision="w8a16", calibration=CALIBRATION, target=None, link="silago/drra"
    )
    assert wide.layers


def test_a_float_model_needs_samples_and_a_precision(images: Mapping[str, Array]) -> None:
    with pytest.raises(UsageError, match="no samples to quantize it with"):
        bitwright.link(MODEL, images, precision="w8a8")
    with pytest.raises(UsageError, match="neither a precision"):
        bitwright.link(MODEL, images, calibration=CALIBRATION)


def test_layers_that_stay_float_are_named(tmp_path: Path) -> None:
    builder = Builder()
    x = builder.activation(builder.input("x", (1, 4)), SIGNED)
    weights = builder.constant(np.ones((4, 2), np.float32))
    product_of = builder.node("MatMul", x, weights, name="floating")
    onnx.save(builder.model(product_of), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="no layer that computes in integers"):
        bitwright.link(tmp_path / "model.onnx", {"x": np.zeros((1, 1, 4), np.float32)})
