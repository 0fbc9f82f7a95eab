"""A Ray of one's own for the length of a sweep, or a cluster that the user names."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.ray.cluster import turn_authentication_on

__all__: list[str] = []


@contextlib.contextmanager
def connected(options: Mapping[str, Any]) -> Iterator[None]:
    """Ray for the length of the block; one that runs in this process already is used as it is.

    Args:
        options: Arguments of `ray.init`. The address ``local`` is a private Ray, whatever else
            runs on the machine; its files go with it. Without one: ``RAY_ADDRESS``, or ``local``.
    """
    if ray.is_initialized():
        yield
        return
    given = {name: value for name, value in options.items() if value is not None}
    given.setdefault("address", os.environ.get("RAY_ADDRESS") or "local")
    directory = None
    if given.get("address") == "local":
        directory = _short_directory()
        given = {"include_dashboard": False, "_temp_dir": str(directory), **given}
    else:
        _refuse_resources(given)
    try:
        with _environment():
            if directory is not None:
                turn_authentication_on()
            ray.init(**{"log_to_driver": False, "logging_level": "ERROR", **given})
            try:
                yield
            finally:
                ray.shutdown()
    except ConnectionError as error:
        raise ConfigError(
            f"hydra.sweeper.ray.address={given.get('address')}: no such cluster ({error})."
            " Start one with `ray start --head`, set RAY_AUTH_MODE=token if it wants a token, or"
            " leave the address away for a private Ray."
        ) from error
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def _refuse_resources(given: Mapping[str, Any]) -> None:
    for name in ("num_cpus", "num_gpus"):
        if name in given:
            raise ConfigError(
                f"hydra.sweeper.ray.{name}={given[name]}: what a cluster has is fixed where it is"
                " started. Leave it out, or the address."
            )


def _short_directory() -> Path:
    where = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="ray-", dir=where if len(where) < 20 else "/tmp"))


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """`ray.init` reads and leaves variables."""
    before = dict(os.environ)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
