"""Histograms of activations, with the segments of each form of their codes drawn in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from bitwright.quant.observers import Observer, TensorQuantization, choose_quantization
from bitwright.quant.soft_edge import choose_soft_edge

Values = npt.NDArray[np.float32]


def draw(values: Mapping[str, Values], path: Path) -> None:
    """Draw histograms of what the scans take as x, and where the segments of each form end."""
    figure = Figure(figsize=(9, 2.6 * len(values)), layout="constrained")
    panes = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    for pane, (name, array) in zip(panes, values.items(), strict=True):
        observer = Observer(exact=True)
        observer.update(array)
        pane.hist(array.reshape(-1), bins=400, color="0.75", log=True)
        pane.set_ylim(bottom=0.5)
        low, high = pane.get_xlim()
        plain = choose_quantization(observer, 8, method="percentile", percentile=99.9)
        forms = (
            ("a8, 99.9 %", plain, "tab:red", 0.92),
            ("a8se, 99.9 %", _percentile(observer), "tab:blue", 0.82),
            ("a8se8", choose_soft_edge(observer, "soft-edge8"), "tab:green", 0.72),
        )
        for label, quantization, color, height in forms:
            for place, coarse in _edges(quantization):
                if not low <= place <= high:
                    continue
                pane.axvline(place, color=color, linewidth=1)
                if coarse:
                    pane.annotate(
                        coarse,
                        (place, height),
                        xycoords=("data", "axes fraction"),
                        color=color,
                        fontsize=7,
                    )
            pane.plot([], [], color=color, label=label)
        pane.set_xlim(low, high)
        pane.set_title(f"{name}: the largest is {np.abs(array).max():.1f}", fontsize=9)
        pane.legend(fontsize=7, loc="center right")
    panes[-1].set_xlabel(
        "what the selective scan takes as x; lines: segments end, steps in figures"
    )
    figure.savefig(path, dpi=110)


def _percentile(observer: Observer) -> TensorQuantization:
    return choose_soft_edge(observer, "soft-edge", method="percentile", percentile=99.9)


def _edges(quantization: TensorQuantization) -> list[tuple[float, str]]:
    """Where segments end, and, left of it, how coarse the step is compared with the finest."""
    if quantization.layout is None:
        return [(place, "") for place in quantization.clip]
    found = []
    for sign, side in ((1, quantization.layout.positive), (-1, quantization.layout.negative)):
        for segment in side:
            place = sign * segment.last * quantization.scale
            found.append((place, f"{1 << segment.shift}x"))
    return found
