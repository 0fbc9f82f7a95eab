"""Ports and names, by which ranks find each other."""

import os
import socket
from collections.abc import Iterator, Mapping

from lightning_mgpu.doctor.finding import Finding, bad, ok, warn

_LOOPBACK = "127.0.0.1"
_SECONDS = 3.0


def ports(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """A connection over a free port of this machine, and the port that ranks are told to use."""
    try:
        with socket.create_server((_LOOPBACK, 0)) as server:
            address = server.getsockname()
            socket.create_connection(address, _SECONDS).close()
    except OSError as error:
        advice = "Ranks cannot find each other. A firewall or the container forbids it."
        yield bad("ports", f"no connection over {_LOOPBACK}: {error}", advice)
        return
    port = environment.get("MASTER_PORT")
    if port is not None and not _is_free(port):
        advice = "Unset it, or choose another: another program has it, maybe an earlier run."
        yield bad("ports", f"MASTER_PORT={port} cannot be used", advice)
    else:
        yield ok("ports", f"connected over {_LOOPBACK}:{address[1]}")


def host_name() -> Iterator[Finding]:
    """The address of this machine's own name, which gloo and Ray look up."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield warn(
            "host name",
            f"{name} has no address: {error}",
            f"gloo and Ray may choose a wrong network. Add `{_LOOPBACK} {name}` to /etc/hosts.",
        )
    else:
        yield ok("host name", f"has the address {address}")


def _is_free(port: str) -> bool:
    try:
        socket.create_server((_LOOPBACK, int(port))).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
