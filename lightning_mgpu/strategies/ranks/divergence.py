"""Compare the ranks' parameters by hash."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements at a time, so that hashing takes little memory.
_CHUNK = 2**20
# Odd, as are all weights, so that no single change of an element is lost.
_FACTOR = 0x5851F42D4C957F2D


class RanksDivergedError(RuntimeError):
    """The ranks of a DDP strategy do not have the same parameters."""


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

    def compare(self, parameters: Mapping[str, Tensor], step: int, device: torch.device) -> None:
        """Compare parameters bit by bit; called on all ranks.

        Args:
            parameters: By name.
            step: Optimizer steps so far, for the message.
            device: Where tensors are that the ranks exchange.

        Raises:
            RanksDivergedError: Names the first that differs, on all ranks.
        """
        hashes = torch.stack([fingerprint(each).to(device) for each in parameters.values()])
        structure = [(name, tuple(each.shape), each.dtype) for name, each in parameters.items()]
        digest = hashlib.blake2b(repr(structure).encode(), digest_size=7).digest()
        kind = torch.tensor(int.from_bytes(digest, "big"), device=device)
        kinds, totals = _of_all_ranks(torch.stack([kind, fingerprint(hashes)])).unbind(1)
        if others := _unlike_the_first(kinds):
            raise RanksDivergedError(
                f"After {step} optimizer steps the ranks have different parameters: names, shapes"
                f" or dtypes on {_ranks(others)} are not those of rank 0, which has"
                f" {len(structure)}. Add and replace parameters on all ranks alike."
            )
        if not _unlike_the_first(totals):
            return
        differing = [
            (name, _unlike_the_first(values))
            for name, values in zip(parameters, _of_all_ranks(hashes).unbind(1), strict=True)
        ]
        found = [(name, others) for name, others in differing if others]
        name, others = found[0]
        rest = f" and {len(found) - 1} more of {len(structure)}" if len(found) > 1 else ""
        raise RanksDivergedError(
            f"After {step} optimizer steps the parameter `{name}`{rest} on {_ranks(others)} is not"
            " what it is on rank 0: the ranks train different models. Look for what only some ranks"
            " do (`if self.global_rank == 0`), parameters that are changed by random numbers, and"
            " gradients that are not averaged (`no_sync`, `torch.autograd.grad`)."
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """Hash of a tensor's bits, in the order of its elements; int64, on its device."""
    flat = tensor.detach()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(part), device=flat.device)
        weights = (places * _FACTOR) ^ (places << 32)
        total += (part * (weights * 2 + 1)).sum()
    return total


def _of_all_ranks(tensor: Tensor) -> Tensor:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered).cpu()


def _unlike_the_first(values: Tensor) -> list[int]:
    return (values != values[0]).nonzero().flatten().tolist()


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
