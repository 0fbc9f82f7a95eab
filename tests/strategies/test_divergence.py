"""Ranks that drift apart are told of, with the parameter."""

from typing import Any

import boring
import pytest
import torch

from lightning_mgpu import DDPStrategy
from lightning_mgpu.strategies.ranks.divergence import (
    DivergenceCheck,
    RanksDivergedError,
    fingerprint,
)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64],
)
def test_fingerprint_sees_each_bit_and_the_order(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(dtype)
    known = int(fingerprint(tensor))
    assert int(fingerprint(tensor.clone())) == known
    assert int(fingerprint(tensor.flip(1))) != known
    for index in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[index] = int(tensor.view(-1)[index] == 0)
        assert int(fingerprint(other)) != known


def test_fingerprint_of_any_layout() -> None:
    tensor = torch.rand(3, 5)
    assert int(fingerprint(tensor.t())) == int(fingerprint(tensor.t().contiguous()))
    assert int(fingerprint(torch.zeros(0))) == 0
    assert int(fingerprint(torch.tensor(2.5))) != 0
    big = torch.zeros(2**20 + 3)
    known = int(fingerprint(big))
    big[-1] = 1e-30
    assert int(fingerprint(big)) != known


def test_comparison_is_due_once_every_so_many_steps() -> None:
    check = DivergenceCheck(3)
    assert [check.is_due(step) for step in (0, 0, 1, 3, 3, 5, 9)] == [
        *(False, False, False, True, False, False, True)
    ]
    resumed = DivergenceCheck(3)
    assert [resumed.is_due(step) for step in (7, 8, 9)] == [False, False, True]


class Drifting(boring.Classifier):
    """Changes a parameter on one rank, at the fourth step."""

    rank = 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and self.global_rank == self.rank:
            with torch.no_grad():
                self.net[2].bias[0] += 1e-12


def _fit(model: boring.Classifier, **strategy: Any) -> None:
    boring.trainer(DDPStrategy(**strategy)).fit(model, datamodule=boring.Blobs())


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_parameter_that_differs_is_named(rank: int) -> None:
    class Here(Drifting):
        pass

    Here.rank = rank
    with pytest.raises(RanksDivergedError, match=r"After 4 .* `net.2.bias` on rank 1 is not"):
        _fit(Here(), detect_divergence=2)


def test_ranks_that_agree_are_left_alone() -> None:
    """Unfrozen in the middle, which stock DDP would not average."""

    class Unfreezing(boring.Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].requires_grad_(batch_idx > 2)

    _fit(Unfreezing(), detect_divergence=1)
    _fit(Drifting())


def test_structures_that_differ_are_told_of() -> None:
    class Growing(boring.Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and self.global_rank == 1:
                self.extra = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    with pytest.raises(RanksDivergedError, match=r"`extra` is \[1\] torch.float32 on rank 1, and"):
        _fit(Growing(), detect_divergence=1)


def test_buffers_of_another_shape_are_refused_before_training() -> None:
    """DDP would send the values of one into those of another."""

    class PerRank(boring.Classifier):
        def setup(self, stage: str) -> None:
            size = 4 + 2 * self.global_rank
            self.norm = torch.nn.BatchNorm1d(size, affine=False)

    with pytest.raises(RanksDivergedError, match=r"`norm.running_mean` is \[6\] .* on rank 1, and"):
        _fit(PerRank())


def test_other_names_that_are_averaged_are_told_of() -> None:
    """Their values would be mixed, as many as there are on each rank."""

    class Logging(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log(f"of_{self.global_rank}", 1.0, sync_dist=True)
            self.log(f"own_{self.global_rank}", 1.0)
            return self._loss(batch)

    with pytest.raises(RanksDivergedError, match=r"rank 0 `.*of_0`, and rank 1 `.*of_1`\."):
        _fit(Logging(), detect_divergence=1)


@pytest.mark.parametrize("every", [0, 1.5, -1])
def test_number_that_is_none_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=r"detect_divergence=.*at least 1"):
        DDPStrategy(detect_divergence=every)
