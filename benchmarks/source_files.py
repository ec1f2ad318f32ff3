"""Real source files of known type, from packages, for the text segmenter (typeseg).

Each file gives bytes 200 to 712, so that licence headers do not count, and its label by its
extension. The packages are named below with their versions; those of the calibration files and
those of the test files are different ones. Each is downloaded once with ``pip download`` and only
the pieces of its files are kept, in the cache folder of :mod:`benchmarks.models`.

A file counts if its piece consists of what the segmenter's package keeps: tab, line feed, carriage
return, and 0x20 to 0x7E. Of every package at most so many files of a type are taken, evenly spread
over the sorted names; equal pieces are taken once.

List the files' numbers::

    python -m benchmarks.source_files
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.models import TYPESEG, FetchError, Package, cache_folder, download, fetch
from benchmarks.tables import table

FIRST, LENGTH = 200, 512  # bytes

#: Extension to the segmenter's label.
LABELS = {
    ".py": "python",
    ".h": "c_family",
    ".c": "c_family",
    ".json": "json",
    ".js": "javascript_typescript",
    ".xml": "xml",
    ".svg": "svg",
    ".php": "php",
    ".sql": "sql",
    ".css": "css",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".md": "markdown",
}
_KEPT = frozenset(b"\t\n\r") | frozenset(range(0x20, 0x7F))

#: Files at most of a package and a label: calibration, test. Nearly every package holds Python.
MOST = {"python": (2, 20), "": (4, 40)}


def _package(name: str, version: str, licence: str, *, source: bool = False) -> Package:
    return Package(name, version, licence, ("",), source)


CALIBRATION = (
    _package("robotframework", "7.5", "Apache-2.0"),
    _package("pybind11", "3.1.0", "BSD-3-Clause"),
    _package("cython", "3.3.1", "Apache-2.0"),
    _package("jsonschema-specifications", "2025.9.1", "MIT"),
    _package("plone.app.contenttypes", "5.0.1", "GPL-2.0"),
    _package("galaxy-config", "26.1.2", "MIT"),
    _package("pelican", "4.12.0", "AGPL-3.0"),
    _package("dbt-postgres", "1.11.0", "Apache-2.0"),
    _package("sqlmap", "1.10.10", "GPL-2.0"),
    _package("bokeh", "3.9.2", "BSD-3-Clause"),
)
TEST = (
    _package("django", "5.2.19", "BSD-3-Clause"),
    _package("sphinx", "9.0.4", "BSD-2-Clause"),
    _package("wagtail", "8.0.1", "BSD-3-Clause"),
    _package("ansible-core", "2.19.14", "GPL-3.0-or-later"),
    _package("ansible-lint", "26.10.1", "GPL-3.0-or-later"),
    _package("botocore", "1.44.8", "Apache-2.0"),
    _package("apache-libcloud", "3.9.1", "Apache-2.0"),
    _package("checkov", "3.3.30", "Apache-2.0"),
    _package("lxml", "6.1.3", "BSD-3-Clause"),
    _package("numpy", "2.4.6", "BSD-3-Clause"),
    _package("psutil", "7.2.2", "BSD-3-Clause", source=True),
    _package("nanobind", "3.1.0", "BSD-3-Clause"),
    _package("pythran", "0.19.0", "BSD-3-Clause"),
    _package("matplotlib", "3.11.2", "PSF-based"),
    _package("mkdocs-material", "9.8.2", "MIT"),
    _package("nikola", "8.3.3", "MIT"),
    _package("products.cmfplone", "6.2.2", "GPL-2.0"),
    _package("trytond", "8.2.1", "GPL-3.0-or-later"),
    _package("sqlglot", "30.30.0", "MIT", source=True),
    _package("xstatic-ckeditor", "3.6.4.0", "GPL-2.0-or-later OR LGPL-2.1-or-later OR MPL-1.1"),
    _package("xstatic-jquery-ui", "1.13.0.2", "MIT"),
    _package("xstatic-datatables", "1.10.15.1", "BSD-3-Clause OR GPL-2.0"),
    _package("djangorestframework", "3.18.3", "BSD-3-Clause"),
    _package("pyqtgraph", "0.14.0", "MIT"),
    _package("nltk", "3.10.4", "Apache-2.0"),
    _package("cffi", "2.1.1", "MIT", source=True),
    _package("buildbot", "4.3.0", "GPL-2.0"),
    _package("mercurial", "7.2.4", "GPL-2.0-or-later"),
)


@dataclass(frozen=True)
class SourceFile:
    """A piece of a file.

    Parameters
    ----------
    package
        The release it is from, in pip's notation.
    path
        Its path there.
    label
        Index of its type among the segmenter's labels.
    content
        512 bytes of it.
    """

    package: str
    path: str
    label: int
    content: bytes

    @property
    def ids(self) -> NDArray[np.int64]:
        """What the segmenter reads: bytes below 128 are themselves; there are no others here."""
        return np.frombuffer(self.content, np.uint8).astype(np.int64)


def label_names() -> list[str]:
    """Names of the segmenter's labels, from its package."""
    manifest = json.loads((fetch(TYPESEG) / "typeseg/data/manifest.json").read_text("utf-8"))
    return list(manifest["labels"])


def source_files(split: Literal["calibration", "test"]) -> list[SourceFile]:
    """Collect the files of one of the two parts, in a fixed order.

    Raises
    ------
    FetchError
        If a package cannot be had.
    """
    packages = CALIBRATION if split == "calibration" else TEST
    part = 0 if split == "calibration" else 1
    labels = label_names()
    found: list[SourceFile] = []
    seen: set[bytes] = set()
    for package in packages:
        pieces = _pieces(package)
        groups: dict[str, list[tuple[str, bytes]]] = collections.defaultdict(list)
        for path, content in pieces:
            if content not in seen:
                seen.add(content)
                groups[LABELS[PurePosixPath(path).suffix]].append((path, content))
        for label, group in sorted(groups.items()):
            for index in spread(len(group), MOST.get(label, MOST[""])[part]):
                path, content = group[index]
                file = SourceFile(package.requirement, path, labels.index(label), content)
                found.append(file)
    return found


def spread(count: int, most: int) -> list[int]:
    """At most so many indices below a count, evenly spread."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def digest(files: list[SourceFile]) -> str:
    """Short hash of paths and contents: equal where the files are."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.package}/{file.path}\n".encode())
        whole.update(file.content)
    return whole.hexdigest()[:12]


def _pieces(package: Package) -> list[tuple[str, bytes]]:
    """Paths and pieces of the files of a package that count, sorted by path."""
    final = cache_folder() / "source_files" / f"{package.name}-{package.version}.zip"
    if not final.is_file():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pieces-", dir=final.parent) as folder:
            archive = download(package, Path(folder) / "download")
            target = Path(folder) / final.name
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as kept:
                for path, content in sorted(_wanted(archive)):
                    kept.writestr(path, content)
            target.replace(final)
    with zipfile.ZipFile(final) as kept:
        names = kept.namelist()
        if not names:
            raise FetchError(f"{package.requirement} holds no source file that counts")
        return [(name, kept.read(name)) for name in names]


def _wanted(archive: Path) -> Iterator[tuple[str, bytes]]:
    seen = set()
    for path, size, read in _members(archive):
        suffixes = PurePosixPath(path).suffixes
        if not suffixes or suffixes[-1] not in LABELS or ".min" in suffixes or path in seen:
            continue
        if size < FIRST + LENGTH:
            continue
        content = read(FIRST + LENGTH)[FIRST:]
        if set(content) <= _KEPT:
            seen.add(path)
            yield path, content


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
    """Path, size and reader of the first bytes of the files of a wheel or source archive."""
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                yield info.filename, info.file_size, functools.partial(_read_zip, wheel, info)
        return
    with tarfile.open(archive) as source:
        for member in source:
            if member.isfile():
                yield member.name, member.size, functools.partial(_read_tar, source, member)


def _read_zip(wheel: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> bytes:
    with wheel.open(info) as stream:
        return stream.read(size)


def _read_tar(source: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> bytes:
    stream = source.extractfile(member)
    assert stream is not None
    return stream.read(size)


def main() -> None:
    """Fetch all, and print how many there are."""
    parts = {"calibration": source_files("calibration"), "test": source_files("test")}
    names = label_names()
    rows = []
    for label in sorted(set(LABELS.values())):
        index = names.index(label)
        counts = [sum(file.label == index for file in files) for files in parts.values()]
        if any(counts):
            rows.append([label, *map(str, counts)])
    rows.append(["all", *(str(len(files)) for files in parts.values())])
    rows.append(["packages", str(len(CALIBRATION)), str(len(TEST))])
    rows.append(["hash", *map(digest, parts.values())])
    print(table(["label", *parts], rows))


if __name__ == "__main__":
    main()
