"""SIGINT and SIGTERM: what has been learnt is saved and named, and nothing is left running.

The signals of the quick tests come from the model itself, in this process. The slow ones start the
command and send them from outside, as a terminal or a scheduler does.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Done, run_tiny, started, write_project

_STOPS = """
import signal

class Stops(LitModel):
    '''Sends signals to rank 0 in the step of a stage (the first is 0) that `at` names.'''

    def __init__(self, at: str = "train 0", signals: list[str] = (), sender: int = 0) -> None:
        super().__init__()
        self.at, self.signals, self.sender = at, signals, sender
        self.steps = {"train": 0, "validate": 0, "test": 0, "predict": 0}

    def _step(self, stage: str) -> None:
        if self.at == f"{stage} {self.steps[stage]}" and self.global_rank == self.sender:
            rank_zero = os.getpid() if self.global_rank == 0 else os.getppid()
            for number, name in enumerate(self.signals):
                print("signal", number)
                os.kill(rank_zero, getattr(signal, name))
            print("after the signals")
        self.steps[stage] += 1

    def training_step(self, batch, batch_idx):
        self._step("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._step("validate")
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self._step("test")
        return super().test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self._step("predict")
        return self.layer(batch[0].flatten(1))
"""

_CODES = [("SIGINT", 130), ("SIGTERM", 143)]
_DDP = ("+strategy=ddp", "trainer.devices=2")
_SINGLE = pytest.param((), id="single")
_DEVICES = pytest.mark.parametrize("devices", [_SINGLE, pytest.param(_DDP, id="ddp")])
_DEVICES_SLOW_DDP = pytest.mark.parametrize(
    "devices", [_SINGLE, pytest.param(_DDP, id="ddp", marks=pytest.mark.slow)]
)


def _run(*arguments: str, at: str, signals: str = "SIGINT", sender: int = 0) -> Done:
    """Three epochs of four batches each (per rank), with signals on the way."""
    write_project(_STOPS)
    return run_tiny(
        "model=lenet",
        "model._target_=my_project.Stops",
        "data._target_=my_project.LitData",
        f"+data.size={32 if _DDP[0] in arguments else 16}",
        "trainer.max_epochs=3",
        "++trainer.limit_train_batches=1.0",
        f"+model.at={at}",
        f"+model.signals=[{signals}]",
        f"+model.sender={sender}",
        *arguments,
    )


def _checkpoint(path: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@_DEVICES
@pytest.mark.parametrize(("name", "code"), _CODES)
def test_signal_saves_a_checkpoint_from_which_training_goes_on(
    name: str, code: int, devices: tuple[str, ...]
) -> None:
    done = _run(*devices, at="train 5", signals=name)
    assert done.code == code
    assert done.err.endswith(
        f"Stopped by {name}. Saved: run/checkpoints/interrupted.ckpt\n"
        "Resume with: ckpt_path=run/checkpoints/interrupted.ckpt\n"
    )
    assert "Traceback" not in done.err
    assert f"{name}: stopping after this batch; send it again to stop at once." in done.out
    assert "Outputs:" not in done.out
    saved = _checkpoint("run/checkpoints/interrupted.ckpt")
    assert (saved["epoch"], saved["global_step"]) == (1, 6)

    advice = done.err.split()[-1]
    done = _run(*devices, advice, "hydra.run.dir=resumed", at="never")
    assert done.code == 0, done.err
    resumed = _checkpoint("resumed/checkpoints/last.ckpt")
    assert (resumed["epoch"], resumed["global_step"]) == (2, 12)
    assert done.metrics["val_acc"] == "0.3333"


@_DEVICES_SLOW_DDP
def test_signal_in_the_last_batch_of_an_epoch(devices: tuple[str, ...]) -> None:
    assert _run(*devices, at="train 3").code == 130
    assert _checkpoint("run/checkpoints/interrupted.ckpt")["global_step"] == 4
    resume = ("ckpt_path=run/checkpoints/interrupted.ckpt", "hydra.run.dir=resumed")
    assert _run(*devices, *resume, at="never").code == 0
    assert _checkpoint("resumed/checkpoints/last.ckpt")["global_step"] == 12


def test_signal_in_the_first_batch_is_saved_too() -> None:
    assert _run(at="train 0").code == 130
    assert _checkpoint("run/checkpoints/interrupted.ckpt")["global_step"] == 1


@_DEVICES_SLOW_DDP
def test_signal_while_fit_validates(devices: tuple[str, ...]) -> None:
    # Step 0 is the sanity check's.
    assert _run(*devices, "++trainer.num_sanity_val_steps=1", at="validate 1").code == 130
    assert _checkpoint("run/checkpoints/interrupted.ckpt")["global_step"] == 4
    resume = ("ckpt_path=run/checkpoints/interrupted.ckpt", "hydra.run.dir=resumed")
    assert _run(*devices, *resume, at="never").code == 0
    assert _checkpoint("resumed/checkpoints/last.ckpt")["global_step"] == 12


def test_signal_before_the_first_step_has_nothing_to_save() -> None:
    done = _run(at="validate 0")
    assert done.code == 130
    assert done.err == "Stopped by SIGINT; no training was in progress, so nothing was saved.\n"
    assert not Path("run/checkpoints/interrupted.ckpt").exists()


@_DEVICES_SLOW_DDP
@pytest.mark.parametrize("mode", ["validate", "test", "predict"])
def test_signal_in_an_evaluation(mode: str, devices: tuple[str, ...]) -> None:
    done = _run(f"mode={mode}", *devices, at=f"{mode} 0", signals="SIGTERM")
    assert done.code == 143
    assert done.err.endswith(
        "Stopped by SIGTERM; no training was in progress, so nothing was saved.\n"
    )
    assert "Traceback" not in done.err
    assert not Path("run/predictions.pt").exists()


def test_signal_in_the_test_after_a_fit() -> None:
    done = _run(at="test 0")
    assert done.code == 130
    assert Path("run/checkpoints/last.ckpt").exists()
    assert not Path("run/checkpoints/interrupted.ckpt").exists()


def test_signal_of_a_worker_reaches_all_ranks() -> None:
    done = _run(*_DDP, at="train 2", signals="SIGTERM", sender=1)
    assert done.code == 143
    assert _checkpoint("run/checkpoints/interrupted.ckpt")["global_step"] in (3, 4)


@pytest.mark.parametrize(
    ("signals", "code"), [("SIGINT,SIGINT", 130), ("SIGTERM,SIGTERM", 143), ("SIGINT,SIGTERM", 130)]
)
def test_second_signal_ends_at_once(signals: str, code: int) -> None:
    done = _run(at="train 5", signals=signals)
    assert done.code == code
    assert "signal 1\n" in done.out
    assert "after the signals" not in done.out
    assert done.err.endswith("Resume with: ckpt_path=run/checkpoints/interrupted.ckpt\n")
    assert _checkpoint("run/checkpoints/interrupted.ckpt")["global_step"] == 5


def test_first_signal_lets_the_batch_end() -> None:
    assert "after the signals" in _run(at="train 5").out


def test_signal_ends_the_whole_multirun() -> None:
    done = _run("-m", "seed=1,2", at="train 5")
    assert done.code == 130
    assert Path("sweep/0/checkpoints/interrupted.ckpt").exists()
    assert not Path("sweep/1").exists()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    _run(at="train 5")
    _run(at="never")
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow
def test_pool_serves_again_after_a_signal() -> None:
    assert _run(*_DDP, at="train 1").code == 130
    assert _run(*_DDP, "hydra.run.dir=again", at="never").code == 0


_LONG = (
    "trainer=cpu",
    "model=mlp",
    "trainer.max_epochs=10000",
    "++trainer.limit_train_batches=4",
    "++trainer.enable_progress_bar=false",
    "++trainer.enable_model_summary=false",
    "hydra.run.dir=run",
)
_FIRST_CHECKPOINT = "run/checkpoints/last.ckpt"
_START_SECONDS = 90.0

Eventually = Callable[..., None]


@pytest.mark.slow
@_DEVICES
@pytest.mark.parametrize(("name", "code"), _CODES)
def test_signal_from_outside(
    name: str, code: int, devices: tuple[str, ...], eventually: Eventually
) -> None:
    with started(*_LONG, *devices) as process:
        eventually(lambda: process.reaches(_FIRST_CHECKPOINT), _START_SECONDS)
        process.signal(getattr(signal, name))
        done = process.wait()
    assert done.code == code
    assert "Traceback" not in done.err
    assert done.err.count("Stopped by") == 1
    steps = _checkpoint("run/checkpoints/interrupted.ckpt")["global_step"]
    epochs = steps // 4 + 2
    done = run_tiny(
        done.err.split()[-1],
        f"trainer.max_epochs={epochs}",
        "++trainer.limit_train_batches=4",
        "hydra.run.dir=resumed",
        *devices,
    )
    assert done.code == 0, done.err
    assert _checkpoint("resumed/checkpoints/last.ckpt")["global_step"] == 4 * epochs


@pytest.mark.slow
@_DEVICES
def test_ctrl_c_reaches_loader_processes_too(
    devices: tuple[str, ...], eventually: Eventually, short_directory: Path
) -> None:
    """A terminal signals the whole group: whoever else is in it must not speak or stay."""
    # A loader process that is ended leaves multiprocessing's temporary directory, with a socket.
    with started(*_LONG, "data.num_workers=1", *devices, TMPDIR=str(short_directory)) as process:
        eventually(lambda: process.reaches(_FIRST_CHECKPOINT), _START_SECONDS)
        process.signal(signal.SIGINT, group=True)
        done = process.wait()
    assert done.code == 130
    assert "Traceback" not in done.err
    assert done.out.count("SIGINT: stopping after this batch") == 1
    assert Path("run/checkpoints/interrupted.ckpt").exists()


@pytest.mark.slow
@_DEVICES
def test_second_signal_from_outside_ends_a_step_that_hangs(
    devices: tuple[str, ...], eventually: Eventually
) -> None:
    write_project(
        "import time\n"
        "class Hangs(LitModel):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        if self.trainer.global_step == 2:\n"
        "            Path(f'hanging-{self.global_rank}').touch()\n"
        "            time.sleep(600)\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    hangs = ("model=lenet", "model._target_=my_project.Hangs")
    with started(*_LONG, *hangs, *devices) as process:
        eventually(lambda: process.reaches("hanging-0"), _START_SECONDS)
        process.signal(signal.SIGINT)
        eventually(lambda: "send it again to stop at once" in process.written(), 10.0)
        process.signal(signal.SIGINT)
        sent = time.monotonic()
        done = process.wait()
    assert done.code == 130
    assert time.monotonic() - sent < 30
    assert "Traceback" not in done.err
    assert _checkpoint("run/checkpoints/interrupted.ckpt")["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "codes"), [("SIGINT", {130}), ("SIGTERM", {143, -15})])
def test_signal_while_torch_is_imported(name: str, codes: set[int], eventually: Eventually) -> None:
    with started(*_LONG) as process:
        # Hydra writes this before it calls us, and we import torch only then.
        eventually(lambda: process.reaches("run/.hydra/overrides.yaml"), _START_SECONDS)
        process.signal(getattr(signal, name))
        done = process.wait()
    assert done.code in codes
    assert "Traceback" not in done.err
