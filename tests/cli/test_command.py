"""What the command does with good input; bad input is in `test_command_errors.py`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from command import CONSOLE_SCRIPT, run, run_process, run_tiny, write_project
from hydra.experimental.callback import Callback
from lightning.fabric.utilities.cloud_io import _load as load_checkpoint
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
_CHOICES = sorted(
    (file.parent.name, file.stem)
    for file in (ROOT / "conf").glob("*/*.yaml")
    if file.parent.name != "search_space"
)


def _files(directory: str) -> set[str]:
    root = Path(directory)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_fit_leaves_its_files_in_the_run_directory() -> None:
    done = run_tiny()
    assert done.code == 0, done.err
    assert os.listdir() == ["run"]
    assert _files("run") >= {
        "config.yaml",
        "metrics.csv",
        "lightning_mgpu.log",
        "checkpoints/last.ckpt",
        "checkpoints/epoch0-step2.ckpt",
        ".hydra/overrides.yaml",
    }


def test_fit_ends_with_metrics_and_files() -> None:
    done = run_tiny()
    assert set(done.metrics) == {"train_loss", "val_loss", "val_acc", "test_loss", "test_acc"}
    table, _, files = done.out.partition("Outputs: run\n")
    assert table.rstrip().endswith("┘")
    named = dict(line.strip().split(": ") for line in files.splitlines())
    assert named == {
        "config": "run/config.yaml",
        "best checkpoint": "run/checkpoints/epoch0-step2.ckpt",
        "last checkpoint": "run/checkpoints/last.ckpt",
        "metrics": "run/metrics.csv",
    }
    assert all(Path(path).is_file() for path in named.values())


def test_saved_config_is_resolved() -> None:
    run_tiny("model.lr=0.5", "seed=3")
    text = Path("run/config.yaml").read_text()
    cfg: Any = OmegaConf.load("run/config.yaml")
    assert "${" not in text
    assert (cfg.seed, cfg.model.lr, cfg.output_dir) == (3, 0.5, str(Path("run").absolute()))
    assert cfg.trainer.default_root_dir == cfg.output_dir


def test_log_file_has_what_lightning_says() -> None:
    run_tiny()
    assert "`Trainer.fit` stopped: `max_epochs=1` reached" in Path(
        "run/lightning_mgpu.log"
    ).read_text(encoding="utf-8")


def test_fit_tests_the_best_checkpoint() -> None:
    write_project()
    done = run_tiny("model=lenet", "model._target_=my_project.LitModel", "trainer.max_epochs=3")
    assert _files("run/checkpoints") == {"epoch0-step2.ckpt", "last.ckpt"}
    assert done.metrics["test_epochs"] == "1"
    assert done.metrics["val_acc"] == "0.3333"
    last = load_checkpoint("run/checkpoints/last.ckpt")
    assert (last["epoch"], last["global_step"]) == (2, 6)


def test_run_directory_is_dated_by_default() -> None:
    done = run_tiny("mode=validate", "hydra.run.dir=${hydra:job.name}/${now:%Y}")
    assert done.code == 0, done.err
    assert os.listdir() == ["lightning_mgpu"]
    cfg = OmegaConf.create(run("--cfg", "hydra").out)
    run_dir = OmegaConf.to_container(cfg, resolve=False)["hydra"]["run"]["dir"]  # type: ignore
    assert run_dir == "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"


def test_printed_path_can_be_passed_back() -> None:
    """Hydra would not take a `=` in a value, as Lightning's own names have it."""
    done = run_tiny()
    for kind in ("best", "last"):
        path = next(line for line in done.out.splitlines() if f"{kind} checkpoint" in line)
        again = run_tiny("mode=test", f"ckpt_path={path.split()[-1]}", "hydra.run.dir=again")
        assert again.code == 0, again.err


def test_modes_evaluate_a_checkpoint_as_fit_did() -> None:
    fit = run_tiny()
    checkpoint = "ckpt_path=run/checkpoints/last.ckpt"
    for mode, stage in (("validate", "val"), ("test", "test")):
        done = run_tiny(f"mode={mode}", checkpoint, f"hydra.run.dir={mode}")
        assert done.code == 0, done.err
        assert done.metrics == {k: v for k, v in fit.metrics.items() if k.startswith(stage)}
        assert f"Outputs: {mode}\n  config: {mode}/config.yaml\n" in done.out
        assert not Path(mode, "checkpoints").exists()


def test_predict_writes_one_file() -> None:
    run_tiny()
    done = run_tiny("mode=predict", "ckpt_path=run/checkpoints/last.ckpt", "hydra.run.dir=predict")
    assert done.out.endswith("  predictions: predict/predictions.pt\n")
    predictions = torch.load("predict/predictions.pt", weights_only=True)
    assert predictions.shape == (359, 10)
    assert torch.allclose(predictions.sum(1), torch.ones(359))


@pytest.mark.parametrize("mode", ["validate", "test", "predict"])
def test_evaluation_without_a_checkpoint_is_pointed_out(mode: str) -> None:
    done = run_tiny(f"mode={mode}", "++trainer.limit_predict_batches=1")
    assert done.code == 0
    assert f"mode={mode} without ckpt_path: the model has random weights." in done.out


def test_resume_goes_on_where_the_checkpoint_ends() -> None:
    run_tiny("trainer.max_epochs=2", "hydra.run.dir=straight")
    run_tiny("trainer.max_epochs=1")
    done = run_tiny(
        "trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt", "hydra.run.dir=resumed"
    )
    assert done.code == 0, done.err
    resumed, straight = (
        load_checkpoint(f"{name}/checkpoints/last.ckpt") for name in ("resumed", "straight")
    )
    assert (resumed["global_step"], resumed["epoch"]) == (4, 1)
    assert straight["global_step"] == 4


def test_resume_by_keyword_in_the_same_directory() -> None:
    for epochs in (1, 2):  # `last` may be given before there is one
        done = run_tiny("ckpt_path=last", f"trainer.max_epochs={epochs}")
        assert done.code == 0, done.err
    assert load_checkpoint("run/checkpoints/last.ckpt")["global_step"] == 4


def test_second_run_in_a_directory_keeps_the_metrics_of_the_first() -> None:
    run_tiny()
    before = Path("run/metrics.csv").read_text()
    for mode in ("fit", "test"):
        assert run_tiny(f"mode={mode}", "ckpt_path=last", "trainer.max_epochs=2").code == 0
    assert Path("run/metrics-1.csv").read_text() == before
    assert "val_acc" in Path("run/metrics-2.csv").read_text()
    assert "test_acc" in Path("run/metrics.csv").read_text()


def test_seed_decides_the_result() -> None:
    first, again, other = (run_tiny(f"seed={seed}").metrics for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_without_a_seed_each_run_differs() -> None:
    first, other = (run_tiny("seed=null").metrics for _ in range(2))
    assert first != other


def test_users_model_is_one_line() -> None:
    write_project()
    done = run_tiny("model=lenet", "model._target_=my_project.LitModel")
    assert done.code == 0, done.err
    assert done.metrics["val_acc"] == "1"
    shipped: Any = OmegaConf.load(ROOT / "conf/model/lenet.yaml")
    foreign = ", ".join(key for key in shipped if key not in ("_target_", "lr"))
    assert f"model: `my_project.LitModel` does not take {foreign}; left out." in done.out


def test_users_model_gets_what_is_set_by_hand() -> None:
    write_project()
    target = ("model=lenet", "model._target_=my_project.LitModel", "model.lr=0.25")
    done = run_tiny(*target, "+model.sizes=[3,4]")
    assert done.code == 0, done.err
    # Plain Python values, or Lightning could not load its own checkpoint.
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"lr": 0.25, "sizes": [3, 4]}


def test_users_datamodule_is_one_line() -> None:
    write_project()
    done = run_tiny("data._target_=my_project.LitData")
    assert done.code == 0, done.err
    assert "data: `my_project.LitData` does not take batch_size, num_workers" in done.out


def test_users_config_files_come_by_config_dir() -> None:
    write_project()
    model = Path("mine/model/lit.yaml")
    model.parent.mkdir(parents=True)
    model.write_text("_target_: my_project.LitModel\nlr: 0.125\n")
    data = Path("mine/data/lit.yaml")
    data.parent.mkdir()
    data.write_text("_target_: my_project.LitData\nsize: 8\n")
    done = run_tiny("--config-dir=mine", "model=lit", "data=lit")
    assert done.code == 0, done.err
    cfg: Any = OmegaConf.load("run/config.yaml")
    assert (cfg.model.lr, cfg.data.size, len(cfg.model)) == (0.125, 8, 2)


def test_model_with_its_own_loaders_needs_no_data() -> None:
    write_project(
        "class Whole(LitModel):\n"
        "    train_dataloader = val_dataloader = test_dataloader = LitData._dataloader\n"
        "    size = 8\n"
    )
    done = run_tiny("~data", "model=lenet", "model._target_=my_project.Whole")
    assert done.code == 0, done.err
    assert "test_epochs" in done.metrics


def test_strategy_is_added_with_a_plus() -> None:
    done = run_tiny("+strategy=ddp", "trainer.devices=2", "model.hidden=[4]")
    assert done.code == 0, done.err
    assert "test_acc" in done.metrics
    assert done.out.count("Outputs: run") == 1


def test_strategy_for_several_devices_gets_two_on_cpu() -> None:
    write_project(
        "class Ranks(LitModel):\n"
        "    def on_fit_start(self):\n"
        "        self.print('world size', self.trainer.world_size)\n"
    )
    target = ("model=lenet", "model._target_=my_project.Ranks")
    done = run_tiny("+strategy=ddp", "trainer.devices=auto", *target)
    assert done.code == 0, done.err
    assert done.out.count("world size 2") == 1
    done = run_tiny("+strategy=auto", "trainer.devices=auto", *target)
    assert done.out.count("world size 1") == 1


def test_callbacks_and_loggers_are_chosen_by_group() -> None:
    done = run_tiny("callbacks=none", "logger=none", "++trainer.enable_checkpointing=false")
    assert done.code == 0, done.err
    assert _files("run") == {"config.yaml", "lightning_mgpu.log"} | {
        f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")
    }


def test_callback_is_taken_out_by_null() -> None:
    write_project()
    target = ("model=lenet", "model._target_=my_project.LitModel")
    stops = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1")
    short = run_tiny(*target, *stops, "trainer.max_epochs=4")
    assert short.metrics["val_acc"] == "0.5"
    long = run_tiny(*target, *stops, "callbacks.early_stopping=null", "trainer.max_epochs=4")
    assert long.metrics["val_acc"] == "0.25"


def test_paths_are_absolute_where_hydra_changes_the_directory() -> None:
    done = run_tiny("hydra.job.chdir=true", "mode=validate")
    assert done.out.endswith(
        f"Outputs: {Path('run').absolute()}\n  config: {Path('run/config.yaml').absolute()}\n"
    )


def test_experiment_runs() -> None:
    done = run_tiny("experiment=quick")
    assert done.code == 0, done.err
    assert "test_acc" in done.metrics


def test_multirun_runs_each_job_once_in_its_own_directory() -> None:
    write_project()
    done = run_tiny("-m", "model=lenet", "model._target_=my_project.LitModel", "model.lr=0.1,0.2,1")
    assert done.code == 0, done.err
    assert sorted(os.listdir("sweep")) == ["0", "1", "2", "multirun.yaml"]
    for job, lr in enumerate((0.1, 0.2, 1)):
        cfg: Any = OmegaConf.load(f"sweep/{job}/config.yaml")
        assert cfg.model.lr == lr
        assert Path(f"sweep/{job}/seeds.txt").read_text() == "42\n"
        assert f"Outputs: sweep/{job}\n" in done.out


def test_multirun_with_ddp_runs_each_job_once() -> None:
    write_project()
    target = ("model=lenet", "model._target_=my_project.LitModel")
    done = run_tiny("-m", "+strategy=ddp", "trainer.devices=1,2", *target)
    assert done.code == 0, done.err
    for job in range(2):
        assert Path(f"sweep/{job}/seeds.txt").read_text() == "42\n"
        checkpoints = _files(f"sweep/{job}/checkpoints")
        assert checkpoints == {"last.ckpt", "epoch0-step2.ckpt"}


def test_multirun_keeps_each_seed_in_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    write_project()
    done = run_tiny("-m", "model=lenet", "model._target_=my_project.LitModel", "seed=7,null,8")
    assert done.code == 0, done.err
    seeds = [Path(f"sweep/{job}/seeds.txt").read_text() for job in range(3)]
    assert seeds == ["7\n", "none\n", "8\n"]
    assert "PL_GLOBAL_SEED" not in os.environ


class Record(Callback):
    """Records what each job hands to the sweeper."""

    values: ClassVar[list[Any]] = []

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        self.values.append(job_return.return_value)


def test_metric_feeds_the_sweeper() -> None:
    write_project()
    Record.values.clear()
    target = ("model=lenet", "model._target_=my_project.LitModel", "trainer.max_epochs=2")
    record = f"+hydra.callbacks.record._target_={__name__}.Record"
    done = run_tiny("-m", *target, record, "metric=val_acc,train_loss,null")
    assert done.code == 0, done.err
    best_accuracy, last_loss, nothing = Record.values
    assert best_accuracy == 1.0  # that of the first epoch, though the last is worse
    assert 0 < last_loss < 10
    assert nothing is None


def test_full_error_switch_is_left_as_it_was() -> None:
    write_project(
        "class Look(LitModel):\n"
        "    def on_fit_start(self):\n"
        "        self.print('seen:', os.environ.get('HYDRA_FULL_ERROR'))\n"
    )
    target = ("model=lenet", "model._target_=my_project.Look")
    assert "seen: None\n" in run_tiny(*target).out
    assert "seen: 1\n" in run_tiny(*target, HYDRA_FULL_ERROR="1").out


_TORCH_FREE = {
    "help": ("--help",),
    "hydra-help": ("--hydra-help",),
    "config": ("--cfg", "job"),
    "completion": ("-sc", "query=bash"),
    "unknown-choice": ("+strategy=nope",),
    "unknown-key": ("trainer.max_epoch=1",),
}


@pytest.mark.parametrize("arguments", _TORCH_FREE.values(), ids=_TORCH_FREE)
def test_answers_do_without_torch(arguments: tuple[str, ...]) -> None:
    done = run_process(
        *arguments,
        program=("-X", "importtime", "-m", "lightning_mgpu"),
        COMP_LINE="lightning_mgpu model=",
    )
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "lightning.pytorch", "ray", "numpy"}


@pytest.mark.skipif(not CONSOLE_SCRIPT.exists(), reason="the package is not installed")
@pytest.mark.parametrize("arguments", [("--help",), ("-sc", "query=bash")], ids=" ".join)
def test_console_script_answers_without_torch(arguments: tuple[str, ...]) -> None:
    done = run_process(
        *arguments,
        program=("-X", "importtime", str(CONSOLE_SCRIPT)),
        COMP_LINE="lightning_mgpu model=",
    )
    assert done.code == 0, done.err
    assert "lightning_mgpu.__main__" in done.err
    assert "| torch\n" not in done.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("model=", "model=lenet model=mlp model=resnet model=transformer"),
        ("+strategy=d", "+strategy=ddp +strategy=deepspeed +strategy=dp"),
        ("model=mlp model.l", "model.lr="),
        ("seed", "seed="),
    ],
)
def test_completion_knows_groups_and_keys(line: str, expected: str) -> None:
    done = run("-sc", "query=bash", COMP_LINE=f"lightning_mgpu {line}")
    assert done.code == 0, done.err
    assert done.out.strip() == expected


def test_help_names_every_group_and_choice() -> None:
    done = run("--help")
    for group, choice in _CHOICES:
        line = next(line for line in done.out.splitlines() if line.startswith(f"{group}:"))
        assert choice in line.partition(":")[2].replace(",", "").split()
    assert "python -m lightning_mgpu +strategy=ddp" in done.out


def test_help_into_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "lightning_mgpu", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")  # as a shell reports SIGPIPE


@pytest.mark.slow
def test_runs_as_a_process_of_its_own() -> None:
    """All else runs in the test's process; here the parts of a real start come together."""
    write_project()
    done = run_process(
        "model._target_=my_project.LitModel",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "+strategy=ddp",
        "trainer.devices=2",
        "hydra.run.dir=run",
    )
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert "test_epochs" in done.metrics
    assert Path("run/seeds.txt").read_text() == "42\n"
