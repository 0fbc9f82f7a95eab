"""Random numbers that do not depend on which thread comes first.

torch has one generator for the CPU, shared by all threads. Here each task draws from a generator of
its own, seeded from the caller's, so that seeded runs repeat bit for bit.
"""

import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from lightning_mgpu.engine.dispatch import EagerMode

log = logging.getLogger(__name__)

__all__: list[str] = []

_MAX_SEED = 2**63 - 1


class RandomStreams:
    """A stream of random numbers for each slot and step.

    To hand operations a generator costs some microseconds for each operation, random or not. So it
    is done in the first step of each kind, and goes on for those kinds that turn out to draw. That
    one begins to draw later shows in torch's generator, and is told in a warning, since that one
    step cannot be repeated exactly.
    """

    def __init__(self) -> None:
        self._draws: dict[str, bool] = {}
        self._base = b""
        self._count = 0

    def restart(self) -> None:
        """Begin anew from the state of torch's CPU generator, without drawing from it."""
        state = torch.default_generator.get_state().numpy().tobytes()
        self._base = hashlib.blake2b(state, digest_size=16).digest()
        self._count = 0
        self._draws = {}

    def finish(self) -> None:
        """Let torch's generator move on if the streams were used, so that a next run differs."""
        if any(self._draws.values()):
            torch.default_generator.set_state(_generator(self._seed(-1)).get_state())
        self._draws = {}

    @contextmanager
    def step(self, kind: str, slots: int, always: bool = False) -> Iterator[list["Stream"]]:
        """The streams for one step: enter each in the task of its slot.

        Args:
            kind: What kind of step.
            slots: How many streams.
            always: Whether to supply generators even if nothing has drawn so far: where the numbers
                of this very step will be needed again.
        """
        supply = always or self._draws.get(kind, True)
        streams = [Stream(self._seed(slot), supply) for slot in range(slots)]
        self._count += 1
        before = None if supply else torch.default_generator.get_state()
        yield streams
        if supply:
            drawn = any(stream.drawn for stream in streams)
            self._draws[kind] = self._draws.get(kind, False) or drawn
        elif not torch.equal(before, torch.default_generator.get_state()):  # type: ignore[arg-type]
            self._draws[kind] = True
            log.warning(
                "%s drew random numbers for the first time after steps that drew none, so those of"
                " this one step depend on which thread came first. From the next step on they"
                " repeat under the same seed.",
                kind,
            )

    def _seed(self, slot: int) -> int:
        text = b"%b %d %d" % (self._base, self._count, slot)
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest, "big") & _MAX_SEED


class Stream:
    """The random numbers of one slot in one step. Entered again, in backward, it goes on."""

    def __init__(self, seed: int, supply: bool) -> None:
        self._seed, self._supply = seed, supply
        self._generator = _generator(seed)
        self._mode = _SupplyGenerator(self._generator) if supply else None

    @property
    def drawn(self) -> bool:
        """Whether an operation has drawn from it."""
        return self._mode is not None and self._mode.drawn

    def again(self) -> "Stream":
        """The same numbers from the beginning."""
        return Stream(self._seed, self._supply)

    def state(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where it is, together with a device's own generator."""
        elsewhere = None
        if device.type != "cpu":
            elsewhere = torch.get_device_module(device.type).get_rng_state(device)
        return self._generator.get_state(), elsewhere

    @contextmanager
    def at(
        self, state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device
    ) -> Iterator[None]:
        """Draw the same numbers as from `state` on, in the calling thread."""
        other = Stream(self._seed, self._supply)
        numbers, elsewhere = state
        other._generator.set_state(numbers)
        if elsewhere is None:
            with other.entered():
                yield
            return
        on = torch.get_device_module(device.type)
        now = on.get_rng_state(device)
        on.set_rng_state(elsewhere, device)
        try:
            with other.entered():
                yield
        finally:
            on.set_rng_state(now, device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Draw from this stream in the calling thread."""
        before = getattr(_local, "generator", None)
        _local.generator = self._generator
        try:
            with _thread_aware, self._mode or nullcontext():
                yield
        finally:
            _local.generator = before


def _generator(seed: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(seed)
    return generator


class _SupplyGenerator(EagerMode):
    """Hands operations that draw on the CPU a generator, where they were not given one."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator
        self.drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if not _takes_generator(func):
            if _drops_nothing(func, args, kwargs):
                return func(*args, **kwargs)
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
            return self._with_default_generator(func, args, kwargs)
        if kwargs.get("generator") is None and _device(args, kwargs).type == "cpu":
            self.drawn = True
            kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)

    def _with_default_generator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """For the few operations that take no generator: lend torch's own our state."""
        if _device(args, kwargs).type != "cpu":
            return func(*args, **kwargs)
        self.drawn = True
        default = torch.default_generator
        with _lending:
            before = default.get_state()
            default.set_state(self._generator.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                self._generator.set_state(default.get_state())
                default.set_state(before)


_lending = threading.Lock()
_PROBABILITIES = ("dropout_p", "dropout", "p")
_generator_taken: dict[Any, bool] = {}


def _takes_generator(func: Any) -> bool:
    taken = _generator_taken.get(func)
    if taken is None:
        taken = any(argument.name == "generator" for argument in func._schema.arguments)
        _generator_taken[func] = taken
    return taken


def _drops_nothing(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation that may drop out, such as attention, is told not to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in _PROBABILITIES:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            return bool((argument.default_value if given is None else given) == 0)
    return False


def _device(args: Any, kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")


_local = threading.local()


class _ThreadAwareGenerator:
    """torch's CPU generator, or the stream that the calling thread has entered.

    Activation checkpointing saves and restores the state of the CPU generator around each region,
    by `torch.get_rng_state` and `torch.set_rng_state`. Threads that do so with the one generator
    would put back each other's states.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_local, "generator", None) or torch.default_generator, name)


class _ThreadAware:
    """While entered, by any number of users, `torch.random` knows of streams."""

    def __init__(self) -> None:
        self._users = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                vars(torch.random)["default_generator"] = _ThreadAwareGenerator()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                vars(torch.random)["default_generator"] = torch.default_generator


_thread_aware = _ThreadAware()
