"""Private names of other packages are used in `_compat` only; held against the source."""

import ast

import pytest
import scan

_VERSION_DEPENDENT = {
    "torch": {"default_generators", "dynamo_ctx", "OptimizedModule", "group_count"},
    "ray": {
        *("get_session", "RESULT_DUPLICATE", "FunctionTrainable", "temporary_state"),
        *("experiment_driver_staging_path", "resource_dict_to_pg_factory", "tmpdir_prefix"),
        *("node:__internal_head__", "get_cluster_resource_state"),
    },
    "hydra": {"Singleton", "BaseContainer", "get_args_parser", "escape_special_characters"},
    "python": {"PyThreadState_SetAsyncExc", "LOAD_CONST"},
}
"""By package: names without an underscore that are to be used in `_compat` only."""

_LEFT: dict[str, set[str]] = {
    "lightning": {
        *("_DatasetSamplerWrapper", "_DeviceDtypeModuleMixin", "_ExperimentWriter"),
        *("_IndexBatchSamplerWrapper", "_Launcher", "_Loop", "_PATH"),
        *("_StrategyRegistry", "_SubprocessScriptLauncher", "_TunerExitException"),
        *("_accelerator", "_attr_name", "_call_teardown_hook", "_check_log_dir_exists"),
        *("_checkpoint_connector", "_combined_loader", "_combined_loader_states_to_load"),
        *("_data_connector", "_data_source", "_datahook_selector", "_ddp_comm_state"),
        *("_ddp_kwargs", "_determine_lr_attr_name", "_experiment", "_fs"),
        *("_get_full_state_dict_context", "_get_process_group_backend"),
        *("_init_dist_connection", "_is_training_done", "_launcher", "_layer_sync"),
        *("_lightning_optimizers", "_loaded_from_state_dict", "_logger_connector"),
        *("_original_handlers", "_predictions", "_restarting"),
        *("_restore_modules_and_callbacks", "_resuming_from_checkpoint"),
        *("_signal_connector", "_start_method", "_state_dict_type", "_teardown"),
        *("_timeout", "_update_attr"),
    },
    "torch_geometric": {"_inc_dict", "_key", "_num_graphs", "_num_nodes", "_slice_dict"},
}
"""By package: private names that are used elsewhere. One that is no longer used is taken out."""

_HOOKS: dict[str, dict[str, str]] = {
    "lightning": {
        "_configure_launcher": "The launcher that starts `sys.argv` again is replaced by ours.",
        "_setup_model": "FSDP wraps the model there: the names of its tensors are noted before.",
    },
}
"""By package: private methods that we override, and why."""

_SOURCES = scan.sources()
_NAMES = scan.names_of(_SOURCES.values(), set().union(*_VERSION_DEPENDENT.values()))
_USES = [
    use for file, module in _SOURCES.items() for use in scan.foreign_uses(file, module, _NAMES)
]


def test_names_of_others_are_used_in_compat_only() -> None:
    known = set().union(*_LEFT.values(), *_HOOKS.values())
    assert [str(use) for use in _USES if use.name not in known] == []


@pytest.mark.parametrize("package", _LEFT)
def test_names_that_are_used_elsewhere_are_used(package: str) -> None:
    assert _LEFT[package] - {use.name for use in _USES} == set()


def test_private_methods_that_are_overridden_are_listed() -> None:
    listed = set().union(*_HOOKS.values())
    assert scan.overridden(_SOURCES.values(), _NAMES) == listed


_FOREIGN = {
    "a call": ("torch._C._autograd._get_sequence_nr()", "_get_sequence_nr"),
    "an attribute that is read": ("x = tensor._version", "_version"),
    "an attribute that we have, too": ("class A:\n  _base = 0\ny = x._base", "_base"),
    "an attribute that is set": ("controller._actor_force_cleanup_timeout = 3", "_actor_force"),
    "an entry of a module": ("vars(torch.cuda)['default_generators'] = ()", "default_generators"),
    "an entry of an object": ("vars(module)['_compiled_call_impl'] = f", "_compiled_call_impl"),
    "a name in a string": ("getattr(actor, '_actor_id', None)", "_actor_id"),
    "a name in a string that nobody knows": ("getattr(x, '_never_seen')", "_never_seen"),
    "an import": ("from torch.nn.modules.batchnorm import _BatchNorm", "_BatchNorm"),
    "an import from a module": ("from hydra._internal.utils import f", "_internal"),
    "an import of a module": ("import ray._raylet", "_raylet"),
    "an import without an underscore": ("from ray.tune.x import get_session", "get_session"),
    "a name without an underscore": ("trial.temporary_state.ray_actor", "temporary_state"),
    "an inherited attribute": (
        "class A(Theirs):\n  def f(self):\n    return self._theirs",
        "_theirs",
    ),
    "an inherited method": ("class A(Theirs):\n  def f(self):\n    super()._f()", "_f"),
    "a method of theirs": ("class A(Theirs):\n  def _trainable_func(self): ...", "_trainable"),
    "a word of CPython": ("warnings._filters_mutated()", "_filters_mutated"),
}


@pytest.mark.parametrize("case", _FOREIGN)
def test_scan_finds(case: str) -> None:
    source, name = _FOREIGN[case]
    assert any(found.startswith(name) for found in _found(source))


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n  def __init__(self): self._own = 0\n  def f(self, a): return a._own",
        "class A:\n  _own: int\n  def f(self): return self._own",
        "class A:\n  def _f(self): ...\nclass B(A):\n  def f(self): super()._f()",
        "class A:\n  def f(self): self._buffers = {}\n  def g(self): return self._buffers",
        "x.__dict__, x.__class__, x.public",
        "f'{name}_group_{number}'",
        "from lightning_mgpu._version import __version__",
        "def _f(): ...\nmodule._f()",
    ],
)
def test_scan_passes_our_own(source: str) -> None:
    assert _found(source) == set()


def test_scan_tells_hooks_of_others_from_our_own() -> None:
    module = ast.parse(
        "class A(Theirs):\n  @override\n  def _theirs(self): ...\n  def _ours(self): ...\n"
        "class B(A):\n  @override\n  def _ours(self): ..."
    )
    assert scan.overridden([module], scan.names_of([module], ())) == {"_theirs"}


def _found(source: str) -> set[str]:
    module = ast.parse(source)
    names = scan.names_of([module], set().union(*_VERSION_DEPENDENT.values()))
    return {use.name for use in scan.foreign_uses("file.py", module, names)}
