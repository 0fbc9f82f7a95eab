"""Errors that the command shows without a traceback."""


class ConfigError(ValueError):
    """The configuration is wrong; the message says what, at which key, and what to do."""


class SweepFailedError(RuntimeError):
    """A hyperparameter search ended without a result."""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Message of an error on one line, or its type's name if it has none.

    Args:
        error: Any error.
        limit: The most characters; by default all.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]
