"""The language model: its sizes, its stored weights, and its ONNX form.

Four Mamba blocks (Gu and Dao, arXiv 2312.00752) between an embedding and a projection that share
their weights. Needs no PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 2_048
WIDTH = 128
INNER = 2 * WIDTH
LAYERS = 4
STATE = 16
RANK = WIDTH // 16
KERNEL = 4
EPSILON = 1e-5

Weights = dict[str, npt.NDArray[np.float32]]


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights; matrices are [outputs, inputs]."""
    found: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, WIDTH), "norm": (WIDTH,)}
    for layer in range(LAYERS):
        found |= {
            f"{layer}.norm": (WIDTH,),
            f"{layer}.in_proj": (2 * INNER, WIDTH),
            f"{layer}.conv": (INNER, KERNEL),
            f"{layer}.conv_bias": (INNER,),
            f"{layer}.x_proj": (RANK + 2 * STATE, INNER),
            f"{layer}.dt_proj": (INNER, RANK),
            f"{layer}.dt_bias": (INNER,),
            f"{layer}.A_log": (INNER, STATE),
            f"{layer}.D": (INNER,),
            f"{layer}.out_proj": (WIDTH, INNER),
        }
    return found


def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round float32 to bfloat16, ties to even; NaN and infinity do not occur."""
    bits = values.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def save(weights: Weights, path: Path) -> None:
    """Write weights that `rounded` has rounded: 16 bits each, high and low bytes apart.

    Sign and exponent differ little, so their bytes are stored in half the room; mixed with the
    others they would not be.
    """
    words = {
        name: (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for name, array in weights.items()
    }
    planes = {f"{name}/high": (word >> 8).astype(np.uint8) for name, word in words.items()}
    planes |= {f"{name}/low": (word & 255).astype(np.uint8) for name, word in words.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **planes)


def load(path: Path) -> Weights:
    """Read what `save` wrote."""
    weights: Weights = {}
    with np.load(path, allow_pickle=False) as archive:
        for name, shape in shapes().items():
            high, low = archive[f"{name}/high"], archive[f"{name}/low"]
            if high.shape != shape or low.shape != shape:
                raise SystemExit(f"{path}: {name} has shape {list(high.shape)}, not {list(shape)}")
            word = (high.astype(np.uint32) << 24) | (low.astype(np.uint32) << 16)
            weights[name] = word.view(np.float32)
    return weights


def build_onnx(weights: Weights) -> onnx.ModelProto:
    """Build the ONNX model: `tokens` int64 [time] to `logits` float32 [time, 2048].

    The selective scan is a Scan; its body discretises, `exp(dt A)`, and holds A and D.
    """
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, npt.NDArray[Any]] = {
        "embedding": weights["embedding"],
        "head": weights["embedding"].T,
        "epsilon": np.array(EPSILON, np.float32),
        "first": np.array([0], np.int64),
        "state": np.zeros((INNER, STATE), np.float32),
        "halves": np.array([INNER, INNER], np.int64),
        "parts": np.array([RANK, STATE, STATE], np.int64),
    }

    def add(op: str, name: str, *inputs: str, outputs: tuple[str, ...] = (), **options: Any) -> str:
        made = list(outputs) or [name]
        nodes.append(helper.make_node(op, list(inputs), made, name=name, **options))
        return made[0]

    def norm(name: str, source: str, gain: npt.NDArray[np.float32]) -> str:
        constants[f"{name}.gain"] = gain
        square = add("Mul", f"{name}.square", source, source)
        mean = add("ReduceMean", f"{name}.mean", square, axes=[-1])
        root = add("Sqrt", f"{name}.root", add("Add", f"{name}.sum", mean, "epsilon"))
        return add("Mul", name, add("Div", f"{name}.unit", source, root), f"{name}.gain")

    def product(name: str, source: str, matrix: npt.NDArray[np.float32]) -> str:
        constants[f"{name}.weight"] = np.ascontiguousarray(matrix.T)
        return add("MatMul", name, source, f"{name}.weight")

    def silu(name: str, source: str) -> str:
        return add("Mul", name, source, add("Sigmoid", f"{name}.sigmoid", source))

    hidden = add("Gather", "embedded", "embedding", "tokens")
    for layer in range(LAYERS):
        own = {
            name.partition(".")[2]: array
            for name, array in weights.items()
            if name.startswith(f"{layer}.")
        }
        p = f"layer{layer}"
        both = product(f"{p}.in_proj", norm(f"{p}.norm", hidden, own["norm"]), own["in_proj"])
        add("Split", f"{p}.split", both, "halves", outputs=(f"{p}.x", f"{p}.z"), axis=-1)
        # Convolutions want [batch, channels, time].
        columns = add("Transpose", f"{p}.columns", f"{p}.x", perm=[1, 0])
        columns = add("Unsqueeze", f"{p}.batch", columns, "first")
        constants[f"{p}.conv.weight"] = own["conv"][:, None]
        constants[f"{p}.conv.bias"] = own["conv_bias"]
        columns = add(
            *("Conv", f"{p}.conv", columns, f"{p}.conv.weight", f"{p}.conv.bias"),
            group=INNER,
            kernel_shape=[KERNEL],
            pads=[KERNEL - 1, 0],
        )
        rows = add("Squeeze", f"{p}.squeezed", columns, "first")
        u = silu(f"{p}.u", add("Transpose", f"{p}.rows", rows, perm=[1, 0]))
        parts = product(f"{p}.x_proj", u, own["x_proj"])
        add(
            *("Split", f"{p}.parts", parts, "parts"),
            outputs=(f"{p}.low_rank", f"{p}.B", f"{p}.C"),
            axis=-1,
        )
        constants[f"{p}.dt_bias"] = own["dt_bias"]
        dt = product(f"{p}.dt_proj", f"{p}.low_rank", own["dt_proj"])
        dt = add("Softplus", f"{p}.dt", add("Add", f"{p}.dt_biased", dt, f"{p}.dt_bias"))
        add(
            *("Scan", f"{p}.scan", "state", dt, u, f"{p}.B", f"{p}.C"),
            outputs=(f"{p}.h", f"{p}.y"),
            body=_scan_body(-np.exp(own["A_log"]), own["D"]),
            num_scan_inputs=4,
        )
        gated = add("Mul", f"{p}.gated", f"{p}.y", silu(f"{p}.gate", f"{p}.z"))
        hidden = add("Add", p, hidden, product(f"{p}.out_proj", gated, own["out_proj"]))
    add("MatMul", "logits", norm("norm", hidden, weights["norm"]), "head")

    graph = helper.make_graph(
        nodes,
        "mamba_text",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["time"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["time", VOCABULARY])],
        [
            numpy_helper.from_array(np.ascontiguousarray(array), name)
            for name, array in constants.items()
        ],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="bitwright examples/mamba_text",
        doc_string="A Mamba language model trained on the King James Bible.",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _scan_body(
    decay_rates: npt.NDArray[np.float32], skip: npt.NDArray[np.float32]
) -> onnx.GraphProto:
    """One step: h = exp(dt A) h + dt u B;  y = h C + D u."""

    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    make = helper.make_node
    return helper.make_graph(
        [
            make("Unsqueeze", ["dt_t", "one"], ["dt_c"]),
            make("Mul", ["dt_c", "A"], ["dt_a"]),
            make("Exp", ["dt_a"], ["decay"]),
            make("Mul", ["dt_t", "u_t"], ["dt_u"]),
            make("Unsqueeze", ["dt_u", "one"], ["dt_u_c"]),
            make("Mul", ["dt_u_c", "B_t"], ["input"]),
            make("Mul", ["decay", "h"], ["decayed"]),
            make("Add", ["decayed", "input"], ["h_new"]),
            make("Mul", ["h_new", "C_t"], ["weighted"]),
            make("ReduceSum", ["weighted", "one"], ["sum"], keepdims=0),
            make("Mul", ["u_t", "D"], ["skipped"]),
            make("Add", ["sum", "skipped"], ["y_t"]),
        ],
        "selective_scan",
        [
            value("h", INNER, STATE),
            value("dt_t", INNER),
            value("u_t", INNER),
            value("B_t", STATE),
            value("C_t", STATE),
        ],
        [value("h_new", INNER, STATE), value("y_t", INNER)],
        [
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            numpy_helper.from_array(decay_rates.astype(np.float32), "A"),
            numpy_helper.from_array(skip, "D"),
        ],
    )
