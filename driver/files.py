"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from bitwright.errors import OutputError

__all__ = ["check_writable", "write_atomically"]


def check_writable(path: str | Path, *, overwrite: bool) -> Path:
    """Refuse an output path before the work starts rather than after it.

    Raises
    ------
    OutputError
        If the file exists (and ``overwrite`` is not set), is a folder, or its folder is missing or
        read-only.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError("is a folder; give the name of a file", where=str(path))
    if path.exists() and not overwrite:
        raise OutputError(
            "exists already", where=str(path), fix="choose another name, or allow overwriting it"
        )
    if not path.parent.is_dir():
        raise OutputError(
            f"the folder {str(path.parent)!r} does not exist", where=str(path), fix="make it first"
        )
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"the folder {str(path.parent)!r} is read-only", where=str(path))
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    Raises
    ------
    OutputError
        If the disk is full or refuses; nothing is left behind.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot be written ({error.strerror or error})",
                where=str(path),
                fix="nothing was left behind; free some space or choose another folder",
            ) from error
        raise
