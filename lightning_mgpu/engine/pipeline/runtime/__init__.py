"""Take micro-batches through the stages, forward and backward."""
