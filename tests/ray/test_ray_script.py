"""Programs that start Ray themselves, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Variables for a program whose Ray keeps to itself."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    foreign = ("RAY_", "PYTEST_")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="mgpu-") as directory:
        yield {
            **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
            **{"RAY_TMPDIR": directory, "PYTHONPATH": path, "HOME": directory},
            "PYTHONUNBUFFERED": "1",
        }


_OWN = """
import json, os, signal
import boring
from lightning_mgpu.ray import RayStrategy

if __name__ == "__main__":
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    trainer = boring.trainer(RayStrategy(num_workers=2, num_cpus_per_worker=0.5), "auto")
    trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
    import ray
    facts = {
        "handlers": before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "nodes": len(ray.nodes()),
        "dashboard": ray._private.worker._global_node.webui_url,
        "authentication": os.environ["RAY_AUTH_MODE"],
    }
    with open("facts.json", "w") as file:
        json.dump(facts, file)
    try:
        boring.trainer(RayStrategy(num_workers=500), "auto").fit(boring.Classifier())
    except Exception as error:
        print("refused:", error)
"""


def test_script_has_a_cluster_of_its_own(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_OWN)
    done = subprocess.run(
        [sys.executable, "script.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["handlers"], "Ray's handlers stayed"
    assert (facts["nodes"], facts["authentication"]) == (1, "token")
    assert not facts["dashboard"]
    assert "refused: The workers ask for 500 × (CPU: 1), and the cluster has 1 node" in done.stdout


_CELLS = (
    "import boring, torch\nfrom lightning_mgpu.ray import RayStrategy",
    """class Net(boring.Classifier):
    factor = 2.0

    def training_step(self, *args):
        return self.factor * super().training_step(*args)
""",
    """model = Net()
before = model.net[0].weight.detach().clone()
trainer = boring.trainer(RayStrategy(num_workers=2, num_cpus_per_worker=0.5), "auto")
trainer.fit(model, datamodule=boring.Blobs())
""",
    "print('trained:', trainer.global_step, not torch.equal(before, model.net[0].weight))",
)


def test_notebook_trains_what_its_cells_define(environment: dict[str, str]) -> None:
    """There is no script that a worker could import `Net` from."""
    cells = f"for cell in {_CELLS!r}: exec(compile(cell, '<cell>', 'exec'), globals())"
    done = subprocess.run(
        [sys.executable, "-"],
        input=cells,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "trained: 6 True" in done.stdout


_ENDLESS = """
import pathlib, time
import boring, ray
from lightning_mgpu.ray import RayStrategy, worker_group

def everything_is_free():
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return True

class Endless(boring.Classifier):
    def training_step(self, *args):
        pathlib.Path("running").touch()
        time.sleep(0.1)
        return super().training_step(*args)

if __name__ == "__main__":
    trainer = boring.trainer(RayStrategy(num_cpus_per_worker=0.5), "auto", max_epochs=-1)
    try:
        trainer.fit(Endless(), datamodule=boring.Blobs())
    except BaseException as error:
        print(type(error).__name__, trainer.state.status.value, worker_group._groups)
        print("free:", everything_is_free())
"""


def test_ctrl_c_cancels_the_run_and_frees_its_resources(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(_ENDLESS)
    with subprocess.Popen(
        [sys.executable, "script.py"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 150
            while not (tmp_path / "running").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "SystemExit interrupted []" in printed
    assert "free: True" in printed
