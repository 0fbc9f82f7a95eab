"""The words by which errors of torch are told apart, where their class does not do so.

Each has a test that provokes the error (`tests/compat/test_compat_torch_messages.py`). Imports
nothing of torch.
"""

import re

SIZE_OF_ANOTHER_BATCH = re.compile(
    r"[Ss]ize of tensor a|[Ss]hapes? .*(cannot be|mismatch|not)|[Ss]izes? of tensors must match"
    r"|shape '.*' is invalid|must match the (existing )?size|batch_size|batch size"
    r"|[Ee]xpected input batch|mat1 and mat2|same (number|size)|broadcast|Dimension out of range"
    r"|index .* (is )?out of (bounds|range)|expanded size|inconsistent tensor size"
    r"|(must be|to be) (the same as|equal size)|[Ee]xpected hidden"
)
"""An operation had tensors whose sizes do not fit."""

SIZES_OF_TWO_OPERANDS = "The size of tensor a ("
"""Of those: an operation by elements."""

GRAPH_IS_GONE = "backward through the graph a second time"
"""A backward pass came to a graph that an earlier one has freed."""

WRITTEN_TO = "modified by an inplace operation"
"""A backward pass needed a tensor that was written to since."""

COLLECTIVE_FAILED = (
    # Gloo reports a lost or silent peer as a plain `RuntimeError`. Most messages begin with the
    # place in its source; the others do not say where they come from.
    *("gloo/", "NCCL", "monitoredBarrier", "Gloo connectFullMesh"),
    # A pair of ranks whose connection gloo closed, by the first error and for every later call.
    *("caused pair closure", "Connection closed by peer", "Connection reset by peer"),
    *("Socket closed", "Socket unexpectedly closed", "Broken pipe"),
    *("timed out connecting", "Connect timeout", "Operation timed out!"),
)
"""A collective lost another rank, or waited too long for it."""

COLLECTIVE_TIMED_OUT = ("timed out", "timeout", "timing out", "failed to pass monitoredbarrier")
"""Of those, in lower case: it waited too long."""

STATE_DICT_IS_ANOTHERS = "Error(s) in loading state_dict"
"""A state dict is of a model with other names or sizes."""

NOT_ALLOWED_IN_WEIGHTS = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)")
"""``torch.load(weights_only=True)`` came to something else; the group is its name."""
