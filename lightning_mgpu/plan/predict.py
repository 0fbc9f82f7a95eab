"""What each pipeline would take, from what the layers of its stages do."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from lightning_mgpu.engine.pipelining import simulate
from lightning_mgpu.engine.pipelining.balance import balance
from lightning_mgpu.engine.pipelining.simulate import Load
from lightning_mgpu.plan.options import Checkpoint, Options
from lightning_mgpu.plan.profile import Profile, Span

__all__: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pipeline, or several copies of it, and what is to be expected of it."""

    devices: int
    stages: int
    replicas: int
    chunks: int
    """Micro-batches."""
    checkpoint: Checkpoint
    seconds: float
    """Of a training step."""
    samples_per_second: float
    """Of all replicas together."""
    bubble: float
    """The share of forward and backward in which stages wait."""
    all_reduce: float
    """Seconds in which replicas sum their gradients."""
    memory: float
    """Bytes of the stage that takes most."""
    fits: bool
    """Whether a device has as much."""
    memory_of_stages: list[float]
    split_at: list[str]
    """Layers at which the second and later stages begin."""


@dataclass(frozen=True)
class Plan:
    """Predictions.

    Attributes:
        profile: What they are made from.
        rows: One for each combination that is possible, as fits the options' order.
        left_out: What is not possible, and why.
    """

    profile: Profile
    rows: list[Row]
    left_out: list[str] = field(default_factory=list)

    def best(self) -> list[Row]:
        """For each number of devices, the quickest row that fits them."""
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
        for spans in (_cut(profile, count) for count in stages)
        for count in chunks
        for checkpoint in options.checkpoint
        for row in _rows(profile, options, spans, count, checkpoint)
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
    return Plan(profile, rows, left_out)


def step_seconds(
    profile: Profile, spans: Sequence[Span], chunks: int, checkpoint: Checkpoint, options: Options
) -> tuple[float, float]:
    """Seconds of a step without replicas, and the share of its passage in which stages wait."""
    passed = simulate.passage(_load(profile, spans, chunks, checkpoint, options))
    return profile.own(chunks) + passed.seconds, passed.waiting


def memory(profile: Profile, span: Span, chunks: int, checkpoint: Checkpoint) -> float:
    """The most bytes that a stage takes at once: weights, and activations of all micro-batches."""
    sizes = profile.sizes(chunks)
    whole = [profile.held(span, size) for size in sizes]
    inputs = [profile.received(span, size) for size in sizes]
    kept = {
        "never": sum(whole),
        # What is computed again is so from a copy of its inputs.
        "except_last": sum(inputs[:-1]) + max(whole),
        "always": sum(inputs) + max(whole),
    }[checkpoint]
    return profile.weights_of(span).total + kept


def _rows(
    profile: Profile, options: Options, spans: list[Span], chunks: int, checkpoint: Checkpoint
) -> Iterator[Row]:
    alone, bubble = step_seconds(profile, spans, chunks, checkpoint, options)
    taken = [memory(profile, span, chunks, checkpoint) for span in spans]
    gradients = max(profile.weights_of(span).gradients for span in spans)
    for replicas in options.replicas:
        summing = simulate.all_reduce(gradients, replicas, options.bandwidth, options.latency)
        yield Row(
            devices=len(spans) * replicas,
            stages=len(spans),
            replicas=replicas,
            chunks=chunks,
            checkpoint=checkpoint,
            seconds=alone + summing,
            samples_per_second=replicas * profile.batch / (alone + summing),
            bubble=bubble,
            all_reduce=summing,
            memory=max(taken),
            fits=options.memory is None or max(taken) <= options.memory,
            memory_of_stages=taken,
            split_at=[profile.names[span.first] for span in spans[1:]],
        )


def _cut(profile: Profile, stages: int) -> list[Span]:
    """The layers of each stage: as the user wants, or so that the slowest is as quick as can be."""
    if len(profile.split_at) == stages - 1:
        starts = [0, *map(profile.names.index, profile.split_at)]
    else:
        # Of the sizes that were measured, one in the middle: where to cut hardly depends on it.
        sample = profile.samples[len(profile.samples) // 2]
        costs = [f + b for f, b in zip(sample.forward, sample.backward, strict=True)]
        starts = [0, *accumulate(balance(costs, stages)[:-1])]
    return [Span(*pair) for pair in pairwise([*starts, len(profile.names)])]


def _load(
    profile: Profile, spans: Sequence[Span], chunks: int, checkpoint: Checkpoint, options: Options
) -> Load:
    sizes = profile.sizes(chunks)

    def of_size(seconds: Mapping[int, float]) -> list[float]:
        return [seconds[size] for size in sizes]

    different = sorted(set(sizes))
    forward = [of_size({n: profile.forward(span, n) for n in different}) for span in spans]
    backward = [of_size({n: profile.backward(span, n) for n in different}) for span in spans]
    if checkpoint != "never":
        again = chunks - 1 if checkpoint == "except_last" else chunks
        backward = [
            [
                b + (f if chunk < again else 0.0)
                for chunk, (f, b) in enumerate(zip(*pair, strict=True))
            ]
            for pair in zip(forward, backward, strict=True)
        ]
    sent = {n: profile.links(spans, n) for n in different}
    links = {
        link: of_size({n: options.latency + sent[n][link] / options.bandwidth for n in different})
        for link in sent[sizes[0]]
    }
    return Load(forward, backward, links)
