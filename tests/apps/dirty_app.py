"""A Hydra application of which one job leaves its process in a mess; each writes what it finds."""

import gc
import io
import json
import logging
import os
import random
import sys
import threading
import warnings
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


class Ballast:
    """Held by nothing but a cycle."""

    def __init__(self) -> None:
        self.itself = self


def find() -> dict:
    """The state of the process, in plain values."""
    return {
        "environment": os.environ.get("DIRT"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "argv": sys.argv[1:],
        "cwd": os.getcwd(),
        "path": "/dirt" in sys.path,
        "umask": os.umask(os.umask(0o22)),
        "log handlers": sum(isinstance(h, logging.NullHandler) for h in logging.root.handlers),
        "log level": logging.getLogger("dirt").level,
        "warning filters": any("dirt" in str(f[1]) for f in warnings.filters),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark],
        "matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "process group": torch.distributed.is_initialized(),
        "resolver": OmegaConf.has_resolver("dirt"),
        "memory": sum(isinstance(o, Ballast) for o in gc.get_objects()),
        "stdout": type(sys.stdout).__name__,
        # Each by itself: one that was left seeded goes on with what follows.
        "random": random.random() == SEEDED[0],
        "torch random": float(torch.rand(1)) == SEEDED[1],
        "numpy random": np.random.rand() == SEEDED[2],
    }


def seed() -> tuple:
    random.seed(5)
    torch.manual_seed(5)
    np.random.seed(5)
    return random.random(), float(torch.rand(1)), np.random.rand()


SEEDED = seed()
random.seed()
torch.seed()
np.random.seed()


def soil() -> None:
    """Change everything."""
    os.environ["DIRT"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = "7"
    sys.argv[1:] = ["dirt"]
    os.chdir("/")
    sys.path.insert(0, "/dirt")
    os.umask(0o77)
    logging.root.addHandler(logging.NullHandler())
    logging.getLogger("dirt").setLevel(logging.DEBUG)
    warnings.filterwarnings("ignore", "dirt")
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(2)
    OmegaConf.register_new_resolver("dirt", lambda: 1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    gc.disable()
    Ballast()
    sys.stdout = io.StringIO()
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = True
    random.seed(5)
    torch.manual_seed(5)
    np.random.seed(5)


@hydra.main(version_base="1.3", config_path="plain_conf", config_name="dirty")
def main(cfg: DictConfig) -> float:
    output = Path(HydraConfig.get().runtime.output_dir)
    (output / "found.json").write_text(json.dumps({**find(), "pid": os.getpid()}))
    if cfg.x == 1:
        soil()
    if cfg.x == 3:
        threading.Thread(target=threading.Event().wait, name="dirt", daemon=True).start()
    return float(cfg.x)


if __name__ == "__main__":
    main()
