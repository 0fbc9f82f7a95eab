"""A pipeline in two processes: `torch.distributed.pipelining` over gloo."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = 2


def stamps(schedule: str, model: str, chunks: int, count: int) -> list[float]:
    """The end of each of `count` steps in the first process.

    Args:
        schedule: As in `torch.distributed.pipelining.schedules.get_schedule_class`.
        model: As in `rows.build`.
        chunks: Micro-batches.
        count: Steps.
    """
    import torch

    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_rank, (directory, schedule, model, chunks, count), STAGES)
        found: list[float] = json.loads(Path(directory, "stamps").read_text())
        return found


def _rank(index: int, directory: str, schedule: str, model: str, chunks: int, count: int) -> None:
    import torch
    import torch.distributed as dist
    from models.rows import build
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=index, world_size=STAGES)
    net, batch = build(model)
    half = len(net) // STAGES
    part = net[index * half : (index + 1) * half]
    stage = PipelineStage(part, index, STAGES, torch.device("cpu"))
    run: Any = get_schedule_class(schedule)(stage, chunks, loss_fn=_loss)
    optimizer = torch.optim.SGD(part.parameters(), lr=1e-3)
    found = []
    for _ in range(count):
        run.step(batch) if index == 0 else run.step(target=batch)
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.perf_counter())
    if index == 0:
        Path(directory, "stamps").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _loss(output: Any, target: Any) -> Any:
    return output.square().mean()
