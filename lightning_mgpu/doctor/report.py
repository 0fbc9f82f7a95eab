"""Print findings, and write them to a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from lightning_mgpu._version import __version__
from lightning_mgpu.doctor.finding import Finding, Level

FILE = "doctor.json"
_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.BAD: "bold red"}
_WIDTHS = (5, 16)  # of the level and the name


def line(finding: Finding) -> Text:
    """A finding as a line, and what to do as a second one."""
    level, name = _WIDTHS
    rest = f"{finding.name.ljust(name)} {finding.found}"
    if finding.advice:
        rest += f"\n{' ' * sum(_WIDTHS)} -> {finding.advice}"
    return Text.assemble((finding.level.value.ljust(level), _COLOURS[finding.level]), rest)


def summary(findings: Sequence[Finding]) -> Text:
    """The last line: how many findings there are of each level."""
    levels = [finding.level for finding in findings]
    text = ", ".join(f"{levels.count(level)} {level.value}" for level in Level)
    return Text(text, _COLOURS[worst(findings)])


def worst(findings: Sequence[Finding]) -> Level:
    """The worst level that there is."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)


def write(findings: Sequence[Finding], directory: Path) -> Path:
    """Write findings as JSON.

    Returns:
        The file.
    """
    path = directory / FILE
    content = {
        "lightning_mgpu": __version__,
        "level": worst(findings).value,
        "findings": [asdict(finding) for finding in findings],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
