"""Private names of Ray; those of Ray Tune are in `ray_tune`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.util.client
from ray.exceptions import OutOfMemoryError

from lightning_mgpu._compat.release import assign, missing

HEAD = "node:__internal_head__"
"""A resource that the cluster's first node has, and no other one."""

_DEATHS = re.compile(r"A worker died or was killed|worker\(s\) were killed due to")
_OF_GROUP = "_group_"
_OF_MACHINE = re.compile(r"was ([\d.]+ ?GB) used / ([\d.]+ ?GB) limit")
_OF_PROCESS = re.compile(r"actual memory used=([\d.]+ ?GB)")


def of_group(resource: str, group: str) -> str:
    """The name under which tasks of a placement group reserve a resource.

    Args:
        resource: Its name elsewhere, such as ``CPU``.
        group: The group's id in hexadecimal digits.
    """
    return f"{resource}{_OF_GROUP}{group}"


def is_of_group(resource: str) -> bool:
    """Return whether a resource is a placement group's own."""
    return _OF_GROUP in resource


def files_in(directory: str | Path | None) -> dict[str, Any]:
    """The argument of `ray.init` that says where a cluster keeps its files; `None`: where it will.

    `ray.init` refuses arguments that it does not know.
    """
    return {"_temp_dir": None if directory is None else str(directory)}


def read_token_mode() -> None:
    """Have Ray read ``RAY_AUTH_MODE=token``, where it was set after Ray was imported.

    Raises:
        RuntimeError: It has not.
        AttributeError: This release of Ray reads it in another way.
    """
    native: Any = ray._raylet
    for name in ("Config", "AuthenticationMode", "get_authentication_mode"):
        if not hasattr(native, name):
            raise missing(f"`ray._raylet.{name}`", "ray")
    native.Config.initialize("")
    if native.get_authentication_mode() != native.AuthenticationMode.TOKEN:
        raise RuntimeError(
            f"Ray {ray.__version__} takes no notice of RAY_AUTH_MODE=token once it is imported, and"
            " a cluster without it would obey anybody who reaches its ports. Set RAY_AUTH_MODE"
            " before the program starts: `token`, or `disabled` if that is no concern here."
        )


def is_client() -> bool:
    """Return whether this process is connected through Ray Client, from outside the cluster."""
    return bool(ray.util.client.ray.is_connected())


def actor_id(actor: Any) -> str:
    """The id of an actor in hexadecimal digits.

    Args:
        actor: Its handle.
    """
    found: str = actor._actor_id.hex()
    return found


def cluster_state() -> Any:
    """The autoscaler's state: nodes and pending requests (`ClusterResourceState`).

    Raises:
        ImportError, AttributeError: This release of Ray says it elsewhere.
    """
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    private: Any = vars(ray)["_private"]
    return get_cluster_resource_state(private.worker.global_worker.gcs_client)


def report_directory(callback: Any) -> str:
    """Directory where a `ray.train.lightning.RayTrainReportCallback` keeps unstored checkpoints.

    Args:
        callback: The callback.
    """
    return str(callback.tmpdir_prefix)


def memory_of(error: OutOfMemoryError) -> str | None:
    """What was used when Ray's memory monitor killed a process; `None` if its error does not tell.

    Args:
        error: Ray's, with a screenful of text.
    """
    text = str(error)
    machine, processes = _OF_MACHINE.search(text), _OF_PROCESS.findall(text)
    if machine is None:
        return None
    own = f", {processes[0]} of it by this trial" if len(processes) == 1 else ""
    return f"{machine[1]} of {machine[2]} used{own}"


@contextmanager
def deaths_unprinted() -> Iterator[None]:
    """Keep Ray from printing a screenful for each process that dies, of which errors tell, too."""
    worker: Any = vars(ray)["_private"].worker
    show = worker.print_to_stdstream

    def show_others(data: dict[str, Any], ignore_prefix: bool) -> None:
        if data["pid"] != "raylet" or not any(map(_DEATHS.search, data["lines"])):
            show(data, ignore_prefix)

    assign(worker, "print_to_stdstream", show_others, "ray")
    try:
        yield
    finally:
        worker.print_to_stdstream = show
