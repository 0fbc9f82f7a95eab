"""Seconds of a training step on two CPU stages: as `mode=plan` predicts them, and as measured.

Each round predicts in a fresh process, from a rehearsal on one device, and measures each number of
micro-batches in another. Stages have one intra-op thread; the optimizer is SGD.
"""

import argparse
import itertools
import json
import warnings
from collections.abc import Sequence
from statistics import median

from rounds import QUIET, interleaved, spread
from steps.pipeline import CUT, MODELS, STAGES, WARM_UP, lit, with_trainer

CHUNKS = (2, 8, 16)
PREDICTED = "predicted"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps a round (default 6)")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="(default 2, 8, 16)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="(default: mlp and encoder)")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, model = arguments.child
        if way == PREDICTED:
            print(json.dumps(predict(model, arguments.chunks)))
        else:
            print(json.dumps(measure(int(way), model, arguments.steps)))
        return
    options = ("--steps", str(arguments.steps), "--chunks", *map(str, arguments.chunks))
    for model in arguments.models:
        ways = [PREDICTED, *map(str, arguments.chunks)]
        found = interleaved(__file__, ways, arguments.rounds, model, *options)
        print(
            f"\n{model}, {arguments.rounds} rounds; micro-batches, seconds a step as predicted and"
            " as measured, and their ratio"
        )
        for index, chunks in enumerate(arguments.chunks):
            predicted = [of_all[index] for of_all in found[PREDICTED]]
            measured = found[str(chunks)]
            ratio = median(predicted) / median(measured)
            print(f"  {chunks:3}{spread(predicted)}  {spread(measured)}   {ratio:.3f}", flush=True)


def predict(model: str, chunks: Sequence[int]) -> list[float]:
    """Seconds of a step, for each number of micro-batches."""
    import lightning.pytorch as pl
    import torch

    from lightning_mgpu.plan.options import Options
    from lightning_mgpu.plan.predict import predict
    from lightning_mgpu.plan.rehearsal import Rehearsal

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options = Options(
        stages=[STAGES],
        chunks=chunks,
        replicas=[1],
        checkpoint=["never"],
        bandwidth=float("inf"),  # the stages share their memory
        latency=0.0,
    )
    rehearsal = Rehearsal(split_at=CUT)
    rehearsal.prepare(options)
    module, batch = lit(model, [])
    trainer = pl.Trainer(devices=1, strategy=rehearsal, max_epochs=-1, **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 100, batch_size=None))
    return [row.seconds for row in predict(rehearsal.profile(), options).rows]


def measure(chunks: int, model: str, steps: int) -> float:
    """Median seconds of a step."""
    import torch

    torch.set_num_threads(1)
    stamps = with_trainer(model, steps, chunks)[WARM_UP:]
    return median(after - before for before, after in itertools.pairwise(stamps))


if __name__ == "__main__":
    main()
