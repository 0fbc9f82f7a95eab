"""Objects that go into the split module or come out of it, such as caches of keys and values."""

from typing import Any

import pytest
import torch
from pipelines import Net, data, pipelined
from torch import Tensor

from lightning_mgpu.engine.pipeline.microbatch import SplitError


class Cache:
    """Grows by what it is called with."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.kind = "cache"

    def grow(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.stack(self.seen).sum(0)


class Remembers(Net):
    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return self.second(cache.grow(self.first(x)))


class ReturnsCache(Net):
    def forward(self, x: Tensor) -> Any:
        cache = Cache()
        return {"z": self.second(cache.grow(self.first(x))), "cache": cache}


def test_an_object_with_tensors_is_joined() -> None:
    x = data(8, 6)
    net = ReturnsCache()
    expected = net(x)
    with pipelined(net, [x]) as run:
        actual = run(x)
    torch.testing.assert_close(actual["cache"].seen[0], expected["cache"].seen[0])
    assert actual["cache"].kind == "cache"


def test_a_call_with_a_cache_stays_whole_without_a_graph() -> None:
    x, net, cache, same = data(8, 6), Remembers(), Cache(), Cache()
    with torch.no_grad(), pipelined(net, [x]) as run:
        for _ in range(2):
            torch.testing.assert_close(run(x, cache), net.forward(x, same))
    assert len(cache.seen) == 2
    assert cache.seen[0].shape == (8, 8)


def test_a_cache_that_micro_batches_would_share_is_refused() -> None:
    x, cache = data(8, 6), Cache()
    with pipelined(Remembers(), [x]) as run, pytest.raises(SplitError, match="writes to its arg"):
        run(x, cache)
    assert not cache.seen


def test_a_sum_over_samples_is_added_up() -> None:
    x, net = data(8, 6), Net(end=lambda z: z.square().sum())
    expected = torch.autograd.grad(net(x), list(net.parameters()))
    with pipelined(net, [x]) as run:
        total = run(x)
        found = torch.autograd.grad(total, list(net.parameters()))
    torch.testing.assert_close(total, net(x))
    torch.testing.assert_close(found, expected)


def test_a_loss_that_is_the_same_for_all_samples_by_chance_trains_on_all_of_them() -> None:
    x, labels = data(8, 6), torch.tensor([0, 1, 1, 2, 2, 2, 3, 3])
    net = Classifies()
    torch.nn.init.zeros_(net.second.weight)
    torch.nn.init.zeros_(net.second.bias)
    expected = torch.autograd.grad(net(x, labels), list(net.parameters()))
    with pipelined(net, [x, labels]) as run:
        found = torch.autograd.grad(run(x, labels), list(net.parameters()))
    torch.testing.assert_close(found, expected)


def test_what_is_no_tensor_has_to_be_the_whole_batchs() -> None:
    x = data(8, 6)
    module = Net(end=lambda z: {"z": z, "entries": 2 * len(z)})
    with pipelined(module, [x]) as run, pytest.raises(SplitError, match="'entries'"):
        run(x)


class Classifies(Net):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(super().forward(x), labels)
