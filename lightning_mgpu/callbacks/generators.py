"""States of all random number generators of a process, as a checkpoint can hold them."""

import random
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lightning_mgpu.engine.device import random_state, set_random_state


def generator_states(
    devices: Iterable[torch.device], own: Sequence[torch.Generator] = ()
) -> dict[str, Any]:
    """States of the generators that a run may draw from.

    Args:
        devices: Accelerators whose generators count besides the CPU's.
        own: Generators that the program has made itself.

    Returns:
        Numbers, tensors, and lists and dicts of them.
    """
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.default_generator.get_state(),
        "devices": {str(device): random_state(device) for device in devices},
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "own": [generator.get_state() for generator in own],
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)
        if state["bit_generator"] == "MT19937":
            key = torch.from_numpy(state["state"]["key"].astype("int64"))
            rest = state["state"]["pos"], state["has_gauss"], state["gauss"]
            states["numpy"] = [
                key,
                *(value.item() if hasattr(value, "item") else value for value in rest),
            ]
    return states


def restore_generators(states: dict[str, Any], own: Sequence[torch.Generator] = ()) -> None:
    """Put generators back to where they were.

    Args:
        states: What `generator_states` has returned.
        own: As there, in the same order.
    """
    torch.default_generator.set_state(states["torch"])
    for name, state in states["devices"].items():
        set_random_state(torch.device(name), state)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    for generator, state in zip(own, states["own"], strict=False):
        generator.set_state(state)
    if "numpy" in states:
        key, position, has_gauss, normal = states["numpy"]
        sys.modules["numpy"].random.set_state(
            ("MT19937", key.numpy().astype("uint32"), position, has_gauss, normal)
        )
