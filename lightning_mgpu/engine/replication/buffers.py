"""The buffers of a copy of a module."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__: list[str] = []


class Buffers:
    """A copy's buffers, in memory of its own even on the master's device: steps write to them."""

    def __init__(
        self, modules: Sequence[nn.Module], memo: dict[int, Any], device: torch.device
    ) -> None:
        self._device = device
        self._known: dict[tuple[int, str], _Buffer] = {}
        # Later modules may share a buffer with an earlier one.
        copies: dict[int, _Buffer] = {}
        self._holders = []
        for module in modules:
            holder: dict[str, Tensor | None] = {}
            self._holders.append((module._buffers, holder))
            for name, buffer in module._buffers.items():
                holder[name] = None
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = _Buffer(buffer, device)
                    holder[name] = copies[id(buffer)].copied
                    self._known[id(holder), name] = copies[id(buffer)]
        memo |= {key: buffer.copied for key, buffer in copies.items()}
        self._copies = copies  # keeps the originals, and so their ids, alive

    def holder(self, index: int) -> dict[str, Tensor | None]:
        """The buffers of the copy of module `index`."""
        return self._holders[index][1]

    def refresh(self) -> None:
        """Copy what has been written to, on either side, and what has been set anew."""
        for originals, copies in self._holders:
            for name, original in originals.items():
                if original is None:
                    copies[name] = None
                    continue
                known = self._known.get((id(copies), name))
                if known is None or known.original is not original:
                    known = self._known[id(copies), name] = _Buffer(original, self._device)
                copies[name] = known.up_to_date()
            for name in copies.keys() - originals.keys():
                del copies[name]

    def lost(self) -> list[str]:
        """The buffers that a step has written to with another outcome than the original's."""
        return [name for (_, name), buffer in self._known.items() if buffer.differs()]


class _Buffer:
    """One buffer and its copy."""

    def __init__(self, original: Tensor, device: torch.device) -> None:
        self.original = original
        self.copied = original.detach().to(device, copy=True)
        self._versions = self._now()
        self._compared = False

    def up_to_date(self) -> Tensor:
        """The copy, with the original's values."""
        if self._versions is None or self._versions != self._now():
            self.copied.copy_(self.original, non_blocking=True)
            self._versions = self._now()
        return self.copied

    def differs(self) -> bool:
        """Whether the copy was written to, and is not what the original has become; asked once."""
        if self._compared or self._versions is None or self._now() == self._versions:
            return False
        self._compared = True
        return not torch.equal(self.copied.to(self.original.device), self.original)

    def _now(self) -> tuple[int, int] | None:
        if self.original.is_inference():
            return None  # such a tensor does not count its versions
        return self.original._version, self.copied._version
