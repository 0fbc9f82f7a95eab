"""A sweep that a laptop has sent to a cluster, as the process knows it that runs it there."""

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
class Sent:
    """What is different there; the command line is the laptop's.

    Attributes:
        address: The cluster's, from within it.
        runtime_env: The laptop's, after its project was sent.
        directory: The sweep's, as the laptop names it: absolute, or relative to the home directory.
    """

    address: str
    runtime_env: dict[str, Any]
    directory: str

    def variable(self) -> dict[str, str]:
        """The environment variable by which the process comes to know it."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @property
    def place(self) -> Path:
        """The directory of the sweep."""
        return Path.home() / self.directory

    def adopt(self, job: Job, ray: dict[str, Any], resume: str | None) -> tuple[Any, str | None]:
        """Move the sweep here: its arguments of `ray.init`, and the directory that it resumes."""
        with open_dict(job.config):
            job.config.hydra.sweep.dir = str(self.place)
        here = {**ray, "address": self.address, "runtime_env": self.runtime_env or None}
        return here, None if resume is None else str(self.place)


_current: Sent | None = None


def receive() -> Sent | None:
    """What this process was sent, if it was; it is interrupted when its sender is gone."""
    global _current
    text = os.environ.pop(_VARIABLE, None)  # it is not about the processes that this one starts
    if text is not None:
        _current = Sent(**json.loads(text))
        # Ray blocks it in all that it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        threading.Thread(target=_watch_sender, name="mgpu-sender", daemon=True).start()
    return _current


def name_of(directory: Path) -> str:
    """The directory of a sweep, as the user would name it."""
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
