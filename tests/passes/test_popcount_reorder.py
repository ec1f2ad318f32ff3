"""PopcountReorder: orders in front of transfers, and what is refused, by name."""
# mypy: disable-error-code="valid-type, name-defined, no-untyped-def, untyped-decorator"
# ruff: noqa: N805
# The modules are TVMScript: Python's syntax, but neither its types nor its methods.

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from tvm import relax, tirx
from tvm.script import ir as I  # noqa: N812  # TVM's own names in scripts
from tvm.script import relax as R  # noqa: N812

from bitwright import targets
from bitwright.errors import UsageError
from bitwright.passes import ops
from bitwright.passes.materialize_transfers import drop_transfers, link_of
from bitwright.passes.popcount_reorder import REASONS, Measured, PopcountReorder
from bitwright.targets.link import Link, Traffic
from bitwright.targets.orders import Order
from bitwright.targets.schema import Number
from tests.passes.modules import assert_same, assert_same_results, transform

MATRIX = np.random.default_rng(1).integers(-128, 128, (30, 4)).astype(np.int8)
LINK = targets.get_link("ordering-simulator")  # windows of 25 terms


def described(**changes: Any) -> str:
    return LINK.model_copy(update=changes).model_dump_json(exclude_none=True)


DEFAULT = described()


def send(
    x: Any, operand: str, places: Any = None, *, order: str = "none", link: str = DEFAULT
) -> Any:
    return ops.transfer(x, places, layer="fc", operand=operand, link=link, order=order)


def stable_places(weights: Any, window: int = 25) -> Any:
    """Places of weights in windows of their columns: falling number of ones, by Python's sort."""
    found = np.zeros(weights.T.shape, np.uint8)
    for channel, column in enumerate(weights.T):
        for start in range(0, len(column), window):
            words = [int(value) & 255 for value in column[start : start + window]]
            ranked = sorted(range(len(words)), key=lambda index: -words[index].bit_count())
            for place, index in enumerate(ranked):
                found[channel, start + index] = place
    return found


@I.ir_module
class Sent:
    @R.function
    def main(q: R.Tensor(("n", 30), "uint8")):
        with R.dataflow():
            inputs = send(q, "inputs")
            x = R.astype(inputs, "int32")
            centred = R.subtract(x, R.const(7, "int32"))
            weights = send(relax.const(MATRIX), "weights")
            w = R.astype(weights, "int32")
            sums = R.matmul(centred, w, out_dtype="int32")
            R.output(sums)
        return sums


@I.ir_module
class SentActivations:
    @R.function
    def main(a: R.Tensor(("n", 5, 30), "int8"), b: R.Tensor(("n", 30, 4), "int8")):
        with R.dataflow():
            x = R.astype(send(a, "inputs"), "int32")
            w = R.astype(send(b, "weights"), "int32")
            sums = R.matmul(x, w, out_dtype="int32")
            R.output(sums)
        return sums


def assert_reordered(before: Any, expected: Any, **options: Any) -> Any:
    once = transform(before, PopcountReorder(**options))
    assert_same(once, expected)
    assert_same(transform(once, PopcountReorder(**options)), once)
    assert_same(drop_transfers(once), drop_transfers(before))
    return once


def test_an_order_of_constant_weights_is_known() -> None:
    places = relax.const(stable_places(MATRIX))

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor(("n", 30), "uint8")):
            with R.dataflow():
                inputs = send(q, "inputs", places, order="popcount")
                x = R.astype(inputs, "int32")
                centred = R.subtract(x, R.const(7, "int32"))
                weights = send(relax.const(MATRIX), "weights", places, order="popcount")
                w = R.astype(weights, "int32")
                sums = R.matmul(centred, w, out_dtype="int32")
                R.output(sums)
            return sums

    after = assert_reordered(Sent, Expected)
    codes = np.random.default_rng(0).integers(0, 256, (3, 30)).astype(np.uint8)
    assert_same_results(Sent, after, [codes])


def test_a_unit_sorts_inputs_and_weights_move_along() -> None:
    text = "popcount=on:inputs:buckets:4"
    table = relax.const(Order.parse(text).table(8))

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor(("n", 30), "uint8")):
            with R.dataflow():
                places = ops.order(q, table, layer="fc", operand="inputs", link=DEFAULT, order=text)
                inputs = send(q, "inputs", places, order=text)
                x = R.astype(inputs, "int32")
                centred = R.subtract(x, R.const(7, "int32"))
                weights = send(relax.const(MATRIX), "weights", places, order=text)
                w = R.astype(weights, "int32")
                sums = R.matmul(centred, w, out_dtype="int32")
                R.output(sums)
            return sums

    after = assert_reordered(Sent, Expected, on="inputs", buckets=4)
    codes = np.random.default_rng(0).integers(0, 256, (3, 30)).astype(np.uint8)
    assert_same_results(Sent, after, [codes])


def test_separated_operands_have_orders_of_their_own() -> None:
    text = "popcount=on:separated:snake:true"
    table = relax.const(Order.parse(text).table(8))
    known = relax.const(stable_places(MATRIX))

    @I.ir_module
    class Expected:
        @R.function
        def main(q: R.Tensor(("n", 30), "uint8")):
            with R.dataflow():
                places = ops.order(q, table, layer="fc", operand="inputs", link=DEFAULT, order=text)
                inputs = send(q, "inputs", places, order=text)
                x = R.astype(inputs, "int32")
                centred = R.subtract(x, R.const(7, "int32"))
                weights = send(relax.const(MATRIX), "weights", known, order=text)
                w = R.astype(weights, "int32")
                sums = R.matmul(centred, w, out_dtype="int32")
                R.output(sums)
            return sums

    assert_reordered(Sent, Expected, on="separated", snake=True)


def test_a_unit_sorts_weights_that_are_computed() -> None:
    table = relax.const(Order("popcount").table(8))

    @I.ir_module
    class Expected:
        @R.function
        def main(a: R.Tensor(("n", 5, 30), "int8"), b: R.Tensor(("n", 30, 4), "int8")):
            with R.dataflow():
                places = ops.order(
                    b, table, layer="fc", operand="weights", link=DEFAULT, order="popcount"
                )
                x = R.astype(send(a, "inputs", places, order="popcount"), "int32")
                w = R.astype(send(b, "weights", places, order="popcount"), "int32")
                sums = R.matmul(x, w, out_dtype="int32")
                R.output(sums)
            return sums

    assert_reordered(SentActivations, Expected)


def first(module: Any) -> Any:
    """The first transfer of a module."""
    bound = [b.value for block in module["main"].body.blocks for b in block.bindings]
    calls = (value for value in bound if isinstance(value, relax.Call))
    return next(call for call in calls if call.op.name == ops.TRANSFER)


def order_of(module: Any) -> str:
    return str(first(module).attrs["order"])


def test_options_left_out_are_those_of_the_link() -> None:
    wanted = {
        "popcount": "popcount",
        "gray-rank=on:inputs:buckets:8:snake:true": "gray-rank=on:inputs:buckets:8:snake:true",
        "none": "popcount",  # somebody asked for an order
    }
    for text, expected in wanted.items():
        assert str(PopcountReorder().order(LINK.model_copy(update={"order": text}))) == expected
    link = LINK.model_copy(update={"order": "gray-rank=on:inputs:buckets:8"})
    assert str(PopcountReorder(buckets=0, on="weights").order(link)) == "gray-rank"
    assert order_of(transform(Sent, PopcountReorder(direction="ascending"))) == (
        "popcount=direction:ascending"
    )
    assert order_of(transform(Sent, PopcountReorder(key="none", snake=True))) == "none=snake:true"


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("popcount=on:inputs", {"key": "chain"}, "chain"),
        ("popcount=on:inputs:buckets:4", {"key": "none", "snake": True}, "none=snake:true"),
        ("popcount=on:inputs", {"key": "gray-rank"}, "gray-rank=on:inputs"),
        ("chain=snake:true", {}, "chain=snake:true"),
        ("chain=snake:true", {"snake": False}, "chain"),
        ("chain=snake:true", {"on": "inputs"}, "popcount=on:inputs:snake:true"),
        ("chain=snake:true", {"buckets": 4, "snake": False}, "popcount=buckets:4"),
    ],
)
def test_a_key_that_sorts_nothing_takes_no_options_of_one_that_sorts(
    text: str, options: dict[str, Any], expected: str
) -> None:
    link = LINK.model_copy(update={"order": text})
    assert str(PopcountReorder(**options).order(link)) == expected


def test_a_window_is_that_of_the_link_or_the_given_one() -> None:
    assert link_of(first(transform(Sent, PopcountReorder()))) == LINK
    after = transform(Sent, PopcountReorder(window=30))
    assert link_of(first(after)).window.value == 30
    np.testing.assert_array_equal(
        first(after).args[1].value.numpy(), stable_places(MATRIX, window=30)
    )
    with pytest.raises(UsageError, match=r"layer 'fc': a window of 31 is larger than the 30 terms"):
        transform(Sent, PopcountReorder(window=31))
    for window in (1, 257):
        with pytest.raises(UsageError, match="2 to 256 terms"):
            PopcountReorder(window=window)


# -- bucket maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"map": "0.1.0.1.2.2.3.3.3"}, "falls"),
        ({"map": "0.0.1.1.2.2.3.3"}, "has 8 entries"),
        ({"map": "0.0.0.2.2.2.3.3.3"}, "leaves a bucket out"),
        ({"buckets": 10}, "10 buckets are more than the 9 keys"),
        ({"on": "inputs", "map": "quantile", "buckets": 4}, "none were measured"),
        ({"auto": True}, "none were measured"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_layer(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"layer 'fc': .*{message}") as raised:
        transform(Sent, PopcountReorder(**options))
    assert raised.value.fix


@pytest.mark.parametrize(
    "options, message",
    [
        ({"key": "popcnt"}, "no key 'popcnt'"),
        ({"on": "both"}, "no on 'both'"),
        ({"map": "fair"}, "no bucket map"),
        ({"buckets": 1}, "does nothing"),
        ({"key": "nearest"}, "which no unit does"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PopcountReorder(**options)


def test_maps_of_16_bit_words_have_17_keys() -> None:
    wide = described(word_bits=Number[int](value=16, source="test"))

    @I.ir_module
    class Wide:
        @R.function
        def main(q: R.Tensor(("n", 30), "int16")):
            with R.dataflow():
                x = R.astype(send(q, "inputs", link=wide), "int32")
                w = R.astype(send(relax.const(MATRIX), "weights", link=wide), "int32")
                sums = R.matmul(x, w, out_dtype="int32")
                R.output(sums)
            return sums

    with pytest.raises(UsageError, match=r"layer 'fc': .*9 entries, and 16-bit words"):
        transform(Wide, PopcountReorder(map="0.0.0.1.1.2.2.3.3"))
    assert order_of(transform(Wide, PopcountReorder(buckets=17))) == "popcount=buckets:17"


def test_quantile_maps_follow_the_words_that_are_sorted() -> None:
    words = MATRIX.T.astype(np.int64) & 255
    table = Order.parse("popcount=buckets:3:map:quantile").table(
        8, np.bincount(words.ravel(), minlength=256)
    )
    after = transform(Sent, PopcountReorder(buckets=3, map="quantile"))
    buckets = table[words]
    for channel, places in enumerate(first(after).args[1].value.numpy()):
        for start in (0, 25):
            window = slice(start, start + 25)
            sent = np.empty_like(buckets[channel, window])
            sent[places[window]] = buckets[channel, window]
            assert sent.tolist() == sorted(sent)
    histogram = np.arange(256)
    measured = {"fc": Measured({"inputs": histogram}, {}, {})}
    after = transform(
        Sent, PopcountReorder(on="inputs", buckets=3, map="quantile", measured=measured)
    )
    order = next(
        b.value
        for block in after["main"].body.blocks
        for b in block.bindings
        if isinstance(b.value, relax.Call) and b.value.op.name == ops.ORDER
    )
    expected = Order.parse("popcount=buckets:3:map:quantile").table(8, histogram)
    np.testing.assert_array_equal(order.args[1].value.numpy(), expected)


# -- auto ------------------------------------------------------------------------------------------


def priced(pj_per_word: float | None) -> Any:
    """The module on a link whose unit spends that on a word; a transition takes 2 pJ."""
    link = described(
        energy_pj_per_transition=Number[float](value=2.0, source="test"),
        energy_pj_per_word=None
        if pj_per_word is None
        else Number[float](value=pj_per_word, source="test"),
    )

    @I.ir_module
    class Priced:
        @R.function
        def main(q: R.Tensor(("n", 30), "uint8")):
            with R.dataflow():
                x = R.astype(send(q, "inputs", link=link), "int32")
                w = R.astype(send(relax.const(MATRIX), "weights", link=link), "int32")
                sums = R.matmul(x, w, out_dtype="int32")
                R.output(sums)
            return sums

    return Priced


def measured_(text: str, before: int, after: int, words: int) -> dict[str, Measured]:
    return {"fc": Measured({}, {"none": before, text: after}, {"none": 0, text: words})}


def test_auto_weighs_what_the_unit_spends() -> None:
    text = "popcount=on:inputs"
    # 100 transitions fewer save 200 pJ; 50 words at 3.9 pJ are 195 pJ, at 4 pJ the same 200 pJ.
    found = measured_(text, 1000, 900, 50)
    after = transform(priced(3.9), PopcountReorder(on="inputs", auto=True, measured=found))
    assert order_of(after) == text
    assert str(after.get_attr(REASONS)["fc"]).startswith("reordered: ")
    after = transform(priced(4.0), PopcountReorder(on="inputs", auto=True, measured=found))
    assert order_of(after) == "none"
    reason = str(after.get_attr(REASONS)["fc"])
    assert reason.startswith("left unsorted: ")
    assert "100 of 1,000" in reason
    assert "200 pJ" in reason
    with pytest.raises(UsageError, match=r"layer 'fc': .*no energy_pj_per_word") as raised:
        transform(priced(None), PopcountReorder(on="inputs", auto=True, measured=found))
    assert "on:weights" in str(raised.value.fix)


def test_auto_needs_no_price_for_what_is_done_at_compile_time() -> None:
    after = transform(
        priced(None), PopcountReorder(auto=True, measured=measured_("popcount", 1000, 999, 0))
    )
    assert order_of(after) == "popcount"
    assert "needs no unit" in str(after.get_attr(REASONS)["fc"])
    after = transform(
        priced(None), PopcountReorder(auto=True, measured=measured_("popcount", 1000, 1000, 0))
    )
    assert order_of(after) == "none"
    # A window that is asked for is one for unsorted layers, too: baselines have the same flits.
    after = transform(
        priced(None),
        PopcountReorder(auto=True, window=9, measured=measured_("popcount", 1000, 1000, 0)),
    )
    assert (order_of(after), link_of(first(after)).window.value) == ("none", 9)


# -- consumers -------------------------------------------------------------------------------------


def refused(module: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"layer 'fc': .*{message}") as raised:
        transform(module, PopcountReorder())
    assert raised.value.fix


def test_a_product_of_floats_depends_on_the_order() -> None:
    @I.ir_module
    class Floats:
        @R.function
        def main(q: R.Tensor(("n", 30), "int8")):
            with R.dataflow():
                x = R.astype(send(q, "inputs"), "float32")
                w = R.astype(send(relax.const(MATRIX), "weights"), "float32")
                sums = R.matmul(x, w)
                R.output(sums)
            return sums

    refused(Floats, "R.astype takes it")

    @I.ir_module
    class FloatOperands:
        @R.function
        def main(x: R.Tensor(("n", 30), "float32")):
            with R.dataflow():
                w = relax.const(MATRIX.astype(np.float32))
                sums = R.matmul(send(x, "inputs"), send(w, "weights"))
                R.output(sums)
            return sums

    refused(FloatOperands, "a product in float32 rounds")


def test_what_is_no_sum_of_products_depends_on_the_order() -> None:
    @I.ir_module
    class Cumulative:
        @R.function
        def main(q: R.Tensor(("n", 30), "int8")):
            with R.dataflow():
                sums = R.cumsum(R.astype(send(q, "inputs"), "int32"), axis=1)
                R.output(sums)
            return sums

    refused(Cumulative, "R.cumsum takes it")

    @I.ir_module
    class Maximum:
        @R.function
        def main(q: R.Tensor(("n", 30), "int8")):
            with R.dataflow():
                sent = send(q, "inputs")
                x = R.astype(sent, "int32")
                w = R.astype(send(relax.const(MATRIX), "weights"), "int32")
                both = (R.matmul(x, w, out_dtype="int32"), R.maximum(x, R.const(0, "int32")))
                R.output(both)
            return both

    refused(Maximum, "R.maximum takes it")

    @I.ir_module
    class Result:
        @R.function
        def main(q: R.Tensor(("n", 30), "int8")):
            with R.dataflow():
                sent = send(q, "inputs")
                R.output(sent)
            return sent

    refused(Result, "it is a result")


def test_a_product_with_one_sent_operand_has_no_pairs() -> None:
    @I.ir_module
    class Half:
        @R.function
        def main(q: R.Tensor(("n", 30), "int8")):
            with R.dataflow():
                x = R.astype(send(q, "inputs"), "int32")
                w = R.astype(relax.const(MATRIX), "int32")
                sums = R.matmul(x, w, out_dtype="int32")
                R.output(sums)
            return sums

    refused(Half, "only the inputs of matmul are sent")


def shared(on: str) -> Any:
    """Two products take one stream of inputs."""

    @I.ir_module
    class Shared:
        @R.function
        def main(q: R.Tensor(("n", 30), "int8")):
            with R.dataflow():
                x = R.astype(send(q, "inputs"), "int32")
                first = R.astype(send(relax.const(MATRIX), "weights"), "int32")
                second = R.astype(send(relax.const(MATRIX[::-1].copy()), "weights"), "int32")
                both = (
                    R.matmul(x, first, out_dtype="int32"),
                    R.matmul(x, second, out_dtype="int32"),
                )
                R.output(both)
            return both

    return transform(Shared, PopcountReorder(on=on))


def test_consumers_of_a_stream_share_its_order() -> None:
    bound = [b.value for block in shared("inputs")["main"].body.blocks for b in block.bindings]
    calls = [value for value in bound if isinstance(value, relax.Call)]
    assert [call.op.name for call in calls].count(ops.ORDER) == 1
    places = [call.args[1] for call in calls if call.op.name == ops.TRANSFER]
    assert len(places) == 3
    assert all(place.same_as(places[0]) for place in places)
    with pytest.raises(UsageError, match="layer 'fc': several products take the inputs"):
        shared("weights")


def test_who_shares_a_link_shares_the_order() -> None:
    reusing = Link(
        flit="separate",
        loops=("position", "chunk", "channel"),
        reuse=True,
        **{
            name: getattr(LINK, name)
            for name in (
                *("word_bits", "lanes", "packing", "window", "source"),
                *("energy_pj_per_transition", "frequency_mhz"),
            )
        },
        order="popcount=on:inputs",
    ).model_dump_json(exclude_none=True)

    @I.ir_module
    class Reusing:
        @R.function
        def main(q: R.Tensor(("n", 30), "int8")):
            with R.dataflow():
                x = R.astype(send(q, "inputs", link=reusing), "int32")
                w = R.astype(send(relax.const(MATRIX), "weights", link=reusing), "int32")
                sums = R.matmul(x, w, out_dtype="int32")
                R.output(sums)
            return sums

    assert order_of(transform(Reusing, PopcountReorder())) == "popcount=on:inputs"
    with pytest.raises(UsageError, match="layer 'fc': the inputs are sent once for every channel"):
        transform(Reusing, PopcountReorder(on="weights"))
    # Where auto chooses, such a layer is one that has no order; and there is nothing else to try.
    after = transform(Reusing, PopcountReorder(on="weights", auto=True))
    assert order_of(after) == "none"
    reason = str(after.get_attr(REASONS)["fc"])
    assert reason.startswith("left unsorted: the inputs are sent once for every channel")
    found = measured_("popcount=on:inputs", 1000, 900, 50)
    with pytest.raises(UsageError, match="no energy_pj_per_word") as raised:
        transform(Reusing, PopcountReorder(auto=True, measured=found))
    assert "on:weights" not in str(raised.value.fix)


@pytest.mark.parametrize(
    "batch, stacks, rows, columns, text, refused",
    [
        # Each product has inputs of its own: with one column they are sent for it alone.
        ("n", 2, 5, 1, "popcount", False),
        ("n", 2, 5, 4, "popcount", True),
        (3, 2, 5, 1, "popcount", False),
        (3, 1, 5, 4, "popcount", True),
    ],
)
def test_products_of_activations_share_what_they_send(
    batch: int | str, stacks: int, rows: int, columns: int, text: str, refused: bool
) -> None:
    """The order is refused where the layer's traffic refuses it."""
    reusing = LINK.model_copy(
        update={
            "flit": "separate",
            "loops": ("position", "chunk", "channel"),
            "reuse": True,
            "order": "none",
        }
    )
    link = reusing.model_dump_json(exclude_none=True)

    leading = [tirx.Var("n", "int64") if batch == "n" else batch, stacks]
    a, b = (
        relax.Var(name, relax.TensorType([*leading, *shape], "int8"))
        for name, shape in (("a", (rows, 30)), ("b", (30, columns)))
    )
    builder = relax.BlockBuilder()
    with builder.function("main", [a, b]):
        with builder.dataflow():
            x, w = (
                builder.emit(relax.op.astype(builder.emit(send(*entry, link=link)), "int32"))
                for entry in ((a, "inputs"), (b, "weights"))
            )
            sums = builder.emit_output(relax.op.matmul(x, w, out_dtype="int32"))
        builder.emit_func_output(sums)
    module = builder.get()

    taps = np.arange(stacks * 30, dtype=np.int32).reshape(stacks, 30)
    bases = np.zeros(rows, np.int32)
    traffic = Traffic("fc", stacks * columns, bases, taps, (stacks * 30,), ((0, 0),))
    with pytest.raises(UsageError) if refused else nullcontext():
        traffic.check(reusing, Order.parse(text))
    with pytest.raises(UsageError, match="layer 'fc'") if refused else nullcontext():
        transform(module, PopcountReorder(key=text, on="weights"))


def test_energies_have_the_units_of_tables() -> None:
    found = measured_("popcount", 20_000_000, 5_000_000, 0)  # 2 pJ a transition
    after = transform(priced(None), PopcountReorder(auto=True, measured=found))
    assert "transitions off, 30 uJ, and" in str(after.get_attr(REASONS)["fc"])
    found = measured_("popcount", 20_000, 19_000, 0)
    after = transform(priced(None), PopcountReorder(auto=True, measured=found))
    assert "transitions off, 2 nJ, and" in str(after.get_attr(REASONS)["fc"])


def test_a_transfer_stands_behind_what_its_order_depends_on() -> None:
    @I.ir_module
    class Early:
        @R.function
        def main(q: R.Tensor(("n", 5, 30), "int8"), b: R.Tensor(("n", 4, 30), "int8")):
            with R.dataflow():
                sent = send(q, "inputs")
                turned = R.permute_dims(b, [0, 2, 1])
                x = R.astype(sent, "int32")
                w = R.astype(send(turned, "weights"), "int32")
                sums = R.matmul(x, w, out_dtype="int32")
                R.output(sums)
            return sums

    refused(Early, "sent before the operand that they are sorted by is computed")
