"""Hints for errors that micro-batches raise and one device would not."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_mgpu._compat.torch_messages import GRAPH_IS_GONE, SIZES_OF_TWO_OPERANDS
from lightning_mgpu.engine.error_notes import add_note

_OF_A_PART = (SIZES_OF_TWO_OPERANDS, GRAPH_IS_GONE)
_HINT = (
    "(Values that attributes or hooks keep from a module's `forward` belong to one"
    " micro-batch: to use them in the step, return them from the split module's `forward`."
    " Values set before the call go to every micro-batch whole: pass them as arguments.)"
)


@contextmanager
def hinted() -> Iterator[None]:
    """Add a note to errors that leave the block and often come from values of a micro-batch."""
    try:
        yield
    except RuntimeError as error:
        if any(text in str(error) for text in _OF_A_PART):
            add_note(error, _HINT)
        raise
