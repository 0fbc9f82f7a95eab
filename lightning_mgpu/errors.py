"""Errors that the command shows without a traceback."""


class ConfigError(ValueError):
    """Something in the configuration is wrong: what, at which key, and what to do instead."""


class SweepFailedError(RuntimeError):
    """A hyperparameter search ended without a single result, or was lost."""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """An error's message on one line, or its type's name if it has none.

    Args:
        error: Any error.
        limit: The most characters; by default all.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]
