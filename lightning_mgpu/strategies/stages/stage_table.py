"""Table of a pipeline's stages."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_mgpu._compat.lightning import rank_zero_info
from lightning_mgpu.engine.pipeline.partition.cutter import Cut
from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost
from lightning_mgpu.engine.pipeline.partition.stage_planner import Chosen
from lightning_mgpu.engine.pipeline.runtime import schedule
from lightning_mgpu.format import duration, readable_bytes


def show_stages(
    cut: Cut,
    devices: Sequence[torch.device],
    chunks: int,
    costs: Mapping[str, Cost],
    stages_per_device: int = 1,
    deferred: bool = False,
    chosen: Chosen | None = None,
) -> None:
    """Log the layers, cost and expected idle time of each stage.

    Args:
        cut: The stages.
        devices: One for each.
        chunks: Micro-batches.
        costs: Of each layer, if they have been measured.
        stages_per_device: How many of the stages lie on each device.
        deferred: Whether gradients of weights come later than those of inputs.
        chosen: The simulated alternatives, if it has been chosen from some.
    """
    measured = [stage_cost(layers, costs) for layers in cut.layers]
    header = ["stage", "device", "layers", "parameters"]
    rows = [[*header, "activations", "time"] if costs else header]
    for stage, (device, cost) in enumerate(zip(devices, measured, strict=True)):
        size = readable_bytes(parameter_bytes(cut, stage))
        row = [str(stage), str(device), _span(cut.layers[stage]), size]
        if costs:
            row += [readable_bytes(cost.activations), duration(cost.seconds)]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    times = [cost.seconds for cost in measured] if costs else [1.0] * len(devices)
    waiting = schedule.waiting(times, chunks, len(devices) // stages_per_device, deferred)
    lines.append(
        f"{chunks} micro-batches; devices wait {waiting:.0%} of the time"
        + (" (activations and time are those of one)." if costs else " if all take equally long.")
    )
    if chosen is not None:
        lines.append(_reason(chosen))
    rank_zero_info("\n".join(["Pipeline:", *lines]))


def _reason(chosen: Chosen) -> str:
    """Describe what was chosen, from what, and why."""
    best, others = chosen.best, chosen.candidates
    if len(others) == 1:
        return f"{best.stages_per_device} per device; simulated step {duration(best.seconds)}."
    compared = ", ".join(f"{c.stages_per_device}: {duration(c.seconds)}" for c in others)
    quickest = min(others, key=lambda candidate: candidate.seconds)
    why = "quickest" if best == quickest else "fewest that are about as quick as the quickest"
    return f"{best.stages_per_device} per device, the {why} of the simulated steps ({compared})."


def stage_cost(modules: Sequence[str], costs: Mapping[str, Cost]) -> Cost:
    """Total cost of a stage's layers."""
    total = Cost()
    for name, cost in costs.items():
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            total = total + cost
    return total


def parameter_bytes(cut: Cut, stage: int) -> int:
    """The bytes of a stage's parameters."""
    return sum(t.nbytes for t in cut.tensors[stage].values() if isinstance(t, nn.Parameter))


def _span(modules: Sequence[str]) -> str:
    if not modules:
        return "as configured"
    return modules[0] if len(modules) == 1 else f"{modules[0]} .. {modules[-1]} ({len(modules)})"
