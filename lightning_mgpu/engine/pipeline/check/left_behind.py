"""Say what `forward` leaves behind in modules that is not the whole batch's."""

import logging
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.pipeline.check.module_state import Held, differing
from lightning_mgpu.engine.pipeline.microbatch import SplitError

log = logging.getLogger(__name__)


class LeftBehind:
    """Names attributes, buffers and hooks' containers that belong to one micro-batch.

    Args:
        mode: Whether what requires a gradient is an ``"error"``.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._said: set[str] = set()

    def report(self, whole: Held, parts: Held, last: Held, coarse: torch.dtype | None) -> None:
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
                f"{_listed(with_gradient)}: set by `forward`, and that runs once for each"
                " micro-batch, so that it belongs to one of them and its gradient is wrong or"
                " missing if it is added to the loss. Return it from the split module's `forward`"
                " with an entry per sample, and take the mean in the step; if it is only looked"
                " at, set a `.detach()`ed tensor."
            )
            if self._mode == "error":
                raise SplitError(f"{text} To go on all the same: `parity_check='warn'`.")
            self._warn(with_gradient, text)
        others = [title for title in found if title not in with_gradient]
        self._warn(
            others,
            f"{_listed(others)}: changed by `forward`, which runs once for each micro-batch. So it"
            " belongs to one of them, or has been updated more often than on one device. Return it"
            " from the split module's `forward`, or update it in the step; `chunks=1` is as on one"
            " device.",
        )

    def _warn(self, titles: list[str], text: str) -> None:
        if not self._said.issuperset(titles):
            self._said.update(titles)
            log.warning(text)


def _is_passing(title: str, whole: Held, parts: Held, last: Held) -> bool:
    """Whether it is a plain value that only says something about the call at hand."""
    found = [held.leaves.get(title, (None, False))[0] for held in (whole, parts, last)]
    if any(isinstance(value, (Tensor, float, complex)) for value in found):
        return False
    return _same(found[1], found[2]) or title.lstrip("`").partition(".")[2].startswith("_")


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _listed(titles: list[str]) -> str:
    more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
    return ", ".join(titles[:3]) + more
