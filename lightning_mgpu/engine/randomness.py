"""Random numbers that are independent of the order of threads.

torch has one generator a device, shared by all threads. Where several threads draw at once, which
is so on the CPU, each task here draws from a generator of its own, seeded from the caller's, so
that seeded runs repeat bit for bit. On an accelerator with one slot, the order is that slot's.
"""

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from lightning_mgpu._compat.torch import schema_of
from lightning_mgpu.engine.device import (
    HOST,
    default_generator,
    indexed,
    is_accelerator,
    put_generator,
    random_state,
    set_random_state,
)
from lightning_mgpu.engine.dispatch import EagerMode, innermost

log = logging.getLogger(__name__)

_MAX_SEED = 2**63 - 1


class RandomStreams:
    """A stream of random numbers for each slot and step.

    To hand operations a generator costs some microseconds for each operation, random or not. So it
    is done in the first step of each kind, and goes on for those kinds that turn out to draw. That
    one begins to draw later shows in torch's generator, and is told in a warning, since that one
    step cannot be repeated exactly.

    Args:
        devices: Those on which tasks compute side by side, each as often as tasks do.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        counts = Counter(devices)
        self._shared = [d for d in counts if counts[d] > 1 and is_accelerator(d)]
        self._draws: dict[str, bool] = {}
        self._base = b""
        self._count = 0

    def restart(self) -> None:
        """Begin anew from the state of torch's CPU generator, without drawing from it."""
        state = torch.default_generator.get_state().numpy().tobytes()
        self._base = hashlib.blake2b(state, digest_size=16).digest()
        self._count = 0
        self._draws = {}

    def state_dict(self) -> dict[str, Any]:
        """What the streams of coming steps depend on."""
        return {"base": self._base.hex(), "count": self._count, "draws": dict(self._draws)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the streams of another run."""
        self._base = bytes.fromhex(state["base"])
        self._count, self._draws = state["count"], dict(state["draws"])

    def finish(self) -> None:
        """Let torch's generator move on if the streams were used, so that a next run differs."""
        if any(self._draws.values()):
            torch.default_generator.set_state(_generator(HOST, self._seed(-1)).get_state())
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
        streams = [Stream(self._seed(slot), supply, self._shared) for slot in range(slots)]
        self._count += 1
        before = [] if supply else self._now()
        yield streams
        if supply:
            drawn = any(stream.drawn for stream in streams)
            self._draws[kind] = self._draws.get(kind, False) or drawn
        elif not all(map(torch.equal, before, self._now())):
            self._draws[kind] = True
            log.warning(
                "%s drew random numbers for the first time after steps without any: in this"
                " one step they depend on the order of threads and cannot be reproduced. From"
                " the next step on they can.",
                kind,
            )

    def _now(self) -> list[torch.Tensor]:
        """States of torch's generators."""
        return [default_generator(device).get_state() for device in (HOST, *self._shared)]

    def _seed(self, slot: int) -> int:
        text = b"%b %d %d" % (self._base, self._count, slot)
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest, "big") & _MAX_SEED


class Stream:
    """Random numbers of one slot in one step; entered again in backward, it continues.

    Args:
        seed: Of all its generators.
        supply: Whether to hand them to operations.
        shared: The accelerators on which it has generators of its own, as on the CPU.
    """

    def __init__(self, seed: int, supply: bool, shared: Sequence[torch.device] = ()) -> None:
        self._seed, self._shared = seed, shared
        self._generators = {HOST: _generator(HOST, seed)}
        self._mode = _SupplyGenerator(self) if supply else None

    @property
    def drawn(self) -> bool:
        """Return whether an operation has drawn from this stream."""
        return self._mode is not None and self._mode.drawn

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The stream's generator for a device; `None` where it draws from the device's own."""
        if device in self._shared and device not in self._generators:
            self._generators[device] = _generator(device, self._seed)
        return self._generators.get(device)

    def state(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """State of the stream's generators on the host and on a device."""
        own = self.generator(device)
        elsewhere = random_state(device) if own is None else own.get_state()
        return self._generators[HOST].get_state(), elsewhere

    @contextmanager
    def at(
        self, state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device
    ) -> Iterator[None]:
        """Draw the same numbers as from `state` on, in the calling thread."""
        now = self.state(device)
        self._go_to(state, device)
        try:
            # (Not entered twice: the outer mode would see what the inner one has done.)
            is_entered = getattr(_local, "stream", None) is self
            with nullcontext() if is_entered else self.entered():
                yield
        finally:
            self._go_to(now, device)

    def _go_to(self, state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
        numbers, elsewhere = state
        self._generators[HOST].set_state(numbers)
        own = self.generator(device)
        if own is None:
            set_random_state(device, elsewhere)
        elif elsewhere is not None:
            own.set_state(elsewhere)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Draw from this stream in the calling thread."""
        before = getattr(_local, "stream", None)
        _local.stream = self
        try:
            with _thread_aware(self._shared), self._mode or nullcontext():
                yield
        finally:
            _local.stream = before


def _generator(device: torch.device, seed: int) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    return generator


class _SupplyGenerator(EagerMode):
    """Mode that passes a stream's generator to random operations called without one."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
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
        if kwargs.get("generator") is None:
            own = self.stream.generator(_device(args, kwargs))
            if own is not None:
                self.drawn = True
                kwargs = {**kwargs, "generator": own}
        return func(*args, **kwargs)

    def _with_default_generator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Lend torch's default generator our state, for operations that take no generator."""
        device = _device(args, kwargs)
        own = self.stream.generator(device)
        if own is None:
            return func(*args, **kwargs)
        self.drawn = True
        default = default_generator(device)
        with _lending:
            before = default.get_state()
            default.set_state(own.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                own.set_state(default.get_state())
                default.set_state(before)


_lending = threading.Lock()
_PROBABILITIES = ("dropout_p", "dropout", "p")
_generator_taken: dict[Any, bool] = {}


def _takes_generator(func: Any) -> bool:
    taken = _generator_taken.get(func)
    if taken is None:
        taken = any(argument.name == "generator" for argument in schema_of(func).arguments)
        _generator_taken[func] = taken
    return taken


def _drops_nothing(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether an operation with dropout, such as attention, has probability 0."""
    for position, argument in enumerate(schema_of(func).arguments):
        if argument.name in _PROBABILITIES:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            return bool((argument.default_value if given is None else given) == 0)
    return False


def _device(args: Any, kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    return indexed(torch.device(kwargs.get("device") or HOST))


_local = threading.local()


class _ThreadAwareGenerator:
    """Device generator that draws from the calling thread's stream if it has entered one.

    Activation checkpointing saves and restores the states of generators around each region, by
    `torch.get_rng_state` and the like. Threads that do so with the one generator would put back
    each other's states.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        stream = getattr(_local, "stream", None)
        if stream is None:
            # A thread of autograd's, which has the modes of the one that called for backward.
            mode = innermost(_SupplyGenerator)
            stream = None if mode is None else mode.stream
        own = None if stream is None else stream.generator(self._device)
        return getattr(own or default_generator(self._device), name)


class _ThreadAware:
    """Context for several users in which torch's device functions use a thread's streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._users = 0

    def __enter__(self) -> None:
        with _entering:
            if self._users == 0:
                self._put(_ThreadAwareGenerator(self._device))
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with _entering:
            self._users -= 1
            if self._users == 0:
                self._put(default_generator(self._device))

    def _put(self, generator: Any) -> None:
        put_generator(self._device, generator)


_entering = threading.Lock()
_aware = {HOST: _ThreadAware(HOST)}


def _thread_aware(shared: Sequence[torch.device]) -> AbstractContextManager[Any]:
    if not shared:
        return _aware[HOST]
    stack = ExitStack()
    for device in (HOST, *shared):
        stack.enter_context(_aware.setdefault(device, _ThreadAware(device)))
    return stack
