"""Call functions once one of Lightning's packages has been imported."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from lightning_mgpu._compat.namespace import Namespace


def when_imported(namespace: Namespace, function: Callable[[Namespace], None]) -> None:
    """Call a function now if a namespace has been imported, else as soon as it is.

    Args:
        namespace: Which.
        function: Given the namespace; called once, however often it is named here until then.
    """
    if namespace.is_imported():
        function(namespace)
        return
    listening = (f for f in sys.meta_path if isinstance(f, _AfterImport))
    finder = next((f for f in listening if f.namespace == namespace), None)
    if finder is None:
        finder = _AfterImport(namespace)
        sys.meta_path.insert(0, finder)
    if function not in finder.functions:
        finder.functions.append(function)


class _AfterImport(MetaPathFinder):
    """Import hook that calls us after one of Lightning's packages has been imported."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.functions: list[Callable[[Namespace], None]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.namespace.pytorch:
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
            if self.namespace.is_imported():
                for function in self.functions:
                    function(self.namespace)

        vars(spec.loader)["exec_module"] = exec_module
        return spec
