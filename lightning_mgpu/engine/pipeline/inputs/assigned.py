"""Tensors that the step sets as attributes of the split module before it calls it."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import BLANK, WEIGHTS, buffers_of
from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.microbatch import SplitError


class Assigned:
    """Finds attributes with an entry per sample, which every micro-batch would see whole.

    Args:
        modules: All modules that stages run, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self.update(modules)

    def update(self, modules: Mapping[str, nn.Module]) -> None:
        """Accept the tensors that the modules hold now."""
        tensors = [found.tensor for found in _attributes(modules)]
        self._known = {id(tensor): weakref.ref(tensor) for tensor in tensors}

    def check(
        self,
        modules: Mapping[str, nn.Module],
        size: int,
        batch: StepBatch,
        is_used: Callable[[dict[str, Any], str], bool],
    ) -> None:
        """Refuse tensors with an entry per sample that have been set since `update`.

        Args:
            modules: All modules that stages run, by name.
            size: Samples in the batch.
            batch: The step's batch.
            is_used: Whether `forward` reads an entry of a module's attributes.

        Raises:
            SplitError: Names the attribute.
        """
        new = [found for found in _attributes(modules) if not self._knows(found.tensor)]
        if not new:
            return
        for found in new:
            tensor, is_buffer = found.tensor, found.place is None
            of_batch = tensor.dim() and batch.has(tensor)
            # A buffer may have another tensor since it was moved.
            by_length = tensor.dim() and tensor.shape[0] == size and not is_buffer
            if (of_batch or by_length) and is_used(found.holder, found.key):
                raise SplitError(
                    f"{found.title} of shape {tuple(tensor.shape)} was set before the call and has"
                    f" an entry per sample (the batch has {size}), but every micro-batch would"
                    " see all of it. Pass it as an argument of the split module's `forward`."
                )

    def _knows(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known() is tensor


class _Attribute(NamedTuple):
    """A tensor that a module holds.

    Attributes:
        path: Name of the module.
        module: The module.
        holder: Where it has the entry.
        key: The entry's name.
        place: Where in the entry the tensor is, such as ``[0]``; `None` of a buffer.
        tensor: The tensor.
    """

    path: str
    module: nn.Module
    holder: dict[str, Any]
    key: str
    place: str | None
    tensor: Tensor

    @property
    def title(self) -> str:
        where = f" (in `{self.path}`)" if self.path else ""
        kind = "buffer " if self.place is None else ""
        return f"{kind}`{type(self.module).__name__}.{self.key}{self.place or ''}`{where}"


def _attributes(modules: Mapping[str, nn.Module]) -> Iterator[_Attribute]:
    # Done twice a call for all modules, so that what is no tensor has to be passed over quickly.
    for path, module in modules.items():
        state = vars(module)
        for name, value in list(state.items()):
            kind = type(value)
            if name in _OWN or kind in _PLAIN:
                continue
            if kind in _CONTAINERS:
                if _PLAIN.issuperset(map(type, value)) and kind is not dict:
                    continue
                for place, leaf in leaves(value, ""):
                    if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
                        yield _Attribute(path, module, state, name, place, leaf)
            elif isinstance(value, Tensor):
                # (Parameters are no plain attributes, and `isinstance` of them takes long.)
                yield _Attribute(path, module, state, name, "", value)
        buffers: dict[str, Any] = buffers_of(module)
        for name, buffer in buffers.items():
            if buffer is not None:
                yield _Attribute(path, module, buffers, name, None, buffer)


_CONTAINERS = (list, tuple, dict)
_PLAIN = frozenset({bool, int, float, str, type(None)})
_OWN = BLANK | {WEIGHTS}
