"""Settings common to all trials of a sweep, sent to the actors."""

import contextlib
import pickle
from dataclasses import dataclass
from pathlib import Path

from lightning_mgpu._compat import hydra
from lightning_mgpu.launch.main_script import MainScript, pickled_by_name
from lightning_mgpu.launch.pickler import dumps
from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.sweep.job.job import Job
from lightning_mgpu.sweep.space.space import Space


@dataclass(frozen=True)
class TrialPlan:
    """Settings common to all trials of a sweep.

    Attributes:
        objectives: Names of what is optimised.
        are_logged: Whether these are metrics that the job logs, or stand for what it returns.
        better: ``min`` or ``max`` if the best report of a run counts; `None` if its last one does.
    """

    job: Job
    space: Space
    sweep_dir: Path
    objectives: tuple[str, ...]
    are_logged: bool
    every_n_epochs: int
    saves: bool
    threads: int
    better: str | None = None

    def dumps(self) -> bytes:
        """Pickle with the state of this process, which comes first: it says where modules are."""
        main = MainScript.of_this_process()
        with contextlib.nullcontext() if main is None else pickled_by_name():
            state = ProcessState.capture(self.threads, libraries=[hydra.take_state], main=main)
            return pickle.dumps((self.threads, self.sweep_dir, state, dumps(self)))
