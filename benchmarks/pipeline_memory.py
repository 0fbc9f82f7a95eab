"""Peak bytes of activations that each of two stages keeps for backward, by mode of checkpointing.

Counted where autograd saves and releases tensors, each memory once, parameters apart; with the
inputs that checkpointed micro-batches keep instead. The model is the MLP of `strategies.py`. With
`--resident`: by how much the resident memory of a process grows at most in four steps, with whole
backward and with gradients of weights that come later.
"""

import argparse
import json
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


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8], help="(default 8)")
    parser.add_argument("--model", default="mlp", help="mlp (default) or encoder")
    parser.add_argument("--resident", action="store_true", help="resident memory instead")
    parser.add_argument("--rounds", type=int, default=3, help="of that (default 3)")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, model = arguments.child
        print(json.dumps(resident(model, arguments.chunks[0], way == "deferred")))
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
    torch.set_num_threads(1)
    net, batch = build(model)
    strategy = PipelineStrategy(
        split_at=f"net.{len(net) // STAGES}", chunks=chunks, defer_weight_gradients=deferred
    )
    trainer = pl.Trainer(devices=STAGES, strategy=strategy, max_steps=4, **QUIET)
    batches = [torch.cat([batch] * 4)] * 4
    before = _most_resident()
    trainer.fit(Lit(list(net)), torch.utils.data.DataLoader(batches, batch_size=None))
    return _most_resident() - before


def _most_resident() -> float:
    """MB that this process has had in memory at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


if __name__ == "__main__":
    main()
