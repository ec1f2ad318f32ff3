"""What descriptions of accelerators are made of: numbers with a source, and YAML with line numbers.

The unit of a number stands in the name of its field (``frequency_mhz``); a field without a unit in
its name is a count or a ratio.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from bitwright.errors import UsageError, first_line

__all__ = [
    "UNITS",
    "Clock",
    "Count",
    "Data",
    "Document",
    "Entry",
    "Number",
    "Positive",
    "Source",
    "entries",
    "parts_of",
    "unit_of",
]

T = TypeVar("T")

Count = Annotated[int, Field(gt=0, strict=True)]
"""A positive whole number."""

Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
"""A positive number."""

Clock = Annotated[float, Field(gt=0, le=100_000, strict=True, allow_inf_nan=False)]
"""A clock, in MHz; whoever writes Hz is told."""

# What a field's name ends with, the longest first, and how that is written.
UNITS: Final[Mapping[str, str]] = {
    "_pj_per_bit": "pJ/bit",
    "_pj_per_cycle": "pJ/cycle",
    "_pj_per_transition": "pJ/transition",
    "_pj_per_word": "pJ/word",
    "_bits_per_cycle": "bit/cycle",
    "_macs_per_cycle": "MAC/cycle",
    "_kib": "KiB",
    "_mib": "MiB",
    "_bytes": "byte",
    "_bits": "bit",
    "_mhz": "MHz",
    "_pj": "pJ",
}


def unit_of(field: str) -> str:
    """Unit that the name of a field says; "" for counts and ratios."""
    return next((unit for ending, unit in UNITS.items() if f"_{field}".endswith(ending)), "")


class Data(BaseModel):
    """A part of a description: nothing in it changes, and it has no other fields than these."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Data):
    """Where numbers come from.

    Attributes
    ----------
    text
        A reference, or how the numbers were found.
    basis
        ``published`` by the makers of the accelerator, in a paper or in their code; ``measured``
        or ``inferred`` by those who wrote the description; or an ``example``, made up to show the
        way.
    """

    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    basis: Literal["published", "measured", "inferred", "example"]


class Number(Data, Generic[T]):
    """A number, or a table of numbers, and the key of its source.

    Attributes
    ----------
    value
        The number, in the unit that the field's name says.
    source
        A key of the description's ``sources``.
    """

    value: T
    source: str = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One number of a description: field, value, unit, and the key of its source."""

    field: str
    value: Any
    unit: str
    source: str


def entries(data: BaseModel, prefix: str = "") -> Iterator[Entry]:
    """All numbers of a description, in its order; tables one row a line."""
    for attribute, declared in type(data).model_fields.items():
        value = getattr(data, attribute)
        name = declared.alias or attribute
        if isinstance(value, Number):
            field, unit = f"{prefix}{name}", unit_of(name)
            if not isinstance(value.value, Mapping):
                yield Entry(field, value.value, unit, value.source)
                continue
            for key, number in value.value.items():
                yield Entry(f"{field}[{key}]", number, unit, value.source)
        elif isinstance(value, BaseModel):
            yield from entries(value, f"{prefix}{name}.")


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses a field that stands twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            found = self.construct_object(key, deep=True)
            if found in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"{found!r} stands twice", problem_mark=key.start_mark
                )
            keys.append(found)
        return super().construct_mapping(node, deep)


class Document:
    """A YAML document, and where in it a field stands.

    Parameters
    ----------
    text
        The document.
    where
        The file, for messages.

    Raises
    ------
    UsageError
        If it is no YAML document of fields.
    """

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        try:
            loader = _Loader(text)
            self._node = loader.get_single_node()
            data = None if self._node is None else loader.construct_document(self._node)
        except Exception as error:  # PyYAML raises many kinds
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None)
            raise UsageError(
                f"not a YAML document ({problem or first_line(error)})",
                where=where if mark is None else f"{where}:{mark.line + 1}",
            ) from error
        if not isinstance(data, dict):
            raise UsageError(
                "not a description of an accelerator: it has no fields",
                where=where,
                fix="see docs/write-a-target.md",
            )
        self.data: dict[str, Any] = data

    def error(self, path: Iterable[str | int], what: str, fix: str | None = None) -> UsageError:
        """Make an error about a field, with its line."""
        # pydantic's words for a key, and for one of several types, stand in no document.
        path = tuple(part for part in path if part != "[key]" and "Number[" not in str(part))
        field = ".".join(map(str, path))
        return UsageError(
            f"field {field!r}: {what}" if path else what,
            where=f"{self.where}:{self._line(path)}",
            fix=fix
            or "see docs/write-a-target.md; bitwright targets show TAG --json prints one that "
            "works",
        )

    def _line(self, path: tuple[str | int, ...]) -> int:
        node, line = self._node, 1
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = [pair for pair in node.value if pair[0].value == str(part)]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                found = [(entry, entry) for entry in node.value[part : part + 1]]
            else:
                found = []
            if not found:
                break
            line = found[0][0].start_mark.line + 1
            node = found[0][1]
        return line

    def validate(self, kind: type[_Model], data: object, path: tuple[str, ...] = ()) -> _Model:
        """Check a part of the document.

        Parameters
        ----------
        kind
            What it has to be.
        data
            The part.
        path
            Where it stands in the document.

        Raises
        ------
        UsageError
            If it is something else: the first field that is wrong, its line, and the way out.
        """
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            # An unknown field explains why another is missing.
            found = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
            first = found[0]
            what, fix = _explain(kind, first["type"], first["loc"], first["msg"], first["input"])
            raise self.error((*path, *first["loc"]), what, fix) from None


def _explain(
    kind: type[BaseModel], problem: str, path: tuple[str | int, ...], message: str, given: object
) -> tuple[str, str | None]:
    """What is wrong with a field, and the way out, if one is known."""
    name = str(path[-1]) if path else ""
    if problem == "extra_forbidden":
        near = difflib.get_close_matches(name, sorted(_names_at(kind, path[:-1])), n=1)
        return "there is no such field", f"did you mean {near[0]!r}?" if near else None
    if problem == "missing":
        return "is missing", "name a key of 'sources'" if name == "source" else None
    quantity = [str(part) for part in path if unit_of(str(part))]
    unit = f": its unit is {unit_of(quantity[-1])}" if quantity else ""
    if isinstance(given, str) and problem in ("int_type", "float_type"):
        # YAML 1.1 takes 1e3 for a text.
        number = _number(given)
        return f"{given!r} is no number", f"write {number or 'the number alone'}{unit}"
    if problem in ("model_type", "model_attributes_type") and _takes_number(kind, path):
        value = "..." if given is None else repr(given)
        return "has no source", f"write {{value: {value}, source: KEY}}, KEY one of 'sources'"
    shown = f", not {given!r}" if isinstance(given, int | float | str) and given != "" else ""
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, "), None
    return message + shown, f"write the number alone{unit}" if unit else None


def _number(text: str) -> str | None:
    """A number as YAML reads it, where a text is one."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return str(int(number)) if number.is_integer() else repr(number)


_Model = TypeVar("_Model", bound=BaseModel)


def parts_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation: those of ``A | None`` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from parts_of(part)


def _kinds_at(kind: type[BaseModel], path: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The models that the field at a path can be."""
    kinds = [kind]
    for part in path:
        fields = [
            field
            for found in kinds
            for name, field in found.model_fields.items()
            if str(part) in (name, field.alias)
        ]
        kinds = [p for field in fields for p in parts_of(field.annotation)] or kinds
    return kinds


def _names_at(kind: type[BaseModel], path: tuple[str | int, ...]) -> set[str]:
    """Names of the fields beside the one at a path."""
    return {
        field.alias or name
        for found in _kinds_at(kind, path)
        for name, field in found.model_fields.items()
    }


def _takes_number(kind: type[BaseModel], path: tuple[str | int, ...]) -> bool:
    """Whether the field at a path is a number with a source."""
    return any(issubclass(found, Number) for found in _kinds_at(kind, path))
