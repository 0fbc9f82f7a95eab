"""A callback for Hydra that writes down what it is told."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback


class Recording(Callback):
    """Adds a line to `callbacks.txt` in the directory of the sweep."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        self._write(config, "multirun start")

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        self._write(config, "multirun end")

    def on_job_start(self, config: Any, **_: Any) -> None:
        self._write(config, f"{config.hydra.job.num} start")

    def on_job_end(self, config: Any, job_return: Any, **_: Any) -> None:
        self._write(config, f"{config.hydra.job.num} {job_return.status.name}")

    def _write(self, config: Any, line: str) -> None:
        directory = Path(config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "callbacks.txt").open("a") as file:
            file.write(line + "\n")
