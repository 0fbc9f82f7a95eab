"""Draw a sweep: ``mode=report``, and the end of each sweep."""

from importlib.util import find_spec
from pathlib import Path

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.report.reader import read

PAGE = "report.html"
PICTURES = "report"


def missing() -> list[str]:
    """The libraries of the extra `report` that are not installed."""
    return [library for library in ("plotly", "matplotlib") if find_spec(library) is None]


def draw(directory: str | Path | None) -> list[Path]:
    """Draw the sweep in a directory.

    Args:
        directory: ``hydra.sweep.dir`` of the sweep, which may still be under way.

    Returns:
        The page, ``report.html`` in that directory, and PNGs in a directory beside it.

    Raises:
        ConfigError: There is no sweep, or the libraries that draw are not installed.
    """
    if directory is None:
        raise ConfigError("mode=report: no sweep given. Set its directory: sweep=multirun/…")
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"sweep={directory}: there is no such directory.")
    if lacking := missing():
        raise ConfigError(
            f"mode=report: needs {' and '.join(lacking)}: pip install 'lightning_mgpu[report]'."
        )
    sweep = read(directory)
    from lightning_mgpu.sweep.report.html import page
    from lightning_mgpu.sweep.report.importance import importance
    from lightning_mgpu.sweep.report.png import pictures

    found = importance(sweep)
    (directory / PICTURES).mkdir(exist_ok=True)
    drawn = pictures.draw(sweep, found, directory / PICTURES)
    page.write(sweep, found, directory / PAGE)
    return [directory / PAGE, *drawn]
