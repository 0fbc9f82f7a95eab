"""What trials reserve."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from omegaconf import OmegaConf

from hydra_plugins.ray_tune_sweeper import config
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.space.space import Choice, Space
from lightning_mgpu.sweep.trial.resources import Requests, request

SCHEDULERS = {"asha": config.AshaConf, "pbt": config.PbtConf}
_RAY = {"_target_": "lightning_mgpu.ray.RayStrategy", "num_workers": 2, "num_cpus_per_worker": 2}


def _requests(
    monkeypatch: pytest.MonkeyPatch,
    scheduler: str = "asha",
    gpu: float | None = 0,
    gpus: float = 0,
    **searched: list[Any],
) -> Requests:
    """Those of a sweep whose job has the searched values as its config, on four CPUs."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": gpus})
    space = Space()
    for name, values in searched.items():
        space.add(name, Choice(tuple(values)))

    def compose(overrides: list[str], *_: Any) -> Any:
        return OmegaConf.from_dotlist([override.replace(":", ": ") for override in overrides])

    sweep: Any = SimpleNamespace(
        space=space,
        job=SimpleNamespace(compose_ahead=compose),
        directory=Path(),
        options=SimpleNamespace(
            resources_per_trial=SimpleNamespace(cpu=3, gpu=gpu),
            scheduler=SCHEDULERS[scheduler](),
        ),
    )
    return Requests(sweep)


def test_workers_on_ray_are_all_that_a_trial_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _requests(monkeypatch, strategy=[_RAY, {"_target_": "builtins.dict"}, "auto"])
    requests.check()
    on_ray = requests.of({"strategy": _RAY})
    assert (on_ray.head_bundle_is_empty, on_ray.bundles) == (True, [{"CPU": 2.0}] * 2)
    for other in ({"_target_": "builtins.dict"}, {"_target_": "nowhere.at.all"}, "auto"):
        assert requests.of({"strategy": other}).required_resources == {"CPU": 3.0}


@pytest.mark.parametrize(
    ("gpu", "gpus", "own"), [(None, 0, 0), (None, 2, 1), (0, 2, 0), (0.5, 2, 0.5), (2, 2, 2)]
)
def test_trial_has_a_gpu_where_there_are_any_and_sees_none_without(
    gpu: float | None, gpus: float, own: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = _requests(monkeypatch, gpu=gpu, gpus=gpus, x=[1])
    requests.check()
    assert requests.of({"x": 1}).required_resources.get("GPU", 0) == own
    assert requests.hides_gpus == (own == 0)


def test_trial_that_waits_for_workers_sees_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _requests(monkeypatch, strategy=[_RAY])
    requests.check()
    assert not requests.hides_gpus


def test_trials_reserve_as_many_workers_as_each_of_them_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = _requests(monkeypatch, **{"strategy": [_RAY], "strategy.num_workers": [1, 2]})
    requests.check()
    for workers in (1, 2):
        wanted = requests.of({"strategy": _RAY, "strategy.num_workers": workers})
        assert wanted.bundles == [{"CPU": 2.0}] * workers


def test_number_of_workers_that_some_trial_would_wait_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"strategy": [_RAY], "strategy.num_workers": [1, 2, 3], "lr": [0.1, 0.2]}
    with pytest.raises(ConfigError, match=r"a trial need CPU: 6, but there are CPU: 4"):
        _requests(monkeypatch, **given).check()


def test_strategy_that_cannot_be_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"strategy": [_RAY], "strategy.num_workers": [1, -1]}
    with pytest.raises(ConfigError, match="num_workers"):
        _requests(monkeypatch, **given).check()


def test_more_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"a trial need CPU: 6, but there are CPU: 4"):
        _requests(monkeypatch, strategy=[{**_RAY, "num_workers": 3}]).check()


def test_strategy_that_would_change_within_a_run_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"scheduler=pbt: strategy cannot change within a run"):
        _requests(monkeypatch, "pbt", strategy=[_RAY], lr=[0.1]).check()


def test_other_processes_than_the_sweeps_own_know_of_nothing() -> None:
    assert request({}) is None
