"""Assign submodules to stages: observe one call, measure it, cut it."""
