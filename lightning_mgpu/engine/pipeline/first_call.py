"""Cut a module by a trial with a few samples of the first call."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from lightning_mgpu.engine.pipeline import microbatch
from lightning_mgpu.engine.pipeline.check.sample_run import SampleRun
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitting
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.engine.pipeline.partition.cutter import Cut, Cutter
from lightning_mgpu.engine.workers import Workers

log = logging.getLogger(__name__)

# How many samples are computed to find out what a module's `forward` calls.
_SAMPLES = 2


class FirstCall:
    """A call by which a module is cut.

    Args:
        cutter: Cuts the module.
        trial: Runs the call on some of its samples.
        splitting: How the call is split.
        workers: The devices' threads. The first has as many intra-op threads as each stage will.
        unseen: Context of which nothing is left in the module.
    """

    def __init__(
        self,
        cutter: Cutter,
        trial: SampleRun,
        splitting: Splitting,
        workers: Workers,
        unseen: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._cutter, self._trial, self._splitting = cutter, trial, splitting
        self._workers, self._unseen = workers, unseen

    def cut(self, chunks: int, candidates: Sequence[int]) -> Cut:
        """Cut the module.

        Args:
            chunks: The usual number of micro-batches.
            candidates: Numbers among which there is a choice.

        Raises:
            PartitionError: The module cannot be cut as asked.
            SplitError: It cannot be run on some samples, which may lie in how they are split.
        """
        total = self._splitting.size
        # The largest of each number's micro-batches.
        parts = {len(sizes): sizes[0] for sizes in self._sizes([chunks, *candidates])}
        count = len(self._sizes([chunks])[0])
        part = parts.pop(count)
        # Few samples will do, unless there is something that takes no other number.
        tried = [part] if self._cutter.wants_costs else [min(_SAMPLES, part), part]
        for samples in dict.fromkeys([*tried, total]):
            with self._unseen():
                try:
                    others = parts if samples == part else {}
                    (cut,) = self._workers.run([partial(self._observed, samples, count, others)])
                    return cut
                except PartitionError:
                    raise
                except Exception as error:
                    if self._splitting.doubts:
                        raise SplitError(" ".join(self._splitting.doubts)) from error
                    if samples == total:
                        expected = self._cutter.expected()
                        if expected is None:
                            raise
                        return expected  # so that the error is raised where it belongs
                    log.debug("The module cannot be tried on %d samples.", samples, exc_info=True)
        raise AssertionError("unreachable")

    def _observed(self, samples: int, count: int, others: dict[int, int]) -> Cut:
        graph = self._cutter.wants_costs
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            return self._cutter.observe(
                partial(self._trial.run, 0, samples),
                count,
                {number: partial(self._trial.run, 0, part) for number, part in others.items()},
            )

    def _sizes(self, numbers: Sequence[int]) -> list[list[int]]:
        return [microbatch.sizes(self._splitting.size, number, 2) for number in numbers]
