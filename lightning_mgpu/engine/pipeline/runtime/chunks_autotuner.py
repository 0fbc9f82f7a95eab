"""Choose the number of micro-batches by timing the first batches."""

import logging

log = logging.getLogger(__name__)

# Each number is tried this often; the first time, memory is allocated.
_TIMES = 3
_FACTORS = (1, 2, 4, 8)


class Chunks:
    """A number of micro-batches.

    Args:
        devices: How many devices there are.
        fixed: The number; `None` to try 1, 2, 4 and 8 for each device, one after another, and keep
            the fastest.
    """

    def __init__(self, devices: int, fixed: int | None) -> None:
        self._fixed = fixed
        self._untried = [] if fixed is not None else [devices * factor for factor in _FACTORS]
        self._seconds: dict[int, list[float]] = {count: [] for count in self._untried}
        self._usual = 4 * devices

    @property
    def usual(self) -> int:
        """Number of micro-batches, or an estimate while it is being chosen."""
        return self._usual if self._fixed is None else self._fixed

    @property
    def candidates(self) -> list[int]:
        """Numbers among which there is a choice."""
        return list(self._untried) if self._fixed is None else [self._fixed]

    def settle(self, count: int) -> None:
        """Take what somebody else has chosen, if the number is not fixed."""
        if self._fixed is None:
            self._fixed, self._untried = count, []

    @property
    def settled(self) -> bool:
        """Return whether the number has been chosen."""
        return self._fixed is not None

    def next(self, samples: int) -> int:
        """Number of micro-batches for the next training batch, which may be a candidate."""
        if not self._untried or samples < self._untried[-1]:
            return self.usual
        return self._untried[0]

    def took(self, count: int, seconds: float, samples: int) -> None:
        """Record the time of forward and backward of a batch with `count` micro-batches."""
        if not self._untried or count != self._untried[0] or samples < self._untried[-1]:
            return
        self._seconds[count].append(seconds / samples)
        if len(self._seconds[count]) == _TIMES:
            self._untried.pop(0)
        if not self._untried:
            self._fixed = min(self._seconds, key=lambda tried: min(self._seconds[tried][1:]))
            log.info("chunks='auto': of %s, %d was fastest.", [*self._seconds], self._fixed)
