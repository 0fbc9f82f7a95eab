"""A Hydra application whose jobs end in every way, as `kind` says; no Lightning."""

import os
import signal
import sys
import time

import hydra
from omegaconf import DictConfig


class StubbornError(Exception):
    """Cannot be made from its message alone, so it does not unpickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


@hydra.main(version_base="1.3", config_path="plain_conf", config_name="kinds")
def main(cfg: DictConfig):
    print("printed by", cfg.kind)
    if cfg.kind == "raise":
        raise StubbornError("one", "two")
    if cfg.kind == "exit":
        sys.exit(3)
    if cfg.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.kind == "interrupt":
        raise KeyboardInterrupt
    if cfg.kind == "handler":
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, lambda *_: sys.exit(0))
    if cfg.kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)  # another thread may be the one that gets it
    if cfg.kind == "flaky" and not os.path.exists("tried"):
        open("tried", "w").close()
        raise RuntimeError("only once")
    if cfg.kind == "huge":
        raise MemoryError("too much")
    if cfg.kind == "greedy" and cfg.data.batch_size > 2:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
    if cfg.kind == "greedy":
        return float(cfg.data.batch_size * cfg.trainer.accumulate_grad_batches)
    if cfg.kind == "compromise":
        return cfg.data.batch_size, cfg.data.batch_size  # one shall be small, the other large
    return {"diverge": float("nan"), "none": None}.get(cfg.kind, 0.5)


if __name__ == "__main__":
    main()
