"""What `check_checkpoint` makes of files. (What the command says of them: test_command_errors.)"""

import os
import zipfile
from pathlib import Path
from typing import Any

import boring
import psutil
import pytest
import torch

from lightning_mgpu.cli.checkpoint import check_checkpoint, last_good
from lightning_mgpu.errors import ConfigError


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A real checkpoint, which is also in `good.ckpt`."""
    trainer = boring.trainer("auto", 1, max_steps=1)
    trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
    trainer.save_checkpoint("good.ckpt")
    checkpoint: dict[str, Any] = torch.load("good.ckpt", weights_only=True)
    return checkpoint


@pytest.mark.usefixtures("content")
@pytest.mark.parametrize("resume", [True, False])
def test_good_checkpoint_passes(resume: bool) -> None:
    check_checkpoint("good.ckpt", resume=resume)
    check_checkpoint(str(Path("good.ckpt").absolute()), resume=resume)


@pytest.mark.parametrize(
    "path", ["last", "hpc", "registry", "registry:m", "s3://bucket/x.ckpt", "file://x"]
)
def test_keyword_or_remote_path_is_left_to_lightning(path: str) -> None:
    check_checkpoint(path)


@pytest.mark.parametrize("path", ["nope.ckpt", "last.ckpt", "best.ckpt", "a/b", "./last"])
def test_missing_file(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"^ckpt_path={path}: no such file \(looked in /"):
        check_checkpoint(path)


def test_best_is_known_to_a_fit_only() -> None:
    with pytest.raises(ConfigError, match=r"^ckpt_path=best: .* Give the checkpoint's path\.$"):
        check_checkpoint("best")


def test_every_truncation_is_found(content: dict[str, Any]) -> None:
    whole = Path("good.ckpt").read_bytes()
    for length in range(0, len(whole), len(whole) // 23):
        Path("cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"^ckpt_path=cut\.ckpt: damaged, or not a check"):
            check_checkpoint("cut.ckpt")


def test_damage_within_the_pickle_is_found(content: dict[str, Any]) -> None:
    whole = Path("good.ckpt").read_bytes()
    place = whole.index(b"state_dict") - 40
    Path("bad.ckpt").write_bytes(whole[:place] + b"\xff" * 80 + whole[place + 80 :])
    with pytest.raises(ConfigError, match=r"^ckpt_path=bad\.ckpt: damaged, or not a checkpoint"):
        check_checkpoint("bad.ckpt")


def test_zip_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ConfigError, match="damaged, or not a checkpoint"):
        check_checkpoint("other.zip")


@pytest.mark.parametrize("other", [torch.ones(2), [1], {}, {"weights": torch.ones(2)}, None])
def test_torch_file_of_something_else(other: Any) -> None:
    torch.save(other, "other.pt")
    with pytest.raises(ConfigError, match=r"not a Lightning checkpoint \(it has no `state_dict`\)"):
        check_checkpoint("other.pt")


def test_checkpoint_of_another_framework(content: dict[str, Any]) -> None:
    torch.save({"state_dict": content["state_dict"], "epoch": 3}, "other.pt")
    with pytest.raises(ConfigError, match="it has no `pytorch-lightning_version`"):
        check_checkpoint("other.pt")


def test_old_file_format_of_torch(content: dict[str, Any]) -> None:
    torch.save(content, "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match="it is no zip archive"):
        check_checkpoint("old.ckpt")


def test_weights_alone_can_be_evaluated_but_not_resumed(content: dict[str, Any]) -> None:
    trainer = boring.trainer("auto", 1, max_steps=1)
    trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    check_checkpoint("weights.ckpt")
    with pytest.raises(ConfigError, match="holds weights only"):
        check_checkpoint("weights.ckpt", resume=True)


class _Own:
    pass


@pytest.mark.parametrize(
    ("hyperparameter", "name"),
    [(_Own(), r"\w*\.?_Own"), (Path("x"), r"pathlib\.\w+"), (os.getcwd, r"posix\.getcwd")],
    ids=["class", "path", "blocked"],
)
def test_objects_need_trust(
    hyperparameter: Any, name: str, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({**content, "hyper_parameters": {"x": hyperparameter}}, "objects.ckpt")
    with pytest.raises(ConfigError, match=rf"more than tensors and plain values \({name}\)"):
        check_checkpoint("objects.ckpt")
    with pytest.MonkeyPatch.context() as trusting:
        trusting.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        check_checkpoint("objects.ckpt")


def test_registered_objects_need_no_trust(content: dict[str, Any]) -> None:
    torch.save({**content, "hyper_parameters": {"x": _Own()}}, "objects.ckpt")
    with torch.serialization.safe_globals([_Own]):
        check_checkpoint("objects.ckpt")


@pytest.mark.parametrize("mark", ["meta.pt", ".metadata", "latest", "checkpoint"])
def test_sharded_checkpoint_is_a_directory(mark: str) -> None:
    Path("sharded.ckpt").mkdir()
    with pytest.raises(ConfigError, match="a directory, but not that of a checkpoint"):
        check_checkpoint("sharded.ckpt")
    Path("sharded.ckpt", mark).touch()
    check_checkpoint("sharded.ckpt")


def test_unreadable_file(content: dict[str, Any]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read anything")
    Path("good.ckpt").chmod(0)
    with pytest.raises(ConfigError, match=r"cannot be read: .*Permission denied"):
        check_checkpoint("good.ckpt")


def test_tensors_are_not_read(content: dict[str, Any]) -> None:
    torch.save({**content, "state_dict": {"w": torch.zeros(2**22)}}, "big.ckpt")  # 16 MiB
    before = psutil.Process().io_counters().read_chars
    check_checkpoint("big.ckpt")
    assert psutil.Process().io_counters().read_chars - before < 2**20


def _at(second: int, path: str, data: bytes) -> Path:
    made = Path(path)
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_bytes(data)
    os.utime(made, (second, second))
    return made.absolute()


@pytest.mark.usefixtures("content")
def test_last_good_is_the_newest_that_loads(caplog: pytest.LogCaptureFixture) -> None:
    good = Path("good.ckpt").read_bytes()
    _at(1, "run/a.ckpt", good)
    newest = _at(2, "run/checkpoints/b.ckpt", good)
    _at(3, "run/checkpoints/cut.ckpt", good[:-100])
    _at(4, "run/other.txt", good)
    assert last_good(Path("run").absolute(), resume=True) == newest
    (told,) = boring.told(caplog)
    assert "cut.ckpt: damaged, or not a checkpoint" in told


def test_no_good_checkpoint() -> None:
    _at(1, "run/a.ckpt", b"")
    assert last_good(Path("run")) is None
    assert last_good(Path("nowhere")) is None
