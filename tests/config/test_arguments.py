"""Which values pass for which annotations, and how a refusal reads."""

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from lightning_mgpu.config.arguments import accepted_keys, check_arguments, describe
from lightning_mgpu.errors import ConfigError


def _check(value: Any, hint: Any) -> None:
    """Check `value`, as it comes from a config, against an argument annotated with `hint`."""

    def target(x: Any) -> None: ...

    target.__annotations__["x"] = hint
    check_arguments(OmegaConf.create({"_target_": "target", "x": value}), target, "node")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int),
        (3, float),  # as Python itself counts
        (3.0, float),
        (True, bool),
        ("a", str),
        (None, None),
        (None, Any),
        (None, object),
        (None, int | None),
        (None, Optional[int]),  # noqa: UP045
        (3, Union[int, str]),  # noqa: UP007
        ("auto", int | str),
        ("min", Literal["min", "max"]),
        (None, Literal["a"] | None),
        ("dir", Path),
        ("dir", PathLike),
        ("dir", str | Path),
        ("dir", PathLike[str]),
        ([1, 2], Sequence[int]),
        ([], list[int]),
        ([1, 2], list),
        ([1, 2], tuple[int, int]),
        ([1, "a"], list[int | str]),
        ([1, 2.5], Iterable[float]),
        ([[1, 2], [3]], Sequence[Sequence[int]]),
        ([1, 2], list[int] | str | int),
        ([1], Any),
        ({"a": 1}, dict[str, int]),
        ({"a": 1}, Mapping[str, Any]),
        ({"a": 1}, dict),
        ({"a": 1}, Any),
        ({"minutes": 1}, str | timedelta | dict[str, int]),
        ({"_target_": "torch.nn.ReLU"}, torch.nn.Module),
        ({"_target_": "builtins.int"}, int),  # built before it is passed
        # Left to the class itself
        ("cpu", torch.device),
        (3, torch.nn.Module),
        ("f", Callable[[int], int]),
        (3, typing.TypeVar("T")),
    ],
)
def test_value_fits(value: Any, hint: Any) -> None:
    _check(value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("a", int, "node.x=a: {} expects int, not str."),
        (1.5, int, "node.x=1.5: {} expects int, not float."),
        (True, int, "node.x=True: {} expects int, not bool."),
        (True, float, "node.x=True: {} expects float, not bool."),
        ("fast", float, "node.x=fast: {} expects float, not str."),
        (1, bool, "node.x=1: {} expects bool, not int."),
        (1, str, "node.x=1: {} expects str, not int."),
        (None, int, "node.x=None: {} expects int, not null."),
        (None, Sequence[int], "node.x=None: {} expects Sequence[int], not null."),
        (3, None | str, "node.x=3: {} expects null or str, not int."),
        ("a", int | None, "node.x=a: {} expects int or null, not str."),
        ("a", Optional[int], "node.x=a: {} expects int or null, not str."),  # noqa: UP045
        ("up", Literal["min", "max"], "node.x=up: {} expects 'min' or 'max'."),
        (8, Literal[16, "bf16"] | None, "node.x=8: {} expects 16 or 'bf16' or null."),
        (3, Path, "node.x=3: {} expects Path, not int."),
        (3, Sequence[int], "node.x=3: {} expects Sequence[int], not int."),
        ("ab", Sequence[str], "node.x=ab: {} expects Sequence[str], not str."),
        (3, list[int] | None, "node.x=3: {} expects list[int] or null, not int."),
        (3, Mapping[str, int], "node.x=3: {} expects Mapping[str, int], not int."),
        (
            [1, "a"],
            Sequence[int],
            "node.x=[1, 'a']: {} expects Sequence[int], not list[int | str].",
        ),
        ([[1], 2], list[list[int]], "{} expects list[list[int]], not list[list[int] | int]."),
        ([1], int, "node.x=[1]: {} expects int, not list[int]."),
        ([1], str, "node.x=[1]: {} expects str, not list[int]."),
        ([], int, "node.x=[]: {} expects int, not list[]."),
        ({"a": 1}, int, "node.x={{'a': 1}}: {} expects int, not dict."),
        ({"a": 1}, int | str, "node.x={{'a': 1}}: {} expects int or str, not dict."),
    ],
)
def test_value_does_not_fit(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _check(value, hint)
    name = f"`{__name__}._check.<locals>.target`"
    assert message.format(name) in str(caught.value)


class _Model:
    def __init__(self, size: int, *, rate: float = 0.1, depth: int = None) -> None: ...  # type: ignore[assignment]  # noqa: RUF013

    @classmethod
    def small(cls, rate: float) -> "_Model":
        return cls(1, rate=rate)


class _Open:
    def __init__(self, size: int, **more: Any) -> None: ...


class _Unannotated:
    def __init__(self, size, rate="auto") -> None: ...  # type: ignore[no-untyped-def]


class _Unresolvable:
    def __init__(self, size: "NotImported") -> None: ...  # type: ignore[name-defined]  # noqa: F821


class _Inherits(_Model):
    pass


def _check_node(target: Callable[..., Any], **arguments: Any) -> None:
    check_arguments(OmegaConf.create({"_target_": "x", **arguments}), target, "model")


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (_Model, {"size": 3, "rate": 1}),
        (_Model, {}),  # what is missing is the class's to say
        (_Model, {"size": 3, "depth": None}),
        (_Model, {"size": 3, "_partial_": True, "_convert_": "all", "_recursive_": False}),
        (_Model.small, {"rate": 0.5}),
        (_Open, {"size": 3, "anything": [1]}),
        (_Unannotated, {"size": "x", "rate": None}),
        (_Unresolvable, {"size": "x"}),
        (_Inherits, {"size": 3}),
        (dict, {"a": 1}),
        (Trainer, {"max_epochs": 3, "devices": "auto", "precision": "16-mixed"}),
    ],
)
def test_arguments_are_accepted(target: Callable[..., Any], arguments: dict[str, Any]) -> None:
    _check_node(target, **arguments)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (_Model, {"sise": 3}, r"model\.sise: `\w+\._Model` has no argument `sise`\. Did you mean"),
        (_Model, {"self": 3}, "has no argument `self`"),
        (_Model, {"colour": 3}, r"no argument `colour`\. It takes: depth, rate, size\.$"),
        (_Model, {"size": "big"}, r"^model\.size=big: `\w+\._Model` expects int, not str\.$"),
        (_Model, {"rate": None}, r"^model\.rate=None: `\w+\._Model` expects float, not null\.$"),
        (_Model.small, {"rate": "x"}, r"`\w+\._Model\.small` expects float, not str"),
        (_Open, {"size": "big"}, r"`\w+\._Open` expects int, not str"),
        (_Unannotated, {"width": 3}, r"It takes: rate, size\.$"),
        (_Inherits, {"size": "big"}, r"`\w+\._Inherits` expects int, not str"),
        (Trainer, {"max_epoch": 3}, r"Trainer` has no argument `max_epoch`\. Did you mean `max_ep"),
        (Trainer, {"max_epochs": "3"}, r"Trainer` expects int or null, not str\.$"),
    ],
)
def test_arguments_are_refused(
    target: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _check_node(target, **arguments)


def test_function_without_arguments_suggests_nothing() -> None:
    def target() -> None: ...

    with pytest.raises(ConfigError, match=r"has no argument `x`\.$"):
        _check_node(target, x=1)


def test_interpolation_is_followed() -> None:
    cfg = OmegaConf.create({"size": "big", "model": {"_target_": "x", "size": "${size}"}})
    with pytest.raises(ConfigError, match=r"^model\.size=big: "):
        check_arguments(cfg.model, _Model, "model")


@pytest.mark.parametrize(
    ("target", "keys"),
    [
        (_Model, {"size", "rate", "depth"}),
        (_Model.small, {"rate"}),
        (_Open, None),
        (dict, None),
        (lambda: None, set()),
        (lambda *positional: None, set()),
    ],
)
def test_accepted_keys(target: Callable[..., Any], keys: set[str] | None) -> None:
    assert accepted_keys(target) == keys


def test_description_is_the_dotted_name() -> None:
    assert describe(torch.nn.Linear) == "`torch.nn.modules.linear.Linear`"
    assert describe(_Model.small) == f"`{__name__}._Model.small`"
