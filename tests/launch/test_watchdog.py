"""When the ranks are asked where they are, and what is made of the answers; without processes."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from lightning_mgpu._compat.torch_collectives import RecordedCollective
from lightning_mgpu.launch import protocol, watchdog
from lightning_mgpu.launch.errors import RankHungError
from lightning_mgpu.launch.position import Observer, Position
from lightning_mgpu.launch.watchdog import Watchdog

TIMEOUT = 100.0


@dataclass
class Worker:
    """Keeps what it is sent."""

    pid: int = 77
    stopped: bool = False
    sent: list[protocol.Look] = field(default_factory=list)

    def is_stopped(self) -> bool:
        return self.stopped

    def send(self, message: protocol.Look) -> None:
        self.sent.append(message)


@dataclass
class Here:
    """Rank 0: has come to some collectives, and may wait in the last."""

    number: int = 1
    waits: bool = False

    def counts(self) -> tuple[Any, ...]:
        return (self.number, self.waits)

    def look(self, detailed: bool) -> Position:
        return position(self.number, self.waits)


def position(number: int, waits: bool = False) -> Position:
    last = RecordedCollective("0", number, "barrier", (), (), not waits)
    return Position("", "train.py:3 in `step`", (), waits, (last,), {"0": (0, 1)}, {})


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock.now)
    return clock


class Game:
    """A watchdog over rank 0 and one worker."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.here, self.worker = clock, Here(), Worker()
        workers = cast("Any", {1: self.worker})
        self.dog = Watchdog(workers, cast("Observer", self.here), TIMEOUT, None)

    def tick(self, answer: Position | None = None, seconds: float = 1.0) -> RankHungError | None:
        """The worker answers, time goes by, and the watchdog looks."""
        if answer is not None:
            self.dog.answer(1, protocol.Seen(self.worker.sent[-1].launch, answer))
        self.clock.now += seconds
        return self.dog.tick(())


def test_nobody_is_asked_while_rank_zero_gets_on(clock: Clock) -> None:
    game = Game(clock)
    for _ in range(5):
        game.here.number += 1
        assert game.tick() is None
    assert game.worker.sent == []
    assert game.tick() is None
    assert len(game.worker.sent) == 1


def test_worker_that_does_not_answer_is_asked_once(clock: Clock) -> None:
    """Or its socket would fill, and we would wait for it."""
    game = Game(clock)
    for _ in range(5):
        game.tick()
    assert len(game.worker.sent) == 1
    game.tick(position(1))
    assert len(game.worker.sent) == 2


def test_rank_is_late_when_it_has_kept_another_waiting(clock: Clock) -> None:
    game = Game(clock)
    game.here.number, game.here.waits = 2, True
    game.tick()
    game.tick()
    for _ in range(int(0.95 * TIMEOUT)):
        assert game.tick(position(1)) is None
    error = game.tick(position(1))
    assert error is not None
    assert error.ranks == (1,)
    assert "raise the strategy's `timeout`" in str(error)
    assert game.worker.sent[-1].detailed


def test_time_in_which_this_process_was_stopped_does_not_count(clock: Clock) -> None:
    game = Game(clock)
    game.here.number, game.here.waits = 2, True
    game.tick()
    game.tick()
    assert game.tick(position(1), seconds=10 * TIMEOUT) is None
    assert game.tick(position(1)) is None


def test_answer_from_an_earlier_launch_is_ignored(clock: Clock) -> None:
    earlier, game = Game(clock), Game(clock)
    earlier.tick()
    earlier.tick()
    game.here.number, game.here.waits = 2, True
    game.tick()
    game.tick()
    stale = protocol.Seen(earlier.worker.sent[-1].launch, position(2))
    assert not game.dog.answer(1, stale)
    assert game.dog.answer(1, protocol.Seen(game.worker.sent[-1].launch, position(2)))


def test_stopped_worker_is_told_of_after_a_while_and_asked_nothing(clock: Clock) -> None:
    game = Game(clock)
    game.here.number, game.here.waits, game.worker.stopped = 2, True, True
    errors = [game.tick() for _ in range(6)]
    assert errors[:3] == [None, None, None]
    assert game.worker.sent == []
    assert "process of rank 1 is stopped" in str(errors[5])
