"""How a trial whose strategy is one of Lightning's starts its other ranks."""

from typing import Any, NoReturn

from lightning_mgpu._compat.after_import import when_imported
from lightning_mgpu._compat.lightning_launchers import replace_launchers
from lightning_mgpu._compat.namespace import BOTH, Namespace, choose


class LauncherRefusedError(RuntimeError):
    """A strategy would start processes that are no part of the trial."""


def take_over_launches() -> None:
    """Launch ranks by our pool in this process, which serves trials only, from now on.

    Lightning runs the command line again for each of them (``ddp``), which is that of the sweep, or
    starts all of them in processes that the trial cannot report from (``ddp_spawn``).
    """
    for namespace in BOTH:
        when_imported(namespace, _take_over)


def _take_over(namespace: Namespace) -> None:
    def configure(strategy: Any) -> None:
        choose(namespace, "the trial trains with a strategy of it")
        from lightning_mgpu.strategies.pooled import launch_by_pool

        launch_by_pool(strategy)

    replace_launchers(namespace, configure, _refuse)


def _refuse(name: str) -> NoReturn:
    raise LauncherRefusedError(
        f"{name} on several devices: it runs the command line again for each of them, which in a"
        " trial is that of the sweep. Use a Trainer with `strategy='mgpu_ddp'`"
        " (trainer.strategy=mgpu_ddp), or one device (trainer.devices=1)."
    )
