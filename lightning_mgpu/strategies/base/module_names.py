"""Names of the modules that compute a step, copies of the LightningModule's among them."""

from lightning_mgpu._compat.lightning import Strategy
from lightning_mgpu.strategies.base.belonging import Belonging


def module_names(strategy: Strategy) -> dict[int, str]:
    """The names of submodules as in the LightningModule's ``named_modules()``, by their id."""
    model = strategy.lightning_module
    assert model is not None
    copies = strategy.copies() if isinstance(strategy, Belonging) else []
    return {
        id(module): name
        for holder in (*copies, model)
        for name, module in holder.named_modules()
        if name
    }
