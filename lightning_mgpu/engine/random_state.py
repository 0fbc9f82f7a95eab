"""The states of the random number generators that a step or a run may draw from."""

import random
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lightning_mgpu.engine.device import random_state, set_random_state


class RandomState:
    """The states of torch's, NumPy's and Python's generators at one time.

    Args:
        devices: The accelerators whose generators count besides the CPU's.
        own: Generators that the program has made itself.
    """

    def __init__(
        self, devices: Sequence[torch.device] = (), own: Sequence[torch.Generator] = ()
    ) -> None:
        self._devices, self._own = tuple(devices), tuple(own)
        self._state = self._now()

    def has_moved(self) -> bool:
        """Return whether a generator was used or seeded since."""
        return not _same(self._state, self._now())

    def has_moved_beside_torch(self) -> bool:
        """Return whether NumPy's or Python's generator was used or seeded since."""
        return not _same(self._state[:2], self._now()[:2])

    def restore(self, own: Sequence[torch.Generator] | None = None) -> None:
        """Put the generators back to where they were.

        Args:
            own: Those of the program, in the same order; default: the same objects.
        """
        python, numpy, torch_cpu, devices, states = self._state
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        torch.default_generator.set_state(torch_cpu)
        for name, state in devices.items():
            set_random_state(torch.device(name), state)
        for generator, state in zip(self._own if own is None else own, states, strict=False):
            generator.set_state(state)

    def plain(self) -> dict[str, Any]:
        """Return the states as a checkpoint can hold them: numbers, tensors, lists, dicts."""
        (version, words, gauss), numpy, torch_cpu, devices, own = self._state
        if isinstance(numpy, tuple):  # NumPy's usual generator, MT19937
            name, key, *rest = numpy
            numpy = [name, torch.from_numpy(key.astype("int64")), *rest]
        return {
            "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
            "numpy": numpy,
            "torch": torch_cpu,
            "devices": devices,
            "own": own,
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "RandomState":
        """The states that `plain` has described."""
        version, words, gauss = plain["python"]
        numpy = plain["numpy"]
        if isinstance(numpy, list):
            name, key, *rest = numpy
            numpy = (name, key.numpy().astype("uint32"), *rest)
        state = cls()
        python = version, tuple(words.tolist()), gauss
        state._state = python, numpy, plain["torch"], plain["devices"], plain["own"]
        return state

    def _now(self) -> tuple[Any, ...]:
        numpy = sys.modules.get("numpy")
        return (
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
            torch.default_generator.get_state(),
            {str(device): random_state(device) for device in self._devices},
            [generator.get_state() for generator in self._own],
        )


def _same(before: Any, after: Any) -> bool:
    if before is None or after is None:
        return before is None  # imported meanwhile: nothing is known of it
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return all(_same(value, after[key]) for key, value in before.items())
    if isinstance(before, (tuple, list)):
        return all(map(_same, before, after))
    if hasattr(before, "tobytes"):
        return bool(before.tobytes() == after.tobytes())
    return bool(before == after)
