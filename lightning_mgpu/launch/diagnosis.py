"""Tell from where all ranks are whether some wait for what cannot come, and say so."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from typing import Any

from lightning_mgpu._compat.torch_collectives import RecordedCollective
from lightning_mgpu.launch.errors import RankHungError
from lightning_mgpu.launch.position import Position

# What has inputs of the same size on all ranks; a `scatter` has them at its source only.
_SAME_SIZES = frozenset({"all_reduce", "broadcast", "reduce", "all_gather"})
_NO_ANSWER = "  (no answer: it is probably in native code that holds the interpreter's lock)"
_WHERE_TO_LOOK = (
    "Look for a collective that only some ranks run (`self.log(..., sync_dist=True)`, `all_gather`,"
    " a metric's `compute`, a validation) and for data that gives some ranks more batches."
)


@dataclass(frozen=True)
class Wait:
    """A rank that waits in a collective for others.

    Attributes:
        rank: The rank.
        collective: Its oldest one that has not ended.
        absent: Ranks that have not come to it.
        unknown: Ranks of which that is not known.
        others: What other ranks run instead, as the collective of that number.
    """

    rank: int
    collective: RecordedCollective
    absent: tuple[int, ...]
    unknown: tuple[int, ...]
    others: dict[int, RecordedCollective]


@dataclass
class Situation:
    """Where all ranks are.

    Attributes:
        positions: Of the ranks that have answered.
        ended: Ranks whose function has ended.
        tracebacks: Of ranks that have failed.
        stopped: Ranks whose process is stopped, with its id.
        waited: Seconds that a rank has waited in its collective.
    """

    positions: Mapping[int, Position]
    ended: frozenset[int] = frozenset()
    tracebacks: Mapping[int, str] = field(default_factory=dict)
    stopped: Mapping[int, int] = field(default_factory=dict)
    waited: Mapping[int, float] = field(default_factory=dict)

    def waits(self) -> Iterator[Wait]:
        """The ranks that wait in a collective."""
        for rank, position in sorted(self.positions.items()):
            collective = position.pending
            if collective is not None and rank not in self.ended:
                yield self._wait(rank, collective, position.groups.get(collective.group, ()))

    def _wait(self, rank: int, collective: RecordedCollective, members: tuple[int, ...]) -> Wait:
        absent, unknown, others = [], [], {}
        for other in sorted({*members} - {rank}):
            position = self.positions.get(other)
            if position is None:
                unknown.append(other)
            if position is None or position.collectives is None:
                continue
            ours = {
                each.number: each for each in position.collectives if each.group == collective.group
            }
            if collective.number > max(ours, default=0):
                absent.append(other)
            elif differ(collective, theirs := ours.get(collective.number, collective)):
                others[other] = theirs
        return Wait(rank, collective, tuple(absent), tuple(unknown), others)

    def told(self) -> str:
        """A line for each rank that has answered."""
        return "\n".join(f"Rank {rank} {self._described(rank)}" for rank in sorted(self.positions))

    def certain(self) -> RankHungError | None:
        """The error for a wait that cannot end."""
        for wait in self.waits():
            for other, theirs in wait.others.items():
                return self._mismatch({wait.rank: wait.collective, other: theirs})
            if gone := [rank for rank in wait.absent if rank in self.ended]:
                return self._error(
                    f"{_ranks(gone)} {_has(gone)} ended, and will not come to"
                    f" {_shown(wait.collective)} of rank {wait.rank}. {_WHERE_TO_LOOK}",
                    gone,
                )
            if still := [rank for rank in self.stopped if rank in (*wait.absent, *wait.unknown)]:
                process = self.stopped[still[0]]
                return self._error(
                    f"The process of rank {still[0]} is stopped, by SIGSTOP or the like, and rank"
                    f" {wait.rank} waits for it in {_shown(wait.collective)}. (`kill -CONT"
                    f" {process}` would have let it go on.)",
                    still,
                )
        return None

    def hung(self, seconds: float, option: str) -> RankHungError | None:
        """The error for ranks that have kept another waiting for so long.

        Args:
            seconds: For how long.
            option: What to raise if they are only slow.
        """
        waits = list(self.waits())
        missing = {
            rank
            for wait in waits
            if self.waited.get(wait.rank, 0.0) > seconds
            for rank in wait.absent or wait.unknown
        }
        # Those that wait themselves are held up by somebody else, if there is one.
        first = missing - {wait.rank for wait in waits} or missing
        return self._late(tuple(sorted(first)), seconds, option) if first else None

    def given_up(self, ranks: tuple[int, ...], seconds: float) -> RankHungError:
        """The error for a collective's own timeout.

        Args:
            ranks: Those that did not come; empty if all have waited.
            seconds: The timeout.
        """
        if ranks:
            return self._late(ranks, seconds, "timeout")
        return self._error(
            f"Every rank waited more than {seconds:g} s for the others: they do not run the same"
            f" sequence of collectives. {_WHERE_TO_LOOK}",
            (),
        )

    def _late(self, ranks: tuple[int, ...], seconds: float, option: str) -> RankHungError:
        places = [self.positions[rank].place for rank in ranks if rank in self.positions]
        where = f", at {places[0]}" if len(ranks) == 1 and places and places[0] else ""
        return self._error(
            f"The other ranks waited more than {seconds:g} s for {_ranks(ranks).lower()}{where}. If"
            f" {'it is' if len(ranks) == 1 else 'they are'} only slow, raise the strategy's"
            f" `{option}`.",
            ranks,
        )

    def mismatch(self) -> RankHungError | None:
        """The error for the first collectives that differ, ended or not."""
        first: dict[str, tuple[int, dict[int, RecordedCollective]]] = {}
        for one, other in combinations(sorted(self.positions), 2):
            ours, theirs = (_by_number(self.positions[rank]) for rank in (one, other))
            for key in sorted(ours.keys() & theirs.keys()):
                if differ(ours[key], theirs[key]):
                    found = key[1], {one: ours[key], other: theirs[key]}
                    first.setdefault(key[0], found)
                    break
        for _, differing in first.values():
            return self._mismatch(differing)
        return None

    def _mismatch(self, collectives: Mapping[int, RecordedCollective]) -> RankHungError:
        ((one, ours), (other, theirs)) = sorted(collectives.items())
        return self._error(
            f"The ranks run different collectives: as number {ours.number}, rank {one} runs"
            f" {_shown(ours)} and rank {other} {_shown(theirs)}. {_WHERE_TO_LOOK}",
            (),
        )

    def _error(self, sentence: str, ranks: Any) -> RankHungError:
        stacks = {rank: position.stack for rank, position in self.positions.items()}
        stacks |= self.tracebacks
        everyone = sorted({*stacks, *self.ended, *ranks})
        lines = "\n".join(f"Rank {rank} {self._described(rank)}" for rank in everyone)
        shown = "\n".join(
            f"Python stack of rank {rank}:\n" + (stacks.get(rank) or _NO_ANSWER).rstrip()
            for rank in ranks or everyone
            if rank not in self.stopped
        )
        return RankHungError(f"{sentence}\n{lines}\n{shown}".rstrip(), tuple(ranks))

    def _described(self, rank: int) -> str:
        position = self.positions.get(rank)
        if rank in self.stopped:
            return "is stopped."
        if position is None:
            return "has ended." if rank in self.ended else "gives no answer."
        last = (position.collectives or (None,))[-1]
        pending = position.pending
        if rank in self.ended or rank in self.tracebacks:
            words = "has failed" if rank in self.tracebacks else "has ended"
        elif pending is not None:
            seconds = f"for {self.waited[rank]:.1f} s " if rank in self.waited else ""
            words = f"waits {seconds}in {_shown(pending)}, its number {pending.number}, at"
            words += f" {position.place}"
        else:
            words = f"is at {position.place}"
        if last is not None and last is not pending:
            words += f"; its last collective was number {last.number}, {_shown(last)}"
        told = "".join(f", {name} {value}" for name, value in position.progress.items())
        return f"{words}{told and f' ({told[2:]})'}."


def differ(one: RecordedCollective, other: RecordedCollective) -> bool:
    """Whether two ranks' collectives of the same number cannot be the same one."""
    if one.operation != other.operation:
        return True
    return one.operation in _SAME_SIZES and _size(one) != _size(other)


def _size(collective: RecordedCollective) -> tuple[int, tuple[str, ...]]:
    return sum(prod(shape) for shape in collective.shapes), collective.dtypes[:1]


def _shown(collective: RecordedCollective) -> str:
    if not collective.shapes:
        return f"`{collective.operation}`"
    number, kinds = _size(collective)
    return f"`{collective.operation}` of {number} {kinds[0].lower()}{'' if number == 1 else 's'}"


def _by_number(position: Position) -> dict[tuple[str, int], RecordedCollective]:
    return {(each.group, each.number): each for each in position.collectives or ()}


def _ranks(ranks: Any) -> str:
    noun = "Rank" if len(ranks) == 1 else "Ranks"
    return f"{noun} {', '.join(map(str, ranks))}"


def _has(ranks: Any) -> str:
    return "has" if len(ranks) == 1 else "have"
