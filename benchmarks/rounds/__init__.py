"""Measurements side by side: every way once a round, each in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""A Trainer that does nothing but train."""


def interleaved(
    script: str, ways: Sequence[str], rounds: int, *arguments: str
) -> dict[str, list[Any]]:
    """What ``script --child WAY ARGUMENTS`` prints last, as JSON, for each way, round by round."""
    found: dict[str, list[Any]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(_in_fresh_process(script, "--child", way, *arguments))
    return found


def _in_fresh_process(script: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if not done.stdout:  # stock ddp may measure and then crash at its interpreter's end
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_throughputs(title: str, seconds: dict[str, list[float]], ours: str) -> None:
    """A table: seconds of each way, and the throughput of `ours` as a multiple of its own."""
    print(f"\n{title}, {len(seconds[ours])} rounds; seconds a step, and throughput of {ours} to it")
    for way, theirs in seconds.items():
        ratios = [other / own for other, own in zip(theirs, seconds[ours], strict=True)]
        print(f"  {way:16}{spread(theirs)}   {spread(ratios)}", flush=True)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(values):7.4f} ({min(values):.4f} to {max(values):.4f})"
