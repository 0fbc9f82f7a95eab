"""What `prepare_data` sets is there on every rank, as it is on one device."""

import copy
import logging
import pickle
import random
import threading
from types import SimpleNamespace
from typing import Any

import boring
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, random_split

from lightning_mgpu.ray import RayStrategy, prepared_data


class _Prepared(boring.Blobs):
    """As `boring.Blobs`, of a dataset that only `prepare_data` makes, in an order by chance."""

    names: list[str] | None = None

    def prepare_data(self) -> None:
        self.dataset, self.rest = random_split(boring.blobs(60), [48, 12])
        self.names = ["a", "b", "c"]
        self.calls = getattr(self, "calls", 0) + 1

    def _dataloader(self) -> DataLoader[Any]:
        assert self.calls == 1
        sampler: Any = None
        if self.world_size:
            rank = self.trainer.global_rank
            sampler = DistributedSampler(self.dataset, self.world_size, rank, shuffle=False)
        return DataLoader(self.dataset, batch_size=self.batch_size, sampler=sampler)

    train_dataloader = val_dataloader = _dataloader


class _Scaled(boring.Classifier):
    """Counts samples of each class in `prepare_data`, and draws numbers after it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.stats: dict[str, Any] = {}

    def prepare_data(self) -> None:
        self.scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
        self.stats["factor"] = 3.0
        self.net.note = "deep"
        self.lock = threading.Lock()

    def setup(self, stage: str) -> None:
        assert self.net.note == "deep"
        self.drawn = torch.rand((), dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale * self.stats["factor"] * (1 + self.drawn)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_get_the_result_of_one_device() -> None:
    def fitted(trainer: Any, data: Any) -> boring.Classifier:
        torch.manual_seed(3)
        model = _Scaled()
        trainer.fit(model, datamodule=data)
        return model

    kwargs = {"max_epochs": 2, "use_distributed_sampler": False}
    expected = fitted(boring.trainer("auto", 1, **kwargs), _Prepared(batch_size=8))
    strategy = RayStrategy(num_workers=2)
    model = fitted(boring.trainer(strategy, "auto", **kwargs), _Prepared(world_size=2))
    boring.assert_same_weights(expected, model)


def _ranks(preparing: Any) -> tuple[Any, Any]:
    """A module on two ranks of which the first has called `preparing`, and the other has got it."""
    first = _Scaled()
    first.table, first.same = np.zeros(3), [1, 2]
    first.config = SimpleNamespace(size=1, nested=[{}])
    second = copy.deepcopy(first)
    states = []
    for module in (first, second):
        names = {f"module {name}": part for name, part in module.named_modules()}
        names |= {f"tensor {name}": part for name, part in module.named_parameters()}
        names |= {f"tensor {name}": part for name, part in module.named_buffers()}
        states.append(prepared_data._State(names))
    preparing(first)
    changes = pickle.loads(pickle.dumps(states[0].changes()))
    if changes is not None:
        states[1].apply(changes)
    return (first, second) if changes is not None else (first, None)


def _in_place(module: Any) -> None:
    module.table[1] = 5.0
    module.config.nested[0]["key"] = "value"
    module.stats["new"] = 1
    del module.same


def test_changes_in_place_arrive() -> None:
    _, second = _ranks(_in_place)
    assert second.table.tolist() == [0.0, 5.0, 0.0]
    assert (second.config.nested, second.stats) == ([{"key": "value"}], {"new": 1})
    assert not hasattr(second, "same")


def test_new_layers_arrive_and_old_ones_stay() -> None:
    def preparing(module: Any) -> None:
        module.head = torch.nn.Linear(3, 2)
        module.first = module.net[0]

    _, second = _ranks(preparing)
    assert second.head.weight.shape == (2, 3)
    assert second.first is second.net[0]
    assert len(list(second.parameters())) == len(list(_Scaled().parameters())) + 2


def test_nothing_is_sent_where_nothing_changes() -> None:
    assert _ranks(lambda module: None)[1] is None
    assert _ranks(lambda module: len(module.table))[1] is None


def test_what_cannot_be_pickled_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def preparing(module: Any) -> None:
        module.lock, module.size = threading.Lock(), 4

    with caplog.at_level(logging.WARNING):
        _, second = _ranks(preparing)
    assert second.size == 4
    assert "`prepare_data` sets `_Scaled.lock`, which cannot be pickled" in caplog.text
    assert "set it in `setup`" in caplog.text


def test_numbers_drawn_on_one_rank_are_drawn_on_all() -> None:
    before = prepared_data._generators()
    try:
        state = prepared_data._State({})
        drawn = (random.random(), np.random.rand(), torch.rand(()).item())
        changes = state.changes()
        assert changes is not None
        following = random.random(), np.random.rand(), torch.rand(()).item()
        prepared_data._set_generators(before)
        prepared_data._State({}).apply(changes)
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == following != drawn
        # Ranks that draw numbers of their own go on doing so.
        random.seed(5)
        own = prepared_data._generators()
        prepared_data._State({}).apply(changes)
        assert prepared_data._generators() == own
    finally:
        prepared_data._set_generators(before)
