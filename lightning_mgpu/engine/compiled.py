"""Modules made by `torch.compile`, which call the module they were made of."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

COMPILED_ATTRIBUTES = frozenset({"forward", "dynamo_ctx"})
"""What such a module calls, bound to the module that it was made of."""


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` makes of a module."""
    # Costs a second to import, and nothing is compiled as long as nobody has.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def inside_compiled(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of all modules that are part of a compiled one."""
    return {
        id(inner)
        for module in modules
        if is_compiled(module)
        for inner in module._orig_mod.modules()  # type: ignore[union-attr]
    }


def compile_again(original: Any, copied: Any, inner: nn.Module) -> None:
    """Have the copy of a compiled module call `inner`, the copy of what that was made of."""
    made = type(original)(inner, original.dynamo_ctx)
    vars(copied).update({key: vars(made)[key] for key in COMPILED_ATTRIBUTES})
