"""Which Trainers a strategy is for."""

from typing_extensions import override

from lightning_mgpu._compat.lightning import Strategy
from lightning_mgpu._compat.namespace import describe


class Belonging(Strategy):
    """A strategy that says to which of Lightning's packages it belongs.

    The Trainer of the other package refuses it, and shows it in the message. (Derived from a class
    of Lightning's, or its objects could not become ones of ours: see `pooled`.)
    """

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__name__}, for the Trainer of {describe()}>"
