"""`mode=plan`: what it prints and writes, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
from command import run_tiny, write_project
from omegaconf import OmegaConf

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.plan.command import options_of

_SMALL = ("mode=plan", "+plan.stages=[1,2,64]", "+plan.chunks=[1,4]", "+plan.replicas=[1,2]")

_MODELS = """
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 32)
        self.norm = torch.nn.BatchNorm1d(32)
        self.second = torch.nn.Linear(32, 8)

    def forward(self, x):
        return x + self.second(torch.relu(self.norm(self.first(x))))


class Skipping(LitModel):
    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 8), Block(), torch.nn.Linear(8, 64))

    def training_step(self, batch, batch_idx):
        x = self.net(batch[0].flatten(1))
        return torch.nn.functional.cross_entropy(self.layer(x), batch[1])


class OwnStages(Skipping):
    def configure_pipeline(self):
        return [self.net[:2], self.net[2]]


class NeverCalls(Skipping):
    training_step = LitModel.training_step


class NoLayers(Skipping):
    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.net = torch.nn.Linear(64, 64)
"""


def _rows(directory: str = "run") -> list[dict[str, str]]:
    with Path(directory, "plan.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_plan_prints_the_best_rows_and_writes_all() -> None:
    done = run_tiny(*_SMALL, "+plan.checkpoint=[never,always]")
    assert done.code == 0, done.err
    assert "devices stages replicas chunks checkpoint" in done.out
    assert "Left out: stages 64: the model can be cut into 6 at most." in done.out
    assert "plan: run/plan.csv" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines() if line[:1] != "[")
    rows = _rows()
    assert len(rows) == 2 * 2 * 2 * 2
    assert {int(row["stages"]) for row in rows} == {1, 2}
    for row in rows:
        assert float(row["seconds"]) > 0
        assert int(row["devices"]) == int(row["stages"]) * int(row["replicas"])
        assert len(row["memory_of_devices"].split()) == int(row["stages"])
        assert len(row["split_at"].split()) == int(row["stages"]) - 1
    written = json.loads(Path("run/plan.json").read_text())
    assert len(written["rows"]) == len(rows)
    assert [layer["name"] for layer in written["measured"]["layers"]][:2] == ["net.0", "net.1"]
    assert written["left_out"] == ["stages 64: the model can be cut into 6 at most"]


def test_plan_counts_what_adam_keeps() -> None:
    done = run_tiny(*_SMALL)
    assert done.code == 0, done.err
    layers = json.loads(Path("run/plan.json").read_text())["measured"]["layers"]
    linear = next(layer for layer in layers if layer["name"] == "net.1")
    assert linear["parameters"] == linear["gradients"] == 4 * (64 * 256 + 256)
    assert linear["state"] == 2 * linear["parameters"] + 2 * 4  # and two counts of steps


def test_plan_counts_each_activation_once() -> None:
    done = run_tiny(*_SMALL, "+plan.checkpoint=[never]")
    assert done.code == 0, done.err
    weights = json.loads(Path("run/plan.json").read_text())["measured"]["layers"]
    fixed = sum(w["parameters"] + w["gradients"] + w["state"] for w in weights)
    whole = next(row for row in _rows() if (row["stages"], row["chunks"]) == ("1", "1"))
    # What linear layers are given; ReLU keeps the same; and the output.
    assert float(whole["memory"]) - fixed == 64 * 4 * (64 + 256 + 128 + 10)


def test_plan_leaves_no_checkpoint_and_no_metrics_behind() -> None:
    assert run_tiny(*_SMALL).code == 0
    assert {path.name for path in Path("run").iterdir() if path.is_file()} >= {"plan.csv"}
    assert not Path("run/checkpoints").exists()
    assert not Path("run/metrics.csv").exists()


@pytest.mark.slow
def test_cut_of_a_plan_can_be_trained_with() -> None:
    write_project(_MODELS)
    target = ("model=lenet", "model._target_=my_project.Skipping")
    assert run_tiny(*_SMALL, *target).code == 0
    split_at = next(row["split_at"] for row in _rows() if row["stages"] == "2")
    assert split_at.startswith("net.")
    done = run_tiny(
        *target, "+strategy=pipeline", "trainer.devices=2", f"strategy.split_at={split_at}"
    )
    assert done.code == 0, done.err


def test_plan_opens_modules_until_there_are_as_many_layers_as_stages() -> None:
    write_project(_MODELS)
    done = run_tiny(
        *_SMALL, "model=lenet", "model._target_=my_project.Skipping", "data.batch_size=4"
    )
    assert done.code == 0, done.err
    assert "the model can be cut into 5 at most" in done.out
    assert "Left out: chunks 4: too many for a batch of 4 samples, of which" in done.out


def test_plan_heeds_the_options_of_the_pipeline() -> None:
    done = run_tiny(*_SMALL, "+strategy=pipeline", "strategy.split_at=net.5")
    assert done.code == 0, done.err
    assert {row["split_at"] for row in _rows()} == {"", "net.5"}


def test_plan_of_stages_that_the_user_has_made() -> None:
    write_project(_MODELS)
    done = run_tiny(*_SMALL, "model=lenet", "model._target_=my_project.OwnStages")
    assert done.code == 0, done.err
    assert "the model can be cut into 2 at most" in done.out


_REFUSED = {
    "stages": (["+plan.stages=[0]"], "plan: stages=[0]: give numbers of at least 1."),
    "stages-word": (["+plan.stages=[two]"], "expects Sequence[int], not list[str]."),
    "stages-number": (["+plan.stages=2"], "plan.stages=2: `lightning_mgpu.plan.options.Options`"),
    "checkpoint": (["+plan.checkpoint=[sometimes]"], "plan.checkpoint=['sometimes']: "),
    "bandwidth": (["+plan.bandwidth=-1"], "plan: bandwidth=-1: give more than 0."),
    "unknown": (["+plan.chunk=[2]"], "has no argument `chunk`. Did you mean `chunks`?"),
    "strategy": (["+strategy=dp"], "mode=plan is for the pipeline. Leave `strategy` out"),
    "stages-per-device": (
        ["+strategy=pipeline", "strategy.stages_per_device=2"],
        "strategy.stages_per_device=2: say which numbers mode=plan is to compare instead",
    ),
    "split-at": (
        ["+strategy=pipeline", "strategy.split_at=net.9"],
        "mode=plan: `Sequential` has no submodule `9` at which a stage could begin.",
    ),
    "module": (
        ["+strategy=pipeline", "strategy.module=nope"],
        "mode=plan: `module='nope'`: `MLP` has no submodule of that name.",
    ),
    "too-few-batches": (
        ["++trainer.limit_train_batches=0"],
        "mode=plan: Training ended before everything had been measured.",
    ),
}


def test_plan_that_is_no_node_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"plan=3: set one of its values, as `\+plan"):
        options_of(OmegaConf.create({"plan": 3}))


@pytest.mark.parametrize(("arguments", "expected"), _REFUSED.values(), ids=_REFUSED)
def test_bad_input_is_told_in_one_line(arguments: list[str], expected: str) -> None:
    done = run_tiny("mode=plan", *arguments)
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1].startswith("Error: ")
    assert expected in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not Path("run/plan.csv").exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("NeverCalls", "steps the module was not run, forward and backward, on a batch"),
        ("NoLayers", "`Linear` has no layers that its `forward` calls, so it cannot be cut."),
    ],
)
def test_model_that_cannot_be_measured(model: str, expected: str) -> None:
    write_project(_MODELS)
    done = run_tiny("mode=plan", "model=lenet", f"model._target_=my_project.{model}")
    assert done.code == 2, done.err
    assert "Error: mode=plan: " in done.err.splitlines()[-1]
    assert expected in done.err.splitlines()[-1]


def test_plan_takes_no_checkpoint() -> None:
    assert run_tiny().code == 0
    done = run_tiny("mode=plan", "ckpt_path=run/checkpoints/last.ckpt")
    assert done.code == 2
    assert "ckpt_path=run/checkpoints/last.ckpt: mode=plan measures how long" in done.err
