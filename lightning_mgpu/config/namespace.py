"""Lightning's classes in a config, from whichever of its two packages the run uses.

Configs name them as ``lightning.pytorch.callbacks.ModelCheckpoint`` and the like.
"""

import contextlib
import copy
import pkgutil
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

from lightning_mgpu._compat.namespace import (
    LIGHTNING,
    VARIABLE,
    choose,
    current,
    decided,
    of_type,
    reason,
)


def follow_model(cfg: DictConfig) -> None:
    """Decide for the package that the config's model derives from, unless one is decided."""
    model = cfg.get("model")
    if decided() is not None or not isinstance(model, DictConfig):
        return
    with contextlib.suppress(Exception):  # whoever builds it will say what is wrong
        name = str(model._target_)
        target = pkgutil.resolve_name(name)
        namespace = of_type(target) if isinstance(target, type) else None
        if namespace is not None:
            choose(namespace, f"{name} derives from it")


def translated(node: DictConfig) -> DictConfig:
    """A node with the names that Lightning's classes have in the package in use."""
    if current() is LIGHTNING:
        return node
    node = copy.deepcopy(node)
    with read_write(node), open_dict(node):
        _translate(node)
    return node


def hint(kind: type) -> str:
    """How an object of the other package could be used; empty if `kind` is of neither."""
    theirs, ours = of_type(kind), current()
    if theirs in (None, ours):
        return ""
    assert theirs is not None
    return (
        f"; it derives from `{theirs.name}`, whose classes are others than those of `{ours.name}`,"
        f" which this run uses ({reason()}). Take model, data and callbacks from one of the two;"
        f" {VARIABLE}={theirs.name} in the environment decides for the other"
    )


def _translate(node: Any) -> None:
    if isinstance(node, DictConfig):
        keys: list[Any] = list(node)
    elif isinstance(node, ListConfig):
        keys = list(range(len(node)))
    else:
        return
    within: Any = node
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if key == "_target_":
            within[key] = LIGHTNING.translate(str(within[key]), current())
        else:
            _translate(within[key])
