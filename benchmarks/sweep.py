"""What a search costs beside its training: sixteen short trials, two at a time, in five ways.

``python benchmarks/sweep.py`` runs the same trials (one epoch of digits) with our sweeper, with a
plain Lightning function under `ray.tune.Tuner` (its defaults, and with `reuse_actors`), with
Hydra's own sweeper, one after another, and with Hydra's launcher on joblib (pip install
hydra-joblib-launcher; left out where it is not installed). Every way is a process of its own, with
its own Ray. Printed are medians over the rounds with their range, and the ratio to ours of the same
round.
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
from pathlib import Path

from rounds import interleaved, spread

MODELS = Path(__file__).parent.absolute() / "models"
# What each way adds to the command line of the application in `models`.
HYDRA = {
    "ours": [
        *(
            "hydra/sweeper=ray_tune",
            "hydra/sweeper/search_alg=grid",
            "hydra/sweeper/scheduler=fifo",
        ),
        *("hydra.sweeper.ray.num_cpus=2", "hydra.sweeper.report=false"),  # the others draw nothing
    ],
    "hydra basic": [],
    "hydra joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}
WAYS = ("ours", "tuner", "tuner, reuse", "hydra basic", "hydra joblib")
RATES = [round(0.001 * (number + 1), 3) for number in range(16)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--child", metavar="WAY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with tempfile.TemporaryDirectory() as directory, _working_in(directory):
            started = time.perf_counter()
            run(arguments.child)
            print(json.dumps(time.perf_counter() - started))
        return
    has_joblib = find_spec("hydra_plugins.hydra_joblib_launcher") is not None
    ways = [way for way in WAYS if way != "hydra joblib" or has_joblib]
    found = interleaved(__file__, ways, arguments.rounds)
    print(f"{len(RATES)} trials, {arguments.rounds} rounds; seconds, and the ratio to ours")
    for way in ways:
        ratios = [other / own for other, own in zip(found[way], found["ours"], strict=True)]
        print(f"  {way:14}{spread(found[way])}   {spread(ratios)}")


def run(way: str) -> None:
    """All trials in one way, from a process that has imported nothing yet."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    if way in HYDRA:
        hydra_sweep(way)
    else:
        tuner(reuse=way == "tuner, reuse")


def hydra_sweep(way: str) -> None:
    """The application in `models`, by our sweeper or by what Hydra has."""
    rates = ",".join(map(str, RATES))
    arguments = ["-m", f"lr=choice({rates})", "hydra.sweep.dir=sweep", *HYDRA[way]]
    application = str(MODELS / "sweep_app.py")
    subprocess.run([sys.executable, application, *arguments], check=True, stdout=sys.stderr)


def tuner(*, reuse: bool) -> None:
    """A function as one writes it by hand."""
    import ray
    from ray import tune

    def trial(config: dict[str, float]) -> None:
        sys.path.insert(0, str(MODELS))
        from sweep_training import fit

        fit(config["lr"], os.getcwd())
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
