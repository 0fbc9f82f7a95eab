"""Context of a submitted sweep inside the process that executes it."""

import json
import os
import signal
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from lightning_mgpu.sweep.job.job import Job

_VARIABLE = "LIGHTNING_MGPU_SENT_SWEEP"


@dataclass(frozen=True)
class SubmittedSweep:
    """Settings of a submitted sweep that differ from the laptop's command line.

    Attributes:
        address: The cluster's, from within it.
        runtime_env: The laptop's, after its project was sent.
        directory: The sweep's, as the laptop names it: absolute, or relative to the home directory.
    """

    address: str
    runtime_env: dict[str, Any]
    directory: str

    def variable(self) -> dict[str, str]:
        """Environment variable that passes the settings to the process."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @property
    def place(self) -> Path:
        """Directory of the sweep."""
        return Path.home() / self.directory

    def adopt(self, job: Job, ray: dict[str, Any], resume: str | None) -> tuple[Any, str | None]:
        """Move the sweep here: return its arguments of `ray.init`, and the directory to resume."""
        with open_dict(job.config):
            job.config.hydra.sweep.dir = str(self.place)
        here = {**ray, "address": self.address, "runtime_env": self.runtime_env or None}
        return here, None if resume is None else str(self.place)


_current: SubmittedSweep | None = None


def receive() -> SubmittedSweep | None:
    """Take the settings sent to this process, if any, and accept its SIGINT again."""
    global _current
    text = os.environ.pop(_VARIABLE, None)  # it is not about the processes that this one starts
    if text is not None:
        _current = SubmittedSweep(**json.loads(text))
        # Ray blocks it in all that it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        threading.Thread(target=_watch_sender, name="mgpu-sender", daemon=True).start()
    return _current


def name_of(directory: Path) -> str:
    """Directory of a sweep as the user would name it."""
    return str(directory) if _current is None else _current.directory


def _watch_sender() -> None:
    # The other end of the pipe is closed with the process that holds it, however that ends.
    while os.read(0, 1):  # not by `sys.stdin`, whose lock this thread would hold at the end
        pass
    # Nobody reads its output any more: a table that cannot be drawn must not end the sweep.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.kill(os.getpid(), signal.SIGINT)
