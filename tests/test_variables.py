import os

import pytest

from lightning_mgpu.variables import restored


def _change(names: tuple[str, ...]) -> None:
    with restored(*names):
        os.environ.update(OURS_SET="3", OURS_CHANGED="4")
        del os.environ["OURS_TAKEN"]
        raise RuntimeError("in the block")


@pytest.mark.parametrize("names", [(), ("OURS_SET", "OURS_CHANGED", "OURS_TAKEN")])
def test_variables_are_as_before(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS_CHANGED", "1")
    monkeypatch.setenv("OURS_TAKEN", "2")
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="in the block"):
        _change(names)
    assert dict(os.environ) == before


def test_other_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS_OTHER", "1")
    with restored("OURS_SET"):
        os.environ["OURS_OTHER"] = "2"
    assert os.environ["OURS_OTHER"] == "2"
