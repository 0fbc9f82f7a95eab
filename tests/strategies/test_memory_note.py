"""Runs that end for lack of memory say what was there, and what would help."""

from typing import Any

import boring
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mgpu.engine import device as device_module
from lightning_mgpu.strategies.base import memory_note


class Short(boring.Classifier):
    """Runs out of memory in its second step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().training_step(batch, batch_idx)


# A layer of 6 x 8 with bias, one of 8 x 3 with bias, in float64; Adam keeps two values for each,
# and a step in float32 for each of four tensors.
HELD = "cpu: weights 664 bytes, their gradients 664 bytes, optimizer state 1.34 kB."


def note_of(strategy: str, devices: int) -> str:
    trainer = boring.trainer(strategy, devices)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        trainer.fit(Short("adam"), DataLoader(boring.blobs(), batch_size=8))
    notes = [*getattr(caught.value, "__notes__", []), str(caught.value.__cause__)]
    (note,) = [note for note in notes if "By device" in note]
    return note


def test_note_of_replicas() -> None:
    note = note_of("dp", 2)
    assert note.startswith(f"(By device: {HELD} What is left is for activations")
    assert "`accumulate_grad_batches=2`, or `callbacks=[OutOfMemoryGuard()]`;" in note
    assert "`precision='bf16-mixed'`; activation checkpointing" in note


def test_note_of_stages() -> None:
    note = note_of("pipeline", 2)
    assert HELD in note
    assert "help: more micro-batches, `chunks=16`; `checkpoint='always'`, which" in note


def test_advice_for_a_model_that_fills_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_note, "memory_of", lambda _: (2700, 3000))
    note = note_of("dp", 2)
    assert "optimizer state 1.34 kB; 2.70 kB at most in use at once, of 3.00 kB." in note
    assert "help: `strategy='pipeline'`, which cuts the model; Lightning's" in note


def test_host_does_not_tell_its_memory() -> None:
    assert device_module.memory_of(torch.device("cpu")) is None
