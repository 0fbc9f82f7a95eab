"""Trials on the workers that ran them: bars in lanes."""

from dataclasses import dataclass

from lightning_mgpu.sweep.report.model import Sweep, Trial


@dataclass(frozen=True)
class Bar:
    """A stretch of a trial on a worker, in seconds since the sweep began."""

    lane: int
    start: float
    end: float
    trial: Trial
    outcome: str


@dataclass(frozen=True)
class Timeline:
    """Trials on workers.

    Attributes:
        resumed: When the sweep was resumed; the time in between is left out.
    """

    lanes: list[str]
    bars: list[Bar]
    resumed: list[float]

    @property
    def end(self) -> float:
        """When the last bar ends."""
        return max((bar.end for bar in self.bars), default=0.0)

    @property
    def busy(self) -> float:
        """The share of the workers' time in which they had a trial."""
        whole = self.end * len(self.lanes)
        return sum(bar.end - bar.start for bar in self.bars) / whole if whole else 0.0


def timeline(sweep: Sweep) -> Timeline:
    """Bars in lanes: a lane for each worker, or for several of which one followed the other."""
    stretches = sorted(
        ((stretch, trial) for trial in sweep.trials for stretch in trial.stretches),
        key=lambda pair: (pair[0].start, pair[1].number),
    )
    clock = _Clock([stretch.start for stretch, _ in stretches], sweep)
    free: list[float] = []  # when each lane is free again
    hosts: list[str] = []
    lane_of: dict[str, int] = {}
    bars = []
    for stretch, trial in stretches:
        lane = lane_of.get(stretch.worker)
        if lane is None or free[lane] > stretch.start:
            lane = _free_lane(free, hosts, stretch.start, stretch.host)
        free[lane], lane_of[stretch.worker] = stretch.end, lane
        begin, end = clock(stretch.start), clock(stretch.end)
        bars.append(Bar(lane, begin, max(begin, end), trial, stretch.outcome))
    several = len(set(hosts)) > 1
    names = [f"{host}, {n}" if several else f"worker {n}" for n, host in enumerate(hosts, 1)]
    return Timeline(names, bars, clock.resumed)


def _free_lane(free: list[float], hosts: list[str], start: float, host: str) -> int:
    for lane, until in enumerate(free):
        if until <= start and hosts[lane] == host:
            return lane
    free.append(start)
    hosts.append(host)
    return len(free) - 1


class _Clock:
    """Seconds since the first trial began, without those between sessions."""

    def __init__(self, starts: list[float], sweep: Sweep) -> None:
        ends = [stretch.end for trial in sweep.trials for stretch in trial.stretches]
        self._cuts: list[tuple[float, float]] = [(start, start) for start in starts[:1]]
        for session in sweep.sessions[1:]:
            later = [start for start in starts if start >= session]
            before = [end for end in ends if end <= session]
            if later and before:
                self._cuts.append((max(before), later[0]))
        self.resumed = [self(start) for _, start in self._cuts[1:]]

    def __call__(self, moment: float) -> float:
        first = self._cuts[0][0]
        left_out = sum(after - before for before, after in self._cuts if moment >= after)
        return moment - first - left_out


def time_unit(seconds: float) -> tuple[str, float]:
    """In which unit to measure so long a time, and how many seconds it has."""
    for name, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds > 3 * length:
            return name, length
    return "seconds", 1.0
