"""How a model of the zoo is trained, and how two runs are compared."""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import boring
import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler

BATCH = 6
STEPS = 5
RANKS = 2
SHARE = BATCH // RANKS
SEED = 5

Outcome = Literal["pass", "needs advice", "warned", "refused", "differs"]
"""Of a row; docs/models.md says what each of them means."""


@dataclass(frozen=True)
class Row:
    """A model, and what becomes of it; the table in docs/models.md has the same rows.

    Attributes:
        package: Where the model comes from.
        model: Its name, and what is special about the row.
        make: `module.function`, which makes the `Case`.
        dp: What `dp` does on two and three devices, compared with one.
        ddp: What `mgpu_ddp` does with two ranks, compared with averaged gradients.
        pipeline: What `pipeline` does with two and three stages, compared with one device.
        note: Why, or what to do.
    """

    package: str
    model: str
    make: str
    dp: Outcome = "pass"
    ddp: Outcome = "pass"
    pipeline: Outcome = "pass"
    note: str = ""

    def case(self) -> "Case":
        module, _, function = self.make.rpartition(".")
        return getattr(importlib.import_module(module), function)()


@dataclass(frozen=True)
class Case:
    """What a row trains.

    Attributes:
        build: Makes the LightningModule; called with a seeded generator.
        samples: The data set, `BATCH * STEPS` long.
        collate: Makes a batch of a list of samples; default: torch's.
        advice: Arguments of `DataParallelStrategy` that the warning recommends.
        ddp_advice: Those of `DDPStrategy` that the error recommends.
        pipeline_advice: Those of `PipelineStrategy` that the error recommends.
        tolerance: Of losses; some packages compute them in float32.
    """

    build: Callable[[], "Model"]
    samples: Sequence[Any]
    collate: Callable[[list[Any]], Any] | None = None
    advice: Mapping[str, Any] = field(default_factory=dict)
    ddp_advice: Mapping[str, Any] = field(default_factory=dict)
    pipeline_advice: Mapping[str, Any] = field(default_factory=lambda: {"chunks": 1})
    tolerance: float = 1e-9


class Model(pl.LightningModule):
    """A plain LightningModule around somebody else's network."""

    lr = 0.05

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double()

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def outputs(self, batch: Any) -> Any:
        raise NotImplementedError

    def weight(self, batch: Any) -> int:
        """What the loss is a mean over."""
        return len(next(leaf for _, leaf in flatten(batch)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self._log("train_loss", loss, batch)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self._log("val_loss", self.loss(batch), batch)
        return self.outputs(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.outputs(batch)

    def _log(self, name: str, value: Tensor, batch: Any) -> None:
        options = {"on_step": False, "on_epoch": True, "sync_dist": True}
        self.log(name, value, batch_size=self.weight(batch), **options)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Not Adam, which makes steps of full size from the rounding of gradients that are zero.
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9)


class Samples(pl.LightningDataModule):
    """The samples in order; `order` deals them out otherwise."""

    def __init__(self, case: Case, batch_size: int = BATCH, order: Any = None) -> None:
        super().__init__()
        self.case, self.batch_size, self.order = case, batch_size, order

    def _loader(self) -> DataLoader[Any]:
        sampler: Any = self.order
        if self.order == "ranks":
            sampler = DistributedSampler(
                self.case.samples, RANKS, self.trainer.global_rank, shuffle=False
            )
        return self._loader_of(sampler)

    def _plain_loader(self) -> DataLoader[Any]:
        return self._loader_of(None)

    def _loader_of(self, sampler: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset=self.case.samples,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self.case.collate,
        )

    train_dataloader = val_dataloader = _loader
    predict_dataloader = _plain_loader


class DealtInTurns(Sampler[int]):
    """The batches of all ranks, one rank after another."""

    def __iter__(self) -> Iterator[int]:
        for step in range(STEPS):
            for rank in range(RANKS):
                yield from range(step * BATCH + rank, (step + 1) * BATCH, RANKS)

    def __len__(self) -> int:
        return STEPS * BATCH


class _Outputs(pl.Callback):
    """Keeps what `validation_step` has returned."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_validation_batch_end(self, *arguments: Any, **kwargs: Any) -> None:
        self.found.append(arguments[2] if len(arguments) > 2 else kwargs["outputs"])


@dataclass(frozen=True)
class Result:
    """What a run leaves."""

    weights: dict[str, Tensor]
    metrics: dict[str, Tensor]
    outputs: list[Any]
    predictions: Any


def run(
    case: Case, strategy: Any, devices: int, data: Samples, steps: int = STEPS, **kwargs: Any
) -> Result:
    """Fit, and predict if the samples are in order."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = case.build()
    outputs = _Outputs()
    trainer = boring.trainer(
        strategy,
        devices,
        callbacks=[outputs],
        max_steps=steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **kwargs,
    )
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == steps
    metrics = dict(trainer.callback_metrics)
    predictions = None
    if data.order is None:
        predictions = trainer.predict(model, datamodule=data)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Result(weights, metrics, outputs.found, predictions)


@functools.cache
def one_device(row: Row) -> Result:
    """The run that `dp` has to equal."""
    case = row.case()
    return run(case, "auto", 1, Samples(case))


@functools.cache
def averaged_gradients(row: Row) -> Result:
    """The run that `mgpu_ddp` has to equal: one device averages the ranks' gradients."""
    case = row.case()
    data = Samples(case, SHARE, DealtInTurns())
    return run(case, "auto", 1, data, accumulate_grad_batches=RANKS)


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and number in a nesting of containers and objects."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flatten(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from flatten(part, f"{path}[{index}]")
    elif isinstance(value, Tensor) or not hasattr(value, "__dict__"):
        yield path, value
    elif hasattr(value, "to_dict"):
        yield from flatten(value.to_dict(), path)
    elif not callable(value):
        for name, part in vars(value).items():
            yield from flatten(part, f"{path}.{name}")


def differences(actual: Any, expected: Any, tolerance: float) -> list[str]:
    """Where two values are not the same, to `tolerance`."""
    ours, theirs = dict(flatten(actual)), dict(flatten(expected))
    found = [f"{path} is missing on one side" for path in ours.keys() ^ theirs.keys()]
    for path in ours.keys() & theirs.keys():
        a, b = ours[path], theirs[path]
        if not isinstance(a, Tensor):
            if a != b:
                found.append(f"{path}: {a!r}, {b!r}")
        elif a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{path}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}")
        elif not torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance, equal_nan=True):
            found.append(f"{path}: {(a.double() - b.double()).abs().max():.1e} apart")
    return found
