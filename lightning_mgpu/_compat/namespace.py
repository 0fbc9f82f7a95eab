"""Which of Lightning's two packages a program uses: `lightning` or `pytorch_lightning`.

Both hold the same code, with classes of their own that refuse each other's objects. This package
works with one of the two in a process, and decides which when it first needs it:

1. what a Trainer is of that asks for one of our strategies by its name, or what the program has
   chosen that started this process;
2. the environment variable ``LIGHTNING_MGPU_NAMESPACE``;
3. what the module imports that imports ours (a sorted block of imports has ours first);
4. what has been imported first;
5. `lightning`.

Nothing of Lightning is imported here before it is asked for.
"""

import dis
import importlib
import os
import sys
from dataclasses import dataclass

from lightning_mgpu._compat import ray_namespace

VARIABLE = "LIGHTNING_MGPU_NAMESPACE"
_US = ("lightning_mgpu", "hydra_plugins")


@dataclass(frozen=True)
class Namespace:
    """One of the two packages.

    Attributes:
        name: As `VARIABLE` has it, and the package's name in its loggers.
        pytorch: The module with the Trainer.
        fabric: The module beneath.
    """

    name: str
    pytorch: str
    fabric: str

    def module(self, path: str) -> str:
        """The full name of a module given as ``pytorch.callbacks`` or ``fabric.plugins``."""
        part, dot, rest = path.partition(".")
        return {"pytorch": self.pytorch, "fabric": self.fabric}[part] + dot + rest

    def translate(self, name: str, other: "Namespace") -> str:
        """What a name of this package is called in `other`; any other name is as it was."""
        for own, theirs in ((self.pytorch, other.pytorch), (self.fabric, other.fabric)):
            if f"{name}.".startswith(f"{own}."):
                return theirs + name.removeprefix(own)
        return name

    def is_imported(self) -> bool:
        """Whether this process has imported it, and not the other one under its name."""
        module = sys.modules.get(self.pytorch)
        return module is not None and module.__name__ == self.pytorch

    def holds(self, module: str) -> bool:
        """Whether a module of that name is part of it."""
        return any(f"{module}.".startswith(f"{own}.") for own in (self.pytorch, self.fabric))


LIGHTNING = Namespace("lightning", "lightning.pytorch", "lightning.fabric")
PYTORCH_LIGHTNING = Namespace("pytorch_lightning", "pytorch_lightning", "lightning_fabric")
BOTH = (LIGHTNING, PYTORCH_LIGHTNING)

PACKAGES = ("lightning", "lightning_fabric", "pytorch_lightning")
"""The top-level packages whose code is Lightning's and not the user's."""

_chosen: Namespace | None = None
_reason = ""
_preloaded: Namespace | None = None


def current() -> Namespace:
    """The namespace of this process; decided now, if it has not been.

    Raises:
        ValueError: The environment variable has another value.
    """
    if _chosen is None:
        found = _by_variable() or _by_driver() or _by_importer() or _by_order()
        choose(*(found or (LIGHTNING, "by default")))
    assert _chosen is not None
    return _chosen


def choose(namespace: Namespace, reason: str) -> None:
    """Decide for a namespace.

    Args:
        namespace: Which.
        reason: For an error message, should the program turn out to use the other as well.

    Raises:
        TypeError: This process has decided for the other.
    """
    global _chosen, _reason
    if _chosen is None:
        _chosen, _reason = namespace, reason
        ray_namespace.tell(namespace.name)
    elif _chosen is not namespace:
        raise TypeError(
            f"lightning_mgpu works with one namespace of Lightning in a process, which is"
            f" `{_chosen.name}` here ({_reason}), and not with `{namespace.name}` as well. Import"
            f" all from one of them, or set {VARIABLE}={namespace.name} in the environment."
        )


def decided() -> Namespace | None:
    """The namespace, if this process has decided, or whoever has set the environment variable."""
    given = _by_variable()
    return _chosen or (given[0] if given else None)


def known() -> Namespace | None:
    """The namespace as far as it is certain: decided, or the only one that has been imported."""
    imported = _imported()
    return decided() or (imported[0] if len(imported) == 1 else None)


def known_name() -> str | None:
    """The name of `known`, for another process to `take_over`."""
    namespace = known()
    return None if namespace is None else namespace.name


def take_over(name: str) -> None:
    """Decide as the process has decided that started this one."""
    choose(named(name), "as in the process that started this one")


def reason() -> str:
    """Why this process has decided as it has."""
    return _reason


def describe() -> str:
    """The namespace of this process; if the other is in use as well, how to decide for that."""
    namespace = current()
    for other in BOTH:
        if other is not namespace and other.is_imported():
            return (
                f"`{namespace.pytorch}` ({_reason}; {VARIABLE}={other.name} in the environment"
                " decides for the other)"
            )
    return f"`{namespace.pytorch}`"


def of_type(kind: type) -> Namespace | None:
    """The namespace from which a class derives; `None` if from neither."""
    for base in kind.__mro__:
        for namespace in BOTH:
            if namespace.holds(base.__module__):
                return namespace
    return None


def named(name: str) -> Namespace:
    """The namespace of that name."""
    for namespace in BOTH:
        if namespace.name == name:
            return namespace
    raise ValueError(f"{VARIABLE}={name}: expected one of {', '.join(n.name for n in BOTH)}.")


def preload(name: str | None = None) -> None:
    """Import Lightning in a process that waits for work.

    Args:
        name: What the work is known to need, which is a choice. Otherwise `lightning` is imported,
            and whatever the work imports besides counts as the first.
    """
    global _preloaded
    if name is not None:
        take_over(name)
    elif _chosen is None and not _imported():
        _preloaded = LIGHTNING
    importlib.import_module((_chosen or LIGHTNING).pytorch)


def _by_variable() -> tuple[Namespace, str] | None:
    value = os.environ.get(VARIABLE)
    return (named(value), f"{VARIABLE} says so") if value else None


def _by_driver() -> tuple[Namespace, str] | None:
    name = ray_namespace.told()
    return (named(name), "as in the driver of this Ray job") if name else None


def _by_importer() -> tuple[Namespace, str] | None:
    """What the nearest caller outside of this package imports, now or later, if only one."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] in _US:
            continue
        packages = {
            str(instruction.argval).partition(".")[0]
            for instruction in dis.get_instructions(frame.f_code)
            if instruction.opname == "IMPORT_NAME"
        }
        found = [namespace for namespace in BOTH if namespace.name in packages]
        if len(found) == 1:
            return found[0], f"`{module}` imports it"
    return None


def _by_order() -> tuple[Namespace, str] | None:
    imported = _imported()
    return (imported[0], "it was imported first") if imported else None


def _imported() -> list[Namespace]:
    """What has been imported, in that order, less what only `preload` has."""
    places = {name: place for place, name in enumerate(list(sys.modules))}
    found = [each for each in BOTH if each.is_imported() and each is not _preloaded]
    return sorted(found, key=lambda namespace: places[namespace.pytorch])
