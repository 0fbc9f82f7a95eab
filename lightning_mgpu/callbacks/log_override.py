"""Have what a step logs go elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_mgpu._compat.lightning import LightningModule


@contextmanager
def logging_to(model: LightningModule, log: Callable[..., None]) -> Iterator[None]:
    """Have the model call `log`, with what `self.log` is given, for the length of the block.

    It is replaced in the class: strategies replace the instance's own for the length of a step.
    """
    kind: Any = type(model)
    own = vars(kind).get("log")
    kind.log = lambda _, *args, **kwargs: log(*args, **kwargs)
    try:
        yield
    finally:
        if own is None:
            del kind.log
        else:
            kind.log = own
