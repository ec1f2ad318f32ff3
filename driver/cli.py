"""The ``bitwright`` program: every command is one public function with the same options.

Exit codes: 0 done; 1 a correct request failed; 2 the input or the request has to change (nothing
half-written is left behind), or the user stopped the work.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

from bitwright.errors import BitwrightError, Interrupted, OutputError, UsageError

try:
    import typer
except KeyboardInterrupt:  # the one import that takes long before a command is there to say it
    print("error: interrupted", file=sys.stderr)  # noqa: T201 - as a command would
    raise SystemExit(Interrupted.exit_code) from None

__all__ = ["app", "main"]

P = ParamSpec("P")

app = typer.Typer(
    name="bitwright",
    help="Compiles ONNX models for mixed-precision accelerators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_options = {"debug": False}

_INTERRUPTED = 130  # typer's exit code for Ctrl-C between the commands' own guards

# Files are checked where they are read, which gives the better messages.
_file_option = functools.partial(typer.Option, readable=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.", readable=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Target = Annotated[
    str, typer.Option(help="An accelerator (bitwright targets), or a description (.yaml).")
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bitwright {version('bitwright')}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001 - its callback answers it
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    _options["debug"] = debug
    if not debug:  # what libraries log would stand between our lines on stderr
        logging.getLogger("onnx_ir").addHandler(logging.NullHandler())


def _guarded(function: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with a message instead of a traceback."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            _fail(Interrupted("interrupted", fix="nothing half-written was left behind"))
        except BitwrightError as error:
            _fail(error)
        except BrokenPipeError:  # the reader of our output has gone; typer ends without a word
            raise
        except OSError as error:  # what we read and write has errors of its own, except this
            _fail(OutputError(f"cannot be written ({error.strerror})", where="standard output"))
        except Exception as error:
            if _options["debug"]:
                raise
            typer.echo(
                f"internal error: {type(error).__name__}: {error}\n"
                "  this is a bug of bitwright; --debug shows the traceback to report",
                err=True,
            )
            raise typer.Exit(1) from None

    return guarded


def _command(function: Callable[P, None]) -> Callable[P, None]:
    """Register a command."""
    guarded = _guarded(function)
    app.command(name=function.__name__.strip("_").replace("_", "-"))(guarded)
    return guarded


def _fail(error: BitwrightError) -> None:
    if _options["debug"]:
        raise error
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(error.exit_code)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal's error stream; nothing in a pipeline."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_json(document: Any) -> None:
    def plain(value: Any) -> Any:  # JSON has no infinity
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return value

    typer.echo(json.dumps(plain(document), indent=2))


def _input_shapes(entries: Sequence[str]) -> dict[str, list[int | None]]:
    shapes: dict[str, list[int | None]] = {}
    for number, entry in enumerate(entries, start=1):
        name, separator, sizes = entry.rpartition("=")
        try:
            words = sizes.split(",") if sizes.strip() else []
            shapes[name] = [None if word.strip() == "?" else int(word) for word in words]
        except ValueError:
            separator = ""
        if not separator:
            raise UsageError(f"{entry!r} is no input shape", fix="write it like x=1,3,224,224")
        if len(shapes) < number:
            raise UsageError(f"the shape of input {name!r} is given twice", fix="leave out one")
    return shapes


def _layer_precisions(entries: Sequence[str]) -> dict[str, str]:
    layers: dict[str, str] = {}
    for entry in entries:
        name, separator, text = entry.rpartition("=")
        if not separator:
            raise UsageError(f"{entry!r} is no layer precision", fix="write it like conv1=w4a8")
        if name in layers:
            raise UsageError(f"layer {name!r} is given twice", fix="leave out one")
        layers[name] = text
    return layers


# Options that several commands share.
PrecisionOfAll = Annotated[
    str | None, typer.Option(help="Precision of all layers of a float model, e.g. w8a8.")
]
PlanFile = Annotated[
    str | None,
    typer.Option(
        metavar="PLAN", help="A precision plan instead: a file (JSON), or DIR#3 of a study."
    ),
]
Recipe = Annotated[
    Literal["default", "naive", "quamba"],
    typer.Option(help="Options in one word; quamba is for Mamba. Those that are given win."),
]
Clip = Annotated[
    Literal["mmse", "percentile", "minmax"] | None,
    typer.Option(help="How ranges are cut \\[default: mmse, or as the recipe says]."),
]
Percentile = Annotated[
    float | None,
    typer.Option(
        help="Share of values, in percent, that --clip percentile keeps, and --recipe quamba of "
        "what scans take as x \\[default: 99.99, with quamba 99.999]."
    ),
]
PerChannel = Annotated[
    bool | None,
    typer.Option(
        help="One weight scale an output channel \\[default], or one a tensor \\[default of naive "
        "and quamba]."
    ),
]
Rotation = Annotated[
    bool, typer.Option(help="Whether --recipe quamba rotates the outputs of selective scans.")
]
_METRICS = (
    "top1, top<K>, char-accuracy, last-word, choice, choice-norm, cloze4, perplexity, per, wer, "
    "agreement, mse, sqnr, a plug-in, or package.module:name"
)

Asymmetric = Annotated[
    bool, typer.Option("--asymmetric", help="Zero points for activations of both signs.")
]
ElementwiseBits = Annotated[
    int | None,
    typer.Option(help="Bits, 8 or 16 (default), of activations between other operators."),
]
LoopBits = Annotated[
    int | None,
    typer.Option(help="The same in loops (LSTM, GRU, Scan, ...): 8, 16, or 32, float (default)."),
]
ChosenElementwiseBits = Annotated[
    int, typer.Option(help="Bits, 8 or 16, of activations between other operators.")
]
ChosenLoopBits = Annotated[
    int, typer.Option(help="The same in loops (LSTM, GRU, Scan, ...): 8, 16, or 32, float.")
]
CalibrationBatch = Annotated[
    int | None, typer.Option(help="Samples of one calibration run \\[default: to fit memory].")
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME=SIZES",
        help="Fix symbolic sizes, e.g. x=1,3,224,224; ? leaves one as it is.",
    ),
]


@_command
def inspect(
    model: Model,
    input_shape: InputShape = None,
    as_json: Json = False,
) -> None:
    """Show the layers of a model, and why all other operators are none."""
    from bitwright.inspection import inspect as run

    result = run(model, input_shapes=_input_shapes(input_shape or []))
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.tables import print_inspection

        print_inspection(result)


@_command
def plan(
    model: Model,
    output: Annotated[
        Path | None,
        _file_option("--output", "-o", help="The plan to write (JSON); without it, it is printed."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Precision of all layers that --layer does not name.")
    ] = "w8a8",
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="NAME=PRECISION", help="Precision of one layer."),
    ] = None,
    elementwise_bits: ChosenElementwiseBits = 16,
    loop_bits: ChosenLoopBits = 32,
    overwrite: Overwrite = False,
) -> None:
    """Write a precision plan, to be edited by hand or used as it is."""
    from bitwright.planning import make_plan

    made = make_plan(
        model,
        precision=precision,
        layers=_layer_precisions(layer or []),
        elementwise_bits=elementwise_bits,
        loop_bits=loop_bits,
        output=output,
        overwrite=overwrite,
    )
    typer.echo(
        made.to_json().rstrip() if output is None else f"{output}: {len(made.layers)} layers"
    )


@_command
def quantize(
    model: Model,
    calibration: Annotated[
        Path, _file_option(help="Samples (.npz): one array a model input, a few hundred entries.")
    ],
    output: Annotated[Path, _file_option("--output", "-o", help="The QDQ model to write.")],
    precision: PrecisionOfAll = None,
    plan: PlanFile = None,
    overwrite: Overwrite = False,
    recipe: Recipe = "default",
    clip: Clip = None,
    percentile: Percentile = None,
    per_channel: PerChannel = None,
    asymmetric: Asymmetric = False,
    rotation: Rotation = True,
    elementwise_bits: ElementwiseBits = None,
    loop_bits: LoopBits = None,
    batch_size: CalibrationBatch = None,
    as_json: Json = False,
) -> None:
    """Quantize a float model, every layer at a precision of its own, into a QDQ model."""
    from bitwright.quantization import quantize as run

    with _progress("calibrating, choosing scales") as progress:
        result = run(
            model,
            calibration=calibration,
            precision=precision,
            plan=plan,
            output=output,
            overwrite=overwrite,
            recipe=recipe,
            clip=clip,
            percentile=percentile,
            per_channel=per_channel,
            asymmetric=asymmetric,
            rotation=rotation,
            elementwise_bits=elementwise_bits,
            loop_bits=loop_bits,
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.tables import print_quantized

        print_quantized(result, model, output)


@_command
def choose_forms(
    model: Model,
    calibration: Annotated[
        Path, _file_option(help="Samples (.npz): one array a model input, a few hundred entries.")
    ],
    output: Annotated[
        Path | None, _file_option("--output", "-o", help="The plan to write (JSON).")
    ] = None,
    precision: PrecisionOfAll = None,
    plan: PlanFile = None,
    overwrite: Overwrite = False,
    forms: Annotated[
        str | None, typer.Option(help="Forms to try \\[default: a8,a8se,a8se8].")
    ] = None,
    percentiles: Annotated[
        str | None,
        typer.Option(help="Percentiles to try \\[default: 99,99.9,99.99,99.999,100]."),
    ] = None,
    recipe: Recipe = "default",
    rotation: Rotation = True,
    samples: Annotated[int, typer.Option(help="Samples that candidates are run on.")] = 16,
    as_json: Json = False,
) -> None:
    """Choose form and range of every activation by the noise at the outputs; write a plan.

    Activations are those that layers, outside of loops, and selective scans read.
    """
    from bitwright.choosing import choose_forms as run

    with _progress("trying forms") as progress:
        result = run(
            model,
            calibration=calibration,
            precision=precision,
            plan=plan,
            output=output,
            overwrite=overwrite,
            forms=forms,
            percentiles=percentiles,
            recipe=recipe,
            rotation=rotation,
            samples=samples,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.tables import print_forms

        print_forms(result)


@_command
def evaluate(
    model: Model,
    data: Annotated[Path, _file_option(help="Samples (.npz), with an array 'labels' if needed.")],
    metric: Annotated[
        str,
        typer.Option(help=f"{_METRICS}."),
    ] = "top1",
    engine: Annotated[
        Literal["onnxruntime", "reference"],
        typer.Option(help="What runs the model; reference: integers, for quantized models."),
    ] = "onnxruntime",
    requantization: Annotated[
        Literal["float", "fixed"], typer.Option(help="Multipliers of the integer reference.")
    ] = "float",
    against: Annotated[
        Path | None, _file_option(help="The float model that mse, sqnr and agreement compare with.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of one run.")] = 32,
    as_json: Json = False,
) -> None:
    """Measure a float or quantized model on data."""
    from bitwright.evaluation import evaluate as run

    with _progress("evaluating") as progress:
        result = run(
            model,
            data,
            metric=metric,
            engine=engine,
            requantization=requantization,
            against=against,
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        value = (
            f"{100 * result.value:.2f} %"
            if result.unit == "fraction"
            else f"{result.value:.6g} {result.unit}".rstrip()
        )
        typer.echo(
            f"{result.metric} {value}  ({result.samples} samples, {result.engine}, "
            f"{result.seconds:.2f} s)"
        )


@_command
def compare(
    model: Model,
    data: Annotated[Path, _file_option(help="Samples (.npz): one array a model input.")],
    requantization: Annotated[
        Literal["float", "fixed"], typer.Option(help="Multipliers of the integer reference.")
    ] = "float",
    batch_size: Annotated[int, typer.Option(help="Samples of one run.")] = 16,
    as_json: Json = False,
) -> None:
    """Compare the integer reference with onnxruntime, code by code, on a quantized model."""
    from bitwright.evaluation import compare as run

    with _progress("comparing") as progress:
        result = run(
            model,
            data,
            requantization=requantization,
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.tables import print_comparison

        print_comparison(result)


@_command
def compile_(
    model: Model,
    output: Annotated[Path, _file_option("--output", "-o", help="The folder to write.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="An accelerator (bitwright targets), or a description (.yaml) "
            "\\[default: that of the study of --plan DIR#3]."
        ),
    ] = None,
    precision: PrecisionOfAll = None,
    plan: PlanFile = None,
    calibration: Annotated[
        Path | None, _file_option(help="Samples (.npz) to quantize a float model with.")
    ] = None,
    input_shape: InputShape = None,
    passes: Annotated[
        str,
        typer.Option(
            metavar="NAME=OPTION:VALUE,...", help="Passes and their options (bitwright passes)."
        ),
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the artefact if it exists.")
    ] = False,
    keep_qdq: Annotated[
        bool,
        typer.Option(
            help="Keep the quantized ONNX model, for bitwright run to compare (never with the pass "
            "soft-edge, which computes otherwise)."
        ),
    ] = True,
    dump_ir: Annotated[
        Path | None, _file_option(help="Folder for the module after each pass, as text.")
    ] = None,
    recipe: Recipe = "default",
    clip: Clip = None,
    percentile: Percentile = None,
    per_channel: PerChannel = None,
    asymmetric: Asymmetric = False,
    rotation: Rotation = True,
    elementwise_bits: ElementwiseBits = None,
    loop_bits: LoopBits = None,
    batch_size: CalibrationBatch = None,
    as_json: Json = False,
) -> None:
    """Compile a float or quantized model into an artefact that computes in integers."""
    from bitwright.compilation import compile as run

    with _progress("compiling") as progress:
        artifact = run(
            model,
            target,
            output=output,
            precision=precision,
            plan=plan,
            calibration=calibration,
            input_shapes=_input_shapes(input_shape or []),
            passes=passes,
            overwrite=overwrite,
            keep_qdq=keep_qdq,
            dump_ir=dump_ir,
            recipe=recipe,
            clip=clip,
            percentile=percentile,
            per_channel=per_channel,
            asymmetric=asymmetric,
            rotation=rotation,
            elementwise_bits=elementwise_bits,
            loop_bits=loop_bits,
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        _print_json(artifact.manifest.model_dump(mode="json"))
    else:
        from bitwright.tables import print_artifact

        print_artifact(artifact)


@_command
def run(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="An artefact.", readable=False)],
    data: Annotated[Path, _file_option(help="Samples (.npz), with an array 'labels' if needed.")],
    metric: Annotated[
        str | None,
        typer.Option(help=f"{_METRICS} \\[default: top1]."),
    ] = None,
    float_model: Annotated[
        Path | None, _file_option("--float", help="The float model \\[default: what was compiled].")
    ] = None,
    reference: Annotated[
        bool | None,
        typer.Option(help="Run the integer reference too, which is slow \\[default: --reference]."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of one run.")] = 64,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the artefact \\[default: one a processor].")
    ] = None,
    count_transitions: Annotated[
        bool,
        typer.Option(
            "--count-transitions",
            help="Send the samples over the link and count what toggles; nothing is compared.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run an artefact on data, side by side with the models it was made from."""
    from bitwright.evaluation import SideBySide
    from bitwright.evaluation import run as execute

    with _progress("sending" if count_transitions else "running") as progress:
        result = execute(
            artifact,
            data,
            metric=metric,
            float_model=float_model,
            reference=reference,
            batch_size=batch_size,
            threads=threads,
            count_transitions=count_transitions,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.tables import print_side_by_side, print_transitions

        if isinstance(result, SideBySide):
            print_side_by_side(result)
        else:
            print_transitions(result)


@_command
def passes(
    artifact: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="An artefact: what they did to it.", readable=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the passes with their options, or what they did to a model."""
    from bitwright.compilation import describe_passes

    result = describe_passes(artifact)
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.tables import print_applied_passes, print_passes

        if artifact is None:
            print_passes(result)
        else:
            print_applied_passes(result, artifact)


@_command
def cost(
    model: Model,
    target: Target,
    precision: PrecisionOfAll = None,
    plan: PlanFile = None,
    baseline: Annotated[
        str | None, typer.Option(help="A precision of all layers to compare with, e.g. w16a16.")
    ] = None,
    input_shape: InputShape = None,
    plot: Annotated[
        Path | None, _file_option(help="Write bar charts of the layers into this page (.html).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show what a model costs on an accelerator: cycles, traffic, energy, memory."""
    from bitwright.costing import cost as run

    result = run(
        model,
        target,
        precision=precision,
        plan=plan,
        baseline=baseline,
        input_shapes=_input_shapes(input_shape or []),
        plot=plot,
        overwrite=overwrite,
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.tables import print_cost

        print_cost(result)
        if plot is not None:
            typer.echo(f"bar charts: {plot}")
    result.check_memory()  # the figures say by how much; the exit code says that it does not fit


@_command
def link(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="An ONNX file, or an artefact (DIR).", readable=False),
    ],
    data: Annotated[Path, _file_option(help="Samples (.npz): one array a model input.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="An accelerator, or a description (.yaml): whose link it is where --link names "
            "none, and what a float model is quantized for."
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            help="A link: ordering-simulator, that of an accelerator, or a description (.yaml); it "
            "wins over that of --target \\[default: that of --target, of the artefact's target, "
            "or ordering-simulator]."
        ),
    ] = None,
    order: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=OPTION:VALUE",
            help="popcount, popcount=buckets:4, popcount=buckets:4:map:quantile:on:inputs, "
            "gray-rank=snake:true, chain, nearest, ... "
            "\\[default: the link's, exact and with 4 buckets].",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Terms that are ordered at once \\[default: the link's].")
    ] = None,
    flit_bits: Annotated[
        int | None, typer.Option(help="Payload of a flit \\[default: the link's].")
    ] = None,
    precision: PrecisionOfAll = None,
    plan: PlanFile = None,
    calibration: Annotated[
        Path | None,
        _file_option(help="Samples (.npz) to quantize a float model with, and to make maps from."),
    ] = None,
    recipe: Recipe = "default",
    clip: Clip = None,
    percentile: Percentile = None,
    per_channel: PerChannel = None,
    asymmetric: Asymmetric = False,
    rotation: Rotation = True,
    elementwise_bits: ElementwiseBits = None,
    loop_bits: LoopBits = None,
    batch_size: CalibrationBatch = None,
    plot: Annotated[
        Path | None, _file_option(help="Write charts of layers and wires into this page (.html).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Count the bits that toggle on a link, unsorted and in several orders."""
    from bitwright.linking import link as run

    with _progress("counting") as progress:
        result = run(
            model,
            data,
            target=target,
            link=link,
            orders=order,
            window=window,
            flit_bits=flit_bits,
            precision=precision,
            plan=plan,
            calibration=calibration,
            recipe=recipe,
            clip=clip,
            percentile=percentile,
            per_channel=per_channel,
            asymmetric=asymmetric,
            rotation=rotation,
            elementwise_bits=elementwise_bits,
            loop_bits=loop_bits,
            batch_size=batch_size,
            plot=plot,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.tables import print_transitions

        print_transitions(result)
        if plot is not None:
            typer.echo(f"charts: {plot}")


# -- search ------------------------------------------------------------------------------------

MetricName = Annotated[
    str,
    typer.Option(help=f"What the error is: {_METRICS}."),
]
Precisions = Annotated[
    str | None,
    typer.Option(
        help="What layers may have, e.g. w4a4,w8a8,w8a8se8 \\[default: all allowed widths]."
    ),
]
Calibration = Annotated[Path | None, _file_option(help="Samples (.npz) to choose scales with.")]
Validation = Annotated[Path | None, _file_option(help="Samples (.npz) to measure errors on.")]
UsedSamples = Annotated[
    int | None, typer.Option(help="Validation samples to use \\[default: all].")
]
VectorValues = Annotated[
    int, typer.Option(help="Values beside the weights that count as memory, at 16 bits each.")
]
Workers = Annotated[int, typer.Option(help="Local processes that evaluate.")]
Scheduler = Annotated[
    str | None, typer.Option(metavar="tcp://HOST:PORT", help="A running Dask scheduler instead.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


@contextmanager
def _search_progress(*, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """Show how far a search is, on a terminal's error stream; nothing in a pipeline."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[best]}", markup=False),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    ) as bar:
        tasks: dict[str, Any] = {}

        def update(state: Any) -> None:
            if state.phase not in tasks:
                tasks[state.phase] = bar.add_task(state.phase, total=None, rate="", best="")
            task = tasks[state.phase]
            speed = bar.tasks[task].speed
            best = ", ".join(f"{name} {value:.4g}" for name, value in state.best.items())
            bar.update(
                task,
                completed=state.done,
                total=state.total,
                rate=f"{speed:.1f}/s" if speed else "",
                best=f"best: {best}" if best else "",
            )

        yield update


@_command
def search(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="A float ONNX file.", readable=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="An accelerator (bitwright targets), or a description (.yaml)."),
    ] = None,
    calibration: Calibration = None,
    validation: Validation = None,
    test: Annotated[
        Path | None, _file_option(help="Samples (.npz) to measure the front on at the end.")
    ] = None,
    output: Annotated[
        Path | None, _file_option("--output", "-o", help="The folder of the new study.")
    ] = None,
    resume: Annotated[
        Path | None, _file_option(metavar="DIR", help="Go on with a study instead.")
    ] = None,
    objectives: Annotated[
        str,
        typer.Option(
            help="error and gains: memory, compression, speedup, mean_speedup, cycles, "
            "relative_cycles, time, energy, traffic."
        ),
    ] = "error,speedup",
    constraint: Annotated[
        list[str] | None,
        typer.Option(metavar="LIMIT", help="memory<=2MiB, error<=5%, error<=+2pp (over float)."),
    ] = None,
    metric: MetricName = "top1",
    precisions: Precisions = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PRECISION", help="Layers (or conv*) with a fixed precision."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Layers (or conv*) to leave at the widest precision."),
    ] = None,
    tie: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,NAME", help="Layers (or conv*) that have one precision."),
    ] = None,
    start: Annotated[
        Literal["guided", "plain"],
        typer.Option(help="First plans: uniform and sensible ones, or chance alone (MOHAQ)."),
    ] = "guided",
    algorithm: Annotated[
        Literal["auto", "nsga2", "exhaustive", "random"],
        typer.Option(help="auto: everything if that is no more work than NSGA-II."),
    ] = "auto",
    population: Annotated[int, typer.Option(help="Plans of a population.")] = 40,
    offspring: Annotated[int, typer.Option(help="New plans of a generation.")] = 10,
    generations: Annotated[
        int | None, typer.Option(help="Generations, the first one counted \\[default: 60].")
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Stop after so many different plans.")
    ] = None,
    time_budget: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many generations without progress.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same front.")] = 1,
    subsets: Annotated[
        int, typer.Option(help="Parts of the validation data (MOHAQ: 4); the largest error counts.")
    ] = 1,
    samples: UsedSamples = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    vector_values: VectorValues = 0,
    input_shape: InputShape = None,
    recipe: Recipe = "default",
    clip: Clip = None,
    percentile: Percentile = None,
    per_channel: PerChannel = None,
    asymmetric: Asymmetric = False,
    rotation: Rotation = True,
    elementwise_bits: ChosenElementwiseBits = 16,
    loop_bits: ChosenLoopBits = 32,
    batch_size: CalibrationBatch = None,
    reuse_mib: Annotated[
        int, typer.Option(help="Memory for intermediate values, in MiB a worker.")
    ] = 256,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the space and the expected time, and end.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search for the precision of every layer: the front between error and gains."""
    from bitwright.searching import search_precisions as run

    with _search_progress(quiet=quiet) as progress:
        result = run(
            model,
            target,
            calibration=calibration,
            validation=validation,
            test=test,
            output=output,
            resume=resume,
            objectives=objectives,
            constraints=constraint,
            metric=metric,
            precisions=precisions,
            keep=_layer_precisions(keep or []),
            exclude=exclude,
            tie=tie,
            start=start,
            algorithm=algorithm,
            population=population,
            offspring=offspring,
            generations=generations,
            evaluations=evaluations,
            time_budget=time_budget,
            patience=patience,
            seed=seed,
            subsets=subsets,
            samples=samples,
            workers=workers,
            scheduler=scheduler,
            vector_values=vector_values,
            input_shapes=_input_shapes(input_shape or []),
            recipe=recipe,
            clip=clip,
            percentile=percentile,
            per_channel=per_channel,
            asymmetric=asymmetric,
            rotation=rotation,
            elementwise_bits=elementwise_bits,
            loop_bits=loop_bits,
            batch_size=batch_size,
            reuse_mib=reuse_mib,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    elif not quiet:
        from bitwright.search_tables import print_search

        print_search(result)


StudyFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder of a study.", readable=False)
]


@_command
def front(
    study: StudyFolder,
    best: Annotated[
        list[str] | None,
        typer.Option(metavar="LIMIT", help="Pick the best plan that meets limits: error<=+1pp."),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="What it is best in \\[default: the first gain].")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the names of plans alone: DIR#number.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the plans that a search found, or pick one."""
    from bitwright.fronts import front as run

    result = run(study, best=best, by=by)
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.search_tables import print_front

        print_front(result, quiet=quiet)


@_command
def sensitivity(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="A float ONNX file.", readable=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="An accelerator (bitwright targets), or a description (.yaml)."),
    ] = None,
    calibration: Calibration = None,
    validation: Validation = None,
    study: Annotated[
        Path | None,
        _file_option(metavar="DIR", help="Take all that from a study, and add to its report."),
    ] = None,
    metric: MetricName = "top1",
    precisions: Precisions = None,
    samples: UsedSamples = None,
    vector_values: VectorValues = 0,
    input_shape: InputShape = None,
    recipe: Recipe = "default",
    clip: Clip = None,
    percentile: Percentile = None,
    per_channel: PerChannel = None,
    asymmetric: Asymmetric = False,
    rotation: Rotation = True,
    elementwise_bits: ChosenElementwiseBits = 16,
    loop_bits: ChosenLoopBits = 32,
    batch_size: CalibrationBatch = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    plot: Annotated[
        Path | None, _file_option(help="Write a heat map into this page (.html).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show the error of each layer at each precision, all others at the widest."""
    from bitwright.searching import sensitivity as run

    with _progress("evaluating") as progress:
        result = run(
            model,
            target,
            calibration=calibration,
            validation=validation,
            study=study,
            metric=metric,
            precisions=precisions,
            samples=samples,
            vector_values=vector_values,
            input_shapes=_input_shapes(input_shape or []),
            recipe=recipe,
            clip=clip,
            percentile=percentile,
            per_channel=per_channel,
            asymmetric=asymmetric,
            rotation=rotation,
            elementwise_bits=elementwise_bits,
            loop_bits=loop_bits,
            batch_size=batch_size,
            workers=workers,
            scheduler=scheduler,
            plot=plot,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        from bitwright.search_tables import print_sensitivity

        print_sensitivity(result)
        if plot is not None:
            typer.echo(f"heat map: {plot}")


@_command
def report(
    study: StudyFolder,
    output: Annotated[
        Path | None, _file_option("--output", "-o", help="The page to write (.html).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a page about a study, or (--json) what it shows."""
    from bitwright.reporting import report as run

    if output is None and not as_json:
        raise UsageError("there is no page to write", fix="name one: --output report.html")
    result = run(study, output=output, overwrite=overwrite)
    if as_json:
        _print_json(result.to_dict())
    else:
        typer.echo(f"report: {output}")


_targets = typer.Typer()


@_targets.callback(invoke_without_command=True)
@_guarded
def targets(context: typer.Context, as_json: Json = False) -> None:
    """List the accelerators: what they can do, and where their numbers come from."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise UsageError("--json stands in front of a subcommand", fix="write it behind")
        return
    from bitwright.compilation import describe_targets

    result = describe_targets()
    if as_json:
        found = result.accelerators.values()
        _print_json([entry.model_dump(mode="json", by_alias=True) for entry in found])
    else:
        from bitwright.tables import print_targets

        print_targets(result)
    for problem in (*result.problems, *result.clashes.values()):
        typer.echo(f"not usable: {problem}", err=True)


@_targets.command()
@_guarded
def show(
    target: Annotated[
        str, typer.Argument(metavar="TAG", help="An accelerator, or a description (.yaml).")
    ],
    as_json: Json = False,
) -> None:
    """Show the description of an accelerator: every number with its unit and source."""
    from bitwright.compilation import describe_target

    accelerator = describe_target(target)
    if as_json:
        _print_json(accelerator.model_dump(mode="json", by_alias=True))
    else:
        from bitwright.tables import print_target

        print_target(accelerator)


app.add_typer(_targets, name="targets")


@_command
def sorting_unit(
    window: Annotated[int, typer.Option(help="Terms that are ordered at once.")],
    output: Annotated[Path, _file_option("--output", "-o", help="The Verilog file to write.")],
    buckets: Annotated[
        int,
        typer.Option(
            help="2 to 64; 0 for one a key (exact), which Gray rank needs words below 7 bits for."
        ),
    ] = 0,
    word_bits: Annotated[int, typer.Option(help="Width of the words, 1 to 16.")] = 8,
    key: Annotated[
        Literal["popcount", "gray-rank"], typer.Option(help="What words are sorted by.")
    ] = "popcount",
    map_: Annotated[
        str,
        typer.Option("--map", help="uniform, or the bucket of every key: 0.0.0.1.1.2.2.3.3."),
    ] = "uniform",
    direction: Annotated[
        Literal["descending", "ascending"], typer.Option(help="Which keys go first.")
    ] = "descending",
    starts: Annotated[
        Literal["chained", "counted"],
        typer.Option(help="How the starts of buckets are known: the smaller, or the faster unit."),
    ] = "chained",
    name: Annotated[str, typer.Option(help="Name of the Verilog module.")] = "sorting_unit",
    overwrite: Overwrite = False,
) -> None:
    """Write a circuit that sorts the words of a window, in Verilog."""
    from bitwright.sorting import sorting_unit as run

    unit = run(
        window,
        output=output,
        buckets=buckets,
        word_bits=word_bits,
        key=key,
        map_=map_,
        direction=direction,
        starts=starts,
        name=name,
        overwrite=overwrite,
    )
    typer.echo(f"{output}: module {name}, {unit}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Parameters
    ----------
    arguments
        Words of the command line; by default those the program was called with.

    Returns
    -------
    int
        The exit code.
    """
    code = 0
    try:
        app(list(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        typer.echo("error: interrupted", err=True)
        code = Interrupted.exit_code
    return code
