"""Lightning has the names and members that we use, in both namespaces."""

import ast
import importlib
import inspect

import pytest
from lightning_models import quiet

import lightning_mgpu._compat.lightning as names
from lightning_mgpu._compat import (
    lightning_attributes,
    namespace,
)
from lightning_mgpu._compat.lightning import (
    DDPStrategy,
    FSDPStrategy,
)


def test_the_table_of_names_has_what_mypy_is_told() -> None:
    (block,) = (
        node
        for node in ast.parse(inspect.getsource(names)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    told = set()
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module is not None
        for alias in node.names:
            assert alias.asname == alias.name  # or it is not exported
            told.add((node.module.removeprefix("lightning."), alias.name))
    assert told == {(module, name) for module, each in names._NAMES.items() for name in each}
    assert len(told) == len(names._MODULES), "a name twice"


@pytest.mark.parametrize("each", namespace.BOTH, ids=lambda each: each.name)
@pytest.mark.parametrize("path", names._NAMES)
def test_each_name_is_there_in_both_namespaces(path: str, each: namespace.Namespace) -> None:
    module = importlib.import_module(each.module(path))
    assert [name for name in names._NAMES[path] if not hasattr(module, name)] == []


def test_other_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainee'"):
        _ = names.Trainee
    monkeypatch.setitem(names._MODULES, "Trainee", "pytorch")
    with pytest.raises(ImportError, match="has no `Trainee`"):
        _ = names.Trainee


def test_assigning_an_attribute_that_is_not_there_fails() -> None:
    loop = quiet().fit_loop
    with pytest.raises(AttributeError, match="_restartet"):
        lightning_attributes.assign(loop, "_restartet", False)
    with (
        pytest.raises(AttributeError, match="_fetchers"),
        lightning_attributes.replaced(loop, _data_fetcher=None, _fetchers=None),
    ):
        pass


# Members of Lightning's strategies that ours override or use.
_MEMBERS = {
    "Strategy": ("_accelerator", "_precision_plugin", "_launcher", "_configure_launcher"),
    "ParallelStrategy": ("_layer_sync", "parallel_devices", "cluster_environment"),
    "DDPStrategy": (
        *("_timeout", "_start_method", "_ddp_kwargs", "_ddp_comm_state", "_process_group_backend"),
        *("_pl_static_graph_delay_done", "_setup_model", "_get_process_group_backend"),
        *("set_world_ranks", "setup_distributed", "configure_ddp", "post_backward"),
    ),
    "FSDPStrategy": ("_state_dict_type", "_setup_model", "kwargs", "setup_environment"),
}


@pytest.mark.parametrize("kind", _MEMBERS)
def test_strategies_have_the_members_that_ours_build_on(kind: str) -> None:
    strategies = {
        "Strategy": quiet().strategy,
        "ParallelStrategy": DDPStrategy(),
        "DDPStrategy": DDPStrategy(),
        "FSDPStrategy": FSDPStrategy(),
    }
    assert [name for name in _MEMBERS[kind] if not hasattr(strategies[kind], name)] == []


def test_the_trainer_calls_what_strategies_override() -> None:
    called = []

    class Strategy(DDPStrategy):
        def _configure_launcher(self) -> None:
            called.append("_configure_launcher")

    quiet(strategy=Strategy())
    assert called == ["_configure_launcher"]


def test_functions_that_strategies_call_take_what_they_give() -> None:
    connect = inspect.signature(names._init_dist_connection)
    connect.bind("environment", "gloo", timeout=None, device_id=None)
    inspect.signature(names._get_full_state_dict_context).bind("module", 2)
    assert names._PATH is not None
    assert issubclass(names._TunerExitException, Exception)
    assert {"is_interactive_compatible", "launch", "kill"} <= set(dir(names._Launcher))


@pytest.mark.parametrize("each", namespace.BOTH, ids=lambda each: each.name)
@pytest.mark.parametrize("part", ["pytorch", "fabric"])
def test_launcher_of_scripts_knows_how_many_processes_it_starts(
    part: str, each: namespace.Namespace
) -> None:
    module = importlib.import_module(each.module(f"{part}.strategies.launchers"))
    launcher = module._SubprocessScriptLauncher("environment", 2, 3)
    assert (launcher.num_processes, launcher.num_nodes) == (2, 3)
    assert launcher.cluster_environment == "environment"
    inspect.signature(launcher.launch).bind(print, 1, trainer=None)


@pytest.mark.parametrize("each", namespace.BOTH, ids=lambda each: each.name)
def test_other_launchers_can_be_told_from_those_of_ddp(each: namespace.Namespace) -> None:
    """All strategies that start processes start them by a launcher that we replace."""
    strategies = importlib.import_module(each.module("pytorch.strategies"))
    assert issubclass(strategies.DeepSpeedStrategy, strategies.DDPStrategy)
    configure = strategies.DDPStrategy._configure_launcher
    assert strategies.DeepSpeedStrategy._configure_launcher is configure
    for kind in (strategies.FSDPStrategy, strategies.ModelParallelStrategy):
        assert "_SubprocessScriptLauncher" in inspect.getsource(kind._configure_launcher)
