"""Peak bytes of activations that each of two stages keeps for backward, by mode of checkpointing.

Counted where autograd saves and releases tensors, each memory once, parameters apart; with the
inputs that checkpointed micro-batches keep instead. The model is the MLP of `strategies.py`. With
`--resident`: by how much the resident memory of a process grows at most in four steps, with whole
backward and with gradients of weights that come later. With `--predicted`: what a batch more of
activations makes it grow, for several plans, beside what `memory=` reckons with. (With
``MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=100000`` before it, what is freed is given back.)
"""

import argparse
import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from models.rows import build
from rounds import QUIET, interleaved, spread
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_mgpu import PipelineStrategy

STAGES = 2
MODES = ("never", "except_last", "always")
# Stages per device, micro-batches, what is computed again, and whether weights come later.
PLANS: list[tuple[int, int, list[str], bool]] = [
    (1, 4, ["never", "never"], False),
    (1, 8, ["never", "never"], False),
    (1, 8, ["never", "never"], True),
    (1, 8, ["always", "never"], True),
    (1, 8, ["except_last", "except_last"], False),
    (1, 4, ["always", "always"], False),
    (1, 16, ["always", "always"], True),
    (2, 8, ["never"] * 4, True),
    (2, 8, ["always", "never", "never", "always"], True),
]
_FEW, _MANY = 1, 5
_FACTORS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8], help="(default 8)")
    parser.add_argument("--model", default="mlp", help="mlp (default) or encoder")
    parser.add_argument("--resident", action="store_true", help="resident memory instead")
    parser.add_argument("--predicted", action="store_true", help="and what is reckoned with")
    parser.add_argument("--rounds", type=int, default=3, help="of that (default 3)")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, model = arguments.child
        if "x" in way:
            plan, batches = map(int, way.split("x"))
            print(json.dumps(planned(model, batches, *PLANS[plan])))
            return
        print(json.dumps(resident(model, arguments.chunks[0], way == "deferred")))
        return
    if arguments.predicted:
        show_predicted(arguments.model, arguments.rounds)
        return
    if arguments.resident:
        found = interleaved(__file__, ["whole", "deferred"], arguments.rounds, arguments.model)
        print(f"{arguments.model}: MB by which resident memory grows at most")
        for way, grown in found.items():
            print(f"  {way:10}{spread(grown)}")
        return
    for chunks in arguments.chunks:
        print(f"{arguments.model}, {chunks} micro-batches: peak MB of activations in each stage")
        for mode in MODES:
            peaks = measure(arguments.model, mode, chunks)
            print(f"  {mode:12}" + "".join(f"{peak / 1e6:10.1f}" for peak in peaks), flush=True)


class Ledger:
    """What one stage keeps, and the most it has kept."""

    def __init__(self, parameters: set[int]) -> None:
        self.peak = 0
        self._parameters = parameters
        self._references: dict[int, int] = {}
        self._bytes = 0
        self._inputs: list[int] = []
        self._lock = threading.Lock()

    def hooks(self) -> saved_tensors_hooks:
        """Counts what autograd saves and releases within."""
        return saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor)

    def keep_input(self, tensor: Tensor) -> None:
        """A checkpointed micro-batch keeps its input."""
        self._inputs.append(tensor.nbytes)
        self._add(tensor.nbytes)

    def release_input(self) -> None:
        """That of the micro-batch which has just been computed again."""
        if self._inputs:
            self._add(-self._inputs.pop())

    def count(self, tensor: Tensor, by: int) -> None:
        """One reference more or less to a saved tensor's memory."""
        where = tensor.untyped_storage().data_ptr()
        if where in self._parameters:
            return
        with self._lock:
            before = self._references.get(where, 0)
            self._references[where] = before + by
        if before == 0 or before + by == 0:
            self._add(by * min(tensor.nbytes, tensor.untyped_storage().nbytes()))

    def _add(self, size: int) -> None:
        with self._lock:
            self._bytes += size
            self.peak = max(self.peak, self._bytes)


class _Saved:
    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor
        ledger.count(tensor, 1)

    def __del__(self) -> None:
        self.ledger.count(self.tensor, -1)


class Counted(nn.Module):
    """A layer whose stage's ledger is kept."""

    def __init__(self, layer: nn.Module, ledger: Ledger, first: bool) -> None:
        super().__init__()
        self.layer, self.ledger, self.first = layer, ledger, first

    def forward(self, x: Tensor) -> Tensor:
        if self.first and not torch.is_grad_enabled():
            self.ledger.keep_input(x)
        with self.ledger.hooks():
            output: Tensor = self.layer(x)
        if self.first and torch.is_grad_enabled():
            self.ledger.release_input()
        return output


class Lit(pl.LightningModule):
    """The layers, trained by plain SGD."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def measure(model: str, mode: Any, chunks: int) -> list[int]:
    """Peak bytes in each stage, over two steps."""
    net, batch = build(model)
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    ledgers = [Ledger(parameters) for _ in range(STAGES)]
    half = len(net) // STAGES
    layers = [Counted(x, ledgers[i // half], i % half == 0) for i, x in enumerate(net)]
    strategy = PipelineStrategy(split_at=f"net.{half}", chunks=chunks, checkpoint=mode)
    trainer = pl.Trainer(
        devices=STAGES,
        strategy=strategy,
        max_steps=2,
        **QUIET,
    )
    trainer.fit(Lit(layers), torch.utils.data.DataLoader([batch] * 2, batch_size=None))
    return [ledger.peak for ledger in ledgers]


def resident(model: str, chunks: int, deferred: bool) -> float:
    """MB by which the process grows at most, over four steps with a batch four times as large."""
    strategy = PipelineStrategy(
        split_at=f"net.{8 // STAGES}", chunks=chunks, defer_weight_gradients=deferred
    )
    return _grown(model, strategy, 4)


def _grown(model: str, strategy: PipelineStrategy, times: int) -> float:
    """MB by which the process grows at most after the first step, with so many batches in one."""
    torch.set_num_threads(1)
    net, batch = build(model)
    callbacks = [_FromSecondStep()]
    trainer = pl.Trainer(
        devices=STAGES, strategy=strategy, max_steps=4, callbacks=callbacks, **QUIET
    )
    batches = [torch.cat([batch] * times)] * 4
    before = _most_resident()
    trainer.fit(Lit(list(net)), torch.utils.data.DataLoader(batches, batch_size=None))
    return _most_resident() - before


def show_predicted(model: str, rounds: int) -> None:
    """Print, for each plan, what is predicted and measured."""
    print(f"{model}: MB of activations of a batch, predicted and measured, and the ratio")
    for number, (per_device, chunks, checkpoint, deferred) in enumerate(PLANS):
        ways = [f"{number}x{batches}" for batches in (_FEW, _MANY)]
        few, many = interleaved(__file__, ways, rounds, model).values()
        predicted, measured = (
            [(b[kind] - a[kind]) / (_MANY - _FEW) for a, b in zip(few, many, strict=True)]
            for kind in (0, 1)
        )
        name = f"{per_device} a device, {chunks} micro-batches, {'/'.join(checkpoint)}"
        name += ", deferred" if deferred else ""
        ratio = spread([p / m for p, m in zip(predicted, measured, strict=True)])
        print(f"  {name:60}{predicted[0]:8.1f}  {spread(measured)}  {ratio}", flush=True)


def planned(
    model: str, batches: int, per_device: int, chunks: int, checkpoint: list[Any], deferred: bool
) -> tuple[float, float]:
    """MB that a plan needs, as the strategy says, and by which the process grew in four steps."""
    heard = _Heard()
    strategy = PipelineStrategy(
        split_at=[f"net.{8 * n // (STAGES * per_device)}" for n in range(1, STAGES * per_device)],
        chunks=chunks,
        stages_per_device=per_device,
        checkpoint=checkpoint,
        defer_weight_gradients=deferred,
        memory="1TB",
    )
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(heard)
    grown = _grown(model, strategy, batches)
    (line,) = (text.splitlines()[-1] for text in heard.lines if text.startswith("Pipeline:"))
    devices = re.findall(r"([\d.]+) (\S+) on device", line)
    return sum(float(number) * _FACTORS[unit] for number, unit in devices) / 1e6, grown


class _FromSecondStep(pl.Callback):
    """Forgets the peak of the first step, in which layers are measured and a sample is compared."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            Path("/proc/self/clear_refs").write_text("5")


class _Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _most_resident() -> float:
    """MB that this process has had in memory at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


if __name__ == "__main__":
    main()
