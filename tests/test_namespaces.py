"""Programs that import `pytorch_lightning`, or both it and `lightning`."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import command
import pytest
from sweeps import APPS, cluster, sweep

_VARIABLE = "LIGHTNING_MGPU_NAMESPACE"
_OTHER = pytest.mark.skipif(_VARIABLE in os.environ, reason="the namespace is given")
TESTS = Path(__file__).parent

# Stands in for Lightning's, as packages do here that take no time to import.
_REGISTRY = """
class Registry(dict):
    def register(self, name, strategy, description):
        self[name] = strategy

StrategyRegistry = Registry()
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").touch()
    for name in ("lightning/pytorch", "pytorch_lightning"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "strategies.py").write_text(_REGISTRY)
    return tmp_path


def _run(code: str, *paths: Path, **environment: str) -> str:
    """Run a program; what it writes, its last error included."""
    path = os.pathsep.join(
        [str(TESTS.parent), *map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    kept = {name: value for name, value in os.environ.items() if name != _VARIABLE}
    Path("program.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "program.py"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**kept, "PYTHONPATH": path, **environment},
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return done.stdout.strip()


_NAME = "\nfrom lightning_mgpu._compat import namespace\nprint(namespace.current().name)\n"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("", "lightning"),
        ("import lightning.pytorch", "lightning"),
        ("import pytorch_lightning", "pytorch_lightning"),
        ("__import__('lightning.pytorch')", "lightning"),
        ("__import__('pytorch_lightning')", "pytorch_lightning"),
        ("__import__('lightning.pytorch'); __import__('pytorch_lightning')", "lightning"),
        ("__import__('pytorch_lightning'); __import__('lightning.pytorch')", "pytorch_lightning"),
        # What the program itself says goes before what others may have imported.
        ("__import__('lightning.pytorch'); import pytorch_lightning", "pytorch_lightning"),
        ("import lightning.pytorch; import pytorch_lightning", "lightning"),
    ],
)
def test_the_namespace_is_what_the_program_imports(
    program: str, expected: str, stubs: Path
) -> None:
    assert _run(program + _NAME, stubs) == expected


def test_a_sorted_block_of_imports_has_ours_first(stubs: Path) -> None:
    assert _run(_NAME + "from pytorch_lightning import *", stubs) == "pytorch_lightning"


def test_the_variable_goes_first(stubs: Path) -> None:
    program = "import pytorch_lightning" + _NAME
    assert _run(program, stubs, **{_VARIABLE: "lightning"}) == "lightning"
    assert _run(program, stubs, **{_VARIABLE: ""}) == "pytorch_lightning"
    said = "LIGHTNING_MGPU_NAMESPACE=fabric: expected one of lightning, pytorch_lightning."
    assert said in _run(program, stubs, **{_VARIABLE: "fabric"})


def test_one_package_under_the_name_of_the_other_is_one(stubs: Path) -> None:
    program = """
        import sys
        __import__("pytorch_lightning")
        sys.modules["lightning.pytorch"] = sys.modules["pytorch_lightning"]
    """
    assert _run(textwrap.dedent(program) + _NAME, stubs) == "pytorch_lightning"


def test_the_choice_is_made_once(stubs: Path) -> None:
    program = """
        import pytorch_lightning
        from lightning_mgpu._compat import namespace
        namespace.current()
        namespace.take_over("lightning")
    """
    told = _run(program, stubs)
    assert "is `pytorch_lightning` here (`__main__` imports it), and not with `lightning`" in told
    assert "set LIGHTNING_MGPU_NAMESPACE=lightning in the environment" in told


def test_workers_are_told_what_is_certain(stubs: Path) -> None:
    program = """
        from lightning_mgpu._compat import namespace
        known = [namespace.known_name()]
        for module in ("pytorch_lightning", "lightning.pytorch"):
            __import__(module)
            known.append(namespace.known_name())
        namespace.choose(namespace.LIGHTNING, "")
        print(*known, namespace.known_name())
    """
    assert _run(program, stubs) == "None pytorch_lightning None lightning"


def test_what_is_imported_in_advance_is_no_choice(stubs: Path) -> None:
    program = """
        from lightning_mgpu._compat import namespace
        namespace.preload()
        __import__("pytorch_lightning")
        print(namespace.current().name)
    """
    assert _run(program, stubs) == "pytorch_lightning"


_BOTH = """
    __import__("lightning.pytorch")  # by some other package, say
    import pytorch_lightning as pl
    import lightning_mgpu

    cpu = dict(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)

    def refused(module, strategy):
        try:
            module.Trainer(strategy=strategy, **cpu)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
"""


@pytest.mark.slow
def test_a_package_that_imports_the_other_does_no_harm() -> None:
    program = """
    for name in ("dp", "mgpu_ddp", "pipeline", "pipeline_ddp"):
        strategy = pl.Trainer(strategy=name, **cpu).strategy
        assert isinstance(strategy, pl.strategies.Strategy)
        assert strategy.strategy_name == name
    import lightning
    print(refused(pl, "ddp_ray"))
    print(refused(lightning.pytorch, "dp"))
    """
    on_ray, other = _run(_BOTH + program).splitlines()[-2:]
    assert "MisconfigurationException: `Trainer(strategy='ddp_ray')`: a name cannot" in on_ray
    assert "TypeError: `lightning.pytorch.Trainer(strategy='dp')`: " in other
    assert "is `pytorch_lightning` here (its Trainer was given `strategy='dp'`)" in other


@pytest.mark.slow
def test_objects_of_one_namespace_are_refused_by_the_other() -> None:
    program = """
    import lightning
    for name in ("DataParallelStrategy", "DDPStrategy"):
        print(refused(lightning.pytorch, getattr(lightning_mgpu, name)()))
    """
    told = _run("import pytorch_lightning" + textwrap.dedent(_BOTH + program))
    for name in ("DataParallelStrategy", "DDPStrategy"):
        assert f"<{name}, for the Trainer of `pytorch_lightning` (it was imported first;" in told
    assert "LIGHTNING_MGPU_NAMESPACE=lightning in the environment decides" in told


_MODEL = """
import os
import sys

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def check_imports():
    assert "lightning.pytorch" not in sys.modules
    assert "LIGHTNING_MGPU_NAMESPACE" not in os.environ


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)]
        self.net = torch.nn.Sequential(*layers).double()

    def training_step(self, batch, batch_idx):
        check_imports()
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size, world_size=1):
        super().__init__()
        self.batch_size, self.world_size = batch_size, world_size

    def train_dataloader(self):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).double()
        dataset = TensorDataset(inputs, torch.arange(16) % 2)
        sampler = None
        if self.world_size > 1:
            rank = self.trainer.global_rank
            sampler = DistributedSampler(dataset, self.world_size, rank, shuffle=False)
        return DataLoader(dataset, self.batch_size, sampler=sampler)


def fit(strategy, devices, world_size=1, **options):
    quiet = dict(enable_checkpointing=False, enable_progress_bar=False, logger=False)
    quiet |= dict(enable_model_summary=False, use_distributed_sampler=False, accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, devices=devices, max_epochs=2, **quiet, **options)
    model = Model()
    trainer.fit(model, datamodule=Data(4 // world_size, world_size))
    assert trainer.callback_metrics["loss"] > 0
    return torch.cat([p.detach().flatten() for p in model.parameters()])
"""


@pytest.fixture
def model() -> None:
    """The module of that name, which imports `pytorch_lightning` alone."""
    Path("model.py").write_text(_MODEL)


@pytest.mark.slow
@pytest.mark.usefixtures("model")
def test_every_strategy_trains_as_one_device_does() -> None:
    program = """
        import lightning_mgpu
        import torch
        from model import check_imports, fit

        if __name__ == "__main__":
            alone = fit("auto", 1)
            runs = [("dp", 2), ("pipeline", 2), ("mgpu_ddp", 2, 2), ("pipeline_ddp", 4, 2)]
            for strategy, *rest in runs:
                torch.testing.assert_close(fit(strategy, *rest), alone, msg=strategy)
            check_imports()
            print("equal")
    """
    assert _run(program).splitlines()[-1] == "equal"


@pytest.mark.slow
@pytest.mark.usefixtures("model")
def test_ray_workers_and_tune_callbacks(short_directory: Path) -> None:
    program = """
        import ray
        import torch
        from model import check_imports, fit
        from ray import tune
        from ray.tune import RunConfig
        from lightning_mgpu.ray import RayStrategy
        from lightning_mgpu.ray.tune import TuneReportCallback, get_tune_resources

        def trial(config):
            import pytorch_lightning
            from model import fit
            fit(RayStrategy(2, 0.5), "auto", 2, callbacks=[TuneReportCallback(on="train_end")])

        if __name__ == "__main__":
            ray.init("local", num_cpus=2, include_dashboard=False)
            weights = fit(RayStrategy(2, 0.5), "auto", 2)
            torch.testing.assert_close(weights, fit("auto", 1))
            check_imports()
            resources = get_tune_resources(2, 0.5)
            config = RunConfig(storage_path=f"{__file__}.results", verbose=0)
            results = tune.Tuner(tune.with_resources(trial, resources), run_config=config).fit()
            assert results[0].metrics["loss"] > 0, results[0].error
            print("equal")
    """
    ray = {"RAY_TMPDIR": str(short_directory), "RAY_AUTH_MODE": "disabled"}
    assert _run(program, Path.cwd(), **ray).splitlines()[-1] == "equal"


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with cluster() as address:
        yield address


@pytest.mark.slow
def test_an_application_is_searched(ray_address: str) -> None:
    text = (APPS / "plain_app.py").read_text().replace("lightning.pytorch", "pytorch_lightning")
    text += '\n\nassert "lightning.pytorch" not in __import__("sys").modules\n'
    Path("app.py").write_text(text.replace("plain_conf", str(APPS / "plain_conf")))
    swept = sweep(
        str(Path("app.py").absolute()),
        ray_address,
        *("model.lr=choice(0.01,0.1)", "epochs=2", "hydra.sweeper.metric=val_acc"),
        *("hydra.sweeper.mode=max", "hydra.sweeper.num_samples=2"),
    )
    assert swept.code == 0, swept.err
    assert max(trial["reports"] for trial in swept.trials) == 2  # by the callback


_LIT_MODEL = command.PROJECT.replace("lightning.pytorch", "pytorch_lightning")


@_OTHER
@pytest.mark.slow
def test_the_command_follows_the_model() -> None:
    Path("my_project.py").write_text(_LIT_MODEL)
    done = command.run_process(
        *command.TINY,
        *("model._target_=my_project.LitModel", "data._target_=my_project.LitData"),
        *("+strategy=ddp", "trainer.devices=2", "logger=csv"),
    )
    assert done.code == 0, done.err
    assert "val_acc" in done.metrics
    assert any(Path("run").rglob("*.ckpt"))


@_OTHER
@pytest.mark.slow
def test_the_command_says_whose_classes_do_not_fit() -> None:
    Path("my_project.py").write_text(_LIT_MODEL)
    done = command.run_process(*command.TINY, "data._target_=my_project.LitData")
    assert done.code == 2
    assert "data: `my_project.LitData` is not a `lightning.pytorch." in done.err
    assert "it derives from `pytorch_lightning`, whose classes are others" in done.err
    assert "LIGHTNING_MGPU_NAMESPACE=pytorch_lightning in the environment decides" in done.err
