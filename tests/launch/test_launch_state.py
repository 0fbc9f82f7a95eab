"""The state that a worker takes over, without the pool; see `test_launch.py` for the whole way."""

import dataclasses
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mgpu._compat import hydra
from lightning_mgpu.launch import process_state as state_module
from lightning_mgpu.launch.process_state import (
    ProcessState,
    _is_seeded,
    frozen_environment,
    threads_per_rank,
)
from lightning_mgpu.launch.rank import Rank
from lightning_mgpu.launch.rank_variables import RANK_VARIABLES, come_from_a_launch, of_rank, shown


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Undone before the test is searched for leaks."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def random_states() -> Iterator[None]:
    """Puts the generators of torch, Python and NumPy back."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


# Threads


@pytest.mark.parametrize(
    ("cores", "current", "world_size", "expected"),
    [
        (16, 16, 1, 16),
        (16, 16, 4, 4),
        (16, 16, 3, 5),
        (16, 2, 4, 2),  # the caller wants fewer
        (2, 2, 4, 1),
    ],
)
def test_threads_per_rank_share_the_cores(
    patch: pytest.MonkeyPatch, cores: int, current: int, world_size: int, expected: int
) -> None:
    patch.delenv("OMP_NUM_THREADS", raising=False)
    patch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    patch.setattr(torch, "get_num_threads", lambda: current)
    assert threads_per_rank(world_size) == expected


def test_threads_per_rank_follow_the_environment(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("OMP_NUM_THREADS", "8")
    patch.setattr(torch, "get_num_threads", lambda: 8)
    assert threads_per_rank(64) == 8


def test_threads_per_rank_without_affinity(patch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    patch.delenv("OMP_NUM_THREADS", raising=False)
    patch.delattr(os, "sched_getaffinity", raising=False)
    patch.setattr(os, "cpu_count", lambda: None)
    assert threads_per_rank(2) == 1


# Environment


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("CUDA_VISIBLE_DEVICES", True),
        ("CUBLAS_WORKSPACE_CONFIG", True),
        ("NCCL_DEBUG", True),
        ("PYTORCH_CUDA_ALLOC_CONF", True),
        ("PYTHONHASHSEED", True),
        ("LD_PRELOAD", True),
        ("OMP_NUM_THREADS", False),  # set by call instead
        ("HYDRA_FULL_ERROR", False),
        ("PATH", False),
    ],
)
def test_frozen_environment_holds_what_a_process_reads_once(
    patch: pytest.MonkeyPatch, name: str, frozen: bool
) -> None:
    patch.setenv(name, "value")
    assert frozen_environment().get(name) == ("value" if frozen else None)


def test_captured_environment_has_no_rank(patch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        patch.setenv(name, "5")
    patch.setenv("MGPU_TEST", "kept")
    environment = ProcessState.capture(threads=1).environment
    assert not RANK_VARIABLES & set(environment)
    assert environment["MGPU_TEST"] == "kept"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ArithmeticError])
def test_variables_of_a_rank_are_put_back(
    patch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    patch.setenv("WORLD_SIZE", "of the user")
    before = dict(os.environ)
    rank = Rank(1, 3)
    with pytest.raises(error) if error else nullcontext(), shown(rank):
        assert {k: v for k, v in os.environ.items() if before.get(k) != v} == of_rank(rank)
        assert come_from_a_launch()
        del os.environ["WORLD_SIZE"]
        if error:
            raise error
    assert dict(os.environ) == before
    assert not come_from_a_launch()


# Random numbers


@pytest.mark.usefixtures("random_states")
@pytest.mark.parametrize(
    ("seed", "expected"), [(0, True), (42, True), (2**32 - 1, True), (None, False)]
)
def test_seed_of_a_person_is_told_from_a_random_one(seed: int | None, expected: bool) -> None:
    if seed is None:
        torch.seed()
    else:
        torch.manual_seed(seed)
    assert _is_seeded() is expected


@pytest.mark.usefixtures("random_states")
def test_seed_stays_known_after_numbers_were_drawn() -> None:
    torch.manual_seed(3)
    torch.rand(1000)
    assert _is_seeded()
    captured = ProcessState.capture(threads=1).random
    assert captured is not None
    assert {"torch", "python", "numpy"} <= set(captured)


@pytest.mark.usefixtures("random_states")
def test_unseeded_process_keeps_its_numbers_to_itself() -> None:
    torch.seed()
    assert ProcessState.capture(threads=1).random is None


@pytest.mark.usefixtures("random_states")
def test_unseeded_ranks_share_the_numbers_of_python_and_numpy() -> None:
    torch.seed()
    captured = ProcessState.capture(threads=1, for_ranks=True).random
    assert captured is not None
    assert set(captured) == {"python", "numpy"}


# Capture and apply


def test_capture_changes_nothing() -> None:
    first = ProcessState.capture(threads=3)
    second = ProcessState.capture(threads=3)
    for field in dataclasses.fields(ProcessState):
        if field.name not in ("random", "libraries"):
            assert getattr(first, field.name) == getattr(second, field.name), field.name


def test_classes_allowed_in_checkpoints_are_taken_over() -> None:
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([torch.nn.Softplus]):
        state = ProcessState.capture(1)
    assert torch.nn.Softplus not in torch.serialization.get_safe_globals()
    for put_back in state.libraries:
        pickle.loads(put_back)()
    try:
        assert torch.nn.Softplus in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_value_that_does_not_pickle_stays_behind(patch: pytest.MonkeyPatch) -> None:
    def refuse(_obj: Any) -> bytes:
        raise TypeError("cannot pickle")

    patch.setattr(state_module, "dumps", refuse)
    captured = ProcessState.capture(threads=1, libraries=[lambda: int])
    assert captured.warning_filters is None
    assert captured.libraries == ()


def test_library_that_is_not_in_use_stays_behind() -> None:
    assert ProcessState.capture(threads=1, libraries=[lambda: None]).libraries == ()


_TAKE_OVER = """
import json, logging, os, pickle, random, sys, warnings
import numpy, torch
from omegaconf import OmegaConf
with open(sys.argv[1], "rb") as file:
    pickle.load(file).apply()
mask = os.umask(0)
config = OmegaConf.create({"double": "${mgpu_double:21}"})
print(json.dumps({
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "path": sys.path,
    "argv": sys.argv,
    "umask": mask,
    "threads": torch.get_num_threads(),
    "dtype": str(torch.get_default_dtype()),
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
    "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
    "level": logging.getLogger("mgpu.test").level,
    "filter": warnings.filters[0][0],
    "numbers": [random.random(), torch.rand(1).item(), numpy.random.rand()],
    "double": config.double,
}))
"""


@pytest.mark.usefixtures("random_states")
def test_another_process_takes_the_state_over(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """A fresh interpreter, with other values of everything."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    HydraConfig.instance()

    captured = tmp_path / "state"
    program = [sys.executable, "-c", _TAKE_OVER, str(captured)]
    patch.setenv("MGPU_TEST", "ä b")
    patch.setenv("LOCAL_RANK", "3")
    patch.setattr(sys, "argv", ["program", "--x"])
    patch.setattr(torch.backends.cudnn, "benchmark", True)
    logger = logging.getLogger("mgpu.test")
    patch.setattr(logger, "level", 37)
    OmegaConf.register_new_resolver("mgpu_double", lambda x: 2 * x, replace=True)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    umask = os.umask(0o027)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.manual_seed(5)
            random.seed(5)
            np.random.seed(5)
            state = ProcessState.capture(threads=1, libraries=[hydra.take_state])
            captured.write_bytes(pickle.dumps(state))
            numbers = [random.random(), torch.rand(1).item(), np.random.rand()]
        environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
        output = subprocess.run(
            program, cwd="/", check=True, stdout=subprocess.PIPE, timeout=120
        ).stdout
    finally:
        os.umask(umask)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        OmegaConf.clear_resolver("mgpu_double")
    taken = json.loads(output)
    assert taken.pop("environment") == environment
    assert taken == {
        "directory": os.getcwd(),
        "path": sys.path,
        "argv": ["program", "--x"],
        "umask": 0o027,
        "threads": 1,
        "dtype": "torch.float64",
        "deterministic": True,
        "warn only": True,
        "cudnn": [True, False],
        "level": 37,
        "filter": "error",
        "numbers": numbers,
        "double": 42,
    }
