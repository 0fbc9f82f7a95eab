"""What it costs to import us, beside `import lightning`, and to ask the command for help.

``python benchmarks/imports.py`` runs each in fresh processes, in turns, and prints seconds as
median with range, and the median over the rounds of the ratio to `import lightning`.
"""

import argparse
import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "import lightning": ["-c", "import lightning"],
    "and lightning_mgpu": ["-c", "import lightning_mgpu, lightning"],  # which registers us
    "lightning_mgpu alone": ["-c", "import lightning_mgpu"],
    "lightning_mgpu --help": ["-m", "lightning_mgpu", "--help"],
    "lightning_mgpu --cfg job": ["-m", "lightning_mgpu", "--cfg", "job"],
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["import lightning"], strict=True)]
        print(
            f"{name:26}{median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})"
            f"   ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
