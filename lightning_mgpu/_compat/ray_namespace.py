"""Tell the workers of a Ray job which of Lightning's packages its driver uses.

What a driver pickles refers to our classes by name, and a worker imports those before it runs
anything of the program. It finds the answer in Ray's store, under the number of the job.
"""

import sys
from functools import partial
from typing import Any


def tell(name: str) -> None:
    """On a driver that has imported Ray: tell its workers now, or as soon as Ray is initialised."""
    worker = sys.modules.get("ray._private.worker")
    if worker is None:
        return
    hooks: list[Any] = worker._post_init_hooks
    hooks[:] = [hook for hook in hooks if getattr(hook, "func", None) is not _put]
    hooks.append(partial(_put, name))
    if sys.modules["ray"].is_initialized():
        _put(name)


def told() -> str | None:
    """In a worker of Ray: what its driver has told; `None` elsewhere, and of other drivers."""
    if not _is_worker():
        return None
    from ray.experimental.internal_kv import _internal_kv_get

    value = _internal_kv_get(_key())
    return value.decode() if value else None


def _put(name: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    if not _is_worker():
        _internal_kv_put(_key(), name)


def _is_worker() -> bool:
    worker = sys.modules.get("ray._private.worker")
    if worker is None or not sys.modules["ray"].is_initialized():
        return False
    return bool(worker.global_worker.mode == worker.WORKER_MODE)


def _key() -> str:
    return f"lightning_mgpu:namespace:{sys.modules['ray'].get_runtime_context().get_job_id()}"
