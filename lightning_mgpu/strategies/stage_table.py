"""The table of a pipeline's stages."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_mgpu.engine import schedule
from lightning_mgpu.engine.cutter import Cut

__all__: list[str] = []


def show_stages(cut: Cut, devices: Sequence[torch.device], chunks: int) -> None:
    """Log what each stage consists of, the bytes of its parameters, and the expected bubble."""
    rows = [("stage", "device", "layers", "parameters")]
    for stage, device in zip(cut.partition.stages, devices, strict=True):
        rows.append(
            (
                str(stage.index),
                str(device),
                _span(stage.modules),
                _megabytes(parameter_bytes(cut, stage.index)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    bubble = schedule.bubble(len(devices), chunks)
    lines.append(f"{chunks} micro-batches; a stage waits {bubble:.0%} of the time if all are even.")
    rank_zero_info("\n".join(["Pipeline:", *lines]))


def parameter_bytes(cut: Cut, stage: int) -> int:
    """The bytes of a stage's parameters."""
    return sum(_bytes(t) for t in cut.tensors[stage].values() if isinstance(t, nn.Parameter))


def _span(modules: Sequence[str]) -> str:
    if not modules:
        return "as configured"
    return modules[0] if len(modules) == 1 else f"{modules[0]} .. {modules[-1]} ({len(modules)})"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
