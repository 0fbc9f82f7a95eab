"""Numbers that record the additions to them.

Whether a step adds to a number (`self.n += len(y)`) or assigns it (`self.last = len(y)`) does not
show in its values. Replicas other than the first therefore find, in place of plain numbers, ones of
a subclass whose sums remember where they began; any other operation gives a plain number.
"""

import operator
import types
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_mgpu._compat.python import frame_above, offsets_after_constants
from lightning_mgpu._compat.torch import version_of

_SUM = "_mgpu_sum"


@dataclass(frozen=True)
class Additions:
    """Additions that turned one value into another.

    Attributes:
        constant: Whether only constants of the source code were added.
        count: How many times.
        looped: Whether the code that did so ran several times in the step, here or for other
            numbers.
    """

    constant: bool = True
    count: int = 0
    looped: bool = False

    def more(self, constant: bool) -> "Additions":
        """Return this with one more addition."""
        return Additions(self.constant and constant, self.count + 1)


Sites = Counter[tuple[types.CodeType, int]]
"""How often each place in the source has added to a number of one replica in this step."""


class Tracked:
    """Base class of tracked integers and floats.

    Attributes:
        value: The plain number.
        root: The tracked number that the first addition was made to; itself, if none was.
        additions: Those since.
        sites: Where they were made.
    """

    value: Any
    root: "Tracked"
    additions: Additions
    sites: Sites
    site: tuple[types.CodeType, int] | None

    def __add__(self, other: Any) -> Any:
        return _added(self, other, operator.add(self.value, plain(other)))

    def __radd__(self, other: Any) -> Any:
        return _added(self, other, operator.add(plain(other), self.value))

    def __sub__(self, other: Any) -> Any:
        return _added(self, other, operator.sub(self.value, plain(other)))

    def __copy__(self) -> Any:
        return self.value

    def __deepcopy__(self, _: Any) -> Any:
        return self.value

    def __reduce__(self) -> Any:
        return type(self.value), (self.value,)


class TrackedInt(Tracked, int):
    """A tracked integer."""


class TrackedFloat(Tracked, float):
    """A tracked float, or a NumPy number that one has become."""


def track(value: Any, sites: Sites) -> Any:
    """A number that remembers what is added to it; anything but a plain number as it is."""
    value = plain(value)
    if type(value) is not int and type(value) is not float:
        return value
    return _make(value, None, Additions(), sites, None)


def plain(value: Any) -> Any:
    """Plain value of a tracked number; anything else as it is."""
    return value.value if isinstance(value, Tracked) else value


def additions_since(root: Any, value: Any) -> Additions | None:
    """Additions that made `value` from `root`; `None` if it came about in another way."""
    if isinstance(value, Tracked):
        return value.additions if value.root is root else None
    if isinstance(value, Tensor):
        began, additions, version = getattr(value, _SUM, (None, None, 0))
        # (Written to in place since, it may be anything.)
        return additions if began is root and version_of(value) == version else None
    return None


def _make(
    value: Any,
    root: Tracked | None,
    additions: Additions,
    sites: Sites,
    site: tuple[types.CodeType, int] | None,
) -> Any:
    kind = TrackedInt if isinstance(value, (int, np.integer)) else TrackedFloat
    made: Any = kind(value)
    made.value, made.root, made.additions = value, root if root is not None else made, additions
    made.sites, made.site = sites, site
    return made


def _added(number: Tracked, other: Any, result: Any) -> Any:
    if result is NotImplemented:
        return result
    frame = frame_above(2)
    site = frame.f_code, frame.f_lasti
    number.sites[site] += 1
    additions = number.additions.more(is_constant_operand(frame))
    if isinstance(result, (int, float, np.integer, np.floating)):
        return _make(result, number.root, additions, number.sites, site)
    if isinstance(result, Tensor) and not result.is_inference():
        setattr(result, _SUM, (number.root, additions, version_of(result)))
    return result


def is_constant_operand(frame: types.FrameType | None) -> bool:
    """Return whether a frame's current operation has a source constant as its last operand."""
    if frame is None:
        return False
    return frame.f_lasti in offsets_after_constants(frame.f_code)


def untracked(value: Any) -> Any:
    """The same value with plain numbers, also in lists, tuples and dicts."""
    if isinstance(value, Tracked):
        return value.value
    if type(value) is list:
        return [untracked(entry) for entry in value] if _holds(value) else value
    if type(value) is tuple:
        return tuple(untracked(entry) for entry in value) if _holds(value) else value
    if type(value) is dict and _holds(value.values()):
        return {key: untracked(entry) for key, entry in value.items()}
    return value


def _holds(entries: Any) -> bool:
    return any(isinstance(entry, (Tracked, list, tuple, dict)) for entry in entries)


def is_number(value: Any) -> bool:
    """Return whether `value` is a number other than a `bool`."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
