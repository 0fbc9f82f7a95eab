"""Errors that the command shows without a traceback, as they say what to do."""


class ConfigError(ValueError):
    """The configuration is wrong; the message says what, at which key, and what to do."""


class SweepFailedError(RuntimeError):
    """A hyperparameter search ended without a result."""


class NonFiniteError(ArithmeticError):
    """A training step has a NaN or Inf.

    Args:
        words: Which step, and where it comes from.
        advice: What to do.
    """

    def __init__(self, words: str, advice: str = "") -> None:
        super().__init__(words, advice)
        self.words = words

    def __str__(self) -> str:
        return " ".join(filter(None, self.args))


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Message of an error on one line, or its type's name if it has none.

    Args:
        error: Any error.
        limit: The most characters; by default all.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]
