"""Process-wide state that workers copy from the launcher for one launch."""

import functools
import logging
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_mgpu._compat import namespace
from lightning_mgpu._compat.python import set_warning_filters
from lightning_mgpu.launch.main_script import MainScript, loaded
from lightning_mgpu.launch.pickler import dumps
from lightning_mgpu.launch.rank_variables import RANK_VARIABLES

if TYPE_CHECKING:
    from lightning_mgpu.launch.torch_state import TorchState

# Read when a process starts or a library loads: a worker that was started under other values has
# to be replaced. Threads (OMP and its like) are set by call instead.
_FROZEN_PREFIXES = (
    *("CUDA", "CUBLAS", "NVIDIA", "HIP", "ROCR", "NCCL"),
    *("TORCH", "PYTORCH", "LD_", "PYTHON"),
)

_ALLOWED_BY_TORCH = ("torch.distributed.", "torch.nested.", "torch._")

TakeState = Callable[[], Callable[[], None] | None]
"""Takes a copy of a library's state and returns what puts it back; `None` if it is not in use."""


@dataclass(frozen=True)
class ProcessState:
    """Process-wide state (environment, cwd, `sys.path`, RNG, log levels) copied to workers.

    Attributes:
        environment: `os.environ` without the variables that say which rank a process is.
        threads: Intra-op threads for each rank.
        torch: torch's settings; `None` if the caller has not imported it.
        random: Generator states; `None` if the receiver is to draw numbers of its own. Those of
            torch are left out if nobody seeded it: then each rank draws its own from there.
        libraries: Pickled functions that put the state of other libraries back.
        namespace: Which of Lightning's packages is in use; `None` if that is not certain.
        main: The main script that the receivers import; `None` if they have no use for it.
    """

    environment: dict[str, str]
    directory: str
    path: list[str]
    argv: list[str]
    umask: int
    threads: int
    torch: "TorchState | None"
    random: dict[str, Any] | None
    log_levels: dict[str, int]
    warning_filters: bytes | None
    libraries: tuple[bytes, ...] = field(repr=False)
    namespace: str | None
    main: MainScript | None

    @classmethod
    def capture(
        cls,
        threads: int,
        *,
        for_ranks: bool = False,
        libraries: Iterable[TakeState] = (),
        main: MainScript | None = None,
    ) -> "ProcessState":
        """The state of this process.

        Args:
            threads: Intra-op threads for each receiver.
            for_ranks: The receivers run one program together, so they draw the same numbers of
                Python and NumPy, whether or not somebody seeded these. Otherwise they do so only
                where somebody seeded torch.
            libraries: Of libraries that torch does not know of.
            main: The main script for the receivers to import; default: what this process has
                imported as that.
        """
        return cls(
            environment={k: v for k, v in os.environ.items() if k not in RANK_VARIABLES},
            directory=os.getcwd(),
            path=list(sys.path),
            argv=list(sys.argv),
            umask=_umask(),
            threads=threads,
            torch=_torch_state(),
            random=_random_states(for_ranks),
            log_levels=_log_levels(),
            warning_filters=_dump_or_none(warnings.filters),
            libraries=_library_states((*libraries, _take_safe_globals)),
            namespace=namespace.known_name(),
            main=main or loaded(),
        )

    def apply(self) -> None:
        """Apply the state to this process."""
        if self.namespace is not None:
            namespace.take_over(self.namespace)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        sys.path[:] = self.path
        sys.argv[:] = self.argv
        os.umask(self.umask)
        if self.main is not None:
            self.main.load()  # what follows may be of its classes
        if self.torch is not None:
            self.torch.apply(self.threads)
        for name, level in self.log_levels.items():
            logger = logging.getLogger(name)
            if logger.level != level:  # setting a level takes a walk over all loggers
                logger.setLevel(level)
        if self.warning_filters is not None:
            set_warning_filters(pickle.loads(self.warning_filters))
        for put_back in self.libraries:
            pickle.loads(put_back)()
        _set_random_states(self.random)


def frozen_environment() -> dict[str, str]:
    """Environment variables that are read only when a process starts."""
    return {name: value for name, value in os.environ.items() if name.startswith(_FROZEN_PREFIXES)}


def threads_per_rank(world_size: int) -> int:
    """Intra-op threads for each of `world_size` ranks on this machine, at least 1.

    The caller's own setting is kept where it is lower, or where ``OMP_NUM_THREADS`` made it.
    """
    import torch

    current = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return current
    return max(1, min(current, _cpu_count() // world_size))


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _torch_state() -> "TorchState | None":
    if "torch" not in sys.modules:
        return None
    from lightning_mgpu.launch.torch_state import TorchState

    return TorchState.capture()


def _is_seeded() -> bool:
    """Return whether torch was seeded by somebody.

    An unseeded generator starts from 53 random bits, so a seed below 2**32 was chosen by a person
    (wrong once in two million unseeded runs, which then draw the same numbers on each rank).
    """
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.initial_seed() < 2**32


def _random_states(for_ranks: bool) -> dict[str, Any] | None:
    seeded = _is_seeded()
    if not seeded and not for_ranks:
        return None
    # Whether somebody seeded Python's and NumPy's generators cannot be told, and a split of the
    # data that ranks draw for themselves must be the same on all of them.
    states: dict[str, Any] = {"python": random.getstate()}
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    if seeded:
        torch = sys.modules["torch"]
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: dict[str, Any] | None) -> None:
    import torch

    if states is None or "torch" not in states:
        torch.seed()
    if states is None:
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        return
    random.setstate(states["python"])
    if "numpy" in states:
        import numpy as np

        np.random.set_state(states["numpy"])
    if "torch" in states:
        _set_torch_states(states)


def _set_torch_states(states: dict[str, Any]) -> None:
    import torch

    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    elif torch.cuda.is_available():
        # The caller has not touched CUDA yet; when it does, it will start from this seed.
        torch.cuda.manual_seed_all(torch.initial_seed())


def _log_levels() -> dict[str, int]:
    loggers = logging.root.manager.loggerDict
    levels = {
        name: logger.level
        for name, logger in list(loggers.items())
        if isinstance(logger, logging.Logger)
    }
    return {logging.root.name: logging.root.level, **levels}


def _take_safe_globals() -> Callable[[], None] | None:
    """Take what the program allows in checkpoints that are loaded with ``weights_only=True``."""
    if "torch" not in sys.modules:
        return None
    serialization = sys.modules["torch"].serialization
    # Those that torch allows are allowed by whatever imports them, which may take its time.
    allowed = [
        each
        for each in serialization.get_safe_globals()
        if not str(getattr(each, "__module__", "")).startswith(_ALLOWED_BY_TORCH)
    ]
    return functools.partial(serialization.add_safe_globals, allowed) if allowed else None


def _library_states(libraries: Iterable[TakeState]) -> tuple[bytes, ...]:
    taken = (take() for take in libraries)
    pickled = (_dump_or_none(put_back) for put_back in taken if put_back is not None)
    return tuple(state for state in pickled if state is not None)


def _dump_or_none(obj: Any) -> bytes | None:
    """Pickle a value; `None` if it cannot be pickled, as that must not stop a launch."""
    try:
        return dumps(obj)
    except Exception:
        return None
