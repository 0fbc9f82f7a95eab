"""Private or unstable names of CPython."""

import ctypes
import dis
import functools
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

frame_above: Callable[[int], types.FrameType] = sys._getframe
"""The frame so many calls above the one that asks; 0 is its own."""


def raise_in_thread(ident: int, kind: type[BaseException]) -> bool:
    """Have a thread raise at its next bytecode.

    This cannot be taken back: to set no exception makes CPython look for one at every turn, for as
    long as the process lives.

    Args:
        ident: The thread's, as `threading.get_ident` returns it.
        kind: The exception's class.

    Returns:
        Whether there is such a thread.
    """
    found: int = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(ident), ctypes.py_object(kind)
    )
    return found > 0


def stack_of(ident: int) -> traceback.StackSummary:
    """Stack of a thread, the innermost call last; empty if there is no such thread.

    Args:
        ident: The thread's, as `threading.get_ident` returns it.
    """
    frame = sys._current_frames().get(ident)
    return traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()


def set_warning_filters(filters: Sequence[Any]) -> None:
    """Replace the filters of `warnings`, and have modules that were warned of forget it."""
    warnings.resetwarnings()
    cast("list[Any]", warnings.filters).extend(filters)


# What loads a constant of the source (the second for small integers, from CPython 3.14 on), and
# what may stand between that and the instruction that takes it.
_LOADS = frozenset({"LOAD_CONST", "LOAD_SMALL_INT"})
_BETWEEN = frozenset({"CACHE", "PRECALL", "KW_NAMES", "EXTENDED_ARG", "NOT_TAKEN"})


@functools.lru_cache(maxsize=1024)
def offsets_after_constants(code: types.CodeType) -> frozenset[int]:
    """Offsets of a function's instructions whose last operand is a constant of the source.

    Returns:
        Offsets in its bytecode, as `f_lasti` of a frame that is at such an instruction.
    """
    offsets = set()
    before = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _BETWEEN:
            continue
        if before in _LOADS:
            offsets.add(instruction.offset)
        before = instruction.opname
    return frozenset(offsets)
