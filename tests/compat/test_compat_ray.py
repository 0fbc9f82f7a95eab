"""What is used of Ray beside its documentation, as far as it shows without a cluster."""

import inspect
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import ray.train
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError
from ray.train.lightning import RayTrainReportCallback

from lightning_mgpu._compat import ray as compat


def _in_new_process(code: str, mode: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, mode], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_READ_MODE = """
import os, sys
os.environ.pop("RAY_AUTH_MODE", None)
import ray
from lightning_mgpu._compat.ray import read_token_mode
os.environ["RAY_AUTH_MODE"] = sys.argv[1]
try:
    read_token_mode()
    print("read")
except RuntimeError as error:
    print(error)
"""


def test_token_mode_is_read_after_the_import() -> None:
    assert _in_new_process(_READ_MODE, "token") == "read\n"


def test_token_mode_that_is_not_taken_over_is_an_error() -> None:
    assert "would obey anybody" in _in_new_process(_READ_MODE, "disabled")


def test_directory_is_an_argument_of_init(tmp_path: Path) -> None:
    """Unknown arguments are refused before anything starts."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match=r"Unknown keyword argument\(s\): no_such$"):
            ray.init(**compat.files_in(tmp_path), no_such=1)
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_client_is_not_connected() -> None:
    assert compat.is_client() is False


def test_actor_id_is_one_of_the_handle() -> None:
    assert isinstance(ActorHandle._actor_id, property)

    class Handle:
        _actor_id = bytes.fromhex("0aff")

    assert compat.actor_id(Handle()) == "0aff"


def test_cluster_state_is_asked_of_the_control_service() -> None:
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.core.generated.autoscaler_pb2 import ClusterResourceState

    assert list(inspect.signature(get_cluster_resource_state).parameters) == ["gcs_client"]
    assert "worker.gcs_client = " in inspect.getsource(ray._private.worker.connect)
    names = {field.name for field in ClusterResourceState.DESCRIPTOR.fields}
    assert names >= {
        "pending_resource_requests",
        "pending_gang_resource_requests",
        "node_states",
    }


def test_head_is_the_resource_that_ray_gives_it() -> None:
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    assert compat.HEAD == HEAD_NODE_RESOURCE_NAME


def test_resources_of_groups_are_named_as_ray_names_them() -> None:
    assert "_group_[0-9A-Za-z]+$" in inspect.getsource(ray.get_gpu_ids)
    assert re.fullmatch("GPU_group_[0-9A-Za-z]+", compat.of_group("GPU", "0aff"))
    assert compat.is_of_group(compat.of_group("GPU", "0aff"))
    assert not compat.is_of_group("GPU")


def test_report_directory_is_where_the_callback_puts_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its constructor asks where it is, which is in no worker here."""
    monkeypatch.setattr(ray, "get_runtime_context", MagicMock())
    monkeypatch.setattr(ray.train, "get_context", MagicMock())
    usage = "record_extra_usage_tag"
    monkeypatch.setitem(RayTrainReportCallback.__init__.__globals__, usage, MagicMock())
    callback = RayTrainReportCallback()
    assert "lightning_checkpoints" in compat.report_directory(callback)
    monkeypatch.setattr(callback, "tmpdir_prefix", "/dev/null/nowhere")
    with pytest.raises(NotADirectoryError, match="/dev/null/nowhere"):
        callback.on_train_epoch_end(MagicMock(), MagicMock())


def test_deaths_are_not_printed_and_everything_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = vars(ray)["_private"].worker
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages)
    printed: list[str] = []

    def show(data: dict[str, Any], ignore_prefix: bool) -> None:
        printed.extend(data["lines"])

    assert list(inspect.signature(worker.print_to_stdstream).parameters) == [
        "data",
        "ignore_prefix",
    ]
    monkeypatch.setattr(worker, "print_to_stdstream", show)
    with compat.deaths_unprinted():
        for line in ("A worker died or was killed while executing a task by", "No such resource"):
            worker.print_to_stdstream({"lines": [line], "pid": "raylet"}, ignore_prefix=False)
    assert printed == ["No such resource"]
    assert worker.print_to_stdstream is show


_KILLED = """1 worker(s) were killed due to the node running low on memory. Memory on the node \
(IP: 192.0.2.2, ID: c68f9bd8) was 1.25GB used / 23.54GB limit (0.052962)
OOM kill reason: Memory usage 1338683392B exceeded threshold of 252765104B
Selected to kill: (Actor(2ba8): pid=5132, actual memory used=0.47GB, worker ID=bca2)%s
5132	0.47	ray::HydraJob.train"""


def test_memory_is_read_from_the_error_of_ray() -> None:
    """`test_sweep_outlives_trials_that_fill_the_machine` has the error as Ray makes it today."""
    one, two = OutOfMemoryError(_KILLED % ""), OutOfMemoryError(_KILLED % ("\n" + _KILLED % ""))
    assert compat.memory_of(one) == "1.25GB of 23.54GB used, 0.47GB of it by this trial"
    assert compat.memory_of(two) == "1.25GB of 23.54GB used"
    assert compat.memory_of(OutOfMemoryError("other words")) is None
