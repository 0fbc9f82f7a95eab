"""Seconds of a training step on two CPU devices: as `mode=plan` predicts them, and as measured.

Each round predicts in a fresh process, from a rehearsal on one device, and measures each setting in
another. Devices have one intra-op thread; the optimizer is SGD.
"""

import argparse
import dataclasses
import itertools
import json
import warnings
from statistics import median
from typing import Any, NamedTuple

from rounds import QUIET, interleaved, spread
from steps.pipeline import MODELS, STAGES, WARM_UP, lit, with_trainer

CUTS = {1: ["net.4"], 2: ["net.2", "net.4", "net.6"]}
"""Where stages begin, for each number of them on a device."""
PREDICTED = "predicted"


class Setting(NamedTuple):
    """A pipeline."""

    chunks: int
    per_device: int = 1
    deferred: bool = True
    checkpoint: Any = "never"

    def __str__(self) -> str:
        words = [f"{self.chunks} chunks", f"{self.per_device} a device"]
        words += ["deferred" if self.deferred else "whole"]
        return ", ".join([*words, "recomputed"] if self.checkpoint == "always" else words)


SETTINGS = [
    *(Setting(*each) for each in itertools.product((2, 8, 16), (1, 2), (True, False))),
    *(Setting(8, 1, deferred, "always") for deferred in (True, False)),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps a round (default 6)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="(default: mlp and encoder)")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, model = arguments.child
        if way == PREDICTED:
            print(json.dumps(predict(model)))
        else:
            (setting,) = (setting for setting in SETTINGS if str(setting) == way)
            print(json.dumps(measure(setting, model, arguments.steps)))
        return
    for model in arguments.models:
        ways = [PREDICTED, *map(str, SETTINGS)]
        found = interleaved(
            __file__, ways, arguments.rounds, model, "--steps", str(arguments.steps)
        )
        print(
            f"\n{model}, {arguments.rounds} rounds; seconds a step as predicted, as measured, and"
            " their ratio"
        )
        for index, way in enumerate(ways[1:]):
            predicted, measured = [of_all[index] for of_all in found[PREDICTED]], found[way]
            ratio = median(predicted) / median(measured)
            print(f"  {way:34}{spread(predicted)}  {spread(measured)}   {ratio:.3f}", flush=True)


def predict(model: str) -> list[float]:
    """Seconds of a step, for each setting."""
    import lightning.pytorch as pl
    import torch

    from lightning_mgpu.plan.options import Options
    from lightning_mgpu.plan.predict import predict
    from lightning_mgpu.plan.rehearsal import Rehearsal

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options = Options(
        stages=[STAGES, 2 * STAGES],
        chunks=sorted({setting.chunks for setting in SETTINGS}),
        replicas=[1],
        bandwidth=float("inf"),  # the stages share their memory
        latency=0.0,
    )
    rehearsal = Rehearsal(split_at=CUTS[2])
    rehearsal.prepare(options)
    module, batch = lit(model, [])
    trainer = pl.Trainer(devices=1, strategy=rehearsal, max_epochs=-1, **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 100, batch_size=None))
    profile = rehearsal.profile()
    found = []
    for chunks, per_device, deferred, checkpoint in SETTINGS:
        names = profile.split_at if per_device == 2 else profile.split_at[1:2]
        own = dataclasses.replace(
            options,
            stages=[STAGES * per_device],
            stages_per_device=[per_device],
            chunks=[chunks],
            checkpoint=[checkpoint],
            defer_weight_gradients=[deferred],
        )
        (row,) = predict(dataclasses.replace(profile, split_at=names), own).rows
        found.append(row.seconds)
    return found


def measure(setting: Setting, model: str, steps: int) -> float:
    """Median seconds of a step."""
    import torch

    torch.set_num_threads(1)
    options = {
        "split_at": CUTS[setting.per_device],
        "stages_per_device": setting.per_device,
        "defer_weight_gradients": setting.deferred,
        "checkpoint": setting.checkpoint,
    }
    stamps = with_trainer(model, steps, setting.chunks, **options)[WARM_UP:]
    return median(after - before for before, after in itertools.pairwise(stamps))


if __name__ == "__main__":
    main()
