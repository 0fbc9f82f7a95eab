"""On one GPU: what our strategies cost with two slots on it, copies, a model of 1.3 B parameters.

Every part is measured in a process of its own, with a time limit; the rest goes on if one fails.
With ``--tests`` those of ``tests/gpu`` are run first. Needs one CUDA device. What is printed are
medians and their range; ``--out`` has all of it as JSON.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Seconds that each part may take.
PARTS = {"steps": 150, "copies": 60, "large": 240}
TESTS_SECONDS = 300


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--layers", type=int, default=24, help="of the large model (default 24)")
    parser.add_argument("--precisions", nargs="+", default=["bf16-mixed", "16-mixed"])
    parser.add_argument("--repeats", type=int, default=2, help="of the large model (default 2)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="(default gpu.json)")
    parser.add_argument(
        "--tests",
        nargs=argparse.REMAINDER,
        help="run the tests first, with these options of pytest",
    )
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        from steps import gpu

        gpu.PARTS[arguments.child](arguments)
        return
    if not _has_gpu():
        print("There is no CUDA device here, so that nothing was tested or measured.")
        return
    failed = 0 if arguments.tests is None else _test(arguments.tests)
    found: dict[str, Any] = {}
    for part in arguments.parts:
        options = [f"--rounds={arguments.rounds}", f"--layers={arguments.layers}"]
        options += [f"--repeats={arguments.repeats}", "--precisions", *arguments.precisions]
        started = time.perf_counter()
        found[part] = _in_fresh_process(part, *options, seconds=PARTS[part])
        found[part]["took_seconds"] = round(time.perf_counter() - started, 1)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        _show(part, found[part])
    sys.exit(failed)


def _test(options: list[str]) -> int:
    """Run the tests, side by side where pytest-xdist is installed; returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-q", *options]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, timeout=TESTS_SECONDS
        )
    except subprocess.TimeoutExpired:
        print(f"The tests took more than {TESTS_SECONDS} s and were ended.")
        return 1
    return done.returncode


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _in_fresh_process(part: str, *options: str, seconds: float) -> dict[str, Any]:
    """What a part prints, line by line a JSON object, as far as it comes."""
    command = [sys.executable, __file__, "--child", part, *options]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
        out, trouble = done.stdout, done.stderr[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        out = (expired.stdout or b"").decode()
        trouble = f"took more than {seconds} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {"rows": rows, **({"trouble": trouble} if trouble else {})}


def _show(part: str, found: dict[str, Any]) -> None:
    print(f"\n{part} ({found['took_seconds']} s)")
    for row in found["rows"]:
        print("  " + "  ".join(f"{key} {_text(value)}" for key, value in row.items()), flush=True)
    if "trouble" in found:
        print(f"  not all of it: {found['trouble'].strip()}", flush=True)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"{_text(value[0])} ({_text(value[1])} to {_text(value[2])})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
