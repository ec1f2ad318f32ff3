"""The exceptions bitwright raises on purpose.

Every message says what is wrong, where (file, node, field) and what to do about it. The command
line prints the message alone and exits with ``exit_code``: 2 where the input or the request has to
change, 1 where a correct request failed while running.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BitwrightError",
    "DataError",
    "Interrupted",
    "ModelError",
    "OutputError",
    "PlanError",
    "RunError",
    "StudyError",
    "UsageError",
    "first_line",
]


_LONGEST = 700  # characters of a line


class BitwrightError(Exception):
    """Base of all errors that are meant for the user.

    Parameters
    ----------
    what
        What is wrong, in one sentence, without a full stop.
    where
        The file, node or field concerned.
    fix
        What the user can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        if fix is None and "\n  " in what:  # one of ours that came through TVM as a text
            what, fix = what.split("\n  ", 1)
        self.what = what
        self.where = where
        self.fix = fix
        head = _one_line(f"{where}: {what}" if where else what)
        super().__init__(f"{head}\n  {_one_line(fix)}" if fix else head)


def _one_line(text: str) -> str:
    """A text as it can be shown: names come from files and may hold anything, at any length."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def first_line(error: BaseException) -> str:
    """Kind and first line of an error of another library, to stand inside one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class UsageError(BitwrightError):
    """The options of a call contradict each other or are out of range."""


class ModelError(BitwrightError):
    """The ONNX model cannot be read, is not valid, or holds what bitwright cannot take."""


class PlanError(BitwrightError):
    """A precision or a precision plan is not valid or does not fit the model."""


class ArtifactError(BitwrightError):
    """An artefact is damaged, made by a newer version, or not made for this machine."""


class DataError(BitwrightError):
    """Calibration or evaluation data cannot be read or do not fit the model."""


class OutputError(BitwrightError):
    """A result cannot be written: it exists already, or the disk refuses."""


class StudyError(BitwrightError):
    """A study is damaged, in use, of another version, or does not hold what is asked for."""


class Interrupted(BitwrightError):
    """The user stopped the work; nothing half-written is left."""


class RunError(BitwrightError):
    """A correct request failed while running."""

    exit_code = 1
