"""Compare the ranks' models: their structure, and parameters by hash."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements at a time, so that hashing takes little memory.
_CHUNK = 2**20
# Odd, as are all weights, so that no single change of an element is lost.
_FACTOR = 0x5851F42D4C957F2D


class RanksDivergedError(RuntimeError):
    """The ranks of a DDP strategy do not have the same model, or do not log the same."""


class DivergenceCheck:
    """Compare parameters between the ranks, every so many optimizer steps.

    Args:
        every: Number of steps.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._last: int | None = None

    def is_due(self, step: int) -> bool:
        """Return whether to compare now; to be asked between steps, on all ranks.

        Args:
            step: Optimizer steps so far, which may go up by more than one.
        """
        turn = step // self._every
        last, self._last = self._last, turn
        # What was loaded, or has not been trained, is as it was sent to all ranks.
        return last is not None and turn > last

    def compare(
        self,
        parameters: Mapping[str, Tensor],
        logged: Sequence[str],
        step: int,
        device: torch.device,
    ) -> None:
        """Compare parameters bit by bit, and what is logged; called on all ranks.

        Args:
            parameters: By name.
            logged: Names of what is averaged over the ranks, in that order.
            step: Optimizer steps so far, for the message.
            device: Where tensors are that the ranks exchange.

        Raises:
            RanksDivergedError: Names the first that differs, on all ranks.
        """
        hashes = _hashes(parameters.values(), device)
        digests = torch.tensor([_digest(_structure(parameters)), _digest(logged)], device=device)
        structures, names, totals = _of_all_ranks(
            torch.cat([digests, fingerprint(hashes)[None]])
        ).unbind(1)
        if _unlike_the_first(structures):
            _refuse_structure(parameters, f"After {step} optimizer steps")
        if others := _unlike_the_first(names):
            _refuse_names(logged, others[0])
        if not _unlike_the_first(totals):
            return
        differing = [
            (name, _unlike_the_first(values))
            for name, values in zip(parameters, _of_all_ranks(hashes).unbind(1), strict=True)
        ]
        found = [(name, others) for name, others in differing if others]
        name, others = found[0]
        rest = f" and {len(found) - 1} more of {len(parameters)}" if len(found) > 1 else ""
        raise RanksDivergedError(
            f"After {step} optimizer steps the parameter `{name}`{rest} on {_ranks(others)} is not"
            " what it is on rank 0: the ranks train different models. Look for what only some ranks"
            " do (`if self.global_rank == 0`), parameters that are changed by random numbers, and"
            " gradients that are not averaged (`no_sync`, `torch.autograd.grad`)."
        )


def compare_structure(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Compare names, shapes and dtypes of tensors that rank 0 is about to send to the others.

    Where they differ, the others would take a part of what comes, or read on.

    Args:
        tensors: By name.
        device: Where tensors are that the ranks exchange.

    Raises:
        RanksDivergedError: Names the first that differs, on all ranks.
    """
    digests = _of_all_ranks(torch.tensor([_digest(_structure(tensors))], device=device))
    if _unlike_the_first(digests.flatten()):
        _refuse_structure(tensors, "Before training")


def _refuse_structure(tensors: Mapping[str, Tensor], when: str) -> None:
    structures = [dict(each) for each in _objects(_structure(tensors))]
    for rank, structure in enumerate(structures):
        for name in {**structures[0], **structure}:
            ours, theirs = structures[0].get(name, "missing"), structure.get(name, "missing")
            if ours != theirs:
                raise RanksDivergedError(
                    f"{when} the ranks have different models: `{name}` is {theirs} on rank {rank},"
                    f" and {ours} on rank 0. Build, add and replace parameters and buffers on all"
                    " ranks alike."
                )
    raise RanksDivergedError(f"{when} the ranks have their parameters in different orders.")


def _refuse_names(logged: Sequence[str], rank: int) -> None:
    everyone = _objects(list(logged))
    raise RanksDivergedError(
        f"The ranks log different values with `sync_dist=True`: rank 0 {_listed(everyone[0])}, and"
        f" rank {rank} {_listed(everyone[rank])}. They are averaged over the ranks in this order,"
        " whatever their names are. Log the same on all ranks, or without `sync_dist`."
    )


def _hashes(tensors: Collection[Tensor], device: torch.device) -> Tensor:
    sizes: dict[torch.device, int] = {}
    for tensor in tensors:
        # Twice, for the parts of a complex number.
        sizes[tensor.device] = max(2 * tensor.numel(), sizes.get(tensor.device, 0))
    weights = {where: weights_on(where, size) for where, size in sizes.items()}
    return torch.stack([fingerprint(each, weights[each.device]).to(device) for each in tensors])


def _structure(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    return [(name, f"{list(each.shape)} {each.dtype}") for name, each in tensors.items()]


def _digest(parts: Sequence[object]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def _objects(ours: list[Any]) -> list[list[Any]]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, ours)
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def fingerprint(tensor: Tensor, weights: Tensor | None = None) -> Tensor:
    """Hash of a tensor's bits, in the order of its elements; int64, on its device.

    Args:
        tensor: Any dense tensor.
        weights: Those of `weights_on` its device, to use for several tensors.
    """
    flat = tensor.detach()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    if weights is None:
        weights = weights_on(flat.device, len(bits))
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        total = total * _FACTOR + (part * weights[: len(part)]).sum()
    return total


def weights_on(device: torch.device, size: int) -> Tensor:
    """Odd numbers, one for each element, but for what exceeds a chunk."""
    places = torch.arange(min(size, _CHUNK), device=device)
    return ((places * _FACTOR) ^ (places << 32)) * 2 + 1


def _of_all_ranks(tensor: Tensor) -> Tensor:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered).cpu()


def _unlike_the_first(values: Tensor) -> list[int]:
    return (values != values[0]).nonzero().flatten().tolist()


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
