"""Search space: from Hydra's overrides to dimensions, and from values to overrides."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Sweep,
)
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_mgpu._compat.hydra import escape
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.space.markers import LEAVE_OUT

_PLAIN = re.compile(r"[A-Za-z_][\w./:-]*", re.ASCII)
_WORDS = {"null", "true", "false", "inf", "nan"}  # mean something else where they are not quoted


@dataclass(frozen=True)
class Choice:
    """One of several unordered values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Interval:
    """A number between two others; integer intervals include both ends."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


Dimension = Choice | Interval
Computed = Callable[[dict[str, Any]], Any]


@dataclass
class Space:
    """Searched, fixed and computed values of trials.

    Attributes:
        fixed: Overrides that every trial has.
        dimensions: What is searched, by the name of the value.
        keys: The override's key of each name: ``+model.depth`` for ``model.depth``.
        computed: Values that follow from the others, by name; in this order.
        conditions: What names depend on: the others, and their values, encoded, with which there
            is a value. Trials leave out the rest, though searchers draw it.
        given: Values of fixed names that others depend on, encoded.
        order: Keys as they were given, without `+`: Hydra applies overrides one after the other.
    """

    fixed: list[str] = field(default_factory=list)
    dimensions: dict[str, Dimension] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    computed: dict[str, Computed] = field(default_factory=dict)
    conditions: dict[str, dict[str, frozenset[str]]] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def add(self, key: str, dimension: Dimension) -> None:
        """Add a dimension for `key`, which may have a leading `+`."""
        name = self._claim(key)
        self.dimensions[name] = dimension

    def compute(self, key: str, function: Computed) -> None:
        """Compute `key` by `function` from the drawn values."""
        name = self._claim(key)
        self.computed[name] = function

    def fix(self, key: str, override: str) -> None:
        """Give `key` the same value in every trial, or delete it."""
        if not override.startswith("~"):  # else it may be given anew
            del self.keys[self._claim(key)]
        elif override not in self.order:
            self.order.append(override)
        self.fixed.append(override)

    def _claim(self, key: str) -> str:
        """Claim the name for `key`, removing its earlier meaning."""
        plain, name = key.lstrip("+~"), name_of(key)
        self.dimensions.pop(name, None)
        self.computed.pop(name, None)
        self.fixed = [o for o in self.fixed if _place(o) != plain]
        self.order = [*(place for place in self.order if place != plain), plain]
        self.keys[name] = key
        return name

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """Overrides of the trial with these values."""
        full = self.active(values)
        for name, function in self.computed.items():
            if self._exists(name, values):
                value = function(dict(full))
                if value is not LEAVE_OUT:
                    full[name] = value
        searched = [f"{self.keys[name]}={encode(value)}" for name, value in full.items()]
        places = {place: number for number, place in enumerate(self.order)}
        return sorted([*self.fixed, *searched], key=lambda o: places.get(_place(o), -1))

    def active(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Searched values without those that are left out."""
        return {name: values[name] for name in self.dimensions if self._exists(name, values)}

    def _exists(self, name: str, values: Mapping[str, Any]) -> bool:
        return all(
            self._exists(other, values)
            and (self.given[other] if other in self.given else encode(values[other])) in allowed
            for other, allowed in self.conditions.get(name, {}).items()
        )

    def example(self) -> list[str]:
        """Overrides of an example trial, to check that they compose."""
        return next(self.examples())

    def examples(self, node: str = "") -> Iterator[list[str]]:
        """Overrides that cover every choice, and the ends of every interval, in `node`."""
        axes = [
            _extremes(d)[: None if name.split(".")[0] == node else 1]
            for name, d in self.dimensions.items()
        ]
        for point in itertools.product(*axes):
            yield self.overrides(dict(zip(self.dimensions, point, strict=True)))

    def __str__(self) -> str:
        """One line per key, by which a resumed sweep is compared."""
        lines = [f"{self.keys[name]}: {d}" for name, d in self.dimensions.items()]
        lines += [f"{self.keys[name]}: computed" for name in self.computed]
        for name, others in self.conditions.items():
            on = ", ".join(f"{other}={'|'.join(sorted(some))}" for other, some in others.items())
            lines.append(f"{self.keys[name]}: only with {on}")
        return "\n".join(lines)


def parse_space(
    params: Mapping[str, Any],
    arguments: Iterable[str],
    config_loader: ConfigLoader | None = None,
) -> Space:
    """Read `hydra.sweeper.params` and the command line; the latter takes precedence.

    Raises:
        ConfigError: An override that cannot be read or searched.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    written = [f"{key}={_as_text(value)}" for key, value in params.items()]
    try:
        parsed = parser.parse_overrides(written)
    except OverrideParseException as error:
        raise ConfigError(f"hydra.sweeper.params: {error}") from error
    # A key is the same one with and without `+`; what deletes one is something else.
    by_key = {_place(o.input_line or ""): o for o in parsed}
    for override in parser.parse_overrides(list(arguments)):
        key = _place(override.input_line or "")
        by_key.pop(key, None)  # so that the order is that of the command line
        by_key[key] = override
    space = Space()
    for override in by_key.values():
        key = override.get_key_element()
        if override.is_sweep_override():
            space.add(key, _dimension(override))
        else:
            space.fix(key, override.input_line or "")
    return space


def _place(override: str) -> str:
    """Its place in the order: the key of a value, or all of what deletes."""
    if override.startswith("~"):
        return override
    return override.lstrip("+").partition("=")[0].strip()


def name_of(key: str) -> str:
    """Name of the value of an override's key."""
    return key.lstrip("+~").replace("/", ":")  # Ray nests what has a slash


def check_searchable(space: Space) -> None:
    """Check that there is something to search."""
    if not space.dimensions:
        raise ConfigError(
            "hydra.sweeper.params: nothing to search. Give at least one value a sweep, such as"
            " 'model.lr=tag(log,interval(1e-4,1e-1))' or 'model.l1=choice(16,32)'."
        )


def encode(value: Any) -> str:
    """Format a value for an override, so that Hydra reads the same value."""
    if hasattr(value, "item") and not isinstance(value, (str, list, dict)):
        value = value.item()  # numpy's scalars
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(encode, value))}]"
    if isinstance(value, Mapping):
        words = (
            (encode(k) if isinstance(k, bool) else escape(str(k)), v) for k, v in value.items()
        )
        items = (f"{key}:{encode(v)}" for key, v in words)
        return "{" + ",".join(items) + "}"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return QuotedString(text, Quote.single).with_quotes()


def _encode_key(key: Any) -> str:
    return encode(key) if isinstance(key, bool) else escape(str(key))  # quotes mean nothing there


def enumerate_grid(space: Space) -> list[dict[str, Any]]:
    """Every combination, the last dimension varying fastest, as in Hydra.

    Of those that differ only in what trials leave out, the first.

    Raises:
        ConfigError: A dimension is continuous.
    """
    axes = [_points(space.keys[name], dimension) for name, dimension in space.dimensions.items()]
    points = [dict(zip(space.dimensions, point, strict=True)) for point in itertools.product(*axes)]
    if not space.conditions:
        return points
    first = {encode(space.active(point)): point for point in reversed(points)}
    return list(reversed(first.values()))


def count(dimension: Dimension) -> int | None:
    """Number of values of a dimension; `None` for an interval of real numbers."""
    if isinstance(dimension, Choice):
        return len(dimension.values)
    return int(dimension.high) - int(dimension.low) + 1 if dimension.integer else None


def _points(key: str, dimension: Dimension) -> list[Any]:
    if isinstance(dimension, Choice):
        return list(dimension.values)
    if dimension.integer:
        return list(range(int(dimension.low), int(dimension.high) + 1))
    raise ConfigError(
        f"{key}: an interval of real numbers has no grid. Use `choice` or `range`, or another"
        " search, such as hydra/sweeper/search_alg=random."
    )


def _dimension(override: Override) -> Dimension:
    value, key = override.value(), override.get_key_element()
    tags: set[str] = getattr(value, "tags", set())
    unknown = tags - {"log", "int"}
    if unknown:
        raise ConfigError(f"{key}: tag({', '.join(sorted(unknown))}) is unknown; known: log, int.")
    if isinstance(value, IntervalSweep):
        return _interval(key, value, tags)
    if isinstance(value, RangeSweep) and _is_consecutive(value) and not value.shuffle:
        assert value.start is not None
        last = list(value.range())[-1]
        return Interval(value.start, last, log="log" in tags, integer=True)
    values = tuple(_plain(item) for item in override.sweep_iterator())
    if not values:
        raise ConfigError(f"{override.input_line}: has no value.")
    return Choice(values)


def _interval(key: str, sweep: IntervalSweep, tags: set[str]) -> Interval:
    assert sweep.start is not None
    assert sweep.end is not None
    integer = "int" in tags or (isinstance(sweep.start, int) and isinstance(sweep.end, int))
    if not sweep.start < sweep.end:
        raise ConfigError(f"{key}: interval({sweep.start}, {sweep.end}) is empty.")
    if "log" in tags and sweep.start <= 0:
        raise ConfigError(
            f"{key}: tag(log, interval({sweep.start}, {sweep.end})) must start above 0."
        )
    low, high = (int(sweep.start), int(sweep.end)) if integer else (sweep.start, sweep.end)
    return Interval(low, high, log="log" in tags, integer=integer)


def _is_consecutive(sweep: RangeSweep) -> bool:
    ends = (sweep.start, sweep.stop)
    return (
        all(isinstance(end, int) for end in ends)
        and sweep.step in (None, 1)
        and (len(list(sweep.range())) > 1)
    )


def _extremes(dimension: Dimension) -> list[Any]:
    if isinstance(dimension, Choice):
        return list(dimension.values)
    return [_number(dimension.low, dimension), _number(dimension.high, dimension)]


def _number(value: float, dimension: Interval) -> float:
    return int(value) if dimension.integer else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    assert not isinstance(value, Sweep)
    return value


def _as_text(value: Any) -> str:
    """Format a value of `params` as an override: strings are Hydra's grammar."""
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    return value if isinstance(value, str) else encode(value)
