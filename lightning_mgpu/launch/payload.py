"""Objects sent to other processes: pickled once, tensors mapped rather than copied."""

import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pickle import PickleBuffer
from typing import Any

import torch

from lightning_mgpu._compat.torch_pickling import pickle_module
from lightning_mgpu.launch.out_of_band import Aside, AsidePickler, leaving_out, putting_in
from lightning_mgpu.launch.unpicklable import explain

_PICKLE_MODULE = pickle_module(AsidePickler)


class Payload:
    """A pickled object in an anonymous file, to be sent to any number of processes.

    The file lies in memory where the system has `memfd_create`, which unlike ``/dev/shm`` no
    container limits; elsewhere in the temporary directory. It vanishes with its last user.

    Args:
        obj: The object to pickle.
        names: Words for the parts of `obj` in an error message: attribute path -> name.
        rewritten: Tensors that every receiver will write to as a whole. Sharing their memory gains
            nothing then, so the large ones stay out of the file: send `buffers` along with it.

    Raises:
        UnpicklableError: Something in `obj` cannot be pickled.
    """

    def __init__(
        self,
        obj: Any,
        names: dict[str, Any] | None = None,
        rewritten: Iterable[torch.Tensor] = (),
    ) -> None:
        self._aside = Aside(rewritten)
        self.file = _anonymous_file()
        try:
            # Buffered: `torch.save` takes no notice of short writes, and the kernel writes no more
            # than 2 GiB at once.
            with (
                os.fdopen(os.dup(self.file), "wb") as stream,
                _without_checksums(),
                leaving_out(self._aside),
            ):
                torch.save(
                    obj,
                    stream,
                    pickle_module=_PICKLE_MODULE,
                    pickle_protocol=pickle.HIGHEST_PROTOCOL,
                )
        except Exception as error:
            self.close()
            raise explain(error, names if names is not None else {"object": obj}) from error
        except BaseException:
            self.close()
            raise

    @property
    def buffers(self) -> list[PickleBuffer]:
        """Memory of the tensors left out of the file; empty after `close`."""
        return self._aside.buffers()

    def close(self) -> None:
        """Release this process's hold of the file and of the tensors outside."""
        self._aside = Aside(())
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __enter__(self) -> "Payload":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(file: int, buffers: Sequence[Any] = (), locations: Mapping[str, str] | None = None) -> Any:
    """Load the object in a `Payload`'s file, and close the file.

    Tensors are private mappings of the file: reading shares the memory, writing copies the page.

    Args:
        file: The payload's file, or a copy of it.
        buffers: Copies of the payload's `buffers`; the tensors will lie in them.
        locations: Where tensors of an accelerator go, as ``{"cuda:0": "cuda:1"}``; those of others
            stay where they were. Default: all tensors go to the CPU.
    """
    try:
        os.lseek(file, 0, os.SEEK_SET)
        with putting_in(buffers):
            return torch.load(
                f"/dev/fd/{file}",
                map_location="cpu" if locations is None else dict(locations),
                weights_only=False,
                mmap=True,
                pickle_module=pickle,
            )
    finally:
        os.close(file)


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Context without checksums: the file stays in memory, and they take a third of the time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lightning_mgpu")
    file, path = tempfile.mkstemp(prefix="lightning_mgpu_")
    os.unlink(path)
    return file
