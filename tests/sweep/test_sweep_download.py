"""How the files of a sweep come from a cluster to a laptop; here from another directory."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_mgpu.sweep.client import download as module
from lightning_mgpu.sweep.client.download import download
from lightning_mgpu.sweep.client.files import SweepFiles
from lightning_mgpu.sweep.trial.failures import TrialFailedError
from lightning_mgpu.sweep.trial.run_trial import check_storage


class Afar:
    """Stands for the actor: its methods are called at once, in this process."""

    def __init__(self, files: SweepFiles) -> None:
        self._files = files

    @property
    def files(self) -> Any:
        return SimpleNamespace(remote=lambda: (str(self._files.place), self._files.listed()))

    @property
    def read(self) -> Any:
        return SimpleNamespace(remote=self._files.read)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda answer: answer))


@pytest.fixture
def afar() -> Afar:
    """A sweep of two trials, on the cluster."""
    place = Path("cluster/swept").absolute()
    files = SweepFiles(place)
    for name, text in {
        "search_space.yaml": "search: [x]\n",
        "journal.jsonl": "{}\n",
        "optimization_results.yaml": f"best_checkpoint: {place}/1/best.ckpt\n",
        "0/only.ckpt": "zero",
        "0/sharded.ckpt/part": "zero",
        "0/trial.log": "",
        "1/best.ckpt": "one",
        "1/last.ckpt": "later",
    }.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return Afar(files)


def _names(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


EXPECTED = {
    *("search_space.yaml", "journal.jsonl", "optimization_results.yaml"),
    *("0/trial.log", "1/best.ckpt"),
}


def test_all_but_checkpoints_comes_home_and_the_best_one(afar: Afar) -> None:
    download(afar, Path("home"))
    assert _names(Path("home")) == EXPECTED
    for name in EXPECTED:
        there, here = Path("cluster/swept", name), Path("home", name)
        assert here.read_bytes() == there.read_bytes()
        assert here.stat().st_mtime_ns == there.stat().st_mtime_ns


def test_every_checkpoint_of_a_pareto_front_comes_home(afar: Afar) -> None:
    place = Path("cluster/swept").absolute()
    solutions = f"solutions: [{{checkpoint: {place}/0/sharded.ckpt}}, {{checkpoint: null}}]\n"
    (place / "optimization_results.yaml").write_text(solutions)
    download(afar, Path("home"))
    assert _names(Path("home")) == EXPECTED - {"1/best.ckpt"} | {"0/sharded.ckpt/part"}


def test_best_checkpoint_is_known_through_a_link(afar: Afar) -> None:
    """Lightning resolves the links in its path."""
    Path("link").symlink_to("cluster")
    place = Path("link/swept").absolute()
    journal = place / "journal.jsonl"
    text = journal.read_text()
    journal.unlink()
    files = SweepFiles(place)
    journal.write_text(text)
    download(Afar(files), Path("home"))
    assert _names(Path("home")) == EXPECTED


def test_only_what_is_new_is_copied(afar: Afar) -> None:
    home = Path("home")
    download(afar, home)
    first = (home / "0/trial.log").stat().st_ino
    Path("cluster/swept/journal.jsonl").write_text("{}\n{}\n")
    os.truncate(home / "1/best.ckpt", 1)  # as a copy that was cut short
    download(afar, home)
    assert (home / "journal.jsonl").read_text() == "{}\n{}\n"
    assert (home / "1/best.ckpt").read_text() == "one"
    assert (home / "0/trial.log").stat().st_ino == first


def test_storage_that_is_shared_needs_no_copy(afar: Afar, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    download(afar, Path("cluster/swept"))
    assert caplog.messages == []


def test_large_files_come_in_parts(afar: Afar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mgpu.sweep.client.files._CHUNK", 2)
    download(afar, Path("home"))
    assert Path("home/1/best.ckpt").read_text() == "one"


def test_another_sweep_at_home_is_left_alone(afar: Afar, caplog: pytest.LogCaptureFixture) -> None:
    Path("home").mkdir()
    Path("home/search_space.yaml").write_text("search: [y]\n")
    download(afar, Path("home"))
    assert _names(Path("home")) == {"search_space.yaml"}
    assert "home holds another sweep. This one is on the cluster: " in caplog.text


def test_disk_that_is_full_says_where_the_files_are(
    afar: Afar, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "utime", fail)
    download(afar, Path("home"))
    assert "Some files could not be downloaded ([Errno 28] No space left on device)" in caplog.text
    assert f"They are on the cluster: {Path('cluster/swept').absolute()}" in caplog.text
    assert _names(Path("home")) == set()


def test_nothing_comes_home_of_a_sweep_that_was_refused(afar: Afar) -> None:
    """What lies in its directory is another one's."""
    refused = Afar(SweepFiles(Path("cluster/swept")))
    download(refused, Path("home"))
    assert not Path("home").exists()


def test_trial_on_a_machine_that_does_not_share_the_storage_fails(afar: Afar) -> None:
    check_storage(Path("cluster/swept"))
    with pytest.raises(TrialFailedError, match=r"Set hydra\.sweep\.dir to a directory on storage"):
        check_storage(Path("elsewhere"))
