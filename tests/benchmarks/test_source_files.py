"""The corpus of source files: pieces, labels, and that no package is in both parts."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import source_files as corpus
from benchmarks.models import Package
from benchmarks.source_files import CALIBRATION, LENGTH, TEST, SourceFile, spread

HEADER = b"#" * 200


def test_no_package_is_in_both_parts() -> None:
    names = [package.name for package in (*CALIBRATION, *TEST)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "count, most, expected",
    [(0, 3, []), (2, 3, [0, 1]), (3, 3, [0, 1, 2]), (9, 3, [0, 4, 8]), (100, 2, [0, 99])],
)
def test_indices_are_evenly_spread(count: int, most: int, expected: list[int]) -> None:
    assert spread(count, most) == expected


def archive(folder: Path, suffix: str, files: dict[str, bytes]) -> Path:
    path = folder / f"package-1.0{suffix}"
    if suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as source:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                source.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
def test_pieces_of_a_package(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = bytes(range(0x20, 0x7F)) * 6
    files = {
        "b/module.py": HEADER + body,
        "a/style.css": HEADER + b"\t\r\n" + body,
        "a/short.py": HEADER + body[: LENGTH - 1],
        "a/umlaut.py": HEADER + "ü".encode() + body,
        "a/jquery.min.js": HEADER + body,
        "a/picture.png": HEADER + body,
    }
    path = archive(tmp_path, suffix, files)
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "download", lambda *_: path)
    monkeypatch.setattr(corpus, "CALIBRATION", (Package("package", "1.0", "MIT", ("",)),))
    monkeypatch.setattr(corpus, "label_names", lambda: ["css", "python"])
    found = corpus.source_files("calibration")
    assert found == [
        SourceFile("package==1.0", "a/style.css", 0, (b"\t\r\n" + body)[:LENGTH]),
        SourceFile("package==1.0", "b/module.py", 1, body[:LENGTH]),
    ]
    assert found[0].ids.dtype == np.int64
    assert found[0].ids.tolist()[:4] == [9, 13, 10, 0x20]
    # The second time nothing is downloaded.
    path.unlink()
    assert corpus.source_files("calibration") == found


@pytest.mark.slow
def test_the_corpus_is_that_of_the_figures() -> None:
    calibration, test = corpus.source_files("calibration"), corpus.source_files("test")
    assert (corpus.digest(calibration), len(calibration)) == ("f5c5cdc2c61e", 78)
    assert (corpus.digest(test), len(test)) == ("75554abd2b4a", 1_556)
    assert not {file.content for file in calibration} & {file.content for file in test}
    assert all(len(file.content) == LENGTH for file in (*calibration, *test))


def test_indices_are_spread() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(9, 3) == [0, 4, 8]
    assert spread(9, 1) == [4]
    assert spread(9, 0) == []
