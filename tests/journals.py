"""Journals of sweeps that were never run, for what reads them."""

import json
import math
import random
from pathlib import Path
from typing import Any

BEGAN = 1_700_000_000.0
LR = {"name": "model.lr", "low": 1e-4, "high": 1e-1, "log": True, "integer": False}
L1 = {"name": "model.l1", "choices": [4, 8, 16, 32, 64, 128, 256]}
DROP = {"name": "model.dropout", "low": 0.0, "high": 0.5, "log": False, "integer": False}
DEPTH = {"name": "model.depth", "low": 1, "high": 8, "log": False, "integer": True}
ACT = {"name": "model.act", "choices": ["relu", "gelu", "silu"]}
FLAG = {"name": "data.shuffle", "choices": [True, False, None]}
FOUR = [LR, L1, DROP, ACT]


class Journal:
    """Writes what a sweep would have written, line by line."""

    def __init__(self, directory: Path, dimensions: list[dict[str, Any]], **about: Any) -> None:
        directory.mkdir(exist_ok=True, parents=True)
        self.path, self.time, self.dimensions = directory / "journal.jsonl", BEGAN, dimensions
        self.about = {
            "metric": "val_acc",
            "mode": "max",
            "takes_best": True,
            "search_alg": "random",
            "scheduler": "asha",
            "dimensions": dimensions,
            **about,
        }
        self.write("sweep", **self.about)

    def write(self, event: str, at: float | None = None, **more: Any) -> None:
        self.time = BEGAN + at if at is not None else self.time
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "time": self.time, **more}) + "\n")

    def start(
        self, number: int, at: float, params: dict[str, Any], worker: str = "a", **more: Any
    ) -> None:
        command = " ".join(["python app.py", *(f"{name}={v}" for name, v in params.items())])
        self.write("start", at, trial=number, worker=worker, params=params, command=command, **more)

    def report(self, number: int, at: float, epoch: int | None, value: float) -> None:
        metrics = {self.about["metric"]: value, "other": 1.0}
        self.write("report", at, trial=number, epoch=epoch, metrics=metrics, host="here")

    def end(self, number: int, at: float, status: str = "done", reason: str | None = None) -> None:
        self.write("end", at, trial=number, status=status, reason=reason)


def write_search(
    directory: Path,
    trials: int = 24,
    dimensions: list[dict[str, Any]] | None = None,
    workers: int = 4,
    epochs: int = 16,
    **about: Any,
) -> Journal:
    """A search with early stopping and a few failures; good trials have a rate about 0.005."""
    draw = random.Random(1)
    journal = Journal(directory, dimensions or FOUR, **about)
    is_loss = journal.about["mode"] == "min"
    free, events = [0.0] * workers, []
    for number in range(trials):
        worker = free.index(min(free))
        begin = free[worker]
        params = {d["name"]: _drawn(d, draw) for d in journal.dimensions}
        skill = _skill(params) + draw.gauss(0, 0.02)
        rungs = [1, 4, epochs]
        length = rungs[min(2, int(draw.random() * 1.6 + max(0.0, skill - 0.4) * 3))]
        fails = number % 11 == 5
        length = max(1, length // 2) if fails else length
        pace = 1.5 + draw.random()
        events.append((begin, ("start", number, params, f"worker-{worker}")))
        for epoch in range(length):
            value = skill * (1 - math.exp(-(epoch + 1) / 3)) + draw.gauss(0, 0.004)
            value = 3 * math.exp(-4 * value) if is_loss else max(0.0, min(1.0, value))
            events.append((begin + (epoch + 1) * pace, ("report", number, epoch, value)))
        free[worker] = begin + length * pace + 0.3
        status = "failed" if fails else "done" if length == epochs else "stopped"
        reason = "RuntimeError: CUDA out of memory, or so it says" if fails else None
        events.append((free[worker] - 0.1, ("end", number, status, reason)))
    for at, (event, number, *more) in sorted(events, key=lambda pair: pair[0]):
        getattr(journal, event)(number, at, *more)
    return journal


def _skill(params: dict[str, Any]) -> float:
    lr = params.get("model.lr", 0.005)
    width = params.get("model.l1", 64)
    good = 0.97 - 0.28 * abs(math.log10(lr / 0.005)) + 0.02 * math.log2(width / 64)
    return good - (0.06 if params.get("model.act") == "relu" else 0)


def _drawn(dimension: dict[str, Any], draw: random.Random) -> Any:
    if "choices" in dimension:
        return draw.choice(dimension["choices"])
    low, high = dimension["low"], dimension["high"]
    if dimension["integer"]:
        return draw.randint(low, high)
    if dimension["log"]:
        return math.exp(draw.uniform(math.log(low), math.log(high)))
    return draw.uniform(low, high)
