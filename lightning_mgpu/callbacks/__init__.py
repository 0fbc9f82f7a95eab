"""Callbacks for any Trainer, with our strategies or Lightning's own."""

from lightning_mgpu.callbacks.exact_resume import ExactResume
from lightning_mgpu.callbacks.non_finite import NonFiniteGuard
from lightning_mgpu.callbacks.out_of_memory import OutOfMemoryGuard

__all__ = ["ExactResume", "NonFiniteGuard", "OutOfMemoryGuard"]
