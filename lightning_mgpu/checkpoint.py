"""Look at a checkpoint before a run depends on it."""

import pickle
import zipfile
from pathlib import Path

import torch

from lightning_mgpu.errors import ConfigError

# Words that the Trainer turns into a path itself.
_KEYWORDS = ("best", "last", "hpc", "registry")


def check_checkpoint(ckpt_path: str) -> None:
    """Check that a checkpoint is there, whole, and one of Lightning's.

    Tensors are not read, so this takes no time however large the file is. Remote paths and
    Lightning's keywords (``last``) are left to Lightning.

    Raises:
        ConfigError: The file is missing, damaged or something else.
    """
    if "://" in ckpt_path or ckpt_path.partition(":")[0] in _KEYWORDS:
        return
    path = Path(ckpt_path)
    if not path.exists():
        raise ConfigError(f"ckpt_path={ckpt_path}: no such file (looked in {Path.cwd()}).")
    if path.is_dir():
        return  # sharded checkpoints are directories
    if not zipfile.is_zipfile(path):
        raise _damaged(ckpt_path, "it is no zip archive, as `torch.save` writes them")
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "weights_only" in str(error).split("\n", 1)[0]:
            return  # whole, but holds more than tensors: Lightning decides whether to trust it
        raise _damaged(ckpt_path, _line(error)) from error
    except OSError as error:
        raise ConfigError(f"ckpt_path={ckpt_path}: cannot be read: {error}.") from error
    except Exception as error:
        raise _damaged(ckpt_path, _line(error)) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ConfigError(
            f"ckpt_path={ckpt_path}: not a Lightning checkpoint (it has no `state_dict`). Save one"
            " with `trainer.save_checkpoint` or `ModelCheckpoint`."
        )


def _damaged(ckpt_path: str, reason: str) -> ConfigError:
    return ConfigError(
        f"ckpt_path={ckpt_path}: damaged, or not a checkpoint ({reason}). Use an earlier one."
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
