"""Callbacks for any Trainer, with our strategies or Lightning's own."""

from lightning_mgpu.callbacks.exact_resume import ExactResume

__all__ = ["ExactResume"]
