"""A Ray of one's own for the length of a sweep, or a cluster that the user names."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from lightning_mgpu._compat.ray import files_in
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.ray.address import LOCAL, address_of, given, source_of
from lightning_mgpu.ray.cluster import reach, turn_authentication_on

QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


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
    address, directory = address_of(options), None
    arguments = {**QUIET, **given(options), "address": address}
    if address == LOCAL:
        directory = _short_directory()
        arguments = {"include_dashboard": False, **files_in(directory), **arguments}
    else:
        refuse_resources(options)
    try:
        with _environment():
            if directory is not None:
                turn_authentication_on()
            _init(source_of(options, "hydra.sweeper.ray.address"), arguments)
            try:
                yield
            finally:
                ray.shutdown()
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def _init(where: str, arguments: Mapping[str, Any]) -> None:
    try:
        reach(arguments["address"])
        ray.init(**arguments)
    except OSError as error:  # Ray's own is a ConnectionError
        raise ConfigError(
            f"{where}: no such cluster ({error})."
            " Start one with `ray start --head`, set RAY_AUTH_MODE=token if it wants a token, or"
            " have a private Ray by hydra.sweeper.ray.address=local."
        ) from error


def refuse_resources(options: Mapping[str, Any]) -> None:
    """Refuse to say what a cluster has that runs already."""
    for name in ("num_cpus", "num_gpus"):
        if options.get(name) is not None:
            raise ConfigError(
                f"hydra.sweeper.ray.{name}={options[name]}: what a cluster has is fixed where it is"
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
