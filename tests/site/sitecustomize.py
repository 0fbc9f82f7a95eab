"""Let every program that a test starts import Lightning in half the time.

Python runs this file at the start of each process that has its directory in PYTHONPATH. Most of a
short program's time goes into importing torch, Lightning and Ray, and a third of that for nothing:
into collecting garbage where there is none, and into scipy and matplotlib, which torchmetrics
imports wherever they are installed. It gets stand-ins, which nobody else sees.
"""

import contextlib
import gc
import importlib.abc
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace

import other_namespace

_LARGE = ("torch", "torchmetrics", "lightning", "pytorch_lightning", "ray")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _LARGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            _import_quickly(spec.loader)
        return spec


def _import_quickly(loader: importlib.abc.Loader) -> None:
    def exec_module(module: ModuleType) -> None:
        # As it was, so that the module has the loader that it always has.
        del vars(loader)["exec_module"]
        with _no_collection():
            if module.__name__ == "torchmetrics":
                with _stand_ins():
                    loader.exec_module(module)
            else:
                loader.exec_module(module)

    vars(loader)["exec_module"] = exec_module


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def _no_style(*_: object) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """What torchmetrics takes of them when it is imported: types for annotations, and a style."""
    contents: dict[str, dict[str, object]] = {
        "matplotlib": {"colors": SimpleNamespace(Colormap=object)},
        "matplotlib.axes": {"Axes": object},
        "matplotlib.pyplot": {
            "Figure": object,
            "style": SimpleNamespace(context=_no_style),
        },
        "scipy.signal": {"hamming": None},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name])
    for name in ("axes", "pyplot"):
        vars(modules["matplotlib"])[name] = modules[f"matplotlib.{name}"]
    if any(name in sys.modules for name in modules):  # somebody needs the real ones
        yield
        return
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


sys.meta_path.insert(0, _Finder())
other_namespace.install()
