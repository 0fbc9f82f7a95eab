"""Run tests that import `lightning.pytorch` with `pytorch_lightning` in its place.

With ``LIGHTNING_MGPU_NAMESPACE=pytorch_lightning`` in the environment, `lightning.pytorch`,
`lightning.fabric` and what is below them are other names of the modules of `pytorch_lightning`
and `lightning_fabric`, and `lightning` is `pytorch_lightning`. To run tests so by hand, have this
directory in PYTHONPATH as well.
"""

import importlib
import importlib.abc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_REAL = {
    "lightning.pytorch": "pytorch_lightning",
    "lightning.fabric": "lightning_fabric",
    "lightning": "pytorch_lightning",
}


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its other name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if _real(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_real(spec.name))
        vars(spec)["real"] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = vars(module.__spec__)["real"]  # which the import has just replaced


def _real(name: str) -> str:
    for alias, real in _REAL.items():
        if name == alias or name.startswith(f"{alias}."):
            return real + name.removeprefix(alias)
    return ""


def install() -> None:
    """Do so in this process if the variable says so."""
    if os.environ.get("LIGHTNING_MGPU_NAMESPACE") == "pytorch_lightning":
        sys.meta_path.insert(0, _Alias())
