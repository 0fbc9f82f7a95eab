"""What Hydra and OmegaConf have no public name for. Imports neither until it is called."""

import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

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


def resolvers() -> MutableMapping[str, Any]:
    """The resolvers of OmegaConf by name, as it calls them; may be changed."""
    from omegaconf.basecontainer import BaseContainer

    found: MutableMapping[str, Any] = BaseContainer._resolvers
    return found


def singletons() -> Any:
    """Hydra's process-wide objects but for the plugins, for `set_singletons` of a process."""
    from hydra.core.singleton import Singleton

    return Singleton.get_state()


def set_singletons(state: Any) -> None:
    """Take over the singletons of another process, or of an earlier time.

    Plugins are searched for, which takes a while, where `sys.path` is another than the last time.
    """
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    global _plugins
    if _plugins is not None and _plugins[0] == sys.path:
        state["instances"][Plugins] = _plugins[1]
    Singleton.set_state(state)
    _plugins = (list(sys.path), Plugins.instance())


_plugins: tuple[list[str], Any] | None = None
"""Hydra's, and the path where they were found."""
