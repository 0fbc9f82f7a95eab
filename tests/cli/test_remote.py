"""Which cluster a config's run is on; no Ray is started."""

import signal
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from command import run
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_mgpu.cli.cluster import connect, is_laptop
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.ray import connection

ON_RAY = SimpleNamespace(runs_elsewhere=True)


class Inits:
    """Stands for `ray.init`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, address: str, **options: Any) -> None:
        self.calls.append((address, options))

    def is_initialized(self) -> bool:
        return bool(self.calls)


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch) -> Inits:
    """As if nothing were known of a cluster yet."""
    inits = Inits()
    monkeypatch.setattr(ray, "init", inits)
    monkeypatch.setattr(ray, "is_initialized", inits.is_initialized)
    monkeypatch.setattr(connection, "_made", None)
    monkeypatch.setattr(connection, "connection", lambda: "some" if inits.calls else None)
    monkeypatch.setattr(connection, "turn_authentication_on", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return inits


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of something that could be a cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def config(**ray_options: Any) -> DictConfig:
    return OmegaConf.create({"ray": {"address": None, "runtime_env": None, **ray_options}})


def test_options_reach_ray(inits: Inits, listener: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    connect(ON_RAY, config(address=f"ray://{listener}", runtime_env={"working_dir": "."}))
    ((address, options),) = inits.calls
    assert address == f"ray://{listener}"
    assert options["runtime_env"] == {"working_dir": "."}
    assert type(options["runtime_env"]) is dict
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not connection.is_ours()


def test_options_that_say_nothing_do_not_reach_ray(inits: Inits) -> None:
    connect(ON_RAY, config(runtime_env={"working_dir": None, "env_vars": {}}))
    ((_, options),) = inits.calls
    assert options.keys().isdisjoint({"runtime_env", "address"})


def test_without_an_address_the_cluster_is_ours(inits: Inits) -> None:
    connect(ON_RAY, OmegaConf.create({}))
    ((address, options),) = inits.calls
    assert address == "local"
    assert options["include_dashboard"] is False
    assert connection.is_ours()


def test_one_process_has_one_cluster(inits: Inits, listener: str) -> None:
    connect(ON_RAY, config(address=listener))
    connect(ON_RAY, config(address=listener))
    connect(ON_RAY, config())
    assert len(inits.calls) == 1
    with pytest.raises(ConfigError, match=r"ray: .*uses Ray already.*'address': 'auto'.*shutdown"):
        connect(ON_RAY, config(address="auto"))


def test_cluster_of_the_program_is_used_as_it_is(inits: Inits) -> None:
    ray.init("auto")
    connect(ON_RAY, config(address="127.0.0.1:6379"))
    assert len(inits.calls) == 1


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_no_cluster_at_the_address(inits: Inits, listener: str, prefix: str) -> None:
    nobody = f"{prefix}{listener.rpartition(':')[0]}:1"
    with pytest.raises(ConfigError, match=rf"ray: There is no Ray cluster at {nobody} .*refused"):
        connect(ON_RAY, config(address=nobody))
    with pytest.raises(LaunchError, match="ray start --head"):
        connection.connect({"address": nobody})
    assert inits.calls == []


def test_cluster_that_does_not_take_the_client(
    inits: Inits, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def abort(*_: Any, **__: Any) -> None:
        raise ConnectionAbortedError("Initialization failure from server:\n no server")

    monkeypatch.setattr(ray, "init", abort)
    expected = rf"ray: The Ray cluster at ray://{listener} .*: no server\)\. Try"
    with pytest.raises(ConfigError, match=expected):
        connect(ON_RAY, config(address=f"ray://{listener}"))


def test_cluster_for_a_run_that_is_not_on_ray_is_refused(inits: Inits) -> None:
    connect(SimpleNamespace(), config())
    with pytest.raises(ConfigError, match=r"ray\.address=auto: nothing .* Add `\+strategy=ray`"):
        connect(SimpleNamespace(), config(address="auto"))
    assert inits.calls == []


@pytest.fixture
def trial() -> Iterator[None]:
    """A job of a sweep that has joined a cluster."""
    before = HydraConfig.instance().cfg
    target = "hydra_plugins.ray_tune_sweeper.ray_tune_sweeper.RayTuneSweeper"
    sweeper = {"_target_": target, "ray": {"address": "auto"}}
    HydraConfig.instance().cfg = OmegaConf.create(
        {"hydra": {"mode": RunMode.MULTIRUN, "sweeper": sweeper}}
    )
    yield
    HydraConfig.instance().cfg = before


@pytest.mark.usefixtures("trial")
def test_trial_runs_where_its_sweep_does(inits: Inits) -> None:
    for strategy in (ON_RAY, SimpleNamespace()):
        connect(strategy, config(address="auto"))
        with pytest.raises(ConfigError, match=r"ray\.address=10\.0\.0\.1:6379: .*hydra\.sweeper"):
            connect(strategy, config(address="10.0.0.1:6379"))
    assert inits.calls == []


@pytest.mark.parametrize(
    ("node", "expected"),
    [({}, False), ({"ray": {"address": "auto"}}, False), ({"ray": {"address": "ray://a:1"}}, True)],
)
def test_client_shares_no_files_with_its_cluster(node: dict[str, Any], expected: bool) -> None:
    assert is_laptop(OmegaConf.create(node)) is expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [("lightning_mgpu.ray.RayStrategy", True), ("lightning_mgpu.DDPStrategy", False)],
)
def test_client_may_be_one_by_the_environment(
    target: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://a:1")
    cfg = OmegaConf.create({"strategy": {"_target_": target}})
    assert is_laptop(cfg) is expected


def test_address_of_a_dashboard_is_no_cluster(
    inits: Inits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    connect(ON_RAY, config())
    assert [address for address, _ in inits.calls] == ["local"]


@pytest.mark.usefixtures("trial")
def test_trial_of_a_laptop_is_on_the_cluster() -> None:
    assert not is_laptop(config(address="ray://a:1"))


def test_command_sends_the_project_along() -> None:
    done = run("ray.runtime_env.working_dir=.", "--cfg", "job", "-p", "ray")
    assert "working_dir: ." in done.out
