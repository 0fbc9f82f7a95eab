"""Redirect a trial's output and log lines to a file."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lightning_mgpu.sweep.trial.crashes import crashes_to

LOG_FILE = "trial.log"


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append all printed and logged output, and the stacks of a crash, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        crashes_to(file),
        contextlib.ExitStack() as stack,
    ):
        for handler in _stream_handlers():  # Lightning's has kept the stream of its import
            stack.callback(handler.setStream, handler.stream)
            handler.setStream(file)
        yield


def _stream_handlers() -> list["logging.StreamHandler[TextIO]"]:
    known = list(logging.root.manager.loggerDict.values())
    loggers = [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]
    return [
        handler
        for logger in loggers
        for handler in logger.handlers
        if type(handler) is logging.StreamHandler
    ]
