"""Send pickled objects through Ray's object store."""

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_mgpu.launch import payload

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PackedObject:
    """A pickled object as arrays, which Ray stores and maps without a copy.

    Attributes:
        pickled: The object, less the memory of its large tensors.
        memory: What was left out. Until Ray has stored it: the tensors' own memory.
    """

    pickled: _Bytes
    memory: list[_Bytes]


def pack(obj: Any, names: dict[str, Any], tensors: Iterable[torch.Tensor] = ()) -> PackedObject:
    """Pickle `obj`.

    Args:
        obj: The object.
        names: Words for its parts in an error message.
        tensors: Those whose memory travels beside the pickle.

    Raises:
        UnpicklableError: Something in `obj` cannot be pickled.
    """
    with payload.Payload(obj, names, tensors) as packed:
        size = os.fstat(packed.file).st_size
        view = mmap.mmap(packed.file, size, prot=mmap.PROT_READ)
        memory = [np.frombuffer(buffer.raw(), np.uint8) for buffer in packed.buffers]
        return PackedObject(np.frombuffer(view, np.uint8), memory)


def unpack(packed: PackedObject, copy: bool = True) -> Any:
    """Unpickle the object, with its tensors on the CPU.

    Args:
        packed: As Ray hands it out.
        copy: Whether large tensors get memory of their own. Otherwise they lie in Ray's store, to
            be read only, and keep their place there for as long as they live.
    """
    file = os.memfd_create("lightning_mgpu")
    with os.fdopen(os.dup(file), "wb") as stream:
        stream.write(packed.pickled.data)
    return payload.load(file, [part.copy() if copy else part for part in packed.memory])
