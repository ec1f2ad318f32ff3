"""A search on disk: a folder with one SQLite file that holds every evaluation.

Each evaluation is committed when it is finished, so a search that is killed has lost nothing but
the plan it was running. The state of the search itself is not stored: the algorithm is repeated
from its seed, and its questions are answered from here until a new one comes.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from bitwright.errors import OutputError, PlanError, StudyError, first_line
from bitwright.search.results import Result, Status
from bitwright.search.space import Plan
from bitwright.vocabulary import Precision

__all__ = ["SCHEMA_VERSION", "Evaluation", "Generation", "Study", "is_study", "plan_text"]

SCHEMA_VERSION: Final = 1
_FILE: Final = "study.sqlite"
_LOCK: Final = "lock"

_TABLES: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE evaluations (
    number INTEGER PRIMARY KEY,
    plan TEXT NOT NULL UNIQUE,
    origin TEXT NOT NULL,
    status TEXT NOT NULL,
    error REAL,
    overall REAL,
    samples INTEGER NOT NULL,
    seconds REAL NOT NULL,
    message TEXT NOT NULL,
    gains TEXT NOT NULL,
    finished REAL NOT NULL
);
CREATE TABLE generations (
    number INTEGER PRIMARY KEY,
    evaluations INTEGER NOT NULL,
    hypervolume REAL NOT NULL,
    seconds REAL NOT NULL
);
CREATE TABLE tests (plan TEXT PRIMARY KEY, error REAL NOT NULL, samples INTEGER NOT NULL);
CREATE TABLE sensitivity (
    layer TEXT NOT NULL,
    precision TEXT NOT NULL,
    error REAL,
    message TEXT NOT NULL,
    PRIMARY KEY (layer, precision)
);
"""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One plan and what was found about it.

    Attributes
    ----------
    number
        Its number in the study, from 1, in the order in which plans were asked for.
    plan
        The precision of every layer.
    origin
        ``baseline``, ``start`` (initial population), ``search``.
    result
        What the evaluator found.
    gains
        What the accelerator gains, by name; those its cost model does not define are missing.
    """

    number: int
    plan: Plan
    origin: str
    result: Result
    gains: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Generation:
    """How far a search was after one generation.

    Attributes
    ----------
    number
        From 0, the initial population.
    evaluations
        Plans evaluated so far.
    hypervolume
        Of the front so far; 0 at the reference point, 1 if one plan had the best of everything.
    seconds
        Since the search began, without interruptions.
    """

    number: int
    evaluations: int
    hypervolume: float
    seconds: float


def plan_text(plan: Plan) -> str:
    """A plan as it stands in the study: precisions in the order of the layers."""
    return ",".join(map(str, plan))


def is_study(path: str | Path) -> bool:
    """Whether a folder holds a study."""
    try:
        return (Path(path) / _FILE).is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


class Study:
    """Access to a study; use it as a context manager.

    Parameters
    ----------
    folder
        The folder.
    write
        Whether evaluations are to be added; only one process at a time can.

    Raises
    ------
    StudyError
        If there is no study, it is damaged, of a newer schema, or used by another process.
    OutputError
        If it cannot be written.
    """

    def __init__(self, folder: str | Path, *, write: bool = False) -> None:
        self.folder = Path(folder)
        self._where = str(folder)
        self._lock: int | None = None
        self._write = False
        file = self.folder / _FILE
        if not is_study(folder):
            raise StudyError(
                "is no study",
                where=self._where,
                fix="give the folder that bitwright search wrote (--output)",
            )
        if write:
            self._lock = _acquire(self.folder)
        try:
            # For reading too: what a killed search had half written is taken back. On a read-only
            # disk SQLite reads only.
            with self._guarded():
                self._database = _connect(file)
            self._check()
            if write:
                # One write to the end of a file for each commit. What a power failure can lose are
                # the last evaluations, what a kill can lose is nothing.
                with self._guarded(writing=True):
                    self._database.execute("PRAGMA journal_mode = WAL")
                    self._database.execute("PRAGMA synchronous = NORMAL")
                self._write = True
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, folder: str | Path, meta: Mapping[str, Any]) -> Study:
        """Make a new study.

        Parameters
        ----------
        folder
            A folder that does not exist yet, or is empty.
        meta
            What the search is: written once, JSON.

        Raises
        ------
        OutputError
            If the folder exists and is not empty, or cannot be written.
        """
        folder = Path(folder)
        check_new(folder)
        made = not folder.exists()
        temporary = folder / f".{_FILE}.{os.getpid()}"
        try:
            folder.mkdir(exist_ok=True)
            with closing(sqlite3.connect(temporary)) as database, database:
                database.executescript(_TABLES)
                rows = [("schema", SCHEMA_VERSION), *meta.items()]
                database.executemany(
                    "INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in rows]
                )
            temporary.replace(folder / _FILE)
        except (OSError, sqlite3.Error) as error:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
                temporary.with_name(f"{temporary.name}-journal").unlink(missing_ok=True)
                if made:
                    folder.rmdir()
            raise OutputError(f"cannot be written ({error})", where=str(folder)) from error
        return cls(folder, write=True)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        database = getattr(self, "_database", None)
        if database is not None:
            if self._write:
                # One file again, which can be read where nothing can be written.
                with suppress(sqlite3.Error):  # somebody reads it at the moment
                    database.execute("PRAGMA journal_mode = DELETE")
            database.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check(self) -> None:
        with self._guarded():
            found = self._database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
            version = None if found is None else json.loads(found[0])
            if not isinstance(version, int):
                raise TypeError(f"schema version {version}")
        if version != SCHEMA_VERSION:
            older = version < SCHEMA_VERSION
            raise StudyError(
                f"has schema version {version}; this version of bitwright reads {SCHEMA_VERSION}",
                where=self._where,
                fix="search again into another folder"
                if older
                else "use the version of bitwright that wrote it",
            )

    @contextmanager
    def _guarded(self, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if writing:
                raise OutputError(
                    f"cannot be written ({text})",
                    where=self._where,
                    fix="all finished evaluations are in it; mend the cause, then go on with "
                    "bitwright search --resume",
                ) from error
            raise StudyError(f"cannot be read ({text})", where=self._where) from error
        except (sqlite3.Error, PlanError, ValueError, TypeError, AttributeError) as error:
            raise StudyError(
                f"is damaged ({first_line(error)})",
                where=self._where,
                fix="restore it from a copy, or search again into another folder",
            ) from error

    # -- what the search is --------------------------------------------------------------------

    def meta(self, key: str) -> Any:
        """What was written under a key; None if nothing was."""
        with self._guarded():
            row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        """Write under a key."""
        with self._guarded(writing=True), self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value))
            )

    # -- evaluations ---------------------------------------------------------------------------

    def add(self, evaluation: Evaluation) -> None:
        """Write an evaluation; no kill of the process can lose it when this returns."""
        result = evaluation.result
        row = (
            evaluation.number,
            plan_text(evaluation.plan),
            evaluation.origin,
            result.status,
            result.error,
            result.overall,
            result.samples,
            result.seconds,
            result.message,
            json.dumps(dict(evaluation.gains)),
            time.time(),
        )
        with self._guarded(writing=True), self._database:
            self._database.execute(
                "INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row
            )

    def evaluations(self) -> list[Evaluation]:
        """All evaluations, by number."""
        with self._guarded():
            rows = self._database.execute(
                "SELECT number, plan, origin, status, error, overall, samples, seconds, message,"
                " gains FROM evaluations ORDER BY number"
            ).fetchall()
            return [_evaluation(*row) for row in rows]

    def last_finished(self) -> float | None:
        """When the last evaluation was finished, in seconds since 1970; None before the first."""
        with self._guarded():
            (found,) = self._database.execute("SELECT MAX(finished) FROM evaluations").fetchone()
        return None if found is None else float(found)

    # -- the course of the search --------------------------------------------------------------

    def set_generation(self, generation: Generation) -> None:
        """Write how far the search is; what was written before is left as it is."""
        with self._guarded(writing=True), self._database:
            self._database.execute(
                "INSERT OR IGNORE INTO generations VALUES (?, ?, ?, ?)",
                (
                    generation.number,
                    generation.evaluations,
                    generation.hypervolume,
                    generation.seconds,
                ),
            )

    def generations(self) -> list[Generation]:
        """How far the search was after each generation."""
        with self._guarded():
            rows = self._database.execute(
                "SELECT number, evaluations, hypervolume, seconds FROM generations ORDER BY number"
            ).fetchall()
        return [Generation(*row) for row in rows]

    # -- errors on test data, sensitivity ------------------------------------------------------

    def set_test(self, plan: Plan, error: float, samples: int) -> None:
        """Write a plan's error on the test data."""
        with self._guarded(writing=True), self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO tests VALUES (?, ?, ?)", (plan_text(plan), error, samples)
            )

    def tests(self) -> dict[str, tuple[float, int]]:
        """Errors on the test data and numbers of samples, by the text of the plan."""
        with self._guarded():
            rows = self._database.execute("SELECT plan, error, samples FROM tests").fetchall()
        return {plan: (error, samples) for plan, error, samples in rows}

    def set_sensitivity(self, layer: str, precision: Precision, result: Result) -> None:
        """Write the error of a plan in which one layer alone has a precision."""
        with self._guarded(writing=True), self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO sensitivity VALUES (?, ?, ?, ?)",
                (layer, str(precision), result.error, result.message),
            )

    def sensitivity(self) -> dict[str, dict[Precision, float | None]]:
        """Layer name and precision to error; None where it failed."""
        with self._guarded():
            rows: Sequence[tuple[str, str, float | None]] = self._database.execute(
                "SELECT layer, precision, error FROM sensitivity"
            ).fetchall()
            found: dict[str, dict[Precision, float | None]] = {}
            for layer, text, error in rows:
                found.setdefault(layer, {})[Precision.parse(text)] = error
        return found


def _evaluation(number: int, plan: str, origin: str, status: Any, *rest: Any) -> Evaluation:
    error, overall, samples, seconds, message, gains = rest
    if status not in get_args(Status):
        raise ValueError(f"evaluation {number} has the status {status!r}")
    return Evaluation(
        number,
        tuple(Precision.parse(text) for text in plan.split(",")),
        origin,
        Result(status, error, overall, samples, seconds, message),
        {str(name): float(value) for name, value in json.loads(gains).items()},
    )


def _connect(file: Path) -> sqlite3.Connection:
    uri = file.resolve().as_uri()
    database = sqlite3.connect(f"{uri}?mode=rw", uri=True, timeout=10)
    try:
        database.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:
        database.close()
        if os.access(file.parent, os.W_OK):
            raise
        wal = file.with_name(f"{file.name}-wal")
        if wal.is_file() and wal.stat().st_size:
            raise  # without the index of this file, what it holds would be left out
        # Left behind by a killed search, and now where SQLite can write nothing beside it.
        database = sqlite3.connect(f"{uri}?immutable=1", uri=True)
    except BaseException:
        database.close()
        raise
    return database


def check_new(folder: Path) -> None:
    """Refuse a folder for a new study before the work starts.

    Raises
    ------
    OutputError
        If it is not empty, or cannot be made.
    """
    where = str(folder)
    if is_study(folder):
        raise OutputError(
            "holds a study already",
            where=where,
            fix="go on with it (bitwright search --resume), or choose another folder",
        )
    try:
        # What a process left behind that was killed while it made a study counts for nothing.
        if folder.exists() and (
            not folder.is_dir()
            or any(not entry.name.startswith(f".{_FILE}.") for entry in folder.iterdir())
        ):
            raise OutputError(
                "exists already", where=where, fix="choose a folder that is empty or not there"
            )
    except OSError as error:
        raise OutputError(f"cannot be used ({error.strerror})", where=where) from error
    parent = folder if folder.is_dir() else folder.absolute().parent
    if not parent.is_dir():
        raise OutputError(
            f"the folder {str(parent)!r} does not exist", where=where, fix="make it first"
        )
    if not os.access(parent, os.W_OK):
        raise OutputError("is read-only", where=str(parent), fix="choose another folder")


def discard_empty(folder: Path) -> None:
    """Remove a new study in which no search has begun."""
    with Study(folder) as study:
        begun = any(entry.origin != "baseline" for entry in study.evaluations())
    if not begun:
        for name in (_FILE, f"{_FILE}-wal", f"{_FILE}-shm", _LOCK):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # the user may have made it, or put something there
            folder.rmdir()


def _acquire(folder: Path) -> int:
    """Make this process the only one that writes."""
    try:
        handle = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise OutputError(
            f"cannot be written ({error.strerror})",
            where=str(folder),
            fix="its evaluations can still be read: bitwright front",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if not isinstance(error, BlockingIOError):  # some network file systems have no locks
            raise OutputError(
                f"cannot be locked ({error.strerror})",
                where=str(folder),
                fix="copy it to a local disk",
            ) from error
        raise StudyError(
            "is being written by another search",
            where=str(folder),
            fix="wait for it, or stop it",
        ) from None
    return handle
