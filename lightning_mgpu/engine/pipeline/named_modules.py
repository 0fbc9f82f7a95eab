"""Names of all modules that a pipeline runs."""

from collections.abc import Sequence

from torch import nn

from lightning_mgpu._compat.torch_modules import children_of


def named_once(roots: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """All modules of some, by name, each once and before its children.

    As `Module.named_modules`, which takes several times as long, for one root; the second of two
    modules of the same name in different roots gets a number.
    """
    unique: dict[str, nn.Module] = {}
    seen: set[int] = set()
    pending = [("", root) for root in reversed(roots)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        unique[name if name not in unique else f"{name} #{len(unique)}"] = module
        before = f"{name}." if name else ""
        children = reversed(children_of(module).items())
        pending += [(before + own, child) for own, child in children if child is not None]
    return unique
