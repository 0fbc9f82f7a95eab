"""A module as a row of stages, each of which can run on a device of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_mgpu.engine.batch import map_leaves
from lightning_mgpu.engine.pipelining.trace import Input, Result

__all__: list[str] = []

# What an argument, a stage's value or a result is known by.
Name = str


class PartitionError(ValueError):
    """The module cannot be cut as asked."""


@dataclass(frozen=True)
class Stage:
    """A part of a module that runs without the others.

    Attributes:
        index: Its place among the stages.
        inputs: The values it needs from the caller and from earlier stages.
        outputs: The values that later stages or the caller need from it, in the order in which
            `compute` returns them.
        modules: Names of the submodules it calls, in order.
        parameters: Names of the parameters and buffers it uses outside of its submodules.
        compute: From its inputs to its outputs.
    """

    index: int
    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...]
    modules: tuple[str, ...]
    attributes: tuple[str, ...]
    compute: Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Partition:
    """A module as a row of stages.

    Attributes:
        stages: In order.
        arguments: Names of the tensors among the arguments.
        results: The values that the module's output is made of.
        template: The output, with a `Result` in place of each of them.
        origins: For each result, the arguments that it depends on.
    """

    stages: tuple[Stage, ...]
    arguments: tuple[Name, ...]
    results: tuple[Name, ...]
    template: Any
    origins: Mapping[Name, frozenset[Name]]
    producers: Mapping[Name, int] = field(init=False)
    """For each value that stages make, the stage that does."""
    consumers: Mapping[Name, tuple[int, ...]] = field(init=False)
    """For each argument and value, the stages that need it."""

    def __post_init__(self) -> None:
        producers = {name: stage.index for stage in self.stages for name in stage.outputs}
        consumers = {
            name: tuple(stage.index for stage in self.stages if name in stage.inputs)
            for name in (*self.arguments, *producers)
        }
        object.__setattr__(self, "producers", producers)
        object.__setattr__(self, "consumers", consumers)

    def passed(self, producer: int, consumer: int) -> tuple[Name, ...]:
        """What one stage hands to another."""
        outputs = self.stages[producer].outputs
        return tuple(name for name in outputs if consumer in self.consumers[name])


def chain(
    stages: Sequence[nn.Module], arguments: Sequence[Name], args: Any, kwargs: Any
) -> Partition:
    """Stages that the user has made, each called with what the one before it returns.

    A tuple is handed on as several arguments.

    Args:
        stages: The modules.
        arguments: Names of the tensors among the first one's arguments.
        args: Those arguments, with an `Input` for each tensor.
        kwargs: The same by name.

    Raises:
        PartitionError: A parameter belongs to two stages.
    """
    _check_chain(stages)
    last = len(stages) - 1
    links = [f"%stage{index}" for index in range(len(stages))]

    def first(inputs: Sequence[Any]) -> list[Any]:
        values = dict(zip(arguments, inputs, strict=True))
        filled_args, filled_kwargs = fill((args, kwargs), values)
        return [stages[0](*filled_args, **filled_kwargs)]

    def later(stage: nn.Module) -> Callable[[Sequence[Any]], list[Any]]:
        def compute(inputs: Sequence[Any]) -> list[Any]:
            (value,) = inputs
            return [stage(*value) if type(value) is tuple else stage(value)]

        return compute

    return Partition(
        tuple(
            Stage(
                index,
                tuple(arguments) if index == 0 else (links[index - 1],),
                (links[index],),
                (),
                (),
                first if index == 0 else later(stage),
            )
            for index, stage in enumerate(stages)
        ),
        tuple(arguments),
        (links[last],),
        Result(links[last]),
        {links[last]: frozenset(arguments)},
    )


def fill(template: Any, values: Mapping[Name, Any]) -> Any:
    """A structure with values in place of the `Input` and `Result` that stand for them."""
    return map_leaves(
        lambda leaf: values[leaf.name] if isinstance(leaf, (Input, Result)) else leaf, template
    )


def _check_chain(stages: Sequence[nn.Module]) -> None:
    owners: dict[int, int] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise PartitionError(
                    f"The parameter `{name}` of stage {index} belongs to stage"
                    f" {owners[id(parameter)]}, too. Put what shares it into one stage."
                )


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
