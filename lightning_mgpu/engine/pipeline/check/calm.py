"""Compute without random draws, batch statistics or side effects."""

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_mgpu._compat import torch_modules
from lightning_mgpu.engine.device import random_state, set_random_state

_QUIET = (
    torch_modules.Dropout,
    torch_modules.BatchNorm,
    nn.RNNBase,
)
_DROPOUTS = frozenset(
    {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
        *(F.feature_alpha_dropout, torch.dropout, torch.feature_dropout, torch.alpha_dropout),
    }
)


@contextmanager
def calm(modules: Iterable[nn.Module], devices: Sequence[torch.device]) -> Iterator[None]:
    """Context in which dropout is off and batch normalisation uses running statistics.

    What else draws random numbers does so; all generators are put back afterwards.

    Args:
        modules: All modules that are computed.
        devices: Where they lie.
    """
    modules = list(modules)
    quiet = [m for m in modules if isinstance(m, _QUIET) and m.training]
    with ExitStack() as stack:
        stack.callback(_restore_random, _random_states(devices))
        if any(map(torch_modules.is_compiled_anyhow, modules)):
            # Not once more for our few samples.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in quiet:
            module.training = False
            stack.callback(setattr, module, "training", True)
        stack.enter_context(_Calm())
        yield


class _Calm(TorchFunctionMode):
    """Mode that replaces the functions of layers by their evaluation behaviour."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}
        elif func is F.scaled_dot_product_attention:
            args, kwargs = (*args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:]), dict(kwargs)
            kwargs.pop("dropout_p", None)
        elif func is F.batch_norm:
            args, kwargs = _in_evaluation(args, kwargs)
        return func(*args, **kwargs)


def _in_evaluation(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of `batch_norm` for running statistics, or for none at all."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x = given["input"]
    given["training"] = False
    if given.get("running_mean") is None or given.get("running_var") is None:
        given["running_mean"] = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        given["running_var"] = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    rest = args[len(names) :]
    return (), {**given, **dict(zip(("momentum", "eps"), rest, strict=False))}


def _random_states(devices: Sequence[torch.device]) -> list[tuple[Any, ...]]:
    """Functions and arguments that restore the random generators."""
    states: list[tuple[Any, ...]] = [
        (random.setstate, random.getstate()),
        (torch.default_generator.set_state, torch.default_generator.get_state()),
    ]
    for device in set(devices):
        states.append((set_random_state, device, random_state(device)))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return states


def _restore_random(states: list[tuple[Any, ...]]) -> None:
    for put, *arguments in states:
        put(*arguments)
