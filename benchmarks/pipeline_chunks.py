"""Speed-up of a pipeline of two CPU stages over one thread, against the number of micro-batches.

Measured in interleaved rounds, beside what the bubble alone would leave: m s / (m + s - 1). Prints
a table and draws it into a PNG (matplotlib is in the extra `report`).
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rounds import interleaved, spread
from steps.pipeline import STAGES, WARM_UP, with_trainer

CHUNKS = (1, 2, 4, 8, 16, 32)
ALONE = "one thread"


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps a round (default 6)")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="(default 1 to 32)")
    parser.add_argument("--model", default="mlp", help="mlp (default) or encoder")
    parser.add_argument("--picture", type=Path, default=Path("pipeline_chunks.png"))
    parser.add_argument("--child", nargs=2, metavar=("CHUNKS", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        chunks, model = arguments.child
        print(json.dumps(measure(None if chunks == ALONE else int(chunks), model, arguments.steps)))
        return
    ways = [ALONE, *map(str, arguments.chunks)]
    steps = ("--steps", str(arguments.steps))
    seconds = interleaved(__file__, ways, arguments.rounds, arguments.model, *steps)
    ratios = {
        count: [a / b for a, b in zip(seconds[ALONE], seconds[str(count)], strict=True)]
        for count in arguments.chunks
    }
    print(f"{arguments.model}: micro-batches, speed-up over one thread, and what the bubble leaves")
    for count, found in ratios.items():
        print(f"  {count:4}   {spread(found)}   {ideal(count):.3f}")
    draw(ratios, arguments.picture)


def measure(chunks: int | None, model: str, steps: int) -> float:
    """Median seconds of a step."""
    import torch

    torch.set_num_threads(1)
    stamps = with_trainer(model, steps, chunks)[WARM_UP:]
    return median(after - before for before, after in itertools.pairwise(stamps))


def ideal(chunks: int) -> float:
    """The speed-up of even stages without any overhead."""
    return chunks * STAGES / (chunks + STAGES - 1)


def draw(ratios: dict[int, Sequence[float]], path: Path) -> None:
    """Measured medians and ranges beside the formula."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    counts, middle = list(ratios), [median(found) for found in ratios.values()]
    below = [m - min(found) for m, found in zip(middle, ratios.values(), strict=True)]
    above = [max(found) - m for m, found in zip(middle, ratios.values(), strict=True)]
    axes.plot(counts, [ideal(c) for c in counts], "--", color="0.5", label="bubble alone")
    axes.errorbar(counts, middle, [below, above], marker="o", capsize=3, label="measured")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set(xlabel="micro-batches", ylabel=f"speed-up of {STAGES} stages over one thread")
    axes.set_ylim(0, STAGES)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    print(f"drawn in {path}")


if __name__ == "__main__":
    main()
