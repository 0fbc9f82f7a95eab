"""Attributes of other packages are assigned only where they are read."""

import types

import pytest

from lightning_mgpu._compat.release import assign, missing


def test_assign_sets_what_is_there() -> None:
    module = types.ModuleType("theirs")
    vars(module)["setting"] = 1
    assign(module, "setting", 2, "torch")
    assert module.setting == 2


def test_assign_refuses_a_name_that_is_gone() -> None:
    module = types.ModuleType("theirs")
    with pytest.raises(AttributeError, match=r"torch \d.* no longer has `setting` of `theirs`"):
        assign(module, "setting", 2, "torch")
    assert not hasattr(module, "setting")


def test_missing_names_the_package_and_its_release() -> None:
    assert "ray 2." in str(missing("`x`", "ray"))
