"""What signals do to a sweep."""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps import command, environment_for, resume_argument

from lightning_mgpu.sweep.driver.interrupts import Interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def ended() -> Iterator[list[int]]:
    """What Ray Tune's handler for the end of a search was called with; ours are put back."""
    called: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield called
    for signum, handler in before.items():
        signal.signal(signum, handler)


def searching(interrupts: Interrupts, ended: list[int], **given: Callable[[], None]) -> None:
    """As Ray Tune does at the beginning of a search."""
    signal.signal(signal.SIGUSR1, lambda signum, _: ended.append(signum))
    interrupts.save_by(given.get("save", lambda: None), lambda: None)
    interrupts.end_search(given.get("before", lambda: None))


def test_handlers_are_those_of_before_at_the_end(ended: list[int]) -> None:
    def own(*_: Any) -> None: ...

    for signum in SIGNALS:
        signal.signal(signum, own)
    with Interrupts() as interrupts:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as `ray.init` does
        interrupts.listen()
        searching(interrupts, ended)
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.signum == signal.SIGTERM
    assert [signal.getsignal(signum) for signum in SIGNALS] == [own] * 3


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("ended")
def test_signal_before_the_search_ends_the_block(signum: signal.Signals) -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signum)
        pytest.fail("goes on")
    assert interrupts.signum == signum


@pytest.mark.usefixtures("ended")
def test_signal_is_recorded_that_ray_has_handled_itself() -> None:
    with Interrupts() as interrupts:
        raise SystemExit(signal.SIGTERM)
    assert interrupts.signum == signal.SIGTERM


@pytest.mark.usefixtures("ended")
def test_other_exits_and_interrupts_pass() -> None:
    for error in (SystemExit(1), KeyboardInterrupt("1")):
        with pytest.raises(type(error), match="1"), Interrupts():
            raise error


def test_first_signal_saves_and_ends_the_search_and_the_second_ends_the_block(
    ended: list[int],
) -> None:
    order: list[str] = []
    with Interrupts() as interrupts:
        searching(
            interrupts,
            ended,
            save=lambda: order.append("save"),
            before=lambda: order.append("before"),
        )
        signal.raise_signal(signal.SIGINT)
        assert (order, ended) == (["save", "before"], [signal.SIGUSR1])
        order.append("goes on")
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("goes on")
    assert order == ["save", "before", "goes on"]
    assert interrupts.signum == signal.SIGINT


def test_results_are_written_whatever_comes(ended: list[int]) -> None:
    with Interrupts() as interrupts:
        searching(interrupts, ended)
        interrupts.hold()
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        ended.append(0)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("goes on")
    assert ended == [0]
    assert interrupts.signum == signal.SIGINT


def test_signals_are_left_alone_outside_of_the_main_thread() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    found = []

    def run() -> None:
        with Interrupts() as interrupts:
            interrupts.listen()
            interrupts.end_search(lambda: None)
            interrupts.hold()
            found.extend(signal.getsignal(signum) for signum in SIGNALS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == before


@pytest.mark.slow
def test_sweep_on_a_ray_of_its_own_leaves_results_and_nothing_else_behind(
    eventually: Callable[..., None],
) -> None:
    """With a second signal while the first is at work, as `timeout` sends it."""
    short = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets lie there
    process = subprocess.Popen(
        command(
            "slow_app.py",
            None,
            *("x=1,2,3", "hydra/sweeper/search_alg=grid", "hydra.sweeper.ray.num_cpus=1"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment_for("sweep"), "TMPDIR": str(short)},
    )
    try:
        Path("go-1").touch()
        eventually(Path("began-2").exists, 120)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        left = [name for name in os.listdir(short) if name.startswith("ray-")]
    finally:
        process.kill()
        shutil.rmtree(short)
    assert process.returncode == 143, out
    assert "Traceback" not in out
    assert "***" not in out  # as the stack of native code begins
    assert resume_argument(out) == f"hydra.sweeper.resume={Path('sweep').absolute()}"
    saved = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    assert saved["trials"][0]["status"] == "done"
    assert left == []
