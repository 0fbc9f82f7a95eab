"""How many epochs are trained until a search has found a configuration that is good enough.

``python benchmarks/search_quality.py`` searches a LeNet on digits until one trial has a validation
accuracy of 0.98, and counts the epochs of all trials until then: random search without stopping,
ASHA, Optuna with ASHA, BOHB; four trials at a time, of at most 50 epochs. The space is that of
somebody who knows nothing yet, seven decades of learning rates among it, and few configurations get
there. (In the shipped ``+search_space=lenet`` nine of nineteen did, within 8 to 18 epochs; where so
many will do, there is little to stop.) Only epochs count, so that the machine may be busy. A search
that is done is a line of a file, and is not run again: ``--runs 3`` does three more and stops,
``--picture search.png`` draws what there is.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

MODELS = Path(__file__).parent.absolute() / "models"
GOAL = 0.98
MAX_EPOCHS = 50
# Beside the sizes of the shipped space.
SPACE = (
    "model.lr=tag(log,interval(1e-6,10))",
    "model.dropout=interval(0,0.95)",
    "data.batch_size=choice(16,32,64,128,256)",
)
# The time of schedulers is epochs.
WAYS: dict[str, list[str]] = {
    "random": ["scheduler=fifo"],
    "ASHA": ["scheduler=asha"],
    "Optuna + ASHA": ["search_alg=optuna", "scheduler=asha"],
    "BOHB": ["search_alg=bohb", "scheduler=bohb"],
}
Counts = dict[str, dict[int, int]]


def main() -> None:
    """Search what is left to search, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="of each search (default 5)")
    parser.add_argument("--runs", type=int, help="searches to run now; default: all that are left")
    parser.add_argument("--file", type=Path, default=Path("search_quality.jsonl"))
    parser.add_argument("--picture", type=Path, help="where to draw the counts (PNG)")
    arguments = parser.parse_args()
    found = read(arguments.file)
    left = [
        (way, seed) for seed in range(arguments.seeds) for way in WAYS if seed not in found[way]
    ]
    for way, seed in left[: arguments.runs]:
        found[way][seed] = search(way, seed)
        with arguments.file.open("a") as file:
            file.write(json.dumps({"way": way, "seed": seed, "epochs": found[way][seed]}) + "\n")
    show(found)
    if arguments.picture is not None:
        draw(found, arguments.picture)


def read(path: Path) -> Counts:
    """What was counted so far, by way and seed."""
    found: Counts = {way: {} for way in WAYS}
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        found[entry["way"]][entry["seed"]] = entry["epochs"]
    return found


def search(way: str, seed: int) -> int:
    """Epochs trained until the goal, of one search."""
    with tempfile.TemporaryDirectory() as directory:
        seen = Path(directory) / "seen.txt"
        environment = dict(os.environ)
        paths = [str(MODELS), str(MODELS.parent.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with (Path(directory) / "out.txt").open("w+") as out:
            process = subprocess.Popen(
                [sys.executable, *command(way, seed, seen)],
                cwd=directory,
                env=environment,
                stdout=out,
                stderr=out,
            )
            while process.poll() is None and count(seen) is None:
                time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            process.wait()
            epochs = count(seen)
            if epochs is None:
                out.seek(0)
                raise SystemExit(f"{way}, seed {seed}: {GOAL} was not reached.\n{out.read()}")
    return epochs


def command(way: str, seed: int, seen: Path) -> list[str]:
    """The command line of a search; each epoch appends its accuracy to `seen`."""
    arguments = [f"hydra/sweeper/{choice}" for choice in WAYS[way]]
    if way != "random":
        arguments.append(f"hydra.sweeper.scheduler.max_t={MAX_EPOCHS}")
    return [
        *("-m", "lightning_mgpu", "+search_space=lenet", f"seed={seed}", *arguments),
        *(f"hydra.sweeper.search_alg.seed={seed}", "hydra.sweeper.num_samples=200"),
        *("hydra.sweeper.ray.num_cpus=4", *SPACE),
        *("trainer=cpu", f"trainer.max_epochs={MAX_EPOCHS}", "trainer.enable_progress_bar=false"),
        *("hydra.sweep.dir=sweep", "hydra.sweeper.report=false"),
        "+callbacks.epochs._target_=epochs_seen.EpochsSeen",
        f"+callbacks.epochs.path={seen}",
    ]


def count(seen: Path) -> int | None:
    """The number of the first epoch that reached the goal."""
    values = seen.read_text().split() if seen.exists() else []
    return next((number for number, value in enumerate(values, 1) if float(value) >= GOAL), None)


def show(found: Counts) -> None:
    """A table: medians, their share of random search's, and the median share of the same seed's."""
    print(f"epochs trained until {GOAL} validation accuracy; median (range), share of random's")
    random = found["random"]
    for way, counts in found.items():
        if not counts or not random:
            continue
        values = list(counts.values())
        shares = [epochs / random[seed] for seed, epochs in counts.items() if seed in random]
        print(
            f"  {way:14}{median(values):5.0f} ({min(values)} to {max(values)}), {len(values)} seeds"
            f"   {median(values) / median(random.values()):.2f}, by seed {median(shares):.2f}"
        )


def draw(found: Counts, path: Path) -> None:
    """A dot for each search, a line for each median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    ways = [way for way in WAYS if found[way]]
    for row, way in enumerate(ways):
        values = sorted(found[way].values())
        middle = median(values)
        axes.plot(values, [row] * len(values), "o", color="#4c78a8", alpha=0.6, markersize=7)
        axes.plot([middle, middle], [row - 0.3, row + 0.3], color="#e45756", linewidth=2.5)
        axes.annotate(
            f"{middle:.0f}", (middle, row - 0.32), ha="center", va="bottom", color="#e45756"
        )
    axes.set_yticks(range(len(ways)), ways)
    axes.set_ylim(len(ways) - 0.5, -0.75)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"epochs trained until a trial reaches {GOAL} validation accuracy")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
