"""What an error says about the object that keeps a launch from starting."""

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mgpu.launch.errors import UnpicklableError
from lightning_mgpu.launch.payload import Payload
from lightning_mgpu.launch.unpicklable import find

_LOCK = threading.Lock()


class Net(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Plain:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> None:
        pass


class Slotted:
    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = threading.Lock()


class OwnState:
    """Says itself what to pickle, under other names than its attributes'."""

    def __init__(self) -> None:
        self.hidden = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"shown": self.hidden}


class TupleState:
    def __getstate__(self) -> tuple[int, threading.Lock]:
        return 1, threading.Lock()


class Refuses:
    def __reduce__(self) -> str:
        raise TypeError("I stay here")


def _closure() -> Callable[[], Any]:
    lock = threading.Lock()
    return lambda: lock


def _nested_closure() -> Callable[[], Any]:
    inner = _closure()
    return lambda: inner()


def _uses_a_global() -> Callable[[], Any]:
    # By value, as functions of `__main__` go: there is no module to import it from.
    return lambda: _LOCK


_CASES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "itself": (lambda: {"model": threading.Lock()}, "model"),
    "attribute": (lambda: {"model": Net(lock=threading.Lock())}, "model.lock"),
    "submodule": (
        lambda: {"model": Net(net=nn.Sequential(Net(lock=threading.Lock())))},
        "model.net.0.lock",
    ),
    "list": (lambda: {"model": Net(parts=[1, threading.Lock()])}, "model.parts[1]"),
    "tuple": (lambda: {"model": Net(parts=(1, (2, threading.Lock())))}, "model.parts[1][1]"),
    "dict": (lambda: {"model": Net(parts={"a": threading.Lock()})}, "model.parts['a']"),
    "ordered dict": (
        lambda: {"model": Net(parts=OrderedDict(a=threading.Lock()))},
        "model.parts['a']",
    ),
    "namespace": (
        lambda: {"model": Plain(args=SimpleNamespace(lock=threading.Lock()))},
        "model.args.lock",
    ),
    "slots": (lambda: {"model": Plain(slotted=Slotted())}, "model.slotted.lock"),
    "__getstate__": (lambda: {"model": Plain(own=OwnState())}, "model.own.shown"),
    "tuple state": (lambda: {"model": Plain(own=TupleState())}, "model.own[1]"),
    "__reduce__": (lambda: {"model": Plain(part=Refuses())}, "model.part"),
    "lambda": (lambda: {"model": Plain(loss=_closure())}, "model.loss -> lock"),
    "nested closure": (lambda: {"model": _nested_closure()}, "model -> inner -> lock"),
    "global": (lambda: {"model": _uses_a_global()}, "model -> _LOCK"),
    "partial": (
        lambda: {"model": Plain(loss=functools.partial(print, 1, threading.Lock()))},
        "model.loss.args[1]",
    ),
    "partial keyword": (
        lambda: {"model": Plain(loss=functools.partial(print, file=threading.Lock()))},
        "model.loss.keywords['file']",
    ),
    "method": (
        lambda: {"hook": Plain(lock=threading.Lock()).method},
        "hook.__self__.lock",
    ),
    "generator": (lambda: {"model": Plain(batches=(i for i in range(3)))}, "model.batches"),
    "second root": (
        lambda: {
            "model": Net(),
            "trainer.callbacks[0]": Plain(x=1),
            "trainer.callbacks[1]": Plain(executor=Plain(lock=threading.Lock())),
        },
        "trainer.callbacks[1].executor.lock",
    ),
}


@pytest.mark.parametrize("case", _CASES)
def test_find_names_the_path(case: str) -> None:
    make, path = _CASES[case]
    roots = make()
    found = find(roots)
    assert found is not None
    assert found[0] == path


def test_find_survives_cycles() -> None:
    first, second = Plain(), Plain(lock=threading.Lock())
    first.second, second.first = second, first  # type: ignore[attr-defined]
    found = find({"model": first})
    assert found is not None
    assert found[0] == "model.second.lock"


@pytest.mark.parametrize(
    "obj",
    [
        Net(net=nn.Linear(2, 2), scale=torch.ones(1, requires_grad=True)),
        Plain(function=lambda: 1, module=torch.backends.cudnn, kind=Plain),
        [1, {"a": {2, 3}}, None],
        torch.ones(2, requires_grad=True) * 2,  # not a leaf: its data would go all the same
    ],
    ids=["module", "lambda", "containers", "tensor with a graph"],
)
def test_find_has_nothing_to_say_about_what_pickles(obj: Any) -> None:
    assert find({"model": obj}) is None


def test_find_does_not_pickle_tensors() -> None:
    """In as many layers as it takes to pickle the same tensors over and over."""
    model = Net(weight=nn.Parameter(torch.zeros(2**27)), lock=threading.Lock())  # 512 MiB
    for _ in range(5):
        model = Net(child=model)
    start = time.monotonic()
    found = find({"model": model})
    assert time.monotonic() - start < 5
    assert found is not None
    assert found[0] == "model" + 5 * ".child" + ".lock"


def test_message_names_path_type_and_ways_out() -> None:
    model = Net(net=Net(lock=threading.Lock()))
    with pytest.raises(UnpicklableError, match=r"^`model\.net\.lock` cannot be pickled") as info:
        Payload({"args": [model]}, {"model": model})
    message = str(info.value)
    assert "`_thread.lock`" in message
    assert "`setup()`" in message
    assert "`__getstate__`" in message
    assert "`torchrun --nproc-per-node N your_script.py`" in message
    assert isinstance(info.value.__cause__, TypeError)


def test_message_without_a_culprit_still_has_the_reason() -> None:
    """The names given may not cover everything that was pickled."""
    with pytest.raises(UnpicklableError, match=r"cannot be pickled: .*lock.*torchrun"):
        Payload({"model": Plain(), "other": threading.Lock()}, {"model": Plain()})
