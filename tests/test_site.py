"""What the tests' programs get of other libraries, which are imported more quickly for them."""

import subprocess
import sys

_PROGRAM = """
import gc, sys
import lightning.pytorch as pl
assert "matplotlib" not in sys.modules
assert "scipy.signal" not in sys.modules
assert gc.isenabled()
import matplotlib.pyplot, scipy.signal, torchmetrics
figure = matplotlib.pyplot.figure()
assert figure.axes == []
assert scipy.signal.convolve([1, 2], [1, 1]).tolist() == [1, 3, 2]
assert pl.__spec__.loader.exec_module.__func__ is type(pl.__spec__.loader).exec_module
"""


def test_programs_have_the_real_libraries_when_they_ask_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
