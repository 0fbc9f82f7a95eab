"""Table of a pipeline's stages."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_mgpu._compat.lightning import rank_zero_info
from lightning_mgpu.engine.pipeline.partition.cutter import Cut
from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost
from lightning_mgpu.engine.pipeline.partition.stage_planner import Candidate, Chosen
from lightning_mgpu.engine.pipeline.runtime import schedule
from lightning_mgpu.engine.pipeline.runtime.checkpointing import Checkpoint
from lightning_mgpu.format import duration, readable_bytes

_AGAIN = {"never": "no", "except_last": "all but the last", "always": "yes"}


def show_stages(
    cut: Cut,
    devices: Sequence[torch.device],
    chunks: int,
    costs: Mapping[str, Cost],
    checkpoint: Sequence[Checkpoint],
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
        checkpoint: Of each stage, which micro-batches are computed again.
        stages_per_device: How many of the stages lie on each device.
        deferred: Whether gradients of weights come later than those of inputs.
        chosen: The simulated alternatives, if it has been chosen from some.
    """
    measured = [stage_cost(layers, costs) for layers in cut.layers]
    columns = {
        "stage": [str(stage) for stage in range(len(devices))],
        "device": [str(device) for device in devices],
        "layers": [_span(layers) for layers in cut.layers],
        "parameters": [readable_bytes(parameter_bytes(cut, s)) for s in range(len(devices))],
    }
    if costs:
        columns["activations"] = [readable_bytes(cost.activations) for cost in measured]
        columns["time"] = [duration(cost.seconds) for cost in measured]
    if any(of_stage != "never" for of_stage in checkpoint):
        columns["computed again"] = [_AGAIN[of_stage] for of_stage in checkpoint]
    rows = [[*columns], *zip(*columns.values(), strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
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
        lines += [_reason(chosen), *_memory(chosen)]
    rank_zero_info("\n".join(["Pipeline:", *lines]))


def _reason(chosen: Chosen) -> str:
    """Describe what was chosen, from what, and why."""
    best, others = chosen.best, chosen.candidates
    several = len({candidate.chunks for candidate in others}) > 1

    def named(candidate: Candidate) -> str:
        of_batch = f" x {candidate.chunks}" if several else ""
        return f"{candidate.stages_per_device}{of_batch}"

    def taken(candidate: Candidate) -> str:
        return "too large" if candidate.excess else duration(candidate.seconds)

    what = f"{named(best)} per device"
    if several:
        what = f"{best.stages_per_device} per device, {best.chunks} micro-batches"
    if len(others) == 1:
        return f"{what}; simulated step {duration(best.seconds)}."
    numbers = {candidate.stages_per_device for candidate in others}
    if several and len(numbers) > 1:  # of each, the best number of micro-batches
        others = tuple(
            min(
                (c for c in others if c.stages_per_device == number),
                key=lambda candidate: (candidate.excess, candidate.seconds),
            )
            for number in sorted(numbers)
        )
    compared = ", ".join(f"{named(candidate)}: {taken(candidate)}" for candidate in others)
    quickest = min((c for c in others if not c.excess), key=lambda candidate: candidate.seconds)
    why = (
        "quickest"
        if best.seconds <= quickest.seconds
        else "fewest that are about as quick as the quickest"
    )
    return f"{what}, the {why} of the simulated steps ({compared})."


def _memory(chosen: Chosen) -> list[str]:
    """Describe the memory of each device, if there is a limit."""
    devices = [
        f"{readable_bytes(of_device.total)} on device {number}"
        f" ({readable_bytes(of_device.weights)} of it for weights)"
        for number, of_device in enumerate(chosen.best.memory)
    ]
    return [f"Memory: about {', '.join(devices)}."] if devices else []


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
