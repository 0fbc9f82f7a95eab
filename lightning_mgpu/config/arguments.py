"""Check a config node against the signature of the class or function it names."""

import collections.abc
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_mgpu.errors import ConfigError

# Hydra's own keys in a node; they are no arguments.
_INSTRUCTIONS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}


def accepted_keys(target: Callable[..., Any]) -> set[str] | None:
    """The keyword arguments `target` takes by name; `None` if it takes any."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def check_arguments(node: DictConfig, target: Callable[..., Any], path: str) -> None:
    """Check the names and plain types of a node's arguments.

    Types are checked as far as `int`, `float`, `bool`, `str`, paths, `Literal`, sequences,
    mappings and unions of them go; everything else is left to `target`.

    Args:
        node: A config node with `_target_`.
        target: What `_target_` names.
        path: Where the node stands, for the message.

    Raises:
        ConfigError: An argument is unknown to `target` or has the wrong type.
    """
    known = accepted_keys(target)
    hints = _type_hints(target)
    optional = _none_by_default(target)
    for key in node:
        name = str(key)
        if name in _INSTRUCTIONS:
            continue
        if known is not None and name not in known:
            raise ConfigError(
                f"{path}.{name}: {describe(target)} has no argument `{name}`."
                f"{_suggestion(name, known)}"
            )
        value = node[key]
        if value is None and name in optional:
            continue  # `size: int = None`, as many write it
        if name in hints and not _fits(value, hints[name]):
            raise ConfigError(
                f"{path}.{name}={OmegaConf.to_container(value) if _is_config(value) else value}:"
                f" {describe(target)} expects"
                f" {_words(hints[name])}{_instead(value, hints[name])}."
            )


def describe(target: Callable[..., Any]) -> str:
    """Name of a class or function as a user would write it."""
    return f"`{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', target)}`"


def _suggestion(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" It takes: {', '.join(sorted(known - {'self'}))}." if known else ""


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = inspect.getattr_static(target, "__init__") if isinstance(target, type) else target
    try:
        return typing.get_type_hints(function)
    except Exception:  # a forward reference to something not imported at run time
        return {}


def _none_by_default(target: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {parameter.name for parameter in parameters if parameter.default is None}


def _is_config(value: Any) -> bool:
    return isinstance(value, (DictConfig, ListConfig))


def _fits(value: Any, hint: Any) -> bool:
    """Return whether `value` may be passed for the type `hint`; `True` if in doubt."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if value is None:
        return hint in (None, type(None), Any, object)
    if isinstance(value, DictConfig):
        is_mapping = _is_subclass(origin or hint, Mapping)
        return "_target_" in value or is_mapping or not _is_plain(hint)
    if isinstance(value, ListConfig):
        kind = origin or hint
        if _is_subclass(kind, collections.abc.Iterable) and kind is not str:
            element = arguments[0] if len(arguments) == 1 else Any
            return all(_fits(item, element) for item in value)
        return not _is_plain(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if _is_subclass(origin or hint, PathLike):
        return isinstance(value, str)
    # A plain value for some class: only what is plainly a container or nothing can be ruled out.
    return not _is_subclass(origin, (Mapping, collections.abc.Sequence)) and hint is not type(None)


def _is_plain(hint: Any) -> bool:
    return hint in (int, float, bool, str, type(None)) or _is_subclass(hint, PathLike)


def _is_subclass(kind: Any, parent: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, parent)


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(argument) for argument in get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("collections.abc.", "").replace("typing.", "")


def _instead(value: Any, hint: Any) -> str:
    # Of a list of values the type of a wrong one says nothing.
    return "" if "Literal[" in str(hint) else f", not {_kind(value)}"


def _kind(value: Any) -> str:
    """Name of a value's type, as `_words` gives it."""
    if value is None:
        return "null"
    if isinstance(value, DictConfig):
        return "dict"
    if isinstance(value, ListConfig):
        return f"list[{' | '.join(dict.fromkeys(_kind(item) for item in value))}]"
    return type(value).__name__
