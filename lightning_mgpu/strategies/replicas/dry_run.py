"""Run one step for its results only, without side effects."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lightning_mgpu.engine import batch
from lightning_mgpu.engine.data_parallel.copying.isolation import Isolation
from lightning_mgpu.engine.data_parallel.copying.sandbox import Sandbox, in_double
from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import untracked
from lightning_mgpu.engine.device import without_autocast
from lightning_mgpu.engine.random_state import RandomState
from lightning_mgpu.strategies.replicas.log_merging import LogRecorder
from lightning_mgpu.strategies.replicas.quiet import silence
from lightning_mgpu.strategies.replicas.replica_step import Step


@dataclass(frozen=True)
class Conditions:
    """Settings of a trial run.

    Attributes:
        grad: With gradients, which some steps need (a gradient penalty, for instance).
        evaluation: With all modules in evaluation mode, rather than only those that are known to
            draw random numbers or to mix samples.
        double: In double precision, whatever the Trainer's is.
    """

    grad: bool = False
    evaluation: bool = False
    double: bool = False


@dataclass(frozen=True)
class Result:
    """Results of a trial run.

    Attributes:
        output: What the step returned.
        logs: What it has logged.
        masters: The metrics of the model.
        units: The copies of them that it has updated.
        drew: Whether it has drawn random numbers.
    """

    output: Any
    logs: LogRecorder
    masters: list[Any]
    units: list[Any]
    drew: bool


def dry_run(make: Callable[[], Sandbox], step: Step, data: Any, how: Conditions) -> Result:
    """Run a step on a copy of a batch, by a copy of the model.

    Args:
        make: Makes a sandbox.
        step: What to run.
        data: The batch, which stays as it is.
        how: The conditions.

    Raises:
        UnsafeError: The step does what cannot be undone.
    """
    sandbox, logs = make(), LogRecorder()
    isolation = Isolation()
    data = isolation(data)
    sandbox.calm(how.evaluation)
    if how.double:
        sandbox.to_double()
        data = batch.map_leaves(in_double, data)
    silence(sandbox, logs)
    with _conditions(how, sandbox.device):
        before = RandomState([sandbox.device])
        try:
            output = untracked(step.call(sandbox.module, data, sandbox.device))
            drew = before.has_moved() or sandbox.isolation.drew() or isolation.drew()
        finally:
            before.restore()
    return Result(output, logs, sandbox.structure.units, sandbox.units, drew)


@contextmanager
def _conditions(how: Conditions, device: torch.device) -> Iterator[None]:
    benchmark, default = torch.backends.cudnn.benchmark, torch.get_default_dtype()
    with ExitStack() as stack:
        if not torch.is_inference_mode_enabled():
            stack.enter_context(torch.set_grad_enabled(how.grad))
        if how.double:
            stack.enter_context(without_autocast(device))
        try:
            torch.backends.cudnn.benchmark = False
            if how.double:
                torch.set_default_dtype(torch.float64)
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark
            torch.set_default_dtype(default)
