"""Structural copies of a module: own buffers and attributes, shared parameters."""
