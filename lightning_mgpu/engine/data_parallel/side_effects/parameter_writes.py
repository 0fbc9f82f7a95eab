"""Detect that a step writes to parameters, which all replicas would do at once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_mgpu.engine.parameter_leaves import Leaves

_FIRST_STEPS = 3
_SAMPLES = 16


class WriteCheck:
    """Compares parameters before and after a step.

    Writes through torch move a version counter, those by `.data` of a leaf as well, and `p.data =
    ...` leaves a mark on the leaf: both show in every step. What goes around torch, by NumPy or the
    parameters of an optimizer, shows in values: they are compared at the first steps of each kind
    and then at ever longer intervals, by some elements of each parameter.

    Args:
        names: Of the parameters.
        parameters: The master's.
        leaves: Each slot's.
    """

    def __init__(
        self, names: Sequence[str], parameters: Sequence[nn.Parameter], leaves: Sequence[Leaves]
    ) -> None:
        self._names, self._parameters, self._leaves = names, parameters, leaves
        self._versions: list[list[int]] = []
        self._values: list[Tensor] | None = None
        self._kinds: dict[str, int] = {}
        self._compares = False

    def begin(self, kind: str) -> None:
        """Start a step."""
        number = self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._compares = number <= _FIRST_STEPS or number & (number - 1) == 0
        self.note()

    def note(self) -> None:
        """Record the current versions of the parameters."""
        self._versions = self._now()
        self._values = self._sampled() if self._compares else None
        for leaves in self._leaves:
            leaves.assigned().clear()

    def check(self) -> None:
        """Raise an error if parameters have been written to since.

        Raises:
            RuntimeError: Names them.
        """
        written: set[int] = set()
        now = self._now()
        if now != self._versions:
            for versions, before in zip(now, self._versions, strict=True):
                pairs = zip(versions, before, strict=True)
                written.update(index for index, (a, b) in enumerate(pairs) if a != b)
        for leaves in self._leaves:
            written.update(leaves.assigned())
        if not written and self._values is not None:
            values = zip(self._sampled(), self._values, strict=True)
            written.update(index for index, (a, b) in enumerate(values) if not _same(a, b))
        if written:
            names = [f"`{self._names[index]}`" for index in sorted(written)]
            more = f" and {len(names) - 1} others" if len(names) > 1 else ""
            raise RuntimeError(
                f"The step writes to the parameter {names[0]} in place{more}. All replicas do"
                " so at once, in shared memory. Do it in a hook, which runs once:"
                " `on_train_batch_end` (after the optimizer's step) or `on_before_backward`"
                " (before it), for instance. Its values may have changed already: start again"
                " from a checkpoint or a new model."
            )

    def _now(self) -> list[list[int]]:
        """Version counters of the leaves, by memory; aliases share slot 0's."""
        first, *others = self._leaves
        own = [leaves for leaves in others if not leaves.is_alias()]
        return [leaves.versions() for leaves in (first, *own)]

    @torch.no_grad()
    def _sampled(self) -> list[Tensor]:
        values = []
        for parameter in self._parameters:
            flat = parameter.detach()
            if flat.layout == torch.strided and flat.is_contiguous():
                flat = flat.view(-1)
                flat = flat[:: max(1, flat.numel() // _SAMPLES)]
            values.append(flat.clone())
        return values


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
