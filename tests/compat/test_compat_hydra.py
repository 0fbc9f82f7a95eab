"""What is used of Hydra and OmegaConf beside their documentation."""

import copy
import pickle
import sys
import threading
from collections.abc import Iterator

import cloudpickle
import pytest
from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from lightning_mgpu._compat import hydra


@pytest.fixture
def state_kept() -> Iterator[None]:
    put_back = hydra.take_state()
    plugins = Plugins.instance()
    yield
    assert put_back is not None
    put_back()
    Singleton._instances[Plugins] = plugins


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
def test_shared_store_gives_out_copies_of_its_nodes_only() -> None:
    store = ConfigStore.instance()
    store.store("compat_node", {"a": 1})
    with initialize(version_base=None), hydra.shared_config_store():
        assert copy.deepcopy(store) is store
        first = compose("compat_node")
        first.a = 2
        assert compose("compat_node") == {"a": 1}
    assert store.load("compat_node.yaml").node == {"a": 1}
    assert copy.deepcopy(store) is not store


@pytest.mark.usefixtures("state_kept")
def test_state_comes_back_pickled() -> None:
    ConfigStore.instance().store("compat_node", {"a": 1})
    OmegaConf.register_new_resolver("compat_double", lambda x: 2 * x, replace=True)
    data = cloudpickle.dumps(hydra.take_state())
    ConfigStore.instance().repo.pop("compat_node.yaml")
    OmegaConf.clear_resolver("compat_double")
    OmegaConf.register_new_resolver("compat_newer", lambda x: x)
    pickle.loads(data)()
    assert ConfigStore.instance().load("compat_node.yaml").node == {"a": 1}
    assert OmegaConf.create({"a": "${compat_double:4}"}).a == 8
    assert not OmegaConf.has_resolver("compat_newer")


@pytest.mark.usefixtures("state_kept")
def test_a_resolver_that_cannot_be_pickled_stays_behind() -> None:
    lock = threading.Lock()
    OmegaConf.register_new_resolver("compat_lock", lambda: lock.locked())
    OmegaConf.register_new_resolver("compat_double", lambda x: 2 * x)
    data = cloudpickle.dumps(hydra.take_state())
    pickle.loads(data)()
    assert OmegaConf.has_resolver("compat_double")
    assert not OmegaConf.has_resolver("compat_lock")


@pytest.mark.usefixtures("state_kept")
def test_plugins_are_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def put_back() -> None:
        function = hydra.take_state()
        assert function is not None
        function()

    put_back()
    found = Plugins.instance()
    put_back()
    assert Plugins.instance() is found
    monkeypatch.setattr(sys, "path", [*sys.path, "/elsewhere"])
    put_back()
    assert Plugins.instance() is not found


def test_nothing_is_taken_where_hydra_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hydra")
    assert hydra.take_state() is None
