"""Sessions must compute what the model says, optimised or not."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.quant.float_ops import make_session, wrong_optimizers
from tests.quant.qdq import Array, Builder


def padded_pool(fill: float | None = None) -> Builder:
    builder = Builder(opset=21)
    pads = builder.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1]))
    extra = [] if fill is None else [builder.constant(np.float32(fill))]
    padded = builder.node("Pad", builder.input("x", ["N", 2, 5, 5]), pads, *extra)
    builder.node("MaxPool", padded, kernel_shape=[2, 2], strides=[2, 2])
    return builder


def pooled_by_hand(x: Array, fill: float) -> Array:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (0, 1)), constant_values=fill)
    pooled: Array = padded.reshape(len(x), 2, 3, 2, 3, 2).max(axis=(3, 5))
    return pooled


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1.5])
def test_padding_in_front_of_max_pooling_keeps_its_value(optimize: bool, fill: float) -> None:
    """onnxruntime 1.31 takes the padding into the pooling, which pads with minus infinity."""
    builder = padded_pool(fill)
    x = -np.abs(np.random.default_rng(0).normal(2, 1, (3, 2, 5, 5))).astype(np.float32)
    session = make_session(builder.model(builder.nodes[-1].output[0]), optimize=optimize)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], pooled_by_hand(x, fill))


def test_other_models_keep_their_optimisations() -> None:
    builder = Builder(opset=21)
    pads = builder.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    padded = builder.node("Pad", builder.input("x", ["N", 2, 5, 5]), pads)
    builder.node("Conv", padded, builder.constant(np.ones((1, 2, 3, 3), np.float32)))
    assert wrong_optimizers(builder.model(builder.nodes[-1].output[0])) == []
