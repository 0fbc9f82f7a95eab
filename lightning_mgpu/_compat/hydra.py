"""Private names of Hydra and OmegaConf. Imports neither until it is called."""

import functools
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import cloudpickle

if TYPE_CHECKING:
    import argparse


def escape(text: str) -> str:
    """Escape what means something in an unquoted key of a dictionary among overrides."""
    from hydra._internal.grammar.utils import escape_special_characters

    return escape_special_characters(text)


def command_line_parser() -> "argparse.ArgumentParser":
    """The parser of Hydra's own flags, such as ``--config-name``."""
    from hydra._internal.utils import get_args_parser

    return get_args_parser()


@contextmanager
def shared_config_store() -> Iterator[None]:
    """Let all of Hydra's repositories share the store of structured configs.

    For each group that ``--help`` lists, and for each composition, Hydra makes a deep copy of the
    store, which takes most of the time of ``--help``. It needs none: `ConfigStore.load` returns
    copies of the nodes.
    """
    from hydra.core.config_store import ConfigStore

    if hasattr(ConfigStore, _COPY):
        yield
        return
    setattr(ConfigStore, _COPY, lambda self, _: self)
    try:
        yield
    finally:
        delattr(ConfigStore, _COPY)


def take_state() -> Callable[[], None] | None:
    """Take a copy of Hydra's process-wide objects and OmegaConf's resolvers.

    Returns:
        What puts them back, in this process or another; `None` if Hydra is not in use.
    """
    if "hydra" not in sys.modules:
        return None
    from hydra.core.singleton import Singleton

    pickled = {}
    for name, resolver in _resolvers().items():
        with suppress(Exception):  # one that cannot be pickled stays behind
            pickled[name] = bytes(cloudpickle.dumps(resolver))
    return functools.partial(_put_state, {**Singleton.get_state(), _RESOLVERS: {}}, pickled)


def _put_state(singletons: Any, resolvers: Mapping[str, bytes]) -> None:
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    global _plugins
    if _plugins is not None and _plugins[0] == sys.path:
        singletons["instances"][Plugins] = _plugins[1]  # or they are searched for again
    Singleton.set_state(singletons)
    _plugins = (list(sys.path), Plugins.instance())
    held = _resolvers()
    held.clear()
    held.update({name: pickle.loads(data) for name, data in resolvers.items()})


def _resolvers() -> MutableMapping[str, Any]:
    """The resolvers of OmegaConf by name, as it calls them."""
    from omegaconf.basecontainer import BaseContainer

    found: MutableMapping[str, Any] = BaseContainer._resolvers
    return found


_COPY = "__deepcopy__"
_RESOLVERS = "omegaconf_resolvers"
"""The resolvers in Hydra's state, which would have to be picklable one and all."""

_plugins: tuple[list[str], Any] | None = None
"""Hydra's, and the path where they were found."""
