"""Cut a row of layers into stages of about the same cost."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Cut a row of costs into stages so that the most expensive one is as cheap as possible.

    By dynamic programming over the number of stages and of layers ("linear partition").

    Args:
        costs: Of each layer, in order; not negative.
        stages: How many stages; at most as many as there are layers.

    Returns:
        Layers in each stage, at least one.
    """
    assert 1 <= stages <= len(costs), (stages, len(costs))
    until = [0.0, *accumulate(costs)]
    count = len(costs)
    # best[n]: the dearest stage's cost if the first n layers make the stages so far.
    best = list(until)
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        before, chosen = best, [0] * (count + 1)
        best = [float("inf")] * (count + 1)
        for end in range(stage + 1, count + 1):
            for start in range(stage, end):
                dearest = max(before[start], until[end] - until[start])
                if dearest < best[end]:
                    best[end], chosen[end] = dearest, start
        cuts.append(chosen)
    ends = [count]
    for chosen in reversed(cuts):
        ends.append(chosen[ends[-1]])
    ends.append(0)
    ends.reverse()
    return [end - start for start, end in pairwise(ends)]
