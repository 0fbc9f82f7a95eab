"""Arguments of `ray.init`, and the cluster address among them."""

import os
import sys
from collections.abc import Mapping
from typing import Any

LOCAL = "local"
_CLIENT = "ray://"
_VARIABLE = "RAY_ADDRESS"


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop arguments that are `None`, also nested ones: they are defaults."""
    inner = {
        name: given(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
    }
    return {name: value for name, value in inner.items() if value is not None and value != {}}


def address_of(options: Mapping[str, Any]) -> str:
    """Address to connect to: the option, else ``RAY_ADDRESS``, else ``local``.

    ``local`` is a Ray that is started on this machine, whatever else runs there.
    """
    return str(options.get("address") or _in_environment() or LOCAL)


def source_of(options: Mapping[str, Any], key: str) -> str:
    """Name of the address's source: ``key=address``, or the environment variable."""
    where = key if options.get("address") or not _in_environment() else _VARIABLE
    return f"{where}={address_of(options)}"


def _in_environment() -> str | None:
    address = os.environ.get(_VARIABLE)
    # That of a dashboard is for `ray job submit` itself.
    return None if address is None or address.startswith("http") else address


def is_client(address: str) -> bool:
    """Return whether an address is used through Ray Client, from outside the cluster."""
    return address.startswith(_CLIENT)


def is_connected_as_client() -> bool | None:
    """Return whether this process is connected by Ray Client; `None` if not connected."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from lightning_mgpu._compat import ray as compat

    return compat.is_client()
