"""Pipelines that are made to fit into the memory of their devices."""

import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import boring
import lightning.pytorch as pl
import parity_models
import pytest
import torch
from torch import Tensor, nn

from lightning_mgpu import PipelineStrategy
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.strategies.stages.weight_memory import WeightMemory

FEATURES, LAYERS = 16, 12
BATCH, SAMPLES = 48, 12  # of which a batch makes four


CALLS: Counter[int] = Counter()


class Counting(nn.Linear):
    """A layer that counts its calls with a micro-batch in training."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS[id(self)] += self.training and len(x) == SAMPLES
        return super().forward(x)


class Wide(parity_models.Model):
    """Layers whose weights and activations of a batch take about as much memory."""

    def build(self) -> nn.Module:
        layers = [nn.Linear(6, FEATURES), *(Counting(FEATURES, FEATURES) for _ in range(LAYERS))]
        return nn.Sequential(*(nn.Sequential(layer, nn.GELU()) for layer in layers))


def _fit(model: pl.LightningModule, options: dict[str, Any], **kwargs: Any) -> pl.Trainer:
    strategy = PipelineStrategy(**options) if options else "auto"
    trainer = boring.trainer(strategy, 2 if options else 1, **kwargs)
    CALLS.clear()
    trainer.fit(model, datamodule=boring.Blobs(BATCH, size=2 * BATCH))
    return trainer


@pytest.fixture
def table(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)

    def lines() -> list[str]:
        found = [r.message for r in caplog.records if r.message.startswith("Pipeline:")]
        return found[-1].splitlines()

    return lines


@pytest.mark.parametrize(
    "checkpoint", [["always"] * 2, ["never", "except_last"], ["never", "never"]]
)
def test_each_stage_is_computed_again_as_it_says(checkpoint: list[str], table: Any) -> None:
    split, alone = Wide(), Wide()
    options = {"split_at": "net.4", "chunks": 4, "checkpoint": checkpoint, "parity_check": "off"}
    _fit(alone, {})
    _fit(split, options)
    boring.assert_same_weights(split, alone)
    again = {"never": 0, "except_last": 3, "always": 4}
    calls = [CALLS[id(layer[0])] for layer in split.net[1:]]
    assert calls == [2 * (4 + again[checkpoint[layer >= 4]]) for layer in range(1, LAYERS + 1)]
    words = {"never": "no", "except_last": "all but the last", "always": "yes"}
    if {*checkpoint} != {"never"}:
        assert [line.split("  ")[-1].strip() for line in table()[2:4]] == [
            words[of_stage] for of_stage in checkpoint
        ]


class Dropping(parity_models.Model):
    def build(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(6, 32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 8), nn.Dropout(0.5)),
            nn.Linear(8, 3),
        )


def test_what_is_computed_again_draws_the_same_numbers() -> None:
    ends = []
    for checkpoint in ("never", ["always", "never"], ["except_last", "always"]):
        model = Dropping()
        torch.manual_seed(1)
        _fit(model, {"split_at": "net.3", "checkpoint": checkpoint})
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all(torch.equal(end, ends[0]) for end in ends)


def _memory(line: str) -> list[float]:
    """Bytes on each device, of a table's last line."""
    factors = {"bytes": 1.0, "kB": 1e3, "MB": 1e6}
    return [float(n) * factors[u] for n, u in re.findall(r"([\d.]+) (\S+) on device", line)]


@pytest.mark.parametrize("around", [1, 2, "auto"])
def test_plan_fits(around: Any, table: Any) -> None:
    alone = Wide("adam")
    _fit(alone, {})
    needed = None
    # Plenty, and what takes less and less until nothing does.
    for share in (None, 0.9, 0.85):
        memory = 1e9 if share is None else share * needed
        split = Wide("adam")
        options = {"memory": memory, "stages_per_device": around, "chunks": 4}
        _fit(split, options)
        calls = sum(CALLS[id(layer[0])] for layer in split.net[1:])
        boring.assert_same_weights(split, alone)
        found = _memory(table()[-1])
        assert len(found) == 2
        assert max(found) <= memory
        assert (calls > LAYERS * 2 * 4) == (share is not None)
        needed = needed or sum(found) / 2  # wherever it is cut, one device has so much


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    model = Wide("adam")
    with pytest.raises(PartitionError) as raised:
        _fit(model, {"memory": "20kB", "chunks": 4})
    message = str(raised.value)
    assert "`memory` of 0.02 MB" in message
    assert re.search(r"device \d takes \S+ MB: \S+ MB for parameters", message)
    before = {name: p.clone() for name, p in Wide("adam").named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_number_of_micro_batches_is_part_of_the_plan(table: Any) -> None:
    alone = Wide()
    _fit(alone, {})
    for options in ({"memory": 1e9}, {"chunks": "auto", "balance": "auto"}):
        split = Wide()
        trainer = _fit(split, options)
        boring.assert_same_weights(split, alone)
        line = next(line for line in table() if "simulated" in line)
        chosen = re.match(r"1 per device, (\d+) micro-batches, the ", line)
        assert chosen, line
        assert chosen[1] in {"2", "4", "8", "16"}
        assert re.search(r"\(1 x 2: \S+ ms, 1 x 4: \S+ ms, 1 x 8: \S+ ms, 1 x 16: \S+ ms\)", line)
        # A second run keeps it.
        trainer.fit_loop.max_epochs += 1
        trainer.fit(split, datamodule=boring.Blobs(BATCH, size=2 * BATCH))
        again = next(line for line in table() if "simulated" in line)
        assert again == line


def test_limit_means_nothing_in_evaluation(table: Any) -> None:
    trainer = boring.trainer(PipelineStrategy(memory="1kB"), 2)
    trainer.validate(Wide(), datamodule=boring.Blobs(48), verbose=False)
    assert not any("Memory" in line for line in table())


def test_stages_of_the_models_own_are_refused() -> None:
    class Own(Wide):
        def configure_pipeline(self) -> list[nn.Module]:
            return [self.net[:3], self.net[3:]]

    with pytest.raises(PartitionError, match=r"checkpoint=\['always', 'never'\]"):
        _fit(Own(), {"memory": "1GB"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, r"memory='much'.*'8GB'"),
        ({"memory": 0}, "memory=0"),
        ({"memory": True}, "memory=True"),
        ({"checkpoint": "sometimes"}, "checkpoint='sometimes'"),
        ({"checkpoint": []}, r"checkpoint=\[\]"),
        ({"checkpoint": ["always", "maybe"]}, "a list with one of them for each stage"),
        ({"checkpoint": ["always"] * 2, "stages_per_device": "auto"}, "or `memory`"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineStrategy(**options)


def test_list_has_to_be_for_as_many_stages_as_there_are() -> None:
    with pytest.raises(ValueError, match=r"checkpoint=\['always', .*there are 2 stages"):
        _fit(Wide(), {"checkpoint": ["always"] * 3})


class _Odd(torch.optim.SGD):
    """An optimizer that cannot be tried on its own."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p), 2),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
        (lambda p: _Odd(p, lr=0.1), 2),
    ],
)
def test_weights_with_what_the_optimizer_keeps(make: Any, state: int) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    module[2].weight.requires_grad_(False)
    optimizer = make([p for p in module.parameters() if p.requires_grad])
    found = WeightMemory([optimizer], gradients=2).of(module)
    first, last, mean = module[0].weight, module[2].weight, module[1].running_mean
    assert found[id(first)] == (first.nbytes, (1 + 2 + state) * first.nbytes)
    assert found[id(last)] == (last.nbytes, last.nbytes)
    assert found[id(mean)] == (mean.nbytes, mean.nbytes)
    assert WeightMemory([], 1).besides(module, module[0]) > 0


def test_state_that_is_there_counts_as_it_is() -> None:
    parameter = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["history"] = [torch.ones(10)] * 5
    module = nn.ParameterList([parameter])
    assert WeightMemory([optimizer], 1).of(module)[id(parameter)].whole == 7 * parameter.nbytes
