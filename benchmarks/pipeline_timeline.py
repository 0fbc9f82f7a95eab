"""The timeline of one step of a pipeline of two CPU stages, as `benchmarks/strategies.py` runs it.

Writes a trace for ui.perfetto.dev, a PNG and an HTML picture (drawn by the extra `report`).
"""

import argparse

from steps.pipeline import CHUNKS, WARM_UP, with_trainer


def main() -> None:
    """Measure and draw."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mlp", help="mlp (default) or encoder")
    parser.add_argument("--chunks", type=int, default=CHUNKS, help=f"(default {CHUNKS})")
    parser.add_argument("--directory", default="outputs/timeline", help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with_trainer(arguments.model, WARM_UP, arguments.chunks, trace_dir=arguments.directory)


if __name__ == "__main__":
    main()
