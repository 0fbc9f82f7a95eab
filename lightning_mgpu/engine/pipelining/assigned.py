"""Tensors that the step sets as attributes of the split module before it calls it."""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.pipelining.microbatch import SplitError
from lightning_mgpu.engine.pipelining.origin import StepBatch

__all__: list[str] = []


class Assigned:
    """Finds attributes with an entry per sample, which every micro-batch would see whole.

    Args:
        modules: All modules that stages run, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self.update(modules)

    def update(self, modules: Mapping[str, nn.Module]) -> None:
        """Take what the modules hold now for their own."""
        self._known = {id(t): weakref.ref(t) for _, t in _attributes(modules)}

    def check(self, modules: Mapping[str, nn.Module], size: int, batch: Any) -> None:
        """Refuse tensors with an entry per sample that have been set since `update`.

        Args:
            modules: All modules that stages run, by name.
            size: Samples in the batch.
            batch: The step's batch.

        Raises:
            SplitError: Names the attribute.
        """
        new = [(title, t) for title, t in _attributes(modules) if not self._knows(t)]
        if not new:
            return
        known = StepBatch(batch)
        for title, tensor in new:
            if tensor.dim() and (tensor.shape[0] == size or known.has(tensor)):
                raise SplitError(
                    f"{title} of shape {tuple(tensor.shape)} was set before the call and has an"
                    f" entry per sample (the batch has {size}), but every micro-batch would see all"
                    " of it. Hand it on as an argument of the split module's `forward`; or keep it"
                    " outside of that module, if it is for something else."
                )

    def _knows(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known() is tensor


def _attributes(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for path, module in modules.items():
        for name, value in vars(module).items():
            if isinstance(value, nn.Parameter):
                continue
            if not isinstance(value, Tensor) and (type(value) not in _CONTAINERS or name in _OWN):
                continue
            where = f" (in `{path}`)" if path else ""
            for place, leaf in leaves(value, f"{type(module).__name__}.{name}"):
                if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
                    yield f"`{place}`{where}", leaf


_CONTAINERS = (list, tuple, dict)
_OWN = frozenset(vars(nn.Module())) | {"_flat_weights"}
