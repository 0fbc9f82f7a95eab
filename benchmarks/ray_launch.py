"""What a run on two Ray workers costs: ours beside raw `TorchTrainer` and bare actors.

``python benchmarks/ray_launch.py`` starts fresh Python processes, in turns, each with a local Ray
of its own, and in each trains the same model for one step several times over. The first call is
*cold*: it starts Ray and the workers. The *later* calls of `RayStrategy` find warm workers, and
bring the weights back; those of the others start their workers anew. Then weights of 1 GB are
trained for a step and brought back.
"""

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from statistics import median

from rounds import QUIET, interleaved, spread

WAYS = ("RayStrategy", "TorchTrainer", "actors")
SMALL, LARGE = 8, 16_000  # features of one square float32 layer: the latter is 1 GB
LATER_CALLS = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FEATURES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]))
        return
    found = interleaved(__file__, WAYS, arguments.rounds, str(SMALL))
    print(f"\nsmall model, {arguments.rounds} rounds; seconds per call, ratio to TorchTrainer")
    for kind in ("cold", "later"):
        times = {
            way: [calls[0] if kind == "cold" else median(calls[1:]) for calls in rounds]
            for way, rounds in found.items()
        }
        for way in WAYS:
            pairs = zip(times[way], times["TorchTrainer"], strict=True)
            ratios = [a / b for a, b in pairs]
            print(f"  {kind:6}{way:14}{spread(times[way])}   ratio {spread(ratios)}")
    (large,) = interleaved(__file__, WAYS[:1], 1, str(LARGE))[WAYS[0]]
    print("\n1 GB of weights, RayStrategy; seconds of a warm call, all included")
    print(f"  {spread(large[1:])}")


def child(way: str, features: int) -> None:
    """Print the seconds that each call takes."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # The path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as directory:
        os.environ["RAY_TMPDIR"] = directory
        times = []
        for _ in range(1 + LATER_CALLS):
            started = time.perf_counter()
            {"RayStrategy": ours, "TorchTrainer": torch_trainer, "actors": actors}[way](features)
            times.append(time.perf_counter() - started)
        import ray

        ray.shutdown()
    print(json.dumps(times))


def fit(strategy: object, devices: object, features: int, plugins: object = None) -> None:
    """One step."""
    import lightning.pytorch as pl
    import torch
    from models.one_layer import OneLayer
    from torch.utils.data import DataLoader, TensorDataset

    trainer = pl.Trainer(
        devices=devices,
        strategy=strategy,
        plugins=plugins,
        max_steps=1,
        **QUIET,
    )
    trainer.fit(OneLayer(features), DataLoader(TensorDataset(torch.ones(4, features))))


def ours(features: int) -> None:
    """`RayStrategy`."""
    from lightning_mgpu.ray import RayStrategy

    fit(RayStrategy(num_workers=2, num_cpus_per_worker=0.5), "auto", features)


def torch_trainer(features: int) -> None:
    """Ray Train's own way for Lightning."""
    start_ray()
    from ray.train import RunConfig, ScalingConfig
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
    from ray.train.torch import TorchTrainer

    def loop() -> None:
        fit(RayDDPStrategy(), "auto", features, [RayLightningEnvironment()])

    TorchTrainer(
        loop,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=str(time.time_ns()), storage_path=os.environ["RAY_TMPDIR"]),
    ).fit()


def actors(features: int) -> None:
    """Two actors that run Lightning's `ddp` as `torchrun` would start it."""
    start_ray()
    import ray

    class Actor:
        def run(self, rank: int) -> None:
            os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500))
            fit("ddp", 2, features)

    group = [ray.remote(num_cpus=0.5)(Actor).remote() for _ in range(2)]
    ray.get([actor.run.remote(rank) for rank, actor in enumerate(group)])
    for actor in group:
        ray.kill(actor)


def start_ray() -> None:
    """As our strategy does."""
    from lightning_mgpu.ray import connection

    connection.connect()


if __name__ == "__main__":
    main()
