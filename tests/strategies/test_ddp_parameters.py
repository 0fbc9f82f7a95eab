"""Parameters that change under DDP: unfrozen, frozen, added or replaced in the middle of a run."""

from collections.abc import Callable
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_mgpu import DDPStrategy, PipelineDDPStrategy
from lightning_mgpu.strategies.ranks.reduced import forget_buckets

_Hook = Callable[["Changing", int, int], None]


class Changing(boring.Classifier):
    """Calls `change(self, epoch, batch_idx)` in a hook before each step, or within it."""

    def __init__(self, change: _Hook, within: bool = False, frozen: bool = True) -> None:
        super().__init__()
        self.change, self.within = change, within
        self.net[0].requires_grad_(not frozen)
        self.head: nn.Module = nn.Identity()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.within:
            self.change(self, self.current_epoch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.within:
            self.change(self, self.current_epoch, batch_idx)
        self.count += self.global_rank
        return self._loss(batch)

    def on_train_end(self) -> None:
        for parameter in self.parameters():
            values = self.all_gather(parameter.detach()).reshape(-1, *parameter.shape)
            assert all(torch.equal(values[0], other) for other in values), "ranks drifted apart"


def unfreeze(model: Changing, epoch: int, batch_idx: int) -> None:
    if (epoch, batch_idx) == (1, 0):
        model.net[0].requires_grad_(True)


def unfreeze_in_the_middle(model: Changing, epoch: int, batch_idx: int) -> None:
    if (epoch, batch_idx) == (0, 3):
        model.net[0].requires_grad_(True)


def freeze(model: Changing, epoch: int, batch_idx: int) -> None:
    if (epoch, batch_idx) == (1, 0):
        model.net[2].requires_grad_(False)
        model.net[0].requires_grad_(True)


def freeze_only(model: Changing, epoch: int, batch_idx: int) -> None:
    if (epoch, batch_idx) == (0, 2):
        model.net[2].bias.requires_grad_(False)


def alternate(model: Changing, epoch: int, batch_idx: int) -> None:
    for i in (0, 2):
        model.net[i].requires_grad_(batch_idx % 2 == i // 2)


def add(model: Changing, epoch: int, batch_idx: int) -> None:
    if (epoch, batch_idx) == (1, 0):
        head = nn.Linear(3, 3, dtype=torch.float64)
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
        model.head = head
        model.optimizers().add_param_group({"params": list(head.parameters())})


def replace(model: Changing, epoch: int, batch_idx: int) -> None:
    if (epoch, batch_idx) == (1, 0):
        model.net[2].weight = nn.Parameter(model.net[2].weight.detach() / 2)
        model.optimizers().add_param_group({"params": [model.net[2].weight]})


def _fit(model: pl.LightningModule, strategy: Any, devices: int, **kwargs: Any) -> None:
    """With batches of eight samples in all."""
    data = boring.Blobs(8) if devices == 1 else boring.Blobs(4, world_size=2)
    trainer = boring.trainer(
        strategy, devices, max_epochs=3, use_distributed_sampler=False, **kwargs
    )
    trainer.fit(model, datamodule=data)


@pytest.mark.parametrize(
    ("change", "strategy", "kwargs"),
    [
        (unfreeze, {}, {}),
        (unfreeze, {"find_unused_parameters": True}, {}),
        (unfreeze, {"static_graph": True}, {}),
        (unfreeze, {"gradient_as_bucket_view": True}, {"accumulate_grad_batches": 2}),
        (unfreeze_in_the_middle, {}, {"accumulate_grad_batches": 2}),
        (freeze, {}, {}),
        (freeze, {"find_unused_parameters": True}, {}),
        (freeze_only, {}, {}),
        (alternate, {}, {}),
        (add, {}, {}),
        (replace, {}, {}),
    ],
)
def test_changed_parameters_train_as_on_one_device(
    change: _Hook, strategy: Any, kwargs: Any
) -> None:
    expected, model = Changing(change), Changing(change)
    _fit(expected, "auto", 1, **kwargs)
    _fit(model, DDPStrategy(**strategy), 2, **kwargs)
    boring.assert_same_weights(model.net, expected.net)
    boring.assert_same_weights(model.head, expected.head)


def test_changed_parameters_of_a_pipeline_train_as_on_one_device() -> None:
    expected, model = Changing(unfreeze), Changing(unfreeze)
    _fit(expected, "auto", 1)
    _fit(model, PipelineDDPStrategy(module="net"), 4)
    boring.assert_same_weights(model.net, expected.net)


def test_backbone_finetuning_trains_as_on_one_device() -> None:
    class Backbone(boring.Classifier):
        @property
        def backbone(self) -> nn.Module:
            return self.net[0]

        def configure_optimizers(self) -> Any:
            head = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(head, lr=0.1, momentum=0.9)

    models = [Backbone(), Backbone()]
    for model, (strategy, devices) in zip(models, (("auto", 1), ("mgpu_ddp", 2)), strict=True):
        finetuning = BackboneFinetuning(1, lambda _: 1.5, backbone_initial_lr=0.05, verbose=False)
        _fit(model, strategy, devices, callbacks=[finetuning])
    assert not torch.equal(models[0].net[0].weight, boring.Classifier().net[0].weight)
    boring.assert_same_weights(models[1], models[0])


class _Adversaries(boring.Classifier):
    """Two optimizers, toggled; the second one's layer is unfrozen in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net[2].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[2].requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers[: 1 + (self.current_epoch > 0)]:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


def test_toggled_optimizers_train_as_on_one_device() -> None:
    expected, model = _Adversaries(), _Adversaries()
    _fit(expected, "auto", 1)
    _fit(model, DDPStrategy(find_unused_parameters=True), 2)
    boring.assert_same_weights(model, expected)


def test_buffers_of_each_rank_stay_its_own_where_they_are_not_broadcast() -> None:
    class Counts(Changing):
        counts: list[float]

        def on_train_end(self) -> None:
            self.counts = self.all_gather(self.count).tolist()

    model = Counts(unfreeze)
    _fit(model, DDPStrategy(broadcast_buffers=False), 2)
    assert model.counts == [0.0, 18.0]


@pytest.mark.parametrize("change", [unfreeze, add])
def test_parameters_that_come_within_the_step_are_refused(change: _Hook) -> None:
    """Before an optimizer has used the gradient that nobody averaged, if they were there before."""
    model = Changing(change, within=True)
    with pytest.raises(MisconfigurationException, match=r"too late.*on_train_batch_start"):
        _fit(model, DDPStrategy(find_unused_parameters=True), 2)
    if change is unfreeze:
        assert torch.equal(model.net[0].weight, boring.Classifier().net[0].weight)


def test_state_of_power_sgd_starts_anew() -> None:
    class State:
        def __init__(self) -> None:
            self.error_dict, self.p_memory_dict, self.q_memory_dict = {0: 1}, {0: 1}, {0: 1}
            self.iter = 9

    state = State()
    forget_buckets(state)
    forget_buckets(None)
    assert vars(state) == {"error_dict": {}, "p_memory_dict": {}, "q_memory_dict": {}, "iter": 0}
