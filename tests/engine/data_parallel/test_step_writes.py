"""Writes to parameters within a step of `dp`: seen, whichever way they are made."""

import copy
from collections.abc import Callable
from typing import Any

import boring
import pytest
import torch
from torch import Tensor, nn

Write = Callable[[Any], None]


class Targeted(boring.Classifier):
    """With a target network, as reinforcement learning has it, registered or not."""

    def __init__(self, write: Write | None = None, registered: bool = True) -> None:
        super().__init__()
        self.write = write
        target = copy.deepcopy(self.net).requires_grad_(False)
        if registered:
            self.target = target
        else:
            self.hidden = [target]

    @property
    def targets(self) -> Any:
        return self.target if hasattr(self, "target") else self.hidden[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            goal = self.targets(batch[0])
        loss = self._loss(batch) + (self(batch[0]) - goal).square().mean()
        if self.write is not None:
            self.write(self)
        return loss


def _pairs(model: Any) -> Any:
    return zip(model.targets.parameters(), model.net.parameters(), strict=True)


def _by_data(model: Any) -> None:
    for target, parameter in _pairs(model):
        target.data.copy_(0.5 * parameter.data + 0.5 * target.data)


def _by_data_in_place(model: Any) -> None:
    for target, parameter in _pairs(model):
        target.data.mul_(0.5).add_(parameter.data, alpha=0.5)


def _by_assignment(model: Any) -> None:
    for target, parameter in _pairs(model):
        target.data = 0.5 * parameter.data + 0.5 * target.data


def _by_copy(model: Any) -> None:
    with torch.no_grad():
        for target, parameter in _pairs(model):
            target.copy_(parameter)


def _by_state(model: Any) -> None:
    model.targets.load_state_dict(model.net.state_dict())


def _by_foreach(model: Any) -> None:
    targets = [parameter.data for parameter in model.targets.parameters()]
    torch._foreach_mul_(targets, 0.5)


def _by_vector(model: Any) -> None:
    vector = nn.utils.parameters_to_vector(model.net.parameters())
    nn.utils.vector_to_parameters(vector * 0.9, model.net.parameters())


def _by_set(model: Any) -> None:
    with torch.no_grad():
        model.net[0].weight.set_(torch.zeros(8, 6, dtype=torch.float64))


def _by_numpy(model: Any) -> None:
    model.net[0].weight.detach().numpy()[...] *= 0.5


def _by_init(model: Any) -> None:
    nn.init.zeros_(model.net[2].bias)


def _by_parameters_of_the_optimizer(model: Any) -> None:
    for group in model.trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            parameter.data.mul_(0.9)


WRITES: dict[str, tuple[Write, str]] = {
    "data.copy_": (_by_data, r"target\.0\.weight"),
    "data.mul_": (_by_data_in_place, r"target\.0\.weight"),
    "data =": (_by_assignment, r"target\.0\.weight"),
    "copy_": (_by_copy, r"target\.0\.weight"),
    "load_state_dict": (_by_state, r"target\.0\.weight"),
    "_foreach_mul_": (_by_foreach, r"target\.0\.weight"),
    "vector_to_parameters": (_by_vector, r"net\.0\.weight"),
    "set_": (_by_set, r"net\.0\.weight"),
    "numpy": (_by_numpy, r"net\.0\.weight"),
    "init": (_by_init, r"net\.2\.bias"),
    "optimizer": (_by_parameters_of_the_optimizer, r"net\.0\.weight"),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_to_parameters_in_a_step_are_refused_by_name(name: str) -> None:
    write, parameter = WRITES[name]
    model = Targeted(write)
    with pytest.raises(RuntimeError, match=rf"writes to the parameter `{parameter}` in place") as e:
        boring.trainer("dp", 2).fit(model, boring.Blobs())
    assert "on_train_batch_end" in str(e.value)


def test_writes_to_modules_in_lists_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"the parameter `Linear\.weight` in place"):
        boring.trainer("dp", 2).fit(Targeted(_by_data, registered=False), boring.Blobs())


def test_writes_in_a_later_step_are_refused() -> None:
    class Later(Targeted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.write = _by_data if batch_idx == 6 else None
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"target\.0\.weight"):
        boring.trainer("dp", 2).fit(Later(), boring.Blobs(4, 48))


def test_writes_in_validation_are_refused() -> None:
    class Swapping(Targeted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            _by_data(self)

    with pytest.raises(RuntimeError, match=r"target\.0\.weight"):
        boring.trainer("dp", 2).validate(Swapping(), boring.Blobs(), verbose=False)


def test_writes_before_manual_backward_are_refused_by_name() -> None:
    class Manual(Targeted):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            _by_data_in_place(self)
            self.manual_backward(loss)

    with pytest.raises(RuntimeError, match=r"the parameter `target\.0\.weight` in place"):
        boring.trainer("dp", 2).fit(Manual(), boring.Blobs())


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_backward"])
@pytest.mark.parametrize("write", [_by_data, _by_assignment, _by_state])
def test_target_networks_updated_in_hooks_equal_one_device(hook: str, write: Write) -> None:
    class Hooked(Targeted):
        pass

    setattr(Hooked, hook, lambda self, *_: write(self))
    models = [Hooked(), Hooked()]
    for model, (strategy, devices) in zip(models, (("auto", 1), ("dp", 2)), strict=True):
        boring.trainer(strategy, devices).fit(model, boring.Blobs(8, 40))
    boring.assert_same_weights(*models)


def test_reading_data_is_no_write() -> None:
    class Reading(Targeted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            decay = sum(p.data.square().sum() for p in self.net.parameters())
            copied = copy.deepcopy(self.net)
            copied[0].weight.data.mul_(0)
            return loss + 0 * decay

    models = [Reading(), Reading()]
    for model, (strategy, devices) in zip(models, (("auto", 1), ("dp", 2)), strict=True):
        boring.trainer(strategy, devices).fit(model, boring.Blobs(8, 40))
    boring.assert_same_weights(*models)
