"""Copies of a module's tensors: buffers and plain attributes.

Steps write to them, so that a replica needs memory of its own for them, on the master's device too.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch import is_functorch_wrapped, version_of
from lightning_mgpu._compat.torch_modules import buffers_of
from lightning_mgpu.engine.device import copy_into

# What is added to a larger tensor is not told apart: that needs its values before the step.
_MOST_ELEMENTS = 2**16
# Larger tensors are copied only if they are buffers.
_MOST_BYTES = 2**20


class TensorCopy:
    """A tensor and its copy on another replica.

    Attributes:
        name: Where it was found.
        original: The master's.
        copied: This replica's.
        before: The values at the start of the step; `None` for a large one.

    Args:
        original: The tensor.
        device: Where the copy lies.
        name: Where it was found.
        may_change: Whether steps may write to it.
    """

    def __init__(
        self, original: Tensor, device: torch.device, name: str, may_change: bool = True
    ) -> None:
        self.name = name
        self.original = original
        self.copied = original.detach().to(device, copy=True)
        self.before: Tensor | None = None
        small = original.numel() <= _MOST_ELEMENTS and original.layout == torch.strided
        if may_change and small:
            self.before = original.detach().clone()
        self._versions = self._now()

    def refresh(self) -> None:
        """Copy what was written to the original, and discard what was written to the copy."""
        if self._versions is None or self._versions != self._now():
            copy_into(self.copied, self.original)
            if self.before is not None:
                self.before.copy_(self.original)
            self._versions = self._now()

    def is_written(self) -> bool:
        """Return whether the original or the copy was written to since the last `refresh`."""
        if self._versions is not None:
            return self._now() != self._versions
        # Inference tensors do not count their versions.
        return self.before is not None and not (
            torch.equal(self.before, self.original)
            and torch.equal(self.before, self.copied.to(self.before.device))
        )

    def _now(self) -> tuple[int, int] | None:
        if self.original.is_inference() or self.copied.is_inference():
            return None
        return version_of(self.original), version_of(self.copied)


class Tensors:
    """The tensors of one replica that are copies.

    Args:
        root: The device of the master.
        device: That of this replica.
    """

    def __init__(self, root: torch.device, device: torch.device) -> None:
        self._root, self._device = root, device
        self._copies: dict[int, TensorCopy] = {}
        self._seen: set[int] = set()
        self._shared: dict[int, tuple[weakref.ref[Tensor], str, int]] = {}

    def __iter__(self) -> Iterator[TensorCopy]:
        return iter(self._copies.values())

    def find(self, original: Tensor) -> TensorCopy | None:
        """The copy of a tensor of the master's, if there is one."""
        return self._copies.get(id(original))

    def begin(self) -> None:
        """Start a step; copies that it does not ask for are dropped by the next."""
        for key in self._copies.keys() - self._seen:
            del self._copies[key]
        self._seen = set()
        for key, (reference, name, _) in list(self._shared.items()):
            tensor = reference()
            if tensor is None:
                del self._shared[key]
            else:
                self._shared[key] = reference, name, _version(tensor)

    def of(
        self, original: Tensor, name: str, is_buffer: bool = False, may_change: bool = True
    ) -> Tensor:
        """The copy of a tensor, up to date; the tensor itself where it is shared."""
        known = self._copies.get(id(original))
        if known is None:
            if not is_buffer and not self._is_worth_it(original, name):
                return original
            here = is_buffer or original.device == self._root
            device = self._device if here else original.device
            known = self._copies[id(original)] = TensorCopy(original, device, name, may_change)
        elif id(original) not in self._seen:
            known.refresh()
        self._seen.add(id(original))
        return known.copied

    def _is_worth_it(self, original: Tensor, name: str) -> bool:
        if not _is_plain(original):
            return False
        is_small = original.numel() * original.element_size() <= _MOST_BYTES
        if not is_small and id(original) not in self._shared:
            self._shared[id(original)] = weakref.ref(original), name, _version(original)
        return is_small

    def written_while_shared(self) -> list[str]:
        """The names of large tensors that all replicas have written to at once."""
        names = []
        for reference, name, version in self._shared.values():
            tensor = reference()
            if tensor is not None and _version(tensor) != version:
                names.append(name)
        return names


class BufferCopies:
    """The buffers of a copy of a module.

    Args:
        modules: The master's.
        names: The name of each.
        recorded: Those whose buffers no step writes to, since batch statistics are kept elsewhere.
        tensors: The replica's copies.

    Attributes:
        holders: For each module the master's buffers, the copy's, and what their names begin with.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        names: Sequence[str],
        recorded: Sequence[nn.Module],
        tensors: Tensors,
    ) -> None:
        self._tensors = tensors
        self._recorded = [any(module is layer for layer in recorded) for module in modules]
        self._known: dict[tuple[int, str], TensorCopy] = {}
        self.holders: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None], str]] = [
            (buffers_of(module), {}, f"{name}." if name else "")
            for module, name in zip(modules, names, strict=True)
        ]
        self.refresh()

    def holder(self, index: int) -> dict[str, Tensor | None]:
        """The buffers of the copy of module `index`."""
        return self.holders[index][1]

    def is_recorded(self, index: int) -> bool:
        """Return whether no step writes to the buffers of a module."""
        return self._recorded[index]

    def known(self, index: int, name: str) -> TensorCopy | None:
        """A buffer as it was at the start of the step."""
        return self._known.get((index, name))

    def refresh(self) -> None:
        """Copy what has been written to, on either side, and what has been set anew."""
        self._known = {}
        for index, (originals, copies, prefix) in enumerate(self.holders):
            if not originals and not copies:
                continue
            may_change = not self._recorded[index]
            for name, original in originals.items():
                copies[name] = None
                if original is not None:
                    copies[name] = self._tensors.of(original, prefix + name, True, may_change)
                    known = self._tensors.find(original)
                    assert known is not None
                    self._known[index, name] = known
            for name in copies.keys() - originals.keys():
                del copies[name]


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is plain data: no graph, no subclass, no wrapper."""
    return (
        type(tensor) is Tensor
        and not tensor.requires_grad
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_meta
        and not is_functorch_wrapped(tensor)
    )


def _version(tensor: Any) -> int:
    return 0 if tensor.is_inference() else version_of(tensor)
