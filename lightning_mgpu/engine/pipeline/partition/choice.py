"""Choose the submodules to distribute over stages, and where each stage begins."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise

from torch import nn

from lightning_mgpu._compat.torch_modules import is_compiled_anyhow
from lightning_mgpu.engine.pipeline.partition.balance import balance
from lightning_mgpu.engine.pipeline.partition.observation import ModuleCall

# The dearest stage may be this much dearer than a fair share before layers are opened.
_TOLERANCE = 1.1
# Modules of torch whose `forward` does nothing but call others.
_OPENED = (nn.Sequential, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)

# Modules that are never called themselves.
_LISTS = (nn.ModuleList, nn.ModuleDict)


class PartitionError(ValueError):
    """The module cannot be cut as asked."""


class Layers:
    """Submodules that a call uses, some replaced by their children.

    Args:
        called: The call.
        opened: Names of those that stand for what they call; with all that contain them.
    """

    def __init__(self, called: ModuleCall, opened: Iterable[str] = ()) -> None:
        self.called, self.opened = called, {"", *opened}

    def calls(self) -> list[ModuleCall]:
        """All calls of the layers, in order."""
        found: list[ModuleCall] = []
        self._collect(self.called, found)
        return found

    def names(self) -> list[str]:
        """The layers, in the order of their first calls."""
        return list(dict.fromkeys(call.name for call in self.calls()))

    def open(self, name: str) -> None:
        self.opened.add(name)

    def closed(self) -> list[str]:
        """The layers that can be opened."""
        return [call.name for call in self.calls() if _can_open(call)]

    def _collect(self, call: ModuleCall, found: list[ModuleCall]) -> None:
        for child in call.children:
            if child.name in self.opened or isinstance(child.module, _LISTS):
                self._collect(child, found)
            else:
                found.append(child)


def choose(
    called: ModuleCall, stages: int, price: Callable[[str], float]
) -> tuple[Layers, list[int]] | None:
    """Distribute layers so that the most expensive stage is as cheap as possible.

    Layers are opened as long as that makes the dearest stage cheaper and it is not about a fair
    share.

    Args:
        called: What was observed.
        stages: How many.
        price: Of a layer, by name; not negative.

    Returns:
        The layers, and how many of them each stage has; `None` if they are too few.
    """
    layers = Layers(called)
    best: tuple[float, set[str], list[int]] | None = None
    while True:
        names = layers.names()
        prices = [float(price(name)) for name in names]
        if not any(prices):
            prices = [1.0] * len(names)
        closed = dict.fromkeys(layers.closed())
        if len(names) >= stages:
            counts = balance(prices, stages)
            bounds = [0, *accumulate(counts)]
            sums = [sum(prices[a:b]) for a, b in pairwise(bounds)]
            if best is None or max(sums) < 0.99 * best[0]:
                best = max(sums), set(layers.opened), counts
            if max(sums) <= _TOLERANCE * sum(prices) / stages:
                break
            dearest = sums.index(max(sums))
            inside = names[bounds[dearest] : bounds[dearest + 1]]
            closed = {name: None for name in closed if name in inside}
        if not closed:
            break
        layers.open(max(closed, key=price))
    return None if best is None else (Layers(called, best[1]), best[2])


def opened_until(called: ModuleCall, count: int, price: Callable[[str], float]) -> Layers:
    """The layers that a user counts: children, with `nn.Sequential` opened.

    If those are fewer than `count`, the dearest is opened as well.
    """
    sequences = [call.name for call in called.walk() if isinstance(call.module, nn.Sequential)]
    layers = Layers(called, sequences)
    while len(layers.names()) < count:
        closed = layers.closed()
        if not closed:
            break
        layers.open(max(closed, key=price))
    return layers


def beginning_at(called: ModuleCall, starts: Sequence[str]) -> tuple[Layers, list[int]]:
    """Distribute layers so that stages begin at the named ones.

    Args:
        called: What was observed.
        starts: Of the second and later stages.

    Raises:
        PartitionError: One is not called, or not in that order, or there is nothing before it.
    """
    layers = Layers(called, ancestors(starts))
    names = layers.names()
    bounds = [0]
    for index, start in enumerate(starts):
        if start not in names:
            raise PartitionError(
                f"`{start}` is never called, so no stage can begin at it. Choose a"
                " submodule that `forward` calls."
            )
        place = names.index(start)
        if place < bounds[-1]:
            raise PartitionError(
                f"Stages should begin at {', '.join(starts)}, but `{start}` is called before"
                f" `{starts[index - 1]}`. Give the split points in the order of their calls."
            )
        if place == bounds[-1]:
            raise PartitionError(
                f"Nothing is computed before `{start}`, so the first stage would be empty. Let the"
                " second stage begin at a later submodule."
            )
        bounds.append(place)
    bounds.append(len(names))
    return layers, [b - a for a, b in pairwise(bounds)]


def canonical(module: nn.Module, name: str) -> str:
    """The first name of a submodule that may have several.

    Raises:
        PartitionError: There is none of that name.
    """
    named = dict(module.named_modules(remove_duplicate=False))
    if not name or name not in named:
        known = ", ".join(f"`{n}`" for n, _ in module.named_children())
        raise PartitionError(
            f"`{type(module).__name__}` has no submodule `{name}` at which a stage could begin."
            f" Its children are {known or 'none'}."
        )
    found: str = next(n for n, m in module.named_modules() if m is named[name])
    return found


def ancestors(names: Iterable[str]) -> set[str]:
    """The names of all modules that contain one of the named ones."""
    return {
        ".".join(parts[:depth])
        for parts in (name.split(".") for name in names)
        for depth in range(len(parts))
    }


def _can_open(call: ModuleCall) -> bool:
    if not call.children or is_compiled_anyhow(call.module):
        return False
    return isinstance(call.module, _OPENED) or not type(call.module).__module__.startswith("torch.")
