"""The parity suite and the launcher's tests, with `pytorch_lightning` in place of `lightning`.

In a file of its own, and not at the end, since it takes minutes beside which others can run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mgpu._compat.namespace import VARIABLE

TESTS = Path(__file__).parents[1]

# Of the whole suite, which can be run like this as well: what depends on Lightning most.
_PARTS = (
    "compat",
    "strategies/test_data_parallel_parity.py",
    "strategies/test_pipeline_parity.py",
    "strategies/test_ddp.py",
)


@pytest.mark.skipif(VARIABLE in os.environ, reason="the namespace is given")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tests_pass_with_the_other_namespace() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        + [str(TESTS / part) for part in _PARTS],
        capture_output=True,
        text=True,
        env={**os.environ, VARIABLE: "pytorch_lightning"},
    )
    assert done.returncode == 0, done.stdout
