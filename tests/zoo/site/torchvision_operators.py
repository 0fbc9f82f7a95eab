"""Let torchvision be imported where its compiled operators do not fit the build of torch.

PyPI's torchvision is compiled for CUDA, and beside a CPU build of torch neither it nor what imports
it can be imported: timm, segmentation_models_pytorch and, through torchmetrics, Lightning. `make
zoo` imports this module at each start of its environment, so worker processes have it too.

What is replaced is `torchvision.extension`, and only where the real one cannot load its library.
Models need no operator but `nms`, in evaluation; it is defined here in Python.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "torchvision.extension" or _can_be_loaded(next(iter(path))):
            return None
        return importlib.util.spec_from_file_location(
            name, Path(__file__).with_name("torchvision_extension.py")
        )


def _can_be_loaded(package: str) -> bool:
    import torch  # takes a second, and only those who import torchvision need it

    try:
        for library in Path(package).glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


sys.meta_path.insert(0, _Finder())
