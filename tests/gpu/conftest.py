"""On one GPU: two slots, two stages or two ranks of it, or the GPU beside the CPU.

Runs with nothing but torch, lightning, pytest, hypothesis, rich and cloudpickle::

    PYTHONPATH=. python3 -m pytest tests/gpu

`MGPU_DEVICE=cpu` tries the tests themselves where there is no GPU.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

_HERE = Path(__file__).parent


def _is_there() -> bool:
    return torch.cuda.is_available() or "MGPU_DEVICE" in os.environ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not _is_there():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _is_there() and terminalreporter.config.rootpath == _HERE:
        terminalreporter.write_line(
            "There is no CUDA device here, so that nothing was tested. These tests need one GPU."
        )


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a directory of its own, with the memory of the GPU as it was found."""
    monkeypatch.chdir(tmp_path)
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
