"""Search algorithm and scheduler: the class that each node names, its arguments, and its object."""

import difflib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from lightning_mgpu.errors import ConfigError, one_line
from lightning_mgpu.sweep.space.space import encode

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

SEARCH_ALG = "hydra.sweeper.search_alg"
SCHEDULER = "hydra.sweeper.scheduler"

_TARGET = "_target_"
_OF_HYDRA = {_TARGET, "_recursive_", "_convert_", "_partial_", "_args_"}
_OF_THE_SWEEPER = {"metric", "mode", "space", "objective"}

# Which trials go on from checkpoints: of a scheduler that is not named here, any might.
_GOES_ON = ("FIFOScheduler", "ASHAScheduler", "AsyncHyperBandScheduler")
_POPULATION = ("PopulationBasedTraining", "PB2")


def target_of(node: Any) -> str:
    """Dotted name of the class that a node is made of."""
    return str(getattr(node, _TARGET, None))


def arguments_of(node: Any) -> dict[str, Any]:
    """Arguments of that class."""
    return {name: value for name, value in vars(node).items() if name not in (_TARGET, "name")}


def is_kind(node: Any, *names: str) -> bool:
    """Return whether a node's class has one of these names, or is derived from one that has.

    Imports nothing for classes that have it themselves.
    """
    target = target_of(node)
    if target.rpartition(".")[2] in names:
        return True
    if target.startswith(("ray.tune.schedulers.", "ray.tune.search.", "lightning_mgpu.")):
        return False  # none of these is another one's, but for `PB2`
    try:
        kind = pkgutil.resolve_name(target)
    except Exception:  # `check_nodes` tells of it
        return False
    return any(base.__name__ in names for base in getattr(kind, "__mro__", ()))


def stops_early(options: "RayTuneSweeperConf") -> bool:
    """Return whether the scheduler needs metrics reported while a trial runs."""
    return not is_kind(options.scheduler, "FIFOScheduler")


def needs_checkpoints(options: "RayTuneSweeperConf") -> bool:
    """Return whether the scheduler resumes trials from checkpoints."""
    return not is_kind(options.scheduler, *_GOES_ON)


def is_population(options: "RayTuneSweeperConf") -> bool:
    """Return whether the scheduler changes the values of trials."""
    return is_kind(options.scheduler, *_POPULATION)


def is_grid(options: "RayTuneSweeperConf") -> bool:
    """Return whether each combination runs once."""
    return is_kind(options.search_alg, "GridSearcher")


def check_nodes(options: "RayTuneSweeperConf") -> None:
    """Check that search algorithm and scheduler are classes that take their arguments.

    Raises:
        ConfigError: One is not, or does not.
    """
    for key, node in ((SEARCH_ALG, options.search_alg), (SCHEDULER, options.scheduler)):
        _check(key, target_of(node), arguments_of(node))


def build(key: str, node: Any, **given: Any) -> Any:
    """Make the object of a node.

    Args:
        key: Of the node in the config.
        node: The node.
        **given: Arguments that replace the node's; any objects.

    Raises:
        ConfigError: The class refuses its arguments.
    """
    target = target_of(node)
    written = {name: value for name, value in arguments_of(node).items() if name not in given}
    with refused(key, SimpleNamespace(_target_=target, **written)):
        # Not with what is given: Hydra makes configs of all that it passes on.
        made = instantiate({_TARGET: target, "_partial_": True, "_convert_": "all", **written})
        return made(**given)


@contextmanager
def refused(key: str, node: Any) -> Iterator[None]:
    """Say of which node an error is about the arguments.

    Raises:
        ConfigError: There was one.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # Hydra's are of several lines
        shown = ", ".join(f"{name}={encode(value)}" for name, value in arguments_of(node).items())
        raise ConfigError(
            f"{key}: {target_of(node)}({shown}) is refused, {type(cause).__name__}:"
            f" {one_line(cause, 300)}"
        ) from error


def _check(key: str, target: str, arguments: Mapping[str, Any]) -> None:
    try:
        kind = pkgutil.resolve_name(target)
    except Exception as error:  # the module may be a user's
        raise ConfigError(
            f"{key}.{_TARGET}={target}: cannot be imported, {type(error).__name__}:"
            f" {one_line(error)}. Give a class with its module, such as"
            " optuna.samplers.TPESampler or ray.tune.schedulers.ASHAScheduler."
        ) from error
    for name, value in arguments.items():
        if isinstance(value, Mapping) and _TARGET in value:
            inner = {str(n): v for n, v in value.items() if n not in _OF_HYDRA}
            _check(f"{key}.{name}", str(value[_TARGET]), inner)
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):  # of a class in C
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    is_inner = key not in (SEARCH_ALG, SCHEDULER)
    takes = [name for name in parameters if is_inner or name not in _OF_THE_SWEEPER]
    takes += [] if is_inner else _more(parameters)
    for name, value in arguments.items():
        if name not in takes and name not in _OF_HYDRA:
            near = difflib.get_close_matches(name, takes, n=1)
            raise ConfigError(
                f"{key}.{name}={encode(value)}: {target} takes {', '.join(takes) or 'nothing'}."
                + (f" Did you mean {near[0]}?" if near else "")
            )


def _more(parameters: Mapping[str, Any]) -> list[str]:
    """Arguments that the sweeper translates."""
    return [
        *(["seed"] if "random_state_seed" in parameters else []),
        *(["hyperparam_mutations"] if "hyperparam_bounds" in parameters else []),
    ]
