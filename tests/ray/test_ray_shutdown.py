"""Programs that shut Ray down between two calls, as fixtures and notebooks do."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_SCRIPT = """
import os
import boring, ray
import lightning.pytorch as pl
from lightning_mgpu.ray import RayStrategy, close, connection, worker_group

class Variables(pl.Callback):
    seen = None

    def on_test_start(self, trainer, pl_module):
        self.seen = os.environ.get("MODE"), os.environ.get("OTHER")

if __name__ == "__main__":
    model, data = boring.Classifier(), boring.Blobs()
    trainer = boring.trainer(RayStrategy(num_workers=1, num_cpus_per_worker=0.5), "auto",
                             callbacks=[variables := Variables()])
    options = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False}
    connection.connect(options)
    trainer.fit(model, datamodule=data)
    (first,) = worker_group._groups
    print("ours:", connection.is_ours())
    ray.shutdown()

    os.environ.update(MODE="driver", OTHER="driver")
    with ray.init(**options, runtime_env={"env_vars": {"MODE": "worker"}}):
        (figures,) = trainer.test(model, datamodule=data)
        print("tested:", figures["test_loss"] < 1.1, "ours:", connection.is_ours())
        print("variables:", *variables.seen)
        connection.connect({"address": "elsewhere:1"})  # the program's own is used as it is
        assert worker_group._groups != [first] and len(worker_group._groups) == 1
    close()
    print("left:", worker_group._groups)

    connection.connect(options)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=data)
    print("steps:", trainer.global_step, "ours:", connection.is_ours())
"""


def test_calls_on_one_ray_after_another(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="mgpu-") as directory:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_"))},
            **{"RAY_TMPDIR": directory, "PYTHONPATH": path, "HOME": directory},
        }
        done = subprocess.run(
            [sys.executable, "script.py"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ":" in line]
    assert lines[-5:] == [
        "ours: True",
        "tested: True ours: False",
        "variables: worker driver",
        "left: []",
        "steps: 24 ours: True",
    ], done.stdout
