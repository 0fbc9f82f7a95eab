"""The command: ``python -m lightning_mgpu``. Imports torch only when there is something to run."""

import errno
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_mgpu._compat.hydra import shared_config_store
from lightning_mgpu._compat.lightning_messages import KNOWN_WARNINGS, is_tip, loggers, tip_loggers
from lightning_mgpu.config.namespace import follow_model
from lightning_mgpu.errors import ConfigError, NonFiniteError, SweepFailedError, one_line
from lightning_mgpu.variables import restored

if TYPE_CHECKING:
    from lightning_mgpu.cli.run import RunResult
    from lightning_mgpu.cli.signals import Stopped

log = logging.getLogger(__name__)

_FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: a traceback for everything
_BAD_INPUT = 2
_DOCTOR = "mode=doctor"


def main() -> None:
    """Compose the config, run it, and exit with a code for the outcome.

    0: done. 1: training raised, with its traceback, or `mode=doctor` found
    something that does not work. 2: bad input, said in one line.
    128 + n: ended by signal n.
    """
    wants_traceback = os.environ.get(_FULL_ERROR) == "1"
    job_errors: list[Exception] = []

    @hydra.main(version_base="1.3", config_path="pkg://lightning_mgpu.conf", config_name="config")
    def app(cfg: DictConfig) -> float | None:
        with _environment(_FULL_ERROR, "1" if wants_traceback else None):
            try:
                return _job(cfg, wants_traceback)
            except Exception as error:
                job_errors.append(error)
                raise

    try:
        _register_sweeper()
    except Exception:  # a plugin of others, without which Hydra does not start
        if _DOCTOR not in sys.argv:
            raise
        _examine(DictConfig({"output_dir": "outputs/doctor"}))
        return
    if os.getcwd() not in sys.path:
        # `model._target_=my_project.LitModel`, with the console script as with `python -m`.
        sys.path.insert(0, os.getcwd())
    try:
        # The errors are left to us.
        with _environment(_FULL_ERROR, "1"), shared_config_store():
            app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except ConfigError as error:
        if wants_traceback:
            raise
        _refuse(error)
    except (SweepFailedError, NonFiniteError) as error:
        if wants_traceback:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        # The same kinds of error from within a job are the job's own, and keep their traceback.
        if wants_traceback or any(error is other for other in job_errors):
            raise
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            _refuse_to_write(error)
        _refuse(error)


def _register_sweeper() -> None:
    """Register `hydra/sweeper=ray_tune`, however this package was installed."""
    from hydra_plugins.ray_tune_sweeper.ray_tune_sweeper import RayTuneSweeper

    Plugins.instance().register(RayTuneSweeper)


def _job(cfg: DictConfig, wants_traceback: bool) -> float | None:
    if cfg.get("mode") == "report":
        _draw_sweep(cfg, wants_traceback)
        return None
    if cfg.get("mode") == "doctor":
        _examine(cfg)
        return None
    if cfg.get("mode") == "replay":
        _replay(cfg, wants_traceback)
        return None
    with _importing():
        follow_model(cfg)
        from lightning_mgpu.cli.run import train
        from lightning_mgpu.cli.signals import Stopped
    _quieten()
    try:
        result = train(cfg)
    except Stopped as stopped:
        _tell_stopped(stopped)
        sys.exit(128 + stopped.signum)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            # The other jobs go on, and at the end Hydra raises the first error only.
            log.error("Job %s failed: %s", HydraConfig.get().job.num, one_line(error))
        elif isinstance(error, ConfigError) and not wants_traceback:
            _refuse(error)
        raise
    if result.trainer.is_global_zero:
        _report(result)
    return result.metric


@contextmanager
def _importing() -> Iterator[None]:
    """Context to import torch and Lightning, which takes seconds and may be interrupted."""
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    handlers = [signal.signal(signum, lambda signum, _: came.append(signum)) for signum in signals]
    gc.disable()  # collecting garbage while importing costs a third of the time and finds none
    try:
        yield
    finally:
        gc.enable()
        for signum, handler in zip(signals, handlers, strict=True):
            signal.signal(signum, handler)
    if came:
        sys.exit(128 + came[0])


def _quieten() -> None:
    """Hide warnings and log lines that do not concern users of this command."""
    # Lightning has a handler of its own; Hydra's shows the lines once, and keeps them in a file.
    for logger in loggers():
        logger.handlers.clear()
        logger.propagate = True
    for logger in tip_loggers():
        logger.addFilter(_is_no_tip)
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not is_tip(record)


def _refuse(error: Exception) -> NoReturn:
    if isinstance(error, MissingConfigException) and error.options:
        message = (
            f"Could not find '{error.missing_cfg_file}'. Known: {', '.join(sorted(error.options))}."
        )
    else:
        message = one_line(error)
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(_BAD_INPUT)


def _refuse_to_write(error: OSError) -> NoReturn:
    if error.errno == errno.EPIPE:  # `--help | head`: whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    _refuse(
        ConfigError(f"hydra.run.dir (hydra.sweep.dir in a multirun): cannot write there: {error}.")
    )


def _tell_stopped(stopped: "Stopped") -> None:
    if stopped.checkpoint is not None:
        path = _relative(stopped.checkpoint)
        print(
            f"Stopped by {stopped}. Saved: {path}\nResume with: ckpt_path={path}", file=sys.stderr
        )
    else:
        print(
            f"Stopped by {stopped}; no training was in progress, so nothing was saved.",
            file=sys.stderr,
        )


def _draw_sweep(cfg: DictConfig, wants_traceback: bool) -> None:
    """Run `mode=report`, which reads files and needs no torch."""
    from lightning_mgpu.sweep.report.draw import draw

    sweep = cfg.get("sweep")
    try:
        page, *pictures = draw(to_absolute_path(str(sweep)) if sweep is not None else None)
    except ConfigError as error:
        if wants_traceback:
            raise
        _refuse(error)
    print(f"Report: {_relative(page)}")
    for picture in pictures:
        print(f"  {_relative(picture)}")


def _examine(cfg: DictConfig) -> None:
    """Run `mode=doctor`, which has to work where torch does not load."""
    from lightning_mgpu.doctor.command import doctor

    if not doctor(cfg):
        sys.exit(1)


def _replay(cfg: DictConfig, wants_traceback: bool) -> None:
    """Run `mode=replay`, which builds the model that the bundle holds and no other."""
    with _importing():
        from lightning_mgpu.callbacks.bundle import load_bundle, model_of
        from lightning_mgpu.callbacks.replay import replay
    _quieten()
    try:
        if cfg.get("bundle") is None:
            raise ConfigError("mode=replay: set bundle= to a file that `NonFiniteGuard` has saved.")
        try:
            bundle = load_bundle(Path(to_absolute_path(str(cfg.bundle))))
            model = model_of(bundle)
        except (OSError, ValueError) as error:
            raise ConfigError(f"bundle={cfg.bundle}: {one_line(error)}.") from error
    except ConfigError as error:
        if wants_traceback:
            raise
        _refuse(error)
    outcome = replay(bundle, model, str(cfg.trainer.get("accelerator", "auto")))
    print(f"In the run: {outcome.then}")
    if outcome.differs:
        print(f"Differs:    {outcome.differs}")
    print(f"Now:        {outcome.now or 'loss and gradients are finite.'}")
    if outcome.now is None:
        sys.exit(1)


def _report(result: "RunResult") -> None:
    """Print the last lines of a run: its metrics and the paths of its files."""
    from rich.console import Console
    from rich.table import Table

    if result.plan is not None:
        from lightning_mgpu.plan.show import summary

        Console().print(summary(result.plan))
    if result.metrics:
        table = Table("metric", "value")
        for name, value in sorted(result.metrics.items()):
            table.add_row(name, f"{value:.4g}")
        Console().print(table)
    print(f"Outputs: {_relative(result.output_dir)}")
    for name, path in result.files.items():
        print(f"  {name}: {_relative(path)}")


def _relative(path: Path) -> str:
    if HydraConfig.get().runtime.cwd != os.getcwd():
        return str(path.absolute())  # `hydra.job.chdir`: the user stands elsewhere
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable, or with `None` unset it, for the length of the block."""
    with restored(name):
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
        yield
