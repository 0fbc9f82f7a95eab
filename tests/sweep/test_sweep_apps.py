"""Sweeps of applications as people write them, on one Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sweeps import cluster, sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with cluster() as address:
        yield address


def test_classes_of_the_main_script_are_those_of_its_config_and_checkpoints(
    ray_address: str,
) -> None:
    done = sweep(
        "main_app.py",
        ray_address,
        *("model.act=relu,tanh", "devices=1,2", "hydra/sweeper/search_alg=grid"),
        *("hydra.sweeper.metric=val_loss", "hydra/sweeper/scheduler=fifo"),
        *("hydra.sweeper.resources_per_trial.cpu=2", "hydra.sweeper.num_samples=3"),
    )
    assert done.code == 0, done.out + done.err
    assert {trial["params"]["devices"] for trial in done.trials} == {1, 2}
    for trial in done.trials:
        assert trial["status"] == "done", trial
        loaded = Path(trial["directory"], "loaded.txt").read_text()
        assert loaded == f"Act.{trial['params']['model.act']}"


def test_script_without_a_guard_says_so_instead_of_sweeping_again(ray_address: str) -> None:
    done = sweep("unguarded_app.py", ray_address, "x=1,2", "hydra.sweeper.num_samples=2")
    assert done.code == 1
    assert [trial["status"] for trial in done.trials] == 2 * ["failed"]
    for trial in done.trials:
        assert "unguarded_app.py cannot be imported by the trial's process" in trial["reason"]
        assert 'below `if __name__ == "__main__":`' in trial["reason"]
