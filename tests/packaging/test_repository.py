"""What must not stand in any file of the repository: somebody's paths, package registries."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Taken apart, so that this file does not hold them.
REGISTRY_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("yarnpkg", "com"),
        ("download", "pytorch", "org"),
        ("anaconda", "org"),
        ("deb", "debian", "org"),
        ("crates", "io"),
        ("proxy", "golang", "org"),
    )
)
HOME = re.compile(
    rb"(?<![\w./-])/(?:(?:home|Users)/[\w.-]+|root)/"  # Linux, macOS
    rb"|[A-Za-z]:\\+Users\\"
)


@cache
def files() -> tuple[Path, ...]:
    """Every file that is tracked or would be with ``git add``; skips where there is no git."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.split("\0") if name)
    return tuple(path for path in paths if path.is_file() and not path.is_symlink())


def lines_with(pattern: re.Pattern[bytes]) -> Iterator[str]:
    for path in files():
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if found := pattern.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: {found[0].decode(errors='replace')}"


def test_there_are_files() -> None:
    assert ROOT / "pyproject.toml" in files()


def test_no_home_folder() -> None:
    assert list(lines_with(HOME)) == []


def test_no_path_of_this_checkout() -> None:
    # A checkout at /src or the like proves nothing: such a path may well be an example.
    if len(ROOT.parts) < 3:
        pytest.skip("the checkout lies in the root folder")
    assert list(lines_with(re.compile(re.escape(str(ROOT).encode()) + rb"\b"))) == []


def test_no_registry_host() -> None:
    hosts = re.compile("|".join(map(re.escape, REGISTRY_HOSTS)).encode(), re.IGNORECASE)
    assert list(lines_with(hosts)) == []


@pytest.mark.parametrize(
    "text",
    ["see /{home}/me/x.py", "at '/{users}/Me/x'", "/{root}/x", r"C:\{users}\me"],
)
def test_home_folders_are_recognised(text: str) -> None:
    text = text.format(home="home", users="Users", root="root")
    assert HOME.search(text.encode())


@pytest.mark.parametrize("text", ["docs/{home}/page", "~/models", "a/{root}/b", "${variable}/x"])
def test_other_paths_are_not(text: str) -> None:
    text = text.format(home="home", root="root", variable="HOME")
    assert not HOME.search(text.encode())


def test_no_large_file() -> None:
    large = [str(path.relative_to(ROOT)) for path in files() if path.stat().st_size > 2**20]
    assert large == [], "files above 1 MiB do not belong in the repository"


def test_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    for part in (
        "Apache License",
        "Version 2.0, January 2004",
        "9. Accepting Warranty or Additional Liability.",
        "END OF TERMS AND CONDITIONS",
        "APPENDIX: How to apply the Apache License to your work.",
        "limitations under the License.",
    ):
        assert part in text
