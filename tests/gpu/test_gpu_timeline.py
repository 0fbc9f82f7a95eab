"""Time and memory of the GPU, as recorded."""

import itertools
import time

import gpu_models as models
import pytest
import torch
from gpu_runs import CPU, GPU, ON_GPU, fitted, pipeline
from torch import Tensor, nn

from lightning_mgpu.engine.device import clock, copied, synchronize
from lightning_mgpu.engine.pipeline.profile.recording import Recording

CYCLES = 20_000_000  # of the GPU's clock, ten milliseconds or more


def test_clock_tells_the_time_that_the_gpu_takes() -> None:
    if not ON_GPU:
        pytest.skip("the CPU has no time of its own")
    tells = clock(GPU)
    started = time.perf_counter()
    before = tells.now()
    torch.cuda._sleep(CYCLES)
    after = tells.now()
    asked = time.perf_counter() - started
    synchronize([GPU])
    took = time.perf_counter() - started
    measured = tells.seconds(after) - tells.seconds(before)
    assert asked < measured <= took
    assert started <= tells.seconds(before) + 1e-3
    assert tells.seconds(after) <= time.perf_counter() + 1e-3


class Slow(models.SinglePrecision):
    """Whose stages take some time on the GPU."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            if ON_GPU:
                torch.cuda._sleep(CYCLES)
            return self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.Layer(), self.Layer(), nn.Linear(6, 3))


@pytest.mark.parametrize("devices", [(GPU, GPU), (CPU, GPU)], ids=["gpus", "both"])
def test_timeline_shows_the_time_of_the_device(devices: tuple[torch.device, ...]) -> None:
    taken = []

    class Watched(Slow):
        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            engine = self.trainer.strategy._pipeline
            if engine.recording is None and batch_idx == 2:
                engine.recording = Recording(engine.devices)
                taken.append(engine.recording)

        def on_train_batch_end(self, *args: object) -> None:
            self.trainer.strategy._pipeline.recording = None

    strategy = pipeline(*devices, split_at="net.1", parity_check="off")
    fitted(strategy, Watched(), max_steps=4, test=False)
    timeline = taken[0].timeline()
    forward = {(s.stage, s.chunk): s for s in timeline.spans if s.kind == "forward"}
    assert forward.keys() == set(itertools.product(range(2), range(4)))
    assert {(s.stage, s.chunk) for s in timeline.spans if s.kind == "backward"} == forward.keys()
    for chunk in range(4):
        assert forward[0, chunk].end <= forward[1, chunk].start + 1e-3
    if ON_GPU:
        at_least = CYCLES / 3e9
        assert all(span.end - span.start > at_least for (s, _), span in forward.items() if s == 1)


def test_copies_to_the_host_have_arrived() -> None:
    if not ON_GPU:
        pytest.skip("the CPU waits for nothing")
    for _ in range(5):
        tensor = torch.zeros(2**22, device=GPU)
        torch.cuda._sleep(CYCLES)
        tensor.fill_(7)
        assert bool((copied(tensor, CPU) == 7).all())
