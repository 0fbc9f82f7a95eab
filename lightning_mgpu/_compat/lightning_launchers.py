"""Who starts the other ranks of Lightning's own strategies."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from lightning_mgpu._compat.lightning_attributes import assign
from lightning_mgpu._compat.namespace import Namespace


def replace_launchers(
    namespace: Namespace,
    configure: Callable[[Any], None],
    refuse: Callable[[str], None],
) -> None:
    """Keep Lightning's strategies from starting processes of their own, from now on.

    Args:
        namespace: Of which package.
        configure: Given a DDP strategy of any kind, gives it a launcher.
        refuse: Called with the name of any other strategy before that starts processes; raises.
    """
    strategies = importlib.import_module(namespace.module("pytorch.strategies"))
    original = strategies.DDPStrategy._configure_launcher

    def _configure_launcher(self: Any) -> None:
        if isinstance(self, strategies.DeepSpeedStrategy):
            original(self)
        else:
            configure(self)

    assign(strategies.DDPStrategy, "_configure_launcher", _configure_launcher)
    for module in ("pytorch.strategies.launchers", "fabric.strategies.launchers"):
        launchers = importlib.import_module(namespace.module(module))
        _guard(launchers._SubprocessScriptLauncher, refuse)


def set_start_method(strategy: Any, method: str) -> None:
    """Set how a DDP strategy starts its processes; ``"popen"`` is as any other process."""
    assign(strategy, "_start_method", method)


def configure_launcher(strategy: Any) -> None:
    """Have a strategy make its launcher, as the Trainer does."""
    strategy._configure_launcher()


def _guard(launcher: Any, refuse: Callable[[str], None]) -> None:
    """Call `refuse` where a launcher is about to start processes."""
    launch = launcher.launch

    @functools.wraps(launch)
    def guarded(self: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_alone = self.num_processes * self.num_nodes == 1
        if not is_alone and not self.cluster_environment.creates_processes_externally:
            trainer = kwargs.get("trainer")
            refuse("Fabric" if trainer is None else type(trainer.strategy).__name__)
        return launch(self, function, *args, **kwargs)

    assign(launcher, "launch", guarded)
