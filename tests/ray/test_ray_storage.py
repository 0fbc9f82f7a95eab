"""Where the state of a training is kept that may lose its workers."""

import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mgpu.ray import RayStrategy
from lightning_mgpu.ray.epoch_checkpoint import DriverKeeper
from lightning_mgpu.ray.storage import Directory, StorageKeeper, absolute


def _checkpoint(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "global_step": 10 * epoch, "weights": torch.full((3,), epoch)}


@pytest.mark.parametrize("kind", ["path", "file", "memory"])
def test_storage_keeps_the_latest_checkpoint_only(kind: str, tmp_path: Path) -> None:
    roots = {"path": f"{tmp_path}/new", "file": f"file://{tmp_path}/new", "memory": "memory://new"}
    directory, file = Directory(f"{roots[kind]}/fit"), io.BytesIO()
    assert not directory.is_marked()
    assert directory.mark() is None
    assert directory.is_marked()
    directory.unmark()
    assert not directory.is_marked()
    assert not directory.copy_to(file)
    for epoch in (1, 2):
        directory.write(_checkpoint(epoch))
    assert directory.copy_to(file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file), _checkpoint(2))
    if kind != "memory":
        files = {path.name for path in (tmp_path / "new" / "fit").iterdir()}
        assert files == {"latest", "epoch=2-step=20.ckpt"}
    directory.remove()
    assert not directory.copy_to(file)
    directory.remove()


def test_half_written_checkpoint_leaves_the_last_one(tmp_path: Path) -> None:
    directory, file = Directory(f"{tmp_path}/fit"), io.BytesIO()
    directory.write(_checkpoint(1))
    with pytest.raises(AttributeError, match="local object"):
        directory.write({**_checkpoint(2), "breaks": lambda: None})
    directory.copy_to(file)
    file.seek(0)
    assert torch.load(file)["epoch"] == 1


def test_checkpoint_that_is_elsewhere_is_not_taken_for_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not visible on the node .* all nodes share"):
        Directory(f"{tmp_path}/fit", has_some=True).copy_to(io.BytesIO())


class _Workers:
    """Two workers of a group, of which only the first sees the storage."""

    def call(self, function: Any, ranks: Any = (0, 1)) -> list[Any]:
        return [function() if rank == 0 else False for rank in ranks]


def test_storage_that_cannot_do_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = r"storage_path='.*/file'`: rank 0 cannot write there: .*non-directory"
    with pytest.raises(ValueError, match=words):
        StorageKeeper(f"{tmp_path}/file").check(_Workers())
    with pytest.raises(ValueError, match=r"rank 0 cannot write there: .*nowhere"):
        StorageKeeper("nowhere://bucket").check(_Workers())
    with pytest.raises(ValueError, match=r"Unexpected query parameter in S3 URI: 'bad'"):
        StorageKeeper("s3://bucket/runs?bad=1").check(_Workers())
    with pytest.raises(ValueError, match=r"Unrecognized filesystem type"):  # `?` is no name
        StorageKeeper("memory://bucket?bad=1").check(_Workers())
    with pytest.raises(ValueError, match=r"not visible to rank 1 on another node.*remove"):
        StorageKeeper(f"{tmp_path}/mine").check(_Workers())
    assert list((tmp_path / "mine").iterdir()) == []


def test_directory_of_a_training_comes_before_the_options_of_a_uri() -> None:
    path = StorageKeeper("s3://bucket/runs/?region=here")._directory.path
    assert re.fullmatch(r"s3://bucket/runs/fit-\d{8}-\d{6}-\w{8}\?region=here", path)


def test_what_stays_of_a_training_that_failed_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), StorageKeeper(str(tmp_path)) as keeper:
        keeper.finish(_Workers())
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING), StorageKeeper(str(tmp_path)) as keeper:
        keeper.has_some = True
    assert f"is the checkpoint in {tmp_path}/fit-" in caplog.text


def test_strategy_chooses_where(tmp_path: Path) -> None:
    assert RayStrategy().keeper() is None
    assert isinstance(RayStrategy(max_failures=1).keeper(), DriverKeeper)
    assert isinstance(RayStrategy(storage_path=tmp_path).keeper(), StorageKeeper)
    assert absolute("here") == str(tmp_path / "here")
    assert absolute("s3://bucket/here") == "s3://bucket/here"
