"""Objects on their way to a worker, without the worker."""

import errno
import fcntl
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mgpu.launch import payload as payload_module
from lightning_mgpu.launch.channel import Channel
from lightning_mgpu.launch.errors import LaunchError, UnpicklableError
from lightning_mgpu.launch.payload import Payload, load

# From <linux/fcntl.h>; Python's `fcntl` does not know them everywhere.
_F_ADD_SEALS, _F_SEAL_GROW = 1033, 4


def round_trip(obj: Any) -> Any:
    with Payload(obj) as payload:
        return load(os.dup(payload.file))


@pytest.fixture(autouse=True)
def no_file_left_open() -> Iterator[None]:
    before = _open_files()
    yield
    if _open_files() > before:
        gc.collect()
    assert _open_files() <= before


@pytest.fixture
def in_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("steps", torch.zeros(1))


# What arrives


def test_model_arrives_with_its_ties() -> None:
    model = TiedModel()
    copy = round_trip(model)
    assert copy.decoder.weight is copy.encoder.weight
    assert type(copy.frozen) is nn.Parameter
    assert {name: p.requires_grad for name, p in copy.named_parameters()} == {
        "encoder.weight": True,
        "frozen": False,
    }
    for name, value in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value)


def test_views_share_their_storage_on_arrival() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    arrived_base, row, column = round_trip((base, base[1], base[:, 2]))
    arrived_base.mul_(2)
    assert row.tolist() == [8, 10, 12, 14]
    assert column.tolist() == [4, 12, 20]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0, 3),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.arange(6).reshape(2, 3).t(),
        torch.eye(3).to_sparse(),
        torch.ones(2, requires_grad=True),
    ],
    ids=["empty", "bfloat16", "transposed", "sparse", "leaf"],
)
def test_tensor_of_any_kind_arrives(tensor: torch.Tensor) -> None:
    copy = round_trip([tensor])[0]
    assert (copy.dtype, copy.layout, copy.requires_grad) == (
        tensor.dtype,
        tensor.layout,
        tensor.requires_grad,
    )
    assert copy.is_sparse or copy.stride() == tensor.stride()
    assert torch.equal(copy.to_dense(), tensor.to_dense())


def test_write_to_the_copy_does_not_reach_the_source_nor_other_copies() -> None:
    source = torch.zeros(100_000)
    with Payload(source) as payload:
        first = load(os.dup(payload.file))
        first += 1
        second = load(os.dup(payload.file))
    assert (source.sum(), first.sum(), second.sum()) == (0, 100_000, 0)


def test_write_to_the_source_does_not_reach_the_copy() -> None:
    source = torch.zeros(100_000)
    with Payload(source) as payload:
        source += 1
        assert load(os.dup(payload.file)).sum() == 0


def test_copy_outlives_its_payload() -> None:
    copy = round_trip(torch.arange(100_000))
    assert int(copy[-1]) == 99_999


def test_large_tensor_needs_no_shared_memory_file_system() -> None:
    """A container's /dev/shm often has 64 MiB in all; this file does not lie there."""
    before = set(os.listdir("/dev/shm"))
    tensor = torch.arange(2**24, dtype=torch.int32)  # 64 MiB
    with Payload(tensor) as payload:
        assert os.fstat(payload.file).st_size > 64 * 2**20
        assert os.readlink(f"/proc/self/fd/{payload.file}").startswith("/memfd:")
        assert set(os.listdir("/dev/shm")) <= before
        assert torch.equal(load(os.dup(payload.file)), tensor)


@pytest.mark.slow
@pytest.mark.skipif(psutil.virtual_memory().available < 8 * 2**30, reason="needs 8 GiB")
def test_tensor_larger_than_one_write_of_the_kernel() -> None:
    """It writes at most 2 GiB - 4 KiB at once, and `torch.save` ignores how much was written."""
    tensor = torch.zeros(2**31 + 2**20, dtype=torch.uint8)
    tensor[-1] = 7
    copy, last = round_trip((tensor, "last"))
    assert (int(copy[-1]), int(copy[2**30]), last) == (7, 0, "last")


def test_copy_of_a_large_tensor_is_mapped_not_read() -> None:
    tensor = torch.ones(2**24)  # 64 MiB
    with Payload(tensor) as payload:
        before = psutil.Process().memory_full_info().uss
        copy = load(os.dup(payload.file))
        assert psutil.Process().memory_full_info().uss - before < 16 * 2**20
    assert float(copy[-1]) == 1


# Tensors that every receiver rewrites


def past_the_file(obj: Any, rewritten: list[torch.Tensor]) -> tuple[Any, int, list[int]]:
    """What arrives through a channel, the size of the file, and those of the buffers."""
    ours, theirs = Channel.pair()
    with theirs, ThreadPoolExecutor(1) as thread, Payload(obj, rewritten=rewritten) as payload:
        arrival = thread.submit(Channel(theirs).receive)
        ours.send(payload.buffers, payload.file)
        buffers, file = arrival.result()
        ours.close()
        assert file is not None
        size = os.fstat(file).st_size
        return load(file, buffers), size, [len(buffer) for buffer in buffers]


def test_rewritten_tensors_stay_out_of_the_file_and_keep_their_ties() -> None:
    model = TiedModel()
    large = nn.Parameter(torch.randn(2**9, 2**10))
    model.encoder.weight = model.decoder.weight = large
    source = {
        "model": model,
        "row": large.detach()[1],
        "bits": large.detach().view(torch.int32),
        "storage": large.untyped_storage(),
        "other": torch.ones(2**19),
    }
    copy, size, sizes = past_the_file(source, list(model.parameters()))
    assert sizes == [2**21]
    assert 2**21 < size < 2**21 + 2**16  # "other" is in there
    weight = copy["model"].encoder.weight
    assert type(weight) is nn.Parameter
    assert weight.requires_grad
    assert copy["model"].decoder.weight is weight
    assert torch.equal(weight, large)
    with torch.no_grad():
        weight.fill_(2)
    assert copy["row"].tolist() == [2.0] * 2**10
    assert copy["bits"].unique().tolist() == [0x40000000]
    assert copy["storage"].data_ptr() == weight.data_ptr()
    assert not (large == 2).all()


@pytest.mark.parametrize("kind", ["small", "meta", "lazy", "sparse", "empty"])
def test_what_cannot_stay_out_of_the_file_does_not(kind: str) -> None:
    tensors = {
        "small": lambda: torch.ones(10),
        "meta": lambda: torch.ones(2**20, device="meta"),
        "lazy": lambda: nn.LazyLinear(3).weight,
        "sparse": lambda: torch.eye(2**10).to_sparse(),
        "empty": lambda: torch.empty(0),
    }
    tensor = tensors[kind]()
    copy, _, sizes = past_the_file([tensor], [tensor])
    assert sizes == []
    assert type(copy[0]) is type(tensor)


def test_rewritten_tensor_that_is_not_pickled_is_not_sent() -> None:
    tensor = torch.ones(2**20)
    copy, _, sizes = past_the_file([1], [tensor])
    assert (copy, sizes) == ([1], [])


def test_closed_payload_does_not_hold_the_tensors() -> None:
    tensor = torch.ones(2**20)
    payload = Payload([tensor], rewritten=[tensor])
    payload.close()
    assert payload.buffers == []


@pytest.mark.parametrize("kind", ["lambda", "closure", "local class"])
def test_what_pickle_refuses_arrives(kind: str) -> None:
    class Local:
        def __call__(self) -> int:
            return number

    number = 3
    functions: dict[str, Callable[[], int]] = {
        "lambda": lambda: 3,
        "closure": lambda: number,
        "local class": Local(),
    }
    assert round_trip(functions[kind])() == 3


def test_function_that_uses_a_module_of_a_special_class_arrives() -> None:
    """cloudpickle takes all modules that a function mentions along, and knows plain ones only."""
    assert round_trip(lambda: torch.backends.cudnn)() is torch.backends.cudnn


def test_loader_in_the_middle_of_use_arrives_fresh() -> None:
    data = TensorDataset(torch.arange(8))
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=True)
    iterator = iter(loader)
    try:
        next(iterator)
        copy = round_trip({"loader": loader})["loader"]
        assert copy._iterator is None
        assert loader._iterator is iterator
        assert (copy.batch_size, copy.num_workers, len(copy)) == (2, 1, 4)
        assert [batch[0].tolist() for batch in iterator] == [[2, 3], [4, 5], [6, 7]]
    finally:
        iterator._shutdown_workers()


# The file


@pytest.mark.usefixtures("in_temporary_file")
def test_without_memfd_a_temporary_file_serves(temporary_files: Path) -> None:
    before = list(temporary_files.iterdir())
    with Payload({"x": torch.arange(100_000)}) as payload:
        assert os.readlink(f"/proc/self/fd/{payload.file}").startswith(str(temporary_files))
        assert list(temporary_files.iterdir()) == before
        copy = load(os.dup(payload.file))
    assert torch.equal(copy["x"], torch.arange(100_000))


def test_closing_twice_closes_once() -> None:
    payload = Payload(1)
    payload.close()
    taken = os.open(os.devnull, os.O_RDONLY)  # probably under the same number
    try:
        payload.close()
        os.fstat(taken)
    finally:
        os.close(taken)


def test_load_closes_its_file_also_when_it_fails() -> None:
    with Payload(1) as payload:
        os.truncate(payload.file, 10)
        with pytest.raises(RuntimeError, match="zip archive"):
            load(os.dup(payload.file))


def test_payload_closes_its_file_when_pickling_fails() -> None:
    with pytest.raises(UnpicklableError, match="`object` cannot be pickled"):
        Payload(threading.Lock())


# Where nothing more can be written


@pytest.mark.parametrize("room", [10, 3000, 2**20])
def test_full_file_is_a_launch_error(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the archive it happens: in its head, its pickle or a tensor."""

    def sealed_file() -> int:
        file = os.memfd_create("lightning_mgpu", os.MFD_ALLOW_SEALING)
        os.truncate(file, room)
        fcntl.fcntl(file, _F_ADD_SEALS, _F_SEAL_GROW)
        return file

    monkeypatch.setattr(payload_module, "_anonymous_file", sealed_file)
    with pytest.raises(LaunchError, match="Could not write the objects for the workers") as info:
        Payload({"x": torch.zeros(2**20)})
    assert not isinstance(info.value, UnpicklableError)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_a_launch_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_module, "_anonymous_file", lambda: os.open("/dev/full", os.O_RDWR))
    with pytest.raises(LaunchError, match=os.strerror(errno.ENOSPC)):
        Payload({"x": torch.zeros(100_000)})


def test_error_of_an_objects_own_pickling_is_not_taken_for_a_full_disk() -> None:
    class Reader:
        def __getstate__(self) -> dict[str, Any]:
            raise FileNotFoundError("vocabulary.txt")

    with pytest.raises(UnpicklableError, match=r"`object\['reader'\]` cannot .*vocabulary\.txt"):
        Payload({"reader": Reader()})


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
