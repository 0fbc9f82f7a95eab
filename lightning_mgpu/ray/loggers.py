"""Transfer loggers between the driver and rank 0 of the workers, which writes them."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_mgpu._compat.lightning import Logger
from lightning_mgpu._compat.lightning_loggers import adopt_file, has_written, restore_attribute

log = logging.getLogger(__name__)


def send(loggers: Iterable[Logger]) -> None:
    """Resolve on the driver, before pickling, what loggers would look up on the workers."""
    for logger in loggers:
        _ = logger.version  # on first use, and by then the workers' directory is there
        if has_written(logger):
            logger.save()  # or both sides would write the same rows


def go_on(loggers: Iterable[Logger], began: bool) -> None:
    """Make loggers append to files of earlier calls, which a new CSV writer would delete.

    Args:
        loggers: Those of the Trainer.
        began: Whether these loggers have written before, also if they do not know of it.
    """
    for logger in loggers:
        if (began or has_written(logger)) and getattr(rank_zero_only, "rank", 0) == 0:
            adopt_file(logger)


def states(loggers: Iterable[Logger], dump: Callable[[Any], bytes]) -> list[dict[str, bytes]]:
    """Pickled attributes of each logger, as rank 0 has them after a run."""
    found = []
    for logger in loggers:
        state: dict[str, bytes] = {}
        # As for a pickle: loggers leave connections out, and put in by what to take them up again.
        attributes = logger.__reduce_ex__(2)[2]
        for name, value in attributes.items() if isinstance(attributes, dict) else ():
            try:
                state[name] = dump(value)
            except Exception as error:
                log.debug("%s.%s stays on rank 0 (%s).", type(logger).__name__, name, error)
        found.append(state)
    return found


def restore(logger: Logger, state: dict[str, bytes], load: Callable[[bytes], Any]) -> None:
    """Give the driver's logger the attributes of rank 0's."""
    for name, data in state.items():
        restore_attribute(logger, name, load(data))
