"""Trials on the workers that ran them: bars in lanes."""

from dataclasses import dataclass

from lightning_mgpu.sweep.report.model import SweepHistory, Trial


@dataclass(frozen=True)
class TrialBar:
    """A stretch of a trial on a worker, in seconds since the sweep began."""

    lane: int
    start: float
    end: float
    trial: Trial
    outcome: str


@dataclass(frozen=True)
class WorkerTimeline:
    """Bars of all trials in the lanes of workers.

    Attributes:
        resumed: When the sweep was resumed; the time in between is left out.
    """

    lanes: list[str]
    bars: list[TrialBar]
    resumed: list[float]

    @property
    def end(self) -> float:
        """End of the last bar."""
        return max((bar.end for bar in self.bars), default=0.0)

    @property
    def busy(self) -> float:
        """Share of the workers' time in which they had a trial."""
        whole = self.end * len(self.lanes)
        return sum(bar.end - bar.start for bar in self.bars) / whole if whole else 0.0


def timeline(sweep: SweepHistory) -> WorkerTimeline:
    """Arrange bars in lanes, one for each worker or several consecutive workers."""
    stretches = sorted(
        ((stretch, trial) for trial in sweep.trials for stretch in trial.stretches),
        key=lambda pair: (pair[0].start, pair[1].number),
    )
    clock = _ActiveClock([stretch.start for stretch, _ in stretches], sweep)
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
        bars.append(TrialBar(lane, begin, max(begin, end), trial, stretch.outcome))
    several = len(set(hosts)) > 1
    names = [f"{host}, {n}" if several else f"worker {n}" for n, host in enumerate(hosts, 1)]
    return WorkerTimeline(names, bars, clock.resumed)


def _free_lane(free: list[float], hosts: list[str], start: float, host: str) -> int:
    for lane, until in enumerate(free):
        if until <= start and hosts[lane] == host:
            return lane
    free.append(start)
    hosts.append(host)
    return len(free) - 1


class _ActiveClock:
    """Clock of seconds since the first trial began, without the time between sessions."""

    def __init__(self, starts: list[float], sweep: SweepHistory) -> None:
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
    """Unit for a duration, and its number of seconds."""
    for name, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds > 3 * length:
            return name, length
    return "seconds", 1.0
