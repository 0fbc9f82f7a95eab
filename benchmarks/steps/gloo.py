"""A pipeline in two processes: `torch.distributed.pipelining` over gloo."""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS = 2
# Of schedules with several stages, which those of each process are.
LOOPED, V = ((0, 2), (1, 3)), ((0, 3), (1, 2))
STAGES = {
    "LoopedBFS": LOOPED,
    "Interleaved1F1B": LOOPED,
    "InterleavedZeroBubble": LOOPED,
    "ZBVZeroBubble": V,
}
ONE_EACH = ((0,), (1,))


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
        torch.multiprocessing.spawn(_rank, (directory, schedule, model, chunks, count), RANKS)
        found: list[float] = json.loads(Path(directory, "stamps").read_text())
        return found


def _rank(index: int, directory: str, schedule: str, model: str, chunks: int, count: int) -> None:
    import torch
    import torch.distributed as dist
    from models.rows import build
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=index, world_size=RANKS)
    net, batch = build(model)
    own = STAGES.get(schedule, ONE_EACH)
    total = sum(map(len, own))
    size = math.ceil(len(net) / total)
    parts = [net[number * size : (number + 1) * size] for number in own[index]]
    stages = [
        PipelineStage(part, number, total, torch.device("cpu"))
        for number, part in zip(own[index], parts, strict=True)
    ]
    made = get_schedule_class(schedule)
    run: Any = made(stages if total > RANKS else stages[0], chunks, loss_fn=_loss)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    given = [batch] if 0 in own[index] else []
    target = {"target": batch} if total - 1 in own[index] else {}
    found = []
    for _ in range(count):
        run.step(*given, **target)
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.perf_counter())
    if index == 0:
        Path(directory, "stamps").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _loss(output: Any, target: Any) -> Any:
    return output.square().mean()
