"""The states of random number generators: known, put back, and kept in a checkpoint."""

import random
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch

from lightning_mgpu.engine.random_state import RandomState

OWN = torch.Generator().manual_seed(4)
DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: float(torch.rand(())),
    "python": lambda: random.gauss(0, 1),
    "numpy": lambda: float(np.random.randn()),
    "own": lambda: float(torch.rand((), generator=OWN)),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_known_and_put_back(kind: str) -> None:
    draw = DRAWS[kind]
    draw()  # (of a pair of normal numbers, the second is kept)
    state = RandomState(own=[OWN])
    assert not state.has_moved()
    first = draw()
    assert state.has_moved()
    assert state.has_moved_beside_torch() == (kind in ("python", "numpy"))
    state.restore()
    assert not state.has_moved()
    assert draw() == first


def test_states_in_a_checkpoint() -> None:
    def drawn() -> list[object]:
        return [draw() for draw in DRAWS.values()]

    drawn()
    file = BytesIO()
    torch.save(RandomState(own=[OWN]).plain(), file)
    expected = [drawn(), drawn()]
    file.seek(0)
    RandomState.of(torch.load(file, weights_only=True)).restore([OWN])
    assert [drawn(), drawn()] == expected
