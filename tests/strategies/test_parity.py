"""Every strategy against training on one device: weight by weight and metric by metric.

A strategy joins with a row in `STRATEGIES`. float64, tolerance 1e-9, 20 steps.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import boring
import lightning.pytorch as pl
import parity_models
import pytest
import torch
from parity_models import TOLERANCE

import lightning_mgpu  # noqa: F401  (registers the strategies)

GLOBAL_BATCH = 12
STEPS = 20


@dataclass(frozen=True)
class Strategy:
    """How to train with a strategy so that its steps see the same samples as one device."""

    name: str
    devices: int
    # Processes that share a step's samples; a single process gets the whole batch.
    processes: int
    # Cases that it refuses, or for which it has more stages than they have layers.
    without: frozenset[str] = frozenset()

    def run(self, model: pl.LightningModule, size: int, **kwargs: Any) -> pl.Trainer:
        trainer = boring.trainer(
            self.name,
            self.devices,
            max_epochs=-1,
            max_steps=STEPS,
            use_distributed_sampler=False,
            **kwargs,
        )
        data = boring.Blobs(GLOBAL_BATCH // self.processes, size, world_size=self.processes)
        trainer.fit(model, datamodule=data)
        trainer.test(model, datamodule=data, verbose=False)
        return trainer


_DOUBLE_BACKWARD = frozenset({"GradientPenalty"})
_TWO_LAYERS = frozenset({"Recurrent", "Flattening", "Embedded"})
# Changes its buffers with each micro-batch.
_STATEFUL = frozenset({"SpectralNorm"})

STRATEGIES = [
    Strategy("mgpu_ddp", devices=2, processes=2),
    Strategy("mgpu_ddp", devices=3, processes=3),
    Strategy("dp", devices=2, processes=1),
    Strategy("dp", devices=3, processes=1),
    Strategy("pipeline", 2, 1, _DOUBLE_BACKWARD | _STATEFUL),
    Strategy("pipeline", 3, 1, _DOUBLE_BACKWARD | _STATEFUL | _TWO_LAYERS),
    Strategy("pipeline_ddp", devices=4, processes=2, without=_DOUBLE_BACKWARD),
]

CASES: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any]]] = {
    "sgd": (boring.Classifier, {}),
    "adam": (lambda: boring.Classifier("adam"), {}),
    "scheduler": (lambda: boring.Classifier("adam", scheduler=True), {}),
    "accumulation": (lambda: boring.Classifier("adam"), {"accumulate_grad_batches": 2}),
    "clipping": (boring.Classifier, {"gradient_clip_val": 0.1}),
    "all": (
        lambda: boring.Classifier("adam", scheduler=True),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ),
    **{model.__name__: (model, {}) for model in parity_models.MODELS},
}


def _rows(cases: Iterable[str], strategies: Iterable[Strategy]) -> Any:
    rows = [(s, case) for s in strategies for case in cases if case not in s.without]
    return pytest.mark.parametrize(
        ("strategy", "case"), rows, ids=[f"{s.name}-{s.devices}-{case}" for s, case in rows]
    )


ONE_PROCESS = [strategy for strategy in STRATEGIES if strategy.processes == 1]


@_rows(CASES, STRATEGIES)
def test_parity_with_one_device(strategy: Strategy, case: str) -> None:
    build, kwargs = CASES[case]
    _compare(strategy, build, 4 * GLOBAL_BATCH, kwargs)


UNPICKLABLE = {model.__name__: model for model in parity_models.UNPICKLABLE_MODELS}


@_rows(UNPICKLABLE, ONE_PROCESS)
def test_parity_with_one_device_unpicklable(strategy: Strategy, case: str) -> None:
    _compare(strategy, UNPICKLABLE[case], 4 * GLOBAL_BATCH, {})


@pytest.mark.parametrize("strategy", ONE_PROCESS, ids=lambda s: f"{s.name}-{s.devices}")
@pytest.mark.parametrize("size", [29, 25, 11])
def test_parity_with_one_device_odd_batches(strategy: Strategy, size: int) -> None:
    # (The samplers of several processes repeat samples where these do not come out even.)
    _compare(strategy, lambda: boring.Classifier("adam"), size, {})


def _compare(
    strategy: Strategy, build: Callable[[], pl.LightningModule], size: int, kwargs: dict[str, Any]
) -> None:
    alone, parallel = build(), build()
    expected = Strategy("auto", devices=1, processes=1).run(alone, size, **kwargs)
    actual = strategy.run(parallel, size, **kwargs)
    assert actual.global_step == expected.global_step == STEPS
    boring.assert_same_weights(alone, parallel)
    metrics = dict(actual.callback_metrics)
    assert metrics.keys() == expected.callback_metrics.keys()
    for name, value in expected.callback_metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=0, atol=TOLERANCE, msg=name)
