"""Arguments of `ray.init` as users give them, and where the address among them leads."""

import os
import sys
from collections.abc import Mapping
from typing import Any

LOCAL = "local"
_CLIENT = "ray://"
_VARIABLE = "RAY_ADDRESS"


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say something: what is `None`, there or further in, is a default."""
    inner = {
        name: given(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
    }
    return {name: value for name, value in inner.items() if value is not None and value != {}}


def address_of(options: Mapping[str, Any]) -> str:
    """The address among them; else ``RAY_ADDRESS``, as ``ray job submit`` sets it; else ``local``.

    ``local`` is a Ray that is started on this machine, whatever else runs there.
    """
    return str(options.get("address") or _in_environment() or LOCAL)


def source_of(options: Mapping[str, Any], key: str) -> str:
    """What has named that address: ``key=address``, or the variable."""
    where = key if options.get("address") or not _in_environment() else _VARIABLE
    return f"{where}={address_of(options)}"


def _in_environment() -> str | None:
    address = os.environ.get(_VARIABLE)
    # That of a dashboard is for `ray job submit` itself.
    return None if address is None or address.startswith("http") else address


def is_client(address: str) -> bool:
    """Whether it is used through Ray Client, by a machine that is no part of the cluster."""
    return address.startswith(_CLIENT)


def is_connected_as_client() -> bool | None:
    """Whether the connection that this process has is such a one; `None` if it has none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from lightning_mgpu._compat import ray as compat

    return compat.is_client()
