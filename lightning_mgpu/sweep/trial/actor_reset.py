"""Reset the state of a trial's process for the next trial."""

import dataclasses
import gc
import logging
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Mapping

import cloudpickle
import torch.distributed

from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.launch.torch_state import TorchState, release_accelerator_memory

# What Ray tells its workers, which devices they may use, and how long a trial may take to end.
_OF_THE_ACTOR = (
    *("RAY_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "TUNE_FUNCTION_THREAD_TIMEOUT_S",
)
# Threads that serve later trials as well: of tqdm, of our process pool, of torch and of Ray.
_LASTING_THREADS = ("tqdm_monitor", "mgpu-", "ray")


def adopt(
    state: ProcessState, threads: int, variables: Mapping[str, str] | None = None
) -> ProcessState:
    """State of the program that started the sweep, as far as valid in this process.

    Args:
        state: The program's.
        threads: Intra-op threads of a trial.
        variables: Environment variables of trials.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(_OF_THE_ACTOR)}
    environment = {**state.environment, **kept, "OMP_NUM_THREADS": str(threads)}
    environment.update(variables or {})
    # On another machine there may be no such directory.
    directory = state.directory if os.path.isdir(state.directory) else os.getcwd()
    state = dataclasses.replace(
        state, environment=environment, directory=directory, threads=threads
    )
    return state if state.torch is not None else _with_torch(state)


def _with_torch(state: ProcessState) -> ProcessState:
    """State with the settings made by importing torch and Lightning."""
    filters = None
    if state.warning_filters is not None:
        given = pickle.loads(state.warning_filters)
        filters = cloudpickle.dumps([*(f for f in warnings.filters if f not in given), *given])
    return dataclasses.replace(state, torch=TorchState.capture(), warning_filters=filters)


class ActorReset:
    """Restore everything that a trial has changed in its process.

    Args:
        state: What trials start with.
    """

    def __init__(self, state: ProcessState) -> None:
        self._state = state
        self._streams = (sys.stdout, sys.stderr)
        self._excepthook = sys.excepthook
        self._handlers = {name: _config(logger) for name, logger in _loggers().items()}
        self._threads: set[threading.Thread] = set()
        self._has_served = False
        gc.freeze()  # torch and Lightning stay, and need not be looked at after each trial

    def before(self) -> None:
        """Apply the initial state before a trial, on its thread."""
        self._state.apply()
        self._threads = set(threading.enumerate())

    def after(self) -> None:
        """Restore the state after a trial."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.stdout, sys.stderr = self._streams
        sys.excepthook = self._excepthook
        self._put_loggers_back()
        self._state.apply()
        gc.enable()
        gc.collect()
        if not self._has_served:
            gc.freeze()  # neither need the libraries that it has loaded
            self._has_served = True
        release_accelerator_memory()

    def threads_left(self) -> list[str]:
        """Names of threads that the current trial has started and not ended."""
        return [
            thread.name
            for thread in set(threading.enumerate()) - self._threads
            if thread.is_alive() and not thread.name.startswith(_LASTING_THREADS)
        ]

    def _put_loggers_back(self) -> None:
        for name, logger in _loggers().items():
            handlers, filters, propagate, disabled, level = self._handlers.get(name, _UNTOUCHED)
            for handler in logger.handlers:
                if handler not in handlers:
                    handler.close()
            if logger.level != level:  # setting a level takes a walk over all loggers
                logger.setLevel(level)
            logger.handlers[:], logger.filters[:] = handlers, filters
            logger.propagate, logger.disabled = propagate, disabled


_LoggerConfig = tuple[list[logging.Handler], "list[logging._FilterType]", bool, bool, int]
_UNTOUCHED: _LoggerConfig = ([], [], True, False, logging.NOTSET)


def _config(logger: logging.Logger) -> _LoggerConfig:
    return (logger.handlers[:], logger.filters[:], logger.propagate, logger.disabled, logger.level)


def _loggers() -> dict[str, logging.Logger]:
    known = logging.root.manager.loggerDict.copy().items()
    named = {name: logger for name, logger in known if isinstance(logger, logging.Logger)}
    return {**named, "": logging.root}
