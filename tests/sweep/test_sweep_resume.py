"""How sweeps end before their time, and go on; each in a process of its own, all on one Ray."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from sweeps import cluster, command, environment_for, interrupt, resume_argument, sweep

from lightning_mgpu.sweep.report.reader import read
from lightning_mgpu.sweep.search.searchers import RandomSearcher
from lightning_mgpu.sweep.space.space import parse_space

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with cluster() as address:
        yield address


@pytest.mark.parametrize("reuse", [True, False])
def test_trial_that_was_stopped_may_take_its_time_to_end(ray_address: str, reuse: bool) -> None:
    """The last ones of a sweep, too: Ray by itself kills them after ten seconds, or at once."""
    done = sweep(
        "lingering_app.py",
        ray_address,
        *("+x=1,2", "seconds=16", "hydra/sweeper/search_alg=grid"),
        *("hydra.sweeper.metric=val_loss", "hydra.sweeper.scheduler.max_t=1"),
        *("hydra.sweeper.scheduler.grace_period=1", f"hydra.sweeper.reuse_actors={reuse}"),
    )
    assert done.code == 0, done.err
    for trial in done.trials:
        assert (trial["status"], trial["ended_by"]) == ("stopped", "asha, max_t=1")
        assert (Path(trial["directory"]) / "ended").read_text() == "0"


def test_interrupt_does_not_wait_for_trials_that_take_their_time(
    ray_address: str, eventually: Callable[..., None]
) -> None:
    given = (
        *("+x=choice(1)", "seconds=300", "hydra/sweeper/search_alg=grid"),
        *("hydra.sweeper.metric=val_loss", "hydra.sweeper.scheduler.max_t=1"),
        "hydra.sweeper.scheduler.grace_period=1",
    )
    process = subprocess.Popen(
        command("lingering_app.py", ray_address, *given),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_for("sweep"),
    )
    try:
        journal = Path("sweep/journal.jsonl")
        ended = '"event": "end"'
        eventually(lambda: journal.exists() and journal.read_text().count(ended) == 1, 120)
        seconds, out, _ = interrupt(process, signal.SIGINT)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert seconds < 100  # and not 300
    saved = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    assert [trial["status"] for trial in saved["trials"]] == ["stopped"]


SLOW = (
    "slow_app.py",
    *("x=1,2,3,4", "hydra/sweeper/search_alg=grid", "hydra.sweeper.max_concurrent_trials=1"),
)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_sweep_that_was_ended_in_the_middle_goes_on(
    ray_address: str, signum: signal.Signals, eventually: Callable[..., None]
) -> None:
    """Trials wait for a file, so that the second one is under way when the signal comes."""
    process = subprocess.Popen(
        command(SLOW[0], ray_address, *SLOW[1:]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_for("sweep"),
    )
    try:
        Path("go-1").touch()
        eventually(Path("began-2").exists, 120)
        seconds, out, _ = interrupt(process, signum)
    finally:
        process.kill()
    argument = f"hydra.sweeper.resume={Path('sweep').absolute()}"
    if signum == signal.SIGKILL:  # it may come while Ray's files are being copied
        for path in Path("sweep").glob("*state*-*"):
            os.truncate(path, path.stat().st_size // 2)
    else:
        assert process.returncode == 128 + signum, out
        assert seconds < 10
        assert "slow_app.py -m hydra/sweeper=ray_tune" in out
        assert argument in out
        saved = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
        assert saved["trials"][0]["status"] == "done"
    for number in (2, 3, 4):
        Path(f"go-{number}").touch()
    resumed = sweep(SLOW[0], ray_address, *SLOW[1:], argument)
    assert resumed.code == 0, resumed.err
    drawn = read(resumed.directory)
    assert len(drawn.sessions) == 2
    assert [stretch.outcome for stretch in drawn.trials[1].stretches] == ["unfinished", "done"]
    assert [trial["value"] for trial in resumed.trials] == [1.0, 2.0, 3.0, 4.0]
    runs = [Path(f"began-{number}").read_text() for number in (1, 2, 3, 4)]
    assert runs == ["x", "xx", "x", "x"]  # the second one was cut short, the first was not


def test_sweep_whose_time_is_over_ends_in_order_and_goes_on(ray_address: str) -> None:
    """The trial under way ends with its epoch; it and those that wait are run when it goes on."""
    given = (
        *("+x=1,2,3", "hydra/sweeper/search_alg=grid", "until=go", "hydra.sweeper.metric=val_loss"),
        *("hydra/sweeper/scheduler=fifo", "hydra.sweeper.resources_per_trial.cpu=2"),
    )
    done = sweep("lingering_app.py", ray_address, *given, "hydra.sweeper.time_budget_s=30")
    assert done.code == 0, done.err
    assert "time_budget_s=30.0 is over: 1 trials unfinished, 2 not started" in done.out
    (trial,) = done.trials
    assert (trial["status"], trial["ended_by"]) == ("unfinished", "time_budget_s")
    assert trial["reports"] > 0
    assert done.results["best_trial"] == 0
    assert (Path(trial["directory"]) / "ended").exists()
    assert list(Path(trial["directory"]).rglob("*.ckpt"))
    assert read(done.directory).trials[0].status == "unfinished"
    Path("go").touch()
    resumed = sweep("lingering_app.py", ray_address, *given, resume_argument(done.out))
    assert resumed.code == 0, resumed.err
    assert [one["status"] for one in resumed.trials] == ["done"] * 3
    assert [one["reports"] for one in resumed.trials] == [1] * 3
    assert [one["params"]["x"] for one in resumed.trials] == [1, 2, 3]
    assert "Stopped early" not in resumed.out


def test_sweep_that_has_ended_goes_on_with_more_trials(ray_address: str) -> None:
    """Each in a process of its own, two on a CPU; some of their checkpoints are kept."""
    given = (
        *("model.lr=tag(log,interval(1e-4,1e-1))", "hydra.sweeper.search_alg.seed=0"),
        *("hydra.sweeper.metric=val_acc", "hydra.sweeper.mode=max", "epochs=4"),
        *("hydra.sweeper.keep_checkpoints=2", "hydra.sweeper.reuse_actors=false"),
        *("hydra.sweeper.resources_per_trial.cpu=0.5", "hydra/sweeper/scheduler=fifo"),
    )
    first = sweep("plain_app.py", ray_address, *given, "hydra.sweeper.num_samples=2")
    assert first.code == 0, first.err
    before = first.trials
    more = ("hydra.sweeper.num_samples=3", "hydra.sweeper.resume=sweep")
    done = sweep("plain_app.py", ray_address, *given, *more)
    assert done.code == 0, done.err
    searcher = RandomSearcher("val_acc", parse_space({}, given[:1]), seed=0)
    drawn = [searcher.suggest(str(number)) for number in range(3)]
    assert [trial["params"] for trial in done.trials] == drawn  # as if it had never ended
    assert done.trials[:2] == before  # these were not run again
    for trial in done.trials:
        kept = list(Path(trial["directory"]).glob("checkpoint_*/*.ckpt"))
        assert len(kept) == 2
    assert {path.name for path in done.directory.iterdir()} == {
        *("journal.jsonl", "multirun.yaml", "optimization_results.yaml", "search_space.yaml"),
        *("trials.csv", ".lock", ".ray", "0", "1", "2"),
    }
    stretches = [trial.stretches for trial in read(done.directory).trials]
    assert len({stretch.worker for own in stretches for stretch in own}) == 3


def test_trials_that_were_stopped_while_they_waited_do_not_run_again(ray_address: str) -> None:
    given = (
        *("population_app.py", ray_address, "lr=tag(log,interval(1e-4,1e-1))", "decay=0.1,0.2"),
        *("hydra/sweeper/search_alg=bohb", "hydra/sweeper/scheduler=bohb"),
        *("hydra.sweeper.metric=score", "hydra.sweeper.mode=max", "hydra.sweeper.report=last"),
        *("hydra.sweeper.scheduler.max_t=4", "hydra.sweeper.scheduler.reduction_factor=2"),
    )
    before = sweep(*given, "hydra.sweeper.num_samples=4")
    assert before.code == 0, before.err
    ended = {trial["number"]: trial for trial in before.trials}
    assert len(ended) == 4
    after = sweep(
        *given, "hydra.sweeper.num_samples=5", f"hydra.sweeper.resume={before.directory.absolute()}"
    )
    assert after.code == 0, after.err
    assert {trial["number"]: trial for trial in after.trials if trial["number"] < 4} == ended
    assert len(after.trials) == 5
