"""What a search costs beside its training: sixteen short trials, two at a time, in six ways.

``python benchmarks/sweep.py`` runs the same trials (one epoch of digits) with our sweeper, with a
plain Lightning function under `ray.tune.Tuner` (its defaults, and with `reuse_actors`), with
Hydra's own sweeper, one after another, and with Hydra's launcher on joblib (left out where
``hydra-joblib-launcher`` is not installed). ``--epochs 40`` has longer trials, and our sweeper once
more with early stopping (ASHA, its default), which the others do not have. Every way is a process
of its own, with its own Ray. Printed are medians over the rounds with their range, the ratio to
ours of the same round, and what lies between two trials of one process: from the end of one's
training to the start of the next, which is what a sweeper costs per warm trial.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median

from models.sweep_training import CLOCKS
from rounds import interleaved, spread

MODELS = Path(__file__).parent.absolute() / "models"
# What each way adds to the command line of the application in `models`.
OURS = [
    *("hydra/sweeper=ray_tune", "hydra/sweeper/search_alg=grid", "hydra.sweeper.ray.num_cpus=2"),
    "hydra.sweeper.report=false",  # the others draw nothing
]
ASHA = "ours, ASHA"
HYDRA = {
    "ours": [*OURS, "hydra/sweeper/scheduler=fifo"],
    ASHA: [*OURS, "hydra.sweeper.metric=val_loss", "hydra.sweeper.scheduler.max_t=${epochs}"],
    "hydra basic": [],
    "hydra joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}
WAYS = ("ours", ASHA, "tuner", "tuner, reuse", "hydra basic", "hydra joblib")
RATES = [round(0.001 * (number + 1), 3) for number in range(16)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--epochs", type=int, default=1, help="of each trial (default 1)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="default: all")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "EPOCHS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with tempfile.TemporaryDirectory() as directory, _working_in(directory):
            os.environ[CLOCKS] = str(Path("clocks").absolute())
            Path("clocks").mkdir()
            started = time.perf_counter()
            way, epochs = arguments.child
            run(way, int(epochs))
            print(json.dumps([time.perf_counter() - started, between_trials()]))
        return
    left_out = set()
    if find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        left_out.add("hydra joblib")
    if arguments.epochs == 1:  # nothing to stop
        left_out.add(ASHA)
    # Ratios are to ours.
    ways = [way for way in WAYS if way in {"ours", *arguments.ways} - left_out]
    found = interleaved(__file__, ways, arguments.rounds, str(arguments.epochs))
    print(
        f"{len(RATES)} trials of {arguments.epochs} epochs, {arguments.rounds} rounds;"
        " seconds, and the ratio to ours"
    )
    for way in ways:
        whole = [seconds for seconds, _ in found[way]]
        ratios = [other / own for other, (own, _) in zip(whole, found["ours"], strict=True)]
        print(f"  {way:14}{spread(whole)}   {spread(ratios)}")
    print("seconds between two trials of one process")
    for way in ways:
        between = [seconds for _, seconds in found[way] if seconds is not None]
        print(f"  {way:14}{spread(between) if between else 'each has a process of its own'}")


def between_trials() -> float | None:
    """Median seconds from the end of a trial to the next in the same process, if any had two."""
    gaps = []
    for clock in Path("clocks").iterdir():
        trials = sorted(json.loads(line) for line in clock.read_text().splitlines())
        gaps += [start - end for (_, end), (start, _) in pairwise(trials)]
    return median(gaps) if gaps else None


def run(way: str, epochs: int) -> None:
    """All trials in one way, from a process that has imported nothing yet."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    if way in HYDRA:
        hydra_sweep(way, epochs)
    else:
        tuner(epochs, reuse=way == "tuner, reuse")


def hydra_sweep(way: str, epochs: int) -> None:
    """The application in `models`, by our sweeper or by what Hydra has."""
    rates = ",".join(map(str, RATES))
    arguments = ["-m", f"lr=choice({rates})", f"epochs={epochs}", "hydra.sweep.dir=sweep"]
    arguments += HYDRA[way]
    application = str(MODELS / "sweep_app.py")
    subprocess.run([sys.executable, application, *arguments], check=True, stdout=sys.stderr)


def tuner(epochs: int, *, reuse: bool) -> None:
    """A function as one writes it by hand."""
    import ray
    from ray import tune

    def trial(config: dict[str, float]) -> None:
        sys.path.insert(0, str(MODELS))
        from sweep_training import fit

        fit(config["lr"], epochs, os.getcwd())
        tune.report({"done_with": config["lr"]})

    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=directory)
    warnings.filterwarnings("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        tune.Tuner(
            trial,
            param_space={"lr": tune.grid_search(RATES)},
            tune_config=tune.TuneConfig(reuse_actors=reuse),
            run_config=tune.RunConfig(storage_path=os.getcwd(), verbose=0),
        ).fit()
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _working_in(directory: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
