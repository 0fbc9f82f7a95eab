"""Download the files of a sweep from the cluster, except those present already."""

import logging
import os
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.progress import Progress

from lightning_mgpu.sweep.client.files import File
from lightning_mgpu.sweep.settings.prepared import SPACE

log = logging.getLogger(__name__)


def download(head: Any, home: Path) -> None:
    """Download the files of a sweep; of the checkpoints only the best.

    Args:
        head: The actor that has run it.
        home: The directory here.
    """
    place, files = ray.get(head.files.remote())
    missing = [file for file in files if not _is_here(home / file.path, file)]
    if not missing:
        return
    try:
        if _is_of_another(head, home):
            log.warning("%s holds another sweep. This one is on the cluster: %s", home, place)
            return
        _copy(head, missing, home)
    except OSError as error:
        log.warning(
            "Some files could not be downloaded (%s). They are on the cluster: %s", error, place
        )
        return
    log.info(
        "Downloaded to %s, of checkpoints only the best. All files are on the cluster: %s",
        os.path.relpath(home),
        place,
    )


def _is_of_another(head: Any, home: Path) -> bool:
    mine = home / SPACE
    return mine.exists() and mine.read_bytes() != ray.get(head.read.remote(SPACE, 0))


def _is_here(path: Path, file: File) -> bool:
    """Return whether a file was copied before, or lies on storage shared with this machine."""
    if not path.exists():
        return False
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns)


def _copy(head: Any, files: list[File], home: Path) -> None:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Copying", total=sum(file.size for file in files))
        for file in files:
            path = home / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".part")
            try:
                with unfinished.open("wb") as out:
                    while part := ray.get(head.read.remote(file.path, out.tell())):
                        out.write(part)
                        progress.advance(task, len(part))
                os.utime(unfinished, ns=(file.mtime_ns, file.mtime_ns))
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
