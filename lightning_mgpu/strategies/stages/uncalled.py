"""Detect a training step that does not call the module to be computed in stages."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_mgpu._compat.torch_modules import is_compiled_anyhow
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.engine.pipeline.pipeline import Pipeline

log = logging.getLogger(__name__)


class Uncalled:
    """Watch the first training step for calls that bypass the split module's `forward`.

    Args:
        model: The LightningModule.
        name: The split module's name.
        module: The split module.
        pipeline: What stands for its `forward`.
    """

    def __init__(
        self, model: LightningModule, name: str, module: nn.Module, pipeline: Pipeline
    ) -> None:
        self._model, self._pipeline = model, pipeline
        self._title = f"{name}.forward" if name else "forward"
        self._children = {
            child_name: child
            for child_name, child in module.named_children()
            if any(True for _ in child.parameters()) and not _is_compiled(child)
        }
        self._steps = 0
        self._calls = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of a training step.

        Raises:
            PartitionError: It is the first, and has called all children of the split module, but
                never the module itself.
        """
        before = self._pipeline.calls
        called: set[str] = set()
        with ExitStack() as stack:
            if not self._steps:
                for name, child in self._children.items():
                    handle = child.register_forward_pre_hook(_CallHook(called, name))
                    stack.callback(handle.remove)
            yield
        self._steps += 1
        self._calls += self._pipeline.calls - before
        if called and not self._calls and called == self._children.keys():
            raise PartitionError(
                f"`{self._title}` was not called in the training step, but its submodules"
                f" {', '.join(f'`{name}`' for name in sorted(called)[:4])} were, so nothing"
                " was computed in stages. Call the module itself, or name the one whose"
                ' `forward` calls them: `module=...` (`""` is'
                f" `{type(self._model).__name__}` itself)."
            )

    def end(self) -> None:
        """Finish after training."""
        if self._steps and not self._calls:
            log.warning(
                "`%s` was never called in `training_step`, so nothing was computed in stages."
                " Name the module that is called: `module=...`.",
                self._title,
            )


class _CallHook:
    # Read where `forward` is recorded: this hook loses nothing by not being called there.
    needs_values = False

    def __init__(self, called: set[str], name: str) -> None:
        self._called, self._name = called, name

    def __call__(self, *_: Any) -> None:
        self._called.add(self._name)


def _is_compiled(module: nn.Module) -> bool:
    return is_compiled_anyhow(module)
