"""What is used of Ray Tune beside its documentation, as far as it shows without a cluster."""

import pickle
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.air.execution._internal import RayActorManager, TrackedActor, event_manager
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayTaskError
from ray.train._internal import storage
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, HyperBandScheduler, TrialScheduler
from ray.tune.search import SearchGenerator
from ray.tune.search.searcher import Searcher

from lightning_mgpu._compat import ray_tune


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> storage.StorageContext:
    """Where a trial keeps its files."""
    monkeypatch.setenv("TUNE_ORIG_WORKING_DIR", "")  # it will be set
    monkeypatch.setattr(storage, "_get_ray_train_session_dir", lambda: str(tmp_path / "session"))
    return storage.StorageContext(
        storage_path=str(tmp_path), experiment_dir_name="sweep", trial_dir_name="00003"
    )


@pytest.fixture
def controller(context: storage.StorageContext, monkeypatch: pytest.MonkeyPatch) -> TuneController:
    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "1")
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    return TuneController(storage=context, resource_manager_factory=MagicMock)


@pytest.fixture
def trial(context: storage.StorageContext) -> Trial:
    return Trial("trainable", stub=True, storage=context, experiment_tag="4_lr=0.1")


class _Job(ray_tune.TrialActor):
    reports = 1

    def run(self, config: dict[str, Any]) -> None:
        for number in range(self.reports):
            ray_tune.report({"number": number, **config, "directory": self.directory_name})


def test_trial_actor_runs_the_function_and_says_when_it_is_over(
    context: storage.StorageContext,
) -> None:
    kind = _Job.named("HydraJob", "hydra", reports=2)
    actor = kind(config={"a": 5}, storage=context)
    try:
        first, second, last = (actor.train() for _ in range(3))
    finally:
        actor.stop()
    assert (first["number"], first["a"], first["directory"]) == (0, 5, "00003")
    assert second["number"] == 1
    assert last[ray_tune.RESULT_DUPLICATE]
    assert "number" not in last


def test_trial_actor_has_the_name_that_ray_tune_takes() -> None:
    from ray.tune.experiment import Experiment

    assert Experiment.get_trainable_name(_Job.named("HydraJob", "hydra")) == "hydra"


def test_trial_actor_finishes_at_the_next_report(context: storage.StorageContext) -> None:
    actor = _Job.named("HydraJob", "hydra", reports=1000)(config={}, storage=context)
    assert actor.train()["number"] == 0
    actor.finish(30.0)  # returns when the thread has ended
    assert not ray_tune.get_session().training_thread.is_alive()
    actor.stop()


def test_patience_is_how_long_actors_may_take(controller: TuneController) -> None:
    given = controller._wrapped()
    actor = MagicMock()
    waits: list[float] = []

    def wait(timeout: float) -> None:
        waits.append(timeout)
        controller._stopping_actors[actor] = 0.0
        ray_tune.Controller(given).set_patience(0)

    controller._actor_manager = MagicMock()
    controller._actor_manager.next = wait
    controller._actor_manager.is_actor_started.return_value = True
    controller._stopping_actors = {actor: time.monotonic()}
    ray_tune.Controller(given).set_patience(600)
    controller._cleanup_stopping_actors(force_all=True)
    assert waits == [1]
    controller._actor_manager.remove_actor.assert_called_once()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutOfMemoryError("low on memory"), ray_tune.ActorLostError),
        (NodeDiedError("gone"), ray_tune.ActorLostError),
        (ActorDiedError(), ActorDiedError),
        (RayTaskError("train", "Traceback", ValueError()), RayTaskError),
    ],
)
def test_actor_that_is_lost_fails_its_trial(
    error: Exception,
    expected: type[Exception],
    controller: TuneController,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = controller._actor_manager = RayActorManager(resource_manager=MagicMock())
    ray_tune.Controller(controller._wrapped()).survive_lost_actors()
    failed = []
    actor = TrackedActor(0)
    manager._live_actors_to_ray_actors_resources[actor] = (MagicMock(), MagicMock())
    manager.schedule_actor_task(actor, "train", on_error=lambda _, given: failed.append(given))
    monkeypatch.setattr(event_manager.ray, "get", MagicMock(side_effect=error))
    (future,) = manager._actor_task_events.get_futures()
    manager._actor_task_events.resolve_future(future)
    assert [type(given) for given in failed] == [expected]


def test_error_of_a_lost_actor_is_pickled() -> None:
    """Ray keeps it with the trial."""
    error = pickle.loads(pickle.dumps(ray_tune.ActorLostError(OutOfMemoryError("low"))))
    assert (str(error), str(error.cause)) == ("low", "low")


def test_run_again_makes_a_trial_one_of_those_that_live(
    controller: TuneController, trial: Trial
) -> None:
    trial.set_status(Trial.TERMINATED)
    ray_tune.Controller(controller._wrapped()).run_again(trial)
    assert trial.status == "PENDING"
    assert controller.get_live_trials() == {trial}
    assert not controller.is_finished()


def _saved_status(controller: TuneController, trial: Trial) -> str:
    saved, _ = controller._get_trial_checkpoints()[trial.trial_id]
    return str(Trial.from_json_state(saved, stub=True).status)


def test_trial_that_is_stopped_while_it_waits_is_marked(
    controller: TuneController, trial: Trial
) -> None:
    given = controller._wrapped()
    controller.add_trial(trial)
    controller._set_trial_status(trial, Trial.PAUSED)
    controller._mark_trial_to_checkpoint(trial)
    assert _saved_status(controller, trial) == "PAUSED"
    controller.stop_trial(trial)
    ray_tune.Controller(given).mark_ended(trial)
    assert _saved_status(controller, trial) == "TERMINATED"


def test_save_writes_the_state_at_once(
    controller: TuneController, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr(
        controller._checkpoint_manager,
        "sync_up_experiment_state",
        lambda **arguments: saved.append(arguments["force"]),
    )
    ray_tune.Controller(controller._wrapped()).save()
    assert saved == [True]


def test_follow_sees_what_a_scheduler_is_told_and_decides(
    controller: TuneController, trial: Trial
) -> None:
    class Stopping(FIFOScheduler):
        def on_trial_result(self, *_: Any) -> str:
            return TrialScheduler.STOP

    scheduler = Stopping()
    added: list[Trial] = []
    stopped: list[Trial] = []
    ray_tune.follow(scheduler, lambda _, trial: added.append(trial), stopped.append)
    controller._scheduler_alg = scheduler
    scheduler.on_trial_add(controller._wrapped(), trial)
    assert scheduler.on_trial_result(controller._wrapped(), trial, {}) == "STOP"
    assert (added, stopped) == ([trial], [trial])


@pytest.mark.parametrize("rungs", [1, 2])
@pytest.mark.parametrize("how", ["on_trial_error", "on_trial_complete"])
def test_trials_do_not_wait_for_one_that_is_gone(rungs: int, how: str) -> None:
    """Two have come to the end of a rung, the last one, and the third ends without a report."""
    scheduler = HyperBandScheduler(metric="m", mode="max", max_t=9, reduction_factor=3)
    ray_tune.follow(scheduler, lambda *_: None, lambda _: None)
    controller = MagicMock()

    def stop(trial: Trial) -> None:
        trial.status = Trial.TERMINATED
        scheduler.on_trial_remove(controller, trial)

    controller.stop_trial.side_effect = stop
    trials = [Trial("nothing", stub=True) for _ in range(3 if rungs == 1 else 8)]
    bracket = scheduler._create_bracket(rungs - 1)
    scheduler._state["bracket"] = bracket
    bracket._n = len(trials)
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
        trial.status = Trial.RUNNING

    def report(trial: Trial, time: int) -> None:
        result = {"training_iteration": time, "m": float(trials.index(trial))}
        if scheduler.on_trial_result(controller, trial, result) == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED

    if rungs == 2:
        for trial in trials:
            report(trial, 3)
        trials = [trial for trial in trials if trial.status != Trial.TERMINATED]
        assert len(trials) == 3
        for trial in trials:
            trial.status = Trial.RUNNING
    *waiting, last = trials
    for trial in waiting:
        report(trial, 9)
        assert trial.status == Trial.PAUSED
    last.status = Trial.ERROR
    given = () if how == "on_trial_error" else ({"training_iteration": 4, "m": 1.0},)
    getattr(scheduler, how)(controller, last, *given)
    assert [trial.status for trial in waiting] == [Trial.TERMINATED] * 2


def test_make_changes_the_class_of_a_trial(trial: Trial) -> None:
    class Ours(Trial):
        reason = ""

    ray_tune.make(trial, Ours)
    assert isinstance(trial, Ours)
    trial.reason = "words"
    assert trial.reason == "words"
    assert callable(trial.handle_error)


def test_trial_tells_its_actor_number_and_directory(
    trial: Trial, context: storage.StorageContext
) -> None:
    assert ray_tune.actor_of(trial) is None
    actor = MagicMock()
    trial.set_ray_actor(actor)
    assert ray_tune.actor_of(trial) is actor
    assert ray_tune.trial_number(trial) == 3
    assert str(ray_tune.state_directory(trial)) == context.experiment_driver_staging_path


class _Searcher(Searcher):
    def suggest(self, trial_id: str) -> Any:
        return {"x": 1}


def test_set_samples_has_a_generator_go_on() -> None:
    generator = SearchGenerator(_Searcher(metric="m", mode="max"))
    generator.set_state({**generator.get_state(), "counter": 2, "finished": True})
    assert generator.is_finished()
    ray_tune.set_samples(generator, 2)
    assert generator.is_finished()
    ray_tune.set_samples(generator, 3)
    assert not generator.is_finished()
    assert generator.total_samples == 3
