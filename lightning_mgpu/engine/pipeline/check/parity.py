"""Check on the first batch that one micro-batch and two give the same output."""

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lightning_mgpu.engine.batch.unevenness import Window
from lightning_mgpu.engine.compare import Difference
from lightning_mgpu.engine.pipeline.check.calm import calm
from lightning_mgpu.engine.pipeline.check.comparison import Comparison, window_of
from lightning_mgpu.engine.pipeline.check.left_behind import LeftBehind
from lightning_mgpu.engine.pipeline.check.module_state import ModuleSnapshot
from lightning_mgpu.engine.pipeline.check.sample_run import SampleRun
from lightning_mgpu.engine.pipeline.inputs import entries
from lightning_mgpu.engine.pipeline.inputs.call_arguments import CallArguments
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitting
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.outputs.joining import Layouts, OutputLayout
from lightning_mgpu.engine.pipeline.partition.cutter import Cut
from lightning_mgpu.engine.random_state import RandomState

log = logging.getLogger(__name__)

ParityCheck = Literal["error", "warn", "off"]

# Calls that differ in structure are compared each on its own; more kinds are not.
_MAX_KINDS = 64
# How often each kind is.
_MAX_LOOKS = 8


@dataclass
class _Found:
    """Result of the check for one kind of call.

    Attributes:
        layouts: Where the batch lies in the output; empty if that was not looked at.
        proven: Whether micro-batches have given what the whole gives, in all tensors.
        error: What has kept it from being found out.
        looks: How often it has been looked at.
    """

    layouts: Layouts = field(default_factory=dict)
    proven: bool = False
    error: Exception | None = None
    looks: int = 1


class Parity:
    """Compare a module's output for a few samples with the same in two micro-batches.

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
        self._proven: dict[str, OutputLayout] = {}
        self._left_behind = LeftBehind(mode)
        self._has_told_draws = self._has_told_means = False
        self._told_writes: set[str] = set()

    def layouts(
        self,
        call: CallArguments,
        trial: SampleRun,
        cut: Cut,
        splitting: Splitting,
        counts: Sequence[int],
        modules: Mapping[str, nn.Module],
        anew: bool = False,
    ) -> Layouts:
        """Batch dimensions of the outputs of a call; a call of a new kind is compared.

        Args:
            call: The call.
            trial: Runs some of its samples.
            cut: The stages.
            splitting: How its arguments are split.
            counts: Samples in each micro-batch.
            modules: All modules that stages run, by name.
            anew: Whether to compare a known kind once more, since this call shows more than the one
                before.

        Raises:
            SplitError: Micro-batches give something else than the whole batch; or it is doubtful
                whether the arguments may be split like this, and nothing shows that they may.
        """
        root = next(iter(modules.values()))
        split = {name: call.pieces[name] for name in splitting.pieces}
        window = window_of(split, counts)
        way = _way(call, splitting), window.uneven
        key = (root.training, torch.is_grad_enabled(), call.kind, way)
        found = self._known.get(key)
        if found is None or (anew and found.looks < _MAX_LOOKS):
            looks = found.looks + 1 if found is not None else 1
            found = _Found()
            if self._mode != "off" and len(self._known) < _MAX_KINDS:
                found = self._examine(trial, cut, splitting, dict(modules), window)
            found.looks = looks
            self._known[key] = found
        if splitting.doubts and not found.proven:
            raise SplitError(" ".join(splitting.doubts)) from found.error
        return found.layouts

    def uses(
        self, trial: SampleRun, modules: Mapping[str, nn.Module], holder: dict[str, Any], key: str
    ) -> bool:
        """Return whether a call reads an attribute; `True` if nothing is to be compared.

        Args:
            trial: Runs some of its samples.
            modules: All modules that stages run, by name.
            holder: A module's attributes or buffers.
            key: The name of one.
        """
        if self._mode == "off":
            return True
        with self.unseen(modules) as start:
            before = holder[key]
            holder[key] = object()  # which nothing can be computed with
            try:
                trial.run(0, 1)
            except Exception:
                return True
            finally:
                holder[key] = before
                start.restore()
        return False

    @contextmanager
    def unseen(self, modules: Mapping[str, nn.Module]) -> Iterator[ModuleSnapshot]:
        """Context whose work draws no random numbers, logs nothing and leaves no trace.

        Args:
            modules: All modules that are computed, by name.
        """
        with self._muted(), calm(modules.values(), self._devices):
            start = ModuleSnapshot(dict(modules))
            try:
                yield start
            finally:
                start.restore()

    def _examine(
        self,
        trial: SampleRun,
        cut: Cut,
        splitting: Splitting,
        modules: dict[str, nn.Module],
        window: Window,
    ) -> _Found:
        compared = Comparison(trial, cut, self._devices, window)
        numbers = RandomState()
        with self.unseen(modules) as held:
            try:
                compared.run(held, modules)
                self._tell_draws(numbers.has_moved_beside_torch())
                layouts = compared.compare(self._proven)
            except SplitError as error:
                # (What cannot be joined cannot be joined of the batch either.)
                raise _explained(error, splitting) from error.__cause__
            except Exception as error:
                log.debug("The first batch is not compared with its parts.", exc_info=True)
                return _Found(error=error)
        self._report(compared.differences, splitting)
        self._tell_writes(trial.written)
        self._tell_means([place for place, layout in layouts.items() if layout.mean])
        self._left_behind.report(*compared.held)
        proven = bool(compared.compared) and not compared.random and not compared.differences
        if proven:
            self._proven.update(layouts)
        # What is the same for all samples may have been split by chance, and no value tells.
        return _Found(layouts, proven and all(map(entries.differ, splitting.unproven)))

    def _tell_draws(self, has_drawn: bool) -> None:
        if has_drawn and not self._has_told_draws:
            self._has_told_draws = True
            log.warning(
                "`%s.forward` draws from NumPy's or Python's random generator, once for each"
                " micro-batch; if several stages do so, the order varies from run to run."
                " Draw from torch's (`torch.rand(())`), or in the step.",
                self._kind,
            )

    def _tell_writes(self, names: Collection[str]) -> None:
        new = sorted(set(names) - self._told_writes)
        if new:
            self._told_writes.update(new)
            log.warning(
                "`%s.forward` writes to %s, of which each micro-batch has its own part, so"
                " the caller does not see it. Return what the caller needs.",
                self._kind,
                ", ".join(f"`{name}`" for name in new),
            )

    def _tell_means(self, places: Sequence[str]) -> None:
        if places and not self._has_told_means:
            self._has_told_means = True
            log.info(
                "%s: a number for each micro-batch of `%s.forward`, averaged over samples. If"
                " it has its own denominator (tokens that are not padding, class weights),"
                " compute it in the step.",
                ", ".join(f"`{place}`" for place in places[:3]),
                self._kind,
            )

    def _report(self, differences: Sequence[Difference], splitting: Splitting) -> None:
        if not differences:
            return
        found = "; ".join(map(str, differences[:3]))
        text = (
            f"`{self._kind}.forward` gives different values for micro-batches than for the"
            f" whole batch: {found}. Something in it depends on other samples, such as"
            " `x.mean(0)`, `z @ z.T`, attention along the first dimension, or a loss with its"
            " own denominator. Compute that in the step, from the module's output; split"
            f" another `module`, without it; or use `chunks=1`.{_of(splitting)}"
        )
        if self._mode == "error" or splitting.doubts:
            raise SplitError(f"{text} If this is intended: `parity_check='warn'`.")
        log.warning(text)


def _way(call: CallArguments, splitting: Splitting) -> Hashable:
    """Key for the way in which each argument is split, or broadcast from one entry."""
    whole = (name for name, t in call.tensors.items() if t.dim() and name not in splitting.dims)
    single = tuple(name for name in whole if call.tensors[name].shape[0] == 1)
    return (
        tuple(sorted(splitting.dims.items())),
        splitting.pieces,
        single,
        bool(splitting.doubts),
    )


def _of(splitting: Splitting) -> str:
    return (
        f" Or the batch dimension is another one: {' '.join(splitting.doubts)}"
        if splitting.doubts
        else ""
    )


def _explained(error: SplitError, splitting: Splitting) -> SplitError:
    return SplitError(f"{error}{_of(splitting)}") if splitting.doubts else error
