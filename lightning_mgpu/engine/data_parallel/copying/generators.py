"""Random generators stored on a module: one for each replica.

The first replica draws from the model's own, so that this moves on as it does on one device. The
others' are seeded from its state, whenever that has changed, and so repeat with it.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_BYTES = 8


class Generators:
    """One replica's generators.

    Args:
        root: The device of the master.
        device: That of this replica.
        slot: Which replica this is; each draws other numbers.
    """

    def __init__(self, root: torch.device, device: torch.device, slot: int) -> None:
        self._root, self._device, self._slot = root, device, slot
        self._known: dict[int, tuple[Any, Any, bytes]] = {}

    def of(self, original: Any) -> Any:
        """This replica's generator in place of the model's."""
        if isinstance(original, random.SystemRandom):
            return original
        _, copied, before = self._known.get(id(original), (None, None, b""))
        state = _state(original)
        if state != before:
            digest = hashlib.blake2b(b"%d " % self._slot + state, digest_size=_BYTES).digest()
            copied = self._seeded(original, int.from_bytes(digest, "big") >> 1)
            self._known[id(original)] = original, copied, state
        return copied

    def _seeded(self, original: Any, seed: int) -> Any:
        if isinstance(original, torch.Generator):
            device = self._device if original.device == self._root else original.device
            return torch.Generator(device).manual_seed(seed)
        make: Callable[..., Any] = type(original)
        if isinstance(original, np.random.Generator):
            return make(type(original.bit_generator)(seed))
        if isinstance(original, np.random.RandomState):
            return make(np.random.MT19937(seed))
        return make(seed)


def _state(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        return repr(_hashable(generator.bit_generator.state)).encode()
    if isinstance(generator, np.random.RandomState):
        return repr(_hashable(generator.get_state(legacy=False))).encode()
    return repr(generator.getstate()).encode()


def _hashable(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _hashable(value) for key, value in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state
