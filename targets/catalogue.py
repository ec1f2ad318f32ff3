"""Where accelerators come from.

A description is a YAML file. Those of a package are found by the entry-point group
``bitwright.targets``, which names packages that hold such files; the file of a user is named by its
path.
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
from bitwright.targets.schema import Document, entries

__all__ = ["Installed", "available", "get", "installed", "is_file"]

SCHEMA_VERSION: Final = 1

_GROUP: Final = "bitwright.targets"


def _read(text: str, where: str, folder: Path | None = None) -> Accelerator:
    """Read a description; ``folder`` is where the code of its cost model may lie."""
    document = Document(text, where)
    data = dict(document.data)
    version = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise document.error(
            ["schema_version"],
            f"is {version!r}" if "schema_version" in data else "is missing",
            f"this version of bitwright reads schema version {SCHEMA_VERSION}",
        )
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
    named: list[tuple[tuple[str, ...], str]] = [(("precisions",), accelerator.precisions.source)]
    if accelerator.link is not None:
        named.append((("link",), accelerator.link.source))
    named += [(tuple(e.field.split("[")[0].split(".")), e.source) for e in entries(accelerator)]
    for path, source in named:
        if source not in accelerator.sources:
            raise document.error(
                [*path, "source"],
                f"there is no source {source!r}",
                f"name one of {', '.join(accelerator.sources)}, or add it to 'sources'",
            )
    model = accelerator.cost_model
    if model is None:
        return accelerator
    try:
        wrong = model.check_precisions(frozenset(accelerator.allowed_precisions))
        field, what = wrong or ("", "")
    except (Exception, SystemExit) as error:
        raise document.error(["cost"], f"the model refuses it ({first_line(error)})") from error
    if wrong:
        raise document.error(["cost", field], what)
    return accelerator


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
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError("there is no such file", where=str(name)) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot be read ({first_line(error)})", where=str(name)) from error
        return _read(text, str(name), path.parent)
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
