"""Write the results of a sweep, and the commands to repeat or resume it."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_mgpu._compat.hydra import command_line_parser
from lightning_mgpu.sweep.job.job import program
from lightning_mgpu.sweep.job.submitted import name_of
from lightning_mgpu.sweep.store.records import Records, Setting, TrialRecord

RESULTS = "optimization_results.yaml"
_RESUME = "hydra.sweeper.resume="
_OF_THE_SWEEP = ("hydra.sweeper.", "hydra.sweep.", "hydra.launcher.", "hydra.mode.")


def write_results(records: Records, directory: Path) -> Path:
    """Write all trials, the best ones first."""
    content = {"name": "ray_tune", **(_front(records) if records.others else _best(records))}
    content["trials"] = [_trial(records, record) for record in records.ordered()]
    path = directory / RESULTS
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)  # whole at any time
    return path


def _best(records: Records) -> dict[str, Any]:
    best = records.best()
    content = {"metric": records.metric, "mode": records.mode, "best_trial": None}
    if best is None:
        return content
    setting = records.setting(best)
    return content | {
        "best_trial": best.number,
        "best_value": records.value(best),
        "best_params": plain(setting.values),
        "best_command": job_command(setting.overrides),
        "best_checkpoint": setting.checkpoint,
        **({} if setting.epoch is None else {"best_epoch": setting.epoch}),
        **_checkpoint_epoch(setting, "best_checkpoint_epoch"),
    }


def _checkpoint_epoch(setting: Setting, name: str) -> dict[str, int]:
    return {} if setting.checkpoint_epoch is None else {name: setting.checkpoint_epoch}


def _front(records: Records) -> dict[str, Any]:
    """Pareto front, under the name that Hydra's Optuna sweeper has for it."""
    solutions = [
        {
            "params": plain(setting.values),
            "values": list((records.values(record) or {}).values()),
            "trial": record.number,
            "command": job_command(setting.overrides),
            "checkpoint": setting.checkpoint,
        }
        for record in records.front()
        for setting in (records.setting(record),)
    ]
    return {
        "metric": [objective.name for objective in records.objectives],
        "mode": [objective.mode for objective in records.objectives],
        "solutions": solutions,
    }


def job_command(overrides: Sequence[str]) -> str:
    """Command line that runs one job outside the sweep."""
    if not any(override.lstrip("+").startswith("strategy=ray") for override in overrides):
        # Only the sweep was on a cluster.
        overrides = [override for override in overrides if not of_the_cluster(override)]
    # A search space that starts the sweep by itself would do so again.
    return shlex.join([*program(), *_flags(), *_of_hydra(), *overrides, "hydra.mode=RUN"])


def of_the_cluster(override: str) -> bool:
    """Return whether an override of our command names the cluster of a run or sweep."""
    return override.lstrip("+").startswith(("ray.address=", "ray.runtime_env"))


def resume_command(directory: Path) -> str:
    """Command line that resumes the sweep."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(_RESUME)]
    return shlex.join([*program(), *arguments, f"{_RESUME}{name_of(directory)}"])


def relative(path: Path) -> str:
    """A path as messages show it: from the working directory if it lies there."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _trial(records: Records, record: TrialRecord) -> dict[str, Any]:
    setting = records.setting(record)
    found: dict[str, Any] = {
        "number": record.number,
        "status": record.status,
        "ended_by": "itself" if record.status == "done" else record.ended_by,
        "value": _value(records, record),
        "params": plain(setting.values),
        "reports": len(record.history),
        **({} if setting.epoch is None else {"epoch": setting.epoch}),
        "metrics": record.metrics,
        "seconds": round(record.seconds, 2),
        "directory": record.directory,
    }
    if setting.checkpoint is not None:
        found["checkpoint"] = setting.checkpoint
        found |= _checkpoint_epoch(setting, "checkpoint_epoch")
    if record.halvings:
        found["batch_halvings"] = record.halvings
        found["overrides"] = record.overrides
    if record.reason is not None:
        found["reason"] = record.reason
    return found


def _value(records: Records, record: TrialRecord) -> Any:
    """One number, or one for each objective."""
    values = records.values(record)
    if values is None or records.others:
        return None if values is None else list(values.values())
    return records.value(record)


def _of_hydra() -> list[str]:
    """Overrides of Hydra's own config that are not about the sweep, such as the search path."""
    given, _ = command_line_parser().parse_known_args(sys.argv[1:])
    found = []
    for override in given.overrides or ():
        key = override.lstrip("+~").partition("=")[0].replace("/", ".")
        if key.startswith("hydra.") and not f"{key}.".startswith(_OF_THE_SWEEP):
            found.append(override)
    return found


def _flags() -> list[str]:
    """Hydra flags that a single job needs, too."""
    given, _ = command_line_parser().parse_known_args(sys.argv[1:])
    flags = []
    for name in ("config_path", "config_name", "config_dir"):
        value = getattr(given, name, None)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def plain(value: Any) -> Any:
    """Convert to Python's own types, which YAML can write."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
