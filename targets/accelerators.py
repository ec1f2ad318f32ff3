"""Accelerators: what a target can do, described by data.

A description is a YAML file. Those of a package are found by the entry-point group
``bitwright.targets``, which names packages that hold such files; the file of a user is named by its
path.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.errors import PlanError, UsageError, first_line
from bitwright.vocabulary import Precision

__all__ = ["Accelerator", "Precisions", "TargetTag", "available", "get", "is_file"]

SCHEMA_VERSION: Final = 1

_GROUP = "bitwright.targets"
_SHOWN = 20  # layers that one message names

Bits = Literal[2, 4, 8, 16]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Precisions(_Data):
    """The precisions that an accelerator can compute a layer in.

    Attributes
    ----------
    weight_bits, activation_bits
        Widths, in bits.
    tied
        Whether the weights and the activations of a layer must have the same width.
    source
        Where the widths are published.
    """

    weight_bits: tuple[Bits, ...] = Field(min_length=1)
    activation_bits: tuple[Bits, ...] = Field(min_length=1)
    tied: bool
    source: str = Field(min_length=1)

    def __str__(self) -> str:
        if self.tied:
            both = [bits for bits in self.weight_bits if bits in self.activation_bits]
            return ", ".join(f"w{bits}a{bits}" for bits in both)
        weights, activations = (
            ", ".join(map(str, bits)) for bits in (self.weight_bits, self.activation_bits)
        )
        return f"weights of {weights} bits with activations of {activations} bits"


class TargetTag(_Data):
    """The TVM target that stands behind an accelerator's name: a CPU that emulates it.

    Attributes
    ----------
    kind
        Kind of the TVM target.
    keys
        By which TVM chooses code; ``cpu`` among them.
    device, model
        The accelerator, for those who ask the target.
    """

    kind: Literal["llvm"]
    keys: tuple[str, ...] = Field(min_length=1)
    device: str
    model: str


class Accelerator(_Data):
    """An accelerator.

    Attributes
    ----------
    name
        Its tag, family and model: ``bitfusion/eyeriss``.
    summary
        What it is, in one line.
    precisions
        What it can compute a layer in.
    tag
        Its TVM target (``tvm_target`` in the file).
    """

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.+-]*/[a-z0-9][a-z0-9_.+-]*$")
    summary: str = Field(min_length=1)
    precisions: Precisions
    tag: TargetTag = Field(alias="tvm_target")

    def allows(self, precision: Precision) -> bool:
        """Whether a layer can have a precision."""
        weights, activations = precision.weight_bits, precision.activation_bits
        return (
            weights in self.precisions.weight_bits
            and activations in self.precisions.activation_bits
            and (weights == activations or not self.precisions.tied)
        )

    def check(self, layers: Mapping[str, Precision], *, where: str = "plan") -> None:
        """Refuse precisions that the accelerator cannot do.

        Parameters
        ----------
        layers
            Layer name to precision.
        where
            What they come from, for the message.

        Raises
        ------
        PlanError
            If there are such; it names the layers and what is allowed.
        """
        refused = [
            f"{name} ({precision})"
            for name, precision in layers.items()
            if not self.allows(precision)
        ]
        if refused:
            more = len(refused) - _SHOWN
            raise PlanError(
                f"{self.name} cannot do the precision of {_counted(len(refused))}: "
                + ", ".join(refused[:_SHOWN])
                + (f" and {more} more" if more > 0 else ""),
                where=where,
                fix=f"it allows {self.precisions}",
            )

    def tvm_target(self, host: Mapping[str, Any] | None = None) -> Any:
        """Make the TVM target, and register its tag if TVM does not know it yet.

        Parameters
        ----------
        host
            Options of TVM's llvm target, for example ``{"mcpu": "x86-64-v3"}``.

        Returns
        -------
        tvm.target.Target

        Raises
        ------
        UsageError
            If TVM has another target of that name.
        """
        from tvm.target import Target

        self._register_tag()
        # A kind beside a tag would replace the tag's keys.
        options = {name: value for name, value in (host or {}).items() if name != "kind"}
        return Target({"tag": self.name, **options})

    def _register_tag(self) -> None:
        from tvm.target import list_tags, register_tag

        config = self.tag.model_dump()
        config["keys"] = list(config["keys"])
        known = list_tags().get(self.name)  # TVM refuses to register a tag twice
        if known is None:
            register_tag(self.name, config)
            return
        exported = known.export()
        exported = {**exported, "keys": [str(key) for key in exported["keys"]]}
        if any(exported.get(name) != value for name, value in config.items()):
            raise UsageError(
                f"TVM has another target {self.name!r}",
                where=f"accelerator {self.name}",
                fix="give the accelerator another name",
            )


def _counted(layers: int) -> str:
    return "1 layer" if layers == 1 else f"{layers} layers"


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses a field that stands twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice[0]!r} stands twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read(text: str, where: str) -> Accelerator:
    try:
        document = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise UsageError(f"not a YAML document ({first_line(error)})", where=where) from error
    if not isinstance(document, dict):
        raise UsageError("not a description of an accelerator", where=where)
    version = document.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UsageError(
            f"schema_version is {version!r}",
            where=where,
            fix=f"this version of bitwright reads schema version {SCHEMA_VERSION}",
        )
    try:
        return Accelerator.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"field {field!r}: {first['msg']}",
            where=where,
            fix="see the descriptions that come with bitwright",
        ) from error


def _packages() -> list[str]:
    """Packages with descriptions; an installation that is listed twice counts once."""
    return list(dict.fromkeys(entry.value for entry in entry_points(group=_GROUP)))


def available() -> dict[str, Accelerator]:
    """The accelerators that are installed, by name.

    Raises
    ------
    UsageError
        If a description cannot be read, or two have the same name.
    """
    found: dict[str, Accelerator] = {}
    owners: dict[str, str] = {}
    for package in _packages():
        try:
            entries = sorted(files(package).iterdir(), key=lambda entry: entry.name)
        except Exception as error:  # a package of others may raise anything
            raise UsageError(
                f"the accelerators of {package!r} cannot be loaded ({first_line(error)})",
                fix=f"an entry point of {_GROUP} names a package that holds YAML files",
            ) from error
        for entry in entries:
            if not entry.name.endswith(".yaml"):
                continue
            owner = f"{package}, {entry.name}"
            accelerator = _read(entry.read_text(encoding="utf-8"), owner)
            if accelerator.name in owners:
                raise UsageError(
                    f"accelerator {accelerator.name!r} is described twice: by "
                    f"{owners[accelerator.name]} and by {owner}",
                    fix="remove one of them",
                )
            owners[accelerator.name] = owner
            found[accelerator.name] = accelerator
    return dict(sorted(found.items()))


def is_file(name: str | Path) -> bool:
    """Whether an accelerator is named by the path of its description."""
    return Path(name).suffix in (".yaml", ".yml")


def get(name: str | Path) -> Accelerator:
    """Find an accelerator.

    Parameters
    ----------
    name
        A name out of :func:`available`, or the path of a description (``.yaml`` or ``.yml``).

    Raises
    ------
    UsageError
        If there is no such accelerator, or its description cannot be read.
    """
    if is_file(name):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot be read ({first_line(error)})", where=str(name)) from error
        return _read(text, str(name))
    found = available()
    if str(name) not in found:
        raise UsageError(
            f"there is no accelerator {str(name)!r}",
            fix=f"choose one of {', '.join(found)}, or give the path of a description (.yaml)",
        )
    return found[str(name)]
