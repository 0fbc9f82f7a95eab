"""What a sweep says that it will run."""

import pytest

from hydra_plugins.ray_tune_sweeper.config import FifoConf, GridConf, RandomConf, RayTuneSweeperConf
from lightning_mgpu.sweep.settings.extent import extent
from lightning_mgpu.sweep.space.space import parse_space

LISTS = ("a=1,2,3", "b=range(0,8)")
REAL = ("a=1,2,3", "lr=interval(0.1,1)")
NONE: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("space", "asked", "trials", "expected"),
    [
        (LISTS, None, 24, "24 trials: 3 × 8."),
        (LISTS, 10, 10, "10 trials: the first of 24 combinations (3 × 8)."),
        (
            LISTS,
            50,
            24,
            "24 trials: 3 × 8; hydra.sweeper.num_samples=50 asks for more than there are.",
        ),
        (("a=1,2",), None, 2, "2 trials."),
        (NONE, None, 1, "1 trial: nothing is searched."),
    ],
)
def test_grid_says_its_shape(
    space: tuple[str, ...], asked: int | None, trials: int, expected: str
) -> None:
    options = RayTuneSweeperConf(search_alg=GridConf(), scheduler=FifoConf(), num_samples=asked)
    assert extent(options, parse_space({}, space), trials) == expected


@pytest.mark.parametrize(
    ("space", "asked", "trials", "expected"),
    [
        (REAL, 5, 5, "5 trials, chosen by hydra/sweeper/search_alg=random."),
        (REAL, None, 10, "10 trials (hydra.sweeper.num_samples is not set), chosen by"),
        (LISTS, 24, 24, "24 trials, chosen by"),
        (LISTS, 25, 25, "25 trials of 24 combinations (3 × 8), so that some run more than once."),
    ],
)
def test_search_says_how_many_trials_there_are_and_of_what(
    space: tuple[str, ...], asked: int | None, trials: int, expected: str
) -> None:
    options = RayTuneSweeperConf(search_alg=RandomConf(), scheduler=FifoConf(), num_samples=asked)
    assert extent(options, parse_space({}, space), trials).startswith(expected)
