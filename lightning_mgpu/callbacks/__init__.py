"""Callbacks for any Trainer, with our strategies or Lightning's own."""

from lightning_mgpu.callbacks.exact_resume import ExactResume
from lightning_mgpu.callbacks.non_finite import NonFiniteGuard

__all__ = ["ExactResume", "NonFiniteGuard"]
