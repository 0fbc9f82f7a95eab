"""Proof on the first batch: a few samples as one micro-batch and as two give the same."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mgpu.engine.compare import Difference, compare
from lightning_mgpu.engine.pipelining import joining
from lightning_mgpu.engine.pipelining.arguments import Call
from lightning_mgpu.engine.pipelining.calm import calm
from lightning_mgpu.engine.pipelining.cutter import Cut
from lightning_mgpu.engine.pipelining.held import Held
from lightning_mgpu.engine.pipelining.joining import Layout, Layouts
from lightning_mgpu.engine.pipelining.left_behind import LeftBehind
from lightning_mgpu.engine.pipelining.microbatch import SplitError
from lightning_mgpu.engine.pipelining.output import paths
from lightning_mgpu.engine.pipelining.partition import Name
from lightning_mgpu.engine.pipelining.splitter import Splitting
from lightning_mgpu.engine.pipelining.trial import Trial

log = logging.getLogger(__name__)

__all__: list[str] = []

ParityCheck = Literal["error", "warn", "off"]

# Two and three of them differ in number from each other and from the whole.
_SAMPLES = 5
# Calls that differ in structure are compared each on its own; more kinds are not.
_MAX_KINDS = 64


@dataclass
class _Found:
    """What is known of one kind of call.

    Attributes:
        layouts: Where the batch lies in the output; empty if that was not looked at.
        proven: Whether micro-batches have given what the whole gives, in all tensors.
        error: What has kept it from being found out.
    """

    layouts: Layouts = field(default_factory=dict)
    proven: bool = False
    error: Exception | None = None


class Parity:
    """Compares a module's output for a few samples with that of the same in two micro-batches.

    Args:
        mode: What to do where they differ: ``"error"``, ``"warn"``, or not to compare (``"off"``).
        kind: What to call the module.
        devices: The device of each stage.
        muted: A context in which nothing is logged.
    """

    def __init__(
        self,
        mode: ParityCheck,
        kind: str,
        devices: Sequence[torch.device],
        muted: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._mode, self._kind, self._devices, self._muted = mode, kind, devices, muted
        self._known: dict[Hashable, _Found] = {}
        self._proven: dict[str, Layout] = {}
        self._left_behind = LeftBehind(mode)

    def layouts(
        self, call: Call, cut: Cut, splitting: Splitting, modules: Mapping[str, nn.Module]
    ) -> Layouts:
        """Where the batch lies in the output of a call, which is compared if it is a new kind.

        Args:
            call: The call.
            cut: Its stages.
            splitting: How its arguments are split.
            modules: All modules that stages run, by name.

        Raises:
            SplitError: Micro-batches give something else than the whole batch; or it is doubtful
                whether the arguments may be split like this, and nothing shows that they may.
        """
        root = next(iter(modules.values()))
        key = (root.training, torch.is_grad_enabled(), call.kind, _way(call, splitting))
        found = self._known.get(key)
        if found is None:
            found = _Found()
            if self._mode != "off" and len(self._known) < _MAX_KINDS:
                found = self._examine(call, cut, splitting, dict(modules))
            self._known[key] = found
        if splitting.doubts and not found.proven:
            raise SplitError(" ".join(splitting.doubts)) from found.error
        return found.layouts

    def uses(
        self,
        call: Call,
        cut: Cut,
        splitting: Splitting,
        modules: Mapping[str, nn.Module],
        holder: dict[str, Any],
        key: str,
    ) -> bool:
        """Whether a call reads an attribute; taken for granted if nothing is to be compared.

        Args:
            call: The call.
            cut: Its stages.
            splitting: How its arguments are split.
            modules: All modules that stages run, by name.
            holder: A module's attributes or buffers.
            key: The name of one.
        """
        if self._mode == "off":
            return True
        trial = Trial(cut.partition, self._devices, call.tensors, splitting.dims)
        with self._muted(), calm(modules.values(), self._devices):
            start, before = Held(dict(modules)), holder[key]
            holder[key] = object()  # which nothing can be computed with
            try:
                trial.run(0, 1)
            except Exception:
                return True
            finally:
                holder[key] = before
                start.restore()
        return False

    def _examine(
        self, call: Call, cut: Cut, splitting: Splitting, modules: dict[str, nn.Module]
    ) -> _Found:
        trial = _Comparison(call, cut, splitting, self._devices)
        with self._muted(), calm(modules.values(), self._devices):
            start = Held(modules)
            try:
                trial.run(start, modules)
                layouts = trial.compare(self._proven)
            except SplitError as error:
                # (What cannot be joined cannot be joined of the batch either.)
                raise _explained(error, splitting) from error.__cause__
            except Exception as error:
                log.debug("The first batch is not compared with its parts.", exc_info=True)
                return _Found(error=error)
            finally:
                start.restore()
        self._report(trial.differences, splitting)
        self._left_behind.report(*trial.held)
        proven = bool(trial.compared) and not trial.random and not trial.differences
        if proven:
            self._proven.update(layouts)
        return _Found(layouts, proven)

    def _report(self, differences: Sequence[Difference], splitting: Splitting) -> None:
        if not differences:
            return
        found = "; ".join(map(str, differences[:3]))
        text = (
            f"`{self._kind}.forward` gives other values for micro-batches than for the whole batch:"
            f" {found}. Something in it depends on other samples, such as `x.mean(0)`, `z @ z.T`"
            " or attention along the first dimension. Compute that in the step, from the module's"
            f" output, or use `chunks=1`.{_of(splitting)}"
        )
        if self._mode == "error" or splitting.doubts:
            raise SplitError(f"{text} If it is meant so: `parity_check='warn'`.")
        log.warning(text)


class _Comparison:
    """One call's first samples, whole and in two parts."""

    def __init__(
        self, call: Call, cut: Cut, splitting: Splitting, devices: Sequence[torch.device]
    ) -> None:
        self._partition, self._dims = cut.partition, splitting.dims
        self._trial = Trial(cut.partition, devices, call.tensors, splitting.dims)
        self._arguments = call.tensors.keys()
        self._total = min(_SAMPLES, splitting.size)
        self._counts = [self._total // 2, self._total - self._total // 2]
        self._coarse = _least_precise(cut, devices)
        self.differences: list[Difference] = []
        self.compared = self.random = 0
        """How many tensors have been compared, and how many not, since they are random."""

    def run(self, start: Held, modules: dict[str, nn.Module]) -> None:
        """Compute the samples, each time from what the modules hold at the start."""
        self._start = start
        first = self._counts[0]
        self._whole = self._trial.run(0, self._total)
        after_whole = Held(modules, start)
        start.restore(generators=False)
        second = self._trial.run(first, self._total)
        after_second = Held(modules, start)
        start.restore(generators=False)
        self._parts = [self._trial.run(0, first), second]
        self._trial.run(first, self._total)
        self.held = after_whole, Held(modules, start), after_second, self._coarse
        start.restore(generators=False)

    def compare(self, proven: Layouts) -> dict[str, Layout]:
        """Find out where the batch lies in each tensor, and whether values are the same.

        Args:
            proven: What earlier comparisons have shown.

        Raises:
            SplitError: A tensor of the output has no dimension for the batch.
        """
        layouts: dict[str, Layout] = {}
        unequal: dict[str, Name] = {}
        for name, path in paths(self._partition).items():
            if name in self._arguments or not self._partition.origins[name] & self._dims.keys():
                continue
            values = [self._whole[name], *(part[name] for part in self._parts)]
            for place, column in joining.columns(values, [self._total, *self._counts], path):
                if isinstance(column[0], Tensor):
                    layouts[place], different = self._layout(place, column)
                    self.compared += 1
                    if different:
                        unequal[place] = name
                        self.differences += different
        if unequal:
            self._leave_out_random(unequal, layouts, proven)
        return layouts

    def _layout(self, place: str, column: Sequence[Tensor]) -> tuple[Layout, list[Difference]]:
        whole, *parts = column
        layout = joining.told(column, [self._total, *self._counts], place)
        if layout.dim is None:
            for part in parts:
                if compare(whole, part, place, self._coarse):
                    raise SplitError(joining.unjoinable(place, whole))
            return layout, []
        found = self._compared(whole, parts, layout, place)
        if found and whole.shape[layout.dim] != self._total:
            other = Layout(layout.dim, minor=True)
            if not self._compared(whole, parts, other, place):
                return other, []
        return layout, found

    def _compared(
        self, whole: Tensor, parts: Sequence[Tensor], layout: Layout, place: str
    ) -> list[Difference]:
        return compare(whole, joining.cat(parts, self._counts, layout)[0], place, self._coarse)

    def _leave_out_random(
        self, unequal: Mapping[str, Name], layouts: dict[str, Layout], proven: Layouts
    ) -> None:
        """Take out what differs from itself, too, when it is computed once more."""
        again = self._trial.run(0, self._total)
        self._start.restore(generators=False)
        random = set()
        for name in set(unequal.values()):
            before, now = self._whole[name], again[name]
            for place, column in joining.columns([before, now], [self._total] * 2, "") or ():
                if isinstance(column[0], Tensor) and compare(*column):
                    random.add((name, place))
        paths_of = paths(self._partition)
        for place, name in unequal.items():
            if (name, place.removeprefix(paths_of[name])) not in random:
                continue
            self.random += 1
            self.differences = [d for d in self.differences if d.path != place]
            dim = layouts[place].dim
            tensors = [
                v for p, v in joining.placed(self._whole[name], paths_of[name]) if p == place
            ]
            if dim is not None and tensors[0].shape[dim] != self._total:
                if place not in proven:
                    raise SplitError(joining.unordered(place, tensors[0], self._total))
                layouts[place] = proven[place]


def _way(call: Call, splitting: Splitting) -> Hashable:
    """How each argument is split, or whether one entry of it is for all samples."""
    whole = (name for name, t in call.tensors.items() if t.dim() and name not in splitting.dims)
    single = tuple(name for name in whole if call.tensors[name].shape[0] == 1)
    return tuple(sorted(splitting.dims.items())), single, bool(splitting.doubts)


def _least_precise(cut: Cut, devices: Sequence[torch.device]) -> torch.dtype | None:
    """The dtype whose rounding errors are to be expected."""
    for kind in {"cpu", *(device.type for device in devices)}:
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    found = {t.dtype for tensors in cut.tensors for t in tensors.values() if t.is_floating_point()}
    half = sorted((t for t in found if t.itemsize < 4), key=lambda t: t.itemsize)
    if half:
        return half[0]
    if any(device.type == "cuda" for device in devices) and (
        torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    ):
        return torch.bfloat16 if found <= {torch.float32} else None
    return None


def _of(splitting: Splitting) -> str:
    return (
        f" Or the batch is not where it seems: {' '.join(splitting.doubts)}"
        if splitting.doubts
        else ""
    )


def _explained(error: SplitError, splitting: Splitting) -> SplitError:
    return SplitError(f"{error}{_of(splitting)}") if splitting.doubts else error
