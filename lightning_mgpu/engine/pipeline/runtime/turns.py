"""Give stages to micro-batches one at a time, in the timetable's order."""

import threading
from collections.abc import Sequence

from lightning_mgpu.engine.pipeline.runtime.schedule import Visit
from lightning_mgpu.engine.worker_thread import Cancelled

# How often a micro-batch that waits looks whether it has been cancelled.
_POLL_SECONDS = 0.05

# Two doors and three micro-batches, of which two are on their way at once; `1.0` is visit 0 of
# micro-batch 1. What a door expects comes from the timetable, and is let in in this order:
#
#                                door 0                 door 1
#                                inside   expects       inside   expects
#     at first                   -        0.0 1.0 2.0   -        0.1 1.1 2.1
#     0 and 1 come to door 0     0.0      1.0 2.0       -        0.1 1.1 2.1     1 waits
#     0 leaves for door 1        1.0      2.0           0.1      1.1 2.1
#     1 leaves for door 1        -        2.0           0.1      1.1 2.1         1 waits
#     0 leaves and is done;      2.0      -             1.1      2.1
#     its thread takes 2
#
# Had 1 left out stage 0 and come to door 1 at once, `drop` would have taken 1.0 off door 0's list,
# so that 2.0 is next there.


class Turns:
    """Locks of the stages. A micro-batch holds one at most, and none while it waits.

    What the timetable lists for a door is let in in that order. A visit that it does not list is
    let in whenever the door is free, and one that turns out not to take place is passed over, so
    that nobody waits for ever, whatever way micro-batches take.

    Args:
        orders: For each door, the visits it expects, in order.
        door_of: The door of each stage.
    """

    def __init__(self, orders: Sequence[Sequence[Visit]], door_of: Sequence[int]) -> None:
        self._doors = [_Door(order) for order in orders]
        self._door_of = list(door_of)
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[int, Visit | None, threading.Event]] = {}
        self._closed = False

    def enter(self, chunk: int, stage: int, number: int) -> None:
        """Wait until a micro-batch may work on a stage; it must hold no other.

        Args:
            chunk: The micro-batch.
            stage: Where it wants to go.
            number: How many visits it has made before, of any stage.

        Raises:
            Cancelled: Another micro-batch has failed.
        """
        door = self._door_of[stage]
        mine = threading.Event()
        with self._lock:
            if self._closed:
                raise Cancelled()
            planned = self._doors[door].expected(chunk, number)
            for other in self._doors:
                other.drop(chunk, number, keep=planned)
            self._waiting[chunk] = door, planned, mine
            self._open()
        while not mine.wait(_POLL_SECONDS):
            pass  # a thread can only be told to stop between two steps in Python
        if self._closed:
            raise Cancelled()

    def leave(self, stage: int) -> None:
        """Release a stage."""
        with self._lock:
            self._doors[self._door_of[stage]].busy = False
            self._open()

    def finish(self, chunk: int) -> None:
        """Declare that a micro-batch makes no more visits."""
        with self._lock:
            for door in self._doors:
                door.drop(chunk, None)
            self._waiting.pop(chunk, None)
            self._open()

    def close(self) -> None:
        """Make everybody who waits or enters raise an error."""
        with self._lock:
            self._closed = True
            for _, _, event in self._waiting.values():
                event.set()

    def _open(self) -> None:
        for chunk, (number, planned, event) in sorted(self._waiting.items()):
            door = self._doors[number]
            if not door.busy and (planned is None or door.is_next(planned)):
                door.busy = True
                if planned is not None:
                    door.order.remove(planned)
                del self._waiting[chunk]
                event.set()


class _Door:
    def __init__(self, order: Sequence[Visit]) -> None:
        self.order = list(order)
        self.busy = False

    def is_next(self, visit: Visit) -> bool:
        return self.order[0] == visit

    def expected(self, chunk: int, number: int) -> Visit | None:
        """A micro-batch's next visit in the timetable, from its `number`-th visit on."""
        return next((v for v in self.order if v.chunk == chunk and v.number >= number), None)

    def drop(self, chunk: int, number: int | None, keep: Visit | None = None) -> None:
        """Drop a micro-batch's expected visits before the one to be kept."""
        last = keep.number if keep is not None else number
        self.order = [
            v
            for v in self.order
            if v.chunk != chunk or v == keep or (last is not None and v.number >= last)
        ]
