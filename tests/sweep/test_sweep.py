"""Sweeps from end to end, each in a process of its own and all on one Ray."""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from sweeps import (
    Swept,
    cluster,
    environment_for,
    foreign_ray,
    sweep,
)

from lightning_mgpu.sweep.report.lanes import timeline
from lightning_mgpu.sweep.report.reader import read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with cluster() as address:
        yield address


@pytest.fixture(scope="module")
def plain(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Early stopping of an application that does not know us, from another working directory."""
    directory = tmp_path_factory.mktemp("plain")
    return sweep(
        "plain_app.py",
        ray_address,
        *("model.lr=tag(log,interval(1e-4,1e-1))", "model.l1=choice(16,32)", "epochs=8"),
        *("hydra.sweeper.metric=val_acc", "hydra.sweeper.mode=max"),
        *("hydra.sweeper.num_samples=8", "hydra.sweeper.search_alg.seed=0"),
        *("hydra.sweeper.scheduler.reduction_factor=2", "hydra.sweeper.report=best"),
        *("hydra.job.chdir=true", "+hydra.callbacks.record._target_=recording_callback.Recording"),
        directory=str(directory / "sweep"),
    )


def test_application_without_a_word_of_us_is_searched(plain: Swept) -> None:
    assert plain.code == 0, plain.err
    assert [trial["number"] for trial in plain.trials] == list(range(8))
    assert {trial["status"] for trial in plain.trials} == {"done", "stopped"}
    for trial in plain.trials:
        assert 1e-4 <= trial["params"]["model.lr"] <= 1e-1
        assert trial["params"]["model.l1"] in (16, 32)
        assert (trial["reports"] == 8) == (trial["status"] == "done")
        assert trial["ended_by"] == ("itself" if trial["status"] == "done" else "asha")
        assert "val_loss" in trial["metrics"]
        assert not list(Path(trial["directory"]).glob("checkpoint_*"))  # nobody needs them
    # callbacks of Hydra's see the end of those that were stopped, too
    lines = (plain.directory / "callbacks.txt").read_text().splitlines()
    assert sorted(line for line in lines if "COMPLETED" in line) == [
        f"{number} COMPLETED" for number in range(8)
    ]


def test_each_trial_is_a_job_in_a_directory_of_its_number(plain: Swept) -> None:
    for trial in plain.trials:
        directory = plain.directory / str(trial["number"])
        assert trial["directory"] == str(directory)
        overrides = (directory / ".hydra" / "overrides.yaml").read_text()
        assert f"model.lr={trial['params']['model.lr']!r}" in overrides
        assert f"num: {trial['number']}" in (directory / ".hydra" / "hydra.yaml").read_text()
        assert "max_epochs" in (directory / "trial.log").read_text() or trial["status"] == "stopped"


def test_trial_that_was_stopped_is_complete(plain: Swept) -> None:
    for trial in plain.trials:
        directory = Path(trial["directory"])
        lines = (directory / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("val_acc")
        assert len([line for line in lines[1:] if line.split(",")[column]]) == trial["reports"]
        assert Path(trial["checkpoint"]).parent == directory / "checkpoints"
        assert Path(trial["checkpoint"]).exists()


def test_best_trial_is_the_best_and_its_command_runs_it_again(plain: Swept) -> None:
    results = plain.results
    assert results["best_value"] == max(trial["value"] for trial in plain.trials)
    assert results["best_command"] in plain.out
    assert Path(results["best_checkpoint"]).exists()
    words = shlex.split(results["best_command"])
    again = subprocess.run(
        [sys.executable, *words[1:], "hydra.run.dir=again"], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    best = plain.directory / str(results["best_trial"])
    assert Path("again/metrics.csv").read_text() == (best / "metrics.csv").read_text()
    assert "chdir: true" in Path("again/.hydra/hydra.yaml").read_text()


def test_several_metrics_leave_a_front(ray_address: str) -> None:
    done = sweep(
        "failing_app.py",
        ray_address,
        *("kind=compromise", "data.batch_size=interval(1,64)", "hydra.sweeper.mode=[min,max]"),
        *("hydra/sweeper/search_alg=optuna", "hydra/sweeper/scheduler=fifo"),
        *("hydra.sweeper.num_samples=4", "hydra.sweeper.search_alg.seed=0"),
    )
    assert done.code == 0, done.err
    solutions = done.results["solutions"]
    assert solutions == sorted(solutions, key=lambda one: one["trial"])
    assert [one["values"][0] for one in solutions] == [
        trial["params"]["data.batch_size"] for trial in done.trials
    ]
    assert all(one["command"] in done.out for one in solutions)


def test_values_that_a_trial_does_not_have_are_left_out(ray_address: str) -> None:
    done = sweep(
        "failing_app.py",
        ray_address,
        *("kind=fine,greedy", "data.batch_size=1,2", "hydra/sweeper/search_alg=grid"),
        "hydra.sweeper.conditions={data.batch_size:{kind:greedy}}",
    )
    assert done.code == 0, done.err
    assert "3 trials." in done.out + done.err
    params = [trial["params"] for trial in done.trials]
    assert params == [
        {"kind": "fine"},
        {"kind": "greedy", "data.batch_size": 1},
        {"kind": "greedy", "data.batch_size": 2},
    ]
    assert [trial.params for trial in read(done.directory).trials] == params
    given = (done.directory / "0" / ".hydra" / "overrides.yaml").read_text()
    assert "kind=fine" in given
    assert "batch_size" not in given
    assert "batch_size" not in done.results["best_command"]


def test_report_is_drawn_at_the_end_and_knows_what_the_results_know(plain: Swept) -> None:
    assert "report.html" in plain.out
    assert "val_acc" in (plain.directory / "report.html").read_text()
    assert len(list((plain.directory / "report").glob("*.png"))) == 6
    drawn = read(plain.directory)
    for trial, known in zip(drawn.trials, plain.trials, strict=True):
        assert (trial.number, trial.status) == (known["number"], known["status"])
        assert (trial.params, drawn.value(trial)) == (known["params"], known["value"])
        assert drawn.epochs(trial) == known["reports"]
        assert trial.reports[-1].metrics == known["metrics"]
    assert drawn.best().command == plain.results["best_command"]
    assert len(timeline(drawn).lanes) in (1, 2)  # processes that eight trials have shared


def test_report_can_be_switched_off_and_drawn_later(failing: Swept) -> None:
    assert not (failing.directory / "report.html").exists()
    assert "report:" not in failing.out
    reasons = {trial.params["kind"]: trial.reason for trial in read(failing.directory).trials}
    assert "StubbornError" in reasons["raise"]
    assert "its process died" in reasons["kill"]


def test_application_from_a_template_is_searched_in_its_own_directories(ray_address: str) -> None:
    done = sweep(
        "template_app/blobs_net/train.py",
        ray_address,
        *("hparams_search=optimizer", "hydra/sweeper/search_alg=grid"),
        *("hydra.sweeper.metric=val/acc", "hydra.sweeper.mode=max", "model.net.hidden=8"),
        "hydra.sweeper.scheduler.reduction_factor=2",
    )
    assert done.code == 0, done.out + done.err
    assert [trial["params"]["model.optimizer.lr"] for trial in done.trials] == [0.0001, 0.01, 0.1]
    assert {trial["status"] for trial in done.trials} <= {"done", "stopped"}
    for number, trial in enumerate(done.trials):
        directory = Path(trial["directory"])
        assert directory == done.directory / f"lr_{trial['params']['model.optimizer.lr']}-{number}"
        assert Path(trial["checkpoint"]).parent == directory / "checkpoints"
        assert (directory / "checkpoints" / "last.ckpt").exists()
        assert (directory / "csv" / "version_0" / "metrics.csv").exists()
        assert (directory / ".hydra" / "config.yaml").exists()
        assert (directory / "trial.log").exists()
        assert trial["value"] == trial["metrics"]["val/acc_best"]
    assert "hparams_search=optimizer" in done.results["best_command"]
    assert done.results["best_command"].endswith("hydra.mode=RUN")


@pytest.fixture(scope="module")
def failing(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    directory = tmp_path_factory.mktemp("failing")
    return sweep(
        "failing_app.py",
        ray_address,
        "kind=ok,raise,exit,kill,crash,diverge,none,huge,interrupt,handler",
        *("hydra/sweeper/search_alg=grid", "hydra.sweeper.max_concurrent_trials=2"),
        "+hydra.callbacks.record._target_=recording_callback.Recording",
        directory=str(directory / "sweep"),
    )


def test_callbacks_of_hydra_see_a_sweep_and_its_jobs(failing: Swept) -> None:
    lines = (failing.directory / "callbacks.txt").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("multirun start", "multirun end")
    of_jobs: dict[int, list[str]] = {number: [] for number in range(10)}
    for line in lines[1:-1]:
        number, event = line.split()
        of_jobs[int(number)].append(event)
    kinds = {trial["params"]["kind"]: of_jobs[trial["number"]] for trial in failing.trials}
    died = {kind: kinds.pop(kind) for kind in ("kill", "crash")}
    assert died == {"kill": ["start"], "crash": ["start"]}
    failed = {kind for kind, events in kinds.items() if events == ["start", "FAILED"]}
    assert failed == {"raise", "exit", "huge", "interrupt"}
    # These are jobs of Hydra's that have completed, though the search has no use for their values.
    completed = {kind for kind, events in kinds.items() if events == ["start", "COMPLETED"]}
    assert completed == {"ok", "diverge", "none", "handler"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raise", "StubbornError: one and two"),
        ("exit", "the job called sys.exit(3)"),
        ("kill", "its process died, perhaps killed for lack of memory"),
        ("crash", "its process died: Segmentation fault"),
        ("diverge", "NotFiniteError: the job returned nan"),
        ("none", "the job returned None and named no metric; set hydra.sweeper.metric"),
        ("huge", "out of memory, MemoryError: too much"),
        ("interrupt", "InterruptedTrialError: the job raised KeyboardInterrupt"),
    ],
)
def test_failed_trial_says_why_and_the_sweep_goes_on(
    failing: Swept, kind: str, reason: str
) -> None:
    assert failing.code == 0, failing.err
    trial = failing.value("kind")[kind]
    assert trial["status"] == "failed"
    assert reason in trial["reason"]
    assert "8 of 10 trials failed" in failing.out + failing.err
    assert "(raylet)" not in failing.out + failing.err


def test_signal_handlers_are_ignored_in_a_line(failing: Swept) -> None:
    trial = failing.value("kind")["handler"]
    assert trial["status"] == "done"
    log = (Path(trial["directory"]) / "trial.log").read_text()
    assert log.count("The handler for SIGTERM is ignored") == 1
    assert log.count("The handler for SIGUSR1 is ignored") == 1


def test_failed_trial_is_tried_again_as_often_as_asked(ray_address: str) -> None:
    done = sweep(
        "failing_app.py",
        ray_address,
        *("kind=choice(flaky)", "hydra.job.chdir=true", "hydra.sweeper.max_failures=1"),
        "hydra.sweeper.num_samples=1",
    )
    assert done.code == 0, done.err
    assert done.trials[0]["status"] == "done"


def test_trial_without_memory_runs_again_with_smaller_batches(ray_address: str) -> None:
    done = sweep(
        "failing_app.py",
        ray_address,
        *("kind=greedy,huge", "hydra/sweeper/search_alg=grid"),
        "hydra.sweeper.on_oom=retry_smaller",
    )
    assert done.code == 0, done.err
    greedy, huge = done.trials
    smaller = ["++data.batch_size=2", "++trainer.accumulate_grad_batches=4"]
    assert (greedy["status"], greedy["value"], greedy["batch_halvings"]) == ("done", 8.0, 1)
    assert greedy["overrides"] == ["kind=greedy", *smaller]
    assert smaller[0] in done.results["best_command"]
    assert "batch halved 1 times" in done.out
    assert (huge["status"], huge["batch_halvings"]) == ("failed", 2)  # to a batch of 1
    assert huge["reason"] == "out of memory, MemoryError: too much"
    assert (done.directory / "1" / "trial.log").read_text().count("printed by huge") == 3


def test_output_of_a_trial_is_in_its_log_alone(failing: Swept) -> None:
    trial = failing.value("kind")["raise"]
    log = (Path(trial["directory"]) / "trial.log").read_text()
    assert "printed by raise" in log
    assert "StubbornError: one and two" in log
    assert "printed by" not in failing.out + failing.err


def test_sweep_of_which_all_trials_fail_ends_early_and_with_an_error(ray_address: str) -> None:
    done = sweep(
        "failing_app.py",
        ray_address,
        *("kind=raise,exit", "hydra.sweeper.num_samples=12", "hydra.sweeper.max_failure_rate=0.5"),
        "hydra.sweeper.max_concurrent_trials=1",
    )
    assert done.code == 1
    assert "No trial has a result" in done.err
    assert 3 <= len(done.trials) < 12
    assert "max_failure_rate=0.5 have failed" in done.out


@pytest.fixture(scope="module")
def dirty(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    directory = tmp_path_factory.mktemp("dirty")
    return sweep(
        "dirty_app.py",
        ray_address,
        *("x=0,1,2,3", "hydra/sweeper/search_alg=grid", "hydra.sweeper.max_concurrent_trials=1"),
        directory=str(directory / "sweep"),
    )


@pytest.mark.parametrize(
    "item",
    [
        *("environment", "gpus", "argv", "cwd", "path", "umask", "log handlers", "log level"),
        *("warning filters", "default dtype", "deterministic", "matmul precision", "threads"),
        *("process group", "resolver", "memory", "stdout", "cudnn"),
        *("random", "torch random", "numpy random"),
    ],
)
def test_next_trial_finds_its_process_as_the_first_did(dirty: Swept, item: str) -> None:
    assert dirty.code == 0, dirty.err
    first, _, after_dirt = (dirty.json(number, "found.json") for number in (0, 1, 2))
    assert first["pid"] == after_dirt["pid"]
    assert after_dirt[item] == first[item]
    assert first["threads"] == 1
    assert first["gpus"] == ""  # it has reserved none


def test_thread_left_running_is_named_in_the_log(dirty: Swept) -> None:
    log = (dirty.directory / "3" / "trial.log").read_text()
    assert "cannot be stopped: dirt. With hydra.sweeper.reuse_actors=false" in log


@pytest.mark.parametrize(
    ("strategy", "trials"),
    [
        ("null", 4),
        # One at a time, so that each waits for the other.
        ("{_target_:lightning_mgpu.ray.RayStrategy,num_workers:1,num_cpus_per_worker:2}", 2),
    ],
    ids=["here", "on-ray"],
)
def test_population_goes_on_from_the_better_with_new_values(
    ray_address: str, strategy: str, trials: int
) -> None:
    done = sweep(
        "population_app.py",
        ray_address,
        f"strategy={strategy}",
        *("lr=1e-4,1e-1", "decay=interval(0.01,0.1)", "hydra/sweeper/scheduler=pbt"),
        *("hydra/sweeper/search_alg=random", "hydra.sweeper.search_alg.seed=1"),
        *("hydra.sweeper.metric=score", "hydra.sweeper.mode=max", "hydra.sweeper.report=last"),
        *(f"hydra.sweeper.num_samples={trials}", "hydra.sweeper.scheduler.perturbation_interval=2"),
        "hydra.sweeper.scheduler.quantile_fraction=0.5",
    )
    assert done.code == 0, done.err
    assert all(trial.status == "done" for trial in read(done.directory).trials)
    changed = 0
    for trial in done.trials:
        path = Path(trial["directory"]) / "seen.jsonl"
        seen = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(line["lr"] == line["asked"] for line in seen)  # the optimizer has what was asked
        assert seen[-1]["lr"] == trial["params"]["lr"]  # of the last report, which counts
        for before, after in pairwise(seen):
            if after["weight_decay"] != before["weight_decay"]:
                changed += 1
                assert after["epoch"] > 0  # went on from a checkpoint
                assert after["learnt"] > 0
        assert seen[-1]["epoch"] == 5
    assert changed > 0


@pytest.mark.parametrize(
    ("search", "scheduler"),
    [
        ("bohb", "bohb"),
        ("optuna", "median"),
        ("random", "pb2"),
    ],
)
def test_search_and_scheduler_work_together(ray_address: str, search: str, scheduler: str) -> None:
    done = sweep(
        "population_app.py",
        ray_address,
        *("lr=tag(log,interval(1e-4,1e-1))", "decay=choice(0.01,0.1)"),
        *(f"hydra/sweeper/search_alg={search}", f"hydra/sweeper/scheduler={scheduler}"),
        *("hydra.sweeper.num_samples=4", "hydra.sweeper.metric=score", "hydra.sweeper.mode=max"),
        *_SHORT.get(scheduler, ()),
    )
    assert done.code == 0, done.err
    assert len(done.trials) == 4
    assert {trial["status"] for trial in done.trials} <= {"done", "stopped"}
    for trial in done.trials:
        seen = (Path(trial["directory"]) / "seen.jsonl").read_text().splitlines()
        epochs = [json.loads(line)["epoch"] for line in seen]
        # What was paused went on where it was; only population-based training goes back.
        assert scheduler == "pb2" or epochs == list(range(len(epochs)))


_SHORT = {
    "bohb": ("hydra.sweeper.scheduler.max_t=4", "hydra.sweeper.scheduler.reduction_factor=2"),
    "pb2": ("hydra.sweeper.scheduler.perturbation_interval=2",),
}


@pytest.mark.parametrize("strategy", ["mgpu_ddp", "auto"])
def test_ranks_of_a_trial_train_the_same_trial_and_stop_together(
    ray_address: str, strategy: str
) -> None:
    done = sweep(
        "ddp_app.py",
        ray_address,
        f"strategy={strategy}",
        *("lr=choice(0.1,0.01,0.001)", "hydra/sweeper/search_alg=grid"),
        *("hydra.sweeper.metric=val_loss", "hydra.sweeper.resources_per_trial.cpu=2"),
        "hydra.sweeper.scheduler.reduction_factor=2",
    )
    assert done.code == 0, done.out + done.err
    reports = {trial["params"]["lr"]: trial["reports"] for trial in done.trials}
    assert reports[0.1] == 4
    assert reports[0.001] < 4
    assert done.value("lr")[0.001]["status"] == "stopped"


def test_trials_with_and_without_workers_on_ray(ray_address: str) -> None:
    """Both CPUs are the workers': nothing is reserved twice, or trials on Ray would never start."""
    done = sweep(
        "lightning_mgpu",
        ray_address,
        *("+search_space=strategies", "hydra/sweeper/scheduler=asha", "+strategy=choice(dp,ray)"),
        *("model.lr=choice(0.003,0.0)", "hydra.sweeper.scheduler.reduction_factor=2"),
        *("trainer=cpu", "trainer.max_epochs=3", "data.batch_size=256"),
    )
    assert done.code == 0, done.out + done.err
    ends = {(t["params"]["strategy"], t["params"]["model.lr"]): t for t in done.trials}
    for strategy in ("dp", "ray"):
        learns, stays = ends[strategy, 0.003], ends[strategy, 0.0]
        assert (learns["status"], learns["reports"]) == ("done", 3)
        assert (stays["status"], stays["reports"]) == ("stopped", 1)
        assert Path(learns["checkpoint"]).exists()


def test_command_sweeps_by_itself_on_a_ray_of_its_own() -> None:
    """Beside somebody else's, which is neither used nor disturbed."""
    short = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets lie there
    with foreign_ray() as foreign:
        done = sweep(
            "lightning_mgpu",
            None,
            *("+search_space=lenet", "hydra.sweeper.num_samples=2", "data.batch_size=64"),
            *("trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"),
            TMPDIR=str(short),
        )
        assert _jobs(foreign) == "0"
    left = [path.name for path in short.iterdir() if path.name.startswith("ray-")]
    shutil.rmtree(short)
    assert left == []
    assert done.code == 0, done.err
    assert {trial["params"]["model.l1"] for trial in done.trials} <= {4, 8, 16, 32, 64, 128, 256}
    assert "data.batch_size" not in done.trials[0]["params"]  # the command line wins
    assert (done.directory / "0" / "metrics.csv").exists()
    assert "+search_space=lenet" in done.results["best_command"]
    assert "hydra.mode=RUN" in done.results["best_command"]


def _jobs(address: str) -> str:
    """How many programs have ever connected to a Ray."""
    code = (
        f"from ray._raylet import GcsClient; print(len(GcsClient('{address}').get_all_job_info()))"
    )
    environment = {**environment_for("sweep"), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    return done.stdout.strip() or done.stderr
