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
import json, os, pathlib, socket, subprocess, sys, time
import boring, torch
import lightning.pytorch as pl
import ray
from ray.cluster_utils import Cluster
from lightning_mgpu.ray import RayStrategy, cluster

class Facts(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        mine = torch.tensor([trainer.global_rank, trainer.node_rank, trainer.local_rank,
                             trainer.num_nodes, trainer.world_size,
                             trainer.train_dataloader.sampler.num_replicas])
        self.facts = pl_module.all_gather(mine).tolist()

class Prepared(boring.Blobs):
    def prepare_data(self):
        with open(f"prepared-{ray.get_runtime_context().get_node_id()}", "a") as file:
            file.write("x")

class Worlds(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        sampler = trainer.train_dataloader.sampler
        pathlib.Path(f"epoch-{trainer.current_epoch}").write_text(str(sampler.num_replicas))

class Leaves(pl.Callback):
    def __init__(self, node_id):
        self.node_id = node_id

    def on_train_epoch_start(self, trainer, pl_module):
        here = ray.get_runtime_context().get_node_id() == self.node_id
        if trainer.current_epoch == 1 and here and trainer.ckpt_path is None:
            import psutil
            raylet = psutil.Process(os.getppid())
            assert raylet.name() == "raylet"
            raylet.kill()
            time.sleep(120)  # this process follows

def disk_of_its_own(root):
    # Makes /dev/fd/200 a directory that each node has for itself.
    def hook():
        path = f"{root}/{ray.get_runtime_context().get_node_id()}"
        os.makedirs(path, exist_ok=True)
        os.dup2(os.open(path, os.O_RDONLY), 200)
    return hook

def nodes(count, placement):
    group = cluster.reserve({"CPU": 1.0}, count, count, placement)
    placed = ray.util.placement_group_table(group)["bundles_to_node_id"]
    ray.util.remove_placement_group(group)
    return len(set(placed.values()))

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    machines = Cluster()
    machines.add_node(num_cpus=2, include_dashboard=False, ray_client_server_port=port)
    second = machines.add_node(num_cpus=1)
    ray.init(machines.address)
    placed = [nodes(2, placement) for placement in ("PACK", "SPREAD", "STRICT_SPREAD")]

    # The same workers serve all that follows, until a node is lost.
    kwargs = {"num_workers": (1, 3), "init_hook": disk_of_its_own(os.getcwd())}
    facts, model = Facts(), boring.Classifier()
    try:
        strategy = RayStrategy(**kwargs, storage_path="/dev/fd/200/states")
        boring.trainer(strategy, "auto").fit(model, datamodule=boring.Blobs())
    except ValueError as error:
        refused = str(error)
    strategy = RayStrategy(**kwargs, find_unused_parameters=False)
    trainer = boring.trainer(strategy, "auto", callbacks=[facts])
    trainer.fit(model, datamodule=Prepared())
    predictions = torch.cat(trainer.predict(model, datamodule=boring.Blobs()))
    in_order = torch.allclose(predictions, model(boring.blobs()[:][0]))

    strategy = RayStrategy(**kwargs, max_failures=1, storage_path="states")
    survivor = boring.trainer(strategy, "auto", max_epochs=3,
                             callbacks=[Worlds(), Leaves(second.node_id)])
    survivor.fit(boring.Classifier(), datamodule=boring.Blobs())
    worlds = [pathlib.Path(f"epoch-{epoch}").read_text() for epoch in range(3)]
    while sum(node["Alive"] for node in ray.nodes()) > 1:
        time.sleep(0.1)  # or the client's server looks for it
    ray.shutdown()
    subprocess.run([sys.executable, "client.py", str(port)], check=True)
    command = ["-m", "lightning_mgpu", "+strategy=ray", f"ray.address=ray://127.0.0.1:{port}",
               "trainer=cpu", "trainer.max_epochs=1", "data.batch_size=64", "hydra.run.dir=laptop"]
    subprocess.run([sys.executable, *command], check=True)
    with open("facts.json", "w") as file:
        json.dump(
            {
                "facts": facts.facts,
                "in order": in_order,
                "placed": placed,
                "refused": refused,
                "epochs": survivor.current_epoch,
                "steps": survivor.global_step,
                "worlds": worlds,
            },
            file,
        )
    machines.shutdown()
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
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    foreign = ("RAY_", "PYTEST_")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="mgpu-") as directory:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
            **{"RAY_TMPDIR": directory, "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled"},
            # Else Ray's server for clients may fail where it forks.
            "GRPC_ENABLE_FORK_SUPPORT": "0",
        }
        done = subprocess.run(
            [sys.executable, "script.py"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "facts.json").read_text())
    # Global, node and local rank; nodes, world and the sampler's share.
    two_first = [[0, 0, 0, 2, 3, 3], [1, 0, 1, 2, 3, 3], [2, 1, 0, 2, 3, 3]]
    one_first = [[0, 0, 0, 2, 3, 3], [1, 1, 0, 2, 3, 3], [2, 1, 1, 2, 3, 3]]
    assert seen["facts"] in (two_first, one_first)
    assert [path.read_text() for path in tmp_path.glob("prepared-*")] == ["x", "x"]  # once a node
    assert seen["in order"]
    assert seen["placed"] == [1, 2, 2]
    assert (
        "storage_path='/dev/fd/200/states'`: files that rank 0 writes there are not visible to rank"
        in seen["refused"]
    )
    # Three workers until a node is lost in the second epoch, then the two that there is room for.
    assert seen["epochs"] == 3
    assert seen["worlds"] == ["3", "2", "2"]
    assert seen["steps"] == 4 + 2 * 6
    assert list((tmp_path / "states").iterdir()) == []
    assert (tmp_path / "laptop" / "metrics.csv").exists()
    assert (tmp_path / "laptop" / "checkpoints" / "last.ckpt").exists()
