"""The connection of a sweep to Ray, with errors that name the option at fault."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning_mgpu.errors import ConfigError, one_line
from lightning_mgpu.ray.connection import connected


@contextmanager
def connected_to_ray(options: Mapping[str, Any]) -> Iterator[None]:
    """Connect to Ray for the length of the block.

    Args:
        options: `hydra.sweeper.ray`, as `lightning_mgpu.ray.connection.connect` takes them.

    Raises:
        ConfigError: There is no such cluster, or Ray does not take the options.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(connected(options))
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"hydra.sweeper.ray: {one_line(error)}") from error
        yield
