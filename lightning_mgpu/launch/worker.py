"""Main loop of a worker process: wait for a launch, run it, clean up.

Started as ``python -c "from lightning_mgpu.launch.worker import main; main(...)"`` rather than
with `multiprocessing`, so that nothing of the caller's ``__main__`` runs again.
"""

import ctypes
import faulthandler
import gc
import os
import queue
import select
import signal
import socket
import sys
import threading
from typing import Any, TypeVar

from lightning_mgpu.launch import payload, protocol
from lightning_mgpu.launch.channel import Channel
from lightning_mgpu.launch.errors import RemoteFailure
from lightning_mgpu.launch.position import Observer
from lightning_mgpu.launch.rank import GroupGuard
from lightning_mgpu.launch.rank_variables import of_rank
from lightning_mgpu.launch.torch_state import release_accelerator_memory

_Message = TypeVar("_Message")
_PARENT_CHECK_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1

_running_in_worker = False
_forked_by_main_thread = False


def is_worker() -> bool:
    """Return whether this process is a worker of some pool."""
    return _running_in_worker


def main(descriptor: int, parent: int, spawned_by_main_thread: bool, crash_file: int) -> None:
    """Serve launches until the caller closes its end of the socket.

    Args:
        descriptor: Our end of the socket pair.
        parent: Process id of the caller.
        spawned_by_main_thread: Whether the kernel's parent-death signal, which follows the
            *thread* that spawned us, can be trusted.
        crash_file: Descriptor of the file for our stacks if we crash.
    """
    global _running_in_worker
    _running_in_worker = True
    faulthandler.enable(crash_file)
    if spawned_by_main_thread:
        _die_with_parent()
        os.register_at_fork(before=_note_forking_thread, after_in_child=_die_with_main_thread)
    channel = Channel(socket.socket(fileno=descriptor))
    inbox = _Inbox(channel, parent)
    # The modules just imported never become garbage: keep every later collection off them.
    gc.freeze()
    gc.enable()
    _Worker(channel, inbox).serve()


class _Inbox:
    """Messages for the main thread; a second thread answers the urgent ones."""

    def __init__(self, channel: Channel, parent: int) -> None:
        self._channel = channel
        self._parent = parent
        self._messages: queue.SimpleQueue[tuple[Any, int | None]] = queue.SimpleQueue()
        self.observer = Observer(threading.get_ident())
        threading.Thread(target=self._receive, name="mgpu-inbox", daemon=True).start()

    def next(self) -> tuple[Any, int | None]:
        """The next message and the file that came with it."""
        return self._messages.get()

    def expect(self, kind: type[_Message]) -> _Message:
        """The next message, which must be a `kind`."""
        message, _ = self.next()
        assert isinstance(message, kind), message
        return message

    def _receive(self) -> None:
        try:
            while True:
                while not select.select([self._channel], [], [], _PARENT_CHECK_SECONDS)[0]:
                    if os.getppid() != self._parent:
                        raise EOFError
                try:
                    message, file = self._channel.receive()
                except EOFError:
                    raise
                except Exception as error:  # a class in the message is not to be found here
                    self._channel.send(protocol.Failed(RemoteFailure.of(error)))
                    continue
                if isinstance(message, protocol.Look):
                    position = self.observer.look(message.detailed)
                    self._channel.send(protocol.Seen(message.launch, position))
                else:
                    self._messages.put((message, file))
        except (EOFError, OSError):
            # The caller is gone or wants us gone. Our own children (DataLoader workers) are in
            # our process group and go with us.
            os.killpg(0, signal.SIGKILL)


class _Worker:
    def __init__(self, channel: Channel, inbox: _Inbox) -> None:
        self._channel = channel
        self._inbox = inbox

    def serve(self) -> None:
        while True:
            message, file = self._inbox.next()
            assert isinstance(message, protocol.Run), message
            assert file is not None
            self._serve_one(message, file)
            gc.collect()
            release_accelerator_memory()
            self._channel.send(protocol.Idle())

    def _serve_one(self, run: protocol.Run, file: int) -> None:
        with GroupGuard():
            try:
                result = self._run(run, file)
                packed = payload.Payload(result, {f"result of rank {run.rank.rank}": result})
            except BaseException as error:
                self._channel.send(protocol.Failed(RemoteFailure.of(error)))
                # Peers may still be talking to us: only the caller knows when to end this.
                self._inbox.next()
                raise
            _flush()  # the caller may go on as soon as it hears of us
            with packed:
                self._channel.send(protocol.Done(), packed.file)
            del result
            self._inbox.expect(protocol.Release)
        _flush()

    def _run(self, run: protocol.Run, file: int) -> Any:
        run.state.apply()
        self._inbox.observer.begin()
        os.environ.update(of_rank(run.rank))
        if run.prepare is not None:
            run.prepare(run.rank)
        buffers = self._inbox.expect(protocol.Buffers).buffers
        function = payload.load(file, buffers, run.locations)
        self._channel.send(protocol.Ready())
        self._inbox.expect(protocol.Go)
        try:
            with self._inbox.observer.observing(function):
                return function(run.rank)
        except run.normal_exit:
            return None


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _note_forking_thread() -> None:
    global _forked_by_main_thread
    _forked_by_main_thread = threading.current_thread() is threading.main_thread()


def _die_with_main_thread() -> None:
    """End a forked child, such as a DataLoader worker, when this worker ends."""
    if _forked_by_main_thread:  # another thread may end long before the process does
        _die_with_parent()
