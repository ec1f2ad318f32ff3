"""``bitwright link``: what toggles on a link while a model runs on real data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from bitwright import targets
from bitwright.artifact import QDQ_MODEL, read_manifest
from bitwright.compilation import refuse_options
from bitwright.errors import ArtifactError, ModelError, UsageError
from bitwright.files import check_writable, write_atomically
from bitwright.planning import plan_for, resolve_plan
from bitwright.quant.float_ops import Array
from bitwright.quant.graph import all_nodes, attribute
from bitwright.quant.layers import layer_nodes
from bitwright.quant.load import Model, load
from bitwright.quant.observers import ClipMethod
from bitwright.quant.quantizer import quantize_model
from bitwright.quant.recipes import RecipeName
from bitwright.quant.reference import Operand, Operands, Reference, padding_of
from bitwright.quant.requantization import RequantizationForm
from bitwright.quant.samples import ProgressCallback, Samples
from bitwright.targets.link import MOST_LANES, ROW_MAJOR, UNSORTED, Link, Part, Traffic
from bitwright.targets.orders import Order, key_count
from bitwright.targets.places import constant_places
from bitwright.targets.schema import Number
from bitwright.transitions import LayerTransitions, PartTransitions, Sent, Transitions
from bitwright.vocabulary import Precision, PrecisionPlan

if TYPE_CHECKING:
    from bitwright.passes.popcount_reorder import Measured

__all__ = ["LayerStream", "check_stream", "link", "measure", "sized", "streams"]

DEFAULT_LINK: Final = "ordering-simulator"

Histogram = npt.NDArray[np.int64]
_GATHERED: Final = 64  # runs that are counted at once, which spares calls
_GATHERED_BYTES: Final = 2**20
_PARTS: Final[tuple[Literal["inputs", "weights"], ...]] = ("inputs", "weights")


@dataclass(frozen=True, slots=True)
class LayerStream:
    """What a layer sends in one run.

    Attributes
    ----------
    traffic
        Its windows.
    inputs
        Codes of the padded inputs; shape (samples, words), of the type that holds them.
    weights
        Codes of the weights; shape (channels, terms). Where they are computed, of one sample.
    inputs_bits, weights_bits
        Width of the codes.
    constant
        Whether the weights are constants of the model.
    """

    traffic: Traffic
    inputs: npt.NDArray[Any]
    weights: npt.NDArray[Any]
    inputs_bits: int
    weights_bits: int
    constant: bool


def streams(
    model: Model, take: Callable[[LayerStream], None], requantization: RequantizationForm = "float"
) -> Reference:
    """An integer reference that tells what its layers send.

    Parameters
    ----------
    model
        A quantized model.
    take
        Called for every layer of a run, in order of execution; in loops once a step, and once a
        sample where both operands are activations.
    requantization
        As in :class:`~bitwright.quant.reference.Reference`.
    """
    known: dict[Any, tuple[tuple[int, ...], LayerStream]] = {}  # of constant weights, by node

    def observe(operands: Operands) -> None:
        if not operands.stored:
            for stream in _activations(operands):
                take(stream)
            return
        node, shape = operands.node, (operands.batch, *operands.data.codes.shape)
        seen = known.get(node)
        if seen is None or seen[0] != shape:
            stream = _stream(operands)
            known[node] = shape, stream
        else:
            stream = replace(seen[1], inputs=_inputs(operands, seen[1].traffic))
        take(stream)

    return Reference(model, requantization, observe=observe)


def _stream(operands: Operands) -> LayerStream:
    convolution = operands.node.op_type == "Conv"
    traffic, weights = (_convolution if convolution else _product)(operands)
    return LayerStream(
        traffic,
        _inputs(operands, traffic),
        np.ascontiguousarray(_typed(weights, operands.weights)),
        operands.data.bits,
        operands.weights.bits,
        constant=True,
    )


def _samples(batch: int, leading: int) -> int:
    """How many samples the first axis of an operand holds; what else it counts are positions.

    One if the batch is not in it: ``main_link`` then sends it at once, too.
    """
    return 1 if leading % batch else batch


def _typed(codes: npt.NDArray[np.int64], operand: Operand) -> npt.NDArray[Any]:
    """Codes in the smallest type of whole bytes that holds them."""
    return codes.astype(f"{'int' if operand.signed else 'uint'}{8 if operand.bits <= 8 else 16}")


def _inputs(operands: Operands, traffic: Traffic) -> npt.NDArray[Any]:
    codes = _typed(operands.data.codes, operands.data)
    if operands.node.op_type != "Conv":
        codes = _rows(operands.node, codes, left=not operands.weights_left)
    codes = codes.reshape(-1, *traffic.shape)
    zero = int(operands.data.zero_point.item())
    padded = np.pad(codes, ((0, 0), *traffic.pads), constant_values=zero)
    return padded.reshape(len(codes), -1)


def _convolution(operands: Operands) -> tuple[Traffic, npt.NDArray[np.int64]]:
    """A convolution; the images of a sample are positions behind each other."""
    node, weights = operands.node, operands.weights.codes
    images, channels, *size = operands.data.codes.shape
    kernel = weights.shape[2:]
    padding, strides, dilations = padding_of(node, size, kernel)
    traffic = Traffic.convolution(
        str(node.name),
        in_channels=channels,
        size=size,
        out_channels=weights.shape[0],
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=[*(before for before, _ in padding), *(behind for _, behind in padding)],
        groups=attribute(node, "group", 1),
    )
    each = images // _samples(operands.batch, images)
    if each > 1:
        sizes = zip(traffic.shape, traffic.pads, strict=True)
        words = math.prod(n + before + behind for n, (before, behind) in sizes)
        starts = np.arange(each, dtype=np.int32) * np.int32(words)
        traffic = replace(
            traffic,
            bases=(starts[:, None] + traffic.bases).ravel(),
            shape=(each, *traffic.shape),
            pads=((0, 0), *traffic.pads),
        )
    return traffic, weights.reshape(weights.shape[0], -1)


def _product(operands: Operands) -> tuple[Traffic, npt.NDArray[np.int64]]:
    """A product with constant weights: rows of the data with rows of the weights, terms last.

    Products of stacks of matrices are groups, each with channels of its own.
    """
    node, left = operands.node, operands.weights_left
    shape = _rows(node, operands.data.codes, left=not left).shape
    weights = _rows(node, operands.weights.codes, left=left)
    samples = _samples(operands.batch, shape[0])
    single = weights.size == weights.shape[-1] * weights.shape[-2]  # for all of a stack
    if not single and weights.ndim >= len(shape) and len(weights) > 1:
        samples = 1  # each has weights of its own
    places = np.arange(math.prod(shape) // samples, dtype=np.int32)
    data: npt.NDArray[Any] = places.reshape(shape[0] // samples, *shape[1:])
    if single:
        data, weights = data.reshape(1, -1, shape[-1]), weights.reshape(1, *weights.shape[-2:])
    data, weights = _stacks(data, weights)
    return _stacked(str(node.name), data, len(weights[0])), weights.reshape(-1, weights.shape[-1])


def _activations(operands: Operands) -> Iterator[LayerStream]:
    """What a product of two activations sends, sample by sample: each has weights of its own."""
    node, left = operands.node, operands.weights_left
    data, weights = (
        _rows(node, _typed(operand.codes, operand), left=side)
        for operand, side in ((operands.data, not left), (operands.weights, left))
    )
    stack = np.broadcast_shapes(data.shape[:-2], weights.shape[:-2])
    samples = _samples(operands.batch, stack[0]) if stack else 1
    data, weights = (
        entry.reshape(samples, -1, *entry.shape[1:]) for entry in _stacks(data, weights)
    )
    places = np.arange(data[0].size, dtype=np.int32).reshape(data.shape[1:])
    traffic = _stacked(str(node.name), places, weights.shape[2])
    for inputs, own in zip(data, weights, strict=True):
        yield LayerStream(
            traffic,
            inputs.reshape(1, -1),
            np.ascontiguousarray(own.reshape(-1, own.shape[-1])),
            operands.data.bits,
            operands.weights.bits,
            constant=False,
        )


def _stacks(*operands: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Stacks of matrices, each of which has its partner; shape (matrices, rows, terms)."""
    stack = np.broadcast_shapes(*(entry.shape[:-2] for entry in operands))
    return [
        np.broadcast_to(entry, (*stack, *entry.shape[-2:])).reshape(-1, *entry.shape[-2:])
        for entry in operands
    ]


def _stacked(layer: str, places: npt.NDArray[np.int32], columns: int) -> Traffic:
    """Traffic of products, by the places of their data [products, rows, terms]."""
    size = int(places.max()) + 1
    return Traffic(
        layer,
        len(places) * columns,
        np.ascontiguousarray(places[0, :, 0]),
        np.ascontiguousarray(places[:, 0, :] - places[0, 0, 0]),
        (size,),
        ((0, 0),),
    )


def _rows(node: Any, array: npt.NDArray[Any], *, left: bool) -> npt.NDArray[Any]:
    """An operand of a matrix product with its terms along the last axis."""
    if array.ndim == 1:
        return array[None]
    transposed = node.op_type == "Gemm" and attribute(node, "transA" if left else "transB", 0)
    return array if left != bool(transposed) else array.swapaxes(-1, -2)


# -- counting ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sort:
    """How an order sorts the windows of a layer: tables, and the places of its weights."""

    tables: Mapping[Part, npt.NDArray[np.uint16]]
    places: npt.NDArray[np.uint8] | None


class _Counter:
    """Counts what layers send in several orders.

    Parameters
    ----------
    link, orders
        How they send.
    histograms
        How often words are sent, by layer and part, for orders that depend on it; those of constant
        weights are known.
    """

    def __init__(
        self,
        link: Link,
        orders: Sequence[Order],
        histograms: Mapping[str, Mapping[Part, Histogram]],
    ) -> None:
        self._link = link
        self._row_major = link.model_copy(update={"packing": "row-major"})
        self._orders = orders
        self._histograms = histograms
        self._sorts: dict[tuple[str, Order], _Sort] = {}
        self._refused: dict[str, dict[str, UsageError]] = {}
        self._pending: dict[str, list[LayerStream]] = {}
        self._layers: dict[str, LayerTransitions] = {}

    def take(self, stream: LayerStream) -> None:
        """Take a run of a layer, which is counted together with the next ones."""
        name = stream.traffic.layer
        if name not in self._refused:
            check_stream(stream, self._link)
            self._refused[name] = dict(self._refusals(stream))
            self._pending[name] = []
        pending = self._pending[name]
        if pending and not (stream.constant and pending[0].traffic is stream.traffic):
            self._count(name)
        pending.append(stream)
        if len(pending) * stream.inputs.nbytes >= _GATHERED_BYTES or len(pending) == _GATHERED:
            self._count(name)

    def finish(self) -> tuple[LayerTransitions, ...]:
        """Count what has been taken; the layers in order of execution."""
        for name in self._pending:
            self._count(name)
        return tuple(self._layers[name] for name in self._pending)

    def check(self) -> None:
        """Refuse orders that no layer can have."""
        for order in map(str, self._orders):
            errors = [refused.get(order) for refused in self._refused.values()]
            if errors and None not in errors:
                assert errors[0] is not None
                raise UsageError(errors[0].what, where=f"order {order}", fix=errors[0].fix)

    def _count(self, name: str) -> None:
        pending = self._pending[name]
        if not pending:
            return
        inputs = [stream.inputs for stream in pending]
        stream = replace(pending[0], inputs=inputs[0] if len(inputs) == 1 else np.vstack(inputs))
        pending.clear()
        unsorted = self._send(stream, self._link, Order())
        sent = {UNSORTED: unsorted, ROW_MAJOR: unsorted}
        if self._link.packing != "row-major":
            sent[ROW_MAJOR] = self._send(stream, self._row_major, Order())
        for order in self._orders:
            if str(order) not in sent and str(order) not in self._refused[name]:
                sent[str(order)] = self._send(stream, self._link, order)
        reason = "; ".join(
            f"{order} is not available: {error.what}"
            for order, error in self._refused[name].items()
        )
        found = LayerTransitions(name, sent, reason)
        self._layers[name] = self._layers[name] + found if name in self._layers else found

    def _refusals(self, stream: LayerStream) -> Iterator[tuple[str, UsageError]]:
        for order in self._orders:
            try:
                stream.traffic.check(self._link, order)
                if order.key == "chain" and not stream.constant:
                    raise UsageError("its weights are computed, and a chain is one of constants")
            except UsageError as error:
                yield str(order), error

    def _send(self, stream: LayerStream, link: Link, order: Order) -> Sent:
        from bitwright.targets.kernels.link import layer_transitions

        sort = self._sort(stream, order)
        found = layer_transitions(
            stream.traffic,
            link,
            order,
            stream.inputs,
            stream.weights,
            table=sort.tables.get("inputs"),
            places=sort.places,
        )
        parts = {
            part: PartTransitions(found.flits[part], counts)
            for part, counts in found.counts.items()
        }
        words_sorted = len(stream.inputs) * _words_sorted(stream, link, order)
        return Sent(parts, words_sorted, bound=order.key == "nearest")

    def _sort(self, stream: LayerStream, order: Order) -> _Sort:
        known = self._sorts.get((stream.traffic.layer, order))
        if known is None:
            keyed = [part for part in _keyed(order) if part == "inputs" or not stream.constant]
            places = None
            if stream.constant and order.orders_weights:
                words, positions = self._link.words(stream.weights), len(stream.traffic.bases)
                places = constant_places(words, self._link, order, positions=positions)
            known = _Sort({part: self._table(stream, order, part) for part in keyed}, places)
            self._sorts[stream.traffic.layer, order] = known
        if "weights" in known.tables:  # computed, so their places are those of one run
            from bitwright.targets.kernels.link import positions as sorted_places

            table, window = known.tables["weights"], self._link.window.value
            return replace(known, places=sorted_places(stream.weights, table, window))
        return known

    def _table(
        self, stream: LayerStream, order: Order, part: Literal["inputs", "weights"]
    ) -> npt.NDArray[np.uint16]:
        histogram = None
        if order.needs_histogram:
            histogram = self._histograms[stream.traffic.layer][part]
        return order.table(self._link.word_bits.value, histogram)


def _keyed(order: Order) -> tuple[Literal["inputs", "weights"], ...]:
    """The operands that an order sorts by a table."""
    if not order.is_sorted:
        return ()
    return _PARTS if order.on == "separated" else (order.on,)


def _words_sorted(stream: LayerStream, link: Link, order: Order) -> int:
    """Words that a unit in front of the link orders; constants are ordered before."""
    sent = stream.traffic.words_sent(link)
    keyed = [part for part in _keyed(order) if part == "inputs" or not stream.constant]
    return sum(sent[part] for part in keyed)


def check_stream(stream: LayerStream, link: Link) -> None:
    """Refuse a layer whose codes are wider than the words of a link.

    Raises
    ------
    UsageError
        If they are; it names the layer.
    """
    for part, bits in zip(_PARTS, (stream.inputs_bits, stream.weights_bits), strict=True):
        if bits > link.word_bits.value:
            raise UsageError(
                f"its {part} have {bits} bits, and the link has words of {link.word_bits.value}",
                where=f"layer {stream.traffic.layer!r}",
                fix="take a link with wider words (--link), or a narrower precision",
            )


def _histogram(
    link: Link, codes: npt.NDArray[Any], weights: npt.NDArray[np.int64] | None = None
) -> Histogram:
    words = link.words(codes)
    if weights is not None:
        weights = np.broadcast_to(weights, words.shape).ravel()
    found = np.bincount(words.ravel(), weights, 1 << link.word_bits.value)
    return found.astype(np.int64)


class _Profile:
    """How often words are sent, by layer and part: what bucket maps are made from."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._uses: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        self.histograms: dict[str, dict[Part, Histogram]] = {}

    def take(self, stream: LayerStream) -> None:
        """Count the words of a run of a layer."""
        check_stream(stream, self._link)
        key = stream.traffic.layer, stream.inputs.shape[1]
        if key not in self._uses:
            self._uses[key] = _uses(stream.traffic, key[1])
        found: dict[Part, Histogram] = {
            "inputs": _histogram(self._link, stream.inputs, self._uses[key])
        }
        if not stream.constant:
            found["weights"] = _histogram(self._link, stream.weights)
        known = self.histograms.setdefault(key[0], {})
        for part, histogram in found.items():
            known[part] = known[part] + histogram if part in known else histogram


def _uses(traffic: Traffic, words: int) -> npt.NDArray[np.int64]:
    """How many windows of a channel each input word is in."""
    found = np.zeros(words, np.int64)
    taps = traffic.taps.ravel()
    few, many = (traffic.bases, taps) if len(traffic.bases) < len(taps) else (taps, traffic.bases)
    for offset in few:
        found += np.bincount(many + offset, minlength=words)
    return found


# -- the command ---------------------------------------------------------------------------------


def sized(link: Link, window: int | None = None, flit_bits: int | None = None) -> Link:
    """A link with another window, or flits of another width.

    Raises
    ------
    UsageError
        If windows cannot have so many terms, or the width is no whole number of words.
    """
    changes: dict[str, Any] = {}
    if window is not None:
        if not 2 <= window <= 256:
            raise UsageError(f"a window of {window} terms cannot be ordered", fix="take 2 to 256")
        changes["window"] = Number(value=window, source=link.window.source)
    if flit_bits is not None:
        words = 2 if link.flit == "paired" else 1
        width = link.word_bits.value * words
        if flit_bits < width or flit_bits % width:
            each = "a word of each operand" if words == 2 else "a word"
            raise UsageError(
                f"{flit_bits} bits are no whole number of lanes: {each} takes {width}",
                fix=f"take a multiple of {width}",
            )
        if flit_bits > width * MOST_LANES:
            raise UsageError(
                f"{flit_bits} bits are {flit_bits // width} lanes, and a link has {MOST_LANES} at "
                "most",
                fix=f"take {width * MOST_LANES} bits or fewer",
            )
        changes["lanes"] = Number(value=flit_bits // width, source=link.lanes.source)
    return link.model_copy(update=changes)


def _default_orders(link: Link) -> tuple[Order, ...]:
    """The order of the link's description, exact and with 4 buckets."""
    order = Order.parse(link.order)
    found = [order]
    if order.is_sorted:
        few = min(4, key_count("popcount", link.word_bits.value))
        found = [replace(order, buckets=count, map="uniform") for count in (0, few)] + found
    return tuple(dict.fromkeys(found))


def link(
    model: str | Path,
    data: str | Path | Mapping[str, Array],
    *,
    target: str | Path | None = None,
    link: str | Path | None = None,
    orders: Sequence[str | Order] | None = None,
    window: int | None = None,
    flit_bits: int | None = None,
    precision: str | Precision | None = None,
    plan: PrecisionPlan | str | Path | None = None,
    calibration: str | Path | Mapping[str, Array] | None = None,
    recipe: RecipeName = "default",
    clip: ClipMethod | None = None,
    percentile: float | None = None,
    per_channel: bool | None = None,
    asymmetric: bool = False,
    rotation: bool = True,
    elementwise_bits: int | None = None,
    loop_bits: int | None = None,
    batch_size: int | None = None,
    plot: str | Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Transitions:
    """Count the bit transitions of a model's operands on a link, unsorted and in several orders.

    Parameters
    ----------
    model
        A quantized ONNX file; an artefact that keeps one; or a float model, which is quantized
        first.
    data
        An .npz file or a mapping: one array a model input. Samples are sent one by one.
    target
        An accelerator, or the path of a description: whose link it is where ``link`` names none,
        and what a float model is quantized for.
    link
        A link: its name, that of an accelerator, or the path of a description; it wins over the
        link of ``target``. By default that of ``target``, of the artefact's target, or the one of
        the authors' simulator.
    orders
        Orders as :meth:`~bitwright.targets.orders.Order.parse` reads them; ``nearest`` is a bound.
        By default that of the link, exact and with 4 buckets. Unsorted, row-major and as the link
        packs, is always counted.
    window
        Terms that are ordered at once, instead of the link's; no layer may have fewer.
    flit_bits
        Payload of a flit, instead of the link's: its words divide it into lanes.
    precision
        For a float model: one precision for all layers, for example ``w8a8``; or
    plan
        a precision plan, the file of one, or a plan of a study: ``DIR#3``.
    calibration
        For a float model: samples to quantize it with. For any model: samples that bucket maps
        (``quantile``, ``calibrated``) are made from, where they depend on inputs; by default the
        data itself.
    recipe, clip, percentile, per_channel, asymmetric, rotation
        Options of quantization, as in :func:`bitwright.quantize`.
    elementwise_bits, loop_bits, batch_size
        Options of quantization, as in :func:`bitwright.quantize`.
    plot
        A file for charts of layers and of wires: a page (``.html``) that needs no network.
    overwrite
        Whether ``plot`` may exist.
    progress
        Called with samples done and in total.

    Returns
    -------
    Transitions
        What toggled, by layer, order, part, lane and bit.

    Raises
    ------
    ArtifactError, ModelError, PlanError, DataError, OutputError, UsageError
        If the model, the plan, the samples, the link, an order or the output has to change.
    RunError
        If the model fails while running.
    """
    if plot is not None and Path(plot).suffix != ".html":
        raise UsageError("the charts are a page", where=str(plot), fix="name it .html")
    picture = None if plot is None else check_writable(plot, overwrite=overwrite)
    source, form, made_for = _source(Path(model))
    named = link if link is not None else target if target is not None else made_for
    wire = sized(targets.get_link(named or DEFAULT_LINK), window, flit_bits)
    chosen = _orders(wire, orders)
    loaded = load(source)
    loaded.source = str(model)  # for messages
    choice: dict[str, Any] = {
        "precision": precision,
        "plan": plan,
        "elementwise_bits": elementwise_bits,
        "loop_bits": loop_bits,
    }
    options: dict[str, Any] = {
        "recipe": recipe,
        "clip": clip,
        "percentile": percentile,
        "per_channel": per_channel,
        "asymmetric": asymmetric,
        "rotation": rotation,
        "batch_size": batch_size,
    }
    samples = Samples(data, loaded.inputs)
    tuning = None if calibration is None else Samples(calibration, loaded.inputs)
    if loaded.is_quantized:
        refuse_options({**choice, **options}, loaded.source)
    else:
        complete = (
            resolve_plan(loaded, recipe=recipe, **choice)
            if target is None
            else plan_for(loaded, targets.get(target), recipe=recipe, **choice)
        )
        if tuning is None:
            raise UsageError(
                f"{loaded.source} is a float model, and there are no samples to quantize it with",
                fix="name them: --calibration FILE.npz",
            )
        result = quantize_model(loaded, complete, tuning, progress=progress, **options)
        loaded = load(result.model)
        loaded.source = str(model)
    found = _count(loaded, samples, tuning, wire, chosen, form, window is not None, progress)
    if picture is not None:
        from bitwright.plots import transitions_page

        write_atomically(picture, transitions_page(found).encode())
    return found


def _source(model: Path) -> tuple[Path, RequantizationForm, str | None]:
    """The ONNX file, the multipliers of the artefact, and its target."""
    if not model.is_dir():
        return model, "float", None
    manifest = read_manifest(model)
    if not (model / QDQ_MODEL).is_file():
        raise ArtifactError(
            "keeps no quantized ONNX model, whose operands could be counted",
            where=str(model),
            fix="name that model, or compile again with --keep-qdq and without the pass soft-edge",
        )
    return model / QDQ_MODEL, manifest.requantization, manifest.target


def _orders(link: Link, orders: Sequence[str | Order] | None) -> tuple[Order, ...]:
    """Parsed, each once; refuses bucket maps that are none of the link's words."""
    if orders is None:
        return _default_orders(link)
    if not orders:
        raise UsageError("there is no order to compare", fix="name one: --order popcount")
    found = dict.fromkeys(o if isinstance(o, Order) else Order.parse(o) for o in orders)
    bits = link.word_bits.value
    for order in found:
        if order.is_sorted:
            order.bucket_map(bits, np.ones(1 << bits))
    return tuple(found)


def _count(
    model: Model,
    samples: Samples,
    tuning: Samples | None,
    link: Link,
    orders: Sequence[Order],
    form: RequantizationForm,
    whole_windows: bool,
    progress: ProgressCallback | None,
) -> Transitions:
    notes = []
    needs_profile = any(
        order.needs_histogram and (order.on != "weights" or _has_products_of_activations(model))
        for order in orders
    )
    profile, profiled = _Profile(link), tuning or samples
    passes: list[tuple[Samples, Callable[[LayerStream], None]]] = []
    if needs_profile:
        passes.append((profiled, profile.take))
        which = "the calibration samples" if tuning else "the data that is counted"
        notes.append(f"bucket maps of inputs are made from {which}")
    counter = _Counter(link, orders, profile.histograms)

    def take(stream: LayerStream) -> None:
        if whole_windows and stream.traffic.terms < link.window.value:
            raise UsageError(
                f"a window of {link.window.value} terms is larger than the {stream.traffic.terms} "
                "of an output",
                where=f"layer {stream.traffic.layer!r}",
                fix=f"take --window {stream.traffic.terms} or less, or leave it out: windows of "
                "the link are then filled partly",
            )
        counter.take(stream)

    _feed(model, [*passes, (samples, take)], form, counter.check, progress)
    layers = counter.finish()
    if not layers:
        raise ModelError(
            "has no layer that computes in integers, so nothing is sent",
            where=model.source,
            fix="bitwright inspect says why each operator is none",
        )
    skipped = {
        name: "it computes in float"
        for name in layer_nodes(model)
        if name not in {layer.layer for layer in layers}
    }
    return Transitions(
        source=model.source,
        samples=len(samples),
        link=link,
        orders=tuple(map(str, orders)),
        layers=layers,
        skipped=skipped,
        notes=tuple(notes),
    )


def _feed(
    model: Model,
    passes: Sequence[tuple[Samples, Callable[[LayerStream], None]]],
    form: RequantizationForm,
    check: Callable[[], None],
    progress: ProgressCallback | None,
) -> None:
    """Run a model on samples, one by one, and hand on what its layers send."""
    total, done = sum(len(samples) for samples, _ in passes), 0
    for samples, take in passes:
        reference = streams(model, take, form)
        for batch in samples.batches(1):
            reference.run(batch.inputs)
            check()
            done += batch.samples
            if progress is not None:
                progress(done, total)


def measure(
    model: Model,
    samples: Samples,
    link: Link,
    orders: Sequence[Order],
    *,
    requantization: RequantizationForm = "float",
    progress: ProgressCallback | None = None,
) -> dict[str, Measured]:
    """What the layers of a model send: for passes that choose orders, and bucket maps.

    Parameters
    ----------
    model
        A quantized model.
    samples
        Calibration samples.
    link
        The link.
    orders
        Orders to count beside sending unsorted; those a layer cannot have are left out there.
    requantization
        As in :class:`~bitwright.quant.reference.Reference`.
    progress
        Called with samples done and in total.

    Returns
    -------
    dict
        Layer to what was measured. Words of histograms count once for each window of a channel that
        they are in.

    Raises
    ------
    UsageError
        If codes are wider than the words of the link, or no layer can have an order.
    """
    from bitwright.passes.popcount_reorder import Measured

    profile = _Profile(link)
    counter = _Counter(link, orders, profile.histograms)

    def take_both(stream: LayerStream) -> None:
        profile.take(stream)
        counter.take(stream)

    passes: list[tuple[Samples, Callable[[LayerStream], None]]] = [(samples, take_both)]
    if any(order.needs_histogram for order in orders):  # all of it, before an order is made
        passes = [(samples, profile.take), (samples, counter.take)]
    _feed(model, passes, requantization, counter.check, progress)
    return {
        layer.layer: Measured(
            profile.histograms[layer.layer],
            {order: sent.transitions for order, sent in layer.sent.items()},
            {order: sent.words_sorted for order, sent in layer.sent.items()},
        )
        for layer in counter.finish()
    }


def _has_products_of_activations(model: Model) -> bool:
    layers = set(layer_nodes(model).values())
    return any(
        node.op_type in ("Conv", "Gemm", "MatMul") and node not in layers
        for node in all_nodes(model.graph)
    )
