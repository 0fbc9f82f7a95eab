"""Compare a few samples computed whole with the same in two micro-batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu.engine.batch.unevenness import Window, telling
from lightning_mgpu.engine.compare import Difference, compare
from lightning_mgpu.engine.device import HOST, autocast_dtype, rounds_float32
from lightning_mgpu.engine.pipeline.check.module_state import ModuleSnapshot
from lightning_mgpu.engine.pipeline.check.sample_run import SampleRun
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.outputs import joining
from lightning_mgpu.engine.pipeline.outputs.columns import Column, columns_of, same
from lightning_mgpu.engine.pipeline.outputs.joining import Layouts, OutputLayout
from lightning_mgpu.engine.pipeline.partition.cutter import Cut

# Two and three of them differ in number from each other and from the whole.
_SAMPLES = 5


def window_of(split: Mapping[str, Any], counts: Sequence[int]) -> Window:
    """Choose the samples whose comparison is most telling.

    Args:
        split: The lists and batches of graphs that are split, by name.
        counts: Samples in each micro-batch.
    """
    total = min(_SAMPLES, sum(counts))
    return telling(split, Window(0, total // 2, total), min(counts))


class Comparison:
    """A few samples of one call, whole and in two parts.

    Args:
        trial: Runs some of the samples.
        cut: The stages.
        devices: The device of each stage.
        window: Which ones to compute.
    """

    def __init__(
        self, trial: SampleRun, cut: Cut, devices: Sequence[torch.device], window: Window
    ) -> None:
        self._trial, self._window = trial, window
        self._counts = window.counts
        self._total = sum(self._counts)
        self._coarse = _least_precise(cut, devices)
        self.differences: list[Difference] = []
        self.compared = self.random = 0
        """How many tensors have been compared, and how many not, since they are random."""

    def run(self, start: ModuleSnapshot, modules: dict[str, nn.Module]) -> None:
        """Compute the samples, each time from what the modules hold at the start.

        Args:
            start: What the modules hold.
            modules: All modules that stages run, by name.
        """
        self._start = start
        begin, middle, end, _ = self._window
        self._whole = self._trial.run(begin, end)
        after_whole = ModuleSnapshot(modules, start)
        start.restore(generators=False)
        second = self._trial.run(middle, end)
        after_second = ModuleSnapshot(modules, start)
        start.restore(generators=False)
        self._parts = [self._trial.run(begin, middle), second]
        self._trial.run(middle, end)
        self.held = after_whole, ModuleSnapshot(modules, start), after_second, self._coarse
        start.restore(generators=False)

    def compare(self, proven: Layouts) -> dict[str, OutputLayout]:
        """Find the batch dimension of each tensor, and compare values.

        Args:
            proven: What earlier comparisons have shown.

        Raises:
            SplitError: A tensor of the output has no dimension for the batch.
        """
        layouts: dict[str, OutputLayout] = {}
        unequal: dict[str, Tensor] = {}
        outputs = [self._whole, *self._parts]
        counts = [self._total, *self._counts]
        for column in columns_of(outputs, counts, "output"):
            place, first = column.place, column.values[0]
            if column.entries:
                layouts[place] = joining.ENTRIES
                self._compare_entries(column, unequal)
            elif isinstance(first, Tensor):
                layouts[place], different = self._layout(place, column.values)
                self._note(place, first, different, unequal)
            else:
                same(column.values, counts, place)
        if unequal:
            self._leave_out_random(unequal, layouts, proven)
        return layouts

    def _compare_entries(self, column: Column, unequal: dict[str, Tensor]) -> None:
        whole, *parts = column.values
        together = [entry for part in parts for entry in part]
        pairs = columns_of([list(whole), together], [1, 1], column.place)
        for place, (one, other) in ((pair.place, pair.values) for pair in pairs):
            if isinstance(one, Tensor):
                self._note(place, one, compare(one, other, place, self._coarse), unequal)
            else:
                same([one, other], [1, 1], place, proven=True)

    def _note(
        self,
        place: str,
        whole: Tensor,
        different: Sequence[Difference],
        unequal: dict[str, Tensor],
    ) -> None:
        self.compared += 1
        if different:
            unequal[place] = whole
            self.differences += different

    def _layout(
        self, place: str, column: Sequence[Tensor]
    ) -> tuple[OutputLayout, list[Difference]]:
        whole, *parts = column
        layout = joining.told(column, [self._total, *self._counts], place)
        if layout.dim is None:
            if not any(compare(whole, part, place, self._coarse) for part in parts):
                return layout, []
            if not joining.is_number(whole):
                raise SplitError(joining.unjoinable(place, whole))
            if not self._compared(whole, parts, joining.TOTAL, place):
                return joining.TOTAL, []
            layout = joining.MEAN
        found = self._compared(whole, parts, layout, place)
        if found and layout.dim is not None and whole.shape[layout.dim] != self._total:
            other = OutputLayout(layout.dim, minor=True)
            if not self._compared(whole, parts, other, place):
                return other, []
        return layout, found

    def _compared(
        self, whole: Tensor, parts: Sequence[Tensor], layout: OutputLayout, place: str
    ) -> list[Difference]:
        return compare(whole, joining.cat(parts, self._counts, layout)[0], place, self._coarse)

    def _leave_out_random(
        self, unequal: Mapping[str, Tensor], layouts: dict[str, OutputLayout], proven: Layouts
    ) -> None:
        """Remove values that differ between two identical runs."""
        again = self._trial.run(self._window.start, self._window.end)
        self._start.restore(generators=False)
        columns = columns_of([self._whole, again], [self._total] * 2, "output")
        pairs = ((column.place, column.values) for column in columns)
        random = {place for place, pair in pairs if isinstance(pair[0], Tensor) and compare(*pair)}
        for place, tensor in unequal.items():
            if place not in random:
                continue
            self.random += 1
            self.differences = [d for d in self.differences if d.path != place]
            dim = layouts[place].dim if place in layouts else None
            if dim is not None and tensor.shape[dim] != self._total:
                if place not in proven:
                    raise SplitError(joining.unordered(place, tensor, self._total))
                layouts[place] = proven[place]


def _least_precise(cut: Cut, devices: Sequence[torch.device]) -> torch.dtype | None:
    """Least precise floating-point dtype, which determines the tolerance."""
    for device in {HOST, *devices}:
        dtype = autocast_dtype(device)
        if dtype is not None:
            return dtype
    found = {t.dtype for tensors in cut.tensors for t in tensors.values() if t.is_floating_point()}
    half = sorted((t for t in found if t.itemsize < 4), key=lambda t: t.itemsize)
    if half:
        return half[0]
    if any(map(rounds_float32, devices)):
        return torch.bfloat16 if found <= {torch.float32} else None
    return None
