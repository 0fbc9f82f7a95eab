"""What each check finds where all is well, and where it is not."""

import os
import resource
import shutil
import socket
import warnings
from collections import namedtuple
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mgpu.doctor import devices, machine, network, ranks, setup, storage, versions
from lightning_mgpu.doctor.finding import Finding, Level
from lightning_mgpu.engine import device as engine_device

_Usage = namedtuple("_Usage", "total used free")


def _only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    assert bool(finding.advice) == (finding.level is not Level.OK)
    return finding


def _root(directory: Path, **files: str) -> Path:
    """The root of a machine of 8 GiB, with more files: `/` is `__` in their names."""
    meminfo = "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n"
    for name, text in {"proc__meminfo": meminfo, **files}.items():
        path = directory / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are installed, which a test may change."""
    found = {"lightning_mgpu": "1", "torch": "2.7.0", "lightning": "2.6.6", "ray": "2.55.0"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    needed = ["torch>=2.6,<2.14", "lightning>=2.6.6,<2.7", 'ray>=2.52; extra == "ray"']
    needed += ['optuna>=4.0; extra == "search"', 'mypy>=1.14; extra == "dev"']
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=3.10"})
    return found


def _levels(findings: Iterable[Finding]) -> dict[str, Level]:
    return {finding.name: finding.level for finding in findings}


def test_versions_within_the_bounds_are_ok(installed: dict[str, str]) -> None:
    found = _levels(versions.packages())
    assert set(found) == {"lightning_mgpu", "torch", "lightning", "ray", "optional"}
    assert set(found.values()) == {Level.OK}


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.5.1"), ("torch", None), ("ray", "2.40.0")]
)
def test_versions_outside_the_bounds_are_bad(
    installed: dict[str, str], name: str, version: str | None
) -> None:
    if version is None:
        del installed[name]
    else:
        installed[name] = version
    found = {finding.name: finding for finding in versions.packages()}
    assert found[name].level is Level.BAD
    assert f"pip install '{name}" in found[name].advice


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_release_is_bad_and_not_imported(
    installed: dict[str, str], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["lightning"] = version
    found = [finding for finding in versions.packages() if finding.name == "lightning"]
    assert "malicious" in _only(found).found
    assert "as stolen" in found[0].advice
    imported: list[str] = []
    monkeypatch.setattr(devices, "import_module", imported.append)
    assert not any("lightning" in finding.name for finding in devices.installed())
    assert imported == ["torch"]


def test_without_metadata_bounds_are_not_known(installed: dict[str, str]) -> None:
    del installed["lightning_mgpu"]
    assert _levels(versions.packages())["bounds"] is Level.WARN


def test_python_outside_the_bounds_is_bad(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _only(versions.python()).level is Level.OK
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.9.1")
    assert _only(versions.python()).level is Level.BAD


def test_variables_of_devices_are_shown_and_no_others() -> None:
    given = {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "", "MY_PASSWORD": "x"}
    assert _only(versions.variables(given)).found == "CUDA_VISIBLE_DEVICES= NCCL_DEBUG=INFO"


@pytest.mark.parametrize(
    "files",
    [
        {"sys__fs__cgroup__cpu_dot_max": "50000 100000", "proc__self__cgroup": "0::/"},
        {
            "sys__fs__cgroup__slice__cpu_dot_max": "50000 100000",
            "proc__self__cgroup": "0::/slice/x",
        },
        {
            "sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us": "50000",
            "sys__fs__cgroup__cpu__cpu_dot_cfs_period_us": "100000",
            "proc__self__cgroup": "1:cpu:/docker/0123",
        },
    ],
    ids=["v2", "v2-slice", "v1"],
)
def test_cores_of_a_container_are_told(tmp_path: Path, files: dict[str, str]) -> None:
    root = _root(tmp_path, **files)
    finding = _only(machine.cores(root))
    assert (finding.level, finding.details["usable"]) == (Level.WARN, 0.5)


def test_cores_without_a_limit_are_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    root = _root(tmp_path, sys__fs__cgroup__cpu_dot_max="max 100000")
    assert _only(machine.cores(root)).level is Level.OK


@pytest.mark.parametrize(
    ("text", "level"), [("", "ok"), ("1", "ok"), ("2", "warn"), ("many", "warn")]
)
def test_threads_of_all_ranks_against_cores(tmp_path: Path, text: str, level: str) -> None:
    finding = _only(machine.threads(os.cpu_count() or 1, {"OMP_NUM_THREADS": text}, tmp_path))
    assert finding.level == level


@pytest.mark.parametrize(
    ("file", "group"),
    [("memory_dot_max", "0::/"), ("memory__memory_dot_limit_in_bytes", "4:memory:/")],
)
def test_memory_of_a_container_is_told(tmp_path: Path, file: str, group: str) -> None:
    assert _only(machine.memory(_root(tmp_path, proc__self__cgroup=group))).level is Level.OK
    finding = _only(machine.memory(_root(tmp_path, **{f"sys__fs__cgroup__{file}": "1000000000"})))
    assert finding.level is Level.WARN
    assert "may use 1.00 GB" in finding.found


@pytest.mark.parametrize(
    ("limits", "level", "words"),
    [
        ((1024, 4096), Level.OK, ""),
        ((-1, -1), Level.OK, ""),
        ((200, 4096), Level.WARN, "`ulimit -n 4096`"),
        ((200, 200), Level.WARN, "root"),
    ],
)
def test_open_files(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], level: Level, words: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    finding = _only(machine.open_files())
    assert finding.level is level
    assert words in finding.advice


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(8 << 30, 0, 8 << 30))
    assert _only(storage.shared_memory(tmp_path, tmp_path)).level is Level.OK
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(64 << 20, 0, 64 << 20))
    finding = _only(storage.shared_memory(tmp_path, _root(tmp_path, _dot_dockerenv="")))
    assert finding.level is Level.WARN
    assert "--shm-size" in finding.advice
    assert _only(storage.shared_memory(tmp_path / "none")).level is Level.BAD


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(10**12, 0, 10**11))
    assert _only(storage.disk("output disk", str(tmp_path))).level is Level.OK
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(10**12, 0, 10**9))
    finding = _only(storage.disk("output disk", str(tmp_path)))
    assert (finding.level, "hydra.run.dir" in finding.advice) == (Level.WARN, True)
    assert _only(storage.disk("output disk", str(tmp_path / "none"))).level is Level.BAD


def test_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _only(storage.clock(str(tmp_path))).level is Level.OK
    now = storage.time.time()
    monkeypatch.setattr(storage.time, "time", lambda: now - 3600)
    finding = _only(storage.clock(str(tmp_path)))
    assert finding.level is Level.WARN
    assert "behind the file system's" in finding.found
    assert _only(storage.clock(str(tmp_path / "none"))).level is Level.WARN


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _only(network.ports({})).level is Level.OK
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = str(server.getsockname()[1])
        assert taken in _only(network.ports({"MASTER_PORT": taken})).found
    assert _only(network.ports({"MASTER_PORT": "none"})).level is Level.BAD
    monkeypatch.setattr(socket, "create_connection", _refuses)
    assert _only(network.ports({})).level is Level.BAD


def test_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    assert _only(network.host_name()).level is Level.OK
    monkeypatch.setattr(socket, "gethostbyname", _refuses)
    assert _only(network.host_name()).level is Level.WARN


def _refuses(*_: Any) -> None:
    raise OSError("refused")


def test_copies_that_arrive_and_copies_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(devices, "_COPIED", 1000)
    finding = _only(devices.compare_copies(pair))
    assert set(finding.details["bytes_per_second"]) == {"cpu -> cpu:0", "cpu:0 -> cpu"}

    def zeros(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.zeros_like(tensor) if device.index == 0 else tensor.clone()

    monkeypatch.setattr(engine_device, "copied", zeros)
    finding = _only(devices.compare_copies(pair))
    assert finding.level is Level.BAD
    assert finding.found.startswith("cpu -> cpu:0: ")


def test_copy_that_raises_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise RuntimeError("peer access")

    monkeypatch.setattr(engine_device, "copied", raises)
    found = devices.compare_copies([torch.device("cpu"), torch.device("cpu", 0)])
    assert [finding.found for finding in found] == [
        "cpu -> cpu:0: peer access",
        "cpu:0 -> cpu: peer access",
    ]


@pytest.mark.parametrize(
    ("driver", "built", "level"),
    [(False, None, "ok"), (False, "12.8", "ok"), (True, None, "warn"), (True, "12.8", "warn")],
)
def test_driver_without_a_device_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: bool, built: str | None, level: str
) -> None:
    monkeypatch.setattr(devices, "accelerators", list)
    monkeypatch.setattr(devices, "_DRIVERS", [tmp_path if driver else tmp_path / "none"])
    monkeypatch.setattr(torch.version, "cuda", built)
    found = {finding.name: finding.level for finding in devices.installed()}
    assert (found["devices"], found["lightning loads"]) == (level, "ok")


def test_driver_that_raises_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> None:
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(devices, "accelerators", raises)
    found = {finding.name: finding.level for finding in devices.installed()}
    assert (found["devices"], found["lightning loads"]) == ("bad", "ok")


def test_torch_that_does_not_load_is_bad_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libtorch.so: cannot open shared object file")

    for module in (devices, ranks):
        monkeypatch.setattr(module, "import_module", broken)
    finding = _only(devices.installed())
    assert finding.level is Level.BAD
    assert "libtorch.so" in finding.found
    assert _only(devices.copies()).level is Level.WARN
    assert _only(ranks.collectives()).level is Level.WARN


def test_collective_that_fails_or_is_wrong_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_rank", lambda *_: 1)
    assert _only([ranks.tried("gloo", 1)]).level is Level.OK
    monkeypatch.setattr(ranks, "_rank", lambda *_: 0)
    assert "gave 0, not 1" in _only([ranks.tried("gloo", 1)]).found
    monkeypatch.setattr(ranks, "_rank", _refuses)
    assert _only([ranks.tried("nccl", 1)]).found == "OSError: refused"


def test_plugin_and_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.plugins import Plugins

    assert _only(setup.configs()).level is Level.OK
    assert _only(setup.configs("lightning_mgpu")).level is Level.BAD
    assert _only(setup.plugin()).level is Level.OK
    monkeypatch.setattr(Plugins, "discover", lambda *_: [])
    assert _only(setup.plugin()).level is Level.BAD
    monkeypatch.setattr(Plugins, "discover", _refuses)
    finding = _only(setup.plugin())
    assert (finding.level, finding.found) == (Level.BAD, "OSError: refused")
    assert __file__ in finding.advice


def test_plugin_that_lacks_a_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.plugins import Plugins

    found = Plugins.instance().discover

    def lacks(plugins: Plugins, kind: type) -> list[Any]:
        warnings.warn("Error importing 'hydra_plugins.theirs'.", stacklevel=1)
        return list(found(kind))

    monkeypatch.setattr(Plugins, "discover", lacks)
    assert [finding.level for finding in setup.plugin()] == [Level.WARN, Level.OK]


def test_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _only(setup.ray("ray.address=local", "local")).level is Level.OK
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        assert "answers" in _only(setup.ray(f"RAY_ADDRESS={address}", address)).found
    finding = _only(setup.ray(f"RAY_ADDRESS={address}", address))
    assert (finding.level, address in finding.found) == (Level.BAD, True)
    monkeypatch.setattr(setup, "import_module", _refuses)
    assert "refused" in _only(setup.ray("ray.address=local", "local")).found
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    assert _only(setup.ray("ray.address=local", "local")).level is Level.OK
    assert _only(setup.ray("ray.address=auto", "auto")).level is Level.BAD
