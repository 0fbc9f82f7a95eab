"""Predict time and memory of pipelines from measurements of their layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from lightning_mgpu.engine.pipeline.partition import simulate
from lightning_mgpu.engine.pipeline.partition.balance import balance
from lightning_mgpu.engine.pipeline.partition.simulate import Load
from lightning_mgpu.engine.pipeline.partition.stage_planner import quickest_cut, tries
from lightning_mgpu.engine.pipeline.runtime.checkpointing import Checkpoint, computed_again
from lightning_mgpu.plan.options import Options
from lightning_mgpu.plan.profile import LayerRange, Profile
from lightning_mgpu.plan.stages import Stages


@dataclass(frozen=True, kw_only=True)
class Row:
    """Prediction for one pipeline, or several copies of it."""

    devices: int
    stages: int
    stages_per_device: int
    replicas: int
    chunks: int
    """Micro-batches per batch."""
    checkpoint: Checkpoint
    defer_weight_gradients: bool
    seconds: float
    """Seconds per training step."""
    samples_per_second: float
    """Samples per second of all replicas together."""
    bubble: float
    """Share of forward and backward in which devices wait."""
    all_reduce: float
    """Seconds in which replicas sum their gradients."""
    memory: float
    """Peak bytes of the device that needs most."""
    fits: bool
    """True if each device has enough memory."""
    memory_of_devices: list[float]
    """Peak bytes per device of one pipeline."""
    split_at: list[str]
    """Layers at which the second and later stages begin."""


@dataclass(frozen=True)
class Plan:
    """All predictions.

    Attributes:
        profile: What they are made from.
        rows: One for each combination that is possible, as fits the options' order.
        left_out: What is not possible, and why.
    """

    profile: Profile
    rows: list[Row]
    left_out: list[str] = field(default_factory=list)

    def best(self) -> list[Row]:
        """The fastest row that fits the devices, for each number of devices."""
        found: dict[int, Row] = {}
        for row in self.rows:
            known = found.get(row.devices)
            if row.fits and (known is None or row.samples_per_second > known.samples_per_second):
                found[row.devices] = row
        return [row for _, row in sorted(found.items())]


def predict(profile: Profile, options: Options) -> Plan:
    """Predict every combination that the options name and that is possible."""
    most = len(profile.names)
    stages = [count for count in options.stages if count <= most]
    chunks = [count for count in options.chunks if len(profile.sizes(count)) == count]
    rows = [
        row
        for number in stages
        for per_device in options.stages_per_device
        if not number % per_device
        for cut in (Stages(profile, _cut(profile, number, per_device, options)),)
        for count in chunks
        for checkpoint in options.checkpoint
        for deferred in options.defer_weight_gradients
        for row in _rows(cut, options, per_device, count, checkpoint, deferred)
    ]
    small = f"a batch of {profile.batch} samples"
    if profile.least > 1:
        small += f", of which batch normalisation needs {profile.least}"
    left_out = [
        f"{name} {', '.join(str(count) for count in wanted if count not in possible)}: {reason}"
        for name, wanted, possible, reason in (
            ("stages", options.stages, stages, f"the model can be cut into {most} at most"),
            ("chunks", options.chunks, chunks, f"too many for {small}"),
        )
        if len(possible) < len(wanted)
    ]
    for per_device in options.stages_per_device:
        if odd := [count for count in stages if count % per_device]:
            left_out.append(
                f"stages {', '.join(map(str, odd))} with {per_device} on each device: no multiple"
                " of it"
            )
    return Plan(profile, rows, left_out)


def memory(
    stages: Stages, chunks: int, checkpoint: Checkpoint, devices: int | None = None
) -> list[float]:
    """Peak bytes per device: weights, and activations of all micro-batches.

    Args:
        stages: The stages.
        chunks: Micro-batches.
        checkpoint: Which of them keep only inputs.
        devices: How many there are; default: one for each stage.
    """
    costs = [stages.costs(size) for size in stages.profile.sizes(chunks)]
    count = devices or len(stages)
    taken = []
    for device in range(count):
        kept, last, again = 0.0, 0.0, 0.0
        for stage in range(device, len(stages), count):
            whole = [of_chunk.held[stage] for of_chunk in costs]
            inputs = [of_chunk.received[stage] for of_chunk in costs]
            kept += stages.profile.weights_of(stages.spans[stage]).total
            if checkpoint == "never":
                kept += sum(whole)
                continue
            # What is computed again is so from a copy of its inputs, one stage at a time.
            again = max(again, *whole)
            if checkpoint == "except_last":
                kept, last = kept + sum(inputs[:-1]), last + whole[-1]
            else:
                kept += sum(inputs)
        taken.append(kept + max(last, again))
    return taken


def _rows(
    stages: Stages,
    options: Options,
    per_device: int,
    chunks: int,
    checkpoint: Checkpoint,
    deferred: bool,
) -> Iterator[Row]:
    profile, devices = stages.profile, len(stages) // per_device
    load = _load(stages, devices, chunks, checkpoint, options, deferred)
    passed = simulate.passage(load, devices)
    alone = profile.own(chunks) + passed.seconds
    taken = memory(stages, chunks, checkpoint, devices)
    gradients = max(
        sum(profile.weights_of(span).gradients for span in stages.spans[device::devices])
        for device in range(devices)
    )
    for replicas in options.replicas:
        summing = simulate.all_reduce(gradients, replicas, options.bandwidth, options.latency)
        yield Row(
            devices=devices * replicas,
            stages=len(stages),
            stages_per_device=per_device,
            replicas=replicas,
            chunks=chunks,
            checkpoint=checkpoint,
            defer_weight_gradients=deferred,
            seconds=alone + summing,
            samples_per_second=replicas * profile.batch / (alone + summing),
            bubble=passed.waiting,
            all_reduce=summing,
            memory=max(taken),
            fits=options.memory is None or max(taken) <= options.memory,
            memory_of_devices=taken,
            split_at=[profile.names[span.first] for span in stages.spans[1:]],
        )


def _cut(profile: Profile, stages: int, per_device: int, options: Options) -> list[LayerRange]:
    """Layers of each stage: as the user wants, or so that a step is as short as possible."""
    if len(profile.split_at) == stages - 1:
        starts = [0, *map(profile.names.index, profile.split_at)]
        return _spans([*starts, len(profile.names)])
    # Of the sizes that were measured, one in the middle: where to cut hardly depends on it.
    sample = profile.samples[len(profile.samples) // 2]
    costs = [f + b for f, b in zip(sample.forward, sample.backward, strict=True)]
    bounds = [0, *accumulate(balance(costs, stages))]
    if per_device == 1:  # the slowest stage sets the pace
        return _spans(bounds)
    devices, deferred = stages // per_device, any(options.defer_weight_gradients)

    def seconds(tried: Sequence[int]) -> float:
        cut = Stages(profile, _spans(tried))
        load = _load(cut, devices, sample.chunks, "never", options, deferred)
        return simulate.passage(load, devices).seconds

    return _spans(quickest_cut(bounds, seconds, tries(stages, sample.chunks)))


def _spans(bounds: Sequence[int]) -> list[LayerRange]:
    return [LayerRange(*pair) for pair in pairwise(bounds)]


def _load(
    stages: Stages,
    devices: int,
    chunks: int,
    checkpoint: Checkpoint,
    options: Options,
    deferred: bool,
) -> Load:
    costs = [stages.costs(size) for size in stages.profile.sizes(chunks)]
    forward = _by_stage([of_chunk.forward for of_chunk in costs])
    backward = _by_stage([of_chunk.backward for of_chunk in costs])
    again = computed_again(checkpoint, chunks)
    for first, second in zip(forward, backward, strict=True):
        for chunk in range(again):
            second[chunk] += first[chunk]
    links = {
        link: [options.latency + of_chunk.sent[link] / options.bandwidth for of_chunk in costs]
        for link in costs[0].sent
        if (link.receiver - link.sender) % devices  # else it stays on the device
    }
    if not deferred:
        return Load(forward, backward, links)
    weights = _by_stage([of_chunk.weights for of_chunk in costs])
    for second, later in zip(backward, weights, strict=True):
        second[:] = [both - own for both, own in zip(second, later, strict=True)]
    return Load(forward, backward, links, weights)


def _by_stage(chunks: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(of_stage) for of_stage in zip(*chunks, strict=True)]
