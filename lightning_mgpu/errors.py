"""Errors that the command shows without a traceback."""


class ConfigError(ValueError):
    """The configuration is wrong; the message says what, at which key, and what to do."""


class SweepFailedError(RuntimeError):
    """A hyperparameter search ended without a result."""
