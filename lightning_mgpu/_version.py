"""The package's version, here and nowhere else (`pyproject.toml` reads it without importing)."""

__version__ = "0.1.0.dev0"
