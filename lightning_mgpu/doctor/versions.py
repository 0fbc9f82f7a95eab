"""Versions of Python and of packages, read from their metadata: nothing is imported."""

import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lightning_mgpu._version import __version__
from lightning_mgpu.doctor.finding import Finding, bad, ok, warn

_NAME = "lightning_mgpu"
# Uploaded to PyPI on 2026-04-30 by an attacker. Importing them is what runs their code.
_MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}
_EXTRAS = ("ray", "search", "report")  # for use; the others are for work on this package
_VARIABLES = ("CUDA_", "GLOO_", "NCCL_", "OMP_NUM_THREADS", "HIP_", "ROCR_", "PYTORCH_")


def is_malicious(name: str) -> bool:
    """Return whether the installed release of a package is known to be malicious."""
    return _version(name) in _MALICIOUS.get(name, ())


def python() -> Iterator[Finding]:
    """Python's version, against what the package supports, and the system."""
    found = f"{platform.python_version()} on {platform.platform()}, {sys.executable}"
    wanted = metadata.metadata(_NAME)["Requires-Python"] if _is_installed() else None
    if wanted and not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield bad("python", found, f"Use a Python {wanted}.")
    elif sys.platform != "linux":
        yield warn("python", found, "Only Linux is tested.")
    else:
        yield ok("python", found)


def packages() -> Iterator[Finding]:
    """Each package that is needed, against the bounds of our own metadata."""
    yield ok(_NAME, __version__)
    for name in _MALICIOUS:
        if is_malicious(name):
            yield bad(
                name,
                f"{name} {_version(name)} is a malicious release",
                f"Do not import it. `pip uninstall {name}`, and treat every password, key and token"
                " on this machine as stolen: replace them.",
            )
    if not _is_installed():
        yield warn(
            "bounds",
            f"{_NAME} has no metadata here, so that versions cannot be compared",
            f"Install it: `pip install -e .` in its directory, or `pip install {_NAME}`.",
        )
    lacking = []
    for text in metadata.requires(_NAME) or () if _is_installed() else ():
        requirement = Requirement(text)
        extra = _extra(requirement)
        if requirement.name == _NAME or is_malicious(requirement.name) or extra is None:
            continue
        version = _version(requirement.name)
        if version is None and extra:
            lacking.append(f"{requirement.name} [{extra}]")
        else:
            yield _judged(requirement, version)
    if lacking:
        yield ok("optional", f"not installed: {', '.join(lacking)}")


def variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Environment variables that change what devices and ranks do."""
    found = [f"{name}={environment[name]}" for name in sorted(environment) if _matters(name)]
    yield ok("variables", " ".join(found) or "none of CUDA, NCCL, gloo or OpenMP is set")


def _matters(name: str) -> bool:
    return name.startswith(_VARIABLES)


def _judged(requirement: Requirement, version: str | None) -> Finding:
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return bad(requirement.name, "not installed", f"`pip install '{wanted}'`")
    if not requirement.specifier.contains(version, prereleases=True):
        return bad(requirement.name, f"{version}, not {requirement.specifier}", _install(wanted))
    return ok(requirement.name, version)


def _install(wanted: str) -> str:
    return f"`pip install '{wanted}'`: other releases are not tried, or known not to work."


def _extra(requirement: Requirement) -> str | None:
    """The extra that a requirement is of: empty if it is always needed, `None` if not for here."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return ""
    return _first(extra for extra in _EXTRAS if requirement.marker.evaluate({"extra": extra}))


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)


def _is_installed() -> bool:
    return _version(_NAME) is not None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
