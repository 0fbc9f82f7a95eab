"""Register the strategies with Lightning once Lightning is imported.

It takes seconds to import, which programs that train nothing should not wait for: the command's
``--help``, the driver of a sweep.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LIGHTNING = "lightning.pytorch"
_STRATEGIES = "lightning_mgpu.strategies"


def register() -> None:
    """Register the strategies now, or as soon as Lightning has been imported."""
    if _LIGHTNING in sys.modules:
        importlib.import_module(_STRATEGIES)
    elif not any(isinstance(finder, _AfterLightning) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterLightning())


class _AfterLightning(MetaPathFinder):
    """Import hook that calls us after Lightning has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIGHTNING:
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module(_STRATEGIES)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
