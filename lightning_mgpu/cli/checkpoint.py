"""Check a checkpoint before a run depends on it, and find one."""

import copy
import logging
import os
import pickle
import zipfile
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from lightning_mgpu._compat.torch_messages import NOT_ALLOWED_IN_WEIGHTS
from lightning_mgpu.cli.cluster import is_laptop
from lightning_mgpu.errors import ConfigError, one_line

log = logging.getLogger(__name__)

LAST_GOOD = "last_good"
"""What `ckpt_path` is for the newest checkpoint of the run's directory that loads."""

# Words that the Trainer turns into a path itself.
_KEYWORDS = ("last", "hpc", "registry")
# What lies in the directory of a checkpoint that several ranks have written: FSDP's, DeepSpeed's.
_SHARDED = ("meta.pt", ".metadata", "latest", "checkpoint")
_TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own switch


def check_checkpoint(ckpt_path: str, *, resume: bool = False) -> None:
    """Check that a checkpoint exists, is complete and was saved by Lightning.

    Tensors are not read, so this takes no time however large the file is. Remote paths and
    Lightning's keywords (``last``) are left to Lightning.

    Args:
        ckpt_path: Where it is said to be.
        resume: Whether training is to resume from it, which takes more than the weights.

    Raises:
        ConfigError: The file is missing, damaged or something else.
    """
    if "://" in ckpt_path or ckpt_path.partition(":")[0] in _KEYWORDS:
        return
    if ckpt_path == "best":  # another of Lightning's words
        raise ConfigError(
            "ckpt_path=best: only known within the run that trains. Give the checkpoint's path."
        )
    path = Path(ckpt_path)
    if not path.exists():
        raise ConfigError(f"ckpt_path={ckpt_path}: no such file (looked in {Path.cwd()}).")
    if path.is_dir():
        if any((path / name).exists() for name in _SHARDED):
            return
        raise ConfigError(f"ckpt_path={ckpt_path}: a directory, but not that of a checkpoint.")
    if not zipfile.is_zipfile(path):
        raise _damaged(ckpt_path, "it is no zip archive, as `torch.save` writes them")
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = NOT_ALLOWED_IN_WEIGHTS.search(str(error))
        if found is None:
            raise _damaged(ckpt_path, one_line(error, 200)) from error
        if os.environ.get(_TRUST, "").lower() in ("1", "y", "yes", "true"):
            return
        raise ConfigError(
            f"ckpt_path={ckpt_path}: holds more than tensors and plain values ({found[1]}), and to"
            f" load that may run code. If you trust the file, set {_TRUST}=1."
        ) from error
    except OSError as error:
        raise ConfigError(f"ckpt_path={ckpt_path}: cannot be read: {error}.") from error
    except Exception as error:
        raise _damaged(ckpt_path, one_line(error, 200)) from error
    for key in ("state_dict", "pytorch-lightning_version"):
        if not isinstance(content, dict) or key not in content:
            raise ConfigError(
                f"ckpt_path={ckpt_path}: not a Lightning checkpoint (it has no `{key}`). Save one"
                " with `trainer.save_checkpoint` or `ModelCheckpoint`."
            )
    if resume and "optimizer_states" not in content:
        raise ConfigError(
            f"ckpt_path={ckpt_path}: holds weights only, from which training cannot resume."
            " Use one that was saved without `save_weights_only`."
        )


def last_good(directory: Path, *, resume: bool = False) -> Path | None:
    """Find the newest checkpoint that `check_checkpoint` lets pass.

    Args:
        directory: Where to look, in folders within, too.
        resume: As there.

    Returns:
        Its path; `None` if there is none. A warning names each newer one that is damaged.
    """
    found = [(path.stat().st_mtime_ns, path) for path in directory.rglob("*.ckpt")]
    for _, path in sorted(found, reverse=True):
        try:
            check_checkpoint(str(path), resume=resume)
        except ConfigError as error:
            log.warning("ckpt_path=%s goes on without a newer one. %s", LAST_GOOD, error)
        else:
            return path
    return None


def with_last_good(cfg: DictConfig, output_dir: Path, *, resume: bool) -> DictConfig:
    """The config with the newest checkpoint of the run's directory, or without, to train anew.

    Args:
        cfg: The run's, with `LAST_GOOD` for its `ckpt_path`.
        output_dir: Of the run.
        resume: Whether training is to resume from it.

    Raises:
        ConfigError: There is none, and `mode` needs one.
    """
    if is_laptop(cfg):
        raise ConfigError(f"ckpt_path={LAST_GOOD}: looks on this machine only. Give a path.")
    found = last_good(output_dir, resume=resume)
    if found is None and not resume:
        raise ConfigError(f"ckpt_path={LAST_GOOD}: there is no checkpoint in {output_dir}.")
    if found is None:
        log.warning(
            "ckpt_path=%s: no checkpoint in %s yet, training starts at the beginning.",
            *(LAST_GOOD, output_dir),
        )
    else:
        log.info("ckpt_path=%s: %s.", LAST_GOOD, found)
    cfg = copy.deepcopy(cfg)
    OmegaConf.update(cfg, "ckpt_path", None if found is None else str(found))
    return cfg


def _damaged(ckpt_path: str, reason: str) -> ConfigError:
    return ConfigError(
        f"ckpt_path={ckpt_path}: damaged, or not a checkpoint ({reason}). Use an earlier one."
    )
