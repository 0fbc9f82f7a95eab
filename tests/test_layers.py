"""Imports point one way; held against the source."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from lightning_mgpu._compat.namespace import PACKAGES

_ENTRY = "hydra_plugins.ray_tune_sweeper._lightning"
_OPTIONS = "hydra_plugins.ray_tune_sweeper.config"
_PLUGIN = "hydra_plugins.ray_tune_sweeper.ray_tune_sweeper"
_NAMES = "hydra_plugins.ray_tune_sweeper.strategies"
PACKAGE = Path(__file__).parent.parent / "lightning_mgpu"

_TOOLS = {"_compat", "errors", "format", "variables"}
# What each part of the package may import of the others, from the bottom to the top.
_MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "format": set(),
    "variables": set(),
    "_registration": {"_compat"},
    "_compat": {"errors"},
    "engine": {"_compat"},
    "launch": {"_compat", "variables"},
    "timeline": {"format"},
    "strategies": {"_compat", "format", "engine", "launch", "timeline"},
    "callbacks": {"_compat", "errors", "engine", "strategies"},
    "config": {"_compat", "errors", "strategies"},
    "plan": {*_TOOLS, "engine", "strategies", "config"},
    "ray": {*_TOOLS, "engine", "launch", "strategies", "config"},
    "sweep": {
        "_compat",
        "errors",
        "variables",
        "format",
        "launch",
        "strategies",
        "config",
        "ray",
        _ENTRY,
        _OPTIONS,
    },
    "doctor": {*_TOOLS, "_version", "engine", "ray"},
    "cli": {
        "_compat",
        "errors",
        "variables",
        "strategies",
        "callbacks",
        "config",
        "doctor",
        "plan",
        "ray",
        "sweep",
        _OPTIONS,
        _PLUGIN,
    },
    "demo": {"_compat"},
    "__init__": {"_registration", "_version", "engine", "strategies"},
    "__main__": {"cli"},
    _ENTRY: set(),
    _OPTIONS: set(),
    _NAMES: {"_registration"},
    _PLUGIN: {"sweep", _OPTIONS},
}
_NEVER_LIGHTNING = ("engine", "launch", "timeline")
_NOT_BELOW = ("lightning", "torchmetrics", "hydra", "omegaconf", "ray")
_ASKS = r"device\.type$|^\w+\.type (==|!=|in|not in) |\.is_cuda$|^torch\.(cuda|xpu|mps)\b"
_FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "hydra_plugins").rglob("*.py")])


def _name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


_MODULES = {_name(file): file for file in _FILES}


def _imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it: at run time or for types only."""
    found = set()
    for module in _imported(file):
        for name in (module, f"{module}.__init__"):
            if name in _MODULES and _MODULES[name] != file:
                found.add(name)
    return found


def _part(module: str) -> str:
    """What `_MAY_IMPORT` calls the part that a module of ours is in."""
    return module if module.startswith("hydra_plugins") else module.split(".")[1]


@pytest.mark.parametrize("file", _FILES, ids=_name)
def test_imports_point_down(file: Path) -> None:
    part = _part(_name(file))
    if _name(file) == "hydra_plugins.ray_tune_sweeper.__init__":
        part = _ENTRY
    allowed = _MAY_IMPORT[part] | {part}
    for module in _imports(file):
        if module != "lightning_mgpu.__init__":
            assert _part(module) in allowed, f"{file.name} imports {module}"
    for module in _imported(file):
        top = module.split(".")[0]
        if part in _NEVER_LIGHTNING:
            assert top not in _NOT_BELOW, f"{file.name} imports {module}"
            assert not re.search(rf"_compat\.({'|'.join(_NOT_BELOW)})", module), (
                f"{file.name} imports {module}"
            )
        if _name(file) != "lightning_mgpu._compat.lightning":
            assert top not in PACKAGES, f"{file.name}: import {module} from _compat.lightning"
        assert top != "torch" or part != "timeline", f"{file.name} imports {module}"
        assert top != "ray" or part in ("ray", "sweep", "_compat"), f"{file.name} imports {module}"


def test_nobody_imports_in_a_circle() -> None:
    """Neither files nor folders, at any level; imports for types and within functions count."""
    for folder in sorted({parent for name in _MODULES for parent in _parents(name)}):
        inside = {name for name in _MODULES if name.startswith(folder)}
        graph: dict[str, set[str]] = {}
        for name in inside:
            child = _child(name, folder)
            below = {_child(other, folder) for other in _imports(_MODULES[name]) & inside}
            graph.setdefault(child, set()).update(below - {child})
        try:
            tuple(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise AssertionError(f"in {folder or 'the repository'}: {error.args[1]}") from error


def _parents(name: str) -> Iterator[str]:
    """The folders that a module is in, each with a dot at its end; "" is the repository."""
    parts = name.split(".")
    for end in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:end])


def _child(name: str, folder: str) -> str:
    """The file or folder, directly in `folder`, that a module is or is in."""
    # At the top, parts: the plugin's entry point and options are below the sweeper, which it uses.
    return name.removeprefix(folder).split(".")[0] if folder else _part(name)


def test_no_name_of_a_file_occurs_more_than_twice() -> None:
    stems = Counter(file.stem for file in _FILES)
    del stems["__init__"]
    assert [stem for stem, count in stems.items() if count > 2] == []


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
    parts = {"data_parallel": "pipeline", "pipeline": "data_parallel"}
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
        "import lightning_mgpu; import pytorch_lightning",
        "import pytorch_lightning.utilities, lightning_mgpu, pytorch_lightning",
    ],
)
def test_strategies_are_registered_whenever_lightning_is_there(imports: str) -> None:
    code = (
        f"{imports}\nfrom lightning.pytorch.strategies import StrategyRegistry as registry\n"
        "import sys; names = ('dp', 'mgpu_ddp', 'pipeline', 'pipeline_ddp')\n"
        "ours = [f.namespace.name for f in sys.meta_path if 'mgpu' in type(f).__module__]\n"
        "print(all(name in registry for name in names), *ours)"
    )
    if imports.endswith("pytorch_lightning"):
        code = code.replace("lightning.pytorch.strategies", "pytorch_lightning.strategies")
        assert _python(code) == "True lightning"
    else:
        assert _python(code) == "True pytorch_lightning"  # which is still listened for


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
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in _MODULES or f"{name}.__init__" in _MODULES else node.module


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()
