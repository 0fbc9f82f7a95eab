"""Give each trial a directory of its own, whatever `hydra.sweep.subdir` makes of its values."""

import contextlib
import os
from pathlib import Path

_MARK = ".trial"
_MOST_BYTES = 240  # of a name; file systems allow 255, and a number may follow


def own_subdir(sweep_dir: Path, wanted: str, number: int) -> str:
    """Subdirectory of a trial that no other trial of the sweep has.

    It is called in the driver and in the trial's process, and both get the same.

    Args:
        sweep_dir: The sweep's directory.
        wanted: What `hydra.sweep.subdir` is for the trial.
        number: The trial's.
    """
    if wanted == str(number):
        return wanted
    if os.path.normpath(sweep_dir / wanted) == str(sweep_dir):
        return str(number)
    if os.pardir in Path(wanted).parts and not os.path.isabs(wanted):
        wanted = wanted.replace(os.sep, "_")  # a value that is a path may lead outside
    found = os.sep.join(_fit(name, number) for name in wanted.split(os.sep))
    if not _claim(sweep_dir / found, number):
        found = f"{found.rstrip(os.sep)}-{number}"
        _claim(sweep_dir / found, number)
    return found


def _fit(name: str, number: int) -> str:
    data = name.encode()
    if len(data) <= _MOST_BYTES:
        return name
    return f"{data[:_MOST_BYTES].decode(errors='ignore')}-{number}"


def _claim(directory: Path, number: int) -> bool:
    """Return whether the directory is that trial's: the first to ask for it has it."""
    mark, unfinished = directory / _MARK, directory / f"{_MARK}-{number}-{os.getpid()}"
    with contextlib.suppress(OSError):  # the trial will say what is wrong with it
        directory.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(str(number))
        with contextlib.suppress(FileExistsError):
            os.link(unfinished, mark)
    with contextlib.suppress(OSError):
        unfinished.unlink(missing_ok=True)
        return mark.read_text() == str(number)
    return True
