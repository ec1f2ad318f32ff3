from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.errors import OutputError
from bitwright.files import check_writable, write_atomically


def test_written_content_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    content = os.urandom(1 << 20)
    write_atomically(path, content)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_empty_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.bin", b"")
    assert (tmp_path / "a.bin").read_bytes() == b""


def test_an_existing_file_is_replaced_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new content")
        assert reader.read() == b"old"  # whoever had it open goes on reading the old one
    assert path.read_bytes() == b"new content"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_result_is_as_readable_as_any_other_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "ours", b"")
        (tmp_path / "other").write_bytes(b"")
        assert os.umask(mask) == mask, "the mask of the process was changed"
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "other")]
    assert modes[0] == modes[1] == 0o666 & ~mask


def test_folder_that_has_gone_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.bin"
    path.parent.mkdir()
    assert check_writable(path, overwrite=False) == path
    path.parent.rmdir()
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_atomically(path, b"content")
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_folder_that_has_come_to_the_place_of_the_file_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.mkdir()
    (path / "content").write_text("precious")
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomically(path, b"content")
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "content").read_text() == "precious"


STOP = """
import os, pathlib, signal, sys
from bitwright.files import write_atomically

def stop(event, arguments):
    if event == {event!r} and str(arguments[0]).endswith(".tmp"):
        os.kill(os.getpid(), signal.{signal})

sys.addaudithook(stop)  # Python calls it for every file opened, renamed, ...
write_atomically(pathlib.Path({path!r}), bytes(1000))
"""


@pytest.mark.parametrize("event", ["open", "os.chmod", "os.rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c_while_writing(tmp_path: Path, event: str, existing: bool) -> None:
    """Whenever the signal comes: the old file or the new one, and no other."""
    path = tmp_path / "a.bin"
    if existing:
        path.write_bytes(b"old")
    code = STOP.format(event=event, path=str(path), signal="SIGINT")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "KeyboardInterrupt" in done.stderr  # goes on to whoever called
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    if existing:
        assert path.read_bytes() == b"old"


def test_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = STOP.format(event="os.rename", path=str(path), signal="SIGKILL")
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


def test_checks_of_an_output(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert check_writable(str(path), overwrite=False) == path
    assert check_writable(path, overwrite=True) == path
    assert not path.exists()
    path.write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        check_writable(path, overwrite=False)
    assert check_writable(path, overwrite=True) == path
    assert path.read_text() == "old"


def test_an_output_in_the_working_folder_needs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically(check_writable("a.bin", overwrite=False), b"content")
    assert (tmp_path / "a.bin").read_bytes() == b"content"


@pytest.mark.parametrize("overwrite", [False, True])
def test_outputs_that_cannot_be(tmp_path: Path, overwrite: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in (".", "missing/a.bin", "file/a.bin", "pipe", "x" * 300):
        with pytest.raises(OutputError) as caught:
            check_writable(tmp_path / name, overwrite=overwrite)
        assert str(tmp_path) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_link_to_nowhere_is_replaced(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    write_atomically(check_writable(link, overwrite=False), b"content")
    assert link.read_bytes() == b"content"
    assert not (tmp_path / "nowhere").exists()


def test_an_output_does_not_replace_the_model(tmp_path: Path) -> None:
    model, other = tmp_path / "model.onnx", tmp_path / "other.onnx"
    model.write_bytes(b"weights")
    other.symlink_to(model)
    for path in (model, other):
        with pytest.raises(OutputError, match="is the float model itself"):
            check_writable(path, overwrite=True, model=str(model))
    with pytest.raises(OutputError, match="exists already"):
        check_writable(model, overwrite=False, model=model)
    assert check_writable(tmp_path / "new", overwrite=True, model=model) == tmp_path / "new"
