"""Which gradients of weights are worth computing later."""

from collections.abc import Hashable, Iterable
from typing import Literal

import torch

from lightning_mgpu.engine.device import is_accelerator

Defer = bool | Literal["auto"]

# Multiplications that take ten times as long as a node in Python does, on a core of a CPU and on a
# large accelerator.
_WORTH_IT, _WORTH_IT_ON_ACCELERATOR = 2**24, 2**31


class Deferral:
    """What is deferred in each kind of call.

    Args:
        wanted: All that can be, nothing, or ``"auto"``: operations that are large enough. Calls
            that have shown to have none are then spared the search for some.
        devices: Where they are computed.
    """

    def __init__(self, wanted: Defer, devices: Iterable[torch.device]) -> None:
        is_fast = any(map(is_accelerator, devices))
        large = _WORTH_IT_ON_ACCELERATOR if is_fast else _WORTH_IT
        self._least = {True: 0, False: None, "auto": large}[wanted]
        self._without: set[Hashable] = set()

    def least(self, call: Hashable) -> int | None:
        """How many multiplications an operation of a call is to have; `None` to defer nothing."""
        return None if call in self._without else self._least

    def saw(self, call: Hashable, defers: bool) -> None:
        """Record whether a call has had such operations."""
        # Sizes recur with each batch of a call; what else stands in the way may not.
        if not defers and self._least:
            self._without.add(call)
