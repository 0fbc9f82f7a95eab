"""A pipeline's timeline: a trace file, drawn as PNG and HTML. No torch, no Trainer.

The libraries that draw come with the extra `report` and are imported where they are used.
"""

from lightning_mgpu.timeline.drawing import draw

__all__ = ["draw"]
