"""The plugin as every Hydra application meets it, and refusals before anything starts."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from command import run
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from hydra_plugins.ray_tune_sweeper.ray_tune_sweeper import RayTuneSweeper
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.ray import connection
from lightning_mgpu.sweep.job.nested import VARIABLE, marked
from lightning_mgpu.sweep.store.lock import locked
from lightning_mgpu.variables import restored

SWEEP = ("-m", "hydra/sweeper=ray_tune", "hydra.sweep.dir=sweep", "model.lr=interval(0.1,1)")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if other tests had not started one in this process."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of something that could be a cluster, for a laptop."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"ray://127.0.0.1:{server.getsockname()[1]}"


def test_discovery_finds_the_sweeper() -> None:
    assert RayTuneSweeper.__name__ in [cls.__name__ for cls in Plugins.instance().discover(Sweeper)]


def test_plugin_costs_other_applications_little_and_imports_neither_ray_nor_torch() -> None:
    code = """
import json, sys, time
import hydra.main, hydra.plugins.sweeper, hydra.core.config_store
before = time.process_time()  # whatever else the machine does meanwhile
import hydra_plugins.ray_tune_sweeper.ray_tune_sweeper
import hydra_plugins.ray_tune_sweeper.strategies
ours = time.process_time() - before
from hydra.core.plugins import Plugins
Plugins.instance()
heavy = {"ray", "torch", "lightning", "pytorch_lightning", "numpy"}
print(json.dumps([ours, sorted(heavy & set(sys.modules))]))
"""
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
        for _ in range(3)
    ]
    seconds, imported = zip(*(json.loads(done.stdout) for done in runs), strict=True)
    assert list(imported) == [[], [], []]
    assert min(seconds) < 0.05


_STOCK_APP = """
import hydra
%s

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    %s
    trainer = Trainer(strategy=cfg.strategy, devices=2, accelerator="cpu", logger=False)
    print(type(trainer.strategy).__name__, type(trainer).__module__)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at_the_top", "in_the_job", "strategy", "expected"),
    [
        ("from lightning.pytorch import Trainer", "", "mgpu_ddp", "DDPStrategy lightning"),
        ("", "from lightning.pytorch import Trainer", "dp", "DataParallelStrategy lightning"),
        (
            *("", "from pytorch_lightning import Trainer", "pipeline"),
            "PipelineStrategy pytorch_lightning",
        ),
    ],
)
def test_any_hydra_application_knows_the_strategies_by_name(
    at_the_top: str, in_the_job: str, strategy: str, expected: str
) -> None:
    Path("app.py").write_text(_STOCK_APP % (at_the_top, in_the_job))
    done = subprocess.run(
        [sys.executable, "app.py", f"+strategy={strategy}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hydra.sweeper.mode=most",), "hydra.sweeper.mode=most: expected one of min, max"),
        (
            ("hydra.sweeper.search_alg.sed=1",),
            "hydra.sweeper.search_alg.sed=1: lightning_mgpu.sweep.search.searchers.RandomSearcher"
            " takes seed. Did you mean seed?",
        ),
        (
            (
                "hydra/sweeper/search_alg=optuna",
                "hydra.sweeper.search_alg.sampler._target_=optuna.samplers.GPSampler",
                "hydra.sweeper.search_alg.sampler.n_startup_trials=many",
                "hydra.sweeper.search_alg.sampler.warn=false",
            ),
            "hydra.sweeper.search_alg.sampler.warn=false: optuna.samplers.GPSampler takes seed, ",
        ),
        (
            (
                "hydra.sweeper.metric=val_loss",
                "hydra.sweeper.scheduler.max_t=2",
                "hydra.sweeper.scheduler.grace_period=3",
            ),
            "ASHAScheduler(time_attr=training_iteration, max_t=2, grace_period=3,",
        ),
        (("hydra/sweeper/scheduler=bohb",), "BOHB needs both"),
        (("hydra/sweeper/search_alg=grid",), "model.lr: an interval of real numbers has no grid"),
        (("hydra.launcher._target_=of.Joblib",), "are started by Ray, not by a launcher"),
        (("model.lrr=1,2",), "Could not override 'model.lrr'"),
        (("hydra.sweeper.resume=nowhere",), "hydra.sweeper.resume=nowhere: holds no sweep"),
        (("hydra.sweeper.ray.address='127.0.0.1:1'",), "There is no Ray cluster at 127.0.0.1:1 "),
        (
            ("hydra.sweeper.ray.address='ray://127.0.0.1:1'",),
            "There is no Ray cluster at ray://127",
        ),
    ],
)
@pytest.mark.usefixtures("no_ray")
def test_what_cannot_work_is_refused_in_a_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*SWEEP, *arguments)
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.usefixtures("no_ray")
def test_directory_of_the_user_may_have_more_schedulers_and_searches() -> None:
    for group, name, text in (
        ("scheduler", "patient", "defaults: [asha]\ngrace_period: 5\n"),
        ("search_alg", "qmc", "_target_: ray.tune.search.optuna.OptunaSearch\nsampler: 5\n"),
        ("scheduler", "own", "_target_: my.Scheduler\n"),
    ):
        path = Path("conf/hydra/sweeper", group, f"{name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for arguments, message in (
        (
            ("hydra/sweeper/scheduler=patient", "hydra.sweeper.scheduler.max_t=2"),
            "max_t=2, grace_period=5,",
        ),
        (
            ("hydra/sweeper/search_alg=qmc",),
            "hydra.sweeper.search_alg.sampler=5: expected _target_",
        ),
        (
            ("hydra/sweeper/scheduler=own",),
            "hydra.sweeper.scheduler._target_=my.Scheduler: cannot be imported, Module",
        ),
    ):
        done = run("--config-dir", "conf", *SWEEP, "hydra.sweeper.metric=val_loss", *arguments)
        assert (done.code, message in done.err) == (2, True), done.err
        assert "Traceback" not in done.err
    assert not Path("sweep").exists()  # which would be another sweep's from now on


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
@pytest.mark.usefixtures("no_ray")
def test_cluster_may_be_named_in_the_environment(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    done = run(*SWEEP)
    assert done.code == 2, done.err
    assert f"There is no Ray cluster at {address} " in done.err


def test_any_application_shows_what_is_wrong_without_a_traceback() -> None:
    app = Path(__file__).parents[1] / "apps" / "slow_app.py"
    arguments = ("-m", "hydra/sweeper=ray_tune", "x=1,2", "hydra.sweeper.mode=most")
    done = subprocess.run([sys.executable, app, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("hydra.sweeper.mode=most: expected one of min, max")
    assert "Traceback" not in done.stderr


def test_sweep_within_a_trial_is_refused() -> None:
    app = Path(__file__).parents[1] / "apps" / "slow_app.py"
    arguments = ("-m", "hydra/sweeper=ray_tune", "x=1,2", "hydra.sweep.dir=inner")
    with restored(VARIABLE):  # as in a process that a trial has started
        os.environ.update(marked(3, Path("/data/outer")))
        done = subprocess.run([sys.executable, app, *arguments], capture_output=True, text=True)
        ours = run(*SWEEP)
    assert (done.returncode, ours.code) == (1, 2)
    for text in (done.stderr, ours.err):
        assert "started by trial 3 of /data/outer" in text
        assert "use trainer.strategy=mgpu_ddp" in text
        assert "Traceback" not in text
    assert list(Path.cwd().glob("[is]*")) == []  # neither `inner` nor `sweep`


def test_sweep_with_nothing_to_search_is_refused() -> None:
    done = run(*SWEEP[:-1])
    assert (done.code, "nothing to search" in done.err) == (2, True)


def test_directory_of_another_sweep_is_refused() -> None:
    Path("sweep").mkdir()
    Path("sweep/search_space.yaml").write_text("{}\n")
    done = run(*SWEEP)
    assert done.code == 2
    assert "already holds a sweep. Resume it with hydra.sweeper.resume=" in done.err


def test_resumed_sweep_with_another_space_is_refused() -> None:
    Path("sweep").mkdir()
    identity = "metric: null\nmode: min\nsearch_alg: random\nfixed: []\nsearch: ['model.lr: 5']\n"
    Path("sweep/search_space.yaml").write_text(identity)
    done = run(*SWEEP, "hydra.sweeper.resume=sweep")
    assert done.code == 2
    assert "hydra.sweeper.resume=sweep: was a sweep with search ['model.lr: 5'], now" in done.err


@pytest.mark.usefixtures("no_ray")
def test_sweep_goes_on_at_another_address() -> None:
    """It is the same sweep, though our command has the address among its own keys."""
    given = ("+search_space=lenet", "hydra.sweep.dir=sweep")
    for port, more in (1, ()), (2, ("hydra.sweeper.resume=sweep",)):
        done = run(*given, f"ray.address='127.0.0.1:{port}'", *more)
        assert f"There is no Ray cluster at 127.0.0.1:{port} " in done.err


def test_sweep_runs_in_one_process_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mgpu.sweep.store.lock._PATIENCE_SECONDS", 0.0)
    path = Path.cwd()
    for _ in range(2):  # the second time, the first one has given it back
        with locked(path), pytest.raises(ConfigError, match="still runs this sweep"), locked(path):
            pytest.fail("twice at once")


def test_sweep_runs_where_the_file_system_has_no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(Path.cwd()):
        pass


def test_cluster_is_refused_where_another_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    done = run(*SWEEP, "hydra.sweeper.ray.address='ray://127.0.0.1:1'")
    assert done.code == 2, done.err
    assert "address=ray://127.0.0.1:1: this process uses another Ray already" in done.err


@pytest.mark.usefixtures("no_ray")
def test_cluster_that_does_not_take_the_client_is_told_of_whole(
    listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def abort(*_: object, **__: object) -> None:
        raise ConnectionAbortedError("Initialization failure from server: " + 500 * "long ")

    monkeypatch.setattr(ray, "init", abort)
    done = run(*SWEEP, f"hydra.sweeper.ray.address='{listener}'")
    assert done.code == 2, done.err
    assert "start the head with GRPC_ENABLE_FORK_SUPPORT=0" in done.err


@pytest.mark.usefixtures("no_ray")
def test_cluster_without_this_package_is_told_of(
    listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpickle(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'lightning_mgpu'")

    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "remote", unpickle)
    monkeypatch.setattr(connection, "connection", lambda: "theirs")
    done = run(*SWEEP, f"hydra.sweeper.ray.address='{listener}'")
    assert done.code == 2, done.err
    assert "No module named 'lightning_mgpu'). Every machine needs the same versions" in done.err


@pytest.mark.parametrize("space", ["lenet", "lenet_pbt", "strategies"])
def test_shipped_search_space_starts_a_sweep_by_itself(space: str) -> None:
    done = run(f"+search_space={space}", "--cfg", "hydra", "-p", "hydra")
    assert "mode: MULTIRUN" in done.out
    assert "RayTuneSweeper" in done.out
    # Its first trial composes; what is refused comes after that.
    done = run(f"+search_space={space}", "hydra.sweep.dir=sweep", "hydra.sweeper.resume=nowhere")
    assert "hydra.sweeper.resume=nowhere: holds no sweep" in done.err
