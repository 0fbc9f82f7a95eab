"""Report what `forward` leaves in modules that does not cover the whole batch."""

import logging
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.pipeline.check.module_state import ModuleSnapshot, differing
from lightning_mgpu.engine.pipeline.microbatch import SplitError

log = logging.getLogger(__name__)


class LeftBehind:
    """Find attributes, buffers and hooks' containers that belong to one micro-batch.

    Args:
        mode: Whether what requires a gradient is an ``"error"``.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._said: set[str] = set()

    def report(
        self,
        whole: ModuleSnapshot,
        parts: ModuleSnapshot,
        last: ModuleSnapshot,
        coarse: torch.dtype | None,
    ) -> None:
        """Compare what the whole batch leaves behind with what its parts leave, one after another.

        Counts and sums that come out alike are right, and so are caches. Plain numbers that each
        call sets anew, such as the size of its batch, are of use in `forward` only.

        Args:
            whole: After the whole batch.
            parts: After two micro-batches.
            last: After the second alone.
            coarse: The least precise dtype that was computed in.

        Raises:
            SplitError: One of them requires a gradient.
        """
        found = [title for title in differing(whole, parts, coarse)]
        found = [title for title in found if not _is_passing(title, whole, parts, last)]
        with_gradient = [t for t in found if whole.leaves.get(t, (None, False))[1]]
        if with_gradient:
            text = (
                f"{_listed(with_gradient)}: set by `forward`, which runs once for each"
                " micro-batch: it covers one of them only, and its gradient is wrong or"
                " missing if it is added to the loss. Return it from the split module's"
                " `forward` with an entry per sample, and take the mean in the step; if it is"
                " only displayed, set a `.detach()`ed tensor."
            )
            if self._mode == "error":
                raise SplitError(f"{text} To continue anyway: `parity_check='warn'`.")
            self._warn(with_gradient, text)
        others = [title for title in found if title not in with_gradient]
        self._warn(
            others,
            f"{_listed(others)}: changed by `forward`, which runs once for each micro-batch:"
            " it covers one of them only, or was updated more often than on one device."
            " Return it from the split module's `forward`, or update it in the step;"
            " `chunks=1` behaves as one device.",
        )

    def _warn(self, titles: list[str], text: str) -> None:
        if not self._said.issuperset(titles):
            self._said.update(titles)
            log.warning(text)


def _is_passing(
    title: str, whole: ModuleSnapshot, parts: ModuleSnapshot, last: ModuleSnapshot
) -> bool:
    """Return whether an attribute is a plain value that describes the current call only."""
    found = [held.leaves.get(title, (None, False))[0] for held in (whole, parts, last)]
    if any(isinstance(value, (Tensor, float, complex)) for value in found):
        return False
    return _same(found[1], found[2]) or title.lstrip("`").partition(".")[2].startswith("_")


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _listed(titles: list[str]) -> str:
    more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
    return ", ".join(titles[:3]) + more
