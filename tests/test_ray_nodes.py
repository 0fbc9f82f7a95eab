"""Several Ray nodes, on one machine."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_SCRIPT = """
import json, socket, subprocess, sys
import boring, torch
import lightning.pytorch as pl
import ray
from ray.cluster_utils import Cluster
from lightning_mgpu.ray import RayStrategy

class Facts(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        mine = torch.tensor([trainer.global_rank, trainer.node_rank, trainer.local_rank,
                             trainer.num_nodes, trainer.world_size,
                             trainer.train_dataloader.sampler.num_replicas])
        self.facts = pl_module.all_gather(mine).tolist()

class Leaves(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and trainer.node_rank == 1 and trainer.ckpt_path is None:
            import os, psutil
            raylet = psutil.Process(os.getppid())
            assert raylet.name() == "raylet"
            raylet.kill()

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    cluster = Cluster()
    cluster.add_node(num_cpus=2, include_dashboard=False, ray_client_server_port=port)
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address)
    facts = Facts()
    strategy = RayStrategy(num_workers=3, find_unused_parameters=False)
    model = boring.Classifier()
    trainer = boring.trainer(strategy, "auto", callbacks=[facts])
    trainer.fit(model, datamodule=boring.Blobs())
    predictions = torch.cat(trainer.predict(model, datamodule=boring.Blobs()))
    in_order = torch.allclose(predictions, model(boring.blobs()[:][0]))

    cluster.add_node(num_cpus=1)  # stands in for the node that is lost
    survivor = boring.trainer(
        RayStrategy(num_workers=3, max_failures=1), "auto", callbacks=[Leaves()], max_epochs=3
    )
    survivor.fit(boring.Classifier(), datamodule=boring.Blobs())
    ray.shutdown()
    subprocess.run([sys.executable, "client.py", str(port)], check=True)
    command = ["-m", "lightning_mgpu", "+strategy=ray", f"ray.address=ray://127.0.0.1:{port}",
               "trainer=cpu", "trainer.max_epochs=1", "data.batch_size=64", "hydra.run.dir=laptop"]
    subprocess.run([sys.executable, *command], check=True)
    with open("facts.json", "w") as file:
        json.dump([facts.facts, in_order, survivor.current_epoch], file)
    cluster.shutdown()
"""

# A laptop: this process is no part of the cluster.
_CLIENT = """
import sys
import boring, ray, torch
from lightning_mgpu.ray import RayStrategy

if __name__ == "__main__":
    ray.init(f"ray://127.0.0.1:{sys.argv[1]}")
    model = boring.Classifier()
    trainer = boring.trainer(RayStrategy(num_workers=2), "auto")
    trainer.fit(model, datamodule=boring.Blobs())
    assert trainer.state.finished and trainer.global_step == 6
    predictions = torch.cat(trainer.predict(model, datamodule=boring.Blobs()))
    torch.testing.assert_close(predictions, model(boring.blobs()[:][0]))
"""


def test_several_nodes_one_that_is_lost_and_a_client(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    (tmp_path / "client.py").write_text(_CLIENT)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    foreign = ("RAY_", "PYTEST_")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="mgpu-") as directory:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
            **{"RAY_TMPDIR": directory, "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled"},
        }
        done = subprocess.run(
            [sys.executable, "script.py"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    facts, in_order, epochs = json.loads((tmp_path / "facts.json").read_text())
    # Global, node and local rank; nodes, world and the sampler's share.
    two_first = [[0, 0, 0, 2, 3, 3], [1, 0, 1, 2, 3, 3], [2, 1, 0, 2, 3, 3]]
    one_first = [[0, 0, 0, 2, 3, 3], [1, 1, 0, 2, 3, 3], [2, 1, 1, 2, 3, 3]]
    assert facts in (two_first, one_first)
    assert in_order
    assert epochs == 3
    assert (tmp_path / "laptop" / "metrics.csv").exists()
    assert (tmp_path / "laptop" / "checkpoints" / "last.ckpt").exists()
