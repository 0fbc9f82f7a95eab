"""The state of the random number generators that a step may draw from."""

import random
import sys
from typing import Any

import torch

from lightning_mgpu.engine.device import random_state, set_random_state


class RandomState:
    """The state of torch's, NumPy's and Python's generators at one time.

    Args:
        device: The accelerator whose generator counts besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state = self._now()

    def has_moved(self) -> bool:
        """Return whether a generator was used or seeded since."""
        return not all(map(_same, self._state, self._now()))

    def has_moved_beside_torch(self) -> bool:
        """Return whether NumPy's or Python's generator was used or seeded since."""
        return not all(map(_same, self._state[2:], self._now()[2:]))

    def restore(self) -> None:
        """Put the generators back to where they were."""
        torch_cpu, accelerator, python, numpy = self._state
        torch.default_generator.set_state(torch_cpu)
        set_random_state(self._device, accelerator)
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)

    def _now(self) -> tuple[Any, ...]:
        numpy = sys.modules.get("numpy")
        return (
            torch.default_generator.get_state(),
            random_state(self._device),
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )


def _same(before: Any, after: Any) -> bool:
    if before is None or after is None:
        return before is None  # imported meanwhile: nothing is known of it
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, tuple):
        return all(map(_same, before, after))
    if hasattr(before, "tobytes"):
        return bool(before.tobytes() == after.tobytes())
    return bool(before == after)
