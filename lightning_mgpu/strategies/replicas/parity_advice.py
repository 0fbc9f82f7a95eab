"""Messages about steps that compute something else on shards: place, reasons, advice."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import BatchNorm
from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.compare import Difference, compare, parts_of
from lightning_mgpu.strategies.replicas.dry_run import Result
from lightning_mgpu.strategies.replicas.replica_step import Step

_SHOWN = 5


@dataclass(frozen=True)
class Findings:
    """A step whose results differ, with the differences and conditions."""

    step: Step
    batch: Any
    master: nn.Module
    whole: Result
    parts: list[Result]
    differences: list[Difference]
    doubts: list[str]

    @property
    def nan(self) -> str | None:
        """Message about values that are NaN on some replicas only, if there are any."""
        return nan_message(self.step, _by_shard(self))


def message(found: Findings) -> str:
    """Full message, in several lines."""
    step, differences = found.step, found.differences
    lines = [
        f"`{step.name}` gives different results on {len(step.sizes)} shards (of"
        f" {', '.join(map(str, step.sizes))} samples) than on the whole batch, so"
        " `strategy='dp'` does not give the result of one device:",
        *(f"  {difference}" for difference in differences[:_SHOWN]),
    ]
    if len(differences) > _SHOWN:
        lines.append(f"  and {len(differences) - _SHOWN} more")
    lines += _reasons(found)
    lines.append(
        "`DataParallelStrategy(parity_check='off')` turns off this comparison of the first"
        " batch (see docs/strategies.md)."
    )
    return "\n".join(lines)


def nan_message(step: Step, values: Mapping[str, Sequence[Any]]) -> str | None:
    """Message about values that are NaN on some replicas only; `None` if there are none."""
    for path, column in values.items():
        known = {slot: _is_nan(value) for slot, value in enumerate(column) if value is not None}
        bad = [slot for slot, is_nan in known.items() if is_nan]
        if bad and len(bad) < len(known):
            return (
                f"{path} is NaN on {step.describe(bad[0])}, and a number on others. A shard may"
                " have nothing to average over (no labels, all of them `ignore_index`): divide by"
                " `max(count, 1)`, or return `None` as the loss of such a shard."
            )
    return None


def loss_in(output: Any) -> Tensor | None:
    """Loss in the return value of `training_step`."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _reasons(found: Findings) -> Iterator[str]:
    values = {d.path for d in found.differences if not d.path.startswith("output")}
    special = [*_went_whole(found), *_rows(found), *_statistics(found)]
    special += [f"{doubt}: see docs/batches.md for what to do." for doubt in found.doubts]
    yield from special
    if found.nan is not None:
        yield found.nan[0].upper() + found.nan[1:]
        yield _DENOMINATOR
    elif "loss" in values and _is_sum(found):
        yield (
            "The loss of the batch is the sum of the shards' losses, and `dp` takes their"
            " mean: use a mean over samples (`reduction='mean'`, or divide by a constant"
            " number of them). If it is divided by their number already, take that from the"
            " shard (`len(x)`) rather than from a value for the whole batch."
        )
    elif values:
        yield _DENOMINATOR
        yield _COUPLED
        if "loss" not in values:
            yield _COUNT
    elif not special:
        yield _OUTPUT
        yield _COUPLED


_DENOMINATOR = (
    "If it is a mean over something other than samples (class weights, `ignore_index`,"
    " tokens), weigh shards by that: `DataParallelStrategy(scatter_fn=...)` with"
    " `Shard(batch, size)`, where size is the sum of weights or the number of tokens."
)
_COUPLED = (
    "If it depends on the other samples of the batch (contrastive losses, statistics or"
    " normalisation by the batch, mixup, episodes), no split can match it: use"
    " `strategy='pipeline'`, which computes the loss on the whole batch."
)
_COUNT = "If it is a count or a sum, log it with `reduce_fx='sum'`, or return an entry per sample."
_OUTPUT = (
    "Return a row of a tensor, or an entry of a list, for each sample, or join the replicas'"
    " outputs in `DataParallelStrategy(gather_fn=...)`."
)


def _went_whole(found: Findings) -> Iterator[str]:
    shard = found.step.shards[0].batch
    for path, value in _whole_in(found.batch, shard, "batch"):
        what = f"of shape {tuple(value.shape)}" if hasattr(value, "shape") else f"of {len(value)}"
        yield (
            f"`{path}` (a {type(value).__name__} {what}) went whole to every replica: if it belongs"
            " to the samples, give it an entry for each, or split it in"
            " `DataParallelStrategy(scatter_fn=...)`."
        )


def _whole_in(whole: Any, shard: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Lists and tensors of a batch that a shard has whole, with their access paths."""
    parts, others = parts_of(whole), parts_of(shard)
    if parts is not None and others is not None and parts.keys() == others.keys():
        if _is_column(whole):
            yield path, whole
            return
        for name, part in parts.items():
            yield from _whole_in(part, others[name], path + name)
    elif parts is None and _shape(whole) and _shape(whole) == _shape(shard):
        yield path, whole


def _is_column(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        return False
    return not any(_shape(leaf) for _, leaf in leaves(list(value)))


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor or array; empty if it is neither."""
    return tuple(getattr(value, "shape", ()))


def _rows(found: Findings) -> Iterator[str]:
    """Describe output tensors whose first dimension is not the samples'."""
    sizes, total = found.step.sizes, sum(found.step.sizes)
    columns = [dict(leaves(part.output, "output")) for part in found.parts]
    wrong = {difference.path for difference in found.differences}
    for path, value in leaves(found.whole.output, "output"):
        whole, shapes = _shape(value), [_shape(column.get(path)) for column in columns]
        if path not in wrong or not whole or not all(shapes):
            continue
        rows = [shape[0] for shape in shapes]
        if rows == sizes and whole[0] == total:
            continue
        if whole[0] != total and whole[1:2] == (total,) and [s[1] for s in shapes] == sizes:
            yield (
                f"`{path}` of shape {whole} has the samples as dimension 1: return it with the"
                " samples first, or join it in `DataParallelStrategy(gather_fn=...)`."
            )
        else:
            yield (
                f"`{path}` has {whole[0]} rows for {total} samples, so its rows are not the"
                " samples: join it in `DataParallelStrategy(gather_fn=...)`, or sum it in a"
                " torchmetrics object."
            )


def _statistics(found: Findings) -> Iterator[str]:
    for name, module in found.master.named_modules():
        if isinstance(module, BatchNorm) and module.running_mean is None:
            yield (
                f"`{name}` (a {type(module).__name__}) keeps no running statistics, and normalises"
                " each shard by its own."
            )


def _by_shard(found: Findings) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {"loss": [loss_in(part.output) for part in found.parts]}
    for key in found.whole.logs.calls:
        calls = [part.logs.calls.get(key) for part in found.parts]
        values[f"logged[{key[0]!r}]"] = [None if call is None else call.value for call in calls]
    return values


def _is_sum(found: Findings) -> bool:
    losses = [loss_in(part.output) for part in found.parts]
    whole = loss_in(found.whole.output)
    if whole is None or any(loss is None for loss in losses):
        return False
    total = torch.stack([loss.detach().reshape(()) for loss in losses if loss is not None]).sum()
    return not compare(whole.detach().reshape(()), total)


def _is_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    return isinstance(value, float) and math.isnan(value)
