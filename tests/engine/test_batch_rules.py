"""The tables of `docs/batches.md`, line by line."""

import dataclasses
import logging
import re
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_mgpu.engine.batch import join, map_leaves, split

CPU = torch.device("cpu")
TEXT = (Path(__file__).parents[2] / "docs" / "batches.md").read_text()


@dataclasses.dataclass
class Counted:
    x: torch.Tensor

    def __post_init__(self) -> None:
        self.n = len(self.x)


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


X = torch.arange(12.0).view(4, 3)
NAMES = {
    "torch": torch,
    "Path": Path,
    "UserDict": UserDict,
    "Counted": Counted,
    "Holder": Holder,
    "x": X,
    "y": torch.arange(4),
    "a": X[:2],
    "b": X[2:],
    "boxes": lambda n: torch.full((n, 4), float(n)) if n != 3 else torch.full((3, 4), 3.0),
    "pack": lambda x: pack_padded_sequence(x[:, :, None], [4, 3, 2]),
}


def _rows(heading: str) -> list[list[str]]:
    section = re.split(r"\n#+ ", TEXT.partition(f"# {heading}\n")[2])[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def _value(cell: str) -> Any:
    assert cell.startswith("`"), cell
    return eval(cell.strip("`"), dict(NAMES))


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return bool(np.array_equal(np.asarray(a), np.asarray(b)))
    if isinstance(a, (Holder, Counted)):
        return _same(vars(a), vars(b))
    if isinstance(a, (dict, UserDict)):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _pattern(cell: str) -> str:
    """What a message must say, wherever it quotes."""
    text = cell.removeprefix("refused: ").strip()
    return "`?".join(map(re.escape, text.split("`")))


@pytest.mark.parametrize("row", _rows("How a batch is split"), ids=lambda row: row[0][:40])
def test_split_follows_the_table(row: list[str]) -> None:
    _, batch, expected = row
    if expected.startswith("refused"):
        with pytest.raises(ValueError, match=_pattern(expected)):
            split(_value(batch), 2)
    else:
        shards = split(_value(batch), 2)
        assert [shard.size for shard in shards] == [2, 2]
        assert _same(shards[0].batch, _value(expected))


@pytest.mark.parametrize("row", _rows("How outputs are joined"), ids=lambda row: row[0][:40])
def test_join_follows_the_table(row: list[str], caplog: pytest.LogCaptureFixture) -> None:
    what, first, second, expected = row
    outputs = [_value(first), _value(second)]
    with caplog.at_level(logging.WARNING):
        if expected.startswith("refused"):
            with pytest.raises(ValueError, match=_pattern(expected)):
                join(outputs, [2, 2], CPU)
        else:
            assert _same(join(outputs, [2, 2], CPU), _value(expected))
    assert bool(caplog.records) == ("warning" in what)


def test_the_tables_are_read() -> None:
    assert len(_rows("How a batch is split")) > 15
    assert len(_rows("How outputs are joined")) > 15
    assert map_leaves(lambda leaf: leaf, {"a": 1}) == {"a": 1}
