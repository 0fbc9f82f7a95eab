"""The combined loader that a fit loop draws its batches from, and how it is asked for one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_mgpu._compat.lightning import _SUPPORTED_MODES, CombinedLoader
from lightning_mgpu._compat.lightning_attributes import assign

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import Trainer


def wrap_train_loader(
    trainer: "Trainer", wrap: Callable[[Any, str], CombinedLoader]
) -> Callable[[], None]:
    """Have the fit loop draw batches from what a function makes of the program's loaders.

    Args:
        trainer: Before it asks for them.
        wrap: Called with the loaders and the mode in which they are combined.

    Returns:
        A function that undoes it.
    """
    source = trainer.fit_loop._data_source
    own = source.dataloader

    def dataloader() -> CombinedLoader:
        loaders = own()
        if isinstance(loaders, CombinedLoader):
            return wrap(loaders.iterables, loaders._mode)
        return wrap(loaders, "max_size_cycle")

    assign(source, "dataloader", dataloader)
    return lambda: vars(source).pop("dataloader", None)


def postpone(loader: CombinedLoader) -> None:
    """Have a combined loader know its length, while nothing of its loaders is started."""
    iterator = _SUPPORTED_MODES[loader._mode]["iterator"](loader.flattened, loader.limits)
    assign(loader, "_iterator", iterator)
