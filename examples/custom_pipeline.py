"""Use bitwright's passes inside a TVM pipeline of your own.

The passes are ordinary Relax module passes: they stand in a ``tvm.transform.Sequential`` between
TVM's passes and yours. This program quantizes LeNet-5, imports it, runs two passes of bitwright, a
pass of its own that lists the integer layers, and TVM's standard compilation; no code generator of
bitwright takes part. The outputs equal the integer reference to the last bit.

Run it from the root of the repository: ``python examples/custom_pipeline.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

import bitwright
from bitwright.importer import import_model
from bitwright.passes.lower_to_integer import LowerToInteger
from bitwright.passes.propagate_quantization import PropagateQuantization
from bitwright.quant.load import load
from bitwright.quant.reference import Reference

LENET = Path(__file__).resolve().parent / "lenet_digits"


@tvm.transform.module_pass(opt_level=0, name="ListIntegerProducts")
class ListIntegerProducts:
    """Print every product of integers; change nothing."""

    def transform_module(self, mod: Any, _context: Any) -> Any:
        """Visit all calls of ``main``."""

        def visit(expr: Any) -> None:
            if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
                product = expr.op.name in ("relax.matmul", "relax.nn.conv2d")
                if product and str(expr.ty.dtype).startswith("int"):
                    print(f"{expr.op.name.removeprefix('relax.'):10} {expr.ty}")

        relax.analysis.post_order_visit(mod["main"], visit)
        return mod


def main() -> None:
    """Quantize, import, transform, compile, run, compare."""
    quantized = bitwright.quantize(
        LENET / "lenet.onnx", precision="w4a8", calibration=LENET / "calibration.npz"
    )
    model = load(quantized.model)
    pipeline = tvm.transform.Sequential(
        [
            PropagateQuantization(),
            LowerToInteger(),
            relax.transform.CanonicalizeBindings(),  # TVM's
            ListIntegerProducts(),  # yours
        ]
    )
    module = pipeline(import_model(model))
    executable = tvm.compile(module, target=tvm.target.Target("llvm"))

    with np.load(LENET / "test.npz") as archive:
        images = archive["image"][:100].astype(np.float32)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    logits = machine["main"](tvm.runtime.tensor(images)).numpy()
    expected = Reference(model).run({"image": images})[0]["logits"]
    print(f"equal to the integer reference: {100 * np.mean(logits == expected):.2f} %")


if __name__ == "__main__":
    main()
