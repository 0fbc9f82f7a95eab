"""The stages of a pipeline in Lightning's model summary."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelSummary

from lightning_mgpu.engine.pipeline.partition.cutter import Cut
from lightning_mgpu.format import readable_bytes
from lightning_mgpu.strategies.stages.stage_table import parameter_bytes

Column = tuple[str, list[str]]


class StagesInSummary:
    """Add a row for each stage to model summaries: its device and its parameters' bytes.

    Rows, since the Rich summary shows no columns but those it knows.

    Args:
        callbacks: The Trainer's; those that are no summaries are left alone.
        cut: The stages.
        devices: One for each.
    """

    def __init__(
        self, callbacks: Iterable[Callback], cut: Cut, devices: Sequence[torch.device]
    ) -> None:
        self._summaries = [c for c in callbacks if isinstance(c, ModelSummary)]
        self._rows = [
            {
                "Name": f"stage {stage}",
                "Type": str(device),
                "Params": readable_bytes(parameter_bytes(cut, stage)),
            }
            for stage, device in enumerate(devices)
        ]
        for summary in self._summaries:
            vars(summary)["summarize"] = self._with_stages(summary.summarize)

    def remove(self) -> None:
        """Restore the model summaries."""
        for summary in self._summaries:
            vars(summary).pop("summarize", None)

    def _with_stages(self, summarize: Callable[..., None]) -> Callable[..., None]:
        def wrapped(summary_data: list[Column], *args: Any, **kwargs: Any) -> None:
            longer = [
                (header, [*cells, *(row.get(header, "") for row in self._rows)])
                for header, cells in summary_data
            ]
            summarize(longer, *args, **kwargs)

        return wrapped
