"""Imports point one way; held against the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_mgpu"

# What each part may import of the others. The rest of the package (`run` and what stands beside
# it) may import everything but `demo`.
_MAY_IMPORT = {
    "engine": {"engine"},
    "launch": {"launch"},
    "report": {"report", "errors"},
    "demo": {"demo"},
    "strategies": {"strategies", "engine", "launch", "report"},
    "plan": {"plan", "strategies", "engine", "build", "errors"},
    "ray": {"ray", "strategies", "engine", "launch", "report", "build", "errors"},
}
_NEVER_LIGHTNING = ("engine", "launch", "report")
_ASKS = r"device\.type$|^\w+\.type (==|!=|in|not in) |\.is_cuda$|^torch\.(cuda|xpu|mps)\b"
_FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", _FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0]
    for module in _imported(file):
        names = module.split(".")
        if names[0] == "lightning_mgpu" and len(names) > 1:
            allowed = _MAY_IMPORT.get(part)
            assert names[1] != "demo" or part == "demo", f"{file.name} imports {module}"
            assert allowed is None or names[1] in allowed, f"{file.name} imports {module}"
        assert names[0] != "pytorch_lightning", f"{file.name}: import lightning.pytorch instead"
        if part in _NEVER_LIGHTNING:
            assert names[0] not in ("lightning", "torchmetrics"), f"{file.name} imports {module}"
        assert names[0] != "torch" or part != "report", f"{file.name} imports {module}"
        assert names[0] != "ray" or part == "ray", f"{file.name} imports {module}"


@pytest.mark.parametrize("part", ["engine", "strategies", "plan"])
def test_only_one_file_asks_what_kind_a_device_is(part: str) -> None:
    room = PACKAGE / "engine" / "device.py"
    for file in sorted((PACKAGE / part).rglob("*.py")):
        if file == room:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Compare)) else ""
            assert not re.search(_ASKS, text), f"{file.relative_to(PACKAGE)}: {text}"


def test_engine_shares_nothing_but_its_own_files() -> None:
    parts = {"replication": "pipelining", "pipelining": "replication"}
    for file in (PACKAGE / "engine").rglob("*.py"):
        where = file.relative_to(PACKAGE / "engine").parts[0]
        # Shared files know of neither part.
        forbidden = {parts[where]} if where in parts else set(parts)
        for module in _imported(file):
            assert not forbidden & set(module.split(".")), f"{file.name} imports {module}"


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning_mgpu; import lightning",
        "import lightning; import lightning_mgpu",
        "import lightning_mgpu; import lightning.pytorch.utilities",
        "import lightning_mgpu, importlib.util as util; util.find_spec('lightning.pytorch')",
        "import lightning_mgpu.strategies",
        "import lightning_mgpu; lightning_mgpu.DDPStrategy",
        "import lightning_mgpu as m, threading as t; i = t.Thread(target=__import__,"
        " args=['lightning']); i.start(); i.join()",
        "import lightning_mgpu, importlib; importlib.reload(lightning_mgpu); import lightning",
    ],
)
def test_strategies_are_registered_whenever_lightning_is_there(imports: str) -> None:
    code = (
        f"{imports}\nfrom lightning.pytorch.strategies import StrategyRegistry as registry\n"
        "import sys; names = ('dp', 'mgpu_ddp', 'pipeline', 'pipeline_ddp')\n"
        "ours = [type(f).__name__ for f in sys.meta_path if 'mgpu' in type(f).__module__]\n"
        "print(all(name in registry for name in names), ours)"
    )
    assert _python(code) == "True []"  # and nobody listens any longer


def test_other_modules_run_with_m_register_the_strategies(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import lightning_mgpu\n")
    (tmp_path / "theirs" / "train.py").write_text(
        "from lightning.pytorch.strategies import StrategyRegistry as registry\n"
        "print('mgpu_ddp' in registry)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "theirs.train"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"


def test_import_needs_neither_ray_nor_hydra() -> None:
    code = (
        "import lightning_mgpu, sys; print({'ray', 'hydra', 'torch'} & set(sys.modules));"
        " import lightning; print({'ray', 'hydra'} & set(sys.modules))"
    )
    assert _python(code) == "set()\nset()"


def test_command_module_needs_no_torch() -> None:
    code = "import lightning_mgpu.__main__, sys; print({'torch', 'lightning'} & set(sys.modules))"
    assert _python(code) == "set()"


def test_driver_of_a_sweep_needs_no_torch() -> None:
    """Seconds, and hundreds of megabytes, of which its trials have use and it has none."""
    code = (
        "import sys, lightning_mgpu.sweep.main, lightning_mgpu.sweep.driver.ray_tune;"
        " from lightning_mgpu.launch.process_state import ProcessState;"
        " state = ProcessState.capture(1);"
        " print(state.torch, state.random, {'torch', 'lightning'} & set(sys.modules))"
    )
    assert _python(code) == "None None set()"


def test_public_names_load_on_first_use() -> None:
    code = (
        "import lightning_mgpu, sys; before = 'torch' in sys.modules;"
        " print(before, lightning_mgpu.DDPStrategy.__name__, 'DDPStrategy' in dir(lightning_mgpu))"
    )
    assert _python(code) == "False DDPStrategy True"


def test_unknown_public_name_is_refused() -> None:
    import lightning_mgpu

    with pytest.raises(AttributeError, match="has no attribute 'DPStrategy'"):
        _ = lightning_mgpu.DPStrategy


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: write the import in full"
            assert node.module is not None
            yield node.module
            if node.module == "lightning_mgpu":
                yield from (f"lightning_mgpu.{alias.name}" for alias in node.names)


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()
