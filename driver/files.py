"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from bitwright.errors import OutputError

__all__ = ["check_writable", "write_atomically"]


def check_writable(path: str | Path, *, overwrite: bool, model: str | Path | None = None) -> Path:
    """Refuse an output path before the work starts rather than after it.

    Parameters
    ----------
    path
        Where the output goes.
    overwrite
        Whether it may exist.
    model
        The float model that is read, which an output must not replace.

    Raises
    ------
    OutputError
        If the file exists (and ``overwrite`` is not set), is the model or no regular file, or its
        folder is missing or read-only.
    """
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long, say
        raise OutputError(f"cannot be written ({error.strerror})", where=str(path)) from error
    if path.is_dir():
        raise OutputError("is a folder; give the name of a file", where=str(path))
    if exists and not overwrite:
        raise OutputError(
            "exists already",
            where=str(path),
            fix="choose another name, or overwrite it (--overwrite)",
        )
    if exists and model is not None and path.resolve() == Path(model).resolve():
        raise OutputError(
            "is the float model itself, which would be lost", where=str(path), fix="choose another"
        )
    if exists and not path.is_file():  # a result takes the place of what was there, even a device's
        raise OutputError("is not a regular file; give another name", where=str(path))
    if not path.parent.is_dir():
        raise OutputError(
            f"the folder {str(path.parent)!r} does not exist", where=str(path), fix="make it first"
        )
    if not os.access(path.parent, os.W_OK):
        raise OutputError(
            f"the folder {str(path.parent)!r} is read-only", where=str(path), fix="choose another"
        )
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    Raises
    ------
    OutputError
        If the disk is full or refuses; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".bitwright-", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot be written ({error.strerror or error})",
                where=str(path),
                fix="nothing was left behind; free some space or choose another folder",
            ) from error
        raise
