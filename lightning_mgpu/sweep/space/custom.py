"""Search space extended by a user's function."""

import importlib
from collections.abc import Mapping

from omegaconf import DictConfig

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.space.space import Choice, Interval, Space, parse_space


def add_custom(space: Space, function_name: str, cfg: DictConfig) -> None:
    """Let a user's function extend or replace the space.

    It is called with the config and the dimensions by name, and returns a dict: of a key to a
    sweep as it would be written on the command line (``"interval(0, 1)"``), to a list of choices,
    or to a function of the values drawn so far, which computes this one.

    Raises:
        ConfigError: The function cannot be found, or returns something else.
    """
    where = f"hydra.sweeper.custom_search_space={function_name}"
    module, _, name = function_name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}: cannot be imported ({error}). Give module.function."
        ) from error
    returned = function(cfg, dict(space.dimensions))
    if not isinstance(returned, Mapping):
        raise ConfigError(f"{where}: returned {type(returned).__name__}; a dict is expected.")
    for key, value in returned.items():
        if callable(value):
            space.compute(key, value)
        elif isinstance(value, (Choice, Interval)):
            space.add(key, value)
        elif isinstance(value, (list, tuple)):
            space.add(key, Choice(tuple(value)))
        else:
            written = parse_space({key: value}, [])
            for override in written.fixed:
                space.fix(key, override)
            for dimension in written.dimensions.values():
                space.add(key, dimension)
