"""The simulated timetable, and what is predicted from it: properties."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_mgpu.engine.pipeline.partition import simulate
from lightning_mgpu.engine.pipeline.partition.simulate import Link, Load
from lightning_mgpu.engine.pipeline.runtime import schedule
from lightning_mgpu.engine.pipeline.runtime.schedule import Task
from lightning_mgpu.plan.ledger import CALLER, Holders
from lightning_mgpu.plan.options import Checkpoint, Options
from lightning_mgpu.plan.predict import memory, predict
from lightning_mgpu.plan.profile import LayerRange, Profile, Sample, Weights
from lightning_mgpu.plan.stages import Stages

_SECONDS = st.floats(0, 10, allow_subnormal=False)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """Stages of any speed, with links from each to the next and some that skip."""
    stages, chunks = draw(st.integers(1, 6)), draw(st.integers(1, 8))

    def times() -> list[float]:
        return draw(st.lists(_SECONDS, min_size=chunks, max_size=chunks))

    pairs = itertools.combinations(range(stages), 2)
    links = [Link(*pair) for pair in pairs if pair[1] == pair[0] + 1 or draw(st.booleans())]
    return Load(
        [times() for _ in range(stages)],
        [times() for _ in range(stages)],
        {link: times() for link in links},
        [times() for _ in range(stages)] if draw(st.booleans()) else (),
    )


def _even(stages: int, chunks: int, seconds: float, deferred: bool = False) -> Load:
    times = [[seconds] * chunks for _ in range(stages)]
    links = {Link(s, s + 1): [0.0] * chunks for s in range(stages - 1)}
    return Load(times, times, links, times if deferred else ())


def _back(links: Sequence[Link]) -> list[Link]:
    return [Link(link.receiver, link.sender) for link in links]


@settings(deadline=None)
@given(load=loads())
def test_no_stage_and_no_link_does_two_things_at_once(load: Load) -> None:
    for made in simulate.passage(load):
        for stage in range(len(load.forward)):
            _assert_apart([span for task, span in _work(made) if task.stage == stage])
        for link in {link for link, _ in made.transfers}:
            _assert_apart([span for (other, _), span in made.transfers.items() if other == link])


@settings(deadline=None)
@given(load=loads())
def test_nothing_begins_before_what_it_needs_is_there(load: Load) -> None:
    forward, backward = simulate.passage(load)
    for made, links in ((forward, [*load.links]), (backward, _back([*load.links]))):
        for link, chunk in itertools.product(links, range(len(load.forward[0]))):
            transfer = made.transfers[link, chunk]
            assert made.tasks[Task(link.sender, chunk)].end <= transfer.start
            assert transfer.end <= made.tasks[Task(link.receiver, chunk)].start


@settings(deadline=None)
@given(load=loads())
def test_tasks_last_as_long_as_they_are_said_to(load: Load) -> None:
    for made, seconds in zip(simulate.passage(load), (load.forward, load.backward), strict=True):
        assert len(made.tasks) == len(seconds) * len(seconds[0])
        for task, span in made.tasks.items():
            assert span.end - span.start == pytest.approx(seconds[task.stage][task.chunk])
        assert made.seconds == max(span.end for _, span in _work(made))


@settings(deadline=None)
@given(load=loads())
def test_gradients_of_weights_come_after_those_of_inputs_and_in_full(load: Load) -> None:
    made = simulate.passage(load).backward
    assert made.later.keys() == (made.tasks.keys() if load.weights else set())
    for task, spans in made.later.items():
        assert all(span.start >= made.tasks[task].end for span in spans)
        wanted = load.weights[task.stage][task.chunk]
        assert sum(span.end - span.start for span in spans) == pytest.approx(wanted, abs=1e-9)


@settings(deadline=None)
@given(load=loads())
def test_a_passage_is_no_shorter_than_its_busiest_stage_or_any_chunk_s_way(load: Load) -> None:
    for made, seconds in zip(simulate.passage(load), (load.forward, load.backward), strict=True):
        least = max(sum(of_stage) for of_stage in seconds)
        way = max(sum(of_chunk) for of_chunk in zip(*seconds, strict=True))
        assert made.seconds >= max(least, way) - 1e-9
    passed = simulate.passage(load)
    assert -1e-9 <= passed.waiting < 1 or passed.seconds == 0


@settings(deadline=None)
@given(load=loads(), factor=st.floats(0, 1))
def test_quicker_links_never_make_it_slower(load: Load, factor: float) -> None:
    links = {link: [t * factor for t in times] for link, times in load.links.items()}
    quicker = simulate.passage(replace(load, links=links))
    assert quicker.seconds <= simulate.passage(load).seconds + 1e-9


@given(stages=st.integers(1, 8), chunks=st.integers(1, 20), seconds=st.floats(0.1, 10))
def test_even_stages_take_what_the_formula_says(stages: int, chunks: int, seconds: float) -> None:
    made = simulate.passage(_even(stages, chunks, seconds))
    expected = stages * seconds + (chunks - 1) * seconds
    assert made.forward.seconds == pytest.approx(expected)
    assert made.backward.seconds == pytest.approx(expected)
    assert made.waiting == pytest.approx((stages - 1) / (chunks + stages - 1))


@given(seconds=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), chunks=st.integers(1, 12))
def test_uneven_stages_wait_for_the_slowest(seconds: list[float], chunks: int) -> None:
    times = [[t] * chunks for t in seconds]
    links = {Link(s, s + 1): [0.0] * chunks for s in range(len(seconds) - 1)}
    made = simulate.passage(Load(times, times, links))
    expected = sum(seconds) + (chunks - 1) * max(seconds)
    assert made.forward.seconds == pytest.approx(expected)
    assert made.waiting == pytest.approx(schedule.waiting(seconds, chunks))


@given(load=loads(), devices=st.integers(1, 3))
def test_no_device_with_several_stages_does_two_things_at_once(load: Load, devices: int) -> None:
    for made in simulate.passage(load, devices):
        assert len(made.tasks) == len(load.forward) * len(load.forward[0])
        for device in range(devices):
            work = [span for task, span in _work(made) if task.stage % devices == device]
            _assert_apart(work)


@settings(deadline=None)
@given(per_device=st.integers(1, 4), rounds=st.integers(1, 4), devices=st.integers(1, 4))
@example(per_device=2, rounds=4, devices=64)
def test_several_even_stages_on_a_device_take_what_the_formula_says(
    per_device: int, rounds: int, devices: int
) -> None:
    chunks = rounds * devices
    made = simulate.passage(_even(devices * per_device, chunks, 2.0), devices)
    expected = 2.0 * (per_device * chunks + devices - 1)
    assert made.forward.seconds == pytest.approx(expected)
    assert made.backward.seconds == pytest.approx(expected)
    bubble = (devices - 1) / per_device
    assert made.waiting == pytest.approx(bubble / (chunks + bubble))


@settings(deadline=None)
@given(per_device=st.integers(1, 4), rounds=st.integers(1, 4), devices=st.integers(1, 4))
@example(per_device=2, rounds=4, devices=64)
def test_even_stages_with_deferred_gradients_take_what_the_formula_says(
    per_device: int, rounds: int, devices: int
) -> None:
    chunks = rounds * devices
    made = simulate.passage(_even(devices * per_device, chunks, 2.0, deferred=True), devices)
    # Nobody waits for gradients of weights: a third of the work.
    expected = 2.0 * (2 * (per_device * chunks + devices - 1) + per_device * chunks)
    assert made.seconds == pytest.approx(expected)
    seconds = [1.0] * devices * per_device
    assert made.waiting == pytest.approx(schedule.waiting(seconds, chunks, devices, deferred=True))


def test_slow_link_sends_one_chunk_after_another() -> None:
    load = Load([[1.0] * 3, [1.0] * 3], [[0.0] * 3] * 2, {Link(0, 1): [5.0] * 3})
    made = simulate.passage(load).forward
    assert [made.transfers[Link(0, 1), c].start for c in range(3)] == [1, 6, 11]
    assert made.seconds == 17


def test_all_reduce_of_a_ring() -> None:
    assert simulate.all_reduce(1e9, 1, 1e9, 1.0) == 0
    # Each of the four sends six times a quarter.
    assert simulate.all_reduce(1e9, 4, 1e9, 0.5) == pytest.approx(6 * (0.25 + 0.5))


# Three layers: 0 makes what 1 needs; what 1 makes goes to 2, and 2 takes from 0, too.
_VALUES = {
    Holders(frozenset({0}), CALLER, frozenset({0})): 100.0,  # the batch
    Holders(frozenset({0}), None, frozenset()): 10.0,  # of layer 0 alone
    Holders(frozenset({1, 2}), 0, frozenset({1, 2})): 1.0,
    Holders(frozenset(), 1, frozenset({2})): 1000.0,
    Holders(frozenset({2}), 2, frozenset({CALLER})): 10000.0,
}


def _profile(batch: int = 64) -> Profile:
    """A micro-batch of n samples takes each layer n + 1, and twice that back."""
    return Profile(
        names=["a", "b", "c"],
        weights=[Weights(1, 2, 3), Weights(10, 20, 30), Weights(100, 200, 300)],
        rest=Weights(1000, 0, 0),
        batch=batch,
        least=1,
        samples=[
            Sample(
                chunks=chunks,
                size=batch / chunks,
                forward=[batch / chunks + 1] * 3,
                backward=[2 * (batch / chunks + 1)] * 3,
                weights=[batch / chunks + 1] * 3,
                overhead=(0.5, 0.25),
                own=100.0 + chunks,
                values={who: size * batch / chunks for who, size in _VALUES.items()},
            )
            for chunks in (1, 4, 16)
        ],
    )


def _stages(*starts: int) -> Stages:
    return Stages(_profile(), [LayerRange(*pair) for pair in itertools.pairwise([0, *starts, 3])])


def test_what_was_not_measured_lies_on_the_line_between() -> None:
    stages = _stages(1)
    assert stages.costs(8).forward == pytest.approx([9.5, 18.5])
    assert stages.costs(32).backward == pytest.approx([66.25, 132.25])
    assert stages.costs(1).forward[0] == pytest.approx(2.5)  # beyond what was measured
    assert _profile().own(8) == pytest.approx(108)


def test_links_carry_what_other_stages_take() -> None:
    apart = _stages(1, 2).costs(1)
    assert apart.sent == pytest.approx({Link(0, 1): 1, Link(0, 2): 1, Link(1, 2): 1000})
    assert apart.received == pytest.approx([0, 1, 1001])
    assert _stages(2).costs(1).sent == pytest.approx({Link(0, 1): 1001})


def test_links_go_one_way() -> None:
    profile = _profile()
    back = {Holders(frozenset(), 2, frozenset({0})): 7.0, **_VALUES}
    samples = [replace(sample, values=back) for sample in profile.samples]
    stages = Stages(replace(profile, samples=samples), [LayerRange(0, 2), LayerRange(2, 3)])
    assert [*stages.costs(1).sent] == [Link(0, 1)]


def test_memory_of_each_way_to_checkpoint() -> None:
    # Both stages: what their layers keep, and what passes between them; the batch is not passed.
    weights = [1 + 2 + 3 + 10 + 20 + 30 + 1000, 100 + 200 + 300]
    cases: dict[Checkpoint, list[int]] = {
        "never": [64 * 1111, 64 * 11001],
        "except_last": [16 * 1111, 3 * 16 * 1001 + 16 * 11001],
        "always": [16 * 1111, 4 * 16 * 1001 + 16 * 11001],
    }
    for checkpoint, expected in cases.items():
        found = memory(_stages(2), 4, checkpoint)
        assert found == pytest.approx([a + b for a, b in zip(weights, expected, strict=True)])


def test_memory_of_several_stages_on_a_device() -> None:
    weights = 1 + 2 + 3 + 10 + 20 + 30 + 1000 + 100 + 200 + 300
    cases: dict[Checkpoint, int] = {
        "never": 64 * 1111 + 64 * 11001,
        "except_last": 3 * 16 * 1001 + 16 * 1111 + 16 * 11001,
        "always": 4 * 16 * 1001 + 16 * 11001,
    }
    for checkpoint, expected in cases.items():
        found = memory(_stages(2), 4, checkpoint, devices=1)
        assert found == pytest.approx([weights + expected])


def test_several_stages_on_a_device_are_compared() -> None:
    options = Options(stages=[1, 2], stages_per_device=[1, 2], chunks=[4], replicas=[1, 2])
    plan = predict(_profile(), replace(options, checkpoint=["never"]))
    found = {(row.stages, row.stages_per_device, row.replicas): row for row in plan.rows}
    assert {shape: row.devices for shape, row in found.items()} == {
        **{(1, 1, 1): 1, (1, 1, 2): 2, (2, 1, 1): 2, (2, 1, 2): 4},
        **{(2, 2, 1): 1, (2, 2, 2): 2},
    }
    assert plan.left_out == ["stages 1 with 2 on each device: no multiple of it"]
    one = found[2, 2, 1]
    assert one.bubble == 0
    assert one.memory == pytest.approx(sum(found[2, 1, 1].memory_of_devices))
    # The same work as in one stage, and once more what a task takes beside its layers.
    assert one.seconds == pytest.approx(found[1, 1, 1].seconds + 4 * 0.75)


def test_stages_of_a_device_are_even_together() -> None:
    # The slowest stage is the same for each of these cuts, but not what devices have in all.
    seconds = [3.0, 3.0, 2.0, 5.0, 3.0, 4.0, 3.0]
    profile = Profile(
        names=[str(layer) for layer in range(len(seconds))],
        weights=[Weights(1, 1, 1)] * len(seconds),
        rest=Weights(0, 0, 0),
        batch=16,
        least=1,
        samples=[
            Sample(
                chunks=8,
                size=2,
                forward=seconds,
                backward=[2 * s for s in seconds],
                weights=seconds,
                overhead=(0.0, 0.0),
                own=0.0,
                values={},
            )
        ],
    )
    options = Options(stages=[4], stages_per_device=[2], chunks=[8], replicas=[1])
    (row,) = predict(profile, replace(options, checkpoint=["never"])).rows
    by_largest = replace(profile, split_at=["2", "4", "5"])
    (other,) = predict(by_largest, replace(options, checkpoint=["never"])).rows
    assert row.seconds < 0.97 * other.seconds
    # A cut that is given is kept.
    assert other.split_at == by_largest.split_at


def test_deferred_gradients_shorten_a_step_by_what_others_wait_for() -> None:
    options = Options(stages=[3], chunks=[4], replicas=[1], checkpoint=["never"], latency=0.0)
    options = replace(options, bandwidth=1e30, defer_weight_gradients=[False, True])
    whole, deferred = predict(_profile(), options).rows
    # Two stages need not wait for the gradients of the weights behind them: 17 seconds each.
    assert deferred.seconds == pytest.approx(whole.seconds - 2 * 17)
    assert (whole.defer_weight_gradients, deferred.defer_weight_gradients) == (False, True)


def test_checkpointing_takes_longer_and_less_memory() -> None:
    options = Options(
        stages=[3], chunks=[8], replicas=[1], checkpoint=["never", "except_last", "always"]
    )
    never, except_last, always = predict(_profile(), options).rows
    assert never.seconds < except_last.seconds < always.seconds
    assert never.memory > except_last.memory
    assert always.memory == pytest.approx(except_last.memory, rel=0.2)


def test_step_is_its_own_work_and_the_passage() -> None:
    options = Options(stages=[1], chunks=[4], replicas=[1], checkpoint=["never"])
    (row,) = predict(_profile(), options).rows
    assert row.seconds == pytest.approx(104 + 4 * (3 * 17 * 3 + 0.75))
    assert row.bubble == 0


def test_replicas_take_a_batch_each_and_sum_their_gradients() -> None:
    options = Options(
        stages=[1], chunks=[4], replicas=[1, 4], checkpoint=["never"], bandwidth=222.0, latency=0.0
    )
    one, four = predict(_profile(), options).rows
    assert four.devices == 4
    assert four.all_reduce == pytest.approx(1.5)
    assert four.seconds == pytest.approx(one.seconds + 1.5)
    assert four.samples_per_second == pytest.approx(4 * 64 / four.seconds)


def test_what_is_not_possible_is_left_out_and_said() -> None:
    plan = predict(_profile(), Options(stages=[2, 4, 8], chunks=[1, 128]))
    assert {(row.stages, row.chunks) for row in plan.rows} == {(2, 1)}
    assert plan.left_out == [
        "stages 4, 8: the model can be cut into 3 at most",
        "chunks 128: too many for a batch of 64 samples",
    ]


def test_best_is_the_quickest_that_fits() -> None:
    fitting = Options(memory=100_000.0, stages=[1, 2, 3], chunks=[1, 4, 16])
    plan = predict(_profile(), fitting)
    best = plan.best()
    assert [row.devices for row in best] == sorted({row.devices for row in plan.rows if row.fits})
    assert all(row.memory <= 100_000 for row in best)
    for row in best:
        others = [r for r in plan.rows if r.devices == row.devices and r.fits]
        assert row.samples_per_second == max(r.samples_per_second for r in others)


def test_more_bandwidth_is_never_slower() -> None:
    plans = [predict(_profile(), Options(bandwidth=10.0**n)).rows for n in (3, 6, 9)]
    for slow, medium, quick in zip(*plans, strict=True):
        assert slow.seconds >= medium.seconds >= quick.seconds


def test_stages_begin_where_the_user_wants() -> None:
    profile = replace(_profile(), split_at=["c"])
    plan = predict(profile, Options(stages=[2, 3], chunks=[4], replicas=[1]))
    assert [row.split_at for row in plan.rows] == [["c"], ["c"], ["b", "c"], ["b", "c"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": []}, r"stages=\[\]: give numbers of at least 1"),
        ({"stages_per_device": [0]}, r"stages_per_device=\[0\]: give numbers of at least 1"),
        ({"chunks": [4, 0]}, r"chunks=\[4, 0\]: give numbers of at least 1"),
        ({"defer_weight_gradients": []}, r"defer_weight_gradients=\[\]: give at least one"),
        ({"checkpoint": []}, r"checkpoint=\[\]: give at least one"),
        ({"bandwidth": 0.0}, r"bandwidth=0.0: give more than 0"),
        ({"latency": -1.0}, r"latency=-1.0: give 0 or more"),
    ],
)
def test_options_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**arguments)  # type: ignore[arg-type]


def _work(made: simulate.SimulatedTimes) -> list[tuple[Task, simulate.TimeSpan]]:
    later = ((task, span) for task, spans in made.later.items() for span in spans)
    return [*made.tasks.items(), *later]


def _assert_apart(spans: list[simulate.TimeSpan]) -> None:
    for earlier, later in itertools.pairwise(sorted(spans)):
        assert earlier.end <= later.start
