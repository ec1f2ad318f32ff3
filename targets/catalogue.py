"""Where accelerators come from.

A description is a YAML file. Those of a package are found by the entry-point group
``bitwright.targets``, which names packages that hold such files; the file of a user is named by its
path. Links that belong to no accelerator are files in ``targets/links``, or a user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Final

from bitwright.errors import UsageError, first_line
from bitwright.targets.accelerators import Accelerator
from bitwright.targets.cost_model import load_model
from bitwright.targets.link import Link, LinkDescription
from bitwright.targets.schema import Document, entries

__all__ = [
    "Installed",
    "available",
    "available_links",
    "get",
    "get_link",
    "installed",
    "is_file",
]

SCHEMA_VERSION: Final = 1

_GROUP: Final = "bitwright.targets"
_LINKS: Final = "bitwright.targets.links"


def _check_version(document: Document) -> None:
    version = document.data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise document.error(
            ["schema_version"],
            f"is {version!r}" if "schema_version" in document.data else "is missing",
            f"this version of bitwright reads schema version {SCHEMA_VERSION}",
        )


def _check_sources(document: Document, described: Accelerator | LinkDescription) -> None:
    """Refuse a description that names a source which it has not."""
    named: list[tuple[tuple[str, ...], str]] = []
    if isinstance(described, Accelerator):
        named.append((("precisions",), described.precisions.source))
    if described.link is not None:
        named.append((("link",), described.link.source))
    named += [(tuple(e.field.split("[")[0].split(".")), e.source) for e in entries(described)]
    for path, source in named:
        if source not in described.sources:
            raise document.error(
                [*path, "source"],
                f"there is no source {source!r}",
                f"name one of {', '.join(described.sources)}, or add it to 'sources'",
            )


def _read(text: str, where: str, folder: Path | None = None) -> Accelerator:
    """Read a description; ``folder`` is where the code of its cost model may lie."""
    document = Document(text, where)
    data = dict(document.data)
    _check_version(document)
    cost = data.get("cost")
    if cost is not None:
        if not isinstance(cost, dict) or not isinstance(cost.get("model"), str):
            raise document.error(["cost", "model"], "must be there: the name of a cost model")
        try:
            kind = load_model(cost["model"], folder)
        except UsageError as error:
            raise document.error(["cost", "model"], error.what, error.fix) from error
        try:
            data["cost"] = document.validate(kind, cost, ("cost",))
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # checks of others may raise anything
            raise document.error(["cost"], f"the model refuses it ({first_line(error)})") from error
    accelerator = document.validate(Accelerator, data)
    _check_sources(document, accelerator)
    model = accelerator.cost_model
    if model is None:
        return accelerator
    try:
        every = (*accelerator.allowed_precisions, *accelerator.soft_edge_precisions)
        wrong = model.check_precisions(frozenset(every))
        field, what = wrong or ("", "")
    except (Exception, SystemExit) as error:
        raise document.error(["cost"], f"the model refuses it ({first_line(error)})") from error
    if wrong:
        raise document.error(["cost", field], what)
    return accelerator


def _read_link(text: str, where: str) -> LinkDescription:
    """Read the description of a link that belongs to no accelerator."""
    document = Document(text, where)
    _check_version(document)
    found = document.validate(LinkDescription, document.data)
    _check_sources(document, found)
    return found


@dataclass(frozen=True, slots=True)
class Installed:
    """The accelerators that are installed.

    Attributes
    ----------
    accelerators
        Those that work, by name.
    problems
        Why others do not: a description that cannot be read, a package that cannot be imported.
    clashes
        Names that are described twice, and by whom.
    """

    accelerators: Mapping[str, Accelerator]
    problems: tuple[UsageError, ...]
    clashes: Mapping[str, UsageError]


def installed() -> Installed:
    """Find the accelerators of all packages; one that is broken does not stand in others' way."""
    found: dict[str, list[tuple[str, Accelerator]]] = {}
    problems: list[UsageError] = []
    # An installation that is listed twice counts once.
    for package in dict.fromkeys(entry.value for entry in entry_points(group=_GROUP)):
        try:
            texts = {
                entry.name: entry.read_text(encoding="utf-8")
                for entry in sorted(files(package).iterdir(), key=lambda entry: entry.name)
                if entry.name.endswith((".yaml", ".yml"))
            }
        except (Exception, SystemExit) as error:  # a package of others may raise anything
            problems.append(
                UsageError(
                    f"the accelerators of {package!r} cannot be loaded ({first_line(error)})",
                    fix=f"an entry point of {_GROUP} names a package that holds YAML files",
                )
            )
            continue
        if not texts:
            problems.append(
                UsageError(
                    f"the package {package!r} holds no description (.yaml)",
                    fix="list them as its package data; see docs/write-a-target.md",
                )
            )
        for name, text in texts.items():
            owner = f"{package}, {name}"
            try:
                accelerator = _read(text, owner)
            except UsageError as error:
                problems.append(error)
            else:
                found.setdefault(accelerator.name, []).append((owner, accelerator))
    clashes = {
        name: UsageError(
            f"accelerator {name!r} is described twice: by "
            + " and by ".join(owner for owner, _ in claims),
            fix="remove one of them",
        )
        for name, claims in found.items()
        if len(claims) > 1
    }
    working = {name: claims[0][1] for name, claims in found.items() if len(claims) == 1}
    return Installed(dict(sorted(working.items())), tuple(problems), clashes)


def available() -> Mapping[str, Accelerator]:
    """The accelerators that are installed and work, by name."""
    return installed().accelerators


def is_file(name: str | Path) -> bool:
    """Whether an accelerator is named by the path of its description."""
    return Path(name).suffix in (".yaml", ".yml")


def _text_of(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError("there is no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read ({first_line(error)})", where=str(path)) from error


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
        return _read(_text_of(name), str(name), Path(name).parent)
    found = installed()
    if str(name) in found.accelerators:
        return found.accelerators[str(name)]
    if str(name) in found.clashes:
        raise found.clashes[str(name)]
    near = difflib.get_close_matches(str(name), found.accelerators, n=1)
    near += [f"{name}{ending}" for ending in (".yaml", ".yml") if Path(f"{name}{ending}").is_file()]
    fix = (
        f"choose one of {', '.join(found.accelerators)}, or give the path of a description (.yaml)"
    )
    if near:
        fix = f"did you mean {' or '.join(near)}? Or {fix}"
    broken = "; ".join(f"{problem.where or ''} {problem.what}" for problem in found.problems)
    if broken:
        fix = f"{fix}. Not all could be read: {broken.strip()}"
    raise UsageError(f"there is no accelerator {str(name)!r}", fix=fix)


def available_links() -> Mapping[str, LinkDescription]:
    """The links that ship and belong to no accelerator, by name."""
    found = [
        _read_link(entry.read_text(encoding="utf-8"), f"{_LINKS}, {entry.name}")
        for entry in files(_LINKS).iterdir()
        if entry.name.endswith(".yaml")
    ]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}


def get_link(name: str | Path) -> Link:
    """Find a link.

    Parameters
    ----------
    name
        A name out of :func:`available_links`; an accelerator's name, for the link it describes; or
        the path of a description of either kind (``.yaml`` or ``.yml``).

    Raises
    ------
    UsageError
        If there is no such link, its description cannot be read, or the accelerator describes none.
    """
    presets = available_links()
    if str(name) in presets:
        return presets[str(name)].link
    if is_file(name):
        text = _text_of(name)
        if not {"precisions", "tvm_target"} & Document(text, str(name)).data.keys():
            return _read_link(text, str(name)).link
    elif str(name) not in (found := installed()).accelerators and str(name) not in found.clashes:
        linked = [entry.name for entry in found.accelerators.values() if entry.link is not None]
        near = difflib.get_close_matches(str(name), [*presets, *linked], n=1)
        raise UsageError(
            f"there is no link {str(name)!r}",
            fix=(f"did you mean {near[0]}? Or " if near else "")
            + f"choose one of {', '.join([*presets, *linked])}, or give the path of a description "
            "(.yaml)",
        )
    accelerator = get(name)
    if accelerator.link is None:
        raise UsageError(
            f"{accelerator.name} describes no link",
            where=str(name) if is_file(name) else None,
            fix="add 'link' to its description (see docs/write-a-target.md), or choose one of "
            + ", ".join(presets),
        )
    return accelerator.link
