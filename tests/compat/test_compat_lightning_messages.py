"""Lightning says what `_compat` knows its messages by."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning_models import Calls, Model, Validated, quiet

from lightning_mgpu._compat import (
    lightning_messages,
    namespace,
)
from lightning_mgpu._compat.lightning import (
    MisconfigurationException,
    ModelCheckpoint,
    Trainer,
)


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_message_of_a_metric_that_is_not_there(kind: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(namespace.current().module("pytorch.callbacks"))
    options = {"dirpath": tmp_path} if kind == "ModelCheckpoint" else {}
    callback = getattr(callbacks, kind)(monitor="accuracy", **options)
    trainer = quiet(callback, enable_checkpointing=kind == "ModelCheckpoint")
    with pytest.raises((MisconfigurationException, RuntimeError), match="accuracy") as caught:
        trainer.fit(Validated())
    assert lightning_messages.names_missing_metric(caught.value)


def test_warning_of_a_loader_that_does_not_keep_its_place(tmp_path: Path) -> None:
    path, model = tmp_path / "step.ckpt", Model()

    def save(trainer: Trainer) -> None:
        if not path.exists():
            trainer.save_checkpoint(path)

    quiet(Calls(on_train_batch_end=save)).fit(model)
    with pytest.warns(UserWarning, match=lightning_messages.NOT_RESUMABLE):
        quiet(max_epochs=2).fit(model, ckpt_path=path)


@pytest.mark.parametrize("keyword", ["hpc", "best"])
def test_message_of_a_keyword_without_checkpoint(keyword: str) -> None:
    with pytest.raises(ValueError, match="ckpt_path") as caught:
        quiet().fit(Model(), ckpt_path=keyword)
    assert lightning_messages.finds_no_checkpoint(caught.value, keyword)
    assert not lightning_messages.finds_no_checkpoint(caught.value, "last")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_message_of_an_accelerator_that_is_not_there(accelerator: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"gpu|cuda|CUDA") as caught:
        quiet(accelerator=accelerator)
    assert lightning_messages.lacks_device(caught.value)


def test_messages_of_memory() -> None:
    assert lightning_messages.says_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not lightning_messages.says_out_of_memory(RuntimeError("out of ideas"))


def test_known_warnings_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    module = importlib.import_module(namespace.current().module("pytorch.loggers"))
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    (tmp_path / "run" / "version_0" / "config.yaml").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for directory in ("a", "b"):
            trainer = quiet(
                ModelCheckpoint(tmp_path / directory, save_last=True),
                logger=module.CSVLogger(tmp_path, name="run", version=0),
                enable_checkpointing=True,
            )
            resume = tmp_path / "a" / "last.ckpt" if directory == "b" else None
            trainer.fit(Model(), ckpt_path=resume, weights_only=False)
    given = [str(warning.message) for warning in caught]
    for message in lightning_messages.KNOWN_WARNINGS:
        assert any(_begins(message, text) for text in given), message


def _begins(pattern: str, text: str) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", pattern)
        warnings.warn(text, stacklevel=2)
    return not caught


@pytest.fixture
def tips() -> Iterator[list[logging.LogRecord]]:
    """What the loggers let through that give tips, with those left out that are known as such."""
    through: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            through.append(record)

    handler = Handler()
    with ExitStack() as stack:
        for logger in lightning_messages.tip_loggers():
            stack.enter_context(patch.object(logger, "filters", []))  # our command's, for one
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        yield through


def test_tips_come_through_the_loggers_that_are_listened_to(
    tips: list[logging.LogRecord], tmp_path: Path
) -> None:
    quiet(enable_checkpointing=True, logger=True, default_root_dir=tmp_path, max_epochs=0).fit(
        Model()
    )
    assert any(lightning_messages.is_tip(record) for record in tips)
    assert not all(lightning_messages.is_tip(record) for record in tips)


def test_lightnings_own_handlers_hang_where_they_are_looked_for() -> None:
    def with_handlers(logger: logging.Logger) -> bool:
        return bool(logger.handlers) or logger.level == logging.INFO

    assert any(with_handlers(logger) for logger in lightning_messages.loggers())
    known = {logger.name for logger in lightning_messages.loggers()}
    others = {
        name
        for name, logger in logging.root.manager.loggerDict.items()
        if name.partition(".")[0] in namespace.PACKAGES
        and isinstance(logger, logging.Logger)
        and logger.handlers
    }
    assert others <= known
