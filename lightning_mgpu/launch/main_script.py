"""Import the program's main script in another process, as `multiprocessing` does.

There the script runs under another name, so that what is below ``if __name__ == "__main__"`` does
not, and ``sys.modules["__main__"]`` is its module from then on::

    driver: python app.py          trial: a worker process of Ray
    __main__ = app.py              __main__ = app.py, imported
    pickles `Net` by its name ---> finds `__main__.Net`
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

_MAIN, _IMPORTED = "__main__", "__mp_main__"

_loaded: "MainScript | None" = None
_replaced: list[ModuleType] = []  # their functions may still run
_by_name: ContextVar[bool] = ContextVar("by_name", default=False)


class MainScriptError(RuntimeError):
    """The main script cannot be imported."""


@dataclass(frozen=True)
class MainScript:
    """The main script of a program.

    Attributes:
        path: Its file.
        source: What the file holds, for machines that do not have it; `None` for a module.
        module: Its full name, if it was started by ``python -m``.
    """

    path: str
    source: bytes | None
    module: str | None = None

    @classmethod
    def of_this_process(cls) -> "MainScript | None":
        """The script of this program, or that which was loaded here.

        Returns:
            `None` in a notebook and an interpreter, and for a package's ``__main__.py``: where
            that is the program, nothing else is expected of it.
        """
        main = sys.modules[_MAIN]
        path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
        if _loaded is not None or path is None or not Path(path).is_file():
            return _loaded
        if spec is None:
            return cls(path, Path(path).read_bytes())
        name = str(spec.name)
        return None if name.split(".")[-1] == _MAIN else cls(path, None, name)

    def load(self) -> None:
        """Import the script in this process, once.

        Raises:
            MainScriptError: It cannot be imported, or would run the program again.
        """
        global _loaded
        if _loaded is not None:
            return
        main = ModuleType(_IMPORTED)
        before = {name: sys.modules.get(name) for name in (_MAIN, _IMPORTED)}
        sys.modules[_MAIN] = sys.modules[_IMPORTED] = main
        try:
            exec(self._prepare(main), vars(main))
        except (Exception, SystemExit) as error:
            for name, module in before.items():
                if module is not None:
                    sys.modules[name] = module
            raise MainScriptError(
                f"{self.path} cannot be imported by the trial's process"
                f" ({type(error).__name__}: {error}). Put what runs the program below"
                ' `if __name__ == "__main__":`; what is above is imported for each process.'
            ) from error
        _replaced.extend(module for module in before.values() if module is not None)
        _loaded = self
        _rename(main)

    def _prepare(self, main: ModuleType) -> CodeType:
        """Give the module what the interpreter gives a main script; return its code."""
        if self.module is None:
            assert self.source is not None
            vars(main).update(__file__=self.path, __package__=None)
            return compile(self.source, self.path, "exec")
        spec = importlib.util.find_spec(self.module)
        if spec is None or not isinstance(spec.loader, InspectLoader):
            raise ModuleNotFoundError(f"No module named {self.module!r}")
        vars(main).update(
            __file__=spec.origin, __package__=spec.parent, __spec__=spec, __loader__=spec.loader
        )
        code = spec.loader.get_code(self.module)
        assert isinstance(code, CodeType)
        return code


def loaded() -> MainScript | None:
    """The main script that was imported in this process; `None` elsewhere."""
    return _loaded


@contextmanager
def pickled_by_name() -> Iterator[None]:
    """Context in which the script's classes are pickled for processes that have loaded it."""
    token = _by_name.set(True)
    try:
        yield
    finally:
        _by_name.reset(token)


def reduce_by_name(obj: Any) -> tuple[Any, ...] | None:
    """Pickle a class or function of the main script by its name.

    Returns:
        As `__reduce_ex__`; `None` for other objects, and for processes without the script.
    """
    if _loaded is None and not _by_name.get():
        return None
    if not isinstance(obj, (type, FunctionType)) or obj.__module__ != _MAIN:
        return None
    found, depth = _find(obj.__qualname__), 0
    while found is not None and found is not obj:  # as under `hydra.main`
        found, depth = getattr(found, "__wrapped__", None), depth + 1
    return None if found is None else (_get, (obj.__qualname__, depth))


def _get(name: str, depth: int) -> Any:
    found = _find(name)
    for _ in range(depth):
        found = getattr(found, "__wrapped__", None)
    if found is None:
        raise MainScriptError(
            f"The main script has no `{name}` when it is imported by the trial's process. Define it"
            ' at the top level, not below `if __name__ == "__main__":`.'
        )
    return found


def _find(name: str) -> Any:
    found: Any = sys.modules[_MAIN]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _rename(main: ModuleType) -> None:
    """Have classes and functions say that they are of the main script, as in the driver.

    Checkpoints name the classes of hyperparameters so.
    """
    main.__name__ = _MAIN
    pending: list[Any] = [main]
    while pending:
        for value in list(vars(pending.pop()).values()):
            if isinstance(value, (type, FunctionType)) and value.__module__ == _IMPORTED:
                value.__module__ = _MAIN
                pending.extend([value] if isinstance(value, type) else ())
