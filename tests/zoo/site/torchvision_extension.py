"""Stand in for `torchvision.extension`, see `torchvision_operators.py`."""

import torch
from torch import Tensor

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Boxes that overlap no better one by more than the threshold, best first."""
    x1, y1, x2, y2 = dets.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    order = scores.argsort(descending=True, stable=True)
    keep = []
    while order.numel():
        best, order = order[0], order[1:]
        keep.append(best)
        width = torch.minimum(x2[best], x2[order]) - torch.maximum(x1[best], x1[order])
        height = torch.minimum(y2[best], y2[order]) - torch.maximum(y1[best], y1[order])
        shared = width.clamp(min=0) * height.clamp(min=0)
        order = order[shared <= iou_threshold * (area[best] + area[order] - shared)]
    return torch.stack(keep) if keep else dets.new_empty(0, dtype=torch.long)


_library = torch.library.Library("torchvision", "DEF")
_library.define("nms" + _SCHEMA)
_library.define("qnms" + _SCHEMA)
_library.impl("nms", _nms, "CPU")


def _has_ops() -> bool:
    """Without them torchvision takes its own Python code where there is some."""
    return False


def _assert_has_ops() -> None:
    """Operators that are not defined are named by torch's own error."""


def _check_cuda_version() -> int:
    return -1


def _load_library(lib_name: str) -> bool:
    """Load none, such as those that read image files."""
    return False
