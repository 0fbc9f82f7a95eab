"""What is said of ranks that wait, from where all of them are."""

import pickle
from typing import Any

import pytest

from lightning_mgpu._compat.torch_collectives import RecordedCollective
from lightning_mgpu.launch.diagnosis import Situation, differ
from lightning_mgpu.launch.errors import RankHungError
from lightning_mgpu.launch.position import Position

EVERYONE = (0, 1, 2)


def collective(
    number: int, operation: str = "all_reduce", size: int = 8, done: bool = True, **changes: Any
) -> RecordedCollective:
    known: dict[str, Any] = {
        "group": "0",
        "number": number,
        "operation": operation,
        "shapes": () if operation == "barrier" else ((size,),),
        "dtypes": () if operation == "barrier" else ("Float",),
        "done": done,
    }
    return RecordedCollective(**{**known, **changes})


def position(*collectives: RecordedCollective, known: bool = True) -> Position:
    """Somewhere in `train.py`, after these collectives."""
    return Position(
        "  File train.py, line 7, in step\n",
        "train.py:7 in `step`",
        (),
        any(not each.done for each in collectives),
        collectives if known else None,
        {"0": EVERYONE, "pair": (0, 1)},
        {"global step": 3},
    )


WAITS = position(collective(1), collective(2, done=False))
BEHIND = position(collective(1))


def test_nobody_waits_while_all_compute() -> None:
    situation = Situation({0: BEHIND, 1: BEHIND, 2: position(collective(1), collective(2))})
    situation.waited = {0: 1e6, 1: 1e6, 2: 1e6}
    assert situation.certain() is None
    assert situation.hung(1.0, "timeout") is None


def test_same_collective_is_no_hang_however_long_it_takes() -> None:
    situation = Situation(dict.fromkeys(EVERYONE, WAITS), waited=dict.fromkeys(EVERYONE, 1e6))
    assert situation.certain() is None
    assert situation.hung(1.0, "timeout") is None


@pytest.mark.parametrize("waited", [0.9, 1.1])
def test_rank_that_does_not_come_is_hung_when_time_is_over(waited: float) -> None:
    situation = Situation({0: WAITS, 1: BEHIND, 2: WAITS}, waited={0: waited, 2: waited})
    assert situation.certain() is None
    error = situation.hung(1.0, "hang_timeout_s")
    if waited < 1:
        assert error is None
        return
    assert error is not None
    assert error.ranks == (1,)
    said = str(error)
    assert "more than 1 s for rank 1, at train.py:7 in `step`. If it is only slow" in said
    assert "Rank 0 waits for 1.1 s in `all_reduce` of 8 floats, its number 2, at train.py" in said
    assert "Rank 1 is at train.py:7 in `step`; its last collective was number 1" in said
    assert "(global step 3)" in said
    assert "stack of rank 1:\n  File train.py" in said
    assert "stack of rank 0" not in said
    assert str(pickle.loads(pickle.dumps(error))) == said


def test_rank_that_others_hold_up_is_not_blamed() -> None:
    """Rank 0 waits for rank 1 in one group, and rank 1 for rank 2 in another."""
    waits = position(collective(1, group="pair", done=False))
    situation = Situation({0: waits, 1: WAITS, 2: BEHIND}, waited={0: 9.0, 1: 9.0})
    error = situation.hung(1.0, "timeout")
    assert error is not None
    assert error.ranks == (2,)


def test_rank_outside_of_the_group_is_not_waited_for() -> None:
    waits = position(collective(1, group="pair", done=False))
    situation = Situation({0: waits, 1: waits, 2: BEHIND}, waited={0: 9.0, 1: 9.0})
    assert situation.hung(1.0, "timeout") is None


def test_rank_without_an_answer_is_hung_and_one_that_was_not_asked_is_not() -> None:
    situation = Situation({0: WAITS, 2: WAITS}, waited={0: 9.0, 2: 9.0})
    error = situation.hung(1.0, "timeout")
    assert error is not None
    assert error.ranks == (1,)
    assert "Rank 1 gives no answer" in str(error)
    assert "native code that holds the interpreter's lock" in str(error)
    situation.positions = {0: WAITS, 1: position(known=False), 2: WAITS}
    assert situation.hung(1.0, "timeout") is None


def test_different_collectives_are_certain() -> None:
    other = position(collective(1), collective(2, "barrier", done=False))
    error = Situation({0: WAITS, 1: other, 2: BEHIND}).certain()
    assert error is not None
    assert error.ranks == ()
    assert "as number 2, rank 0 runs `all_reduce` of 8 floats and rank 1 `barrier`." in str(error)


def test_collective_that_was_passed_with_another_is_certain() -> None:
    gone = position(collective(1), collective(2, "broadcast"), collective(3))
    assert "rank 1 `broadcast`" in str(Situation({0: WAITS, 1: gone, 2: WAITS}).certain())


def test_rank_that_has_ended_will_not_come() -> None:
    error = Situation({0: WAITS, 1: BEHIND, 2: WAITS}, frozenset({1})).certain()
    assert error is not None
    assert error.ranks == (1,)
    assert "Rank 1 has ended, and will not come to `all_reduce` of 8 floats of rank 0" in str(error)
    came = position(collective(1), collective(2))
    assert Situation({0: WAITS, 1: came, 2: WAITS}, frozenset({1})).certain() is None


def test_stopped_process_is_named() -> None:
    error = Situation({0: WAITS, 2: WAITS}, stopped={1: 4321}).certain()
    assert error is not None
    assert error.ranks == (1,)
    assert "process of rank 1 is stopped" in str(error)
    assert "kill -CONT 4321" in str(error)
    assert Situation({0: BEHIND, 2: BEHIND}, stopped={1: 4321}).certain() is None


def test_first_difference_is_found_in_what_has_ended() -> None:
    ours = position(collective(1), collective(2, size=1), collective(3), collective(4, "barrier"))
    theirs = position(collective(1), collective(2), collective(3, size=1), collective(4))
    error = Situation({0: ours, 1: theirs}).mismatch()
    assert "as number 2, rank 0 runs `all_reduce` of 1 float and rank 1" in str(error)
    assert Situation({0: ours, 1: ours}).mismatch() is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (collective(1), collective(1, size=4), True),
        (collective(1, shapes=((2, 4),)), collective(1, shapes=((8,),)), False),
        (collective(1), collective(1, dtypes=("Double",)), True),
        (collective(1), collective(1, "reduce"), True),
        (collective(1, "scatter", shapes=(), dtypes=()), collective(1, "scatter"), False),
        (collective(1, done=False), collective(1), False),
    ],
    ids=["size", "shape", "dtype", "operation", "source of a scatter", "the same"],
)
def test_collectives_that_cannot_be_the_same_differ(
    one: RecordedCollective, other: RecordedCollective, expected: bool
) -> None:
    assert differ(one, other) is expected


def test_timeout_of_all_ranks_blames_nobody() -> None:
    error = Situation({0: BEHIND, 1: BEHIND}, tracebacks={1: "Traceback of 1"}).given_up((), 5.0)
    assert isinstance(error, RankHungError)
    assert error.ranks == ()
    assert "Every rank waited more than 5 s" in str(error)
    assert "Rank 1 has failed" in str(error)
    assert "stack of rank 1:\nTraceback of 1" in str(error)
