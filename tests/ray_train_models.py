"""A model that workers import by its name."""

import os
from pathlib import Path
from typing import Any

import boring


class Dies(boring.Classifier):
    """Kills rank 1 in the second epoch, once: when it finds the ticket."""

    def __init__(self, ticket: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ticket = Path(ticket)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1 and self.global_rank == 1 and self.ticket.exists():
            self.ticket.unlink()
            os.kill(os.getpid(), 9)
