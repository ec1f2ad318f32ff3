"""What the commands print for people; ``--json`` is the form for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitwright import units
from bitwright.artifact import Artifact, HostOperator, LayerEntry, LinkEntry
from bitwright.compilation import Passes
from bitwright.costing import Cost
from bitwright.evaluation import Comparison, Form, SideBySide
from bitwright.inspection import Inspection, shape_option
from bitwright.quant.forms import FormChoices
from bitwright.quant.quantizer import Quantized, TensorSummary
from bitwright.targets import Accelerator, Installed, Link
from bitwright.targets.link import ROW_MAJOR, UNSORTED
from bitwright.targets.orders import Order
from bitwright.targets.schema import entries as numbers
from bitwright.transitions import Sent, Transitions
from bitwright.vocabulary import Dim, Layer, LayerCost, ModelCost

__all__ = [
    "new_console",
    "new_table",
    "print_applied_passes",
    "print_artifact",
    "print_comparison",
    "print_cost",
    "print_forms",
    "print_inspection",
    "print_passes",
    "print_quantized",
    "print_side_by_side",
    "print_target",
    "print_targets",
    "print_transitions",
]


def new_console(width: int | None = None) -> Console:
    """Where tables are printed."""
    # Names of layers may hold what looks like an emoji's name.
    console = Console(highlight=False, emoji=False, width=width)
    if width is None and not console.is_terminal:
        return new_console(width=200)  # a pipe has no width to fit
    return console


def new_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """A table whose columns are aligned to the left, and to the right for numbers."""
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for number, heading in enumerate(left):
        table.add_column(heading, overflow="fold", no_wrap=number == 0)
    for heading in right:  # a number that does not fit goes on in the next line: never cut
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _shape(shape: Sequence[Dim] | None) -> str:
    return "?" if not shape else "x".join(map(str, shape))


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _share(part: int | None, whole: int | None) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.1f} %"


def _bytes(number: int) -> str:
    return f"{number:,} bytes"


def _kind(layer: Layer) -> str:
    if layer.kind == "conv" and layer.groups > 1:
        return "depthwise conv" if layer.groups == layer.in_channels else f"conv/{layer.groups}"
    return layer.kind


def print_inspection(result: Inspection) -> None:
    """Print layers and the reasons why the other operators are none."""
    console = new_console()
    quantized = bool(result.precisions)
    table = new_table(
        f"{Path(result.source).name}: {len(result.layers)} layers",
        ["layer", "kind", "input", "weights", "output"],
        [*(["precision"] if quantized else []), "MACs", "share", "weights", "share"],
    )
    for layer in result.layers:
        precision = result.precisions.get(layer.name)
        table.add_row(
            escape(layer.name),
            _kind(layer),
            _shape(layer.input_shape),
            _shape(layer.weight_shape),
            _shape(layer.output_shape),
            *([str(precision or "float")] if quantized else []),
            _count(layer.macs),
            _share(layer.macs, result.macs),
            _count(layer.weight_count),
            _share(layer.weight_count, result.weight_count),
        )
    table.add_section()
    table.add_row(
        "total",
        *[""] * (5 if quantized else 4),
        _count(result.macs),
        "",
        _count(result.weight_count),
        "",
    )
    console.print(table)
    if result.assumed:
        console.print(f"MACs of one sample: {escape(', '.join(result.assumed))}")
    if result.macs is None:
        console.print(
            f"'-' depends on a size that is not fixed; fix it with "
            f"{escape(shape_option(result.inputs))}"
        )
    groups: dict[tuple[str, str], list[str]] = {}
    for other in result.others:
        groups.setdefault((other.reason, other.operator), []).append(other.name)
    if groups:
        rest = new_table("not layers", ["operator", "why"], ["count"])
        rest.add_column("for example", overflow="fold")
        for (reason, operator), names in sorted(groups.items(), key=lambda item: item[0]):
            rest.add_row(escape(operator), escape(reason), str(len(names)), escape(names[0]))
        console.print(rest)
    for note in result.notes:
        console.print(f"note: {escape(note)}")


def _range(entry: TensorSummary) -> str:
    return f"{entry.minimum:.4g} .. {entry.maximum:.4g}"


def _kept(entry: TensorSummary) -> str:
    low, high = entry.quantization.clip
    low = max(low, min(entry.minimum, 0.0))
    return f"{low:.4g} .. {high:.4g}"


def print_quantized(result: Quantized, model: Path, output: Path) -> None:
    """Print ranges, clips, noise and sizes of every layer of a freshly quantized model."""
    console = new_console()
    table = new_table(
        f"{model.name} quantized: {output}",
        ["layer", "precision", "input", "range", "kept"],
        ["input SQNR", "weight SQNR", "weights kept", "bias", "weight bytes"],
    )
    for layer in result.layers:
        table.add_row(
            escape(layer.name),
            str(layer.precision),
            str(layer.activation.quantization),
            _range(layer.activation),
            _kept(layer.activation),
            f"{layer.activation.sqnr_db:.1f} dB",
            f"{layer.weight_sqnr_db:.1f} dB",
            f"{100 * layer.weight_clip:.0f} %",
            layer.bias or "-",
            f"{layer.weight_bytes:,}",
        )
    console.print(table)
    if result.elementwise:
        worst = min(result.elementwise, key=lambda entry: entry.sqnr_db)
        widths = sorted({entry.quantization.bits for entry in result.elementwise})
        console.print(
            f"{len(result.elementwise)} activations between operators without weights, "
            f"{' and '.join(map(str, widths))} bit; the worst, {escape(worst.name)}, has "
            f"{worst.sqnr_db:.1f} dB"
        )
    if result.scan_inputs:
        worst = min(result.scan_inputs, key=lambda entry: entry.sqnr_db)
        kinds = sorted({str(entry.quantization) for entry in result.scan_inputs})
        console.print(
            f"{len(result.scan_inputs)} inputs of selective scans, {' and '.join(kinds)}; the "
            f"worst, {escape(worst.name)}, has {worst.sqnr_db:.1f} dB"
        )
    if result.float_operators:
        shown = ", ".join(f"{name} ({operator})" for name, operator in result.float_operators[:10])
        more = len(result.float_operators) - 10
        console.print(f"stay float: {escape(shown)}" + (f" and {more} more" if more > 0 else ""))
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    before, after = model.stat().st_size, output.stat().st_size
    console.print(
        f"weights {_bytes(result.float_weight_bytes)} -> {_bytes(result.weight_bytes)} "
        f"({result.float_weight_bytes / max(result.weight_bytes, 1):.2f}x smaller); "
        f"file {_bytes(before)} -> {_bytes(after)}"
    )


def print_forms(result: FormChoices) -> None:
    """Print form and range of every tensor, and how all together compare with one for all."""
    console = new_console()
    table = new_table(
        "Forms of activations", ["tensor", "read by", "form"], ["percentile", "alone", "worst"]
    )
    for entry in result.tensors:
        chosen, share, alone = "float", "-", max(entry.alone_db.values())  # another one is coded
        if entry.form is not None and entry.percentile is not None:
            chosen, share = str(entry.form), f"{entry.percentile:g} %"
            alone = entry.alone_db[entry.form, entry.percentile]
        table.add_row(
            escape(entry.name),
            escape(", ".join(entry.readers)),
            chosen,
            share,
            f"{alone:.1f} dB",
            f"{min(entry.alone_db.values()):.1f} dB",
        )
    console.print(table)
    (form, percent), best = max(result.uniform_db.items(), key=lambda item: item[1])
    console.print(
        f"at the outputs {result.sqnr_db:.1f} dB over {result.samples} samples, weights float; the "
        f"best of one for all, {form} at {percent:g} %, has {best:.1f} dB"
    )


def print_comparison(result: Comparison) -> None:
    """Print how many codes agree in every region."""
    console = new_console()
    table = new_table(
        f"{Path(result.source).name}: integer reference against onnxruntime, "
        f"{result.samples} samples",
        ["region", "kind"],
        ["bits", "accumulator", "codes", "equal", "largest difference", "equal end to end"],
    )
    for region in result.regions:
        table.add_row(
            escape(region.name),
            region.kind,
            str(region.operand_bits),
            f"int{region.accumulator_bits}" if region.accumulator_bits else "-",
            f"{region.codes:,}",
            f"{100 * region.equal_share:.4f} %",
            str(region.largest_difference),
            f"{100 * (1 - region.differing_end_to_end / max(region.codes, 1)):.4f} %",
        )
    console.print(table)
    console.print(
        f"equal on equal input codes: {100 * result.equal_share:.4f} %; "
        f"end to end: {100 * result.equal_share_end_to_end:.4f} %"
    )


_FORMS: Final[Mapping[Form, str]] = {
    "float": "float ONNX, onnxruntime",
    "qdq": "QDQ ONNX, onnxruntime",
    "reference": "QDQ ONNX, integer reference",
    "artifact": "artefact",
}


def _layer_table(layers: Iterable[LayerEntry], title: str) -> Table:
    table = new_table(
        title,
        ["layer", "operator", "precision", "kernel"],
        ["accumulator", "weights", "bytes", "bytes fp32"],
    )
    for layer in layers:
        table.add_row(
            escape(layer.name),
            escape(layer.operator),
            layer.precision,
            "bitwright" if layer.kernel else "TVM",
            f"int{layer.accumulator_bits}",
            _count(layer.weight_count or None),  # none where both operands are computed
            _count(layer.weight_bytes or None),
            _count(layer.float_weight_bytes or None),
        )
    return table


def _print_host_operators(console: Console, operators: Sequence[HostOperator]) -> None:
    if operators:
        table = new_table("stay float, on the host", ["operator", "name", "why"], [])
        for entry in operators:
            table.add_row(escape(entry.operator), escape(entry.name), escape(entry.reason))
        console.print(table)


def print_artifact(artifact: Artifact) -> None:
    """Print the layers of an artefact, what stays float, and sizes."""
    console = new_console()
    manifest = artifact.manifest
    title = f"{Path(manifest.model.source).name} compiled for {manifest.target}: {artifact.folder}"
    console.print(_layer_table(manifest.layers, title))
    _print_host_operators(console, manifest.host_operators)
    if any(not layer.kernel for layer in manifest.layers):
        console.print(
            "note: TVM's own, slow code computes the layers without a kernel of bitwright"
        )
        if any(isinstance(dim, str) for entry in manifest.inputs for dim in entry.shape or ()):
            console.print("      if the sizes of images are symbolic: --input-shape fixes them")
    console.print(
        f"weights {_bytes(manifest.float_weight_bytes)} -> {_bytes(manifest.weight_bytes)} "
        f"({manifest.float_weight_bytes / max(manifest.weight_bytes, 1):.2f}x smaller); tables "
        f"{_bytes(sum(e.bytes for e in manifest.parameters if '.table' in e.name))}"
    )
    sizes = (f"{name} {_bytes(entry.bytes)}" for name, entry in manifest.files.items())
    console.print(", ".join(sizes))
    console.print(f"run it: bitwright run {escape(str(artifact.folder))} --data FILE.npz")


def print_side_by_side(result: SideBySide) -> None:
    """Print what every form of a model reaches, and how equal the outputs are."""
    console = new_console()
    error = result.unit == "fraction" and result.higher_is_better
    table = new_table(
        f"{Path(result.source).name}: {result.samples} samples",
        ["form"],
        [result.metric, *(["error"] if error else []), "seconds", "ms a sample", "equal", "close"],
    )
    for entry in result.forms:
        table.add_row(
            _FORMS[entry.form],
            _measured(entry.value, result.unit),
            *([_measured(1 - entry.value, result.unit)] if error else []),
            f"{entry.seconds:.3f}",
            f"{1000 * entry.seconds / result.samples:.3f}",
            f"{100 * entry.equal_share:.4f} %",
            f"{100 * entry.close_share:.4f} %",
        )
    console.print(table)
    console.print(
        "equal: share of output values that the artefact has to the last bit; close: up to the "
        "rounding of float32 (1e-4)"
    )
    if result.equal_codes_share is not None:
        console.print(
            f"codes inside the model: {100 * result.equal_codes_share:.4f} % of those of QDQ in "
            f"onnxruntime are the integers' ({result.compared_samples} samples)"
        )
    for note in result.notes:
        console.print(f"note: {escape(note)}")


def print_transitions(result: Transitions) -> None:
    """Print what toggled on the link: layers and parts, unsorted and in each order."""
    console = new_console()
    packing = result.link.packing
    # What orders are compared with: twice the same where the link packs that way itself.
    baselines = {ROW_MAJOR: ROW_MAJOR, UNSORTED: packing}
    if packing == ROW_MAJOR:
        del baselines[ROW_MAJOR]
    shares = [f"saved against {name}" for name in baselines.values()]
    for order in result.orders or (UNSORTED,):
        table = new_table(
            f"{Path(result.source).name}: transitions of {result.samples} samples, {order}",
            ["layer", "part"],
            ["flits", *baselines.values(), "ordered", *shares, "energy"],
        )
        for layer in result.layers:
            sent = [*(layer[baseline] for baseline in baselines), layer[order]]
            _add_sent(table, layer.layer, result, sent)
            table.add_section()
        totals = [*(result.total(baseline) for baseline in baselines), result.total(order)]
        _add_sent(table, "total", result, totals)
        console.print(table)
    unsorted = result.total(UNSORTED)
    table = new_table(
        f"all layers, {units.number(result.link.energy_pj_per_transition.value)} pJ a transition",
        ["order"],
        ["transitions", *shares, "energy", "words sorted", "unit", "break-even", "net saved"],
    )
    for order in dict.fromkeys([*baselines, *result.orders]):
        total = result.total(order)
        even = result.break_even_pj_per_word(total, unsorted)
        unit, net = result.unit_energy_pj(total), result.net_saved_pj(total, unsorted)
        table.add_row(
            escape({**baselines, UNSORTED: f"none, {packing}"}.get(order, order)),
            f"{total.transitions:,}",
            *(units.percent(result.saved(total, result.total(name))) for name in baselines),
            units.energy(result.energy_pj(total)),
            f"{total.words_sorted:,}" if total.needs_unit else "-",
            units.energy(unit) if total.needs_unit else "-",
            "-" if even is None else f"{even:.3g} pJ/word",
            "-" if net is None or order in baselines else _signed_energy(net),
        )
    console.print(table)
    early = [
        order
        for order in result.orders
        if Order.parse(order).orders_weights and not result.total(order).needs_unit
    ]
    if early:
        console.print("known at compile time, without a unit: " + escape(", ".join(early)))
    if "nearest" in result.orders:
        console.print("nearest is a bound: no unit finds it")
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    for entry in result.layers:
        if entry.reason:
            console.print(f"{escape(entry.layer)}: {escape(entry.reason)}")
    for name, reason in result.skipped.items():
        console.print(f"not counted: {escape(name)}: {escape(reason)}")


def _signed_energy(pj: float) -> str:
    return ("-" if pj < 0 else "") + units.energy(abs(pj))


def _add_sent(table: Table, name: str, result: Transitions, sent: Sequence[Sent]) -> None:
    """One row for each part of the traffic, and one for all; ``sent`` ends with the order."""
    energy = result.link.energy_pj_per_transition.value
    ordered = sent[-1]
    rows: list[tuple[str, int, list[int]]] = [
        (
            part,
            ordered.parts[part].flits,
            [entry.parts[part].total if part in entry.parts else 0 for entry in sent],
        )
        for part in ordered.parts
    ]
    flits = sum(part.flits for part in ordered.parts.values())
    rows.append(("all", flits, [entry.transitions for entry in sent]))
    for part, count, changes in rows:
        table.add_row(
            escape(name) if part == "inputs" else "",
            part,
            f"{count:,}",
            *(f"{change:,}" for change in changes),
            *(units.percent(before - changes[-1], before) for before in changes[:-1]),
            units.energy(changes[-1] * energy),
        )


def _measured(value: float, unit: str) -> str:
    return f"{100 * value:.2f} %" if unit == "fraction" else f"{value:.6g} {unit}".rstrip()


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "-"


def print_passes(result: Passes) -> None:
    """Print the passes that are installed, and their options."""
    console = new_console()
    for entry in result.available:
        console.print(f"[bold]{escape(entry.name)}[/bold]  {escape(_plain(entry.summary))}")
        for heading, text in (("requires", entry.requires), ("ensures", entry.ensures)):
            console.print(escape(f"{heading}: {_plain(text)}"), style="dim")
    options = new_table("options", ["pass", "option", "type", "default", "what it does"], [])
    for entry in result.available:
        for option in entry.options:
            shown = (entry.name, option.name, option.type, option.default, option.help)
            options.add_row(*(escape(_plain(str(text))) for text in shown))
    if options.row_count:
        console.print(options)


def _plain(text: str) -> str:
    """Prose of a docstring without its markup."""
    return text.replace("``", "")


def print_applied_passes(result: Passes, artifact: Path) -> None:
    """Print which passes made an artefact, and what they did to its model."""
    console = new_console()
    counts = ["quantizers", "float operators", "integer operators", "layers", "parameters"]
    table = new_table(
        f"{artifact.name}: what there was after each pass", ["pass", "options"], counts
    )
    for entry in result.applied:
        table.add_row(
            escape(entry.name),
            escape(_options(entry.options)),
            *(str(getattr(entry, heading.replace(" ", "_"))) for heading in counts),
        )
    console.print(table)
    for entry in result.applied:
        if entry.weight_transitions:
            console.print(_weight_transitions(entry.weight_transitions))
    console.print(_layer_table(result.layers, "integer layers"))
    _print_host_operators(console, result.host_operators)
    if result.link is not None:
        _print_orders(console, result.link)


def _print_orders(console: Console, link: LinkEntry) -> None:
    """Print in which order layers send their terms, who makes it, and why."""
    table = new_table("sent over the link", ["layer", "order", "made by", "why"], ["terms"])
    for entry in link.layers:
        unit = f"sorting unit, of {' and '.join(entry.sorted_by_unit)}"
        table.add_row(
            escape(entry.name),
            escape(entry.order),
            unit if entry.sorted_by_unit else "-" if entry.order == UNSORTED else "compiler",
            escape(entry.reason) or ("-" if entry.order == UNSORTED else "asked for"),
            str(entry.terms),
        )
    console.print(table)
    for name, reason in link.skipped.items():
        console.print(f"not sent: {escape(name)}: {escape(reason)}")


def _weight_transitions(layers: Mapping[str, tuple[int, int]]) -> Table:
    table = new_table(
        "transitions of weights for one sample, unsorted", ["layer"], ["before", "after", "saved"]
    )
    totals = [sum(counts) for counts in zip(*layers.values(), strict=True)]
    for name, (before, after) in [*layers.items(), ("total", totals)]:
        saved = units.percent(before - after, before)
        table.add_row(escape(name), f"{before:,}", f"{after:,}", saved)
    return table


def _memory(accelerator: Accelerator) -> str:
    memory = accelerator.weight_memory_bytes
    return "-" if memory is None else f"{memory.value / 2**20:g} MiB"


def _widths(accelerator: Accelerator) -> str:
    """Precisions of a layer, in short."""
    precisions = accelerator.precisions
    if precisions.tied:
        return str(precisions)
    forms = [str(form)[1:] for form in precisions.soft_edge]  # 8se8
    weights, activations = (
        "/".join(map(str, entries))
        for entries in (precisions.weight_bits, [*precisions.activation_bits, *forms])
    )
    return f"w{weights} a{activations}"


def print_targets(found: Installed) -> None:
    """Print the accelerators and what they can do."""
    console = new_console()
    table = new_table(
        "targets",
        ["target", "what it is", "precisions", "cost model"],
        ["weight memory", "clock", "source"],
    )
    sources: dict[str, int] = {}  # each reference once, below the table
    for entry in found.accelerators.values():
        text = entry.sources[entry.precisions.source].text
        clock = entry.frequency_mhz
        table.add_row(
            escape(entry.name),
            escape(entry.summary),
            escape(_widths(entry)),
            escape("-" if entry.cost_model is None else entry.cost_model.model),
            _memory(entry),
            "-" if clock is None else f"{clock:g} MHz",
            escape(f"[{sources.setdefault(text, len(sources) + 1)}]"),
        )
    console.print(table)
    for text, number in sources.items():
        console.print(escape(f"[{number}] {text}"))


def _link(link: Link | None) -> str:
    """What a link does that is no number."""
    if link is None:
        return "none"
    shared = "inputs and weights share flits"
    if link.flit == "separate":
        shared = "flits of inputs, flits of weights"
        shared += ", what was just sent is kept" if link.reuse else ""
    loops = ", ".join(link.loops)
    return (
        f"{shared}; {link.packing}; windows by {loops}; order {link.order} (as in: {link.source})"
    )


def print_target(accelerator: Accelerator) -> None:
    """Print the description of an accelerator: every number, its unit and where it comes from."""
    console = new_console()
    console.print(f"[bold]{escape(accelerator.name)}[/bold]  {escape(accelerator.summary)}")
    console.print(f"precisions of a layer: {escape(str(accelerator.precisions))}")
    console.print(escape(f"  as in: {accelerator.precisions.source}"))
    console.print(f"kinds of layers: {', '.join(accelerator.layer_kinds)}")
    tag = accelerator.tag
    console.print(escape(f"TVM target: {tag.kind}, keys {', '.join(tag.keys)}"))
    model = accelerator.cost_model
    console.print(escape(f"cost model: {'none' if model is None else model.model}"))
    console.print(escape(f"link: {_link(accelerator.link)}"))
    table = new_table("numbers", ["field", "unit", "basis", "source"], ["value"])
    for entry in numbers(accelerator):
        basis = accelerator.sources[entry.source].basis
        value = escape(units.plain(entry.value))
        table.add_row(escape(entry.field), entry.unit, basis, escape(entry.source), value)
    if table.row_count:
        console.print(table)
    for key, source in accelerator.sources.items():
        console.print(escape(f"{key} ({source.basis}): {source.text}"))


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table whose least important columns give way to a narrow terminal."""

    heading: str
    cells: list[str]
    keep: int  # the higher, the longer it stays

    @property
    def width(self) -> int:
        return max(map(cell_len, [self.heading, *self.cells]))


_UNLIMITED: Final = 10**6  # characters


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    """Columns that say something and fit a width side by side, in their order."""
    shown = [column for column in columns if set(column.cells) - {"-", ""}]
    while len(shown) > 1 and sum(column.width + 3 for column in shown) + 1 > width:
        shown.remove(min(shown, key=lambda column: column.keep))
    return shown


def _shortened(name: str, width: int) -> str:
    """A name with its middle left out where it is wider than that."""
    if cell_len(name) <= width:
        return name
    ends = len(name) // 2
    while cell_len(name[:ends] + name[-ends:]) > width - 3 and ends > 1:
        ends -= 1
    return f"{name[:ends]}...{name[-ends:]}"


_NAME_WIDTHS: Final = (36, 24, 16)  # of a layer's name in a table, the narrower the less room


def _cost_columns(result: Cost, name_width: int) -> list[_Column]:
    """A cell a layer and one for the total."""
    total = result.cost
    costs: list[LayerCost | ModelCost] = [*total.layers, total]
    quantity = "cycles" if total.cycles is not None else "relative_cycles"
    whole = getattr(total, quantity)
    speedups = [*result.layer_speedups, result.speedup]
    share = total.memory_bound_share
    memory_bound = "-" if share is None else f"{100 * share:.0f} % memory"

    names = [_shortened(cost.layer, name_width) for cost in total.layers]
    return [
        _Column("layer", [*names, "total"], 99),
        _Column("kind", [*map(_kind, result.layers), ""], 20),
        _Column("precision", [*(str(cost.precision) for cost in total.layers), ""], 90),
        _Column("MACs", [units.number(cost.macs) for cost in costs], 10),
        # Ratios stand under a name of their own, so that nobody takes them for cycles.
        _Column(
            quantity.replace("_", " "),
            [units.number(getattr(cost, quantity)) for cost in costs],
            95,
        ),
        _Column("share", [units.percent(getattr(cost, quantity), whole) for cost in costs], 80),
        _Column("speedup", [units.ratio(speedup) for speedup in speedups], 75),
        _Column("utilization", [units.percent(cost.utilization) for cost in costs], 50),
        _Column("stalls", [units.percent(cost.stall_cycles, cost.cycles) for cost in costs], 60),
        _Column("DRAM read", [units.data(cost.dram_read_bits) for cost in costs], 30),
        _Column("DRAM write", [units.data(cost.dram_write_bits) for cost in costs], 25),
        _Column("energy", [units.energy(cost.total_energy_pj) for cost in costs], 70),
        _Column(
            "weights",
            [
                *(units.data(cost.weight_bits) for cost in total.layers),
                units.data(total.memory_bits),
            ],
            40,
        ),
        _Column("bound", [*(cost.bound or "-" for cost in total.layers), memory_bound], 55),
    ]


def print_cost(result: Cost) -> None:
    """Print what every layer of a model costs on an accelerator, and all of them together."""
    console = new_console()
    total = result.cost
    columns = _fitting(_cost_columns(result, _NAME_WIDTHS[0]), _UNLIMITED)
    if not console.is_terminal:  # nothing is left out in a pipe
        console = new_console(width=max(200, sum(column.width + 3 for column in columns) + 1))
    shown = columns
    for name_width in _NAME_WIDTHS:  # a shorter name rather than a column less
        shown = _fitting(_cost_columns(result, name_width), console.width)
        if len(shown) == len(columns):
            break
    table = new_table(f"{Path(result.source).name} on {total.target}", [], [])
    for column in shown:
        left = column.heading in ("layer", "kind", "precision")
        table.add_column(column.heading, justify="left" if left else "right", no_wrap=True)
    *rows, last = zip(*(column.cells for column in shown), strict=True)
    for row in rows:
        table.add_row(*map(escape, row))
    table.add_section()
    table.add_row(*map(escape, last))
    console.print(table)
    headings = [column.heading for column in shown]
    if left_out := [column.heading for column in columns if column.heading not in headings]:
        console.print(f"for a wider terminal or --json: {', '.join(left_out)}")
    for line in result.summary():
        console.print(escape(line))
    if total.cycles is None and total.relative_cycles is not None:
        console.print(
            "relative cycles: multiply-accumulates over the relative speed of a precision"
        )
    if result.not_counted:
        some = list(result.not_counted.items())[:6]
        texts = (f"{count} {escape(operator)}" for operator, count in some)
        more = sum(result.not_counted.values()) - sum(count for _, count in some)
        rest = f" and {more} more" if more else ""
        console.print(f"not counted, as they are no layers: {', '.join(texts)}{rest}")
    if result.float_layers:
        names = ", ".join(result.float_layers[:10])
        console.print(f"not counted, without a precision: {escape(names)}")
