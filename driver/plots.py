"""Pictures: pages that show them in any browser and need no network."""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bitwright.vocabulary import LayerCost, Precision

if TYPE_CHECKING:
    from bitwright.costing import Cost
    from bitwright.searching import Sensitivity
    from bitwright.transitions import Transitions

__all__ = ["cost_page", "layer_heat_map", "sensitivity_page", "transitions_page"]

# Colours that people with any colour vision tell apart (Okabe and Ito, 2008).
_COLORS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_WIDE_COLORS: Final = ("#999999", "#000000", *_COLORS)  # greys for what others are compared with
_ROW_HEIGHT: Final = 300  # pixels
_CELL_HEIGHT: Final = 22  # pixels, of a heat map
_LONGEST_NAME: Final = 26  # characters beside a heat map; a hover shows all

Part: TypeAlias = Callable[[LayerCost], float]


@dataclass(frozen=True, slots=True)
class _Chart:
    """Bars for the layers, each stacked from parts."""

    title: str
    unit: str
    parts: Mapping[str, Part]

    def totals(self, layers: Sequence[LayerCost]) -> list[float]:
        return [sum(part(layer) for part in self.parts.values()) for layer in layers]


def _charts(result: Cost) -> list[_Chart]:
    """What the cost model defines."""
    total = result.cost
    charts = []
    if total.cycles is not None:
        parts: dict[str, Part] = {"cycles": lambda cost: cost.cycles or 0}
        if total.stall_cycles is not None:
            parts = {
                "compute": lambda cost: (cost.cycles or 0) - (cost.stall_cycles or 0),
                "stalls": lambda cost: cost.stall_cycles or 0,
            }
        charts.append(_Chart("clock cycles", "cycles", parts))
    elif total.relative_cycles is not None:
        parts = {"multiply-accumulates": lambda cost: cost.relative_cycles or 0}
        charts.append(_Chart("relative cycles", "relative cycles", parts))
    if total.energy_pj is not None:

        def energy(name: str) -> Part:
            return lambda cost: (cost.energy_pj or {}).get(name, 0) / 1e6

        names = [name for name in total.energy_pj if name != "vectors"]
        charts.append(_Chart("energy", "uJ", {n.replace("_", " "): energy(n) for n in names}))
    if total.dram_read_bits is not None:
        parts = {
            "read": lambda cost: (cost.dram_read_bits or 0) / 2**13,
            "written": lambda cost: (cost.dram_write_bits or 0) / 2**13,
        }
        charts.append(_Chart("traffic with external memory", "KiB", parts))
    charts.append(_Chart("weights", "KiB", {"weights": lambda cost: cost.weight_bits / 2**13}))
    return charts


def cost_page(result: Cost) -> str:
    """Make a page with bar charts of what the layers of a model cost."""
    from plotly.graph_objects import Bar, Scatter
    from plotly.subplots import make_subplots

    charts, layers = _charts(result), result.cost.layers
    names = [_text(layer.layer) for layer in layers]
    hover = [f"{_text(layer.layer)}, {layer.precision}" for layer in layers]
    title = f"{Path(result.source).name} on {result.cost.target}"
    said = "<br>".join(map(_text, result.summary()))
    mark = max(4, min(14, 500 // len(names)))  # pixels: no wider than a bar
    figure = make_subplots(
        rows=len(charts),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.25 / len(charts),
        subplot_titles=[chart.title for chart in charts],
    )
    for row, chart in enumerate(charts, start=1):
        number = "" if row == 1 else str(row)
        shared = {"x": names, "legend": f"legend{number}", "hovertext": hover}
        for (key, part), color in zip(chart.parts.items(), itertools.cycle(_COLORS), strict=False):
            name = _text(key)
            shown = f"%{{hovertext}}<br>{name}: %{{y:,.4~g}} {chart.unit}<extra></extra>"
            values = [part(layer) for layer in layers]
            bar = Bar(y=values, name=name, marker_color=color, hovertemplate=shown, **shared)
            figure.add_trace(bar, row=row, col=1)
        if result.baseline is not None:
            marks = Scatter(
                y=chart.totals(result.baseline.layers),
                name=f"all {result.baseline_precision}",
                mode="markers",
                marker={"symbol": "line-ew-open", "size": mark, "color": "#000000"},
                hovertemplate=f"{result.baseline_precision}: %{{y:,.4~g}} {chart.unit}"
                "<extra></extra>",
                **shared,
            )
            figure.add_trace(marks, row=row, col=1)
        figure.update_yaxes(title_text=chart.unit, rangemode="tozero", row=row, col=1)
        top = figure.layout[f"yaxis{number}"].domain[1]
        figure.update_layout({f"legend{number}": {"y": top, "yanchor": "top", "x": 1.01}})
    figure.update_xaxes(type="category", range=[-0.5, len(names) - 0.5])
    figure.update_layout(
        title_text=f"{_text(title)}<br><sup>{said}</sup>",
        barmode="stack",
        template="plotly_white",
        height=_ROW_HEIGHT * len(charts) + 220,
        margin={"t": 180},
    )
    return _page(title, figure)


def sensitivity_page(found: Sensitivity, source: str) -> str:
    """Make a page with a heat map of the error of each layer at each precision.

    Parameters
    ----------
    found
        What was measured.
    source
        The model's file.
    """
    scale, bases = found.scale, {str(precision) for precision in found.base}
    unit = f" {scale.shown_unit}" if scale.shown_unit else ""
    base = min(bases) if len(bases) == 1 else "their widest precision"
    measured = "none" if found.base_error is None else f"{found.base_error:.4g}{unit}"
    title = f"{Path(source).name} on {found.target}: sensitivity"
    said = (
        f"{scale.name} with one layer at a precision and all others at {base} (all: {measured}; "
        f"float model: {found.float_error:.4g}{unit}; {found.samples:,} samples)"
    )
    figure = layer_heat_map(
        {
            name: {str(precision): error for precision, error in row.items()}
            for name, row in found.errors.items()
        },
        name=scale.name,
        unit=scale.shown_unit,
        higher_is_better=scale.maximize,
    )
    figure.update_layout(title_text=f"{_text(title)}<br><sup>{_text(said)}</sup>")
    figure.update_layout(margin_t=120, height=figure.layout.height + 80)
    return _page(title, figure)


def transitions_page(result: Transitions) -> str:
    """Make a page with what toggles on a link: by layer and order, and by wire."""
    from plotly.graph_objects import Bar, Heatmap
    from plotly.subplots import make_subplots

    from bitwright.targets.link import ROW_MAJOR, UNSORTED

    packing = result.link.packing
    orders = {**{o: o for o in (UNSORTED, *result.orders)}, UNSORTED: f"unsorted, {packing}"}
    if packing != ROW_MAJOR:
        orders = {ROW_MAJOR: "unsorted, row-major", **orders}
    names = [_text(_short(layer.layer)) for layer in result.layers]
    per_row = 2
    heat_rows = -(-len(orders) // per_row)
    specs: list[list[Any]] = [[{"colspan": per_row}, None], [{"colspan": per_row}, None]]
    specs += [[{}, {}] for _ in range(heat_rows)]
    lanes = {order: _wires(result, order) for order in orders}
    heat_height = max(_CELL_HEIGHT * len(next(iter(lanes.values()))[0]), 120)
    heights = [_ROW_HEIGHT, _ROW_HEIGHT, *[heat_height] * heat_rows]
    total_height = sum(heights) + 90 * (len(heights) - 1)
    figure = make_subplots(
        rows=2 + heat_rows,
        cols=per_row,
        specs=specs,
        row_heights=heights,
        vertical_spacing=90 / total_height,
        horizontal_spacing=0.12,
        subplot_titles=[
            "transitions a sample",
            "share of the transitions of unsorted, row-major flits",
            *(f"changes a flit of every wire: {_text(label)}" for label in orders.values()),
        ],
    )
    for (order, label), color in zip(orders.items(), itertools.cycle(_WIDE_COLORS), strict=False):
        changes = [layer[order].transitions for layer in result.layers]
        before = [layer[ROW_MAJOR].transitions for layer in result.layers]
        shares = [100 * c / b if b else 0 for c, b in zip(changes, before, strict=True)]
        total, whole = result.total(order).transitions, result.total(ROW_MAJOR).transitions
        shared = {"name": _text(label), "legendgroup": order, "marker_color": color}
        bar = Bar(
            x=names,
            y=[change / result.samples for change in changes],
            hovertemplate="%{x}: %{y:,.4~g} transitions a sample",
            **shared,
        )
        figure.add_trace(bar, row=1, col=1)
        bar = Bar(
            x=[*names, "all layers"],
            y=[*shares, 100 * total / whole if whole else 0],
            hovertemplate="%{x}: %{y:.1f} %",
            showlegend=False,
            **shared,
        )
        figure.add_trace(bar, row=2, col=1)
    figure.update_yaxes(title_text="transitions", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="%", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(type="category", row=1, col=1)
    figure.update_xaxes(type="category", row=2, col=1)
    for number, (rows, cells) in enumerate(lanes.values()):
        heat = Heatmap(
            z=cells,
            x=[f"bit {bit}" for bit in range(len(cells[0]))],
            y=rows,
            coloraxis="coloraxis",
            hovertemplate="%{y}, %{x}: %{z:.3f} changes a flit<extra></extra>",
            xgap=1,
            ygap=1,
        )
        row, col = 3 + number // per_row, 1 + number % per_row
        figure.add_trace(heat, row=row, col=col)
        # Written as numbers are: the highest bit on the left.
        figure.update_xaxes(autorange="reversed", showgrid=False, row=row, col=col)
        figure.update_yaxes(autorange="reversed", showgrid=False, row=row, col=col)
    title = f"{Path(result.source).name}: bit transitions on the link"
    wire = result.link
    said = (
        f"{result.samples:,} samples; {wire.flit} flits of {wire.flit_bits} bits, {packing}, "
        f"windows of {wire.window.value} terms; "
        f"{wire.energy_pj_per_transition.value:g} pJ a transition"
    )
    bottom = heat_rows * (heat_height + 90) - 90
    figure.update_layout(
        title_text=f"{_text(title)}<br><sup>{_text(said)}</sup>",
        barmode="group",
        template="plotly_white",
        height=total_height + 200,
        margin={"t": 120, "b": 80},
        coloraxis={
            "colorscale": "Blues",
            "cmin": 0,
            "colorbar": {
                "title": {"text": "changes a flit", "side": "right"},
                "len": bottom,
                "lenmode": "pixels",
                "y": 0,
                "yanchor": "bottom",
            },
        },
    )
    return _page(title, figure)


def _wires(result: Transitions, order: str) -> tuple[list[str], list[list[float]]]:
    """How often every wire changes a flit: lanes of all parts, by bit, over all layers."""
    rows, cells = [], []
    for part, sent in result.total(order).parts.items():
        for lane, bits in enumerate(sent.transitions.tolist()):
            rows.append(f"{part} {lane}")
            cells.append([change / max(sent.flits, 1) for change in bits])
    return rows, cells


def layer_heat_map(
    rows: Mapping[str, Mapping[str, float | None]],
    *,
    name: str,
    unit: str,
    higher_is_better: bool,
) -> Any:
    """Draw numbers about layers at precisions; dark is bad.

    Parameters
    ----------
    rows
        Layer name to precision to number; None where there is none, which shows as a dash.
    name, unit
        What the numbers are.
    higher_is_better
        Which of them are good.
    """
    from plotly.graph_objects import Figure, Heatmap

    columns = sorted({text for row in rows.values() for text in row}, key=_bits)
    cells, texts, hover = [], [], []
    for layer, row in rows.items():
        cells.append([row.get(column) for column in columns])
        shown = [_number(row[column]) if column in row else "" for column in columns]
        texts.append(shown)
        hover.append(
            [
                f"{_text(layer)}, {column}: {value} {_text(unit)}" if value else ""
                for column, value in zip(columns, shown, strict=True)
            ]
        )
    labels = [_text(_short(layer)) for layer in rows]
    bar = {"title": {"text": _text(f"{name} ({unit})" if unit else name), "side": "right"}}
    # The layers are numbered: names that are equal when shortened, or look like numbers, are no
    # good coordinates.
    heat = Heatmap(
        z=cells,
        x=columns,
        y=list(range(len(labels))),
        text=texts,
        texttemplate="%{text}",
        hovertext=hover,
        hoverinfo="text",
        colorscale="Blues",
        reversescale=higher_is_better,
        xgap=1,
        ygap=1,
        colorbar=bar,
    )
    figure = Figure(heat)
    figure.update_xaxes(type="category", side="top", showgrid=False)
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=labels,
        autorange="reversed",
        automargin=True,
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(
        template="plotly_white",
        height=_CELL_HEIGHT * max(len(labels), 6) + 80,
        margin={"t": 40, "b": 20},
    )
    return figure


def _bits(precision: str) -> tuple[int, int]:
    """From few bits to many."""
    parsed = Precision.parse(precision)
    return parsed.weight_bits + parsed.activation_bits, parsed.weight_bits


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _short(name: str) -> str:
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _text(text: str) -> str:
    """A text that plotly shows as it is: no markup, no field of a template."""
    return html.escape(text, quote=False).replace("%{", "%\u200b{")


def _page(title: str, figure: Any) -> str:
    # Nothing of what may be confidential leaves the page: no button that sends it anywhere.
    config = {"displaylogo": False, "showSendToCloud": False}
    body = figure.to_html(include_plotlyjs=True, full_html=False, config=config)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
