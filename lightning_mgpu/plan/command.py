"""Run `mode=plan`: measure on one device, predict, and write the predictions."""

from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_mgpu._compat.lightning import Trainer
from lightning_mgpu.config.build import Parts, build_node
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.errors import ConfigError, one_line
from lightning_mgpu.plan.bench import NothingMeasuredError
from lightning_mgpu.plan.options import Options
from lightning_mgpu.plan.predict import Plan, predict
from lightning_mgpu.plan.rehearsal import Rehearsal

_PIPELINES = ("lightning_mgpu.strategies.PipelineStrategy", "lightning_mgpu.PipelineStrategy")
_TRAINER = {
    "devices": 1,
    "num_nodes": 1,
    "max_epochs": -1,  # it ends when all has been measured
    "max_steps": -1,
    "accumulate_grad_batches": 1,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def options_of(cfg: DictConfig) -> Options:
    """Read the options to plan for from the config.

    Raises:
        ConfigError: It cannot be planned.
    """
    if cfg.get("ckpt_path") is not None:
        raise ConfigError(
            f"ckpt_path={cfg.ckpt_path}: mode=plan measures how long steps take, whatever the"
            " weights are. Leave it out."
        )
    if cfg.get("plan") is not None and not isinstance(cfg.plan, DictConfig):
        raise ConfigError(f"plan={cfg.plan}: set one of its values, as `+plan.chunks=[4,8]`.")
    node = OmegaConf.create({"plan": {"_target_": f"{Options.__module__}.Options"}})
    node.plan.update(cfg.get("plan") or {})
    options = build_node(node, "plan")
    if not isinstance(options, Options):
        raise ConfigError(f"plan._target_={node.plan._target_}: leave it out.")
    return options


def arranged(cfg: DictConfig) -> DictConfig:
    """Derive the rehearsal's config.

    Raises:
        ConfigError: It cannot be planned, or names another strategy than the pipeline.
    """
    options_of(cfg)  # refused before anything is built
    strategy = cfg.get("strategy") or DictConfig({"_target_": _PIPELINES[0]})
    if not isinstance(strategy, DictConfig) or strategy.get("_target_") not in _PIPELINES:
        raise ConfigError(
            f"strategy={strategy}: mode=plan is for the pipeline. Leave `strategy` out, or use"
            " `+strategy=pipeline`."
        )
    if strategy.get("stages_per_device", 1) != 1:
        raise ConfigError(
            f"strategy.stages_per_device={strategy.stages_per_device}: say which numbers mode=plan"
            " is to compare instead, as `+plan.stages_per_device=[1,2]`."
        )
    if not strategy.get("defer_weight_gradients", True):
        raise ConfigError(
            "strategy.defer_weight_gradients=False: say what mode=plan is to compare instead, as"
            " `+plan.defer_weight_gradients=[true,false]`."
        )
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.strategy = {**strategy, "_target_": f"{Rehearsal.__module__}.Rehearsal"}
        if isinstance(cfg.get("trainer"), DictConfig):
            cfg.trainer.update(_TRAINER)
        cfg.callbacks, cfg.logger = {}, {}
    return cfg


def plan(parts: Parts, options: Options) -> Plan:
    """Measure, and predict.

    Raises:
        ConfigError: The model cannot be cut or measured.
    """
    trainer: Trainer = parts.trainer
    rehearsal = trainer.strategy
    assert isinstance(rehearsal, Rehearsal)
    rehearsal.prepare(options)
    try:
        trainer.fit(parts.model, datamodule=parts.datamodule)
        return predict(rehearsal.profile(), options)
    except (PartitionError, SplitError, NothingMeasuredError) as error:
        raise ConfigError(f"mode=plan: {one_line(error)}") from error
