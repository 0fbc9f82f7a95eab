"""The error for input that a person can mend; the command shows it without a traceback."""


class ConfigError(ValueError):
    """Something in the configuration is wrong: what, at which key, and what to do instead."""
