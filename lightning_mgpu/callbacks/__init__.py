"""Callbacks for any Trainer, with our strategies or Lightning's own."""

from lightning_mgpu.callbacks.non_finite import NonFiniteGuard
from lightning_mgpu.callbacks.out_of_memory import OutOfMemoryGuard
from lightning_mgpu.strategies.resume.exact_resume import ExactResume

__all__ = ["ExactResume", "NonFiniteGuard", "OutOfMemoryGuard"]
