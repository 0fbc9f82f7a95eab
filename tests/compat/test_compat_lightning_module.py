"""What `_compat` knows of LightningModules, loaders and loggers is so."""

import importlib
import inspect
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchmetrics
from lightning_models import Model, quiet
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import lightning_mgpu._compat.lightning as names
from lightning_mgpu._compat import (
    lightning_data,
    lightning_loggers,
    lightning_loops,
    lightning_module,
    namespace,
)
from lightning_mgpu._compat.lightning import (
    CSVLogger,
    LightningModule,
)
from lightning_mgpu._compat.module_device import say_device


def test_attributes_that_lightning_keeps_for_itself() -> None:
    own = lightning_module.own_attributes()
    mine = vars(Model()).keys() - vars(torch.nn.Module()).keys() - {"layer"}
    assert mine - own <= {"_hparams"}
    assert {"_trainer", "_fabric", "_hparams_initial", "_hparams_name", "_log_hyperparams"} <= own


def test_a_module_is_given_a_trainer_of_its_own() -> None:
    model, child, trainer = Model(), Model(), quiet()
    model.child = child
    model.trainer = trainer
    other = quiet()
    lightning_module.set_trainer(model, other)
    assert model.trainer is other
    assert child.trainer is trainer
    with pytest.raises(AttributeError, match="`Linear` has no `_trainer`"):
        lightning_module.set_trainer(cast("Any", torch.nn.Linear(1, 1)), other)


def test_a_module_says_another_device() -> None:
    model = Model()
    lightning_module.set_device(model, torch.device("meta"))
    assert model.device.type == "meta"
    say_device(model, torch.device("cpu"))
    say_device(model.layer, torch.device("meta"))  # which has none to name
    assert model.device.type == model.layer.weight.device.type == "cpu"
    metric = torchmetrics.MeanMetric()
    say_device(metric, torch.device("meta"))
    assert metric.device.type == "meta"


def test_arguments_of_log_go_by_name() -> None:
    parameters = list(inspect.signature(LightningModule.log).parameters)
    assert parameters[:4] == ["self", "name", "value", "prog_bar"]
    options = lightning_module.log_options((True, None), {"reduce_fx": "max"})
    assert (options["prog_bar"], options["reduce_fx"]) == (True, "max")
    assert lightning_module.log_options((), {"unknown": 1}) == {"unknown": 1}


def test_the_batch_size_is_replaced_wherever_it_was_given() -> None:
    bind = inspect.signature(LightningModule.log).bind
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(LightningModule.log).parameters.items()
        if name not in ("self", "name", "value")
    }
    everything = tuple({**defaults, "batch_size": 3, "rank_zero_only": True}.values())
    for args, kwargs in (
        ((), {}),
        ((), {"batch_size": 3}),
        ((True,), {"batch_size": 3}),
        (everything, {}),
    ):
        args, kwargs = lightning_module.with_batch_size(args, kwargs, 7)
        bound = bind(None, "name", 1.0, *args, **kwargs)
        assert bound.arguments["batch_size"] == 7
        assert bound.arguments.get("rank_zero_only", False) == (len(args) > 8)


def test_batches_of_a_prediction_are_recorded() -> None:
    trainer = quiet()
    trainer.predict(Model())
    (loader,) = lightning_loops.predict_loaders(trainer)
    inner, seen = lightning_data.recorded_batches(loader.batch_sampler) or (None, [])
    assert type(inner) is BatchSampler
    assert seen == [[0, 1], [2, 3]]
    lightning_data.set_inner_batch_sampler(loader.batch_sampler, [[1], [0]])
    assert list(loader.batch_sampler) == [[1], [0]]
    plain = Model().train_dataloader().batch_sampler
    assert lightning_data.recorded_batches(plain) is None
    assert lightning_data.inner_batch_sampler(plain) is None


def test_samplers_are_found_within_those_of_lightning() -> None:
    whole = SequentialSampler(range(6))
    dealt = names.UnrepeatedDistributedSamplerWrapper(whole, num_replicas=2, rank=0)
    assert lightning_data.whole_sampler(dealt) is whole
    assert list(lightning_data.samplers_of(DataLoader([1], sampler=dealt)))[-1] is whole
    batches = BatchSampler(whole, 2, False)
    assert set(lightning_data.samplers_of(DataLoader([1], batch_sampler=batches))) >= {
        batches,
        whole,
    }


def test_a_csv_logger_goes_on_with_its_file(tmp_path: Path) -> None:
    def logger() -> Any:
        module = importlib.import_module(namespace.current().module("pytorch.loggers"))
        return module.CSVLogger(tmp_path, name="run", version=0)

    first = logger()
    assert isinstance(first, CSVLogger)
    assert not lightning_loggers.has_written(first)
    first.log_metrics({"loss": 1.0}, step=0)
    first.save()
    assert lightning_loggers.has_written(first)
    second = logger()
    lightning_loggers.adopt_file(second)
    second.log_metrics({"loss": 2.0}, step=1)
    second.save()
    lines = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().split()
    assert lines == ["loss,step", "1.0,0", "2.0,1"]
    held = first.experiment
    lightning_loggers.restore_attribute(first, "_experiment", second.experiment)
    lightning_loggers.restore_attribute(first, "_flush_logs_every_n_steps", 3)
    assert first.experiment is held
    assert (held.metrics_keys, first._flush_logs_every_n_steps) == (["loss", "step"], 3)
