"""Arguments split by entry: lists with one entry per sample, batches of graphs."""

import copy
import logging
from typing import Any

from torch import Tensor

from lightning_mgpu.engine.batch.containers import is_array, is_sequence, leaves, rebuild
from lightning_mgpu.engine.batch.graphs import (
    attributes_of_graphs,
    graph_count,
    is_graph_batch,
    take_graphs,
    tensors_of_graphs,
)
from lightning_mgpu.engine.batch.inspection import signature
from lightning_mgpu.engine.pipeline.microbatch import SplitError

log = logging.getLogger(__name__)


def length(piece: Any) -> int:
    """Number of samples."""
    return graph_count(piece) if is_graph_batch(piece) else len(piece)


def take(piece: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop`; tensors are the same, or views.

    Raises:
        SplitError: It is not known which part belongs to which graph.
    """
    if not is_graph_batch(piece):
        return rebuild(piece, list(piece)[start:stop])
    try:
        return take_graphs(piece, start, stop)
    except ValueError as error:
        raise SplitError(str(error)) from error


def copied(piece: Any) -> Any:
    """A copy that may be written to, where there can be one."""
    try:
        return copy.deepcopy(piece)
    except Exception:
        log.debug("A `%s` cannot be copied.", type(piece).__name__, exc_info=True)
        return piece


def tensors_of(piece: Any) -> list[Tensor]:
    """The tensors in it."""
    if is_graph_batch(piece):
        return tensors_of_graphs(piece)
    return [leaf for _, leaf in leaves(piece) if isinstance(leaf, Tensor)]


def held_by(piece: Any) -> list[Any]:
    """Objects held by the piece, to tell by `is` whether it has been written to."""
    return attributes_of_graphs(piece) if is_graph_batch(piece) else list(piece)


def may_be_entries(value: Any, size: int) -> bool:
    """Return whether a list may have an entry per sample, unlike `[inputs, masks]`."""
    if not is_sequence(value) or len(value) != size:
        return False
    lengths = _lengths(value)
    if not lengths:
        return any(entry is not None for entry in value)
    return lengths != {size} and len({signature(entry) for entry in value}) == 1


def may_be_columns(value: Any) -> bool:
    """Return whether a list holds arrays of one length, which may be the batch's."""
    lengths = _lengths(value)
    return len(lengths) == 1 and lengths != {None}


def _lengths(value: Any) -> set[int | None]:
    """The first dimensions of arrays; `None` of tensors without dimensions."""
    arrays = (leaf for _, leaf in leaves(value) if is_array(leaf) or isinstance(leaf, Tensor))
    return {array.shape[0] if array.shape else None for array in arrays}


def differ(piece: Any) -> bool:
    """Return whether the entries are not all the same."""
    if isinstance(piece, Tensor):
        return bool((piece != piece[:1]).any())
    try:
        return any(entry != piece[0] for entry in piece)
    except Exception:  # arrays, or objects that cannot be compared
        return True
