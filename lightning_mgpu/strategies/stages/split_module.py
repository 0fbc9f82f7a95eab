"""Choose the part of a LightningModule that is cut into stages."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_mgpu._compat.torch_modules import is_compiled_anyhow
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError


def find_module(model: LightningModule, name: str | None) -> tuple[str, nn.Module]:
    """Return the name of the submodule to cut, and the submodule.

    Args:
        model: The LightningModule.
        name: As the user gave it; `None` for the child with most parameters. If that is a mere
            list of modules, which has no `forward`, it is the LightningModule itself.

    Raises:
        PartitionError: There is no such submodule, or it cannot be called.
    """
    kind = type(model).__name__
    if name is None:
        name, module = _largest_child(model)
        _check_not_compiled(name, module)
        if not _has_forward(module):
            name, module = "", model
    elif name not in dict(model.named_modules()):
        raise PartitionError(
            f"`module={name!r}`: `{kind}` has no submodule of that name. It has"
            f" {', '.join(f'`{n}`' for n, _ in model.named_children()) or 'none'}."
        )
    else:
        module = model.get_submodule(name)
    if not _has_forward(module):
        raise PartitionError(
            f"`module={name!r}`: that is a `{type(module).__name__}`, which has"
            " no `forward` to be computed in stages. Name the submodule whose `forward` calls it."
        )
    _check_not_compiled(name or kind, module)
    return name, module


def own_stages(model: LightningModule) -> list[nn.Module] | None:
    """The stages that the LightningModule makes itself, in `configure_pipeline`.

    Raises:
        PartitionError: It returns something else than a list of modules.
    """
    configure: Any = getattr(model, "configure_pipeline", None)
    if configure is None:
        return None
    stages = configure()
    if not isinstance(stages, (list, tuple)) or not all(isinstance(s, nn.Module) for s in stages):
        raise PartitionError(
            f"`{type(model).__name__}.configure_pipeline` must return a list of modules, one for"
            f" each stage; it returned {stages!r}."
        )
    return list(stages)


def _largest_child(model: LightningModule) -> tuple[str, nn.Module]:
    children = [(n, c) for n, c in model.named_children() if any(True for _ in c.parameters())]
    if not children:
        raise PartitionError(
            f"`{type(model).__name__}` has no submodule with parameters to cut into stages."
        )
    return max(children, key=lambda child: sum(p.numel() for p in child[1].parameters()))


def _has_forward(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _check_not_compiled(name: str, module: nn.Module) -> None:
    if is_compiled_anyhow(module):
        raise PartitionError(
            f"`{name}` is compiled as a whole, so it cannot be cut into stages. Compile the"
            " submodules that stages consist of instead."
        )
