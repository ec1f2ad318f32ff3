"""Train the language model and write `mamba.npz`, `tokenizer.json`, `calibration.txt`, `test.txt`.

Run as `python -m examples.mamba_text.train` in the repository's root; the README beside this file
says what it needs.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import nn
from torch.nn import functional

from examples.mamba_text.network import (
    EPSILON,
    INNER,
    KERNEL,
    LAYERS,
    RANK,
    STATE,
    VOCABULARY,
    WIDTH,
    Weights,
    build_onnx,
    rounded,
    save,
    shapes,
)
from examples.mamba_text.text import START, Tokenizer, chapters, fetch, split

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "text"

LENGTH = 256
BATCH = 16
STEPS = 1_200
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.1
CALIBRATION_DOCUMENTS = 24

Tokens = npt.NDArray[np.int64]


def compile_scan(folder: Path) -> ctypes.CDLL:
    """Compile `scan.cc` for this processor."""
    if shutil.which("c++") is None:
        raise SystemExit(
            "there is no C++ compiler (c++), which scan.cc needs: install one, g++ say"
        )
    flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c++17"]
    target, made = folder / "scan.so", folder / "scan.o"
    # Linking with -ffast-math would change how the whole process treats tiny numbers.
    for command in (
        ["c++", *flags, "-ffast-math", "-c", str(HERE / "scan.cc"), "-o", str(made)],
        ["c++", *flags, "-shared", str(made), "-o", str(target)],
    ):
        subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.float32
    return ctypes.c_void_p(tensor.data_ptr())


class SelectiveScan(torch.autograd.Function):  # type: ignore[misc] # PyTorch has no types here
    """The scan of `scan.cc`."""

    library: ctypes.CDLL

    @staticmethod
    def forward(context: Any, *inputs: torch.Tensor) -> torch.Tensor:
        inputs = tuple(value.contiguous() for value in inputs)
        context.save_for_backward(*inputs)
        result = torch.empty_like(inputs[0])
        SelectiveScan.library.scan_forward(
            *result.shape, *(_address(value) for value in (*inputs, result))
        )
        return result

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = context.saved_tensors
        batch = len(inputs[0])
        u, dt, a, b, c, d = (torch.zeros_like(value) for value in inputs)
        a, d = (value.expand(batch, *value.shape).contiguous() for value in (a, d))
        found = (u, dt, a, b, c, d)
        gradient = gradients[0].contiguous()
        SelectiveScan.library.scan_backward(
            *inputs[0].shape, *(_address(value) for value in (*inputs, gradient, *found))
        )
        return u, dt, a.sum(0), b, c, d.sum(0)


class Mamba(nn.Module):  # type: ignore[misc]
    """The network of `network.py`, `tokens [batch, time]` to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "_"): nn.Parameter(self._start(name.rpartition(".")[2], shape))
                for name, shape in shapes().items()
            }
        )

    @staticmethod
    def _start(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Start values as in the authors' code."""
        if kind in ("norm", "D"):
            return torch.ones(shape)
        if kind == "A_log":
            return torch.arange(1, STATE + 1).float().log().expand(shape).clone()
        if kind == "dt_bias":
            dt = torch.exp(torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1)))
            return dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt
        if kind == "embedding":
            return 0.02 * torch.randn(shape)
        if kind == "conv_bias":
            return torch.zeros(shape)
        values = torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[1])
        return values / math.sqrt(LAYERS) if kind == "out_proj" else values

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = functional.embedding(tokens, self.weights["embedding"])
        for layer in range(LAYERS):
            hidden = hidden + self._block(f"{layer}_", hidden)
        return self._norm(hidden, "norm") @ self.weights["embedding"].T

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(hidden, (WIDTH,), self.weights[name], EPSILON)

    def _block(self, p: str, hidden: torch.Tensor) -> torch.Tensor:
        w = self.weights
        x, z = functional.linear(self._norm(hidden, p + "norm"), w[p + "in_proj"]).chunk(2, -1)
        columns = functional.pad(x.transpose(1, 2), (KERNEL - 1, 0))
        columns = functional.conv1d(
            columns, w[p + "conv"][:, None], w[p + "conv_bias"], groups=INNER
        )
        u = functional.silu(columns)
        parts = functional.linear(u.transpose(1, 2), w[p + "x_proj"])
        low_rank, b, c = parts.split([RANK, STATE, STATE], -1)
        dt = functional.softplus(functional.linear(low_rank, w[p + "dt_proj"], w[p + "dt_bias"]))
        rates = -torch.exp(w[p + "A_log"])
        y = SelectiveScan.apply(u, dt.transpose(1, 2), rates, b, c, w[p + "D"])
        return functional.linear(y.transpose(1, 2) * functional.silu(z), w[p + "out_proj"])


def train(stream: torch.Tensor, *, steps: int, seed: int) -> Mamba:
    """Train on random pieces of a stream of tokens."""
    torch.manual_seed(seed)
    model = Mamba()
    # As in the authors' code: no decay for what is not a matrix product.
    decayed: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, weight in model.weights.items():
        (decayed if name.endswith(("proj", "embedding")) else others).append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=PEAK_LEARNING_RATE,
        total_steps=steps,
        pct_start=0.08,
        final_div_factor=1e3,
    )
    started, shown = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - LENGTH, (BATCH,))
        rows = stream[starts[:, None] + torch.arange(LENGTH + 1)]
        optimizer.zero_grad()
        logits = model(rows[:, :-1])
        loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown = loss.item() if step == 1 else 0.98 * shown + 0.02 * loss.item()
        if step % 25 == 0 or step == steps:
            speed = step * BATCH * LENGTH / (time.perf_counter() - started)
            print(f"step {step} of {steps}: loss {shown:.3f}, {speed:,.0f} tokens/s", flush=True)
    return model


def export_weights(model: Mamba) -> Weights:
    """Take out the weights, rounded to bfloat16."""
    return {
        name: rounded(model.weights[name.replace(".", "_")].detach().numpy()) for name in shapes()
    }


def difference(model: Mamba, weights: Weights, tokens: Tokens) -> float:
    """Return the largest difference of logits between PyTorch and onnxruntime."""
    with torch.no_grad():
        for name, array in weights.items():
            model.weights[name.replace(".", "_")].copy_(torch.from_numpy(array.copy()))
        expected = model(torch.from_numpy(tokens)[None])[0].numpy()
    session = ort.InferenceSession(
        build_onnx(weights).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["logits"], {"tokens": tokens})
    return float(np.abs(np.asarray(found) - expected).max())


def perplexity(model: Mamba, documents: list[Tokens]) -> float:
    """Perplexity of documents, each from its start."""
    loss = count = 0.0
    with torch.no_grad():
        for tokens in documents:
            logits = model(torch.from_numpy(tokens[:-1])[None])[0]
            right = torch.from_numpy(tokens[1:])
            loss += functional.cross_entropy(logits, right, reduction="sum").item()
            count += len(right)
    return math.exp(loss / count)


def main() -> None:
    """Train, write the files, print the perplexity of the held-out documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=CACHE, help="folder that the text is kept in")
    arguments = parser.parse_args()

    training, held_out = split(chapters(fetch(arguments.text)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.train(training, VOCABULARY)
    if len(tokenizer) != VOCABULARY:
        raise SystemExit(f"the text gives {len(tokenizer)} tokens, not {VOCABULARY}")
    tokenizer.save(arguments.output / "tokenizer.json")
    chosen = training[:: len(training) // CALIBRATION_DOCUMENTS][:CALIBRATION_DOCUMENTS]
    for name, documents in (("calibration.txt", chosen), ("test.txt", held_out)):
        # An empty line between documents.
        (arguments.output / name).write_text("\n".join(documents), encoding="ascii")

    def encoded(document: str) -> Tokens:
        return np.array([START, *tokenizer.encode(document)], np.int64)

    stream = torch.from_numpy(np.concatenate([encoded(document) for document in training]))
    print(
        f"{len(training)} documents, {len(stream):,} tokens; {len(held_out)} held out", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        SelectiveScan.library = compile_scan(Path(folder))
    started = time.perf_counter()
    model = train(stream, steps=arguments.steps, seed=arguments.seed)
    seconds = time.perf_counter() - started

    weights = export_weights(model)
    save(weights, arguments.output / "mamba.npz")
    tests = [encoded(document) for document in held_out]
    apart = difference(model, weights, tests[0])
    print(
        f"trained {sum(array.size for array in weights.values()):,} weights in {seconds:.0f} s; "
        f"perplexity of {sum(map(len, tests)):,} held-out tokens: {perplexity(model, tests):.2f}; "
        f"logits of the ONNX model differ by at most {apart:.1e}"
    )


if __name__ == "__main__":
    main()
