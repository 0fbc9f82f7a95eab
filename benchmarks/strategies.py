"""Seconds of a training step of each strategy, beside its peers.

Each round runs every way once, one after another, in a process of its own, on the same batch and
model; what is printed are medians over the rounds, their range, and the strategy's throughput as a
multiple of each other way's, taken round by round. `steps/` tells what is measured.
"""

import argparse

from steps import data_parallel, pipeline

MEASURED = {"dp": data_parallel, "pipeline": pipeline}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Of the models and ways, all by default."
    )
    parser.add_argument("--only", choices=MEASURED, help="measure only this strategy and its peers")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps a round (default 8)")
    parser.add_argument("--models", nargs="+", help="mlp, conv, transformer; mlp, encoder")
    parser.add_argument("--ways", nargs="+", help="such as dp or 'all cores'")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        MEASURED[arguments.only].measure_here(*arguments.child, arguments.steps)
        return
    for name in [arguments.only] if arguments.only else MEASURED:
        MEASURED[name].compare(
            __file__, arguments.rounds, arguments.steps, arguments.models, arguments.ways
        )


if __name__ == "__main__":
    main()
