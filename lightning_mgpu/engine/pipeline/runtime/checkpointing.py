"""Which micro-batches keep only the inputs of units, which are computed again in backward."""

from collections.abc import Sequence
from typing import Literal, get_args

Checkpoint = Literal["never", "except_last", "always"]

CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)
"""From what takes most memory to what takes least."""


def computed_again(checkpoint: Checkpoint, chunks: int) -> int:
    """How many of a stage's micro-batches are computed again."""
    return {"never": 0, "except_last": chunks - 1, "always": chunks}[checkpoint]


def per_stage(checkpoint: Checkpoint | Sequence[Checkpoint], stages: int) -> tuple[Checkpoint, ...]:
    """What was given for each stage, or for all of them."""
    return (checkpoint,) * stages if isinstance(checkpoint, str) else tuple(checkpoint)
