"""Hydra's plugin, configs, and Ray. These checks run apart."""

import socket
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module, resources
from importlib.util import find_spec

from lightning_mgpu.doctor.finding import Finding, bad, ok, warn
from lightning_mgpu.errors import one_line
from lightning_mgpu.ray.address import LOCAL, is_client

_SECONDS = 3.0
_SWEEPER = "RayTuneSweeper"
_AGAIN = "Install the package again: `pip install --force-reinstall --no-deps lightning_mgpu`"


def plugin() -> Iterator[Finding]:
    """Whether Hydra finds the sweeper by itself."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.sweeper import Sweeper

    try:
        with warnings.catch_warnings(record=True) as caught:  # of plugins that lack a package
            warnings.simplefilter("always")
            names = sorted(found.__name__ for found in Plugins.instance().discover(Sweeper))
    except Exception as error:
        file = traceback.extract_tb(error.__traceback__)[-1].filename
        yield bad(
            "hydra plugin",
            f"{type(error).__name__}: {one_line(error, 300)}",
            f"No Hydra application starts. Mend or uninstall the plugin: {file}",
        )
        return
    for warning in caught:
        if "hydra_plugins" in str(warning.message):
            text = " ".join(str(warning.message).split())
            yield warn("hydra plugin", text, "Install what it lacks, or uninstall it.")
    if _SWEEPER in names:
        yield ok("hydra plugin", f"sweepers: {', '.join(names)}")
    else:
        yield bad("hydra plugin", f"Hydra finds {', '.join(names)}, not {_SWEEPER}", f"{_AGAIN}.")


def configs(package: str = "lightning_mgpu.conf") -> Iterator[Finding]:
    """The YAML files of the command's groups."""
    folder = resources.files(package)
    groups = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and any(file.name.endswith(".yaml") for file in entry.iterdir())
    )
    if (folder / "config.yaml").is_file() and "strategy" in groups:
        yield ok("configs", f"groups: {', '.join(groups)}")
    else:
        yield bad("configs", f"{package} has only the groups {groups}", f"{_AGAIN}.")


def ray(source: str, address: str) -> Iterator[Finding]:
    """Whether Ray can be imported, and its cluster be reached.

    Args:
        source: Where the address was set, such as ``ray.address=auto``.
        address: The address, or ``local``.
    """
    if find_spec("ray") is None:
        if address != LOCAL:
            yield bad("ray", f"not installed, but {source}", "`pip install 'lightning_mgpu[ray]'`")
        else:
            yield ok("ray", "not installed: needed for `+strategy=ray` and sweeps only")
        return
    try:
        version = import_module("ray").__version__
    except Exception as error:
        text = f"{type(error).__name__}: {one_line(error, 300)}"
        yield bad("ray", text, "Install it anew: `pip install --force-reinstall 'ray[train,tune]'`")
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        where = "`+strategy=ray` starts one of its own" if address == LOCAL else source
        yield ok("ray", f"{version}; {where}")
        return
    try:
        socket.create_connection((host, int(port)), _SECONDS).close()
    except OSError as error:
        start = "its Ray Client server" if is_client(address) else "`ray start --head`"
        yield bad("ray", f"{version}; {source}: {error}", f"Is {start} running there? Or unset it.")
    else:
        yield ok("ray", f"{version}; {source} answers")
