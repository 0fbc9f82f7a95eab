"""Checks of a pipeline's options."""

from collections.abc import Sequence
from typing import Any

from lightning_mgpu.engine.pipeline.runtime.checkpointing import CHECKPOINTS
from lightning_mgpu.format import parsed_bytes

_BALANCES = ("parameters", "time", "memory", "auto")


def check_choice(strategy: str, option: str, given: Any, choices: Sequence[Any]) -> None:
    """Refuse what is none of an option's choices."""
    if given not in choices:
        raise ValueError(
            f"`{strategy}({option}={given!r})`: use one of {', '.join(map(repr, choices))}."
        )


def check_stages_per_device(strategy: str, given: Any, split_at: Any, balance: Any) -> None:
    """Refuse what is no number of stages, or contradicts the cut."""
    if given != "auto" and (not isinstance(given, int) or given < 1):
        raise ValueError(
            f"`{strategy}(stages_per_device={given!r})`: give a number of stages, at least 1, or"
            " 'auto'."
        )
    for option, value in (("split_at", split_at), ("balance", balance)):
        if (
            given == "auto"
            and value is not None
            and (option == "split_at" or value not in _BALANCES)
        ):
            raise ValueError(
                f"`{strategy}(stages_per_device='auto', {option}={value!r})`: `{option}` says how"
                " many stages there are. Give the number of stages per device, or leave it out."
            )


def check_checkpoint(strategy: str, given: Any, stages_per_device: Any) -> None:
    """Refuse what says nothing of micro-batches, or of stages whose number is not known yet."""
    if isinstance(given, str):
        check_choice(strategy, "checkpoint", given, CHECKPOINTS)
        return
    if not isinstance(given, Sequence) or not given or not {*given} <= {*CHECKPOINTS}:
        raise ValueError(
            f"`{strategy}(checkpoint={given!r})`: use one of {', '.join(map(repr, CHECKPOINTS))},"
            " or a list with one of them for each stage."
        )
    if stages_per_device == "auto":
        raise ValueError(
            f"`{strategy}(stages_per_device='auto', checkpoint={list(given)})`: a list is for a"
            " number of stages. Give the number of stages per device, or `memory`, which chooses"
            " what is computed again."
        )


def check_count_of_checkpoints(strategy: str, given: Any, stages: int) -> None:
    """Refuse a list that is not for as many stages as there are."""
    if not isinstance(given, str) and len(given) != stages:
        raise ValueError(
            f"`{strategy}(checkpoint={list(given)})`: there are {stages} stages, so give as many"
            " entries, or one word for all."
        )


def memory_bytes(strategy: str, given: Any) -> float | None:
    """The bytes of each device.

    Raises:
        ValueError: It is no size.
    """
    if given is None:
        return None
    size = parsed_bytes(given) if isinstance(given, str) else given
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not size > 0:
        raise ValueError(
            f"`{strategy}(memory={given!r})`: give the memory of each device, as '8GB' (or 'MB',"
            " 'GiB', ...), or a number of bytes."
        )
    return float(size)


def check_choices(strategy: str, split_at: Any, balance: Any, chunks: Any) -> None:
    """Refuse cuts and numbers of micro-batches that make no sense."""
    if chunks not in (None, "auto") and (not isinstance(chunks, int) or chunks < 1):
        raise ValueError(
            f"`{strategy}(chunks={chunks!r})`: give a number of micro-batches, at least 1, or"
            " 'auto'."
        )
    if split_at is not None and balance is not None:
        raise ValueError(
            f"`{strategy}(split_at={split_at!r}, balance={balance!r})`: both say where to"
            " cut; leave one out."
        )
    if isinstance(balance, str) and balance not in _BALANCES:
        raise ValueError(
            f"`{strategy}(balance={balance!r})`: use one of"
            f" {', '.join(map(repr, _BALANCES))}, or a list of the number of layers in each stage."
        )
    if balance is not None and not isinstance(balance, str) and min(balance, default=0) < 1:
        raise ValueError(
            f"`{strategy}(balance={list(balance)})`: each stage needs at least one layer."
        )
