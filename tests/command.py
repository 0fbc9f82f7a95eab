"""Run the command as a user would: in this process, which is quick, or in one of its own."""

import importlib
import logging
import os
import re
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
from hydra.core.singleton import Singleton

import lightning_mgpu.__main__

TINY = (
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "model=mlp",
    "++trainer.limit_train_batches=2",
    "++trainer.limit_val_batches=1",
    "++trainer.limit_test_batches=1",
    "++trainer.enable_progress_bar=false",
    "++trainer.enable_model_summary=false",
    "hydra.run.dir=run",
    "hydra.sweep.dir=sweep",
)
"""A run of two batches. Its files lie in `run`, those of a multirun in `sweep/<job number>`."""

CONSOLE_SCRIPT = Path(sys.executable).parent / "lightning_mgpu"

PROJECT = '''
import os
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class LitModel(LightningModule):
    """Its accuracy falls from epoch to epoch, so the first checkpoint is the best."""

    def __init__(self, lr: float = 0.1, sizes: list[int] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(64, 10)
        self.register_buffer("epochs", torch.tensor(0))

    def on_fit_start(self) -> None:
        """Leave a trace of each run, and of its seed."""
        if self.global_rank == 0:
            with (Path(self.trainer.default_root_dir) / "seeds.txt").open("a") as file:
                file.write(os.environ.get("PL_GLOBAL_SEED", "none") + "\\n")

    def on_train_epoch_start(self) -> None:
        self.epochs += 1

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 1 / self.epochs.clamp(min=1), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_epochs", self.epochs.float(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class LitData(LightningDataModule):
    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.size = size

    def _dataloader(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.size, 1, 8, 8, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(self.size) % 10), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _dataloader
'''
"""A user's own module, `my_project.py`."""


@dataclass(frozen=True)
class Done:
    """How the command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def metrics(self) -> dict[str, str]:
        """The table of metrics, as printed."""
        return dict(re.findall(r"│ (\w+)\s+│ (\S+)\s+│", self.out))


def run(*arguments: str, **environment: str) -> Done:
    """Run the command in this process, and leave the process as it was."""
    importlib.invalidate_caches()  # for modules that the test has just written
    out, err = StringIO(), StringIO()
    with (
        patch.object(sys, "argv", [lightning_mgpu.__main__.__file__, *arguments]),
        patch.object(sys, "path", list(sys.path)),
        warnings.catch_warnings(),
        _modules(),
        _singletons(),
        redirect_stdout(out),
        redirect_stderr(err),
        _logging(),
        pytest.MonkeyPatch.context() as monkeypatch,
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        warnings.showwarning = _show_warning  # pytest would keep them to itself
        code = _exit_code()
    return Done(code, out.getvalue(), err.getvalue())


def write_project(more: str = "") -> None:
    """Write `my_project.py` into the current directory, with `more` behind `PROJECT`."""
    Path("my_project.py").write_text(PROJECT + more)


def run_tiny(*arguments: str, **environment: str) -> Done:
    """`run` with `TINY`; flags may come among the arguments."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    return run(*flags, *TINY, *(a for a in arguments if a not in flags), **environment)


def run_process(
    *arguments: str, program: tuple[str, ...] = ("-m", "lightning_mgpu"), **environment: str
) -> Done:
    """Run the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    return Done(done.returncode, done.stdout, done.stderr)


class Process:
    """The command in a process of its own, while it runs.

    Attributes:
        pid: Its process, which leads a process group.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", out: Path, err: Path) -> None:
        self.pid = process.pid
        self._process, self._out, self._err = process, out, err
        self._children: list[psutil.Process] = []

    def signal(self, signum: signal.Signals, *, group: bool = False) -> None:
        """Signal the command alone, as `kill` does, or its group, as a terminal does."""
        assert self._process.poll() is None, f"it has ended: {self.written()}"
        self._children += psutil.Process(self.pid).children(recursive=True)
        if group:
            os.killpg(self.pid, signum)
        else:
            os.kill(self.pid, signum)

    def written(self) -> str:
        """What it has written so far."""
        return self._out.read_text() + self._err.read_text()

    def reaches(self, path: str) -> bool:
        """Whether a file is there; fails the test when the command ends before."""
        assert self._process.poll() is None, f"it has ended: {self.written()}"
        return Path(path).exists()

    def wait(self, seconds: float = 60.0) -> Done:
        """Wait for its end; the children it had at the last signal must end too."""
        code = self._process.wait(seconds)
        _, alive = psutil.wait_procs(self._children, timeout=5)
        assert not alive, f"processes left behind: {alive}"
        return Done(code, self._out.read_text(), self._err.read_text())


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[Process]:
    """The command in a process of its own; it is killed if it outlives the block."""
    out, err = Path("stdout.txt"), Path("stderr.txt")
    with out.open("wb") as to_out, err.open("wb") as to_err:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_mgpu", *arguments],
            stdout=to_out,
            stderr=to_err,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        yield Process(process, out, err)
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            for one in (process, *children):
                one.kill()
            process.wait()


def _exit_code() -> int:
    """What the interpreter would exit with."""
    try:
        lightning_mgpu.__main__.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _show_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
    print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr)


@contextmanager
def _modules() -> Iterator[None]:
    """Modules of the current directory, whose names another test may use again."""
    here = str(Path.cwd())
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(here):
                del sys.modules[name]


@contextmanager
def _singletons() -> Iterator[None]:
    """Hydra's global state: whether it runs, and with which config."""
    before = dict(Singleton.get_state())
    try:
        yield
    finally:
        Singleton.set_state(before)


@contextmanager
def _logging() -> Iterator[None]:
    """Handlers, filters and levels of all loggers, which Hydra and the command configure."""
    before = [
        (logger, logger.handlers[:], logger.filters[:], {**logger.__dict__})
        for logger in _loggers()
    ]
    known = {handler for logger in _loggers() for handler in logger.handlers}
    try:
        yield
    finally:
        for logger in _loggers():
            for handler in set(logger.handlers) - known:
                logger.removeHandler(handler)
                handler.close()
        for logger, handlers, filters, state in before:
            logger.handlers[:], logger.filters[:] = handlers, filters
            logger.setLevel(state["level"])
            logger.propagate, logger.disabled = state["propagate"], state["disabled"]


def _loggers() -> list[logging.Logger]:
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]
