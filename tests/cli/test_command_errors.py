"""Bad input: one line that says what is wrong and what to do, exit code 2, and no traceback."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import lightning.fabric.accelerators.cuda
import lightning.pytorch.accelerators.cuda
import pytest
import torch
from command import run, run_process, run_tiny, write_project

_CASES = {
    # Choices of a group
    "strategy/nope": (["+strategy=nope"], "Could not find 'strategy/nope'. Known: auto, ddp, deep"),
    "strategy-without-plus": (["strategy=ddp"], "append to your default list use +strategy=ddp"),
    "strategy-number": (["+strategy=3"], "Config group override must be a string or a list"),
    "model/nope": (["model=nope"], "Could not find 'model/nope'. Known: lenet, mlp, resnet, trans"),
    "data/nope": (["data=nope"], "Could not find 'data/nope'. Known: cifar10, digits, synthetic."),
    "callbacks-number": (["callbacks=3"], "Config group override must be a string or a list"),
    "launcher/nope": (["hydra/launcher=nope"], "Could not find 'hydra/launcher/nope'. Known: "),
    "config-dir": (["--config-dir=nope"], "Additional config directory '"),
    "config-name": (["--config-name=nope"], "Cannot find primary config 'nope'."),
    "trainer.strategy": (["++trainer.strategy=nope"], "invalid strategy name: `strategy='nope'`"),
    # Targets
    "target-module": (
        ["model._target_=nope.LitModel"],
        "model._target_=nope.LitModel: cannot be imported (No module named 'nope'). Give the full"
        " dotted name, and start the command where Python finds the module.",
    ),
    "target-attribute": (
        ["model._target_=my_project.Nope"],
        "model._target_=my_project.Nope: cannot be imported (module 'my_project' has no attribute",
    ),
    "target-empty": (["model._target_="], "model._target_=: cannot be imported"),
    "target-no-class": (
        ["model._target_=my_project.NUMBER"],
        "model._target_=my_project.NUMBER: is not a class or function.",
    ),
    "target-broken-module": (
        ["model._target_=broken_project.LitModel"],
        "model._target_=broken_project.LitModel: cannot be imported (division by zero)",
    ),
    "target-of-strategy": (["+strategy._target_=nope.S"], "strategy._target_=nope.S: cannot be"),
    "target-missing": (
        ["callbacks.model_checkpoint=3"],
        "callbacks.model_checkpoint: expected a node with `_target_`, got 3.",
    ),
    "model-is-data": (
        ["model._target_=my_project.LitData"],
        "model: `my_project.LitData` is not a `lightning.pytorch.core.module.LightningModule`.",
    ),
    "data-is-model": (
        ["data._target_=my_project.LitModel"],
        "data: `my_project.LitModel` is not a `lightning.pytorch.core.datamodule.Lightning",
    ),
    "callback-is-model": (
        ["+callbacks.mine._target_=my_project.LitModel"],
        "callbacks.mine: `my_project.LitModel` is not a `lightning.pytorch.callbacks.callback.",
    ),
    "logger-is-model": (
        ["+logger.mine._target_=my_project.LitModel"],
        "logger.mine: `my_project.LitModel` is not a `lightning.pytorch.loggers.logger.Logger`.",
    ),
    "constructor-raises": (
        ["model._target_=my_project.Picky"],
        "model: one line and another",
    ),
    # Names
    "unknown-key": (["foo=1"], "Could not override 'foo'. To append to your config use +foo=1"),
    "unknown-key-of-model": (
        ["+model.foo=1"],
        "model.foo: `lightning_mgpu.demo.mlp.MLP` has no argument `foo`. It takes: hidden,",
    ),
    "misspelt-key": (
        ["++trainer.max_epoch=1"],
        "trainer.max_epoch: `lightning.pytorch.trainer.trainer.Trainer` has no argument"
        " `max_epoch`. Did you mean `max_epochs`?",
    ),
    "key-of-another-model-by-hand": (
        ["model._target_=my_project.LitModel", "model.hidden=[3]"],
        "model.hidden: `my_project.LitModel` has no argument `hidden`. It takes: lr, sizes.",
    ),
    "nested-key-by-hand": (
        ["model._target_=my_project.LitModel", "+model.optimizer.lr=3"],
        "model.optimizer: `my_project.LitModel` has no argument `optimizer`.",
    ),
    # Types and values
    "type-of-trainer": (
        ["trainer.max_epochs=abc"],
        "trainer.max_epochs=abc: `lightning.pytorch.trainer.trainer.Trainer` expects int or null,"
        " not str.",
    ),
    "type-of-model": (
        ["model.lr=fast"],
        "model.lr=fast: `lightning_mgpu.demo.mlp.MLP` expects float, not str.",
    ),
    "type-of-elements": (
        ["model.hidden=[3,a]"],
        "model.hidden=[3, 'a']: `lightning_mgpu.demo.mlp.MLP` expects Sequence[int], not"
        " list[int | str].",
    ),
    "type-of-data": (
        ["data.batch_size=1.5"],
        "data.batch_size=1.5: `lightning_mgpu.demo.data.digits.Digits` expects int, not float.",
    ),
    "type-of-callback": (
        ["callbacks.model_checkpoint.filename=3"],
        "callbacks.model_checkpoint.filename=3: `lightning.pytorch.callbacks.model_checkpoint."
        "ModelCheckpoint` expects str or null, not int.",
    ),
    "value-of-callback": (
        ["callbacks.model_checkpoint.mode=up"],
        "callbacks.model_checkpoint: `mode` can be min, max but got up",
    ),
    "mode": (
        ["mode=train"],
        "mode=train: unknown. Choose one of fit, validate, test, predict, plan, report, doctor,"
        " replay.",
    ),
    "replay-of-nothing": (["mode=replay"], "mode=replay: set bundle= to a file that"),
    "replay-of-no-file": (["mode=replay", "bundle=gone.pt"], "bundle=gone.pt: [Errno 2]"),
    "mode-list": (["mode=[fit]"], "mode=['fit']: unknown. Choose one of"),
    "seed-word": (["seed=abc"], "seed=abc: expected an integer from 0 to 4294967295, or null."),
    "seed-negative": (["seed=-1"], "seed=-1: expected an integer from 0 to 4294967295, or null."),
    "seed-bool": (["seed=true"], "seed=True: expected an integer"),
    "override-without-value": (["model.lr"], "Error parsing override 'model.lr' missing EQUAL"),
    "interpolation": (["model.lr=${rate}"], "model.lr: Interpolation key 'rate' not found."),
    "interpolation-unused": (["+x=${rate}"], "x: Interpolation key 'rate' not found."),
    "missing-value": (["model.lr=???"], "model.lr: Missing mandatory value: lr."),
    # Devices
    "devices-none": (["trainer.devices=0"], "`Trainer(devices=0)` value is not a valid input"),
    "devices-list": (["trainer.devices=[0,1]"], "`devices` selected with `CPUAccelerator` should"),
    "accelerator": (["trainer.accelerator=npu"], "invalid accelerator name: `accelerator='npu'`"),
    # Outputs
    "run-dir-in-file": (["hydra.run.dir=a_file/run"], "hydra.run.dir (hydra.sweep.dir in a multi"),
    "output-dir-in-file": (["output_dir=a_file/out"], "output_dir=a_file/out: cannot write there"),
    "output-dir-is-file": (["output_dir=a_file"], "output_dir=a_file: cannot write there: "),
    "output-dir-null": (["output_dir=null"], "output_dir=None: expected the path of a directory."),
    "output-dir-list": (["output_dir=[a]"], "output_dir=['a']: expected the path of a directory."),
}


def _refused(*arguments: str, **environment: str) -> str:
    """The message, after a check that there is nothing else."""
    done = run_tiny(*arguments, **environment)
    assert done.code == 2, done.err
    assert done.err.startswith("Error: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert len(done.err) < 600
    assert "Outputs:" not in done.out
    return done.err


@pytest.mark.parametrize(("arguments", "expected"), _CASES.values(), ids=_CASES)
def test_bad_input_is_told_in_one_line(arguments: list[str], expected: str) -> None:
    write_project(
        "NUMBER = 3\n"
        "class Picky(LitModel):\n"
        "    def __init__(self, lr=0.1):\n"
        "        raise ValueError('one line\\nand another')\n"
    )
    Path("broken_project.py").write_text("1 / 0\n")
    Path("a_file").touch()
    assert expected in _refused(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("devices", ["auto", "4", "[0,1]"])
def test_accelerator_that_is_not_there(devices: str) -> None:
    message = _refused("trainer=gpu", f"trainer.devices={devices}")
    assert "trainer: accelerator=gpu, devices=" in message
    assert message.endswith("this machine has none of that kind. Use `trainer=cpu`.\n")


@pytest.fixture
def two_gpus() -> Iterator[None]:
    """Make Lightning count two GPUs; enough for what it checks before it uses them."""
    with (
        patch.object(torch.cuda, "device_count", return_value=2),
        patch.object(lightning.fabric.accelerators.cuda, "num_cuda_devices", return_value=2),
        patch.object(lightning.pytorch.accelerators.cuda, "num_cuda_devices", return_value=2),
    ):
        yield


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("devices", "wanted"), [("4", r"[0, 1, 2, 3]"), ("[0,5]", "[0, 5]"), ("'1,2'", "[1, 2]")]
)
def test_more_devices_than_there_are(devices: str, wanted: str) -> None:
    message = _refused("trainer.accelerator=gpu", f"trainer.devices={devices}")
    assert f"You requested gpu: {wanted} But your machine only has: [0, 1]" in message


def test_missing_package_of_the_demo() -> None:
    with patch.dict(sys.modules, {"torchvision": None}):
        message = _refused("data=cifar10")
    assert "data: CIFAR10 needs torchvision: pip install torchvision" in message


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_extra_of_a_logger(name: str) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    message = _refused(f"logger={name}")
    assert message.startswith(f"Error: logger.{name}: Requirement '{name}")
    assert "pip install" in message


def test_missing_module_within_a_users_class_is_named() -> None:
    write_project(
        "class Needs(LitModel):\n    def __init__(self, lr=0.1):\n        import some_extra.part\n"
    )
    message = _refused("model._target_=my_project.Needs")
    assert message == (
        "Error: model: No module named 'some_extra'. If that is a package, install it:"
        " `pip install some_extra`.\n"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("trained"))
        done = run_tiny()
        assert done.code == 0, done.err
        return Path("run/checkpoints/last.ckpt").absolute()


_DAMAGE = {
    "missing": "ckpt_path=broken.ckpt: no such file (looked in ",
    "empty": "ckpt_path=broken.ckpt: damaged, or not a checkpoint (",
    "garbage": "ckpt_path=broken.ckpt: damaged, or not a checkpoint (",
    "truncated": "ckpt_path=broken.ckpt: damaged, or not a checkpoint (",
    "overwritten": "ckpt_path=broken.ckpt: damaged, or not a checkpoint (",
    "directory": "ckpt_path=broken.ckpt: a directory, but not that of a checkpoint.",
    "tensor": "ckpt_path=broken.ckpt: not a Lightning checkpoint (it has no `state_dict`)",
    "state-dict": "ckpt_path=broken.ckpt: not a Lightning checkpoint (it has no `state_dict`)",
    "not-lightnings": "not a Lightning checkpoint (it has no `pytorch-lightning_version`)",
    "module": "holds more than tensors and plain values (torch.nn.modules.linear.Linear)",
}


def _damage(kind: str, good: Path) -> None:
    path, content = Path("broken.ckpt"), good.read_bytes()
    state = torch.load(good, weights_only=True)["state_dict"]
    if kind == "directory":
        path.mkdir()
    elif kind in ("tensor", "state-dict", "not-lightnings", "module"):
        torch.save(
            {
                "tensor": torch.ones(3),
                "state-dict": state,
                "not-lightnings": {"state_dict": state},
                "module": torch.nn.Linear(2, 2),
            }[kind],
            path,
        )
    elif kind != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "garbage": b"garbage" * 100,
                "truncated": content[: len(content) // 2],
                "overwritten": content[:40] + bytes(400) + content[440:],
            }[kind]
        )


@pytest.mark.parametrize(("kind", "expected"), _DAMAGE.items(), ids=_DAMAGE)
def test_checkpoint_that_is_none(kind: str, expected: str, trained: Path) -> None:
    _damage(kind, trained)
    mode = "test" if kind == "missing" else "fit"
    assert expected in _refused("ckpt_path=broken.ckpt", f"mode={mode}")


def test_last_good_checkpoint_of_a_run() -> None:
    """The same command begins, and goes on."""
    begun = run_tiny("ckpt_path=last_good")
    assert begun.code == 0, begun.err
    assert "training starts at the beginning" in begun.out
    Path("run/checkpoints/later.ckpt").write_bytes(b"cut")
    resumed = run_tiny("ckpt_path=last_good", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert "later.ckpt: damaged" in resumed.out
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert "no checkpoint in" in _refused("ckpt_path=last_good", "mode=test", "output_dir=new")


@pytest.mark.parametrize("mode", ["fit", "validate", "test", "predict"])
def test_checkpoint_of_another_model(mode: str, trained: Path) -> None:
    message = _refused(f"ckpt_path={trained}", f"mode={mode}", "model.hidden=[5]")
    assert f"ckpt_path={trained}: the checkpoint is of another model (Error(s) in" in message
    assert "size mismatch" in message
    assert message.endswith("Use the model and the sizes it was trained with.\n")


def test_checkpoint_of_another_class(trained: Path) -> None:
    message = _refused(f"ckpt_path={trained}", "model=lenet")
    assert "the checkpoint is of another model" in message
    assert 'Missing key(s) in state_dict: "net.' in message


def test_checkpoint_of_another_model_with_ddp(trained: Path) -> None:
    arguments = ("+strategy=ddp", "trainer.devices=2", "model.hidden=[5]")
    assert "is of another model" in _refused(f"ckpt_path={trained}", *arguments)


def test_checkpoint_of_weights_alone_is_not_resumed(trained: Path) -> None:
    content = torch.load(trained, weights_only=True)
    del content["optimizer_states"], content["lr_schedulers"]
    torch.save(content, "weights.ckpt")
    message = _refused("ckpt_path=weights.ckpt")
    assert "holds weights only, from which training cannot resume." in message
    assert run_tiny("ckpt_path=weights.ckpt", "mode=test").code == 0


@pytest.mark.parametrize("keyword", ["best", "hpc"])
@pytest.mark.parametrize("mode", ["fit", "test"])
def test_checkpoint_keyword_without_a_checkpoint(keyword: str, mode: str) -> None:
    assert f"Error: ckpt_path={keyword}: " in _refused(f"ckpt_path={keyword}", f"mode={mode}")


@pytest.mark.parametrize("mode", ["validate", "test", "predict"])
def test_last_checkpoint_that_is_not_there_is_not_evaluated(mode: str) -> None:
    """Lightning would warn, and evaluate random weights."""
    done = run_tiny("ckpt_path=last", f"mode={mode}")
    assert done.code == 2
    assert done.err.endswith(
        f"Error: ckpt_path=last: {Path('run').absolute()} has no such checkpoint.\n"
    )
    assert done.metrics == {}


def test_trusted_objects_may_be_loaded(trained: Path) -> None:
    content = torch.load(trained, weights_only=True)
    content["hyper_parameters"] = torch.nn.Linear(2, 2)  # stands for a class of the user's
    torch.save(content, "objects.ckpt")
    assert "run code. If you trust the file, set TORCH_FORCE_NO" in _refused(
        "ckpt_path=objects.ckpt", "mode=test"
    )
    trust = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = run_tiny("ckpt_path=objects.ckpt", "mode=test", **trust)
    assert done.code == 0, done.err


def test_traceback_on_demand(trained: Path) -> None:
    for arguments in (["+strategy=nope"], ["mode=train"], ["model.lr=x"], ["ckpt_path=nope"]):
        done = run_tiny(*arguments, HYDRA_FULL_ERROR="1")
        assert done.code == 1
        assert "Traceback (most recent call last)" in done.err
        assert "ckpt_path=nope" in done.err or "ckpt_path=nope" not in arguments


_TRAINING_ERRORS = {
    "runtime": "raise RuntimeError('boom')",
    "value": "raise ValueError('boom')",
    "os": "open('/nope/boom')",
    "assertion": "assert False, 'boom'",
    "omegaconf": "OmegaConf.create({'a': '${boom}'}).a",
    "hydra": "hydra.utils.instantiate({'_target_': 'boom.Boom'})",
}


@pytest.mark.parametrize("statement", _TRAINING_ERRORS.values(), ids=_TRAINING_ERRORS)
@pytest.mark.parametrize("flags", [(), pytest.param(("-m",), marks=pytest.mark.slow)])
def test_training_error_keeps_its_traceback(flags: tuple[str, ...], statement: str) -> None:
    write_project(
        "import hydra\n"
        "from omegaconf import OmegaConf\n"
        "class Fails(LitModel):\n"
        "    def training_step(self, batch, batch_idx):\n"
        f"        {statement}\n"
    )
    done = run_tiny(*flags, "model=lenet", "model._target_=my_project.Fails")
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err
    assert "in training_step" in done.err
    assert "boom" in done.err.lower()
    assert "Error: " not in done.err.split("\n")[0]


def test_training_error_on_a_worker_keeps_its_traceback() -> None:
    write_project(
        "class Fails(LitModel):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        if self.global_rank == 1:\n"
        "            raise RuntimeError('boom on rank 1')\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    target = ("model=lenet", "model._target_=my_project.Fails")
    done = run_tiny("+strategy=ddp", "trainer.devices=2", *target)
    assert done.code == 1
    assert "RuntimeError: boom on rank 1" in done.err
    assert "in training_step" in done.err


def test_multirun_goes_on_after_bad_input() -> None:
    done = run_tiny("-m", "seed=1,two,3,four")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1] == (
        "Error: seed=two: expected an integer from 0 to 4294967295, or null."
    )
    for job, outcome in enumerate((True, False, True, False)):
        assert Path(f"sweep/{job}/metrics.csv").exists() == outcome
    # Hydra raises the first error only; each is told when it happens, and in the job's own log.
    for job, word in ((1, "two"), (3, "four")):
        line = f"Job {job} failed: seed={word}: expected an integer"
        assert line in done.out
        assert line in Path(f"sweep/{job}/lightning_mgpu.log").read_text()


def test_multirun_goes_on_after_a_training_error() -> None:
    write_project(
        "class Fails(LitModel):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        assert self.hparams.lr < 1, 'boom'\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    done = run_tiny("-m", "model=lenet", "model._target_=my_project.Fails", "model.lr=2,0.1")
    assert done.code == 1
    assert "AssertionError: boom" in done.err
    assert "Job 0 failed: boom" in done.out
    assert Path("sweep/1/metrics.csv").exists()


def test_multirun_with_an_unknown_choice_runs_nothing() -> None:
    done = run_tiny("-m", "model=mlp,nope")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Error: Could not find 'model/nope'. Known: ")
    assert not list(Path("sweep").glob("*/"))


def test_multirun_into_an_unwritable_directory() -> None:
    Path("a_file").touch()
    assert "hydra.sweep.dir in a multirun): cannot write there: " in _refused(
        "-m", "hydra.sweep.dir=a_file/sweep", "seed=1,2"
    )


def test_multirun_refuses_strategies_that_start_the_command_again() -> None:
    """Stock DDP runs `sys.argv` again for each rank, and with it every job of the sweep."""
    done = run_tiny("-m", "trainer.devices=1,2", "++trainer.strategy=ddp")
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        "Error: strategy: `lightning.pytorch.strategies.ddp.DDPStrategy` starts its processes by"
        " running the whole command again, so each would run every job of this multirun. Use"
        " `+strategy=ddp`, or `trainer.devices=1`."
    )
    assert not Path("sweep/0/metrics.csv").exists()


@pytest.mark.parametrize("strategy", [(), ("+strategy=auto",)], ids=["none", "auto"])
def test_multirun_without_a_strategy_takes_ours_for_several_devices(
    strategy: tuple[str, ...],
) -> None:
    done = run_tiny("-m", "trainer.devices=1,2", *strategy)
    assert done.code == 0, done.err
    assert Path("sweep/0/metrics.csv").exists()
    assert Path("sweep/1/metrics.csv").exists()


def test_unwritable_directory_of_another_user() -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    Path("locked").mkdir(mode=0o500)
    assert "hydra.run.dir" in _refused("hydra.run.dir=locked/run")
    assert "output_dir=locked/out: cannot write there" in _refused("output_dir=locked/out")


def test_disk_that_is_full_is_no_config_error() -> None:
    """An `OSError` of the run itself is told as such, and not blamed on `hydra.run.dir`."""
    write_project(
        "class Full(LitModel):\n"
        "    def on_fit_start(self):\n"
        "        raise OSError(28, 'No space left on device')\n"
    )
    done = run_tiny("model=lenet", "model._target_=my_project.Full")
    assert done.code == 1
    assert done.err.rstrip().endswith("OSError: [Errno 28] No space left on device")


def test_unknown_flag_shows_the_usage() -> None:
    done = run("--nope")
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("error: unrecognized arguments: --nope")


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(trained: Path) -> None:
    shutil.copy(trained, "good.ckpt")
    for arguments in (["+strategy=nope"], ["mode=test", "ckpt_path=nope"], ["model.lr=x"]):
        done = run_process("trainer=cpu", *arguments)
        assert done.code == 2
        assert done.err.startswith("Error: ")
        assert done.err.count("\n") == 1
