"""The environments of `make corners` follow what `pyproject.toml` and `constraints.txt` say."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corners() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("corners", ROOT / ".ci" / "corners.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "corners", module)  # dataclasses look for it there
        spec.loader.exec_module(module)
        yield module


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _read(lines: list[str]) -> dict[str, Requirement]:
    found = map(Requirement, lines)
    return {canonicalize_name(r.name): r for r in found if r.marker is None or r.marker.evaluate()}


def test_lowest_corner_is_every_lower_bound(corners: ModuleType) -> None:
    lines, constraints = corners.requirements(corners.CORNERS["lowest"])
    assert constraints == []
    found, declared = _read(lines), _read(corners.declared(_project()))
    assert {"torch", "lightning", "ray", "hydra-core", "optuna", "pytest"} <= set(found)
    assert set(found) == set(declared)
    for name, requirement in declared.items():
        bounds = [part.version for part in requirement.specifier if part.operator == ">="]
        assert [str(part) for part in found[name].specifier] == [f"=={v}" for v in bounds]
        assert found[name].extras == requirement.extras


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("torch>=2.6", "torch==2.6"),
        ("ray[train,tune] >= 2.52, <2.61", "ray[train,tune] ==2.52"),
        ("rich>=13.7,<15 ; python_version>='3.10'", "rich==13.7 ; python_version>='3.10'"),
        ("types-PyYAML", "types-PyYAML"),
    ],
)
def test_lowest_release_of_a_requirement(
    corners: ModuleType, requirement: str, expected: str
) -> None:
    assert corners.lowest(requirement) == expected


def test_corner_replaces_requirements_and_their_pins(corners: ModuleType) -> None:
    corner = corners.Corner("3.11", "pinned", ("Hydra_Core>=1.4.0rc1", "sympy"))
    lines, constraints = corners.requirements(corner)
    assert str(_read(lines)["hydra-core"].specifier) == ">=1.4.0rc1"
    assert not {"hydra-core", "sympy"} & set(_read(constraints))
    assert str(_read(constraints)["torch"].specifier).startswith("==")


def test_pins_are_allowed(corners: ModuleType) -> None:
    _, constraints = corners.requirements(corners.Corner("3.11", "pinned"))
    pins = _read(constraints)
    for name, requirement in _read(corners.declared(_project())).items():
        (pin,) = pins[name].specifier
        assert requirement.specifier.contains(pin.version), requirement


def test_tested_files_exist(corners: ModuleType) -> None:
    assert [path for path in corners.TESTS if not (ROOT / path).is_file()] == []


def test_missing_python_is_said_and_no_failure(
    corners: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(corners.CORNERS, "future", corners.Corner("9.9", "newest"))
    monkeypatch.setattr(sys, "argv", ["corners", "future"])
    with pytest.raises(SystemExit, match=r"^0$"):
        corners.main()
    assert "future         not on this machine: Python 9.9" in capsys.readouterr().out
