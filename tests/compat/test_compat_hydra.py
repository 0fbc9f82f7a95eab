"""What is used of Hydra and OmegaConf beside their documentation."""

import pickle
import sys
from collections.abc import Iterator

import cloudpickle
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from lightning_mgpu._compat import hydra


@pytest.fixture
def state_kept() -> Iterator[None]:
    singletons, resolvers = hydra.singletons(), dict(hydra.resolvers())
    plugins = Plugins.instance()
    yield
    singletons["instances"][Plugins] = plugins
    Singleton.set_state(singletons)
    hydra.resolvers().clear()
    hydra.resolvers().update(resolvers)


@pytest.mark.parametrize("key", ["plain", "with space", "a:b", "{x}", r"back\slash", "a,b=c"])
def test_escaped_keys_are_read_as_they_were(key: str) -> None:
    override = OverridesParser.create().parse_override(f"d={{{hydra.escape(key)}:1}}")
    assert override.value() == {key: 1}


def test_command_line_parser_knows_the_flags_of_a_single_job() -> None:
    given, rest = hydra.command_line_parser().parse_known_args(
        ["--config-path", "p", "--config-name", "n", "--config-dir", "d", "--unknown", "a=1"]
    )
    assert (given.config_path, given.config_name, given.config_dir) == ("p", "n", "d")
    assert "--unknown" in rest


@pytest.mark.usefixtures("state_kept")
def test_resolvers_are_those_that_omegaconf_calls() -> None:
    OmegaConf.register_new_resolver("compat_double", lambda x: 2 * x, replace=True)
    taken = hydra.resolvers().pop("compat_double")
    assert not OmegaConf.has_resolver("compat_double")
    hydra.resolvers()["compat_again"] = taken
    assert OmegaConf.create({"a": "${compat_again:4}"}).a == 8


@pytest.mark.usefixtures("state_kept")
def test_singletons_come_back_pickled() -> None:
    ConfigStore.instance().store("compat_node", {"a": 1})
    HydraConfig.instance()
    data = cloudpickle.dumps(hydra.singletons())
    ConfigStore.instance().repo.pop("compat_node.yaml")
    hydra.set_singletons(pickle.loads(data))
    assert ConfigStore.instance().load("compat_node.yaml").node == {"a": 1}


@pytest.mark.usefixtures("state_kept")
def test_plugins_are_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hydra.set_singletons(hydra.singletons())
    found = Plugins.instance()
    hydra.set_singletons(hydra.singletons())
    assert Plugins.instance() is found
    monkeypatch.setattr(sys, "path", [*sys.path, "/elsewhere"])
    hydra.set_singletons(hydra.singletons())
    assert Plugins.instance() is not found
