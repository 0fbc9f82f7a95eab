"""Assign names of other packages without creating ones that nobody reads."""

from importlib.metadata import version
from typing import Any


def assign(owner: Any, name: str, value: Any, package: str) -> None:
    """Set an attribute that has to be there already.

    A plain assignment to a name that a release has dropped would change nothing, and not say so.

    Args:
        owner: A module, class or object of another package.
        name: The attribute.
        value: Its new value.
        package: Whose it is, as it is installed.

    Raises:
        AttributeError: There is no such attribute.
    """
    if not hasattr(owner, name):
        raise missing(f"`{name}` of {_described(owner)}", package)
    setattr(owner, name, value)


def missing(what: str, package: str) -> AttributeError:
    """The error for something that the installed release does not have.

    Args:
        what: The name, and whose it is.
        package: As it is installed.
    """
    return AttributeError(
        f"{package} {version(package)} no longer has {what}, which lightning_mgpu needs. Install a"
        f" release of {package} that lightning_mgpu was tested with (constraints.txt), or a later"
        " lightning_mgpu."
    )


def _described(owner: Any) -> str:
    return f"`{getattr(owner, '__name__', type(owner).__name__)}`"
