"""Errors that the command shows without a traceback."""


class ConfigError(ValueError):
    """Something in the configuration is wrong: what, at which key, and what to do instead."""


class SweepFailedError(RuntimeError):
    """A hyperparameter search ended without a single result, or was lost."""
