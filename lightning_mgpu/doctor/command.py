"""Run `mode=doctor`: all checks, their lines, and their file."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_mgpu.doctor import devices, machine, network, ranks, setup, storage, versions
from lightning_mgpu.doctor.finding import Check, Level
from lightning_mgpu.doctor.report import line, summary, worst, write
from lightning_mgpu.doctor.runner import examine
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.ray.address import address_of, source_of

_IMPORTING = 16.0  # seconds for checks that import torch; all run side by side


def checks_for(cfg: DictConfig) -> list[Check]:
    """All checks, those that need no torch first."""
    output = str(cfg.output_dir)
    options = OmegaConf.to_container(cfg.ray) if isinstance(cfg.get("ray"), DictConfig) else {}
    assert isinstance(options, dict)
    cluster = {str(name): value for name, value in options.items()}
    return [
        Check("python", versions.python),
        Check("packages", versions.packages),
        Check("variables", versions.variables),
        Check("cores", machine.cores),
        Check("threads", machine.threads, (_ranks(cfg),)),
        Check("memory", machine.memory),
        Check("shared memory", storage.shared_memory),
        Check("open files", machine.open_files),
        Check("output disk", storage.disk, ("output disk", output)),
        Check("temporary disk", storage.disk, ("temporary disk", tempfile.gettempdir())),
        Check("clock", storage.clock, (output,)),
        Check("ports", network.ports),
        Check("host name", network.host_name),
        Check("configs", setup.configs),
        Check("hydra plugin", setup.plugin, seconds=_IMPORTING, apart=True),
        Check("torch", devices.installed, seconds=_IMPORTING, apart=True),
        Check("copies", devices.copies, seconds=_IMPORTING, apart=True),
        Check("ranks", ranks.collectives, seconds=_IMPORTING, apart=True),
        Check(
            "ray",
            setup.ray,
            (source_of(cluster, "ray.address"), address_of(cluster)),
            seconds=_IMPORTING,
            apart=True,
        ),
    ]


def doctor(cfg: DictConfig) -> bool:
    """Examine, print and write.

    Args:
        cfg: The command's config.

    Returns:
        Whether nothing is bad.

    Raises:
        ConfigError: No directory is given.
    """
    if not isinstance(cfg.get("output_dir"), str):
        raise ConfigError(f"output_dir={cfg.get('output_dir')}: set it to a directory.")
    directory = Path(cfg.output_dir)
    with suppress(OSError):  # which a check says
        directory.mkdir(parents=True, exist_ok=True)
    console = Console()
    findings = []
    for finding in examine(checks_for(cfg)):
        findings.append(finding)
        console.print(line(finding), soft_wrap=True)
    console.print(summary(findings))
    try:
        path = write(findings, directory)
    except OSError as error:
        console.print(f"No report: {error}", soft_wrap=True, highlight=False, markup=False)
    else:
        inside = path.absolute().is_relative_to(Path.cwd())
        shown = os.path.relpath(path) if inside else str(path)
        console.print(f"Report: {shown}", soft_wrap=True, highlight=False, markup=False)
    return worst(findings) is not Level.BAD


def _ranks(cfg: DictConfig) -> int:
    """Ranks on this machine, as far as the config says so."""
    trainer = cfg.get("trainer")
    devices_asked = trainer.get("devices") if isinstance(trainer, DictConfig) else None
    return devices_asked if isinstance(devices_asked, int) and devices_asked > 0 else 1
