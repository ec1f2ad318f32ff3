from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright import Layer, Precision, PrecisionPlan
from bitwright.errors import BitwrightError, PlanError
from bitwright.vocabulary import ACTIVATION_FORMATS, BIT_WIDTHS, Activation
from tests.quant.qdq import profile

widths = st.sampled_from(BIT_WIDTHS)
forms = st.builds(Activation, widths) | st.sampled_from(
    [Activation.of_format(name) for name in ACTIVATION_FORMATS if name != "int"]
)
precisions = st.builds(lambda bits, form: Precision(bits, form.bits, form.format), widths, forms)
plans = st.builds(
    PrecisionPlan,
    layers=st.dictionaries(st.text(), precisions),
    structure_hash=st.none() | st.text(),
    weights_hash=st.none() | st.text(),
    target=st.none() | st.text(),
    elementwise_bits=st.sampled_from([8, 16]),
    loop_bits=st.sampled_from([8, 16, 32]),
    scan_inputs=st.dictionaries(st.text(), forms),
    percentiles=st.dictionaries(
        st.text(), st.floats(0, 100, exclude_min=True) | st.integers(1, 100)
    ),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


# -- precisions ----------------------------------------------------------------------------------


@profile(100)
@given(precisions)
def test_precision_survives_its_text_form(precision: Precision) -> None:
    assert Precision.parse(str(precision)) == precision


def test_text_form_of_a_precision() -> None:
    assert str(Precision(weight_bits=4, activation_bits=16)) == "w4a16"
    assert Precision.parse(" w2a8\n") == Precision(weight_bits=2, activation_bits=8)


@profile(100)
@given(st.integers() | st.floats() | st.booleans() | st.text() | st.none())
def test_all_other_widths_are_refused(bits: Any) -> None:
    if type(bits) is int and bits in (2, 4, 8, 16):
        return
    for given_bits in (
        {"weight_bits": bits, "activation_bits": 8},
        {"weight_bits": 8, "activation_bits": bits},
    ):
        with pytest.raises(PlanError, match="not a supported width"):
            Precision(**given_bits)


@profile(100)
@given(st.text() | st.integers() | st.none())
def test_parse_refuses_or_gives_a_precision(text: Any) -> None:
    try:
        precision = Precision.parse(text)
    except PlanError:
        return
    assert str(precision) == text.strip()


@pytest.mark.parametrize(
    "text",
    ["W8A8", "w8", "a8w8", "w8a8 w8a8", "w08a8", "w\N{FULLWIDTH DIGIT EIGHT}a8", "w8.0a8", "8"],
)
def test_not_a_precision(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Precision.parse(text)
    assert caught.value.exit_code == 2
    assert "2, 4, 8, 16" in str(caught.value)


@profile(50)
@given(forms)
def test_a_form_of_activations_survives_its_text(form: Activation) -> None:
    assert Activation.parse(str(form)) == form == Activation.of(str(form))
    assert Precision.parse(f"w4{form}").activation == form


@pytest.mark.parametrize(
    "text, name, stored, operand",
    [
        ("a8", "int", 8, 8),
        ("a16", "int", 16, 16),
        ("a8se", "soft-edge", 16, 16),  # 9 bits
        ("a8se8", "soft-edge8", 8, 16),
        ("a8se6", "soft-edge6", 8, 16),
        ("a4se4", "soft-edge4", 4, 16),
    ],
)
def test_formats_of_activations(text: str, name: str, stored: int, operand: int) -> None:
    form = Activation.parse(text)
    assert (form.format, form.stored_bits, form.operand_bits) == (name, stored, operand)
    precision = Precision.parse(f"w2{text}")
    assert (precision.activation_format, str(precision)) == (name, f"w2{text}")


@pytest.mark.parametrize("text", ["w8a4se", "w8a16se8", "w8a8se4", "w8a4se6", "w8a2se"])
def test_formats_have_one_width(text: str) -> None:
    with pytest.raises(PlanError, match=r"there is no soft-edge[468]? with \d+ bits") as caught:
        Precision.parse(text)
    assert "its words have" in str(caught.value)
    with pytest.raises(PlanError, match=f"activation '{text[2:]}'"):
        Activation.parse(text[2:])


@pytest.mark.parametrize("text", ["w8a8se2", "w8a8s", "w8a8SE", "w8a8se 8", "w8a8int", "w8sea8"])
def test_formats_that_do_not_exist(text: str) -> None:
    with pytest.raises(PlanError, match="se, se8, se6 or se4"):
        Precision.parse(text)
    with pytest.raises(PlanError, match="activation_format is 'se'"):
        Precision(8, 8, "se")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["8", "se8", "a8se9", "w8a8", "", None])
def test_forms_that_do_not_exist(text: Any) -> None:
    with pytest.raises(PlanError, match="no form of activations"):
        Activation.parse(text)


def test_how_precisions_are_shown() -> None:
    assert repr(Precision(4, 8)) == "Precision(weight_bits=4, activation_bits=8)"
    shown = "Precision(weight_bits=8, activation_bits=8, activation_format='soft-edge8')"
    assert repr(Precision.parse("w8a8se8")) == shown
    assert eval(shown) == Precision.parse("w8a8se8")  # noqa: S307 - our own text


# -- layers --------------------------------------------------------------------------------------

# Krizhevsky et al., 2012; its second, fourth and fifth layer run in two groups.
ALEXNET = [
    Layer.conv(in_channels=3, out_channels=96, kernel=11, stride=4, output=55),
    Layer.conv(in_channels=96, out_channels=256, kernel=5, output=27, groups=2),
    Layer.conv(in_channels=256, out_channels=384, kernel=3, output=13),
    Layer.conv(in_channels=384, out_channels=384, kernel=3, output=13, groups=2),
    Layer.conv(in_channels=384, out_channels=256, kernel=3, output=13, groups=2),
    Layer.matmul(rows=1, in_features=9216, out_features=4096),
    Layer.matmul(rows=1, in_features=4096, out_features=4096),
    Layer.matmul(rows=1, in_features=4096, out_features=1000),
]


def test_macs_and_weights_of_alexnet() -> None:
    """Sze et al., "Efficient Processing of Deep Neural Networks", Proc. IEEE 105 (2017), Table II.

    Convolutions: 2.3 M weights, 666 M MACs; fully connected layers: 58.6 M of both.
    """
    convolutions = [layer for layer in ALEXNET if layer.kind == "conv"]
    products = [layer for layer in ALEXNET if layer.kind == "matmul"]
    assert sum(layer.macs or 0 for layer in convolutions) / 1e6 == pytest.approx(666, abs=0.5)
    assert sum(layer.weight_count for layer in convolutions) / 1e6 == pytest.approx(2.3, abs=0.05)
    assert sum(layer.macs or 0 for layer in products) / 1e6 == pytest.approx(58.6, abs=0.05)
    assert sum(layer.weight_count for layer in products) / 1e6 == pytest.approx(58.6, abs=0.05)


def test_macs_grow_with_the_batch_and_weights_do_not() -> None:
    numbers: dict[str, Any] = {"in_channels": 3, "out_channels": 8, "kernel": (3, 5), "output": 7}
    one, four = Layer.conv(**numbers), Layer.conv(**numbers, batch=4)
    assert one.macs is not None
    assert four.macs == 4 * one.macs == 4 * 3 * 8 * 15 * 49
    assert four.weight_count == one.weight_count == 3 * 8 * 15


def test_a_number_stands_for_all_spatial_dimensions() -> None:
    layer = Layer.conv(in_channels=1, out_channels=2, kernel=(3, 3, 3), output=4, stride=2)
    assert layer.output == (4, 4, 4)
    assert layer.stride == (2, 2, 2)
    assert layer.dilation == (1, 1, 1)
    assert layer.macs == 27 * 2 * 64


def test_macs_are_unknown_while_a_size_is() -> None:
    layer = Layer("l", "conv", None, 1, 1, (3,), (4,), (1,), (1,))
    assert layer.macs is None
    assert Layer("l", "conv", 1, 1, 1, (3,), (None,), (1,), (1,)).macs is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 3},
        {"groups": 0},
        {"groups": -2},
        {"in_channels": 0},
        {"out_channels": -4},
        {"kernel": 0},
        {"kernel": (3, 3, 3), "output": (5, 5)},
        {"stride": (1, 0)},
        {"batch": 0},
    ],
    ids=str,
)
def test_convolutions_that_cannot_be(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "kernel": 3, "output": 5}
    Layer.conv(**right)
    with pytest.raises(ValueError, match=r"positive|divide"):
        Layer.conv(**{**right, **wrong})


@pytest.mark.parametrize("wrong", ["rows", "in_features", "out_features"])
def test_products_that_cannot_be(wrong: str) -> None:
    right: dict[str, Any] = {"rows": 1, "in_features": 4, "out_features": 4}
    with pytest.raises(ValueError, match="positive"):
        Layer.matmul(**{**right, wrong: 0})


# -- plans ---------------------------------------------------------------------------------------


@profile(100)
@given(plans)
def test_plan_survives_json(plan: PrecisionPlan) -> None:
    assert PrecisionPlan.from_json(plan.to_json()) == plan


def test_a_plan_takes_texts() -> None:
    plan = PrecisionPlan({"fc": "w4a8se"}, scan_inputs={"u": "a8se"})  # type: ignore[dict-item]  # texts
    assert plan.layers == {"fc": Precision(4, 8, "soft-edge")}
    assert plan.scan_inputs == {"u": Activation(8, "soft-edge")}
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="'8' is no form"):
        PrecisionPlan({}, scan_inputs={"u": "8"})  # type: ignore[dict-item]  # a text


def test_json_of_a_plan_is_one_layer_a_line() -> None:
    precision = Precision.parse("w4a8")
    text = PrecisionPlan({"conv1": precision, "größe\n": precision}).to_json()
    assert '\n    "conv1": "w4a8",\n' in text
    assert text.endswith("}\n")
    assert text.isascii()  # whatever encoding the file is read in
    assert json.loads(text)["schema_version"] == 1


def test_only_version_and_layers_are_required() -> None:
    plan = PrecisionPlan.from_json('{"schema_version": 1, "layers": {"a": "w8a8"}}')
    assert plan == PrecisionPlan({"a": Precision.parse("w8a8")})
    assert plan.elementwise_bits == 16


def test_order_of_the_layers_is_kept() -> None:
    names = ["z", "a", "m"]
    plan = PrecisionPlan(dict.fromkeys(names, Precision.parse("w8a8")))
    assert list(PrecisionPlan.from_json(plan.to_json()).layers) == names


@profile(100)
@given(st.text())
def test_text_is_a_plan_or_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"some\.json"):
        PrecisionPlan.from_json(text, where="some.json")


@profile(300)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "schema_version",
                "layers",
                "target",
                "structure_hash",
                "elementwise_bits",
                "loop_bits",
                "x",
            ]
        ),
        json_values | st.just(1) | st.dictionaries(st.text(), st.sampled_from(["w8a8", "w3a8", 8])),
    )
)
def test_json_is_a_plan_or_refused(document: dict[str, Any]) -> None:
    try:
        plan = PrecisionPlan.from_json(json.dumps(document), where="some.json")
    except PlanError as error:
        message = str(error)
    else:
        message = "some.json"
        assert set(plan.layers) == set(document["layers"])
    assert message.startswith("some.json")


@pytest.mark.parametrize("bits", [4, 32, 8.0, "8", True, None])
def test_elementwise_bits_that_do_not_exist(bits: Any) -> None:
    with pytest.raises(PlanError, match="elementwise_bits"):
        PrecisionPlan({}, elementwise_bits=bits)


# -- errors --------------------------------------------------------------------------------------


def test_message_says_where_what_and_what_to_do() -> None:
    error = BitwrightError("is wrong", where="file, node", fix="do this")
    assert str(error) == "file, node: is wrong\n  do this"
    assert str(BitwrightError("is wrong")) == "is wrong"
    assert str(BitwrightError("is wrong", fix="do this")) == "is wrong\n  do this"


@profile(100)
@given(st.text(), st.text(), st.text(min_size=1))
def test_message_has_two_lines_and_no_control_characters(what: str, where: str, fix: str) -> None:
    lines = str(BitwrightError(what, where=where, fix=fix)).split("\n")
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_long_names_do_not_flood_the_message() -> None:
    assert len(str(BitwrightError("x" * 10_000, where="y" * 10_000, fix="z" * 10_000))) < 2000


# -- layers without a model ------------------------------------------------------------------------


def test_layers_take_numbers_of_numpy_and_sequences() -> None:
    three: Any = np.int64(3)
    plain = Layer.conv(in_channels=3, out_channels=4, kernel=(3,), output=(8,))
    found = Layer.conv(in_channels=three, out_channels=4, kernel=[three], output=[8])
    assert plain == found
    assert all(type(size) is int for size in (*found.kernel, *found.output, found.in_channels))
    assert Layer.conv(in_channels=3, out_channels=4, kernel=three, output=8).kernel == (3, 3)


@pytest.mark.parametrize(
    "sizes", [{"kernel": 3.0}, {"kernel": "3"}, {"batch": 2.5}, {"in_channels": True}, {"batch": 0}]
)
def test_sizes_that_are_none(sizes: dict[str, Any]) -> None:
    given = {"in_channels": 3, "out_channels": 4, "kernel": 3, "output": 8, **sizes}
    with pytest.raises(ValueError, match="positive whole numbers"):
        Layer.conv(**given)


def test_a_recurrence_counts_every_step() -> None:
    layer = Layer.recurrent(in_features=4, out_features=6, steps=10, batch=3)
    assert layer.macs == 10 * 3 * 4 * 6
    assert layer.weight_count == 24
    assert layer.kind == "recurrent"
