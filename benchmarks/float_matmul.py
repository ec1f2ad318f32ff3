"""Speed of the float32 product beside onnxruntime's MatMul.

Every product runs alone, with constant weights: ours, which does not know the number of rows when
it is compiled, and onnxruntime's; same process, rounds alternated, the median over the rounds of
the fastest call in each.

Run from the repository root::

    python -m benchmarks.float_matmul
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.kernels import alternate
from benchmarks.tables import table
from bitwright.targets.kernels import host

#: Rows, depth, columns.
SHAPES: tuple[tuple[int, int, int], ...] = (
    (16_000, 256, 512),
    (2_400, 1_100, 1_904),
    (1, 1_024, 1_024),
    (300, 23, 3_300),
    (64, 256, 48),
    (1, 256, 1_024),
    (6, 256, 1_024),
    (500, 768, 768),
)


def our_product(rows: int, depth: int, columns: int, static: bool) -> Callable[[], Any]:
    """Compile a kernel and return a call of it."""
    import tvm

    from bitwright.targets.kernels import float_matmul

    function = float_matmul.kernel([rows if static else None], depth, columns, name="product")
    target = tvm.target.Target(host.target(host.detect()))
    product = tvm.compile(tvm.IRModule({"product": function}), target=target)["product"]
    generator = np.random.default_rng(0)
    data = tvm.runtime.tensor(generator.standard_normal((rows, depth), np.float32))
    weights = generator.standard_normal((depth, columns), np.float32)
    packed = tvm.runtime.tensor(float_matmul.pack(weights))
    result = tvm.runtime.tensor(np.zeros((rows, columns), np.float32))
    product(data, packed, result)
    np.testing.assert_allclose(result.numpy(), data.numpy() @ weights, atol=1e-5 * depth)
    return lambda: product(data, packed, result)


def peer_product(rows: int, depth: int, columns: int, threads: int) -> Callable[[], Any]:
    """Return a call of onnxruntime, which writes into the same memory each time."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((depth, columns), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", columns])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    data = ort.OrtValue.ortvalue_from_numpy(generator.standard_normal((rows, depth), np.float32))
    result = ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, columns), np.float32))
    binding.bind_ortvalue_input("x", data)
    binding.bind_ortvalue_output("y", result)
    return lambda: session.run_with_iobinding(binding)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description="float32 products beside onnxruntime's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a round")
    parser.add_argument("--static", action="store_true", help="compile for the number of rows")
    options = parser.parse_args(arguments)
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read when TVM starts its threads

    rows, ratios = [], []
    for shape in SHAPES:
        calls = (our_product(*shape, options.static), peer_product(*shape, options.threads))
        ours, peer = alternate(calls, options.rounds, options.seconds)
        ratios.append(ours / peer)
        speeds = [f"{math.prod(shape) / seconds / 1e9:.1f}" for seconds in (ours, peer)]
        rows.append(
            [
                " x ".join(map(str, shape)),
                f"{ours * 1e3:.4f}",
                speeds[0],
                f"{peer * 1e3:.4f}",
                speeds[1],
                f"{ours / peer:.2f}",
            ]
        )
    print(f"\n{host.detect().name}, {options.threads} threads, onnxruntime {ort.__version__}\n")
    print(table(("<shape", "ms", "GMAC/s", "onnxruntime ms", "GMAC/s", "ratio"), rows))
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
    print(f"\ngeometric mean of the ratios: {mean:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
