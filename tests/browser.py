"""Look at a page in a real browser, if there is one on this machine."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# It would look for updates and the like, and leave its files in the home directory.
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--virtual-time-budget=4000", "--enable-logging=stderr"),
)


def rendered(page: Path, picture: Path, height: int = 1200) -> tuple[str, str]:
    """Open a page from its file, and take a picture of it.

    Returns:
        The document as its scripts have made it, and what was written to the console.
    """
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        pytest.skip(f"needs one of {', '.join(_NAMES)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        done = subprocess.run(
            [
                *(browser, *_FLAGS, f"--user-data-dir={directory}"),
                *(f"--window-size=1280,{height}", f"--screenshot={picture}", "--dump-dom"),
                page.absolute().as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    written = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # What this machine lacks is no fault of the page.
    return done.stdout, "\n".join(line for line in written if "WebGL" not in line)
