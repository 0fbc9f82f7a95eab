"""Private names of Ray Tune: the process of a trial, and the controller of trials."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train._internal.session import get_session
from ray.tune import report
from ray.tune.experiment import Trial
from ray.tune.result import RESULT_DUPLICATE
from ray.tune.schedulers import HyperBandScheduler, TrialScheduler
from ray.tune.search import SearchGenerator
from ray.tune.trainable.function_trainable import FunctionTrainable
from typing_extensions import Self, override

from lightning_mgpu._compat.release import assign, missing


class TrialActor(FunctionTrainable):
    """Runs a function for each trial, on a thread of its actor."""

    @abstractmethod
    def run(self, config: dict[str, Any]) -> None:
        """Run one trial."""

    @classmethod
    def named(cls, name: str, title: str, **attributes: Any) -> type[Self]:
        """A class of such actors, with attributes of its own.

        Args:
            name: The class's, which the actors' processes have for a name.
            title: What Ray calls the experiment.
            **attributes: Attributes of the class.
        """
        return type(name, (cls,), {**attributes, "_name": title})

    @property
    def directory_name(self) -> str:
        """Name of the trial's directory, within the experiment's."""
        assert self._storage is not None, "made outside of Ray Tune"
        return str(self._storage.trial_dir_name or "")

    def finish(self, seconds: float) -> None:
        """Tell the trial that runs to stop at its next report, and wait for that so long."""
        session = get_session()
        if session is not None:
            session.finish(timeout=seconds)

    @override
    def _trainable_func(self, config: dict[str, Any]) -> None:
        self.run(config)
        report({RESULT_DUPLICATE: True})  # it is over, and has nothing more to say


class ActorLostError(RayActorError):
    """The actor of a trial is gone, and Ray has given an error that Ray Tune does not expect.

    Args:
        cause: Ray's error.
    """

    def __init__(self, cause: RayError) -> None:
        super().__init__(error_msg=str(cause))
        self.cause = cause


class Controller:
    """The object of Ray's that runs the trials of a sweep.

    Args:
        given: As schedulers are given it.
    """

    def __init__(self, given: Any) -> None:
        self._its = given._tune_controller

    def set_patience(self, seconds: float) -> None:
        """Set the seconds that trials may take to stop with the sweep; Ray's default is ten."""
        assign(self._its, "_actor_force_cleanup_timeout", seconds, "ray")

    def survive_lost_actors(self) -> None:
        """Have a trial fail whose actor is lost for whatever reason.

        Ray Tune expects actors that die and tasks that raise. Any other error, as where Ray's
        memory monitor kills a process, would end the sweep.
        """
        manager = self._its._actor_manager
        failed = manager._actor_task_failed

        def actor_task_failed(tracked_actor_task: Any, exception: Exception) -> None:
            if isinstance(exception, RayError) and not isinstance(
                exception, (RayActorError, RayTaskError)
            ):
                exception = ActorLostError(exception)
            failed(tracked_actor_task, exception)

        assign(manager, "_actor_task_failed", actor_task_failed, "ray")

    def run_again(self, trial: Trial) -> None:
        """Have a trial that has ended run once more."""
        trial.set_status(Trial.PENDING)
        self._its._live_trials.add(trial)  # as with others, before the scheduler knows of them

    def mark_ended(self, trial: Trial) -> None:
        """Have what is saved next say that a trial has ended.

        Ray Tune forgets that of trials that the scheduler stops while they wait, and a resumed
        sweep would run them again.
        """
        self._its._mark_trial_to_checkpoint(trial)

    def save(self) -> None:
        """Write the state of the sweep down now."""
        self._its.checkpoint(force=True)


def follow(
    scheduler: TrialScheduler,
    added: Callable[[Controller, Trial], None],
    stopped: Callable[[Trial], None],
) -> None:
    """See which trials a scheduler is told of, and which it stops.

    Args:
        scheduler: The scheduler, of whatever class: Ray tells some kinds of scheduler from others.
        added: Called before it is told of a trial that is to start, or to start again.
        stopped: Called with each trial that it stops.
    """
    add, decide = scheduler.on_trial_add, scheduler.on_trial_result

    def on_trial_add(controller: Any, trial: Trial) -> None:
        added(Controller(controller), trial)
        add(controller, trial)

    def on_trial_result(controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = str(decide(controller, trial, result))
        if decision == TrialScheduler.STOP:
            stopped(trial)
        return decision

    if isinstance(scheduler, HyperBandScheduler):
        _release_waiting(scheduler)
    assign(scheduler, "on_trial_add", on_trial_add, "ray")
    assign(scheduler, "on_trial_result", on_trial_result, "ray")


def _release_waiting(scheduler: HyperBandScheduler) -> None:
    """Go on with a bracket when the last trial is gone that the others have waited for.

    Ray Tune does so when such a trial reports, and when it is gone before the first halving. After
    that, one that fails or ends by itself would leave the others waiting for ever.
    """
    remove, process = scheduler.on_trial_remove, scheduler._process_bracket
    is_busy = False

    def process_bracket(controller: Any, bracket: Any) -> str:
        nonlocal is_busy
        is_busy, before = True, is_busy  # trials that it stops are removed meanwhile
        try:
            return str(process(controller, bracket))
        finally:
            is_busy = before

    def on_trial_remove(controller: Any, trial: Trial) -> None:
        remove(controller, trial)
        bracket, _ = scheduler._trial_info[trial]
        waiting = bracket.current_trials()
        released = bracket.trials_to_unpause
        if is_busy or not waiting or not bracket.cur_iter_done():
            return
        if all(one.status == Trial.PAUSED and one not in released for one in waiting):
            process_bracket(controller, bracket)

    assign(scheduler, "_process_bracket", process_bracket, "ray")
    assign(scheduler, "on_trial_remove", on_trial_remove, "ray")


def make(trial: Trial, kind: type[Trial]) -> None:
    """Have a trial that Ray has made be of another class; Ray takes no factory for them.

    Raises:
        TypeError: This release of Ray makes trials that cannot be changed so.
    """
    if type(trial) is not kind:
        trial.__class__ = kind


def actor_of(trial: Trial) -> Any:
    """The handle of the actor that runs a trial; `None` if none does."""
    return trial.temporary_state.ray_actor


def state_directory(trial: Trial) -> Path:
    """Directory where Ray writes the state of a trial's sweep before copying it to storage."""
    assert trial.storage is not None, "no trial of a sweep"
    return Path(trial.storage.experiment_driver_staging_path)


def trial_number(trial: Trial) -> int:
    """The number of a trial in the order in which a `SearchGenerator` made them, from 0."""
    return int(str(trial.experiment_tag).partition("_")[0]) - 1


def set_samples(generator: SearchGenerator, count: int) -> None:
    """Have a generator make so many trials in all, those that it has made included.

    Raises:
        AttributeError: This release of Ray keeps another state of it.
    """
    state = generator.get_state()
    if not state.keys() >= {"total_samples", "counter", "finished"}:
        raise missing("the counters in the state of a `SearchGenerator`", "ray")
    is_finished = state["finished"] and state["counter"] >= count
    generator.set_state({**state, "total_samples": count, "finished": is_finished})
