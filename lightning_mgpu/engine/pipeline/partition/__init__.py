"""Decide which stage each submodule belongs to: watch one call, measure it, deal it out."""
