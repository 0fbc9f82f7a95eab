"""Lightning's messages that we know by their words, and the loggers that they come from.

Imports nothing of Lightning: the command reads this before there is anything to run.
"""

import importlib
import logging

from lightning_mgpu._compat import namespace

KNOWN_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # with torch 2.13
    "Experiment logs directory .* exists and is not empty",
    "The '.*_dataloader' does not have many workers",
    "The dirpath has changed from",
)
"""How warnings begin that tell nobody anything who uses the command."""

NOT_RESUMABLE = "You're resuming from a checkpoint that ended before the epoch ended"
"""How the warning begins that a DataLoader does not keep its place."""

# How `ModelCheckpoint` and `EarlyStopping` say that what they monitor is not there.
_NOT_LOGGED = ("could not find the monitored key", "Early stopping conditioned on metric")
_NO_DEVICE = ("No supported gpu backend", "accelerator is not available")


def names_missing_metric(error: BaseException) -> bool:
    """Whether a callback says that nobody has logged what it monitors."""
    return any(words in str(error) for words in _NOT_LOGGED)


def finds_no_checkpoint(error: BaseException, ckpt_path: str) -> bool:
    """Whether the Trainer says that one of its keywords for checkpoints finds none."""
    return f'(ckpt_path="{ckpt_path}")' in str(error)


def lacks_device(error: BaseException) -> bool:
    """Whether the Trainer says that this machine has no such accelerator."""
    return any(words in str(error) for words in _NO_DEVICE)


def is_tip(record: logging.LogRecord) -> bool:
    """Whether a log record recommends a product."""
    return "Tip:" in record.getMessage()


def loggers() -> list[logging.Logger]:
    """The loggers to which Lightning's packages give handlers of their own."""
    names = [*namespace.PACKAGES, *(n.pytorch for n in namespace.BOTH), "lightning.fabric"]
    return [logging.getLogger(name) for name in dict.fromkeys(names)]


def tip_loggers() -> list[logging.Logger]:
    """The loggers through which tips come."""
    return [
        logging.getLogger(each.module("pytorch.utilities.rank_zero")) for each in namespace.BOTH
    ]


def says_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    where = (namespace.known() or namespace.LIGHTNING).module("pytorch.utilities.memory")
    return bool(importlib.import_module(where).is_oom_error(error))
