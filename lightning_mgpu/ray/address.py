"""Arguments of `ray.init` as users give them, and where the address among them leads."""

import os
import sys
from collections.abc import Mapping
from typing import Any

__all__: list[str] = []

LOCAL = "local"
_CLIENT = "ray://"


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
    return str(options.get("address") or os.environ.get("RAY_ADDRESS") or LOCAL)


def is_client(address: str) -> bool:
    """Whether this machine is no part of the cluster, but uses it through Ray Client."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():  # then that connection is used
        return bool(ray.util.client.ray.is_connected())
    return address.startswith(_CLIENT)
