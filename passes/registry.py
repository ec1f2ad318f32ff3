"""The passes by name, their options, and pipelines written as text."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from bitwright.errors import UsageError

__all__ = ["DEFAULT", "Option", "PassInfo", "Pipeline", "available", "parse"]

# Name to where the pass is, in the order in which a pipeline runs them.
_PASSES = {
    "propagate-quantization": "propagate_quantization:PropagateQuantization",
    "soft-edge": "soft_edge_activations:SoftEdgeActivations",
    "partition-for-target": "partition_for_target:PartitionForTarget",
    "lower-to-integer": "lower_to_integer:LowerToInteger",
    "permute-channels": "permute_channels:PermuteChannels",
    "materialize-transfers": "materialize_transfers:MaterializeTransfers",
    "popcount-reorder": "popcount_reorder:PopcountReorder",
    "lower-scan": "lower_scan:LowerScan",
    "schedule-floats": "schedule_floats:ScheduleFloats",
    "pack-weights": "pack_weights:PackWeights",
}

# They run only where they are named. Each needs what it is mapped to, which is then named, too.
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "soft-edge": (),
    "permute-channels": (),
    "materialize-transfers": (),
    "popcount-reorder": ("materialize-transfers",),
}


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a pass: ``name`` of type ``type``, and the value it has if left out."""

    name: str
    type: str
    default: object
    help: str


@dataclass(frozen=True, slots=True)
class PassInfo:
    """A pass: what it does, which options it has, what it needs and what then holds.

    ``optional`` passes run only where they are named.
    """

    name: str
    summary: str
    options: tuple[Option, ...]
    requires: str
    ensures: str
    optional: bool


@dataclass(frozen=True)
class Pipeline:
    """Passes to run, each with the options that are not left at their defaults."""

    options: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: MappingProxyType(
            {name: {} for name in _PASSES if name not in _OPTIONAL}
        )
    )

    def create(self, **common: Any) -> dict[str, Any]:
        """Make the passes, by name, in order.

        Parameters
        ----------
        common
            Arguments given to every pass that takes them, unless the pipeline says otherwise.
        """
        made = {}
        for name, options in self.options.items():
            kind = _pass_class(name)
            given = inspect.signature(kind).parameters
            shared = {key: value for key, value in common.items() if key in given}
            made[name] = kind(**{**shared, **options})
        return made

    def __str__(self) -> str:
        def word(value: Any) -> str:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            return f"({text})" if set(text) & set(":,") else text

        def shown(options: Mapping[str, Any]) -> str:
            words = (f"{name}:{word(value)}" for name, value in options.items())
            return "=" * bool(options) + ":".join(words)

        return ",".join(name + shown(options) for name, options in self.options.items())


#: What ``compile`` runs by default.
DEFAULT = Pipeline()


def _pass_class(name: str) -> Any:
    module, _, attribute = _PASSES[name].partition(":")
    return getattr(importlib.import_module(f"bitwright.passes.{module}"), attribute)


@functools.cache
def available() -> Mapping[str, PassInfo]:
    """Return the passes by name, in the order in which a pipeline runs them."""
    return MappingProxyType({name: _describe(name) for name in _PASSES})


def _describe(name: str) -> PassInfo:
    """Read a pass's description from its docstring and signature, which thus cannot disagree."""
    kind = _pass_class(name)
    document = inspect.getdoc(kind) or ""
    prose, _, rest = document.partition("Parameters\n----------\n")
    helps: dict[str, str] = {}
    current = ""
    for line in rest.partition("\n\n")[0].splitlines():
        if line.startswith(" "):
            helps[current] = f"{helps[current]} {line.strip()}".strip()
        elif line:
            current = line.strip()
            helps[current] = ""
    words = " ".join(prose.split())
    summary = words.partition(";")[0].partition(".")[0] + "."
    requires = words.partition("Requires: ")[2].partition(" Ensures: ")[0]
    parameters = [
        entry
        for entry in inspect.signature(kind).parameters.values()
        # What text cannot say is given by keyword alone.
        if entry.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    options = tuple(
        Option(entry.name, _type(entry), entry.default, helps.get(entry.name, ""))
        for entry in parameters
    )
    ensures = words.partition("Ensures: ")[2]
    return PassInfo(name, summary, options, requires, ensures, name in _OPTIONAL)


def _type(parameter: inspect.Parameter) -> str:
    """Type of an option; one that is None where it is left out has it in its annotation."""
    if parameter.default is None:
        return str(parameter.annotation).removesuffix(" | None")
    return type(parameter.default).__name__


def parse(text: str) -> Pipeline:
    """Read options of passes, as ``compile --passes`` takes them.

    Parameters
    ----------
    text
        ``pass=option:value:option:value,pass=...``; ``pass=value`` sets the first option. A value
        with colons or commas stands in parentheses. What is not named keeps its defaults; optional
        passes then do not run.

    Raises
    ------
    UsageError
        If there is no such pass or option, or a value is of the wrong type.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in _PASSES}
    named: set[str] = set()
    for part in filter(None, (part.strip() for part in _split(text, ","))):
        name, _, rest = part.partition("=")
        if name not in options:
            raise UsageError(f"there is no pass {name!r}", fix="there are " + ", ".join(options))
        named |= {name, *_OPTIONAL.get(name, ())}
        known = {option.name: option for option in available()[name].options}
        words = _split(rest, ":") if rest else []
        if len(words) == 1 and known and words[0] not in known:
            words = [next(iter(known)), *words]
        if len(words) % 2:
            raise UsageError(
                f"{part!r} is no list of options of {name}", fix=f"write {name}=option:value"
            )
        for key, value in zip(words[::2], words[1::2], strict=True):
            if key not in known:
                raise UsageError(
                    f"the pass {name} has no option {key!r}",
                    fix="it has " + (", ".join(known) or "none"),
                )
            options[name][key] = _read(value.removeprefix("(").removesuffix(")"), known[key], name)
    return Pipeline(
        MappingProxyType(
            {
                name: MappingProxyType(found)
                for name, found in options.items()
                if name in named or name not in _OPTIONAL
            }
        )
    )


def _split(text: str, separator: str) -> list[str]:
    """Split a text where it is not in parentheses."""
    return re.split(rf"{separator}(?![^()]*\))", text)


def _read(text: str, option: Option, name: str) -> object:
    if option.type == "bool" and text in ("true", "false"):
        return text == "true"
    if option.type == "str":
        return text
    if option.type in ("int", "float"):
        try:
            return int(text) if option.type == "int" else float(text)
        except ValueError:
            pass
    raise UsageError(f"{option.name} of {name} is a {option.type}, not {text!r}")
