"""Hints for errors that a replica raises and one device would not."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_mgpu._compat import torch_messages as messages
from lightning_mgpu.engine.error_notes import add_note

_GRAPHS = re.compile(f"{messages.GRAPH_IS_GONE}|{messages.WRITTEN_TO}")

_KEPT = (
    "Under `dp` each replica runs the step on its shard of the batch, on its own thread."
    " Values kept between steps, in module-level variables, in closures or by hook objects"
    " belong to one replica, or are shared by all of them:"
)
_NOTES = (
    (
        _GRAPHS,
        f"{_KEPT} a graph kept there may belong to another replica or the last step. Keep such"
        " tensors in attributes of the LightningModule or its modules, detached if they"
        " outlive the step.",
    ),
    (
        messages.SIZE_OF_ANOTHER_BATCH,
        f"{_KEPT} if one size is that of the whole batch and the other that of a shard, take"
        " the size from the step's own tensors (`len(x)`), keep per-sample values in the"
        " batch, or detach the kept values and cut them to the shard.",
    ),
)


@contextmanager
def hinted(shards: int) -> Iterator[None]:
    """Add a note to errors that leave the block and may come of working on a shard.

    Args:
        shards: How many replicas take part; one alone works as on one device.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if shards > 1:
            for pattern, note in _NOTES:
                if pattern.search(str(error)):
                    add_note(error, note)
                    break
        raise
