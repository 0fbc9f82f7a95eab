"""What a training step starts from, kept for the case that it is to be computed again."""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu._compat.lightning import LightningModule, Trainer
from lightning_mgpu._compat.torch import copy_to_each, version_of
from lightning_mgpu._compat.torch_modules import buffers_of
from lightning_mgpu.engine.random_state import RandomState
from lightning_mgpu.strategies.base.multi_device import MultiDeviceStrategy
from lightning_mgpu.strategies.resume import rank_state
from lightning_mgpu.strategies.resume.random_sources import accelerators, random_streams

# Larger buffers (tables, queues) are copied where they have been written to; smaller ones always,
# since kernels such as batch normalisation's write without counting it.
_SMALL = 2**16


@dataclass(frozen=True)
class StepRecord:
    """Arguments, random states and buffers from before a step, whose weights are there.

    Attributes:
        args: Of the strategy's `training_step`.
        kwargs: The same, by name.
        random: States of the generators.
        streams: Those of the strategy's streams.
        buffers: Copies of the module's buffers, by name; valid until the next step begins.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    streams: dict[str, Any] | None
    buffers: dict[str, Tensor]


class Recorder:
    """Makes a record of each step."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._devices = trainer, accelerators(trainer)
        self._is_known = False
        self._holders: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._copies: dict[str, Tensor] = {}
        self._small: tuple[list[Tensor], list[Tensor]] = [], []
        self._large: list[tuple[str, Tensor]] = []
        self._versions: dict[str, int] = {}

    def look_again(self) -> None:
        """Find the buffers anew, since they may have been replaced."""
        self._is_known = False

    def keep(self) -> None:
        """Have the copies that the last record refers to stay as they are."""
        self._is_known = False

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepRecord:
        """The record of a step that is about to begin."""
        try:
            self._update()
        except RuntimeError:  # a buffer has another shape now
            self._find()
        random, streams = RandomState(self._devices), random_streams(self._trainer)
        return StepRecord(args, kwargs, random, streams, self._copies)

    def _update(self) -> None:
        # (Steps may assign a buffer anew, as `self.mean = 0.9 * self.mean + ...`.)
        if not self._is_known or any(held.get(key) is not b for held, key, b in self._holders):
            self._find()
            return
        with torch.no_grad():
            if self._small[0]:
                copy_to_each(*self._small)
            for name, buffer in self._large:
                if self._versions[name] != _version(buffer) or buffer.is_inference():
                    self._copies[name].copy_(buffer)
                    self._versions[name] = _version(buffer)

    def _find(self) -> None:
        """Copy all buffers, to tensors of their own."""
        model = self._trainer.lightning_module
        self._holders = [
            (held, key, buffer)
            for held in map(buffers_of, model.modules())
            for key, buffer in held.items()
            if buffer is not None
        ]
        named = {name: buffer.detach() for name, buffer in model.named_buffers()}
        self._copies = {name: buffer.clone() for name, buffer in named.items()}
        small = [name for name, buffer in named.items() if buffer.numel() <= _SMALL]
        self._small = [self._copies[n] for n in small], [named[n] for n in small]
        self._large = [pair for pair in named.items() if pair[0] not in small]
        self._versions = {name: _version(buffer) for name, buffer in self._large}
        self._is_known = True


def _version(buffer: Tensor) -> int:
    """How often a buffer has been written to, as far as that is counted."""
    return -1 if buffer.is_inference() else version_of(buffer)


def put_back(trainer: Trainer, record: StepRecord) -> None:
    """Put buffers and random states back to those from before a step."""
    strategy = trainer.strategy
    _put(trainer.lightning_module, record.buffers)
    record.random.restore()
    if record.streams is not None and isinstance(strategy, MultiDeviceStrategy):
        strategy.random_streams().load_state_dict(record.streams)


@contextmanager
def as_before(trainer: Trainer, record: StepRecord) -> Iterator[None]:
    """The run as it was before a step, but for attributes; all is as it is now after the block.

    Args:
        trainer: Between backward and the optimizer's step.
        record: Of that step.
    """
    model, strategy = trainer.lightning_module, trainer.strategy
    now, streams = RandomState(accelerators(trainer)), random_streams(trainer)
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    metrics = rank_state.metric_states(model, ())
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    attributes = [(module, _attributes(module)) for module in model.modules()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        put_back(trainer, record)
        yield
    finally:
        for module, known in attributes:
            _put_attributes(module, known)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        _put(model, buffers)
        rank_state.restore_metrics(model, metrics)
        if streams is not None and isinstance(strategy, MultiDeviceStrategy):
            strategy.random_streams().load_state_dict(streams)
        now.restore()


def _put(model: LightningModule, buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])


def _attributes(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes, and copies of those that are plain containers."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (list, dict, set, deque)) else None)
        for name, value in vars(module).items()
    }


def _put_attributes(module: torch.nn.Module, known: dict[str, tuple[Any, Any]]) -> None:
    state = vars(module)
    for name in state.keys() - known.keys():
        del state[name]
    for name, (value, content) in known.items():
        state[name] = value
        if content is None:
            continue
        value.clear()
        if isinstance(value, (list, deque)):
            value.extend(content)
        else:
            value.update(content)
