"""A small Mamba block as exporters write it, and its scan in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser

from tests.quant.qdq import Array

FEATURES = 6


def mamba(
    channels: int = 8,
    state: int = 4,
    rank: int = 2,
    *,
    both_ways: bool = False,
    norm: str = "layer",
) -> onnx.ModelProto:
    """From ``x`` to ``y float[T, 6]``: norm, in_proj, conv, SiLU, x_proj, scan, gate, out_proj.

    Parameters
    ----------
    both_ways
        Whether the same tensors enter a second scan, from the end to the start.
    norm
        ``layer`` for LayerNormalization, ``rms`` for a root mean square, spelled out.
    """
    random = np.random.default_rng(channels + state)

    def weights(*shape: int, scale: float | None = None) -> Array:
        spread = 1.0 / np.sqrt(shape[0]) if scale is None else scale
        return random.normal(0.0, spread, shape).astype(np.float32)

    constants: dict[str, Array] = {
        "gamma": weights(FEATURES, scale=1.0),
        "beta": weights(FEATURES, scale=0.3),
        "w_in": weights(FEATURES, 2 * channels),
        "b_in": weights(2 * channels, scale=0.2),
        "w_conv": weights(channels, 1, 4, scale=0.5),
        "b_conv": weights(channels, scale=0.2),
        "w_x": weights(channels, rank + 2 * state),
        "w_dt": weights(rank, channels),
        "b_dt": weights(channels, scale=0.5),
        "A": -np.exp(weights(channels, state, scale=0.5)),
        "D": weights(channels, scale=1.0),
        "w_out": weights(channels, FEATURES),
        "h0": np.zeros((channels, state), np.float32),
        "halves": np.array([channels, channels], np.int64),
        "parts": np.array([rank, state, state], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([1], np.int64),
    }
    if norm == "rms":
        constants["epsilon"] = np.array(1e-6, np.float32)
    normalise = {
        "layer": "z = LayerNormalization <axis = -1, epsilon = 0.000001> (x, gamma, beta)",
        "rms": """sq = Mul(x, x) mean = ReduceMean(sq, last) shifted = Add(mean, epsilon)
            root = Sqrt(shifted) plain = Div(x, root) scaled = Mul(plain, gamma)
            z = Add(scaled, beta)""",
    }[norm]

    def step(name: str) -> str:
        c, n = channels, state
        return f"""{name} (float[{c},{n}] h, float[{c}] d_t, float[{c}] u_t, float[{n}] b_t,
            float[{n}] c_t) => (float[{c},{n}] hn, float[{c}] y_t) {{
            dc = Unsqueeze(d_t, last) p = Mul(dc, A) e = Exp(p) o = Mul(e, h) du = Mul(d_t, u_t)
            d2 = Unsqueeze(du, last) i = Mul(d2, b_t) hn = Add(o, i) hc = Mul(hn, c_t)
            s = ReduceSum <keepdims = 0> (hc, last) k = Mul(u_t, D) y_t = Add(s, k) }}"""

    backward = f"""[back] h2, y2 = Scan <num_scan_inputs = 4, scan_input_directions = [1, 1, 1, 1],
        scan_output_directions = [1], body = {step("back_step")}> (h0, dt, u, B, C)"""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        block (float[T, {FEATURES}] x) => (float[T, {FEATURES}] y) {{
            {normalise}
            [in_proj] m = MatMul(z, w_in) a = Add(m, b_in)
            v, gate = Split <axis = 1> (a, halves)
            t = Transpose <perm = [1, 0]> (v) t3 = Unsqueeze(t, first)
            [conv] f3 = Conv <group = {channels}, pads = [1, 2]> (t3, w_conv, b_conv)
            f2 = Squeeze(f3, first) f = Transpose <perm = [1, 0]> (f2)
            sf = Sigmoid(f) u = Mul(f, sf)
            [x_proj] xp = MatMul(u, w_x) r, B, C = Split <axis = 1> (xp, parts)
            [dt_proj] dm = MatMul(r, w_dt) db = Add(dm, b_dt) dt = Softplus(db)
            [loop] h1, y1 = Scan <num_scan_inputs = 4, body = {step("loop_step")}>
                (h0, dt, u, B, C)
            {backward if both_ways else ""}
            ys = {"Add(y1, y2)" if both_ways else "Identity(y1)"}
            sg = Sigmoid(gate) g = Mul(gate, sg) yg = Mul(ys, g)
            [out_proj] out = MatMul(yg, w_out) y = Add(x, out)
        }}"""
    )
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    model.graph.initializer.extend(tensors)
    return model


def samples(count: int = 12, length: int = 20, seed: int = 0) -> dict[str, Array]:
    """Samples [count, T, 6] with an outlier feature."""
    x = np.random.default_rng(seed).normal(0.0, 1.0, (count, length, FEATURES))
    x[..., 1] *= 6.0
    return {"x": x.astype(np.float32)}


def constant(model: onnx.ModelProto, name: str) -> Any:
    """An initializer as an array."""
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return onnx.numpy_helper.to_array(found)
