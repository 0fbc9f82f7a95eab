"""Directories of trials; no Ray needed."""

from pathlib import Path
from unittest.mock import Mock

import pytest
from hydra import compose, initialize

from lightning_mgpu.sweep.job.job import Job
from lightning_mgpu.sweep.job.places import own_subdir

LONG = "ä" * 200  # 400 bytes


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("7", "7"),
        ("lr=0.1,b=2", "lr=0.1,b=2"),
        ("lr_0.1-7", "lr_0.1-7"),
        ("path=/data/x,lr=1", "path=/data/x,lr=1"),  # nested, as with Hydra's own sweeper
        ("path=../../x", "path=.._.._x"),  # no place outside
        (LONG, f"{'ä' * 120}-7"),
        (f"a/{LONG}/b", f"a/{'ä' * 120}-7/b"),
        ("", "7"),
        (".", "7"),
    ],
)
def test_directory_of_a_trial(wanted: str, expected: str) -> None:
    sweep = Path.cwd() / "sweep"
    assert own_subdir(sweep, wanted, 7) == expected
    assert own_subdir(sweep, wanted, 7) == expected  # in another process
    (sweep / expected).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("wanted", ["lr=0.1", LONG, "", "p=/a/b"])
def test_trials_never_share_a_directory(wanted: str) -> None:
    sweep = Path.cwd() / "sweep"
    found = [own_subdir(sweep, wanted, number) for number in (4, 2, 4, 9)]
    assert found[0] == found[2]
    assert len(set(found)) == 3
    for number, place in zip((4, 2, 9), (found[0], found[1], found[3]), strict=True):
        assert place.endswith(str(number)) or place == wanted
        (sweep / place).mkdir(parents=True, exist_ok=True)


def test_directory_outside_that_the_user_names_is_taken(tmp_path: Path) -> None:
    wanted = str(tmp_path / "elsewhere" / "x")
    assert own_subdir(Path.cwd() / "sweep", wanted, 1) == wanted


@pytest.mark.usefixtures("hydra_restore_singletons")
def test_job_gets_the_directory_and_its_config_says_so() -> None:
    overrides = ["+x=1", "hydra.sweep.subdir=${hydra:job.override_dirname}"]
    overrides.append(f"hydra.sweep.dir={Path.cwd()}/sweep")
    with initialize(version_base="1.3", config_path=None):
        for number, end in ((0, ""), (1, "-1"), (0, "")):
            cfg = compose(None, [*overrides, f"hydra.job.num={number}"], return_hydra_config=True)
            job = Job(Mock(), Mock(), cfg)
            directory = job.output_dir(cfg)
            assert directory == Path.cwd() / f"sweep/+x=1{end}"
            assert job.subdir(cfg) == directory.name
