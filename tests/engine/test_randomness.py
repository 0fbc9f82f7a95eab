"""Random numbers of tasks on several threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mgpu.engine.device import HOST
from lightning_mgpu.engine.randomness import RandomStreams


@pytest.fixture(autouse=True)
def generator_as_it_was() -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(1)
    yield
    torch.set_rng_state(state)


def started() -> RandomStreams:
    streams = RandomStreams()
    streams.restart()
    return streams


def draw(
    streams: RandomStreams, function: Callable[[], Tensor], order: tuple[int, ...] = (0, 1)
) -> list[Tensor]:
    """What `function` draws in each of two slots, run in some order on threads of their own."""
    found: dict[int, Tensor] = {}

    def task(slot: int) -> None:
        with entered[slot].entered():
            found[slot] = function()

    with streams.step("step", 2) as entered, ThreadPoolExecutor(1) as executor:
        for slot in order:
            executor.submit(task, slot).result()
    return [found[0], found[1]]


DRAWS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(4),
    "randn": lambda: torch.randn(4, dtype=torch.float64),
    "randint": lambda: torch.randint(10**6, (4,)),
    "randperm": lambda: torch.randperm(50),
    "normal_": lambda: torch.empty(4).normal_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((64,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(50), 10),
    "dropout": lambda: nn.functional.dropout(torch.ones(64)),
    "native_dropout": lambda: torch.native_dropout(torch.ones(64), 0.5, True)[0],
    "rrelu": lambda: nn.functional.rrelu(-torch.ones(8), training=True),
    "lstm": lambda: nn.LSTM(3, 64, num_layers=2, dropout=0.5)(torch.ones(2, 1, 3))[0],
    "distribution": lambda: torch.distributions.Gamma(1.0, 1.0).sample((4,)),
    "attention": lambda: nn.functional.scaled_dot_product_attention(
        *[torch.ones(1, 8, 4).cumsum(1) for _ in range(3)], dropout_p=0.5
    ),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("inference", [False, True])
def test_draws_depend_on_slot_and_seed_and_not_on_order(name: str, inference: bool) -> None:
    def function() -> Tensor:
        with torch.inference_mode(inference):
            return DRAWS[name]()

    first = draw(started(), function)
    second = draw(started(), function, order=(1, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)
    torch.manual_seed(2)
    assert not torch.equal(draw(started(), function)[0], first[0])


def test_steps_differ() -> None:
    streams = started()
    first, second = (draw(streams, lambda: torch.rand(4)) for _ in range(2))
    assert not torch.equal(first[0], second[0])


def test_callers_generator_is_not_drawn_from() -> None:
    before = torch.get_rng_state()
    draw(started(), lambda: torch.rand(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_callers_generator_moves_on_if_something_was_drawn() -> None:
    before = torch.get_rng_state()
    idle = started()
    draw(idle, lambda: torch.ones(4))
    idle.finish()
    assert torch.equal(torch.get_rng_state(), before)
    used = started()
    draw(used, lambda: torch.rand(4))
    used.finish()
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_stream_goes_on_where_it_was_left() -> None:
    with started().step("step", 1) as (stream,):
        with stream.entered():
            first = torch.rand(4)
        with stream.entered():
            second = torch.rand(4)
    assert not torch.equal(first, second)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", DRAWS)
def test_numbers_drawn_again_while_their_stream_is_entered_are_the_same(name: str) -> None:
    with started().step("step", 1) as (stream,):
        with stream.entered():
            state = stream.state(HOST)
            first, second = DRAWS[name](), DRAWS[name]()
        with stream.entered():
            with stream.at(state, HOST):
                again = [DRAWS[name](), DRAWS[name]()]
            third = DRAWS[name]()
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(second, third)


def test_generators_that_are_given_are_used() -> None:
    def function() -> Tensor:
        return torch.rand(4, generator=torch.Generator().manual_seed(3))

    first, second = draw(started(), function)
    assert torch.equal(first, second)


def test_state_of_the_generator_is_the_streams_own() -> None:
    def function() -> Tensor:
        state = torch.get_rng_state()
        first = torch.rand(4)
        torch.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
        torch.manual_seed(7)
        return torch.rand(4)

    before = torch.get_rng_state()
    first, second = draw(started(), function)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.random.default_generator is torch.default_generator


def test_kinds_that_draw_nothing_pay_nothing() -> None:
    streams = started()
    modes: list[Any] = []
    for _ in range(2):
        draw(streams, lambda: modes.append(torch._C._len_torch_dispatch_stack()) or torch.ones(1))
    assert modes == [1, 1, 0, 0]


def test_attention_without_dropout_draws_nothing() -> None:
    streams = started()
    modes: list[int] = []

    def attend() -> Tensor:
        modes.append(torch._C._len_torch_dispatch_stack())
        inputs = [torch.ones(1, 1, 8, 4, requires_grad=True) for _ in range(3)]
        nn.functional.scaled_dot_product_attention(*inputs).sum().backward()
        return inputs[0]

    for _ in range(2):
        draw(streams, attend)
    assert modes == [1, 1, 0, 0]


def test_kind_that_draws_late_is_told_and_repeats_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streams, again = started(), started()
    for each in (streams, again):
        draw(each, lambda: torch.ones(1))
        draw(each, lambda: torch.rand(1))
    assert caplog.text.count("step drew random numbers for the first time") == 2
    first = draw(streams, lambda: torch.rand(4), order=(0, 1))
    second = draw(again, lambda: torch.rand(4), order=(1, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
