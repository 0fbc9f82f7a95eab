"""What a whole batch gave beside what its parts gave."""

import dataclasses
from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mgpu.engine.compare import Difference, compare

Pair = namedtuple("Pair", "x y")
NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass
class Output:
    logits: Any
    name: str = "a"


class Opaque:
    pass


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (random(16, 3), random(16, 3) * (1 + 1e-11)),
        (random(16, 3, dtype=torch.float32), random(16, 3, dtype=torch.float32) * (1 + 1e-6)),
        (random(9, dtype=torch.bfloat16), random(9, dtype=torch.bfloat16) * (1 + 1e-3)),
        (random(9, dtype=torch.half), random(9, dtype=torch.half) * (1 + 1e-3)),
        (random(4).to(torch.complex64), random(4).to(torch.complex64) * (1 + 1e-6)),
        (torch.tensor([1.0, NAN, INF, -INF]), torch.tensor([1.0, NAN, INF, -INF])),
        (torch.tensor(1e-17), torch.tensor(3e-17)),  # left of what cancels
        (torch.tensor([1e6, 1e-3]), torch.tensor([1e6, 2e-3])),
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        (torch.tensor(3), torch.tensor(3.0)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (0.25, 0.25 + 1e-9),
        (NAN, NAN),
        (torch.tensor(0.5), 0.5),
        (np.arange(3.0), np.arange(3.0)),
        (np.float32(0.1), np.float32(0.1)),
        (np.array(["a", "b"]), np.array(["a", "b"])),
        (["a", b"b", None, True, 3], ["a", b"b", None, True, 3]),
        ((1, 2), [1, 2]),
        ({"b", "a"}, {"a", "b"}),
        (Opaque(), Opaque()),
        (Output(random(3)), Output(random(3))),
        (Pair(random(3), None), Pair(random(3), None)),
        (UserDict(a=random(3)), UserDict(a=random(3))),
        (torch.eye(3).to_sparse(), torch.eye(3).to_sparse()),
        (torch.zeros(2, device="meta"), torch.ones(2, device="meta")),
        (10**40, 10**40),
        (random(3).requires_grad_(), random(3)),
    ],
)
def test_equal_to_rounding_is_no_difference(value: Any, other: Any) -> None:
    assert compare(value, other) == []
    assert compare({"a": [value, (other,)]}, {"a": [other, (value,)]}) == []


@pytest.mark.parametrize(
    ("whole", "joined", "path", "text"),
    [
        (random(16, 3), random(16, 3)[:8], "output", "shape (8, 3) instead of (16, 3)"),
        (
            {"logits": [torch.tensor([2.0, 1.0])]},
            {"logits": [torch.tensor([2.5, 1.0])]},
            "output['logits'][0]",
            "largest difference 0.5 where values are up to 2",
        ),
        (torch.tensor(1.25), torch.tensor(0.5), "output", "0.5 instead of 1.25"),
        (torch.tensor([1.0]), torch.tensor([NAN]), "output", "nan instead of 1"),
        (torch.ones(2), torch.tensor([NAN, 1.0]), "output", "NaN in the parts' only"),
        (torch.tensor([NAN, 1.0]), torch.ones(2), "output", "NaN in the whole batch's only"),
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]), "output", "other NaNs"),
        (torch.tensor([INF, 1.0]), torch.tensor([-INF, 1.0]), "output", "other infinite values"),
        (torch.tensor(1.0), torch.tensor(INF), "output", "inf instead of 1"),
        (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), "output", "1 of 3 entries differ"),
        (torch.tensor(32), torch.tensor(16), "output", "16 instead of 32"),
        (torch.tensor([True]), torch.tensor([False]), "output", "False instead of True"),
        (32, 16, "output", "16 instead of 32"),
        (0.9106, 0.8294, "output", "0.8294 instead of 0.9106"),
        (True, False, "output", "False instead of True"),
        (["a"] * 8, ["a"] * 4, "output", "4 entries instead of 8"),
        (["a", "b"], ["a", "c"], "output[1]", "'c' instead of 'b'"),
        (None, torch.zeros(3), "output", "a Tensor of shape (3,) instead of None"),
        ({"a": 1}, {"b": 1}, "output", "without ['a'] and with ['b'] in addition"),
        (Output(1, "a"), Output(1, "b"), "output.name", "'b' instead of 'a'"),
        (Pair(1, 2), Pair(1, 3), "output.y", "3 instead of 2"),
        (np.arange(4), np.arange(2), "output", "shape (2,) instead of (4,)"),
        (10**40, 1, "output", f"1 instead of {'1' + '0' * 36}..."),
    ],
)
def test_difference_names_place_and_values(whole: Any, joined: Any, path: str, text: str) -> None:
    assert compare(whole, joined) == [Difference(path, text)]
    assert str(Difference(path, text)) == f"`{path}`: {text}"


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float64, 1e-7), (torch.float32, 1e-3), (torch.bfloat16, 0.1)]
)
def test_more_than_rounding_is_a_difference(dtype: torch.dtype, factor: float) -> None:
    value = random(16, 3, dtype=dtype)
    assert compare(value, value * (1 + factor))


def test_values_computed_in_another_dtype_are_no_more_precise_than_that() -> None:
    whole, joined = torch.tensor(1.0), torch.tensor(1.005)
    assert compare(whole, joined)
    assert compare(whole, joined, computed_in=torch.bfloat16) == []
    assert compare(whole, joined, computed_in=torch.float64)


def test_single_ties_in_many_integers_are_no_difference() -> None:
    whole = torch.zeros(64, 64, dtype=torch.long)
    joined = whole.clone()
    joined[3, 3] = 1
    assert compare(whole, joined) == []
    assert compare(whole[:16, :16], joined[:16, :16])


def test_neither_value_is_changed() -> None:
    whole, joined = random(4).requires_grad_(), np.arange(4.0)
    compare(whole, joined)
    assert whole.requires_grad
    assert torch.equal(whole, random(4))
    assert joined.tolist() == [0, 1, 2, 3]


def test_every_difference_is_told() -> None:
    found = compare({"a": 1, "b": [2, 3]}, {"a": 2, "b": [3, 3]}, "logged")
    assert [difference.path for difference in found] == ["logged['a']", "logged['b'][0]"]
