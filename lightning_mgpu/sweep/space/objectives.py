"""Objectives of a sweep: one metric, or several."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_mgpu.errors import ConfigError

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

OBJECTIVE = "objective"
"""The metric's name where the job names none: what it returns."""


class Objective(NamedTuple):
    """A metric, and whether it is minimised (``min``) or maximised (``max``)."""

    name: str
    mode: str


def read_objectives(options: "RayTuneSweeperConf") -> tuple[Objective, ...]:
    """Read the objectives from the options; `metric` and `mode` are a word or a list each.

    Raises:
        ConfigError: A word that is none, or lists that do not go together.
    """
    modes = _as_list(options.mode)
    if not modes or set(modes) - {"min", "max"}:
        raise ConfigError(
            f"hydra.sweeper.mode={_text(options.mode)}: expected one of min, max, or a list of them"
            " with one for each metric."
        )
    names = _names(options, len(modes))
    if len(modes) == 1:
        modes *= len(names)
    if len(names) != len(modes):
        raise ConfigError(
            f"hydra.sweeper.mode={_text(options.mode)}: {len(modes)} for {len(names)} metrics"
            f" (hydra.sweeper.metric={_text(options.metric)}). Give one for each, or one for all."
        )
    return tuple(map(Objective, names, modes))


def dominates(one: Sequence[float], other: Sequence[float], modes: Iterable[str]) -> bool:
    """Return whether `one` is nowhere worse than `other`, and better somewhere."""
    signs = [-1 if mode == "max" else 1 for mode in modes]
    differences = [(a - b) * sign for a, b, sign in zip(one, other, signs, strict=True)]
    return all(d <= 0 for d in differences) and any(d < 0 for d in differences)


def _names(options: "RayTuneSweeperConf", count: int) -> list[str]:
    if options.metric is None:
        return [OBJECTIVE] if count == 1 else [f"{OBJECTIVE}_{number}" for number in range(count)]
    names = _as_list(options.metric)
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"hydra.sweeper.metric={_text(options.metric)}: expected the name of a metric, or a"
            " list of different ones."
        )
    return names


def _as_list(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


def _text(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)
