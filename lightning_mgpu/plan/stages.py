"""Costs of stages made of measured layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from lightning_mgpu.engine.pipeline.partition.simulate import Link
from lightning_mgpu.plan.ledger import CALLER, Holders
from lightning_mgpu.plan.profile import LayerRange, Profile, Sample, on_line


@dataclass
class Costs:
    """Costs of each stage for one micro-batch.

    Attributes:
        forward: Seconds.
        backward: Seconds, without computing anything again.
        weights: Of these, the seconds for gradients of weights that can come later.
        held: Bytes that a stage keeps until its backward.
        received: Bytes that come to a stage.
        sent: Bytes that go over each link.
    """

    forward: list[float]
    backward: list[float]
    weights: list[float]
    held: list[float]
    received: list[float]
    sent: dict[Link, float] = field(default_factory=dict)


class Stages:
    """A profile's layers, distributed to stages.

    What was not measured is taken to lie on a line between the micro-batches that were: small
    operations are less efficient, so that nothing is just proportional to their size.

    Args:
        profile: The layers.
        spans: Those of each stage.
    """

    def __init__(self, profile: Profile, spans: Sequence[LayerRange]) -> None:
        self.profile, self.spans = profile, list(spans)
        self._measured = [(sample.size, _costs(sample, self.spans)) for sample in profile.samples]
        self._known: dict[int, Costs] = {}

    def __len__(self) -> int:
        return len(self.spans)

    def costs(self, size: int) -> Costs:
        """Costs of each stage for a micro-batch of `size` samples."""
        if size not in self._known:
            self._known[size] = Costs(
                self._each(size, lambda costs: costs.forward),
                self._each(size, lambda costs: costs.backward),
                self._each(size, lambda costs: costs.weights),
                self._each(size, lambda costs: costs.held),
                self._each(size, lambda costs: costs.received),
                self._sent(size),
            )
        return self._known[size]

    def _each(self, size: int, of: Callable[[Costs], list[float]]) -> list[float]:
        columns = zip(*(of(costs) for _, costs in self._measured), strict=True)
        sizes = [measured for measured, _ in self._measured]
        return [on_line(list(zip(sizes, column, strict=True)), size) for column in columns]

    def _sent(self, size: int) -> dict[Link, float]:
        points: dict[Link, list[tuple[float, float]]] = {}
        for measured, costs in self._measured:
            for link, sent in costs.sent.items():
                points.setdefault(link, []).append((measured, sent))
        return {link: on_line(of_link, size) for link, of_link in points.items()}


def _costs(sample: Sample, spans: Sequence[LayerRange]) -> Costs:
    forward, backward = (
        [overhead + until[span.end] - until[span.first] for span in spans]
        for overhead, until in zip(
            sample.overhead,
            ([0.0, *accumulate(seconds)] for seconds in (sample.forward, sample.backward)),
            strict=True,
        )
    )
    weights = [sum(sample.weights[span.first : span.end]) for span in spans]
    costs = Costs(forward, backward, weights, [0.0] * len(spans), [0.0] * len(spans))
    _count(costs, sample.values, [stage for stage, span in enumerate(spans) for _ in range(*span)])
    return costs


def _count(costs: Costs, values: Mapping[Holders, float], stage_of: Sequence[int]) -> None:
    """Count all bytes.

    Args:
        costs: Where they are added.
        values: The bytes, by the layers that hold them.
        stage_of: The stage of each layer.
    """
    for who, size in values.items():
        holders = {stage_of[layer] for layer in who.keepers}
        if who.producer is not None:
            # The batch lies with the first stage.
            sender = 0 if who.producer == CALLER else stage_of[who.producer]
            receivers = {stage_of[layer] for layer in who.consumers if layer != CALLER}
            # What goes back, in a branch that is seldom taken, has no place in the timetable.
            receivers = {stage for stage in receivers if stage > sender}
            if who.producer != CALLER and (receivers or CALLER in who.consumers):
                holders.add(sender)
            for receiver in receivers:
                holders.add(receiver)
                costs.received[receiver] += size
                link = Link(sender, receiver)
                costs.sent[link] = costs.sent.get(link, 0.0) + size
        for stage in holders:
            costs.held[stage] += size
