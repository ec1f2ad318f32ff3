"""Perplexity, last words and word orders of the language model, in every form of its activations.

Run as `python -m examples.mamba_text.measure` in the repository's root; the README beside this file
explains the table. The exit code is 1 where soft edge on the scans' x costs 1 % of perplexity or
more, is significantly worse than hard clipping or, at the percentiles 99 and 99.9, not
significantly better.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from benchmarks.activation_histograms import draw
from benchmarks.bootstrap import Bootstrap, Estimate
from benchmarks.mamba_configurations import (
    Run,
    chosen,
    float_runner,
    largest_difference,
    positive,
    quantized,
    runner,
)
from benchmarks.tables import table
from examples.mamba_text import network, tasks
from examples.mamba_text.text import START, Tokenizer

HERE = Path(__file__).resolve().parent
CALIBRATION_LENGTH = 256

Tokens = npt.NDArray[np.int64]


def documents(name: str) -> list[str]:
    """Read documents; an empty line is between them."""
    text = (HERE / name).read_text(encoding="ascii")
    return [document + "\n" for document in text.rstrip("\n").split("\n\n")]


def calibration_tokens(tokenizer: Tokenizer) -> Tokens:
    """Documents that the model was trained with, cut into rows of one length."""
    stream = [
        token
        for document in documents("calibration.txt")
        for token in (START, *tokenizer.encode(document))
    ]
    rows = len(stream) // CALIBRATION_LENGTH
    return np.array(stream[: rows * CALIBRATION_LENGTH], np.int64).reshape(rows, -1)


class Questions:
    """All rows of all tasks, and their sums for each document."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self.rows = {
            "perplexity": tasks.next_tokens(tokenizer, texts),
            "cloze4": tasks.last_words(tokenizer, texts),
            "order": tasks.word_orders(tokenizer, texts),
        }
        self._documents = len(texts)

    def answers(self, run: Run) -> dict[str, npt.NDArray[np.float64]]:
        """Task to `[2, documents]`: what is counted, and out of how many."""
        found = {}
        for task, rows in self.rows.items():
            sums = np.zeros((2, self._documents))
            options: dict[int, list[tuple[float, bool, int]]] = {}
            for row in rows:
                value, count = tasks.likelihood(row, run(row.tokens))
                if task == "perplexity":
                    sums[:, row.document] += (-value, count)
                options.setdefault(row.item, []).append((value, row.right, row.document))
            if task != "perplexity":
                for item in options.values():
                    _, right, document = max(item, key=lambda option: option[0])
                    sums[:, document] += (right, 1)
            found[task] = sums
        return found


Answers = Mapping[str, npt.NDArray[np.float64]]
Line = tuple[str, str | None, Mapping[str, Estimate]]  # configuration, what it is compared with


def estimates(bootstrap: Bootstrap, own: Answers, other: Answers | None) -> dict[str, Estimate]:
    """Values, and differences from another configuration; of perplexities the ratio less 1."""
    found = {}
    for task, sums in own.items():
        function = np.exp if task == "perplexity" else np.positive
        found[task] = bootstrap.ratio(sums[0], sums[1], function)
        if other is None:
            continue
        if task == "perplexity":
            # The same tokens in both, so the ratio of perplexities is e to this difference.
            extra = sums[0] - other[task][0]
            found["perplexity_change"] = bootstrap.ratio(extra, sums[1], np.expm1)
        else:
            found[f"{task}_difference"] = bootstrap.difference(
                (sums[0], other[task][0]), (sums[1], other[task][1])
            )
    return found


def broken(lines: Sequence[Line]) -> list[str]:
    """Which bounds do not hold; the module's docstring says what they are."""
    found = []
    for padded, reference, estimate in lines:
        name = padded.strip()
        settings, _, form = name.partition(" x ")
        if form not in ("a8se", "a8se8") or reference is None:
            continue
        change = estimate["perplexity_change"]
        shown = change.show(2, scale=100, signed=True)
        if reference == "float":
            if change.value >= 0.01:
                found.append(f"{name}: {shown} % of perplexity more than float, not below 1")
        elif change.low > 0:
            found.append(f"{name}: {shown} % of perplexity more than {reference}")
        elif settings.split()[1] in ("99", "99.9") and change.high >= 0:
            found.append(f"{name}: {shown} %, not significantly better than {reference}")
    return found


def show(lines: Sequence[Line]) -> str:
    """Lay out the table."""

    def change(found: Mapping[str, Estimate], key: str) -> str:
        if key not in found:
            return ""
        noise = " noise" if found[key].within_noise else ""
        return found[key].show(2, scale=100, signed=True) + noise

    return table(
        ["<configuration", "perplexity", "cloze %", "order %", "<perplexity, % more", "<than"],
        [
            [
                name,
                found["perplexity"].show(2),
                found["cloze4"].show(scale=100),
                found["order"].show(scale=100),
                change(found, "perplexity_change"),
                reference or "",
            ]
            for name, reference, found in lines
        ],
    )


def recorded(model: Path, rows: Sequence[Tokens]) -> dict[str, npt.NDArray[np.float32]]:
    """What the scans take as x, of all rows one behind the other."""
    proto = onnx.load(model)
    names = [f"layer{layer}.u" for layer in range(network.LAYERS)]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    parts = [session.run(names, {"tokens": row}) for row in rows]
    return {
        name: np.concatenate([np.asarray(part[index]) for part in parts])
        for index, name in enumerate(names)
    }


def main() -> int:
    """Print the table, draw the figure, write what was asked for; return if a bound is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=positive, help="held-out documents; default: all")
    parser.add_argument(
        "--only", type=chosen, default="*", help="names of configurations, by commas; * is any text"
    )
    parser.add_argument("--output", type=Path, help="folder for model, data, figure and figures")
    parser.add_argument("--engine", choices=["artefact", "onnxruntime"], default="artefact")
    arguments = parser.parse_args()

    tokenizer = Tokenizer.load(HERE / "tokenizer.json")
    texts = documents("test.txt")
    if arguments.documents is not None:
        texts = texts[:: max(1, len(texts) // arguments.documents)][: arguments.documents]
    questions = Questions(tokenizer, texts)
    tokens = calibration_tokens(tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "mamba.onnx"
        onnx.save(network.build_onnx(network.load(HERE / "mamba.npz")), model)
        np.savez(folder / "calibration.npz", tokens=tokens)
        for task, rows in questions.rows.items():
            data = tasks.arrays(rows, choice=task != "perplexity")
            np.savez(folder / f"{task}.npz", tokens=data["tokens"], labels=data["labels"])
        draw(recorded(model, list(tokens[::4])), folder / "activations.png")

        counted = {task: len(rows) for task, rows in questions.rows.items()}
        print(f"{len(texts)} documents; sequences: {counted}", flush=True)
        answers = {"float": questions.answers(float_runner(model))}
        bootstrap = Bootstrap(len(texts))
        for configuration in arguments.only:
            started = time.perf_counter()
            path = quantized(configuration, model, {"tokens": tokens})
            run = runner(path, arguments.engine)
            answers[configuration.name] = questions.answers(run)
            apart = largest_difference(path, run, [questions.rows["order"][0].tokens])
            found = estimates(bootstrap, answers[configuration.name], answers["float"])
            print(
                f"{configuration.name}: perplexity {found['perplexity'].show(2)}; "
                f"{time.perf_counter() - started:.0f} s; "
                f"the first steps in onnxruntime are {apart:.1e} apart",
                flush=True,
            )
        lines: list[Line] = []
        references = {
            configuration.name: configuration.reference for configuration in arguments.only
        }
        for name, own in answers.items():
            other = None if name == "float" else "float"
            compared = None if other is None else answers[other]
            lines.append((name, other, estimates(bootstrap, own, compared)))
            reference = references.get(name)
            if reference in answers:
                lines.append(
                    (f"  {name}", reference, estimates(bootstrap, own, answers[reference]))
                )
        print()
        print(show(lines))
        if arguments.output is not None:
            written: list[dict[str, Any]] = [
                {"configuration": name.strip(), "reference": reference}
                | {key: value.to_dict() for key, value in found.items()}
                for name, reference, found in lines
            ]
            (folder / "figures.json").write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    bounds = broken(lines)
    for bound in bounds:
        print(f"bound broken: {bound}", file=sys.stderr)
    return 1 if bounds else 0


if __name__ == "__main__":
    raise SystemExit(main())
