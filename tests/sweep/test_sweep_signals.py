"""Signals and interrupts in a trial, which runs on a thread; no Ray needed."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from boring import Blobs, Classifier, trainer

from lightning_mgpu.sweep.trial.reporting import Reporting
from lightning_mgpu.sweep.trial.run_trial import InterruptedTrialError, _run
from lightning_mgpu.sweep.trial.signals import forget_handlers, ignore_handlers


@pytest.fixture(autouse=True)
def process_of_a_trial() -> Iterator[None]:
    before = signal.signal
    ignore_handlers()
    yield
    vars(signal)["signal"] = before
    forget_handlers()


def on_a_thread(function: Callable[[], Any]) -> Any:
    """What a function returns or raises there."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


def refuse(*_: object) -> None:
    """A handler."""


def test_handler_of_a_trial_is_ignored_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(3):
        assert on_a_thread(lambda: signal.signal(signal.SIGTERM, refuse)) == before
    assert signal.getsignal(signal.SIGTERM) == before
    forget_handlers()  # the next trial
    on_a_thread(lambda: signal.signal(signal.SIGTERM, refuse))
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 2
    assert told[0].startswith("The handler for SIGTERM is ignored: a trial runs on a thread")


def test_timer_without_a_handler_is_refused_and_so_is_what_is_no_signal() -> None:
    for signum in (signal.SIGALRM, 4096):
        error = on_a_thread(lambda signum=signum: signal.signal(signum, refuse))
        assert isinstance(error, ValueError)


def test_main_thread_sets_handlers_as_ever() -> None:
    before = signal.signal(signal.SIGUSR1, refuse)
    assert signal.signal(signal.SIGUSR1, before) is refuse


class Interrupted(Classifier):
    """Is interrupted while it trains."""

    def on_train_epoch_start(self) -> None:
        raise KeyboardInterrupt


def fit(_: object) -> None:
    trainer("auto", 1).fit(Interrupted(), datamodule=Blobs())


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("job", [fit, interrupt])
def test_interrupt_within_a_trial_is_called_one(job: Callable[[object], None]) -> None:
    reporting = Reporting(send=lambda *_: None, metrics=())
    mock = Mock(task_function=job, run=lambda cfg, task: task(cfg))
    error = on_a_thread(lambda: _run(mock, None, reporting))
    assert isinstance(error, InterruptedTrialError)
    assert str(error) == "the job raised KeyboardInterrupt"
