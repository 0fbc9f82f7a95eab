"""States of all random number generators of a process, and as a checkpoint can hold them."""

import random
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from lightning_mgpu.engine.device import random_state, set_random_state


class States(NamedTuple):
    """States of generators at one time.

    Attributes:
        host: Of torch on the host.
        devices: Of torch on accelerators, by name.
        python: Of `random`.
        numpy: Of NumPy, if it is imported and has its usual generator.
        own: Of generators that the program has made.
    """

    host: torch.Tensor
    devices: dict[str, torch.Tensor | None]
    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | None
    own: list[torch.Tensor]

    @classmethod
    def now(cls, devices: Iterable[torch.device], own: Sequence[torch.Generator] = ()) -> "States":
        """States of the generators that a run may draw from.

        Args:
            devices: Accelerators whose generators count besides the CPU's.
            own: Generators that the program has made itself.
        """
        numpy = sys.modules.get("numpy")
        state = None if numpy is None else numpy.random.get_state()
        return cls(
            torch.default_generator.get_state(),
            {str(device): random_state(device) for device in devices},
            random.getstate(),
            state if isinstance(state, tuple) and state[0] == "MT19937" else None,
            [generator.get_state() for generator in own],
        )

    def restore(self, own: Sequence[torch.Generator] = ()) -> None:
        """Put the generators back; `own` as in `now`, in the same order."""
        torch.default_generator.set_state(self.host)
        for name, state in self.devices.items():
            set_random_state(torch.device(name), state)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        for generator, state in zip(own, self.own, strict=False):
            generator.set_state(state)

    def plain(self) -> dict[str, Any]:
        """Return the same as numbers, tensors, and lists and dicts of them."""
        version, internal, gauss = self.python
        numpy: list[Any] | None = None
        if self.numpy is not None:
            _, key, position, has_gauss, normal = self.numpy
            words = torch.from_numpy(key.astype("int64"))
            numpy = [words, int(position), int(has_gauss), float(normal)]
        return {
            "host": self.host,
            "devices": self.devices,
            "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
            "numpy": numpy,
            "own": self.own,
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "States":
        """The states that `plain` has described."""
        version, internal, gauss = plain["python"]
        numpy = plain["numpy"]
        if numpy is not None:
            numpy = ("MT19937", numpy[0].numpy().astype("uint32"), *numpy[1:])
        return cls(
            plain["host"],
            plain["devices"],
            (version, tuple(internal.tolist()), gauss),
            numpy,
            plain["own"],
        )
