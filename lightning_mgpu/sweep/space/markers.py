"""Values with a meaning of their own, for functions of `hydra.sweeper.custom_search_space`."""

from enum import Enum


class Marker(Enum):
    """What such a function may return in place of a value."""

    LEAVE_OUT = "leave out"


LEAVE_OUT = Marker.LEAVE_OUT
"""The trial has no override of this key."""
