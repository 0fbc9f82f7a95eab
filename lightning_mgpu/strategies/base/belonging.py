"""What all our strategies say of themselves."""

from contextlib import suppress

from torch import nn
from typing_extensions import override

from lightning_mgpu._compat.lightning import Strategy
from lightning_mgpu._compat.namespace import describe
from lightning_mgpu.engine.error_notes import add_note
from lightning_mgpu.strategies.base.memory_note import is_out_of_memory, memory_note

LESS_STATE = "an optimizer with less state, such as SGD, or `precision='bf16-true'`"


class Belonging(Strategy):
    """A strategy that says to which of Lightning's packages it belongs.

    The Trainer of the other package refuses it, and shows it in the message. (Derived from a class
    of Lightning's, or its objects could not become ones of ours: see `pooled`.)
    """

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__name__}, for the Trainer of {describe()}>"

    def copies(self) -> list[nn.Module]:
        """Copies of the LightningModule that compute steps beside it, in this process."""
        return []

    def memory_advice(self) -> tuple[list[str], list[str]]:
        """What helps most where memory is short: for activations, and for the model itself."""
        return [
            "half the batch with `accumulate_grad_batches=2`, or `callbacks=[OutOfMemoryGuard()]`",
            "`precision='bf16-mixed'`",
            "activation checkpointing (`torch.utils.checkpoint`) of the largest layers",
        ], [
            "`strategy='pipeline'`, which cuts the model",
            "Lightning's `strategy='fsdp'`, which spreads it",
            LESS_STATE,
        ]

    @override
    def on_exception(self, exception: BaseException) -> None:
        if is_out_of_memory(exception):
            # Whatever keeps it from being told (parameters without a shape yet, say): the error
            # itself is what counts.
            with suppress(Exception):
                note = memory_note(self, self.copies(), *self.memory_advice())
                if note is not None:
                    add_note(exception, note)
        super().on_exception(exception)
