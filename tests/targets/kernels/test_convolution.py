"""Convolution kernels: every bit as exact integers and the definition of requantization give it."""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bitwright.errors import UsageError
from bitwright.targets.kernels.host import GENERIC, Isa
from bitwright.targets.kernels.spec import (
    Accumulators,
    ActivationType,
    Codes,
    Convolution,
    Floats,
    Operand,
)
from tests.quant.qdq import profile
from tests.targets.kernels.kernels import (
    ACTIVATION_TYPES,
    ISAS,
    KINDS,
    Case,
    Compiled,
    check,
    convolution_sums,
    every_output,
    make_case,
    operands,
    outputs,
)

CODES = Codes("int8", 3, -128, 127)


@st.composite
def convolutions(draw: st.DrawFn, longest: int = 20) -> Convolution:
    rank = draw(st.integers(1, 3))
    longest = {1: 4 * longest, 2: longest, 3: longest // 2}[rank]
    small = st.tuples(*[st.integers(1, 3)] * rank)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = draw(st.integers(0, 4)) == 0
    spec = {
        "batch": draw(st.sampled_from([None, 2])),
        "in_channels": groups * (1 if depthwise else draw(st.integers(1, 7))),
        "size": draw(st.tuples(*[st.integers(1, longest)] * rank)),
        "out_channels": groups * draw(st.integers(1, 10)),
        "kernel": draw(st.one_of(st.just((1,) * rank), st.tuples(*[st.integers(1, 5)] * rank))),
        "data": draw(operands()),
        "output": draw(outputs()),
        "weight": draw(st.sampled_from(["int8", "int8", "int16"])),
        "strides": draw(st.one_of(st.just((1,) * rank), small)),
        "dilations": draw(st.one_of(st.just((1,) * rank), small)),
        "pads": draw(
            st.one_of(st.just((0,) * 2 * rank), st.tuples(*[st.integers(0, 3)] * (2 * rank)))
        ),
        "groups": groups,
        "accumulator_bits": draw(st.sampled_from([32, 32, 32, 64])),
        "bias": draw(st.booleans()),
        "shift": draw(st.booleans()),
    }
    try:
        return Convolution(**spec)
    except UsageError:  # the kernel is larger than the image
        assume(False)
        raise


@profile(40)
@given(convolutions(), KINDS, st.sampled_from(ISAS), st.integers(0, 2**16))
def test_any_convolution_is_exact(spec: Convolution, kind: str, isa: Isa, seed: int) -> None:
    check(make_case(spec, (2, spec.in_channels, *spec.size), seed, kind), isa)


@pytest.mark.slow
@profile(150)
@given(convolutions(longest=40), KINDS, st.sampled_from(ISAS), st.integers(0, 2**16))
def test_hundreds_of_convolutions_are_exact(
    spec: Convolution, kind: str, isa: Isa, seed: int
) -> None:
    check(make_case(spec, (2, spec.in_channels, *spec.size), seed, kind), isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
def test_extreme_codes_are_exact_in_wide_accumulators(dtype: ActivationType, isa: Isa) -> None:
    # -32768 x -32768 twice is 2^31: one more than 32 bits hold.
    spec = Convolution(
        None, 4, (9,), 3, (3,), Operand(dtype), Accumulators(), "int16", accumulator_bits=64
    )
    kernel = Compiled(spec, isa)
    for kind in ("smallest", "largest", "both"):
        case = make_case(spec, (2, 4, 9), kind=kind)
        np.testing.assert_array_equal(kernel.run(case), case.expected)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_narrow_accumulators_may_overflow_on_the_way(isa: Isa) -> None:
    # 65535 stands for 1 more than the zero point, so the sums are small; those of the codes without
    # it, and those of the first half of the channels, are far beyond 32 bits.
    spec = Convolution(
        1, 8, (4, 11), 2, (1, 1), Operand("uint16", 65534), Accumulators(), "int16", bias=False
    )
    data = np.full((1, 8, 4, 11), 65535, np.uint16)
    data[:, ::4] = 1
    weights = np.full((2, 8, 1, 1), 32767, np.int16)
    weights[:, 4:] = -32767
    case = Case(spec, data, weights, None, None, None)
    assert np.abs(case.accumulators).max() < 2**31
    check(case, isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_one_kernel_serves_every_batch(isa: Isa) -> None:
    spec = Convolution(None, 3, (13, 9), 5, (3, 3), Operand("uint8", 7), CODES, pads=(1, 1, 1, 1))
    kernel = Compiled(spec, isa)
    for batch in (0, 1, 2, 7):
        case = make_case(spec, (batch, 3, 13, 9), seed=batch)
        np.testing.assert_array_equal(kernel.run(case), case.expected)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(
            Convolution(None, 1, (28, 28), 6, (5, 5), Operand("uint8"), CODES), id="lenet conv1"
        ),
        pytest.param(
            Convolution(None, 6, (12, 12), 16, (5, 5), Operand("uint8"), CODES), id="lenet conv2"
        ),
        pytest.param(
            Convolution(None, 24, (61, 67), 17, (1, 1), Operand("int8", -5), CODES), id="pointwise"
        ),
        pytest.param(
            Convolution(None, 40, (30, 31), 9, (1, 1), Operand("int8"), CODES, strides=(2, 2)),
            id="pointwise with stride",
        ),
        pytest.param(
            Convolution(None, 2, (9000,), 4, (9,), Operand("int16"), CODES, pads=(4, 4)),
            id="a long row in blocks",
        ),
        pytest.param(
            Convolution(
                None, 3, (3001,), 4, (31,), Operand("uint8"), CODES, strides=(4,), pads=(15, 15)
            ),
            id="a long kernel with stride",
        ),
        pytest.param(
            Convolution(None, 130, (20, 20), 33, (3, 3), Operand("uint8"), CODES, pads=(1,) * 4),
            id="many channels, in blocks of rows",
        ),
        pytest.param(
            Convolution(None, 300, (7, 7), 70, (3, 3), Operand("uint8"), CODES, pads=(1,) * 4),
            id="a small image of many channels",
        ),
        pytest.param(
            Convolution(
                None, 20, (32, 33), 20, (5, 5), Operand("uint8", 9), CODES, pads=(2,) * 4, groups=20
            ),
            id="depthwise",
        ),
        pytest.param(
            Convolution(
                None,
                12,
                (33, 32),
                24,
                (3, 3),
                Operand("uint16", 9),
                CODES,
                "int16",
                (2, 2),
                groups=12,
                accumulator_bits=64,
            ),
            id="depthwise with two outputs a channel",
        ),
        pytest.param(
            Convolution(
                None, 3, (48, 64), 9, (16, 16), Operand("uint8", 9), CODES, "int8", (16,) * 2
            ),
            id="patches",
        ),
        pytest.param(
            Convolution(None, 16, (5, 5), 120, (5, 5), Operand("uint8", 9), CODES),
            id="a kernel over the whole image",
        ),
        pytest.param(
            Convolution(None, 37, (1,), 50, (1,), Operand("uint16", 9), Floats(), "int16"),
            id="one pixel, with correction",
        ),
        pytest.param(
            Convolution(None, 1, (4000,), 12, (400,), Operand("int16"), CODES, strides=(160,)),
            id="frames of a sound",
        ),
        pytest.param(
            Convolution(None, 3, (6, 6), 4, (2, 2), Operand("uint8", 9), CODES, pads=(30,) * 4),
            id="more padding than image",
        ),
    ],
)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_shapes_that_are_cut_in_many_ways(spec: Convolution, isa: Isa) -> None:
    check(make_case(spec, (2, spec.in_channels, *spec.size)), isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("output_type", ACTIVATION_TYPES)
def test_requantization_at_its_corners(
    output_type: ActivationType, bits: Literal[32, 64], isa: Isa
) -> None:
    # Filters of weight 1 pass their input on: accumulators are the biases plus 0 to 15. Scales of a
    # half make ties, the largest float32 saturates, 0 gives the zero point.
    limits = np.iinfo(output_type)
    largest = float(np.finfo(np.float32).max)
    scales = np.array([0.5, 0.25, 1.5, largest, 0.0, 1e-3, 2.0**-24, 0.1], np.float32)
    spec = Convolution(
        1,
        1,
        (1, 16),
        8,
        (1, 1),
        Operand("int8"),
        Codes(output_type, 1, int(limits.min), int(limits.max)),
        accumulator_bits=bits,
    )
    data = np.arange(-8, 8, dtype=np.int8).reshape(1, 1, 1, 16)
    bias = np.array([0, 1, -3, 0, 5, 2**24 - 3, 2**30 + 63, -(2**31) + 8], f"int{bits}")
    check(Case(spec, data, np.ones((8, 1, 1, 1), np.int8), bias, None, scales), isa)


def test_wide_sums_round_once_on_their_way_to_float() -> None:
    # 2^60 + 2^36 lies halfway between two float32 numbers. One more decides, and is lost on a
    # detour through float64.
    spec = Convolution(1, 4, (4,), 4, (1,), Operand("int8"), Floats(), accumulator_bits=64)
    tie, up = 2**60 + 2**36, 2.0**60 + 2.0**37
    case = Case(
        spec,
        np.zeros((1, 4, 4), np.int8),
        np.ones((4, 4, 1), np.int8),
        np.array([tie, tie + 1, -tie - 1, tie - 1], np.int64),
        None,
        np.ones(4, np.float32),
    )
    for isa in ISAS:
        got = Compiled(spec, isa).run(case)[0, :, 0]
        np.testing.assert_array_equal(got, np.array([2.0**60, up, -up, 2.0**60], np.float32))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_every_output_and_option(isa: Isa) -> None:
    options = [(True, True), (False, False)]
    for output, (bias, shift) in product(every_output("uint16"), options):
        spec = Convolution(
            None, 4, (5, 10), 6, (2, 2), Operand("int8", 4), output, bias=bias, shift=shift
        )
        check(make_case(spec, (1, 4, 5, 10)), isa)


@profile(30)
@given(convolutions())
def test_the_expectation_is_that_of_onnxruntime(spec: Convolution) -> None:
    """Codes so small that onnxruntime's float32 sums are exact."""
    generator = np.random.default_rng(0)
    data = generator.integers(0, 8, (2, spec.in_channels, *spec.size))
    weights = generator.integers(-8, 8, spec.weight_shape)
    node = onnx.helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        strides=spec.strides,
        dilations=spec.dilations,
        pads=spec.pads,
        group=spec.groups,
    )
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape)
            for name, array in (("x", data), ("w", weights))
        ],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {"x": data.astype(np.float32), "w": weights.astype(np.float32)}
    codes = (data + spec.data.zero_point).astype(np.int64)
    np.testing.assert_array_equal(
        session.run(None, feeds)[0], convolution_sums(codes, weights, spec)
    )


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"size": (4, 4, 4, 4), "kernel": (1, 1, 1, 1)}, "1 to 3 spatial axes"),
        ({"kernel": (3,)}, "attributes alike"),
        ({"kernel": (9, 9)}, "does not fit"),
        ({"groups": 3}, "do not divide"),
        ({"pads": (-1, 0, 0, 0)}, "not negative"),
        ({"strides": (0, 1)}, "must be positive"),
    ],
)
def test_what_is_no_convolution_is_refused(fields: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {
        "batch": None,
        "in_channels": 4,
        "size": (5, 5),
        "out_channels": 4,
        "kernel": (3, 3),
        "data": Operand("int8"),
        "output": CODES,
    }
    with pytest.raises(UsageError, match=said):
        Convolution(**right | fields)


def test_types_without_their_codes_are_refused() -> None:
    with pytest.raises(UsageError, match="not a code of int8"):
        Operand("int8", 128)
    with pytest.raises(UsageError, match="cannot be clamped"):
        Codes("uint8", 0, -1, 255)
    with pytest.raises(UsageError, match="too many"):
        Convolution(1, 70_000, (1,), 1, (1,), Operand("uint16", 1), CODES, "int16")


def test_the_plain_kernels_need_no_particular_processor() -> None:
    assert GENERIC.multiply_add is None
    assert GENERIC.mcpu is None
