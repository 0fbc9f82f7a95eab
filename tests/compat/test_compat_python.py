"""What is used of CPython beside its documentation."""

import itertools
import threading
import warnings

from lightning_mgpu._compat import python


def test_raise_in_thread_ends_it() -> None:
    class Stop(BaseException):
        pass

    started, ended = threading.Event(), threading.Event()

    def wait() -> None:
        try:
            for _ in itertools.repeat(None):
                started.set()
        except Stop:
            ended.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert started.wait(30)
    assert thread.ident is not None
    assert python.raise_in_thread(thread.ident, Stop)
    assert ended.wait(30)


def test_raise_in_thread_tells_of_one_that_is_gone() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert thread.ident is not None
    assert not python.raise_in_thread(thread.ident, ValueError)


def test_stack_of_shows_another_thread() -> None:
    started, end = threading.Event(), threading.Event()

    def wait_for_the_test() -> None:
        started.set()
        end.wait(30)

    thread = threading.Thread(target=wait_for_the_test)
    thread.start()
    try:
        assert started.wait(30)
        assert thread.ident is not None
        assert "wait_for_the_test" in [call.name for call in python.stack_of(thread.ident)]
    finally:
        end.set()
        thread.join()
    assert python.stack_of(thread.ident) == []


def test_set_warning_filters_replaces_them_and_what_was_decided_by_them() -> None:
    def warn() -> None:
        warnings.warn("of the test", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        ignoring = ("ignore", None, UserWarning, None, 0)
        python.set_warning_filters([ignoring])
        warn()
        assert warnings.filters == [ignoring]
        # "default" warns once from each place, which is noted at the module that warns.
        python.set_warning_filters([("default", None, UserWarning, None, 0)])
        warn()
        warn()
        assert len(caught) == 1
        python.set_warning_filters([("default", None, UserWarning, None, 0)])
        warn()
        assert len(caught) == 2


def test_offsets_after_constants_tells_constants_from_variables() -> None:
    seen = []

    class Number:
        def __add__(self, other: int) -> "Number":
            import inspect

            here = inspect.currentframe()
            assert here is not None
            assert here.f_back is not None
            caller = here.f_back
            seen.append(caller.f_lasti in python.offsets_after_constants(caller.f_code))
            return self

    number, two = Number(), 2
    number + two
    number + 2
    number + 100_000
    number += 1
    number += two
    assert seen == [False, True, True, True, False]
