"""Keys that exist only with some values of others."""

from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.space.space import Choice, Space, encode, name_of

_WHERE = "hydra.sweeper.conditions"


def add_conditions(space: Space, conditions: Any) -> None:
    """Have trials leave out keys unless others have one of the values that are named.

    A key that the command line gives one value has that in each trial.

    Args:
        space: All of it: keys that are searched or computed may depend on what is searched.
        conditions: Of each key, the others that it depends on, and the value of each with which
            it exists, or a list of them: ``{"optimizer.momentum": {"optimizer": "sgd"}}``; `None`
            for no condition.

    Raises:
        ConfigError: A key or a value that is not searched, or keys that depend on each other.
    """
    if conditions is None:
        return
    if not isinstance(conditions, Mapping):
        raise ConfigError(
            f"{_WHERE}={encode(conditions)}: expected keys with what they depend on, such as"
            " {momentum:{optimizer:sgd}}."
        )
    fixed = _fixed(space)
    for key, given in conditions.items():
        if not isinstance(given, Mapping) or not given:
            raise ConfigError(
                f"{_WHERE}: {key} has {encode(given)}; expected what it depends on, such as"
                f" {{{key}:{{optimizer:sgd}}}}."
            )
        name = name_of(key)
        if name in space.dimensions or name in space.computed:
            others = {name_of(other): (other, values) for other, values in given.items()}
            space.given |= {other: fixed[other] for other in others if other in fixed}
            space.conditions[name] = {
                name: _with(space, key, other, values) for name, (other, values) in others.items()
            }
        elif name not in fixed:
            raise _not_searched(space, key)
    for name in space.conditions:
        if name in _above(space, name):
            raise ConfigError(f"{_WHERE}: {name} depends on itself.")


def _with(space: Space, key: str, other: str, given: Any) -> frozenset[str]:
    """Values of `other`, encoded, with which `key` exists."""
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    named = list(map(encode, values))
    dimension = space.dimensions.get(name_of(other))
    if dimension is None:
        if name_of(other) not in space.given:
            raise _not_searched(space, other)
        return frozenset(named)
    if isinstance(dimension, Choice):
        known = list(map(encode, dimension.values))
    elif dimension.integer:
        known = list(map(encode, range(int(dimension.low), int(dimension.high) + 1)))
    else:
        raise ConfigError(
            f"{_WHERE}: {key} depends on {other}, an interval of real numbers. Name a choice or an"
            " integer, or compute the value by hydra.sweeper.custom_search_space."
        )
    for value in named:
        if value not in known:
            raise ConfigError(
                f"{_WHERE}: {key} exists with {other}={value}, which is not searched. Searched is"
                f" {other}={','.join(known)}."
            )
    return frozenset(named)


def _fixed(space: Space) -> dict[str, str]:
    """Values that are the same in every trial, encoded."""
    parsed = OverridesParser.create().parse_overrides(space.fixed)
    return {
        name_of(one.get_key_element()): encode(one.value())
        for one in parsed
        if not one.is_delete() and not one.is_sweep_override()
    }


def _above(space: Space, name: str) -> set[str]:
    """What a key depends on, and what that depends on."""
    above: set[str] = set()
    left = [name]
    while left:
        others = set(space.conditions.get(left.pop(), ())) - above
        above |= others
        left += others
    return above


def _not_searched(space: Space, key: str) -> ConfigError:
    return ConfigError(
        f"{_WHERE}: {key} is not searched. Searched are: {', '.join(space.dimensions)}."
    )
