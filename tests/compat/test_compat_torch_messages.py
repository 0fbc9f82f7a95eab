"""The words of torch's errors are still those that we look for: each error is provoked.

Those of NCCL need a GPU (`tests/gpu/test_gpu_ranks.py`).
"""

import datetime
import io
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from lightning_mgpu._compat import torch_messages as messages


def _matrix(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


_SIZES: dict[str, Callable[[], Any]] = {
    "add": lambda: _matrix(3) + _matrix(4),
    "matmul": lambda: _matrix(2, 3) @ _matrix(4, 5),
    "linear": lambda: nn.Linear(3, 2)(_matrix(2, 4)),
    "cat": lambda: torch.cat([_matrix(2, 3), _matrix(2, 4)]),
    "stack": lambda: torch.stack([_matrix(2), _matrix(3)]),
    "view": lambda: _matrix(6).view(4, 2),
    "reshape": lambda: _matrix(6).reshape(4, 2),
    "expand": lambda: _matrix(3).expand(4),
    "copy": lambda: _matrix(3).copy_(_matrix(4)),
    "assign": lambda: _matrix(3).__setitem__(slice(None), _matrix(4)),
    "cross entropy": lambda: F.cross_entropy(_matrix(3, 2), torch.zeros(4, dtype=torch.long)),
    "nll": lambda: F.nll_loss(_matrix(3, 2), torch.zeros(4, dtype=torch.long)),
    "binary": lambda: F.binary_cross_entropy_with_logits(_matrix(3), _matrix(4)),
    "index": lambda: _matrix(3)[torch.tensor([5])],
    "index by an int": lambda: _matrix(3)[5],
    "index of two": lambda: _matrix(3, 3)[torch.tensor([0, 1]), torch.tensor([0, 1, 2])],
    "mask": lambda: _matrix(3)[torch.ones(4, dtype=torch.bool)],
    "dimension": lambda: _matrix(3).sum(1),
    "broadcast": lambda: torch.broadcast_tensors(_matrix(3), _matrix(4)),
    "recurrent": lambda: nn.GRU(1, 1)(_matrix(2, 3, 1), _matrix(1, 4, 1)),
    "dot": lambda: torch.dot(_matrix(3), _matrix(4)),
    "zip of lists": lambda: torch._foreach_add([_matrix(3)], [_matrix(4)]),
}


@pytest.mark.parametrize("case", _SIZES)
def test_sizes_that_do_not_fit(case: str) -> None:
    errors = (RuntimeError, ValueError, IndexError)
    with pytest.raises(errors, match=messages.SIZE_OF_ANOTHER_BATCH):
        _SIZES[case]()


def test_sizes_of_two_operands() -> None:
    with pytest.raises(RuntimeError, match=re.escape(messages.SIZES_OF_TWO_OPERANDS)):
        _SIZES["add"]()


def test_other_errors_are_not_of_sizes() -> None:
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        _matrix(2).backward()
    assert not messages.SIZE_OF_ANOTHER_BATCH.search(str(caught.value))


def test_graph_that_is_gone() -> None:
    loss = torch.ones(1, requires_grad=True).exp().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=messages.GRAPH_IS_GONE):
        loss.backward()


def test_tensor_that_was_written_to() -> None:
    output = torch.ones(1, requires_grad=True).exp()
    output.detach().add_(1)
    with pytest.raises(RuntimeError, match=messages.WRITTEN_TO):
        output.sum().backward()


def test_state_dict_of_another_model() -> None:
    with pytest.raises(RuntimeError, match=re.escape(messages.STATE_DICT_IS_ANOTHERS)):
        nn.Linear(1, 1).load_state_dict({})


class Stranger:
    """What no file of weights may hold."""


def test_class_that_weights_may_not_hold() -> None:
    stream = io.BytesIO()
    torch.save(Stranger(), stream)
    stream.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed") as caught:
        torch.load(stream, weights_only=True)
    found = messages.NOT_ALLOWED_IN_WEIGHTS.search(str(caught.value))
    assert found is not None
    assert found[1] == f"{__name__}.Stranger"


_TIMEOUT = datetime.timedelta(seconds=0.3)


def _ranks(timeout: datetime.timedelta) -> list[Any]:
    """A pair of ranks that are connected, both in this process."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        return list(
            threads.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, timeout), range(2))
        )


def _told_of_late_peer() -> Iterator[str]:
    zero, _one = _ranks(_TIMEOUT)
    for _ in range(2):
        try:
            zero.allreduce([torch.ones(1)]).wait()
        except RuntimeError as error:
            yield str(error)


def _told_at_barrier() -> Iterator[str]:
    zero, _one = _ranks(_TIMEOUT)
    try:
        zero.monitored_barrier(_TIMEOUT)
    except RuntimeError as error:
        yield str(error)


def _told_of_lost_peer() -> Iterator[str]:
    ranks = _ranks(datetime.timedelta(seconds=30))
    work = ranks[0].allreduce([torch.ones(1)])
    del ranks[1]
    try:
        work.wait()
    except RuntimeError as error:
        yield str(error)


def test_collectives_tell_that_a_peer_is_late() -> None:
    first, second = _told_of_late_peer()
    (barrier,) = _told_at_barrier()
    for text in (first, second, barrier):
        assert any(words in text for words in messages.COLLECTIVE_FAILED), text
        assert any(words in text.lower() for words in messages.COLLECTIVE_TIMED_OUT), text


def test_collectives_tell_that_a_peer_is_lost() -> None:
    (text,) = _told_of_lost_peer()
    assert any(words in text for words in messages.COLLECTIVE_FAILED), text
    assert not any(words in text.lower() for words in messages.COLLECTIVE_TIMED_OUT), text


def test_a_peer_that_never_comes_is_an_error_of_its_own_class() -> None:
    with pytest.raises(dist.DistError, match="timeout"):
        dist.ProcessGroupGloo(dist.HashStore(), 0, 2, _TIMEOUT)
