"""Which failures are about memory, and what a smaller job is; no Ray is started."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayTaskError
from ray.tune.experiment import Trial
from ray.tune.trainable.function_trainable import FunctionTrainable

from lightning_mgpu._compat.ray_tune import ActorLostError
from lightning_mgpu.errors import ConfigError, NonFiniteError
from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.sweep.job.oom_retry import check_shrinkable, shrink
from lightning_mgpu.sweep.store.tune_state import StateKeeper
from lightning_mgpu.sweep.trial.actor_reset import adopt
from lightning_mgpu.sweep.trial.failures import (
    SweepTrial,
    TrialFailedError,
    TrialOutOfMemoryError,
    failures_in_words,
    is_out_of_memory,
    reason,
    retrying,
)
from lightning_mgpu.sweep.trial.trainable import HydraTrial


def caused(cause: BaseException) -> Exception:
    error = ValueError("cannot build the model")
    error.__cause__ = cause
    return error


def of_an_actor(cause: Exception) -> RayTaskError:
    return RayTaskError("train", "Traceback: of the actor", cause)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (MemoryError(), True),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), True),
        (ActorLostError(OutOfMemoryError("Task was killed due to the node.")), True),
        (ActorLostError(NodeDiedError("gone")), False),
        (caused(MemoryError()), True),
        (of_an_actor(TrialOutOfMemoryError("out of memory, MemoryError: no")), True),
        (of_an_actor(TrialFailedError("ValueError: no")), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError(12), False),
        (RuntimeError(), False),
        (None, False),
    ],
)
def test_errors_of_memory_are_known(error: Any, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_error_in_words_says_that_memory_was_short() -> None:
    expected = "out of memory, MemoryError: no more"
    with pytest.raises(TrialOutOfMemoryError, match=expected), failures_in_words():
        raise MemoryError("no\n more")
    with pytest.raises(TrialFailedError, match="KeyError: 'lr'"), failures_in_words():
        raise KeyError("lr")


def test_error_in_words_says_where_a_nan_comes_from() -> None:
    words = "Step 3 (epoch 0, batch 3): the loss is NaN. First: NaN by `log` in `net.1`."
    with pytest.raises(TrialFailedError) as caught, failures_in_words():
        raise NonFiniteError(words, "Lower the learning rate.")
    assert reason(of_an_actor(caught.value)) == f"NonFiniteError: {words}"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (of_an_actor(TrialFailedError("ValueError: no")), "ValueError: no"),
        (ActorDiedError(), "its process died"),
        (
            OutOfMemoryError("Ray\nsays much"),
            "out of memory on the machine: Ray killed its process",
        ),
        (
            ActorLostError(OutOfMemoryError("was 2GB used / 3GB limit")),
            "out of memory on the machine (2GB of 3GB used): Ray killed its process",
        ),
        (ActorLostError(NodeDiedError("off")), "its process was lost (NodeDiedError: off)"),
    ],
)
def test_reason_is_a_line(error: Any, expected: str) -> None:
    assert reason(error).startswith(expected)


def test_trial_says_so_that_cannot_follow_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FunctionTrainable, "reset_config", lambda self, config: False)
    with pytest.raises(TrialFailedError, match=r"did not stop within 600 s.*reuse_actors=false"):
        HydraTrial.reset_config(object.__new__(HydraTrial), {})


def trial(max_failures: int = 0) -> Trial:
    made = Trial("__fake", stub=True, config={"x": 4}, max_failures=max_failures)
    made.storage = Mock(trial_driver_staging_path=None)  # no files
    return made


def test_trial_out_of_memory_is_run_again_until_it_cannot_be_smaller() -> None:
    one = trial()
    kind = retrying(lambda config: {"x": config["x"] // 2} if config["x"] > 1 else None)
    kind.take_over(one)
    for expected in (2, 1):
        one.handle_error(OutOfMemoryError("no"))
        assert one.config == {"x": expected}
        assert one.should_recover()
    one.handle_error(OutOfMemoryError("no"))
    assert not one.should_recover()


def test_other_failures_count_as_ever() -> None:
    one = trial(max_failures=1)
    retrying(lambda config: config).take_over(one)
    one.handle_error(OutOfMemoryError("no"))
    one.handle_error(of_an_actor(TrialFailedError("ValueError: no")))
    assert one.should_recover()
    one.handle_error(of_an_actor(TrialFailedError("ValueError: no")))
    assert not one.should_recover()


def test_trial_out_of_memory_just_fails_if_nothing_is_asked() -> None:
    one = trial()
    SweepTrial.take_over(one)
    one.handle_error(OutOfMemoryError("no"))
    assert not one.should_recover()
    assert one.failure.startswith("out of memory")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        (
            {"data": {"batch_size": 16}, "trainer": {"accumulate_grad_batches": 1}},
            ["model.lr=1", "data.batch_size=16"],
            ["model.lr=1", "++data.batch_size=4", "++trainer.accumulate_grad_batches=4"],
        ),
        (
            {"batch_size": 5, "trainer": {}},
            ["+trainer.accumulate_grad_batches=3"],
            ["++batch_size=1", "++trainer.accumulate_grad_batches=4"],
        ),
        (
            {"datamodule": {"batch_size": 2}, "trainer": {"accumulate_grad_batches": 3}},
            [],
            ["++datamodule.batch_size=1", "++trainer.accumulate_grad_batches=12"],
        ),
    ],
)
def test_smaller_job_has_less_of_a_batch_and_more_of_them(
    config: dict[str, Any], overrides: list[str], expected: list[str]
) -> None:
    assert shrink(overrides, OmegaConf.create(config), halvings=2) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainer": {}}, "none of data.batch_size, datamodule.batch_size, batch_size"),
        ({"data": {"batch_size": 2}}, "no node `trainer`"),
    ],
)
def test_application_without_a_batch_size_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_shrinkable(OmegaConf.create(config))


def test_files_of_ray_go_where_a_copy_holds_them(tmp_path: Path) -> None:
    staging, directory, folder = tmp_path / "staging", tmp_path / "sweep", tmp_path / "sweep/.ray"
    staging.mkdir()
    for place in (folder, folder / "0", folder / "1/checkpoint_000003", directory / "1"):
        place.mkdir(parents=True)
    (folder / "0/error.pkl").touch()
    (folder / ".validate_storage_marker").touch()
    for name in ("experiment_state-1.json", "searcher-state-1.pkl"):
        (staging / name).write_text(name)
        (folder / name).write_text(name)
    (folder / "callback-states-1.pkl").write_text("not in the copy")
    one = Mock()
    one.storage.experiment_driver_staging_path = str(staging)
    keeper = StateKeeper(directory)
    keeper.clear()  # there is no copy
    assert len(list(folder.iterdir())) == 6
    keeper.on_step_end(0, [one])
    keeper.clear()
    assert {path.name for path in folder.iterdir()} == {"state.tar", "callback-states-1.pkl", "1"}
    again = StateKeeper(directory)
    again.put_back()
    assert (folder / "searcher-state-1.pkl").read_text() == "searcher-state-1.pkl"
    again.clear()
    assert {path.name for path in folder.iterdir()} == {"state.tar", "callback-states-1.pkl", "1"}
    for _ in range(2):
        keeper.show_checkpoints({0: directory / "0", 1: directory / "1"})
        assert [path.name for path in (directory / "1").iterdir()] == ["checkpoint_000003"]
    assert {path.name for path in directory.iterdir()} == {".ray", "1"}


def test_process_has_time_to_end_a_trial_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or Ray gives up the next one after two seconds, without a word to anybody."""
    of_the_driver = ProcessState.capture(1)
    monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "600")  # as the actor sets it
    assert adopt(of_the_driver, 1).environment["TUNE_FUNCTION_THREAD_TIMEOUT_S"] == "600"
