"""What is built and installed: the wheel, from another directory."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lightning_mgpu

ROOT = Path(__file__).parent.parent


def _yaml_files() -> set[str]:
    return {
        f"lightning_mgpu/conf/{path.relative_to(ROOT / 'conf')}"
        for path in (ROOT / "conf").rglob("*.yaml")
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel, built from a copy of the tree."""
    output = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache"))
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return next(output.glob("*.tar.gz")), next(output.glob("*.whl"))


@pytest.mark.slow
def test_sdist_and_wheel_carry_the_configs(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    assert _yaml_files() <= in_wheel
    assert {"lightning_mgpu/py.typed", "lightning_mgpu/conf/__init__.py"} <= in_wheel
    assert "hydra_plugins/ray_tune_sweeper/ray_tune_sweeper.py" in in_wheel
    page = {f"lightning_mgpu/sweep/report/html/page.{kind}" for kind in ("html", "css", "js")}
    assert page <= in_wheel
    assert "lightning_mgpu/demo/data/optdigits.gz" in in_wheel
    assert "hydra_plugins/__init__.py" not in in_wheel  # it is shared with other plugins
    assert not any(name.startswith(("tests", "conf/", "benchmarks")) for name in in_wheel)
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.replace("lightning_mgpu/conf", "conf") for name in _yaml_files()} <= in_sdist
    assert {"LICENSE", "README.md", "pyproject.toml", "constraints.txt"} <= in_sdist


@pytest.mark.slow
def test_wheel_runs_the_command_from_another_directory(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    python, packages = _environment_with(distributions[1], tmp_path)
    where = tmp_path / "elsewhere"
    where.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments], cwd=where, env=clean, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert packages in run("-c", "import lightning_mgpu; print(lightning_mgpu.__file__)")
    assert run("-c", _FIND_SWEEPER).split() == ["True", "set()"]
    printed = run(
        *("-m", "lightning_mgpu", "+strategy=ddp", "trainer.max_epochs=1"),
        *("trainer.enable_progress_bar=false", "hydra.run.dir=out"),
    )
    assert "test_acc" in printed
    assert (where / "out" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_editable_install_brings_the_sweeper(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    leave_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", "*.egg-info", "conf")
    shutil.copytree(ROOT, source, ignore=leave_out)
    shutil.copytree(ROOT / "conf", source / "conf")
    code = "from setuptools.build_meta import build_editable; print(build_editable('.'))"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    python, _ = _environment_with(source / built.stdout.split()[-1], tmp_path)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", _FIND_SWEEPER], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "set()"], done.stderr


_FIND_SWEEPER = """
import sys
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
names = [plugin.__name__ for plugin in Plugins.instance().discover(Sweeper)]
print("RayTuneSweeper" in names, {"ray", "torch", "lightning"} & set(sys.modules))
"""


def _environment_with(wheel: Path, directory: Path) -> tuple[Path, str]:
    """A new environment with `wheel`, whose dependencies are borrowed from this one."""
    environment = directory / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    packages = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # A plain path: the `.pth` files there, our editable install among them, are not followed.
    (Path(packages) / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python, packages


def test_version_stands_in_one_place() -> None:
    from importlib.metadata import version

    assert lightning_mgpu.__version__ == version("lightning_mgpu")


def test_every_extra_installs_what_it_says() -> None:
    """An extra that a message recommends exists."""
    from importlib.metadata import metadata

    extras = set(metadata("lightning_mgpu").get_all("Provides-Extra") or ())
    assert extras >= {"ray", "search", "report", "zoo", "all", "dev"}
